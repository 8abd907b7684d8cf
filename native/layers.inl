// Everything of a layer that is not a matrix product with a weight. Included after matmul.inl.
//
// As there, every sum has one order: over features in 16 lanes that fold in halves; over keys and
// tokens one after the other, from the start of the sequence.

inline void sigmoid(float* x, int64_t size) {
    for (int64_t i = 0; i < size; i += 16) {
        f32x16 v = load_partial(x + i, size - i);
        store_partial(x + i, div(splat(1), add(splat(1), exp(sub(splat(0), v)))), size - i);
    }
}
inline void relu_squared(float* x, int64_t size) {
    for (int64_t i = 0; i < size; i += 16) {
        f32x16 v = load_partial(x + i, size - i);
        v = max(splat(0), v);  // this order keeps NaN
        store_partial(x + i, mul(v, v), size - i);
    }
}
inline void add(float* x, const float* y, int64_t size) {
    for (int64_t i = 0; i < size; i += 16)
        store_partial(x + i, add(load_partial(x + i, size - i), load_partial(y + i, size - i)), size - i);
}
// out = parts[0] * weights[0] + parts[1] * weights[1] + ..., products and sums rounded one by one.
inline void weighted_sum(float* out, const float* const* parts, const float* weights, int64_t num, int64_t size) {
    for (int64_t i = 0; i < size; i += 16) {
        f32x16 sum = mul(load_partial(parts[0] + i, size - i), splat(weights[0]));
        for (int64_t p = 1; p < num; p++)
            sum = add(sum, mul(load_partial(parts[p] + i, size - i), splat(weights[p])));
        store_partial(out + i, sum, size - i);
    }
}
inline float inverse_rms(const float* x, int64_t size, float eps) {
    f32x16 sum = splat(0);
    for (int64_t i = 0; i < size; i += 16) {
        f32x16 v = load_partial(x + i, size - i);
        sum = fma(v, v, sum);
    }
    return 1.0f / std::sqrt(reduce_add(sum) / (float)size + eps);
}
inline void rms_norm(const float* x, const float* weight, float eps, int64_t size, float* out) {
    f32x16 scale = splat(inverse_rms(x, size, eps));
    for (int64_t i = 0; i < size; i += 16) {
        f32x16 v = mul(load_partial(x + i, size - i), scale);
        store_partial(out + i, mul(v, load_partial(weight + i, size - i)), size - i);
    }
}

// Index of the largest value (the first of equals), that value, and log of the sum of e^(x - peak).
inline void log_softmax_at(const float* x, int64_t size, int64_t* argmax, float* peak, float* log_mass) {
    f32x16 best = splat(-INFINITY), poison = splat(0);
    for (int64_t i = 0; i < size; i += 16) {
        f32x16 v = load_partial(x + i, size - i);
        poison = fma(v, splat(0), poison);
        if (size - i < 16) {
            float t[16];
            store(t, v);
            for (int64_t l = size - i; l < 16; l++) t[l] = -INFINITY;
            v = load(t);
        }
        best = max(best, v);
    }
    *peak = reduce_max(best);
    if (!(reduce_add(poison) == 0)) *peak = NAN;
    *argmax = 0;
    for (int64_t i = 0; i < size; i++)
        if (x[i] == *peak) {
            *argmax = i;
            break;
        }
    f32x16 mass = splat(0);
    for (int64_t i = 0; i < size; i += 16) {
        f32x16 e = exp(sub(load_partial(x + i, size - i), splat(*peak)));
        if (size - i < 16) {
            float t[16];
            store(t, e);
            for (int64_t l = size - i; l < 16; l++) t[l] = 0;
            e = load(t);
        }
        mass = add(mass, e);
    }
    *log_mass = std::log(reduce_add(mass));
}

// ---- Mamba-2: convolution, recurrence and gated norm of one group of one sequence ----

constexpr int64_t kChunk = 2 * kMostHeld;  // tokens worked on together; changes no bit

