/* Sparse linear layers on the CPU: y = x W^T + bias, W read from the packed form of sparse_reference.py as it is.

   A row of W is a mask, one bit per column, and the kept values in the order of their columns. Positions (so many of
   every 4 columns) are first translated to a mask. Every scheme then walks along a row, 64 columns at a time: the mask
   says which columns the next values belong to, and the number of its bits how many of them are taken.

     AVX-512 VBMI2      VPEXPAND puts up to 64 values at their columns; a block is multiplied where it is decoded
     AVX2, portable     a row is expanded to fp32 in a buffer that stays in the first cache, then multiplied

   Nothing is assumed of the bytes: a row never reads outside of `values`, whatever its mask says (see find_row).

   Plain C11, no dependency but the C library (and OpenMP if the compiler has it). */

#include "common.h"

#include "sparse_rows.h"

#include "sparse_avx2.h"

#include "sparse_avx512.h"

/* What `isa` means here: AVX-512 without VBMI2 is of no use. */
enum { SPARSE_PORTABLE, SPARSE_AVX2, SPARSE_VBMI2, SPARSE_BF16 };

EXPORT int slim_sparse_best_isa(void) {
#ifdef HAVE_X86
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
        return SPARSE_PORTABLE;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512vbmi") || !__builtin_cpu_supports("avx512vbmi2"))
        return SPARSE_AVX2;
#ifdef HAVE_BF16
    if (__builtin_cpu_supports("avx512bf16")) return SPARSE_BF16;
#endif
    return SPARSE_VBMI2;
#else
    return SPARSE_PORTABLE;
#endif
}

static void read_layout(Sparse *p, const int64_t *numbers) {
    p->outs = numbers[0], p->columns = numbers[1], p->groups = numbers[2], p->group_size = numbers[3];
    p->stride = numbers[4], p->total = numbers[5], p->keep = (int)numbers[6], p->bits = (int)numbers[7];
    p->x_type = (int)numbers[8], p->value_type = (int)numbers[9], p->scale_type = (int)numbers[10];
    p->bias_type = (int)numbers[11];
    p->blocks = (p->columns + 63) / 64;
    if (p->groups == 1) p->group_size = p->columns;
}

static size_t padded(int64_t bytes) { return ((size_t)bytes + 127) & ~(size_t)63; }

static size_t row_scratch_bytes(const Sparse *p) {
    return padded(p->blocks * 8) + padded(value_bytes(p, p->blocks * 64) + 64) + padded(p->blocks * 256);
}

static RowScratch row_scratch(const Sparse *p, uint8_t *base) {
    RowScratch s = {.mask = base};
    s.values = s.mask + padded(p->blocks * 8);
    s.dense = (float *)(s.values + padded(value_bytes(p, p->blocks * 64) + 64));
    return s;
}

static void expand_row(const Sparse *p, int64_t row, Row from, int isa, float *out) {
    const int64_t group = p->groups == 1 ? 64 : p->group_size;
#ifdef HAVE_X86
    if (isa >= SPARSE_VBMI2 && group % 16 == 0) {
        expand_row_avx512(p, row, from, out);
        return;
    }
    if (isa >= SPARSE_AVX2 && group % 8 == 0) {
        expand_row_avx2(p, row, from, out);
        return;
    }
#endif
    (void)isa, (void)group;
    expand_row_portable(p, row, from, out);
}

/* Whether blocks are multiplied where they are decoded: 1 in fp32, 2 in bf16. */
static int multiplies_blocks(const Sparse *p, int isa) {
#ifdef HAVE_X86
    if (isa < SPARSE_VBMI2 || (p->groups > 1 && p->group_size % 64)) return 0;
    const int kind = kind_of(p);
    return isa == SPARSE_BF16 && p->x_type == BF16 && kind != KIND_FP16 && kind != KIND_FP32 ? 2 : 1;
#else
    (void)p, (void)isa;
    return 0;
#endif
}

/* Tokens of a batch of blocks of `count` tokens at most. */
static int64_t batch_size(int64_t count) { return count > 4 ? 8 : count > 2 ? 4 : count; }

