// Matrix products with inputs that are not rounded to int8, for every format by rows; and the entry to
// all products. Included after matmul.inl, which says how results are summed.

template <Format F>
constexpr int64_t bytes_of(int64_t cols) {
    return F == Format::f32 ? cols * 4 : F == Format::fp8 ? cols : F == Format::nvfp4 ? cols / 2 : cols * 2;
}

// Columns [k, k + 16) of a row, without the matrix's scale.
template <Format F>
inline f32x16 decode16(const uint8_t* row, const uint8_t* scales, int64_t k) {
    if constexpr (F == Format::f32) return load((const float*)row + k);
    if constexpr (F == Format::bf16) return from_bf16((const uint16_t*)row + k);
    if constexpr (F == Format::f16) return from_f16((const uint16_t*)row + k);
    if constexpr (F == Format::fp8) return from_fp8(row + k);
    if constexpr (F == Format::nvfp4) return mul(from_codes(row + k / 2), splat(fp8_value(scales[k / kBlock])));
}

// As decode16 for the last columns of a row, with zeros after them.
template <Format F>
inline f32x16 decode_last(const uint8_t* row, const uint8_t* scales, int64_t k, int64_t cols) {
    if constexpr (F == Format::nvfp4) return decode16<F>(row, scales, k);
    constexpr int64_t item = F == Format::f32 ? 4 : F == Format::fp8 ? 1 : 2;
    uint8_t padded[64] = {};
    memcpy(padded, row + k * item, (cols - k) * item);
    return decode16<F>(padded, nullptr, 0);
}

template <Format F>
inline f32x16 decode(const uint8_t* row, const uint8_t* scales, int64_t k, int64_t cols) {
    if (k + 16 <= cols) return decode16<F>(row, scales, k);
    return k < cols ? decode_last<F>(row, scales, k, cols) : splat(0);
}

inline void widen(Format format, const uint8_t* x, int64_t size, float* out) {
    for (int64_t k = 0; k < size; k += 16) {
        f32x16 v = format == Format::f32    ? decode<Format::f32>(x, nullptr, k, size)
                   : format == Format::bf16 ? decode<Format::bf16>(x, nullptr, k, size)
                                            : decode<Format::f16>(x, nullptr, k, size);
        store_partial(out + k, v, size - k);
    }
}

