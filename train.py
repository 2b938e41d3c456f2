"""Compress, then prompt (arXiv 2305.11186) as a program: compress -> heal -> prompt, measured after
each.

    python train.py --model llama-7b --bits 4 --sparsity 0.5

prunes half of the weights of a LLaMA or OPT checkpoint and quantizes the rest to 4 bits, block by
block (compress.py), tunes what is stored beside the codes (heal.py), learns a soft prompt on the
result (prompt.py), measures each step and prints one table. Everything lands in --out: compressed/
(load_model reads it; the healed model takes its place once it is complete), prompt.safetensors,
report.json. What is done is written when it is done; after a kill or Ctrl-C the same command with
--resume goes on. `torchrun --nproc-per-node N train.py ...` splits the windows over N processes.
Left out: splitting one model over several devices.
"""
from argparse import BooleanOptionalAction

from data.flags import PRECISIONS, Flags, flag, read_flags, real, run_program, say, whole

# Flags that do nothing with a --model that is compressed already.
COMPRESSION = ("bits", "sparsity", "groupsize", "sym", "recipe", "mask", "refits", "grid",
               "act_order", "static_groups", "descent", "true_sequential", "correct", "percdamp",
               "blocksize", "nsamples", "rewrite", "allocation", "reconstruct", "heal")
# Flags that do nothing with --bits 16.
GRIDS = ("groupsize", "sym", "grid", "act_order", "static_groups", "descent")
# Flags that do nothing with --sparsity 0.
MASKS = ("mask", "refits")
# Flags that do nothing with --steps 0.
PROMPT = ("lr", "train_data", "val_windows", "prompt_tokens", "prompt_init", "control", "kind",
          "objective", "prompt_recipe")
# Flags that never change the numbers.
NO_SETTINGS = ("out", "resume", "overwrite", "plan", "checkpointing")
HELD_OUT = 8                            # windows of the calibration text that only judge
MOST_AGAIN = 7                          # rewritten readings that healing has, as they take disk


