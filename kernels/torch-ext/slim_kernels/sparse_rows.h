/* One row of a sparse matrix: where its mask and values may be read, and its expansion to fp32 in portable C. */

typedef struct {
    const void *x, *values, *scale, *bias;
    const uint8_t *index, *zero;
    const int32_t *rows; /* where the rows of flat values start, or NULL */
    void *y;
    int64_t tokens, outs, columns, groups, group_size;
    int64_t stride, total; /* values of a row if it has no `rows`, and of all rows: elements, or bytes of codes */
    int x_type, value_type, scale_type, bias_type, keep, bits;
    int64_t blocks; /* of 64 columns */
} Sparse;

typedef struct {
    uint8_t *mask, *values; /* copies of what cannot be read in place */
    float *dense;
} RowScratch;

/* `mask` has `blocks` whole words of 64 bits, 0 past the last column; behind the last value a row of such a mask takes,
   64 more bytes of `values` may be read. */
typedef struct {
    const uint8_t *mask, *values;
} Row;

/* Values and codes (of 2 to 4, and of 5 to 8 bits) that are decoded alike. */
enum { KIND_BF16, KIND_FP16, KIND_FP32, KIND_CODE4, KIND_CODE8 };

static inline int kind_of(const Sparse *p) {
    return p->bits == 0 ? (p->value_type == BF16 ? KIND_BF16 : p->value_type == FP16 ? KIND_FP16 : KIND_FP32)
                        : p->bits <= 4 ? KIND_CODE4 : KIND_CODE8;
}

static inline int64_t index_bytes(const Sparse *p) { return p->keep == 1 ? (p->columns + 15) / 16 : (p->columns + 7) / 8; }

/* Bytes that hold `count` values or codes. */
static inline int64_t value_bytes(const Sparse *p, int64_t count) {
    return p->bits ? (count * p->bits + 7) / 8 : count * (p->value_type == FP32 ? 4 : 2);
}

static inline uint64_t load_word(const uint8_t *bytes) {
    uint64_t word;
    memcpy(&word, bytes, 8);
    return word;
}

/* Mask bits of the two positions in a half byte: keep == 2 has both in one group of four, keep == 1 in two groups. */
static const uint8_t TWO_OF_FOUR[16] = {1, 3, 5, 9, 3, 2, 6, 10, 5, 6, 4, 12, 9, 10, 12, 8};
static const uint8_t ONE_OF_FOUR[16] = {17, 18, 20, 24, 33, 34, 36, 40, 65, 66, 68, 72, 129, 130, 132, 136};

static inline void positions_to_mask(int keep, const uint8_t *index, int64_t done, int64_t bytes, uint8_t *mask) {
    for (int64_t i = done; i < bytes; i++) {
        if (keep == 2) {
            mask[i] = (uint8_t)(TWO_OF_FOUR[index[i] & 15] | TWO_OF_FOUR[index[i] >> 4] << 4);
        } else {
            mask[2 * i] = ONE_OF_FOUR[index[i] & 15];
            mask[2 * i + 1] = ONE_OF_FOUR[index[i] >> 4];
        }
    }
}

#ifdef HAVE_X86
AVX2 static int64_t positions_to_mask_avx2(int keep, const uint8_t *index, int64_t bytes, uint8_t *mask) {
    const __m128i low = _mm_set1_epi8(15);
    const __m128i table = _mm_loadu_si128((const __m128i *)(keep == 2 ? TWO_OF_FOUR : ONE_OF_FOUR));
    int64_t i = 0;
    for (; i + 16 <= bytes; i += 16) {
        __m128i v = _mm_loadu_si128((const __m128i *)(index + i));
        __m128i first = _mm_shuffle_epi8(table, _mm_and_si128(v, low));
        __m128i second = _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(v, 4), low));
        if (keep == 2) {
            _mm_storeu_si128((__m128i *)(mask + i), _mm_or_si128(first, _mm_slli_epi16(second, 4)));
        } else {
            _mm_storeu_si128((__m128i *)(mask + 2 * i), _mm_unpacklo_epi8(first, second));
            _mm_storeu_si128((__m128i *)(mask + 2 * i + 16), _mm_unpackhi_epi8(first, second));
        }
    }
    return i;
}
#endif

/* Whatever the index holds, a row takes at most one value per column: where that many lie before the end of the tensor,
   it is read in place; the last rows are copied, and values that are not there count as 0. */
