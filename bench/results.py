"""RESULTS.md from runs: what is missing is run, and the tables go between their marks.

    python -m bench.results --folder runs/results              # the tiny models: two hours, once
    python -m bench.results --folder runs/results --smollm2 FOLDER --texts FOLDER   # SmolLM2 too
    python -m bench.results --folder runs/results --check      # run nothing, write nothing

A command's output is kept in --folder as NAME.log, and how it was made (command, commit, machine,
seconds) in NAME.json: a killed run goes on, and a command that was changed is run again. RESULTS.md
holds <!-- part: NAME --> and <!-- end -->; what is between them is from here, all else was written
by hand. A part whose runs are not in --folder stays as it is. --check says which parts differ.
"""
import argparse
import csv
import itertools
import json
import math
import re
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple

from data.checkpoint import read_json, write_atomic, write_json
from study import commit
from train import describe_machine

ROOT = Path(__file__).resolve().parents[1]
BAR = re.compile(r"[#-]{20} \d+/\d+")                          # of a progress bar

# Flags that several commands share.
TINY = ("--max-tokens 8192 --steps 40 {}--nsamples 64 --allocation uniform --dtype float32 "
        "--device cpu --batch-size 4")
PACKED, PRUNED = TINY.format("--fused off "), TINY.format("")
WIKI = "--data {texts}/wikitext2/wiki.test.raw --dtype bfloat16 --device cpu"
WIKI_FP32 = WIKI.replace("bfloat16", "float32")
VALID = "{texts}/wikitext2/wiki.valid.raw"
CALIBRATED = f"--calib {VALID} --nsamples {{nsamples}} --seqlen 512 --max-tokens 40960"
CALIBRATED_32 = CALIBRATED.replace("{nsamples}", "32")
CALIBRATED_256 = CALIBRATED.replace("{nsamples}", "256")
TAUGHT = ("--dense {smollm2} --seqlen 256 --max-tokens 8192 --batch-size 1 --steps 100 "
          f"--val-windows 4 --fused off {WIKI}")
LONGER_TAUGHT = ("--dense {smollm2} --kind prefix --seqlen 512 --max-tokens 40960 --steps 200 "
                 f"--fused off --train-data {VALID} {WIKI}")
ELSEWHERE = f" --texts {VALID}:{{texts}}/wikitext2/wiki.test.raw,ptb,c4 --data-dir {{texts}}"


class Family(NamedTuple):
    """Runs of one program that differ in a few values. `{name}` in a command is one of them, or a
    folder: {out} where the runs are, {smollm2}, {texts}."""
    name: str                           # of one run, with its values in it
    command: str                        # what follows `python`
    values: dict[str, tuple] = {}
    without: tuple[str, ...] = ()       # names of runs that are not wanted

    def members(self) -> list[dict]:
        """{name: value} of every run."""
        products = itertools.product(*self.values.values())
        every = [dict(zip(self.values, picked)) for picked in products]
        return [member for member in every if fill(self.name, member) not in self.without]

    def shown(self) -> str:
        """The command as a reader types it, and which values it was run with."""
        capitals = {name: name.upper() for name in (*self.values, "smollm2", "texts")}
        line = fill(f"python {self.command}", {**capitals, "out": "FOLDER"})
        if self.command.startswith("train.py"):
            line += " --out FOLDER/" + fill(self.name, capitals)
        notes = [f"{name.upper()} {', '.join(map(str, picked))}"
                 for name, picked in self.values.items()]
        if self.without:
            notes.append(f"without {', '.join(self.without)}")
        return f"`{line}` ({'; '.join(notes)})" if notes else f"`{line}`"


class Part(NamedTuple):
    """A table of RESULTS.md and the runs that it is made of."""
    families: list[Family]
    table: Callable[[Path], str]        # of the folder of runs


def fill(text: str, values: dict) -> str:
    """text with every {name} replaced that values has."""
    for name, value in values.items():
        text = text.replace("{" + name + "}", str(value))
    return text


# -------------------------------------------------------------------------------------------------
# Tables.

