"""prompt.py and eval.py: what is scored, learned and stored; perplexity by hand; generation against transformers."""
import json
import math
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import eval as evaluation
from data.config import Config
from model import Transformer, save_model
from prompt import initial_prompt, learn, load_prompt, mean_loss, save_prompt, text_nll, with_prompt

ROOT = Path(__file__).resolve().parents[1]


def tiny(family="llama", seed=0, **changes):
    torch.manual_seed(seed)
    c = Config(family, vocab_size=50, d_model=32, n_layer=2, n_head=4, d_ff=64, max_positions=64, tied=family == "opt",
               **({"attention_bias": True, "mlp_bias": True} if family == "opt" else {}), **changes)
    model = Transformer(c).requires_grad_(False).eval()
    for name, p in model.named_parameters():
        p.data = torch.randn_like(p) * 0.3 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return model


TOKENS = torch.randint(0, 50, (97,), generator=torch.Generator().manual_seed(3))


class Foreign(torch.nn.Module):
    """A model with embed and forward alone, as another project's would be."""

    def __init__(self, model):
        super().__init__()
        self.m, self.embed_tokens = model, model.embed_tokens

    def embed(self, tokens):
        return self.m.embed(tokens)

    def forward(self, embeds):
        return self.m(embeds)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("n", [0, 5])
def test_perplexity_equals_a_count_by_hand(family, n):
    model = tiny(family)
    prompt = torch.randn(n, 32) if n else None
    total, count = 0.0, 0
    for start in range(0, 96, 16):                                # six windows of 16, each scores 15 targets
        window = TOKENS[start:start + 16]
        e = model.embed(window[None])
        logits = model(torch.cat([prompt[None], e], 1) if n else e)[0].double()
        for i in range(1, 16):
            total -= float(torch.log_softmax(logits[n + i - 1], -1)[window[i]])
            count += 1
    got, scored = evaluation.perplexity(model, TOKENS, 16, prompt)
    assert scored == count == 90 and math.isclose(got, math.exp(total / count), rel_tol=1e-5)
    assert math.isclose(evaluation.perplexity(Foreign(model), TOKENS, 16, prompt)[0], got, rel_tol=1e-5)


def test_a_prompt_that_changes_nothing_leaves_the_perplexity():
    """Rotary attention sees only distances; with the values set to zero nothing flows between positions, so a prompt in front
    changes no logit. Counting the prompt's positions, as the paper's code does, would report a smaller number."""
    model = tiny()
    for block in model.blocks:
        block.attn.v.weight.zero_()
    plain, scored = evaluation.perplexity(model, TOKENS, 16)
    behind, scored2 = evaluation.perplexity(model, TOKENS, 16, torch.randn(7, 32))
    assert scored == scored2 and math.isclose(plain, behind, rel_tol=1e-5)
    flawed = plain ** ((16 - 1) / (16 - 1 + 7))                   # what the released code would print
    assert abs(flawed - behind) > 0.5