struct MambaShape {  // sizes of one group, and where its parts lie in a row of the scratch
    int64_t heads, inner, x, b, c, row, conv_dim, b_from, c_from, dt_from;
    explicit MambaShape(const MambaTask& t) {
        heads = t.heads / t.num_groups, inner = heads * t.head_dim;
        x = up16(inner), b = up16(t.state_size), c = b, row = x + b + c;
        int64_t all = t.heads * t.head_dim, state = t.num_groups * t.state_size;
        conv_dim = all + 2 * state;
        b_from = all + t.group * t.state_size, c_from = b_from + state;
        dt_from = all + conv_dim;
    }
};

inline int64_t mamba_scratch(const MambaTask& t) {
    MambaShape s(t);
    return ((t.kernel - 1 + 2 * kChunk) * s.row + kChunk * (s.x + 2 * up16(s.heads)) + up16(t.state_size)) * 4;
}

// Copy the group's channels of a row [conv_dim] into one of the scratch, or back.
inline void gather_row(const MambaTask& t, const MambaShape& s, const float* from, float* to) {
    memcpy(to, from + t.group * s.inner, s.inner * 4);
    memcpy(to + s.x, from + s.b_from, t.state_size * 4);
    memcpy(to + s.x + s.b, from + s.c_from, t.state_size * 4);
}
inline void scatter_row(const MambaTask& t, const MambaShape& s, const float* from, float* to) {
    memcpy(to + t.group * s.inner, from, s.inner * 4);
    memcpy(to + s.b_from, from + s.x, t.state_size * 4);
    memcpy(to + s.c_from, from + s.x + s.b, t.state_size * 4);
}

// Convolve `count` tokens: `in` rows start kernel - 1 tokens before the first; SiLU on top.
inline void convolve(const MambaTask& t, const MambaShape& s, const float* in, int64_t count, float* out) {
    struct { int64_t at, from, size; } parts[3] = {
        {0, t.group * s.inner, s.inner}, {s.x, s.b_from, t.state_size}, {s.x + s.b, s.c_from, t.state_size}};
    for (auto& p : parts)
        for (int64_t i = 0; i < p.size; i += 16) {
            int64_t left = p.size - i;
            f32x16 bias = t.conv_bias ? load_partial(t.conv_bias + p.from + i, left) : splat(0);
            for (int64_t n = 0; n < count; n++) {
                f32x16 sum = splat(0);
                for (int64_t k = 0; k < t.kernel; k++) {
                    f32x16 w = load_partial(t.conv_weight + k * s.conv_dim + p.from + i, left);
                    sum = fma(load(in + (n + k) * s.row + p.at + i), w, sum);
                }
                store(out + n * s.row + p.at + i, silu(add(sum, bias)));
            }
        }
}

// What the tokens of a chunk bring to one head: rows of x (at the head's first value), B and C, and its
// step sizes. y, a row for each token from `first_out` on, is what they read.
struct Walk {
    const float *x, *b, *c;
    int64_t row;
    const float *decay, *dt;
    int64_t per_token, count, first_out;
    bool hold;  // the state stays what it was before `first_out`
    float* y;
    int64_t y_row;
};

template <int R, int V, bool Out>
INLINE void advance(f32x16 (&s)[R][V], const Walk& w, int64_t p, int64_t from, int64_t to) {
    for (int64_t n = from; n < to; n++) {
        f32x16 keep = splat(w.decay[n * w.per_token]), xd[R], sum[R];
        UNROLL for (int r = 0; r < R; r++) xd[r] = splat(w.x[n * w.row + p + r] * w.dt[n * w.per_token]), sum[r] = splat(0);
        UNROLL for (int v = 0; v < V; v++) {
            f32x16 in = load(w.b + n * w.row + 16 * v), out = Out ? load(w.c + n * w.row + 16 * v) : splat(0);
            UNROLL for (int r = 0; r < R; r++) {
                s[r][v] = fma(s[r][v], keep, mul(xd[r], in));
                if constexpr (Out) sum[r] = fma(s[r][v], out, sum[r]);
            }
        }
        float* y = w.y + (n - w.first_out) * w.y_row + p;
        if constexpr (Out && R == 4) store_sums(y, sum[0], sum[1], sum[2], sum[3]);
        else if constexpr (Out)
            UNROLL for (int r = 0; r < R; r++) y[r] = reduce_add(sum[r]);
    }
}

template <int R, int V>
INLINE void store_state(const f32x16 (&s)[R][V], float* state, int64_t size) {
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) store_partial(state + r * size + 16 * v, s[r][v], size - 16 * v);
}

