"""LLaMA (1, 2, 3) and OPT as one readable Transformer, and raw checkpoints in and out.

Both are decoders: embed, n blocks of (attention, MLP), norm, head. They differ in the norm
(RMSNorm / LayerNorm), the positions (rotary, RoFormer 2104.09864 / learned), the MLP (gated SiLU /
ReLU) and the biases: `Config` says which.

    from model import load_model
    model = load_model("checkpoints/opt-125m")      # or a Meta folder, or any Hugging Face one
    logits = model(tokens)                          # (B, T) int64 -> (B, T, vocab)

`embed`, `stem`, `blocks`, `head` can be called one by one, and `Block.sublayers` shows a block as
two steps of the residual stream, so that a walk over blocks needs no hooks. A model larger than the
memory is read block by block:

    checkpoint = open_checkpoint("checkpoints/llama-7b")    # names and shapes checked, weights not
    block = checkpoint.block(3, torch.float16, "cuda")      # one block of it

Left out: training dropout, and rotary scalings other than linear and llama3.
"""
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data.checkpoint import (Tensors, parse_json, read_folder, read_meta, read_metadata,
                             read_safetensors, write_json, write_safetensors)
from data.config import (Config, check_layers, file_sums, hf_config, packed_layers, read_config,
                         resolve)
from kernels.cpu_attention import AttentionByParts, by_parts_pays
from kernels.linear import PackedLinear
from kernels.packing import Packed, check_packed, count_kept, nbytes
from kernels.unpacking import unpack


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)  # squares summed in fp32


def rotary_table(c: Config, start: int | torch.Tensor, length: int,
                 device) -> tuple[torch.Tensor, torch.Tensor]:
    """For positions start ... start + length - 1, fp32 (length, head_dim) each: the cosine of each
    channel's angle, and the sine, negative in the first half of the channels."""
    freq = c.rope_theta ** -(torch.arange(0, c.head_dim, 2, device=device).float() / c.head_dim)
    s = c.rope_scaling or {"rope_type": "default"}
    if s["rope_type"] == "linear":
        freq = freq / s["factor"]
    elif s["rope_type"] == "llama3":
        # long waves are slowed by `factor`, short ones kept, and between them is a ramp
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        waves = s["original_max_position_embeddings"] * freq / (2 * math.pi)
        ramp = ((waves - low) / (high - low)).clamp(0, 1)
        freq = ramp * freq + (1 - ramp) * freq / s["factor"]
    angle = torch.outer((start + torch.arange(length, device=device)).float(), freq)
    return torch.cat([angle.cos()] * 2, -1), torch.cat([-angle.sin(), angle.sin()], -1)


