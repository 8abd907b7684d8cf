// Matrix products. Included inside the namespace of an instruction set, after its vectors.
//
// A result has one order of summation, whatever it is computed beside. float inputs: lane l sums
// columns l, l + 16, ... in order; then the lanes fold in halves. int8 inputs: the products of a
// block of 16 are summed as integers, exactly; lane j sums blocks j, j + 16, ... in order, each
// scaled; then the lanes fold in halves. The transposed layout walks the same sums with rows in
// its lanes, so skipping a column whose input is zero changes no bit.

constexpr int64_t kInputStep = kStep + 16 * 4 + 16 * 4;  // bytes of a step of a packed int8 row
constexpr int64_t kPanelRows = 16;
constexpr int kAbreast = 2;  // tokens whose products are computed side by side
constexpr int64_t kDirectInt8 = 16;   // the same for int8, where unpacking costs less
constexpr int64_t kDirectTokens = 4;  // up to so many tokens weights are unpacked where they are used
constexpr int64_t kDirectFloat = 8;   // the same for inputs that are not rounded to int8

inline int64_t steps_of(int64_t cols) { return ceil_div(cols, kStep); }

inline int64_t packed_bytes(Precision precision, int64_t cols) {
    if (precision == Precision::int8) return steps_of(cols) * kInputStep;
    return precision == Precision::bf16 ? ceil_div(cols, 32) * 64 : ceil_div(cols, 16) * 64;
}

inline void prefetch(const uint8_t* p) { __builtin_prefetch(p); }
inline void prefetch_far(const uint8_t* p) { __builtin_prefetch(p, 0, 2); }  // to the second cache

// ---- inputs ----

// Powers of two below this are taken for zero, and blocks this far below the largest share a scale.
constexpr int kSmallest = -100, kSpan = 100;

inline int binary_exponent(float x) {
    int32_t b;
    memcpy(&b, &x, 4);
    return (b >> 23 & 255) - 127;
}
inline float power_of_two(int e) {
    int32_t b = (e + 127) << 23;
    float x;
    memcpy(&x, &b, 4);
    return x;
}

// What a block's correction and exponent are, in a packed int8 row.
INLINE int32_t* correction_of(const void* x, int64_t block) {
    return (int32_t*)((uint8_t*)x + block / 16 * kInputStep + kStep) + block % 16;
}
INLINE int32_t* exponent_of(const void* x, int64_t block) { return correction_of(x, block) + 16; }

// Quantise one row to int8 with a power-of-two scale for every block of 16.
inline void pack_int8(const float* x, int64_t cols, uint8_t* buffer, Token& token) {
    int64_t blocks = ceil_div(cols, kBlock);
    f32x16 poison = splat(0);
    int low = INT32_MAX, high = kSmallest;
    for (int64_t b = 0; b < blocks; b++) {
        f32x16 v = load_partial(x + b * kBlock, cols - b * kBlock);
        poison = fma(v, splat(0), poison);
        int e = binary_exponent(reduce_max(abs(v)));
        *exponent_of(buffer, b) = e;
        if (e >= kSmallest) low = e < low ? e : low, high = e > high ? e : high;
    }
    if (low == INT32_MAX) low = kSmallest;
    if (low < high - kSpan) low = high - kSpan;
    bool finite = reduce_add(poison) == 0;
    token.x = buffer, token.scale = finite ? power_of_two(low - 6) : NAN;
    for (int64_t b = 0; b < steps_of(cols) * 16; b++) {
        i32x16 q = splat_int(0);
        int sum = 0, e = b < blocks ? *exponent_of(buffer, b) : kSmallest - 1;
        if (finite && e >= kSmallest) {
            if (e < low) e = low;
            f32x16 scaled = mul(load_partial(x + b * kBlock, cols - b * kBlock), splat(power_of_two(6 - e)));
            f32x16 rounded = max(min(round(scaled), splat(127)), splat(-127));
            q = to_int(rounded), sum = (int)reduce_add(rounded);
        } else {
            e = low;
        }
        store_block(q, buffer + b / 16 * kInputStep + b % 16 * 4);
        *correction_of(buffer, b) = -12 * sum, *exponent_of(buffer, b) = (e - low) << 23;
    }
}

