"""Every flag of train.py, eval.py and export.py is tried once, and changes what its entry here
says; a flag without an entry fails, and so does one that changes nothing. Flags that would do
nothing beside others are refused.

    python -m pytest -q tests/test_flags.py
"""
import argparse
import contextlib
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fuzz import dense, hf
from safetensors.torch import load_file

import eval as evaluation
import export
import model as models
import train
from data.flags import sizes
from kernels.linear import PackedLinear
from model import save_model
from prompt import save_prompt

ROOT = Path(__file__).resolve().parents[1]
TEXTS = (
    "a.txt",
    "b.txt",
    "d/ptb.test.txt",
    "d/ptb.train.txt",
    "e/ptb.test.txt",
    "e/piqa.jsonl",
    "d/piqa.jsonl",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models of two blocks, one more of other weights, a packed one, texts, prompts and items."""
    place = tmp_path_factory.mktemp("flags")
    for name in ("m", "n"):
        (place / name).mkdir()
        hf("llama")(place / name)
    torch.manual_seed(1)
    other = dense("llama")
    other.norm.weight.data += 0.5
    save_model(other, place / "n")
    words = (ROOT / "gptq.py").read_text()
    for i, name in enumerate(TEXTS):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(words[3000 * i:3000 * i + 2500])
    for folder, gold in (("d", 0), ("e", 1)):
        row = {"goal": "x", "sol1": "hello", "sol2": "shell", "label": gold}
        another = {**row, "goal": "y"}
        items = f"{json.dumps(row)}\n{json.dumps(another)}\n"
        (place / folder / "piqa.jsonl").write_text(items)
    for name, family in (("p", "llama"), ("q", "opt")):
        prompt = torch.randn(3, 32)
        save_prompt(place / f"{name}.safetensors", prompt, {}, {"family": family})
    (place / "lines.txt").write_text("hello\n")
    (place / "more.txt").write_text("shell\n")
    packed = run_train(place, "--steps 0 --out P/run".split())
    assert packed["error"] == ""
    exact = run_train(place, "--steps 0 --sparsity 0 --grid uniform --out P/exact".split())
    assert exact["error"] == ""
    peft = at(place, "P/m --to peft P/adapter --prompt P/p.safetensors".split())
    export.main(export.parse(peft))
    return place


def outcome(work, folder: Path) -> dict:
    """What can be seen of a program: its error, what it printed, the files it left, and what it
    called."""
    counts = {"packed products": 0, "recomputed": 0, "batches": 0}
    printed = io.StringIO()

    def counted(what, function):
        def wrapper(*args, **kwargs):
            counts[what] += 1
            return function(*args, **kwargs)
        return wrapper

    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        forward = counted("packed products", PackedLinear.forward)
        patch.setattr(PackedLinear, "forward", forward)
        patch.setattr(models, "checkpoint", counted("recomputed", models.checkpoint))
        hidden = counted("batches", models.Transformer.hidden)
        patch.setattr(models.Transformer, "hidden", hidden)
        patch.setattr("sys.stdin", io.StringIO("hello\n"))
        error = ""
        try:
            work()
        except (ValueError, OSError) as e:
            error = str(e)
        except SystemExit:
            error = "refused by the parser"
    files, weights, report = {}, {}, {}
    if folder.is_dir():
        files = {str(f.relative_to(folder)): f for f in sorted(folder.rglob("*")) if f.is_file()}
    for name, file in files.items():
        if file.suffix == ".safetensors":
            weights[name] = digest(load_file(file))
        elif file.suffix == ".pth":
            weights[name] = file.read_bytes()
    if "report.json" in files:
        report = json.loads(files["report.json"].read_text())
    rows = report.get("rows", [])
    return {
        **counts,
        "error": error,
        "printed": printed.getvalue(),
        "numbers": re.findall(r"-?\d+\.\d{4}", printed.getvalue()),
        "files": sorted(files),
        "weights": weights,
        "rows": [row["name"] for row in rows],
        "perplexity": [row["perplexity"] for row in rows],
        "losses": report.get("losses"),
    }


def digest(tensors: dict) -> str:
    whole = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        whole.update(name.encode() + str(tensor.dtype).encode())
        whole.update(tensor.view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def at(place: Path, words: list[str]) -> list[str]:
    """P/ stands for the place."""
    return [word.replace("P/", f"{place}/") for word in words]


BASE = {
    "--model": "P/m",
    "--data": "P/a.txt",
    "--calib": "P/a.txt",
    "--seqlen": "16",
    "--max-tokens": "64",
    "--nsamples": "2",
    "--batch-size": "2",
    "--device": "cpu",
    "--dtype": "float32",
    "--heal": "0",
    "--out": "P/out",
}


def run_train(place: Path, words: list[str]) -> dict:
    """train.py with BASE and these words: "no--x" takes --x of BASE away, "--keep" leaves what is
    in the folder."""
    out = place / "out"
    if "--out" in words:
        out = Path(at(place, words)[words.index("--out") + 1])
    if "--keep" in words:
        words = [word for word in words if word != "--keep"]
    else:
        shutil.rmtree(out, ignore_errors=True)

    def work():
        kept = []
        for flag, value in BASE.items():
            if f"no{flag}" not in words:
                kept += [flag, value]
        given = [word for word in words if not word.startswith("no--")]
        train.main(train.flags().parse_args(at(place, kept + given)))

    return outcome(work, out)


def run_eval(place: Path, words: list[str]) -> dict:
    shutil.rmtree(place / "out", ignore_errors=True)
    (place / "out").mkdir()

    def work():
        evaluation.main(evaluation.flags().parse_args(at(place, words)))

    return outcome(work, place / "out")


def run_export(place: Path, words: list[str]) -> dict:
    shutil.rmtree(place / "out", ignore_errors=True)

    def work():
        export.main(export.parse(at(place, words)))

    return outcome(work, place / "out")


LEARN = "--steps 2 --train-data P/a.txt --prompt-tokens 3 --val-windows 1"
GPTQ = "--steps 0 --recipe plain --sparsity 0"
# flag: (the rest of the command line, the flag's words, what has to differ with them)
TRAIN = {
    "model": ("--steps 0", "--model P/n", "perplexity"),
    "dense": ("--steps 0 --model P/run/compressed no--calib no--nsamples", "--dense P/m", "rows"),
    "out": ("--steps 0", "--out P/elsewhere --keep", "printed"),
    "resume": ("--steps 0 --out P/run --keep", "--resume", "error"),
    "overwrite": (
        "--steps 0 --out P/exact --keep --sparsity 0 --grid uniform", "--overwrite", "error"),
    "plan": ("--steps 0", "--plan", "files"),
    "device": ("--steps 0", "--device nowhere", "error"),
    "dtype": ("--steps 0", "--dtype bfloat16", "perplexity"),
    "seed": ("--steps 0", "--seed 1", "weights"),
    "bits": ("--steps 0", "--bits 3", "weights"),
    "sparsity": ("--steps 0", "--sparsity 2:4", "weights"),
    "groupsize": ("--steps 0", "--groupsize 16", "weights"),
    "sym": ("--steps 0 --sparsity 0", "--sym", "weights"),
    "recipe": ("--steps 0", "--recipe plain", "weights"),
    "mask": ("--steps 0", "--mask sparsegpt", "weights"),
    "refits": ("--steps 0", "--refits 0", "weights"),
    "grid": ("--steps 0", "--grid uniform", "weights"),
    "act_order": ("--steps 0", "--no-act-order", "weights"),
    "static_groups": (
        f"{GPTQ} --act-order --groupsize 16 --blocksize 16", "--static-groups", "weights"),
    "descent": ("--steps 0", "--descent 0", "weights"),
    "true_sequential": ("--steps 0 --correct 0", "--no-true-sequential", "weights"),
    "correct": ("--steps 0", "--correct 0", "weights"),
    "percdamp": ("--steps 0", "--percdamp 1", "weights"),
    "allocation": ("--steps 0", "--allocation uniform", "weights"),
    "blocksize": ("--steps 0 --recipe plain", "--blocksize 16", "weights"),
    "calib": ("--steps 0", "--calib P/b.txt", "weights"),
    "nsamples": ("--steps 0", "--nsamples 4", "weights"),
    "rewrite": ("--steps 0", "--rewrite 2", "weights"),
    "reconstruct": ("--steps 0 --nsamples 4", "--reconstruct 4", "weights"),
    "heal": ("--steps 0", "--heal 3", "rows"),
    "data": ("--steps 0", "--data P/b.txt", "perplexity"),
    "data_dir": ("--steps 0 --data ptb --data-dir P/d", "--data-dir P/e", "perplexity"),
    "seqlen": ("--steps 0", "--seqlen 8", "perplexity"),
    "max_tokens": ("--steps 0", "--max-tokens 32", "perplexity"),
    "batch_size": (LEARN, "--batch-size 1", "losses"),
    "fused": ("--steps 0", "--fused off", "packed products"),
    "steps": ("--steps 0", LEARN, "rows"),
    "lr": (LEARN, "--lr 1", "losses"),
    "train_data": (LEARN, "--train-data P/b.txt", "losses"),
    "val_windows": (LEARN, "--val-windows 2", "losses"),
    "prompt_tokens": (LEARN, "--prompt-tokens 4", "losses"),
    "prompt_init": (LEARN, "--prompt-init random", "losses"),
    "control": (LEARN, "--control", "rows"),
    "checkpointing": (LEARN, "--checkpointing", "recomputed"),
    "kind": (LEARN, "--kind prefix", "losses"),
    "objective": (LEARN, "--objective kl", "losses"),
    "prompt_recipe": (LEARN, "--prompt-recipe paper", "losses"),
}
TEXT = "P/m --data P/a.txt --seqlen 16 --max-tokens 64"
PIQA = "P/m --tasks piqa --data-dir P/d"
HELLO = "P/m --generate hello --max-new 8"
EVAL = {
    "model": (TEXT, "P/n --data P/a.txt --seqlen 16 --max-tokens 64", "numbers"),
    "prompt": (TEXT, "--prompt P/p.safetensors", "numbers"),
    "force": (f"{TEXT} --prompt P/q.safetensors", "--force", "error"),
    "hard_prompt": (TEXT, "--hard-prompt hell", "numbers"),
    "device": (TEXT, "--device nowhere", "error"),
    "dtype": (f"{TEXT} --dtype float32", "--dtype bfloat16", "numbers"),
    "fused": ("P/run", "--fused off", "packed products"),
    "batch_size": (TEXT, "--batch-size 1", "batches"),
    "json": (TEXT, "--json", "printed"),
    "data": (TEXT, "--data P/b.txt", "numbers"),
    "data_dir": ("P/m --data ptb --data-dir P/d --seqlen 16", "--data-dir P/e", "numbers"),
    "split": ("P/m --data ptb --data-dir P/d --seqlen 16", "--split train", "numbers"),
    "seqlen": (TEXT, "--seqlen 8", "numbers"),
    "max_tokens": (TEXT, "--max-tokens 32", "numbers"),
    "tasks": ("P/m --tasks piqa=P/d/piqa.jsonl", "--tasks piqa=P/e/piqa.jsonl", "numbers"),
    "limit": (PIQA, "--limit 1", "numbers"),
    "items": (PIQA, "--items P/out/items.jsonl", "files"),
    "generate": (HELLO, "--generate shell", "printed"),
    "generate_from": (
        "P/m --max-new 8 --generate-from P/lines.txt", "--generate-from P/more.txt", "printed"),
    "chat": ("P/m --max-new 8", "--chat", "error"),
    "max_new": (HELLO, "--max-new 9", "printed"),
    "temperature": (HELLO, "--temperature 5", "printed"),
    "top_p": (f"{HELLO} --temperature 5", "--top-p 0.01", "printed"),
    "seed": (f"{HELLO} --temperature 5", "--seed 1", "printed"),
}
EXPORT = {
    "model": ("P/m P/out --to hf", "P/n P/out --to hf", "weights"),
    "out": ("P/m --to hf", "P/out", "error"),
    "to": ("P/exact/compressed P/out --to hf", "--to gptq", "weights"),
    "prompt": ("P/m P/out --to peft", "--prompt P/p.safetensors", "error"),
    "dtype": ("P/m P/out --to hf", "--dtype bfloat16", "weights"),
    "verify": ("P/run/compressed", "--verify", "error"),
}
TABLES = {"train": TRAIN, "eval": EVAL, "export": EXPORT}
PACKED = "--model P/run/compressed no--calib no--nsamples --steps 0"
NOTHING = "--sparsity 0 --bits 16"
# (program, the rest of the command line, flags that do nothing beside it)
IDLE = [
    ("train", "--steps 0", "--lr 1"),
    ("train", "--steps 0", "--train-data P/b.txt"),
    ("train", "--steps 0", "--val-windows 2"),
    ("train", "--steps 0", "--prompt-tokens 4"),
    ("train", "--steps 0", "--prompt-init random"),
    ("train", "--steps 0", "--control"),
    ("train", "--steps 0", "--checkpointing"),
    ("train", f"--steps 0 {NOTHING}", "--heal 2"),
    ("train", f"--steps 0 {NOTHING} no--calib no--nsamples", "--reconstruct 2"),
    ("train", f"--steps 0 {NOTHING} no--calib no--nsamples", "--rewrite 2"),
    ("train", "--steps 0 --bits 16", "--groupsize 16"),
    ("train", "--steps 0 --bits 16", "--sym"),
    ("train", "--steps 0 --bits 16", "--grid uniform"),
    ("train", "--steps 0 --bits 16", "--act-order"),
    ("train", "--steps 0 --bits 16", "--descent 1"),
    ("train", "--steps 0 --bits 16", "--fused off"),
    ("train", "--steps 0 --bits 16", "--blocksize 16"),
    ("train", "--steps 0", "--sym"),
    ("train", "--steps 0 --sparsity 0", "--mask admm"),
    ("train", "--steps 0 --sparsity 0", "--refits 1"),
    ("train", f"{GPTQ} --act-order", "--static-groups"),
    ("train", "--steps 0", "--data-dir P/d"),
    ("train", f"--steps 0 {NOTHING} no--calib", "--nsamples 4"),
    ("train", f"--steps 0 {NOTHING} no--nsamples", "--calib x"),
    ("train", f"--steps 0 {NOTHING} no--calib no--nsamples", "--seed 1"),
    ("train", PACKED, "--seed 1"),
    ("train", PACKED, "--calib P/a.txt"),
    ("train", f"--steps 2 --prompt-tokens 3 --val-windows 1 {NOTHING} no--calib no--nsamples",
     "--calib P/a.txt,P/b.txt"),
    ("train", f"{LEARN} {NOTHING} no--calib no--nsamples", "--control"),
    ("eval", TEXT, "--split test"),
    ("eval", TEXT, "--data-dir P/d"),
    ("eval", TEXT, "--fused on"),
    ("eval", "P/run", "--split test"),
    ("eval", TEXT, "--limit 1"),
    ("eval", TEXT, "--items P/out/x"),
    ("eval", TEXT, "--max-new 4"),
    ("eval", "P/m --tasks piqa=P/d/piqa.jsonl", "--data-dir P/d"),
    ("eval", HELLO, "--seed 1"),
    ("eval", HELLO, "--max-tokens 64"),
    ("export", "P/m P/out --to meta", "--prompt P/p.safetensors"),
    ("export", "P/exact/compressed P/out --to gptq", "--dtype float32"),
    ("export", "P/m P/out --to hf", "--verify"),
]


PARSERS = {"train": train.flags(), "eval": evaluation.flags(), "export": export.flags()}


@pytest.mark.parametrize("table, parser", [(TABLES[name], PARSERS[name]) for name in PARSERS],
                         ids=PARSERS)
def test_every_flag_has_an_entry(table, parser):
    assert set(table) == {action.dest for action in parser._actions} - {"help"}
    assert all(action.help for action in parser._actions)


RUN = {"train": run_train, "eval": run_eval, "export": run_export}
SEEN = {}                                                   # of command lines that leave nothing


@pytest.mark.parametrize("program, name", [(p, name) for p in TABLES for name in TABLES[p]])
def test_a_flag_does_something(program, name, place):
    """Only what the entry names is looked at: it differs. Where it is an error, one of the two
    works."""
    rest, words, what = TABLES[program][name]
    rest = rest.split()
    words = words.split()
    if (program, *rest) not in SEEN or "--keep" in rest:
        SEEN[program, *rest] = RUN[program](place, rest)
    without = SEEN[program, *rest]
    whole = name == "model" and words[0].startswith("P/")   # words that need no rest
    with_it = RUN[program](place, words if whole else rest + words)
    errors = without["error"], with_it["error"]
    assert "" in errors, errors
    assert what == "error" or errors == ("", ""), errors
    assert without[what] != with_it[what]


def test_several_calibration_texts_share_the_windows(place):
    base = "--steps 0 --nsamples 5".split()
    one = run_train(place, [*base, "--calib", "P/a.txt"])
    two = run_train(place, [*base, "--calib", "P/a.txt,P/b.txt"])
    assert one["weights"] != two["weights"]
    words = ("--model P/m --data P/a.txt --calib P/a.txt,P/b.txt --seqlen 16 --max-tokens 64 "
             "--nsamples 5 --steps 0 --device cpu --out P/out").split()
    args = train.flags().parse_args(at(place, words))
    train.settle(args)
    run = train.Run(args)
    a, b = (run.tokenizer.encode((place / name).read_text()) for name in ("a.txt", "b.txt"))

    def inside(window, text) -> bool:
        return any(text[i:i + 16] == window for i in range(len(text)))

    found = [[inside(window, a), inside(window, b)] for window in run.windows.tolist()]
    assert found == [[True, False]] * 3 + [[False, True]] * 2
    assert [inside(window, a) for window in run.heldout.tolist()] == [True, False] * 4
    few = "--steps 0 --nsamples 1 --calib P/a.txt,P/b.txt".split()
    assert "without a window" in run_train(place, few)["error"]


def test_every_process_needs_a_batch_where_something_is_compressed(monkeypatch):
    monkeypatch.setattr(train.parallel, "world", lambda: 2)
    monkeypatch.setattr(train.parallel, "rank", lambda: 0)

    def settled(words: str) -> None:
        train.settle(train.flags().parse_args(f"{words} --device cpu".split()))
    with pytest.raises(ValueError, match="128 windows in batches of 256 leave none"):
        settled("--batch-size 256 --nsamples 128 --steps 3")
    settled("--batch-size 256 --bits 16 --sparsity 0 --steps 3")


@pytest.mark.parametrize("program, rest, words", IDLE)
def test_a_flag_that_would_do_nothing_is_refused(program, rest, words, place):
    error = RUN[program](place, [*rest.split(), *words.split()])["error"]
    name = words.split()[0]
    assert name in error, error
    assert "\n" not in error, error
    assert "nothing" in error or "takes no" in error, error
    assert not (place / "out/report.json").exists()


@pytest.mark.parametrize("program", ["train.py", "eval.py", "export.py"])
def test_help_answers_without_packages(program):
    """-S: no torch to be found, so it cannot be waited for."""
    command = [sys.executable, "-S", program, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout, done.stderr


def test_sizes_are_two_whole_numbers():
    read = sizes("out x in, such as 3x40")
    assert read("3x40") == (3, 40)
    for text in ("3", "3x", "0x3", "3x0", "3x4x5", "-3x4", "3 x 4", "3x4.0", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="give out x in, such as 3x40"):
            read(text)
