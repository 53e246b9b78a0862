/* Lanes along columns: a few tokens. */

static void store_planes(const Problem *p, int64_t row, int64_t token, const float *sums) {
    for (int plane = 0; plane < 4; plane++) {
        int64_t out = row + plane * p->rows;
        if (out < p->outs) store_float(p->x_type, p->y, token * p->outs + out, sums[plane] + bias_at(p, out));
    }
}

/* coefficients[plane][segment] = what an accumulator unit is worth; corrections[plane] = what the accumulators miss. */
static void coefficients_portable(const Problem *p, int64_t row, int64_t token, int64_t from, const float *factor,
                                  float *coefficients, float *corrections) {
    for (int plane = 0; plane < 4; plane++) {
        int64_t out = row + plane * p->rows;
        if (from == 0) corrections[plane] = 0.0f;
        for (int64_t i = from; i < p->segment_count; i++) {
            int64_t group = p->segments[i].group, index = at(p, token, i);
            float scale = out < p->outs ? scale_at(p, out, group) : 0.0f;
            float offset = out < p->outs ? offset_at(p, out, group) : 0.0f;
            coefficients[plane * p->segment_count + i] = scale * p->step[index] * factor[plane];
            corrections[plane] += (p->values ? offset : offset - scale) * p->sum[index];
        }
    }
}

static void rows_portable(const Problem *p, int64_t begin, int64_t end, const Scratch *scratch) {
    static const float factor[4] = {1, 1, 1, 1};
    for (int64_t row = begin; row < end; row++) {
        const uint8_t *weight = p->weight + row * p->columns;
        for (int64_t token = 0; token < p->tokens; token++) {
            float sums[4];
            coefficients_portable(p, row, token, 0, factor, scratch->scale, sums);
            for (int64_t i = 0; i < p->segment_count; i++) {
                const Segment *segment = p->segments + i;
                const uint8_t *w = weight + segment->start;
                const float *c = scratch->scale + i;
                int64_t first = first_code(p, token, segment), stride = p->segment_count;
                if (p->values) {
                    const float *x = p->values + first;
                    float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
                    for (int64_t k = 0; k < segment->length; k++) {
                        s0 += (float)((w[k] & 3) - 1) * x[k];
                        s1 += (float)((w[k] >> 2 & 3) - 1) * x[k];
                        s2 += (float)((w[k] >> 4 & 3) - 1) * x[k];
                        s3 += (float)((w[k] >> 6) - 1) * x[k];
                    }
                    sums[0] += c[0] * s0, sums[1] += c[stride] * s1;
                    sums[2] += c[2 * stride] * s2, sums[3] += c[3 * stride] * s3;
                } else {
                    const int8_t *x = p->codes + first;
                    int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
                    for (int64_t k = 0; k < segment->length; k++) {
                        s0 += (w[k] & 3) * x[k];
                        s1 += (w[k] >> 2 & 3) * x[k];
                        s2 += (w[k] >> 4 & 3) * x[k];
                        s3 += (w[k] >> 6) * x[k];
                    }
                    sums[0] += c[0] * (float)s0, sums[1] += c[stride] * (float)s1;
                    sums[2] += c[2 * stride] * (float)s2, sums[3] += c[3 * stride] * (float)s3;
                }
            }
            store_planes(p, row, token, sums);
        }
    }
}

#ifdef HAVE_X86
/* Bytes between a load of the weight and the prefetch for a later one, into L2: into L1 it pushes long activations out. */
enum { PREFETCH = 8192 };

/* Where the scales and offsets of one packed row lie, to be prefetched little by little during the row before it: all
   at once they would hold up the weights. */
typedef struct {
    const char *scale[4], *offset[4];
    int64_t scale_bytes, offset_bytes;
} NextScales;

