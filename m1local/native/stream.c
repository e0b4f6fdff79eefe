/* How fast the memory can be read: what the speed of answers is a share of. */
#include "common.h"

/* The sum of `count` words, read by `threads`, so that none is left out. */
M1_EXPORT uint64_t m1_read(const uint64_t *words, int64_t count, int threads)
{
    uint64_t total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total) schedule(static)
    for (int64_t i = 0; i < count; i++)
        total += words[i];
    return total;
}
