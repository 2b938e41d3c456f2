"""SparseGPT: prune one weight matrix in a single second-order pass, and quantize the survivors in
the same pass (arXiv 2301.00774).

Removing weight w in column j and letting the columns to its right make up for it (see gptq.py for
H, U and the update) adds (w / U[j, j])^2 to the layer's error. So, block of columns by block of
columns, left to right (equation 4; sections 3.1, 3.2, 3.3):

    score[r, j] = (W[r, j] / U[j, j])^2             how much pruning this weight would cost
    mask        = the smallest scores of the block  or the m - n smallest of every m columns: n:m
    W[:, k]    -= (w - q) / U[j, j] * U[j, k]       q = 0 where pruned, else w, or w rounded

The joint pass is section 3.5: an error of rounding and an error of pruning are repaired by the same
update.

    import torch, torch.nn as nn
    from gptq import hessian
    from sparsegpt import prune_and_round, sparsegpt
    layer = nn.Linear(64, 32)
    x = torch.randn(512, 64) @ torch.randn(64, 64)              # correlated, as real inputs are
    W, H = layer.weight.data, hessian(x)
    plain = sparsegpt(W, H, sparsity=0.5, bits=4)               # or "2:4", or bits=None
    better = prune_and_round(W, H, sparsity=0.5, bits=4)        # slower; compare plain.error
    layer.weight.data.copy_(better.weight)

`prune_and_round` takes the same problem apart: a mask that sees the whole matrix at once (`admm`),
the exact best values of what the mask keeps (`refit`), a grid for those values alone and GPTQ with
the mask held (gptq.py). Copy this file together with gptq.py. How much of each layer to prune is
compress.py's to say (`allocate`).
"""
import math

import torch

from gptq import (Compressed, Rounder, check, check_blocks, column_groups, column_order, encode,
                  gptq, inverse_factor, invert_, quick_dtype, relative_error, static_grids, sweep)

SLAB = 2 ** 25          # weights that `prune_and_round` holds many copies of at a time


def parse_sparsity(sparsity: float | str) -> tuple[float, int, int]:
    """0.5 or "0.5" -> (0.5, 0, 0); "2:4" (keep 2 of every 4) -> (0.5, 2, 4). The fraction is of
    weights pruned."""
    if isinstance(sparsity, str) and ":" in sparsity:
        try:
            n, m = (int(p) for p in sparsity.split(":"))
        except ValueError:
            n, m = 0, 0
        if not 0 < n <= m:
            raise ValueError(f"sparsity {sparsity!r}: n:m keeps n of every m weights, with "
                             f"0 < n <= m, such as 2:4")
        return 1 - n / m, n, m
    try:
        fraction = float(sparsity)
    except ValueError:
        raise ValueError(f"sparsity {sparsity!r} is neither a fraction such as 0.5 nor a pattern "
                         f"such as 2:4") from None
    if not 0 <= fraction <= 1:
        raise ValueError(f"sparsity {fraction}: a fraction of weights to prune must lie between 0 "
                         f"and 1")
    return fraction, 0, 0