def rotate(x, rope):
    """Rotary embedding of x (B, heads, T, head_dim): a channel of the first half is paired with one
    of the second, (a, b) -> (a cos - b sin, b cos + a sin)."""
    cos, sin = (t.to(x.dtype) for t in rope)
    other = x.roll(x.shape[-1] // 2, -1)            # the halves exchanged
    return torch.addcmul(x * cos, other, sin)


class KV(NamedTuple):
    """Keys and values (B, n_kv_head, length, head_dim) of one block, of which `past` positions are
    filled. Where past is a tensor (1,), mask (1, length) says what a step of one token may see: 0,
    or -inf for what is still to come."""
    k: torch.Tensor
    v: torch.Tensor
    past: int | torch.Tensor = 0
    mask: torch.Tensor | None = None


class Attention(nn.Module):
    reads, writes = ("q", "k", "v"), "o"            # its Linears, first and last

    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        self.q = nn.Linear(c.d_model, c.n_head * c.head_dim, bias=c.attention_bias)
        self.k = nn.Linear(c.d_model, c.n_kv_head * c.head_dim, bias=c.attention_bias)
        self.v = nn.Linear(c.d_model, c.n_kv_head * c.head_dim, bias=c.attention_bias)
        self.o = nn.Linear(c.n_head * c.head_dim, c.d_model, bias=c.attention_bias)

    def mix(self, x, rope, kv: KV | None = None):
        """Everything before the output projection: (B, T, d_model) -> (B, T, n_head * head_dim)."""
        B, T, _ = x.shape
        q, k, v = (linear(x).view(B, T, -1, self.c.head_dim).transpose(1, 2)
                   for linear in (self.q, self.k, self.v))  # (B, heads, T, head_dim)
        if rope is not None:
            q = rotate(q, rope)
            k = rotate(k, rope)
        past, mask = 0, None
        if kv is not None:
            past, mask = kv.past, kv.mask
            k, v = self.join(kv, k, v)              # (B, n_kv_head, past + T, head_dim)
        if by_parts_pays(q, k):
            return AttentionByParts.apply(q, k, v).transpose(1, 2).reshape(B, T, -1)
        # The causal kernel skips half of the products, but wants as many queries as keys. Behind
        # few positions, `past` empty queries in front of q are cheaper than a mask.
        causal = T > 1 and 4 * past <= T
        if causal:
            q = F.pad(q, (0, 0, past, 0))
        elif T > 1:
            mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal,
                                           enable_gqa=True)
        if causal:
            y = y[:, :, past:]
        return y.transpose(1, 2).reshape(B, T, -1)

    @staticmethod
    def join(kv: KV, k, v):
        """Keys and values held in kv, with the new ones behind them. What is full is a prefix: read
        by every row of the batch, and never written. Where kv has a mask all of it comes back."""
        T = k.shape[2]
        if kv.mask is not None:
            return kv.k.index_copy_(2, kv.past, k), kv.v.index_copy_(2, kv.past, v)
        if kv.past == kv.k.shape[2]:
            return (torch.cat([held.expand(len(new), -1, -1, -1), new], 2)
                    for held, new in ((kv.k, k), (kv.v, v)))
        kv.k[:, :, kv.past:kv.past + T] = k
        kv.v[:, :, kv.past:kv.past + T] = v
        return kv.k[:, :, :kv.past + T], kv.v[:, :, :kv.past + T]

    def forward(self, x, rope, kv=None):
        return self.o(self.mix(x, rope, kv))


class MLP(nn.Module):
    writes = "down"

    def __init__(self, c: Config):
        super().__init__()
        self.reads = ("gate", "up") if c.family == "llama" else ("up",)
        self.gate = nn.Linear(c.d_model, c.d_ff, bias=c.mlp_bias) if c.family == "llama" else None
        self.up = nn.Linear(c.d_model, c.d_ff, bias=c.mlp_bias)
        self.down = nn.Linear(c.d_ff, c.d_model, bias=c.mlp_bias)

    def mix(self, x, rope=None):
        """Everything before the last Linear: (B, T, d_model) -> (B, T, d_ff)."""
        if self.gate is None:
            return F.relu(self.up(x))
        return F.silu(self.gate(x)) * self.up(x)

    def forward(self, x):
        return self.down(self.mix(x))


