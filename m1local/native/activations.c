/* Rounds the rows of x to bytes, and lays them out as the products want them (activations.h). */
#include "activations.h"

#include <math.h>
#include <stdlib.h>

#ifdef _OPENMP
#include <omp.h>
#endif

enum { LEAST_ROUNDED = 1 << 16 /* values of x: fewer are not worth a second thread */ };

#ifdef _MSC_VER
#define OF_THREAD static __declspec(thread)
#else
#define OF_THREAD static _Thread_local
#endif

/* What is lent is taken from its beginning, and is free again when all of it was given back. */
OF_THREAD struct {
    char *at;
    size_t bytes, taken;
    int held;
} lent;
OF_THREAD int64_t allocated; /* times */

void lend(void *room, size_t bytes)
{
    lent.at = room;
    lent.bytes = bytes;
    lent.taken = 0;
    lent.held = 0;
}

M1_EXPORT int64_t m1_allocations(void) { return allocated; }

static char *some(size_t bytes, int are_zeros)
{
    if (bytes > lent.bytes - lent.taken) {
        allocated++;
        return are_zeros ? calloc(bytes, 1) : malloc(bytes);
    }
    char *found = lent.at + lent.taken;
    lent.held++;
    lent.taken += bytes;
    return are_zeros ? memset(found, 0, bytes) : found;
}

static void *aligned_in(char *all)
{
    if (!all)
        return NULL;
    char *aligned = all + 64 - (uintptr_t)all % 64;
    aligned[-1] = (char)(aligned - all);
    return aligned;
}

void *whole(size_t bytes) { return aligned_in(some(bytes + 128, 1)); }

void *room_for(size_t bytes) { return aligned_in(some(bytes + 128, 0)); }

void give_back(void *aligned)
{
    char *all = aligned ? (char *)aligned - ((char *)aligned)[-1] : NULL;
    if (!all)
        return;
    const size_t from = (size_t)((uintptr_t)all - (uintptr_t)lent.at);
    if (!lent.at || from >= lent.bytes)
        free(all);
    else if (--lent.held == 0)
        lent.taken = 0;
}

void forget(Rounded *x)
{
    give_back(x->codes);
    give_back(x->starts);
    give_back(x->scales);
    give_back(x->sums);
}

static int make_room(Rounded *x)
{
    const size_t rows = (size_t)x->padded_rows, columns = (size_t)x->padded_columns;
    const size_t groups = rows * (size_t)x->groups;
    x->codes = whole(rows * columns * (size_t)x->parts);
    x->starts = whole(groups * (size_t)x->parts * sizeof(int32_t));
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
#pragma omp simd reduction(max : greatest)
    for (int i = 0; i < count; i++) {
        const float size = fabsf(values[i]);
        greatest = size > greatest ? size : greatest;
    }
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

/* Bytes of a row where W's vectors want them. */
static void lay_out_for_few(const Rounded *x, const int8_t *line, int64_t row, int part)
{
    const int columns = x->apart * BYTES, step = x->apart, slots = x->apart * x->parts;
    const int64_t vectors = x->padded_columns / columns;
    for (int64_t v = 0; v < vectors; v++) {
        const int8_t *from = line + v * columns;
        int8_t *to = x->codes + ((row * vectors + v) * slots + part) * BYTES;
        for (int p = 0; p < step; p++)
            for (int i = 0; i < BYTES; i++)
                to[p * BYTES + i] = from[i * step + p];
    }
}

static void lay_out_for_many(const Rounded *x, const int8_t *line, int64_t row, int part)
{
    const int64_t tile = x->tile, first = row / tile * x->parts + part;
    int8_t *to = x->codes + first * x->padded_columns * tile + row % tile * FOUR;
    for (int64_t k = 0; k < x->padded_columns / FOUR; k++)
        memcpy(to + k * tile * FOUR, line + k * FOUR, FOUR);
}

static void lay_out_for_tiles(const Rounded *x, const int8_t *line, int64_t row, int part)
{
    const int64_t tile = x->tile, first = row / tile * x->parts + part;
    int8_t *to = x->codes + first * x->padded_columns * tile + row % tile * x->size;
    for (int64_t group = 0; group < x->groups; group++)
        memcpy(to + group * x->size * tile, line + group * x->size, (size_t)x->size);
}

/* Numbers of a row's groups lie `step` apart, from `at` on. */
typedef struct {
    int64_t at, step;
} Numbers;

static Numbers numbers_of(const Rounded *x, int64_t row, int parts, int part)
{
    if (x->layout == FOR_FEW)
        return (Numbers){(row * parts + part) * x->groups, 1};
    const int64_t tile = x->tile;
    return (Numbers){(row / tile * parts + part) * x->groups * tile + row % tile, tile};
}

/* What the integer sums of a row begin with. */
static void begin_sums(const Rounded *x, const int8_t *line, int64_t row, int part)
{
    const Numbers starts = numbers_of(x, row, x->parts, part);
    for (int64_t group = 0; group * x->size < x->columns; group++) {
        int32_t sum = 0;
        for (int i = 0; i < x->size; i++)
            sum += line[group * x->size + i];
        x->starts[starts.at + group * starts.step] = -x->middle * sum;
    }
}

/* A row of x: its bytes, its scales and sums; `line` has room for it twice. */
static void round_row(Rounded *x, const void *source, int is_wide, int64_t row, int8_t *line)
{
    static void (*const lay_out[])(const Rounded *, const int8_t *, int64_t, int) = {
        lay_out_for_few, lay_out_for_many, lay_out_for_tiles};
    const Numbers numbers = numbers_of(x, row, 1, 0);
    int8_t *lost = line + x->groups * x->size;
    for (int64_t group = 0; group * x->size < x->columns; group++) {
        const int64_t first = group * x->size, left = x->columns - first;
        const int count = left < x->size ? (int)left : x->size;
        const int64_t at = numbers.at + group * numbers.step;
        int32_t sum = 0;
        const float scale = round_group(source, is_wide, row * x->columns + first, count,
                                        line + first, lost + first);
        for (int i = 0; i < count; i++)
            sum += line[first + i];
        x->sums[at] = scale * (float)sum;
        x->scales[at] = x->parts == 2 ? scale / 256 : scale;
    }
    for (int part = 0; part < x->parts; part++) {
        lay_out[x->layout](x, part ? lost : line, row, part);
        if (x->middle) /* else they begin with zero */
            begin_sums(x, part ? lost : line, row, part);
    }
}

int round_rows(Rounded *x, const void *source, int is_wide, int threads)
{
    const size_t line = (size_t)(x->groups * x->size) * 2; /* padded_columns may be fewer */
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
            round_row(x, source, is_wide, row, lines + (size_t)part * line);
    give_back(lines);
    return 1;
}
