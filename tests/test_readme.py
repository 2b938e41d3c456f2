"""README.md's snippets of "Take a module home" run as they stand, one after the other, on small layers and models.

    python -m pytest -q tests/test_readme.py
"""
import re
from pathlib import Path

import pytest
import torch
import torch.nn as nn

from data.config import SHIPPED
from test_prompt import TOKENS, Foreign, tiny

ROOT = Path(__file__).resolve().parents[1]
needs_tiny = pytest.mark.skipif(not (SHIPPED["tiny-opt"] / "vocab.json").exists(), reason="data/tiny holds no trained checkpoints")


def snippets() -> list[str]:
    """The indented blocks of the section."""
    section = (ROOT / "README.md").read_text().split("## Take a module home")[1].split("\n## ")[0]
    blocks = re.findall(r"(?:^    .*\n)+", section, re.M)
    return [re.sub(r"^    ", "", block, flags=re.M) for block in blocks]


@needs_tiny
def test_snippets_run_as_pasted():
    found = snippets()
    assert len(found) == 4
    layer = nn.Linear(64, 32)
    dense = layer.weight.data.clone()
    inputs = torch.randn(256, 64)
    solver = {"layer": layer, "inputs": inputs}
    exec(found[0], solver)
    assert int((layer.weight == 0).sum()) == 32 * 32 and not torch.equal(layer.weight, dense)
    exec(found[1], solver)
    y = solver["layer"](inputs)
    assert torch.allclose(y, nn.functional.linear(inputs, layer.weight, layer.bias), atol=1e-2)

    for model in (tiny(), Foreign(tiny())):
        windows = TOKENS[:64].view(4, 16)
        prompts = {"model": model, "some_tokens": TOKENS.repeat(2), "train_windows": windows, "val_windows": windows[:1], "tokens": windows}
        exec(found[2].replace("steps=200", "steps=2").replace("model, 100,", "model, 7,"), prompts)
        assert len(prompts["prompt"]) == 7 and prompts["logits"].shape[0] == 4

    loaded = {}
    exec(found[3].replace("checkpoints/opt-125m", str(SHIPPED["tiny-opt"])), loaded)
    assert loaded["logits"].shape[-1] == loaded["model"].config.vocab_size
