"""Packed weights back to dense ones on the CPU, fast: a 4096 x 11008 matrix in less than 0.2 s on
one core.

The reference of every kernel, and the CPU's own path for large batches. A row is worked on in three
strides, each a few numpy calls over a block of rows. Blocks are spread over as many threads as
torch uses.

    window   for every mask byte, the 8 nibbles from its first kept code on      (a b c d . . . .)
    spread   nibbles move by 4, 2 and 1 places to the columns that kept them     (a . b c . . . d)
    levels   every byte, two ranks, is looked up in its row's 256 pairs of dequantized values;
             pruned ones are cleared

Codes of 2, 3 or 8 bits and grouped grids take a slower, plainer way: one look-up per weight.
"""
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch

from kernels.bits import KEPT, from_bits, from_rank, places_of
from kernels.packing import Packed, groups_of

BLOCK = 1 << 20                 # weights unpacked at a time; with fewer, threads wait for Python
INT = {2: np.int16, 4: np.int32, 8: np.int64}   # numpy has no bfloat16: move values as integers
ALL_ROWS = slice(None)


# --------------------------------------------------------------------------------------------------
# Ranks of 4 bits at their columns

@cache
def move_masks() -> dict[int, np.ndarray]:
    """{4, 2 or 1 nibbles: (256,) uint32, the nibbles that a shift by so many fills, for every mask
    byte}.

    The i-th kept column lies at p >= i, so its nibble travels p - i places: the binary digits of
    p - i say which shifts."""
    masks = {shift: np.zeros(256, np.uint32) for shift in (4, 2, 1)}
    for byte in range(256):
        for i, column in enumerate(np.flatnonzero(KEPT[byte])):
            place = i
            for shift, filled in masks.items():
                if (column - i) & shift:
                    place += shift
                    filled[byte] |= np.uint32(0xF << 4 * place)
    return masks


def spread(window: np.ndarray, byte: np.ndarray) -> np.ndarray:
    """window uint32: nibbles in a row -> nibbles at the columns that `byte` (uint8, the same shape)
    keeps; the others hold anything."""
    byte = byte.astype(np.intp)
    for shift, filled in move_masks().items():
        moved = window << np.uint32(4 * shift)
        moved ^= window
        moved &= np.take(filled, byte)
        window = window ^ moved                    # moved where it is filled, else as it was
    return window


def windows(packed: Packed, rows: slice, byte: np.ndarray) -> np.ndarray:
    """(rows, bytes) uint32: the 8 nibbles from the first kept code of every mask byte on."""
    count = np.bitwise_count(byte)
    if packed.meta["format"] == "nm":
        first = packed.tensors["codes"][rows].numpy().view(np.uint32)       # (rows, bytes / 2)
        second = first >> (np.uint32(4) * count[:, ::2])    # behind what the even bytes keep
        return np.stack((first, second), 2).reshape(byte.shape)
    starts = packed.tensors["row_start"][rows].numpy()
    place = np.empty(byte.shape, np.int64)         # of each byte's first nibble
    place[:, 0] = 8 * (starts - starts[0])
    place[:, 1:] = count[:, :-1]
    np.cumsum(place, 1, out=place)
    last = starts[0] + (int(place[-1, -1]) >> 3)
    words = packed.tensors["codes"].numpy().view(np.uint32)[starts[0]:last + 2].astype(np.int64)
    twice = words[:-1] | words[1:] << 32           # every word with its successor
    return (np.take(twice, place >> 3) >> ((place & 7) << 2)).astype(np.uint32)


def unshuffle(word: np.ndarray) -> np.ndarray:
    """Dense words, columns 0 2 4 6 1 3 5 7 -> 0 1 2 3 4 5 6 7, by exchanging bytes, then nibbles:

        0 2 4 6 1 3 5 7   ->   0 2 1 3 4 6 5 7   ->   0 1 2 3 4 5 6 7
            --- ---              - -     - -
    """
    for shift, where in ((8, 0x0000FF00), (4, 0x00F000F0)):
        differ = (word ^ word >> np.uint32(shift)) & np.uint32(where)
        word = word ^ differ ^ differ << np.uint32(shift)   # both places change where they differ
    return word


def natural_words(packed: Packed, rows: slice) -> np.ndarray:
    """(rows, words) uint32 of 4-bit ranks, column j at nibble j % 8 of word j // 8, whatever the
    format."""
    if packed.meta["format"] == "dense":
        return unshuffle(packed.tensors["codes"][rows].numpy().view(np.uint32))
    byte = mask_bytes(packed, rows)
    return spread(windows(packed, rows, byte), byte)


def mask_bytes(packed: Packed, rows: slice = ALL_ROWS) -> np.ndarray:
    """(rows, bytes) uint8 of the bitmap."""
    return packed.tensors["mask"][rows].numpy().view(np.uint8)


def kept(packed: Packed, rows: slice = ALL_ROWS) -> np.ndarray:
    """(rows, columns and padding) bool, True where a weight was kept."""
    return np.unpackbits(mask_bytes(packed, rows), axis=1, bitorder="little").view(bool)


# --------------------------------------------------------------------------------------------------
# Ranks of any width

