/* Int8 activations, a few tokens. A byte of a row holds a bit of eight columns: with the activations of every eighth
   column lying together, one AND makes a whole vector of bits meet theirs. Bits stay where they are in the byte, plane i
   counts 2^i times, and planes i and i + 4 share a sum. What is summed is the part where the sign is minus:
   S . q = sum q - 2 * that. */

#ifdef HAVE_X86
enum { SIGNS_AHEAD = 8192 }; /* bytes to prefetch */

/* Activations as planes[block][i][j] = q[column 8 * (size * block + j) + i], blocks of `size` packed bytes. */
static void make_planes(const int8_t *codes, int64_t blocks, int64_t size, int8_t *planes) {
    for (int64_t block = 0; block < blocks; block++, codes += 8 * size, planes += 8 * size)
        for (int64_t i = 0; i < 8; i++)
            for (int64_t j = 0; j < size; j++) planes[i * size + j] = codes[8 * j + i];
}

AVX2 static inline int32_t total8(__m256i v) {
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1)));
}

AVX2 static inline __m256i load_block_avx2(const uint8_t *from, int64_t left) {
    if (left >= 32) return _mm256_loadu_si256((const __m256i *)from);
    uint8_t block[32] = {0};
    memcpy(block, from, (size_t)left);
    return _mm256_loadu_si256((const __m256i *)block);
}

/* sums[row - begin] = the sum of the codes whose sign is minus. In int16 over at most 4 blocks: it stays within
   4 * 2 * (2 * 8 * 127) = 16256. */
AVX2 static void minus_avx2(const Sign *p, const int8_t *planes, int64_t begin, int64_t end, int32_t *sums) {
    const __m256i masks[4] = {_mm256_set1_epi8(1), _mm256_set1_epi8(2), _mm256_set1_epi8(4), _mm256_set1_epi8(8)};
    const __m256i ones = _mm256_set1_epi16(1);
    for (int64_t row = begin; row < end; row += 2) {
        const uint8_t *rows[2] = {p->weight + row * p->bytes, p->weight + (row + 1 < end ? row + 1 : row) * p->bytes};
        __m256i wide[2][4];
        for (int r = 0; r < 2; r++)
            for (int i = 0; i < 4; i++) wide[r][i] = _mm256_setzero_si256();
        for (int64_t start = 0; start < p->bytes;) {
            const int64_t pause = start + 128 < p->bytes ? start + 128 : p->bytes;
            __m256i sum[2][4];
            UNROLL for (int r = 0; r < 2; r++) UNROLL for (int i = 0; i < 4; i++) sum[r][i] = _mm256_setzero_si256();
            for (; start < pause; start += 32) {
                const __m256i *from = (const __m256i *)(planes + 8 * start);
                UNROLL for (int r = 0; r < 2; r++) {
                    if (start % 64 == 0) _mm_prefetch((const char *)rows[r] + start + SIGNS_AHEAD, _MM_HINT_T1);
                    const __m256i low = load_block_avx2(rows[r] + start, p->bytes - start);
                    const __m256i high = _mm256_srli_epi16(low, 4);
                    UNROLL for (int i = 0; i < 4; i++) {
                        __m256i part = _mm256_maddubs_epi16(_mm256_and_si256(low, masks[i]), _mm256_loadu_si256(from + i));
                        sum[r][i] = _mm256_add_epi16(sum[r][i], part);
                        part = _mm256_maddubs_epi16(_mm256_and_si256(high, masks[i]), _mm256_loadu_si256(from + i + 4));
                        sum[r][i] = _mm256_add_epi16(sum[r][i], part);
                    }
                }
            }
            UNROLL for (int r = 0; r < 2; r++) UNROLL for (int i = 0; i < 4; i++)
                wide[r][i] = _mm256_add_epi32(wide[r][i], _mm256_madd_epi16(sum[r][i], ones));
        }
        for (int r = 0; r < 2 && row + r < end; r++) {
            const __m256i low = _mm256_add_epi32(wide[r][0], _mm256_srai_epi32(wide[r][1], 1));
            const __m256i high = _mm256_add_epi32(_mm256_srai_epi32(wide[r][2], 2), _mm256_srai_epi32(wide[r][3], 3));
            sums[row + r - begin] = total8(_mm256_add_epi32(low, high));
        }
    }
}

AVX512 static void minus_avx512(const Sign *p, const int8_t *planes, int64_t begin, int64_t end, int32_t *sums) {
    const __m512i masks[4] = {_mm512_set1_epi8(1), _mm512_set1_epi8(2), _mm512_set1_epi8(4), _mm512_set1_epi8(8)};
    for (int64_t row = begin; row < end; row += 4) {
        const uint8_t *weight = p->weight + row * p->bytes;
        const int64_t next[4] = {0, row + 1 < end ? p->bytes : 0, row + 2 < end ? 2 * p->bytes : 0,
                                 row + 3 < end ? 3 * p->bytes : 0};
        __m512i sum[4][4];
        UNROLL for (int r = 0; r < 4; r++) UNROLL for (int i = 0; i < 4; i++) sum[r][i] = _mm512_setzero_si512();
        for (int64_t start = 0; start < p->bytes; start += 64) {
            const int64_t left = p->bytes - start;
            const __mmask64 inside = left >= 64 ? ~0ull : (1ull << left) - 1;
            const int8_t *from = planes + 8 * start;
            __m512i low[4], high[4];
            UNROLL for (int r = 0; r < 4; r++) {
                _mm_prefetch((const char *)weight + next[r] + start + SIGNS_AHEAD, _MM_HINT_T1);
                low[r] = _mm512_maskz_loadu_epi8(inside, weight + next[r] + start);
                high[r] = _mm512_srli_epi16(low[r], 4);
            }
            UNROLL for (int i = 0; i < 4; i++) {
                const __m512i first = _mm512_loadu_si512(from + 64 * i), second = _mm512_loadu_si512(from + 64 * (i + 4));
                UNROLL for (int r = 0; r < 4; r++) {
                    sum[r][i] = _mm512_dpbusd_epi32(sum[r][i], _mm512_and_si512(low[r], masks[i]), first);
                    sum[r][i] = _mm512_dpbusd_epi32(sum[r][i], _mm512_and_si512(high[r], masks[i]), second);
                }
            }
        }
        for (int r = 0; r < 4 && row + r < end; r++) {
            const __m512i one = _mm512_add_epi32(sum[r][0], _mm512_srai_epi32(sum[r][1], 1));
            const __m512i two = _mm512_add_epi32(_mm512_srai_epi32(sum[r][2], 2), _mm512_srai_epi32(sum[r][3], 3));
            const __m512i all = _mm512_add_epi32(one, two);
            sums[row + r - begin] =
                total8(_mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1)));
        }
    }
}
#endif
