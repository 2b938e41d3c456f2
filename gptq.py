"""GPTQ: quantize one weight matrix column by column, letting the columns to come absorb each error
(arXiv 2210.17323).

A Linear maps inputs x to W x. With H = mean of x x^T over calibration inputs, changing W to V
costs, on average, the layer-wise objective

    error(V) = trace((W - V) H (W - V)^T).

Every row has the same H. Fix the columns one after the other. Once column j is rounded from w to q,
the best change of the columns still free, from Optimal Brain Surgeon, is (section 3.3)

    W[:, k] -= (w - q) / U[j, j] * U[j, k]   for k > j,   where H^-1 = U^T U, U upper triangular,

and it adds ((w - q) / U[j, j])^2 to the error. U is found once for all rows: the Cholesky trick of
section 3.3, step 3.

    import torch, torch.nn as nn
    from gptq import gptq, hessian
    layer, x = nn.Linear(64, 32), torch.randn(512, 64)
    out = gptq(layer.weight.data, hessian(x), bits=4)
    layer.weight.data.copy_(out.weight)     # out.codes, out.scale, out.zero store it in 4 bits

That is the paper's method. Beyond it: grids searched with the Hessian's diagonal as weights
("uniform"), grids without a level on zero, for weights whose zeros a mask stores ("offset"), a mask
held fixed, and `descend`, which goes over the codes again. This file needs only torch. Left out:
codebooks, and groups of unequal width.
"""
import math
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Compressed(NamedTuple):
    weight: torch.Tensor                # (out, in), dequantized, exact zeros where mask is True
    mask: torch.Tensor                  # (out, in) bool, True where pruned
    codes: torch.Tensor | None          # (out, in) uint8, 0 where pruned; None: not quantized
    scale: torch.Tensor | None          # (out, groups) float32 holding exact fp16 values
    zero: torch.Tensor | None           # (out, groups) likewise: see `nearest`
    g_idx: torch.Tensor | None          # (in,) group of each column
    error: float                        # of the output, relative: see `relative_error`
    grid: str = "uniform"               # how codes become weights: see `nearest`
    bits: int | None = None             # of a code; None when nothing was quantized


@torch.no_grad()
def hessian(x: torch.Tensor) -> torch.Tensor:
    """Mean of x x^T over all leading dimensions: (..., in) -> (in, in) float32. Of several batches,
    take the mean of their Hessians, weighted by their numbers of tokens."""
    x = x.reshape(-1, x.shape[-1]).float()
    if not len(x):
        raise ValueError("a Hessian needs calibration inputs: x holds none")
    return x.T @ x / len(x)


def fp16_exact(t: torch.Tensor) -> torch.Tensor:
    """The nearest value that fp16 holds, so that what is stored is what was used."""
    return t.half().to(t.dtype)


def nearest(w: torch.Tensor, scale, zero, bits: int, grid: str = "uniform") -> torch.Tensor:
    """w rounded to its grid: "uniform" scale * (code - zero), codes 0 ... 2^bits - 1; or "offset"
    +-scale * (k + zero), k = 0 ... 2^(bits-1) - 1: no level is spent on zero. There the code is k
    with the sign in its top bit (packed files number levels by size: kernels/packing.py), and zero
    is the smallest magnitude, in scales."""
    if grid == "offset":
        k = magnitude(w, scale, zero, bits)
        return torch.copysign((k + zero) * scale, w)
    return (quantize(w, scale, zero, bits) - zero) * scale


def magnitude(w: torch.Tensor, scale, zero, bits: int) -> torch.Tensor:
    """k of an offset grid, the code without its sign, as floats."""
    k = w.abs() / scale - zero
    return k.round_().clamp_(0, 2 ** (bits - 1) - 1)


def quantize(w: torch.Tensor, scale, zero, bits: int, grid: str = "uniform") -> torch.Tensor:
    """The codes of `nearest`, as floats."""
    if grid == "offset":
        sign_bit = 2 ** (bits - 1)
        return magnitude(w, scale, zero, bits) + sign_bit * torch.signbit(w)
    code = w / scale + zero
    return code.round_().clamp_(0, 2 ** bits - 1)


