"""Packed matrix products on a GPU: which kernel, how it is cut, and what is launched.

    plan = Plan(to_fragments(packed))                       # once for a layer
    y = matmul(x, plan)                                     # x (..., in) -> (..., out)
    dx = matmul_transposed(dy, plan)                        # dy (..., out) -> (..., in)

Three ways, each for what it is best at:

    up to 8 tokens      product.py, x times every plane of the codes: nothing but packed words is
                        read
    up to FUSED tokens  product.py, patterns become weights in registers, one product for every 8
                        tokens
    more, and backward  slab.py unpacks some rows (backward: columns) of W to x's dtype, cuBLAS
                        multiplies with them while they lie in the GPU's cache. So do fp32, and
                        groups that are no multiple of 128

What is launched for a layer and a number of tokens is decided once and kept in its Plan: no kernel
is compiled again for another length, and a CUDA graph may be recorded after one warm-up.
"""
from collections.abc import Iterator
from functools import cache

import torch

from kernels.fragments import Fragments, tiles_of
from kernels.product import product_kernel
from kernels.slab import slab_kernel

# the most tokens of product.py; timed on sm_90 alone
FUSED = {80: 64, 86: 64, 89: 64, 90: 64, 100: 64, 120: 64}
SLAB_BYTES = 45_000_000
SLAB_WARPS = 4                                              # a program of slab.py, a tile each
CHUNK = 15  # tiles of 128 columns that a warp adds up in one go
UNROLL = 3, 2, 1  # of three: a step's words go round in three sets of registers


@cache
def fused_tokens(device: torch.device) -> int:
    if device.type != "cuda":                               # the interpreter
        return 64
    major, minor = torch.cuda.get_device_capability(device)
    return FUSED.get(10 * major + minor, 64)


def weighs_in(dtype: torch.dtype, fragments: Fragments) -> bool:
    """Can planes.py make weights of patterns in this dtype?

    In fp16, if the weights over their scale stay within it when they are scaled: by 1024 (uniform),
    2048 (offset). In bf16, if a uniform grid's zeros are exact: rounded, they would move all
    weights of a row the same way, and such errors do not average out. An offset grid's zeros are
    small, and so is what rounding moves them by."""
    zero = fragments.tensors["zero"].float()
    if fragments.meta["grid"] == "offset":
        good = (2 * zero - 1).abs() < 31.9
    elif dtype == torch.float16:
        good = zero.abs() < 63.9
    else:
        good = zero == zero.bfloat16()
    return bool(good.all())


def warps_of(K: int, tokens: int) -> int:
    """Warps of a program, which share the columns: each should have about eight tiles or more."""
    return 8 if K > 8192 and tokens <= 32 else 4


