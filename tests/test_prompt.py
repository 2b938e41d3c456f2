"""prompt.py: what is learned, chosen and stored; resuming to the same bits.

    python -m pytest -q tests/test_prompt.py
"""
import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import eval
import train
from data.checkpoint import read_json
from data.config import Config
from data.progress import Progress
from model import Transformer, load_model, open_checkpoint
from prompt import (PAPER, SCALE, HeadLoss, as_prefix, backward, backward_by_parts, default_rate,
                    fit, initial_prompt, kind_of, learn, load_prompt, mean_loss, owner, save_prompt,
                    streamed_prefix, teacher_states, text_loss)

ROOT = Path(__file__).resolve().parents[1]


def tiny(family="llama", seed=0, **changes):
    torch.manual_seed(seed)
    c = Config(family, vocab_size=50, d_model=32, n_layer=2, n_head=4, d_ff=64, max_positions=64,
               tied=family == "opt",
               **({"attention_bias": True, "mlp_bias": True} if family == "opt" else {}), **changes)
    model = Transformer(c).requires_grad_(False).eval()
    for name, p in model.named_parameters():
        is_norm = "norm" in name and name.endswith("weight")
        p.data = torch.randn_like(p) * 0.3 + (1.0 if is_norm else 0.0)
    return model


TOKENS = torch.randint(0, 50, (97,), generator=torch.Generator().manual_seed(3))


class Letters:
    eos_id = None
    bos_id = None

    @property
    def stops(self):
        return frozenset([self.eos_id])

    def special(self, text):
        return None

    def encode(self, text, bos=True):
        return [ord(c) % 50 for c in text]

    def decode(self, ids):
        return "".join(chr(48 + i) for i in ids)


def test_files_say_valid_json_and_hold_finite_numbers(tmp_path):
    """NaN among the settings is null; a prompt with NaN, or one that wants gradients, does not come
    in."""
    path = tmp_path / "p.safetensors"
    prompt = torch.randn(4, 8)
    save_prompt(path, prompt, {"val_loss": float("nan"), "lr": 0.1})
    assert load_prompt(path)[1] == {"val_loss": None, "lr": 0.1}
    torch.save({"soft_prompt": torch.nn.Parameter(prompt)}, tmp_path / "p.pt")
    assert not load_prompt(tmp_path / "p.pt")[0].requires_grad
    prompt[1, 2] = float("inf")
    torch.save(prompt, tmp_path / "p.pt")
    save_prompt(path, prompt)
    for bad in (path, tmp_path / "p.pt"):
        with pytest.raises(ValueError, match=f"{bad.name}: soft_prompt holds NaN or Inf"):
            load_prompt(bad)


class Foreign(torch.nn.Module):
    """A model with embed and forward alone, as another project's would be."""

    def __init__(self, model):
        super().__init__()
        self.m, self.embed_tokens = model, model.embed_tokens

    def embed(self, tokens):
        return self.m.embed(tokens)

    def forward(self, embeds):
        return self.m(embeds)


