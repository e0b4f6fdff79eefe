/* Vectors of bytes, 32-bit integers and floats, one spelling for every processor.
 *
 * BYTES of a vector make LANES 32-bit integers, each the sum of four products of bytes. The choice
 * is made when this is compiled, on the machine that runs it: AVX-512 with VNNI, AVX2, or plain C,
 * which a compiler may turn into what the processor has.
 */
#ifndef M1_LANES_H
#define M1_LANES_H

#include <stdint.h>
#include <string.h>

#ifdef _MSC_VER
#define INLINE static __forceinline
#else
#define INLINE static inline __attribute__((always_inline))
#endif

#if (defined(__AVX512BW__) && defined(__AVX512VNNI__)) || (defined(__AVX2__) && defined(__FMA__))
/* A function of which every call, with constants of its own, becomes a loop of its own. */
#define TEMPLATE INLINE
#ifdef _MSC_VER
#define UNROLL
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#else /* without vectors in registers that gains nothing, and takes a compiler a minute */
#define TEMPLATE static
#define UNROLL
#endif

#ifdef __GNUC__
#define will_read(at) __builtin_prefetch(at, 0, 2) /* to the second cache */
#else
#define will_read(at) (void)(at)
#endif

#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
#include <immintrin.h>
#define LANES_NAME "AVX-512 VNNI"
enum { BYTES = 64, LANES = 16 };
/* The greatest and the sign of a byte: whether weights are shifted by 128 to be unsigned. */
enum { SHIFTED = 1 };
typedef __m512i Bytes;
typedef __m512i Ints;
typedef __m512 Floats;

INLINE Bytes load_bytes(const void *at) { return _mm512_loadu_si512(at); }
INLINE Ints load_ints(const int32_t *at) { return _mm512_loadu_si512(at); }
INLINE Floats load_floats(const float *at) { return _mm512_loadu_ps(at); }
INLINE Floats all_of(float value) { return _mm512_set1_ps(value); }
INLINE Bytes masked(Bytes b, int mask) { return _mm512_and_si512(b, _mm512_set1_epi8((char)mask)); }
/* Of 16 bits each. */
INLINE Bytes shifted_left(Bytes b, int by) { return _mm512_slli_epi16(b, by); }
INLINE Bytes shifted_right(Bytes b, int by) { return _mm512_srli_epi16(b, by); }
/* What is in `b`, and of each byte of `a` the bits of a mask. */
INLINE Bytes joined(Bytes b, Bytes a, int mask)
{
    return _mm512_ternarylogic_epi64(a, _mm512_set1_epi8((char)mask), b, 0xEA);
}
/* Half a vector of bytes: each twice, the second time four bits lower; what is above is no matter.
 * A quarter: each four times, every time two bits lower. */
