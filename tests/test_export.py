"""export.py: every file it writes is read by the program it is meant for, or by a reader written
from that format's text.

    python -m pytest -q tests/test_export.py
"""
import base64
import dataclasses
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import sentencepiece
import test_model
import torch
from safetensors.torch import load_file, save_file
from test_model import peer, to_meta
from test_packed_model import TOKENS, models
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPTQConfig,
                          LlamaForCausalLM, OPTForCausalLM)

import export
from compress import compress, make_solver
from data.checkpoint import read_folder, verify, write_safetensors
from data.config import PUBLISHED, SHIPPED, Config, file_sums, meta_factor
from data.tokenizer import load_tokenizer
from kernels.packing import Packed
from model import Transformer, load_model, open_checkpoint, save_model, shard_path
from prompt import initial_prompt, load_prompt, owner, save_prompt

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared/data"
CLASSES = {"llama": LlamaForCausalLM, "opt": OPTForCausalLM}


@torch.no_grad()
def logits(model, **inputs):
    return model(**inputs).logits


def run(*args) -> None:
    export.main(export.parse([str(a) for a in args]))


def behind(model, prompt: torch.Tensor) -> torch.Tensor:
    """Logits of TOKENS behind a prompt, the prompt's own positions first."""
    return model(torch.cat([prompt.expand(len(TOKENS), -1, -1), model.embed(TOKENS)], 1))


# ---- Hugging Face

@pytest.mark.parametrize("family, format, grid", [
    ("llama", "unstructured", "offset"), ("llama", "nm", "uniform"),
    ("opt", "unstructured", "offset"), ("opt", "dense", "uniform")])
def test_transformers_gives_our_logits(family, format, grid, tmp_path, monkeypatch):
    save_model(models(family, format, grid)[0], tmp_path / "packed", torch.float32)
    want = load_model(tmp_path / "packed")(TOKENS)
    monkeypatch.setattr(export, "SHARD", 30_000)                            # many shards
    export.to_hf(open_checkpoint(tmp_path / "packed"), tmp_path / "hf", torch.float32)
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    total = sum(t.nbytes for t in read_folder(tmp_path / "hf").values())
    assert index["metadata"]["total_size"] == total
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert (logits(theirs, input_ids=TOKENS) - want).abs().max() < 1e-5
    assert torch.equal(load_model(tmp_path / "hf")(TOKENS), want)
    # as stored: what an fp16 model computes with
    export.to_hf(open_checkpoint(tmp_path / "packed"), tmp_path / "half")
    dense = load_model(tmp_path / "packed", torch.float16, packed=False).state_dict()
    assert all(torch.equal(w, dense[n])
               for n, w in load_model(tmp_path / "half", torch.float16).state_dict().items())


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])
def test_a_shipped_model_with_its_tokenizer(name, tmp_path):
    run(name, "--to", "hf", tmp_path / "out")
    tokenizer = load_tokenizer(SHIPPED[name])
    text = "def f(x):\n    return x + 12  # na\u00efve \u2603 <- \t'it's'\n\n  two"
    ids = torch.tensor([tokenizer.encode(text)])
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for some in (text, "", " a", *(ROOT / "gptq.py").read_text().split("\n\n")):
        assert theirs.encode(some) == tokenizer.encode(some)
    assert theirs.decode(ids[0], skip_special_tokens=True) == text
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert (logits(theirs, input_ids=ids) - load_model(name)(ids)).abs().max() < 1e-4
    assert theirs.config.eos_token_id == tokenizer.eos_id
    assert load_tokenizer(tmp_path / "out").encode(text) == ids[0].tolist()


def test_weights_that_a_dtype_cannot_hold_are_refused(tmp_path):
    model = models("llama", "dense", "uniform")[1]
    model.blocks[0].mlp.up.weight[0, 0] = 1e6
    save_model(model, tmp_path / "model", torch.float32)
    with pytest.raises(ValueError, match="mlp.up.weight does not fit torch.float16: use --dtype"):
        run(tmp_path / "model", "--to", "hf", tmp_path / "hf", "--dtype", "float16")


def test_the_dtype_is_told(tmp_path):
    save_model(models("llama", "dense", "uniform")[1], tmp_path / "model", torch.bfloat16)
    for more, want in (((), "bfloat16"), (("--dtype", "float32"), "float32")):
        run(tmp_path / "model", "--to", "hf", tmp_path / want, *more)
        assert json.loads((tmp_path / want / "config.json").read_text())["torch_dtype"] == want
        assert {t.dtype for t in read_folder(tmp_path / want).values()} == {getattr(torch, want)}


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_transformers_refuses_a_packed_folder(family, tmp_path):
    """It once opened one with random Linears and a warning."""
    save_model(models(family, "unstructured", "offset")[0], tmp_path)
    for cls in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=f"model type `compress-then-prompt-{family}`"):
            cls.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantization config.*no `quant_method`"):
        CLASSES[family].from_pretrained(tmp_path)


