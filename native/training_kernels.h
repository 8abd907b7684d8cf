// What the kernels of training take, and the table of them that every instruction set has.
#pragma once
#include "kernels.h"

namespace aprium {

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

// Causal attention within segments; `half`: q, k, v and out hold bf16.
struct FlashTask {
    const void *q, *k, *v;  // [T, heads, head_dim], [T, kv_heads, head_dim] twice
    bool half;
    int64_t heads, kv_heads, head_dim;
    void* out;        // as q
    float* log_mass;  // [T, heads]: logarithm of the sum of a row's exponentials
};
struct FlashGradients {
    const void* out;
    void* q;        // as q of the task
    float *k, *v;   // [T, heads, head_dim]: parts to be summed
};

struct TrainingKernels {
    int64_t (*flash_scratch)(const FlashTask&);
    void (*flash)(const FlashTask&, int64_t begin, int64_t length, int64_t first, int64_t head, uint8_t* scratch);
    int64_t (*flash_back_scratch)(const FlashTask&, int64_t length);
    void (*flash_back)(const FlashTask&, const FlashGradients&, int64_t begin, int64_t length, int64_t head,
                       uint8_t* scratch);
    void (*conv)(const ConvTask&, int64_t token_begin, int64_t token_end);
    void (*conv_back)(const ConvTask&, const ConvGradients&, int64_t channel_begin, int64_t channel_end);
    void (*norm)(const NormTask&, int64_t token_begin, int64_t token_end);
    void (*norm_back)(const NormTask&, const NormGradients&, int64_t token_begin, int64_t token_end, float* grad_weight);
    // out [T, kv_heads, head_dim] = the sums of parts [T, heads, head_dim] over the heads of a group.
    void (*sum_heads)(const FlashTask&, const float* parts, int64_t token_begin, int64_t token_end, void* out);
    int64_t (*ssd_forward_scratch)(const SsdTask&);  // also for walks
    int64_t (*ssd_backward_scratch)(const SsdTask&);
    void (*ssd_walk)(const SsdTask&, const SsdChunk*, int64_t num_chunks, int64_t head, uint8_t* scratch);
    void (*ssd_forward)(const SsdTask&, const SsdChunk&, int64_t group, uint8_t* scratch);
    void (*ssd_walk_back)(const SsdTask&, const SsdGradients&, const SsdChunk*, int64_t num_chunks, int64_t head,
                          uint8_t* scratch);
    void (*ssd_backward)(const SsdTask&, const SsdGradients&, const SsdChunk&, int64_t number, int64_t group,
                         uint8_t* scratch);
};

}  // namespace aprium
