"""tests/fuzz.py in small: a few hundred damaged folders, and headers judged beside the safetensors package.

    python -m pytest -q tests/test_fuzz.py
"""
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
    assert counts["refused"] > 200                                           # and the damage is no pretence


def test_the_fuzzer_notices(tmp_path):
    """Each kind of finding, shown by a loader that misbehaves."""
    bed = Bed(tmp_path, ["vocab-merges"])
    kind, folder = bed.kinds[0], tmp_path / "whole/vocab-merges"

    def outcome(load):
        return next(apart([lambda watch: load_here(kind._replace(load=load), folder, watch)])).get("finding", "")

    def refuse(message):
        def load(folder):
            raise ValueError(message.format(folder))
        return load
    assert outcome(refuse("{}/vocab.json is bad")) == ""
    assert outcome(refuse("bad")) == "no file named" and outcome(refuse("{}:\nbad")) == "more than one line"
    assert outcome(lambda folder: {}["x"]).startswith("KeyError at test_fuzz.py")
    assert outcome(lambda folder: {"x": (tmp_path / "outside/config.json").read_text()}).startswith("opened ")
    assert outcome(lambda folder: {"x": __import__("os").system("true")}).startswith("os.system")
    assert outcome(lambda folder: __import__("os")._exit(3)).startswith("the process died")


def test_headers_that_the_package_refuses_are_refused(tmp_path):
    hf("llama")(tmp_path)
    whole, path, r, refused = tmp_path / "model.safetensors", tmp_path / "x.safetensors", random.Random(0), [0, 0]
    for _ in range(400):
        shutil.copy(whole, path)
        header_damage(path, r)
        try:
            with safe_open(path, "pt") as f:
                theirs = set(f.keys())
        except (SafetensorError, UnicodeError):
            theirs = None
        refused[0] += theirs is None
        try:
            assert set(read_safetensors(path)) == theirs
        except ValueError:
            refused[1] += 1
            continue
        assert theirs is not None
    assert refused[1] >= refused[0] > 100
