/* Many rows of x by a panel of W in the tiles of AMX: 16 rows of x by 16 of W, 64 columns at once.
 *
 * 16 vectors of a panel, each four columns of 16 rows of W, are a tile as they lie, and x is laid
 * out in rows of a tile (FOR_TILES). Four tiles of sums are held, of two tiles of x and two of W.
 * They are whole numbers of one group; its scales are for the vectors again, as in matmul_many.c, so
 * that the same floats come out.
 */
#include "tiles.h"

#include "panels.h"

#if HAS_TILES
enum { TILE_COLUMNS = 64 /* at most: a group of 32 fills half of a tile of x */ };

/* Tiles of sums, by the tiles of x and of W. */
#define C00 0
#define C01 1
#define C10 2
#define C11 3
#define X0 4
#define X1 5
#define W0 6
#define W1 7

/* Of tiles of so many columns. */
#define SHAPES(columns) \
    { \
        .palette = 1, \
        .row_bytes = {BYTES, BYTES, BYTES, BYTES, columns, columns, BYTES, BYTES}, \
        .rows = {TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, \
                 columns / FOUR, columns / FOUR}, \
    }

/* The integer sums of a group: [row of x][vector][lane]. */
typedef struct {
    _Alignas(64) int32_t of[2 * TILE_ROWS][VECTORS_TOGETHER][LANES];
} Sums;

int tiles_usable(void)
{
    enum { NOT_ASKED, USABLE, REFUSED };
    static _Atomic int known = NOT_ASKED; /* two threads that ask at once are told the same */
    if (known == NOT_ASKED)
        known = system_lets_tiles() ? USABLE : REFUSED;
    return known == USABLE;
}

/* The sums of one group, `size` columns of two vectors that lie `stride` bytes apart, by one tile of
 * x or two, `next` bytes apart. */
TEMPLATE void sum_group(
    Sums *sums, const uint8_t *codes, int64_t stride, const int8_t *x, int64_t next, int size,
    int tiles)
{
    enum { ROW = sizeof sums->of[0] };
    tile_zero(C00);
    tile_zero(C01);
    if (tiles == 2) {
        tile_zero(C10);
        tile_zero(C11);
    }
    for (int k = 0; k < size; k += TILE_COLUMNS) {
        tile_load(W0, codes + k * LANES, BYTES);
        tile_load(W1, codes + stride + k * LANES, BYTES);
        tile_load(X0, x + k, size);
        tile_dot(C00, X0, W0);
        tile_dot(C01, X0, W1);
        if (tiles == 2) {
            tile_load(X1, x + next + k, size);
            tile_dot(C10, X1, W0);
            tile_dot(C11, X1, W1);
        }
    }
    tile_store(C00, sums->of[0][0], ROW);
    tile_store(C01, sums->of[0][1], ROW);
    if (tiles == 2) {
        tile_store(C10, sums->of[TILE_ROWS][0], ROW);
        tile_store(C11, sums->of[TILE_ROWS][1], ROW);
    }
}

/* What a group adds to the totals of a tile of x, rows of them `block` apart. The sums, of each part
 * of x, begin with row `row`; the second part's starts lie `second` further; the scales and zeros of
 * a vector of W `groups` vectors. */
TEMPLATE void add_group(
    float *totals, int64_t block, const Sums *sums, int row, TileOfX x, int64_t second,
    const float *scales, const float *zeros, int64_t groups, int is_bytes)
{
    for (int i = 0; i < VECTORS_TOGETHER; i++) {
        const Floats of_w = load_floats(scales + i * groups * LANES);
        const Floats zeros_of_w = load_floats(zeros + i * groups * LANES);
        for (int m = 0; m < TILE_ROWS; m++) {
            float *total = totals + m * block + i * LANES;
            Ints dots = load_ints(sums[0].of[row + m][i]);
            if (is_bytes) {
                const Ints first = plus(dots, all_ints(x.starts[m]));
                const Ints rest = load_ints(sums[1].of[row + m][i]);
                dots = raised(first, plus(rest, all_ints(x.starts[second + m])));
            }
            store_floats(total, plus_group(load_floats(total), dots, all_of(x.scales[m]),
                                           all_of(x.sums[m]), of_w, zeros_of_w, is_bytes));
        }
    }
}

/* Two vectors of a panel, from `v` on, by one tile of x or two, from row `first` on. */
TEMPLATE void multiply_tiles(
    Panel *panel, const Rounded *x, int v, int64_t first, int64_t group, int64_t end,
    int64_t block, int tiles, int is_bytes)
{
    const int64_t groups = end - group, stride = groups * x->size * LANES;
    const int64_t part = x->padded_columns * TILE_ROWS, second = x->groups * TILE_ROWS;
    for (int64_t g = 0; g < groups; g++) {
        Sums sums[2];
        const uint8_t *codes = panel->codes + v * stride + g * x->size * LANES;
        const int8_t *of_x = tile_at(x, first, group + g).codes;
        sum_group(sums, codes, stride, of_x, x->parts * part, x->size, tiles);
        if (is_bytes)
            sum_group(sums + 1, codes, stride, of_x + part, x->parts * part, x->size, tiles);
        const int64_t at = (v * groups + g) * LANES;
        for (int t = 0; t < tiles; t++) {
            const int64_t row = first + t * TILE_ROWS;
            add_group(panel->sums + row * block + v * LANES, block, sums, t * TILE_ROWS,
                      tile_at(x, row, group + g), second, panel->scales + at, panel->zeros + at,
                      groups, is_bytes);
        }
    }
}

/* One loop for each of what `tiles` and `is_bytes` may be. */
static void multiply_some(
    Panel *panel, const Rounded *x, int v, int64_t first, int64_t group, int64_t end, int64_t block)
{
    const int two = first + TILE_ROWS < x->padded_rows;
    if (x->parts == 2 && two)
        multiply_tiles(panel, x, v, first, group, end, block, 2, 1);
    else if (x->parts == 2)
        multiply_tiles(panel, x, v, first, group, end, block, 1, 1);
    else if (two)
        multiply_tiles(panel, x, v, first, group, end, block, 2, 0);
    else
        multiply_tiles(panel, x, v, first, group, end, block, 1, 0);
}

void multiply_by_tiles(Panel *panel, const Rounded *x, int vectors, int64_t group, int64_t end)
{
    static const TileShapes whole = SHAPES(TILE_COLUMNS), half = SHAPES(TILE_COLUMNS / 2);
    if (x->size < TILE_COLUMNS) /* of this thread: every one has tiles of its own */
        tile_loadconfig(&half);
    else
        tile_loadconfig(&whole);
    for (int v = 0; v < vectors; v += VECTORS_TOGETHER) /* which stay in the nearest cache */
        for (int64_t first = 0; first < x->padded_rows; first += 2 * TILE_ROWS)
            multiply_some(panel, x, v, first, group, end, vectors * LANES);
    tile_release();
}

#else /* nothing is laid out for tiles then */
int tiles_usable(void) { return 0; }

void multiply_by_tiles(Panel *panel, const Rounded *x, int vectors, int64_t group, int64_t end)
{
    (void)panel, (void)x, (void)vectors, (void)group, (void)end;
}
#endif