def test_learning_lowers_the_loss_and_touches_only_the_prompt():
    model, windows = tiny(), TOKENS[:96].view(6, 16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    start = initial_prompt(model, 6, "text", TOKENS)
    got = learn(model, start, windows[:5], windows[5:], steps=40, batch_size=2, lr=0.05)
    assert got.prompt.dtype == torch.float32
    assert got.prompt.shape == (6, 32)
    assert mean_loss(model, got.prompt, windows[:5]) < mean_loss(model, start, windows[:5]) - 0.05
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert len(got.losses) == 40
    assert math.isclose(got.val_loss, mean_loss(model, got.prompt, windows[5:]), rel_tol=1e-5)
    again = learn(model, start, windows[:5], windows[5:], steps=40, batch_size=2, lr=0.05)
    assert torch.equal(again.prompt, got.prompt)                  # same seed, same prompt


def test_best_on_validation_is_kept():
    """A rate that ruins the prompt: what comes back is the best seen, not the last."""
    model, windows = tiny(), TOKENS[:96].view(6, 16)
    start = initial_prompt(model, 6, "random")
    seen = []
    got = learn(model, start, windows[:5], windows[5:], steps=12, batch_size=2, lr=30.0,
                val_every=1,
                progress=lambda items, title: seen.append(title) or items)
    last = learn(model, start, windows[:5], windows[5:0], 12, 2, 30.0)  # no windows, no choice
    assert seen
    assert math.isnan(last.val_loss)
    assert got.val_loss < mean_loss(model, last.prompt, windows[5:]) - 0.01
    assert math.isclose(got.val_loss, mean_loss(model, got.prompt, windows[5:]), rel_tol=1e-5)


def bowl(**more):
    """A small problem for fit: (params, Fit); loss (p - target of the window)^2."""
    targets = torch.randn(7, 3, generator=torch.Generator().manual_seed(5))
    p = torch.nn.Parameter(torch.zeros(3))
    calls = []

    def loss(index):
        calls.append(index.tolist())
        if len(calls) == more.get("die_at"):
            raise KeyboardInterrupt
        return backward((p - targets[index]).square().mean())
    keep = {k: v for k, v in more.items() if k != "die_at"}
    settings = {"steps": 20, "batch_size": 2, "lr": 0.1, "val_every": 3, "seed": 4, **keep}
    try:
        got = fit({"p": p}, loss, 7, lambda: float((p.detach() - targets.mean(0)).square().mean()),
                  **settings)
    except KeyboardInterrupt:
        got = None
    return p.detach(), got, calls


def test_a_state_between_two_validations_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    """Long runs write one every few minutes."""
    want, whole, _ = bowl(val_every=10)
    monkeypatch.setattr("prompt.WRITE_EVERY", 0.0)
    state = tmp_path / "state.pt"
    bowl(val_every=10, state=state, die_at=7)
    got, again, calls = bowl(val_every=10, state=state)
    assert len(calls) == 14                                     # six steps were written
    assert torch.equal(got, want) and again == whole


def test_small_gradients_survive_half_precision():
    """A gradient of 1e-8, which float16 rounds to nothing, moves a parameter as far as in float32."""
    ends = []
    for dtype in (torch.float32, torch.float16):
        p = torch.nn.Parameter(torch.zeros(3))
        tiny, small = torch.tensor(1e-5, dtype=dtype), torch.tensor(1e-3, dtype=dtype)
        fit({"p": p}, lambda index: backward((p.to(dtype) * tiny * small).float().sum()), 4, None, 5,
            2, 0.1)
        ends.append(p.detach())
    assert ends[0].abs().min() > 0.1 and torch.allclose(*ends, rtol=1e-2)


def test_windows_weigh_alike_in_parts_of_unlike_size():
    p = torch.nn.Parameter(torch.ones(()))
    loss = backward_by_parts(lambda part: (p * part)[:, None], torch.arange(5), 2)
    assert loss == pytest.approx(2)
    assert p.grad == pytest.approx(2 * SCALE)


@pytest.mark.parametrize("warmup, clip, betas", [(None, 1.0, (0.9, 0.999)), (5, 0.1, (0.8, 0.99))])
def test_fit_is_adamw_with_a_triangular_rate(warmup, clip, betas):
    """Against the loop written plainly; every window is seen once an epoch, in the seed's order."""
    settings = dict(val_every=20, warmup=warmup, clip=clip, betas=betas)
    p, got, calls = bowl(**settings)
    assert calls != bowl(**settings, seed=5)[2]
    assert [sorted(sum(calls, [])[i:i + 7]) for i in (0, 7, 14, 21, 28)] == [list(range(7))] * 5
    q = torch.nn.Parameter(torch.zeros(3))
    opt = torch.optim.AdamW([q], lr=0.1, betas=betas, weight_decay=0.0)
    targets = torch.randn(7, 3, generator=torch.Generator().manual_seed(5))
    rise = warmup or 2
    for step, index in enumerate(calls):
        share = (step + 1) / rise if step < rise else (20 - step) / (20 - rise)
        opt.param_groups[0]["lr"] = 0.1 * share
        opt.zero_grad()
        (q - targets[index]).square().mean().backward()
        torch.nn.utils.clip_grad_norm_([q], clip)
        opt.step()
    assert torch.allclose(p, q.detach(), atol=1e-6)
    assert [s for s, _ in got.scores] == [0, 20]


@pytest.mark.parametrize("die_at", [1, 3, 4, 11, 20])
def test_fit_resumes_to_the_same_bits(die_at, tmp_path):
    want, result, calls = bowl()
    state = tmp_path / "state.pt"
    assert bowl(state=state, die_at=die_at)[1] is None
    again, resumed, more = bowl(state=state)
    assert torch.equal(again, want)
    assert resumed == result
    assert more == calls[(die_at - 1) // 3 * 3:]  # from the last validation on, nothing twice
    finished = bowl(state=state)
    assert torch.equal(finished[0], want)
    assert finished[1] == result
    assert finished[2] == []


def test_a_killed_process_leaves_a_state_that_continues(tmp_path):
    """SIGKILL in the middle of learning, in a process of its own."""
    code = """if True:
        import os, torch
        from prompt import backward, fit

        def run(state, die_at=0):
            p, calls = torch.nn.Parameter(torch.ones(50)), []
            def loss(index):
                calls.append(index)
                if len(calls) == die_at:
                    os.kill(os.getpid(), 9)
                return backward(((p - index.float().mean()) ** 2).mean())
            score = lambda: float(p.detach().std() + p.detach().mean())
            got = fit({"p": p}, loss, 9, score, 12, 2, 0.3, val_every=2, state=state)
            return p.detach(), got, len(calls)
        """
    state = str(tmp_path / "state.pt")
    command = [sys.executable, "-c", f"{code}\n    run({state!r}, 6)".replace("\n    run", "\nrun")]
    assert subprocess.run(command, cwd=ROOT, timeout=120).returncode == -9
    names = {}
    exec(code, names)
    (p, got, calls), (q, want, _) = names["run"](state), names["run"](None)
    assert torch.equal(p, q)      # died in step 6, step 4 was the last one written
    assert got == want
    assert calls == 12 - 4


@pytest.mark.parametrize("change, message", [({"lr": 0.2}, "lr was 0.1, is 0.2"),
                                             ({"steps": 21}, "steps was 20, is 21"),
                                             ({"settings": {"model": "b"}},
                                              "model was None, is b")])
def test_a_state_of_another_run_is_refused(change, message, tmp_path):
    state = tmp_path / "state.pt"
    bowl(state=state)
    with pytest.raises(ValueError, match=f"state.pt is of another run: {message}; delete it"):
        bowl(state=state, **change)
    for held in (b"garbage", b""):
        state.write_bytes(held)
        with pytest.raises(ValueError, match="holds no state of a learning run"):
            bowl(state=state)
    with pytest.raises(ValueError, match="in -1 steps"):
        bowl(steps=-1)


def test_the_start_is_scored_and_a_diverged_run_returns_it():
    p, got, _ = bowl(lr=1e4)
    assert torch.equal(p, torch.zeros(3))
    assert got.val_loss == got.scores[0][1] == min(v for _, v in got.scores)
    model, windows = tiny(), TOKENS[:96].view(6, 16)
    start = initial_prompt(model, 6, "text", TOKENS)
    start = learn(model, start, windows[5:], windows[5:], steps=30, batch_size=1, lr=0.05).prompt
    got = learn(model, start, windows[:5], windows[5:], steps=4, batch_size=2, lr=1e4)
    assert torch.equal(got.prompt, start)
    assert math.isclose(got.val_loss, mean_loss(model, start, windows[5:]), rel_tol=1e-6)


def test_learning_resumes_to_the_same_prompt(tmp_path):
    model, windows = tiny(), TOKENS[:96].view(6, 16)
    start = initial_prompt(model, 6, "text", TOKENS)
    state = tmp_path / "prompt.state"

    def run(die_at=None, **more):
        calls = []

        def bar(items, title):
            for i in items:
                if len(calls) == die_at:
                    raise KeyboardInterrupt
                calls.append(i)
                yield i
        return learn(model, start, windows[:5], windows[5:], 12, 2, 0.05, val_every=5, progress=bar,
                     **more)
    want = run()
    with pytest.raises(KeyboardInterrupt):
        run(8, state=state)
    got = run(state=state)
    assert torch.equal(got.prompt, want.prompt)
    assert got[1:] == want[1:]
    with pytest.raises(ValueError, match="text was [0-9a-f]{16}, is"):
        learn(model, start, windows[:4], windows[5:], 12, 2, 0.05, val_every=5, state=state)
    with pytest.raises(ValueError, match="model was"):
        learn(tiny(seed=5), start, windows[:5], windows[5:], 12, 2, 0.05, val_every=5, state=state)
    with pytest.raises(ValueError, match="prompt was"):
        learn(model, start + 1, windows[:5], windows[5:], 12, 2, 0.05, val_every=5, state=state)
    with pytest.raises(ValueError, match="val was"):
        learn(model, start, windows[:5], windows[4:5], 12, 2, 0.05, val_every=5, state=state)
    states = teacher_states(model, windows, tmp_path)
    with pytest.raises(ValueError, match="kl was 0.0, is 1.0"):
        learn(model, start, windows[:5], windows[5:], 12, 2, 0.05, val_every=5, state=state,
              teacher=(states[:5], states[5:]))


@pytest.mark.parametrize("n, windows", [(0, 6), (4, 0)])
def test_nothing_to_learn_is_an_error(n, windows):
    with pytest.raises(ValueError, match=f"got {n} prompt tokens and {windows} windows"):
        learn(tiny(), torch.zeros(n, 32), TOKENS[:96].view(6, 16)[:windows], steps=2)


def test_loss_is_on_text_only_and_fp32_prompt_on_bf16_model():
    model = tiny().bfloat16()
    p = torch.zeros(4, 32, requires_grad=True)
    nll = text_loss(model, p, TOKENS[:32].view(2, 16))
    assert nll.shape == (30,)
    assert nll.dtype == torch.float32
    nll.mean().backward()
    assert p.grad.dtype == torch.float32
    assert p.grad.abs().sum() > 0


@pytest.mark.parametrize("how", ["text", "vocab", "random"])
def test_initial_prompts(how):
    model = tiny()
    p = initial_prompt(model, 8, how, TOKENS, seed=1)
    assert p.shape == (8, 32)
    assert torch.equal(p, initial_prompt(model, 8, how, TOKENS, seed=1))
    if how == "text":
        assert torch.equal(p, model.embed(TOKENS[:8]))
    else:
        assert not torch.equal(p, initial_prompt(model, 8, how, seed=2))
    if how == "random":
        spread = float(model.embed_tokens.weight.std())
        assert float(initial_prompt(model, 400, how).std()) == pytest.approx(spread, rel=0.03)
    with pytest.raises(ValueError, match="needs 200 tokens, got 97"):
        initial_prompt(model, 200, "text", TOKENS)
    with pytest.raises(ValueError, match="known are text"):
        initial_prompt(model, 8, "magic")


def test_save_load_and_stitch(tmp_path):
    model, p = tiny(), torch.randn(5, 32)
    save_prompt(tmp_path / "p.safetensors", p, {"lr": 0.001, "note": "x"})
    got, settings = load_prompt(tmp_path / "p.safetensors", model)
    assert torch.equal(got, p)
    assert settings == {"lr": 0.001, "note": "x"}
    assert torch.equal(load_file(tmp_path / "p.safetensors")["soft_prompt"], p)
    torch.save({"soft_prompt": p, "lr": 1}, tmp_path / "p.pt")
    assert torch.equal(load_prompt(tmp_path / "p.pt")[0], p)
    assert load_prompt(tmp_path / "p.pt")[1] == {"lr": 1}
    other = tiny(seed=9)                                          # another model of the same width
    assert text_loss(other, got, TOKENS[None, :4]).shape == (3,)
    save_prompt(tmp_path / "wide.safetensors", torch.randn(5, 48))
    with pytest.raises(ValueError, match="width 48 does not fit"):
        load_prompt(tmp_path / "wide.safetensors", model)
    with pytest.raises(ValueError, match="width 48 does not fit"):
        text_loss(model, torch.randn(5, 48), TOKENS[None, :4])
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match="no prompt file"):
            load_prompt(path)
    for held in ([1, 2], {"soft_prompt": [1, 2]}, {"lr": 1}, torch.randn(3)):
        torch.save(held, tmp_path / "odd.pt")
        with pytest.raises(ValueError, match="holds no soft_prompt"):
            load_prompt(tmp_path / "odd.pt")
    (tmp_path / "odd.pt").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="odd.pt cannot be read"):
        load_prompt(tmp_path / "odd.pt")


