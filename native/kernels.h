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

// Tokens [begin, begin + count) of one segment; the states before and after them, by number, -1 for none.
struct SsdChunk {
    int64_t begin, count, entering, leaving;
};

// The recurrence over packed segments, from zero states. Rows of x, b and c lie so many floats apart.
struct SsdTask {
    const float *x, *b, *c;  // [T, heads, head_dim], [T, groups, state_size] twice
    int64_t x_row, b_row, c_row;
    const float *dt, *a, *d;  // [T, heads], [heads] twice
    int64_t heads, groups, head_dim, state_size, chunk_size;
    float* states;  // [numbers, heads, state_size, head_dim], the last two padded to multiples of 16
    float* y;       // [T, heads, head_dim]
};

struct SsdGradients {
    const float* y;           // as y of the task; the rest is written
    float* states;            // as states of the task
    float *x, *b, *c, *dt;    // without gaps between rows
    float *a, *d;             // [chunks, heads]: parts to be summed
};

constexpr int64_t kMostTaps = 8;       // of a convolution with gradients
constexpr int64_t kConvChannels = 64;  // of one task of its gradients

// SiLU of a causal depthwise convolution of packed segments; `half`: x holds bf16.
struct ConvTask {
    const void* x;  // [tokens, channels], rows `x_row` values apart
    int64_t x_row;
    bool half;
    int64_t tokens, channels, kernel;
    const float *weight, *bias;  // [kernel, channels], [channels] or null
    const int64_t* positions;    // [tokens], in their segments
    float* out;                  // [tokens, channels]
};
struct ConvGradients {
    const float* out;
    void* x;  // [tokens, channels] as x of the task
    float *weight, *bias;
};

// RMS norm by groups of `x`, or of x * silu(gate). `half`: gate and out hold bf16; `x_half`: x does.
struct NormTask {
    const void *x, *gate;  // [tokens, size] each, rows of the gate `gate_row` values apart, or null
    int64_t gate_row;
    bool x_half, half;
    int64_t tokens, size, groups;
    const float* weight;  // [size]
    float eps;
    float* scales;  // [tokens, groups]: what values were multiplied by
    void* out;      // [tokens, size]
};
struct NormGradients {
    const void* out;
    void *x, *gate;  // [tokens, size] each, as x and gate of the task
};

struct TrainingKernels {
    void (*conv)(const ConvTask&, int64_t token_begin, int64_t token_end);
    void (*conv_back)(const ConvTask&, const ConvGradients&, int64_t channel_begin, int64_t channel_end);
    void (*norm)(const NormTask&, int64_t token_begin, int64_t token_end);
    void (*norm_back)(const NormTask&, const NormGradients&, int64_t token_begin, int64_t token_end, float* grad_weight);
    int64_t (*ssd_forward_scratch)(const SsdTask&);  // also for walks
    int64_t (*ssd_backward_scratch)(const SsdTask&);
    void (*ssd_walk)(const SsdTask&, const SsdChunk*, int64_t num_chunks, int64_t head, uint8_t* scratch);
    void (*ssd_forward)(const SsdTask&, const SsdChunk&, int64_t group, uint8_t* scratch);
    void (*ssd_walk_back)(const SsdTask&, const SsdGradients&, const SsdChunk*, int64_t num_chunks, int64_t head,
                          uint8_t* scratch);
    void (*ssd_backward)(const SsdTask&, const SsdGradients&, const SsdChunk&, int64_t number, int64_t group,
                         uint8_t* scratch);
};

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
