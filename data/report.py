"""The output folder of one run: what was asked for, what is done, and the table; written so that a
killed run goes on.

    report = Report("runs/out", run, resume=True)     # refuses a folder that holds something else
    report.add("dense", perplexity=27.25, making=0.0, measuring=1.0, megabytes=6.9, ...)

report.json has what was run (settings, the checkpoint's files, versions), "rows", "layers" and
"losses". Nothing in it depends on the clock: seconds are in seconds.json. Each is written to a
temporary name and renamed, and one process at a time holds the folder. Left out: several runs in
one folder.
"""
import errno
import json
import math
import os
import shutil
from pathlib import Path

from data.checkpoint import read_json, write_json

OURS = ("report.json", "seconds.json", "compressed", "prompt.safetensors",       # what a run writes
        "prompt-dense.safetensors", "prompt.state", "prompt-dense.state", "healed", "heal.state",
        "shares.json", "teacher", "rewritten")
SIZES = ("megabytes", "bits_per_weight", "linear_bits_per_weight", "nominal")    # columns of a row
SECONDS = ("making", "measuring")
COLUMNS = f"{'':30s} {'perplexity':>12s} {'MB':>9s} {'bits/weight':>12s} " \
          f"{'bits/weight, Linears':>21s} {'nominal':>8s} {'made, s':>9s} {'measured, s':>12s}"


class Report:
    """rows: one dict a measurement; layers: one a compressed Linear; losses: of each learned file;
    seconds: {name of a row: {"making": s, "measuring": s}}."""

    def __init__(self, folder: str | Path, run: dict, resume: bool = False,
                 overwrite: bool = False):
        """run: JSON values that tell this run from others. Raises ValueError for a folder in use or
        of another run."""
        self.folder = Path(folder)
        self.run = json.loads(json.dumps(run))            # as it comes back from the file
        self.rows = []
        self.layers = []
        self.losses = {}
        self.seconds = {}
        check_place(self.folder, resume or overwrite)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = take_lock(self.folder)
        if overwrite:
            self.clear()
        elif resume:
            self.load()
        self.remove_parts()
        self.save()

    def remove_parts(self) -> None:
        """Remove what a killed write left, of our own files alone: the folder may hold others'."""
        for name in OURS:
            path = self.folder / name
            (self.folder / f"{name}.part").unlink(missing_ok=True)
            for part in path.glob("*.part") if path.is_dir() else ():
                part.unlink()

    def clear(self) -> None:
        """Remove what a run writes; report.json last, so that what is left can still be
        recognized, and emptied first, so that nothing takes what is left for a whole run."""
        if held_in(self.folder):
            write_json(self.folder / "report.json", {})
        for name in reversed(held_in(self.folder)):
            path = self.folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def load(self) -> None:
        """Take up what a run of the same settings has done."""
        path = self.folder / "report.json"
        if not path.exists():
            if set(held_in(self.folder)) - {"seconds.json"}:         # it is written first
                raise ValueError(f"{self.folder} holds {', '.join(held_in(self.folder))} but no "
                                 f"report.json: --overwrite replaces them, or name another --out")
            print(f"{self.folder} holds nothing to resume: starting anew")
            return
        held = read_json(path)
        if held == {}:
            raise ValueError(f"--resume: {self.folder} was being cleared by --overwrite, which "
                             f"was stopped: use it again, or name another --out")
        if isinstance(held.get("settings"), dict):          # as earlier versions wrote them
            held["settings"].pop("checkpointing", None)
            held["settings"].setdefault("rewrite", 0)
            held["settings"]["device"] = str(held["settings"].get("device")).partition(":")[0]
        asked = {key: value for key, value in self.run.items() if key in held or key == "settings"}
        differs = difference({key: held.get(key) for key in asked}, asked)
        if differs:
            raise ValueError(f"--resume: {path} is of another run: {differs}; use the same "
                             f"settings, --overwrite, or another --out")
        self.rows = held.get("rows")
        self.layers = held.get("layers")
        self.losses = held.get("losses")
        seconds = self.folder / "seconds.json"
        self.seconds = read_json(seconds) if seconds.exists() else {}
        is_whole = (is_table(self.rows) and are_layers(self.layers)
                    and isinstance(self.losses, dict))
        is_timed = all(has_numbers(row, SECONDS) and all(map(is_number, row.values()))
                       for row in self.seconds.values())
        for file, is_good in ((path, is_whole), (seconds, is_timed)):
            if not is_good:
                raise ValueError(f"--resume: {file} is damaged, it does not hold what a run "
                                 f"writes: --overwrite starts anew")

    def save(self) -> None:
        held = {**self.run, "rows": self.rows, "layers": self.layers, "losses": self.losses}
        write_json(self.folder / "seconds.json", self.seconds)
        write_json(self.folder / "report.json", held)

    def has(self, name: str) -> bool:
        """Is there a row of this name?"""
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
        """Lower perplexity is better; sizes of half-precision files; seconds spent on making and on
        measuring a row."""
        lines = [COLUMNS]
        for row in self.rows:
            spent = self.seconds.get(row["name"], {"making": 0.0, "measuring": 0.0})
            lines.append(f"{row['name']:30s} {row['perplexity']:12.3f} {row['megabytes']:9.1f} "
                         f"{row['bits_per_weight']:12.2f} {row['linear_bits_per_weight']:21.2f} "
                         f"{row['nominal']:7.1f}x {spent['making']:9.1f} "
                         f"{spent['measuring']:12.1f}")
        lines.append("nominal: 16 bits over bits x share kept, as papers count; files also hold "
                     "masks, grids and all that is no Linear")
        return "\n".join(lines)


