"""study.py: intervals and tests by hand, all studies on a small run, nothing computed twice,
pictures without collisions.

    python -m pytest -q tests/test_study.py
"""
import json
import math
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

import study
import train
from data.checkpoint import read_json
from data.svg import dot_plot
from eval import perplexity
from model import load_model
from prompt import as_prefix, load_prompt, text_loss
from study import corrupted, made_items, mcnemar, ppl, spread

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "--seqlen", "32",
    "--max-tokens", "768",
    "--steps", "4",
    "--prompt-tokens", "6",
    "--batch-size", "4",
    "--val-windows", "2",
    "--device", "cpu",
    "--dtype", "float32",
    "--fused", "off",
]
FILES = ("md", "json", "svg")
TURNED = "turned right, turned wrong, p"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Runs a and b of train.py, of two sparsities, and two texts."""
    place = tmp_path_factory.mktemp("study")
    sources = sorted(ROOT.glob("*.py"))
    one, two = place / "one.txt", place / "two.txt"
    one.write_text("\n\n".join(p.read_text() for p in sources[::2]))
    two.write_text("\n\n".join(p.read_text() for p in sources[1::2]))
    for name, flags in (("a", ["--control"]), ("b", ["--no-control", "--sparsity", "2:4"])):
        asked = [
            "--recipe", "plain",
            "--heal", "0",
            "--nsamples", "4",
            "--calib", one,
            "--data", two,
            "--train-data", one,
            *SMALL,
            *flags,
            "--out", place / name,
        ]
        train.main(train.flags().parse_args(list(map(str, asked))))
    return place


def run(place, *words, out="out"):
    args = study.flags().parse_args([*map(str, words), "--out", str(place / out)])
    study.main(args)
    return {end: (place / out / f"{words[0]}.{end}").read_text() for end in FILES}


def computed_again(*_, **__):
    """Stands where something is computed that is known already."""
    pytest.fail("computed again")


def test_the_interval_is_that_of_the_mean():
    """Against the normal approximation for many draws; a difference that is the same everywhere has
    no width."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(400, generator=g).double() * 3 + 5
    mean, low, high = spread(x)
    half = 1.96 * float(x.std()) / 20
    assert mean == pytest.approx(float(x.mean()))
    assert abs(mean - low - half) < 0.1 * half
    assert abs(high - mean - half) < 0.1 * half
    assert spread((x + 0.25) - x) == pytest.approx([0.25] * 3)
    assert ppl(torch.full((7,), 2.0).double()) == pytest.approx([math.exp(2)] * 3)
    assert study.change(x + 1, x).startswith("+1.000 [")
    assert study.change(x + 1, x).endswith("*")
    assert not study.change(x.roll(1), x).endswith("*")


def test_mcnemar_by_hand():
    base = torch.tensor([0, 0, 0, 0, 0, 1, 1, 0.])
    all_right = torch.tensor([1, 1, 1, 1, 1, 1, 1, 0.])
    some_right = torch.tensor([1, 1, 1, 0, 0, 0, 1, 0.])
    assert mcnemar(all_right, base) == (5, 0, 2 / 32)
    assert mcnemar(some_right, base) == (3, 1, 10 / 16)
    assert mcnemar(base, base) == (0, 0, 1.0)


@pytest.mark.parametrize("text, parts", [
    ("c4", ["c4"]),
    ("c4:wikitext2", ["c4", "wikitext2"]),
    ("a.txt:/p/b.txt", ["a.txt", "/p/b.txt"]),
    (r"C:\x\a.txt", [r"C:\x\a.txt"]),
    (r"C:\a.txt:D:\b.txt", [r"C:\a.txt", r"D:\b.txt"]),
    ("C:/a.txt:D:/b.txt", ["C:/a.txt", "D:/b.txt"]),
])
def test_a_drives_colon_parts_no_texts(text, parts):
    assert study.COLON.split(text, maxsplit=1) == parts


