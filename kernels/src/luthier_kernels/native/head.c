// Tiles of a head's logits: their statistics and probabilities in one pass, and their gradient in another.

#include <float.h>

#include "rows.h"

enum { WIDEST = 8192 };

static inline float tanh_of(float x) { return 1.0f - 2.0f / (1.0f + power_of_e(2.0f * x)); }

// A row's products to logits: + bias, * scale, then cap * tanh(. / cap); `slopes` takes the soft cap's derivative.
static void read_logits(const void *products, int64_t wide, int64_t row, int64_t columns, const float *restrict bias,
                        float scale, float cap, float *restrict z, float *restrict slopes) {
    read_row(products, wide, row * columns, columns, z);
    if (bias)
        for (int64_t i = 0; i < columns; i++) z[i] += bias[i];
    if (scale != 1.0f)
        for (int64_t i = 0; i < columns; i++) z[i] *= scale;
    if (cap > 0.0f) {
        float turn = 1.0f / cap;
        for (int64_t i = 0; i < columns; i++) {
            float t = tanh_of(z[i] * turn);
            z[i] = cap * t;
            slopes[i] = 1.0f - t * t;
        }
    }
}

// Finite where all are -infinity: peaks are subtracted from each other.
static float largest_of(const float *restrict z, int64_t count) {
    float lanes[LANES], most = z[0];
    for (int k = 0; k < LANES; k++) lanes[k] = z[0];
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int k = 0; k < LANES; k++) lanes[k] = z[i + k] > lanes[k] ? z[i + k] : lanes[k];
    for (; i < count; i++) most = z[i] > most ? z[i] : most;
    for (int k = 0; k < LANES; k++) most = lanes[k] > most ? lanes[k] : most;
    return most < -FLT_MAX ? -FLT_MAX : most;
}

// z to e^(z - peak), and their sum.
static float raise_row(float *restrict z, int64_t count, float peak) {
    float lanes[LANES] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int k = 0; k < LANES; k++) {
            z[i + k] = power_of_e(z[i + k] - peak);
            lanes[k] += z[i + k];
        }
    for (; i < count; i++) sum += z[i] = power_of_e(z[i] - peak);
    for (int k = 0; k < LANES; k++) sum += lanes[k];
    return sum;
}

// Each row's largest logit, the sum of exponentials below it, and its label's logit where that lies in the tile. With
// `keep` the products become the exponentials times the soft cap's slopes, 0 at the label.
void fold_tile(void *products, int64_t wide, const float *bias, const int64_t *labels, int64_t first, double scale,
               double cap, int64_t keep, int64_t start, int64_t end, int64_t columns, float *peaks, float *masses,
               float *label_logits) {
    float z[WIDEST], slopes[WIDEST];
    for (int64_t n = start; n < end; n++) {
        read_logits(products, wide, n, columns, bias, (float)scale, (float)cap, z, slopes);
        int64_t place = labels[n] - first;
        int64_t inside = place >= 0 && place < columns;
        if (inside) label_logits[n] = z[place];
        peaks[n] = largest_of(z, columns);
        masses[n] = raise_row(z, columns, peaks[n]);
        if (!keep) continue;
        if (inside) z[place] = 0.0f;
        if (cap > 0.0)
            for (int64_t i = 0; i < columns; i++) z[i] *= slopes[i];
        write_row(products, wide, n * columns, columns, z);
    }
}

// Products to d (factor * log-probability) / d product, in their place.
void slope_tile(void *products, int64_t wide, const float *bias, const int64_t *labels, int64_t first, double scale,
                double cap, const float *norms, const float *factors, int64_t start, int64_t end, int64_t columns) {
    float z[WIDEST], slopes[WIDEST];
    for (int64_t n = start; n < end; n++) {
        read_logits(products, wide, n, columns, bias, (float)scale, (float)cap, z, slopes);
        float factor = factors[n];
        for (int64_t i = 0; i < columns; i++) z[i] = -factor * power_of_e(z[i] - norms[n]);
        int64_t place = labels[n] - first;
        if (place >= 0 && place < columns) z[place] += factor;
        if (cap > 0.0)
            for (int64_t i = 0; i < columns; i++) z[i] *= slopes[i];
        if (scale != 1.0)
            for (int64_t i = 0; i < columns; i++) z[i] *= (float)scale;
        write_row(products, wide, n * columns, columns, z);
    }
}

// total = total * kept + made * shares, row by row.
void add_rows(float *total, const void *made, int64_t wide, const float *kept, const float *shares, int64_t start,
              int64_t end, int64_t columns) {
    float row[WIDEST];
    for (int64_t n = start; n < end; n++)
        for (int64_t first = 0; first < columns; first += WIDEST) {
            int64_t count = columns - first < WIDEST ? columns - first : WIDEST;
            read_row(made, wide, n * columns + first, count, row);
            float *restrict sums = total + n * columns + first;
            for (int64_t i = 0; i < count; i++) sums[i] = sums[i] * kept[n] + row[i] * shares[n];
        }
}
