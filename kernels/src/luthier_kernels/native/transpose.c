// A matrix of 16-bit numbers turned: out [columns, rows] from given [rows, columns], in squares that fit into registers.

#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
#define WIDE 1
#endif

enum { SIDE = 32, STAGES = 5 };

// Matrix units multiply a turned left factor at half their speed; other processors do not mind.
void describe_products(int64_t *wants_turned) {
#ifdef __AMX_BF16__
    *wants_turned = 1;
#else
    *wants_turned = 0;
#endif
}

static void turn_plainly(const uint16_t *given, int64_t rows, int64_t columns, int64_t total_rows, int64_t total_columns,
                         uint16_t *out) {
    for (int64_t c = 0; c < columns; c++)
        for (int64_t r = 0; r < rows; r++) out[c * total_rows + r] = given[r * total_columns + c];
}

#ifdef WIDE
// Halves of blocks change places between rows that are a block apart, for blocks of 16, 8, 4, 2 and 1 numbers.
static void make_places(__m512i near[STAGES], __m512i far[STAGES]) {
    for (int stage = 0; stage < STAGES; stage++) {
        uint16_t first[SIDE], second[SIDE];
        int step = SIDE >> (stage + 1);
        for (int lane = 0; lane < SIDE; lane++) {
            int odd = (lane & step) != 0;
            first[lane] = (uint16_t)(odd ? SIDE + lane - step : lane);
            second[lane] = (uint16_t)(odd ? SIDE + lane : lane + step);
        }
        near[stage] = _mm512_loadu_si512(first);
        far[stage] = _mm512_loadu_si512(second);
    }
}

static void turn_square(const uint16_t *given, int64_t total_rows, int64_t total_columns, const __m512i *near,
                        const __m512i *far, uint16_t *out) {
    __m512i held[SIDE];
    for (int r = 0; r < SIDE; r++) held[r] = _mm512_loadu_si512(given + r * total_columns);
#pragma GCC unroll 5
    for (int stage = 0; stage < STAGES; stage++) {
        int step = SIDE >> (stage + 1);
#pragma GCC unroll 16
        for (int pair = 0; pair < SIDE / 2; pair++) {
            int r = (pair & ~(step - 1)) * 2 + (pair & (step - 1));
            __m512i a = held[r], b = held[r + step];
            held[r] = _mm512_permutex2var_epi16(a, near[stage], b);
            held[r + step] = _mm512_permutex2var_epi16(a, far[stage], b);
        }
    }
    for (int c = 0; c < SIDE; c++) _mm512_storeu_si512(out + c * total_rows, held[c]);
}
#endif

// Columns `start` to `end` of given [rows, columns] become rows of out [columns, rows].
void transpose_halves(const uint16_t *given, int64_t rows, int64_t columns, int64_t start, int64_t end, uint16_t *out) {
    int64_t whole = 0;
#ifdef WIDE
    __m512i near[STAGES], far[STAGES];
    make_places(near, far);
    whole = rows / SIDE * SIDE;
#endif
    for (int64_t c = start; c < end; c += SIDE) {
        int64_t width = end - c < SIDE ? end - c : SIDE, r = 0;
#ifdef WIDE
        for (; width == SIDE && r < whole; r += SIDE)
            turn_square(given + r * columns + c, rows, columns, near, far, out + c * rows + r);
#endif
        turn_plainly(given + r * columns + c, rows - r, width, rows, columns, out + c * rows + r);
    }
}
