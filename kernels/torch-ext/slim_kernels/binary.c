/* Binary linear layers on the CPU: y = x W^T + bias, two bits per weight; the layout is drawn in binary_reference.py.

   A row of W is a plane of signs s and a plane of second bits t, with s2 = +-1 for them. For a few tokens W is never made.
   Where a column is not salient, sums over the columns with t = 0 and with t = 1 come from sums over all of them:

     sum of s x where t = 0 (1)    half of  (sum of s x) + (-) (sum of s s2 x)
     sum of x where t = 0 (1)      half of  (sum of x) + (-) (sum of s2 x)

   and sums of signed activations come out of a table (lookup.h). Salient columns are zeros in these tables and have their
   own, in which only the lookups with a salient column are made. Scales and offsets meet the sums once per group.

   For many tokens a few rows at a time are made dense and multiplied by PyTorch.

   Plain C11, no dependency but the C library (and OpenMP if the compiler has it). */

#include "common.h"

#include "convert.h"

#include "transpose.h"

#include "lookup_portable.h"

enum { MAX_TOKENS = 16 };

/* Sums over the columns that are not salient: of x * columns[0] and x * columns[1] by s and by s * s2, of x by s2; and over
   those that are: of x * columns[0] by s and of x * columns[1] by s2. */
enum { SMALL, SMALL_BOTH, LARGE, LARGE_BOTH, PLAIN, SALIENT, SALIENT_SECOND, SUMS };

typedef struct {
    const uint8_t *weight, *is_salient;
    const void *scale, *offset, *bias;
    void *y;
    int64_t tokens, outs, columns, groups, group_size, bytes, words; /* of a row: packed bytes, words of 32 columns */
    int x_type, scale_type, offset_type, column_type, bias_type, columns_given;
} Binary;

typedef struct {
    int32_t word, shift; /* where its bits are: the word of its block of `lanes` words, and the first of its bits */
    int64_t table;       /* where its tables are, among a token's */
} Lookup;

typedef struct {
    float *tables, *salient_tables;
    Lookup *salient;        /* the lookups with a salient column, in order */
    int64_t *first_salient; /* for each word (and past the last), the first of these */
    float *totals;     /* for each token and group: sum of x, of the columns that are not salient and of those that are */
    int kinds, salient_kinds;                            /* tables side by side for each lookup */
    int64_t word, salient_word, stride, salient_stride; /* floats of a word's tables, and of a token's */
} Inputs;

static void store_outputs(const Binary *p, int64_t token, int64_t row, int64_t count, const float *sums) {
    for (int64_t i = 0; i < count; i++) {
        const float bias = p->bias ? load_float(p->bias_type, p->bias, row + i) : 0.0f;
        store_float(p->x_type, p->y, token * p->outs + row + i, sums[i] + bias);
    }
}

static int is_salient(const Binary *p, int64_t column) { return p->is_salient[column / 8] >> column % 8 & 1; }

#ifdef HAVE_X86
#include "lanes_avx2.h"
#include "lookup.h"
#include "binary_lanes.h"

#include "lanes_avx512.h"
#include "lookup.h"
#include "binary_lanes.h"
#endif

