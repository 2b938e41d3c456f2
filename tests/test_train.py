"""train.py end to end on the shipped tiny models: the table, the folder, resuming, bad input.

    python -m pytest -q tests/test_train.py
"""
import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import compress as compress_module
import eval as evaluation
import heal as heal_module
import train
from data.checkpoint import read_json, write_json
from data.config import SHIPPED, Config
from data.report import Report, identity
from data.tokenizer import copy_tokenizer
from model import Transformer, load_model, open_checkpoint, save_model

ROOT = Path(__file__).resolve().parents[1]
PLAIN_CPU = ["--device", "cpu", "--dtype", "float32"]


def has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.model").exists() or (folder / "vocab.json").exists()


needs_tiny = pytest.mark.skipif(not all(has_tokenizer(folder) for folder in SHIPPED.values()),
                                reason="data/tiny holds no trained checkpoints")


def run(*args, ok=True):
    """A program in a process of its own."""
    command = [sys.executable, *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode == 0) == ok, done.stderr + done.stdout
    return done


def here(*args) -> dict[str, dict]:
    """train.py in this process, another would take seconds to begin: {name: row} of its table."""
    words = list(map(str, args))
    report = train.main(train.flags().parse_args(words))
    return {row["name"]: row for row in report["rows"]}


def refused(*args) -> str:
    """What `run_program` prints behind "error: "."""
    with pytest.raises((ValueError, OSError)) as raised:
        here(*args)
    return str(raised.value)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text that needs nothing from outside: this repository's own sources."""
    path = tmp_path_factory.mktemp("text") / "sources.txt"
    path.write_text("\n\n".join(p.read_text() for p in sorted(ROOT.glob("*.py"))))
    return path


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """More of them."""
    path = tmp_path_factory.mktemp("text") / "other.txt"
    path.write_text("\n\n".join(p.read_text() for p in sorted(ROOT.glob("data/*.py"))))
    return path


