"""heal.py: levels, signs and gradients against dense autograd, what is stored after it, and that it
wins on held-out text.

    python -m pytest -q tests/test_heal.py
"""
import copy
import json
import shutil

import pytest
import torch

import heal as heal_module
import train
from compress import compress, compress_model, hold_out, make_solver
from data.config import Config
from heal import (GridLinear, KeptLinear, Tuned, TunedGrid, TunedKept, TunedNorm, heal,
                  levels_and_signs, rewrite, save_healed, tuned)
from kernels.linear import PackedLinear
from kernels.packing import pack
from kernels.unpacking import unpack
from model import Transformer, load_model, open_checkpoint, save_model
from prompt import fit, mark_of_model, mean_loss, teacher_states
from test_train import here, needs_tiny, same_files, text


def packed_linear(grid="offset", bits=4, groupsize=-1, share=0.5, rows=6, cols=48, bias=False,
                  order=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, cols), generator=g, dtype=torch.uint8)
    mask = torch.rand(rows, cols, generator=g) < share if share else None
    groups = 1 if groupsize == -1 else -(-cols // groupsize)
    scale = (torch.rand(rows, groups, generator=g) * 0.02 + 0.01).half()
    low = 0.4 if grid == "offset" else 7.0
    zero = (torch.rand(rows, groups, generator=g) * 0.3 + low).half()
    g_idx = torch.randperm(cols, generator=g) * groups // cols if order else None
    held = pack(codes, mask, scale, zero, bits, grid, groupsize, g_idx=g_idx)
    return PackedLinear(held, torch.randn(rows, generator=g).half().float() if bias else None)


KINDS = [                                           # grid, bits, groupsize, share pruned, order
    ("offset", 4, -1, 0.5, False),
    ("offset", 4, 16, 0.5, False),
    ("uniform", 4, -1, 0.5, False),
    ("uniform", 3, -1, 0, False),
    ("offset", 2, 16, 0.4, True),
    ("uniform", 8, 16, 0, True),
]


@pytest.mark.parametrize("grid, bits, groupsize, share, order", KINDS)
def test_grid_linear_equals_autograd_through_the_formula(grid, bits, groupsize, share, order):
    layer = packed_linear(grid, bits, groupsize, share, order=order)
    part = TunedGrid(layer)
    A, T = levels_and_signs(layer.packed)
    expand = lambda t: t.double()[:, part.group]
    scale, zero = (t.float().requires_grad_() for t in part.grid())
    W = expand(scale) * (A.double() + expand(zero) * T.double())
    assert torch.allclose(W.float(), unpack(layer.packed, torch.float32), rtol=1e-6)
    assert torch.equal(A, A.round())
    assert set(T.unique().tolist()) <= {-1.0, 0.0, 1.0}
    x = torch.randn(2, 5, 48, requires_grad=True)
    dy = torch.randn(2, 5, 6)
    want = torch.autograd.grad((x.double() @ W.T * dy.double()).sum(), (x, scale, zero))
    y = GridLinear.apply(x, scale, zero, layer.packed, part.group)
    got = torch.autograd.grad((y * dy).sum(), (x, scale, zero))
    assert torch.allclose(y, layer(x), atol=1e-5)
    for a, b in zip(got, want):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def test_kept_linear_equals_autograd_through_the_formula():
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 20, generator=g)
    weight[torch.rand(6, 20, generator=g) < 0.5] = 0
    B = torch.randn(6, 3, generator=g).requires_grad_()
    A = torch.randn(3, 20, generator=g).requires_grad_()
    x = torch.randn(2, 5, 20, generator=g).requires_grad_()
    dy = torch.randn(2, 5, 6, generator=g)
    W = weight.double() + 0.7 * (B.double() @ A.double()) * (weight != 0)
    want = torch.autograd.grad((x.double() @ W.T * dy.double()).sum(), (x, B, A))
    y = KeptLinear.apply(x, B, A, weight, 0.7)
    assert torch.allclose(y.double(), x.double() @ W.T, atol=1e-5)
    got = torch.autograd.grad((y * dy).sum(), (x, B, A))
    for a, b in zip(got, want):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def model_pair(family="llama", bias=False):
    """A dense model and itself with every Linear rounded to 2 bits and packed."""
    torch.manual_seed(0)
    is_opt = family == "opt"
    c = Config(family, vocab_size=50, d_model=32, n_layer=2, n_head=4, d_ff=64, max_positions=64,
               tied=is_opt, attention_bias=is_opt, mlp_bias=is_opt)
    dense = Transformer(c).requires_grad_(False).eval()
    for name, p in dense.named_parameters():
        is_norm = "norm" in name and name.endswith("weight")
        p.data = torch.randn_like(p) * 0.2 + (1.0 if is_norm else 0.0)
        p.data = p.half().float()                                # as files hold them
    model = copy.deepcopy(dense)
    for name, m in model.linears():
        scale = (m.weight.abs().amax(1, keepdim=True) / 1.5).half()
        codes = (m.weight / scale.float() + 1.5).round().clamp(0, 3).to(torch.uint8)
        mask = torch.rand(m.weight.shape) < 0.2
        held = pack(codes, mask, scale, torch.full_like(scale, 1.5), 2, "uniform")
        model.set_submodule(name, PackedLinear(held, m.bias))
    return dense, model


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_healing_wins_on_held_out_text_and_changes_only_grids_norms_and_biases(family, tmp_path):
    dense, model = model_pair(family)
    text = torch.randint(0, 50, (24, 16), generator=torch.Generator().manual_seed(1))
    windows = text[:16]
    val = text[16:20]
    unseen = text[20:]
    teacher = teacher_states(dense, windows, tmp_path), teacher_states(dense, val, tmp_path)
    test = teacher_states(dense, unseen, tmp_path)
    model(unseen[:1, :2])  # makes decode caches, of the old grids
    before = copy.deepcopy(model.state_dict())
    gap = mean_loss(model, None, unseen, teacher=test)
    got = heal(model, windows, val, teacher, steps=40, batch_size=4, lr=1e-2)
    after = model.state_dict()
    assert got.scores[0][1] > got.val_loss
    assert mean_loss(model, None, unseen, teacher=test) < 0.8 * gap
    changed = {n.rpartition(".")[2] for n in before if not torch.equal(before[n], after[n])}
    norms = {n for n in before if "norm" in n}
    assert changed == {"scale", "zero", "weight"} | ({"bias"} if family == "opt" else set())
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert {n for n in changed if n.endswith("weight")} <= norms
    assert all(after[n].dtype == before[n].dtype and after[n].shape == before[n].shape
               for n in before)
    stored = mean_loss(model, None, val, teacher=teacher[1])      # with grids in fp16
    assert abs(got.val_loss - stored) < 0.02 * got.val_loss
    assert not any(isinstance(m, Tuned) for m in model.modules())
    save_model(model, tmp_path / "healed")                        # what is stored is what runs
    again = load_model(tmp_path / "healed")
    assert torch.equal(again(unseen), model(unseen))
    assert torch.equal(again(unseen[:1, :2]), model(unseen[:1, :2]))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_pruned_model_heals_in_what_it_keeps(family, tmp_path):
    dense, _ = model_pair(family)
    model = copy.deepcopy(dense)
    for _, m in model.linears():
        m.weight.data[torch.rand(m.weight.shape) < 0.3] = 0
    text = torch.randint(0, 50, (24, 16), generator=torch.Generator().manual_seed(1))
    windows, val, unseen = text[:16], text[16:20], text[20:]
    teacher = teacher_states(dense, windows, tmp_path), teacher_states(dense, val, tmp_path)
    test = teacher_states(dense, unseen, tmp_path)
    before = copy.deepcopy(model)
    with tuned(model) as parts:                                   # the start changes nothing
        kept = [part for part in parts.values() if isinstance(part, TunedKept)]
        assert len(kept) == len(list(before.linears()))
        assert torch.allclose(model(unseen), before(unseen), atol=1e-4)
    gap = mean_loss(model, None, unseen, teacher=test)
    got = heal(model, windows, val, teacher, steps=40, batch_size=4, lr=1e-2)
    assert got.scores[0][1] > got.val_loss
    assert mean_loss(model, None, unseen, teacher=test) < 0.9 * gap
    for (name, old), (_, new) in zip(before.linears(), model.linears()):
        assert torch.equal(old.weight == 0, new.weight == 0), name
        assert not torch.equal(old.weight, new.weight), name
        assert torch.equal(new.weight, new.weight.half().float()), name
    assert torch.equal(model.embed_tokens.weight, dense.embed_tokens.weight)


