"""Every flag of train.py, eval.py and export.py is tried once, and changes what its entry here says; a flag without an
entry fails, and so does one that changes nothing. Flags that would do nothing beside others are refused.

    python -m pytest -q tests/test_flags.py
"""
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
from kernels.linear import PackedLinear
from model import save_model
from prompt import save_prompt

ROOT = Path(__file__).resolve().parents[1]


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
    for i, name in enumerate(("a.txt", "b.txt", "d/ptb.test.txt", "d/ptb.train.txt", "e/ptb.test.txt", "e/piqa.jsonl", "d/piqa.jsonl")):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(words[3000 * i:3000 * i + 2500])
    for folder, gold in (("d", 0), ("e", 1)):
        row = {"goal": "x", "sol1": "hello", "sol2": "shell", "label": gold}
        (place / folder / "piqa.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps({**row, 'goal': 'y'})}\n")
    save_prompt(place / "p.safetensors", torch.randn(3, 32), {}, {"family": "llama"})
    save_prompt(place / "q.safetensors", torch.randn(3, 32), {}, {"family": "opt"})
    (place / "lines.txt").write_text("hello\n")
    (place / "more.txt").write_text("shell\n")
    assert run_train(place, "--steps 0 --out P/run".split())["error"] == ""
    assert run_train(place, "--steps 0 --sparsity 0 --grid uniform --out P/exact".split())["error"] == ""
    export.main(export.parse([str(place / "m"), "--to", "peft", str(place / "adapter"), "--prompt", str(place / "p.safetensors")]))
    return place


def outcome(work, folder: Path) -> dict:
    """What can be seen of a program: its error, what it printed, the files it left, and what it called."""
    counts, printed = {"packed products": 0, "recomputed": 0, "batches": 0}, io.StringIO()

    def counted(what, function):
        def wrapper(*args, **kwargs):
            counts[what] += 1
            return function(*args, **kwargs)
        return wrapper
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        patch.setattr(PackedLinear, "forward", counted("packed products", PackedLinear.forward))
        patch.setattr(models, "checkpoint", counted("recomputed", models.checkpoint))
        patch.setattr(models.Transformer, "hidden", counted("batches", models.Transformer.hidden))
        patch.setattr("sys.stdin", io.StringIO("hello\n"))
        error = ""
        try:
            work()
        except (ValueError, OSError) as e:
            error = str(e)
        except SystemExit:
            error = "refused by the parser"
    files = {str(f.relative_to(folder)): f for f in sorted(folder.rglob("*")) if f.is_file()} if folder.is_dir() else {}
    weights = {name: f.read_bytes() if f.suffix != ".safetensors" else digest(load_file(f)) for name, f in files.items()
               if f.suffix in (".safetensors", ".pth")}
    report = json.loads(files["report.json"].read_text()) if "report.json" in files else {}
    numbers = re.findall(r"-?\d+\.\d{4}", printed.getvalue())
    return {**counts, "error": error, "printed": printed.getvalue(), "numbers": numbers, "files": sorted(files), "weights": weights,
            "rows": [row["name"] for row in report.get("rows", [])], "perplexity": [row["perplexity"] for row in report.get("rows", [])],
            "losses": report.get("losses")}


