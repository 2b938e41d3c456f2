"""Learning a soft prompt: ours beside PEFT's prompt tuning over transformers, all else equal.

    python -m bench.prompts FOLDER --windows 2x1024 4x512 16x128    # needs tests/requirements.txt

FOLDER is a dense checkpoint in the Hugging Face layout; 4x512 is a step of 4 windows of 512 tokens.
Each side runs in a process of its own, in turn, so that neither sees the other's memory: load, one
step that is not timed, --steps steps of AdamW. Printed: text tokens a second (the best of
--repeats), seconds a step, processor seconds a step (steadier beside other jobs), peak memory of
the process (on a GPU: of its allocator), and the first losses, which must agree: both sides score
text tokens 2 ... T behind the same prompt.
"""
import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from data.flags import PRECISIONS, sizes

ROOT = Path(__file__).resolve().parents[1]


def ours(args, windows: torch.Tensor):
    """A function of (count, bar) that takes `count` steps with prompt.py; the bar, see Timed, hears
    of every step and its loss."""
    from model import load_model
    from prompt import initial_prompt, learn
    model = load_model(args.model, getattr(torch, args.dtype), args.device)
    model.checkpointing = args.checkpointing
    start = initial_prompt(model, args.prompt_tokens, "text", windows.flatten())

    def steps(count: int, bar) -> None:
        learn(model, start, windows, None, count, args.windows[0][0], args.lr, warmup=1,
              val_every=count, progress=bar)
    return steps


def peft(args, windows: torch.Tensor):
    """The same with PEFT over transformers."""
    from peft import PromptTuningConfig, TaskType, get_peft_model
    from transformers import AutoModelForCausalLM
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    base = base.to(args.device)
    first = windows.flatten()[:args.prompt_tokens].to(args.device)
    start = base.get_input_embeddings()(first).detach()
    if args.checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=args.prompt_tokens)
    model = get_peft_model(base, config)
    model.prompt_encoder["default"].embedding.weight.data = start.float()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0)

    def steps(count: int, bar) -> None:
        size, _ = args.windows[0]
        g = torch.Generator().manual_seed(0)                    # as fit draws them
        order = torch.randperm(len(windows), generator=g)
        for step in bar(range(count), ""):
            batch = windows[order[step * size:(step + 1) * size]].to(args.device)
            labels = batch.clone()
            labels[:, 0] = -100                                 # PEFT scores it behind the prompt
            loss = model(input_ids=batch, attention_mask=torch.ones_like(batch), labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            opt.step()
            opt.zero_grad()
            bar.note(f"loss {loss.item():.3f}")
    return steps


class Timed:
    """Stands for a progress bar: notes the clock before every step and after the last, and what is
    shown beside it."""

    def __init__(self, device: str):
        self.device = device
        self.times = []                   # (seconds of the clock, of the processor)
        self.notes = []

    def __call__(self, items, title: str):
        self.items = items
        return self

    def __iter__(self):
        for item in self.items:
            self.mark()
            yield item
        self.mark()

    def mark(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        self.times.append((time.perf_counter(), time.process_time()))

    def note(self, text: str) -> None:
        self.notes.append(text)


def run_side(args) -> dict:
    """One side, in this process: {"seconds" a step, "cpu" seconds a step, "peak" bytes, "first"
    loss in words}."""
    size, tokens = args.windows[0]
    count = size * (args.steps + 1)
    g = torch.Generator().manual_seed(0)
    vocab = json.loads((Path(args.model) / "config.json").read_text())["vocab_size"]
    windows = torch.randint(0, vocab, (count, tokens), generator=g)
    timed = Timed(args.device)
    side = ours if args.side == "ours" else peft
    take_steps = side(args, windows)
    take_steps(args.steps + 1, timed)
    spans = zip(timed.times[1], timed.times[-1])                # the first step is not timed
    seconds, cpu = ((end - start) / args.steps for start, end in spans)
    if args.device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "cpu": cpu, "peak": peak, "first": timed.notes[0]}


def main(args) -> None:
    gpu = args.device.startswith("cuda")
    machine = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.model}, {args.dtype}, {machine}: windows of random tokens behind "
          f"{args.prompt_tokens} prompt tokens, {args.steps} steps timed"
          f"{', checkpointing' if args.checkpointing else ''}")
    print(f"{'windows':8s} {'':24s} {'tokens/s':>9s} {'s a step':>9s} {'CPU s':>9s} "
          f"{'peak, GB':>9s}   first step")
    for size, tokens in args.windows:
        compare(args, size, tokens)


def compare(args, size: int, tokens: int) -> None:
    """Both sides, for one shape of windows."""
    windows = f"{size}x{tokens}"
    results = {"peft": [], "ours": []}
    for _ in range(args.repeats):
        for side, held in results.items():
            command = [sys.executable, "-m", "bench.prompts", *sys.argv[1:], "--windows",
                       windows, "--side", side]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
            if done.returncode:
                reason = done.stderr.strip() or f"killed by signal {-done.returncode}"
                reason = reason.splitlines()[-1]
                raise SystemExit(f"error: {side} failed: {reason}")
            held.append(json.loads(done.stdout.splitlines()[-1]))
    best = {side: min(held, key=lambda r: r["seconds"]) for side, held in results.items()}
    for side, r in best.items():
        name = {"peft": "PEFT over transformers", "ours": "prompt.py"}[side]
        speed = size * tokens / r["seconds"]
        numbers = f"{speed:9.1f} {r['seconds']:9.2f} {r['cpu']:9.2f} {r['peak'] / 1e9:9.2f}"
        print(f"{windows:8s} {name:24s} {numbers}   {r['first']}")
    ours, theirs = best["ours"], best["peft"]
    print(f"{'':8s} {'ours / PEFT':24s} {theirs['seconds'] / ours['seconds']:.2f} x the tokens a "
          f"second, {theirs['cpu'] / ours['cpu']:.2f} x a processor second, "
          f"{ours['peak'] / theirs['peak']:.2f} x the memory", flush=True)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a = p.add_argument
    a("model", help="a dense checkpoint folder in the Hugging Face layout")
    a("--windows", nargs="+", type=sizes("windows x tokens, such as 4x512"), default=[(4, 512)],
      metavar="NxT", help="windows of a step x tokens of a window")
    a("--prompt-tokens", type=int, default=100)
    a("--steps", type=int, default=2)
    a("--repeats", type=int, default=1, help="runs of each side, in turn; the fastest counts")
    a("--lr", type=float, default=1e-3)
    a("--dtype", default="float32", choices=PRECISIONS)
    a("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a("--checkpointing", action="store_true", help="both sides recompute activations")
    a("--side", choices=["ours", "peft"], help=argparse.SUPPRESS)
    args = p.parse_args()
    print(json.dumps(run_side(args))) if args.side else main(args)
