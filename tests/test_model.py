"""model.py and data/checkpoint.py: logits against transformers for every variant, every file
layout, every error.

    python -m pytest -q tests/test_model.py
"""
import json
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from data.checkpoint import Tensors, read_folder, read_safetensors, write_atomic, write_safetensors
from data.config import PUBLISHED, Config, read_config, resolve
from kernels.cpu_attention import AttentionByParts, parts_of_attention
from model import Transformer, load_model, open_checkpoint, save_model

LLAMA = dict(vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
             num_attention_heads=4,
             max_position_embeddings=64, rms_norm_eps=1e-6)
OPT = dict(vocab_size=99, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
           max_position_embeddings=64,
           word_embed_proj_dim=64)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16, "rope_theta": 5e5}
VARIANTS = {
    "llama": dict(),
    "llama-tied": dict(tie_word_embeddings=True),
    "llama-gqa": dict(num_key_value_heads=2),
    "llama-mqa-tied": dict(num_key_value_heads=1, tie_word_embeddings=True),
    "llama-biases": dict(attention_bias=True, mlp_bias=True),
    "llama-head-dim": dict(head_dim=24, num_key_value_heads=2),
    "llama-theta": dict(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "llama-linear": dict(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
    "llama-llama3": dict(rope_parameters=LLAMA3, num_key_value_heads=2),
    "opt": dict(),
    "opt-350m": dict(do_layer_norm_before=False, word_embed_proj_dim=32),
    "opt-no-final-norm": dict(_remove_final_layer_norm=True),
}


def peer(name, folder, **save):
    """A transformers model with every parameter random, saved into folder."""
    torch.manual_seed(0)
    cls, cfg, base = ((LlamaForCausalLM, LlamaConfig, LLAMA) if name.startswith("llama")
                      else (OPTForCausalLM, OPTConfig, OPT))
    model = cls(cfg(**{**base, **VARIANTS[name]})).eval()
    for n, p in model.named_parameters():
        p.data = torch.randn_like(p) * 0.15 + (1.0 if "norm" in n and n.endswith("weight") else 0.0)
    model.save_pretrained(folder, **save)
    return model


@torch.no_grad()
def logits_of(model, x):
    out = model(x)
    return out if torch.is_tensor(out) else out.logits


X = torch.randint(0, 99, (2, 33), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_cache_against_transformers(name, tmp_path):
    want = logits_of(peer(name, tmp_path), X)
    model = load_model(tmp_path)
    assert want.std() > 0.1
    assert (logits_of(model, X) - want).abs().max() < 1e-4
    # embeddings instead of tokens
    assert (logits_of(model, model.embed(X)) - want).abs().max() < 1e-4
    with torch.no_grad():
        cache = model.new_cache(2, 33)
        steps = [model(X[:, :10], cache), model(X[:, 10:17], cache)]
        steps += [model(X[:, i:i + 1], cache) for i in range(17, 25)]
        cache.start = torch.tensor([cache.start])           # the same, as a CUDA graph has it
        steps += [model(X[:, i:i + 1], cache) for i in range(25, 33)]
    assert (torch.cat(steps, 1) - want).abs().max() < 1e-4


def test_a_full_cache_is_not_overrun_in_silence(tmp_path):
    """A filled cache of generation is no prefix: one more token would not be written."""
    peer("llama", tmp_path)
    model = load_model(tmp_path)
    with torch.no_grad():
        cache = model.new_cache(2, 10)
        model(X[:, :10], cache)
        for more in (1, 3):
            with pytest.raises(ValueError, match=f"a cache of 10 positions, 10 .* for {more} more"):
                model(X[:, :more], cache)


@pytest.mark.parametrize("name",
                         ["llama-llama3", "llama-linear", "llama-biases", "opt-350m", "opt"])
def test_older_config_spelling_and_our_own_folder(name, tmp_path):
    """save_model writes rope_theta / rope_scaling; both we and transformers read it back."""
    want = logits_of(peer(name, tmp_path / "a"), X)
    save_model(load_model(tmp_path / "a"), tmp_path / "b", torch.float32)
    config = json.loads((tmp_path / "b/config.json").read_text())
    assert "rope_parameters" not in config
    assert (logits_of(load_model(tmp_path / "b"), X) - want).abs().max() < 1e-4
    cls = LlamaForCausalLM if name.startswith("llama") else OPTForCausalLM
    back = cls.from_pretrained(tmp_path / "b", dtype=torch.float32)
    assert (logits_of(back, X) - want).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_single_file_goes_before_an_older_saves_index(name, tmp_path):
    """transformers leaves the index, with or without its shards, where it saves a second time."""
    peer(name, tmp_path, max_shard_size="60KB")
    old = list(tmp_path.glob("model-*.safetensors"))
    model = peer(name, tmp_path)                            # its own save removes the shards
    for p in model.parameters():
        p.data.mul_(1.1)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists() and old
    assert (logits_of(load_model(tmp_path), X) - logits_of(model, X)).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["llama-tied", "opt"])
def test_heads_that_are_tied_and_heads_that_are_not(name, tmp_path):
    """A file may keep the head's name alone (safetensors drops one of two); it may not hold another
    head than the embedding."""
    want = logits_of(peer(name, tmp_path), X)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    embedding = next(n for n in state if "embed_tokens" in n)
    save_file({**state, "lm_head.weight": state[embedding] + 1}, path)
    with pytest.raises(ValueError, match="its lm_head.weight is not the embedding: set tie_word"):
        load_model(tmp_path)
    save_file({n: t for n, t in state.items() if n != embedding}
              | {"lm_head.weight": state[embedding]}, path)
    assert (logits_of(load_model(tmp_path), X) - want).abs().max() < 1e-4


def test_tensors_at_odd_places_are_copied_when_they_are_asked_for(tmp_path):
    """As files of early writers, which did not pad their headers, have them."""
    want = {"a": torch.randn(3, 5), "b": torch.randn(7).half()}
    save_file(want, tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8:8 + length].rstrip() + b" "
    header += b" " * (1 - len(header) % 2)                  # of odd length
    write_raw(tmp_path / "y.safetensors", header, data[8 + length:])
    got = read_safetensors(tmp_path / "y.safetensors")
    assert got.shape("a") == (3, 5) and got.dtype("b") == torch.float16
    assert all(torch.equal(got[n], t) for n, t in want.items())
    assert got["a"] is not got["a"]                         # none is held


@pytest.mark.parametrize("name", ["llama-gqa", "llama-tied", "opt", "opt-350m"])
def test_file_layouts(name, tmp_path):
    want = logits_of(peer(name, tmp_path / "one"), X)
    peer(name, tmp_path / "many", max_shard_size="60KB")
    assert (tmp_path / "many/model.safetensors.index.json").exists()
    assert torch.equal(logits_of(load_model(tmp_path / "many"), X),
                       logits_of(load_model(tmp_path / "one"), X))
    state = load_file(tmp_path / "one/model.safetensors")
    embedding = next(t for name, t in state.items() if "embed_tokens" in name)
    head = state.get("lm_head.weight", embedding).clone()
    variants = {"bin": state,
                "bare": {name.removeprefix("model."): t for name, t in state.items()},
                "head": {**state, "lm_head.weight": head}}
    for kind, tensors in variants.items():
        (tmp_path / kind).mkdir()
        shutil.copy(tmp_path / "one/config.json", tmp_path / kind)
        if kind == "head":
            save_file(tensors, tmp_path / kind / "model.safetensors")
        else:
            torch.save(tensors, tmp_path / kind / "pytorch_model.bin",
                       _use_new_zipfile_serialization=kind == "bin")
        assert (logits_of(load_model(tmp_path / kind), X) - want).abs().max() < 1e-4, kind
    (tmp_path / "split").mkdir()
    shutil.copy(tmp_path / "one/config.json", tmp_path / "split")
    files = {k: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, k in enumerate(state)}
    for f in set(files.values()):
        torch.save({k: v for k, v in state.items() if files[k] == f}, tmp_path / "split" / f)
    (tmp_path / "split/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    assert (logits_of(load_model(tmp_path / "split"), X) - want).abs().max() < 1e-4


def to_meta(folder, out, shards, rows_embedding):
    """The published LLaMA layout from a Hugging Face folder: Meta's names, interleaved rotary
    pairs, model-parallel shards."""
    config = json.loads((folder / "config.json").read_text())
    state = load_file(folder / "model.safetensors")
    heads = {"wq": config["num_attention_heads"], "wk": config["num_key_value_heads"]}
    names = {"self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
             "self_attn.v_proj": "attention.wv",
             "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1",
             "mlp.down_proj": "feed_forward.w2",
             "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm",
             "post_attention_layernorm": "ffn_norm",
             "embed_tokens": "tok_embeddings", "lm_head": "output"}
    parts = [{"rope.freqs": torch.ones(4)} for _ in range(shards)]
    for name, w in state.items():
        name = name.removeprefix("model.")
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        kind = name.split(".")[-2]
        if kind in heads:                                         # half split -> interleaved
            w = w.view(heads[kind], 2, -1, w.shape[1]).transpose(1, 2).reshape(w.shape)
        dim = 1 if kind in ("wo", "w2") or (kind == "tok_embeddings" and not rows_embedding) else 0
        for part, piece in zip(parts, [w] * shards if w.dim() == 1 else w.chunk(shards, dim)):
            part[name] = piece.clone()
    out.mkdir()
    for i, part in enumerate(parts):
        torch.save(part, out / f"consolidated.{i:02d}.pth")
    rope = config.get("rope_parameters") or {}
    (out / "params.json").write_text(json.dumps({
        "dim": config["hidden_size"], "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"], "norm_eps": config["rms_norm_eps"],
        "vocab_size": -1, "multiple_of": 32,
        "rope_theta": rope.get("rope_theta", 10000.0)}))


@pytest.mark.parametrize("shards,rows", [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("name", ["llama", "llama-gqa", "llama-tied"])
def test_meta_shards(name, shards, rows, tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, **VARIANTS[name], "vocab_size": 100})).eval()
    for p in model.parameters():
        p.data = torch.randn_like(p) * 0.2
    model.save_pretrained(tmp_path / "hf")
    to_meta(tmp_path / "hf", tmp_path / "meta", shards, rows)
    got = load_model(tmp_path / "meta")
    assert got.config.tied == (name == "llama-tied")
    assert (logits_of(got, X) - logits_of(model, X)).abs().max() < 1e-4


def test_a_loss_trains_only_the_input_and_recomputing_changes_no_gradient(tmp_path):
    peer("llama-gqa", tmp_path)
    model = load_model(tmp_path)
    grads = []
    for checkpointing in (False, True):
        model.checkpointing = checkpointing
        e = model.embed(X).requires_grad_()
        model(e).logsumexp(-1).mean().backward()
        grads.append(e.grad)
    assert torch.allclose(*grads, atol=1e-7) and grads[0].abs().max() > 0
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("heads, kv_heads, T, past", [(9, 3, 300, 100), (4, 4, 128, 0),
                                                      (6, 2, 7, 50), (4, 1, 129, 1)])
def test_attention_by_parts_is_attention(heads, kv_heads, T, past):
    """Values and gradients, of queries that lie as a projection leaves them."""
    def random(length, n):
        return torch.randn(2, length, n, 16, dtype=torch.float64).transpose(1, 2).requires_grad_()
    q, k, v = random(T, heads), random(past + T, kv_heads), random(past + T, kv_heads)
    mask = torch.ones(T, past + T, dtype=torch.bool).tril(past)
    want = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    got = AttentionByParts.apply(q, k, v)
    assert torch.allclose(got, want, rtol=0, atol=1e-13)
    slope = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad(y, (q, k, v), slope) for y in (got, want))):
        assert torch.allclose(a, b, rtol=0, atol=1e-13)


