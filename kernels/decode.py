"""From packed words to fragments of a matrix product, in the registers where the product reads
them: inline PTX.

A lane decodes its 64 weights (fragments.py draws which) into 32 registers of two 16-bit patterns
each:

    0000 0000 000f nnnn        f = 1 where kept, n = the rank of the level 0..15; all 0 where pruned

The first 16 registers are the upper row's columns (0, 1), (2, 3) ... (30, 31), the others the lower
row's. bf16 patterns have 0x43 as their upper byte: as numbers they are 128 + 16 f + n. fp16
patterns are subnormal numbers, (16 f + n) * 2^-24, and exact. Masking a part out with `and` leaves
a number again: that is how planes.py and matmul kernels take them apart.

How the 8 columns of byte b become patterns, given their mask and a word that holds what is kept of
them:

    kept       m & 0x11111111 << b: a column per nibble. The masks are stored so that no shift is
               needed
    selectors  kept * (0x11111108 >> b) + 0x88888888, one multiply-add: nibble j = how many are
               kept before column j, plus 8 where j itself is pruned. Counted down for what lies
               backwards: 7 - how many. (0x11111110 adds a column to all above it; the factors are
               multiples of 8, so >> b loses nothing.)
    lo, hi     two registers of four bytes each, the word's nibbles with 0x10 set
    prmt       picks a byte of (lo, hi) for each of four columns; a selector of 8 or more repeats a
               sign bit, never set: 0
    prmt       widens bytes to 16 bits

"unstructured" rows are streams: after each byte what it kept is shifted out. Their nibbles are in
order, which two more prmt mend. "dense" words need nothing of this: `word >> 4 i & 0x000f000f` is
columns 2 i and 2 i + 1.

Reference: `fragment_ranks` in fragments.py.
"""
import triton
import triton.language as tl

NIBBLES = ("lop3.b32 lo, {w}, 0x0f0f0f0f, 0x10101010, 0xea; shr.u32 t, {w}, 4; "
           "lop3.b32 hi, t, 0x0f0f0f0f, 0x10101010, 0xea;")
# nibbles 0..3, 4..7
IN_ORDER = "prmt.b32 t, lo, hi, 0x5140; prmt.b32 hi, lo, hi, 0x7362; mov.b32 lo, t;"


def columns(mask: str, b: int, backwards: bool, first: int, high: int) -> str:
    """Byte b of a mask, lo and hi -> 4 registers of patterns, $first and on."""
    factor, start = (-0x11111118, 0xFFFFFFFF) if backwards else (0x11111108, 0x88888888)
    lines = [
        f"and.b32 s, {mask}, {0x11111111 << b:#x};",
        f"mad.lo.u32 s, s, {(factor >> b) % (1 << 32):#x}, {start:#x};"
    ]
    for i in range(2):
        lines.append("shr.u32 s, s, 16;" if i else "")
        lines.append("prmt.b32 p, lo, hi, s;")
        lines += [
            f"prmt.b32 ${first + 2 * i + half}, p, {high:#x}, {('0x4140', '0x4342')[half]};"
            for half in range(2)
        ]
    return " ".join(lines)


def nm_ptx(high: int) -> str:
    """$0-$31 patterns; $32 $33 masks, $34 $35 the upper row's words, $36 $37 the lower row's."""
    lines = []
    for row in range(2):
        for b in range(4):
            if b % 2 == 0:
                lines.append(NIBBLES.format(w=f"${34 + 2 * row + b // 2}"))
            lines.append(columns(f"${32 + row}", b, b % 2 == 1, 16 * row + 4 * b, high))
    return "{ .reg .b32 lo, hi, t, s, p;\n" + "\n".join(lines) + " }"


def unstructured_ptx(high: int) -> str:
    """$0-$31 patterns; $32 $33 masks, $34-$37 the words from the lane's place up, $38-$41 those
    from it down."""
    lines = []
    for row in range(2):
        r = [f"r{i}" for i in range(4)]
        lines.append(" ".join(f"mov.b32 r{i}, ${34 + 4 * row + i};" for i in range(4)))
        for b in range(4):
            if b:                                           # shift out what byte b - 1 kept
                lines.append(f"and.b32 s, ${32 + row}, {0x11111111 << b - 1:#x}; popc.b32 n, s; "
                             f"shl.b32 n, n, 2;")
                for i in range(4 - b):
                    pair = f"{r[i + 1]}, {r[i]}" if row else f"{r[i]}, {r[i + 1]}"
                    lines.append(f"shf.{'lr'[row == 0]}.clamp.b32 {r[i]}, {pair}, n;")
            lines += [
                NIBBLES.format(w=r[0]), IN_ORDER,
                columns(f"${32 + row}", b, row == 1, 16 * row + 4 * b, high)
            ]
    return "{ .reg .b32 lo, hi, t, s, p, n, r0, r1, r2, r3;\n" + "\n".join(lines) + " }"


