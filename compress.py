"""Compression as a walk: block after block from the checkpoint's file through the device to a
packed shard.

    checkpoint = open_checkpoint("checkpoints/llama-7b")
    stats = compress(checkpoint, "out/compressed", windows, make_solver(bits=4, sparsity=0.5))

What enters a block comes out of the compressed blocks before it. A block is two steps of the
residual stream h, attention and MLP, each h + out(mix(norm(h))) (model.Sublayer). For each, the
Linears that read the stream are solved first, then the one that writes into it:

    pass 1   x = norm(h)             -> moments of x     -> solve q, k, v     (or gate and up)
    pass 2   y = mix(norm(h))        -> moments of y     -> solve o           (or down)
    pass 3   h = h + out(y)          the stream of the next step

A pass goes over all windows batch by batch and keeps sums over tokens (`Moments`). Between passes
nothing lives but the stream and, where Linears aim at the dense model's outputs (`aim`), its dense
twin: half precision, in CPU memory (`Stream`). On the device are one block, its copies, one batch
and the solver's matrices, whatever the model's size.

With Settings(reconstruct=PASSES), a sublayer that is solved moves as a whole towards the dense
one's outputs, before pass 3, by gradients (EBFT 2402.12419): see `reconstruct`.

Before the walk, `allocate` may say how much of each group of Linears to prune, at a fixed share of
all weights: what costs the dense model's loss little is pruned more.

A block whose shard is there is not solved again, only run: so a killed walk continues.
`compress_block` needs no files. Left out: splitting a block over devices.
"""
import copy
import math
import time
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import parallel
from data.config import Config
from data.progress import Progress
from gptq import Compressed, check_blocks, gptq, invert_, relative_error
from heal import TunedGrid, TunedNorm, tuned
from kernels.linear import PackedLinear
from kernels.packing import pack_compressed
from kernels.unpacking import unpack
from model import (Block, Checkpoint, Sublayer, load_block, read_note, save_index, save_shard,
                   shard_path)
from prompt import LOGITS, HeadLoss, backward, fit
from sparsegpt import SLAB, admm, parse_sparsity, prune_and_round, refit, sparsegpt

RECIPES = {
    # as published
    "plain": dict(mask="sparsegpt", refits=0, grid="minmax", act_order=False, descent=0,
                  percdamp=0.01, true_sequential=False, correct=0.0),
    "best": dict(mask="admm", refits=3, grid="auto", act_order=True, descent=2,
                 percdamp=0.03, true_sequential=True, correct=1.0),
}
Solve = Callable[..., Compressed]


def make_solver(bits: int | None, sparsity: float | str, recipe: str = "best", groupsize: int = -1,
                sym: bool = False, blocksize: int = 128, static_groups: bool = False,
                **steps) -> Solve | None:
    """solve(W, H, parts, fixed_mask=None, share=None) -> Compressed, or None where nothing is to be
    done.

    W (rows, in) stacks the Linears that read one input, H (in, in) is that input's Hessian, parts
    has the Linears' rows (the plain recipe prunes each alike; the best one ranks the weights of all
    of them), fixed_mask the mask if there is one already, share how much to prune in place of
    `sparsity`. bits None prunes only, sparsity 0 quantizes only; steps (mask, refits, grid,
    act_order, descent, percdamp) replace the recipe's."""
    s = {**RECIPES[recipe], **steps}
    fraction, _, m = parse_sparsity(sparsity)
    if bits is None and not fraction:
        return None
    if static_groups and (recipe != "plain" or not s["act_order"] or fraction):
        raise ValueError("--static-groups belongs to --recipe plain --sparsity 0 --act-order; the "
                         "searched grids' groups are static anyway")
    pattern = str(sparsity) if m else fraction
    common = dict(groupsize=groupsize, sym=sym, percdamp=s["percdamp"], blocksize=blocksize)
    own = {k: s[k] for k in ("mask", "refits", "grid", "act_order", "descent")}
    taken_apart = s["mask"] == "admm" or s["refits"] or s["descent"] or s["grid"] != "minmax"
    taken_apart = taken_apart or fraction and s["act_order"]
    if bits and groupsize != -1 and s["grid"] == "minmax" and not static_groups:
        check_blocks(groupsize, blocksize, 1 if taken_apart else m or 1)    # before any work

    def solve(W, H, parts, fixed_mask=None, share=None):
        asked = pattern if share is None else share
        if taken_apart or fixed_mask is not None:
            return prune_and_round(W, H, asked, bits, fixed_mask=fixed_mask, **own, **common)
        if fraction:                                            # one joint pass, as in the paper
            return sparsegpt(W, H, asked, bits, parts=parts, **common)
        return gptq(W, H, bits, act_order=s["act_order"], static_groups=static_groups, **common)
    return solve


@contextmanager
def fast_products(x: torch.Tensor):
    """Inside, fp32 matrix products may round their factors to bf16 on a CPU, to TF32 on a GPU, if
    x's dtype loses nothing by it; a factor beside it that is fp32 is rounded as well. Sums stay
    fp32: in bf16 they would not be exact enough to be inverted."""
    place = torch.backends.cuda if x.is_cuda else torch.backends.mkldnn
    precision = "tf32" if x.is_cuda else "bf16"
    exact = x.dtype == torch.bfloat16 or x.is_cuda and x.dtype == torch.float16
    before = place.matmul.fp32_precision
    place.matmul.fp32_precision = precision if exact else before
    try:
        yield
    finally:
        place.matmul.fp32_precision = before


CHUNK = 512                             # tokens of a product on a CPU: nearly twice as fast as 8192


