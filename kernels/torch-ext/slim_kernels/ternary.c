/* Ternary linear layers on the CPU: y = x W^T + bias with W[n,k] = scale[n,g] * T[n,k] + offset[n,g], T in {-1,0,1}.

   weight is uint8 (P, K), P = ceil(N / 4): bits 2i..2i+1 of weight[r,k] hold the code T+1 of output row r + i*P. It is
   read as it is. 64 neighbouring bytes hold 64 neighbouring columns of four output rows ("planes"), so one load, four
   ANDs and four dot products against the same int8 activations serve 256 weights. Codes stay where they are in the
   byte: plane i is 4^i times too large, which the factor of the final scale undoes. Since codes are T+1,
   sum T*q = sum code*q - sum q, and the sums of the int8 activations q are computed once per token.

   Two schemes share this layout.
     lanes along columns (few tokens): accumulators hold partial sums of one output row; one horizontal sum per row.
     lanes along rows (more tokens): 16 (AVX2: 8) packed rows are transposed into a small tile, four columns of one row
     per 32-bit lane, and reused by all the tokens.

   Columns are cut into segments: a segment lies in one scale group and is at most max_segment columns long. Quantised
   activations are stored by segment, padded with zeros to a multiple of 64, so that any K and any group size run through
   the same loops. A packed row whose padded reads would leave the weight is copied to scratch first.

   Plain C11, no dependency but the C library (and OpenMP if the compiler has it). The instruction set is chosen at run
   time; see slim_best_isa. */

#include "common.h"

#include "convert.h"

#include "activations.h"

#include "few_tokens.h"

#include "transpose.h"

#include "many_tokens.h"

static int isa_in_use = PORTABLE;

EXPORT int slim_best_isa(void) {
#ifdef HAVE_X86
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
        return PORTABLE;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni"))
        return ISA_AVX512VNNI;
    return ISA_AVX2;
#else
    return PORTABLE;
#endif
}

EXPORT void slim_use_isa(int isa) { isa_in_use = isa; }

