#include "model.h"

#include <cmath>

namespace aprium {

void Embedding::read(const Machine& m, const int64_t* tokens, int64_t count, float* out) const {
    int64_t size = format == Format::f32 ? 4 : 2;
    for (int64_t t = 0; t < count; t++) {
        if (tokens[t] < 0 || tokens[t] >= rows)
            throw std::out_of_range("token id " + std::to_string(tokens[t]) + " has no embedding");
        float* row = out + t * dim;
        m.kernels.widen(format, data + tokens[t] * dim * size, dim, row);
        for (int64_t i = 0; i < dim && halve; i++) {
            uint32_t bits = (uint32_t)round_bf16(row[i]) << 16;
            memcpy(row + i, &bits, 4);
        }
    }
}

float* Program::run_some(Machine& m, float* x, int64_t dim, const Step& step, const Step& asking,
                         const std::vector<int64_t>& rows, const State& state) const {
    size_t last = layers.size();
    while (last > 0 && !layers[last - 1].stateful) last--;
    bool narrows = last > 0 && layers[last - 1].ask;
    for (size_t i = 0; i < (narrows ? last - 1 : layers.size()); i++) layers[i].run(m, x, step, state);
    float* some = m.some.floats((int64_t)rows.size() * dim);
    for (size_t i = 0; i < rows.size(); i++) memcpy(some + i * dim, x + rows[i] * dim, dim * 4);
    if (!narrows) return some;
    layers[last - 1].ask(m, x, some, step, asking, state);
    for (; last < layers.size() && !rows.empty(); last++) layers[last].run(m, some, asking, state);
    return some;
}

float* Head::joined(Machine& m, const float* hidden, const float* embedded, int64_t tokens) const {
    int64_t dim = (int64_t)hidden_norm.size();
    float *both = m.joined.floats(tokens * 2 * dim), *x = m.ahead.floats(tokens * dim);
    m.each(tokens, 2 * dim, [&](int64_t t, int) {
        m.kernels.rms_norm(embedded + t * dim, embedding_norm.data(), eps, dim, both + t * 2 * dim);
        m.kernels.rms_norm(hidden + t * dim, hidden_norm.data(), eps, dim, both + t * 2 * dim + dim);
    });
    m.linear(join, both, tokens, x, m.packed[0]);
    return x;
}

void Head::run(Machine& m, const float* hidden, const float* embedded, const Step& step, const State& state,
               float* out) const {
    float* x = joined(m, hidden, embedded, step.num_tokens);
    layers->run(m, x, step, state);
    m.norm(last_norm, eps, x, step.num_tokens, out);
}

void Head::run_some(Machine& m, const float* hidden, const float* embedded, const Step& step, const Step& asking,
                    const std::vector<int64_t>& rows, const State& state, float* out) const {
    float* x = joined(m, hidden, embedded, step.num_tokens);
    float* some = layers->run_some(m, x, (int64_t)hidden_norm.size(), step, asking, rows, state);
    m.norm(last_norm, eps, some, (int64_t)rows.size(), out);
}

void Model::forward(Machine& m, const int64_t* tokens, const Step& step, const State& state, float* out) const {
    float* x = m.stream.floats(step.num_tokens * embedding.dim);
    embedding.read(m, tokens, step.num_tokens, x);
    backbone->run(m, x, step, state);
    m.norm(last_norm, eps, x, step.num_tokens, out);
}

void Model::predict(Machine& m, const float* hidden, const int64_t* tokens, const Step& step, const State& state,
                    int64_t depth, float* out) const {
    float* embedded = m.stream.floats(step.num_tokens * embedding.dim);
    embedding.read(m, tokens, step.num_tokens, embedded);
    heads[std::min(depth, (int64_t)heads.size() - 1)]->run(m, hidden, embedded, step, state, out);
}

namespace {

// One token for each of `sequences`, `count` tokens after those of `step`.
Step after(const Step& step, const std::vector<int64_t>& sequences, int64_t count) {
    Step next{};
    for (int64_t s : sequences) {
        next.starts.push_back((int64_t)next.starts.size());
        next.context.push_back(step.context[s] + step.lengths[s] + count);
        next.slots.push_back(step.slots[s]);
        next.pages.push_back(step.pages[s]);
    }
    next.num_tokens = (int64_t)sequences.size(), next.page_size = step.page_size;
    next.lengths.assign(sequences.size(), 1), next.replay.assign(sequences.size(), 0), next.hold = next.replay;
    return next;
}

}  // namespace

std::vector<std::vector<int64_t>> Model::draft(Machine& m, const float* hidden, const Draft& draft,
                                               const State& state) const {
    const Step& step = *draft.step;
    int64_t dim = embedding.dim, size = vocabulary.matrix.rows, sequences = (int64_t)draft.counts.size();
    float *in = m.given.floats(step.num_tokens * dim), *embedded = m.stream.floats(step.num_tokens * dim);
    float* out = m.found.floats(step.num_tokens * dim);
    for (int64_t t = 0; t < step.num_tokens; t++) memcpy(in + t * dim, hidden + draft.rows[t] * dim, dim * 4);
    embedding.read(m, draft.tokens.data(), step.num_tokens, embedded);
    std::vector<std::vector<int64_t>> drafts(sequences);
    std::vector<double> chances(sequences, 1);
    std::vector<int64_t> active, rows, tokens;
    for (int64_t s = 0; s < sequences; s++)
        if (draft.counts[s] > 0) active.push_back(s), rows.push_back(step.starts[s] + step.lengths[s] - 1);
    heads[0]->run_some(m, in, embedded, step, after(step, active, -1), rows, state, out);
    memcpy(in, out, active.size() * dim * 4);
    for (int64_t depth = 1; !active.empty(); depth++) {
        int64_t count = (int64_t)active.size();
        float* logits = m.logits.floats(count * size);
        m.linear(vocabulary, in, count, logits, m.packed[0]);
        std::vector<int64_t> best(count);
        std::vector<float> peaks(count), masses(count);
        m.each(count, size, [&](int64_t i, int) {
            m.kernels.log_softmax_at(logits + i * size, size, &best[i], &peaks[i], &masses[i]);
        });
        std::vector<int64_t> still;
        tokens.clear();
        for (int64_t i = 0; i < count; i++) {
            int64_t s = active[i];
            chances[s] *= std::exp(-(double)masses[i]);
            if (!(chances[s] >= draft.least)) continue;
            drafts[s].push_back(best[i]);
            if (draft.counts[s] <= depth) continue;
            memmove(in + (int64_t)still.size() * dim, in + i * dim, dim * 4);
            still.push_back(s), tokens.push_back(best[i]);
        }
        active = std::move(still);
        if (active.empty()) break;
        predict(m, in, tokens.data(), after(step, active, depth - 1), state, depth, out);
        memcpy(in, out, active.size() * dim * 4);
    }
    return drafts;
}

}  // namespace aprium
