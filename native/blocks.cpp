#include "blocks.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace aprium {

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t stored_bytes(const Matrix& w, int64_t rows) {
    switch (w.format) {
        case Format::f32: return rows * w.cols * 4;
        case Format::bf16:
        case Format::f16: return rows * w.cols * 2;
        case Format::fp8: return rows * w.cols;
        default: return rows * (w.cols / 2 + w.cols / kBlock);
    }
}

// Rows of the next task of `w` when `left` bytes of the region are still to be handed out. For few
// tokens pieces are long, since memory is read fastest in long runs, and shorter towards the end, so
// that threads end together; for many as short as kernels allow.
int64_t chunk_rows(const Matrix& w, int64_t num_tokens, int64_t left, int num_threads) {
    constexpr int64_t kMost = 512 << 10, kLeast = 48 << 10;
    bool transposed = w.format == Format::nvfp4_transposed;
    int64_t unit = transposed ? kGroup : 16;
    if (num_tokens > (transposed ? 4 : 16)) return unit;
    if (transposed) return ceil_div(ceil_div(w.rows, num_threads), unit) * unit;  // columns in long runs
    int64_t bytes = std::clamp(left / (2 * num_threads), kLeast, kMost);
    return std::max(unit, bytes / stored_bytes(w, 1) / unit * unit);
}

}  // namespace

template <class F>
void Machine::pack_rows(Packed& packed, Precision precision, const float* x, int64_t num_rows, int64_t cols,
                        const F& before) {
    int64_t size = ceil_div(kernels.packed_bytes(precision, cols), 64) * 64;
    uint8_t* buffer = packed.buffer.bytes(size * num_rows);
    packed.tokens.resize(num_rows);
    each(num_rows, cols * 4, [&](int64_t i, int) {
        before(i);
        kernels.pack(precision, x + i * cols, cols, buffer + i * size, packed.tokens[i]);
    });
}

void Machine::pack(Packed& packed, Precision precision, const float* x, int64_t num_rows, int64_t cols) {
    pack_rows(packed, precision, x, num_rows, cols, [](int64_t) {});
}

void Machine::activate_and_pack(Packed& packed, Precision precision, float* x, int64_t num_rows, int64_t cols) {
    pack_rows(packed, precision, x, num_rows, cols, [&](int64_t i) { kernels.relu_squared(x + i * cols, cols); });
}

void Machine::count(const Job& job) {
    const Matrix& w = job.weight->matrix;
    counters.bytes += stored_bytes(w, w.rows);
    if (w.format != Format::nvfp4_transposed || job.num_tokens > 4) return;
    int64_t passes = ceil_div(job.num_tokens, 2), skipped = kernels.skipped_columns(w, job.tokens, job.num_tokens);
    counters.columns += passes * w.cols, counters.skipped += skipped;
    counters.bytes -= skipped / passes * (w.rows / 2);
}

void Machine::multiply(const std::vector<Job>& jobs) {
    chunks_.clear();
    int64_t work = 0, left = 0;
    for (const Job& job : jobs) {
        left += stored_bytes(job.weight->matrix, job.weight->matrix.rows);
        count(job);
    }
    for (size_t j = 0; j < jobs.size(); j++) {
        const Matrix& w = jobs[j].weight->matrix;
        for (int64_t row = 0, end; row < w.rows; row = end) {
            end = std::min(row + chunk_rows(w, jobs[j].num_tokens, left, pool.num_threads()), w.rows);
            chunks_.push_back({(int32_t)j, row, end});
            left -= stored_bytes(w, end - row);
        }
        work += w.rows * w.cols * jobs[j].num_tokens;
    }
    auto compute = [&](int64_t i, int thread) {
        const Chunk& chunk = chunks_[i];
        const Job& job = jobs[chunk.job];
        const Matrix& w = job.weight->matrix;
        int64_t size = kernels.matmul_scratch(w, job.weight->precision, chunk.end - chunk.begin, job.num_tokens);
        kernels.matmul(w, job.weight->precision, chunk.begin, chunk.end, job.tokens, job.num_tokens,
                       pool.scratch(thread).bytes(size));
    };
    each((int64_t)chunks_.size(), chunks_.empty() ? 0 : work / (int64_t)chunks_.size(), compute);
}