@needs_tiny
@pytest.mark.parametrize("model", ["tiny-llama", "tiny-opt"])
def test_main_job_end_to_end(model, text, other, tmp_path, capsys):
    unseen = tmp_path / "unseen.txt"                    # neither calibrated on nor learned from
    unseen.write_text("\n\n".join(p.read_text() for p in sorted(ROOT.glob("kernels/*.py"))))
    args = [
        "train.py",
        "--model", model,
        "--bits", 4,
        "--sparsity", 0.5,
        "--nsamples", 32,
        "--seqlen", 128,
        "--calib", text,
        "--data", unseen,
        "--max-tokens", 2048,
        "--heal", 16,
        "--steps", 16,
        "--prompt-tokens", 16,
        "--batch-size", 2,
        "--val-windows", 4,
        "--train-data", other,
        *PLAIN_CPU,
    ]
    folder = tmp_path / "a"
    done = run(*args, "--out", folder)
    report = json.loads((folder / "report.json").read_text())
    rows = {r["name"]: r for r in report["rows"]}
    assert list(rows) == [
        "dense",
        "compressed",
        "compressed + healed",
        "compressed + initial prompt",
        "compressed + learned prompt",
        "dense + initial prompt",
        "dense + learned prompt",
    ]
    made = {name: r["perplexity"] for name, r in rows.items()}
    assert made["compressed + learned prompt"] < 0.97 * made["compressed + initial prompt"]
    # calibrated on the very text that is measured, it may lose next to nothing
    assert made["dense"] < 1.02 * made["compressed"]
    gaps = [kl for _, kl in report["losses"]["compressed"]["validation"]]     # to the dense model,
    assert min(gaps) > 0 and len(set(gaps)) > 2                   # on held-out windows: it moves
    if model == "tiny-llama":                                     # on so little text OPT may not win
        assert min(gaps) < gaps[0]
    assert made["compressed + healed"] < 1.02 * made["compressed"]
    assert rows["compressed + healed"]["megabytes"] == rows["compressed"]["megabytes"]
    columns = {"name", "perplexity", "megabytes", "bits_per_weight", "linear_bits_per_weight"}
    for r in rows.values():
        assert columns <= set(r)
        assert f"{r['perplexity']:.3f}" in done.stdout
        assert r["scored_tokens"] == 16 * 127
    assert report["settings"]["seed"] == 0
    assert report["settings"]["nsamples"] == 32
    assert {layer["against"] for layer in report["layers"]} == {"corrected weights"}
    assert all(0 < layer["error_heldout"] < 1 for layer in report["layers"])
    assert ", held out 0." in done.stdout
    assert report["losses"]["prompt.safetensors"] != report["losses"]["prompt-dense.safetensors"]
    seconds = json.loads((folder / "seconds.json").read_text())
    assert set(seconds) == set(rows)
    assert all(s["measuring"] > 0 for s in seconds.values())

    out = load_model(folder / "compressed", packed=False)         # loads again
    shares = json.loads((folder / "shares.json").read_text())
    up = ("mlp.up",) if out.blocks[0].mlp.gate is None else ("mlp.gate", "mlp.up")
    for names in (("attn.q", "attn.k", "attn.v"), ("attn.o",), up, ("mlp.down",)):
        zeros = count = 0
        for i, block in enumerate(out.blocks):
            weights = torch.cat([block.get_submodule(n).weight for n in names])
            here = int((weights == 0).sum())                      # Linears with one input share
            wanted = shares[f"blocks.{i}.{names[0]}"] * weights.numel()    # what is exactly zero
            assert here >= int(wanted) > 0.99 * here, (i, names)
            zeros, count = zeros + here, count + weights.numel()
        assert zeros / count == pytest.approx(0.5, abs=0.002), names

    def measured(*words) -> str:
        evaluation.main(evaluation.flags().parse_args([*map(str, words), "--device", "cpu"]))
        return capsys.readouterr().out

    data = ["--data", unseen, "--seqlen", 128]
    prompted = ["--max-tokens", 2048, "--prompt", folder / "prompt.safetensors", "--json"]
    said = measured(folder / "compressed", *data, *prompted)
    last = json.loads(said.strip().split("\n")[-1])
    assert last["perplexity"] == pytest.approx(made["compressed + learned prompt"], rel=1e-4)
    assert last["tokens"] == 16 * 127
    assert last["seqlen"] == 128
    assert last["prompt_tokens"] == 16
    assert last["data"] == str(unseen)
    hard = ["--max-tokens", 1024, "--hard-prompt", "Weights have errors."]
    assert "perplexity" in measured(folder / "compressed", *data, *hard)
    words = measured(model, "--generate", "Return the", "--max-new", 10)
    assert words.startswith("Return the")
    assert len(words) > 15


SMALL = [
    "--seqlen", 64,
    "--max-tokens", 512,
    "--prompt-tokens", 4,
    "--batch-size", 2,
    "--val-windows", 2,
    *PLAIN_CPU,
]


@needs_tiny
def test_killed_again_and_again_and_gone_on_to_the_same_bytes(text, other, tmp_path):
    args = [
        *SMALL,
        "--nsamples", 4,
        "--calib", text,
        "--data", text,
        "--train-data", other,
        "--heal", 5,
        "--rewrite", 1,
        "--steps", 6,
    ]
    run("train.py", *args, "--out", tmp_path / "a")
    moments = ["shares.json", "compressed/model-00003-of-*", "rewritten/0.safetensors", "heal.state",
               "prompt.state"]
    for moment in moments:
        kill_when("train.py", *args, "--out", tmp_path / "b", "--resume",
                  there=lambda: list((tmp_path / "b").glob(moment)))
    assert not (tmp_path / "b/prompt.safetensors").exists()
    run("train.py", *args, "--out", tmp_path / "b", "--resume")
    assert same_files(tmp_path / "a", tmp_path / "b") == []

    said = refused(*args, "--out", tmp_path / "a")                # a folder belongs to one run
    assert "--resume" in said
    assert "--overwrite" in said
    assert "seed was 0, now 1" in refused(*args, "--out", tmp_path / "a", "--resume", "--seed", 1)
    packed = [
        "--model", tmp_path / "a/compressed",
        *SMALL,
        "--data", text,
        "--train-data", other,
        "--steps", 2,
    ]
    assert "lies inside --out" in refused(*packed, "--out", tmp_path / "a", "--overwrite")
    assert same_files(tmp_path / "a", tmp_path / "b") == []
    said = refused(*packed, "--bits", 3, "--out", tmp_path / "c")
    assert "compressed already" in said                           # a packed model: a prompt only
    assert "--bits" in said
    for dense, why in (("tiny-opt", "has family opt"), (tmp_path / "a/compressed", "itself")):
        assert why in refused(*packed, "--dense", dense, "--out", tmp_path / "c")
    rows = here(*packed, "--dense", "tiny-llama", "--out", tmp_path / "c")
    assert list(rows) == [
        "dense",
        "compressed",
        "compressed + initial prompt",
        "compressed + learned prompt",
    ]


