// Vectors of 16 floats as two AVX registers, with FMA and F16C. Included inside `namespace avx2`.

struct f32x16 { __m256 a, b; };
struct i32x16 { __m256i a, b; };
struct u8x64 { __m256i a, b; };
struct bf16x32 { f32x16 even, odd; };  // widened: lane i has columns 2 i and 2 i + 1

inline f32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, f32x16 x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
inline f32x16 load_partial(const float* p, int64_t n) {
    if (n >= 16) return load(p);
    float t[16] = {};
    for (int64_t i = 0; i < n; i++) t[i] = p[i];
    return load(t);
}
inline void store_partial(float* p, f32x16 x, int64_t n) {
    if (n >= 16) return store(p, x);
    float t[16];
    store(t, x);
    for (int64_t i = 0; i < n; i++) p[i] = t[i];
}
inline f32x16 splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline f32x16 add(f32x16 x, f32x16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline f32x16 sub(f32x16 x, f32x16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline f32x16 mul(f32x16 x, f32x16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline f32x16 div(f32x16 x, f32x16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline f32x16 fma(f32x16 x, f32x16 y, f32x16 z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline f32x16 max(f32x16 x, f32x16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline f32x16 min(f32x16 x, f32x16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline f32x16 abs(f32x16 x) {
    const __m256 sign = _mm256_set1_ps(-0.f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline f32x16 round(f32x16 x) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
inline f32x16 where_less(f32x16 p, f32x16 q, f32x16 x, f32x16 y) {
    return {_mm256_blendv_ps(y.a, x.a, _mm256_cmp_ps(p.a, q.a, _CMP_LT_OQ)),
            _mm256_blendv_ps(y.b, x.b, _mm256_cmp_ps(p.b, q.b, _CMP_LT_OQ))};
}
inline i32x16 to_int(f32x16 x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline f32x16 to_float(i32x16 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline i32x16 load_int(const int32_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8))};
}
inline i32x16 splat_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline i32x16 add(i32x16 x, i32x16 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline i32x16 shift_left(i32x16 x, int n) { return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)}; }
inline i32x16 shift_right(i32x16 x, int n) { return {_mm256_srai_epi32(x.a, n), _mm256_srai_epi32(x.b, n)}; }
inline i32x16 bits(f32x16 x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
inline f32x16 from_bits(i32x16 x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
inline float reduce_add(f32x16 v) {
    __m256 x = _mm256_add_ps(v.a, v.b);
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
inline float reduce_max(f32x16 v) {
    float t[16], m;
    store(t, v);
    m = t[0];
    for (int i = 1; i < 16; i++) m = t[i] > m ? t[i] : m;
    return m;
}
// Sums of four, and of four such results [4][16] the sum r of result i in lane i + 4 r.
inline f32x16 fold_four(f32x16 p, f32x16 q, f32x16 r, f32x16 s) {
    return {_mm256_setr_ps(reduce_add(p), reduce_add(q), reduce_add(r), reduce_add(s), 0, 0, 0, 0), _mm256_setzero_ps()};
}
inline f32x16 finish_folds(const float* folded) {
    float t[16];
    for (int i = 0; i < 16; i++) t[i] = folded[i % 4 * 16 + i / 4];
    return load(t);
}
// to[0..3]: reduce_add of each.
inline void store_sums(float* to, f32x16 p, f32x16 q, f32x16 r, f32x16 s) {
    to[0] = reduce_add(p), to[1] = reduce_add(q), to[2] = reduce_add(r), to[3] = reduce_add(s);
}
// to[j][i] = from[i][j] of 16 rows, which lie `stride` and `to_stride` apart.
inline void transpose(const float* from, int64_t stride, float* to, int64_t to_stride) {
    for (int j = 0; j < 16; j++)
        for (int i = 0; i < 16; i++) to[j * to_stride + i] = from[i * stride + j];
}
inline f32x16 reduce_rows(const float* rows) {
    float t[16];
    for (int i = 0; i < 16; i++) t[i] = reduce_add(load(rows + 16 * i));
    return load(t);
}

inline u8x64 load_bytes(const uint8_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
inline u8x64 load_bytes_partial(const uint8_t* p, int64_t n) {
    if (n >= 64) return load_bytes(p);
    uint8_t t[64] = {};
    for (int64_t i = 0; i < n; i++) t[i] = p[i];
    return load_bytes(t);
}
inline void store_bytes(uint8_t* p, u8x64 x) {
    _mm256_storeu_si256((__m256i*)p, x.a), _mm256_storeu_si256((__m256i*)(p + 32), x.b);
}
inline __m256i decode_low(__m256i x) {
    const __m256i table = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    return _mm256_shuffle_epi8(table, _mm256_and_si256(x, _mm256_set1_epi8(15)));
}
// Even and odd dwords of 16 in x and y.
inline void part_dwords(__m256i x, __m256i y, __m256i& even, __m256i& odd) {
    __m256 p = _mm256_castsi256_ps(x), q = _mm256_castsi256_ps(y);
    even = _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(p, q, 0x88)), 0xD8);
    odd = _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(p, q, 0xDD)), 0xD8);
}
inline void unpack_codes(u8x64 w0, u8x64 w1, u8x64 out[4]) {
    __m256i e0, o0, e1, o1;
    part_dwords(w0.a, w0.b, e0, o0), part_dwords(w1.a, w1.b, e1, o1);
    out[0] = {decode_low(e0), decode_low(e1)};
    out[1] = {decode_low(_mm256_srli_epi16(e0, 4)), decode_low(_mm256_srli_epi16(e1, 4))};
    out[2] = {decode_low(o0), decode_low(o1)};
    out[3] = {decode_low(_mm256_srli_epi16(o0, 4)), decode_low(_mm256_srli_epi16(o1, 4))};
}
inline void store_block(i32x16 q, uint8_t* at) {
    int32_t n[16];
    memcpy(n, &q, sizeof n);
    for (int i = 0; i < 4; i++) {
        at[i] = (uint8_t)n[2 * i], at[64 + i] = (uint8_t)n[2 * i + 1];
        at[128 + i] = (uint8_t)n[8 + 2 * i], at[192 + i] = (uint8_t)n[9 + 2 * i];
    }
}
// Products are at most 24 x 127: pairs stay far below saturation.
inline i32x16 dot(i32x16 acc, u8x64 w, u8x64 x) {
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(_mm256_maddubs_epi16(w.a, x.a), ones)),
            _mm256_add_epi32(acc.b, _mm256_madd_epi16(_mm256_maddubs_epi16(w.b, x.b), ones))};
}
inline u8x64 splat_quad(const uint8_t* p) {
    int32_t x;
    memcpy(&x, p, 4);
    return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)};
}
inline f32x16 halves(__m256i x) {
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))};
}
inline f32x16 scales16(const uint8_t* p) {
    return halves(_mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)), 7));
}
inline f32x16 scales16_partial(const uint8_t* p, int64_t n) {
    uint8_t t[16] = {};
    for (int64_t i = 0; i < n && i < 16; i++) t[i] = p[i];
    return scales16(t);
}
inline f32x16 from_fp8(const uint8_t* p) {
    __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
    __m256i sign = _mm256_slli_epi16(_mm256_srli_epi16(x, 7), 15);
    __m256i rest = _mm256_slli_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0x7F)), 7);
    return mul(halves(_mm256_or_si256(sign, rest)), splat(256.0f));
}
inline f32x16 from_bf16(const uint16_t* p) {
    __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    __m256i y = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(p + 8)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(y, 16))};
}
inline f32x16 from_f16(const uint16_t* p) { return halves(_mm256_loadu_si256((const __m256i*)p)); }
inline f32x16 from_codes(const uint8_t* p) {
    const __m128i table = _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
    __m128i x = _mm_loadl_epi64((const __m128i*)p);
    __m128i low = _mm_and_si128(x, _mm_set1_epi8(15));
    __m128i high = _mm_and_si128(_mm_srli_epi16(x, 4), _mm_set1_epi8(15));
    __m128i doubled = _mm_shuffle_epi8(table, _mm_unpacklo_epi8(low, high));
    f32x16 y = {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(doubled)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(doubled, 8)))};
    return mul(y, splat(0.5f));
}

