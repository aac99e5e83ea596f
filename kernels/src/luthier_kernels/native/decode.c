// Products of few rows of states by ternary weights: decoding. The weight is read once, from int8 codes or from two bits.

#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#include <immintrin.h>
#define DOTS 1
#endif

enum { PACKED_BLOCK = 256 };

static inline uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Products of few rows of states [rows, columns] int8 by weight rows `start` to `end` of `total`, from codes -1, 0, 1 or from
// packed ones. Codes count as codes plus one, which is unsigned as the instruction wants; the sum of the states is taken off.
typedef struct {
    const int8_t *states;
    const float *steps, *scales;
    int64_t stride, rows, columns, start, end, total, wide;
    void *out;
} Product;

enum { MOST_ROWS = 8 };

static inline int32_t sum_states(const int8_t *restrict x, int64_t count) {
    int32_t sum = 0;
    for (int64_t i = 0; i < count; i++) sum += x[i];
    return sum;
}

static inline void put_product(const Product *given, int64_t m, int64_t n, int32_t sum) {
    float value = (float)sum * given->steps[m] * given->scales[n * given->stride];
    if (given->wide)
        ((float *)given->out)[m * given->total + n] = value;
    else
        ((uint16_t *)given->out)[m * given->total + n] = to_bf16(value);
}

// Four weight rows are read at once, far from each other, and fetched ahead: that is nearest to the bandwidth of memory.
enum { TOGETHER = 4, AHEAD = 1024 };

// The rows n, n + quarter, ... of `start` to `end`, of which the last are repeated.
static inline void choose_rows(int64_t n, int64_t quarter, int64_t end, int64_t *chosen) {
    for (int j = 0; j < TOGETHER; j++) chosen[j] = n + j * quarter < end ? n + j * quarter : n;
}

static inline void put_products(const Product *given, int64_t m, const int64_t *chosen, const int32_t *sums, int32_t offset) {
    for (int j = 0; j < TOGETHER; j++) put_product(given, m, chosen[j], sums[j] - offset);
}

// Sums of x * (code + 1) over the chosen rows.
static inline void dot_codes(const void *weight, const int64_t *chosen, const int8_t *restrict x, int64_t count,
                             int32_t *sums) {
    const int8_t *codes = weight;
#ifdef DOTS
    const __m512i one = _mm512_set1_epi8(1);
    __m512i near[TOGETHER] = {0}, far[TOGETHER] = {0};
    int64_t k = 0;
    for (; k + 128 <= count; k += 128) {
        __m512i first = _mm512_loadu_si512(x + k), second = _mm512_loadu_si512(x + k + 64);
        for (int j = 0; j < TOGETHER; j++) {
            const int8_t *w = codes + chosen[j] * count + k;
            _mm_prefetch((const char *)w + AHEAD, _MM_HINT_T0);
            _mm_prefetch((const char *)w + AHEAD + 64, _MM_HINT_T0);
            near[j] = _mm512_dpbusd_epi32(near[j], _mm512_add_epi8(_mm512_loadu_si512(w), one), first);
            far[j] = _mm512_dpbusd_epi32(far[j], _mm512_add_epi8(_mm512_loadu_si512(w + 64), one), second);
        }
    }
    for (; k < count; k += 64) {
        __mmask64 inside = count - k < 64 ? ((__mmask64)1 << (count - k)) - 1 : ~(__mmask64)0;
        __m512i part = _mm512_maskz_loadu_epi8(inside, x + k); // states outside are 0
        for (int j = 0; j < TOGETHER; j++) {
            __m512i w = _mm512_maskz_loadu_epi8(inside, codes + chosen[j] * count + k);
            near[j] = _mm512_dpbusd_epi32(near[j], _mm512_add_epi8(w, one), part);
        }
    }
    for (int j = 0; j < TOGETHER; j++) sums[j] = _mm512_reduce_add_epi32(_mm512_add_epi32(near[j], far[j]));
#else
    for (int j = 0; j < TOGETHER; j++) {
        const int8_t *restrict w = codes + chosen[j] * count;
        int32_t sum = 0;
        for (int64_t k = 0; k < count; k++) sum += (w[k] + 1) * x[k];
        sums[j] = sum;
    }
#endif
}

