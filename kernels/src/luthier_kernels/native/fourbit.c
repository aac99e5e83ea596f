// 4-bit block-wise quantization in bitsandbytes' layout: blocks over the flattened weight, the even element in the high
// nibble. Every float operation is the one that bitsandbytes makes, so that bytes and values are identical.

#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
#define WIDE 1
#endif

enum { BLOCK_LIMIT = 4096 };

static inline float from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

static inline uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (value != value) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Codes of one block of floats, clamped to [-1, 1] after scaling. `bounds` are 15 ascending decision points, `order`
// the code of each of the 16 intervals between them, null where that is its number.
static void encode_block(const float *restrict scaled, int64_t count, const float *restrict bounds,
                         const uint8_t *restrict order, uint8_t *restrict codes) {
    int32_t places[BLOCK_LIMIT];
    for (int64_t i = 0; i < count; i++) {
        int32_t place = 0;
#pragma GCC unroll 15
        for (int k = 0; k < 15; k++) place += scaled[i] > bounds[k];
        places[i] = place;
    }
    if (order)
        for (int64_t i = 0; i < count; i++) codes[i] = order[places[i]];
    else
        for (int64_t i = 0; i < count; i++) codes[i] = (uint8_t)places[i];
}

// One block: its absmax and its packed bytes. `full` says whether it is a whole block: bitsandbytes multiplies whole ones
// by the reciprocal and divides the last, shorter one.
static void quantize_block(float *restrict values, int64_t count, int full, const float *bounds, const uint8_t *order,
                           float *absmax, uint8_t *restrict packed) {
    int32_t bits = 0;  // magnitudes in the order of their bits: a maximum of integers is computed side by side
    for (int64_t i = 0; i < count; i++) {
        int32_t size;
        memcpy(&size, values + i, 4);
        size &= 0x7fffffff;
        bits = size > bits ? size : bits;
    }
    float largest;
    memcpy(&largest, &bits, 4);
    float divisor = largest > 1e-38f ? largest : 1e-38f;
    *absmax = full ? largest : divisor;
    float factor = 1.0f / divisor;
    if (full)
        for (int64_t i = 0; i < count; i++) values[i] = values[i] * factor;
    else
        for (int64_t i = 0; i < count; i++) values[i] = values[i] / divisor;
    if (count & 1) values[count] = 0.0f;
    uint8_t codes[BLOCK_LIMIT + 1];
    int64_t even = (count + 1) & ~(int64_t)1;
    encode_block(values, even, bounds, order, codes);
    for (int64_t i = 0; i < even / 2; i++) packed[i] = (uint8_t)(codes[2 * i] << 4 | codes[2 * i + 1]);
}

// Blocks `start` to `end` of a weight of `total` elements, in float32 (`wide`) or bfloat16.
void quantize_blocks(const void *weight, int64_t wide, int64_t start, int64_t end, int64_t total, int64_t block,
                     const float *bounds, const uint8_t *order, float *absmax, uint8_t *packed) {
    float values[BLOCK_LIMIT + 1];
    for (int64_t b = start; b < end; b++) {
        int64_t first = b * block, count = total - first < block ? total - first : block;
        if (wide)
            memcpy(values, (const float *)weight + first, count * sizeof(float));
        else
            for (int64_t i = 0; i < count; i++) values[i] = from_bf16(((const uint16_t *)weight)[first + i]);
        quantize_block(values, count, count == block, bounds, order, absmax + b, packed + first / 2);
    }
}

// The scale of block b: stored as it is, or as an 8-bit code of its difference from the mean.
typedef struct {
    const float *plain;
    const uint8_t *codes;
    const float *nested, *map, *offset;
    int64_t nested_block;
} scales;

static inline float scale_of(const scales *given, int64_t b) {
    if (given->plain) return given->plain[b];
    return given->map[given->codes[b]] * given->nested[b / given->nested_block] + given->offset[0];
}

#ifdef WIDE
// Codes of 32 elements in 16 bytes, in the order of the elements.
static inline __m256i unpack_codes(const uint8_t *packed) {
    const __m128i low = _mm_set1_epi8(15);
    __m128i bytes = _mm_loadu_si128((const __m128i *)packed);
    __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), low), rest = _mm_and_si128(bytes, low);
    return _mm256_set_m128i(_mm_unpackhi_epi8(high, rest), _mm_unpacklo_epi8(high, rest));
}
#endif

static void decode_float(const uint8_t *restrict packed, int64_t count, const float *restrict values, float scale,
                         float *restrict out) {
    int64_t i = 0;
#ifdef WIDE
    __m512 table = _mm512_mul_ps(_mm512_loadu_ps(values), _mm512_set1_ps(scale));
    for (; i + 32 <= count; i += 32) {
        __m256i codes = unpack_codes(packed + i / 2);
        __m512i first = _mm512_cvtepu8_epi32(_mm256_castsi256_si128(codes));
        __m512i second = _mm512_cvtepu8_epi32(_mm256_extracti128_si256(codes, 1));
        _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(first, table));
        _mm512_storeu_ps(out + i + 16, _mm512_permutexvar_ps(second, table));
    }
    if (i == count) return;
#endif
    float scaled[16];
    for (int k = 0; k < 16; k++) scaled[k] = values[k] * scale;
    for (; i < count; i++) out[i] = scaled[i & 1 ? packed[i / 2] & 15 : packed[i / 2] >> 4];
}

static void decode_bf16(const uint8_t *restrict packed, int64_t count, const float *restrict values, float scale,
                        uint16_t *restrict out) {
    int64_t i = 0;
#ifdef WIDE
    __m512i bits = _mm512_castps_si512(_mm512_mul_ps(_mm512_loadu_ps(values), _mm512_set1_ps(scale)));
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    __m512i table = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
    for (; i + 32 <= count; i += 32) {
        __m512i codes = _mm512_cvtepu8_epi16(unpack_codes(packed + i / 2));
        _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(codes, table));
    }
    if (i == count) return;
#endif
    uint16_t scaled[16];
    for (int k = 0; k < 16; k++) scaled[k] = to_bf16(values[k] * scale);
    for (; i < count; i++) out[i] = scaled[i & 1 ? packed[i / 2] & 15 : packed[i / 2] >> 4];
}

// Blocks `start` to `end` as float32 (`wide`) or bfloat16. A block has 16 values, computed once: value * scale.
void dequantize_blocks(const uint8_t *packed, const float *plain, const uint8_t *codes, const float *nested,
                       const float *map, const float *offset, int64_t nested_block, const float *values, int64_t start,
                       int64_t end, int64_t total, int64_t block, int64_t wide, void *out) {
    scales given = {plain, codes, nested, map, offset, nested_block};
    for (int64_t b = start; b < end; b++) {
        float scale = scale_of(&given, b);
        int64_t first = b * block, count = total - first < block ? total - first : block;
        if (wide)
            decode_float(packed + first / 2, count, values, scale, (float *)out + first);
        else
            decode_bf16(packed + first / 2, count, values, scale, (uint16_t *)out + first);
    }
}
