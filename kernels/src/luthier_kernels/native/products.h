// Products of bfloat16 matrices with float32 sums: by tiles (AMX) where the processor has them, otherwise by vectors.

#include <unistd.h>

#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
#include <immintrin.h>
#endif

#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#define HAS_TILES 1
#else
#define HAS_TILES 0
#endif

// Two neighbouring bfloat16 numbers, the first in the lower half: what one product of the processor takes.
typedef uint32_t __attribute__((may_alias)) pair_t;

enum {
    VECTOR = 16,        // columns of one vector, and rows, columns and pairs of one tile
    BLOCK_ROWS = 6,     // of a block of vectors, with up to 4 of them each: as many sums as there are registers
    BLOCK_WIDTH = 64,
    ASK_PERMISSION = 0x1023,  // ARCH_REQ_XCOMP_PERM: Linux lends the tiles' registers to processes that ask
    TILE_DATA = 18
};

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// c [rows, 16 vectors] (+)= a b, where a's pair p of row r is a[r * a_row + p], and b is [pairs, columns] pairs.
static inline __attribute__((always_inline)) void multiply_block(const int rows, const int vectors, const pair_t *a,
                                                                 int64_t a_row, const pair_t *b, int64_t b_pair,
                                                                 int64_t pairs, float *c, int64_t c_row, int64_t add) {
#ifdef __AVX512BF16__
    __m512 sums[BLOCK_ROWS][4];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            sums[r][v] = add ? _mm512_loadu_ps(c + r * c_row + v * VECTOR) : _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; p++) {
        __m512bh right[4];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) right[v] = (__m512bh)_mm512_loadu_si512(b + p * b_pair + v * VECTOR);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            __m512bh left = (__m512bh)_mm512_set1_epi32((int)a[r * a_row + p]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], left, right[v]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) _mm512_storeu_ps(c + r * c_row + v * VECTOR, sums[r][v]);
#else
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < vectors * VECTOR; i++) {
            float sum = add ? c[r * c_row + i] : 0.0f;
            for (int64_t p = 0; p < pairs; p++) {
                uint32_t left = a[r * a_row + p], right = b[p * b_pair + i];
                sum += from_bf16((uint16_t)left) * from_bf16((uint16_t)right);
                sum += from_bf16((uint16_t)(left >> 16)) * from_bf16((uint16_t)(right >> 16));
            }
            c[r * c_row + i] = sum;
        }
#endif
}

#define WITH_VECTORS(rows)                                                                     \
    switch (vectors) {                                                                         \
        case 1: multiply_block(rows, 1, a, a_row, b, b_pair, pairs, c, c_row, add); break;     \
        case 2: multiply_block(rows, 2, a, a_row, b, b_pair, pairs, c, c_row, add); break;     \
        case 3: multiply_block(rows, 3, a, a_row, b, b_pair, pairs, c, c_row, add); break;     \
        default: multiply_block(rows, 4, a, a_row, b, b_pair, pairs, c, c_row, add); break;    \
    }

static void multiply_some(int64_t rows, int64_t vectors, const pair_t *a, int64_t a_row, const pair_t *b,
                          int64_t b_pair, int64_t pairs, float *c, int64_t c_row, int64_t add) {
    switch (rows) {
        case 1: WITH_VECTORS(1) break;
        case 2: WITH_VECTORS(2) break;
        case 3: WITH_VECTORS(3) break;
        case 4: WITH_VECTORS(4) break;
        case 5: WITH_VECTORS(5) break;
        default: WITH_VECTORS(6) break;
    }
}

static void multiply_vectors(int64_t rows, int64_t columns, int64_t pairs, const pair_t *a, int64_t a_row,
                             const pair_t *b, int64_t b_pair, float *c, int64_t c_row, int64_t add) {
    for (int64_t i = 0; i < columns; i += BLOCK_WIDTH)
        for (int64_t r = 0; r < rows; r += BLOCK_ROWS)
            multiply_some(smaller(BLOCK_ROWS, rows - r), smaller(BLOCK_WIDTH, columns - i) / VECTOR, a + r * a_row,
                          a_row, b + i, b_pair, pairs, c + r * c_row + i, c_row, add);
}