def test_rewritten_tokens_are_what_the_states_before_them_predict():
    windows = torch.randint(0, 50, (6, 40), generator=torch.Generator().manual_seed(0))
    follows = (windows * 7 + 3) % 50                    # a model that is sure of what comes next
    states = 100 * torch.eye(50)[follows].half()
    rewritten = rewrite(windows, states, torch.eye(50), share=0.5)
    predicted = torch.cat([windows[:, :1], follows[:, :-1]], 1)
    changed = rewritten != windows
    assert torch.equal(rewritten[changed], predicted[changed])
    drawn = changed.sum() / (windows != predicted).sum()
    assert 0.4 < drawn < 0.6
    assert not changed[:, 0].any()
    assert torch.equal(rewrite(windows, states, torch.eye(50), share=0.5), rewritten)
    assert not torch.equal(rewrite(windows, states, torch.eye(50), seed=1, share=0.5), rewritten)
    assert torch.equal(rewrite(windows, states, torch.eye(50), share=0), windows)
    assert torch.equal(rewrite(windows, states, torch.eye(50), share=1), predicted)


def test_rewritten_tokens_are_drawn_with_their_probabilities(monkeypatch):
    chances = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    windows = torch.full((4, 4001), 4)
    states = chances.log().clamp(min=-30).expand(4, 4001, 5)
    monkeypatch.setattr(heal_module, "LOGITS", 5 * 300)         # in several parts
    drawn = rewrite(windows, states, torch.eye(5), share=1)[:, 1:]
    assert torch.allclose(drawn.flatten().bincount(minlength=5) / drawn.numel(), chances, atol=0.02)
    assert not torch.equal(drawn[0], drawn[1])


