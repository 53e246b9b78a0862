/* Vectors of floats of every type, to and from fp32. */

static void to_float_portable(int type, const void *x, int64_t start, int64_t count, float *out) {
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

AVX512 static inline void store16(int type, void *base, int64_t index, __m512 value) {
    if (type == FP32) {
        _mm512_storeu_ps((float *)base + index, value);
        return;
    }
    __m256i half;
    if (type == FP16) {
        half = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
    } else {
        const __m512i bits = _mm512_castps_si512(value);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
        const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
        rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC00000));
        half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
    }
    _mm256_storeu_si256((__m256i *)((uint16_t *)base + index), half);
}

AVX2 static void to_float_avx2(int type, const void *x, int64_t start, int64_t count, float *out) {
    int64_t k = 0;
    for (; k + 8 <= count; k += 8) _mm256_storeu_ps(out + k, load8(type, x, start + k));
    to_float_portable(type, x, start + k, count - k, out + k);
}
#endif

/* `count` numbers from `start` on. */
static void to_float(int isa, int type, const void *in, int64_t start, int64_t count, float *out) {
#ifdef HAVE_X86
    if (isa >= ISA_AVX2) {
        to_float_avx2(type, in, start, count, out);
        return;
    }
#endif
    (void)isa;
    to_float_portable(type, in, start, count, out);
}
