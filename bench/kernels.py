"""Time the packed products on real layer shapes, beside F.linear and torch's own int4, on whatever
this machine has.

    python -m bench.kernels                               # a GPU: everything; a CPU: its own paths
    python -m bench.kernels --shapes 4096x11008 --batches 1 16 --formats nm --directions forward
    python -m bench.kernels --generate runs/out/compressed            # whole models: models.py
    python -m bench.kernels --minutes 8 --out gpu.csv     # checks, then timings: day.py

Shapes are out x in. Calls take copies of the weights in turn, 200 MB of them (at most 64), more
than a GPU's cache holds; on a GPU they are replayed from a CUDA graph, so that Python's launch time
is not counted. Times are medians. `limit` is the larger of the bytes that must be moved over the
memory bandwidth and the operations over the peak rate, `share` is limit / time; `error` is the norm
of the difference to the dense product over that product's norm.
"""
import argparse
import statistics
import sys
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F

from data.flags import sizes, whole
from kernels import cpu_int4
from kernels.linear import PackedLinear
from kernels.packing import Packed, nbytes, pack
from kernels.unpacking import unpack

GPU_SHAPES = [(4096, 4096), (4096, 11008), (11008, 4096), (5120, 13824), (8192, 28672),
              (2048, 8192), (4096, 16384)]
CPU_SHAPES = [(576, 576), (192, 576), (1536, 576), (576, 1536), (4096, 4096)]
# bytes/s and 16-bit operations/s of the data sheets
LIMITS = {"H200": (4.8e12, 989e12), "H100": (3.35e12, 989e12), "A100": (2.04e12, 312e12),
          "4090": (1.008e12, 165e12), "3090": (0.936e12, 71e12)}
CACHE = 200e6                                               # bytes of weights to go round
AWAKE = 0.05                                                # seconds until a GPU's clock has risen


