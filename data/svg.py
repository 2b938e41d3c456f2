"""A small SVG by hand: text, bars, lines and dots, in colours that read on a light and on a dark
page.

    d = Drawing()
    d.text(8, 20, "Perplexity", kind="title")
    d.bar(8, 30, 120, 16, HEALED)
    Path("a.svg").write_text(d.svg(720, 60, "what it shows, for those who cannot see it"))

x runs to the right, y down, in pixels. No background, so colours are of middle brightness. Needs
the standard library.
"""
import math
from html import escape

TEXT, DENSE, HURT, HEALED = "#768390", "#8b949e", "#d9703c", "#2f9e75"   # grey, grey, orange, green
STYLE = f"""
text {{ font: 13px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: {TEXT}; }}
.title {{ font-size: 15px; font-weight: 600; }}
.small {{ font-size: 12px; }}
.bold {{ font-weight: 600; }}
line {{ stroke: {TEXT}; stroke-width: 1.5; }}
"""


class Drawing:
    def __init__(self):
        self.parts = []

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
        """Text whose baseline is y; kind: "", "title", "small" or "bold"; anchor: what x is,
        "start", "middle" or "end"."""
        where = "" if anchor == "start" else f' text-anchor="{anchor}"'
        style = f' class="{kind}"' if kind else ""
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}"{style}{where}>{escape(text)}</text>')

    def bar(self, x: float, y: float, width: float, height: float, color: str,
            opacity: float = 1.0) -> None:
        faint = f' fill-opacity="{opacity}"' if opacity < 1 else ""
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
                          f'height="{height:.1f}" rx="2" fill="{color}"{faint}/>')

    def line(self, x1: float, y1: float, x2: float, y2: float, dashed: bool = False,
             color: str = TEXT, width: float = 1.5) -> None:
        look = ' stroke-dasharray="4 3"' if dashed else ""
        if color != TEXT or width != 1.5:
            look += f' style="stroke: {color}; stroke-width: {width}"'
        self.parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
                          f'{look}/>')

    def dot(self, x: float, y: float, radius: float, color: str) -> None:
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{color}"/>')

    def svg(self, width: int, height: int, about: str) -> str:
        """The whole file; about: what it shows in words."""
        head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
                f'width="{width}" height="{height}" role="img">')
        about = f"<title>{escape(about)}</title>"
        return "\n".join([head, about, f"<style>{STYLE}</style>", *self.parts, "</svg>", ""])


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Up to six round numbers from low to high."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = [k * 10.0 ** e for e in powers for k in ((1, 2, 5) if high / low < 1000 else (1,))]
    else:
        raw = (high - low) / 5
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(k * unit for k in (1, 2, 5, 10) if k * unit >= raw)
        steps = [k * step for k in range(math.floor(low / step), math.ceil(high / step) + 1)]
    return [t for t in steps if low <= t <= high]


def dot_plot(title: str, better: str, rows: list[tuple[str, list[list[float]]]],
             series: list[tuple[str, str]], log: bool = False) -> str:
    """An SVG: for each row (label, [[value, low, high] of each series]) dots with their intervals
    on one scale, their numbers in columns at the right, where no line comes. series: (name,
    color); better: which end is the good one, in words."""
    names, number, step, top, width = 250, 62, 24, 64, 820
    right = width - number * len(series) - 16
    ends = [v for _, values in rows for numbers in values for v in numbers if math.isfinite(v)]
    low, high = min(ends), max(ends)
    room = 0.04 * (math.log(high / low) if log else high - low) or 0.1 * abs(high) or 1.0
    low, high = (low * math.exp(-room), high * math.exp(room)) if log else (low - room, high + room)

    def place(v: float) -> float:
        share = math.log(v / low) / math.log(high / low) if log else (v - low) / (high - low)
        return names + (right - names) * min(max(share, 0.0), 1.0)
    d, bottom = Drawing(), top + step * len(rows)
    d.text(8, 20, f"{title}: {better}", kind="title")
    scale = "; logarithmic scale" if log else ""
    d.text(8, 40, f"dots: measured; lines: 95% intervals{scale}", "small")
    for k, (name, color) in enumerate(series):
        x = names + 150 * k
        d.dot(x, top - 12, 4, color)
        d.text(x + 9, top - 8, name, "small")
    for t in ticks(low, high, log):
        d.line(place(t), top, place(t), bottom, dashed=t != 0 or log, width=0.5)
        d.text(place(t), bottom + 16, f"{t:g}", "small", "middle")
    for i, (label, values) in enumerate(rows):
        middle = top + step * (i + 0.5)
        d.text(names - 10, middle + 4, label, "small", "end")
        for k, ((value, a, b), (_, color)) in enumerate(zip(values, series)):
            y = middle + 6 * (k - (len(values) - 1) / 2)
            d.line(place(a), y, place(b), y, color=color, width=2)
            d.dot(place(value), y, 3.5, color)
            form = f"{value:+.3f}" if low < 0 else f"{value:.3f}" if high < 10 else f"{value:.2f}"
            d.text(right + 12 + number * (k + 1), middle + 4, form, "small", "end")
    about = "; ".join(f"{label}: {', '.join(f'{v[0]:.3g}' for v in values)}"
                      for label, values in rows)
    return d.svg(width, round(bottom + 26), f"{title}, {better}. {about}")
