/* What this library was compiled by and for, and whether it computes what it should.
 *
 * The self-test runs in a process of its own right after compilation (library.py): whatever was
 * compiled wrongly, an instruction this processor lacks included, ends that process only.
 */
#include "matmul.h"

#define TEXT(x) #x
#define VALUE(x) TEXT(x)

M1_EXPORT const char *m1_compiler(void)
{
#if defined(__clang__)
    return "clang " VALUE(__clang_major__) "." VALUE(__clang_minor__);
#elif defined(__GNUC__)
    return "gcc " VALUE(__GNUC__) "." VALUE(__GNUC_MINOR__);
#elif defined(_MSC_VER)
    return "MSVC " VALUE(_MSC_VER);
#else
    return "an unknown compiler";
#endif
}

M1_EXPORT const char *m1_instructions(void)
{
#if defined(__AVX512F__)
    return tiles_usable() ? "AVX-512 and AMX" : "AVX-512";
#elif defined(__AVX2__)
    return "AVX2";
#elif defined(__ARM_NEON) || defined(_M_ARM64)
    return "NEON";
#else
    return "no vector instructions beyond the processor family's own";
#endif
}

M1_EXPORT int m1_has_openmp(void)
{
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

enum { SIZE = 32, GROUPS = 17 /* a whole block of lanes and one more */ };

/* The ramp -8 … 7, twice a group: of scale 1 and zero 0 by any method, and its codes are itself. */
static int groups_are_right(int is_wide, int32_t rounds, const Shrinkage *shrinkage)
{
    static float wide[GROUPS * SIZE];
    static bfloat16 narrow[GROUPS * SIZE], scales[GROUPS], zeros[GROUPS];
    static uint8_t plane[GROUPS * SIZE / 2];
    const Levels levels = {SIZE, 15, 8, 4, 0, rounds, 1.0f / 15};
    for (int i = 0; i < GROUPS * SIZE; i++) {
        wide[i] = (float)(i % 16 - 8);
        narrow[i] = rounded(wide[i]);
    }
    memset(plane, 0, sizeof plane);
    m1_quantize_groups(is_wide ? (const void *)wide : narrow, is_wide, GROUPS, &levels,
                       shrinkage, plane, plane, scales, zeros, 2);
    for (int group = 0; group < GROUPS; group++)
        if (widened(scales[group]) != 1.0f || widened(zeros[group]) != 0.0f)
            return 0;
    for (int i = 0; i < GROUPS * SIZE / 2; i++)
        if (plane[i] != (i * 2 % 16 | (i * 2 + 1) % 16 << 4))
            return 0;
    return 1;
}

/* Halves are rounded to even, and a row's greatest becomes 127. */
static int rows_are_right(void)
{
    static const float row[7] = {127, -127, 2.5f, 3.5f, -0.5f, 0, -64};
    static const int8_t expected[7] = {127, -127, 2, 4, 0, 0, -64};
    int8_t codes[7];
    float scale;
    m1_quantize_rows(row, 1, 1, 7, codes, &scale, 1);
    return scale == 1.0f && !memcmp(codes, expected, sizeof codes);
}

/* "abc", FIPS 180-4's own example, in every stream. */
static int hashes_are_right(void)
{
    static const uint32_t initial[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                        0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    static const uint32_t expected[8] = {0xba7816bf, 0x8f01cfea, 0x414140de, 0x5dae2223,
                                         0xb00361a3, 0x96177a9c, 0xb410ff61, 0xf20015ad};
    static const uint8_t block[64] = {'a', 'b', 'c', 0x80, [63] = 24 /* bits */};
    const uint8_t *const blocks[3] = {block, block, block};
    for (int streams = 1; streams <= 3; streams++) {
        uint32_t states[3][8], *at[3] = {states[0], states[1], states[2]};
        for (int s = 0; s < streams; s++)
            memcpy(states[s], initial, sizeof initial);
        if (!m1_sha256(at, blocks, 1, streams))
            return 1; /* this processor has no instructions for it */
        for (int s = 0; s < streams; s++)
            if (memcmp(states[s], expected, sizeof expected))
                return 0;
    }
    return 1;
}

/* A matrix of groups and one of rows of bytes, and x; more rows than two tiles have. */
enum { COLUMNS = 192, N = 5, M = 33 };
typedef struct {
    float x[M * COLUMNS], of_groups[M * N], of_bytes[M * N]; /* the products */
    bfloat16 narrow_x[M * COLUMNS];
    uint8_t codes4[N * COLUMNS / 2];
    int8_t codes8[N * COLUMNS];
    bfloat16 scales[N * COLUMNS / SIZE], zeros[N * COLUMNS / SIZE];
    float scales8[N];
} Example;

/* Whole numbers whose greatest is 127 are rounded to themselves: products come out exactly. */
static void fill(Example *e, int size)
{
    memset(e, 0, sizeof *e);
    for (int i = 0; i < M * COLUMNS; i++) {
        e->x[i] = (float)(i % SIZE ? i * 7 % 255 - 127 : 127);
        e->narrow_x[i] = rounded(e->x[i]);
    }
    for (int i = 0; i < N * COLUMNS / size; i++) {
        e->scales[i] = rounded((float)(i % 3 + 1));
        e->zeros[i] = rounded((float)(i % 5 - 2));
    }
    for (int i = 0; i < N * COLUMNS; i++) {
        e->codes8[i] = (int8_t)(i * 11 % 255 - 127);
        e->scales8[i / COLUMNS] = 0.5f;
        e->codes4[i / 2] |= (uint8_t)(i * 5 % 16 << i % 2 * 4);
    }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++)
            for (int i = n * COLUMNS; i < (n + 1) * COLUMNS; i++) {
                const float x = e->x[m * COLUMNS + i % COLUMNS], code = (float)(i * 5 % 16 - 8);
                e->of_groups[m * N + n] +=
                    x * (code * widened(e->scales[i / size]) + widened(e->zeros[i / size]));
                e->of_bytes[m * N + n] += x * (float)e->codes8[i] * 0.5f;
            }
}

static int product_is_right(
    const Example *e, int is_wide, int rows, const Stored *w, const float *expected)
{
    static float wide[M * N];
    static bfloat16 narrow[M * N]; /* the result is rounded to bfloat16 */
    const void *x = is_wide ? (const void *)e->x : e->narrow_x;
    if (!m1_multiply(x, is_wide, rows, w, is_wide ? (void *)wide : narrow, 2))
        return 0;
    for (int i = 0; i < rows * N; i++)
        if (is_wide ? wide[i] != expected[i] : narrow[i] != rounded(expected[i]))
            return 0;
    return 1;
}

/* Few rows, and many: in vectors, and in tiles where there are any. */
static int products_are_right(int is_wide, int size)
{
    static const int rows[] = {FEW_ROWS - 1, LEAST_TILE_ROWS - 1, M};
    static Example e;
    fill(&e, size);
    const Stored groups = {e.codes4, NULL, e.scales, e.zeros, NULL, N, COLUMNS, 4, 0, 8, size};
    const Stored bytes = {(const uint8_t *)e.codes8, NULL, NULL, NULL, e.scales8, N, COLUMNS, 8, 0,
                          0, GROUP_OF_X};
    for (int i = 0; i < 3; i++)
        if (!product_is_right(&e, is_wide, rows[i], &groups, e.of_groups)
            || !product_is_right(&e, is_wide, rows[i], &bytes, e.of_bytes))
            return 0;
    return 1;
}

/* 1 where everything above holds. */
M1_EXPORT int m1_self_test(void)
{
    static const Shrinkage whole = {{0}, {1}, {0}, 1e-9f}; /* there are no errors to shrink */
    for (int is_wide = 0; is_wide < 2; is_wide++)
        if (!groups_are_right(is_wide, 0, NULL) || !groups_are_right(is_wide, 3, NULL)
            || !groups_are_right(is_wide, 3, &whole) || !products_are_right(is_wide, SIZE)
            || !products_are_right(is_wide, 2 * SIZE))
            return 0;
    return rows_are_right() && hashes_are_right();
}
