/* Runs every exported function over odd sizes in buffers of exactly the size they need.
 *
 * Compiled with the sanitizers by tests/test_native_library.py: whatever is read or written outside
 * of them, or undefined, ends the program.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "common.h"

int m1_self_test(void);

static void *exactly(size_t bytes)
{
    void *found = malloc(bytes);
    if (!found)
        exit(2);
    return found;
}

/* Anything from zeros and subnormals to the ends of the range. */
static float weight(size_t i)
{
    static const float kinds[] = {0.0f, -0.0f, 1e-42f, -3e-39f, 0.02f, -1.5f, 3.3e38f, -3.3e38f};
    return kinds[(i * 2654435761u >> 7) % 8] * ((float)(i % 7) / 6);
}

static void *source_of(size_t count, int is_wide)
{
    float *wide = exactly(count * sizeof *wide);
    bfloat16 *narrow = exactly(count * sizeof *narrow);
    for (size_t i = 0; i < count; i++) {
        wide[i] = weight(i);
        narrow[i] = rounded(wide[i]);
    }
    free(is_wide ? (void *)narrow : wide);
    return is_wide ? (void *)wide : narrow;
}

static void run_groups(
    int groups, Levels levels, const Shrinkage *shrinkage, int is_wide, int threads)
{
    const size_t size = (size_t)levels.size, count = (size_t)groups;
    void *source = source_of(count * size, is_wide);
    uint8_t *low = exactly(count * size * (size_t)levels.low_bits / 8);
    uint8_t *high = levels.high_bits ? exactly(count * size * (size_t)levels.high_bits / 8) : NULL;
    bfloat16 *scales = exactly(count * sizeof *scales), *zeros = exactly(count * sizeof *zeros);
    m1_quantize_groups(source, is_wide, groups, &levels, shrinkage, low, high, scales, zeros, threads);
    free(source), free(low), free(high), free(scales), free(zeros);
}

static void run_rows(int rows, int columns, int is_wide, int threads)
{
    const size_t count = (size_t)rows * (size_t)columns;
    void *source = source_of(count, is_wide);
    int8_t *codes = exactly(count);
    float *scales = exactly((size_t)rows * sizeof *scales);
    m1_quantize_rows(source, is_wide, rows, columns, codes, scales, threads);
    if (!m1_all_finite(source, is_wide, (int64_t)count))
        exit(3);
    float *scratch = exactly((size_t)columns * sizeof *scratch);
    float *divided = exactly(count * sizeof *divided);
    m1_squared_lengths(source, is_wide, rows, columns, scratch, scales);
    m1_divide_rows(source, is_wide, rows, columns, scales, divided);
    free(source), free(codes), free(scales), free(scratch), free(divided);
}

static void run_products(int rows, int n, int columns, int size, int is_wide, int threads)
{
    const size_t weights = (size_t)n * (size_t)columns, groups = weights / (size_t)size;
    const size_t products = (size_t)rows * (size_t)n;
    void *x = source_of((size_t)rows * (size_t)columns, is_wide);
    uint8_t *codes = exactly(weights);
    bfloat16 *scales = exactly(groups * sizeof *scales), *zeros = exactly(groups * sizeof *zeros);
    float *row_scales = exactly((size_t)n * sizeof *row_scales);
    void *target = exactly(products * (is_wide ? sizeof(float) : sizeof(bfloat16)));
    for (size_t i = 0; i < weights; i++)
        codes[i] = (uint8_t)(i * 2654435761u >> 9);
    for (size_t i = 0; i < groups; i++)
        scales[i] = zeros[i] = rounded(weight(i));
    for (int i = 0; i < n; i++)
        row_scales[i] = 0.01f;
    const Stored bytes = {codes, NULL, NULL, NULL, row_scales, n, columns, 8, 0, 0, GROUP_OF_X};
    if (!m1_multiply(x, is_wide, rows, &bytes, target, threads))
        exit(4);
    static const int32_t formats[][3] = {{4, 0, 8}, {2, 1, 4}, {4, 1, 8}, {4, 2, 24}};
    for (int f = 0; f < 4; f++) {
        const int32_t *of = formats[f];
        const size_t low_bytes = weights * (size_t)of[0] / 8;
        const size_t high_bytes = weights * (size_t)of[1] / 8;
        uint8_t *low = exactly(low_bytes), *high = high_bytes ? exactly(high_bytes) : NULL;
        memcpy(low, codes, low_bytes);
        if (high)
            memcpy(high, codes, high_bytes);
        const Stored w = {low, high, scales, zeros, NULL, n, columns, of[0], of[1], of[2], size};
        if (!m1_multiply(x, is_wide, rows, &w, target, threads))
            exit(5);
        free(low), free(high);
    }
    free(x), free(codes), free(scales), free(zeros), free(row_scales), free(target);
}