def test_damaged_text():
    text = "The river rises in the hills,\n\n a long way from the sea. " * 40
    for how in ("typos", "swapped"):
        got = corrupted(text, how)
        assert got != text
        assert sorted(got) == sorted(text)
        assert got == corrupted(text, how)
    pairs = zip(corrupted(text, "typos").split(), text.split(), strict=True)
    moved = [a != b for a, b in pairs]
    assert 0.02 < sum(moved) / len(moved) < 0.15              # short words stay as they are
    assert sorted(corrupted(text, "swapped").split()) == sorted(text.split())
    left = len(corrupted(text, "dropped").split()) / len(text.split())
    assert 0.8 < left < 0.97
    assert corrupted("Ab c", "upper case") == "AB C"
    assert corrupted("Ab C", "lower case") == "ab c"
    assert corrupted(text, "typos", 0.0) == text
    assert corrupted("", "typos") == ""


def test_items_made_of_a_text():
    words = [f"w{i}" for i in range(400)]
    items = made_items("  ".join(words), 5)
    assert len(items) == 5
    assert len({item.gold for item in items}) > 1
    for k, item in enumerate(items):
        context, choice = item.pairs[item.gold]
        start = 48 * k
        assert context.split() == words[start:start + 40]
        assert choice.split() == words[start + 40:start + 48]
        assert len({c for _, c in item.pairs}) == 4
        assert item.lengths[item.gold] == len(choice) - 1
    with pytest.raises(ValueError, match="90 words make no items"):
        made_items("word " * 90, 5)


def test_levels_by_hand_and_nothing_is_computed_twice(place, monkeypatch, capsys):
    got = run(place, "levels", place / "a", place / "b")
    table = read_json(place / "out/levels.json")["tables"][0]
    rows = {row["row"]: row for row in table["rows"]}
    pruned = "50% pruned + 4-bit, plain"
    assert list(rows) == ["2:4 pruned + 4-bit, plain", pruned, "dense"]     # by real bits
    case = study.Case(str(place / "a"), None)
    cases = [
        (pruned, place / "a/compressed", "prompt"),
        ("dense", "tiny-llama", "prompt-dense"),
    ]
    for row, folder, file in cases:
        model = load_model(folder, packed=False)
        learned = load_prompt(place / f"a/{file}.safetensors")[0]
        for name, prompt in (("no prompt", None), ("learned", learned)):
            want, _ = perplexity(model, case.measured(), 32, prompt)
            value, low, high = rows[row]["perplexity"][name]
            assert value == pytest.approx(want, rel=1e-5)
            assert low < value < high
    report = {r["name"]: r for r in read_json(place / "a/report.json")["rows"]}
    assert rows[pruned]["bits"] == report["compressed"]["linear_bits_per_weight"]
    at_start = report["compressed + initial prompt"]["perplexity"]
    assert rows[pruned]["perplexity"]["start"][0] == pytest.approx(at_start, rel=1e-5)
    assert "Worth its bytes without a prompt" in capsys.readouterr().out
    for name in ("text_loss", "zero_shot", "Run"):
        monkeypatch.setattr(study, name, computed_again)
    assert run(place, "levels", place / "a", place / "b") == got


@pytest.mark.parametrize("words, marks", [
    (["recipes", "a"], ["embedding, next", "gap with prompts"]),
    (["transfer", "a", "b", "--texts", "{one}:{two},{two}:{one}"],
     ["Texts", "Types", "2:4 pruned"]),
    (["length", "a", "--lengths", "3,6"], ["decode, ms a token"]),
    (["hard", "a", "--limit", "9"],
     ["negated", "turned right, wrong", "Greedy continuations"]),
    (["robust", "a"], ["typos", "dense + learned", "shuffled text"]),
    (["tasks", "a", "--limit", "9"], ["continue two.txt, ", "dense + learned"]),
])
def test_every_study_ends_and_again_in_no_time(words, marks, place, monkeypatch):
    texts = {"one": place / "one.txt", "two": place / "two.txt"}
    words = [str(place / w) if w in ("a", "b") else w.format(**texts) for w in words]
    got = run(place, *words)
    for mark in [*marks, "commit", "seed 0", "seqlen 32"]:
        assert mark in got["md"]
    ET.fromstring(got["svg"])
    for name in ("text_loss", "zero_shot", "Run", "generate", "seconds"):
        monkeypatch.setattr(study, name, computed_again)
    assert run(place, *words) == got


