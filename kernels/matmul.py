"""Which kernel, which tiles: the host's side of the packed matrix products.

    y = matmul(x, packed)                                   # x (..., in) fp16 or bf16 -> (..., out)
    dx = matmul_transposed(dy, packed)                      # dy (..., out) -> (..., in)

Tile sizes stand in FORWARD and BACKWARD, one table per architecture. They were chosen by instruction counts of the
compiled kernels (compile.py), not by timing. One stage means no software pipelining: small programs, many per
multiprocessor, hide memory latency instead; pipelining costs registers and, on sm_90, repacks every decoded weight.
"""
from functools import cache
from typing import NamedTuple

import torch
import triton

from kernels.backward import backward_kernel
from kernels.decode import selector_table
from kernels.forward import forward_kernel, sum_splits
from kernels.packing import Packed


class Config(NamedTuple):
    tokens: int                         # the most tokens this configuration is used for
    planes: bool
    BM: int                             # tokens,
    BN: int                             # rows of W and
    BK: int                             # columns of W per tile
    warps: int
    stages: int


FORWARD = {
    80: (Config(8, True, 8, 32, 128, 2, 1), Config(16, True, 16, 32, 128, 2, 1), Config(32, True, 32, 32, 128, 2, 1),
         Config(64, False, 64, 64, 128, 4, 1), Config(1 << 30, False, 128, 64, 64, 4, 2)),
    90: (Config(8, True, 8, 32, 256, 2, 1), Config(16, True, 16, 32, 128, 2, 1), Config(32, True, 32, 32, 128, 2, 1),
         Config(64, False, 64, 64, 128, 4, 1), Config(1 << 30, False, 128, 128, 64, 8, 1)),
}
BACKWARD = {
    80: (Config(32, False, 32, 32, 128, 4, 1), Config(1 << 30, False, 64, 64, 128, 8, 1)),
    90: (Config(32, False, 32, 32, 128, 4, 1), Config(1 << 30, False, 128, 64, 128, 8, 1)),
}
PROGRAMS_PER_MULTIPROCESSOR = 16        # of two warps, for small batches; split-K makes as many
OFFSETS = 1 << 31                       # the kernels' offsets have 32 bits: larger activations go in parts


@cache
def device_facts(device: torch.device) -> tuple[int, int, torch.Tensor]:
    """-> row of the tables, number of multiprocessors, the selector table on that device."""
    if device.type != "cuda":                               # the interpreter
        return 80, 4, selector_table()
    major = torch.cuda.get_device_capability(device)[0]
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return (90 if major >= 9 else 80), multiprocessors, selector_table(device)


def choose(table: tuple[Config, ...], tokens: int, groupsize: int) -> Config:
    """The first configuration large enough; a tile must lie within one group."""
    config = next(c for c in table if tokens <= c.tokens)
    BK = config.BK
    while groupsize > 0 and groupsize % BK:
        BK //= 2
    return config._replace(BK=BK)


def pointers(packed: Packed, table: torch.Tensor) -> tuple[torch.Tensor, ...]:
    t = packed.tensors
    none = t["codes"]                                       # formats without a mask or starts never read them
    starts = t.get("row_start", none), t.get("tile_start", none)
    return t.get("mask", none), t["codes"], *starts, t["scale"], t["zero"], table


def matmul(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """y = x W^T in x's dtype, accumulated in fp32."""
    N, K = packed.meta["shape"]
    group = max(packed.meta["groupsize"], 0)
    flat = x.reshape(-1, K).contiguous()
    M = len(flat)
    if M * max(N, K) >= OFFSETS:
        return torch.cat([matmul(part, packed) for part in flat.split(M // 2)]).view(*x.shape[:-1], N)
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    if M == 0:
        return y.view(*x.shape[:-1], N)
    arch, multiprocessors, table = device_facts(x.device)
    c = choose(FORWARD[arch], M, group)
    programs, tiles = triton.cdiv(N, c.BN) * triton.cdiv(M, c.BM), triton.cdiv(K, c.BK)
    splits = min(tiles, max(1, multiprocessors * PROGRAMS_PER_MULTIPROCESSOR * 2 // c.warps // programs))
    share = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, share)
    out = y if splits == 1 else torch.empty(splits, M, N, dtype=torch.float32, device=x.device)
    forward_kernel[(triton.cdiv(N, c.BN), triton.cdiv(M, c.BM), splits)](
        flat, out, *pointers(packed, table), M, N, K, group, share, packed.meta["format"],
        packed.meta["grid"] == "offset", c.planes, c.BM, c.BN, c.BK, num_warps=c.warps, num_stages=c.stages)
    if splits > 1:
        sum_splits[(triton.cdiv(M * N, 256),)](out, y, M * N, splits, 256, num_warps=2)
    return y.view(*x.shape[:-1], N)


def matmul_transposed(dy: torch.Tensor, packed: Packed) -> torch.Tensor:
    """dx = dy W in dy's dtype, accumulated in fp32."""
    N, K = packed.meta["shape"]
    group = max(packed.meta["groupsize"], 0)
    flat = dy.reshape(-1, N).contiguous()
    M = len(flat)
    if M * max(N, K) >= OFFSETS:
        return torch.cat([matmul_transposed(part, packed) for part in flat.split(M // 2)]).view(*dy.shape[:-1], K)
    dx = torch.empty(M, K, dtype=dy.dtype, device=dy.device)
    if M:
        arch, _, table = device_facts(dy.device)
        c = choose(BACKWARD[arch], M, group)
        backward_kernel[(triton.cdiv(K, c.BK), triton.cdiv(M, c.BM))](
            flat, dx, *pointers(packed, table), M, N, K, group, packed.meta["format"], packed.meta["grid"] == "offset",
            c.BM, c.BN, c.BK, num_warps=c.warps, num_stages=c.stages)
    return dx.view(*dy.shape[:-1], K)
