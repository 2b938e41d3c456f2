"""Text to token ids and back, for LLaMA 1, 2, 3 and OPT checkpoints.

    t = load_tokenizer("checkpoints/llama-7b")
    ids = t.encode("Hello")       # [1, 15043]; the BOS token is in front where the model wants one
    text = t.decode(ids)          # "Hello"; special tokens are left out

Byte pair encoding (Sennrich et al. 2016) in four kinds of files, told apart by what lies in the
folder:

tokenizer.model           LLaMA 1 and 2: a sentencepiece model
tokenizer.model           Llama 3: lines of `base64 rank`; a tokenizer.json beside it is preferred,
                          it has more names
tokenizer.json            the Hugging Face format with a byte-level BPE: Llama 3, SmolLM2
vocab.json + merges.txt   OPT, in GPT-2's format; preferred to a tokenizer.json if config.json says
                          model_type opt

Strings of special tokens inside a text ("<|end_of_text|>") become their ids in the three byte-level
kinds, as in the Hugging Face tokenizers. A sentencepiece model reads its own as ordinary text, as
Meta's code does (so the `<unk>` of Penn Treebank is three pieces); tokens that a fine-tuned model
has added to it (added_tokens.json, added_tokens_decoder) become their ids. It writes U+2581, its
sign for a space, as a space. In OPT `<unk>` and `<s>` in a text are ordinary as well: its unknown
and BOS token is </s>. A byte that a vocabulary lacks (SmolLM2: six control characters) is dropped
after the merges, there before them: what stands beside it may be cut otherwise. Half of a surrogate
pair is read as U+FFFD, and what follows a token that was added to a sentencepiece model gains a
space in front. In all other cases decode(encode(text)) == text. A run of several 100,000 spaces is
an error of tiktoken's. Whether a BOS is put in front is said by add_bos_token, else by the file's
template. Left out: normalizers, padding.
"""
import base64
import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import sentencepiece

from data.bpe import (ByteLevelBPE, byte_letters, check_ids, cutter, encode_around, merge_order,
                      rank_order, tokens_and_ids, valid)
from data.checkpoint import read_json, write_atomic, write_json
from data.config import family_of, in_range, read_config

# How text is cut into words before merging; no merge crosses a cut. GPT-2 keeps a space with the
# word after it.
GPT2_WORDS = (r"'s|'t|'re|'ve|'m|'ll|'d"
              r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
              r"|\s+(?!\S)|\s+")
# The same after digits have been cut out ({} is "" for single digits, "+" for runs): a digit ends a
# run of spaces.
DIGIT_WORDS = (r"\p{{N}}{}|'s|'t|'re|'ve|'m|'ll|'d"
               r"| ?\p{{L}}+| ?[^\s\p{{L}}\p{{N}}]+"
               r"|\s+(?![^\s\p{{N}}])|\s+")
LLAMA3_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
                r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_SPECIAL = ["begin_of_text", "end_of_text",
                  *(f"reserved_special_token_{i}" for i in range(4)),
                  "start_header_id", "end_header_id", "reserved_special_token_4", "eot_id",
                  *(f"reserved_special_token_{i}" for i in range(5, 251))]
LLAMA3_ENDS = "<|end_of_text|>", "<|eot_id|>"              # that end a text in Meta's code
# What a tokenizer.json must encode and decode to itself: letters, digits, marks and spaces of all
# kinds.
SAMPLE = "aZ \u00e9\u4e2d1\u00b2_-'\t\n\r\u3000\u0301\U0001f600" * 2


class Ranks(ByteLevelBPE):
    """Llama 3's rank file: it ends with the vocabulary, so one that was cut at a line shows only
    beside its model."""


