"""gptq.py and sparsegpt.py against a naive float64 version, column by column, as the papers write
them.

    python -m pytest -q tests/test_solvers.py
"""
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn as nn

from bench.naive import naive_sparsegpt
from bench.solvers import random_layer, steps
from gptq import (Compressed, descend, find_grid, gptq, hessian, inverse_factor, invert_, nearest,
                  quantize, relative_error, search_grid)
from kernels.packing import pack_compressed
from kernels.unpacking import unpack
from sparsegpt import (admm, kth_smallest, parse_sparsity, prune_and_round, prune_smallest, refit,
                       sparsegpt)

ROOT = Path(__file__).resolve().parents[1]


def layer(rows=24, cols=96, seed=0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=g, dtype=torch.float64)
    X = torch.randn(400, cols, generator=g, dtype=torch.float64) @ mix
    return torch.randn(rows, cols, generator=g, dtype=torch.float64), X.T @ X / 400


def naive(W, H, sparsity, bits, blocksize=32, groupsize=-1, sym=False, order=None):
    """The papers' columns, on our grids."""
    fraction, n, m = parse_sparsity(sparsity)

    def our_grid(W, bits):
        return (t[:, 0] for t in find_grid(W, bits, sym))
    return naive_sparsegpt(W, H, (n, m) if m else fraction, bits, blocksize, groupsize, order,
                           our_grid)


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
    settings = {"plain": {}, "sym": {"sym": True}, "groups": {"groupsize": 32},
                "order": {"act_order": True}}
    ours = settings[kind]
    order = H.diagonal().argsort(descending=True, stable=True) if kind == "order" else None
    out = gptq(W, H, bits, blocksize=32, **ours)
    V, _, C = naive(W, H, 0, bits, groupsize=ours.get("groupsize", -1), sym=ours.get("sym", False),
                    order=order)
    if order is not None:
        V = V[:, order.argsort()]
        C = C[:, order.argsort()]
    assert torch.equal(out.codes.double(), C)
    assert torch.allclose(out.weight, V, atol=1e-10)


@pytest.mark.parametrize("groupsize", [8, 24])
def test_groups_that_begin_inside_an_inner_block_equal_naive(groupsize):
    W, H = layer()
    for sparsity in (0, 0.5):
        solve = partial(sparsegpt, sparsity=sparsity) if sparsity else gptq
        out = solve(W, H, bits=4, groupsize=groupsize, blocksize=48)
        V, _, C = naive(W, H, sparsity, 4, 48, groupsize)
        assert torch.equal(out.codes.double(), C)
        assert torch.allclose(out.weight, V, atol=1e-10)


def test_an_H_that_was_rounded_until_it_is_indefinite():
    """Inputs far from zero on average, summed up in bf16: refit takes no step where the damping
    does not reach. What is no H at all is one line."""
    g = torch.Generator().manual_seed(1)
    x = (torch.randn(2048, 512, generator=g) + 8 * torch.randn(512, generator=g)).bfloat16()
    W = torch.randn(16, 512, generator=g) * 0.05
    H = x.T @ x / len(x)
    assert torch.linalg.eigvalsh(H.float())[0] < 0
    true = hessian(x.float())
    rounded, exact = (prune_and_round(W, h, 0.5, bits=4) for h in (H, true))
    lost = [relative_error(W, out.weight, true) for out in (rounded, exact)]
    assert lost[0] < 2 * lost[1]
    with pytest.raises(ValueError, match="H is not positive definite"):
        prune_and_round(W, -true, 0.5, bits=4)


def test_groups_and_blocks_of_which_neither_holds_the_other_are_refused():
    W, H = layer()
    with pytest.raises(ValueError, match="one must be a multiple of the other"):
        gptq(W, H, 4, groupsize=40, blocksize=32)
    with pytest.raises(ValueError, match="one must be a multiple of the other"):
        sparsegpt(W, H, 0.5, 4, groupsize=40, blocksize=32)
    with pytest.raises(ValueError, match="groupsize 6 parts groups of 4 columns"):
        sparsegpt(W, H, "2:4", 4, groupsize=6, blocksize=12)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", [2, 4])
