"""From patterns to numbers: a 4-bit grid as a weighted sum of bit planes, on the tensor cores or
before them.

decode.py gives every weight a pattern of five bits, f = kept and n = rank of its level (0 where
pruned). With h = top bit of n, every grid is a weighted sum of planes whose weights depend on the
row only, and pruned weights are 0 in all of them:

    w = scale * (n + low * f + (high - low) * h)        uniform: low = high = -zero
                                                        offset:  low = -7 - zero, high = zero - 8

Up to 8 tokens the tensor cores multiply x with every plane, and planes are weighted once per output
(`weigh`): hardly any arithmetic per weight, and one `and` makes a plane of two weights. What they
sum, p being the pattern as a number:

    P  x with p                 fp16: p = (16 f + n) * 2^-24       bf16: p = 128 + 16 f + n
    F  x with 16 f of it        where nothing is pruned F is a constant of the row: ONE in its place
    G  x with 16 f + 8 h        offset grids
    ONE                         x alone: takes off bf16's 128

Above 8 tokens every pattern is made a weight first (`to_weights`, fused multiply-adds), and there
is one product.

Reference: `dequantize` in reference.py.
"""
import torch
import triton
import triton.language as tl


def product_ptx(bf16: bool, part: str) -> str:
    """Eight products of m16n8k16, 16 rows x 128 columns with 8 tokens. $0-$3 sums; $4-$7 the sums
    so far, $8-$23 x, $24-$55 patterns. part: "" for all of a pattern, "& mask" for a part, or a
    constant in its place."""
    kind = "mma.sync.aligned.m16n8k16.row.col.f32.{0}.{0}.f32".format("bf16" if bf16 else "f16")
    lines = ["{ .reg .f32 c0, c1, c2, c3; .reg .b32 a0, a1, a2, a3;"]
    if part and part[0] != "&":
        lines.append(" ".join(f"mov.b32 a{i}, {part};" for i in range(4)))
    for m in range(8):
        # rows g, g + 8, g, g + 8
        a = [f"${24 + 2 * m}", f"${40 + 2 * m}", f"${25 + 2 * m}", f"${41 + 2 * m}"]
        if part:
            lines += [f"and.b32 a{i}, {r}, {part[1:]};" for i, r in enumerate(a) if part[0] == "&"]
            a = ["a0", "a1", "a2", "a3"]
        b = f"${8 + 2 * m}, ${9 + 2 * m}"
        c = [f"${4 + i}" for i in range(4)] if m == 0 else [f"c{i}" for i in range(4)]
        d = [f"${i}" for i in range(4)] if m == 7 else [f"c{i}" for i in range(4)]
        lines.append(f"{kind} {{{', '.join(d)}}}, {{{', '.join(a)}}}, {{{b}}}, {{{', '.join(c)}}};")
    return "\n".join(lines) + " }"


def weights_ptx(bf16: bool, offset: bool) -> str:
    """$0-$31 weights over scale, twice in a register; $32-$63 patterns, $64 $65 the grid of the
    upper row, $66 $67 of the lower (`grid_numbers`). Whole numbers are added first and exactly,
    fractions last, each rounded once."""
    fma = "fma.rn.bf16x2" if bf16 else "fma.rn.f16x2"
    half = lambda x: int_of_half(x, bf16) * 0x10001
    lines = ["{ .reg .b32 f, h, w, k, t;"]
    for i in range(32):
        p, low, slope = f"${32 + i}", f"${64 + i // 16 * 2}", f"${65 + i // 16 * 2}"
        if bf16:                                            # w = 16 f + n; f: 16 f
            lines.append(
                f"mov.b32 k, {half(1.0):#x}; mov.b32 t, {half(-128.0):#x}; {fma} w, {p}, k, t;")
            lines.append("and.b32 f, w, 0x41804180;")       # 16 + n is 0x4180 | n << 3
            lines.append(f"mov.b32 k, {half(-23 / 16 if offset else -1.0):#x}; {fma} w, f, k, w;")
        else:                                               # w = (16 f + n) 2^-10; f: f 2^-20
            lines.append(f"mov.b32 k, {half(16384.0):#x}; mov.b32 t, 0; {fma} w, {p}, k, t;")
            lines.append(f"and.b32 f, {p}, 0x00100010;")
            lines.append(
                f"mov.b32 k, {half(-23552.0 if offset else -16384.0):#x}; {fma} w, f, k, w;")
        if offset:
            if bf16:                                        # h: 16 f + 8 h, then 8 h
                lines.append(f"and.b32 h, {p}, 0x43184318; mov.b32 k, {half(1.0):#x}; "
                             f"mov.b32 t, {half(-128.0):#x};")
                lines.append(f"{fma} h, h, k, t; mov.b32 k, {half(-1.0):#x}; {fma} h, f, k, h;")
            else:
                lines.append(f"and.b32 h, {p}, 0x00080008;")                            # h 2^-21
            lines.append(f"{fma} w, f, {low}, w; {fma} ${i}, h, {slope}, w;")
        else:
            lines.append(f"{fma} ${i}, f, {low}, w;")
    return "\n".join(lines) + " }"