def block_ranks(packed: Packed, rows: slice) -> np.ndarray:
    """(rows, columns and padding) uint8: the rank of every weight of some rows; anything where
    pruned."""
    bits, format = packed.meta["bits"], packed.meta["format"]
    if bits == 4:
        words = natural_words(packed, rows).view(np.uint8)
        return np.stack((words & 15, words >> 4), 2).reshape(len(words), -1)
    codes = packed.tensors["codes"].numpy()
    if format == "dense":
        return from_bits(codes[rows], bits)
    keep = kept(packed, rows)
    n = np.zeros(keep.shape, np.uint8)
    if format == "nm":
        eights = from_bits(codes[rows], bits).reshape(-1, 8)    # of every 16 columns
        count = keep.reshape(-1, 16).sum(1)
        n[keep] = eights[np.arange(8) < count[:, None]]
        return n
    count = keep.sum(1)
    starts = packed.tensors["row_start"][rows].numpy().astype(np.int64)
    last = int(starts[-1]) + (int(count[-1]) + 7) // 8
    stream = from_bits(codes[starts[0] * bits:last * bits].reshape(1, -1), bits)[0]
    n[keep] = stream[places_of(count, 8 * (starts - starts[0]))]
    return n


# --------------------------------------------------------------------------------------------------
# Ranks to values

def level_table(packed: Packed, dtype: torch.dtype) -> np.ndarray:
    """(out, groups, 2^bits) the dequantized value of every rank, as integers of dtype's size;
    computed in fp32."""
    bits = packed.meta["bits"]
    scale = packed.tensors["scale"].float()[:, :, None]
    zero = packed.tensors["zero"].float()[:, :, None]
    rank = torch.arange(1 << bits)
    if packed.meta["grid"] == "uniform":
        table = scale * (rank - zero)
    else:
        code = torch.from_numpy(from_rank(rank.numpy(), bits)).long()
        top = 1 << (bits - 1)
        signed = torch.where(code >= top, -scale, scale)
        table = signed * ((code & (top - 1)) + zero)
    integer = getattr(torch, np.dtype(INT[dtype.itemsize]).name)            # torch.int16, ...
    return table.to(dtype).view(integer).numpy()


def pairs_of(levels: np.ndarray, item: int) -> np.ndarray:
    """(rows, 16) values of `item` bytes each -> (rows, 256), for every byte of two ranks both their
    values in one integer: the value of the low rank in the low half."""
    wide = levels.astype(INT[2 * item])
    high = wide << 8 * item
    low = wide & (1 << 8 * item) - 1
    return (high[:, :, None] | low[:, None, :]).reshape(len(levels), 256)


def each_block(packed: Packed, work) -> list:
    """work(rows) for every block of rows, on as many threads as torch uses: numpy lets go of Python
    while it computes."""
    rows, cols = packed.meta["shape"]
    step = max(1, BLOCK // max(cols, 1))
    parts = [slice(first, min(first + step, rows)) for first in range(0, rows, step)]
    if len(parts) == 1 or torch.get_num_threads() == 1:
        return [work(part) for part in parts]
    return list(threads(torch.get_num_threads()).map(work, parts))


threads = cache(ThreadPoolExecutor)                # one pool for each number of threads, kept


def unpack(packed: Packed, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """(out, in) on the CPU: the solver's weight, computed in fp32 and rounded once to dtype; pruned
    weights are +0."""
    rows, cols = packed.meta["shape"]
    bits, is_dense = packed.meta["bits"], packed.meta["format"] == "dense"
    item = dtype.itemsize
    out = np.empty((rows, cols), INT[item])
    levels = level_table(packed, dtype)            # (rows, groups, 2^bits)
    in_pairs = bits == 4 and levels.shape[1] == 1 and item < 8
    group = groups_of(cols, packed.meta["groupsize"], packed.tensors.get("g_idx"))
    ones = -KEPT.astype(INT[item])                 # (256, 8) all bits set where kept, for each byte
    clear = ones.view(f"V{8 * item}")[:, 0]        # (256,) the same as one piece of memory each

    def work(part: slice) -> None:
        if in_pairs:
            table = pairs_of(levels[part, 0], item)
            index = natural_words(packed, part).view(np.uint8)
        else:
            table = levels[part].reshape(-1, levels[0].size)
            index = block_ranks(packed, part)[:, :cols] + (group << bits)
        count, width = table.shape
        index = index + width * np.arange(count)[:, None]       # into all rows of the table
        block = np.take(table, index).view(INT[item])[:, :cols]
        if is_dense:
            out[part] = block
        else:
            keep = np.take(clear, mask_bytes(packed, part)).view(INT[item])
            np.bitwise_and(block, keep[:, :cols], out=out[part])

    each_block(packed, work)
    return torch.from_numpy(out).view(dtype)


def unpack_codes(packed: Packed) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What pack was given: codes (out, in) uint8, 0 where pruned; mask (out, in) bool, True where
    pruned, or None."""
    cols = packed.meta["shape"][1]
    n = np.concatenate(each_block(packed, lambda part: block_ranks(packed, part)[:, :cols]))
    if packed.meta["grid"] == "offset":
        n = from_rank(n, packed.meta["bits"])
    codes = torch.from_numpy(n)
    if packed.meta["format"] == "dense":
        return codes, None
    keep = torch.from_numpy(kept(packed)[:, :cols].copy())
    return codes * keep, ~keep
