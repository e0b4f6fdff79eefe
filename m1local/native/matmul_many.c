/* Many rows of x by W: a panel of W, some rows by some columns, is unpacked to bytes that stay in
 * the cache, and meets all rows of x.
 *
 * A vector of the panel holds four columns of as many rows of W as there are lanes; four bytes of a
 * row of x, repeated, meet it. So a lane's sum belongs to one row of W, and a group is one integer
 * sum, which its scales are multiplied by once. Tiles, where there are any, meet the same panels
 * (matmul_tiles.c).
 */
#include "panels.h"

enum {
    BLOCK_VECTORS = 8, /* rows of W in a panel, in vectors */
    PANEL_COLUMNS = 4096,
    UNROLLED = 4, /* of the innermost loop: it divides the fours of every group */
    LEAST_WORK = 1 << 20
};

/* The bits of eight columns, at `at`, in the lowest bits of a number. */
INLINE uint32_t eight_of(const uint8_t *at, int bits)
{
    uint32_t found = 0;
    memcpy(&found, at, (size_t)bits);
    return found;
}

/* Codes of four columns, from the bits of four in each lane of both planes. */
TEMPLATE void spread_lanes(
    const uint32_t *low, const uint32_t *high, int by, int low_bits, int high_bits, uint8_t *to)
{
    uint32_t fours[LANES];
    for (int lane = 0; lane < LANES; lane++) {
        fours[lane] = spread(low[lane] >> by * low_bits & ((1u << FOUR * low_bits) - 1), low_bits);
        if (high_bits)
            fours[lane] |= spread(high[lane] >> by * high_bits & ((1u << FOUR * high_bits) - 1),
                                  high_bits)
                           << low_bits;
    }
    memcpy(to, fours, sizeof fours);
}

/* `fours` times four columns of LANES rows of W, from row `row` on; the last row stands for those
 * beyond. */
TEMPLATE void unpack_vector(
    const Stored *w, int64_t row, int64_t column, int64_t fours, int low_bits, int high_bits,
    uint8_t *to)
{
    const uint8_t *low_at[LANES], *high_at[LANES];
    for (int lane = 0; lane < LANES; lane++) {
        const int64_t at = row + lane < w->rows ? row + lane : w->rows - 1;
        const int64_t first = at * w->columns + column;
        low_at[lane] = w->low + first * low_bits / 8;
        high_at[lane] = high_bits ? w->high + first * high_bits / 8 : NULL;
    }
    for (int64_t k = 0; k < fours / 2; k++, to += 2 * BYTES) {
        uint32_t low[LANES], high[LANES] = {0};
        for (int lane = 0; lane < LANES; lane++) {
            low[lane] = eight_of(low_at[lane] + k * low_bits, low_bits);
            if (high_bits)
                high[lane] = eight_of(high_at[lane] + k * high_bits, high_bits);
        }
        spread_lanes(low, high, 0, low_bits, high_bits, to);
        spread_lanes(low, high, FOUR, low_bits, high_bits, to + BYTES);
    }
}

/* The same of rows of bytes; zeros beyond the last column. */
static void unpack_bytes(const Stored *w, int64_t row, int64_t column, int64_t fours, uint8_t *to)
{
    for (int lane = 0; lane < LANES; lane++) {
        const int64_t at = row + lane < w->rows ? row + lane : w->rows - 1;
        const uint8_t *from = w->low + at * w->columns + column;
        const int64_t left = w->columns - column, count = left < fours * FOUR ? left : fours * FOUR;
        for (int64_t k = 0; k < fours; k++) {
            uint32_t four = 0;
            if ((k + 1) * FOUR <= count)
                memcpy(&four, from + k * FOUR, FOUR);
            else if (k * FOUR < count)
                memcpy(&four, from + k * FOUR, (size_t)(count - k * FOUR));
            four ^= SHIFTED ? 0x80808080u : 0;
            memcpy(to + k * BYTES + lane * FOUR, &four, sizeof four);
        }
    }
}

static void unpack_codes(
    const Stored *w, int64_t row, int64_t column, int64_t fours, uint8_t *to)
{
    if (w->low_bits == 8)
        unpack_bytes(w, row, column, fours, to);
    else if (w->low_bits == 2)
        unpack_vector(w, row, column, fours, 2, 1, to);
    else if (w->high_bits == 0)
        unpack_vector(w, row, column, fours, 4, 0, to);
    else if (w->high_bits == 1)
        unpack_vector(w, row, column, fours, 4, 1, to);
    else
        unpack_vector(w, row, column, fours, 4, 2, to);
}

