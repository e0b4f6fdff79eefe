/* What stands between the products of a layer (m1local/model.py), for a few tokens: the norm, the
 * heads' convolution and rotation, the gate. torch does each in several passes, of which beginning
 * takes longer than computing. */
#include <math.h>

#include "common.h"
#include "exponential.h"

static float value_at(const void *values, int is_wide, int64_t at)
{
    return is_wide ? ((const float *)values)[at] : widened(((const bfloat16 *)values)[at]);
}

static void put_at(void *values, int is_wide, int64_t at, float value)
{
    if (is_wide)
        ((float *)values)[at] = value;
    else
        ((bfloat16 *)values)[at] = narrowed(value);
}

/* RMSNorm of rows (rows, width), with `weight` (width) of the same type. */
M1_EXPORT void m1_norm(const void *x, const void *weight, int is_wide, int64_t rows, int64_t width,
                       float eps, void *out)
{
    for (int64_t row = 0; row < rows; row++) {
        float squares[16] = {0}, total = 0;
        for (int64_t i = 0; i < width / 16 * 16; i += 16)
            for (int j = 0; j < 16; j++) {
                const float value = value_at(x, is_wide, row * width + i + j);
                squares[j] += value * value;
            }
        for (int64_t i = width / 16 * 16; i < width; i++)
            squares[i % 16] += value_at(x, is_wide, row * width + i)
                               * value_at(x, is_wide, row * width + i);
        for (int j = 0; j < 16; j++)
            total += squares[j];
        const float scale = 1 / sqrtf(total / (float)width + eps);
        for (int64_t i = 0; i < width; i++)
            put_at(out, is_wide, row * width + i,
                   value_at(x, is_wide, row * width + i) * scale * value_at(weight, is_wide, i));
    }
}

/* One head's convolution over time, x[t-1] and x[t] by two taps, and, where there is one, rotation
 * of column j with column j + width / 2. */
static void mix_and_turn(const Heads *h, int64_t first_column, const void *before, const void *taps,
                         int64_t head, int turn, void *out)
{
    const int64_t in_row = (h->heads + 2 * h->kv_heads) * h->width, half = h->width / 2;
    const int wide = h->is_wide;
    const float old = taps ? value_at(taps, wide, head * 2) : 0;
    const float new = taps ? value_at(taps, wide, head * 2 + 1) : 1;
    for (int64_t row = 0; row < h->rows; row++) {
        const int64_t at = row * in_row + first_column + head * h->width;
        const void *previous = row ? h->packed : before;
        const int64_t previous_at = row ? at - in_row : head * h->width;
        const int64_t to = (head * h->rows + row) * h->width;
        for (int64_t j = 0; j < half; j++) {
            float low = new * value_at(h->packed, wide, at + j);
            float high = new * value_at(h->packed, wide, at + half + j);
            if (taps) {
                low += old * value_at(previous, wide, previous_at + j);
                high += old * value_at(previous, wide, previous_at + half + j);
            }
            const float cos = turn ? h->cos[row * half + j] : 1;
            const float sin = turn ? h->sin[row * half + j] : 0;
            put_at(out, wide, to + j, turn ? low * cos - high * sin : low);
            put_at(out, wide, to + half + j, turn ? high * cos + low * sin : high);
        }
    }
}

/* Rows of q, k and v side by side become heads: q turned, k mixed and turned, v mixed. */
M1_EXPORT void m1_turn_heads(const Heads *h)
{
    const int64_t keys = h->heads * h->width, values = keys + h->kv_heads * h->width;
    for (int64_t head = 0; head < h->heads; head++)
        mix_and_turn(h, 0, NULL, NULL, head, 1, h->q);
    for (int64_t head = 0; head < h->kv_heads; head++) {
        mix_and_turn(h, keys, h->before_k, h->taps_k, head, 1, h->k);
        mix_and_turn(h, values, h->before_v, h->taps_v, head, 0, h->v);
    }
}

/* silu(gate) * up, of `count` values. */
M1_EXPORT void m1_gate(const void *gate, const void *up, int is_wide, int64_t count, void *out)
{
    for (int64_t i = 0; i < count; i++) {
        const float g = value_at(gate, is_wide, i);
        /* e^-|g|, at most 1; exponential() ends at e^-87, which a large g would make much of. */
        const float away = g < -87 ? 0 : exponential(g < 0 ? g : -g);
        const float sigmoid = (g < 0 ? away : 1) / (1 + away);
        put_at(out, is_wide, i, g * sigmoid * value_at(up, is_wide, i));
    }
}
