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
    LINE = 64,            /* bytes that the memory gives at a time */
    TOGETHER = 4,         /* keys, or vectors of a value */
    MOST_QUERIES = LANES == 16 ? 5 : 2, /* at once: what the registers hold */
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

/* Let a block of keys or values come while the one before it is computed with. */
static void await(const void *from, int kind, int64_t first, int64_t count)
{
    const int64_t size = kind == KV_FLOAT ? 4 : kind == KV_BFLOAT16 ? 2 : 1;
    const char *begin = (const char *)from + first * size;
    for (int64_t i = 0; i < count * size; i += LINE)
        will_read(begin + i);
}

/* Scores of `n` queries with all keys of a block: each loaded vector serves several products. */
TEMPLATE void score(
    const float *queries, const float *keys, int64_t width, int n, float scores[][KEYS])
{
    for (int key = 0; key < KEYS; key += TOGETHER) {
        Floats sums[MOST_QUERIES][TOGETHER];
        UNROLL for (int q = 0; q < n; q++)
            UNROLL for (int u = 0; u < TOGETHER; u++) sums[q][u] = all_of(0);
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) {
            Floats query[MOST_QUERIES];
            UNROLL for (int q = 0; q < n; q++) query[q] = load_floats(queries + q * width + i);
            UNROLL for (int u = 0; u < TOGETHER; u++) {
                const Floats of_key = load_floats(keys + (key + u) * width + i);
                UNROLL for (int q = 0; q < n; q++)
                    sums[q][u] = plus_product(sums[q][u], query[q], of_key);
            }
        }
        UNROLL for (int q = 0; q < n; q++) {
            four_totals(sums[q], scores[q] + key);
            for (int64_t j = i; j < width; j++)
                for (int u = 0; u < TOGETHER; u++)
                    scores[q][key + u] += queries[q * width + j] * keys[(key + u) * width + j];
        }
    }
}

/* mixed = mixed * fading + the values of `count` keys by their weights, for `n` queries. */
TEMPLATE void mix(
    float *mixed, const float *fading, float weights[][KEYS], const float *values, int64_t count,
    int64_t width, int n)
{
    int64_t i = 0;
    for (; i + TOGETHER * LANES <= width; i += TOGETHER * LANES) {
        Floats sums[MOST_QUERIES][TOGETHER];
        UNROLL for (int q = 0; q < n; q++)
            UNROLL for (int u = 0; u < TOGETHER; u++)
                sums[q][u] = times(load_floats(mixed + q * width + i + u * LANES), all_of(fading[q]));
        for (int64_t key = 0; key < count; key++)
            UNROLL for (int u = 0; u < TOGETHER; u++) {
                const Floats value = load_floats(values + key * width + i + u * LANES);
                UNROLL for (int q = 0; q < n; q++)
                    sums[q][u] = plus_product(sums[q][u], all_of(weights[q][key]), value);
            }
        UNROLL for (int q = 0; q < n; q++)
            UNROLL for (int u = 0; u < TOGETHER; u++)
                store_floats(mixed + q * width + i + u * LANES, sums[q][u]);
    }
    for (; i < width; i++)
        for (int q = 0; q < n; q++) {
            float sum = mixed[q * width + i] * fading[q];
            for (int64_t key = 0; key < count; key++)
                sum += weights[q][key] * values[key * width + i];
            mixed[q * width + i] = sum;
        }
}

INLINE int sees(const Attention *a, int64_t position, int64_t key_position)
{
    const int64_t distance = position - key_position;
    return distance >= 0 && (a->window == 0 || distance < a->window);
}

/* The greater; no number if either is none. */
INLINE float greater_of(float a, float b) { return a >= b || a != a ? a : b; }

/* Scores become weights, and what was known fades by what is returned. */
static float weigh(
    const Attention *a, int64_t position, const int64_t *key_positions, int64_t count,
    float scores[KEYS], float *greatest, float *sum)
{
    float most = *greatest, total = 0;
    for (int64_t key = 0; key < KEYS; key++) {
        if (key >= count || !sees(a, position, key_positions[key]))
            scores[key] = -INFINITY;
        most = greater_of(most, scores[key]);
    }
    if (most == -INFINITY) {
        memset(scores, 0, KEYS * sizeof *scores);
        return 1;
    }
    const float fading = exponential(*greatest - most);
#pragma omp simd
    for (int key = 0; key < KEYS; key++) {
        const float weight = exponential(scores[key] - most);
        scores[key] = scores[key] == -INFINITY ? 0 : weight;
    }
    for (int key = 0; key < KEYS; key++)
        total += scores[key];
    *sum = *sum * fading + total;
    *greatest = most;
    return fading;
}

