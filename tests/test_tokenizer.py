"""Ids must equal those of the libraries that the checkpoints were made with, on real text and on
nasty strings.

    python -m pytest -q tests/test_tokenizer.py
"""
import base64
import functools
import json
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tiktoken

from data.bpe import byte_letters, merge_order
from data.config import SHIPPED
from data.tokenizer import GPT2_WORDS, LLAMA3_SPECIAL, LLAMA3_WORDS, load_tokenizer

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SMOLLM2 = Path.home() / ".cache" / "smollm2"
NASTY = ["", " ", "   ", "\n", " \n\n  x", "  two  spaces ", "\t\r\n\r\n a\r", "a\0b",
         "\ufeffx \ud7ff \U0010ffff",
         "it's we'LL I'M 'tis'S it\u2019s '\u017f", "\u00e9 e\u0301 \u0301 n\u0303",
         "_a__b\u0130\u0131 \ufb01",
         "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea x\ufe0f",
         "12345 1,234.5 \u00b2 \u0663\u0664 \u2167", "x  1  2\n3 \n 4",
         "\u4e2d\u6587 \u0e44\u0e17\u0e22 \u0627\u0644",
         "\u00a0\u3000 \u2028\x85\x0b.", "----------==  ====####", "a" * 3000, "ab " * 2000,
         "'''\"\"\" <-- @-@ \\n"]
SPECIAL = ["</s>", "a </s> b<pad>", "<s><unk>", "<|endoftext|> x", " <|im_start|>user\n",
           "<|eot_id|><|begin_of_text|>x"]


def needs(path: Path):
    return pytest.mark.skipif(not path.exists(), reason=f"needs {path.name} outside the repository")


needs_shared = needs(SHARED)


@functools.cache
def real_texts() -> list[str]:
    """Strings of every file of the text and task sets, about 100 kB of each: long ones from
    WikiText, PTB and C4."""
    texts = [path.read_bytes()[:100_000].decode(errors="ignore")
             for path in sorted(SHARED.glob("*/*.raw"))]
    texts += [path.read_bytes()[:100_000].decode(errors="ignore")
              for path in sorted(SHARED.glob("ptb/*.txt"))]
    for path in sorted(SHARED.glob("*/*.jsonl")):
        size = 0
        for line in path.read_text("utf-8").split("\n"):
            strings = strings_in(json.loads(line)) if line and size < 100_000 else []
            size += sum(map(len, strings))
            texts += strings
    return texts


def strings_in(value) -> list[str]:
    if isinstance(value, str):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for item in values for text in strings_in(item)]


def random_texts(n: int = 2000) -> list[str]:
    rng = random.Random(0)
    letters = ("abAZ .,'sStTlLreE\n\r\t 0199\u00b2\u00e9\u0301\u4e2d\U0001f600-_#=*!"
               "\u00a0\u3000\u0085")
    return ["".join(rng.choices(letters, k=rng.randint(1, 60))) for _ in range(n)]


def check(tokenizer, reference, texts: list[str], exact: bool = True):
    """Same ids as reference(text); exact: and decoding gives back the text."""
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == reference(text), text[:80]
        assert not exact or tokenizer.decode(ids) == text, text[:80]
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def write_rank_json(folder: Path, ranks: dict[bytes, int], special: list[str]) -> Path:
    """A Llama 3 tokenizer.json made from its rank file: every pair that makes a token is a
    merge."""
    letter = {b: c for c, b in byte_letters().items()}
    spelled = {token: "".join(letter[b] for b in token) for token in ranks}
    pairs = [(ranks[t], ranks[t[:i]], ranks[t[i:]], t[:i], t[i:]) for t in ranks
             for i in range(1, len(t))
             if t[:i] in ranks and t[i:] in ranks]
    bos = {"id": special[0], "ids": [len(ranks)], "tokens": [special[0]]}
    template = {"type": "TemplateProcessing", "pair": [], "special_tokens": {special[0]: bos},
                "single": [{"SpecialToken": {"id": special[0], "type_id": 0}},
                           {"Sequence": {"id": "A", "type_id": 0}}]}
    template["pair"] = template["single"] + [{"Sequence": {"id": "B", "type_id": 1}}]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_WORDS}, "behavior": "Isolated",
             "invert": False}
    content = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "decoder": byte_level,
        "added_tokens": [{"id": len(ranks) + i, "content": text, "single_word": False,
                          "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for i, text in enumerate(special)],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {"type": "Sequence", "processors": [byte_level, template]},
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": True,
                  "vocab": {spelled[t]: r for t, r in ranks.items()},
                  "merges": [f"{spelled[a]} {spelled[b]}" for *_, a, b in sorted(pairs)]}}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder / "tokenizer.json"


