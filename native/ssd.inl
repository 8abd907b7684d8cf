// The Mamba-2 recurrence in matrix form, for training: forward and backward. Included after dense.inl.
//
// Chunks never cross a segment's boundary, so nothing is masked for it. Inside a chunk
//     y_i = sum over j <= i of (C_i . B_j) e^(s_i - s_j) dt_j x_j + e^(s_i) C_i S + d x_i
// where s are running sums of dt a and S [N, P] is the state that enters. Walks carry states and their
// gradients over the chunks of a segment, a head each; the rest is by chunk and group. Matrices are
// padded with zeros to 16 columns. Every sum has one order, whatever the number of threads.

// ---- one head of one chunk ----

struct SsdShape {
    int64_t p, n, state;  // padded head dim and state size; values of a state
    int64_t per_group;
    explicit SsdShape(const SsdTask& t)
        : p(up16(t.head_dim)), n(up16(t.state_size)), state(n * p), per_group(t.heads / t.groups) {}
};

// Step sizes of a chunk, their running sums s, e^s and e^(s_last - s), of `count` tokens, zeros after.
struct SsdSteps {
    float *dt, *sum, *since, *until;
    float whole;  // e^(s_last)
    SsdSteps(const SsdTask& t, const SsdChunk& chunk, int64_t head, float* room, int64_t padded)
        : dt(room), sum(room + padded), since(room + 2 * padded), until(room + 3 * padded) {
        double total = 0;
        for (int64_t i = 0; i < chunk.count; i++) {
            dt[i] = t.dt[(chunk.begin + i) * t.heads + head];
            total += (double)dt[i] * t.a[head];
            sum[i] = (float)total;
        }
        for (int64_t i = chunk.count; i < up16(chunk.count); i++) dt[i] = 0, sum[i] = sum[chunk.count - 1];
        f32x16 last = splat((float)total);
        for (int64_t i = 0; i < chunk.count; i += 16) {
            store(since + i, exp(load(sum + i)));
            store(until + i, exp(sub(last, load(sum + i))));
        }
        whole = since[chunk.count - 1];
    }
};

// Decays e^(s_i - s_j) for a block of 16 rows i. To the left of the diagonal block they are products of
// two factors of at most 1, so that few exponentials are taken.
struct SsdDecays {
    const float* sum;
    int64_t first;
    float* left;  // [first]: e^(s_first - s_j)
    float down[16];
    Lower lower;
    SsdDecays(const float* sum, int64_t first, float* room) : sum(sum), first(first), left(room) {
        f32x16 from = splat(sum[first]);
        for (int64_t j = 0; j < first; j += 16) store(left + j, exp(sub(from, load(sum + j))));
        store(down, exp(sub(load(sum + first), from)));
    }
    INLINE f32x16 at(int64_t i, int64_t j) const {
        if (j < first) return mul(splat(down[i - first]), load(left + j));
        return exp(min(splat(0), sub(splat(sum[i]), load(sum + j))));
    }
    // `x` where column j + lane is not beyond row i, else zero.
    INLINE f32x16 keep_lower(int64_t i, int64_t j, f32x16 x) const {
        return j < first ? x : lower.pick(i, j, x, splat(0));
    }
};

// ---- forward ----

// Make the states [N, P] that enter the chunks of one segment but its first, of one head.
inline void ssd_walk(const SsdTask& t, const SsdChunk* chunks, int64_t num_chunks, int64_t head, uint8_t* scratch) {
    SsdShape s(t);
    int64_t padded = up16(t.chunk_size), group = head / s.per_group;
    float *weighed = (float*)scratch, *room = weighed + padded * s.p;
    const float* before = nullptr;
    for (int64_t k = 0; k + 1 < num_chunks; k++) {
        const SsdChunk& chunk = chunks[k];
        SsdSteps steps(t, chunk, head, room, padded);
        gather(t.x + chunk.begin * t.x_row + head * t.head_dim, t.x_row, chunk.count, t.head_dim, weighed, s.p);
        for (int64_t i = 0; i < chunk.count; i++)
            for (int64_t p = 0; p < s.p; p += 16)
                store(weighed + i * s.p + p, scaled(weighed + i * s.p + p, steps.dt[i] * steps.until[i]));
        float* after = t.states + (chunk.leaving * t.heads + head) * s.state;
        memset(after + t.state_size * s.p, 0, (s.n - t.state_size) * s.p * 4);
        product(t.b + chunk.begin * t.b_row + group * t.state_size, 1, t.b_row, weighed, s.p, after, s.p, t.state_size,
                s.p, chunk.count, false);
        if (before)
            for (int64_t i = 0; i < t.state_size * s.p; i += 16)
                store(after + i, fma(splat(steps.whole), load(before + i), load(after + i)));
        before = after;
    }
}

