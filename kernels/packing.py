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

`unpack` is in unpacking.py. Left out: entropy coding, and more than one group per column.
"""
from dataclasses import dataclass

import numpy as np
import torch

TILE = 128                                                  # columns between two starts of the unstructured format
BITS = (2, 3, 4, 8)
INT = {2: np.int16, 4: np.int32, 8: np.int64}               # numpy has no bfloat16: move values as integers
KEPT = (np.arange(256)[:, None] >> np.arange(8)) & 1        # (256, 8) the bits of every mask byte


@dataclass
class Packed:
    tensors: dict[str, torch.Tensor]                        # to be written to a file as they are
    meta: dict                                              # plain JSON: shape, bits, grid, groupsize, format


def nbytes(packed: Packed) -> int:
    return sum(t.numel() * t.element_size() for t in packed.tensors.values())


def bits_per_weight(packed: Packed) -> float:
    """Everything counted: codes, mask, starts, scales and zeros."""
    return 8 * nbytes(packed) / (packed.meta["shape"][0] * packed.meta["shape"][1])


def pack(codes: torch.Tensor, mask: torch.Tensor | None, scale: torch.Tensor, zero: torch.Tensor, bits: int,
         grid: str = "uniform", groupsize: int = -1, format: str = "auto", g_idx: torch.Tensor | None = None) -> Packed:
    """codes (out, in) uint8; mask (out, in) bool, True where pruned, or None; scale, zero (out, groups), exact in fp16.

    grid "uniform": w = scale * (code - zero). grid "offset": w = s * scale * (k + zero), s = -1 where the code's top
    bit is set, k the other bits. g_idx (in,): the group of each column if it is not column // groupsize. format
    "auto" takes the smallest that fits. Raises ValueError for what cannot be stored exactly."""
    rows, cols = codes.shape
    grouping = groups_of(cols, groupsize, g_idx)
    if bits not in BITS or grid not in ("uniform", "offset"):
        raise ValueError(f"bits={bits!r}, grid={grid!r}: bits must be 2, 3, 4 or 8 and grid 'uniform' or 'offset'")
    if mask is not None and mask.shape != codes.shape:
        raise ValueError(f"mask {tuple(mask.shape)} and codes {tuple(codes.shape)} must have the same shape")
    for name, t in (("scale", scale), ("zero", zero)):
        if t.shape != (rows, int(grouping.max()) + 1):
            raise ValueError(f"{name} {tuple(t.shape)} must be {(rows, int(grouping.max()) + 1)}: one column per group")
        if not torch.equal(t.half().float(), t.float()):
            raise ValueError(f"{name} holds values that fp16 cannot: round the grid to fp16 before quantizing with it")
    n = codes.detach().cpu().to(torch.uint8).numpy()
    if n.size and int(n.max()) >> bits:
        raise ValueError(f"code {int(n.max())} does not fit in {bits} bits")
    n = by_rank(n, bits) if grid == "offset" else n
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
        starts = np.arange(len(kept), dtype=np.int64)
        tensors["mask"] = to_bitmap(keep)
        tensors["codes"] = to_bits(compact(n, keep, kept, starts, len(kept)), bits, rows)
    elif format == "unstructured" and keep is not None:
        if cols > 1 << 16:
            raise ValueError(f"{cols} columns: the 16-bit starts of format 'unstructured' reach 65536; split the layer")
        n, keep = (np.pad(t, ((0, 0), (0, -cols % TILE))) for t in (n, keep))
        kept = keep.reshape(rows, -1, TILE).sum(2, dtype=np.int64)
        ends = ((kept.sum(1) + 7) // 8).cumsum()                                    # rows begin at whole words
        total = int(ends[-1]) if rows else 0
        starts = np.concatenate(([0], ends))[:rows]
        tensors["mask"] = to_bitmap(keep[:, :cols + -cols % 32])
        tensors["row_start"] = torch.from_numpy(starts.astype(np.int32))
        tensors["tile_start"] = torch.from_numpy((kept.cumsum(1) - kept).astype(np.uint16).view(np.int16))
        stream = compact(n, keep, kept.sum(1), starts, total + 2)                   # two words more: readers look ahead
        tensors["codes"] = to_bits(stream, bits, 1).flatten()
    else:
        raise ValueError(f"format={format!r} with{'out' if keep is None else ''} a mask: use 'dense' without a mask, "
                         f"'nm' or 'unstructured' with one, or 'auto'")
    meta = {"shape": [rows, cols], "bits": bits, "grid": grid, "groupsize": groupsize, "format": format}
    return Packed(tensors, meta)


def groups_of(cols: int, groupsize: int, g_idx: torch.Tensor | None) -> np.ndarray:
    """(cols,) the group of each column."""
    if g_idx is not None:
        return g_idx.cpu().numpy().astype(np.int64)
    return np.arange(cols) // (groupsize if groupsize > 0 else max(cols, 1))


def by_rank(n: np.ndarray, bits: int) -> np.ndarray:
    """Codes of the offset grid -> ranks of their levels: -(k + zero) -> top - 1 - k, +(k + zero) -> top + k."""
    top = 1 << (bits - 1)
    return np.where(n & top, n ^ (2 * top - 1), n ^ top).astype(np.uint8)


def from_rank(n: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of by_rank."""
    top = 1 << (bits - 1)
    return np.where(n & top, n ^ top, n ^ (2 * top - 1)).astype(np.uint8)


