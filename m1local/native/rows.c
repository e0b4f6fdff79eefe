/* Rows of signed bytes (m1local/formats/int8.py), their lengths, and whether values are numbers.
 *
 * The first and the last look at the bits of a float as an integer: without the sign they are in
 * the same order, and infinities and what is no number lie above everything else.
 */
#include <math.h>

#include "common.h"

static const uint16_t INFINITE_16 = 0x7f80;
static const uint32_t INFINITE_32 = 0x7f800000;

static uint16_t greatest_16(const uint16_t *bits, int64_t count)
{
    uint16_t greatest = 0;
    for (int64_t i = 0; i < count; i++) {
        const uint16_t size = bits[i] & 0x7fff;
        greatest = size > greatest ? size : greatest;
    }
    return greatest;
}

static uint32_t greatest_32(const uint32_t *bits, int64_t count)
{
    uint32_t greatest = 0;
    for (int64_t i = 0; i < count; i++) {
        const uint32_t size = bits[i] & 0x7fffffff;
        greatest = size > greatest ? size : greatest;
    }
    return greatest;
}

/* Whether all of `count` values, bfloat16 or (where `is_wide`) float, are finite. */
M1_EXPORT int m1_all_finite(const void *values, int is_wide, int64_t count)
{
    return is_wide ? greatest_32(values, count) < INFINITE_32
                   : greatest_16(values, count) < INFINITE_16;
}

static int8_t signed_code(float weight, float inverse)
{
    const float code = nearbyintf(weight * inverse);
    return (int8_t)(int32_t)(code < -127 ? -127 : code > 127 ? 127 : code);
}

static float quantize_16(const bfloat16 *weights, int64_t columns, int8_t *codes)
{
    const float scale = widened(greatest_16(weights, columns)) / 127;
    const float inverse = inverse_of(scale);
    for (int64_t i = 0; i < columns; i++)
        codes[i] = signed_code(widened(weights[i]), inverse);
    return scale;
}

static float quantize_32(const float *weights, int64_t columns, int8_t *codes)
{
    const uint32_t bits = greatest_32((const uint32_t *)weights, columns);
    float greatest;
    memcpy(&greatest, &bits, sizeof greatest);
    const float scale = greatest / 127, inverse = inverse_of(scale);
    for (int64_t i = 0; i < columns; i++)
        codes[i] = signed_code(weights[i], inverse);
    return scale;
}

/* Quantize rows (rows, columns) so that the largest magnitude of each becomes 127. */
M1_EXPORT void m1_quantize_rows(
    const void *source, int is_wide, int64_t rows, int64_t columns, int8_t *codes, float *scales,
    int threads)
{
    (void)threads; /* without OpenMP */
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const int64_t at = row * columns;
        scales[row] = is_wide ? quantize_32((const float *)source + at, columns, codes + at)
                              : quantize_16((const bfloat16 *)source + at, columns, codes + at);
    }
}

/* The sum of `count` values, in the order of m1local/sums.py; they are lost. */
static float halved_sum(float *values, int64_t count)
{
    while (count > 1) {
        const int64_t half = (count + 1) / 2; /* of an odd number the middle one has no partner */
        for (int64_t i = 0; i < count - half; i++)
            values[i] += values[half + i];
        count = half;
    }
    return values[0];
}

/* The sum of the squares of each of the rows (rows, columns); `scratch` has room for a row. */
M1_EXPORT void m1_squared_lengths(
    const void *source, int is_wide, int64_t rows, int64_t columns, float *scratch, float *sums)
{
    for (int64_t row = 0; row < rows; row++) {
        const float *wide = (const float *)source + row * columns;
        const bfloat16 *narrow = (const bfloat16 *)source + row * columns;
        for (int64_t i = 0; i < columns; i++) {
            const float weight = is_wide ? wide[i] : widened(narrow[i]);
            scratch[i] = weight * weight;
        }
        sums[row] = halved_sum(scratch, columns);
    }
}

/* Divide each of the rows (rows, columns) by its divisor. */
M1_EXPORT void m1_divide_rows(
    const void *source, int is_wide, int64_t rows, int64_t columns, const float *divisors,
    float *target)
{
    for (int64_t row = 0; row < rows; row++, target += columns) {
        const float *wide = (const float *)source + row * columns;
        const bfloat16 *narrow = (const bfloat16 *)source + row * columns;
        for (int64_t i = 0; i < columns; i++)
            target[i] = (is_wide ? wide[i] : widened(narrow[i])) / divisors[row];
    }
}
