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
    BLOCKS_TAKEN = 16,    /* by a thread at a time, at most */
    LEAST_WORK = 1 << 20, /* weights: fewer are not worth a second thread */
    BITS_OF_BYTES = 8
};

/* A row of W as it is multiplied. (Two at once share what is loaded of x, and are slower: the memory
 * likes one stream.) */
typedef struct {
    const uint8_t *low, *high;
    const float *scales; /* [row of x][group]: of W times of x; of groups only */
    int64_t stride;      /* of a row of x there */
} Row;

/* What a few rows of x have for them: from their first vector and group on. */
typedef struct {
    const int8_t *codes;
    const int32_t *starts;
    const float *scales;
    int64_t vectors, groups; /* of a row */
} Rows;

/* A vector of some rows of W by `x_rows` of x, in groups, of which `groups` lie in a vector. */
TEMPLATE void add_groups(
    Floats *sums, const Row *w, const Rows *x, int64_t v, int64_t group, int x_rows,
    int low_bits, int high_bits, int groups)
{
    const Pair codes = load_codes(w->low, w->high, low_bits, high_bits);
    UNROLL for (int m = 0; m < x_rows; m++) {
        const int8_t *at = x->codes + (m * x->vectors + v) * 2 * BYTES;
        const Bytes even = load_bytes(at), odd = load_bytes(at + BYTES);
        const float *scales = w->scales + m * w->stride + group;
        const Ints dot = dot_codes(dot_codes(all_ints(0), codes.even, even), codes.odd, odd);
        sums[m] = plus_product(sums[m], to_floats(dot), spread_over_lanes(scales, groups));
    }
}

/* The same for rows of bytes, whose scale comes last; a group of x takes some vectors. */
TEMPLATE void add_bytes(
    Floats *sums, const Row *w, const Rows *x, int64_t v, int x_rows)
{
    const Bytes codes = load_bytes(w->low);
    UNROLL for (int m = 0; m < x_rows; m++) {
        const int64_t at = m * x->vectors + v;
        const Bytes coarse = load_bytes(x->codes + at * 2 * BYTES);
        const Bytes fine = load_bytes(x->codes + at * 2 * BYTES + BYTES);
        const Ints start = load_ints(x->starts + at * 2 * LANES);
        const Ints more = load_ints(x->starts + at * 2 * LANES + LANES);
        const Floats scale = all_of(x->scales[m * x->groups + v / (GROUP_OF_X / BYTES)]);
        const Ints dot = dot_bytes(raised(dot_bytes(start, codes, coarse), more), codes, fine);
        sums[m] = plus_product(sums[m], to_floats(dot), scale);
    }
}

/* Vector `v` of some rows of W. `in_vector` groups lie in one vector, or a group in `-in_vector`. */
TEMPLATE void add_vector(
    Floats *sums, const Row *w, const Rows *x, int64_t v, int x_rows, int low_bits,
    int high_bits, int in_vector)
{
    if (low_bits == BITS_OF_BYTES)
        add_bytes(sums, w, x, v, x_rows);
    else
        add_groups(sums, w, x, v, in_vector > 0 ? v * in_vector : v / -in_vector, x_rows,
                   low_bits, high_bits, in_vector > 0 ? in_vector : 1);
}

/* All vectors of some rows of W; the last may reach beyond the row, and is read from a copy. */
TEMPLATE void multiply_vectors(
    Row w, const Rounded *rounded_x, int64_t first, int x_rows, int low_bits,
    int high_bits, int in_vector, float totals[X_TOGETHER])
{
    const int columns = (low_bits == BITS_OF_BYTES ? 1 : 2) * BYTES;
    const int low_bytes = columns * low_bits / 8, high_bytes = columns * high_bits / 8;
    const int64_t vectors = rounded_x->padded_columns / columns;
    const int64_t inside = rounded_x->columns / columns;
    const Rows x = {
        rounded_x->codes + first * vectors * 2 * BYTES,
        rounded_x->starts + first * vectors * 2 * LANES,
        rounded_x->scales + first * rounded_x->groups,
        vectors,
        rounded_x->groups,
    };
    Floats sums[X_TOGETHER];
    UNROLL for (int m = 0; m < x_rows; m++) sums[m] = all_of(0);
    for (int64_t v = 0; v < inside; v++) {
        add_vector(sums, &w, &x, v, x_rows, low_bits, high_bits, in_vector);
        will_read(w.low + AHEAD); /* the next rows, at the same place */
        w.low += low_bytes;
        if (high_bits) {
            will_read(w.high + AHEAD);
            w.high += high_bytes;
        }
    }
    if (inside < vectors) {
        const int64_t left = rounded_x->columns - inside * columns;
        uint8_t low[BYTES] = {0}, high[BYTES] = {0};
        memcpy(low, w.low, (size_t)(left * low_bits / 8));
        w.low = low;
        if (high_bits) {
            memcpy(high, w.high, (size_t)(left * high_bits / 8));
            w.high = high;
        }
        add_vector(sums, &w, &x, inside, x_rows, low_bits, high_bits, in_vector);
    }
    UNROLL for (int m = 0; m < x_rows; m++) totals[m] = total_of(sums[m]);
}

