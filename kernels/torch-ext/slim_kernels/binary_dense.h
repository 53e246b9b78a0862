/* Rows of a binary layer, dense. What a weight is depends on its sign, its second bit and whether its column is salient:
   eight cases, numbered sign + 2 * second + 4 * salient. */

typedef struct {
    float size[8], offset[8], left[8], value[8]; /* value: offset + size (+ left), the weight if there are no `columns` */
} Cases;

static void make_cases_portable(const Binary *p, int64_t row, int64_t group, Cases *out) {
    float scale[4], offset[3] = {0};
    for (int i = 0; i < 4; i++) scale[i] = load_float(p->scale_type, p->scale, (row * p->groups + group) * 4 + i);
    for (int i = 0; p->offset && i < 3; i++)
        offset[i] = load_float(p->offset_type, p->offset, (row * p->groups + group) * 3 + i);
    for (int i = 0; i < 8; i++) {
        const int minus = i & 1, second = i >> 1 & 1, salient = i >> 2, part = salient ? 2 : second;
        out->size[i] = minus ? -scale[part] : scale[part];
        out->left[i] = second ? -scale[3] : scale[3];
        out->offset[i] = offset[part];
        out->value[i] = p->offset ? offset[part] + out->size[i] : out->size[i];
        if (salient) out->value[i] += out->left[i];
    }
}

static inline int bit_at(const uint8_t *bits, int64_t k) { return bits[k / 8] >> k % 8 & 1; }

/* Columns [start, stop) of one group. `columns` are the two rows of factors, or NULL. */
static void dense_part_portable(const Binary *p, int64_t row, const Cases *cases, const float *columns, int64_t start,
                                int64_t stop, void *out, int64_t to) {
    const uint8_t *signs = p->weight + row * 2 * p->bytes, *seconds = signs + p->bytes;
    for (int64_t k = start; k < stop; k++) {
        const int second = bit_at(seconds, k), salient = bit_at(p->is_salient, k);
        const int i = bit_at(signs, k) + 2 * second + 4 * salient;
        float value = cases->value[i];
        if (columns) {
            value = cases->size[i] * columns[second && !salient ? p->columns + k : k];
            if (p->offset) value = cases->offset[i] + value;
            if (salient) value += cases->left[i] * columns[p->columns + k];
        }
        store_float(p->x_type, out, to + k - start, value);
    }
}

#ifdef HAVE_X86
/* Whole bytes of columns; `start` is a multiple of 8. Returns the first column that is left. */
AVX2 static int64_t dense_part_avx2(const Binary *p, int64_t row, const Cases *cases, const float *columns, int64_t start,
                                    int64_t stop, void *out, int64_t to) {
    const uint8_t *signs = p->weight + row * 2 * p->bytes, *seconds = signs + p->bytes;
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), one = _mm256_set1_epi32(1);
    const __m256i two = _mm256_set1_epi32(2), four = _mm256_set1_epi32(4);
    const __m256 value = _mm256_loadu_ps(cases->value), size = _mm256_loadu_ps(cases->size);
    const __m256 offset = _mm256_loadu_ps(cases->offset), left = _mm256_loadu_ps(cases->left);
    int64_t k = start;
    for (; k + 8 <= stop; k += 8) {
        const int bits = signs[k / 8] | seconds[k / 8] << 8 | p->is_salient[k / 8] << 16;
        const __m256i each = _mm256_srlv_epi32(_mm256_set1_epi32(bits), lanes);
        const __m256i second = _mm256_and_si256(_mm256_srli_epi32(each, 7), two);
        const __m256i salient = _mm256_and_si256(_mm256_srli_epi32(each, 14), four);
        const __m256i i = _mm256_or_si256(_mm256_or_si256(_mm256_and_si256(each, one), second), salient);
        __m256 weight = _mm256_permutevar8x32_ps(value, i);
        if (columns) {
            const __m256 small = _mm256_loadu_ps(columns + k), large = _mm256_loadu_ps(columns + p->columns + k);
            const __m256 is_salient = _mm256_castsi256_ps(_mm256_cmpeq_epi32(salient, four));
            const __m256 is_large = _mm256_andnot_ps(is_salient, _mm256_castsi256_ps(_mm256_cmpeq_epi32(second, two)));
            weight = _mm256_mul_ps(_mm256_permutevar8x32_ps(size, i), _mm256_blendv_ps(small, large, is_large));
            if (p->offset) weight = _mm256_add_ps(_mm256_permutevar8x32_ps(offset, i), weight);
            const __m256 rest = _mm256_mul_ps(_mm256_permutevar8x32_ps(left, i), large);
            weight = _mm256_blendv_ps(weight, _mm256_add_ps(weight, rest), is_salient);
        }
        store8(p->x_type, out, to + k - start, weight);
    }
    return k;
}