class SentencePiece:
    """LLaMA 1 and 2. BOS and EOS are the model's own, as the config.json of early conversions has
    wrong ones, unless eos_token names another token. added: the tokens behind the model's."""

    def __init__(self, path: Path, add_bos: bool, added: "list[Added]" = (),
                 eos_token: str | None = None, stops: frozenset[int] = frozenset()):
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.model = model
        self.pieces = model.vocab_size()
        behind = [token for token in added if token.id >= self.pieces]
        self.added = {token.text: token.id for token in behind}
        self.cut = cutter(self.added)
        self.text_of = {token.id: token.text for token in behind}
        self.vocab_size = max([self.pieces, *(i + 1 for i in self.text_of)])
        self.bos_id = model.bos_id() if add_bos and model.bos_id() >= 0 else None
        self.eos_id = model.eos_id() if model.eos_id() >= 0 else None
        if eos_token is not None and self.id_of(eos_token) is not None:
            self.eos_id = self.id_of(eos_token)
        self.stops = stops | ({self.eos_id} if self.eos_id is not None else set())
        self.silent = {i for i in range(self.pieces) if model.is_control(i) or model.is_unknown(i)}
        self.silent.update(token.id for token in behind if token.special)

    def id_of(self, text: str) -> int | None:
        """The id of the token that is this very text, if there is one."""
        i = self.model.piece_to_id(text)
        return self.added.get(text, i if self.model.id_to_piece(i) == text else None)

    def special(self, text: str) -> int | None:
        """The id of a special token by its text, if it is one."""
        i = self.id_of(text)
        return i if i in self.silent or i in self.text_of else None

    def encode(self, text: str, bos: bool = True) -> list[int]:
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        return ids + encode_around(valid(text), self.added, self.cut, self.model.encode)

    def decode(self, ids) -> str:
        """The text of ids; those that nothing stands for are nothing."""
        text, run = "", []                              # pieces side by side
        spoken = [int(i) for i in ids if i < self.vocab_size and int(i) not in self.silent]
        for i in [*spoken, None]:
            if i is not None and i < self.pieces:
                run.append(i)
                continue
            if run:                                     # only a text's first space is put there
                space = " " if text and self.model.id_to_piece(run[0])[0] == "\u2581" else ""
                text += space + self.model.decode(run)
                run = []
            text += self.text_of.get(i, "")
        return text


