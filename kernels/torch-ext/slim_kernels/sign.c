/* Linear layers of signs on the CPU: y = ((x * scale_in) S^T) * scale_out + bias, S of -1 and 1, one bit per weight.

   weight is uint8 (N, ceil(K / 8)), bit k % 8 of byte k / 8 belongs to column k, 1 means minus; see sign_reference.py.
   It is read as it is.

     float activations    sums of three or four signed activations come out of a table: lookup.h
     int8 activations     sums of the codes whose sign is minus, exact integers: sign_codes.h

   For many tokens others may be faster, for whom rows are written out: dense, or as ternary codes for int8 activations.

   Plain C11, no dependency but the C library (and OpenMP if the compiler has it). */

#include "common.h"

#include "convert.h"

#include "activations.h"

#include "transpose.h"

#include "lookup_portable.h"

enum { MAX_TOKENS = 32, STRIPS = 4 };

typedef struct {
    const void *scale_in, *scale_out, *bias;
    const uint8_t *weight;
    void *y;
    int64_t tokens, outs, columns, bytes, words; /* of a row: packed bytes, words of 32 columns */
    int64_t block;                               /* packed bytes whose activations lie together, for int8 */
    int x_type, in_type, out_type, bias_type, per_tensor;
} Sign;

/* y = sums * factor * scale_out + bias for `count` outputs from `row` on. */
static void store_rows_portable(const Sign *p, int64_t token, int64_t row, int64_t count, const float *sums, float factor) {
    for (int64_t i = 0; i < count; i++) {
        const int64_t out = row + i;
        float value = sums[i] * factor * load_float(p->out_type, p->scale_out, p->per_tensor ? 0 : out);
        if (p->bias) value += load_float(p->bias_type, p->bias, out);
        store_float(p->x_type, p->y, token * p->outs + out, value);
    }
}

#ifdef HAVE_X86
AVX2 static void store_rows_avx2(const Sign *p, int64_t token, int64_t row, int64_t count, const float *sums, float factor) {
    const __m256 by = _mm256_set1_ps(factor), all = _mm256_set1_ps(load_float(p->out_type, p->scale_out, 0));
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        const __m256 scale = p->per_tensor ? all : load8(p->out_type, p->scale_out, row + i);
        __m256 value = _mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(sums + i), by), scale);
        if (p->bias) value = _mm256_add_ps(value, load8(p->bias_type, p->bias, row + i));
        store8(p->x_type, p->y, token * p->outs + row + i, value);
    }
    store_rows_portable(p, token, row + i, count - i, sums + i, factor);
}

#include "lanes_avx2.h"
#include "lookup.h"
#include "sign_lanes.h"

#include "lanes_avx512.h"
#include "lookup.h"
#include "sign_lanes.h"
#endif

#include "sign_codes.h"

/* What the rows are multiplied with: tables of floats; or planes of codes, their sums and what a code of 1 is worth. */
typedef struct {
    float *tables;
    int8_t *planes;
    float step[MAX_TOKENS];
    int32_t code_sum[MAX_TOKENS];
} Activations;

/* Codes are multiplied as the floats they are: their sums are exact below 2^24, 132104 columns. */
static void sign_rows_portable(const Sign *p, const Activations *x, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
        const uint8_t *weight = p->weight + row * p->bytes;
        for (int64_t t = 0; t < p->tokens; t++) {
            const float *table = x->tables + t * p->words * 128;
            float low = 0.0f, high = 0.0f;
            for (int64_t i = 0; i < p->bytes; i++, table += 32) {
                low += table[weight[i] & 15];
                high += table[16 + (weight[i] >> 4)];
            }
            const float sum = low + high;
            store_rows_portable(p, t, row, 1, &sum, x->step[t]);
        }
    }
}

