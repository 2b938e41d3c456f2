"""GPTQ: quantize one weight matrix column by column, letting the columns to come absorb each error (arXiv 2210.17323).

A Linear maps inputs x to W x. With H = mean of x x^T over calibration inputs, changing W to V costs, on average,

    error(V) = trace((W - V) H (W - V)^T).                                                         (layer-wise objective)

Every row has the same H. Fix the columns from left to right. Once column j is rounded from w to q, the best change of the
columns still free, from Optimal Brain Surgeon, is

    W[:, k] -= (w - q) / U[j, j] * U[j, k]   for k > j,   where  H^-1 = U^T U,  U upper triangular,     (section 3.3)

and it adds ((w - q) / U[j, j])^2 to the error. U is found once for all rows: the Cholesky trick of section 3.3, step 3.

    import torch, torch.nn as nn
    from gptq import gptq, hessian
    layer, x = nn.Linear(64, 32), torch.randn(512, 64)
    out = gptq(layer.weight.data, hessian(x), bits=4)
    layer.weight.data = out.weight                       # out.codes, out.scale, out.zero store it in 4 bits

This file needs only torch. Left out: grids searched per group during the pass for more than one candidate.
"""
from typing import NamedTuple

import torch


class Compressed(NamedTuple):
    weight: torch.Tensor                # (out, in), dequantized, exact zeros where mask is True
    mask: torch.Tensor                  # (out, in) bool, True where pruned
    codes: torch.Tensor | None          # (out, in) uint8, 0 where pruned; None when nothing was quantized
    scale: torch.Tensor | None          # (out, groups) float32 holding exact fp16 values
    zero: torch.Tensor | None           # (out, groups) likewise; weight = scale * (codes - zero)
    g_idx: torch.Tensor | None          # (in,) group of each column
    error: float                        # trace((W-V) H (W-V)^T) / trace(W H W^T), the relative output error


def hessian(x: torch.Tensor) -> torch.Tensor:
    """Mean of x x^T over all leading dimensions: (..., in) -> (in, in) float32."""
    x = x.reshape(-1, x.shape[-1]).float()
    return x.T @ x / len(x)


def fp16_exact(t: torch.Tensor) -> torch.Tensor:
    """The nearest value that fp16 holds, so that what is stored is what was used."""
    return t.half().to(t.dtype)