def test_learning_lowers_the_loss_and_touches_only_the_prompt():
    model, windows = tiny(), TOKENS[:96].view(6, 16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    start = initial_prompt(model, 6, "text", TOKENS)
    got = learn(model, start, windows[:5], windows[5:], steps=40, batch_size=2, lr=0.05)
    assert got.prompt.dtype == torch.float32 and got.prompt.shape == (6, 32)
    assert mean_loss(model, got.prompt, windows[:5]) < mean_loss(model, start, windows[:5]) - 0.05
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert len(got.losses) == 40 and math.isclose(got.val_loss, mean_loss(model, got.prompt, windows[5:]), rel_tol=1e-5)
    again = learn(model, start, windows[:5], windows[5:], steps=40, batch_size=2, lr=0.05)
    assert torch.equal(again.prompt, got.prompt)                  # same seed, same prompt


def test_best_on_validation_is_kept():
    """A rate that ruins the prompt: what comes back is the best seen, not the last."""
    model, windows = tiny(), TOKENS[:96].view(6, 16)
    start = initial_prompt(model, 6, "random")
    seen = []
    got = learn(model, start, windows[:5], windows[5:], steps=12, batch_size=2, lr=30.0, val_every=1,
                progress=lambda items, title: seen.append(title) or items)
    last = learn(model, start, windows[:5], windows[5:0], 12, 2, 30.0)                      # no windows, no choice
    assert seen and math.isnan(last.val_loss) and got.val_loss < mean_loss(model, last.prompt, windows[5:]) - 0.01
    assert math.isclose(got.val_loss, mean_loss(model, got.prompt, windows[5:]), rel_tol=1e-5)


@pytest.mark.parametrize("n, windows", [(0, 6), (4, 0)])
def test_nothing_to_learn_is_an_error(n, windows):
    with pytest.raises(ValueError, match=f"got {n} prompt tokens and {windows} windows"):
        learn(tiny(), torch.zeros(n, 32), TOKENS[:96].view(6, 16)[:windows], steps=2)


def test_loss_is_on_text_only_and_fp32_prompt_on_bf16_model():
    model = tiny().bfloat16()
    p = torch.zeros(4, 32, requires_grad=True)
    nll = text_nll(model, p, TOKENS[:32].view(2, 16))
    assert nll.shape == (30,) and nll.dtype == torch.float32
    nll.mean().backward()
    assert p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0


@pytest.mark.parametrize("how", ["text", "vocab", "random"])
def test_initial_prompts(how):
    model = tiny()
    p = initial_prompt(model, 8, how, TOKENS, seed=1)
    assert p.shape == (8, 32) and torch.equal(p, initial_prompt(model, 8, how, TOKENS, seed=1))
    if how == "text":
        assert torch.equal(p, model.embed(TOKENS[:8]))
    with pytest.raises(ValueError, match="needs 200 tokens, got 97"):
        initial_prompt(model, 200, "text", TOKENS)
    with pytest.raises(ValueError, match="known are text"):
        initial_prompt(model, 8, "magic")


def test_save_load_and_stitch(tmp_path):
    model, p = tiny(), torch.randn(5, 32)
    save_prompt(tmp_path / "p.safetensors", p, {"lr": 0.001, "note": "x"})
    got, settings = load_prompt(tmp_path / "p.safetensors", model)
    assert torch.equal(got, p) and settings == {"lr": 0.001, "note": "x"}
    assert torch.equal(load_file(tmp_path / "p.safetensors")["soft_prompt"], p)
    torch.save({"soft_prompt": p, "lr": 1}, tmp_path / "p.pt")
    assert torch.equal(load_prompt(tmp_path / "p.pt")[0], p) and load_prompt(tmp_path / "p.pt")[1] == {"lr": 1}
    other = tiny(seed=9)                                          # another model of the same width
    assert with_prompt(other, got, TOKENS[None, :4]).shape == (1, 9, 32)
    save_prompt(tmp_path / "wide.safetensors", torch.randn(5, 48))
    with pytest.raises(ValueError, match="width 48; this model's are 32 wide"):
        load_prompt(tmp_path / "wide.safetensors", model)
    with pytest.raises(ValueError, match="width 48 does not fit"):
        with_prompt(model, torch.randn(5, 48), TOKENS[None, :4])
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


def test_too_little_text_is_an_error():
    with pytest.raises(ValueError, match="97 tokens cannot fill one window of seqlen 128"):
        evaluation.perplexity(tiny(), TOKENS, 128)
    for seqlen, batch_size in ((1, 4), (16, 0)):
        with pytest.raises(ValueError, match=f"seqlen {seqlen} and batch size {batch_size} must be at least 2 and 1"):
            evaluation.perplexity(tiny(), TOKENS, seqlen, batch_size=batch_size)


def test_sampling():
    logits = torch.tensor([0.0, 5.0, 4.0, -3.0])
    g = torch.Generator().manual_seed(0)
    assert evaluation.sample(logits, 0.0, 1.0, g) == 1
    assert {evaluation.sample(logits, 1.0, 0.5, g) for _ in range(50)} == {1}
    drawn = [evaluation.sample(logits, 1.0, 1.0, g) for _ in range(2000)]
    assert abs(drawn.count(1) / 2000 - float(torch.softmax(logits, -1)[1])) < 0.04


class Letters:
    eos_id = None

    def encode(self, text, bos=True):
        return [ord(c) % 50 for c in text]

    def decode(self, ids):
        return "".join(chr(48 + i) for i in ids)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_greedy_generation_equals_transformers(family, tmp_path):
    from transformers import AutoModelForCausalLM
    model = tiny(family)
    save_model(model, tmp_path, torch.float32)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.tensor([Letters().encode("hello")])
    want = peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0,
                         eos_token_id=None)[0, 5:]
    assert evaluation.generate(model, Letters(), "hello", 20) == Letters().decode(want.tolist())
    prompt = torch.randn(4, 32)                                   # with a prompt: the same tokens one full forward at a time
    x, out = with_prompt(model, prompt, ids), []
    for _ in range(20):
        out.append(int(model(x)[0, -1].argmax()))
        x = torch.cat([x, model.embed(torch.tensor([[out[-1]]]))], 1)
    assert evaluation.generate(model, Letters(), "hello", 20, prompt=prompt) == Letters().decode(out)
    assert len(evaluation.generate(model, Letters(), "hello", 500)) == 59          # positions run out at 64
    with pytest.raises(ValueError, match="text and prompt take 64 of"):
        evaluation.generate(model, Letters(), "hello", prompt=torch.randn(59, 32))


