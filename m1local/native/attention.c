/* Attention of a few new tokens over a cache of keys and values as it lies: 32 or 16 bits, or bytes
 * with a scale for each 32 of them (m1local/kv_store.py).
 *
 * The keys are taken in blocks that stay in the cache, and every block once, for all heads that
 * share it; what is known of the greatest score so far is mended as it rises (arXiv 1805.02867). A
 * long cache is parted among threads, whose shares are joined at the end.
 */
#include <math.h>
#include <stdlib.h>

#include "activations.h"
#include "exponential.h"

enum {
    KEYS = 32,            /* of a block */
    SCALED = 32,          /* bytes that share a scale */
    LEAST_KEYS = 256,     /* of a share: fewer are not worth a thread */
    LEAST_READ = 1 << 18  /* bytes of keys: the same, of all heads */
};

/* The shares of one head's queries: greatest score, sum of weights, weighted values. */
typedef struct {
    float *greatest, *sum, *mixed; /* [share][query], [share][query], [share][query][width] */
} Shares;

/* `count` values, from number `at` on, as floats. */
static void load_values(const void *from, const bfloat16 *scales, int kind, int64_t at,
                        int64_t count, float *to)
{
    if (kind == KV_FLOAT)
        memcpy(to, (const float *)from + at, (size_t)count * sizeof *to);
    else if (kind == KV_BFLOAT16)
        for (int64_t i = 0; i < count; i++)
            to[i] = widened(((const bfloat16 *)from)[at + i]);
    else
        for (int64_t i = 0; i < count; i += SCALED) {
            const float scale = widened(scales[(at + i) / SCALED]);
            for (int j = 0; j < SCALED; j++)
                to[i + j] = scale * (float)((const int8_t *)from)[at + i + j];
        }
}

INLINE float dot_of(const float *a, const float *b, int64_t width)
{
    Floats sum = all_of(0), more = all_of(0);
    int64_t i = 0;
    for (; i + 2 * LANES <= width; i += 2 * LANES) {
        sum = plus_product(sum, load_floats(a + i), load_floats(b + i));
        more = plus_product(more, load_floats(a + i + LANES), load_floats(b + i + LANES));
    }
    float total = total_of(plus_product(sum, more, all_of(1)));
    for (; i < width; i++)
        total += a[i] * b[i];
    return total;
}

/* mixed = mixed * fading + the values of `count` keys by their weights. */
INLINE void mix(float *mixed, float fading, const float *weights, const float *values,
                int64_t count, int64_t width)
{
    int64_t i = 0;
    for (; i + 4 * LANES <= width; i += 4 * LANES) {
        Floats sums[4];
        UNROLL for (int u = 0; u < 4; u++)
            sums[u] = times(load_floats(mixed + i + u * LANES), all_of(fading));
        for (int64_t key = 0; key < count; key++) {
            const Floats weight = all_of(weights[key]);
            UNROLL for (int u = 0; u < 4; u++)
                sums[u] = plus_product(
                    sums[u], weight, load_floats(values + key * width + i + u * LANES));
        }
        UNROLL for (int u = 0; u < 4; u++) store_floats(mixed + i + u * LANES, sums[u]);
    }
    for (; i < width; i++) {
        float sum = mixed[i] * fading;
        for (int64_t key = 0; key < count; key++)
            sum += weights[key] * values[key * width + i];
        mixed[i] = sum;
    }
}

/* The greater; no number if either is none. */
INLINE float greater_of(float a, float b) { return a >= b || a != a ? a : b; }

/* What a query, at `position`, makes of a block of keys. */
static void attend_block(
    const Attention *a, const float *query, int64_t position, const int64_t *key_positions,
    const float *keys, const float *values, int64_t count, float *greatest, float *sum,
    float *mixed)
{
    float scores[KEYS], most = *greatest;
    for (int64_t key = 0; key < count; key++) {
        const int64_t distance = position - key_positions[key];
        const int visible = distance >= 0 && (a->window == 0 || distance < a->window);
        scores[key] = visible ? dot_of(query, keys + key * a->width, a->width) : -INFINITY;
        most = greater_of(most, scores[key]);
    }
    if (most == -INFINITY)
        return;
    const float fading = exponential(*greatest - most);
    float total = 0;
    for (int64_t key = 0; key < count; key++) {
        const float weight = exponential(scores[key] - most);
        scores[key] = scores[key] == -INFINITY ? 0 : weight;
    }
    for (int64_t key = 0; key < count; key++)
        total += scores[key];
    *sum = *sum * fading + total;
    *greatest = most;
    /* What is not seen is not read: its value may be no number, which times 0 is none either. */
    float left = fading;
    for (int64_t key = 0, from; key < count; key++) {
        for (from = key; key < count && scores[key] != 0; key++)
            ;
        if (key == from)
            continue;
        mix(mixed, left, scores + from, values + from * a->width, key - from, a->width);
        left = 1;
    }
}

