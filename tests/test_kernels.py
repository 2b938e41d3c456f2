"""PackedLinear on the CPU; Triton kernels in the interpreter; compilation for GPUs that are not
there.

    python -m pytest -q tests/test_kernels.py
"""
import copy
import csv
import itertools
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from kernels.cpu_bags import Bags
from kernels.linear import PackedLinear, triton_reads
from kernels.packing import nbytes, pack
from kernels.reference import dequantize
from kernels.unpacking import unpack
from test_packing import example

TESTS = Path(__file__).resolve().parent
FORMATS = ("dense", "nm", "unstructured")
GRIDS = ("uniform", "offset")


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


def layer(shape=(64, 256), grid="uniform", groupsize=-1, format="unstructured", bits=4, bias=False):
    codes, mask, scale, zero = example(shape, bits, grid, groupsize, format)
    zero = zero.floor() if grid == "uniform" else zero
    packed = pack(codes, mask, scale, zero, bits, grid, groupsize, format)
    return PackedLinear(packed, torch.randn(shape[0]) if bias else None)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_reference_equals_unpack(bits, grid, format):
    for shape, groupsize in (((5, 4100), -1),
                             ((33, 130), 32),
                             ((3, 8), -1),
                             ((4, 64), 32),
                             ((16, 576), 128)):
        packed = pack(*example(shape, bits, grid, groupsize, format), bits, grid, groupsize, format)
        assert torch.equal(dequantize(packed), unpack(packed))
    order = torch.arange(96) % 3
    packed = pack(*example((8, 96), bits, grid, 32, format), bits, grid, 32, format, order)
    assert torch.equal(dequantize(packed), unpack(packed))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float32, 1e-6),
    (torch.float16, 5e-4),
    (torch.bfloat16, 6e-3),
])
def test_linear_on_the_cpu(dtype, tolerance, grid, format):
    for groupsize, tokens, shape in ((-1, 1, (64, 256)),
                                     (64, 4, (64, 256)),
                                     (64, 4, (64, 96)),         # the last group is half of one
                                     (-1, 80, (64, 256)),
                                     (-1, 3, (33, 130))):
        packed = layer(shape, grid, groupsize, format, bias=True).to(dtype)
        x = torch.randn(1, tokens, shape[1]).to(dtype)
        weight = packed.weight_dequantized(torch.float64)
        exact = x.double() @ weight.T + packed.bias.double()
        y = packed(x)
        assert y.dtype == dtype
        assert y.shape == (1, tokens, shape[0])
        assert (y.double() - exact).norm() < tolerance * exact.norm()
        packed.fused = False
        assert (packed(x).double() - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_bit_widths_multiply_too(bits):
    packed = layer(bits=bits)
    x = torch.randn(2, 256)
    dense = F.linear(x, packed.weight_dequantized(torch.float32))
    assert torch.allclose(packed(x), dense, rtol=1e-4, atol=1e-5)
    for dtype in (torch.float16, torch.bfloat16):
        assert packed(x.to(dtype)).dtype == dtype


def test_one_token_in_float64_is_exact():
    packed = layer(bias=True).double()
    x = torch.randn(1, 256, dtype=torch.float64)
    dense = F.linear(x, packed.weight_dequantized(torch.float64), packed.bias)
    assert (packed(x) - dense).abs().max() < 1e-12
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(x).dtype == torch.float64


def test_decoding_with_groups_in_another_order():
    parts = example((64, 256), 4, "uniform", 64, "dense")
    packed = PackedLinear(pack(*parts, 4, "uniform", 64, g_idx=torch.arange(256) % 4))
    x = torch.randn(1, 256).bfloat16()
    dense = x.float() @ packed.weight_dequantized(torch.float32).T
    assert (packed(x) - dense).norm() < 0.02 * dense.norm()


def test_nothing_of_a_layer_asks_for_a_gradient():
    assert not any(p.requires_grad for p in layer(bias=True).parameters())


def test_gradients_of_the_input():
    for format in FORMATS:
        packed = layer((8, 64), "offset", format=format)
        x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(packed, x)
        x = torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True)
        packed(x).sum().backward()
        exact = packed.weight_dequantized(torch.float64).sum(0).expand(3, 64)
        assert (x.grad.double() - exact).norm() < 4e-3 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_batch_and_any_strides(dtype):
    """No tokens, one without a batch dimension, and views: the same as their copies."""
    packed = layer(grid="offset", bias=True).to(dtype)
    wide = torch.randn(2, 4, 512).to(dtype)
    assert packed(wide[:0, :, :256]).shape == (0, 4, 64)
    assert packed(wide[0, 0, :256]).shape == (64,)
    views = (
        wide[:, :, 3:259],
        wide[:, ::2, ::2],
        wide[0].t()[:256].t(),
        wide[:1, :1, :256].expand(3, 5, 256),
    )
    for view in views:
        assert torch.equal(packed(view), packed(view.contiguous()))


