"""FP4 index keys made E4M3: E2M1 codes through byte selects, the scales of a key's groups folded into the exponents.

Exact where the four scales of a key differ by 2^14 at most. On the way to shared memory for a whole block of tokens
(`widen_page`), or straight into the registers of a product (`widen_tile`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

PAGE = gl.constexpr(64)  # keys

# One word of E2M1 codes to two words of E4M3 in channel order: the low 3 bits of a nibble select one of the eight
# magnitudes in ($3, $4), and a `prmt` with constants spreads the sign bits of the nibbles over bytes.
_E2M1_TO_E4M3 = gl.constexpr("""
{
.reg .b32 low, high, code, s, even;
and.b32 code, $2, 0x77777777;
prmt.b32 low, $3, $4, code;
shr.u32 code, code, 16;
prmt.b32 high, $3, $4, code;
shl.b32 even, $2, 4;
prmt.b32 s, even, $2, 0xD9C8;
lop3.b32 $0, s, 0x80808080, low, 0xEA;
prmt.b32 s, even, $2, 0xFBEA;
lop3.b32 $1, s, 0x80808080, high, 0xEA;
}
""")
# The same for tensors of bytes, four at a time: $3 and $7 are the words of magnitudes.
_E2M1_BYTES_TO_E4M3 = gl.constexpr(_E2M1_TO_E4M3.value.replace("$4", "$7"))


@gluon.jit
def largest_exponent(word):
    """Of the four E8M0 bytes of a key (the unused ones are 0)."""
    upper = gl.maximum((word >> 16) & 0xFF, (word >> 24) & 0xFF)
    return gl.maximum(gl.maximum(word & 0xFF, (word >> 8) & 0xFF), upper)


@gluon.jit
def power_of_two(exponent):
    """The scale of a key whose largest E8M0 byte is `exponent`: its E4M3 values carry 2^6 more. NaN for 255."""
    return gl.where(exponent == 255, 0x7FC00000, exponent << 23).to(gl.float32, bitcast=True) * 0.015625


# Words with the E4M3 magnitudes of the E2M1 codes 0-3 and 4-7 times 2^(e - 6), for e up to 12. Below 2^-6 E4M3 is a
# multiple of 2^-9 and what is finer is cut off: exponents under -2 lose bits, which differ by 2^14 from the largest.
_MAGNITUDES = gl.constexpr("""
{
.reg .b32 step, down, keep, x;
.reg .pred normal;
mul.lo.s32 step, $2, 0x08080808;
and.b32 x, step, 0xFFFFFF00;
add.s32 $0, x, 0x0C080000;
add.s32 $1, step, 0x1C181410;
setp.gt.s32 normal, $2, 0;
@normal bra DONE;
neg.s32 down, $2;
min.s32 down, down, 8;
shr.u32 keep, 0xFF, down;
mul.lo.u32 keep, keep, 0x01010101;
shr.u32 x, 0x0C080400, down;
and.b32 $0, x, keep;
shr.u32 x, 0x30201810, down;
and.b32 x, x, keep;
setp.gt.s32 normal, $2, -2;
selp.b32 $1, $1, x, normal;
DONE:
}
""")


@gluon.jit
def magnitudes(exponent):
    return gl.inline_asm_elementwise(
        _MAGNITUDES, "=&r,=&r,r", [exponent], dtype=[gl.int32, gl.int32], is_pure=True, pack=1
    )


@gluon.jit
def widen_page(packed, keys, pool, at, NUM_WARPS: gl.constexpr):
    """E4M3 keys [64, 128] in shared memory from E2M1 ones [64, 64 bytes]; the page's bytes start at pool + at."""
    word: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [NUM_WARPS, 1], [1, 0])  # a thread: 32 channels of a key
    group: gl.constexpr = gl.BlockedLayout([1, 1, 4], [8, 4, 1], [NUM_WARPS, 1, 1], [2, 1, 0])
    four: gl.constexpr = gl.SliceLayout(2, group)
    codes = packed.reinterpret(gl.int32, [PAGE, 16], gl.NVMMASharedLayout(64, 32, 2)).load(word)
    codes = gl.convert_layout(gl.reshape(codes, [PAGE, 4, 4]), group)
    key = gl.arange(0, PAGE, layout=gl.SliceLayout(1, four))
    place = gl.arange(0, 4, layout=gl.SliceLayout(0, four))
    exponent = gl.load(pool + at + PAGE * 64 + gl.expand_dims(key, 1) * 4 + gl.expand_dims(place, 0)).to(gl.int32)
    low, high = magnitudes(exponent - gl.expand_dims(gl.max(exponent, axis=1), 1) + 12)
    low, _ = gl.broadcast(gl.expand_dims(low, 2), codes)
    high, _ = gl.broadcast(gl.expand_dims(high, 2), codes)
    first, second = gl.inline_asm_elementwise(
        _E2M1_TO_E4M3, "=&r,=&r,r,r,r", [codes, low, high], dtype=[gl.int32, gl.int32], is_pure=True, pack=1
    )
    wide = gl.reshape(gl.join(first, second), [PAGE, 32])
    keys.reinterpret(gl.int32, [PAGE, 32], gl.NVMMASharedLayout(128, 32, 2)).store(wide)