#if HAS_TILES

static __thread int tiled;  // whether this thread's tiles are set up

// Up to two by two tiles of sums (0 to 3), of tiles of a (4, 5) and of b (6, 7).
static inline __attribute__((always_inline)) void multiply_tiles(const int high, const int wide, const pair_t *a,
                                                                 int64_t a_row, const pair_t *b, int64_t b_pair,
                                                                 int64_t pairs, float *c, int64_t c_row, int64_t add) {
    float *low = c + VECTOR * c_row;
    if (add) {
        _tile_loadd(0, c, c_row * 4);
        if (wide) _tile_loadd(1, c + VECTOR, c_row * 4);
        if (high) _tile_loadd(2, low, c_row * 4);
        if (high && wide) _tile_loadd(3, low + VECTOR, c_row * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t p = 0; p < pairs; p += VECTOR) {
        _tile_loadd(6, b + p * b_pair, b_pair * 4);
        _tile_loadd(4, a + p, a_row * 4);
        _tile_dpbf16ps(0, 4, 6);
        if (wide) {
            _tile_loadd(7, b + p * b_pair + VECTOR, b_pair * 4);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (high) {
            _tile_loadd(5, a + VECTOR * a_row + p, a_row * 4);
            _tile_dpbf16ps(2, 5, 6);
        }
        if (high && wide) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_row * 4);
    if (wide) _tile_stored(1, c + VECTOR, c_row * 4);
    if (high) _tile_stored(2, low, c_row * 4);
    if (high && wide) _tile_stored(3, low + VECTOR, c_row * 4);
}

#endif

// c [rows, columns] (+)= a b, where a's pair p of row r is a[r * a_row + p], and b is [pairs, columns] pairs; columns
// are a multiple of 16. Rows and pairs beyond multiples of 16 are left to vectors.
static void multiply(int64_t rows, int64_t columns, int64_t pairs, const pair_t *a, int64_t a_row, const pair_t *b,
                     int64_t b_pair, float *c, int64_t c_row, int64_t add) {
    int64_t done = 0;
#if HAS_TILES
    int64_t deep = tiled ? pairs / VECTOR * VECTOR : 0;
    done = deep ? rows / VECTOR * VECTOR : 0;
    for (int64_t i = 0; i < columns; i += 2 * VECTOR)
        for (int64_t r = 0; r < done; r += 2 * VECTOR) {
            const pair_t *left = a + r * a_row, *right = b + i;
            float *sums = c + r * c_row + i;
            int high = r + VECTOR < done, wide = i + VECTOR < columns;
            if (high && wide)
                multiply_tiles(1, 1, left, a_row, right, b_pair, deep, sums, c_row, add);
            else if (high)
                multiply_tiles(1, 0, left, a_row, right, b_pair, deep, sums, c_row, add);
            else if (wide)
                multiply_tiles(0, 1, left, a_row, right, b_pair, deep, sums, c_row, add);
            else
                multiply_tiles(0, 0, left, a_row, right, b_pair, deep, sums, c_row, add);
        }
    if (deep < pairs && done)
        multiply_vectors(done, columns, pairs - deep, a + deep, a_row, b + deep * b_pair, b_pair, c, c_row, 1);
#endif
    if (done < rows)
        multiply_vectors(rows - done, columns, pairs, a + done * a_row, a_row, b, b_pair, c + done * c_row, c_row, add);
}

// Set up this thread's tiles, if there are any, for the products that follow; `end_products` must follow those.
static void begin_products(void) {
#if HAS_TILES
    static int allowed;  // 0: not asked yet, -1: refused
    if (!allowed) allowed = syscall(SYS_arch_prctl, ASK_PERMISSION, TILE_DATA) ? -1 : 1;
    if (allowed < 0) return;
    struct {
        uint8_t palette, first_row, unused[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } setup = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        setup.bytes[tile] = VECTOR * sizeof(pair_t);
        setup.rows[tile] = VECTOR;
    }
    _tile_loadconfig(&setup);
    tiled = 1;
#endif
}

static void end_products(void) {
#if HAS_TILES
    if (tiled) _tile_release();
    tiled = 0;
#endif
}