void Machine::add_bias(const Weight& weight, float* out, int64_t num_tokens) {
    if (weight.bias.empty()) return;
    for (int64_t t = 0; t < num_tokens; t++)
        kernels.add(out + t * weight.matrix.rows, weight.bias.data(), weight.matrix.rows);
}

void Machine::linear(const Weight& weight, const float* x, int64_t num_tokens, float* out, Packed& packed) {
    pack(packed, weight.precision, x, num_tokens, weight.matrix.cols);
    multiply_packed(weight, out, packed);
}

void Machine::multiply_packed(const Weight& weight, float* out, Packed& packed) {
    int64_t num_tokens = (int64_t)packed.tokens.size();
    for (int64_t t = 0; t < num_tokens; t++) packed.tokens[t].out = out + t * weight.matrix.rows;
    multiply({{&weight, packed.tokens.data(), num_tokens}});
    add_bias(weight, out, num_tokens);
}

void Machine::norm(const Floats& weight, float eps, const float* x, int64_t num_tokens, float* out) {
    int64_t size = (int64_t)weight.size();
    each(num_tokens, size,
         [&](int64_t t, int) { kernels.rms_norm(x + t * size, weight.data(), eps, size, out + t * size); });
}

void Mamba::run(Machine& m, float* x, const Step& step, float* conv, float* ssm, float* ring,
                int64_t ring_size) const {
    int64_t tokens = step.num_tokens, dim = (int64_t)norm.size(), width = in_proj.matrix.rows;
    int64_t inner = heads * head_dim, channels = inner + 2 * num_groups * state_size;
    float *normed = m.normed.floats(tokens * dim), *projected = m.wide.floats(tokens * width);
    float* mixed = m.mixed.floats(tokens * inner);
    m.norm(norm, eps, x, tokens, normed);
    m.linear(in_proj, normed, tokens, projected, m.packed[0]);
    int64_t sequences = (int64_t)step.lengths.size();
    auto task = [&](int64_t i) {
        int64_t s = i / num_groups, slot = step.slots[s];
        return MambaTask{projected + step.starts[s] * width, step.lengths[s], width, i % num_groups, num_groups, heads,
                         head_dim, state_size, kernel, conv_weight.data(), conv_bias.empty() ? nullptr : conv_bias.data(),
                         a.data(), d.data(), dt_bias.data(), mixer_norm.data(), dt_min, dt_max, eps,
                         conv + slot * (kernel - 1) * channels, ssm + slot * inner * state_size,
                         step.context[s] == step.replay[s], ring + slot * ring_size * width, step.replay[s],
                         step.hold[s] != 0, mixed + step.starts[s] * inner};
    };
    m.each(sequences * num_groups, tokens * inner * state_size / (sequences * num_groups), [&](int64_t i, int thread) {
        MambaTask t = task(i);
        m.kernels.mamba(t, m.pool.scratch(thread).bytes(m.kernels.mamba_scratch(t)));
    });
    for (int64_t s = 0; s < sequences; s++)
        if (step.hold[s])
            memcpy(ring + step.slots[s] * ring_size * width, projected + step.starts[s] * width,
                   step.lengths[s] * width * 4);
    float* out = m.normed.floats(tokens * dim);
    m.linear(out_proj, mixed, tokens, out, m.packed[0]);
    m.kernels.add(x, out, tokens * dim);
}

