"""Packed weights: codes, a bitmap of what pruning kept, and fp16 grids, at their true size.

Three formats. Pruned weights cost one bit each, kept weights one bit plus their code:

    format          tensors                               bits per weight, half of the weights
                                                          kept, 4-bit codes
    "dense"         codes                                 4.0    nothing is pruned
    "nm"            mask, codes                           3.0    at most 8 kept of every aligned
                                                                 16: 2:4, 4:8, 8:16
    "unstructured"  mask, codes, row_start                3.0    anything, from empty to full

plus scale and zero, an fp16 each per row or per `groupsize` columns (2 x 16 / 128 = 0.25 bits at
groupsize 128). A row of the last two formats, 8 columns of it:

    column        0 1 2 3 4 5 6 7
    kept?         1 0 1 1 0 0 0 1    mask byte 0b10001101: bit j is column j
    codes         a . b c . . . d    nibbles a b c d, the first in the lowest bits; the next 8
                                     columns go on there

"nm" gives every 16 columns 16 mask bits and one 32-bit word of 8 nibbles, so everything lies at a
fixed place. An "unstructured" row is one stream of nibbles; row r begins at word row_start[r].
Codes of 2, 3 or 8 bits lie the same way, eight in 2, 3 or 8 bytes; the Triton kernels read 4-bit
codes only.

Codes are stored by rank: 0 is the grid's lowest level, 2^bits - 1 its highest. In "dense" the eight
nibbles of a word hold columns 0 2 4 6 1 3 5 7, so that one `and` finds two neighbouring columns in
the two halves of a word (decode.py).

    packed = pack(codes, mask, scale, zero, bits=4, grid="uniform")    # as sparsegpt returns them
    weight = unpack(packed)               # (out, in) float16, the solver's, bit for bit

`unpack` is in unpacking.py, bits.py has the pieces. Left out: entropy coding, and more than one
group per column.
"""
from dataclasses import dataclass

import numpy as np
import torch

from kernels.bits import by_rank, compact, shuffle, to_bitmap, to_bits

WORD = 32                              # columns of a word of the bitmap
MOST_WORDS = 1 << 28                   # of the unstructured stream: kernels count its nibbles
BITS = (2, 3, 4, 8)
FORMATS = ("dense", "nm", "unstructured")
GRIDS = ("uniform", "offset")


@dataclass
class Packed:
    tensors: dict[str, torch.Tensor]   # to be written to a file as they are
    meta: dict                         # plain JSON: shape, bits, grid, groupsize, format


def nbytes(packed: Packed) -> int:
    """Bytes of all tensors."""
    return sum(t.nbytes for t in packed.tensors.values())


def bits_per_weight(packed: Packed) -> float:
    """Everything counted: codes, mask, starts, scales and zeros."""
    rows, cols = packed.meta["shape"]
    return 8 * nbytes(packed) / (rows * cols)


def count_kept(packed: Packed) -> int:
    """How many weights pruning left."""
    rows, cols = packed.meta["shape"]
    if packed.meta["format"] == "dense":
        return rows * cols
    return int(ones_in(packed.tensors["mask"].cpu(), np.uint32).sum())


def ones_in(mask: torch.Tensor, piece: type) -> np.ndarray:
    """How many weights each piece of a bitmap keeps; piece: np.uint32, or np.uint16 for half a
    word."""
    return np.bitwise_count(mask.numpy().view(piece))


def up_to(multiple: int, columns: np.ndarray) -> np.ndarray:
    """(rows, n) with zeros behind, so that n is a multiple."""
    return np.pad(columns, ((0, 0), (0, -columns.shape[1] % multiple)))


