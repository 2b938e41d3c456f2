"""Compile every configuration that ships for sm_80 and sm_90, without a GPU, and count what one weight costs.

    python -m kernels.compile --write                       # compiled.csv, all of it; about a second per line
    python -m kernels.compile --arch 90 --format nm --tokens 8

Columns: registers per thread, bytes spilled, bytes of shared memory, and per_weight: machine instructions of the main
loop for every weight that a thread decodes. To stay limited by memory rather than by instructions at batch 1, an H100
may spend about 3.5 per weight and an A100 3.7. Uses the assembler and disassembler inside triton's wheel.
"""
import argparse
import csv
import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.backward import backward_kernel
from kernels.forward import forward_kernel
from kernels.matmul import BACKWARD, FORWARD, Config, choose

TABLE = Path(__file__).with_name("compiled.csv")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
N, K, TILES = 4096, 8192, 32                                # a layer whose columns are a multiple of every share


class Variant(NamedTuple):
    direction: str                      # forward or backward
    arch: int
    format: str
    grid: str
    dtype: str                          # fp16 or bf16
    group: int                          # 0: grids per row
    config: Config


def variants(arch=(80, 90), directions=("forward", "backward"), formats=("dense", "nm", "unstructured"),
             grids=("uniform", "offset"), dtypes=("fp16", "bf16"), groups=(0, 128)):
    for direction, a, f, g, d, group in itertools.product(directions, arch, formats, grids, dtypes, groups):
        for c in (FORWARD if direction == "forward" else BACKWARD)[a]:
            yield Variant(direction, a, f, g, d, group, choose((c,), 1, group))


def build(v: Variant):
    """The compiled kernel of one variant."""
    kernel = forward_kernel if v.direction == "forward" else backward_kernel
    c = v.config
    constants = dict(N=N, K=K, GROUP=v.group, TILES=TILES, FORMAT=v.format, OFFSET=v.grid == "offset", PLANES=c.planes,
                     BM=c.BM, BN=c.BN, BK=c.BK)
    types = dict(x_ptr=f"*{v.dtype}", dy_ptr=f"*{v.dtype}", dx_ptr=f"*{v.dtype}", out_ptr="*fp32", mask_ptr="*i32",
                 codes_ptr="*i32", row_start_ptr="*i32", tile_start_ptr="*i16", scale_ptr="*fp16", zero_ptr="*fp16",
                 table_ptr="*i32", M="i32")
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(kernel, signature, {n: constants[n] for n in kernel.arg_names if n in constants}, aligned)
    options = {"num_warps": c.warps, "num_stages": c.stages}
    return triton.compile(source, target=GPUTarget("cuda", v.arch, 32), options=options)


def assembler(arch: int) -> Path:
    """PTX for sm_90 is newer than the plain ptxas reads since triton 3.8; the other one lies beside it."""
    newer = TOOLS / "ptxas-blackwell"
    recent = tuple(int(p) for p in triton.__version__.split(".")[:2]) >= (3, 8)
    return newer if arch >= 90 and recent and newer.exists() else TOOLS / "ptxas"


def inspect(v: Variant) -> dict:
    """registers, spilled (bytes), shared (bytes), per_weight (instructions of the main loop)."""
    compiled = build(v)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "k.ptx"), Path(folder, "k.cubin")
        ptx.write_text(compiled.asm["ptx"])
        cubin.write_bytes(compiled.asm["cubin"])
        name = "sm_90a" if v.arch == 90 else f"sm_{v.arch}"
        command = [assembler(v.arch), "-v", f"--gpu-name={name}", ptx, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True)
        sass = subprocess.run([TOOLS / "cuobjdump", "-sass", cubin], capture_output=True, text=True).stdout
    registers = re.search(r"Used (\d+) registers", report.stderr)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report.stderr)
    if not registers or not spills:
        raise ValueError(f"{v}: ptxas says {report.stderr.strip()[-300:]}")
    body = main_loop(sass)
    weights = v.config.BN * v.config.BK / (32 * v.config.warps)
    return dict(registers=int(registers[1]), spilled=int(spills[1]) + int(spills[2]), shared=compiled.metadata.shared,
                per_weight=len(body) / weights)


def main_loop(sass: str) -> list[str]:
    """The instructions between the longest backward jump and its target."""
    lines = [(int(a, 16), t) for a, t in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.M)]
    jumps = [(int(to[1], 16), at) for at, text in lines if "BRA" in text and (to := re.search(r"0x([0-9a-f]+)", text))]
    start, end = max((j for j in jumps if j[0] < j[1]), key=lambda j: j[1] - j[0], default=(0, 1 << 62))
    return [text for at, text in lines if start <= at <= end]


def row(v: Variant) -> dict:
    """A line of the table, all values as text."""
    c, r = v.config, inspect(v)
    limit = c.tokens if c.tokens < 1 << 30 else "more"
    named = dict(triton=triton.__version__, direction=v.direction, sm=v.arch, format=v.format, grid=v.grid, x=v.dtype,
                 group=v.group or "row", tokens=limit, BM=c.BM, BN=c.BN, BK=c.BK, warps=c.warps, registers=r["registers"],
                 spilled=r["spilled"], shared=r["shared"], per_weight=f"{r['per_weight']:.2f}")
    return {key: str(value) for key, value in named.items()}


def main(args) -> None:
    lines = []
    for v in variants(args.arch, args.direction, args.format, args.grid, args.dtype, args.group):
        if not args.tokens or v.config.tokens in args.tokens:
            lines.append(row(v))
            if len(lines) == 1:
                print(",".join(lines[0]))
            print(",".join(lines[-1].values()), flush=True)
    if not lines:
        raise ValueError(f"no configuration with a limit of {args.tokens} tokens")
    if args.write:
        part = TABLE.with_suffix(".tmp")
        with open(part, "w", newline="") as f:
            writer = csv.DictWriter(f, lines[0])
            writer.writeheader()
            writer.writerows(lines)
        part.replace(TABLE)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, values in (("arch", [80, 90]), ("direction", ["forward", "backward"]), ("grid", ["uniform", "offset"]),
                         ("format", ["dense", "nm", "unstructured"]), ("dtype", ["fp16", "bf16"])):
        parser.add_argument(f"--{name}", nargs="+", type=type(values[0]), default=values, choices=values)
    parser.add_argument("--group", type=int, nargs="+", default=[0, 128], help="columns that share a grid; 0: a row")
    parser.add_argument("--tokens", type=int, nargs="*", help="only configurations with these limits")
    parser.add_argument("--write", action="store_true", help="replace compiled.csv by the lines printed")
    try:
        main(parser.parse_args())
    except ValueError as e:
        sys.exit(f"error: {e}")