def grouped(family="llama"):
    return tiny(family, n_kv_head=2) if family == "llama" else tiny(family)


def behind(model, prompt, tokens):
    """Losses as the definition has them: one sequence of prompt and text, all logits."""
    x = torch.cat([prompt.expand(len(tokens), -1, -1), model.embed(tokens)], 1)
    logits = model(x)[:, len(prompt):-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(),
                                             reduction="none")


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_both_kinds_equal_one_sequence_of_prompt_and_text_and_so_do_gradients(family):
    model = grouped(family)
    tokens = TOKENS[:48].view(3, 16)
    prompt = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    want = behind(model, prompt, tokens)
    slope, = torch.autograd.grad(want.square().mean(), prompt)
    prefix = as_prefix(model, prompt)
    assert prefix.shape == (5, 2, 2, 2 if family == "llama" else 4, 8)
    assert kind_of(prefix) == "prefix"
    assert torch.allclose(text_loss(model, prefix, tokens), want, rtol=1e-4, atol=1e-5)
    for model.checkpointing in (False, True):
        got = text_loss(model, prompt, tokens)
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)
        assert torch.allclose(torch.autograd.grad(got.square().mean(), prompt)[0], slope, rtol=1e-3,
                              atol=1e-4)
        p = prefix.clone().requires_grad_()
        slope_p, = torch.autograd.grad(text_loss(model, p, tokens).square().mean(), p)
        nudge = 1e-2 * slope_p / slope_p.norm()  # uphill, where rounding is far below the rise
        rise = [text_loss(model, prefix + sign * nudge, tokens).square().mean() for sign in (1, -1)]
        assert math.isclose(float(rise[0] - rise[1]) / 2, float((slope_p * nudge).sum()),
                            rel_tol=2e-2)


