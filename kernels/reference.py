"""The packed formats in a few torch operations, on any device: what the kernels must equal, and what a
GPU runs where they do not fit (`triton_reads` in linear.py).

    weight = dequantize(packed, torch.float16)              # (out, in) where packed's tensors are
    y = x @ weight.T;  dx = dy @ weight                     # what matmul.py computes without the weight in memory

unpacking.py does the same several times faster on a CPU.
"""
import torch

from kernels.packing import Packed


def bit_matrix(mask: torch.Tensor, cols: int) -> torch.Tensor:
    """Bitmap words (out, words) int32 -> (out, cols) bool, True where kept."""
    bits = mask[:, :, None] >> torch.arange(32, device=mask.device, dtype=torch.int32) & 1
    return bits.flatten(1)[:, :cols].bool()


def each_code(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 words or bytes (..., n) -> (..., codes) int64: eight codes in `bits` bytes, the first in the lowest bits."""
    word = packed.view(torch.uint8).unflatten(-1, (-1, bits)).long()
    word = (word << 8 * torch.arange(bits, device=word.device)).sum(-1)
    return (word[..., None] >> bits * torch.arange(8, device=word.device) & (1 << bits) - 1).flatten(-2)


def ranks(packed: Packed) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out, in) int64 ranks of the levels, 0 where pruned, and (out, in) bool kept, or None."""
    t, (rows, cols), bits = packed.tensors, packed.meta["shape"], packed.meta["bits"]
    stream = each_code(t["codes"], bits)
    if packed.meta["format"] == "dense":
        if bits == 4:                                       # nibble of column 0, 1, ...
            places = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7], device=stream.device)
            stream = stream.view(rows, -1, 8)[:, :, places].flatten(1)
        return stream[:, :cols], None
    keep = bit_matrix(t["mask"], cols)
    column = torch.arange(cols, device=keep.device)
    if packed.meta["format"] == "nm":
        blocks = torch.nn.functional.pad(keep, (0, -cols % 16)).view(rows, -1, 16)
        place = (blocks.long().cumsum(2) - 1).flatten(1)[:, :cols] + 8 * (column // 16)
    else:
        place = keep.long().cumsum(1) - 1 + 8 * t["row_start"].long()[:, None]
        stream, place, keep = stream.view(1, -1), place.view(1, -1), keep.view(1, -1)
    rank = torch.where(keep, stream.gather(1, place.clamp(0, stream.shape[1] - 1)), 0)
    return rank.view(rows, cols), keep.view(rows, cols)


def dequantize(packed: Packed, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """(out, in) in dtype, on the device of packed's tensors; computed in fp32, pruned weights +0."""
    rank, keep = ranks(packed)
    cols, size = packed.meta["shape"][1], packed.meta["groupsize"]
    group = torch.arange(cols, device=rank.device) // (size if size > 0 else cols)
    group = packed.tensors.get("g_idx", group).long()
    scale, zero = (packed.tensors[name].float()[:, group] for name in ("scale", "zero"))
    if packed.meta["grid"] == "uniform":
        weight = scale * (rank - zero)
    else:                                                   # 4 bits: ranks 0 ... 7: -(7 + zero) ... -zero, 8 ... 15: zero ...
        top = 1 << packed.meta["bits"] - 1
        weight = torch.where(rank < top, -scale, scale) * (torch.where(rank < top, top - 1 - rank, rank - top) + zero)
    return (weight if keep is None else weight.masked_fill(~keep, 0.0)).to(dtype)
