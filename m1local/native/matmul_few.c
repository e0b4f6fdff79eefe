/* A few rows of x by W as it streams from the memory: every byte of W is read once, in order.
 *
 * One vector holds bytes of one row of W; up to four rows of x share what was loaded. A byte holds
 * the codes of two columns, or of four, so x is parted into every second column, or every fourth,
 * instead of W being arranged.
 */
#include "matmul.h"

enum {
    X_TOGETHER = 4,
    AHEAD = 8192,         /* bytes of codes */
    SCALES_AHEAD = 512,   /* bytes of scales, and of zeros: about as many rows */
    BLOCK = 32,           /* rows of W */
    LEAST_WORK = 1 << 20, /* weights: fewer are not worth a second thread */
    BITS_OF_BYTES = 8,
    PARTS = 2,            /* of a value of x, for W of bytes */
    MOST_VECTORS = 16     /* of W, that LANES groups fill */
};

/* Where the next vector of a row of W begins. (Two rows at once are slower: the memory likes one
 * stream.) */
typedef struct {
    const uint8_t *low, *high;
} Place;

/* What a few rows of x have for it. */
typedef struct {
    const int8_t *codes;
    const int32_t *starts;
    const float *scales, *sums;
    int64_t vectors, groups; /* of a row */
} Rows;

/* Vector `v` of codes by `x_rows` of x, in which LANES scales that were joined for each lie. */
TEMPLATE void add_vector(
    Floats *sums, const Place *w, const Rows *x, int64_t v, const Floats *scales, Ints lanes,
    int x_rows, int low_bits, int high_bits)
{
    const Codes codes = load_codes(w->low, w->high, low_bits, high_bits);
    const int apart = parted(low_bits);
    UNROLL for (int m = 0; m < x_rows; m++) {
        const int8_t *at = x->codes + (m * x->vectors + v) * apart * BYTES;
        Ints dot = all_ints(0);
        UNROLL for (int i = 0; i < apart; i++)
            dot = dot_codes(dot, codes.of[i], load_bytes(at + i * BYTES));
        sums[m] = plus_product(sums[m], to_floats(dot), from_lanes(scales[m], lanes));
    }
}

/* LANES groups of a row of W, or as many as `vectors` whole ones hold and `left` columns: the codes
 * by whole numbers; the zeros, and the codes' middle, by the sums of x: a code of 0 stands for
 * zero - middle * scale. */
TEMPLATE void add_groups(
    Floats *sums, Place *w, const Rows *x, const Stored *stored, int64_t row, int64_t group,
    int64_t vectors, int64_t left, const int32_t *lanes, int x_rows, int low_bits, int high_bits)
{
    const int64_t of_row = stored->columns / stored->size, count = of_row - group;
    const Floats of_w = load_widened(stored->scales + row * of_row + group, count);
    const Floats zeros = load_widened(stored->zeros + row * of_row + group, count);
    const Floats lowest = plus_product(zeros, all_of((float)-stored->middle), of_w);
    will_read((const char *)(stored->scales + row * of_row + group) + SCALES_AHEAD);
    will_read((const char *)(stored->zeros + row * of_row + group) + SCALES_AHEAD);
    const int apart = parted(low_bits);
    const int64_t first = group * stored->size / (apart * BYTES);
    Floats scales[X_TOGETHER];
    UNROLL for (int m = 0; m < x_rows; m++) {
        const int64_t at = m * x->groups + group;
        scales[m] = times(of_w, load_floats(x->scales + at));
        sums[m] = plus_product(sums[m], lowest, load_floats(x->sums + at));
    }
    for (int64_t v = 0; v < vectors; v++) {
        add_vector(sums, w, x, first + v, scales, load_ints(lanes + v * LANES), x_rows, low_bits,
                   high_bits);
        will_read(w->low + AHEAD); /* the next rows, at the same place */
        w->low += BYTES;
        if (high_bits) {
            will_read(w->high + AHEAD);
            w->high += BYTES / 8 * apart * high_bits;
        }
    }
    if (left) { /* it may reach beyond the row, and is read from a copy */
        uint8_t low[BYTES] = {0}, high[BYTES] = {0};
        const Place copied = {low, high};
        memcpy(low, w->low, (size_t)(left * low_bits / 8));
        if (high_bits)
            memcpy(high, w->high, (size_t)(left * high_bits / 8));
        add_vector(sums, &copied, x, first + vectors, scales, load_ints(lanes + vectors * LANES),
                   x_rows, low_bits, high_bits);
    }
}

