"""A seeded fuzzer of everything that is read: many kinds of folder, each damaged in one way, loaded
in a process of its own.

    python tests/fuzz.py --cases 6000 --seeds 0 1 2      # thousands; test_fuzz.py: hundreds
    python tests/fuzz.py --only packed-nm-offset/1/17    # one case again, with its traceback

A load may end in two ways: one line (ValueError or OSError) that names a file of the folder, or a
model. Everything else is a finding: other exceptions, more than 10 seconds of computing, a file
opened outside the folder, a program started, a message without its file. Loads that end in a model
are compared with the undamaged one:

    same        the damage changed nothing that is used
    bytes       bytes inside a tensor changed, or whole tensors were exchanged, in a file without
                checksums
    other       the folder is a valid other model: a number in a configuration, a merge or a score
                in a tokenizer
    unnoticed   a finding: none of these, such as changed bytes under a checksum

Left out: what the operating system does to a file that shrinks while it is mapped.
"""
import argparse
import collections
import contextlib
import copy
import dataclasses
import hashlib
import io
import json
import os
import random
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from safetensors.torch import load_file, save_file
from test_model import to_meta
from test_packed_model import models
from test_tokenizer import LLAMA3_SPECIAL, tiny_files

import compress
import train
from data.chat import ChatTemplate
from data.checkpoint import write_safetensors
from data.config import Config
from data.tiny.make_tokenizers import sentencepiece_model
from data.tokenizer import load_tokenizer
from export import from_peft, to_peft
from kernels.linear import PackedLinear
from kernels.unpacking import unpack
from model import Transformer, load_model, save_index, save_model, save_shard
from prompt import load_prompt, save_prompt

LIMIT = 10                                  # seconds of computing a load may take,
STUCK = 60                                  # and of waiting, which a busy machine makes longer
MEMORY = 4 << 30                            # bytes it may take
SAMPLES = [" hello hell\u00e9\0\n", "aZ 12 \u4e2d </s> <|eot_id|>", "def f(x):\n    return x\n"]
TOKENS = torch.arange(12).view(1, 12)


class Kind(NamedTuple):
    name: str
    build: callable                         # build(folder) writes it
    load: callable                          # load(folder) -> {what: digest}
    writes: bool = False                    # loading may write into the folder


def write_json(file: Path, value) -> None:
    file.write_text(json.dumps(value))


# --------------------------------------------------------------------------------------------------
# The kinds of folder

def digest(value) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def read_model(folder: Path) -> dict:
    """All that a model is, in a few digests."""
    def whole(tensor) -> str:
        return hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()

    model = load_model(folder)
    weights = [(name, whole(p)) for name, p in sorted(model.named_parameters())]
    for name, m in model.linears():
        if isinstance(m, PackedLinear):
            weights.append((name, whole(unpack(m.packed, torch.float32))))
    tokens = TOKENS[:, :min(12, model.config.max_positions)]
    with torch.no_grad():
        model(tokens % model.config.vocab_size)
    config = dataclasses.asdict(model.config)
    return {"config": digest(config), "weights": digest(weights)}


def read_tokens(folder: Path) -> dict:
    t = load_tokenizer(folder)
    ids = [t.encode(text) for text in SAMPLES]
    texts = [t.decode(each) for each in ids]
    return {"tokenizer": digest((t.bos_id, t.eos_id, t.vocab_size, ids, texts))}


def read_both(folder: Path) -> dict:
    return {**read_model(folder), **read_tokens(folder)}


def read_prompt(folder: Path, name: str = "prompt.safetensors") -> dict:
    prompt, settings = load_prompt(folder / name)
    return {"weights": digest(prompt.numpy().tobytes()), "config": digest(settings)}


def read_prompt_pt(folder: Path) -> dict:
    return read_prompt(folder, "prompt.pt")


def read_adapter(folder: Path) -> dict:
    return {"weights": digest(from_peft(folder).numpy().tobytes())}


def read_chat(folder: Path) -> dict:
    tokenizer = load_tokenizer(folder)
    template = ChatTemplate.of(folder)
    roles = ("system", "user", "assistant", "user")
    talk = [{"role": role, "content": "hello"} for role in roles]
    said = template
    if template:
        said = template.encode(tokenizer, talk), sorted(template.stops(tokenizer))
    return {"tokenizer": digest(said)}


def resume(folder: Path, *more: str) -> dict:
    """Go on with the run in folder/out; folder/m is its model."""
    words = [
        "--model", "m",
        "--data", "a.txt",
        "--calib", "a.txt",
        "--seqlen", "16",
        "--max-tokens", "32",
        "--nsamples", "2",
        "--batch-size", "2",
        "--steps", "8",
        "--lr", "0.1",
        "--train-data", "a.txt",
        "--prompt-tokens", "3",
        "--val-windows", "1",
        "--heal", "2",
        "--device", "cpu",
        "--dtype", "float32",
        "--out", "out",
        *more,
    ]
    before = os.getcwd()
    os.chdir(folder)                        # a run knows its model by the path that was given
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            train.main(train.flags().parse_args(words))
    finally:
        os.chdir(before)
    out = folder / "out"
    weights = []
    for file in sorted(out.rglob("*.safetensors")):
        if "twin" in file.name:
            continue
        tensors = []
        for name, t in load_file(file).items():
            tensors.append((name, t.flatten().view(torch.uint8).numpy().tobytes()))
        weights.append((file.name, digest(sorted(tensors))))
    report = json.loads((out / "report.json").read_text())
    rows = [(row["name"], row["perplexity"]) for row in report["rows"]]
    return {"weights": digest(weights), "config": digest(rows)}


def killed(where: str):
    """A run that ends while it learns, or before the last file of the compressed model."""
    def build(folder: Path):
        (folder / "m").mkdir()
        hf("llama")(folder / "m")
        (folder / "a.txt").write_text("hello hell shell fell\n" * 60)

        def stop(*_, **__):
            raise KeyboardInterrupt

        def stop_later(items, title):
            for i in items:
                if i == 3 and title == "learning the prompt":
                    stop()
                yield i

        if where == "learning":
            place, name, instead = train, "Progress", stop_later
        else:                               # walking
            place, name, instead = compress, "save_index", stop
        kept = getattr(place, name)
        setattr(place, name, instead)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                resume(folder)
        except KeyboardInterrupt:
            pass
        finally:
            setattr(place, name, kept)
    return build


def go_on(folder: Path) -> dict:
    return resume(folder, "--resume")


