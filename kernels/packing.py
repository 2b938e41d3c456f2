"""Packed weights: codes, a bitmap of what pruning kept, and fp16 grids, at their true size.

Three formats. Pruned weights cost one bit each, kept weights one bit plus their code:

    format         tensors                              bits per weight, half of the weights kept, 4-bit codes
    "dense"        codes                                4.0    nothing is pruned
    "nm"           mask, codes                          3.0    at most 8 kept of every aligned 16: 2:4, 4:8, 8:16
    "unstructured" mask, codes, row_start, tile_start   3.13   anything, from empty to full

plus scale and zero, an fp16 each per row or per `groupsize` columns (2 x 16 / 128 = 0.25 bits at groupsize 128).
A row of the last two formats, 8 columns of it:

    column        0 1 2 3 4 5 6 7
    kept?         1 0 1 1 0 0 0 1      mask byte 0b10001101: bit j is column j
    codes         a . b c . . . d      nibbles a b c d, the first in the lowest bits; the next 8 columns go on there

"nm" gives every 16 columns 16 mask bits and one 32-bit word of 8 nibbles, so everything lies at a fixed place. An
"unstructured" row is one stream of nibbles; row r begins at word row_start[r], and tile_start[r, t] (16 bits) nibbles
further begins what is kept of columns 128 t ... 128 t + 127. Codes of 2, 3 or 8 bits lie the same way, eight in 2, 3
or 8 bytes; the Triton kernels read 4-bit codes only.

Codes are stored by rank: 0 is the grid's lowest level, 2^bits - 1 its highest. In "dense" the eight nibbles of a word
hold columns 0 2 4 6 1 3 5 7, so that one `and` finds two neighbouring columns in the two halves of a word (decode.py).

    packed = pack(codes, mask, scale, zero, bits=4, grid="uniform")        # codes, mask as sparsegpt returns them
    weight = unpack(packed)                                             # (out, in) float16, the solver's, bit for bit

`unpack` is in unpacking.py, bits.py has the pieces. Left out: entropy coding, and more than one group per column.
"""
from dataclasses import dataclass

import numpy as np
import torch

from kernels.bits import by_rank, compact, shuffle, to_bitmap, to_bits

TILE = 128                                                  # columns between two starts of the unstructured format
BITS = (2, 3, 4, 8)
FORMATS = ("dense", "nm", "unstructured")
GRIDS = ("uniform", "offset")


@dataclass
class Packed:
    tensors: dict[str, torch.Tensor]                        # to be written to a file as they are
    meta: dict                                              # plain JSON: shape, bits, grid, groupsize, format


def nbytes(packed: Packed) -> int:
    return sum(t.numel() * t.element_size() for t in packed.tensors.values())


def bits_per_weight(packed: Packed) -> float:
    """Everything counted: codes, mask, starts, scales and zeros."""
    return 8 * nbytes(packed) / (packed.meta["shape"][0] * packed.meta["shape"][1])


def count_kept(packed: Packed) -> int:
    """How many weights pruning left."""
    rows, cols = packed.meta["shape"]
    if packed.meta["format"] == "dense":
        return rows * cols
    return int(np.bitwise_count(packed.tensors["mask"].cpu().numpy().view(np.uint32)).sum())


