// Causal attention within documents, in bfloat16 with float32 sums: blocks of scores that never leave the caches.

#include <stdlib.h>

#include "rows.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

// Two neighbouring bfloat16 numbers, the first in the lower half: what one product of the processor takes.
typedef uint32_t __attribute__((may_alias)) pair_t;

enum {
    VECTOR = 16,    // columns of one vector
    TILE_ROWS = 6,  // of a tile, with up to 4 vectors each: as many sums as there are registers
    TILE_WIDTH = 64,
    QUERY_ROWS = 48,  // queries of a block in the forward pass
    KEY_ROWS = 48,    // keys of a block in the backward pass
    QUERY_WIDTH = 192 // queries of a block in the backward pass
};

static inline int64_t round_up(int64_t count) { return (count + VECTOR - 1) / VECTOR * VECTOR; }

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// c [rows, 16 vectors] (+)= a b, where a's pair p of row r is a[r * a_row + p * a_pair], and b is [pairs, columns] pairs.
static inline __attribute__((always_inline)) void multiply_tile(const int rows, const int vectors, const pair_t *a,
                                                                int64_t a_row, int64_t a_pair, const pair_t *b,
                                                                int64_t b_pair, int64_t pairs, float *c, int64_t c_row,
                                                                int64_t add) {
#ifdef __AVX512BF16__
    __m512 sums[TILE_ROWS][4];
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
            __m512bh left = (__m512bh)_mm512_set1_epi32((int)a[r * a_row + p * a_pair]);
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
                uint32_t left = a[r * a_row + p * a_pair], right = b[p * b_pair + i];
                sum += from_bf16((uint16_t)left) * from_bf16((uint16_t)right);
                sum += from_bf16((uint16_t)(left >> 16)) * from_bf16((uint16_t)(right >> 16));
            }
            c[r * c_row + i] = sum;
        }
#endif
}

#define WITH_VECTORS(rows)                                                                              \
    switch (vectors) {                                                                                  \
        case 1: multiply_tile(rows, 1, a, a_row, a_pair, b, b_pair, pairs, c, c_row, add); break;       \
        case 2: multiply_tile(rows, 2, a, a_row, a_pair, b, b_pair, pairs, c, c_row, add); break;       \
        case 3: multiply_tile(rows, 3, a, a_row, a_pair, b, b_pair, pairs, c, c_row, add); break;       \
        default: multiply_tile(rows, 4, a, a_row, a_pair, b, b_pair, pairs, c, c_row, add); break;      \
    }

static void multiply_some(int64_t rows, int64_t vectors, const pair_t *a, int64_t a_row, int64_t a_pair,
                          const pair_t *b, int64_t b_pair, int64_t pairs, float *c, int64_t c_row, int64_t add) {
    switch (rows) {
        case 1: WITH_VECTORS(1) break;
        case 2: WITH_VECTORS(2) break;
        case 3: WITH_VECTORS(3) break;
        case 4: WITH_VECTORS(4) break;
        case 5: WITH_VECTORS(5) break;
        default: WITH_VECTORS(6) break;
    }
}

// The same for any number of rows, and of columns that is a multiple of 16.
static void multiply(int64_t rows, int64_t columns, int64_t pairs, const pair_t *a, int64_t a_row, int64_t a_pair,
                     const pair_t *b, int64_t b_pair, float *c, int64_t c_row, int64_t add) {
    for (int64_t i = 0; i < columns; i += TILE_WIDTH)
        for (int64_t r = 0; r < rows; r += TILE_ROWS)
            multiply_some(smaller(TILE_ROWS, rows - r), smaller(TILE_WIDTH, columns - i) / VECTOR, a + r * a_row, a_row,
                          a_pair, b + i, b_pair, pairs, c + r * c_row + i, c_row, add);
}

// Rows [count, size] of bfloat16 as [size / 2, width] pairs of neighbours in a row, with 0 beyond `count`.
static void pack_turned(const uint16_t *rows, int64_t step, int64_t count, int64_t size, int64_t width, pair_t *out) {
    const pair_t *pairs = (const pair_t *)rows;
    for (int64_t first = 0; first < width; first += VECTOR)
        for (int64_t p = 0; p < size / 2; p++)
            for (int64_t i = first; i < first + VECTOR; i++)
                out[p * width + i] = i < count ? pairs[i * (step / 2) + p] : 0;
}

