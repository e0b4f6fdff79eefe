/* The tiles of AMX: eight registers of 16 rows by 64 bytes, and products of whole tiles.
 *
 * Intel's processors have them, from Sapphire Rapids on; Linux lets a process use them that asks.
 * A tile is named by a number that is written out, 0 to 7, for gcc writes it into the instruction.
 * The tests compile an emulation instead, M1_EMULATED_TILES being the header that has it. Included
 * before anything of the system's, of which it wants what C11 hides.
 */
#ifndef M1_TILES_H
#define M1_TILES_H

#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE /* syscall */
#endif

#include <stdint.h>

/* What LDTILECFG reads: 64 bytes. A tile of no rows may not be used. */
typedef struct {
    uint8_t palette; /* 1 is the only one: eight tiles of 16 rows by 64 bytes at most */
    uint8_t start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileShapes;

#if !defined(__AVX512BW__) || !defined(__AVX512VNNI__) /* lanes.h: of 16 lanes */
#define HAS_TILES 0

#elif defined(M1_EMULATED_TILES)
#define HAS_TILES 1
#include M1_EMULATED_TILES

#elif defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__x86_64__) && defined(__linux__)
#define HAS_TILES 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Older compilers do not see that a tile is read from the memory: what is to be written to it before
 * would be written later. */
#define WRITTEN __asm__ volatile("" ::: "memory")

#define tile_loadconfig(shapes) do { WRITTEN; _tile_loadconfig(shapes); } while (0)
#define tile_release() _tile_release()
#define tile_zero(tile) _tile_zero(tile)
/* Rows lie `stride` bytes apart. */
#define tile_load(tile, at, stride) do { WRITTEN; _tile_loadd(tile, at, stride); } while (0)
#define tile_store(tile, at, stride) _tile_stored(tile, at, stride)
/* c[m][n] += the four products of signed bytes a[m][4k …] by unsigned ones b[k][4n …], over all k. */
#define tile_dot(c, a, b) _tile_dpbsud(c, a, b)

/* Whether the system lets this process use tiles; whoever asks again is told the same. */
static int system_lets_tiles(void)
{
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

#else
#define HAS_TILES 0
#endif

#endif
