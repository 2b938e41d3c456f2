"""pack and unpack are a pure pair: every format, bit width, grid and grouping, odd shapes, empty
and full rows.

    python -m pytest -q tests/test_packing.py
"""
import json
import time
from types import SimpleNamespace

import pytest
import torch

from kernels import packing, unpacking
from kernels.packing import (bits_per_weight, check_packed, count_kept, nbytes, pack,
                             pack_compressed)
from kernels.unpacking import unpack, unpack_codes

SHAPES = [(32, 576), (5, 4100), (1, 1), (3, 8), (33, 130)]


def dequantize(codes, mask, scale, zero, bits, grid, group):
    """The solver's weight, straight from the definition of the two grids."""
    s = scale[:, group]
    z = zero[:, group]
    if grid == "uniform":
        w = s * (codes.float() - z)
    else:
        top = 1 << (bits - 1)
        sign = torch.where(codes >= top, -1.0, 1.0)
        w = sign * s * ((codes % top).float() + z)
    return w if mask is None else w.masked_fill(mask, 0.0)


def example(shape, bits, grid, groupsize, format, seed=0, groups=None):
    """codes, mask (True where pruned; as the format allows, with empty and full rows), scale,
    zero."""
    g = torch.Generator().manual_seed(seed)
    rows, cols = shape
    groups = groups or (-(-cols // groupsize) if groupsize > 0 else 1)
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=g)
    scale = (torch.rand(rows, groups, generator=g) * 0.1 + 0.01).half().float()
    most = 1 << bits if grid == "uniform" else 1
    zero = (torch.rand(rows, groups, generator=g) * most).half().float()
    mask = None
    if format == "nm":
        order = torch.rand(rows, -(-cols // 16), 16, generator=g).argsort(-1)
        pruned = torch.randint(8, 17, order.shape[:2] + (1,), generator=g)
        mask = (order < pruned).view(rows, -1)[:, :cols].clone()
        mask[0, :16] = torch.arange(16)[:cols] >= 8  # byte 0 full, byte 1 empty, and the reverse
        mask[-1, :16] = torch.arange(16)[:cols] < 8
    elif format == "unstructured":
        mask = torch.rand(shape, generator=g) < torch.rand(rows, 1, generator=g)
        if rows > 2:
            mask[0], mask[-1] = True, False
    return codes if mask is None else codes * ~mask, mask, scale, zero


@pytest.mark.parametrize("format", ["dense", "nm", "unstructured"])
@pytest.mark.parametrize("grid", ["uniform", "offset"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_round_trip(bits, grid, format):
    for shape in SHAPES:
        for groupsize in (-1, 128, 32):
            codes, mask, scale, zero = example(shape, bits, grid, groupsize, format)
            packed = pack(codes, mask, scale, zero, bits, grid, groupsize, format)
            group = torch.arange(shape[1]) // (groupsize if groupsize > 0 else shape[1])
            weight = dequantize(codes, mask, scale, zero, bits, grid, group)
            for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
                got = unpack(packed, dtype).view(torch.uint8)
                assert torch.equal(got, weight.to(dtype).view(torch.uint8))  # what is pruned is +0
            codes_back, mask_back = unpack_codes(packed)
            assert torch.equal(codes_back, codes)
            assert mask_back is None if mask is None else torch.equal(mask_back, mask)
            assert count_kept(packed) == (codes.numel() if mask is None else int((~mask).sum()))
            assert json.loads(json.dumps(packed.meta)) == packed.meta
            assert nbytes(packed) == sum(t.numpy().nbytes for t in packed.tensors.values())
            assert all(t.is_contiguous() for t in packed.tensors.values())  # as files want them


@pytest.mark.parametrize("format", ["dense", "nm", "unstructured"])
@pytest.mark.parametrize("bits", [3, 4])
def test_many_blocks_on_two_threads_equal_one(bits, format, monkeypatch):
    packed = pack(*example((33, 130), bits, "offset", 32, format), bits, "offset", 32, format)
    whole = unpack(packed)
    codes = unpack_codes(packed)[0]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for block in (400, 100):                                # 3 rows at a time, or a long one
        monkeypatch.setattr(unpacking, "BLOCK", block)
        assert torch.equal(unpack(packed), whole)
        assert torch.equal(unpack_codes(packed)[0], codes)


def test_groups_in_another_order():
    codes, mask, scale, zero = example((8, 96), 4, "uniform", 32, "unstructured")
    g_idx = torch.arange(96)[torch.randperm(96, generator=torch.Generator().manual_seed(1))] // 32
    packed = pack(codes, mask, scale, zero, 4, "uniform", 32, g_idx=g_idx)
    assert packed.tensors["g_idx"].dtype == torch.int16
    assert torch.equal(unpack(packed),
                       dequantize(codes, mask, scale, zero, 4, "uniform", g_idx).half())


def test_auto_takes_the_smallest_format():
    def auto(mask):
        codes = torch.zeros(8, 512 if mask is None else mask.shape[1], dtype=torch.uint8)
        return pack(codes, mask, torch.ones(8, 1), torch.zeros(8, 1), 4).meta["format"]
    two_of_four = (torch.arange(512) % 4 < 2).expand(8, 512)
    one_of_four = torch.arange(512) % 4 > 0
    assert auto(two_of_four) == "nm"
    assert auto(one_of_four.expand(8, 512)) == "unstructured"  # nm keeps room for half of them
    g = torch.Generator().manual_seed(0)
    assert auto(torch.rand(8, 512, generator=g) < 0.5) == "unstructured"
    assert auto(None) == "dense"
    ones = torch.ones(8, 1)
    for cols, every, smallest in ((512, 64, "nm"), (512, 16, "unstructured"),   # more pruned
                                  (1032, 9999, "nm"), (40, 9999, "nm")):        # half a word more
        mask = (torch.arange(cols) % 4 < 2) | (torch.arange(cols) % every == 2)
        mask = mask.expand(8, cols)
        codes = torch.zeros(8, cols, dtype=torch.uint8)
        sizes = {format: nbytes(pack(codes, mask, ones, ones, 4, format=format))
                 for format in ("nm", "unstructured")}
        assert auto(mask) == smallest == min(sizes, key=sizes.get)
    for bits, every in ((2, 16), (2, 32), (8, 16), (8, 64)):    # other codes, another balance
        mask = two_of_four | (torch.arange(512) % every == 2)
        codes = torch.zeros(8, 512, dtype=torch.uint8)
        sizes = [nbytes(pack(codes, mask, ones, ones, bits, format=format))
                 for format in ("nm", "unstructured")]
        assert nbytes(pack(codes, mask, ones, ones, bits)) == min(sizes)
    eight_of_64 = torch.arange(64)[None] >= 8                   # the same size in both
    packed = pack(torch.zeros(1, 64, dtype=torch.uint8), eight_of_64, ones[:1], ones[:1], 4)
    assert packed.meta["format"] == "nm"


@pytest.mark.parametrize("format, shape, limit", [
    ("nm", (4096, 4096), 3.01), ("unstructured", (4096, 4096), 3.15),
    ("unstructured", (576, 576), 3.3),
    ("nm", (576, 576), 3.1)])
def test_bits_per_weight_at_half_sparsity(format, shape, limit):
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(shape[0], shape[1] // 16, 16, generator=g).argsort(-1) < 8
    mask = mask.view(shape)
    scale = torch.ones(shape[0], 1)
    zero = torch.zeros(shape[0], 1)
    codes = torch.zeros(shape, dtype=torch.uint8)
    packed = pack(codes, mask, scale, zero, 4, format=format)
    assert bits_per_weight(packed) <= limit


def test_clear_errors():
    codes = torch.zeros(2, 32, dtype=torch.uint8)
    ones = torch.ones(2, 1)
    keep_all = torch.zeros(2, 32, dtype=torch.bool)
    with pytest.raises(ValueError, match="at most 8 of every 16 columns, row 0 keeps 16"):
        pack(codes, keep_all, ones, ones, 4, format="nm")
    nine = torch.arange(32).expand(2, -1) % 16 >= torch.tensor([[8], [9]])
    with pytest.raises(ValueError, match="at most 8 of every 16 columns, row 1 keeps 9"):
        pack(codes, nine, ones, ones, 4, format="nm")
    with pytest.raises(ValueError, match="'nm'"):
        pack(codes, None, ones, ones, 4, format="nm")
    with pytest.raises(ValueError, match="mask .2, 16. and codes .2, 32. must have the same shape"):
        pack(codes, keep_all[:, :16], ones, ones, 4)
    for scale, zero, name in ((ones * 0.1, ones, "scale"), (ones, ones * 0.1, "zero")):
        with pytest.raises(ValueError, match=f"{name} holds values that fp16 cannot"):
            pack(codes, None, scale, zero, 4)
    with pytest.raises(ValueError, match="code 9 does not fit in 3 bits"):
        pack(codes + 9, None, ones, ones, 3)
    for code in (16, 260, -250):                            # 260 and -250: 4 and 6 in a byte
        with pytest.raises(ValueError, match=f"code {code} does not fit in 4 bits"):
            pack(codes.int() + code, None, ones, ones, 4)
    with pytest.raises(ValueError, match="bits=5"):
        pack(codes, None, ones, ones, 5)
    with pytest.raises(ValueError, match="one column per group"):
        pack(codes, None, ones, ones, 4, groupsize=16)
    for scale in (ones * 1e6, ones * torch.inf):
        with pytest.raises(ValueError, match="scale holds values that fp16 cannot"):
            pack(codes, None, scale, ones, 4)
    with pytest.raises(ValueError, match="mask is of type torch.uint8"):
        pack(codes, keep_all.byte(), ones, ones, 4)
    two = torch.ones(2, 2)
    for order, groupsize in ((torch.arange(32) // 16, -1), (torch.arange(16) // 16, 16),
                             (torch.arange(32) // 8, 16), (torch.arange(32) // 16 - 1, 16)):
        with pytest.raises(ValueError, match="g_idx does not fit 32 columns and groupsize"):
            pack(codes, None, two, two, 4, groupsize=groupsize, g_idx=order)


@pytest.mark.parametrize("format", ["nm", "unstructured"])
def test_memory_order_does_not_matter(format):
    parts = example((32, 64), 4, "offset", 32, format)
    want = pack(*parts, 4, "offset", 32, format)
    got = pack(*(part.T.contiguous().T for part in parts), 4, "offset", 32, format)
    assert all(torch.equal(t, want.tensors[name]) for name, t in got.tensors.items())
    assert all(t.is_contiguous() for t in got.tensors.values())


def test_rows_of_whole_words_take_no_word_more():
    mask = torch.arange(32).expand(3, -1) >= torch.tensor([[8], [0], [9]])
    codes = torch.zeros(3, 32, dtype=torch.uint8)
    ones = torch.ones(3, 1)
    packed = pack(codes, mask, ones, ones, 4, format="unstructured")
    assert packed.tensors["row_start"].tolist() == [0, 1, 1]
    assert len(packed.tensors["codes"]) == 1 + 0 + 2 + 2                # readers look ahead


def test_a_stream_too_long_to_count_is_refused(monkeypatch):
    monkeypatch.setattr(packing, "MOST_WORDS", 4)
    codes, mask, scale, zero = example((1, 64), 4, "uniform", -1, "unstructured")
    with pytest.raises(ValueError, match="32 kept weights: .* counts to 32; split the layer"):
        pack(codes, torch.arange(64)[None] >= 32, scale, zero, 4, format="unstructured")


def test_groups_that_are_not_there_are_damage():
    parts = example((8, 64), 4, "uniform", 16, "dense")
    packed = pack(*parts, 4, "uniform", 16, g_idx=torch.arange(64) % 4)
    check_packed(packed, (8, 64))
    for group in (-1, 4):
        packed.tensors["g_idx"][5] = group
        with pytest.raises(ValueError, match="g_idx leaves the 4 groups"):
            check_packed(packed, (8, 64))


def test_what_was_not_quantized_cannot_be_packed():
    with pytest.raises(ValueError, match="nothing was quantized .bits=None."):
        pack_compressed(SimpleNamespace(codes=None))


def test_a_mask_that_keeps_more_than_its_codes_is_damaged():
    packed = pack(*example((8, 64), 4, "uniform", -1, "nm"), 4, format="nm")
    check_packed(packed, (8, 64))
    packed.tensors["mask"][3, 1] |= 0x1FF                   # 9 of 16
    with pytest.raises(ValueError, match="the mask keeps more than 8 of 16 columns"):
        check_packed(packed, (8, 64))


def test_a_large_layer_packs_in_two_seconds():
    mask = torch.rand(4096, 11008) < 0.5
    codes = torch.full(mask.shape, 5, dtype=torch.uint8) * ~mask
    scale = torch.ones(4096, 1)
    start = time.process_time()
    packed = pack(codes, mask, scale, scale, 4, format="unstructured")
    assert time.process_time() - start < 2
    start = time.process_time()
    unpack(packed)
    assert time.process_time() - start < 1
