// Ternary weights and int8 activations. A weight [rows, columns] is divided into groups of neighbours in a row, of which
// each has a scale; scales are addressed as scale[row * row_stride + group * group_stride], so that one for the whole
// weight has strides of 0. Loops over sixteen lanes are written out for the compiler to make vectors of.

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
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline int64_t shorter(int64_t a, int64_t b) { return a < b ? a : b; }

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef float HalfFloats __attribute__((vector_size(2 * LANES)));
typedef double Doubles __attribute__((vector_size(4 * LANES)));

// Sixteen weights of float32 (`wide`) or bfloat16, or as many as there are, with zeros behind.
static inline Floats read_weights(const void *weight, int64_t wide, int64_t first, int64_t count) {
    Floats made = {0};
    if (wide) {
        memcpy(&made, (const float *)weight + first, count * 4);
        return made;
    }
    uint16_t half[LANES] = {0};
    memcpy(half, (const uint16_t *)weight + first, count * 2);
    for (int k = 0; k < LANES; k++) made[k] = from_bf16(half[k]);
    return made;
}

typedef struct {
    Doubles near, far;
    Ints kept;
} Sums;

static inline Sums add_above(Sums sums, Floats weights, Ints inside, float threshold) {
    Ints bits = (Ints)weights & 0x7fffffff;
    Ints above = ((Floats)bits > threshold) & inside;
    Floats sizes = (Floats)(bits & above);
    HalfFloats half[2];
    memcpy(half, &sizes, sizeof sizes);
    sums.near += __builtin_convertvector(half[0], Doubles);
    sums.far += __builtin_convertvector(half[1], Doubles);
    sums.kept -= above;
    return sums;
}

// Sum of |w| and number of w where |w| > threshold, over `count` neighbours.
static inline void sum_group(const void *weight, int64_t wide, int64_t first, int64_t count, float threshold, double *sum,
                             int64_t *number) {
    Sums sums = {{0}, {0}, {0}};
    Ints all = {0}, inside = {0};
    all = ~all;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        sums = add_above(sums, read_weights(weight, wide, first + i, LANES), all, threshold);
    for (int64_t k = 0; k < count - i; k++) inside[k] = -1;
    if (i < count) sums = add_above(sums, read_weights(weight, wide, first + i, count - i), inside, threshold);
    *sum = 0, *number = 0;
    for (int k = 0; k < LANES; k++)
        *sum += k < LANES / 2 ? sums.near[k] : sums.far[k - LANES / 2], *number += sums.kept[k];
}

void sum_above(const void *weight, int64_t wide, int64_t start, int64_t end, int64_t columns, int64_t group,
               const float *thresholds, int64_t row_stride, int64_t group_stride, double *sums, int64_t *numbers) {
    int64_t groups = (columns + group - 1) / group;
    for (int64_t r = start; r < end; r++)
        for (int64_t g = 0; g < groups; g++) {
            int64_t first = r * columns + g * group, count = shorter(group, columns - g * group);
            float threshold = thresholds[r * row_stride + g * group_stride];
            if (wide)
                sum_group(weight, 1, first, count, threshold, sums + r * groups + g, numbers + r * groups + g);
            else
                sum_group(weight, 0, first, count, threshold, sums + r * groups + g, numbers + r * groups + g);
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

#define AS_IT_IS(value) (value)
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
