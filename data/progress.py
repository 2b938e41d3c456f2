"""A progress bar in a few lines: share done, time spent, time left, and a note. One line on a
terminal, a few in a log.

    for x in Progress(items, "healing"): ...        # written to stderr
"""
import os
import shutil
import sys
import time


def duration(seconds: float) -> str:
    """500 s, 12 min 5 s, 13 h 20 min."""
    s = round(seconds)
    if s < 600:
        return f"{s} s"
    if s < 36000:
        return f"{s // 60} min {s % 60} s"
    return f"{s // 3600} h {s % 3600 // 60} min"


class Progress:
    """for x in Progress(items, "title"): ...; call .note(text) inside the loop to show a number
    beside the bar, and .skip() where an item took no time, being done before."""

    def __init__(self, items, title: str, stream=None):
        self.items = items
        self.title = title
        self.stream = stream or sys.stderr
        self.text = ""
        self.skipped = False

    def skip(self) -> None:
        """The time to come is told from the items after this one."""
        self.skipped = True

    def note(self, text: str) -> None:
        """Show this behind the bar from now on."""
        self.text = text

    def __iter__(self):
        total = len(self.items)
        start = time.monotonic()
        before = 0, start                           # items that tell nothing, and when they ended
        live = self.stream.isatty()
        shown = -1
        for done, item in enumerate(self.items, 1):
            yield item
            now = time.monotonic()
            if self.skipped:
                before, self.skipped = (done, now), False
            spent = now - start
            each = (now - before[1]) / (done - before[0]) if done > before[0] else None
            step = int(spent * 5) if live else done * 5 // total   # 5 a second, or 5 lines in a log
            if step != shown or done == total:
                shown = step
                self.draw(done, total, spent, each, live)

    def draw(self, done: int, total: int, spent: float, each: float | None, live: bool) -> None:
        """One line: `done` of `total` after `spent` seconds, `each` for an item to come, if that is
        known; live: over the line before."""
        if os.environ.get("RANK", "0") != "0":           # of several processes, the first one shows
            return
        left = "" if each is None else f", {duration(each * (total - done))} left"
        numbers = f"{done}/{total}  {duration(spent)}{left}  {self.text}".rstrip()
        bar = "#" * (20 * done // total) + "-" * (20 - 20 * done // total)
        line = f"{self.title:28s} {bar} {numbers}"
        if live:                                         # a line that wraps could not be drawn over
            columns = shutil.get_terminal_size().columns - 1
            if len(line) > columns:
                line = f"{self.title} {numbers}"[:columns]
            line = line.ljust(columns)                   # covers what a longer line left behind
        print(line, end="\r" if live and done < total else "\n", file=self.stream, flush=True)