@pytest.mark.parametrize("fused", [True, False])
def test_nothing_dense_is_saved_for_backward(fused):
    packed = layer((64, 256))
    packed.fused = fused
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        packed(torch.randn(5, 256, requires_grad=True)).sum()
    assert not any(t.numel() >= 64 * 256 for t in kept)


def test_decoding_makes_a_small_form_and_counts_it():
    packed = layer((64, 256))
    x = torch.randn(1, 256)
    packed(x.expand(65, -1))
    packed(x.requires_grad_())
    assert packed.decode_bytes() == 0                       # neither is a decoding step
    x = x.detach()

    def bits(made):
        return 8 * made.decode_bytes() / (64 * 256)

    for grid, bags, int4 in (("uniform", 4, 4),             # zero is a level,
                             ("offset", 6, 8)):             # or it is not
        made = layer((64, 256), grid)
        made(x)
        assert bags <= bits(made) < bags + 2, grid          # 64 outputs a strip: long for its grid
        made(x.bfloat16())
        assert int4 <= bits(made) < 1.2 * int4, grid
    odd = layer((33, 130))
    odd(torch.randn(1, 130).bfloat16())
    assert odd.decode_bytes() < 33 * 130                    # no shape for torch's int4
    eight = layer(bits=8)
    eight(x)
    assert eight.decode_bytes() == 64 * 256 * 4
    eight.to(torch.float32)                                 # moving drops it
    assert eight.decode_bytes() == 0
    eight.fused = False
    eight(x)
    assert eight.decode_bytes() == 0
    packed.decode_cache = False
    packed(x.bfloat16())
    assert packed.decode_bytes() == 0
    stored = sum(b.numel() * b.element_size() for b in packed.buffers())
    assert stored == nbytes(packed.packed)


@pytest.mark.parametrize("bits, most", [(2, 0.008), (3, 0.008), (4, 0.03)])
def test_decoding_groups_loses_no_more_than_bf16_does(bits, most):
    """Inputs of mean 1, where what the codes share would be two large sums that must cancel."""
    codes, mask, scale, zero = example((64, 256), bits, "uniform", 64, "dense")
    g = torch.Generator().manual_seed(0)
    zero = (torch.rand(zero.shape, generator=g) + (1 << bits - 1) - 1).half()
    packed = PackedLinear(pack(codes, mask, scale, zero, bits, "uniform", 64))
    x = torch.randn(3, 256, generator=g).add_(1).bfloat16()
    want = x.double() @ packed.weight_dequantized(torch.float32).double().T
    got = packed(x).double()
    assert packed.decode_bytes() > 0
    assert (got - want).norm() < most * want.norm()


def test_a_layer_that_is_saved_takes_no_processors_layout_along():
    packed = layer((64, 256))
    packed(torch.randn(1, 256).bfloat16())
    assert packed.decode_bytes() > 0
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert other.decode_bytes() == 0
        x = torch.randn(1, 256).bfloat16()
        assert torch.equal(other(x), packed(x))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_bags_are_exact_in_fp32(bits):
    """Every grid and grouping, groups in any order too, more outputs than a strip has, against
    float64."""
    shapes = (((200, 576), 128), ((33, 130), 32), ((5, 8), -1))
    for grid, format, (shape, groupsize) in itertools.product(GRIDS, FORMATS, shapes):
        for shuffled in (False, True) if groupsize > 0 else (False,):
            codes, mask, scale, zero = example(shape, bits, grid, groupsize, format)
            g_idx = torch.randperm(shape[1]) // groupsize if shuffled else None
            x = torch.randn(2, shape[1])
            for each in (zero, zero.round()):
                packed = pack(codes, mask, scale, each, bits, grid, groupsize, format, g_idx)
                exact = x.double() @ unpack(packed, torch.float64).T
                assert (Bags(packed)(x) - exact).norm() < 4e-6 * exact.norm()


