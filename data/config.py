"""Which model: its sizes, the names it is known by, and config.json / params.json read and written.

    folder = resolve("opt-125m")                        # a path, a published name in checkpoints/, tiny-llama or tiny-opt
    config = read_config(folder)                        # a Config, from Hugging Face's config.json or Meta's params.json

Left out: other families, and rotary scalings other than linear and llama3.
"""
from dataclasses import dataclass
from pathlib import Path

from data.checkpoint import read_json, read_meta


@dataclass
class Config:
    family: str                       # "llama" or "opt"
    vocab_size: int
    d_model: int
    n_layer: int
    n_head: int
    d_ff: int
    n_kv_head: int = 0                # 0: as many as n_head; fewer is grouped-query attention
    head_dim: int = 0                 # 0: d_model / n_head
    max_positions: int = 2048
    norm_eps: float = 1e-5
    tied: bool = True                 # the head is the embedding matrix
    attention_bias: bool = False      # on q, k, v and o
    mlp_bias: bool = False
    rope_theta: float = 10000.0       # llama only
    rope_scaling: dict | None = None  # {"rope_type": "linear" | "llama3", "factor": ..., ...}
    pre_norm: bool = True             # OPT-350m norms after the residual instead
    final_norm: bool = True           # ... and has no norm before the head
    d_embed: int = 0                  # width of the embedding; 0: d_model (OPT-350m: 512 of 1024)

    def __post_init__(self):
        for name in ("vocab_size", "d_model", "n_layer", "n_head", "d_ff", "max_positions"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"a model's configuration has {name} {getattr(self, name)!r}, which is no number above 0")
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.d_model // self.n_head
        self.d_embed = self.d_embed or self.d_model
        if self.n_head % self.n_kv_head:
            raise ValueError(f"{self.n_head} heads cannot share {self.n_kv_head} key-value heads: not a multiple")


# name: (d_model, layers, heads, key-value heads, d_ff, vocabulary, Hugging Face repository)
PUBLISHED = {
    "llama-7b": (4096, 32, 32, 32, 11008, 32000, "huggyllama/llama-7b"),
    "llama-13b": (5120, 40, 40, 40, 13824, 32000, "huggyllama/llama-13b"),
    "llama-30b": (6656, 60, 52, 52, 17920, 32000, "huggyllama/llama-30b"),
    "llama-65b": (8192, 80, 64, 64, 22016, 32000, "huggyllama/llama-65b"),
    "llama-2-7b": (4096, 32, 32, 32, 11008, 32000, "meta-llama/Llama-2-7b-hf"),
    "llama-2-13b": (5120, 40, 40, 40, 13824, 32000, "meta-llama/Llama-2-13b-hf"),
    "llama-2-70b": (8192, 80, 64, 8, 28672, 32000, "meta-llama/Llama-2-70b-hf"),
    "llama-3-8b": (4096, 32, 32, 8, 14336, 128256, "meta-llama/Meta-Llama-3-8B"),
    "llama-3-70b": (8192, 80, 64, 8, 28672, 128256, "meta-llama/Meta-Llama-3-70B"),
    "opt-125m": (768, 12, 12, 12, 3072, 50272, "facebook/opt-125m"),
    "opt-350m": (1024, 24, 16, 16, 4096, 50272, "facebook/opt-350m"),
    "opt-1.3b": (2048, 24, 32, 32, 8192, 50272, "facebook/opt-1.3b"),
    "opt-2.7b": (2560, 32, 32, 32, 10240, 50272, "facebook/opt-2.7b"),
    "opt-6.7b": (4096, 32, 32, 32, 16384, 50272, "facebook/opt-6.7b"),
    "opt-13b": (5120, 40, 40, 40, 20480, 50272, "facebook/opt-13b"),
    "opt-30b": (7168, 48, 56, 56, 28672, 50272, "facebook/opt-30b"),
    "opt-66b": (9216, 64, 72, 72, 36864, 50272, "facebook/opt-66b"),
}
HERE = Path(__file__).resolve().parents[1]
QUANT_METHOD = "compress-then-prompt"
SHIPPED = {"tiny-llama": HERE / "data/tiny/llama", "tiny-opt": HERE / "data/tiny/opt"}


def resolve(name: str | Path) -> Path:
    """A checkpoint folder from a path, a published name (checkpoints/NAME) or tiny-llama / tiny-opt."""
    path = SHIPPED.get(str(name), Path(name))
    if not path.is_dir() and str(name) in PUBLISHED:
        path = next((p for p in (Path("checkpoints") / name, HERE / "checkpoints" / name) if p.is_dir()), None)
        if path is None:
            raise FileNotFoundError(f"checkpoints/{name} is missing: fetch it with `pip install huggingface_hub && "
                                    f"hf download {PUBLISHED[str(name)][-1]} --local-dir checkpoints/{name}`")
    if not path.is_dir():
        raise FileNotFoundError(f"no checkpoint folder {path}; give a path or one of: {', '.join([*SHIPPED, *PUBLISHED])}")
    return path


