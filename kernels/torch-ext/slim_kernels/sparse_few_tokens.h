/* Included twice by sparse_avx512.h: with PAIRS 0 weights are multiplied in fp32, with PAIRS 1 in bf16, two columns per
   32-bit lane and fp32 sums (AVX-512 BF16), which needs bf16 activations and weights that bf16 holds exactly. */

/* Rows [begin, end) in two halves side by side, each of which reads memory in order. An odd last row is done twice. */
FEW_TOKENS __attribute__((always_inline)) static inline void NAME(rows)(const Sparse *p, Batch batch, int64_t begin,
                                                                        int64_t end, const RowScratch *scratch,
                                                                        const int kind, const int tokens) {
    Unpacking u;
    set_unpacking(&u, p->bits ? p->bits : 8);
    /* Sums per token: a single one would wait for itself. */
    const int chains = tokens > 2 ? 1 : tokens == 2 || PAIRS ? 2 : 4;
    const int64_t length = (end - begin + STREAMS - 1) / STREAMS, group_blocks = p->groups == 1 ? p->blocks : p->group_size / 64;
    for (int64_t i = 0; i < length; i++) {
        Stream s[STREAMS];
        __m512 total[STREAMS][MAX_TOKENS], sum[STREAMS][MAX_TOKENS];
        for (int r = 0; r < STREAMS; r++) {
            s[r].row = begin + r * length + i < end ? begin + r * length + i : end - 1;
            const Row found = find_row(p, s[r].row, scratch + r, 1);
            s[r].mask = found.mask, s[r].values = found.values, s[r].position = 0;
            for (int t = 0; t < tokens; t++) total[r][t] = _mm512_setzero_ps();
        }
        const char *x = batch.x;
        for (int64_t block = 0, group = 0; block < p->blocks; group++) {
            UNROLL for (int r = 0; r < STREAMS; r++) {
                start_group(p, kind, group, s + r);
                UNROLL for (int t = 0; t < tokens * chains; t++) sum[r][t] = _mm512_setzero_ps();
            }
            const int64_t stop = block + group_blocks < p->blocks ? block + group_blocks : p->blocks;
            for (; block < stop; block++) {
                UNROLL for (int r = 0; r < STREAMS; r++) {
                    prefetch_stream(p, kind, block, s + r);
                    const uint64_t mask = load_word(s[r].mask + block * 8);
#if PAIRS
                    __m512i w[2];
                    decode_pairs(kind, &u, mask, s + r, w);
                    UNROLL for (int t = 0; t < tokens; t++) UNROLL for (int h = 0; h < 2; h++) {
                        __m512 *to = &sum[r][t * chains + h % chains];
                        const __m512i by = _mm512_loadu_si512(x + 128 * t + 64 * h);
                        *to = _mm512_dpbf16_ps(*to, (__m512bh)w[h], (__m512bh)by);
                    }
#else
                    __m512 w[4];
                    decode_floats(kind, &u, mask, s + r, w);
                    UNROLL for (int t = 0; t < tokens; t++) UNROLL for (int h = 0; h < 4; h++) {
                        __m512 *to = &sum[r][t * chains + h % chains];
                        *to = _mm512_fmadd_ps(w[h], _mm512_loadu_ps(x + 256 * t + 64 * h), *to);
                    }
#endif
                }
                x += tokens * (PAIRS ? 128 : 256);
            }
            UNROLL for (int r = 0; r < STREAMS; r++) UNROLL for (int t = 0; t < tokens; t++) {
                __m512 all = sum[r][t * chains];
                for (int c = 1; c < chains; c++) all = _mm512_add_ps(all, sum[r][t * chains + c]);
                total[r][t] = _mm512_fmadd_ps(all, _mm512_set1_ps(s[r].scale), total[r][t]);
            }
        }
        for (int r = 0; r < STREAMS; r++)
            for (int t = 0; t < batch.count; t++)
                store_sum(p, batch.first + t, s[r].row, _mm512_reduce_add_ps(total[r][t]));
    }
}

FEW_TOKENS __attribute__((always_inline)) static inline void NAME(rows_of_kind)(const Sparse *p, Batch batch, int64_t begin,
                                                                                int64_t end, const RowScratch *scratch,
                                                                                const int kind) {
    switch (batch.padded) {
    case 1: NAME(rows)(p, batch, begin, end, scratch, kind, 1); break;
    case 2: NAME(rows)(p, batch, begin, end, scratch, kind, 2); break;
    case 4: NAME(rows)(p, batch, begin, end, scratch, kind, 4); break;
    default: NAME(rows)(p, batch, begin, end, scratch, kind, MAX_TOKENS);
    }
}

FEW_TOKENS static void NAME(few_tokens)(const Sparse *p, Batch batch, int64_t begin, int64_t end, const RowScratch *scratch) {
    switch (kind_of(p)) {
    case KIND_BF16: NAME(rows_of_kind)(p, batch, begin, end, scratch, KIND_BF16); break;
    case KIND_CODE4: NAME(rows_of_kind)(p, batch, begin, end, scratch, KIND_CODE4); break;
#if !PAIRS
    case KIND_FP16: NAME(rows_of_kind)(p, batch, begin, end, scratch, KIND_FP16); break;
    case KIND_FP32: NAME(rows_of_kind)(p, batch, begin, end, scratch, KIND_FP32); break;
#endif
    default: NAME(rows_of_kind)(p, batch, begin, end, scratch, KIND_CODE8);
    }
}

#undef PAIRS
#undef FEW_TOKENS
#undef NAME