/* What `n` queries, from number `query` on, make of a block of keys. */
TEMPLATE void attend_block(
    const Attention *a, const float *queries, int64_t query, const int64_t *key_positions,
    const float *keys, const float *values, int64_t count, Shares shares, int64_t first, int n)
{
    float scores[MOST_QUERIES][KEYS], fading[MOST_QUERIES];
    score(queries + query * a->width, keys, a->width, n, scores);
    for (int q = 0; q < n; q++)
        fading[q] = weigh(a, a->query_positions[(query + q) % a->rows], key_positions, count,
                          scores[q], shares.greatest + first + query + q,
                          shares.sum + first + query + q);
    mix(shares.mixed + (first + query) * a->width, fading, scores, values, count, a->width, n);
}

/* Values that none of the rows of queries from `row` to `end` sees count as zeros: no number, times a
 * weight of 0, would be none either. */
static void hide(const Attention *a, const int64_t *key_positions, int64_t count, int64_t row,
                 int64_t end, float *values)
{
    for (int64_t key = 0; key < count; key++) {
        int seen = 0;
        for (int64_t at = row; at < end; at++)
            seen |= sees(a, a->query_positions[at], key_positions[key]);
        if (!seen)
            memset(values + key * a->width, 0, (size_t)a->width * sizeof *values);
    }
}

static int all_numbers(const float *values, int64_t count)
{
    float zero = 0;
#pragma omp simd reduction(+ : zero)
    for (int64_t i = 0; i < count; i++)
        zero += values[i] * 0.0f;
    return zero == 0;
}

/* The keys from `first` to `last` of a head, for all queries that share it. */
static void attend_share(const Attention *a, int64_t head, int64_t first, int64_t last,
                         const float *queries, float *room, Shares shares, int64_t share)
{
    const int64_t count = a->heads / a->kv_heads * a->rows, width = a->width, at = share * count;
    float *keys = room, *values = room + KEYS * width;
    for (int64_t query = 0; query < count; query++) {
        shares.greatest[at + query] = -INFINITY;
        shares.sum[at + query] = 0;
    }
    memset(shares.mixed + at * width, 0, (size_t)(count * width) * sizeof(float));
    for (int64_t key = first; key < last; key += KEYS) {
        const int64_t here = last - key < KEYS ? last - key : KEYS;
        const int64_t from = (head * a->slots + key) * width;
        const int64_t *positions = a->key_positions + key;
        load_values(a->k, a->k_scales, a->kind, from, here * width, keys);
        load_values(a->v, a->v_scales, a->kind, from, here * width, values);
        hide(a, positions, here, 0, a->rows, values);
        const int64_t left = last - key - here, next = left < KEYS ? left : KEYS;
        await(a->k, a->kind, from + here * width, next * width);
        await(a->v, a->kind, from + here * width, next * width);
        memset(keys + here * width, 0, (size_t)((KEYS - here) * width) * sizeof(float));
        int64_t query = 0;
        if (a->rows > 1 && !all_numbers(values, here * width)) /* each with what it sees itself */
            for (; query < count; query++) {
                const int64_t row = query % a->rows;
                load_values(a->v, a->v_scales, a->kind, from, here * width, values);
                hide(a, positions, here, row, row + 1, values);
                attend_block(a, queries, query, positions, keys, values, here, shares, at, 1);
            }
        for (; query + MOST_QUERIES <= count; query += MOST_QUERIES)
            attend_block(a, queries, query, positions, keys, values, here, shares, at,
                         MOST_QUERIES);
        for (; query < count; query++)
            attend_block(a, queries, query, positions, keys, values, here, shares, at, 1);
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
    float *queries = room_for((size_t)(a->heads * a->rows * width) * sizeof(float));
    float *room = room_for((size_t)(tasks * 2 * KEYS * width) * sizeof(float));
    float *sums = room_for((size_t)(all * (width + 2)) * sizeof(float));
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