/* Activations of all tokens: token after token in fp32, or in batches, block after block, in the order of decoding. */
static void prepare_activations(const Sparse *p, int scheme, uint8_t *out, float *buffer) {
    const int64_t width = p->blocks * 64;
    memset(buffer, 0, (size_t)width * sizeof(float));
    if (scheme == 0) {
        for (int64_t t = 0; t < p->tokens; t++) {
            to_floats(p->x_type, p->x, t * p->columns, p->columns, buffer);
            memcpy(out + t * width * 4, buffer, (size_t)width * sizeof(float));
        }
        return;
    }
#ifdef HAVE_X86
    int order[64];
    for (int i = 0; i < 64; i++) order[i] = column_at(kind_of(p), scheme == 2, i);
    const int64_t size = scheme == 2 ? 2 : 4;
    for (int64_t first = 0; first < p->tokens; first += MAX_TOKENS) {
        const int64_t count = p->tokens - first < MAX_TOKENS ? p->tokens - first : MAX_TOKENS, stored = batch_size(count);
        for (int64_t t = 0; t < stored; t++) {
            if (t < count)
                to_floats(p->x_type, p->x, (first + t) * p->columns, p->columns, buffer);
            else
                memset(buffer, 0, (size_t)width * sizeof(float));
            for (int64_t block = 0; block < p->blocks; block++) {
                uint8_t *to = out + (first * width + (block * stored + t) * 64) * size;
                const float *from = buffer + block * 64;
                if (scheme == 2)
                    for (int i = 0; i < 64; i++) ((uint16_t *)to)[i] = (uint16_t)(float_to_bits(from[order[i]]) >> 16);
                else
                    for (int i = 0; i < 64; i++) ((float *)to)[i] = from[order[i]];
            }
        }
    }
#endif
}

static void multiply_rows(const Sparse *p, int scheme, int isa, const uint8_t *x, int64_t begin, int64_t end,
                          const RowScratch *scratch, float *sums) {
#ifdef HAVE_X86
    if (scheme) {
        /* Few enough rows that they stay in the second cache for the next batch. */
        const int64_t step = p->tokens <= MAX_TOKENS ? end - begin : 16;
        const int64_t width = p->blocks * 64 * (scheme == 2 ? 2 : 4);
        for (int64_t row = begin; row < end; row += step)
            for (int64_t first = 0; first < p->tokens; first += MAX_TOKENS) {
                const int64_t count = p->tokens - first < MAX_TOKENS ? p->tokens - first : MAX_TOKENS;
                const Batch batch = {(const char *)x + first * width, first, count, batch_size(count)};
                const int64_t last = row + step < end ? row + step : end;
#ifdef HAVE_BF16
                if (scheme == 2)
                    few_tokens_pairs(p, batch, row, last, scratch);
                else
#endif
                    few_tokens_floats(p, batch, row, last, scratch);
            }
        return;
    }
#endif
    const int64_t width = p->blocks * 64;
    for (int64_t row = begin; row < end; row++) {
        expand_row(p, row, find_row(p, row, scratch, isa != SPARSE_PORTABLE), isa, scratch->dense);
#ifdef HAVE_X86
        if (isa != SPARSE_PORTABLE)
            dot_avx2(scratch->dense, (const float *)x, width, p->tokens, sums);
        else
#endif
            for (int64_t t = 0; t < p->tokens; t++) sums[t] = dot_portable(scratch->dense, (const float *)x + t * width, width);
        for (int64_t t = 0; t < p->tokens; t++) store_sum(p, t, row, sums[t]);
    }
    (void)scheme;
}

/* All of one linear layer. x is (tokens, columns) and y is (tokens, outs), both contiguous; `numbers` is what
   read_layout takes. Returns 0, or 1 if out of memory. */