def int_of_half(x: float, bf16: bool) -> int:
    """The bits of x as a 16-bit number."""
    number = torch.tensor(x, dtype=torch.bfloat16 if bf16 else torch.float16)
    return int(number.view(torch.int16)) & 0xFFFF


P_FP16 = tl.constexpr(product_ptx(False, ""))
P_BF16 = tl.constexpr(product_ptx(True, ""))
F_FP16 = tl.constexpr(product_ptx(False, "&0x00100010"))
F_BF16 = tl.constexpr(product_ptx(True, "&0x43104310"))
G_FP16 = tl.constexpr(product_ptx(False, "&0x00180018"))
G_BF16 = tl.constexpr(product_ptx(True, "&0x43184318"))
ONE_FP16 = tl.constexpr(product_ptx(False, "0x3c003c00"))
ONE_BF16 = tl.constexpr(product_ptx(True, "0x3f803f80"))
PRODUCT = tl.constexpr(",".join(["=&f"] * 4 + ["f"] * 4 + ["r"] * 48))
UNIFORM_FP16 = tl.constexpr(weights_ptx(False, False))
UNIFORM_BF16 = tl.constexpr(weights_ptx(True, False))
OFFSET_FP16 = tl.constexpr(weights_ptx(False, True))
OFFSET_BF16 = tl.constexpr(weights_ptx(True, True))
WEIGHTS = tl.constexpr(",".join(["=&r"] * 32 + ["r"] * 36))
FOUR_SUMS, WORDS = tl.constexpr((tl.float32,) * 4), tl.constexpr((tl.int32,) * 32)


@triton.jit
def multiply(sums, x, a, FP16_PTX: tl.constexpr, BF16_PTX: tl.constexpr, FP16: tl.constexpr):
    """sums + a x: 4 fp32 registers a lane. sums 4, x 16, a 32 tensors (T,)."""
    return tl.inline_asm_elementwise(FP16_PTX if FP16 else BF16_PTX, PRODUCT, sums + x + a,
                                     FOUR_SUMS, True, 1)


@triton.jit
def multiply_planes(sums, x, a, FORMAT: tl.constexpr, OFFSET: tl.constexpr, FP16: tl.constexpr):
    """The sums of one strip and eight tokens, 4 registers a plane: P; F (not where dense); G
    (offset); ONE (dense, bf16)."""
    p = multiply(sums[0:4], x, a, P_FP16, P_BF16, FP16)
    at: tl.constexpr = 4 if FORMAT == "dense" else 8        # where G begins
    if FORMAT != "dense":
        p = p + multiply(sums[4:8], x, a, F_FP16, F_BF16, FP16)
    if OFFSET:
        p = p + multiply(sums[at:at + 4], x, a, G_FP16, G_BF16, FP16)
    if FORMAT == "dense" or not FP16:
        one: tl.constexpr = at + 4 if OFFSET else at
        p = p + multiply(sums[one:one + 4], x, a, ONE_FP16, ONE_BF16, FP16)
    return p


@triton.jit
def weigh(sums, i: tl.constexpr, scale, zero, FORMAT: tl.constexpr, OFFSET: tl.constexpr,
          FP16: tl.constexpr):
    """The i-th register of every plane, weighted: the sum of w x. scale and zero fp32, of that
    register's row."""
    at: tl.constexpr = 4 if FORMAT == "dense" else 8
    one: tl.constexpr = at + 4 if OFFSET else at
    unit: tl.constexpr = 16777216.0 if FP16 else 1.0        # 2^24
    p = sums[i] * unit
    if FORMAT == "dense":
        f = sums[one + i]
        whole = f * (16.0 if FP16 else 144.0)
    elif FP16:
        whole = sums[4 + i] * unit
        f = whole / 16
    else:
        whole = sums[4 + i]
        f = (whole - 128 * sums[one + i]) / 16
    if OFFSET:
        y = p - whole - (7 + zero) * f + (2 * zero - 1) * ((sums[at + i] * unit - whole) / 8)
    else:
        y = p - whole - zero * f
    return y * scale


@triton.jit
def twice(x, FP16: tl.constexpr):
    """(T,) fp32 -> int32 with the 16-bit number in both halves."""
    half = x.to(tl.float16) if FP16 else x.to(tl.bfloat16)
    half = half.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return half | half << 16


@triton.jit
def grid_numbers(zero, OFFSET: tl.constexpr, FP16: tl.constexpr):
    """What `to_weights` multiplies f and h with, from a row's zero (T,) fp32."""
    unit: tl.constexpr = 1024.0 if FP16 else 0.0625         # f is 2^-20, or 16
    return (twice(-zero * unit, FP16), twice((2 * zero - 1) * (2048.0 if FP16 else 0.125), FP16))


@triton.jit
def to_weights(a, upper, lower, OFFSET: tl.constexpr, FP16: tl.constexpr):
    """Patterns -> w / scale, in units of 2^-10 (fp16) or 1 (bf16)."""
    if OFFSET:
        return tl.inline_asm_elementwise(OFFSET_FP16 if FP16 else OFFSET_BF16, WEIGHTS,
                                         a + upper + lower, WORDS, True, 1)
    else:
        return tl.inline_asm_elementwise(UNIFORM_FP16 if FP16 else UNIFORM_BF16, WEIGHTS,
                                         a + upper + lower, WORDS, True, 1)
