"""Heal a compressed model: tune what it stores in any case, towards what the dense model predicts.

A packed weight is a grid over integers, W = scale * (level + zero * sign) in every row or group,
with the level that the codes say (0 where pruned), and the sign of an offset grid or -1 on a
uniform one (0 where pruned). Codes and mask stay; scales, zeros, norms and biases, few of a model's
numbers and stored in any case, are tuned end to end by KL(dense || packed) on text: the second
stage of EfficientQAT (2407.11062) and PERP (2312.15230) on weights that are pruned and packed at
once. Nothing is added: the healed model has the same bytes and the same speed.

    teacher = teacher_states(dense, windows, folder), teacher_states(dense, val, folder)
    heal(packed_model, windows, val, teacher, steps=64)         # in place; save_model writes it,
    save_healed(packed_model, "compressed", "healed")           # or this in shards, as they were

The grid moves relative to itself: scale = scale_0 (1 + u), zero = zero_0 + v; a norm's weight =
weight_0 (1 + u). With dW = dy^T x, dscale = sum of dW (level + zero * sign) and dzero = scale * sum
of dW sign, over each group's columns.

A weight that is pruned and not rounded yet changes where it is not 0, by a product of low rank that
is added and gone (LoRA 2106.09685 under the mask, as in PERP): W = W_0 + B A where W_0 is not 0.
With few windows that generalizes better than moving every weight by itself.

Little text that is read again teaches less: the solver and the first pass have fitted it already.
So from three passes on train.py reads it rewritten in all but the first (`rewrite`): the dense
model's own guesses stand for some tokens, and its predictions of the new text are as good a
teacher. Left out: moving codes, and tuning embeddings or head.
"""
import math
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels.linear import PackedLinear, triton_reads
from kernels.packing import Packed, groups_of
from kernels.reference import dequantize
from kernels.unpacking import unpack
from model import open_checkpoint, read_note, save_index, save_shard, shard_path
from prompt import (LOGITS, Fit, backward_by_parts, fingerprint, fit, mark_of_model, mean_loss,
                    text_loss, windows_at_once)

RANK = 8                                # of what changes a pruned weight
SPREAD = 0.25                           # of its root mean square: what 1 in B moves a row by
FAR = 1024.0                            # a zero beyond all codes
TOKENS_AT_ONCE = 2048                   # of a pass, which unpacks every weight: half of its work


def regrid(packed: Packed, scale: torch.Tensor, zero: torch.Tensor,
           dtype: torch.dtype) -> torch.Tensor:
    """(out, in) in dtype: the codes and the mask of `packed` on another grid, scale and zero
    (out, groups) fp32."""
    other = Packed({**packed.tensors, "scale": scale, "zero": zero}, packed.meta)
    return unpack(other, dtype) if scale.device.type == "cpu" else dequantize(other, dtype)