/* A panel of `vectors` vectors of rows from `row` on, and the groups from `group` to `end`. */
static void unpack_panel(
    Panel *panel, const Stored *w, int64_t row, int vectors, int64_t group, int64_t end)
{
    const int64_t of_row = w->columns / w->size, groups = end - group;
    for (int v = 0; v < vectors; v++) {
        const int64_t first = row + v * LANES, fours = groups * w->size / FOUR;
        unpack_codes(w, first, group * w->size, fours, panel->codes + v * fours * BYTES);
        if (w->row_scales)
            continue;
        float *scales = panel->scales + v * groups * LANES, *zeros = panel->zeros + v * groups * LANES;
        for (int lane = 0; lane < LANES; lane++) {
            const int64_t at = (first + lane < w->rows ? first + lane : w->rows - 1) * of_row + group;
            for (int64_t g = 0; g < groups; g++) {
                const float scale = widened(w->scales[at + g]);
                scales[g * LANES + lane] = scale;
                zeros[g * LANES + lane] = widened(w->zeros[at + g]) - (float)w->middle * scale;
            }
        }
    }
}

/* The integer sums of one group: `fours` times four columns, of some vectors and TILE rows of x. */
TEMPLATE void sum_group(
    Ints dots[VECTORS_TOGETHER][TILE], const uint8_t *codes, int64_t stride, const int8_t *x,
    int64_t fours, int is_bytes)
{
    for (int64_t k = 0; k < fours; k += UNROLLED) {
        UNROLL for (int u = 0; u < UNROLLED; u++) {
            Bytes w[VECTORS_TOGETHER];
            UNROLL for (int v = 0; v < VECTORS_TOGETHER; v++)
                w[v] = load_bytes(codes + v * stride + u * BYTES);
            UNROLL for (int m = 0; m < TILE; m++) {
                const Bytes four = all_of_four(x + (u * TILE + m) * FOUR);
                UNROLL for (int v = 0; v < VECTORS_TOGETHER; v++)
                    dots[v][m] = is_bytes && !SHIFTED ? dot_bytes(dots[v][m], w[v], four)
                                                      : dot_codes(dots[v][m], w[v], four);
            }
        }
        codes += UNROLLED * BYTES;
        x += UNROLLED * TILE * FOUR;
    }
}

/* The first bytes' sums, raised, and `starts`: what the second bytes' are added to. */
TEMPLATE void raise(Ints dots[VECTORS_TOGETHER][TILE], const int32_t *starts)
{
    UNROLL for (int m = 0; m < TILE; m++)
        UNROLL for (int v = 0; v < VECTORS_TOGETHER; v++)
            dots[v][m] = raised(dots[v][m], all_ints(starts[m]));
}

/* Two vectors of a panel, from `v` on, by the rows of x from `first` on: a tile of sums. */
TEMPLATE void multiply_tile(
    const Panel *panel, const Rounded *x, int v, int64_t first, int64_t group, int64_t end,
    int64_t block, int is_bytes)
{
    const int64_t groups = end - group, fours = x->size / FOUR, stride = groups * fours * BYTES;
    const int64_t part = x->padded_columns * TILE;
    const uint8_t *codes = panel->codes + v * stride;
    const TileOfX of_x = tile_at(x, first, group);
    const int8_t *bytes = of_x.codes;
    float *at = panel->sums + first * block + v * LANES;
    Floats totals[VECTORS_TOGETHER][TILE];
    UNROLL for (int m = 0; m < TILE; m++)
        UNROLL for (int i = 0; i < VECTORS_TOGETHER; i++)
            totals[i][m] = load_floats(at + m * block + i * LANES);
    for (int64_t g = 0; g < groups; g++) {
        Ints dots[VECTORS_TOGETHER][TILE];
        UNROLL for (int m = 0; m < TILE; m++)
            UNROLL for (int i = 0; i < VECTORS_TOGETHER; i++)
                dots[i][m] = all_ints(is_bytes ? of_x.starts[g * TILE + m] : 0);
        sum_group(dots, codes + g * fours * BYTES, stride, bytes, fours, is_bytes);
        if (is_bytes) {
            raise(dots, of_x.starts + (x->groups + g) * TILE);
            sum_group(dots, codes + g * fours * BYTES, stride, bytes + part, fours, is_bytes);
        }
        bytes += fours * FOUR * TILE;
        Floats of_w[VECTORS_TOGETHER], zeros[VECTORS_TOGETHER];
        UNROLL for (int i = 0; i < VECTORS_TOGETHER; i++) {
            of_w[i] = load_floats(panel->scales + ((v + i) * groups + g) * LANES);
            zeros[i] = load_floats(panel->zeros + ((v + i) * groups + g) * LANES);
        }
        UNROLL for (int m = 0; m < TILE; m++) {
            const Floats scale = all_of(of_x.scales[g * TILE + m]);
            const Floats sum = all_of(of_x.sums[g * TILE + m]);
            UNROLL for (int i = 0; i < VECTORS_TOGETHER; i++)
                totals[i][m] = plus_group(totals[i][m], dots[i][m], scale, sum, of_w[i], zeros[i],
                                          is_bytes);
        }
    }
    UNROLL for (int m = 0; m < TILE; m++)
        UNROLL for (int i = 0; i < VECTORS_TOGETHER; i++)
            store_floats(at + m * block + i * LANES, totals[i][m]);
}