EXPORT int slim_sparse_linear(const void *x, const uint8_t *index, const void *values, const int32_t *rows,
                              const void *scale, const uint8_t *zero, const void *bias, void *y, const int64_t *numbers,
                              int64_t tokens, int isa, int threads) {
    Sparse problem = {.x = x, .values = values, .scale = scale, .bias = bias, .index = index, .zero = zero, .rows = rows};
    Sparse *p = &problem;
    read_layout(p, numbers);
    p->tokens = tokens, p->y = y;
    const int scheme = multiplies_blocks(p, isa);
    if (p->outs * p->columns * tokens < 300000 || threads < 1) threads = 1;
    if (threads > p->outs) threads = (int)(p->outs ? p->outs : 1);

    const size_t activations = padded(p->blocks * 256 * ((tokens + 7) & ~(int64_t)7)), one = row_scratch_bytes(p);
    const size_t own = 2 * one + padded(tokens * 4);
    uint8_t *memory = malloc(activations + own * (size_t)threads + 64);
    if (!memory) return 1;
    uint8_t *prepared = aligned(memory), *scratches = prepared + activations;
    prepare_activations(p, scheme, prepared, row_scratch(p, scratches).dense);

PARALLEL(omp parallel for num_threads(threads) schedule(static) if (threads > 1))
    for (int thread = 0; thread < threads; thread++) {
        uint8_t *base = scratches + own * (size_t)thread;
        const RowScratch scratch[2] = {row_scratch(p, base), row_scratch(p, base + one)};
        multiply_rows(p, scheme, isa, prepared, p->outs * thread / threads, p->outs * (thread + 1) / threads, scratch,
                      (float *)(base + 2 * one));
    }
    free(memory);
    return 0;
}

static void write_row(const Sparse *p, int64_t row, int isa, const RowScratch *scratch, void *out, int64_t start) {
    const Row found = find_row(p, row, scratch, isa != SPARSE_PORTABLE);
    const int type = p->x_type;
#ifdef HAVE_X86
    if (isa >= SPARSE_VBMI2 && !p->bits && type == p->value_type && type != FP32) {
        expand_words_avx512(p, row, found, (uint16_t *)out + start);
        return;
    }
    if (isa >= SPARSE_VBMI2 && p->bits && p->bits <= 4 && type != FP32 && (p->groups == 1 || p->group_size % 64 == 0)) {
        expand_table_avx512(p, row, found, (uint16_t *)out + start);
        return;
    }
#endif
    expand_row(p, row, found, isa, scratch->dense);
#ifdef HAVE_X86
    if (isa >= SPARSE_VBMI2)
        from_floats_avx512(type, scratch->dense, p->columns, out, start);
    else if (isa == SPARSE_AVX2)
        from_floats_avx2(type, scratch->dense, p->columns, out, start);
    else
#endif
        from_floats(type, scratch->dense, p->columns, out, start);
}

/* Rows `first` to `last` of the dense matrix, (last - first, columns) of the dtype `numbers` has for x. Returns 0, or 1 if
   out of memory. */
EXPORT int slim_sparse_dense(const uint8_t *index, const void *values, const int32_t *rows, const void *scale,
                             const uint8_t *zero, void *out, const int64_t *numbers, int64_t first, int64_t last, int isa,
                             int threads) {
    Sparse problem = {.values = values, .scale = scale, .index = index, .zero = zero, .rows = rows};
    Sparse *p = &problem;
    read_layout(p, numbers);
    const int64_t count = last - first;
    if (count * p->columns < 100000 || threads < 1) threads = 1;
    if (threads > count) threads = (int)(count ? count : 1);
    const size_t own = row_scratch_bytes(p);
    uint8_t *memory = malloc(own * (size_t)threads + 64);
    if (!memory) return 1;
PARALLEL(omp parallel for num_threads(threads) schedule(static) if (threads > 1))
    for (int thread = 0; thread < threads; thread++) {
        const RowScratch scratch = row_scratch(p, aligned(memory) + own * (size_t)thread);
        for (int64_t row = count * thread / threads; row < count * (thread + 1) / threads; row++)
            write_row(p, first + row, isa, &scratch, out, row * p->columns);
    }
    free(memory);
    return 0;
}