// Walk R rows of a head's state, from row p on. One store: after tokens that are held it would be undone.
template <int R, int V>
inline void walk(float* state, int64_t size, const Walk& w, int64_t p) {
    f32x16 s[R][V];
    state += p * size;
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) s[r][v] = load_partial(state + r * size + 16 * v, size - 16 * v);
    advance<R, V, false>(s, w, p, 0, w.first_out);
    if (w.hold && w.first_out) store_state(s, state, size);
    advance<R, V, true>(s, w, p, w.first_out, w.count);
    if (!w.hold) store_state(s, state, size);
}

// One row and one token for any state size, state in memory.
inline float walk_any(float* state, int64_t size, float x, const float* b, const float* c, float decay, float dt) {
    f32x16 keep = splat(decay), xd = splat(x * dt), sum = splat(0);
    for (int64_t i = 0; i < size; i += 16) {
        f32x16 s = load_partial(state + i, size - i);
        s = fma(s, keep, mul(xd, load(b + i)));
        sum = fma(s, load(c + i), sum);
        store_partial(state + i, s, size - i);
    }
    return reduce_add(sum);
}

// Walk all rows of one head; `spare` holds a row where it is walked in memory.
inline void walk_head(float* state, int64_t head_dim, int64_t size, const Walk& w, float* spare) {
    int64_t p = 0;
    switch (ceil_div(size, 16)) {  // as many rows at a time as registers hold
#define WALK(R, V) for (; p + R <= head_dim; p += R) walk<R, V>(state, size, w, p);
        case 1: WALK(4, 1) WALK(1, 1) break;
        case 2: WALK(4, 2) WALK(1, 2) break;
        case 4: WALK(2, 4) WALK(1, 4) break;
        case 8: WALK(2, 8) WALK(1, 8) break;
#undef WALK
    }
    for (; p < head_dim; p++) {
        float* row = state + p * size;
        for (int64_t n = 0; n < w.count; n++) {
            if (w.hold && n == w.first_out) row = (float*)memcpy(spare, row, size * 4);
            float sum = walk_any(row, size, w.x[n * w.row + p], w.b + n * w.row, w.c + n * w.row,
                                 w.decay[n * w.per_token], w.dt[n * w.per_token]);
            if (n >= w.first_out) w.y[(n - w.first_out) * w.y_row + p] = sum;
        }
    }
}

// softplus(dt + bias), clamped as torch does, and e^(dt a), for the group's heads.
inline void step_sizes(const MambaTask& t, const MambaShape& s, const float* projected, float* dt, float* decay) {
    for (int64_t h = 0; h < s.heads; h++) {
        int64_t head = t.group * s.heads + h;
        float v = projected[s.dt_from + head] + t.dt_bias[head];
        float step = (v > 0 ? v : 0 * v) + std::log1p(std::exp(-std::fabs(v)));
        step = step < t.dt_min ? t.dt_min : step;
        step = step > t.dt_max ? t.dt_max : step;
        dt[h] = step, decay[h] = std::exp(step * t.a[head]);
    }
}

// out = rms_norm(y * silu(gate)) of the group.
inline void gate_and_norm(const MambaTask& t, const MambaShape& s, float* y, const float* gate, float* out) {
    for (int64_t i = 0; i < s.inner; i += 16) {
        int64_t left = s.inner - i;
        store_partial(y + i, mul(load_partial(y + i, left), silu(load_partial(gate + i, left))), left);
    }
    rms_norm(y, t.norm_weight + t.group * s.inner, t.eps, s.inner, out);
}

