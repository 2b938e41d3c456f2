"""Joining against the literature's token counts, sampling, files as they are, and downloads from a
local server.

    python -m pytest -q tests/test_text.py
"""
import gzip
import hashlib
import http.server
import io
import json
import random
import threading
import zipfile
from pathlib import Path

import pytest
import torch

import data.text
from data import text as text_module
from data.download import FILES, download, fetch
from data.text import calibration, eval_tokens, learning_windows, load_text
from data.tokenizer import load_tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(),
                                  reason="needs the text sets in ../shared/data")


class Characters:
    """A tokenizer that anyone can follow: BOS is 1, every character its code."""

    def encode(self, text: str, bos: bool = True) -> list[int]:
        return [1] * bos + [ord(c) for c in text]


# ---- named sets

def make_sets(folder: Path) -> Path:
    documents = [{"text": "x" * 5}, {"text": "y" * 50}, {"text": "z" * 40}]
    files = {"wikitext2/wiki.test.raw": " \n = A = \n \n Text \u2028 of A . \n",
             "ptb/ptb.test.txt": " no it was \n but <unk> N \n",
             "c4/en/train.jsonl": "".join(json.dumps(each) + "\n" for each in documents)}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8", newline="")
    validation = "".join(json.dumps({"text": f"{i:03}", "url": ""}) + "\n" for i in range(1200))
    packed = gzip.compress(validation.encode())
    (folder / "c4" / "c4-validation.00000-of-00008.json.gz").write_bytes(packed)
    return folder


def test_sets_are_joined_as_in_the_literature(tmp_path):
    folder = make_sets(tmp_path)
    assert load_text("wikitext2", "test", folder) == "\n\n = A = \n\n\n\n\n Text \u2028 of A . \n"
    assert load_text("ptb", "test", folder) == "no it was but <unk> N"
    assert len(load_text("c4", "validation", folder)) == 1200
    tokens = eval_tokens(Characters(), "c4", "validation", 10, folder=folder)
    text = " ".join(f"{i:03}" for i in range(1100))
    assert tokens.tolist() == [1, *map(ord, text[:2559])]
    tokens = eval_tokens(Characters(), "c4", "validation", 1000, folder=folder)
    assert len(tokens) == 1000 * 4 + 100 * 5
    train = "".join(json.dumps({"text": "x" * 100}) + "\n" for _ in range(5100))
    (folder / "c4/en/train.jsonl").write_text(train)
    text, val, pool = learning_windows(Characters(), "c4", 10, 8, seed=0, folder=folder)
    assert len(text) == 1 + 5000 * 101 - 1                  # of more windows than are measured on
    assert len(val) + len(pool) == len(text) // 10
    tokens = eval_tokens(Characters(), "ptb", "test", 4, max_tokens=5, folder=folder)
    assert tokens.tolist() == [1, *map(ord, "no i")]


def test_sets_are_found_by_folder_environment_and_cache(tmp_path, monkeypatch):
    folder = make_sets(tmp_path)
    expected = load_text("ptb", "test", folder)
    assert load_text("ptb", "test", folder / "ptb") == expected
    monkeypatch.setenv("TEXT_FOLDER", str(folder))
    (tmp_path / "elsewhere").mkdir()
    assert load_text("ptb", "test") == load_text("ptb", "test", tmp_path / "elsewhere") == expected
    with pytest.raises(FileNotFoundError, match="--data-dir .*nowhere is no folder"):
        load_text("ptb", "test", tmp_path / "nowhere")
    monkeypatch.delenv("TEXT_FOLDER")
    calls = []
    monkeypatch.setattr(data.text, "fetch", lambda name, cache: calls.append((name, cache))
                        or folder / "ptb" / name)
    assert load_text("ptb", "test") == expected
    assert calls == [("ptb.test.txt", data.text.CACHE / "ptb")]


