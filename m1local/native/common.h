/* What the C files share: exported names, the two types a source may have, bfloat16.
 *
 * Every result here must be bit-equal to torch's, which does one operation at a time. The compiler
 * is told so (-ffp-contract=off, never -ffast-math); what it cannot promise stops the compilation.
 */
#ifndef M1_COMMON_H
#define M1_COMMON_H

#include <float.h>
#include <stdint.h>
#include <string.h>

#if defined(FLT_EVAL_METHOD) && FLT_EVAL_METHOD != 0
#error "float is computed with another precision here: results would differ"
#endif
#ifdef _MSC_VER
#pragma fp_contract(off)
#endif
#ifdef __FAST_MATH__
#error "-ffast-math changes results"
#endif

#ifdef _WIN32
#define M1_EXPORT __declspec(dllexport)
#else
#define M1_EXPORT __attribute__((visibility("default")))
#endif

typedef uint16_t bfloat16; /* the upper half of a float */

/* How weights become codes; m1local/native/quantize.py fills it. */
typedef struct {
    int32_t size;      /* weights of a group: 32, 64 or 128 */
    int32_t highest;   /* code */
    int32_t middle;    /* the code that means exactly the zero */
    int32_t low_bits;  /* of a code, that lie in the first plane: 1, 2 or 4 */
    int32_t high_bits; /* those in the second plane, or 0 */
    int32_t rounds;    /* of refit or hqq; 0 is rounding to nearest */
    float start;       /* of refit: the first scale as a share of the group's range */
} Levels;

/* What hqq needs of the power x^(p - 1), and of its rounds; see hqq.py. */
typedef struct {
    float powers[256]; /* of two, by the exponent as it stands in the bits of x */
    float series[9];   /* of what is left of x, less its middle 1.5 */
    float weights[8];  /* of the power in each round: 1 / beta */
    float smallest;    /* size of an error, and of a scale, that counts */
} Shrinkage;

M1_EXPORT void m1_quantize_groups(
    const void *source, int is_wide, int64_t groups, const Levels *levels,
    const Shrinkage *shrinkage /* of hqq, or NULL */, uint8_t *low_plane, uint8_t *high_plane,
    bfloat16 *scales, bfloat16 *zeros, int threads);
M1_EXPORT void m1_quantize_rows(
    const void *source, int is_wide, int64_t rows, int64_t columns, int8_t *codes, float *scales,
    int threads);
M1_EXPORT void m1_squared_lengths(
    const void *source, int is_wide, int64_t rows, int64_t columns, float *scratch, float *sums);
M1_EXPORT void m1_divide_rows(
    const void *source, int is_wide, int64_t rows, int64_t columns, const float *divisors,
    float *target);
M1_EXPORT int m1_all_finite(const void *values, int is_wide, int64_t count);

/* A matrix as it is stored: groups of a few bits, or rows of bytes. */
typedef struct {
    const uint8_t *low, *high;      /* planes [row][byte]; of rows of bytes `low` alone */
    const bfloat16 *scales, *zeros; /* [row][group]; of rows of bytes there are none */
    const float *row_scales;        /* of rows of bytes */
    int64_t rows, columns;
    int32_t low_bits, high_bits; /* of a plane: 8 for rows of bytes; 0 for none */
    int32_t middle;              /* the code that means exactly the zero */
    int32_t size;                /* of a group; of rows of bytes GROUP_OF_X */
} Stored;

enum { GROUP_OF_X = 128 /* columns of x that share a scale where W has no groups */ };

M1_EXPORT int m1_multiply(
    const void *x, int is_wide, int64_t rows, const Stored *w, void *target, int threads);

/* How keys and values are kept. */
enum { KV_FLOAT, KV_BFLOAT16, KV_BYTES };

/* Attention of a few rows over a cache (attention.c); m1local/native/attention.py fills it. */
typedef struct {
    const void *q, *k, *v;
    const bfloat16 *k_scales, *v_scales; /* of bytes */
    const int64_t *query_positions, *key_positions;
    void *out;
    int64_t rows, heads, kv_heads, width, slots, used, window; /* window: 0 for none */
    int32_t is_wide, kind; /* of q and the result; of k and v */
    float scale;
} Attention;

M1_EXPORT int m1_attend(const Attention *attention, int threads);

/* Rows of q, k and v side by side, and what becomes of them (neighbours.c). */
typedef struct {
    const void *packed, *taps_k, *taps_v, *before_k, *before_v;
    const float *cos, *sin; /* (rows, width / 2) */
    void *q, *k, *v;        /* (heads, rows, width), of which k and v have kv_heads */
    int64_t rows, heads, kv_heads, width;
    int64_t before_stride; /* values from one head of `before` to the next */
    int32_t is_wide;
} Heads;

M1_EXPORT void m1_turn_heads(const Heads *heads, int threads);
M1_EXPORT void m1_norm(const void *x, const void *weight, int is_wide, int64_t rows, int64_t width,
                       float eps, void *out, int threads);
M1_EXPORT void m1_gate(
    const void *gate, const void *up, int is_wide, int64_t count, void *out, int threads);

/* A layer, and what is kept of it (step.c); m1local/native/step.py fills these. */
typedef struct {
    Stored packed, out, gate, up, down;
    const void *norm, *post_norm, *taps_k, *taps_v;
    void *k, *v, *raw_k, *raw_v;   /* (kv_heads, slots, width); (kv_heads, raw_slots, width) */
    bfloat16 *k_scales, *v_scales; /* of bytes */
    const float *cos, *sin;        /* (rows, width / 2) */
    int64_t *key_positions;        /* (slots): shared by layers that have as many */
    int64_t heads, kv_heads, width, slots, window;
} Layer;

typedef struct {
    const Layer *layers;
    Stored head;
    const void *norm;
    void *x;                                            /* (rows, hidden): in */
    void *normed, *packed, *q, *k, *v, *product, *gate, *up; /* room for as many rows */
    int64_t *positions;
    void *room; /* for what products and attention need meanwhile: else they allocate it */
    int64_t room_bytes, layer_count, hidden, raw_slots;
    int32_t is_wide, kind; /* of x and the weights; of keys and values */
    float eps;
} Step;

M1_EXPORT int m1_step(const Step *step, int64_t position, int64_t rows, int64_t first_wanted,
                      void *logits, int threads);

M1_EXPORT int m1_sha256(
    uint32_t *const *states, const uint8_t *const *blocks, int64_t count, int streams);

M1_EXPORT uint64_t m1_read(const uint64_t *words, int64_t count, int threads);

#define BFLOAT16_MAX 3.3895313892515355e38f

static inline float widened(bfloat16 value)
{
    const uint32_t bits = (uint32_t)value << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

/* The nearest bfloat16, to even; of finite values only. Never infinite: the ends are clamped. */
static inline bfloat16 rounded(float wide)
{
    uint32_t bits;
    wide = wide > BFLOAT16_MAX ? BFLOAT16_MAX : wide < -BFLOAT16_MAX ? -BFLOAT16_MAX : wide;
    memcpy(&bits, &wide, sizeof bits);
    return (bfloat16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* The nearest bfloat16 of what is computed, as torch rounds: what is too large is infinite, and what
 * is no number stays none. */
static inline bfloat16 narrowed(float wide)
{
    uint32_t bits;
    memcpy(&bits, &wide, sizeof bits);
    return wide == wide ? (bfloat16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : 0x7fc0;
}

/* 1 / scale, or 0 where that would overflow: all codes are then the middle one. */
static inline float inverse_of(float scale)
{
    return scale >= FLT_MIN ? 1.0f / scale : 0.0f;
}

#endif
