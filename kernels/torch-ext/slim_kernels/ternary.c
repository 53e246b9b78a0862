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

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 8 : __GNUC__ >= 9)
#define HAVE_X86 1
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")))
#endif

#ifdef _OPENMP
#define PARALLEL(pragma) _Pragma(#pragma)
#else
#define PARALLEL(pragma)
#endif
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif

enum { FP32, BF16, FP16 };
enum { PORTABLE, ISA_AVX2, ISA_AVX512VNNI };
enum { MAX_ROWS = 16, TOKEN_BLOCK = 96, TILE_SEGMENT = 512, LANE_SEGMENT = 32768 };

typedef struct {
    int64_t start, length, padded, position, group; /* position: padded columns before this segment */
} Segment;

typedef struct {
    const void *x, *scale, *offset, *bias;
    const uint8_t *weight;
    void *y;
    int64_t tokens, outs, columns, rows, groups, group_size;
    int x_type, scale_type, offset_type, bias_type, per_tensor, tiled;
    Segment *segments;
    int64_t segment_count, padded;
    int8_t *codes;     /* int8 activations: tiled [segment][token][padded], otherwise [token][padded columns] */
    float *values;     /* the same for weight-only, in fp32 */
    float *step;       /* what a code of 1 is worth, per token and segment (see at()) */
    float *sum;        /* sum of the activations of the segment, in real units */
    int32_t *code_sum; /* sum of the codes of the segment */
} Problem;

typedef struct {
    uint8_t *row_copy[MAX_ROWS], *tile;
    float *scale, *offset, *bias, *accumulator;
} Scratch;