def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table whose first line is head."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def study_table(name: str, folder: str) -> Callable[[Path], str]:
    """The tables that study.py wrote."""
    def table(out: Path) -> str:
        text = (out / folder / f"{name}.md").read_text(encoding="utf-8")
        body = text.split("\n", 1)[1]                           # behind the title
        return body[:body.rindex("\n`python study.py")].strip()
    return table


def printed(name: str) -> Callable[[Path], str]:
    """What a command printed, as it stands, but for where folders are."""
    def table(out: Path) -> str:
        lines = (out / f"{name}.log").read_text(encoding="utf-8").splitlines()
        shown = [line.replace(str(out), "FOLDER") for line in lines if not BAR.search(line)]
        shown = [re.sub(r"(?<!\S)/\S*/", "", line) for line in shown]
        return "\n".join(f"    {line}".rstrip() for line in shown)
    return table


def rows_of(out: Path, name: str) -> dict[str, dict]:
    """{name: row} of a run's table, with the seconds that its making took."""
    seconds = read_json(out / name / "seconds.json")
    rows = read_json(out / name / "report.json")["rows"]
    return {row["name"]: {**row, "seconds": seconds[row["name"]]["making"]} for row in rows}


def layer_errors(out: Path, name: str) -> tuple[float, float]:
    """(error, error_heldout), relative, means over the Linears of a run."""
    layers = read_json(out / name / "report.json")["layers"]
    error = statistics.mean(layer["error"] for layer in layers)
    return error, statistics.mean(layer["error_heldout"] for layer in layers)


def several(values: list[float], digits: int = 2) -> str:
    """The geometric mean, and the values of all seeds, if more than one, in brackets."""
    mean = math.exp(statistics.mean(map(math.log, values)))
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ({', '.join(f'{v:.{digits}f}' for v in values)})"


def calibration_table(out: Path) -> str:
    """A row a number of calibration tokens, three columns a model; means over the seeds."""
    models = CALIBRATION.values["model"]
    seeds = CALIBRATION.values["seed"]
    head = ["tokens"]
    for model in models:
        head += [f"{model}, perplexity", "error of a Linear", "held out"]
    rows = []
    for count in CALIBRATION.values["nsamples"]:
        row = [f"{256 * count:,}"]                              # windows of 256 tokens
        for model in models:
            runs = [fill(CALIBRATION.name, {"model": model, "seed": seed, "nsamples": count})
                    for seed in seeds]
            row.append(several([rows_of(out, run)["compressed"]["perplexity"] for run in runs]))
            for errors in zip(*(layer_errors(out, run) for run in runs)):
                row.append(f"{statistics.mean(errors):.4f}")
        rows.append(row)
    return markdown(head, rows)


def side_by_side(family: Family, flag: str, heads: list[str]) -> Callable[[Path], str]:
    """A row a model and text: dense, and compressed with each value of a flag; means over seeds."""
    def table(out: Path) -> str:
        rows = []
        for model, data in itertools.product(*(family.values[k] for k in ("model", "data"))):
            runs = [[rows_of(out, fill(family.name, {"model": model, "data": data, flag: value,
                                                     "seed": seed}))
                     for seed in family.values.get("seed", (0,))]
                    for value in family.values[flag]]
            row = [model, data, f"{runs[0][0]['dense']['perplexity']:.2f}"]
            for alike in runs:                                  # but for the seed
                row.append(several([run["compressed"]["perplexity"] for run in alike]))
            rows.append(row)
        return markdown(["model", "text", "dense", *heads], rows)
    return table


def smollm2_table(out: Path) -> str:
    """Every level of bits and sparsity, below the dense model."""
    head = ["bits", "sparsity", "bits a weight in Linears", "MB", "compressed", "made, s",
            "error of a Linear", "held out"]
    rows = []
    for member in SMOLLM2.members():
        name = fill(SMOLLM2.name, member)
        found = rows_of(out, name)
        if not rows:
            megabytes, perplexity = level_of(found["dense"])
            rows.append(["16", "0", "16", megabytes, perplexity, "", "", ""])
        row = found["compressed"]
        error, heldout = layer_errors(out, name)
        rows.append([str(member["bits"]), member["sparsity"],
                     f"{row['linear_bits_per_weight']:.2f}", *level_of(row),
                     f"{row['seconds']:,.0f}", f"{error:.4f}", f"{heldout:.4f}"])
    return markdown(head, rows)