# Nats a token of a model, and what each position of its learned prompt takes off.
LOSS = {"a dense": 1.0, "a compressed": 3.0, "b dense": 1.0, "b compressed": 4.0}
GAIN = {"a dense": 0.125, "a compressed": 0.25, "b compressed": 0.5}


def test_every_table_of_known_losses_by_hand(place, monkeypatch):
    """A loss is that of the model without the sum of the prompt's first column. Of nine items, each
    nat of loss takes two."""
    model = load_model(place / "a/compressed")
    width = model.config.d_model

    def losses(lab, case, which, prompt, tokens):
        gain = 0.0 if prompt is None else float(prompt[:, 0].sum())
        windows = torch.tensor([-1.0, 0.0, 1.0]).double()
        return windows + LOSS[f"{case.folder.name} {which}"] - gain

    def answers(lab, case, which, prompt, items, task):
        loss = float(losses(lab, case, which, prompt, None).mean())
        return (torch.arange(9) < 9 - 2 * loss).double()

    def learned(lab, case, which, text=None, n=None):
        gain = GAIN[f"{case.folder.name} {which}"]
        gain *= 2 if str(text).endswith("two.txt") else 1
        return torch.full((n or case.n, width), gain)

    def start(lab, case, which, n=None):
        return torch.full((n or case.n, width), -0.125)

    def words(*_, **__):
        return torch.full((4, width), -0.25)

    for known in (losses, answers, learned, start, words):
        monkeypatch.setattr(study.Lab, known.__name__, known)
    monkeypatch.setattr(study, "generate", lambda *_, **__: iter(()))

    (place / "known").mkdir()                               # else the first loss kept makes it

    def table(*words, number=0):
        tables = json.loads(run(place, *words, out="known")["json"])["tables"]
        return {row["row"]: row for row in tables[number]["rows"]}
    a, b, one, two = (place / name for name in ("a", "b", "one.txt", "two.txt"))

    table("levels", a)
    for shift in ("-0.750 [-0.750, -0.750] *", "-1.500 [-1.500, -1.500] *"):
        assert f"| {shift} |" in (place / "known/levels.md").read_text()

    row = table("recipes", a, "--texts", two)["embedding, next"]
    assert row["gap_without"] == pytest.approx([3 - 1] * 3)
    assert row["gap_with"] == pytest.approx([1.5 - 0.25] * 3)
    assert row["healed"] == pytest.approx([2 - 1.25] * 3)
    assert row["recovered"] == pytest.approx(100 * 1.5 / 2)
    assert "| +0.750 [+0.750, +0.750] * |" in (place / "known/recipes.md").read_text()

    asked = ("transfer", a, b, "--texts", f"{one}:{two},{two}:{one}")
    for number, wanted in enumerate([{"one": -1.5, "two": -3.0},
                                     {"50% pruned + 4-bit, plain": -1.5,
                                      "2:4 pruned + 4-bit, plain": -3.0}]):
        rows = table(*asked, number=number)
        assert {name: row["cells"] for name, row in rows.items()} == {
            name: dict.fromkeys(wanted, pytest.approx([change] * 3))
            for name, change in wanted.items()}

    rows = table("length", a, "--lengths", 3)
    for n, wanted in (("0", [3, 3, 1]), ("3", [3.375, 2.25, 0.625])):  # start, learned, dense
        values = [value for value, _, _ in rows[n]["perplexity"]]
        assert values == pytest.approx([math.exp(loss) for loss in wanted])
    assert rows["0"]["bytes"] == 0
    assert rows["3"]["bytes"] == as_prefix(model, torch.zeros(3, width)).nbytes

    turned = {"no prompt": (0, 0), "negated": (0, 2), "learned": (3, 0)}
    change = {"no prompt": (0, 0), "negated": (1, 1), "learned": (-1.5, -0.75)}
    rows = table("hard", a)
    for name in turned:
        numbers = rows[name]["numbers"]
        for which, nats in zip(("compressed", "dense"), change[name]):
            assert numbers[which]["change"] == pytest.approx([nats] * 3)
        assert tuple(numbers["continue two.txt"][TURNED][:2]) == turned[name]

    rows = {name: row["tasks"]["continue two.txt"] for name, row in table("tasks", a).items()}
    for name, right, turned in (
        ("dense", 7, (4, 0)),
        ("compressed", 3, (0, 0)),
        ("+ start", 2, (0, 1)),
        ("+ learned", 6, (3, 0)),
        ("dense + learned", 9, (6, 0)),
    ):
        assert rows[name]["acc"][0] == pytest.approx(right / 9)
        assert tuple(rows[name][TURNED][:2]) == turned


