"""Decoding on a CPU in fp32: sparse 4-bit weights as one or two tables of small numbers, summed by torch's embedding bags.

An embedding bag adds up rows of a table, each times a number of its own: with W^T as the table and x as the numbers that
is y = W x. torch has bags over 4-bit and 2-bit tables (made for recommenders, JIT-compiled by FBGEMM) that take and give
fp32: 6.4 bits a weight where the dense matrix would take 32. In bf16 torch's int4 product is faster (cpu_int4.py). A
pruned weight must be exactly 0, which a grid without a level on zero does not offer; every grid splits into whole
numbers, pruned ones at 0:

    w = scale * (A + beta * T + gamma)      uniform   A = code - 8, where pruned z - 8    T = kept       z = zero rounded
                                                      beta = z - zero                     gamma = 8 - z
                                            offset    A = s k                             T = s = -1, +1, where pruned 0
                                                      beta = zero                         gamma = 0

    y = scale * (A x + beta * (T x) + gamma * sum x)        A: 4 bits, T: 2 bits; when all beta are 0 T is dropped

A bag wants short rows: the running sums of WIDTH outputs fit a CPU's vector registers. So W is cut into strips of WIDTH
outputs, each a table of its own below the one before, and each strip (and each group of columns) is a bag:

    row        strip * columns + column         bytes      WIDTH values, the first in the lowest bits; fp16 step, fp16 start
"""
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

from kernels.packing import Packed, groups_of
from kernels.unpacking import unpack_codes

WIDTH = 192                                                 # outputs of a strip: 96 to 256 are equally fast


def fits(meta: dict) -> bool:
    return meta["bits"] <= 4


def table(values: torch.Tensor, bits: int, start: int, width: int) -> torch.Tensor:
    """Whole numbers (out, in), 0 ... 2^bits - 1, that stand for value + start -> (strips * in, bytes) uint8."""
    rows, cols = values.shape
    n = torch.nn.functional.pad(values.to(torch.uint8), (0, 0, 0, -rows % width)).view(-1, width, cols)
    n = n.transpose(1, 2).reshape(-1, width * bits // 8, 8 // bits)                     # codes of one byte
    byte = n[:, :, 0].clone()
    for i in range(1, 8 // bits):
        byte |= n[:, :, i] << bits * i
    grid = torch.tensor([1.0, start], dtype=torch.float16).view(torch.uint8).expand(len(byte), 4)
    return torch.cat((byte, grid), 1)


@cache
def places(cols: int, strips: int, groups: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the table's rows, strip after strip, and where each bag begins. groups: the first column of each."""
    index = torch.arange(cols * strips, dtype=torch.int32)
    starts = torch.tensor(groups, dtype=torch.int32) + cols * torch.arange(strips, dtype=torch.int32)[:, None]
    return index, starts.flatten()


class Bags:
    """A packed weight in the form that decodes; x (..., in) in any dtype -> (..., out), computed in fp32."""
    most_tokens = 8                                         # each decodes anew: above, unpacking once is faster

    def __init__(self, packed: Packed):
        codes, mask = unpack_codes(packed)
        self.rows, self.cols = packed.meta["shape"]
        bits, per_row = packed.meta["bits"], packed.tensors["scale"].shape[1] == 1
        scale, zero = packed.tensors["scale"].float(), packed.tensors["zero"].float()
        group = torch.from_numpy(groups_of(self.cols, packed.meta["groupsize"], packed.tensors.get("g_idx")))
        self.order = None if bool((group.diff() >= 0).all()) else group.argsort(stable=True)
        codes = codes.to(torch.int8)
        keep = torch.ones_like(codes) if mask is None else (~mask).to(torch.int8)
        if packed.meta["grid"] == "offset":
            top = 1 << (bits - 1)
            T = torch.where(codes >= top, -keep, keep)
            A, start, beta, gamma = 8 + T * (codes & (top - 1)), -1, zero, None
            T = T + 1
        else:
            z = zero.round().clamp(0, 15)
            A = torch.where(keep.bool(), codes, (z if per_row else z[:, group]).to(torch.int8))
            T, start, beta, gamma = keep, 0, z - zero, 8 - z
        if self.order is not None:
            A, T = A[:, self.order], T[:, self.order]
        self.width = min(WIDTH, -(-self.rows // 8) * 8)
        self.tables = [table(A, 4, -8, self.width)]
        self.factors = [scale, None]                        # of the sums over A, T and x
        if bool((beta != 0).any()):
            self.tables.append(table(T, 2, start, self.width))
            self.factors[1] = scale * beta
        self.gamma = None if gamma is None or not bool((gamma != 0).any()) else scale * gamma
        sizes = torch.bincount(group, minlength=scale.shape[1])
        self.starts = tuple((sizes.cumsum(0) - sizes).tolist())
        self.factors = [f if f is None else self.by_strip(f) for f in self.factors]
        self.gamma = None if self.gamma is None else self.by_strip(self.gamma)

    def by_strip(self, factor: torch.Tensor) -> torch.Tensor:
        """(out, groups) -> (strips, groups, WIDTH), as bags give their sums."""
        padded = torch.nn.functional.pad(factor, (0, 0, 0, -self.rows % self.width))
        return padded.view(-1, self.width, factor.shape[1]).transpose(1, 2).contiguous()

    def nbytes(self) -> int:
        held = [*self.tables, *self.factors, self.gamma, self.order]
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, self.cols).float()
        if self.order is not None:
            flat = flat[:, self.order]
        parts = [self.one(row) for row in flat.contiguous()]
        y = parts[0] if len(parts) == 1 else torch.cat(parts)
        return y.to(x.dtype).view(*x.shape[:-1], self.rows)

    def one(self, x: torch.Tensor) -> torch.Tensor:
        """(in,) fp32 -> (out,) fp32."""
        scale, strips = self.factors[0], len(self.factors[0])
        index, starts = places(self.cols, strips, self.starts)
        x_of_row = x if strips == 1 else x.repeat(strips)
        if len(self.tables) == 2 and torch.get_num_threads() > 1:                       # a bag keeps to one thread
            other = thread().submit(bag2, self.tables[1], index, starts, False, 0, False, x_of_row)
        y = bag4(self.tables[0], index, starts, False, 0, False, x_of_row).view_as(scale).mul_(scale)
        if len(self.tables) == 2:
            if torch.get_num_threads() > 1:
                sums = other.result()
            else:
                sums = bag2(self.tables[1], index, starts, False, 0, False, x_of_row)
            y.addcmul_(sums.view_as(scale), self.factors[1])
        if self.gamma is not None:
            total = torch.stack([part.sum() for part in x.tensor_split(self.starts[1:])])
            y.addcmul_(total[None, :, None], self.gamma)
        return (y if len(self.starts) == 1 else y.sum(1)).flatten()[:self.rows]


bag2 = torch.ops.quantized.embedding_bag_2bit_rowwise_offsets.default
bag4 = torch.ops.quantized.embedding_bag_4bit_rowwise_offsets.default


@cache
def thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1)