def level_of(row: dict) -> tuple[str, str]:
    """(megabytes, perplexity) of a run's row as they are shown."""
    return f"{row['megabytes']:.1f}", f"{row['perplexity']:.2f}"


HEALED_HEAD = ["compressed", "made, s", "healed", "healing, s", "MB"]


def healed_cells(runs: list[dict[str, dict]]) -> list[str]:
    """HEALED_HEAD's cells of the rows of runs that differ in the seed: means."""
    cells = []
    for name in ("compressed", "compressed + healed"):
        cells.append(several([run[name]["perplexity"] for run in runs]))
        cells.append(f"{statistics.mean(run[name]['seconds'] for run in runs):,.0f}")
    return [*cells, f"{runs[0]['compressed']['megabytes']:.1f}"]


def healed_levels_table(out: Path) -> str:
    """Compressed and healed, by bits and sparsity."""
    rows = []
    for member in HEALED_LEVELS.members():
        run = rows_of(out, fill(HEALED_LEVELS.name, member))
        rows.append([str(member["bits"]), member["sparsity"], *healed_cells([run])])
    return markdown(["bits", "sparsity", *HEALED_HEAD], rows)


def healed_table(out: Path) -> str:
    """Compressed and healed, by the number of calibration windows and of steps."""
    rows = []
    for count in HEALED.values["nsamples"]:
        runs = [rows_of(out, fill(HEALED.name, member)) for member in HEALED.members()
                if member["nsamples"] == count]
        rows.append([str(count), "64", *healed_cells(runs)])
    rows.append(["256", "128", *healed_cells([rows_of(out, HEALED_LONGER.name)])])
    dense = f"{runs[0]['dense']['perplexity']:.2f}"
    return f"Dense: {dense}.\n\n" + markdown(["windows", "steps", *HEALED_HEAD], rows)


def elsewhere_table(out: Path) -> str:
    """A row a model, a column a text: perplexity, and its ratio to the dense model's."""
    def read(name: str) -> float:
        lines = (out / f"{name}.log").read_text(encoding="utf-8").splitlines()
        return json.loads(lines[-1])["perplexity"]

    texts = READ.values["data"]
    dense = [read(fill(DENSE_READ.name, {"data": text})) for text in texts]
    rows = [["dense", *(f"{perplexity:.2f}" for perplexity in dense)]]
    for run in READ.values["run"]:
        found = [read(fill(READ.name, {"run": run, "data": text})) for text in texts]
        rows.append([CALIBRATED_HOW[run],
                     *(f"{a:.2f}, {a / b:.2f} x" for a, b in zip(found, dense))])
    return markdown(["50% + 4-bit, calibrated on", *texts], rows)


LONGER_HEAD = ["objective", "dense", "compressed", "+ start", "+ learned", "learning, s",
               "dense + learned", "gap without", "gap with prompts"]


def longer_cells(found: dict[str, dict], objective: str) -> list[str]:
    """LONGER_HEAD's cells of a run's rows: without and with a prompt, and the gap to the dense
    model behind a prompt learned alike."""
    ppl = {row: found[row]["perplexity"] for row in found}
    shown = [f"{ppl[row]:.2f}" for row in ("dense", "compressed", "compressed + initial prompt",
                                           "compressed + learned prompt")]
    learned = found["compressed + learned prompt"]
    gaps = [f"{math.log(ppl['compressed'] / ppl['dense']):.3f}", ""]
    control = ppl.get("dense + learned prompt")
    if control:
        gaps[1] = f"{math.log(learned['perplexity'] / control):.3f}"
    return [objective, *shown, f"{learned['seconds']:,.0f}",
            f"{control:.2f}" if control else "", *gaps]