def digest(tensors: dict) -> str:
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(name.encode() + str(tensors[name].dtype).encode() + tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def at(place: Path, words: list[str]) -> list[str]:
    """P/ stands for the place."""
    return [word.replace("P/", f"{place}/") for word in words]


def run_train(place: Path, words: list[str]) -> dict:
    base = ("--model P/m --data P/a.txt --calib P/a.txt --seqlen 16 --max-tokens 64 --nsamples 2 --batch-size 2 --device cpu "
            "--dtype float32 --heal 0 --out P/out").split()
    out = Path(at(place, words)[words.index("--out") + 1]) if "--out" in words else place / "out"
    if "--keep" in words:
        words = [word for word in words if word != "--keep"]
    else:
        shutil.rmtree(out, ignore_errors=True)

    def work():
        given = set(words)                                      # "-x" in words takes a flag of the base away
        kept = [part for flag, value in zip(base[::2], base[1::2]) if f"no{flag}" not in given for part in (flag, value)]
        train.main(train.flags().parse_args(at(place, kept + [word for word in words if not word.startswith("no--")])))
    return outcome(work, out)


def run_eval(place: Path, words: list[str]) -> dict:
    shutil.rmtree(place / "out", ignore_errors=True)
    (place / "out").mkdir()
    return outcome(lambda: evaluation.main(evaluation.flags().parse_args(at(place, words))), place / "out")


def run_export(place: Path, words: list[str]) -> dict:
    shutil.rmtree(place / "out", ignore_errors=True)
    return outcome(lambda: export.main(export.parse(at(place, words))), place / "out")


LEARN = "--steps 2 --train-data P/a.txt --prompt-tokens 3 --val-windows 1"
GPTQ = "--steps 0 --recipe plain --sparsity 0"
# flag: (the rest of the command line, the flag's words, what has to differ with them)
TRAIN = {
    "model": ("--steps 0", "--model P/n", "perplexity"),
    "dense": ("--steps 0 --model P/run/compressed no--calib no--nsamples", "--dense P/m", "rows"),
    "out": ("--steps 0", "--out P/elsewhere --keep", "printed"),
    "resume": ("--steps 0 --out P/run --keep", "--resume", "error"),
    "overwrite": ("--steps 0 --out P/exact --keep --sparsity 0 --grid uniform", "--overwrite", "error"),
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
    "static_groups": (f"{GPTQ} --act-order --groupsize 16 --blocksize 16", "--static-groups", "weights"),
    "descent": ("--steps 0", "--descent 0", "weights"),
    "true_sequential": ("--steps 0 --correct 0", "--no-true-sequential", "weights"),
    "correct": ("--steps 0", "--correct 0", "weights"),
    "percdamp": ("--steps 0", "--percdamp 1", "weights"),
    "blocksize": ("--steps 0 --recipe plain", "--blocksize 16", "weights"),
    "calib": ("--steps 0", "--calib P/b.txt", "weights"),
    "nsamples": ("--steps 0", "--nsamples 4", "weights"),
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
    "generate_from": ("P/m --max-new 8 --generate-from P/lines.txt", "--generate-from P/more.txt", "printed"),
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
PACKED = "--model P/run/compressed no--calib no--nsamples --steps 0"
# (program, the rest of the command line, flags that do nothing beside it)
IDLE = [
    ("train", "--steps 0", "--lr 1"), ("train", "--steps 0", "--train-data P/b.txt"), ("train", "--steps 0", "--val-windows 2"),
    ("train", "--steps 0", "--prompt-tokens 4"), ("train", "--steps 0", "--prompt-init random"), ("train", "--steps 0", "--control"),
    ("train", "--steps 0", "--checkpointing"), ("train", "--steps 0 --bits 16", "--heal 2"), ("train", "--steps 0 --sparsity 0 --bits 16", "--heal 2"),
    ("train", "--steps 0 --sparsity 0 --bits 16 no--calib no--nsamples", "--reconstruct 2"),
    ("train", "--steps 0 --bits 16", "--groupsize 16"),
    ("train", "--steps 0 --bits 16", "--sym"), ("train", "--steps 0 --bits 16", "--grid uniform"),
    ("train", "--steps 0 --bits 16", "--act-order"), ("train", "--steps 0 --bits 16", "--descent 1"),
    ("train", "--steps 0 --bits 16", "--fused off"), ("train", "--steps 0 --bits 16", "--blocksize 16"),
    ("train", "--steps 0", "--sym"), ("train", "--steps 0 --sparsity 0", "--mask admm"), ("train", "--steps 0 --sparsity 0", "--refits 1"),
    ("train", f"{GPTQ} --act-order", "--static-groups"), ("train", "--steps 0", "--data-dir P/d"),
    ("train", "--steps 0 --sparsity 0 --bits 16 no--calib", "--nsamples 4"), ("train", "--steps 0 --sparsity 0 --bits 16 no--nsamples", "--calib x"),
    ("train", "--steps 0 --sparsity 0 --bits 16 no--calib no--nsamples", "--seed 1"), ("train", PACKED, "--seed 1"),
    ("train", PACKED, "--calib P/a.txt"), ("train", f"{LEARN} --sparsity 0 --bits 16 no--calib no--nsamples", "--control"),
    ("eval", TEXT, "--split test"), ("eval", TEXT, "--data-dir P/d"), ("eval", TEXT, "--fused on"), ("eval", "P/run", "--split test"),
    ("eval", TEXT, "--limit 1"), ("eval", TEXT, "--items P/out/x"), ("eval", TEXT, "--max-new 4"),
    ("eval", "P/m --tasks piqa=P/d/piqa.jsonl", "--data-dir P/d"), ("eval", HELLO, "--seed 1"), ("eval", HELLO, "--max-tokens 64"),
    ("export", "P/m P/out --to meta", "--prompt P/p.safetensors"), ("export", "P/exact/compressed P/out --to gptq", "--dtype float32"),
    ("export", "P/m P/out --to hf", "--verify"),
]


@pytest.mark.parametrize("table, parser", [(TRAIN, train.flags()), (EVAL, evaluation.flags()), (EXPORT, export.flags())],
                         ids=["train", "eval", "export"])
def test_every_flag_has_an_entry(table, parser):
    assert set(table) == {action.dest for action in parser._actions} - {"help"}
    assert all(action.help for action in parser._actions)


RUN = {"train": run_train, "eval": run_eval, "export": run_export}
SEEN = {}                                                       # of command lines that leave nothing behind


@pytest.mark.parametrize("program, name", [*(("train", n) for n in TRAIN), *(("eval", n) for n in EVAL), *(("export", n) for n in EXPORT)])
def test_a_flag_does_something(program, name, place):
    """Only what the entry names is looked at: it differs. Where it is an error, one of the two works."""
    rest, words, what = {"train": TRAIN, "eval": EVAL, "export": EXPORT}[program][name]
    rest, words = rest.split(), words.split()
    if (program, *rest) not in SEEN or "--keep" in rest:
        SEEN[program, *rest] = RUN[program](place, rest)
    without, with_it = SEEN[program, *rest], RUN[program](place, words if words[0].startswith("P/") and name == "model" else rest + words)
    errors = without["error"], with_it["error"]
    assert "" in errors and (what == "error" or errors == ("", "")), errors
    assert without[what] != with_it[what]


def test_several_calibration_texts_share_the_windows(place):
    base = "--steps 0 --nsamples 5"
    one, two = (run_train(place, [*base.split(), "--calib", text])["weights"] for text in ("P/a.txt", "P/a.txt,P/b.txt"))
    assert one != two
    args = train.flags().parse_args(at(place, "--model P/m --data P/a.txt --calib P/a.txt,P/b.txt --seqlen 16 --max-tokens 64 "
                                             "--nsamples 5 --steps 0 --device cpu --out P/out".split()))
    train.settle(args)
    run = train.Run(args)
    texts = [run.tokenizer.encode((place / name).read_text()) for name in ("a.txt", "b.txt")]
    inside = lambda window, text: any(text[i:i + 16] == window for i in range(len(text)))
    assert [[inside(w, text) for text in texts] for w in run.windows.tolist()] == [[True, False]] * 3 + [[False, True]] * 2
    assert [inside(w, texts[0]) for w in run.held.tolist()] == [True, False] * 4
    assert "without a window" in run_train(place, "--steps 0 --nsamples 1 --calib P/a.txt,P/b.txt".split())["error"]


@pytest.mark.parametrize("program, rest, words", IDLE)
def test_a_flag_that_would_do_nothing_is_refused(program, rest, words, place):
    error = RUN[program](place, [*rest.split(), *words.split()])["error"]
    name = words.split()[0]
    assert name in error and "\n" not in error and ("nothing" in error or "takes no" in error), error
    assert not (place / "out/report.json").exists()


@pytest.mark.parametrize("program", ["train.py", "eval.py", "export.py"])
def test_help_answers_without_packages(program):
    """-S: no torch to be found, so it cannot be waited for."""
    done = subprocess.run([sys.executable, "-S", program, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
