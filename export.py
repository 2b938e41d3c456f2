"""Models and prompts in the files of other programs, and theirs in ours.

    python export.py runs/out/compressed --to hf OUT          # transformers reads it, and others
    python export.py runs/out/compressed --to gptq OUT        # GPTQModel, vLLM: 4 bits stay 4 bits
    python export.py checkpoints/llama-7b --to meta OUT       # consolidated.00.pth and params.json
    python export.py MODEL --to peft OUT --prompt FILE        # PEFT's prompt-tuning adapter
    python export.py MODEL --to prompt FILE --prompt ADAPTER  # and back
    python export.py runs/out/compressed --verify             # every byte against its checksum

MODEL is any folder that load_model reads: packed, Hugging Face's or Meta's. Weights go through one
at a time, so a model larger than the memory is converted too. What is stored as a number stays that
number (--dtype rounds it); a packed Linear becomes fp16, as fp16 models compute with it.
config.json comes last: a folder without one is not complete.

hf     dense weights, in shards, with the tokenizer.
gptq   qweight, qzeros, scales, g_idx (arXiv 2210.17323's own layout): w = scale (q - zero). Pruned
       weights lie on the zero point. So grids must have a level on zero: `train.py --grid uniform
       --heal 0`, or with --sparsity 0 just --heal 0, and without --reconstruct, as both move grids
       between levels. A grid without a level on zero has one value more than its bits can count:
       4 such bits go exactly into 8, and only where the offset is 1/2:
       w = +-s (k + 1/2) = s/2 (q - 128) with q = 128 +- (2k + 1).
meta   LLaMA's first layout, one shard; rotary channels interleaved again; a tied head is written
       out, as Meta's code has no tied heads.
peft   prompt_embeddings and adapter_config.json, whose base model is MODEL as it was given: for
       AutoPeftModel, name a folder that transformers opens, such as --to hf's.

Left out: GGUF, compressed-tensors (its sparse forms left vLLM in 2026), and model-parallel shards
of Meta's layout.
"""
import argparse

from data.flags import PRECISIONS, Flags, read_flags, run_program, say


def flags() -> Flags:
    p = Flags(description="Models and prompts in the files of other programs, and theirs in ours.")
    p.add_argument("model", help="a checkpoint folder, packed or not, or a name such as llama-7b")
    p.add_argument("out", nargs="?", help="the new folder (--to prompt: file)")
    p.add_argument("--to", choices=["hf", "gptq", "meta", "peft", "prompt"], help="what to write")
    p.add_argument("--prompt", help="--to peft: a prompt file; --to prompt: PEFT's adapter folder")
    p.add_argument("--dtype", choices=PRECISIONS,
                   help="hf and meta: round weights to this (default: as they are stored)")
    p.add_argument("--verify", action="store_true",
                   help="compare every tensor with the checksum it was written with")
    return p


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    return flags().parse_intermixed_args(arguments)


if __name__ == "__main__":
    args = read_flags(flags())       # before torch is loaded: --help and wrong flags answer at once


import io
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from data.checkpoint import (raw, read_json, read_safetensors, read_state, verify, write_json,
                             write_safetensors, write_torch)
from data.config import (Config, family_of, hf_config, is_ours, meta_context, meta_factor,
                         resolve)
from data.tokenizer import Ranks, SentencePiece, copy_tokenizer, load_tokenizer
from kernels.packing import Packed, groups_of
from kernels.unpacking import unpack
from model import HF, META, Checkpoint, open_checkpoint, published_name, skeleton_of
from prompt import check_fits, load_prompt, save_prompt

SHARD = 2_000_000_000                       # bytes of a shard, unless one tensor is larger
FAST = "PreTrainedTokenizerFast"            # takes a tokenizer.json as it is, LlamaTokenizer not
Make = Callable[[], dict[str, torch.Tensor]]    # makes some tensors of a file in their turn


# -------------------------------------------------------------------------------------------------
# Weights one at a time