def random_packed(shape: tuple[int, int], format: str, grid: str, groupsize: int, device) -> Packed:
    """Half of the weights pruned (none if dense), 8 of every 16 for nm; outputs about as large as
    inputs."""
    rows, cols = shape
    groups = -(-cols // groupsize) if groupsize > 0 else 1
    mask = None
    if format == "unstructured":
        mask = torch.rand(shape, device=device) < 0.5
    elif format == "nm":
        sixteens = torch.rand(rows, -(-cols // 16), 16, device=device)
        mask = (sixteens.argsort(-1) < 8).view(rows, -1)[:, :cols].contiguous()
    codes = torch.randint(0, 16, shape, dtype=torch.uint8, device=device)
    codes = codes if mask is None else codes.masked_fill_(mask, 0)
    scale = (0.3 * cols ** -0.5 * (torch.rand(rows, groups) + 0.5)).half().float()
    zero = torch.full((rows, groups), 0.5)
    if grid != "offset":
        zero = torch.randint(6, 10, (rows, groups)).float()
    return pack(codes, mask, scale, zero, 4, grid, groupsize, format)


def copies(size: int) -> int:
    """How many copies of `size` bytes go round."""
    return max(2, min(64, int(CACHE // size) + 1))


def median_time(calls: list, device: torch.device, repeats: int, graph: bool = True) -> float:
    """Seconds per call; calls are taken in turn, on a GPU from a CUDA graph or (graph=False) from
    Python."""
    for call in calls:  # the first call of a layer makes its decode cache
        call()
    times = []
    if device.type == "cpu":
        for i in range(max(repeats, len(calls))):
            start = time.perf_counter()
            calls[i % len(calls)]()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    torch.cuda.synchronize()
    run = lambda: [call() for call in calls]
    if graph:
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            run()
        run = recorded.replay
    awake = time.perf_counter() + AWAKE
    while time.perf_counter() < awake:
        run()
        torch.cuda.synchronize()
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if graph:
            run()                           # the next launch is ready before the GPU is
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)


def machine(device: torch.device) -> tuple[str, float, float]:
    """Name, bytes/s, operations/s; a CPU's are measured (reading 256 MB; a bf16 product)."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((limits for key, limits in LIMITS.items() if key in name),
                     (float("nan"), float("nan")))
        return name, *known
    block, square = torch.zeros(1 << 26), torch.randn(1024, 1024).bfloat16()
    seconds = median_time([lambda: block.sum()], device, 7)
    product = median_time([lambda: square @ square], device, 7)
    name = f"CPU, {torch.get_num_threads()} threads"
    return name, block.numel() * 4 / seconds, 2 * 1024 ** 3 / product


def torch_int4(packed: Packed, device: torch.device):
    """torch's int4 product of the same shape, a function of bf16 x, or None. On a CPU it is the one
    in cpu_int4.py."""
    rows, cols = packed.meta["shape"]
    if device.type == "cpu":
        return cpu_int4.Int4(packed) if cpu_int4.fits(packed.meta) else None
    if cols % 128 or rows % 64:
        return None
    codes = torch.randint(0, 255, (rows, cols // 2), dtype=torch.uint8, device=device)
    words = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    grid = torch.ones(cols // 128, rows, 2, dtype=torch.bfloat16, device=device)
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, words, 128, grid)


class Beside(NamedTuple):
    """One layer in three forms, of each so many copies that none stays in a cache."""
    first: Packed                                           # what all of them are made of
    packed: list[PackedLinear]
    dense: list[torch.Tensor]                               # (out, in)
    int4: list  # torch's own product; none if it does not run


def beside(shape: tuple[int, int], format: str, grid: str, groupsize: int, dtype: torch.dtype,
           device: torch.device) -> Beside:
    first = random_packed(shape, format, grid, groupsize, device)
    layers = [PackedLinear(Packed({name: t.clone() for name, t in first.tensors.items()},
                                  first.meta)).to(device) for _ in range(copies(nbytes(first)))]
    weight = unpack(first, dtype).to(device)
    dense = [weight.clone() for _ in range(copies(weight.nbytes))]
    try:
        int4 = [torch_int4(first, device) for _ in range(copies(weight.numel() // 2))]
    except RuntimeError as problem:
        print(f"torch's int4 does not run here: {str(problem).splitlines()[0]}")
        int4 = [None]
    return Beside(first, layers, dense, [product for product in int4 if product])


def calls_of(forms: Beside, x: torch.Tensor, forward: bool) -> tuple[list, list, list]:
    """Calls of the packed product with x, of the dense one, and of torch's int4, which only small
    batches are given to; or of x W, their gradients."""
    if not forward:
        return ([lambda l=l: l.product(x, transposed=True) for l in forms.packed],
                [lambda w=w: x @ w for w in forms.dense], [])
    half = x.bfloat16()                                     # torch's int4 knows no other
    return ([lambda l=l: l(x) for l in forms.packed],
            [lambda w=w: F.linear(x, w) for w in forms.dense],
            [lambda f=f: f(half) for f in forms.int4] if len(x) <= 64 else [])


def bench(shape, format, batches, grid, groupsize, dtype, device, repeats, directions, memory_rate,
          compute_rate) -> None:
    """Prints a line per batch and direction."""
    rows, cols = shape
    forms = beside(shape, format, grid, groupsize, dtype, device)
    for batch in batches:
        for direction in directions:
            forward = direction == "forward"
            x = torch.randn(batch, cols if forward else rows, device=device).to(dtype)
            calls = calls_of(forms, x, forward)
            with torch.no_grad():
                t, reference, other = (median_time(each, device, repeats) if each else float("nan")
                                       for each in calls)
                exact = calls[1][0]().float()
                error = float((calls[0][-1]().float() - exact).norm() / exact.norm())
            moved = nbytes(forms.first) + batch * (rows + cols) * dtype.itemsize
            limit = max(moved / memory_rate, 2 * batch * rows * cols / compute_rate)
            print(f"{rows}x{cols:<6} {format:12} {batch:>5} {direction:8} {t * 1e6:10.1f} us "
                  f"{moved / t / 1e9:8.1f} GB/s  limit {limit * 1e6:8.1f} us  "
                  f"share {limit / t:5.2f}  {reference / t:5.2f} x F.linear  "
                  f"{other / t:5.2f} x torch int4  error {error:.0e}", flush=True)


def main(args: argparse.Namespace) -> None:
    if (args.minutes is None) != (args.out is None):
        raise ValueError("--minutes and --out go together: how long, and the CSV file to write")
    if args.minutes is not None:
        from bench import day
        return day.main(args.minutes, args.out)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    gpu = device.type == "cuda"
    if gpu and device.index is not None:
        torch.cuda.set_device(device)  # events and graphs belong to the current one
    names = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    dtype = names[args.dtype or ("fp16" if gpu else "bf16")]
    if args.generate and args.tune:
        raise ValueError("--generate and --tune exclude each other: run the one after the other")
    if args.generate or args.tune:
        from bench import models as bench_model  # here, because it needs model.py
        return bench_model.main(args, dtype, device)
    name, memory_rate, compute_rate = machine(device)
    print(f"{name}: {memory_rate / 1e9:.0f} GB/s, {compute_rate / 1e12:.2f} Tflop/s; "
          f"x in {dtype}, grid {args.grid}, groupsize {args.groupsize}")
    if not gpu:
        print("No GPU: these are the CPU paths, int4 decoding for small batches and unpacking "
              "above, not Triton.")
    batches = args.batches or ([1, 4, 16, 64, 512, 4096] if gpu else [1, 4, 256])
    for shape in args.shapes or (GPU_SHAPES if gpu else CPU_SHAPES):
        for format in args.formats:
            bench(shape, format, batches, args.grid, args.groupsize, dtype, device, args.repeats,
                  args.directions, memory_rate, compute_rate)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", type=sizes("out x in, such as 4096x11008"),
                        help="such as 4096x11008, out x in")
    parser.add_argument("--batches", nargs="*", type=whole(1, 1 << 20))
    formats = ["dense", "nm", "unstructured"]
    parser.add_argument("--formats", nargs="*", default=formats, choices=formats,
                        help="a model of random weights takes the last")
    parser.add_argument("--grid", default="uniform", choices=["uniform", "offset"])
    parser.add_argument("--groupsize", type=int, default=-1)
    parser.add_argument("--dtype", choices=["fp16", "bf16", "fp32"],
                        help="default: fp16 on a GPU, bf16 on a CPU")
    parser.add_argument("--device")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--directions", nargs="*", default=["forward", "backward"],
                        choices=["forward", "backward"])
    parser.add_argument("--minutes", type=float,
                        help="a GPU's checks and timings within about this time, into --out")
    parser.add_argument("--out", metavar="FILE.csv")
    parser.add_argument("--generate", metavar="FOLDER",
                        help="tokens per second, dense against packed; or random-llama-7b")
    parser.add_argument("--tune", metavar="FOLDER",
                        help="a prompt-tuning step, dense against packed; or random-llama-7b")
    parser.add_argument("--context", type=int, default=64, help="--generate: tokens in front")
    parser.add_argument("--batch", type=int, default=4, help="--tune: windows a step")
    parser.add_argument("--tokens", type=int, default=512, help="--tune: tokens a window")
    parser.add_argument("--prompt-tokens", type=int, default=100,
                        help="--tune: learned tokens in front of each")
    parser.add_argument("--checkpointing", action="store_true",
                        help="--tune: recompute activations")
    try:
        main(parser.parse_args())
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