def encode(Vt, keep, scale, zero, g_idx, bits: int, grid: str = "uniform") -> torch.Tensor:
    """The codes (in, out) uint8 of dequantized weights Vt, 0 where keep, like Vt (in, out), is
    False; scale and zero are (groups, out), g_idx (in,) a column's group. Group by group, which
    saves memory."""
    codes = torch.zeros(Vt.shape, dtype=torch.uint8, device=Vt.device)
    for g in range(len(scale)):
        at = g_idx == g
        found = quantize(Vt[at], scale[g], zero[g], bits, grid)
        codes[at] = (found * keep[at]).to(torch.uint8)
    return codes


def find_grid(W: torch.Tensor, bits: int, sym: bool = False,
              shrink: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Min-max grid of each row of W (out, n): scale and zero, each (out, 1), levels
    scale * (0 ... 2^bits - 1  -  zero)."""
    levels = 2 ** bits - 1
    low = shrink * W.amin(1, keepdim=True).clamp(max=0)
    high = shrink * W.amax(1, keepdim=True).clamp(min=0)
    if sym:
        high = torch.maximum(-low, high)
        low = -high
    span = torch.where(high > low, high - low, torch.full_like(high, levels))   # an all-zero row
    scale = fp16_exact(span / levels).clamp(min=2 ** -24)           # fp16's smallest number
    if sym:
        return scale, torch.full_like(scale, (levels + 1) // 2)
    return scale, (-low / scale).round().clamp(0, levels)


def search_grid(W: torch.Tensor, keep: torch.Tensor, importance: torch.Tensor, bits: int,
                grid: str = "offset", sym: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The grid of each row of W (rows, n) with the least sum of importance * (w - q)^2 over its
    kept weights.

    keep (rows, n) bool; importance (rows or 1, n), the diagonal of H. "uniform": the min-max grid
    shrunk step by step. "offset": half-integer levels shrunk step by step, then scale and offset by
    least squares with the codes held, then the codes anew, four times (Lloyd's algorithm on a
    line). Returns scale and zero, each (rows, 1)."""
    weight = keep * importance
    # a row, or a group of one, may have only inputs that were never used: all count alike then
    weight = torch.where(weight.sum(1, keepdim=True) > 0, weight, keep)

    def better(best, scale, zero):
        """Row by row the better of best = (error, scale, zero), or None, and another grid."""
        squared = (nearest(W, scale, zero, bits, grid) - W).square_()
        error = (squared * weight).sum(1, keepdim=True)
        other = error, scale, zero
        if best is None:
            return other
        wins = error < best[0]
        return tuple(torch.where(wins, new, old) for new, old in zip(other, best))

    best = None
    if grid == "uniform":
        for shrink in torch.linspace(1.0, 0.5, 11).tolist():
            best = better(best, *find_grid(W * keep, bits, sym, shrink))
        return best[1:]
    a = (W * keep).abs()
    top = 2 ** (bits - 1) - 1
    largest = a.amax(1, keepdim=True)
    empty = largest == 0
    largest = torch.where(empty, torch.ones_like(largest), largest)
    for shrink in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        scale = fp16_exact(shrink * largest / (top + 0.5)).clamp(min=2 ** -24)
        best = better(best, scale, torch.full_like(scale, 0.5))
    _, scale, zero = best
    total = weight.sum(1, keepdim=True).clamp(min=1e-30)
    sum_a = (weight * a).sum(1, keepdim=True)
    for _ in range(4):
        k = (a / scale - zero).round_().clamp_(0, top)
        weighted = weight * k
        sum_k = weighted.sum(1, keepdim=True)
        sum_kk = (weighted * k).sum(1, keepdim=True)
        sum_ka = (weighted * a).sum(1, keepdim=True)
        spread = total * sum_kk - sum_k * sum_k
        slope = (total * sum_ka - sum_k * sum_a) / spread           # regression of |w| on k
        fits = (spread > 1e-6 * total * sum_kk) & (slope > 0)       # else all k are equal
        slope = torch.where(fits, slope, scale)
        offset = torch.where(fits, (sum_a - slope * sum_k) / total, scale * zero)
        scale = fp16_exact(slope).clamp(min=2 ** -24)
        zero = fp16_exact((offset / scale).clamp(0, 16))
        best = better(best, scale, zero)
    _, scale, zero = best
    # a row of zeros needs a level on zero after all
    return scale.masked_fill(empty, 2 ** -24), zero.masked_fill(empty, 0)


def check_blocks(groupsize: int, blocksize: int, m: int = 1) -> None:
    """ValueError where a group, whose grid is found when the sweep comes to it, does not fit
    together with blocks of columns, which hold whole groups of n:m, or with such a group."""
    blocksize = -(-blocksize // m) * m
    if groupsize % blocksize and blocksize % groupsize:
        raise ValueError(f"groupsize {groupsize} and blocksize {blocksize}: one must be a multiple "
                         f"of the other")
    if groupsize % m:
        raise ValueError(f"groupsize {groupsize} parts groups of {m} columns, n of which are kept: "
                         f"use a multiple of {m}")


def check(W: torch.Tensor, H: torch.Tensor, bits: int | None, blocksize: int,
          groupsize: int) -> None:
    """One clear ValueError for what no solver can work with."""
    if W.dim() != 2 or H.shape != (W.shape[1], W.shape[1]):
        raise ValueError(f"W {tuple(W.shape)} needs H of shape {(W.shape[-1],) * 2}, got "
                         f"{tuple(H.shape)}")
    for name, t in (("W", W), ("H", H)):
        total = t.sum(dtype=torch.float64)          # one number, no copies
        if not math.isfinite(total):
            bad = int((~torch.isfinite(t)).sum())
            raise ValueError(f"{name} holds {bad} NaN or Inf values of {t.numel()}: the layer or "
                             f"its calibration inputs overflowed; run the calibration in float32 "
                             f"or bfloat16")
    if bits not in (None, 2, 3, 4, 8):
        raise ValueError(f"bits={bits}: supported are 2, 3, 4 and 8")
    if blocksize < 1 or groupsize == 0 or groupsize < -1:
        raise ValueError(f"blocksize={blocksize} must be at least 1 and groupsize={groupsize} -1 "
                         f"(a whole row) or positive")


def inverse_factor(H: torch.Tensor, percdamp: float = 0.01,
                   order: torch.Tensor | None = None) -> torch.Tensor:
    """U (in, in) upper triangular with (H + damping)^-1 = U^T U; damping = percdamp * mean(diag H),
    raised until it works.

    H = R R^T with R upper is Cholesky with rows and columns in reverse order, and U = R^-1: one
    factorization. Inputs that are always zero get the mean of the others, so that they do not
    decide on the damping. order (in,): of the columns, first to last. Linears that share H can
    share U."""
    if order is None:
        order = torch.arange(len(H), device=H.device)
    back = order.flip(0)
    H = H[back[:, None], back]
    dead = H.diagonal() == 0
    mean = float(H.diagonal().mean()) * len(H) / max(1, int((~dead).sum())) or 1.0
    H.diagonal().masked_fill_(dead, mean)
    for _ in range(8):
        H.diagonal().add_(percdamp * mean)
        with one_thread():
            L, info = torch.linalg.cholesky_ex(H)
        if int(info) == 0:
            H.zero_().fill_diagonal_(1)             # room for L^-1: large ones count in memory
            torch.linalg.solve_triangular(L, H, upper=False, out=H)
            del L
            return H.flip(0, 1)
        print(f"Cholesky failed at damping {percdamp:g}, trying "
              f"{max(percdamp * 10, 1e-4):g}")
        H.diagonal().sub_(percdamp * mean)
        percdamp = max(percdamp * 10, 1e-4)
    raise ValueError("H is not positive definite even with heavy damping: are the calibration "
                     "inputs finite and real?")


@contextmanager
def one_thread():
    """On a CPU, one thread for what is inside: LAPACK's factors differ in their last bits from one
    number of threads to another, as products do not, and every choice made with them follows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


LEAF = 512                              # columns of a matrix that is not halved any more


def invert_(M: torch.Tensor) -> torch.Tensor:
    """The inverse of a symmetric positive definite M = L L^T (n, n), in its place: L^-T L^-1.
    ValueError if it is not positive definite."""
    try:
        if len(M) <= LEAF:
            with one_thread():
                return M.copy_(torch.cholesky_inverse(torch.linalg.cholesky(M)))
        return square_(invert_factor_(M))
    except torch.linalg.LinAlgError:
        raise ValueError("H is not positive definite in spite of its damping: sum it up in "
                         "float32") from None


def invert_factor_(M: torch.Tensor) -> torch.Tensor:
    """L^-1, lower triangular, in the place of M = L L^T: by halves, so that most of the work is
    products, which use all threads. (Halves of M^-1 itself would lose the digits that M's condition
    costs once more with every halving.)

        [A B^T]^-1/2   [      P        0]
        [B  C ]      = [-Q (B P^T) P   Q]       P of A,   Q of C - (B P^T) (B P^T)^T
    """
    n = len(M)
    if n <= LEAF:
        with one_thread():
            L = torch.linalg.cholesky(M)
            return torch.linalg.solve_triangular(L, M.zero_().fill_diagonal_(1), upper=False, out=M)
    A, B, C = halves(M)
    P = invert_factor_(A)
    X = B @ P.T
    Q = invert_factor_(C.addmm_(X, X.T, alpha=-1))
    torch.mm(Q, X @ P, out=B).neg_()
    M[:n // 2, n // 2:] = 0
    return M


def square_(L: torch.Tensor) -> torch.Tensor:
    """L^T L, whole, in the place of a lower triangular L (n, n), by halves."""
    n = len(L)
    if n <= LEAF:
        return L.copy_(L.T @ L)
    A, B, C = halves(L)
    square_(A).addmm_(B.T, B)
    B.copy_(C.T @ B)
    square_(C)
    L[:n // 2, n // 2:] = B.T
    return L


def halves(M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Upper left, lower left and lower right of M (n, n)."""
    k = len(M) // 2
    return M[:k, :k], M[k:, :k], M[k:, k:]


def quick_dtype(like: torch.Tensor) -> torch.dtype:
    """What products that stand noise are fastest in: bfloat16, or like's dtype on a CPU without
    instructions for it, where bfloat16 is 10 to 100 times slower."""
    has = torch.cpu.get_capabilities()
    # Apple's have bf16, but torch has no products for it there
    on_arm = has.get("bf16") and torch.backends.mkldnn.is_available()
    fast = has.get("amx_bf16") or has.get("avx512_bf16") or on_arm
    return torch.bfloat16 if fast or like.device.type != "cpu" else like.dtype


def relative_error(W: torch.Tensor, V: torch.Tensor, H: torch.Tensor) -> float:
    """trace((W-V) H (W-V)^T) / trace(W H W^T)."""
    D = W - V
    lost = ((D @ H) * D).sum(1).sum()               # row by row: the same on any number of threads
    whole = ((W @ H) * W).sum(1).sum()
    return float(lost / whole.clamp(min=1e-30))


def sweep(Wt: torch.Tensor, U: torch.Tensor, blocksize: int, choose,
          inner: int = 16) -> torch.Tensor:
    """The column loop of GPTQ, SparseGPT and `descend`: fixes W from left to right, in place. Wt
    (in, out) is W transposed, so that a column lies in one piece.

    choose(Wt, j) returns the final values of column j and a factor e, each (out,); then
    Wt[k] -= e * U[j, k] for all k > j. For GPTQ that is e = (w - q) / U[j, j].

    When it is called, Wt[j] has had the updates of all earlier columns. Where j begins an inner
    block, so have all columns up to the block's end: there a group's grid may be found.

    Updates travel in three strides (column, inner block, block), so that most of the work is done
    by few large products; nothing in the loop waits for the device."""
    n = len(Wt)
    E = Wt.new_empty(min(blocksize, n), Wt.shape[1])
    for b in range(0, n, blocksize):
        end = min(b + blocksize, n)
        for s in range(b, end, inner):
            stop = min(s + inner, end)
            for j in range(s, stop):
                Wt[j], e = choose(Wt, j)
                E[j - b] = e
                Wt[j + 1:stop].addr_(U[j, j + 1:stop], e, alpha=-1)
            inner_errors = E[s - b:stop - b]
            Wt[stop:end].addmm_(U[s:stop, stop:end].T, inner_errors, alpha=-1)
        block_errors = E[:end - b]
        Wt[end:].addmm_(U[b:end, end:].T, block_errors, alpha=-1)
    return Wt


class Rounder:
    """Chooses GPTQ's values in `sweep`: the nearest point of each column's grid, or 0 where the
    mask says so.

    grids: scale and zero, each (groups, out), or None to find min-max grids when a group of columns
    begins."""

    def __init__(self, U, group: list[int], grids, bits, grid="uniform", sym=False, keep=None):
        self.bits, self.grid, self.sym = bits, grid, sym
        self.group = group                          # of every column
        self.keep = keep                            # (in, out) bool, or None: all are kept
        self.inverse_pivot = 1 / U.diagonal()       # (in,)
        self.dynamic = grids is None
        self.scale, self.zero = ([], []) if self.dynamic else grids

    def __call__(self, Wt, j):
        g = self.group[j]
        if self.dynamic and g == len(self.scale):
            columns = Wt[j:j + self.group.count(g)]
            scale, zero = find_grid(columns.T, self.bits, self.sym)
            self.scale.append(scale[:, 0])
            self.zero.append(zero[:, 0])
        w = Wt[j]
        q = nearest(w, self.scale[g], self.zero[g], self.bits, self.grid)
        if self.keep is not None:
            q = q * self.keep[j]
        return q, (w - q) * self.inverse_pivot[j]

    def tables(self):
        """scale and zero, each (groups, out)."""
        return torch.stack(list(self.scale)), torch.stack(list(self.zero))


def column_order(H: torch.Tensor, act_order: bool) -> torch.Tensor:
    """The columns (in,) in the order of the loop: as they are, or by falling H diagonal."""
    if act_order:
        return torch.argsort(H.diagonal(), descending=True, stable=True)
    return torch.arange(len(H), device=H.device)


def column_groups(n: int, groupsize: int, order: torch.Tensor | None = None) -> list[int]:
    """Group of every column in the order of the loop; with `order`, groups are neighbours of the
    original matrix."""
    place = torch.arange(n) if order is None else order.cpu()
    return (place // (n if groupsize == -1 else groupsize)).tolist()


def static_grids(W, H, keep, bits, groupsize, grid, sym):
    """scale and zero, each (groups, out), of every row and group of neighbouring columns of W
    (out, in), up front."""
    rows, n = W.shape
    size = n if groupsize == -1 else groupsize
    scale = W.new_empty(rows, -(-n // size))
    zero = torch.empty_like(scale)

    def grouped(t):
        """(rows, in) -> (rows * groups, size), a last group filled up with zeros."""
        return F.pad(t, (0, -n % size)).reshape(-1, size)

    # a search holds many copies: a few rows at a time
    step = max(1, 2 ** 20 // n)
    for r in range(0, rows, step):
        part = W[r:r + step]
        if grid == "minmax":
            found = find_grid(grouped(part), bits, sym)
        else:
            importance = grouped(H.diagonal().expand(len(part), n))
            kept = grouped(keep[r:r + step])
            found = search_grid(grouped(part), kept, importance, bits, grid, sym)
        scale[r:r + step] = found[0].view(len(part), -1)
        zero[r:r + step] = found[1].view(len(part), -1)
    return scale.T.contiguous(), zero.T.contiguous()


@torch.no_grad()
def gptq(W: torch.Tensor, H: torch.Tensor, bits: int, groupsize: int = -1, sym: bool = False,
         act_order: bool = False, static_groups: bool = False, percdamp: float = 0.01,
         blocksize: int = 128, U: torch.Tensor | None = None, grid: str = "minmax",
         mask: torch.Tensor | None = None, descent: int = 0,
         target: torch.Tensor | None = None) -> Compressed:
    """Quantize W (out, in) to `bits` with the Hessian H (in, in); neither is changed. Work is in
    W's precision, fp32 at least.

    groupsize: columns that share a grid, -1 for a whole row. act_order: columns in order of falling
    H diagonal; groups then follow that order (g_idx says which) unless static_groups keeps them to
    neighbours. U: inverse_factor of the same H, percdamp and order, to share it. grid: "minmax"
    (the paper's), or "uniform" / "offset", searched; sym: symmetric around zero, as offset grids
    always are. mask (out, in): True stays zero. descent: passes of `descend` afterwards. target
    (out, in): the weights that errors are measured from and descent aims at, where W itself is an
    approximation. Raises ValueError for NaN, Inf or wrong shapes."""
    check(W, H, bits, blocksize, groupsize)
    if grid not in ("minmax", "uniform", "offset"):
        raise ValueError(f"grid={grid!r}: known are minmax, uniform and offset")
    n = W.shape[1]
    dtype = torch.promote_types(W.dtype, torch.float32)
    static = groupsize == -1 or static_groups or grid != "minmax"
    if not static:
        check_blocks(groupsize, blocksize)
    W, H = W.to(dtype), H.to(dtype)
    target = W if target is None else target.to(dtype)
    dead = H.diagonal() == 0                        # inputs that are always 0: any weight will do
    keep = torch.ones_like(W, dtype=torch.bool) if mask is None else ~mask
    # the paper makes such weights 0; searched grids round them, as another text may use them
    start = W.masked_fill(~keep | dead if grid == "minmax" else ~keep, 0)
    order = column_order(H, act_order)
    group = column_groups(n, groupsize, order if static else None)
    U = inverse_factor(H, percdamp, order) if U is None else U
    kind = "uniform" if grid == "minmax" else grid
    grids = static_grids(start, H, keep, bits, groupsize, grid, sym) if static else None
    kept = None if mask is None else keep.T[order]
    choose = Rounder(U, group, grids, bits, kind, sym, kept)
    Wt = start.T[order]
    del start
    V = torch.empty_like(Wt)
    inner = 16 if static else math.gcd(16, groupsize)           # no grid begins within one
    V[order] = sweep(Wt, U, blocksize, choose, inner)
    scale, zero = choose.tables()
    del U, Wt, choose
    g_idx = torch.empty(n, dtype=torch.long, device=W.device)
    g_idx[order] = torch.tensor(group, device=W.device)
    if descent:
        V = descend(V, target.T, H, keep.T, scale, zero, g_idx, bits, kind, descent, percdamp,
                    blocksize)
    codes = encode(V, keep.T, scale, zero, g_idx, bits, kind).T.contiguous()
    return Compressed(V.T.contiguous(), ~keep if mask is None else mask, codes,
                      scale.T.float().contiguous(), zero.T.float().contiguous(), g_idx,
                      relative_error(target, V.T, H), kind, bits)


def descend(Vt, Wt, H, keep, scale, zero, g_idx, bits: int, grid: str, passes: int,
            percdamp: float = 0.01, blocksize: int = 128) -> torch.Tensor:
    """Coordinate descent on the codes: column after column moves to the grid point that is best
    with all others held,

        v_j <- nearest(v_j - g_j / H[j, j]),   g = (V - W) H,

    which can only lower the error, now of the kept weights alone; H is damped by a share of its own
    diagonal, as in sparsegpt.refit. With T = V - g / diag(H), moving column j by e moves T[:, k] by
    -e H[j, k] / H[k, k]: the same loop as GPTQ's. Vt, Wt, keep are (in, out), scale and zero
    (groups, out), g_idx (in,) says which of them is a column's; returns the new Vt."""
    h = H.diagonal() * (1 + percdamp)
    h = torch.where(h > 0, h, torch.ones_like(h))
    moves = H / h                                   # moves[j, k] = H[j, k] / H[k, k]
    keep = keep.contiguous()
    group = g_idx.tolist()
    for _ in range(passes):
        old = Vt

        def choose(T, j):
            g = group[j]
            q = nearest(T[j], scale[g], zero[g], bits, grid) * keep[j]
            return q, q - old[j]

        D = Vt - Wt
        T = H @ D
        T.add_(D.mul_(percdamp * H.diagonal()[:, None]))
        T.div_(h[:, None])                          # now g / diag(H)
        del D
        Vt = sweep(torch.sub(old, T, out=T), moves, blocksize, choose)
    return Vt
