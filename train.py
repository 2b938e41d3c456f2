"""Compress, then prompt (arXiv 2305.11186): load -> compress -> prompt -> evaluate -> save, as a program.

    python train.py --model llama-7b --bits 4 --sparsity 0.5

measures a LLaMA or OPT checkpoint, prunes half of its weights and quantizes the rest to 4 bits block by block (sparsegpt.py,
gptq.py), saves the compressed model, learns a soft prompt on it (prompt.py), measures again and prints one table.
Everything lands in --out: compressed/ (load_model reads it), prompt.safetensors, report.json. Every stage is saved before the
next begins. Left out: training on several GPUs.
"""
import argparse
import json
import platform
import shutil
import sys
import time
from pathlib import Path

import torch

from data.checkpoint import write_atomic
from data.config import SHIPPED, resolve
from data.progress import Progress
from data.text import calibration, eval_tokens
from data.tokenizer import load_tokenizer
from eval import DTYPES, fail, perplexity
from gptq import gptq, inverse_factor
from model import Transformer, load_model, save_model
from prompt import initial_prompt, learn, save_prompt
from sparsegpt import parse_sparsity, sparsegpt


def make_solver(args):
    """solve(W, H, U) -> Compressed, for the settings in args."""
    fraction, _, m = parse_sparsity(args.sparsity)
    if args.bits == 16 and not fraction:
        return None                                              # nothing to do
    bits = None if args.bits == 16 else args.bits
    if not fraction:
        return lambda W, H, U: gptq(W, H, bits, args.groupsize, args.sym, args.act_order, args.static_groups, args.percdamp,
                                    args.blocksize, None if args.act_order else U)
    if args.act_order or args.static_groups:
        raise ValueError("--act-order and --static-groups belong to quantization alone (--sparsity 0)")
    pattern = str(args.sparsity) if m else fraction
    return lambda W, H, U: sparsegpt(W, H, pattern, bits, args.groupsize, args.sym, args.percdamp, args.blocksize, U)


@torch.no_grad()
def compress(model: Transformer, windows: torch.Tensor, solve, percdamp: float = 0.01, true_sequential: bool = False,
             batch_size: int = 4) -> list[dict]:
    """Compress every Linear of every block in place; windows (N, T) int64 are the calibration text. Returns one dict a Linear.

    Block by block; what enters a block comes out of the compressed blocks before it. Linears that share an input share one
    Hessian and one factor. Plain: all four Hessians of a block come from its dense weights, then it runs once more,
    compressed. true_sequential: all windows go through the block together, group by group, and each group of Linears is
    compressed just before it is used, so that every Linear runs once and later groups see the earlier ones' errors."""
    device, dtype = model.embed_tokens.weight.device, model.embed_tokens.weight.dtype
    hs = [model.stem(model.embed(w.to(device))) for w in windows.split(batch_size)]        # (batch, T, d_model) each
    rope, stats = model.rope(0, windows.shape[1], device), []

    def accumulate(H, x):                                        # sum of x x^T in fp32; the caller divides
        x = x.reshape(-1, x.shape[-1]).float()
        return x.T @ x if H is None else H.addmm_(x.T, x)

    def solve_group(i, block, names, H):
        H = H / windows.numel()
        U = inverse_factor(H, percdamp)
        for name in names:
            linear = block.get_submodule(name)
            out = solve(linear.weight.float(), H, U)
            linear.weight.data = out.weight.half().to(dtype)     # what fp16 stores is what is measured
            stats.append({"name": f"blocks.{i}.{name}", "error": out.error, "sparsity": float(out.mask.float().mean())})

    bar = Progress(model.blocks, "compressing blocks")
    for i, block in enumerate(bar):
        if true_sequential:
            runs = [block.steps(h, rope) for h in hs]
            while True:
                names, hs = zip(*(next(run) for run in runs))
                if not names[0]:
                    break
                H = None
                for x in hs:
                    H = accumulate(H, x)
                solve_group(i, block, names[0], H)
        else:
            H = {}
            for h in hs:
                for names, x in block.steps(h, rope):
                    if names:
                        H[names] = accumulate(H.get(names), x)
                    if "mlp.down" in names:
                        break                                    # its output is not needed yet
            for names in H:
                solve_group(i, block, names, H[names])
            hs = [block(h, rope) for h in hs]
        bar.note(f"mean error {sum(s['error'] for s in stats) / len(stats):.4f}")
    return stats