def test_a_loss_in_bf16_takes_attention_by_parts(tmp_path, monkeypatch):
    """And comes as near to fp32 as without."""
    peer("llama-gqa", tmp_path)
    model, exact = load_model(tmp_path, torch.bfloat16), load_model(tmp_path)
    calls = []

    def parts(q, k):
        calls.append(q)
        return parts_of_attention(q, k)
    monkeypatch.setattr("kernels.cpu_attention.parts_of_attention", parts)
    monkeypatch.setattr("kernels.cpu_attention.cpu_has_bf16", lambda: True)
    with torch.no_grad():
        without, want = model(X).float(), exact(X)
    assert not calls
    got = model(model.embed(X).requires_grad_())
    assert len(calls) == 2                                      # blocks
    error = (got.float() - want).norm()
    assert error < 1.3 * (without - want).norm()


def test_safetensors_round_trip_with_the_package(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).half(),
               "c": torch.arange(9, dtype=torch.int32).view(3, 3),
               "d": torch.randn(2, 2).bfloat16(), "e": torch.tensor([True, False, True]),
               "empty": torch.zeros(0, 4), "s": torch.tensor(3.0)}
    write_safetensors(tmp_path / "x.safetensors", tensors, {"k": "v"})
    for got in (load_file(tmp_path / "x.safetensors"),
                read_safetensors(tmp_path / "x.safetensors")):
        assert set(got) == set(tensors)
        assert all(torch.equal(got[k], v) and got[k].dtype == v.dtype for k, v in tensors.items())
    save_file({"odd": torch.arange(3, dtype=torch.uint8), "x": torch.randn(5)},
              tmp_path / "y.safetensors")
    assert torch.equal(read_safetensors(tmp_path / "y.safetensors")["x"],
                       load_file(tmp_path / "y.safetensors")["x"])


