"""The order of packed 4-bit weights on a GPU: every thread finds its own part of a matrix product
in one piece.

The tensor cores' m16n8k16 wants 16 rows x 16 columns of W spread over the 32 lanes of a warp, in
the lanes' registers. Here a warp takes a tile of 16 rows x 128 columns, and lane
4 g + q (g < 8, q < 4) decodes for itself:

    rows       g (its upper row) and g + 8 (its lower row)
    columns    16 q ... 16 q + 15 and 64 + 16 q ... 64 + 16 q + 15: bytes b = 0 ... 3 of eight
               neighbours, j = 0 ... 7

Which 16 of the 128 columns one product takes does not matter, as long as x is taken from the same:
the m-th product (m < 8) gets columns 4 (m % 2) ... + 3 of byte m / 2 of each q, and lane (g, q)
reads x of token g there: 4 loads of 16 bytes, next to those of its neighbours. Nothing goes through
shared memory. The tiles of one strip of 16 rows follow each other, then comes the next strip; rows
and columns are filled up with pruned weights (dense: with codes nobody reads).

    tensor   int32, of tiles x 32 lanes x ...
    mask     2 rows          column j of byte b at bit 4 j + b, so that `mask & 0x11111111 << b` has
             a column per nibble
    codes    "nm": 2 rows x 2 words, each 16 columns = 2 bytes. Positions 0 1 2 3 4 5 6 7 are
             nibbles 0 2 4 6 1 3 5 7. What byte 0 keeps lies at 0, 1, 2 ..., what byte 1 keeps at
             7, 6, 5 ...: both are found without counting.
    codes    "dense": 2 rows (outermost) x 4 words, columns 0 2 4 6 1 3 5 7 of a byte, as
             packing.py has them
    codes    "unstructured": a stream of nibbles. Every lane has a place in it, a whole word; its
             upper row's kept codes go up from there in the order of columns, its lower row's go
             down: lane i's upper row meets lane i + 1's lower.

         ... | . . c b a | D E F . . | ...     one lane's place is between a and D, the next one's
               <- lower    upper ->            beyond F: up to 7 nibbles in between are unused, 0.22
                                               bits a weight

    start    int32 a tile, the place of its lane 0; at (uint8, tiles x 32): how many words further
             each lane's is

A nibble's way from the file to a register, row 5, column 83, "nm":

    file      row 5's word for columns 80 ... 95, and in it nibble r, if the row keeps r of columns
              80 ... 82
    lane      83 = 64 + 16 q + 3 with q = 1: lane 4 * 5 + 1 = 21, its upper row, the second block,
              byte 2, j = 3
    fragment  bit 4 * 3 + 2 = 14 of the row's mask; position r of the row's second word, nibble 2 r
              (r < 4) or 2 r - 7
    register  a selector counts bits 2, 6, 10 of the mask and finds r; the pattern becomes the upper
              half of register 4 b + j // 2 = 9, which is the second of the upper row's two
              registers (8, 9) of product m = 4

    fragments = to_fragments(packed)                # on the device of packed's tensors
    packed = from_fragments(fragments)              # the file's tensors again, bit for bit
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels.bits import SHUFFLED, from_rank
from kernels.packing import Packed, pack
from kernels.reference import ranks

AT_ONCE = 1 << 22                      # weights reordered at a time
PAD = 4                                # words around a stream: a lane reads four both ways
STEP = AT_ONCE // 2048                 # tiles of a stream at a time


@dataclass
class Fragments:
    tensors: dict[str, torch.Tensor]   # codes, scale, zero; mask; start, at
    meta: dict                         # as in Packed


def tiles_of(meta: dict) -> tuple[int, int]:
    """Strips of 16 rows, tiles of 128 columns in each."""
    rows, cols = meta["shape"]
    return -(-rows // 16), -(-cols // 128)


def by_lane(t: torch.Tensor) -> torch.Tensor:
    """(rows, columns), whole tiles -> (tiles, 32 lanes, 2 rows, 4 bytes, 8)."""
    strips, tiles = t.shape[0] // 16, t.shape[1] // 128
    t = t.view(strips, 2, 8, tiles, 2, 4, 2, 8)
    # strip 0, half 1, g 2, tile 3, block 4, q 5, byte of the block 6, j 7
    t = t.permute(0, 3, 2, 5, 1, 4, 6, 7)
    return t.reshape(strips * tiles, 32, 2, 4, 8)


def by_row(t: torch.Tensor, strips: int) -> torch.Tensor:
    """The inverse of by_lane."""
    t = t.view(strips, -1, 8, 4, 2, 2, 2, 8)
    # strip 0, tile 1, g 2, q 3, half 4, block 5, byte of the block 6, j 7
    t = t.permute(0, 4, 2, 1, 5, 3, 6, 7)
    return t.reshape(16 * strips, -1)


def to_words(t: torch.Tensor) -> torch.Tensor:
    """(..., 8) nibbles -> (...,) int32, the first in the lowest bits."""
    shifted = t.long() << 4 * torch.arange(8, device=t.device)
    return shifted.sum(-1).to(torch.int32)


def to_nibbles(word: torch.Tensor) -> torch.Tensor:
    """The inverse: (...,) int32 -> (..., 8) int64."""
    return word.long()[..., None] >> 4 * torch.arange(8, device=word.device) & 15


def rows_of(packed: Packed, a: int, b: int) -> Packed:
    """Rows a ... b - 1 alone."""
    t = {name: v if v.dim() == 1 else v[a:b] for name, v in packed.tensors.items()}
    if "row_start" in t:                            # one stream for all rows
        start = t["row_start"]
        end = int(start[b]) if b < len(start) else len(t["codes"])
        t["codes"] = t["codes"][int(start[a]):end]
        t["row_start"] = start[a:b] - start[a]
    cols = packed.meta["shape"][1]
    return Packed(t, {**packed.meta, "shape": [b - a, cols]})


def to_fragments(packed: Packed) -> Fragments:
    """4-bit codes, without g_idx, of any format, grid and grouping."""
    rows, cols = packed.meta["shape"]
    format = packed.meta["format"]
    step = max(16, AT_ONCE // max(cols, 1) // 16 * 16)          # whole strips
    parts = [reorder(rows_of(packed, first, min(first + step, rows)), format)
             for first in range(0, rows, step)]
    t = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    t["scale"] = packed.tensors["scale"]
    t["zero"] = packed.tensors["zero"]
    if format == "unstructured":
        t["codes"], t["start"], t["at"] = stream(t.pop("kept"), t.pop("rank"), t.pop("keep"))
    return Fragments(t, packed.meta)


def bit_of_column(device: torch.device) -> torch.Tensor:
    """(4, 8) int64: the bit of a mask that stands for column j of byte b."""
    byte = torch.arange(4, device=device)
    j = torch.arange(8, device=device)
    return byte[:, None] + 4 * j


def nm_place(keep: torch.Tensor) -> torch.Tensor:
    """(..., 2 bytes, 8) kept -> the position of each in their word: up from 0, and down from 7."""
    place = keep.long().cumsum(-1) - 1
    place[..., 1, :] = 7 - place[..., 1, :]
    return place


def reorder(packed: Packed, format: str) -> dict[str, torch.Tensor]:
    """Some strips' tensors; of "unstructured" counts, ranks and mask, which become a stream when
    all are known."""
    rank, keep = ranks(packed)
    rows, cols = rank.shape
    pad = (0, -cols % 128, 0, -rows % 16)
    rank = by_lane(F.pad(rank, pad))
    if keep is None:
        words = to_words(rank[..., SHUFFLED])
        return {"codes": words.permute(0, 2, 1, 3).contiguous()}            # rows outermost
    keep = by_lane(F.pad(keep, pad))
    bits = keep.long() << bit_of_column(keep.device)
    mask = bits.sum((-1, -2)).to(torch.int32)
    if format == "unstructured":
        return {"mask": mask, "kept": keep.sum((-1, -2)), "rank": rank, "keep": keep}
    rank = rank.unflatten(-2, (2, 2))                           # blocks of two bytes
    keep = keep.unflatten(-2, (2, 2))
    place = nm_place(keep)
    nibble = torch.where(place < 4, 2 * place, 2 * place - 7)
    shifted = rank.long() << 4 * nibble.clamp(0, 7)
    codes = torch.where(keep, shifted, 0).sum((-1, -2)).to(torch.int32)
    return {"mask": mask, "codes": codes.flatten(-2)}           # row 0: 2 words, row 1: 2


def lanes_places(kept: torch.Tensor) -> torch.Tensor:
    """(tiles, 32, 2) counts of kept codes -> (tiles, 32) int64, the word of each lane's place."""
    upper, lower = kept.flatten(0, 1).unbind(1)
    gap = lower.clone()                             # between a lane's place and the one before
    gap[1:] += upper[:-1]
    words = (gap + 7) // 8
    return PAD + words.cumsum(0).view(kept.shape[:2])


