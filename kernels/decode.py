"""From packed bits to 16-bit patterns: how a tile of weights is decoded, in Triton and a little inline PTX.

A tile of BN rows x BK columns becomes one pattern of five bits per weight; planes.py makes numbers of them:

    0000 0000 000f nnnn        f = 1 where kept, n = the rank of the level 0..15; everything 0 where pruned

How 8 weights are decoded (`spread8`), given their mask byte and a window of nibbles that begins with their first kept
one:

    window       h g f e d c b a                    eight nibbles, the first in the lowest bits
    lo, hi       . g . e . c . a,  . h . f . d . b  one per byte, flag 0x10 set
    prmt         picks a byte of (lo, hi) for every column. A 256-entry table turns the mask byte into the eight 4-bit
                 selectors; selector 8 repeats the sign bit of byte 0, which is never set: 0 for a pruned weight
    prmt         widens bytes to 16 bits

Dense words need neither: they hold columns 0 2 4 6 1 3 5 7, so `word >> 4 i & 0x000f000f` is columns 2 i and 2 i + 1.
The layouts are drawn in packing.py. Reference: `ranks` in reference.py.
"""
import torch
import triton
import triton.language as tl

TAIL = """
        mov.b32 {$0,$1}, p0; mov.b32 {$2,$3}, p1; mov.b32 {$4,$5}, p2; mov.b32 {$6,$7}, p3; }"""
TO_BF16 = """
        mov.b32 one, 0x3f803f80; mov.b32 c, 0xc300c300;
        fma.rn.bf16x2 p0, p0, one, c; fma.rn.bf16x2 p1, p1, one, c;
        fma.rn.bf16x2 p2, p2, one, c; fma.rn.bf16x2 p3, p3, one, c;"""                  # (128 + pattern) * 1 - 128

SPREAD = """{ .reg .b32 lo, hi, t, b, c, one, p0, p1, p2, p3;
        lop3.b32 lo, $8, 0x0f0f0f0f, 0x10101010, 0xea;
        shr.u32 t, $8, 4;
        lop3.b32 hi, t, 0x0f0f0f0f, 0x10101010, 0xea;
        prmt.b32 b, lo, hi, $9;
        shr.u32 t, $9, 16;
        prmt.b32 c, lo, hi, t;
        prmt.b32 p0, b, HIGH, 0x4140; prmt.b32 p1, b, HIGH, 0x4342;
        prmt.b32 p2, c, HIGH, 0x4140; prmt.b32 p3, c, HIGH, 0x4342;"""                  # HIGH: upper byte of both
SPREAD_FP16 = tl.constexpr(SPREAD.replace("HIGH", "0x00") + TAIL)
SPREAD_BF16 = tl.constexpr(SPREAD.replace("HIGH", "0x43") + TO_BF16 + TAIL)

DENSE = """{ .reg .b32 t, c, one, p0, p1, p2, p3;
        lop3.b32 p0, $8, 0x000f000f, FLAG, 0xea;
        shr.u32 t, $8, 4;
        lop3.b32 p1, t, 0x000f000f, FLAG, 0xea;
        shr.u32 t, $8, 8;
        lop3.b32 p2, t, 0x000f000f, FLAG, 0xea;
        shr.u32 t, $8, 12;
        lop3.b32 p3, t, 0x000f000f, FLAG, 0xea;"""                                      # (word & 0x000f000f) | FLAG
DENSE_FP16 = tl.constexpr(DENSE.replace("FLAG", "0x00100010") + TAIL)
DENSE_BF16 = tl.constexpr(DENSE.replace("FLAG", "0x43104310") + TO_BF16 + TAIL)


def selector_table(device="cpu") -> torch.Tensor:
    """(256,) int32: for every mask byte 8 nibbles, the byte of (lo, hi) that each column takes, or 8 where pruned."""
    table = []
    for byte in range(256):
        word, seen = 0, 0
        for column in range(8):
            kept = byte >> column & 1
            word |= ((seen >> 1) + 4 * (seen & 1) if kept else 8) << 4 * column
            seen += kept
        table.append(word - (1 << 32) if word >> 31 else word)
    return torch.tensor(table, dtype=torch.int32, device=device)


