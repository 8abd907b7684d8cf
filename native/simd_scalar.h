// Vectors of 16 floats as arrays, in plain C++. Included inside `namespace scalar`.
// Products and sums are rounded one by one (no fused multiply-add).

struct f32x16 { float v[16]; };
struct i32x16 { int32_t v[16]; };
struct u8x64 { uint8_t v[64]; };
struct bf16x32 { uint16_t v[32]; };

#define EACH16(expression) \
    for (int i = 0; i < 16; i++) r.v[i] = (expression); \
    return r

inline f32x16 load_partial(const float* p, int64_t n) { f32x16 r; EACH16(i < n ? p[i] : 0.f); }
inline f32x16 load(const float* p) { f32x16 r; EACH16(p[i]); }
inline void store_partial(float* p, const f32x16& x, int64_t n) {
    for (int64_t i = 0; i < n && i < 16; i++) p[i] = x.v[i];
}
inline void store(float* p, const f32x16& x) { memcpy(p, x.v, 64); }
inline f32x16 splat(float x) { f32x16 r; EACH16(x); }
inline f32x16 add(const f32x16& x, const f32x16& y) { f32x16 r; EACH16(x.v[i] + y.v[i]); }
inline f32x16 sub(const f32x16& x, const f32x16& y) { f32x16 r; EACH16(x.v[i] - y.v[i]); }
inline f32x16 mul(const f32x16& x, const f32x16& y) { f32x16 r; EACH16(x.v[i] * y.v[i]); }
inline f32x16 div(const f32x16& x, const f32x16& y) { f32x16 r; EACH16(x.v[i] / y.v[i]); }
inline f32x16 fma(const f32x16& x, const f32x16& y, const f32x16& z) { f32x16 r; EACH16(x.v[i] * y.v[i] + z.v[i]); }
inline f32x16 max(const f32x16& x, const f32x16& y) { f32x16 r; EACH16(x.v[i] > y.v[i] ? x.v[i] : y.v[i]); }
inline f32x16 min(const f32x16& x, const f32x16& y) { f32x16 r; EACH16(x.v[i] < y.v[i] ? x.v[i] : y.v[i]); }
inline f32x16 abs(const f32x16& x) { f32x16 r; EACH16(std::fabs(x.v[i])); }
inline f32x16 round(const f32x16& x) { f32x16 r; EACH16(std::nearbyintf(x.v[i])); }
inline f32x16 where_less(const f32x16& p, const f32x16& q, const f32x16& x, const f32x16& y) {
    f32x16 r; EACH16(p.v[i] < q.v[i] ? x.v[i] : y.v[i]);
}
// Out of range gives the least integer, as the vector instructions do.
inline i32x16 to_int(const f32x16& x) {
    i32x16 r; EACH16(std::fabs(x.v[i]) < 2147483520.f ? (int32_t)std::nearbyintf(x.v[i]) : INT32_MIN);
}
inline f32x16 to_float(const i32x16& x) { f32x16 r; EACH16((float)x.v[i]); }
inline i32x16 load_int(const int32_t* p) { i32x16 r; EACH16(p[i]); }
inline i32x16 splat_int(int32_t x) { i32x16 r; EACH16(x); }
inline i32x16 add(const i32x16& x, const i32x16& y) { i32x16 r; EACH16((int32_t)((uint32_t)x.v[i] + (uint32_t)y.v[i])); }
inline i32x16 shift_left(const i32x16& x, int n) { i32x16 r; EACH16((int32_t)((uint32_t)x.v[i] << n)); }
inline i32x16 shift_right(const i32x16& x, int n) { i32x16 r; EACH16(x.v[i] >> n); }
inline i32x16 bits(const f32x16& x) { i32x16 r; memcpy(r.v, x.v, 64); return r; }
inline f32x16 from_bits(const i32x16& x) { f32x16 r; memcpy(r.v, x.v, 64); return r; }
inline float reduce_add(f32x16 x) {
    for (int n = 8; n; n /= 2)
        for (int i = 0; i < n; i++) x.v[i] += x.v[i + n];
    return x.v[0];
}
inline float reduce_max(const f32x16& x) {
    float m = x.v[0];
    for (int i = 1; i < 16; i++) m = x.v[i] > m ? x.v[i] : m;
    return m;
}
// Sums of four, and of four such results [4][16] the sum r of result i in lane i + 4 r.
inline f32x16 fold_four(const f32x16& p, const f32x16& q, const f32x16& r, const f32x16& s) {
    return {{reduce_add(p), reduce_add(q), reduce_add(r), reduce_add(s)}};
}
inline f32x16 finish_folds(const float* folded) { f32x16 r; EACH16(folded[i % 4 * 16 + i / 4]); }
// to[0..3]: reduce_add of each.
inline void store_sums(float* to, const f32x16& p, const f32x16& q, const f32x16& r, const f32x16& s) {
    to[0] = reduce_add(p), to[1] = reduce_add(q), to[2] = reduce_add(r), to[3] = reduce_add(s);
}
// to[j][i] = from[i][j] of 16 rows, which lie `stride` and `to_stride` apart.
inline void transpose(const float* from, int64_t stride, float* to, int64_t to_stride) {
    for (int j = 0; j < 16; j++)
        for (int i = 0; i < 16; i++) to[j * to_stride + i] = from[i * stride + j];
}
inline f32x16 reduce_rows(const float* rows) { f32x16 r; EACH16(reduce_add(load(rows + 16 * i))); }

