"""y = x W^T for 1 to 64 tokens, with packed W decoded in the registers where the product reads it.

A program owns STRIPS strips of 16 rows; its warps share their columns, 128 at a time, each lane
decoding its part of a tile (fragments.py draws it, decode.py does it), and add up once at the end.
No partial sums go through memory, and inside the loop there is no shared memory and no barrier: all
tensors are one-dimensional with one element a thread, so that a register is what the code says.
Words are loaded two tiles ahead, and up to 8 tokens' x one tile.

    PLANES   up to 8 tokens: x times every plane of the codes, weighted once per output (planes.py)
    else     patterns become weights first, then one product each for every 8 tokens

fp32 sums of the tensor cores are cut off, not rounded: after CHUNK tiles they are added to a total
outside, and so they are after every tile where a grid belongs to GROUP columns (a multiple of 128).

Reference: y = x @ dequantize(packed).T
"""
import triton
import triton.language as tl

from kernels.decode import four, load_masks, load_place, load_words, patterns
from kernels.planes import (P_BF16, P_FP16, grid_numbers, multiply, multiply_planes, to_weights,
                            weigh)


@triton.jit
def zeros(n: tl.constexpr, T: tl.constexpr):
    """n zeros, (T,) fp32 each."""
    out = ()
    for _ in tl.static_range(n):
        out = out + (tl.zeros((T,), tl.float32),)
    return out


@triton.jit
def add(a, b, n: tl.constexpr):
    out = ()
    for i in tl.static_range(n):
        out = out + (a[i] + b[i],)
    return out


