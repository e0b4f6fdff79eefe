/* The tiles of tiles.h in plain C, for tests: as strict as the processor, and obvious.
 *
 * Where the processor would end the program (Intel's manual: LDTILECFG, TILELOADD, TILESTORED,
 * TILEZERO, TDPBSUD), nothing is done, and the first such fault of all threads is kept for the tests
 * to read. They also count the products, and the threads that have not released their tiles.
 */
#ifndef M1_EMULATED_TILES_H
#define M1_EMULATED_TILES_H

#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

#define EXPORTED __attribute__((visibility("default")))

enum { MAX_TILES = 8, MAX_ROWS = 16, MAX_BYTES = 64 };

typedef struct {
    int configured;
    TileShapes shapes;
    uint8_t of[MAX_TILES][MAX_ROWS][MAX_BYTES];
} Tiles;

static _Thread_local Tiles tiles;
static const char *_Atomic first_fault;
static atomic_long products, configured_threads;
static atomic_int refused, asked;

/* What the processor forbids; 1 if so. */
static int faults(int wrong, const char *what)
{
    const char *none = NULL;
    if (wrong)
        atomic_compare_exchange_strong(&first_fault, &none, what);
    return wrong;
}

static int is_used(int tile) { return tiles.configured && tiles.shapes.rows[tile]; }

EXPORTED void m1_emulated_release(void)
{
    atomic_fetch_sub(&configured_threads, tiles.configured);
    memset(&tiles, 0, sizeof tiles);
}

EXPORTED void m1_emulated_loadconfig(const TileShapes *shapes)
{
    const TileShapes none = {0};
    int wrong = faults(sizeof *shapes != 64, "a configuration is not 64 bytes")
                || faults(shapes->palette != 1, "palette")
                || faults(shapes->start_row != 0, "start row") /* legal, and never meant */
                || faults(memcmp(shapes->reserved, none.reserved, 14) != 0, "reserved bytes");
    for (int tile = 0; tile < 16 && !wrong; tile++) {
        const int rows = shapes->rows[tile], bytes = shapes->row_bytes[tile];
        wrong = faults(!rows != !bytes, "a tile of rows without bytes, or bytes without rows")
                || faults(rows > MAX_ROWS || bytes > MAX_BYTES, "a tile too large")
                || faults(rows && tile >= MAX_TILES, "a tile beyond the last");
    }
    m1_emulated_release();
    if (wrong)
        return;
    tiles.configured = 1;
    tiles.shapes = *shapes;
    atomic_fetch_add(&configured_threads, 1);
}

EXPORTED void m1_emulated_zero(int tile)
{
    if (!faults(!is_used(tile), "zero: no such tile"))
        memset(tiles.of[tile], 0, sizeof tiles.of[tile]);
}

EXPORTED void m1_emulated_load(int tile, const void *at, int64_t stride)
{
    if (faults(!is_used(tile), "load: no such tile"))
        return;
    memset(tiles.of[tile], 0, sizeof tiles.of[tile]);
    for (int row = 0; row < tiles.shapes.rows[tile]; row++)
        memcpy(tiles.of[tile][row], (const char *)at + row * stride, tiles.shapes.row_bytes[tile]);
}

EXPORTED void m1_emulated_store(int tile, void *at, int64_t stride)
{
    if (faults(!is_used(tile), "store: no such tile"))
        return;
    for (int row = 0; row < tiles.shapes.rows[tile]; row++)
        memcpy((char *)at + row * stride, tiles.of[tile][row], tiles.shapes.row_bytes[tile]);
}

/* c[m][n] += sum over k and i of a[m][4k + i], signed, times b[k][4n + i], unsigned. */
EXPORTED void m1_emulated_dot(int c, int a, int b)
{
    const TileShapes *of = &tiles.shapes;
    if (faults(c == a || c == b || a == b, "dot: a tile twice")
        || faults(!is_used(c) || !is_used(a) || !is_used(b), "dot: no such tile")
        || faults(of->row_bytes[c] % 4 || of->row_bytes[a] % 4 || of->row_bytes[b] % 4, "dot: fours")
        || faults(of->rows[c] != of->rows[a], "dot: rows of c and a")
        || faults(of->row_bytes[c] != of->row_bytes[b], "dot: columns of c and b")
        || faults(of->row_bytes[a] / 4 != of->rows[b], "dot: columns of a and rows of b"))
        return;
    for (int m = 0; m < of->rows[c]; m++)
        for (int n = 0; n < of->row_bytes[c] / 4; n++) {
            int32_t sum;
            memcpy(&sum, &tiles.of[c][m][4 * n], sizeof sum);
            for (int k = 0; k < of->rows[b]; k++)
                for (int i = 0; i < 4; i++)
                    sum += (int8_t)tiles.of[a][m][4 * k + i] * tiles.of[b][k][4 * n + i];
            memcpy(&tiles.of[c][m][4 * n], &sum, sizeof sum);
        }
    atomic_fetch_add(&products, 1);
}

EXPORTED long m1_emulated_products(void) { return atomic_load(&products); }

EXPORTED long m1_emulated_configured(void) { return atomic_load(&configured_threads); }

/* The first fault since this was asked last, or NULL. */
EXPORTED const char *m1_emulated_fault(void) { return atomic_exchange(&first_fault, NULL); }

/* Before the first product: the system then refuses tiles. */
EXPORTED void m1_emulated_refuse(void) { atomic_store(&refused, 1); }

/* How often the system was asked. */
EXPORTED int m1_emulated_asked(void) { return atomic_load(&asked); }

static int system_lets_tiles(void)
{
    atomic_fetch_add(&asked, 1);
    return !atomic_load(&refused);
}

/* A bit field has a constant width, and none below zero: other tiles are not compiled. */
#define NUMBER(tile) ((tile) + 0 * (int)sizeof(struct { int is_tile : (tile) >= 0 && (tile) < 8 ? 1 : -1; }))

#define tile_loadconfig(shapes) m1_emulated_loadconfig(shapes)
#define tile_release() m1_emulated_release()
#define tile_zero(tile) m1_emulated_zero(NUMBER(tile))
#define tile_load(tile, at, stride) m1_emulated_load(NUMBER(tile), at, stride)
#define tile_store(tile, at, stride) m1_emulated_store(NUMBER(tile), at, stride)
#define tile_dot(c, a, b) m1_emulated_dot(NUMBER(c), NUMBER(a), NUMBER(b))

#endif