/* A row of W by `x_rows` of x; `size` is that of its groups. */
TEMPLATE void multiply_groups(
    const Stored *stored, int64_t row, const Rows *x, const int32_t *lanes, int x_rows,
    int low_bits, int high_bits, int size, float totals[X_TOGETHER])
{
    const int64_t columns = stored->columns, whole = columns / size / LANES * LANES;
    const int64_t rest = columns - whole * size, of_vector = parted(low_bits) * BYTES;
    Place w = {stored->low + row * bytes_in_row(columns, low_bits),
               high_bits ? stored->high + row * bytes_in_row(columns, high_bits) : NULL};
    Floats sums[X_TOGETHER];
    UNROLL for (int m = 0; m < x_rows; m++) sums[m] = all_of(0);
    for (int64_t group = 0; group < whole; group += LANES)
        add_groups(sums, &w, x, stored, row, group, LANES * size / of_vector, 0, lanes, x_rows, low_bits,
                   high_bits);
    if (rest)
        add_groups(sums, &w, x, stored, row, whole, rest / of_vector, rest % of_vector, lanes, x_rows,
                   low_bits, high_bits);
    UNROLL for (int m = 0; m < x_rows; m++) totals[m] = total_of(sums[m]);
}

/* A row of bytes by `x_rows` of x: the first bytes' sums, raised, and the second bytes'. */
TEMPLATE void multiply_bytes(
    const Stored *stored, int64_t row, const Rows *x, int x_rows, float totals[X_TOGETHER])
{
    const int in_group = GROUP_OF_X / BYTES;
    const uint8_t *w = stored->low + row * stored->columns;
    const int64_t whole = stored->columns / BYTES;
    uint8_t last[BYTES] = {0};
    Floats sums[X_TOGETHER];
    UNROLL for (int m = 0; m < x_rows; m++) sums[m] = all_of(0);
    if (whole < x->vectors)
        memcpy(last, w + whole * BYTES, (size_t)(stored->columns - whole * BYTES));
    for (int64_t first = 0; first < x->vectors; first += in_group) {
        const int64_t group = first / in_group;
        Ints coarse[X_TOGETHER], fine[X_TOGETHER];
        UNROLL for (int m = 0; m < x_rows; m++) {
            coarse[m] = first_lane(x->starts[2 * m * x->groups + group]);
            fine[m] = first_lane(x->starts[(2 * m + 1) * x->groups + group]);
        }
        UNROLL for (int v = 0; v < in_group; v++) {
            const uint8_t *from = first + v < whole ? w + (first + v) * BYTES : last;
            const Bytes codes = load_bytes(from);
            will_read(from + AHEAD);
            UNROLL for (int m = 0; m < x_rows; m++) {
                const int8_t *at = x->codes + (m * x->vectors + first + v) * PARTS * BYTES;
                coarse[m] = dot_bytes(coarse[m], codes, load_bytes(at));
                fine[m] = dot_bytes(fine[m], codes, load_bytes(at + BYTES));
            }
        }
        UNROLL for (int m = 0; m < x_rows; m++)
            sums[m] = plus_product(sums[m], to_floats(raised(coarse[m], fine[m])),
                                   all_of(x->scales[m * x->groups + group]));
    }
    UNROLL for (int m = 0; m < x_rows; m++)
        totals[m] = total_of(sums[m]) * stored->row_scales[row];
}