class Sublayer(NamedTuple):
    """Attention or MLP as one step of the residual stream h: h + out(mix(norm(h))), or, where the
    norm comes last, norm(h + out(mix(h)))."""
    name: str                                       # "attn" or "mlp"
    part: nn.Module
    norm: nn.Module
    pre_norm: bool

    @property
    def reads(self) -> list[str]:
        """Names within the block of the Linears that read the stream."""
        return [f"{self.name}.{n}" for n in self.part.reads]

    @property
    def writes(self) -> list[str]:
        """Name within the block of the Linear whose output joins the stream, as a list of one."""
        return [f"{self.name}.{self.part.writes}"]

    def read(self, h):
        """The stream -> what the Linears of `reads` read."""
        return self.norm(h) if self.pre_norm else h

    def mix(self, h, rope):
        """The stream -> what the Linear of `writes` reads."""
        return self.part.mix(self.read(h), rope)

    def write(self, h, x):
        """The stream and mix of it -> the stream of the next step."""
        h = h + self.part.get_submodule(self.part.writes)(x)
        return h if self.pre_norm else self.norm(h)


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        norm = RMSNorm if c.family == "llama" else nn.LayerNorm
        self.pre_norm = c.pre_norm
        self.norm1 = norm(c.d_model, eps=c.norm_eps)
        self.attn = Attention(c)
        self.norm2 = norm(c.d_model, eps=c.norm_eps)
        self.mlp = MLP(c)

    def sublayers(self) -> tuple[Sublayer, Sublayer]:
        return (Sublayer("attn", self.attn, self.norm1, self.pre_norm),
                Sublayer("mlp", self.mlp, self.norm2, self.pre_norm))

    def forward(self, h, rope, kv=None):
        if self.pre_norm:
            h = h + self.attn(self.norm1(h), rope, kv)
            return h + self.mlp(self.norm2(h))
        h = self.norm1(h + self.attn(h, rope, kv))
        return self.norm2(h + self.mlp(h))


class Cache:
    """Keys and values of the positions seen so far: kv holds a pair (B, n_kv_head, length,
    head_dim) for every block.

    A full one of batch 1 whose `is_prefix` is set is read by any batch, nothing is written, and
    gradients reach what it was made of. start, the number of positions seen, may be a tensor (1,)
    int64: then a step of one token does the same operations at every position, as a CUDA graph
    wants."""

    def __init__(self, c: Config, batch: int, length: int, dtype, device):
        shape = batch, c.n_kv_head, length, c.head_dim

        def zeros():
            return torch.zeros(shape, dtype=dtype, device=device)
        self.kv = [(zeros(), zeros()) for _ in range(c.n_layer)]
        self.start = 0
        self.is_prefix = False

    def check_room(self, length: int) -> None:
        """Raises ValueError where `length` more positions are too many. A start in a tensor, which
        only the device knows, is not looked at."""
        room = self.kv[0][0].shape[2]
        if not torch.is_tensor(self.start) and self.start + length > room:
            raise ValueError(f"a cache of {room} positions, {self.start} of them filled, has no "
                             f"room for {length} more: make a longer one with new_cache")

    def block(self, i: int, mask: torch.Tensor | None = None) -> KV:
        return KV(*self.kv[i], self.start, mask)

    def mask(self, dtype) -> torch.Tensor | None:
        """KV's mask, where the position is a tensor."""
        if not torch.is_tensor(self.start):
            return None
        length = self.kv[0][0].shape[2]
        device = self.start.device
        later = torch.arange(length, device=device) > self.start
        return torch.zeros(1, length, dtype=dtype, device=device).masked_fill_(later, -math.inf)


class Embedding(nn.Embedding):
    def reset_parameters(self):
        if not self.weight.is_meta:                 # there, normal_ would import a compiler first
            super().reset_parameters()