// Sums of x * (code + 1) over the chosen packed rows: byte p of a block holds columns p, p + 64, p + 128, p + 192 at bits
// 1:0, 3:2, 5:4, 7:6.
static inline void dot_packed(const void *weight, const int64_t *chosen, const int8_t *restrict x, int64_t blocks,
                              int32_t *sums) {
    const uint8_t *packed = weight;
#ifdef DOTS
    const __m512i low = _mm512_set1_epi8(3);
    __m512i even[TOGETHER] = {0}, odd[TOGETHER] = {0};
    for (int64_t k = 0; k < blocks; k++) {
        __m512i part[4];
        for (int i = 0; i < 4; i++) part[i] = _mm512_loadu_si512(x + k * PACKED_BLOCK + i * 64);
        for (int j = 0; j < TOGETHER; j++) {
            const uint8_t *row = packed + (chosen[j] * blocks + k) * 64;
            __m512i w = _mm512_loadu_si512(row);
            _mm_prefetch((const char *)row + AHEAD, _MM_HINT_T0);
            even[j] = _mm512_dpbusd_epi32(even[j], _mm512_and_si512(w, low), part[0]);
            odd[j] = _mm512_dpbusd_epi32(odd[j], _mm512_and_si512(_mm512_srli_epi16(w, 2), low), part[1]);
            even[j] = _mm512_dpbusd_epi32(even[j], _mm512_and_si512(_mm512_srli_epi16(w, 4), low), part[2]);
            odd[j] = _mm512_dpbusd_epi32(odd[j], _mm512_and_si512(_mm512_srli_epi16(w, 6), low), part[3]);
        }
    }
    for (int j = 0; j < TOGETHER; j++) sums[j] = _mm512_reduce_add_epi32(_mm512_add_epi32(even[j], odd[j]));
#else
    for (int j = 0; j < TOGETHER; j++) {
        const uint8_t *restrict row = packed + chosen[j] * blocks * 64;
        int32_t sum = 0;
        for (int64_t k = 0; k < blocks; k++)
            for (int part = 0; part < 4; part++)
                for (int p = 0; p < 64; p++)
                    sum += ((row[k * 64 + p] >> (2 * part)) & 3) * x[k * PACKED_BLOCK + part * 64 + p];
        sums[j] = sum;
    }
#endif
}

// One of the two sums above. It is a constant of each caller, and so compiled into it.
typedef void Dot(const void *weight, const int64_t *chosen, const int8_t *restrict x, int64_t count, int32_t *sums);

static inline __attribute__((always_inline)) void multiply(const Product *given, Dot *dot, const void *weight, int64_t count) {
    int32_t offsets[MOST_ROWS], sums[TOGETHER];
    int64_t chosen[TOGETHER], quarter = (given->end - given->start + TOGETHER - 1) / TOGETHER;
    for (int64_t m = 0; m < given->rows; m++) offsets[m] = sum_states(given->states + m * given->columns, given->columns);
    for (int64_t n = given->start; n < given->start + quarter; n++) {
        choose_rows(n, quarter, given->end, chosen);
        for (int64_t m = 0; m < given->rows; m++) {
            dot(weight, chosen, given->states + m * given->columns, count, sums);
            put_products(given, m, chosen, sums, offsets[m]);
        }
    }
}

void multiply_codes(const int8_t *codes, const int8_t *states, const float *steps, const float *scales, int64_t stride,
                    int64_t rows, int64_t columns, int64_t start, int64_t end, int64_t total, int64_t wide, void *out) {
    Product given = {states, steps, scales, stride, rows, columns, start, end, total, wide, out};
    multiply(&given, dot_codes, codes, columns);
}

// `columns` of the states are those of whole blocks.
void multiply_packed(const uint8_t *packed, const int8_t *states, const float *steps, const float *scales, int64_t stride,
                     int64_t rows, int64_t columns, int64_t start, int64_t end, int64_t total, int64_t wide, void *out) {
    Product given = {states, steps, scales, stride, rows, columns, start, end, total, wide, out};
    multiply(&given, dot_packed, packed, columns / PACKED_BLOCK);
}