// Rows [count, size] of bfloat16 as [width / 2, size] pairs of one row and the next, with 0 beyond `count`.
static void pack_rows(const uint16_t *rows, int64_t step, int64_t count, int64_t size, int64_t width, pair_t *out) {
    for (int64_t r = 0; r < width; r += 2, out += size) {
        const uint16_t *low = rows + r * step, *high = low + step;
        if (r + 1 < count)
            for (int64_t i = 0; i < size; i++) out[i] = (uint32_t)low[i] | (uint32_t)high[i] << 16;
        else
            for (int64_t i = 0; i < size; i++) out[i] = r < count ? low[i] : 0;
    }
}

static void narrow_rows(const float *rows, int64_t count, int64_t size, uint16_t *out, int64_t step) {
    for (int64_t r = 0; r < count; r++)
        for (int64_t i = 0; i < size; i++) out[r * step + i] = to_bf16(rows[r * size + i]);
}

// Scores to bfloat16 exponentials, with 0 from `seen` to `width`; returns their sum, and sets the logarithm of it.
static float raise_scores(float *restrict scores, int64_t seen, int64_t width, float scale, uint16_t *restrict out,
                          float *norm) {
    float lanes[LANES], sums[LANES] = {0}, most, sum = 0;
    for (int64_t i = seen; i < width; i++) scores[i] = -INFINITY;
    for (int k = 0; k < LANES; k++) lanes[k] = -INFINITY;
    for (int64_t i = 0; i < width; i += LANES)
        for (int k = 0; k < LANES; k++) {
            scores[i + k] *= scale;
            lanes[k] = scores[i + k] > lanes[k] ? scores[i + k] : lanes[k];
        }
    most = lanes[0];
    for (int k = 1; k < LANES; k++) most = lanes[k] > most ? lanes[k] : most;
    for (int64_t i = 0; i < width; i += LANES)
        for (int k = 0; k < LANES; k++) {
            float raised = power_of_e(scores[i + k] - most);
            out[i + k] = to_bf16(raised);
            sums[k] += raised;
        }
    for (int64_t i = seen; i < width; i++) out[i] = 0;
    for (int k = 0; k < LANES; k++) sum += sums[k];
    *norm = most + logf(sum);
    return sum;
}

// One head of one document: queries, keys and values [length, size] with `step` numbers from row to row.
static void attend_head(const uint16_t *query, int64_t query_step, const pair_t *turned_keys, const pair_t *values,
                        int64_t length, int64_t size, float scale, float *room, uint16_t *out, float *norms) {
    int64_t width = round_up(length);
    float *scores = room, *mixed = scores + QUERY_ROWS * width;
    uint16_t *shares = (uint16_t *)(mixed + QUERY_ROWS * size);
    for (int64_t first = 0; first < length; first += QUERY_ROWS) {
        int64_t rows = smaller(QUERY_ROWS, length - first), seen = round_up(first + rows);
        float sums[QUERY_ROWS];
        multiply(rows, seen, size / 2, (const pair_t *)(query + first * query_step), query_step / 2, 1, turned_keys,
                 width, scores, width, 0);
        for (int64_t r = 0; r < rows; r++)
            sums[r] = raise_scores(scores + r * width, first + r + 1, seen, scale, shares + r * width,
                                   norms + first + r);
        multiply(rows, size, seen / 2, (const pair_t *)shares, width / 2, 1, values, size, mixed, size, 0);
        for (int64_t r = 0; r < rows; r++) {
            float share = 1.0f / sums[r];
            for (int64_t i = 0; i < size; i++)
                out[(first + r) * query_step + i] = to_bf16(mixed[r * size + i] * share);
        }
    }
}