def kth_smallest(flat: torch.Tensor, k: int) -> torch.Tensor:
    """flat.kthvalue(k), which copies all of flat three times over. Of a large one, every so many
    entries tell between which two values it lies, and only what lies there is sorted."""
    n = len(flat)
    if n > 2 ** 22:
        sample = flat[::n // 2 ** 16].sort().values
        place = len(sample) * k // n
        low = sample[max(0, place - 2000)]
        high = sample[min(len(sample) - 1, place + 2000)]
        below = int((flat < low).sum())
        middle = flat[(flat >= low) & (flat <= high)]
        if below < k <= below + len(middle):
            return middle.kthvalue(k - below).values
    return flat.kthvalue(k).values


def prune_smallest(score: torch.Tensor, k: int) -> torch.Tensor:
    """True at exactly k smallest entries of score, by selection; ties go to the first in memory
    order."""
    mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    if k > 0:
        flat = score.flatten()
        edge = kth_smallest(flat, k)
        mask = flat < edge
        # the reference implementation prunes all ties: too many
        ties = (flat == edge).nonzero().squeeze(1)
        mask[ties[:k - int(mask.sum())]] = True
    return mask.view(score.shape)


def prune_pattern(score: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """True at all but the n largest of every m columns of score (rows, cols); a last group cut
    short prunes its share, rounded down."""
    mask = torch.zeros_like(score, dtype=torch.bool)
    cols = score.shape[1]
    whole = cols // m * m
    for start, end, width in ((0, whole, m), (whole, cols, cols - whole)):
        if start < end:
            groups = score[:, start:end].reshape(-1, width)
            cut = groups.argsort(dim=1, stable=True)[:, :width * (m - n) // m]
            pruned = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, cut, True)
            mask[:, start:end] = pruned.view(len(score), -1)
    return mask


class Pruner(Rounder):
    """Chooses SparseGPT's values in `sweep`: zero where the mask says so, else GPTQ's rounding,
    else the weight as it is. The mask is chosen on the way."""

    def __init__(self, U, rows: int, parts: list[int], sparsity, blocksize: int, **rounding):
        """rows of W, of which each of `parts` is pruned to the sparsity; rounding: see Rounder."""
        super().__init__(U, **rounding)
        self.fraction, self.n, self.m = parse_sparsity(sparsity)
        self.stride = self.m or blocksize           # columns whose mask is chosen at once
        self.keep = torch.ones(len(U), rows, dtype=torch.bool, device=U.device)     # (in, out)
        self.parts = parts
        self.before = 0                             # columns whose mask is chosen

    def __call__(self, Wt, j):
        if j % self.stride == 0:
            stop = min(j + self.stride, len(Wt))
            score = (Wt[j:stop] * self.inverse_pivot[j:stop, None]).square().T
            if self.m:
                cut = prune_pattern(score, self.n, self.m)
            else:
                cut = torch.cat([prune_smallest(part, self.share(len(part), stop))
                                 for part in score.split(self.parts)])
                self.before = stop
            self.keep[j:stop] = ~cut.T
        if self.bits:
            return super().__call__(Wt, j)
        q = torch.where(self.keep[j], Wt[j], 0)
        return q, (Wt[j] - q) * self.inverse_pivot[j]

    def share(self, rows: int, stop: int) -> int:
        """How many weights of the columns up to stop to prune: running totals make a matrix's
        sparsity exact."""
        return round(self.fraction * rows * stop) - round(self.fraction * rows * self.before)


@torch.no_grad()
def sparsegpt(W: torch.Tensor, H: torch.Tensor, sparsity: float | str, bits: int | None = None,
              groupsize: int = -1, sym: bool = False, percdamp: float = 0.01, blocksize: int = 128,
              parts: list[int] | None = None) -> Compressed:
    """Prune W (out, in) to `sparsity` (0.5, or "2:4" for n kept of every m) with H (in, in), and
    quantize it if bits is given.

    Neither input is changed; work is done in W's precision, fp32 at least. Sparsity is exact:
    round(sparsity * W.numel()) weights for a fraction, n of every m columns for a pattern. The grid
    is the row's (or group's) min-max, as in gptq.py. parts: rows of each of several matrices that
    share H and are stacked in W; each is pruned to the sparsity. Raises ValueError for NaN, Inf,
    wrong shapes or sparsity."""
    check(W, H, bits, blocksize, groupsize)
    n = W.shape[1]
    m = parse_sparsity(sparsity)[2] or 1
    blocksize = -(-blocksize // m) * m              # blocks hold whole n:m groups
    static = groupsize == -1
    if bits and not static:
        check_blocks(groupsize, blocksize, m)
    dtype = torch.promote_types(W.dtype, torch.float32)
    W, H = W.to(dtype), H.to(dtype)
    start = W.masked_fill(H.diagonal() == 0, 0)     # inputs that are always 0: pruned first
    U = inverse_factor(H, percdamp)
    grids = None
    if bits and static:
        grids = static_grids(start, H, None, bits, groupsize, "minmax", sym)
    choose = Pruner(U, len(W), parts or [len(W)], sparsity, blocksize,
                    group=column_groups(n, groupsize), grids=grids, bits=bits, sym=sym)
    inner = -(-16 // m) * m
    if bits and not static:
        inner = math.gcd(inner, groupsize)
    V = sweep(start.T.contiguous(), U, blocksize, choose, inner)
    weight, mask = V.T.contiguous(), ~choose.keep.T.contiguous()
    error = relative_error(W, V.T, H)
    if not bits:
        return Compressed(weight, mask, None, None, None, None, error)
    scale, zero = choose.tables()
    g_idx = torch.tensor(choose.group, device=W.device)
    codes = encode(V, choose.keep, scale, zero, g_idx, bits).T.contiguous()
    return Compressed(weight, mask, codes, scale.T.float().contiguous(),
                      zero.T.float().contiguous(), g_idx, error, bits=bits)


def sizes(H):
    """Root mean square of every input (in,): weights times this are alike in importance. An input
    that is always 0 has none."""
    d = H.diagonal().sqrt()
    return d.clamp(min=max(1e-4 * float(d.max()), 1e-12))


def normalized(H, d, damp):
    """H in units where every input has mean square 1, so that damp treats all alike:
    H / (d d^T) + damp I."""
    Hn = H / d
    Hn /= d[:, None]
    Hn.diagonal().add_(damp)
    return Hn


def coprime(stride: int, columns: int) -> int:
    """The next stride that meets every column of a matrix stored row by row: one that divides the
    width meets few."""
    while math.gcd(stride, columns) > 1:
        stride += 1
    return stride


@torch.no_grad()
def admm(W: torch.Tensor, H: torch.Tensor, sparsity: float | str, iterations: int = 15,
         percdamp: float = 0.01, rho: float = 0.2, growth: float = 1.7,
         every: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask of W (out, in) by the alternating direction method of multipliers (ALPS,
    2406.07831): minimize trace((W-X) H (W-X)^T) over X = D, D sparse. With dual Y, and rho pulling
    the two together,

        X = (W H + rho (D - Y)) (H + rho I)^-1      ridge regression, one product for all rows
          = W + (D - Y - W) rho (H + rho I)^-1      the same, and kinder to half precision
        D = keep the largest of X + Y               projection onto the sparsity pattern
        Y = Y + X - D                               what still separates them

    in normalized units. rho grows by `growth` after every few iterations. Returns (mask (out, in)
    bool, True = pruned, with exactly the sparsity asked for, and D, a good start for `refit`)."""
    fraction, n, m = parse_sparsity(sparsity)
    d = sizes(H)
    Wn = W * d
    # a mask stands a little noise, and half precision takes half of the time
    fast = quick_dtype(W) if W.shape[1] >= 512 else W.dtype
    stride = coprime(max(1, W.numel() // 65536), W.shape[1])

    def kept(Z, exact=False):
        """Where D is not zero. On the way, an estimated threshold will do."""
        size = Z.abs()
        if m:
            return ~prune_pattern(size, n, m)
        if exact:
            return ~prune_smallest(size, round(fraction * Z.numel()))
        sample = size.flatten()[::stride]
        return size > sample.kthvalue(max(1, round(fraction * len(sample)))).values

    # One matrix Z = X + Y holds both: D is Z where it is kept, the new Y is Z elsewhere.
    Z = Wn.clone()
    keep = kept(Z)
    for i in range(iterations):
        if i % every == 0:
            if i:
                rho *= growth
                Z = torch.where(keep, Z, Z / growth)            # Y is in units of 1 / rho
            shrink = None                                       # make room: H is large
            shrink = invert_(normalized(H, d, percdamp + rho)).mul_(rho).to(fast)
        gap = torch.where(keep, Z, -Z).sub_(Wn).to(fast)        # D - Y - W
        Z = Z.masked_fill_(keep, 0).add_(Wn).add_(gap @ shrink)
        del gap                                                 # `kept` needs room too
        keep = kept(Z, exact=i == iterations - 1)
    return ~keep, Z.masked_fill_(~keep, 0).div_(d)


@torch.no_grad()
def refit(W: torch.Tensor, H: torch.Tensor, mask: torch.Tensor, start: torch.Tensor | None = None,
          iterations: int = 3, percdamp: float = 0.01) -> torch.Tensor:
    """The best values of the weights that mask (True = pruned) keeps: each row solves
    min (v-w) H (v-w)^T on its support.

    Conjugate gradients on all rows at once, preconditioned by the diagonal (the normalized units);
    one product an iteration."""
    d = sizes(H)
    Wn = W * d
    Hn = normalized(H, d, percdamp)
    keep = ~mask
    V = (Wn if start is None else start * d) * keep
    R = (Wn.sub_(V) @ Hn).mul_(keep)                # residual: minus half the gradient
    del Wn
    P = R.clone()
    rr = torch.linalg.vector_norm(R, dim=1, keepdim=True).square()
    for _ in range(iterations):
        Q = (P @ Hn).mul_(keep)
        bend = (P * Q).sum(1, keepdim=True)
        # damping alone makes it as large, unless H was rounded until it is indefinite: no step then
        least = percdamp / 2 * torch.linalg.vector_norm(P, dim=1, keepdim=True).square()
        step = torch.where(bend < least, 0, rr / bend.clamp(min=1e-30))
        V.addcmul_(step, P)
        R.addcmul_(step, Q, value=-1)
        old, rr = rr, torch.linalg.vector_norm(R, dim=1, keepdim=True).square()
        P.mul_(rr / old.clamp(min=1e-30)).add_(R)
    return V.div_(d)


@torch.no_grad()
def prune_and_round(W: torch.Tensor, H: torch.Tensor, sparsity: float | str,
                    bits: int | None = None, groupsize: int = -1, mask: str = "admm",
                    refits: int = 3, grid: str = "auto", act_order: bool = True, descent: int = 2,
                    percdamp: float = 0.01, blocksize: int = 128, sym: bool = False,
                    fixed_mask: torch.Tensor | None = None) -> Compressed:
    """Prune W (out, in) with H (in, in) and quantize what is left: mask, refit, searched grid, GPTQ
    with the mask held fixed, descent.

    mask: "admm" or "sparsegpt"; refits: conjugate gradient iterations, 0 keeps the mask's own
    values; grid, act_order, descent: see gptq.gptq, "auto" being "offset" behind a mask and
    "uniform" without; groups are neighbouring columns. sparsity 0 only quantizes, bits None only
    prunes. fixed_mask (out, in), True where pruned: found before, in place of a new one. Behind
    the mask every row is a problem of its own, and large matrices are solved some rows at a
    time."""
    check(W, H, bits, blocksize, groupsize)
    if mask not in ("admm", "sparsegpt"):
        raise ValueError(f"mask={mask!r}: known are admm and sparsegpt")
    W, H = (t.to(torch.promote_types(W.dtype, torch.float32)) for t in (W, H))
    V, pruned = W, None
    if fixed_mask is not None:
        if fixed_mask.any():
            V, pruned = W.masked_fill(fixed_mask, 0), fixed_mask
    elif parse_sparsity(sparsity)[0]:
        if mask == "admm":
            pruned, V = admm(W, H, sparsity, percdamp=percdamp)
        else:
            V, pruned = sparsegpt(W, H, sparsity, percdamp=percdamp, blocksize=blocksize)[:2]
    if grid == "auto":
        grid = "uniform" if pruned is None else "offset"
    step = max(1, SLAB // W.shape[1])
    slabs = [slice(r, r + step) for r in range(0, len(W), step)]
    U = None
    if bits and len(slabs) > 1:                     # once for all
        U = inverse_factor(H, percdamp, column_order(H, act_order))

    def solve(rows: slice) -> Compressed:
        w, v = W[rows], V[rows]
        cut = None if pruned is None else pruned[rows]
        if cut is not None and refits:
            v = refit(w, H, cut, v, refits, percdamp)
        if bits:
            return gptq(v, H, bits, groupsize, sym, act_order, static_groups=True,
                        percdamp=percdamp, blocksize=blocksize, U=U, grid=grid, mask=cut,
                        descent=descent, target=w)
        if cut is None:
            cut = torch.zeros_like(w, dtype=torch.bool)
        return Compressed(w.clone() if v is w else v, cut, None, None, None, None,
                          relative_error(w, v, H))

    solved = [solve(rows) for rows in slabs]
    if len(solved) == 1:
        return solved[0]
    del V, U
    # mean squares of the outputs, of which errors are shares
    outputs = [float(((W[rows] @ H) * W[rows]).sum(1).sum()) for rows in slabs]
    lost = sum(one.error * output for one, output in zip(solved, outputs))
    whole = {name: torch.cat([getattr(one, name) for one in solved])
             for name in ("weight", "mask", "codes", "scale", "zero")
             if getattr(solved[0], name) is not None}
    return solved[0]._replace(**whole, error=lost / max(sum(outputs), 1e-30))
