/* A few tokens: included once for each instruction set, after lookup.h. */

/* Sums of LANES rows over a part of a group: of first, second and plain activations by their signs s, by s * s2 and by s2
   (see Sum), and of the salient ones. */
typedef struct {
    FLOATS sum[SUMS];
} NAME(Sums);

/* `with_offset` and `with_columns` are constants where this is inlined. `salient` tells for each word which of its lookups
   have a salient column. While it works, the next rows are fetched. */
TARGET __attribute__((always_inline)) static inline void NAME(add_words)(
    const int with_offset, const int with_columns, const WORDS *signs, const WORDS *seconds, int64_t count,
    const float *tables, const float *salient_tables, const uint16_t *salient, const uint8_t *next, int64_t bytes,
    NAME(Sums) *sums) {
    const int size = LOOKUPS * PATTERNS, kinds = with_columns ? with_offset ? 3 : 2 : 1;
    FLOATS sum[SUMS];
    for (int i = 0; i < SUMS; i++) sum[i] = sums->sum[i];
    for (int64_t word = 0; word < count; word++, tables += kinds * size, salient_tables += (1 + with_columns) * size) {
        WORDS first = signs[word], second = seconds[word];
        _mm_prefetch((const char *)next + 2 * word * bytes, _MM_HINT_T1);
        _mm_prefetch((const char *)next + (2 * word + 1) * bytes, _MM_HINT_T1);
        for (unsigned left = salient[word]; left; left &= left - 1) {
            const int i = __builtin_ctz(left);
            const FLOATS table = LOAD(salient_tables + i * PATTERNS);
            const FLOATS other = with_columns ? LOAD(salient_tables + size + i * PATTERNS) : table;
            sum[SALIENT] = ADD(sum[SALIENT], LOOK_UP(table, SHIFT_BY(first, i * FIELD)));
            sum[SALIENT_SECOND] = ADD(sum[SALIENT_SECOND], LOOK_UP(other, SHIFT_BY(second, i * FIELD)));
        }
        for (int i = 0; i < LOOKUPS; i++) {
            const FLOATS table = LOAD(tables + i * PATTERNS);
            const WORDS both = XOR(first, second);
            sum[SMALL] = ADD(sum[SMALL], LOOK_UP(table, first));
            sum[SMALL_BOTH] = ADD(sum[SMALL_BOTH], LOOK_UP(table, both));
            if (with_columns) {
                const FLOATS other = LOAD(tables + size + i * PATTERNS);
                sum[LARGE] = ADD(sum[LARGE], LOOK_UP(other, first));
                sum[LARGE_BOTH] = ADD(sum[LARGE_BOTH], LOOK_UP(other, both));
            }
            if (with_offset) {
                const FLOATS plain = with_columns ? LOAD(tables + 2 * size + i * PATTERNS) : table;
                sum[PLAIN] = ADD(sum[PLAIN], LOOK_UP(plain, second));
            }
            first = SHIFT(first), second = SHIFT(second);
        }
    }
    for (int i = 0; i < SUMS; i++) sums->sum[i] = sum[i];
}

#define ADD_WORDS(name, with_offset, with_columns)                                                                     \
    TARGET static void NAME(name)(const WORDS *signs, const WORDS *seconds, int64_t count, const float *tables,        \
                                  const float *salient_tables, const uint16_t *salient, const uint8_t *next,           \
                                  int64_t bytes, NAME(Sums) *sums) {                                                   \
        NAME(add_words)(with_offset, with_columns, signs, seconds, count, tables, salient_tables, salient, next,       \
                        bytes, sums);                                                                                  \
    }
ADD_WORDS(add_plain, 0, 0)
ADD_WORDS(add_offset, 1, 0)
ADD_WORDS(add_columns, 0, 1)
ADD_WORDS(add_both, 1, 1)
#undef ADD_WORDS

/* A matrix (outs, width) of LANES rows from `row` on as table[column][lane]. Rows past the last repeat it. */
TARGET static void NAME(transpose_rows)(int type, const void *matrix, int64_t outs, int64_t width, int64_t row, float *table) {
    const int64_t unit = type == FP32 ? 4 : 2;
    int64_t column = 0;
    for (; column + LANES <= width; column += LANES) {
        FLOATS rows[LANES];
        WORDS words[LANES];
        for (int lane = 0; lane < LANES; lane++) {
            const int64_t index = (row + lane < outs ? row + lane : outs - 1) * width + column;
            rows[lane] = LOAD_AS(type, matrix, index);
            _mm_prefetch((const char *)matrix + (index + LANES * width) * unit, _MM_HINT_T1);
        }
        memcpy(words, rows, sizeof words);
        TRANSPOSE(words);
        memcpy(table + column * LANES, words, sizeof words);
    }
    for (; column < width; column++)
        for (int lane = 0; lane < LANES; lane++)
            table[column * LANES + lane] =
                load_float(type, matrix, (row + lane < outs ? row + lane : outs - 1) * width + column);
}

