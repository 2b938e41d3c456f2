"""SparseGPT and GPTQ as published (2301.00774, 2210.17323), over transformers: a peer for the plain recipe and its walk.

    python -m bench.published MODEL --calib CALIB.txt --data TEST.txt --bits 4 --sparsity 0 --seeds 0 1 2

compresses MODEL (Hugging Face's files) once with this and once with train.py's plain recipe, on the same windows of text, and
prints both perplexities and the seconds both took, and over several seeds the geometric means. Everything is fp32; of this
project it uses the windows alone. Written column by column from the papers: a grid a row from the dense weights, blocks of 128
columns, damping of 1%, all Hessians of a block from its dense weights, then the block once more.
"""
import argparse
import math
import statistics
import sys
import time

import torch

from bench.naive import naive_sparsegpt


@torch.no_grad()
def walk(model, windows, fraction: float, bits: int | None) -> None:
    """Compress a LlamaForCausalLM or OPTForCausalLM in place; windows (N, T) int64 are the calibration text."""
    base = model.model.decoder if hasattr(model.model, "decoder") else model.model
    calls = []

    def keep(module, args, kwargs):                               # what the first block is called with
        calls.append((args, kwargs))
        raise InterruptedError

    handle = base.layers[0].register_forward_pre_hook(keep, with_kwargs=True)
    for w in windows:
        try:
            model(w[None], use_cache=False)
        except InterruptedError:
            pass
    handle.remove()
    for i, layer in enumerate(base.layers):
        linears = {name: m for name, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
        H = dict.fromkeys(linears, 0)

        def add(name):
            def hook(module, args, output):
                x = args[0].flatten(0, -2)
                H[name] = H[name] + x.T @ x / windows.numel()
            return hook

        def run():
            outputs = [layer(*args, **kwargs) for args, kwargs in calls]
            return [o[0] if isinstance(o, tuple) else o for o in outputs]

        handles = [m.register_forward_hook(add(name)) for name, m in linears.items()]
        run()
        for handle in handles:
            handle.remove()
        for name, m in linears.items():
            m.weight.copy_(naive_sparsegpt(m.weight, H[name], fraction, bits)[0])
        calls = [((h, *args[1:]), kwargs) for h, (args, kwargs) in zip(run(), calls)]
        print(f"\rpublished: block {i + 1} of {len(base.layers)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


@torch.no_grad()
def perplexity(model, tokens, seqlen: int) -> float:
    """Of tokens (n,), in windows of seqlen, each scoring seqlen - 1 targets."""
    total, windows = 0.0, tokens[:len(tokens) // seqlen * seqlen].view(-1, seqlen)
    for w in windows:
        total += torch.nn.functional.cross_entropy(model(w[None]).logits[0, :-1].float(), w[1:], reduction="sum").item()
    return math.exp(total / (len(windows) * (seqlen - 1)))


def both(folder, windows, test, fraction: float, bits: int | None) -> tuple[float, float, float, float]:
    """Perplexities of the test tokens (n,) and seconds of compression: (published, ours, published's seconds, ours),
    windows (N, T) being the calibration text of both."""
    import transformers

    import eval
    from compress import Settings, compress_model, make_solver
    from model import load_model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    start = time.perf_counter()
    walk(theirs, windows, fraction, bits)
    published_seconds = time.perf_counter() - start
    published = perplexity(theirs, test, windows.shape[1])
    del theirs
    ours = load_model(folder)
    start = time.perf_counter()
    compress_model(ours, windows, make_solver(bits, fraction, "plain"), Settings(False, 0.0), exact=True)
    seconds = time.perf_counter() - start
    return published, eval.perplexity(ours, test, windows.shape[1])[0], published_seconds, seconds


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("model")
    p.add_argument("--calib", required=True, help="calibration text, as train.py takes it")
    p.add_argument("--data", required=True, help="text the perplexity is measured on, likewise")
    p.add_argument("--bits", type=int, default=4, help="16: prune only")
    p.add_argument("--sparsity", type=float, default=0.5, help="a fraction; 0: quantize only")
    p.add_argument("--nsamples", type=int, default=32)
    p.add_argument("--seqlen", type=int, default=512)
    p.add_argument("--max-tokens", type=int, default=40960)
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    a = p.parse_args()
    from data.text import calibration, eval_tokens
    from data.tokenizer import load_tokenizer
    tokenizer = load_tokenizer(a.model)
    test = eval_tokens(tokenizer, a.data, "test", a.seqlen, a.max_tokens)
    print(f"{a.model}, {a.data}, {len(test)} tokens, seqlen {a.seqlen}, {a.bits} bits, sparsity {a.sparsity}, "
          f"{a.nsamples * a.seqlen} calibration tokens, fp32, {torch.get_num_threads()} threads")
    line = "{:>4} {:10.3f} {:10.3f} {:7.3f} {:9.1f} s {:9.1f} s"
    print(f"{'seed':>4} {'published':>10} {'ours':>10} {'ratio':>7} {'published':>11} {'ours':>11}")
    rows = []
    for seed in a.seeds:
        windows = calibration(tokenizer, a.calib, "train", a.nsamples, a.seqlen, seed)
        published, ours, *seconds = both(a.model, windows, test, a.sparsity, None if a.bits == 16 else a.bits)
        rows.append((published, ours, ours / published, *seconds))
        print(line.format(seed, *rows[-1]), flush=True)
    if len(rows) > 1:
        print(line.format("mean", *(statistics.geometric_mean(column) for column in zip(*rows))))
