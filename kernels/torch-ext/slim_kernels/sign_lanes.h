/* Float activations, a few tokens: included once for each instruction set, after lookup.h. */

/* Rows of two vectors and `tokens` tokens (a constant where this is inlined): adds to sums[token][vector]. */
TARGET __attribute__((always_inline)) static inline void NAME(add_words)(const int tokens, const WORDS *words,
                                                                         int64_t count, const float *tables,
                                                                         int64_t stride, const uint8_t *next,
                                                                         int64_t bytes, FLOATS *sums) {
    const int chains = tokens == 1 ? 2 : 1;
    FLOATS sum[4][2][2];
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int v = 0; v < 2; v++) {
            sum[t][v][0] = sums[t * STRIPS + v];
            sum[t][v][1] = ZERO;
        }
    for (int64_t word = 0; word < count; word++, tables += LOOKUPS * PATTERNS) {
        WORDS first = words[word], second = words[LANES + word];
        _mm_prefetch((const char *)next + word * bytes, _MM_HINT_T1);
        _mm_prefetch((const char *)next + (LANES + word) * bytes, _MM_HINT_T1);
        for (int i = 0; i < LOOKUPS; i++) {
            UNROLL for (int t = 0; t < tokens; t++) {
                const FLOATS table = LOAD(tables + t * stride + i * PATTERNS);
                sum[t][0][i % chains] = ADD(sum[t][0][i % chains], LOOK_UP(table, first));
                sum[t][1][i % chains] = ADD(sum[t][1][i % chains], LOOK_UP(table, second));
            }
            first = SHIFT(first), second = SHIFT(second);
        }
    }
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int v = 0; v < 2; v++) sums[t * STRIPS + v] = ADD(sum[t][v][0], sum[t][v][1]);
}

TARGET static void NAME(add_words_1)(const WORDS *words, int64_t count, const float *tables, int64_t stride,
                                       const uint8_t *next, int64_t bytes, FLOATS *sums) {
    NAME(add_words)(1, words, count, tables, stride, next, bytes, sums);
}

TARGET static void NAME(add_words_2)(const WORDS *words, int64_t count, const float *tables, int64_t stride,
                                       const uint8_t *next, int64_t bytes, FLOATS *sums) {
    NAME(add_words)(2, words, count, tables, stride, next, bytes, sums);
}

TARGET static void NAME(add_words_4)(const WORDS *words, int64_t count, const float *tables, int64_t stride,
                                       const uint8_t *next, int64_t bytes, FLOATS *sums) {
    NAME(add_words)(4, words, count, tables, stride, next, bytes, sums);
}

/* Rows [begin, end), in blocks of STRIPS vectors: for each LANES words of a block, all tokens. */
TARGET static void NAME(sign_rows)(const Sign *p, const float *tables, int64_t begin, int64_t end) {
    const int64_t stride = p->words * LOOKUPS * PATTERNS, last = p->outs - 1;
    for (int64_t row = begin; row < end; row += STRIPS * LANES) {
        FLOATS sums[MAX_TOKENS][STRIPS];
        WORDS words[STRIPS * LANES];
        for (int64_t t = 0; t < p->tokens; t++)
            for (int v = 0; v < STRIPS; v++) sums[t][v] = ZERO;
        const int64_t rows = end - row < STRIPS * LANES ? end - row : STRIPS * LANES;
        for (int64_t word = 0; word < p->words; word += LANES) {
            const int64_t count = p->words - word < LANES ? p->words - word : LANES, at = 4 * word;
            for (int64_t lane = 0; lane < (rows + 2 * LANES - 1) / (2 * LANES) * (2 * LANES); lane += LANES)
                NAME(load_words)(p->weight, p->bytes, row + lane, last, at, p->bytes - at, words + lane);
            const uint8_t *next = p->weight + (row + STRIPS * LANES) * p->bytes + at;
            const float *from = tables + word * LOOKUPS * PATTERNS;
            for (int64_t t = 0; t < p->tokens;) {
                const int64_t left = p->tokens - t, taken = left > 3 ? 4 : left > 1 ? 2 : 1;
                for (int v = 0; v * LANES < rows; v += 2)
                    (taken == 4 ? NAME(add_words_4) : taken == 2 ? NAME(add_words_2) : NAME(add_words_1))(
                        words + v * LANES, count, from + t * stride, stride, next + v * LANES * p->bytes, p->bytes,
                        &sums[t][v]);
                t += taken;
            }
        }
        for (int64_t t = 0; t < p->tokens; t++) {
            float all[STRIPS * LANES];
            for (int v = 0; v < STRIPS; v++) STORE(all + v * LANES, sums[t][v]);
            store_rows_avx2(p, t, row, rows, all, 1.0f);
        }
    }
}
