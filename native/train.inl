// Convolution with SiLU, and norms, for training: forward and backward. Included after dense.inl.
//
// Inputs are float32 or bfloat16 (`half`), sums float32. Rows are walked in order; gradients of weights
// are sums over blocks of tokens, which the caller adds up, or over all tokens of some channels.

inline f32x16 sigmoid(f32x16 x) { return div(splat(1), add(splat(1), exp(sub(splat(0), x)))); }

// ---- convolution ----

inline int64_t taps_of(const ConvTask& t, int64_t token) {  // that lie in the token's segment
    return t.positions[token] < t.kernel ? t.positions[token] + 1 : t.kernel;
}

inline void conv(const ConvTask& t, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++) {
        int64_t taps = taps_of(t, n);
        for (int64_t i = 0; i < t.channels; i += 16) {
            int64_t left = t.channels - i;
            f32x16 sum = t.bias ? load_partial(t.bias + i, left) : splat(0);
            for (int64_t back = taps - 1; back >= 0; back--) {
                f32x16 x = read(row_of(t.x, t.half, (n - back) * t.x_row), t.half, i, left);
                sum = fma(x, load_partial(t.weight + (t.kernel - 1 - back) * t.channels + i, left), sum);
            }
            store_partial(t.out + n * t.channels + i, silu(sum), left);
        }
    }
}

// What 16 channels carry from token to token; entry k is of the token k before.
template <int K>
struct ConvBack {
    f32x16 x[K], grad[K], weight[K], grad_weight[K], grad_bias, bias;
};

template <int K>
inline void conv_back_some(const ConvTask& t, const ConvGradients& to, ConvBack<K>& state, int64_t i, int64_t begin,
                           int64_t end) {
    ConvBack<K> s = state;  // in registers, where stores to the results cannot alias it
    int64_t left = t.channels - i;
    for (int64_t n = begin; n < end; n++) {
        int64_t taps = taps_of(t, n);
        UNROLL for (int k = K - 1; k > 0; k--) s.x[k] = s.x[k - 1], s.grad[k] = s.grad[k - 1];
        s.x[0] = read(row_of(t.x, t.half, n * t.x_row), t.half, i, left), s.grad[0] = splat(0);
        f32x16 sum = s.bias;
        UNROLL for (int k = K - 1; k >= 0; k--)
            if (k < taps) sum = fma(s.x[k], s.weight[k], sum);
        f32x16 open = sigmoid(sum), up = load_partial(to.out + n * t.channels + i, left);
        // d silu(v) / dv = s (1 + v (1 - s)), with s the sigmoid.
        f32x16 grad = mul(mul(up, open), fma(sum, sub(splat(1), open), splat(1)));
        s.grad_bias = add(s.grad_bias, grad);
        UNROLL for (int k = 0; k < K; k++)
            if (k < taps) {
                s.grad_weight[k] = fma(grad, s.x[k], s.grad_weight[k]);
                s.grad[k] = fma(grad, s.weight[k], s.grad[k]);
            }
        if (n >= K - 1) write(row_of(to.x, t.half, (n - K + 1) * t.channels), t.half, i, s.grad[K - 1], left);
    }
    state = s;
}

template <int K>
inline void conv_back_taps(const ConvTask& t, const ConvGradients& to, int64_t begin, int64_t end) {
    constexpr int64_t kTokens = 64;  // of one visit: neighbouring channels are read from the first cache
    ConvBack<K> states[kConvChannels / 16];
    for (int64_t i = begin; i < end; i += 16) {
        ConvBack<K>& s = states[(i - begin) / 16];
        s.grad_bias = splat(0), s.bias = t.bias ? load_partial(t.bias + i, t.channels - i) : splat(0);
        for (int k = 0; k < K; k++) {
            s.x[k] = s.grad[k] = s.grad_weight[k] = splat(0);
            s.weight[k] = k < t.kernel ? load_partial(t.weight + (t.kernel - 1 - k) * t.channels + i, t.channels - i)
                                       : splat(0);
        }
    }
    for (int64_t n = 0; n < t.tokens; n += kTokens)
        for (int64_t i = begin; i < end; i += 16)
            conv_back_some(t, to, states[(i - begin) / 16], i, n, n + kTokens < t.tokens ? n + kTokens : t.tokens);
    for (int64_t i = begin; i < end; i += 16) {
        ConvBack<K>& s = states[(i - begin) / 16];
        int64_t left = t.channels - i;
        for (int64_t k = 0; k < K - 1 && k < t.tokens; k++)
            write(row_of(to.x, t.half, (t.tokens - 1 - k) * t.channels), t.half, i, s.grad[k], left);
        store_partial(to.bias + i, s.grad_bias, left);
        for (int64_t k = 0; k < t.kernel; k++)
            store_partial(to.weight + (t.kernel - 1 - k) * t.channels + i, s.grad_weight[k], left);
    }
}

