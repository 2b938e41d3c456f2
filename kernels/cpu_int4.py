"""Decoding on a CPU: sparse 4-bit weights as one or two dense int4 matrices for torch's own int4 x
bf16 product.

torch's product knows w = scale * (q - 8) + shift, q in 0..15. A pruned weight must be exactly 0 in
it, which a grid without a level on zero does not offer. Every grid splits into two matrices of
whole numbers, both exact:

    w = scale * (A - z + beta * T)      uniform   A = code, where pruned z    T = 1, where pruned 0
                                                  z = zero rounded            beta = z - zero
                                        grouped   A = code + c, where pruned 8
                                                  z = 8                       beta = 8 - c - zero
                                                  c = 8 - zero rounded, as far as A <= 15 allows
                                        offset    A = 8 + s k                 T = s
                                                  z = 8                       beta = zero
                                                  s = -1 or +1, where pruned 0

    y = scale * (A - z) x + scale * beta * T x

When all beta are 0 (the plain GPTQ grid) T is dropped. Scales multiply the outputs in fp32, so that
only the two products of whole numbers are rounded to bf16; grouped scales must go into the product
and are rounded to bf16 like a bf16 weight would be. There c makes beta small: two large sums, each
rounded to bf16, would not cancel. Codes of 4 bits leave no room for it, and inputs that are far
from 0 on average cost such grids four times what bf16 costs F.linear. Extra memory: 4 bits per
weight and matrix. Speed against bf16 F.linear: bench/kernels.py.
"""
import torch

from kernels.packing import Packed, groups_of
from kernels.unpacking import unpack_codes

MOST_TOKENS = 64                       # above, unpacking and one bf16 product are faster
SIZES = (256, 128, 64, 32)             # columns that torch's product may give a scale of their own


def fits(meta: dict) -> bool:
    """Does torch's product take a weight of this shape and grid?"""
    (rows, cols), size = meta["shape"], meta["groupsize"]
    in_groups = size == -1 or size in SIZES and cols % size == 0
    return meta["bits"] <= 4 and rows % 16 == 0 and cols % 32 == 0 and in_groups


def whole_numbers(packed: Packed, round_zero: bool,
                  dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """(A, T (out, in) in dtype, z, beta (out, groups) fp32), see above, of codes of 4 bits or less.
    round_zero False: as where a uniform grid is grouped."""
    codes, mask = unpack_codes(packed)
    codes = codes.to(dtype)
    keep = torch.ones_like(codes) if mask is None else (~mask).to(dtype)
    zero = packed.tensors["zero"].float()
    eight = torch.full_like(zero, 8)
    if packed.meta["grid"] == "offset":
        top = 1 << (packed.meta["bits"] - 1)                        # the sign of a code
        sign = torch.where(codes >= top, -keep, keep)
        return 8 + sign * (codes & (top - 1)), sign, eight, zero
    z = zero.round().clamp(0, 15)
    c = torch.zeros_like(z)
    if not round_zero:
        c = (8 - z).clamp(0, 16 - (1 << packed.meta["bits"]))
        z = eight

    def of_columns(t: torch.Tensor) -> torch.Tensor:
        """(out, groups) -> (out, in) or, of one group, (out, 1)."""
        if t.shape[1] > 1:
            group = groups_of(codes.shape[1], packed.meta["groupsize"], packed.tensors.get("g_idx"))
            t = t[:, torch.from_numpy(group)]
        return t.to(dtype)

    A = torch.where(keep.bool(), codes + of_columns(c), of_columns(z))
    return A, keep, z, z - c - zero


class Int4:
    """A packed weight in the form that decodes; x (..., in) bf16 -> (..., out) bf16.

    words: A above T (or A alone) in torch's layout
    grid: its scales and shifts (groups, rows, 2) bf16
    outer: fp32 factors (1 or 2, out) of the sums over A and T; None: they are in the grid
    most_tokens: where unpacking becomes faster
    """
    most_tokens = MOST_TOKENS

    def __init__(self, packed: Packed):
        self.rows, cols = packed.meta["shape"]
        scale = packed.tensors["scale"].float()
        per_row = scale.shape[1] == 1
        # a z that is not 8 makes a shift, and in bf16 groups that would miss 0
        A, T, z, beta = whole_numbers(packed, per_row, torch.int32)
        parts = 2 if bool((beta != 0).any()) else 1
        factor = torch.cat((scale, scale * beta))               # (A's rows and T's, groups)
        shift = torch.cat((8 - z, torch.zeros_like(z)))         # torch's q - 8 is A - 8, and T
        if per_row:
            self.outer = factor.view(2, self.rows)[:parts]
            self.size = next(size for size in SIZES if cols % size == 0)
            factor = torch.ones_like(factor)
        else:
            self.outer = None
            self.size = packed.meta["groupsize"]
        grid = torch.stack((factor, shift), 2)[:parts * self.rows]
        grid = grid.expand(-1, cols // self.size, 2)            # a row's grid in all its groups
        self.grid = grid.transpose(0, 1).bfloat16().contiguous()
        codes = torch.cat((A, 8 + T))[:parts * self.rows].contiguous()
        self.words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        self.most_tokens = MOST_TOKENS // parts

    def nbytes(self) -> int:
        held = (self.words, self.grid, self.outer)
        return sum(t.nbytes for t in held if t is not None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.words, self.size, self.grid)
        y = y.view(len(y), -1, self.rows)                       # (tokens, A and T, out)
        if self.outer is not None:
            y = y * self.outer
        if self.outer is not None or y.shape[1] == 2:
            y = y.sum(1, dtype=torch.float32).to(x.dtype)
        return y.view(*x.shape[:-1], self.rows)
