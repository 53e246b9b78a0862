/* Sums of signed activations by table, one row at a time: see lookup.h. A table serves four columns. */

/* Tables of 16 floats for each four activations; `x` is padded with zeros. */
static void make_tables_portable(const float *x, int64_t count, float *tables) {
    for (; count > 0; count -= 4, x += 4, tables += 16)
        for (int pattern = 0; pattern < 16; pattern++) {
            float sum = pattern & 1 ? -x[0] : x[0];
            for (int i = 1; i < 4; i++) sum += pattern >> i & 1 ? -x[i] : x[i];
            tables[pattern] = sum;
        }
}