class Moments:
    """Sums over tokens, in fp32, of what one group of Linears reads, x (..., in), and of an error e
    that goes with it.

    H sums x x^T: symmetric, so of a large one only a staircase below the diagonal. E sums e x^T."""

    def __init__(self):
        self.count = 0
        # x and e alone summed, for the means
        self.H = self.E = self.x = self.e = None

    def add(self, x: torch.Tensor, e: torch.Tensor | None = None) -> None:
        """Add x (..., in) and, each time or never, e (..., any)."""
        tokens, n = x.numel() // x.shape[-1], x.shape[-1]
        self.count += tokens
        if self.H is None:
            new = dict(dtype=torch.float32, device=x.device)
            self.H, self.x = torch.zeros(n, n, **new), torch.zeros(n, **new)
            if e is not None:
                self.E = torch.zeros(e.shape[-1], n, **new)
                self.e = torch.zeros(e.shape[-1], **new)
        at_once = tokens if x.is_cuda else CHUNK
        pieces = x.reshape(tokens, n).split(at_once)
        of_e = () if e is None else e.reshape(tokens, -1).split(at_once)
        step = n if n < 1024 else -(-n // 4)
        for piece, error in zip_longest(pieces, of_e):
            x32 = piece.float()
            with fast_products(x):
                for s in range(0, n, step):
                    self.H[s:, s:s + step].addmm_(x32[:, s:].T, x32[:, s:s + step])
                self.x += x32.sum(0)
                if error is not None:
                    e32 = error.float()
                    self.E.addmm_(e32.T, x32)
                    self.e += e32.sum(0)

    def finish(self, alone: bool = False) -> "Moments":
        """Sums become means over all tokens of all processes, or of this one alone, in place, and H
        becomes whole."""
        sums = [t for t in (self.H, self.x, self.E, self.e) if t is not None]
        count = self.count
        if not alone:
            count = parallel.add_numbers(count)[0]
            parallel.add(*sums)
        for t in sums:
            t.div_(count)
        self.H.tril_().add_(self.H.tril(-1).T)
        return self


class Target(NamedTuple):
    """What a group of Linears is solved for. mean and wanted are None where there is no bias."""
    W: torch.Tensor                     # (out, in) fp32 weights to come close to
    H: torch.Tensor                     # (in, in) in whose measure
    mean: torch.Tensor | None           # (in,) of the inputs
    wanted: torch.Tensor | None         # (out,) mean of the outputs without bias, which a new bias
                                        # is to restore

    def measure(self, moments: Moments) -> torch.Tensor:
        """(in, in) H of other inputs; with a bias, around the mean that it was made for."""
        if self.mean is None:
            return moments.H
        mixed = torch.outer(moments.x, self.mean)
        return moments.H - mixed - mixed.T + torch.outer(self.mean, self.mean)

    def bias_gain(self, V: torch.Tensor) -> torch.Tensor | None:
        """(out,) what the bias gains once the weights have become V."""
        return None if self.wanted is None else self.wanted - V @ self.mean


def aim(W: torch.Tensor, moments: Moments, biased: bool, strength: float, of_outputs: bool,
        damp: float = 0.3) -> Target:
    """Where the Linears W (out, in) should aim: at what the dense model has behind them.

    They read x (in,) where the dense model reads x'; their output is added to the residual stream,
    r (out,), where the dense model has r'. Wanted is V with V x + r = W x' + r', which is
    (V - W) x = W (x' - x) + r' - r. By least squares

        V = W + A H^-1,   A = mean of (W (x' - x) + r' - r) x^T.

    That is noisy, as the stream's errors are partly chance. So H is damped, which keeps V near W,
    and only a part of the change is made, the smaller the less text there is (`trust`):

        W + strength A (H + damp diag H)^-1

    (QEP 2504.09629, GPTAQ 2504.02692; taking back the residual stream's own error is ours.)
    The moments (finished) hold as their E the mean of e x^T, with e = x' - x and so (in, in), or
    with of_outputs e = W (x' - x) + r' - r and so (out, in). With a bias, H and A are taken around
    the means, which the bias then meets."""
    H, mean, E, e = moments.H, moments.x, moments.E, moments.e
    if not torch.isfinite(H.diagonal().sum()):
        raise ValueError("the calibration's activations hold NaN or Inf: use --dtype bfloat16 or "
                         "float32, and check the checkpoint's weights")
    if E is None or strength == 0:
        return Target(W, H, None, None)
    A, a = (E, e) if of_outputs else (W @ E, W @ e)             # e is (out,) or (in,)
    wanted = None
    if biased:
        wanted = W @ mean + strength * a
        around = H - torch.outer(mean, mean)
        # a constant input is the bias's alone; sums over 2^18 tokens are good to 2e-5
        varies = (around.diagonal() > 1e-4 * H.diagonal()).float()
        H = around * varies * varies[:, None]
        del around
        A = (A - torch.outer(a, mean)) * varies
    damped = H.clone()
    damped.diagonal().mul_(1 + damp).add_(1e-6 * H.diagonal().mean() + 1e-12)
    aimed = torch.addmm(W, A, invert_(damped), alpha=strength)
    return Target(aimed, H, mean if biased else None, wanted)


TOKENS_A_DIMENSION = 30                 # of the stream, for half of the change


def trust(tokens: int, d_model: int) -> float:
    """What part of the change that `aim` finds on so many tokens of a residual stream so wide to
    make: 0.5 for 32 x 512 tokens and 576 dimensions, 0.7 for 128 x 2048 and 4096 (LLaMA-7B)."""
    return tokens / (tokens + TOKENS_A_DIMENSION * d_model)


class Stream:
    """The batches of a residual stream, each (b, T, d_model): parked in half precision in CPU
    memory, and moved to the device, in the dtype of computing, when their turn comes.

    bf16 is parked as it is, all else in fp16, which has three more bits, or, where a batch is
    beyond it, in bf16. exact parks them as they are."""

    def __init__(self, dtype: torch.dtype, device: str, exact: bool = False):
        self.dtype, self.device, self.exact, self.parked = dtype, torch.device(device), exact, []

    def __len__(self) -> int:
        return len(self.parked)

    def __getitem__(self, k: int) -> torch.Tensor:
        if not 0 <= k < len(self.parked):
            raise IndexError(k)                                 # ends a for loop
        return self.parked[k].to(self.device, self.dtype, non_blocking=True)

    def append(self, h: torch.Tensor) -> None:
        self.parked.append(None)
        self[len(self) - 1] = h

    def __setitem__(self, k: int, h: torch.Tensor) -> None:
        if h.dtype == torch.float32 and not self.exact:
            half = h.half()
            h = half if torch.isfinite(half).all() else h.bfloat16()
        if h.is_cuda:
            room = self.parked[k]
            if room is None or room.dtype != h.dtype:
                room = torch.empty(h.shape, dtype=h.dtype, pin_memory=True)
            h = room.copy_(h)
        self.parked[k] = h


def check_batches(windows: int, batch_size: int) -> None:
    """ValueError where a process would have none of the batches of so many windows."""
    if -(-windows // batch_size) < parallel.world():
        raise ValueError(f"{windows} windows in batches of {batch_size} leave none for one of "
                         f"{parallel.world()} processes: use more windows, smaller batches or "
                         f"fewer processes")


class Walk:
    """What goes from block to block: the compressed model's stream, the dense model's, and the
    positions' rotations."""

    def __init__(self, ends: nn.Module, windows: torch.Tensor, twin: bool, batch_size: int,
                 dtype: torch.dtype, device: str, exact: bool = False,
                 heldout: torch.Tensor | None = None, judged: bool = False):
        """ends: a Transformer's embedding, in dtype on the device. windows (N, T) int64; of several
        processes, each walks with its share of the batches. twin: with the dense model alongside.
        heldout (M, T): windows that no moment sees, for the first process's errors; judged: with
        the dense model alongside these as well."""
        self.dtype, self.device = dtype, device
        self.trust = trust(windows.numel(), ends.config.d_model)
        check_batches(len(windows), batch_size)
        self.reconstructing = 0.0                               # seconds that `reconstruct` took
        self.rope = ends.rope(0, windows.shape[1], device)
        self.stream = Stream(dtype, device, exact)
        self.dense = Stream(dtype, device, exact) if twin else None
        self.heldout = Stream(dtype, device, exact)
        self.held_dense = Stream(dtype, device, exact) if judged else None
        for batch in parallel.mine(windows.split(batch_size)):
            h = ends.stem(ends.embed(batch.to(device))).to(dtype)
            self.stream.append(h)
            if twin:
                self.dense.append(h.clone())
        if judged and (heldout is None or not len(heldout)):
            raise ValueError("reconstruction is judged on held-out windows: give some")
        for batch in () if heldout is None or parallel.rank() else heldout.split(batch_size):
            h = ends.stem(ends.embed(batch.to(device))).to(dtype)
            self.heldout.append(h)
            if judged:
                self.held_dense.append(h.clone())

    def advance(self, block: Block, source: Block | None, true_sequential: bool) -> None:
        """Through a block that is compressed already, and its dense source; parked where the walk
        parks."""
        for stream, through in ((self.stream, block), (self.heldout, block), (self.dense, source),
                                (self.held_dense, source)):
            for k in range(len(stream or ())):
                if not true_sequential:
                    stream[k] = through(stream[k], self.rope)
                    continue
                for sublayer in through.sublayers():
                    stream[k] = sublayer.write(stream[k], sublayer.mix(stream[k], self.rope))


def hold_out(drawn: torch.Tensor, nsamples: int, count: int,
             run: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """(windows, heldout) of drawn (N, T) int64: the first nsamples of them, and of the others the
    `count` that share least text with those, counted in runs of so many tokens. Windows are drawn
    from anywhere in a text, so that some overlap; of a long text these share nothing."""
    run = min(run, drawn.shape[1])
    places = drawn.shape[1] - run + 1
    marks = torch.zeros(len(drawn), places, dtype=torch.int64)  # of the run that begins there
    for i in range(run):
        marks = marks * 1_000_003 + drawn[:, i:i + places]      # wraps around, as a hash may
    windows, others = drawn[:nsamples], drawn[nsamples:]
    shared = torch.isin(marks[nsamples:], marks[:nsamples]).sum(1)
    best = shared.argsort(stable=True)[:count].sort().values
    return windows, others[best]


class Settings(NamedTuple):
    """How the walk goes, beside the solver."""
    # True: a group of Linears is solved behind the compressed ones before it; False: all four from
    # the dense block
    true_sequential: bool = True
    # of the strength of `aim` that the text allows (`trust`); 0: solve for the dense weights
    correct: float = 1.0
    reconstruct: int = 0                # passes over the windows in `reconstruct`; 0: without

    def check(self) -> None:
        if self.correct and not self.true_sequential:
            raise ValueError(f"--correct {self.correct} works group by group: add "
                             f"--true-sequential, or turn it off with --correct 0")
        if self.reconstruct and not self.correct:
            raise ValueError(f"--reconstruct {self.reconstruct} needs the dense model's stream "
                             f"beside the compressed one's: use --correct above 0")
        if self.reconstruct and parallel.world() > 1:
            raise ValueError(f"--reconstruct {self.reconstruct} runs in one process, not in "
                             f"{parallel.world()}: leave torchrun or --reconstruct out")


def compress_block(i: int, source: Block, walk: Walk, solve: Solve, settings: Settings = Settings(),
                   shares: dict[str, float] | None = None) -> tuple[Block, list[dict]]:
    """Compress block i and move the walk's streams behind it.

    source: the dense block, in any dtype, on any device, not changed. shares: of `allocate`, where
    `solve` is not to decide how much to prune. Returns the compressed block as it is stored (fp16
    and packed, on the CPU) and one dict a Linear: error is of the group that shares its input,
    relative to `against`; error_heldout the same on the walk's held-out windows, if it has any;
    error_dense relative to the dense weights' outputs. All are from before `reconstruct`, whose own
    two are added. Only rank 0 has solved anything and has both right."""
    settings.check()
    stored = copy_block(source, torch.float16, "cpu")           # dense still, and solved in turn
    work = copy_block(source, walk.dtype, walk.device)          # the same, as it runs
    for name, p in stored.named_parameters():
        if "norm" in name:
            work.get_parameter(name).data = p.to(walk.device, walk.dtype)
    stats, unrounded = [], {}

    def solve_group(names: list[str], moments: Moments, of_outputs: bool,
                    heldout_moments: Callable) -> None:
        asked = solve if shares is None else partial(solve, share=shares[f"blocks.{i}.{names[0]}"])
        unrounded.update(solve_linears(source, stored, work, names, moments, of_outputs, asked,
                                       settings, stats, walk, heldout_moments))

    if settings.true_sequential:
        twin = copy_block(source, walk.dtype, walk.device) if walk.dense is not None else None
        dense = twin.sublayers() if twin else (None, None)
        for sublayer, dense_sublayer, kept in zip(work.sublayers(), dense, stored.sublayers()):
            step_sequential(sublayer, dense_sublayer, walk, solve_group)
            release(dense_sublayer)
            if settings.reconstruct:
                told = reconstruct(sublayer, kept, unrounded, walk, solve, settings)
                for s in stats[-len(unrounded):]:
                    s.update(told)
                unrounded.clear()
            for stream in (walk.stream, walk.heldout):
                for k, h in enumerate(stream):
                    stream[k] = sublayer.write(h, sublayer.mix(h, walk.rope))
            release(sublayer)
    else:
        moments = all_moments(work, walk.stream, walk.rope)
        heldout = all_moments(work, walk.heldout, walk.rope)
        for names in list(moments):
            solve_group(list(names), moments.pop(names), False, lambda: heldout.pop(names))
        for stream in (walk.stream, walk.heldout):
            for k, h in enumerate(stream):
                stream[k] = work(h, walk.rope)
    for s in stats:
        s["name"] = f"blocks.{i}.{s['name']}"
    return stored, stats


def copy_block(block: Block, dtype: torch.dtype, device: str) -> Block:
    """A block with parameters of its own, which share memory with block's where dtype and device
    are the same: they are to be replaced, not written to."""
    with torch.device("meta"):
        twin = Block(block.attn.c)
    state = {name: p.detach().to(device, dtype) for name, p in block.named_parameters()}
    twin.load_state_dict(state, assign=True)
    return twin.eval().requires_grad_(False)


def all_moments(block: Block, stream: Stream, rope) -> dict[tuple, Moments]:
    """{Linears: moments of what they read} of all four groups of a block as it is."""
    moments = {}
    for h in stream:
        for sublayer in block.sublayers():
            x = sublayer.read(h)
            moments.setdefault(tuple(sublayer.reads), Moments()).add(x)
            y = sublayer.part.mix(x, rope)
            moments.setdefault(tuple(sublayer.writes), Moments()).add(y)
            h = sublayer.write(h, y)
    return moments


def moments_of(stream: Stream, read: Callable) -> Moments:
    """The moments of read(h) over a stream."""
    moments = Moments()
    for h in stream:
        moments.add(read(h))
    return moments


def release(sublayer: Sublayer | None) -> None:
    """The weights of a sublayer of a copy are not needed any more."""
    for p in sublayer.part.parameters() if sublayer else ():
        p.data = p.data.new_empty(0)


def step_sequential(sublayer: Sublayer, dense: Sublayer | None, walk: Walk, solve_group) -> None:
    """The first two passes of one sublayer, and all three of its dense twin."""
    stream, twin, rope = walk.stream, walk.dense, walk.rope
    moments = Moments()
    for k, h in enumerate(stream):
        x = sublayer.read(h)
        moments.add(x, None if twin is None else dense.read(twin[k]) - x)
    solve_group(sublayer.reads, moments, False, lambda: moments_of(walk.heldout, sublayer.read))

    moments = Moments()
    for k, h in enumerate(stream):
        y = sublayer.mix(h, rope)
        if twin is None:
            moments.add(y)
            continue
        dense_h = twin[k]
        dense_y = dense.mix(dense_h, rope)
        last = dense.part.get_submodule(dense.part.writes)
        moments.add(y, F.linear(dense_y - y, last.weight) + (dense_h - h))
        twin[k] = dense.write(dense_h, dense_y)
    for k, dense_h in enumerate(walk.held_dense or ()):
        walk.held_dense[k] = dense.write(dense_h, dense.mix(dense_h, rope))
    solve_group(sublayer.writes, moments, True,
                lambda: moments_of(walk.heldout, lambda h: sublayer.mix(h, rope)))


def solve_linears(source: Block, stored: Block, work: Block, names: list[str], moments: Moments,
                  of_outputs: bool, solve: Solve, settings: Settings, stats: list[dict], walk: Walk,
                  heldout_moments: Callable) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Solve the Linears that share an input as one stacked matrix, and put the result where it is
    stored, and where it runs (work). heldout_moments(): of that input on held-out windows,
    made when the solver's memory is free again. Returns, for `reconstruct`, {name in its sublayer:
    (fp32 weights before rounding, mask)}."""
    linears = [source.get_submodule(name) for name in names]
    parts = [linear.out_features for linear in linears]
    unrounded = {}
    W = torch.cat([linear.weight.to(walk.device, torch.float32) for linear in linears])
    moments.finish()
    if parallel.rank() == 0:
        biased = linears[0].bias is not None
        target = aim(W, moments, biased, settings.correct * walk.trust, of_outputs)
        moments.H = moments.E = None                            # the solver needs room
        out = solve(target.W, target.H, parts)
        error_dense = errors(W, out.weight, target.H, parts)
        seen = {"error": out.error}
        if len(walk.heldout):
            H = target.measure(heldout_moments().finish(alone=True))
            seen["error_heldout"] = relative_error(target.W, out.weight, H)
        if settings.reconstruct:
            start = out.weight if out.mask.any() else None      # without a mask: all of target.W
            V = refit(target.W, target.H, out.mask, start)
            short = [name.rpartition(".")[2] for name in names]
            unrounded = dict(zip(short, zip(V.split(parts), out.mask.split(parts))))
        put(stored, work, names, parts, out, target.bias_gain(out.weight))
        against = "dense weights" if target.W is W else "corrected weights"
        for k, mask in enumerate(out.mask.split(parts)):
            stats.append({"name": names[k], **seen, "against": against,
                          "error_dense": error_dense[k], "sparsity": float(mask.float().mean())})
    # all run what the first process has found
    if parallel.world() > 1:
        for p in (p for name in names for p in work.get_submodule(name).parameters()):
            # it may share memory with the source
            p.data = p.data.clone()
            parallel.copy_first(p.data)
    return unrounded


def put(stored: nn.Module, work: nn.Module, names: list[str], parts: list[int], out: Compressed,
        gain: torch.Tensor | None) -> None:
    """`store` for each of the Linears that are stacked in out, whose biases gain `gain`."""
    gains = [None] * len(parts) if gain is None else gain.split(parts)
    fields = [t.split(parts) if torch.is_tensor(t) else [None] * len(parts) for t in
              (out.weight, out.mask, out.codes, out.scale, out.zero)]
    for k, name in enumerate(names):
        weight, mask, codes, scale, zero = (field[k] for field in fields)
        one = out._replace(weight=weight, mask=mask, codes=codes, scale=scale, zero=zero)
        store(stored, work, name, one, gains[k])


def store(stored: nn.Module, work: nn.Module, name: str, out: Compressed,
          bias_gain: torch.Tensor | None) -> None:
    """One solved Linear: packed, or fp16 where it was only pruned, in `stored`; the very same
    numbers in `work`."""
    kept, runs = stored.get_submodule(name), work.get_submodule(name)
    if bias_gain is not None:
        kept.bias.data = (kept.bias.float() + bias_gain.cpu()).half()
    if out.codes is None:
        kept.weight.data = out.weight.half().cpu()
    else:
        kept = PackedLinear(pack_compressed(out), kept.bias)
        stored.set_submodule(name, kept)
    run_stored(kept, runs)


def run_stored(kept: nn.Module, runs: nn.Linear) -> None:
    """What is stored, packed or not, put where it runs."""
    packed = isinstance(kept, PackedLinear)
    weight = unpack(kept.packed, runs.weight.dtype) if packed else kept.weight
    runs.weight.data = weight.to(runs.weight)
    if kept.bias is not None:
        runs.bias.data = kept.bias.to(runs.bias)


# --------------------------------------------------------------------------------------------------
# Allocation: how much of each group of Linears is pruned, at a fixed share of the whole model.

FISHER_TOKENS = 4096                    # calibration tokens that are read; at least one window
REACH = 0.25                            # how far a share may go, in what is pruned or what is kept
QUICK_ADMM = dict(iterations=5, percdamp=0.03)      # a cost needs no good mask


class Sensitivity:
    """Sums over tokens of what a group of Linears reads, x (in,), and of the gradient g (out,) of
    the loss with respect to all that they give.

    Pruning changes row r of the group's matrix by e_r (in,), and its output by e_r . x. The loss
    then changes by about E[(sum over r of g_r e_r . x)^2] / 2 (Fisher information). With g_r^2
    taken as a mean of its row times a mean of its token, and rows as independent, that is

        sum over r of  E[g_r^2] / E[|g|^2] * e_r M e_r^T / 2        M: mean of |g|^2 x x^T
    """

    def __init__(self):
        self.plain, self.weighted = Moments(), Moments()        # of x: H, and of |g| x: M
        self.rows = 0                                           # (out,) squares of g

    def add(self, x: torch.Tensor, g: torch.Tensor) -> None:
        """x (tokens, in), g (tokens, out)."""
        squares = g.float().square()
        self.plain.add(x)
        self.weighted.add(x.float() * squares.sum(1, keepdim=True).sqrt())
        self.rows = self.rows + squares.sum(0)

    def costs(self, W: torch.Tensor, fractions: list[float]) -> list[float]:
        """Nats a token that pruning each fraction of W (out, in) costs, about. Ends the sums."""
        H, weighted = (sums.finish(alone=True).H for sums in (self.plain, self.weighted))
        of_row = self.rows / self.rows.sum().clamp(min=1e-30)
        found = []
        for fraction in fractions:
            lost = W - admm(W, H, fraction, **QUICK_ADMM)[1]
            found.append(float(((lost @ weighted) * lost).sum(1) @ of_row) / 2)
        return found


@contextmanager
def watched(block: Block):
    """Inside, yields {name: (x, y)} of what the block's Linears read and gave last; y keeps its
    gradient."""
    seen, handles = {}, []
    for sublayer in block.sublayers():
        for name in sublayer.reads + sublayer.writes:
            def keep(module, inputs, y, name=name):
                y.retain_grad()
                seen[name] = inputs[0].detach(), y
            handles.append(block.get_submodule(name).register_forward_hook(keep))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def costs_of(block: Block, entered: Stream, grads: list[torch.Tensor], rope,
             fractions: list[float]) -> dict[tuple[str, ...], list[float]]:
    """{names of a group of Linears: what pruning it to each fraction costs} of a dense block, by
    the windows that entered it and the loss's gradients behind it; these become those before
    it."""
    groups = {tuple(names): Sensitivity() for sublayer in block.sublayers()
              for names in (sublayer.reads, sublayer.writes)}
    with torch.enable_grad(), watched(block) as seen:
        for k, h in enumerate(entered):
            h.requires_grad_()
            block(h, rope).backward(grads[k])
            grads[k] = h.grad
            for names, group in groups.items():
                x = seen[names[0]][0]
                g = torch.cat([seen[name][1].grad for name in names], -1)
                group.add(x.flatten(0, -2), g.flatten(0, -2))
            seen.clear()
    costs = dict.fromkeys(groups)
    widest_first = sorted(groups, key=lambda names: -block.get_submodule(names[0]).in_features)
    for names in widest_first:                                  # its sums take the most room
        group = groups.pop(names)
        W = torch.cat([block.get_submodule(name).weight.float() for name in names])
        costs[names] = group.costs(W, fractions)
    return costs


def allocates(sparsity: float | str) -> bool:
    """Can Linears be pruned by different shares? A pattern is the same for all."""
    fraction, _, m = parse_sparsity(sparsity)
    return 0 < fraction < 1 and not m


@torch.no_grad()
def allocate(ends: nn.Module, block_of: Callable[[int], Block], windows: torch.Tensor,
             fraction: float) -> dict[str, float]:
    """How much of each group of Linears with one input to prune, {name of a Linear in the model:
    its group's share}, so that `fraction` of all weights is and the dense model's loss grows least.

    ends: a Transformer's embedding and head; block_of(i): its dense block i, both in one dtype on
    one device; windows (N, T): of which a few are read, forwards and backwards, a block at a time.
    What pruning a group costs is tried at two shares; between them and a little beyond, up to
    REACH, its logarithm is taken to be a line. Blocks whose next weight would cost the same are in
    balance; the same group in all blocks is pruned by `fraction` on average, because between groups
    of unlike kinds these costs do not tell. The gradient is that of the text's own next tokens."""
    weight = ends.embed_tokens.weight
    device, dtype = str(weight.device), weight.dtype
    count = max(1, FISHER_TOKENS // windows.shape[1])
    windows = windows[::max(1, len(windows) // count)][:count].to(device)
    rope = ends.rope(0, windows.shape[1], device)
    reach = REACH * min(fraction, 1 - fraction)
    tried = [fraction - reach / 2, fraction + reach / 2]
    hs = [ends.stem(ends.embed(window[None])) for window in windows]
    entered = []                                                # of every block
    for i in Progress(range(ends.config.n_layer), "what pruning costs, forwards"):
        block = block_of(i)
        stream = Stream(dtype, device)
        for h in hs:
            stream.append(h)
        entered.append(stream)
        hs = [block(h, rope) for h in hs]
    del block
    grads = []
    for h, window in zip(hs, windows):
        with torch.enable_grad():
            h.requires_grad_()
            losses = HeadLoss.apply(ends.final(h)[0, :-1], ends.unembed, window[1:])
            losses.sum().backward()
        grads.append(h.grad)
    del hs, h, losses
    costs = {}                                                  # {names: of every block}
    for i in Progress(range(ends.config.n_layer)[::-1], "what pruning costs, backwards"):
        for names, found in costs_of(block_of(i), entered.pop(), grads, rope, tried).items():
            costs.setdefault(names, []).insert(0, found)
    shares = {}
    for names, found in costs.items():
        for i, share in enumerate(balance(found, fraction, tried, reach)):
            shares.update({f"blocks.{i}.{name}": share for name in names})
    return shares


def allocate_streamed(checkpoint: Checkpoint, windows: torch.Tensor, fraction: float,
                      dtype: torch.dtype, device: str) -> dict[str, float]:
    """`allocate` of a checkpoint, whose blocks come to the device one by one; in fp32 in place of
    fp16, whose gradients would vanish."""
    dtype = torch.float32 if dtype == torch.float16 else dtype
    return allocate(checkpoint.ends(dtype, device), lambda i: checkpoint.block(i, dtype, device),
                    windows, fraction)


def balance(costs: list[list[float]], fraction: float, tried: list[float],
            reach: float) -> list[float]:
    """Shares, within `reach` of fraction, which is their mean, of matrices of one size by their
    costs at both shares tried.

    Between the two, ln cost = c + slope (share - fraction), so that d cost / d share = slope cost,
    and its logarithm is c + ln slope at fraction and rises by slope from there. The sum of all
    costs is least where one weight more costs the same everywhere, a price: there
    share = fraction + (ln price - c - ln slope) / slope, unless that is out of reach."""
    lines = []
    for found in costs:
        low, high = (math.log(max(cost, 1e-30)) for cost in found)
        slope = max((high - low) / (tried[1] - tried[0]), 1.0)  # noise cannot turn it round
        lines.append(((low + high) / 2 + math.log(slope), slope))

    def shares_at(price: float) -> list[float]:                 # price: its logarithm
        return [fraction + min(reach, max(-reach, (price - at) / slope)) for at, slope in lines]

    low = min(at - reach * slope for at, slope in lines)
    high = max(at + reach * slope for at, slope in lines)
    for _ in range(100):
        price = (low + high) / 2
        if sum(shares_at(price)) < fraction * len(lines):
            low = price
        else:
            high = price
    return shares_at(price)


# --------------------------------------------------------------------------------------------------
# Reconstruction: each group of Linears alone was asked for the dense model's outputs; now the
# sublayer is as a whole, nonlinearity included.

WEIGHT_RATE = 1e-2                      # of Adam, in root mean squares of a matrix
GRID_RATE = 4e-3                        # in shares of a scale and of a norm's weight, in levels
STEP_TOKENS = 512                       # of a step, one window at least


class Kept(nn.Module):
    """Stands in for a Linear while the weights that its mask keeps move, and its bias."""

    def __init__(self, weight: torch.Tensor, mask: torch.Tensor, bias: torch.Tensor | None):
        """weight (out, in) fp32, 0 where mask is True."""
        super().__init__()
        self.weight, self.mask, self.out_features = weight, mask, len(weight)
        self.unit = float(weight.norm() / (~mask).sum().clamp(min=1).sqrt())
        self.u = nn.Parameter(torch.zeros_like(weight))
        self.bias = self.b = None
        if bias is not None:
            self.bias = bias.detach().float()
            self.bias_unit = max(float(self.bias.std(correction=0)), 1e-3)
            self.b = nn.Parameter(torch.zeros_like(self.bias))

    def moved(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight = self.weight + self.unit * self.u.masked_fill(self.mask, 0)
        return weight, None if self.b is None else self.bias + self.bias_unit * self.b

    def forward(self, x):
        weight, bias = self.moved()
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @torch.no_grad()
    def settle(self) -> "Kept":
        """The weight and the bias are where they have moved to."""
        weight, self.bias = self.moved()
        self.weight.copy_(weight)
        self.u = self.b = None
        return self


def stream_errors(sublayer: Sublayer, h: torch.Tensor, wanted: torch.Tensor, rope) -> torch.Tensor:
    """Of every token, fp32: the squared error of the stream behind the sublayer, h being before it,
    as a share of the dense model's, wanted. The norms to come do not see how long a token is."""
    wanted, x = wanted.float(), sublayer.mix(h, rope)
    e = sublayer.write(h.float() if sublayer.pre_norm else h, x).float() - wanted
    return e.square().mean(-1) / wanted.square().mean(-1).clamp(min=1e-12)


def held_error(sublayer: Sublayer, walk: Walk, dtype: torch.dtype | None = None) -> float:
    """Mean of stream_errors over the held-out windows, computed in dtype or in the walk's."""
    with torch.no_grad():
        found = [stream_errors(sublayer, h.to(dtype or walk.dtype), walk.held_dense[k], walk.rope)
                 for k, h in enumerate(walk.heldout)]
        return float(torch.cat(found).mean())


def tune(sublayer: Sublayer, parts: dict[str, nn.Module], norm: TunedNorm, walk: Walk, passes: int,
         rate: float) -> None:
    """Adam over the windows on what the stand-ins move, in fp32: parts, by their names in
    sublayer.part, and norm. What is best on the held-out windows is left in them. Activations are
    in dtype: gradients of fp16 would vanish."""
    sublayer = sublayer._replace(norm=lambda x: norm(x.float()).to(x.dtype))
    dtype = torch.float32 if walk.dtype == torch.float16 else walk.dtype
    windows = max(1, STEP_TOKENS // walk.stream.parked[0].shape[1])
    steps = [(k, slice(i, i + windows)) for k, batch in enumerate(walk.stream.parked)
             for i in range(0, len(batch), windows)]
    moving = {f"{name}.{n}": p for name, part in {**parts, "norm": norm}.items()
              for n, p in part.named_parameters(recurse=False)}
    with tuned(sublayer.part, parts), torch.enable_grad():
        start = max(held_error(sublayer, walk, dtype), 1e-12)

        def loss_of_batch(index) -> float:
            k, part = steps[int(index)]
            h = walk.stream[k][part].to(dtype)
            errors = stream_errors(sublayer, h, walk.dense[k][part], walk.rope)
            return backward(errors.mean() / start)

        fit(moving, loss_of_batch, len(steps), lambda: held_error(sublayer, walk, dtype) / start,
            passes * len(steps), 1, rate, val_every=len(steps), betas=(0.9, 0.99))


def reconstruct(sublayer: Sublayer, stored: Sublayer, unrounded: dict, walk: Walk, solve: Solve,
                settings: Settings) -> dict:
    """Move a sublayer that is solved, as it runs (sublayer) and as it is stored, towards what the
    dense model's sublayer gives on the dense stream, its nonlinearity included.

    Twice a few passes of Adam: on the weights before rounding, `unrounded` as solve_linears returns
    them, which are then rounded anew under the same masks; and half as many on the grids. Norms and
    biases move along. What is not better on the held-out windows is taken back. Returns the errors
    there (held_error) before and after."""
    began = time.monotonic()
    error = first = held_error(sublayer, walk)
    for stage in (move_weights, move_grids):
        part, norm = copy.deepcopy(stored.part), copy.deepcopy(stored.norm.state_dict())
        running = [(p, p.data) for m in (sublayer.part, sublayer.norm) for p in m.parameters()]
        stage(sublayer, stored, unrounded, walk, solve, settings)
        now = held_error(sublayer, walk)
        if now < error:
            error = now
            continue
        for name in unrounded:
            stored.part.set_submodule(name, part.get_submodule(name))
        stored.norm.load_state_dict(norm)
        for p, data in running:
            p.data = data
    walk.reconstructing += time.monotonic() - began
    return {"error_sublayer_before": first, "error_sublayer": error}


def move_weights(sublayer: Sublayer, stored: Sublayer, unrounded: dict, walk: Walk, solve: Solve,
                 settings: Settings) -> None:
    """The first stage of `reconstruct`. The last Linear aims at the dense output once more, behind
    what the others have become."""
    parts = {name: Kept(V, mask, sublayer.part.get_submodule(name).bias)
             for name, (V, mask) in unrounded.items()}
    norm = TunedNorm(copy.deepcopy(stored.norm).float().to(walk.device))
    tune(sublayer, parts, norm, walk, settings.reconstruct, WEIGHT_RATE)
    settle_norm(norm, sublayer, stored)
    for name, part in parts.items():
        if part.settle().bias is not None:
            stored.part.get_submodule(name).bias.data = part.bias.half().cpu()

    def round_group(names: list[str], moments: Moments, of_outputs: bool) -> None:
        W = torch.cat([parts[name].weight for name in names])
        mask = torch.cat([parts[name].mask for name in names])
        biased = parts[names[0]].bias is not None
        strength = settings.correct * walk.trust
        target = aim(W, moments.finish(), biased, strength, of_outputs)
        rows = [parts[name].out_features for name in names]
        out = solve(target.W, target.H, rows, mask)
        put(stored.part, sublayer.part, names, rows, out, target.bias_gain(out.weight))

    moments = Moments()
    has_bias = parts[sublayer.part.reads[0]].bias is not None
    for h in walk.stream:
        x = sublayer.read(h)
        # no error, but the bias meets the mean
        moments.add(x, torch.zeros_like(x) if has_bias else None)
    round_group(list(sublayer.part.reads), moments, False)

    last = parts[sublayer.part.writes]
    moments = Moments()
    for k, h in enumerate(walk.stream):
        y = sublayer.mix(h, walk.rope)
        e = walk.dense[k].float() - h.float() - F.linear(y.float(), last.weight, last.bias)
        # behind a norm, what was to come out before it is not known any more
        moments.add(y, e if sublayer.pre_norm else torch.zeros_like(e))
    round_group([sublayer.part.writes], moments, True)


def move_grids(sublayer: Sublayer, stored: Sublayer, unrounded: dict, walk: Walk, solve: Solve,
               settings: Settings) -> None:
    """The second stage of `reconstruct`, of what is packed."""
    parts = {}
    for name in unrounded:
        linear = stored.part.get_submodule(name)
        if isinstance(linear, PackedLinear):
            parts[name] = TunedGrid(linear.to(walk.device))
    if not parts:
        return
    norm = TunedNorm(copy.deepcopy(stored.norm).float().to(walk.device))
    tune(sublayer, parts, norm, walk, -(-settings.reconstruct // 2), GRID_RATE)
    settle_norm(norm, sublayer, stored)
    for name, part in parts.items():
        run_stored(part.settle().cpu(), sublayer.part.get_submodule(name))


def settle_norm(norm: TunedNorm, sublayer: Sublayer, stored: Sublayer) -> None:
    """Put a tuned norm where it runs and where it is stored."""
    for name, p in norm.settle().named_parameters():
        sublayer.norm.get_parameter(name).data = p.to(sublayer.norm.get_parameter(name).dtype)
        stored.norm.get_parameter(name).data = p.half().cpu()


def errors(W: torch.Tensor, V: torch.Tensor, H: torch.Tensor, parts: list[int]) -> list[float]:
    """`relative_error` of each of the Linears that are stacked in W."""
    return [relative_error(w, v, H) for w, v in zip(W.split(parts), V.split(parts))]


@torch.no_grad()
def compress(checkpoint: Checkpoint, folder: str | Path, windows: torch.Tensor, solve: Solve,
             settings: Settings = Settings(), batch_size: int = 4,
             dtype: torch.dtype = torch.float32, device: str = "cpu", exact: bool = False,
             after_block: Callable[[int], None] = lambda i: None,
             heldout: torch.Tensor | None = None, spent: dict | None = None,
             shares: dict[str, float] | None = None) -> list[dict]:
    """Compress a checkpoint block by block into `folder`, a shard a block, each written when it is
    done; load_model reads the folder once config.json is there, which is last. Shards that are
    there are kept, and only run; where config.json is there too, nothing is.

    windows (N, T) int64: the calibration text; heldout (M, T), if given, only measures
    (error_heldout), and judges reconstruction. dtype: of activations; solvers work in fp32. exact:
    see Stream. spent: gets the seconds of reconstruction, if there is one. shares: of `allocate`.
    Returns one dict a Linear (compress_block)."""
    folder, config = Path(folder), checkpoint.config
    first = parallel.rank() == 0
    if (folder / "config.json").exists():                       # nothing is left to run
        shards = [shard_path(folder, i + 1, config.n_layer) for i in range(config.n_layer)]
        return [layer for path in shards for layer in read_note(path)["note"]["layers"]]
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        if not shard_path(folder, 0, config.n_layer).exists():
            save_shard(folder, checkpoint.ends(), 0, config)
    walk = Walk(checkpoint.ends(dtype, device), windows, bool(settings.correct), batch_size, dtype,
                device, exact, heldout, bool(settings.reconstruct))
    stats = []
    bar = Progress(range(config.n_layer), "compressing blocks")
    for i in bar:
        path, source = shard_path(folder, i + 1, config.n_layer), checkpoint.block(i)
        parallel.wait()                                         # all see the same shards
        if path.exists():
            twin = copy_block(source, dtype, device) if walk.dense is not None else None
            walk.advance(load_block(path, i, config, dtype, device), twin, settings.true_sequential)
            bar.skip()
            del twin
            found = read_note(path)["note"]["layers"]
        else:
            stored, found = compress_block(i, source, walk, solve, settings, shares)
            parallel.wait()
            if first:
                save_shard(folder, stored, i + 1, config, {"layers": found})
        stats += found
        if stats:
            bar.note(mean_errors(stats))
        after_block(i)
    if first:
        save_index(folder, config)
    parallel.wait()
    if settings.reconstruct and spent is not None:
        spent["reconstructing"] = walk.reconstructing
    return stats


def mean_errors(stats: list[dict]) -> str:
    """In words: the mean relative error of all Linears, on the calibration windows and held out."""
    mean = lambda name: sum(s[name] for s in stats) / len(stats)
    heldout = f", held out {mean('error_heldout'):.4f}" if "error_heldout" in stats[0] else ""
    if "error_sublayer" in stats[0]:
        before, after = mean("error_sublayer_before"), mean("error_sublayer")
        heldout += f", of sublayers {before:.4f} -> {after:.4f}"
    return f"mean error {mean('error'):.4f}{heldout}"


class Plan(NamedTuple):
    """What compressing will take, in bytes, counted from shapes; `__str__` says it in a line."""
    blocks: int
    device: int                         # at the peak: copies of a block, a batch or the solver
    host: int                           # streams, embedding and head, beside mapped files
    disk: int                           # of the compressed model and, while it is healed, of the
                                        # healed one and the teacher's states, about
    model: int                          # of the compressed model alone
    tuning: int = 0                     # of device, while sublayers are reconstructed
    flops: float = 0                    # of their reconstruction

    def __str__(self) -> str:
        gb = [f"{n / 1e9:.2f} GB" for n in (self.device, self.host, self.disk, self.tuning)]
        more = (f"; reconstruction: {gb[3]} on the device, {self.flops / 1e12:.3g} TFLOP, which "
                f"take {spell(self.flops / 1e11)} at 0.1 TFLOP/s, {spell(self.flops / 1e13)} at 10")
        return (f"plan: {self.blocks} blocks one by one, at most about {gb[0]} on the device and "
                f"{gb[1]} of host memory beside mapped files, {gb[2]} on disk; the time is told "
                f"from the first block on{more if self.flops else ''}")


def spell(seconds: float) -> str:
    """A time in words."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def solver_bytes(rows: int, n: int) -> int:
    """What solving W (rows, n) holds at its peak in fp32, W and H among it, and the dense weights
    beside: copies of W while the mask is found or, of some rows at a time, while they are rounded;
    of H; and of the 2^20 weights whose grids are searched at a time. Counted by
    tests/test_compress.py."""
    whole = rows * n
    rounding = 10 * whole if whole < SLAB else 5 * whole + 8 * SLAB
    solving = max(mask_bytes(rows, n), 4 * (rounding + 3 * n * n))
    return solving + 4 * whole + 4 * 7 * min(whole, 2 ** 20)


def mask_bytes(rows: int, n: int) -> int:
    """What `admm` holds at its peak for W (rows, n), W and H among it."""
    return 4 * (7 * rows * n + 3 * n * n)


def allocation_bytes(groups: list[tuple[int, int]], weights: int, ends: int, told: int, seqlen: int,
                     d_model: int, d_ff: int) -> int:
    """What `allocate` holds at its peak for a block of so many weights, whose groups of Linears
    have (rows, n): two sums a group, and the backward pass of a window of seqlen tokens, of `told`
    in all, or one group's mask; and all the time embedding and head, `ends`. Counted by
    tests/test_compress.py."""
    sums = 8 * sum(n * n for _, n in groups)
    most = sums + 4 * seqlen * (24 * d_model + 10 * d_ff) + 8 * told * d_model
    for rows, n in sorted(groups, key=lambda group: -group[1]):
        most = max(most, sums + mask_bytes(rows, n) - 4 * n * n)        # H is one of the sums
        sums -= 8 * n * n
    return 4 * (weights + ends) + most


def tuning_bytes(weights: int, largest: int, tokens: int, d_model: int, d_ff: int) -> int:
    """What `tune` holds at its peak for a sublayer of so many weights, its largest Linear's among
    them, with the activations of `tokens` tokens. Counted by tests/test_compress.py."""
    # the weights and their mask; of each a step, its gradient, Adam's two sums, the best, as it is
    return 33 * weights + 16 * largest + 4 * tokens * (16 * d_model + 8 * d_ff)


def learning_bytes(config: Config, tokens: int, itemsize: int, heals: bool, checkpointing: bool,
                   groupsize: int = -1) -> int:
    """What a step of learning a prompt, or of healing, holds at its peak beside the model: for so
    many tokens at a time, activations of so many bytes a number. groupsize: columns of a grid that
    is healed, -1 for all. Counted by tests/test_compress.py."""
    c = config
    block = 10 * c.d_model + 4 * c.d_ff if heals else 7 * c.d_model + 3 * c.d_ff
    kept = c.n_layer * block
    if checkpointing:
        kept = c.n_layer * c.d_model + block        # what enters every block, and one block's
    on_the_way = 3 * c.d_ff                         # activations and gradients of one Linear
    largest = c.d_model * max(c.d_model, c.d_ff)
    # the weight; where it is tuned its gradient, in fp32, and what unpacking takes
    weight = (2 * itemsize + 20 * heals) * largest
    logits = 16 * min(LOGITS, tokens * c.vocab_size)
    grids = 0
    if heals and groupsize > 0:                     # of a row each they are next to nothing
        linears = 2 * (c.n_head + c.n_kv_head) * c.head_dim * c.d_model
        linears += (3 if c.family == "llama" else 2) * c.d_model * c.d_ff
        # two numbers in fp32: as they are, the best, gradient, and AdamW's two
        grids = 2 * 4 * 5 * c.n_layer * linears // groupsize
    return itemsize * tokens * (kept + on_the_way) + weight + logits + grids


def plan(checkpoint: Checkpoint, tokens: int, batch_tokens: int, dtype: torch.dtype,
         settings: Settings, bits: int | None, sparsity: float | str, held_tokens: int = 0,
         taught_tokens: int = 0, seqlen: int = STEP_TOKENS, by_loss: bool = False,
         groupsize: int = -1, pinned: bool = False) -> Plan:
    """tokens: of all calibration windows; batch_tokens: of one batch; held_tokens: of the windows
    held out of the Hessians; taught_tokens: whose last states in the dense model healing keeps on
    disk; seqlen: of a window; by_loss: `allocate` says before how much is pruned where; groupsize:
    columns that share a grid, -1 for all; pinned: for a GPU, which reads batches from memory whose
    pieces are powers of two. On a CPU, device and host memory are one: add them."""
    c = checkpoint.config
    size = dtype.itemsize
    block = checkpoint.skeleton().blocks[0]
    weights = sum(p.numel() for p in block.parameters())
    ends = checkpoint.count() - c.n_layer * weights
    groups = [(sum(block.get_submodule(n).out_features for n in names),
               block.get_submodule(names[0]).in_features)
              for sublayer in block.sublayers() for names in (sublayer.reads, sublayer.writes)]
    twin = bool(settings.correct)
    solving = max(solver_bytes(rows, n) for rows, n in groups)
    widest = max(n for _, n in groups)
    # of the other groups, where all are summed before any is solved
    others = 0 if settings.true_sequential else 4 * sum(n * n for _, n in groups)
    summing = batch_tokens * (2 + twin) * (2 * size + 4) * c.d_ff + 4 * 3 * widest ** 2
    copies = (1 + twin) * weights * size
    kept = 1 - parse_sparsity(sparsity)[0]
    grids = 0.05 if groupsize == -1 else 32 / groupsize         # two numbers of 16 bits each
    width = 16 if bits is None else bits * kept + (1.1 if kept < 1 else 0) + grids
    model = c.n_layer * weights * width / 8 + 2 * ends
    disk = model * (2 if taught_tokens else 1) + 2 * taught_tokens * c.d_embed
    # a dense model that does not fit goes over all that it teaches, not rounded, block by block
    streams = max((1 + twin) * tokens + held_tokens, taught_tokens * size // 2)
    device = copies + others + max(solving, summing)
    tuning, flops = 0, 0
    if settings.reconstruct:
        streams += held_tokens
        names = [sublayer.reads + sublayer.writes for sublayer in block.sublayers()]
        matrices = [[block.get_submodule(n).weight.numel() for n in group] for group in names]
        most = max(map(sum, matrices))
        at_once = min(batch_tokens, max(STEP_TOKENS, seqlen))
        tuning = max(tuning_bytes(sum(m), max(m), at_once, c.d_model, c.d_ff) for m in matrices)
        tuning += weights * size                    # the block as it runs, and what is still dense
        # weights before rounding and their mask wait for it
        device = max(device + 5 * most, tuning)
        passes = 1.5 * settings.reconstruct * (3 * tokens + held_tokens) + 2 * tokens
        flops = c.n_layer * (2 * weights * passes + sum(2 * tokens * n * n for _, n in groups))
    if by_loss:
        told = min(tokens, max(FISHER_TOKENS, seqlen))
        found = allocation_bytes(groups, weights, ends, told, seqlen, c.d_model, c.d_ff)
        device = max(device, found)
        # one a block; memory that is pinned for a GPU is not given back
        streams += c.n_layer * told
    device *= 1.1                                   # a GPU's allocator keeps some more
    batch = 2 * batch_tokens * c.d_model
    parked = (1 << (batch - 1).bit_length()) / batch if pinned else 1
    host = parked * 2 * streams * c.d_model + ends * size + 2 * weights
    return Plan(c.n_layer, int(device), int(host), int(disk), int(model), int(tuning), flops)


@torch.no_grad()
def compress_model(model: nn.Module, windows: torch.Tensor, solve: Solve,
                   settings: Settings = Settings(), batch_size: int = 4,
                   dtype: torch.dtype | None = None, exact: bool = False,
                   heldout: torch.Tensor | None = None,
                   shares: dict[str, float] | None = None) -> list[dict]:
    """The same walk over a Transformer that is in memory, in place; returns one dict a Linear.

    shares: of allocate(model, lambda i: model.blocks[i], windows, fraction)."""
    weight = model.embed_tokens.weight
    dtype = dtype or weight.dtype
    walk = Walk(model, windows, bool(settings.correct), batch_size, dtype, str(weight.device),
                exact, heldout, bool(settings.reconstruct))
    stats = []
    for i, block in enumerate(Progress(list(model.blocks), "compressing blocks")):
        stored, found = compress_block(i, block, walk, solve, settings, shares)
        model.blocks[i] = stored.to(weight.device, weight.dtype)
        stats += found
    return stats
