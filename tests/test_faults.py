"""Disks that are full, files that may not grow and memory that ends: one line with the file's name,
and no half of a file.

    python -m pytest -q tests/test_faults.py
"""
import errno
import math
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fuzz import dense, hf

from data.checkpoint import write_json, write_safetensors, write_torch
from data.flags import BAD_INPUT, run_program
from data.tokenizer import load_tokenizer
from export import write_pth
from model import load_model, open_checkpoint
from prompt import teacher_states

ROOT = Path(__file__).resolve().parents[1]

BIG = torch.zeros(200_000)


def torch_file(path):
    write_torch(path, lambda f: torch.save({"held": BIG, "x": "y" * 10 ** 6}, f))


WRITERS = {
    "safetensors": lambda path: write_safetensors(path, {"x": BIG}),
    "torch": torch_file,
    "meta": lambda path: write_pth(path, [("x", BIG.shape, BIG.dtype, lambda: BIG)]),
    "json": lambda path: write_json(path, {"x": "y" * 10 ** 6}),
}


def apart(work) -> str:
    """What work() raises in a process of its own, as "kind: message"; "" for nothing."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)                # a fork waits for threads it does not have
            work()
        except BaseException as e:
            os.write(write, f"{type(e).__name__}: {e}".encode()[:4000])
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as f:
        said = f.read()
    os.waitpid(child, 0)
    return said


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_that_may_not_grow(kind, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"what was here")

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        WRITERS[kind](path)
    said = apart(work)
    assert said.startswith("OSError: "), said
    assert f"{path} cannot be written" in said, said
    assert "\n" not in said, said
    assert path.read_bytes() == b"what was here"
    assert os.listdir(tmp_path) == ["file"]


def test_states_of_the_dense_model_that_may_not_grow(tmp_path):
    model = dense("llama")
    windows = torch.arange(64 * 64).view(64, 64) % 264

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        teacher_states(model, windows, tmp_path)
    said = apart(work)
    assert said.startswith("OSError: "), said
    assert f"{tmp_path}/teacher-" in said, said
    assert "cannot be written" in said, said
    assert os.listdir(tmp_path) == []
    states = teacher_states(model, windows, tmp_path)           # and once there is room
    with torch.no_grad():
        want = model.final(model.hidden(windows)).half()
    assert states.shape == (64, 64, 32)
    assert torch.equal(states, teacher_states(model, windows, tmp_path))
    assert torch.allclose(states.float(), want.float(), atol=1e-3)


@pytest.mark.parametrize("kind", ["safetensors", "torch", "json"])
def test_places_that_cannot_be_written(kind, tmp_path):
    """As a user who may not write there, and where there is no folder: one line with the file's
    name."""
    def work():
        os.setresuid(65534, 65534, 65534)
        WRITERS[kind](tmp_path / "file")
    if os.getuid() == 0:
        os.chmod(tmp_path, 0o555)
        said = apart(work)
        assert said.startswith(("PermissionError: ", "OSError: ")), said
        assert str(tmp_path / "file") in said, said
        assert "\n" not in said, said
        os.chmod(tmp_path, 0o755)
    (tmp_path / "a file").write_text("")
    for place in (tmp_path / "a file" / "x", tmp_path / "gone" / "x"):
        with pytest.raises(OSError, match="x cannot be written"):
            WRITERS[kind](place)
    assert os.listdir(tmp_path) == ["a file"]


def test_memory_that_ends_while_a_program_works(tmp_path):
    """RLIMIT_AS: one line, exit code 2, and nothing half-written."""
    hf("llama")(tmp_path)
    (tmp_path / "a.txt").write_text("hello shell " * 20_000)
    script = """
import resource, sys, torch, eval, export
import data.flags as flags
used = int(open('/proc/self/statm').read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + 30_000_000, -1))
args = eval.flags().parse_args(sys.argv[1:])
flags.run_program(eval.main, args)
"""
    words = [
        str(tmp_path),
        "--data", str(tmp_path / "a.txt"),
        "--seqlen", "64",
        "--batch-size", "4096",
    ]
    command = [sys.executable, "-c", script, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == BAD_INPUT, (done.stdout, done.stderr)
    assert "memory" in done.stderr, done.stderr
    assert "--batch-size" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr, done.stderr


def test_a_model_folder_that_vanishes(tmp_path):
    """In the middle of a walk: what was mapped stays, what is asked for anew is one line with its
    name."""
    (tmp_path / "m").mkdir()
    hf("llama")(tmp_path / "m")
    checkpoint = open_checkpoint(tmp_path / "m")
    shutil.rmtree(tmp_path / "m")
    assert checkpoint.block(1) is not None                      # its file is still open
    for load in (load_model, load_tokenizer):
        with pytest.raises((OSError, ValueError), match=str(tmp_path / "m")):
            load(tmp_path / "m")


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk(kind, tmp_path, monkeypatch):
    """The disk is full once the file is closed or flushed, whatever wrote to it."""
    real = open

    class Full:
        def __init__(self, path, mode):
            self.file = real(path, mode)

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()
    monkeypatch.setattr("data.checkpoint.open", Full, raising=False)
    message = "cannot be written .*No space left on device.*: free space"
    with pytest.raises(OSError, match=message) as e:
        WRITERS[kind](tmp_path / "file")
    assert e.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [
    MemoryError(),
    MemoryError("Unable to allocate 32.0 TiB for an array"),        # numpy's
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: "
                 "can't allocate memory: you tried to allocate 8 bytes\nmore"),
])
def test_the_end_of_memory_is_one_line(error, capsys):
    def work(args):
        raise error
    with pytest.raises(SystemExit) as e:
        run_program(work, None)
    said = capsys.readouterr().err
    assert e.value.code == BAD_INPUT
    assert said.count("\n") == 1, said
    assert ": lower --batch-size" in said, said


def test_layers_of_a_report_are_names_and_numbers():
    """What a resumed run goes on with: anything else in report.json is refused there."""
    from data.report import are_layers
    layer = {"name": "blocks.0.attn.q", "error": 0.1, "error_heldout": 0.2, "against": "weights"}
    assert are_layers([]) and are_layers([layer, dict(layer)])
    for odd in (None, "0.2", [0.2], math.nan, True):
        assert not are_layers([layer, {**layer, "error": odd}])
    assert not are_layers([layer, {**layer, "error_heldout": [0.2]}])
    assert not are_layers([layer, {"name": "blocks.0.attn.k", "error": 0.1}])
    assert not are_layers({"0": layer})