// Items [start, end) of documents times key heads. Tensors are [T, heads, size]; `norms` [heads, T] takes log-sums.
void attend_forward(const uint16_t *query, const uint16_t *key, const uint16_t *value, const int64_t *starts,
                    int64_t heads, int64_t key_heads, int64_t size, double scale, int64_t total, int64_t start,
                    int64_t end, uint16_t *out, float *norms) {
    int64_t step = heads * size, key_step = key_heads * size, group = heads / key_heads;
    for (int64_t item = start; item < end; item++) {
        int64_t first = starts[item / key_heads], length = starts[item / key_heads + 1] - first;
        int64_t own = item % key_heads, width = round_up(length);
        size_t packed = width * size / 2 * sizeof(pair_t);
        char *room = aligned_alloc(64, 2 * packed + QUERY_ROWS * (size * 4 + width * 6));
        pair_t *turned = (pair_t *)room, *values = (pair_t *)(room + packed);
        pack_turned(key + first * key_step + own * size, key_step, length, size, width, turned);
        pack_rows(value + first * key_step + own * size, key_step, length, size, width, values);
        for (int64_t h = own * group; h < (own + 1) * group; h++)
            attend_head(query + first * step + h * size, step, turned, values, length, size, (float)scale,
                        (float *)(room + 2 * packed), out + first * step + h * size, norms + h * total + first);
        free(room);
    }
}

// The probabilities of a block, keys [rows] by queries [columns], and the gradients of its scores: both by rows, and
// the latter also as pairs of one row and the next.
static void slope_block(const float *restrict scores, const float *restrict slopes, const float *restrict norms,
                        const float *restrict deltas, int64_t rows, int64_t columns, int64_t masked, float scale,
                        uint16_t *restrict shares, uint16_t *restrict gradients, pair_t *restrict paired) {
    for (int64_t r = 0; r < KEY_ROWS; r++) {
        const float *s = scores + r * QUERY_WIDTH, *d = slopes + r * QUERY_WIDTH;
        uint16_t *p = shares + r * QUERY_WIDTH, *g = gradients + r * QUERY_WIDTH;
        int64_t unseen = r >= rows ? columns : r + masked < 0 ? 0 : smaller(r + masked, columns);
        for (int64_t i = 0; i < columns; i++) {
            float share = power_of_e(s[i] * scale - norms[i]);
            p[i] = to_bf16(share);
            g[i] = to_bf16(share * (d[i] - deltas[i]) * scale);
        }
        for (int64_t i = 0; i < unseen; i++) p[i] = g[i] = 0;
        if (r % 2)
            for (int64_t i = 0; i < columns; i++)
                paired[r / 2 * QUERY_WIDTH + i] = (uint32_t)g[i - QUERY_WIDTH] | (uint32_t)g[i] << 16;
    }
}

// The packed tensors of one head of one document, and memory for its blocks.
struct head {
    pair_t *turned_queries, *queries, *turned_given, *given, *keys;
    float *norms, *deltas, *scores, *slopes;
    uint16_t *shares, *gradients;
    pair_t *paired;
};

static void differentiate_head(const uint16_t *key, const uint16_t *value, int64_t key_step, const struct head *h,
                               int64_t length, int64_t size, float scale, float *to_query, float *to_key,
                               float *to_value) {
    int64_t width = round_up(length);
    for (int64_t first = 0; first < length; first += KEY_ROWS) {
        int64_t rows = smaller(KEY_ROWS, length - first);
        const pair_t *own_keys = (const pair_t *)(key + first * key_step);
        const pair_t *own_values = (const pair_t *)(value + first * key_step);
        for (int64_t q = first; q < width; q += QUERY_WIDTH) {
            int64_t columns = smaller(QUERY_WIDTH, width - q);
            multiply(rows, columns, size / 2, own_keys, key_step / 2, 1, h->turned_queries + q, width, h->scores,
                     QUERY_WIDTH, 0);
            multiply(rows, columns, size / 2, own_values, key_step / 2, 1, h->turned_given + q, width, h->slopes,
                     QUERY_WIDTH, 0);
            slope_block(h->scores, h->slopes, h->norms + q, h->deltas + q, rows, columns, first - q, scale, h->shares,
                        h->gradients, h->paired);
            multiply(rows, size, columns / 2, (const pair_t *)h->shares, QUERY_WIDTH / 2, 1, h->given + q / 2 * size,
                     size, to_value + first * size, size, 1);
            multiply(rows, size, columns / 2, (const pair_t *)h->gradients, QUERY_WIDTH / 2, 1,
                     h->queries + q / 2 * size, size, to_key + first * size, size, 1);
            multiply(columns, size, (rows + 1) / 2, h->paired, 1, QUERY_WIDTH, h->keys + first / 2 * size, size,
                     to_query + q * size, size, 1);
        }
    }
}