# ---- the four kinds against their peers

@needs_shared
def test_opt_equals_transformers():
    folder = SHARED / "tokenizers" / "opt"
    peer = transformers.GPT2Tokenizer.from_pretrained(str(folder), bos_token="</s>",
                                                      eos_token="</s>", unk_token="</s>",
                                                      pad_token="<pad>", add_bos_token=True)
    tokenizer = load_tokenizer(folder)
    check(tokenizer, peer.encode, real_texts() + random_texts() + NASTY)
    check(tokenizer, peer.encode, SPECIAL, exact=False)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (2, 2, 50265)
    assert tokenizer.encode("") == [2]
    assert tokenizer.encode("Hello", bos=False) == [31414]
    assert tokenizer.decode([2, 0, 31414, 1, 3, 2, 50271]) == "Hello"


@needs(SMOLLM2)
def test_smollm2_equals_transformers():
    peer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(SMOLLM2 / "tokenizer.json"))
    tokenizer = load_tokenizer(SMOLLM2)
    texts = real_texts() if SHARED.exists() else []
    check(tokenizer, peer.encode,
          texts + random_texts() + [text for text in NASTY if "\U0010ffff" not in text])
    # bytes outside its vocabulary
    check(tokenizer, peer.encode, SPECIAL + ["a\x04b \U0010ffff"], exact=False)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (None, 2, 49152)
    assert tokenizer.encode("") == []


@needs_shared
def test_llama3_rank_file_and_tokenizer_json_equal_peers(tmp_path):
    folder = SHARED / "tokenizers" / "llama3"
    lines = (folder / "tokenizer.model").read_bytes().split()
    ranks = {base64.b64decode(token): int(rank) for token, rank in zip(lines[::2], lines[1::2])}
    special = [f"<|{name}|>" for name in LLAMA3_SPECIAL]
    path = write_rank_json(tmp_path, ranks, special)
    peer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    from_ranks = load_tokenizer(folder)
    from_json = load_tokenizer(tmp_path)
    assert (from_ranks.bos_id, from_ranks.eos_id, from_ranks.vocab_size) == (128000, 128001, 128256)
    assert (from_json.bos_id, from_json.vocab_size) == (128000, 128256)
    # both files in one folder, where none names the end of a text
    shutil.copy(folder / "tokenizer.model", tmp_path)
    both = load_tokenizer(tmp_path)
    assert (both.bos_id, both.eos_id, both.stops) == (128000, 128001, from_ranks.stops)
    for tokenizer in (from_ranks, from_json):
        check(tokenizer, peer.encode, real_texts() + random_texts() + NASTY)
        check(tokenizer, peer.encode, SPECIAL, exact=False)
    plain = tiktoken.Encoding("llama3", pat_str=LLAMA3_WORDS, mergeable_ranks=ranks,
                              special_tokens={text: 128000 + i for i, text in enumerate(special)})
    check(from_ranks, lambda text: [128000] + plain.encode_ordinary(text),
          real_texts()[:50] + NASTY)


@needs_shared
def test_llama_equals_sentencepiece_and_tokenizers():
    path = SHARED / "tokenizers" / "llama" / "tokenizer.model"
    tokenizer = load_tokenizer(path.parent)
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts = real_texts() + random_texts() + NASTY
    # specials in a text are text
    check(tokenizer, lambda text: [1] + model.encode(text), texts + SPECIAL)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 32000)
    # the published tokenizer.json, rebuilt: merges in the order of scores, a space in front of the
    # text
    vocab = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    pairs = [(-model.get_score(i), vocab[t[:k]], vocab[t[k:]], t[:k], t[k:])
             for t, i in vocab.items() if i > 258
             for k in range(1, len(t)) if t[:k] in vocab and t[k:] in vocab]
    peer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [pair[3:] for pair in sorted(pairs)],
                                                      byte_fallback=True,
                                                      fuse_unk=True, unk_token="<unk>"))
    front = tokenizers.normalizers.Prepend("\u2581")
    space = tokenizers.normalizers.Replace(" ", "\u2581")
    peer.normalizer = tokenizers.normalizers.Sequence([front, space])
    check(tokenizer, lambda text: [1] + peer.encode(text).ids, texts)
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"  # the one sign it cannot write


