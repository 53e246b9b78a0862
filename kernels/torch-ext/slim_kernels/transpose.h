/* Square blocks of 32-bit words: what lay along a row comes to lie in the same lane of one vector after the other. */

#ifdef HAVE_X86
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

AVX512 static inline void transpose16(__m512i *a) {
    __m512i b[16];
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
        b[j] = _mm512_shuffle_i32x4(even0, even1, 0x88), b[j + 4] = _mm512_shuffle_i32x4(odd0, odd1, 0x88);
        b[j + 8] = _mm512_shuffle_i32x4(even0, even1, 0xDD), b[j + 12] = _mm512_shuffle_i32x4(odd0, odd1, 0xDD);
    }
    for (int j = 0; j < 16; j++) a[j] = b[j];
}
#endif
