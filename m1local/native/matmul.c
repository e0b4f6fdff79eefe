/* x @ W.T for W as the checkpoint stores it: groups of 4 bits (m1local/formats/groups.py) or rows of
 * bytes (int8.py), read where they lie, mapped files included; nothing is packed or copied.
 *
 * The rows of x are rounded to bytes, each group of their columns with a scale of its own, so that
 * products are whole numbers; all that is lost is that rounding, a 254th of a group's greatest at
 * most. For W of bytes, which deserves better, a second byte holds what the first has lost, in steps
 * of a 256th: reading W takes longer than multiplying twice. One vector holds bytes of one row of W; four rows of W and up to four of x share what was
 * loaded. The codes of even columns lie in the low halves of bytes, so x is parted into even and odd
 * columns, instead of W being arranged.
 */
#include <math.h>
#include <stdlib.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "common.h"
#include "lanes.h"

enum {
    ROWS_TOGETHER = 4,  /* of W, and of x */
    FEW = 4,            /* rows of x: W is read from the memory in one stream, a row at a time */
    AHEAD = 2048,       /* bytes */
    GROUP_OF_X = 64,    /* columns of x that share a scale where W has no groups */
    BLOCK = 32,         /* rows of W, and of x, that stay in the cache while they are multiplied */
    BLOCKS_TAKEN = 4,   /* by a thread at a time */
    LEAST_WORK = 1 << 20, /* weights: fewer are not worth a second thread */
    LEAST_ROUNDED = 1 << 16 /* values of x, the same */
};

/* The rows of x, rounded. Everything is padded with zeros to whole vectors and TOGETHER rows. */
typedef struct {
    int64_t rows, padded_rows, columns, vectors; /* vectors of W in a row */
    int size, parts;                             /* of a group; of x in a vector of W: 2 for nibbles */
    int fine;                                    /* whether there are second bytes */
    int64_t groups;
    int8_t *codes;     /* [row][vector][part][BYTES]; for W of bytes what is lost is the 2nd part */
    int32_t *starts;   /* [row][vector][LANES]: what an integer sum begins with; then the 2nd's */
    float *scales;     /* [row][group] */
    float *sums;       /* [row][group]: of the rounded x */
} Rounded;

/* Zeros, where vectors begin at multiples of their size; `give_back` frees them. */
static void *whole(size_t bytes)
{
    char *all = calloc(bytes + 128, 1);
    if (!all)
        return NULL;
    char *aligned = all + 64 - (uintptr_t)all % 64;
    aligned[-1] = (char)(aligned - all);
    return aligned;
}

static void give_back(void *aligned)
{
    if (aligned)
        free((char *)aligned - ((char *)aligned)[-1]);
}

static void forget(Rounded *x)
{
    give_back(x->codes);
    give_back(x->starts);
    give_back(x->scales);
    give_back(x->sums);
}

static int make_room(Rounded *x)
{
    const size_t vectors = (size_t)x->padded_rows * (size_t)x->vectors;
    const size_t groups = (size_t)x->padded_rows * (size_t)x->groups;
    x->codes = whole(vectors * 2 * BYTES);
    x->starts = whole(vectors * 2 * LANES * sizeof(int32_t));
    x->scales = whole(groups * sizeof(float));
    x->sums = whole(groups * sizeof(float));
    return x->codes && x->starts && x->scales && x->sums;
}

/* One group of a row to bytes; returns their scale, no number where one of the values is none. */
static float round_group(
    const void *source, int is_wide, int64_t at, int count, int8_t *to, int8_t *lost)
{
    float values[128], greatest = 0, zero = 0;
    for (int i = 0; i < count; i++)
        values[i] = is_wide ? ((const float *)source)[at + i]
                            : widened(((const bfloat16 *)source)[at + i]);
    for (int i = 0; i < count; i++)
        greatest = fabsf(values[i]) > greatest ? fabsf(values[i]) : greatest;
#pragma omp simd reduction(+ : zero)
    for (int i = 0; i < count; i++)
        zero += values[i] * 0.0f;
    if (zero != 0) { /* infinite, or no number */
        memset(to, 0, (size_t)count);
        memset(lost, 0, (size_t)count);
        return zero;
    }
    const float scale = greatest / 127, inverse = inverse_of(scale);
    for (int i = 0; i < count; i++) {
        const float exact = values[i] * inverse, code = nearbyintf(exact);
        const float rest = nearbyintf((exact - code) * 256);
        to[i] = (int8_t)code;
        lost[i] = (int8_t)(rest > 127 ? 127 : rest < -127 ? -127 : rest);
    }
    return scale;
}

