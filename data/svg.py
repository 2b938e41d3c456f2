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

TEXT = "#768390"       # grey
DENSE = "#8b949e"      # a lighter grey
HURT = "#d9703c"       # orange
HEALED = "#2f9e75"     # green
STYLE = f"""
text {{ font: 13px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: {TEXT}; }}
.title {{ font-size: 15px; font-weight: 600; }}
.small {{ font-size: 12px; }}
.bold {{ font-weight: 600; }}
line {{ stroke: {TEXT}; stroke-width: 1.5; }}
"""


class Drawing:
    """What was drawn so far, in order: later parts lie over earlier ones."""

    def __init__(self):
        self.parts = []                   # elements of the SVG as text

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
        """Text whose baseline is y; kind: "", "title", "small" or "bold"; anchor: what x is,
        "start", "middle" or "end"."""
        where = "" if anchor == "start" else f' text-anchor="{anchor}"'
        style = f' class="{kind}"' if kind else ""
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}"{style}{where}>{escape(text)}</text>')

    def bar(self, x: float, y: float, width: float, height: float, color: str,
            opacity: float = 1.0) -> None:
        """A bar whose upper left corner is (x, y)."""
        faint = f' fill-opacity="{opacity}"' if opacity < 1 else ""
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
                          f'height="{height:.1f}" rx="2" fill="{color}"{faint}/>')

    def line(self, x1: float, y1: float, x2: float, y2: float, dashed: bool = False,
             color: str = TEXT, width: float = 1.5) -> None:
        """A line from (x1, y1) to (x2, y2)."""
        look = ' stroke-dasharray="4 3"' if dashed else ""
        if color != TEXT or width != 1.5:
            look += f' style="stroke: {color}; stroke-width: {width}"'
        ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
        self.parts.append(f"<line {ends}{look}/>")

    def dot(self, x: float, y: float, radius: float, color: str) -> None:
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{color}"/>')

    def svg(self, width: int, height: int, about: str) -> str:
        """The whole file; about: what it shows in words."""
        head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
                f'width="{width}" height="{height}" role="img">')
        about = f"<title>{escape(about)}</title>"
        return "\n".join([head, about, f"<style>{STYLE}</style>", *self.parts, "</svg>", ""])


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Two to six round numbers from low to high."""
    if log and high > 5 * low:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            found = [digit * 10.0 ** power for power in powers for digit in digits]
            inside = [tick for tick in found if low <= tick <= high]
            if len(inside) <= 6:
                return inside
        return inside[::-(-len(inside) // 6)]
    raw = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(digit * unit for digit in (1, 2, 5, 10) if digit * unit >= raw)
    found = [k * step for k in range(math.floor(low / step), math.ceil(high / step) + 1)]
    return [tick for tick in found if low <= tick <= high]


class Scale:
    """Where a value lies between two edges of a picture, with some room at both ends."""

    def __init__(self, values: list[float], left: float, right: float, log: bool):
        low, high = min(values), max(values)
        self.left, self.right = left, right
        self.log = log
        if log:
            room = 0.04 * math.log(high / low) or 0.1
            self.low, self.high = low * math.exp(-room), high * math.exp(room)
        else:
            room = 0.04 * (high - low) or 0.1 * abs(high) or 1.0
            self.low, self.high = low - room, high + room

    def place(self, value: float) -> float:
        """The x of a value; what is outside is drawn at the edge."""
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.left + (self.right - self.left) * min(max(share, 0.0), 1.0)

    def ticks(self) -> list[float]:
        return ticks(self.low, self.high, self.log)

    def form(self) -> str:
        """How a value is written: with its sign where some are below zero."""
        if self.low < 0:
            return "+.3f"
        return ".3f" if self.high < 10 else ".2f"


NAMES = 250            # pixels of a dot plot: where the scale begins, right of the rows' names
NUMBER = 62            # of a column of numbers
STEP = 24              # from one row to the next
TOP = 64               # where the rows begin, below title and legend
WIDTH = 820


def dot_plot(title: str, better: str, rows: list[tuple[str, list[list[float]]]],
             series: list[tuple[str, str]], log: bool = False) -> str:
    """An SVG: for each row (label, [[value, low, high] of each series]) dots with their intervals
    on one scale, their numbers in columns at the right, where no line comes. series: (name,
    color); better: which end is the good one, in words."""
    right = WIDTH - NUMBER * len(series) - 16
    bottom = TOP + STEP * len(rows)
    finite = [v for _, values in rows for numbers in values for v in numbers if math.isfinite(v)]
    scale = Scale(finite, NAMES, right, log)
    d = Drawing()
    d.text(8, 20, f"{title}: {better}", kind="title")
    kind = "; logarithmic scale" if log else ""
    d.text(8, 40, f"dots: measured; lines: 95% intervals{kind}", "small")
    for k, (name, color) in enumerate(series):
        x = NAMES + 150 * k
        d.dot(x, TOP - 12, 4, color)
        d.text(x + 9, TOP - 8, name, "small")
    for tick in scale.ticks():
        x = scale.place(tick)
        d.line(x, TOP, x, bottom, dashed=tick != 0 or log, width=0.5)
        d.text(x, bottom + 16, f"{tick:g}", "small", "middle")
    for i, (label, values) in enumerate(rows):
        middle = TOP + STEP * (i + 0.5)
        d.text(NAMES - 10, middle + 4, label, "small", "end")
        for k, ((value, low, high), (_, color)) in enumerate(zip(values, series)):
            y = middle + 6 * (k - (len(values) - 1) / 2)
            d.line(scale.place(low), y, scale.place(high), y, color=color, width=2)
            d.dot(scale.place(value), y, 3.5, color)
            number = format(value, scale.form())
            d.text(right + 12 + NUMBER * (k + 1), middle + 4, number, "small", "end")
    told = []
    for label, values in rows:
        numbers = ", ".join(f"{value:.3g}" for value, _, _ in values)
        told.append(f"{label}: {numbers}")
    return d.svg(WIDTH, round(bottom + 26), f"{title}, {better}. {'; '.join(told)}")