static inline NextScales next_scales(const Problem *p, int64_t row) {
    NextScales next = {.scale_bytes = p->scale_type == FP32 ? 4 : 2, .offset_bytes = p->offset_type == FP32 ? 4 : 2};
    for (int plane = 0; plane < 4; plane++) {
        int64_t out = row + plane * p->rows, index = (out < p->outs ? out : p->outs - 1) * p->groups;
        next.scale[plane] = (const char *)p->scale + index * next.scale_bytes;
        next.offset[plane] = p->offset ? (const char *)p->offset + index * next.offset_bytes : next.scale[plane];
    }
    return next;
}

AVX2 static void coefficients_avx2(const Problem *p, int64_t row, int64_t token, const float *factor,
                                   float *coefficients, float *corrections) {
    int64_t count = p->segment_count, done = 0;
    for (int plane = 0; plane < 4; plane++) corrections[plane] = 0.0f;
    if (!p->per_tensor && count == p->groups && count >= 8) {
        done = count & ~(int64_t)7;
        const float *step = p->step + at(p, token, 0), *sum = p->sum + at(p, token, 0);
        for (int plane = 0; plane < 4; plane++) {
            int64_t out = row + plane * p->rows;
            if (out >= p->outs) {
                memset(coefficients + plane * count, 0, (size_t)count * sizeof(float));
                continue;
            }
            const __m256 plane_factor = _mm256_set1_ps(factor[plane]);
            __m256 missing = _mm256_setzero_ps();
            for (int64_t i = 0; i < done; i += 8) {
                __m256 scale = load8(p->scale_type, p->scale, out * count + i), total = _mm256_loadu_ps(sum + i);
                __m256 worth = _mm256_mul_ps(_mm256_mul_ps(scale, _mm256_loadu_ps(step + i)), plane_factor);
                _mm256_storeu_ps(coefficients + plane * count + i, worth);
                if (!p->values) missing = _mm256_fnmadd_ps(scale, total, missing);
                if (p->offset) missing = _mm256_fmadd_ps(load8(p->offset_type, p->offset, out * count + i), total, missing);
            }
            corrections[plane] = hsum8(missing);
        }
    }
    if (done < count) {
        float rest[4] = {0, 0, 0, 0};
        coefficients_portable(p, row, token, done, factor, coefficients, done ? rest : corrections);
        for (int plane = 0; plane < 4; plane++) corrections[plane] += rest[plane];
    }
}