def longer_table(out: Path) -> str:
    """A row a compressed model and objective."""
    few, many = "calibrated on 32 windows", "calibrated on 256 windows, and healed"
    rows = [[label, *longer_cells(rows_of(out, name), objective)]
            for label, objective, name in ((few, "next", LONGER.name),
                                           (many, "next", LONGER_HEALED.name),
                                           (few, "kl", fill(LONGER_KL.name, {"seed": 0})))]
    return markdown(["50% + 4-bit", *LONGER_HEAD], rows)


def rewritten_table(out: Path) -> str:
    """Compressed on windows and rewritten ones, and healed: means of both seeds."""
    runs = [rows_of(out, fill(REWRITTEN.name, member)) for member in REWRITTEN.members()]
    return markdown(["windows", "steps", *HEALED_HEAD], [["32", "64", *healed_cells(runs)]])


def rewritten_prompts_table(out: Path) -> str:
    """A row a seed of the calibration windows: a prefix behind which the model is healed."""
    rows = [[str(member["seed"]),
             *longer_cells(rows_of(out, fill(REWRITTEN_KL.name, member)), "kl")]
            for member in REWRITTEN_KL.members()]
    return markdown(["calibration seed", *LONGER_HEAD], rows)


def gpu_table(_: Path) -> str:
    """What a day on a GPU left in bench/h200.csv."""
    with open(ROOT / "bench/h200.csv", newline="", encoding="utf-8") as f:
        lines = list(csv.DictReader(f))
    machine = next(line for line in lines if line["kind"] == "machine")
    copied = next(float(line["value"]) for line in lines if line["kind"] == "copy")
    rows = []
    for line in lines:
        if line["kind"] == "product":
            packed, fp16 = float(line["value"]), float(line["fp16"])
            int4 = f"{1e6 * float(line['int4']):.1f}" if line["int4"] else ""
            rows.append([line["case"], f"{1e6 * packed:.1f}", f"{1e6 * fp16:.1f}", int4,
                         f"{fp16 / packed:.2f} x"])
    head = ["weight, format, grid, tokens", "packed, us", "fp16, us", "torch's int4, us",
            "fp16 / packed"]
    models = [f"- {line['case']}: {line['value']}" for line in lines if line["kind"] == "model"]
    about = (f"`python -m bench.kernels --minutes 1.75 --out FILE` on one {machine['case']}, "
             f"{machine['value']}; a copy moves {copied / 1e12:.2f} TB/s. All checks beside float64 "
             f"passed first. Whole models have LLaMA-7B's shape, random weights in fp16; no seed.")
    return "\n".join([markdown(head, rows), "", *models, "", about])


# -------------------------------------------------------------------------------------------------
# Parts, in the order of RESULTS.md.

ONE = Family("4bit-0.5", f"train.py {PACKED} --control")
LEVELS = Family(
    "{bits}bit-{sparsity}",
    f"train.py {PACKED} --bits {{bits}} --sparsity {{sparsity}} --no-control",
    {"bits": (2, 3, 4), "sparsity": ("0", "0.5", "0.625", "0.75", "2:4")},
    without=("4bit-0.5",))                                      # ONE
ONLY_PRUNED = Family(
    "16bit-{sparsity}", f"train.py {PRUNED} --bits 16 --sparsity {{sparsity}} --no-control",
    {"sparsity": ("0.5", "0.625", "0.75", "2:4")})
CALIBRATION = Family(
    "{model}-{nsamples}-{seed}",
    "train.py --model {model} --nsamples {nsamples} --seed {seed} --allocation uniform --steps 0 "
    "--max-tokens 16384 --dtype float32 --device cpu",
    {"model": ("tiny-llama", "tiny-opt"), "nsamples": (32, 64, 128, 256, 512, 1024),
     "seed": (0, 1)})
RECONSTRUCTED = Family(
    "{model}-{data}-{passes}-passes",
    "train.py --model {model} --data {data} --reconstruct {passes} --allocation uniform --steps 0 "
    "--max-tokens 16384 --dtype float32 --device cpu",
    {"model": ("tiny-llama", "tiny-opt"), "data": ("docs", "headers", "code"), "passes": (0, 2)})