@needs_tiny
def test_what_a_run_took_and_what_may_change_between_attempts(text, tmp_path, monkeypatch):
    """A run that is stopped in its walk goes on with --checkpointing, as an earlier version's
    report would have it too; its seconds are those of all attempts."""
    args = ["--calib", text, "--data", text, "--train-data", text, "--nsamples", 4, "--seqlen", 64,
            "--max-tokens", 512, "--heal", 0, "--steps", 2, "--val-windows", 2, "--no-control",
            *PLAIN_CPU, "--out", tmp_path / "a"]
    real = compress_module.compress_block

    def stopped(i, *rest):
        if i == 2:
            raise KeyboardInterrupt
        time.sleep(0.3)
        return real(i, *rest)
    monkeypatch.setattr(compress_module, "compress_block", stopped)
    with pytest.raises(KeyboardInterrupt):
        here(*args)
    before = read_json(tmp_path / "a/seconds.json")["compressed"]["making"]
    assert before > 0.6
    monkeypatch.setattr(compress_module, "compress_block", real)
    report = read_json(tmp_path / "a/report.json")
    report["settings"].update(checkpointing=False, device="cpu:0")
    write_json(tmp_path / "a/report.json", report)
    here(*args, "--resume", "--checkpointing")
    assert read_json(tmp_path / "a/seconds.json")["compressed"]["making"] > before


@needs_tiny
def test_a_text_that_has_changed_is_not_gone_on_with(text, other, tmp_path):
    """Its name and its size are what they were."""
    mine = tmp_path / "mine.txt"
    said = text.read_text()
    args = ["--calib", text, "--nsamples", 4, "--seqlen", 64, "--max-tokens", 512, "--heal", 0,
            "--steps", 0, *PLAIN_CPU, "--data", mine, "--out", tmp_path / "a"]
    mine.write_text(said)
    here(*args)
    here(*args, "--resume")
    mine.write_text(said.replace("e", "q"))
    assert f"tokens of {mine} was" in refused(*args, "--resume")


@needs_tiny
def test_healing_that_was_stopped_has_taken_its_seconds(text, tmp_path, monkeypatch):
    args = ["--calib", text, "--data", text, "--nsamples", 4, "--seqlen", 64, "--max-tokens", 512,
            "--batch-size", 2, "--heal", 4, "--steps", 0, *PLAIN_CPU, "--out", tmp_path / "a"]
    real = train.save_healed

    def slow(*words, **how):
        time.sleep(1.0)                                 # of healing, not of what stands around it
        return real_loss(*words, **how)

    def stopped(*_):
        raise KeyboardInterrupt
    real_loss = heal_module.text_loss
    monkeypatch.setattr(heal_module, "text_loss", slow)
    monkeypatch.setattr(train, "save_healed", stopped)
    with pytest.raises(KeyboardInterrupt):
        here(*args)
    monkeypatch.setattr(train, "save_healed", real)
    monkeypatch.setattr(heal_module, "text_loss", real_loss)
    here(*args, "--resume")
    assert read_json(tmp_path / "a/seconds.json")["compressed + healed"]["making"] > 4.0


