"""eval.py: perplexity by hand; generation against transformers; what is chosen where no flag says;
the program.

    python -m pytest -q tests/test_eval.py
"""
import gzip
import io
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import eval as evaluation
from data.config import SHIPPED
from data.flags import BAD_INPUT, INTERRUPTED
from data.progress import Progress, duration
from data.tokenizer import load_tokenizer
from model import load_model, save_model
from prompt import as_prefix, save_prompt
from test_prompt import TOKENS, Foreign, Letters, tiny

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("n", [0, 5])
def test_perplexity_equals_a_count_by_hand(family, n):
    model = tiny(family)
    prompt = torch.randn(n, 32) if n else None
    total, count = 0.0, 0
    for start in range(0, 96, 16):  # six windows of 16, each scores 15 targets
        window = TOKENS[start:start + 16]
        e = model.embed(window[None])
        logits = model(torch.cat([prompt[None], e], 1) if n else e)[0].double()
        for i in range(1, 16):
            total -= float(torch.log_softmax(logits[n + i - 1], -1)[window[i]])
            count += 1
    got, scored = evaluation.perplexity(model, TOKENS, 16, prompt)
    assert scored == count == 90
    assert math.isclose(got, math.exp(total / count), rel_tol=1e-5)
    assert math.isclose(evaluation.perplexity(Foreign(model), TOKENS, 16, prompt)[0], got,
                        rel_tol=1e-5)


def test_free_memory_counts_what_torch_keeps(monkeypatch):
    for name, value in (("mem_get_info", (5, 24)), ("memory_reserved", 9), ("memory_allocated", 6)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert evaluation.free_memory("cuda:0") == 5 + 9 - 6
    assert 0 < evaluation.free_memory("cpu")


def test_a_prompt_that_changes_nothing_leaves_the_perplexity():
    """Rotary attention sees only distances; with the values set to zero nothing flows between
    positions, so a prompt in front changes no logit. Counting the prompt's positions, as the
    paper's code does, would report a smaller number."""
    model = tiny()
    for block in model.blocks:
        block.attn.v.weight.zero_()
    plain, scored = evaluation.perplexity(model, TOKENS, 16)
    behind, scored2 = evaluation.perplexity(model, TOKENS, 16, torch.randn(7, 32))
    assert scored == scored2
    assert math.isclose(plain, behind, rel_tol=1e-5)
    flawed = plain ** ((16 - 1) / (16 - 1 + 7))  # what the released code would print
    assert abs(flawed - behind) > 0.5


def test_too_little_text_is_an_error():
    with pytest.raises(ValueError, match="97 tokens cannot fill one window of seqlen 128"):
        evaluation.perplexity(tiny(), TOKENS, 128)
    for seqlen, batch_size in ((1, 4), (16, 0)):
        with pytest.raises(ValueError,
                           match=f"seqlen {seqlen} and batch size {batch_size} must be at least"):
            evaluation.perplexity(tiny(), TOKENS, seqlen, batch_size=batch_size)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_perplexity_that_is_no_number_is_an_error(value):
    model = tiny()
    model.blocks[1].mlp.down.weight[3, 5] = value
    with pytest.raises(ValueError,
                       match="perplexity of it: the loss of tokens 0 to 30 is nan: weights or "
                             "prompt are damaged"):
        evaluation.perplexity(model, TOKENS, 16, batch_size=2, title="perplexity of it")
    with pytest.raises(ValueError, match="try --dtype float32"):
        evaluation.perplexity(model.bfloat16(), TOKENS, 16)


# --------------------------------------------------------------------------------------------------
# Generation

def test_picking():
    logits = torch.tensor([[0.0, 5.0, 4.0, -3.0]])
    many = logits.expand(2000, -1)
    u = torch.rand(2000, generator=torch.Generator().manual_seed(0))
    assert evaluation.pick(logits, 0.0, 1.0, u[:1]).tolist() == [1]
    # the first alone has more than half
    assert set(evaluation.pick(many, 1.0, 0.5, u).tolist()) == {1}
    assert set(evaluation.pick(many, 1.0, 0.9, u).tolist()) == {1, 2}
    drawn = evaluation.pick(many, 1.0, 1.0, u).bincount(minlength=4) / 2000
    assert torch.allclose(drawn, torch.softmax(logits[0], -1), atol=0.03)
    even = torch.zeros(2000, 4)                             # two of four share what the others had
    drawn = evaluation.pick(even, 1.0, 0.5, u).bincount(minlength=4) / 2000
    assert torch.allclose(drawn.sort().values, torch.tensor([0, 0, 0.5, 0.5]), atol=0.03)
    # never past the end
    assert evaluation.pick(logits, 1.0, 1.0, torch.tensor([1 - 2**-24])).tolist() in ([0], [3])


def continued(model, text, n=20, tokenizer=Letters(), **how):
    """The continuation of one text."""
    return "".join(piece for _, piece in evaluation.generate(model, tokenizer, [text], n, **how))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_greedy_generation_equals_transformers(family, tmp_path):
    from transformers import AutoModelForCausalLM
    model = tiny(family)
    save_model(model, tmp_path, torch.float32)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.tensor([Letters().encode("hello")])
    want = peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20,
                         do_sample=False, pad_token_id=0, eos_token_id=None)[0, 5:]
    assert continued(model, "hello") == Letters().decode(want.tolist())
    assert len(continued(model, "hello", 500)) == 59  # positions run out at 64
    assert len(continued(model, "hello", 500, prompt=torch.randn(4, 32))) == 55
    with pytest.raises(ValueError, match="text 1, 'hello' and the prompt take 64 of"):
        continued(model, "hello", prompt=torch.randn(59, 32))
    with pytest.raises(ValueError, match="text 1, '' has no tokens"):
        continued(model, "")