# ---- packed folders that can be verified

def test_every_byte_has_a_checksum_and_every_file_its_place(tmp_path, capsys):
    model = models("opt", "dense", "uniform", groupsize=32, shuffled=True)[0]
    save_model(model, tmp_path / "a")
    run(tmp_path / "a", "--verify")
    assert "as they were written" in capsys.readouterr().out
    path = tmp_path / "a/model.safetensors"
    whole = path.read_bytes()
    count = len(load_file(path))
    assert verify(tmp_path / "a") == {path.name: count}
    begin = 8 + int.from_bytes(whole[:8], "little")
    for at in range(begin, len(whole), len(whole) // 50):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1:])
        for look in (lambda: verify(tmp_path / "a"), lambda: load_model(tmp_path / "a")):
            with pytest.raises(ValueError, match="model.safetensors is damaged: .* checksum"):
                look()
    done = subprocess.run([sys.executable, "export.py", tmp_path / "a", "--verify"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    path.write_bytes(whole)
    config = json.loads((tmp_path / "a/config.json").read_text())
    tensors = load_file(path)
    q = config["quantization_config"]
    assert q["version"] == 2
    assert q["files"] == file_sums(tmp_path / "a")
    names = [n for n in tensors if n.endswith("g_idx")]
    swapped = {**tensors, names[0]: tensors[names[1]], names[1]: tensors[names[0]]}
    lacking = {n: t for n, t in tensors.items() if n != names[0]}
    for changed in (swapped, lacking):  # written anew: checksums are right again
        write_safetensors(path, changed)
        with pytest.raises(ValueError,
                           match="model.safetensors is not the file that config.json was written"):
            load_model(tmp_path / "a")
    del q["files"]
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    save_file(lacking, path)
    with pytest.raises(ValueError, match="has lost its checksums"):
        load_model(tmp_path / "a")
    q["version"] = 3
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="packed format 3, and this code reads 1 to 2"):
        load_model(tmp_path / "a")


def test_folders_from_before_checksums_are_read(tmp_path, capsys):
    packed, dense = models("llama", "unstructured", "offset")
    save_model(packed, tmp_path)
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    layers = config["quantization_config"]["layers"]
    config.update(model_type="llama",
                  quantization_config={"quant_method": "compress-then-prompt", "layers": layers})
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(load_model(tmp_path)(TOKENS), dense(TOKENS))
    run(tmp_path, "--verify")
    assert "no checksums" in capsys.readouterr().out


# ---- GPTQ

def read_gptq(folder: Path) -> dict[str, torch.Tensor]:
    """The layout's own text, bit by bit: {name: weight (out, in)} of a GPTQ folder, everything else
    as it is."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    bits = config["bits"]
    extra = 1 if config["checkpoint_format"] == "gptq" else 0
    tensors, out = {}, {}
    for file in folder.glob("*.safetensors"):
        tensors.update(load_file(file))

    def number(column: list[int], i: int) -> int:
        """The i-th number of a column of 32-bit words."""
        stream = sum((word & 0xFFFFFFFF) << 32 * k for k, word in enumerate(column))
        return stream >> bits * i & (1 << bits) - 1
    for name, t in tensors.items():
        kind = name.rpartition(".")[2]
        if kind not in ("qweight", "qzeros", "scales", "g_idx"):
            out[name] = t
        if kind != "qweight":
            continue
        base = name.removesuffix("qweight")
        group = tensors[base + "g_idx"].long()                  # (in,)
        scale = tensors[base + "scales"].float()                # (groups, out)
        columns = t.shape[0] * 32 // bits
        q = torch.tensor([[number(word, i) for i in range(columns)] for word in t.T.tolist()])
        zeros = [[number(row, i) + extra for i in range(t.shape[1])]
                 for row in tensors[base + "qzeros"].tolist()]
        zero_of_column = torch.tensor(zeros).T[:, group]
        out[base + "weight"] = (q - zero_of_column).float() * scale.T[:, group]
    return out


@pytest.mark.parametrize("family, format, bits, groupsize, shuffled", [
    ("llama", "unstructured", 4, -1, False), ("opt", "nm", 4, 32, False),
    ("opt", "dense", 4, 32, True),
    ("llama", "dense", 3, 32, False), ("llama", "unstructured", 2, -1, False),
    ("opt", "dense", 8, -1, False)])
def test_gptq_holds_the_same_weights(family, format, bits, groupsize, shuffled, tmp_path):
    packed, dense = models(family, format, "uniform", bits, groupsize, shuffled)
    save_model(packed, tmp_path / "packed", torch.float32)
    export.to_gptq(open_checkpoint(tmp_path / "packed"), tmp_path / "gptq")
    said = json.loads((tmp_path / "gptq/config.json").read_text())["quantization_config"]
    assert (said["bits"], said["group_size"], said["desc_act"]) == (bits, groupsize, shuffled)
    assert said == json.loads((tmp_path / "gptq/quantize_config.json").read_text())
    assert said["checkpoint_format"] == "gptq"
    assert said["sym"] is True                              # all zeros in the middle
    export.to_hf(open_checkpoint(tmp_path / "packed"), tmp_path / "hf", torch.float32)
    want = load_file(tmp_path / "hf/model.safetensors")
    got = read_gptq(tmp_path / "gptq")
    assert set(got) == set(want)
    for name, w in want.items():
        linear = "layers" in name and name.endswith("weight") and "norm" not in name
        assert torch.equal(got[name].float(), w if linear else w.half().float()), name


def test_gptq_of_offset_grids(tmp_path):
    """With an offset of one half the 8-bit form is exact; any other is one error, before anything
    is written."""
    save_model(models("llama", "unstructured", "offset")[0], tmp_path / "packed")
    with pytest.raises(ValueError, match="train.py --grid uniform --heal 0, or use --to hf"):
        run(tmp_path / "packed", "--to", "gptq", tmp_path / "gptq")
    assert not (tmp_path / "gptq").exists()
    packed, _ = models("llama", "unstructured", "offset")
    for _, m in packed.linears():
        m.zero.fill_(0.5)
    save_model(packed, tmp_path / "half")
    export.to_gptq(open_checkpoint(tmp_path / "half"), tmp_path / "gptq")
    export.to_hf(open_checkpoint(tmp_path / "half"), tmp_path / "hf", torch.float32)
    got = read_gptq(tmp_path / "gptq")
    want = load_file(tmp_path / "hf/model.safetensors")
    for n, w in want.items():
        is_linear = w.dim() > 1 and "layers" in n
        assert torch.equal(got[n].float(), w if is_linear else w.half().float()), n
    config = json.loads((tmp_path / "gptq/config.json").read_text())
    assert config["quantization_config"]["bits"] == 8


def test_gptq_version_2_where_a_zero_is_0_and_errors(tmp_path):
    packed, _ = models("llama", "dense", "uniform")
    for _, m in packed.linears():
        m.zero[3] = 0
    save_model(packed, tmp_path / "packed")
    export.to_gptq(open_checkpoint(tmp_path / "packed"), tmp_path / "gptq")
    config = json.loads((tmp_path / "gptq/config.json").read_text())
    assert config["quantization_config"]["checkpoint_format"] == "gptq_v2"
    assert config["quantization_config"]["sym"] is False
    export.to_hf(open_checkpoint(tmp_path / "packed"), tmp_path / "hf", torch.float32)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(read_gptq(tmp_path / "gptq")[name],
                       load_file(tmp_path / "hf/model.safetensors")[name])
    with pytest.raises(ValueError,
                       match="blocks.0.attn.q is not quantized.*--grid uniform --heal 0"):
        export.to_gptq(open_checkpoint(tmp_path / "hf"), tmp_path / "no")
    for zero in (1.5, 16, -1):
        packed.blocks[0].mlp.down.zero[0] = zero
        save_model(packed, tmp_path / "tuned")
        with pytest.raises(ValueError, match="blocks.0.mlp.down has a zero that is no level"):
            export.to_gptq(open_checkpoint(tmp_path / "tuned"), tmp_path / "no")


def test_what_gptq_files_have_no_room_for(tmp_path):
    packed = models("llama", "dense", "uniform", groupsize=32)[0]
    other = models("llama", "dense", "uniform", groupsize=16)[0]
    packed.set_submodule("blocks.0.mlp.up", other.blocks[0].mlp.up)
    save_model(packed, tmp_path / "mixed")
    with pytest.raises(ValueError, match="its Linears differ in bits, grid or groupsize"):
        export.to_gptq(open_checkpoint(tmp_path / "mixed"), tmp_path / "no")
    for rows, cols in ((33, 64), (64, 33)):
        meta = {**packed.blocks[0].mlp.down.meta, "shape": [rows, cols]}
        with pytest.raises(ValueError, match=f"mine is {rows} x {cols}, .* multiples of 32"):
            export.check_grid(Packed({}, meta), "mine")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("family, format, bits, groupsize, shuffled, zero", [
    ("llama", "unstructured", 4, 32, False, None), ("opt", "dense", 4, 32, True, None),
    ("opt", "nm", 4, -1, False, None),
    ("llama", "dense", 8, -1, False, None), ("llama", "dense", 2, 32, False, None),
    ("llama", "dense", 3, -1, False, None),
    ("llama", "dense", 4, -1, False, 0)])
def test_gptqmodel_gives_our_logits(family, format, bits, groupsize, shuffled, zero, tmp_path):
    """The real peer, on a CPU, through transformers, where it is installed."""
    for package in ("gptqmodel", "optimum"):
        pytest.importorskip(package,
                            reason=f"needs {package}, which is not among the tests' requirements")
    packed = models(family, format, "uniform", bits, groupsize, shuffled)[0]
    if zero is not None:                                        # version 2
        packed.blocks[0].mlp.down.zero.fill_(zero)
    save_model(packed, tmp_path / "packed")
    export.to_gptq(open_checkpoint(tmp_path / "packed"), tmp_path / "gptq")
    # The kernel it chooses on a CPU knows groups of 32, 64, 128 and 256 columns only, and computes in
    # bfloat16 where the processor does.
    chosen, tolerance = {}, 2e-2
    if groupsize == -1:
        chosen["quantization_config"] = GPTQConfig(bits=bits, backend="gptq_torch")
        tolerance = 5e-3
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "gptq", dtype=torch.float32,
                                                  device_map="cpu", **chosen)
    want = load_model(tmp_path / "packed")(TOKENS)
    assert (logits(theirs, input_ids=TOKENS).float() - want).abs().max() < tolerance * want.abs().max()


# ---- Meta

@pytest.mark.parametrize("name, shards",
                         [("llama-gqa", 1), ("llama-tied", 1), ("llama-theta", 1),
                          ("llama-gqa", 2), ("llama", 2)])
def test_meta_and_hugging_face_both_ways(name, shards, tmp_path, monkeypatch):
    monkeypatch.setitem(test_model.LLAMA, "vocab_size", 100)  # two shards share it evenly
    peer(name, tmp_path / "hf")
    to_meta_folder = tmp_path / "meta"
    to_meta(tmp_path / "hf", to_meta_folder, shards, False)                 # the tests' own writer
    monkeypatch.setattr(export, "SHARD", 60_000)
    export.to_hf(open_checkpoint(to_meta_folder), tmp_path / "hf2")
    first = read_folder(tmp_path / "hf")
    second = read_folder(tmp_path / "hf2")
    assert set(second) == set(first)
    assert all(torch.equal(first[n], second[n]) for n in first)
    export.to_meta(open_checkpoint(tmp_path / "hf2"), tmp_path / "meta2")
    # read without mapping: CRCs count
    theirs = torch.load(tmp_path / "meta2/consolidated.00.pth", weights_only=True)
    mapped = torch.load(tmp_path / "meta2/consolidated.00.pth", weights_only=True, mmap=True)
    parts = [torch.load(f, weights_only=True) for f in sorted(to_meta_folder.glob("*.pth"))]
    # Meta's code has no tied heads
    parts[0].setdefault("output.weight", parts[0]["tok_embeddings.weight"])
    assert set(theirs) == set(parts[0]) - {"rope.freqs"}
    if shards == 1:
        assert all(torch.equal(w, parts[0][n]) and torch.equal(w, mapped[n])
                   for n, w in theirs.items())
    assert torch.equal(load_model(tmp_path / "meta2")(TOKENS), load_model(tmp_path / "hf")(TOKENS))
    assert zipfile.ZipFile(tmp_path / "meta2/consolidated.00.pth").testzip() is None
    # the width of the MLP as Meta's code finds it
    p = json.loads((tmp_path / "meta2/params.json").read_text())
    hidden = int(p.get("ffn_dim_multiplier", 1) * int(2 * 4 * p["dim"] / 3))
    rounded_up = p["multiple_of"] * -(-hidden // p["multiple_of"])
    assert rounded_up == theirs["layers.0.feed_forward.w1.weight"].shape[0]


@pytest.mark.parametrize("name, more", [("llama-7b", set()), ("llama-2-70b", {
    "n_kv_heads", "ffn_dim_multiplier"})])
def test_metas_file_has_the_fields_of_its_own(name, more):
    """It calls ModelArgs(max_seq_len=..., **params): a field too many is an error there."""
    width, layers, heads, kv_heads, d_ff, vocab, _ = PUBLISHED[name]
    norm, most = (1e-6, 2048) if name == "llama-7b" else (1e-5, 4096)
    c = Config("llama", vocab, width, layers, heads, d_ff, kv_heads, norm_eps=norm,
               max_positions=most)
    assert set(export.meta_params(c)) == more | {"dim", "n_layers", "n_heads", "vocab_size",
                                                 "norm_eps", "multiple_of"}


def test_a_context_that_metas_code_would_not_guess_is_said():
    c = Config("llama", 100, 4096, 2, 32, 11008, norm_eps=1e-6, max_positions=2048)
    assert "max_seq_len" not in export.meta_params(c)
    longer = dataclasses.replace(c, max_positions=16384)
    assert export.meta_params(longer)["max_seq_len"] == 16384


def test_a_rotary_scaling_of_other_frequencies_is_refused(tmp_path):
    model = models("llama", "dense", "uniform")[1]
    scaling = {**export.LLAMA31, "factor": 8.0, "low_freq_factor": 2.0}
    model.config = dataclasses.replace(model.config, rope_scaling=scaling)
    save_model(model, tmp_path / "model")
    with pytest.raises(ValueError, match="cannot say the rotary scaling"):
        export.to_meta(open_checkpoint(tmp_path / "model"), tmp_path / "no")


def test_packed_to_meta_and_what_meta_cannot_say(tmp_path):
    save_model(models("llama", "unstructured", "offset")[0], tmp_path / "packed")
    export.to_meta(open_checkpoint(tmp_path / "packed"), tmp_path / "meta", torch.float32)
    assert torch.equal(load_model(tmp_path / "meta")(TOKENS),
                       load_model(tmp_path / "packed")(TOKENS))
    for name, what in (("opt", "OPT"), ("llama-biases", "biases"),
                       ("llama-head-dim", "heads of 24"),
                       ("llama-linear", "rotary scaling")):
        peer(name, tmp_path / name)
        with pytest.raises(ValueError, match=f"Meta's layout cannot say .*{what}"):
            export.to_meta(open_checkpoint(tmp_path / name), tmp_path / "no")
    assert not (tmp_path / "no").exists()


# ---- PEFT

@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_prompt_goes_to_peft_and_back(family, tmp_path):
    peft = pytest.importorskip("peft")
    save_model(models(family, "unstructured", "offset")[0], tmp_path / "packed")
    model = load_model(tmp_path / "packed")
    prompt = initial_prompt(model, 5, "random", seed=3)
    save_prompt(tmp_path / "prompt.safetensors", prompt)
    run(tmp_path / "packed", "--to", "peft", tmp_path / "adapter", "--prompt",
        tmp_path / "prompt.safetensors")
    run(tmp_path / "packed", "--to", "hf", tmp_path / "hf", "--dtype", "float32")
    base = CLASSES[family].from_pretrained(tmp_path / "hf", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    want = behind(model, prompt)
    got = logits(theirs, input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS))
    assert got.shape == want.shape
    assert (got - want).abs().max() < 1e-5

    # one of another family, of the same width
    other = "opt" if family == "llama" else "llama"
    save_prompt(tmp_path / "other.safetensors", prompt, {}, {**owner(model), "family": other})
    with pytest.raises(ValueError, match=f"another family .{other}, not {family}"):
        run(tmp_path / "packed", "--to", "peft", tmp_path / "no", "--prompt",
            tmp_path / "other.safetensors")
    assert not (tmp_path / "no").exists()

    # a prompt that peft trained
    base = CLASSES[family].from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tuned = peft.get_peft_model(base,
                                peft.PromptTuningConfig(task_type="CAUSAL_LM",
                                                        num_virtual_tokens=4))
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1.0)
    tuned(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), labels=TOKENS).loss.backward()
    optimizer.step()
    tuned.save_pretrained(tmp_path / "trained")
    run(tmp_path / "packed", "--to", "prompt", tmp_path / "back.safetensors", "--prompt",
        tmp_path / "trained")
    back = load_prompt(tmp_path / "back.safetensors", model)[0]
    got = logits(tuned.eval(), input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS))
    assert back.shape == (4, 64)
    assert (got - behind(model, back)).abs().max() < 1e-5
    config = json.loads((tmp_path / "trained/adapter_config.json").read_text())
    for key, value, message in (("peft_type", "LORA", "peft_type LORA"),
                                ("num_virtual_tokens", 5, "of 5 tokens")):
        (tmp_path / "trained/adapter_config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(ValueError, match=message):
            export.from_peft(tmp_path / "trained")


@pytest.fixture
def adapter(tmp_path):
    """(a model's folder, an adapter for it, its prompt)."""
    save_model(models("llama", "dense", "uniform")[1], tmp_path / "model")
    prompt = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    config = open_checkpoint(tmp_path / "model").config
    export.to_peft("some/name", config, prompt.half(), tmp_path / "adapter")
    return tmp_path / "model", tmp_path / "adapter", prompt.half().float()


def test_adapters_in_their_older_forms_are_read(adapter):
    """As .bin, in half precision, without a number of submodules."""
    _, folder, prompt = adapter
    said = json.loads((folder / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == "some/name"
    path = folder / "adapter_model.safetensors"
    held = load_file(path)
    assert held["prompt_embeddings"].dtype == torch.float32
    torch.save({"prompt_embeddings": prompt + 1}, path.with_suffix(".bin"))
    assert torch.equal(export.from_peft(folder), prompt)        # the newer file goes before
    path.unlink()
    torch.save({"prompt_embeddings": prompt.half()}, path.with_suffix(".bin"))
    said["num_transformer_submodules"] = None
    (folder / "adapter_config.json").write_text(json.dumps(said))
    got = export.from_peft(folder)
    assert got.dtype == torch.float32
    assert torch.equal(got, prompt)


def test_adapters_that_hold_no_prompt_of_embeddings_are_refused(adapter):
    _, folder, prompt = adapter
    path = folder / "adapter_model.safetensors"
    for odd in (prompt[None].expand(3, 3, 64), prompt.int()):
        save_file({"prompt_embeddings": odd.contiguous()}, path)
        with pytest.raises(ValueError, match="does not hold the prompt_embeddings of 3 tokens"):
            export.from_peft(folder)
    said = json.loads((folder / "adapter_config.json").read_text())
    said["num_transformer_submodules"] = 2
    (folder / "adapter_config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="PROMPT_TUNING with 2 submodules"):
        export.from_peft(folder)
    with pytest.raises(ValueError, match="knows embeddings only"):
        export.to_peft("m", None, torch.zeros(2, 2, 3, 4, 5), folder)


def test_an_adapter_goes_into_a_new_file_that_fits_the_model(adapter, tmp_path):
    model, folder, prompt = adapter
    common = model, "--to", "prompt", "--prompt", folder
    run(*common, tmp_path / "p.safetensors")
    before = (tmp_path / "p.safetensors").read_bytes()
    with pytest.raises(ValueError, match="p.safetensors exists: give a new file"):
        run(*common, tmp_path / "p.safetensors")
    with pytest.raises(ValueError, match="a prompt's file ends in .safetensors"):
        run(*common, tmp_path / "p.pt")
    save_file({"prompt_embeddings": prompt[:, :32].contiguous()},
              folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="a prompt of width 32 does not fit a model"):
        run(*common, tmp_path / "narrow.safetensors")
    assert (tmp_path / "p.safetensors").read_bytes() == before
    assert not (tmp_path / "narrow.safetensors").exists()


def test_the_base_model_of_an_adapter_is_the_one_that_was_named(tmp_path, monkeypatch):
    save_model(models("llama", "dense", "uniform")[1], tmp_path / "model")
    save_prompt(tmp_path / "p.safetensors", torch.zeros(3, 64))
    monkeypatch.chdir(tmp_path)
    run("./model", "--to", "peft", "out", "--prompt", "p.safetensors")
    said = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == "./model"


# ---- the program

def test_verify_misses_files(tmp_path, monkeypatch, capsys):
    peer("llama", tmp_path / "model")
    monkeypatch.setattr(export, "SHARD", 60_000)
    run(tmp_path / "model", "--to", "hf", tmp_path / "hf")
    run(tmp_path / "hf", "--verify")
    sorted((tmp_path / "hf").glob("model-*.safetensors"))[1].unlink()
    assert "is complete" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="lists model-00002"):
        run(tmp_path / "hf", "--verify")
    (tmp_path / "hf/config.json").write_text('{"model_type": "gpt2"}')
    capsys.readouterr()
    run(tmp_path / "hf", "--verify")
    assert "is complete is not known" in capsys.readouterr().out
    (tmp_path / "hf/config.json").unlink()                      # as a killed export leaves it
    with pytest.raises(FileNotFoundError, match="not complete: there is no config.json"):
        run(tmp_path / "hf", "--verify")
    save_model(models("opt", "dense", "uniform")[0], tmp_path / "packed")
    run(tmp_path / "packed", "--to", "gptq", tmp_path / "gptq")
    run(tmp_path / "gptq", "--verify")
    assert "whether" in capsys.readouterr().out             # it is for other programs to read


def test_verify_finds_shards_of_a_packed_folder_that_are_missing_or_anothers(tmp_path, capsys):
    config = Config("llama", 64, 32, 2, 4, 64)
    save_model(Transformer(config), tmp_path / "dense")
    windows = torch.randint(0, 64, (4, 16))
    compress(open_checkpoint(tmp_path / "dense"), tmp_path / "c", windows, make_solver(4, 0.5))
    run(tmp_path / "c", "--verify")
    assert "is complete" in capsys.readouterr().out
    one, two = (shard_path(tmp_path / "c", i, 2) for i in (1, 2))
    whole = one.read_bytes()
    shutil.copy(two, one)
    with pytest.raises(ValueError, match="are not of one model|is not the file that"):
        run(tmp_path / "c", "--verify")
    one.unlink()
    with pytest.raises(FileNotFoundError, match="lists model-00002|not beside it"):
        run(tmp_path / "c", "--verify")
    one.write_bytes(whole)
    config = tmp_path / "c/config.json"
    config.write_bytes(config.read_bytes()[:-40])
    with pytest.raises(ValueError, match="config.json"):
        run(tmp_path / "c", "--verify")


def test_a_head_that_is_not_the_embedding_is_not_dropped_in_silence(tmp_path):
    peer("llama-tied", tmp_path / "model")
    path = tmp_path / "model/model.safetensors"
    state = load_file(path)
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"] + 1}, path)
    with pytest.raises(ValueError, match="is not the embedding"):
        run(tmp_path / "model", "--to", "hf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.skipif(not (SHARED / "tokenizers/llama").exists(), reason="needs ../shared/data")
@pytest.mark.parametrize("said", [None, {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>",
                                         "eos_token": "</s>", "unk_token": "<unk>"}])
def test_the_published_llama_tokenizer_becomes_one_that_transformers_opens(said, tmp_path):
    """Without sentencepiece's own reader: its pieces of spaces have scores of their own."""
    source = tmp_path / "source"
    shutil.copytree(SHARED / "tokenizers/llama", source)
    if said:
        (source / "tokenizer_config.json").write_text(json.dumps(said))
    export.take_tokenizer(source, tmp_path / "out")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "out"), load_tokenizer(source)
    for text in ("Hello  world", "   three\n\n  \t x", "\u4e2d caf\u00e9 \U0001f600", "a" * 50,
                 " a"):
        assert theirs(text)["input_ids"] == ours.encode(text)


def test_an_eos_that_was_added_is_told(tmp_path):
    shutil.copytree(SHIPPED["tiny-opt"], tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    size = len(json.loads((tmp_path / "model/vocab.json").read_text()))
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "vocab_size": size + 1}))
    (tmp_path / "model/added_tokens.json").write_text(json.dumps({"<|im_end|>": size}))
    (tmp_path / "model/special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (tmp_path / "model/tokenizer_config.json").unlink(missing_ok=True)
    said = export.take_tokenizer(tmp_path / "model", tmp_path / "out")
    assert said["eos_token_id"] == size
    told = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert told["eos_token"] == "<|im_end|>"


def test_tokens_that_were_added_to_sentencepiece_go_along(tmp_path):
    """Special ones and words; in one text or two; with what else the settings say."""
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(SHIPPED["tiny-llama"] / "tokenizer.model", source)
    size = load_tokenizer(SHIPPED["tiny-llama"]).vocab_size
    plain = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    added = {str(size): {"content": "<|im_end|>", "special": True, **plain},
             str(size + 1): {"content": "a word", "special": False, **plain}}
    said = {"tokenizer_class": "LlamaTokenizer", "eos_token": "<|im_end|>", "chat_template": "x",
            "added_tokens_decoder": added}
    (source / "tokenizer_config.json").write_text(json.dumps(said))
    ours = load_tokenizer(source)
    told = export.take_tokenizer(source, tmp_path / "out")
    assert told == {"bos_token_id": ours.bos_id, "eos_token_id": size}
    config = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert config == {**said, "tokenizer_class": export.FAST}
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = ours.encode("one a word<|im_end|>two")
    assert theirs("one a word<|im_end|>two")["input_ids"] == ids
    assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    assert theirs("a", "b")["input_ids"] == ours.encode("a") + ours.encode("b", bos=False)


def test_a_tokenizer_json_that_is_there_is_kept(tmp_path):
    shutil.copytree(SHIPPED["tiny-llama"], tmp_path / "model")
    export.take_tokenizer(tmp_path / "model", tmp_path / "out")
    text = (tmp_path / "out/tokenizer.json").read_text() + " "
    (tmp_path / "model/tokenizer.json").write_text(text)
    export.take_tokenizer(tmp_path / "model", tmp_path / "again")
    assert (tmp_path / "again/tokenizer.json").read_text() == text


def test_a_tokenizer_that_only_transformers_reads_is_copied(tmp_path, capsys):
    """And a rank file, which it would misread, is refused before anything is written."""
    peer("llama", tmp_path / "model")
    (tmp_path / "model/tokenizer.json").write_text('{"model": {"byte_fallback": true}}')
    run(tmp_path / "model", "--to", "hf", tmp_path / "hf")
    assert (tmp_path / "hf/tokenizer.json").exists() and (tmp_path / "hf/config.json").exists()
    assert "copied unread" in capsys.readouterr().err
    (tmp_path / "model/tokenizer.json").unlink()
    ranks = [f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)]
    (tmp_path / "model/tokenizer.model").write_text("\n".join(ranks))
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "vocab_size": 512}))
    state = load_file(tmp_path / "model/model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.randn(512, state[name].shape[1])
    save_file(state, tmp_path / "model/model.safetensors")
    with pytest.raises(ValueError, match="put the tokenizer.json of Hugging Face's edition"):
        run(tmp_path / "model", "--to", "hf", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    run(tmp_path / "model", "--to", "meta", tmp_path / "meta")
    assert load_tokenizer(tmp_path / "meta").encode("a") == [256, 97]


@pytest.mark.parametrize("how", [dict(model_type="unigram"), dict(user_defined_symbols=["<x>"]),
                                 dict(normalization_rule_name="nmt_nfkc"),
                                 dict(add_dummy_prefix=False), dict()])
def test_a_tokenizer_json_is_made_of_plain_bpe_alone(how, tmp_path):
    plain = dict(model_type="bpe", normalization_rule_name="identity", byte_fallback=True,
                 remove_extra_whitespaces=False)
    text = [f"the cat {i} sat on a mat and <x> ran" for i in range(50)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(tmp_path / "m"), vocab_size=300,
        minloglevel=2, hard_vocab_limit=False, **{**plain, **how})
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    assert export.is_plain_bpe(model) == (how == {})


def test_special_tokens_that_config_json_alone_names_go_along(tmp_path):
    shutil.copytree(SHIPPED["tiny-opt"], tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "eos_token_id": 50}))
    for name in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "model" / name).unlink(missing_ok=True)
    run(tmp_path / "model", "--to", "hf", tmp_path / "hf")
    assert load_tokenizer(tmp_path / "model").eos_id == load_tokenizer(tmp_path / "hf").eos_id == 50


