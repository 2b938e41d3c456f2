"""Disks that are full, files that may not grow and memory that ends: one line with the file's name, and no half of a file.

    python -m pytest -q tests/test_faults.py
"""
import errno
import os
import resource

import pytest
import torch

from data.checkpoint import write_json, write_safetensors, write_torch
from data.flags import BAD_INPUT, run_program
from export import write_pth

BIG = torch.zeros(200_000)


def torch_file(path):
    write_torch(path, lambda f: torch.save({"held": BIG, "x": "y" * 10 ** 6}, f))


WRITERS = {"safetensors": lambda path: write_safetensors(path, {"x": BIG}), "torch": torch_file,
           "meta": lambda path: write_pth(path, [("x", BIG.shape, BIG.dtype, lambda: BIG)]),
           "json": lambda path: write_json(path, {"x": "y" * 10 ** 6})}


def apart(work) -> str:
    """What work() raises in a process of its own, as "kind: message"; "" for nothing."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
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
    assert said.startswith("OSError: ") and f"{path} cannot be written" in said and "\n" not in said, said
    assert path.read_bytes() == b"what was here" and os.listdir(tmp_path) == ["file"]


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
    with pytest.raises(OSError, match="cannot be written .*No space left on device.*: free space") as e:
        WRITERS[kind](tmp_path / "file")
    assert e.value.errno == errno.ENOSPC and os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: "
                                                               "can't allocate memory: you tried to allocate 8 bytes\nmore")])
def test_the_end_of_memory_is_one_line(error, capsys):
    def work(args):
        raise error
    with pytest.raises(SystemExit) as e:
        run_program(work, None)
    said = capsys.readouterr().err
    assert e.value.code == BAD_INPUT and said.count("\n") == 1 and "memory" in said and ": lower --batch-size" in said