#ifdef HAVE_X86
static void multiply_codes(const Sign *p, const Activations *x, int64_t begin, int64_t end, int isa) {
    const int64_t width = (p->bytes + p->block - 1) / p->block * p->block * 8;
    for (int64_t row = begin; row < end; row += 64) {
        const int64_t last = row + 64 < end ? row + 64 : end;
        for (int64_t t = 0; t < p->tokens; t++) {
            int32_t minus[64];
            float sums[64];
            (isa == ISA_AVX2 ? minus_avx2 : minus_avx512)(p, x->planes + t * width, row, last, minus);
            for (int64_t i = 0; i < last - row; i++) sums[i] = (float)(x->code_sum[t] - 2 * minus[i]);
            store_rows_avx2(p, t, row, last - row, sums, x->step[t]);
        }
    }
}
#endif

static void prepare_tables(const Sign *p, const float *x, int64_t token, int isa, Activations *out) {
#ifdef HAVE_X86
    if (isa == ISA_AVX512VNNI) {
        make_tables_avx512(x, p->words, 128, out->tables + token * p->words * 128);
        return;
    }
    if (isa == ISA_AVX2) {
        make_tables_avx2(x, p->words, 88, out->tables + token * p->words * 88);
        return;
    }
#endif
    (void)isa;
    make_tables_portable(x, p->words * 32, out->tables + token * p->words * 128);
}

/* x * scale_in of one token as codes in planes or, for portable C, in tables. `codes` is scratch. */
static void prepare_codes(const Sign *p, float *x, int64_t token, int isa, int8_t *codes, Activations *out) {
    const int64_t blocks = (p->bytes + p->block - 1) / p->block, width = blocks * p->block * 8;
    Segment all = {0, p->columns, width, 0, 0};
    float sum;
    const Problem problem = {.x = x, .columns = p->columns, .tokens = 1, .x_type = FP32, .segments = &all, .sum = &sum,
                             .segment_count = 1, .padded = width, .codes = codes, .step = out->step + token,
                             .code_sum = out->code_sum + token};
    prepare_token(&problem, 0, NULL, isa);
#ifdef HAVE_X86
    if (isa >= ISA_AVX2) {
        make_planes(codes, blocks, p->block, out->planes + token * width);
        return;
    }
#endif
    for (int64_t k = 0; k < p->columns; k++) x[k] = codes[k];
    prepare_tables(p, x, token, isa, out);
}

static void read_layout(Sign *p, const int64_t *numbers) {
    p->outs = numbers[0], p->columns = numbers[1], p->per_tensor = (int)numbers[2], p->x_type = (int)numbers[3];
    p->in_type = (int)numbers[4], p->out_type = (int)numbers[5], p->bias_type = (int)numbers[6];
    p->bytes = (p->columns + 7) / 8, p->words = (p->columns + 31) / 32;
}

/* `p->tokens` tokens, at most MAX_TOKENS, of x. Returns 0, or 1 if out of memory. */
static int multiply_batch(const Sign *p, const void *x, int activation_bits, int isa, int threads) {
    const int planes = activation_bits && isa != PORTABLE;
    const int64_t padded = ((p->bytes + 63) & ~(int64_t)63) * 8, units = (p->outs + 31) / 32;
    const size_t floats = (size_t)padded * sizeof(float);
    const size_t prepared = planes ? (size_t)(padded * p->tokens) : 4 * floats * (size_t)p->tokens;
    uint8_t *memory = malloc(2 * floats + (size_t)padded + prepared + 64);
    if (!memory) return 1;
    float *values = (float *)aligned(memory), *scales = values + padded;
    int8_t *codes = (int8_t *)(scales + padded);
    Activations activations = {.tables = (float *)(codes + padded), .planes = codes + padded};
    memset(values, 0, floats);
    if (p->scale_in) to_float(isa, p->in_type, p->scale_in, 0, p->columns, scales);
    for (int64_t t = 0; t < p->tokens; t++) {
        activations.step[t] = 1.0f;
        to_float(isa, p->x_type, x, t * p->columns, p->columns, values);
        for (int64_t k = 0; p->scale_in && k < p->columns; k++) values[k] *= scales[k];
        if (activation_bits)
            prepare_codes(p, values, t, isa, codes, &activations);
        else
            prepare_tables(p, values, t, isa, &activations);
    }
    if (p->outs * p->columns * p->tokens < 600000 || threads < 1) threads = 1;
    if (threads > units) threads = (int)(units ? units : 1);
PARALLEL(omp parallel for num_threads(threads) schedule(static) if (threads > 1))
    for (int thread = 0; thread < threads; thread++) {
        const int64_t begin = units * thread / threads * 32, stop = units * (thread + 1) / threads * 32;
        const int64_t end = stop < p->outs ? stop : p->outs;
#ifdef HAVE_X86
        if (planes) {
            multiply_codes(p, &activations, begin, end, isa);
            continue;
        }
        if (isa >= ISA_AVX2) {
            (isa == ISA_AVX2 ? sign_rows_avx2 : sign_rows_avx512)(p, activations.tables, begin, end);
            continue;
        }
#endif
        sign_rows_portable(p, &activations, begin, end);
    }
    free(memory);
    return 0;
}