/* The keys from `first` to `last` of a head, for all queries that share it. */
static void attend_share(const Attention *a, int64_t head, int64_t first, int64_t last,
                         const float *queries, float *room, Shares shares, int64_t share)
{
    const int64_t count = a->heads / a->kv_heads * a->rows, width = a->width;
    float *keys = room, *values = room + KEYS * width;
    for (int64_t query = 0; query < count; query++) {
        shares.greatest[share * count + query] = -INFINITY;
        shares.sum[share * count + query] = 0;
    }
    for (int64_t at = first; at < last; at += KEYS) {
        const int64_t keys_here = last - at < KEYS ? last - at : KEYS;
        const int64_t from = (head * a->slots + at) * width;
        load_values(a->k, a->k_scales, a->kind, from, keys_here * width, keys);
        load_values(a->v, a->v_scales, a->kind, from, keys_here * width, values);
        for (int64_t query = 0; query < count; query++) {
            const int64_t i = share * count + query;
            attend_block(a, queries + query * width, a->query_positions[query % a->rows],
                         a->key_positions + at, keys, values, keys_here, shares.greatest + i,
                         shares.sum + i, shares.mixed + i * width);
        }
    }
}

/* The shares of one query become its result. */
static void join(const Attention *a, Shares shares, int64_t count, int64_t parts, int64_t query,
                 int64_t to)
{
    float greatest = -INFINITY, sum = 0;
    for (int64_t part = 0; part < parts; part++) {
        greatest = greater_of(greatest, shares.greatest[part * count + query]);
    }
    float *first = shares.mixed + query * a->width;
    for (int64_t part = 0; part < parts; part++) {
        const int64_t i = part * count + query;
        const float fading = shares.greatest[i] == -INFINITY
                                 ? 0 : exponential(shares.greatest[i] - greatest);
        const float *mixed = shares.mixed + i * a->width;
        sum += shares.sum[i] * fading;
        for (int64_t j = 0; j < a->width; j++)
            first[j] = (part ? first[j] : 0) + fading * mixed[j];
    }
    for (int64_t j = 0; j < a->width; j++) {
        const float value = first[j] / sum;
        if (a->is_wide)
            ((float *)a->out)[to + j] = value;
        else
            ((bfloat16 *)a->out)[to + j] = narrowed(value);
    }
}

/* Queries (heads, rows, width) over keys and values (kv_heads, slots, width), of which the first
 * `used` slots hold something; the result is (rows, heads, width). 0 where there is no memory. */
M1_EXPORT int m1_attend(const Attention *a, int threads)
{
    const int64_t group = a->heads / a->kv_heads, count = group * a->rows, width = a->width;
    const int64_t read = a->kv_heads * a->used * width;
    int64_t parts = (threads + a->kv_heads - 1) / a->kv_heads * 2, used = threads;
    if (parts > a->used / LEAST_KEYS)
        parts = a->used / LEAST_KEYS > 0 ? a->used / LEAST_KEYS : 1;
    if (read < LEAST_READ)
        used = parts = 1;
    const int64_t keys = (a->used + parts - 1) / parts, tasks = a->kv_heads * parts;
    const int64_t of_head = parts * count, all = a->kv_heads * of_head;
    float *queries = whole((size_t)(a->heads * a->rows * width) * sizeof(float));
    float *room = whole((size_t)(tasks * 2 * KEYS * width) * sizeof(float));
    float *sums = whole((size_t)(all * (width + 2)) * sizeof(float));
    const int done = queries && room && sums;
    if (done) {
        load_values(a->q, NULL, a->is_wide ? KV_FLOAT : KV_BFLOAT16, 0, a->heads * a->rows * width,
                    queries);
        for (int64_t i = 0; i < a->heads * a->rows * width; i++)
            queries[i] *= a->scale;
#pragma omp parallel for num_threads((int)used) schedule(dynamic, 1) if (used > 1)
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t head = task / parts, part = task % parts, first = part * keys;
            const int64_t last = first + keys < a->used ? first + keys : a->used;
            float *of = sums + head * of_head * (width + 2);
            const Shares shares = {of, of + of_head, of + 2 * of_head};
            attend_share(a, head, first, last, queries + head * count * width,
                         room + task * 2 * KEYS * width, shares, part);
        }
        for (int64_t head = 0; head < a->kv_heads; head++) {
            float *of = sums + head * of_head * (width + 2);
            const Shares shares = {of, of + of_head, of + 2 * of_head};
            for (int64_t query = 0; query < count; query++) {
                const int64_t row = query % a->rows, of_all = head * group + query / a->rows;
                join(a, shares, count, parts, query, (row * a->heads + of_all) * width);
            }
        }
    }
    give_back(queries);
    give_back(room);
    give_back(sums);
    return done;
}
