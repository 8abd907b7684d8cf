// Vectors of 16 floats on AVX-512 with VNNI, VBMI and BF16. Included inside `namespace avx512`.

struct f32x16 { __m512 v; };
struct i32x16 { __m512i v; };
struct u8x64 { __m512i v; };
struct bf16x32 { __m512i v; };

inline __mmask16 first16(int64_t n) { return n >= 16 ? 0xFFFF : (__mmask16)((1u << n) - 1); }
inline __mmask64 first64(int64_t n) { return n >= 64 ? ~0ull : n <= 0 ? 0 : (1ull << n) - 1; }

inline f32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline f32x16 load_partial(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first16(n), p)}; }
inline void store(float* p, f32x16 a) { _mm512_storeu_ps(p, a.v); }
inline void store_partial(float* p, f32x16 a, int64_t n) { _mm512_mask_storeu_ps(p, first16(n), a.v); }
inline f32x16 splat(float x) { return {_mm512_set1_ps(x)}; }
inline f32x16 add(f32x16 a, f32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline f32x16 sub(f32x16 a, f32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline f32x16 mul(f32x16 a, f32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline f32x16 div(f32x16 a, f32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// The second operand where one is not a number: x86's rule, which keeps NaN of `a` if it is second.
inline f32x16 max(f32x16 a, f32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline f32x16 min(f32x16 a, f32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline f32x16 abs(f32x16 a) { return {_mm512_abs_ps(a.v)}; }
inline f32x16 round(f32x16 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// x where a < b, else y.
inline f32x16 where_less(f32x16 a, f32x16 b, f32x16 x, f32x16 y) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
inline i32x16 to_int(f32x16 a) { return {_mm512_cvtps_epi32(a.v)}; }
inline f32x16 to_float(i32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline i32x16 load_int(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline i32x16 splat_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline i32x16 add(i32x16 a, i32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline i32x16 shift_left(i32x16 a, int n) { return {_mm512_slli_epi32(a.v, n)}; }
inline i32x16 shift_right(i32x16 a, int n) { return {_mm512_srai_epi32(a.v, n)}; }
inline i32x16 bits(f32x16 a) { return {_mm512_castps_si512(a.v)}; }
inline f32x16 from_bits(i32x16 a) { return {_mm512_castsi512_ps(a.v)}; }

// Sum of 16 lanes, folded in halves: l + (l + 8), then 4, 2, 1.
inline float reduce_add(f32x16 a) {
    __m256 x = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
inline float reduce_max(f32x16 a) { return _mm512_reduce_max_ps(a.v); }

inline __m512 low_pairs(__m512 x, __m512 y) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
}
inline __m512 high_pairs(__m512 x, __m512 y) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
}

// The first folds of four sums; `finish_folds` makes the others of four such results [4][16], so that
// lane i + 4 r is reduce_add of sum r of result i.
inline f32x16 fold_four(f32x16 p, f32x16 q, f32x16 r, f32x16 s) {
    __m512 x = _mm512_add_ps(_mm512_shuffle_f32x4(p.v, r.v, 0x44), _mm512_shuffle_f32x4(p.v, r.v, 0xEE));
    __m512 y = _mm512_add_ps(_mm512_shuffle_f32x4(q.v, s.v, 0x44), _mm512_shuffle_f32x4(q.v, s.v, 0xEE));
    return {_mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xDD))};  // p, r, q, s
}
// to[0..3]: reduce_add of each.
inline void store_sums(float* to, f32x16 p, f32x16 q, f32x16 r, f32x16 s) {
    __m512 c = fold_four(p, q, r, s).v;
    c = _mm512_add_ps(c, _mm512_shuffle_ps(c, c, 0x4E)), c = _mm512_add_ps(c, _mm512_shuffle_ps(c, c, 0xB1));
    const __m512i place = _mm512_setr_epi32(0, 8, 4, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm_storeu_ps(to, _mm512_castps512_ps128(_mm512_permutexvar_ps(place, c)));
}
inline f32x16 finish_folds(const float* folded) {
    __m512 c[4], d[2];
    for (int i = 0; i < 4; i++) c[i] = _mm512_loadu_ps(folded + 16 * i);
    for (int i = 0; i < 2; i++)  // in each quarter: two of c_i, two of c_(i+2)
        d[i] = _mm512_add_ps(low_pairs(c[i], c[i + 2]), high_pairs(c[i], c[i + 2]));
    __m512 e = _mm512_add_ps(_mm512_shuffle_ps(d[0], d[1], 0x88), _mm512_shuffle_ps(d[0], d[1], 0xDD));
    // e holds, a quarter at a time (p, r, q, s), results 0, 2, 1, 3.
    const __m512i place = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
    return {_mm512_permutexvar_ps(place, e)};
}

// Lane i of the result is reduce_add of row i of `rows` [16][16], the same folds in the same order.
inline f32x16 reduce_rows(const float* rows) {
    float folded[64];
    for (int i = 0; i < 4; i++)
        store(folded + 16 * i, fold_four(load(rows + 16 * i), load(rows + 16 * (i + 4)), load(rows + 16 * (i + 8)),
                                         load(rows + 16 * (i + 12))));
    return finish_folds(folded);
}

// to[j][i] = from[i][j] of 16 rows, which lie `stride` and `to_stride` apart.
inline void transpose(const float* from, int64_t stride, float* to, int64_t to_stride) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_ps(from + i * stride);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // a[i + c]: of rows i to i + 3, columns c, c + 4, c + 8, c + 12
        a[i] = low_pairs(b[i], b[i + 2]), a[i + 1] = high_pairs(b[i], b[i + 2]);
        a[i + 2] = low_pairs(b[i + 1], b[i + 3]), a[i + 3] = high_pairs(b[i + 1], b[i + 3]);
    }
    for (int c = 0; c < 4; c++) {
        __m512 p = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x44), q = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x44);
        __m512 r = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xEE), s = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xEE);
        _mm512_storeu_ps(to + c * to_stride, _mm512_shuffle_f32x4(p, q, 0x88));
        _mm512_storeu_ps(to + (4 + c) * to_stride, _mm512_shuffle_f32x4(p, q, 0xDD));
        _mm512_storeu_ps(to + (8 + c) * to_stride, _mm512_shuffle_f32x4(r, s, 0x88));
        _mm512_storeu_ps(to + (12 + c) * to_stride, _mm512_shuffle_f32x4(r, s, 0xDD));
    }
}

inline u8x64 load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline u8x64 load_bytes_partial(const uint8_t* p, int64_t n) { return {_mm512_maskz_loadu_epi8(first64(n), p)}; }
inline void store_bytes(uint8_t* p, u8x64 a) { _mm512_storeu_si512(p, a.v); }

// Twice the E2M1 value plus 12, by the low six bits of a byte of which the low four count.
inline __m512i code_table() {
    const __m128i t = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
    return _mm512_broadcast_i32x4(t);
}

// 256 codes of a row (two vectors of bytes) to four vectors, lane j of each a part of block j:
// columns 16 j + {0 2 4 6}, {1 3 5 7}, {8 10 12 14}, {9 11 13 15}.
inline void unpack_codes(u8x64 w0, u8x64 w1, u8x64 out[4]) {
    const __m512i table = code_table();
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    __m512i e = _mm512_permutex2var_epi32(w0.v, even, w1.v), o = _mm512_permutex2var_epi32(w0.v, odd, w1.v);
    out[0].v = _mm512_permutexvar_epi8(e, table);
    out[1].v = _mm512_permutexvar_epi8(_mm512_srli_epi16(e, 4), table);
    out[2].v = _mm512_permutexvar_epi8(o, table);
    out[3].v = _mm512_permutexvar_epi8(_mm512_srli_epi16(o, 4), table);
}

// The low bytes of a block's 16 integers to its dword of four vectors, 64 bytes apart: columns
// {0 2 4 6}, {1 3 5 7}, {8 10 12 14}, {9 11 13 15}.
inline void store_block(i32x16 q, uint8_t* at) {
    const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    int32_t quads[4];
    _mm_storeu_si128((__m128i*)quads, _mm_shuffle_epi8(_mm512_cvtepi32_epi8(q.v), order));
    for (int i = 0; i < 4; i++) memcpy(at + 64 * i, quads + i, 4);
}

// acc + sums of four products of unsigned and signed bytes in each lane.
inline i32x16 dot(i32x16 acc, u8x64 w, u8x64 a) { return {_mm512_dpbusd_epi32(acc.v, w.v, a.v)}; }
inline u8x64 splat_quad(const uint8_t* p) {
    int32_t x;
    memcpy(&x, p, 4);
    return {_mm512_set1_epi32(x)};
}

// 16 E4M3 codes without sign, times 2^-8: shifted into place they are half floats.
inline f32x16 scales16(const uint8_t* p) {
    __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
    return {_mm512_cvtph_ps(_mm256_slli_epi16(x, 7))};
}
inline f32x16 scales16_partial(const uint8_t* p, int64_t n) {
    __m256i x = _mm256_cvtepu8_epi16(_mm_maskz_loadu_epi8(first16(n), p));
    return {_mm512_cvtph_ps(_mm256_slli_epi16(x, 7))};
}
inline f32x16 from_fp8(const uint8_t* p) {  // E4M3 with sign, exact; NaN codes become 480
    __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
    __m256i sign = _mm256_slli_epi16(_mm256_srli_epi16(x, 7), 15);
    __m256i rest = _mm256_slli_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0x7F)), 7);
    return {_mm512_mul_ps(_mm512_cvtph_ps(_mm256_or_si256(sign, rest)), _mm512_set1_ps(256.0f))};
}
inline f32x16 from_bf16(const uint16_t* p) {  // words to the upper halves, in one instruction
    const __m512i place = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4, 0,
                                           3, 0, 2, 0, 1, 0, 0, 0);
    __m512i x = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p));
    return {_mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, place, x))};
}
inline f32x16 from_f16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
// 16 codes (8 bytes) as E2M1 values in order.
inline f32x16 from_codes(const uint8_t* p) {
    const __m512 table = _mm512_setr_ps(0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6);
    uint64_t word;
    memcpy(&word, p, 8);
    const __m512i shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    __m512i x = _mm512_inserti64x4(_mm512_set1_epi32((int)word), _mm256_set1_epi32((int)(word >> 32)), 1);
    return {_mm512_permutexvar_ps(_mm512_srlv_epi32(x, shifts), table)};
}

