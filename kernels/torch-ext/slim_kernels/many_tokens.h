/* Lanes along rows: more tokens. */

#ifdef HAVE_X86
/* table[group][plane][lane] of a (outs, groups) matrix for `width` packed rows from `row`. Lanes past the last output
   repeat it; their results are never stored. */
AVX2 static void load_table(const Problem *p, int type, const void *matrix, int64_t row, int64_t width,
                            const float *factor, float *table) {
    for (int64_t lanes = 0; lanes < 4 * width; lanes += 8) {
        const int plane = (int)(lanes / width);
        const __m256 by = _mm256_set1_ps(factor[plane]);
        int64_t index[8], group = 0;
        for (int64_t lane = 0; lane < 8; lane++) {
            int64_t packed = row + lanes % width + lane, out = packed + plane * p->rows;
            index[lane] = (packed < p->rows && out < p->outs ? out : p->outs - 1) * p->groups;
        }
        for (; group + 8 <= p->groups; group += 8) {
            __m256i a[8];
            for (int i = 0; i < 8; i++)
                a[i] = _mm256_castps_si256(_mm256_mul_ps(load8(type, matrix, index[i] + group), by));
            transpose8(a);
            for (int i = 0; i < 8; i++)
                _mm256_storeu_si256((__m256i *)(table + (group + i) * 4 * width + lanes), a[i]);
        }
        for (; group < p->groups; group++)
            for (int i = 0; i < 8; i++)
                table[group * 4 * width + lanes + i] = load_float(type, matrix, index[i] + group) * factor[plane];
    }
}

AVX2 static void load_tables(const Problem *p, int64_t row, int64_t width, const float *factor, Scratch *s) {
    static const float one[4] = {1, 1, 1, 1};
    for (int64_t lane = 0; p->bias && lane < 4 * width; lane++) {
        int64_t packed = row + lane % width, out = packed + lane / width * p->rows;
        s->bias[lane] = packed < p->rows && out < p->outs ? bias_at(p, out) : 0.0f;
    }
    for (int64_t lane = 0; p->per_tensor && lane < 4 * width; lane++)
        s->scale[lane] = scale_at(p, 0, 0) * factor[lane / width];
    if (!p->per_tensor) load_table(p, p->scale_type, p->scale, row, width, factor, s->scale);
    if (p->offset) load_table(p, p->offset_type, p->offset, row, width, one, s->offset);
}

static void row_pointers(const Problem *p, int64_t row, int64_t width, const Scratch *s, const uint8_t **pointers) {
    for (int64_t lane = 0; lane < width; lane++)
        pointers[lane] = readable_row(p, row + lane < p->rows ? row + lane : row, s->row_copy[lane]);
}

AVX2 static void store_block(const Problem *p, int64_t row, int64_t width, int64_t first, int64_t last,
                             const Scratch *s) {
    for (int plane = 0; plane < 4; plane++) {
        int64_t out = row + plane * p->rows, room = p->outs - out < p->rows - row ? p->outs - out : p->rows - row;
        for (int64_t token = first; token < last; token++) {
            const float *sums = s->accumulator + ((token - first) * 4 + plane) * width;
            int64_t lane = 0;
            for (; lane + 8 <= width && lane + 8 <= room; lane += 8)
                store8(p->x_type, p->y, token * p->outs + out + lane, _mm256_loadu_ps(sums + lane));
            for (; lane < width && lane < room; lane++)
                store_float(p->x_type, p->y, token * p->outs + out + lane, sums[lane]);
        }
    }
}

AVX2 static void unpack_tile_avx2(const uint8_t **rows, const Segment *segment, uint8_t *tile) {
    const __m256i low = _mm256_set1_epi8(3);
    for (int64_t k = 0; k < segment->padded; k += 32) {
        __m256i a[8];
        for (int i = 0; i < 8; i++) a[i] = _mm256_loadu_si256((const __m256i *)(rows[i] + segment->start + k));
        transpose8(a);
        for (int j = 0; j < 8; j++, tile += 128) {
            _mm256_store_si256((__m256i *)tile, _mm256_and_si256(a[j], low));
            _mm256_store_si256((__m256i *)(tile + 32), _mm256_and_si256(_mm256_srli_epi16(a[j], 2), low));
            _mm256_store_si256((__m256i *)(tile + 64), _mm256_and_si256(_mm256_srli_epi16(a[j], 4), low));
            _mm256_store_si256((__m256i *)(tile + 96), _mm256_and_si256(_mm256_srli_epi16(a[j], 6), low));
        }
    }
}