inline int64_t ssd_forward_scratch(const SsdTask& t) {
    SsdShape s(t);
    int64_t c = up16(t.chunk_size);
    return c * (3 * s.n + 2 * c + 3 * s.p + 5) * 4;
}

// y of one chunk, of the heads of one group.
inline void ssd_forward(const SsdTask& t, const SsdChunk& chunk, int64_t group, uint8_t* scratch) {
    SsdShape s(t);
    int64_t c = up16(chunk.count), count = chunk.count;
    float* b = (float*)scratch;
    float *turned = b + c * s.n, *reads = turned + c * s.n, *scores = reads + c * s.n, *mixing = scores + c * c;
    float *x = mixing + c * c, *y = x + c * s.p, *carried = y + c * s.p, *room = carried + c * s.p, *left = room + 4 * c;
    gather(t.b + chunk.begin * t.b_row + group * t.state_size, t.b_row, count, t.state_size, b, s.n);
    gather(t.c + chunk.begin * t.c_row + group * t.state_size, t.c_row, count, t.state_size, reads, s.n);
    turn(b, c, s.n, turned);
    product(reads, s.n, 1, turned, c, scores, c, count, c, t.state_size, false, Part::lower);
    for (int64_t head = group * s.per_group; head < (group + 1) * s.per_group; head++) {
        SsdSteps steps(t, chunk, head, room, c);
        for (int64_t first = 0; first < count; first += 16) {
            SsdDecays decays(steps.sum, first, left);
            for (int64_t i = first; i < first + 16 && i < count; i++)
                for (int64_t j = 0; j <= first; j += 16) {
                    f32x16 weight = mul(mul(load(scores + i * c + j), decays.at(i, j)), load(steps.dt + j));
                    store(mixing + i * c + j, decays.keep_lower(i, j, weight));
                }
        }
        gather(t.x + chunk.begin * t.x_row + head * t.head_dim, t.x_row, count, t.head_dim, x, s.p);
        product(mixing, c, 1, x, s.p, y, s.p, count, s.p, count, false, Part::until_row);
        if (chunk.entering >= 0)
            product(reads, s.n, 1, t.states + (chunk.entering * t.heads + head) * s.state, s.p, carried, s.p, count, s.p,
                    t.state_size, false);
        for (int64_t i = 0; i < count; i++)
            for (int64_t p = 0; p < s.p; p += 16) {
                f32x16 sum = fma(load(x + i * s.p + p), splat(t.d[head]), load(y + i * s.p + p));
                if (chunk.entering >= 0) sum = fma(load(carried + i * s.p + p), splat(steps.since[i]), sum);
                store(y + i * s.p + p, sum);
            }
        scatter(y, s.p, count, t.head_dim, t.y + (chunk.begin * t.heads + head) * t.head_dim, t.heads * t.head_dim);
    }
}

// ---- backward ----

// Make the gradients of the states that enter the chunks of one segment but its first, of one head.
inline void ssd_walk_back(const SsdTask& t, const SsdGradients& to, const SsdChunk* chunks, int64_t num_chunks,
                          int64_t head, uint8_t* scratch) {
    SsdShape s(t);
    int64_t padded = up16(t.chunk_size), group = head / s.per_group;
    float *weighed = (float*)scratch, *room = weighed + padded * s.p;
    const float* after = nullptr;
    for (int64_t k = num_chunks - 1; k > 0; k--) {
        const SsdChunk& chunk = chunks[k];
        SsdSteps steps(t, chunk, head, room, padded);
        gather(to.y + (chunk.begin * t.heads + head) * t.head_dim, t.heads * t.head_dim, chunk.count, t.head_dim, weighed,
               s.p);
        for (int64_t i = 0; i < chunk.count; i++)
            for (int64_t p = 0; p < s.p; p += 16)
                store(weighed + i * s.p + p, scaled(weighed + i * s.p + p, steps.since[i]));
        float* before = to.states + (chunk.entering * t.heads + head) * s.state;
        memset(before + t.state_size * s.p, 0, (s.n - t.state_size) * s.p * 4);
        product(t.c + chunk.begin * t.c_row + group * t.state_size, 1, t.c_row, weighed, s.p, before, s.p, t.state_size,
                s.p, chunk.count, false);
        if (after)
            for (int64_t i = 0; i < t.state_size * s.p; i += 16)
                store(before + i, fma(splat(steps.whole), load(after + i), load(before + i)));
        after = before;
    }
}

