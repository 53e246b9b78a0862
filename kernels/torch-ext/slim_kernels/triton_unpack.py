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


def _pairs_ptx(pair: str, magic: int, factors: tuple[int, ...], addends: tuple[int, ...]) -> str:
    """PTX from four bytes ($8) to four planes ($0-$1, $2-$3, ...) of two pairs of 16-bit floats.

    OR 4^i c into the mantissa of `magic`, a power of two 2^p, to get 2^p + 4^i c; one fma with 4^-i (`factors`) and
    -(2^p 4^-i + 1) (`addends`) makes it c - 1 without rounding. All numbers are the bits of one float.
    """
    lines = ["{ .reg .b32 lo, hi, factor, addend;", "prmt.b32 lo, $8, 0, 0x4140;", "prmt.b32 hi, $8, 0, 0x4342;"]
    for i, (factor, addend) in enumerate(zip(factors, addends, strict=True)):
        lines += [f"mov.b32 factor, 0x{factor:04X}{factor:04X};", f"mov.b32 addend, 0x{addend:04X}{addend:04X};"]
        for register, half in ((2 * i, "lo"), (2 * i + 1, "hi")):
            mask = 3 << 2 * i
            lines.append(f"lop3.b32 ${register}, {half}, 0x{mask:04X}{mask:04X}, 0x{magic:04X}{magic:04X}, 0xEA;")
            lines.append(f"fma.rn.{pair} ${register}, ${register}, factor, addend;")
    return "\n".join([*lines, "}"])


# bf16: 128; its mantissa has 7 bits, and 64 * 2 carries into the exponent and gives 256, which is still linear in c.
_BF16_PTX = tl.constexpr(
    _pairs_ptx("bf16x2", 0x4300, (0x3F80, 0x3E80, 0x3D80, 0x3C80), (0xC301, 0xC204, 0xC110, 0xC040))
)
# fp16: 1024.
_FP16_PTX = tl.constexpr(
    _pairs_ptx("f16x2", 0x6400, (0x3C00, 0x3400, 0x2C00, 0x2400), (0xE401, 0xDC04, 0xD410, 0xCC40))
)
_PAIRS = tl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r")


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
                _INT8_PTX, "=&r,=&r,=&r,=&r,r", [packed], (tl.int8, tl.int8, tl.int8, tl.int8), is_pure=True, pack=4
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
    return (
        _ternary(packed, 0, dtype),
        _ternary(packed, 1, dtype),
        _ternary(packed, 2, dtype),
        _ternary(packed, 3, dtype),
    )