/* One token against two planes. In assembly, or GCC 12 spills most of the twelve accumulators. */
#define STEP_AVX2(t)                                                                                                   \
    __asm__("vpbroadcastd %[x], %[b]\n\tvpmaddubsw %[b], %[w0], %[m]\n\tvpaddw %[m], %[l], %[l]\n\t"                 \
            "vpmaddubsw %[b], %[w1], %[b]\n\tvpaddw %[b], %[h], %[h]"                                                  \
            : [l] "+x"(l##t), [h] "+x"(h##t), [b] "=&x"(broadcast), [m] "=&x"(product)                                 \
            : [x] "m"(*(const int32_t *)(x + (t) * stride)), [w0] "x"(w0), [w1] "x"(w1))

/* What a micro-kernel reads and writes for its tokens, besides the tile: sums[token][plane][lane] accumulate. */
typedef struct {
    const int8_t *x; /* token rows, `stride` apart */
    int64_t stride;
    const int32_t *code_sum;
    const float *step, *sum, *scale, *offset; /* offset may be NULL */
    float *sums;
} Strip;

AVX2 static inline void flush_avx2(const Strip *strip, int token, int half, __m256i acc) {
    float *out = strip->sums + token * 32 + half * 8;
    const __m256 worth = _mm256_mul_ps(_mm256_set1_ps(strip->step[token]), _mm256_loadu_ps(strip->scale + half * 8));
    __m256i codes = _mm256_madd_epi16(acc, _mm256_set1_epi16(1));
    codes = _mm256_sub_epi32(codes, _mm256_set1_epi32(strip->code_sum[token]));
    __m256 total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(codes), worth, _mm256_loadu_ps(out));
    if (strip->offset)
        total = _mm256_fmadd_ps(_mm256_set1_ps(strip->sum[token]), _mm256_loadu_ps(strip->offset + half * 8), total);
    _mm256_storeu_ps(out, total);
}

/* Up to six tokens against two planes of eight rows, at most 64 steps (256 columns): the int16 sums stay within
   64 * 2 * (2 * 127) = 32512. */
#define MICRO_AVX2(name, STEPS, FLUSHES)                                                                               \
    AVX2 static void name(const uint8_t *tile, const Strip *strip) {                                                   \
        __m256i l0 = _mm256_setzero_si256(), l1 = l0, l2 = l0, l3 = l0, l4 = l0, l5 = l0;                              \
        __m256i h0 = l0, h1 = l0, h2 = l0, h3 = l0, h4 = l0, h5 = l0, broadcast, product;                              \
        const int64_t stride = strip->stride;                                                                          \
        for (const int8_t *x = strip->x, *stop = x + stride; x < stop; x += 4, tile += 128) {                          \
            const __m256i w0 = _mm256_load_si256((const __m256i *)tile);                                               \
            const __m256i w1 = _mm256_load_si256((const __m256i *)tile + 1);                                           \
            STEPS                                                                                                      \
        }                                                                                                              \
        FLUSHES                                                                                                        \
        (void)l1, (void)l2, (void)l3, (void)l4, (void)l5, (void)h1, (void)h2, (void)h3, (void)h4, (void)h5;            \
    }
#define STEPS_1 STEP_AVX2(0);
#define STEPS_2 STEPS_1 STEP_AVX2(1);
#define STEPS_3 STEPS_2 STEP_AVX2(2);
#define STEPS_4 STEPS_3 STEP_AVX2(3);
#define STEPS_5 STEPS_4 STEP_AVX2(4);
#define STEPS_6 STEPS_5 STEP_AVX2(5);
#define FLUSH_AVX2(t) flush_avx2(strip, t, 0, l##t), flush_avx2(strip, t, 1, h##t);
#define FLUSHES_1 FLUSH_AVX2(0)
#define FLUSHES_2 FLUSHES_1 FLUSH_AVX2(1)
#define FLUSHES_3 FLUSHES_2 FLUSH_AVX2(2)
#define FLUSHES_4 FLUSHES_3 FLUSH_AVX2(3)
#define FLUSHES_5 FLUSHES_4 FLUSH_AVX2(4)
#define FLUSHES_6 FLUSHES_5 FLUSH_AVX2(5)
MICRO_AVX2(micro1_avx2, STEPS_1, FLUSHES_1)
MICRO_AVX2(micro2_avx2, STEPS_2, FLUSHES_2)
MICRO_AVX2(micro3_avx2, STEPS_3, FLUSHES_3)
MICRO_AVX2(micro4_avx2, STEPS_4, FLUSHES_4)
MICRO_AVX2(micro5_avx2, STEPS_5, FLUSHES_5)
MICRO_AVX2(micro6_avx2, STEPS_6, FLUSHES_6)

