// Ternary weights and int8 activations. A weight [rows, columns] is divided into groups of neighbours in a row, of which
// each has a scale; scales are addressed as scale[row * row_stride + group * group_stride], so that one for the whole
// weight has strides of 0. Loops over sixteen lanes are written out for the compiler to make vectors of.

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#include <immintrin.h>
#define DOTS 1
#endif

enum { LANES = 16, PACKED_BLOCK = 256 };

static inline float from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

static inline uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline int64_t shorter(int64_t a, int64_t b) { return a < b ? a : b; }

// Sum of |w| and number of w where |w| > threshold, over `count` neighbours.
#define SUM_ABOVE(NAME, TYPE, READ)                                                                          \
    static void NAME(const TYPE *restrict w, int64_t count, float threshold, double *sum, int64_t *number) { \
        double lanes[LANES] = {0};                                                                           \
        int32_t kept[LANES] = {0};                                                                           \
        int64_t i = 0;                                                                                       \
        for (; i + LANES <= count; i += LANES)                                                               \
            for (int k = 0; k < LANES; k++) {                                                                \
                float size = fabsf(READ(w[i + k]));                                                          \
                lanes[k] += size > threshold ? size : 0.0f;                                                  \
                kept[k] += size > threshold;                                                                 \
            }                                                                                                \
        for (int k = 0; i < count; i++, k++) {                                                               \
            float size = fabsf(READ(w[i]));                                                                  \
            lanes[k] += size > threshold ? size : 0.0f;                                                      \
            kept[k] += size > threshold;                                                                     \
        }                                                                                                    \
        *sum = 0, *number = 0;                                                                               \
        for (int k = 0; k < LANES; k++) *sum += lanes[k], *number += kept[k];                                \
    }
#define AS_IT_IS(value) (value)
SUM_ABOVE(sum_above_float, float, AS_IT_IS)
SUM_ABOVE(sum_above_bf16, uint16_t, from_bf16)

void sum_above(const void *weight, int64_t wide, int64_t start, int64_t end, int64_t columns, int64_t group,
               const float *thresholds, int64_t row_stride, int64_t group_stride, double *sums, int64_t *numbers) {
    int64_t groups = (columns + group - 1) / group;
    for (int64_t r = start; r < end; r++)
        for (int64_t g = 0; g < groups; g++) {
            int64_t first = r * columns + g * group, count = shorter(group, columns - g * group);
            float threshold = thresholds[r * row_stride + g * group_stride];
            double *sum = sums + r * groups + g;
            int64_t *number = numbers + r * groups + g;
            if (wide)
                sum_above_float((const float *)weight + first, count, threshold, sum, number);
            else
                sum_above_bf16((const uint16_t *)weight + first, count, threshold, sum, number);
        }
}

// code = 1 where w * factor > threshold, -1 where it is < -threshold, 0 between.
void encode_ternary(const void *weight, int64_t wide, int64_t start, int64_t end, int64_t columns, int64_t group,
                    const float *factors, const float *thresholds, int64_t row_stride, int64_t group_stride,
                    int8_t *codes) {
    int64_t groups = (columns + group - 1) / group;
    for (int64_t r = start; r < end; r++)
        for (int64_t g = 0; g < groups; g++) {
            int64_t first = r * columns + g * group, count = shorter(group, columns - g * group);
            int64_t place = r * row_stride + g * group_stride;
            float factor = factors[place], above = thresholds[place], below = -above;
            int8_t *restrict out = codes + first;
            if (wide) {
                const float *restrict w = (const float *)weight + first;
                for (int64_t i = 0; i < count; i++) out[i] = (w[i] * factor > above) - (w[i] * factor < below);
            } else {
                const uint16_t *restrict w = (const uint16_t *)weight + first;
                for (int64_t i = 0; i < count; i++) {
                    float value = from_bf16(w[i]) * factor;
                    out[i] = (value > above) - (value < below);
                }
            }
        }
}

// codes * scale, as float32 (`wide`) or bfloat16.
void expand_codes(const int8_t *codes, int64_t start, int64_t end, int64_t columns, int64_t group, const float *scales,
                  int64_t row_stride, int64_t group_stride, int64_t wide, void *out) {
    int64_t groups = (columns + group - 1) / group;
    for (int64_t r = start; r < end; r++)
        for (int64_t g = 0; g < groups; g++) {
            int64_t first = r * columns + g * group, count = shorter(group, columns - g * group);
            float scale = scales[r * row_stride + g * group_stride];
            const int8_t *restrict given = codes + first;
            if (wide) {
                float *restrict made = (float *)out + first;
                for (int64_t i = 0; i < count; i++) made[i] = (float)given[i] * scale;
            } else {
                uint16_t *restrict made = (uint16_t *)out + first;
                for (int64_t i = 0; i < count; i++) made[i] = to_bf16((float)given[i] * scale);
            }
        }
}

