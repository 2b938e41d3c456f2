"""data/picture.py: bars as long as their numbers on one scale, nothing crossed, nothing lost or
unescaped, one clear line for what is no report.

    python -m pytest -q tests/test_picture.py
"""
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from data.picture import BAR, STEP, WIDTH, panels, picture, read_report
from data.svg import DENSE, HEALED, HURT, Drawing, Scale

ROOT = Path(__file__).resolve().parents[1]
SVG = "{http://www.w3.org/2000/svg}"
ROWS = {"dense": 30.0, "compressed": 48.0, "compressed + initial prompt": 50.0,
        "compressed + learned prompt": 32.5,
        "dense + initial prompt": 29.0, "dense + learned prompt": 22.0}
SETTINGS = {"model": "models/a<b&c", "bits": 4, "sparsity": "0.5", "data": "wiki.test.raw",
            "seqlen": 512, "seed": 0,
            "steps": 200, "prompt_tokens": 100}


def report(rows=ROWS, **settings):
    return {"rows": [{"name": n, "perplexity": p} for n, p in rows.items()],
            "settings": {**SETTINGS, **settings}}


class Drawn:
    """The parts of a picture, as numbers."""

    def __init__(self, *reports):
        root = ET.fromstring(picture(list(reports)))
        self.height = float(root.get("height"))
        self.texts = [(float(t.get("x")), float(t.get("y")), t.text)
                      for t in root.findall(f"{SVG}text")]
        self.bars = [(float(r.get("x")), float(r.get("y")), float(r.get("width")), r.get("fill"))
                     for r in root.findall(f"{SVG}rect")]
        self.lines = [tuple(float(line.get(k)) for k in ("x1", "y1", "y2"))
                      for line in root.findall(f"{SVG}line")]
        self.words = [text for _, _, text in self.texts]

    def value(self, bar):
        """The number behind a bar."""
        x, y, width, _ = bar
        [number] = [text for tx, ty, text in self.texts if abs(tx - x - width - 6) < 0.2
                    and 0 < ty - y < BAR]
        return float(number)


def test_all_bars_have_one_scale_and_stay_inside():
    drawn = Drawn(report(), report({"dense": 80.0, "compressed": 100.0}, model="other"),
                  report({"dense": 9.0}, model="third"))
    scales = [width / drawn.value((x, y, width, c)) for x, y, width, c in drawn.bars]
    assert len(drawn.bars) == 9
    assert max(scales) == pytest.approx(min(scales), rel=2e-3)
    assert all(x + width + 30 < WIDTH for x, _, width, _ in drawn.bars)
    columns = sorted({x for x, *_ in drawn.bars})
    assert all(x + width + 30 < columns[1] for x, _, width, _ in drawn.bars if x == columns[0])


def test_the_control_stands_beside_the_claim():
    drawn = Drawn(report())
    of = {drawn.value(bar): bar for bar in drawn.bars}
    assert set(of) == set(ROWS.values())
    for claim, control in ((48.0, 30.0), (50.0, 29.0), (32.5, 22.0)):
        assert of[claim][1] == of[control][1]
        assert of[claim][0] < of[control][0]
    assert [of[v][3] for v in (48.0, 50.0, 32.5, 30.0, 29.0,
                               22.0)] == [HURT, HURT, HEALED, DENSE, DENSE, HEALED]


@pytest.mark.parametrize("dense", [20.0, 30.0, 47.0, 49.9])
def test_the_mark_of_the_dense_model_crosses_nothing(dense):
    drawn = Drawn(report({**ROWS, "dense": dense}))
    columns = sorted({x for x, *_ in drawn.bars})
    longest = max(drawn.bars, key=lambda bar: bar[2])
    scale = longest[2] / 50.0
    marks = [line for line in drawn.lines if line[0] > columns[0]]
    wanted = [left + dense * scale for left in columns]
    assert sorted({x for x, _, _ in marks}) == pytest.approx(wanted, abs=0.15)
    for x, low, high in drawn.lines:
        assert high - low < STEP - BAR
        for left, y, width, _ in drawn.bars:
            assert high <= y or low >= y + BAR or x < left or x > left + width + 40
        for tx, ty, text in drawn.texts:  # a text reaches from 11 above its baseline to 4 below
            assert high < ty - 11 or low > ty + 4 or x < tx or x > tx + 8 * len(text)


def test_what_it_means_is_written_in_it():
    words = Drawn(report()).words
    assert "lower is better" in words[0]
    assert "one scale" in words[0]
    assert "dense model without a prompt" in words[1]
    assert "a<b&c" in words
    packed = report(model="x/compressed", dense="models/a-dense-one", packed=True)
    assert {"a-dense-one", "compressed"} <= set(Drawn(packed).words)
    assert len(panels([packed, report(model="models/a-dense-one")])) == 1
    assert "compressed: 50% pruned + 4-bit" in words
    assert "dense: the control" in words
    assert ("perplexity on wiki.test.raw, windows of 512, 100 prompt tokens, 200 steps, seed 0"
            in words)
    assert {f"{p:.1f}" for p in ROWS.values()} <= set(words)
    words = Drawn(report(sparsity="2:4", bits=16, steps=0)).words
    assert "compressed: 2:4 pruned" in words
    assert not any("steps" in word for word in words)