/* Tokens are cut into strips of nearly equal size: 7 is 4 + 3 rather than 6 + 1. */
static inline int64_t strip_size(int64_t tokens, int64_t most) {
    int64_t strips = (tokens + most - 1) / most;
    return (tokens + strips - 1) / strips;
}

static inline Strip strip_at(const Problem *p, const Segment *segment, int64_t width, int64_t first, int64_t token,
                             const Scratch *s) {
    int64_t index = at(p, token, segment - p->segments), table = segment->group * 4 * width;
    return (Strip){p->codes + first_code(p, token, segment), segment->padded, p->code_sum + index, p->step + index,
                   p->sum + index, s->scale + table, p->offset ? s->offset + table : NULL,
                   s->accumulator + (token - first) * 4 * width};
}

/* The accumulators start at the bias. */
AVX2 static void start_sums(const Problem *p, int64_t width, int64_t tokens, const Scratch *s) {
    if (!p->bias) memset(s->accumulator, 0, (size_t)(tokens * 4 * width) * sizeof(float));
    for (int64_t token = 0; p->bias && token < tokens; token++)
        memcpy(s->accumulator + token * 4 * width, s->bias, (size_t)(4 * width) * sizeof(float));
}

AVX2 static void block_avx2(const Problem *p, int64_t row, int64_t first, int64_t last, Scratch *s) {
    static const float factor[4] = {1, 1, 1, 1};
    static void (*const micro[])(const uint8_t *, const Strip *) = {
        NULL, micro1_avx2, micro2_avx2, micro3_avx2, micro4_avx2, micro5_avx2, micro6_avx2};
    const uint8_t *rows[MAX_ROWS];
    row_pointers(p, row, 8, s, rows);
    load_tables(p, row, 8, factor, s);
    start_sums(p, 8, last - first, s);
    for (int64_t i = 0; i < p->segment_count; i++) {
        const Segment *segment = p->segments + i;
        unpack_tile_avx2(rows, segment, s->tile);
        for (int64_t token = first, tokens; token < last; token += tokens) {
            tokens = strip_size(last - token, 6);
            Strip strip = strip_at(p, segment, 8, first, token, s);
            micro[tokens](s->tile, &strip);
            strip.scale += 16, strip.sums += 16, strip.offset += strip.offset ? 16 : 0;
            micro[tokens](s->tile + 64, &strip);
        }
    }
    store_block(p, row, 8, first, last, s);
}

AVX512 static void transpose_tile_avx512(const uint8_t **rows, const Segment *segment, uint8_t *tile) {
    for (int64_t k = 0; k < segment->padded; k += 64, tile += 1024) {
        __m512i a[16];
        for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(rows[i] + segment->start + k);
        transpose16(a);
        for (int i = 0; i < 16; i++) _mm512_store_si512(tile + 64 * i, a[i]);
    }
}

AVX512 static inline void flush_avx512(const Strip *strip, int token, int plane, __m512i acc) {
    float *out = strip->sums + token * 64 + plane * 16;
    const __m512 worth = _mm512_mul_ps(_mm512_set1_ps(strip->step[token]), _mm512_loadu_ps(strip->scale + plane * 16));
    __m512 total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc), worth, _mm512_loadu_ps(out));
    if (strip->offset)
        total = _mm512_fmadd_ps(_mm512_set1_ps(strip->sum[token]), _mm512_loadu_ps(strip->offset + plane * 16), total);
    _mm512_storeu_ps(out, total);
}

/* `tokens` (a constant where this is inlined) against four planes of sixteen rows. In assembly, or GCC 12 keeps half of
   the accumulators in memory. */
