"""Byte-level BPE on top of tiktoken, and how the merges of a tokenizer file become the order that
tiktoken works with.

    order = merge_order([("t", "h"), ("th", "e")], vocab)     # [b"\\x00", ..., b"th", b"the"]

Both kinds of BPE (Sennrich et al. 2016) join the two neighbours of lowest rank, leftmost first,
until none is left. But merges.txt and tokenizer.json rank a *pair* of tokens, tiktoken ranks the
*bytes* that a pair makes, however they were made: with (b, c), (a, b), (ab, c) in this order the
word abc is a, bc in merges.txt and abc in tiktoken.

Why the results are the same on every text: merging goes in passes, one for each rank, because parts
are made before what is made of them (checked below). What passes do within the bytes of two
neighbours then does not depend on the text around them, as long as nothing crosses the border of
these bytes. So just before the pass that makes a token, its bytes always lie there as the same
tokens. If these are the listed pair, no other pair ever makes it; if not, the listed pair never
meets, and is left out here.
"""
import re
from pathlib import Path

import numpy as np
import tiktoken

MOST_TOKENS = 1 << 24
# Tokens that no merge has to make: special tokens and fairseq's padding.
UNMADE = re.compile(r"<.*>|madeupword\d{4}")


class ByteLevelBPE:
    """BPE on the bytes of UTF-8; tiktoken does the work, in its own numbering: the order in which
    tokens are merged.

    words: the regular expression that cuts a text into words, none of which a merge leaves
    tokens: every token in merge order, single bytes first
    ids: {token: id}, without the bytes that have none
    added: {string: id} of what is cut out of the text before anything else
    silent: ids that decode leaves out
    bos_id, eos_id: None where the tokenizer has none
    stops: ids that end a text, eos_id among them
    """

    def __init__(self, words: str, tokens: list[bytes], ids: dict[bytes, int],
                 added: dict[str, int], silent: set[int], bos_id: int | None, eos_id: int | None,
                 stops: frozenset[int] = frozenset()):
        ranks = {token: rank for rank, token in enumerate(tokens)}
        self.bpe = tiktoken.Encoding("byte_level", pat_str=words, mergeable_ranks=ranks,
                                     special_tokens={})
        self.id_of_rank = np.array([ids.get(token, -1) for token in tokens])
        self.added = added
        self.cut = cutter(added)
        self.bytes_of = {i: token for token, i in ids.items()}
        self.bytes_of.update({i: text.encode() for text, i in added.items()})
        self.vocab_size = max(self.bytes_of) + 1
        self.bytes_of.update(dict.fromkeys(silent, b""))
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.stops = stops | ({eos_id} if eos_id is not None else set())

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """The ids of a text, behind the BOS token where the tokenizer has one and bos is True."""
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        return ids + encode_around(valid(text), self.added, self.cut, self.encode_ordinary)

    def encode_ordinary(self, text: str) -> list[int]:
        """The ids of a text without added tokens."""
        try:
            ranks = self.bpe.encode_to_numpy(text, disallowed_special=())
        except BaseException as e:           # tiktoken panics where its regular expressions give up
            if type(e).__name__ != "PanicException":
                raise
            raise ValueError("tiktoken gives up on this text: a pattern that takes too long, or a "
                             "run of several 100,000 spaces") from None
        ids = self.id_of_rank[ranks]
        return ids[ids >= 0].tolist()

    def special(self, text: str) -> int | None:
        """The id of a special token by its text, if it is one."""
        return self.added.get(text)

    def decode(self, ids) -> str:
        """The text of ids. Ids past the vocabulary (embedding rows that only pad the matrix) are
        nothing; half characters are U+FFFD."""
        parts = [self.bytes_of.get(int(i), b"") for i in ids]
        return b"".join(parts).decode("utf-8", errors="replace")


