/* A few tokens through all layers (m1local/model.py) in one call: products, neighbours, attention and
 * the cache's slots, in the order and with the roundings of the Python that it stands for, so that
 * the bits are equal. What comes before, the embedding's rows and the rotations, is handed in.
 */
#include <math.h>

#include "matmul.h"

enum { SCALED = 32 /* bytes of keys and values that share a scale */ };

static int64_t bytes_of(const Step *s, int64_t values) { return values * (s->is_wide ? 4 : 2); }

/* x += product, rounded as torch rounds it. */
static void add(const Step *s, int64_t count)
{
    if (s->is_wide) {
        float *x = s->x;
        const float *product = s->product;
#pragma omp simd
        for (int64_t i = 0; i < count; i++)
            x[i] += product[i];
    } else {
        bfloat16 *x = s->x;
        const bfloat16 *product = s->product;
#pragma omp simd
        for (int64_t i = 0; i < count; i++)
            x[i] = narrowed(widened(x[i]) + widened(product[i]));
    }
}

/* 32 values as bytes and their scale, as m1local/kv_store.py makes them. */
static bfloat16 to_bytes(const Step *s, const void *from, int64_t at, int8_t *to)
{
    float values[SCALED], greatest = 0;
    for (int i = 0; i < SCALED; i++) {
        values[i] = s->is_wide ? ((const float *)from)[at + i]
                               : widened(((const bfloat16 *)from)[at + i]);
        if (greatest == greatest && !(fabsf(values[i]) <= greatest)) /* what is no number stays */
            greatest = fabsf(values[i]);
    }
    const bfloat16 scale = narrowed(greatest / 127);
    const float inverse = inverse_of(widened(scale));
    for (int i = 0; i < SCALED; i++) {
        const float code = nearbyintf(values[i] * inverse);
        to[i] = code > 127 ? 127 : code < -127 ? -127 : code == code ? (int8_t)code : 0;
    }
    return scale;
}

/* Put `rows` rows of one head where the cache keeps them. */
static void keep(const Step *s, const Layer *l, const void *from, int64_t head, int64_t rows,
                 int64_t position, void *kept, bfloat16 *scales)
{
    for (int64_t row = 0; row < rows; row++) {
        const int64_t slot = head * l->slots + (position + row) % l->slots;
        const int64_t at = (head * rows + row) * l->width;
        if (s->kind != KV_BYTES) {
            memcpy((char *)kept + bytes_of(s, slot * l->width),
                   (const char *)from + bytes_of(s, at), (size_t)bytes_of(s, l->width));
            continue;
        }
        for (int64_t i = 0; i < l->width; i += SCALED)
            scales[(slot * l->width + i) / SCALED] =
                to_bytes(s, from, at + i, (int8_t *)kept + slot * l->width + i);
    }
}

/* Keep keys or values from before the convolution, which begin at `column` of a row. */
static void keep_raw(const Step *s, const Layer *l, int64_t column, int64_t rows, int64_t position,
                     void *raw)
{
    const int64_t in_row = (l->heads + 2 * l->kv_heads) * l->width;
    for (int64_t head = 0; head < l->kv_heads; head++)
        for (int64_t row = 0; row < rows; row++) {
            const int64_t slot = head * s->raw_slots + (position + row) % s->raw_slots;
            const int64_t at = row * in_row + column + head * l->width;
            memcpy((char *)raw + bytes_of(s, slot * l->width),
                   (const char *)s->packed + bytes_of(s, at), (size_t)bytes_of(s, l->width));
        }
}

/* Rows of q, k and v become heads, and the cache grows by them. */
static void place(const Step *s, const Layer *l, int64_t position, int64_t rows, int threads)
{
    const int64_t before = (position + s->raw_slots - 1) % s->raw_slots * l->width;
    const int64_t keys = l->heads * l->width, values = keys + l->kv_heads * l->width;
    const Heads heads = {
        .packed = s->packed, .taps_k = l->taps_k, .taps_v = l->taps_v,
        .before_k = (const char *)l->raw_k + bytes_of(s, before),
        .before_v = (const char *)l->raw_v + bytes_of(s, before),
        .cos = l->cos, .sin = l->sin, .q = s->q, .k = s->k, .v = s->v,
        .rows = rows, .heads = l->heads, .kv_heads = l->kv_heads, .width = l->width,
        .before_stride = s->raw_slots * l->width, .is_wide = s->is_wide,
    };
    m1_turn_heads(&heads, threads);
    keep_raw(s, l, keys, rows, position, l->raw_k);
    keep_raw(s, l, values, rows, position, l->raw_v);
    for (int64_t head = 0; head < l->kv_heads; head++) {
        keep(s, l, s->k, head, rows, position, l->k, l->k_scales);
        keep(s, l, s->v, head, rows, position, l->v, l->v_scales);
    }
}

