"""The walk at a published model's shape: memory and time of compressing it, block by block.

    python -m bench.walk --shape llama-7b --blocks 3 --nsamples 128 --seqlen 2048 --folder /tmp/7b

A checkpoint of that shape with --blocks blocks is written to --folder first, unless it is there:
the configuration is the real one, weights are random, a shard in fp16 each. Then the default recipe
compresses it on random tokens. For every block are printed its seconds and the largest memory that
the process held meanwhile: on Linux anonymous pages, which is all but mapped files, looked at 20
times a second; on a GPU also the allocator's peak. A block's memory is that of every other one, so
a few blocks tell what the whole model takes. `plan`'s figures, counted from shapes, are beside.
With --allocation fisher, train.py's default, a line goes before for what finds the shares.
"""
import argparse
import shutil
import threading
import time
from pathlib import Path

import torch
import torch.nn as nn

from compress import RECIPES, Settings, allocate_streamed, allocates, compress, make_solver, plan
from data.config import PUBLISHED, Config
from eval import DTYPES, default_device, default_dtype
from model import Block, open_checkpoint, save_index, save_shard, shard_path, skeleton_of


def config_of(name: str, blocks: int) -> Config:
    """The configuration of a published LLaMA with fewer blocks."""
    width, layers, heads, kv_heads, d_ff, vocab, _ = PUBLISHED[name]
    return Config("llama", vocab, width, min(blocks, layers), heads, d_ff, kv_heads, tied=False)


def randomize(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """A module on the meta device gets fp16 weights: norms of 1, all else normal, small enough that
    activations stay in range."""
    state = {}
    for name, p in module.named_parameters():
        shape = tuple(p.shape)
        state[name] = (torch.ones(shape) if "norm" in name else
                       torch.randn(shape, generator=generator).mul_(0.02)).half()
    module.load_state_dict(state, assign=True)
    return module


def make_checkpoint(folder: Path, config: Config) -> None:
    """Random weights of this shape, a shard for the ends and one a block."""
    g = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    ends = skeleton_of(config)
    ends.blocks = nn.ModuleList()
    save_shard(folder, randomize(ends, g), 0, config)
    for i in range(config.n_layer):
        with torch.device("meta"):
            block = Block(config)
        save_shard(folder, randomize(block, g), i + 1, config)
    save_index(folder, config)


class Memory:
    """The largest anonymous memory of this process, in bytes, since `peak` was asked for last."""

    def __init__(self):
        self.largest = 0
        threading.Thread(target=self.watch, daemon=True).start()

    def now(self) -> int:
        """Bytes of pages that no file backs."""
        with open("/proc/self/status") as f:
            kilobytes = [int(line.split()[1]) for line in f
                         if line.startswith(("RssAnon:", "RssShmem:"))]
        return 1024 * sum(kilobytes)

    def watch(self) -> None:
        while True:
            self.largest = max(self.largest, self.now())
            time.sleep(0.05)

    def peak(self) -> int:
        peak, self.largest = max(self.largest, self.now()), 0
        return peak


def main() -> None:
    p = argparse.ArgumentParser(description="Memory and time of the walk at a published shape.")
    p.add_argument("--shape", default="llama-7b",
                   choices=[name for name in PUBLISHED if name.startswith("llama")])
    p.add_argument("--blocks", type=int, default=3)
    p.add_argument("--nsamples", type=int, default=128)
    p.add_argument("--seqlen", type=int, default=2048)
    p.add_argument("--batch-size", type=int, default=4)
    p.add_argument("--bits", type=int, default=4)
    p.add_argument("--sparsity", default="0.5")
    p.add_argument("--allocation", choices=["uniform", "fisher"], default="uniform")
    p.add_argument("--recipe", choices=list(RECIPES), default="best")
    p.add_argument("--folder", type=Path, required=True, help="where the checkpoint is, or is put")
    p.add_argument("--device", default=default_device())
    p.add_argument("--dtype", choices=list(DTYPES))
    args = p.parse_args()
    if args.allocation == "fisher" and not allocates(args.sparsity):
        p.error(f"--allocation fisher does nothing with --sparsity {args.sparsity}")
    dtype = DTYPES[args.dtype or default_dtype(args.device)]
    memory = Memory()

    config = config_of(args.shape, args.blocks)
    if not (args.folder / "config.json").exists():
        make_checkpoint(args.folder, config)
    checkpoint = open_checkpoint(args.folder)
    if checkpoint.config != config:
        raise SystemExit(f"{args.folder} holds another checkpoint than {args.shape} of "
                         f"{args.blocks} blocks: name another --folder")
    recipe = RECIPES[args.recipe]
    settings = Settings(recipe["true_sequential"], recipe["correct"])
    solve = make_solver(args.bits, args.sparsity, args.recipe)
    windows = torch.randint(0, config.vocab_size, (args.nsamples, args.seqlen),
                            generator=torch.Generator().manual_seed(0))
    out = args.folder / "compressed"
    shutil.rmtree(out, ignore_errors=True)
    expected = plan(checkpoint, windows.numel(), args.batch_size * args.seqlen, dtype, settings,
                    args.bits, args.sparsity, seqlen=args.seqlen,
                    by_loss=args.allocation == "fisher",
                    pinned=torch.device(args.device).type == "cuda")
    print(f"{args.shape}, {args.blocks} blocks, {args.nsamples} x {args.seqlen} tokens, "
          f"{args.recipe}, {dtype}, {args.device}, {torch.get_num_threads()} threads\n{expected}",
          flush=True)

    on_gpu = torch.device(args.device).type == "cuda"
    started = time.monotonic()
    memory.peak()
    shares = None

    def told(what: str) -> None:
        nonlocal started
        device = f", {torch.cuda.max_memory_allocated() / 1e9:.2f} GB on the GPU" if on_gpu else ""
        print(f"{what}: {time.monotonic() - started:.0f} s, at most "
              f"{memory.peak() / 1e9:.2f} GB beside mapped files{device}", flush=True)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        started = time.monotonic()

    if args.allocation == "fisher":
        shares = allocate_streamed(checkpoint, windows, float(args.sparsity), dtype, args.device)
        told("allocation")
    stats = compress(checkpoint, out, windows, solve, settings, args.batch_size, dtype,
                     args.device, after_block=lambda i: told(f"block {i}"), shares=shares)
    size = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    error = sum(s["error"] for s in stats) / len(stats)
    print(f"mean layer error {error:.4f}; {size / 1e9:.2f} GB written, "
          f"{shard_path(out, 1, config.n_layer).stat().st_size / 1e9:.3f} GB a block")


if __name__ == "__main__":
    main()