/* What the sums of a whole group add to the outputs. */
TARGET static inline FLOATS NAME(weigh)(const Binary *p, const NAME(Sums) *sums, const float *totals, const float *scale,
                                        const float *offset, FLOATS y) {
    const FLOATS *sum = sums->sum, half = SET(0.5f);
    const FLOATS *large = p->columns_given ? sum + LARGE : sum + SMALL;
    y = MULTIPLY_ADD(MULTIPLY(half, ADD(sum[SMALL], sum[SMALL_BOTH])), LOAD(scale), y);
    y = MULTIPLY_ADD(MULTIPLY(half, SUBTRACT(large[0], large[1])), LOAD(scale + LANES), y);
    y = MULTIPLY_ADD(sum[SALIENT], LOAD(scale + 2 * LANES), y);
    y = MULTIPLY_ADD(sum[SALIENT_SECOND], LOAD(scale + 3 * LANES), y);
    if (!p->offset) return y;
    y = MULTIPLY_ADD(MULTIPLY(half, ADD(SET(totals[0]), sum[PLAIN])), LOAD(offset), y);
    y = MULTIPLY_ADD(MULTIPLY(half, SUBTRACT(SET(totals[0]), sum[PLAIN])), LOAD(offset + LANES), y);
    return MULTIPLY_ADD(SET(totals[1]), LOAD(offset + 2 * LANES), y);
}

/* Rows [begin, end), a vector of them at a time; `scratch` holds their scales and offsets. */
TARGET static void NAME(binary_rows)(const Binary *p, const Inputs *x, int64_t begin, int64_t end, float *scratch) {
    void (*const add[])(const WORDS *, const WORDS *, int64_t, const float *, const float *, const uint16_t *,
                        const uint8_t *, int64_t, NAME(Sums) *) = {NAME(add_plain), NAME(add_offset), NAME(add_columns),
                                                                   NAME(add_both)};
    const int kind = (p->offset ? 1 : 0) + (p->columns_given ? 2 : 0);
    const int64_t group_words = p->groups > 1 ? p->group_size / 32 : p->words, last = p->outs - 1;
    float *offsets = scratch + 4 * p->groups * LANES;
    for (int64_t row = begin; row < end; row += LANES) {
        NAME(Sums) sums[MAX_TOKENS], none;
        FLOATS y[MAX_TOKENS];
        for (int i = 0; i < SUMS; i++) none.sum[i] = ZERO;
        for (int64_t t = 0; t < p->tokens; t++) sums[t] = none, y[t] = ZERO;
        NAME(transpose_rows)(p->scale_type, p->scale, p->outs, 4 * p->groups, row, scratch);
        if (p->offset) NAME(transpose_rows)(p->offset_type, p->offset, p->outs, 3 * p->groups, row, offsets);
        const uint8_t *next = p->weight + (row + LANES) * 2 * p->bytes;
        int64_t group = 0;
        for (int64_t block = 0; block < p->words; block += LANES) {
            WORDS signs[LANES], seconds[LANES];
            NAME(load_words)(p->weight, 2 * p->bytes, row, last, 4 * block, p->bytes - 4 * block, signs);
            NAME(load_words)(p->weight + p->bytes, 2 * p->bytes, row, last, 4 * block, p->bytes - 4 * block, seconds);
            const int64_t stop = block + LANES < p->words ? block + LANES : p->words;
            for (int64_t word = block; word < stop;) {
                const int64_t border = (group + 1) * group_words, to = border < stop ? border : stop, i = word - block;
                const int ends = to == border || to == p->words;
                for (int64_t t = 0; t < p->tokens; t++) {
                    add[kind](signs + i, seconds + i, to - word, x->tables + t * x->stride + word * x->word,
                              x->salient_tables + t * x->salient_stride + word * x->salient_word, x->salient + word,
                              next + 2 * i * p->bytes + 4 * block, p->bytes, sums + t);
                    if (!ends) continue;
                    const float *totals = x->totals + (t * p->groups + group) * 2;
                    y[t] = NAME(weigh)(p, sums + t, totals, scratch + 4 * group * LANES, offsets + 3 * group * LANES, y[t]);
                    sums[t] = none;
                }
                group += ends;
                word = to;
            }
        }
        for (int64_t t = 0; t < p->tokens; t++) {
            float all[LANES];
            STORE(all, y[t]);
            store_outputs(p, t, row, end - row < LANES ? end - row : LANES, all);
        }
    }
}

/* Tables of the activations of one token, and of those of them that are salient, word after word. */
TARGET static void NAME(make_inputs)(const Binary *p, float *const *rest, float *const *salient, int64_t token, Inputs *x) {
    const int size = LOOKUPS * PATTERNS;
    for (int i = 0; i < x->kinds; i++)
        NAME(make_tables)(rest[i], p->words, x->word, x->tables + token * x->stride + i * size);
    for (int i = 0; i < x->salient_kinds; i++)
        NAME(make_tables)(salient[i], p->words, x->salient_word,
                          x->salient_tables + token * x->salient_stride + i * size);
}