/* Bytes of a row where W's vectors want them, and what their sums begin with. */
static void lay_out(
    const Rounded *x, const int8_t *line, int64_t row, int part, int middle)
{
    const int columns = x->parts * BYTES, per_lane = columns / LANES, step = x->parts;
    for (int64_t v = 0; v < x->vectors; v++) {
        const int64_t at = row * x->vectors + v;
        const int8_t *from = line + v * columns;
        int8_t *to = x->codes + (at * 2 + part) * BYTES;
        int32_t *start = x->starts + (at * 2 + part) * LANES;
        for (int p = 0; p < step; p++)
            for (int i = 0; i < BYTES; i++)
                to[p * BYTES + i] = from[i * step + p];
        for (int lane = 0; lane < LANES; lane++) {
            int32_t sum = 0;
            for (int i = 0; i < per_lane; i++)
                sum += from[lane * per_lane + i];
            start[lane] = -middle * sum;
        }
    }
}

/* A row of x: its bytes, its scales and sums; `line` has room for it twice. */
static void round_row(Rounded *x, const void *source, int is_wide, int64_t row, int middle,
                      int8_t *line)
{
    float *scales = x->scales + row * x->groups, *sums = x->sums + row * x->groups;
    int8_t *lost = line + x->vectors * x->parts * BYTES;
    for (int64_t group = 0; group * x->size < x->columns; group++) {
        const int64_t first = group * x->size, left = x->columns - first;
        const int count = left < x->size ? (int)left : x->size;
        int32_t sum = 0;
        const float scale = round_group(source, is_wide, row * x->columns + first, count,
                                        line + first, lost + first);
        for (int i = 0; i < count; i++)
            sum += line[first + i];
        sums[group] = scale * (float)sum;
        scales[group] = x->fine ? scale / 256 : scale;
    }
    lay_out(x, line, row, 0, middle);
    if (x->fine)
        lay_out(x, lost, row, 1, middle);
}

/* Round all rows of x; 0 where there is no memory for them. */
static int round_rows(Rounded *x, const void *source, int is_wide, int middle, int threads)
{
    const size_t line = (size_t)x->vectors * (size_t)x->parts * BYTES * 2;
    const int64_t wanted = x->rows * x->columns < LEAST_ROUNDED ? 1 : threads;
    const int64_t used = wanted < x->rows ? wanted : x->rows;
    int8_t *lines = whole((size_t)used * line);
    if (!make_room(x) || !lines) {
        give_back(lines);
        return 0;
    }
#pragma omp parallel for num_threads((int)used) schedule(static) if (used > 1)
    for (int64_t part = 0; part < used; part++)
        for (int64_t row = part; row < x->rows; row += used)
            round_row(x, source, is_wide, row, middle, lines + (size_t)part * line);
    give_back(lines);
    return 1;
}

/* Some rows of W as they are multiplied: where they lie, and their scales as floats. */
typedef struct {
    const uint8_t *codes[ROWS_TOGETHER];
    const float *scales[ROWS_TOGETHER];
    int64_t bytes; /* of a row */
} Weights;

typedef struct {
    Floats of[ROWS_TOGETHER][ROWS_TOGETHER]; /* [row of W][row of x] */
} Sums;

/* Vector `v` of `w_rows` rows of W, at `codes`, by `x_rows` of x, from row `first` on, in groups.
 * `in_vector` groups lie in one vector, or a group in `-in_vector` vectors. */