def steps_of(K: int, tokens: int) -> int:
    """Tiles of 128 columns that a warp decodes."""
    return -(-K // (128 * warps_of(K, tokens)))


def strips_of(tokens: int) -> int:
    """Strips of 16 rows a program: two share x, but the sums of 64 tokens leave no room."""
    return 2 if 8 < tokens <= 32 else 1


def of_weight(meta: dict) -> dict:
    """The constants that tell both kernels what weight they read."""
    N, K = meta["shape"]
    return dict(N=N, K=K, GROUP=max(meta["groupsize"], 0), FORMAT=meta["format"],
                OFFSET=meta["grid"] == "offset")


def of_slab(meta: dict, eights: bool) -> dict:
    """The constants of slab_kernel; eights: it stores eight columns of 16 bits at a time."""
    return dict(**of_weight(meta), EIGHTS=eights, WARPS=SLAB_WARPS, num_warps=SLAB_WARPS)


def launch(meta: dict, tokens: int) -> tuple[tuple[int], dict]:
    """-> grid and constants of product_kernel for up to 8, 16, 32 or 64 tokens."""
    K = meta["shape"][1]
    warps, strips, unroll = warps_of(K, tokens), strips_of(tokens), 1
    if tokens == 8:                                         # a loop of one pass would spill
        unroll = next((n for n in UNROLL if 2 * n <= steps_of(K, tokens)), 1)
    constants = dict(**of_weight(meta), PLANES=tokens == 8, STRIPS=strips, TOKENS=tokens // 8,
                     WARPS=warps, CHUNK=CHUNK, UNROLL=unroll, num_warps=warps)
    return (-(-tiles_of(meta)[0] // strips),), constants


class Plan:
    """A weight on its GPU and what is launched for it; made at the first call and kept."""

    def __init__(self, fragments: Fragments):
        self.meta, t = fragments.meta, fragments.tensors
        none = t["codes"]  # what a format lacks its kernel never reads
        optional = (t.get(name, none) for name in ("start", "at"))
        self.pointers = t.get("mask", none), none, *optional, t["scale"], t["zero"]
        size = self.meta["groupsize"]
        whole = size == -1 or size % 128 == 0
        self.most = {}                                      # tokens for product.py, by dtype
        for dtype in (torch.float16, torch.bfloat16) if whole else ():
            most = fused_tokens(none.device) if weighs_in(dtype, fragments) else 8
            self.most[dtype] = most
        self.chosen = {}                                    # by bucket: what `launch` says
        self.compiled = {}                                  # by key: a kernel and its constants

    def multiply(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """y (M, N) = x (M, K) W^T for up to self.most[x.dtype] tokens, both contiguous."""
        M = len(x)
        bucket = max(8, 1 << (M - 1).bit_length())          # 8, 16, 32, 64
        if bucket not in self.chosen:
            self.chosen[bucket] = launch(self.meta, bucket)
        grid, constants = self.chosen[bucket]
        self.run((bucket, x.dtype), product_kernel, grid, (x, y, *self.pointers, M), constants)

    def unpack(self, dtype: torch.dtype, rows: tuple[int, int],
               columns: tuple[int, int]) -> torch.Tensor:
        """W[rows, columns]; both begin at whole tiles."""
        width = columns[1] - columns[0]
        out = torch.empty(rows[1] - rows[0], width, dtype=dtype, device=self.pointers[0].device)
        grid = (-(-out.shape[0] // 16), -(-width // (128 * SLAB_WARPS)))
        eights = dtype.itemsize == 2 and width % 8 == 0
        self.run((dtype, eights, width % 16), slab_kernel, grid,
                 (out, *self.pointers, rows[0] // 16, columns[0] // 128, width),
                 of_slab(self.meta, eights))
        return out

    def run(self, key: tuple, kernel, grid: tuple[int, ...], args: tuple, constants: dict) -> None:
        """kernel[grid](*args, **constants). Triton looks at every argument of such a call, which
        takes longer than many a product; what was compiled for this key is launched directly. A key
        tells all apart that Triton compiles for, but for addresses: they are multiples of 16."""
        if key in self.compiled:
            compiled, values = self.compiled[key]
            compiled[(*grid, 1, 1)[:3]](*args, *values)
            return
        compiled = kernel[grid](*args, **constants)
        if compiled is not None:                            # the interpreter compiles nothing
            values = [constants[name] for name in kernel.arg_names if name in constants]
            self.compiled[key] = compiled, values


def matmul(x: torch.Tensor, plan: Plan) -> torch.Tensor:
    """y = x W^T in x's dtype (fp16, bf16, fp32), accumulated in fp32."""
    N, K = plan.meta["shape"]
    flat = x.reshape(-1, K).contiguous()
    if flat.data_ptr() % 16:
        flat = flat.clone()                                 # the kernel reads 16 bytes at a time
    M = len(flat)
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    if 0 < M <= plan.most.get(x.dtype, 0):
        plan.multiply(flat, y)
    elif M:
        for a, b in slabs(N, K, x.dtype, 16):
            weight = plan.unpack(x.dtype, (a, b), (0, K))
            torch.mm(flat, weight.T, out=y[:, a:b])
            del weight                                      # the next slab takes its place
    return y.view(*x.shape[:-1], N)


def matmul_transposed(dy: torch.Tensor, plan: Plan) -> torch.Tensor:
    """dx = dy W in dy's dtype, accumulated in fp32."""
    N, K = plan.meta["shape"]
    flat = dy.reshape(-1, N).contiguous()
    dx = torch.empty(len(flat), K, dtype=dy.dtype, device=dy.device)
    if len(flat):
        for a, b in slabs(K, N, dy.dtype, 128):
            weight = plan.unpack(dy.dtype, (0, N), (a, b))
            torch.mm(flat, weight, out=dx[:, a:b])
            del weight
    return dx.view(*dy.shape[:-1], K)


def slabs(length: int, other: int, dtype: torch.dtype, unit: int) -> Iterator[tuple[int, int]]:
    """Cuts a side of W into parts (from, to) of about one size, multiples of unit, that with the
    `other` side take at most SLAB_BYTES in dtype."""
    step = max(unit, SLAB_BYTES // (other * dtype.itemsize) // unit * unit)
    parts = -(-length // step)
    step = -(-length // parts // unit) * unit
    for a in range(0, length, step):
        yield a, min(a + step, length)
