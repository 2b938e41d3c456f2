"""SparseGPT and GPTQ as their papers write them (2301.00774, 2210.17323), one column at a time: a
peer for the solvers.

Clear, not fast: thresholds by sorting, errors pushed on column by column inside a block, then once
behind it. Nothing of gptq.py or sparsegpt.py is used here; the tests pass our grids in, to compare
digit by digit.
"""
import torch


def minmax(W: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """scale and zero (rows,) of levels scale * (0 ... 2^bits - 1 - zero) that span each row of W
    (rows, n) and 0."""
    low = W.amin(1).clamp(max=0)
    high = W.amax(1).clamp(min=0)
    scale = (high - low) / (2 ** bits - 1)
    scale[scale == 0] = 1
    return scale, torch.round(-low / scale)


def naive_sparsegpt(W: torch.Tensor, H: torch.Tensor, sparsity: float | tuple[int, int],
                    bits: int | None, blocksize: int = 128, groupsize: int = -1,
                    order: torch.Tensor | None = None, find_grid=minmax, percdamp: float = 0.01):
    """W (rows, n) and H (n, n) -> (weights, mask True where pruned, codes), all (rows, n), columns
    in `order` if given.

    sparsity: a fraction of every block of columns, or (n, m), n kept of every m. Whole blocks hold
    whole groups of m. bits None: prune only, codes stay 0. find_grid(W of a group, bits) gives
    scale and zero (rows,)."""
    W, H = W.clone(), H.clone()
    rows, n = W.shape
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    W[:, dead] = 0
    if order is not None:
        W, H = W[:, order], H[order][:, order]
    H += percdamp * H.diagonal().mean() * torch.eye(n, dtype=H.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    U = torch.linalg.cholesky(inverse, upper=True)
    damage = 1 / U.diagonal()                       # (damage * change)² is what a change costs
    mask = torch.zeros_like(W, dtype=torch.bool)
    codes = torch.zeros_like(W)
    pattern = sparsity if isinstance(sparsity, tuple) else None
    width = n if groupsize == -1 else groupsize
    for b in range(0, n, blocksize):
        e = min(b + blocksize, n)
        errors = torch.zeros(rows, e - b, dtype=W.dtype)
        if not pattern:
            cost = (W[:, b:e] * damage[b:e]).square().flatten()
            count = round(sparsity * rows * e) - round(sparsity * rows * b)     # exact in the sum
            pruned = torch.zeros(cost.numel(), dtype=torch.bool)
            pruned[cost.argsort(stable=True)[:count]] = True
            mask[:, b:e] = pruned.view(rows, -1)
        for j in range(b, e):
            if bits and j % width == 0:
                scale, zero = find_grid(W[:, j:j + width], bits)
            if pattern and j % pattern[1] == 0:
                kept, of = pattern
                cost = (W[:, j:j + of] * damage[j:j + of]).square()
                mask[:, j:j + of].scatter_(1, cost.argsort(1)[:, :of - kept], True)
            w = W[:, j].clone()
            q = w.clone()
            if bits:
                code = (w / scale + zero).round().clamp(0, 2 ** bits - 1)
                codes[:, j] = code * ~mask[:, j]
                q = scale * (code - zero)
            q[mask[:, j]] = 0
            errors[:, j - b] = (w - q) * damage[j]
            W[:, j:e] -= torch.outer(errors[:, j - b], U[j, j:e])
            W[:, j] = q
        W[:, e:] -= errors @ U[b:e, e:]             # what the block owes to the columns behind it
    return W, mask, codes