# ---- merges: pairs (merges.txt) against joined bytes (tiktoken)

def test_pair_order_and_byte_order_differ_and_are_reconciled():
    vocab = {letter: i for i, letter in enumerate([*byte_letters(), "bc", "ab", "abc"])}
    order = merge_order([("b", "c"), ("a", "b"), ("ab", "c")], vocab)
    assert order[256:] == [b"bc", b"ab"]  # abc is in reach of no merge


def test_random_merge_lists_equal_tokenizers(tmp_path):
    """Merge lists that no training would give: dead merges, several pairs for one token, runs of
    one letter."""
    rng, refused = random.Random(0), 0
    for trial in range(150):
        vocab = {letter: i for i, letter in enumerate([*byte_letters(), "<pad>", "</s>"])}
        merges = []
        for _ in range(rng.randint(1, 25)):
            parts = [token for token in vocab if set(token) <= set("abc")]
            left, right = rng.choice(parts), rng.choice(parts)
            if (left, right) not in merges and len(left + right) < 9:
                merges.append((left, right))
                vocab.setdefault(left + right, len(vocab))
        (tmp_path / "vocab.json").write_text(json.dumps(vocab))
        (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]))
        try:
            tokenizer = load_tokenizer(tmp_path)
        except ValueError as error:
            assert "comes before the merges" in str(error)
            refused += 1
            continue
        peer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
        words = ["".join(rng.choices("abc"[:rng.randint(1, 3)], k=rng.randint(1, 30)))
                 for _ in range(100)]
        words += [token for token in vocab if set(token) <= set("abc")]
        check(tokenizer, lambda text: [vocab["</s>"]] + peer.encode(text).ids, words)
    assert refused < 75


# ---- files: choices and errors, with a tiny vocabulary

def tiny_files(folder: Path, specials=("<s>", "<pad>", "</s>", "<unk>")) -> dict:
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("\u0120", "hell")]
    vocab = {token: i
             for i, token in enumerate([*specials, *byte_letters(), *map("".join, merges)])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    content = {"added_tokens": [{"id": 2, "content": "</s>", "special": True}], "normalizer": None,
               "post_processor": None,
               "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
               "model": {"type": "BPE", "vocab": vocab, "merges": merges}}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return content


def test_the_longest_added_token_is_taken(tmp_path):
    content = tiny_files(tmp_path)
    size = len(content["model"]["vocab"])
    content["pre_tokenizer"].update(trim_offsets=False, use_regex=True)
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    content["added_tokens"] = [
        {"id": i, "content": text, "special": i % 2 == 0, **flags}
        for i, text in [(2, "</s>"), *enumerate(["  ", "    ", "<|a", "<|a|>", "<|a|>\n"], size)]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    peer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rng = random.Random(0)
    texts = ["a    b", "<|a|>", "<|a|>\n<|a>"]
    texts += ["".join(rng.choices(["a", " ", "  ", "<|a", "|>", "\n"], k=20)) for _ in range(300)]
    check(load_tokenizer(tmp_path), lambda text: peer.encode(text).ids, texts, exact=False)


def test_tokens_that_a_fine_tuned_opt_has_added(tmp_path):
    """Those past the embedding are not there."""
    vocab = tiny_files(tmp_path)["model"]["vocab"]
    (tmp_path / "tokenizer.json").unlink()
    size = len(vocab)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|x|>": size, "[PAD]": size + 1}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt", "vocab_size": size + 1}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a<|x|>b", bos=False) == [vocab["a"], size, vocab["b"]]
    assert len(tokenizer.encode("[PAD]", bos=False)) == 5
    assert tokenizer.vocab_size == size + 1


@pytest.mark.parametrize("name, held", [
    ("added_tokens.json", {"<|x|>": [1]}), ("added_tokens.json", {"": 300}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"\u00b2": {"content": "x"}}}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: {"content": "x"}}}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"300": {"content": 5}}})])