def smallest(keep: np.ndarray, bits: int) -> str:
    """"nm" if it fits and takes fewer bytes than "unstructured"."""
    rows, cols = keep.shape
    kept = np.pad(keep, ((0, 0), (0, -cols % 32))).reshape(-1, 16).sum(1, dtype=np.int32)
    nm = len(kept) * (2 + bits)
    unstructured = kept.sum() * bits / 8 + rows * (4 + 4 * -(-cols // 32) + 2 * -(-cols // TILE))
    return "nm" if kept.max(initial=0) <= 8 and nm <= unstructured else "unstructured"


def to_bitmap(keep: np.ndarray) -> torch.Tensor:
    """(rows, columns) bool -> (rows, columns / 32) int32, column j at bit j % 32."""
    return torch.from_numpy(np.packbits(keep, axis=1, bitorder="little").view(np.int32))


def compact(n: np.ndarray, keep: np.ndarray, counts: np.ndarray, starts: np.ndarray, words: int) -> np.ndarray:
    """The kept codes in memory order, counts[i] of them from 8 * starts[i] on; zeros between. -> (8 * words,) uint8."""
    stream = np.zeros(8 * words, np.uint8)
    place = np.repeat(8 * starts - (counts.cumsum() - counts), counts)
    place += np.arange(len(place))
    stream[place] = n[keep]
    return stream


def to_bits(n: np.ndarray, bits: int, rows: int) -> torch.Tensor:
    """Eight codes -> `bits` bytes, the first code in the lowest bits. 4-bit codes become int32 words, others bytes."""
    word = np.zeros(n.size // 8, np.uint64)
    for j, c in enumerate(n.reshape(-1, 8).T):
        word |= c.astype(np.uint64) << np.uint64(bits * j)
    packed = np.ascontiguousarray(word.view(np.uint8).reshape(-1, 8)[:, :bits]).reshape(rows, -1)
    return torch.from_numpy(packed.view(np.int32) if bits == 4 else packed)


def from_bits(packed: np.ndarray, bits: int) -> np.ndarray:
    """The inverse: (rows, words) int32 or (rows, bytes) uint8 -> (rows, codes) uint8."""
    blocks = packed.view(np.uint8).reshape(-1, bits)
    word = np.zeros((len(blocks), 8), np.uint8)
    word[:, :bits] = blocks
    codes = word.view(np.uint64) >> np.uint64(bits) * np.arange(8, dtype=np.uint64)
    return (codes & np.uint64((1 << bits) - 1)).astype(np.uint8).reshape(len(packed), -1)


def shuffle(n: np.ndarray, bits: int) -> np.ndarray:
    """4-bit codes of dense words: columns 0 2 4 6 1 3 5 7."""
    return n.reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]] if bits == 4 else n
