"""Packed weights back to dense ones on the CPU, fast: a 4096 x 11008 matrix in less than 0.2 s on one core.

The reference of every kernel, and the CPU's own path for large batches. A row is worked on in three strides, each a few
numpy calls over a block of rows. Blocks are spread over as many threads as torch uses.

    window   for every mask byte, the 8 nibbles from its first kept code on      (a b c d . . . .)
    spread   nibbles move left by 4, 2 and 1 places to the columns that kept them (a . b c . . . d)
    levels   every byte, two ranks, is looked up in its row's 256 pairs of dequantized values; pruned ones are cleared

Codes of 2, 3 or 8 bits and grouped grids take a slower, plainer way: one look-up per weight.
"""
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch

from kernels.bits import KEPT, from_bits, from_rank
from kernels.packing import Packed, groups_of

BLOCK = 1 << 20                                             # weights unpacked at a time; with fewer, threads wait for Python
INT = {2: np.int16, 4: np.int32, 8: np.int64}               # numpy has no bfloat16: move values as integers


@cache
def move_masks() -> list[tuple[int, np.ndarray]]:
    """For shifts of 4, 2 and 1 nibbles: (256,) the nibbles that the shift fills, for every mask byte.

    The i-th kept column lies at p >= i, so its nibble travels p - i places: the binary digits of p - i say which
    shifts."""
    masks = {4: np.zeros(256, np.uint32), 2: np.zeros(256, np.uint32), 1: np.zeros(256, np.uint32)}
    for byte in range(256):
        for i, column in enumerate(np.flatnonzero(KEPT[byte])):
            place = i
            for shift in masks:
                if (column - i) & shift:
                    place += shift
                    masks[shift][byte] |= np.uint32(0xF << 4 * place)
    return list(masks.items())


def spread(window: np.ndarray, byte: np.ndarray) -> np.ndarray:
    """window uint32: nibbles in a row -> nibbles at the columns that `byte` keeps; the others hold anything."""
    byte = byte.astype(np.intp)
    for shift, table in move_masks():
        moved = window << np.uint32(4 * shift)
        moved ^= window
        moved &= np.take(table, byte)
        window = window ^ moved
    return window


def windows(packed: Packed, rows: slice, byte: np.ndarray) -> np.ndarray:
    """(rows, bytes) uint32: the 8 nibbles from the first kept code of every mask byte on."""
    count = np.bitwise_count(byte)
    if packed.meta["format"] == "nm":
        low = packed.tensors["codes"][rows].numpy().view(np.uint32)
        return np.stack((low, low >> (np.uint32(4) * count[:, ::2])), 2).reshape(byte.shape)
    starts = packed.tensors["row_start"][rows].numpy()
    place = np.empty(byte.shape, np.int64)
    place[:, 0], place[:, 1:] = 8 * (starts - starts[0]), count[:, :-1]
    np.cumsum(place, 1, out=place)                                                  # kept codes before every byte
    last = starts[0] + (int(place[-1, -1]) >> 3)
    words = packed.tensors["codes"].numpy().view(np.uint32)[starts[0]:last + 2].astype(np.int64)
    twice = words[:-1] | words[1:] << 32                                            # every word with its successor
    return (np.take(twice, place >> 3) >> ((place & 7) << 2)).astype(np.uint32)


def unshuffle(word: np.ndarray) -> np.ndarray:
    """Dense words, columns 0 2 4 6 1 3 5 7 -> 0 1 2 3 4 5 6 7, by exchanging bytes, then nibbles."""
    for shift, where in ((8, 0x0000FF00), (4, 0x00F000F0)):
        t = (word ^ word >> np.uint32(shift)) & np.uint32(where)
        word = word ^ t ^ t << np.uint32(shift)
    return word


def mask_bytes(packed: Packed, rows: slice = slice(None)) -> np.ndarray:
    return packed.tensors["mask"][rows].numpy().view(np.uint8)


def ranks(packed: Packed, rows: slice) -> np.ndarray:
    """(rows, columns and padding) uint8: the rank of every weight; anything where pruned."""
    bits, format = packed.meta["bits"], packed.meta["format"]
    if bits == 4:
        words = natural_words(packed, rows).view(np.uint8)
        return np.stack((words & 15, words >> 4), 2).reshape(len(words), -1)
    if format == "dense":
        return from_bits(packed.tensors["codes"][rows].numpy(), bits)
    keep = np.unpackbits(mask_bytes(packed, rows), axis=1, bitorder="little").view(bool)
    n = np.zeros(keep.shape, np.uint8)
    if format == "nm":
        stream = from_bits(packed.tensors["codes"][rows].numpy(), bits).reshape(-1, 8)
        kept = keep.reshape(-1, 16).sum(1)
        n[keep] = stream[np.arange(8) < kept[:, None]]
        return n
    kept, starts = keep.sum(1), packed.tensors["row_start"][rows].numpy().astype(np.int64)
    last = int(starts[-1]) + (int(kept[-1]) + 7) // 8
    stream = from_bits(packed.tensors["codes"].numpy()[starts[0] * bits:last * bits].reshape(1, -1), bits)[0]
    place = np.repeat(8 * (starts - starts[0]) - (kept.cumsum() - kept), kept)
    n[keep] = stream[place + np.arange(len(place))]
    return n


