// Norms of rows and rotations by position, in float32; tensors are float32 or bfloat16 and are rounded once.

#include "rows.h"

enum { WIDTH_LIMIT = 65536, CHUNK_ROWS = 64 };

// y = (x + residual) * r * weight, where r = 1 / sqrt(mean of squares + eps). `sums` takes x + residual, `factors` r.
void normalize_rows(const void *x, const void *residual, int64_t wide, const float *weight, double eps, int64_t start,
                    int64_t end, int64_t columns, void *out, void *sums, float *factors) {
    float row[WIDTH_LIMIT], more[WIDTH_LIMIT];
    for (int64_t n = start; n < end; n++) {
        read_row(x, wide, n * columns, columns, row);
        if (residual) {
            read_row(residual, wide, n * columns, columns, more);
            for (int64_t i = 0; i < columns; i++) row[i] += more[i];
            write_row(sums, wide, n * columns, columns, row);
            read_row(sums, wide, n * columns, columns, row);  // what is normalized is what is handed on
        }
        float r = 1.0f / sqrtf(sum_products(row, row, columns) / (float)columns + (float)eps);
        for (int64_t i = 0; i < columns; i++) row[i] = row[i] * r * weight[i];
        write_row(out, wide, n * columns, columns, row);
        factors[n] = r;
    }
}

// Gradients: to x; and unless `partial` is null to the weight, as partial sums [chunks, columns] over 64 rows each, so that threads change nothing.
void normalize_rows_back(const void *gradient, const void *x, int64_t wide, const float *weight, const float *factors,
                         const void *to_sums, int64_t start, int64_t end, int64_t rows, int64_t columns, void *to_x,
                         float *partial) {
    float g[WIDTH_LIMIT], row[WIDTH_LIMIT], m[WIDTH_LIMIT];
    for (int64_t chunk = start; chunk < end; chunk++) {
        float *restrict part = partial ? partial + chunk * columns : 0;
        if (part) memset(part, 0, columns * sizeof(float));
        int64_t last = (chunk + 1) * CHUNK_ROWS < rows ? (chunk + 1) * CHUNK_ROWS : rows;
        for (int64_t n = chunk * CHUNK_ROWS; n < last; n++) {
            read_row(gradient, wide, n * columns, columns, g);
            read_row(x, wide, n * columns, columns, row);
            float r = factors[n];
            if (part)
                for (int64_t i = 0; i < columns; i++) part[i] += g[i] * (row[i] * r);
            for (int64_t i = 0; i < columns; i++) m[i] = g[i] * weight[i];
            float shared = sum_products(m, row, columns) / (float)columns * r * r;
            for (int64_t i = 0; i < columns; i++) m[i] = r * (m[i] - row[i] * shared);
            if (to_sums) {
                read_row(to_sums, wide, n * columns, columns, g);
                for (int64_t i = 0; i < columns; i++) m[i] += g[i];
            }
            write_row(to_x, wide, n * columns, columns, m);
        }
    }
}

// The norm and int8 quantization of each row in one pass: codes and steps.
void normalize_quantized(const void *x, int64_t wide, const float *weight, double eps, int64_t start, int64_t end,
                         int64_t columns, int8_t *codes, float *steps) {
    float row[WIDTH_LIMIT];
    for (int64_t n = start; n < end; n++) {
        read_row(x, wide, n * columns, columns, row);
        float r = 1.0f / sqrtf(sum_products(row, row, columns) / (float)columns + (float)eps);
        int32_t bits = 0;
        for (int64_t i = 0; i < columns; i++) {
            row[i] = row[i] * r * weight[i];
            int32_t size;
            memcpy(&size, row + i, 4);
            size &= 0x7fffffff;
            bits = size > bits ? size : bits;
        }
        float largest;
        memcpy(&largest, &bits, 4);
        largest = largest > 1e-5f ? largest : 1e-5f;
        float factor = 127.0f / largest;
        int8_t *restrict out = codes + n * columns;
        for (int64_t i = 0; i < columns; i++) out[i] = (int8_t)(int32_t)rintf(row[i] * factor);
        steps[n] = largest / 127.0f;
    }
}

// One head in bfloat16, in one loop, without rows in float32 between.
static void rotate_half(const uint16_t *restrict x, const float *restrict c, const float *restrict s, float way,
                        int64_t half, uint16_t *restrict out) {
    for (int64_t i = 0; i < half; i++) {
        float a = from_bf16(x[i]), b = from_bf16(x[half + i]);
        out[i] = to_bf16(a * c[i] - way * (b * s[i]));
        out[half + i] = to_bf16(b * c[half + i] + way * (a * s[half + i]));
    }
}