static void *room_for(int64_t count, int is_wide)
{
    return exactly((size_t)count * (is_wide ? sizeof(float) : sizeof(bfloat16)));
}

/* `kind` of keys and values; a ring, so that positions do not follow each other. */
static void run_attention(int64_t rows, int64_t group, int64_t kv_heads, int64_t width, int64_t used,
                          int kind, int is_wide, int threads)
{
    const int64_t slots = used + 3, kept = kv_heads * slots * width, heads = group * kv_heads;
    const size_t scale_count = (size_t)(kept / 32);
    void *q = source_of((size_t)(heads * rows * width), is_wide);
    void *k = kind == KV_BYTES ? exactly((size_t)kept) : source_of((size_t)kept, kind == KV_FLOAT);
    void *v = kind == KV_BYTES ? exactly((size_t)kept) : source_of((size_t)kept, kind == KV_FLOAT);
    bfloat16 *scales = kind == KV_BYTES ? exactly(scale_count * sizeof *scales) : NULL;
    int64_t *key_positions = exactly((size_t)used * sizeof *key_positions);
    int64_t *query_positions = exactly((size_t)rows * sizeof *query_positions);
    void *out = room_for(rows * heads * width, is_wide);
    if (scales) {
        for (size_t i = 0; i < scale_count; i++)
            scales[i] = rounded(weight(i));
        memset(k, 0x81, (size_t)kept), memset(v, 0x7f, (size_t)kept);
    }
    for (int64_t slot = 0; slot < used; slot++)
        key_positions[slot] = (slot + used / 3) % used;
    for (int64_t row = 0; row < rows; row++)
        query_positions[row] = used - rows + row;
    for (int64_t window = 0; window <= used; window += used / 2 + 1) {
        const Attention asked = {
            q, k, v, scales, scales, query_positions, key_positions, out, rows, heads, kv_heads,
            width, slots, used, window, is_wide, kind, 0.1f,
        };
        if (!m1_attend(&asked, threads))
            exit(6);
    }
    free(q), free(k), free(v), free(scales), free(key_positions), free(query_positions), free(out);
}

static void run_heads(int64_t rows, int64_t heads, int64_t kv_heads, int64_t width, int is_wide)
{
    const size_t turns = (size_t)(rows * width / 2);
    void *packed = source_of((size_t)(rows * (heads + 2 * kv_heads) * width), is_wide);
    void *taps = source_of((size_t)(2 * kv_heads), is_wide);
    void *before = source_of((size_t)(kv_heads * width), is_wide);
    float *cos = exactly(turns * sizeof *cos), *sin = exactly(turns * sizeof *sin);
    for (size_t i = 0; i < turns; i++)
        cos[i] = sin[i] = 0.7f;
    void *q = room_for(heads * rows * width, is_wide);
    void *k = room_for(kv_heads * rows * width, is_wide);
    void *v = room_for(kv_heads * rows * width, is_wide);
    const Heads asked = {
        packed, taps, taps, before, before, cos, sin, q, k, v, rows, heads, kv_heads, width, width,
        is_wide,
    };
    m1_turn_heads(&asked, 2);
    free(packed), free(taps), free(before), free(cos), free(sin), free(q), free(k), free(v);
}

static void run_neighbours(int64_t rows, int64_t width, int is_wide)
{
    void *x = source_of((size_t)(rows * width), is_wide);
    void *by = source_of((size_t)width, is_wide), *out = room_for(rows * width, is_wide);
    m1_norm(x, by, is_wide, rows, width, 1e-6f, out, 2);
    m1_gate(x, x, is_wide, rows * width, out, 2);
    free(x), free(by), free(out);
}

