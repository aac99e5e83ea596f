// Vectors of 16 float32 numbers, which compilers cut into what the processor has: bfloat16 in and out, exponentials.

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

typedef float vector_t __attribute__((vector_size(64)));
typedef int32_t whole_t __attribute__((vector_size(64)));
typedef uint32_t bits_t __attribute__((vector_size(64)));
typedef uint16_t halves_t __attribute__((vector_size(32)));

static inline vector_t spread(float value) { return (vector_t){0} + value; }

static inline vector_t load_vector(const float *from) {
    vector_t made;
    memcpy(&made, from, sizeof made);
    return made;
}

static inline void store_halves(halves_t halves, uint16_t *to) { memcpy(to, &halves, sizeof halves); }

static inline vector_t choose(whole_t mask, vector_t yes, vector_t no) {
    return (vector_t)(((whole_t)yes & mask) | ((whole_t)no & ~mask));
}

// 16 numbers from `first` on, to compare with.
static inline whole_t count_from(int64_t first) {
    whole_t steps = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return steps + (int32_t)first;
}

static inline vector_t fused_vector(vector_t a, vector_t b, vector_t c) {
#ifdef __AVX512BF16__
    return (vector_t)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return a * b + c;
#endif
}

static inline halves_t narrow(vector_t value) {
#ifdef __AVX512BF16__
    return (halves_t)_mm512_cvtneps_pbh((__m512)value);
#else
    bits_t bits = (bits_t)value, rounded = bits + 0x7fff + ((bits >> 16) & 1), none = (bits_t)(value != value);
    return __builtin_convertvector(((none & 0x7fc00000u) | (rounded & ~none)) >> 16, halves_t);
#endif
}

// e^x as `power_of_e` computes it; what is not a number stays so.
static inline vector_t powers_of_e(vector_t x) {
    x = choose(x < -87.0f, spread(-87.0f), choose(x > 88.0f, spread(88.0f), x));
    vector_t shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;  // to the nearest whole number
    vector_t r = fused_vector(n, spread(2.12194440e-4f), fused_vector(n, spread(-0.693359375f), x));
    vector_t p = spread(1.9875691500e-4f);
    p = fused_vector(p, r, spread(1.3981999507e-3f));
    p = fused_vector(p, r, spread(8.3334519073e-3f));
    p = fused_vector(p, r, spread(4.1665795894e-2f));
    p = fused_vector(p, r, spread(1.6666665459e-1f));
    p = fused_vector(p, r, spread(5.0000001201e-1f));
    p = fused_vector(p, r * r, r) + 1.0f;
    return p * (vector_t)(((whole_t)shifted - 0x4b400000 + 127) << 23);
}