def natural_words(packed: Packed, rows: slice) -> np.ndarray:
    """(rows, words) uint32 of 4-bit ranks, column j at nibble j % 8 of word j // 8, whatever the format."""
    if packed.meta["format"] == "dense":
        return unshuffle(packed.tensors["codes"][rows].numpy().view(np.uint32))
    byte = mask_bytes(packed, rows)
    return spread(windows(packed, rows, byte), byte)


def level_table(packed: Packed, dtype: torch.dtype) -> np.ndarray:
    """(out, groups, 2^bits) the dequantized value of every rank, as integers of dtype's size; computed in fp32."""
    bits = packed.meta["bits"]
    scale, zero = (packed.tensors[name].float()[:, :, None] for name in ("scale", "zero"))
    rank = torch.arange(1 << bits)
    if packed.meta["grid"] == "uniform":
        table = scale * (rank - zero)
    else:
        code = torch.from_numpy(from_rank(rank.numpy(), bits)).long()
        top = 1 << (bits - 1)
        table = torch.where(code >= top, -scale, scale) * ((code & (top - 1)) + zero)
    return table.to(dtype).view(getattr(torch, np.dtype(INT[dtype.itemsize]).name)).numpy()


def each_block(packed: Packed, work) -> list:
    """work(rows) for every block of rows, on as many threads as torch uses: numpy lets go of Python while it computes."""
    rows, cols = packed.meta["shape"]
    step = max(1, BLOCK // max(cols, 1))
    parts = [slice(r, min(r + step, rows)) for r in range(0, rows, step)]
    if len(parts) == 1 or torch.get_num_threads() == 1:
        return [work(part) for part in parts]
    return list(threads(torch.get_num_threads()).map(work, parts))


threads = cache(ThreadPoolExecutor)


def unpack(packed: Packed, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """(out, in) on the CPU: the solver's weight, computed in fp32 and rounded once to dtype; pruned weights are +0."""
    (rows, cols), bits, item = packed.meta["shape"], packed.meta["bits"], INT[dtype.itemsize]
    out, levels = np.empty((rows, cols), item), level_table(packed, dtype)
    pairs = bits == 4 and levels.shape[1] == 1 and dtype.itemsize < 8
    groups = None if pairs else groups_of(cols, packed.meta["groupsize"], packed.tensors.get("g_idx")) << bits
    clear = -KEPT.astype(item)                              # (256, 8) all ones where kept

    def work(part):
        table = levels[part]
        if pairs:                                           # (rows, 256) for every byte of two ranks both their values
            wide = table.astype(INT[2 * dtype.itemsize])
            table = wide << 8 * dtype.itemsize
            table = table.transpose(0, 2, 1) | wide & (1 << 8 * dtype.itemsize) - 1
            index = natural_words(packed, part).view(np.uint8)
        else:
            index = ranks(packed, part)[:, :cols] + groups
        index = index + table[0].size * np.arange(len(table))[:, None]
        block = np.take(table, index).view(item)[:, :cols]
        if packed.meta["format"] == "dense":
            out[part] = block
        else:
            keep = np.take(clear.view(f"V{8 * clear.itemsize}")[:, 0], mask_bytes(packed, part)).view(item)
            np.bitwise_and(block, keep[:, :cols], out=out[part])

    each_block(packed, work)
    return torch.from_numpy(out).view(dtype)


def unpack_codes(packed: Packed) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What pack was given: codes (out, in) uint8, 0 where pruned; mask (out, in) bool, True where pruned, or None."""
    cols = packed.meta["shape"][1]
    n = np.concatenate(each_block(packed, lambda part: ranks(packed, part)[:, :cols]))
    codes = torch.from_numpy(from_rank(n, packed.meta["bits"]) if packed.meta["grid"] == "offset" else n)
    if packed.meta["format"] == "dense":
        return codes, None
    keep = torch.from_numpy(np.unpackbits(mask_bytes(packed), axis=1, bitorder="little")[:, :cols].copy()).bool()
    return codes * keep, ~keep
