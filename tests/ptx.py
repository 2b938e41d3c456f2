"""Inline PTX under Triton's interpreter: a numpy emulator of the few instructions that kernels/decode.py and
planes.py use, and a dot product that knows bfloat16.

    TRITON_INTERPRET=1 in the environment, then `ptx.install()` before a kernel is called.
"""
import re

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

U32 = np.uint32


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
    out = np.zeros_like(a)
    for i in range(8):
        if int(table[0]) >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def fma_halves(dtype):
    """a * b + c on both 16-bit halves, in float64 (exact here), rounded once."""
    def operation(*words):
        a, b, c = (torch.from_numpy(w.copy().view(np.int16)).view(dtype).double() for w in words)
        return (a * b + c).to(dtype).view(torch.int16).numpy().view(U32)
    return operation


def shr(a, n):
    return np.where(n > 31, U32(0), a >> np.minimum(n, U32(31)))


OPERATIONS = {
    "mov.b32": lambda a: a, "and.b32": np.bitwise_and, "shr.u32": shr, "prmt.b32": prmt, "lop3.b32": lop3,
    "popc.b32": lambda a: np.bitwise_count(a).astype(U32),
    "shf.r.wrap.b32": lambda lo, hi, n: ((lo.astype(np.uint64) | hi.astype(np.uint64) << np.uint64(32))
                                         >> (n & U32(31)).astype(np.uint64)).astype(U32),
    "fma.rn.f16x2": fma_halves(torch.float16), "fma.rn.bf16x2": fma_halves(torch.bfloat16),
}


def run(asm: str, registers: dict[str, np.ndarray], shape) -> None:
    """Executes asm on 32-bit registers, one lane per weight (or per two)."""
    def value(name):
        return registers[name] if name in registers else np.full(shape, int(name, 0), U32)
    for line in re.sub(r"[\n{}]*\.reg[^;]*;", "", asm.strip().removeprefix("{").removesuffix("}")).split(";"):
        line = line.strip()
        halves = re.match(r"mov\.b32 \{(\$\d+),(\$\d+)\}, (\w+)$", line)
        if halves:
            registers[halves[1]], registers[halves[2]] = value(halves[3]) & U32(0xFFFF), value(halves[3]) >> U32(16)
        elif line:
            name, operands = line.split(None, 1)
            target, *sources = (o.strip() for o in operands.split(","))
            registers[target] = OPERATIONS[name](*(value(s) for s in sources))


def create_inline_asm(builder, asm, constraints, values, types, pure, pack):
    outputs = [c for c in constraints.split(",") if c.startswith("=")]
    shape, registers = values[0].data.shape, {}
    lanes = (values[0].data.size // pack,)
    for i, v in enumerate(values):
        assert v.data.dtype.itemsize * pack == 4, "32 bits per register"
        registers[f"${len(outputs) + i}"] = np.ascontiguousarray(v.data).reshape(-1).view(U32)
    run(asm, registers, lanes)
    results = []
    for i, (constraint, kind) in enumerate(zip(outputs, types)):
        word = registers[f"${i}"]
        element = getattr(kind, "element_ty", kind)
        if constraint == "=h":
            word = word.astype(np.uint16)
        stored = {tl.float16: np.float16, tl.bfloat16: np.uint16, tl.int32: np.int32}[element]
        results.append(interpreter.TensorHandle(np.ascontiguousarray(word).view(stored).reshape(shape), element))
    return type("Results", (), {"get_result": lambda self, i: results[i]})()


def create_dot(builder, a, b, d, *_):
    """The interpreter's own dot takes bf16 bits for integers."""
    def numbers(t):
        bits = t.data.astype(U32) << U32(16)
        return bits.view(np.float32) if t.dtype.scalar == tl.bfloat16 else t.data.astype(np.float32)
    return interpreter.TensorHandle(np.matmul(numbers(a), numbers(b)) + d.data, d.dtype.scalar)


def install() -> None:
    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter.InterpreterBuilder.create_inline_asm = create_inline_asm
