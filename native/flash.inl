// Causal attention within segments, for training: forward and backward. Included after dense.inl.
//
// Queries and keys are taken in blocks of 64; blocks of keys that lie after all their queries are left
// out. Sums are float32, whatever q, k and v hold. Source: FlashAttention (arXiv 2205.14135, 2307.08691).

constexpr int64_t kPlaces = 64;  // of a block

struct FlashRows {  // where one head's rows of a segment lie
    const void *q, *k, *v;
    int64_t wide, narrow;  // values between rows
    FlashRows(const FlashTask& t, int64_t begin, int64_t head)
        : wide(t.heads * t.head_dim), narrow(t.kv_heads * t.head_dim) {
        int64_t other = head / (t.heads / t.kv_heads) * t.head_dim + begin * narrow;
        q = row_of(t.q, t.half, begin * wide + head * t.head_dim);
        k = row_of(t.k, t.half, other), v = row_of(t.v, t.half, other);
    }
};

inline int64_t flash_scratch(const FlashTask& t) {
    int64_t p = up16(t.head_dim);
    return (kPlaces * (4 * p + kPlaces) + 2 * kPlaces) * 4;
}

// Attend queries [first, first + 64) of a segment of `length` tokens that starts at `begin`.
inline void flash(const FlashTask& t, int64_t begin, int64_t length, int64_t first, int64_t head, uint8_t* scratch) {
    int64_t p = up16(t.head_dim), count = length - first < kPlaces ? length - first : kPlaces;
    float *q = (float*)scratch, *keys = q + kPlaces * p, *values = keys + kPlaces * p, *total = values + kPlaces * p;
    float *scores = total + kPlaces * p, *peak = scores + kPlaces * kPlaces, *mass = peak + kPlaces;
    FlashRows rows(t, begin, head);
    Lower lower;
    float scale = 1.0f / std::sqrt((float)t.head_dim);
    gather(row_of(rows.q, t.half, first * rows.wide), t.half, rows.wide, count, t.head_dim, q, p);
    for (int64_t i = 0; i < count * p; i += 16) store(q + i, scaled(q + i, scale));
    memset(total, 0, kPlaces * p * 4);
    for (int64_t i = 0; i < count; i++) peak[i] = -INFINITY, mass[i] = 0;
    for (int64_t from = 0; from <= first; from += kPlaces) {
        int64_t width = length - from < kPlaces ? length - from : kPlaces, padded = up16(width);
        bool last = from == first;
        gather(row_of(rows.k, t.half, from * rows.narrow), t.half, rows.narrow, width, t.head_dim, values, p);
        turn(values, padded, p, keys);
        product(q, p, 1, keys, padded, scores, kPlaces, count, padded, t.head_dim, false, last ? Part::lower : Part::all);
        for (int64_t i = 0; i < count; i++) {
            float* row = scores + i * kPlaces;
            int64_t end = last ? up16(i + 1) : padded;
            if (last) store(row + end - 16, lower.pick(i, end - 16, load(row + end - 16), splat(-INFINITY)));
            f32x16 best = splat(peak[i]), sum = splat(0);
            for (int64_t j = 0; j < end; j += 16) best = max(best, load(row + j));
            float fresh = reduce_max(best), shrink[16];
            for (int64_t j = 0; j < end; j += 16) {
                f32x16 weight = exp(sub(load(row + j), splat(fresh)));
                store(row + j, weight), sum = add(sum, weight);
            }
            store(shrink, exp(splat(peak[i] - fresh)));
            peak[i] = fresh, mass[i] = mass[i] * shrink[0] + reduce_add(sum);
            if (shrink[0] != 1)
                for (int64_t k = 0; k < p; k += 16) store(total + i * p + k, scaled(total + i * p + k, shrink[0]));
        }
        gather(row_of(rows.v, t.half, from * rows.narrow), t.half, rows.narrow, width, t.head_dim, values, p);
        product(scores, kPlaces, 1, values, p, total, p, count, p, width, true, last ? Part::until_row : Part::all);
    }
    for (int64_t i = 0; i < count; i++) {
        for (int64_t k = 0; k < p; k += 16) store(total + i * p + k, div(load(total + i * p + k), splat(mass[i])));
        t.log_mass[(begin + first + i) * t.heads + head] = peak[i] + std::log(mass[i]);
    }
    scatter(total, p, count, t.head_dim, row_of(t.out, t.half, (begin + first) * rows.wide + head * t.head_dim), t.half,
            rows.wide);
}

inline int64_t flash_back_scratch(const FlashTask& t, int64_t length) {
    int64_t p = up16(t.head_dim);
    return (3 * (length + kPlaces) * p + 7 * kPlaces * p + 2 * kPlaces * kPlaces + (length + kPlaces)) * 4;
}

