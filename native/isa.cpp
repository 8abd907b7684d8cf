// One instruction set a compilation, and of it what generates or, with APRIUM_TRAINING, what trains:
// APRIUM_ISA names it. Target pragmas, not compiler flags, choose
// instructions, so that nothing outside the namespace (a library header's inline function, say) is
// compiled for a machine that may not be there.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "kernels.h"
#ifdef APRIUM_TRAINING
#include "training_kernels.h"
#endif

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define APRIUM_STRING2(x) #x
#define APRIUM_STRING(x) APRIUM_STRING2(x)
#define APRIUM_ISA_NAME APRIUM_STRING(APRIUM_ISA)

#if APRIUM_LEVEL == 2
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512bf16,avx2,fma,f16c")
#elif APRIUM_LEVEL == 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace aprium::APRIUM_ISA {
namespace {

inline float fp8_value(uint8_t code) {  // E4M3 without sign
    int32_t exponent = code >> 3 & 15, mantissa = code & 7;
    if (!exponent) return (float)mantissa * 0.001953125f;
    int32_t b = (exponent + 120) << 23 | mantissa << 20;
    float x;
    memcpy(&x, &b, 4);
    return x;
}

#if APRIUM_LEVEL == 2
#include "simd_avx512.h"
#elif APRIUM_LEVEL == 1
#include "simd_avx2.h"
#else
#include "simd_scalar.h"
#endif
#include "math.inl"
#ifdef APRIUM_TRAINING
#include "dense.inl"
#include "ssd.inl"
#include "flash.inl"
#include "train.inl"
#else
#include "matmul.inl"
#include "matmul_float.inl"
#include "layers.inl"
#include "encode.inl"
#endif

}  // namespace
#include "isa.inl"
}  // namespace aprium::APRIUM_ISA

#if APRIUM_LEVEL
#pragma GCC pop_options
#endif
