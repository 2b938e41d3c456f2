"""prompt.py: what is learned, chosen and stored."""
import math

import pytest
import torch
from safetensors.torch import load_file

from data.config import Config
from model import Transformer
from prompt import initial_prompt, learn, load_prompt, mean_loss, save_prompt, text_nll, with_prompt


def tiny(family="llama", seed=0, **changes):
    torch.manual_seed(seed)
    c = Config(family, vocab_size=50, d_model=32, n_layer=2, n_head=4, d_ff=64, max_positions=64, tied=family == "opt",
               **({"attention_bias": True, "mlp_bias": True} if family == "opt" else {}), **changes)
    model = Transformer(c).requires_grad_(False).eval()
    for name, p in model.named_parameters():
        p.data = torch.randn_like(p) * 0.3 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return model


TOKENS = torch.randint(0, 50, (97,), generator=torch.Generator().manual_seed(3))


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