// Each head of each token rotated by its position: halves (a, b) become (a cos - b sin, b cos + a sin); sign -1 back.
void rotate_heads(const void *x, int64_t wide, const float *cosines, const float *sines, const int64_t *positions,
                  double sign, int64_t start, int64_t end, int64_t heads, int64_t size, void *out) {
    float row[2048], made[2048];
    int64_t half = size / 2;
    float way = (float)sign;
    for (int64_t t = start; t < end; t++) {
        const float *restrict c = cosines + positions[t] * size, *restrict s = sines + positions[t] * size;
        for (int64_t h = 0; h < heads; h++) {
            int64_t first = (t * heads + h) * size;
            if (!wide) {
                rotate_half((const uint16_t *)x + first, c, s, way, half, (uint16_t *)out + first);
                continue;
            }
            read_row(x, wide, first, size, row);
            for (int64_t i = 0; i < half; i++) {
                float a = row[i], b = row[half + i];
                made[i] = a * c[i] - way * (b * s[i]);
                made[half + i] = b * c[half + i] + way * (a * s[half + i]);
            }
            write_row(out, wide, first, size, made);
        }
    }
}

enum { SILU = 0, GELU = 1, RELU2 = 2, PART = 1024 };

// act(e) into `acted`, and its derivative into `slopes` (null for SwiGLU forward, which is wanted most).
static void act_values(const float *restrict e, int64_t count, int64_t kind, float *restrict acted,
                       float *restrict slopes) {
    if (kind == SILU && !slopes)
        for (int64_t i = 0; i < count; i++) acted[i] = e[i] / (1.0f + power_of_e(-e[i]));
    else if (kind == SILU)
        for (int64_t i = 0; i < count; i++) {
            float s = 1.0f / (1.0f + power_of_e(-e[i]));
            acted[i] = e[i] * s;
            slopes[i] = s * (1.0f + e[i] * (1.0f - s));
        }
    else if (kind == GELU)
        for (int64_t i = 0; i < count; i++) {
            float x = e[i], square = x * x;
            float inner = 0.79788456f * (x + 0.044715f * square * x);
            float t = 2.0f / (1.0f + power_of_e(-2.0f * inner)) - 1.0f;
            acted[i] = 0.5f * x * (1.0f + t);
            slopes[i] = 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.79788456f * (1.0f + 0.134145f * square);
        }
    else
        for (int64_t i = 0; i < count; i++) {
            float positive = e[i] > 0.0f ? e[i] : 0.0f;
            acted[i] = positive * positive;
            slopes[i] = 2.0f * positive;
        }
}

// SwiGLU of `count` elements in bfloat16 in one loop, without rows in float32 between.
static void silu_half(const uint16_t *restrict gate, const uint16_t *restrict up, int64_t count,
                      uint16_t *restrict out) {
    for (int64_t i = 0; i < count; i++) {
        float e = from_bf16(gate[i]);
        out[i] = to_bf16(e / (1.0f + power_of_e(-e)) * from_bf16(up[i]));
    }
}

// Its gradients.
static void silu_half_back(const uint16_t *restrict gradient, const uint16_t *restrict gate,
                           const uint16_t *restrict up, int64_t count, uint16_t *restrict to_gate,
                           uint16_t *restrict to_up) {
    for (int64_t i = 0; i < count; i++) {
        float e = from_bf16(gate[i]), d = from_bf16(gradient[i]), s = 1.0f / (1.0f + power_of_e(-e));
        to_up[i] = to_bf16(e * s * d);
        to_gate[i] = to_bf16(s * (1.0f + e * (1.0f - s)) * (d * from_bf16(up[i])));
    }
}

// act(gate) * up, or without `out` the gradients to both, of elements `start` * 1024 to `end` * 1024.
void gate_values(const void *gradient, const void *gate, const void *up, int64_t wide, int64_t kind, int64_t start,
                 int64_t end, int64_t total, void *out, void *to_gate, void *to_up) {
    float e[PART], g[PART], d[PART], acted[PART], slopes[PART];
    if (!wide && kind == SILU) {
        int64_t first = start * PART, count = (end * PART < total ? end * PART : total) - first;
        const uint16_t *gates = (const uint16_t *)gate + first, *ups = (const uint16_t *)up + first;
        if (out)
            silu_half(gates, ups, count, (uint16_t *)out + first);
        else
            silu_half_back((const uint16_t *)gradient + first, gates, ups, count, (uint16_t *)to_gate + first,
                           (uint16_t *)to_up + first);
        return;
    }
    for (int64_t part = start; part < end; part++) {
        int64_t first = part * PART, count = total - first < PART ? total - first : PART;
        read_row(gate, wide, first, count, e);
        read_row(up, wide, first, count, g);
        act_values(e, count, kind, acted, out && kind == SILU ? 0 : slopes);
        if (out) {
            for (int64_t i = 0; i < count; i++) acted[i] *= g[i];
            write_row(out, wide, first, count, acted);
            continue;
        }
        read_row(gradient, wide, first, count, d);
        for (int64_t i = 0; i < count; i++) {
            slopes[i] *= d[i] * g[i];
            acted[i] *= d[i];
        }
        write_row(to_gate, wide, first, count, slopes);
        write_row(to_up, wide, first, count, acted);
    }
}