namespace {

void write_rows(const float* rows, int64_t count, int64_t width, int64_t first, const std::vector<int64_t>& pages,
                int64_t page_size, void* to, Format format, float scale) {
    for (int64_t i = 0; i < count; i++) {
        int64_t position = first + i;
        int64_t at = (pages[position / page_size] * page_size + position % page_size) * width;
        if (format == Format::f32) {
            memcpy((float*)to + at, rows + i * width, width * 4);
        } else if (format == Format::fp8) {
            for (int64_t j = 0; j < width; j++) {
                float value = rows[i * width + j] / scale, magnitude = std::min(std::fabs(value), 448.f);
                uint8_t code = value == value ? round_fp8(magnitude) : 0x7F;
                ((uint8_t*)to)[at + j] = (uint8_t)(code | (std::signbit(value) ? 0x80 : 0));
            }
        } else {
            for (int64_t j = 0; j < width; j++) ((uint16_t*)to)[at + j] = round_bf16(rows[i * width + j]);
        }
    }
}

}  // namespace

void Attention::run(Machine& m, const float* x, float* out, const Step& step, const Step& asking, void* keys,
                    void* values, Format cache) const {
    int64_t tokens = step.num_tokens, asked = asking.num_tokens, dim = (int64_t)norm.size();
    int64_t wide = heads * head_dim, narrow = kv_heads * head_dim, group = heads / kv_heads;
    bool all = x == out;
    float* normed = m.normed.floats((tokens + asked) * dim);
    float* q = m.wide.floats(asked * wide + tokens * 2 * narrow);
    float *k = q + asked * wide, *v = k + tokens * narrow;
    m.norm(norm, eps, x, tokens, normed);
    const float* questions = all ? normed : normed + tokens * dim;
    if (!all) m.norm(norm, eps, out, asked, normed + tokens * dim);
    struct Product { const Weight* weight; const float* x; int64_t tokens; float* out; };
    const Product products[3] = {{&q_proj, questions, asked, q}, {&k_proj, normed, tokens, k}, {&v_proj, normed, tokens, v}};
    std::vector<Machine::Job> jobs;
    std::vector<Token> rows[3];
    for (int i = 0; i < 3; i++) {
        const Product& p = products[i];
        bool packed = i > 0 && p.x == products[i - 1].x && p.weight->precision == products[i - 1].weight->precision;
        if (packed) rows[i] = rows[i - 1];
        else m.pack(m.packed[i], p.weight->precision, p.x, p.tokens, dim), rows[i] = m.packed[i].tokens;
        for (int64_t t = 0; t < p.tokens; t++) rows[i][t].out = p.out + t * p.weight->matrix.rows;
        if (p.tokens) jobs.push_back({p.weight, rows[i].data(), p.tokens});
    }
    m.multiply(jobs);
    for (const Product& p : products) m.add_bias(*p.weight, p.out, p.tokens);
    for (size_t s = 0; s < step.lengths.size(); s++) {
        int64_t length = step.lengths[s], start = step.starts[s] * narrow;
        write_rows(k + start, length, narrow, step.context[s], step.pages[s], step.page_size, keys, cache, key_scale);
        write_rows(v + start, length, narrow, step.context[s], step.pages[s], step.page_size, values, cache, value_scale);
    }
    if (!asked) return;
    float* mixed = m.mixed.floats(asked * wide);
    struct Tile { int64_t segment, kv_head, first, count; };
    std::vector<Tile> tiles;
    int64_t work = 0;
    for (size_t s = 0; s < asking.lengths.size(); s++) {
        int64_t length = asking.lengths[s], rows = asking.context[s] + length > 8192 ? 256 : 64;
        int64_t size = std::max<int64_t>(rows / group, 1) * group;  // whole tokens
        for (int64_t h = 0; h < kv_heads; h++)
            for (int64_t first = 0; first < length * group; first += size)
                tiles.push_back({(int64_t)s, h, first, std::min(size, length * group - first)});
        work += length * wide * (asking.context[s] + length);
    }
    m.each((int64_t)tiles.size(), work / (int64_t)tiles.size(), [&](int64_t i, int thread) {
        const Tile& tile = tiles[i];
        int64_t offset = asking.starts[tile.segment] * wide;
        AttentionTask t{q + offset, asking.lengths[tile.segment], heads, kv_heads, head_dim, tile.first, tile.count,
                        tile.kv_head, asking.context[tile.segment], keys, values, cache, key_scale, value_scale,
                        asking.pages[tile.segment].data(), asking.page_size, mixed + offset};
        m.kernels.attention(t, m.pool.scratch(thread).bytes(m.kernels.attention_scratch(t)));
    });
    float* added = m.normed.floats(asked * dim);
    m.linear(o_proj, mixed, asked, added, m.packed[0]);
    m.kernels.add(out, added, asked * dim);
}

