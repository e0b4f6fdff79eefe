/* The rows of x, rounded to bytes: what the products by W are made of.
 *
 * Each group of columns has a scale of its own, so that products are whole numbers; all that is lost
 * is that rounding, a 254th of a group's greatest at most. For W of bytes, which deserves better, a
 * second byte holds what the first has lost, in steps of a 256th: reading W takes longer than
 * multiplying twice.
 */
#ifndef M1_ACTIVATIONS_H
#define M1_ACTIVATIONS_H

#include "common.h"
#include "lanes.h"

/* How the bytes lie. FOR_FEW: in vectors that meet W's as they are stored, every second or every
 * fourth column together (planes.h). FOR_MANY: four columns of TILE rows, the next four, …
 * FOR_TILES: a group of columns of TILE_ROWS rows, row by row, the next group, … */
enum Layout { FOR_FEW, FOR_MANY, FOR_TILES };
enum {
    TILE = LANES == 16 ? 6 : 4, /* rows of x: as many as registers hold the sums of */
    TILE_ROWS = 16,             /* rows of x in a tile of AMX (tiles.h) */
    FOUR = 4                    /* columns: what a lane multiplies at once */
};

/* Everything is padded with zeros, to whole vectors or groups, and to whole tiles of rows. */
typedef struct {
    enum Layout layout;
    int64_t rows, padded_rows, columns, padded_columns, groups;
    int tile;        /* rows that lie together: TILE or TILE_ROWS */
    int size;        /* of a group */
    int apart;       /* FOR_FEW: of so many columns that follow each other, each has its vector */
    int middle;      /* the code of W that means zero */
    int parts;       /* of a value: 2 with the second byte */
    int8_t *codes;   /* FOR_FEW [row][vector][apart or part][BYTES]; FOR_MANY
                      * [tile][part][fours][TILE][FOUR]; FOR_TILES
                      * [tile][part][group][TILE_ROWS][size] */
    int32_t *starts; /* [row][part][group], or [tile][part][group][row]: what sums begin with */
    float *scales;   /* [row][group], or [tile][group][row] */
    float *sums;     /* the same: of the rounded x */
} Rounded;

/* Round all rows of x, bfloat16 or (is_wide) float; 0 where there is no memory for them. */
int round_rows(Rounded *x, const void *source, int is_wide, int threads);
void forget(Rounded *x);

/* Memory where vectors begin at multiples of their size: zeros, or whatever was there. `give_back`
 * frees it. They take what was lent to this thread first, which then is the same again and again. */
void lend(void *room, size_t bytes); /* NULL: no longer */
void *whole(size_t bytes);
void *room_for(size_t bytes);
void give_back(void *aligned);

#endif
