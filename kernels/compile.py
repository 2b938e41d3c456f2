"""Compile the kernels for GPUs that are not there, and count what one weight costs.

    python -m kernels.compile                               # a line for each kernel; seconds each
    python -m kernels.compile --arch 90 --format nm --tokens 8
    python -m kernels.compile --write                       # puts the lines into compiled.csv

compiled.csv has lines of several versions of triton: --write replaces, of the version that runs,
the lines of the kernels it compiled. Columns: registers a thread, bytes spilled, bytes of shared
memory; then what a thread does in the innermost loop (counted = loop), or in all of the kernel
where a layer has so few columns that the compiler unrolled it, and in the slab kernel, which has no
loop (counted = all). For every weight that it decodes:

    per_weight    machine instructions, and of these by pipe: alu (logic, shifts, prmt: half rate on
                  all these GPUs), fma (also integer multiplication), lsu (loads, stores, shared
                  memory), tensor, other
    wavefronts    what loads and stores keep the L1 cache busy with: 128 bytes of a warp each

and not per weight:

    exchanges     instructions by which threads see each other's data: accesses to shared memory and
                  shuffles. A layout conversion that is more than another name for a register
                  becomes one of these
    barriers

Uses the assembler and disassembler inside triton's wheel.
"""
import argparse
import csv
import itertools
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Iterator, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.matmul import launch, of_slab, steps_of
from kernels.product import product_kernel
from kernels.slab import slab_kernel

TABLE = Path(__file__).with_name("compiled.csv")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
ARCHS = (80, 89, 90, 100, 120)
FORMATS, GRIDS = ("dense", "nm", "unstructured"), ("uniform", "offset")
LAYER = (4096, 11008)
SHAPES = ((4096, 4096), (11008, 4096), (2048, 8192))          # LLaMA-7B, and OPT-1.3B's way down
SLAB = 0  # in the place of tokens: the kernel that unpacks
TOKENS = (8, 16, 32, 64, SLAB)
# the columns that name a kernel
KEY = ("triton", "sm", "tokens", "format", "grid", "x", "group", "shape")
ALU = ("LOP3 SHF PRMT IADD3 IADD SEL ISETP LEA VIADD IABS IMNMX VIMNMX FMNMX PLOP3 P2R R2P BMSK "
       "SGXT LOP FSEL FSETP HMNMX2 SHL SHR FSET HSETP2 VABSDIFF MOV CS2R").split()
FMA = "IMAD FFMA FMUL FADD HFMA2 HADD2 HMUL2 IDP".split()
LSU = "LDG STG LDS STS LDSM SHFL RED ATOM ATOMG LDGSTS LDC STL LDL ATOMS MATCH REDUX".split()
TENSOR = "HMMA IMMA HGMMA".split()


class Variant(NamedTuple):
    arch: int
    tokens: int                         # 8, 16, 32, 64: the most of a product; SLAB
    format: str
    grid: str
    dtype: str                          # fp16 or bf16
    group: int                          # 0: grids per row
    shape: tuple[int, int]


def variants(archs=ARCHS, formats=FORMATS, tokens=TOKENS) -> Iterator[Variant]:
    """On an H100 the kernels of all numbers of tokens, and up to 8 also bf16, groups and other
    shapes; elsewhere up to 8."""
    for arch, count, format, grid in itertools.product(archs, tokens, formats, GRIDS):
        if arch != 90 and count != 8:
            continue
        yield Variant(arch, count, format, grid, "fp16", 0, LAYER)
        if arch == 90 and count == 8 and grid == "uniform":
            yield Variant(arch, count, format, grid, "bf16", 0, LAYER)
            yield Variant(arch, count, format, grid, "fp16", 128, LAYER)
            yield from (Variant(arch, count, format, grid, "fp16", 0, shape) for shape in SHAPES)


class Built(NamedTuple):
    compiled: triton.compiler.CompiledKernel
    in_loop: int  # weights that a thread decodes in one pass of the innermost loop
    in_all: int                         # in the whole kernel


def build(v: Variant) -> Built:
    meta = dict(shape=v.shape, format=v.format, grid=v.grid, groupsize=v.group or -1)
    if v.tokens == SLAB:
        kernel, constants = slab_kernel, of_slab(meta, True)
        in_loop = in_all = 64
    else:
        kernel, constants = product_kernel, launch(meta, v.tokens)[1]
        in_loop = 64 * constants["STRIPS"] * constants["UNROLL"]
        in_all = 64 * constants["STRIPS"] * steps_of(v.shape[1], v.tokens)
    warps = constants.pop("num_warps")
    types = dict(x_ptr=f"*{v.dtype}", y_ptr=f"*{v.dtype}", out_ptr=f"*{v.dtype}", mask_ptr="*i32",
                 codes_ptr="*i32", start_ptr="*i32", at_ptr="*u8", scale_ptr="*fp16",
                 zero_ptr="*fp16", M="i32", first_strip="i32", first_tile="i32", width="i32")
    signature = {
        name: "constexpr" if name in constants else types[name]
        for name in kernel.arg_names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, (name, kind) in enumerate(signature.items())
               if kind.startswith("*") or name == "width"}
    taken = {name: constants[name] for name in kernel.arg_names if name in constants}
    source = ASTSource(kernel, signature, taken, aligned)
    # what a launch takes; without tl.dot nothing is pipelined
    options = {"num_warps": warps, "num_stages": 3}
    target = GPUTarget("cuda", v.arch, 32)
    return Built(triton.compile(source, target=target, options=options), in_loop, in_all)