def test_the_heads_loss_and_gradient_equal_the_plain_ones(monkeypatch):
    monkeypatch.setattr("prompt.LOGITS", 16000)                   # 16 of 40 rows at a time
    g = torch.Generator().manual_seed(0)
    z = torch.randn(40, 4, generator=g)
    teacher = torch.randn(40, 4, generator=g).half()
    weight = torch.randn(1000, 4, generator=g)
    targets = torch.randint(0, 1000, (40,), generator=g)
    share = torch.rand(40, generator=g)
    for wanted, mix in ((None, 1.0), (teacher, 1.0), (teacher, 0.3)):
        z.requires_grad_()
        logp = (z @ weight.T).log_softmax(-1)
        want = -logp.gather(1, targets[:, None])[:, 0]
        if wanted is not None:
            q = (wanted.float() @ weight.T).log_softmax(-1)
            want = mix * (q.exp() * (q - logp)).sum(-1) + (1 - mix) * want
        slope, = torch.autograd.grad(want @ share, z)
        got = HeadLoss.apply(z, weight, targets, wanted, mix)
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)
        assert torch.allclose(torch.autograd.grad(got @ share, z)[0], slope, rtol=1e-3, atol=1e-5)
        with torch.no_grad():
            assert torch.allclose(HeadLoss.apply(z, weight, targets, wanted, mix), want, rtol=1e-4,
                                  atol=1e-5)


