/* Activations, quantised to int8 or turned to fp32, once per layer and token. */

/* The reciprocal first, as PyTorch computes 127 / x. A NaN or an infinity among the activations must reach the output,
   as it does in a dense layer: its step is NaN. */
static inline float quantization_scale(uint32_t largest_bits, float *step) {
    float largest = bits_to_float(largest_bits), s = 1.0f / (largest < 1e-5f ? 1e-5f : largest) * 127.0f;
    *step = largest_bits >= 0x7F800000u ? NAN : 1.0f / s;
    return s;
}

static void quantize_group_portable(const float *x, int64_t start, int64_t stop, const Problem *p, int64_t token,
                                    int64_t first, int64_t last) {
    uint32_t largest = 0;
    for (int64_t k = start; k < stop; k++) {
        uint32_t magnitude = float_to_bits(x[k]) & 0x7FFFFFFFu;
        largest = magnitude > largest ? magnitude : largest;
    }
    float step, s = quantization_scale(largest, &step);
    int finite = largest < 0x7F800000u;
    for (int64_t i = first; i < last; i++) {
        const Segment *segment = p->segments + i;
        int8_t *out = p->codes + first_code(p, token, segment);
        int32_t total = 0;
        for (int64_t k = 0; k < segment->length; k++) {
            int32_t code = finite ? (int32_t)rintf(x[segment->start + k] * s) : 0;
            code = code > 127 ? 127 : code < -128 ? -128 : code;
            out[k] = (int8_t)code;
            total += code;
        }
        memset(out + segment->length, 0, (size_t)(segment->padded - segment->length));
        p->step[at(p, token, i)] = step;
        p->code_sum[at(p, token, i)] = total;
        p->sum[at(p, token, i)] = step * (float)total;
    }
}

#ifdef HAVE_X86
AVX2 static inline float hsum8(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

AVX2 static inline __m128 hsum8x4(__m256 a, __m256 b, __m256 c, __m256 d) {
    __m256 v = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
}

AVX2 static void quantize_group_avx2(const float *x, int64_t start, int64_t stop, const Problem *p, int64_t token,
                                     int64_t first, int64_t last) {
    const __m256i magnitude_bits = _mm256_set1_epi32(0x7FFFFFFF);
    __m256i top = _mm256_setzero_si256();
    int64_t k = start;
    for (; k + 8 <= stop; k += 8)
        top = _mm256_max_epu32(
            top, _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(x + k)), magnitude_bits));
    uint32_t lanes[8], largest = 0;
    _mm256_storeu_si256((__m256i *)lanes, top);
    for (int i = 0; i < 8; i++) largest = lanes[i] > largest ? lanes[i] : largest;
    for (; k < stop; k++) {
        uint32_t magnitude = float_to_bits(x[k]) & 0x7FFFFFFFu;
        largest = magnitude > largest ? magnitude : largest;
    }
    float step, s = quantization_scale(largest, &step);
    int finite = largest < 0x7F800000u;
    const __m256 factor = _mm256_set1_ps(s);
    for (int64_t i = first; i < last; i++) {
        const Segment *segment = p->segments + i;
        const float *in = x + segment->start;
        int8_t *out = p->codes + first_code(p, token, segment);
        __m256i totals = _mm256_setzero_si256();
        int64_t j = 0;
        for (; j + 8 <= segment->length; j += 8) {
            __m256i code = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(in + j), factor));
            __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
            _mm_storel_epi64((__m128i *)(out + j), _mm_packs_epi16(words, words));
            totals = _mm256_add_epi32(totals, code);
        }
        int32_t parts[8], total = 0;
        _mm256_storeu_si256((__m256i *)parts, totals);
        if (finite)
            for (int l = 0; l < 8; l++) total += parts[l];
        for (; j < segment->length; j++) {
            int32_t code = finite ? (int32_t)rintf(in[j] * s) : 0;
            code = code > 127 ? 127 : code < -128 ? -128 : code;
            out[j] = (int8_t)code;
            total += code;
        }
        memset(out + segment->length, 0, (size_t)(segment->padded - segment->length));
        p->step[at(p, token, i)] = step;
        p->code_sum[at(p, token, i)] = total;
        p->sum[at(p, token, i)] = step * (float)total;
    }
}
#endif

static void prepare_token(const Problem *p, int64_t token, float *buffer, int isa) {
    const float *x = buffer;
    if (p->x_type == FP32)
        x = (const float *)p->x + token * p->columns;
    else
        to_float(isa, p->x_type, p->x, token * p->columns, p->columns, buffer);
    int64_t first = 0;
    while (first < p->segment_count) {
        const Segment *segment = p->segments + first;
        int64_t last = first + 1;
        if (p->values) {
            float *out = p->values + first_code(p, token, segment), total = 0.0f;
            memcpy(out, x + segment->start, (size_t)segment->length * sizeof(float));
            memset(out + segment->length, 0, (size_t)(segment->padded - segment->length) * sizeof(float));
            for (int64_t k = 0; p->offset && k < segment->length; k++) total += out[k];
            p->step[at(p, token, first)] = 1.0f;
            p->sum[at(p, token, first)] = total;
        } else {
            while (last < p->segment_count && p->segments[last].group == segment->group) last++;
            int64_t stop = p->segments[last - 1].start + p->segments[last - 1].length;
#ifdef HAVE_X86
            if (isa >= ISA_AVX2)
                quantize_group_avx2(x, segment->start, stop, p, token, first, last);
            else
#endif
                quantize_group_portable(x, segment->start, stop, p, token, first, last);
        }
        first = last;
    }
    (void)isa;
}