# Names of files that belong to a tokenizer begin so.
FILES = ("tokenizer", "vocab.", "merges.", "special_tokens", "added_tokens", "generation_config",
         "chat_template")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files that a model's text goes through into another model folder, each atomically.
    Special tokens that config.json alone names go into a generation_config.json; single numbers,
    which early conversions have wrong, as `load_tokenizer` understands them."""
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name.startswith(FILES):
            with open(file, "rb") as held:
                write_atomic(folder / file.name, lambda f: shutil.copyfileobj(held, f))
    config, generation = source / "config.json", folder / "generation_config.json"
    said = read_json(config) if config.exists() else {}
    ids = {key: said[key] for key in ("bos_token_id", "eos_token_id") if said.get(key) is not None}
    if ids and not generation.exists():
        try:
            tokenizer = load_tokenizer(source)
            understood = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        except (OSError, ValueError):                           # none, or one not for us
            understood = {}
        ids.update({key: i for key, i in understood.items()
                    if i is not None and not isinstance(ids.get(key), list)})
        write_json(generation, ids)


def load_tokenizer(folder: str | Path) -> SentencePiece | ByteLevelBPE:
    """The tokenizer of a checkpoint folder: .encode(text, bos=True), .decode(ids), .bos_id,
    .eos_id, .stops, .vocab_size, .special(text).

    bos_id is the id that encode puts in front, None where the tokenizer puts none; stops are the
    ids that end a text. ValueError for files that are cut short or damaged, and for a vocabulary
    that does not fit the embedding of the model in the folder.
    """
    folder = Path(folder)
    rows = embedding_rows(folder)
    tokenizer = read_tokenizer(folder, rows)
    size = tokenizer.vocab_size
    for role, i in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        if i is not None and (type(i) is not int or not 0 <= i < size):
            raise ValueError(f"{folder}: {role}_token_id {str(i)[:60]} is none of the {size} "
                             f"tokens: see generation_config.json, config.json and "
                             f"tokenizer_config.json")
    if rows is not None:
        is_cut = isinstance(tokenizer, Ranks) and size < rows
        if size > rows or is_cut:
            raise ValueError(f"{folder}: its tokenizer has {size} tokens, its model's embedding "
                             f"{rows} rows: a file is cut short, or they are not of one model")
    return tokenizer


def embedding_rows(folder: Path) -> int | None:
    """How many tokens the model in the folder knows; None where there is no model."""
    config = folder / "config.json"
    if config.exists():
        rows = read_json(config).get("vocab_size")
        return None if rows is None else in_range("vocab_size", rows, f"{config}: vocab_size")
    if (folder / "params.json").exists() and any(folder.glob("consolidated.*.pth")):
        return read_config(folder).vocab_size
    return None


class Added(NamedTuple):
    """A token that a folder adds to a vocabulary."""
    text: str
    id: int
    special: bool


def added_tokens(folder: Path, rows: int | None) -> list[Added]:
    """Of added_tokens.json and of tokenizer_config.json, which goes before it. Tokens past the
    model's embedding, of `rows`, are left out: LLaMA 2's first release has one."""
    path, config = folder / "added_tokens.json", folder / "tokenizer_config.json"
    found = []                                              # (file, id, what is said of it)
    if path.exists():
        found += [(path, i, {"content": text, "special": True})
                  for text, i in read_json(path).items()]
    decoder = read_json(config).get("added_tokens_decoder") if config.exists() else None
    if isinstance(decoder, dict):
        found += [(config, int(i) if re.fullmatch("[0-9]{1,9}", i) else i, said)
                  for i, said in decoder.items()]
    added = {}
    for file, i, said in found:
        text = said.get("content") if isinstance(said, dict) else None
        if type(i) is not int or not isinstance(text, str) or not text:
            raise ValueError(f"{file}: added token {str(i)[:60]} is no number and text; a damaged "
                             f"download?")
        if rows is None or i < rows:
            added[i] = Added(text, i, said.get("special") is True)
    return list(added.values())


def take_in(more: list[Added], known, added: dict[str, int], silent: set[int]) -> None:
    """Put what is not among `known` texts into a tokenizer's added and silent tokens."""
    new = [token for token in more if token.text not in known]
    added.update({token.text: token.id for token in new})
    silent.update(token.id for token in new if token.special)


def check_settings(folder: Path, names: dict, is_sentencepiece: bool) -> None:
    """ValueError for settings that ask for what no tokenizer here does."""
    wanted = {"add_eos_token": False, "split_special_tokens": False,
              "add_prefix_space": is_sentencepiece}
    for key, value in wanted.items():
        if names.get(key, value) != value:
            raise ValueError(f"{folder}: {key} {names[key]} in its tokenizer's settings is not "
                             f"supported, only {value}")


def read_tokenizer(folder: Path, rows: int | None) -> SentencePiece | ByteLevelBPE:
    """The tokenizer of a folder, whose model has an embedding of `rows`."""
    model = folder / "tokenizer.model"
    content = folder / "tokenizer.json"
    names = settings(folder)
    added = added_tokens(folder, rows)
    family = family_of(names) if "model_type" in names else None
    lines = model.read_bytes().split(b"\n") if model.exists() else []
    is_ranks = bool(lines) and re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\s*", lines[0]) is not None
    if model.exists() and not is_ranks:
        check_settings(folder, names, True)
        try:
            return SentencePiece(model, names.get("add_bos_token") is not False, added,
                                 names.get("eos_token"), more_stops(names))
        except (RuntimeError, OSError, UnicodeDecodeError):
            raise ValueError(f"{model} is neither a sentencepiece model nor lines of base64 ranks; "
                             f"an incomplete download?") from None
    check_settings(folder, names, False)
    has_vocab = (folder / "vocab.json").exists() and (folder / "merges.txt").exists()
    if has_vocab and (family == "opt" or not content.exists()):
        return from_vocab_and_merges(folder, names, family, added)
    if content.exists():
        try:
            tokenizer = from_tokenizer_json(content, names, added)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{content} is not a whole tokenizer.json "
                             f"({str(repr(error))[:100]}): download it again") from None
        if is_ranks and tokenizer.eos_id is None:               # Meta's folder: no file names it
            ends = {text: tokenizer.special(text) for text in LLAMA3_ENDS}
            tokenizer.eos_id = ends["<|end_of_text|>"]
            tokenizer.stops |= {i for i in ends.values() if i is not None}
        return tokenizer
    if is_ranks:
        return from_ranks(model, names, lines)
    raise FileNotFoundError(f"no tokenizer in {folder}: looked for tokenizer.model, "
                            f"tokenizer.json, vocab.json with merges.txt")