def test_every_flag_does_something(place, tmp_path):
    """What each flag changes in the tables; a flag without an entry fails."""
    for name, gold in (("d", 0), ("e", 1)):
        (tmp_path / name).mkdir()
        rows = []
        for i in range(4):
            row = {"goal": f"{i} apples", "sol1": "hello there", "sol2": "shell", "label": gold}
            rows.append(json.dumps(row) + "\n")
        (tmp_path / name / "piqa.jsonl").write_text("".join(rows))
    one, two = place / "one.txt", place / "two.txt"
    piqa = "tasks RUN --tasks piqa --data-dir"
    entries = {
        "tasks": ("tasks RUN --limit 3", f"{piqa} {tmp_path / 'd'}"),
        "data_dir": (f"{piqa} {tmp_path / 'd'}", f"{piqa} {tmp_path / 'e'}"),
        "limit": ("tasks RUN --limit 3", "tasks RUN --limit 4"),
        "lengths": ("length RUN --lengths 3", "length RUN --lengths 4"),
        "texts": (f"robust RUN --texts {one}", f"robust RUN --texts {two}"),
        "study": ("robust RUN", "levels RUN"),
        "runs": ("levels RUN", f"levels {place / 'b'}"),
    }
    known = {action.dest for action in study.flags()._actions}
    assert set(entries) == known - {"help", "out"}            # `run` gives --out
    for name, commands in entries.items():
        tables = []
        for command in commands:
            words = command.replace("RUN", str(place / "a")).split()
            made = run(place, *words)
            tables.append(json.loads(made["json"])["tables"])
        assert tables[0] != tables[1], name