def dense(family: str, **changes) -> Transformer:
    torch.manual_seed(0)
    opt = family == "opt"
    settings = {
        "vocab_size": 264,
        "d_model": 32,
        "n_layer": 2,
        "n_head": 4,
        "d_ff": 64,
        "max_positions": 64,
        "tied": opt,
        "attention_bias": opt,
        "mlp_bias": opt,
        **changes,
    }
    config = Config(family, **settings)
    model = Transformer(config).eval().requires_grad_(False)
    for p in model.parameters():
        p.data = torch.randn_like(p) * 0.2
    return model


def hf(family: str, **changes):
    def build(folder: Path):
        file = folder / "model.safetensors"
        save_model(dense(family, **changes), folder)
        save_file(load_file(file), file, {"format": "pt"})      # as others do: without checksums
        tiny_files(folder)
        for name in ("tokenizer.json",) if family == "opt" else ("vocab.json", "merges.txt"):
            (folder / name).unlink()
        write_json(folder / "tokenizer_config.json", {
            "bos_token": "</s>",
            "eos_token": {"content": "</s>", "lstrip": False},
            "add_bos_token": True,
        })
        write_json(folder / "generation_config.json", {
            "bos_token_id": 2,
            "eos_token_id": [2, 3],
            "top_p": 0.9,
        })
    return build


def shards(build, suffix: str, old: bool = False):
    """The same folder with its weights in two files and an index; suffix "bin": torch files; "":
    one torch file."""
    def split(folder: Path):
        build(folder)
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        if not suffix:
            new = not old
            torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=new)
            return
        stem = "pytorch_model" if suffix == "bin" else "model"
        names = sorted(tensors)
        files = {name: f"{stem}-0000{1 + i % 2}-of-00002.{suffix}" for i, name in enumerate(names)}
        for file in sorted(set(files.values())):
            part = {name: tensors[name] for name in names if files[name] == file}
            if suffix == "bin":
                torch.save(part, folder / file)
            else:
                save_file(part, folder / file)
        index = {"metadata": {"total_size": 1}, "weight_map": files}
        write_json(folder / f"{stem}.{suffix}.index.json", index)
    return split


def meta(n: int):
    def build(folder: Path):
        with tempfile.TemporaryDirectory() as name:
            place = Path(name)
            save_model(dense("llama", vocab_size=400), place)
            to_meta(place, place / "meta", n, False)
            shutil.copytree(place / "meta", folder, dirs_exist_ok=True)
        sentencepiece(folder)
        (folder / "config.json").unlink()
    return build


def packed(family: str, format: str, grid: str, groupsize: int = -1, shuffled: bool = False,
           old: bool = False):
    def build(folder: Path):
        model, *_ = models(family, format, grid, 4, groupsize, shuffled)
        save_model(model, folder)
        if old:                             # format 1: no checksums, no version
            file = folder / "model.safetensors"
            save_file(load_file(file), file)
            config = json.loads((folder / "config.json").read_text())
            layers = config["quantization_config"]["layers"]
            config["model_type"] = family
            config["quantization_config"] = {
                "quant_method": "compress-then-prompt",
                "layers": layers,
            }
            write_json(folder / "config.json", config)
    return build


def packed_shards(folder: Path):
    model = models("llama", "unstructured", "offset")[0]
    blocks = list(model.blocks)
    model.blocks = torch.nn.ModuleList()
    for part, module in enumerate([model, *blocks]):
        save_shard(folder, module, part, model.config)
    save_index(folder, model.config)


def prompt_file(name: str):
    def build(folder: Path):
        prompt = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
        if name.endswith(".pt"):
            torch.save({"soft_prompt": prompt, "lr": 0.1}, folder / name)
        else:
            save_prompt(folder / name, prompt, {"lr": 0.1})
    return build


def adapter(folder: Path):
    to_peft("model", dense("llama").config, torch.randn(5, 32), folder)