@gluon.constexpr_function
def one_row_layout(num_warps):
    """A row a thread, as `_weighted_sum` leaves them: bit 0 of the lane is row bit 3, bit 1 repeats."""
    warps = [[16 << i] for i in range(num_warps.bit_length() - 1)]
    return gl.DistributedLinearLayout([], [[8], [0], [1], [2], [4]], warps, [], [16 * num_warps])


_PICK_ROW = gl.constexpr("""
{
.reg .b32 lane;
.reg .pred odd;
mov.u32 lane, %laneid;
and.b32 lane, lane, 1;
setp.ne.u32 odd, lane, 0;
selp.b32 $0, $2, $1, odd;
}
""")


@gluon.jit
def widen_tile(codes, bits, mma: gl.constexpr):
    """The E2M1 keys of a page as an operand of E4M3 in registers, and their scales in `one_row_layout`.

    A thread holds the 16 bytes of one group of two keys. Its 8 words of 4 channels are columns 4t and 16 + 4t of the
    four steps of the product, so channel (t, i, h, b) of the digits 4, 4, 2, 4 is column (i, h, t, b): `load_query`.
    """
    group: gl.constexpr = packed_layout(3)
    codes = gl.convert_layout(gl.reshape(codes, [PAGE, 4, 16]), group, assert_trivial=True)
    place = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, group)))
    most = largest_exponent(bits)
    exponent = (gl.expand_dims(bits, 1) >> (gl.expand_dims(place, 0) * 8)) & 0xFF
    low, high = magnitudes(exponent - gl.expand_dims(most, 1) + 12)
    low, _ = gl.broadcast(gl.expand_dims(low, 2), codes)
    high, _ = gl.broadcast(gl.expand_dims(high, 2), codes)
    first, second = gl.inline_asm_elementwise(
        _E2M1_BYTES_TO_E4M3, "=&r,=&r,r,r,r,r,r,r,r,r,r", [codes, low, high], dtype=[gl.uint8, gl.uint8], is_pure=True,
        pack=4,
    )  # fmt: skip
    first = gl.reshape(first, [PAGE, 4, 4, 4])
    second = gl.reshape(second, [PAGE, 4, 4, 4])
    wide = gl.permute(gl.join(first, second), [0, 2, 4, 1, 3])  # key, i, h, t, b
    wide = gl.reshape(wide, [PAGE, 128]).to(gl.float8e4nv, bitcast=True)
    kind: gl.constexpr = gl.distributed_type(gl.int32, [PAGE], one_row_layout(4))
    scale = power_of_two(gl.inline_asm(_PICK_ROW, ("=r", "r"), [most], kind, is_pure=True))
    return gl.convert_layout(wide, gl.DotOperandLayout(0, mma, 4), assert_trivial=True), scale


@gluon.constexpr_function
def packed_layout(rank):
    """[32, 128] bytes of E2M1 keys, two a row, or [64, 4, 16] by groups: 16 bytes of keys g and g + 8 a thread."""
    if rank == 2:
        return gl.DistributedLinearLayout(
            [[0, 1], [0, 2], [0, 4], [0, 8], [4, 0]], [[0, 16], [0, 32], [0, 64], [1, 0], [2, 0]], [[8, 0], [16, 0]],
            [], [32, 128],
        )  # fmt: skip
    return gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 8], [8, 0, 0]],
        [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[16, 0, 0], [32, 0, 0]], [], [64, 4, 16],
    )  # fmt: skip