def test_errors_say_what_to_do(tmp_path, monkeypatch):
    folder, tokenizer = make_sets(tmp_path), Characters()
    with pytest.raises(ValueError,
                       match="unknown text set 'wikitext': known are wikitext2, ptb, c4, docs"):
        load_text("wikitext", "test")
    with pytest.raises(ValueError, match="c4 has no split 'test'; it has train, validation"):
        load_text("c4", "test", folder)
    with pytest.raises(FileNotFoundError, match="no file .*none.txt"):
        load_text(str(tmp_path / "none.txt"), "test")
    with pytest.raises(ValueError, match="ptb test has 22 tokens .* seqlen 23"):
        eval_tokens(tokenizer, "ptb", "test", 23, folder=folder)
    with pytest.raises(ValueError,
                       match="ptb test has no text of more than seqlen = 22 tokens, the longest "
                             "has 22"):
        calibration(tokenizer, "ptb", "test", 1, 22, 0, folder)
    with pytest.raises(ValueError, match="c4 train .* 51 tokens, the longest has 51"):
        calibration(tokenizer, "c4", "train", 1, 51, 0, folder)
    for nsamples, seqlen in ((0, 8), (4, 0), (4, -8)):
        with pytest.raises(ValueError, match=f"not {nsamples} of {seqlen}"):
            calibration(tokenizer, "ptb", "test", nsamples, seqlen, 0, folder)
    with pytest.raises(ValueError, match="max_tokens -3: at least 1"):
        eval_tokens(tokenizer, "ptb", "test", 4, -3, folder)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n\n{"title": "b"}\n')
    with pytest.raises(ValueError, match="bad.jsonl line 3"):
        load_text(str(tmp_path / "bad.jsonl"), "test")
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="bad.txt is not UTF-8"):
        load_text(str(tmp_path / "bad.txt"), "test")
    packed = gzip.compress(random.Random(0).randbytes(1000).hex().encode())
    (tmp_path / "cut.txt.gz").write_bytes(packed[:-20])
    with pytest.raises(ValueError, match="cut.txt.gz is not gzip of UTF-8"):
        load_text(str(tmp_path / "cut.txt.gz"), "test")
    monkeypatch.setattr(data.text, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(data.text, "fetch",
                        lambda name, cache: (_ for _ in ()).throw(ConnectionError("no network")))
    with pytest.raises(FileNotFoundError, match="no wiki.train.raw in .*; no network"):
        load_text("wikitext2", "train", folder)


@pytest.mark.parametrize("text",
                         ["", "a\r\nb\rc\n\n", " \n\x85\u2028\0 \ufeff\u00e9", "no end"])
def test_files_are_read_as_they_are(tmp_path, text):
    for name in ("a.txt", "a.valid.raw", "b.md"):
        (tmp_path / name).write_bytes(text.encode())
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        assert load_text(str(tmp_path / name), "any") == text
        assert load_text(tmp_path / f"{name}.gz", "any") == text
    line = json.dumps({"text": text, "n": 1}, ensure_ascii=False) + "\n"
    (tmp_path / "c.jsonl").write_bytes(line.encode() * 2)
    assert load_text(str(tmp_path / "c.jsonl"), "any") == [text, text]
    tokens = eval_tokens(Characters(), str(tmp_path / "c.jsonl"), "", 1)
    assert tokens.tolist() == Characters().encode(f"{text}\n\n{text}")


def test_a_byte_order_mark_is_no_text(tmp_path):
    """As Windows' editor puts it in front of what it saves in UTF-8."""
    (tmp_path / "a.txt").write_text("x\n", encoding="utf-8-sig")
    assert load_text(str(tmp_path / "a.txt"), "any") == "x\n"
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n', encoding="utf-8-sig")
    assert load_text(str(tmp_path / "a.jsonl"), "any") == ["x"]


@pytest.mark.parametrize("line",
                         ['{"text": 5}', '{"text": null}', '{"text": ["a"]}', "[" * 100_000])
def test_a_document_that_is_no_text_is_named_by_its_line(line, tmp_path):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "x"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"a.jsonl line 2 is not a JSON object .* holds text"):
        load_text(str(tmp_path / "a.jsonl"), "any")


def test_harvested_sets_are_loaded_on_demand(monkeypatch):
    monkeypatch.setattr(data.text, "harvest", lambda name, split: [f"{name} {split}", "b"])
    assert load_text("docstrings", "validation") == ["docstrings validation", "b"]
    tokens = eval_tokens(Characters(), "docs", "test", 3)
    assert tokens.tolist() == Characters().encode("docs test\n\nb")


def test_only_as_much_is_tokenized_as_is_wanted(tmp_path):
    """The tokens are those of the whole text, and a long line is not read to its end."""
    class Counting:
        def __init__(self, tokenizer):
            self.tokenizer, self.read = tokenizer, 0

        def encode(self, text):
            self.read += len(text)
            return self.tokenizer.encode(text)

    tiny = Path(data.text.__file__).parent / "tiny"
    words = ["it's", "we'll", "2024", "12,345.6", "\u4e2d\u6587\u00a0x", "...", "_a__b", "\n", "  ",
             "\t\r\n", "na\u00efve", "\U0001f600"]
    rng = random.Random(0)
    text = " ".join(rng.choice(words) for _ in range(60_000))
    (tmp_path / "line.txt").write_text(text, encoding="utf-8", newline="")
    for folder in (tiny / "llama", tiny / "opt"):
        tokenizer = Counting(load_tokenizer(folder))
        whole = tokenizer.encode(text)
        for n in (1, 2, 50, 511, 4000, 20_000):
            tokenizer.read = 0
            tokens = eval_tokens(tokenizer, str(tmp_path / "line.txt"), "", 1, n)
            assert tokens.tolist() == whole[:n]
            assert n > 4000 or tokenizer.read < len(text) / 2
    (tmp_path / "one.txt").write_text("ab" * 50_000)  # no place to cut: all of it
    tokens = eval_tokens(Characters(), str(tmp_path / "one.txt"), "", 1, 9)
    assert tokens.tolist() == Characters().encode("abababab")