/* One row and one token. Tables of four columns, one kind after the other. */
static float multiply_row_portable(const Binary *p, const Inputs *x, int64_t row, int64_t token) {
    const uint8_t *signs = p->weight + row * 2 * p->bytes, *seconds = signs + p->bytes;
    const float *small = x->tables + token * x->stride, *large = p->columns_given ? small + x->word : small;
    const float *plain = x->kinds == 3 ? large + x->word : small;
    const float *salient = x->salient_tables + token * x->salient_stride;
    const float *salient_second = p->columns_given ? salient + x->word : salient;
    const int64_t group_bytes = p->groups > 1 ? p->group_size / 8 : p->bytes;
    float y = 0.0f;
    for (int64_t group = 0; group < p->groups; group++) {
        float sum[SUMS] = {0};
        const int64_t stop = (group + 1) * group_bytes < p->bytes ? (group + 1) * group_bytes : p->bytes;
        for (int64_t i = 2 * group * group_bytes; i < 2 * stop; i++) {
            const int shift = (int)(i % 2) * 4, s = signs[i / 2] >> shift & 15, t = seconds[i / 2] >> shift & 15;
            sum[SMALL] += small[16 * i + s], sum[SMALL_BOTH] += small[16 * i + (s ^ t)];
            if (p->columns_given) sum[LARGE] += large[16 * i + s], sum[LARGE_BOTH] += large[16 * i + (s ^ t)];
            if (p->offset) sum[PLAIN] += plain[16 * i + t];
            if (p->is_salient[i / 2] >> shift & 15)
                sum[SALIENT] += salient[16 * i + s], sum[SALIENT_SECOND] += salient_second[16 * i + t];
        }
        const float *two = p->columns_given ? sum + LARGE : sum + SMALL, *totals = x->totals + (token * p->groups + group) * 2;
        const int64_t scale = (row * p->groups + group) * 4, offset = (row * p->groups + group) * 3;
        y += (sum[SMALL] + sum[SMALL_BOTH]) * 0.5f * load_float(p->scale_type, p->scale, scale);
        y += (two[0] - two[1]) * 0.5f * load_float(p->scale_type, p->scale, scale + 1);
        y += sum[SALIENT] * load_float(p->scale_type, p->scale, scale + 2);
        y += sum[SALIENT_SECOND] * load_float(p->scale_type, p->scale, scale + 3);
        if (!p->offset) continue;
        y += (totals[0] + sum[PLAIN]) * 0.5f * load_float(p->offset_type, p->offset, offset);
        y += (totals[0] - sum[PLAIN]) * 0.5f * load_float(p->offset_type, p->offset, offset + 1);
        y += totals[1] * load_float(p->offset_type, p->offset, offset + 2);
    }
    return y;
}

static void binary_rows_portable(const Binary *p, const Inputs *x, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++)
        for (int64_t t = 0; t < p->tokens; t++) {
            const float sum = multiply_row_portable(p, x, row, t);
            store_outputs(p, t, row, 1, &sum);
        }
}

static void make_inputs(const Binary *p, int isa, float *const *rest, float *const *salient, int64_t token, Inputs *x) {
#ifdef HAVE_X86
    if (isa != PORTABLE) {
        (isa == ISA_AVX2 ? make_inputs_avx2 : make_inputs_avx512)(p, rest, salient, token, x);
        return;
    }
#endif
    (void)isa;
    for (int i = 0; i < x->kinds; i++)
        make_tables_portable(rest[i], p->words * 32, x->tables + token * x->stride + i * x->word);
    for (int i = 0; i < x->salient_kinds; i++)
        make_tables_portable(salient[i], p->words * 32, x->salient_tables + token * x->salient_stride + i * x->word);
}

/* All ones for the columns that are salient. */
static void make_mask(const Binary *p, uint32_t *mask) {
    for (int64_t k = 0; k < p->columns; k++) mask[k] = 0u - (uint32_t)is_salient(p, k);
}

/* out[k] = x[k] where the mask is `wanted`, else 0. Not by a product, which would spread a NaN. */
static void choose(const float *x, const uint32_t *mask, uint32_t wanted, int64_t count, float *out) {
    for (int64_t k = 0; k < count; k++) {
        uint32_t bits;
        memcpy(&bits, x + k, 4);
        bits &= ~(mask[k] ^ wanted);
        memcpy(out + k, &bits, 4);
    }
}

/* Sum of `count` numbers, in the same order whatever the instruction set. */
static float sum_of(const float *x, int64_t count) {
    float part[8] = {0};
    int64_t k = 0;
    for (; k + 8 <= count; k += 8)
        for (int i = 0; i < 8; i++) part[i] += x[k + i];
    for (; k < count; k++) part[0] += x[k];
    return part[0] + part[1] + (part[2] + part[3]) + (part[4] + part[5] + (part[6] + part[7]));
}

