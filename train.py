"""Compress, then prompt (arXiv 2305.11186): load -> compress -> prompt -> evaluate -> save, as a program.

    python train.py --model llama-7b --bits 4 --sparsity 0.5

measures a LLaMA or OPT checkpoint, prunes half of its weights and quantizes the rest to 4 bits block by block (sparsegpt.py,
gptq.py), saves the compressed model, learns a soft prompt on it (prompt.py), measures again and prints one table.
Everything lands in --out: compressed/ (load_model reads it), prompt.safetensors, report.json. Every stage is saved before the
next begins. Left out: training on several GPUs.
"""
import argparse
import copy
import json
import platform
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from data.checkpoint import write_atomic
from data.config import SHIPPED, resolve
from data.harvest import SETS as HARVESTED, harvest_name
from data.progress import Progress
from data.text import calibration, eval_tokens
from data.tokenizer import load_tokenizer
from eval import DTYPES, fail, perplexity
from gptq import gptq
from kernels.linear import PackedLinear
from kernels.packing import pack_compressed
from model import Transformer, load_model, save_model, storage
from prompt import initial_prompt, learn, save_prompt
from sparsegpt import parse_sparsity, prune_and_round, sparsegpt


RECIPES = {                                                       # what the flags of these names default to
    "plain": dict(mask="sparsegpt", refits=0, grid="minmax", act_order=False, descent=0, true_sequential=False, correct=0.0,
                  percdamp=0.01),
    "best": dict(mask="admm", refits=3, grid="auto", act_order=True, descent=2, true_sequential=True, correct=0.5,
                 percdamp=0.03)}
SCALES = {                                                        # likewise, by the size of the model
    "large": dict(calib="c4", data="wikitext2", train_data=None, nsamples=128, seqlen=2048, max_tokens=None, batch_size=4,
                  prompt_tokens=100, steps=200, lr=5e-3, control=False),
    "tiny": dict(calib="docs", data="headers", train_data="headers", nsamples=128, seqlen=256, max_tokens=32768, batch_size=8,
                 prompt_tokens=50, steps=200, lr=5e-2, control=True)}


def make_solver(args):
    """solve(W, H, parts) -> Compressed, for the settings in args; W stacks the Linears that read one input, parts has their
    rows. None where there is nothing to do."""
    fraction, _, m = parse_sparsity(args.sparsity)
    if args.bits == 16 and not fraction:
        return None
    bits, pattern = None if args.bits == 16 else args.bits, str(args.sparsity) if m else fraction
    if args.static_groups and (args.recipe != "plain" or not args.act_order or fraction):
        raise ValueError("--static-groups belongs to --recipe plain --sparsity 0 --act-order; the searched grids' groups are "
                         "static anyway")
    if args.correct and not args.true_sequential:
        raise ValueError("--correct works group by group: add --true-sequential, or turn it off with --correct 0")
    common = dict(groupsize=args.groupsize, sym=args.sym, percdamp=args.percdamp, blocksize=args.blocksize)
    if args.mask == "admm" or args.refits or args.descent or args.grid != "minmax" or fraction and args.act_order:
        return lambda W, H, parts: prune_and_round(W, H, pattern, bits, mask=args.mask, refits=args.refits, grid=args.grid,
                                                   act_order=args.act_order, descent=args.descent, **common)
    if fraction:                                                 # one joint pass, as the paper has it
        return lambda W, H, parts: sparsegpt(W, H, pattern, bits, parts=parts, **common)
    return lambda W, H, parts: gptq(W, H, bits, act_order=args.act_order, static_groups=args.static_groups, **common)


@contextmanager
def fast_products(x: torch.Tensor):
    """Inside, fp32 matrix products may round their factors to bf16 on a CPU, to TF32 on a GPU, if x's dtype loses nothing by
    it. Sums stay fp32: in bf16 they would not be exact enough to be inverted."""
    place, precision = (torch.backends.cuda, "tf32") if x.is_cuda else (torch.backends.mkldnn, "bf16")
    exact = x.dtype == torch.bfloat16 or x.is_cuda and x.dtype == torch.float16
    before = place.matmul.fp32_precision
    place.matmul.fp32_precision = precision if exact else before
    try:
        yield
    finally:
        place.matmul.fp32_precision = before


