"""y = x W^T with packed W: one kernel, two ways to use what planes.py decodes.

    PLANES   up to 32 tokens: the tensor cores multiply x with every plane of the codes, and planes are weighted once
             per output. 2 (uniform) or 3 (offset) small products, hardly any arithmetic per weight.
    else     planes are added per weight first, one product per tile.

A program computes BN outputs of BM tokens over a share of the columns (split-K: with few tokens there are not enough
outputs to occupy a GPU). W is the left operand, so a batch of 8 fills the narrow side of a tensor core instruction.
Shares are summed by `sum_splits` in a fixed order: results do not change from run to run.

    W (BN, BK) . x^T (BK, BM) -> acc (BN, BM) fp32     scaled after each group of columns, or once at the end

Reference: kernels/reference.py, y = x @ dequantize(packed).T
"""
import triton
import triton.language as tl

from kernels.decode import tile
from kernels.planes import F_BF16, F_FP16, G_BF16, G_FP16, add_planes, plane


@triton.jit
def weigh(acc, acc_f, acc_g, scale, zero, OFFSET: tl.constexpr, PLANES: tl.constexpr, FP16: tl.constexpr):
    """Sums of x over planes (BN, BM), scale and zero (BN,) fp32 -> sums of w x. See planes.py for the weights.

    acc holds 16 f + n, acc_f 16 f and acc_g 16 f + 8 h, as fp16 in units of 2^-24."""
    unit: tl.constexpr = 1.0 if not FP16 else 16777216.0 if PLANES else 1024.0
    scale = scale[:, None] * unit
    y = acc * scale                                         # first: Triton would make acc + ... the start of acc's product
    if PLANES:
        low = (-7 - zero if OFFSET else -zero)[:, None]
        y += acc_f * ((low / 16 - 1) * scale)
        if OFFSET:
            y += (acc_g - acc_f) * ((2 * zero - 1)[:, None] / 8 * scale)
    return y


@triton.jit(do_not_specialize=["M"])                        # one kernel for every batch: the one compile.py looks at
def forward_kernel(x_ptr, out_ptr, mask_ptr, codes_ptr, row_start_ptr, tile_start_ptr, scale_ptr, zero_ptr, table_ptr,
                   M, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr, FORMAT: tl.constexpr,
                   OFFSET: tl.constexpr, PLANES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """x (M, K), out (splits, M, N). Program (n, m, split) does TILES tiles. GROUP columns share a grid; 0: all do."""
    FP16: tl.constexpr = x_ptr.dtype.element_ty == tl.float16
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP if GROUP else 1
    EVEN: tl.constexpr = K % (BK * TILES) == 0
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    row = tl.minimum(n, N - 1)
    row_start = tl.load(row_start_ptr + row) * 8 if FORMAT == "unstructured" else row
    total = tl.zeros((BN, BM), tl.float32)
    acc, acc_f, acc_g = total, total, total
    for i in range(TILES):
        k0 = (tl.program_id(2) * TILES + i) * BK
        pattern = tile(mask_ptr, codes_ptr, tile_start_ptr, table_ptr, row, row_start, k0, K, BK, FORMAT, EVEN, FP16)
        k = k0 + tl.arange(0, BK)
        x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & ((k < K)[None, :] | EVEN), other=0.0)
        if PLANES:
            acc = tl.dot(pattern, x.trans(), acc)
            if FORMAT == "dense":                           # f is 1 everywhere: a constant of the program
                f = tl.full((BN, BK), 9.5367431640625e-07 if FP16 else 16.0, tl.float32)                # 16 * 2^-24
                f = f.to(x_ptr.dtype.element_ty)
            else:
                f = plane(pattern, F_FP16 if FP16 else F_BF16, FP16)
            acc_f = tl.dot(f, x.trans(), acc_f)
            if OFFSET:
                acc_g = tl.dot(plane(pattern, G_FP16 if FP16 else G_BF16, FP16), x.trans(), acc_g)
        else:
            zero = tl.load(zero_ptr + row * GROUPS + (tl.minimum(k0, K - 1) // GROUP if GROUP else 0)).to(tl.float32)
            acc = tl.dot(add_planes(pattern, zero[:, None], OFFSET, FP16), x.trans(), acc)
        if GROUP:
            g = row * GROUPS + tl.minimum(k0, K - 1) // GROUP
            scale, zero = tl.load(scale_ptr + g).to(tl.float32), tl.load(zero_ptr + g).to(tl.float32)
            total += weigh(acc, acc_f, acc_g, scale, zero, OFFSET, PLANES, FP16)
            acc, acc_f, acc_g = tl.zeros_like(acc), tl.zeros_like(acc), tl.zeros_like(acc)
    if not GROUP:
        scale, zero = tl.load(scale_ptr + row).to(tl.float32), tl.load(zero_ptr + row).to(tl.float32)
        total = weigh(acc, acc_f, acc_g, scale, zero, OFFSET, PLANES, FP16)
    out = out_ptr + (tl.program_id(2) * M + m[None, :]) * N + n[:, None]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit
def sum_splits(parts_ptr, y_ptr, count, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """parts (SPLITS, count) fp32 -> y (count,)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts_ptr + split * count + i, mask=i < count, other=0.0)
    tl.store(y_ptr + i, total.to(y_ptr.dtype.element_ty), mask=i < count)