static inline float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float half_to_float(uint16_t half) {
    uint32_t word = (uint32_t)half << 16, twice = word + word;
    float normal = bits_to_float((twice >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
    float subnormal = bits_to_float((twice >> 17) | (126u << 23)) - 0.5f;
    return bits_to_float((word & 0x80000000u) | float_to_bits(twice < (1u << 27) ? subnormal : normal));
}

static inline uint16_t float_to_half(float value) {
    float base = (fabsf(value) * 0x1.0p+112f) * 0x1.0p-110f;
    uint32_t word = float_to_bits(value), twice = word + word, exponent = twice & 0xFF000000u;
    if (exponent < 0x71000000u) exponent = 0x71000000u;
    uint32_t bits = float_to_bits(bits_to_float((exponent >> 1) + 0x07800000u) + base);
    uint32_t magnitude = twice > 0xFF000000u ? 0x7E00u : ((bits >> 13) & 0x7C00u) + (bits & 0x0FFFu);
    return (uint16_t)((word & 0x80000000u) >> 16 | magnitude);
}

static inline uint16_t float_to_bfloat(float value) {
    uint32_t bits = float_to_bits(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0;
    return (uint16_t)((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

static inline float load_float(int type, const void *base, int64_t index) {
    if (type == FP32) return ((const float *)base)[index];
    uint16_t half = ((const uint16_t *)base)[index];
    return type == BF16 ? bits_to_float((uint32_t)half << 16) : half_to_float(half);
}

static inline void store_float(int type, void *base, int64_t index, float value) {
    if (type == FP32)
        ((float *)base)[index] = value;
    else
        ((uint16_t *)base)[index] = type == BF16 ? float_to_bfloat(value) : float_to_half(value);
}

static inline int64_t at(const Problem *p, int64_t token, int64_t segment) {
    return p->tiled ? segment * p->tokens + token : token * p->segment_count + segment;
}

static inline int64_t first_code(const Problem *p, int64_t token, const Segment *s) {
    return p->tiled ? s->position * p->tokens + token * s->padded : token * p->padded + s->position;
}

static inline float scale_at(const Problem *p, int64_t row, int64_t group) {
    return load_float(p->scale_type, p->scale, p->per_tensor ? 0 : row * p->groups + group);
}

static inline float offset_at(const Problem *p, int64_t row, int64_t group) {
    return p->offset ? load_float(p->offset_type, p->offset, row * p->groups + group) : 0.0f;
}

static inline float bias_at(const Problem *p, int64_t row) {
    return p->bias ? load_float(p->bias_type, p->bias, row) : 0.0f;
}

/* A pointer to packed row `row` from which 63 bytes past its end may be read. */
static const uint8_t *readable_row(const Problem *p, int64_t row, uint8_t *copy) {
    const uint8_t *source = p->weight + row * p->columns;
    if ((p->rows - row - 1) * p->columns >= 63) return source;
    memcpy(copy, source, (size_t)p->columns);
    memset(copy + p->columns, 0, 64);
    return copy;
}

/* ---- activations ---- */

/* The reciprocal first, as PyTorch computes 127 / x. A NaN or an infinity among the activations must reach the output, as it does in a dense layer: its step is NaN. */
static inline float quantization_scale(uint32_t largest_bits, float *step) {
    float largest = bits_to_float(largest_bits), s = 1.0f / (largest < 1e-5f ? 1e-5f : largest) * 127.0f;
    *step = largest_bits >= 0x7F800000u ? NAN : 1.0f / s;
    return s;
}

static void quantize_group_portable(const float *x, int64_t start, int64_t stop, const Problem *p, int64_t token,
                                    int64_t first, int64_t last) {
    uint32_t largest = 0;
    for (int64_t k = start; k < stop; k++) {
        uint32_t magnitude = float_to_bits(x[k]) & 0x7FFFFFFFu;
        largest = magnitude > largest ? magnitude : largest;
    }
    float step, s = quantization_scale(largest, &step);
    int finite = largest < 0x7F800000u;
    for (int64_t i = first; i < last; i++) {
        const Segment *segment = p->segments + i;
        int8_t *out = p->codes + first_code(p, token, segment);
        int32_t total = 0;
        for (int64_t k = 0; k < segment->length; k++) {
            int32_t code = finite ? (int32_t)rintf(x[segment->start + k] * s) : 0;
            code = code > 127 ? 127 : code < -128 ? -128 : code;
            out[k] = (int8_t)code;
            total += code;
        }
        memset(out + segment->length, 0, (size_t)(segment->padded - segment->length));
        p->step[at(p, token, i)] = step;
        p->code_sum[at(p, token, i)] = total;
        p->sum[at(p, token, i)] = step * (float)total;
    }
}

static void row_to_float_portable(int type, const void *x, int64_t start, int64_t count, float *out) {
    for (int64_t k = 0; k < count; k++) out[k] = load_float(type, x, start + k);
}

#ifdef HAVE_X86
AVX2 static inline __m256 load8(int type, const void *base, int64_t index) {
    if (type == FP32) return _mm256_loadu_ps((const float *)base + index);
    __m128i half = _mm_loadu_si128((const __m128i *)((const uint16_t *)base + index));
    if (type == FP16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

AVX2 static inline __m128i bfloat8(__m256 value) {
    __m256i bits = _mm256_castps_si256(value), one = _mm256_set1_epi32(1);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC00000), nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}

AVX2 static inline void store8(int type, void *base, int64_t index, __m256 value) {
    if (type == FP32)
        _mm256_storeu_ps((float *)base + index, value);
    else
        _mm_storeu_si128((__m128i *)((uint16_t *)base + index),
                         type == BF16 ? bfloat8(value) : _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}

AVX2 static inline float hsum8(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

AVX2 static inline __m128 hsum8x4(__m256 a, __m256 b, __m256 c, __m256 d) {
    __m256 v = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
}

AVX2 static void row_to_float_avx2(int type, const void *x, int64_t start, int64_t count, float *out) {
    int64_t k = 0;
    for (; k + 8 <= count; k += 8) _mm256_storeu_ps(out + k, load8(type, x, start + k));
    row_to_float_portable(type, x, start + k, count - k, out + k);
}

AVX2 static void quantize_group_avx2(const float *x, int64_t start, int64_t stop, const Problem *p, int64_t token,
                                     int64_t first, int64_t last) {
    const __m256i magnitude_bits = _mm256_set1_epi32(0x7FFFFFFF);
    __m256i top = _mm256_setzero_si256();
    int64_t k = start;
    for (; k + 8 <= stop; k += 8)
        top = _mm256_max_epu32(
            top, _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(x + k)), magnitude_bits));
    uint32_t lanes[8], largest = 0;
    _mm256_storeu_si256((__m256i *)lanes, top);
    for (int i = 0; i < 8; i++) largest = lanes[i] > largest ? lanes[i] : largest;
    for (; k < stop; k++) {
        uint32_t magnitude = float_to_bits(x[k]) & 0x7FFFFFFFu;
        largest = magnitude > largest ? magnitude : largest;
    }
    float step, s = quantization_scale(largest, &step);
    int finite = largest < 0x7F800000u;
    const __m256 factor = _mm256_set1_ps(s);
    for (int64_t i = first; i < last; i++) {
        const Segment *segment = p->segments + i;
        const float *in = x + segment->start;
        int8_t *out = p->codes + first_code(p, token, segment);
        __m256i totals = _mm256_setzero_si256();
        int64_t j = 0;
        for (; j + 8 <= segment->length; j += 8) {
            __m256i code = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(in + j), factor));
            __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
            _mm_storel_epi64((__m128i *)(out + j), _mm_packs_epi16(words, words));
            totals = _mm256_add_epi32(totals, code);
        }
        int32_t parts[8], total = 0;
        _mm256_storeu_si256((__m256i *)parts, totals);
        if (finite)
            for (int l = 0; l < 8; l++) total += parts[l];
        for (; j < segment->length; j++) {
            int32_t code = finite ? (int32_t)rintf(in[j] * s) : 0;
            code = code > 127 ? 127 : code < -128 ? -128 : code;
            out[j] = (int8_t)code;
            total += code;
        }
        memset(out + segment->length, 0, (size_t)(segment->padded - segment->length));
        p->step[at(p, token, i)] = step;
        p->code_sum[at(p, token, i)] = total;
        p->sum[at(p, token, i)] = step * (float)total;
    }
}
#endif

static void prepare_token(const Problem *p, int64_t token, float *buffer, int isa) {
    const float *x = buffer;
    if (p->x_type == FP32)
        x = (const float *)p->x + token * p->columns;
#ifdef HAVE_X86
    else if (isa >= ISA_AVX2)
        row_to_float_avx2(p->x_type, p->x, token * p->columns, p->columns, buffer);
#endif
    else
        row_to_float_portable(p->x_type, p->x, token * p->columns, p->columns, buffer);
    int64_t first = 0;
    while (first < p->segment_count) {
        const Segment *segment = p->segments + first;
        int64_t last = first + 1;
        if (p->values) {
            float *out = p->values + first_code(p, token, segment), total = 0.0f;
            memcpy(out, x + segment->start, (size_t)segment->length * sizeof(float));
            memset(out + segment->length, 0, (size_t)(segment->padded - segment->length) * sizeof(float));
            for (int64_t k = 0; p->offset && k < segment->length; k++) total += out[k];
            p->step[at(p, token, first)] = 1.0f;
            p->sum[at(p, token, first)] = total;
        } else {
            while (last < p->segment_count && p->segments[last].group == segment->group) last++;
            int64_t stop = p->segments[last - 1].start + p->segments[last - 1].length;
#ifdef HAVE_X86
            if (isa >= ISA_AVX2)
                quantize_group_avx2(x, segment->start, stop, p, token, first, last);
            else
#endif
                quantize_group_portable(x, segment->start, stop, p, token, first, last);
        }
        first = last;
    }
    (void)isa;
}

/* ---- lanes along columns: a few tokens ---- */

static void store_planes(const Problem *p, int64_t row, int64_t token, const float *sums) {
    for (int plane = 0; plane < 4; plane++) {
        int64_t out = row + plane * p->rows;
        if (out < p->outs) store_float(p->x_type, p->y, token * p->outs + out, sums[plane] + bias_at(p, out));
    }
}

/* coefficients[plane][segment] = what an accumulator unit is worth; corrections[plane] = what the accumulators miss. */
static void coefficients_portable(const Problem *p, int64_t row, int64_t token, int64_t from, const float *factor,
                                  float *coefficients, float *corrections) {
    for (int plane = 0; plane < 4; plane++) {
        int64_t out = row + plane * p->rows;
        if (from == 0) corrections[plane] = 0.0f;
        for (int64_t i = from; i < p->segment_count; i++) {
            int64_t group = p->segments[i].group, index = at(p, token, i);
            float scale = out < p->outs ? scale_at(p, out, group) : 0.0f;
            float offset = out < p->outs ? offset_at(p, out, group) : 0.0f;
            coefficients[plane * p->segment_count + i] = scale * p->step[index] * factor[plane];
            corrections[plane] += (p->values ? offset : offset - scale) * p->sum[index];
        }
    }
}

static void rows_portable(const Problem *p, int64_t begin, int64_t end, const Scratch *scratch) {
    static const float factor[4] = {1, 1, 1, 1};
    for (int64_t row = begin; row < end; row++) {
        const uint8_t *weight = p->weight + row * p->columns;
        for (int64_t token = 0; token < p->tokens; token++) {
            float sums[4];
            coefficients_portable(p, row, token, 0, factor, scratch->scale, sums);
            for (int64_t i = 0; i < p->segment_count; i++) {
                const Segment *segment = p->segments + i;
                const uint8_t *w = weight + segment->start;
                const float *c = scratch->scale + i;
                int64_t first = first_code(p, token, segment), stride = p->segment_count;
                if (p->values) {
                    const float *x = p->values + first;
                    float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
                    for (int64_t k = 0; k < segment->length; k++) {
                        s0 += (float)((w[k] & 3) - 1) * x[k];
                        s1 += (float)((w[k] >> 2 & 3) - 1) * x[k];
                        s2 += (float)((w[k] >> 4 & 3) - 1) * x[k];
                        s3 += (float)((w[k] >> 6) - 1) * x[k];
                    }
                    sums[0] += c[0] * s0, sums[1] += c[stride] * s1;
                    sums[2] += c[2 * stride] * s2, sums[3] += c[3 * stride] * s3;
                } else {
                    const int8_t *x = p->codes + first;
                    int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
                    for (int64_t k = 0; k < segment->length; k++) {
                        s0 += (w[k] & 3) * x[k];
                        s1 += (w[k] >> 2 & 3) * x[k];
                        s2 += (w[k] >> 4 & 3) * x[k];
                        s3 += (w[k] >> 6) * x[k];
                    }
                    sums[0] += c[0] * (float)s0, sums[1] += c[stride] * (float)s1;
                    sums[2] += c[2 * stride] * (float)s2, sums[3] += c[3 * stride] * (float)s3;
                }
            }
            store_planes(p, row, token, sums);
        }
    }
}

#ifdef HAVE_X86
/* Bytes between a load of the weight and the prefetch for a later one, into L2: into L1 it pushes long activations out. */
enum { PREFETCH = 4096 };

/* Where the scales and offsets of one packed row lie, to be prefetched little by little during the row before it: all
   at once they would hold up the weights. */
typedef struct {
    const char *scale[4], *offset[4];
    int64_t scale_bytes, offset_bytes;
} NextScales;

static inline NextScales next_scales(const Problem *p, int64_t row) {
    NextScales next = {.scale_bytes = p->scale_type == FP32 ? 4 : 2, .offset_bytes = p->offset_type == FP32 ? 4 : 2};
    for (int plane = 0; plane < 4; plane++) {
        int64_t out = row + plane * p->rows, index = (out < p->outs ? out : p->outs - 1) * p->groups;
        next.scale[plane] = (const char *)p->scale + index * next.scale_bytes;
        next.offset[plane] = p->offset ? (const char *)p->offset + index * next.offset_bytes : next.scale[plane];
    }
    return next;
}

AVX2 static void coefficients_avx2(const Problem *p, int64_t row, int64_t token, const float *factor,
                                   float *coefficients, float *corrections) {
    int64_t count = p->segment_count, done = 0;
    for (int plane = 0; plane < 4; plane++) corrections[plane] = 0.0f;
    if (!p->per_tensor && count == p->groups && count >= 8) {
        done = count & ~(int64_t)7;
        const float *step = p->step + at(p, token, 0), *sum = p->sum + at(p, token, 0);
        for (int plane = 0; plane < 4; plane++) {
            int64_t out = row + plane * p->rows;
            if (out >= p->outs) {
                memset(coefficients + plane * count, 0, (size_t)count * sizeof(float));
                continue;
            }
            const __m256 plane_factor = _mm256_set1_ps(factor[plane]);
            __m256 missing = _mm256_setzero_ps();
            for (int64_t i = 0; i < done; i += 8) {
                __m256 scale = load8(p->scale_type, p->scale, out * count + i), total = _mm256_loadu_ps(sum + i);
                __m256 worth = _mm256_mul_ps(_mm256_mul_ps(scale, _mm256_loadu_ps(step + i)), plane_factor);
                _mm256_storeu_ps(coefficients + plane * count + i, worth);
                if (!p->values) missing = _mm256_fnmadd_ps(scale, total, missing);
                if (p->offset) missing = _mm256_fmadd_ps(load8(p->offset_type, p->offset, out * count + i), total, missing);
            }
            corrections[plane] = hsum8(missing);
        }
    }
    if (done < count) {
        float rest[4] = {0, 0, 0, 0};
        coefficients_portable(p, row, token, done, factor, coefficients, done ? rest : corrections);
        for (int plane = 0; plane < 4; plane++) corrections[plane] += rest[plane];
    }
}

/* int16 sums of at most 8 steps: |sum| <= 8 * 2 * (8 * 128) = 16384, since the largest code in place is 2 * 4. */
AVX2 static void rows_avx2(const Problem *p, int64_t begin, int64_t end, const Scratch *scratch) {
    static const float factor[4] = {1, 0.25f, 1, 0.25f};
    const __m256i low = _mm256_set1_epi8(3), high = _mm256_set1_epi8(12), ones = _mm256_set1_epi16(1);
    const int64_t count = p->segment_count;
    for (int64_t row = begin; row < end; row++) {
        const uint8_t *weight = readable_row(p, row, scratch->row_copy[0]);
        const NextScales next = next_scales(p, row + 1);
        for (int64_t token = 0; token < p->tokens; token++) {
            float sums[4];
            coefficients_avx2(p, row, token, factor, scratch->scale, sums);
            __m256 f0 = _mm256_setzero_ps(), f1 = f0, f2 = f0, f3 = f0;
            for (int64_t i = 0; i < count; i++) {
                const Segment *segment = p->segments + i;
                const float *c = scratch->scale + i;
                const uint8_t *w = weight + segment->start, *stop = w + segment->padded;
                const int8_t *x = p->codes + first_code(p, token, segment);
                const __m256 c0 = _mm256_set1_ps(c[0]), c1 = _mm256_set1_ps(c[count]);
                const __m256 c2 = _mm256_set1_ps(c[2 * count]), c3 = _mm256_set1_ps(c[3 * count]);
                if (i % 4 == 0) {
                    _mm_prefetch(next.scale[i / 4 % 4] + i / 16 * 16 * next.scale_bytes, _MM_HINT_T0);
                    _mm_prefetch(next.offset[i / 4 % 4] + i / 16 * 16 * next.offset_bytes, _MM_HINT_T0);
                }
                while (w < stop) {
                    const uint8_t *pause = stop - w > 256 ? w + 256 : stop;
                    __m256i a0 = _mm256_setzero_si256(), a1 = a0, a2 = a0, a3 = a0;
                    for (; w < pause; w += 64, x += 64) {
                        _mm_prefetch((const char *)w + PREFETCH, _MM_HINT_T1);
                        __m256i v = _mm256_loadu_si256((const __m256i *)w), q = _mm256_loadu_si256((const __m256i *)x);
                        __m256i u = _mm256_srli_epi16(v, 4);
                        a0 = _mm256_add_epi16(a0, _mm256_maddubs_epi16(_mm256_and_si256(v, low), q));
                        a1 = _mm256_add_epi16(a1, _mm256_maddubs_epi16(_mm256_and_si256(v, high), q));
                        a2 = _mm256_add_epi16(a2, _mm256_maddubs_epi16(_mm256_and_si256(u, low), q));
                        a3 = _mm256_add_epi16(a3, _mm256_maddubs_epi16(_mm256_and_si256(u, high), q));
                        v = _mm256_loadu_si256((const __m256i *)(w + 32));
                        q = _mm256_loadu_si256((const __m256i *)(x + 32));
                        u = _mm256_srli_epi16(v, 4);
                        a0 = _mm256_add_epi16(a0, _mm256_maddubs_epi16(_mm256_and_si256(v, low), q));
                        a1 = _mm256_add_epi16(a1, _mm256_maddubs_epi16(_mm256_and_si256(v, high), q));
                        a2 = _mm256_add_epi16(a2, _mm256_maddubs_epi16(_mm256_and_si256(u, low), q));
                        a3 = _mm256_add_epi16(a3, _mm256_maddubs_epi16(_mm256_and_si256(u, high), q));
                    }
                    f0 = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_madd_epi16(a0, ones)), c0, f0);
                    f1 = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_madd_epi16(a1, ones)), c1, f1);
                    f2 = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_madd_epi16(a2, ones)), c2, f2);
                    f3 = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_madd_epi16(a3, ones)), c3, f3);
                }
            }
            _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), hsum8x4(f0, f1, f2, f3)));
            store_planes(p, row, token, sums);
        }
    }
}

