"""The paper's tables and its open questions, over runs of train.py: with controls and intervals.

    python study.py levels runs/*               # perplexity against real bits a weight
    python study.py recipes RUN...              # kinds and objectives: what heals, what only adapts
    python study.py transfer RUN...             # learned on one text or model, read by the others
    python study.py length RUN                  # 10 to 200 positions: perplexity, time, memory
    python study.py hard RUN                    # prompts in words: is it the words, or the tokens?
    python study.py robust RUN                  # text from elsewhere, and corrupted text
    python study.py tasks RUN                   # zero-shot accuracy

A RUN is a folder that train.py has written; its settings hold here too: seed, seqlen, text, steps.
Each study prints a table and leaves NAME.md, NAME.json and NAME.svg in --out. Prompts that a run
does not have are learned by train.py's own stages. Losses, answers and prompts are kept in
--out/cache under what they were made of: a killed study goes on, and nothing is computed twice.

Controls: the dense model; the compressed one; behind the prompt's start; behind the learned prompt;
dense behind a prompt learned the same way; and behind as many tokens of real text, neutral and
shuffled. Brackets hold 95% bootstrap intervals over windows (items); differences are paired, and a
star marks those whose interval leaves zero out. Left out: means over seeds.
"""
from data.flags import Flags, flag, read_flags, run_program, whole

STUDIES = ("levels", "recipes", "transfer", "length", "hard", "robust", "tasks")
ONE_RUN = ("length", "hard", "robust", "tasks")
USES = {                               # flags of some studies only
    "texts": ("recipes", "transfer", "robust"),
    "tasks": ("hard", "tasks"),
    "limit": ("hard", "tasks"),
    "lengths": ("length",),
}


def flags() -> Flags:
    p = Flags(description="Tables of the paper and of its open questions, over runs of train.py.")
    a = p.add_argument
    a("study", choices=STUDIES)
    a("runs", nargs="+", metavar="RUN", help="--out folders of train.py")
    a("--out", default="runs/study",
      help="folder of tables and of what is kept (default runs/study)")
    a("--texts", help="names or files, parted by commas, for transfer, recipes and robust; "
                      "LEARN:MEASURE names two (default: the run's; tiny models docs and code too)")
    a("--data-dir", metavar="FOLDER", help="folder of the text sets and of the tasks' files")
    a("--tasks", help="as eval.py --tasks (default: continuations made of the measured text)")
    a("--limit", type=whole(1, 1 << 30), help="items of a task (default 200)")
    a("--lengths", metavar="N,N,...", help="positions (default 10,25,50,100,200)")
    return p


if __name__ == "__main__":
    args = read_flags(flags())       # before torch is loaded: --help and wrong flags answer at once

import argparse
import hashlib
import json
import math
import random
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

from data.checkpoint import read_json, write_atomic, write_json
from data.config import SHIPPED, packed_layers, resolve
from data.picture import made_how
from data.progress import Progress
from data.report import identity
from data.svg import DENSE, HEALED, HURT, dot_plot
from data.tasks import Item, ask, find_task, load_items
from data.text import (MOST_CHARACTERS, eval_tokens, has_splits, joined, load_text,
                       split_to_judge)
from data.tokenizer import load_tokenizer
from eval import DTYPES, cut, decode, generate, not_finite, zero_shot
from model import load_model, open_checkpoint
from prompt import (HARD_PROMPT, fingerprint, initial_prompt, load_prompt, streamed_prefix,
                    text_loss, with_prompt)
from train import Run, describe_machine

NEUTRAL = ("The river rises in the hills, a long way from the sea, and for the first miles it is "
           "no wider than a road. Farmers keep sheep on both banks, and in spring the lower "
           "meadows are under water for a week or two. There is a stone bridge, then a mill that "
           "has not turned for many years, and a row of poplars that someone planted to mark the "
           "way to the village. On market days people come from all sides with bread, cheese and "
           "apples. They stand about, talk of the weather and of the price of hay, and go home "
           "before it gets dark. ")
HARD = {
    "the paper's": HARD_PROMPT,
    "the paper's, quantized":
        "The weight matrix inside the language model has been quantized. Make any necessary "
        "adjustments to ensure optimal performance.",
    "negated":
        "The weight matrix inside the language model is intact. No adjustments are necessary to "
        "ensure optimal performance.",
}
SAMPLES = 2000                                      # of the bootstrap


# -------------------------------------------------------------------------------------------------
# Numbers with intervals. A measurement is (windows,) or (items,) float64.

def spread(values: torch.Tensor) -> list[float]:
    """[mean, low, high]: 95% bootstrap interval of the mean; the same draws for the same count, so
    that a difference of two measurements is paired."""
    g = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (SAMPLES, len(values)), generator=g)
    means = values[drawn].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return [values.mean().item(), low, high]


def ppl(losses: torch.Tensor) -> list[float]:
    """[perplexity, low, high] of losses in nats a token."""
    return [math.exp(min(v, 700.0)) for v in spread(losses)]


def show(numbers: list[float], form: str = ".2f") -> str:
    """[value, low, high] as a cell of a table."""
    value, low, high = (format(number, form) for number in numbers)
    return f"{value} [{low}, {high}]"


