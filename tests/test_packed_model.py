"""Packed checkpoints: saved, read back mapped, equal to the dequantized model; bytes counted;
damage found.

    python -m pytest -q tests/test_packed_model.py
"""
import json
import math
import shutil
from typing import NamedTuple

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file

from data.checkpoint import write_safetensors
from data.config import Config, file_sums
from bench import models as bench_model
from kernels.linear import PackedLinear
from kernels.packing import pack_compressed
from model import Transformer, load_model, save_model, storage
from prompt import initial_prompt, text_loss

CONFIGS = {"llama": Config("llama", 99, 64, 2, 4, 96, n_kv_head=2, max_positions=64),
           "opt": Config("opt", 99, 64, 2, 4, 96, max_positions=64, attention_bias=True,
                         mlp_bias=True)}
TOKENS = torch.randint(0, 99, (3, 20), generator=torch.Generator().manual_seed(0))
FORMATS = ("dense", "nm", "unstructured")


class Result(NamedTuple):               # what the solvers return
    weight: torch.Tensor
    mask: torch.Tensor
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    g_idx: torch.Tensor
    grid: str
    bits: int


def compress(W: torch.Tensor, format: str, grid: str, bits: int = 4, groupsize: int = -1,
             shuffled: bool = False) -> Result:
    """Round-to-nearest by magnitude: a result as simple as one can be."""
    (rows, cols), size, top = W.shape, groupsize if groupsize > 0 else W.shape[1], 1 << (bits - 1)
    g_idx = (torch.randperm(cols) if shuffled else torch.arange(cols)) // size
    mask = torch.zeros(W.shape, dtype=torch.bool)
    if format == "nm":
        mask = (W.abs().view(rows, -1, 4).argsort(-1).argsort(-1) < 2).view(W.shape)
    elif format == "unstructured":
        mask = W.abs() < W.abs().median()
    most = torch.stack([W[:, g_idx == g].abs().amax(1) for g in range(int(g_idx.max()) + 1)], 1)
    if grid == "uniform":
        scale = (most / (top - 1)).half().float()
        zero = torch.full_like(scale, top)
        codes = (W / scale[:, g_idx] + zero[:, g_idx]).round().clamp(0, 2 * top - 1)
        weight = scale[:, g_idx] * (codes - zero[:, g_idx])
    else:
        scale = (most / (top + 1)).half().float()
        zero = torch.full_like(most, 0.75)
        k = (W.abs() / scale[:, g_idx] - zero[:, g_idx]).round().clamp(0, top - 1)
        codes = k + top * (W < 0)
        weight = W.sign() * scale[:, g_idx] * (k + zero[:, g_idx])
    return Result(weight.masked_fill(mask, 0), mask, codes.to(torch.uint8).masked_fill(mask, 0),
                  scale, zero, g_idx, grid, bits)