def test_each_pass_takes_the_next_reading():
    p, read = torch.zeros(1, requires_grad=True), []

    def loss_of_batch(index):
        read.extend(index.tolist())
        p.grad = torch.ones(1)
        return 1.0
    fit({"p": p}, loss_of_batch, 6, steps=9, batch_size=2, readings=2)
    passes = [sorted(read[k:k + 6]) for k in (0, 6, 12)]
    assert passes == [list(range(6)), list(range(6, 12)), list(range(6))]
    assert read[:6] != [k - 6 for k in read[6:12]]              # reshuffled


@needs_tiny
def test_windows_are_read_again_rewritten_and_not_more_often_than_states_have_room(text, tmp_path):
    args = ["--nsamples", 4, "--seqlen", 64, "--calib", text, "--data", text, "--max-tokens", 512,
            "--batch-size", 2, "--steps", 0, "--device", "cpu", "--dtype", "float32"]
    read = []

    def watch(model, windows, *rest, **more):
        read.append(windows)
        assert len(windows) == 4 * more["readings"]
        return heal(model, windows, *rest, **more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "heal", watch)
        for steps in (2, 4, 5, 40):
            here(*args, "--heal", steps, "--out", tmp_path / str(steps))
    once, twice, thrice, often = read                   # what is read twice stays as it is
    assert [len(w) for w in read] == [4, 4, 12, 4 * (1 + train.MOST_AGAIN)]
    assert torch.equal(once, twice) and torch.equal(once, thrice[:4])
    assert torch.equal(thrice, often[:12])
    for again in often[4:].split(4):
        assert 0.05 < (again != once).float().mean() < 0.3
    assert len(often.unique(dim=0)) == len(often)


def test_norm_stand_ins_equal_the_norms_with_tuned_numbers():
    for family in ("llama", "opt"):
        _, model = model_pair(family)
        norm = model.blocks[0].norm1
        x = torch.randn(3, 32)
        part = TunedNorm(norm)
        assert torch.allclose(part(x), norm(x), atol=1e-6)
        with torch.no_grad():
            part.u.normal_().mul_(0.1)
            if part.b is not None:
                part.b.normal_()
        want = part(x)
        assert torch.allclose(part.settle()(x), want, atol=3e-3)


