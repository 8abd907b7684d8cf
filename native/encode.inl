// ---- encoding NVFP4: docs/numerics.md, bit for bit what aprium/ops/nvfp4.py does in PyTorch ----

constexpr float kLargestScale = 448.f, kSmallestScale = 0x1p-9f;
constexpr int kTopCode = 126;    // 448
constexpr int kSweepAbove = 9;   // codes above the one that clips nothing: twice its scale, and one

inline float from_scale_code(int code) { return fp8_value((uint8_t)code); }

// The E4M3 code nearest to p in [2^-9, 448], ties to even.
inline int to_scale_code(float p) {
    p = p < kSmallestScale ? kSmallestScale : p > kLargestScale ? kLargestScale : p;
    return round_fp8(p);
}

// The magnitudes of 16 numbers rounded to E2M1 values: nearest, ties to even, saturating.
inline f32x16 round_e2m1(f32x16 y) {
    f32x16 half = mul(round(add(y, y)), splat(.5f)), two = round(mul(y, splat(.5f)));
    f32x16 wide = where_less(y, splat(4), round(y), add(two, two));
    return min(where_less(y, splat(2), half, wide), splat(6));
}

// The weighted squared error of 16 magnitudes under a factor.
inline float encoding_error(f32x16 magnitude, f32x16 weights, float factor) {
    f32x16 f = splat(factor), off = sub(mul(round_e2m1(div(magnitude, f)), f), magnitude);
    return reduce_add(mul(mul(off, off), weights));
}

// What is lost by saturation alone.
inline float clipping_error(f32x16 magnitude, f32x16 weights, float factor) {
    f32x16 off = max(sub(magnitude, splat(6.f * factor)), splat(0));
    return reduce_add(mul(mul(off, off), weights));
}

inline int static_code(const EncodeTask& t, float block_amax, float largest) {
    float sixth = block_amax / 6.f, whole = t.amax / 6.f;
    if (!(whole > 0)) return to_scale_code(1.f);
    return to_scale_code((sixth == 0 ? 1.f : sixth) * largest / whole);
}

inline int sweep_codes(const EncodeTask& t, f32x16 magnitude, f32x16 weights, int first) {
    int best = first;
    float least = encoding_error(magnitude, weights, from_scale_code(first) * t.scale_2);
    for (int code = first + 1; code <= first + kSweepAbove && code <= kTopCode; code++) {
        float error = encoding_error(magnitude, weights, from_scale_code(code) * t.scale_2);
        if (error < least) best = code, least = error;
    }
    for (int code = first - 1; code >= 1; code--) {
        float factor = from_scale_code(code) * t.scale_2;
        if (!(clipping_error(magnitude, weights, factor) <= least)) break;
        float error = encoding_error(magnitude, weights, factor);
        if (error < least) best = code, least = error;
    }
    return best;
}

inline int choose_code(const EncodeTask& t, f32x16 magnitude, f32x16 weights) {
    float amax = reduce_max(magnitude);
    if (t.rule == EncodeRule::max) {
        float ratio = amax / (6.f * t.scale_2);
        return to_scale_code(ratio == 0 ? 1.f : ratio);
    }
    if (t.rule == EncodeRule::sweep) return sweep_codes(t, magnitude, weights, static_code(t, amax, kLargestScale));
    int six = static_code(t, amax, 256.f), four = static_code(t, amax * 1.5f, 256.f);
    float error_six = encoding_error(magnitude, weights, from_scale_code(six) * t.scale_2);
    float error_four = encoding_error(magnitude, weights, from_scale_code(four) * t.scale_2);
    return error_four < error_six ? four : six;
}

inline void encode_nvfp4(const EncodeTask& t, int64_t row_begin, int64_t row_end) {
    for (int64_t row = row_begin; row < row_end; row++) {
        for (int64_t block = 0; block < t.cols / kBlock; block++) {
            int64_t at = row * t.cols + block * kBlock;
            f32x16 x = t.half ? from_bf16((const uint16_t*)t.x + at) : load((const float*)t.x + at);
            f32x16 weights = t.importance ? load(t.importance + block * kBlock) : splat(1);
            f32x16 magnitude = abs(x);
            int code = choose_code(t, magnitude, weights);
            t.scales[at / kBlock] = (uint8_t)code;
            f32x16 y = div(magnitude, splat(from_scale_code(code) * t.scale_2));
            // Twice an E2M1 value, a whole number of at most 12, names its code.
            const uint8_t codes[13] = {0, 1, 2, 3, 4, 0, 5, 0, 6, 0, 0, 0, 7};
            float twice[16], sign[16];
            store(twice, mul(round_e2m1(y), splat(2)));
            store(sign, where_less(x, splat(0), splat(8), splat(0)));
            uint8_t* out = t.packed + at / 2;
            for (int i = 0; i < 8; i++) {
                int low = codes[(int)twice[2 * i]] | (int)sign[2 * i];
                int high = codes[(int)twice[2 * i + 1]] | (int)sign[2 * i + 1];
                out[i] = (uint8_t)(low | high << 4);
            }
        }
    }
}
