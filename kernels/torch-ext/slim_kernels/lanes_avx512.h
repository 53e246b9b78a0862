/* What lookup.h and the files that use it are written in, for AVX-512: 16 rows at a time. */

AVX512 static inline __m512 load16_as(int type, const void *base, int64_t index) {
    if (type == FP32) return _mm512_loadu_ps((const float *)base + index);
    __m256i half = _mm256_loadu_si256((const __m256i *)((const uint16_t *)base + index));
    if (type == FP16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

#include "lanes_none.h"

#define TARGET AVX512
#define NAME(name) name##_avx512
#define LANES 16
#define LOOKUPS 8 /* a word of 32 columns: eight of four */
#define PATTERNS 16
#define FIELD 4
#define FLOATS __m512
#define WORDS __m512i
#define ZERO _mm512_setzero_ps()
#define SET(value) _mm512_set1_ps(value)
#define LOAD(from) _mm512_loadu_ps(from)
#define STORE(to, value) _mm512_storeu_ps(to, value)
#define ADD(a, b) _mm512_add_ps(a, b)
#define SUBTRACT(a, b) _mm512_sub_ps(a, b)
#define MULTIPLY(a, b) _mm512_mul_ps(a, b)
#define MULTIPLY_ADD(a, b, c) _mm512_fmadd_ps(a, b, c)
#define XOR(a, b) _mm512_xor_si512(a, b)
#define SHIFT(words) _mm512_srli_epi32(words, FIELD)
#define SHIFT_BY(words, count) _mm512_srlv_epi32(words, _mm512_set1_epi32(count))
#define LOOK_UP(table, words) _mm512_permutexvar_ps(words, table)
#define LOAD_AS(type, base, index) load16_as(type, base, index)
#define TRANSPOSE(words) transpose16(words)
