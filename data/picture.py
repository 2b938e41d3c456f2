"""Draws the tables of runs of train.py as an SVG: a bar of perplexity for each row, a panel for
each model and text.

    python -m data.picture runs/out/report.json > data/picture.svg
    python -m data.picture runs/a/report.json runs/b/report.json > two.svg

A panel has a column for the compressed model and one for the dense model, and in both the same
rows: no prompt, (healed,) the prompt's start, the learned prompt. So what a prompt does to the
compressed model stands beside what it does to the dense one. Runs that were measured on the same
windows of the same text share a panel, with a column for each way of compressing. All bars of a
picture start at zero and have one scale; the dense model's value without a prompt is marked in the
gaps between the bars, so that no number is crossed. Needs nothing but the standard library. Left
out: anything but perplexity.
"""
import argparse
import json
import math
import sys
from pathlib import Path

from data.svg import DENSE, HEALED, HURT, Drawing

WIDTH = 720        # of the picture, in pixels
NAMES = 150        # where the columns begin, right of the rows' names
ROOM = 44          # what a number takes behind its bar
BAR = 16           # height of a bar
STEP = 26          # from one bar to the next
HEAD = 52          # height of the legend
PANEL = 74         # height of a panel's titles
ALIKE = 0.005      # share by which two runs may differ in one number, in rounding
PROMPTS = {"": "no prompt", "healed": "healed, no prompt",
           "initial prompt": "prompt, not learned", "learned prompt": "prompt, learned"}


