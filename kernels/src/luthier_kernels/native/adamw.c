// Steps of AdamW with moments in 8 bits for each block, or in float32; parameters and gradients are float32 or bfloat16.

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512DQ__
#include <immintrin.h>
#endif

enum { BLOCK_LIMIT = 2048 };

static inline float from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

// A number that depends on place and key alone (lowbias32), so that every device rounds alike.
static inline uint32_t mix(uint32_t place, uint32_t key) {
    uint32_t x = place * 0x9E3779B1u + key;
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
}

// The values themselves where they are float32, otherwise a copy in `into`.
static float *read_values(const void *from, int64_t wide, int64_t first, int64_t count, float *restrict into) {
    if (wide) return (float *)from + first;
    const uint16_t *restrict half = (const uint16_t *)from + first;
    for (int64_t i = 0; i < count; i++) into[i] = from_bf16(half[i]);
    return into;
}

// Rounded to the nearest bfloat16, or with `random` up as often as the rest is large.
static void write_values(void *to, int64_t wide, int64_t first, int64_t count, const float *restrict from,
                         int64_t random, uint32_t key) {
    if (wide) return;  // they were changed in place
    uint16_t *restrict half = (uint16_t *)to + first;
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, from + i, 4);
        uint32_t add = random ? mix((uint32_t)(first + i), key) & 0xffff : 0x7fff + ((bits >> 16) & 1);
        half[i] = (uint16_t)(((bits & 0x7f800000) == 0x7f800000 ? bits : bits + add) >> 16);
    }
}

typedef struct {
    float beta1, beta2, eps, decay, size, root;
} rates;

static rates read_rates(double beta1, double beta2, double eps, double decay, double size, double root) {
    rates made = {(float)beta1, (float)beta2, (float)eps, (float)decay, (float)size, (float)root};
    return made;
}

// m, v and p after the step; all of `count` neighbours. `roots` takes the square roots of v, which are needed again.
static void update_values(float *restrict p, const float *restrict g, float *restrict m, float *restrict v,
                          float *restrict roots, int64_t count, rates r) {
    float by_root = 1.0f / r.root;
    for (int64_t i = 0; i < count; i++) {
        m[i] = r.beta1 * m[i] + (1.0f - r.beta1) * g[i];
        v[i] = r.beta2 * v[i] + (1.0f - r.beta2) * (g[i] * g[i]);
        roots[i] = sqrtf(v[i]);
        p[i] = p[i] * r.decay - r.size * (m[i] / (roots[i] * by_root + r.eps));
    }
}

// The largest magnitude, found in the order of bits.
static float largest_of(const float *restrict values, int64_t count) {
    int32_t bits = 0;
    for (int64_t i = 0; i < count; i++) {
        int32_t size;
        memcpy(&size, values + i, 4);
        size &= 0x7fffffff;
        bits = size > bits ? size : bits;
    }
    float found;
    memcpy(&found, &bits, 4);
    return found;
}

// First moment: sign(c) (|c| / 127)^4 of the block's largest. Second: (c / 255)^8, rounded up, so that it is never less.
static void decode_moments(const int8_t *restrict mc, const uint8_t *restrict vc, float ms, float vs, int64_t count,
                           float *restrict m, float *restrict v) {
    for (int64_t i = 0; i < count; i++) {
        float a = (float)mc[i] * (1.0f / 127.0f), b = (float)vc[i] * (1.0f / 255.0f);
        float a2 = a * a, b2 = b * b, b4 = b2 * b2;
        m[i] = (a < 0.0f ? -(a2 * a2) : a2 * a2) * ms;
        v[i] = b4 * b4 * vs;
    }
}

typedef struct {
    float by_m, by_v; // what makes the largest of a block 1
} Levels;

static inline void encode_exactly(const float *m, const float *roots, int64_t count, Levels by, int8_t *mc, uint8_t *vc) {
    for (int64_t i = 0; i < count; i++) {
        float code = rintf(sqrtf(sqrtf(fabsf(m[i]) * by.by_m)) * 127.0f);
        mc[i] = (int8_t)(int32_t)(m[i] < 0.0f ? -code : code);
        float up = ceilf(sqrtf(sqrtf(roots[i] * by.by_v)) * 255.0f);
        vc[i] = (uint8_t)(int32_t)(up < 255.0f ? up : 255.0f);
    }
}

#ifdef __AVX512DQ__
// x^(1/4) within 2^-20 of it, 0 where x is 0. Only one of the two roots is the processor's own, which are slow.
static inline __m512 fourth_root(__m512 x, __mmask16 nonzero) {
    __m512 root = _mm512_sqrt_ps(x), t = _mm512_rsqrt14_ps(root), made = _mm512_mul_ps(root, t);
    __m512 missing = _mm512_fnmadd_ps(made, made, root);
    return _mm512_maskz_fmadd_ps(nonzero, _mm512_mul_ps(t, _mm512_set1_ps(0.5f)), missing, made);
}

