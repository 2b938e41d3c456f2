"""Decoding on a CPU: sparse 4-bit weights as one or two dense int4 matrices for torch's own int4 x bf16 product.

torch's product knows w = scale * (q - 8) + shift, q in 0..15. A pruned weight must be exactly 0 in it, which a grid
without a level on zero does not offer. Every grid splits into two integer matrices, both exact, with pruned entries
at 0:

    w = scale * (A + beta * T)      uniform   A = code - z    T = 1     beta = z - zero     z = zero rounded
                                    offset    A = s * k       T = s     beta = zero         s = -1, +1

    y = scale * (A x) + scale * beta * (T x)

When all beta are 0 (the plain GPTQ grid) T is dropped. Scales multiply the outputs in fp32, so that only the two
integer products are rounded to bf16; grouped scales must go into the product and are rounded to bf16 like a bf16
weight would be. Extra memory: 4 bits per weight and matrix. Speed against bf16 F.linear: bench/kernels.py.
"""
import torch

from kernels.packing import Packed
from kernels.unpacking import unpack_codes

MOST_TOKENS = 64                                            # above, unpacking and one bf16 product are faster


def fits(meta: dict) -> bool:
    (rows, cols), size = meta["shape"], meta["groupsize"]
    groups = size == -1 or size in (32, 64, 128, 256) and cols % size == 0
    return meta["bits"] <= 4 and rows % 16 == 0 and cols % 32 == 0 and groups


class Int4:
    """words: A above T (or A alone) in torch's layout; grid: its (groups, rows, 2) scales and shifts; outer: fp32
    factors."""
    most_tokens = MOST_TOKENS

    def __init__(self, packed: Packed):
        codes, mask = unpack_codes(packed)
        codes, bits = codes.int(), packed.meta["bits"]
        self.rows, cols = packed.meta["shape"]
        scale, zero = packed.tensors["scale"].float(), packed.tensors["zero"].float()
        keep = torch.ones_like(codes) if mask is None else (~mask).int()
        per_row = scale.shape[1] == 1
        if packed.meta["grid"] == "offset":
            top = 1 << (bits - 1)
            sign = torch.where(codes >= top, -keep, keep)
            A, T, z, beta = 8 + sign * (codes & (top - 1)), 8 + sign, torch.full_like(zero, 8), zero
        else:
            z = zero.round().clamp(0, 15) if per_row else torch.full_like(zero, 8)      # a rounded shift would miss 0
            A, T, beta = torch.where(keep.bool(), codes, z.int() if per_row else 8), 8 + keep, z - zero
        parts = 2 if bool((beta != 0).any()) else 1
        factor, shift = torch.cat((scale, scale * beta)), torch.cat((8 - z, torch.zeros_like(z)))
        self.outer = factor.view(2, self.rows)[:parts] if per_row else None
        self.size = next(s for s in (256, 128, 64, 32) if cols % s == 0) if per_row else packed.meta["groupsize"]
        grid = torch.stack((torch.ones_like(factor) if per_row else factor, shift), 2)[:parts * self.rows]
        self.grid = grid.expand(-1, cols // self.size, 2).transpose(0, 1).bfloat16().contiguous()
        codes = torch.cat((A, T))[:parts * self.rows].contiguous()
        self.words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        self.most_tokens = MOST_TOKENS // parts

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.words, self.grid, self.outer) if t is not None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.words, self.size, self.grid)
        if y.shape[1] > self.rows or self.outer is not None:
            y = y.view(len(y), -1, self.rows)                                           # (tokens, A and T, out)
            y = (y if self.outer is None else y * self.outer).sum(1, dtype=torch.float32).to(x.dtype)
        return y.view(*x.shape[:-1], self.rows)
