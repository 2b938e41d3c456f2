"""Whole models, dense against packed: decoding at batch 1, and a step of prompt tuning. Called by kernels.py.

    python -m bench.kernels --generate runs/out/compressed                      # a folder that train.py wrote
    python -m bench.kernels --generate random-llama-7b                          # that shape, random weights, made here
    python -m bench.kernels --tune runs/out/compressed --batch 4 --tokens 512

Both models hold the same weights and run in turn, a token or a step each, so that whatever else the machine does slows
both; times are medians. Memory: what a model holds, and on a GPU the peak while it runs, without the other model and
without keys and values of earlier tokens.
"""
import os
import statistics
import time

import torch
import torch.nn as nn

from data.config import PUBLISHED, Config
from bench.kernels import random_layer
from eval import Steps
from kernels.linear import PackedLinear
from kernels.packing import Packed
from model import Transformer, load_model
from prompt import SCALE, initial_prompt, text_nll


def random_model(name: str, format: str, grid: str, dtype, device) -> tuple[Transformer, Transformer]:
    """(dense, packed) of a published model's shape; Linears of one shape share their numbers, not their memory, and the
    two models share what is no Linear. OPT-350m gets the shape of its blocks only: pre-norm, embeddings as wide as they."""
    d, layers, heads, kv, ff, vocab, _ = PUBLISHED[name]
    opt = name.startswith("opt")
    config = Config("opt" if opt else "llama", vocab, d, layers, heads, ff, kv, tied=opt, attention_bias=opt, mlp_bias=opt)
    models, made = [], {}
    for packed in (False, True):
        with torch.device("meta"):
            model = Transformer(config).requires_grad_(False)
        for key, linear in model.linears():
            shape = (linear.out_features, linear.in_features)
            if shape not in made:
                made[shape] = PackedLinear(random_layer(shape, format, grid, -1, device)).to(device)
            if packed:
                tensors = {n: t.clone() for n, t in made[shape].packed.tensors.items()}
                model.set_submodule(key, PackedLinear(Packed(tensors, made[shape].meta), linear.bias))
            else:
                linear.weight = nn.Parameter(made[shape].weight_dequantized(dtype), requires_grad=False)
        for key, p in model.named_parameters():
            if p.is_meta and key not in made:                   # embeddings, norms, biases, head
                made[key] = 0.02 * torch.randn(p.shape, device=device, dtype=dtype) + ("norm" in key)
        model.load_state_dict({key: t for key, t in made.items() if isinstance(key, str)}, strict=False, assign=True)
        models.append(model.requires_grad_(False).eval())
    return tuple(models)


def pair(path: str, format: str, grid: str, dtype, device) -> tuple[Transformer, Transformer]:
    """(dense, packed) from a packed folder or from random-NAME."""
    name = path.removeprefix("random-")
    if name != path:
        if name not in PUBLISHED:
            raise ValueError(f"{path}: give random- and one of {', '.join(PUBLISHED)}")
        return random_model(name, format, grid, dtype, device)
    dense, packed = (load_model(path, dtype, device, packed=p) for p in (False, True))
    if not any(isinstance(m, PackedLinear) for _, m in packed.linears()):
        raise ValueError(f"{path} is not packed: train.py with --bits 2, 3, 4 or 8 writes packed folders")
    return dense, packed


def mapped(t: torch.Tensor) -> bool:
    """Does it lie in a mapped file? Such pages are read when they are needed, and dropped when memory is. Linux only."""
    if t.device.type != "cpu" or not os.path.exists("/proc/self/maps"):
        return False
    with open("/proc/self/maps") as lines:
        for line in lines:
            span, *_, inode, path = line.split(maxsplit=5) if line.count("/") else (*line.split()[:5], "")
            start, end = (int(part, 16) for part in span.split("-"))
            if start <= t.data_ptr() < end:
                return bool(path.strip()) and int(inode) > 0
    return False


def held(model: Transformer) -> int:
    """Bytes of memory that weights take, packed or not, and the forms that decoding on a CPU makes. What a layer decodes
    from is counted instead of the packed tensors that it was made of, if those lie in a mapped file."""
    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    total = 0
    for _, m in model.linears():
        if isinstance(m, PackedLinear) and m.decode_bytes():
            total += m.decode_bytes()
            for t in m.packed.tensors.values():
                if mapped(t):
                    tensors.pop(t.data_ptr(), None)
    return total + sum(t.numel() * t.element_size() for t in tensors.values())