AVX512 static inline __m256 fold(__m512 v) {
    return _mm256_add_ps(_mm512_castps512_ps256(v),
                         _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
}

AVX512 static inline __m512 load16(int type, const void *base, int64_t index, __mmask16 lanes) {
    if (type == FP32) return _mm512_maskz_loadu_ps(lanes, (const float *)base + index);
    __m256i half = _mm256_maskz_loadu_epi16(lanes, (const uint16_t *)base + index);
    if (type == FP16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* coefficients_portable for segments that are groups. */
AVX512 static void coefficients_avx512(const Problem *p, int64_t row, int64_t token, const float *factor,
                                       float *coefficients, float *corrections) {
    const int64_t count = p->segment_count;
    if (p->per_tensor || count != p->groups || count < 4) {
        coefficients_portable(p, row, token, 0, factor, coefficients, corrections);
        return;
    }
    const float *step = p->step + at(p, token, 0), *sum = p->sum + at(p, token, 0);
    __m256 missing[4];
    for (int plane = 0; plane < 4; plane++) {
        const int64_t row_out = row + plane * p->rows, out = row_out < p->outs ? row_out : p->outs - 1;
        const __m512 by = _mm512_set1_ps(factor[plane]);
        __m512 miss = _mm512_setzero_ps();
        for (int64_t i = 0; i < count; i += 16) {
            const __mmask16 lanes = (__mmask16)(count - i < 16 ? (1u << (count - i)) - 1 : 0xFFFFu);
            const int64_t index = out * count + i;
            const __m512 total = _mm512_maskz_loadu_ps(lanes, sum + i), scale = load16(p->scale_type, p->scale, index, lanes);
            const __m512 worth = _mm512_mul_ps(scale, _mm512_mul_ps(by, _mm512_maskz_loadu_ps(lanes, step + i)));
            _mm512_mask_storeu_ps(coefficients + plane * count + i, lanes, worth);
            if (!p->values) miss = _mm512_fnmadd_ps(scale, total, miss);
            if (p->offset) miss = _mm512_fmadd_ps(load16(p->offset_type, p->offset, index, lanes), total, miss);
        }
        missing[plane] = fold(miss);
    }
    _mm_storeu_ps(corrections, hsum8x4(missing[0], missing[1], missing[2], missing[3]));
}

AVX512 static void rows_avx512(const Problem *p, int64_t begin, int64_t end, const Scratch *scratch) {
    static const float factor[4] = {1, 0.25f, 0.0625f, 0.015625f};
    const __m512i m0 = _mm512_set1_epi8(3), m1 = _mm512_set1_epi8(12);
    const __m512i m2 = _mm512_set1_epi8(48), m3 = _mm512_set1_epi8((char)192);
    const int64_t count = p->segment_count, groups_of_128 = p->group_size == 128 ? p->columns / 128 : 0;
    for (int64_t row = begin; row < end; row++) {
        const uint8_t *weight = readable_row(p, row, scratch->row_copy[0]);
        const NextScales next = next_scales(p, row + 1);
        for (int64_t token = 0; token < p->tokens; token++) {
            float sums[4];
            coefficients_avx512(p, row, token, factor, scratch->scale, sums);
            __m512 f0 = _mm512_setzero_ps(), f1 = f0, f2 = f0, f3 = f0;
            const int8_t *codes = p->codes + token * p->padded;
            const float *c0 = scratch->scale, *c1 = c0 + count, *c2 = c1 + count, *c3 = c2 + count;
            for (int64_t i = 0; i < groups_of_128; i++) {
                const uint8_t *w = weight + 128 * i;
                const __m512i v = _mm512_loadu_si512(w), q = _mm512_loadu_si512(codes + 128 * i);
                const __m512i u = _mm512_loadu_si512(w + 64), r = _mm512_loadu_si512(codes + 128 * i + 64);
                const __m512i zero = _mm512_setzero_si512();
                if (i % 4 == 0) {
                    _mm_prefetch(next.scale[i / 4 % 4] + i / 16 * 16 * next.scale_bytes, _MM_HINT_T0);
                    _mm_prefetch(next.offset[i / 4 % 4] + i / 16 * 16 * next.offset_bytes, _MM_HINT_T0);
                }
                _mm_prefetch((const char *)w + PREFETCH, _MM_HINT_T1);
                _mm_prefetch((const char *)w + PREFETCH + 64, _MM_HINT_T1);
                __m512i a0 = _mm512_dpbusd_epi32(zero, _mm512_and_si512(v, m0), q);
                __m512i a1 = _mm512_dpbusd_epi32(zero, _mm512_and_si512(v, m1), q);
                __m512i a2 = _mm512_dpbusd_epi32(zero, _mm512_and_si512(v, m2), q);
                __m512i a3 = _mm512_dpbusd_epi32(zero, _mm512_and_si512(v, m3), q);
                a0 = _mm512_dpbusd_epi32(a0, _mm512_and_si512(u, m0), r);
                a1 = _mm512_dpbusd_epi32(a1, _mm512_and_si512(u, m1), r);
                a2 = _mm512_dpbusd_epi32(a2, _mm512_and_si512(u, m2), r);
                a3 = _mm512_dpbusd_epi32(a3, _mm512_and_si512(u, m3), r);
                f0 = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a0), _mm512_set1_ps(c0[i]), f0);
                f1 = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a1), _mm512_set1_ps(c1[i]), f1);
                f2 = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a2), _mm512_set1_ps(c2[i]), f2);
                f3 = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a3), _mm512_set1_ps(c3[i]), f3);
            }
            for (int64_t i = groups_of_128; i < count; i++) {
                const Segment *segment = p->segments + i;
                const float *c = scratch->scale + i;
                const uint8_t *w = weight + segment->start, *stop = w + segment->padded;
                const int8_t *x = codes + segment->position;
                __m512i a0 = _mm512_setzero_si512(), a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0, b3 = a0;
                for (; w + 64 < stop; w += 128, x += 128) {
                    __m512i v = _mm512_loadu_si512(w), q = _mm512_loadu_si512(x);
                    __m512i u = _mm512_loadu_si512(w + 64), r = _mm512_loadu_si512(x + 64);
                    _mm_prefetch((const char *)w + PREFETCH, _MM_HINT_T1);
                    _mm_prefetch((const char *)w + PREFETCH + 64, _MM_HINT_T1);
                    a0 = _mm512_dpbusd_epi32(a0, _mm512_and_si512(v, m0), q);
                    a1 = _mm512_dpbusd_epi32(a1, _mm512_and_si512(v, m1), q);
                    a2 = _mm512_dpbusd_epi32(a2, _mm512_and_si512(v, m2), q);
                    a3 = _mm512_dpbusd_epi32(a3, _mm512_and_si512(v, m3), q);
                    b0 = _mm512_dpbusd_epi32(b0, _mm512_and_si512(u, m0), r);
                    b1 = _mm512_dpbusd_epi32(b1, _mm512_and_si512(u, m1), r);
                    b2 = _mm512_dpbusd_epi32(b2, _mm512_and_si512(u, m2), r);
                    b3 = _mm512_dpbusd_epi32(b3, _mm512_and_si512(u, m3), r);
                }
                if (w < stop) {
                    __m512i v = _mm512_loadu_si512(w), q = _mm512_loadu_si512(x);
                    _mm_prefetch((const char *)w + PREFETCH, _MM_HINT_T1);
                    a0 = _mm512_dpbusd_epi32(a0, _mm512_and_si512(v, m0), q);
                    a1 = _mm512_dpbusd_epi32(a1, _mm512_and_si512(v, m1), q);
                    a2 = _mm512_dpbusd_epi32(a2, _mm512_and_si512(v, m2), q);
                    a3 = _mm512_dpbusd_epi32(a3, _mm512_and_si512(v, m3), q);
                }
                f0 = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(a0, b0)), _mm512_set1_ps(c[0]), f0);
                f1 = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(a1, b1)), _mm512_set1_ps(c[count]), f1);
                f2 = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(a2, b2)), _mm512_set1_ps(c[2 * count]), f2);
                f3 = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(a3, b3)), _mm512_set1_ps(c[3 * count]), f3);
            }
            _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), hsum8x4(fold(f0), fold(f1), fold(f2), fold(f3))));
            store_planes(p, row, token, sums);
        }
    }
}

