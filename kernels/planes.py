"""From patterns to numbers: a 4-bit grid as a weighted sum of bit planes.

decode.py gives every weight a pattern of five bits, f = kept and n = rank of its level (0 where pruned). With h = top
bit of n, every grid is a weighted sum of planes whose weights depend on the row only, and pruned weights are 0 in all
of them:

    w = scale * (n + low * f + (high - low) * h)            uniform: low = high = -zero
                                                            offset:  low = -7 - zero, high = zero - 8

Read as fp16 numbers the patterns are subnormal, (16 f + n) * 2^-24, and exact: masking a plane out with `and` *is*
converting it to floating point. Small batches let the tensor cores add the planes (a product each, one `and` for two
weights); large batches add them with fused multiply-adds first (`add_planes`) and use one product. bfloat16's
subnormals lie too low to be multiplied; there the pattern is made the number 16 f + n itself, one instruction more
for two weights.

Reference: `dequantize` in reference.py.
"""
import triton
import triton.language as tl

# parts of a pattern, for two weights: 16 f, 16 f + 8 h, n. As bf16 numbers, 16 + n is 0x4180 | n << 3.
F_FP16, F_BF16 = tl.constexpr("and.b32 $0, $1, 0x00100010;"), tl.constexpr("and.b32 $0, $1, 0x41804180;")
G_FP16, G_BF16 = tl.constexpr("and.b32 $0, $1, 0x00180018;"), tl.constexpr("and.b32 $0, $1, 0x41c041c0;")
N_FP16 = tl.constexpr("and.b32 $0, $1, 0x000f000f;")


@triton.jit
def plane(pattern, PTX: tl.constexpr, FP16: tl.constexpr):
    """Part of the patterns as numbers, two weights per instruction; PTX is one of the strings above."""
    if FP16:
        return tl.inline_asm_elementwise(PTX, "=r,r", [pattern], dtype=tl.float16, is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise(PTX, "=r,r", [pattern], dtype=tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def to_half(x, FP16: tl.constexpr):
    return x.to(tl.float16) if FP16 else x.to(tl.bfloat16)


@triton.jit
def fma(a, b, c, FP16: tl.constexpr):
    """a * b + c, rounded once, for two weights at once; b and c fp32 (BN, 1)."""
    b, c = to_half(b, FP16), to_half(c, FP16)
    if FP16:
        return tl.inline_asm_elementwise("fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], tl.float16, True, 2)
    else:
        return tl.inline_asm_elementwise("fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], tl.bfloat16, True, 2)


@triton.jit
def add_planes(pattern, zero, OFFSET: tl.constexpr, FP16: tl.constexpr):
    """pattern (BN, BK), zero (BN, 1) fp32 -> (BN, BK) of w / scale, in units of 2^-10 (fp16) or 1 (bf16).

    Whole numbers are added first and exactly, fractions last.
    fp16: n * 2^-24 * 2^14 = n * 2^-10 and f * 2^-20 * 2^10 = f * 2^-10."""
    f, none = plane(pattern, F_FP16 if FP16 else F_BF16, FP16), zero * 0
    if FP16:
        w = fma(plane(pattern, N_FP16, FP16), none + 16384, none, FP16)
        if OFFSET:
            w = fma(f, none - 7 * 1024, w, FP16)
        w = fma(f, -zero * 1024, w, FP16)
    else:
        whole = none + 7 if OFFSET else tl.floor(zero + 0.5)
        rest = zero if OFFSET else zero - whole
        w = fma(f, -1 - whole / 16, pattern, FP16)                          # 16 f + n - 16 f - whole f
        w = fma(f, -rest / 16, w, FP16)
    if OFFSET:
        F_UNIT: tl.constexpr = 1024 if FP16 else 1 / 16
        h = fma(f, none - 1, plane(pattern, G_FP16 if FP16 else G_BF16, FP16), FP16)
        w = fma(h, (2 * zero - 1) * (2 * F_UNIT), w, FP16)
    return w