def test_a_grid_of_a_row_of_one_sign_begins_at_zero(bits, sign):
    W = sign * (layer()[0].abs() + 5)
    scale, zero = find_grid(W, bits)
    assert ((nearest(W, scale, zero, bits) - W).abs() <= 0.51 * scale).all()


def test_float32_agrees_with_float64():
    W, H = layer(64, 128)
    a = sparsegpt(W.float(), H.float(), 0.5, 4)
    b = sparsegpt(W, H, 0.5, 4)
    assert (a.mask == b.mask).float().mean() > 0.99
    assert abs(a.error / b.error - 1) < 0.01


@pytest.mark.parametrize("bits,kind", [
    (4, {}),
    (2, {"sym": True}),
    (3, {"groupsize": 32}),
    (4, {"groupsize": 32, "act_order": True}),
    (4, {"groupsize": 32, "act_order": True, "static_groups": True})])
def test_codes_and_grid_rebuild_the_weight(bits, kind):
    W, H = layer()
    out = gptq(W.float(), H.float(), bits, **kind)
    assert torch.equal(out.scale, out.scale.half().float())
    assert torch.equal(out.zero, out.zero.half().float())
    assert torch.equal(out.scale[:, out.g_idx] * (out.codes - out.zero[:, out.g_idx]), out.weight)
    if kind.get("static_groups"):
        assert torch.equal(out.g_idx, torch.arange(96) // 32)
    if kind.get("sym"):
        assert (out.zero == 2 ** (bits - 1)).all()
    assert int(out.codes.max()) < 2 ** bits


@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_pruned_weights_are_exact_zeros(sparsity):
    W, H = layer()
    out = sparsegpt(W.float(), H.float(), sparsity, 4)
    assert isinstance(out, Compressed)
    assert (out.weight[out.mask] == 0).all()
    assert (out.codes[out.mask] == 0).all()
    rebuilt = out.scale[:, out.g_idx] * (out.codes - out.zero[:, out.g_idx])
    assert torch.equal(rebuilt.masked_fill(out.mask, 0), out.weight)


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


def test_blocks_hold_whole_groups():
    W, H = layer()
    mask = sparsegpt(W, H, "1:3", blocksize=32).mask
    assert torch.equal(mask, naive(W, H, "1:3", None, 33)[1])


@pytest.mark.parametrize("cols", [3, 33, 98, 99])
def test_a_last_group_cut_short_prunes_its_share(cols):
    W, H = layer(8, cols)
    tail = cols % 4
    for mask in (sparsegpt(W, H, "2:4").mask, sparsegpt(W, H, "2:4", 4, blocksize=32).mask,
                 prune_and_round(W, H, "2:4", 4).mask):
        assert (mask[:, cols - tail:].sum(1) == tail // 2).all()
        assert int(mask.sum()) == 8 * (cols // 4 * 2 + tail // 2)


def test_ties_prune_the_exact_number():
    assert prune_smallest(torch.zeros(5, 8), 13).sum() == 13
    assert torch.equal(prune_smallest(torch.tensor([[3.0, 1.0, 1.0, 2.0]]), 2),
                       torch.tensor([[False, True, True, False]]))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sparsity,bits", [(0.5, 4), (0.5, 3), (0.625, 4), ("2:4", 4), (0, 3)])
def test_joint_pass_beats_magnitude_and_rounding(seed, sparsity, bits):
    """Inputs with a decaying spectrum, as activations have; more columns than a block, so that
    masks see updates."""
    g = torch.Generator().manual_seed(seed)
    decay = torch.diag(torch.logspace(0, -1.5, 256))
    X = torch.randn(1000, 256, generator=g) @ decay @ torch.randn(256, 256, generator=g)
    W = torch.randn(64, 256, generator=g)
    H = hessian(X)
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
    assert out.mask[:, :30].all()
    assert torch.isfinite(out.weight).all()
    rounded = gptq(W, H, 4).weight
    assert (rounded[:, :30] == 0).all()
    assert torch.isfinite(rounded).all()
    assert torch.isfinite(gptq(W, torch.zeros_like(H), 4).weight).all()


@pytest.mark.parametrize("recipe", ["plain", "best"])
def test_the_size_of_inputs_does_not_matter_beside_dead_ones(recipe):
    """An input that is always 0 has no say in how the others are damped."""
    g = torch.Generator().manual_seed(0)
    X = torch.randn(512, 48, generator=g) @ torch.randn(48, 48, generator=g)
    X[:, ::5] = 0
    W = torch.randn(24, 48, generator=g)
    solve = sparsegpt if recipe == "plain" else prune_and_round
    one, other = (solve(W, hessian(X * size), 0.5, 4) for size in (1.0, 2.0 ** -10))
    assert torch.equal(one.weight, other.weight)
    assert other.error == pytest.approx(one.error, rel=1e-3)


def test_a_row_of_zeros_stays_one_on_an_offset_grid():
    g = torch.Generator().manual_seed(0)
    W = 0.02 * torch.randn(8, 64, generator=g)
    W[3] = 0
    H = hessian(torch.randn(256, 64, generator=g))
    out = prune_and_round(W, H, "2:4", 4)
    assert (out.weight[3] == 0).all()
    assert (out.mask[3] == 0).any()                 # though kept
    assert torch.equal(unpack(pack_compressed(out), torch.float32), out.weight)


def test_damping_rises_with_a_printed_line(capsys):
    W, H = layer()
    # indefinite, as rounding errors can make it
    H = H - 0.2 * torch.eye(96, dtype=H.dtype) * H.diagonal().mean()
    assert torch.isfinite(gptq(W, H, 4).weight).all()
    assert "Cholesky failed at damping 0.01, trying 0.1" in capsys.readouterr().out


def test_factor_is_the_inverse():
    _, H = layer()
    U = inverse_factor(H, 0.01)
    assert torch.equal(U, U.triu())
    assert torch.allclose(U.T @ U @ (H + 0.01 * H.diagonal().mean() * torch.eye(96)),
                          torch.eye(96, dtype=H.dtype), atol=1e-8)


def test_the_factor_of_live_inputs_is_theirs_alone():
    _, H = layer()
    H[::3], H[:, ::3] = 0, 0
    live = torch.arange(96) % 3 > 0
    alone = inverse_factor(H[live][:, live])
    assert torch.allclose(inverse_factor(H)[live][:, live], alone, atol=1e-9)


@pytest.mark.parametrize("n", [1, 512, 513, 1300])
def test_the_inverse_by_halves_is_the_inverse(n):
    x = torch.randn(n // 2 + 1, n, generator=torch.Generator().manual_seed(n))
    M = x.T @ x / len(x)                            # of half rank
    M.diagonal().add_(0.2)
    wanted = torch.linalg.inv(M.double())
    got = invert_(M)
    assert got is M                                 # in its place
    assert (got - wanted).norm() < 5e-6 * wanted.norm()


def test_the_inverse_by_halves_keeps_the_digits_of_inputs_that_are_much_alike():
    """Inputs that share most of what they do, as wide ones of real models: as good as LAPACK's."""
    n, g = 1500, torch.Generator().manual_seed(0)
    shared = 1 + 0.2 * torch.randn(2 * n, 1, generator=g)
    x = 0.1 * torch.randn(2 * n, n, generator=g) + shared * torch.randn(n, generator=g).sign()
    H = x.T @ x / len(x)
    d = H.diagonal().sqrt()
    M = H / d / d[:, None]
    M.diagonal().add_(0.1)
    v = torch.randn(n, generator=g).double()

    def lost(inverse):
        return float((M.double() @ (inverse.double() @ v) - v).norm() / v.norm())
    plain = lost(torch.cholesky_inverse(torch.linalg.cholesky(M)))
    assert lost(invert_(M.clone())) < 5 * plain


def test_a_mask_that_prunes_nothing_is_none():
    W, H = layer()
    none = torch.zeros_like(W, dtype=torch.bool)
    got = prune_and_round(W, H, 0.5, 4, fixed_mask=none)
    want = prune_and_round(W, H, 0, 4)
    assert got.grid == want.grid == "uniform" and torch.equal(got.weight, want.weight)


def test_inputs_are_left_alone_and_the_factor_can_be_shared():
    W, H = layer()
    W0, H0 = W.clone(), H.clone()
    shared = gptq(W, H, 4, U=inverse_factor(H, 0.01))
    assert torch.equal(shared.weight, gptq(W, H, 4).weight)
    sparsegpt(W, H, 0.5, 4)
    assert torch.equal(W, W0) and torch.equal(H, H0)


@pytest.mark.parametrize("change,message", [
    (dict(W=float("nan")), "W holds 1 NaN"), (dict(H=float("inf")), "H holds 1 NaN or Inf"),
    (dict(bits=5), "bits=5"),
    (dict(sparsity=1.5), "1.5"), (dict(sparsity="4:2"), "4:2"), (dict(sparsity="half"), "half"),
    (dict(groupsize=0), "groupsize=0"),
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
        sparsegpt(W, H, change.get("sparsity", 0.5), change.get("bits", 4),
                  change.get("groupsize", -1))


@pytest.mark.parametrize("module", ["gptq", "sparsegpt"])
def test_docstring_lines_run_alone_in_an_empty_folder(module, tmp_path):
    """The lines that the module's docstring shows are run as they stand, beside nothing but the
    solver files."""
    for name in {"gptq", module}:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    doc = (ROOT / f"{module}.py").read_text().split('"""')[1]
    lines = "\n".join(line[4:] for line in doc[doc.index("    import torch"):].split("\n")
                      if line.startswith("    "))
    if module == "sparsegpt":
        lines += "\nassert better.error < plain.error / 2\n"
    done = subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr


def test_parameters_and_inputs_that_ask_for_gradients():
    """layer.weight as it is, and inputs out of a model that is being trained."""
    layer, x = nn.Linear(16, 8), torch.randn(64, 16, requires_grad=True)
    H = hessian(x)
    for solve in (partial(gptq, bits=4, descent=2), partial(sparsegpt, sparsity=0.5, bits=4),
                  partial(prune_and_round, sparsity=0.5, bits=4)):
        out, want = solve(layer.weight, H), solve(layer.weight.data, H)
        assert torch.equal(out.weight, want.weight) and not out.weight.requires_grad


def test_nothing_to_take_a_mean_of_and_nothing_to_pack():
    with pytest.raises(ValueError, match="a Hessian needs calibration inputs"):
        hessian(torch.randn(0, 16))
    out = prune_and_round(torch.randn(8, 16), hessian(torch.randn(64, 16)), 0.5)
    with pytest.raises(ValueError, match="nothing was quantized"):
        pack_compressed(out)


def test_hessian_is_the_mean_of_outer_products():
    x = torch.randn(3, 50, 8)
    assert torch.allclose(hessian(x), torch.einsum("bti,btj->ij", x, x) / 150, atol=1e-5)


def test_stacked_matrices_are_solved_as_if_alone():
    W, H = layer(40)
    both = sparsegpt(W, H, 0.5, 4, blocksize=32, parts=[24, 16])
    parts = [sparsegpt(w, H, 0.5, 4, blocksize=32) for w in W.split([24, 16])]
    assert torch.equal(both.mask, torch.cat([p.mask for p in parts]))
    assert torch.allclose(both.weight, torch.cat([p.weight for p in parts]))


def error(W, V, H):
    return float(((W - V) @ H * (W - V)).sum())


def test_refit_finds_the_least_squares_of_every_row():
    W, H = layer()
    mask = prune_smallest(W.abs(), W.numel() // 2)
    V = refit(W, H, mask, iterations=500, percdamp=0.0)
    exact = torch.zeros_like(W)
    for r in range(len(W)):
        s = ~mask[r]
        exact[r, s] = torch.linalg.solve(H[s][:, s], (H @ W[r])[s])
    assert (V[mask] == 0).all()
    assert torch.allclose(V, exact, atol=1e-5)
    few = [error(W, refit(W, H, mask, iterations=k, percdamp=0.0), H) for k in (1, 3, 10, 30)]
    assert few == sorted(few, reverse=True)
    assert few[-1] >= error(W, exact, H) - 1e-9


@pytest.mark.parametrize("sparsity", [0.5, 0.625, "2:4", "8:16", "1:3"])
def test_admm_masks_are_exact_and_beat_sparsegpts(sparsity):
    W, H = layer()
    W, H = W.float(), H.float()
    mask, start = admm(W, H, sparsity)
    fraction, n, m = parse_sparsity(sparsity)
    assert (start[mask] == 0).all()
    assert torch.isfinite(start).all()
    if m:
        assert ((~mask).view(24, -1, m).sum(-1) == n).all()
    else:
        assert int(mask.sum()) == round(fraction * W.numel())
    other = sparsegpt(W, H, sparsity).mask
    ours, theirs = (refit(W, H, pruned, iterations=50) for pruned in (mask, other))
    assert error(W, ours, H) < error(W, theirs, H)


def naive_admm(W, H, fraction, rounds=15, damp=0.01, rho=0.2, growth=1.7, every=5):
    """The iteration as ALPS writes it, with its three variables, a solve and a sorted threshold
    each time."""
    d = H.diagonal().sqrt()
    W = W * d
    H = H / d / d[:, None] + damp * torch.eye(len(d), dtype=H.dtype)
    D = project(W, fraction)
    U = W - D
    for i in range(rounds):
        if i and i % every == 0:
            rho, U = rho * growth, U / growth
        X = torch.linalg.solve(H + rho * torch.eye(len(d), dtype=H.dtype),
                               (W @ H + rho * (D - U)).T).T
        D = project(X + U, fraction)
        U = U + X - D
    return D == 0


def project(Z, fraction):
    return Z.masked_fill(prune_smallest(Z.abs(), round(fraction * Z.numel())), 0)


@pytest.mark.parametrize("values", ["normal", "few", "sorted"])
def test_kth_smallest_of_many(values):
    x = torch.randn(5_000_001, generator=torch.Generator().manual_seed(0))
    x = {"normal": x, "few": x.round(), "sorted": x.sort().values}[values]
    for k in (1, 1000, 2_500_000, 4_999_990, 5_000_001):
        assert kth_smallest(x, k) == x.kthvalue(k).values


@pytest.mark.parametrize("sparsity,bits", [(0.5, 4), ("2:4", 3), (0, 4), (0.5, None)])
def test_some_rows_at_a_time_are_all_rows_at_once(sparsity, bits, monkeypatch):
    """Behind the mask no row knows of the others."""
    W, H = layer()
    whole = prune_and_round(W, H, sparsity, bits)
    monkeypatch.setattr("sparsegpt.SLAB", 7 * W.shape[1])       # 24 rows: 7 + 7 + 7 + 3
    parts = prune_and_round(W, H, sparsity, bits)
    for one, other in zip(whole, parts):
        if torch.is_tensor(one) and not one.is_floating_point():
            assert torch.equal(one, other)
        elif torch.is_tensor(one) or isinstance(one, float):
            assert torch.allclose(torch.as_tensor(one), torch.as_tensor(other), rtol=1e-9)
        else:
            assert one == other


@pytest.mark.parametrize("shape", [(24, 96), (288, 1024)])
def test_admm_equals_naive_on_wide_layers_with_columns_of_unlike_size(shape):
    """A threshold estimated from every fourth of 1024 columns would be that of the large ones
    alone."""
    W, H = layer(*shape)
    W[:, ::4] *= 4
    ours = admm(W, H, 0.5)[0]
    exact = naive_admm(W, H, 0.5)
    assert (ours == exact).float().mean() > 0.97  # half precision on some processors
    loss = [error(W, refit(W, H, mask, iterations=20), H) for mask in (ours, exact)]
    assert loss[0] < 1.01 * loss[1]


@pytest.mark.parametrize("grid", ["uniform", "offset"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_searched_grids(grid, bits):
    """Never worse than min-max in the weighted error they minimize; stored numbers are fp16; an
    empty row does no harm."""
    g = torch.Generator().manual_seed(bits)
    W = torch.randn(16, 200, generator=g)
    keep = (torch.rand(16, 200, generator=g) < 0.5).float()
    h = torch.rand(1, 200, generator=g)
    W[3], keep[4] = 0, 0
    scale, zero = search_grid(W, keep, h, bits, grid)
    cost = lambda q: ((q - W) ** 2 * keep * h).sum(1)
    found = nearest(W, scale, zero, bits, grid)
    plain = nearest(W, *find_grid(W * keep, bits), bits)
    assert torch.isfinite(found).all()
    assert torch.equal(scale, scale.half().float())
    assert torch.equal(zero, zero.half().float())
    if grid == "uniform":
        assert (cost(found) <= cost(plain) * 1.0001).all()
    elif bits in (3, 4):  # no level on zero: two more levels for the kept
        assert cost(found).sum() < cost(plain).sum()
    codes = quantize(W, scale, zero, bits, grid)
    assert int(codes.max()) < 2 ** bits
    assert int(codes.min()) >= 0


def naive_descent(V, W, H, keep, scale, zero, bits, grid, percdamp):
    """One column of one matrix after the other, the gradient computed anew for each."""
    V, h = V.clone(), H.diagonal() * (1 + percdamp)
    for j in range(V.shape[1]):
        gradient = (V - W) @ H[:, j] + percdamp * H[j, j] * (V - W)[:, j]
        moved = V[:, j] - gradient / h[j]
        V[:, j] = nearest(moved, scale[:, 0], zero[:, 0], bits, grid) * keep[:, j]
    return V


@pytest.mark.parametrize("grid", ["uniform", "offset"])
def test_descent_equals_naive_and_never_climbs(grid):
    W, H = layer()
    mask = prune_smallest(W.abs(), W.numel() // 2)
    out = gptq(refit(W, H, mask), H, 3, grid=grid, mask=mask, static_groups=True, act_order=True)
    keep = (~mask).double()
    scale = out.scale.double()
    zero = out.zero.double()
    last = out.weight
    for _ in range(3):
        naive = naive_descent(last, W, H, keep, scale, zero, 3, grid, 0.01)
        ours = descend(last.T, W.T, H, keep.T, scale.T, zero.T, torch.zeros(96, dtype=torch.long),
                       3, grid, 1, 0.01, blocksize=32).T
        assert torch.allclose(ours, naive, atol=1e-12)
        damped = H + 0.01 * torch.diag(H.diagonal())
        assert error(W, ours, damped) <= error(W, last, damped) * (1 + 1e-12)
        last = ours


def test_the_damping_asked_for_is_that_of_every_step():
    W, H = layer()
    mask, start = admm(W, H, 0.5, percdamp=0.3)
    pruned = prune_and_round(W, H, 0.5, percdamp=0.3)
    assert torch.equal(pruned.weight, refit(W, H, mask, start, percdamp=0.3))
    last, out = (gptq(W, H, 3, grid="uniform", percdamp=0.3, descent=n) for n in (0, 1))
    moved = naive_descent(last.weight, W, H, torch.ones_like(W), out.scale.double(),
                          out.zero.double(), 3, "uniform", 0.3)
    assert torch.allclose(out.weight, moved, atol=1e-12)


@pytest.mark.parametrize("settings", [
    dict(), dict(groupsize=32), dict(groupsize=40), dict(grid="uniform"),
    dict(mask="sparsegpt", refits=0), dict(act_order=False, descent=0),
    dict(grid="minmax", sym=True)])
@pytest.mark.parametrize("sparsity,bits", [(0.5, 4), (0.5, 3), ("2:4", 4), (0, 4), (0.75, None)])
def test_whole_stack(settings, sparsity, bits):
    """What is returned rebuilds the weight, zeros are zeros, and the error is below the plain
    method's."""
    W, H = layer()
    W, H = W.float(), H.float()
    out = prune_and_round(W, H, sparsity, bits, **settings)
    assert (out.weight[out.mask] == 0).all()
    assert out.error == pytest.approx(relative_error(W, out.weight, H), rel=1e-4)
    assert int(out.mask.sum()) == round(parse_sparsity(sparsity)[0] * W.numel())
    if bits:
        scale = out.scale[:, out.g_idx]
        zero = out.zero[:, out.g_idx]
        if out.grid == "offset":
            top = 2 ** (bits - 1)
            rebuilt = torch.where(out.codes >= top, -scale, scale) * (out.codes % top + zero)
        else:
            rebuilt = scale * (out.codes - zero)
        assert torch.equal(rebuilt.masked_fill(out.mask, 0), out.weight)
        assert torch.equal(out.g_idx, torch.arange(96) // settings.get("groupsize", 96))
    is_plain = settings.get("mask") == "sparsegpt" or settings.get("sym")
    if not is_plain and (sparsity or settings.get("descent", 2)):
        assert out.error < sparsegpt(W, H, sparsity, bits, blocksize=32).error


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sparsity,bits", [(0.5, 4), (0.9, 2), ("2:4", 3), (0, 2), (0.3, 8)])
def test_best_stack_beats_magnitude_and_rounding_everywhere(seed, sparsity, bits):
    W, H = (t.float() for t in layer(24, 96, seed))
    fraction, n, m = parse_sparsity(sparsity)
    if m:
        rank = W.abs().view(24, -1, m).argsort(-1).argsort(-1)
        mask = (rank < m - n).view_as(W)
    else:
        mask = prune_smallest(W.abs(), round(fraction * W.numel()))
    scale, zero = find_grid(W, bits)
    plain = nearest(W, scale, zero, bits).masked_fill(mask, 0)
    assert prune_and_round(W, H, sparsity, bits).error < relative_error(W, plain, H)


def test_stack_survives_dead_inputs_and_zero_matrices():
    W, H = (t.float() for t in layer())
    H[:, :30], H[:30] = 0, 0
    for out in (prune_and_round(W, H, 0.5, 4), prune_and_round(W, H, "2:4", 4),
                prune_and_round(W * 0, H, 0.5, 4), prune_and_round(W, H * 0, 0.5, 4)):
        assert torch.isfinite(out.weight).all()
        assert int(out.mask.sum()) == W.numel() // 2
    with pytest.raises(ValueError, match="mask='best'"):
        prune_and_round(W, H, 0.5, 4, mask="best")
    with pytest.raises(ValueError, match="grid='log'"):
        prune_and_round(W, H, 0.5, 4, grid="log")


@pytest.mark.parametrize("sparsity", ["0.5", "0.625", "2:4"])
@pytest.mark.parametrize("seed", range(3))
def test_every_step_of_the_stack_lowers_the_error(sparsity, seed):
    """The benchmark's table, in its order."""
    rows = list(steps(*random_layer(96, 192, seed), sparsity, 4, naive=True))
    errors = [error for _, error, _ in rows]
    assert len(rows) >= 6 and all(b <= a * 1.05 for a, b in zip(errors, errors[1:])), rows


@pytest.mark.parametrize("columns", [192, 640])
def test_the_number_of_threads_changes_nothing(columns):
    """With one thread less, or one more, LAPACK's factors differ in the last bits, and codes would
    follow."""
    torch.manual_seed(0)
    X = torch.randn(512, columns) * torch.rand(columns)
    W = torch.randn(256, columns)
    H = hessian(X)
    threads = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            outs = [prune_and_round(W, H, 0.5, 4), sparsegpt(W, H, "2:4", 4), gptq(W, H, 4)]
            found.append(outs)
            assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for a, b in zip(found[0], other):
            assert torch.equal(a.weight, b.weight)
            assert torch.equal(a.codes, b.codes)
            assert a.error == b.error
