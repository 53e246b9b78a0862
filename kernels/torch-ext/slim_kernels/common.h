/* Types, conversions and what every other part of ternary.c uses. */

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
static inline const uint8_t *readable_row(const Problem *p, int64_t row, uint8_t *copy) {
    const uint8_t *source = p->weight + row * p->columns;
    if ((p->rows - row - 1) * p->columns >= 63) return source;
    memcpy(copy, source, (size_t)p->columns);
    memset(copy + p->columns, 0, 64);
    return copy;
}

static inline uint8_t *aligned(uint8_t *pointer) { return (uint8_t *)(((uintptr_t)pointer + 63) & ~(uintptr_t)63); }
