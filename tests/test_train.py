"""train.py end to end on the shipped tiny models, and the walk against one written out by hand."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from eval import perplexity
from gptq import hessian, relative_error
from data.config import SHIPPED
from data.text import calibration, eval_tokens
from data.tokenizer import load_tokenizer
from model import load_model
from sparsegpt import prune_and_round, sparsegpt
from test_prompt import TOKENS, tiny

ROOT = Path(__file__).resolve().parents[1]
needs_tiny = pytest.mark.skipif(not all((p / "tokenizer.model").exists() or (p / "vocab.json").exists() for p in SHIPPED.values()),
                                reason="data/tiny holds no trained checkpoints")


def run(*args, ok=True):
    done = subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode == 0) == ok, done.stderr + done.stdout
    return done


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text that needs nothing from outside: this repository's own sources."""
    path = tmp_path_factory.mktemp("text") / "sources.txt"
    path.write_text("\n\n".join(p.read_text() for p in sorted(ROOT.glob("*.py"))))
    return path


def solve(W, H, parts):
    return sparsegpt(W, H, 0.5, 4, parts=parts)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("sequential", [False, True])
def test_walk_equals_one_written_by_hand(family, sequential):
    """Inputs of every Linear caught with hooks, one full forward pass of the half-compressed model for every group."""
    windows = TOKENS[:96].view(6, 16)
    ours, hand = tiny(family), tiny(family)
    stats, errors = train.compress(ours, windows, solve, sequential, correct=0.0, batch_size=6), {}
    for i, block in enumerate(hand.blocks):
        groups = [["attn.q", "attn.k", "attn.v"], ["attn.o"], ["mlp.gate", "mlp.up"] if family == "llama" else ["mlp.up"], ["mlp.down"]]
        for part in groups if sequential else [sum(groups, [])]:
            caught = {}
            handles = [block.get_submodule(n).register_forward_hook(lambda m, a, o, n=n: caught.update({n: a[0]})) for n in part]
            hand(windows)
            for h in handles:
                h.remove()
            for group in groups:                                  # the error reported is that of a group
                old = [block.get_submodule(n).weight.data for n in group if n in part]
                for n in set(group) & set(part):
                    linear = block.get_submodule(n)
                    linear.weight.data = sparsegpt(linear.weight, hessian(caught[n]), 0.5, 4).weight.half().float()
                if old:
                    new = [block.get_submodule(n).weight.data for n in group]
                    error = relative_error(torch.cat(old), torch.cat(new), hessian(caught[group[0]]))
                    errors.update({f"blocks.{i}.{n}": error for n in group})
    assert [s["name"] for s in stats] == [n for n, _ in hand.linears()]
    assert [s["error"] for s in stats] == pytest.approx([errors[s["name"]] for s in stats], rel=0.1)
    for (name, a), (_, b) in zip(ours.linears(), hand.linears()):
        assert int((a.weight == 0).sum()) >= a.weight.numel() // 2
        if name.startswith("blocks.0.attn"):                      # later a tie that falls the other way spreads
            assert ((a.weight - b.weight).abs() > 1e-3).float().mean() < 0.02, name


@needs_tiny
@pytest.mark.parametrize("fraction,bits", [(0, 4), (0, 3), (0.5, None), (0.5, 4)])
def test_plain_recipe_is_as_good_as_the_published_one_over_transformers(fraction, bits):
    pytest.importorskip("transformers")
    from published import both
    tokenizer = load_tokenizer(SHIPPED["tiny-opt"])
    windows, test = calibration(tokenizer, "code", "train", 16, 128, 0), eval_tokens(tokenizer, "code", "test", 128, 4096)
    published, ours, *_ = both(SHIPPED["tiny-opt"], windows, test, fraction, bits)
    assert ours == pytest.approx(published, rel=0.02)


