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

/* A vector of the first plane holds `apart` vectors of codes: of every second column, or of every
 * fourth where a code has two bits there. */
enum { MOST_APART = 4 };
typedef struct {
    Bytes of[MOST_APART];
} Codes;

INLINE int parted(int low_bits) { return low_bits == 2 ? 4 : low_bits == 4 ? 2 : 1; }

INLINE Codes load_codes(const uint8_t *low, const uint8_t *high, int low_bits, int high_bits)
{
    const int apart = parted(low_bits);
    const Bytes below = load_bytes(low);
    Codes codes;
    UNROLL for (int i = 0; i < apart; i++)
        codes.of[i] = masked(shifted_right(below, i * low_bits), (1 << low_bits) - 1);
    if (!high_bits)
        return codes;
    const Bytes above = apart * high_bits == 4 ? spread_halves(high) : spread_quarters(high);
    UNROLL for (int i = 0; i < apart; i++) {
        const int up = low_bits - i * high_bits;
        const Bytes there = up < 0 ? shifted_right(above, -up) : shifted_left(above, up);
        codes.of[i] = joined(codes.of[i], there, ((1 << high_bits) - 1) << low_bits);
    }
    return codes;
}

#endif