def test_a_run_that_fails_leaves_the_model_as_it_was(tmp_path):
    dense, model = model_pair()
    text = torch.randint(0, 50, (8, 16), generator=torch.Generator().manual_seed(1))
    teacher = teacher_states(dense, text[:4], tmp_path), teacher_states(dense, text[4:], tmp_path)
    before = copy.deepcopy(model.state_dict())

    def bar(items, title):
        for i in items:
            if i == 3:
                raise KeyboardInterrupt
            yield i
    with pytest.raises(KeyboardInterrupt):
        heal(model, text[:4], text[4:], teacher, steps=8, batch_size=2, val_every=2, progress=bar,
             state=tmp_path / "heal.pt")
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    one, two, three = (copy.deepcopy(model) for _ in range(3))
    got = heal(one, text[:4], text[4:], teacher, steps=8, batch_size=2, val_every=2,
               state=tmp_path / "heal.pt")
    whole = heal(two, text[:4], text[4:], teacher, steps=8, batch_size=2, val_every=2)
    assert got == whole
    other = heal(three, text[:4], text[4:], teacher, steps=8, batch_size=2, seed=1)
    assert other.losses != whole.losses
    assert all(torch.equal(t, one.state_dict()[n]) for n, t in two.state_dict().items())
    with pytest.raises(ValueError, match="model was"):            # healed already: another model
        heal(one, text[:4], text[4:], teacher, steps=8, batch_size=2, val_every=2,
             state=tmp_path / "heal.pt")


def test_a_model_on_another_grid_is_another():
    _, model = model_pair()
    marks = [mark_of_model(model)]
    for numbers in (model.blocks[1].mlp.up.scale, model.blocks[1].mlp.up.zero):
        numbers.mul_(2)
        marks.append(mark_of_model(model))
    assert len(set(marks)) == 3


def test_a_rate_that_ruins_returns_the_start(tmp_path):
    dense, model = model_pair()
    text = torch.randint(0, 50, (8, 16), generator=torch.Generator().manual_seed(1))
    teacher = teacher_states(dense, text[:4], tmp_path), teacher_states(dense, text[4:], tmp_path)
    before = copy.deepcopy(model.state_dict())
    got = heal(model, text[:4], text[4:], teacher, steps=4, batch_size=2, lr=5.0)
    assert got.val_loss == got.scores[0][1]
    assert all(torch.allclose(t.float(), before[n].float(), rtol=1e-3)
               for n, t in model.state_dict().items())


def test_what_cannot_be_healed_is_said(tmp_path):
    dense, model = model_pair()
    text = torch.randint(0, 50, (4, 16))
    states = teacher_states(dense, text, tmp_path)
    with pytest.raises(ValueError, match="packed .quantized. or pruned"):
        heal(dense, text, text, (states, states), steps=1)
    with pytest.raises(ValueError, match="got 4 and 0 windows"):
        heal(model, text, text[:0], (states, states[:0]), steps=1)


@pytest.mark.parametrize("bits", [4, None])
def test_a_head_that_holds_a_zero_was_not_pruned(bits, tmp_path):
    """As that of LLaMA-7B does, whose small numbers fp16 rounds to 0."""
    config = Config("llama", 50, 32, 2, 4, 48, 2, max_positions=64, tied=False)
    torch.manual_seed(0)
    dense = Transformer(config).requires_grad_(False).eval()
    dense.lm_head.weight[3, 5] = 0
    text = torch.randint(0, 50, (8, 16))
    model = copy.deepcopy(dense)
    compress_model(model, text, make_solver(bits, 0.5))
    states = teacher_states(dense, text, tmp_path)
    head = model.lm_head.weight.clone()
    with tuned(model) as parts:
        assert "lm_head" not in parts
        assert {"norm", "blocks.1.mlp.down"} <= set(parts)
    heal(model, text, text, (states, states), steps=2)
    assert torch.equal(model.lm_head.weight, head)


def test_checkpointing_gives_the_same_gradients(tmp_path):
    from prompt import text_loss
    dense, model = model_pair()
    text = torch.randint(0, 50, (2, 16))
    states = teacher_states(dense, text, tmp_path)
    grads = []
    for model.checkpointing in (False, True):
        with tuned(model) as parts:
            text_loss(model, None, text, states).mean().backward()
            grads.append([p.grad for m in parts.values() for p in m.parameters(recurse=False)])
    assert len(grads[0]) > 20
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))


