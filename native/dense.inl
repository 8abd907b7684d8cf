// Products of small matrices in memory that is padded with zeros to 16 columns, for training. Included
// after math.inl. Sums go over k one after the other, so they have one order.

constexpr int kAbove = APRIUM_LEVEL == 2 ? 8 : 4;   // rows of a tile of results; divides 16
constexpr int kBeside = APRIUM_LEVEL == 2 ? 2 : 1;  // and its vectors

// Which part of a product of square matrices is needed: all; the sums up to the row's own column; those
// from it on; the results up to it.
enum class Part { all, until_row, from_row, lower };

// out[r][16 V] = sum over k of a(r, k) b[k][16 V], added to what is there if `more`.
template <int R, int V>
INLINE void tile(const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row, int64_t depth, float* out,
                 int64_t out_row, bool more) {
    f32x16 sum[R][V];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) sum[r][v] = more ? load(out + r * out_row + 16 * v) : splat(0);
    for (int64_t k = 0; k < depth; k++) {
        f32x16 right[V];
        UNROLL for (int v = 0; v < V; v++) right[v] = load(b + k * b_row + 16 * v);
        UNROLL for (int r = 0; r < R; r++) {
            f32x16 left = splat(a[r * a_row + k * a_col]);
            UNROLL for (int v = 0; v < V; v++) sum[r][v] = fma(left, right[v], sum[r][v]);
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) store(out + r * out_row + 16 * v, sum[r][v]);
}

template <int R>
inline void tile_row(const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row, int64_t depth,
                     float* out, int64_t out_row, int64_t cols, bool more) {
    int64_t j = 0;
    for (; j + 16 * kBeside <= cols; j += 16 * kBeside)
        tile<R, kBeside>(a, a_row, a_col, b + j, b_row, depth, out + j, out_row, more);
    for (; j < cols; j += 16) tile<R, 1>(a, a_row, a_col, b + j, b_row, depth, out + j, out_row, more);
}

// out [rows, cols] = a b, or += if `more`; element (i, k) of a lies at i * a_row + k * a_col.
inline void product(const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row, float* out,
                    int64_t out_row, int64_t rows, int64_t cols, int64_t depth, bool more, Part part = Part::all) {
    for (int64_t i = 0; i < rows;) {
        int64_t count = rows - i >= kAbove ? kAbove : rows - i >= 4 ? 4 : 1;
        int64_t from = part == Part::from_row ? i : 0, until = part == Part::until_row ? i + count : depth;
        int64_t width = part == Part::lower ? up16(i + count) : cols;
        const float *left = a + i * a_row + from * a_col, *right = b + from * b_row;
        float* to = out + i * out_row;
        if (count == kAbove) tile_row<kAbove>(left, a_row, a_col, right, b_row, until - from, to, out_row, width, more);
        else if (count == 4) tile_row<4>(left, a_row, a_col, right, b_row, until - from, to, out_row, width, more);
        else tile_row<1>(left, a_row, a_col, right, b_row, until - from, to, out_row, width, more);
        i += count;
    }
}

inline f32x16 read(const void* x, bool half, int64_t i, int64_t left) {
    if (!half) return load_partial((const float*)x + i, left);
    if (left >= 16) return from_bf16((const uint16_t*)x + i);
    uint16_t padded[16] = {};
    memcpy(padded, (const uint16_t*)x + i, left * 2);
    return from_bf16(padded);
}
inline void write(void* x, bool half, int64_t i, f32x16 v, int64_t left) {
    if (!half) return store_partial((float*)x + i, v, left);
    uint16_t two[32];
    store_bf16(two, v, v);
    memcpy((uint16_t*)x + i, two, (left < 16 ? left : 16) * 2);
}
inline const void* row_of(const void* x, bool half, int64_t at) {
    return half ? (const void*)((const uint16_t*)x + at) : (const void*)((const float*)x + at);
}
inline void* row_of(void* x, bool half, int64_t at) {
    return half ? (void*)((uint16_t*)x + at) : (void*)((float*)x + at);
}

// Copy rows of `size` values, `row` apart, to rows of `padded` ones and zero what is left of 16 rows.
inline void gather(const void* from, bool half, int64_t row, int64_t count, int64_t size, float* to, int64_t padded) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t k = 0; k < padded; k += 16)
            store(to + i * padded + k, read(row_of(from, half, i * row), half, k, size - k));
    memset(to + count * padded, 0, (up16(count) - count) * padded * 4);
}
inline void scatter(const float* from, int64_t padded, int64_t count, int64_t size, void* to, bool half, int64_t row) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t k = 0; k < size; k += 16)
            write(row_of(to, half, i * row), half, k, load(from + i * padded + k), size - k);
}
inline void gather(const float* from, int64_t row, int64_t count, int64_t size, float* to, int64_t padded) {
    gather(from, false, row, count, size, to, padded);
}
inline void scatter(const float* from, int64_t padded, int64_t count, int64_t size, float* to, int64_t row) {
    scatter(from, padded, count, size, to, false, row);
}
// to [cols, rows] = from [rows, cols], both multiples of 16.
inline void turn(const float* from, int64_t rows, int64_t cols, float* to) {
    for (int64_t i = 0; i < rows; i += 16)
        for (int64_t j = 0; j < cols; j += 16) transpose(from + i * cols + j, cols, to + j * rows + i, rows);
}

inline f32x16 scaled(const float* row, float by) { return mul(load(row), splat(by)); }

inline float dot_rows(const float* x, const float* y, int64_t size) {
    f32x16 sum = splat(0);
    for (int64_t k = 0; k < size; k += 16) sum = fma(load(x + k), load(y + k), sum);
    return reduce_add(sum);
}

// For each lane of columns j to j + 15: `yes` where the column is not beyond row i, else `no`.
struct Lower {
    f32x16 lanes;
    Lower() {
        float numbers[16];
        for (int l = 0; l < 16; l++) numbers[l] = (float)l;
        lanes = load(numbers);
    }
    INLINE f32x16 pick(int64_t i, int64_t j, f32x16 yes, f32x16 no) const {
        return where_less(lanes, splat((float)(i - j) + 0.5f), yes, no);
    }
};