inline void pack(Precision precision, const float* x, int64_t cols, uint8_t* buffer, Token& token) {
    if (precision == Precision::int8) return pack_int8(x, cols, buffer, token);
    token.x = buffer, token.scale = 1;
    if (precision == Precision::f32) {
        for (int64_t k = 0; k < cols; k += 16) store((float*)buffer + k, load_partial(x + k, cols - k));
        return;
    }
    for (int64_t k = 0; k < cols; k += 32)
        store_bf16((uint16_t*)buffer + k, load_partial(x + k, cols - k),
                   cols - k > 16 ? load_partial(x + k + 16, cols - k - 16) : splat(0));
}

// ---- NVFP4 times int8, rows as stored ----

// One row of a matrix, and how far a step goes along it.
struct Row {
    const uint8_t *codes, *scales;
};
inline Row row_of(const Matrix& w, int64_t row) {
    return {w.data + row * (w.cols >> 1), w.scales + row * (w.cols >> 4)};
}

// Unpack a step of `left` columns: four vectors of codes; returns the scales of its 16 blocks.
template <bool Whole>
INLINE f32x16 unpack_step(Row row, int64_t left, u8x64 out[4]) {
    if constexpr (Whole) {
        unpack_codes(load_bytes(row.codes), load_bytes(row.codes + 64), out);
        return scales16(row.scales);
    }
    int64_t bytes = left >> 1;
    unpack_codes(load_bytes_partial(row.codes, bytes), load_bytes_partial(row.codes + 64, bytes - 64), out);
    return scales16_partial(row.scales, left >> 4);
}

// Add a step of R rows times T packed tokens, from the `first`, to their sums. Independent products
// lie side by side, since a chain of dependent ones waits for each.
template <int T, int R, int M>
INLINE void add_step(f32x16 (&sum)[R][M], int first, const u8x64 (&w)[R][4], const f32x16 (&scales)[R],
                     const uint8_t* const (&x)[M]) {
    i32x16 blocks[R][T];
    UNROLL for (int t = 0; t < T; t++) {
        i32x16 start = keep(load_int((const int32_t*)(x[first + t] + kStep)));
        UNROLL for (int r = 0; r < R; r++) blocks[r][t] = start;
    }
    UNROLL for (int v = 0; v < 4; v++)
        UNROLL for (int t = 0; t < T; t++) {
            u8x64 q = keep(load_bytes(x[first + t] + 64 * v));
            UNROLL for (int r = 0; r < R; r++) blocks[r][t] = dot(blocks[r][t], w[r][v], q);
        }
    UNROLL for (int t = 0; t < T; t++) {
        i32x16 exponents = keep(load_int((const int32_t*)(x[first + t] + kStep) + 16));
        UNROLL for (int r = 0; r < R; r++) {
            f32x16 value = from_bits(add(bits(to_float(blocks[r][t])), exponents));
            sum[r][first + t] = fma(value, scales[r], sum[r][first + t]);
        }
    }
}
template <int R, int M>
INLINE void add_steps(f32x16 (&sum)[R][M], const u8x64 (&w)[R][4], const f32x16 (&scales)[R],
                      const uint8_t* (&x)[M]) {
    UNROLL for (int m = 0; m + kAbreast <= M; m += kAbreast) add_step<kAbreast>(sum, m, w, scales, x);
    constexpr int rest = M % kAbreast;
    if constexpr (rest > 0) add_step<rest>(sum, M - rest, w, scales, x);
    UNROLL for (int m = 0; m < M; m++) x[m] += kInputStep;
}

template <int R, int M>
INLINE void store_sums(const f32x16 (&sum)[R][M], float* sums, int64_t place, int64_t apart = 1) {
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int m = 0; m < M; m++) store(sums + (m * kPanelRows + place + r * apart) * 16, sum[r][m]);
}
template <int R, int M>
INLINE void clear_sums(f32x16 (&sum)[R][M]) {
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int m = 0; m < M; m++) sum[r][m] = splat(0);
}

template <bool Whole, int R, int M>
INLINE void direct_step(Row (&rows)[R], int64_t left, const uint8_t* (&x)[M], f32x16 (&sum)[R][M]) {
    u8x64 u[R][4];
    f32x16 scales[R];
    UNROLL for (int r = 0; r < R; r++) {
        scales[r] = unpack_step<Whole>(rows[r], left, u[r]);
        rows[r].codes += kStep / 2, rows[r].scales += kStep / kBlock;
    }
    add_steps(sum, u, scales, x);
}