class Transformer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        self.embed_tokens = Embedding(c.vocab_size, c.d_embed)
        learned = c.family == "opt"                     # positions; LLaMA's are rotary
        self.embed_positions = Embedding(c.max_positions + 2, c.d_model) if learned else None
        wide = c.d_embed != c.d_model
        self.project_in = nn.Linear(c.d_embed, c.d_model, bias=False) if wide else None
        self.project_out = nn.Linear(c.d_model, c.d_embed, bias=False) if wide else None
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        norm = RMSNorm if c.family == "llama" else nn.LayerNorm
        self.norm = norm(c.d_model, eps=c.norm_eps) if c.final_norm else None
        self.lm_head = None if c.tied else nn.Linear(c.d_embed, c.vocab_size, bias=False)
        self.checkpointing = False          # recompute blocks in the backward pass to save memory

    def embed(self, tokens):
        return self.embed_tokens(tokens)                # (B, T) -> (B, T, d_embed)

    def stem(self, embeds, start: int | torch.Tensor = 0):
        """Embeddings (B, T, d_embed) -> the first block's input (B, T, d_model), at positions
        start ... start + T - 1."""
        T = embeds.shape[1]
        most = self.config.max_positions
        if not torch.is_tensor(start) and start + T > most:
            raise ValueError(f"{start + T} positions, prompt included, but this model has {most}: "
                             f"use a shorter seqlen or prompt")
        h = embeds if self.project_in is None else self.project_in(embeds)
        if self.embed_positions is not None:
            # OPT keeps two unused rows in front
            h = h + self.embed_positions(start + 2 + torch.arange(T, device=h.device))
        return h

    def rope(self, start: int | torch.Tensor, length: int, device):
        """rotary_table of these positions; None where positions are learned."""
        if self.config.family != "llama":
            return None
        return rotary_table(self.config, start, length, device)

    def hidden(self, x, cache: Cache | None = None):
        """Tokens (B, T) or embeddings (B, T, d_embed) -> the last block's output (B, T,
        d_model)."""
        start = cache.start if cache else 0
        writes = cache is not None and not cache.is_prefix
        embeds = x if x.is_floating_point() else self.embed(x)
        if writes:
            cache.check_room(x.shape[1])
        h = self.stem(embeds.to(self.embed_tokens.weight.dtype), start)
        rope = self.rope(start, h.shape[1], h.device)
        if rope is not None:
            rope = tuple(t.to(h.dtype) for t in rope)           # once for all blocks
        mask = cache.mask(h.dtype) if cache else None
        for i, block in enumerate(self.blocks):
            kv = cache.block(i, mask) if cache else None
            if self.checkpointing and torch.is_grad_enabled() and not writes:
                h = checkpoint(block, h, rope, kv, use_reentrant=False)
            else:
                h = block(h, rope, kv)
        if writes:
            cache.start += h.shape[1]
        return h

    @property
    def unembed(self) -> torch.Tensor:
        """The head's matrix (vocab_size, d_embed): logits are final(h) @ unembed.T."""
        return (self.embed_tokens if self.lm_head is None else self.lm_head).weight

    def final(self, h):
        """The last block's output (..., d_model) -> what the head's matrix reads (..., d_embed)."""
        h = h if self.norm is None else self.norm(h)
        return h if self.project_out is None else self.project_out(h)

    def head(self, h):
        return F.linear(self.final(h), self.unembed)

    def forward(self, x, cache: Cache | None = None):
        """Tokens (B, T) int64 or embeddings (B, T, d_embed) -> logits (B, T, vocab_size)."""
        return self.head(self.hidden(x, cache))

    def new_cache(self, batch: int, length: int) -> Cache:
        w = self.embed_tokens.weight
        return Cache(self.config, batch, length, w.dtype, w.device)

    def linears(self):
        """(name, module) of every Linear inside the blocks: what gets compressed, in order."""
        return [(f"blocks.{i}.{name}", module) for i, block in enumerate(self.blocks)
                for name, module in block.named_modules() if hasattr(module, "in_features")]


# --------------------------------------------------------------------------------------------------
# Checkpoints. Our parameter names are turned into the published ones by these substitutions, one
# after the other, and never the other way round.

