"""SparseGPT and GPTQ as published (2301.00774, 2210.17323), over transformers: a peer for the plain
recipe and its walk.

    python -m bench.published MODEL --calib CALIB.txt --data TEST.txt --bits 4 --sparsity 0

compresses MODEL (Hugging Face's files) once with this and once with train.py's plain recipe, on the
same windows of text, and prints both perplexities and the seconds both took, and over several seeds
(--seeds 0 1 2) the geometric means. Everything is fp32; of this project it uses the windows alone.
Written column by column from the papers: a grid a row from the dense weights, blocks of 128
columns, damping of 1%, all Hessians of a block from its dense weights, then the block once more.
"""
import argparse
import math
import statistics
import sys
import time

import torch
import torch.nn.functional as F

from bench.naive import naive_sparsegpt


@torch.no_grad()
def walk(model, windows: torch.Tensor, fraction: float, bits: int | None) -> None:
    """Compress a LlamaForCausalLM or OPTForCausalLM in place; windows (N, T) int64 are the
    calibration text."""
    base = model.model.decoder if hasattr(model.model, "decoder") else model.model
    calls = first_calls(model, base.layers[0], windows)
    for i, layer in enumerate(base.layers):
        linears = {name: m for name, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
        H = dict.fromkeys(linears, 0)

        def add(name):
            """A hook that adds what a Linear reads to its Hessian."""
            def hook(module, args, output):
                x = args[0].flatten(0, -2)
                H[name] = H[name] + x.T @ x / windows.numel()
            return hook

        def run() -> list[torch.Tensor]:
            outputs = [layer(*args, **kwargs) for args, kwargs in calls]
            return [output[0] if isinstance(output, tuple) else output for output in outputs]

        handles = [m.register_forward_hook(add(name)) for name, m in linears.items()]
        run()
        for handle in handles:
            handle.remove()
        for name, m in linears.items():
            weight, _, _ = naive_sparsegpt(m.weight, H[name], fraction, bits)
            m.weight.copy_(weight)
        calls = [((h, *args[1:]), kwargs) for h, (args, kwargs) in zip(run(), calls)]
        print(f"\rpublished: block {i + 1} of {len(base.layers)}", end="", file=sys.stderr,
              flush=True)
    print(file=sys.stderr)


def first_calls(model, block, windows: torch.Tensor) -> list[tuple[tuple, dict]]:
    """(args, kwargs) that the first block is called with for each window; the model stops there."""
    calls = []

    def keep(module, args, kwargs):
        calls.append((args, kwargs))
        raise InterruptedError

    handle = block.register_forward_pre_hook(keep, with_kwargs=True)
    for window in windows:
        try:
            model(window[None], use_cache=False)
        except InterruptedError:
            pass
    handle.remove()
    return calls


@torch.no_grad()
def perplexity(model, tokens: torch.Tensor, seqlen: int) -> float:
    """Of tokens (n,), in windows of seqlen, each scoring seqlen - 1 targets."""
    count = len(tokens) // seqlen
    total = 0.0
    for window in tokens[:count * seqlen].view(count, seqlen):
        logits = model(window[None]).logits[0, :-1].float()
        total += F.cross_entropy(logits, window[1:], reduction="sum").item()
    return math.exp(total / (count * (seqlen - 1)))


def both(folder, windows: torch.Tensor, test: torch.Tensor, fraction: float,
         bits: int | None) -> tuple[float, float, float, float]:
    """Perplexities of the test tokens (n,) and seconds of compression: (published, ours,
    published's seconds, ours), windows (N, T) being the calibration text of both."""
    import transformers

    import eval
    from compress import Settings, compress_model, make_solver
    from model import load_model
    seqlen = windows.shape[1]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    start = time.perf_counter()
    walk(theirs, windows, fraction, bits)
    published_seconds = time.perf_counter() - start
    published = perplexity(theirs, test, seqlen)
    del theirs
    ours = load_model(folder)
    solver = make_solver(bits, fraction, "plain")
    start = time.perf_counter()
    compress_model(ours, windows, solver, Settings(False, 0.0), exact=True)
    seconds = time.perf_counter() - start
    return published, eval.perplexity(ours, test, seqlen)[0], published_seconds, seconds


def main(args) -> None:
    from data.text import calibration, eval_tokens, split_to_judge
    from data.tokenizer import load_tokenizer
    if args.bits == 16 and args.sparsity == 0:
        raise SystemExit("error: --bits 16 --sparsity 0 compresses nothing: lower the bits or "
                         "prune")
    tokenizer = load_tokenizer(args.model)
    test = eval_tokens(tokenizer, args.data, split_to_judge(args.data), args.seqlen,
                       args.max_tokens)
    bits = None if args.bits == 16 else args.bits
    print(f"{args.model}, {args.data}, {len(test)} tokens, seqlen {args.seqlen}, {args.bits} bits, "
          f"sparsity {args.sparsity}, {args.nsamples * args.seqlen} calibration tokens, fp32, "
          f"{torch.get_num_threads()} threads")
    line = "{:>4} {:10.3f} {:10.3f} {:7.3f} {:9.1f} s {:9.1f} s"
    print(f"{'seed':>4} {'published':>10} {'ours':>10} {'ratio':>7} {'published':>11} {'ours':>11}")
    rows = []
    for seed in args.seeds:
        windows = calibration(tokenizer, args.calib, "train", args.nsamples, args.seqlen, seed)
        published, ours, *seconds = both(args.model, windows, test, args.sparsity, bits)
        rows.append((published, ours, ours / published, *seconds))
        print(line.format(seed, *rows[-1]), flush=True)
    if len(rows) > 1:
        print(line.format("mean", *(statistics.geometric_mean(column) for column in zip(*rows))))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].replace("\n", " "))
    a = p.add_argument
    a("model")
    a("--calib", required=True, help="calibration text, as train.py takes it")
    a("--data", required=True, help="text the perplexity is measured on, likewise")
    a("--bits", type=int, default=4, choices=[2, 3, 4, 8, 16], help="16: prune only")
    a("--sparsity", type=float, default=0.5, help="a fraction; 0: quantize only")
    a("--nsamples", type=int, default=32)
    a("--seqlen", type=int, default=512)
    a("--max-tokens", type=int, default=40960)
    a("--seeds", type=int, nargs="+", default=[0])
    try:
        main(p.parse_args())
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