/* The three or four numbers from `index` on, and zeros. Put together in a register: memory would have to wait for itself. */
AVX2 static inline __m256 load_few(int type, const void *base, int64_t index, int count) {
    if (type == FP32) {
        const __m128i lanes = _mm_setr_epi32(-1, -1, -1, count > 3 ? -1 : 0);
        return _mm256_zextps128_ps256(_mm_maskload_ps((const float *)base + index, lanes));
    }
    const uint16_t *from = (const uint16_t *)base + index;
    uint32_t two;
    memcpy(&two, from, 4);
    const uint64_t all = two | (uint64_t)from[2] << 32 | (count > 3 ? (uint64_t)from[3] << 48 : 0);
    const __m128i half = _mm_cvtsi64_si128((long long)all);
    if (type == FP16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

AVX2 static void make_cases_avx2(const Binary *p, int64_t row, int64_t group, Cases *out) {
    const __m256i part = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 2, 2);
    const __m256 minus = _mm256_setr_ps(0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f);
    const __m256 minus_second = _mm256_setr_ps(0.0f, 0.0f, -0.0f, -0.0f, 0.0f, 0.0f, -0.0f, -0.0f);
    const __m256 scale = load_few(p->scale_type, p->scale, (row * p->groups + group) * 4, 4);
    const __m256 size = _mm256_xor_ps(_mm256_permutevar8x32_ps(scale, part), minus);
    const __m256 left = _mm256_xor_ps(_mm256_permutevar8x32_ps(scale, _mm256_set1_epi32(3)), minus_second);
    __m256 offset = _mm256_setzero_ps(), value = size;
    if (p->offset) {
        offset = load_few(p->offset_type, p->offset, (row * p->groups + group) * 3, 3);
        offset = _mm256_permutevar8x32_ps(offset, part);
        value = _mm256_add_ps(offset, size);
    }
    _mm256_storeu_ps(out->size, size), _mm256_storeu_ps(out->offset, offset), _mm256_storeu_ps(out->left, left);
    _mm256_storeu_ps(out->value, _mm256_blend_ps(value, _mm256_add_ps(value, left), 0xF0));
}

/* The same for bf16 and fp16 without `columns`, 32 of them at a time. */
AVX512 static int64_t dense_part_of_halves(const Binary *p, int64_t row, const Cases *cases, int64_t start, int64_t stop,
                                           uint16_t *out) {
    const uint8_t *signs = p->weight + row * 2 * p->bytes, *seconds = signs + p->bytes;
    const __m512i one = _mm512_set1_epi16(1), two = _mm512_set1_epi16(2), four = _mm512_set1_epi16(4);
    const __m256 value = _mm256_loadu_ps(cases->value);
    const __m128i halves = p->x_type == BF16 ? bfloat8(value) : _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
    const __m512i table = _mm512_zextsi128_si512(halves);
    int64_t k = start;
    for (; k + 32 <= stop; k += 32, out += 32) {
        uint32_t minus, second, salient;
        memcpy(&minus, signs + k / 8, 4), memcpy(&second, seconds + k / 8, 4), memcpy(&salient, p->is_salient + k / 8, 4);
        __m512i i = _mm512_maskz_mov_epi16(minus, one);
        i = _mm512_mask_add_epi16(i, second, i, two);
        i = _mm512_mask_add_epi16(i, salient, i, four);
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(i, table));
    }
    return k;
}

/* The same with `columns`, 16 of them at a time. */
AVX512 static int64_t dense_part_of_columns(const Binary *p, int64_t row, const Cases *cases, const float *columns,
                                            int64_t start, int64_t stop, void *out, int64_t to) {
    const uint8_t *signs = p->weight + row * 2 * p->bytes, *seconds = signs + p->bytes;
    const __m512i sign = _mm512_set1_epi32((int)0x80000000u);
    __m512 size[3], offset[3];
    for (int i = 0; i < 3; i++) size[i] = _mm512_set1_ps(cases->size[2 * i]), offset[i] = _mm512_set1_ps(cases->offset[2 * i]);
    const __m512 left = _mm512_set1_ps(cases->left[0]);
    int64_t k = start;
    for (; k + 16 <= stop; k += 16) {
        uint16_t minus, second, salient;
        memcpy(&minus, signs + k / 8, 2), memcpy(&second, seconds + k / 8, 2), memcpy(&salient, p->is_salient + k / 8, 2);
        const __m512 small = _mm512_loadu_ps(columns + k), large = _mm512_loadu_ps(columns + p->columns + k);
        __m512 weight = _mm512_mask_mov_ps(_mm512_mask_mov_ps(size[0], second, size[1]), salient, size[2]);
        weight = _mm512_mul_ps(weight, _mm512_mask_mov_ps(small, second & (uint16_t)~salient, large));
        __m512i bits = _mm512_castps_si512(weight);
        weight = _mm512_castsi512_ps(_mm512_mask_xor_epi32(bits, minus, bits, sign));
        if (p->offset) {
            const __m512 middle = _mm512_mask_mov_ps(_mm512_mask_mov_ps(offset[0], second, offset[1]), salient, offset[2]);
            weight = _mm512_add_ps(middle, weight);
        }
        bits = _mm512_castps_si512(_mm512_mul_ps(left, large));
        const __m512 rest = _mm512_castsi512_ps(_mm512_mask_xor_epi32(bits, second, bits, sign));
        store16(p->x_type, out, to + k - start, _mm512_mask_add_ps(weight, salient, weight, rest));
    }
    return k;
}
#endif

static void dense_row(const Binary *p, int64_t row, const float *columns, int isa, void *out, int64_t to) {
    for (int64_t group = 0; group < p->groups; group++) {
        Cases cases;
#ifdef HAVE_X86
        if (isa >= ISA_AVX2)
            make_cases_avx2(p, row, group, &cases);
        else
#endif
            make_cases_portable(p, row, group, &cases);
        const int64_t next = (group + 1) * p->group_size, stop = next < p->columns ? next : p->columns;
        int64_t k = group * p->group_size;
#ifdef HAVE_X86
        if (isa == ISA_AVX512VNNI && columns)
            k = dense_part_of_columns(p, row, &cases, columns, k, stop, out, to + k);
        else if (isa == ISA_AVX512VNNI && p->x_type != FP32)
            k = dense_part_of_halves(p, row, &cases, k, stop, (uint16_t *)out + to + k);
        if (isa >= ISA_AVX2) k = dense_part_avx2(p, row, &cases, columns, k, stop, out, to + k);
#endif
        dense_part_portable(p, row, &cases, columns, k, stop, out, to + k);
    }
    (void)isa;
}
