"""Reconstruction of sublayers in compress.py: against a naive version, what it keeps, and that it
never does harm.

    python -m pytest -q tests/test_reconstruct.py
"""
import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import compress as walks
from compress import (Kept, Settings, Walk, compress, compress_block, compress_model, make_solver,
                      plan, stream_errors)
from data.config import Config
from heal import TunedGrid, TunedNorm, tuned
from kernels.linear import PackedLinear
from kernels.packing import count_kept
from model import Transformer, open_checkpoint, rotate, save_model
from test_compress import Counted
from test_prompt import TOKENS, tiny

ROOT = Path(__file__).resolve().parents[1]
WINDOWS = TOKENS[:96].view(6, 16)
HELD = TOKENS.flip(0)[:32].view(2, 16)
FAMILIES = [("llama", {}), ("opt", {}), ("opt", {"pre_norm": False})]


def compressed(family="llama", passes=2, bits=4, sparsity=0.5, recipe="best", changes={},
               dtype=torch.float32):
    """A tiny model behind the walk, and what the walk tells of its Linears."""
    model = tiny(family, **changes)
    stats = compress_model(model, WINDOWS, make_solver(bits, sparsity, recipe),
                           Settings(reconstruct=passes), 2, dtype, heldout=HELD)
    return model, stats


