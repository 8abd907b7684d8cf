// Operations of training, forward and backward, over packed tokens: what one call spreads over threads.
// Tasks never depend on the number of threads, and what several of them add to is summed in order
// afterwards, so results do not either.
#pragma once
#include <vector>

#include "blocks.h"
#include "training_kernels.h"

namespace aprium {

// Packed segments in chunks that begin anew with each, and the segments' first chunks.
struct Chunks {
    std::vector<SsdChunk> chunks;
    std::vector<int64_t> firsts;
    int64_t num_states = 0;
    Chunks(const std::vector<int64_t>& lengths, int64_t chunk_size);
};

void run_ssd(Machine& machine, const Chunks& chunks, const SsdTask& task);
// `to.a` and `to.d` are [heads] here; `to.states` is made.
void run_ssd_back(Machine& machine, const Chunks& chunks, const SsdTask& task, SsdGradients to);

// `lengths` are those of the segments.
void run_flash(Machine& machine, const std::vector<int64_t>& lengths, const FlashTask& task);
// `grad_k` and `grad_v` [T, kv_heads, head_dim] hold bf16 if the task does; `to.k` and `to.v` are made.
void run_flash_back(Machine& machine, const std::vector<int64_t>& lengths, const FlashTask& task, FlashGradients to,
                    void* grad_k, void* grad_v);
void run_conv(Machine& machine, const ConvTask& task);
void run_conv_back(Machine& machine, const ConvTask& task, const ConvGradients& to);
void run_norm(Machine& machine, const NormTask& task);
// `grad_weight` [size] is the sum over blocks of 64 tokens, each summed by itself.
void run_norm_back(Machine& machine, const NormTask& task, const NormGradients& to, float* grad_weight);

}  // namespace aprium