def test_bags_on_two_threads_equal_one(monkeypatch):
    packed = layer(grid="offset").packed
    x = torch.randn(2, 256)
    whole = Bags(packed)(x)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert torch.equal(Bags(packed)(x), whole)


def test_autocast_multiplies_in_its_own_dtype():
    """As nn.Linear does: fp32 activations are cast, the output is bf16, and the gradient comes back
    in fp32."""
    packed = layer(grid="offset", bias=True)
    x = torch.randn(70, 256, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = packed(x)
        dense = F.linear(x, packed.weight_dequantized(torch.float32), packed.bias)
        assert y.dtype == dense.dtype == torch.bfloat16
        y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert (y - dense).abs().max() < 2e-2 * dense.abs().max()
    x = torch.randn(70, 256).half()
    with torch.autocast("cpu", torch.float16):              # computed in fp32, as without
        y = packed(x)
    assert torch.equal(y, packed(x))


def test_a_model_that_is_compiled_goes_around_packed_layers():
    packed = layer(bias=True)
    x = torch.randn(70, 256)
    program = torch.compile(lambda x: packed(x * 2).relu() + 1, backend="eager")
    assert torch.equal(program(x), packed(x * 2).relu() + 1)


def test_moving_to_another_dtype_keeps_the_grid():
    packed = layer()
    weight = packed.weight_dequantized(torch.float32)
    assert torch.equal(packed.to(torch.bfloat16).weight_dequantized(torch.float32), weight)
    assert packed.scale.dtype == torch.float16
    other = layer(grid="uniform")
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other.weight_dequantized(torch.float32), weight)


def test_other_weights_replace_the_decode_cache():
    packed = layer(format="nm")
    other = layer(format="nm")
    x = torch.randn(1, 256)
    other.codes.bitwise_not_()
    other.zero.fill_(100)
    before = packed(x)
    packed.load_state_dict(other.state_dict())
    assert torch.equal(packed(x), other(x))
    assert not torch.allclose(packed(x), before)
    before = packed(x)
    packed.scale.mul_(2)                                # in place
    assert torch.equal(packed(x), 2 * before)
    buffers = {name: t * 2 if name == "scale" else t for name, t in packed.named_buffers()}
    assert torch.equal(torch.func.functional_call(packed, buffers, (x,)), 4 * before)
    assert torch.equal(packed(x), 2 * before)


def test_layers_made_in_inference_mode_decode_and_take_other_weights():
    """Their tensors count no versions."""
    with torch.inference_mode():
        packed, other = layer(format="nm"), layer(format="nm")
        x = torch.randn(1, 256)
        other.zero.fill_(100)
        before = packed(x)
        packed.load_state_dict(other.state_dict())
        assert torch.equal(packed(x), other(x))
        assert not torch.allclose(packed(x), before)


def test_integers_are_not_multiplied():
    with pytest.raises(TypeError, match="x is of type torch.int64"):
        layer()(torch.ones(2, 256, dtype=torch.int64))


def test_a_layer_without_memory_can_be_given_some():
    """to_empty of a layer on the meta device."""
    packed = layer()
    filled = copy.deepcopy(packed).to("meta").to_empty(device="cpu")
    filled.load_state_dict(packed.state_dict())
    x = torch.randn(3, 256)
    assert torch.equal(filled(x), packed(x))


def test_triton_gets_only_four_bits_in_neighbouring_groups():
    for grid, zero, groupsize in (("uniform", 300, -1),
                                  ("offset", 40, -1),
                                  ("uniform", 8, 20)):
        codes, mask, scale, zeros = example((8, 64), 4, grid, groupsize, "nm")
        same = torch.full_like(zeros, zero)
        assert triton_reads(pack(codes, mask, scale, same, 4, grid, groupsize))
    assert not triton_reads(pack(*example((8, 64), 3, "uniform", -1, "nm"), 3))
    g_idx = torch.arange(64) % 4
    parts = example((8, 64), 4, "uniform", 16, "nm")
    assert not triton_reads(pack(*parts, 4, "uniform", 16, g_idx=g_idx))


