"""gptq.py and sparsegpt.py against a naive float64 version, column by column, as the papers write them."""
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gptq import Compressed, find_grid, gptq, hessian, inverse_factor, quantize, relative_error
from sparsegpt import parse_sparsity, prune_smallest, sparsegpt

ROOT = Path(__file__).resolve().parents[1]


def layer(rows=24, cols=96, seed=0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=g, dtype=torch.float64)
    X = torch.randn(400, cols, generator=g, dtype=torch.float64) @ mix
    return torch.randn(rows, cols, generator=g, dtype=torch.float64), X.T @ X / 400


def naive(W, H, sparsity, bits, blocksize=32, groupsize=-1, sym=False, order=None):
    """One column at a time, the whole rest updated after each: Algorithm 1 of both papers."""
    W, n = W.clone(), W.shape[1]
    H = H + 0.01 * H.diagonal().mean() * torch.eye(n, dtype=H.dtype)
    if order is not None:
        W, H = W[:, order], H[order][:, order]
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    fraction, keep, of = parse_sparsity(sparsity)
    M, C, groupsize = torch.zeros_like(W, dtype=torch.bool), torch.zeros_like(W), n if groupsize == -1 else groupsize
    for j in range(n):
        if bits and j % groupsize == 0:
            scale, zero = find_grid(W[:, j:j + groupsize], bits, sym)
        if not of and j % blocksize == 0:
            e = min(n, j + blocksize)
            score = (W[:, j:e] / U.diagonal()[j:e]) ** 2
            cut = score.flatten().argsort(stable=True)[:round(fraction * len(W) * e) - round(fraction * len(W) * j)]
            M[:, j:e] = torch.zeros(score.numel(), dtype=torch.bool).index_fill(0, cut, True).view(score.shape)
        if of and j % of == 0:
            score = (W[:, j:j + of] / U.diagonal()[j:j + of]) ** 2
            for r in range(len(W)):
                M[r, j + score[r].argsort()[:of - keep]] = True
        q = W[:, j].clone()
        if bits:
            C[:, j] = quantize(q, scale[:, 0], zero[:, 0], bits) * ~M[:, j]
            q = scale[:, 0] * (quantize(q, scale[:, 0], zero[:, 0], bits) - zero[:, 0])
        q[M[:, j]] = 0
        W[:, j + 1:] -= torch.outer((W[:, j] - q) / U[j, j], U[j, j + 1:])
        W[:, j] = q
    return W, M, C


@pytest.mark.parametrize("sparsity", [0, 0.5, 0.625, 0.9, "2:4", "4:8", "1:3", "8:16"])
@pytest.mark.parametrize("bits", [None, 2, 3, 4, 8])
def test_sparsegpt_equals_naive(sparsity, bits):
    W, H = layer()
    out, (V, M, C) = sparsegpt(W, H, sparsity, bits, blocksize=48), naive(W, H, sparsity, bits, 48)
    assert torch.equal(out.mask, M)
    assert bits is None or torch.equal(out.codes.double(), C)
    assert torch.allclose(out.weight, V, atol=1e-10)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["plain", "sym", "groups", "order"])
def test_gptq_equals_naive(bits, kind):
    W, H = layer()
    ours = {"plain": {}, "sym": {"sym": True}, "groups": {"groupsize": 32}, "order": {"act_order": True}}[kind]
    order = H.diagonal().argsort(descending=True, stable=True) if kind == "order" else None
    out = gptq(W, H, bits, blocksize=32, **ours)
    V, _, C = naive(W, H, 0, bits, groupsize=ours.get("groupsize", -1), sym=ours.get("sym", False), order=order)
    if order is not None:
        V, C = V[:, order.argsort()], C[:, order.argsort()]
    assert torch.equal(out.codes.double(), C) and torch.allclose(out.weight, V, atol=1e-10)


def test_float32_agrees_with_float64():
    W, H = layer(64, 128)
    a, b = sparsegpt(W.float(), H.float(), 0.5, 4), sparsegpt(W, H, 0.5, 4)
    assert (a.mask == b.mask).float().mean() > 0.99 and abs(a.error / b.error - 1) < 0.01


@pytest.mark.parametrize("bits,kind", [(4, {}), (3, {"groupsize": 32}), (4, {"groupsize": 32, "act_order": True}),
                                       (4, {"groupsize": 32, "act_order": True, "static_groups": True}), (2, {"sym": True})])
def test_codes_and_grid_rebuild_the_weight(bits, kind):
    W, H = layer()
    out = gptq(W.float(), H.float(), bits, **kind)
    assert torch.equal(out.scale, out.scale.half().float()) and torch.equal(out.zero, out.zero.half().float())
    assert torch.equal(out.scale[:, out.g_idx] * (out.codes - out.zero[:, out.g_idx]), out.weight)
    if kind.get("static_groups"):
        assert torch.equal(out.g_idx, torch.arange(96) // 32)
    assert int(out.codes.max()) < 2 ** bits


@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_pruned_weights_are_exact_zeros(sparsity):
    W, H = layer()
    out = sparsegpt(W.float(), H.float(), sparsity, 4)
    assert isinstance(out, Compressed) and (out.weight[out.mask] == 0).all() and (out.codes[out.mask] == 0).all()
    rebuilt = (out.scale[:, out.g_idx] * (out.codes - out.zero[:, out.g_idx])).masked_fill(out.mask, 0)
    assert torch.equal(rebuilt, out.weight)


@pytest.mark.parametrize("shape", [(24, 96), (7, 100), (1, 33), (64, 16), (5, 1)])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.625, 1.0])
def test_sparsity_is_exact(shape, sparsity):
    W, H = layer(*shape)
    assert int(sparsegpt(W, H, sparsity, blocksize=32).mask.sum()) == round(sparsity * W.numel())