inline u8x64 load_bytes_partial(const uint8_t* p, int64_t n) {
    u8x64 r = {};
    for (int64_t i = 0; i < n && i < 64; i++) r.v[i] = p[i];
    return r;
}
inline u8x64 load_bytes(const uint8_t* p) { return load_bytes_partial(p, 64); }
inline void store_bytes(uint8_t* p, const u8x64& x) { memcpy(p, x.v, 64); }
inline uint8_t decode_low(uint8_t x) {
    static const uint8_t table[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
    return table[x & 15];
}
inline void unpack_codes(const u8x64& w0, const u8x64& w1, u8x64 out[4]) {
    for (int j = 0; j < 16; j++) {
        const uint8_t* block = j < 8 ? w0.v + 8 * j : w1.v + 8 * (j - 8);
        for (int i = 0; i < 4; i++) {
            out[0].v[4 * j + i] = decode_low(block[i]), out[1].v[4 * j + i] = decode_low(block[i] >> 4);
            out[2].v[4 * j + i] = decode_low(block[4 + i]), out[3].v[4 * j + i] = decode_low(block[4 + i] >> 4);
        }
    }
}
inline void store_block(const i32x16& q, uint8_t* at) {
    const int32_t* n = q.v;
    for (int i = 0; i < 4; i++) {
        at[i] = (uint8_t)n[2 * i], at[64 + i] = (uint8_t)n[2 * i + 1];
        at[128 + i] = (uint8_t)n[8 + 2 * i], at[192 + i] = (uint8_t)n[9 + 2 * i];
    }
}
inline i32x16 dot(const i32x16& acc, const u8x64& w, const u8x64& x) {
    i32x16 r = acc;
    for (int i = 0; i < 64; i++) r.v[i / 4] += w.v[i] * (int8_t)x.v[i];
    return r;
}
inline u8x64 splat_quad(const uint8_t* p) {
    u8x64 r;
    for (int i = 0; i < 64; i++) r.v[i] = p[i & 3];
    return r;
}
inline float from_e4m3(uint8_t code) {
    int exponent = (code >> 3) & 15, mantissa = code & 7;
    float x = exponent ? std::ldexp(8.f + mantissa, exponent - 10) : std::ldexp((float)mantissa, -9);
    return code & 0x80 ? -x : x;
}
inline f32x16 from_fp8(const uint8_t* p) { f32x16 r; EACH16(from_e4m3(p[i])); }
inline f32x16 scales16_partial(const uint8_t* p, int64_t n) {
    f32x16 r; EACH16(i < n ? from_e4m3(p[i]) * 0.00390625f : 0.f);
}
inline f32x16 scales16(const uint8_t* p) { return scales16_partial(p, 16); }
inline float widen_bf16(uint16_t x) {
    uint32_t y = (uint32_t)x << 16;
    float r;
    memcpy(&r, &y, 4);
    return r;
}
inline f32x16 from_bf16(const uint16_t* p) { f32x16 r; EACH16(widen_bf16(p[i])); }
inline float widen_f16(uint16_t x) {
    int exponent = (x >> 10) & 31, mantissa = x & 1023;
    float r = exponent == 31 ? (mantissa ? NAN : INFINITY)
              : exponent     ? std::ldexp(1024.f + mantissa, exponent - 25)
                             : std::ldexp((float)mantissa, -24);
    return x & 0x8000 ? -r : r;
}
inline f32x16 from_f16(const uint16_t* p) { f32x16 r; EACH16(widen_f16(p[i])); }
inline f32x16 from_codes(const uint8_t* p) {
    static const float table[16] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};
    f32x16 r; EACH16(table[(p[i / 2] >> 4 * (i & 1)) & 15]);
}

inline bf16x32 load_bf16(const uint16_t* p) { bf16x32 r; memcpy(r.v, p, 64); return r; }
inline void store_bf16(uint16_t* p, const f32x16& low, const f32x16& high) {
    for (int i = 0; i < 16; i++) p[i] = round_bf16(low.v[i]), p[16 + i] = round_bf16(high.v[i]);
}
inline f32x16 dot_bf16(const f32x16& acc, const bf16x32& x, const bf16x32& y) {
    f32x16 r;
    for (int i = 0; i < 16; i++)
        r.v[i] = acc.v[i] + widen_bf16(x.v[2 * i]) * widen_bf16(y.v[2 * i]) +
                 widen_bf16(x.v[2 * i + 1]) * widen_bf16(y.v[2 * i + 1]);
    return r;
}

inline void unpack_quads(const uint8_t* const rows[4], u8x64 out[8]) {
    for (int m = 0; m < 4; m++)
        for (int i = 0; i < 16; i++)
            for (int r = 0; r < 4; r++) {
                uint8_t byte = rows[r][16 * (i / 4) + 4 * m + (i & 3)];
                out[m].v[4 * i + r] = decode_low(byte), out[4 + m].v[4 * i + r] = decode_low(byte >> 4);
            }
}

template <class V>
inline V keep(const V& x) { return x; }

#undef EACH16