void Mlp::run(Machine& m, const float* x, int64_t tokens, float* out) const {
    int64_t hidden = up.matrix.rows;
    float* wide = m.wide.floats(tokens * hidden);
    m.linear(up, x, tokens, wide, m.packed[0]);
    m.activate_and_pack(m.packed[0], down.precision, wide, tokens, hidden);
    m.multiply_packed(down, out, m.packed[0]);
}

void MlpBlock::run(Machine& m, float* x, int64_t tokens) const {
    int64_t dim = (int64_t)norm.size();
    float *normed = m.normed.floats(tokens * dim), *out = m.mixed.floats(tokens * dim);
    m.norm(norm, eps, x, tokens, normed);
    mlp.run(m, normed, tokens, out);
    m.kernels.add(x, out, tokens * dim);
}

void Router::choose(const float* scores, int64_t* experts, float* weights) const {
    int64_t num = (int64_t)bias.size(), size = num / num_groups;
    std::vector<float> keys(num);
    for (int64_t e = 0; e < num; e++) keys[e] = scores[e] + bias[e];
    auto best = [](std::vector<float>& values, int64_t count, int64_t* found) {  // the first of equals
        for (int64_t i = 0; i < count; i++) {
            int64_t top = 0;
            for (int64_t e = 1; e < (int64_t)values.size(); e++)
                if (values[e] > values[top]) top = e;
            found[i] = top, values[top] = -INFINITY;
        }
    };
    if (num_groups > 1) {
        std::vector<float> groups(num_groups);
        for (int64_t g = 0; g < num_groups; g++) {
            float first = -INFINITY, second = -INFINITY;
            for (int64_t e = g * size; e < (g + 1) * size; e++) {
                if (keys[e] > first) second = first, first = keys[e];
                else if (keys[e] > second) second = keys[e];
            }
            groups[g] = size > 1 ? first + second : first;
        }
        std::vector<int64_t> kept(num_active_groups);
        best(groups, num_active_groups, kept.data());
        for (int64_t g = 0; g < num_groups; g++)
            if (std::find(kept.begin(), kept.end(), g) == kept.end())
                std::fill(keys.begin() + g * size, keys.begin() + (g + 1) * size, -INFINITY);
    }
    best(keys, num_active, experts);
    std::sort(experts, experts + num_active);
    float sum = 0;
    for (int64_t i = 0; i < num_active; i++) sum += weights[i] = scores[experts[i]];
    for (int64_t i = 0; i < num_active; i++) {
        if (normalise) weights[i] /= sum + 1e-20f;
        weights[i] *= scale;
    }
}

