/* Forgets the instruction set that lookup.h and the files that use it were written in. */

#undef TARGET
#undef NAME
#undef LANES
#undef LOOKUPS
#undef PATTERNS
#undef FIELD
#undef FLOATS
#undef WORDS
#undef ZERO
#undef SET
#undef LOAD
#undef STORE
#undef ADD
#undef SUBTRACT
#undef MULTIPLY
#undef MULTIPLY_ADD
#undef XOR
#undef SHIFT
#undef SHIFT_BY
#undef LOOK_UP
#undef LOAD_AS
#undef TRANSPOSE