static Row find_row(const Sparse *p, int64_t row, const RowScratch *scratch, int vectors) {
    const int64_t bytes = index_bytes(p), padded = p->blocks * 8;
    const uint8_t *index = p->index + row * bytes;
    Row found = {index, NULL};
    if (p->keep || p->columns % 64) {
        found.mask = scratch->mask;
        memset(scratch->mask + padded - 8, 0, 8);
        int64_t done = 0;
#ifdef HAVE_X86
        if (p->keep && vectors) done = positions_to_mask_avx2(p->keep, index, bytes, scratch->mask);
#endif
        if (p->keep)
            positions_to_mask(p->keep, index, done, bytes, scratch->mask);
        else
            memcpy(scratch->mask, index, (size_t)bytes);
        for (int64_t k = p->columns; k < p->blocks * 64; k++) scratch->mask[k / 8] &= (uint8_t)~(1u << k % 8);
    }
    (void)vectors;
    int64_t start = p->rows ? p->rows[row] : row * p->stride;
    start = start < 0 ? 0 : start > p->total ? p->total : start;
    const int64_t unit = p->bits ? 1 : value_bytes(p, 1), left = (p->total - start) * unit;
    const int64_t most = value_bytes(p, p->blocks * 64);
    found.values = (const uint8_t *)p->values + start * unit;
    if (left < most + 64) {
        const int64_t taken = left < most ? left : most;
        memcpy(scratch->values, found.values, (size_t)taken);
        memset(scratch->values + taken, 0, (size_t)(most + 64 - taken));
        found.values = scratch->values;
    }
    return found;
}

static inline float sparse_scale(const Sparse *p, int64_t row, int64_t group) {
    return p->bits ? load_float(p->scale_type, p->scale, row * p->groups + group) : 1.0f;
}

static inline int sparse_zero(const Sparse *p, int64_t row, int64_t group) {
    return p->bits ? p->zero[row * p->groups + group] : 0;
}

/* Row `row` in fp32, `blocks` * 64 columns of it. */
static void expand_row_portable(const Sparse *p, int64_t row, Row from, float *out) {
    const unsigned low = (1u << p->bits) - 1;
    int64_t position = 0, group = 0, stop = p->group_size;
    float scale = sparse_scale(p, row, 0), zero = (float)sparse_zero(p, row, 0);
    for (int64_t k = 0; k < p->blocks * 64; k++) {
        if (k == stop && k < p->columns) {
            stop += p->group_size, group++;
            scale = sparse_scale(p, row, group), zero = (float)sparse_zero(p, row, group);
        }
        if (!(from.mask[k / 8] >> k % 8 & 1)) {
            out[k] = 0.0f;
        } else if (p->bits) {
            unsigned two = (unsigned)from.values[position >> 3] | (unsigned)from.values[(position >> 3) + 1] << 8;
            out[k] = ((float)(two >> (position & 7) & low) - zero) * scale;
            position += p->bits;
        } else {
            out[k] = load_float(p->value_type, from.values, position++);
        }
    }
}

/* `count` is a multiple of 4. */
static float dot_portable(const float *a, const float *b, int64_t count) {
    float sums[4] = {0, 0, 0, 0};
    for (int64_t k = 0; k < count; k += 4)
        for (int i = 0; i < 4; i++) sums[i] += a[k + i] * b[k + i];
    return sums[0] + sums[1] + (sums[2] + sums[3]);
}

static inline void to_floats(int type, const void *in, int64_t start, int64_t count, float *out) {
    if (type == FP32)
        memcpy(out, (const float *)in + start, (size_t)count * sizeof(float));
    else if (type == BF16)
        for (int64_t k = 0; k < count; k++) out[k] = load_float(BF16, in, start + k);
    else
        for (int64_t k = 0; k < count; k++) out[k] = load_float(FP16, in, start + k);
}

static inline void from_floats(int type, const float *in, int64_t count, void *out, int64_t start) {
    if (type == FP32)
        memcpy((float *)out + start, in, (size_t)count * sizeof(float));
    else if (type == BF16)
        for (int64_t k = 0; k < count; k++) store_float(BF16, out, start + k, in[k]);
    else
        for (int64_t k = 0; k < count; k++) store_float(FP16, out, start + k, in[k]);
}

static inline void store_sum(const Sparse *p, int64_t token, int64_t row, float sum) {
    if (p->bias) sum += load_float(p->bias_type, p->bias, row);
    store_float(p->x_type, p->y, token * p->outs + row, sum);
}