/* Weight-only: codes select -1, 0, 1 from a four-entry table inside each 128-bit lane. */
AVX2 static void float_rows_avx2(const Problem *p, int64_t begin, int64_t end, const Scratch *scratch) {
    static const float factor[4] = {1, 1, 1, 1};
    const __m256 table = _mm256_setr_ps(-1, 0, 1, 0, -1, 0, 1, 0);
    const int64_t count = p->segment_count;
    for (int64_t row = begin; row < end; row++) {
        const uint8_t *weight = readable_row(p, row, scratch->row_copy[0]);
        for (int64_t token = 0; token < p->tokens; token++) {
            float sums[4];
            coefficients_avx2(p, row, token, factor, scratch->scale, sums);
            __m256 f0 = _mm256_setzero_ps(), f1 = f0, f2 = f0, f3 = f0;
            for (int64_t i = 0; i < count; i++) {
                const Segment *segment = p->segments + i;
                const float *c = scratch->scale + i, *x = p->values + first_code(p, token, segment);
                const uint8_t *w = weight + segment->start;
                __m256 a0 = _mm256_setzero_ps(), a1 = a0, a2 = a0, a3 = a0;
                for (int64_t k = 0; k < segment->padded; k += 8) {
                    _mm_prefetch((const char *)w + k + PREFETCH / 4, _MM_HINT_T0);
                    __m256i v = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(w + k)));
                    __m256 q = _mm256_loadu_ps(x + k);
                    a0 = _mm256_fmadd_ps(_mm256_permutevar_ps(table, v), q, a0);
                    a1 = _mm256_fmadd_ps(_mm256_permutevar_ps(table, _mm256_srli_epi32(v, 2)), q, a1);
                    a2 = _mm256_fmadd_ps(_mm256_permutevar_ps(table, _mm256_srli_epi32(v, 4)), q, a2);
                    a3 = _mm256_fmadd_ps(_mm256_permutevar_ps(table, _mm256_srli_epi32(v, 6)), q, a3);
                }
                f0 = _mm256_fmadd_ps(a0, _mm256_set1_ps(c[0]), f0);
                f1 = _mm256_fmadd_ps(a1, _mm256_set1_ps(c[count]), f1);
                f2 = _mm256_fmadd_ps(a2, _mm256_set1_ps(c[2 * count]), f2);
                f3 = _mm256_fmadd_ps(a3, _mm256_set1_ps(c[3 * count]), f3);
            }
            _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), hsum8x4(f0, f1, f2, f3)));
            store_planes(p, row, token, sums);
        }
    }
}