def flags() -> Flags:
    """What can be asked for. A flag that was not given is None: `settle` says what it means."""
    p = Flags(description="Compress a LLaMA or OPT checkpoint, learn a soft prompt on it, and "
                          "print one table.")
    a = p.add_argument
    a("--model", default="tiny-llama",
      help="a checkpoint folder or a name such as llama-7b, opt-1.3b; a folder that is compressed "
           "already only gets a prompt")
    a("--dense", metavar="FOLDER",
      help="with a compressed --model: its dense model, for the table's first row")
    a("--out", help="folder for the compressed model, the prompt and the report (default "
                    "runs/MODEL-BITS-SPARSITY)")
    a("--resume", action="store_true", help="continue a run of the same settings that was cut off")
    a("--overwrite", action="store_true", help="clear what another run has left in --out")
    a("--plan", action="store_true", help="say what would be done, its memory and disk, and stop")
    a("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    a("--dtype", choices=PRECISIONS,
      help="of activations (default: 16 bits where the device multiplies them fast, else float32)")
    a("--seed", type=whole(0, 2**62),
      help="of the windows drawn and of the prompt's learning (default 0)")

    a = p.add_argument_group("compression").add_argument
    a("--bits", type=int, choices=[2, 3, 4, 8, 16],
      help="bits a weight kept; 16 does not quantize (default 4)")
    a("--sparsity",
      help="0, a fraction of weights to prune, or n:m, which keeps n of every m neighbours: 1:4 "
           "prunes three quarters (default 0.5)")
    a("--groupsize", type=groups, help="columns that share a grid; -1, the default: a whole row")
    a("--sym", action="store_true", default=None,
      help="grids symmetric around zero; offset grids always are")
    a("--recipe", choices=["plain", "best"],
      help="plain: SparseGPT and GPTQ as published; flags below change single steps (default "
           "best)")
    a("--mask", choices=["admm", "sparsegpt"], help="how weights to prune are found")
    a("--refits", type=whole(0, 1000), help="conjugate gradient iterations on the weights kept")
    a("--grid", choices=["minmax", "uniform", "offset", "auto"],
      help="auto: offset (no level on zero) if pruned, else uniform")
    a("--act-order", action=BooleanOptionalAction,
      help="quantize columns in order of falling Hessian diagonal")
    a("--static-groups", action="store_true", default=None,
      help="plain GPTQ with --act-order: groups stay neighbouring columns")
    a("--descent", type=whole(0, 1000), help="passes over the codes afterwards")
    a("--true-sequential", action=BooleanOptionalAction,
      help="groups of Linears inside a block one after the other")
    a("--correct", type=real(0, 1),
      help="aim at the dense model's outputs; 0: at its weights, 1: as far as the calibration "
           "text is long enough to tell where they are")
    a("--allocation", choices=["uniform", "fisher"],
      help="uniform: all groups of Linears with one input, such as q, k and v, are pruned alike; "
           "fisher: more where the dense model's loss feels it less, --sparsity on average "
           "(default fisher; uniform with n:m and --recipe plain)")
    a("--percdamp", type=real(0, 100), help="damping, as a share of the Hessian's diagonal")
    a("--blocksize", type=whole(1, 1 << 20),
      help="columns whose errors travel together (default 128)")
    a("--calib",
      help="calibration text: wikitext2, ptb, c4, docs, docstrings, code, headers, or a path, or "
           "several as a,b, which share the windows evenly (default c4; tiny models docs)")
    a("--nsamples", type=whole(1, 1 << 24), help="calibration windows (default 128)")
    a("--rewrite", type=whole(0, 1000), metavar="TIMES",
      help="read the calibration windows so many times more, with three tenths of their tokens "
           "drawn anew each time from the dense model's guesses: for where there is little text "
           "(default 0; healing does so by itself, see --heal)")
    a("--reconstruct", type=whole(0, 1000), metavar="PASSES",
      help="when attention or MLP is solved, so many passes over the windows move its weights, and "
           "half as many its grids, towards what the dense one gives (default 0: none)")
    a("--heal", type=whole(0, 10**7), metavar="STEPS",
      help="then tune grids (with --bits 16: the weights kept), norms and biases against the "
           "dense model on the same windows, in so many steps; from three passes over them on, "
           "all but the first read them rewritten (default 64; tiny models 0)")

    a = p.add_argument_group("measuring").add_argument
    a("--data",
      help="text the perplexity is measured on, likewise (default wikitext2; tiny models headers)")
    a("--data-dir", metavar="FOLDER", help="folder that holds the text sets")
    a("--seqlen", type=whole(2, 1 << 20),
      help="tokens a window, everywhere (default 2048, or 1024 where the model has no room for the "
           "prompt beside: LLaMA-1, OPT; tiny models 256)")
    a("--max-tokens", type=whole(2, 1 << 40),
      help="measure on the first so many tokens (default all; tiny models 32768)")
    a("--batch-size", type=whole(1, 4096),
      help="windows at a time, and a step of learning (default 4; tiny models 8)")
    a("--fused", choices=["on", "off"],
      help="off: unpack the compressed weights once, run ordinary Linears")

    a = p.add_argument_group("the prompt").add_argument
    a("--steps", type=whole(0, 10**7), help="learning steps (default 200); 0 skips the prompt")
    a("--lr", type=real(0, 1e3, above=True),
      help="peak learning rate (default: 0.35 x the embeddings' deviation; a prefix: 0.05 x that "
           "of its keys and values)")
    a("--train-data",
      help="text the prompt is learned on (default: the first of --calib; tiny models headers)")
    a("--val-windows", type=whole(0, 10**6),
      help="windows of it held out to choose the best prompt (default 8)")
    a("--prompt-tokens", type=whole(1, 1 << 20),
      help="length of the prompt (default 100; tiny models 50)")
    a("--prompt-init", choices=["text", "vocab", "random"],
      help="start from the text's first tokens, from tokens drawn at random, or from random "
           "numbers")
    a("--control", action=BooleanOptionalAction,
      help="learn a prompt on the dense model too (default: tiny models)")
    a("--checkpointing", action="store_true", default=None,
      help="recompute activations in backward passes, which saves memory and takes a third more "
           "time (default: where they would not fit)")
    a("--kind", choices=["embedding", "prefix"],
      help="embedding: what the first block reads, as in the paper (default); prefix: keys and "
           "values of every layer, from the dense model's own")
    a("--objective", choices=["next", "kl"],
      help="next: next-token loss, as in the paper (default); kl: the dense model's predictions "
           "of the same text")
    a("--prompt-recipe", choices=["ours", "paper"],
      help="paper: its code's own 30000 steps, batches of 2, seqlen, warm-up and rate, where no "
           "flag says otherwise (default ours)")
    return p


def groups(text: str) -> int:
    """A type for argparse: -1 or a width."""
    return -1 if text == "-1" else whole(1, 1 << 20)(text)


if __name__ == "__main__":
    # before torch is loaded: --help and wrong flags answer at once
    args = read_flags(flags())

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from compress import (RECIPES, Settings, allocate_streamed, allocates, check_batches, compress,
                      hold_out, learning_bytes, make_solver, mean_errors, plan)
from data import parallel
from data.checkpoint import read_json, read_safetensors, write_json, write_safetensors
from data.config import DEFAULTS, SHIPPED, packed_layers, resolve
from data.harvest import SETS as HARVESTED, harvest_name
from data.progress import Progress
from data.report import Report, check_place, identity
from data.text import (FILES as TEXT_SETS, calibration, eval_tokens, has_splits,
                       learning_windows, split_to_judge)
from data.tokenizer import copy_tokenizer, load_tokenizer
from eval import (DTYPES, default_device, default_dtype, fits, free_memory, last_states, locate,
                  perplexity, stored_dtype, streamed_perplexity, usable)
from heal import TOKENS_AT_ONCE as HEALED_AT_ONCE, heal, rewrite, save_healed
from model import Checkpoint, open_checkpoint, storage
from prompt import (PAPER, TOKENS_AT_ONCE, default_rate, fingerprint, initial_prompt, learn, owner,
                    save_prompt, spent, streamed_prefix, teacher_states, windows_at_once)
