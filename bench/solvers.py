"""Time and error of the solvers, beside the published recipe written naively, in one run on this
machine.

    python -m bench.solvers                                     # random layers of real shapes
    python -m bench.solvers --shapes 4096x11008 --no-naive --whole
    python -m bench.solvers --model checkpoints/SmolLM2-135M --data PATH.txt    # and a model's walk

The naive side follows the papers' pseudo-code column by column, sorts for its thresholds, keeps one
Hessian per Linear and runs its forward passes in fp32. Errors are relative output errors
(gptq.relative_error) of 50% + 4 bits, unless told.
"""
import argparse
import copy
import resource
import sys
import time

import torch

from bench.naive import naive_sparsegpt
from compress import Settings, compress_model, make_solver
from data.config import resolve
from data.flags import sizes
from data.progress import Progress
from data.text import calibration
from data.tokenizer import load_tokenizer
from eval import DTYPES, default_dtype
from gptq import find_grid, nearest, relative_error
from model import load_model
from sparsegpt import parse_sparsity, prune_and_round, prune_smallest, sparsegpt


@torch.no_grad()
def naive_compress(model, windows: torch.Tensor, fraction: float, bits: int) -> None:
    """The walk of the published code: all Hessians of a block from its dense weights, one a Linear,
    then the block again. windows (N, T) int64."""
    streams = [model.stem(model.embed(window[None])) for window in windows]     # each (1, T, width)
    rope = model.rope(0, windows.shape[1], "cpu")
    for block in Progress(model.blocks, "naive walk"):
        H = {}

        def add(names, x):
            for name in names:
                flat = x.reshape(-1, x.shape[-1])
                H[name] = H.get(name, 0) + flat.T @ flat / windows.numel()

        for h in streams:
            for sublayer in block.sublayers():
                add(sublayer.reads, sublayer.read(h))
                y = sublayer.mix(h, rope)
                add(sublayer.writes, y)
                h = sublayer.write(h, y)
        for name in H:
            linear = block.get_submodule(name)
            weight, _, _ = naive_sparsegpt(linear.weight, H[name], fraction, bits)
            linear.weight.data = weight
        streams = [block(h, rope) for h in streams]


def random_layer(out: int, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(W (out, n), H (n, n)), fp32: a normal weight and a Hessian like that of activations:
    correlated inputs, common factors, channels of unlike size."""
    g = torch.Generator().manual_seed(seed)
    place = torch.randperm(n, generator=g).float()
    H = (place[:, None] - place).abs_().mul_(-0.1).exp_()   # neighbours in a hidden order go along
    factors = 0.5 * torch.randn(n, 32, generator=g)
    size = torch.empty(n).log_normal_(0, 0.5, generator=g)
    H.addmm_(factors, factors.T).mul_(size).mul_(size[:, None])
    return torch.randn(out, n, generator=g) * n ** -0.5, H


def timed(work) -> tuple:
    """(what work() returns, seconds)."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def steps(W: torch.Tensor, H: torch.Tensor, sparsity, bits: int, naive: bool, whole: bool = False):
    """(name, error, seconds) of every step of the stack, in order; each step keeps those before it.
    whole: only the last."""
    fraction, _, m = parse_sparsity(sparsity)

    def by_magnitude():
        mask = prune_smallest(W.abs(), round(fraction * W.numel()))
        scale, zero = find_grid(W, bits)
        V = nearest(W, scale, zero, bits).masked_fill(mask, 0)
        return relative_error(W, V, H)

    def by_naive():
        V, _, _ = naive_sparsegpt(W, H, fraction, bits)
        return relative_error(W, V, H)

    if not m:
        yield "magnitude, nearest level", *timed(by_magnitude)
        if naive:
            yield "SparseGPT, naive", *timed(by_naive)
    yield "SparseGPT, ours", *timed(lambda: sparsegpt(W, H, sparsity, bits).error)
    settings = dict(mask="sparsegpt", refits=3, grid="uniform", act_order=False, descent=0)
    changes = {
        "refit, searched grid, GPTQ": {},
        "columns by importance": {"act_order": True},
        "offset grid": {"grid": "offset"},
        "ADMM mask": {"mask": "admm"},
        "descent on codes": {"descent": 2},
    }
    for name, change in changes.items():
        settings.update(change)
        if not whole or settings["descent"]:
            stack = lambda: prune_and_round(W, H, sparsity, bits, **settings).error
            yield "+ " + name, *timed(stack)


def time_layers(args) -> None:
    """Every step on random layers of the shapes asked for."""
    for out, n in args.shapes:
        W, H = random_layer(out, n)
        print(f"\n{out} x {n:<24} {'error':>10} {'seconds':>9}")
        for name, error, seconds in steps(W, H, args.sparsity, args.bits, args.naive, args.whole):
            print(f"{name:30} {error:10.5f} {seconds:9.2f}", flush=True)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss       # it counts KiB
    print(f"\npeak memory {peak / 1e9:.2f} GB")


def time_walks(args) -> None:
    """The walk through a whole model: naive, plain and best, each from the dense weights."""
    model = load_model(args.model)
    tokenizer = load_tokenizer(resolve(args.model))
    windows = calibration(tokenizer, args.data, "train", args.nsamples, args.seqlen, 0)
    fraction, _, _ = parse_sparsity(args.sparsity)
    dtype = DTYPES[default_dtype("cpu")]
    plain = make_solver(args.bits, args.sparsity, "plain")
    best = make_solver(args.bits, args.sparsity, "best")
    walks = {
        "naive": lambda m: naive_compress(m, windows, fraction, args.bits),
        "plain": lambda m: compress_model(m, windows, plain, Settings(False, 0.0), dtype=dtype),
        "best": lambda m: compress_model(m, windows, best, dtype=dtype),
    }
    if not args.naive:
        del walks["naive"]
    spent = {}
    for name, walk in walks.items():
        _, spent[name] = timed(lambda: walk(copy.deepcopy(model)))
    print(f"\n{args.model}, {windows.numel()} calibration tokens")
    for name, seconds in spent.items():
        share = f"   {seconds / spent['naive']:5.2f} of naive" if args.naive else ""
        print(f"{name:8} {seconds:8.1f} s{share}")


def main(args) -> None:
    _, _, m = parse_sparsity(args.sparsity)
    args.naive = args.naive and not m                       # the naive side knows fractions only
    print(f"{torch.get_num_threads()} threads, sparsity {args.sparsity}, {args.bits} bits, one "
          f"grid a row")
    time_layers(args)
    if args.model:
        time_walks(args)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].replace("\n", " "))
    a = p.add_argument
    a("--shapes", nargs="*", type=sizes("out x in, such as 4096x11008"),
      default=[(576, 576), (1536, 576), (4096, 4096), (4096, 11008)], help="out x in")
    a("--sparsity", default="0.5")
    a("--bits", type=int, default=4, choices=[2, 3, 4, 8])
    a("--naive", action=argparse.BooleanOptionalAction, default=True, help="the naive side too")
    a("--whole", action="store_true",
      help="leave out the steps between the published recipe and the whole stack")
    a("--model", help="a checkpoint folder: time its whole walk")
    a("--data", default="docs", help="its calibration text")
    a("--nsamples", type=int, default=32)
    a("--seqlen", type=int, default=512)
    try:
        main(p.parse_args())
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
