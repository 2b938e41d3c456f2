"""README.md's snippets of "Take a module home" run as they stand, one after the other, on small
layers and models; its commands exist, and its tables have one.

    python -m pytest -q tests/test_readme.py
"""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn

from data.config import SHIPPED
from test_prompt import TOKENS, Foreign, tiny

ROOT = Path(__file__).resolve().parents[1]
needs_tiny = pytest.mark.skipif(not (SHIPPED["tiny-opt"] / "vocab.json").exists(),
                                reason="data/tiny holds no trained checkpoints")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def section(title: str) -> str:
    """A section of README.md."""
    return read("README.md").split(f"## {title}")[1].split("\n## ")[0]


def snippets() -> list[str]:
    """The indented blocks of the section."""
    blocks = re.findall(r"(?:^    .*\n)+", section("Take a module home"), re.M)
    return [re.sub(r"^    ", "", block, flags=re.M) for block in blocks]


@needs_tiny
def test_snippets_run_as_pasted():
    found = snippets()
    assert len(found) == 4
    layer = nn.Linear(64, 32)
    dense = layer.weight.data.clone()
    inputs = torch.randn(256, 64)
    solver = {"layer": layer, "inputs": inputs}
    exec(found[0], solver)
    assert int((layer.weight == 0).sum()) == 32 * 32
    assert not torch.equal(layer.weight, dense)
    exec(found[1], solver)
    y = solver["layer"](inputs)
    want = nn.functional.linear(inputs, layer.weight, layer.bias)
    assert torch.allclose(y, want, atol=1e-2)

    learn = found[2].replace("steps=200", "steps=2").replace("model, 100,", "model, 7,")
    for model in (tiny(), Foreign(tiny())):
        windows = TOKENS[:64].view(4, 16)
        prompts = {
            "model": model,
            "some_tokens": TOKENS.repeat(2),
            "train_windows": windows,
            "val_windows": windows[:1],
            "tokens": windows,
        }
        exec(learn, prompts)
        assert len(prompts["prompt"]) == 7
        bare = model(model.embed(windows))
        behind = prompts["logits"][:, -windows.shape[1]:]
        assert behind.shape == bare.shape and not torch.allclose(behind, bare, atol=1e-2)

    loaded = {}
    load = found[3].replace("checkpoints/opt-125m", str(SHIPPED["tiny-opt"]))
    exec(load, loaded)
    assert loaded["logits"].shape[-1] == loaded["model"].config.vocab_size


def test_modules_are_at_home_with_the_files_that_are_named(tmp_path):
    """What a sentence of the section names, copied without the rest, can be imported."""
    texts = re.sub(r"^    .*$", "", section("Take a module home"), flags=re.M)
    sentences = [text for text in re.split(r"\n\s*\n", texts) if ".py`" in text or "kernels/" in text]
    assert len(sentences) == 4
    for k, sentence in enumerate(sentences):
        home = tmp_path / str(k)
        files = re.findall(r"`([\w/]+\.py)`", sentence)
        for name in files:
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, home / name)
        if "kernels/" in sentence:
            shutil.copytree(ROOT / "kernels", home / "kernels")
            files.append("kernels/linear.py")
        modules = [name[:-3].replace("/", ".") for name in files]
        done = subprocess.run([sys.executable, "-c", f"import {', '.join(modules)}"], cwd=home,
                              capture_output=True, text=True)
        assert not done.returncode, f"{sentence}: {done.stderr[-300:]}"


def commands() -> list[tuple[str, str]]:
    """(file, command) of every program of the project that README.md or RESULTS.md calls, whole
    lines and words in backticks."""
    found = []
    for file in ("README.md", "RESULTS.md"):
        text = read(file).replace("\\\n", " ").replace("```", "")
        called = []
        for paragraph in text.split("\n\n"):
            for words in re.findall(r"`([^`]+)`", paragraph):
                called.append(" ".join(words.split()))
        for line in text.splitlines():
            if line.startswith("    "):
                called.append(line.split(" # ")[0].strip())
        for command in called:
            ours = re.search(r"(?:^|\s)(?:-m bench\.\w+|[\w/]+\.py)(?:\s|$)", command)
            if ours and "python" in command.split(".py")[0]:
                found.append((file, command))
    return found


def source_of(command: str) -> Path:
    """The program that a command runs."""
    module = re.search(r"-m ([\w.]+)", command)
    if module:
        return ROOT / (module[1].replace(".", "/") + ".py")
    return ROOT / re.search(r"[\w/]+\.py", command)[0]


def test_every_command_of_the_texts_exists_with_its_flags():
    called = [c for c in commands() if "pytest" not in c[1] and "-m venv" not in c[1]]
    programs = {source_of(command).name for _, command in called}
    assert programs >= {"train.py", "eval.py", "export.py", "study.py", "published.py",
                        "solvers.py"}
    shared = read("data/flags.py")
    for file, command in called:
        program = source_of(command)
        assert program.is_file(), f"{file}: {command}: no {program.name}"
        known = program.read_text(encoding="utf-8") + shared
        for flag in re.findall(r"\s(--[a-z-]+)", command):
            if flag == "--nproc-per-node":
                continue
            positive = flag.replace("--no-", "--")          # BooleanOptionalAction has both
            has = f'"{flag}"' in known or f'"{positive}"' in known
            assert has, f"{file}: {command}: {program.name} has no {flag}"


def test_every_table_of_the_results_has_its_command_beside_it():
    """In its section, and where a table stands between marks, there; a part that says "Not run."
    has no table."""
    text = read("RESULTS.md")
    sections = re.split(r"^## ", text, flags=re.M)[1:]
    parts = re.findall(r"<!-- part: (.*?)<!-- end -->", text, re.S)
    tables = [place for place in sections + parts if "\n|" in place]
    assert len(tables) > 10
    for place in tables:
        title = place.splitlines()[0]
        called = re.search(r"python \w+\.py|python -m bench\.", place)
        assert called, f"RESULTS.md: no command in {title}"
        assert re.search(r"seed", place, re.I), f"RESULTS.md: no seed in {title}"


def test_every_part_that_is_run_has_its_place_in_the_results():
    from bench.results import PARTS
    assert re.findall(r"<!-- part: (.*?) -->", read("RESULTS.md")) == list(PARTS)


def test_the_functions_that_the_lesson_names_are_where_it_says():
    modules = ("gptq.py", "sparsegpt.py", "compress.py", "prompt.py", "model.py", "heal.py")
    code = "".join(map(read, modules))
    named = re.findall(r"`([a-z_]+)`", section("How it works"))
    assert len(named) >= 6
    for name in named:
        assert re.search(rf"^(?:def|class) {name}\b", code, re.M), name
