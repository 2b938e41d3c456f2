"""dx = dy W with packed W, for learning what lies below a layer (a prompt) while W itself stays as it is.

The sum runs over W's rows now, so a program walks down the rows of one strip of BK columns, decodes BN of them at a
time exactly as the forward kernel does, and multiplies by their scales in the weight's precision (one more rounding):

    dy (BM, BN) . W (BN, BK) -> acc (BM, BK) fp32

Reference: kernels/reference.py, dx = dy @ dequantize(packed)
"""
import triton
import triton.language as tl

from kernels.decode import tile
from kernels.planes import add_planes, fma


@triton.jit(do_not_specialize=["M"])
def backward_kernel(dy_ptr, dx_ptr, mask_ptr, codes_ptr, row_start_ptr, tile_start_ptr, scale_ptr, zero_ptr, table_ptr,
                    M, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr,
                    OFFSET: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """dy (M, N), dx (M, K). Program (k, m)."""
    FP16: tl.constexpr = dy_ptr.dtype.element_ty == tl.float16
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP if GROUP else 1
    UNIT: tl.constexpr = 1024.0 if FP16 else 1.0
    EVEN: tl.constexpr = K % BK == 0
    k0 = tl.program_id(0) * BK
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    group = k0 // GROUP if GROUP else 0
    acc = tl.zeros((BM, BK), tl.float32)
    for i in range((N + BN - 1) // BN):
        n = i * BN + tl.arange(0, BN)
        row = tl.minimum(n, N - 1)
        row_start = tl.load(row_start_ptr + row) * 8 if FORMAT == "unstructured" else row
        pattern = tile(mask_ptr, codes_ptr, tile_start_ptr, table_ptr, row, row_start, k0, K, BK, FORMAT, EVEN, FP16)
        scale = tl.load(scale_ptr + row * GROUPS + group).to(tl.float32)[:, None]
        zero = tl.load(zero_ptr + row * GROUPS + group).to(tl.float32)[:, None]
        w = add_planes(pattern, zero, OFFSET, FP16)
        w = fma(w, scale * UNIT, scale * 0, FP16)
        dy = tl.load(dy_ptr + m[:, None] * N + n[None, :], mask=(m < M)[:, None] & (n < N)[None, :], other=0.0)
        acc = tl.dot(dy, w, acc)
    k = k0 + tl.arange(0, BK)
    dx = acc.to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + m[:, None] * K + k[None, :], dx, mask=(m < M)[:, None] & (k < K)[None, :])