@triton.jit
def popcount(x):
    return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def shift_right(x, n):
    """Logical, and 0 for n = 32."""
    return tl.inline_asm_elementwise("shr.u32 $0, $1, $2;", "=r,r,r", [x, n], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def funnel(low, high, n):
    """32 bits of high:low from bit n % 32 on."""
    return tl.inline_asm_elementwise("shf.r.wrap.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, n], dtype=tl.int32,
                                     is_pure=True, pack=1)


@triton.jit
def spread8(window, selector, FP16: tl.constexpr):
    """-> the patterns of 8 columns, as 8 tensors of 16-bit numbers."""
    if FP16:
        return tl.inline_asm_elementwise(SPREAD_FP16, "=h,=h,=h,=h,=h,=h,=h,=h,r,r", [window, selector],
                                         (tl.float16,) * 8, True, 1)
    else:
        return tl.inline_asm_elementwise(SPREAD_BF16, "=h,=h,=h,=h,=h,=h,=h,=h,r,r", [window, selector],
                                         (tl.bfloat16,) * 8, True, 1)


@triton.jit
def dense8(word, FP16: tl.constexpr):
    """Eight nibbles, columns 0 2 4 6 1 3 5 7, to patterns with all flags set."""
    if FP16:
        return tl.inline_asm_elementwise(DENSE_FP16, "=h,=h,=h,=h,=h,=h,=h,=h,r", [word], (tl.float16,) * 8, True, 1)
    else:
        return tl.inline_asm_elementwise(DENSE_BF16, "=h,=h,=h,=h,=h,=h,=h,=h,r", [word], (tl.bfloat16,) * 8, True, 1)


@triton.jit
def side_by_side(h0, h1, h2, h3, h4, h5, h6, h7):
    """8 x (rows, n) -> (rows, n, 8)."""
    even, odd = tl.join(tl.join(h0, h4), tl.join(h2, h6)), tl.join(tl.join(h1, h5), tl.join(h3, h7))
    return tl.join(even, odd).reshape(h0.shape[0], h0.shape[1], 8)


@triton.jit
def window_at(codes_ptr, place):
    """The 8 nibbles from nibble `place` of a stream of words on."""
    word = codes_ptr + (place >> 3)
    return funnel(tl.load(word), tl.load(word + 1), place << 2)


@triton.jit
def tile(mask_ptr, codes_ptr, tile_start_ptr, table_ptr, row, row_start, k0, K: tl.constexpr, BK: tl.constexpr,
         FORMAT: tl.constexpr, EVEN: tl.constexpr, FP16: tl.constexpr):
    """Patterns (BN, BK) of rows `row` (BN,) and columns k0 ... k0 + BK - 1. One thread decodes 32 columns at a time.

    EVEN says that no tile reaches beyond K. row_start (BN,): first nibble of each row, for the unstructured format."""
    BN: tl.constexpr = row.shape[0]
    W: tl.constexpr = (K + 31) // 32                                        # mask words per row
    j = k0 // 32 + tl.arange(0, BK // 32)[None, :]
    inside = (j < W) | EVEN
    if FORMAT == "dense":
        D: tl.constexpr = (K + 7) // 8
        d = k0 // 8 + tl.arange(0, BK // 8)[None, :]
        word = tl.load(codes_ptr + row[:, None] * D + d, mask=(d < D) | EVEN, other=0)
        a0, a1, a2, a3, a4, a5, a6, a7 = dense8(word, FP16)
        return side_by_side(a0, a1, a2, a3, a4, a5, a6, a7).reshape(BN, BK)
    else:
        place = row[:, None] * W + j
        m = tl.load(mask_ptr + place, mask=inside, other=0)
        if FORMAT == "nm":                                                  # two blocks of 16 columns, 8 nibbles each
            h = k0 // 16 + tl.arange(0, BK // 16)[None, :]
            words = tl.load(codes_ptr + row[:, None] * (2 * W) + h, mask=(h < 2 * W) | EVEN, other=0)
            first, third = tl.split(words.reshape(BN, BK // 32, 2))
            second = shift_right(first, 4 * popcount(m & 0xFF))
            fourth = shift_right(third, 4 * popcount(m & 0xFF0000))
        else:                                                               # count what the row keeps before each byte
            T: tl.constexpr = (K + 127) // 128
            p = tl.load(tile_start_ptr + row[:, None] * T + j // 4, mask=inside, other=0).to(tl.int32) & 0xFFFF
            p += row_start[:, None]
            for back in tl.static_range(1, 4):                              # mask words to the left, same 128 columns
                p += popcount(tl.load(mask_ptr + place - back, mask=(j % 4 >= back) & inside, other=0))
            first, second = window_at(codes_ptr, p), window_at(codes_ptr, p + popcount(m & 0xFF))
            third = window_at(codes_ptr, p + popcount(m & 0xFFFF))
            fourth = window_at(codes_ptr, p + popcount(m & 0xFFFFFF))
        a0, a1, a2, a3, a4, a5, a6, a7 = spread8(first, tl.load(table_ptr + (m & 0xFF)), FP16)
        b0, b1, b2, b3, b4, b5, b6, b7 = spread8(second, tl.load(table_ptr + (m >> 8 & 0xFF)), FP16)
        c0, c1, c2, c3, c4, c5, c6, c7 = spread8(third, tl.load(table_ptr + (m >> 16 & 0xFF)), FP16)
        d0, d1, d2, d3, d4, d5, d6, d7 = spread8(fourth, tl.load(table_ptr + (m >> 24 & 0xFF)), FP16)
        even = tl.join(side_by_side(a0, a1, a2, a3, a4, a5, a6, a7), side_by_side(c0, c1, c2, c3, c4, c5, c6, c7))
        odd = tl.join(side_by_side(b0, b1, b2, b3, b4, b5, b6, b7), side_by_side(d0, d1, d2, d3, d4, d5, d6, d7))
        return tl.join(even, odd).permute(0, 1, 3, 4, 2).reshape(BN, BK)