// Sums of M tokens and R rows, `first` and those `apart` from it; weights are unpacked on the way.
// Lanes to sums[m][place + r * apart][16].
template <int R, int M>
inline void dot_direct(const Matrix& w, int64_t first, int64_t apart, const Token* tokens, float* sums,
                       int64_t place) {
    f32x16 sum[R][M];
    clear_sums(sum);
    Row rows[R];
    const uint8_t* x[M];
    UNROLL for (int r = 0; r < R; r++) {
        int64_t number = first + r * apart;
        rows[r] = row_of(w, number < w.rows ? number : w.rows - 1);
    }
    UNROLL for (int m = 0; m < M; m++) x[m] = (const uint8_t*)tokens[m].x;
    int64_t whole = w.cols / kStep, left = w.cols % kStep;
    // With two rows products take longer than reading: read the next tile meanwhile.
    int64_t ahead = kPanelRows * (w.cols >> 1), ahead_scales = kPanelRows * (w.cols >> 4);
    for (int64_t s = 0; s < whole; s++) {
        if constexpr (R > 1)
            UNROLL for (int r = 0; r < R; r++) {
                prefetch_far(rows[r].codes + ahead), prefetch_far(rows[r].codes + ahead + 64);
                if (s % 4 == 0) prefetch_far(rows[r].scales + ahead_scales);
            }
        direct_step<true>(rows, 0, x, sum);
    }
    if (left) direct_step<false>(rows, left, x, sum);
    store_sums(sum, sums, place, apart);
}

// The same for two rows of a panel of unpacked rows, codes [16, steps, 256] and scales
// [16, steps * 16]: adds steps [from, to) to `sums`.
template <int M>
inline void dot_panel(const uint8_t* codes, const float* scales, int64_t steps, int64_t from, int64_t to,
                      const Token* tokens, float* sums, int64_t place) {
    f32x16 sum[2][M];
    const uint8_t* x[M];
    UNROLL for (int m = 0; m < M; m++) {
        x[m] = (const uint8_t*)tokens[m].x + from * kInputStep;
        UNROLL for (int r = 0; r < 2; r++)
            sum[r][m] = from ? load(sums + (m * kPanelRows + place + r) * 16) : splat(0);
    }
    codes += (place * steps + from) * kStep, scales += (place * steps + from) * 16;
    for (int64_t s = from; s < to; s++, codes += kStep, scales += 16) {
        u8x64 u[2][4];
        f32x16 scale[2];
        UNROLL for (int r = 0; r < 2; r++) {
            UNROLL for (int v = 0; v < 4; v++) u[r][v] = keep(load_bytes(codes + r * steps * kStep + 64 * v));
            scale[r] = keep(load(scales + r * steps * 16));
        }
        add_steps(sum, u, scale, x);
    }
    store_sums(sum, sums, place);
}

// Fold the lanes of 16 rows and write the results of M tokens.
inline void finish_rows(const Matrix& w, const Token* tokens, int64_t m, const float* sums, int64_t row,
                        int64_t num) {
    for (int64_t i = 0; i < m; i++) {
        f32x16 total = mul(reduce_rows(sums + i * kPanelRows * 16), splat(tokens[i].scale * w.scale));
        store_partial(tokens[i].out + row, total, num);
    }
}

// One row at a time for one or two tokens, where memory is the limit: it is read fastest in one
// stream. Two rows for more, where inputs are, which both share; they lie half a tile apart, since
// two streams in one page of memory keep the processor from reading ahead.
template <int M>
inline void int8_direct(const Matrix& w, int64_t begin, int64_t end, const Token* tokens, float* sums) {
    constexpr int64_t half = kPanelRows / 2;
    for (int64_t row = begin; row < end; row += kPanelRows) {
        int64_t num = end - row < kPanelRows ? end - row : kPanelRows;
        if constexpr (M <= 2) {
            for (int64_t i = 0; i < num; i++) dot_direct<1, M>(w, row + i, 0, tokens, sums, i);
        } else {
            for (int64_t i = 0; i < half; i++) dot_direct<2, M>(w, row + i, half, tokens, sums, i);
        }
        finish_rows(w, tokens, M, sums, row, num);
    }
}

