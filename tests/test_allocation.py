"""compress.allocate: how much of each Linear is pruned.

    python -m pytest -q tests/test_allocation.py
"""
import math
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F

import compress as walk
from compress import allocate, balance, compress_model, make_solver
from data.config import SHIPPED
from data.text import calibration, eval_tokens
from data.tokenizer import load_tokenizer
from eval import perplexity
from model import load_model
from sparsegpt import admm
from test_compress import needs_tiny
from test_prompt import TOKENS, tiny

WINDOWS = TOKENS[:96].view(6, 16)


def shares_of(model, windows, fraction: float = 0.5) -> dict[str, float]:
    return allocate(model, lambda i: model.blocks[i], windows, fraction)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_costs_are_those_of_one_backward_pass_through_the_whole_model(family, monkeypatch):
    model = tiny(family).double()
    caught = []
    monkeypatch.setattr(walk, "balance", lambda costs, fraction, tried, reach:
                        caught.append((costs, tried)) or [fraction] * len(costs))
    shares_of(model, WINDOWS)

    seen = {}
    for name, linear in model.linears():
        linear.register_forward_hook(lambda m, x, y, name=name: seen.update({name: (x[0], y)})
                                     or y.retain_grad())
    logits = model(model.embed(WINDOWS).requires_grad_())
    F.cross_entropy(logits[:, :-1].flatten(0, 1), WINDOWS[:, 1:].flatten(),
                    reduction="sum").backward()
    up = ["mlp.gate", "mlp.up"] if family == "llama" else ["mlp.up"]
    groups = [["attn.q", "attn.k", "attn.v"], ["attn.o"], up, ["mlp.down"]]
    assert len(caught) == len(groups)
    for names, (costs, tried) in zip(groups, caught):
        for i, found in enumerate(costs):
            full = [f"blocks.{i}.{name}" for name in names]
            x = seen[full[0]][0].detach().flatten(0, 1)
            g = torch.cat([seen[name][1].grad for name in full], -1).flatten(0, 1).square()
            W = torch.cat([model.get_submodule(name).weight for name in full]).detach()
            for fraction, cost in zip(tried, found):
                lost = W - admm(W, x.T @ x / len(x), fraction, **walk.QUICK_ADMM)[1]
                # every row's mean square of gradients times every token's
                shared = g.sum(1)[:, None] * g.sum(0) / g.sum()
                wanted = (shared * (x @ lost.T).square()).sum() / len(x) / 2
                assert cost == pytest.approx(float(wanted), rel=0.05), (names, i)


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.8])
def test_shares_are_the_fraction_on_average_and_within_reach(fraction):
    model = tiny("llama")
    shares = shares_of(model, WINDOWS, fraction)
    reach = walk.REACH * min(fraction, 1 - fraction)
    by_kind = defaultdict(list)
    for name, _ in model.linears():
        by_kind[name.split(".", 2)[2]].append(shares[name])
        assert abs(shares[name] - fraction) <= reach + 1e-12
    for kind, found in by_kind.items():
        assert sum(found) / len(found) == pytest.approx(fraction, abs=1e-9), kind
    for a, b in (("q", "k"), ("k", "v")):
        assert by_kind[f"attn.{a}"] == by_kind[f"attn.{b}"]     # they are one matrix
    assert shares == shares_of(model, WINDOWS, fraction)


def test_the_windows_read_lie_all_over_the_text(monkeypatch):
    monkeypatch.setattr(walk, "FISHER_TOKENS", 48)              # three windows
    model = tiny()
    shares = shares_of(model, WINDOWS)
    assert shares == shares_of(model, WINDOWS[::2])
    assert shares != shares_of(model, WINDOWS[:3])


def test_balance_makes_the_next_weight_cost_the_same_everywhere():
    """cost = exp(at + slope * share): what lies between the bounds has one price."""
    lines = [(-3.0, 6.0), (-4.0, 7.0), (-3.5, 8.0), (9.0, 6.0), (-30.0, 6.0)]
    tried = [0.4, 0.6]
    shares = balance([[math.exp(at + slope * s) for s in tried] for at, slope in lines],
                     0.5, tried, 0.2)
    assert sum(shares) / 5 == pytest.approx(0.5, abs=1e-9)
    assert shares[3] == pytest.approx(0.3) and shares[4] == pytest.approx(0.7)
    prices = [slope * math.exp(at + slope * s) for (at, slope), s in zip(lines[:3], shares)]
    assert prices == pytest.approx([prices[0]] * 3, rel=1e-6)
    assert balance([[0.0, 0.0], [0.0, 0.0]], 0.5, tried, 0.2) == pytest.approx([0.5, 0.5])


def test_zeros_of_the_model_are_those_asked_for():
    model = tiny("opt")
    weights = sum(linear.weight.numel() for _, linear in model.linears())
    shares = shares_of(model, WINDOWS)
    assert max(shares.values()) - min(shares.values()) > 0.01
    stats = compress_model(model, WINDOWS, make_solver(None, 0.5), shares=shares)
    zeros = sum(int((linear.weight == 0).sum()) for _, linear in model.linears())
    assert abs(zeros - weights / 2) <= 4 * len(model.blocks)    # each group rounds once
    for s in stats:
        group = [t["sparsity"] for t in stats if t["error"] == s["error"]]
        assert min(group) <= shares[s["name"]] + 0.01 and max(group) >= shares[s["name"]] - 0.01


@needs_tiny
@pytest.mark.parametrize("name", list(SHIPPED))
def test_it_pays_on_the_shipped_models(name):
    folder = SHIPPED[name]
    tokenizer = load_tokenizer(folder)
    windows = calibration(tokenizer, "docs", "train", 16, 256, 0)
    tokens = eval_tokens(tokenizer, "docs", "test", 256, 8192)
    found = []
    for shares in (None, shares_of(load_model(folder), windows)):
        model = load_model(folder)
        compress_model(model, windows, make_solver(4, 0.5), shares=shares)
        found.append(perplexity(model, tokens, 256)[0])
    assert found[1] < 0.99 * found[0]