def sentencepiece(folder: Path):
    every = ["hello", "hell", "shell", "fell", "12", "return", "def", "x"]
    words = [" ".join(every[i % 8:]) for i in range(80)]
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(words, 300))
    (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": 400}')


def ranks(folder: Path):
    import base64
    tokens = [bytes([b]) for b in range(256)] + [b"he", b"ll", b"hell", b" hell"]
    lines = [base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    vocab_size = len(tokens) + len(LLAMA3_SPECIAL)
    write_json(folder / "config.json", {"model_type": "llama", "vocab_size": vocab_size})


TEMPLATE = ("{% for m in messages %}"
            "{% if m['role'] == 'user' %}[{{ m['content'] | trim }}]"
            "{% elif loop.first %}{{ m['content'] ~ '\\n' }}"
            "{% else %}{{ m.content + eos_token }}"
            "{% endif %}{% endfor %}")


def chat(folder: Path):
    tokenizer_files("tokenizer.json")(folder)
    write_json(folder / "tokenizer_config.json", {
        "bos_token": "</s>",
        "eos_token": "</s>",
        "chat_template": TEMPLATE,
    })


def chat_file(folder: Path):
    tokenizer_files("tokenizer.json")(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def tokenizer_files(*unwanted: str):
    def build(folder: Path):
        tiny_files(folder)
        for name in unwanted:
            (folder / name).unlink()
        config = {"model_type": "opt", "vocab_size": 264, "eos_token_id": 2}
        write_json(folder / "config.json", config)
        settings = {"bos_token": "</s>", "add_bos_token": True}
        write_json(folder / "tokenizer_config.json", settings)
    return build


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def packed_kinds():
    """Every format on both grids, with groups, and as format 1 wrote it."""
    for format in ("dense", "nm", "unstructured"):
        yield Kind(f"packed-{format}-uniform", packed("opt", format, "uniform"), read_model)
        yield Kind(f"packed-{format}-offset", packed("llama", format, "offset"), read_model)
    for format, grid in (("dense", "uniform"), ("nm", "offset"), ("unstructured", "uniform")):
        yield Kind(f"packed-{format}-groups", packed("llama", format, grid, 32), read_model)
    yield Kind("packed-g_idx", packed("opt", "dense", "uniform", 32, True), read_model)
    for format, grid, groupsize, shuffled in (("dense", "uniform", 32, True),
                                              ("nm", "offset", -1, False),
                                              ("unstructured", "offset", 32, False)):
        build = packed("opt", format, grid, groupsize, shuffled, old=True)
        yield Kind(f"packed-old-{format}", build, read_model)


KINDS = [
    Kind("hf-llama", hf("llama"), read_both),
    Kind("hf-llama-gqa", hf("llama", n_kv_head=2, tied=True), read_both),
    Kind("hf-llama-rope", hf("llama", rope_theta=5e5, rope_scaling=LLAMA3_ROPE), read_both),
    Kind("hf-llama-shards", shards(hf("llama"), "safetensors"), read_both),
    Kind("hf-llama-bin", shards(hf("llama"), ""), read_both),
    Kind("hf-opt-old-bin", shards(hf("opt"), "", old=True), read_both),
    Kind("hf-opt-bin-shards", shards(hf("opt"), "bin"), read_both),
    Kind("hf-opt", hf("opt"), read_both),
    Kind("hf-opt-350m", hf("opt", d_embed=16, pre_norm=False, final_norm=False), read_both),
    Kind("meta", meta(1), read_both),
    Kind("meta-shards", meta(2), read_both),
    *packed_kinds(),
    Kind("packed-shards", packed_shards, read_model),
    Kind("prompt", prompt_file("prompt.safetensors"), read_prompt),
    Kind("prompt-pt", prompt_file("prompt.pt"), read_prompt_pt),
    Kind("adapter", adapter, read_adapter),
    Kind("sentencepiece", sentencepiece, read_tokens),
    Kind("ranks", ranks, read_tokens),
    Kind("tokenizer-json", tokenizer_files("vocab.json", "merges.txt"), read_tokens),
    Kind("vocab-merges", tokenizer_files("tokenizer.json"), read_tokens),
    Kind("chat", chat, read_chat),
    Kind("chat-file", chat_file, read_chat),
    Kind("run-learning", killed("learning"), go_on, writes=True),
    Kind("run-walking", killed("walking"), go_on, writes=True),
]


# --------------------------------------------------------------------------------------------------
# Damage. Each function changes one file (or the folder) and returns what it did. A seed names its
# case for ever: what is drawn, from how many, and in which order, stays. A way that stands twice in
# a list is drawn twice as often.

ODD = [
    None, -1, 0, 1, 1.5, 2, 7,
    10 ** 6, 2 ** 31, 2 ** 62, 2 ** 64, -2 ** 63, 10 ** 400,
    float("nan"), float("inf"), -0.0, 1e-30, 1e300,
    True, False,
    "", "16", "false", "x" * 5000, "\0",
    "../outside/model.safetensors", "/etc/passwd", "\ud800",
    [], [1], [[]],
    {}, {"a": 1}, {"content": 3},
    [None], ["a", "b"], [-1, 3], [2 ** 62, 2 ** 62],
]


BYTES = ["flip", "flip", "set", "zeros", "ones", "cut", "cut", "drop", "insert", "append", "copy",
         "swap", "empty", "line"]


def bytes_damage(file: Path, r: random.Random) -> str:
    data = bytearray(file.read_bytes())
    how = r.choice(BYTES)
    n = len(data)
    at = r.randrange(n or 1)
    if r.random() < 0.5:
        at = min(at, r.randrange(1000))     # headers are where the danger is
    size = min(r.choice([1, 2, 8, 64, 1000]), max(1, n - at))
    if how == "flip" and n:
        data[at] ^= 1 << r.randrange(8)
    elif how == "set" and n:
        data[at] = r.randrange(256)
    elif how in ("zeros", "ones"):
        data[at:at + size] = (b"\0" if how == "zeros" else b"\xff") * size
    elif how == "cut":
        del data[r.choice([at, n - 1, n - 8, n // 2]):]
    elif how == "drop":
        del data[at:at + size]
    elif how == "insert":
        data[at:at] = r.randbytes(size)
    elif how == "append":
        data += r.randbytes(size)
    elif how == "copy":
        data[at:at] = data[at:at + size]
    elif how == "swap":
        other = r.randrange(n or 1)
        one = data[at:at + size]
        data[at:at + size] = data[other:other + size]
        data[other:other + size] = one
    elif how == "empty":
        data.clear()
    elif how == "line":
        lines = data.split(b"\n")
        i = r.randrange(len(lines))
        part = lines[i][:r.randrange(len(lines[i]) + 1)]
        lines[i:i + 1] = r.choice([[], [lines[i]] * 2, [part], [lines[i], b""]])
        end = i + r.choice([1, len(lines)])
        data = bytearray(b"\n".join(lines[:end]))
    file.write_bytes(data)
    return f"bytes:{how} at {at}"


def file_damage(file: Path, r: random.Random) -> str:
    how = r.choice(["delete", "directory", "other", "loop", "unreadable", "twin"])
    others = sorted(f for f in file.parent.iterdir() if f != file and f.is_file())
    data = file.read_bytes()
    if how == "twin" and file.suffix in (".safetensors", ".bin", ".pth"):
        shutil.copy(file, file.with_name(f"model-twin{file.suffix}"))
        return "file:twin"
    file.unlink()
    if how == "directory":
        file.mkdir()
    elif how == "other" and others:
        shutil.copy(r.choice(others), file)
    elif how == "loop":
        file.symlink_to(file.name)
    elif how == "unreadable":
        file.write_bytes(data[::-1])
    return f"file:{how}"


def leaves(tree, at=()) -> list[tuple]:
    """Paths to every value of a JSON tree, a thousand at most."""
    found = [at] if at else []
    items = ()
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    for key, value in list(items)[:400]:
        found += leaves(value, (*at, key))
    return found[:1000]


def tree_damage(tree: dict, r: random.Random) -> str:
    """One change in a JSON tree."""
    paths = leaves(tree)
    if not paths:
        return "tree:nothing"
    if r.random() >= 0.5:                   # near the top, where there is anything
        paths = [p for p in paths if len(p) <= 2] or paths
    path = r.choice(paths)
    *above, key = path
    parent = tree
    for step in above:
        parent = parent[step]
    how = r.choice(["odd"] * 6 + ["near", "delete", "swap", "deep", "rename"])
    if how == "near" and isinstance(parent[key], (int, float)):
        parent[key] += r.choice([-1, 1, 0.5, 8])
    elif how == "delete":
        del parent[key]
    elif how == "swap":
        keys = list(parent) if isinstance(parent, dict) else range(len(parent))
        other = r.choice(keys)
        parent[key], parent[other] = parent[other], parent[key]
    elif how == "deep":
        parent[key] = json.loads("[" * 400 + "]" * 400)
    elif how == "rename" and isinstance(parent, dict):
        value = parent.pop(key)
        parent[str(key) + r.choice(["", "x", " "])] = value
    else:
        parent[key] = copy.deepcopy(r.choice(ODD))
    name = ".".join(map(str, path))
    return f"tree:{how} {name[:60]}"


def with_twice(tree: dict, key, value) -> str:
    """The JSON of a tree with one key more, which it has already."""
    return json.dumps(tree)[:-1] + f", {json.dumps(key)}: {json.dumps(value)}}}"


def json_damage(file: Path, r: random.Random) -> str:
    tree = json.loads(file.read_text("utf-8"))
    how = r.choice(["tree"] * 8 + ["double", "nested", "whole"])
    if how == "tree":
        how = tree_damage(tree, r)
        text = json.dumps(tree)
    elif how == "double" and tree:
        key = r.choice(list(tree))
        text = with_twice(tree, key, r.choice(ODD[:12]))
    elif how == "nested":
        text = "{\"a\":" * 100_000
    else:
        text = json.dumps(r.choice(ODD))
    file.write_text(text, "utf-8")
    return f"json:{how}"


HEADER = ["tree"] * 6 + ["length", "offsets", "offsets", "overlap", "gap", "double", "reorder",
                         "sums"]


def header_damage(file: Path, r: random.Random) -> str:
    """The header of a safetensors file, with the tensors where they were."""
    data = file.read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + n])
    body = data[8 + n:]
    how = r.choice(HEADER)
    names = [name for name in header if name != "__metadata__"]
    entry = header[r.choice(names)]
    length = None
    if how == "tree":
        how = tree_damage(header, r)
    elif how == "length":
        length = r.choice([0, 1, n - 1, n + 1, n + 8, len(data),
                           2 ** 31, 2 ** 40, 2 ** 63, 2 ** 64 - 1])
    elif how == "offsets":
        move = r.choice([-1, 1, -2, 2, 64, -64, 2 ** 40, -2 ** 40])
        entry["data_offsets"] = [o + move for o in entry["data_offsets"]]
    elif how == "overlap":
        other = header[r.choice(names)]
        entry["data_offsets"] = list(other["data_offsets"])
        entry["dtype"] = other["dtype"]
        entry["shape"] = list(other["shape"])
    elif how == "gap":
        body += bytes(64)
        if r.random() < 0.5:
            last = max((header[name] for name in names), key=lambda e: e["data_offsets"][1])
            last["data_offsets"] = [o + 64 for o in last["data_offsets"]]
    elif how == "reorder":                  # says the same, if nobody minds the order
        header = dict(r.sample(list(header.items()), len(header)))
    elif how == "sums" and "crc32" in header.get("__metadata__", {}):
        said = header["__metadata__"]
        said["crc32"] = r.choice(["", "{}", "[]", "{\"a\": \"z\"}", said["crc32"][:-9] + "}"])
    text = json.dumps(header)
    if how == "double":
        name = r.choice(names)
        text = with_twice(header, name, header[r.choice(names)])
    text = text.encode()
    if length is None:
        length = len(text)
    file.write_bytes(struct.pack("<Q", length) + text + body)
    return f"header:{how}"


TENSORS = ["nan", "inf", "type", "type", "shape", "shape", "empty", "scalar", "value", "zeros"]
TYPES = [torch.int8, torch.int64, torch.float64, torch.bool, torch.int32, torch.float16,
         torch.bfloat16]


def odd_tensor(t: torch.Tensor, r: random.Random) -> tuple[str, torch.Tensor]:
    """A tensor damaged, or something in its place."""
    how = r.choice(TENSORS)
    t = t.clone()
    if how in ("nan", "inf", "value", "zeros"):
        if how in ("nan", "inf") and not t.is_floating_point():
            how = "value"
        at = r.randrange(max(1, t.numel()))
        if t.numel():
            value = {"nan": float("nan"), "inf": float("-inf"), "zeros": 0}.get(how, 3)
            t.view(-1)[at] = value
    elif how == "type":
        t = t.to(r.choice(TYPES))
    elif how == "shape":
        turned = t.T if t.dim() == 2 else t[1:]
        t = r.choice([t[:-1], t[None], t.reshape(-1), turned]).contiguous()
    elif how == "empty":
        t = t[:0]
    else:
        t = t.reshape(-1)[:1].sum()
    return how, t


def tensors_damage(file: Path, r: random.Random) -> str:
    """One tensor of a safetensors file, written again: by the package (no checksums) or by us
    (right checksums)."""
    tensors = load_file(file)
    names = list(tensors)
    name = r.choice(names)
    other = r.choice(names)
    how = r.choice(["odd"] * 5 + ["delete", "swap", "rename", "add"])
    if how == "odd":
        how, tensors[name] = odd_tensor(tensors[name], r)
    elif how == "delete":
        del tensors[name]
    elif how == "swap":
        tensors[name], tensors[other] = tensors[other].clone(), tensors[name].clone()
    elif how == "rename":
        value = tensors.pop(name)
        new = r.choice([name + "x", name.removeprefix("model."), "", "a" * 1000])
        tensors[new] = value
    else:
        group_index = name.removesuffix("weight") + "g_idx"
        new = r.choice([name.removeprefix("model."), group_index, "x"])
        tensors[new] = tensors[name].clone()
    if r.random() < 0.5:
        save_file(tensors, file)
        return f"tensors:{how} {name}"
    with unchecked():
        write_safetensors(file, copy.copy(tensors))
    return f"tensors+sums:{how} {name}"


@contextlib.contextmanager
def unchecked():
    """write_safetensors, without a thought for what is written."""
    import data.checkpoint as c
    kept = c.verify_file
    c.verify_file = lambda path: None
    try:
        yield
    finally:
        c.verify_file = kept


class Evil:
    """A pickle that would start a program."""

    def __reduce__(self):
        return os.system, ("true",)


TORCH = ["odd"] * 4 + ["meta", "sparse", "quantized", "nested", "repeated", "key", "number", "evil",
                       "list", "delete", "subclass", "complex", "deep", "swap", "tensor"]


def strange_tensor(how: str, t: torch.Tensor, r: random.Random) -> torch.Tensor:
    """A tensor of a kind that no model stores."""
    if how == "meta":
        return t.to("meta")
    if how == "sparse":
        return t.float().to_sparse()
    if how == "quantized":
        return torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)
    if how == "nested":
        return torch.nested.nested_tensor([t.float().reshape(-1)])
    if how == "complex":
        return t.to(torch.complex64)
    if how == "repeated":
        return torch.zeros(1).expand(*t.shape[:-1], r.choice([t.shape[-1], 2 ** 40]))
    return torch.nn.Parameter(t.float())    # a subclass


def torch_damage(file: Path, r: random.Random) -> str:
    """What a torch file holds, written again."""
    held = torch.load(file, weights_only=True)
    names = [n for n in held if torch.is_tensor(held[n])]
    name = r.choice(names)
    t = held[name]
    how = r.choice(TORCH)
    if how == "odd":
        how, held[name] = odd_tensor(t, r)
    elif how in ("meta", "sparse", "quantized", "nested", "repeated", "complex", "subclass"):
        held[name] = strange_tensor(how, t, r)
    elif how == "key":
        value = held.pop(name)
        held[r.choice([3, None, (1, 2), b"x"])] = value
    elif how == "number":
        held[name] = r.choice([3, "x", None, [t], {"a": t}])
    elif how == "evil":
        held[r.choice([name, "x"])] = Evil()
    elif how == "list":
        held = list(held.values())
    elif how == "delete":
        del held[name]
    elif how == "deep":
        for _ in range(300):
            held = [held]
    elif how == "swap":
        other = r.choice(names)
        held[name] = held[other].clone()
        held[other] = t.clone()
    elif how == "tensor":
        held = t
    new = r.random() < 0.8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(held, file, _use_new_zipfile_serialization=new)
    return f"torch:{how} {name}"


# What the files of one kind may say, and what each other may not.

PATTERNS = [
    {"Regex": "("},
    {"Regex": ""},
    {"Regex": r"(\w+\s?)+$|."},
    {"Regex": "(?<=a)b"},
    {"Regex": 3},
    {"Regex": "a*"},
    {"String": " "},
    {"Regex": r"\p{L}+|\P{L}"},
    {"Regex": "x" * 100_000},
    {"Regex": "(" * 500 + ")" * 500},
    {"Regex": "(a{1000}){1000}{1000}|."},
    {"Regex": "[\\s\\S]"},
]


def sequence(*parts) -> dict:
    return {"type": "Sequence", "pretokenizers": list(parts)}


def byte_level(**more) -> dict:
    return {"type": "ByteLevel", "add_prefix_space": False, **more}


def split_by(pattern) -> dict:
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return sequence(split, byte_level(use_regex=False))


def template_for(bos_id) -> dict:
    """A post-processor that puts a token of this number before the text."""
    single = [{"SpecialToken": {"id": "a"}}, {"Sequence": {"id": "A"}}]
    return {"type": "TemplateProcessing", "single": single,
            "special_tokens": {"a": {"ids": [bos_id]}}}


def added(number: int, content: str, special=True) -> dict:
    return {"id": number, "content": content, "special": special}


PARTS = {
    "pre_tokenizer": [
        {"type": "Metaspace", "replacement": "_"},
        {"type": "Whitespace"},
        {"type": "BertPreTokenizer"},
        sequence(),
        {"type": "Sequence"},
        sequence(sequence({"type": "ByteLevel"})),
        sequence({"type": "Digits", "individual_digits": True}, byte_level()),
        *map(split_by, PATTERNS),
        {"type": "ByteLevel"},
        byte_level(use_regex=False),
    ],
    "normalizer": [
        {"type": "NFC"},
        {"type": "Sequence", "normalizers": []},
        {},
        [],
        "NFC",
        {"type": None},
    ],
    "post_processor": [
        {"type": "ByteLevel"},
        {"type": "BertProcessing"},
        {"type": "Sequence", "processors": [None]},
        [],
        {},
        {"type": "TemplateProcessing"},
        {"type": "TemplateProcessing", "single": [], "special_tokens": {}},
        template_for(10 ** 9),
        template_for("2"),
    ],
    "decoder": [None, {"type": "Metaspace"}, 7],
    "added_tokens": [
        [],
        None,
        {},
        [added(2, "</s>")] * 2,
        [added(2, "")],
        [added(2, "e", special=False)],
        [added(300, "\0", special="yes")],
        [added(4000, "x" * 100_000)],
        [added(-1, "x")],
        [added(i, f"<{i}>") for i in range(264, 3000)],
        [[2, "</s>"]],
        ["</s>"],
    ],
}
RUINS = [
    "{% for a in messages %}{% for b in messages %}{% for c in messages %}",
    "{% for a in 'x' %}" * 300 + "{% endfor %}" * 300,
    "{% set ns = namespace(x='ab') %}"
    "{% for a in messages %}{% for b in messages %}"
    "{% for c in messages %}{% for d in messages %}"
    "{% set ns.x = ns.x + ns.x %}"
    "{% endfor %}{% endfor %}{% endfor %}{% endfor %}{{ ns.x }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%999999999999d' % 1 }}",
    "{{ 'a'.replace('', messages | string) }}",
    "{{ 1 % 0 }}",
    "{{ 9 ** 9 ** 9 ** 9 }}",
    "{{ " + "(" * 3000 + ")" * 3000 + " }}",
    "{{ " + "-" * 50_000 + "1 }}",
    "{{ " + "a." * 20_000 + "b }}",
    "{{ 'a' 'b }}",
    "{% if %}",
    "{{",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages[0].__init__ }}",
    "{{ messages[10 ** 9] }}",
    "{{ messages[::0] }}",
    "{% endfor %}",
    "{% for a, b in messages %}{% endfor %}",
    "{% set messages = 3 %}{{ messages[0] }}",
    "{{ messages | join }}",
    "{{ loop.index }}",
    "{{ raise_exception() }}",
    "{{ raise_exception('a\nb') }}",
    "{{ 'x' | default(1, 2, 3) }}",
    "{{ {[]: 1} }}",
    "{% set ns.x = 1 %}",
    "{% if '" + "a\\" * 5000 + " %}",
    "{{ \"" * 3000,
    "{% for a in messages.__class__ %}{% endfor %}",
    "{{ messages.items() }}",
    "{{ 'a' < 1 }}",
    "{{ namespace(**messages) }}",
    "{{ lambda: 1 }}",
    "{{ [x for x in messages] }}",
    "{# never closed",
    "{{ '\ud800' }}",
    "{% for a in 'ab'.replace('a', 'b' ~ messages) | list %}{{ messages | string }}{% endfor %}",
]


INDEX = ["move", "one", "drop", "extra", "odd", "twice", "cross", "inside"]


def odd_places(file: str) -> list[str]:
    """Where an index may say that a file lies."""
    return [
        "./" + file,
        "x/../" + file,
        "../outside/" + file,
        "/etc/passwd",
        "\0",
        "",
        ".",
        "..",
        file + "/",
        file.upper(),
        file + "\0",
        "\u202e" + file,
        "a" * 300,
        "con:",
        "..\\outside",
        "~/x",
        "file:///etc/passwd",
        "config.json",
        file + " ",
        "tokenizer_config.json",
    ]


def index_damage(file: Path, r: random.Random) -> str:
    """An index of shards against the shards beside it."""
    held = json.loads(file.read_text())
    names = held["weight_map"]
    files = sorted(set(names.values()))
    name = r.choice(list(names))
    how = r.choice(INDEX)
    if how == "move":
        names[name] = next(f for f in files if f != names[name])
    elif how == "one":
        held["weight_map"] = dict.fromkeys(names, r.choice(files))
    elif how == "drop":
        del names[name]
    elif how == "extra":
        its = r.choice(files)
        names[r.choice(["x", name + "x", name.removeprefix("model."), ""])] = its
    elif how == "odd":
        names[name] = r.choice(odd_places(names[name]))
    elif how == "twice" and file.name.startswith("model."):
        part = load_file(file.with_name(files[0]))
        other = load_file(file.with_name(files[1]))
        value = r.choice(list(other.values())).clone()
        part[r.choice(list(other))] = value     # one in both files, with other bytes in it
        save_file(part, file.with_name(files[0]))
    elif how == "cross":                    # the files under each other's names
        one, two = (file.with_name(f) for f in files[:2])
        kept = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(kept)
    elif how == "inside":
        moved = names[name]
        (file.parent / "sub").mkdir()
        shutil.move(file.with_name(moved), file.parent / "sub" / moved)
        held["weight_map"] = {n: f"sub/{f}" if f == moved else f for n, f in names.items()}
    file.write_text(json.dumps(held))
    return f"index:{how} {name}"


MODELS = [
    {"type": "Unigram"},
    {"type": "WordPiece"},
    {"type": None},
    {"byte_fallback": True},
    {"ignore_merges": True},
    {"unk_token": "e"},
    {"unk_token": 3},
    {"dropout": 0.5},
    {"end_of_word_suffix": "</w>"},
    {"merges": {}},
    {"merges": None},
    {"vocab": []},
    {"fuse_unk": True},
]
MERGES = ["h e", ["h", "e", "l"], ["h"], "he", [["h"], "e"], ["", "he"], "  ", ["ll", "h"], None, 3,
          ["\0", "e"]]
NUMBERS = [0, 263, 264, 10 ** 7, 10 ** 9, -5, 2.0, "7", None, [1]]


def tokenizer_damage(file: Path, r: random.Random) -> str:
    """tokenizer.json with parts that other tokenizers have."""
    held = json.loads(file.read_text())
    key = r.choice([*PARTS, "model", "pre_tokenizer", "merges", "vocab"])
    model = held["model"]
    if key in PARTS:
        held[key] = r.choice(PARTS[key])
    elif key == "model":
        model.update(r.choice(MODELS))
    elif key == "merges":
        at = r.randrange(len(model["merges"]))
        model["merges"][at] = r.choice(MERGES)
    else:
        number = r.choice(NUMBERS)
        model["vocab"][r.choice(list(model["vocab"]))] = number
    file.write_text(json.dumps(held))
    return f"tokenizer:{key}"


def template_damage(file: Path, r: random.Random) -> str:
    text = file.read_text()
    held = {}
    if file.suffix == ".json":
        held = json.loads(text)
        text = held.get("chat_template", "")
    ruin = r.choice([*RUINS, TEMPLATE])
    at = r.randrange(len(text) + 1)
    text = r.choice([ruin, ruin + text, text[:at] + ruin + text[at:], text[:at]])
    if held:
        text = json.dumps({**held, "chat_template": text})
    file.write_text(text, "utf-8", errors="surrogatepass")
    return f"template:{ruin[:30]!r} at {at}"


ROPE = ["rope_type", "type", "factor", "low_freq_factor", "high_freq_factor",
        "original_max_position_embeddings", "rope_theta", "mrope_section", "short_factor"]
ROPES = ["dynamic", "yarn", "longrope", "su", "linear", "llama3", "default", {"type": "linear"},
         [8.0]]


def rope_damage(file: Path, r: random.Random) -> str:
    held = json.loads(file.read_text())
    scaling = dict(held.get("rope_scaling") or {"rope_type": "linear", "factor": 2.0})
    key = r.choice(ROPE)
    scaling[key] = copy.deepcopy(r.choice([*ODD, *ROPES]))
    held[r.choice(["rope_scaling", "rope_parameters"])] = scaling
    file.write_text(json.dumps(held))
    return f"rope:{key}"


METADATA = [
    "",
    "NaN",
    "{\"lr\": NaN}",
    "{\"lr\": 1e999}",
    "[" * 100_000,
    "{}",
    "[]",
    "null",
    "3",
    "{\"family\": 3}",
    "{\"a\": {}}",
    "prefix",
    "embedding",
    "\0",
    "x" * 10 ** 6,
    "{\"layers\": 3, \"note\": 3}",
    "{\"layers\": {}, \"note\": {\"layers\": [3]}}",
]


def metadata_damage(file: Path, r: random.Random) -> str:
    """What a safetensors file says beside its tensors."""
    tensors = load_file(file)
    data = file.read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    said = json.loads(data[8:8 + n]).get("__metadata__", {})
    key = r.choice([*said, "settings", "owner", "kind", "format", "x"])
    said[key] = r.choice(METADATA)
    if r.random() < 0.5:
        save_file(tensors, file, said)
        return f"metadata:{key}"
    ours = {k: v for k, v in said.items() if k not in ("crc32", "format")}
    with unchecked():
        write_safetensors(file, tensors, ours)
    return f"metadata+sums:{key}"


ZIP = ["drop", "short", "long", "pickle", "pickle", "order", "endian", "packed", "outside", "twice",
       "names", "version", "empty", "torn", "comment"]


def zip_damage(file: Path, r: random.Random) -> str:
    """The records of a torch file, put together again otherwise."""
    if not zipfile.is_zipfile(file):
        return bytes_damage(file, r)
    with zipfile.ZipFile(file) as z:
        held = [(name, z.read(name)) for name in z.namelist()]
    at = r.randrange(len(held))
    how = r.choice(ZIP)
    name, data = held[at]
    if how == "drop":
        del held[at]
    elif how == "short":
        held[at] = name, data[:len(data) // 2]
    elif how == "long":
        held[at] = name, data + bytes(64)
    elif how == "pickle":
        data = bytearray(dict(held)[held[0][0]])
        for _ in range(r.choice([1, 1, 3])):
            code = r.choice([r.randrange(256), *b".cRio0b}(tq"])
            data[r.randrange(len(data))] = code
        held[0] = held[0][0], bytes(data)
    elif how == "order":
        r.shuffle(held)
    elif how == "endian":
        held = [(n, b"big" if n.endswith("byteorder") else d)
                for n, d in held]
    elif how == "outside":
        held.append((f"{name.split('/')[0]}/../../outside", b"x"))
    elif how == "twice":
        held.append((name, data[::-1]))
    elif how == "names":
        new = r.choice(["x", name + "\0", name.upper(), "/" + name])
        held[at] = new, data
    elif how == "version":
        held = [(n, r.choice([b"", b"99", b"x"]) if n.endswith("version") else d)
                for n, d in held]
    elif how == "empty":
        held = []
    method = zipfile.ZIP_DEFLATED if how == "packed" else zipfile.ZIP_STORED
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(file, "w", method) as z:
            for name, data in held:
                z.writestr(name, data)
            z.comment = b"x" * 60_000 if how == "comment" else b""
    if how == "torn":
        short = r.choice([1, 22, 100, 1000])
        file.write_bytes(file.read_bytes()[:-short])
    return f"zip:{how} {name}"


def state_damage(file: Path, r: random.Random) -> str:
    """The state of a prompt that is being learned: all that it says, one thing changed."""
    held = torch.load(file, weights_only=True)
    paths = [
        *((key,) for key in held),
        *(("settings", key) for key in held["settings"]),
        ("optimizer", "state"),
        ("optimizer", "param_groups"),
        ("params", "moved"),
        ("best", "moved"),
        ("optimizer", "state", 0),
        ("optimizer", "param_groups", 0),
    ]
    *above, key = r.choice(paths)
    parent = held
    for step in above:
        parent = parent[step]
    how = r.choice(["odd", "odd", "delete", "tensor"])
    if how == "odd":
        no_numbers = {"moved": torch.full((3, 32), float("nan"))}
        values = [*ODD, torch.zeros(2), no_numbers, {"moved": 3}]
        parent[key] = copy.deepcopy(r.choice(values))
    elif how == "delete":
        del parent[key]
    else:
        moments = held["optimizer"]["state"].get(0, held["params"])
        t = r.choice([held["params"], held["best"], moments])
        name = r.choice(list(t))
        if torch.is_tensor(t[name]):
            t[name] = odd_tensor(t[name], r)[1]
    torch.save(held, file)
    return f"state:{how} {key}"


OWN = {
    "model.safetensors.index.json": [index_damage],
    "pytorch_model.bin.index.json": [index_damage],
    "tokenizer.json": [tokenizer_damage],
    "chat_template.jinja": [template_damage],
    "config.json": [rope_damage],
}


def damage(folder: Path, r: random.Random) -> tuple[str, str]:
    """Damage one file of a folder: (its name, what was done). Of a run, only what it wrote."""
    files = sorted(f for f in folder.rglob("*")
                   if f.is_file() and f.parent.name != "m" and f.name not in ("a.txt", ".lock"))
    file = r.choice(files)
    if r.random() < 0.4:
        ways = [bytes_damage, file_damage]
        weights = [4, 1]
    elif file.suffix == ".json":
        ways = [json_damage, *OWN.get(file.name, [])]
        if file.name == "tokenizer_config.json" and "chat_template" in file.read_text():
            ways.append(template_damage)
        weights = [1] * len(ways)
    elif file.suffix == ".safetensors":
        ways = [header_damage, tensors_damage, metadata_damage]
        weights = [3, 3, 2]
    elif file.suffix in (".bin", ".pth", ".pt"):
        ways = [torch_damage, zip_damage]
        weights = [1, 1]
    elif file.suffix == ".state":
        ways = [state_damage, zip_damage]
        weights = [2, 1]
    else:
        ways = OWN.get(file.name, [bytes_damage])
        weights = [1]
    [way] = r.choices(ways, weights)
    return file.name, way(file, r)


# --------------------------------------------------------------------------------------------------
# Loading in a process of its own

class Watch:
    """Notes every file that is opened outside a folder, and every program that is started. Hooks
    cannot be taken back, so a process has one of these at most."""
    MOVES = ("os.remove", "os.rename")
    STARTS = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect")

    def __init__(self):
        places = (*sys.path, sys.prefix, sys.base_prefix, "/proc", "/sys", "/dev")
        self.allowed = tuple({str(Path(p).resolve()) for p in places if p})
        self.inside = None
        self.seen = []
        self.writes = False
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple) -> None:
        if self.inside is None:
            return
        if event == "open" and isinstance(args[0], (str, bytes)):
            path = os.path.abspath(os.fsdecode(args[0]))
            inside = path.startswith((self.inside, *self.allowed))
            if not inside or "outside" in path:
                self.seen.append(f"opened {path}")
        elif event in self.STARTS or (event in self.MOVES and not self.writes):
            self.seen.append(f"{event} {args}"[:200])

    @contextlib.contextmanager
    def over(self, folder: Path, writes: bool = False):
        self.inside = str(folder)
        self.seen = []
        self.writes = writes
        try:
            yield self.seen
        finally:
            self.inside = None


def load_here(kind: Kind, folder: Path, watch: Watch) -> dict:
    """The outcome of a load, in this process."""
    seen = []
    try:
        with (
            watch.over(folder, kind.writes) as seen,
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            out = {"loaded": kind.load(folder)}
    except (ValueError, OSError) as e:
        message = str(e)
        out = {"refused": message[:500]}
        named = str(folder) in message or kind.writes and "out/" in message
        meant = type(e).__module__ in ("builtins", "io") and not isinstance(e, UnicodeError)
        if not meant:
            out["finding"] = f"a {type(e).__name__} that nobody meant"
        elif "\n" in message:
            out["finding"] = "more than one line"
        elif not named:
            out["finding"] = "no file named"
    except BaseException as e:
        frames = traceback.extract_tb(e.__traceback__)
        ours = [f for f in frames if str(ROOT) in f.filename and "/tests/" not in f.filename]
        last = (ours or frames)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        text = "".join(traceback.format_exception(e))
        out = {"finding": f"{type(e).__name__} at {where}", "text": text[-3000:]}
    if seen:
        out["finding"] = seen[0]
    return out


def apart(jobs: list):
    """job(watch) -> dict of every job, in forked processes with limits on time and memory. A
    process does one job after the other; the next begins where one that hung or died left off."""
    done = 0
    while done < len(jobs):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.close(read)
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                most = pages * resource.getpagesize() + MEMORY
                resource.setrlimit(resource.RLIMIT_AS, (most, most))
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                watch = Watch()
                for job in jobs[done:]:
                    answer = json.dumps(job(watch)).encode()
                    os.write(write, answer[:60_000] + b"\n")
            finally:
                os._exit(0)
        os.close(write)
        held = b""
        ready = True
        while done < len(jobs):
            if b"\n" not in held:
                ready = answers(read, child)
                part = os.read(read, 65_536) if ready else b""
                if not part:
                    break
                held += part
                continue
            line, _, held = held.partition(b"\n")
            done += 1
            yield json.loads(line)
        os.close(read)
        if done < len(jobs) and not ready:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if done < len(jobs):
            done += 1
            how = f"the process died, status {status}" if ready else f"no end after {LIMIT} s"
            yield {"finding": how}


def answers(read: int, child: int) -> bool:
    """Wait until there is something to read; False once the child has computed for LIMIT or waited
    for STUCK seconds."""
    began = time.monotonic()
    spent = computed(child)
    while time.monotonic() - began < STUCK and computed(child) - spent < LIMIT:
        if select.select([read], [], [], 1)[0]:
            return True
    return False


def computed(child: int) -> float:
    """Seconds of processor time that a process has had."""
    fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Bed:
    """Undamaged folders, one of each kind, and what they load as."""

    def __init__(self, place: Path, names: list[str] | None = None):
        torch.set_num_threads(1)            # a fork keeps no threads
        self.place = place
        self.kinds = [k for k in KINDS if not names or k.name in names]
        self.whole = {}
        (place / "outside").mkdir(parents=True)
        for kind in self.kinds:
            folder = place / "whole" / kind.name
            folder.mkdir(parents=True)
            kind.build(folder)
            shutil.copytree(folder, place / "case")     # a run goes on where it is loaded
            [out] = apart([lambda watch: load_here(kind, place / "case", watch)])
            shutil.rmtree(place / "case")
            if "loaded" not in out:
                raise SystemExit(f"{kind.name} does not load as it is: {out}")
            self.whole[kind.name] = out["loaded"]
        for file in self.place.glob("whole/hf-llama/*"):
            shutil.copy(file, place / "outside")

    def case(self, kind: Kind, seed: int, number: int, watch: Watch) -> dict:
        """One damaged folder: what was done, how it ended, and its class."""
        folder = self.place / "case"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.place / "whole" / kind.name, folder)
        name = f"{kind.name}/{seed}/{number}"
        r = random.Random(name)
        file, how = damage(folder, r)
        out = load_here(kind, folder, watch)
        group = self.classify(kind, folder, file, how, out)
        return {"case": name, "file": file, "how": how, **out, "class": group}

    def classify(self, kind: Kind, folder: Path, file: str, how: str, out: dict) -> str:
        if "finding" in out:
            return "finding"
        if "refused" in out:
            return "refused"
        whole = self.whole[kind.name]
        if all(value == whole.get(key) for key, value in out["loaded"].items()):
            return "same"
        if file.endswith((".json", ".jinja")) or file in ("merges.txt", "tokenizer.model"):
            return "other"
        path = folder / file
        summed = False
        if file.endswith(".safetensors") and path.is_file():
            summed = b'"crc32"' in path.read_bytes()[:200_000]
        written = how.startswith(("tensors", "metadata", "header:tree", "file:other"))
        if summed and not written:
            return "unnoticed"
        if kind.name.startswith(("hf", "meta", "prompt", "adapter", "packed-old")):
            # what a file says of its tensors has no checksum
            return "other" if how.startswith("metadata") else "bytes"
        if kind.writes and "+sums" in how:  # a shard with sums is a shard
            return "bytes"
        return "unnoticed"


def run(cases: int, seeds: list[int], place: Path, names: list[str] | None = None,
        show=print) -> tuple[collections.Counter, list[dict]]:
    """Cases spread evenly over kinds and seeds: (how many of each class, the findings and the
    unnoticed)."""
    bed = Bed(place, names)
    counts = collections.Counter()
    bad = []
    each = -(-cases // (len(bed.kinds) * len(seeds)))
    for kind in bed.kinds:
        mine = collections.Counter()
        numbers = [(seed, number) for seed in seeds for number in range(each)]
        jobs = [lambda watch, n=n: bed.case(kind, *n, watch) for n in numbers]
        for got, (seed, number) in zip(apart(jobs), numbers):   # the last process is waited for
            case = f"{kind.name}/{seed}/{number}"
            got = {"case": case, "file": "?", "how": "?", "class": "finding", **got}
            mine[got["class"]] += 1
            if got["class"] in ("finding", "unnoticed"):
                bad.append(got)
        counts += mine
        said = "  ".join(f"{name} {n}" for name, n in sorted(mine.items()))
        show(f"{kind.name:24s} {said}")
    return counts, bad


def main() -> None:
    p = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    p.add_argument("--cases", type=int, default=6000)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--kinds", nargs="+", help="only these kinds of folder")
    p.add_argument("--only", metavar="KIND/SEED/NUMBER", help="one case again, in this process")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as place:
        if args.only:
            name, seed, number = args.only.split("/")
            bed = Bed(Path(place), [name])
            got = bed.case(bed.kinds[0], int(seed), int(number), Watch())
            print(got.pop("text", ""))
            raise SystemExit(json.dumps(got, indent=1))
        counts, bad = run(args.cases, args.seeds, Path(place), args.kinds)
    where = collections.defaultdict(list)
    for got in bad:
        finding = got.get("finding", f"unnoticed: {got['file']}")
        where[finding.split(" /tmp")[0]].append(got)
    for finding, cases in sorted(where.items(), key=lambda item: -len(item[1])):
        first = cases[0]
        print(f"{len(cases)} x {finding}; such as {first['case']}: "
              f"{first['how']} in {first['file']}; {first.get('refused', '')[:150]}")
    shares = ", ".join(f"{n} {name}" for name, n in counts.most_common())
    print(f"{sum(counts.values())} cases: {shares}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