def from_ranks(path: Path, names: dict, lines: list[bytes]) -> ByteLevelBPE:
    """Llama 3's own file: the rank is the id; the special tokens have no file, they follow in a
    fixed order."""
    try:
        pairs = [line.split() for line in lines if line.strip()]
        ids = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError:
        raise ValueError(f"{path}: not all lines are `base64 rank`; an incomplete "
                         f"download?") from None
    if len(ids) < len(pairs) or sorted(ids.values()) != list(range(len(ids))):
        raise ValueError(f"{path}: ranks are not 0 to {len(pairs) - 1}, each of another token; an "
                         f"incomplete download?")
    lost = next((byte for byte in range(256) if bytes([byte]) not in ids), None)
    if lost is not None:
        raise ValueError(f"{path}: byte {lost} has no rank; an incomplete download?")
    added = {f"<|{name}|>": len(ids) + i for i, name in enumerate(LLAMA3_SPECIAL)}
    bos = None if names.get("add_bos_token") is False else added["<|begin_of_text|>"]
    eos = special_id(path, names, "eos", added, added["<|end_of_text|>"])
    tokens = sorted(ids, key=ids.get)
    stops = more_stops(names) | {added[text] for text in LLAMA3_ENDS}
    return Ranks(LLAMA3_WORDS, tokens, ids, added, set(added.values()), bos, eos, stops)


def from_vocab_and_merges(folder: Path, names: dict, family: str | None,
                          more: list[Added]) -> ByteLevelBPE:
    """OPT. Its ids are in no merge order, its BOS is </s>; madeupword0000 and the like are in reach
    of no merge."""
    path = folder / "vocab.json"
    vocab = read_json(path)
    if family not in ("opt", None) or "</s>" not in vocab:
        raise ValueError(f"{folder}: vocab.json and merges.txt alone are understood for OPT only, "
                         f"which has a token </s>; model_type here is {family}. Add the "
                         f"checkpoint's tokenizer.json")
    merges = read_merges(folder / "merges.txt")
    check_ids(path, vocab)
    lost = next((letter for letter in byte_letters() if letter not in vocab), None)
    if lost is not None:
        raise ValueError(f"{path} has no token for {lost!r}, one of the 256 bytes; a damaged "
                         f"download?")
    roles = {"bos": "</s>", "eos": "</s>", "unk": "</s>", "pad": "<pad>"}
    texts = {names.get(f"{role}_token", default) for role, default in roles.items()}
    added = {text: vocab[text] for text in sorted(texts) if text in vocab}
    silent = {vocab[text] for text in ("<s>", "<pad>", "</s>", "<unk>") if text in vocab}
    silent.update(added.values())
    take_in(more, vocab, added, silent)
    known = {**vocab, **added}
    check_ids(path, known)
    bos = None
    if names.get("add_bos_token") is not False:
        bos = special_id(path, names, "bos", known, vocab["</s>"])
    eos = special_id(path, names, "eos", known, vocab["</s>"])
    tokens, ids = tokens_and_ids(folder / "merges.txt", merge_order, merges, vocab)
    return ByteLevelBPE(GPT2_WORDS, tokens, ids, added, silent, bos, eos, more_stops(names))