AVX512 static void float_rows_avx512(const Problem *p, int64_t begin, int64_t end, const Scratch *scratch) {
    static const float factor[4] = {1, 1, 1, 1};
    const __m512 table = _mm512_broadcast_f32x4(_mm_setr_ps(-1, 0, 1, 0));
    const int64_t count = p->segment_count;
    for (int64_t row = begin; row < end; row++) {
        const uint8_t *weight = readable_row(p, row, scratch->row_copy[0]);
        for (int64_t token = 0; token < p->tokens; token++) {
            float sums[4];
            coefficients_avx512(p, row, token, factor, scratch->scale, sums);
            __m512 f0 = _mm512_setzero_ps(), f1 = f0, f2 = f0, f3 = f0;
            for (int64_t i = 0; i < count; i++) {
                const Segment *segment = p->segments + i;
                const float *c = scratch->scale + i, *x = p->values + first_code(p, token, segment);
                const uint8_t *w = weight + segment->start;
                __m512 a0 = _mm512_setzero_ps(), a1 = a0, a2 = a0, a3 = a0;
                for (int64_t k = 0; k < segment->padded; k += 16) {
                    _mm_prefetch((const char *)w + k + PREFETCH / 2, _MM_HINT_T0);
                    __m512i v = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(w + k)));
                    __m512 q = _mm512_loadu_ps(x + k);
                    a0 = _mm512_fmadd_ps(_mm512_permutevar_ps(table, v), q, a0);
                    a1 = _mm512_fmadd_ps(_mm512_permutevar_ps(table, _mm512_srli_epi32(v, 2)), q, a1);
                    a2 = _mm512_fmadd_ps(_mm512_permutevar_ps(table, _mm512_srli_epi32(v, 4)), q, a2);
                    a3 = _mm512_fmadd_ps(_mm512_permutevar_ps(table, _mm512_srli_epi32(v, 6)), q, a3);
                }
                f0 = _mm512_fmadd_ps(a0, _mm512_set1_ps(c[0]), f0);
                f1 = _mm512_fmadd_ps(a1, _mm512_set1_ps(c[count]), f1);
                f2 = _mm512_fmadd_ps(a2, _mm512_set1_ps(c[2 * count]), f2);
                f3 = _mm512_fmadd_ps(a3, _mm512_set1_ps(c[3 * count]), f3);
            }
            _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), hsum8x4(fold(f0), fold(f1), fold(f2), fold(f3))));
            store_planes(p, row, token, sums);
        }
    }
}