// Rows in int8: code = round(x * 127 / absmax), ties to even; step = absmax / 127.
#define QUANTIZE_ROW(NAME, TYPE, READ)                                                                   \
    static void NAME(const TYPE *restrict x, int64_t columns, int8_t *restrict codes, float *step) {     \
        int32_t bits = 0; /* magnitudes in the order of their bits */                                    \
        for (int64_t i = 0; i < columns; i++) {                                                          \
            float value = READ(x[i]);                                                                    \
            int32_t size;                                                                                \
            memcpy(&size, &value, 4);                                                                    \
            size &= 0x7fffffff;                                                                          \
            bits = size > bits ? size : bits;                                                            \
        }                                                                                                \
        float largest;                                                                                   \
        memcpy(&largest, &bits, 4);                                                                      \
        largest = largest > 1e-5f ? largest : 1e-5f;                                                     \
        float factor = 127.0f / largest;                                                                 \
        for (int64_t i = 0; i < columns; i++) codes[i] = (int8_t)(int32_t)rintf(READ(x[i]) * factor);    \
        *step = largest / 127.0f;                                                                        \
    }
QUANTIZE_ROW(quantize_row_float, float, AS_IT_IS)
QUANTIZE_ROW(quantize_row_bf16, uint16_t, from_bf16)

void quantize_rows(const void *states, int64_t wide, int64_t start, int64_t end, int64_t columns, int8_t *codes,
                   float *steps) {
    for (int64_t r = start; r < end; r++)
        if (wide)
            quantize_row_float((const float *)states + r * columns, columns, codes + r * columns, steps + r);
        else
            quantize_row_bf16((const uint16_t *)states + r * columns, columns, codes + r * columns, steps + r);
}

// (sum * step of the row) * scale of the column, as float32 or bfloat16; one scale for all has a stride of 0.
void scale_sums(const int32_t *sums, int64_t start, int64_t end, int64_t columns, const float *steps,
                const float *scales, int64_t stride, int64_t wide, void *out) {
    for (int64_t r = start; r < end; r++) {
        const int32_t *restrict given = sums + r * columns;
        float step = steps[r];
        float *restrict single = (float *)out + r * columns;
        uint16_t *restrict half = (uint16_t *)out + r * columns;
        if (wide && stride)
            for (int64_t i = 0; i < columns; i++) single[i] = (float)given[i] * step * scales[i];
        else if (wide)
            for (int64_t i = 0; i < columns; i++) single[i] = (float)given[i] * step * scales[0];
        else if (stride)
            for (int64_t i = 0; i < columns; i++) half[i] = to_bf16((float)given[i] * step * scales[i]);
        else
            for (int64_t i = 0; i < columns; i++) half[i] = to_bf16((float)given[i] * step * scales[0]);
    }
}

// Sum of x * (code + 1) over one packed block of 256 columns, 64 bytes: byte p holds columns p, p + 64, p + 128, p + 192
// at bits 1:0, 3:2, 5:4, 7:6.
static inline int32_t dot_block(const uint8_t *restrict packed, const int8_t *restrict x) {
    int32_t sum = 0;
    for (int part = 0; part < 4; part++)
        for (int p = 0; p < 64; p++) sum += ((packed[p] >> (2 * part)) & 3) * x[part * 64 + p];
    return sum;
}

// Sums of products of `rows` int8 rows and packed weight rows `start` to `end`, int32 [rows, total]. `ones` are the sums
// of each row of states, as codes are stored plus one.
void multiply_packed(const uint8_t *packed, const int8_t *states, const int32_t *ones, int64_t rows, int64_t start,
                     int64_t end, int64_t total, int64_t blocks, int32_t *sums) {
    for (int64_t n = start; n < end; n++) {
        const uint8_t *weight = packed + n * blocks * 64;
        for (int64_t m = 0; m < rows; m++) {
            const int8_t *x = states + m * blocks * PACKED_BLOCK;
#ifdef DOTS
            const __m512i low = _mm512_set1_epi8(3);
            __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
            for (int64_t k = 0; k < blocks; k++) {
                __m512i w = _mm512_loadu_si512(weight + k * 64);
                const int8_t *part = x + k * PACKED_BLOCK;
                a = _mm512_dpbusd_epi32(a, _mm512_and_si512(w, low), _mm512_loadu_si512(part));
                b = _mm512_dpbusd_epi32(b, _mm512_and_si512(_mm512_srli_epi16(w, 2), low), _mm512_loadu_si512(part + 64));
                c = _mm512_dpbusd_epi32(c, _mm512_and_si512(_mm512_srli_epi16(w, 4), low), _mm512_loadu_si512(part + 128));
                d = _mm512_dpbusd_epi32(d, _mm512_and_si512(_mm512_srli_epi16(w, 6), low), _mm512_loadu_si512(part + 192));
            }
            int32_t sum = _mm512_reduce_add_epi32(_mm512_add_epi32(_mm512_add_epi32(a, b), _mm512_add_epi32(c, d)));
#else
            int32_t sum = 0;
            for (int64_t k = 0; k < blocks; k++) sum += dot_block(weight + k * 64, x + k * PACKED_BLOCK);
#endif
            sums[m * total + n] = sum - ones[m];
        }
    }
}