def in_turn(calls: list, repeats: int, device) -> list[float]:
    """Median seconds of each call."""
    times = [[] for _ in calls]
    for _ in range(repeats):
        for call, seconds in zip(calls, times):
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    return [statistics.median(s) for s in times]


def peaks(calls: list, models: list[Transformer], device) -> list[str]:
    """What each model holds, and on a GPU its peak during a call: that, and all that the call allocates on top."""
    lines = []
    for call, model in zip(calls, models):
        line = f"{held(model) / 1e6:.0f} MB held"
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            peak = held(model) + torch.cuda.max_memory_allocated() - before
            line = f"{peak / 1e6:.0f} MB at the peak, {line}"
        lines.append(line)
    return lines


@torch.no_grad()
def generate(models: list[Transformer], context: int, repeats: int, device) -> None:
    """Greedy decoding behind `context` random tokens, as eval.py does it: on a GPU from a CUDA
    graph, and there also the same step launched from Python."""
    text = torch.randint(0, models[0].config.vocab_size, (1, context), device=device)
    logits, replayed, launched = [], [], []
    for model in models:
        cache = model.new_cache(1, context + 3 * repeats + 8)
        logits.append(model(text, cache)[0, -1].float())
        token = logits[-1].argmax().view(1, 1)
        steps = Steps(model, cache)

        def decode(step, token=token):
            token.copy_(step(token).argmax(-1, keepdim=True))

        for _ in range(3):                                  # makes decode caches, compiles kernels
            decode(steps)
        replayed.append(lambda decode=decode, steps=steps: decode(steps))
        launched.append(lambda decode=decode, steps=steps: decode(steps.compute))
    difference = (logits[0] - logits[1]).abs().max() / logits[0].abs().max()
    print(f"largest difference of a logit behind {context} tokens: {difference:.1e} of the largest "
          f"logit")
    how = {"from a CUDA graph": replayed, "launched from Python": launched}
    for name, calls in how.items() if device.type == "cuda" else [("on a CPU", launched)]:
        dense, packed = in_turn(calls, repeats, device)
        print(f"decoding, batch 1, {name}: dense {1 / dense:.1f} tokens/s, packed "
              f"{1 / packed:.1f} tokens/s, {dense / packed:.2f} x")
    for name, line in zip(("dense", "packed"), peaks(launched, models, device)):
        print(f"memory while decoding, {name}: {line}")


def tune(models: list[Transformer], batch: int, tokens: int, prompt_tokens: int, repeats: int, device) -> None:
    """One step, forward and backward, of learning a prompt in front of `batch` windows of random tokens."""
    text = torch.randint(0, models[0].config.vocab_size, (batch, tokens), device=device)
    start, positions = initial_prompt(models[0], prompt_tokens, "vocab"), batch * (prompt_tokens + tokens)

    def step(model):
        prompt = nn.Parameter(start.clone())
        (SCALE * text_nll(model, prompt, text).mean()).backward()
        return prompt.grad / SCALE

    def kept(model) -> int:
        """Bytes that the forward pass keeps for the backward pass, weights aside."""
        weights = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
        found = {}

        def note(t):
            if t.untyped_storage().data_ptr() not in weights:
                found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            text_nll(model, nn.Parameter(start.clone()), text).mean()
        return sum(found.values())

    gradients = [step(m).float() for m in models]
    difference = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    calls = [lambda m=m: step(m) for m in models]
    dense, packed = in_turn(calls, repeats, device)
    print(f"difference of the prompt's gradient: {difference:.1e} of its norm")
    print(f"prompt tuning, batch {batch}, {prompt_tokens} + {tokens} tokens: dense {dense:.2f} s a step, "
          f"packed {packed:.2f} s, {packed / dense:.2f} x the time")
    for name, m, line in zip(("dense", "packed"), models, peaks(calls, models, device)):
        weights = sum(p.numel() for p in models[0].parameters())
        print(f"memory of a step, {name}: {line}; weights {held(m) / weights:.2f} bytes per parameter, activations kept "
              f"{kept(m) / positions / 1e3:.1f} kB per token, {16 * start.numel() / 1e6:.2f} MB for prompt, gradient and Adam")


def main(args, dtype, device) -> None:
    path = args.generate or args.tune
    models = list(pair(path, args.formats[-1], args.grid, dtype, device))
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{path}, {machine}, {dtype}")
    if args.generate:
        generate(models, args.context, args.repeats, device)
    else:
        for model in models:
            model.checkpointing = args.checkpointing
        tune(models, args.batch, args.tokens, args.prompt_tokens, args.repeats, device)