/* All of one linear layer. x is (tokens, columns) and y is (tokens, outs), both contiguous; `numbers` is what read_layout
   takes. Returns 0, or 1 if out of memory. */
EXPORT int slim_sign_linear(const void *x, const uint8_t *weight, const void *scale_in, const void *scale_out,
                            const void *bias, void *y, const int64_t *numbers, int64_t tokens, int activation_bits, int isa,
                            int threads) {
    Sign layer = {.scale_in = scale_in, .scale_out = scale_out, .bias = bias, .weight = weight};
    read_layout(&layer, numbers);
    layer.block = isa == ISA_AVX2 ? 32 : 64;
    const int64_t unit = layer.x_type == FP32 ? 4 : 2;
    for (int64_t first = 0; first < tokens; first += MAX_TOKENS) {
        layer.tokens = tokens - first < MAX_TOKENS ? tokens - first : MAX_TOKENS;
        layer.y = (uint8_t *)y + first * layer.outs * unit;
        if (multiply_batch(&layer, (const uint8_t *)x + first * layer.columns * unit, activation_bits, isa, threads)) return 1;
    }
    return 0;
}

#ifdef HAVE_X86
/* 32 bits as bytes of 0 or 255. */
AVX2 static inline __m256i spread_bits(const uint8_t *from) {
    int32_t bits;
    memcpy(&bits, from, 4);
    const __m256i bytes = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201);
    return _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), bytes), bit), bit);
}

AVX2 static int64_t ternary_codes_avx2(const uint8_t *const *rows, int count, int64_t columns, uint8_t *out) {
    int64_t k = 0;
    for (; k + 32 <= columns; k += 32) {
        __m256i codes = _mm256_setzero_si256();
        for (int i = 0; i < count; i++) {
            const __m256i plus = _mm256_set1_epi8((char)(2 << 2 * i));
            codes = _mm256_or_si256(codes, _mm256_andnot_si256(spread_bits(rows[i] + k / 8), plus));
        }
        _mm256_storeu_si256((__m256i *)(out + k), codes);
    }
    return k;
}

AVX2 static int64_t dense_row_avx2(const uint8_t *row, const float *scale_in, float scale, int type, int64_t columns,
                                   void *out, int64_t start) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128), sign = _mm256_set1_epi32((int)0x80000000u);
    const __m256 one = _mm256_set1_ps(scale);
    int64_t k = 0;
    for (; k + 8 <= columns; k += 8) {
        const __m256i minus = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(row[k / 8]), bit), bit);
        const __m256 size = scale_in ? _mm256_mul_ps(one, _mm256_loadu_ps(scale_in + k)) : one;
        store8(type, out, start + k, _mm256_xor_ps(size, _mm256_castsi256_ps(_mm256_and_si256(minus, sign))));
    }
    return k;
}

