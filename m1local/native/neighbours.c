/* What stands between the products of a layer (m1local/model.py): the norm, the heads' convolution and
 * rotation, the gate. torch does each in several passes: of a few tokens beginning them takes longer
 * than computing, of many the memory between them. */
#include <math.h>

#include "common.h"
#include "exponential.h"
#include "lanes.h"

enum { ALONE = 1 << 16 /* values that are not worth a second thread */ };

INLINE float value_at(const void *values, int is_wide, int64_t at)
{
    return is_wide ? ((const float *)values)[at] : widened(((const bfloat16 *)values)[at]);
}

INLINE void put_at(void *values, int is_wide, int64_t at, float value)
{
    if (is_wide)
        ((float *)values)[at] = value;
    else
        ((bfloat16 *)values)[at] = narrowed(value);
}

INLINE void norm_row(const void *x, const void *weight, int is_wide, int64_t first, int64_t width,
                     float eps, void *out)
{
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < width; i++) {
        const float value = value_at(x, is_wide, first + i);
        total += value * value;
    }
    const float scale = 1 / sqrtf(total / (float)width + eps);
#pragma omp simd
    for (int64_t i = 0; i < width; i++)
        put_at(out, is_wide, first + i,
               value_at(x, is_wide, first + i) * scale * value_at(weight, is_wide, i));
}

/* RMSNorm of rows (rows, width), with `weight` (width) of the same type. */
M1_EXPORT void m1_norm(const void *x, const void *weight, int is_wide, int64_t rows, int64_t width,
                       float eps, void *out, int threads)
{
#pragma omp parallel for num_threads(threads) if (rows * width >= ALONE)
    for (int64_t row = 0; row < rows; row++) {
        if (is_wide)
            norm_row(x, weight, 1, row * width, width, eps, out);
        else
            norm_row(x, weight, 0, row * width, width, eps, out);
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
        const int64_t previous_at = row ? at - in_row : head * h->before_stride;
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
M1_EXPORT void m1_turn_heads(const Heads *h, int threads)
{
    const int64_t keys = h->heads * h->width, values = keys + h->kv_heads * h->width;
    const int64_t all = h->heads + 2 * h->kv_heads;
#pragma omp parallel for num_threads(threads) if (all * h->width * h->rows >= ALONE)
    for (int64_t head = 0; head < all; head++) {
        const int64_t key = head - h->heads, value = key - h->kv_heads;
        if (key < 0)
            mix_and_turn(h, 0, NULL, NULL, head, 1, h->q);
        else if (value < 0)
            mix_and_turn(h, keys, h->before_k, h->taps_k, key, 1, h->k);
        else
            mix_and_turn(h, values, h->before_v, h->taps_v, value, 0, h->v);
    }
}

INLINE void gate_values(
    const void *gate, const void *up, int is_wide, int64_t first, int64_t last, void *out)
{
#pragma omp simd
    for (int64_t i = first; i < last; i++) {
        const float g = value_at(gate, is_wide, i);
        /* e^-|g|, at most 1; exponential() ends at e^-87, which a large g would make much of. */
        const float away = g < -87 ? 0 : exponential(g < 0 ? g : -g);
        const float sigmoid = (g < 0 ? away : 1) / (1 + away);
        put_at(out, is_wide, i, g * sigmoid * value_at(up, is_wide, i));
    }
}

/* silu(gate) * up, of `count` values. */
M1_EXPORT void m1_gate(
    const void *gate, const void *up, int is_wide, int64_t count, void *out, int threads)
{
    const int64_t parts = count < ALONE ? 1 : threads, of_part = (count + parts - 1) / parts;
#pragma omp parallel for num_threads(threads) if (parts > 1)
    for (int64_t part = 0; part < parts; part++) {
        const int64_t first = part * of_part;
        const int64_t last = first + of_part < count ? first + of_part : count;
        if (is_wide)
            gate_values(gate, up, 1, first, last, out);
        else
            gate_values(gate, up, 0, first, last, out);
    }
}