def pack(codes: torch.Tensor, mask: torch.Tensor | None, scale: torch.Tensor, zero: torch.Tensor, bits: int,
         grid: str = "uniform", groupsize: int = -1, format: str = "auto", g_idx: torch.Tensor | None = None) -> Packed:
    """codes (out, in) uint8; mask (out, in) bool, True where pruned, or None; scale, zero (out, groups), exact in fp16.

    grid "uniform": w = scale * (code - zero). grid "offset": w = s * scale * (k + zero), s = -1 where the code's top
    bit is set, k the other bits. g_idx (in,): the group of each column if it is not column // groupsize. format
    "auto" takes the smallest that fits. Raises ValueError for what cannot be stored exactly."""
    rows, cols = codes.shape
    grouping = groups_of(cols, groupsize, g_idx)
    if bits not in BITS or grid not in GRIDS:
        raise ValueError(f"bits={bits!r}, grid={grid!r}: bits must be 2, 3, 4 or 8 and grid 'uniform' or 'offset'")
    if mask is not None and mask.shape != codes.shape:
        raise ValueError(f"mask {tuple(mask.shape)} and codes {tuple(codes.shape)} must have the same shape")
    for name, t in (("scale", scale), ("zero", zero)):
        if t.shape != (rows, int(grouping.max()) + 1):
            raise ValueError(f"{name} {tuple(t.shape)} must be {(rows, int(grouping.max()) + 1)}: one column per group")
        if not torch.equal(t.half().float(), t.float()):
            raise ValueError(f"{name} holds values that fp16 cannot: round the grid to fp16 before quantizing with it")
    n = codes.detach().cpu().numpy()
    for extreme in (n.min(), n.max()) if n.size else ():
        if not 0 <= extreme < 1 << bits:
            raise ValueError(f"code {extreme} does not fit in {bits} bits")
    n = by_rank(n, bits) if grid == "offset" else n.astype(np.uint8, copy=False)
    keep = None if mask is None else ~mask.detach().cpu().numpy()
    tensors = {"scale": scale.detach().half().cpu().contiguous(), "zero": zero.detach().half().cpu().contiguous()}
    if g_idx is not None:
        tensors["g_idx"] = torch.from_numpy(grouping.astype(np.int16))
    if format == "auto":
        format = "dense" if keep is None else smallest(keep, bits)
    if format == "dense" and keep is None:
        n = np.pad(n, ((0, 0), (0, -cols % 8)))
        tensors["codes"] = to_bits(shuffle(n, bits), bits, rows)
    elif format == "nm" and keep is not None:
        n, keep = (np.pad(t, ((0, 0), (0, -cols % 32))) for t in (n, keep))
        kept = keep.reshape(-1, 16).sum(1, dtype=np.int32)
        if kept.max(initial=0) > 8:
            row = kept.argmax() * 16 // keep.shape[1]
            raise ValueError(f"format 'nm' keeps at most 8 of every 16 columns, row {row} keeps {kept.max()}: "
                             "use format='unstructured'")
        tensors["mask"] = to_bitmap(keep)
        tensors["codes"] = to_bits(compact(n, keep, kept, np.arange(len(kept)), len(kept)), bits, rows)
    elif format == "unstructured" and keep is not None:
        if cols > 1 << 16:
            raise ValueError(f"{cols} columns: the 16-bit starts of format 'unstructured' reach 65536; split the layer")
        n, keep = (np.pad(t, ((0, 0), (0, -cols % 32))) for t in (n, keep))
        tensors["mask"] = to_bitmap(keep)
        tensors["row_start"], tensors["tile_start"], words = starts(tensors["mask"])
        stream = compact(n, keep, keep.sum(1), tensors["row_start"].numpy().astype(np.int64), words)
        tensors["codes"] = to_bits(stream, bits, 1).flatten()
    else:
        raise ValueError(f"format={format!r} with{'out' if keep is None else ''} a mask: use 'dense' without a mask, "
                         f"'nm' or 'unstructured' with one, or 'auto'")
    meta = {"shape": [rows, cols], "bits": bits, "grid": grid, "groupsize": groupsize, "format": format}
    return Packed(tensors, meta)


