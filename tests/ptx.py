"""Inline PTX under Triton's interpreter: a numpy emulator of the few instructions that
kernels/decode.py and planes.py use, mma.sync among them.

    TRITON_INTERPRET=1 in the environment, then `ptx.install()` before a kernel is called.
"""
import re

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

U32, U64 = np.uint32, np.uint64
LANE = np.arange(32)


def prmt(a, b, selector):
    """Four bytes of (a, b); bit 3 of a selector repeats the byte's sign bit instead."""
    source = np.stack([(w >> U32(8 * i)) & U32(255) for w in (a, b) for i in range(4)])
    out = np.zeros_like(a)
    for i in range(4):
        pick = (selector >> U32(4 * i)) & U32(15)
        byte = np.take_along_axis(source, (pick & U32(7)).astype(np.int64)[None], 0)[0]
        byte = np.where(pick & U32(8), np.where(byte & U32(128), U32(255), U32(0)), byte)
        out |= byte.astype(U32) << U32(8 * i)
    return out


def lop3(a, b, c, table):
    """Any function of three bits: bit 4 a + 2 b + c of the table."""
    out = np.zeros_like(a)
    for i in range(8):
        if int(table[0]) >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def numbers(word, dtype):
    """(...,) uint32 -> (..., 2) float64 of the halves."""
    halves = torch.from_numpy(np.ascontiguousarray(word)[..., None].view(np.int16))
    return halves.view(dtype).double().numpy()


def fma_halves(dtype):
    """a * b + c on both 16-bit halves, in float64 (exact here), rounded once."""
    def operation(*words):
        a, b, c = (numbers(word, dtype) for word in words)
        rounded = torch.from_numpy(a * b + c).to(dtype)
        return rounded.view(torch.int16).numpy().view(U32)[..., 0]
    return operation


def both_halves(dtype):
    """Two fp32 registers, rounded to 16 bits: the first becomes the upper half."""
    def operation(high, low):
        two = torch.from_numpy(np.stack((low, high), -1).view(np.float32)).to(dtype)
        return two.view(torch.int16).numpy().view(U32)[..., 0]
    return operation


def shifted(a, n, by):
    """32-bit shifts give 0 from 32 on."""
    return np.where(n > 31, U32(0), by(a, np.minimum(n, U32(31))))


def funnel(left: bool):
    """Both words as one of 64 bits, shifted by at most 32; the lower or (left) the upper word of
    that."""
    def operation(lo, hi, n):
        pair = lo.astype(U64) | hi.astype(U64) << U64(32)
        n = np.minimum(n, U32(32)).astype(U64)
        moved = pair << n >> U64(32) if left else pair >> n
        return moved.astype(U32)
    return operation


def mma(kind, A, B, C):
    """D = A B + C of m16n8k16, registers as the PTX manual draws them; C and D fp32, the sum in
    fp32 as well."""
    dtype = torch.bfloat16 if ".bf16." in kind else torch.float16
    warps = A[0].size // 32
    g = LANE // 4
    q = LANE % 4
    a = np.zeros((warps, 16, 16))
    b = np.zeros((warps, 16, 8))
    for i, word in enumerate(A):
        for e in range(2):
            row = g + 8 * (i % 2)
            column = 2 * q + e + 8 * (i // 2)
            a[:, row, column] = numbers(word.reshape(warps, 32), dtype)[:, :, e]
    for i, word in enumerate(B):
        for e in range(2):
            b[:, 2 * q + e + 8 * i, g] = numbers(word.reshape(warps, 32), dtype)[:, :, e]
    product = a @ b
    places = [product[:, g + 8 * (i // 2), 2 * q + i % 2] for i in range(4)]
    sums = []
    for c, place in zip(C, places):
        total = c.view(np.float32).reshape(warps, 32) + place
        sums.append(total.astype(np.float32).reshape(-1).view(U32))
    return sums


def shuffle(a, lane, clamp, member):
    """Every lane's value of the lane whose number differs in the bits of `lane`."""
    assert int(clamp[0]) == 31 and int(member[0]) == 0xFFFFFFFF, "whole warps"
    return a.reshape(-1, 32)[:, LANE ^ int(lane[0])].reshape(-1)


OPERATIONS = {
    "mov.b32": lambda a: a,
    "and.b32": np.bitwise_and,
    "prmt.b32": prmt,
    "lop3.b32": lop3,
    "shr.u32": lambda a, n: shifted(a, n, np.right_shift),
    "shl.b32": lambda a, n: shifted(a, n, np.left_shift),
    "shf.r.clamp.b32": funnel(False),
    "shf.l.clamp.b32": funnel(True),
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "popc.b32": lambda a: np.bitwise_count(a).astype(U32),
    "shfl.sync.bfly.b32": shuffle,
    "cvt.rn.f16x2.f32": both_halves(torch.float16),
    "cvt.rn.bf16x2.f32": both_halves(torch.bfloat16),
    "fma.rn.f16x2": fma_halves(torch.float16),
    "fma.rn.bf16x2": fma_halves(torch.bfloat16),
}


def run(asm: str, registers: dict[str, np.ndarray], lanes: int) -> None:
    """Executes asm on 32-bit registers, one lane per element."""
    def value(name):
        return registers[name] if name in registers else np.full(lanes, int(name, 0), U32)
    body = asm.strip().removeprefix("{").removesuffix("}")
    for line in re.sub(r"\.reg[^;]*;", "", body).split(";"):
        line = line.strip()
        if not line:
            continue
        name, operands = line.split(None, 1)
        if name.startswith("mma.sync"):
            D, A, B, C = ([r.strip() for r in group.split(",")]
                          for group in re.findall(r"\{([^}]*)\}", operands))
            results = mma(name, *([value(r) for r in group] for group in (A, B, C)))
            registers.update(zip(D, results))
        else:
            target, *sources = (o.strip() for o in operands.split(","))
            registers[target] = OPERATIONS[name](*(value(s) for s in sources)).astype(U32)


def create_inline_asm(builder, asm, constraints, values, types, pure, pack):
    assert pack == 1 and all(v.data.dtype.itemsize == 4 for v in values), "32 bits per register"
    outputs = [c for c in constraints.split(",") if c.startswith("=")]
    shape = values[0].data.shape
    registers = {}
    for i, v in enumerate(values):
        registers[f"${len(outputs) + i}"] = np.ascontiguousarray(v.data).reshape(-1).view(U32)
    with np.errstate(over="ignore"):
        run(asm, registers, values[0].data.size)
    results = []
    for i, kind in enumerate(types):
        element = getattr(kind, "element_ty", kind)
        stored = {tl.float32: np.float32, tl.int32: np.int32}[element]
        value = registers[f"${i}"].view(stored).reshape(shape).copy()
        results.append(interpreter.TensorHandle(value, element))
    return type("Results", (), {"get_result": lambda self, i: results[i]})()


def install() -> None:
    # the compiler takes () + results as well
    tl.tuple.__radd__ = lambda self, other: tl.tuple([*other, *self])
    interpreter.InterpreterBuilder.create_inline_asm = create_inline_asm
