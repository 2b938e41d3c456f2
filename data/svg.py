"""A small SVG by hand: text, bars, lines and dots, in colours that read on a light and on a dark
page.

    d = Drawing()
    d.text(8, 20, "Perplexity", kind="title")
    d.bar(8, 30, 120, 16, HEALED)
    Path("a.svg").write_text(d.svg(720, 60, "what it shows, for those who cannot see it"))

x runs to the right, y down, in pixels. No background, so colours are of middle brightness. Needs
the standard library.
"""
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

    def line(self, x1: float, y1: float, x2: float, y2: float, dashed: bool = False) -> None:
        dashes = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
                          f'{dashes}/>')

    def dot(self, x: float, y: float, radius: float, color: str) -> None:
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{color}"/>')

    def svg(self, width: int, height: int, about: str) -> str:
        """The whole file; about: what it shows in words."""
        head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
                f'width="{width}" height="{height}" role="img">')
        about = f"<title>{escape(about)}</title>"
        return "\n".join([head, about, f"<style>{STYLE}</style>", *self.parts, "</svg>", ""])
