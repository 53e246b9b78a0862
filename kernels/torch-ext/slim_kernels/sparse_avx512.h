/* 64 columns at a time: a word of the mask drives VPEXPAND (AVX-512 VBMI2). Two schemes.

     few tokens     decode a block of one row in registers and multiply it with every token at once; nothing is stored.
     expand         decode a row in fp32, in the order of the columns.

   Activations of the first are stored as [block][token][64], in the order in which decoding leaves the columns. */

#ifdef HAVE_X86
#if defined(__clang__) || __GNUC__ >= 11
#define HAVE_BF16 1
#endif
#define VBMI2_FEATURES "avx2,fma,f16c,popcnt,avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2"
#define VBMI2 __attribute__((target(VBMI2_FEATURES)))
#define VBMI2_INLINE VBMI2 __attribute__((always_inline)) static inline

enum { STREAMS = 2, MAX_TOKENS = 8, VALUES_AHEAD = 2048, INDEX_AHEAD = 512 }; /* bytes to prefetch */

/* Column of a block whose activation is stored at place `i`. */
static int column_at(int kind, int pairs, int i) {
    static const int quarter[4] = {0, 2, 1, 3};
    const int plane = i / 16, lane = i % 16;
    switch (kind) {
    case KIND_BF16: return pairs ? i : plane / 2 * 32 + lane * 2 + plane % 2;
    case KIND_CODE4: return pairs ? i % 32 * 2 + i / 32 : lane * 4 + quarter[plane];
    case KIND_CODE8: return pairs ? i % 32 * 2 + i / 32 : lane * 4 + plane;
    default: return i;
    }
}

/* Codes to bytes: `gather` brings the bytes of eight codes into each 64-bit lane, `shifts` picks their bits, for each bit
   of a byte that the first may start at. */
typedef struct {
    uint8_t gather[64], shifts[8][64], low[64];
    int bits;
} Unpacking;

static void set_unpacking(Unpacking *u, int bits) {
    u->bits = bits;
    for (int i = 0; i < 64; i++) {
        u->gather[i] = (uint8_t)((i / 8 * bits + i % 8) & 63);
        for (int start = 0; start < 8; start++) u->shifts[start][i] = (uint8_t)(i % 8 * bits + start);
        u->low[i] = (uint8_t)((1 << bits) - 1);
    }
}

/* What a stream knows of its row and its group of columns. */
typedef struct {
    const uint8_t *mask, *values;
    int64_t row, position; /* of the next value: elements, or bits */
    __m512i zero;          /* CODE4: table of bf16 code - zero, 0 from 16 on; CODE8: zero in 32 bits */
    __m512i fill;          /* the code of a dropped column */
    float scale;
} Stream;

VBMI2_INLINE void start_group(const Sparse *p, int kind, int64_t group, Stream *s) {
    s->scale = sparse_scale(p, s->row, group);
    const int zero = sparse_zero(p, s->row, group);
    if (kind == KIND_CODE4) {
        const __m512i codes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        __m512 values = _mm512_cvtepi32_ps(_mm512_sub_epi32(codes, _mm512_set1_epi32(zero)));
        s->zero = _mm512_zextsi256_si512(_mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(values), 16)));
        s->fill = _mm512_set1_epi8(16);
    } else if (kind == KIND_CODE8) {
        s->zero = _mm512_set1_epi32(zero);
        s->fill = _mm512_set1_epi8((char)zero);
    }
}

/* 64 codes in the order of their columns, `fill` where a column is dropped. */
VBMI2_INLINE __m512i next_codes(const Unpacking *u, uint64_t mask, Stream *s) {
    __m512i raw = _mm512_loadu_si512(s->values + (s->position >> 3));
    __m512i by = _mm512_loadu_si512(u->shifts[s->position & 7]);
    __m512i codes = _mm512_multishift_epi64_epi8(by, _mm512_permutexvar_epi8(_mm512_loadu_si512(u->gather), raw));
    s->position += __builtin_popcountll(mask) * u->bits;
    return _mm512_mask_expand_epi8(s->fill, mask, _mm512_and_si512(codes, _mm512_loadu_si512(u->low)));
}

VBMI2_INLINE __m512i next_words(uint32_t mask, Stream *s) {
    __m512i words = _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(s->values + 2 * s->position));
    s->position += __builtin_popcount(mask);
    return words;
}

VBMI2_INLINE __m512 next_floats(uint16_t mask, Stream *s) {
    __m512 floats = _mm512_maskz_expand_ps(mask, _mm512_loadu_ps(s->values + 4 * s->position));
    s->position += __builtin_popcount(mask);
    return floats;
}