/* ---- lanes along rows: more tokens ---- */

AVX2 static inline void transpose8(__m256i *a) {
    __m256i b[8];
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm256_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm256_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
    for (int j = 0; j < 4; j++) {
        b[j] = _mm256_permute2x128_si256(a[j], a[j + 4], 0x20);
        b[j + 4] = _mm256_permute2x128_si256(a[j], a[j + 4], 0x31);
    }
    for (int j = 0; j < 8; j++) a[j] = b[j];
}

/* table[group][plane][lane] of a (outs, groups) matrix for `width` packed rows from `row`. Lanes past the last output
   repeat it; their results are never stored. */
AVX2 static void load_table(const Problem *p, int type, const void *matrix, int64_t row, int64_t width,
                            const float *factor, float *table) {
    for (int64_t lanes = 0; lanes < 4 * width; lanes += 8) {
        const int plane = (int)(lanes / width);
        const __m256 by = _mm256_set1_ps(factor[plane]);
        int64_t index[8], group = 0;
        for (int64_t lane = 0; lane < 8; lane++) {
            int64_t packed = row + lanes % width + lane, out = packed + plane * p->rows;
            index[lane] = (packed < p->rows && out < p->outs ? out : p->outs - 1) * p->groups;
        }
        for (; group + 8 <= p->groups; group += 8) {
            __m256i a[8];
            for (int i = 0; i < 8; i++)
                a[i] = _mm256_castps_si256(_mm256_mul_ps(load8(type, matrix, index[i] + group), by));
            transpose8(a);
            for (int i = 0; i < 8; i++)
                _mm256_storeu_si256((__m256i *)(table + (group + i) * 4 * width + lanes), a[i]);
        }
        for (; group < p->groups; group++)
            for (int i = 0; i < 8; i++)
                table[group * 4 * width + lanes + i] = load_float(type, matrix, index[i] + group) * factor[plane];
    }
}

AVX2 static void load_tables(const Problem *p, int64_t row, int64_t width, const float *factor, Scratch *s) {
    static const float one[4] = {1, 1, 1, 1};
    for (int64_t lane = 0; p->bias && lane < 4 * width; lane++) {
        int64_t packed = row + lane % width, out = packed + lane / width * p->rows;
        s->bias[lane] = packed < p->rows && out < p->outs ? bias_at(p, out) : 0.0f;
    }
    for (int64_t lane = 0; p->per_tensor && lane < 4 * width; lane++)
        s->scale[lane] = scale_at(p, 0, 0) * factor[lane / width];
    if (!p->per_tensor) load_table(p, p->scale_type, p->scale, row, width, factor, s->scale);
    if (p->offset) load_table(p, p->offset_type, p->offset, row, width, one, s->offset);
}

static void row_pointers(const Problem *p, int64_t row, int64_t width, const Scratch *s, const uint8_t **pointers) {
    for (int64_t lane = 0; lane < width; lane++)
        pointers[lane] = readable_row(p, row + lane < p->rows ? row + lane : row, s->row_copy[lane]);
}

AVX2 static void store_block(const Problem *p, int64_t row, int64_t width, int64_t first, int64_t last,
                             const Scratch *s) {
    for (int plane = 0; plane < 4; plane++) {
        int64_t out = row + plane * p->rows, room = p->outs - out < p->rows - row ? p->outs - out : p->rows - row;
        for (int64_t token = first; token < last; token++) {
            const float *sums = s->accumulator + ((token - first) * 4 + plane) * width;
            int64_t lane = 0;
            for (; lane + 8 <= width && lane + 8 <= room; lane += 8)
                store8(p->x_type, p->y, token * p->outs + out + lane, _mm256_loadu_ps(sums + lane));
            for (; lane < width && lane < room; lane++)
                store_float(p->x_type, p->y, token * p->outs + out + lane, sums[lane]);
        }
    }
}

AVX2 static void unpack_tile_avx2(const uint8_t **rows, const Segment *segment, uint8_t *tile) {
    const __m256i low = _mm256_set1_epi8(3);
    for (int64_t k = 0; k < segment->padded; k += 32) {
        __m256i a[8];
        for (int i = 0; i < 8; i++) a[i] = _mm256_loadu_si256((const __m256i *)(rows[i] + segment->start + k));
        transpose8(a);
        for (int j = 0; j < 8; j++, tile += 128) {
            _mm256_store_si256((__m256i *)tile, _mm256_and_si256(a[j], low));
            _mm256_store_si256((__m256i *)(tile + 32), _mm256_and_si256(_mm256_srli_epi16(a[j], 2), low));
            _mm256_store_si256((__m256i *)(tile + 64), _mm256_and_si256(_mm256_srli_epi16(a[j], 4), low));
            _mm256_store_si256((__m256i *)(tile + 96), _mm256_and_si256(_mm256_srli_epi16(a[j], 6), low));
        }
    }
}