static Stored stored_of(int64_t rows, int64_t columns)
{
    const size_t weights = (size_t)(rows * columns), groups = weights / 32;
    bfloat16 *scales = exactly(groups * sizeof *scales), *zeros = exactly(groups * sizeof *zeros);
    uint8_t *low = exactly(weights / 2);
    memset(low, 0x7a, weights / 2);
    for (size_t i = 0; i < groups; i++)
        scales[i] = zeros[i] = rounded(weight(i) * 0.01f);
    return (Stored){low, NULL, scales, zeros, NULL, rows, columns, 4, 0, 8, 32};
}

static void forget_stored(Stored w)
{
    free((void *)w.low), free((void *)w.scales), free((void *)w.zeros);
}

/* Two kinds of layer, a global one and a ring, some tokens further than the ring has slots. */
static void run_step(int kind, int is_wide)
{
    enum { HIDDEN = 64, INNER = 96, VOCABULARY = 37, ROWS = 4, RAW = 16, TOKENS = 40, LENT = 12000 };
    const int kept = kind == KV_BYTES ? KV_BYTES : is_wide ? KV_FLOAT : KV_BFLOAT16;
    Layer layers[2];
    for (int i = 0; i < 2; i++) {
        const int64_t kv_heads = 1, width = i ? 32 : 64, slots = i ? 11 : TOKENS;
        const int64_t values = kv_heads * slots * width;
        float *turns = exactly((size_t)(ROWS * width / 2) * sizeof *turns);
        memset(turns, 0, (size_t)(ROWS * width / 2) * sizeof *turns);
        layers[i] = (Layer){
            stored_of(HIDDEN + 2 * kv_heads * width, HIDDEN), stored_of(HIDDEN, HIDDEN),
            stored_of(INNER, HIDDEN), stored_of(INNER, HIDDEN), stored_of(HIDDEN, INNER),
            source_of(HIDDEN, is_wide), source_of(HIDDEN, is_wide), source_of(2, is_wide),
            source_of(2, is_wide), room_for(values, 1), room_for(values, 1),
            source_of((size_t)(kv_heads * RAW * width), is_wide),
            source_of((size_t)(kv_heads * RAW * width), is_wide),
            exactly((size_t)values / 32 * 2), exactly((size_t)values / 32 * 2), turns, turns,
            exactly((size_t)slots * sizeof(int64_t)), HIDDEN / width, kv_heads, width, slots,
            i ? 5 : 0,
        };
    }
    const Step step = {
        layers, stored_of(VOCABULARY, HIDDEN), source_of(HIDDEN, is_wide),
        source_of(ROWS * HIDDEN, is_wide), room_for(ROWS * HIDDEN, is_wide),
        room_for(ROWS * (HIDDEN + 128), is_wide), room_for(ROWS * HIDDEN, is_wide),
        room_for(ROWS * 64, is_wide), room_for(ROWS * 64, is_wide),
        room_for(ROWS * HIDDEN, is_wide), room_for(ROWS * INNER, is_wide),
        room_for(ROWS * INNER, is_wide), exactly(ROWS * sizeof(int64_t)),
        exactly(LENT), LENT, 2, HIDDEN, RAW, is_wide, kept, 1e-6f,
    };
    void *logits = room_for(ROWS * VOCABULARY, is_wide);
    for (int64_t position = 0, rows = 1; position + rows <= TOKENS; position += rows) {
        rows = 1 + position % ROWS;
        if (!m1_step(&step, position, rows, rows > 2 ? rows - 1 : 0, logits, 2))
            exit(7);
    }
    if (m1_step(&step, 0, 9, 0, logits, 1) || m1_step(&step, 0, 2, 2, logits, 1))
        exit(8); /* refused */
    for (int i = 0; i < 2; i++) {
        const Layer *l = layers + i;
        forget_stored(l->packed), forget_stored(l->out), forget_stored(l->gate);
        forget_stored(l->up), forget_stored(l->down);
        free((void *)l->norm), free((void *)l->post_norm), free((void *)l->taps_k);
        free((void *)l->taps_v), free(l->k), free(l->v), free(l->raw_k), free(l->raw_v);
        free(l->k_scales), free(l->v_scales), free((void *)l->cos), free(l->key_positions);
    }
    forget_stored(step.head);
    free((void *)step.norm), free(step.x), free(step.normed), free(step.packed), free(step.q);
    free(step.k), free(step.v), free(step.product), free(step.gate), free(step.up);
    free(step.positions), free(step.room), free(logits);
}

