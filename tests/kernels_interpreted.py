"""Run by test_kernels.py in a process of its own: compiling fails in a process that interprets.

Fragments back to what was packed; every format, grid and grouping with odd shapes and 1 to 64
tokens, forward and backward, against float64 products with the unpacked weight; slabs bit for
bit."""
import copy
import itertools
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch

import kernels.matmul as host
import ptx
from kernels.fragments import from_fragments, to_fragments
from kernels.linear import PackedLinear, PackedMatmul
from kernels.matmul import Plan, matmul, matmul_transposed
from kernels.packing import pack
from kernels.reference import dequantize
from kernels.unpacking import unpack
from test_packing import example

FORMATS = ("dense", "nm", "unstructured")
GRIDS = ("uniform", "offset")
# of the largest output
TOLERANCE = {torch.float16: 2 ** -10, torch.bfloat16: 2 ** -6, torch.float32: 2 ** -20}
HALVES = (torch.float16, torch.bfloat16)
# shape, tokens, groupsize, dtypes, grids: rows and columns that fill no tile, one strip too few for
# a pair; up to 8 tokens and above, each with both dtypes and grids
CASES = [((20, 552), 5, -1, HALVES, GRIDS), ((16, 576), 8, 128, HALVES[:1], GRIDS),
         ((20, 304), 12, -1, HALVES[:1], GRIDS), ((18, 384), 30, 256, HALVES[:1], GRIDS[1:]),
         ((33, 130), 12, -1, HALVES[1:], GRIDS[1:]), ((40, 200), 9, -1, HALVES[1:], GRIDS[:1])]


def check(name: str, value: torch.Tensor, exact: torch.Tensor) -> None:
    error = float((value.double() - exact).abs().max() / exact.abs().max())
    assert value.shape == exact.shape, name
    assert error < TOLERANCE[value.dtype], f"{name}: error {error:.1e}"


def same(packed, other) -> bool:
    a, b = packed.tensors, other.tensors
    if packed.meta != other.meta or a.keys() != b.keys():
        return False
    return all(torch.equal(a[n], b[n]) for n in a)


def product(shape, tokens, groupsize, format, grid, dtype) -> None:
    codes, mask, scale, zero = example(shape, 4, grid, groupsize, format)
    if grid == "uniform" and dtype == torch.bfloat16:
        zero = zero.floor()                                 # others are left to the slabs
    packed = pack(codes, mask, scale, zero, 4, grid, groupsize, format)
    fragments = to_fragments(packed)
    assert same(from_fragments(fragments), packed)
    x = torch.randn(tokens, shape[1]).to(dtype)
    plan = Plan(fragments)
    assert tokens <= plan.most[dtype]                       # not by slabs
    name = f"{format} {grid} {shape} groupsize {groupsize} tokens {tokens} {dtype}"
    check(name, matmul(x, plan), x.double() @ unpack(packed, torch.float64).T)


def formats_grids_shapes() -> None:
    """With two warps that add up three tiles in two turns, and once as a GPU runs it."""
    usual = host.warps_of, host.CHUNK
    host.warps_of, host.CHUNK = lambda K, tokens: 2, 2
    for format, (shape, tokens, groupsize, dtypes, grids) in itertools.product(FORMATS, CASES):
        for dtype, grid in itertools.product(dtypes, grids):
            product(shape, tokens, groupsize, format, grid, dtype)
    product((18, 264), 64, -1, "unstructured", "offset", torch.bfloat16)
    host.warps_of, host.CHUNK = usual
    product((16, 1104), 1, -1, "nm", "offset", torch.float16)
    print("formats, grids and shapes agree")


def large_zeros() -> None:
    """Grids whose zero lies far outside: fp16 weights above 8 tokens leave them to the slabs."""
    for grid, zero in (("uniform", 63.5), ("uniform", 300.0), ("offset", 16.0), ("offset", -40.0)):
        codes, mask, scale, zeros = example((16, 256), 4, grid, -1, "nm")
        packed = pack(codes, mask, scale, torch.full_like(zeros, zero), 4, grid, -1, "nm")
        weight = unpack(packed, torch.float64)
        for tokens in (2, 10):
            x = torch.randn(tokens, 256).half()
            check(f"{grid} zero {zero} tokens {tokens}", matmul(x, Plan(to_fragments(packed))),
                  x.double() @ weight.T)
    print("large zeros agree")