def test_damaged_lists_of_added_tokens_are_named(name, held, tmp_path):
    tiny_files(tmp_path)
    (tmp_path / name).write_text(json.dumps(held))
    with pytest.raises(ValueError, match=f"{name}: added token .* is no number and text"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("files", ["sentencepiece", "bytes"])
def test_halves_of_surrogate_pairs_are_read_as_what_nobody_knows(files, tmp_path):
    """As they come from a wrong JSON escape, or a terminal's odd byte."""
    name = "tiny-llama" if files == "sentencepiece" else "tiny-opt"
    tokenizer = load_tokenizer(SHIPPED[name])
    assert tokenizer.encode("a\ud83d b") == tokenizer.encode("a\ufffd b")
    assert tokenizer.encode("a\ud83d\ude00") == tokenizer.encode("a\U0001f600")


@pytest.mark.parametrize("change, kind", [
    ({"add_eos_token": True}, "both"), ({"split_special_tokens": True}, "both"),
    ({"add_prefix_space": True}, "bytes"), ({"add_prefix_space": False}, "sentencepiece")])
def test_settings_that_ask_for_more_are_refused(change, kind, tmp_path):
    for name in ("tiny-llama", "tiny-opt"):
        is_bytes = name == "tiny-opt"
        folder = tmp_path / name
        shutil.copytree(SHIPPED[name], folder)
        (folder / "tokenizer_config.json").write_text(json.dumps(change))
        if kind in ("both", "bytes" if is_bytes else "sentencepiece"):
            with pytest.raises(ValueError, match=f"{next(iter(change))} .* is not supported"):
                load_tokenizer(folder)
        else:
            load_tokenizer(folder)


def test_opt_folder_prefers_vocab_and_merges_other_folders_tokenizer_json(tmp_path):
    tiny_files(tmp_path)
    assert load_tokenizer(tmp_path).bos_id is None  # no post_processor, no BOS
    config = '{"model_type": "opt", "bos_token_id": 2, "eos_token_id": [2, 3]}'
    (tmp_path / "config.json").write_text(config)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (2, 2)
    text = " hello hell\u00e9\0\n"
    assert tokenizer.encode(text)[:2] == [2, tokenizer.vocab_size - 1]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("a</s>")[-1] == 2 and tokenizer.encode("<unk>")[-1] != 3
    config = '{"add_bos_token": false, "eos_token": {"content": "<pad>"}}'
    (tmp_path / "tokenizer_config.json").write_text(config)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 1)


def test_bos_of_tokenizer_json_from_template_or_config(tmp_path):
    content = tiny_files(tmp_path)
    content["post_processor"] = {"type": "TemplateProcessing",
                                 "special_tokens": {"<s>": {"ids": [0]}},
                                 "single": [{"SpecialToken": {"id": "<s>"}},
                                            {"Sequence": {"id": "A"}}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).encode("") == [0]
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true, "bos_token": "</s>"}')
    assert load_tokenizer(tmp_path).encode("") == [2]