# ---- calibration

def test_calibration_crops(tmp_path):
    folder, tokenizer = make_sets(tmp_path), Characters()
    (tmp_path / "count.txt").write_text("".join(map(chr, range(100, 400))), encoding="utf-8")
    samples = calibration(tokenizer, str(tmp_path / "count.txt"), "", 500, 20, seed=1)
    assert samples.shape == (500, 20) and samples.dtype == torch.int64
    assert (samples[:, 2:].diff(dim=1) == 1).all()  # consecutive tokens of the text
    starts = samples[:, 1].tolist()
    assert len(set(starts)) > 200
    assert min(starts) < 105
    assert max(starts) > 375
    samples = calibration(tokenizer, "c4", "train", 200, 30, seed=0, folder=folder)
    # one document each, never the short one
    assert set(samples[:, -1].tolist()) == {ord("y"), ord("z")}
    assert all(len(set(row[1:].tolist())) == 1 for row in samples)


def test_of_a_huge_text_only_the_beginning_is_learned_from(tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "MOST_CHARACTERS", 500)
    (tmp_path / "t.txt").write_text("a" * 500 + "b" * 5000)
    name = str(tmp_path / "t.txt")
    windows = calibration(Characters(), name, "train", 50, 20, seed=0)
    text, _, _ = learning_windows(Characters(), name, 20, 2, seed=0)
    assert (windows != ord("b")).all()
    assert len(text) == 501
    assert len(eval_tokens(Characters(), name, "test", 20)) == 5501     # all is measured on


def test_calibration_depends_on_the_seed_only(tmp_path):
    folder, tokenizer = make_sets(tmp_path), Characters()
    random.seed(1), torch.manual_seed(1)
    state = random.getstate()
    first = calibration(tokenizer, "c4", "validation", 5, 2, seed=0, folder=folder)
    assert random.getstate() == state
    random.seed(2), torch.manual_seed(2)
    assert torch.equal(first,
                       calibration(tokenizer, "c4", "validation", 5, 2, seed=0, folder=folder))
    assert not torch.equal(first,
                           calibration(tokenizer, "c4", "validation", 5, 2, seed=1, folder=folder))


def test_windows_to_learn_from_depend_on_the_seed_only(tmp_path):
    (tmp_path / "count.txt").write_text("".join(map(chr, range(100, 400))), encoding="utf-8")

    def drawn(seed):
        text, val, pool = learning_windows(Characters(), str(tmp_path / "count.txt"), 10, 3, seed)
        windows = torch.cat((val, pool))
        assert windows.flatten().sort().values.tolist() == text[:300].tolist()
        return windows
    first = drawn(0)
    torch.manual_seed(5)
    assert torch.equal(drawn(0), first)
    assert not torch.equal(drawn(1), first)


# ---- the published files

@needs_shared
def test_token_counts_of_the_literature():
    opt, llama = (load_tokenizer(SHARED / "tokenizers" / name) for name in ("opt", "llama"))
    tokens = eval_tokens(opt, "wikitext2", "test", 2048, folder=SHARED)
    assert len(tokens) == 287645
    assert tokens[0] == 2
    assert (tokens[1:] != 2).all()
    assert len(eval_tokens(llama, "wikitext2", "test", 2048, folder=SHARED)) == 341469
    samples = calibration(opt, "c4", "train", 4, 1024, seed=0, folder=SHARED)
    assert samples.shape == (4, 1024)
    raw = str(SHARED / "wikitext2" / "wiki.valid.raw")
    assert eval_tokens(opt, raw, "", 64).tolist() == opt.encode(Path(raw).read_bytes().decode())


@needs_shared
def test_hashes_in_the_table_are_those_of_the_published_files():
    for name in ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"):
        assert hashlib.sha256((SHARED / "ptb" / name).read_bytes()).hexdigest() == FILES[name][1]


# ---- downloads, from a server on this machine