def test_generation_behind_a_prompt_equals_full_forward_passes():
    model, prompt = tiny(), torch.randn(4, 32)
    x = torch.cat([prompt[None], model.embed(torch.tensor([Letters().encode("hello")]))], 1)
    out = []
    for _ in range(20):
        out.append(int(model(x)[0, -1].argmax()))
        x = torch.cat([x, model.embed(torch.tensor([[out[-1]]]))], 1)
    assert continued(model, "hello", prompt=prompt) == Letters().decode(out)


def test_a_prefix_continues_as_the_prompt_it_was_made_of():
    model, prompt = tiny(), torch.randn(4, 32)
    prefix = as_prefix(model, prompt)
    assert continued(model, "hello", prompt=prefix) == continued(model, "hello", prompt=prompt)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_gives_what_single_texts_give(family, temperature):
    """Rows of different lengths, ends at different times, each with its own seed."""
    model = tiny(family)
    texts = ["hello", "a", "some longer text", "xyz", "hello"]
    made = ["" for _ in texts]
    prompt = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    for i, piece in evaluation.generate(model, Letters(), texts, 9, temperature, 0.9, prompt,
                                        seed=5, batch_size=4):
        made[i] += piece
    alone = [continued(model, text, 9, temperature=temperature, top_p=0.9, seed=5 + i,
                       prompt=prompt)
             for i, text in enumerate(texts)]
    assert made == alone
    assert (made[0] == made[4]) == (temperature == 0)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_steps_whose_position_is_a_tensor_decode_the_same(family, monkeypatch):
    """What a CUDA graph replays; on a GPU from the graph, elsewhere one by one."""
    model = tiny(family)
    rows = [[1, 5, 9, 40], [1, 7, 8, 20, 31]]
    plain = list(evaluation.decode(model, rows, 20))

    class Positioned(evaluation.Steps):
        def __call__(self, tokens):
            if self.device.type == "cpu":
                self.cache.start = torch.tensor([int(self.cache.start)])
            return super().__call__(tokens)
    monkeypatch.setattr(evaluation, "Steps", Positioned)
    device = evaluation.default_device()
    assert list(evaluation.decode(model.to(device), rows, 20)) == plain
    assert len(plain) == 42                                 # two rows, and their ends


def test_generation_ends_at_the_end_of_text_token():
    model, tokenizer = tiny(), Letters()
    free = continued(model, "hello", 20)
    tokenizer.eos_id = ord(free[7]) - 48
    assert continued(model, "hello", 20, tokenizer) == free[:free.index(free[7])]
    row = tokenizer.encode("hello")
    pieces = evaluation.stream_text(model, tokenizer, [row], stops=frozenset(), max_new=20)
    assert "".join(piece for _, piece in pieces) == free


