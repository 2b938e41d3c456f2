"""Trains the tokenizers of the two tiny models on the train split of three harvested text sets.

    python -m data.tiny.make_tokenizers           # writes llama/tokenizer.model, opt/vocab.json, opt/merges.txt

llama   sentencepiece BPE with LLaMA's settings: no normalisation, every digit a token, unknown characters as bytes
opt     byte-level BPE in GPT-2's files and OPT's numbering: <s> 0, <pad> 1, </s> 2, <unk> 3, then bytes, then merges

BPE (Sennrich et al. 2016, section 3.2) starts from single bytes and joins the most frequent adjacent pair, again and
again, until the vocabulary is full; the list of these merges is the tokenizer. Merges do not cross word boundaries.
"""
import io
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import sentencepiece

from data.bpe import byte_letters
from data.harvest import harvest

VOCAB_SIZE = 2048
CODE_BYTES = 4_000_000     # of source text; all of it would outweigh the documentation three to one
# GPT-2's word pattern; it has \p{L} for letters and \p{N} for numbers, which Python's own `re` spells as below
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
        sentence_iterator=lines, model_writer=model, model_type="bpe", vocab_size=vocab_size, byte_fallback=True,
        normalization_rule_name="identity", add_dummy_prefix=True, remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, character_coverage=0.9999, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        num_threads=1, minloglevel=2)
    return model.getvalue()


def byte_level_bpe(texts: list[str], n_merges: int) -> list[tuple[bytes, bytes]]:
    """The first n merges of byte-level BPE, most frequent pair first; of equally frequent ones the smaller bytes."""
    counts = Counter(word for text in texts for word in WORD.findall(text))
    words = [[bytes([b]) for b in word.encode()] for word in counts]      # each word as its list of tokens
    freq, pairs, where = list(counts.values()), Counter(), defaultdict(set)
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += freq[i]
            where[pair].add(i)
    merges = []
    while len(merges) < n_merges and pairs:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for i in where.pop(best):                                         # only words that have the pair change
            word, merged, j = words[i], [], 0
            while j < len(word):
                both = tuple(word[j:j + 2]) == best
                merged.append(word[j] + word[j + 1] if both else word[j])
                j += 2 if both else 1
            for pair in zip(word, word[1:]):
                pairs[pair] -= freq[i]
            for pair in zip(merged, merged[1:]):
                pairs[pair] += freq[i]
                where[pair].add(i)
            words[i] = merged
        pairs = +pairs                                                    # drops pairs that have become extinct
    return merges


def main():
    texts, here, letters = training_text(), Path(__file__).parent, {b: c for c, b in byte_letters().items()}
    merges = byte_level_bpe(texts, VOCAB_SIZE - 4 - 256)
    spelled = [tuple("".join(letters[b] for b in token) for token in pair) for pair in merges]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *letters.values(), *(a + b for a, b in spelled)]
    files = {"llama/tokenizer.model": sentencepiece_model(texts, VOCAB_SIZE),
             "opt/vocab.json": json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False).encode(),
             "opt/merges.txt": "\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in spelled), ""]).encode()}
    for name, content in files.items():
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_bytes(content)
        print(f"{name}: {len(content)} bytes")


if __name__ == "__main__":
    main()
