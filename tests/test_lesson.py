"""The equations of README.md's lesson, each checked once, by name, on a matrix small enough to
print.

    python -m pytest -q tests/test_lesson.py

Everything is float64 and written the long way: by solving the linear systems that the equations
solve in closed form.
"""
import math

import pytest
import torch

from gptq import gptq, hessian, inverse_factor
from kernels.packing import bits_per_weight, pack
from kernels.unpacking import unpack
from prompt import text_loss
from sparsegpt import refit, sparsegpt
from test_prompt import TOKENS, tiny

g = torch.Generator().manual_seed(0)
X = torch.randn(200, 6, generator=g, dtype=torch.float64)
X = X @ torch.randn(6, 6, generator=g, dtype=torch.float64)             # correlated, as inputs are
H = X.T @ X / len(X)
W = torch.randn(3, 6, generator=g, dtype=torch.float64)


def cost(V):
    return torch.trace((W - V) @ H @ (W - V).T).item()


def test_the_error_of_a_layer_is_the_mean_squared_error_of_its_outputs():
    V = W + 0.1 * torch.randn(3, 6, generator=g, dtype=torch.float64)
    outputs = ((X @ W.T - X @ V.T) ** 2).sum(1).mean()
    assert cost(V) == pytest.approx(outputs.item())
    assert torch.allclose(hessian(X.float()).double(), H, rtol=1e-4)


def best_change(j, delta, free):
    """The change d of one row with d[j] = delta, zero outside of the `free` columns and j, that
    costs least, d H d: the others solve H[free, free] d[free] = -H[free, j] delta."""
    d = torch.zeros(6, dtype=torch.float64)
    d[j] = delta
    if free:
        d[free] = -torch.linalg.solve(H[free][:, free], H[free, j] * delta)
    return d


def test_the_update_by_the_inverse_hessian_is_the_cheapest_repair():
    inverse = torch.linalg.inv(H)
    for j in range(6):
        d = best_change(j, 0.3, [k for k in range(6) if k != j])
        assert torch.allclose(d, 0.3 / inverse[j, j] * inverse[:, j])
        assert (d @ H @ d).item() == pytest.approx(0.3 ** 2 / inverse[j, j].item())


def test_one_factor_holds_the_inverses_of_all_smaller_hessians():
    U = inverse_factor(H, percdamp=0.0)
    assert torch.allclose(U.T @ U, torch.linalg.inv(H))
    assert torch.equal(U, U.triu())
    for j in range(6):
        rest = torch.linalg.inv(H[j:, j:])
        assert torch.allclose(U[j:, j:].T @ U[j:, j:], rest)
        assert torch.allclose(U[j, j] * U[j, j:], rest[0])


def test_the_update_of_the_columns_to_come_and_what_it_costs():
    U = inverse_factor(H, percdamp=0.0)
    for j in range(6):
        d = best_change(j, -0.7, list(range(j + 1, 6)))
        assert torch.allclose(d[j:], -0.7 / U[j, j] * U[j, j:])
        assert (d @ H @ d).item() == pytest.approx((0.7 / U[j, j].item()) ** 2)


def test_costs_of_the_steps_add_up_to_the_error_of_gptq():
    """Column after column is rounded, the columns to come repaired: the errors of the steps sum to
    the whole."""
    out = gptq(W, H, bits=3, percdamp=0.0)
    U = inverse_factor(H, percdamp=0.0)
    V = W.clone()
    total = 0.0
    for j in range(6):
        e = (V[:, j] - out.weight[:, j]) / U[j, j]
        total += (e ** 2).sum().item()
        V[:, j:] -= torch.outer(e, U[j, j:])
    assert torch.allclose(V, out.weight, atol=1e-9)
    assert total == pytest.approx(cost(out.weight))


def test_the_first_weights_to_go_are_those_whose_removal_costs_least():
    """In the first block of columns nothing has been repaired yet: the score is (w / U[j, j])^2."""
    U = inverse_factor(H, percdamp=0.0)
    score = (W / U.diagonal()) ** 2
    gone = sparsegpt(W, H, 0.5, percdamp=0.0, blocksize=6).mask
    assert score[gone].max() <= score[~gone].min()
    assert gone.sum() == 9


def test_refitted_weights_have_no_gradient_left():
    mask = (torch.arange(18).view(3, 6) % 2).bool()
    V = refit(W, H, mask, iterations=100, percdamp=0.0)
    gradient = 2 * (V - W) @ H
    assert gradient[~mask].abs().max() < 1e-9
    assert (V[mask] == 0).all()


def test_the_packed_row_that_is_drawn():
    """128 columns of it: a bit a weight, four bits a weight that is kept, two fp16 numbers a
    row."""
    kept = torch.tensor([[1, 0, 1, 0, 0, 1, 0, 1] * 16], dtype=torch.bool)
    codes = torch.tensor([[5, 0, 11, 0, 0, 1, 0, 2] * 16], dtype=torch.uint8) * kept
    scale = torch.tensor([[0.05]]).half().float()
    zero = torch.tensor([[0.5]])
    packed = pack(codes, ~kept, scale, zero, bits=4, grid="offset")
    w = unpack(packed)[0].float()
    s = scale.item()
    expected = [s * 5.5, 0, -s * 3.5, 0, 0, s * 1.5, 0, s * 2.5]  # 11 is 0b1011: minus, k = 3
    assert torch.equal(w[:8], torch.tensor(expected).half().float())
    stored = int(packed.tensors["codes"][0, 0])
    ranks = [stored >> 4 * i & 15 for i in range(4)]
    assert ranks == [0xd, 0x4, 0x9, 0xa]                        # as README.md shows them
    for rank, weight in zip(ranks, (w[0], w[2], w[5], w[7])):
        level = rank - 8 + 0.5 if rank >= 8 else -(7 - rank + 0.5)
        assert weight == torch.tensor(s * level).half()
    assert packed.meta["format"] == "nm"
    assert bits_per_weight(packed) == 1 + 4 / 2 + 2 * 16 / 128


def test_a_prompts_positions_are_not_counted():
    """The mean over text tokens is the loss; the code released with the paper divides by L - 1 +
    n."""
    model = tiny()
    windows = TOKENS[:32].view(2, 16)
    prompt = 0.1 * torch.randn(5, model.config.d_embed, generator=torch.Generator().manual_seed(1))
    losses = text_loss(model, prompt, windows)
    assert losses.shape == (2 * 15,)
    x = torch.cat([prompt.expand(2, -1, -1), model.embed(windows)], 1)
    logits = model(x)[:, 5:-1]  # position 5 + i predicts token i + 1
    by_hand = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(),
                                                windows[:, 1:].flatten(), reduction="none")
    assert torch.allclose(losses, by_hand, atol=1e-5)
    n, L = 100, 1024
    assert math.exp(math.log(10) * (L - 1) / (L - 1 + n)) == pytest.approx(8.13, abs=0.02)