/* int16 sums of at most 8 steps: |sum| <= 8 * 2 * (8 * 128) = 16384, since the largest code in place is 2 * 4. */
AVX2 static void rows_avx2(const Problem *p, int64_t begin, int64_t end, const Scratch *scratch) {
    static const float factor[4] = {1, 0.25f, 1, 0.25f};
    const __m256i low = _mm256_set1_epi8(3), high = _mm256_set1_epi8(12), ones = _mm256_set1_epi16(1);
    const int64_t count = p->segment_count;
    for (int64_t row = begin; row < end; row++) {
        const uint8_t *weight = readable_row(p, row, scratch->row_copy[0]);
        const NextScales next = next_scales(p, row + 1);
        for (int64_t token = 0; token < p->tokens; token++) {
            float sums[4];
            coefficients_avx2(p, row, token, factor, scratch->scale, sums);
            __m256 f0 = _mm256_setzero_ps(), f1 = f0, f2 = f0, f3 = f0;
            for (int64_t i = 0; i < count; i++) {
                const Segment *segment = p->segments + i;
                const float *c = scratch->scale + i;
                const uint8_t *w = weight + segment->start, *stop = w + segment->padded;
                const int8_t *x = p->codes + first_code(p, token, segment);
                const __m256 c0 = _mm256_set1_ps(c[0]), c1 = _mm256_set1_ps(c[count]);
                const __m256 c2 = _mm256_set1_ps(c[2 * count]), c3 = _mm256_set1_ps(c[3 * count]);
                if (i % 4 == 0) {
                    _mm_prefetch(next.scale[i / 4 % 4] + i / 16 * 16 * next.scale_bytes, _MM_HINT_T0);
                    _mm_prefetch(next.offset[i / 4 % 4] + i / 16 * 16 * next.offset_bytes, _MM_HINT_T0);
                }
                while (w < stop) {
                    const uint8_t *pause = stop - w > 256 ? w + 256 : stop;
                    __m256i a0 = _mm256_setzero_si256(), a1 = a0, a2 = a0, a3 = a0;
                    for (; w < pause; w += 64, x += 64) {
                        _mm_prefetch((const char *)w + PREFETCH, _MM_HINT_T1);
                        __m256i v = _mm256_loadu_si256((const __m256i *)w), q = _mm256_loadu_si256((const __m256i *)x);
                        __m256i u = _mm256_srli_epi16(v, 4);
                        a0 = _mm256_add_epi16(a0, _mm256_maddubs_epi16(_mm256_and_si256(v, low), q));
                        a1 = _mm256_add_epi16(a1, _mm256_maddubs_epi16(_mm256_and_si256(v, high), q));
                        a2 = _mm256_add_epi16(a2, _mm256_maddubs_epi16(_mm256_and_si256(u, low), q));
                        a3 = _mm256_add_epi16(a3, _mm256_maddubs_epi16(_mm256_and_si256(u, high), q));
                        v = _mm256_loadu_si256((const __m256i *)(w + 32));
                        q = _mm256_loadu_si256((const __m256i *)(x + 32));
                        u = _mm256_srli_epi16(v, 4);
                        a0 = _mm256_add_epi16(a0, _mm256_maddubs_epi16(_mm256_and_si256(v, low), q));
                        a1 = _mm256_add_epi16(a1, _mm256_maddubs_epi16(_mm256_and_si256(v, high), q));
                        a2 = _mm256_add_epi16(a2, _mm256_maddubs_epi16(_mm256_and_si256(u, low), q));
                        a3 = _mm256_add_epi16(a3, _mm256_maddubs_epi16(_mm256_and_si256(u, high), q));
                    }
                    f0 = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_madd_epi16(a0, ones)), c0, f0);
                    f1 = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_madd_epi16(a1, ones)), c1, f1);
                    f2 = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_madd_epi16(a2, ones)), c2, f2);
                    f3 = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_madd_epi16(a3, ones)), c3, f3);
                }
            }
            _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), hsum8x4(f0, f1, f2, f3)));
            store_planes(p, row, token, sums);
        }
    }
}

