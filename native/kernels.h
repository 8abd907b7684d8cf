// What the kernels of every instruction set have in common: data and the table of functions.
// Plain pointers and sizes; kernels neither allocate nor throw.
#pragma once
#include <cstdint>
#include <cstring>

namespace aprium {

enum class Format { f32, bf16, f16, fp8, nvfp4, nvfp4_transposed };
// What the inputs of a matrix product are rounded to. int8 is for NVFP4 weights only.
enum class Precision { f32, bf16, int8 };

constexpr int64_t kBlock = 16;    // columns that share an NVFP4 scale
constexpr int64_t kStep = 256;    // columns of one step of the int8 kernel: a block a lane
constexpr int64_t kGroup = 128;   // rows of one group of the transposed layout
constexpr int64_t kKeyBlock = 256;  // keys of one step of the online softmax
constexpr int64_t kMostHeld = 18;   // tokens that a ring has room for

// A weight [rows, cols] as its file holds it; values are multiplied by `scale`.
// nvfp4: codes [rows, cols / 2] and E4M3 scales [rows, cols / 16]. nvfp4_transposed: codes
// [cols, rows / 2], in groups of 128 rows whose order `unpack_quads` undoes, scales [cols / 16, rows].
struct Matrix {
    Format format;
    const uint8_t* data;
    const uint8_t* scales;
    float scale;
    int64_t rows, cols;
};

// One packed input row of a matrix product and where its results go. `x` holds
// f32: floats, zeros up to a multiple of 16. bf16: the same up to a multiple of 32.
// int8: for each step of 256 columns, bytes [4, 64], vector v holding columns 16 j + {0 2 4 6},
// {1 3 5 7}, {8 10 12 14}, {9 11 13 15} of block j in lane j; then for each block int32 -12 times
// its sum; then its power of two above `scale`, shifted into the exponent field of a float.
struct Token {
    const void* x;
    float scale;
    float* out;
};

struct MambaTask {
    const float* projected;  // [tokens, width]: gate, x, B, C, dt
    int64_t tokens, width;
    int64_t group, num_groups, heads, head_dim, state_size, kernel;  // heads: of all groups
    const float *conv_weight, *conv_bias;  // [kernel, channels], [channels]
    const float *a, *d, *dt_bias, *norm_weight;
    float dt_min, dt_max, eps;
    float* tail;   // [kernel - 1, channels] of this sequence, read and written
    float* state;  // [heads, head_dim, state_size]
    bool fresh;    // tail and state are those of no token: what they hold is not read
    const float* replayed;  // [num_replayed, width]: tokens before, not in tail and state yet
    int64_t num_replayed;
    bool hold;     // leave `tail` and `state` as they are after the replayed tokens
    float* out;    // [tokens, inner]
};

struct AttentionTask {
    const float* q;  // [tokens, heads, head_dim], first token of the segment
    int64_t tokens, heads, kv_heads, head_dim;
    int64_t first_row, num_rows;  // rows (token, head of the group) of this task
    int64_t kv_head, context;
    const void *keys, *values;  // [pages, page_size, kv_heads, head_dim]
    Format cache;               // of the pages: f32, bf16 or fp8
    float key_scale, value_scale;  // that fp8 values are multiplied by
    const int64_t* pages;
    int64_t page_size;
    float* out;  // as q
};

enum class EncodeRule { max, four_over_six, sweep };

// A matrix to encode as NVFP4 under the global scale `scale_2`, which gives `amax` its largest scale.
struct EncodeTask {
    EncodeRule rule;
    bool half;      // x holds bf16
    const void* x;  // [rows, cols]
    const float* importance;  // [cols], or null
    int64_t cols;
    float scale_2, amax;
    uint8_t* packed;  // [rows, cols / 2]
    uint8_t* scales;  // [rows, cols / 16]
};

struct TrainingKernels;  // see training_kernels.h

struct Kernels {
    const char* name;
    int64_t (*packed_bytes)(Precision, int64_t cols);
    void (*pack)(Precision, const float* x, int64_t cols, uint8_t* buffer, Token&);
    int64_t (*matmul_scratch)(const Matrix&, Precision, int64_t num_rows, int64_t num_tokens);
    void (*matmul)(const Matrix&, Precision, int64_t row_begin, int64_t row_end, const Token*, int64_t num_tokens,
                   uint8_t* scratch);
    // Columns that `matmul` leaves out with int8 tokens and transposed weights, over all its passes.
    int64_t (*skipped_columns)(const Matrix&, const Token*, int64_t num_tokens);
    void (*widen)(Format, const uint8_t* x, int64_t size, float* out);  // of a float format
    void (*rms_norm)(const float* x, const float* weight, float eps, int64_t size, float* out);
    void (*relu_squared)(float* x, int64_t size);
    void (*add)(float* x, const float* y, int64_t size);                       // x += y
    void (*weighted_sum)(float* out, const float* const* parts, const float* weights, int64_t num, int64_t size);
    void (*sigmoid)(float* x, int64_t size);
    int64_t (*mamba_scratch)(const MambaTask&);
    void (*mamba)(const MambaTask&, uint8_t* scratch);
    int64_t (*attention_scratch)(const AttentionTask&);
    void (*attention)(const AttentionTask&, uint8_t* scratch);
    void (*log_softmax_at)(const float* logits, int64_t size, int64_t* argmax, float* peak, float* log_mass);
    void (*encode_nvfp4)(const EncodeTask&, int64_t row_begin, int64_t row_end);
    uint64_t (*read)(const uint8_t* data, int64_t size);  // touch every byte: measures bandwidth
    double (*peak)(Precision, int64_t rounds);            // operations done, multiply and add counted
    const TrainingKernels* training;
};

namespace scalar {
extern const Kernels kernels;
extern const TrainingKernels training_kernels;
}  // namespace scalar
#ifdef __x86_64__
namespace avx2 {
extern const Kernels kernels;
extern const TrainingKernels training_kernels;
}  // namespace avx2
namespace avx512 {
extern const Kernels kernels;
extern const TrainingKernels training_kernels;
}  // namespace avx512
#endif

inline uint16_t round_bf16(float x) {  // to nearest even; NaN stays NaN
    uint32_t y;
    memcpy(&y, &x, 4);
    if ((y & 0x7FFFFFFF) > 0x7F800000) return (uint16_t)(y >> 16 | 0x40);
    return (uint16_t)((y + 0x7FFF + (y >> 16 & 1)) >> 16);
}

// A magnitude of at most 448 to E4M3, to nearest even.
inline uint8_t round_fp8(float p) {
    int32_t b;
    if (p < 0x1p-6f) {
        float shifted = p * 512.f + 12582912.f;  // 1.5 * 2^23: the sum is rounded to an integer
        memcpy(&b, &shifted, 4);
        return (uint8_t)(b - 0x4B400000);
    }
    memcpy(&b, &p, 4);
    return (uint8_t)(((b + 0x7FFFF + (b >> 20 & 1)) >> 20) - (120 << 3));
}

}  // namespace aprium