constexpr int kTile = 4;         // tokens whose sums are in registers together
constexpr int64_t kTokenGroup = 8;  // tokens that share a pass over the panel
constexpr int64_t kPanelSteps = 16;   // steps of the panel that stay in the nearest cache meanwhile

template <int M>
inline void int8_tile(const uint8_t* codes, const float* scales, int64_t steps, int64_t from, int64_t to,
                      const Token* tokens, float* sums) {
    for (int64_t i = 0; i < kPanelRows; i += 2) dot_panel<M>(codes, scales, steps, from, to, tokens, sums, i);
}

inline void int8_group(const Matrix& w, const uint8_t* codes, const float* scales, const Token* tokens, int64_t num,
                       float* sums) {
    int64_t steps = steps_of(w.cols);
    for (int64_t from = 0; from < steps; from += kPanelSteps) {
        int64_t to = from + kPanelSteps < steps ? from + kPanelSteps : steps;
        for (int64_t t = 0; t < num; t += kTile) {
            float* at = sums + t * kPanelRows * 16;
            switch (num - t < kTile ? num - t : kTile) {
                case 1: int8_tile<1>(codes, scales, steps, from, to, tokens + t, at); break;
                case 2: int8_tile<2>(codes, scales, steps, from, to, tokens + t, at); break;
                case 3: int8_tile<3>(codes, scales, steps, from, to, tokens + t, at); break;
                default: int8_tile<kTile>(codes, scales, steps, from, to, tokens + t, at); break;
            }
        }
    }
}

inline void int8_panels(const Matrix& w, int64_t begin, int64_t end, const Token* tokens, int64_t num_tokens,
                        float* sums, uint8_t* scratch) {
    int64_t steps = steps_of(w.cols);
    uint8_t* codes = scratch;
    float* scales = (float*)(scratch + kPanelRows * steps * kStep);
    for (int64_t row = begin; row < end; row += kPanelRows) {
        int64_t num = end - row < kPanelRows ? end - row : kPanelRows;
        for (int64_t r = 0; r < kPanelRows; r++)
            for (int64_t s = 0; s < steps; s++) {
                u8x64 u[4];
                Row from = row_of(w, row + (r < num ? r : num - 1));
                from.codes += s * (kStep / 2), from.scales += s * 16;
                int64_t left = w.cols - s * kStep;
                f32x16 scale = left >= kStep ? unpack_step<true>(from, 0, u) : unpack_step<false>(from, left, u);
                for (int v = 0; v < 4; v++) store_bytes(codes + (r * steps + s) * kStep + 64 * v, u[v]);
                store(scales + (r * steps + s) * 16, scale);
            }
        for (int64_t t = 0; t < num_tokens; t += kTokenGroup) {
            int64_t group = num_tokens - t < kTokenGroup ? num_tokens - t : kTokenGroup;
            int8_group(w, codes, scales, tokens + t, group, sums);
            finish_rows(w, tokens + t, group, sums, row, num);
        }
    }
}

// ---- NVFP4 times int8, transposed ----

// Order in which lanes are walked, so that sums fold in halves with a stack of five.
constexpr int kFoldOrder[16] = {0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15};

// Column i of a block lies in byte kColumn of the dwords of its lane: columns by byte.
constexpr int kByteColumn[16] = {0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15};

struct Folder {  // a stack of partial sums [5][size]; the last is the one being summed
    float* stack;
    int64_t size;
    int depth = 0;
    float* top() { return stack + depth * size; }
    void clear() {
        for (int64_t n = 0; n < size; n += 16) store(top() + n, splat(0));
    }
    void push(int position) {  // fold as often as `position` ends in ones
        for (depth++; position & 1; position >>= 1, depth--) {
            float *a = stack + (depth - 2) * size, *b = stack + (depth - 1) * size;
            for (int64_t n = 0; n < size; n += 16) store(a + n, add(load(a + n), load(b + n)));
        }
    }
};

// The columns of one block that are not zero in all of M tokens, up to a multiple of four, and the
// tokens' values in them.
template <int M>
struct Columns {
    const uint8_t* rows[16];
    uint8_t quads[M][16];
    int used;