def starts(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Bitmap (out, words) int32 -> row_start, tile_start and the stream's length in words of 8 codes, two more than are
    filled, because readers look ahead."""
    kept = np.bitwise_count(mask.numpy().view(np.uint32))
    kept = np.pad(kept, ((0, 0), (0, -kept.shape[1] % (TILE // 32))))
    kept = kept.reshape(len(kept), -1, TILE // 32).sum(2, dtype=np.int64)           # (out, tiles)
    ends = np.concatenate(([0], ((kept.sum(1) + 7) // 8).cumsum()))                 # rows begin at whole words
    if ends[-1] >= 1 << 28:
        raise ValueError(f"{8 * ends[-1]} kept weights: format 'unstructured' counts to {1 << 31}; split the layer")
    tile_start = (kept.cumsum(1) - kept).astype(np.uint16).view(np.int16)
    return torch.from_numpy(ends[:-1].astype(np.int32)), torch.from_numpy(tile_start), int(ends[-1]) + 2


def check_packed(packed: Packed, shape: tuple[int, int]) -> None:
    """Raises ValueError unless meta is known, every tensor has the type and size that it asks for, and the starts are
    those of the mask: no reader of a checked file can run out of its tensors."""
    t, meta = packed.tensors, packed.meta
    if not isinstance(meta, dict) or meta.get("shape") != list(shape):
        raise ValueError(f"packed as {meta}, but the configuration wants a shape of {list(shape)}")
    bits, grid, size, format = (meta.get(key) for key in ("bits", "grid", "groupsize", "format"))
    if bits not in BITS or grid not in GRIDS or format not in FORMATS or not isinstance(size, int) or size < 1 and size != -1:
        raise ValueError(f"bits {bits!r}, grid {grid!r}, groupsize {size!r}, format {format!r}: this packing is not known")
    rows, cols = shape
    words, groups = -(-cols // 32), -(-cols // size) if size > 0 else 1
    need = {"scale": (torch.float16, (rows, groups)), "zero": (torch.float16, (rows, groups))}
    if "g_idx" in t:
        need["g_idx"] = torch.int16, (cols,)
    if format != "dense":
        need["mask"] = torch.int32, (rows, words)
    blocks = {"dense": (rows, -(-cols // 8)), "nm": (rows, 2 * words), "unstructured": None}[format]    # of eight codes
    if format == "unstructured":
        need["row_start"], need["tile_start"] = (torch.int32, (rows,)), (torch.int16, (rows, -(-cols // TILE)))
        if "mask" in t and t["mask"].dtype == torch.int32 and t["mask"].shape == (rows, words):
            *want, length = starts(t["mask"])
            blocks = (length,)
    if blocks:
        need["codes"] = (torch.int32, blocks) if bits == 4 else (torch.uint8, (*blocks[:-1], blocks[-1] * bits))
    for name in {**need, **t}:
        have = (t[name].dtype, tuple(t[name].shape)) if name in t else "missing"
        if have != need.get(name):
            raise ValueError(f"packed tensor {name}: {have}, wanted {need.get(name, 'none')}")
    if format == "unstructured" and not (torch.equal(t["row_start"], want[0]) and torch.equal(t["tile_start"], want[1])):
        raise ValueError("row_start and tile_start do not fit the mask: the file is damaged")
    if format == "nm" and int(np.bitwise_count(t["mask"].numpy().view(np.uint16)).max()) > 8:
        raise ValueError("the mask keeps more than 8 of 16 columns: the file is damaged")
    if "g_idx" in t and not 0 <= int(t["g_idx"].min()) <= int(t["g_idx"].max()) < groups:
        raise ValueError(f"g_idx leaves the {groups} groups")


def pack_compressed(out) -> Packed:
    """A solver's result (gptq.Compressed: mask, codes, scale, zero, g_idx, grid, bits) in the smallest format that fits."""
    cols = out.codes.shape[1]
    size = int((out.g_idx == 0).sum()) if out.scale.shape[1] > 1 else -1            # the first group is a whole one
    neighbours = size == -1 or torch.equal(out.g_idx.cpu(), torch.arange(cols) // size)
    return pack(out.codes, out.mask if out.mask.any() else None, out.scale, out.zero, out.bits, out.grid, size,
                g_idx=None if neighbours else out.g_idx)


def groups_of(cols: int, groupsize: int, g_idx: torch.Tensor | None) -> np.ndarray:
    """(cols,) the group of each column."""
    if g_idx is not None:
        return g_idx.cpu().numpy().astype(np.int64)
    return np.arange(cols) // (groupsize if groupsize > 0 else max(cols, 1))


def smallest(keep: np.ndarray, bits: int) -> str:
    """"nm" if it fits and takes fewer bytes than "unstructured"."""
    rows, cols = keep.shape
    kept = np.pad(keep, ((0, 0), (0, -cols % 32))).reshape(-1, 16).sum(1, dtype=np.int32)
    nm = len(kept) * (2 + bits)
    unstructured = kept.sum() * bits / 8 + rows * (4 + 4 * -(-cols // 32) + 2 * -(-cols // TILE))
    return "nm" if kept.max(initial=0) <= 8 and nm <= unstructured else "unstructured"