def read_config(folder: Path) -> Config:
    """Config of a Hugging Face folder (config.json, older and newer spelling) or a Meta one (params.json)."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        if not (folder / "params.json").exists():
            raise FileNotFoundError(f"{folder} holds neither config.json (Hugging Face) nor params.json (Meta)")
        return meta_config(folder)
    j = read_json(folder / "config.json")
    try:
        if j.get("model_type") == "llama":
            return llama_config(j)
        if j.get("model_type") == "opt":
            return opt_config(j)
    except KeyError as e:
        raise ValueError(f"{folder}/config.json lacks {e}") from None
    except TypeError as e:
        raise ValueError(f"{folder}/config.json holds a value of the wrong kind: {e}") from None
    raise ValueError(f"{folder}/config.json has model_type {j.get('model_type')!r}; supported are llama and opt")


def llama_config(j: dict) -> Config:
    act = j.get("hidden_act", "silu")
    if act != "silu":
        raise ValueError(f"hidden_act {act!r} is not supported for LLaMA: only silu")
    rope = {**(j.get("rope_scaling") or {}), **(j.get("rope_parameters") or {})}
    kind = rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(f"rope type {kind!r} is not supported: only default, linear and llama3")
    need = {"linear": ["factor"],
            "llama3": ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]}
    return Config(
        "llama", j["vocab_size"], j["hidden_size"], j["num_hidden_layers"], j["num_attention_heads"], j["intermediate_size"],
        j.get("num_key_value_heads") or 0, j.get("head_dim") or 0, j.get("max_position_embeddings", 2048),
        j.get("rms_norm_eps", 1e-6), j.get("tie_word_embeddings", False), j.get("attention_bias", False),
        j.get("mlp_bias", False), rope.get("rope_theta", j.get("rope_theta", 10000.0)),
        None if kind == "default" else {"rope_type": kind, **{k: rope[k] for k in need[kind]}})


def opt_config(j: dict) -> Config:
    for key, want in (("activation_function", "relu"), ("enable_bias", True), ("layer_norm_elementwise_affine", True)):
        if j.get(key, want) != want:
            raise ValueError(f"OPT with {key}={j[key]!r} is not supported: only {want!r}")
    pre = j.get("do_layer_norm_before", True)
    return Config(
        "opt", j["vocab_size"], j["hidden_size"], j["num_hidden_layers"], j["num_attention_heads"], j["ffn_dim"],
        max_positions=j.get("max_position_embeddings", 2048), tied=j.get("tie_word_embeddings", True), attention_bias=True,
        mlp_bias=True, pre_norm=pre, final_norm=pre and not j.get("_remove_final_layer_norm", False),
        d_embed=j.get("word_embed_proj_dim") or 0)


def meta_config(folder: Path) -> Config:
    """params.json leaves out the vocabulary (-1), the MLP's width and the context; the weights tell the first two."""
    p, weights = read_json(folder / "params.json"), read_meta(folder)
    if "layers.0.feed_forward.w1.weight" not in weights:
        raise ValueError(f"{folder}: consolidated.*.pth do not hold LLaMA's layers.0.feed_forward.w1.weight")
    try:
        new = p.get("rope_theta", 10000.0) >= 500000.0          # LLaMA 3
        first = p["norm_eps"] < 5e-6 or p["dim"] == 8192 and not p.get("n_kv_heads")     # LLaMA 1; its 65b has LLaMA 2's eps
        context = 131072 if p.get("use_scaled_rope") else 8192 if new else 2048 if first else 4096
        scaling = {"rope_type": "llama3", "factor": p.get("rope_scaling_factor", 8.0), "low_freq_factor": 1.0,
                   "high_freq_factor": 4.0, "original_max_position_embeddings": 8192} if p.get("use_scaled_rope") else None
        return Config("llama", weights["tok_embeddings.weight"].shape[0], p["dim"], p["n_layers"], p["n_heads"],
                      weights["layers.0.feed_forward.w1.weight"].shape[0], p.get("n_kv_heads") or 0,
                      max_positions=p.get("max_seq_len", context), norm_eps=p["norm_eps"],
                      tied="output.weight" not in weights, rope_theta=p.get("rope_theta", 10000.0), rope_scaling=scaling)
    except KeyError as e:
        raise ValueError(f"{folder}/params.json or its weights lack {e}") from None


def packed_layers(folder: Path) -> dict[str, dict]:
    """{published name of a Linear: meta of its packed tensors, see kernels/packing.py}; empty for an ordinary checkpoint."""
    path = Path(folder) / "config.json"
    q = read_json(path).get("quantization_config") if path.exists() else None
    if q is None:
        return {}
    if q.get("quant_method") != QUANT_METHOD or not isinstance(q.get("layers"), dict):
        raise ValueError(f"{path} has a quantization_config of {q.get('quant_method')!r}; of quantized checkpoints only those "
                         f"that save_model wrote ({QUANT_METHOD!r}) can be read")
    return dict(q["layers"])


def hf_config(c: Config, packed: dict[str, dict] | None = None) -> dict:
    """config.json of a model, in the spelling that transformers 4 and 5 both read; `packed` is what packed_layers reads."""
    j = {"vocab_size": c.vocab_size, "hidden_size": c.d_model, "num_hidden_layers": c.n_layer, "num_attention_heads": c.n_head,
         "max_position_embeddings": c.max_positions, "tie_word_embeddings": c.tied}
    if packed:
        j["quantization_config"] = {"quant_method": QUANT_METHOD, "layers": packed}
    if c.family == "opt":
        return {**j, "model_type": "opt", "architectures": ["OPTForCausalLM"], "ffn_dim": c.d_ff,
                "word_embed_proj_dim": c.d_embed, "do_layer_norm_before": c.pre_norm,
                "_remove_final_layer_norm": c.pre_norm and not c.final_norm}
    return {**j, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "intermediate_size": c.d_ff,
            "hidden_act": "silu", "num_key_value_heads": c.n_kv_head, "head_dim": c.head_dim, "rms_norm_eps": c.norm_eps,
            "rope_theta": c.rope_theta,
            "rope_scaling": c.rope_scaling, "attention_bias": c.attention_bias, "mlp_bias": c.mlp_bias}
