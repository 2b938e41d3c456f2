"""Trains the tokenizers of the two tiny models on the train split of three harvested text sets.

    python -m data.tiny.make_tokenizers     # llama/tokenizer.model, opt/vocab.json, opt/merges.txt

What lies there is replaced, and models that were taught with it (pretrain.py) are of no use then.

llama   sentencepiece BPE with LLaMA's settings: no normalisation, every digit a token, unknown
        characters as bytes
opt     byte-level BPE in GPT-2's files and OPT's numbering: <s> 0, <pad> 1, </s> 2, <unk> 3, then
        bytes, then merges

BPE (Sennrich et al. 2016, section 3.2) starts from single bytes and joins the most frequent
adjacent pair, again and again, until the vocabulary is full; the list of these merges is the
tokenizer. Merges do not cross word boundaries.
"""
import argparse
import io
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import sentencepiece

from data.bpe import byte_letters
from data.harvest import harvest

HERE = Path(__file__).resolve().parent
VOCAB_SIZE = 2048
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")     # of the OPT tokenizer, ids 0 to 3
CODE_BYTES = 4_000_000     # of source text; all of it would outweigh the documentation three to one
# GPT-2's word pattern; it has \p{L} for letters and \p{N} for numbers, which Python's own `re`
# spells as below.
WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")


def training_text() -> list[str]:
    """Train documents of the sets that the models are taught, every n-th one of code."""
    texts = {name: harvest(name, "train") for name in ("docs", "docstrings", "code")}
    step = max(1, sum(map(len, texts["code"])) // CODE_BYTES)
    return texts["docs"] + texts["docstrings"] + texts["code"][::step]


def sentencepiece_model(texts: list[str], vocab_size: int) -> bytes:
    """Contents of a tokenizer.model with LLaMA's settings."""
    model = io.BytesIO()
    lines = (line for text in texts for line in text.split("\n") if line.strip())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        character_coverage=0.9999,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2)
    return model.getvalue()


def byte_level_bpe(texts: list[str], n_merges: int) -> list[tuple[bytes, bytes]]:
    """The first n merges of byte-level BPE, most frequent pair first; of equally frequent ones the
    smaller bytes."""
    counts = Counter(word for text in texts for word in WORD.findall(text))
    words = [[bytes([byte]) for byte in word.encode()] for word in counts]    # lists of tokens
    times = list(counts.values())                   # how often each word occurs
    pairs = Counter()                               # how often each pair of neighbours occurs
    where = defaultdict(set)                        # pair -> words that have it
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += times[i]
            where[pair].add(i)
    merges = []
    while len(merges) < n_merges and pairs:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for i in where.pop(best):                   # only words that have the pair change
            for pair in zip(words[i], words[i][1:]):
                pairs[pair] -= times[i]
            words[i] = join(words[i], best)
            for pair in zip(words[i], words[i][1:]):
                pairs[pair] += times[i]
                where[pair].add(i)
        pairs = +pairs                              # drops pairs that have become extinct
    return merges


def join(word: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    """A word's tokens with every occurrence of the pair made one."""
    joined = []
    j = 0
    while j < len(word):
        if tuple(word[j:j + 2]) == pair:
            joined.append(word[j] + word[j + 1])
            j += 2
        else:
            joined.append(word[j])
            j += 1
    return joined


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()                             # --help alone
    texts = training_text()
    letters = {byte: letter for letter, byte in byte_letters().items()}
    spelled = []                                    # the merges in GPT-2's letters
    for pair in byte_level_bpe(texts, VOCAB_SIZE - len(SPECIAL) - len(letters)):
        left, right = ("".join(letters[byte] for byte in token) for token in pair)
        spelled.append((left, right))
    tokens = [*SPECIAL, *letters.values(), *(left + right for left, right in spelled)]
    vocab = json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False)
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in spelled), ""]
    files = {
        "llama/tokenizer.model": sentencepiece_model(texts, VOCAB_SIZE),
        "opt/vocab.json": vocab.encode(),
        "opt/merges.txt": "\n".join(lines).encode(),
    }
    for name, content in files.items():
        (HERE / name).parent.mkdir(exist_ok=True)
        (HERE / name).write_bytes(content)
        print(f"{name}: {len(content)} bytes")


if __name__ == "__main__":
    main()