AVX512 static inline __attribute__((always_inline)) void micro_avx512(const int tokens, const uint8_t *tile,
                                                                      const Strip *strip) {
    const __m512i masks[4] = {_mm512_set1_epi8(3), _mm512_set1_epi8(12), _mm512_set1_epi8(48),
                              _mm512_set1_epi8((char)192)};
    const int64_t stride = strip->stride;
    __m512i acc[6][4];
    UNROLL for (int t = 0; t < tokens; t++) {
        const int32_t start = -strip->code_sum[t];
        UNROLL for (int plane = 0; plane < 4; plane++) acc[t][plane] = _mm512_set1_epi32(start * (1 << 2 * plane));
    }
    for (const int8_t *x = strip->x, *stop = x + stride; x < stop; x += 4, tile += 64) {
        __m512i w0, w1, w2, w3, q;
        __asm__("vmovdqa64 %[tile], %[w3]\n\tvpandd %[m0], %[w3], %[w0]\n\tvpandd %[m1], %[w3], %[w1]\n\t"
                "vpandd %[m2], %[w3], %[w2]\n\tvpandd %[m3], %[w3], %[w3]"
                : [w0] "=&v"(w0), [w1] "=&v"(w1), [w2] "=&v"(w2), [w3] "=&v"(w3)
                : [tile] "m"(*(const __m512i *)tile), [m0] "m"(masks[0]), [m1] "m"(masks[1]), [m2] "m"(masks[2]),
                  [m3] "m"(masks[3]));
        UNROLL for (int t = 0; t < tokens; t++)
            __asm__("vpbroadcastd %[x], %[q]\n\tvpdpbusd %[q], %[w0], %[a]\n\tvpdpbusd %[q], %[w1], %[b]\n\t"
                    "vpdpbusd %[q], %[w2], %[c]\n\tvpdpbusd %[q], %[w3], %[d]"
                    : [a] "+v"(acc[t][0]), [b] "+v"(acc[t][1]), [c] "+v"(acc[t][2]), [d] "+v"(acc[t][3]), [q] "=&v"(q)
                    : [x] "m"(*(const int32_t *)(x + t * stride)), [w0] "v"(w0), [w1] "v"(w1), [w2] "v"(w2),
                      [w3] "v"(w3));
    }
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int plane = 0; plane < 4; plane++) flush_avx512(strip, t, plane, acc[t][plane]);
}

AVX512 static void micro1_avx512(const uint8_t *tile, const Strip *strip) { micro_avx512(1, tile, strip); }
AVX512 static void micro2_avx512(const uint8_t *tile, const Strip *strip) { micro_avx512(2, tile, strip); }
AVX512 static void micro3_avx512(const uint8_t *tile, const Strip *strip) { micro_avx512(3, tile, strip); }
AVX512 static void micro4_avx512(const uint8_t *tile, const Strip *strip) { micro_avx512(4, tile, strip); }
AVX512 static void micro5_avx512(const uint8_t *tile, const Strip *strip) { micro_avx512(5, tile, strip); }
AVX512 static void micro6_avx512(const uint8_t *tile, const Strip *strip) { micro_avx512(6, tile, strip); }

AVX512 static void block_avx512(const Problem *p, int64_t row, int64_t first, int64_t last, Scratch *s) {
    static const float factor[4] = {1, 0.25f, 0.0625f, 0.015625f};
    static void (*const micro[])(const uint8_t *, const Strip *) = {
        NULL, micro1_avx512, micro2_avx512, micro3_avx512, micro4_avx512, micro5_avx512, micro6_avx512};
    const uint8_t *rows[MAX_ROWS];
    row_pointers(p, row, 16, s, rows);
    load_tables(p, row, 16, factor, s);
    start_sums(p, 16, last - first, s);
    for (int64_t i = 0; i < p->segment_count; i++) {
        const Segment *segment = p->segments + i;
        transpose_tile_avx512(rows, segment, s->tile);
        for (int64_t token = first, tokens; token < last; token += tokens) {
            tokens = strip_size(last - token, 6);
            const Strip strip = strip_at(p, segment, 16, first, token, s);
            micro[tokens](s->tile, &strip);
        }
    }
    store_block(p, row, 16, first, last, s);
}
#endif