// Sixteen codes of both moments. Returns 0, and writes nothing, where a value is within 2^-11 of one that is rounded
// otherwise, or not a number: there the exact roots decide.
static inline int encode_nearly(const float *m, const float *roots, Levels by, int8_t *mc, uint8_t *vc) {
    const __m512 zero = _mm512_setzero_ps(), near = _mm512_set1_ps(1.0f / 2048.0f), half = _mm512_set1_ps(0.5f);
    __m512 given = _mm512_loadu_ps(m), x = _mm512_mul_ps(_mm512_abs_ps(given), _mm512_set1_ps(by.by_m));
    __m512 y = _mm512_mul_ps(_mm512_loadu_ps(roots), _mm512_set1_ps(by.by_v));
    __mmask16 some = _mm512_cmp_ps_mask(y, zero, _CMP_NEQ_UQ);
    x = _mm512_mul_ps(fourth_root(x, _mm512_cmp_ps_mask(x, zero, _CMP_NEQ_UQ)), _mm512_set1_ps(127.0f));
    y = _mm512_mul_ps(fourth_root(y, some), _mm512_set1_ps(255.0f));
    __m512 off_x = _mm512_abs_ps(_mm512_reduce_ps(x, 0)), off_y = _mm512_abs_ps(_mm512_reduce_ps(y, 0));
    __mmask16 sure_x = _mm512_cmp_ps_mask(off_x, _mm512_sub_ps(half, near), _CMP_LT_OQ);
    __mmask16 sure_y = _mm512_cmp_ps_mask(off_y, near, _CMP_GT_OQ) | (__mmask16)~some;
    if ((__mmask16)(sure_x & sure_y) != 0xffff) return 0;
    __m512i code = _mm512_cvtps_epi32(x), above = _mm512_cvtps_epi32(_mm512_add_ps(y, half)); // no whole number but 0
    code = _mm512_mask_sub_epi32(code, _mm512_cmp_ps_mask(given, zero, _CMP_LT_OQ), _mm512_setzero_si512(), code);
    _mm_storeu_si128((__m128i *)mc, _mm512_cvtepi32_epi8(code));
    _mm_storeu_si128((__m128i *)vc, _mm512_cvtepi32_epi8(above));
    return 1;
}
#endif

// The next block comes from memory while this one is computed.
static inline void fetch(const void *from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)from + i, 1);
}

static void encode_moments(const float *restrict m, const float *restrict v, const float *restrict roots,
                           int64_t count, int8_t *restrict mc, uint8_t *restrict vc, float *ms, float *vs) {
    float largest_m = largest_of(m, count), largest_v = largest_of(v, count);
    Levels by = {largest_m > 0.0f ? 1.0f / largest_m : 0.0f, largest_v > 0.0f ? 1.0f / sqrtf(largest_v) : 0.0f};
    int64_t i = 0;
#ifdef __AVX512DQ__
    for (; i + 16 <= count; i += 16)
        if (!encode_nearly(m + i, roots + i, by, mc + i, vc + i)) encode_exactly(m + i, roots + i, 16, by, mc + i, vc + i);
#endif
    encode_exactly(m + i, roots + i, count - i, by, mc + i, vc + i);
    *ms = largest_m, *vs = largest_v;
}

void step_eight(void *param, int64_t wide, const void *grad, int64_t wide_grad, int8_t *mc, float *ms, uint8_t *vc,
                float *vs, int64_t start, int64_t end, int64_t total, int64_t block, double beta1, double beta2,
                double eps, double decay, double size, double root, int64_t random, int64_t key) {
    rates r = read_rates(beta1, beta2, eps, decay, size, root);
    float p_copy[BLOCK_LIMIT], g_copy[BLOCK_LIMIT], m[BLOCK_LIMIT], v[BLOCK_LIMIT], roots[BLOCK_LIMIT];
    for (int64_t b = start; b < end; b++) {
        int64_t first = b * block, count = total - first < block ? total - first : block;
        fetch((const char *)param + (first + block) * (wide ? 4 : 2), block * (wide ? 4 : 2));
        fetch((const char *)grad + (first + block) * (wide_grad ? 4 : 2), block * (wide_grad ? 4 : 2));
        fetch(mc + first + block, block), fetch(vc + first + block, block);
        float *p = read_values(param, wide, first, count, p_copy);
        const float *g = read_values(grad, wide_grad, first, count, g_copy);
        decode_moments(mc + first, vc + first, ms[b], vs[b], count, m, v);
        update_values(p, g, m, v, roots, count, r);
        encode_moments(m, v, roots, count, mc + first, vc + first, ms + b, vs + b);
        write_values(param, wide, first, count, p, random, (uint32_t)key);
    }
}

void step_float(void *param, int64_t wide, const void *grad, int64_t wide_grad, float *first_moments,
                float *second_moments, int64_t start, int64_t end, int64_t total, int64_t block, double beta1,
                double beta2, double eps, double decay, double size, double root, int64_t random, int64_t key) {
    rates r = read_rates(beta1, beta2, eps, decay, size, root);
    float p_copy[BLOCK_LIMIT], g_copy[BLOCK_LIMIT], roots[BLOCK_LIMIT];
    for (int64_t b = start; b < end; b++) {
        int64_t first = b * block, count = total - first < block ? total - first : block;
        float *p = read_values(param, wide, first, count, p_copy);
        const float *g = read_values(grad, wide_grad, first, count, g_copy);
        update_values(p, g, first_moments + first, second_moments + first, roots, count, r);
        write_values(param, wide, first, count, p, random, (uint32_t)key);
    }
}
