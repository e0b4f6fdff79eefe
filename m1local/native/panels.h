/* A panel: some rows of W by some columns, unpacked to bytes that stay in the cache; and what the two
 * ways of multiplying by it share, that by vectors (matmul_many.c) and that by tiles
 * (matmul_tiles.c). Their integer sums are equal, and the floats are made of them here: so are these.
 */
#ifndef M1_PANELS_H
#define M1_PANELS_H

#include "matmul.h"

enum { VECTORS_TOGETHER = 2 /* of a panel, multiplied at once; it has a multiple of them */ };

/* What a thread works with. */
typedef struct {
    uint8_t *codes; /* [vector][four columns][lane][FOUR] */
    float *scales;  /* [vector][group of the panel][lane] */
    float *zeros;   /* the same: what a code of 0 stands for */
    float *sums;    /* [row of x][row of the block] */
} Panel;

/* The bytes and the numbers of a tile of rows of x, from one group on. */
typedef struct {
    const int8_t *codes;
    const int32_t *starts;
    const float *scales, *sums;
} TileOfX;

/* The tile that begins with row `first`. */
INLINE TileOfX tile_at(const Rounded *x, int64_t first, int64_t group)
{
    const int64_t tile = first / x->tile, numbers = (tile * x->groups + group) * x->tile;
    return (TileOfX){
        x->codes + (tile * x->parts * x->padded_columns + group * x->size) * x->tile,
        x->starts + (tile * x->parts * x->groups + group) * x->tile,
        x->scales + numbers,
        x->sums + numbers,
    };
}

/* A total of a row of x and LANES rows of W, and the integer sums of one more group. */
INLINE Floats plus_group(
    Floats total, Ints dots, Floats scale, Floats sum, Floats of_w, Floats zeros, int is_bytes)
{
    const Floats dot = to_floats(dots);
    if (is_bytes) /* W's scale comes last */
        return plus_product(total, dot, scale);
    return plus_product(plus_product(total, times(dot, scale), of_w), zeros, sum);
}

/* The groups from `group` to `end`, which are `panel`, of `vectors` vectors of rows of W by all of x:
 * added to the panel's sums. */
void multiply_by_tiles(
    Panel *panel, const Rounded *x, int vectors, int64_t group, int64_t end);

#endif
