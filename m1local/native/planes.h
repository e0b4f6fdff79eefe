/* Codes of W, from the planes of 1, 2 or 4 bits that they are stored in (m1local/formats/groups.py).
 *
 * The lowest bits of a code lie in the first plane, the others, where there are more, in the second;
 * in each, the codes of columns that follow each other begin with the lowest bits of a byte.
 */
#ifndef M1_PLANES_H
#define M1_PLANES_H

#include "common.h"
#include "lanes.h"

/* Four codes of `bits` each, from the lowest bits of `from`, a byte for each. */
INLINE uint32_t spread(uint32_t from, int bits)
{
    if (bits == 8)
        return from;
    if (bits == 4) {
        from = (from | from << 8) & 0x00ff00ff;
        return (from | from << 4) & 0x0f0f0f0f;
    }
    if (bits == 2) {
        from = (from | from << 12) & 0x000f000f;
        return (from | from << 6) & 0x03030303;
    }
    from = (from | from << 14) & 0x00030003;
    return (from | from << 7) & 0x01010101;
}

/* What a vector's worth of even, or of odd, columns takes of a plane: BYTES * bits / 4 bytes. Those
 * of a plane of 4 bits fill a vector; of 2 bits half of one, of 1 bit a quarter. */
typedef struct {
    Bytes even, odd;
} Pair;

INLINE Pair load_pair(const uint8_t *at, int bits)
{
    if (bits == 4) {
        const Bytes both = load_bytes(at);
        return (Pair){low_nibbles(both), high_nibbles(both)};
    }
    if (bits == 2) { /* a byte holds two even columns and two odd ones: two bytes of each */
        const Bytes halves = widened_halves(at);
        const Bytes even = either(masked(halves, 0x0003), masked(shifted_left(halves, 4), 0x0300));
        const Bytes odd = either(masked(shifted_right(halves, 2), 0x0003),
                                 masked(shifted_left(halves, 2), 0x0300));
        return (Pair){even, odd};
    }
    const Bytes words = widened_quarters(at); /* a byte holds four of each */
    const Bytes odd = shifted_right(words, 1);
    return (Pair){four_of(words), four_of(odd)};
}

/* Both planes of a vector of codes. */
INLINE Pair load_codes(const uint8_t *low, const uint8_t *high, int low_bits, int high_bits)
{
    const Pair below = load_pair(low, low_bits);
    if (!high_bits)
        return below;
    const Pair above = load_pair(high, high_bits);
    return (Pair){either(below.even, shifted_left(above.even, low_bits)),
                  either(below.odd, shifted_left(above.odd, low_bits))};
}

#endif