inline bf16x32 load_bf16(const uint16_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_bf16(uint16_t* p, f32x16 low, f32x16 high) {
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v));
}
inline f32x16 dot_bf16(f32x16 acc, bf16x32 a, bf16x32 b) {
    return {_mm512_dpbf16_ps(acc.v, (__m512bh)a.v, (__m512bh)b.v)};
}

// Bytes of four rows side by side: dword i of out[m] holds byte 16 L + 4 m + (i & 3), L = i / 4, of
// each row; then low nibbles to out[0..3], high ones to out[4..7].
inline void unpack_quads(const uint8_t* const rows[4], u8x64 out[8]) {
    const __m512i table = code_table();
    __m512i z[4], p[4], q[4];
    for (int i = 0; i < 4; i++) z[i] = _mm512_loadu_si512(rows[i]);
    p[0] = _mm512_unpacklo_epi8(z[0], z[1]), p[1] = _mm512_unpackhi_epi8(z[0], z[1]);
    p[2] = _mm512_unpacklo_epi8(z[2], z[3]), p[3] = _mm512_unpackhi_epi8(z[2], z[3]);
    q[0] = _mm512_unpacklo_epi16(p[0], p[2]), q[1] = _mm512_unpackhi_epi16(p[0], p[2]);
    q[2] = _mm512_unpacklo_epi16(p[1], p[3]), q[3] = _mm512_unpackhi_epi16(p[1], p[3]);
    for (int i = 0; i < 4; i++) {
        out[i].v = _mm512_permutexvar_epi8(q[i], table);
        out[4 + i].v = _mm512_permutexvar_epi8(_mm512_srli_epi16(q[i], 4), table);
    }
}

// Keep a loaded vector in its register: the compiler would read it again at each use.
inline u8x64 keep(u8x64 x) { __asm__("" : "+v"(x.v)); return x; }
inline i32x16 keep(i32x16 x) { __asm__("" : "+v"(x.v)); return x; }
inline f32x16 keep(f32x16 x) { __asm__("" : "+v"(x.v)); return x; }
inline bf16x32 keep(bf16x32 x) { __asm__("" : "+v"(x.v)); return x; }
