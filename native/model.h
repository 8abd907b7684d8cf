// A whole model: embedding, layers in order, last norm, vocabulary, and the prediction heads that draft.
// One call each for a step and for all of its drafting: between layers that stream through memory, every
// line of Python would run from a cold cache, and a small model would spend as long in them as in the layers.
#pragma once
#include <functional>

#include "blocks.h"

namespace aprium {

// Where a model's generation state lies: addresses by layer, as in `HybridState`.
struct State {
    std::vector<uintptr_t> conv, ssm, ring, keys, values;
    int64_t ring_size;
    Format cache;
};

// One layer: a call on the stream x [T, D]; `ask` is null, or that of `Attention` for some tokens only.
struct Layer {
    bool stateful;
    std::function<void(Machine&, float*, const Step&, const State&)> run;
    std::function<void(Machine&, const float*, float*, const Step&, const Step&, const State&)> ask;
};

// Layers in order.
struct Program {
    std::vector<Layer> layers;

    void run(Machine& machine, float* x, const Step& step, const State& state) const {
        for (auto& layer : layers) layer.run(machine, x, step, state);
    }
    // Run for the state and for those tokens that `asking` places, whose numbers in `step` are `rows`:
    // after the last layer with a state, which has to be attention, the others are left out. Returns
    // the stream of those tokens [rows, D], in memory of the machine.
    float* run_some(Machine& machine, float* x, int64_t dim, const Step& step, const Step& asking,
                    const std::vector<int64_t>& rows, const State& state) const;
};

// Rows of a float format by token; `halve` rounds them to bfloat16.
struct Embedding {
    Format format;
    const uint8_t* data;
    int64_t rows, dim;
    bool halve;
    // out [count, dim]. Throws out_of_range for a token that has no row.
    void read(const Machine& machine, const int64_t* tokens, int64_t count, float* out) const;
};

// A prediction head: joins hidden states and embeddings of next tokens, runs its layers, and normalises.
struct Head {
    Floats embedding_norm, hidden_norm, last_norm;
    float eps;
    Weight join;
    const Program* layers;
    // hidden, embedded, out [T, D].
    void run(Machine& machine, const float* hidden, const float* embedded, const Step& step, const State& state,
             float* out) const;
    // The same for those tokens that `asking` places, whose numbers in `step` are `rows`: out [rows, D].
    void run_some(Machine& machine, const float* hidden, const float* embedded, const Step& step, const Step& asking,
                  const std::vector<int64_t>& rows, const State& state, float* out) const;

   private:
    float* joined(Machine& machine, const float* hidden, const float* embedded, int64_t tokens) const;
};

// What a head reads before it drafts: `rows` of the hidden states and the `tokens` after them, laid out by
// `step`; then up to counts[s] tokens for sequence s, as long as their probabilities multiply to `least`.
struct Draft {
    std::vector<int64_t> rows, tokens;
    const Step* step;
    std::vector<int64_t> counts;
    double least;
};

struct Model {
    Embedding embedding;
    const Program* backbone;
    Floats last_norm;
    float eps;
    Weight vocabulary;
    std::vector<const Head*> heads;  // a draft deeper than there are heads takes the last

    // out [T, D]: hidden states after the last norm.
    void forward(Machine& machine, const int64_t* tokens, const Step& step, const State& state, float* out) const;
    void predict(Machine& machine, const float* hidden, const int64_t* tokens, const Step& step, const State& state,
                 int64_t depth, float* out) const;
    // Drafts by sequence, each token the head's most likely one after those before it.
    std::vector<std::vector<int64_t>> draft(Machine& machine, const float* hidden, const Draft& draft,
                                            const State& state) const;
};

}  // namespace aprium
