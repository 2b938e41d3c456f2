"""Which model: its sizes, the names it is known by, and config.json / params.json read and written.

    folder = resolve("opt-125m")      # a path, a name in checkpoints/, tiny-llama or tiny-opt
    config = read_config(folder)      # a Config, from config.json or from Meta's params.json

Left out: other families, and rotary scalings other than linear and llama3.
"""
from dataclasses import dataclass
from pathlib import Path

from data.checkpoint import header_sum, is_inside, read_json, read_meta, read_metadata

# What a configuration may say: {field: (type, least, most)}. Numbers outside are no model's, and
# some would not end.
RANGES = {
    "vocab_size": (int, 1, 1 << 24),
    "d_model": (int, 1, 1 << 20),
    "n_layer": (int, 1, 128),
    "n_head": (int, 1, 1 << 14),
    "d_ff": (int, 1, 1 << 22),
    "n_kv_head": (int, 1, 1 << 14),
    "head_dim": (int, 1, 1 << 14),
    "max_positions": (int, 1, 1 << 28),
    "d_embed": (int, 1, 1 << 20),
    "norm_eps": (float, 1e-12, 0.1),
    "rope_theta": (float, 1.0, 1e15),
    "tied": (bool, False, True),
    "attention_bias": (bool, False, True),
    "mlp_bias": (bool, False, True),
    "pre_norm": (bool, False, True),
    "final_norm": (bool, False, True),
    "factor": (float, 1e-3, 1e6),                            # these four of a rotary scaling
    "low_freq_factor": (float, 1e-3, 1e6),
    "high_freq_factor": (float, 1e-3, 1e6),
    "original_max_position_embeddings": (int, 1, 1 << 28),
}
# Rotary scalings and what they need.
ROPE = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def in_range(field: str, value, name: str = ""):
    """The value, if RANGES allows it for this field; else a ValueError that calls it by its name in
    the file."""
    kind, least, most = RANGES[field]
    fits = type(value) is kind or kind is float and type(value) is int
    if not fits or not least <= value <= most:                  # NaN is in no range
        number = "whole number" if kind is int else "number"
        wanted = "true or false" if kind is bool else f"a {number} from {least} to {most}"
        raise ValueError(f"{name or field} {short(value)} is not {wanted}")
    return value


def short(value) -> str:
    """A value from a file as an error message shows it."""
    return str(repr(value))[:60]


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
        in_range("n_head", self.n_head)
        if not self.head_dim and isinstance(self.d_model, int) and self.d_model % self.n_head:
            raise ValueError(f"a width of {self.d_model} cannot be shared by {self.n_head} heads: "
                             f"not a multiple")
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.d_model // self.n_head
        self.d_embed = self.d_embed or self.d_model
        for field in RANGES:
            if hasattr(self, field):
                in_range(field, getattr(self, field))
        if self.n_head % self.n_kv_head:
            raise ValueError(f"{self.n_head} heads cannot share {self.n_kv_head} key-value heads: "
                             f"not a multiple")
        if self.family == "llama" and self.head_dim % 2:
            raise ValueError(f"heads of {self.head_dim} channels cannot be rotated in pairs: an "
                             f"odd number")


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
# What the programs' flags of these names default to, by the model's size.
DEFAULTS = {
    "large": dict(calib="c4", data="wikitext2", train_data=None, nsamples=128, seqlen=None,
                  max_tokens=None, batch_size=4, heal=64, prompt_tokens=100, steps=200,
                  control=False),
    "tiny": dict(calib="docs", data="headers", train_data="headers", nsamples=128, seqlen=256,
                 max_tokens=32768, batch_size=8, heal=0, prompt_tokens=50, steps=200,
                 control=True),
}
SHIPPED = {"tiny-llama": HERE / "data/tiny/llama", "tiny-opt": HERE / "data/tiny/opt"}


