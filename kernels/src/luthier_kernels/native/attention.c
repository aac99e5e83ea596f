// Causal attention within documents, in bfloat16 with float32 sums: blocks of scores that never leave the caches.

#include <stdlib.h>

#include "rows.h"
#include "vectors.h"
#include "products.h"

enum {
    GRAIN = 32,       // widths are multiples of this: rows of one tile, or columns of two
    QUERY_ROWS = 64,  // queries of a block in the forward pass
    KEY_ROWS = 64,    // keys of a block in the backward pass
    QUERY_WIDTH = 192 // queries of a block in the backward pass
};

static inline int64_t round_up(int64_t count) { return (count + GRAIN - 1) / GRAIN * GRAIN; }

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

// Rows [count, size] of bfloat16 as [size, width / 2] pairs of one row and the next, with 0 beyond `count`.
static void pack_columns(const uint16_t *rows, int64_t step, int64_t count, int64_t size, int64_t width, uint16_t *out) {
    for (int64_t first = 0; first < width; first += VECTOR)
        for (int64_t i = 0; i < size; i++)
            for (int64_t r = first; r < first + VECTOR; r++) out[i * width + r] = r < count ? rows[r * step + i] : 0;
}

// Columns [size, width] of float32 as rows [count, size] of bfloat16.
static void narrow_columns(const float *columns, int64_t width, int64_t count, int64_t size, uint16_t *out,
                           int64_t step) {
    uint16_t block[VECTOR][VECTOR];
    for (int64_t first = 0; first < count; first += VECTOR)
        for (int64_t i = 0; i < size; i += VECTOR) {
            int64_t rows = smaller(VECTOR, count - first);
            for (int k = 0; k < VECTOR; k++)
                store_halves(narrow(load_vector(columns + (i + k) * width + first)), block[k]);
            for (int64_t r = 0; r < rows; r++)
                for (int k = 0; k < VECTOR; k++) out[(first + r) * step + i + k] = block[k][r];
        }
}

static void narrow_rows(const float *rows, int64_t count, int64_t size, uint16_t *out, int64_t step) {
    for (int64_t r = 0; r < count; r++)
        for (int64_t i = 0; i < size; i++) out[r * step + i] = to_bf16(rows[r * size + i]);
}

// Scores to bfloat16 exponentials, with 0 from `seen` to `width`; returns their sum, and sets the logarithm of it.
static float raise_scores(const float *restrict scores, int64_t seen, int64_t width, float scale,
                          uint16_t *restrict out, float *norm) {
    vector_t lanes = spread(-INFINITY), sums = {0};
    float most = -INFINITY, sum = 0;
    for (int64_t i = 0; i < seen; i += VECTOR) {
        vector_t scaled = load_vector(scores + i) * scale;
        whole_t larger = scaled > lanes;
        lanes = choose(i + VECTOR > seen ? larger & (count_from(i) < (int32_t)seen) : larger, scaled, lanes);
    }
    for (int k = 0; k < VECTOR; k++) most = lanes[k] > most ? lanes[k] : most;
    for (int64_t i = 0; i < seen; i += VECTOR) {
        vector_t raised = powers_of_e(load_vector(scores + i) * scale - most);
        if (i + VECTOR > seen) raised = choose(count_from(i) < (int32_t)seen, raised, (vector_t){0});
        store_halves(narrow(raised), out + i);
        sums += raised;
    }
    for (int64_t i = (seen + VECTOR - 1) / VECTOR * VECTOR; i < width; i++) out[i] = 0;
    for (int k = 0; k < VECTOR; k++) sum += sums[k];
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
        multiply(rows, seen, size / 2, (const pair_t *)(query + first * query_step), query_step / 2, turned_keys, width,
                 scores, width, 0);
        for (int64_t r = 0; r < rows; r++)
            sums[r] = raise_scores(scores + r * width, first + r + 1, seen, scale, shares + r * width,
                                   norms + first + r);
        multiply(rows, size, seen / 2, (const pair_t *)shares, width / 2, values, size, mixed, size, 0);
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
    begin_products();
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
    end_products();
}

