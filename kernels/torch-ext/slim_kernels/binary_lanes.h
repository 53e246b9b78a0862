/* A few tokens: included once for each instruction set, after lookup.h. */

/* Sums of two vectors of rows over a part of a group, vector by vector for each kind (see Sum). */
typedef struct {
    FLOATS sum[SUMS][2];
} NAME(Sums);

/* Words [begin, end) of two vectors of rows; `with_offset` and `with_columns` are constants where this is inlined. Word w
   of vector v is signs[v * LANES + w], and `salient` lists the lookups that have a salient column. While it works, the
   next rows are fetched. `fresh`: the sums start from zero. */
TARGET __attribute__((always_inline)) static inline void NAME(add_words)(
    const int with_offset, const int with_columns, const WORDS *signs, const WORDS *seconds, int64_t begin, int64_t end,
    const float *tables, const float *salient_tables, const Lookup *salient, const Lookup *salient_end,
    const uint8_t *next, int64_t bytes, int fresh, NAME(Sums) *sums) {
    const int size = LOOKUPS * PATTERNS, kinds = with_columns ? with_offset ? 3 : 2 : 1;
    const int used[SUMS] = {1, 1, with_columns, with_columns, with_offset, 1, 1};
    FLOATS sum[SUMS][2];
    UNROLL for (int i = 0; i < SUMS; i++)
        UNROLL for (int v = 0; v < 2; v++) sum[i][v] = fresh || !used[i] ? ZERO : sums->sum[i][v];
    for (; salient < salient_end; salient++) {
        const float *from = salient_tables + salient->table;
        const FLOATS table = LOAD(from), other = with_columns ? LOAD(from + size) : table;
        UNROLL for (int v = 0; v < 2; v++) {
            const int64_t word = v * LANES + salient->word;
            const WORDS first = SHIFT_BY(signs[word], salient->shift), second = SHIFT_BY(seconds[word], salient->shift);
            sum[SALIENT][v] = ADD(sum[SALIENT][v], LOOK_UP(table, first));
            sum[SALIENT_SECOND][v] = ADD(sum[SALIENT_SECOND][v], LOOK_UP(other, second));
        }
    }
    for (int64_t word = begin; word < end; word++, tables += kinds * size) {
        WORDS first[2], second[2], both[2];
        UNROLL for (int v = 0; v < 2; v++) {
            first[v] = signs[v * LANES + word], second[v] = seconds[v * LANES + word];
            both[v] = XOR(first[v], second[v]);
            _mm_prefetch((const char *)next + (2 * v * LANES + 2 * word) * bytes, _MM_HINT_T1);
            _mm_prefetch((const char *)next + (2 * v * LANES + 2 * word + 1) * bytes, _MM_HINT_T1);
        }
        for (int i = 0; i < LOOKUPS; i++) {
            const FLOATS table = LOAD(tables + i * PATTERNS);
            const FLOATS other = with_columns ? LOAD(tables + size + i * PATTERNS) : table;
            const FLOATS plain = with_offset && with_columns ? LOAD(tables + 2 * size + i * PATTERNS) : table;
            UNROLL for (int v = 0; v < 2; v++) {
                sum[SMALL][v] = ADD(sum[SMALL][v], LOOK_UP(table, first[v]));
                sum[SMALL_BOTH][v] = ADD(sum[SMALL_BOTH][v], LOOK_UP(table, both[v]));
                if (with_columns) {
                    sum[LARGE][v] = ADD(sum[LARGE][v], LOOK_UP(other, first[v]));
                    sum[LARGE_BOTH][v] = ADD(sum[LARGE_BOTH][v], LOOK_UP(other, both[v]));
                }
                first[v] = SHIFT(first[v]), both[v] = SHIFT(both[v]);
                if (!with_offset) continue;
                sum[PLAIN][v] = ADD(sum[PLAIN][v], LOOK_UP(plain, second[v]));
                second[v] = SHIFT(second[v]);
            }
        }
    }
    UNROLL for (int i = 0; i < SUMS; i++)
        UNROLL for (int v = 0; v < 2; v++) if (used[i]) sums->sum[i][v] = sum[i][v];
}

