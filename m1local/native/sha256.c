/* SHA-256 of several streams at once, by the instructions that x86 processors have for it.
 *
 * One stream waits for its own last round most of the time; another, or two, fit in between. Rounds,
 * words of the schedule and constants as in FIPS 180-4; A holds a, b, e and f of a state, B the rest.
 */
#include "common.h"

enum { BLOCK = 64, MOST_STREAMS = 3 };

#ifdef __SHA__
#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

static const uint32_t constants[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

typedef struct {
    __m128i a, b;
} Halves;

INLINE Halves load_state(const uint32_t *state)
{
    const __m128i low = _mm_shuffle_epi32(_mm_loadu_si128((const void *)state), 0xB1);
    const __m128i high = _mm_shuffle_epi32(_mm_loadu_si128((const void *)(state + 4)), 0x1B);
    return (Halves){_mm_alignr_epi8(low, high, 8), _mm_blend_epi16(high, low, 0xF0)};
}

INLINE void store_state(Halves halves, uint32_t *state)
{
    const __m128i low = _mm_shuffle_epi32(halves.a, 0x1B);
    const __m128i high = _mm_shuffle_epi32(halves.b, 0xB1);
    _mm_storeu_si128((void *)state, _mm_blend_epi16(low, high, 0xF0));
    _mm_storeu_si128((void *)(state + 4), _mm_alignr_epi8(high, low, 8));
}

/* The words of the schedule for rounds 4 * i on; the last sixteen stand in `words`. */
INLINE __m128i next_words(__m128i words[4], const uint8_t *block, int i)
{
    const __m128i swapped = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    if (i < 4)
        return _mm_shuffle_epi8(_mm_loadu_si128((const void *)(block + 16 * i)), swapped);
    const __m128i last = words[(i + 3) % 4];
    const __m128i first = _mm_sha256msg1_epu32(words[i % 4], words[(i + 1) % 4]);
    const __m128i seven = _mm_alignr_epi8(last, words[(i + 2) % 4], 4);
    return _mm_sha256msg2_epu32(_mm_add_epi32(first, seven), last);
}

INLINE void add_block(Halves *halves, const uint8_t *const *blocks, int64_t at, int streams)
{
    Halves new[MOST_STREAMS];
    __m128i words[MOST_STREAMS][4];
    UNROLL for (int s = 0; s < streams; s++) new[s] = halves[s];
    UNROLL for (int i = 0; i < 16; i++) {
        const __m128i added = _mm_loadu_si128((const void *)(constants + 4 * i));
        UNROLL for (int s = 0; s < streams; s++) {
            words[s][i % 4] = next_words(words[s], blocks[s] + at, i);
            const __m128i sum = _mm_add_epi32(words[s][i % 4], added);
            new[s].b = _mm_sha256rnds2_epu32(new[s].b, new[s].a, sum);
            new[s].a = _mm_sha256rnds2_epu32(new[s].a, new[s].b, _mm_shuffle_epi32(sum, 0x0E));
        }
    }
    UNROLL for (int s = 0; s < streams; s++)
        halves[s] = (Halves){_mm_add_epi32(halves[s].a, new[s].a),
                             _mm_add_epi32(halves[s].b, new[s].b)};
}

INLINE void add_blocks(
    uint32_t *const *states, const uint8_t *const *blocks, int64_t count, int streams)
{
    Halves halves[MOST_STREAMS];
    UNROLL for (int s = 0; s < streams; s++) halves[s] = load_state(states[s]);
    for (int64_t i = 0; i < count; i++)
        add_block(halves, blocks, i * BLOCK, streams);
    UNROLL for (int s = 0; s < streams; s++) store_state(halves[s], states[s]);
}

/* `count` blocks of each of up to three streams, added to the streams' states; 0 where this processor
 * has no instructions for it. */
M1_EXPORT int m1_sha256(
    uint32_t *const *states, const uint8_t *const *blocks, int64_t count, int streams)
{
    if (streams == MOST_STREAMS)
        add_blocks(states, blocks, count, MOST_STREAMS);
    else if (streams == 2)
        add_blocks(states, blocks, count, 2);
    else if (streams == 1)
        add_blocks(states, blocks, count, 1);
    else
        return 0;
    return 1;
}

#else
M1_EXPORT int m1_sha256(
    uint32_t *const *states, const uint8_t *const *blocks, int64_t count, int streams)
{
    (void)states, (void)blocks, (void)count, (void)streams;
    return 0;
}
#endif