static void run_hashes(int streams, int64_t blocks)
{
    uint32_t *states[3];
    const uint8_t *from[3];
    for (int i = 0; i < streams; i++) {
        states[i] = exactly(8 * sizeof *states[i]);
        from[i] = exactly((size_t)blocks * 64);
    }
    m1_sha256(states, from, blocks, streams);
    for (int i = 0; i < streams; i++)
        free(states[i]), free((void *)from[i]);
}

static void run_all_of_attention(int is_wide)
{
    static const int64_t rows[] = {1, 3, 8}, used[] = {8, 31, 33, 100};
    static const int64_t widths[] = {16, 32, 48, 96, 6};
    for (int r = 0; r < 3; r++)
        for (int w = 0; w < 5; w++) {
            for (int u = 0; u < 4; u++)
                for (int kind = KV_FLOAT; kind <= KV_BYTES; kind++)
                    if (kind != KV_BYTES || widths[w] % 32 == 0)
                        run_attention(rows[r], 1 + r, 1 + w % 2, widths[w], used[u], kind, is_wide,
                                      1 + u);
            run_heads(rows[r], 1 + w, 1 + r, widths[w], is_wide);
            run_neighbours(rows[r], widths[w] + 1, is_wide);
        }
    for (int kind = KV_FLOAT; kind <= KV_BYTES; kind++) /* enough for several shares */
        run_attention(1, 2, 2, 96, 2000, kind, is_wide, 5);
    run_heads(2, 1, 1, 2, is_wide);
    run_neighbours(1, 1, is_wide);
    run_step(KV_FLOAT, is_wide);
    run_step(KV_BYTES, is_wide);
}

int main(void)
{
    static const int counts[] = {1, 2, 15, 16, 17, 31, 33, 100}, columns[] = {1, 7, 33, 40, 129};
    static const int32_t formats[][4] = {{7, 4, 2, 1}, {15, 8, 4, 0}, {31, 8, 4, 1}, {63, 24, 4, 2}};
    static Shrinkage shrinkage = {{0}, {0.9f, -0.2f}, {0.1f, 0.09f, 0.08f}, 1e-9f};
    for (int i = 0; i < 256; i++)
        shrinkage.powers[i] = powf(2, -0.3f * (float)(i - 127));
    for (int is_wide = 0; is_wide < 2; is_wide++) {
        run_all_of_attention(is_wide);
        for (int c = 0; c < 8; c++) {
            for (int32_t size = 32; size <= 128; size *= 2)
                for (int f = 0; f < 4; f++)
                    for (int32_t rounds = 0; rounds < 4; rounds += 3) {
                        const int32_t *of = formats[f];
                        const Levels levels = {size, of[0], of[1], of[2], of[3], rounds, 0.06f};
                        run_groups(counts[c], levels, NULL, is_wide, 1 + c % 3);
                        if (rounds)
                            run_groups(counts[c], levels, &shrinkage, is_wide, 1 + c % 3);
                    }
            for (int k = 0; k < 5; k++)
                run_rows(counts[c], columns[k], is_wide, 1 + c % 3);
            for (int32_t size = 32; size <= 128; size *= 2)
                for (int groups = 1; groups < 4; groups++) {
                    run_products(counts[c], counts[(c + 3) % 8], groups * size, size, is_wide, 2);
                    run_products(counts[(c + 3) % 8], counts[c], groups * size, size, is_wide, 1);
                }
        }
    }
    for (int32_t size = 32; size <= 128; size *= 2) /* more groups than a vector has lanes */
        for (int rows = 1; rows < 4; rows += 2)
            run_products(rows, 3, 17 * size, size, 0, 1);
    for (int streams = 1; streams <= 3; streams++)
        run_hashes(streams, 5);
    puts(m1_self_test() ? "all right" : "the self-test failed");
    return 0;
}
