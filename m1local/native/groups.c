/* Groups of a few bits: m1local/formats/groups.py and the methods refit and hqq, to the same bytes.
 *
 * A matrix is contiguous and its rows are whole groups, so it is one long sequence of groups. They
 * are worked on sixteen at a time, one in each lane of a vector: every loop over lanes below is
 * one or two vector instructions, and nothing is ever summed across a vector, so that the order of
 * all sums is the one written here, on every processor.
 */
#include <math.h>

#include "common.h"

enum { LANES = 16, LONGEST = 128 /* weights of a group */ };

/* Lanes do not depend on each other; without the pragma gcc unrolls the loop into scalars. */
#define EACH_LANE _Pragma("omp simd") for (int lane = 0; lane < LANES; lane++)

/* One number of each of sixteen groups. */
typedef struct {
    float of[LANES];
} Lanes;

/* Sixteen groups of bfloat16 (or of float, where `is_wide`), one after the other. */
static void load(const void *source, int is_wide, int size, Lanes *weights)
{
    if (is_wide) {
        const float *from = source;
        for (int i = 0; i < size; i++)
            EACH_LANE weights[i].of[lane] = from[lane * size + i];
    } else {
        const bfloat16 *from = source;
        for (int i = 0; i < size; i++)
            EACH_LANE weights[i].of[lane] = widened(from[lane * size + i]);
    }
}

/* Least and greatest weight of each group; adding 0 makes -0 into 0. */
static void find_range(const Lanes *weights, int size, Lanes *low, Lanes *high)
{
    Lanes least = weights[0], most = weights[0]; /* these stay in registers */
    for (int i = 1; i < size; i++)
        EACH_LANE {
            const float w = weights[i].of[lane];
            least.of[lane] = w < least.of[lane] ? w : least.of[lane];
            most.of[lane] = w > most.of[lane] ? w : most.of[lane];
        }
    EACH_LANE {
        low->of[lane] = least.of[lane] + 0.0f;
        high->of[lane] = most.of[lane] + 0.0f;
    }
}

/* Codes spread evenly from the least to the greatest weight. */
static void spread(float low, float high, const Levels *levels, bfloat16 *scale, bfloat16 *zero)
{
    const float range = high - low;
    *scale = rounded((range > FLT_MAX ? FLT_MAX : range) / (float)levels->highest);
    *zero = rounded(low + (float)levels->middle * widened(*scale));
}

/* The sum of `size` terms, which are lost: halves are added until one is left. */
static Lanes sum_of(Lanes *terms, int size)
{
    while (size > 1) {
        size /= 2;
        for (int i = 0; i < size; i++)
            EACH_LANE terms[i].of[lane] += terms[size + i].of[lane];
    }
    return terms[0];
}

/* One round of refit: the nearest codes, then the regression of the weights on these. */
static void refit_once(const Lanes *centred, const Levels *levels, Lanes *scale, Lanes *zero)
{
    const int size = levels->size;
    const float lowest = (float)-levels->middle, highest = lowest + (float)levels->highest;
    Lanes products[LONGEST], inverse, total = {{0}}, squares = {{0}};
    EACH_LANE inverse.of[lane] = inverse_of(scale->of[lane]);
    for (int i = 0; i < size; i++)
        EACH_LANE {
            const float weight = centred[i].of[lane];
            float code = nearbyintf((weight - zero->of[lane]) * inverse.of[lane]);
            code = code < lowest ? lowest : code > highest ? highest : code;
            products[i].of[lane] = code * weight;
            total.of[lane] += code; /* small integers: exact in any order */
            squares.of[lane] += code * code;
        }
    const Lanes together = sum_of(products, size);
    EACH_LANE {
        const float alone = squares.of[lane] - total.of[lane] * total.of[lane] / (float)size;
        const float slope = together.of[lane] / (alone > FLT_MIN ? alone : FLT_MIN);
        scale->of[lane] = alone > 0 ? slope : scale->of[lane];
        zero->of[lane] = scale->of[lane] * (total.of[lane] / (float)-size);
    }
}