ALLOCATED = Family(
    "{model}-{data}-{allocation}",
    "train.py --model {model} --data {data} --allocation {allocation} --steps 0 "
    "--max-tokens 16384 --dtype float32 --device cpu",
    {"model": ("tiny-llama", "tiny-opt"), "data": ("docs", "headers", "code"),
     "allocation": ("uniform", "fisher")})
REREAD = Family(
    "{model}-{data}-{rewrite}-rewritten",
    "train.py --model {model} --data {data} --nsamples 32 --rewrite {rewrite} --steps 0 "
    "--max-tokens 16384 --dtype float32 --device cpu",
    {"model": ("tiny-llama", "tiny-opt"), "data": ("docs", "headers", "code"), "rewrite": (0, 4)})
CORRECTED = Family(
    "{model}-{data}-{correct}-{seed}-corrected",
    "train.py --model {model} --data {data} --correct {correct} --seed {seed} --steps 0 "
    "--max-tokens 16384 --dtype float32 --device cpu",
    {"model": ("tiny-llama", "tiny-opt"), "data": ("docs", "headers", "code"),
     "correct": (0, 0.6, 1), "seed": (0, 1)})
SMOLLM2 = Family(
    "smollm2-{bits}bit-{sparsity}",
    f"train.py --model {{smollm2}} {CALIBRATED_32} {WIKI} --steps 0 --heal 0 --bits {{bits}} "
    f"--sparsity {{sparsity}}",
    {"bits": (4, 3), "sparsity": ("0.5", "0.625", "2:4", "0")},
    without=("smollm2-3bit-0.5", "smollm2-3bit-0.625", "smollm2-3bit-2:4"))
HEALED = Family(
    "smollm2-healed-{nsamples}-{seed}",
    f"train.py --model {{smollm2}} {CALIBRATED} {WIKI} --steps 0 --heal 64 --seed {{seed}}",
    {"nsamples": (32, 256), "seed": (0,)})
HEALED_LONGER = Family(
    "smollm2-healed-256-0-longer",
    f"train.py --model {{smollm2}} {CALIBRATED_256} {WIKI} --steps 0 --heal 128 --seed 0")
HEALED_LEVELS = Family(
    "smollm2-healed-{bits}bit-{sparsity}",
    f"train.py --model {{smollm2}} {CALIBRATED_32} {WIKI} --steps 0 --heal 64 --bits {{bits}} "
    f"--sparsity {{sparsity}}",
    {"bits": (4, 3), "sparsity": ("0.625", "2:4", "0")},
    without=("smollm2-healed-3bit-0.625", "smollm2-healed-3bit-2:4"))
REWRITTEN = Family(
    "smollm2-rewritten-{seed}",
    f"train.py --model {{smollm2}} {CALIBRATED_32} {WIKI_FP32} --steps 0 --heal 64 --rewrite 3 "
    "--seed {seed}",
    {"seed": (0, 1)})
REWRITTEN_WALK = Family(
    "smollm2-rewritten-walk-{seed}",
    f"train.py --model {{smollm2}} {CALIBRATED_32} {WIKI_FP32} --steps 0 --heal 0 --rewrite 3 "
    "--seed {seed}",
    {"seed": (1,)})
CALIBRATED_ON_C4 = Family(
    "smollm2-c4",
    "train.py --model {smollm2} --calib c4 --data-dir {texts} --nsamples 32 --seqlen 512 "
    f"--max-tokens 40960 {WIKI} --steps 0 --heal 0")
READING = ("--data {data} --data-dir {texts} --seqlen 512 --max-tokens 20480 --dtype bfloat16 "
           "--device cpu --json")
DENSE_READ = Family("smollm2-on-{data}", f"eval.py {{smollm2}} {READING}",
                    {"data": ("wikitext2", "ptb", "c4")})
CALIBRATED_HOW = {"4bit-0.5": "WikiText-2, 32 windows", "c4": "C4, 32 windows",
                  "healed-256-0": "WikiText-2, 256 windows, and healed"}