def test_generation_is_seeded():
    one, two, other = (evaluation.generate(tiny(), Letters(), "hi", 20, 1.0, 0.9, seed=s) for s in (1, 1, 2))
    assert one == two != other


def run_program(monkeypatch, capsys, *arguments):
    """(exit status, stdout, stderr) of eval.py."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
    status = 0
    try:
        runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
    except SystemExit as e:
        status = e.code
    return status, *capsys.readouterr()


def test_program_prints_numbers_and_text(monkeypatch, capsys, tmp_path):
    (tmp_path / "a.txt").write_text("def f(x):\n    return x\n" * 50)
    common = "tiny-llama", "--data", tmp_path / "a.txt", "--seqlen", 16, "--max-tokens", 64, "--json"
    results = [json.loads(run_program(monkeypatch, capsys, *common, *more)[1].splitlines()[-1]) for more in
               ([], ["--hard-prompt"], ["--hard-prompt", "Hello."])]
    assert [r["tokens"] for r in results] == [60] * 3
    assert results[0]["prompt_tokens"] == 0 < results[2]["prompt_tokens"] < results[1]["prompt_tokens"]
    assert len({r["perplexity"] for r in results}) == 3
    status, out, _ = run_program(monkeypatch, capsys, "tiny-llama", "--generate", "The name of the", "--max-new", 4, "--json")
    text, last = out.splitlines()[0], json.loads(out.splitlines()[-1])
    assert status == 0 and (last["text"] + last["generated"]).startswith(text)
    assert re.match(r"The name of the \w", text)                   # sentencepiece alone would leave out the space


@pytest.mark.parametrize("arguments, message", [
    (["nowhere"], "no checkpoint folder nowhere"),
    (["tiny-llama", "--data", "TMP/a.txt", "--seqlen", 600, "--max-tokens", 600], "600 positions, prompt included"),
    (["tiny-llama", "--data", "TMP/a.txt", "--seqlen", 1], "seqlen 1 "),
    (["tiny-llama", "--data", "TMP/a.txt", "--seqlen", 16, "--max-tokens", -5], "max_tokens -5"),
    (["tiny-llama", "--data", "TMP/a.txt", "--seqlen", 16, "--batch-size", 0], "batch size 0"),
    (["tiny-llama", "--data", "TMP", "--seqlen", 16], "unknown text set"),
    (["tiny-llama", "--data", "TMP/b.txt", "--seqlen", 16], "no file"),
    (["tiny-llama", "--prompt", "TMP"], "no prompt file"),
    (["tiny-llama", "--prompt", "TMP/a.txt"], "truncated"),
    (["tiny-llama", "--prompt", "TMP/a.txt", "--hard-prompt"], "exclude each other"),
    (["tiny-llama", "--device", "abacus"], "device abacus"),
    (["tiny-llama", "--generate", "x", "--max-new", -9], "-9 tokens"),
    (["tiny-llama", "--generate", "x", "--temperature", -1], "temperature -1"),
    (["tiny-llama", "--generate", "x", "--temperature", "nan"], "temperature nan"),
    (["tiny-llama", "--generate", "x", "--temperature", 1, "--top-p", 0], "top-p 0"),
])
def test_program_fails_in_one_line(arguments, message, monkeypatch, capsys, tmp_path):
    (tmp_path / "a.txt").write_text("def f(x):\n    return x\n" * 100)
    status, out, err = run_program(monkeypatch, capsys, *[str(a).replace("TMP", str(tmp_path)) for a in arguments])
    assert status == 1 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err