// Where the vectors of a row come from: the matrix itself, or a panel of decoded rows.
template <Format F>
struct Stored {
    const Matrix& w;
    int64_t bytes = bytes_of<F>(w.cols);
    struct Row {
        const uint8_t *data, *scales;
    };
    Row row(int64_t number) const { return {w.data + number * bytes, w.scales + number * (w.cols >> 4)}; }
};
template <Format F>
struct F32Direct : Stored<F> {
    using typename Stored<F>::Row;
    static constexpr int64_t width = 16;
    INLINE f32x16 get(Row row, int64_t k) const {
        if constexpr (F != Format::f32)  // the row after
            if (bytes_of<F>(k) % 64 == 0) prefetch(row.data + this->bytes + bytes_of<F>(k));
        return decode16<F>(row.data, row.scales, k);
    }
    f32x16 last(Row row, int64_t k) const { return decode_last<F>(row.data, row.scales, k, this->w.cols); }
    using Vector = f32x16;
    static INLINE f32x16 input(const void* x, int64_t k) { return load((const float*)x + k); }
    static INLINE f32x16 multiply(f32x16 a, f32x16 x, f32x16 sum) { return fma(a, x, sum); }
};
template <Format F>
struct Bf16Direct : Stored<F> {
    using typename Stored<F>::Row;
    static constexpr int64_t width = 32;
    INLINE bf16x32 get(Row row, int64_t k) const {
        if constexpr (F == Format::bf16) return load_bf16((const uint16_t*)row.data + k);
        uint16_t two[32];
        store_bf16(two, decode16<F>(row.data, row.scales, k), decode16<F>(row.data, row.scales, k + 16));
        return load_bf16(two);
    }
    bf16x32 last(Row row, int64_t k) const {
        uint16_t two[32];
        store_bf16(two, decode<F>(row.data, row.scales, k, this->w.cols),
                   decode<F>(row.data, row.scales, k + 16, this->w.cols));
        return load_bf16(two);
    }
    using Vector = bf16x32;
    static INLINE bf16x32 input(const void* x, int64_t k) { return load_bf16((const uint16_t*)x + k); }
    static INLINE f32x16 multiply(bf16x32 a, bf16x32 x, f32x16 sum) { return dot_bf16(sum, a, x); }
};
struct F32Panel {  // rows of `stride` floats, zeros after the last column
    const float* panel;
    int64_t stride;
    using Row = const float*;
    static constexpr int64_t width = 16;
    Row row(int64_t number) const { return panel + number * stride; }
    static INLINE f32x16 get(Row row, int64_t k) { return load(row + k); }
    static INLINE f32x16 last(Row row, int64_t k) { return load(row + k); }
    using Vector = f32x16;
    static INLINE f32x16 input(const void* x, int64_t k) { return load((const float*)x + k); }
    static INLINE f32x16 multiply(f32x16 a, f32x16 x, f32x16 sum) { return fma(a, x, sum); }
};
struct Bf16Panel {
    const uint16_t* panel;
    int64_t stride;
    using Row = const uint16_t*;
    static constexpr int64_t width = 32;
    Row row(int64_t number) const { return panel + number * stride; }
    static INLINE bf16x32 get(Row row, int64_t k) { return load_bf16(row + k); }
    static INLINE bf16x32 last(Row row, int64_t k) { return load_bf16(row + k); }
    using Vector = bf16x32;
    static INLINE bf16x32 input(const void* x, int64_t k) { return load_bf16((const uint16_t*)x + k); }
    static INLINE f32x16 multiply(bf16x32 a, bf16x32 x, f32x16 sum) { return dot_bf16(sum, a, x); }
};

// Sums of M tokens and of Q quads of rows, which lie four apart in a panel of 16; folded to
// sums[m][quad][16], since narrow matrices would else spend as long on the lanes as on the products.
template <int Q, int M, class Source>
inline void dot_float(const Source& source, const int64_t* numbers, int64_t cols, const Token* tokens, float* sums) {
    f32x16 sum[4 * Q][M];
    clear_sums(sum);
    typename Source::Row rows[4 * Q];
    const void* x[M];
    UNROLL for (int r = 0; r < 4 * Q; r++) rows[r] = source.row(numbers[r]);
    UNROLL for (int m = 0; m < M; m++) x[m] = tokens[m].x;
    int64_t whole = cols / Source::width * Source::width;
    for (int64_t k = 0; k < whole; k += Source::width) {
        typename Source::Vector in[M];
        UNROLL for (int m = 0; m < M; m++) in[m] = keep(Source::input(x[m], k));
        UNROLL for (int r = 0; r < 4 * Q; r++) {
            auto a = source.get(rows[r], k);
            UNROLL for (int m = 0; m < M; m++) sum[r][m] = Source::multiply(a, in[m], sum[r][m]);
        }
    }
    if (whole < cols)
        UNROLL for (int r = 0; r < 4 * Q; r++) {
            auto a = source.last(rows[r], whole);
            UNROLL for (int m = 0; m < M; m++)
                sum[r][m] = Source::multiply(a, Source::input(x[m], whole), sum[r][m]);
        }
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int q = 0; q < Q; q++)
            store(sums + m * 64 + q * 16,
                  fold_four(sum[4 * q][m], sum[4 * q + 1][m], sum[4 * q + 2][m], sum[4 * q + 3][m]));
}