def read_report(path: str | Path) -> dict:
    """report.json of a run, {"rows": [...], "settings": {...}}; ValueError / FileNotFoundError if
    it is anything else."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no report {path}: train.py writes report.json into its --out "
                                f"folder")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        rows = report["rows"]
        if not rows or not all(0 < row["perplexity"] < math.inf and row["name"] for row in rows):
            raise ValueError("no rows")
        settings = report["settings"]
        made_how(settings), measured_how(settings), Path(settings.get("dense") or settings["model"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is not a report of train.py: it needs rows, each with a name and "
                         f"a perplexity, and the settings of the run") from None
    return report


def made_how(s: dict) -> str:
    """What was done to the model, from the settings of a run."""
    sparsity = str(s.get("sparsity", 0))
    done = []
    if ":" in sparsity:
        done.append(f"{sparsity} pruned")
    elif float(sparsity):
        done.append(f"{100 * float(sparsity):g}% pruned")
    if s.get("bits", 16) != 16:
        done.append(f"{s['bits']}-bit")
    return " + ".join(done)


def measured_how(s: dict) -> str:
    """On what; a setting that the report lacks is left out."""
    parts = [f"perplexity on {Path(s['data']).name}" if s.get("data") else "perplexity"]
    if s.get("seqlen"):
        parts.append(f"windows of {s['seqlen']}")
    if s.get("steps") and s.get("prompt_tokens"):
        what = "prefix positions" if s.get("kind") == "prefix" else "prompt tokens"
        how = " of KL" if s.get("objective") == "kl" else ""
        parts.append(f"{s['prompt_tokens']} {what}, {s['steps']} steps{how}")
    if s.get("seed") is not None:
        parts.append(f"seed {s['seed']}")
    return ", ".join(parts)


def panels(reports: list[dict]) -> list[dict]:
    """{"title", "details", "values": {(column, prompt): perplexity}} for each model and text; a
    column is "dense", or another model's name and how it was made. ValueError where two reports
    differ about one bar."""
    found = {}
    for report in reports:
        s = report["settings"]
        names = ("data", "seqlen", "max_tokens", "scored_tokens")
        dense = s.get("dense") or s["model"]
        same = (str(dense), *(str(s.get(name)) for name in names))
        name = Path(dense)
        name = name.parent.name if name.name == "compressed" else name.name
        empty = {"title": name, "details": "", "prompts": "", "values": {}}
        panel = found.setdefault(same, empty)
        told = measured_how(s)
        if any("prompt" in row["name"] for row in report["rows"]):
            if panel["prompts"] not in ("", told):
                raise ValueError(f"prompts learned unlike in reports of {name}: "
                                 f"{panel['prompts']}; {told}: draw them apart")
            panel["prompts"] = told
        panel["details"] = panel["prompts"] or told
        for row in report["rows"]:
            model, _, prompt = row["name"].partition(" + ")
            # what a run was given compressed is not in its settings
            how = "" if model == "dense" or s.get("packed") else made_how(s)
            column = f"{model}: {how}" if how else model
            held = panel["values"].setdefault((column, prompt), row["perplexity"])
            if not math.isclose(held, row["perplexity"], rel_tol=ALIKE):
                bar = f"{column}, {PROMPTS.get(prompt, prompt)}"
                raise ValueError(f"{bar}: {held:.2f} in one report of {panel['title']} and "
                                 f"{row['perplexity']:.2f} in another: draw them apart")
    return list(found.values())


def draw(d: Drawing, panel: dict, top: float, largest: float, columns: int) -> float:
    """One panel from height `top` on, `largest` being the longest bar of the picture and `columns`
    the most of a panel; returns where the next may begin."""
    values = panel["values"]
    models = sorted(dict.fromkeys(model for model, _ in values), key=lambda m: m == "dense")
    asked = {prompt for _, prompt in values}
    prompts = [p for p in PROMPTS if p in asked] + sorted(asked - set(PROMPTS))
    column = (WIDTH - NAMES) / columns           # even where this panel has fewer: one scale
    scale = (column - ROOM) / largest
    d.text(8, top + 22, panel["title"], kind="title")
    d.text(8, top + 40, panel["details"], kind="small")
    first = top + PANEL
    for i, prompt in enumerate(prompts):
        d.text(NAMES - 8, first + i * STEP + BAR - 3.5, PROMPTS.get(prompt, prompt), anchor="end")
    for j, model in enumerate(models):
        left = NAMES + j * column
        name = "dense: the control" if model == "dense" and len(models) > 1 else model
        if len(models) > 2:                      # no room for more
            name = name.removeprefix("compressed: ")
        d.text(left, first - 14, name, kind="small bold")
        for i, prompt in enumerate(prompts):
            if (model, prompt) not in values:
                continue
            value = values[model, prompt]
            y = first + i * STEP
            d.bar(left, y, value * scale, BAR, *look(model, prompt))
            d.text(left + value * scale + 6, y + BAR - 3.5, f"{value:.1f}")
        if ("dense", "") in values:
            x = left + values["dense", ""] * scale
            for i in range(len(prompts) + 1):    # in the gaps, where neither bars nor numbers are
                d.line(x, first + i * STEP - (STEP - BAR) + 2, x, first + i * STEP - 2)
    return first + len(prompts) * STEP


def look(model: str, prompt: str) -> tuple[str, float]:
    """(color, opacity) of a bar: learned prompts are green, the control's bars behind a prompt
    faint."""
    is_dense = model == "dense"
    opacity = 0.45 if is_dense and prompt else 1.0
    if prompt.startswith("learned"):
        return HEALED, opacity
    return DENSE if is_dense else HURT, opacity


def picture(reports: list[dict]) -> str:
    """The whole SVG file."""
    shown = panels(reports)
    widest = max(len({model for model, _ in panel["values"]}) for panel in shown)
    largest = max(value for panel in shown for value in panel["values"].values())
    d = Drawing()
    d.text(8, 20, "Perplexity: lower is better. All bars start at 0 and share one scale.")
    for y in (28, 36):
        d.line(14, y, 14, y + 5)
    d.text(24, 39, "the dense model without a prompt: a bar that ends left of this mark is better",
           kind="small")
    height = HEAD
    for panel in shown:
        height = draw(d, panel, height, largest, widest)
    about = []
    for panel in shown:
        rows = [f"{' + '.join(filter(None, key))} {v:.1f}" for key, v in panel["values"].items()]
        about.append(f"{panel['title']}: {', '.join(rows)}")
    return d.svg(WIDTH, round(height + 4), "; ".join(about))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("reports", nargs="+", metavar="report.json",
                        help="as train.py leaves it in its --out folder")
    try:
        print(picture([read_report(path) for path in parser.parse_args().reports]), end="")
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