/* With which constants: each call below becomes a loop of its own. */
TEMPLATE void multiply_groups(
    Row w, const Rounded *x, int64_t first, int x_rows, int low_bits, int high_bits,
    float totals[X_TOGETHER])
{
    if (x->size == 2 * BYTES)
        multiply_vectors(w, x, first, x_rows, low_bits, high_bits, 1, totals);
    else if (x->size == BYTES)
        multiply_vectors(w, x, first, x_rows, low_bits, high_bits, 2, totals);
    else /* of 32, 64 and 128, whichever is left */
        multiply_vectors(w, x, first, x_rows, low_bits, high_bits, BYTES == 32 ? -2 : 4, totals);
}

TEMPLATE void multiply_bits(
    const Stored *stored, Row w, const Rounded *x, int64_t first, int x_rows,
    float totals[X_TOGETHER])
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
    const Stored *stored, Row w, const Rounded *x, int64_t first, int x_rows,
    float totals[X_TOGETHER])
{
    if (x_rows == X_TOGETHER)
        multiply_bits(stored, w, x, first, X_TOGETHER, totals);
    else if (x_rows == 2)
        multiply_bits(stored, w, x, first, 2, totals);
    else
        multiply_bits(stored, w, x, first, 1, totals);
}

/* The scales of a row of W times those of a row of x; returns what the zeros contribute, and the
 * codes' middle: a code of 0 stands for zero - middle * scale. */
static float join_scales(
    const Stored *w, const Rounded *x, int64_t row, int64_t row_of_x, float *restrict products)
{
    const int64_t groups = w->columns / w->size;
    const bfloat16 *scales = w->scales + row * groups, *zeros = w->zeros + row * groups;
    const float *of_x = x->scales + row_of_x * x->groups, *sums = x->sums + row_of_x * x->groups;
    const float middle = (float)w->middle;
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t group = 0; group < groups; group++) {
        const float scale = widened(scales[group]);
        products[group] = scale * of_x[group];
        total += (widened(zeros[group]) - middle * scale) * sums[group];
    }
    return total;
}

/* Row `row` of W by all of x. */
static void multiply_whole_row(
    const Stored *stored, const Rounded *x, int64_t row, float *scales, const Output *output)
{
    const int64_t low_bytes = bytes_in_row(stored->columns, stored->low_bits);
    const int64_t high_bytes = bytes_in_row(stored->columns, stored->high_bits);
    const Row w = {stored->low + row * low_bytes,
                   high_bytes ? stored->high + row * high_bytes : NULL, scales, x->groups + 4};
    for (int64_t m = 0; m < x->padded_rows; m += X_TOGETHER) {
        const int64_t left = x->padded_rows - m;
        const int x_rows = left < X_TOGETHER ? (int)left : X_TOGETHER;
        float totals[X_TOGETHER], rest[X_TOGETHER] = {0};
        if (!stored->row_scales)
            for (int i = 0; i < x_rows; i++)
                rest[i] = join_scales(stored, x, row, m + i, scales + i * w.stride);
        multiply_row(stored, w, x, m, x_rows, totals);
        for (int i = 0; i < x_rows && m + i < x->rows; i++)
            put(output, (m + i) * stored->rows + row,
                stored->row_scales ? totals[i] * stored->row_scales[row] : totals[i] + rest[i]);
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

/* The scales beyond a row's last group must be zeros: they meet zeros, and would make no number of
 * them. The threads take some blocks at a time: long runs for the memory, yet a thread that has to wait
 * for another program holds nobody up. */
int multiply_few(const Stored *w, const Rounded *x, const Output *output, int threads)
{
    const int64_t blocks = (w->rows + BLOCK - 1) / BLOCK, room = X_TOGETHER * (x->groups + 4);
    const int used = w->rows * w->columns < LEAST_WORK ? 1 : threads;
    const int64_t share = blocks / (4 * used) + 1;
    const int taken = share < BLOCKS_TAKEN ? (int)share : BLOCKS_TAKEN;
    float *scratch = whole((size_t)used * (size_t)room * sizeof(float));
    if (!scratch)
        return 0;
#pragma omp parallel for num_threads(used) schedule(dynamic, taken) if (used > 1)
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t row = block * BLOCK; row < (block + 1) * BLOCK && row < w->rows; row++)
            multiply_whole_row(w, x, row, scratch + thread_number() * room, output);
    give_back(scratch);
    return 1;
}