// One row and one token: where memory is the limit, it is read fastest in one stream.
template <class Source>
inline void dot_alone(const Source& source, int64_t number, int64_t cols, const Token& token, float* sums) {
    f32x16 sum = splat(0);
    auto row = source.row(number);
    int64_t whole = cols / Source::width * Source::width;
    for (int64_t k = 0; k < whole; k += Source::width)
        sum = Source::multiply(source.get(row, k), Source::input(token.x, k), sum);
    if (whole < cols) sum = Source::multiply(source.last(row, whole), Source::input(token.x, whole), sum);
    store(sums, sum);
}

// 16 rows by up to four tokens; `offset` is the first row's number in the source.
template <class Source>
inline void float_tile(const Source& source, const Matrix& w, int64_t offset, int64_t row, int64_t num,
                       const Token* tokens, int64_t m) {
    if (Source::width == 32 && m == 1) {
        float lanes[16 * 16];
        for (int64_t i = 0; i < 16; i++)
            dot_alone(source, offset + (i < num ? i : num - 1), w.cols, tokens[0], lanes + 16 * i);
        store_partial(tokens[0].out + row, mul(reduce_rows(lanes), splat(tokens[0].scale * w.scale)), num);
        return;
    }
    float sums[4 * 64];  // [tokens][4][16]
    int64_t rows[16];    // quad by quad
    for (int64_t i = 0; i < 16; i++) {
        int64_t r = i / 4 + i % 4 * 4;
        rows[i] = offset + (r < num ? r : num - 1);
    }
    int64_t quads = m <= 2 ? 2 : 1;  // as many as registers hold
    for (int64_t q = 0; q < 4; q += quads) {
        const int64_t* numbers = rows + 4 * q;
        switch (m) {
            case 1: dot_float<2, 1>(source, numbers, w.cols, tokens, sums + 16 * q); break;
            case 2: dot_float<2, 2>(source, numbers, w.cols, tokens, sums + 16 * q); break;
            case 3: dot_float<1, 3>(source, numbers, w.cols, tokens, sums + 16 * q); break;
            default: dot_float<1, 4>(source, numbers, w.cols, tokens, sums + 16 * q); break;
        }
    }
    for (int64_t t = 0; t < m; t++)
        store_partial(tokens[t].out + row, mul(finish_folds(sums + t * 64), splat(tokens[t].scale * w.scale)), num);
}

template <Format F, bool Half>
inline void float_matmul(const Matrix& w, int64_t begin, int64_t end, const Token* tokens, int64_t num_tokens,
                         uint8_t* scratch) {
    int64_t stride = ceil_div(w.cols, 32) * 32;
    for (int64_t row = begin; row < end; row += kPanelRows) {
        int64_t num = end - row < kPanelRows ? end - row : kPanelRows;
        bool direct = num_tokens <= kDirectFloat || (!Half && F == Format::f32);
        if (!direct)
            for (int64_t r = 0; r < num; r++)
                for (int64_t k = 0; k < stride; k += 32) {
                    auto from = Stored<F>{w}.row(row + r);
                    f32x16 low = decode<F>(from.data, from.scales, k, w.cols);
                    f32x16 high = decode<F>(from.data, from.scales, k + 16, w.cols);
                    if constexpr (Half) {
                        store_bf16((uint16_t*)scratch + r * stride + k, low, high);
                    } else {
                        store((float*)scratch + r * stride + k, low);
                        store((float*)scratch + r * stride + k + 16, high);
                    }
                }
        for (int64_t t = 0, m; t < num_tokens; t += m) {
            m = num_tokens - t;
            if (m > 4) m = m < 8 ? (m + 1) / 2 : 4;  // 3 and 2 rather than 4 and 1
            if constexpr (Half) {
                if (direct) float_tile(Bf16Direct<F>{{w}}, w, row, row, num, tokens + t, m);
                else float_tile(Bf16Panel{(const uint16_t*)scratch, stride}, w, 0, row, num, tokens + t, m);
            } else {
                if (direct) float_tile(F32Direct<F>{{w}}, w, row, row, num, tokens + t, m);
                else float_tile(F32Panel{(const float*)scratch, stride}, w, 0, row, num, tokens + t, m);
            }
        }
    }
}