// Replayed tokens go first, then those of the step: of these the state takes none where they are held.
// Such a step fits one chunk (see kMostHeld).
inline void mamba(const MambaTask& t, uint8_t* scratch) {
    MambaShape s(t);
    int64_t history = t.kernel - 1, per_token = up16(s.heads), all = t.heads * t.head_dim;
    int64_t replayed = t.num_replayed, total = replayed + t.tokens, settled = t.hold ? replayed : total;
    float* in = (float*)scratch;
    float* conv = in + (history + kChunk) * s.row;
    float* y = conv + kChunk * s.row;
    float *dt = y + kChunk * s.x, *decay = dt + kChunk * per_token, *spare = decay + kChunk * per_token;
    float* states = t.state + t.group * s.inner * t.state_size;
    int64_t most = total < kChunk ? total : kChunk;
    memset(in, 0, (history + most) * s.row * 4);  // what pads a row stays zero
    memset(conv, 0, most * s.row * 4);
    if (t.fresh) {
        memset(states, 0, s.inner * t.state_size * 4);
    } else {
        for (int64_t k = 0; k < history; k++) gather_row(t, s, t.tail + k * s.conv_dim, in + k * s.row);
    }
    for (int64_t done = 0; done < total; done += kChunk) {
        int64_t count = total - done < kChunk ? total - done : kChunk;
        int64_t first = replayed > done ? (replayed - done < count ? replayed - done : count) : 0;
        for (int64_t n = 0; n < count; n++) {
            const float* row = n < first ? t.replayed + (done + n) * t.width : t.projected + (done + n - replayed) * t.width;
            gather_row(t, s, row + all, in + (history + n) * s.row);
            step_sizes(t, s, row, dt + n * per_token, decay + n * per_token);
        }
        convolve(t, s, in, count, conv);
        for (int64_t h = 0; h < s.heads; h++) {
            Walk w{conv + h * t.head_dim, conv + s.x, conv + s.x + s.b, s.row, decay + h, dt + h, per_token, count, first,
                   t.hold, y + h * t.head_dim, s.x};
            walk_head(states + h * t.head_dim * t.state_size, t.head_dim, t.state_size, w, spare);
        }
        for (int64_t n = first; n < count; n++) {
            float* read = y + (n - first) * s.x;
            for (int64_t h = 0; h < s.heads; h++) {
                float d = t.d[t.group * s.heads + h];
                for (int64_t p = h * t.head_dim; p < (h + 1) * t.head_dim; p++) read[p] += conv[n * s.row + p] * d;
            }
            int64_t token = done + n - replayed;
            gate_and_norm(t, s, read, t.projected + token * t.width + t.group * s.inner,
                          t.out + token * all + t.group * s.inner);
        }
        if (settled > done && settled <= done + count)
            for (int64_t k = 0; k < history; k++)
                scatter_row(t, s, in + (settled - done + k) * s.row, t.tail + k * s.conv_dim);
        memmove(in, in + count * s.row, history * s.row * 4);
    }
}

// ---- attention ----

constexpr int64_t kTileRows = 256;  // rows (token, head) that share a block of keys

inline int64_t attention_scratch(const AttentionTask& t) {
    int64_t dim = up16(t.head_dim);
    return (dim * kKeyBlock * 2 + kTileRows * (kKeyBlock + dim + dim + 2)) * 4;
}

// Copy keys [begin, end) of a page run to `out` rows of `dim` floats, zeros after head_dim.
inline void read_rows(const AttentionTask& t, const void* pages, float scale, int64_t begin, int64_t end, float* out,
                      int64_t dim) {
    for (int64_t k = begin; k < end; k++, out += dim) {
        int64_t at = ((t.pages[k / t.page_size] * t.page_size + k % t.page_size) * t.kv_heads + t.kv_head) * t.head_dim;
        for (int64_t i = 0; i < t.head_dim; i += 16) {
            int64_t left = t.head_dim - i;
            if (t.cache == Format::f32) {
                store(out + i, load_partial((const float*)pages + at + i, left));
            } else if (t.cache == Format::fp8) {
                uint8_t padded[16] = {};
                memcpy(padded, (const uint8_t*)pages + at + i, left < 16 ? left : 16);
                store(out + i, mul(from_fp8(padded), splat(scale)));
            } else if (left >= 16) {
                store(out + i, from_bf16((const uint16_t*)pages + at + i));
            } else {
                uint16_t padded[16] = {};
                memcpy(padded, (const uint16_t*)pages + at + i, left * 2);
                store(out + i, from_bf16(padded));
            }
        }
    }
}