EXPORT int slim_has_openmp(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

static int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

static void cut_segments(Problem *p, int64_t max_segment) {
    int64_t count = 0, padded = 0;
    for (int64_t start = 0; start < p->columns;) {
        int64_t group = start / p->group_size, stop = (group + 1) * p->group_size;
        stop = stop < p->columns ? stop : p->columns;
        int64_t length = stop - start < max_segment ? stop - start : max_segment;
        p->segments[count++] = (Segment){start, length, (length + 63) & ~(int64_t)63, padded, group};
        padded += (length + 63) & ~(int64_t)63;
        start += length;
    }
    p->segment_count = count;
    p->padded = padded;
}

typedef struct {
    uint8_t *base;
    size_t used;
} Arena;

/* With base NULL only the size is counted: the same calls first measure, then hand out. */
static void *take(Arena *arena, int64_t bytes) {
    uint8_t *at = arena->base ? arena->base + arena->used : NULL;
    arena->used += ((size_t)bytes + 127) & ~(size_t)63;
    return at;
}

static void take_activations(Problem *p, Arena *arena, int act_bits) {
    int64_t columns = p->padded * p->tokens, vectors = p->segment_count * p->tokens;
    if (act_bits) {
        p->codes = take(arena, columns);
        p->code_sum = take(arena, vectors * 4);
    } else {
        p->values = take(arena, columns * 4);
    }
    p->step = take(arena, vectors * 4);
    p->sum = take(arena, vectors * 4);
}

static void take_scratch(const Problem *p, Arena *arena, Scratch *s) {
    for (int i = 0; i < (p->tiled ? MAX_ROWS : 1); i++) s->row_copy[i] = take(arena, p->columns + 64);
    if (!p->tiled) {
        s->scale = take(arena, 4 * p->segment_count * 4);
        return;
    }
    int64_t table = 4 * MAX_ROWS * 4, tokens = p->tokens < TOKEN_BLOCK ? p->tokens : TOKEN_BLOCK;
    s->tile = take(arena, MAX_ROWS * TILE_SEGMENT);
    s->bias = take(arena, table);
    s->scale = take(arena, p->groups * table);
    s->offset = take(arena, p->groups * table);
    s->accumulator = take(arena, tokens * table);
}

/* All of one linear layer. `types`: two bits each for x (and y), scale, offset, bias; `groups` 0 means one scale for the
   whole tensor. x is (tokens, columns) and y is (tokens, outs), both contiguous. Returns 0, or 1 if out of memory. */
EXPORT int slim_ternary_linear(const void *x, const uint8_t *weight, const void *scale, const void *offset,
                               const void *bias, void *y, int64_t tokens, int64_t outs, int64_t columns, int64_t groups,
                               int64_t group_size, int types, int act_bits, int threads) {
    const int isa = isa_in_use;
    Problem problem = {.x = x, .scale = scale, .offset = offset, .bias = bias, .weight = weight, .y = y};
    Problem *p = &problem;
    p->tokens = tokens, p->outs = outs, p->columns = columns, p->rows = ceil_divide(outs, 4);
    p->per_tensor = groups == 0, p->groups = groups ? groups : 1;
    p->group_size = p->groups > 1 ? group_size : columns;
    p->x_type = types & 3, p->scale_type = types >> 2 & 3, p->offset_type = types >> 4 & 3, p->bias_type = types >> 6 & 3;
    p->tiled = act_bits && isa != PORTABLE && tokens > (isa == ISA_AVX2 ? 2 : 3);

    int64_t max_segment = !p->tiled ? LANE_SEGMENT : isa == ISA_AVX2 ? 256 : TILE_SEGMENT;
    int64_t capacity = p->groups * ceil_divide(p->group_size, max_segment);
    p->segments = malloc((size_t)capacity * sizeof(Segment));
    if (!p->segments) return 1;
    cut_segments(p, max_segment);

    int64_t width = !p->tiled ? 1 : isa == ISA_AVX2 ? 8 : 16;
    int64_t row_blocks = ceil_divide(p->rows, width), token_blocks = p->tiled ? ceil_divide(tokens, TOKEN_BLOCK) : 1;
    const int64_t block = ceil_divide(tokens, token_blocks); /* nearly equal ones, so that threads get equal work */
    if (outs * columns * tokens < 300000 || threads < 1) threads = 1;
    if (threads > row_blocks * token_blocks) threads = (int)(row_blocks * token_blocks);

    Arena shared = {NULL, 0}, own = {NULL, 0};
    Scratch scratch = {0};
    take_activations(p, &shared, act_bits);
    take_scratch(p, &own, &scratch);
    int64_t buffer_bytes = p->x_type == FP32 ? 0 : (columns * 4 + 127) & ~(int64_t)63;
    uint8_t *memory = malloc(shared.used + (own.used + (size_t)buffer_bytes) * (size_t)threads + 64);
    if (!memory) {
        free(p->segments);
        return 1;
    }
    shared = (Arena){aligned(memory), 0};
    take_activations(p, &shared, act_bits);
    uint8_t *per_thread = shared.base + shared.used, *buffers = per_thread + own.used * (size_t)threads;

    const int preparing = tokens > 1 && tokens * columns > 65536 ? threads : 1;
PARALLEL(omp parallel for num_threads(preparing) schedule(static) if (preparing > 1))
    for (int thread = 0; thread < preparing; thread++)
        for (int64_t token = tokens * thread / preparing; token < tokens * (thread + 1) / preparing; token++)
            prepare_token(p, token, (float *)(buffers + buffer_bytes * thread), isa);

PARALLEL(omp parallel for num_threads(threads) schedule(static) if (threads > 1))
    for (int thread = 0; thread < threads; thread++) {
        Arena arena = {per_thread + own.used * (size_t)thread, 0};
        Scratch s = {0};
        take_scratch(p, &arena, &s);
        int64_t tasks = row_blocks * token_blocks, begin = tasks * thread / threads, end = tasks * (thread + 1) / threads;
#ifdef HAVE_X86
        if (p->tiled) {
            for (int64_t task = begin; task < end; task++) {
                int64_t first = task / row_blocks * block, row = task % row_blocks * width;
                int64_t last = first + block < tokens ? first + block : tokens;
                (isa == ISA_AVX2 ? block_avx2 : block_avx512)(p, row, first, last, &s);
            }
        } else if (isa == ISA_AVX512VNNI) {
            (act_bits ? rows_avx512 : float_rows_avx512)(p, begin, end, &s);
        } else if (isa == ISA_AVX2) {
            (act_bits ? rows_avx2 : float_rows_avx2)(p, begin, end, &s);
        } else
#endif
            rows_portable(p, begin, end, &s);
    }
    free(memory);
    free(p->segments);
    return 0;
}

#ifdef HAVE_X86
AVX2 static int64_t look_up_avx2(const uint8_t *w, int64_t count, int shift, const float *table, int type, void *out,
                                 int64_t index) {
    const __m256 values = _mm256_broadcast_ps((const __m128 *)table);
    const __m128i by = _mm_cvtsi32_si128(shift);
    int64_t k = 0;
    for (; k + 8 <= count; k += 8) {
        __m256i code = _mm256_srl_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(w + k))), by);
        store8(type, out, index + k, _mm256_permutevar_ps(values, code));
    }
    return k;
}
#endif

/* Rows `first` to `last` of the dense matrix, (last - first, columns) of dtype `types & 3`. */
EXPORT void slim_dequantize(const uint8_t *weight, const void *scale, const void *offset, void *out, int64_t first,
                            int64_t last, int64_t outs, int64_t columns, int64_t groups, int64_t group_size, int types,
                            int threads) {
    const int isa = isa_in_use;
    Problem problem = {.scale = scale, .offset = offset, .outs = outs, .columns = columns, .groups = groups ? groups : 1};
    const Problem *p = &problem;
    problem.per_tensor = groups == 0, problem.scale_type = types >> 2 & 3, problem.offset_type = types >> 4 & 3;
    (void)threads;
    const int64_t rows = ceil_divide(outs, 4), size = problem.groups > 1 ? group_size : columns;
    const int type = types & 3;
PARALLEL(omp parallel for num_threads(threads) schedule(static) if (threads > 1 && (last - first) * columns > 100000))
    for (int64_t row = first; row < last; row++) {
        const uint8_t *w = weight + row % rows * columns;
        const int shift = (int)(row / rows) * 2;
        for (int64_t group = 0; group * size < columns; group++) {
            const float s = scale_at(p, row, group), o = offset_at(p, row, group);
            const float table[4] = {o - s, o, o + s, o + (s + s)};
            int64_t k = group * size, stop = k + size < columns ? k + size : columns, index = (row - first) * columns;
#ifdef HAVE_X86
            if (isa >= ISA_AVX2) k += look_up_avx2(w + k, stop - k, shift, table, type, out, index + k);
#endif
            for (; k < stop; k++) store_float(type, out, index + k, table[w[k] >> shift & 3]);
        }
    }
    (void)isa;
}