HF = {
    "llama": [
        (r"^blocks", "model.layers"),
        (r"^(embed_tokens|norm)\b", r"model.\1"),
        (r"\.attn\.(\w)\.", r".self_attn.\1_proj."),
        (r"\.mlp\.(\w+)\.", r".mlp.\1_proj."),
        (r"\.norm1", ".input_layernorm"),
        (r"\.norm2", ".post_attention_layernorm"),
    ],
    "opt": [
        (r"^norm\b", "final_layer_norm"),
        (r"^blocks", "layers"),
        (r"^(?!lm_head)", "model.decoder."),
        (r"\.attn\.o\.", ".self_attn.out_proj."),
        (r"\.attn\.(\w)\.", r".self_attn.\1_proj."),
        (r"\.mlp\.up", ".fc1"),
        (r"\.mlp\.down", ".fc2"),
        (r"\.norm1", ".self_attn_layer_norm"),
        (r"\.norm2", ".final_layer_norm"),
    ],
}
META = [
    (r"^blocks", "layers"),
    (r"\.attn\.(\w)\.", r".attention.w\1."),
    (r"\.mlp\.gate", ".feed_forward.w1"),
    (r"\.mlp\.up", ".feed_forward.w3"),
    (r"\.mlp\.down", ".feed_forward.w2"),
    (r"\.norm1", ".attention_norm"),
    (r"\.norm2", ".ffn_norm"),
    (r"^lm_head", "output"),
    (r"^embed_tokens", "tok_embeddings"),
]
# tables and masks, not weights
IGNORED = re.compile(r"rotary_emb\.inv_freq$|^rope\.freqs$|\.masked_bias$")


def published_name(name: str, table) -> str:
    for pattern, theirs in table:
        name = re.sub(pattern, theirs, name)
    return name


def bare_name(name: str) -> str:
    """Some Hugging Face files leave these prefixes out."""
    return re.sub(r"^(model\.)?(decoder\.)?", "", name)


def half_split(w, heads: int):
    """Meta pairs rotary channels (0,1), (2,3), ...; we pair the first half with the second, as
    Hugging Face does."""
    return w.view(heads, -1, 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape)


def skeleton_of(config: Config) -> Transformer:
    """A model on the meta device: names and shapes without weights."""
    with torch.device("meta"):
        return Transformer(config)