// scores[r][key] = q[r] . key for R rows and 64 keys of the transposed block.
template <int R>
inline void score(const float* q, int64_t dim, const float* keys, int64_t head_dim, float* scores) {
    f32x16 sum[R][4];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int i = 0; i < 4; i++) sum[r][i] = splat(0);
    for (int64_t p = 0; p < head_dim; p++) {
        f32x16 k[4];
        UNROLL for (int i = 0; i < 4; i++) k[i] = load(keys + p * kKeyBlock + 16 * i);
        UNROLL for (int r = 0; r < R; r++) {
            f32x16 x = splat(q[r * dim + p]);
            UNROLL for (int i = 0; i < 4; i++) sum[r][i] = fma(x, k[i], sum[r][i]);
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int i = 0; i < 4; i++) store(scores + r * kKeyBlock + 16 * i, sum[r][i]);
}

// total[r] += sum of weights[r][key] * values[key] over the keys, one after the other.
template <int R>
inline void accumulate(const float* weights, const float* values, int64_t keys, int64_t dim, float* total) {
    for (int64_t i = 0; i < dim; i += 64) {
        int width = dim - i < 64 ? (int)(dim - i) / 16 : 4;
        f32x16 sum[R][4];
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int v = 0; v < width; v++) sum[r][v] = load(total + r * dim + i + 16 * v);
        for (int64_t k = 0; k < keys; k++)
            UNROLL for (int r = 0; r < R; r++) {
                f32x16 w = splat(weights[r * kKeyBlock + k]);
                UNROLL for (int v = 0; v < 4; v++)
                    if (v < width) sum[r][v] = fma(w, load(values + k * dim + i + 16 * v), sum[r][v]);
            }
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int v = 0; v < width; v++) store(total + r * dim + i + 16 * v, sum[r][v]);
    }
}

// One row's step of the online softmax over `count` keys, of which the first `visible` are seen; scores
// become weights; total shrinks.
inline void soften(float* scores, int64_t count, int64_t visible, float& peak, float& mass, float* total,
                   int64_t dim) {
    if (visible <= 0) {
        memset(scores, 0, count * 4);
        return;
    }
    int64_t end = up16(count);
    for (int64_t k = visible; k < end; k++) scores[k] = -INFINITY;
    f32x16 best = splat(-INFINITY);
    for (int64_t k = 0; k < end; k += 16) best = max(load(scores + k), best);
    float top = reduce_max(best), fresh = top > peak ? top : peak;
    f32x16 sum = splat(0);
    for (int64_t k = 0; k < end; k += 16) {  // further keys would add zeros
        f32x16 w = exp(sub(load(scores + k), splat(fresh)));
        store(scores + k, w);
        sum = add(sum, w);
    }
    float shrink[16];
    store(shrink, exp(splat(peak - fresh)));
    mass = mass * shrink[0] + reduce_add(sum);
    for (int64_t i = 0; i < dim; i += 16) store(total + i, mul(load(total + i), splat(shrink[0])));
    peak = fresh;
}

