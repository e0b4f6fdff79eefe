/* x @ W.T for W as the checkpoint stores it: groups of 3 to 6 bits (m1local/formats/groups.py) or
 * rows of bytes (int8.py), read where they lie, mapped files included; nothing is packed or copied
 * but what lies in the cache at the moment.
 *
 * x is rounded to bytes first (activations.h). A few rows of x are multiplied by W as it streams
 * from the memory (matmul_few.c), more by panels of W that are unpacked once (matmul_many.c): in
 * vectors or, where the processor has them, in tiles (matmul_tiles.c), with the same result.
 */
#include "matmul.h"

static int64_t up_to_multiple(int64_t value, int64_t of) { return (value + of - 1) / of * of; }

/* How x is to be rounded for W. */
static Rounded layout_for(const Stored *w, int64_t rows)
{
    const int is_bytes = w->low_bits == 8, few = rows <= FEW_ROWS, apart = parted(w->low_bits);
    const int in_tiles = rows >= LEAST_TILE_ROWS && tiles_usable();
    const int tile = few ? 4 : in_tiles ? TILE_ROWS : TILE;
    Rounded x = {
        .layout = few ? FOR_FEW : in_tiles ? FOR_TILES : FOR_MANY,
        .rows = rows,
        .padded_rows = few && rows < 3 ? rows : up_to_multiple(rows, tile),
        .columns = w->columns,
        .padded_columns = up_to_multiple(w->columns, few && !is_bytes ? apart * BYTES : w->size),
        .tile = tile,
        .size = w->size,
        .apart = apart,
        .middle = is_bytes && SHIFTED ? 128 : 0, /* of groups: by the sums */
        .parts = is_bytes ? 2 : 1,
    };
    x.groups = up_to_multiple(x.padded_columns, w->size) / w->size;
    if (few) /* read a vector at a time */
        x.groups = up_to_multiple(x.groups, LANES);
    return x;
}

/* Whether x is rounded alike for both. */
static int alike(const Stored *a, const Stored *b, int64_t rows)
{
    const int are_bytes = a->low_bits == 8 && b->low_bits == 8;
    const int are_groups = a->low_bits != 8 && b->low_bits != 8;
    const int parted_alike = rows > FEW_ROWS || parted(a->low_bits) == parted(b->low_bits);
    return a->columns == b->columns && a->size == b->size && (are_bytes || are_groups)
           && parted_alike;
}

int multiply_each(const void *x, int is_wide, int64_t rows, const Stored *const *w,
                  void *const *targets, int count, int threads)
{
    Rounded rounded_x = {0};
    int done = 1;
    for (int i = 0; i < count && done; i++) {
        const Output output = {targets[i], is_wide};
        if (i == 0 || !alike(w[i - 1], w[i], rows)) {
            forget(&rounded_x);
            rounded_x = layout_for(w[i], rows);
            done = round_rows(&rounded_x, x, is_wide, threads);
        }
        if (done)
            done = (rounded_x.layout == FOR_FEW ? multiply_few : multiply_many)(
                w[i], &rounded_x, &output, threads);
    }
    forget(&rounded_x);
    return done;
}

/* x (rows, columns) @ W.T; 0 where there is no memory. */
M1_EXPORT int m1_multiply(
    const void *x, int is_wide, int64_t rows, const Stored *w, void *target, int threads)
{
    return multiply_each(x, is_wide, rows, &w, &target, 1, threads);
}

/* The `size` of rows of bytes. */
M1_EXPORT int m1_group_of_x(void) { return GROUP_OF_X; }

M1_EXPORT const char *m1_lanes(void) { return LANES_NAME; }