/* One token against two planes. In assembly, or GCC 12 spills most of the twelve accumulators. */
#define STEP_AVX2(t)                                                                                                   \
    __asm__("vpbroadcastd %[x], %[b]\n\tvpmaddubsw %[b], %[w0], %[m]\n\tvpaddw %[m], %[l], %[l]\n\t"                 \
            "vpmaddubsw %[b], %[w1], %[b]\n\tvpaddw %[b], %[h], %[h]"                                                  \
            : [l] "+x"(l##t), [h] "+x"(h##t), [b] "=&x"(broadcast), [m] "=&x"(product)                                 \
            : [x] "m"(*(const int32_t *)(x + (t) * stride)), [w0] "x"(w0), [w1] "x"(w1))

/* What a micro-kernel reads and writes for its tokens, besides the tile: sums[token][plane][lane] accumulate. */
typedef struct {
    const int8_t *x; /* token rows, `stride` apart */
    int64_t stride;
    const int32_t *code_sum;
    const float *step, *sum, *scale, *offset; /* offset may be NULL */
    float *sums;
} Strip;

AVX2 static inline void flush_avx2(const Strip *strip, int token, int half, __m256i acc) {
    float *out = strip->sums + token * 32 + half * 8;
    const __m256 worth = _mm256_mul_ps(_mm256_set1_ps(strip->step[token]), _mm256_loadu_ps(strip->scale + half * 8));
    __m256i codes = _mm256_madd_epi16(acc, _mm256_set1_epi16(1));
    codes = _mm256_sub_epi32(codes, _mm256_set1_epi32(strip->code_sum[token]));
    __m256 total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(codes), worth, _mm256_loadu_ps(out));
    if (strip->offset)
        total = _mm256_fmadd_ps(_mm256_set1_ps(strip->sum[token]), _mm256_loadu_ps(strip->offset + half * 8), total);
    _mm256_storeu_ps(out, total);
}

/* Up to six tokens against two planes of eight rows, at most 64 steps (256 columns): the int16 sums stay within
   64 * 2 * (2 * 127) = 32512. */
#define MICRO_AVX2(name, STEPS, FLUSHES)                                                                               \
    AVX2 static void name(const uint8_t *tile, const Strip *strip) {                                                   \
        __m256i l0 = _mm256_setzero_si256(), l1 = l0, l2 = l0, l3 = l0, l4 = l0, l5 = l0;                              \
        __m256i h0 = l0, h1 = l0, h2 = l0, h3 = l0, h4 = l0, h5 = l0, broadcast, product;                              \
        const int64_t stride = strip->stride;                                                                          \
        for (const int8_t *x = strip->x, *stop = x + stride; x < stop; x += 4, tile += 128) {                          \
            const __m256i w0 = _mm256_load_si256((const __m256i *)tile);                                               \
            const __m256i w1 = _mm256_load_si256((const __m256i *)tile + 1);                                           \
            STEPS                                                                                                      \
        }                                                                                                              \
        FLUSHES                                                                                                        \
        (void)l1, (void)l2, (void)l3, (void)l4, (void)l5, (void)h1, (void)h2, (void)h3, (void)h4, (void)h5;            \
    }
#define STEPS_1 STEP_AVX2(0);
#define STEPS_2 STEPS_1 STEP_AVX2(1);
#define STEPS_3 STEPS_2 STEP_AVX2(2);
#define STEPS_4 STEPS_3 STEP_AVX2(3);
#define STEPS_5 STEPS_4 STEP_AVX2(4);
#define STEPS_6 STEPS_5 STEP_AVX2(5);
#define FLUSH_AVX2(t) flush_avx2(strip, t, 0, l##t), flush_avx2(strip, t, 1, h##t);
#define FLUSHES_1 FLUSH_AVX2(0)
#define FLUSHES_2 FLUSHES_1 FLUSH_AVX2(1)
#define FLUSHES_3 FLUSHES_2 FLUSH_AVX2(2)
#define FLUSHES_4 FLUSHES_3 FLUSH_AVX2(3)
#define FLUSHES_5 FLUSHES_4 FLUSH_AVX2(4)
#define FLUSHES_6 FLUSHES_5 FLUSH_AVX2(5)
MICRO_AVX2(micro1_avx2, STEPS_1, FLUSHES_1)
MICRO_AVX2(micro2_avx2, STEPS_2, FLUSHES_2)
MICRO_AVX2(micro3_avx2, STEPS_3, FLUSHES_3)
MICRO_AVX2(micro4_avx2, STEPS_4, FLUSHES_4)
MICRO_AVX2(micro5_avx2, STEPS_5, FLUSHES_5)
MICRO_AVX2(micro6_avx2, STEPS_6, FLUSHES_6)

/* Tokens are cut into strips of nearly equal size: 7 is 4 + 3 rather than 6 + 1. */
static inline int64_t strip_size(int64_t tokens, int64_t most) {
    int64_t strips = (tokens + most - 1) / most;
    return (tokens + strips - 1) / strips;
}

static inline Strip strip_at(const Problem *p, const Segment *segment, int64_t width, int64_t first, int64_t token,
                             const Scratch *s) {
    int64_t index = at(p, token, segment - p->segments), table = segment->group * 4 * width;
    return (Strip){p->codes + first_code(p, token, segment), segment->padded, p->code_sum + index, p->step + index,
                   p->sum + index, s->scale + table, p->offset ? s->offset + table : NULL,
                   s->accumulator + (token - first) * 4 * width};
}

/* The accumulators start at the bias. */
AVX2 static void start_sums(const Problem *p, int64_t width, int64_t tokens, const Scratch *s) {
    if (!p->bias) memset(s->accumulator, 0, (size_t)(tokens * 4 * width) * sizeof(float));
    for (int64_t token = 0; p->bias && token < tokens; token++)
        memcpy(s->accumulator + token * 4 * width, s->bias, (size_t)(4 * width) * sizeof(float));
}

AVX2 static void block_avx2(const Problem *p, int64_t row, int64_t first, int64_t last, Scratch *s) {
    static const float factor[4] = {1, 1, 1, 1};
    static void (*const micro[])(const uint8_t *, const Strip *) = {
        NULL, micro1_avx2, micro2_avx2, micro3_avx2, micro4_avx2, micro5_avx2, micro6_avx2};
    const uint8_t *rows[MAX_ROWS];
    row_pointers(p, row, 8, s, rows);
    load_tables(p, row, 8, factor, s);
    start_sums(p, 8, last - first, s);
    for (int64_t i = 0; i < p->segment_count; i++) {
        const Segment *segment = p->segments + i;
        unpack_tile_avx2(rows, segment, s->tile);
        for (int64_t token = first, tokens; token < last; token += tokens) {
            tokens = strip_size(last - token, 6);
            Strip strip = strip_at(p, segment, 8, first, token, s);
            micro[tokens](s->tile, &strip);
            strip.scale += 16, strip.sums += 16, strip.offset += strip.offset ? 16 : 0;
            micro[tokens](s->tile + 64, &strip);
        }
    }
    store_block(p, row, 8, first, last, s);
}