void Moe::run(Machine& m, float* x, int64_t tokens) const {
    int64_t dim = (int64_t)norm.size(), num = (int64_t)up.size(), active = router.num_active;
    int64_t hidden = up[0].matrix.rows, width = up[0].matrix.cols, shared_hidden = shared.up.matrix.rows;
    float* normed = m.normed.floats(tokens * dim);
    m.norm(norm, eps, x, tokens, normed);

    float* scores = m.mixed.floats(tokens * num);
    m.linear(router.gate, normed, tokens, scores, m.packed[0]);
    std::vector<int64_t> experts(tokens * active);
    std::vector<float> weights(tokens * active);
    m.each(tokens, num * (active + 8), [&](int64_t t, int) {
        m.kernels.sigmoid(scores + t * num, num);
        router.choose(scores + t * num, experts.data() + t * active, weights.data() + t * active);
    });

    const float* input = normed;
    if (to_latent) {
        float* latent = m.latent.floats(tokens * width);
        m.linear(*to_latent, normed, tokens, latent, m.packed[0]);
        input = latent;
    }
    // Pairs (token, place) sorted by expert; a stable sort keeps tokens in order.
    std::vector<int64_t> order(tokens * active), first(num + 1, 0);
    for (int64_t e : experts) first[e + 1]++;
    std::partial_sum(first.begin(), first.end(), first.begin());
    std::vector<int64_t> at(first.begin(), first.end() - 1), place(tokens * active);
    for (int64_t i = 0; i < tokens * active; i++) order[place[i] = at[experts[i]]++] = i;

    m.pack(m.packed[0], up[0].precision, input, tokens, width);
    bool same = !to_latent && shared.up.precision == up[0].precision;
    if (!same) m.pack(m.packed[1], shared.up.precision, normed, tokens, dim);
    float* raised = m.wide.floats(tokens * (active * hidden + shared_hidden));
    float* raised_shared = raised + tokens * active * hidden;
    std::vector<Token> rows(tokens * active), rows_shared = m.packed[same ? 0 : 1].tokens;
    for (int64_t i = 0; i < tokens * active; i++) {
        rows[i] = m.packed[0].tokens[order[i] / active];
        rows[i].out = raised + i * hidden;
    }
    for (int64_t t = 0; t < tokens; t++) rows_shared[t].out = raised_shared + t * shared_hidden;
    std::vector<Machine::Job> jobs{{&shared.up, rows_shared.data(), tokens}};
    for (int64_t e = 0; e < num; e++)
        if (first[e + 1] > first[e]) jobs.push_back({&up[e], rows.data() + first[e], first[e + 1] - first[e]});
    m.multiply(jobs);
    m.add_bias(shared.up, raised_shared, tokens);

    m.activate_and_pack(m.packed[2], down[0].precision, raised, tokens * active, hidden);
    m.activate_and_pack(m.packed[3], shared.down.precision, raised_shared, tokens, shared_hidden);
    float* lowered = m.narrow.floats(tokens * (active * width + dim));
    float* lowered_shared = lowered + tokens * active * width;
    for (int64_t i = 0; i < tokens * active; i++) m.packed[2].tokens[i].out = lowered + i * width;
    for (int64_t t = 0; t < tokens; t++) m.packed[3].tokens[t].out = lowered_shared + t * dim;
    jobs.assign({{&shared.down, m.packed[3].tokens.data(), tokens}});
    for (int64_t e = 0; e < num; e++)
        if (first[e + 1] > first[e])
            jobs.push_back({&down[e], m.packed[2].tokens.data() + first[e], first[e + 1] - first[e]});
    m.multiply(jobs);
    m.add_bias(shared.down, lowered_shared, tokens);

    float* routed = m.routed.floats(tokens * width);
    m.each(tokens, active * width, [&](int64_t t, int) {
        std::vector<const float*> parts(active);
        for (int64_t i = 0; i < active; i++) parts[i] = lowered + place[t * active + i] * width;
        m.kernels.weighted_sum(routed + t * width, parts.data(), weights.data() + t * active, active, width);
    });
    if (from_latent) {
        float* out = m.mixed.floats(tokens * dim);
        m.linear(*from_latent, routed, tokens, out, m.packed[0]);
        routed = out;
    }
    m.each(tokens, dim, [&](int64_t t, int) {
        m.kernels.add(routed + t * dim, lowered_shared + t * dim, dim);
        m.kernels.add(x + t * dim, routed + t * dim, dim);
    });
}

}  // namespace aprium
