"""tests/fuzz.py in small: a few hundred damaged folders, and headers judged beside the safetensors
package.

    python -m pytest -q tests/test_fuzz.py
"""
import os
import random
import shutil

import pytest
import torch
from fuzz import Bed, apart, hf, header_damage, load_here, run
from safetensors import SafetensorError, safe_open

from data.checkpoint import read_safetensors


@pytest.fixture(autouse=True)
def threads():
    """A bed for forks takes all but one away: the tests of other files want them back."""
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


def test_damaged_folders_are_refused_in_one_line(tmp_path):
    counts, bad = run(330, [20], tmp_path, show=lambda line: None)
    assert not bad, bad[0]
    assert counts["refused"] > 200                              # and the damage is no pretence


def test_the_fuzzer_notices(tmp_path):
    """Each kind of finding, shown by a loader that misbehaves."""
    bed = Bed(tmp_path, ["vocab-merges"])
    kind = bed.kinds[0]
    folder = tmp_path / "whole/vocab-merges"

    def outcome(load):
        def job(watch):
            return load_here(kind._replace(load=load), folder, watch)
        out = next(apart([job]))
        return out.get("finding", "")

    def refuse(message):
        def load(folder):
            raise ValueError(message.format(folder))
        return load

    def breaks(folder):
        return {}["x"]

    def looks_outside(folder):
        return {"x": (tmp_path / "outside/config.json").read_text()}

    def starts_a_program(folder):
        return {"x": os.system("true")}

    def dies(folder):
        os._exit(3)

    assert outcome(refuse("{}/vocab.json is bad")) == ""
    assert outcome(refuse("bad")) == "no file named"
    assert outcome(refuse("{}:\nbad")) == "more than one line"
    assert outcome(breaks).startswith("KeyError at test_fuzz.py")
    assert outcome(looks_outside).startswith("opened ")
    assert outcome(starts_a_program).startswith("os.system")
    assert outcome(dies).startswith("the process died")


def test_headers_that_the_package_refuses_are_refused(tmp_path):
    hf("llama")(tmp_path)
    whole = tmp_path / "model.safetensors"
    path = tmp_path / "x.safetensors"
    r = random.Random(0)
    by_them = by_us = 0
    for _ in range(400):
        shutil.copy(whole, path)
        header_damage(path, r)
        try:
            with safe_open(path, "pt") as f:
                theirs = set(f.keys())
        except (SafetensorError, UnicodeError):
            theirs = None
        by_them += theirs is None
        try:
            assert set(read_safetensors(path)) == theirs
        except ValueError:
            by_us += 1
            continue
        assert theirs is not None
    assert by_us >= by_them > 100