inline bf16x32 load_bf16(const uint16_t* p) {
    __m256i x = _mm256_loadu_si256((const __m256i*)p), y = _mm256_loadu_si256((const __m256i*)(p + 16));
    const __m256i high = _mm256_set1_epi32((int)0xFFFF0000);
    return {{_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(y, 16))},
            {_mm256_castsi256_ps(_mm256_and_si256(x, high)), _mm256_castsi256_ps(_mm256_and_si256(y, high))}};
}
inline void store_bf16(uint16_t* p, f32x16 low, f32x16 high) {
    float t[32];
    store(t, low), store(t + 16, high);
    for (int i = 0; i < 32; i++) p[i] = round_bf16(t[i]);
}
inline f32x16 dot_bf16(f32x16 acc, bf16x32 x, bf16x32 y) { return fma(x.odd, y.odd, fma(x.even, y.even, acc)); }

inline void unpack_quads(const uint8_t* const rows[4], u8x64 out[8]) {
    uint8_t t[8][64];
    for (int m = 0; m < 4; m++)
        for (int i = 0; i < 16; i++)
            for (int r = 0; r < 4; r++) {
                uint8_t byte = rows[r][16 * (i / 4) + 4 * m + (i & 3)];
                t[m][4 * i + r] = byte & 15, t[4 + m][4 * i + r] = byte >> 4;
            }
    for (int m = 0; m < 8; m++) {
        u8x64 x = load_bytes(t[m]);
        out[m] = {decode_low(x.a), decode_low(x.b)};
    }
}

template <class V>
inline V keep(const V& x) { return x; }
