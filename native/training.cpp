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