def resolve(name: str | Path) -> Path:
    """A checkpoint folder from a path, a published name (checkpoints/NAME) or tiny-llama /
    tiny-opt."""
    path = SHIPPED.get(str(name), Path(name))
    if not path.is_dir() and str(name) in PUBLISHED:
        places = (Path("checkpoints") / name, HERE / "checkpoints" / name)
        path = next((place for place in places if place.is_dir()), None)
        if path is None:
            repository = PUBLISHED[str(name)][-1]
            raise FileNotFoundError(f"checkpoints/{name} is missing: fetch it with `pip install "
                                    f"huggingface_hub && hf download {repository} --local-dir "
                                    f"checkpoints/{name}`")
    if not path.is_dir():
        raise FileNotFoundError(f"no checkpoint folder {path}; give a path or one of: "
                                f"{', '.join([*SHIPPED, *PUBLISHED])}")
    return path


# What the files call the fields of a Config.
COMMON = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "max_positions",
    "tie_word_embeddings": "tied",
}
LLAMA = {
    **COMMON,
    "intermediate_size": "d_ff",
    "num_key_value_heads": "n_kv_head",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "rope_theta": "rope_theta",
}
OPT = {
    **COMMON,
    "ffn_dim": "d_ff",
    "word_embed_proj_dim": "d_embed",
    "do_layer_norm_before": "pre_norm",
}
META = {
    "dim": "d_model",
    "n_layers": "n_layer",
    "n_heads": "n_head",
    "n_kv_heads": "n_kv_head",
    "norm_eps": "norm_eps",
    "max_seq_len": "max_positions",
    "rope_theta": "rope_theta",
}
SIZES = ("vocab_size", "d_model", "n_layer", "n_head", "d_ff")      # what every config.json has


def read_config(folder: Path) -> Config:
    """Config of a Hugging Face folder (config.json, older and newer spelling) or a Meta one
    (params.json).

    ValueError, which names the file, for a field that is missing, of another type or out of range.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.exists():
        path = folder / "params.json"
        if not path.exists():
            raise FileNotFoundError(f"{folder} holds neither config.json (Hugging Face) nor "
                                    f"params.json (Meta)")
    said = read_json(path)
    try:
        if path.name == "params.json":
            return meta_config(said, read_meta(folder))
        kind = family_of(said)
        if kind == "llama":
            return llama_config(said)
        if kind == "opt":
            return opt_config(said)
        raise ValueError(f"model_type {str(said.get('model_type'))[:60]!r} is not supported: only "
                         f"llama and opt")
    except ValueError as e:
        raise ValueError(str(e) if str(folder) in str(e) else f"{path}: {e}") from None


def family_of(said: dict) -> str:
    """The model_type of a config.json, that of the dense model where it is packed."""
    return str(said.get("model_type")).removeprefix(f"{QUANT_METHOD}-")


def fields(said: dict, names: dict[str, str], need: tuple[str, ...]) -> dict:
    """{field of a Config: value} of what a file says under its own names; null is as good as
    nothing. ValueError where a field of `need` is missing."""
    given = {key: value for key, value in said.items() if key in names and value is not None}
    lacks = [key for key, field in names.items() if field in need and key not in given]
    if lacks:
        raise ValueError(f"it lacks {', '.join(map(repr, lacks))}")
    return {field: in_range(field, given[key], key) for key, field in names.items() if key in given}


def is_switch(said: dict, key: str, default: bool) -> bool:
    """A field that is true or false, or missing."""
    value = said.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"{key} {short(value)} is not true or false")
    return value


def llama_config(said: dict) -> Config:
    """From the config.json of a LLaMA."""
    if said.get("hidden_act") not in (None, "silu"):
        raise ValueError(f"hidden_act {str(said['hidden_act'])[:60]!r} is not supported for LLaMA: "
                         f"only silu")
    rope = {}
    for key in ("rope_scaling", "rope_parameters"):             # older and newer spelling
        part = said.get(key) or {}
        if not isinstance(part, dict):
            raise ValueError(f"{key} {short(part)} is no object")
        rope.update(part)
    scaling = rope_scaling(rope)
    if any(held.get("partial_rotary_factor") not in (None, 1) for held in (rope, said)):
        raise ValueError("partial_rotary_factor is not supported: only 1")
    known = {"norm_eps": 1e-6, "tied": False}
    known.update(fields(said, LLAMA, SIZES))
    known.update(fields(rope, {"rope_theta": "rope_theta"}, ()))
    return Config("llama", **known, rope_scaling=scaling)


def rope_scaling(rope: dict) -> dict | None:
    """Config.rope_scaling from what a config.json says about rotary positions; None for none."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE:
        raise ValueError(f"rope type {str(kind)[:60]!r} is not supported: only {', '.join(ROPE)}")
    if kind == "default":
        return None
    scaling = {"rope_type": kind, **fields(rope, {key: key for key in ROPE[kind]}, ROPE[kind])}
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ValueError("low_freq_factor must be below high_freq_factor")
    return scaling