def show_change(numbers: list[float]) -> str:
    """The same for a difference, with a star where the interval leaves zero out."""
    _, low, high = numbers
    star = "" if low <= 0 <= high else " *"
    return show(numbers, "+.3f") + star


def change(losses: torch.Tensor, base: torch.Tensor) -> str:
    """The difference in nats a token, below zero where `losses` are better."""
    return show_change(spread(losses - base))


def mcnemar(ours: torch.Tensor, base: torch.Tensor) -> tuple[int, int, float]:
    """(items that turned right, that turned wrong, two-sided exact p) of answers (items,), 0 or
    1."""
    right = int((ours > base).sum())
    wrong = int((ours < base).sum())
    n = right + wrong
    tail = sum(math.comb(n, k) for k in range(min(right, wrong) + 1)) / 2 ** n
    return right, wrong, min(1.0, 2 * tail)


def show_answers(got: torch.Tensor, base: torch.Tensor) -> tuple[dict, list[str]]:
    """(numbers for JSON, three cells: accuracy, what turned, p) of answers beside others."""
    accuracy = spread(got)
    right, wrong, p = turned = mcnemar(got, base)
    numbers = {"acc": accuracy, "turned right, turned wrong, p": turned}
    return numbers, [show(accuracy, ".3f"), f"{right}, {wrong}", f"{p:.2f}"]


# -------------------------------------------------------------------------------------------------
# Runs, and what is kept of them.

def mark(held) -> str:
    """16 hexadecimal digits that tell JSON values apart."""
    return fingerprint(torch.tensor(list(json.dumps(held, sort_keys=True).encode())))


class Case:
    """One run of train.py: its settings, models and texts."""

    def __init__(self, folder: str, data_dir: str | None):
        self.folder = Path(folder)
        path = self.folder / "report.json"
        if not path.is_file():
            raise FileNotFoundError(f"no report {path}: a RUN is a folder that train.py has "
                                    f"written")
        held = read_json(path)
        try:
            self.settings = s = argparse.Namespace(**held["settings"])
            self.rows = {row["name"]: row for row in held["rows"]}
            s.data_dir = data_dir or s.data_dir
            source = resolve(s.model)
            self.dense = resolve(s.dense) if s.dense else source
            if s.packed and not s.dense:
                self.dense = None
        except (KeyError, TypeError, AttributeError):
            raise ValueError(f"{path} is not a report of this version's train.py: run it "
                             f"again") from None
        maker = source.parent / "report.json"               # of the run that compressed it
        if s.packed and maker.is_file():
            held = read_json(maker)
        self.made = held.get("settings")
        if self.made is None:
            raise ValueError(f"{maker} holds no settings: was its run stopped while it was "
                             f"cleared?")
        how = made_how(self.made)
        healed = " + healed" if how and self.made.get("heal") else ""
        made = self.folder / "compressed"
        self.compressed = source if s.packed else made if how else None
        if how:
            whole = (self.compressed / "config.json").is_file()
            if not whole or f"compressed{healed}" not in {row["name"] for row in held["rows"]}:
                raise ValueError(f"{self.compressed.parent} is not finished, its compressed"
                                 f"{healed} model has not been measured: let the run end, "
                                 f"train.py ... --resume")
        self.n = s.prompt_tokens
        self.tokenizer = load_tokenizer(source)
        plain = ", plain" if how and self.made.get("recipe") == "plain" else ""
        self.label = (how or "dense") + plain + healed

    def place(self, which: str) -> Path | None:
        """The folder of the "dense" or the "compressed" model."""
        return self.dense if which == "dense" else self.compressed

    def measured(self, name: str | None = None) -> torch.Tensor:
        """Tokens to measure on, as the run takes them."""
        s = self.settings
        name = name or s.data
        return eval_tokens(self.tokenizer, name, split_to_judge(name), s.seqlen, s.max_tokens,
                           s.data_dir)

    def about(self) -> str:
        """The run's settings in a line."""
        s = self.settings
        return (f"{self.folder.name}: {Path(s.model).name}, {self.label}, {self.n} positions "
                f"({s.kind}, {s.objective}), {s.steps} steps of {s.batch_size} windows of "
                f"{Path(s.train_data).name}, measured on the first {s.max_tokens or 'all'} tokens "
                f"of {Path(s.data).name}, seqlen {s.seqlen}, seed {s.seed}, {s.dtype}")


COLON = re.compile(r":(?!\\|(?<=^[A-Za-z]:)/)")         # but for those of C:\ and C:/