def test_windows_held_out_share_no_text_with_the_others():
    tokens = torch.randint(0, 1000, (4000,), generator=torch.Generator().manual_seed(0))
    # of windows of 100; the first three are learned from
    at = [0, 40, 1000, 10, 3000, 1090, 90, 2000, 3500]
    drawn = torch.stack([tokens[i:i + 100] for i in at])
    windows, held = hold_out(drawn, 3, 3)
    assert torch.equal(windows, drawn[:3])
    # 10 and 90 overlap; 1090 shares 10 tokens, which is no run
    assert torch.equal(held, drawn[[4, 5, 7]])
    # of a short text, the next best: 90
    assert torch.equal(hold_out(drawn, 3, 5)[1], drawn[[4, 5, 6, 7, 8]])


def test_a_healed_folder_is_the_model_in_the_same_shards(tmp_path):
    dense, _ = model_pair("opt")
    text = torch.randint(0, 50, (8, 16), generator=torch.Generator().manual_seed(1))
    save_model(dense, tmp_path / "dense", torch.float32)
    compress(open_checkpoint(tmp_path / "dense"), tmp_path / "compressed", text,
             make_solver(4, 0.5))
    model = load_model(tmp_path / "compressed")
    states = teacher_states(dense, text, tmp_path)
    heal(model, text, text, (states, states), steps=4)
    save_healed(model, tmp_path / "compressed", tmp_path / "healed")
    again = load_model(tmp_path / "healed")
    assert torch.equal(again(text), model(text))
    assert not torch.equal(again(text), load_model(tmp_path / "compressed")(text))
    names = lambda folder: sorted((p.name, p.stat().st_size) for p in folder.glob("*.safetensors"))
    assert names(tmp_path / "healed") == names(tmp_path / "compressed")


@needs_tiny
def test_a_pruned_run_heals_and_keeps_its_zeros(text, tmp_path):
    args = ["--nsamples", 4, "--seqlen", 64, "--calib", text, "--data", text, "--max-tokens", 512,
            "--bits", 16, "--steps", 0, "--device", "cpu", "--dtype", "float32"]
    for steps, name in ((0, "a"), (4, "b")):
        here(*args, "--heal", steps, "--out", tmp_path / name)
    report = json.loads((tmp_path / "b/report.json").read_text())
    names = [row["name"] for row in report["rows"]]
    assert names == ["dense", "compressed", "compressed + healed"]
    gaps = [gap for _, gap in report["losses"]["compressed"]["validation"]]
    wins = min(gaps) < gaps[0]                      # else the start is kept
    one, two = (load_model(tmp_path / name / "compressed") for name in "ab")
    for (name, old), (_, new) in zip(one.linears(), two.linears()):
        assert torch.equal(old.weight == 0, new.weight == 0), name
        assert torch.equal(old.weight, new.weight) != wins, name


@needs_tiny
def test_a_run_killed_while_the_healed_model_takes_its_place_goes_on(text, tmp_path):
    args = ["--nsamples", 4, "--seqlen", 64, "--calib", text, "--data", text, "--max-tokens", 512,
            "--heal", 2, "--steps", 0, "--device", "cpu", "--dtype", "float32"]
    here(*args, "--out", tmp_path / "a")
    left = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert left == [".lock", "compressed", "report.json", "seconds.json", "shares.json"]
    # before the new folder has its name, and after
    for name, half_removed in (("b", True), ("c", False)):
        shutil.copytree(tmp_path / "a", tmp_path / name)
        report = json.loads((tmp_path / name / "report.json").read_text())
        report["rows"] = [row for row in report["rows"] if row["name"] != "compressed + healed"]
        (tmp_path / name / "report.json").write_text(json.dumps(report))
        (tmp_path / name / "heal.state").write_bytes(b"")
        if half_removed:
            (tmp_path / name / "compressed").rename(tmp_path / name / "healed")
            (tmp_path / name / "compressed").mkdir()
            (tmp_path / name / "compressed/model-00001-of-00007.safetensors").write_bytes(b"")
        here(*args, "--out", tmp_path / name, "--resume")
        assert same_files(tmp_path / "a", tmp_path / name) == []
