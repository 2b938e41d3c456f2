"""Decoding on a CPU in fp32: sparse 4-bit weights as one or two tables of small numbers, summed by
torch's embedding bags.

An embedding bag adds up rows of a table, each times a number of its own: with W^T as the table and
x as the numbers that is y = W x. torch has bags over 4-bit and 2-bit tables (made for recommenders,
JIT-compiled by FBGEMM) that take and give fp32: 6.4 bits a weight where the dense matrix would take
32. In bf16 torch's int4 product is faster (cpu_int4.py). A pruned weight must be exactly 0, which a
grid without a level on zero does not offer; every grid splits into whole numbers A and T as there:

    w = scale * (A - 8 + beta * T + gamma)                      gamma = 8 - z
    y = scale * ((A - 8) x + beta * (T x) + gamma * sum x)      A: 4 bits, T: 2 bits

When all beta are 0 T is dropped, when all gamma are 0 the last sum.

A bag wants short rows: the running sums of WIDTH outputs fit a CPU's vector registers. So W is cut
into strips of WIDTH outputs, each a table of its own below the one before, and each strip (and each
group of columns) is a bag:

    row        strip * columns + column
    bytes      WIDTH values, the first in the lowest bits; fp16 step, fp16 start
"""
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
import torch.nn.functional as F

from kernels.cpu_int4 import whole_numbers
from kernels.packing import Packed, groups_of

WIDTH = 192                            # outputs of a strip: 96 to 256 are equally fast
bag2 = torch.ops.quantized.embedding_bag_2bit_rowwise_offsets.default
bag4 = torch.ops.quantized.embedding_bag_4bit_rowwise_offsets.default


def fits(meta: dict) -> bool:
    return meta["bits"] <= 4


def table(values: torch.Tensor, bits: int, start: int, width: int) -> torch.Tensor:
    """Whole numbers (out, in), 0 ... 2^bits - 1, that stand for value + start -> (strips * in,
    bytes) uint8."""
    rows, cols = values.shape
    per_byte = 8 // bits
    n = F.pad(values.to(torch.uint8), (0, 0, 0, -rows % width))
    n = n.view(-1, width, cols).transpose(1, 2)                     # (strips, in, width)
    n = n.reshape(-1, width // per_byte, per_byte)                  # (strips * in, bytes, a byte's)
    byte = n[:, :, 0].clone()
    for i in range(1, per_byte):
        byte |= n[:, :, i] << bits * i
    step_and_start = torch.tensor([1.0, start], dtype=torch.float16).view(torch.uint8)
    return torch.cat((byte, step_and_start.expand(len(byte), 4)), 1)


@cache
def places(cols: int, strips: int, groups: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """(indices of the table's rows (strips * cols,), strip after strip; where each bag begins in
    them (strips * groups,)), int32. groups: the first column of each."""
    index = torch.arange(cols * strips, dtype=torch.int32)
    first = cols * torch.arange(strips, dtype=torch.int32)
    starts = first[:, None] + torch.tensor(groups, dtype=torch.int32)
    return index, starts.flatten()


class Bags:
    """A packed weight in the form that decodes; x (..., in) in any dtype -> (..., out), computed in
    fp32.

    order: (in,) that brings the columns of a group together; None: they are
    starts: first column of each group
    tables: of A, and of T unless all beta are 0
    scale, scale_beta, scale_gamma: (strips, groups, WIDTH) factors of the sums over A, T and x;
        None where all are 0
    """
    most_tokens = 8                    # each decodes anew: above, unpacking once is faster

    def __init__(self, packed: Packed):
        self.rows, self.cols = packed.meta["shape"]
        self.width = min(WIDTH, -(-self.rows // 8) * 8)
        A, T, z, beta = whole_numbers(packed, True, torch.int8)
        start = 0                                               # of T's values
        if packed.meta["grid"] == "offset":                     # -1 to 1 there
            T = T + 1
            start = -1
        g_idx = packed.tensors.get("g_idx")
        group = torch.from_numpy(groups_of(self.cols, packed.meta["groupsize"], g_idx))
        self.order = None
        if not bool((group.diff() >= 0).all()):
            self.order = group.argsort(stable=True)
            A, T = A[:, self.order], T[:, self.order]
        scale = packed.tensors["scale"].float()
        sizes = torch.bincount(group, minlength=scale.shape[1])
        self.starts = tuple((sizes.cumsum(0) - sizes).tolist())
        self.tables = [table(A, 4, -8, self.width)]
        self.scale = self.by_strip(scale)
        self.scale_beta = None
        if bool((beta != 0).any()):
            self.tables.append(table(T, 2, start, self.width))
            self.scale_beta = self.by_strip(scale * beta)
        self.scale_gamma = None
        if bool((z != 8).any()):
            self.scale_gamma = self.by_strip(scale * (8 - z))

    def by_strip(self, factor: torch.Tensor) -> torch.Tensor:
        """(out, groups) -> (strips, groups, WIDTH), as bags give their sums."""
        padded = F.pad(factor, (0, 0, 0, -self.rows % self.width))
        strips = padded.view(-1, self.width, factor.shape[1])
        return strips.transpose(1, 2).contiguous()

    def nbytes(self) -> int:
        held = [*self.tables, self.scale, self.scale_beta, self.scale_gamma, self.order]
        return sum(t.nbytes for t in held if t is not None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, self.cols).float()
        if self.order is not None:
            flat = flat[:, self.order]
        parts = [self.one(row) for row in flat.contiguous()]
        y = parts[0] if len(parts) == 1 else torch.cat(parts)
        return y.to(x.dtype).view(*x.shape[:-1], self.rows)

    def one(self, x: torch.Tensor) -> torch.Tensor:
        """(in,) fp32 -> (out,) fp32."""
        strips = len(self.scale)
        index, starts = places(self.cols, strips, self.starts)
        x_of_row = x if strips == 1 else x.repeat(strips)

        def sums(bag, table: torch.Tensor) -> torch.Tensor:
            """(strips, groups, WIDTH): the table's rows times x, added up."""
            return bag(table, index, starts, False, 0, False, x_of_row).view_as(self.scale)

        in_parallel = len(self.tables) == 2 and torch.get_num_threads() > 1
        if in_parallel:                                         # a bag keeps to one thread
            later = thread().submit(sums, bag2, self.tables[1])
        y = sums(bag4, self.tables[0]).mul_(self.scale)
        if self.scale_beta is not None:
            over_T = later.result() if in_parallel else sums(bag2, self.tables[1])
            y.addcmul_(over_T, self.scale_beta)
        if self.scale_gamma is not None:
            total = torch.stack([part.sum() for part in x.tensor_split(self.starts[1:])])
            y.addcmul_(total[None, :, None], self.scale_gamma)
        y = y.sum(1) if len(self.starts) > 1 else y             # over the groups
        return y.flatten()[:self.rows]


@cache
def thread() -> ThreadPoolExecutor:
    """The thread that computes the second table's sums."""
    return ThreadPoolExecutor(1)