def test_a_folder_says_one_end_of_a_text(tmp_path):
    """Numbers in config.json that the tokenizer's files contradict, as in early conversions."""
    transformers = pytest.importorskip("transformers")
    shutil.copytree(SHIPPED["tiny-opt"], tmp_path / "model")
    (tmp_path / "model/generation_config.json").unlink(missing_ok=True)
    config = json.loads((tmp_path / "model/config.json").read_text())
    config.update(bos_token_id=7, eos_token_id=8)
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    (tmp_path / "model/tokenizer_config.json").write_text(
        json.dumps({"bos_token": "</s>", "eos_token": "</s>"}))
    end = load_tokenizer(tmp_path / "model").eos_id
    assert end != 8
    run(tmp_path / "model", "--to", "hf", tmp_path / "hf")
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    assert theirs.eos_token_id == end
    assert json.loads((tmp_path / "hf/config.json").read_text())["eos_token_id"] == end
    assert load_tokenizer(tmp_path / "hf").stops == {end}


def test_the_factor_that_metas_files_do_not_say(tmp_path):
    """LLaMA 3.2's 32, LLaMA 3.1's 8; another is said."""
    for width, factor, said in ((2048, 32.0, False), (4096, 8.0, False), (2048, 8.0, True)):
        scaling = {**export.LLAMA31, "factor": factor}
        c = Config("llama", 100, width, 2, 16, 256, 16, rope_scaling=scaling, norm_eps=1e-5,
                   rope_theta=5e5, max_positions=131072)
        params = export.meta_params(c)
        assert ("rope_scaling_factor" in params) == said
        assert params.get("rope_scaling_factor", meta_factor(width)) == factor