static void *take(char **room, size_t bytes) {
    char *own = *room;
    *room += (bytes + 63) / 64 * 64;
    return own;
}

// The gradients of queries, keys and values, from those of the result; `norms` are those of the forward pass.
void attend_backward(const uint16_t *given, const uint16_t *query, const uint16_t *key, const uint16_t *value,
                     const uint16_t *out, const float *norms, const int64_t *starts, int64_t heads, int64_t key_heads,
                     int64_t size, double scale, int64_t total, int64_t start, int64_t end, uint16_t *to_query,
                     uint16_t *to_key, uint16_t *to_value) {
    int64_t step = heads * size, key_step = key_heads * size, group = heads / key_heads;
    for (int64_t item = start; item < end; item++) {
        int64_t first = starts[item / key_heads], length = starts[item / key_heads + 1] - first;
        int64_t own = item % key_heads, width = round_up(length), block = KEY_ROWS * QUERY_WIDTH;
        size_t packed = (width + KEY_ROWS) * size / 2 * sizeof(pair_t), exact = (width + KEY_ROWS) * size * sizeof(float);
        char *memory = aligned_alloc(64, (5 * packed + 3 * exact + 2 * width * 4 + block * 16 + 16 * 64 + 63) / 64 * 64);
        char *room = memory;
        struct head h = {.turned_queries = take(&room, packed), .queries = take(&room, packed),
                         .turned_given = take(&room, packed), .given = take(&room, packed),
                         .keys = take(&room, packed), .norms = take(&room, width * 4), .deltas = take(&room, width * 4),
                         .scores = take(&room, block * 4), .slopes = take(&room, block * 4),
                         .shares = take(&room, block * 2), .gradients = take(&room, block * 2),
                         .paired = take(&room, block * 2)};
        float *query_sums = take(&room, exact), *key_sums = take(&room, exact), *value_sums = take(&room, exact);
        const uint16_t *keys = key + first * key_step + own * size, *values = value + first * key_step + own * size;
        memset(h.scores, 0, block * 4);  // rows beyond a last block are read, and masked
        memset(h.slopes, 0, block * 4);
        memset(key_sums, 0, exact);
        memset(value_sums, 0, exact);
        pack_rows(keys, key_step, length, size, width + KEY_ROWS, h.keys);
        for (int64_t n = own * group; n < (own + 1) * group; n++) {
            int64_t place = first * step + n * size;
            pack_turned(query + place, step, length, size, width, h.turned_queries);
            pack_turned(given + place, step, length, size, width, h.turned_given);
            pack_rows(query + place, step, length, size, width, h.queries);
            pack_rows(given + place, step, length, size, width, h.given);
            for (int64_t i = 0; i < width; i++) {
                float row[256], other[256];
                h.norms[i] = i < length ? norms[n * total + first + i] : 0.0f;
                h.deltas[i] = 0.0f;
                if (i >= length) continue;
                read_row(given, 0, place + i * step, size, row);
                read_row(out, 0, place + i * step, size, other);
                h.deltas[i] = sum_products(row, other, size);
            }
            memset(query_sums, 0, exact);
            differentiate_head(keys, values, key_step, &h, length, size, (float)scale, query_sums, key_sums,
                               value_sums);
            narrow_rows(query_sums, length, size, to_query + place, step);
        }
        narrow_rows(key_sums, length, size, to_key + first * key_step + own * size, key_step);
        narrow_rows(value_sums, length, size, to_value + first * key_step + own * size, key_step);
        free(memory);
    }
}

// 1 if products of bfloat16 are computed by the processor itself.
void describe_attention(int64_t *fast) {
#ifdef __AVX512BF16__
    *fast = 1;
#else
    *fast = 0;
#endif
}
