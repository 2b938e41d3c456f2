"""Packed weights back to dense ones on a GPU, a slab at a time: what large batches are multiplied
with by cuBLAS.

A warp decodes a tile of 16 rows x 128 columns as the product does (fragments.py, decode.py), makes
numbers of the patterns in fp32 and rounds them once, so that the result is the solver's weight bit
for bit, in any dtype and with any grouping.

A lane has 16 neighbouring columns, 32 bytes in 16 bits, and stores 16 bytes at a time. Memory is
written 32 bytes at a time, so lanes first exchange halves with their neighbours: each store then
fills what two lanes write, which halves the time on an H200.

Reference: `unpack` in unpacking.py
"""
import triton
import triton.language as tl

from kernels.decode import load_masks, load_place, load_words, patterns


PACK_FP16 = tl.constexpr("cvt.rn.f16x2.f32 $0, $2, $1;")     # $1 becomes the lower half
PACK_BF16 = tl.constexpr("cvt.rn.bf16x2.f32 $0, $2, $1;")
SWAP = tl.constexpr("shfl.sync.bfly.b32 $0, $1, 1, 0x1f, 0xffffffff;")


@triton.jit
def level(half, scale, zero, OFFSET: tl.constexpr):
    """The level of a pattern (T,) int32 whose upper half is clear, fp32; anything where pruned."""
    number = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)  # (16 f + n) 2^-24
    if OFFSET:
        # -7.5 ... 7.5 around the middle of the levels: its sign is theirs
        side = number * 16777216.0 - 23.5
        w = scale * (tl.abs(side) - 0.5 + zero)
        sign = side.to(tl.int32, bitcast=True) & -2147483648
        return (w.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    else:
        return scale * ((number * 16777216.0 - 16.0) - zero)


@triton.jit
def pairs(p, w, FORMAT: tl.constexpr, FP16: tl.constexpr):
    """Eight fp32 weights, rounded to 16 bits, in four int32; 0 where the patterns p say pruned."""
    out = ()
    for i in tl.static_range(4):
        word = tl.inline_asm_elementwise(PACK_FP16 if FP16 else PACK_BF16, "=r,f,f",
                                         (w[2 * i], w[2 * i + 1]), tl.int32, True, 1)
        if FORMAT != "dense":
            word = word & ((p[i] & 0x00100010) >> 4) * 0xFFFF
        out = out + (word,)
    return out


@triton.jit
def swap(x):
    """(T,) int32: what the neighbour has, lane 0 gets lane 1's, lane 1 gets lane 0's, and so on."""
    return tl.inline_asm_elementwise(SWAP, "=r,r", (x,), tl.int32, True, 1)


@triton.jit
def grid_at(scale_ptr, zero_ptr, row, k, K: tl.constexpr, GROUP: tl.constexpr):
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP if GROUP else 1
    at = row * GROUPS + (tl.minimum(k, K - 1) // GROUP if GROUP else 0)
    return tl.load(scale_ptr + at).to(tl.float32), tl.load(zero_ptr + at).to(tl.float32)


@triton.jit
def store_four(to, words, inside, T: tl.constexpr):
    """Four int32 a lane from its pointer on: 16 bytes in one go."""
    four = tl.join(tl.join(words[0], words[2]), tl.join(words[1], words[3])).reshape(T, 4)
    tl.store(to[:, None] + tl.arange(0, 4)[None, :], four, mask=inside[:, None])


@triton.jit(do_not_specialize=["first_strip", "first_tile"])
def slab_kernel(out_ptr, mask_ptr, codes_ptr, start_ptr, at_ptr, scale_ptr, zero_ptr, first_strip,
                first_tile, width, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
                FORMAT: tl.constexpr, OFFSET: tl.constexpr, EIGHTS: tl.constexpr,
                WARPS: tl.constexpr):
    """out (rows, width): W from row 16 * first_strip and column 128 * first_tile on. Program
    (strip, WARPS tiles). EIGHTS: out has 16 bits and its width is a multiple of 8."""
    T: tl.constexpr = 32 * WARPS
    FP16: tl.constexpr = out_ptr.dtype.element_ty == tl.float16
    TILES: tl.constexpr = (K + 127) // 128
    thread = tl.arange(0, T)
    lane, tile = thread % 32, first_tile + tl.program_id(1) * WARPS + thread // 32
    even = lane % 2 == 0
    strip = first_strip + tl.program_id(0)
    end = first_tile * 128 + width
    ok = tile * 128 < end
    t = strip * TILES + tile
    words = ()
    if FORMAT != "dense":
        words = words + load_masks(mask_ptr, t, lane, ok)
    place = t
    if FORMAT == "unstructured":
        place = load_place(start_ptr, at_ptr, t, lane, ok)
    pattern = patterns(words + load_words(codes_ptr, t, lane, place, ok, FORMAT), FORMAT, True)
    for half in tl.static_range(2):
        n = strip * 16 + lane // 4 + 8 * half
        row = tl.minimum(n, N - 1)
        inside = ok & (n < N)
        scale, zero = grid_at(scale_ptr, zero_ptr, row, 0, K, GROUP)
        for b in tl.static_range(4):
            k = tile * 128 + lane % 4 * 16 + 64 * (b // 2) + 8 * (b % 2)
            if GROUP and GROUP % 8 == 0:
                scale, zero = grid_at(scale_ptr, zero_ptr, row, k, K, GROUP)
            p = pattern[16 * half + 4 * b:16 * half + 4 * b + 4]
            w = ()
            for j in tl.static_range(8):
                if GROUP and GROUP % 8:
                    scale, zero = grid_at(scale_ptr, zero_ptr, row, k + j, K, GROUP)
                one = p[j // 2] >> 16 if j % 2 else p[j // 2] & 0xFFFF
                w = w + (level(one, scale, zero, OFFSET),)
            to = out_ptr + (n - first_strip * 16) * width + k - first_tile * 128
            if not EIGHTS:
                for j in tl.static_range(8):
                    kept = p[j // 2] & (0x100000 if j % 2 else 0x10)
                    one = tl.where(kept != 0, w[j], 0.0).to(out_ptr.dtype.element_ty)
                    tl.store(to + j, one, mask=inside & (k + j < end))
            elif b % 2 == 0:                                # the first 8 of 16 columns: wait
                first = pairs(p, w, FORMAT, FP16)
            else:
                second = pairs(p, w, FORMAT, FP16)
                left, right = (), ()
                for i in tl.static_range(4):
                    got = swap(tl.where(even, second[i], first[i]))
                    left = left + (tl.where(even, first[i], got),)
                    right = right + (tl.where(even, got, second[i]),)
                # the even lane's 16 columns, 8 of them from either lane, then the odd lane's
                back = tl.where(even, 8, 16)
                to = (to - back).to(tl.pointer_type(tl.int32))
                store_four(to, left, inside & (k - back < end), T)
                store_four(to + 8, right, inside & (k - back + 16 < end), T)