/* Scale and zero of each group by least squares, in turn with its codes; see refit.py. */
static void refit(
    const Lanes *weights, const Levels *levels, const Lanes *low, const Lanes *high,
    Lanes *scale, Lanes *zero)
{
    const int size = levels->size;
    const float from_middle = (float)levels->middle - (float)levels->highest / 2;
    Lanes centred[LONGEST], mean;
    memcpy(centred, weights, (size_t)size * sizeof *weights);
    mean = sum_of(centred, size);
    EACH_LANE {
        mean.of[lane] /= (float)size;
        scale->of[lane] = (high->of[lane] - low->of[lane]) * levels->start;
        zero->of[lane] = (low->of[lane] + high->of[lane]) / 2 - mean.of[lane]
                         + from_middle * scale->of[lane];
    }
    for (int i = 0; i < size; i++)
        EACH_LANE centred[i].of[lane] = weights[i].of[lane] - mean.of[lane];
    for (int round = 0; round < levels->rounds; round++)
        refit_once(centred, levels, scale, zero);
    EACH_LANE zero->of[lane] += mean.of[lane];
}

/* x^(p - 1) of a number that is not negative: as torch computes it in hqq.py, step by step. */
static inline float power_of(float x, const Shrinkage *shrinkage)
{
    uint32_t bits, of_rest;
    float rest, found = shrinkage->series[8];
    memcpy(&bits, &x, sizeof bits);
    of_rest = (bits & 0x7fffff) | 0x3f800000;
    memcpy(&rest, &of_rest, sizeof rest);
    rest -= 1.5f;
    for (int i = 7; i >= 0; i--)
        found = found * rest + shrinkage->series[i];
    return found * shrinkage->powers[bits >> 23 & 0xff];
}

/* One round of hqq: the nearest codes, what of their errors is kept, and the zero for the rest. A
 * comparison with what is no number is false: it stays none, and `choose` notices. */
static void hqq_once(
    const Lanes *weights, const Levels *levels, const Shrinkage *shrinkage, float by,
    const Lanes *scale, Lanes *zero)
{
    const int size = levels->size;
    const float highest = (float)levels->highest, smallest = shrinkage->smallest;
    Lanes terms[LONGEST];
    for (int i = 0; i < size; i++)
        EACH_LANE {
            const float w = weights[i].of[lane], step = scale->of[lane];
            float code = nearbyintf(w / step + zero->of[lane]);
            code = code < 0 ? 0 : code > highest ? highest : code;
            const float error = w - step * (code - zero->of[lane]), big = fabsf(error);
            float kept = big - power_of(big > smallest ? big : smallest, shrinkage) * by;
            kept = kept < 0 ? 0 : kept;
            terms[i].of[lane] = code - (w - (error < 0 ? -kept : kept)) / step;
        }
    const Lanes total = sum_of(terms, size);
    EACH_LANE zero->of[lane] = total.of[lane] / (float)size;
}

/* Scale and zero of each group by half-quadratic splitting; see hqq.py. */
static void hqq(
    const Lanes *weights, const Levels *levels, const Shrinkage *shrinkage, const Lanes *low,
    const Lanes *high, Lanes *scale, Lanes *zero)
{
    EACH_LANE {
        const float even = (high->of[lane] - low->of[lane]) / (float)levels->highest;
        scale->of[lane] = even > shrinkage->smallest ? even : shrinkage->smallest;
        zero->of[lane] = -low->of[lane] / scale->of[lane];
    }
    for (int round = 0; round < levels->rounds; round++)
        hqq_once(weights, levels, shrinkage, shrinkage->weights[round], scale, zero);
    EACH_LANE {
        const int varies = high->of[lane] > low->of[lane];
        const float middle = scale->of[lane] * ((float)levels->middle - zero->of[lane]);
        zero->of[lane] = varies ? middle : low->of[lane];
        scale->of[lane] = varies ? scale->of[lane] : 0;
    }
}