def read_merges(path: Path) -> list[list[str]]:
    """The pairs of a merges.txt, one a line, in their order."""
    try:
        lines = path.read_text("utf-8").split("\n")
    except ValueError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}; an incomplete download?") from None
    return [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]


def from_tokenizer_json(path: Path, names: dict, more: list[Added]) -> ByteLevelBPE:
    """A Hugging Face tokenizer.json whose parts are all understood; any other part is an error that
    names it."""
    content = read_json(path)
    check_understood(path, content)
    model = content["model"]
    words = word_pattern(path, content.get("pre_tokenizer") or {"type": None})
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    order = rank_order if model.get("ignore_merges") else merge_order
    tokens, ids = tokens_and_ids(path, order, merges, model["vocab"])
    if model.get("unk_token") and any(c not in model["vocab"] for c in byte_letters()):
        raise ValueError(f"{path}: a vocabulary with unk_token that lacks some bytes is not "
                         f"supported")
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    twice = len(added) < len(content["added_tokens"])
    if twice or any(model["vocab"].get(text, i) != i for text, i in added.items()):
        raise ValueError(f"{path}: an added token has two ids; a damaged download?")
    silent = {token["id"] for token in content["added_tokens"] if token["special"]}
    take_in(more, added, added, silent)
    known = {**model["vocab"], **added}
    if not all(isinstance(text, str) and text for text in added):
        raise ValueError(f"{path}: an added token is no text; a damaged download?")
    check_ids(path, known)
    bos = template_bos(path, content.get("post_processor"))
    if "add_bos_token" in names:
        bos = special_id(path, names, "bos", known, bos) if names["add_bos_token"] else None
    eos = special_id(path, names, "eos", known, None)
    try:
        tokenizer = ByteLevelBPE(words, tokens, ids, added, silent, bos, eos, more_stops(names))
        got = tokenizer.decode(tokenizer.encode(SAMPLE, bos=False))
    except ValueError as error:                            # of the regular expression
        raise ValueError(f"{path}: the pre_tokenizer pattern {words[:100]!r} cannot be used "
                         f"({str(error)[:200]})") from None
    if got != SAMPLE:                                      # what no pattern matches is dropped
        raise ValueError(f"{path}: the pre_tokenizer pattern {words[:100]!r} does not match all "
                         f"text; that is not supported")
    return tokenizer


def check_understood(path: Path, content: dict) -> None:
    """ValueError for a tokenizer.json that is no plain byte-level BPE."""
    model = content.get("model") or {}
    pre_tokenizer = content.get("pre_tokenizer") or {}
    if model.get("byte_fallback") or pre_tokenizer.get("type") == "Metaspace":
        raise ValueError(f"{path} is a converted sentencepiece model; put its tokenizer.model "
                         f"beside it")
    odd = [key for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout")
           if model.get(key)]
    if model.get("type") != "BPE" or odd:
        raise ValueError(f"{path}: model type {model.get('type')} {' '.join(odd)} is not "
                         f"supported, only plain BPE")
    if content.get("normalizer"):
        raise ValueError(f"{path}: normalizer {content['normalizer']['type']} is not supported")
    for token in content["added_tokens"]:
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise ValueError(f"{path}: added token {token['content']} has lstrip, rstrip or "
                             f"single_word: not supported")


