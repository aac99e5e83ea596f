// The product of int8 matrices on processors with a matrix unit (AMX), scaled as it leaves. The right factor is packed in
// panels of 32 columns; a block of panels stays in the cache while the rows of the left one pass by.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AMX_INT8__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define MATRIX 1
#endif

enum { TILE = 16, PANEL = 32, BYTES = 64, CACHED = 1 << 20, ASK = 0x1023, TILE_DATA = 18 };

// 1 if the processor has the unit and the system lets this process use it.
void describe_matrix(int64_t *usable) {
#ifdef MATRIX
    *usable = syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
#else
    *usable = 0;
#endif
}

#ifdef MATRIX
typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} __attribute__((packed)) Config;

static void configure(void) {
    Config made = {.palette = 1};
    for (int t = 0; t < 8; t++) made.bytes[t] = BYTES, made.rows[t] = TILE;
    _tile_loadconfig(&made);
}

// Where a product goes: out [rows, total]. A sum is scaled by step[row], and then by scale[column * stride].
typedef struct {
    const float *steps, *scales;
    int64_t stride, total, wide;
    void *out;
} Target;

// Rounded to the nearest bfloat16, ties to even, as integers in the upper half.
static inline __m512i round_bits(__m512 value) {
    __m512i bits = _mm512_castps_si512(value);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}

static inline void put_row(const Target *to, int64_t row, int64_t column, int64_t width, const float *scales,
                           const int32_t *sums) {
    __m512 step = _mm512_set1_ps(to->steps[row]);
    for (int c = 0; c < PANEL; c += TILE) {
        __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums + c)), step);
        __m512 made = _mm512_mul_ps(sum, _mm512_loadu_ps(scales + c));
        int64_t place = row * to->total + column + c, left = width - c;
        __mmask16 inside = left >= TILE ? 0xffff : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
        if (to->wide)
            _mm512_mask_storeu_ps((float *)to->out + place, inside, made);
        else
            _mm256_mask_storeu_epi16((uint16_t *)to->out + place, inside,
                                     _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bits(made), 16)));
    }
}

// Sixteen rows of four neighbours in depth become sixteen columns of them, as the unit wants the right factor.
static void turn_fours(const int8_t *codes, int64_t depth, int64_t rows, int8_t *packed) {
    uint32_t held[TILE][TILE] = {{0}};
    for (int64_t r = 0; r < rows; r++) memcpy(held[r], codes + r * depth, BYTES);
    __m512i rising = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i places = _mm512_mullo_epi32(rising, _mm512_set1_epi32(TILE));
    for (int j = 0; j < TILE; j++)
        _mm512_store_si512(packed + j * BYTES, _mm512_i32gather_epi32(places, &held[0][j], 4));
}

static void pack_panel(const int8_t *codes, int64_t depth, int64_t column, int64_t width, int8_t *panel) {
    for (int64_t tile = 0; tile < 2 * depth / BYTES; tile++) {
        int64_t there = tile % 2 * TILE, count = width - there;
        count = count < 0 ? 0 : count < TILE ? count : TILE;
        turn_fours(codes + (column + there) * depth + tile / 2 * BYTES, depth, count, panel + tile * TILE * BYTES);
    }
}

// Rows of the left factor in the order of its tiles, with zeros up to 32 rows.
static void pack_rows(const int8_t *states, int64_t count, int64_t depth, int8_t *packed) {
    for (int64_t r = 0; r < PANEL; r++)
        for (int64_t k = 0; k < depth; k += BYTES) {
            __m512i part = r < count ? _mm512_loadu_si512(states + r * depth + k) : _mm512_setzero_si512();
            _mm512_store_si512(packed + k * PANEL + r * BYTES, part);
        }
}

// Sums of 32 rows by 32 columns, both factors in the order of their tiles.
static inline void multiply_tiles(const int8_t *left, const int8_t *right, int64_t depth, int32_t *sums) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < depth; k += BYTES, left += 2 * TILE * BYTES, right += 2 * TILE * BYTES) {
        _tile_loadd(4, left, BYTES);
        _tile_loadd(6, right, BYTES);
        _tile_loadd(7, right + TILE * BYTES, BYTES);
        _tile_loadd(5, left + TILE * BYTES, BYTES);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_stored(0, sums, PANEL * 4);
    _tile_stored(1, sums + TILE, PANEL * 4);
    _tile_stored(2, sums + TILE * PANEL, PANEL * 4);
    _tile_stored(3, sums + TILE * PANEL + TILE, PANEL * 4);
}

// 32 packed rows, of which `count` are there, by the panels of columns `start` to `end`.
static void multiply_rows(const int8_t *left, const int8_t *panels, int64_t depth, int64_t first, int64_t count,
                          int64_t start, int64_t end, const Target *to) {
    int32_t sums[PANEL * PANEL] __attribute__((aligned(64)));
    float scales[PANEL];
    for (int64_t column = start; column < end; column += PANEL) {
        int64_t width = end - column < PANEL ? end - column : PANEL;
        for (int c = 0; c < PANEL; c++) scales[c] = to->scales[c < width ? (column + c) * to->stride : 0];
        multiply_tiles(left, panels + (column - start) * depth, depth, sums);
        for (int64_t r = 0; r < count; r++) put_row(to, first + r, column, width, scales, sums + r * PANEL);
    }
}

static void multiply_blocks(const int8_t *states, int64_t rows, int64_t depth, const int8_t *codes, int64_t start,
                            int64_t end, const Target *to) {
    int64_t block = CACHED / depth / PANEL * PANEL, needed = (end - start + PANEL - 1) / PANEL * PANEL;
    block = block < PANEL ? PANEL : block < needed ? block : needed;
    int8_t *packed = aligned_alloc(BYTES, PANEL * depth), *panels = aligned_alloc(BYTES, block * depth);
    configure();
    for (int64_t from = start; from < end; from += block) {
        int64_t until = from + block < end ? from + block : end;
        for (int64_t column = from; column < until; column += PANEL)
            pack_panel(codes, depth, column, until - column, panels + (column - from) * depth);
        for (int64_t first = 0; first < rows; first += PANEL) {
            int64_t count = rows - first < PANEL ? rows - first : PANEL;
            pack_rows(states + first * depth, count, depth, packed);
            multiply_rows(packed, panels, depth, first, count, from, until, to);
        }
    }
    _tile_release();
    free(packed), free(panels);
}
#endif

// out [rows, total] = (states [rows, depth] times codes [total, depth]) * steps * scales, of columns `start` to `end`, in
// float32 (`wide`) or bfloat16. The depth is a multiple of 64.
void multiply_scaled(const int8_t *states, int64_t rows, int64_t depth, const int8_t *codes, const float *steps,
                     const float *scales, int64_t stride, int64_t start, int64_t end, int64_t total, int64_t wide,
                     void *out) {
#ifdef MATRIX
    Target to = {steps, scales, stride, total, wide, out};
    multiply_blocks(states, rows, depth, codes, start, end, &to);
#else
    (void)states, (void)rows, (void)depth, (void)codes, (void)steps, (void)scales, (void)stride, (void)start, (void)end,
        (void)total, (void)wide, (void)out;
#endif
}