def test_a_nibble_lies_where_fragments_draws_it():
    """The example of its docstring: row 5, column 83, of which the row keeps two columns before."""
    from kernels.fragments import from_fragments, to_fragments
    mask = torch.ones(16, 128, dtype=torch.bool)
    codes = torch.zeros(16, 128, dtype=torch.uint8)
    for column, code in ((80, 3), (82, 7), (83, 9)):
        mask[5, column] = False
        codes[5, column] = code
    ones = torch.ones(16, 1)
    packed = pack(codes, mask, ones, ones, 4, format="nm")
    fragments = to_fragments(packed)
    words = fragments.tensors["codes"].long() & 0xFFFFFFFF
    bits = fragments.tensors["mask"].long() & 0xFFFFFFFF
    assert words.shape == (1, 32, 4)
    assert bits.shape == (1, 32, 2)
    assert int(bits[0, 21, 0]) == 1 << 2 | 1 << 10 | 1 << 14
    assert int(bits.sum()) == int(bits[0, 21, 0])           # and no other bit is set
    assert int(words[0, 21, 1]) == 3 | 7 << 8 | 9 << 4 * 2 * 2
    assert int(words.sum()) == int(words[0, 21, 1])
    back = from_fragments(fragments)
    assert all(torch.equal(back.tensors[name], t) for name, t in packed.tensors.items())


