"""Codes to bits and back, in numpy: ranks of levels, bitmaps, streams of kept codes, eight codes to
a few bytes.

The pieces of packing.py and unpacking.py; the layouts are drawn in packing.py.
"""
import numpy as np
import torch

KEPT = (np.arange(256)[:, None] >> np.arange(8)) & 1        # (256, 8) the bits of every mask byte
SHUFFLED = [0, 2, 4, 6, 1, 3, 5, 7]                         # columns of a dense word's nibbles


def by_rank(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes of the offset grid -> ranks of their levels, both uint8, any shape: the top bit is the
    sign, and -(k + zero) gets top - 1 - k, +(k + zero) gets top + k.

    3 bits: code    7  6  5  4    0  1  2  3
            level  -3 -2 -1 -0   +0 +1 +2 +3      (and zero)
            rank    0  1  2  3    4  5  6  7
    """
    top = 1 << (bits - 1)
    is_negative = codes & top
    all_bits = 2 * top - 1
    return np.where(is_negative, codes ^ all_bits, codes ^ top).astype(np.uint8)


def from_rank(ranks: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of by_rank."""
    top = 1 << (bits - 1)
    is_positive = ranks & top
    all_bits = 2 * top - 1
    return np.where(is_positive, ranks ^ top, ranks ^ all_bits).astype(np.uint8)


def to_bitmap(keep: np.ndarray) -> torch.Tensor:
    """(rows, columns) bool -> (rows, columns / 32) int32, column j at bit j % 32."""
    packed = np.packbits(np.ascontiguousarray(keep), axis=1, bitorder="little")
    return torch.from_numpy(packed.view(np.int32))


def compact(codes: np.ndarray, keep: np.ndarray, counts: np.ndarray, starts: np.ndarray,
            words: int) -> np.ndarray:
    """The kept codes in memory order -> a stream (8 * words,) uint8 with zeros between: part i of
    them, counts[i] codes, lies from 8 * starts[i] on."""
    stream = np.zeros(8 * words, np.uint8)
    stream[places_of(counts, 8 * starts)] = codes[keep]
    return stream


def places_of(counts: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """begins[0], begins[0] + 1, ... counts[0] of them, then begins[1], and so on, as one row."""
    before = counts.cumsum() - counts                       # how many come before each part
    places = np.repeat(begins - before, counts)
    places += np.arange(len(places))
    return places


def to_bits(codes: np.ndarray, bits: int, rows: int) -> torch.Tensor:
    """Eight codes -> `bits` bytes, the first code in the lowest bits, in `rows` rows. 4-bit codes
    become int32 words, others bytes."""
    word = np.zeros(codes.size // 8, np.uint64)             # of eight codes each
    for i, ith in enumerate(codes.reshape(-1, 8).T):
        word |= ith.astype(np.uint64) << np.uint64(bits * i)
    filled = word.view(np.uint8).reshape(-1, 8)[:, :bits]   # the other bytes are empty
    packed = np.ascontiguousarray(filled).reshape(rows, -1)
    return torch.from_numpy(packed.view(np.int32) if bits == 4 else packed)


def from_bits(packed: np.ndarray, bits: int) -> np.ndarray:
    """The inverse: (rows, words) int32 or (rows, bytes) uint8 -> (rows, codes) uint8."""
    blocks = packed.view(np.uint8).reshape(-1, bits)
    word = np.zeros((len(blocks), 8), np.uint8)
    word[:, :bits] = blocks
    shifts = np.uint64(bits) * np.arange(8, dtype=np.uint64)
    codes = (word.view(np.uint64) >> shifts) & np.uint64((1 << bits) - 1)       # (words, 8)
    return codes.astype(np.uint8).reshape(len(packed), -1)


def shuffle(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes in the order in which dense words hold them: 4-bit ones as SHUFFLED, others as they
    are."""
    return codes.reshape(-1, 8)[:, SHUFFLED] if bits == 4 else codes