    void find(const Matrix& w, const uint8_t* base, int64_t block, const Token* tokens) {
        memset(quads, 0, sizeof quads);
        used = 0;
        int64_t at = block / 16 * kInputStep + block % 16 * 4;
        for (int i = 0; i < 16; i++) {
            uint8_t any = 0, q[M];
            for (int m = 0; m < M; m++) any |= q[m] = ((const uint8_t*)tokens[m].x)[at + i / 4 * 64 + i % 4];
            if (!any) continue;
            rows[used] = base + (block * kBlock + kByteColumn[i]) * (w.rows / 2);
            for (int m = 0; m < M; m++) quads[m][used] = q[m];
            used++;
        }
        for (; used % 4; used++) rows[used] = rows[0];  // beside inputs of zero
    }
};

// Add one block to the sums of rows [begin, begin + size), reading the next block's columns ahead:
// which are wanted is known here and nowhere in the processor.
template <int M>
INLINE void add_columns(const Matrix& w, int64_t begin, int64_t size, int64_t block, const Columns<M>& columns,
                        const Columns<M>& next, int64_t next_block, const Token* tokens, Folder (&folders)[M]) {
    const uint8_t* scales = w.scales + block * w.rows + begin;
    const uint8_t* next_scales = w.scales + next_block * w.rows + begin;
    for (int64_t g = 0; g < size; g += kGroup) {
        for (int i = 0; i < next.used; i++) prefetch_far(next.rows[i] + g / 2);
        prefetch_far(next_scales + g), prefetch_far(next_scales + g + 64);
        if (!columns.used) continue;
        i32x16 sum[M][8];
        UNROLL for (int m = 0; m < M; m++)
            UNROLL for (int i = 0; i < 8; i++) sum[m][i] = splat_int(*correction_of(tokens[m].x, block));
        for (int i = 0; i < columns.used; i += 4) {
            const uint8_t* four[4];
            for (int r = 0; r < 4; r++) four[r] = columns.rows[i + r] + g / 2;
            u8x64 u[8];
            unpack_quads(four, u);
            UNROLL for (int m = 0; m < M; m++) {
                u8x64 q = splat_quad(columns.quads[m] + i);
                UNROLL for (int n = 0; n < 8; n++) sum[m][n] = dot(sum[m][n], u[n], q);
            }
        }
        UNROLL for (int n = 0; n < 8; n++) {
            f32x16 scale = scales16(scales + g + 16 * n);
            UNROLL for (int m = 0; m < M; m++) {
                float* at = folders[m].top() + g + 16 * n;
                i32x16 e = splat_int(*exponent_of(tokens[m].x, block));
                store(at, fma(from_bits(add(bits(to_float(sum[m][n])), e)), scale, load(at)));
            }
        }
    }
}

// M tokens; columns that are zero in all of them are skipped. Rows [begin, end) in groups of 128.
template <int M>
inline void int8_sparse(const Matrix& w, int64_t begin, int64_t end, const Token* tokens, uint8_t* scratch) {
    int64_t size = end - begin, blocks = w.cols / kBlock;
    const uint8_t* base = w.data + begin / 2;
    Folder folders[M];
    for (int m = 0; m < M; m++) folders[m] = {(float*)scratch + m * 6 * size, size};
    Columns<M> columns[2];  // of this block and of the next
    columns[0].find(w, base, 0, tokens);
    int now = 0;
    for (int position = 0; position < 16; position++) {
        for (int m = 0; m < M; m++) folders[m].clear();
        for (int64_t block = kFoldOrder[position]; block < blocks; block += 16) {
            int64_t next = block + 16;
            for (int p = position + 1; next >= blocks && p < 16; p++) next = kFoldOrder[p];
            if (next >= blocks) next = block;
            columns[!now].find(w, base, next, tokens);
            add_columns<M>(w, begin, size, block, columns[now], columns[!now], next, tokens, folders);
            now = !now;
        }
        for (int m = 0; m < M; m++) folders[m].push(position);
    }
    for (int m = 0; m < M; m++)
        for (int64_t n = 0; n < size; n += 16)
            store(tokens[m].out + begin + n, mul(load(folders[m].stack + n), splat(tokens[m].scale * w.scale)));
}

constexpr int64_t kAbreastSparse = 2;  // tokens that share a pass over columns