#ifdef __AVX512VBMI__
INLINE Bytes spread_halves(const void *at)
{
    const __m512i places = _mm512_set1_epi64(0x1c1814100c080400);
    return _mm512_multishift_epi64_epi8(places, _mm512_cvtepu32_epi64(_mm256_loadu_si256(at)));
}
INLINE Bytes spread_quarters(const void *at)
{
    const __m512i places = _mm512_set1_epi64(0x0e0c0a0806040200);
    return _mm512_multishift_epi64_epi8(places, _mm512_cvtepu16_epi64(_mm_loadu_si128(at)));
}
#else
INLINE Bytes spread_halves(const void *at)
{
    const Bytes halves = _mm512_cvtepu8_epi16(_mm256_loadu_si256(at));
    return _mm512_or_si512(halves, _mm512_slli_epi16(halves, 4));
}
INLINE Bytes spread_quarters(const void *at)
{
    const Bytes words = _mm512_cvtepu8_epi32(_mm_loadu_si128(at));
    const Bytes pairs = _mm512_or_si512(words, _mm512_slli_epi32(words, 12));
    return _mm512_or_si512(pairs, _mm512_slli_epi32(pairs, 6));
}
#endif
/* The same four bytes in every lane. */
INLINE Bytes all_of_four(const void *at)
{
    int32_t four;
    memcpy(&four, at, sizeof four);
    return _mm512_set1_epi32(four);
}
INLINE Ints all_ints(int32_t value) { return _mm512_set1_epi32(value); }
INLINE void store_floats(float *at, Floats f) { _mm512_storeu_ps(at, f); }
/* Codes, 0 to 63, by signed bytes. */
INLINE Ints dot_codes(Ints sum, Bytes codes, Bytes x) { return _mm512_dpbusd_epi32(sum, codes, x); }
/* Signed bytes by signed bytes; `sum` holds -128 times the sum of the x already. */
INLINE Ints dot_bytes(Ints sum, Bytes weights, Bytes x)
{
    return _mm512_dpbusd_epi32(sum, _mm512_xor_si512(weights, _mm512_set1_epi8(-128)), x);
}
INLINE Ints plus(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
/* 256 times a sum, and more. */
INLINE Ints raised(Ints sum, Ints more) { return _mm512_add_epi32(_mm512_slli_epi32(sum, 8), more); }
INLINE Floats to_floats(Ints i) { return _mm512_cvtepi32_ps(i); }
INLINE Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
INLINE Floats plus_product(Floats sum, Floats a, Floats b) { return _mm512_fmadd_ps(a, b, sum); }
INLINE float total_of(Floats f) { return _mm512_reduce_add_ps(f); }
/* The totals of four vectors, in a third of the operations. */
INLINE void four_totals(const Floats f[4], float *to)
{
    const Floats ab = _mm512_add_ps(_mm512_unpacklo_ps(f[0], f[1]), _mm512_unpackhi_ps(f[0], f[1]));
    const Floats cd = _mm512_add_ps(_mm512_unpacklo_ps(f[2], f[3]), _mm512_unpackhi_ps(f[2], f[3]));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const Floats all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    const __m256d upper = _mm512_extractf64x4_pd(_mm512_castps_pd(all), 1);
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm256_castpd_ps(upper));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
/* bfloat16 as floats: `count` of them, where there are fewer than LANES, and zeros. */
INLINE Floats load_widened(const uint16_t *at, int64_t count)
{
    const __mmask16 there = count < LANES ? (__mmask16)((1u << count) - 1) : 0xffff;
    const __m256i halves = _mm256_maskz_loadu_epi16(there, at);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
/* Of each lane's number in `lanes` the value. */
INLINE Floats from_lanes(Floats f, Ints lanes) { return _mm512_permutexvar_ps(lanes, f); }
/* A number in the first lane, zeros in the others. */
INLINE Ints first_lane(int32_t value) { return _mm512_zextsi128_si512(_mm_cvtsi32_si128(value)); }

#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define LANES_NAME "AVX2"
enum { BYTES = 32, LANES = 8 };
enum { SHIFTED = 0 };
typedef __m256i Bytes;
typedef __m256i Ints;
typedef __m256 Floats;

INLINE Bytes load_bytes(const void *at) { return _mm256_loadu_si256(at); }
INLINE Ints load_ints(const int32_t *at) { return _mm256_loadu_si256((const void *)at); }
INLINE Floats load_floats(const float *at) { return _mm256_loadu_ps(at); }
INLINE Floats all_of(float value) { return _mm256_set1_ps(value); }
INLINE Bytes masked(Bytes b, int mask) { return _mm256_and_si256(b, _mm256_set1_epi8((char)mask)); }
INLINE Bytes shifted_left(Bytes b, int by) { return _mm256_slli_epi16(b, by); }
INLINE Bytes shifted_right(Bytes b, int by) { return _mm256_srli_epi16(b, by); }
INLINE Bytes joined(Bytes b, Bytes a, int mask) { return _mm256_or_si256(b, masked(a, mask)); }
INLINE Bytes spread_halves(const void *at)
{
    const Bytes halves = _mm256_cvtepu8_epi16(_mm_loadu_si128(at));
    return _mm256_or_si256(halves, _mm256_slli_epi16(halves, 4));
}
INLINE Bytes spread_quarters(const void *at)
{
    const Bytes words = _mm256_cvtepu8_epi32(_mm_loadl_epi64(at));
    const Bytes pairs = _mm256_or_si256(words, _mm256_slli_epi32(words, 12));
    return _mm256_or_si256(pairs, _mm256_slli_epi32(pairs, 6));
}
INLINE Bytes all_of_four(const void *at)
{
    int32_t four;
    memcpy(&four, at, sizeof four);
    return _mm256_set1_epi32(four);
}
INLINE Ints all_ints(int32_t value) { return _mm256_set1_epi32(value); }
INLINE void store_floats(float *at, Floats f) { _mm256_storeu_ps(at, f); }
/* Sums of two products fit 16 bits: 2 * 127 * 127 is less than 32768. */
INLINE Ints dot_codes(Ints sum, Bytes codes, Bytes x)
{
    const __m256i pairs = _mm256_maddubs_epi16(codes, x);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
INLINE Ints dot_bytes(Ints sum, Bytes weights, Bytes x)
{
    return dot_codes(sum, _mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights));
}
INLINE Ints plus(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
INLINE Ints raised(Ints sum, Ints more) { return _mm256_add_epi32(_mm256_slli_epi32(sum, 8), more); }
INLINE Floats to_floats(Ints i) { return _mm256_cvtepi32_ps(i); }
INLINE Floats times(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
INLINE Floats plus_product(Floats sum, Floats a, Floats b) { return _mm256_fmadd_ps(a, b, sum); }
INLINE float total_of(Floats f)
{
    float lanes[8], total = 0;
    _mm256_storeu_ps(lanes, f);
    for (int i = 0; i < 8; i++)
        total += lanes[i];
    return total;
}
INLINE void four_totals(const Floats f[4], float *to)
{
    const __m256 all =
        _mm256_hadd_ps(_mm256_hadd_ps(f[0], f[1]), _mm256_hadd_ps(f[2], f[3]));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}
INLINE Floats load_widened(const uint16_t *at, int64_t count)
{
    uint16_t some[8] = {0};
    if (count < LANES) {
        memcpy(some, at, (size_t)count * sizeof *at);
        at = some;
    }
    const __m256i halves = _mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(halves, 16));
}
INLINE Floats from_lanes(Floats f, Ints lanes) { return _mm256_permutevar8x32_ps(f, lanes); }
INLINE Ints first_lane(int32_t value) { return _mm256_zextsi128_si256(_mm_cvtsi32_si128(value)); }

#else
#define LANES_NAME "plain C"
enum { BYTES = 32, LANES = 8 };
enum { SHIFTED = 0 };
typedef struct { int8_t of[BYTES]; } Bytes;
typedef struct { int32_t of[LANES]; } Ints;
typedef struct { float of[LANES]; } Floats;

#define MAKE(Type, result, count, expression) \
    Type result; \
    for (int i = 0; i < count; i++) \
        result.of[i] = expression; \
    return result

INLINE Bytes load_bytes(const void *at) { Bytes b; memcpy(&b, at, sizeof b); return b; }
INLINE Ints load_ints(const int32_t *at) { Ints v; memcpy(&v, at, sizeof v); return v; }
INLINE Floats load_floats(const float *at) { Floats f; memcpy(&f, at, sizeof f); return f; }
INLINE Floats all_of(float value) { MAKE(Floats, f, LANES, value); }
INLINE Bytes masked(Bytes b, int mask) { MAKE(Bytes, m, BYTES, (int8_t)(b.of[i] & mask)); }
INLINE Bytes joined(Bytes b, Bytes a, int mask)
{
    MAKE(Bytes, j, BYTES, (int8_t)(b.of[i] | (a.of[i] & mask)));
}
typedef struct { uint16_t of[BYTES / 2]; } Halves;
#define IN_HALVES(expression) \
    Halves h; \
    Bytes result; \
    memcpy(&h, &b, sizeof h); \
    for (int i = 0; i < BYTES / 2; i++) \
        h.of[i] = (uint16_t)(expression); \
    memcpy(&result, &h, sizeof h); \
    return result
INLINE Bytes shifted_left(Bytes b, int by) { IN_HALVES(h.of[i] << by); }
INLINE Bytes shifted_right(Bytes b, int by) { IN_HALVES(h.of[i] >> by); }
INLINE Bytes spread_halves(const void *at)
{
    MAKE(Bytes, s, BYTES, (int8_t)(((const uint8_t *)at)[i / 2] >> i % 2 * 4));
}
INLINE Bytes spread_quarters(const void *at)
{
    MAKE(Bytes, s, BYTES, (int8_t)(((const uint8_t *)at)[i / 4] >> i % 4 * 2));
}
INLINE Bytes all_of_four(const void *at)
{
    Bytes all;
    for (int i = 0; i < LANES; i++)
        memcpy(all.of + 4 * i, at, 4);
    return all;
}
INLINE Ints all_ints(int32_t value) { MAKE(Ints, v, LANES, value); }
INLINE void store_floats(float *at, Floats f) { memcpy(at, &f, sizeof f); }
INLINE Ints dot_bytes(Ints sum, Bytes weights, Bytes x)
{
    for (int lane = 0; lane < LANES; lane++)
        for (int i = 4 * lane; i < 4 * lane + 4; i++)
            sum.of[lane] += (int32_t)weights.of[i] * x.of[i];
    return sum;
}
INLINE Ints dot_codes(Ints sum, Bytes codes, Bytes x) { return dot_bytes(sum, codes, x); }
INLINE Ints plus(Ints a, Ints b) { MAKE(Ints, p, LANES, a.of[i] + b.of[i]); }
INLINE Ints raised(Ints sum, Ints more) { MAKE(Ints, r, LANES, sum.of[i] * 256 + more.of[i]); }
INLINE Floats to_floats(Ints v) { MAKE(Floats, f, LANES, (float)v.of[i]); }
INLINE Floats times(Floats a, Floats b) { MAKE(Floats, f, LANES, a.of[i] * b.of[i]); }
INLINE Floats plus_product(Floats sum, Floats a, Floats b)
{
    MAKE(Floats, f, LANES, sum.of[i] + a.of[i] * b.of[i]);
}
INLINE float total_of(Floats f)
{
    float total = 0;
    for (int i = 0; i < LANES; i++)
        total += f.of[i];
    return total;
}
INLINE void four_totals(const Floats f[4], float *to)
{
    for (int i = 0; i < 4; i++)
        to[i] = total_of(f[i]);
}
INLINE Floats load_widened(const uint16_t *at, int64_t count)
{
    uint32_t words[LANES] = {0};
    Floats f;
    for (int i = 0; i < LANES && i < count; i++)
        words[i] = (uint32_t)at[i] << 16;
    memcpy(&f, words, sizeof f);
    return f;
}
INLINE Floats from_lanes(Floats f, Ints lanes) { MAKE(Floats, r, LANES, f.of[lanes.of[i]]); }
INLINE Ints first_lane(int32_t value) { MAKE(Ints, v, LANES, i ? 0 : value); }
#endif

#endif