def test_teacher_states_are_the_heads_input_computed_once(tmp_path):
    model, windows = tiny(), TOKENS[:48].view(3, 16)
    states = teacher_states(model, windows, tmp_path, batch_size=2)
    assert states.dtype == torch.float16
    assert states.shape == (3, 16, 32)
    assert len(list(tmp_path.iterdir())) == 1
    assert torch.equal(states, model.final(model.hidden(windows)).half())
    assert mean_loss(model, None, windows, teacher=states) < 1e-5  # KL of a model to itself
    for other, text in ((tiny(seed=5), windows), (tiny(), windows.flip(0))):
        assert not torch.equal(teacher_states(other, text, tmp_path), states)
    hidden = [model.hidden(w) for w in windows.split(2)]
    model.hidden = None  # a second call computes nothing
    assert torch.equal(teacher_states(model, windows, tmp_path), states)
    assert torch.equal(teacher_states(model, windows, tmp_path / "b", hidden=hidden), states)
    with pytest.raises(ValueError, match="states of 2 windows for 3"):
        teacher_states(model, windows, tmp_path / "c", hidden=hidden[:1])
    with pytest.raises(ValueError, match="not finite in half precision"):
        teacher_states(tiny(), windows, tmp_path / "c", hidden=[h / 0 for h in hidden])
    assert not list((tmp_path / "c").glob("*.npy"))