inline void conv_back(const ConvTask& t, const ConvGradients& to, int64_t begin, int64_t end) {
    if (t.kernel <= 4) conv_back_taps<4>(t, to, begin, end);
    else conv_back_taps<kMostTaps>(t, to, begin, end);
}

// ---- norms ----

// x, or x * silu(gate), of 16 values of a row.
INLINE f32x16 gated(const NormTask& t, const void* x, const void* gate, int64_t i, int64_t left) {
    f32x16 v = read(x, t.x_half, i, left);
    return gate ? mul(v, silu(read(gate, t.half, i, left))) : v;
}

inline void norm(const NormTask& t, int64_t begin, int64_t end) {
    int64_t width = t.size / t.groups;
    for (int64_t n = begin; n < end; n++)
        for (int64_t g = 0; g < t.groups; g++) {
            const void* x = row_of(t.x, t.x_half, n * t.size + g * width);
            const void* gate = t.gate ? row_of(t.gate, t.half, n * t.gate_row + g * width) : nullptr;
            void* out = row_of(t.out, t.half, n * t.size + g * width);
            f32x16 sum = splat(0);
            for (int64_t i = 0; i < width; i += 16) {
                f32x16 v = gated(t, x, gate, i, width - i);
                sum = fma(v, v, sum);
            }
            float scale = 1.0f / std::sqrt(reduce_add(sum) / (float)width + t.eps);
            t.scales[n * t.groups + g] = scale;
            for (int64_t i = 0; i < width; i += 16) {
                f32x16 v = mul(gated(t, x, gate, i, width - i), splat(scale));
                write(out, t.half, i, mul(v, load_partial(t.weight + g * width + i, width - i)), width - i);
            }
        }
}

// Gradients of tokens [begin, end); `grad_weight` [size] is their part of the weight's.
inline void norm_back(const NormTask& t, const NormGradients& to, int64_t begin, int64_t end, float* grad_weight) {
    int64_t width = t.size / t.groups;
    memset(grad_weight, 0, t.size * 4);
    for (int64_t n = begin; n < end; n++)
        for (int64_t g = 0; g < t.groups; g++) {
            int64_t at = n * t.size + g * width;
            const void *x = row_of(t.x, t.x_half, at), *out = row_of(to.out, t.half, at);
            const void* gate = t.gate ? row_of(t.gate, t.half, n * t.gate_row + g * width) : nullptr;
            const float* weight = t.weight + g * width;
            float *sums = grad_weight + g * width, value = t.scales[n * t.groups + g];
            f32x16 scale = splat(value), dot = splat(0);
            for (int64_t i = 0; i < width; i += 16) {
                int64_t left = width - i;
                f32x16 unit = mul(gated(t, x, gate, i, left), scale), grad = read(out, t.half, i, left);
                store_partial(sums + i, fma(grad, unit, load_partial(sums + i, left)), left);
                dot = fma(mul(grad, load_partial(weight + i, left)), unit, dot);
            }
            f32x16 mean = splat(reduce_add(dot) / (float)width);
            for (int64_t i = 0; i < width; i += 16) {
                int64_t left = width - i;
                f32x16 own = read(x, t.x_half, i, left), open = splat(1), through = splat(1), v = own;
                if (gate) {
                    f32x16 z = read(gate, t.half, i, left);
                    open = sigmoid(z), through = mul(z, open), v = mul(own, through);
                    open = fma(through, sub(splat(1), open), open);  // d silu(z) / dz
                }
                f32x16 inner = mul(read(out, t.half, i, left), load_partial(weight + i, left));
                inner = mul(scale, sub(inner, mul(mul(v, scale), mean)));
                if (gate) write(row_of(to.gate, t.half, at), t.half, i, mul(mul(inner, own), open), left);
                write(row_of(to.x, t.x_half, at), t.x_half, i, mul(inner, through), left);
            }
        }
}