def shapes_of(c: Config) -> dict[str, torch.Size]:
    """{our name: shape} of every weight of a model."""
    return {name: p.shape for name, p in skeleton_of(c).named_parameters()}


def weight(source: Checkpoint, name: str, dtype: torch.dtype | None) -> torch.Tensor:
    """One weight under our name, dense; dtype None: as stored, and fp16 where it is packed."""
    held = source.packed.get(name.removesuffix(".weight"))
    w = source.tensor(name) if held is None else unpack(held, dtype or torch.float16)
    w = w if dtype is None else w.to(dtype)
    if not w.isfinite().all():
        raise ValueError(f"{name} does not fit {w.dtype}: use --dtype bfloat16 or float32")
    return w


def write_folder(folder: Path, parts: list[tuple[int, Make]]) -> None:
    """Write tensors, given as (bytes, what makes them), as model.safetensors, or as shards of about
    SHARD and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, size = [[]], 0
    for nbytes, make in parts:
        if size and size + nbytes > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(make)
        size += nbytes
    names, total = {}, 0
    for i, makes in enumerate(shards):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: t for make in makes for name, t in make().items()}
        write_safetensors(folder / file, tensors)
        names.update(dict.fromkeys(tensors, file))
        total += sum(t.nbytes for t in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": names}
        write_json(folder / "model.safetensors.index.json", index)


def tokenizer_of(folder: Path):
    """(tokenizer, None), or (None, why it is not for us); (None, None) where there is none."""
    try:
        return load_tokenizer(folder), None
    except FileNotFoundError:                                   # weights alone
        return None, None
    except ValueError as e:
        return None, e


def take_tokenizer(source: Path, folder: Path) -> dict:
    """Copy the files that a model's text goes through into a new folder for transformers, and
    return what config.json says of them. What only transformers understands is copied as it is."""
    tokenizer, refused = tokenizer_of(source)
    if refused:
        say(f"its tokenizer is copied unread: {refused}")
    if isinstance(tokenizer, Ranks) and not (source / "tokenizer.json").exists():
        raise ValueError(f"{source} has a rank file for tokenizer, and transformers would read its "
                         f"special tokens as text: put the tokenizer.json of Hugging Face's "
                         f"edition of the model beside it")
    folder.mkdir(parents=True, exist_ok=True)
    copy_tokenizer(source, folder)
    if tokenizer is None:
        return {}
    held = {"add_bos_token": tokenizer.bos_id is not None}
    if isinstance(tokenizer, SentencePiece):
        # without it, transformers needs sentencepiece and protobuf
        if not (folder / "tokenizer.json").exists() and is_plain_bpe(tokenizer.model):
            write_json(folder / "tokenizer.json", sentencepiece_json(tokenizer))
            config = folder / "tokenizer_config.json"
            if config.exists():                                 # its class read tokenizer.model
                write_json(config, {**read_json(config), "tokenizer_class": FAST})
        model = tokenizer.model
        ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unk": model.unk_id()}
        held.update({f"{role}_token": tokenizer.text_of.get(i) or model.id_to_piece(i)
                     for role, i in ids.items() if i is not None})
        if (folder / "tokenizer.json").exists():
            held["tokenizer_class"] = FAST
    elif not (folder / "tokenizer.json").exists():              # OPT
        vocab = read_json(folder / "vocab.json")
        text_of = {i: text for text, i in {**vocab, **tokenizer.added}.items()}
        held.update(bos_token="</s>", eos_token=text_of.get(tokenizer.eos_id, "</s>"),
                    unk_token="</s>", pad_token="<pad>", tokenizer_class="GPT2Tokenizer")
    if not (folder / "tokenizer_config.json").exists():
        write_json(folder / "tokenizer_config.json", held)
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}


def is_plain_bpe(model) -> bool:
    """Is a sentencepiece model of LLaMA's kind, which a tokenizer.json can be made of? Merges in
    the order of the pieces, no piece that the text is searched for first, text left as it is, a
    space in front. Without a tokenizer.json, transformers reads tokenizer.model."""
    whole = [i for i in range(model.get_piece_size())
             if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))]
    in_order = all(model.get_score(i) == -float(k) or not model.id_to_piece(i).strip("\u2581")
                   for k, i in enumerate(whole))        # LLaMA's pieces of spaces come last of all
    text = " \uff41  b"                                         # a wide letter and two spaces
    is_kept = model.decode(model.encode(text)) == text
    has_space = model.encode("a", out_type=str)[0].startswith("\u2581")
    return in_order and is_kept and has_space


def sentencepiece_json(tokenizer: SentencePiece) -> dict:
    """A sentencepiece BPE as a tokenizer.json: merges in the order of their results' scores, a
    space in front of a text."""
    model, space = tokenizer.model, "\u2581"
    pieces = {model.id_to_piece(i): i for i in range(tokenizer.pieces)}
    special = [i for i in range(tokenizer.pieces)
               if model.is_control(i) or model.is_unknown(i)]
    whole = {p: i for p, i in pieces.items() if i not in special and not model.is_byte(i)}
    merges = sorted((-model.get_score(i), pieces[p[:k]], pieces[p[k:]], p[:k], p[k:])
                    for p, i in whole.items() for k in range(1, len(p))
                    if p[:k] in pieces and p[k:] in pieces)
    text = [{"Sequence": {"id": "A", "type_id": 0}}]
    pair = {"Sequence": {"id": "B", "type_id": 1}}
    template = {}
    if tokenizer.bos_id is not None:
        bos = model.id_to_piece(tokenizer.bos_id)
        text = [{"SpecialToken": {"id": bos, "type_id": 0}}, *text]
        template = {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}}
    kinds = [(i, model.id_to_piece(i), True) for i in special]
    kinds += [(i, text, i in tokenizer.silent) for i, text in sorted(tokenizer.text_of.items())]
    added = [{"id": i, "content": text, "special": is_special, "normalized": False,
              "lstrip": False, "rstrip": False, "single_word": False}
             for i, text, is_special in kinds]
    normalizers = [{"type": "Prepend", "prepend": space},
                   {"type": "Replace", "pattern": {"String": " "}, "content": space}]
    decoders = [{"type": "Replace", "pattern": {"String": space}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return {"version": "1.0", "truncation": None, "padding": None, "pre_tokenizer": None,
            "added_tokens": added,
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "post_processor": {"type": "TemplateProcessing", "single": text, "pair": [*text, pair],
                               "special_tokens": template},
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {"type": "BPE", "dropout": None, "fuse_unk": True, "byte_fallback": True,
                      "ignore_merges": False, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None,
                      "unk_token": model.id_to_piece(model.unk_id()), "vocab": pieces,
                      "merges": [[left, right] for *_, left, right in merges]}}


def stored_dtype(source: Checkpoint, dtype: torch.dtype | None) -> str:
    return str(dtype or source_dtype(source, "embed_tokens.weight")).removeprefix("torch.")


# -------------------------------------------------------------------------------------------------
# Hugging Face

def to_hf(source: Checkpoint, folder: Path, dtype: torch.dtype | None = None) -> None:
    """A folder with dense weights that transformers opens; for dtype None see the module's
    docstring."""
    table, c = HF[source.config.family], source.config

    def part(name: str, shape: torch.Size) -> tuple[int, Make]:
        return shape.numel() * 2, lambda: {published_name(name, table): weight(source, name, dtype)}
    of_tokenizer = take_tokenizer(source.place, folder)         # first: it may be refused
    write_folder(folder, [part(name, shape) for name, shape in shapes_of(c).items()])
    write_json(folder / "config.json", {**hf_config(c), "torch_dtype": stored_dtype(source, dtype),
                                        **of_tokenizer})


# -------------------------------------------------------------------------------------------------
# GPTQ

def to_gptq(source: Checkpoint, folder: Path) -> None:
    """A folder in the GPTQ layout. ValueError where a grid cannot be said in it exactly."""
    c, table = source.config, HF[source.config.family]
    linears = [name.removesuffix(".weight") for name, shape in shapes_of(c).items()
               if name.startswith("blocks.") and len(shape) == 2]
    loose = next((name for name in linears if name not in source.packed), None)
    if loose:
        raise ValueError(f"{source.place}: {loose} is not quantized, and GPTQ files hold quantized "
                         f"models: compress it with train.py --grid uniform --heal 0 first, or use "
                         f"--to hf")
    meta = source.packed[linears[0]].meta
    for name in linears:                                # known before anything is written
        held = source.packed[name]
        if any(held.meta[key] != meta[key] for key in ("bits", "grid", "groupsize")):
            raise ValueError(f"{source.place}: its Linears differ in bits, grid or groupsize, and "
                             f"a GPTQ file has one of each")
        check_grid(held, f"{source.place}: {name}")
    offset = meta["grid"] == "offset"
    bits = 8 if offset else meta["bits"]
    zeros = {128}
    if not offset:
        zeros = {int(z) for name in linears for z in source.packed[name].tensors["zero"].unique()}
    old = min(zeros) > 0                # version 1 stores zero - 1, which nobody can do with 0

    def part(name: str, shape: torch.Size) -> tuple[int, Make]:
        theirs = published_name(name, table)
        linear = name.removesuffix(".weight")
        if linear not in source.packed:
            return shape.numel() * 2, lambda: {theirs: weight(source, name, torch.float16)}
        prefix = theirs.removesuffix("weight")

        def make():
            tensors = gptq_tensors(source.packed[linear], bits, old)
            return {prefix + n: t for n, t in tensors.items()}
        return shape.numel(), make
    of_tokenizer = take_tokenizer(source.place, folder)         # first: it may be refused
    write_folder(folder, [part(name, shape) for name, shape in shapes_of(c).items()])
    order = any("g_idx" in source.packed[name].tensors for name in linears)
    quantization = {"quant_method": "gptq", "bits": bits, "group_size": meta["groupsize"],
                    "desc_act": order, "sym": zeros == {1 << bits - 1}, "lm_head": False,
                    "pack_dtype": "int32",
                    "checkpoint_format": "gptq" if old else "gptq_v2"}
    write_json(folder / "quantize_config.json", quantization)
    config = {**hf_config(c), "torch_dtype": "float16", **of_tokenizer}
    write_json(folder / "config.json", {**config, "quantization_config": quantization})


def check_grid(held: Packed, name: str) -> None:
    """ValueError unless a packed Linear's weights are exactly scale (q - zero) with whole q and
    zero."""
    rows, cols = held.meta["shape"]
    if rows % 32 or cols % 32:
        raise ValueError(f"{name} is {rows} x {cols}, and GPTQ's files need multiples of 32: use "
                         f"--to hf")
    scale, zero = held.tensors["scale"], held.tensors["zero"].float()
    bits = held.meta["bits"]
    if held.meta["grid"] == "offset":
        halves = (zero == 0.5).all() and ((scale / 2) * 2 == scale).all()
        if bits > 4 or not halves:
            raise ValueError(f"{name} has a grid without a level on zero, which GPTQ's files "
                             f"cannot say (but for offsets of 1/2, in 8 bits): compress with "
                             f"train.py --grid uniform --heal 0, or use --to hf")
    elif not ((zero == zero.round()) & (zero >= 0) & (zero < 1 << bits)).all():
        raise ValueError(f"{name} has a zero that is no level of its grid, which GPTQ's files "
                         f"cannot say: compress with train.py --grid uniform --heal 0, without "
                         f"--reconstruct, or use --to hf")


def gptq_tensors(held: Packed, bits: int, old: bool) -> dict[str, torch.Tensor]:
    """qweight, qzeros, scales and g_idx of a packed Linear that check_grid passed. old: zeros minus
    one, version 1."""
    cols = held.meta["shape"][1]
    group = torch.from_numpy(groups_of(cols, held.meta["groupsize"], held.tensors.get("g_idx")))
    scale, zero = (held.tensors[name].float() for name in ("scale", "zero"))    # (out, groups)
    if held.meta["grid"] == "offset":
        scale, zero = scale / 2, torch.full_like(scale, 128)
    w = unpack(held, torch.float32)                             # (out, in), zero where pruned
    q = (w / scale[:, group] + zero[:, group]).round()
    same = torch.equal((q - zero[:, group]) * scale[:, group], w)
    if not same or q.min() < 0 or q.max() >= 1 << bits:
        raise ValueError("a weight is no level of its grid: the packed file is damaged")
    return {"qweight": bit_stream(q.T, bits),
            "qzeros": bit_stream(zero - int(old), bits).T.contiguous(),
            "scales": scale.half().T.contiguous(), "g_idx": group.int()}


def bit_stream(q: torch.Tensor, bits: int) -> torch.Tensor:
    """(n, columns) whole numbers -> (n * bits / 32, columns) int32: down a column the bits of one
    number follow those of the one before, lowest first."""
    n, columns = q.shape
    out = np.empty((n * bits // 32, columns), np.int32)
    for at in range(0, columns, 256):                           # 8 bytes a number at a time
        part = q[:, at:at + 256].numpy().astype(np.uint8).T     # (columns, n)
        each = np.unpackbits(part[:, :, None], axis=2, count=bits, bitorder="little")
        packed = np.packbits(each.reshape(len(part), -1), axis=1, bitorder="little")
        out[:, at:at + 256] = packed.view(np.int32).T
    return torch.from_numpy(out)


# -------------------------------------------------------------------------------------------------
# Meta

def meta_params(c: Config) -> dict:
    """params.json of a LLaMA. Meta's code takes no field that its version does not know, and brings
    a max_seq_len of its own: so only what it would not find by itself."""
    params = {"dim": c.d_model, "n_layers": c.n_layer, "n_heads": c.n_head,
              "vocab_size": c.vocab_size, "norm_eps": c.norm_eps, "multiple_of": 256}
    known = {"d_model": c.d_model, "norm_eps": c.norm_eps, "rope_theta": c.rope_theta}
    # the MLP's width: two thirds of 4 d_model, perhaps multiplied, rounded up
    hidden = int(8 * c.d_model / 3)
    if -(-hidden // 256) * 256 != c.d_ff:
        params.update(multiple_of=1, ffn_dim_multiplier=(c.d_ff + 0.5) / hidden)
    if c.n_kv_head != c.n_head:
        params["n_kv_heads"] = known["n_kv_head"] = c.n_kv_head
    if c.rope_theta != 10000.0:
        params["rope_theta"] = c.rope_theta
    if c.rope_scaling:
        params["use_scaled_rope"] = True
        if c.rope_scaling["factor"] != meta_factor(c.d_model):
            params["rope_scaling_factor"] = c.rope_scaling["factor"]
    if c.max_positions != meta_context(known, bool(c.rope_scaling)):
        params["max_seq_len"] = c.max_positions
    return params


def to_meta(source: Checkpoint, folder: Path, dtype: torch.dtype | None = None) -> None:
    """consolidated.00.pth and params.json. ValueError for what Meta's code has no word for."""
    c = source.config
    scaling = c.rope_scaling
    odd = {"OPT": c.family == "opt",
           "biases": c.attention_bias or c.mlp_bias,
           f"heads of {c.head_dim} channels": c.head_dim * c.n_head != c.d_model,
           f"the rotary scaling {scaling}": scaling and {**scaling, "factor": 0} != LLAMA31}
    for what, is_so in odd.items():
        if is_so:
            raise ValueError(f"{source.place}: Meta's layout cannot say {what}: use --to hf")

    def make(name: str) -> torch.Tensor:
        w = weight(source, name, dtype)
        rotated = name.endswith(("attn.q.weight", "attn.k.weight"))
        return interleave(w, w.shape[0] // c.head_dim) if rotated else w
    entries = [(published_name(name, META), shape, dtype or source_dtype(source, name),
                lambda name=name: make(name)) for name, shape in shapes_of(c).items()]
    if c.tied:
        _, *embedding = entries[0]
        entries.append((published_name("lm_head.weight", META), *embedding))
    folder.mkdir(parents=True, exist_ok=True)
    write_pth(folder / "consolidated.00.pth", entries)
    copy_tokenizer(source.place, folder)
    write_json(folder / "params.json", meta_params(c))


LLAMA31 = {"rope_type": "llama3", "factor": 0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}


def source_dtype(source: Checkpoint, name: str) -> torch.dtype:
    packed = name.removesuffix(".weight") in source.packed
    return torch.float16 if packed else source.files.dtype(source.keys[name])


def interleave(w: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of model.half_split: rotary channels in pairs (0, 1), (2, 3), ... again."""
    return w.view(heads, 2, -1, *w.shape[1:]).transpose(1, 2).reshape(w.shape)


class Stored:
    """A storage in a torch file: its type, key and number of elements."""

    def __init__(self, key: str, dtype: torch.dtype, count: int):
        kinds = {torch.float16: torch.HalfStorage, torch.bfloat16: torch.BFloat16Storage,
                 torch.float32: torch.FloatStorage, torch.float64: torch.DoubleStorage}
        self.said = "storage", kinds[dtype], key, "cpu", count


class Planned:
    """A tensor that pickles as torch.save would write it, before its values exist."""

    def __init__(self, storage: Stored, shape: torch.Size):
        stride = [shape[i + 1:].numel() for i in range(len(shape))]
        self.parts = storage, 0, tuple(shape), tuple(stride), False, OrderedDict()

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.parts


class Pickler(pickle.Pickler):
    def persistent_id(self, held):
        return held.said if isinstance(held, Stored) else None


def write_pth(path: Path, entries: list[tuple[str, torch.Size, torch.dtype, Callable]]) -> None:
    """A torch file of (name, shape, dtype, what makes the tensor), written tensor by tensor;
    torch.save would want all of them at once."""
    plan = {name: Planned(Stored(str(i), dtype, shape.numel()), shape)
            for i, (name, shape, dtype, _) in enumerate(entries)}

    def write(f):
        head = io.BytesIO()
        Pickler(head, protocol=2).dump(plan)
        out = torch._C.PyTorchFileWriter(f)         # what torch.save uses
        out.write_record("data.pkl", head.getvalue(), head.tell())
        out.write_record("byteorder", sys.byteorder, len(sys.byteorder))
        for i, (*_, make) in enumerate(entries):
            data = bytes(raw(make()))
            out.write_record(f"data/{i}", data, len(data))
        out.write_end_of_file()
    write_torch(path, write)


# -------------------------------------------------------------------------------------------------
# PEFT

def to_peft(model: str, c: Config, prompt: torch.Tensor, folder: Path) -> None:
    """prompt (n, width) as a prompt-tuning adapter of a causal model."""
    if prompt.dim() != 2:
        raise ValueError("this prompt holds keys and values for every layer, and PEFT's prompt "
                         "tuning knows embeddings only")
    n, width = prompt.shape
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "adapter_model.safetensors", {"prompt_embeddings": prompt.float()})
    write_json(folder / "adapter_config.json", {
        "peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "inference_mode": True,
        "base_model_name_or_path": model, "tokenizer_name_or_path": None, "revision": None,
        "num_virtual_tokens": n, "token_dim": width, "num_transformer_submodules": 1,
        "num_attention_heads": c.n_head, "num_layers": c.n_layer,
        "prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None,
        "auto_mapping": None, "modules_to_save": None})


def from_peft(folder: Path) -> torch.Tensor:
    """The prompt (n, width) fp32 of a prompt-tuning adapter."""
    config = folder / "adapter_config.json"
    said = read_json(config)
    kind, submodules = said.get("peft_type"), said.get("num_transformer_submodules", 1)
    if kind != "PROMPT_TUNING" or submodules not in (1, None):
        raise ValueError(f"{config} is of peft_type {str(kind)[:60]} with {str(submodules)[:20]} "
                         f"submodules: only PROMPT_TUNING of a causal model is a prompt of "
                         f"embeddings")
    path = folder / "adapter_model.safetensors"
    older = path.with_suffix(".bin")
    held = read_state(older) if older.exists() and not path.exists() else read_safetensors(path)
    prompt = held.get("prompt_embeddings")
    n = said.get("num_virtual_tokens")
    whole = prompt is not None and prompt.dim() == 2 and prompt.is_floating_point()
    if not whole or len(prompt) != n:
        raise ValueError(f"{path} does not hold the prompt_embeddings of {str(n)[:20]} tokens that "
                         f"adapter_config.json speaks of")
    return prompt.float()


# -------------------------------------------------------------------------------------------------

def completeness(folder: Path) -> str:
    """In words: whether a folder holds all of a model, which is not known of other programs'
    kinds. Raises FileNotFoundError or ValueError where a file or a weight is missing or another's.
    """
    path = folder / "config.json"
    if not path.exists() and not (folder / "params.json").exists():     # that one is Meta's
        raise FileNotFoundError(f"{folder} is not complete: there is no config.json, which is "
                                f"written last")
    said = read_json(path) if path.exists() else {}
    quantized = said.get("quantization_config")
    if family_of(said) not in ("llama", "opt") or quantized is not None and not is_ours(quantized):
        return f"whether {folder} is complete is not known: {path} describes no model of ours"
    open_checkpoint(folder).check_head()
    return f"{folder} is complete"


def new_folder(path: Path, source: Path) -> Path:
    """The folder to write into: new or empty, and not where the model comes from."""
    taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
    if taken or path.resolve() == source.resolve():
        raise ValueError(f"{path} exists and is not empty: give a new folder, nothing is "
                         f"overwritten")
    return path


def main(args) -> None:
    folder = resolve(args.model)
    if args.verify:
        if args.to or args.out or args.prompt or args.dtype:
            raise ValueError("--verify reads and writes nothing: leave out --to, the folder to "
                             "write, --prompt and --dtype")
        for file, count in verify(folder).items():
            found = "no checksums in this file"
            if count is not None:
                found = f"{count} tensors as they were written"
            print(f"{file}: {found}")
        print(completeness(folder))
        return
    if not args.to or not args.out:
        raise ValueError("say what to write and where: --to hf|gptq|meta|peft|prompt OUT; or "
                         "--verify")
    out = Path(args.out)
    needs_prompt = args.to in ("peft", "prompt")
    if needs_prompt != bool(args.prompt):
        raise ValueError(f"--to {args.to} {'needs' if needs_prompt else 'takes no'} --prompt")
    if args.dtype and args.to not in ("hf", "meta"):
        raise ValueError(f"--dtype does nothing with --to {args.to}: leave it out")
    source = open_checkpoint(folder)
    source.check_head()
    dtype = getattr(torch, args.dtype) if args.dtype else None

    if args.to == "prompt":
        prompt = from_peft(Path(args.prompt))
        check_fits(source.skeleton(), prompt, args.prompt)
        if out.exists():
            raise ValueError(f"{out} exists: give a new file, nothing is overwritten")
        if out.suffix != ".safetensors":
            raise ValueError(f"{out}: a prompt's file ends in .safetensors")
        save_prompt(out, prompt, {"from": str(args.prompt)})
    elif args.to == "peft":
        prompt, _ = load_prompt(args.prompt, source.ends(), tokenizer_of(folder)[0])
        to_peft(str(args.model), source.config, prompt, new_folder(out, folder))
    elif args.to == "gptq":
        to_gptq(source, new_folder(out, folder))
    else:
        {"hf": to_hf, "meta": to_meta}[args.to](source, new_folder(out, folder), dtype)
    print(f"written: {out}")


if __name__ == "__main__":
    run_program(main, args)
