"""data/harvest.py: same texts every time, nothing in two splits, every set and split usable, from
an empty cache.

    python -m pytest -q tests/test_harvest.py
"""
import ast
import json
import re
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

from data import harvest as h

ROOT = Path(__file__).resolve().parents[1]


def of_split(entries, split: str) -> list[str]:
    """The texts of a split among (path, text) pairs."""
    return [text for path, text in entries if h.split_of(path) == split]


@pytest.fixture(scope="module")
def sets():
    """All texts, collected once, and kept for the tests of other files."""
    start = time.process_time()
    found = h.collect()
    assert time.process_time() - start < 60, "harvest too slow for a default that people wait for"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(h, "collect", lambda: found)
        h.harvest("docs", "test")
    return found


def test_sizes_allow_calibration_and_evaluation(sets):
    size = {}
    for name in h.SETS:
        for split in h.SPLITS:
            size[name, split] = sum(map(len, of_split(sets[name], split)))
    for name, least in (("docs", 30_000),
                        ("docstrings", 100_000),
                        ("code", 300_000),
                        ("headers", 300_000)):
        assert all(size[name, split] > least for split in h.SPLITS), size
        assert size[name, "train"] > 3 * size[name, "test"], size


def test_no_file_and_no_text_in_two_splits(sets):
    where = {}
    for name in h.SETS:
        for path, text in sets[name]:
            split = h.split_of(path)
            assert where.setdefault(("path", path), split) == split
            assert where.setdefault(("text", text), split) == split
    for path, _ in sum(sets.values(), []):
        assert not re.search(r"licen[sc]e|/tests?/|site-packages", path, re.I), path


def test_no_long_paragraph_of_docs_or_headers_in_two_splits(sets):
    owner = {}
    for path, text in sets["docs"] + sets["headers"]:
        split = h.split_of(path)
        for paragraph in re.split(r"\n\s*\n", text):
            if len(paragraph) >= 80 and not path.endswith("/METADATA"):
                words = " ".join(paragraph.split())
                assert owner.setdefault(words, split) == split, paragraph


def texts_of_a_part(cache: Path) -> list[list[str]]:
    """Every set and split of a sixteenth of the files, by way of a cache folder."""
    files = []
    for path, file in h.source_files():
        if zlib.crc32(path.encode()) % 16 == 0 or "pydoc_data" in path:
            files.append((path, file))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(h, "source_files", lambda: files)
        patch.setattr(h, "CACHE", cache)
        return [h.harvest(name, split) for name in h.SETS for split in h.SPLITS]


def test_empty_cache_same_texts_in_two_processes_and_nothing_imported(tmp_path, monkeypatch):
    program = f"""
import json, pathlib, sys
sys.path.insert(0, "tests")
from test_harvest import texts_of_a_part
texts = texts_of_a_part(pathlib.Path({str(tmp_path / "a")!r}))
assert not {{"torch", "numpy", "triton", "pydoc_data.topics"}} & set(sys.modules)
print(json.dumps(texts))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    texts = json.loads(done.stdout)
    assert all(texts[::len(h.SPLITS)])
    assert len(list((tmp_path / "a").glob("harvest-*/*.json"))) == 12
    assert len(list((tmp_path / "a").rglob("*.*"))) == 12
    collect = h.collect
    found = []

    def noted():
        found.append(collect())
        return found[-1]

    monkeypatch.setattr(h, "collect", noted)
    assert texts == texts_of_a_part(tmp_path / "b")
    assert texts == texts_of_a_part(tmp_path / "a")
    [sets] = found                                           # the last ones come from the cache
    assert texts == [of_split(sets[name], split) for name in h.SETS for split in h.SPLITS]


def test_name_has_versions():
    name = h.harvest_name("docs")
    version = sys.version_info
    assert name.startswith(f"docs (python {version.major}.{version.minor}.")
    assert "torch " in name
    assert "numpy " in name
    assert "transformers" not in name


def test_unknown_set_or_split():
    for arguments in (("prose", "train"), ("docs", "dev")):
        with pytest.raises(ValueError, match="choose from"):
            h.harvest(*arguments)


def test_source_without_docstrings_still_reads():
    source = '''# Licence
# text

"""Module."""
import os


def f(a=1):
    """What f does,

    in full."""
    return a  # why


def g(): "one line"
'''
    stripped = '''import os


def f(a=1):
    return a  # why


def g(): "one line"
'''
    assert h.strip_source(source, ast.parse(source)) == stripped
    documented = 'def f(a, *b: int, c=2):\n    """' + "Words. " * 10 + '"""'
    entry, docstring = h.docstring_entries(ast.parse(documented))[0]
    assert entry == "f(a, *b: int, c=2)\n\n" + docstring.rstrip()


def test_the_first_harvest_shows_a_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(h, "versions", lambda: {"python": "3"})
    monkeypatch.setattr(h.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(h, "CACHE", tmp_path / "cache")
    (tmp_path / "good.py").write_text("x = 1\n" * 100)
    for bars in (1, 0):                                      # the second time from the cache
        h.harvest("code", "train")
        assert capsys.readouterr().err.count("1/1") == bars
    cached = next((tmp_path / "cache").glob("*/code-train.json"))
    cached.write_text(cached.read_text()[:-1])               # damaged: made again
    assert h.harvest("code", "train") == json.loads(cached.read_text())


def test_files_that_cannot_be_parsed_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(h, "versions", lambda: {"python": "3"})
    monkeypatch.setattr(h.sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "good.py").write_text("x = 1\n" * 100)
    (tmp_path / "zero.py").write_bytes(b"x = 1\0")
    (tmp_path / "latin.py").write_bytes(b"x = '\xe9'")
    (tmp_path / "template.py").write_text("{{ name }} =")
    (tmp_path / "deep.py").write_text("x = " + "-" * 200_000 + "1")
    (tmp_path / "link.py").symlink_to(tmp_path / "nowhere.py")
    assert [path for path, _ in h.collect()["code"]] == ["python/good.py"]
    monkeypatch.setattr(h.sysconfig, "get_path", lambda name: str(tmp_path / "python.zip"))
    assert h.collect() == {name: [] for name in h.SETS}      # a zipped library holds no files


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch, capsys, sets):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(h, "CACHE", tmp_path / "file")
    monkeypatch.setattr(h, "collect", lambda: sets)
    assert h.harvest("docs", "test") == of_split(sets["docs"], "test")
    assert "not kept" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_versions_and_platforms_without_a_package(monkeypatch):
    monkeypatch.setattr(h, "PACKAGES", ("tiktoken", "no-such-package"))
    assert set(h.versions()) == {"python", "tiktoken"}
    assert {path.split("/")[0] for path, _ in h.source_files()} == {"python", "tiktoken"}