@pytest.mark.parametrize("kind", ["embedding", "prefix"])
def test_a_prompt_learned_by_kl_approaches_the_dense_model_on_unseen_text(kind, tmp_path):
    dense, model = tiny(), tiny()
    g = torch.Generator().manual_seed(0)
    for _, m in model.linears():
        m.weight.data += 0.05 * torch.randn(m.weight.shape, generator=g)
    text = torch.randint(0, 50, (28, 16), generator=g)
    windows = text[:16]
    val = text[16:20]
    unseen = text[20:]
    states, val_states, unseen_states = (teacher_states(dense, w, tmp_path)
                                         for w in (windows, val, unseen))
    start = initial_prompt(dense, 8, "vocab", kind=kind)
    got = learn(model, start, windows, val, steps=60, batch_size=8, lr=0.05,
                teacher=(states, val_states))
    before, after = (mean_loss(model, p, unseen, teacher=unseen_states)
                     for p in (start, got.prompt))
    assert after < 0.9 * before
    assert got.prompt.shape == start.shape
    assert math.isclose(got.val_loss, mean_loss(model, got.prompt, val, teacher=val_states),
                        rel_tol=1e-5)
    # the first position of a prefix is frozen
    assert torch.equal(got.prompt[0], start[0]) == (kind == "prefix")
    assert not torch.equal(got.prompt[1:], start[1:])


def test_a_share_of_kl_that_is_none_is_the_next_token(tmp_path):
    model, windows = tiny(), TOKENS[:96].view(6, 16)
    states = teacher_states(tiny(seed=5), windows, tmp_path)
    start = initial_prompt(model, 4, "text", TOKENS)
    plain, mixed = (learn(model, start, windows[:5], windows[5:], steps=2, **kl)
                    for kl in ({}, {"teacher": (states[:5], states[5:]), "mix": 0.0}))
    assert mixed.losses == plain.losses
    assert mixed.scores == plain.scores


def test_a_prefix_moves_in_units_of_each_layers_keys_or_values():
    """Adam's first step is as long as the rate."""
    model = tiny()
    start = initial_prompt(model, 6, "text", TOKENS, kind="prefix")
    got = learn(model, start, TOKENS[:96].view(6, 16), steps=1, lr=0.01).prompt
    moved = (got - start)[1:].abs().amax((0, 3, 4))
    assert torch.allclose(moved, 0.01 * start[1:].std((0, 3, 4)), rtol=0.05)


@pytest.mark.parametrize("kind, rate", [("embedding", 0.35), ("prefix", 0.05)])
def test_the_default_rate(kind, rate):
    model = tiny()
    model.embed_tokens.weight.data /= model.embed_tokens.weight.std()
    p = initial_prompt(model, 3, "text", TOKENS, kind=kind)
    assert math.isclose(default_rate(model, p), rate, rel_tol=1e-5)
    windows = TOKENS[:48].view(3, 16)
    one, two = (learn(model, p, windows, steps=2, lr=lr).prompt
                for lr in (None, default_rate(model, p)))
    assert torch.equal(one, two)


class Reversed(Letters):
    def encode(self, text, bos=True):
        return [49 - i for i in super().encode(text)]


