"""The packed formats in a few torch operations, on any device: what the kernels must equal, and
what a GPU runs where they do not fit (`triton_reads` in linear.py).

    weight = dequantize(packed, torch.float16)       # (out, in) where packed's tensors are
    y = x @ weight.T;  dx = dy @ weight              # what matmul.py computes without the weight

unpacking.py does the same several times faster on a CPU.
"""
import torch
import torch.nn.functional as F

from kernels.packing import Packed


def bit_matrix(mask: torch.Tensor, cols: int) -> torch.Tensor:
    """Bitmap words (out, words) int32 -> (out, cols) bool, True where kept."""
    bit = torch.arange(8, device=mask.device, dtype=torch.uint8)
    bits = mask.view(torch.uint8)[:, :, None] >> bit & 1        # (out, bytes, 8)
    return bits.flatten(1)[:, :cols].bool()


def each_code(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 words or bytes (..., n) -> (..., codes) uint8: eight codes in `bits` bytes, the first
    in the lowest bits."""
    byte = packed.view(torch.uint8).unflatten(-1, (-1, bits)).long()
    word = (byte << 8 * torch.arange(bits, device=packed.device)).sum(-1)   # of eight codes
    code = [(word >> bits * i & (1 << bits) - 1).to(torch.uint8) for i in range(8)]
    return torch.stack(code, -1).flatten(-2)


def ranks(packed: Packed) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out, in) uint8 ranks of the levels, anything where pruned, and (out, in) bool kept, or
    None."""
    t, meta = packed.tensors, packed.meta
    rows, cols = meta["shape"]
    codes = each_code(t["codes"], meta["bits"])
    if meta["format"] == "dense":
        if meta["bits"] == 4:                                   # SHUFFLED: 0 2 4 6, 1 3 5 7
            codes = codes.view(rows, -1, 2, 4).transpose(2, 3).flatten(1)
        return codes[:, :cols], None
    keep = bit_matrix(t["mask"], cols)
    if meta["format"] == "nm":                                  # every 16 columns have 8 codes
        sixteens = F.pad(keep, (0, -cols % 16)).view(rows, -1, 16)
        place = sixteens.cumsum(2).flatten(1)[:, :cols]
        place += 8 * (torch.arange(cols, device=keep.device) // 16)
    else:                                                       # one stream for all rows
        place = keep.cumsum(1)
        place += 8 * t["row_start"].long()[:, None]
        codes, place = codes.view(1, -1), place.view(1, -1)
    # of pruned ones it may be anywhere
    place = place.sub_(1).clamp_(0, codes.shape[1] - 1)
    return codes.gather(1, place).view(rows, cols), keep


def dequantize(packed: Packed, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """(out, in) in dtype, on the device of packed's tensors; computed in fp32, pruned weights are
    +0. Holds at most 16 bytes a weight on the way, with groups 24."""
    t, meta = packed.tensors, packed.meta
    rank, keep = ranks(packed)
    cols, size = meta["shape"][1], meta["groupsize"]
    scale, zero = t["scale"].float(), t["zero"].float()
    if scale.shape[1] > 1:
        group = t.get("g_idx", torch.arange(cols, device=rank.device) // size).long()
        scale, zero = scale[:, group], zero[:, group]
    if meta["grid"] == "uniform":
        weight = (rank - zero).mul_(scale)
    else:                                   # 4 bits: -(7 + zero) ... -zero, +zero ... +(7 + zero)
        top = 1 << meta["bits"] - 1
        negative = rank < top
        weight = torch.where(negative, top - 1 - rank, rank - top) + zero
        weight.mul_(torch.where(negative, -scale, scale))
    if keep is not None:
        weight.masked_fill_(~keep, 0.0)
    return weight.to(dtype)