def test_what_cannot_be_one_table_is_refused(place, tmp_path):
    """Runs on unlike texts are not ranked, twins are not one row, and no text is learned and
    measured at once."""
    a, b = place / "a", place / "b"
    other = tmp_path / "other"
    shutil.copytree(a, other)
    report = read_json(other / "report.json")
    report["settings"]["seqlen"] = 16
    (other / "report.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match="a has --seqlen 32, other 16"):
        run(place, "levels", a, other)
    with pytest.raises(ValueError, match="a has --seqlen 32, other 16"):
        run(place, "transfer", a, other, "--texts", f"{place / 'one.txt'}:{place / 'two.txt'}")
    with pytest.raises(ValueError, match="two.txt is a file, which has no splits"):
        run(place, "transfer", a, b, "--texts", place / "two.txt")


def test_twins_are_told_apart_by_their_folders(place, tmp_path):
    """Runs of one label, here of two seeds; of equal bits, the better one is worth its bytes."""
    twin = tmp_path / "twin"
    shutil.copytree(place / "a", twin)
    got = run(place, "recipes", place / "a", twin, out="twins")
    names = list(dict.fromkeys(row["row"] for row in json.loads(got["json"])["tables"][0]["rows"]))
    assert names == ["embedding, next, a", "embedding, next, twin"]


def test_what_is_worth_its_bytes_where_bits_are_equal(place, tmp_path, monkeypatch):
    twin = tmp_path / "twin"
    shutil.copytree(place / "a", twin)

    def losses(lab, case, which, prompt, tokens):
        better = which == "compressed" and case.folder.name == "twin"
        return torch.full((4,), 2.0 if better else 3.0).double()
    monkeypatch.setattr(study.Lab, "losses", losses)
    (place / "front").mkdir()
    says = run(place, "levels", place / "a", twin, out="front")["md"].split("Worth")[1]
    assert "twin" in says and ", a (" not in says


def test_a_prompt_is_learned_again_where_its_text_or_its_run_was_made_anew(place, tmp_path):
    """The text's name, and the run's settings, are what they were."""
    mine = tmp_path / "mine"
    shutil.copytree(place / "a", mine)
    text = tmp_path / "teach.txt"

    def changes() -> list:
        got = run(place, "transfer", mine, "--texts", f"{text}:{place / 'two.txt'}", out="anew")
        return [row["cells"] for row in json.loads(got["json"])["tables"][0]["rows"]]
    text.write_text((place / "one.txt").read_text())
    first = changes()
    assert changes() == first
    text.write_text((place / "two.txt").read_text())
    second = changes()
    assert second != first
    shutil.copytree(place / "b/compressed", mine / "compressed", dirs_exist_ok=True)
    assert changes() != second


def test_texts_are_looked_for_where_the_run_had_them(place, tmp_path):
    """Without --data-dir: a set that the run's own folder of texts holds."""
    mine = tmp_path / "mine"
    shutil.copytree(place / "a", mine)
    for split in ("train", "test"):
        shutil.copy(place / "one.txt", tmp_path / f"ptb.{split}.txt")
    report = read_json(mine / "report.json")
    report["settings"]["data_dir"] = str(tmp_path)
    (mine / "report.json").write_text(json.dumps(report))
    got = run(place, "transfer", mine, "--texts", f"ptb:{place / 'two.txt'}", out="there")
    assert [row["row"] for row in json.loads(got["json"])["tables"][0]["rows"]] == ["ptb"]


@pytest.mark.parametrize("missing", ["row", "model", "healed row"])
def test_a_run_that_has_not_ended_is_no_case(missing, place, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(place / "a", mine)
    report = read_json(mine / "report.json")
    if missing == "row":
        report["rows"] = [row for row in report["rows"] if row["name"] != "compressed"]
    if missing == "healed row":
        report["settings"]["heal"] = 6
    if missing == "model":
        (mine / "compressed/config.json").unlink()
    (mine / "report.json").write_text(json.dumps(report))
    for words in (("levels", mine), ("recipes", mine), ("length", mine)):
        with pytest.raises(ValueError, match="mine is not finished.* let the run end"):
            run(place, *words)


def test_damaged_text_is_measured_by_its_characters(place):
    """Whatever a tokenizer makes of it: losses of all scored tokens over all their characters."""
    run(place, "robust", place / "a")
    table = read_json(place / "out/robust.json")["tables"][0]
    case = study.Lab(study.flags().parse_args(["robust", str(place / "a")])).cases[0]
    text = case.tokenizer.decode(case.measured().tolist())
    ids = torch.tensor(case.tokenizer.encode(text.upper()))
    windows = ids[:len(ids) // 32 * 32].view(-1, 32)
    model = load_model(case.dense)
    losses = text_loss(model, None, windows).view(len(windows), -1).double().sum(1)
    characters = [len(case.tokenizer.decode(w[1:].tolist())) for w in windows]
    want = float((losses / torch.tensor(characters)).mean())
    row = next(row for row in table["rows"] if row["row"].endswith("upper case"))
    assert row["nats_a_character"]["dense"][0] == pytest.approx(want, rel=1e-5)


def test_folders_of_paths_are_not_told(place):
    told = run(place, "transfer", place / "a", place / "b",
               "--texts", f"{place / 'one.txt'}:{place / 'two.txt'}")["md"]
    assert "| one |" in told and str(place) not in told


def test_runs_are_taken_by_a_pattern_that_names_the_study_too(place):
    out = place / "among"
    for _ in range(2):                                  # the second time its folder is there
        study.main(study.flags().parse_args(
            ["recipes", str(place / "a"), str(out), "--out", str(out)]))


def test_a_study_lets_go_of_its_models_before_a_run_loads_its_own(place, tmp_path, monkeypatch):
    lab = study.Lab(study.flags().parse_args(["length", str(place / "a"), "--out", str(tmp_path)]))
    case = lab.cases[0]
    lab.model(case, "dense")
    held = []
    real = study.Run
    monkeypatch.setattr(study, "Run", lambda args: held.append(dict(lab.loaded)) or real(args))
    lab.learned(case, "dense", n=3)
    assert held == [{}]


def test_a_killed_study_goes_on(place, monkeypatch):
    want = run(place, "robust", place / "a")
    calls = []
    real = study.text_loss

    def counted(*args):
        calls.append(1)
        return real(*args)

    def dies(*args):
        calls.append(1)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as m:
        m.setattr(study, "text_loss", dies)
        with pytest.raises(KeyboardInterrupt):
            run(place, "robust", place / "a", out="killed")
    done = len(list((place / "killed/cache").glob("losses-*")))
    calls.clear()
    monkeypatch.setattr(study, "text_loss", counted)
    assert run(place, "robust", place / "a", out="killed")["json"] == want["json"]
    assert done == 4                                          # 6 batches each
    files = (place / "killed/cache").glob("losses-*")
    batches = sum(-(-len(read_json(f)["made"]) // 4) for f in files)
    assert len(calls) == batches - 6 * done


@pytest.mark.parametrize("words, message", [
    (["robust", "a", "--lengths", "3"], "--lengths does nothing in study robust"),
    (["hard", "a", "b"], "takes one RUN, not 2"),
    (["length", "a", "--lengths", "3,x"], "is not numbers"),
    (["length", "a", "--lengths", "3,481,5000"], "--lengths 481,5000: .* has room for 480"),
    (["levels", "nowhere"], "no report .*a RUN is a folder"),
    (["recipes", "a", "--texts", "x/one.txt,y/one.txt"], "two texts 'one'"),
])
def test_what_makes_no_study(words, message, place):
    folders = ("a", "b", "nowhere")
    words = [str(place / w) if w in folders else w for w in words]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(place, *words, out="refused")
    assert not (place / "refused").exists()


PLOTS = [
    ([("a", [[1.0, 0.5, 2.0], [3.0, 2.5, 900.0]]),
      ("b: 50% + 4-bit", [[20.0, 19, 21.0], [2e4, 1e4, 3e4]])], True),
    ([("a", [[-0.5, -0.6, -0.4]]), ("b", [[0.1, 0.0, 0.3]])], False),
    ([("a", [[1.0, 1.0, 1.0]])], False),
    ([("a", [[0.0, 0.0, 0.0]])], False),
]


@pytest.mark.parametrize("rows, log", PLOTS)
def test_no_number_of_a_plot_is_crossed(rows, log):
    """Every text's box, about 7 x 11 pixels a character, against every line and dot."""
    columns = len(rows[0][1])
    series = [("x", "#111111"), ("y", "#222222")][:columns]
    root = ET.fromstring(dot_plot("T", "lower is better", rows, series, log))
    marks = []
    for e in root.iter():
        if e.tag.endswith("line"):
            marks.append([float(e.get(k)) for k in ("x1", "y1", "x2", "y2")])
        if e.tag.endswith("circle"):
            marks.append([float(e.get("cx")), float(e.get("cy"))] * 2)
    texts = [e for e in root.iter() if e.tag.endswith("}text")]
    assert any("lower is better" in e.text for e in texts)
    assert len(marks) > len(rows)
    numbers = [e for e in texts if re.fullmatch(r"[-+]?[\d.]+", e.text)]
    assert len(numbers) > len(rows) * columns
    for e in texts:
        x = float(e.get("x"))
        y = float(e.get("y"))
        wide = 7 * len(e.text)
        left = x - {"end": wide, "middle": wide / 2}.get(e.get("text-anchor"), 0)
        for x1, y1, x2, y2 in marks:
            beside = max(x1, x2) < left or min(x1, x2) > left + wide
            above = max(y1, y2) < y - 10
            below = min(y1, y2) > y + 1
            assert beside or above or below, e.text