@pytest.mark.parametrize("change, message", [
    ({"normalizer": {"type": "NFC"}}, "normalizer NFC"),
    ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
    ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "pre_tokenizer"),
    ({"pre_tokenizer": {"type": "Metaspace"}}, "tokenizer.model beside"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": r"\p{L}+"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}},
        "does not match all text"),
    ({"model": {"type": "Unigram"}}, "Unigram"),
    ({"model": {"type": "BPE", "vocab": {}}}, "merges"),
    ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}, "merge 1, a b"),
    ({"post_processor": {"type": "BertProcessing"}}, "BertProcessing"),
    ({"added_tokens": [{"id": 2, "content": "<x>", "lstrip": True}]}, "<x>"),
    ({"added_tokens": [{"id": 999, "content": "hell", "special": False}]}, "has two ids"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}}, "pre_tokenizer"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}+|[\s\S]"}, "behavior": "Isolated",
         "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}}, "pre_tokenizer"),
])
def test_unsupported_parts_are_named(tmp_path, change, message):
    (tmp_path / "tokenizer.json").write_text(json.dumps(tiny_files(tmp_path) | change))
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.model, tokenizer.json"):
        load_tokenizer(tmp_path)
    for content, message in (('{"model": ', "not valid JSON"),
                             ("[]", "not valid JSON with an object"),
                             ('{"model": "x"}', "not a whole tokenizer.json")):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path)
    for content in (b"version https://git-lfs.github.com/spec/v1\n", b"IQ== 0\nIg==\n",
                    b"IQ== 0\nIg== 5\n", b""):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ValueError, match="tokenizer.model"):
            (tmp_path / "tokenizer.json").unlink(missing_ok=True)
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    tiny_files(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json is not valid JSON with an object"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "merges.txt").write_bytes(b"\xe9")
    with pytest.raises(ValueError, match="merges.txt is not UTF-8"):
        load_tokenizer(tmp_path)


def cut_merges(folder):
    lines = (folder / "merges.txt").read_text("utf-8").splitlines()
    (folder / "merges.txt").write_text("\n".join(lines[:-1]), "utf-8")


def edit_vocab(**changes):
    def change(folder):
        vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
        (folder / "vocab.json").write_text(json.dumps({t: changes.get(t, i)
                                                       for t, i in vocab.items()
                                                       if changes.get(t, i) is not None}))
    return change


@pytest.mark.parametrize("change, message", [
    (cut_merges,
     "merges.txt: 1 tokens of the vocabulary, such as 'Ġhell', are made by none of the 3 merges"),
    (lambda folder: (folder / "merges.txt").write_text(""), "made by none of the 0 merges"),
    (edit_vocab(a=-1), "vocab.json: token 'a' has id -1"),
    (edit_vocab(a=1.5), "token 'a' has id 1.5"),
    (edit_vocab(a=True), "token 'a' has id True"), (edit_vocab(a="7"), "token 'a' has id 7"),
    (edit_vocab(a=5), "tokens .* have the same id 5"),
    (edit_vocab(a=2 ** 62), "no whole number from 0 on"),
    (edit_vocab(a=None), "vocab.json has no token for 'a'"),
    (edit_vocab(a=264), "its tokenizer has 265 tokens, its model's embedding 264 rows"),
    (lambda folder: (folder / "vocab.json").write_text('{"</s>": 0, "</s>": 1}'),
     "'</s>' comes twice"),
    (lambda folder: (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}'),
     "does not hold '<end>'"),
    (lambda folder: (folder / "tokenizer_config.json").write_text('{"eos_token": [2]}'),
     "eos_token .* wrong kind"),
    (lambda folder: (folder / "tokenizer_config.json").write_text('{"add_bos_token": "false"}'),
     "add_bos_token 'false'"),
    (lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": 3000}'),
     "eos_token_id 3000 is none"),
    (lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": 2.0}'),
     "eos_token_id 2.0"),
    (lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": ["2"]}'),
     "eos_token_id 2 is none"),
])
def test_damaged_vocabularies_are_one_line(tmp_path, change, message):
    tiny_files(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "opt", "vocab_size": 264}')
    assert load_tokenizer(tmp_path).vocab_size == 264
    change(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_rank_file_cut_at_a_line_shows_beside_its_model(tmp_path):
    ranks = [base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256)]
    ranks.append(base64.b64encode(b"he") + b" 256\n")
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 257 + len(LLAMA3_SPECIAL)}))
    (tmp_path / "tokenizer.model").write_bytes(b"".join(ranks))
    assert load_tokenizer(tmp_path).encode("he")[1:] == [256]
    for lines, message in ((ranks[:-1], "a file is cut short"),
                           (ranks[:-2] + ranks[-1:], "ranks are not 0 to 255"),
                           ([b"%s %d\n" % (line.split()[0], i)
                             for i, line in enumerate(ranks[:7] + ranks[8:])], "byte 7"),
                           (ranks[:-1] + [b"aGU=! 256\n"], "not all lines")):
        (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path)


def test_patterns_cut_every_character():
    for words in (GPT2_WORDS, LLAMA3_WORDS):
        encoding = tiktoken.Encoding("x", pat_str=words, special_tokens={},
                                     mergeable_ranks={bytes([b]): b for b in range(256)})
        text = "".join(f"a{chr(c)} {chr(c)}" for c in range(0x3100))
        assert encoding.decode(encoding.encode_ordinary(text)) == text


@needs_shared
def test_long_texts_are_quick():
    tokenizer = load_tokenizer(SHARED / "tokenizers" / "opt")
    for text in ("ab" * 500_000, real_texts()[0] * 10, " " * 100_000 + "x"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
