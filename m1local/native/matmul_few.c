/* A few rows of x by W as it streams from the memory: every byte of W is read once, in order.
 *
 * One vector holds bytes of one row of W; up to four rows of x share what was loaded. The codes of
 * even columns lie in the low bits of bytes, so x is parted into even and odd columns, instead of W
 * being arranged.
 */
#include "matmul.h"

#ifdef _OPENMP
#include <omp.h>
#endif

enum {
    X_TOGETHER = 4,
    AHEAD = 2048,         /* bytes */
    BLOCK = 32,           /* rows of W */
    BLOCKS_TAKEN = 4,     /* by a thread at a time */
    LEAST_WORK = 1 << 20, /* weights: fewer are not worth a second thread */
    BITS_OF_BYTES = 8
};

/* A row of W as it is multiplied, and its scales as floats. */
typedef struct {
    const uint8_t *low, *high;
    const float *scales;
} Row;

/* Vector `v` of a row of W by `x_rows` of x, from row `first` on, in groups. `in_vector` groups lie
 * in one vector, or a group in `-in_vector` vectors. */
INLINE void add_groups(
    Floats *sums, Pair w, const float *w_scales, const Rounded *x, int64_t vectors, int64_t v,
    int64_t first, int x_rows, int in_vector)
{
    const int64_t group = in_vector > 0 ? v * in_vector : v / -in_vector;
    const int groups = in_vector > 0 ? in_vector : 1;
    const Floats of_w = spread_over_lanes(w_scales + group, groups);
    UNROLL for (int m = 0; m < x_rows; m++) {
        const int64_t at = (first + m) * vectors + v;
        const Bytes even = load_bytes(x->codes + at * 2 * BYTES);
        const Bytes odd = load_bytes(x->codes + at * 2 * BYTES + BYTES);
        const Ints start = load_ints(x->starts + at * 2 * LANES);
        const Floats of_x = spread_over_lanes(x->scales + (first + m) * x->groups + group, groups);
        const Ints dot = dot_codes(dot_codes(start, w.even, even), w.odd, odd);
        sums[m] = plus_product(sums[m], to_floats(dot), times(of_w, of_x));
    }
}

/* The same for rows of bytes, whose scale comes last; a group of x takes some vectors. */
INLINE void add_bytes(
    Floats *sums, Bytes w, const Rounded *x, int64_t vectors, int64_t v, int64_t first, int x_rows)
{
    UNROLL for (int m = 0; m < x_rows; m++) {
        const int64_t at = (first + m) * vectors + v;
        const Bytes coarse = load_bytes(x->codes + at * 2 * BYTES);
        const Bytes fine = load_bytes(x->codes + at * 2 * BYTES + BYTES);
        const Ints start = load_ints(x->starts + at * 2 * LANES);
        const Ints more = load_ints(x->starts + at * 2 * LANES + LANES);
        const float scale = x->scales[(first + m) * x->groups + v / (GROUP_OF_X / BYTES)];
        const Ints dot = dot_bytes(raised(dot_bytes(start, w, coarse), more), w, fine);
        sums[m] = plus_product(sums[m], to_floats(dot), all_of(scale));
    }
}

/* All vectors of a row of W; the last may reach beyond the row, and is read from a copy. */
INLINE void multiply_vectors(
    Row w, const Rounded *x, int64_t first, int x_rows, int low_bits, int high_bits, int in_vector,
    float totals[X_TOGETHER])
{
    const int columns = x->apart * BYTES;
    const int64_t vectors = x->padded_columns / columns, inside = x->columns / columns;
    const int low_bytes = columns * low_bits / 8, high_bytes = columns * high_bits / 8;
    uint8_t low[BYTES] = {0}, high[BYTES] = {0};
    Floats sums[X_TOGETHER];
    UNROLL for (int m = 0; m < x_rows; m++) sums[m] = all_of(0);
    for (int64_t v = 0; v < vectors; v++) {
        if (v == inside) {
            const int64_t left = x->columns - v * columns;
            memcpy(low, w.low, (size_t)(left * low_bits / 8));
            w.low = low;
            if (high_bits) {
                memcpy(high, w.high, (size_t)(left * high_bits / 8));
                w.high = high;
            }
        }
        if (low_bits == BITS_OF_BYTES)
            add_bytes(sums, load_bytes(w.low), x, vectors, v, first, x_rows);
        else
            add_groups(sums, load_codes(w.low, w.high, low_bits, high_bits), w.scales, x, vectors,
                       v, first, x_rows, in_vector);
        will_read(w.low + AHEAD); /* the next rows, at the same place */
        w.low += low_bytes;
        if (high_bits) {
            will_read(w.high + AHEAD);
            w.high += high_bytes;
        }
    }
    UNROLL for (int m = 0; m < x_rows; m++) totals[m] = total_of(sums[m]);
}