def test_gram_is_the_hessian():
    gram, x = train.Gram(), torch.randn(3, 50, 530).bfloat16()
    gram.add(x[:2]), gram.add(x[2:])
    assert torch.allclose(gram.mean(), hessian(x), atol=1e-4) and torch.equal(gram.mean(), gram.mean().T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fast_products_lose_nothing(dtype):
    """Factors in bf16 only where the numbers are bf16, sums in fp32 always, and the setting is put back."""
    before, x = torch.backends.mkldnn.matmul.fp32_precision, torch.randn(4000, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    gram = train.Gram()
    gram.add(x)
    exact = x.double().T @ x.double() / len(x)
    assert (gram.mean().double() - exact).abs().max() < 2e-6 and torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize("biased", [False, True])
def test_corrected_weights_fit_the_dense_outputs(biased):
    """Undamped, they are the least squares solution, bias and residual stream included; without drift nothing changes."""
    g = torch.Generator().manual_seed(0)
    x, W, b = torch.randn(2, 100, 12, generator=g) + 0.5, torch.randn(5, 12, generator=g), torch.randn(5, generator=g) if biased else None
    dense_x, r = x + 0.3 * torch.randn(x.shape, generator=g) + 0.2, torch.randn(2, 100, 5, generator=g)
    dense_r = r + 0.3 * x[..., :5] + 0.1
    split = lambda t: list(t.split(1))
    V, H, shift = train.corrected(W, biased, hessian(x), split(x), split(dense_x), split(r), split(dense_r), 1.0, damp=0.0)
    wanted = (dense_x @ W.T + (0 if b is None else b) + dense_r - r).reshape(-1, 5)
    A = x.reshape(-1, 12) if b is None else torch.cat([x.reshape(-1, 12), torch.ones(200, 1)], 1)
    exact = torch.linalg.lstsq(A, wanted).solution.T
    assert torch.allclose(V, exact[:, :12], atol=2e-3)
    assert shift is None if b is None else torch.allclose(b + shift(V), exact[:, 12], atol=2e-3)
    same, _, shift = train.corrected(W, biased, hessian(x), split(x), split(x), split(r), split(r), 1.0)
    assert torch.equal(same, W) and (b is None or shift(W).abs().max() < 1e-5)


def test_a_constant_input_belongs_to_the_bias():
    """Its variance is 0 but for rounding, which may leave it below: the solvers must not see that."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 400, 12, generator=g)
    x[..., 3:9] = torch.tensor([0.1, 0.3, 0.7, 1.1, 3.3, 7.7])
    H = train.corrected(torch.randn(5, 12, generator=g), True, hessian(x), [x], [x], [None], [None], 0.5)[1]
    assert (H.diagonal()[3:9] == 0).all() and (H.diagonal()[:3] > 0).all()
    out = prune_and_round(torch.randn(5, 12, generator=g), H, 0.5, 4)
    assert torch.isfinite(out.weight).all()


@needs_tiny
@pytest.mark.parametrize("model", ["tiny-llama", "tiny-opt"])
def test_main_job_end_to_end(model, text, tmp_path):
    args = ["train.py", "--model", model, "--bits", 4, "--sparsity", 0.5, "--nsamples", 16, "--seqlen", 128, "--calib", text, "--data", text,
            "--max-tokens", 2048, "--steps", 24, "--prompt-tokens", 16, "--val-windows", 4, "--train-data", "code", "--device", "cpu", "--dtype", "float32"]
    done = run(*args, "--out", tmp_path / "a")
    report = json.loads((tmp_path / "a/report.json").read_text())
    rows = {r["name"]: r for r in report["rows"]}
    assert list(rows) == ["dense", "compressed", "compressed + initial prompt", "compressed + learned prompt",
                          "dense + initial prompt", "dense + learned prompt"]
    assert rows["compressed + learned prompt"]["perplexity"] < 0.97 * rows["compressed + initial prompt"]["perplexity"]
    assert rows["dense"]["perplexity"] < rows["compressed"]["perplexity"]
    for r in rows.values():
        assert {"name", "perplexity", "megabytes", "bits_per_weight", "linear_bits_per_weight", "seconds"} <= set(r)
        assert f"{r['perplexity']:.3f}" in done.stdout
    assert report["settings"]["seed"] == 0 and report["settings"]["calibration_tokens"] == 16 * 128
    assert report["settings"]["scored_tokens"] == 16 * 127

    out = load_model(tmp_path / "a/compressed", packed=False)     # loads again, half of every Linear exactly zero
    for block in out.blocks:                                      # Linears that share an input share the half
        for names in (("attn.q", "attn.k", "attn.v"), ("attn.o",), ("mlp.up",) if block.mlp.gate is None else ("mlp.gate", "mlp.up"), ("mlp.down",)):
            weights = torch.cat([block.get_submodule(n).weight for n in names])
            assert int((weights == 0).sum()) >= weights.numel() // 2 > 0.99 * int((weights == 0).sum()), names
    done = run("eval.py", tmp_path / "a/compressed", "--data", text, "--seqlen", 128, "--max-tokens", 2048, "--prompt",
               tmp_path / "a/prompt.safetensors", "--json", "--device", "cpu")
    last = json.loads(done.stdout.strip().split("\n")[-1])
    assert last["perplexity"] == pytest.approx(rows["compressed + learned prompt"]["perplexity"], rel=1e-4)
    assert (last["tokens"], last["seqlen"], last["prompt_tokens"]) == (16 * 127, 128, 16) and last["data"] == str(text)

    run("eval.py", tmp_path / "a/compressed", "--data", text, "--seqlen", 128, "--max-tokens", 1024, "--hard-prompt", "Weights have errors.")
    words = run("eval.py", model, "--generate", "Return the", "--max-new", 10, "--device", "cpu").stdout
    assert words.startswith("Return the") and len(words) > 15

    run(*args, "--out", tmp_path / "b", "--seed", 0)              # the same seed gives the same numbers
    again = json.loads((tmp_path / "b/report.json").read_text())["rows"]
    assert [r["perplexity"] for r in again] == [r["perplexity"] for r in report["rows"]]


@needs_tiny
@pytest.mark.parametrize("model", ["tiny-llama", "tiny-opt"])
def test_at_the_defaults_compression_hurts_and_the_prompt_helps(model, tmp_path):
    """With fewer steps and less text, to be quick."""
    run("train.py", "--model", model, "--max-tokens", 8192, "--steps", 30, "--device", "cpu", "--dtype", "float32", "--out", tmp_path)
    rows = {r["name"]: r["perplexity"] for r in json.loads((tmp_path / "report.json").read_text())["rows"]}
    assert rows["compressed"] > 1.04 * rows["dense"]
    assert rows["compressed + learned prompt"] < 0.95 * min(rows["compressed"], rows["compressed + initial prompt"])
    assert rows["dense + learned prompt"] < rows["compressed + learned prompt"]


@needs_tiny
@pytest.mark.parametrize("options", [["--sparsity", "0", "--bits", "3"], ["--sparsity", "2:4", "--bits", "16"],
                                     ["--sparsity", "0.625", "--true-sequential", "--groupsize", "64"],
                                     ["--recipe", "plain", "--sparsity", "0", "--act-order", "--static-groups", "--groupsize", "64", "--sym"],
                                     ["--recipe", "plain"], ["--mask", "sparsegpt", "--refits", "0", "--grid", "uniform", "--no-act-order", "--correct", "0"],
                                     ["--sparsity", "0", "--bits", "16"]])
def test_other_settings_without_a_prompt(options, text, tmp_path):
    run("train.py", "--model", "tiny-llama", *options, "--nsamples", 4, "--seqlen", 64, "--calib", text, "--data", text, "--max-tokens", 512,
        "--steps", 0, "--device", "cpu", "--dtype", "float32", "--out", tmp_path)
    names = [r["name"] for r in json.loads((tmp_path / "report.json").read_text())["rows"]]
    assert names == (["dense"] if options == ["--sparsity", "0", "--bits", "16"] else ["dense", "compressed"])
    assert not (tmp_path / "prompt.safetensors").exists()


@needs_tiny
@pytest.mark.parametrize("options,message", [
    (["--model", "nowhere"], "no checkpoint folder nowhere"), (["--model", "llama-7b"], "hf download huggyllama/llama-7b"),
    (["--sparsity", "2"], "between 0 and 1"), (["--sparsity", "5:4"], "n:m"), (["--data", "nothing"], "unknown text set"),
    (["--data", "nothing.txt"], "nothing.txt"), (["--seqlen", "100000"], "seqlen"), (["--recipe", "plain", "--static-groups"], "--act-order"),
    (["--no-true-sequential"], "--correct 0"), (["--prompt-tokens", "0"], "at least 1"), (["--batch-size", "0"], "at least 1")])
def test_bad_settings_are_one_line_and_leave_nothing(options, message, text, tmp_path):
    done = run("train.py", "--model", "tiny-llama", "--calib", text, "--data", text, *options, "--device", "cpu", "--out", tmp_path / "o", ok=False)
    assert done.stderr.startswith("error: ") and len(done.stderr.strip().split("\n")) == 1 and message in done.stderr
    assert not (tmp_path / "o").exists()