def pack(codes: torch.Tensor, mask: torch.Tensor | None, scale: torch.Tensor, zero: torch.Tensor,
         bits: int, grid: str = "uniform", groupsize: int = -1, format: str = "auto",
         g_idx: torch.Tensor | None = None) -> Packed:
    """codes (out, in) uint8; mask (out, in) bool, True where pruned, or None; scale, zero (out,
    groups), exact in fp16.

    grid "uniform": w = scale * (code - zero). grid "offset": w = s * scale * (k + zero), s = -1
    where the code's top bit is set, k the other bits. g_idx (in,): the group of each column if it
    is not column // groupsize. format "auto" takes the smallest that fits. Raises ValueError for
    what cannot be stored exactly."""
    rows, cols = codes.shape
    group = groups_of(cols, groupsize, g_idx)
    if bits not in BITS or grid not in GRIDS:
        raise ValueError(f"bits={bits!r}, grid={grid!r}: bits must be 2, 3, 4 or 8 and grid "
                         f"'uniform' or 'offset'")
    if mask is not None and mask.shape != codes.shape:
        raise ValueError(f"mask {tuple(mask.shape)} and codes {tuple(codes.shape)} must have the "
                         f"same shape")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask is of type {mask.dtype}: it must be bool, True where pruned")
    groups = number_of_groups({"shape": [rows, cols], "groupsize": groupsize})
    if len(group) != cols or cols and not 0 <= group.min() <= group.max() < groups:
        raise ValueError(f"g_idx does not fit {cols} columns and groupsize {groupsize}, which make "
                         f"{groups} groups")
    for name, t in (("scale", scale), ("zero", zero)):
        check_grid(name, t, (rows, groups))
    n = codes.detach().cpu().numpy()
    for extreme in (n.min(), n.max()) if n.size else ():
        if not 0 <= extreme < 1 << bits:
            raise ValueError(f"code {extreme} does not fit in {bits} bits")
    n = by_rank(n, bits) if grid == "offset" else n.astype(np.uint8, copy=False)
    keep = None if mask is None else ~mask.detach().cpu().numpy()
    tensors = {"scale": scale.detach().half().cpu().contiguous(),
               "zero": zero.detach().half().cpu().contiguous()}
    if g_idx is not None:
        tensors["g_idx"] = torch.from_numpy(group.astype(np.int16))
    if format == "auto":
        format = "dense" if keep is None else smallest(keep, bits)
    if format == "dense" and keep is None:
        tensors["codes"] = to_bits(shuffle(up_to(8, n), bits), bits, rows)
    elif format == "nm" and keep is not None:
        tensors.update(pack_nm(up_to(WORD, n), up_to(WORD, keep), bits))
    elif format == "unstructured" and keep is not None:
        tensors.update(pack_unstructured(up_to(WORD, n), up_to(WORD, keep), bits))
    else:
        raise ValueError(f"format={format!r} with{'out' if keep is None else ''} a mask: use "
                         f"'dense' without a mask, 'nm' or 'unstructured' with one, or 'auto'")
    meta = {"shape": [rows, cols], "bits": bits, "grid": grid, "groupsize": groupsize,
            "format": format}
    return Packed(tensors, meta)


def check_grid(name: str, t: torch.Tensor, shape: tuple[int, int]) -> None:
    """ValueError unless a scale or zero has this shape and fits fp16 exactly."""
    if t.shape != shape:
        raise ValueError(f"{name} {tuple(t.shape)} must be {shape}: one column per group")
    if not t.half().isfinite().all() or not torch.equal(t.half().float(), t.float()):
        raise ValueError(f"{name} holds values that fp16 cannot: round the grid to fp16 before "
                         f"quantizing with it")


def pack_nm(n: np.ndarray, keep: np.ndarray, bits: int) -> dict[str, torch.Tensor]:
    """{mask, codes} of ranks n and keep, both (rows, a multiple of 32)."""
    kept = keep.reshape(-1, 16).sum(1, dtype=np.int32)          # of every 16 columns
    if kept.max(initial=0) > 8:
        row = kept.argmax() * 16 // keep.shape[1]
        raise ValueError(f"format 'nm' keeps at most 8 of every 16 columns, row {row} keeps "
                         f"{kept.max()}: use format='unstructured'")
    blocks = len(kept)
    stream = compact(n, keep, kept, np.arange(blocks), blocks)  # a word of 8 codes a block
    return {"mask": to_bitmap(keep), "codes": to_bits(stream, bits, len(keep))}


def pack_unstructured(n: np.ndarray, keep: np.ndarray, bits: int) -> dict[str, torch.Tensor]:
    """{mask, row_start, codes} of ranks n and keep, both (rows, a multiple of 32)."""
    mask = to_bitmap(keep)
    row_start, words = starts(mask)
    stream = compact(n, keep, keep.sum(1), row_start.numpy().astype(np.int64), words)
    return {"mask": mask, "row_start": row_start, "codes": to_bits(stream, bits, 1).flatten()}