class Gram:
    """The mean of x x^T over all x (..., n) added, in fp32; H is symmetric, so only a staircase of a large one is computed."""

    def __init__(self):
        self.H, self.count = None, 0

    def add(self, x: torch.Tensor) -> None:
        x32 = x.reshape(-1, x.shape[-1]).float()
        n, self.count = x32.shape[1], self.count + len(x32)
        self.H = x32.new_zeros(n, n) if self.H is None else self.H
        step = n if n < 1024 else -(-n // 4)
        with fast_products(x):
            for s in range(0, n, step):
                self.H[s:, s:s + step].addmm_(x32[:, s:].T, x32[:, s:s + step])

    def mean(self) -> torch.Tensor:
        return (self.H.tril() + self.H.tril(-1).T) / self.count


def corrected(W, biased: bool, H, inputs, dense_inputs, residuals, dense_residuals, strength: float, damp: float = 0.3):
    """The weights that a compressed Linear should aim at, given that it reads x where the dense model reads x', and that its
    output joins r where the dense model has r': least squares, damped towards W (QEP 2504.09629, GPTAQ 2504.02692; the
    residual stream's own error is ours),

        W + strength (W C + R) (H + damp diag H)^-1,   C = mean (x' - x) x^T,   R = mean (r' - r) x^T.

    With a bias, H, C and R are taken around the means, which the bias then meets. Returns (W, H, shift), shift (V) being
    what the bias gains once the Linear's weights have become V."""
    count = sum(x.shape[0] * x.shape[1] for x in inputs)
    flat = lambda t: t.reshape(-1, t.shape[-1])
    C = R = torch.zeros((), device=W.device)
    mean = gain = drift = 0
    for k, x in enumerate(inputs):
        dx, x = flat(dense_inputs[k] - x), flat(x)
        dr = None if residuals[k] is None else flat(dense_residuals[k] - residuals[k])
        C = C + (dx.T @ x).float()                               # a difference may be summed in half precision
        R = R if dr is None else R + (dr.T @ x).float()
        if biased:
            mean, gain = mean + x.sum(0, dtype=torch.float32), gain + dx.sum(0, dtype=torch.float32)
            drift = drift if dr is None else drift + dr.sum(0, dtype=torch.float32)
    C, R = C / count, R / count
    shift = None
    if biased:
        mean, gain, drift = mean / count, gain / count, drift / count
        around, C = H - torch.outer(mean, mean), C - torch.outer(gain, mean)
        R = R - torch.outer(drift, mean) if torch.is_tensor(drift) else R
        varies = (around.diagonal() > 1e-5 * H.diagonal()).float()           # a constant input is the bias's alone
        H, C, R = around * varies * varies[:, None], C * varies, R * varies
        wanted = W @ (mean + strength * gain) + strength * drift
        shift = lambda V: wanted - V @ mean
    damped = H + torch.diag(damp * H.diagonal() + 1e-6 * H.diagonal().mean() + 1e-12)
    step = torch.linalg.solve(damped, (W @ C + R).T).T
    return W + strength * step, H, shift


@torch.no_grad()
def compress(model: Transformer, windows: torch.Tensor, solve, true_sequential: bool = True, correct: float = 0.5,
             batch_size: int = 4, dtype: torch.dtype | None = None, bits: int | None = None) -> list[dict]:
    """Compress every Linear of every block in place; windows (N, T) int64 are the calibration text. Returns one dict a Linear,
    its error being that of the Linears it shares an input with.

    Block by block; what enters a block comes out of the compressed blocks before it. Linears that share an input share one
    Hessian and are solved as one stacked matrix. Plain: all four Hessians of a block come from its dense weights, then it
    runs once more, compressed. true_sequential: all windows go through the block together, group by group, and each group of
    Linears is compressed just before it is used, so that every Linear runs once and later groups see the earlier ones'
    errors. correct > 0, with it: the dense model runs alongside and every Linear aims at its outputs (`corrected`).
    dtype: of activations and of the two copies of the block that run; solvers work in fp32.
    bits: a quantized Linear becomes a PackedLinear of that width when its block is done; None leaves it dense."""
    device, kept = model.embed_tokens.weight.device, model.embed_tokens.weight.dtype
    dtype = dtype or kept
    hs = [model.stem(model.embed(w.to(device))).to(dtype) for w in windows.split(batch_size)]        # (batch, T, d_model) each
    dense_hs, rope, stats, packed = hs if correct else (), model.rope(0, windows.shape[1], device), [], {}

    def solve_group(i, block, work, names, H, seen=None):
        linears = [block.get_submodule(name) for name in names]
        parts, W = [m.out_features for m in linears], torch.cat([m.weight.float() for m in linears])
        shift = None
        if seen is not None:
            W, H, shift = corrected(W, linears[0].bias is not None, H, *seen, correct)
        out = solve(W, H, parts)
        shifts = [None] * len(parts) if shift is None else shift(out.weight).split(parts)
        rows = [t.split(parts) if torch.is_tensor(t) else [None] * len(parts) for t in out[:5]]
        for name, linear, moved, weight, mask, codes, scale, zero in zip(names, linears, shifts, *rows):
            quantized = bits is not None and codes is not None
            linear.weight.data = (weight if quantized else weight.half()).to(kept)      # what is stored is what is measured
            if moved is not None:
                linear.bias.data = (linear.bias.float() + moved).half().to(kept)
            if quantized:
                one = out._replace(weight=weight, mask=mask, codes=codes, scale=scale, zero=zero)
                packed[name] = PackedLinear(pack_compressed(one, bits), linear.bias).to(device)
            work.get_submodule(name).load_state_dict(linear.state_dict())
            stats.append({"name": f"blocks.{i}.{name}", "error": out.error, "sparsity": float(mask.float().mean())})

    bar = Progress(model.blocks, "compressing blocks")
    for i, block in enumerate(bar):
        work = copy.deepcopy(block).to(dtype)
        if true_sequential:
            runs = [work.steps(h, rope) for h in hs]
            dense = copy.deepcopy(work) if correct else None
            twins = [dense.steps(h, rope) for h in dense_hs] if correct else []
            while True:
                names, hs, residuals = zip(*(next(run) for run in runs))
                seen = None
                if correct:
                    _, dense_hs, dense_residuals = zip(*(next(twin) for twin in twins))
                    seen = hs, dense_hs, residuals, dense_residuals
                if not names[0]:
                    break
                gram = Gram()
                for x in hs:
                    gram.add(x)
                solve_group(i, block, work, names[0], gram.mean(), seen)
        else:
            grams = {}
            for h in hs:
                for names, x, _ in work.steps(h, rope):
                    if names:
                        grams.setdefault(names, Gram()).add(x)
                    if "mlp.down" in names:
                        break                                    # its output is not needed yet
            for names, gram in grams.items():
                solve_group(i, block, work, names, gram.mean())
            hs = [work(h, rope) for h in hs]
        for name in list(packed):
            block.set_submodule(name, packed.pop(name))
        bar.note(f"mean error {sum(s['error'] for s in stats) / len(stats):.4f}")
    return stats


def table(rows: list[dict]) -> str:
    head = (f"{'':30s} {'perplexity':>12s} {'MB':>9s} {'bits/weight':>12s} {'bits/weight, Linears':>21s} {'nominal':>8s} "
            f"{'seconds':>9s}")
    return "\n".join([head] + [f"{r['name']:30s} {r['perplexity']:12.3f} {r['megabytes']:9.1f} {r['bits_per_weight']:12.2f} "
                               f"{r['linear_bits_per_weight']:21.2f} {r['nominal']:7.1f}x {r['seconds']:9.1f}" for r in rows]
                     + ["nominal: 16 bits over bits x share kept, as papers count; files also hold masks, grids and all that is "
                        "no Linear"])


def describe_machine(device: str) -> str:
    if str(device).startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def main(args) -> dict:
    torch.manual_seed(args.seed)
    scale = SCALES["tiny" if str(args.model) in SHIPPED else "large"]
    for name, value in {**RECIPES[args.recipe], **scale}.items():                        # what no flag has set
        if getattr(args, name) is None:
            setattr(args, name, value)
    folder, out, dtype = resolve(args.model), Path(args.out), DTYPES[args.dtype]
    solve = make_solver(args)                                    # bad settings fail before any work
    for name, least in (("steps", 0), ("batch_size", 1), ("prompt_tokens", 1), ("val_windows", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least {least}")
    calib, data, train_data, seqlen = args.calib, args.data, args.train_data or args.calib, args.seqlen
    made_of = "".join(f"{harvest_name(name)}\n" for name in sorted({calib, data, train_data} & set(HARVESTED)))
    tokenizer = load_tokenizer(folder)
    test = eval_tokens(tokenizer, data, "validation" if data == "c4" else "test", seqlen, args.max_tokens, folder=args.data_dir)
    calib_windows = calibration(tokenizer, calib, "train", args.nsamples, seqlen, args.seed, folder=args.data_dir)
    out.mkdir(parents=True, exist_ok=True)
    settings = {**{k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}, "train_data": train_data,
                "texts": made_of.splitlines(),
                "hardware": describe_machine(args.device), "python": platform.python_version(), "torch": torch.__version__,
                "calibration_tokens": calib_windows.numel()}
    rows = []

    def measure(name, model, prompt=None, size=None, since=None):
        t = time.monotonic()
        ppl, settings["scored_tokens"] = perplexity(model, test, seqlen, prompt, args.batch_size, f"measuring: {name}")
        extra = {"seconds": t - since if since else time.monotonic() - t, "prompt_tokens": 0 if prompt is None else len(prompt)}
        rows.append({"name": name, "perplexity": ppl, **(size or storage(model)), **extra})
        text = json.dumps({"rows": rows, "settings": settings}, indent=1)
        write_atomic(out / "report.json", lambda f: f.write(text.encode()))

    model = load_model(folder, dtype, args.device)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{args.model}: {size:.1f} million weights, {settings['hardware']}, {args.dtype}")
    if args.steps:
        text = eval_tokens(tokenizer, train_data, "train", seqlen, folder=args.data_dir)
        pool = text[:len(text) // seqlen * seqlen].view(-1, seqlen)                       # windows that do not overlap
        pool = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(args.seed))]
        val, pool = pool[:args.val_windows], pool[args.val_windows:]
        if not len(pool):
            raise ValueError(f"{train_data} gives {len(text) // seqlen} windows of seqlen {seqlen}, and --val-windows "
                             f"{args.val_windows} takes them all: use more text or shorter windows")
    measure("dense", model)
    if solve:
        start = time.monotonic()
        stats = compress(model, calib_windows, solve, args.true_sequential, args.correct, args.batch_size,
                         DTYPES[args.calib_dtype], args.bits)
        save_model(model, out / "compressed")
        for f in folder.iterdir():                               # the tokenizer goes with the model
            if f.name.startswith(("tokenizer", "vocab.", "merges.", "special_tokens", "generation_config")):
                shutil.copyfile(f, out / "compressed" / f.name)
        settings["layers"] = stats
        kept = storage(model, (out / "compressed/model.safetensors").stat().st_size)
        if args.fused == "off":
            model = load_model(out / "compressed", dtype, args.device, packed=False)
        measure("compressed", model, size=kept, since=start)
    if args.steps:
        tune, fused = DTYPES[args.tune_dtype], args.fused == "on"

        def learn_on(source, model, name, file, size=None):
            """A prompt for the model in folder source, measured in front of `model`, the same in full precision."""
            start = time.monotonic()
            work = model if tune == dtype else load_model(source, tune, args.device, fused)
            work.checkpointing = args.checkpointing
            got = learn(work, p0, pool, val, args.steps, args.batch_size, args.lr, seed=args.seed, progress=Progress)
            save_prompt(out / file, got.prompt, {**settings, "val_loss": got.val_loss, "layers": None})
            settings[f"losses of {file}"] = got.losses
            measure(name, model, got.prompt, size, since=start)

        p0 = initial_prompt(model, args.prompt_tokens, args.prompt_init, text, args.seed)   # the text's start
        if solve:
            measure("compressed + initial prompt", model, p0, kept)
            learn_on(out / "compressed", model, "compressed + learned prompt", "prompt.safetensors", kept)
        if args.control or not solve:                            # how much of it is adaptation to the text
            model = load_model(folder, dtype, args.device)
            measure("dense + initial prompt", model, p0)
            learn_on(folder, model, "dense + learned prompt", "prompt-dense.safetensors" if solve else "prompt.safetensors")
    print(f"\n{args.model}, {data}, {settings['scored_tokens']} scored tokens, seqlen {seqlen}, {args.bits} bits, sparsity "
          f"{args.sparsity}, seed {args.seed}\n{table(rows)}\n{made_of}\nsaved in {out}: "
          + ", ".join(sorted(f.name for f in out.iterdir())))
    return {"rows": rows, "settings": settings}


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a = p.add_argument
    a("--model", default="tiny-llama", help="a checkpoint folder or a name such as llama-7b, opt-1.3b")
    a("--bits", type=int, default=4, choices=[2, 3, 4, 8, 16], help="bits a weight kept; 16 does not quantize")
    a("--sparsity", default="0.5", help="0, a fraction of weights to prune, or n:m such as 2:4")
    a("--groupsize", type=int, default=-1, help="columns that share a grid; -1: a whole row")
    a("--sym", action="store_true", help="grids symmetric around zero; offset grids always are")
    a("--recipe", default="best", choices=RECIPES, help="plain: SparseGPT and GPTQ as published; flags below: single steps")
    a("--mask", choices=["admm", "sparsegpt"], help="how weights to prune are found")
    a("--refits", type=int, help="conjugate gradient iterations on the weights kept")
    a("--grid", choices=["minmax", "uniform", "offset", "auto"], help="auto: offset (no level on zero) if pruned, else uniform")
    a("--act-order", action=argparse.BooleanOptionalAction, help="quantize columns in order of falling Hessian diagonal")
    a("--static-groups", action="store_true", help="plain GPTQ with --act-order: groups stay neighbouring columns")
    a("--descent", type=int, help="passes over the codes afterwards")
    a("--true-sequential", action=argparse.BooleanOptionalAction, help="groups of Linears inside a block one after the other")
    a("--correct", type=float, help="aim at the dense model's outputs; 0: at the dense weights, 1: fully")
    a("--calib-dtype", default="bfloat16", choices=DTYPES, help="precision of the calibration's forward passes")
    a("--percdamp", type=float, help="damping, as a share of the Hessian's diagonal")
    a("--blocksize", type=int, default=128, help="columns whose errors travel together")
    a("--calib", help="calibration text: wikitext2, ptb, c4, docs, docstrings, code, headers, or a path (default c4; "
                      "tiny models docs)")
    a("--nsamples", type=int, help="calibration windows (default 128)")
    a("--seqlen", type=int, help="tokens a window, everywhere (default 2048; tiny models 256)")
    a("--data", help="text the perplexity is measured on, likewise (default wikitext2; tiny models headers)")
    a("--data-dir", type=Path, help="folder that holds the text sets")
    a("--max-tokens", type=int, help="measure on the first so many tokens only (default all; tiny models 32768)")
    a("--train-data", help="text the prompt is learned on (default: --calib; tiny models headers)")
    a("--val-windows", type=int, default=8, help="windows of it held out to choose the best prompt")
    a("--prompt-tokens", type=int, help="length of the soft prompt (default 100; tiny models 50)")
    a("--prompt-init", default="text", choices=["text", "vocab", "random"])
    a("--steps", type=int, help="prompt learning steps (default 200); 0 skips the prompt")
    a("--batch-size", type=int, help="windows a step, and at a time when measuring (default 4; tiny models 8)")
    a("--lr", type=float, help="peak learning rate (default 5e-3; tiny models 5e-2; the paper: 1e-3, for 30,000 steps)")
    a("--control", action=argparse.BooleanOptionalAction, help="learn a prompt on the dense model too (default: tiny models)")
    a("--tune-dtype", default="bfloat16", choices=DTYPES, help="precision of the frozen model while the prompt is learned")
    a("--checkpointing", action="store_true", help="recompute activations to save memory")
    a("--seed", type=int, default=0)
    a("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a("--fused", default="on", choices=["on", "off"], help="off: unpack the compressed weights once, run ordinary Linears")
    a("--dtype", default="float32" if not torch.cuda.is_available() else "float16", choices=DTYPES)
    a("--out", default="runs/out", help="folder for the compressed model, the prompt and report.json")
    try:
        main(p.parse_args())
    except (ValueError, OSError) as e:
        fail(e)