def dense_ptx(high: int) -> str:
    """$0-$31 patterns, all flags set; $32-$35 the upper row's words, $36-$39 the lower row's."""
    lines, flags = [], high << 24 | high << 8 | 0x00100010
    for word in range(8):
        for i in range(4):
            source = f"${32 + word}" if i == 0 else "t"
            lines.append(f"shr.u32 t, ${32 + word}, {4 * i};" if i else "")
            # (a & b) | c
            lines.append(f"lop3.b32 ${4 * word + i}, {source}, 0x000f000f, {flags:#x}, 0xea;")
    return "{ .reg .b32 t;\n" + " ".join(lines) + " }"


def constraints(inputs: int) -> str:
    return ",".join(["=&r"] * 32 + ["r"] * inputs)


NM_FP16, NM_BF16 = tl.constexpr(nm_ptx(0)), tl.constexpr(nm_ptx(0x43))
UNSTRUCTURED_FP16 = tl.constexpr(unstructured_ptx(0))
UNSTRUCTURED_BF16 = tl.constexpr(unstructured_ptx(0x43))
DENSE_FP16, DENSE_BF16 = tl.constexpr(dense_ptx(0)), tl.constexpr(dense_ptx(0x43))
SIX, EIGHT, TEN = (tl.constexpr(constraints(n)) for n in (6, 8, 10))
WORDS = tl.constexpr((tl.int32,) * 32)


@triton.jit
def four(x):
    """(T, 4) -> four (T,): a thread holds all four, no data moves."""
    even, odd = tl.split(x.reshape(x.shape[0], 2, 2))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def load_four(pointer, ok):
    """16 bytes of weights a lane, read once: they leave the cache first. pointer, ok (T,)."""
    at = pointer[:, None] + tl.arange(0, 4)[None, :]
    return four(tl.load(at, mask=ok[:, None], other=0, eviction_policy="evict_first"))


@triton.jit
def load_masks(mask_ptr, tile, lane, ok):
    """Both rows' masks. tile, lane, ok (T,): each warp has its own tile."""
    at = mask_ptr + (tile * 64 + lane * 2)[:, None] + tl.arange(0, 2)[None, :]
    return tl.split(tl.load(at, mask=ok[:, None], other=0, eviction_policy="evict_first"))


@triton.jit
def load_place(start_ptr, at_ptr, tile, lane, ok):
    """The word of a lane's place in the stream of "unstructured"; inside it even where not ok."""
    start = tl.load(start_ptr + tile, mask=ok, other=4)
    return start + tl.load(at_ptr + tile * 32 + lane, mask=ok, other=0).to(tl.int32)


@triton.jit
def load_words(codes_ptr, tile, lane, place, ok, FORMAT: tl.constexpr):
    """A lane's code words: 4 of "nm", 8 of the others."""
    if FORMAT == "nm":
        return load_four(codes_ptr + tile * 128 + lane * 4, ok)
    elif FORMAT == "dense":
        at = codes_ptr + tile * 256 + lane * 4
        return load_four(at, ok) + load_four(at + 128, ok)
    else:
        at = codes_ptr + place
        return (tl.load(at, mask=ok, other=0), tl.load(at + 1, mask=ok, other=0),
                tl.load(at + 2, mask=ok, other=0), tl.load(at + 3, mask=ok, other=0),
                tl.load(at - 1, mask=ok, other=0), tl.load(at - 2, mask=ok, other=0),
                tl.load(at - 3, mask=ok, other=0), tl.load(at - 4, mask=ok, other=0))


@triton.jit
def patterns(words, FORMAT: tl.constexpr, FP16: tl.constexpr):
    """Masks (not of "dense") and code words of a lane's tile -> 32 (T,) int32 registers of two
    patterns each."""
    if FORMAT == "nm":
        return tl.inline_asm_elementwise(NM_FP16 if FP16 else NM_BF16, SIX, words, WORDS, True, 1)
    elif FORMAT == "dense":
        return tl.inline_asm_elementwise(DENSE_FP16 if FP16 else DENSE_BF16, EIGHT, words, WORDS,
                                         True, 1)
    else:
        return tl.inline_asm_elementwise(UNSTRUCTURED_FP16 if FP16 else UNSTRUCTURED_BF16, TEN,
                                         words, WORDS, True, 1)
