"""data/harvest.py: same texts every time, nothing in two splits, every set and split usable, from an empty cache.

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
    size = {(n, s): sum(len(text) for path, text in sets[n] if h.split_of(path) == s) for n in h.SETS for s in h.SPLITS}
    for name, least in (("docs", 30_000), ("docstrings", 100_000), ("code", 300_000), ("headers", 300_000)):
        assert all(size[name, split] > least for split in h.SPLITS), size
        assert size[name, "train"] > 3 * size[name, "test"], size


def test_no_file_and_no_text_in_two_splits(sets):
    where = {}
    for name in h.SETS:
        for path, text in sets[name]:
            assert where.setdefault(("path", path), h.split_of(path)) == h.split_of(path)
            assert where.setdefault(("text", text), h.split_of(path)) == h.split_of(path)
    for path, _ in sum(sets.values(), []):
        assert not re.search(r"licen[sc]e|/tests?/|site-packages", path, re.I), path


def test_no_long_paragraph_of_docs_or_headers_in_two_splits(sets):
    owner = {}
    for path, text in sets["docs"] + sets["headers"]:
        for paragraph in re.split(r"\n\s*\n", text):
            if len(paragraph) >= 80 and not path.endswith("/METADATA"):
                assert owner.setdefault(" ".join(paragraph.split()), h.split_of(path)) == h.split_of(path), paragraph


def texts_of_a_part(cache: Path) -> list[list[str]]:
    """Every set and split of a sixteenth of the files, by way of a cache folder."""
    files = [(path, file) for path, file in h.source_files() if zlib.crc32(path.encode()) % 16 == 0 or "pydoc_data" in path]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(h, "source_files", lambda: files)
        patch.setattr(h, "CACHE", cache)
        return [h.harvest(name, split) for name in h.SETS for split in h.SPLITS]


def test_empty_cache_same_texts_in_two_processes_and_nothing_imported(tmp_path, monkeypatch):
    program = ("import sys, json, pathlib; sys.path.insert(0, 'tests'); from test_harvest import texts_of_a_part;"
               f"texts = texts_of_a_part(pathlib.Path({str(tmp_path / 'a')!r}));"
               "assert not {'torch', 'numpy', 'triton', 'pydoc_data.topics'} & set(sys.modules);"
               "print(json.dumps(texts))")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    texts, collect, found = json.loads(done.stdout), h.collect, []
    assert len(list((tmp_path / "a").glob("harvest-*/*.json"))) == len(list((tmp_path / "a").rglob("*.*"))) == 12
    monkeypatch.setattr(h, "collect", lambda: found.append(collect()) or found[-1])
    assert texts == texts_of_a_part(tmp_path / "b") == texts_of_a_part(tmp_path / "a") and all(texts[::len(h.SPLITS)])
    [sets] = found                                                           # the last ones come from the cache
    assert texts == [[text for path, text in sets[name] if h.split_of(path) == split] for name in h.SETS for split in h.SPLITS]


def test_name_has_versions():
    name = h.harvest_name("docs")
    assert name.startswith(f"docs (python {sys.version_info.major}.{sys.version_info.minor}.")
    assert "torch " in name and "numpy " in name and "transformers" not in name


def test_unknown_set_or_split():
    for arguments in (("prose", "train"), ("docs", "dev")):
        with pytest.raises(ValueError, match="choose from"):
            h.harvest(*arguments)


def test_source_without_docstrings_still_reads():
    source = ('# Licence\n# text\n\n"""Module."""\nimport os\n\n\n'
              'def f(a=1):\n    """What f does,\n\n    in full."""\n    return a  # why\n\n\ndef g(): "one line"\n')
    assert h.strip_source(source, ast.parse(source)) == \
        'import os\n\n\ndef f(a=1):\n    return a  # why\n\n\ndef g(): "one line"\n'
    entry, docstring = h.docstring_entries(ast.parse('def f(a, *b: int, c=2):\n    """' + "Words. " * 10 + '"""'))[0]
    assert entry == "f(a, *b: int, c=2)\n\n" + docstring.rstrip()


def test_the_first_harvest_shows_a_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(h, "versions", lambda: {"python": "3"})
    monkeypatch.setattr(h.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(h, "CACHE", tmp_path / "cache")
    (tmp_path / "good.py").write_text("x = 1\n" * 100)
    for bars in (1, 0):                                                      # the second time from the cache
        h.harvest("code", "train")
        assert capsys.readouterr().err.count("1/1") == bars
    cached = next((tmp_path / "cache").glob("*/code-train.json"))
    cached.write_text(cached.read_text()[:-1])                               # damaged: made again
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
    assert h.collect() == {name: [] for name in h.SETS}                      # a zipped standard library holds no files


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch, capsys, sets):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(h, "CACHE", tmp_path / "file")
    monkeypatch.setattr(h, "collect", lambda: sets)
    assert h.harvest("docs", "test") == [text for key, text in sets["docs"] if h.split_of(key) == "test"]
    assert "not kept" in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_versions_and_platforms_without_a_package(monkeypatch):
    monkeypatch.setattr(h, "PACKAGES", ("tiktoken", "no-such-package"))
    assert set(h.versions()) == {"python", "tiktoken"}
    assert {path.split("/")[0] for path, _ in h.source_files()} == {"python", "tiktoken"}