def test_loading_maps_the_file(tmp_path, monkeypatch):
    peer("llama", tmp_path)
    files = read_folder(tmp_path)
    monkeypatch.setattr("model.read_folder", lambda folder: files)
    weights = load_model(tmp_path).state_dict()  # same dtype: the weights are views of the mapping
    assert {w.data_ptr() for w in weights.values()} == {w.data_ptr() for w in files.values()}
    before = (tmp_path / "model.safetensors").read_bytes()
    weights["norm.weight"].fill_(7)  # and what is written to them stays out of the file
    assert (tmp_path / "model.safetensors").read_bytes() == before


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def test_errors_name_the_trouble(tmp_path):
    good = tmp_path / "good"
    peer("llama", good)
    state = load_file(good / "model.safetensors")

    def broken(tensors=None, **config):
        folder = tmp_path / f"bad{len(list(tmp_path.iterdir()))}"
        shutil.copytree(good, folder)
        edit(folder, **config)
        if tensors is not None:
            save_file(tensors, folder / "model.safetensors")
        return folder

    some = "model.layers.1.mlp.up_proj.weight"
    cases = [
        (broken({k: v for k, v in state.items() if k != some}), f"1 missing, such as {some}"),
        (broken({**state, "model.layers.7.x.weight": torch.ones(2)}),
         "1 unexpected, such as model.layers.7.x.weight"),
        (broken({**state, some: torch.ones(3, 3)}), r"shape \(3, 3\)"),
        (broken(model_type="mistral"), "model_type 'mistral'"),
        (broken(rope_parameters={"rope_type": "yarn", "factor": 2.0}), "rope type 'yarn'"),
        (broken(rope_parameters=None, rope_scaling={"type": "dynamic", "factor": 2.0}),
         "rope type 'dynamic'"),
        (broken(hidden_act="gelu"), "hidden_act 'gelu'"),
        (broken(num_key_value_heads=3), "3 key-value heads"),
        (broken(vocab_size=None), "config.json: it lacks 'vocab_size'"),
        (broken(rope_parameters=None, rope_scaling="linear"), "rope_scaling 'linear' is no object"),
        (broken(rope_parameters=None, rope_scaling={"type": "linear"}), "it lacks 'factor'"),
    ]
    for folder, message in cases:
        with pytest.raises(ValueError, match=message):
            load_model(folder)
    cut = broken()
    data = (good / "model.safetensors").read_bytes()
    for size in (len(data) - 100, 20, 4, 0):
        (cut / "model.safetensors").write_bytes(data[:size])
        with pytest.raises(ValueError, match="truncated"):
            load_model(cut)
    for header in (b"[]", b'{"a": 3}', b'{"a": {"dtype": "F32", "shape": [1]}}', b"{"):
        (cut / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(ValueError, match="not a safetensors file"):
            load_model(cut)
    (cut / "model.safetensors").unlink()
    torch.save(state, cut / "pytorch_model.bin")
    for data in ((cut / "pytorch_model.bin").read_bytes()[:500], b"", b"version https://git-lfs"):
        (cut / "pytorch_model.bin").write_bytes(data)
        with pytest.raises(ValueError, match="cannot be read") as error:
            load_model(cut)
        assert "\n" not in str(error.value)
    for held in ([1], torch.ones(3), {**state, some: 3}):
        torch.save(held, cut / "pytorch_model.bin")
        with pytest.raises(ValueError, match="something else than a dictionary of tensors"):
            load_model(cut)
    (cut / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        load_model(cut)
    index = cut / "model.safetensors.index.json"
    for text, kind, message in (("{}", ValueError, "no weight_map"),
                                ("[]", ValueError, "a JSON list"),
                                ('{"weight_map": {"a": "b.safetensors"}}', FileNotFoundError,
                                 "lists b.safetensors")):
        index.write_text(text)
        with pytest.raises(kind, match=message):
            load_model(cut)
    for text, message in ((b"{", "not valid JSON"), (b"\xe9", "config.json is not valid JSON"),
                          (b"null", "a JSON NoneType")):
        (cut / "config.json").write_bytes(text)
        with pytest.raises(ValueError, match=message):
            load_model(cut)
    (cut / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="neither config.json"):
        load_model(cut)
    (cut / "params.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="consolidated.* are not"):
        load_model(cut)


# ---- files that lie

def write_raw(path, header: bytes, body: bytes = b""):
    path.write_bytes(len(header).to_bytes(8, "little") + header + body)


@pytest.mark.parametrize("header, message", [
    ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}',
     "no list of whole numbers from 0 on"),
    ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]}}',
     "no list of whole numbers from 0 on"),
    ('{"a": {"dtype": "F32", "shape": [true, 2], "data_offsets": [0, 8]}}',
     "no list of whole numbers from 0 on"),
    ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}', "a begins at byte 8"),
    ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
     "8 bytes follow the last tensor"),
    ('{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}, '
     '"b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}',
     "b begins at byte 8"),
    ('{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, '
     '"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',
     "'a' comes twice"),
    ('{"a": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 16]}}',
     "cannot fill"),
    ('{"a": {"dtype": "F32", "shape": [0, 4611686018427387904], "data_offsets": [0, 0]}}',
     "a shape that no model has"),
    ('{"a": {"dtype": "F8_E4M3", "shape": [16], "data_offsets": [0, 16]}}',
     "safetensors: a has type F8_E4M3; known are .*: convert it"),
    ('{"a": {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}}', "a has type"),
    ('{"__metadata__": {"a": 1}, "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',
     "__metadata__"),
    (' {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}', "does not begin with"),
    ('{"a": ' * 100_000, "nested too deeply")])
