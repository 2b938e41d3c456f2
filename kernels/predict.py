"""From what the compiler says (compiled.csv) to microseconds on GPUs that are not there.

    python -m kernels.predict                       # every GPU, the newest triton, 4096 x 11008
    python -m kernels.predict --gpu H100 --shape 4096x4096 --triton 3.6.0

Up to 64 tokens a product keeps the parts of a multiprocessor busy for a time that is counted:

    issue     a warp instruction a clock from each of four schedulers
    alu       64 lanes a clock: half of what is issued
    l1        a wavefront of 128 bytes a clock
    tensor    16 x 8 x 16 products over the peak rate, of which mma.sync reaches a share

Few warps are at work, so the parts take turns more than they overlap: a product takes TURNS of the
sum of their times, or as long as memory takes, and FIXED on top. All wait for the multiprocessor
that has the most programs. Above 64 tokens the weight is unpacked slab by slab, which is writing 16
bits a weight, then multiplied by cuBLAS. fp16 is cuBLAS alone; int4 is what memory allows at 4.25
bits a weight, a limit that no kernel is known to reach.

Rates of GPUs are of data sheets. The shares that are reached of them were fitted to an H200
(bench/h200.csv, which these times meet within 20%); for other GPUs they are a guess.
"""
import argparse
import re
import sys
from typing import NamedTuple

try:
    from kernels.compile import SLAB, TABLE, table
    from kernels.matmul import SLAB_BYTES, strips_of
except ImportError as e:
    raise SystemExit(f"error: predictions read the kernels themselves, and these need triton: {e}")

READ = 0.72                         # of the memory's rate: cuBLAS with few tokens
WRITTEN = 0.58                      # of the memory's rate: slabs
CUBLAS = 0.77                       # of the peak rate of products
FIXED = 2.5e-6                      # seconds: start, first loads, last sums; in a CUDA graph
TURNS = {8: 0.7, 16: 0.87, 32: 0.9, 64: 0.93}       # by the tokens that a kernel is made for
# in the order of fragments.py, half of the weights kept
BITS = {"dense": 4.0, "nm": 3.0, "unstructured": 3.36}
TIMED = (1, 8, 16, 64, 512, 1024, 4096)


class GPU(NamedTuple):
    sm: int                                                 # whose code it runs
    multiprocessors: int
    clock: float                                            # Hz
    memory: float                                           # bytes/s
    cache: float                                            # bytes/s of the second-level cache
    products: float                                         # 16-bit operations/s, sums in fp32
    mma_sync: float  # the share of them that mma.sync reaches


GPUS = {"A100": GPU(80, 108, 1.41e9, 2.04e12, 4.0e12, 312e12, 1.0),
        "H100": GPU(90, 132, 1.755e9, 3.35e12, 5.5e12, 989e12, 0.62),
        "H200": GPU(90, 132, 1.755e9, 4.8e12, 5.5e12, 989e12, 0.62),
        "4090": GPU(89, 128, 2.52e9, 1.008e12, 5.0e12, 165e12, 1.0)}


def on_chip(line: dict[str, str], gpu: GPU, weights: int) -> dict[str, float]:
    """Seconds that each part of a multiprocessor is busy, when all have the same to do."""
    count = {
        name: float(line[name]) * weights
        for name in ("per_weight", "alu", "wavefronts", "tensor")
    }
    clocks = gpu.multiprocessors * gpu.clock
    return {"issue": count["per_weight"] / 32 / (4 * clocks), "alu": count["alu"] / (64 * clocks),
            "l1": count["wavefronts"] / 32 / clocks,
            "tensor": count["tensor"] / 32 * 4096 / (gpu.products * gpu.mma_sync)}


def moved(shape: tuple[int, int], tokens: int, bits: float) -> float:
    """Bytes of the weight, x and y."""
    return shape[0] * shape[1] * bits / 8 + 2 * tokens * sum(shape)


def cublas(gpu: GPU, shape: tuple[int, int], tokens: int, rate: float) -> float:
    """Seconds of y = x W^T in 16 bits, W read at `rate`."""
    operations = 2 * tokens * shape[0] * shape[1]
    return max(moved(shape, tokens, 16) / (READ * rate), operations / (CUBLAS * gpu.products))