inline int64_t skipped_columns(const Matrix& w, const Token* tokens, int64_t num_tokens) {
    if (w.format != Format::nvfp4_transposed || num_tokens > kDirectTokens) return 0;
    int64_t skipped = 0;
    for (int64_t t = 0; t < num_tokens; t += kAbreastSparse)
        for (int64_t block = 0; block < w.cols / kBlock; block++)
            for (int i = 0; i < 16; i++) {
                int64_t at = block / 16 * kInputStep + block % 16 * 4 + i / 4 * 64 + i % 4;
                uint8_t any = ((const uint8_t*)tokens[t].x)[at];
                if (t + 1 < num_tokens) any |= ((const uint8_t*)tokens[t + 1].x)[at];
                skipped += !any;
            }
    return skipped;
}

// 16 rows in the lanes, M tokens, from a panel: codes [blocks, 4, 64], scales [blocks, 16], blocks in
// the order of walking.
template <int M>
inline void dot_columns(const uint8_t* codes, const float* scales, int64_t blocks, const Token* tokens,
                        float scale, int64_t row) {
    f32x16 stack[5][M];
    int depth = 0;
    int64_t at = 0;
    for (int position = 0; position < 16; position++) {
        int lane = kFoldOrder[position];
        f32x16 sum[M];
        UNROLL for (int m = 0; m < M; m++) sum[m] = splat(0);
        for (int64_t b = lane; b < blocks; b += 16, at++) {
            u8x64 u[4];
            UNROLL for (int v = 0; v < 4; v++) u[v] = load_bytes(codes + at * kStep + 64 * v);
            f32x16 s = load(scales + at * 16);
            UNROLL for (int m = 0; m < M; m++) {
                const uint8_t* q = (const uint8_t*)tokens[m].x + b / 16 * kInputStep + lane * 4;
                i32x16 i = splat_int(*correction_of(tokens[m].x, b));
                UNROLL for (int v = 0; v < 4; v++) i = dot(i, u[v], splat_quad(q + 64 * v));
                sum[m] = fma(from_bits(add(bits(to_float(i)), splat_int(*exponent_of(tokens[m].x, b)))), s, sum[m]);
            }
        }
        for (int m = 0; m < M; m++) stack[depth][m] = sum[m];
        depth++;
        for (int p = position; p & 1; p >>= 1, depth--)
            for (int m = 0; m < M; m++) stack[depth - 2][m] = add(stack[depth - 2][m], stack[depth - 1][m]);
    }
    for (int m = 0; m < M; m++)
        store(tokens[m].out + row, mul(stack[0][m], splat(tokens[m].scale * scale)));
}

inline void int8_columns(const Matrix& w, int64_t begin, int64_t end, const Token* tokens, int64_t num_tokens,
                         uint8_t* scratch) {
    int64_t stride = w.rows / 2, blocks = w.cols / kBlock;
    // Panels of one group of 128 rows: codes [8, blocks, 4, 64], scales [8, blocks, 16].
    uint8_t* codes = scratch;
    float* scales = (float*)(scratch + kGroup * w.cols);
    for (int64_t g = begin; g < end; g += kGroup) {
        int64_t at = 0;
        for (int position = 0; position < 16; position++)
            for (int64_t b = kFoldOrder[position]; b < blocks; b += 16, at++) {
                const uint8_t* base = w.data + b * kBlock * stride + g / 2;
                for (int v = 0; v < 4; v++) {
                    const uint8_t* four[4];
                    for (int r = 0; r < 4; r++) four[r] = base + kByteColumn[4 * v + r] * stride;
                    u8x64 u[8];
                    unpack_quads(four, u);
                    for (int n = 0; n < 8; n++) store_bytes(codes + ((n * blocks + at) * 4 + v) * 64, u[n]);
                }
                for (int n = 0; n < 8; n++)
                    store(scales + (n * blocks + at) * 16, scales16(w.scales + b * w.rows + g + 16 * n));
            }
        for (int64_t t = 0; t < num_tokens;) {
            int64_t left = num_tokens - t, m = left >= 8 ? 8 : left >= 4 ? 4 : 1;
            for (int n = 0; n < 8; n++) {
                const uint8_t* c = codes + n * blocks * kStep;
                const float* s = scales + n * blocks * 16;
                if (m == 8) dot_columns<8>(c, s, blocks, tokens + t, w.scale, g + 16 * n);
                else if (m == 4) dot_columns<4>(c, s, blocks, tokens + t, w.scale, g + 16 * n);
                else dot_columns<1>(c, s, blocks, tokens + t, w.scale, g + 16 * n);
            }
            t += m;
        }
    }
}