class Checkpoint:
    """Weights under our own names: compared with a configuration, mapped, not read (but for packed
    Linears, which are looked through).

    tensor("blocks.0.attn.q.weight") is one of them as it is stored; packed["blocks.0.attn.q"] is a
    Linear that is stored packed. Raises ValueError with one line for missing, extra or mis-shaped
    weights."""

    def __init__(self, place: Path, config: Config, files: Tensors, layers: dict[str, dict],
                 skeleton: nn.Module, prefix: str = "", meta: bool = False):
        """place: named in errors. files: the file's names and tensors, layers: meta of its packed
        Linears. skeleton: the module, on the meta device, that they must fill, its names beginning
        with prefix. meta: Meta's layout."""
        self.place, self.config, self.files, self.meta = place, config, files, meta
        stored = {n if meta else bare_name(n): n for n in files}
        twice = set(files) - set(stored.values())
        if twice:
            raise ValueError(f"{place} holds {twice.pop()} under a shorter name too: its weights "
                             f"are not of one model")
        if config.family == "opt" and not prefix and "lm_head.weight" not in stored:
            config.tied = True              # OPT always ties; some files say so by leaving it out
            skeleton.lm_head = None
        self.packed = self.take_packed(skeleton, prefix, stored, dict(layers))
        embedding = bare_name(published_name("embed_tokens.weight", HF[config.family]))
        if config.tied and not meta and not prefix and embedding not in stored:
            if "lm_head.weight" in stored:              # safetensors keeps one name of the two
                stored[embedding] = stored.pop("lm_head.weight")
        self.keys = {}                                  # our name -> the file's
        missing = []
        for name, p in skeleton.named_parameters():
            if (prefix + name).removesuffix(".weight") in self.packed:
                continue
            theirs = published_name(prefix + name, META if meta else HF[config.family])
            key = stored.pop(theirs if meta else bare_name(theirs), None)
            if key is None:
                missing.append(theirs)
                continue
            if files.shape(key) != p.shape:             # reads nothing
                raise ValueError(f"{files.files[key]}: {key} has shape {tuple(files.shape(key))}, "
                                 f"but the configuration wants {tuple(p.shape)}")
            self.keys[prefix + name] = key
        # a stored copy of the tied head
        self.copy_of_head = stored.pop("lm_head.weight", None) if config.tied else None
        extra = [n for n in stored.values() if not IGNORED.search(n)]
        found = (("missing", missing), ("unexpected", extra))
        if missing or extra:
            raise ValueError(f"{place} does not fit its configuration: " + "; ".join(
                f"{len(names)} {what}, such as {names[0]}" for what, names in found if names))

    def take_packed(self, skeleton: nn.Module, prefix: str, stored: dict,
                    layers: dict) -> dict[str, Packed]:
        """The Linears that `layers` calls packed, checked; their tensors leave `stored`."""
        packed = {}
        for name, linear in skeleton.named_modules() if layers else ():
            theirs = published_name(f"{prefix}{name}.weight", HF[self.config.family])
            theirs = theirs.removesuffix(".weight")
            if not hasattr(linear, "in_features") or theirs not in layers:
                continue
            names = [n for n in stored
                     if n.startswith(bare_name(theirs) + ".") and not n.endswith(".bias")]
            tensors = {n.rpartition(".")[2]: self.files[stored.pop(n)] for n in names}
            tensors.pop("tile_start", None)         # of older files; nothing reads it
            held = packed[prefix + name] = Packed(tensors, layers.pop(theirs))
            try:
                check_packed(held, (linear.out_features, linear.in_features))
            except ValueError as e:
                raise ValueError(f"{self.place}: {theirs}: {e}") from None
        if layers:
            raise ValueError(f"{self.place} packs {next(iter(layers))}, which is no Linear of this "
                             f"model")
        return packed

    def check_head(self) -> None:
        """ValueError where the configuration ties the head to the embedding, and the file holds
        another head."""
        if self.copy_of_head is None:
            return
        head, embedding = self.files[self.copy_of_head], self.tensor("embed_tokens.weight")
        if not torch.equal(head, embedding):
            raise ValueError(f"{self.place}: its configuration ties head and embedding, and its "
                             f"{self.copy_of_head} is not the embedding: set tie_word_embeddings "
                             f"to false, or remove that weight")

    def skeleton(self) -> Transformer:
        """The model on the meta device: names and shapes without weights."""
        return skeleton_of(self.config)

    def count(self) -> int:
        """How many weights the whole model has."""
        return sum(p.numel() for p in self.skeleton().parameters())

    def tensor(self, name: str) -> torch.Tensor:
        """One weight in its stored dtype, a view of the file where the layout allows it."""
        w = self.files[self.keys[name]]
        if self.meta and name.endswith(("attn.q.weight", "attn.k.weight")):
            w = half_split(w, w.shape[0] // self.config.head_dim)
        return w

    def fill(self, module: nn.Module, prefix: str = "", dtype: torch.dtype | None = torch.float32,
             device="cpu", packed: bool = True) -> nn.Module:
        """Weights for a module made on the meta device, whose names here begin with prefix. dtype
        None: as stored.

        Linears that are stored packed become PackedLinear, or, with packed=False, ordinary ones
        with the same weights."""
        state = {}
        for name, linear in list(module.named_modules()):
            held = self.packed.get(prefix + name)
            if held is None:
                continue
            if packed:
                # views of the file until they move to another device
                held = Packed({n: t.to(device) for n, t in held.tensors.items()}, held.meta)
                module.set_submodule(name, PackedLinear(held, linear.bias))
            else:
                state[f"{name}.weight"] = unpack(held, dtype or torch.float16).to(device)
        for name, _ in module.named_parameters():
            if prefix + name == "embed_tokens.weight":
                self.check_head()
            if name not in state:
                state[name] = self.tensor(prefix + name).to(device=device, dtype=dtype)
        # not strict: packed tensors are in place already
        module.load_state_dict(state, assign=True, strict=False)
        return module.eval().requires_grad_(False)

    def block(self, i: int, dtype: torch.dtype | None = None, device="cpu",
              packed: bool = True) -> Block:
        """Block i alone; dtype None: as stored."""
        with torch.device("meta"):
            block = Block(self.config)
        return self.fill(block, f"blocks.{i}.", dtype, device, packed)

    def ends(self, dtype: torch.dtype | None = None, device="cpu") -> Transformer:
        """The model without its blocks: embedding, last norm and head."""
        model = self.skeleton()
        model.blocks = nn.ModuleList()
        return self.fill(model, "", dtype, device)

    def model(self, dtype: torch.dtype | None = torch.float32, device="cpu",
              packed: bool = True) -> Transformer:
        """The whole of it."""
        return self.fill(self.skeleton(), "", dtype, device, packed)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The weights of a folder or a name (see resolve), to be read tensor by tensor or block by
    block.

    Raises FileNotFoundError / ValueError with one line for what is missing, unexpected, mis-shaped
    or truncated."""
    folder = resolve(path)
    config = read_config(folder)
    meta = not (folder / "config.json").exists()
    layers = packed_layers(folder)                  # refuses what others quantized, unread
    files = read_meta(folder) if meta else read_folder(folder)
    return Checkpoint(folder, config, files, layers, skeleton_of(config), meta=meta)


def check_device(device) -> None:
    """ValueError, in one line, for a device that cannot be used here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"device {device} cannot be used here: {str(e).splitlines()[0]}") from None