def test_headers_as_strict_as_the_package(header, message, tmp_path):
    path = tmp_path / "x.safetensors"
    write_raw(path, header.encode(), bytes(16))
    with pytest.raises(ValueError, match=message) as e:
        read_safetensors(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)
    path.write_bytes((1 << 62).to_bytes(8, "little") + bytes(100))
    with pytest.raises(ValueError, match="truncated"):
        read_safetensors(path)


@pytest.mark.parametrize("change, message", [
    (dict(rms_norm_eps=float("nan")), "NaN is no JSON number"),
    (dict(rms_norm_eps=0), "rms_norm_eps 0 is not a number"),
    (dict(rope_theta=0), "rope_theta 0"), (dict(rope_theta="1e4"), "rope_theta '1e4'"),
    (dict(tie_word_embeddings="false"), "tie_word_embeddings 'false'"),
    (dict(tie_word_embeddings=0), "tie_word_embeddings 0 is not true or false"),
    (dict(head_dim="16"), "head_dim '16'"),
    (dict(head_dim=16.0), "head_dim 16.0"), (dict(head_dim=True), "head_dim True"),
    (dict(num_hidden_layers=10 ** 6), "num_hidden_layers 1000000"),
    (dict(hidden_size=2 ** 62), "hidden_size 4611686018427387904"),
    (dict(num_attention_heads=-4), "num_attention_heads -4"),
    (dict(num_key_value_heads=0), "num_key_value_heads 0"),
    (dict(max_position_embeddings=None, vocab_size=[99]), "vocab_size .99."),
    (dict(head_dim=None, hidden_size=66), "66 cannot be shared by 4 heads"),
    (dict(head_dim=15), "an odd number"),
    (dict(rope_parameters={**LLAMA3, "low_freq_factor": 4.0}), "low_freq_factor must be below"),
    (dict(rope_parameters={"rope_type": ["linear"]}), "rope type"),
    (dict(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}), "partial"),
    (dict(rope_parameters={"rope_type": "linear", "factor": -2}), "factor -2"),
    (dict(model_type=["llama"]), "model_type")])