def valid(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair, which UTF-8 cannot say."""
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def cutter(added) -> re.Pattern | None:
    """What finds any of the strings of `added` in a text, the longest at each place; None for
    none."""
    longest_first = sorted(added, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if added else None


def encode_around(text: str, added: dict[str, int], cut: re.Pattern | None, encode) -> list[int]:
    """The ids of a text: those of the strings of `added`, which their `cutter` finds, and what
    encode(piece) gives for the pieces between."""
    ids = []
    for piece in [text] if cut is None else cut.split(text):
        if piece:
            ids += [added[piece]] if piece in added else encode(piece)
    return ids


def tokens_and_ids(path: Path, order, merges: list,
                   vocab: dict[str, int]) -> tuple[list[bytes], dict[bytes, int]]:
    """(tokens in merge order, {token: id}) from a file's merges and vocabulary in GPT-2's letters;
    order is merge_order or rank_order. ValueError, which names the file, for what cannot be."""
    check_ids(path, vocab)
    try:
        tokens = order(merges, vocab)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; an incomplete download?") from None
    letters = byte_letters()
    ids = {spell(token, letters): i for token, i in vocab.items()}
    if len(ids) < len(vocab):
        raise ValueError(f"{path}: two tokens of the vocabulary are the same bytes; a damaged "
                         f"download?")
    return tokens, ids


def check_ids(path: Path, vocab: dict[str, int]) -> None:
    """ValueError unless every token has an id of its own, a whole number from 0 on."""
    if not isinstance(vocab, dict) or not vocab:
        raise ValueError(f"{path}: the vocabulary is empty; an incomplete download?")
    owner = {}
    for token, i in vocab.items():
        if type(i) is not int or not 0 <= i < MOST_TOKENS:
            raise ValueError(f"{path}: token {token[:60]!r} has id {str(i)[:60]}, which is no "
                             f"whole number from 0 on; a damaged download?")
        if owner.setdefault(i, token) != token:
            raise ValueError(f"{path}: tokens {owner[i][:60]!r} and {token[:60]!r} have the same "
                             f"id {i}; a damaged download?")


def byte_letters() -> dict[str, int]:
    """{letter: byte}, GPT-2's visible letter for each byte: itself where it is printable, the
    others from U+0100 on."""
    plain = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    letters = {chr(byte): byte for byte in plain}
    letters.update({chr(256 + i): byte for i, byte in enumerate(rest)})
    return letters


def spell(token: str, letters: dict[str, int]) -> bytes:
    """Bytes of a token that is written in letters. Added tokens are ordinary strings, some with
    other characters."""
    if all(c in letters for c in token):
        return bytes(letters[c] for c in token)
    return token.encode()


def merge_order(merges: list, vocab: dict[str, int]) -> list[bytes]:
    """All tokens that merges can make, in the order in which they do, after the 256 bytes."""
    made = {}                                            # token -> (rank, left part, right part)
    for rank, pair in enumerate(merges):
        if len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
            raise ValueError(f"merge {rank + 1}, {str(pair)[:80]}, is not two parts")
        left, right = pair
        if any(token not in vocab for token in (left, right, left + right)):
            raise ValueError(f"merge {rank + 1}, {' '.join(pair)[:80]}, needs two parts and a "
                             f"result, all in the vocabulary")
        known = all(len(part) == 1 or part in made for part in pair)
        if known and left + right not in made and meet(left, right, rank, made):
            made[left + right] = (rank, left, right)
    check_parts_come_first(merges, made)
    check_all_are_made(merges, vocab)
    letters = byte_letters()
    return [spell(token, letters) for token in (*letters, *made)]


def rank_of(token: str, made: dict) -> int:
    """The rank of the merge that made a token; -1 for a byte, which none has to make."""
    return made[token][0] if token in made else -1


def check_parts_come_first(merges: list, made: dict) -> None:
    """ValueError for a pair that meets only after its own turn has passed."""
    for rank, (left, right) in enumerate(merges):
        late = max(rank_of(left, made), rank_of(right, made))
        if late > rank and meet(left, right, late + 1, made):
            raise ValueError(f"merge {rank + 1}, {left} {right}, comes before the merges that make "
                             f"its parts")


def check_all_are_made(merges: list, vocab: dict[str, int]) -> None:
    """ValueError for tokens, longer than a byte and not special, that are no merge's result."""
    letters = byte_letters()
    results = {"".join(pair) for pair in merges}
    lost = [token for token in vocab if len(token) > 1 and token not in results
            and all(c in letters for c in token) and not UNMADE.fullmatch(token)]
    if lost:
        raise ValueError(f"{len(lost)} tokens of the vocabulary, such as {lost[0][:60]!r}, are "
                         f"made by none of the {len(merges)} merges")


def meet(left: str, right: str, limit: int, made: dict) -> bool:
    """True if the first `limit` merges turn the bytes of these two tokens into these two tokens.

    Undoes their merges, latest first, and looks for an earlier merge across the border between
    them. made: {token: (rank, left part, right part)}.
    """
    while True:
        rank, *pair = made.get(left + right, (limit, None))
        if rank < limit and pair == [left, right]:
            return False
        left_rank = rank_of(left, made)
        right_rank = rank_of(right, made)
        if left_rank == right_rank == -1:                    # two bytes
            return True
        if left_rank > right_rank:     # what crosses must have come before `left` was made,
            limit = left_rank
            left = made[left][2]
        else:                          # or in one pass with `right`: passes go left to right
            limit = right_rank + 1
            right = made[right][1]


def rank_order(merges: list, vocab: dict[str, int]) -> list[bytes]:
    """The order for files with `ignore_merges`: they were tiktoken files once, where the id of a
    token is its rank.

    Their conversion lists every pair that makes a token, so a pair ranks as the bytes it makes do;
    both are checked.
    """
    made_by = [vocab.get("".join(pair), -1) for pair in merges]
    listed = set(map(tuple, merges))
    unlisted = ((token[:i], token[i:]) not in listed
                for token in vocab for i in range(1, len(token))
                if token[:i] in vocab and token[i:] in vocab)
    if made_by != sorted(made_by) or any(unlisted):
        raise ValueError("with ignore_merges, all merges in the order of the ids they make are "
                         "needed, as in Llama 3")
    letters = byte_letters()
    longer = [token for token in sorted(vocab, key=vocab.get) if token not in letters]
    return [spell(token, letters) for token in (*letters, *longer)]
