"""Codes to bits and back, in numpy: ranks of levels, bitmaps, streams of kept codes, eight codes to a few bytes.

The pieces of packing.py and unpacking.py; the layouts are drawn in packing.py.
"""
import numpy as np
import torch

KEPT = (np.arange(256)[:, None] >> np.arange(8)) & 1        # (256, 8) the bits of every mask byte


def by_rank(n: np.ndarray, bits: int) -> np.ndarray:
    """Codes of the offset grid -> ranks of their levels: -(k + zero) -> top - 1 - k, +(k + zero) -> top + k."""
    top = 1 << (bits - 1)
    return np.where(n & top, n ^ (2 * top - 1), n ^ top).astype(np.uint8)


def from_rank(n: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of by_rank."""
    top = 1 << (bits - 1)
    return np.where(n & top, n ^ top, n ^ (2 * top - 1)).astype(np.uint8)


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