INLINE void add_groups(
    Sums *sums, const uint8_t *const *codes, const Weights *w, const Rounded *x, int64_t v,
    int64_t first, int w_rows, int x_rows, int in_vector)
{
    const int64_t group = in_vector > 0 ? v * in_vector : v / -in_vector;
    const int spread = in_vector > 0 ? in_vector : 1;
    Bytes low[ROWS_TOGETHER], high[ROWS_TOGETHER];
    Floats scales[ROWS_TOGETHER];
    UNROLL for (int r = 0; r < w_rows; r++) {
        const Bytes both = load_bytes(codes[r]);
        low[r] = low_nibbles(both);
        high[r] = high_nibbles(both);
        scales[r] = spread_over_lanes(w->scales[r] + group, spread);
    }
    UNROLL for (int m = 0; m < x_rows; m++) {
        const int64_t at = (first + m) * x->vectors + v;
        const Bytes even = load_bytes(x->codes + at * 2 * BYTES);
        const Bytes odd = load_bytes(x->codes + at * 2 * BYTES + BYTES);
        const Ints start = load_ints(x->starts + at * 2 * LANES);
        const Floats of_x = spread_over_lanes(x->scales + (first + m) * x->groups + group, spread);
        UNROLL for (int r = 0; r < w_rows; r++) {
            const Ints dot = dot_codes(dot_codes(start, low[r], even), high[r], odd);
            sums->of[r][m] = plus_product(sums->of[r][m], to_floats(dot), times(scales[r], of_x));
        }
    }
}

/* The same for rows of bytes, whose scale comes last; a group of x takes some vectors. */
INLINE void add_bytes(
    Sums *sums, const uint8_t *const *codes, const Rounded *x, int64_t v, int64_t first,
    int w_rows, int x_rows, int vectors_in_group)
{
    Bytes weights[ROWS_TOGETHER];
    UNROLL for (int r = 0; r < w_rows; r++) weights[r] = load_bytes(codes[r]);
    UNROLL for (int m = 0; m < x_rows; m++) {
        const int64_t at = (first + m) * x->vectors + v;
        const Bytes coarse = load_bytes(x->codes + at * 2 * BYTES);
        const Bytes fine = load_bytes(x->codes + at * 2 * BYTES + BYTES);
        const Ints start = load_ints(x->starts + at * 2 * LANES);
        const Ints more = load_ints(x->starts + at * 2 * LANES + LANES);
        const Floats of_x = all_of(x->scales[(first + m) * x->groups + v / vectors_in_group]);
        UNROLL for (int r = 0; r < w_rows; r++) {
            const Ints first_dot = dot_bytes(start, weights[r], coarse);
            const Ints dot = dot_bytes(raised(first_dot, more), weights[r], fine);
            sums->of[r][m] = plus_product(sums->of[r][m], to_floats(dot), of_x);
        }
    }
}

/* All vectors of some rows of W; the last may reach beyond the rows, and is read from a copy. */
INLINE void multiply_vectors(
    const Weights *w, const Rounded *x, int64_t first, int w_rows, int x_rows, int parts,
    int in_vector, float totals[ROWS_TOGETHER][ROWS_TOGETHER])
{
    const int64_t whole_vectors = w->bytes / BYTES;
    const uint8_t *codes[ROWS_TOGETHER];
    Sums sums;
    UNROLL for (int r = 0; r < w_rows; r++) {
        codes[r] = w->codes[r];
        UNROLL for (int m = 0; m < x_rows; m++) sums.of[r][m] = all_of(0);
    }
    for (int64_t v = 0; v < whole_vectors; v++) {
        if (parts == 1)
            add_bytes(&sums, codes, x, v, first, w_rows, x_rows, in_vector);
        else
            add_groups(&sums, codes, w, x, v, first, w_rows, x_rows, in_vector);
        UNROLL for (int r = 0; r < w_rows; r++) {
            will_read(codes[r] + AHEAD); /* the next rows, at the same place */
            codes[r] += BYTES;
        }
    }
    if (whole_vectors < x->vectors) {
        uint8_t padded[ROWS_TOGETHER][BYTES] = {{0}};
        UNROLL for (int r = 0; r < w_rows; r++) {
            memcpy(padded[r], codes[r], (size_t)(w->bytes % BYTES));
            codes[r] = padded[r];
        }
        if (parts == 1)
            add_bytes(&sums, codes, x, whole_vectors, first, w_rows, x_rows, in_vector);
        else
            add_groups(&sums, codes, w, x, whole_vectors, first, w_rows, x_rows, in_vector);
    }
    UNROLL for (int r = 0; r < w_rows; r++)
        UNROLL for (int m = 0; m < x_rows; m++) totals[r][m] = total_of(sums.of[r][m]);
}

