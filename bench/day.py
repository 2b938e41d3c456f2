"""What to run on a GPU that one has for a few minutes: checks, then timings, the most important
first, into a CSV file.

    python -m bench.kernels --minutes 8 --out gpu.csv

Every line is on disk as soon as it is measured; when the minutes are over no other case begins, and
a line says how many were left out. A check that fails stops everything but the record: what is
wrong needs no timing. Columns:

    kind       check, copy, product, model
    case       what was measured
    value      of a check the error over the largest output; of a copy bytes/s; of a product
               seconds; of a model a sentence
    fp16       seconds of F.linear, or of dy W, with the same weights in 16 bits
    int4       seconds of torch's own int4 product, where it fits

Products are replayed from a CUDA graph unless the case says "from Python". Kernels are compiled by
several processes before: each uses its part of them once, and Triton keeps what it compiled on
disk.
"""
import contextlib
import csv
import io
import itertools
import multiprocessing
import os
import subprocess
import sys
import time
from functools import lru_cache, partial
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import torch

FORMATS, GRIDS = ("nm", "unstructured", "dense"), ("uniform", "offset")
SHAPES = ((4096, 11008), (4096, 4096), (11008, 4096))
BATCHES = (1, 16, 64, 512, 4096)
# shape, groupsize, tokens, dtype of the checks: rows and columns that fill no tile; several steps
# of a warp; all kernels
CHECKS = (((33, 130), -1, (1, 12, 100), torch.float16), ((80, 1100), 128, (5, 64), torch.bfloat16))
WARMED = 36                                                 # cases that are compiled for before
KEPT = 6                                                    # layers, 0.6 GB each with their copies
TOLERANCE = {torch.float16: 2 ** -10, torch.bfloat16: 2 ** -6}
COLUMNS = ("kind", "case", "value", "fp16", "int4")


class Case(NamedTuple):
    shape: tuple[int, int]
    format: str
    grid: str
    batch: int
    direction: str
    graph: bool

    def __str__(self) -> str:
        how = "" if self.graph else " from Python"
        return (f"{self.shape[0]}x{self.shape[1]} {self.format} {self.grid} batch {self.batch} "
                f"{self.direction}{how}")


def cases() -> list[Case]:
    """The most important first: what decoding takes, then larger batches, then the backward pass
    and other shapes."""
    first, *others = SHAPES
    made = [Case(first, f, "uniform", b, "forward", True) for b in (1, 16) for f in FORMATS]
    made += [Case(s, f, "uniform", 1, "forward", True) for s in others for f in FORMATS[:2]]
    made += [Case(first, f, "offset", 1, "forward", True) for f in FORMATS[:2]]
    made += [
        Case(first, f, "uniform", b, d, True)
        for b in (4096, 512, 64)
        for d in ("forward", "backward")
        for f in FORMATS[:2]
    ]
    made += [Case(first, f, "uniform", 1, "forward", False) for f in FORMATS[:2]]
    rest = itertools.product(SHAPES, FORMATS, GRIDS, BATCHES, ("forward", "backward"), (True,))
    return made + [case for case in itertools.starmap(Case, rest) if case not in made]


class Record:
    """A CSV file whose lines are there once they are written."""

    def __init__(self, path: str | Path):
        self.file = open(path, "w", newline="", buffering=1)
        self.writer = csv.writer(self.file)
        self.writer.writerow(COLUMNS)

    def add(self, kind: str, case, value, fp16: float | str = "", int4: float | str = "") -> None:
        values = (f"{v:.4g}" if isinstance(v, float) else v for v in (value, fp16, int4))
        self.writer.writerow([kind, case, *values])
        self.file.flush()
        ratio = f", {fp16 / value:.2f} x fp16" if isinstance(fp16, float) else ""
        print(f"{kind:8} {case}: {value}{ratio}", flush=True)


def until(deadline: float, work: list[tuple[object, Callable[[], None]]], record: Record,
          now: Callable[[], float] = time.monotonic) -> None:
    """Does what is in `work`, (name, call), one after the other; none begins after the deadline.
    One that fails is recorded."""
    for i, (name, call) in enumerate(work):
        if now() >= deadline:
            record.add("left out", f"{len(work) - i} cases, from {name} on", "no time left")
            return
        try:
            call()
        except Exception as problem:                    # no memory, or triton cannot compile it
            record.add("failed", name, in_a_line(problem))


def in_a_line(problem: Exception) -> str:
    said = str(problem).splitlines() or [""]
    return f"{type(problem).__name__}: {said[0]}"


def check(format: str, grid: str, shape, groupsize: int, tokens, dtype,
          device) -> Iterator[tuple[str, float, float]]:
    """(case, largest error over the largest output, what is allowed) of products, forward and
    backward, beside float64."""
    from bench.kernels import random_packed
    from kernels.linear import PackedLinear
    from kernels.unpacking import unpack
    packed = random_packed(shape, format, grid, groupsize, device)
    weight, layer = unpack(packed, torch.float64).to(device), PackedLinear(packed).to(device)
    for count in tokens:
        x = torch.randn(count, shape[1], device=device).to(dtype).requires_grad_()
        dy = torch.randn(count, shape[0], device=device).to(dtype)
        y = layer(x)
        y.backward(dy)
        for what, got, exact in (("y", y, x.detach().double() @ weight.T),
                                 ("dx", x.grad, dy.double() @ weight)):
            error = float((got.detach().double() - exact).abs().max() / exact.abs().max())
            case = (f"{what} {format} {grid} {shape} groupsize {groupsize} tokens {count} "
                    f"{dtype}")
            yield case, error, TOLERANCE[dtype]