def test_runs_on_the_same_windows_share_a_panel():
    dense = {name: value for name, value in ROWS.items() if name.startswith("dense")}
    rest = {name: value for name, value in ROWS.items() if name not in dense or name == "dense"}
    both = picture([report(rest), report(dense, bits=16, sparsity="0")])
    assert both == picture([report({**rest, **dense})])
    assert Drawn(report(), report(data="other")).height > Drawn(report()).height


def test_each_way_of_compressing_has_a_column():
    """And two reports that say unlike of one bar are not mixed."""
    one = report({"dense": 30.0, "compressed": 48.0})
    two = {"dense": 30.0, "compressed": 60.0, "compressed + learned prompt": 40.0}
    drawn = Drawn(one, report(two, sparsity="2:4"))
    at = {drawn.value(bar): bar[0] for bar in drawn.bars}
    assert len(set(at.values())) == 3
    assert at[60.0] == at[40.0] != at[48.0]
    assert {"50% pruned + 4-bit", "2:4 pruned + 4-bit"} <= set(drawn.words)
    with pytest.raises(ValueError, match="no prompt: 48.00 in one report .* 60.00 in another"):
        picture([one, report(two)])


def test_prompts_that_were_learned_unlike_are_not_mixed():
    """One line says how, over all bars of a panel; and what it says of KL."""
    other = {"dense": 30.0, "compressed": 60.0, "compressed + learned prompt": 40.0}
    for changed in ({"steps": 1}, {"kind": "prefix"}, {"objective": "kl"}, {"seed": 5}):
        with pytest.raises(ValueError, match="prompts learned unlike in reports of a<b&c"):
            picture([report(), report(other, sparsity="2:4", **changed)])
    assert any("200 steps of KL" in word for word in Drawn(report(objective="kl")).words)
    alone = {"compressed": 48.0, "compressed + learned prompt": 32.5}
    drawn = Drawn(report(alone, model="runs/mine/compressed", packed=True))
    assert "mine" in drawn.words and "compressed" in drawn.words


def test_names_of_what_was_not_pruned_say_nothing_of_pruning():
    assert "compressed: 4-bit" in Drawn(report(sparsity="0.0")).words


@pytest.mark.parametrize("low, high", [(21, 48), (6.9, 7.1), (31, 33), (20, 20000), (0.5, 8000),
                                       (1, 9), (-0.3, 0.2), (3, 1e9)])
def test_a_scale_has_a_few_round_marks(low, high):
    found = Scale([low, high], 0, 100, low > 0).ticks()
    assert 2 <= len(found) <= 6
    assert sorted(set(found)) == found
    alike = Scale([8000.0, 8000.0], 0, 100, True)
    assert alike.place(8000.0) == pytest.approx(50)


def test_a_heal_has_a_column_of_its_own():
    drawn = Drawn(report({**ROWS, "healed": 40.0, "healed + learned prompt": 25.0}))
    assert len({x for x, *_ in drawn.bars}) == 3
    assert drawn.words.count("prompt, learned") == 1


def test_drawing_escapes_and_places():
    d = Drawing()
    d.text(1, 2, "a<b", kind="bold", anchor="end")
    d.dot(3, 4, 2, HURT)
    d.line(0, 0, 5, 5, dashed=True)
    root = ET.fromstring(d.svg(10, 20, "x & y"))
    assert root.find(f"{SVG}text").text == "a<b"
    assert root.find(f"{SVG}title").text == "x & y"
    assert root.find(f"{SVG}circle").get("fill") == HURT
    assert root.find(f"{SVG}line").get("stroke-dasharray")


def test_program(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(report()))
    run = [sys.executable, "-S", "-m", "data.picture"]  # -S: without installed packages
    drawn = subprocess.run([*run, str(tmp_path / "report.json")], cwd=ROOT, capture_output=True,
                           text=True, check=True)
    assert drawn.stdout == picture([report()])
    wrong = subprocess.run([*run, str(tmp_path / "none.json")], cwd=ROOT, capture_output=True,
                           text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: no report")
    assert wrong.stderr.count("\n") == 1


@pytest.mark.parametrize("content", [
    "", "[]", "{}", '{"rows": [], "settings": {"model": "m"}}',
    '{"rows": [{"name": "dense"}], "settings": {"model": "m"}}',
    '{"rows": [{"name": "dense", "perplexity": 3}]}',
    '{"rows": [{"name": "dense", "perplexity": NaN}], "settings": {"model": "m"}}'])
def test_not_a_report(tmp_path, content):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ValueError, match="not a report of train.py"):
        read_report(tmp_path / "report.json")
