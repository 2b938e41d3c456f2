"""LLaMA (1, 2, 3) and OPT as one readable Transformer, and raw checkpoints in and out.

Both are decoders: embed, n blocks of (attention, MLP), norm, head. They differ in the norm (RMSNorm / LayerNorm), the
positions (rotary, RoFormer 2104.09864 / learned), the MLP (gated SiLU / ReLU) and the biases: `Config` says which.

    from model import load_model
    model = load_model("checkpoints/opt-125m")          # or a Meta folder, or any Hugging Face LLaMA / OPT folder
    logits = model(tokens)                              # (B, T) int64 -> (B, T, vocab)

`embed`, `stem`, `blocks`, `head` can be called one by one, and `Block.steps` shows the input of every Linear as it goes,
so that compressing a model needs no hooks. Left out: training dropout, and rotary scalings other than linear and llama3.
"""
import json
import math
import re
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data.checkpoint import read_folder, read_meta, write_atomic, write_safetensors
from data.config import Config, hf_config, packed_layers, read_config, resolve
from kernels.linear import PackedLinear
from kernels.packing import Packed, check_packed, count_kept, nbytes
from kernels.unpacking import unpack


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        r = x.float()                                                        # the mean of squares overflows in fp16
        return self.weight * (r * torch.rsqrt(r.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rotary_table(c: Config, start: int, length: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (length, head_dim) in fp32 for positions start ... start + length - 1."""
    freq = c.rope_theta ** -(torch.arange(0, c.head_dim, 2, device=device).float() / c.head_dim)
    s = c.rope_scaling or {"rope_type": "default"}
    if s["rope_type"] == "linear":
        freq = freq / s["factor"]
    elif s["rope_type"] == "llama3":                    # long waves are slowed by `factor`, short ones kept, a ramp between
        low, high, old = s["low_freq_factor"], s["high_freq_factor"], s["original_max_position_embeddings"]
        ramp = ((old * freq / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        freq = ramp * freq + (1 - ramp) * freq / s["factor"]
    angle = torch.outer(torch.arange(start, start + length, device=device).float(), freq)
    return torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)


def rotate(x, rope):
    """Rotary embedding of x (B, heads, T, head_dim), first half of the channels paired with the second."""
    cos, sin = (t.to(x.dtype) for t in rope)
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        self.q = nn.Linear(c.d_model, c.n_head * c.head_dim, bias=c.attention_bias)
        self.k = nn.Linear(c.d_model, c.n_kv_head * c.head_dim, bias=c.attention_bias)
        self.v = nn.Linear(c.d_model, c.n_kv_head * c.head_dim, bias=c.attention_bias)
        self.o = nn.Linear(c.n_head * c.head_dim, c.d_model, bias=c.attention_bias)

    def mix(self, x, rope, kv=None):
        """Everything before the output projection: (B, T, d_model) -> (B, T, n_head * head_dim)."""
        B, T, _ = x.shape
        q, k, v = (f(x).view(B, T, -1, self.c.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        past = 0 if kv is None else kv[2]                                    # kv: (K, V, positions held)
        if kv is not None and past == kv[0].shape[2]:                        # full: a prefix, read and never written
            k, v = (torch.cat([t.expand(B, -1, -1, -1), new], 2) for t, new in zip(kv, (k, v)))
        elif kv is not None:
            for t, new in zip(kv, (k, v)):
                t[:, :, past:past + T] = new
            k, v = (t[:, :, :past + T] for t in kv[:2])                      # (B, n_kv_head, past + T, head_dim)
        square, mask = T > 1 and 4 * past <= T, None                         # few: with empty queries in front the causal
        if square:                                                           # kernel needs no mask and skips half
            q = F.pad(q, (0, 0, past, 0))
        elif T > 1:
            mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=square, enable_gqa=True)
        y = y[:, :, past:] if square else y
        return y.transpose(1, 2).reshape(B, T, -1)


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate = nn.Linear(c.d_model, c.d_ff, bias=c.mlp_bias) if c.family == "llama" else None
        self.up = nn.Linear(c.d_model, c.d_ff, bias=c.mlp_bias)
        self.down = nn.Linear(c.d_ff, c.d_model, bias=c.mlp_bias)

    def mix(self, x):
        return F.relu(self.up(x)) if self.gate is None else F.silu(self.gate(x)) * self.up(x)   # (B, T, d_ff)


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        norm = RMSNorm if c.family == "llama" else nn.LayerNorm
        self.pre_norm = c.pre_norm
        self.norm1, self.attn = norm(c.d_model, eps=c.norm_eps), Attention(c)
        self.norm2, self.mlp = norm(c.d_model, eps=c.norm_eps), MLP(c)

    def steps(self, h, rope, kv=None):
        """The forward pass as a generator: yields (names of the Linears about to be used, their shared input, what their
        output will be added to or None), and last ((), output, None). Whoever drives it may replace those Linears' weights
        before it goes on."""
        x = self.norm1(h) if self.pre_norm else h
        yield ("attn.q", "attn.k", "attn.v"), x, None
        x = self.attn.mix(x, rope, kv)
        yield ("attn.o",), x, h
        h = h + self.attn.o(x)
        h = h if self.pre_norm else self.norm1(h)
        x = self.norm2(h) if self.pre_norm else h
        yield ("mlp.up",) if self.mlp.gate is None else ("mlp.gate", "mlp.up"), x, None
        x = self.mlp.mix(x)
        yield ("mlp.down",), x, h
        h = h + self.mlp.down(x)
        yield (), h if self.pre_norm else self.norm2(h), None

    def forward(self, h, rope, kv=None):
        for _, h, _ in self.steps(h, rope, kv):
            pass
        return h


class Cache:
    """Keys and values of the positions seen so far: kv holds a pair (B, n_kv_head, length, head_dim) for every block.

    A full one of batch 1 is a prefix: any batch reads it, nothing is written, gradients reach what it was made of."""

    def __init__(self, c: Config, batch: int, length: int, dtype, device):
        shape = batch, c.n_kv_head, length, c.head_dim
        self.kv = [tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in "kv") for _ in range(c.n_layer)]
        self.start = 0

    @property
    def full(self) -> bool:
        return self.start == self.kv[0][0].shape[2]


class Transformer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.d_embed)
        self.embed_positions = nn.Embedding(c.max_positions + 2, c.d_model) if c.family == "opt" else None
        wide = c.d_embed != c.d_model
        self.project_in = nn.Linear(c.d_embed, c.d_model, bias=False) if wide else None
        self.project_out = nn.Linear(c.d_model, c.d_embed, bias=False) if wide else None
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        norm = RMSNorm if c.family == "llama" else nn.LayerNorm
        self.norm = norm(c.d_model, eps=c.norm_eps) if c.final_norm else None
        self.lm_head = None if c.tied else nn.Linear(c.d_embed, c.vocab_size, bias=False)
        self.checkpointing = False                       # recompute blocks in the backward pass to save memory

    def embed(self, tokens):
        return self.embed_tokens(tokens)                                     # (B, T) -> (B, T, d_embed)

    def stem(self, embeds, start: int = 0):
        """Embeddings (B, T, d_embed) -> the first block's input (B, T, d_model) at positions start ... start + T - 1."""
        T = embeds.shape[1]
        if start + T > self.config.max_positions:
            raise ValueError(f"{start + T} positions, prompt included, but this model has {self.config.max_positions}: "
                             f"use a shorter seqlen or prompt")
        h = embeds if self.project_in is None else self.project_in(embeds)
        if self.embed_positions is not None:                                 # OPT keeps two unused rows in front
            h = h + self.embed_positions.weight[start + 2:start + 2 + T]
        return h

    def rope(self, start: int, length: int, device):
        return rotary_table(self.config, start, length, device) if self.config.family == "llama" else None

    def hidden(self, x, cache: Cache | None = None):
        """Tokens (B, T) or embeddings (B, T, d_embed) -> the last block's output (B, T, d_model)."""
        start = cache.start if cache else 0
        writes = cache is not None and not cache.full
        embeds = x if x.is_floating_point() else self.embed(x)
        h = self.stem(embeds.to(self.embed_tokens.weight.dtype), start)
        rope = self.rope(start, h.shape[1], h.device)
        for i, block in enumerate(self.blocks):
            kv = (*cache.kv[i], start) if cache else None
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

    def nll(self, x, targets, chunk: int = 512):
        """Negative log-likelihood, fp32, of the targets (B, T) that are not -100, in order: a 1-D tensor.

        The head runs on `chunk` scored positions at a time and is recomputed in the backward pass, so the full
        (tokens, vocab_size) logits never exist."""
        keep = targets != -100
        h, targets = self.hidden(x)[keep], targets[keep]

        def loss(h, t):
            return F.cross_entropy(self.head(h).float(), t, reduction="none")
        parts = zip(h.split(chunk), targets.split(chunk))
        if torch.is_grad_enabled() and h.requires_grad:
            return torch.cat([checkpoint(loss, a, t, use_reentrant=False) for a, t in parts])
        return torch.cat([loss(a, t) for a, t in parts])

    def new_cache(self, batch: int, length: int) -> Cache:
        w = self.embed_tokens.weight
        return Cache(self.config, batch, length, w.dtype, w.device)

    def linears(self):
        """(name, module) of every Linear inside the blocks: what gets compressed, in order."""
        return [(f"blocks.{i}.{n}", m) for i, b in enumerate(self.blocks) for n, m in b.named_modules()
                if hasattr(m, "in_features")]


# --------------------------------------------------------------------------------------------------------------------
# Checkpoints. Our parameter names are turned into the published ones by these substitutions, never the other way round.

HF = {"llama": [(r"^blocks", "model.layers"), (r"^(embed_tokens|norm)\b", r"model.\1"),
                (r"\.attn\.(\w)\.", r".self_attn.\1_proj."), (r"\.mlp\.(\w+)\.", r".mlp.\1_proj."),
                (r"\.norm1", ".input_layernorm"), (r"\.norm2", ".post_attention_layernorm")],
      "opt": [(r"^norm\b", "final_layer_norm"), (r"^blocks", "layers"), (r"^(?!lm_head)", "model.decoder."),
              (r"\.attn\.o\.", ".self_attn.out_proj."), (r"\.attn\.(\w)\.", r".self_attn.\1_proj."), (r"\.mlp\.up", ".fc1"),
              (r"\.mlp\.down", ".fc2"), (r"\.norm1", ".self_attn_layer_norm"), (r"\.norm2", ".final_layer_norm")]}
META = [(r"^blocks", "layers"), (r"\.attn\.(\w)\.", r".attention.w\1."), (r"\.mlp\.gate", ".feed_forward.w1"),
        (r"\.mlp\.up", ".feed_forward.w3"), (r"\.mlp\.down", ".feed_forward.w2"), (r"\.norm1", ".attention_norm"),
        (r"\.norm2", ".ffn_norm"), (r"^lm_head", "output"), (r"^embed_tokens", "tok_embeddings")]
IGNORED = re.compile(r"rotary_emb\.inv_freq$|^rope\.freqs$|\.masked_bias$")       # tables and masks, not weights

def published_name(name: str, table) -> str:
    for pattern, theirs in table:
        name = re.sub(pattern, theirs, name)
    return name


def bare_name(name: str) -> str:
    """Some Hugging Face files leave these prefixes out."""
    return re.sub(r"^(model\.)?(decoder\.)?", "", name)


def half_split(w, heads: int):
    """Meta pairs rotary channels (0,1), (2,3), ...; we pair the first half with the second, as Hugging Face does."""
    return w.view(heads, -1, 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape)


def load_model(path: str | Path, dtype=torch.float32, device="cpu", packed: bool = True) -> Transformer:
    """A frozen Transformer from a folder or a name (see resolve). Files are mapped and read tensor by tensor.

    Linears that are stored packed become PackedLinear, or, with packed=False, ordinary ones with the same weights.
    Raises FileNotFoundError / ValueError with one line for missing, extra, mis-shaped or truncated weights."""
    folder = resolve(path)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"device {device} cannot be used here: {str(e).splitlines()[0]}") from None
    c = read_config(folder)
    meta = not (folder / "config.json").exists()
    files = read_meta(folder) if meta else read_folder(folder)
    table = META if meta else HF[c.family]
    bare = {n if meta else bare_name(n): n for n in files}
    if not c.tied and not meta and "lm_head.weight" not in bare and c.family == "opt":
        c.tied = True                                           # OPT always ties; some files say so only by leaving it out
    with torch.device("meta"):
        model = Transformer(c)
    state, missing, layers = {}, [], packed_layers(folder)
    for name, linear in model.linears():
        theirs = published_name(f"{name}.weight", table).removesuffix(".weight")
        if theirs not in layers:
            continue
        names = [n for n in bare if n.startswith(bare_name(theirs) + ".") and not n.endswith(".bias")]
        held = Packed({n.rpartition(".")[2]: files[bare.pop(n)] for n in names}, layers.pop(theirs))
        try:
            check_packed(held, (linear.out_features, linear.in_features))
        except ValueError as e:
            raise ValueError(f"{folder}: {theirs}: {e}") from None
        if packed:                                              # views of the file until they move to another device
            held = Packed({n: t.to(device) for n, t in held.tensors.items()}, held.meta)
            model.set_submodule(name, PackedLinear(held, linear.bias))
        else:
            state[f"{name}.weight"] = unpack(held, dtype).to(device)
    if layers:
        raise ValueError(f"{folder}/config.json packs {next(iter(layers))}, which is no Linear of this model")
    for name, p in model.named_parameters():
        if name in state:
            continue
        theirs = published_name(name, table)
        key = bare.pop(theirs if meta else bare_name(theirs), None)
        if key is None:
            missing.append(theirs)
            continue
        w = files[key]
        if w.shape != p.shape:
            raise ValueError(f"{folder}: {key} has shape {tuple(w.shape)}, but the configuration wants {tuple(p.shape)}")
        if meta and name.endswith(("attn.q.weight", "attn.k.weight")):
            w = half_split(w, w.shape[0] // c.head_dim)
        state[name] = w.to(device=device, dtype=dtype)
    if c.tied:
        bare.pop("lm_head.weight", None)                        # a stored copy of the tied head
    extra = [n for n in bare.values() if not IGNORED.search(n)]
    if missing or extra:
        raise ValueError(f"{folder} does not fit its configuration: " + "; ".join(
            f"{len(n)} {what}, such as {n[0]}" for what, n in (("missing", missing), ("unexpected", extra)) if n))
    model.load_state_dict(state, assign=True, strict=False)     # strict above; packed tensors are in place already
    return model.eval().requires_grad_(False)


def save_model(model: Transformer, folder: str | Path, dtype=torch.float16, extra: dict | None = None) -> None:
    """Write config.json and model.safetensors in the Hugging Face layout; `extra` joins config.json.

    A PackedLinear is written as its packed tensors, `<name of the Linear>.codes` and so on, with what they mean under
    quantization_config. Other libraries cannot read these: for them, save what load_model(..., packed=False) gives."""
    folder, table = Path(folder), HF[model.config.family]
    folder.mkdir(parents=True, exist_ok=True)
    state = {published_name(n, table): p.detach().to(dtype) for n, p in model.named_parameters()}
    for name, w in state.items():
        if not torch.isfinite(w).all():
            raise ValueError(f"{name} does not fit {dtype}: save in bfloat16 or float32")
    layers = {}
    for name, m in model.linears():
        if isinstance(m, PackedLinear):
            theirs = published_name(f"{name}.weight", table).removesuffix(".weight")
            layers[theirs] = m.meta
            state.update({f"{theirs}.{n}": t for n, t in m.packed.tensors.items()})
    write_safetensors(folder / "model.safetensors", state)
    config = {**hf_config(model.config, layers), "torch_dtype": str(dtype).removeprefix("torch."), **(extra or {})}
    write_atomic(folder / "config.json", lambda f: f.write(json.dumps(config, indent=1).encode()))


def storage(model: Transformer, stored: int | None = None) -> dict:
    """What half-precision files of the model take: megabytes, real bits per weight of everything and of the blocks'
    Linears (masks, starts and grids counted), and `nominal`, the literature's 16 / (bits x share of weights kept).

    stored: a file's real size in bytes, headers and all, if there is one."""
    weights = used = needed = dense = 0
    for _, m in model.linears():
        n = m.in_features * m.out_features
        weights += n
        if isinstance(m, PackedLinear):
            used, needed = used + nbytes(m.packed), needed + m.meta["bits"] * count_kept(m.packed)
        else:
            used, needed, dense = used + 2 * n, needed + 16 * int(m.weight.count_nonzero()), dense + n
    others = sum(p.numel() for p in model.parameters()) - dense
    stored = used + 2 * others if stored is None else stored
    return {"megabytes": stored / 1e6, "bits_per_weight": 8 * stored / (weights + others),
            "linear_bits_per_weight": 8 * used / weights, "nominal": 16 * weights / max(needed, 1)}