// Gradients of one head of a segment; those of its keys and values go to `to.k` and `to.v`, a row a head.
inline void flash_back(const FlashTask& t, const FlashGradients& to, int64_t begin, int64_t length, int64_t head,
                       uint8_t* scratch) {
    int64_t p = up16(t.head_dim), all = (length + kPlaces) * p, block = kPlaces * p;
    float *q = (float*)scratch, *up = q + all, *grad_q = up + all, *keys = grad_q + all, *turned_keys = keys + block;
    float *values = turned_keys + block, *grad_keys = values + block, *grad_values = grad_keys + block;
    float *spare = grad_values + block, *weights = spare + 2 * block, *grads = weights + kPlaces * kPlaces;
    float* own = grads + kPlaces * kPlaces;
    FlashRows rows(t, begin, head);
    Lower lower;
    float scale = 1.0f / std::sqrt((float)t.head_dim);
    int64_t at = begin * rows.wide + head * t.head_dim;
    gather(rows.q, t.half, rows.wide, length, t.head_dim, q, p);
    gather(row_of(to.out, t.half, at), t.half, rows.wide, length, t.head_dim, up, p);
    memset(grad_q, 0, length * p * 4);
    for (int64_t i = 0; i < length * p; i += 16) store(q + i, scaled(q + i, scale));
    for (int64_t i = 0; i < length; i++) {  // what the gradients of a row's scores have in common
        gather(row_of((const void*)t.out, t.half, at + i * rows.wide), t.half, rows.wide, 1, t.head_dim, spare, p);
        own[i] = dot_rows(spare, up + i * p, p);
    }
    for (int64_t from = 0; from < length; from += kPlaces) {
        int64_t width = length - from < kPlaces ? length - from : kPlaces, padded = up16(width);
        gather(row_of(rows.v, t.half, from * rows.narrow), t.half, rows.narrow, width, t.head_dim, keys, p);
        turn(keys, padded, p, values);
        gather(row_of(rows.k, t.half, from * rows.narrow), t.half, rows.narrow, width, t.head_dim, keys, p);
        turn(keys, padded, p, turned_keys);
        memset(grad_keys, 0, block * 4), memset(grad_values, 0, block * 4);
        for (int64_t first = from; first < length; first += kPlaces) {
            int64_t count = length - first < kPlaces ? length - first : kPlaces;
            bool diagonal = first == from;
            Part part = diagonal ? Part::lower : Part::all, by_row = diagonal ? Part::until_row : Part::all;
            Part by_column = diagonal ? Part::from_row : Part::all;
            float *queries = q + first * p, *ups = up + first * p;
            product(queries, p, 1, turned_keys, padded, weights, kPlaces, count, padded, t.head_dim, false, part);
            product(ups, p, 1, values, padded, grads, kPlaces, count, padded, t.head_dim, false, part);
            for (int64_t i = 0; i < count; i++) {
                int64_t end = diagonal ? up16(i + 1) : padded, token = first + i;
                f32x16 mass = splat(t.log_mass[(begin + token) * t.heads + head]), common = splat(own[token]);
                for (int64_t j = 0; j < end; j += 16) {
                    float *weight = weights + i * kPlaces + j, *grad = grads + i * kPlaces + j;
                    f32x16 w = exp(sub(load(weight), mass)), g = mul(w, sub(load(grad), common));
                    if (diagonal && j + 16 > i) w = lower.pick(i, j, w, splat(0)), g = lower.pick(i, j, g, splat(0));
                    store(weight, w), store(grad, g);
                }
            }
            product(weights, 1, kPlaces, ups, p, grad_values, p, width, p, count, true, by_column);
            product(grads, 1, kPlaces, queries, p, grad_keys, p, width, p, count, true, by_column);
            product(grads, kPlaces, 1, keys, p, grad_q + first * p, p, count, p, width, true, by_row);
        }
        int64_t row = at + from * rows.wide;
        scatter(grad_keys, p, width, t.head_dim, to.k + row, rows.wide);
        scatter(grad_values, p, width, t.head_dim, to.v + row, rows.wide);
    }
    for (int64_t i = 0; i < length * p; i += 16) store(grad_q + i, scaled(grad_q + i, scale));
    scatter(grad_q, p, length, t.head_dim, row_of(to.q, t.half, at), t.half, rows.wide);
}

inline void sum_heads(const FlashTask& t, const float* parts, int64_t begin, int64_t end, void* out) {
    int64_t group = t.heads / t.kv_heads;
    for (int64_t row = begin * t.kv_heads; row < end * t.kv_heads; row++)
        for (int64_t i = 0; i < t.head_dim; i += 16) {
            const float* part = parts + row * group * t.head_dim + i;
            f32x16 sum = load_partial(part, t.head_dim - i);
            for (int64_t h = 1; h < group; h++) sum = add(sum, load_partial(part + h * t.head_dim, t.head_dim - i));
            write(row_of(out, t.half, row * t.head_dim), t.half, i, sum, t.head_dim - i);
        }
}