def models(family: str, format: str, grid: str, bits: int = 4, groupsize: int = -1,
           shuffled: bool = False):
    """(packed model, the same with dequantized weights in ordinary Linears)."""
    torch.manual_seed(1)
    dense = Transformer(CONFIGS[family]).eval().requires_grad_(False)
    for p in dense.parameters():
        noise = 0.1 * torch.randn_like(p)
        p.data = (noise if p.dim() > 1 else p + noise).half().float()
    packed = Transformer(CONFIGS[family]).eval().requires_grad_(False)
    packed.load_state_dict(dense.state_dict())
    for name, linear in dense.linears():
        out = compress(linear.weight, format, grid, bits, groupsize, shuffled)
        linear.weight.data = out.weight
        packed.set_submodule(name, PackedLinear(pack_compressed(out), linear.bias))
    return packed, dense


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("packed")
    save_model(models("opt", "unstructured", "offset")[0], path)
    return path


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("grid", ["uniform", "offset"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_logits_from_the_packed_folder(family, grid, format, tmp_path):
    packed, dense = models(family, format, grid)
    want = dense(TOKENS)
    assert torch.equal(packed(TOKENS), want)  # the same fp32 weights, the same products
    save_model(packed, tmp_path)
    back = load_model(tmp_path)
    ordinary = load_model(tmp_path, packed=False)
    assert all(isinstance(m, PackedLinear) and m.meta["format"] == format
               for _, m in back.linears())
    assert all(isinstance(m, nn.Linear) for _, m in ordinary.linears())
    for (name, a), (_, b), (_, c) in zip(back.linears(), ordinary.linears(), dense.linears()):
        assert torch.equal(b.weight, c.weight), name
        assert torch.equal(a.weight_dequantized(torch.float32), c.weight), name
    assert torch.equal(ordinary(TOKENS), want)
    assert torch.equal(back(TOKENS), want)
    # also the products of decoding
    for dtype, tolerance in ((torch.float16, 0.01), (torch.bfloat16, 0.08)):
        a = load_model(tmp_path, dtype)
        b = load_model(tmp_path, dtype, packed=False)
        differ = a(TOKENS[:1, :5]).float() - b(TOKENS[:1, :5]).float()
        assert differ.abs().max() < tolerance * want.abs().max()


@pytest.mark.parametrize("bits,groupsize", [(2, -1), (3, 32), (8, -1), (4, 32), (4, 40)])
def test_other_widths_and_groups(bits, groupsize, tmp_path):
    packed, dense = models("llama", "unstructured", "uniform", bits, groupsize)
    save_model(packed, tmp_path)
    assert torch.equal(load_model(tmp_path)(TOKENS), dense(TOKENS))


def test_groups_in_the_order_of_the_hessian(tmp_path):
    packed, dense = models("opt", "dense", "uniform", groupsize=32, shuffled=True)
    save_model(packed, tmp_path)
    back = load_model(tmp_path)
    assert "g_idx" in dict(back.blocks[0].mlp.down.named_buffers())
    assert torch.equal(back(TOKENS), dense(TOKENS))


def test_a_file_is_mapped_and_read_by_safetensors(folder):
    theirs = load_file(folder / "model.safetensors")
    back = load_model(folder)
    name = "model.decoder.layers.1.fc2"
    layer = back.blocks[1].mlp.down
    for n, t in layer.packed.tensors.items():
        assert torch.equal(theirs[f"{name}.{n}"], t)
    parts = {n.rpartition(".")[2] for n in theirs if n.startswith(name)}
    assert parts == {*layer.packed.tensors, "bias"}
    assert theirs["model.decoder.embed_tokens.weight"].dtype == torch.float16
    assert theirs[f"{name}.bias"].dtype == torch.float16
    parts = [m.codes.data_ptr() for _, m in back.linears()]  # one mapping, no copies
    assert max(parts) - min(parts) < (folder / "model.safetensors").stat().st_size
    quant = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert quant["method"] == "compress-then-prompt"
    assert quant["layers"][name] == layer.meta


def test_dense_folder_for_other_libraries(folder, tmp_path):
    import transformers
    save_model(load_model(folder, packed=False), tmp_path / "dense")
    theirs = transformers.OPTForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    want = load_model(folder)(TOKENS)
    # weights rounded to fp16
    assert (theirs(TOKENS).logits - want).abs().max() < 2e-3 * want.abs().max()


def test_storage_counts_what_the_file_takes(folder):
    got = storage(load_model(folder))
    sizes = load_file(folder / "model.safetensors")
    assert got["megabytes"] * 1e6 == sum(t.numel() * t.element_size() for t in sizes.values())
    inside = {n: t for n, t in sizes.items() if ".layers." in n and "norm" not in n
              and not n.endswith("bias")}
    weights = 2 * (4 * 64 * 64 + 2 * 64 * 96)
    taken = sum(t.numel() * t.element_size() for t in inside.values())
    assert got["linear_bits_per_weight"] == pytest.approx(8 * taken / weights)
    assert got["nominal"] == pytest.approx(8, rel=0.01)
    dense = storage(load_model(folder, packed=False))
    assert dense["linear_bits_per_weight"] == 16
    assert dense["nominal"] == pytest.approx(2, rel=0.01)
    assert dense["megabytes"] > 2 * got["megabytes"]
    assert dense["bits_per_weight"] == 16


def test_a_prompt_learns_through_packed_weights(folder):
    grads = []
    for packed in (True, False):
        model = load_model(folder, packed=packed)
        prompt = nn.Parameter(initial_prompt(model, 4, "vocab"))
        text_loss(model, prompt, TOKENS).mean().backward()
        grads.append(prompt.grad)
    assert torch.allclose(*grads, rtol=1e-5, atol=1e-7)


def broken(folder, to, change=lambda tensors: None, config=lambda j: None):
    shutil.copytree(folder, to)
    tensors = load_file(folder / "model.safetensors")
    j = json.loads((folder / "config.json").read_text())
    change(tensors)
    config(j)
    write_safetensors(to / "model.safetensors", tensors)  # with checksums, as save_model does
    if "files" in j.get("quantization_config", {}):
        j["quantization_config"]["files"] = file_sums(to)
    (to / "config.json").write_text(json.dumps(j))
    return to


NAME = "model.decoder.layers.0.self_attn.q_proj"


def test_files_of_an_older_version_with_a_tensor_more_are_read(folder, tmp_path):
    def change(tensors):
        tensors[f"{NAME}.tile_start"] = torch.zeros(8, 1, dtype=torch.int16)
    older = load_model(broken(folder, tmp_path / "b", change))
    assert torch.equal(older(TOKENS), load_model(folder)(TOKENS))


@pytest.mark.parametrize("tensor,new,message", [
    ("codes", None, "packed tensor codes: missing"),
    ("scale", None, "packed tensor scale: missing"),
    ("mask", None, "packed tensor mask: missing"), ("bias", None, "1 missing, such as .*bias"),
    ("codes", lambda t: t[:-1], "packed tensor codes"),
    ("codes", lambda t: t.to(torch.int16), "packed tensor codes"),
    ("zero", lambda t: t.float(), "packed tensor zero"),
    ("mask", lambda t: t[:, :-1].contiguous(), "packed tensor mask"),
    ("row_start", lambda t: t.flip(0), "row_start does not fit the mask"),
    ("mask", lambda t: torch.cat((t[:1] | -1, t[1:])), "packed tensor codes"),
    ("mask", lambda t: t.flip(0), "row_start does not fit the mask"),
    ("extra", lambda t: torch.zeros(3), "packed tensor extra")])
def test_damaged_tensors_are_one_line(tensor, new, message, folder, tmp_path):
    def change(tensors):
        old = tensors.pop(f"{NAME}.{tensor}", None)
        if new:
            tensors[f"{NAME}.{tensor}"] = new(old).contiguous()
    with pytest.raises(ValueError, match=message) as e:
        load_model(broken(folder, tmp_path / "b", change))
    assert "\n" not in str(e.value)
    assert NAME in str(e.value)


@pytest.mark.parametrize("key,value,message", [
    ("bits", 5, "bits 5"), ("grid", "log", "grid 'log'"), ("format", "csr", "format 'csr'"),
    ("groupsize", 0, "groupsize 0"),
    ("shape", [64, 32], "wants"), ("shape", 64, "which is damaged"),
    ("format", "nm", "packed tensor codes"), ("format", "dense", "packed tensor"),
    ("groupsize", 16, "packed tensor scale")])
def test_meta_that_does_not_fit_is_one_line(key, value, message, folder, tmp_path):
    def config(j):
        j["quantization_config"]["layers"][NAME][key] = value
    with pytest.raises(ValueError, match=message) as e:
        load_model(broken(folder, tmp_path / "b", config=config))
    assert "\n" not in str(e.value)
    assert NAME in str(e.value)


def test_foreign_and_truncated_folders(folder, tmp_path):
    foreign = {"quant_method": "gptq", "bits": 4}
    gptq = broken(folder, tmp_path / "a", config=lambda j: j.update(quantization_config=foreign))
    with pytest.raises(ValueError, match="'gptq'; of quantized checkpoints only"):
        load_model(gptq)

    def one_more(j):
        layers = j["quantization_config"]["layers"]
        layers["model.x"] = next(iter(layers.values()))
    more = broken(folder, tmp_path / "c", config=one_more)
    with pytest.raises(ValueError, match="packs model.x, which is no Linear of this model"):
        load_model(more)
    shutil.copytree(folder, tmp_path / "d")
    whole = (folder / "model.safetensors").read_bytes()
    (tmp_path / "d/model.safetensors").write_bytes(whole[:len(whole) * 3 // 4])
    with pytest.raises(ValueError, match="truncated"):
        load_model(tmp_path / "d")


def test_pruned_but_not_quantized_stays_dense(tmp_path):
    _, model = models("llama", "nm", "uniform")
    save_model(model, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    got = storage(load_model(tmp_path))
    assert got["linear_bits_per_weight"] == 16
    assert math.isclose(got["nominal"], 2, rel_tol=0.05)


def test_peak_memory_is_the_models_own(monkeypatch):
    """Of two models that share their embeddings, each counts them, and of a call what it allocates
    on top."""
    tiny = ("tiny", (64, 2, 4, 2, 96, 99, ""))
    monkeypatch.setitem(bench_model.PUBLISHED, *tiny)
    both = bench_model.pair("random-tiny", "nm", "uniform", torch.float16, torch.device("cpu"))
    assert both[0].embed_tokens.weight.data_ptr() == both[1].embed_tokens.weight.data_ptr()
    sizes = [storage(m)["megabytes"] * 1e6 for m in both]
    assert [bench_model.held(m) for m in both] == sizes
    assert sizes[1] < sizes[0]
    for name, value in (("reset_peak_memory_stats", None), ("memory_allocated", 50e6),
                        ("max_memory_allocated", 57e6)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    lines = bench_model.peaks([int, int], both, torch.device("cuda"))
    assert lines == [f"{(size + 7e6) / 1e6:.0f} MB at the peak, {size / 1e6:.0f} MB held"
                     for size in sizes]


def test_bench_of_whole_models(folder, tmp_path, capsys):
    """Both benches run on a packed folder and find both models equal; a dense folder and an unknown
    name are refused."""
    cpu = torch.device("cpu")
    models = list(bench_model.pair(str(folder), "unstructured", "offset", torch.float32, cpu))
    bench_model.time_decoding(models, 8, 2, cpu)
    bench_model.time_tuning(models, 2, 16, 4, 1, cpu)
    out = capsys.readouterr().out
    for what in ("largest difference of a logit", "difference of the prompt's gradient"):
        assert float(out.partition(what)[2].partition(": ")[2].split()[0]) < 1e-4
    assert "tokens/s" in out
    assert "bytes per parameter" in out
    assert "kB per token" in out
    with pytest.raises(ValueError, match="give random- and one of llama-7b"):
        bench_model.pair("random-7b", "nm", "offset", torch.float32, cpu)
    save_model(models[0], tmp_path)
    with pytest.raises(ValueError, match="is not packed"):
        bench_model.pair(str(tmp_path), "nm", "offset", torch.float32, cpu)
