/* e^x, in a form that compilers turn into vectors: the library's is a call for every value. */
#ifndef M1_EXPONENTIAL_H
#define M1_EXPONENTIAL_H

#include <math.h>
#include <stdint.h>
#include <string.h>

/* For x of at most 88 (Cody and Waite's reduction, a polynomial of degree 6): 2e-7 relative; below
 * -87 it is e^-87, and no number of no number. */
static inline float exponential(float x)
{
    x = x < -87.0f ? -87.0f : x;
    const float whole = 12582912.0f; /* 1.5 * 2^23: adding it rounds, on every processor at once */
    const float n = (x * 1.44269504f + whole) - whole, known = n > -126 ? n : -126;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.98756915e-4f;
    p = p * r + 1.39819995e-3f;
    p = p * r + 8.33345187e-3f;
    p = p * r + 4.16657963e-2f;
    p = p * r + 1.66666655e-1f;
    p = p * r + 5.00000012e-1f;
    p = p * r * r + r + 1;
    const uint32_t bits = (uint32_t)((int32_t)known + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

#endif
