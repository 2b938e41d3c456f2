"""Byte-level BPE on top of tiktoken, and how the merges of a tokenizer file become the order that tiktoken works with.

    order = merge_order([("t", "h"), ("th", "e")], vocab)     # [b"\\x00", ..., b"th", b"the"]

Both kinds of BPE (Sennrich et al. 2016) join the two neighbours of lowest rank, leftmost first, until none is left.
But merges.txt and tokenizer.json rank a *pair* of tokens, tiktoken ranks the *bytes* that a pair makes, however they
were made: with (b, c), (a, b), (ab, c) in this order the word abc is a, bc in merges.txt and abc in tiktoken.

Why the results are the same on every text: merging goes in passes, one for each rank, because parts are made before
what is made of them (checked below). What passes do within the bytes of two neighbours then does not depend on the
text around them, as long as nothing crosses the border of these bytes. So just before the pass that makes a token,
its bytes always lie there as the same tokens. If these are the listed pair, no other pair ever makes it; if not, the
listed pair never meets, and is left out here.
"""
import re
from pathlib import Path

import numpy as np
import tiktoken

MOST_TOKENS = 1 << 24
UNMADE = re.compile(r"<.*>|madeupword\d{4}")              # special tokens and fairseq's padding: in reach of no merge


class ByteLevelBPE:
    """BPE on the bytes of UTF-8; tiktoken does the work, in its own numbering: the order in which tokens are merged.

    tokens: every token in merge order, single bytes first; ids: token -> id, absent for a byte that has none
    added: strings cut out of the text before anything else -> id; silent: ids that decode leaves out
    """

    def __init__(self, words: str, tokens: list[bytes], ids: dict[bytes, int], added: dict[str, int],
                 silent: set[int], bos_id: int | None, eos_id: int | None):
        ranks = {token: rank for rank, token in enumerate(tokens)}
        self.bpe = tiktoken.Encoding("byte_level", pat_str=words, mergeable_ranks=ranks,
                                     special_tokens={text: len(ranks) + i for i, text in enumerate(added)})
        self.id_of_rank = np.array([ids.get(token, -1) for token in tokens] + list(added.values()))
        self.bytes_of = {i: token for token, i in ids.items()} | {i: text.encode() for text, i in added.items()}
        self.vocab_size = max(self.bytes_of) + 1
        self.bytes_of.update(dict.fromkeys(silent, b""))
        self.bos_id, self.eos_id = bos_id, eos_id

    def encode(self, text: str, bos: bool = True) -> list[int]:
        try:
            ranks = self.bpe.encode_to_numpy(text, allowed_special="all")
        except BaseException as e:                              # tiktoken panics where its regular expressions give up
            if type(e).__name__ != "PanicException":
                raise
            raise ValueError("tiktoken gives up on this text: a pattern that takes too long, or a run of several 100,000 "
                             "spaces") from None
        ids = self.id_of_rank[ranks]
        return [self.bos_id] * (bos and self.bos_id is not None) + ids[ids >= 0].tolist()

    def decode(self, ids) -> str:
        """Ids past the vocabulary (embedding rows that only pad the matrix) are nothing; half characters are U+FFFD."""
        return b"".join(self.bytes_of.get(int(i), b"") for i in ids).decode("utf-8", errors="replace")


def tokens_and_ids(path: Path, order, merges: list, vocab: dict[str, int]) -> tuple[list[bytes], dict[bytes, int]]:
    """Tokens in merge order and their ids, from a file's merges and vocabulary in GPT-2's letters."""
    check_ids(path, vocab)
    try:
        tokens = order(merges, vocab)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; an incomplete download?") from None
    letters = byte_letters()
    return tokens, {spell(token, letters): i for token, i in vocab.items()}


