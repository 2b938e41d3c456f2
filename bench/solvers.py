"""Time and error of the solvers, beside the published recipe written naively, in one run on this machine.

    python -m bench.solvers                                            # random layers of real shapes
    python -m bench.solvers --shapes 4096x11008 --no-naive --whole
    python -m bench.solvers --model checkpoints/SmolLM2-135M --data PATH.txt       # and a whole model, its walk included

The naive side follows the papers' pseudo-code column by column, sorts for its thresholds, keeps one Hessian per Linear and
runs its forward passes in fp32. Errors are relative output errors (gptq.relative_error) of 50% + 4 bits, unless told.
"""
import argparse
import copy
import resource
import time

import torch

from bench.naive import naive_sparsegpt
from compress import Settings, compress_model, make_solver
from data.progress import Progress
from data.text import calibration
from data.tokenizer import load_tokenizer
from eval import DTYPES, default_dtype
from gptq import find_grid, nearest, relative_error
from model import load_model
from sparsegpt import parse_sparsity, prune_and_round, prune_smallest, sparsegpt


@torch.no_grad()
def naive_compress(model, windows, fraction: float, bits: int) -> None:
    """The walk of the published code: all Hessians of a block from its dense weights, one a Linear, then the block again."""
    hs, rope = [model.stem(model.embed(w[None])) for w in windows], model.rope(0, windows.shape[1], "cpu")
    for block in Progress(model.blocks, "naive walk"):
        H = {}
        for h in hs:
            for half in block.halves():
                y = half.mix(h, rope)
                for names, x in ((half.reads, half.read(h)), (half.writes, y)):
                    for name in names:
                        x2 = x.reshape(-1, x.shape[-1])
                        H[name] = H.get(name, 0) + x2.T @ x2 / windows.numel()
                h = half.write(h, y)
        for name in H:
            linear = block.get_submodule(name)
            linear.weight.data = naive_sparsegpt(linear.weight, H[name], fraction, bits)[0]
        hs = [block(h, rope) for h in hs]


def random_layer(out: int, n: int, seed: int = 0):
    """A normal weight and a Hessian like that of activations: correlated inputs, common factors, channels of unlike size."""
    g = torch.Generator().manual_seed(seed)
    place = torch.randperm(n, generator=g).float()
    H = (place[:, None] - place).abs_().mul_(-0.1).exp_()                    # neighbours in a hidden order go together
    factors = 0.5 * torch.randn(n, 32, generator=g)
    size = torch.empty(n).log_normal_(0, 0.5, generator=g)
    H.addmm_(factors, factors.T).mul_(size).mul_(size[:, None])
    return torch.randn(out, n, generator=g) * n ** -0.5, H


def timed(work):
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def steps(W, H, sparsity, bits: int, naive: bool, whole: bool = False):
    """(name, error, seconds) of every step of the stack, in order; each step keeps those before it. whole: only the last."""
    fraction, _, m = parse_sparsity(sparsity)
    error = lambda V: relative_error(W, V, H)

    def nearest_level():
        mask, (scale, zero) = prune_smallest(W.abs(), round(fraction * W.numel())), find_grid(W, bits)
        return nearest(W, scale, zero, bits).masked_fill(mask, 0)

    if not m:
        yield "magnitude, nearest level", *timed(lambda: error(nearest_level()))
        if naive:
            yield "SparseGPT, naive", *timed(lambda: error(naive_sparsegpt(W, H, fraction, bits)[0]))
    yield "SparseGPT, ours", *timed(lambda: sparsegpt(W, H, sparsity, bits).error)
    settings = dict(mask="sparsegpt", refits=3, grid="uniform", act_order=False, descent=0)
    for name, change in (("refit, searched grid, GPTQ", {}), ("columns by importance", {"act_order": True}),
                         ("offset grid", {"grid": "offset"}), ("ADMM mask", {"mask": "admm"}),
                         ("descent on codes", {"descent": 2})):
        settings.update(change)
        if whole and not settings["descent"]:
            continue
        yield "+ " + name, *timed(lambda: prune_and_round(W, H, sparsity, bits, **settings).error)


def main(args) -> None:
    fraction, _, m = parse_sparsity(args.sparsity)
    args.naive = args.naive and not m                                        # the naive side knows fractions only
    print(f"{torch.get_num_threads()} threads, sparsity {args.sparsity}, {args.bits} bits, one grid a row")
    for shape in args.shapes:
        out, n = (int(s) for s in shape.split("x"))
        W, H = random_layer(out, n)
        print(f"\n{out} x {n:<24} {'error':>10} {'seconds':>9}")
        for name, error, seconds in steps(W, H, args.sparsity, args.bits, args.naive, args.whole):
            print(f"{name:30} {error:10.5f} {seconds:9.2f}", flush=True)
    print(f"\npeak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")
    if not args.model:
        return
    model = load_model(args.model)
    windows = calibration(load_tokenizer(args.model), args.data, "train", args.nsamples, args.seqlen, 0)
    solve = {recipe: make_solver(args.bits, args.sparsity, recipe) for recipe in ("plain", "best")}
    dtype = DTYPES[default_dtype("cpu")]
    rows = [("naive", lambda m: naive_compress(m, windows, fraction, args.bits)),
            ("plain", lambda m: compress_model(m, windows, solve["plain"], Settings(False, 0.0), dtype=dtype)),
            ("best", lambda m: compress_model(m, windows, solve["best"], dtype=dtype))]
    seconds = {name: timed(lambda: work(copy.deepcopy(model)))[1] for name, work in rows if args.naive or name != "naive"}
    print(f"\n{args.model}, {windows.numel()} calibration tokens")
    for name, s in seconds.items():
        print(f"{name:8} {s:8.1f} s" + (f"   {s / seconds['naive']:5.2f} of naive" if args.naive else ""))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--shapes", nargs="*", default=["576x576", "1536x576", "4096x4096", "4096x11008"], help="out x in")
    p.add_argument("--sparsity", default="0.5")
    p.add_argument("--bits", type=int, default=4, choices=[2, 3, 4, 8])
    p.add_argument("--naive", action=argparse.BooleanOptionalAction, default=True, help="the naive side too")
    p.add_argument("--whole", action="store_true", help="leave out the steps between the published recipe and the whole stack")
    p.add_argument("--model", help="a checkpoint folder: time its whole walk")
    p.add_argument("--data", default="docs", help="its calibration text")
    p.add_argument("--nsamples", type=int, default=32)
    p.add_argument("--seqlen", type=int, default=512)
    main(p.parse_args())