class Lab:
    """Measurements of runs, each made once and kept in a folder under what it is made of."""

    def __init__(self, args):
        self.args = args
        self.out = Path(args.out)
        self.cache = self.out / "cache"
        self.cases = [Case(folder, args.data_dir) for folder in args.runs]
        self.loaded = {}
        self.marks = {}

    def model(self, case: Case, which: str):
        """"dense" or "compressed"; two stay in memory."""
        s = case.settings
        key = case.place(which), s.dtype, s.device, s.fused
        if key not in self.loaded:
            while len(self.loaded) > 1:
                del self.loaded[next(iter(self.loaded))]
            self.loaded[key] = load_model(key[0], DTYPES[s.dtype], s.device, s.fused == "on")
        return self.loaded[key]

    def keep(self, kind: str, made_of: dict, make):
        """make(), JSON, or what it was when it was last asked for the same."""
        path = self.cache / f"{kind}-{mark(made_of)}.json"
        if not path.exists():
            made = make()
            self.cache.mkdir(parents=True, exist_ok=True)
            write_json(path, {"made_of": made_of, "made": made})
        return read_json(path)["made"]

    def made_of(self, case: Case, which: str, prompt) -> dict:
        """What tells measurements of this model behind this prompt from others."""
        s = case.settings
        return {"model": identity(case.place(which)), "dtype": s.dtype, "device": s.device,
                "fused": s.fused, "prompt": None if prompt is None else fingerprint(prompt)}

    def losses(self, case: Case, which: str, prompt, tokens: torch.Tensor) -> torch.Tensor:
        """Mean loss, nats a token, of every window (windows,) float64."""
        s = case.settings

        @torch.no_grad()
        def make():
            model = self.model(case, which)
            title = f"{case.folder.name}, {which}"
            windows = cut(tokens, s.seqlen, s.batch_size)
            means = []
            for batch in Progress(windows.split(s.batch_size), title):
                nll = text_loss(model, prompt, batch.to(s.device)).double()
                means += nll.view(len(batch), -1).mean(1).tolist()
            if not all(map(math.isfinite, means)):
                raise not_finite(title, "a loss", math.nan, model)
            return means
        made_of = {**self.made_of(case, which, prompt), "tokens": fingerprint(tokens),
                   "seqlen": s.seqlen, "batch_size": s.batch_size}
        return torch.tensor(self.keep("losses", made_of, make), dtype=torch.float64)

    def answers(self, case: Case, which: str, prompt, items: list[Item], task: str) -> torch.Tensor:
        """1 where an item is answered right, else 0: (items,) float64. By acc; of made items, whose
        choices differ much in length, by acc_norm, the likeliest a character."""
        metric = metric_of(task)

        def make():
            model = self.model(case, which)
            got = zero_shot(model, case.tokenizer, items, prompt, 16, f"{task}, {which}")
            return [int(r[metric]) for r in got]
        made_of = {**self.made_of(case, which, prompt), "items": mark(items)}
        if metric != "acc":
            made_of["metric"] = metric
        return torch.tensor(self.keep("answers", made_of, make), dtype=torch.float64)

    def learned(self, case: Case, which: str, text: str | None = None, n: int | None = None):
        """The prompt learned on a model, on the run's own text and of its length unless told
        otherwise: the run's, or a new one by train.py's stages."""
        s = case.settings
        text = text or s.train_data
        n = n or case.n
        is_control = which == "dense" and case.compressed
        own = case.folder / ("prompt-dense.safetensors" if is_control else "prompt.safetensors")
        if (text, n) == (s.train_data, case.n) and own.exists():
            return load_prompt(own)[0].to(s.device)
        if not s.steps:
            raise ValueError(f"{case.folder} learned no prompt (--steps 0): name a run that did")
        dense = case.dense if which == "compressed" else None
        asked = {**vars(s), "model": str(case.place(which)), "bits": 16,
                 "dense": str(dense) if dense else None,
                 "sparsity": "0", "packed": bool(packed_layers(case.place(which))),
                 "checkpointing": False, "control": False, "heal": 0, "reconstruct": 0,
                 "train_data": text, "prompt_tokens": n, "max_tokens": s.seqlen}

        made_of = {**self.made_of(case, which, None), "asked": asked,
                   "text": self.text_mark(case, text), "teacher": dense and identity(dense)}

        def make():
            self.loaded.clear()                         # the run loads its model itself
            folder = self.cache / f"run-{mark(made_of)}"
            begun = (folder / "report.json").exists()
            run = Run(argparse.Namespace(**asked, out=str(folder), resume=begun, overwrite=False))
            run.run()
            run.report.lock.close()
            return folder.name
        name = self.keep("prompt", made_of, make)
        return load_prompt(self.cache / name / "prompt.safetensors")[0].to(s.device)

    def text_mark(self, case: Case, name: str) -> str:
        """16 hexadecimal digits of a text that prompts are learned from, which may change."""
        place = name, case.settings.data_dir
        if place not in self.marks:
            text = joined(load_text(name, "train", place[1]))[:MOST_CHARACTERS]
            digest = hashlib.sha256(text.encode(errors="surrogatepass"))
            self.marks[place] = digest.hexdigest()[:16]
        return self.marks[place]

    def start(self, case: Case, which: str, n: int | None = None) -> torch.Tensor:
        """Where a run's prompt starts from."""
        s = case.settings
        n = n or case.n
        least = max(n, 2)
        tokens = eval_tokens(case.tokenizer, s.train_data, "train", least, least, s.data_dir)
        start = initial_prompt(self.model(case, which), n, s.prompt_init, tokens, s.seed)
        if s.kind == "prefix":
            return streamed_prefix(open_checkpoint(case.dense), start, DTYPES[s.dtype], s.device)
        return start

    def words(self, case: Case, which: str, text: str, n: int | None = None,
              shuffled: bool = False) -> torch.Tensor:
        """Text as a prompt (n, width), repeated or cut to n tokens; shuffled: these by seed."""
        ids = torch.tensor(case.tokenizer.encode(text, bos=False))
        ids = ids if n is None else ids.repeat(-(-n // len(ids)))[:n]
        if shuffled:
            ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
        return self.model(case, which).embed(ids.to(case.settings.device)).float()

    def behind(self, case: Case, which: str) -> dict:
        """The prompts that one model is measured behind."""
        return {
            "no prompt": None,
            "start": self.start(case, which),
            "learned": self.learned(case, which),
            "neutral text": self.words(case, which, NEUTRAL, case.n),
            "shuffled text": self.words(case, which, NEUTRAL, case.n, shuffled=True),
        }

    def controls(self, case: Case) -> dict[str, tuple]:
        """{name: (model, prompt)} of all controls that a run has."""
        found = {}
        if case.dense:
            found["dense"] = "dense", None
        if case.compressed:
            prompts = self.behind(case, "compressed")
            found["compressed"] = "compressed", prompts.pop("no prompt")
            found |= {f"+ {name}": ("compressed", prompt) for name, prompt in prompts.items()}
        if case.dense:
            found["dense + learned"] = "dense", self.learned(case, "dense")
        return found

    def texts(self, case: Case) -> dict[str, tuple[str, str]]:
        """{label: (text to learn on, text to measure on)}."""
        s = case.settings
        asked = [(s.train_data, s.data)]
        if s.model in SHIPPED or str(s.dense) in SHIPPED:
            asked += [(name, name) for name in ("docs", "code") if name != s.data]
        if self.args.texts:
            names = [COLON.split(name, maxsplit=1) for name in self.args.texts.split(",")]
            asked = [(pair[0], pair[-1]) for pair in names]
        found = {}
        for learn, measure in asked:
            label = Path(measure).stem
            if label in found:
                raise ValueError(f"--texts names two texts {label!r} to measure on: one table has "
                                 f"each once, so ask for the other in a study of its own")
            found[label] = learn, measure
        return found

    def items(self, case: Case) -> dict[str, list[Item]]:
        """{task: items}; without --tasks, of the text that the run is measured on."""
        a = self.args
        limit = a.limit or 200
        if a.tasks:
            return {find_task(name, a.data_dir)[0]: load_items(name, a.data_dir, limit)
                    for name in a.tasks.split(",")}
        text = case.tokenizer.decode(case.measured().tolist())
        return {MADE + Path(case.settings.data).name: made_items(text, limit)}


MADE = "continue "                                  # what the name of made items begins with


def metric_of(task: str) -> str:
    """By what answers are judged."""
    return "acc_norm" if task.startswith(MADE) else "acc"


def made_items(text: str, limit: int, given: int = 40, asked: int = 8) -> list[Item]:
    """Items of any text: which of four passages goes on where 40 words end? The wrong ones are from
    elsewhere in it."""
    words = re.findall(r"\S+\s*", text)
    starts = range(0, len(words) - given - asked, given + asked)
    if len(starts) < 4:
        raise ValueError(f"{len(words)} words make no items: measure on more text, or give --tasks")
    passages = ["".join(words[i + given:i + given + asked]).strip() for i in starts]
    rng = random.Random(0)
    items = []
    for k, i in enumerate(starts[:limit]):
        others = [p for p in passages if p != passages[k]]
        choices = rng.sample(others, 3)
        gold = rng.randrange(4)
        choices.insert(gold, passages[k])
        items.append(ask("".join(words[i:i + given]).rstrip(), choices, gold))
    return items


def corrupted(text: str, how: str, share: float = 0.1) -> str:
    """A text with every tenth word, by seed, hurt: "typos" (two letters change places), "dropped",
    "swapped" (with the next); or all of it in "upper case" or "lower case"."""
    if how.endswith("case"):
        return text.upper() if how == "upper case" else text.lower()
    rng = random.Random(0)
    words = re.findall(r"\s*\S+|\s+$", text)            # each with the space before it
    out = []
    i = 0
    while i < len(words):
        word = words[i]
        hit = rng.random() < share
        letters = len(word.strip())
        if hit and how == "typos" and letters > 3:
            k = rng.randrange(len(word) - letters, len(word) - 1)
            word = word[:k] + word[k + 1] + word[k] + word[k + 2:]
        if hit and how == "swapped" and i + 1 < len(words):
            out.append(words[i + 1])
            i += 1
        if not (hit and how == "dropped"):
            out.append(word)
        i += 1
    return "".join(out)


# -------------------------------------------------------------------------------------------------
# What a study leaves behind.

class Table:
    """Head and rows of text; values: what they were made of, for JSON."""

    def __init__(self, title: str, *head: str):
        self.title = title
        self.head = head
        self.rows = []
        self.values = []

    def add(self, *cells: str, **values) -> None:
        """A row, the first cell being its name, and what it was made of."""
        self.rows.append([str(cell) for cell in cells])
        self.values.append({"row": str(cells[0]), **values})

    def plain(self) -> str:
        """For a terminal: names at the left edge of their column, all else at the right."""
        lines = [self.head, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines)]
        out = [self.title]
        for name, *cells in lines:
            columns = [name.ljust(widths[0])]
            columns += [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
            out.append("  ".join(columns).rstrip())
        return "\n".join(out)

    def markdown(self) -> str:
        out = [f"{self.title}\n"]
        for line in (self.head, ["---"] * len(self.head), *self.rows):
            cells = [cell.replace("|", "\\|") for cell in line]
            out.append("| " + " | ".join(cells) + " |")
        return "\n".join(out)


def commit() -> str:
    """The commit of this folder, and whether anything was changed since."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True)
        return done.stdout.strip()
    try:
        digits = git("rev-parse", "--short", "HEAD")
        if not digits:                                  # no repository
            return "unknown"
        changed = git("status", "--porcelain", "-uno")
        return f"{digits}, changed" if changed else digits
    except OSError:                                     # no git
        return "unknown"


def publish(lab: Lab, name: str, tables: list[Table], says: list[str], drawing: str) -> None:
    """Print the tables, and write them as Markdown, JSON and SVG beside each other."""
    # names without their folders
    words = [re.sub(r"[^,:]*/(?=[^/,:]+/?(?:[,:]|$))", "", word) for word in sys.argv[1:]]
    told = {"command": f"python study.py {shlex.join(words)}", "commit": commit(),
            "machine": describe_machine(lab.cases[0].settings.device),
            "runs": [case.about() for case in lab.cases]}
    text = [f"## {name}\n"]
    text += [f"{line}\n" for line in says]
    text += [f"{table.markdown()}\n" for table in tables]
    text.append(f"`{told['command']}`, commit {told['commit']}, {told['machine']}. Runs:\n")
    text.append("\n".join(f"- {run}" for run in told["runs"]) + "\n")
    held = {**told, "tables": [{"title": table.title, "rows": table.values} for table in tables]}
    write_json(lab.out / f"{name}.json", held)
    for suffix, content in (("md", "\n".join(text)), ("svg", drawing)):
        write_atomic(lab.out / f"{name}.{suffix}", lambda f: f.write(content.encode()))
    saved = f"saved in {lab.out}: {name}.md, .json, .svg"
    print("\n\n".join([*(table.plain() for table in tables), *says, saved]))


# -------------------------------------------------------------------------------------------------
# The studies.

def levels(lab: Lab) -> None:
    """Perplexity against the real bits of a weight in Linears: the paper's main figure."""
    names = ["no prompt", "start", "learned", "neutral text", "shuffled text"]
    check_alike(lab.cases)
    table = Table("Perplexity", "model", "bits a weight", "MB", *names, "learned, change in nats")
    found = []
    done = set()                                        # folders: runs share the dense model
    labels = apart([case.label for case in lab.cases], lab.cases)
    for compressed, case in zip(labels, lab.cases):
        for which in ("dense", "compressed"):
            folder = case.place(which)
            if folder and folder not in done:
                done.add(folder)
                losses = {name: lab.losses(case, which, prompt, case.measured())
                          for name, prompt in lab.behind(case, which).items()}
                label = "dense" if which == "dense" else compressed
                row = case.rows[which]
                found.append((row["linear_bits_per_weight"], label, row["megabytes"], losses))
    for bits, label, size, losses in sorted(found, key=lambda f: f[:2]):
        shift = change(losses["learned"], losses["no prompt"])
        numbers = {name: ppl(losses[name]) for name in names}
        table.add(label, f"{bits:.2f}", f"{size:.2f}", *(show(v) for v in numbers.values()), shift,
                  bits=bits, megabytes=size, perplexity=numbers)
    says = []
    for name in ("no prompt", "learned"):
        front = []
        best = math.inf
        for row in sorted(table.values, key=lambda r: (r["bits"], r["perplexity"][name][0])):
            if row["perplexity"][name][0] < best:
                best = row["perplexity"][name][0]
                front.append(f"{row['row']} ({row['bits']:.2f} bits, {best:.2f})")
        behind = "without a prompt" if name == "no prompt" else "behind the learned prompt"
        says.append(f"Worth its bytes {behind}, as no smaller model is as good: "
                    f"{', '.join(front)}.")
    rows = [(f"{row['row']}: {row['bits']:.2f} bits",
             [row["perplexity"]["no prompt"], row["perplexity"]["learned"]])
            for row in table.values]
    publish(lab, "levels", [table], says, dot_plot(
        "Perplexity by real bits a weight, masks and grids counted", "lower is better", rows,
        [("no prompt", HURT), ("learned prompt", HEALED)], log=True))


def check_alike(cases: list[Case]) -> None:
    """ValueError unless runs can be ranked: of one dense model, measured and taught alike."""
    def asked(case: Case) -> dict[str, str]:
        keys = ("data", "seqlen", "max_tokens", "seed")
        if case.settings.steps:
            keys += ("kind", "objective", "prompt_tokens", "prompt_init", "train_data", "lr",
                     "batch_size", "val_windows")
        keys += ("steps",)
        dense = case.dense and case.dense.resolve()
        return {"--dense": dense, **{flag(key): getattr(case.settings, key) for key in keys}}
    first = asked(cases[0])
    for case in cases[1:]:
        for name, value in asked(case).items():
            if value != first[name]:
                raise ValueError(f"one table ranks runs that differ in compression alone: "
                                 f"{cases[0].folder.name} has {name} {first[name]}, "
                                 f"{case.folder.name} {value}")


def apart(names: list[str], cases: list[Case]) -> list[str]:
    """The names, with the folder of the run where two are the same."""
    return [f"{name}, {case.folder.name}" if names.count(name) > 1 else name
            for name, case in zip(names, cases)]


def recipes(lab: Lab) -> None:
    """What the compressed model loses to the dense one, before and behind a prompt of each kind and
    objective: what is healed is the difference; the rest of a prompt's gain is adaptation."""
    table = Table("Perplexity, and the gap between compressed and dense in nats a token", "prompt",
                  "text", "dense", "compressed", "+ start", "+ learned", "dense + learned",
                  "gap without", "gap with prompts", "healed", "gained, of the gap")
    rows = []
    seeds = {case.settings.seed for case in lab.cases}
    models = {case.label for case in lab.cases}
    names = []
    for case in lab.cases:
        name = f"{case.settings.kind}, {case.settings.objective}"
        name += f", seed {case.settings.seed}" if len(seeds) > 1 else ""
        name += f", {case.label}" if len(models) > 1 else ""
        names.append(name)
    for name, case in zip(apart(names, lab.cases), lab.cases):
        for label, (_, measure) in lab.texts(case).items():
            tokens = case.measured(measure)
            losses = {name: lab.losses(case, which, prompt, tokens)
                      for name, (which, prompt) in lab.controls(case).items() if "text" not in name}
            before = losses["compressed"] - losses["dense"]
            after = losses["+ learned"] - losses["dense + learned"]
            healed = spread(before - after)
            gained = losses["compressed"] - losses["+ learned"]
            recovered = 100 * float(gained.mean() / before.mean())
            numbers = {key: ppl(value) for key, value in losses.items()}
            gaps = spread(before), spread(after)
            table.add(name, label, *(show(v) for v in numbers.values()),
                      *(show(v, ".3f") for v in gaps), change(before, after), f"{recovered:.0f}%",
                      text=label, perplexity=numbers, gap_without=gaps[0], gap_with=gaps[1],
                      healed=healed, recovered=recovered)
            rows.append((f"{name}, {label}", list(gaps)))
    publish(lab, "recipes", [table], [], dot_plot(
        "Gap between compressed and dense, nats a token", "lower is better", rows,
        [("without prompts", HURT), ("both behind a prompt learned alike", HEALED)]))


def transfer(lab: Lab) -> None:
    """Prompts learned on one text, level or type of compression, read by all others: the change in
    nats against no prompt."""
    first = lab.cases[0]
    texts = lab.texts(first)
    stems = {}
    for learn, measure in texts.values():
        if stems.setdefault(Path(learn).stem, learn) != learn:
            raise ValueError(f"--texts learns on {stems[Path(learn).stem]} and on {learn}, which "
                             f"one table would call alike: rename one")
        if lab.args.texts and learn == measure and not has_splits(learn):
            raise ValueError(f"{learn} is a file, which has no splits: name the text to learn on "
                             f"and the one to measure on, --texts LEARN:MEASURE")
    by_text = {Path(learn).stem: lab.learned(first, "compressed", learn)
               for learn, _ in texts.values()}
    tables = []
    rows = []

    def matrix(title: str, prompts: dict, targets: dict) -> None:
        """A table of prompts {name: prompt} on targets {name: (case, text to measure on)}."""
        table = Table(f"{title}: change in nats a token", "learned on", *targets)
        for source, prompt in prompts.items():
            cells = {}
            for target, (case, measure) in targets.items():
                tokens = case.measured(measure)
                base = lab.losses(case, "compressed", None, tokens)
                cells[target] = spread(lab.losses(case, "compressed", prompt, tokens) - base)
                rows.append((f"{source} → {target}", [cells[target]]))
            table.add(source, *map(show_change, cells.values()), cells=cells)
        tables.append(table)

    def kind(case: Case) -> tuple[bool, bool, bool]:
        """(is it quantized, pruned in a pattern, pruned at all)"""
        sparsity = str(case.made["sparsity"])
        in_pattern = ":" in sparsity
        return case.made["bits"] < 16, in_pattern, in_pattern or float(sparsity) > 0
    matrix("Texts", by_text, {text: (first, measure) for text, (_, measure) in texts.items()})
    same = [case for case in lab.cases if kind(case) == kind(first)]
    types = {kind(case): case for case in reversed(lab.cases)}.values()
    for title, cases in (("Levels", same), ("Types", sorted(types, key=lab.cases.index))):
        if len(cases) > 1:
            check_alike(cases)
            labels = apart([case.label for case in cases], cases)
            matrix(title, {label: lab.learned(case, "compressed")
                           for label, case in zip(labels, cases)},
                   {label: (case, None) for label, case in zip(labels, cases)})
    says = ["Learned on the row, read by the column; below zero is better than no prompt, a star "
            "marks what the interval tells from zero."]
    publish(lab, "transfer", tables, says, dot_plot(
        "Change of the loss by a prompt from elsewhere, nats a token", "lower is better", rows,
        [("learned on → read by", HEALED)]))


def length(lab: Lab) -> None:
    """Positions of a prompt: perplexity of both models, time of reading and writing, bytes."""
    case = lab.cases[0]
    tokens = case.measured()
    rows = []
    table = Table("Perplexity by the number of positions", "positions", "compressed + start",
                  "compressed + learned", "dense + learned", "prefill, ms", "decode, ms a token",
                  "cache, KB")
    asked = (lab.args.lengths or "10,25,50,100,200").split(",")
    if not all(n.isdecimal() and int(n) for n in asked):
        raise ValueError(f"--lengths {lab.args.lengths} is not numbers of positions parted by "
                         f"commas")
    longest = open_checkpoint(case.compressed).config.max_positions - case.settings.seqlen
    too_long = [n for n in asked if int(n) > longest]
    if too_long and lab.args.lengths:
        raise ValueError(f"--lengths {','.join(too_long)}: beside windows of "
                         f"{case.settings.seqlen} tokens this model has room for {longest}")
    for n in [0, *(int(n) for n in asked if n not in too_long)]:
        start = learned = control = None
        if n:
            start = lab.start(case, "compressed", n)
            learned = lab.learned(case, "compressed", n=n)
        if n and case.dense:
            control = lab.learned(case, "dense", n=n)
        losses = [lab.losses(case, "compressed", prompt, tokens) for prompt in (start, learned)]
        if case.dense:
            losses.append(lab.losses(case, "dense", control, tokens))
        made_of = {**lab.made_of(case, "compressed", learned), "seqlen": case.settings.seqlen,
                   "machine": describe_machine(case.settings.device)}
        cost = lab.keep("seconds", made_of, lambda: seconds(lab, case, learned))
        numbers = [ppl(values) for values in losses]
        table.add(str(n), *(show(v) for v in numbers), *([] if case.dense else [""]),
                  f"{1e3 * cost['prefill']:.1f}", f"{1e3 * cost['decode']:.2f}",
                  f"{cost['bytes'] / 1e3:.0f}", perplexity=numbers, **cost)
        rows.append((f"{n} positions", numbers[1:]))
    series = [("compressed", HURT), ("dense, a prompt learned alike", DENSE)]
    says = [f"Prefill: the prompt and {case.settings.seqlen - WRITTEN} tokens of text; decoding: a "
            f"token behind them; the best of three."]
    publish(lab, "length", [table], says, dot_plot(
        "Perplexity behind a learned prompt", "lower is better", rows, series[:len(rows[0][1])]))


WRITTEN = 19                                        # tokens of which the last 16 are timed


@torch.no_grad()
def seconds(lab: Lab, case: Case, prompt) -> dict:
    """Seconds of reading prompt and text, and a token of writing behind them; bytes of the prompt's
    keys and values. The first steps are left out: on a GPU they record the others."""
    model = lab.model(case, "compressed")
    device = case.settings.device
    text = case.measured()[:case.settings.seqlen - WRITTEN]
    prefill = []                                        # seconds, of every try
    writing = []

    def now() -> float:
        """When all is done that was asked for: a GPU is behind."""
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    for _ in range(3):
        began = now()
        model.hidden(*with_prompt(model, prompt, text[None].to(device)))
        prefill.append(now() - began)
        steps = decode(model, [text.tolist()], WRITTEN, prompt=prompt)
        for _ in range(WRITTEN - 16):
            next(steps)
        began = now()
        for _ in steps:
            pass
        writing.append((now() - began) / 16)
    c = model.config
    held = 0 if prompt is None else len(prompt) * c.n_layer * 2 * c.n_kv_head * c.head_dim
    return {"prefill": min(prefill), "decode": min(writing),
            "bytes": held * DTYPES[case.settings.dtype].itemsize}


def hard(lab: Lab) -> None:
    """Prompts in words: does a compressed model use what they say, or only their being there?"""
    case = lab.cases[0]
    models = [which for which in ("compressed", "dense") if case.place(which)]
    tokens = case.measured()
    tasks = lab.items(case)
    heads = [f"{which}, {what}" for which in models for what in ("perplexity", "change")]
    heads += [f"{task}: {what}" for task in tasks
              for what in (metric_of(task), "turned right, wrong", "p")]
    table = Table("Perplexity, change in nats a token, and answers that a prompt in words changes",
                  "prompt", *heads)
    texts = Table("Greedy continuations of the compressed model", "prompt", "first", "second")
    rows = []
    for name in ["no prompt", *HARD, "neutral, as long", "the paper's, shuffled", "learned"]:
        cells = []
        numbers = {}
        for which in models:
            losses = lab.losses(case, which, in_words(lab, case, which, name), tokens)
            moved = spread(losses - lab.losses(case, which, None, tokens))
            numbers[which] = {"perplexity": ppl(losses), "change": moved}
            cells += [show(numbers[which]["perplexity"]), show_change(moved)]
        prompt = in_words(lab, case, models[0], name)
        for task, items in tasks.items():
            got = lab.answers(case, models[0], prompt, items, task)
            base = lab.answers(case, models[0], None, items, task)
            numbers[task], shown = show_answers(got, base)
            cells += shown
        table.add(name, *cells, numbers=numbers)
        rows.append((name, [numbers[which]["change"] for which in models]))
        made_of = {**lab.made_of(case, models[0], prompt), "tokens": fingerprint(tokens)}
        pair = lab.keep("texts", made_of,
                        lambda: continued(lab, case, models[0], prompt, tokens))
        texts.add(name, *(" ".join(text.split()) for text in pair), texts=pair)
    publish(lab, "hard", [table, texts], [], dot_plot(
        "Change of the loss by a prompt in words, nats a token", "lower is better", rows,
        list(zip(models, (HURT, DENSE)))))


def in_words(lab: Lab, case: Case, which: str, name: str) -> torch.Tensor | None:
    """The prompt of one row of `hard`."""
    if name in HARD:
        return lab.words(case, which, HARD[name])
    if name == "the paper's, shuffled":
        return lab.words(case, which, HARD_PROMPT, shuffled=True)
    if name == "neutral, as long":
        return lab.words(case, which, NEUTRAL, len(case.tokenizer.encode(HARD_PROMPT, bos=False)))
    return lab.learned(case, which) if name == "learned" else None


def continued(lab: Lab, case: Case, which: str, prompt, tokens: torch.Tensor) -> list[str]:
    """24 tokens that follow the first 32 of two windows."""
    count = len(tokens) // 32
    windows = tokens[:32 * count].view(count, 32)
    texts = [case.tokenizer.decode(windows[k].tolist()) for k in (0, count // 2)]
    made = ["", ""]
    for i, piece in generate(lab.model(case, which), case.tokenizer, texts, 24, prompt=prompt):
        made[i] += piece
    return made


def robust(lab: Lab) -> None:
    """Text from elsewhere, and text that is damaged, with and without the prompt. In nats a
    character: damaged text takes more tokens."""
    case = lab.cases[0]
    tokens = case.measured()
    texts = {label: case.measured(measure) for label, (_, measure) in lab.texts(case).items()}
    text = case.tokenizer.decode(tokens.tolist())
    for how in ("typos", "dropped", "swapped", "upper case", "lower case"):
        texts[f"{Path(case.settings.data).stem}, {how}"] = torch.tensor(
            case.tokenizer.encode(corrupted(text, how)))
    controls = lab.controls(case)
    table = Table("Nats a character", "text", *controls, "learned, change")
    rows = []
    for label, tokens in texts.items():
        a_character = tokens_a_character(case, tokens)
        losses = {name: lab.losses(case, which, prompt, tokens) * a_character
                  for name, (which, prompt) in controls.items()}
        numbers = {name: spread(value) for name, value in losses.items()}
        table.add(label, *(show(v, ".3f") for v in numbers.values()),
                  change(losses["+ learned"], losses["compressed"]), nats_a_character=numbers)
        rows.append((label, [numbers["compressed"], numbers["+ learned"]]))
    publish(lab, "robust", [table], [], dot_plot(
        "Nats a character on other and on damaged text", "lower is better", rows,
        [("compressed", HURT), ("+ learned prompt", HEALED)]))


def tokens_a_character(case: Case, tokens: torch.Tensor) -> torch.Tensor:
    """Of each window's scored tokens: (windows,) float64."""
    s = case.settings
    scored = cut(tokens, s.seqlen, s.batch_size)[:, 1:]
    characters = [len(case.tokenizer.decode(window.tolist())) for window in scored]
    return scored.shape[1] / torch.tensor(characters, dtype=torch.float64)


def tasks(lab: Lab) -> None:
    """Zero-shot accuracy of all controls; McNemar's test against the compressed model."""
    case = lab.cases[0]
    asked = lab.items(case)
    controls = lab.controls(case)
    heads = [f"{task}{what}" for task, items in asked.items()
             for what in (f", {metric_of(task)} of {len(items)} items", ": turned right, wrong",
                          ": p")]
    table = Table("Accuracy, and answers that differ from the compressed model's", "model", *heads)
    rows = []
    for name, (which, prompt) in controls.items():
        cells = []
        numbers = {}
        for task, items in asked.items():
            got = lab.answers(case, which, prompt, items, task)
            base = lab.answers(case, *controls["compressed"], items, task)
            numbers[task], shown = show_answers(got, base)
            cells += shown
        table.add(name, *cells, tasks=numbers)
        rows += [(f"{name}: {task}" if len(asked) > 1 else name, [v["acc"]])
                 for task, v in numbers.items()]
    publish(lab, "tasks", [table], [], dot_plot("Accuracy", "higher is better", rows,
                                                [("accuracy", HEALED)]))


def main(args) -> None:
    for name, studies in USES.items():
        if getattr(args, name) is not None and args.study not in studies:
            raise ValueError(f"--{name} does nothing in study {args.study}: leave it out")
    # runs/* names the studies' own folder too
    own = Path(args.out).resolve()
    args.runs = [run for run in args.runs
                 if Path(run).resolve() != own or (Path(run) / "report.json").exists()] or args.runs
    if args.study in ONE_RUN and len(args.runs) > 1:
        raise ValueError(f"study {args.study} takes one RUN, not {len(args.runs)}")
    lab = Lab(args)
    if args.study != "levels" and not all(case.compressed for case in lab.cases):
        raise ValueError(f"study {args.study} compares compressed models: a RUN has none")
    if args.study in ("recipes", "tasks") and not all(case.dense for case in lab.cases):
        raise ValueError(f"study {args.study} compares with the dense model: run train.py with "
                         f"--dense FOLDER")
    studies = (levels, recipes, transfer, length, hard, robust, tasks)
    by_name = {study.__name__: study for study in studies}
    by_name[args.study](lab)


if __name__ == "__main__":
    run_program(main, args, after_interrupt=lambda: f"stopped; what is done is in {args.out}: the "
                                                    f"same command goes on")
