// Rows of float32 or bfloat16 in and out of float32, their products, and the exponential.

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 16 };

static inline float from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

static inline uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
    return (uint16_t)((value != value ? 0x7fc00000u : rounded) >> 16);
}

static void read_row(const void *from, int64_t wide, int64_t first, int64_t count, float *restrict into) {
    if (wide) {
        memcpy(into, (const float *)from + first, count * sizeof(float));
        return;
    }
    const uint16_t *restrict half = (const uint16_t *)from + first;
    for (int64_t i = 0; i < count; i++) into[i] = from_bf16(half[i]);
}

static void write_row(void *to, int64_t wide, int64_t first, int64_t count, const float *restrict from) {
    if (wide) {
        memcpy((float *)to + first, from, count * sizeof(float));
        return;
    }
    uint16_t *restrict half = (uint16_t *)to + first;
    for (int64_t i = 0; i < count; i++) half[i] = to_bf16(from[i]);
}

static float sum_products(const float *restrict a, const float *restrict b, int64_t count) {
    float lanes[LANES] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int k = 0; k < LANES; k++) lanes[k] += a[i + k] * b[i + k];
    for (int k = 0; i < count; i++, k++) lanes[k] += a[i] * b[i];
    for (int k = 0; k < LANES; k++) sum += lanes[k];
    return sum;
}

// a * b + c, rounded once where the processor has it; elsewhere the C library would imitate it, slowly.
static inline float fused(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
    return fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// e^x within two units in the last place: 2^n times a polynomial of what is left; the compiler makes vectors of it.
static inline float power_of_e(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = fused(n, 2.12194440e-4f, fused(n, -0.693359375f, x));
    float p = 1.9875691500e-4f;
    p = fused(p, r, 1.3981999507e-3f);
    p = fused(p, r, 8.3334519073e-3f);
    p = fused(p, r, 4.1665795894e-2f);
    p = fused(p, r, 1.6666665459e-1f);
    p = fused(p, r, 5.0000001201e-1f);
    p = fused(p, r * r, r) + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return p * scale;
}