def packed(gpu: GPU, shape: tuple[int, int], tokens: int, lines: dict[int, dict[str, str]],
           bits: float) -> tuple[float, str]:
    """Seconds, and what they are spent on. lines: of the table, by tokens."""
    weights = shape[0] * shape[1]
    kernel = kernel_for(tokens)
    parts = on_chip(lines[kernel], gpu, weights)
    if kernel == SLAB:
        writing = 2 * weights / (WRITTEN * gpu.memory)
        slabs = -(-2 * weights // SLAB_BYTES)
        unpacking = max(writing, *parts.values()) + slabs * FIXED
        product = cublas(gpu, shape, tokens, gpu.cache)
        return unpacking + product + FIXED, f"{unpacking * 1e6:.0f} us unpacking"
    programs = shape[0] / (16 * strips_of(kernel))
    average = programs / gpu.multiprocessors
    most = -(-programs // gpu.multiprocessors)
    busy = most / average * TURNS[kernel] * sum(parts.values())
    memory = moved(shape, tokens, bits) / gpu.memory
    return max(busy, memory) + FIXED, "memory" if memory > busy else max(parts, key=parts.get)


def lines_of(version: str, sm: int, format: str, grid: str) -> dict[int, dict[str, str]]:
    """{tokens: line}, fp16 and a grid a row, counted in the largest layer; what was compiled for
    sm_90 alone stands in for others, whose instructions differ by a few percent."""
    found = {}
    for line in table():
        wanted = {"triton": version, "format": format, "grid": grid, "x": "fp16", "group": "row",
                  "shape": "4096x11008"}
        if all(line[name] == value for name, value in wanted.items()):
            tokens = SLAB if line["tokens"] == "slab" else int(line["tokens"])
            if line["sm"] == str(sm) or line["sm"] == "90" and tokens not in found:
                found[tokens] = line
    if not found:
        raise ValueError(f"{TABLE.name} has no line of triton {version} for {format}, {grid}: "
                         f"python -m kernels.compile --write")
    return found


def kernel_for(tokens: int) -> int:
    return SLAB if tokens > 64 else next(n for n in (8, 16, 32, 64) if tokens <= n)


def main(args) -> None:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", args.shape):
        raise ValueError(f"--shape {args.shape}: give out x in, such as 4096x11008")
    shape = tuple(int(n) for n in args.shape.split("x"))
    versions = {line["triton"] for line in table()}
    version = args.triton or max(versions, default="", key=lambda v: [int(p) for p in v.split(".")])
    if version not in versions:
        known = ", ".join(sorted(versions)) or "no lines"
        raise ValueError(f"--triton {version}: {TABLE.name} has {known}")
    print(f"Predicted from {TABLE.name}, triton {version}. {args.shape}, fp16 x, a grid a row, in a "
          f"CUDA graph")
    for name in args.gpu:
        gpu = GPUS[name]
        print(f"\n{name:4} {'':12} {'':8} tokens     us   x fp16  x int4's limit   bound by")
        for format in BITS:
            for grid in ("uniform", "offset"):
                lines = lines_of(version, gpu.sm, format, grid)
                for tokens in (t for t in TIMED if kernel_for(t) in lines):
                    seconds, bound = packed(gpu, shape, tokens, lines, BITS[format])
                    fp16 = cublas(gpu, shape, tokens, gpu.memory) + FIXED
                    int4 = max(moved(shape, tokens, 4.25) / (READ * gpu.memory),
                               2 * tokens * shape[0] * shape[1] / (CUBLAS * gpu.products)) + FIXED
                    print(f"{name:4} {format:12} {grid:8} {tokens:6} {seconds * 1e6:6.1f} "
                          f"{fp16 / seconds:8.2f} {int4 / seconds:10.2f}        {bound}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", nargs="+", default=list(GPUS), choices=list(GPUS))
    parser.add_argument("--shape", default="4096x11008", help="out x in")
    parser.add_argument("--triton", help="a version that compiled.csv has")
    try:
        main(parser.parse_args())
    except ValueError as e:
        sys.exit(f"error: {e}")
