"""The output folder of one run: what was asked for, what is done, and the table; written so that a killed run goes on.

    report = Report("runs/out", run, resume=True)        # refuses a folder that holds something else
    report.add("dense", perplexity=27.25, making=0.0, measuring=1.0, megabytes=6.9, ...)

report.json has what was run (settings, the checkpoint's files, versions), "rows", "layers" and "losses". Nothing in it depends on
the clock: seconds are in seconds.json. Each is written to a temporary name and renamed, and one process at a time holds
the folder. Left out: several runs in one folder.
"""
import json
import math
import os
import shutil
from pathlib import Path

from data.checkpoint import read_json, write_json

OURS = ("report.json", "seconds.json", "compressed", "prompt.safetensors", "prompt-dense.safetensors", "prompt.state",
        "prompt-dense.state", "healed", "heal.state", "teacher")      # what a run writes
SIZES = ("megabytes", "bits_per_weight", "linear_bits_per_weight", "nominal")


class Report:
    """rows: one dict a measurement; layers: one a compressed Linear; losses: of each learned file."""

    def __init__(self, folder: str | Path, run: dict, resume: bool = False, overwrite: bool = False):
        """run: JSON values that tell this run from others. Raises ValueError for a folder in use or of another run."""
        self.folder, self.run = Path(folder), json.loads(json.dumps(run))
        self.rows, self.layers, self.losses, self.seconds = [], [], {}, {}
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"--out {folder} is a file: name a folder")
        self.check_free(resume or overwrite)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = take_lock(self.folder)
        if overwrite:
            self.clear()
        elif resume:
            self.load()
        for part in [*self.folder.glob("*.part"), *self.folder.glob("*/*.part")]:
            part.unlink()                                       # of a write that was killed
        self.save()

    def held(self) -> list[str]:
        return [name for name in OURS if (self.folder / name).exists()]

    def check_free(self, allowed: bool) -> None:
        if self.held() and not allowed:
            raise ValueError(f"--out {self.folder} holds the results of a run ({', '.join(self.held())}): --resume continues "
                             f"it, --overwrite replaces it, or name another --out")

    def clear(self) -> None:
        """Remove what a run writes; report.json last, so that what is left can still be recognized."""
        for name in reversed(self.held()):
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def load(self) -> None:
        path = self.folder / "report.json"
        if not path.exists():
            if self.held():
                raise ValueError(f"{self.folder} holds {', '.join(self.held())} but no report.json: --overwrite replaces "
                                 f"them, or name another --out")
            print(f"{self.folder} holds nothing to resume: starting anew")
            return
        held = read_json(path)
        differs = difference({key: held.get(key) for key in self.run}, self.run)
        if differs:
            raise ValueError(f"--resume: {path} is of another run: {differs}; use the same settings, --overwrite, or "
                             f"another --out")
        self.rows, self.layers, self.losses = (held.get(key) for key in ("rows", "layers", "losses"))
        seconds = self.folder / "seconds.json"
        self.seconds = read_json(seconds) if seconds.exists() else {}
        whole = is_table(self.rows) and isinstance(self.layers, list) and isinstance(self.losses, dict)
        timed = all(isinstance(row, dict) and {"making", "measuring"} <= set(row) and all(map(is_number, row.values()))
                    for row in self.seconds.values())
        for file, good in ((path, whole), (seconds, timed)):
            if not good:
                raise ValueError(f"--resume: {file} is damaged, it does not hold what a run writes: --overwrite starts anew")

    def save(self) -> None:
        held = {**self.run, "rows": self.rows, "layers": self.layers, "losses": self.losses}
        for name, value in (("seconds.json", self.seconds), ("report.json", held)):
            write_json(self.folder / name, value)

    def has(self, name: str) -> bool:
        return any(row["name"] == name for row in self.rows)

    def size(self, name: str) -> dict:
        """The sizes of a model, from its row."""
        row = next(row for row in self.rows if row["name"] == name)
        return {key: row[key] for key in SIZES}

    def add(self, name: str, making: float, measuring: float, **values) -> None:
        """A row of the table; making and measuring in seconds."""
        self.rows.append({"name": name, **values})
        self.seconds[name] = {"making": making, "measuring": measuring}
        self.save()

    def table(self) -> str:
        """Lower perplexity is better; sizes of half-precision files; seconds spent on making and on measuring a row."""
        head = (f"{'':30s} {'perplexity':>12s} {'MB':>9s} {'bits/weight':>12s} {'bits/weight, Linears':>21s} "
                f"{'nominal':>8s} {'made, s':>9s} {'measured, s':>12s}")
        lines = [head]
        for r in self.rows:
            spent = self.seconds.get(r["name"], {"making": 0.0, "measuring": 0.0})
            lines.append(f"{r['name']:30s} {r['perplexity']:12.3f} {r['megabytes']:9.1f} {r['bits_per_weight']:12.2f} "
                         f"{r['linear_bits_per_weight']:21.2f} {r['nominal']:7.1f}x {spent['making']:9.1f} "
                         f"{spent['measuring']:12.1f}")
        lines.append("nominal: 16 bits over bits x share kept, as papers count; files also hold masks, grids and all that "
                     "is no Linear")
        return "\n".join(lines)


def is_number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def is_table(rows) -> bool:
    """Are these the rows of a report?"""
    numbers = {"perplexity", "scored_tokens", "prompt_tokens", *SIZES}
    return isinstance(rows, list) and all(isinstance(row, dict) and isinstance(row.get("name"), str) and numbers <= set(row)
                                          and all(is_number(row[key]) for key in numbers) for row in rows)


def difference(theirs, ours, name: str = "") -> str:
    """The first difference of two JSON values in words, or ""."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted({*theirs, *ours}):
            found = difference(theirs.get(key), ours.get(key), f"{name} {key}".strip())
            if found:
                return found
        return ""
    return "" if theirs == ours else f"{name} was {theirs!r}, now {ours!r}"


def take_lock(folder: Path):
    """Hold the folder until this process ends, however it ends. Raises ValueError if another process holds it."""
    file = open(folder / ".lock", "ab")
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"--out {folder} is in use by another run: wait for it, or name another --out") from None
    return file


def identity(folder: Path) -> dict[str, list[int]]:
    """{file: [bytes, time of its last change]} of what makes up a checkpoint folder."""
    kinds = (".safetensors", ".bin", ".pth", ".json", ".model", ".txt")
    files = sorted(f for f in Path(folder).iterdir() if f.is_file() and f.suffix in kinds)
    return {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files}