def same_weights(a, b) -> bool:
    a = a.state_dict()
    b = b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def naive_sublayer(sublayer, h, weights, biases, norm, rope):
    """h + out(mix(norm(h))) written by hand."""
    def linear(name, x):
        bias = biases[name]
        return x @ weights[name].T + (0 if bias is None else bias)

    x = h
    if sublayer.pre_norm:
        x = norm(h)
    if sublayer.name == "mlp":
        y = linear("up", x)
        if sublayer.part.gate is None:
            y = y.relu()
        else:
            gate = linear("gate", x)
            y = y * gate * gate.sigmoid()
        out = h + linear("down", y)
    else:
        q, k, v = (linear(n, x).unflatten(-1, (4, -1)).transpose(1, 2) for n in "qkv")
        if rope is not None:
            q = rotate(q, rope)
            k = rotate(k, rope)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        later = torch.ones(scores.shape[-2:]).triu(1).bool()
        scores = scores.masked_fill(later, -torch.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        out = h + linear("o", y)
    return out if sublayer.pre_norm else norm(out)


@pytest.mark.parametrize("family, changes", FAMILIES)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_equal_those_of_a_sublayer_written_by_hand(family, changes, which, packed):
    """In fp64: of kept weights, of scales and zeros, of norms and biases, all away from where they
    start."""
    model = compressed(family, 0, changes=changes)[0]
    dense = tiny(family, **changes)
    g = torch.Generator().manual_seed(1)
    h = torch.randn(2, 16, 32, generator=g)
    wanted = h + 0.5 * torch.randn(2, 16, 32, generator=g)
    sublayer = dense.blocks[0].sublayers()[which]
    stored = model.blocks[0].sublayers()[which]
    rope = dense.rope(0, 16, "cpu")
    parts, exact = {}, {}                   # what is tuned, and where it starts
    weights, biases, numbers = {}, {}, {}   # moved away from there, as functions of the numbers
    for name in [*sublayer.part.reads, sublayer.part.writes]:
        linear = sublayer.part.get_submodule(name)
        layer = stored.part.get_submodule(name)
        mask = layer.weight_dequantized(torch.float32) == 0
        if packed:
            parts[name] = TunedGrid(layer)
            exact[name] = layer.weight_dequantized(torch.float32).double()
        else:
            parts[name] = Kept(linear.weight.masked_fill(mask, 0), mask, linear.bias)
            exact[name] = linear.weight.double()
    norm = TunedNorm(copy.deepcopy(sublayer.norm))
    every = {**parts, "norm": norm}
    for part in every.values():
        for p in part.parameters(recurse=False):
            p.data = 0.1 * torch.randn(p.shape, generator=g)
    for name, part in every.items():
        leaf = {n: p.detach().double().requires_grad_()
                for n, p in part.named_parameters(recurse=False)}
        numbers.update({f"{name}.{n}": p for n, p in leaf.items()})
        if name == "norm":
            continue
        bias = sublayer.part.get_submodule(name).bias
        if packed:
            layer = part.base
            bias = layer.bias
            scale = layer.scale.double()
            zero = layer.zero.double()
            sign = exact[name].sign()
            k = exact[name].abs() / scale - zero                # of an offset grid
            moved = sign * scale * (1 + leaf["u"]) * (k + zero + leaf["v"])
        else:
            kept = ~part.mask
            unit = exact[name][kept].square().mean().sqrt()
            moved = (exact[name] + unit * leaf["u"]) * kept
        weights[name] = moved
        biases[name] = None
        if bias is not None:
            unit = max(float(bias.float().std(correction=0)), 1e-3)
            biases[name] = bias.double() + unit * leaf["b"]

    def exact_norm(x):
        weight = sublayer.norm.weight.double() * (1 + numbers["norm.u"])
        if family == "llama":
            return weight * x / (x.square().mean(-1, keepdim=True) + sublayer.norm.eps).sqrt()
        unit = max(float(sublayer.norm.bias.float().std(correction=0)), 1e-3)
        bias = sublayer.norm.bias.double() + unit * numbers["norm.b"]
        return F.layer_norm(x, (32,), weight, bias, sublayer.norm.eps)

    out = naive_sublayer(sublayer, h.double(), weights, biases, exact_norm, rope)
    errors = (out - wanted.double()).square().mean(-1) / wanted.double().square().mean(-1)
    want = torch.autograd.grad(errors.mean(), list(numbers.values()))
    with tuned(sublayer.part, parts):
        found = stream_errors(sublayer._replace(norm=norm), h, wanted, rope)
        mine = [p for part in every.values() for p in part.parameters(recurse=False)]
        got = torch.autograd.grad(found.mean(), mine)
    assert torch.allclose(found.double(), errors, rtol=1e-4)
    for name, a, b in zip(numbers, got, want):
        assert b.abs().max() > 1e-6 or name == "k.b"            # which softmax does not see
        atol = 1e-4 * float(b.abs().max()) + 1e-7
        assert torch.allclose(a.double(), b, rtol=1e-3, atol=atol), name
        if name.endswith(".u") and not packed and name != "norm.u":
            assert (a[every[name[:-2]].mask] == 0).all()


@pytest.mark.parametrize("family, changes", FAMILIES)
@pytest.mark.parametrize("bits, sparsity", [(4, 0.5), (4, "2:4"), (None, 0.5), (4, 0), (3, 0.3)])
def test_the_masks_of_the_walk_and_their_exact_sparsity_are_kept(family, changes, bits, sparsity):
    on, stats = compressed(family, 2, bits, sparsity, changes=changes)
    off, _ = compressed(family, 0, bits, sparsity, changes=changes)
    if sparsity:                                                # else it may win nothing
        assert any(s["error_sublayer"] < s["error_sublayer_before"] for s in stats)
    assert all(s["error_sublayer"] <= s["error_sublayer_before"] for s in stats)
    fraction = 0.5 if sparsity == "2:4" else sparsity
    for block in on.blocks:
        for sublayer in block.sublayers():
            for names in (sublayer.reads, sublayer.writes):             # solved as one matrix
                linears = [block.get_submodule(name) for name in names]
                size = sum(m.in_features * m.out_features for m in linears)
                if bits is None:
                    kept = sum(int((m.weight != 0).sum()) for m in linears)
                else:
                    kept = sum(count_kept(m.packed) for m in linears)
                assert kept == size - round(fraction * size), names
    if bits and sparsity:                                       # later ones see other inputs
        for name in "qkvo":
            one, other = (m.blocks[0].attn.get_submodule(name).packed for m in (on, off))
            assert torch.equal(one.tensors["mask"], other.tensors["mask"])


@pytest.mark.parametrize("family, changes", FAMILIES)
def test_the_errors_told_are_those_of_the_sublayer_on_held_out_windows(family, changes):
    """Counted by hand on the first sublayer, whose input is the dense model's: with
    reconstruction, and without on the same windows."""
    dense = tiny(family, **changes)
    stats = compressed(family, 3, sparsity=0.6, changes=changes)[1][0]
    found = []
    for passes in (0, 3):
        model = compressed(family, passes, sparsity=0.6, changes=changes)[0]
        h = dense.stem(dense.embed(HELD)).half().float()        # as it is parked
        rope = dense.rope(0, 16, "cpu")

        def first_sublayer(model):
            sublayer = model.blocks[0].sublayers()[0]
            return sublayer.write(h, sublayer.mix(h, rope))

        wanted = first_sublayer(dense).half().float()
        e = (first_sublayer(model) - wanted).square().sum(-1) / wanted.square().sum(-1)
        found.append(float(e.mean()))
    told = [stats["error_sublayer_before"], stats["error_sublayer"]]
    assert found == pytest.approx(told, rel=1e-3)
    assert found[1] < found[0]


@pytest.mark.parametrize("family, changes", FAMILIES)
@pytest.mark.parametrize("bits", [4, None])
def test_what_does_not_pay_is_taken_back_to_the_bit(family, changes, bits, monkeypatch):
    """Adam gone mad: the model is that of a walk without reconstruction."""
    tune = walks.tune

    def mad(sublayer, parts, norm, *rest):
        with torch.no_grad():
            for part in [*parts.values(), norm]:
                for p in part.parameters(recurse=False):
                    p.normal_()
    monkeypatch.setattr(walks, "tune", mad)
    on, stats = compressed(family, 2, bits, changes=changes)
    assert all(s["error_sublayer"] == s["error_sublayer_before"] for s in stats)
    off, told = compressed(family, 0, bits, changes=changes)
    assert same_weights(on, off)
    for s in stats:
        del s["error_sublayer"], s["error_sublayer_before"]
    assert stats == told
    monkeypatch.setattr(walks, "tune", tune)
    assert not same_weights(compressed(family, 2, bits, changes=changes)[0], off)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_wins_too(dtype):
    stats = compressed(passes=3, dtype=dtype)[1]
    assert all(s["error_sublayer"] <= s["error_sublayer_before"] for s in stats)
    assert stats[-1]["error_sublayer"] < stats[-1]["error_sublayer_before"]


@pytest.mark.parametrize("family, bits", [("llama", 4), ("opt", 4), ("opt", None)])
def test_a_killed_walk_ends_in_the_same_bytes(family, bits, tmp_path):
    save_model(tiny(family), tmp_path / "dense", torch.float32)
    checkpoint = open_checkpoint(tmp_path / "dense")
    solve = make_solver(bits, 0.5)
    settings = Settings(reconstruct=2)
    spent = {}

    def walk(folder, **more):
        return compress(checkpoint, tmp_path / folder, WINDOWS, solve, settings, 2, heldout=HELD,
                        **more)

    stats = walk("a", spent=spent)
    assert 0 < spent["reconstructing"] < 60

    def kill(i):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        walk("b", after_block=kill)
    assert walk("b") == stats
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    memory = tiny(family)
    assert compress_model(memory, WINDOWS, solve, settings, 2, heldout=HELD) == stats


def test_between_blocks_only_the_streams_live():
    """Counted: every tensor of a window's length that is alive after a block."""
    import gc
    model = tiny()
    seen = []
    windows = TOKENS[:90].view(6, 15)
    held = TOKENS[:30].view(2, 15)
    walk = Walk(model, windows, True, 2, torch.float32, "cpu", heldout=held, judged=True)
    for i, block in enumerate(model.blocks):
        compress_block(i, block, walk, make_solver(4, 0.5), Settings(reconstruct=1))
        gc.collect()
        alive = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                 for t in gc.get_objects()          # a loop would keep its last tensor alive
                 if isinstance(t, torch.Tensor) and t.dim() == 3 and t.shape[1] == 15}
        seen.append(sum(alive.values()))
    assert seen == [2 * (6 + 2) * 15 * 32 * 2] * 2