def opt_config(said: dict) -> Config:
    """From the config.json of an OPT."""
    only = {"activation_function": "relu", "enable_bias": True,
            "layer_norm_elementwise_affine": True}
    for key, want in only.items():
        if said.get(key, want) != want:
            raise ValueError(f"OPT with {key}={str(said[key])[:60]!r} is not supported: only "
                             f"{want!r}")
    known = {"tied": True, "pre_norm": True, **fields(said, OPT, SIZES)}
    removed = is_switch(said, "_remove_final_layer_norm", False)
    return Config("opt", **known, attention_bias=True, mlp_bias=True,
                  final_norm=known["pre_norm"] and not removed)


def meta_config(said: dict, weights) -> Config:
    """From params.json and the weights: it leaves out the vocabulary (-1), the MLP's width and the
    context."""
    known = fields(said, META, ("d_model", "n_layer", "n_head", "norm_eps"))
    sizes = []
    for name in ("layers.0.feed_forward.w1.weight", "tok_embeddings.weight"):
        if name not in weights:
            raise ValueError(f"consolidated.*.pth beside it do not hold LLaMA's {name}")
        sizes.append(weights.shape(name)[0])
    d_ff, vocab_size = sizes
    if said.get("vocab_size", -1) not in (-1, vocab_size):
        raise ValueError(f"vocab_size {str(said['vocab_size'])[:60]} is not the embedding's "
                         f"{vocab_size}: another model's params.json?")
    scaling = None
    if is_switch(said, "use_scaled_rope", False):
        factor = said.get("rope_scaling_factor", meta_factor(known["d_model"]))
        factor = in_range("factor", factor, "rope_scaling_factor")
        scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
                   "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    known = {"max_positions": meta_context(known, scaling is not None), **known}
    return Config("llama", vocab_size=vocab_size, d_ff=d_ff, tied="output.weight" not in weights,
                  rope_scaling=scaling, **known)


def meta_factor(d_model: int) -> float:
    """By what LLaMA 3.1 and 3.2 scale rotary positions, which their params.json do not say."""
    return 32.0 if d_model in (2048, 3072) else 8.0             # 3.2's 1B and 3B


def meta_context(known: dict, is_scaled: bool) -> int:
    """How many tokens a LLaMA reads, told from the fields that its params.json has."""
    if is_scaled:                                               # LLaMA 3.1
        return 131072
    if known.get("rope_theta", 10000.0) >= 500000.0:            # LLaMA 3
        return 8192
    if known["norm_eps"] < 5e-6:                                # LLaMA 1, 1e-6
        return 2048
    if known["d_model"] == 8192 and "n_kv_head" not in known:   # its 65b has LLaMA 2's 1e-5
        return 2048
    return 4096


# --------------------------------------------------------------------------------------------------
# Packed folders. Their config.json names a model_type that other libraries refuse, and its
# quantization_config has no quant_method, which transformers refuses too where it is told the
# class: else it would load random Linears.

VERSION = 2      # 1 (no version): without checksums, under the dense model's own model_type
PACKING = {"shape": list, "bits": int, "grid": str, "groupsize": int, "format": str}


def packed_layers(folder: Path) -> dict[str, dict]:
    """{published name of a Linear: meta of its packed tensors, see kernels/packing.py}; empty for
    an ordinary checkpoint.

    ValueError for another library's quantization, a newer version, and files that are not those
    that were written."""
    path = Path(folder) / "config.json"
    quantized = read_json(path).get("quantization_config") if path.exists() else None
    if quantized is None:
        return {}
    check_ours(path, quantized)
    version = quantized.get("version", 1)
    layers = quantized.get("layers")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ValueError(f"{path} is of packed format {str(version)[:60]}, and this code reads 1 "
                         f"to {VERSION}: update it")
    if not layers:
        raise ValueError(f"{path} says of no Linear how it is packed: it is damaged, compress "
                         f"again")
    check_layers(path, layers)
    if version > 1:
        check_files(path, quantized.get("files"))
    return dict(layers)