@needs_tiny
def test_a_compressed_shipped_model_is_one_of_ours(text, other, tmp_path, capsys):
    """Its prompt is learned and measured on what its run had; without flags, nothing is fetched."""
    here("--calib", text, "--data", other, "--train-data", text, "--nsamples", 4, "--seqlen", 64,
         "--max-tokens", 512, "--steps", 2, "--prompt-tokens", 4, "--no-control", "--recipe",
         "plain", *PLAIN_CPU, "--out", tmp_path / "a")
    made = tmp_path / "a/compressed"
    args = train.flags().parse_args(["--model", str(made), "--plan", *PLAIN_CPU])
    train.settle(args)
    assert (args.data, args.train_data, args.max_tokens) == (str(other), str(text), 512)
    assert (args.prompt_tokens, args.control) == (50, False)
    assert f"its model is in {made}" in refused("--model", tmp_path / "a", "--plan")
    rows = here("--model", made, "--dense", "tiny-llama", "--objective", "kl", "--val-windows", 0,
                "--steps", 2, "--prompt-tokens", 4, "--no-control", *PLAIN_CPU, "--out",
                tmp_path / "b")
    assert "compressed + learned prompt" in rows
    capsys.readouterr()
    monkey = tmp_path / "sub/../" / other.name          # the same file by another name
    shutil.copy(other, tmp_path / other.name)
    (tmp_path / "sub").mkdir()
    args = train.flags().parse_args(["--model", "tiny-llama", "--calib", str(monkey), "--data",
                                     str(tmp_path / other.name), "--plan", *PLAIN_CPU])
    train.settle(args)
    assert "is compressed on and measured" in capsys.readouterr().err


@needs_tiny
def test_groups_that_fit_no_block_are_refused_before_anything_is_cleared(text, tmp_path):
    args = ["--calib", text, "--data", text, "--nsamples", 4, "--seqlen", 64, "--max-tokens", 512,
            "--steps", 0, "--recipe", "plain", *PLAIN_CPU, "--out", tmp_path / "a"]
    here(*args)
    before = sorted(file.name for file in (tmp_path / "a/compressed").iterdir())
    message = refused(*args, "--groupsize", 48, "--overwrite")
    assert "groupsize 48 and blocksize 128: one must be a multiple of the other" in message
    assert sorted(file.name for file in (tmp_path / "a/compressed").iterdir()) == before