def test_the_program_refuses_what_it_cannot_do(tmp_path):
    peer("llama", tmp_path / "model")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    model = tmp_path / "model"
    new = tmp_path / "new"
    for args, message in (((), "say what to write"), (("--to", "hf"), "say what to write"),
                          (("--to", "hf", tmp_path / "full"), "not empty"),
                          (("--to", "hf", model), "not empty"),
                          (("--to", "hf", tmp_path / "full/file"), "not empty"),
                          (("--to", "peft", new), "needs --prompt"),
                          (("--to", "hf", new, "--prompt", "x"), "takes no --prompt"),
                          (("--verify", "--to", "hf", new), "leave out"),
                          (("--verify", "--prompt", new), "leave out"),
                          (("--verify", "--dtype", "float16"), "leave out"),
                          (("--to", "gptq", new, "--dtype", "float32"), "does nothing"),
                          (("--to", "gptq", new), "not quantized")):
        with pytest.raises(ValueError, match=message):
            run(model, *args)
    assert not new.exists()
    assert sorted(f.name for f in (tmp_path / "full").iterdir()) == ["file"]


def test_nothing_is_left_where_writing_fails(tmp_path, monkeypatch):
    """A full disk: one line with the file's name and no .part."""
    peer("llama", tmp_path / "model")
    (tmp_path / "model/generation_config.json").unlink()
    monkeypatch.setattr(shutil, "copyfileobj",
                        lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    (tmp_path / "model/tokenizer.model").write_bytes(b"x")
    with pytest.raises(OSError, match="tokenizer.model cannot be written .No space left on device"):
        export.to_hf(open_checkpoint(tmp_path / "model"), tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())