/* With which constants: each call below becomes a loop of its own. */
INLINE void multiply_some(
    const Weights *w, const Rounded *x, int64_t first, int w_rows, int x_rows,
    float totals[ROWS_TOGETHER][ROWS_TOGETHER])
{
    if (x->parts == 1)
        multiply_vectors(w, x, first, w_rows, x_rows, 1, GROUP_OF_X / BYTES, totals);
    else if (x->size == 2 * BYTES)
        multiply_vectors(w, x, first, w_rows, x_rows, 2, 1, totals);
    else if (x->size == BYTES)
        multiply_vectors(w, x, first, w_rows, x_rows, 2, 2, totals);
    else if (x->size < BYTES)
        multiply_vectors(w, x, first, w_rows, x_rows, 2, 4, totals);
    else
        multiply_vectors(w, x, first, w_rows, x_rows, 2, -2, totals);
}

static void multiply_tile(
    const Weights *w, const Rounded *x, int64_t first, int w_rows, int x_rows,
    float totals[ROWS_TOGETHER][ROWS_TOGETHER])
{
    if (w_rows == ROWS_TOGETHER)
        multiply_some(w, x, first, ROWS_TOGETHER, ROWS_TOGETHER, totals);
    else if (x_rows == ROWS_TOGETHER)
        multiply_some(w, x, first, 1, ROWS_TOGETHER, totals);
    else if (x_rows == 2)
        multiply_some(w, x, first, 1, 2, totals);
    else
        multiply_some(w, x, first, 1, 1, totals);
}

/* W as it is stored. */
typedef struct {
    const uint8_t *codes;
    const bfloat16 *scales, *zeros; /* [row][group]; of rows of bytes there are none */
    const float *row_scales;        /* of rows of bytes */
    int64_t rows, columns;
} Stored;

typedef struct {
    void *at;
    int is_wide;
} Output;

static void put(const Output *output, int64_t index, float value)
{
    if (output->is_wide)
        ((float *)output->at)[index] = value;
    else
        ((bfloat16 *)output->at)[index] = rounded(value);
}

static float product_of_zeros(const bfloat16 *zeros, const float *sums, int64_t groups)
{
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t group = 0; group < groups; group++)
        total += widened(zeros[group]) * sums[group];
    return total;
}