def check_ours(path: Path, quantized) -> None:
    """ValueError for the quantization_config of another library."""
    if is_ours(quantized):
        return
    other = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
    raise ValueError(f"{path} has a quantization_config of {str(other)[:60]!r}; of quantized "
                     f"checkpoints only those that save_model wrote ({QUANT_METHOD!r}) can be read")


def is_ours(quantized) -> bool:
    """Did save_model write this quantization_config?"""
    return isinstance(quantized, dict) and QUANT_METHOD in (quantized.get("method"),
                                                            quantized.get("quant_method"))


def check_layers(path: Path, layers) -> None:
    """ValueError unless layers is {name of a Linear: how it is packed}."""
    if not isinstance(layers, dict):
        raise ValueError(f"{path} says as {str(layers)[:60]!r} how its Linears are packed: it is "
                         f"damaged, compress again")
    for name, meta in layers.items():
        if not is_packing(meta):
            raise ValueError(f"{path}: {name[:200]} is packed as {str(meta)[:200]}, which is "
                             f"damaged: compress again")


def is_packing(meta) -> bool:
    """Has it every field of PACKING, of the right type?"""
    return (isinstance(meta, dict)
            and all(type(meta.get(key)) is kind for key, kind in PACKING.items())
            and all(type(size) is int for size in meta["shape"]))


def check_files(path: Path, files: dict[str, str] | None) -> None:
    """Are the shards beside a config.json those that it was written for? files: what file_sums
    gave, None where it does not say. Headers only; verify compares the tensors."""
    if files is None:
        files = {file.name: None for file in path.parent.glob("model*.safetensors")}
    if not isinstance(files, dict) or not all(is_inside(name) for name in files):
        raise ValueError(f"{path}: the list of files is damaged, compress again")
    for name, digest in files.items():
        file = path.parent / name
        if not file.is_file():
            raise FileNotFoundError(f"{path} was written for {name}, which is not beside it: copy "
                                    f"or make the folder again")
        if digest is not None and header_sum(file) != digest:
            raise ValueError(f"{file} is not the file that {path.name} was written for: copy or "
                             f"make the folder again")
        if "crc32" not in read_metadata(file):
            raise ValueError(f"{file} has lost its checksums: it is not the file that was written; "
                             f"copy or make it again")


def file_sums(folder: Path) -> dict[str, str]:
    """{name: header_sum} of the files that read_folder takes a packed folder's weights from, for
    hf_config."""
    single = Path(folder) / "model.safetensors"
    files = [single] if single.exists() else sorted(Path(folder).glob("model*.safetensors"))
    return {file.name: header_sum(file) for file in files}


def hf_config(c: Config, packed: dict[str, dict] | None = None,
              files: dict[str, str] | None = None) -> dict:
    """config.json of a model, in the spelling that transformers 4 and 5 both read. `packed` is what
    packed_layers reads, `files` what file_sums gives: with it nobody can put a packed folder
    together from two."""
    said = {key: getattr(c, field) for key, field in COMMON.items()}
    kind = c.family
    if packed:
        kind = f"{QUANT_METHOD}-{c.family}"
        said["quantization_config"] = {"method": QUANT_METHOD, "version": VERSION, "files": files,
                                       "layers": packed}
    said["model_type"] = kind
    if c.family == "opt":
        return {
            **said,
            "architectures": ["OPTForCausalLM"],
            "ffn_dim": c.d_ff,
            "word_embed_proj_dim": c.d_embed,
            "do_layer_norm_before": c.pre_norm,
            "_remove_final_layer_norm": c.pre_norm and not c.final_norm,
        }
    return {
        **said,
        "architectures": ["LlamaForCausalLM"],
        "intermediate_size": c.d_ff,
        "hidden_act": "silu",
        "num_key_value_heads": c.n_kv_head,
        "head_dim": c.head_dim,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": c.rope_scaling,
        "attention_bias": c.attention_bias,
        "mlp_bias": c.mlp_bias,
    }