def assembler(arch: int) -> Path:
    """PTX for sm_90 is newer than the plain ptxas reads since triton 3.8; the other one lies beside
    it."""
    newer = TOOLS / "ptxas-blackwell"
    recent = tuple(int(p) for p in triton.__version__.split(".")[:2]) >= (3, 8)
    return newer if (arch >= 90 and recent or arch >= 100) and newer.exists() else TOOLS / "ptxas"


def innermost(sass: str) -> tuple[list[str], bool]:
    """The instructions of the longest loop that has no loop inside, True; where there is no loop
    all of them, False."""
    lines = [(int(a, 16), t)
             for a, t in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.M)]
    jumps = [(int(to[1], 16), at)
             for at, text in lines
             if "BRA" in text and (to := re.search(r"0x([0-9a-f]+)", text))]
    loops = [(a, b) for a, b in jumps if a < b]
    inner = [(a, b) for a, b in loops
             if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)]
    if not inner:
        texts = [text for _, text in lines]
        return texts[:next(i for i, text in enumerate(texts) if text.startswith("EXIT"))], False
    start, end = max(inner, key=lambda loop: loop[1] - loop[0])
    return [text for at, text in lines if start <= at <= end], True


def pipe(name: str) -> str:
    for kind, names in (("alu", ALU), ("fma", FMA), ("lsu", LSU), ("tensor", TENSOR)):
        if name in names:
            return kind
    return "other"


def wavefronts(name: str) -> int:
    """Of a load or store of global memory by a warp whose lanes are neighbours."""
    if name[:3] not in ("LDG", "STG"):
        return 0
    return 4 if ".128" in name else 2 if ".64" in name else 1


def inspect(v: Variant) -> dict:
    """The numbers of a line of the table."""
    compiled, in_loop, in_all = build(v)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "k.ptx"), Path(folder, "k.cubin")
        ptx.write_text(compiled.asm["ptx"])
        cubin.write_bytes(compiled.asm["cubin"])
        name = f"sm_{v.arch}a" if v.arch >= 90 else f"sm_{v.arch}"
        command = [assembler(v.arch), "-v", f"--gpu-name={name}", ptx, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True)
        command = [TOOLS / "cuobjdump", "-sass", cubin]
        sass = subprocess.run(command, capture_output=True, text=True).stdout
    registers = re.search(r"Used (\d+) registers", report.stderr)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report.stderr)
    if not registers or not spills:
        raise ValueError(f"{v}: ptxas says {report.stderr.strip()[-300:]}")
    texts, is_loop = innermost(sass)
    weights = in_loop if is_loop else in_all
    names = [re.sub(r"^@!?U?P\w+\s+", "", text).split()[0] for text in texts]
    short = [name.split(".")[0] for name in names]
    pipes = Counter(pipe(name) for name in short)
    each = {
        kind: f"{pipes[kind] / weights:.3f}"
        for kind in ("alu", "fma", "lsu", "tensor", "other")
    }
    return dict(registers=int(registers[1]), spilled=int(spills[1]) + int(spills[2]),
                shared=compiled.metadata.shared, counted="loop" if is_loop else "all",
                per_weight=f"{len(names) / weights:.3f}", **each,
                wavefronts=f"{sum(map(wavefronts, names)) / weights:.3f}",
                exchanges=sum(name in ("LDS", "STS", "LDSM", "SHFL") for name in short),
                barriers=short.count("BAR"))


def row(v: Variant) -> dict[str, str]:
    named = dict(triton=triton.__version__, sm=v.arch, tokens=v.tokens or "slab", format=v.format,
                 grid=v.grid, x=v.dtype, group=v.group or "row", shape=f"{v.shape[0]}x{v.shape[1]}",
                 **inspect(v))
    return {key: str(value) for key, value in named.items()}


def key_of(line: dict[str, str]) -> tuple[str, ...]:
    return tuple(line[name] for name in KEY)


def table() -> list[dict[str, str]]:
    if not TABLE.exists():
        return []
    with open(TABLE, newline="") as f:
        return list(csv.DictReader(f))


def main(args) -> None:
    tokens = [SLAB if t == "slab" else int(t) for t in args.tokens]
    lines = []
    for v in variants(args.arch, args.format, tokens):
        lines.append(row(v))
        if len(lines) == 1:
            print(",".join(lines[0]))
        print(",".join(lines[-1].values()), flush=True)
    if args.write:
        part = TABLE.with_suffix(".tmp")
        with open(part, "w", newline="") as f:
            writer = csv.DictWriter(f, lines[0])
            writer.writeheader()
            new = {key_of(line) for line in lines}
            writer.writerows([line for line in table() if key_of(line) not in new] + lines)
        part.replace(TABLE)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS, choices=ARCHS)
    parser.add_argument("--format", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--tokens", nargs="+", default=["8", "16", "32", "64", "slab"],
                        choices=["8", "16", "32", "64", "slab"])
    parser.add_argument("--write", action="store_true",
                        help="put the lines printed into compiled.csv")
    try:
        main(parser.parse_args())
    except ValueError as e:
        sys.exit(f"error: {e}")