def test_patterns_hold_in_every_group():
    W, H = layer()
    for n, m in ((2, 4), (4, 8), (8, 16), (1, 3)):
        kept = (~sparsegpt(W, H, f"{n}:{m}").mask).view(24, -1, m).sum(-1)
        assert (kept == n).all()


def test_ties_prune_the_exact_number():
    assert prune_smallest(torch.zeros(5, 8), 13).sum() == 13
    assert torch.equal(prune_smallest(torch.tensor([[3.0, 1.0, 1.0, 2.0]]), 2), torch.tensor([[False, True, True, False]]))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sparsity,bits", [(0.5, 4), (0.5, 3), (0.625, 4), ("2:4", 4), (0, 3)])
def test_joint_pass_beats_magnitude_and_rounding(seed, sparsity, bits):
    """Inputs with a decaying spectrum, as activations have; more columns than a block, so that masks see updates."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(1000, 256, generator=g) @ torch.diag(torch.logspace(0, -1.5, 256)) @ torch.randn(256, 256, generator=g)
    W, H = torch.randn(64, 256, generator=g), hessian(X)
    fraction, n, m = parse_sparsity(sparsity)
    if m:
        cut = W.abs().view(64, -1, m).argsort(-1)[..., :m - n]
        mask = torch.zeros(64, 256 // m, m, dtype=torch.bool).scatter(-1, cut, True).view_as(W)
    else:
        mask = prune_smallest(W.abs(), round(fraction * W.numel()))
    scale, zero = find_grid(W, bits)
    plain = (scale * (quantize(W, scale, zero, bits) - zero)).masked_fill(mask, 0)
    assert sparsegpt(W, H, sparsity, bits).error < 0.8 * relative_error(W, plain, H)


def test_dead_inputs_are_pruned_first_and_harmless():
    W, H = layer()
    H[:, :30], H[:30] = 0, 0
    out = sparsegpt(W, H, 0.5, 4, blocksize=96)
    assert out.mask[:, :30].all() and torch.isfinite(out.weight).all()
    assert torch.isfinite(gptq(W, H, 4).weight).all()
    assert torch.isfinite(gptq(W, torch.zeros_like(H), 4).weight).all()


def test_damping_rises_with_a_printed_line(capsys):
    W, H = layer()
    H = H - 0.2 * torch.eye(96, dtype=H.dtype) * H.diagonal().mean()          # indefinite, as rounding errors can make it
    assert torch.isfinite(gptq(W, H, 4).weight).all()
    assert "Cholesky failed at damping 0.01, trying 0.1" in capsys.readouterr().out


def test_factor_is_the_inverse():
    _, H = layer()
    U = inverse_factor(H, 0.01)
    assert torch.equal(U, U.triu())
    assert torch.allclose(U.T @ U @ (H + 0.01 * H.diagonal().mean() * torch.eye(96)), torch.eye(96, dtype=H.dtype), atol=1e-8)


def test_inputs_are_left_alone_and_factor_can_be_shared():
    W, H = layer()
    W0, H0 = W.clone(), H.clone()
    shared = sparsegpt(W, H, 0.5, 4, U=inverse_factor(H, 0.01))
    assert torch.equal(shared.weight, sparsegpt(W, H, 0.5, 4).weight)
    assert torch.equal(W, W0) and torch.equal(H, H0)


@pytest.mark.parametrize("change,message", [
    (dict(W=float("nan")), "W holds 1 NaN"), (dict(H=float("inf")), "H holds 1 NaN or Inf"), (dict(bits=5), "bits=5"),
    (dict(sparsity=1.5), "1.5"), (dict(sparsity="4:2"), "4:2"), (dict(sparsity="half"), "half"), (dict(groupsize=0), "groupsize=0"),
    (dict(shape=True), "needs H of shape")])
def test_bad_input_is_named(change, message):
    W, H = layer()
    if "W" in change:
        W[3, 4] = change["W"]
    if "H" in change:
        H[3, 4] = change["H"]
    if "shape" in change:
        H = H[1:, 1:]
    with pytest.raises(ValueError, match=message):
        sparsegpt(W, H, change.get("sparsity", 0.5), change.get("bits", 4), change.get("groupsize", -1))


@pytest.mark.parametrize("module", ["gptq", "sparsegpt"])
def test_docstring_lines_run_alone_in_an_empty_folder(module, tmp_path):
    """The lines that the module's docstring shows are run as they stand, beside nothing but the solver files."""
    for name in {"gptq", module}:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    doc = (ROOT / f"{module}.py").read_text().split('"""')[1]
    lines = "\n".join(line[4:] for line in doc[doc.index("    import torch"):].split("\n") if line.startswith("    "))
    done = subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_hessian_is_the_mean_of_outer_products():
    x = torch.randn(3, 50, 8)
    assert torch.allclose(hessian(x), torch.einsum("bti,btj->ij", x, x) / 150, atol=1e-5)
