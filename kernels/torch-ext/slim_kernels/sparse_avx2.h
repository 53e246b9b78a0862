/* Eight columns at a time: a byte of the mask picks a shuffle that puts the values at their columns. */

#ifdef HAVE_X86
#define AVX2_POPCNT __attribute__((target("avx2,fma,f16c,popcnt")))
enum { AVX2_AHEAD = 1024 }; /* bytes to prefetch */

/* Byte i of RANK[mask]: how many columns below i are kept, or 128 if i is not; WORDS is the same for 16-bit values. */
static uint8_t RANK[256][8], WORDS[256][16];

__attribute__((constructor)) static void fill_tables(void) {
    for (int mask = 0; mask < 256; mask++) {
        uint8_t rank = 0;
        for (int i = 0; i < 8; i++) {
            const int kept = mask >> i & 1;
            RANK[mask][i] = kept ? rank : 128;
            WORDS[mask][2 * i] = kept ? (uint8_t)(2 * rank) : 128;
            WORDS[mask][2 * i + 1] = kept ? (uint8_t)(2 * rank + 1) : 128;
            rank = (uint8_t)(rank + kept);
        }
    }
}

/* Eight codes of `bits` bits from bit `position` on, one in each lane. */
AVX2 static inline __m256i load_codes(const uint8_t *values, int64_t position, int kind, int bits, __m256i shifts) {
    const uint64_t word = load_word(values + (position >> 3)) >> (position & 7);
    __m256i codes = _mm256_set1_epi32((int)(uint32_t)word);
    if (kind == KIND_CODE8)
        codes = _mm256_inserti128_si256(codes, _mm_set1_epi32((int)(uint32_t)(word >> 4 * bits)), 1);
    return _mm256_and_si256(_mm256_srlv_epi32(codes, shifts), _mm256_set1_epi32((1 << bits) - 1));
}

AVX2_POPCNT __attribute__((always_inline)) static inline void expand_kind_avx2(const Sparse *p, int kind, int64_t row,
                                                                               Row from, float *out) {
    const int bits = p->bits, part = kind == KIND_CODE4 ? 4 * bits : 0;
    const __m256i shifts = _mm256_setr_epi32(0, bits, 2 * bits, 3 * bits, part, part + bits, part + 2 * bits, part + 3 * bits);
    const uint8_t *values = from.values;
    int64_t position = 0, k = 0;
    for (int64_t group = 0; k < p->blocks * 64; group++) {
        const __m256 scale = _mm256_set1_ps(sparse_scale(p, row, group));
        const __m256i zero = _mm256_set1_epi32(sparse_zero(p, row, group));
        const int64_t next = (group + 1) * p->group_size, stop = next < p->columns ? next : p->blocks * 64;
        for (; k < stop; k += 8) {
            const unsigned mask = from.mask[k / 8];
            __m256 dense;
            if (kind <= KIND_FP16) {
                __m128i v = _mm_loadu_si128((const __m128i *)(values + 2 * position));
                _mm_prefetch((const char *)values + 2 * position + AVX2_AHEAD, _MM_HINT_T0);
                v = _mm_shuffle_epi8(v, _mm_loadu_si128((const __m128i *)WORDS[mask]));
                dense = kind == KIND_FP16 ? _mm256_cvtph_ps(v)
                                          : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
                position += __builtin_popcount(mask);
            } else {
                const __m256i lanes = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)RANK[mask]));
                if (kind == KIND_FP32) {
                    const float *at = (const float *)(const void *)values + position;
                    _mm_prefetch((const char *)at + AVX2_AHEAD, _MM_HINT_T0);
                    dense = _mm256_permutevar8x32_ps(_mm256_loadu_ps(at), lanes);
                    position += __builtin_popcount(mask);
                } else {
                    __m256i codes = load_codes(values, position, kind, bits, shifts);
                    _mm_prefetch((const char *)values + (position >> 3) + AVX2_AHEAD, _MM_HINT_T0);
                    codes = _mm256_sub_epi32(_mm256_permutevar8x32_epi32(codes, lanes), zero);
                    dense = _mm256_mul_ps(_mm256_cvtepi32_ps(codes), scale);
                    position += __builtin_popcount(mask) * bits;
                }
                dense = _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(lanes, 31)), dense);
            }
            _mm256_storeu_ps(out + k, dense);
        }
    }
}

/* `group_size` must be a multiple of 8 where there are several groups. */
AVX2_POPCNT static void expand_row_avx2(const Sparse *p, int64_t row, Row from, float *out) {
    switch (kind_of(p)) {
    case KIND_BF16: expand_kind_avx2(p, KIND_BF16, row, from, out); break;
    case KIND_FP16: expand_kind_avx2(p, KIND_FP16, row, from, out); break;
    case KIND_FP32: expand_kind_avx2(p, KIND_FP32, row, from, out); break;
    case KIND_CODE4: expand_kind_avx2(p, KIND_CODE4, row, from, out); break;
    default: expand_kind_avx2(p, KIND_CODE8, row, from, out);
    }
}

AVX2 static inline float hsum_avx2(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* sums[t] = dense . x[t]; `count` is a multiple of 64. */
AVX2 static void dot_avx2(const float *dense, const float *x, int64_t count, int64_t tokens, float *sums) {
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4, x += 4 * count) {
        __m256 a = _mm256_setzero_ps(), b = a, c = a, d = a;
        for (int64_t k = 0; k < count; k += 8) {
            __m256 w = _mm256_loadu_ps(dense + k);
            a = _mm256_fmadd_ps(w, _mm256_loadu_ps(x + k), a);
            b = _mm256_fmadd_ps(w, _mm256_loadu_ps(x + count + k), b);
            c = _mm256_fmadd_ps(w, _mm256_loadu_ps(x + 2 * count + k), c);
            d = _mm256_fmadd_ps(w, _mm256_loadu_ps(x + 3 * count + k), d);
        }
        sums[t] = hsum_avx2(a), sums[t + 1] = hsum_avx2(b), sums[t + 2] = hsum_avx2(c), sums[t + 3] = hsum_avx2(d);
    }
    for (; t < tokens; t++, x += count) {
        __m256 a = _mm256_setzero_ps(), b = a, c = a, d = a;
        for (int64_t k = 0; k < count; k += 32) {
            a = _mm256_fmadd_ps(_mm256_loadu_ps(dense + k), _mm256_loadu_ps(x + k), a);
            b = _mm256_fmadd_ps(_mm256_loadu_ps(dense + k + 8), _mm256_loadu_ps(x + k + 8), b);
            c = _mm256_fmadd_ps(_mm256_loadu_ps(dense + k + 16), _mm256_loadu_ps(x + k + 16), c);
            d = _mm256_fmadd_ps(_mm256_loadu_ps(dense + k + 24), _mm256_loadu_ps(x + k + 24), d);
        }
        sums[t] = hsum_avx2(_mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d)));
    }
}

AVX2 static void from_floats_avx2(int type, const float *in, int64_t count, void *out, int64_t start) {
    from_floats(type, in, count, out, start);
}
#endif