@pytest.mark.parametrize("kind", ["embedding", "prefix"])
def test_a_prompt_says_whose_it_is(kind, tmp_path):
    model, path = tiny(), tmp_path / "p.safetensors"
    p = initial_prompt(model, 5, "text", TOKENS, kind=kind)
    save_prompt(path, p, {"lr": 1}, owner(model, Letters()))
    assert torch.equal(load_prompt(path, tiny(seed=5), Letters())[0], p)
    assert torch.equal(load_prompt(path, model)[0], p)  # without a tokenizer it is not compared
    wider = Transformer(dataclasses.replace(model.config, vocab_size=60)).requires_grad_(False)
    slower = Transformer(dataclasses.replace(model.config, rope_theta=5e5)).requires_grad_(False)
    strange = [(tiny("opt"), Letters(), "family .llama, not opt"),
               (model, Reversed(), "tokenizer"),
               (wider, Letters(), "vocab size .50, not 60")]
    if kind == "prefix":
        strange.append((slower, Letters(), "rope theta .10000.0, not 500000.0"))
    else:
        assert torch.equal(load_prompt(path, slower)[0], p)
    for other, tokenizer, what in strange:
        with pytest.raises(ValueError,
                           match=f"p.safetensors was learned for another {what}.* --force"):
            load_prompt(path, other, tokenizer)
        assert torch.equal(load_prompt(path, other, tokenizer, force=True)[0], p)
    save_prompt(path, p)  # as files of before, which do not say
    assert torch.equal(load_prompt(path, tiny("opt"), Reversed())[0], p)
    if kind == "prefix":
        deep = Transformer(dataclasses.replace(model.config, n_layer=3)).requires_grad_(False)
        for force in (False, True):                               # shapes cannot be forced
            with pytest.raises(ValueError,
                               match="2 layers with 4 heads of 8 does not fit a model of 3 layers"):
                load_prompt(path, deep, force=force)


def test_kinds_and_objectives_that_cannot_be():
    model, windows = tiny(), TOKENS[:48].view(3, 16)
    with pytest.raises(ValueError, match="known are embedding and prefix"):
        initial_prompt(model, 4, "text", TOKENS, kind="suffix")
    with pytest.raises(ValueError, match="a prefix of one position"):
        learn(model, initial_prompt(model, 1, "text", TOKENS, kind="prefix"), windows)
    with pytest.raises(ValueError, match="KL to a teacher needs a model with hidden"):
        text_loss(Foreign(model), None, windows, torch.zeros(3, 16, 32))
    prefix = initial_prompt(model, 4, "text", TOKENS, kind="prefix")
    for read in (lambda: initial_prompt(Foreign(model), 4, "text", TOKENS, kind="prefix"),
                 lambda: text_loss(Foreign(model), prefix, windows)):
        with pytest.raises(ValueError, match="a prefix is read from a cache"):
            read()


def test_learning_freezes_another_projects_model_and_leaves_it_as_it_was():
    """It comes in train mode, with dropout, and asks for gradients of every weight."""
    model = Foreign(tiny())
    model.requires_grad_(True).train()
    model.m.blocks[0].mlp.down = torch.nn.Sequential(model.m.blocks[0].mlp.down,
                                                     torch.nn.Dropout(0.5))
    model.m.blocks[1].eval()
    windows = TOKENS[:48].view(3, 16)
    start = initial_prompt(model, 4, "text", TOKENS)
    once, again = (learn(model, start, windows, windows, steps=2) for _ in range(2))
    assert torch.equal(once.prompt, again.prompt) and once.scores == again.scores
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.m.blocks[0].mlp.down.training and not model.m.blocks[1].attn.training




# What train.py makes of it. Its own process is not needed, and would take most of the time.

