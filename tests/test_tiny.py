"""The two tiny checkpoints that ship: their size, their logits against transformers, what they have
learned.

    python -m pytest -q tests/test_tiny.py
"""
import json
import math
from pathlib import Path

import pytest
import torch

from data.config import read_config
from data.tiny.pretrain import CONFIGS, bits_per_byte, export, loss_of, initialize
from data.tokenizer import load_tokenizer
from eval import generate
from model import META, Transformer, half_split, load_model, published_name
from prompt import mean_loss

TINY = Path(__file__).resolve().parents[1] / "data" / "tiny"
WEIGHTS = {"llama": "consolidated.00.pth", "opt": "model.safetensors"}
TEXT = ("Return a copy of the array in one dimension.\n\n"
        "Parameters\n----------\norder : {'C', 'F'}, optional\n")
# Meta's names of a block's tensors behind transformers' own, written by hand.
META_NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(params=["llama", "opt"])
def name(request):
    if not (TINY / request.param / WEIGHTS[request.param]).exists():
        pytest.skip(f"data/tiny/{request.param} has no weights: "
                    "write them with data/tiny/pretrain.py")
    return request.param


def test_sizes(name):
    model = load_model(TINY / name)
    assert 3e6 < sum(p.numel() for p in model.parameters()) < 8e6
    assert sum(f.stat().st_size for f in (TINY / name).iterdir()) < 16e6
    assert model.config == CONFIGS[name]
    assert load_tokenizer(TINY / name).vocab_size == model.config.vocab_size


def test_logits_match_transformers(name):
    """Weights go to transformers by hand-written names, not by model.py's tables; largest
    difference 1e-4 in fp32."""
    transformers = pytest.importorskip("transformers")
    c = read_config(TINY / name)
    if name == "opt":
        theirs = transformers.OPTForCausalLM.from_pretrained(TINY / name, dtype=torch.float32)
    else:
        raw = torch.load(TINY / name / WEIGHTS[name], weights_only=True)
        p = json.loads((TINY / name / "params.json").read_text())
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=p["vocab_size"],
            hidden_size=p["dim"],
            intermediate_size=len(raw["layers.0.feed_forward.w1.weight"]),
            num_hidden_layers=p["n_layers"],
            num_attention_heads=p["n_heads"],
            num_key_value_heads=p["n_kv_heads"],
            rms_norm_eps=p["norm_eps"],
            max_position_embeddings=p["max_seq_len"],
            tie_word_embeddings=False,
        ))
        state = {
            "model.embed_tokens.weight": raw["tok_embeddings.weight"],
            "model.norm.weight": raw["norm.weight"],
            "lm_head.weight": raw["output.weight"],
        }
        for i in range(p["n_layers"]):
            for hf, meta in META_NAMES.items():
                w = raw[f"layers.{i}.{meta}.weight"]
                if meta in ("attention.wq", "attention.wk"):
                    d = p["dim"] // p["n_heads"]
                    halves = [*range(0, d, 2), *range(1, d, 2)]
                    order = [head + j for head in range(0, len(w), d) for j in halves]
                    w = w[order]        # channels (2i, 2i + 1) go to (i, i + half)
                state[f"model.layers.{i}.{hf}.weight"] = w
        theirs.load_state_dict({k: w.float() for k, w in state.items()})
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, c.vocab_size, (2, 100), generator=g)
    ids = load_tokenizer(TINY / name).encode(TEXT)
    tokens[0, :60] = torch.tensor((ids * 3)[:60])
    with torch.no_grad():
        ours = load_model(TINY / name)(tokens)
        difference = (ours - theirs.eval()(tokens).logits).abs().max()
    assert difference < 1e-4, difference


def test_tokenizers_match_transformers(name):
    t = load_tokenizer(TINY / name)
    texts = [TEXT, "def f(x=10, *a):\n    return x ** 2  # naïve ½ ☃\n\n\n", "  two"]
    for text in texts:
        assert t.decode(t.encode(text)) == text
    assert t.encode("a")[0] == {"llama": 1, "opt": 2}[name]
    assert t.eos_id == 2
    if name == "opt":
        transformers = pytest.importorskip("transformers")
        theirs = transformers.GPT2Tokenizer.from_pretrained(TINY / name, bos_token="</s>",
                                                            eos_token="</s>")
        for text in texts:
            ids = theirs(text, add_special_tokens=False)["input_ids"]
            assert t.encode(text, bos=False) == ids


def test_has_learned_documentation(name):
    """Far better on text of the test split than a guess without the context (about 3 bits per
    byte)."""
    from data.harvest import harvest
    model = load_model(TINY / name)
    t = load_tokenizer(TINY / name)
    text = "\n".join(harvest("docstrings", "test"))[:40_000]
    ids = torch.tensor(t.encode(text))
    stream = [(ids, len(text.encode()) / len(ids))]
    assert bits_per_byte(model, stream, windows=4)[0] < 1.9


def test_loss_log(name):
    lines = (TINY / name / "loss.csv").read_text().splitlines()
    assert lines[0] == "step,tokens,train_loss,docs,docstrings,code,cpu_seconds"
    first, last = (list(map(float, line.split(","))) for line in (lines[1], lines[-1]))
    assert last[2] < first[2]                                       # of training
    assert all(b < a for a, b in zip(first[3:6], last[3:6]))        # of each text


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_export_round_trip(family, tmp_path):
    """What export writes loads as the trained model, and its rotary channels are Meta's interleaved
    pairs."""
    torch.manual_seed(0)
    model = Transformer(CONFIGS[family])
    initialize(model)
    torch.save({"model": model.state_dict()}, tmp_path / "checkpoint.pt")
    (tmp_path / "loss.csv").write_text("")
    export(family, tmp_path, tmp_path / "out")
    loaded = load_model(tmp_path / "out")
    assert loaded.config == CONFIGS[family]
    for (n, a), b in zip(model.named_parameters(), loaded.parameters()):
        assert torch.equal(a.half().float(), b), n
    if family == "llama":
        raw = torch.load(tmp_path / "out" / "consolidated.00.pth", weights_only=True)
        assert set(raw) == {published_name(n, META) for n, _ in model.named_parameters()}
        query = half_split(raw["layers.0.attention.wq.weight"], CONFIGS[family].n_head)
        assert torch.equal(query.float(), loaded.blocks[0].attn.q.weight)


def test_loss_is_that_of_the_model():
    torch.manual_seed(0)
    model = Transformer(CONFIGS["opt"])
    initialize(model)
    windows = torch.randint(0, CONFIGS["opt"].vocab_size, (2, 33))
    loss = loss_of(model, windows).item()
    nll = mean_loss(model, None, windows)
    assert abs(loss - math.log(CONFIGS["opt"].vocab_size)) < 0.2
    assert abs(loss - nll) < 0.02


GREEDY = {
    "llama": ", name, value) -> None:\n    def __init__(self, name, value) -> None:\n",
    "opt": ", *args, **kwargs):\n    return (\n        self.args,\n        self.args,\n",
}


def test_greedy_continuation_letter_by_letter(name):
    model = load_model(TINY / name)
    tokenizer = load_tokenizer(TINY / name)
    pieces = generate(model, tokenizer, ["def __init__(self"], 32)
    made = "".join(piece for _, piece in pieces)
    assert made.startswith(GREEDY[name])
