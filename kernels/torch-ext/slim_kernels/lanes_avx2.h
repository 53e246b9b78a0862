/* What lookup.h and the files that use it are written in, for AVX2: 8 rows at a time. */

#include "lanes_none.h"

#define TARGET AVX2
#define NAME(name) name##_avx2
#define LANES 8
#define LOOKUPS 11 /* a word of 32 columns: ten of three, one of two */
#define PATTERNS 8
#define FIELD 3
#define FLOATS __m256
#define WORDS __m256i
#define ZERO _mm256_setzero_ps()
#define SET(value) _mm256_set1_ps(value)
#define LOAD(from) _mm256_loadu_ps(from)
#define STORE(to, value) _mm256_storeu_ps(to, value)
#define ADD(a, b) _mm256_add_ps(a, b)
#define SUBTRACT(a, b) _mm256_sub_ps(a, b)
#define MULTIPLY(a, b) _mm256_mul_ps(a, b)
#define MULTIPLY_ADD(a, b, c) _mm256_fmadd_ps(a, b, c)
#define XOR(a, b) _mm256_xor_si256(a, b)
#define SHIFT(words) _mm256_srli_epi32(words, FIELD)
#define SHIFT_BY(words, count) _mm256_srlv_epi32(words, _mm256_set1_epi32(count))
#define LOOK_UP(table, words) _mm256_permutevar8x32_ps(table, words)
#define LOAD_AS(type, base, index) load8(type, base, index)
#define TRANSPOSE(words) transpose8(words)