/* Up to four rows of W, from `row` on, by the rows of x from `first` to `last`. */
static void multiply_rows_of_w(
    const Stored *w, const Rounded *x, int64_t row, int count, int64_t first, int64_t last,
    float *scales, const Output *output)
{
    Weights some = {.bytes = w->columns / x->parts};
    const int64_t groups = w->row_scales ? 0 : w->columns / x->size;
    for (int r = 0; r < count; r++) {
        some.codes[r] = w->codes + (row + r) * some.bytes;
        some.scales[r] = scales + r * (x->groups + 4);
        for (int64_t group = 0; group < groups; group++)
            scales[r * (x->groups + 4) + group] = widened(w->scales[(row + r) * groups + group]);
    }
    for (int64_t m = first; m < last; m += ROWS_TOGETHER) {
        const int x_rows = x->padded_rows - m < ROWS_TOGETHER ? (int)(x->padded_rows - m)
                                                              : ROWS_TOGETHER;
        float sums[ROWS_TOGETHER][ROWS_TOGETHER];
        multiply_tile(&some, x, m, count, x_rows, sums);
        for (int r = 0; r < count; r++)
            for (int i = 0; i < x_rows && m + i < x->rows; i++) {
                const float value =
                    w->row_scales ? sums[r][i] * w->row_scales[row + r]
                                  : sums[r][i] + product_of_zeros(
                                        w->zeros + (row + r) * groups,
                                        x->sums + (m + i) * x->groups, groups);
                put(output, (m + i) * w->rows + row + r, value);
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

/* A block of rows of W by all of x, in blocks of x. */
static void multiply_block(
    const Stored *w, const Rounded *x, int64_t block, float *scales, const Output *output)
{
    const int64_t end = (block + 1) * BLOCK < w->rows ? (block + 1) * BLOCK : w->rows;
    for (int64_t first = 0; first < x->padded_rows; first += BLOCK) {
        const int64_t last = first + BLOCK < x->padded_rows ? first + BLOCK : x->padded_rows;
        int count = ROWS_TOGETHER;
        for (int64_t row = block * BLOCK; row < end; row += count) {
            count = end - row < ROWS_TOGETHER || x->rows <= FEW ? 1 : ROWS_TOGETHER;
            multiply_rows_of_w(w, x, row, count, first, last, scales, output);
        }
    }
}

/* All of W by all of x, in blocks that stay in the cache; 0 where there is no memory. The threads
 * take a few blocks at a time: one that has to wait for another program holds nobody up. */
static int multiply(const Stored *w, const Rounded *x, const Output *output, int threads)
{
    const int64_t blocks = (w->rows + BLOCK - 1) / BLOCK, per_row = x->groups + 4;
    const int used = w->rows * w->columns < LEAST_WORK ? 1 : threads;
    float *scratch = whole((size_t)used * ROWS_TOGETHER * (size_t)per_row * sizeof(float));
    if (!scratch)
        return 0;
#pragma omp parallel for num_threads(used) schedule(dynamic, BLOCKS_TAKEN) if (used > 1)
    for (int64_t block = 0; block < blocks; block++)
        multiply_block(w, x, block, scratch + thread_number() * ROWS_TOGETHER * per_row, output);
    give_back(scratch);
    return 1;
}

static int multiply_stored(
    const void *source, int is_wide, int64_t rows, const Stored *w, int size, int parts, int middle,
    void *target, int threads)
{
    const int columns = parts * BYTES;
    Rounded x = {
        .rows = rows,
        .padded_rows = rows < 3 ? rows : (rows + ROWS_TOGETHER - 1) / ROWS_TOGETHER * ROWS_TOGETHER,
        .columns = w->columns,
        .vectors = (w->columns + columns - 1) / columns,
        .size = size,
        .parts = parts,
        .fine = parts == 1,
    };
    const Output output = {target, is_wide};
    x.groups = (x.vectors * columns + size - 1) / size;
    const int done = round_rows(&x, source, is_wide, middle, threads)
                     && multiply(w, &x, &output, threads);
    forget(&x);
    return done;
}

/* x (rows, columns) in groups of 4 bits: `codes` (n, columns / 2), scales and zeros (n, groups). */
M1_EXPORT int m1_multiply_int4(
    const void *x, int is_wide, int64_t rows, const uint8_t *codes, const bfloat16 *scales,
    const bfloat16 *zeros, int64_t n, int64_t columns, int size, void *target, int threads)
{
    const Stored w = {codes, scales, zeros, NULL, n, columns};
    return multiply_stored(x, is_wide, rows, &w, size, 2, 8, target, threads);
}

/* x (rows, columns) by rows of bytes: `codes` (n, columns), `scales` (n). */
M1_EXPORT int m1_multiply_int8(
    const void *x, int is_wide, int64_t rows, const int8_t *codes, const float *scales, int64_t n,
    int64_t columns, void *target, int threads)
{
    const Stored w = {(const uint8_t *)codes, NULL, NULL, scales, n, columns};
    return multiply_stored(x, is_wide, rows, &w, GROUP_OF_X, 1, SHIFTED ? 128 : 0, target, threads);
}

M1_EXPORT const char *m1_lanes(void) { return LANES_NAME; }