def starts(mask: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Bitmap (out, words) int32 -> row_start (out,) int32, and the stream's length in words of 8
    codes, two more than are filled, because readers look ahead."""
    kept = ones_in(mask, np.uint32).sum(1, dtype=np.int64)      # (out,)
    words = (kept + 7) // 8                                     # rows begin at whole words
    ends = np.concatenate(([0], words.cumsum()))
    if ends[-1] >= MOST_WORDS:
        raise ValueError(f"{8 * ends[-1]} kept weights: format 'unstructured' counts to "
                         f"{8 * MOST_WORDS}; split the layer")
    row_start = ends[:-1].astype(np.int32)
    return torch.from_numpy(row_start), int(ends[-1]) + 2


def check_packed(packed: Packed, shape: tuple[int, int]) -> None:
    """Raises ValueError unless meta is known, every tensor has the type and size that it asks for,
    and the starts are those of the mask: no reader of a checked file can run out of its tensors."""
    held, meta = packed.tensors, packed.meta
    if not isinstance(meta, dict) or meta.get("shape") != list(shape):
        raise ValueError(f"packed as {meta}, but the configuration wants a shape of {list(shape)}")
    check_meta(meta)
    groups = number_of_groups(meta)
    need = layout(meta, "g_idx" in held)
    want = None                                                 # the starts of the mask
    if meta["format"] == "unstructured":
        mask = held.get("mask")
        if mask is not None and (mask.dtype, tuple(mask.shape)) == need["mask"]:
            want = starts(mask)
            need["codes"] = codes_of((want[1],), meta["bits"])
    for name in {**need, **held}:
        have = (held[name].dtype, tuple(held[name].shape)) if name in held else "missing"
        if have != need.get(name):
            raise ValueError(f"packed tensor {name}: {have}, wanted {need.get(name, 'none')}")
    if want and not torch.equal(held["row_start"], want[0]):
        raise ValueError("row_start does not fit the mask: the file is damaged")
    if meta["format"] == "nm" and ones_in(held["mask"], np.uint16).max() > 8:
        raise ValueError("the mask keeps more than 8 of 16 columns: the file is damaged")
    if "g_idx" in held:
        first, last = int(held["g_idx"].min()), int(held["g_idx"].max())
        if not 0 <= first <= last < groups:
            raise ValueError(f"g_idx leaves the {groups} groups")


def check_meta(meta: dict) -> None:
    """ValueError for bits, a grid, a groupsize or a format that is not known."""
    bits, grid, size, format = (meta.get(key) for key in ("bits", "grid", "groupsize", "format"))
    is_size = isinstance(size, int) and (size == -1 or size >= 1)
    if bits not in BITS or grid not in GRIDS or format not in FORMATS or not is_size:
        raise ValueError(f"bits {bits!r}, grid {grid!r}, groupsize {size!r}, format {format!r}: "
                         f"this packing is not known")


def number_of_groups(meta: dict) -> int:
    """How many groups a row has."""
    cols, size = meta["shape"][1], meta["groupsize"]
    return -(-cols // size) if size > 0 else 1                  # rounded up


def layout(meta: dict, has_g_idx: bool) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """{name: (dtype, shape)} of the tensors of a packed weight, without the codes of the
    unstructured format, whose length the mask says."""
    rows, cols = meta["shape"]
    words = -(-cols // WORD)
    groups = number_of_groups(meta)
    need = {"scale": (torch.float16, (rows, groups)), "zero": (torch.float16, (rows, groups))}
    if has_g_idx:
        need["g_idx"] = torch.int16, (cols,)
    if meta["format"] == "dense":
        need["codes"] = codes_of((rows, -(-cols // 8)), meta["bits"])
        return need
    need["mask"] = torch.int32, (rows, words)
    if meta["format"] == "nm":
        need["codes"] = codes_of((rows, 2 * words), meta["bits"])
    else:
        need["row_start"] = torch.int32, (rows,)
    return need


def codes_of(eights: tuple[int, ...], bits: int) -> tuple[torch.dtype, tuple[int, ...]]:
    """(dtype, shape) of codes, told how many groups of eight they are: int32 words of 4-bit codes,
    bytes of others."""
    if bits == 4:
        return torch.int32, eights
    *rows, length = eights
    return torch.uint8, (*rows, length * bits)


def pack_compressed(out) -> Packed:
    """A solver's result (gptq.Compressed: mask, codes, scale, zero, g_idx, grid, bits) in the
    smallest format that fits."""
    if out.codes is None:
        raise ValueError("nothing was quantized (bits=None): there are no codes to pack")
    cols = out.codes.shape[1]
    size = -1
    g_idx = None
    if out.scale.shape[1] > 1:
        size = int((out.g_idx == 0).sum())                      # the first group is a whole one
        neighbours = torch.arange(cols) // size
        if not torch.equal(out.g_idx.cpu(), neighbours):
            g_idx = out.g_idx
    mask = out.mask if out.mask.any() else None
    return pack(out.codes, mask, out.scale, out.zero, out.bits, out.grid, size, g_idx=g_idx)


def groups_of(cols: int, groupsize: int, g_idx: torch.Tensor | None) -> np.ndarray:
    """(cols,) int64, the group of each column."""
    if g_idx is not None:
        return g_idx.cpu().numpy().astype(np.int64)
    return np.arange(cols) // (groupsize if groupsize > 0 else max(cols, 1))


def smallest(keep: np.ndarray, bits: int) -> str:
    """"nm" if it fits and takes no more bytes than "unstructured"; keep (rows, cols) bool."""
    rows, cols = keep.shape
    kept = up_to(WORD, keep).reshape(-1, 16).sum(1, dtype=np.int32)     # of every 16 columns
    nm = len(kept) * (2 + bits)                                 # bytes: 2 of the mask, 8 codes
    words = (keep.sum(1, dtype=np.int64) + 7) // 8              # of 8 codes, as in starts
    start_and_mask = 4 + 4 * -(-cols // WORD)                   # bytes of a row
    unstructured = bits * (words.sum() + 2) + rows * start_and_mask
    return "nm" if kept.max(initial=0) <= 8 and nm <= unstructured else "unstructured"