def test_another_model_of_the_same_shape_is_not_the_dense_one(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        torch.manual_seed(seed)
        save_model(Transformer(Config("llama", 64, 32, 2, 4, 64)), tmp_path / name)
    save_model(load_model(tmp_path / "a"), tmp_path / "c", torch.bfloat16)      # rounded otherwise
    a, b, c = (open_checkpoint(tmp_path / name) for name in "abc")
    train.check_dense(a, c)
    with pytest.raises(ValueError, match="other embeddings"):
        train.check_dense(b, a)


def test_a_stopped_run_says_how_it_was_started(monkeypatch):
    args = train.flags().parse_args(["--out", "a b"])
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", "a b", "--overwrite"])
    assert train.how_to_continue(args).endswith("python train.py --out 'a b' --resume")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "torchrun --nproc-per-node 2 train.py --out" in train.how_to_continue(args)


@needs_tiny
def test_windows_leave_room_for_the_prompt_where_no_flag_says_how_long(text, tmp_path):
    for positions, steps, want in ((4096, 200, 2048), (2048, 200, 1024), (2048, 0, 2048),
                                   (600, 200, 256)):
        args = SimpleNamespace(model="m", seqlen=None, prompt_tokens=100, steps=steps)
        checkpoint = SimpleNamespace(config=SimpleNamespace(max_positions=positions))
        train.settle_seqlen(args, checkpoint)
        assert args.seqlen == want
    folder = tmp_path / "mine"                          # no name that has defaults of its own
    shutil.copytree(SHIPPED["tiny-llama"], folder)
    args = train.flags().parse_args([
        "--model", str(folder), "--calib", str(text), "--data", str(text), "--nsamples", "4",
        "--val-windows", "2", "--plan", *PLAIN_CPU])
    train.main(args)
    assert args.seqlen == 256                           # of 512 positions


@needs_tiny
@pytest.mark.parametrize("heal, rewrite, walked, taught", [
    (0, 0, 1, 0),
    (2, 0, 1, 1),                                       # steps of 2 windows; 4 windows
    (4, 0, 1, 1),                                       # read twice: as it is
    (5, 0, 1, 3),
    (100, 0, 1, 8),
    (0, 9, 10, 0),
    (4, 9, 10, 1),
    (100, 9, 10, 10),
])
def test_a_plan_counts_rewritten_windows(heal, rewrite, walked, taught, text, tmp_path, monkeypatch,
                                         capsys):
    seen = {}

    def told(checkpoint, tokens, *others):
        seen.update(tokens=tokens, taught=others[6])
        return compress_module.plan(checkpoint, tokens, *others)
    monkeypatch.setattr(train, "plan", told)
    train.main(train.flags().parse_args([
        "--calib", str(text), "--data", str(text), "--nsamples", "4", "--seqlen", "64",
        "--batch-size", "2", "--heal", str(heal), "--rewrite", str(rewrite), "--steps", "0",
        "--plan", "--device", "cpu", "--dtype", "float32", "--out", str(tmp_path / "a")]))
    windows, held = 4 * 64, 8 * 64
    assert seen == {"tokens": walked * windows, "taught": taught and taught * windows + held}
    assert not (tmp_path / "a").exists()


def test_what_overwrite_left_half_cleared_is_no_run(tmp_path, monkeypatch):
    begin = lambda **how: Report(tmp_path, {"settings": {"seed": 0}}, **{
        "resume": False, "overwrite": False, **how})
    report = begin()
    report.add("dense", 0.0, 1.0, perplexity=2.0, megabytes=1.0, bits_per_weight=16.0,
               linear_bits_per_weight=16.0, nominal=1.0)
    (tmp_path / "compressed").mkdir()
    report.lock.close()

    def stopped(path):
        raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr("shutil.rmtree", stopped)
        with pytest.raises(KeyboardInterrupt):
            begin(overwrite=True)
    with pytest.raises(ValueError, match="was being cleared by --overwrite"):
        begin(resume=True)
    begin(overwrite=True).lock.close()
    assert not (tmp_path / "compressed").exists()
    (tmp_path / "report.json").unlink()                 # killed between the two files of a save
    begin(resume=True).lock.close()


RUN = {"settings": {"seed": 0, "rewrite": 0, "device": "cpu"}, "texts": {}}


@pytest.fixture
def done(tmp_path):
    """A folder with a run of one row."""
    report = Report(tmp_path / "done", RUN)
    report.add("dense", 0.0, 1.0, perplexity=2.0, scored_tokens=9, prompt_tokens=0, megabytes=1.0,
               bits_per_weight=16.0, linear_bits_per_weight=16.0, nominal=1.0)
    report.lock.close()
    return tmp_path / "done"


def test_results_of_a_run_are_kept_unless_a_flag_says_more(done):
    with pytest.raises(ValueError, match="holds the results of a run .report.json, seconds.json"):
        Report(done, RUN)
    (done / "compressed").mkdir()
    (done / "report.json").unlink()
    with pytest.raises(ValueError, match="holds seconds.json, compressed but no report.json"):
        Report(done, RUN, resume=True)
    (done / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file: name a folder"):
        Report(done / "file", RUN)


@pytest.mark.parametrize("file, change, message", [
    ("report.json", {"settings": None}, "of another run: settings was None"),
    ("report.json", {"settings": {**RUN["settings"], "bits": 4}}, "settings bits was 4, now None"),
    ("report.json", {"rows": [{"name": "dense"}]}, "report.json is damaged"),
    ("report.json", {"losses": []}, "report.json is damaged"),
    ("seconds.json", {"dense": {"making": 0.0}}, "seconds.json is damaged"),
    ("seconds.json", {"dense": {"making": 0.0, "measuring": 0.0, "x": "y"}}, "is damaged")])
def test_what_this_run_has_not_written_is_not_gone_on_with(file, change, message, done):
    held = {**read_json(done / file), **change}
    write_json(done / file, {name: value for name, value in held.items() if value is not None})
    with pytest.raises(ValueError, match=message):
        Report(done, RUN, resume=True)


def test_a_row_without_a_name_is_damage(done):
    report = read_json(done / "report.json")
    report["rows"][0]["name"] = None
    write_json(done / "report.json", report)
    with pytest.raises(ValueError, match="report.json is damaged"):
        Report(done, RUN, resume=True)


def test_seconds_are_written_before_the_row_they_belong_to(done, monkeypatch):
    """A run that is killed between the two measures that row again."""
    report = Report(done, RUN, resume=True)
    written = []
    monkeypatch.setattr("data.report.write_json", lambda path, held: written.append(path.name))
    report.add("compressed", 1.0, 1.0)
    assert written == ["seconds.json", "report.json"]


def test_overwrite_leaves_nothing_of_the_run_before(done):
    for name in ("compressed", "healed", "teacher", "rewritten"):
        (done / name).mkdir()
        (done / name / "file").write_text("x")
    for name in ("prompt.safetensors", "prompt-dense.state", "heal.state", "shares.json", "mine"):
        (done / name).write_text("x")
    Report(done, RUN, overwrite=True)
    assert {path.name for path in done.iterdir()} == {".lock", "mine", "report.json",
                                                      "seconds.json"}
    assert read_json(done / "report.json")["rows"] == []


def test_what_earlier_versions_left_out_is_no_other_run(done):
    report = read_json(done / "report.json")
    del report["settings"]["rewrite"], report["texts"]
    write_json(done / "report.json", report)
    (done / "seconds.json").unlink()
    report = Report(done, RUN, resume=True)
    assert report.has("dense")
    assert report.seconds == {}
    assert report.table().splitlines()[1].split()[-2:] == ["0.0", "0.0"]


def test_a_model_whose_tokenizer_was_written_anew_is_another(tmp_path):
    (tmp_path / "tokenizer.model").write_text("same size")
    before = identity(tmp_path)
    os.utime(tmp_path / "tokenizer.model", ns=(0, 0))
    assert identity(tmp_path) != before


def test_half_written_files_of_others_stay(tmp_path):
    """A run removes what a killed write of its own left, and nothing else in the folder."""
    theirs = ["movie.mkv.part", "sub/other.part"]
    ours = ["report.json.part", "compressed/model.safetensors.part", "teacher/x.npy.part"]
    for name in theirs + ours:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    Report(tmp_path, {}, overwrite=True)
    assert all((tmp_path / name).exists() for name in theirs)
    assert not any((tmp_path / name).exists() for name in ours)


def test_a_folder_on_a_disk_without_locks_can_be_used(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "no locks available")
    monkeypatch.setattr(fcntl, "flock", no_locks)
    Report(tmp_path, {}, False, False)


def kill_when(*args, there) -> None:
    """SIGKILL as soon as there() finds something."""
    process = subprocess.Popen([sys.executable, *map(str, args)], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not there():
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.02)
    process.kill()
    process.wait()


def same_files(one: Path, other: Path) -> list[str]:
    """Names of the files, seconds aside, that are not the same byte for byte."""
    names = set()
    for folder in (one, other):
        names |= {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}
    different = []
    for name in sorted(names):
        if name.name == "seconds.json":
            continue
        both = (one / name).exists() and (other / name).exists()
        if not both or (one / name).read_bytes() != (other / name).read_bytes():
            different.append(str(name))
    return different


@needs_tiny
def test_two_processes_make_a_table_and_resume_it(text, tmp_path):
    """torchrun: all processes skip what the first one finds done, else they would wait for each
    other for ever."""
    args = [
        "-m", "torch.distributed.run",
        "--standalone",
        "--nproc-per-node", 2,
        "train.py",
        "--nsamples", 4,
        "--seqlen", 64,
        "--calib", text,
        "--data", text,
        "--max-tokens", 512,
        "--train-data", text,
        "--heal", 5,
        "--rewrite", 1,
        "--steps", 2,
        "--prompt-tokens", 4,
        "--batch-size", 2,
        "--val-windows", 2,
        "--no-control",
        "--device", "cpu",
        "--out", tmp_path / "o",
    ]

    def table_of(done) -> list[str]:
        return [line for line in done.stdout.split("\n") if line.startswith(tuple(names))]

    first = run(*args)
    report = json.loads((tmp_path / "o/report.json").read_text())
    names = [r["name"] for r in report["rows"]]
    assert names == [
        "dense",
        "compressed",
        "compressed + healed",
        "compressed + initial prompt",
        "compressed + learned prompt",
    ]
    assert len(table_of(first)) == 5                              # and only one process prints
    again = run(*args, "--resume")
    assert table_of(again) == table_of(first)


@needs_tiny
def test_weights_that_cannot_be_stored_are_found_before_any_work(text, tmp_path, capsys):
    model = load_model("tiny-opt")
    model.blocks[1].mlp.up.weight.data[3, 5] = 1e6
    save_model(model, tmp_path / "m", torch.float32)
    copy_tokenizer(SHIPPED["tiny-opt"], tmp_path / "m")
    said = refused(
        "--model", tmp_path / "m",
        "--nsamples", 2,
        "--seqlen", 64,
        "--calib", text,
        "--data", text,
        "--steps", 0,
        "--device", "cpu",
        "--out", tmp_path / "o",
    )
    assert "blocks.1.mlp.up.weight holds 1e+06, beyond float16" in said
    assert "measuring" not in capsys.readouterr().err


def test_a_second_run_in_one_folder_is_refused(tmp_path):
    first = Report(tmp_path / "o", {"settings": {}})
    folder = str(tmp_path / "o")
    code = f"from data.report import Report; Report({folder!r}, {{}}, resume=True)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "in use by another run" in done.stderr
    first.lock.close()


@needs_tiny
def test_near_the_defaults_compression_hurts_and_the_prompt_helps(tmp_path):
    """With fewer steps and less text, to be quick."""
    rows = here(
        "--nsamples", 12,
        "--max-tokens", 4096,
        "--steps", 12,
        "--batch-size", 4,
        "--val-windows", 4,
        *PLAIN_CPU,
        "--out", tmp_path,
    )
    made = {name: row["perplexity"] for name, row in rows.items()}
    assert made["compressed"] > 1.04 * made["dense"]
    without = min(made["compressed"], made["compressed + initial prompt"])
    assert made["compressed + learned prompt"] < 0.95 * without
    assert made["dense + learned prompt"] < made["compressed + learned prompt"]


NO_COMPRESSION = ["--sparsity", "0", "--bits", "16"]
OTHER_SETTINGS = [
    ["--sparsity", "0", "--bits", "3"],
    ["--sparsity", "2:4", "--bits", "16"],
    ["--sparsity", "0.625", "--true-sequential", "--groupsize", "64"],
    ["--recipe", "plain", "--sparsity", "0", "--act-order", "--static-groups",
     "--groupsize", "64", "--sym"],
    ["--recipe", "plain"],
    ["--mask", "sparsegpt", "--refits", "0", "--grid", "uniform", "--no-act-order",
     "--correct", "0"],
    NO_COMPRESSION,
]


@needs_tiny
@pytest.mark.parametrize("options", OTHER_SETTINGS)
def test_other_settings_without_a_prompt(options, text, tmp_path):
    names = ["dense"]
    more = []
    if options != NO_COMPRESSION:
        names.append("compressed")
        more += ["--nsamples", 4, "--calib", text]
    if "16" not in options:
        names.append("compressed + healed")
        more += ["--heal", 2]
    rows = here(
        "--model", "tiny-llama",
        *options,
        *more,
        "--seqlen", 64,
        "--data", text,
        "--max-tokens", 512,
        "--steps", 0,
        *PLAIN_CPU,
        "--out", tmp_path,
    )
    assert list(rows) == names
    assert not (tmp_path / "prompt.safetensors").exists()


BAD_SETTINGS = [
    (["--model", "nowhere"], "no checkpoint folder nowhere"),
    (["--model", "llama-7b"], "hf download huggyllama/llama-7b"),
    (["--sparsity", "2"], "between 0 and 1"),
    (["--sparsity", "1"], "--sparsity 1 leaves no weights"),
    (["--sparsity", "5:4"], "n:m"),
    (["--data", "nothing"], "unknown text set"),
    (["--data", "nothing.txt"], "nothing.txt"),
    (["--seqlen", "100000"], "--seqlen"),
    (["--seqlen", "500", "--prompt-tokens", "100"], "600 positions"),
    (["--recipe", "plain", "--static-groups", "--groupsize", "64"], "--act-order"),
    (["--no-true-sequential"], "--correct 0"),
    (["--prompt-tokens", "0"], "--prompt-tokens"),
    (["--batch-size", "0"], "--batch-size"),
    (["--correct", "nan"], "--correct"),
    (["--lr", "-1"], "--lr"),
    (["--sym"], "--sym does nothing"),
    (["--sparsity", "2:4", "--allocation", "fisher"], "--allocation does nothing with --sparsity"),
    (["--device", "nowhere"], "--device nowhere"),
    (["--resume", "--overwrite"], "exclude"),
    (["--no-true-sequential", "--correct", "1"], "--correct 0"),
    (["--kind", "prefix", "--prompt-tokens", "1"], "has nothing to learn"),
    (["--bits", "16", "--sparsity", "0", "--heal", "8"],
     "--heal does nothing with --bits 16 --sparsity 0"),
]


@needs_tiny
def test_activations_that_do_not_fit_are_recomputed(text, tmp_path, capsys, monkeypatch):
    args = ["--nsamples", 4, "--seqlen", 64, "--calib", text, "--data", text, "--max-tokens", 512,
            "--train-data", text, "--heal", 2, "--steps", 2, "--val-windows", 2, "--no-control",
            *PLAIN_CPU]
    here(*args, "--out", tmp_path / "a")
    assert "recomputed, as by" not in capsys.readouterr().err
    monkeypatch.setattr(sys.modules["train"], "free_memory", lambda device: 1e6)
    here(*args, "--out", tmp_path / "b")
    assert capsys.readouterr().err.count("are free: activations are recomputed") == 2
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in "ab")
    assert one["settings"] == two["settings"]
    for a, b in zip(one["rows"], two["rows"]):
        assert b["perplexity"] == pytest.approx(a["perplexity"], rel=1e-5)


@needs_tiny
@pytest.mark.parametrize("options,message", BAD_SETTINGS)
def test_bad_settings_are_one_line_and_leave_nothing(options, message, text, tmp_path, capsys):
    """What `run_program` prints behind "error: "; without a process of its own, which would take
    most of the time."""
    args = [
        "--model", "tiny-llama",
        "--calib", text,
        "--data", text,
        "--device", "cpu",
        *options,
        "--out", tmp_path / "o",
    ]
    words = list(map(str, args))
    with pytest.raises((ValueError, OSError, SystemExit)) as raised:
        train.main(train.flags().parse_args(words))
    said = capsys.readouterr().err if raised.type is SystemExit else str(raised.value)
    assert message in said
    assert len(said.strip().split("\n")) == 1
    assert not (tmp_path / "o").exists()


@needs_tiny
def test_an_error_of_the_program_is_one_line_and_exit_code_2(text, tmp_path):
    done = run(
        "train.py",
        "--calib", text,
        "--data", "nothing.txt",
        "--device", "cpu",
        "--out", tmp_path / "o",
        ok=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().split("\n")) == 1