def check_ids(path: Path, vocab: dict[str, int]) -> None:
    """ValueError unless every token has an id of its own, a whole number from 0 on."""
    if not isinstance(vocab, dict) or not vocab:
        raise ValueError(f"{path}: the vocabulary is empty; an incomplete download?")
    owner = {}
    for token, i in vocab.items():
        if type(i) is not int or not 0 <= i < MOST_TOKENS:
            raise ValueError(f"{path}: token {token[:60]!r} has id {str(i)[:60]}, which is no whole number from 0 on; a damaged "
                             f"download?")
        if owner.setdefault(i, token) != token:
            raise ValueError(f"{path}: tokens {owner[i][:60]!r} and {token[:60]!r} have the same id {i}; a damaged download?")


def byte_letters() -> dict[str, int]:
    """GPT-2's visible letter for each byte: itself where printable, the others from U+0100 on."""
    plain = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


def spell(token: str, letters: dict[str, int]) -> bytes:
    """Bytes of a token that is written in letters; added tokens are ordinary strings, some with other characters."""
    return bytes(letters[c] for c in token) if all(c in letters for c in token) else token.encode()


def merge_order(merges: list, vocab: dict[str, int]) -> list[bytes]:
    """All tokens that merges can make, in the order in which they do, after the 256 bytes."""
    made = {}                                                # token -> (rank, left part, right part)
    for rank, pair in enumerate(merges):
        if len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
            raise ValueError(f"merge {rank + 1}, {str(pair)[:80]}, is not two parts")
        if any(token not in vocab for token in (*pair, "".join(pair))):
            raise ValueError(f"merge {rank + 1}, {' '.join(pair)[:80]}, needs two parts and a result, all in the vocabulary")
        left, right = pair
        known = all(len(part) == 1 or part in made for part in pair)
        if known and left + right not in made and meet(left, right, rank, made):
            made[left + right] = (rank, left, right)
    for rank, (left, right) in enumerate(merges):
        late = max(made[part][0] if part in made else -1 for part in (left, right))
        if late > rank and meet(left, right, late + 1, made):
            raise ValueError(f"merge {rank + 1}, {left} {right}, comes before the merges that make its parts")
    letters, whole = byte_letters(), {"".join(pair) for pair in merges}
    lost = [t for t in vocab if len(t) > 1 and t not in whole and all(c in letters for c in t) and not UNMADE.fullmatch(t)]
    if lost:
        raise ValueError(f"{len(lost)} tokens of the vocabulary, such as {lost[0][:60]!r}, are made by none of the "
                         f"{len(merges)} merges")
    return [spell(token, letters) for token in (*letters, *made)]


def meet(left: str, right: str, limit: int, made: dict) -> bool:
    """True if the first `limit` merges turn the bytes of these two tokens into these two tokens.

    Undoes their merges, latest first, and looks for an earlier merge across the border between them.
    """
    while True:
        rank, *pair = made.get(left + right, (limit, None))
        if rank < limit and pair == [left, right]:
            return False
        left_rank, right_rank = (made[part][0] if part in made else -1 for part in (left, right))
        if left_rank == right_rank == -1:                    # two bytes
            return True
        if left_rank > right_rank:
            limit, left = left_rank, made[left][2]           # what crosses must have come before `left` was made,
        else:
            limit, right = right_rank + 1, made[right][1]    # or in one pass with `right`: passes go left to right


def rank_order(merges: list, vocab: dict[str, int]) -> list[bytes]:
    """The order for files with `ignore_merges`: they were tiktoken files once, where the id of a token is its rank.

    Their conversion lists every pair that makes a token, so a pair ranks as the bytes it makes do; both are checked.
    """
    made_by, listed = [vocab.get("".join(pair), -1) for pair in merges], set(map(tuple, merges))
    if made_by != sorted(made_by) or any(
            token[:i] in vocab and token[i:] in vocab and (token[:i], token[i:]) not in listed
            for token in vocab for i in range(1, len(token))):
        raise ValueError("with ignore_merges, all merges in the order of the ids they make are needed, as in Llama 3")
    letters = byte_letters()
    longer = [token for token in sorted(vocab, key=vocab.get) if token not in letters]
    return [spell(token, letters) for token in (*letters, *longer)]