def nibble_index(place: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """(tiles, 32) places, (tiles, 32, 2, 4, 8) kept -> the nibble of every kept code in the stream;
    anything where pruned."""
    before = keep.flatten(-2).long().cumsum(-1) - 1             # kept before it in its row
    first = 8 * place[..., None]
    upper = first + before[:, :, 0]
    lower = first - 1 - before[:, :, 1]
    return torch.stack((upper, lower), 2).view(keep.shape)


def stream(kept: torch.Tensor, rank: torch.Tensor,
           keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Counts (tiles, 32, 2), ranks and mask (tiles, 32, 2, 4, 8) -> codes, start, at."""
    place = lanes_places(kept)
    words = int(place[-1, -1]) + 4 + PAD            # a lane's upper row has 32 codes, 4 words
    if words >= 1 << 31:
        raise ValueError(f"{words} words of kept codes: a GPU's kernels count to {1 << 31}; split "
                         f"the layer")
    codes = torch.zeros(words, dtype=torch.int32, device=rank.device)
    for i in range(0, len(rank), STEP):
        here = keep[i:i + STEP]
        index = nibble_index(place[i:i + STEP], here)[here]
        shifted = rank[i:i + STEP][here].long() << 4 * (index & 7)
        codes.index_add_(0, index >> 3, shifted.to(torch.int32))
    start = place[:, 0].to(torch.int32)
    return codes, start, (place - place[:, :1]).to(torch.uint8)


def fragment_ranks(fragments: Fragments) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out, in) uint8 ranks, 0 where pruned, and (out, in) bool kept, or None: what the kernels
    must decode."""
    t, meta = fragments.tensors, fragments.meta
    rows, cols = meta["shape"]
    strips, _ = tiles_of(meta)
    if meta["format"] == "dense":
        nibbles = to_nibbles(t["codes"].permute(0, 2, 1, 3))
        rank = torch.empty_like(nibbles)
        rank[..., SHUFFLED] = nibbles
        return by_row(rank.to(torch.uint8), strips)[:rows, :cols], None
    mask = t["mask"][..., None, None]
    keep = (mask >> bit_of_column(mask.device) & 1).bool()
    if meta["format"] == "nm":
        positions = to_nibbles(t["codes"].unflatten(-1, (2, 2)))[..., [0, 2, 4, 6, 1, 3, 5, 7]]
        words = positions[..., None, :]                     # (tiles, 32, 2, 2, 1, 8)
        place = nm_place(keep.unflatten(-2, (2, 2)))
        rank = words.expand_as(place).gather(-1, place.clamp(0, 7)).flatten(-3, -2)
    else:
        place = t["start"].long()[:, None] + t["at"].long()
        index = nibble_index(place, keep).clamp(0, 8 * len(t["codes"]) - 1)
        rank = t["codes"].long()[index >> 3] >> 4 * (index & 7) & 15
    rank = torch.where(keep, rank, 0).to(torch.uint8)
    return by_row(rank, strips)[:rows, :cols], by_row(keep, strips)[:rows, :cols]


def from_fragments(fragments: Fragments) -> Packed:
    """What was packed, on the CPU. Slow: for saving."""
    meta, t = fragments.meta, fragments.tensors
    codes, keep = fragment_ranks(Fragments({name: v.cpu() for name, v in t.items()}, meta))
    if meta["grid"] == "offset":
        codes = torch.from_numpy(from_rank(codes.numpy(), 4))
    mask = None
    if keep is not None:
        codes = codes * keep
        mask = ~keep
    scale = t["scale"].float().cpu()
    zero = t["zero"].float().cpu()
    return pack(codes, mask, scale, zero, 4, meta["grid"], meta["groupsize"], meta["format"])
