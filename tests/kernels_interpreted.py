"""Run by test_kernels.py in a process of its own: compiling fails in a process that interprets.

Every format, grid and grouping with odd shapes and batches 1 to 64, and every configuration, also above 64, forward and
backward, against float64 products with the unpacked weight."""
import itertools
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch

import ptx
from kernels.linear import PackedLinear, PackedMatmul, triton_reads
from kernels.matmul import BACKWARD, FORWARD, device_facts, matmul, matmul_transposed
from kernels.packing import pack
from kernels.reference import dequantize
from kernels.unpacking import unpack
from test_packing import example

TOLERANCE = {torch.float16: 2 ** -10, torch.bfloat16: 2 ** -6}          # two roundings of the largest output
CASES = [((64, 256), 1, -1), ((33, 130), 5, -1), ((40, 576), 9, 128), ((16, 160), 3, 32), ((24, 576), 32, -1),
         ((20, 300), 64, 64)]               # shape, tokens, groupsize


def check(name: str, value: torch.Tensor, exact: torch.Tensor) -> None:
    error = float((value.double() - exact).abs().max() / exact.abs().max())
    assert error < TOLERANCE[value.dtype] and value.shape == exact.shape, f"{name}: error {error:.1e}"


def formats_grids_shapes() -> None:
    formats, grids = ("dense", "nm", "unstructured"), ("uniform", "offset")
    for format, grid, (shape, tokens, groupsize) in itertools.product(formats, grids, CASES):
        codes, mask, scale, zero = example(shape, 4, grid, groupsize, format)
        if grid == "offset" and groupsize > 0:
            zero *= 16                                      # nearly as far as fp16 allows, see triton_reads
        packed = pack(codes, mask, scale, zero, 4, grid, groupsize, format)
        assert triton_reads(packed)
        weight = unpack(packed, torch.float64)
        for dtype in (torch.float16, torch.bfloat16):
            if dtype == torch.bfloat16 and tokens > 9:
                continue
            name = f"{format} {grid} {shape} groupsize {groupsize} tokens {tokens} {dtype}"
            x, dy = torch.randn(tokens, shape[1]).to(dtype), torch.randn(tokens, shape[0]).to(dtype)
            check(f"forward {name}", matmul(x, packed), x.double() @ weight.T)
            check(f"backward {name}", matmul_transposed(dy, packed), dy.double() @ weight)
    print("formats, grids and shapes agree")


def configurations() -> None:
    """Every line of both tables, at its largest batch (or a few more than one tile)."""
    packed = pack(*example((70, 400), 4, "uniform", -1, "unstructured"), 4, "uniform", -1, "unstructured")
    weight = unpack(packed, torch.float64)
    facts = device_facts(torch.device("cpu"))
    import kernels.matmul as host
    for arch in FORWARD:
        host.device_facts = lambda device: (arch,) + facts[1:]
        for tokens in sorted({min(c.tokens, c.BM + 3) for table in (FORWARD[arch], BACKWARD[arch]) for c in table}):
            x, dy = torch.randn(tokens, 400).half(), torch.randn(tokens, 70).half()
            check(f"forward sm_{arch} tokens {tokens}", matmul(x, packed), x.double() @ weight.T)
            check(f"backward sm_{arch} tokens {tokens}", matmul_transposed(dy, packed), dy.double() @ weight)
    host.device_facts = device_facts
    host.OFFSETS = 40 * 400                                 # in parts of at most 39 tokens
    x, dy = torch.randn(3, 27, 400).half(), torch.randn(3, 27, 70).half()
    check("forward in parts", matmul(x, packed), x.double() @ weight.T)
    check("backward in parts", matmul_transposed(dy, packed), dy.double() @ weight)
    print("configurations agree")


def gradient() -> None:
    """The autograd function against autograd through the unpacked weight; the slow torch reference against unpack."""
    for format in ("dense", "nm", "unstructured"):
        packed = pack(*example((48, 320), 4, "offset", -1, format), 4, "offset", -1, format)
        assert torch.equal(dequantize(packed), unpack(packed))
        layer = PackedLinear(packed)
        layer.product = lambda x, transposed=False: (matmul_transposed if transposed else matmul)(x, packed)
        x = torch.randn(2, 3, 320).half().requires_grad_()
        y = PackedMatmul.apply(x, layer)
        dy = torch.randn_like(y)
        y.backward(dy)
        exact = x.detach().double().requires_grad_()
        (exact @ unpack(packed, torch.float64).T).backward(dy.double())
        check(f"gradient {format}", x.grad, exact.grad)
        dy.requires_grad_()                                 # the gradient is linear in dy: its own gradient is y again
        dx, = torch.autograd.grad(PackedMatmul.apply(x, layer), x, dy, create_graph=True)
        again, = torch.autograd.grad(dx, dy, x.detach())
        check(f"gradient of the gradient {format}", again, exact.detach() @ unpack(packed, torch.float64).T)
    print("gradients agree")


if __name__ == "__main__":
    torch.manual_seed(0)
    ptx.install()
    formats_grids_shapes()
    configurations()
    gradient()