AVX512 static inline __m256 fold(__m512 v) {
    return _mm256_add_ps(_mm512_castps512_ps256(v),
                         _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
}

AVX512 static inline __m512 load16(int type, const void *base, int64_t index, __mmask16 lanes) {
    if (type == FP32) return _mm512_maskz_loadu_ps(lanes, (const float *)base + index);
    __m256i half = _mm256_maskz_loadu_epi16(lanes, (const uint16_t *)base + index);
    if (type == FP16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* coefficients_portable for segments that are groups. */
AVX512 static void coefficients_avx512(const Problem *p, int64_t row, int64_t token, const float *factor,
                                       float *coefficients, float *corrections) {
    const int64_t count = p->segment_count;
    if (p->per_tensor || count != p->groups || count < 4) {
        coefficients_portable(p, row, token, 0, factor, coefficients, corrections);
        return;
    }
    const float *step = p->step + at(p, token, 0), *sum = p->sum + at(p, token, 0);
    __m256 missing[4];
    for (int plane = 0; plane < 4; plane++) {
        const int64_t row_out = row + plane * p->rows, out = row_out < p->outs ? row_out : p->outs - 1;
        const __m512 by = _mm512_set1_ps(factor[plane]);
        __m512 miss = _mm512_setzero_ps();
        for (int64_t i = 0; i < count; i += 16) {
            const __mmask16 lanes = (__mmask16)(count - i < 16 ? (1u << (count - i)) - 1 : 0xFFFFu);
            const int64_t index = out * count + i;
            const __m512 total = _mm512_maskz_loadu_ps(lanes, sum + i), scale = load16(p->scale_type, p->scale, index, lanes);
            const __m512 worth = _mm512_mul_ps(scale, _mm512_mul_ps(by, _mm512_maskz_loadu_ps(lanes, step + i)));
            _mm512_mask_storeu_ps(coefficients + plane * count + i, lanes, worth);
            if (!p->values) miss = _mm512_fnmadd_ps(scale, total, miss);
            if (p->offset) miss = _mm512_fmadd_ps(load16(p->offset_type, p->offset, index, lanes), total, miss);
        }
        missing[plane] = fold(miss);
    }
    _mm_storeu_ps(corrections, hsum8x4(missing[0], missing[1], missing[2], missing[3]));
}

AVX512 static void rows_avx512(const Problem *p, int64_t begin, int64_t end, const Scratch *scratch) {
    static const float factor[4] = {1, 0.25f, 0.0625f, 0.015625f};
    const __m512i m0 = _mm512_set1_epi8(3), m1 = _mm512_set1_epi8(12);
    const __m512i m2 = _mm512_set1_epi8(48), m3 = _mm512_set1_epi8((char)192);
    const int64_t count = p->segment_count, groups_of_128 = p->group_size == 128 ? p->columns / 128 : 0;
    for (int64_t row = begin; row < end; row++) {
        const uint8_t *weight = readable_row(p, row, scratch->row_copy[0]);
        const NextScales next = next_scales(p, row + 1);
        for (int64_t token = 0; token < p->tokens; token++) {
            float sums[4];
            coefficients_avx512(p, row, token, factor, scratch->scale, sums);
            __m512 f0 = _mm512_setzero_ps(), f1 = f0, f2 = f0, f3 = f0;
            const int8_t *codes = p->codes + token * p->padded;
            const float *c0 = scratch->scale, *c1 = c0 + count, *c2 = c1 + count, *c3 = c2 + count;
            for (int64_t i = 0; i < groups_of_128; i++) {
                const uint8_t *w = weight + 128 * i;
                const __m512i v = _mm512_loadu_si512(w), q = _mm512_loadu_si512(codes + 128 * i);
                const __m512i u = _mm512_loadu_si512(w + 64), r = _mm512_loadu_si512(codes + 128 * i + 64);
                const __m512i zero = _mm512_setzero_si512();
                if (i % 4 == 0) {
                    _mm_prefetch(next.scale[i / 4 % 4] + i / 16 * 16 * next.scale_bytes, _MM_HINT_T0);
                    _mm_prefetch(next.offset[i / 4 % 4] + i / 16 * 16 * next.offset_bytes, _MM_HINT_T0);
                }
                _mm_prefetch((const char *)w + PREFETCH, _MM_HINT_T1);
                _mm_prefetch((const char *)w + PREFETCH + 64, _MM_HINT_T1);
                __m512i a0 = _mm512_dpbusd_epi32(zero, _mm512_and_si512(v, m0), q);
                __m512i a1 = _mm512_dpbusd_epi32(zero, _mm512_and_si512(v, m1), q);
                __m512i a2 = _mm512_dpbusd_epi32(zero, _mm512_and_si512(v, m2), q);
                __m512i a3 = _mm512_dpbusd_epi32(zero, _mm512_and_si512(v, m3), q);
                a0 = _mm512_dpbusd_epi32(a0, _mm512_and_si512(u, m0), r);
                a1 = _mm512_dpbusd_epi32(a1, _mm512_and_si512(u, m1), r);
                a2 = _mm512_dpbusd_epi32(a2, _mm512_and_si512(u, m2), r);
                a3 = _mm512_dpbusd_epi32(a3, _mm512_and_si512(u, m3), r);
                f0 = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a0), _mm512_set1_ps(c0[i]), f0);
                f1 = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a1), _mm512_set1_ps(c1[i]), f1);
                f2 = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a2), _mm512_set1_ps(c2[i]), f2);
                f3 = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a3), _mm512_set1_ps(c3[i]), f3);
            }
            for (int64_t i = groups_of_128; i < count; i++) {
                const Segment *segment = p->segments + i;
                const float *c = scratch->scale + i;
                const uint8_t *w = weight + segment->start, *stop = w + segment->padded;
                const int8_t *x = codes + segment->position;
                __m512i a0 = _mm512_setzero_si512(), a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0, b3 = a0;
                for (; w + 64 < stop; w += 128, x += 128) {
                    __m512i v = _mm512_loadu_si512(w), q = _mm512_loadu_si512(x);
                    __m512i u = _mm512_loadu_si512(w + 64), r = _mm512_loadu_si512(x + 64);
                    _mm_prefetch((const char *)w + PREFETCH, _MM_HINT_T1);
                    _mm_prefetch((const char *)w + PREFETCH + 64, _MM_HINT_T1);
                    a0 = _mm512_dpbusd_epi32(a0, _mm512_and_si512(v, m0), q);
                    a1 = _mm512_dpbusd_epi32(a1, _mm512_and_si512(v, m1), q);
                    a2 = _mm512_dpbusd_epi32(a2, _mm512_and_si512(v, m2), q);
                    a3 = _mm512_dpbusd_epi32(a3, _mm512_and_si512(v, m3), q);
                    b0 = _mm512_dpbusd_epi32(b0, _mm512_and_si512(u, m0), r);
                    b1 = _mm512_dpbusd_epi32(b1, _mm512_and_si512(u, m1), r);
                    b2 = _mm512_dpbusd_epi32(b2, _mm512_and_si512(u, m2), r);
                    b3 = _mm512_dpbusd_epi32(b3, _mm512_and_si512(u, m3), r);
                }
                if (w < stop) {
                    __m512i v = _mm512_loadu_si512(w), q = _mm512_loadu_si512(x);
                    _mm_prefetch((const char *)w + PREFETCH, _MM_HINT_T1);
                    a0 = _mm512_dpbusd_epi32(a0, _mm512_and_si512(v, m0), q);
                    a1 = _mm512_dpbusd_epi32(a1, _mm512_and_si512(v, m1), q);
                    a2 = _mm512_dpbusd_epi32(a2, _mm512_and_si512(v, m2), q);
                    a3 = _mm512_dpbusd_epi32(a3, _mm512_and_si512(v, m3), q);
                }
                f0 = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(a0, b0)), _mm512_set1_ps(c[0]), f0);
                f1 = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(a1, b1)), _mm512_set1_ps(c[count]), f1);
                f2 = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(a2, b2)), _mm512_set1_ps(c[2 * count]), f2);
                f3 = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(a3, b3)), _mm512_set1_ps(c[3 * count]), f3);
            }
            _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), hsum8x4(fold(f0), fold(f1), fold(f2), fold(f3))));
            store_planes(p, row, token, sums);
        }
    }
}