inline int64_t ssd_backward_scratch(const SsdTask& t) {
    SsdShape s(t);
    int64_t c = up16(t.chunk_size);
    return (c * (6 * s.n + 4 * c + 5 * s.p + 7) + s.state) * 4;
}

// The matrices of a chunk that its heads share, and those of the head at hand.
struct SsdBack {
    float *b, *reads, *turned, *grad_b, *grad_reads, *by_state;  // [C, N]
    float *scores, *grad_scores, *mixing, *pairs;                  // [C, C]
    float *x, *dy, *dx, *sent, *weighed;                           // [C, P]
    float *room, *left, *grad_sum, *columns, *state;
    SsdBack(const SsdShape& s, int64_t c, float* at) {
        for (float** part : {&b, &reads, &turned, &grad_b, &grad_reads, &by_state}) *part = at, at += c * s.n;
        for (float** part : {&scores, &grad_scores, &mixing, &pairs}) *part = at, at += c * c;
        for (float** part : {&x, &dy, &dx, &sent, &weighed}) *part = at, at += c * s.p;
        room = at, left = room + 4 * c, grad_sum = left + c, columns = grad_sum + c, state = columns + c;
    }
};

// What goes through the pairs of tokens of the chunk: gradients of scores and of sums s.
inline void ssd_pairs_back(const SsdTask& t, const SsdShape& s, const SsdSteps& steps, SsdBack& m, int64_t count,
                           int64_t c, float* grad_d) {
    turn(m.x, c, s.p, m.weighed);
    product(m.dy, s.p, 1, m.weighed, c, m.pairs, c, count, c, t.head_dim, false, Part::lower);
    for (int64_t i = 0; i < count; i++) *grad_d += m.pairs[i * c + i];
    memset(m.columns, 0, c * 4);
    for (int64_t first = 0; first < count; first += 16) {
        SsdDecays decays(steps.sum, first, m.left);
        for (int64_t i = first; i < first + 16 && i < count; i++) {
            f32x16 sum = splat(0);
            for (int64_t j = 0; j <= first; j += 16) {
                int64_t at = i * c + j;
                f32x16 decay = decays.at(i, j), score = load(m.scores + at);
                f32x16 grad = mul(mul(load(m.pairs + at), decay), load(steps.dt + j));
                grad = decays.keep_lower(i, j, grad);
                f32x16 through = mul(decays.keep_lower(i, j, score), grad);
                if (j == first) through = decays.lower.pick(i - 1, j, through, splat(0));  // e^0 has no gradient
                sum = add(sum, through);
                store(m.columns + j, add(load(m.columns + j), through));
                store(m.mixing + at, decays.keep_lower(i, j, mul(score, decay)));
                store(m.grad_scores + at, add(load(m.grad_scores + at), grad));
            }
            m.grad_sum[i] = reduce_add(sum);
        }
    }
    for (int64_t i = 0; i < count; i++) m.grad_sum[i] -= m.columns[i];
    product(m.mixing, 1, c, m.dy, s.p, m.dx, s.p, count, s.p, count, false, Part::from_row);
}

// What goes through the state that enters: gradients of C and of sums s.
inline void ssd_entering_back(const SsdTask& t, const SsdShape& s, const SsdSteps& steps, SsdBack& m,
                              const float* entering, int64_t count) {
    turn(entering, s.n, s.p, m.state);  // [P, N]
    for (int64_t i = 0; i < count; i++)
        for (int64_t p = 0; p < s.p; p += 16)
            store(m.weighed + i * s.p + p, scaled(m.dy + i * s.p + p, steps.since[i]));
    product(m.weighed, s.p, 1, m.state, s.n, m.by_state, s.n, count, s.n, t.head_dim, false);
    for (int64_t i = 0; i < count; i++) {
        m.grad_sum[i] += dot_rows(m.by_state + i * s.n, m.reads + i * s.n, s.n);
        for (int64_t n = i * s.n; n < (i + 1) * s.n; n += 16)
            store(m.grad_reads + n, add(load(m.grad_reads + n), load(m.by_state + n)));
    }
}