// The probabilities of a block, keys [rows] by queries [columns], and the gradients of its scores: both by rows, and
// the latter also as pairs of one row and the next. Key r is not seen by queries before r + `masked`.
static void slope_block(const float *restrict scores, const float *restrict slopes, const float *restrict norms,
                        const float *restrict deltas, int64_t rows, int64_t columns, int64_t masked, float scale,
                        uint16_t *restrict shares, uint16_t *restrict gradients, pair_t *restrict paired) {
    for (int64_t r = 0; r < round_up(rows); r++) {
        int64_t place = r * QUERY_WIDTH, unseen = r < rows ? r + masked : columns;
        for (int64_t i = 0; i < columns; i += VECTOR) {
            vector_t share = {0}, slope = {0};
            if (i + VECTOR > unseen) {
                share = powers_of_e(load_vector(scores + place + i) * scale - load_vector(norms + i));
                slope = share * (load_vector(slopes + place + i) - load_vector(deltas + i)) * scale;
            }
            if (i < unseen) {
                whole_t seen = count_from(i) >= (int32_t)unseen;
                share = choose(seen, share, (vector_t){0});
                slope = choose(seen, slope, (vector_t){0});
            }
            halves_t own = narrow(slope);
            store_halves(narrow(share), shares + place + i);
            store_halves(own, gradients + place + i);
            bits_t wide = __builtin_convertvector(own, bits_t), before;
            pair_t *pairs = paired + r / 2 * QUERY_WIDTH + i;
            if (r % 2) {
                memcpy(&before, pairs, sizeof before);
                wide = before | wide << 16;
            }
            memcpy(pairs, &wide, sizeof wide);
        }
    }
}

// The packed tensors of one head of one document, and memory for its blocks.
struct head {
    pair_t *turned_queries, *queries, *turned_given, *given, *key_columns;
    float *norms, *deltas, *scores, *slopes;
    uint16_t *shares, *gradients;
    pair_t *paired;
};

static void differentiate_head(const uint16_t *key, const uint16_t *value, int64_t key_step, const struct head *h,
                               int64_t length, int64_t size, float scale, float *to_query, float *to_key,
                               float *to_value) {  // to_query [size, width]
    int64_t width = round_up(length);
    for (int64_t first = 0; first < length; first += KEY_ROWS) {
        int64_t rows = smaller(KEY_ROWS, length - first);
        const pair_t *own_keys = (const pair_t *)(key + first * key_step);
        const pair_t *own_values = (const pair_t *)(value + first * key_step);
        for (int64_t q = first; q < width; q += QUERY_WIDTH) {
            int64_t columns = smaller(QUERY_WIDTH, width - q);
            multiply(rows, columns, size / 2, own_keys, key_step / 2, h->turned_queries + q, width, h->scores,
                     QUERY_WIDTH, 0);
            multiply(rows, columns, size / 2, own_values, key_step / 2, h->turned_given + q, width, h->slopes,
                     QUERY_WIDTH, 0);
            slope_block(h->scores, h->slopes, h->norms + q, h->deltas + q, rows, columns, first - q, scale, h->shares,
                        h->gradients, h->paired);
            multiply(rows, size, columns / 2, (const pair_t *)h->shares, QUERY_WIDTH / 2, h->given + q / 2 * size,
                     size, to_value + first * size, size, 1);
            multiply(rows, size, columns / 2, (const pair_t *)h->gradients, QUERY_WIDTH / 2,
                     h->queries + q / 2 * size, size, to_key + first * size, size, 1);
            multiply(size, columns, round_up(rows) / 2, h->key_columns + first / 2, width / 2, h->paired, QUERY_WIDTH,
                     to_query + q, width, 1);
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
    begin_products();
    int64_t step = heads * size, key_step = key_heads * size, group = heads / key_heads;
    for (int64_t item = start; item < end; item++) {
        int64_t first = starts[item / key_heads], length = starts[item / key_heads + 1] - first;
        int64_t own = item % key_heads, width = round_up(length), block = KEY_ROWS * QUERY_WIDTH;
        size_t packed = width * size / 2 * sizeof(pair_t), exact = width * size * sizeof(float);
        char *memory = aligned_alloc(64, (5 * packed + 3 * exact + 2 * width * 4 + block * 16 + 16 * 64 + 63) / 64 * 64);
        char *room = memory;
        struct head h = {.turned_queries = take(&room, packed), .queries = take(&room, packed),
                         .turned_given = take(&room, packed), .given = take(&room, packed),
                         .key_columns = take(&room, packed), .norms = take(&room, width * 4), .deltas = take(&room, width * 4),
                         .scores = take(&room, block * 4), .slopes = take(&room, block * 4),
                         .shares = take(&room, block * 2), .gradients = take(&room, block * 2),
                         .paired = take(&room, block * 2)};
        float *query_sums = take(&room, exact), *key_sums = take(&room, exact), *value_sums = take(&room, exact);
        const uint16_t *keys = key + first * key_step + own * size, *values = value + first * key_step + own * size;
        memset(key_sums, 0, exact);
        memset(value_sums, 0, exact);
        pack_columns(keys, key_step, length, size, width, (uint16_t *)h.key_columns);
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
            narrow_columns(query_sums, width, length, size, to_query + place, step);
        }
        narrow_rows(key_sums, length, size, to_key + first * key_step + own * size, key_step);
        narrow_rows(value_sums, length, size, to_value + first * key_step + own * size, key_step);
        free(memory);
    }
    end_products();
}

// 1 if products of bfloat16 are computed by the processor itself.
void describe_attention(int64_t *fast) {
#ifdef __AVX512BF16__
    *fast = 1;
#else
    *fast = 0;
#endif
}