READ = Family("smollm2-{run}-on-{data}", f"eval.py {{out}}/smollm2-{{run}}/compressed {READING}",
              {"run": tuple(CALIBRATED_HOW), **DENSE_READ.values})
PROMPTS = Family(
    "{kind}-{objective}-{seed}",
    f"train.py --model {{out}}/smollm2-4bit-0.5/compressed --control --kind {{kind}} "
    f"--objective {{objective}} --seed {{seed}} --train-data {VALID} {TAUGHT}",
    {"kind": ("embedding", "prefix"), "objective": ("next", "kl"), "seed": (0, 1)},
    without=("embedding-kl-0", "embedding-kl-1"))
ON_HEALED = Family(
    "healed-{kind}-{objective}",
    f"train.py --model {{out}}/smollm2-healed-32-0/compressed --control --kind {{kind}} "
    f"--objective {{objective}} --train-data {VALID} {TAUGHT}",
    {"kind": ("prefix",), "objective": ("next", "kl")})
ON_C4 = Family(
    "prefix-kl-c4",
    "train.py --model {out}/smollm2-4bit-0.5/compressed --control --kind prefix --objective kl "
    f"--train-data c4 --data-dir {{texts}} {TAUGHT}")
ON_OTHERS = Family(
    "embedding-4bit-{sparsity}",
    f"train.py --model {{out}}/smollm2-4bit-{{sparsity}}/compressed --train-data {VALID} {TAUGHT}",
    {"sparsity": ("0.625", "2:4", "0")})
LONGER = Family(
    "longer-prefix",
    f"train.py --model {{out}}/smollm2-4bit-0.5/compressed {LONGER_TAUGHT}")
LONGER_HEALED = Family(
    "longer-prefix-healed",
    f"train.py --model {{out}}/smollm2-healed-256-0/compressed {LONGER_TAUGHT}")
LONGER_KL = Family(
    "longer-prefix-kl-{seed}",
    f"train.py --model {{out}}/smollm2-4bit-0.5/compressed --objective kl --control "
    f"--seed {{seed}} {LONGER_TAUGHT}",
    {"seed": (0,)})
REWRITTEN_KL = Family(
    "longer-prefix-kl-rewritten-{seed}",
    f"train.py --model {{out}}/smollm2-rewritten-walk-{{seed}}/compressed --objective kl --control "
    f"{LONGER_TAUGHT.replace(WIKI, WIKI_FP32)}",
    {"seed": (1,)})
EXPORTED = Family("tiny-llama-hf", "export.py tiny-llama --to hf {out}/tiny-llama-hf")
BESIDE_PEFT = Family(
    "prompts",
    "-m bench.prompts {out}/tiny-llama-hf --windows 4x256 --steps 20")
SMOLLM2_BESIDE_PEFT = Family(
    "prompts-smollm2",
    "-m bench.prompts {smollm2} --windows 2x1024 4x512 8x256 16x128 --steps 3 --dtype bfloat16")
WALK = Family(
    "walk",
    "-m bench.walk --shape llama-7b --blocks 1 --nsamples 16 --seqlen 2048 --folder {out}/7b")


def study(name: str, runs: list[str], options: str, folder: str) -> Family:
    """One study over runs."""
    where = " ".join(f"{{out}}/{run}" for run in runs)
    return Family(f"{folder}-{name}", f"study.py {name} {where}{options} --out {{out}}/{folder}")


def names(*families: Family) -> list[str]:
    """Of all runs of the families."""
    return [fill(family.name, member) for family in families for member in family.members()]


def studied(name: str, families: list[Family], runs: list[str], options: str = "",
            folder: str = "study") -> Part:
    """A study over runs of the families, and the table that it writes."""
    return Part([*families, study(name, runs, options, folder)], study_table(name, folder))