/* Weight-only: codes select -1, 0, 1 from a four-entry table inside each 128-bit lane. */
AVX2 static void float_rows_avx2(const Problem *p, int64_t begin, int64_t end, const Scratch *scratch) {
    static const float factor[4] = {1, 1, 1, 1};
    const __m256 table = _mm256_setr_ps(-1, 0, 1, 0, -1, 0, 1, 0);
    const int64_t count = p->segment_count;
    for (int64_t row = begin; row < end; row++) {
        const uint8_t *weight = readable_row(p, row, scratch->row_copy[0]);
        for (int64_t token = 0; token < p->tokens; token++) {
            float sums[4];
            coefficients_avx2(p, row, token, factor, scratch->scale, sums);
            __m256 f0 = _mm256_setzero_ps(), f1 = f0, f2 = f0, f3 = f0;
            for (int64_t i = 0; i < count; i++) {
                const Segment *segment = p->segments + i;
                const float *c = scratch->scale + i, *x = p->values + first_code(p, token, segment);
                const uint8_t *w = weight + segment->start;
                __m256 a0 = _mm256_setzero_ps(), a1 = a0, a2 = a0, a3 = a0;
                for (int64_t k = 0; k < segment->padded; k += 8) {
                    _mm_prefetch((const char *)w + k + PREFETCH / 4, _MM_HINT_T0);
                    __m256i v = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(w + k)));
                    __m256 q = _mm256_loadu_ps(x + k);
                    a0 = _mm256_fmadd_ps(_mm256_permutevar_ps(table, v), q, a0);
                    a1 = _mm256_fmadd_ps(_mm256_permutevar_ps(table, _mm256_srli_epi32(v, 2)), q, a1);
                    a2 = _mm256_fmadd_ps(_mm256_permutevar_ps(table, _mm256_srli_epi32(v, 4)), q, a2);
                    a3 = _mm256_fmadd_ps(_mm256_permutevar_ps(table, _mm256_srli_epi32(v, 6)), q, a3);
                }
                f0 = _mm256_fmadd_ps(a0, _mm256_set1_ps(c[0]), f0);
                f1 = _mm256_fmadd_ps(a1, _mm256_set1_ps(c[count]), f1);
                f2 = _mm256_fmadd_ps(a2, _mm256_set1_ps(c[2 * count]), f2);
                f3 = _mm256_fmadd_ps(a3, _mm256_set1_ps(c[3 * count]), f3);
            }
            _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), hsum8x4(f0, f1, f2, f3)));
            store_planes(p, row, token, sums);
        }
    }
}

