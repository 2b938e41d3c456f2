"""Text sets, joined as the literature joins them, and token sequences for evaluation and
calibration.

    tokens = eval_tokens(tokenizer, "wikitext2", "test", seqlen=2048)                # (n,) int64
    samples = calibration(tokenizer, "c4", "train", nsamples=128, seqlen=2048,       # (128, 2048)
                          seed=0)

wikitext2         train, validation, test    the file's lines, a blank one as "", joined with
                                             "\\n\\n" (GPTQ)
ptb               train, validation, test    sentences, joined with " "
c4                train, validation          documents; evaluation takes the first 1100, joined
                                             with " "
docs, docstrings, code, headers              train, validation, test: documents harvested on the
                                             user's own machine
PATH.txt .raw .md, PATH.jsonl (field text)   a file as it is, also as .gz; a .jsonl is joined with
                                             "\\n\\n"

A named set is looked for in `folder`, in the folder that the environment variable TEXT_FOLDER
names, in data/cache/NAME and then downloaded there. Both of these folders may hold the files
themselves or one subfolder for each set. Left out: streaming; a whole split is held in memory (1 GB
for the C4 train file).
"""
import gzip
import json
import os
import random
import re
import zlib
from pathlib import Path

import torch

from data.download import fetch
from data.harvest import SETS as HARVESTED, harvest

CACHE = Path(__file__).resolve().parent / "cache"
FILES = {   # set -> split -> file names, the published one first
    "wikitext2": {"train": ["wiki.train.raw"],
                  "validation": ["wiki.valid.raw"],
                  "test": ["wiki.test.raw"]},
    "ptb": {"train": ["ptb.train.txt"],
            "validation": ["ptb.valid.txt"],
            "test": ["ptb.test.txt"]},
    "c4": {"train": ["c4-train.00000-of-01024.json.gz", "train.jsonl"],
           "validation": ["c4-validation.00000-of-00008.json.gz", "validation.jsonl"]},
}
# Folders inside the published archives.
SUBFOLDERS = {"wikitext2": "wikitext-2-raw", "ptb": "data", "c4": "en"}
SUFFIXES = (".txt", ".raw", ".md", ".jsonl")
CUT = re.compile(r"[^\W_](?=\s)")      # a letter or digit before white space, see first_tokens
C4_EVAL_DOCUMENTS = 1100
C4_EVAL_WINDOWS = 256
C4_LEARNED_DOCUMENTS = 5000             # of its train split, by the paper's code
# Of a text that is learned from: 8 million tokens, for which a tokenizer takes 1.4 GB.
MOST_CHARACTERS = 1 << 25


def load_text(name: str, split: str, folder: str | Path | None = None) -> list[str] | str:
    """One text (wikitext2, ptb, a file) or a list of documents (c4, harvested sets, a .jsonl). A
    file has no splits."""
    if name in HARVESTED:
        return harvest(name, split)
    if name not in FILES:
        path = Path(name)
        suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
        if not suffixes or suffixes[-1] not in SUFFIXES:
            raise ValueError(f"unknown text set {name!r}: known are "
                             f"{', '.join([*FILES, *HARVESTED])}, or the path of a file ending in "
                             f"{' '.join(SUFFIXES)}, also with .gz")
        return documents(path) if suffixes[-1] == ".jsonl" else "".join(lines_of(path))
    path = find(name, split, folder)
    if name == "c4":
        return documents(path)
    if name == "ptb":
        return " ".join(line.strip() for line in lines_of(path))
    return "\n\n".join(line if line.strip() else "" for line in lines_of(path))


def has_splits(name: str) -> bool:
    """Is it a set, with texts to learn from and others to measure on? A file is one text."""
    return name in FILES or name in HARVESTED


def split_to_judge(name: str) -> str:
    """The split of a text set that models are measured on; C4 publishes no test split."""
    return "validation" if name == "c4" else "test"


def eval_tokens(tokenizer, name: str, split: str, seqlen: int, max_tokens: int | None = None,
                folder: str | Path | None = None) -> torch.Tensor:
    """(n,) int64, at least seqlen, at most max_tokens; tokenized once, so only the first window has
    a BOS."""
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens {max_tokens}: at least 1 is needed, or none for all")
    text = load_text(name, split, folder)
    if name == "c4" and split == "validation":
        text = " ".join(text[:C4_EVAL_DOCUMENTS])
        most = C4_EVAL_WINDOWS * seqlen
        max_tokens = most if max_tokens is None else min(most, max_tokens)
    elif name == "c4":
        text = " ".join(text[:C4_LEARNED_DOCUMENTS])
    if split == "train":
        text = joined(text)[:MOST_CHARACTERS]
    tokens = first_tokens(tokenizer, joined(text), max_tokens)
    if len(tokens) < seqlen:
        raise ValueError(f"{name} {split} has {len(tokens)} tokens (max_tokens {max_tokens}), "
                         f"fewer than one window of seqlen {seqlen}; lower seqlen or take a longer "
                         f"text")
    return torch.tensor(tokens, dtype=torch.int64)