def test_characters_are_shown_whole(monkeypatch):
    """A character of several tokens appears when its last one is there; what was shown is never
    taken back."""
    tokenizer = load_tokenizer(SHIPPED["tiny-opt"])
    ids = tokenizer.encode("caf\u00e9 \u4e2d\u6587 \U0001f600 ok", bos=False)
    monkeypatch.setattr(evaluation, "decode",
                        lambda model, rows, **how: iter([*((0, i) for i in ids[1:]), (0, None)]))
    pieces = [piece for _, piece in evaluation.stream_text(None, tokenizer, [ids[:1]])]
    assert "".join(pieces) == tokenizer.decode(ids)[len(tokenizer.decode(ids[:1])):]
    assert pieces[-1] == ""
    assert len(pieces) > 5
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])
def test_pieces_join_to_the_text_that_all_ids_have(name, monkeypatch):
    """Behind few ids as behind all, whatever lies at the seam: specials, halves of characters."""
    tokenizer = load_tokenizer(SHIPPED[name])
    g = torch.Generator().manual_seed(0)
    text = " a\u4e2d b" * 3 + "\n def f(x):\n    return \U0001f600" * 4
    whole = tokenizer.encode(text, bos=False)
    for trial in range(60):
        ids = torch.randint(0, tokenizer.vocab_size, (30,), generator=g).tolist()
        ids = [tokenizer.eos_id] * (trial % 7) + (whole if trial % 2 else ids)
        cut = 0 if trial % 7 else int(torch.randint(0, len(ids), (), generator=g))
        row = whole[:7] + [tokenizer.eos_id] * (cut % 6)
        monkeypatch.setattr(evaluation, "decode", lambda model, rows, **how: iter(
            [*((0, i) for i in ids), (0, None)]))
        pieces = [piece for _, piece in evaluation.stream_text(None, tokenizer, [row])]
        want = tokenizer.decode(row + ids)[len(tokenizer.decode(row)):]
        assert "".join(pieces) == want


def test_batches_are_of_neighbours_of_like_length():
    lengths = [3, 4, 90, 91, 5, 5, 5, 5, 5]
    assert list(evaluation.batches_alike(lengths, 4, 20)) == [[0, 1], [2, 3], [4, 5, 6, 7], [8]]
    assert list(evaluation.batches_alike([], 4, 20)) == []
    assert list(evaluation.batches_alike([3, 23, 24], 4, 20)) == [[0, 1], [2]]
    assert list(evaluation.batches_alike(lengths, 4, 100)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]


def test_a_text_without_room_is_named_before_anything_is_made():
    with pytest.raises(ValueError, match="text 3, 'x{40}' and .* take 64 of the model's 64"):
        evaluation.generate(tiny(), Letters(), ["a", "b", "x" * 64])


def test_the_smallest_temperature_is_greedy():
    logits = torch.tensor([[0.0, 5.0, 4.0, -3.0]])
    for temperature in (1e-40, 1e-300):
        assert evaluation.pick(logits, temperature, 1.0, torch.tensor([0.7])).tolist() == [1]


def test_texts_are_printed_in_order(capsys):
    pieces = iter([(1, "b1"), (0, "a1"), (1, ""), (0, "a2"), (0, ""), (2, "c"), (2, "")])
    assert evaluation.print_in_order(["A", "B", "C"], pieces) == ["a1a2", "b1", "c"]
    assert capsys.readouterr().out == "Aa1a2\n\nBb1\n\nCc\n"


def test_nan_logits_end_the_generation():
    model = tiny()
    model.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match="a logit of token 5 is nan"):
        continued(model, "hello")


# --------------------------------------------------------------------------------------------------
# What is chosen where no flag says

@pytest.mark.parametrize("has, stored, want", [
    ({}, "bfloat16", "float32"), ({"avx2": True}, "float16", "float32"),
    ({"amx_bf16": True}, "float16", "bfloat16"),
    ({"avx512_bf16": True, "amx_bf16": False}, "float32", "bfloat16")])
