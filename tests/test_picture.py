"""data/picture.py: bars as long as their numbers, nothing lost or unescaped, one clear line for what is no report."""
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from data.picture import DENSE, HEALED, HURT, END, NAMES, WIDTH, picture, read_report

ROOT, SVG = Path(__file__).resolve().parents[1], "{http://www.w3.org/2000/svg}"
ROWS = {"dense": 30.0, "compressed": 48.0, "compressed + initial prompt": 50.0, "compressed + learned prompt": 32.5,
        "dense + learned prompt": 22.0}
SETTINGS = {"model": "models/a<b&c", "bits": 4, "sparsity": "0.5", "data": "wiki.test.raw", "seqlen": 512, "seed": 0,
            "steps": 200, "prompt_tokens": 100}


def report(**settings):
    return {"rows": [{"name": n, "perplexity": p} for n, p in ROWS.items()], "settings": {**SETTINGS, **settings}}


def test_bars_are_proportional_and_inside():
    root = ET.fromstring(picture([report()]))
    bars = root.findall(f"{SVG}rect")
    widths = [float(bar.get("width")) for bar in bars]
    assert [bar.get("fill") for bar in bars] == [DENSE, HURT, HURT, HEALED, HEALED]
    for width, value in zip(widths, ROWS.values()):
        assert width == pytest.approx(value / max(ROWS.values()) * (END - NAMES), abs=0.06)
    line = root.find(f"{SVG}line")
    assert float(line.get("x1")) == pytest.approx(NAMES + widths[0], abs=0.2)
    assert all(NAMES <= float(bar.get("x")) and float(bar.get("x")) + w < WIDTH for bar, w in zip(bars, widths))


def test_every_row_and_setting_is_written():
    texts = [t.text for t in ET.fromstring(picture([report()])).findall(f"{SVG}text")]
    assert texts[0] == "a<b&c, 50% pruned + 4-bit"
    assert texts[1] == "perplexity on wiki.test.raw, windows of 512, 100 prompt tokens, 200 steps, seed 0"
    assert set(ROWS) <= set(texts) and {f"{p:.1f}" for p in ROWS.values()} <= set(texts)
    title = ET.fromstring(picture([report(sparsity="2:4", bits=16, steps=0)])).findall(f"{SVG}text")
    assert title[0].text == "a<b&c, 2:4 pruned" and "steps" not in title[1].text
    assert "not compressed" in picture([report(sparsity="0", bits=16)])


def test_panels_below_each_other():
    one, two = (ET.fromstring(picture([report(seed=i) for i in range(n)])) for n in (1, 2))
    assert float(two.get("height")) == 2 * float(one.get("height"))
    ys = [float(bar.get("y")) for bar in two.findall(f"{SVG}rect")]
    assert ys == sorted(ys) and len(set(ys)) == 10


def test_program(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(report()))
    run = [sys.executable, "-S", "-m", "data.picture"]                    # -S: without installed packages
    drawn = subprocess.run([*run, str(tmp_path / "report.json")], cwd=ROOT, capture_output=True, text=True, check=True)
    assert drawn.stdout == picture([report()])
    wrong = subprocess.run([*run, str(tmp_path / "none.json")], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 1 and wrong.stderr.startswith("error: no report") and wrong.stderr.count("\n") == 1


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"rows": [], "settings": {"model": "m"}}',
                                     '{"rows": [{"name": "dense"}], "settings": {"model": "m"}}',
                                     '{"rows": [{"name": "dense", "perplexity": 3}]}'])
def test_not_a_report(tmp_path, content):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ValueError, match="not a report of train.py"):
        read_report(tmp_path / "report.json")
