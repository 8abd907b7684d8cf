// The layers of a model, each one call: norm, mixer, residual. Weights are pointers into memory that
// the caller keeps; small vectors are copied. A `Machine` is one model's pool, kernels and buffers;
// it and everything made with it belong to one thread at a time.
#pragma once
#include <array>
#include <map>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace aprium {

using Floats = std::vector<float>;

// Segments of a packed step, as `Layout` has them.
struct Step {
    std::vector<int64_t> lengths, starts, context, slots;
    // By sequence: how many tokens of the ring to replay first, and whether to hold the recurrent state
    // there and put this step's tokens into the ring.
    std::vector<int64_t> replay, hold;
    std::vector<std::vector<int64_t>> pages;
    int64_t page_size, num_tokens;
};

// A matrix and how its inputs are rounded; `bias` is empty or [rows].
struct Weight {
    Matrix matrix;
    Precision precision;
    Floats bias;
};

// Time spent in calls, weight bytes that their products read, and for products with weights by columns
// how many columns there were and how many were left out.
struct Counters {
    double seconds = 0;
    int64_t bytes = 0, columns = 0, skipped = 0;
};

class Machine {
   public:
    Machine(const Kernels& kernels, int num_threads) : kernels(kernels), pool(num_threads) {}

    const Kernels& kernels;
    Pool pool;
    Counters counters;
    std::mutex turn;  // held by calls that several threads may make

    // Rows of one packed input: `tokens` point into a buffer of their own.
    struct Packed {
        Buffer buffer;
        std::vector<Token> tokens;
    };
    // A product to compute: `tokens[i].out` says where each result row goes.
    struct Job {
        const Weight* weight;
        const Token* tokens;
        int64_t num_tokens;
    };

    void pack(Packed& packed, Precision precision, const float* x, int64_t num_rows, int64_t cols);
    // Square what is positive in x [num_rows, cols], zero the rest, and pack it.
    void activate_and_pack(Packed& packed, Precision precision, float* x, int64_t num_rows, int64_t cols);
    void multiply(const std::vector<Job>& jobs);
    // out [T, rows] = x [T, cols] W^T + bias, with `packed` as working memory.
    void linear(const Weight& weight, const float* x, int64_t num_tokens, float* out, Packed& packed);
    void multiply_packed(const Weight& weight, float* out, Packed& packed);
    void add_bias(const Weight& weight, float* out, int64_t num_tokens);
    void norm(const Floats& weight, float eps, const float* x, int64_t num_tokens, float* out);
    // Call f(i) for i below count, in parallel where there is much to do (`work` values each).
    template <class F>
    void each(int64_t count, int64_t work, const F& f) {
        if (count * work < kSerialWork) {
            for (int64_t i = 0; i < count; i++) f(i, 0);
        } else {
            pool.run(count, f);
        }
    }
    Buffer normed, wide, mixed, narrow, latent, routed, stream, joined, ahead, some, given, found, logits;
    std::array<Packed, 4> packed;

   private:
    static constexpr int64_t kSerialWork = 1 << 14;
    struct Chunk {
        int32_t job;
        int64_t begin, end;
    };
    std::vector<Chunk> chunks_;

    void count(const Job& job);
    template <class F>
    void pack_rows(Packed& packed, Precision precision, const float* x, int64_t num_rows, int64_t cols, const F& before);
};

struct Mamba {
    Floats norm;
    float eps;
    Weight in_proj, out_proj;
    int64_t num_groups, heads, head_dim, state_size, kernel;
    Floats conv_weight, conv_bias, a, d, dt_bias, mixer_norm;  // conv_weight [kernel, channels]
    float dt_min, dt_max;
    // x [T, D] += mixer(norm(x)); conv [slots, kernel - 1, channels], ssm [slots, H, P, N], ring
    // [slots, ring_size, in_proj's rows].
    void run(Machine& machine, float* x, const Step& step, float* conv, float* ssm, float* ring,
             int64_t ring_size) const;
};

struct Attention {
    Floats norm;
    float eps;
    Weight q_proj, k_proj, v_proj, o_proj;
    int64_t heads, kv_heads, head_dim;
    float key_scale, value_scale;  // of fp8 pages
    // keys, values [pages, page_size, K, P], of f32, bf16 or fp8.
    void run(Machine& machine, float* x, const Step& step, void* keys, void* values, Format cache) const {
        run(machine, x, x, step, step, keys, values, cache);
    }
    // The same where only some tokens go on: keys and values of all that `step` places are written, but
    // only the tokens that `asking` places attend, whose rows of the stream are `out`.
    void run(Machine& machine, const float* x, float* out, const Step& step, const Step& asking, void* keys,
             void* values, Format cache) const;
};

struct Mlp {
    Weight up, down;
    // out [T, D] = down(relu(up(x))^2), each token by itself.
    void run(Machine& machine, const float* x, int64_t num_tokens, float* out) const;
};

struct MlpBlock {
    Floats norm;
    float eps;
    Mlp mlp;
    void run(Machine& machine, float* x, int64_t num_tokens) const;
};

struct Router {
    Weight gate;
    Floats bias;
    int64_t num_active, num_groups, num_active_groups;
    bool normalise;
    float scale;
    // Choose for one token from `scores` [E]; experts ascend.
    void choose(const float* scores, int64_t* experts, float* weights) const;
};

struct Moe {
    Floats norm;
    float eps;
    Router router;
    std::vector<Weight> up, down;  // by expert
    Mlp shared;
    std::optional<Weight> to_latent, from_latent;
    void run(Machine& machine, float* x, int64_t num_tokens) const;
};

}  // namespace aprium