inline void attend_tile(const AttentionTask& t, int64_t first, int64_t rows, uint8_t* scratch) {
    int64_t dim = up16(t.head_dim), group = t.heads / t.kv_heads;
    float* keys = (float*)scratch;  // [dim, kKeyBlock]
    float* values = keys + dim * kKeyBlock;
    float* scores = values + dim * kKeyBlock;
    float* q = scores + kTileRows * kKeyBlock;
    float* total = q + kTileRows * dim;
    float *peak = total + kTileRows * dim, *mass = peak + kTileRows;
    float scale = 1.0f / std::sqrt((float)t.head_dim);
    for (int64_t r = 0; r < rows; r++) {
        int64_t at = ((first + r) / group * t.heads + t.kv_head * group + (first + r) % group) * t.head_dim;
        for (int64_t i = 0; i < t.head_dim; i += 16)
            store(q + r * dim + i, mul(load_partial(t.q + at + i, t.head_dim - i), splat(scale)));
        memset(total + r * dim, 0, dim * 4);
        peak[r] = -INFINITY, mass[r] = 0;
    }
    int64_t end = t.context + (first + rows - 1) / group + 1;  // keys that the last row sees
    for (int64_t begin = 0; begin < end; begin += kKeyBlock) {
        int64_t count = end - begin < kKeyBlock ? end - begin : kKeyBlock;
        int64_t whole = ceil_div(count, 64) * 64;  // as many as `score` takes
        read_rows(t, t.keys, t.key_scale, begin, begin + count, values, dim);
        memset(values + count * dim, 0, (whole - count) * dim * 4);
        for (int64_t k = 0; k < whole; k += 16)
            for (int64_t p = 0; p < dim; p += 16) transpose(values + k * dim + p, dim, keys + p * kKeyBlock + k, kKeyBlock);
        int64_t r = 0;
        for (; r + 4 <= rows; r += 4)
            for (int64_t k = 0; k < count; k += 64)
                score<4>(q + r * dim, dim, keys + k, t.head_dim, scores + r * kKeyBlock + k);
        for (; r < rows; r++)
            for (int64_t k = 0; k < count; k += 64)
                score<1>(q + r * dim, dim, keys + k, t.head_dim, scores + r * kKeyBlock + k);
        for (r = 0; r < rows; r++) {
            int64_t visible = t.context + (first + r) / group + 1 - begin;
            soften(scores + r * kKeyBlock, count, visible < count ? visible : count, peak[r], mass[r], total + r * dim,
                   dim);
        }
        read_rows(t, t.values, t.value_scale, begin, begin + count, values, dim);
        for (r = 0; r + 4 <= rows; r += 4)
            accumulate<4>(scores + r * kKeyBlock, values, count, dim, total + r * dim);
        for (; r < rows; r++) accumulate<1>(scores + r * kKeyBlock, values, count, dim, total + r * dim);
    }
    for (int64_t r = 0; r < rows; r++) {
        int64_t at = ((first + r) / group * t.heads + t.kv_head * group + (first + r) % group) * t.head_dim;
        for (int64_t i = 0; i < t.head_dim; i += 16)
            store_partial(t.out + at + i, div(load(total + r * dim + i), splat(mass[r])), t.head_dim - i);
    }
}

inline void attention(const AttentionTask& t, uint8_t* scratch) {
    for (int64_t r = 0; r < t.num_rows; r += kTileRows)
        attend_tile(t, t.first_row + r, t.num_rows - r < kTileRows ? t.num_rows - r : kTileRows, scratch);
}

// ---- what a machine can do ----

inline uint64_t read(const uint8_t* data, int64_t size) {
    f32x16 a = splat(0), b = a, c = a, d = a;
    for (int64_t i = 0; i + 256 <= size; i += 256) {
        const float* p = (const float*)(data + i);
        a = max(a, load(p)), b = max(b, load(p + 16)), c = max(c, load(p + 32)), d = max(d, load(p + 48));
    }
    return (uint64_t)reduce_max(max(max(a, b), max(c, d)));
}

inline double peak(Precision precision, int64_t rounds) {
    float out[16];
    if (precision == Precision::int8) {
        i32x16 sum[12];
        uint8_t three[64];
        memset(three, 3, 64);
        u8x64 x = load_bytes(three);
        for (auto& s : sum) s = splat_int(0);
        for (int64_t n = 0; n < rounds; n++)
            for (auto& s : sum) s = dot(s, x, x);
        for (int i = 1; i < 12; i++) sum[0] = add(sum[0], sum[i]);
        store(out, to_float(sum[0]));
    } else if (precision == Precision::bf16) {
        f32x16 sum[12];
        uint16_t ones[32];
        for (auto& o : ones) o = 0x3F80;
        bf16x32 x = load_bf16(ones);
        for (auto& s : sum) s = splat(0);
        for (int64_t n = 0; n < rounds; n++)
            for (auto& s : sum) s = dot_bf16(s, x, x);
        for (int i = 1; i < 12; i++) sum[0] = add(sum[0], sum[i]);
        store(out, sum[0]);
    } else {
        f32x16 sum[12], x = splat(1e-9f);
        for (auto& s : sum) s = splat(0);
        for (int64_t n = 0; n < rounds; n++)
            for (auto& s : sum) s = fma(x, s, x);
        for (int i = 1; i < 12; i++) sum[0] = add(sum[0], sum[i]);
        store(out, sum[0]);
    }
    volatile float sink = out[0];
    (void)sink;
    double per_round = 12 * (precision == Precision::int8 ? 128 : precision == Precision::bf16 ? 64 : 32);
    return per_round * (double)rounds;
}