TRANSFERRED = ["4bit-0.5", "4bit-0", "3bit-0.5", "4bit-0.625", "16bit-0.5", "4bit-2:4"]
PARTS = {
    "levels": studied("levels", [ONE, LEVELS, ONLY_PRUNED], names(ONE, LEVELS, ONLY_PRUNED)),
    "recipes": studied("recipes", [ONE], names(ONE)),
    "transfer": studied("transfer", [ONE, LEVELS, ONLY_PRUNED], TRANSFERRED),
    "length": studied("length", [ONE], names(ONE)),
    "hard": studied("hard", [ONE], names(ONE), " --limit 60"),
    "robust": studied("robust", [ONE], names(ONE)),
    "tasks": studied("tasks", [ONE], names(ONE), " --limit 60"),
    "calibration": Part([CALIBRATION], calibration_table),
    "rewriting": Part([REREAD], side_by_side(REREAD, "rewrite", ["without", "4 times"])),
    "correction": Part([CORRECTED],
                       side_by_side(CORRECTED, "correct", ["not corrected", "0.6", "1"])),
    "allocation": Part([ALLOCATED], side_by_side(ALLOCATED, "allocation", ["uniform", "fisher"])),
    "reconstruction": Part([RECONSTRUCTED],
                           side_by_side(RECONSTRUCTED, "passes", ["without", "2 passes"])),
    "prompt learning": Part([EXPORTED, BESIDE_PEFT], printed("prompts")),
    "smollm2": Part([SMOLLM2], smollm2_table),
    "smollm2 healed": Part([HEALED, HEALED_LONGER], healed_table),
    "smollm2 levels healed": Part([HEALED_LEVELS], healed_levels_table),
    "smollm2 rewritten": Part([REWRITTEN], rewritten_table),
    "smollm2 elsewhere": Part([SMOLLM2, HEALED, CALIBRATED_ON_C4, DENSE_READ, READ],
                              elsewhere_table),
    "smollm2 prompts": studied("recipes", [SMOLLM2, HEALED, PROMPTS, ON_HEALED],
                               names(PROMPTS, ON_HEALED), folder="study-smollm2"),
    "smollm2 longer": Part([SMOLLM2, HEALED, LONGER, LONGER_HEALED, LONGER_KL], longer_table),
    "smollm2 rewritten prompts": Part([REWRITTEN_WALK, REWRITTEN_KL], rewritten_prompts_table),
    "smollm2 c4": studied("recipes", [SMOLLM2, ON_C4], names(ON_C4), ELSEWHERE,
                          folder="study-smollm2-c4"),
    "smollm2 prompt learning": Part([SMOLLM2_BESIDE_PEFT], printed("prompts-smollm2")),
    "smollm2 transfer": studied("transfer", [SMOLLM2, PROMPTS, ON_OTHERS],
                                ["embedding-next-0", *names(ON_OTHERS)], ELSEWHERE,
                                folder="study-smollm2"),
    "walk": Part([WALK], printed("walk")),
    "gpu": Part([], gpu_table),
}
LONG = tuple(name for name in PARTS if name.startswith("smollm2")) + ("walk",)   # with --smollm2


# -------------------------------------------------------------------------------------------------
# Running, and writing.

def perform(family: Family, member: dict, folders: dict[str, str]) -> None:
    """Run a command unless it has run; a killed run of train.py is continued. folders: {name in a
    command: folder}."""
    out = Path(folders["out"])
    name = fill(family.name, member)
    command = fill(family.command, member)
    note = out / f"{name}.json"
    if has_run(note, command):
        return
    words = shlex.split(fill(command, folders))
    if words[0] == "train.py":
        # a note is of another command; without one the run was killed, or not begun
        words += ["--out", str(out / name), "--overwrite" if note.exists() else "--resume"]
        note.unlink(missing_ok=True)
    print(f"python {shlex.join(words)}", flush=True)
    log = out / f"{name}.log"
    start = time.time()
    with open(log, "w", encoding="utf-8") as file:
        done = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=file,
                              stderr=subprocess.STDOUT)
    if done.returncode:
        raise ValueError(f"python {shlex.join(words)} failed: read {log}")
    write_json(note, {"command": command, "commit": commit(), "machine": describe_machine("cpu"),
                      "seconds": time.time() - start})


def has_run(note: Path, command: str) -> bool:
    """Was this very command run to its end?"""
    return note.exists() and read_json(note)["command"] == command