@triton.jit
def load_x(x_ptr, token, tile, q, ok, K: tl.constexpr):
    """A lane's columns of one token, 16 q ... and 64 + 16 q ..., two in each of 16 int32 registers.
    token, tile, q, ok (T,)."""
    out = ()
    for b in tl.static_range(4):
        k = tile * 128 + q * 16 + 64 * (b // 2) + 8 * (b % 2)
        if K % 8 == 0:  # rows begin at 16 bytes; eight columns are inside or not at all
            first = x_ptr.to(tl.pointer_type(tl.int32)) + (token * K + k) // 2
            at = first[:, None] + tl.arange(0, 4)[None, :]
            out = out + four(tl.load(at, mask=(ok & (k < K))[:, None], other=0))
        else:
            for i in tl.static_range(4):
                at = x_ptr.to(tl.pointer_type(tl.int16)) + token * K + k + 2 * i
                low = tl.load(at, mask=ok & (k + 2 * i < K), other=0).to(tl.int32) & 0xFFFF
                high = tl.load(at + 1, mask=ok & (k + 2 * i + 1 < K), other=0).to(tl.int32)
                out = out + (low | high << 16,)
    return out


@triton.jit
def load_tokens(x_ptr, tile, g, q, M, K: tl.constexpr, TOKENS: tl.constexpr):
    """Columns of a tile of 8 * TOKENS tokens, 16 registers for every eight of them."""
    out = ()
    for t in tl.static_range(TOKENS):
        out = out + load_x(x_ptr, 8 * t + g, tile, q, 8 * t + g < M, K)
    return out


@triton.jit
def load_grids(scale_ptr, zero_ptr, row, group, N: tl.constexpr, GROUPS: tl.constexpr,
               STRIPS: tl.constexpr):
    """Scales and zeros of the upper and the lower row of every strip, (T,) fp32 each. row: the
    first strip's upper one."""
    scale, zero = (), ()
    for half in tl.static_range(2 * STRIPS):
        at = tl.minimum(row + 8 * half, N - 1) * GROUPS + group
        scale = scale + (tl.load(scale_ptr + at).to(tl.float32),)
        zero = zero + (tl.load(zero_ptr + at).to(tl.float32),)
    return scale, zero


@triton.jit
def fetch(mask_ptr, codes_ptr, start_ptr, at_ptr, strip, tile, lane, STRIPS: tl.constexpr,
          TILES: tl.constexpr, LAST: tl.constexpr, FORMAT: tl.constexpr):
    """Masks and words of one tile in every strip, flat. Beyond TILES or the LAST strip: zeros."""
    out = ()
    for s in tl.static_range(STRIPS):
        ok = tile < (TILES if STRIPS == 1 else tl.where(strip + s < LAST, TILES, 0))
        t = (strip + s) * TILES + tile
        place = tile
        if FORMAT == "unstructured":
            place = load_place(start_ptr, at_ptr, t, lane, ok)
        if FORMAT != "dense":
            out = out + load_masks(mask_ptr, t, lane, ok)
        out = out + load_words(codes_ptr, t, lane, place, ok, FORMAT)
    return out


@triton.jit
def weigh_all(sums, scale, zero, STRIPS: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr,
              PLANES: tl.constexpr, FORMAT: tl.constexpr, OFFSET: tl.constexpr, FP16: tl.constexpr):
    """Sums of products -> sums of w x, 4 registers for every eight tokens and strip."""
    out = ()
    for i in tl.static_range(TOKENS * STRIPS):
        for j in tl.static_range(4):
            row_scale, row_zero = scale[i % STRIPS * 2 + j // 2], zero[i % STRIPS * 2 + j // 2]
            if PLANES:
                part = sums[4 * PARTS * i:4 * PARTS * i + 4 * PARTS]
                out = out + (weigh(part, j, row_scale, row_zero, FORMAT, OFFSET, FP16),)
            else:
                out = out + (sums[4 * i + j] * row_scale * (1024.0 if FP16 else 1.0),)
    return out


@triton.jit
def store(sums, y_ptr, row, M, N: tl.constexpr, STRIPS: tl.constexpr, TOKENS: tl.constexpr,
          WARPS: tl.constexpr):
    """Adds up what the warps have and writes it: lane 4 g + q holds tokens 2 q, 2 q + 1 of its
    upper row in its first two registers, of its lower row in the others. One register at a time,
    so that lanes which are neighbours are neighbours in shared memory too."""
    lane = tl.arange(0, 32)
    for i in tl.static_range(TOKENS * STRIPS):
        for j in tl.static_range(4):
            y = sums[4 * i + j].reshape(WARPS, 32).sum(0)
            token = i // STRIPS * 8 + lane % 4 * 2 + j % 2
            n = row + i % STRIPS * 16 + lane // 4 + j // 2 * 8
            tl.store(y_ptr + token * N + n, y.to(y_ptr.dtype.element_ty),
                     mask=(token < M) & (n < N))


@triton.jit(do_not_specialize=["M"])  # one kernel for every number of tokens up to 8 * TOKENS
def product_kernel(x_ptr, y_ptr, mask_ptr, codes_ptr, start_ptr, at_ptr, scale_ptr, zero_ptr, M,
                   N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr,
                   OFFSET: tl.constexpr, PLANES: tl.constexpr, STRIPS: tl.constexpr,
                   TOKENS: tl.constexpr, WARPS: tl.constexpr, CHUNK: tl.constexpr,
                   UNROLL: tl.constexpr):
    """x (M, K), y (M, N), M <= 8 * TOKENS. Program s has strips s * STRIPS and on."""
    T: tl.constexpr = 32 * WARPS
    TILES: tl.constexpr = (K + 127) // 128
    LAST: tl.constexpr = (N + 15) // 16
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP if GROUP else 1
    FP16: tl.constexpr = x_ptr.dtype.element_ty == tl.float16
    DENSE: tl.constexpr = FORMAT == "dense"
    # masks and codes of a lane's tile
    WORDS: tl.constexpr = 6 if FORMAT == "nm" else 8 if DENSE else 10
    PARTS: tl.constexpr = (1 + (not DENSE) + OFFSET + (DENSE or not FP16)) if PLANES else 1
    SUMS: tl.constexpr = STRIPS * TOKENS * PARTS * 4
    OUTS: tl.constexpr = STRIPS * TOKENS * 4
    STEPS: tl.constexpr = (TILES + WARPS - 1) // WARPS
    CHUNKS: tl.constexpr = (STEPS + CHUNK - 1) // CHUNK
    # of about one size: at most one step a chunk is for nothing
    EACH: tl.constexpr = (STEPS + CHUNKS - 1) // CHUNKS
    thread = tl.arange(0, T)
    lane, warp = thread % 32, thread // 32
    g, q = lane // 4, lane % 4
    strip = tl.program_id(0) * STRIPS
    row = strip * 16 + g
    scale, zero = load_grids(scale_ptr, zero_ptr, row, 0, N, GROUPS, STRIPS)
    now = fetch(mask_ptr, codes_ptr, start_ptr, at_ptr, strip, warp, lane, STRIPS, TILES, LAST,
                FORMAT)
    soon = fetch(mask_ptr, codes_ptr, start_ptr, at_ptr, strip, warp + WARPS, lane, STRIPS, TILES,
                 LAST, FORMAT)
    if PLANES:
        x = load_tokens(x_ptr, warp, g, q, M, K, TOKENS)
    total = zeros(OUTS, T)
    for chunk in range(CHUNKS):
        sums = zeros(SUMS, T)
        for step in tl.range(EACH, loop_unroll_factor=UNROLL):
            tile = (chunk * EACH + step) * WARPS + warp
            later = fetch(mask_ptr, codes_ptr, start_ptr, at_ptr, strip, tile + 2 * WARPS, lane,
                          STRIPS, TILES, LAST, FORMAT)
            if PLANES:
                next_x = load_tokens(x_ptr, tile + WARPS, g, q, M, K, TOKENS)
            if GROUP:
                group = tl.minimum(tile, TILES - 1) * 128 // GROUP
                scale, zero = load_grids(scale_ptr, zero_ptr, row, group, N, GROUPS, STRIPS)
                sums = zeros(SUMS, T)
            a = ()
            for s in tl.static_range(STRIPS):
                pattern = patterns(now[WORDS * s:WORDS * s + WORDS], FORMAT, FP16)
                if not PLANES:
                    upper = grid_numbers(zero[2 * s], OFFSET, FP16)
                    lower = grid_numbers(zero[2 * s + 1], OFFSET, FP16)
                    pattern = to_weights(pattern, upper, lower, OFFSET, FP16)
                a = a + pattern
            new = ()
            for t in tl.static_range(TOKENS):
                if PLANES:
                    one = x[16 * t:16 * t + 16]
                else:
                    one = load_x(x_ptr, 8 * t + g, tile, q, 8 * t + g < M, K)
                for s in tl.static_range(STRIPS):
                    part = sums[(t * STRIPS + s) * PARTS * 4:(t * STRIPS + s + 1) * PARTS * 4]
                    if PLANES:
                        new = new + multiply_planes(part, one, a[32 * s:32 * s + 32], FORMAT,
                                                    OFFSET, FP16)
                    else:
                        new = new + multiply(part, one, a[32 * s:32 * s + 32], P_FP16, P_BF16, FP16)
            sums = new
            if GROUP:
                weighted = weigh_all(sums, scale, zero, STRIPS, TOKENS, PARTS, PLANES, FORMAT,
                                     OFFSET, FP16)
                total = add(total, weighted, OUTS)
            now = soon
            soon = later
            if PLANES:
                x = next_x
        if not GROUP:
            weighted = weigh_all(sums, scale, zero, STRIPS, TOKENS, PARTS, PLANES, FORMAT, OFFSET,
                                 FP16)
            total = add(total, weighted, OUTS)
    store(total, y_ptr, strip * 16, M, N, STRIPS, TOKENS, WARPS)