from sparsegpt import parse_sparsity


def settle(args) -> None:
    """Set what no flag has set, and refuse what does not go together: before any work."""
    folder = resolve(args.model)
    given = {name for name, value in vars(args).items() if value is not None and value is not False}
    for name, nothing in (("heal", 0), ("reconstruct", 0), ("rewrite", 0),
                          ("allocation", "uniform")):
        if getattr(args, name) == nothing:
            given.discard(name)                     # asks for nothing, as a --no-... does
    made = folder / "compressed"
    if (made / "config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"--model {args.model} is the folder of a run: its model is in {made}")
    args.packed = bool(packed_layers(folder))
    if args.resume and args.overwrite:
        raise ValueError("--resume and --overwrite exclude each other: the one continues what the "
                         "other clears")
    if args.packed:
        odd = [flag(name) for name in COMPRESSION if name in given]
        if odd:
            raise ValueError(f"--model {args.model} is compressed already, so {', '.join(odd)} "
                             f"cannot be applied: give the dense checkpoint, or leave them out to "
                             f"learn a prompt")
        if args.control and not args.dense:
            raise ValueError("--control learns a prompt on the dense model too: say where it is "
                             "with --dense FOLDER")
    elif args.dense:
        raise ValueError(f"--dense goes with a compressed --model, and {args.model} is dense: "
                         f"leave it out")
    size = defaults(args)
    settle_prompt(args)
    general = dict(bits=4, sparsity="0.5", groupsize=-1, sym=False, recipe="best",
                   static_groups=False, blocksize=128, rewrite=0, reconstruct=0, seed=0, fused="on",
                   val_windows=8, prompt_init="text", checkpointing=False)
    for name, value in {**general, **RECIPES[args.recipe or "best"], **size}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.allocation is None:
        by_loss = args.recipe == "best" and allocates(args.sparsity) and not args.packed
        args.allocation = "fisher" if by_loss else "uniform"
    solves = args.bits < 16 or parse_sparsity(args.sparsity)[0] > 0
    args.heal = 0 if args.packed or not solves else args.heal
    if args.nsamples < len(calibration_texts(args)):
        raise ValueError(f"--nsamples {args.nsamples} leaves some texts of --calib {args.calib} "
                         f"without a window: use more")
    learns_from_calib = args.train_data is None
    args.train_data = args.train_data or calibration_texts(args)[0]
    refuse_idle(args, given, learns_from_calib)
    say_what_was_seen(args)
    args.device = usable(args.device)
    args.dtype = args.dtype or default_dtype(args.device, stored_dtype(folder))
    if solves and not args.packed:
        Settings(args.true_sequential, args.correct, args.reconstruct).check()
    prunes = parse_sparsity(args.sparsity)[0] > 0
    if parse_sparsity(args.sparsity)[0] == 1:
        raise ValueError(f"--sparsity {args.sparsity} leaves no weights: use less than 1")
    if args.sym and (args.grid == "offset" or args.grid == "auto" and prunes):
        raise ValueError("--sym does nothing for offset grids, which are symmetric: leave it out, "
                         "or use --grid uniform")
    if args.out is None:
        name = re.sub(r"[^A-Za-z0-9.-]+", "-", str(args.model)).strip("-")
        setting = f"{args.bits}bit-{str(args.sparsity).replace(':', 'of')}"
        if args.packed:
            setting = "prompt"
        elif args.recipe != "best":
            setting += f"-{args.recipe}"
        args.out = f"runs/{name}-{setting}"
    inside, source = Path(args.out).resolve(), folder.resolve()
    if inside == source or inside in source.parents:
        raise ValueError(f"--model {args.model} lies inside --out {args.out}, which a run clears "
                         f"and writes: name another --out")
    if args.kind == "prefix" and args.steps and args.prompt_tokens == 1:
        raise ValueError("--kind prefix --prompt-tokens 1 has nothing to learn, as a prefix's "
                         "first position stays as it is: use more")
    if parallel.world() > 1 and args.batch_size % parallel.world():
        raise ValueError(f"--batch-size {args.batch_size} cannot be split over {parallel.world()} "
                         f"processes: use a multiple")
    if solves and not args.packed:
        check_batches(args.nsamples, args.batch_size)


def defaults(args) -> dict:
    """{flag: value} that suit the model. Of one that a run has compressed, texts as that run had
    them, and windows as long if they left room for a prompt."""
    made = locate(args.model)[1] if args.packed else {}
    is_tiny = {args.model, args.dense, made.get("model")} & set(SHIPPED)
    names = ["data", "calib", "train_data", "max_tokens", "data_dir"]
    names += ["seqlen"] if made.get("steps") else []
    found = {**DEFAULTS["tiny" if is_tiny else "large"],
             **{name: made[name] for name in names if made.get(name) is not None}}
    if args.packed:
        found["control"] = False                    # it is not known where the dense model is
    return found


def say_what_was_seen(args) -> None:
    """A file has no splits: where it is measured too, its perplexity says nothing of other text."""
    seen = {"compressed on": calibration_texts(args) if not args.packed else [],
            "learned from": [args.train_data] if args.steps else []}
    for how, texts in seen.items() if parallel.rank() == 0 else ():
        files = {Path(name).resolve() for name in texts}
        if not has_splits(args.data) and Path(args.data).resolve() in files:
            say(f"{args.data} is {how} and measured, a file without splits: what is measured says "
                f"nothing of other text")


def refuse_idle(args, given: set[str], learns_from_calib: bool) -> None:
    """ValueError for flags that were given and do nothing beside the others, which are settled."""
    rounds = not args.packed and args.bits < 16
    prunes = not args.packed and parse_sparsity(args.sparsity)[0] > 0
    solves = rounds or prunes
    learns = args.steps > 0
    texts = {args.data}
    if solves:
        texts |= set(calibration_texts(args))
    if learns:
        texts.add(args.train_data)
    calib_idle = not solves and not (learns and learns_from_calib)
    idle = [                            # (whether, flags, where they do nothing)
        (not learns, PROMPT, "with --steps 0"),
        (not learns and not args.heal, ("checkpointing",),
         "where neither a prompt is learned nor a model healed"),
        (not solves and not args.packed, (*COMPRESSION[2:], "fused", "control"),
         "with --bits 16 --sparsity 0"),
        (prunes and not rounds, (*GRIDS, "fused"), "with --bits 16"),
        (rounds and not prunes, MASKS, "with --sparsity 0"),
        (prunes and not rounds and args.mask == "admm", ("blocksize",),
         "with --bits 16 and --mask admm"),
        (args.groupsize == -1, ("static_groups",), "without --groupsize"),
        (not allocates(args.sparsity), ("allocation",), f"with --sparsity {args.sparsity}"),
        (calib_idle, ("calib",),
         "where nothing is compressed, as --train-data is what a prompt is learned from"),
        (not solves and len(calibration_texts(args)) > 1, ("calib",),
         "beyond its first text, where nothing is compressed"),
        (not solves and not learns, ("seed",),
         "where nothing is compressed and no prompt is learned"),
        (not texts & set(TEXT_SETS), ("data_dir",),
         f"where {', '.join(map(str, sorted(texts)))} is read")]
    for holds, names, why in idle:
        odd = [flag(name) for name in names if holds and name in given]
        if odd:
            does, it = ("does", "it") if len(odd) == 1 else ("do", "them")
            raise ValueError(f"{', '.join(odd)} {does} nothing {why}: leave {it} out")


def settle_prompt(args) -> None:
    """How the prompt is learned where no flag says so, and what needs the dense model."""
    paper = PAPER if args.prompt_recipe == "paper" else {}
    args.warmup = None                              # as `fit` has it
    args.clip = 1.0
    ours = {"kind": "embedding", "objective": "next", "prompt_recipe": "ours"}
    for name, value in {**ours, **paper}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if paper and args.steps < paper["steps"]:       # fewer steps: the same share of them
        args.warmup = max(1, args.steps * paper["warmup"] // paper["steps"])
    if args.packed and not args.dense:
        need = (("kind", "prefix", "starts from the dense model's keys and values"),
                ("objective", "kl", "learns from the dense model's predictions"))
        for name, value, what in need:
            if getattr(args, name) == value:
                raise ValueError(f"{flag(name)} {value} {what}: say where that model is with "
                                 f"--dense FOLDER")


def calibration_texts(args) -> list[str]:
    """The texts of --calib a,b."""
    return list(dict.fromkeys(args.calib.split(",")))


def settle_seqlen(args, checkpoint: Checkpoint) -> None:
    """Prompt and window must fit the model. Where no flag says how long a window is, it is 2048
    tokens, or the half, a quarter, ... of it that fits."""
    most = checkpoint.config.max_positions
    prompt = args.prompt_tokens if args.steps else 0
    if args.seqlen is None:
        args.seqlen = 2048
        while args.seqlen > 2 and args.seqlen + prompt > most:
            args.seqlen //= 2
    if args.seqlen + prompt > most:
        behind = f" behind a prompt of --prompt-tokens {prompt}" if prompt else ""
        raise ValueError(f"--seqlen {args.seqlen}{behind} needs {args.seqlen + prompt} positions, "
                         f"and {args.model} has {most}: use shorter ones")


def check_weights(checkpoint: Checkpoint) -> None:
    """ValueError for a weight that fp16, in which they are saved, cannot hold; reading finds NaN
    and Inf."""
    for name in Progress(list(checkpoint.keys), "looking at the weights"):
        w = checkpoint.tensor(name)
        low, high = torch.aminmax(w)                # no copy, as abs() would be
        largest = max(-float(low), float(high))
        if not largest <= 65504:
            raise ValueError(f"{checkpoint.place}: {name} holds {largest:g}, beyond float16, in "
                             f"which the compressed model is saved: this checkpoint cannot be "
                             f"compressed")


def describe_machine(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' * (threads > 1)}"


def check_dense(dense: Checkpoint, compressed: Checkpoint) -> None:
    """ValueError unless it is the dense model that a compressed one was made of. Compression leaves
    the embedding as it is, but for rounding."""
    if dense.packed:
        raise ValueError(f"--dense {dense.place} is compressed itself: name the dense model")
    for field in ("family", "vocab_size", "d_embed", "d_model", "n_layer", "n_head", "n_kv_head",
                  "d_ff"):
        theirs, ours = getattr(dense.config, field), getattr(compressed.config, field)
        if theirs != ours:
            raise ValueError(f"--dense {dense.place} has {field} {theirs}, {compressed.place} has "
                             f"{ours}: it was not made of that model")
    a, b = (c.tensor("embed_tokens.weight")[:1024].float() for c in (dense, compressed))
    if (a - b).norm() > 0.01 * a.norm():
        raise ValueError(f"--dense {dense.place} and {compressed.place} have other embeddings: it "
                         f"was not made of that model")


class Run:
    """The stages of one run; each finds in the report what is done already."""

    def __init__(self, args):
        self.args = args
        self.dtype = DTYPES[args.dtype]
        self.folder, self.out = resolve(args.model), Path(args.out)
        self.tokenizer = load_tokenizer(self.folder)
        self.checkpoint = open_checkpoint(self.folder)
        settle_seqlen(args, self.checkpoint)
        self.bits = None if args.bits == 16 else args.bits
        self.settings = Settings(args.true_sequential, args.correct, args.reconstruct)
        self.solve = None
        if not args.packed:
            steps = {name: getattr(args, name) for name in
                     ("mask", "refits", "grid", "act_order", "descent", "percdamp")}
            self.solve = make_solver(self.bits, args.sparsity, args.recipe, args.groupsize,
                                     args.sym, args.blocksize, args.static_groups, **steps)
        if parallel.rank() == 0:                    # it downloads what is not there,
            self.read_texts()
        parallel.wait()                             # and the others find it
        if parallel.rank() > 0:
            self.read_texts()
        # what the prompt is learned on, and the model that it came from, if that is known
        self.made = self.out / "compressed" if self.solve else self.folder
        self.dense = None if args.packed else self.folder
        if args.dense:
            self.dense = resolve(args.dense)
            check_dense(open_checkpoint(self.dense), self.checkpoint)
        self.name = "compressed" if self.solve or args.packed else "dense"

    def read_texts(self) -> None:
        """Tokens to measure on, calibration windows, and windows to learn from and to choose by."""
        a = self.args
        self.test = eval_tokens(self.tokenizer, a.data, split_to_judge(a.data), a.seqlen,
                                a.max_tokens, folder=a.data_dir)
        if self.solve:
            self.windows, self.heldout = self.calibration_windows()
        if a.steps:
            self.text, self.val, self.pool = learning_windows(
                self.tokenizer, a.train_data, a.seqlen, a.val_windows, a.seed, folder=a.data_dir)
            if a.objective == "kl":
                self.pool = self.pool[:a.steps * a.batch_size]  # more would never be read

    def calibration_windows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """--nsamples windows, evenly from every text of --calib, and HELD_OUT of the same texts in
        turn, one at least of each."""
        a, names = self.args, calibration_texts(self.args)
        judging = -(-HELD_OUT // len(names))
        windows, held = [], []
        for k, name in enumerate(names):
            n = a.nsamples // len(names) + (k < a.nsamples % len(names))
            drawn = calibration(self.tokenizer, name, "train", n + 4 * judging, a.seqlen, a.seed,
                                folder=a.data_dir)
            mine, others = hold_out(drawn, n, judging)
            windows.append(mine)
            held.append(others)
        return torch.cat(windows), torch.stack(held, 1).flatten(0, 1)

    def plan(self) -> str:
        a = self.args
        said = "plan: nothing to compress"
        model = self.dtype.itemsize * self.checkpoint.count()   # of what is learned on
        stays_packed = a.fused == "on" and not a.control        # nor is the dense one learned on
        if a.packed and stays_packed:
            model = sum(f.stat().st_size for f in self.folder.glob("*.safetensors"))
        states = 0                                  # of the dense model, that a prompt learns from
        if a.steps and a.objective == "kl":
            read = self.pool.numel() + self.val.numel()
            states = 2 * read * self.checkpoint.config.d_embed
        if self.solve:
            calib, heldout = self.windows.numel(), self.heldout.numel()
            taught = calib * (1 + self.rereadings()) + heldout if a.heal else 0
            planned = plan(self.checkpoint, calib * (1 + a.rewrite), a.batch_size * a.seqlen,
                           self.dtype, self.settings, self.bits, a.sparsity,
                           self.judges().numel(), taught, a.seqlen, a.allocation == "fisher",
                           a.groupsize, torch.device(a.device).type == "cuda")
            # of the calibration windows alone, while they are rewritten
            before = 2 * (calib + heldout) * self.checkpoint.config.d_embed if a.rewrite else 0
            disk = max(planned.disk, planned.model + states, before)
            planned = planned._replace(disk=disk)
            said = str(planned)
            if self.bits and stays_packed:
                model = planned.model
        elif states:
            said += f", {states / 1e9:.2f} GB on disk for the dense model's states"
        kinds = [heals for heals, steps in ((True, a.heal), (False, a.steps)) if steps]
        if kinds:
            most, least = (model + max(self.step_bytes(heals, recomputes) for heals in kinds)
                           for recomputes in (False, True))
            said += (f"; then {1.1 * most / 1e9:.2f} GB on the device for a step of healing or of "
                     f"the prompt, or {1.1 * least / 1e9:.2f} if activations are recomputed")
        return said

    def step_bytes(self, heals: bool, recomputes: bool) -> int:
        """What a step of healing, or of learning the prompt, holds beside the model."""
        a = self.args
        windows = windows_at_once(a.seqlen, a.device, HEALED_AT_ONCE if heals else TOKENS_AT_ONCE)
        tokens = min(a.batch_size, windows) * a.seqlen
        return learning_bytes(self.checkpoint.config, tokens, self.dtype.itemsize, heals,
                              recomputes, a.groupsize)

    def recomputes(self, heals: bool) -> bool:
        """Are activations recomputed in backward passes? Asked once the model is loaded."""
        a = self.args
        need, free = 1.1 * self.step_bytes(heals, False), free_memory(a.device)
        if not a.checkpointing and need > free:
            say(f"a step needs {need / 1e9:.2f} GB beside the model and {free / 1e9:.2f} are free: "
                f"activations are recomputed, as by --checkpointing")
        return a.checkpointing or need > free

    def judges(self) -> torch.Tensor:
        """Held-out windows that layers' errors are told on too: one for 16, which costs little."""
        return self.heldout[:max(1, self.args.nsamples // 16)]

    def flags(self) -> dict:
        """The flags that the numbers depend on. (Which of several like devices is none.)"""
        told = {k: v for k, v in vars(self.args).items() if k not in NO_SETTINGS}
        return {**told, "device": torch.device(self.args.device).type}

    def identity(self) -> dict:
        """What tells this run from others: its flags, the checkpoint's files, versions, texts, and
        the tokens that are read of them."""
        a = self.args
        names = {a.data, *(calibration_texts(a) if self.solve else []),
                 *([a.train_data] if a.steps else [])}
        texts = {name: harvest_name(name) for name in sorted(names & set(HARVESTED))}
        texts |= {name: Path(name).stat().st_size for name in sorted(names) if Path(name).is_file()}
        tokens = {f"of {a.data}": fingerprint(self.test)}
        if self.solve:
            tokens[f"of {a.calib} to compress on"] = fingerprint(self.windows, self.heldout)
        if a.steps:
            tokens[f"of {a.train_data} to learn from"] = fingerprint(self.pool, self.val)
        teacher = {"dense": identity(self.dense)} if a.dense else {}
        return {"settings": self.flags(), "texts": texts, "tokens": tokens,
                "checkpoint": identity(self.folder), **teacher,
                "versions": {"torch": torch.__version__, "python": platform.python_version()}}

    def measure(self, name: str, model, size: dict, prompt=None, making: float = 0.0) -> None:
        """One row of the table. model: a Transformer, or a Checkpoint to be run block by block."""
        start, a = time.monotonic(), self.args
        title = f"measuring: {name}"
        if isinstance(model, Checkpoint):
            ppl, count = streamed_perplexity(model, self.test, a.seqlen, a.batch_size, self.dtype,
                                             a.device, title)
        else:
            ppl, count = perplexity(model, self.test, a.seqlen, prompt, a.batch_size, title)
        positions = 0 if prompt is None else len(prompt)
        self.report.add(name, making, time.monotonic() - start, perplexity=ppl,
                        scored_tokens=count, prompt_tokens=positions, **size)

    def load(self, checkpoint: Checkpoint):
        return checkpoint.model(self.dtype, self.args.device, packed=self.args.fused == "on")

    def measure_made(self, name: str, making: float = 0.0) -> None:
        """A row for the compressed model as it is now."""
        checkpoint = open_checkpoint(self.made)
        self.measure(name, self.load(checkpoint), folder_storage(checkpoint), making=making)

    def measure_dense(self) -> None:
        if self.report.has("dense"):
            return
        checkpoint = open_checkpoint(self.dense)
        model = checkpoint
        if fits(checkpoint, self.dtype, self.args.device):
            model = checkpoint.model(self.dtype, self.args.device)
        self.measure("dense", model, storage(checkpoint.skeleton()))

    def make_compressed(self) -> None:
        if self.report.has("compressed"):
            return
        a, report = self.args, self.report
        spent_before = report.seconds.get("compressed", {}).get("making", 0.0)
        start = time.monotonic() - spent_before

        def note_time(i: int) -> None:
            """So that a run that is killed knows how long it took."""
            report.seconds["compressed"] = {"making": time.monotonic() - start, "measuring": 0.0}
            report.save()
        if parallel.rank() == 0:
            self.made.mkdir(parents=True, exist_ok=True)
            copy_tokenizer(self.folder, self.made)
        spent = {}
        shares = self.shares() if a.allocation == "fisher" else None
        windows = self.with_rewritten(a.rewrite)
        self.report.layers = compress(self.checkpoint, self.made, windows, self.solve,
                                      self.settings, a.batch_size, self.dtype, a.device,
                                      after_block=note_time, heldout=self.judges(), spent=spent,
                                      shares=shares)
        self.report.save()
        self.measure_made("compressed", time.monotonic() - start)
        self.report.seconds["compressed"].update(spent)
        self.report.save()

    def shares(self) -> dict[str, float]:
        """How much of every Linear to prune, found once: shares.json holds it for --resume."""
        a, path = self.args, self.out / "shares.json"
        if parallel.rank() == 0 and not path.exists():
            fraction = parse_sparsity(a.sparsity)[0]
            write_json(path, allocate_streamed(self.checkpoint, self.windows, fraction, self.dtype,
                                               a.device))
        return parallel.first_object(read_json(path) if parallel.rank() == 0 else None)

    def make_healed(self) -> None:
        """The row of the healed model. It is written beside compressed/, and takes its place when
        it is complete: from the moment on that the report holds its losses."""
        a, began, row = self.args, time.monotonic(), "compressed + healed"
        if not a.heal or self.report.has(row):
            return
        making = self.report.seconds.get(row, {}).get("making", 0.0)    # if only measuring is left
        healed, state = self.out / "healed", self.out / "heal.state"
        first = parallel.rank() == 0
        if not parallel.first_object("compressed" in self.report.losses):
            again = self.rereadings()
            windows = self.with_rewritten(again)
            teacher = self.teacher(windows, self.heldout)
            model = open_checkpoint(self.made).model(self.dtype, a.device)
            model.checkpointing = self.recomputes(heals=True)
            making = time.monotonic() - began
            got = heal(model, windows, self.heldout, teacher, a.heal, a.batch_size, seed=a.seed,
                       readings=1 + again, state=state, progress=Progress)
            parallel.wait()                             # all have read the state that is removed
            if first:
                save_healed(model, self.made, healed)
                copy_tokenizer(self.made, healed)
                making += spent(state)                  # by earlier calls too
            self.report.losses["compressed"] = {"training": got.losses, "validation": got.scores}
            self.report.seconds[row] = {"making": making, "measuring": 0.0}
            self.report.save()
            del model, teacher
        if first:
            if healed.exists():
                shutil.rmtree(self.made, ignore_errors=True)
                healed.rename(self.made)
            state.unlink(missing_ok=True)
            self.forget_teacher()                   # the prompt's reads other windows
        parallel.wait()
        self.measure_made(row, making)

    def rereadings(self) -> int:
        """How many rewritten readings of the calibration windows healing has: one for each pass
        after the first. Text that is read no more than twice is not so little: it is read as it
        is."""
        passes = -(-self.args.heal * self.args.batch_size // len(self.windows))
        return min(passes - 1, max(self.args.rewrite, MOST_AGAIN)) if passes > 2 else 0

    def with_rewritten(self, times: int) -> torch.Tensor:
        """The calibration windows, and behind them, so many times, as `rewrite` leaves them. Each
        is drawn once: files hold them until the run ends."""
        a, files = self.args, [self.out / "rewritten" / f"{k}.safetensors" for k in range(times)]
        missing = parallel.first_object([k for k in range(times) if not files[k].exists()])
        if missing:
            states, _ = self.teacher(self.windows, self.heldout)
            parallel.wait()                         # all have opened what the first removes
            if parallel.rank() == 0:
                head = open_checkpoint(self.dense).ends(self.dtype, a.device).unembed
                files[0].parent.mkdir(exist_ok=True)
                for k in Progress(missing, "rewriting the windows"):
                    drawn = rewrite(self.windows, states, head, a.seed + k)
                    write_safetensors(files[k], {"windows": drawn})
            del states
            parallel.wait()
            self.forget_teacher()
        found = [read_safetensors(file)["windows"] for file in files]
        return torch.cat([self.windows, *found])

    def learn_prompt(self, folder: Path, name: str, file: str) -> None:
        """Rows for the start of a prompt and for the learned one; the prompt is saved before it is
        measured."""
        a, path = self.args, self.out / file
        rows = f"{name} + initial prompt", f"{name} + learned prompt"
        state = path.with_suffix(".state")
        if all(self.report.has(row) for row in rows):
            if parallel.rank() == 0:
                state.unlink(missing_ok=True)
            return
        model = self.load(open_checkpoint(folder))
        size = self.report.size(name)
        start = initial_prompt(model, a.prompt_tokens, a.prompt_init, self.text, a.seed)
        if a.kind == "prefix":
            start = streamed_prefix(open_checkpoint(self.dense), start, self.dtype, a.device)
        if not self.report.has(rows[0]):
            self.measure(rows[0], model, size, start)
        began = time.monotonic()
        model.checkpointing = self.recomputes(heals=False)
        lr = a.lr or default_rate(model, start)
        teacher = self.teacher(self.pool, self.val) if a.objective == "kl" else None
        making = time.monotonic() - began
        got = learn(model, start, self.pool, self.val, a.steps, a.batch_size, lr, a.warmup, a.clip,
                    seed=a.seed, teacher=teacher, state=state, progress=Progress)
        if parallel.rank() == 0:
            told = {**self.flags(), "lr": lr, "val_loss": got.val_loss}
            if a.packed:                                # how it was compressed, its maker knows
                unknown = {*COMPRESSION, "calib"}
                told = {name: value for name, value in told.items() if name not in unknown}
            save_prompt(path, got.prompt, told, owner(model, self.tokenizer))
            making += spent(state)                      # by earlier calls too
        self.report.losses[file] = {"lr": lr, "training": got.losses,
                                    "validation": got.scores}
        self.measure(rows[1], model, size, got.prompt, making)
        if parallel.rank() == 0:
            state.unlink(missing_ok=True)

    def teacher(self, windows: torch.Tensor,
                val: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The dense model's last states of the windows to learn from and to choose by, if there are
        any, in out/teacher until this stage ends."""
        a, checkpoint = self.args, open_checkpoint(self.dense)
        ends = checkpoint.ends(self.dtype, a.device)

        def states(windows):
            if not len(windows):                    # --val-windows 0
                return None
            hidden = last_states(checkpoint, windows, a.batch_size, self.dtype, a.device)
            return teacher_states(ends, windows, self.out / "teacher", hidden=hidden)
        if parallel.rank() == 0:
            states(windows)
            states(val)
        parallel.wait()                             # the others find what the first has made
        return states(windows), states(val)

    def run(self) -> None:
        a = self.args
        begun = parallel.first_object(a.resume and (self.out / "report.json").exists())
        if self.solve and not begun and parallel.rank() == 0:   # before --overwrite clears anything
            check_place(self.out, a.resume or a.overwrite)
            check_weights(self.checkpoint)
        self.report = Quiet()
        if parallel.rank() == 0:
            self.report = Report(self.out, self.identity(), a.resume, a.overwrite)
        self.report.rows = parallel.first_object(self.report.rows)      # all skip what is done
        if self.dense:
            self.measure_dense()
        if self.solve:
            self.make_compressed()
            self.make_healed()
        elif a.packed and not self.report.has("compressed"):
            self.measure_made("compressed")
        if a.steps:
            self.learn_prompt(self.made, self.name, "prompt.safetensors")
            if a.control and self.name != "dense":  # how much of it is adaptation
                self.learn_prompt(self.dense, "dense", "prompt-dense.safetensors")
        self.forget_teacher()
        if parallel.rank() == 0:
            shutil.rmtree(self.out / "rewritten", ignore_errors=True)

    def forget_teacher(self) -> None:
        if parallel.rank() == 0:
            shutil.rmtree(self.out / "teacher", ignore_errors=True)


class Quiet(Report):
    """The report of a process that is not the first: it keeps rows, and writes nothing."""

    def __init__(self):
        self.rows, self.layers, self.losses, self.seconds = [], [], {}, {}

    def save(self) -> None:
        pass


def folder_storage(checkpoint: Checkpoint) -> dict:
    """Sizes of a model folder, its files as they are."""
    stored = sum(f.stat().st_size for f in checkpoint.place.glob("*.safetensors"))
    return storage(checkpoint.model(dtype=None), stored)


def how_to_continue(args) -> str:
    """What is printed when a run is stopped."""
    if parallel.rank():
        return "stopped"
    words = [w for w in sys.argv[1:] if w not in ("--resume", "--overwrite")]
    count = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    program = f"torchrun --nproc-per-node {count}" if count > 1 else "python"
    quoted = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return (f"stopped; what is done is in {args.out}; to continue: {program} train.py "
            f"{quoted([*words, '--resume'])}")


IF_MEMORY_ENDS = ("where that was healing or learning, --resume --checkpointing takes less and "
                  "loses nothing; else lower --batch-size or --seqlen, or take a smaller model")


def summary(run: Run) -> str:
    """What is printed at the end: the setting, the table, layers' errors, texts, and files."""
    a, report = run.args, run.report
    what = "compressed before" if a.packed else f"{a.bits} bits, sparsity {a.sparsity}"
    lines = ["", f"{a.model}, {a.data}, {report.rows[0]['scored_tokens']} scored tokens, seqlen "
                 f"{a.seqlen}, {what}, seed {a.seed}", report.table()]
    if report.layers:
        lines.append(f"{mean_errors(report.layers)}, relative, of what a Linear gives")
    lines += [text for text in report.run["texts"].values() if isinstance(text, str)]
    files = sorted(f.name for f in run.out.iterdir() if not f.name.startswith("."))
    return "\n".join([*lines, "", f"saved in {run.out}: {', '.join(files)}"])


def main(args) -> dict:
    args.device = parallel.start(args.device or default_device())
    settle(args)
    torch.manual_seed(args.seed)
    run = Run(args)
    if parallel.rank() == 0:
        print(f"{args.model}: {run.checkpoint.count() / 1e6:.1f} million weights, "
              f"{describe_machine(args.device)}, {args.dtype}\n{run.plan()}", flush=True)
    if args.plan:
        return {}
    run.run()
    if parallel.rank() == 0:
        print(summary(run))
    parallel.stop()
    return {"rows": run.report.rows}


if __name__ == "__main__":
    run_program(main, args, lambda: how_to_continue(args), IF_MEMORY_ENDS)
    parallel.end()