def find_grid(W: torch.Tensor, bits: int, sym: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Min-max grid of each row of W (out, n): scale and zero, each (out, 1), levels scale * (0 ... 2^bits - 1  -  zero)."""
    levels = 2 ** bits - 1
    low, high = W.amin(1, keepdim=True).clamp(max=0), W.amax(1, keepdim=True).clamp(min=0)   # zero stays a level
    if sym:
        high = torch.maximum(-low, high)
        low = -high
    span = torch.where(high > low, high - low, torch.full_like(high, levels))                # an all-zero row
    scale = fp16_exact(span / levels).clamp(min=2 ** -24)                                    # fp16's smallest number
    zero = torch.full_like(scale, (levels + 1) // 2) if sym else (-low / scale).round().clamp(0, levels)
    return scale, zero


def quantize(W: torch.Tensor, scale, zero, bits: int) -> torch.Tensor:
    """Nearest codes 0 ... 2^bits - 1, as floats."""
    return (W / scale + zero).round().clamp(0, 2 ** bits - 1)


def check(W: torch.Tensor, H: torch.Tensor, bits: int | None, blocksize: int, groupsize: int) -> None:
    """One clear ValueError for what no solver can work with."""
    if W.dim() != 2 or H.shape != (W.shape[1], W.shape[1]):
        raise ValueError(f"W {tuple(W.shape)} needs H of shape {(W.shape[-1],) * 2}, got {tuple(H.shape)}")
    for name, t in (("W", W), ("H", H)):
        bad = int((~torch.isfinite(t)).sum())
        if bad:
            raise ValueError(f"{name} holds {bad} NaN or Inf values of {t.numel()}: the layer or its calibration inputs "
                             f"overflowed; run the calibration in float32 or bfloat16")
    if bits not in (None, 2, 3, 4, 8):
        raise ValueError(f"bits={bits}: supported are 2, 3, 4 and 8")
    if blocksize < 1 or groupsize == 0 or groupsize < -1:
        raise ValueError(f"blocksize={blocksize} must be at least 1 and groupsize={groupsize} -1 (a whole row) or positive")


def inverse_factor(H: torch.Tensor, percdamp: float = 0.01) -> torch.Tensor:
    """U (in, in) upper triangular with (H + damping)^-1 = U^T U; damping = percdamp * mean(diag H), raised until it works.

    H = R R^T with R upper is Cholesky with rows and columns in reverse order, and U = R^-1: one factorization. Inputs that
    are always zero get a diagonal of 1. Share U between the Linears that share H."""
    H = H + torch.diag((H.diagonal() == 0).to(H.dtype))
    flipped, mean = H.flip(0, 1), H.diagonal().mean()
    eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
    for attempt in range(8):
        L, info = torch.linalg.cholesky_ex(flipped + percdamp * mean * eye)
        if int(info) == 0:
            return torch.linalg.solve_triangular(L, eye, upper=False).flip(0, 1)
        print(f"Cholesky failed at damping {percdamp:g}, trying {max(percdamp * 10, 1e-4):g}")
        percdamp = max(percdamp * 10, 1e-4)
    raise ValueError("H is not positive definite even with heavy damping: are the calibration inputs finite and real?")


def relative_error(W: torch.Tensor, V: torch.Tensor, H: torch.Tensor) -> float:
    """trace((W-V) H (W-V)^T) / trace(W H W^T)."""
    D = W - V
    return float(((D @ H) * D).sum() / ((W @ H) * W).sum().clamp(min=1e-30))


def sweep(W, U, blocksize, choose, inner: int = 16):
    """The column loop shared by GPTQ and SparseGPT: fixes W (out, in) from left to right, in place, and returns it.

    choose(j, W, width) is called before column j with all errors of columns < j applied to W[:, j:j+width] and returns
    their final values for one column, (out,). Errors travel in three strides (column, inner block, block), so that most
    of the work is done by large matrix products; the result is the same as updating everything after each column."""
    n = W.shape[1]
    E = torch.empty_like(W)                                                     # errors divided by U[j, j]
    for b in range(0, n, blocksize):
        end = min(b + blocksize, n)
        choose.block(W, b, end)
        for s in range(b, end, inner):
            stop = min(s + inner, end)
            for j in range(s, stop):
                choose.columns(W, j, stop)
                q = choose(W[:, j], j)
                E[:, j] = (W[:, j] - q) / U[j, j]
                W[:, j] = q
                W[:, j + 1:stop].addr_(E[:, j], U[j, j + 1:stop], alpha=-1)
            W[:, stop:end].addmm_(E[:, s:stop], U[s:stop, stop:end], alpha=-1)
        W[:, end:].addmm_(E[:, b:end], U[b:end, end:], alpha=-1)
    return W


class Rounder:
    """Chooses GPTQ's values: the nearest point of each column's grid. Grids are found when a group begins, or up front."""

    def __init__(self, W, bits, groupsize, sym, order=None, static_groups=False):
        self.bits, self.sym, self.n = bits, sym, W.shape[1]
        self.groupsize = self.n if groupsize == -1 else groupsize
        # group of each column in the order of the loop: static groups keep to neighbouring columns of the original
        place = torch.arange(self.n, device=W.device) if order is None or not static_groups else order
        self.group = (place // self.groupsize).tolist()
        self.codes, self.grids = torch.zeros(W.shape, dtype=torch.uint8, device=W.device), {}
        if bits and (self.groupsize >= self.n or static_groups):
            for g in range(max(self.group) + 1):
                self.grids[g] = find_grid(W[:, [j for j in range(self.n) if self.group[j] == g]], bits, sym)

    def block(self, W, start, end):
        pass

    def columns(self, W, j, stop):
        if self.bits and self.group[j] not in self.grids:
            self.grids[self.group[j]] = find_grid(W[:, j:j + self.groupsize], self.bits, self.sym)

    def __call__(self, w, j):
        scale, zero = (t[:, 0] for t in self.grids[self.group[j]])
        q = quantize(w, scale, zero, self.bits)
        self.codes[:, j] = q.to(torch.uint8)
        return scale * (q - zero)

    def tables(self):
        grids = [self.grids[g] for g in sorted(self.grids)]
        return torch.cat([s for s, _ in grids], 1).float(), torch.cat([z for _, z in grids], 1).float()


def gptq(W: torch.Tensor, H: torch.Tensor, bits: int, groupsize: int = -1, sym: bool = False, act_order: bool = False,
         static_groups: bool = False, percdamp: float = 0.01, blocksize: int = 128, U: torch.Tensor | None = None) -> Compressed:
    """Quantize W (out, in) to `bits` with the Hessian H (in, in); neither is changed. Work is done in W's precision, fp32 at least.

    groupsize: columns that share a grid, -1 for a whole row. act_order: columns in order of falling H diagonal; groups
    then follow that order (g_idx says which) unless static_groups keeps them to neighbours. U: inverse_factor(H) of the
    same H, percdamp and order, to share it between Linears. Raises ValueError for NaN, Inf or wrong shapes."""
    check(W, H, bits, blocksize, groupsize)
    order = torch.argsort(H.diagonal(), descending=True, stable=True) if act_order else None
    W0, H0 = W.to(torch.promote_types(W.dtype, torch.float32)), H.to(torch.promote_types(W.dtype, torch.float32))
    W, H = (W0.clone(), H0) if order is None else (W0[:, order], H0[order][:, order])
    W[:, H.diagonal() == 0] = 0                                # inputs that are always 0: any weight will do
    choose = Rounder(W, bits, groupsize, sym, order, static_groups)
    V = sweep(W, inverse_factor(H, percdamp) if U is None else U, blocksize, choose)
    codes, g_idx = choose.codes, torch.tensor(choose.group, device=W.device)
    if order is not None:
        back = torch.argsort(order)
        V, codes, g_idx = V[:, back], codes[:, back], g_idx[back]
    scale, zero = choose.tables()
    return Compressed(V, torch.zeros_like(V, dtype=torch.bool), codes, scale, zero, g_idx, relative_error(W0, V, H0))