CONTENT = random.Random(0).randbytes(3_000_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.content; server.ranges: honours Range; server.stop_after: closes after that
    many bytes, once."""

    def do_GET(self):
        content, start = self.server.content, 0
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        if asked and self.server.ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        stop, self.server.stop_after = self.server.stop_after, None
        self.wfile.write(content[start:][:stop])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.ranges, server.stop_after, server.asked = CONTENT, True, None, []
        server.url = f"http://127.0.0.1:{server.server_port}/file.bin"
        thread = threading.Thread(target=server.serve_forever, args=[0.02], daemon=True)   # else it ends half a second later
        thread.start()
        yield server
        server.shutdown()


def test_download_checks_and_keeps(server, tmp_path, capsys):
    path = tmp_path / "new" / "file.bin"
    assert download(server.url, path, DIGEST) == path and path.read_bytes() == CONTENT
    assert "3.0 of 3.0 MB" in capsys.readouterr().err
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]
    assert download(server.url, path, DIGEST) == path      # there already
    assert len(server.asked) == 1
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match="delete file.bin to download it again"):
        download(server.url, path, DIGEST)


@pytest.mark.parametrize("ranges", [True, False])
def test_interrupted_download_is_resumed(server, tmp_path, ranges):
    path, part = tmp_path / "file.bin", tmp_path / "file.bin.part"
    server.ranges = ranges
    server.stop_after = 1_234_567
    with pytest.raises(ConnectionError,
                       match="1234567 of 3000000 bytes arrived; run again to resume"):
        download(server.url, path, DIGEST)
    assert part.read_bytes() == CONTENT[:1_234_567] and not path.exists()
    assert download(server.url, path, DIGEST).read_bytes() == CONTENT
    assert not part.exists()
    assert server.asked == [None, "bytes=1234567-"]  # a server without ranges sends all of it again


@pytest.mark.parametrize("left", [CONTENT, CONTENT + b"x"])
def test_part_that_is_complete_or_too_long(server, tmp_path, left):
    (tmp_path / "file.bin.part").write_bytes(left)
    assert download(server.url, tmp_path / "file.bin", DIGEST).read_bytes() == CONTENT


def test_wrong_hash_is_removed(server, tmp_path):
    with pytest.raises(ValueError, match=f"has sha256 {DIGEST}, not {'0' * 64}"):
        download(server.url, tmp_path / "file.bin", "0" * 64)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file.bin.part").write_bytes(b"of another file")
    with pytest.raises(ValueError, match=f"not {DIGEST}"):
        download(server.url, tmp_path / "file.bin", DIGEST)
    # the next try starts afresh
    assert download(server.url, tmp_path / "file.bin", DIGEST).read_bytes() == CONTENT


def test_unknown_hash_is_recorded_and_then_checked(server, tmp_path):
    path = download(server.url, tmp_path / "file.bin")
    assert (tmp_path / "file.bin.sha256").read_text() == f"{DIGEST}  file.bin\n"
    assert download(server.url, path) == path
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=DIGEST):
        download(server.url, path)


def test_what_to_delete_where_a_file_with_a_recorded_hash_has_changed(server, tmp_path):
    path, record = tmp_path / "file.bin", tmp_path / "file.bin.sha256"
    record.write_text(f"{'0' * 64}  file.bin\n")
    with pytest.raises(ValueError, match="if it has changed, delete .*file.bin.sha256"):
        download(server.url, path)
    path.write_bytes(CONTENT)
    with pytest.raises(ValueError, match="delete file.bin and file.bin.sha256 to download it"):
        download(server.url, path)
    path.unlink()
    record.write_text(DIGEST[:10])                              # cut short: it says nothing
    assert download(server.url, path).read_bytes() == CONTENT
    assert record.read_text() == f"{DIGEST}  file.bin\n"


def test_no_server(tmp_path, server):
    server.shutdown(), server.server_close()
    with pytest.raises(ConnectionError, match="run again to resume"):
        download(server.url, tmp_path / "file.bin", timeout=5)
    assert list(tmp_path.iterdir()) == []


def test_wikitext_comes_out_of_its_archive(server, tmp_path):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as members:
        members.writestr("wikitext-2-raw/wiki.test.raw", " \n = A = \n")
    server.content = archive.getvalue()
    files = {"wikitext-2-raw-v1.zip": (server.url, hashlib.sha256(server.content).hexdigest())}
    for _ in range(2):
        assert fetch("wiki.test.raw", tmp_path, files).read_text() == " \n = A = \n"
    assert len(server.asked) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["wiki.test.raw", "wikitext-2-raw-v1.zip"]
    (tmp_path / "wikitext-2-raw-v1.zip").unlink()  # the text alone, as a user may put it there
    assert fetch("wiki.test.raw", tmp_path, files).read_text() == " \n = A = \n"
    assert len(server.asked) == 1
