"""Packed weights back to dense ones on a GPU, a slab at a time: what large batches are multiplied
with by cuBLAS.

A warp decodes a tile of 16 rows x 128 columns as the product does (fragments.py, decode.py), makes
numbers of the patterns in fp32 and rounds them once, so that the result is the solver's weight bit
for bit, in any dtype and with any grouping.

Reference: `unpack` in unpacking.py
"""
import triton
import triton.language as tl

from kernels.decode import load_masks, load_place, load_words, patterns


@triton.jit
def level(pattern, scale, zero, OFFSET: tl.constexpr):
    """The weight of a pattern (T,) int32; 0 where pruned."""
    n = pattern & 15
    if OFFSET:
        w = tl.where(n < 8, -scale, scale) * (tl.where(n < 8, 7 - n, n - 8).to(tl.float32) + zero)
    else:
        w = scale * (n.to(tl.float32) - zero)
    return tl.where((pattern & 16) != 0, w, 0.0)


@triton.jit
def grid_at(scale_ptr, zero_ptr, row, k, K: tl.constexpr, GROUP: tl.constexpr):
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP if GROUP else 1
    at = row * GROUPS + (tl.minimum(k, K - 1) // GROUP if GROUP else 0)
    return tl.load(scale_ptr + at).to(tl.float32), tl.load(zero_ptr + at).to(tl.float32)


@triton.jit(do_not_specialize=["first_strip", "first_tile"])
def slab_kernel(out_ptr, mask_ptr, codes_ptr, start_ptr, at_ptr, scale_ptr, zero_ptr, first_strip,
                first_tile, width, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
                FORMAT: tl.constexpr, OFFSET: tl.constexpr, WARPS: tl.constexpr):
    """out (rows, width): W from row 16 * first_strip and column 128 * first_tile on. Program
    (strip, WARPS tiles)."""
    T: tl.constexpr = 32 * WARPS
    TILES: tl.constexpr = (K + 127) // 128
    thread = tl.arange(0, T)
    lane, tile = thread % 32, first_tile + tl.program_id(1) * WARPS + thread // 32
    strip = first_strip + tl.program_id(0)
    ok = tile < tl.minimum(TILES, first_tile + (width + 127) // 128)
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
        scale, zero = grid_at(scale_ptr, zero_ptr, row, 0, K, GROUP)
        for b in tl.static_range(4):
            k = tile * 128 + lane % 4 * 16 + 64 * (b // 2) + 8 * (b % 2)
            if GROUP and GROUP % 8 == 0:
                scale, zero = grid_at(scale_ptr, zero_ptr, row, k, K, GROUP)
            w = ()
            for j in tl.static_range(8):
                if GROUP and GROUP % 8:
                    scale, zero = grid_at(scale_ptr, zero_ptr, row, k + j, K, GROUP)
                two = pattern[16 * half + 4 * b + j // 2]
                one = level(two >> 16 if j % 2 else two, scale, zero, OFFSET)
                w = w + (one.to(out_ptr.dtype.element_ty),)
            even = tl.join(tl.join(w[0], w[4]), tl.join(w[2], w[6]))
            odd = tl.join(tl.join(w[1], w[5]), tl.join(w[3], w[7]))
            eight = tl.join(even, odd).reshape(T, 8)
            column = k[:, None] + tl.arange(0, 8)[None, :]
            inside = ok & (n < N)
            at = (strip - first_strip) * 16 + lane // 4 + 8 * half
            tl.store(out_ptr + at[:, None] * width + column - first_tile * 128, eight,
                     mask=inside[:, None] & (column < tl.minimum(K, first_tile * 128 + width)))