// ---- the entry ----

constexpr int64_t kSumBytes = kPanelRows * 16 * 4 * kTokenGroup;  // lanes of 16 rows for a group of tokens

inline int64_t matmul_scratch(const Matrix& w, Precision precision, int64_t num_rows, int64_t num_tokens) {
    int64_t panel;
    if (w.format == Format::nvfp4_transposed)
        panel = num_tokens <= kDirectTokens ? 2 * 6 * num_rows * 4 : kGroup * w.cols + kGroup * (w.cols / kBlock) * 4;
    else if (precision == Precision::int8)
        panel = kPanelRows * steps_of(w.cols) * (kStep + 64);
    else
        panel = kPanelRows * ceil_div(w.cols, 32) * 32 * 4;
    return kSumBytes + panel;
}

inline void matmul_int8(const Matrix& w, int64_t begin, int64_t end, const Token* tokens, int64_t num_tokens,
                        float* sums, uint8_t* scratch) {
    if (w.format == Format::nvfp4_transposed) {
        if (num_tokens > kDirectTokens) return int8_columns(w, begin, end, tokens, num_tokens, scratch);
        int64_t t = 0;
        for (; t + kAbreastSparse <= num_tokens; t += kAbreastSparse)
            int8_sparse<kAbreastSparse>(w, begin, end, tokens + t, scratch);
        if (t < num_tokens) int8_sparse<1>(w, begin, end, tokens + t, scratch);
        return;
    }
    if (num_tokens > kDirectInt8) return int8_panels(w, begin, end, tokens, num_tokens, sums, scratch);
    // A few rows at a time, so that further passes find them in a cache.
    int64_t size = num_tokens > 4 ? kPanelRows : end - begin;
    for (int64_t row = begin; row < end; row += size) {
        int64_t stop = row + size < end ? row + size : end;
        for (int64_t t = 0; t < num_tokens; t += 4) switch (num_tokens - t) {
                case 1: int8_direct<1>(w, row, stop, tokens + t, sums); break;
                case 2: int8_direct<2>(w, row, stop, tokens + t, sums); break;
                case 3: int8_direct<3>(w, row, stop, tokens + t, sums); break;
                default: int8_direct<4>(w, row, stop, tokens + t, sums); break;
            }
    }
}

inline void matmul(const Matrix& w, Precision precision, int64_t begin, int64_t end, const Token* tokens,
                   int64_t num_tokens, uint8_t* scratch) {
    float* sums = (float*)scratch;
    scratch += kSumBytes;
    if (precision == Precision::int8) return matmul_int8(w, begin, end, tokens, num_tokens, sums, scratch);
    bool half = precision == Precision::bf16;
    switch (w.format) {
        case Format::f32: return float_matmul<Format::f32, false>(w, begin, end, tokens, num_tokens, scratch);
        case Format::f16: return float_matmul<Format::f16, false>(w, begin, end, tokens, num_tokens, scratch);
        case Format::bf16:
            return half ? float_matmul<Format::bf16, true>(w, begin, end, tokens, num_tokens, scratch)
                        : float_matmul<Format::bf16, false>(w, begin, end, tokens, num_tokens, scratch);
        case Format::fp8:
            return half ? float_matmul<Format::fp8, true>(w, begin, end, tokens, num_tokens, scratch)
                        : float_matmul<Format::fp8, false>(w, begin, end, tokens, num_tokens, scratch);
        case Format::nvfp4:
            return half ? float_matmul<Format::nvfp4, true>(w, begin, end, tokens, num_tokens, scratch)
                        : float_matmul<Format::nvfp4, false>(w, begin, end, tokens, num_tokens, scratch);
        case Format::nvfp4_transposed: return;  // int8 only; refused where a matrix is bound
    }
}
