#include "training.h"

#include <algorithm>

namespace aprium {

namespace {

constexpr int64_t kTokens = 64;  // of a task

int64_t up16(int64_t n) { return (n + 15) / 16 * 16; }

// out[i] = the sum over parts [num, size], in order.
void sum_parts(const float* parts, int64_t num, int64_t size, float* out) {
    for (int64_t i = 0; i < size; i++) {
        double sum = 0;
        for (int64_t k = 0; k < num; k++) sum += parts[k * size + i];
        out[i] = (float)sum;
    }
}

// Call f(task, first chunk, number of chunks, head, scratch) for every head of every segment of several chunks.
template <class F>
void walk(Machine& m, const Chunks& chunks, int64_t heads, int64_t scratch, const F& f) {
    std::vector<int64_t> segments;
    for (size_t s = 0; s + 1 < chunks.firsts.size(); s++)
        if (chunks.firsts[s + 1] - chunks.firsts[s] > 1) segments.push_back(s);
    m.pool.run((int64_t)segments.size() * heads, [&](int64_t i, int thread) {
        int64_t first = chunks.firsts[segments[i / heads]], end = chunks.firsts[segments[i / heads] + 1];
        f(chunks.chunks.data() + first, end - first, i % heads, m.pool.scratch(thread).bytes(scratch));
    });
}

}  // namespace

Chunks::Chunks(const std::vector<int64_t>& lengths, int64_t chunk_size) {
    int64_t begin = 0;
    for (int64_t length : lengths) {
        firsts.push_back((int64_t)chunks.size());
        for (int64_t done = 0; done < length; done += chunk_size) {
            int64_t count = std::min(chunk_size, length - done);
            int64_t entering = done ? num_states - 1 : -1;
            chunks.push_back({begin + done, count, entering, done + count < length ? num_states++ : -1});
        }
        begin += length;
    }
    firsts.push_back((int64_t)chunks.size());
}

void run_ssd(Machine& m, const Chunks& chunks, const SsdTask& task) {
    std::lock_guard turn(m.turn);
    int64_t scratch = m.kernels.training->ssd_forward_scratch(task);
    walk(m, chunks, task.heads, scratch, [&](const SsdChunk* first, int64_t count, int64_t head, uint8_t* room) {
        m.kernels.training->ssd_walk(task, first, count, head, room);
    });
    m.pool.run((int64_t)chunks.chunks.size() * task.groups, [&](int64_t i, int thread) {
        m.kernels.training->ssd_forward(task, chunks.chunks[i / task.groups], i % task.groups, m.pool.scratch(thread).bytes(scratch));
    });
}

void run_ssd_back(Machine& m, const Chunks& chunks, const SsdTask& task, SsdGradients to) {
    std::lock_guard turn(m.turn);
    int64_t scratch = m.kernels.training->ssd_backward_scratch(task), num_chunks = (int64_t)chunks.chunks.size();
    int64_t state = up16(task.state_size) * up16(task.head_dim) * task.heads, parts = num_chunks * task.heads;
    float *grad_a = to.a, *grad_d = to.d;
    Buffer room;
    to.a = room.floats(2 * parts + chunks.num_states * state), to.d = to.a + parts, to.states = to.d + parts;
    walk(m, chunks, task.heads, scratch, [&](const SsdChunk* first, int64_t count, int64_t head, uint8_t* room) {
        m.kernels.training->ssd_walk_back(task, to, first, count, head, room);
    });
    m.pool.run(num_chunks * task.groups, [&](int64_t i, int thread) {
        int64_t number = i / task.groups;
        m.kernels.training->ssd_backward(task, to, chunks.chunks[number], number, i % task.groups,
                               m.pool.scratch(thread).bytes(scratch));
    });
    sum_parts(to.a, num_chunks, task.heads, grad_a);
    sum_parts(to.d, num_chunks, task.heads, grad_d);
}

void run_flash(Machine& m, const std::vector<int64_t>& lengths, const FlashTask& task) {
    std::lock_guard turn(m.turn);
    struct Part {
        int64_t begin, length, first;
    };
    std::vector<Part> parts;
    int64_t begin = 0, scratch = m.kernels.training->flash_scratch(task);
    for (int64_t length : lengths) {
        for (int64_t first = 0; first < length; first += kTokens) parts.push_back({begin, length, first});
        begin += length;
    }
    m.pool.run((int64_t)parts.size() * task.heads, [&](int64_t i, int thread) {
        const Part& part = parts[i / task.heads];
        m.kernels.training->flash(task, part.begin, part.length, part.first, i % task.heads,
                                  m.pool.scratch(thread).bytes(scratch));
    });
}

void run_flash_back(Machine& m, const std::vector<int64_t>& lengths, const FlashTask& task, FlashGradients to,
                    void* grad_k, void* grad_v) {
    std::lock_guard turn(m.turn);
    std::vector<int64_t> begins;
    int64_t tokens = 0;
    for (int64_t length : lengths) begins.push_back(tokens), tokens += length;
    Buffer room;
    int64_t size = tokens * task.heads * task.head_dim;
    to.k = room.floats(2 * size), to.v = to.k + size;
    m.pool.run((int64_t)lengths.size() * task.heads, [&](int64_t i, int thread) {
        int64_t length = lengths[i / task.heads];
        int64_t scratch = m.kernels.training->flash_back_scratch(task, length);
        m.kernels.training->flash_back(task, to, begins[i / task.heads], length, i % task.heads,
                                       m.pool.scratch(thread).bytes(scratch));
    });
    m.pool.run((tokens + kTokens - 1) / kTokens, [&](int64_t i, int) {
        int64_t begin = i * kTokens, end = std::min(begin + kTokens, tokens);
        m.kernels.training->sum_heads(task, to.k, begin, end, grad_k);
        m.kernels.training->sum_heads(task, to.v, begin, end, grad_v);
    });
}

void run_conv(Machine& m, const ConvTask& task) {
    std::lock_guard turn(m.turn);
    m.pool.run((task.tokens + kTokens - 1) / kTokens, [&](int64_t i, int) {
        m.kernels.training->conv(task, i * kTokens, std::min((i + 1) * kTokens, task.tokens));
    });
}

void run_conv_back(Machine& m, const ConvTask& task, const ConvGradients& to) {
    std::lock_guard turn(m.turn);
    m.pool.run((task.channels + kConvChannels - 1) / kConvChannels, [&](int64_t i, int) {
        int64_t begin = i * kConvChannels;
        m.kernels.training->conv_back(task, to, begin, std::min(begin + kConvChannels, task.channels));
    });
}

void run_norm(Machine& m, const NormTask& task) {
    std::lock_guard turn(m.turn);
    m.pool.run((task.tokens + kTokens - 1) / kTokens, [&](int64_t i, int) {
        m.kernels.training->norm(task, i * kTokens, std::min((i + 1) * kTokens, task.tokens));
    });
}

void run_norm_back(Machine& m, const NormTask& task, const NormGradients& to, float* grad_weight) {
    std::lock_guard turn(m.turn);
    int64_t blocks = (task.tokens + kTokens - 1) / kTokens;
    Buffer parts;
    float* room = parts.floats(blocks * task.size);
    m.pool.run(blocks, [&](int64_t i, int) {
        m.kernels.training->norm_back(task, to, i * kTokens, std::min((i + 1) * kTokens, task.tokens), room + i * task.size);
    });
    sum_parts(room, blocks, task.size, grad_weight);
}

}  // namespace aprium