/* Scale and zero of each group as they are stored. */
static void choose(
    const Lanes *weights, const Levels *levels, const Shrinkage *shrinkage, bfloat16 *scales,
    bfloat16 *zeros)
{
    Lanes low, high, scale, zero;
    find_range(weights, levels->size, &low, &high);
    if (shrinkage)
        hqq(weights, levels, shrinkage, &low, &high, &scale, &zero);
    else if (levels->rounds)
        refit(weights, levels, &low, &high, &scale, &zero);
    EACH_LANE {
        const int is_usable = levels->rounds && fabsf(scale.of[lane]) <= FLT_MAX
                              && fabsf(zero.of[lane]) <= FLT_MAX;
        if (is_usable) {
            scales[lane] = rounded(scale.of[lane]);
            zeros[lane] = rounded(zero.of[lane]);
        } else
            spread(low.of[lane], high.of[lane], levels, &scales[lane], &zeros[lane]);
    }
}

/* The nearest codes for given scales and zeros. */
static void encode(
    const Lanes *weights, const Levels *levels, const bfloat16 *scales, const bfloat16 *zeros,
    uint32_t codes[][LANES])
{
    const float middle = (float)levels->middle, highest = (float)levels->highest;
    Lanes inverse, zero;
    EACH_LANE {
        inverse.of[lane] = inverse_of(widened(scales[lane]));
        zero.of[lane] = widened(zeros[lane]);
    }
    for (int i = 0; i < levels->size; i++)
        EACH_LANE {
            const float weight = weights[i].of[lane] - zero.of[lane];
            float code = nearbyintf(weight * inverse.of[lane]) + middle;
            code = code > 0 ? code : 0;
            codes[i][lane] = (uint32_t)(int32_t)(code < highest ? code : highest);
        }
}

/* `bits` of each code, from bit `below` on, into the plane of `groups` groups. */
static void pack(
    uint32_t codes[][LANES], int size, int below, int bits, int groups, uint8_t *plane)
{
    const int per_word = 32 / bits, words = size / per_word;
    const uint32_t mask = (1u << bits) - 1;
    for (int word = 0; word < words; word++) {
        uint32_t packed[LANES] = {0};
        for (int i = 0; i < per_word; i++)
            EACH_LANE packed[lane] |= (codes[word * per_word + i][lane] >> below & mask)
                                      << i * bits;
        for (int lane = 0; lane < groups; lane++) {
            uint8_t *to = plane + ((size_t)lane * (size_t)words + (size_t)word) * 4;
            for (int byte = 0; byte < 4; byte++)
                to[byte] = (uint8_t)(packed[lane] >> 8 * byte);
        }
    }
}

/* Quantize `groups` groups from `source`; the planes, scales and zeros have room for all. */
M1_EXPORT void m1_quantize_groups(
    const void *source, int is_wide, int64_t groups, const Levels *levels,
    const Shrinkage *shrinkage, uint8_t *low_plane, uint8_t *high_plane, bfloat16 *scales,
    bfloat16 *zeros, int threads)
{
    const size_t size = (size_t)levels->size, width = is_wide ? sizeof(float) : sizeof(bfloat16);
    const size_t low_bytes = size * (size_t)levels->low_bits / 8;
    const size_t high_bytes = size * (size_t)levels->high_bits / 8;
    const int64_t blocks = (groups + LANES - 1) / LANES;
    (void)threads; /* without OpenMP */
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t block = 0; block < blocks; block++) {
        const size_t first = (size_t)block * LANES;
        const int count = groups - (int64_t)first < LANES ? (int)(groups - (int64_t)first) : LANES;
        const uint8_t *from = (const uint8_t *)source + first * size * width;
        Lanes weights[LONGEST];
        uint32_t codes[LONGEST][LANES];
        bfloat16 scale[LANES], zero[LANES];
        if (count < LANES) { /* the last: the lanes left over hold zeros */
            uint8_t padded[LANES * LONGEST * sizeof(float)] = {0};
            memcpy(padded, from, (size_t)count * size * width);
            load(padded, is_wide, levels->size, weights);
        } else
            load(from, is_wide, levels->size, weights);
        choose(weights, levels, shrinkage, scale, zero);
        encode(weights, levels, scale, zero, codes);
        pack(codes, levels->size, 0, levels->low_bits, count, low_plane + first * low_bytes);
        if (levels->high_bits)
            pack(codes, levels->size, levels->low_bits, levels->high_bits, count,
                 high_plane + first * high_bytes);
        memcpy(scales + first, scale, (size_t)count * sizeof *scale);
        memcpy(zeros + first, zero, (size_t)count * sizeof *zero);
    }
}
