"""SparseGPT: prune one weight matrix in a single second-order pass, and quantize the survivors in the same pass (2301.00774).

Removing weight w in column j and letting the columns to its right make up for it (see gptq.py for H, U and the update)
adds (w / U[j, j])^2 to the layer's error. So, block of columns by block of columns, left to right:

    score[r, j] = (W[r, j] / U[j, j])^2              how much pruning this weight would cost               (eq. 4, section 3.1)
    mask        = the smallest scores of the block   (or the n - m smallest of every m columns: n:m)       (section 3.2)
    W[:, k]    -= (w - q) / U[j, j] * U[j, k]        q = 0 where pruned, else w or w rounded to its grid   (section 3.3)

The joint pass is section 3.5: an error of rounding and an error of pruning are repaired by the same update.

    import torch, torch.nn as nn
    from gptq import hessian
    from sparsegpt import sparsegpt
    layer, x = nn.Linear(64, 32), torch.randn(512, 64)
    layer.weight.data = sparsegpt(layer.weight.data, hessian(x), sparsity=0.5, bits=4).weight      # or "2:4", or bits=None

Copy it together with gptq.py, whose column loop it shares. Left out: sparsity chosen per layer.
"""
import torch

from gptq import Compressed, Rounder, check, inverse_factor, relative_error, sweep


def parse_sparsity(sparsity: float | str) -> tuple[float, int, int]:
    """0.5 or "0.5" -> (0.5, 0, 0); "2:4" (keep 2 of every 4) -> (0.5, 2, 4). The fraction is of weights pruned."""
    if isinstance(sparsity, str) and ":" in sparsity:
        try:
            n, m = (int(p) for p in sparsity.split(":"))
        except ValueError:
            n, m = 0, 0
        if not 0 < n <= m:
            raise ValueError(f"sparsity {sparsity!r}: n:m keeps n of every m weights, with 0 < n <= m, such as 2:4")
        return 1 - n / m, n, m
    try:
        fraction = float(sparsity)
    except ValueError:
        raise ValueError(f"sparsity {sparsity!r} is neither a fraction such as 0.5 nor a pattern such as 2:4") from None
    if not 0 <= fraction <= 1:
        raise ValueError(f"sparsity {fraction}: a fraction of weights to prune must lie between 0 and 1")
    return fraction, 0, 0


def prune_smallest(score: torch.Tensor, k: int) -> torch.Tensor:
    """True at exactly k smallest entries of score, by selection; ties go to the first in memory order."""
    mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    if k > 0:
        flat = score.flatten()
        edge = flat.kthvalue(k).values                         # the k-th smallest
        mask = flat < edge
        ties = (flat == edge).nonzero().squeeze(1)             # the reference prunes all of them: too many
        mask[ties[:k - int(mask.sum())]] = True
    return mask.view(score.shape)


class Pruner(Rounder):
    """Chooses SparseGPT's values: zero where the mask says so, else GPTQ's rounding, else the weight as it is."""

    def __init__(self, W, U, sparsity, bits, groupsize, sym):
        super().__init__(W, bits, groupsize, sym)
        self.fraction, self.keep, self.of = parse_sparsity(sparsity)
        self.U, self.mask, self.pruned = U, torch.zeros_like(W, dtype=torch.bool), 0

    def block(self, W, start, end):
        if not self.of:                                        # a running total makes the matrix's sparsity exact
            total = round(self.fraction * len(W) * end)
            score = (W[:, start:end] / self.U.diagonal()[start:end]).square()
            self.mask[:, start:end] = prune_smallest(score, total - self.pruned)
            self.pruned = total

    def columns(self, W, j, stop):
        super().columns(W, j, stop)
        if self.of and j % self.of == 0:                       # a last group cut short prunes its share, rounded down
            end = min(j + self.of, self.n)
            score = (W[:, j:end] / self.U.diagonal()[j:end]).square()
            cut = score.argsort(dim=1, stable=True)[:, :(end - j) * (self.of - self.keep) // self.of]
            self.mask[:, j:end].scatter_(1, cut, True)

    def __call__(self, w, j):
        q = super().__call__(w, j) if self.bits else w
        self.codes[:, j].masked_fill_(self.mask[:, j], 0)
        return q.masked_fill(self.mask[:, j], 0)


def sparsegpt(W: torch.Tensor, H: torch.Tensor, sparsity: float | str, bits: int | None = None, groupsize: int = -1,
              sym: bool = False, percdamp: float = 0.01, blocksize: int = 128, U: torch.Tensor | None = None) -> Compressed:
    """Prune W (out, in) to `sparsity` (0.5, or "2:4" for n kept of every m) with H (in, in), and quantize it if bits is given.

    Neither input is changed; work is done in W's precision, fp32 at least. Sparsity is exact: round(sparsity * W.numel())
    weights for a fraction, n of every m columns for a pattern. The grid is the row's (or group's) min-max, as in gptq.py.
    U: inverse_factor of the same H and percdamp, to share it. Raises ValueError for NaN, Inf, wrong shapes or sparsity."""
    check(W, H, bits, blocksize, groupsize)
    W0, H0 = W.to(torch.promote_types(W.dtype, torch.float32)), H.to(torch.promote_types(W.dtype, torch.float32))
    W, H = W0.clone(), H0
    W[:, H.diagonal() == 0] = 0                                # inputs that are always 0: pruned first, at no cost
    U = inverse_factor(H, percdamp) if U is None else U
    choose = Pruner(W, U, sparsity, bits, groupsize, sym)
    m = choose.of or 1                                         # inner blocks hold whole n:m groups
    V = sweep(W, U, -(-blocksize // m) * m, choose, inner=-(-16 // m) * m)
    scale, zero = choose.tables() if bits else (None, None)
    return Compressed(V, choose.mask, choose.codes if bits else None, scale, zero,
                      torch.tensor(choose.group, device=W.device) if bits else None, relative_error(W0, V, H0))