def load_model(path: str | Path, dtype: torch.dtype = torch.float32, device="cpu",
               packed: bool = True) -> Transformer:
    """A frozen Transformer from a folder or a name (see resolve). Files are mapped and read tensor
    by tensor.

    Linears that are stored packed become PackedLinear, or, with packed=False, ordinary ones with
    the same weights. Raises FileNotFoundError / ValueError with one line for missing, extra,
    mis-shaped or truncated weights."""
    check_device(device)
    return open_checkpoint(path).model(dtype, device, packed)


def published_state(module: nn.Module, family: str, prefix: str = "",
                    dtype: torch.dtype = torch.float16
                    ) -> tuple[dict[str, torch.Tensor], dict[str, dict]]:
    """Tensors of a module under Hugging Face's names, what is floating point in dtype, and the meta
    of its packed Linears.

    A PackedLinear gives its packed tensors, `<name of the Linear>.codes` and so on."""
    table, layers = HF[family], {}
    state = {published_name(prefix + name, table): p.detach().to(dtype)
             for name, p in module.named_parameters()}
    for name, w in state.items():
        if not torch.isfinite(w).all():
            raise ValueError(f"{name} does not fit {dtype}: save in bfloat16 or float32")
    for name, m in module.named_modules():
        if isinstance(m, PackedLinear):
            theirs = published_name(f"{prefix}{name}.weight", table).removesuffix(".weight")
            layers[theirs] = m.meta
            state.update({f"{theirs}.{n}": t for n, t in m.packed.tensors.items()})
    return state, layers


def save_config(folder: Path, config: Config, layers: dict, dtype: torch.dtype = torch.float16,
                extra: dict | None = None) -> None:
    """config.json; `layers` is what the packed tensors mean, `extra` joins it."""
    # packed: so that nobody can put a folder together from two
    files = file_sums(folder) if layers else None
    held = {**hf_config(config, layers, files), "torch_dtype": str(dtype).removeprefix("torch."),
            **(extra or {})}
    write_json(folder / "config.json", held)


def save_model(model: Transformer, folder: str | Path, dtype: torch.dtype = torch.float16,
               extra: dict | None = None) -> None:
    """Write config.json and model.safetensors in the Hugging Face layout; `extra` joins
    config.json.

    A PackedLinear is written as its packed tensors, with what they mean under quantization_config.
    Other libraries cannot read these: for them, save what load_model(..., packed=False) gives."""
    folder = Path(folder)
    state, layers = published_state(model, model.config.family, "", dtype)
    folder.mkdir(parents=True, exist_ok=True)
    # no reader may join an older configuration, or an index of shards, to these weights
    (folder / "config.json").unlink(missing_ok=True)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    write_safetensors(folder / "model.safetensors", state)
    save_config(folder, model.config, layers, dtype, extra)