VBMI2_INLINE void decode_bytes(const Unpacking *u, uint64_t mask, Stream *s, __m512 *out) {
    const __m512i codes = next_codes(u, mask, s), byte = _mm512_set1_epi32(255);
    const __m512i parts[4] = {_mm512_and_si512(codes, byte), _mm512_and_si512(_mm512_srli_epi32(codes, 8), byte),
                              _mm512_and_si512(_mm512_srli_epi32(codes, 16), byte), _mm512_srli_epi32(codes, 24)};
    for (int i = 0; i < 4; i++) out[i] = _mm512_cvtepi32_ps(_mm512_sub_epi32(parts[i], s->zero));
}

/* The next block in bf16, which holds code - zero exactly: KIND_BF16, KIND_CODE4 and KIND_CODE8. */
VBMI2_INLINE void decode_pairs(int kind, const Unpacking *u, uint64_t mask, Stream *s, __m512i *out) {
    if (kind == KIND_BF16) {
        out[0] = next_words((uint32_t)mask, s);
        out[1] = next_words((uint32_t)(mask >> 32), s);
    } else if (kind == KIND_CODE8) {
        __m512 bytes[4];
        decode_bytes(u, mask, s, bytes);
        for (int i = 0; i < 2; i++) {
            const __m512i even = _mm512_srli_epi32(_mm512_castps_si512(bytes[i]), 16);
            out[i] = _mm512_or_si512(even, _mm512_castps_si512(bytes[i + 2]));
        }
    } else {
        __m512i codes = next_codes(u, mask, s);
        out[0] = _mm512_permutexvar_epi16(codes, s->zero);
        out[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), s->zero);
    }
}

VBMI2_INLINE void decode_floats(int kind, const Unpacking *u, uint64_t mask, Stream *s, __m512 *out) {
    if (kind == KIND_BF16 || kind == KIND_CODE4) {
        __m512i pairs[2];
        decode_pairs(kind, u, mask, s, pairs);
        const __m512i high = _mm512_set1_epi32((int)0xFFFF0000u);
        for (int i = 0; i < 2; i++) {
            out[2 * i] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs[i], 16));
            out[2 * i + 1] = _mm512_castsi512_ps(_mm512_and_si512(pairs[i], high));
        }
    } else if (kind == KIND_CODE8) {
        decode_bytes(u, mask, s, out);
    } else if (kind == KIND_FP16) {
        for (int i = 0; i < 2; i++) {
            __m512i words = next_words((uint32_t)(mask >> 32 * i), s);
            out[2 * i] = _mm512_cvtph_ps(_mm512_castsi512_si256(words));
            out[2 * i + 1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(words, 1));
        }
    } else {
        for (int i = 0; i < 4; i++) out[i] = next_floats((uint16_t)(mask >> 16 * i), s);
    }
}

VBMI2_INLINE void prefetch_stream(const Sparse *p, int kind, int64_t block, const Stream *s) {
    const int64_t at = kind >= KIND_CODE4 ? s->position >> 3 : s->position * (kind == KIND_FP32 ? 4 : 2);
    _mm_prefetch((const char *)s->values + at + VALUES_AHEAD, _MM_HINT_T0);
    if (kind == KIND_FP32) _mm_prefetch((const char *)s->values + at + VALUES_AHEAD + 64, _MM_HINT_T0);
    if (block % 8 == 0) _mm_prefetch((const char *)p->index + s->row * index_bytes(p) + block * 8 + INDEX_AHEAD, _MM_HINT_T0);
}

/* Tokens [first, first + count), stored as `padded` of them, the last ones zeros. */
typedef struct {
    const char *x;
    int64_t first, count, padded;
} Batch;

#define PAIRS 0
#define FEW_TOKENS VBMI2
#define NAME(name) name##_floats
#include "sparse_few_tokens.h"

#ifdef HAVE_BF16
#define PAIRS 1
#define FEW_TOKENS __attribute__((target(VBMI2_FEATURES ",avx512bf16")))
#define NAME(name) name##_pairs
#include "sparse_few_tokens.h"
#endif

