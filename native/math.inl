// What all kernels share: rounding of sizes, and the exponential. Included after the vectors.

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t up16(int64_t n) { return (n + 15) / 16 * 16; }

// e^x, to about 1 ulp; 0 below -87.3, infinity above 88.7, NaN for NaN. exp(0) is 1 exactly.
inline f32x16 exp(f32x16 x) {
    f32x16 n = round(mul(x, splat(1.44269504f)));
    n = max(min(n, splat(129)), splat(-150));
    f32x16 r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    f32x16 p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = add(fma(p, mul(r, r), r), splat(1));
    i32x16 e = to_int(n), half = shift_right(e, 1), rest = shift_right(add(e, splat_int(1)), 1);
    f32x16 low = from_bits(shift_left(add(half, splat_int(127)), 23));
    f32x16 high = from_bits(shift_left(add(rest, splat_int(127)), 23));
    f32x16 y = mul(mul(p, low), high);
    y = where_less(x, splat(-87.33654f), splat(0), y);
    y = where_less(splat(88.72283f), x, splat(INFINITY), y);
    return y;
}
inline f32x16 silu(f32x16 x) { return div(x, add(splat(1), exp(sub(splat(0), x)))); }