def is_number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def has_numbers(row, keys) -> bool:
    """Is it a dictionary with a number under each of these keys?"""
    return isinstance(row, dict) and all(is_number(row.get(key)) for key in keys)


def is_table(rows) -> bool:
    """Are these the rows of a report?"""
    numbers = ("perplexity", "scored_tokens", "prompt_tokens", *SIZES)
    return isinstance(rows, list) and all(
        has_numbers(row, numbers) and isinstance(row.get("name"), str) for row in rows)


def are_layers(layers) -> bool:
    """Are these the Linears of a report, of each its names and numbers?"""
    return isinstance(layers, list) and all(
        has_numbers(layer, ("error",)) and layer.keys() == layers[0].keys()
        and all(isinstance(value, str) or is_number(value) for value in layer.values())
        for layer in layers)


def held_in(folder: Path) -> list[str]:
    """What a folder has of a run."""
    return [name for name in OURS if (folder / name).exists()]


def check_place(folder: Path, allowed: bool) -> None:
    """ValueError for a file, and for a folder with the results of a run, unless they are
    allowed."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file: name a folder")
    if held_in(folder) and not allowed:
        raise ValueError(f"--out {folder} holds the results of a run "
                         f"({', '.join(held_in(folder))}): --resume continues it, --overwrite "
                         f"replaces it, or name another --out")


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
    """Hold the folder until this process ends, however it ends; returns the open file that does so.
    Raises ValueError if another process holds it. Where a file system has no locks nobody holds
    it."""
    file = open(folder / ".lock", "ab")
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        if problem.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP):
            return file
        raise ValueError(f"--out {folder} is in use by another run: wait for it, or name another "
                         f"--out") from None
    return file


def identity(folder: Path) -> dict[str, list[int]]:
    """{file: [bytes, time of its last change in ns]} of what makes up a checkpoint folder."""
    kinds = (".safetensors", ".bin", ".pth", ".json", ".model", ".txt")
    found = {}
    for file in sorted(Path(folder).iterdir()):
        if file.is_file() and file.suffix in kinds:
            stat = file.stat()
            found[file.name] = [stat.st_size, stat.st_mtime_ns]
    return found