def part_text(name: str, out: Path) -> str | None:
    """What stands between the marks of a part, or None where something has not run. Commands that
    an earlier part has shown are not shown again."""
    part = PARTS[name]
    if not part.families:                                       # measured elsewhere, in a file
        return part.table(out)
    order = list(PARTS)
    earlier = [PARTS[other] for other in order[:order.index(name)]]
    shown = [family for other in earlier for family in other.families]
    new = [family for family in part.families if family not in shown]
    notes = []                                                  # of the runs that are shown here
    for family in part.families:
        for member in family.members():
            note = out / f"{fill(family.name, member)}.json"
            if not has_run(note, fill(family.command, member)):
                return None
            if family in new:
                notes.append(read_json(note))
    commands = [f"- {family.shown()}" for family in new]
    where = ", ".join(sorted({f"commit {n['commit']}, {n['machine']}" for n in notes}))
    took = f"{sum(n['seconds'] for n in notes) / 60:,.0f} minutes in all"
    about = f"Seed 0 where none is named; {where}; {took}."
    return "\n".join([part.table(out), "", *commands, "", about])


def put(text: str, name: str, inside: str) -> str:
    """text with `inside` between the marks of a part. Raises ValueError if it has none."""
    marks = re.compile(rf"(<!-- part: {re.escape(name)} -->\n).*?(<!-- end -->)", re.S)
    if not marks.search(text):
        raise ValueError(f"RESULTS.md has no <!-- part: {name} --> ... <!-- end -->")
    return marks.sub(lambda m: f"{m[1]}\n{inside}\n\n{m[2]}", text)


def picked_parts(p: argparse.ArgumentParser, args: argparse.Namespace) -> list[str]:
    """Names of the parts to run: those asked for, or all that can run."""
    if not args.parts:
        return [name for name in PARTS if args.smollm2 or name not in LONG]
    picked = args.parts.split(",")
    unknown = [name for name in picked if name not in PARTS]
    if unknown:
        p.error(f"--parts: no part {unknown[0]}; choose from {', '.join(PARTS)}")
    return picked


def main() -> None:
    p = argparse.ArgumentParser(description="Run what RESULTS.md shows, and write its tables.")
    a = p.add_argument
    a("--folder", default="runs/results", help="folder of the runs (default runs/results)")
    a("--smollm2", metavar="FOLDER", help="SmolLM2-135M-Instruct; also runs what needs it")
    a("--texts", metavar="FOLDER", help="folder of the text sets wikitext2, ptb and c4")
    a("--parts", metavar="NAME,NAME,...", help=f"of {', '.join(PARTS)} (default: all that can run)")
    a("--check", action="store_true",
      help="run and write nothing; exit code 1 if a part differs")
    args = p.parse_args()
    if bool(args.smollm2) != bool(args.texts):
        p.error("--smollm2 and --texts belong together")
    picked = picked_parts(p, args)
    needy = [name for name in picked if name in LONG]
    if needy and not args.smollm2 and not args.check:
        p.error(f"--parts {needy[0]} needs --smollm2 and --texts")
    out = Path(args.folder).resolve()
    out.mkdir(parents=True, exist_ok=True)
    folders = {"out": out}
    if args.smollm2:
        folders["smollm2"] = Path(args.smollm2).resolve()
        folders["texts"] = Path(args.texts).resolve()
    path = ROOT / "RESULTS.md"
    differing = []
    for name in picked:
        if not args.check:
            for family in PARTS[name].families:
                for member in family.members():
                    perform(family, member, folders)
        text = path.read_text(encoding="utf-8")
        inside = part_text(name, out)
        if inside is None:
            print(f"{name}: not run in {out}")
            continue
        changed = put(text, name, inside).encode()
        if changed != text.encode():
            differing.append(name)
            if not args.check:
                write_atomic(path, lambda f: f.write(changed))
    how = "differs in" if args.check else "changed in"
    print(f"RESULTS.md: {how} {', '.join(differing) or 'nothing'}")
    sys.exit(bool(args.check and differing))


if __name__ == "__main__":
    main()