def levels_and_signs(packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    """(level, sign), fp32 (out, in) integers with W = scale * (level + zero * sign).

    Unpacking gives W alone. So it is asked for W on a grid of scale 1 whose zero, FAR or -FAR, lies
    beyond all levels: then zero * sign decides whether W is above 0, and what it leaves of W is the
    level. A pruned weight is 0."""
    one = torch.ones_like(packed.tensors["scale"], dtype=torch.float32)
    way = 1.0 if packed.meta["grid"] == "offset" else -1.0
    far = regrid(packed, one, way * FAR * one, torch.float32)
    sign = way * far.sign()
    return far.sub_(sign, alpha=way * FAR), sign


class GridLinear(torch.autograd.Function):
    """y = x W^T with gradients for x and for the grid. Unpacks anew in the backward pass: only x is
    kept."""

    @staticmethod
    def forward(ctx, x, scale, zero, packed, group):
        ctx.save_for_backward(x, scale, zero)
        ctx.packed = packed
        ctx.group = group
        return F.linear(x, regrid(packed, scale, zero, x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, scale, zero = ctx.saved_tensors
        dW = (dy.flatten(0, -2).T @ x.flatten(0, -2)).float()
        level, sign = levels_and_signs(ctx.packed)
        dx = None
        if ctx.needs_input_grad[0]:
            column = ctx.group if scale.shape[1] > 1 else slice(None)
            W = torch.addcmul(level, zero[:, column], sign).mul_(scale[:, column])
            dx = dy @ W.to(dy.dtype)
        levels = sum_groups(level.mul_(dW), ctx.group, scale.shape)
        signs = sum_groups(sign.mul_(dW), ctx.group, scale.shape)
        return dx, levels + zero * signs, scale * signs, None, None


def sum_groups(t: torch.Tensor, group: torch.Tensor, shape: tuple) -> torch.Tensor:
    """(out, in) -> (out, groups): sums over each group's columns; group (in,) is that of each."""
    if shape[1] == 1:
        return t.sum(1, keepdim=True)
    return t.new_zeros(shape).index_add_(1, group, t)


class KeptLinear(torch.autograd.Function):
    """y = x (W + spread keep (B A))^T with gradients for x, B (out, rank) and A (rank, in), fp32;
    keep: where W is not 0. Only x is kept for the backward pass."""

    @staticmethod
    def forward(ctx, x, B, A, weight, spread):
        ctx.save_for_backward(x, B, A)
        ctx.weight = weight
        ctx.spread = spread
        return F.linear(x, changed(weight, B, A, spread).to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, B, A = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ changed(ctx.weight, B, A, ctx.spread).to(dy.dtype)
        dW = (dy.flatten(0, -2).T @ x.flatten(0, -2)).float()
        dW.mul_(ctx.weight != 0).mul_(ctx.spread)
        return dx, dW @ A.T, B.T @ dW, None, None


def changed(weight: torch.Tensor, B: torch.Tensor, A: torch.Tensor, spread: float) -> torch.Tensor:
    """(out, in) fp32: the weight moved by spread B A where it is not 0."""
    return (B @ A).mul_(spread).mul_(weight != 0).add_(weight)


class Tuned(nn.Module):
    """Stands in for a module while it is tuned. Its own parameters, fp32, say what changes.

    b: what changes the bias, None where there is none, in `unit`, the bias's own spread."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        bias = getattr(base, "bias", None)
        self.b = None if bias is None else unchanged(bias)
        self.unit = None if bias is None else max(float(bias.float().std(correction=0)), 1e-3)

    def bias(self) -> torch.Tensor | None:
        """The bias in fp32 as it is now."""
        return None if self.b is None else self.base.bias.float() + self.unit * self.b

    def biased(self, y: torch.Tensor) -> torch.Tensor:
        """y with the bias as it is now, if there is one."""
        return y if self.b is None else y + self.bias().to(y.dtype)

    @torch.no_grad()
    def settle(self) -> nn.Module:
        """The base with its tuned numbers in it, rounded to fp16: what is stored is what runs."""
        if self.b is not None:
            self.base.bias.data = self.bias().half().to(self.base.bias.dtype)
        return self.base


class TunedNorm(Tuned):
    """A norm, whose weight becomes weight (1 + u)."""

    def __init__(self, base: nn.Module):
        super().__init__(base)
        self.u = unchanged(base.weight)

    def forward(self, x):
        y = self.base(x)                                        # weight * normed + bias
        if self.b is not None:
            y = y - self.base.bias
        return self.biased((y * (1 + self.u)).to(x.dtype))

    @torch.no_grad()
    def settle(self) -> nn.Module:
        weight = self.base.weight
        weight.data = (weight.float() * (1 + self.u)).half().to(weight.dtype)
        return super().settle()


class TunedGrid(Tuned):
    """A PackedLinear: u changes its scales, relative to them, v its zeros."""

    def __init__(self, base: PackedLinear):
        super().__init__(base)
        self.u = unchanged(base.scale)
        self.v = unchanged(base.zero)
        order = base.packed.tensors.get("g_idx")
        groups = groups_of(base.in_features, base.meta["groupsize"], order)
        self.group = torch.from_numpy(groups).to(base.scale.device)

    def grid(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale, zero) (out, groups) fp32 as they are now."""
        return self.base.scale.float() * (1 + self.u), self.base.zero.float() + self.v

    def forward(self, x):
        return self.biased(GridLinear.apply(x, *self.grid(), self.base.packed, self.group))

    @torch.no_grad()
    def settle(self) -> nn.Module:
        base = self.base
        base.scale, base.zero = (t.half() for t in self.grid())
        base.decoder = None, None                               # made of the old grid
        base.in_triton = triton_reads(base.packed)
        return super().settle()


class TunedKept(Tuned):
    """A Linear that is pruned and not packed: the weights that it keeps change by a product of low
    rank, in a share of their own root mean square, so that a rate means the same everywhere."""

    def __init__(self, base: nn.Linear):
        super().__init__(base)
        out, n = base.weight.shape
        device = base.weight.device
        kept = max(1, int(base.weight.count_nonzero()))
        size = float(base.weight.float().square().sum() / kept) ** 0.5
        self.spread = SPREAD * size * math.sqrt(n)
        g = torch.Generator().manual_seed(0)
        self.A = nn.Parameter(torch.randn(RANK, n, generator=g).to(device) / math.sqrt(n))
        self.B = nn.Parameter(torch.zeros(out, RANK, device=device))

    def forward(self, x):
        return self.biased(KeptLinear.apply(x, self.B, self.A, self.base.weight, self.spread))

    @torch.no_grad()
    def settle(self) -> nn.Module:
        weight = self.base.weight
        weight.data = changed(weight, self.B, self.A, self.spread).half().to(weight.dtype)
        return super().settle()


def stand_in(m: nn.Module) -> Tuned | None:
    """What tunes a module; None where nothing does."""
    if isinstance(m, PackedLinear):
        return TunedGrid(m)
    if isinstance(m, nn.LayerNorm) or type(m).__name__ == "RMSNorm":
        return TunedNorm(m)
    if isinstance(m, nn.Linear) and bool((m.weight == 0).any()):
        return TunedKept(m)
    return None


def unchanged(numbers: torch.Tensor) -> nn.Parameter:
    """No change of these numbers yet: zeros of their shape, fp32."""
    return nn.Parameter(torch.zeros(numbers.shape, device=numbers.device))


@contextmanager
def tuned(model, found: dict[str, nn.Module] | None = None):
    """Inside, a Tuned stands in for every packed or pruned Linear of the blocks and every norm, or
    those of `found` stand where it says; after, all are themselves again. Yields {name: Tuned}.

    A head may hold zeros too, but was never pruned."""
    if found is None:
        made = {name: stand_in(m) for name, m in model.named_modules()
                if name == "norm" or name.startswith("blocks.")}
        found = {name: part for name, part in made.items() if part is not None}
    own = {name: model.get_submodule(name) for name in found}
    for name, m in found.items():
        model.set_submodule(name, m)
    try:
        yield found
    finally:
        for name, m in own.items():
            model.set_submodule(name, m)


REWRITTEN = 0.3                         # of the tokens of a window


@torch.no_grad()
def rewrite(windows: torch.Tensor, states: torch.Tensor, unembed: torch.Tensor, seed: int = 0,
            share: float = REWRITTEN) -> torch.Tensor:
    """windows (N, T) int64 with about `share` of their tokens, the first never, drawn anew: each
    from what the dense model predicts behind the tokens that were before it. states:
    `teacher_states` of the windows; unembed (vocab, d_embed): the dense model's head."""
    g = torch.Generator().manual_seed(seed)
    rewritten = windows.clone()
    for window, z in zip(rewritten, states):
        places = 1 + (torch.rand(len(window) - 1, generator=g) < share).nonzero()[:, 0]
        u = torch.rand(len(places), 1, generator=g)
        rows = max(1, LOGITS // len(unembed))
        for at, level in zip(places.split(rows), u.split(rows)):
            logits = F.linear(z[at - 1].to(unembed), unembed)
            mass = logits.float().softmax(-1).cumsum(-1)
            level = level.to(mass) * mass[:, -1:]
            drawn = torch.searchsorted(mass, level, right=True).clamp_(max=len(unembed) - 1)
            window[at] = drawn[:, 0].to(window)
    return rewritten


def heal(model, windows: torch.Tensor, val: torch.Tensor,
         teacher: tuple[torch.Tensor, torch.Tensor], steps: int = 64, batch_size: int = 4,
         lr: float = 2e-3, val_every: int | None = None, seed: int = 0, readings: int = 1,
         state: str | Path | None = None, progress=lambda items, title: items) -> Fit:
    """Tune grids or kept weights, norms and biases of a compressed model in place by KL to the
    dense model; `fit` says how.

    windows (N, T) int64, val (M, T) held out: what has the lowest KL there is kept, so that a model
    never gets worse on val. teacher: `teacher_states` of windows and of val. readings: how many of
    the same text lie in `windows`, the first as it is and the others as `rewrite` leaves them; each
    pass over the text takes the next. model.checkpointing = True saves memory for a third more
    time. Raises ValueError where nothing is packed or pruned, or on a loss that is not finite; the
    model is then as it was."""
    if not len(windows) or not len(val):
        raise ValueError(f"healing needs text and held-out text: got {len(windows)} and {len(val)} "
                         f"windows")
    device = model.embed_tokens.weight.device
    states, val_states = teacher
    at_once = windows_at_once(windows.shape[1], device, TOKENS_AT_ONCE)

    def losses_of(part):
        return text_loss(model, None, windows[part].to(device), states[part])

    def loss_of_batch(index):
        return backward_by_parts(losses_of, index, at_once)

    def score():
        return mean_loss(model, None, val, at_once, val_states)

    marks = {"text": fingerprint(windows), "val": fingerprint(val), "model": mark_of_model(model),
             "readings": readings}
    with tuned(model) as parts:
        if all(isinstance(part, TunedNorm) for part in parts.values()):
            raise ValueError("nothing to heal: no Linear of this model is packed (quantized) or "
                             "pruned")
        params = {f"{name}.{n}": p for name, part in parts.items()
                  for n, p in part.named_parameters(recurse=False)}
        got = fit(params, loss_of_batch, len(windows) // readings, score, steps, batch_size, lr,
                  val_every=val_every, betas=(0.9, 0.99), seed=seed, state=state, settings=marks,
                  title="healing", readings=readings, progress=progress)
        for part in parts.values():
            part.settle()
    return got


def save_healed(model, source: str | Path, folder: str | Path) -> None:
    """Write a healed model of the compressed folder `source` into another one, in the same shards
    with the same notes; config.json comes last: a folder without it is not complete."""
    source, folder = Path(source), Path(folder)
    config = model.config
    folder.mkdir(parents=True, exist_ok=True)
    ends = open_checkpoint(source).ends()
    for name, p in ends.named_parameters():
        p.data = model.get_parameter(name).data
    save_shard(folder, ends, 0, config)
    for i, block in enumerate(model.blocks):
        note = read_note(shard_path(source, i + 1, config.n_layer))["note"]
        save_shard(folder, block, i + 1, config, note)
    save_index(folder, config)