def zeros_between_levels() -> None:
    """As healing makes them: rounded to bf16, they would shift all weights of a row alike."""
    for format in FORMATS:
        codes, mask, scale, zero = example((16, 256), 4, "uniform", -1, format)
        packed = pack(codes, mask, scale, torch.full_like(zero, 8.03125), 4, "uniform", -1, format)
        weight = unpack(packed, torch.float64)
        for tokens in (8, 9):
            x = torch.randn(tokens, 256).relu().bfloat16()
            check(f"{format} zero 8.03 tokens {tokens}", matmul(x, Plan(to_fragments(packed))),
                  x.double() @ weight.T)
    print("zeros between levels agree")


def slabs() -> None:
    """The unpacked weight bit for bit, +0 where pruned, whole or in parts; products over several
    parts; fp32."""
    for format, grid in itertools.product(FORMATS, GRIDS):
        odd = format == "unstructured"                      # groups that end within 8 columns
        shape, groupsize = ((20, 140), 20) if odd else ((33, 130), 32)
        packed = pack(*example(shape, 4, grid, groupsize, format), 4, grid, groupsize, format)
        plan = Plan(to_fragments(packed))
        # the interpreter cuts bf16 off, a GPU rounds
        dtype = torch.float32 if grid == "offset" else torch.float16
        exact = unpack(packed, dtype)
        whole = plan.unpack(dtype, (0, shape[0]), (0, shape[1]))
        assert torch.equal(whole, exact)
        assert not (torch.signbit(whole) & (whole == 0)).any()
        if grid == "uniform":
            continue
        assert torch.equal(plan.unpack(dtype, (16, shape[0]), (128, shape[1])),
                           exact[16:, 128:])
        host.SLAB_BYTES, usual = 4 * 16 * max(shape), host.SLAB_BYTES
        x = torch.randn(9, shape[1])
        dy = torch.randn(9, shape[0])
        check("fp32", matmul(x, plan), x.double() @ exact.double().T)
        check("fp32, backward", matmul_transposed(dy, plan), dy.double() @ exact.double())
        host.SLAB_BYTES = usual
    print("slabs agree")


def layers() -> None:
    """A layer in the order of a GPU: gradients of any order, its file's tensors again, loading,
    moving."""
    for format in FORMATS:
        packed = pack(*example((24, 160), 4, "offset", -1, format), 4, "offset", -1, format)
        exact_weight = unpack(packed, torch.float64)
        assert torch.equal(dequantize(packed), unpack(packed))
        layer = PackedLinear(packed)

        def product(x, transposed=False):
            multiply = matmul_transposed if transposed else matmul
            return multiply(x, layer.launches())
        layer.product = product
        x = torch.randn(2, 3, 160).half().requires_grad_()
        y = layer(x)
        assert layer.reordered
        assert layer.launches() is layer.launches()
        dy = torch.randn_like(y)
        y.backward(dy)
        exact = x.detach().double().requires_grad_()
        (exact @ exact_weight.T).backward(dy.double())
        check(f"gradient {format}", x.grad, exact.grad)
        dy.requires_grad_()  # the gradient is linear in dy: its own gradient is y again
        dx, = torch.autograd.grad(PackedMatmul.apply(x, layer), x, dy, create_graph=True)
        again, = torch.autograd.grad(dx, dy, x.detach())
        check(f"gradient of the gradient {format}", again, exact.detach() @ exact_weight.T)
        held = {n for n, _ in layer.named_buffers()}
        assert "row_start" not in held
        assert same(layer.packed, packed)
        assert not layer.reordered
        layer.launches()
        saved = layer.state_dict()                          # as in a file; the layer stays
        assert saved.keys() == packed.tensors.keys()
        assert all(torch.equal(saved[name], t) for name, t in packed.tensors.items())
        assert layer.reordered
        assert layer.plan is not None
        twin = copy.deepcopy(layer)
        assert twin.plan is None
        assert same(twin.packed, packed)
        other = PackedLinear(pack(*example((24, 160), 4, "offset", -1, format, seed=1), 4, "offset",
                                  -1, format))
        if format != "unstructured":                        # its streams differ in length
            layer.launches()
            layer.load_state_dict(other.state_dict())
            check("loaded", matmul(x.detach(), layer.launches()),
                  x.detach().double() @ unpack(other.packed, torch.float64).T)
    print("layers agree")


if __name__ == "__main__":
    torch.manual_seed(0)
    ptx.install()
    formats_grids_shapes()
    large_zeros()
    zeros_between_levels()
    slabs()
    layers()
