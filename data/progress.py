"""A progress bar in a few lines: share done, time spent, time left, and a note. One line on a terminal, a few in a log."""
import sys
import time


class Progress:
    """for x in Progress(items, "title"): ...; call .note(text) inside the loop to show a number beside the bar."""

    def __init__(self, items, title: str, stream=None):
        self.items, self.title, self.stream, self.text = items, title, stream or sys.stderr, ""

    def note(self, text: str) -> None:
        self.text = text

    def __iter__(self):
        total, start, live, shown = len(self.items), time.monotonic(), self.stream.isatty(), -1
        for done, item in enumerate(self.items, 1):
            yield item
            spent = time.monotonic() - start
            step = int(spent * 5) if live else done * 5 // total          # 5 times a second, or 5 lines in a log
            if step != shown or done == total:
                shown, left = step, spent / done * (total - done)
                bar = "#" * (20 * done // total) + "-" * (20 - 20 * done // total)
                print(f"{self.title:28.28s} {bar} {done}/{total}  {spent:.0f} s, {left:.0f} s left  {self.text}",
                      end="\r" if live and done < total else "\n", file=self.stream, flush=True)