@pytest.mark.parametrize("family, nsamples, seqlen", [("llama", 8, 64), ("llama", 16, 64),
                                                      ("opt", 4, 512)])
def test_the_device_holds_a_sublayer_and_its_sums(family, nsamples, seqlen, tmp_path,
                                                    monkeypatch):
    """Counted: what `plan` says of all and of reconstruction, each block as much as the other, and
    no more for more windows."""
    bias = family == "opt"
    config = Config(family, 64, 192, 2, 4, 512, max_positions=512, attention_bias=bias,
                    mlp_bias=bias, tied=bias)
    torch.manual_seed(0)
    save_model(Transformer(config), tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    settings = Settings(reconstruct=1)
    windows = torch.randint(0, 64, (nsamples, seqlen))
    walk = Walk(checkpoint.ends(torch.float32), windows, True, 4, torch.float32, "cpu",
                heldout=windows[:1], judged=True)
    streams = (nsamples + 1) * seqlen * config.d_model * 2 * 2
    planned = plan(checkpoint, windows.numel(), 4 * seqlen, torch.float32, settings, 4, 0.5,
                   seqlen, 0, seqlen)
    tune = walks.tune
    peaks, tuning = [], []

    def measured(*args):
        before = counted.peak
        counted.peak = counted.now
        tune(*args)
        tuning.append(counted.peak - streams)
        counted.peak = max(before, counted.peak)
    monkeypatch.setattr(walks, "tune", measured)
    for i in range(2):
        with Counted() as counted:
            compress_block(i, checkpoint.block(i), walk, make_solver(4, 0.5), settings)
        peaks.append(counted.peak - streams)
    assert 0.45 * planned.device < peaks[0] <= planned.device, (peaks, planned)
    assert 0.5 * planned.tuning < max(tuning) <= planned.tuning, (tuning, planned)
    assert peaks[1] == pytest.approx(peaks[0], rel=0.02)


def test_products_are_planned_from_shapes(tmp_path):
    """Twice a weight and token forwards, twice that backwards; the windows held out only
    forwards."""
    save_model(tiny(), tmp_path, torch.float32)
    checkpoint = open_checkpoint(tmp_path)
    told = [plan(checkpoint, 96, 32, torch.float32, Settings(reconstruct=n), 4, 0.5, 32)
            for n in (0, 2, 4)]
    weights = sum(m.weight.numel() for _, m in tiny().linears()) + 2 * 2 * 32   # with the norms
    assert told[0].flops == told[0].tuning == 0 and "reconstruction" not in str(told[0])
    assert told[2].flops - told[1].flops == 2 * weights * 3 * (3 * 96 + 32)
    assert "reconstruction" in str(told[1])


@pytest.mark.parametrize("flags, said", [
    ("--reconstruct -1", "between 0 and"),
    ("--reconstruct nan", "whole number"),
    ("--reconstruct 2 --bits 16 --sparsity 0", "nothing"),
    ("--reconstruct 2 --recipe plain", "--correct above 0"),
    ("--reconstruct 2 --correct 0", "--correct above 0"),
])
def test_what_cannot_be_is_refused_in_one_line(flags, said):
    done = subprocess.run([sys.executable, "train.py", "--steps", "0", "--plan", *flags.split()],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_it_needs_held_out_windows_and_one_process(monkeypatch):
    with pytest.raises(ValueError, match="held-out"):
        compress_model(tiny(), WINDOWS, make_solver(4, 0.5), Settings(reconstruct=1), 2)
    monkeypatch.setattr(walks.parallel, "world", lambda: 2)
    with pytest.raises(ValueError, match="one process"):
        Settings(reconstruct=1).check()


def test_the_plain_recipe_with_the_dense_stream_beside_it_works():
    stats = compressed("llama", 2, recipe="plain")[1]
    assert stats[0]["error_sublayer"] < stats[0]["error_sublayer_before"]