AVX512 static int64_t dense_row_avx512(const uint8_t *row, const float *scale_in, float scale, int type, int64_t columns,
                                       void *out, int64_t start) {
    const __m512i sign = _mm512_set1_epi32((int)0x80000000u);
    const __m512 one = _mm512_set1_ps(scale);
    int64_t k = 0;
    for (; k + 16 <= columns; k += 16) {
        uint16_t minus;
        memcpy(&minus, row + k / 8, 2);
        const __m512i size = _mm512_castps_si512(scale_in ? _mm512_mul_ps(one, _mm512_loadu_ps(scale_in + k)) : one);
        store16(type, out, start + k, _mm512_castsi512_ps(_mm512_mask_xor_epi32(size, minus, size, sign)));
    }
    return k;
}
#endif

/* Rows `first` to `last` in the layout of ternary.c, whose codes T + 1 are 0 and 2 here: out is (rows, columns) with
   rows = ceil((last - first) / 4), and bits 2i..2i+1 of out[r,k] belong to row first + r + i * rows. */
EXPORT void slim_sign_ternary(const uint8_t *weight, uint8_t *out, int64_t first, int64_t last, int64_t columns, int isa,
                              int threads) {
    const int64_t bytes = (columns + 7) / 8, rows = (last - first + 3) / 4;
    if (rows * columns < 100000 || threads < 1) threads = 1;
PARALLEL(omp parallel for num_threads(threads) schedule(static) if (threads > 1))
    for (int64_t row = 0; row < rows; row++) {
        const uint8_t *from[4];
        int count = 0;
        for (; count < 4 && first + row + count * rows < last; count++)
            from[count] = weight + (first + row + count * rows) * bytes;
        uint8_t *to = out + row * columns;
        int64_t k = 0;
#ifdef HAVE_X86
        if (isa >= ISA_AVX2) k = ternary_codes_avx2(from, count, columns, to);
#endif
        for (; k < columns; k++) {
            int codes = 0;
            for (int i = 0; i < count; i++) codes |= (from[i][k / 8] >> k % 8 & 1 ? 0 : 2) << 2 * i;
            to[k] = (uint8_t)codes;
        }
    }
    (void)isa;
}

/* Rows `first` to `last` of the dense matrix, (last - first, columns) of the dtype `numbers` has for x. Returns 0, or 1 if
   out of memory. */
EXPORT int slim_sign_dense(const uint8_t *weight, const void *scale_in, const void *scale_out, void *out,
                           const int64_t *numbers, int64_t first, int64_t last, int isa, int threads) {
    Sign layer = {.scale_in = scale_in, .scale_out = scale_out, .weight = weight};
    Sign *p = &layer;
    read_layout(p, numbers);
    float *scales = NULL;
    if (scale_in) {
        scales = malloc((size_t)p->columns * sizeof(float));
        if (!scales) return 1;
        to_float(isa, p->in_type, scale_in, 0, p->columns, scales);
    }
    if ((last - first) * p->columns < 100000 || threads < 1) threads = 1;
PARALLEL(omp parallel for num_threads(threads) schedule(static) if (threads > 1))
    for (int64_t row = first; row < last; row++) {
        const uint8_t *from = weight + row * p->bytes;
        const float scale = load_float(p->out_type, scale_out, p->per_tensor ? 0 : row);
        const int64_t start = (row - first) * p->columns;
        int64_t k = 0;
#ifdef HAVE_X86
        if (isa >= ISA_AVX2)
            k = (isa == ISA_AVX2 ? dense_row_avx2 : dense_row_avx512)(from, scales, scale, p->x_type, p->columns, out, start);
#endif
        for (; k < p->columns; k++) {
            const float size = from[k / 8] >> k % 8 & 1 ? -scale : scale;
            store_float(p->x_type, out, start + k, scales ? size * scales[k] : size);
        }
    }
    free(scales);
    return 0;
}