def first_tokens(tokenizer, text: str, n: int | None) -> list[int]:
    """The first n tokens of a text (None: all), without encoding much more of it than they take.

    A text is cut where a letter or digit is followed by white space: no token of LLaMA or OPT
    reaches across that, and how a word is split does not depend on what comes after it, so the
    tokens are those of the whole text."""
    size = 0 if n is None else 8 * n + 1000                 # characters; a token has 3 to 4
    while 0 < size < len(text):
        cuts = [match.end() for match in CUT.finditer(text, max(size - 10_000, 0), size)]
        if cuts:
            tokens = tokenizer.encode(text[:cuts[-1]])
            if len(tokens) >= n:
                return tokens[:n]
        size *= 4
    return tokenizer.encode(text)[:n]


def calibration(tokenizer, name: str, split: str, nsamples: int, seqlen: int, seed: int,
                folder: str | Path | None = None) -> torch.Tensor:
    """(nsamples, seqlen) int64, the same for the same seed, drawn with replacement.

    c4: a random crop of a random document that is longer than seqlen; other sets: random starts in
    the whole text, or the first MOST_CHARACTERS of it.
    """
    if nsamples < 1 or seqlen < 1:
        raise ValueError(f"calibration needs at least one window of at least one token, not "
                         f"{nsamples} of {seqlen}")
    rng = random.Random(seed)
    text = load_text(name, split, folder)
    if name == "c4":
        texts = list(text) or [""]
        encoded = {}                                        # each is drawn about once
    else:
        texts = [joined(text)[:MOST_CHARACTERS]]
        encoded = {texts[0]: tokenizer.encode(texts[0])}
    samples = []
    longest = 0
    while len(samples) < nsamples:
        i = rng.randrange(len(texts))
        tokens = encoded.get(texts[i]) or tokenizer.encode(texts[i])
        if len(tokens) > seqlen:
            start = rng.randrange(len(tokens) - seqlen)
            samples.append(tokens[start:start + seqlen])
            continue
        longest = max(longest, len(tokens))
        texts[i] = texts[-1]                                # too short: not drawn again
        texts.pop()
        if not texts:
            raise ValueError(f"{name} {split} has no text of more than seqlen = {seqlen} tokens, "
                             f"the longest has {longest}; lower seqlen or take a longer text")
    return torch.tensor(samples, dtype=torch.int64)


def learning_windows(tokenizer, name: str, seqlen: int, held_out: int, seed: int,
                     folder: str | Path | None = None
                     ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(the train split's tokens (n,), windows (held_out, seqlen) to choose by, and all others, to
    learn from), int64; windows do not overlap, and are shuffled by the seed."""
    text = eval_tokens(tokenizer, name, "train", seqlen, folder=folder)
    count = len(text) // seqlen
    pool = text[:count * seqlen].view(count, seqlen)
    pool = pool[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]
    if count <= held_out:
        raise ValueError(f"{name} gives {count} windows of seqlen {seqlen}, and --val-windows "
                         f"{held_out} takes them all: use more text or shorter windows")
    return text, pool[:held_out], pool[held_out:]


def joined(text: list[str] | str) -> str:
    return text if isinstance(text, str) else "\n\n".join(text)


def find(name: str, split: str, folder: str | Path | None) -> Path:
    """Path of a named set's file, downloaded if it is nowhere."""
    if split not in FILES[name]:
        raise ValueError(f"{name} has no split {split!r}; it has {', '.join(FILES[name])}")
    if folder and not Path(folder).is_dir():
        raise FileNotFoundError(f"--data-dir {folder} is no folder")
    names = FILES[name][split]
    places = [Path(place) for place in (folder, os.environ.get("TEXT_FOLDER")) if place]
    for place in places:
        for sub in (name, f"{name}/{SUBFOLDERS[name]}", "", SUBFOLDERS[name]):
            for file in names:
                if (place / sub / file).exists():
                    return place / sub / file
    try:
        return fetch(names[0], CACHE / name)                # also checks a file that is there
    except OSError as error:
        looked = ", ".join(map(str, places)) \
            or "no folder (neither --data-dir nor TEXT_FOLDER is given)"
        raise FileNotFoundError(f"no {' or '.join(names)} in {looked}; {error}, or put it there "
                                f"yourself") from None


def documents(path: Path) -> list[str]:
    """Field "text" of each line of a .jsonl file."""
    texts = []
    for number, line in enumerate(lines_of(path), 1):
        if line.strip():
            try:
                text = json.loads(line)["text"]
                if not isinstance(text, str):
                    raise TypeError
                texts.append(text)
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(f'{path} line {number} is not a JSON object with a field "text" '
                                 f'that holds text') from None
    return texts


def lines_of(path: Path):
    """Lines of a UTF-8 text with their ends, which are "\n" only and are not translated; unpacks a
    .gz on the way, and leaves out a byte order mark in front."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    is_packed = path.suffix == ".gz"
    unpack = gzip.open if is_packed else open
    try:
        with unpack(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            yield from file
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        kind = "gzip of UTF-8" if is_packed else "UTF-8"
        raise ValueError(f"{path} is not {kind} text: {error}") from None