SMALL = ["--seqlen", "32", "--max-tokens", "256", "--steps", "6", "--prompt-tokens", "6",
         "--batch-size", "2",
         "--val-windows", "2", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """run(*flags) = (folder, {row: perplexity}) of train.py with a prompt on a compressed tiny
    model."""
    place = tmp_path_factory.mktemp("train")
    text = place / "sources.txt"
    text.write_text("\n\n".join(p.read_text() for p in sorted(ROOT.glob("*.py"))))
    texts = [part for name in ("--data", "--train-data") for part in (name, str(text))]

    def run(*options, out, model=place / "made" / "compressed"):
        args = train.flags().parse_args(["--model", str(model), *texts, *SMALL, *options, "--out",
                                         str(place / out)])
        return place / out, {r["name"]: r["perplexity"] for r in train.main(args)["rows"]}
    run("--calib", str(text), "--nsamples", "4", "--recipe", "plain", "--no-control", out="made",
        model="tiny-llama")
    return run


def held(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()
            and p.name not in ("seconds.json", ".lock")}


@pytest.mark.parametrize("kind, objective", [("embedding", "kl"), ("prefix", "next")])
def test_kinds_and_objectives_of_a_run_and_its_resuming(kind, objective, job, monkeypatch):
    """Each flag changes what it says; killed between two looks at the validation windows, the run
    goes on to the same bytes, and the teacher's states are gone at its end."""
    options = ["--dense", "tiny-llama", "--kind", kind, "--objective", objective]
    options += ["--control"] if kind == "prefix" else []
    folder, rows = job(*options, out=f"{kind}-{objective}")
    prompt, told = load_prompt(folder / "prompt.safetensors", load_model("tiny-llama"))
    assert kind_of(prompt) == told["kind"] == kind
    assert told["objective"] == objective
    assert len(prompt) == 6
    assert rows["compressed + learned prompt"] != rows["compressed + initial prompt"]
    losses = read_json(folder / "report.json")["losses"]["prompt.safetensors"]["validation"]
    assert (losses[0][1] < 2) == (objective == "kl")  # the dense model is nearer than the text
    steps = []

    class Dies(Progress):
        def __iter__(self):
            for item in super().__iter__():
                steps.append(self.title)
                if steps.count("learning the prompt") == 4:
                    raise KeyboardInterrupt
                yield item
    with monkeypatch.context() as m:
        m.setattr(train, "Progress", Dies)
        with pytest.raises(KeyboardInterrupt):
            job(*options, out=f"{kind}-{objective}-killed")
    killed = folder.with_name(folder.name + "-killed")
    assert (killed / "teacher").exists() == (objective == "kl")
    assert (killed / "prompt.state").exists()
    job(*options, "--resume", out=killed.name)
    assert held(killed) == held(folder)
    assert not (killed / "teacher").exists()


def test_a_prefix_and_a_teacher_come_from_the_dense_model_block_by_block_too(monkeypatch):
    dense = load_model("tiny-llama")
    checkpoint = open_checkpoint("tiny-llama")
    start = initial_prompt(dense, 6, "text", torch.arange(5, 15))
    prefix = streamed_prefix(checkpoint, start)
    assert torch.equal(prefix, as_prefix(dense, start))
    windows = torch.arange(96).view(3, 32) % 50
    whole = torch.cat(list(eval.last_states(checkpoint, windows, 2)))
    monkeypatch.setattr(eval, "fits", lambda *_: False)
    assert torch.equal(whole, dense.hidden(windows))
    assert torch.allclose(torch.cat(list(eval.last_states(checkpoint, windows, 2))), whole,
                          rtol=1e-4, atol=1e-4)


def test_the_papers_settings(job):
    options = ["--prompt-recipe", "paper"]
    args = train.flags().parse_args(["--model", "tiny-llama", "--device", "cpu", *options])
    train.settle(args)
    assert {name: getattr(args, name) for name in PAPER} == PAPER
    folder, _ = job(*options, out="paper")
    got = read_json(folder / "report.json")["settings"]
    # flags win
    assert (got["lr"], got["warmup"], got["steps"], got["batch_size"]) == (1e-3, 1, 6, 2)


@pytest.mark.parametrize("options, message", [
    (["--kind", "prefix"],
     "--kind prefix starts from the dense model's keys and values: .* --dense FOLDER"),
    (["--objective", "kl"],
     "--objective kl learns from the dense model's predictions: .* --dense FOLDER")])
def test_what_cannot_be_learned_is_refused(options, message, job):
    with pytest.raises(ValueError, match=message):
        job(*options, out="refused")