// What goes through the state that leaves, whose gradient is `leaving`: gradients of B, and of x (without
// dt) into `dx`, and of sums s. Returns what the last of them gets besides.
inline float ssd_leaving_back(const SsdTask& t, const SsdShape& s, const SsdSteps& steps, SsdBack& m,
                              const float* entering, const float* leaving, int64_t count) {
    turn(leaving, s.n, s.p, m.state);
    product(m.b, s.n, 1, leaving, s.p, m.sent, s.p, count, s.p, t.state_size, false);
    double last = entering ? (double)steps.whole * dot_rows(entering, leaving, s.state) : 0;
    for (int64_t i = 0; i < count; i++) {
        float until = steps.until[i], weight = steps.dt[i] * until;
        float through = weight * dot_rows(m.x + i * s.p, m.sent + i * s.p, s.p);
        if (i < count - 1) last += through, m.grad_sum[i] -= through;
        for (int64_t p = 0; p < s.p; p += 16) {
            store(m.weighed + i * s.p + p, scaled(m.x + i * s.p + p, weight));
            store(m.dx + i * s.p + p, fma(load(m.sent + i * s.p + p), splat(until), load(m.dx + i * s.p + p)));
        }
    }
    product(m.weighed, s.p, 1, m.state, s.n, m.grad_b, s.n, count, s.n, t.head_dim, true);
    return (float)last;
}

// All gradients of one chunk, of the heads of one group; those of a and d as a part for each chunk.
inline void ssd_backward(const SsdTask& t, const SsdGradients& to, const SsdChunk& chunk, int64_t number, int64_t group,
                         uint8_t* scratch) {
    SsdShape s(t);
    int64_t c = up16(chunk.count), count = chunk.count, inner = t.heads * t.head_dim;
    SsdBack m(s, c, (float*)scratch);
    gather(t.b + chunk.begin * t.b_row + group * t.state_size, t.b_row, count, t.state_size, m.b, s.n);
    gather(t.c + chunk.begin * t.c_row + group * t.state_size, t.c_row, count, t.state_size, m.reads, s.n);
    turn(m.b, c, s.n, m.turned);
    product(m.reads, s.n, 1, m.turned, c, m.scores, c, count, c, t.state_size, false, Part::lower);
    memset(m.grad_scores, 0, c * c * 4), memset(m.grad_b, 0, c * s.n * 4), memset(m.grad_reads, 0, c * s.n * 4);
    for (int64_t head = group * s.per_group; head < (group + 1) * s.per_group; head++) {
        SsdSteps steps(t, chunk, head, m.room, c);
        int64_t at = chunk.begin * inner + head * t.head_dim;
        gather(t.x + chunk.begin * t.x_row + head * t.head_dim, t.x_row, count, t.head_dim, m.x, s.p);
        gather(to.y + at, inner, count, t.head_dim, m.dy, s.p);
        float grad_d = 0, last = 0;
        ssd_pairs_back(t, s, steps, m, count, c, &grad_d);
        const float *entering = nullptr, *leaving = nullptr;
        if (chunk.entering >= 0) {
            entering = t.states + (chunk.entering * t.heads + head) * s.state;
            ssd_entering_back(t, s, steps, m, entering, count);
        }
        if (chunk.leaving >= 0) {
            leaving = to.states + (chunk.leaving * t.heads + head) * s.state;
            last = ssd_leaving_back(t, s, steps, m, entering, leaving, count);
        }
        double running = last, grad_a = 0;
        for (int64_t i = count - 1; i >= 0; i--) {
            float own = dot_rows(m.x + i * s.p, m.dx + i * s.p, s.p), dt = steps.dt[i];
            running += m.grad_sum[i];
            grad_a += running * dt;
            to.dt[(chunk.begin + i) * t.heads + head] = own + (float)running * t.a[head];
            for (int64_t p = 0; p < t.head_dim; p += 16) {
                f32x16 sum = fma(load(m.dx + i * s.p + p), splat(dt), scaled(m.dy + i * s.p + p, t.d[head]));
                store_partial(to.x + at + i * inner + p, sum, t.head_dim - p);
            }
        }
        to.a[number * t.heads + head] = (float)grad_a, to.d[number * t.heads + head] = grad_d;
    }
    product(m.grad_scores, c, 1, m.b, s.n, m.grad_reads, s.n, count, s.n, count, true, Part::until_row);
    product(m.grad_scores, 1, c, m.reads, s.n, m.grad_b, s.n, count, s.n, count, true, Part::from_row);
    int64_t states = t.groups * t.state_size, from = chunk.begin * states + group * t.state_size;
    scatter(m.grad_b, s.n, count, t.state_size, to.b + from, states);
    scatter(m.grad_reads, s.n, count, t.state_size, to.c + from, states);
}