def test_configurations_out_of_range(change, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **LLAMA,
                                                      "tie_word_embeddings": False}))
    read_config(tmp_path)
    edit(tmp_path, **change)
    with pytest.raises(ValueError, match=message) as e:
        read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(e.value) and "\n" not in str(e.value)


def test_an_index_stays_in_its_folder(tmp_path):
    peer("llama", tmp_path / "a", max_shard_size="60KB")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    index = tmp_path / "a/model.safetensors.index.json"
    held = json.loads(index.read_text())
    name, file = next(iter(held["weight_map"].items()))
    for odd in (f"../b/{file}", str(tmp_path / "b" / file), "..", "", ".", f"a/../../b/{file}",
                "x\0y", 3, None, ["x"], "C:\\x", f"..\\b\\{file}"):
        index.write_text(json.dumps({"weight_map": {**held["weight_map"], name: odd}}))
        with pytest.raises(ValueError, match="only files inside its folder are read"):
            load_model(tmp_path / "a")
    other = next(f for f in held["weight_map"].values() if f != file)
    index.write_text(json.dumps({"weight_map": {**held["weight_map"], name: other}}))
    with pytest.raises(ValueError, match=f"lists {name}, which {other} does not hold"):
        load_model(tmp_path / "a")


def test_weights_are_finite_and_floating_point(tmp_path):
    peer("llama", tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    state = load_file(tmp_path / "model.safetensors")
    for bad in (float("nan"), float("inf"), float("-inf")):
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            w = state[name].to(dtype, copy=True)
            w[5, 7] = bad
            save_file({**state, name: w}, tmp_path / "model.safetensors")
            with pytest.raises(ValueError, match=f"model.safetensors: {name} holds NaN or Inf"):
                load_model(tmp_path)
    save_file({**state, name: state[name].to(torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name} is of type torch.int8"):
        load_model(tmp_path)
    save_file({**state, name: state[name].double()}, tmp_path / "model.safetensors")
    load_model(tmp_path)


def test_a_weight_that_half_precision_cannot_hold_is_not_stored(tmp_path):
    peer("llama", tmp_path / "a")
    model = load_model(tmp_path / "a")
    model.blocks[0].mlp.up.weight.data[0, 0] = 1e5
    with pytest.raises(ValueError, match="0.mlp.up_proj.weight does not fit torch.float16: save"):
        save_model(model, tmp_path / "b")
    save_model(model, tmp_path / "b", torch.bfloat16)


@pytest.mark.filterwarnings("ignore")
def test_torch_files_hold_plain_tensors_only(tmp_path):
    peer("llama", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = "model.norm.weight"
    (tmp_path / "model.safetensors").unlink()
    w = state[name]
    for odd in (w.to("meta"), w.to_sparse(), torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
                w.to(torch.complex64),
                torch.nested.nested_tensor([w]), torch.ones(1).expand(64)):
        torch.save({**state, name: odd}, tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError,
                           match="pytorch_model.bin cannot be read .* download it again") as e:
            load_model(tmp_path)
        assert "\n" not in str(e.value)
    torch.save({**state, 3: w}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="a name is no string but '3'"):
        load_model(tmp_path)
    w[3] = float("nan")
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"pytorch_model.bin: {name} holds NaN"):
        load_model(tmp_path)


def test_opening_reads_no_weights(tmp_path, monkeypatch):
    """Names and shapes of any size of model are checked without a pass over its values."""
    peer("llama-gqa", tmp_path / "hf")
    to_meta(tmp_path / "hf", tmp_path / "meta", 1, False)
    looked = []
    monkeypatch.setattr("data.checkpoint.check_tensor",
                        lambda tensor, name, *rest: looked.append(name))
    for folder in ("hf", "meta"):
        checkpoint = open_checkpoint(tmp_path / folder)
        assert not looked
        checkpoint.block(1)
        assert len(looked) == len(set(looked)) == 9
        checkpoint.model()
        assert len(looked) == len(set(looked)) == 21                         # each of them once
        looked.clear()


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    """A limit on file sizes, a folder that is gone, one that is closed: one line with the file's
    name."""
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.zeros(100_000)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match="x.safetensors cannot be written .File too large"):
            write_safetensors(path, tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="gone/x.safetensors cannot be written .No such file"):
        write_safetensors(tmp_path / "gone/x.safetensors", tensors)
    with pytest.raises(KeyboardInterrupt):                                   # Ctrl-C in the middle
        write_atomic(path, lambda f: (f.write(b"half"), (_ for _ in ()).throw(KeyboardInterrupt)))
    with pytest.raises(TypeError):
        write_atomic(path, lambda f: f.write(3))
    assert list(tmp_path.iterdir()) == []
    write_safetensors(path, tensors)
    before = path.read_bytes()
    with pytest.raises(OSError, match="full"):
        write_atomic(path, lambda f: (_ for _ in ()).throw(OSError(28, "full")))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("device", ["abacus", "cuda:99"])
def test_a_device_that_is_not_there(device, tmp_path):
    peer("llama", tmp_path)
    with pytest.raises(ValueError, match=f"device {device} cannot be used here") as error:
        load_model(tmp_path, device=device)
    assert "\n" not in str(error.value)


def test_config_names_the_type_that_is_stored(tmp_path):
    peer("llama", tmp_path / "a")
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        save_model(load_model(tmp_path / "a"), tmp_path / "b", dtype)
        assert LlamaForCausalLM.from_pretrained(tmp_path / "b", dtype="auto").dtype == dtype


def test_positions_run_out(tmp_path):
    peer("opt", tmp_path)
    with pytest.raises(ValueError, match="65 positions.*has 64"):
        load_model(tmp_path)(torch.zeros(1, 65, dtype=torch.int64))


def test_names_resolve(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints/opt-125m").mkdir(parents=True)
    assert resolve("opt-125m").name == "opt-125m" and resolve(tmp_path) == tmp_path
    with pytest.raises(FileNotFoundError,
                       match="hf download huggyllama/llama-7b --local-dir checkpoints/llama-7b"):
        resolve("llama-7b")
    with pytest.raises(FileNotFoundError, match="no checkpoint folder nowhere"):
        resolve("nowhere")


def test_published_table_counts_parameters():
    """The table's sizes give the published parameter counts, within the precision of the names."""
    for name, (d, layers, heads, kv, ff, vocab, _) in PUBLISHED.items():
        family = name.split("-")[0]
        c = Config(family, vocab, d, layers, heads, ff, kv, tied=family == "opt",
                   attention_bias=family == "opt", mlp_bias=family == "opt")
        with torch.device("meta"):
            count = sum(p.numel() for p in Transformer(c).parameters())
        number = name.split("-")[-1]
        size = float(number[:-1]) * {"b": 1e9, "m": 1e6}[number[-1]]
        assert 0.85 < count / size < 1.15, (name, count)


def test_read_config_of_published_spellings(tmp_path):
    old = {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
           "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "intermediate_size": 14336, "rms_norm_eps": 1e-5,
           "rope_theta": 500000.0,
           "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8192},
           "max_position_embeddings": 131072}
    (tmp_path / "config.json").write_text(json.dumps(old))
    c = read_config(tmp_path)
    assert (c.rope_theta, c.head_dim, c.tied) == (5e5, 128, False)
    assert c.rope_scaling["rope_type"] == "llama3"


@pytest.mark.parametrize("params, context", [
    ({"dim": 4096, "norm_eps": 1e-6}, 2048),                                        # llama-7b
    ({"dim": 8192, "norm_eps": 1e-5}, 2048),                                        # llama-65b
    ({"dim": 4096, "norm_eps": 1e-5}, 4096),                                        # llama-2-7b
    ({"dim": 8192, "norm_eps": 1e-5, "n_kv_heads": 8}, 4096),                       # llama-2-70b
    ({"dim": 8192, "norm_eps": 1e-5, "n_kv_heads": 8, "rope_theta": 5e5}, 8192)])   # llama-3-70b
def test_context_of_published_params(params, context, tmp_path, monkeypatch):
    weights = Tensors({"layers.0.feed_forward.w1.weight": torch.empty(11008, 8, device="meta"),
                       "tok_embeddings.weight": torch.empty(32000, 8, device="meta")}, tmp_path)
    monkeypatch.setattr("data.config.read_meta", lambda folder: weights)
    (tmp_path / "params.json").write_text(json.dumps({"n_layers": 80, "n_heads": 64,
                                                      "vocab_size": -1, **params}))
    assert read_config(tmp_path).max_positions == context
