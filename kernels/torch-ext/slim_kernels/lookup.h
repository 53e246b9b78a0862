/* Sums of signed activations by table, for one instruction set: included once for each, after lanes_*.h.

   The signs of a few neighbouring columns pick one of a few sums: a table holds +-x[0] +-x[1] +-x[2] +-x[3] for every
   pattern of sign bits, and is looked up by many rows. A table fits a vector, and a permutation of it answers for as
   many rows as a vector has lanes. For that the words of 32 columns of neighbouring rows are transposed into lanes. */

/* Tables of `words` * 32 activations: PATTERNS floats for each lookup. `x` is padded with zeros. */
TARGET static void NAME(make_tables)(const float *x, int64_t words, int64_t stride, float *tables) {
    float signs[FIELD][PATTERNS];
    for (int i = 0; i < FIELD; i++)
        for (int pattern = 0; pattern < PATTERNS; pattern++) signs[i][pattern] = pattern >> i & 1 ? -1.0f : 1.0f;
    for (int64_t word = 0; word < words; word++, x += 32, tables += stride)
        for (int i = 0; i < LOOKUPS; i++) {
            const float *from = x + i * FIELD;
            FLOATS sum = MULTIPLY(SET(from[0]), LOAD(signs[0]));
            sum = MULTIPLY_ADD(SET(from[1]), LOAD(signs[1]), sum);
            for (int j = 2; j < FIELD && i * FIELD + j < 32; j++) sum = MULTIPLY_ADD(SET(from[j]), LOAD(signs[j]), sum);
            STORE(tables + i * PATTERNS, sum);
        }
}

/* Word `i` of LANES rows to out[i], for LANES words from byte `start` on. Rows are `stride` bytes apart, `left` bytes of
   them are left; rows past `last` repeat it. */
TARGET static inline void NAME(load_words)(const uint8_t *base, int64_t stride, int64_t row, int64_t last, int64_t start,
                                           int64_t left, WORDS *out) {
    for (int lane = 0; lane < LANES; lane++) {
        const uint8_t *from = base + (row + lane < last ? row + lane : last) * stride + start;
        if (left >= 4 * LANES) {
            memcpy(out + lane, from, 4 * LANES);
        } else {
            memset(out + lane, 0, 4 * LANES);
            memcpy(out + lane, from, (size_t)left);
        }
    }
    TRANSPOSE(out);
}
