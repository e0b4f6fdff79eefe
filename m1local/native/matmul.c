/* x @ W.T for W as the checkpoint stores it: groups of 3 to 6 bits (m1local/formats/groups.py) or
 * rows of bytes (int8.py), read where they lie, mapped files included; nothing is packed or copied
 * but what lies in the cache at the moment.
 *
 * x is rounded to bytes first (activations.h). A few rows of x are multiplied by W as it streams
 * from the memory (matmul_few.c), more by panels of W that are unpacked once (matmul_many.c).
 */
#include "matmul.h"

enum { FEW_ROWS = 4 /* more are faster by panels */ };

static int64_t up_to_multiple(int64_t value, int64_t of) { return (value + of - 1) / of * of; }

static int multiply_stored(
    const void *source, int is_wide, int64_t rows, const Stored *w, void *target, int threads)
{
    const int is_bytes = w->low_bits == 8, few = rows <= FEW_ROWS;
    const int apart = is_bytes ? 1 : 2;
    const Output output = {target, is_wide};
    Rounded x = {
        .layout = few ? FOR_FEW : FOR_MANY,
        .rows = rows,
        .padded_rows = few && rows < 3 ? rows : up_to_multiple(rows, few ? 4 : TILE),
        .columns = w->columns,
        .padded_columns = up_to_multiple(w->columns, few && !is_bytes ? 2 * BYTES : w->size),
        .size = w->size,
        .apart = apart,
        .middle = is_bytes ? (SHIFTED ? 128 : 0) : w->middle,
        .parts = is_bytes ? 2 : 1,
    };
    x.groups = up_to_multiple(x.padded_columns, w->size) / w->size;
    if (few) /* read a vector at a time */
        x.groups = up_to_multiple(x.groups, LANES);
    const int done = round_rows(&x, source, is_wide, threads)
                     && (few ? multiply_few : multiply_many)(w, &x, &output, threads);
    forget(&x);
    return done;
}

/* x (rows, columns) in groups of a few bits, as `planes` says. */
M1_EXPORT int m1_multiply_groups(
    const void *x, int is_wide, int64_t rows, const uint8_t *low, const uint8_t *high,
    const bfloat16 *scales, const bfloat16 *zeros, int64_t n, int64_t columns, const Planes *planes,
    void *target, int threads)
{
    const Stored w = {
        .low = low, .high = high, .scales = scales, .zeros = zeros, .rows = n, .columns = columns,
        .low_bits = planes->low_bits, .high_bits = planes->high_bits, .middle = planes->middle,
        .size = planes->size,
    };
    return multiply_stored(x, is_wide, rows, &w, target, threads);
}

/* x (rows, columns) by rows of bytes: `codes` (n, columns), `scales` (n). */
M1_EXPORT int m1_multiply_int8(
    const void *x, int is_wide, int64_t rows, const int8_t *codes, const float *scales, int64_t n,
    int64_t columns, void *target, int threads)
{
    const Stored w = {
        .low = (const uint8_t *)codes, .row_scales = scales, .rows = n, .columns = columns,
        .low_bits = 8, .size = GROUP_OF_X,
    };
    return multiply_stored(x, is_wide, rows, &w, target, threads);
}

M1_EXPORT const char *m1_lanes(void) { return LANES_NAME; }