def test_precision_of_a_cpu(has, stored, want, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert evaluation.default_dtype("cpu", stored) == want


@pytest.mark.parametrize("capability, stored, want", [
    ((9, 0), "float16", "float16"), ((8, 0), "bfloat16", "bfloat16"),
    ((7, 5), "bfloat16", "float16"),
    ((7, 5), "float32", "float16")])
def test_precision_of_a_gpu(capability, stored, want, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert evaluation.default_dtype("cuda:0", stored) == want


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """What a run of train.py leaves: compressed/ and report.json."""
    out = tmp_path_factory.mktemp("runs") / "out"
    save_model(load_model("tiny-llama"), out / "compressed", torch.float16)
    shutil.copy(SHIPPED["tiny-llama"] / "tokenizer.model", out / "compressed")
    (out / "a.txt").write_text("def f(x):\n    return x\n" * 100)
    settings = {"model": "tiny-llama", "data": str(out / "a.txt"), "seqlen": 32, "dtype": "float32",
                "max_tokens": 128}
    (out / "report.json").write_text(json.dumps({"rows": [], "settings": settings}))
    return out


def run_program(monkeypatch, capsys, *arguments):
    """(exit status, stdout, stderr) of eval.py."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
    status = 0
    try:
        runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
    except SystemExit as e:
        status = e.code
    return status, *capsys.readouterr()


def last(text):
    return json.loads(text.splitlines()[-1])


@pytest.mark.parametrize("where", ["", "compressed"])
def test_settings_of_the_run_are_taken(where, run_folder, monkeypatch, capsys):
    status, out, err = run_program(monkeypatch, capsys, run_folder / where, "--json")
    assert status == 0
    assert f"seqlen 32 ({run_folder / 'report.json'})" in err
    got = last(out)
    assert got["data"] == str(run_folder / "a.txt")
    assert (got["seqlen"], got["tokens"], got["dtype"]) == (32, 124, "float32")
    changed = ("--seqlen", 16, "--max-tokens", 64)
    got = last(run_program(monkeypatch, capsys, run_folder / where, "--json", *changed)[1])
    assert (got["seqlen"], got["tokens"]) == (16, 60)                          # flags go before
    got = last(run_program(monkeypatch, capsys, run_folder / where, "--json", "--data",
                           run_folder / "a.txt")[1])
    assert got["tokens"] == 124                         # the run's text, and as much of it
    # another text: not the run's max-tokens
    (run_folder / "b.txt").write_text("for x in y:\n    print(x)\n" * 40)
    other = ("--data", run_folder / "b.txt")
    got = last(run_program(monkeypatch, capsys, run_folder / where, "--json", *other)[1])
    assert got["seqlen"] == 32 and got["tokens"] > 124


def test_a_run_of_another_device_does_not_set_a_slow_precision(run_folder, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    args = evaluation.flags().parse_args([str(run_folder), "--device", "cpu"])
    evaluation.check_flags(args)
    evaluation.fill_in(args, run_folder / "compressed", {"dtype": "float16", "seqlen": 64},
                       "report", 512)
    assert (args.dtype, args.seqlen, args.data) == ("float32", 64, "wikitext2")


def test_shipped_models_have_their_defaults():
    args = evaluation.flags().parse_args(["tiny-llama"])
    evaluation.check_flags(args)
    folder, run, source = evaluation.locate("tiny-llama")
    evaluation.fill_in(args, folder, run, source, 512)
    assert (args.data, args.seqlen, args.max_tokens) == ("headers", 256, 32768)
    args = evaluation.flags().parse_args(["elsewhere"])
    evaluation.check_flags(args)
    evaluation.fill_in(args, folder, {}, "no run", 512)  # a model of 512 positions and no run
    assert (args.data, args.seqlen, args.max_tokens) == ("wikitext2", 512, None)


def test_a_run_of_a_prompt_alone_names_its_model(run_folder, tmp_path):
    made = run_folder / "compressed"
    settings = {"model": str(made), "packed": True, "data": "mine.txt", "seqlen": 32}
    (tmp_path / "report.json").write_text(json.dumps({"rows": [], "settings": settings}))
    folder, run, source = evaluation.locate(str(tmp_path))
    assert (folder, run["data"]) == (made, "mine.txt")
    assert source == str(tmp_path / "report.json")
    settings = {"model": "tiny-opt", "bits": 16, "sparsity": "0", "seqlen": 64}      # a dense one
    (tmp_path / "report.json").write_text(json.dumps({"rows": [], "settings": settings}))
    folder, run, _ = evaluation.locate(str(tmp_path))
    assert (folder, run["seqlen"]) == (evaluation.resolve("tiny-opt"), 64)


def test_a_run_without_a_compressed_model_says_where_to_look(tmp_path):
    (tmp_path / "report.json").write_text('{"rows": [], "settings": {"model": "tiny-opt"}}')
    with pytest.raises(FileNotFoundError,
                       match="no whole compressed/: finish the run, or measure its dense model, "
                             "python eval.py tiny-opt"):
        evaluation.locate(str(tmp_path))
    odd = '{"rows": [], "settings": {"model": "m", "seqlen": "many"}}'
    (tmp_path / "report.json").write_text(odd)
    (tmp_path / "compressed").mkdir()
    with pytest.raises(ValueError, match="report.json is not a report"):
        evaluation.locate(str(tmp_path))


# --------------------------------------------------------------------------------------------------
# The program

def test_program_prints_numbers_and_text(monkeypatch, capsys, tmp_path):
    (tmp_path / "a.txt").write_text("def f(x):\n    return x\n" * 50)
    common = ("tiny-llama", "--data", tmp_path / "a.txt", "--seqlen", 16, "--max-tokens", 64,
              "--json")
    results = [last(run_program(monkeypatch, capsys, *common, *more)[1])
               for more in ([], ["--hard-prompt"], ["--hard-prompt", "Hello."])]
    assert [r["tokens"] for r in results] == [60] * 3
    assert {(r["model"], r["data"]) for r in results} == {("tiny-llama", str(tmp_path / "a.txt"))}
    none, long, short = (r["prompt_tokens"] for r in results)
    assert none == 0 < short < long
    assert len({r["perplexity"] for r in results}) == 3
    status, out, _ = run_program(monkeypatch, capsys, "tiny-llama", "--generate", "The name of the",
                                 "--max-new", 4, "--json")
    [made] = last(out)["generations"]
    assert status == 0
    assert out.startswith(made["text"] + made["generated"])
    assert re.match(r"The name of the \w", out)  # sentencepiece alone would leave out the space


def test_a_prompt_of_another_family_is_refused_unless_forced(monkeypatch, capsys, tmp_path):
    width = load_model("tiny-llama").embed_tokens.weight.shape[1]
    save_prompt(tmp_path / "p.safetensors", torch.zeros(3, width), {}, {"family": "opt"})
    asked = ("tiny-llama", "--prompt", tmp_path / "p.safetensors", "--generate", "def f(",
             "--max-new", 3)
    status, _, err = run_program(monkeypatch, capsys, *asked)
    assert status == BAD_INPUT
    assert "another family" in err
    assert run_program(monkeypatch, capsys, *asked, "--force")[0] == 0


def test_texts_from_files_and_stdin(monkeypatch, capsys, tmp_path):
    (tmp_path / "a.txt").write_text("The name\n\ndef f(\n")
    (tmp_path / "a.jsonl").write_text('{"text": "The name"}\n{"text": "def f("}\n')
    monkeypatch.setattr("sys.stdin", open(tmp_path / "a.txt"))
    results = []
    for more in (["--generate", "The name", "--generate", "def f("],
                 ["--generate-from", tmp_path / "a.txt"],
                 ["--generate-from", tmp_path / "a.jsonl"],
                 ["--generate-from", "-"]):
        asked = ("tiny-llama", *more, "--max-new", 5, "--json")
        results.append(last(run_program(monkeypatch, capsys, *asked)[1]))
    assert len(results[0]["generations"]) == 2
    assert all(r == results[0] for r in results)


def test_lines_of_a_text_lose_their_ends_alone(tmp_path, monkeypatch):
    """A byte order mark is no text, nor is a line of spaces; spaces behind a text are."""
    wanted = ["one ", "two"]
    (tmp_path / "a.txt").write_bytes("\ufeffone \r\n  \r\ntwo\n".encode())
    assert evaluation.read_texts(str(tmp_path / "a.txt")) == wanted
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeffone \n  \ntwo\n"))
    assert evaluation.read_texts("-") == wanted
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as f:
        f.write('{"text": "one "}\n{"text": "two"}\n')
    assert evaluation.read_texts(str(tmp_path / "a.jsonl.gz")) == wanted


def test_a_terminal_is_asked_with_a_sign(capsys, monkeypatch):
    for live, sign in ((True, "> > "), (False, "")):
        monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
        monkeypatch.setattr(sys.stdin, "isatty", lambda: live)
        assert list(evaluation.ask()) == ["hi\n"]
        assert capsys.readouterr().out == sign


def test_chat_without_a_template_continues_lines(monkeypatch, capsys, tmp_path):
    (tmp_path / "lines").write_text("The name of the\n\ndef main(\n")
    monkeypatch.setattr("sys.stdin", open(tmp_path / "lines"))
    status, out, err = run_program(monkeypatch, capsys, "tiny-llama", "--chat", "--max-new", 6)
    asked = ("--generate", "The name of the", "--max-new", 6)
    plain = run_program(monkeypatch, capsys, "tiny-llama", *asked)[1]
    assert status == 0
    assert "no chat template" in err
    assert plain.startswith("The name of the" + out.splitlines()[0])


NO_WORK = [
    (["nowhere"], "no checkpoint folder nowhere"),
    (["tiny-llama", "--data", "TMP/a.txt", "--seqlen", 600, "--max-tokens", 600],
     "tiny-llama has 512: --seqlen 512 fits"),
    (["tiny-llama", "--data", "TMP", "--seqlen", 16], "unknown text set"),
    (["tiny-llama", "--data", "TMP/b.txt", "--seqlen", 16], "no file"),
    (["tiny-llama", "--prompt", "TMP"], "no prompt file"),
    (["tiny-llama", "--prompt", "TMP/a.txt"], "a.txt"),
    (["tiny-llama", "--prompt", "TMP/a.txt", "--hard-prompt"], "exclude each other"),
    (["tiny-llama", "--hard-prompt", ""], "has no tokens"),
    (["tiny-llama", "--force"], "--force does nothing without --prompt"),
    (["tiny-llama", "--device", "abacus"], "--device abacus cannot be used here"),
    (["tiny-llama", "--device", "meta"], "--device meta cannot be used here"),
    (["tiny-llama", "--generate-from", "TMP/none.txt"], "no file"),
    (["tiny-llama", "--generate-from", "TMP/empty.txt"], "holds no text"),
    (["tiny-llama", "--generate", "x", "--chat"], "exclude each other"),
    (["tiny-llama", "--chat", "--json"], "--json does nothing with --chat"),
    *[(["tiny-llama", "--generate", "x", *more], f"{more[0]} does nothing with --generate")
      for more in (["--data", "ptb"], ["--data-dir", "x"], ["--split", "test"], ["--seqlen", 9],
                   ["--max-tokens", 9])],
    *[(["tiny-llama", *more], f"{more[0]} does nothing without --generate") for more in
      (["--max-new", 9], ["--temperature", 1], ["--top-p", 1], ["--seed", 1])],
    (["tiny-llama", "--chat", "--batch-size", 2], "--batch-size does nothing with --chat"),
    (["tiny-llama", "--generate", "x", "--seed", 3], "--seed does nothing at temperature 0"),
    (["tiny-llama", "--generate", "x", "--top-p", 0.5], "--top-p does nothing at temperature 0"),
    (["tiny-llama", "--data", "TMP/a.txt", "--split", "test"], "--split does nothing with --data"),
    (["tiny-llama", "--data", "code", "--data-dir", "TMP"],
     "--data-dir does nothing with --data code"),
    (["tiny-llama", "--max-tok", 9], "unrecognized arguments: --max-tok"),
    ([], "required: model"),
    *[(["tiny-llama", *more], more[0] + ": ") for more in
      (["--seqlen", 1], ["--seqlen", "many"], ["--max-tokens", -5], ["--batch-size", 0],
       ["--batch-size", 10**9], ["--max-new", -9], ["--temperature", -1], ["--temperature", "nan"],
       ["--temperature", 1e9], ["--top-p", 0], ["--top-p", "inf"], ["--top-p", 1.5],
       ["--seed", -1], ["--seed", 10**30], ["--dtype", "int8"], ["--split", "dev"])],
]


@pytest.mark.parametrize("arguments, message", NO_WORK)
def test_program_fails_in_one_line(arguments, message, monkeypatch, capsys, tmp_path):
    (tmp_path / "a.txt").write_text("def f(x):\n    return x\n" * 100)
    (tmp_path / "empty.txt").write_text("\n \n")
    status, out, err = run_program(monkeypatch, capsys,
                                   *[str(a).replace("TMP", str(tmp_path)) for a in arguments])
    lines = [line for line in err.splitlines() if not line.startswith("device ")]  # what was chosen
    assert status == BAD_INPUT and out == "" and len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def test_help_needs_no_torch_and_every_flag_is_explained():
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-S", "eval.py", "--help"], cwd=ROOT,
                          capture_output=True, text=True)
    # -S: no packages at all
    assert done.returncode == 0 and time.monotonic() - began < 2, done.stderr
    assert all(action.help for action in evaluation.flags()._actions)


def interrupted(*arguments):
    """(exit status, stderr) of eval.py that gets a Ctrl-C once it has said something."""
    p = subprocess.Popen([sys.executable, "eval.py", *arguments], cwd=ROOT, stdin=subprocess.PIPE,
                         text=True,
                         stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    first = p.stderr.readline()
    p.send_signal(signal.SIGINT)
    rest = p.communicate()[1]
    return p.returncode, first + rest


def test_ctrl_c_is_one_line_and_130():
    status, err = interrupted("tiny-llama", "--chat")
    assert status == INTERRUPTED
    assert err.splitlines()[-1] == "stopped"
    assert "Traceback" not in err


def test_a_reader_that_goes_away_is_no_error():
    shell = (f"{sys.executable} eval.py tiny-llama --generate 'def f(' --max-new 50 | head -c 3; "
             f"echo ${{PIPESTATUS[0]}}")
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert done.stdout.splitlines() == ["def141"] and "error" not in done.stderr.lower(), done


# --------------------------------------------------------------------------------------------------
# The progress bar

class Terminal:
    def __init__(self, live):
        self.live, self.written = live, ""

    def isatty(self):
        return self.live

    def write(self, text):
        self.written += text

    def flush(self):
        pass


def test_titles_are_whole_and_lines_fit(monkeypatch):
    title = "perplexity of a model whose name is longer than anybody expects"
    log = Terminal(False)
    assert list(Progress([1, 2, 3], title, log)) == [1, 2, 3]
    assert log.written.count(title) == 3
    assert log.written.endswith("3/3  0 s, 0 s left\n")
    monkeypatch.setenv("COLUMNS", "50")
    screen = Terminal(True)
    list(Progress([1, 2, 3], title, screen))
    lines = screen.written.replace("\n", "\r").split("\r")
    assert all(len(line) in (0, 49) for line in lines)
    assert screen.written.endswith("\n")


def test_a_log_gets_a_few_lines_with_the_last_note(monkeypatch):
    monkeypatch.setattr("data.progress.time.monotonic", lambda: 0.0)
    log = Terminal(False)
    bar = Progress(range(100), "blocks", log)
    for i in bar:
        bar.note(f"loss {i}")
    lines = log.written.splitlines()
    assert len(lines) == 6                                  # the first and every fifth of them
    assert lines[3] == f"{'blocks':28s} {'#' * 12}{'-' * 8} 60/100  0 s, 0 s left  loss 59"


def test_lines_on_a_terminal_cover_the_ones_before_at_any_width(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr("data.progress.time.monotonic", lambda: float(next(clock)))
    for columns in range(40, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        screen = Terminal(True)
        bar = Progress(range(3), "blocks", screen)
        for i in bar:
            bar.note("a long note" if i == 0 else "")
        drawn = screen.written.replace("\n", "\r").split("\r")
        assert {len(line) for line in drawn[:-1]} == {columns - 1}
        assert drawn[-1] == ""


def test_of_several_processes_the_first_shows_a_bar(monkeypatch):
    written = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        log = Terminal(False)
        assert list(Progress([1, 2], "blocks", log)) == [1, 2]
        written.append(log.written)
    assert written[0] and not written[1]


def test_what_was_done_before_tells_nothing_of_the_time_to_come(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("data.progress.time.monotonic", lambda: clock[0])
    log = Terminal(False)
    bar = Progress(range(10), "blocks", log)
    for i in bar:
        clock[0] += 0.0 if i < 5 else 60.0
        if i < 5:
            bar.skip()
    lines = {line.split()[2].partition("/")[0]: line for line in log.written.splitlines()}
    assert lines["4"].endswith("4/10  0 s")                 # nobody knows
    assert lines["6"].endswith("6/10  60 s, 240 s left")


def test_durations_are_readable():
    assert [duration(s) for s in (0.4, 59, 599.4, 600, 725, 36000)] == [
        "0 s", "59 s", "599 s", "10 min 0 s", "12 min 5 s", "10 h 0 min"]
