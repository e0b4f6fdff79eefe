/* What the products of a few rows and of many have in common. */
#ifndef M1_MATMUL_H
#define M1_MATMUL_H

#include "activations.h"
#include "lanes.h"
#include "planes.h"

enum {
    FEW_ROWS = 4,        /* of x; more are faster by panels */
    LEAST_TILE_ROWS = 9, /* a tile takes as long for one row as for 16: below, most of it is zeros */
};

typedef struct {
    void *at; /* [row of x][row of W] */
    int is_wide;
} Output;

static inline void put(const Output *output, int64_t index, float value)
{
    if (output->is_wide)
        ((float *)output->at)[index] = value;
    else
        ((bfloat16 *)output->at)[index] = rounded(value);
}

static inline void put_some(const Output *output, int64_t index, const float *values, int64_t count)
{
    if (output->is_wide)
        memcpy((float *)output->at + index, values, (size_t)count * sizeof *values);
    else {
        bfloat16 *to = (bfloat16 *)output->at + index;
#pragma omp simd
        for (int64_t i = 0; i < count; i++)
            to[i] = rounded(values[i]);
    }
}

static inline int64_t bytes_in_row(int64_t columns, int bits) { return columns * bits / 8; }

/* x (rows, columns) by each of `count` matrices; those that want x rounded alike share that. 0 where
 * there is no memory. */
int multiply_each(const void *x, int is_wide, int64_t rows, const Stored *const *w,
                  void *const *targets, int count, int threads);

/* x @ W.T; 0 where there is no memory. */
int multiply_few(const Stored *w, const Rounded *x, const Output *output, int threads);
int multiply_many(const Stored *w, const Rounded *x, const Output *output, int threads);

/* Whether there are tiles (tiles.h) and the system lets this process use them: it is asked once. */
int tiles_usable(void);

#endif
