"""Draws the table of one or more runs of train.py as an SVG: a bar of perplexity for each row, a panel for each run.

    python -m data.picture runs/out/report.json > data/picture.svg
    python -m data.picture runs/a/report.json runs/b/report.json > two.svg       # panels below each other

Bars start at zero, each panel has its own scale, and the dashed line goes through the dense model's value: a bar that
ends left of it is better than dense. Colours are of middle brightness on no background, so that the picture reads on a
light and on a dark page. Needs nothing but the standard library. Left out: anything but perplexity.
"""
import argparse
import json
import sys
from html import escape
from pathlib import Path

WIDTH, NAMES, END = 720, 232, 640          # picture; where bars begin; where the longest one ends, its number after it
BAR, STEP, HEAD = 16, 26, 54               # height of a bar, from bar to bar, and of a panel's title
TEXT, DENSE, HURT, HEALED = "#768390", "#8b949e", "#d9703c", "#2f9e75"


def read_report(path: str | Path) -> dict:
    """report.json of a run, {"rows": [...], "settings": {...}}; ValueError / FileNotFoundError if it is anything else."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no report {path}: train.py writes report.json into its --out folder")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if not report["rows"] or not all(row["perplexity"] > 0 and row["name"] for row in report["rows"]):
            raise ValueError("no rows")
        report["settings"]["model"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not a report of train.py: it needs rows, each with a name and a perplexity, and "
                         f"the settings of the run") from None
    return report


def color(name: str) -> str:
    """Grey for the dense model, green behind a learned prompt, orange for what compression did."""
    return HEALED if "learned" in name else DENSE if name.startswith("dense") else HURT


def describe(s: dict) -> tuple[str, str]:
    """Title and subtitle of a panel from the settings of its run; a setting that the report lacks is left out."""
    pruned = [f"{100 * float(s['sparsity']):g}% pruned" if ":" not in str(s["sparsity"]) else f"{s['sparsity']} pruned"
              ] if s.get("sparsity") not in (None, "0", 0) else []
    rounded = [f"{s['bits']}-bit"] if s.get("bits") not in (None, 16) else []
    details = [f"perplexity on {Path(s['data']).name}" if s.get("data") else "perplexity"]
    details += [f"windows of {s['seqlen']}"] * bool(s.get("seqlen"))
    details += [f"{s['prompt_tokens']} prompt tokens, {s['steps']} steps"] * bool(s.get("steps") and s.get("prompt_tokens"))
    details += [f"seed {s['seed']}"] * (s.get("seed") is not None)
    return ", ".join([Path(s["model"]).name, " + ".join(pruned + rounded) or "not compressed"]), ", ".join(details)


def panel(report: dict, top: int) -> tuple[list[str], int]:
    """SVG elements of one run from height `top` on, and the height where the next may begin."""
    rows, (title, details) = report["rows"], describe(report["settings"])
    scale = (END - NAMES) / max(row["perplexity"] for row in rows)
    parts = [f'<text x="8" y="{top + 22}" class="title">{escape(title)}</text>',
             f'<text x="8" y="{top + 40}" class="small">{escape(details)}</text>']
    first = y = top + HEAD
    for row in rows:
        width, middle = row["perplexity"] * scale, y + BAR / 2 + 4.5
        parts += [f'<text x="{NAMES - 8}" y="{middle}" text-anchor="end">{escape(row["name"])}</text>',
                  f'<rect x="{NAMES}" y="{y}" width="{width:.1f}" height="{BAR}" rx="2" fill="{color(row["name"])}"'
                  + (' fill-opacity="0.45"' if row["name"].startswith("dense +") else "") + "/>",
                  f'<text x="{NAMES + width + 6:.1f}" y="{middle}">{row["perplexity"]:.1f}</text>']
        y += STEP
    dense = next((row["perplexity"] for row in rows if row["name"] == "dense"), None)
    if dense:
        x = f"{NAMES + dense * scale:.1f}"
        parts.append(f'<line x1="{x}" x2="{x}" y1="{first - 5}" y2="{y - STEP + BAR + 5}"/>')
    return parts, y + 8


def picture(reports: list[dict]) -> str:
    """The whole SVG file."""
    parts, height = [], 0
    for report in reports:
        drawn, height = panel(report, height)
        parts += drawn
    about = "; ".join(f"{describe(r['settings'])[0]}: " + ", ".join(f"{row['name']} {row['perplexity']:.1f}" for row in r["rows"])
                      for r in reports)
    style = (f'text {{ font: 13px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: {TEXT}; }} '
             f'.title {{ font-size: 15px; font-weight: 600; }} .small {{ font-size: 12px; }} '
             f'line {{ stroke: {TEXT}; stroke-width: 1.5; stroke-dasharray: 4 3; }}')
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
                      f'role="img">', f"<title>{escape(about)}</title>", f"<style>{style}</style>", *parts, "</svg>", ""])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("reports", nargs="+", metavar="report.json", help="as train.py leaves it in its --out folder")
    try:
        print(picture([read_report(path) for path in parser.parse_args().reports]), end="")
    except (ValueError, FileNotFoundError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(1)