def word_pattern(path: Path, pre_tokenizer: dict) -> str:
    """One regular expression that cuts as the pre-tokenizers of a tokenizer.json do one after the
    other."""
    steps = [pre_tokenizer]
    if pre_tokenizer["type"] == "Sequence":
        steps = pre_tokenizer["pretokenizers"] or [{"type": None}]
    kinds = [step["type"] for step in steps]
    first, last = steps[0], steps[-1]
    if kinds[-1] == "ByteLevel" and not last["add_prefix_space"]:
        use_regex = last.get("use_regex", True)            # cuts as GPT-2 does, after the others
        if kinds == ["ByteLevel"] and use_regex:
            return GPT2_WORDS
        if kinds == ["Digits", "ByteLevel"] and use_regex:
            return DIGIT_WORDS.format("" if first["individual_digits"] else "+")
        if kinds == ["Split", "ByteLevel"] and not use_regex:
            is_plain = first["behavior"] == "Isolated" and not first["invert"]
            words = first["pattern"].get("Regex")
            # `$` and `{1,3}+` mean something else to the tokenizers library, which uses Oniguruma
            if is_plain and words and not re.search(r"(?<!\\)\$|\{[\d,]*\}\+", words):
                return words
    said = json.dumps(pre_tokenizer)[:200]
    raise ValueError(f"{path}: pre_tokenizer {said} is not supported")


def template_bos(path: Path, post_processor: dict | None) -> int | None:
    """The id that the post-processor of a tokenizer.json puts in front of a text, None for none."""
    if not post_processor:
        return None
    bos = None
    for step in post_processor.get("processors", [post_processor]):
        if step["type"] == "TemplateProcessing":
            front, text = step["single"][:-1], step["single"][-1]
            names = [part["SpecialToken"]["id"] for part in front if "SpecialToken" in part]
            ids = [i for name in names for i in step["special_tokens"][name]["ids"]]
            if len(ids) != len(front) or "Sequence" not in text or len(ids) > 1 or bos is not None:
                raise ValueError(f"{path}: post_processor {json.dumps(step['single'])} is not "
                                 f"`BOS, text` or `text`")
            bos = ids[0] if ids else None
        elif step["type"] != "ByteLevel":
            raise ValueError(f"{path}: post_processor {step['type']} is not supported")
    return bos


# What is read of the settings, and of which types.
SETTINGS = {
    "model_type": str,
    "add_bos_token": bool,
    "bos_token": str,
    "eos_token": str,
    "unk_token": str,
    "pad_token": str,
    "bos_token_id": (int, list),
    "eos_token_id": (int, list),
    "add_eos_token": bool,
    "add_prefix_space": bool,
    "split_special_tokens": bool,
}


def settings(folder: Path) -> dict:
    """What the tokenizer's and the model's files say, later ones first; each special token as its
    plain string."""
    said = {}
    for name in ("special_tokens_map", "tokenizer_config", "config", "generation_config"):
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        for key, value in read_json(path).items():
            if isinstance(value, dict) and "content" in value:
                value = value["content"]
            if key not in SETTINGS or value is None or value == "":
                continue
            is_bool = isinstance(value, bool)              # which Python counts among the integers
            wants_bool = SETTINGS[key] is bool
            if not isinstance(value, SETTINGS[key]) or is_bool != wants_bool:
                raise ValueError(f"{path}: {key} {str(repr(value))[:60]} is of the wrong kind; a "
                                 f"damaged download?")
            said[key] = value
    return said


def more_stops(names: dict) -> frozenset[int]:
    """Ids that end a text where a model's files name several. (A single number is no more than
    eos_token says, and in early conversions wrong.)"""
    ids = names.get("eos_token_id")
    return frozenset(i for i in ids if type(i) is int) if isinstance(ids, list) else frozenset()


def special_id(path: Path, names: dict, role: str, ids: dict[str, int],
               default: int | None) -> int | None:
    """Id of "bos" or "eos": by its name in the tokenizer's files, else by its number in the
    model's, else default."""
    token = names.get(f"{role}_token")
    if token is not None:
        if token not in ids:
            raise ValueError(f"{path} does not hold {token[:60]!r}, which is {role}_token in the "
                             f"settings beside it: they are not of one tokenizer")
        return ids[token]
    number = names.get(f"{role}_token_id", default)
    if isinstance(number, list):                           # several ways to end: the first of them
        return number[0] if number else default
    return number