#define ADD_WORDS(name, with_offset, with_columns)                                                                     \
    TARGET static void NAME(name)(const WORDS *signs, const WORDS *seconds, int64_t begin, int64_t end,                \
                                  const float *tables, const float *salient_tables, const Lookup *salient,             \
                                  const Lookup *salient_end, const uint8_t *next, int64_t bytes, int fresh,            \
                                  NAME(Sums) *sums) {                                                                  \
        NAME(add_words)(with_offset, with_columns, signs, seconds, begin, end, tables, salient_tables, salient,        \
                        salient_end, next, bytes, fresh, sums);                                                        \
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

/* What the sums of a whole group add to the outputs of vector v. */
TARGET static inline FLOATS NAME(weigh)(const Binary *p, const NAME(Sums) *sums, int v, const float *totals,
                                        const float *scale, const float *offset, FLOATS y) {
    const FLOATS half = SET(0.5f), small = sums->sum[SMALL][v], both = sums->sum[SMALL_BOTH][v];
    const FLOATS large = p->columns_given ? sums->sum[LARGE][v] : small;
    const FLOATS large_both = p->columns_given ? sums->sum[LARGE_BOTH][v] : both, plain = sums->sum[PLAIN][v];
    y = MULTIPLY_ADD(MULTIPLY(half, ADD(small, both)), LOAD(scale), y);
    y = MULTIPLY_ADD(MULTIPLY(half, SUBTRACT(large, large_both)), LOAD(scale + LANES), y);
    y = MULTIPLY_ADD(sums->sum[SALIENT][v], LOAD(scale + 2 * LANES), y);
    y = MULTIPLY_ADD(sums->sum[SALIENT_SECOND][v], LOAD(scale + 3 * LANES), y);
    if (!p->offset) return y;
    y = MULTIPLY_ADD(MULTIPLY(half, ADD(SET(totals[0]), plain)), LOAD(offset), y);
    y = MULTIPLY_ADD(MULTIPLY(half, SUBTRACT(SET(totals[0]), plain)), LOAD(offset + LANES), y);
    return MULTIPLY_ADD(SET(totals[1]), LOAD(offset + 2 * LANES), y);
}

/* Rows [begin, end), two vectors of them at a time; `scratch` holds their scales and offsets. */
TARGET static void NAME(binary_rows)(const Binary *p, const Inputs *x, int64_t begin, int64_t end, float *scratch) {
    void (*const add[])(const WORDS *, const WORDS *, int64_t, int64_t, const float *, const float *, const Lookup *,
                        const Lookup *, const uint8_t *, int64_t, int, NAME(Sums) *) = {NAME(add_plain), NAME(add_offset), NAME(add_columns),
                                                                   NAME(add_both)};
    const int kind = (p->offset ? 1 : 0) + (p->columns_given ? 2 : 0);
    const int64_t group_words = p->groups > 1 ? p->group_size / 32 : p->words, last = p->outs - 1;
    const int64_t scale_size = 4 * p->groups * LANES, offset_size = 3 * p->groups * LANES;
    float *scales = scratch, *offsets = scratch + 2 * scale_size;
    for (int64_t row = begin; row < end; row += 2 * LANES) {
        NAME(Sums) sums[MAX_TOKENS];
        FLOATS y[MAX_TOKENS][2];
        int fresh = 1;
        for (int64_t t = 0; t < p->tokens; t++) y[t][0] = y[t][1] = ZERO;
        for (int v = 0; v < 2; v++) {
            const int64_t from = row + v * LANES;
            NAME(transpose_rows)(p->scale_type, p->scale, p->outs, 4 * p->groups, from, scales + v * scale_size);
            if (!p->offset) continue;
            NAME(transpose_rows)(p->offset_type, p->offset, p->outs, 3 * p->groups, from, offsets + v * offset_size);
        }
        const uint8_t *next = p->weight + (row + 2 * LANES) * 2 * p->bytes;
        int64_t group = 0;
        for (int64_t block = 0; block < p->words; block += LANES) {
            WORDS signs[2 * LANES], seconds[2 * LANES];
            const int64_t left = p->bytes - 4 * block;
            for (int v = 0; v < 2; v++) {
                const int64_t from = row + v * LANES;
                NAME(load_words)(p->weight, 2 * p->bytes, from, last, 4 * block, left, signs + v * LANES);
                NAME(load_words)(p->weight + p->bytes, 2 * p->bytes, from, last, 4 * block, left, seconds + v * LANES);
            }
            const int64_t stop = block + LANES < p->words ? block + LANES : p->words;
            for (int64_t word = block; word < stop;) {
                const int64_t border = (group + 1) * group_words, to = border < stop ? border : stop, i = word - block;
                const int ends = to == border || to == p->words;
                for (int64_t t = 0; t < p->tokens; t++) {
                    add[kind](signs, seconds, i, to - block, x->tables + t * x->stride + word * x->word,
                              x->salient_tables + t * x->salient_stride, x->salient + x->first_salient[word],
                              x->salient + x->first_salient[to], next + 4 * block, p->bytes, fresh, sums + t);
                    if (!ends) continue;
                    const float *totals = x->totals + (t * p->groups + group) * 2;
                    for (int v = 0; v < 2; v++) {
                        const float *scale = scales + v * scale_size + 4 * group * LANES;
                        const float *offset = offsets + v * offset_size + 3 * group * LANES;
                        y[t][v] = NAME(weigh)(p, sums + t, v, totals, scale, offset, y[t][v]);
                    }
                }
                fresh = ends;
                group += ends;
                word = to;
            }
        }
        for (int64_t t = 0; t < p->tokens; t++) {
            float all[2 * LANES];
            STORE(all, y[t][0]), STORE(all + LANES, y[t][1]);
            store_outputs(p, t, row, end - row < 2 * LANES ? end - row : 2 * LANES, all);
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
