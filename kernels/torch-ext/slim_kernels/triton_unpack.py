"""Unpacking a tile of ternary bytes on the GPU: four two-bit codes per byte become four tiles of the same shape.

    bit     7 6      5 4      3 2      1 0
    row   r + 3P   r + 2P   r + P      r          codes c = T + 1 in {0, 1, 2}; a plane is one such quarter of the rows

Two forms of each: portable Triton (AMD, the interpreter), and PTX for NVIDIA, which handles four bytes (int8) or two
pairs (16-bit floats) per instruction where the compiler would go byte by byte: 2 to 4 times fewer instructions.
"""

import triton
import triton.language as tl


# Four bytes in one register to four int8 planes: c, 4c, 16c, c.
_INT8_PTX = tl.constexpr("""
and.b32 $0, $4, 0x03030303;
and.b32 $1, $4, 0x0C0C0C0C;
and.b32 $2, $4, 0x30303030;
shr.u32 $3, $4, 6;
and.b32 $3, $3, 0x03030303;
""")

# Four bytes to four planes of two bf16 pairs: put 4^i c into the mantissa of 128 (64 * 2 carries into the exponent and
# gives 256, still linear), then one fma, 4^-i * (128 + 4^i c) - (128 * 4^-i + 1) = c - 1, without rounding.
_BF16_PTX = tl.constexpr("""
{ .reg .b32 lo, hi;
prmt.b32 lo, $8, 0, 0x4140;
prmt.b32 hi, $8, 0, 0x4342;
lop3.b32 $0, lo, 0x00030003, 0x43004300, 0xEA;
lop3.b32 $1, hi, 0x00030003, 0x43004300, 0xEA;
lop3.b32 $2, lo, 0x000C000C, 0x43004300, 0xEA;
lop3.b32 $3, hi, 0x000C000C, 0x43004300, 0xEA;
lop3.b32 $4, lo, 0x00300030, 0x43004300, 0xEA;
lop3.b32 $5, hi, 0x00300030, 0x43004300, 0xEA;
lop3.b32 $6, lo, 0x00C000C0, 0x43004300, 0xEA;
lop3.b32 $7, hi, 0x00C000C0, 0x43004300, 0xEA;
fma.rn.bf16x2 $0, $0, 0x3F803F80, 0xC301C301;
fma.rn.bf16x2 $1, $1, 0x3F803F80, 0xC301C301;
fma.rn.bf16x2 $2, $2, 0x3E803E80, 0xC204C204;
fma.rn.bf16x2 $3, $3, 0x3E803E80, 0xC204C204;
fma.rn.bf16x2 $4, $4, 0x3D803D80, 0xC110C110;
fma.rn.bf16x2 $5, $5, 0x3D803D80, 0xC110C110;
fma.rn.bf16x2 $6, $6, 0x3C803C80, 0xC040C040;
fma.rn.bf16x2 $7, $7, 0x3C803C80, 0xC040C040; }
""")

# The same for fp16, in the mantissa of 1024.
_FP16_PTX = tl.constexpr("""
{ .reg .b32 lo, hi;
prmt.b32 lo, $8, 0, 0x4140;
prmt.b32 hi, $8, 0, 0x4342;
lop3.b32 $0, lo, 0x00030003, 0x64006400, 0xEA;
lop3.b32 $1, hi, 0x00030003, 0x64006400, 0xEA;
lop3.b32 $2, lo, 0x000C000C, 0x64006400, 0xEA;
lop3.b32 $3, hi, 0x000C000C, 0x64006400, 0xEA;
lop3.b32 $4, lo, 0x00300030, 0x64006400, 0xEA;
lop3.b32 $5, hi, 0x00300030, 0x64006400, 0xEA;
lop3.b32 $6, lo, 0x00C000C0, 0x64006400, 0xEA;
lop3.b32 $7, hi, 0x00C000C0, 0x64006400, 0xEA;
fma.rn.f16x2 $0, $0, 0x3C003C00, 0xE401E401;
fma.rn.f16x2 $1, $1, 0x3C003C00, 0xE401E401;
fma.rn.f16x2 $2, $2, 0x34003400, 0xDC04DC04;
fma.rn.f16x2 $3, $3, 0x34003400, 0xDC04DC04;
fma.rn.f16x2 $4, $4, 0x2C002C00, 0xD410D410;
fma.rn.f16x2 $5, $5, 0x2C002C00, 0xD410D410;
fma.rn.f16x2 $6, $6, 0x24002400, 0xCC40CC40;
fma.rn.f16x2 $7, $7, 0x24002400, 0xCC40CC40; }
""")

_PAIRS = tl.constexpr("=r,=r,=r,=r,=r,=r,=r,=r,r")


@triton.jit
def _ternary(packed, PLANE: tl.constexpr, dtype: tl.constexpr):
    """T = c - 1 of one plane as floats; bf16 is cut out of the fp32 bits, which loses nothing for -1, 0 and 1."""
    values = ((packed >> (2 * PLANE)) & 3).to(tl.float32) - 1.0
    if dtype == tl.bfloat16:
        return (values.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return values.to(dtype)


@triton.jit
def unpack_planes(packed, dtype: tl.constexpr, PTX: tl.constexpr):
    """Four planes of a tile of bytes: T in a float `dtype`, or the codes c, 4c, 16c, c in int8."""
    if dtype == tl.int8:
        if PTX:
            return tl.inline_asm_elementwise(
                _INT8_PTX, "=r,=r,=r,=r,r", [packed], (tl.int8, tl.int8, tl.int8, tl.int8), is_pure=True, pack=4
            )
        return (
            (packed & 0x03).to(tl.int8, bitcast=True),
            (packed & 0x0C).to(tl.int8, bitcast=True),
            (packed & 0x30).to(tl.int8, bitcast=True),
            (packed >> 6).to(tl.int8, bitcast=True),
        )
    if PTX and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            _BF16_PTX, _PAIRS, [packed], (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    if PTX and dtype == tl.float16:
        return tl.inline_asm_elementwise(
            _FP16_PTX, _PAIRS, [packed], (tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=4
        )
    return _ternary(packed, 0, dtype), _ternary(packed, 1, dtype), _ternary(packed, 2, dtype), _ternary(packed, 3, dtype)