/* Splits the activations x of one token: rest and salient are x * columns[0], x * columns[1] and x, each with zeros where
   the other is not. */
static void split_activations(const Binary *p, const float *x, const float *columns, const uint32_t *mask, int64_t token,
                              float *const *rest, float *const *salient, float *product, Inputs *inputs) {
    for (int i = 0; p->offset && i < 2; i++) {
        choose(x, mask, i ? ~0u : 0, p->columns, product);
        for (int64_t group = 0; group < p->groups; group++) {
            const int64_t start = group * p->group_size, left = p->columns - start;
            inputs->totals[(token * p->groups + group) * 2 + i] =
                sum_of(product + start, left < p->group_size ? left : p->group_size);
        }
    }
    for (int i = 0; i < inputs->kinds; i++) {
        const float *from = x;
        if (columns && i < 2) {
            for (int64_t k = 0; k < p->columns; k++) product[k] = x[k] * columns[i * p->columns + k];
            from = product;
        }
        choose(from, mask, 0, p->columns, rest[i]);
        if (i < inputs->salient_kinds) choose(from, mask, ~0u, p->columns, salient[i]);
    }
}

/* List the lookups with a salient column, for words in blocks of `lanes`. */
static void find_salient(const Binary *p, int field, int lanes, Inputs *x) {
    int64_t found = 0;
    for (int64_t word = 0; word < p->words; word++) {
        uint32_t bits = 0;
        const int64_t left = p->bytes - 4 * word;
        memcpy(&bits, p->is_salient + 4 * word, left < 4 ? (size_t)left : 4);
        x->first_salient[word] = found;
        for (int i = 0; i * field < 32; i++) {
            if (!(bits >> i * field & ((1u << field) - 1))) continue;
            const int64_t table = word * x->salient_word + i * (1 << field);
            x->salient[found++] = (Lookup){(int32_t)(word % lanes), i * field, table};
        }
    }
    x->first_salient[p->words] = found;
}

static void read_layout(Binary *p, const int64_t *numbers) {
    p->outs = numbers[0], p->columns = numbers[1], p->groups = numbers[2];
    p->group_size = p->groups > 1 ? numbers[3] : p->columns;
    p->x_type = (int)numbers[4], p->scale_type = (int)numbers[5], p->offset_type = (int)numbers[6];
    p->column_type = (int)numbers[7], p->bias_type = (int)numbers[8];
    p->bytes = (p->columns + 7) / 8, p->words = (p->columns + 31) / 32;
}

/* All of one linear layer, for at most MAX_TOKENS tokens. x is (tokens, columns) and y is (tokens, outs), both
   contiguous; `numbers` is what read_layout takes. Returns 0, or 1 if out of memory. */