/* Which position each slot holds when the sequence is `end` tokens long. */
static void say_positions(const Layer *l, int64_t end)
{
    const int64_t used = end < l->slots ? end : l->slots, last = (end - 1) % l->slots;
    for (int64_t slot = 0; slot < used; slot++)
        l->key_positions[slot] = end - 1 - (last - slot + l->slots) % l->slots;
}

static int attend(const Step *s, const Layer *l, int64_t end, int64_t rows, int threads)
{
    const Attention asked = {
        .q = s->q, .k = l->k, .v = l->v, .k_scales = l->k_scales, .v_scales = l->v_scales,
        .query_positions = s->positions, .key_positions = l->key_positions, .out = s->normed,
        .rows = rows, .heads = l->heads, .kv_heads = l->kv_heads, .width = l->width,
        .slots = l->slots, .used = end < l->slots ? end : l->slots, .window = l->window,
        .is_wide = s->is_wide, .kind = s->kind, .scale = (float)(1 / sqrt((double)l->width)),
    };
    return m1_attend(&asked, threads);
}

static int read_layer(const Step *s, const Layer *l, int64_t position, int64_t rows, int threads)
{
    const Stored *both[2] = {&l->gate, &l->up};
    void *const gate_and_up[2] = {s->gate, s->up};
    m1_norm(s->x, l->norm, s->is_wide, rows, s->hidden, s->eps, s->normed, threads);
    if (!m1_multiply(s->normed, s->is_wide, rows, &l->packed, s->packed, threads))
        return 0;
    place(s, l, position, rows, threads);
    if (!attend(s, l, position + rows, rows, threads)
        || !m1_multiply(s->normed, s->is_wide, rows, &l->out, s->product, threads))
        return 0;
    add(s, rows * s->hidden);
    m1_norm(s->x, l->post_norm, s->is_wide, rows, s->hidden, s->eps, s->normed, threads);
    if (!multiply_each(s->normed, s->is_wide, rows, both, gate_and_up, 2, threads))
        return 0;
    m1_gate(s->gate, s->up, s->is_wide, rows * l->gate.rows, s->gate, threads);
    if (!m1_multiply(s->gate, s->is_wide, rows, &l->down, s->product, threads))
        return 0;
    add(s, rows * s->hidden);
    return 1;
}

static int read_step(const Step *s, int64_t position, int64_t rows, int64_t first_wanted,
                     void *logits, int threads)
{
    for (int64_t row = 0; row < rows; row++)
        s->positions[row] = position + row;
    for (int64_t i = 0; i < s->layer_count; i++) {
        const Layer *l = s->layers + i;
        int said = 0;
        for (int64_t j = 0; j < i && !said; j++)
            said = s->layers[j].key_positions == l->key_positions;
        if (!said)
            say_positions(l, position + rows);
        if (!read_layer(s, l, position, rows, threads))
            return 0;
    }
    m1_norm(s->x, s->norm, s->is_wide, rows, s->hidden, s->eps, s->normed, threads);
    const char *wanted = (const char *)s->normed + bytes_of(s, first_wanted * s->hidden);
    return m1_multiply(wanted, s->is_wide, rows - first_wanted, &s->head, logits, threads);
}

/* Read `rows` tokens from `position` on, at most FEW_ROWS; the logits of those from row `first_wanted` on
 * follow each other. 0 where there is no memory: then the same call, or any other way, may be tried
 * again, since what was written lies where it will be written again. */
M1_EXPORT int m1_step(const Step *s, int64_t position, int64_t rows, int64_t first_wanted,
                      void *logits, int threads)
{
    if (rows < 1 || rows > FEW_ROWS || first_wanted >= rows)
        return 0;
    lend(s->room, (size_t)s->room_bytes);
    const int done = read_step(s, position, rows, first_wanted, logits, threads);
    lend(NULL, 0);
    return done;
}