/* What multiply_by_tiles does, in vectors. */
static void multiply_by_vectors(
    Panel *panel, const Rounded *x, int vectors, int64_t group, int64_t end)
{
    for (int v = 0; v < vectors; v += VECTORS_TOGETHER) /* which stay in the nearest cache */
        for (int64_t first = 0; first < x->padded_rows; first += TILE) {
            if (x->parts == 2)
                multiply_tile(panel, x, v, first, group, end, vectors * LANES, 1);
            else
                multiply_tile(panel, x, v, first, group, end, vectors * LANES, 0);
        }
}

/* The sums of `block` rows of W, from `row` on, to where they belong. */
static void put_block(
    const Panel *panel, const Stored *w, int64_t rows, int64_t row, int64_t block,
    const Output *output)
{
    const int64_t count = w->rows - row < block ? w->rows - row : block;
    for (int64_t m = 0; m < rows; m++) {
        float *sums = panel->sums + m * block;
        if (w->row_scales)
            for (int64_t r = 0; r < count; r++)
                sums[r] *= w->row_scales[row + r];
        put_some(output, m * w->rows + row, sums, count);
    }
}

/* `vectors` vectors of rows of W, from `row` on, by all of x. */
static void multiply_block(
    Panel *panel, const Stored *w, const Rounded *x, int64_t row, int vectors, const Output *output)
{
    const int64_t block = vectors * LANES, in_panel = PANEL_COLUMNS / x->size;
    memset(panel->sums, 0, (size_t)(x->padded_rows * block) * sizeof(float));
    for (int64_t group = 0; group < x->groups; group += in_panel) {
        const int64_t end = group + in_panel < x->groups ? group + in_panel : x->groups;
        unpack_panel(panel, w, row, vectors, group, end);
        (x->layout == FOR_TILES ? multiply_by_tiles : multiply_by_vectors)(
            panel, x, vectors, group, end);
    }
    put_block(panel, w, x->rows, row, block, output);
}

/* Room for a panel of so many vectors; 0 where there is none. */
static int make_panel(Panel *panel, const Rounded *x, int vectors)
{
    const size_t rows = (size_t)(vectors * LANES);
    const size_t statistics = rows * (size_t)(PANEL_COLUMNS / x->size) * sizeof(float);
    panel->codes = room_for(rows * PANEL_COLUMNS);
    panel->scales = room_for(statistics);
    panel->zeros = room_for(statistics);
    panel->sums = room_for((size_t)x->padded_rows * rows * sizeof(float));
    return panel->codes && panel->scales && panel->zeros && panel->sums;
}

static void forget_panel(Panel *panel)
{
    give_back(panel->codes);
    give_back(panel->scales);
    give_back(panel->zeros);
    give_back(panel->sums);
}

/* Vectors of a block: as many as leave every thread a few blocks. */
static int vectors_in_block(int64_t rows, int threads)
{
    int vectors = BLOCK_VECTORS;
    while (vectors > VECTORS_TOGETHER && rows / (vectors * LANES) < 4 * threads)
        vectors /= 2;
    return vectors;
}

int multiply_many(const Stored *w, const Rounded *x, const Output *output, int threads)
{
    const int used = w->rows * w->columns < LEAST_WORK ? 1 : threads;
    const int vectors = vectors_in_block(w->rows, used);
    const int64_t block = vectors * LANES, blocks = (w->rows + block - 1) / block;
    int failed = 0;
#pragma omp parallel num_threads(used) if (used > 1)
    {
        Panel panel;
        if (!make_panel(&panel, x, vectors)) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
        if (!failed) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t b = 0; b < blocks; b++)
                multiply_block(&panel, w, x, b * block, vectors, output);
        }
        forget_panel(&panel);
    }
    return !failed;
}