# A model too large for the memory is written in shards, the first with the ends, then a block each;
# config.json comes last, so that a folder without it is not complete.

def shard_path(folder: Path, part: int, n_layer: int) -> Path:
    """File of part 0, the ends, or of part i + 1, block i."""
    return folder / f"model-{part + 1:05d}-of-{n_layer + 1:05d}.safetensors"


def save_shard(folder: Path, module: nn.Module, part: int, config: Config,
               note: dict | None = None) -> None:
    """Write the ends (part 0) or block part - 1 with `note`, JSON values that read_note finds
    again."""
    prefix = f"blocks.{part - 1}." if part else ""
    state, layers = published_state(module, config.family, prefix)
    told = {"compress-then-prompt": json.dumps({"layers": layers, "note": note or {}})}
    write_safetensors(shard_path(folder, part, config.n_layer), state, told)


def read_note(path: Path) -> dict:
    """{"layers": meta of the packed Linears, "note": ...} of a shard that save_shard wrote."""
    said = read_metadata(path)
    try:
        held = parse_json(said["compress-then-prompt"].encode())
        check_layers(path, held["layers"])
        found = held["note"].setdefault("layers", [])           # one dict a Linear
        whole = "crc32" in said and all(type(layer["error"]) is float for layer in found)
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"{path} is not a shard of a compressed model: delete it and compress "
                         f"again")
    return held


def load_block(path: Path, i: int, config: Config, dtype: torch.dtype, device="cpu") -> Block:
    """Block i from its shard, with ordinary Linears."""
    with torch.device("meta"):
        block = Block(config)
    prefix = f"blocks.{i}."
    layers = read_note(path)["layers"]
    shard = Checkpoint(path, config, read_safetensors(path), layers, block, prefix)
    return shard.fill(block, prefix, dtype, device, packed=False)


def save_index(folder: Path, config: Config) -> None:
    """The index of all shards, then config.json: the folder is complete."""
    names, layers, total = {}, {}, 0
    for part in range(config.n_layer + 1):
        path = shard_path(folder, part, config.n_layer)
        tensors = read_safetensors(path)
        total += sum(t.nbytes for t in tensors.values())
        names.update(dict.fromkeys(tensors, path.name))
        layers.update(read_note(path)["layers"])
    (folder / "model.safetensors").unlink(missing_ok=True)      # it would be read in their place
    write_json(folder / "model.safetensors.index.json",
               {"metadata": {"total_size": total}, "weight_map": names})
    save_config(folder, config, layers)


def storage(model: Transformer, stored: int | None = None) -> dict:
    """What half-precision files of the model take: megabytes, real bits per weight of everything
    and of the blocks' Linears (masks, starts and grids counted), and `nominal`, the literature's
    16 / (bits x share of weights kept).

    stored: a file's real size in bytes, headers and all, if there is one."""
    weights = used = needed = dense = 0
    for _, m in model.linears():
        n = m.in_features * m.out_features
        weights += n
        if isinstance(m, PackedLinear):
            used += nbytes(m.packed)
            needed += m.meta["bits"] * count_kept(m.packed)
        else:
            used += 2 * n
            needed += 16 * (n if m.weight.is_meta else int(m.weight.count_nonzero()))
            dense += n
    others = sum(p.numel() for p in model.parameters()) - dense
    stored = used + 2 * others if stored is None else stored
    return {"megabytes": stored / 1e6, "bits_per_weight": 8 * stored / (weights + others),
            "linear_bits_per_weight": 8 * used / weights, "nominal": 16 * weights / max(needed, 1)}