def all_checks() -> list[tuple]:
    return [(f, g, *how) for f, g, how in itertools.product(FORMATS, GRIDS, CHECKS)]


def check_all(record: Record, device: torch.device) -> None:
    """ValueError for the first kernel that is wrong, or that fails; the record has both.

    Decoding in fp16 multiplies subnormal numbers: a tensor core that flushed them to zero would
    give zeros here."""
    worst = {}
    for one in all_checks():
        try:
            checked = list(check(*one, device))
        except Exception as problem:                    # no memory, or triton cannot compile it
            name = f"check of {' '.join(map(str, one))}"
            record.add("failed", name, in_a_line(problem))
            raise ValueError(f"{name}: {in_a_line(problem)}") from None
        for case, error, allowed in checked:
            if not error <= allowed:
                record.add("check", case, error)
                raise ValueError(f"{case}: error {error:.1e} where {allowed:.1e} is allowed: a "
                                 f"kernel is wrong on this GPU")
            kind = case.partition(" (")[0]
            worst[kind] = max(error, worst.get(kind, 0.0))
    for kind, error in worst.items():
        record.add("check", kind, error)


def warm(part: int, parts: int) -> None:
    """Has Triton compile one part of all kernels. What fails will fail again where it is
    recorded."""
    from bench.kernels import random_packed
    from kernels.linear import PackedLinear
    device = torch.device("cuda", 0)
    for one in all_checks()[part::parts]:
        with contextlib.suppress(Exception):
            list(check(*one, device))
    layers = {}                                             # each is packed once, for all its cases
    for case in cases()[:WARMED]:
        layers.setdefault((case.shape, case.format, case.grid), []).append(case)
    for key, wanted in list(layers.items())[part::parts]:
        with contextlib.suppress(Exception):
            layer = PackedLinear(random_packed(*key, -1, device)).to(device)
            for case in wanted:
                width = case.shape[1] if case.direction == "forward" else case.shape[0]
                x = torch.zeros(case.batch, width, device=device).half()
                with contextlib.suppress(Exception):
                    layer.product(x, transposed=case.direction != "forward")


def warm_all(most: float) -> None:
    """Warm in many processes, for at most so many seconds: a process that dies is never done."""
    parts = max(1, min(16, os.cpu_count() or 1))
    with multiprocessing.get_context("spawn").Pool(parts) as pool:
        every = [(part, parts) for part in range(parts)]
        with contextlib.suppress(multiprocessing.TimeoutError):
            pool.starmap_async(warm, every, chunksize=1).get(timeout=most)


def run_tests(record: Record, deadline: float) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/test_kernels.py",
               "-k", "on_a_gpu"]
    left = max(1, deadline - time.monotonic())
    result = subprocess.run(command, capture_output=True, text=True, timeout=left,
                            cwd=Path(__file__).resolve().parents[1])
    said = result.stdout.strip() or result.stderr.strip()
    record.add("check", "tests that need a GPU", said.splitlines()[-1])


def bandwidth(record: Record, device: torch.device) -> None:
    from bench.kernels import median_time
    a, b = torch.zeros(2, 1 << 28, dtype=torch.uint8, device=device)
    record.add("copy", "256 MB read and 256 MB written",
               2 * a.nbytes / median_time([lambda: b.copy_(a)], device, 20))


@lru_cache(maxsize=KEPT)
def forms_of(shape: tuple[int, int], format: str, grid: str, device: torch.device):
    from bench.kernels import beside
    return beside(shape, format, grid, -1, torch.float16, device)


def time_product(case: Case, record: Record, device: torch.device, repeats: int = 20) -> None:
    from bench.kernels import calls_of, median_time
    forms = forms_of(case.shape, case.format, case.grid, device)
    forward = case.direction == "forward"
    x = torch.randn(case.batch, case.shape[1 if forward else 0], device=device).half()
    with torch.no_grad():
        times = [median_time(calls, device, repeats, case.graph) if calls else ""
                 for calls in calls_of(forms, x, forward)]
    record.add("product", case, *times)


def whole_model(record: Record, device: torch.device, format: str, grid: str) -> None:
    """Decoding, and one prompt step of 1024 tokens, at LLaMA-7B's shape, random weights."""
    from bench import models
    record.add("model", "LLaMA-7B's shape", f"{format} {grid}")
    pair = list(models.pair("random-llama-7b", format, grid, torch.float16, device))
    for what in (lambda: models.time_decoding(pair, 64, 20, device),
                 lambda: models.time_tuning(pair, 1, 924, 100, 3, device)):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            what()
        for line in said.getvalue().splitlines():
            name, _, value = line.partition(": ")
            record.add("model", name, value)


def main(minutes: float, out: str) -> None:
    if not torch.cuda.is_available():
        raise ValueError("--minutes measures a GPU, and torch finds none here; python -m "
                         "kernels.predict says what to expect")
    device = torch.device("cuda", 0)
    from kernels.linear import runs_triton
    if not runs_triton(device):
        raise ValueError("the kernels do not run on this GPU: they need an Ampere or newer, triton, "
                         "a C compiler and Python.h")
    deadline, record = time.monotonic() + 60 * minutes, Record(out)
    record.add("machine", torch.cuda.get_device_name(device), f"torch {torch.__version__}")
    warm_all(30 * minutes)                                  # half of the time
    check_all(record, device)
    todo = [(case, lambda case=case: time_product(case, record, device)) for case in cases()]
    until(deadline, [("copy", lambda: bandwidth(record, device)), *todo[:12],
                     *[(f"LLaMA-7B's shape, {how}", partial(whole_model, record, device, *how))
                       for how in (("nm", "uniform"), ("unstructured", "offset"))],
                     *todo[12:], ("tests", lambda: run_tests(record, deadline))], record)