AVX512 static void float_rows_avx512(const Problem *p, int64_t begin, int64_t end, const Scratch *scratch) {
    static const float factor[4] = {1, 1, 1, 1};
    const __m512 table = _mm512_broadcast_f32x4(_mm_setr_ps(-1, 0, 1, 0));
    const int64_t count = p->segment_count;
    for (int64_t row = begin; row < end; row++) {
        const uint8_t *weight = readable_row(p, row, scratch->row_copy[0]);
        for (int64_t token = 0; token < p->tokens; token++) {
            float sums[4];
            coefficients_avx512(p, row, token, factor, scratch->scale, sums);
            __m512 f0 = _mm512_setzero_ps(), f1 = f0, f2 = f0, f3 = f0;
            for (int64_t i = 0; i < count; i++) {
                const Segment *segment = p->segments + i;
                const float *c = scratch->scale + i, *x = p->values + first_code(p, token, segment);
                const uint8_t *w = weight + segment->start;
                __m512 a0 = _mm512_setzero_ps(), a1 = a0, a2 = a0, a3 = a0;
                for (int64_t k = 0; k < segment->padded; k += 16) {
                    _mm_prefetch((const char *)w + k + PREFETCH / 2, _MM_HINT_T0);
                    __m512i v = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(w + k)));
                    __m512 q = _mm512_loadu_ps(x + k);
                    a0 = _mm512_fmadd_ps(_mm512_permutevar_ps(table, v), q, a0);
                    a1 = _mm512_fmadd_ps(_mm512_permutevar_ps(table, _mm512_srli_epi32(v, 2)), q, a1);
                    a2 = _mm512_fmadd_ps(_mm512_permutevar_ps(table, _mm512_srli_epi32(v, 4)), q, a2);
                    a3 = _mm512_fmadd_ps(_mm512_permutevar_ps(table, _mm512_srli_epi32(v, 6)), q, a3);
                }
                f0 = _mm512_fmadd_ps(a0, _mm512_set1_ps(c[0]), f0);
                f1 = _mm512_fmadd_ps(a1, _mm512_set1_ps(c[count]), f1);
                f2 = _mm512_fmadd_ps(a2, _mm512_set1_ps(c[2 * count]), f2);
                f3 = _mm512_fmadd_ps(a3, _mm512_set1_ps(c[3 * count]), f3);
            }
            _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), hsum8x4(fold(f0), fold(f1), fold(f2), fold(f3))));
            store_planes(p, row, token, sums);
        }
    }
}
#endif