/* `group_size` must be a multiple of 16 where there are several groups. */
VBMI2_INLINE void expand_kind(const Sparse *p, int kind, int64_t row, Row from, float *out) {
    Unpacking u;
    set_unpacking(&u, p->bits ? p->bits : 8);
    Stream s = {.mask = from.mask, .values = from.values, .row = row};
    int64_t group = 0, stop = 0;
    __m512 scale = _mm512_setzero_ps();
    for (int64_t block = 0; block < p->blocks; block++, out += 64) {
        const uint64_t mask = load_word(s.mask + block * 8);
        prefetch_stream(p, kind, block, &s);
        if (kind == KIND_BF16) {
            for (int h = 0; h < 2; h++) {
                __m512i words = next_words((uint32_t)(mask >> 32 * h), &s);
                __m512i first = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(words));
                __m512i second = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(words, 1));
                _mm512_storeu_si512(out + 32 * h, _mm512_slli_epi32(first, 16));
                _mm512_storeu_si512(out + 32 * h + 16, _mm512_slli_epi32(second, 16));
            }
        } else if (kind == KIND_CODE8) {
            s.fill = _mm512_setzero_si512();
            const __m512i codes = next_codes(&u, mask, &s);
            const __m128i parts[4] = {_mm512_extracti32x4_epi32(codes, 0), _mm512_extracti32x4_epi32(codes, 1),
                                      _mm512_extracti32x4_epi32(codes, 2), _mm512_extracti32x4_epi32(codes, 3)};
            for (int i = 0; i < 4; i++) {
                if (block * 64 + 16 * i == stop && stop < p->columns) {
                    scale = _mm512_set1_ps(sparse_scale(p, row, group));
                    s.zero = _mm512_set1_epi32(sparse_zero(p, row, group));
                    group++, stop += p->group_size;
                }
                const __m512 value = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_cvtepu8_epi32(parts[i]), s.zero));
                _mm512_storeu_ps(out + 16 * i, _mm512_maskz_mul_ps((__mmask16)(mask >> 16 * i), value, scale));
            }
        } else {
            __m512 floats[4];
            decode_floats(kind, &u, mask, &s, floats);
            for (int i = 0; i < 4; i++) _mm512_storeu_ps(out + 16 * i, floats[i]);
        }
    }
}

VBMI2 static void expand_row_avx512(const Sparse *p, int64_t row, Row from, float *out) {
    switch (kind_of(p)) {
    case KIND_BF16: expand_kind(p, KIND_BF16, row, from, out); break;
    case KIND_FP16: expand_kind(p, KIND_FP16, row, from, out); break;
    case KIND_FP32: expand_kind(p, KIND_FP32, row, from, out); break;
    default: expand_kind(p, KIND_CODE8, row, from, out);
    }
}

VBMI2_INLINE void store_words(uint16_t *out, int64_t count, __m512i words) {
    if (count >= 32)
        _mm512_storeu_si512(out, words);
    else if (count > 0)
        _mm512_mask_storeu_epi16(out, (__mmask32)((1u << count) - 1), words);
}

/* bf16 or fp16 values as they are. */
VBMI2 static void expand_words_avx512(const Sparse *p, int64_t row, Row from, uint16_t *out) {
    Stream s = {.values = from.values, .row = row};
    for (int64_t block = 0, k = 0; block < p->blocks; block++, k += 64) {
        const uint64_t mask = load_word(from.mask + block * 8);
        prefetch_stream(p, KIND_BF16, block, &s);
        store_words(out + k, p->columns - k, next_words((uint32_t)mask, &s));
        store_words(out + k + 32, p->columns - k - 32, next_words((uint32_t)(mask >> 32), &s));
    }
}

/* Codes of up to 4 bits to bf16 or fp16 by a table of the 16 weights; groups are whole blocks. */
VBMI2 static void expand_table_avx512(const Sparse *p, int64_t row, Row from, uint16_t *out) {
    Unpacking u;
    set_unpacking(&u, p->bits);
    Stream s = {.values = from.values, .row = row, .fill = _mm512_set1_epi8(16)};
    const int64_t group_blocks = p->groups == 1 ? p->blocks : p->group_size / 64;
    for (int64_t block = 0, k = 0, group = 0; block < p->blocks; group++) {
        uint16_t table[32] = {0};
        const float scale = sparse_scale(p, row, group), zero = (float)sparse_zero(p, row, group);
        for (int code = 0; code < 16; code++) store_float(p->x_type, table, code, ((float)code - zero) * scale);
        const __m512i words = _mm512_loadu_si512(table);
        const int64_t stop = block + group_blocks < p->blocks ? block + group_blocks : p->blocks;
        for (; block < stop; block++, k += 64) {
            prefetch_stream(p, KIND_CODE4, block, &s);
            const __m512i codes = next_codes(&u, load_word(from.mask + block * 8), &s);
            const __m512i first = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(codes));
            const __m512i second = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(codes, 1));
            store_words(out + k, p->columns - k, _mm512_permutexvar_epi16(first, words));
            store_words(out + k + 32, p->columns - k - 32, _mm512_permutexvar_epi16(second, words));
        }
    }
}

VBMI2 static void from_floats_avx512(int type, const float *in, int64_t count, void *out, int64_t start) {
    from_floats(type, in, count, out, start);
}
#endif