/* With which constants: each call below becomes a loop of its own. */
INLINE void multiply_groups(
    Row w, const Rounded *x, int64_t first, int x_rows, int low_bits, int high_bits, float *totals)
{
    if (x->size == 2 * BYTES)
        multiply_vectors(w, x, first, x_rows, low_bits, high_bits, 1, totals);
    else if (x->size == BYTES)
        multiply_vectors(w, x, first, x_rows, low_bits, high_bits, 2, totals);
    else if (x->size < BYTES)
        multiply_vectors(w, x, first, x_rows, low_bits, high_bits, 4, totals);
    else
        multiply_vectors(w, x, first, x_rows, low_bits, high_bits, -2, totals);
}

INLINE void multiply_bits(
    const Stored *stored, Row w, const Rounded *x, int64_t first, int x_rows, float *totals)
{
    if (stored->low_bits == BITS_OF_BYTES)
        multiply_vectors(w, x, first, x_rows, BITS_OF_BYTES, 0, 1, totals);
    else if (stored->low_bits == 2)
        multiply_groups(w, x, first, x_rows, 2, 1, totals);
    else if (stored->high_bits == 0)
        multiply_groups(w, x, first, x_rows, 4, 0, totals);
    else if (stored->high_bits == 1)
        multiply_groups(w, x, first, x_rows, 4, 1, totals);
    else
        multiply_groups(w, x, first, x_rows, 4, 2, totals);
}

static void multiply_row(
    const Stored *stored, Row w, const Rounded *x, int64_t first, int x_rows, float *totals)
{
    if (x_rows == X_TOGETHER)
        multiply_bits(stored, w, x, first, X_TOGETHER, totals);
    else if (x_rows == 2)
        multiply_bits(stored, w, x, first, 2, totals);
    else
        multiply_bits(stored, w, x, first, 1, totals);
}

static float product_of_zeros(const bfloat16 *zeros, const float *sums, int64_t groups)
{
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t group = 0; group < groups; group++)
        total += widened(zeros[group]) * sums[group];
    return total;
}

/* Row `row` of W by all of x. */
static void multiply_whole_row(
    const Stored *stored, const Rounded *x, int64_t row, float *scales, const Output *output)
{
    const int64_t groups = stored->row_scales ? 0 : stored->columns / stored->size;
    const int64_t low_bytes = bytes_in_row(stored->columns, stored->low_bits);
    const int64_t high_bytes = bytes_in_row(stored->columns, stored->high_bits);
    const Row w = {stored->low + row * low_bytes,
                   high_bytes ? stored->high + row * high_bytes : NULL, scales};
    for (int64_t group = 0; group < groups; group++)
        scales[group] = widened(stored->scales[row * groups + group]);
    for (int64_t m = 0; m < x->padded_rows; m += X_TOGETHER) {
        const int64_t left = x->padded_rows - m;
        const int x_rows = left < X_TOGETHER ? (int)left : X_TOGETHER;
        float totals[X_TOGETHER];
        multiply_row(stored, w, x, m, x_rows, totals);
        for (int i = 0; i < x_rows && m + i < x->rows; i++) {
            const float value =
                stored->row_scales
                    ? totals[i] * stored->row_scales[row]
                    : totals[i] + product_of_zeros(stored->zeros + row * groups,
                                                   x->sums + (m + i) * x->groups, groups);
            put(output, (m + i) * stored->rows + row, value);
        }
    }
}

static int thread_number(void)
{
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

/* The threads take a few blocks at a time: one that has to wait for another program holds nobody
 * up. */
int multiply_few(const Stored *w, const Rounded *x, const Output *output, int threads)
{
    const int64_t blocks = (w->rows + BLOCK - 1) / BLOCK, per_row = x->groups + 4;
    const int used = w->rows * w->columns < LEAST_WORK ? 1 : threads;
    float *scratch = whole((size_t)used * (size_t)per_row * sizeof(float));
    if (!scratch)
        return 0;
#pragma omp parallel for num_threads(used) schedule(dynamic, BLOCKS_TAKEN) if (used > 1)
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t row = block * BLOCK; row < (block + 1) * BLOCK && row < w->rows; row++)
            multiply_whole_row(w, x, row, scratch + thread_number() * per_row, output);
    give_back(scratch);
    return 1;
}