EXPORT int slim_binary_linear(const void *x, const uint8_t *weight, const uint8_t *salient, const void *scale,
                              const void *offset, const void *columns, const void *bias, void *y, const int64_t *numbers,
                              int64_t tokens, int isa, int threads) {
    Binary layer = {.weight = weight, .is_salient = salient, .scale = scale, .offset = offset, .bias = bias, .y = y,
                    .tokens = tokens, .columns_given = columns != NULL};
    Binary *p = &layer;
    read_layout(p, numbers);
    if (p->groups > 1 && p->group_size % 32) isa = PORTABLE;
    const int lanes = isa == ISA_AVX512VNNI ? 16 : 8, field = isa == ISA_AVX2 ? 3 : 4, lookups = isa == ISA_AVX2 ? 11 : 8;
    const int64_t one = lookups * (field == 3 ? 8 : 16), padded = p->words * 32, units = (p->outs + 31) / 32;
    Inputs inputs = {.kinds = !columns ? 1 : offset ? 3 : 2, .salient_kinds = columns ? 2 : 1};
    Inputs *in = &inputs;
    in->word = isa == PORTABLE ? p->words * one : in->kinds * one, in->stride = in->kinds * p->words * one;
    in->salient_word = in->salient_kinds * one, in->salient_stride = in->salient_kinds * p->words * one;
    if (p->outs * p->columns * tokens < 300000 || threads < 1) threads = 1;
    if (threads > units) threads = (int)(units ? units : 1);

    const int64_t per_token = in->stride + in->salient_stride + 2 * p->groups;
    const int64_t own = (14 * p->groups * lanes + 15) / 16 * 16; /* scales and offsets of two vectors of rows */
    const int64_t floats = 10 * padded + tokens * per_token + threads * own;
    const size_t lists = (size_t)(p->words * lookups) * sizeof(Lookup) + (size_t)(p->words + 1) * sizeof(int64_t);
    uint8_t *memory = malloc((size_t)floats * sizeof(float) + lists + 64);
    if (!memory) return 1;
    float *values = (float *)aligned(memory), *factors = values + padded, *product = factors + 2 * padded;
    uint32_t *mask = (uint32_t *)(product + padded);
    float *parts = product + 2 * padded;
    float *const rest[3] = {parts, parts + padded, parts + 2 * padded};
    float *const special[2] = {parts + 3 * padded, parts + 4 * padded};
    in->tables = parts + 5 * padded, in->salient_tables = in->tables + tokens * in->stride;
    float *scratch = in->salient_tables + tokens * in->salient_stride;
    in->totals = scratch + threads * own;
    in->salient = (Lookup *)(in->totals + tokens * 2 * p->groups);
    in->first_salient = (int64_t *)(in->salient + p->words * lookups);
    memset(parts, 0, (size_t)(5 * padded) * sizeof(float));
    find_salient(p, field, lanes, in);
    make_mask(p, mask);
    if (columns) to_float(isa, p->column_type, columns, 0, 2 * p->columns, factors);
    for (int64_t t = 0; t < tokens; t++) {
        to_float(isa, p->x_type, x, t * p->columns, p->columns, values);
        split_activations(p, values, columns ? factors : NULL, mask, t, rest, special, product, in);
        make_inputs(p, isa, rest, special, t, in);
    }
PARALLEL(omp parallel for num_threads(threads) schedule(static) if (threads > 1))
    for (int thread = 0; thread < threads; thread++) {
        const int64_t begin = units * thread / threads * 32, stop = units * (thread + 1) / threads * 32;
        const int64_t end = stop < p->outs ? stop : p->outs;
#ifdef HAVE_X86
        if (isa != PORTABLE) {
            (isa == ISA_AVX2 ? binary_rows_avx2 : binary_rows_avx512)(p, in, begin, end, scratch + thread * own);
            continue;
        }
#endif
        binary_rows_portable(p, in, begin, end);
    }
    free(memory);
    return 0;
}

#include "binary_dense.h"

/* Rows `first` to `last` of the dense matrix, (last - first, columns) of the dtype `numbers` has for x. Returns 0, or 1 if
   out of memory. */
EXPORT int slim_binary_dense(const uint8_t *weight, const uint8_t *salient, const void *scale, const void *offset,
                             const void *columns, void *out, const int64_t *numbers, int64_t first, int64_t last, int isa,
                             int threads) {
    Binary layer = {.weight = weight, .is_salient = salient, .scale = scale, .offset = offset};
    Binary *p = &layer;
    read_layout(p, numbers);
    float *factors = NULL;
    if (columns) {
        factors = malloc((size_t)p->columns * 2 * sizeof(float));
        if (!factors) return 1;
        to_float(isa, p->column_type, columns, 0, 2 * p->columns, factors);
    }
    if ((last - first) * p->columns < 100000 || threads < 1) threads = 1;
PARALLEL(omp parallel for num_threads(threads) schedule(static) if (threads > 1))
    for (int64_t row = first; row < last; row++) dense_row(p, row, factors, isa, out, (row - first) * p->columns);
    free(factors);
    return 0;
}