AVX512 static void transpose_tile_avx512(const uint8_t **rows, const Segment *segment, uint8_t *tile) {
    for (int64_t k = 0; k < segment->padded; k += 64, tile += 1024) {
        __m512i a[16], b[16];
        for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(rows[i] + segment->start + k);
        for (int i = 0; i < 16; i += 2) {
            b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
            b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
        }
        for (int i = 0; i < 16; i += 4)
            for (int j = 0; j < 2; j++) {
                a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
                a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
            }
        for (int j = 0; j < 4; j++) {
            __m512i even0 = _mm512_shuffle_i32x4(a[j], a[j + 4], 0x88), odd0 = _mm512_shuffle_i32x4(a[j], a[j + 4], 0xDD);
            __m512i even1 = _mm512_shuffle_i32x4(a[j + 8], a[j + 12], 0x88);
            __m512i odd1 = _mm512_shuffle_i32x4(a[j + 8], a[j + 12], 0xDD);
            _mm512_store_si512(tile + 64 * j, _mm512_shuffle_i32x4(even0, even1, 0x88));
            _mm512_store_si512(tile + 64 * (j + 4), _mm512_shuffle_i32x4(odd0, odd1, 0x88));
            _mm512_store_si512(tile + 64 * (j + 8), _mm512_shuffle_i32x4(even0, even1, 0xDD));
            _mm512_store_si512(tile + 64 * (j + 12), _mm512_shuffle_i32x4(odd0, odd1, 0xDD));
        }
    }
}

AVX512 static inline void flush_avx512(const Strip *strip, int token, int plane, __m512i acc) {
    float *out = strip->sums + token * 64 + plane * 16;
    const __m512 worth = _mm512_mul_ps(_mm512_set1_ps(strip->step[token]), _mm512_loadu_ps(strip->scale + plane * 16));
    __m512 total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc), worth, _mm512_loadu_ps(out));
    if (strip->offset)
        total = _mm512_fmadd_ps(_mm512_set1_ps(strip->sum[token]), _mm512_loadu_ps(strip->offset + plane * 16), total);
    _mm512_storeu_ps(out, total);
}

/* `tokens` (a constant where this is inlined) against four planes of sixteen rows. In assembly, or GCC 12 keeps half of
   the accumulators in memory. */
AVX512 static inline __attribute__((always_inline)) void micro_avx512(const int tokens, const uint8_t *tile,
                                                                      const Strip *strip) {
    const __m512i masks[4] = {_mm512_set1_epi8(3), _mm512_set1_epi8(12), _mm512_set1_epi8(48),
                              _mm512_set1_epi8((char)192)};
    const int64_t stride = strip->stride;
    __m512i acc[6][4];
    UNROLL for (int t = 0; t < tokens; t++) {
        const int32_t start = -strip->code_sum[t];
        UNROLL for (int plane = 0; plane < 4; plane++) acc[t][plane] = _mm512_set1_epi32(start * (1 << 2 * plane));
    }
    for (const int8_t *x = strip->x, *stop = x + stride; x < stop; x += 4, tile += 64) {
        __m512i w0, w1, w2, w3, q;
        __asm__("vmovdqa64 %[tile], %[w3]\n\tvpandd %[m0], %[w3], %[w0]\n\tvpandd %[m1], %[w3], %[w1]\n\t"
                "vpandd %[m2], %[w3], %[w2]\n\tvpandd %[m3], %[w3], %[w3]"
                : [w0] "=&v"(w0), [w1] "=&v"(w1), [w2] "=&v"(w2), [w3] "=&v"(w3)
                : [tile] "m"(*(const __m512i *)tile), [m0] "m"(masks[0]), [m1] "m"(masks[1]), [m2] "m"(masks[2]),
                  [m3] "m"(masks[3]));
        UNROLL for (int t = 0; t < tokens; t++)
            __asm__("vpbroadcastd %[x], %[q]\n\tvpdpbusd %[q], %[w0], %[a]\n\tvpdpbusd %[q], %[w1], %[b]\n\t"
                    "vpdpbusd %[q], %[w2], %[c]\n\tvpdpbusd %[q], %[w3], %[d]"
                    : [a] "+v"(acc[t][0]), [b] "+v"(acc[t][1]), [c] "+v"(acc[t][2]), [d] "+v"(acc[t][3]), [q] "=&v"(q)
                    : [x] "m"(*(const int32_t *)(x + t * stride)), [w0] "v"(w0), [w1] "v"(w1), [w2] "v"(w2),
                      [w3] "v"(w3));
    }
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int plane = 0; plane < 4; plane++) flush_avx512(strip, t, plane, acc[t][plane]);
}

AVX512 static void micro1_avx512(const uint8_t *tile, const Strip *strip) { micro_avx512(1, tile, strip); }
AVX512 static void micro2_avx512(const uint8_t *tile, const Strip *strip) { micro_avx512(2, tile, strip); }
AVX512 static void micro3_avx512(const uint8_t *tile, const Strip *strip) { micro_avx512(3, tile, strip); }
AVX512 static void micro4_avx512(const uint8_t *tile, const Strip *strip) { micro_avx512(4, tile, strip); }
AVX512 static void micro5_avx512(const uint8_t *tile, const Strip *strip) { micro_avx512(5, tile, strip); }
AVX512 static void micro6_avx512(const uint8_t *tile, const Strip *strip) { micro_avx512(6, tile, strip); }

AVX512 static void block_avx512(const Problem *p, int64_t row, int64_t first, int64_t last, Scratch *s) {
    static const float factor[4] = {1, 0.25f, 0.0625f, 0.015625f};
    static void (*const micro[])(const uint8_t *, const Strip *) = {
        NULL, micro1_avx512, micro2_avx512, micro3_avx512, micro4_avx512, micro5_avx512, micro6_avx512};
    const uint8_t *rows[MAX_ROWS];
    row_pointers(p, row, 16, s, rows);
    load_tables(p, row, 16, factor, s);
    start_sums(p, 16, last - first, s);
    for (int64_t i = 0; i < p->segment_count; i++) {
        const Segment *segment = p->segments + i;
        transpose_tile_avx512(rows, segment, s->tile);
        for (int64_t token = first, tokens; token < last; token += tokens) {
            tokens = strip_size(last - token, 6);
            const Strip strip = strip_at(p, segment, 16, first, token, s);
            micro[tokens](s->tile, &strip);
        }
    }
    store_block(p, row, 16, first, last, s);
}
#endif

/* ---- entry points ---- */

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

static uint8_t *aligned(uint8_t *pointer) { return (uint8_t *)(((uintptr_t)pointer + 63) & ~(uintptr_t)63); }

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
                int64_t first = task / row_blocks * TOKEN_BLOCK, row = task % row_blocks * width;
                int64_t last = first + TOKEN_BLOCK < tokens ? first + TOKEN_BLOCK : tokens;
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