def sizes(model: Transformer, stored: int | None = None) -> dict:
    """megabytes and bits per weight of the half-precision file; `stored` is a file's real size in bytes."""
    weights = sum(p.numel() for p in model.parameters())
    stored = 2 * weights if stored is None else stored
    return {"megabytes": stored / 1e6, "bits_per_weight": 8 * stored / weights, "linear_bits_per_weight": 16.0}


def table(rows: list[dict]) -> str:
    head = f"{'':30s} {'perplexity':>12s} {'MB':>9s} {'bits/weight':>12s} {'bits/weight, Linears':>21s} {'seconds':>9s}"
    return "\n".join([head] + [f"{r['name']:30s} {r['perplexity']:12.3f} {r['megabytes']:9.1f} {r['bits_per_weight']:12.2f} "
                               f"{r['linear_bits_per_weight']:21.2f} {r['seconds']:9.1f}" for r in rows])


def describe_machine(device: str) -> str:
    if str(device).startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def main(args) -> dict:
    torch.manual_seed(args.seed)
    folder, out, dtype = resolve(args.model), Path(args.out), DTYPES[args.dtype]
    solve = make_solver(args)                                    # bad settings fail before any work
    tiny = str(args.model) in SHIPPED
    calib, data = args.calib or ("docs" if tiny else "c4"), args.data or ("docs" if tiny else "wikitext2")
    train_data, seqlen = args.train_data or calib, args.seqlen or (256 if tiny else 2048)
    tokenizer = load_tokenizer(folder)
    test = eval_tokens(tokenizer, data, "validation" if data == "c4" else "test", seqlen, args.max_tokens, folder=args.data_dir)
    calib_windows = calibration(tokenizer, calib, "train", args.nsamples, seqlen, args.seed, folder=args.data_dir)
    out.mkdir(parents=True, exist_ok=True)
    settings = {**{k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}, "calib": calib, "data": data,
                "train_data": train_data, "seqlen": seqlen, "hardware": describe_machine(args.device),
                "python": platform.python_version(), "torch": torch.__version__, "calibration_tokens": calib_windows.numel()}
    rows = []

    def measure(name, model, prompt=None, size=None, since=None):
        t = time.monotonic()
        ppl, settings["scored_tokens"] = perplexity(model, test, seqlen, prompt, args.batch_size, f"measuring: {name}")
        extra = {"seconds": t - since if since else time.monotonic() - t, "prompt_tokens": 0 if prompt is None else len(prompt)}
        rows.append({"name": name, "perplexity": ppl, **(size or sizes(model)), **extra})
        text = json.dumps({"rows": rows, "settings": settings}, indent=1)
        write_atomic(out / "report.json", lambda f: f.write(text.encode()))

    model = load_model(folder, dtype, args.device)
    print(f"{args.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million weights, {settings['hardware']}, {args.dtype}")
    if args.steps:
        text = eval_tokens(tokenizer, train_data, "train", seqlen, folder=args.data_dir)
        pool = text[:len(text) // seqlen * seqlen].view(-1, seqlen)                       # windows that do not overlap
        pool = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(args.seed))]
        val, pool = pool[:args.val_windows], pool[args.val_windows:]
        if not len(pool):
            raise ValueError(f"{train_data} gives {len(text) // seqlen} windows of seqlen {seqlen}, and --val-windows {args.val_windows} "
                             f"takes them all: use more text or shorter windows")
    measure("dense", model)
    if solve:
        start = time.monotonic()
        stats = compress(model, calib_windows, solve, args.percdamp, args.true_sequential)
        save_model(model, out / "compressed")
        for f in folder.iterdir():                               # the tokenizer goes with the model
            if f.name.startswith(("tokenizer", "vocab.", "merges.", "special_tokens", "generation_config")):
                shutil.copyfile(f, out / "compressed" / f.name)
        settings["layers"] = stats
        kept = sizes(model, (out / "compressed/model.safetensors").stat().st_size)
        measure("compressed", model, size=kept, since=start)
    if args.steps:
        tune = DTYPES[args.tune_dtype]
        name, size = ("compressed", kept) if solve else ("dense", None)
        p0 = initial_prompt(model, args.prompt_tokens, args.prompt_init, pool[0], args.seed)
        measure(f"{name} + initial prompt", model, p0, size)
        start = time.monotonic()
        work = model if tune == dtype else load_model(out / "compressed" if solve else folder, tune, args.device)
        work.checkpointing = args.checkpointing
        got = learn(work, p0, pool, val, args.steps, args.batch_size, args.lr, seed=args.seed, progress=Progress)
        save_prompt(out / "prompt.safetensors", got.prompt, {**settings, "val_loss": got.val_loss, "layers": None})
        settings["prompt_losses"] = got.losses
        measure(f"{name} + learned prompt", model, got.prompt, size, since=start)
    print(f"\n{args.model}, {data}, {settings['scored_tokens']} scored tokens, seqlen {seqlen}, {args.bits} bits, sparsity {args.sparsity}, "
          f"seed {args.seed}\n{table(rows)}\n\nsaved in {out}: {', '.join(sorted(f.name for f in out.iterdir()))}")
    return {"rows": rows, "settings": settings}


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a = p.add_argument
    a("--model", default="tiny-llama", help="a checkpoint folder or a name such as llama-7b, opt-1.3b")
    a("--bits", type=int, default=4, choices=[2, 3, 4, 8, 16], help="bits a weight kept; 16 does not quantize")
    a("--sparsity", default="0.5", help="0, a fraction of weights to prune, or n:m such as 2:4")
    a("--groupsize", type=int, default=-1, help="columns that share a grid; -1: a whole row")
    a("--sym", action="store_true", help="grids symmetric around zero")
    a("--act-order", action="store_true", help="quantize columns in order of falling Hessian diagonal")
    a("--static-groups", action="store_true", help="with --act-order: groups stay neighbouring columns")
    a("--true-sequential", action="store_true", help="groups of Linears inside a block one after the other")
    a("--percdamp", type=float, default=0.01, help="damping, as a share of the Hessian's mean diagonal")
    a("--blocksize", type=int, default=128, help="columns whose errors travel together")
    a("--calib", help="calibration text: wikitext2, ptb, c4 or a path")
    a("--nsamples", type=int, default=128, help="calibration windows")
    a("--seqlen", type=int, help="tokens a window, everywhere (default 2048; tiny models 256)")
    a("--data", help="text the perplexity is measured on: wikitext2, ptb, c4 or a path")
    a("--data-dir", type=Path, help="folder that holds the text sets")
    a("--max-tokens", type=int, help="measure on the first so many tokens only")
    a("--train-data", help="text the prompt is learned on (default: --calib)")
    a("--val-windows", type=int, default=8, help="windows of it held out to choose the best prompt")
    a("--prompt-tokens", type=int, default=100)
    a("--prompt-init", default="text", choices=["text", "vocab", "random"])
    a("--steps", type=int, default=200, help="prompt learning steps; 0 skips the prompt")
    a("--batch-size", type=int, default=4, help="windows a step, and at a time when measuring")
    a("--lr", type=float, default=5e-3, help="peak learning rate (the paper: 1e-3, for 30,000 steps)")
    a("--tune-dtype", default="bfloat16", choices=DTYPES, help="precision of the frozen model while the prompt is learned")
    a("--checkpointing", action="store_true", help="recompute activations to save memory")
    a("--seed", type=int, default=0)
    a("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a("--dtype", default="float32" if not torch.cuda.is_available() else "float16", choices=DTYPES)
    a("--out", default="runs/out", help="folder for the compressed model, the prompt and report.json")
    try:
        main(p.parse_args())
    except (ValueError, FileNotFoundError) as e:
        fail(e)