/* With which constants: each call below becomes a loop of its own. */
TEMPLATE void multiply_sizes(
    const Stored *w, int64_t row, const Rows *x, const int32_t *lanes, int x_rows, int low_bits,
    int high_bits, float totals[X_TOGETHER])
{
    if (w->size == 32)
        multiply_groups(w, row, x, lanes, x_rows, low_bits, high_bits, 32, totals);
    else if (w->size == 64)
        multiply_groups(w, row, x, lanes, x_rows, low_bits, high_bits, 64, totals);
    else
        multiply_groups(w, row, x, lanes, x_rows, low_bits, high_bits, 128, totals);
}

TEMPLATE void multiply_bits(
    const Stored *w, int64_t row, const Rows *x, const int32_t *lanes, int x_rows,
    float totals[X_TOGETHER])
{
    if (w->low_bits == BITS_OF_BYTES)
        multiply_bytes(w, row, x, x_rows, totals);
    else if (w->low_bits == 2)
        multiply_sizes(w, row, x, lanes, x_rows, 2, 1, totals);
    else if (w->high_bits == 0)
        multiply_sizes(w, row, x, lanes, x_rows, 4, 0, totals);
    else if (w->high_bits == 1)
        multiply_sizes(w, row, x, lanes, x_rows, 4, 1, totals);
    else
        multiply_sizes(w, row, x, lanes, x_rows, 4, 2, totals);
}

static void multiply_row(
    const Stored *w, int64_t row, const Rows *x, const int32_t *lanes, int x_rows,
    float totals[X_TOGETHER])
{
    if (x_rows == X_TOGETHER)
        multiply_bits(w, row, x, lanes, X_TOGETHER, totals);
    else if (x_rows == 2)
        multiply_bits(w, row, x, lanes, 2, totals);
    else
        multiply_bits(w, row, x, lanes, 1, totals);
}

/* Row `row` of W by all of x. */
static void multiply_whole_row(
    const Stored *w, const Rounded *x, int64_t row, const int32_t *lanes, const Output *output)
{
    const int64_t vectors = x->padded_columns / (x->apart * BYTES);
    for (int64_t m = 0; m < x->padded_rows; m += X_TOGETHER) {
        const int64_t left = x->padded_rows - m;
        const int x_rows = left < X_TOGETHER ? (int)left : X_TOGETHER;
        const Rows rows = {
            x->codes + m * x->padded_columns * x->parts, x->starts + m * x->parts * x->groups,
            x->scales + m * x->groups, x->sums + m * x->groups, vectors, x->groups,
        };
        float totals[X_TOGETHER];
        multiply_row(w, row, &rows, lanes, x_rows, totals);
        for (int i = 0; i < x_rows && m + i < x->rows; i++)
            put(output, (m + i) * w->rows + row, totals[i]);
    }
}

/* The threads take many blocks at first, and ever fewer: long runs for the memory, and none waits long
 * for the other at the end. */
int multiply_few(const Stored *w, const Rounded *x, const Output *output, int threads)
{
    const int64_t blocks = (w->rows + BLOCK - 1) / BLOCK;
    const int used = w->rows * w->columns < LEAST_WORK ? 1 : threads;
    int32_t lanes[MOST_VECTORS * LANES]; /* which of LANES scales each lane of a vector takes */
    const int in_scale = w->size / (FOUR * x->apart);
    for (int i = 0; i < in_scale * LANES && x->apart > 1; i++)
        lanes[i] = i / in_scale;
#pragma omp parallel for num_threads(used) schedule(guided, 1) if (used > 1)
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t row = block * BLOCK; row < (block + 1) * BLOCK && row < w->rows; row++)
            multiply_whole_row(w, x, row, lanes, output);
    return 1;
}