def run(*command, **environment):
    result = subprocess.run([sys.executable, *command], cwd=TESTS.parent,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    return result.stdout


def test_import_needs_no_triton():
    run("-c", "import sys; sys.modules['triton'] = None; import kernels, torch; "
              "from kernels import pack, PackedLinear")


def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    said = run(str(TESTS / "kernels_interpreted.py"), TRITON_INTERPRET="1")
    assert "layers agree" in said


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("grid", GRIDS)
def test_kernels_on_a_gpu(grid, format):
    """Forward and backward against float64, and no room taken for a dense weight."""
    cases = [                                               # shape, tokens, groupsize
        ((64, 256), 1, -1),
        ((33, 130), 5, -1),
        ((40, 576), 16, 128),
        ((64, 160), 40, 32),
        ((70, 400), 200, -1),
        ((4096, 11008), 1, -1),
        ((4096, 11008), 24, 128),
    ]
    dtypes = ((torch.float16, 2 ** -10), (torch.bfloat16, 2 ** -6))
    for (shape, tokens, groupsize), (dtype, tolerance) in itertools.product(cases, dtypes):
        packed = layer(shape, grid, groupsize, format).cuda()
        x = torch.randn(2, tokens, shape[1], device="cuda", dtype=dtype, requires_grad=True)
        dy = torch.randn(2, tokens, shape[0], device="cuda", dtype=dtype)
        packed(x[:, :0])                                    # reorders the weight
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = packed(x)
        if shape[0] == 4096:
            taken = torch.cuda.max_memory_allocated() - before
            assert taken < 2 * y.nbytes + 1e6
        y.backward(dy)
        if shape[0] == 4096:                                # a slab
            taken = torch.cuda.max_memory_allocated() - before
            assert taken < 0.7 * 2 * shape[0] * shape[1]
        weight = packed.weight_dequantized(torch.float64)
        for got, exact in ((y, x.double() @ weight.T),
                           (x.grad, dy.double() @ weight)):
            assert (got.double() - exact).abs().max() < tolerance * exact.abs().max()


def test_bench_prints_a_line_per_case():
    options = "--device cpu --shapes 64x128 33x130 --batches 1 70 --repeats 1".split()
    printed = run("-m", "bench.kernels", *options).splitlines()
    lines = [line for line in printed if "F.linear" in line]
    assert len(lines) == 2 * 3 * 2 * 2
    for line in lines:
        took = float(re.search(r"([\d.]+) us ", line)[1])
        limit = float(re.search(r"limit +([\d.]+) us", line)[1])
        share = float(re.search(r"share +([\d.]+)", line)[1])
        assert share == pytest.approx(limit / took, abs=0.02 + 0.1 / took), line
        assert float(line.split()[-1]) < 0.01, line
        int4 = "64x128" in line and line.split()[2:4] == ["1", "forward"]
        assert ("nan x torch" in line) != int4, line        # no other case fits torch's int4


# instructions and, of them, ALU instructions a weight: fp16, one grid a row, up to 8 tokens,
# 4096 x 11008
MOST = {
    ("dense", "uniform"): (1.8, 1.25),
    ("nm", "uniform"): (2.7, 2.1),
    ("unstructured", "uniform"): (3.8, 2.8),
    ("dense", "offset"): (2.45, 1.75),
    ("nm", "offset"): (3.5, 2.6),
    ("unstructured", "offset"): (4.6, 3.3),
}


@pytest.mark.parametrize("arch, tokens, format, grid", [
    (90, 8, "nm", "uniform"),
    (90, 8, "unstructured", "offset"),
    (80, 8, "unstructured", "uniform"),
    (90, 16, "nm", "offset"),
    (90, 0, "unstructured", "offset"),
])
def test_kernels_compile_as_cheap_as_the_table_says(arch, tokens, format, grid):
    """In this version of triton: `python -m kernels.compile` does all of them."""
    pytest.importorskip("triton")
    from kernels import compile
    variant = compile.Variant(arch, tokens, format, grid, "fp16", 0, compile.LAYER)
    line = compile.row(variant)
    cheap(line)
    for held in compile.table():
        if compile.key_of(held) == compile.key_of(line):
            assert float(line["per_weight"]) <= 1.03 * float(held["per_weight"]), line
            assert float(line["alu"]) <= 1.03 * float(held["alu"]), line


def cheap(line: dict[str, str]) -> None:
    """A register or two, on the stack from before the loop to its end; inside are no other loads
    than those of words and x."""
    spilled = int(line["spilled"])
    assert spilled <= 16, line
    if spilled and line["tokens"] == "8" and line["group"] == "row":
        assert line["format"] != "unstructured", line
        assert line["lsu"] == "0.094", line
    if line["counted"] == "loop":
        assert line["exchanges"] == line["barriers"] == "0", line
    case = [line[k] for k in ("tokens", "x", "group", "shape")]
    if case == ["8", "fp16", "row", "4096x11008"]:
        instructions, alu = MOST[line["format"], line["grid"]]
        assert float(line["per_weight"]) <= instructions, line
        assert float(line["alu"]) <= alu, line


def test_table_holds_every_kernel_in_two_versions():
    pytest.importorskip("triton")
    from kernels import compile
    lines = compile.table()
    versions = {line["triton"] for line in lines}
    assert "3.6.0" in versions
    assert len(versions) == 2
    keys = {compile.key_of(line) for line in lines}
    assert len(keys) == len(lines)
    assert len(lines) == 2 * len(list(compile.variants()))
    for line in lines:
        cheap(line)


def test_predictions_come_from_the_table():
    """More bandwidth or a shorter kernel is faster, and each time is at least what memory
    allows."""
    pytest.importorskip("triton")
    from kernels import predict
    gpu = predict.GPUS["H100"]
    shape = (4096, 11008)
    for line in run("-m", "kernels.predict", "--gpu", "H100").splitlines():
        if line.startswith("H100") and "tokens" not in line:
            _, format, grid, tokens, us, times, *_ = line.split()
            seconds = float(us) * 1e-6
            least = predict.moved(shape, int(tokens), predict.BITS[format]) / gpu.memory
            assert seconds > least, line
            fp16 = predict.cublas(gpu, shape, int(tokens), gpu.memory) + predict.FIXED
            assert float(times) == pytest.approx(fp16 / seconds, rel=0.02), line
    lines = predict.lines_of("3.6.0", 90, "nm", "uniform")
    seconds, bound = predict.packed(gpu, shape, 1, lines, 3.0)
    assert bound in ("alu", "memory", "issue", "l1")
    slow = gpu._replace(memory=gpu.memory / 100)
    slower, by = predict.packed(slow, shape, 1, lines, 3.0)
    assert by == "memory"
    assert slower > seconds
    with pytest.raises(ValueError, match="has no line of triton 1.0"):
        predict.lines_of("1.0", 90, "nm", "uniform")


def test_predictions_are_what_an_h200_took():
    """The packed products and those of cuBLAS in bench/h200.csv."""
    pytest.importorskip("triton")
    from kernels import predict
    gpu = predict.GPUS["H200"]
    with open(TESTS.parent / "bench/h200.csv", newline="") as f:
        measured = [line for line in csv.DictReader(f) if line["kind"] == "product"]
    assert len(measured) == 12
    for line in measured:
        size, format, grid, _, tokens, _ = line["case"].split()
        shape = tuple(map(int, size.split("x")))
        tokens = int(tokens)
        lines = predict.lines_of("3.6.0", 90, format, grid)
        seconds, _ = predict.packed(gpu, shape, tokens, lines, predict.BITS[format])
        assert seconds == pytest.approx(float(line["value"]), rel=0.2), line
        fp16 = predict.cublas(gpu, shape, tokens, gpu.memory) + predict.FIXED
        assert fp16 == pytest.approx(float(line["fp16"]), rel=0.2), line


def test_a_gpu_day_without_a_gpu(tmp_path):
    """One clear line, no file; the order of the cases; lines are written at once and nothing begins
    after the time."""
    from bench import day
    if not torch.cuda.is_available():
        table = tmp_path / "gpu.csv"
        command = [sys.executable, "-m", "bench.kernels", "--minutes", "8", "--out", str(table)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent)
        assert result.returncode == 1
        assert not table.exists()
        assert result.stderr.count("\n") == 1
        assert "torch finds none here" in result.stderr
    cases = day.cases()
    assert len(set(cases)) == len(cases)
    assert str(cases[0]) == "4096x11008 nm uniform batch 1 forward"
    ways = ("forward", "backward")
    whole = itertools.product(day.SHAPES, day.FORMATS, day.GRIDS, day.BATCHES, ways)
    assert {case[:5] for case in cases} == set(whole)

    path = tmp_path / "day.csv"
    clock = iter(range(10))
    record = day.Record(path)
    seen = []

    def measure():
        record.add("product", cases[0], 1e-5, 3e-5)
        seen.append(path.read_text().splitlines())

    def fail():
        raise RuntimeError("out of memory\nand more")

    work = [
        ("a", measure),
        ("b", fail),
        ("c", measure),
        ("d", measure),
        ("e", fail),
    ]
    day.until(3, work, record, lambda: next(clock))
    assert [len(lines) for lines in seen] == [2, 4]
    assert seen[0][1] == f"product,{cases[0]},1e-05,3e-05,"
    lines = path.read_text().splitlines()
    assert lines[2] == "failed,b,RuntimeError: out of memory,,"
    assert lines[4] == 'left out,"2 cases, from d on",no time left,,'


def test_checks_of_a_gpu_day_notice_a_wrong_kernel(tmp_path, monkeypatch):
    from bench import day
    monkeypatch.setattr(day, "CHECKS", (((16, 128), -1, (1, 12), torch.float16),))
    monkeypatch.setattr(day, "FORMATS", ("nm",))
    day.check_all(day.Record(tmp_path / "right.csv"), torch.device("cpu"))
    right = PackedLinear.multiply
    monkeypatch.setattr(PackedLinear, "multiply", lambda self, x: right(self, x) * 1.01)
    with pytest.raises(ValueError, match="a kernel is wrong on this GPU"):
        day.check_all(day.Record(tmp_path / "wrong.csv"), torch.device("cpu"))

    def fail(self, x):
        raise RuntimeError("out of registers\nand more")
    monkeypatch.setattr(PackedLinear, "multiply", fail)
    with pytest.raises(ValueError, match="RuntimeError: out of registers$"):
        day.check_all(day.Record(tmp_path / "failed.csv"), torch.device("cpu"))
    assert 'failed,"check of nm ' in (tmp_path / "failed.csv").read_text()


def test_bench_takes_the_gpu_that_is_current(monkeypatch):
    """Without an index torch.cuda.set_device refuses it."""
    from bench import kernels
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def machine(device):
        raise ValueError(f"reached with {device}")
    monkeypatch.setattr(kernels, "machine", machine)
    args = SimpleNamespace(minutes=None, out=None, device=None, dtype=None, generate=None,
                           tune=None)
    with pytest.raises(ValueError, match="reached with cuda$"):
        kernels.main(args)


def test_predictions_without_triton_end_in_a_line(tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError('No module named triton')")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "-m", "kernels.predict"], capture_output=True,
                            text=True, cwd=TESTS.parent, env=env)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
