"""Soft prompts: n learned positions in front of the text of a frozen model (2305.11186).

A prompt P is the only parameter, and behind it the model reads the text x_1 ... x_L. Two kinds:

    embedding  (n, width)                                  the paper's: what the first block reads
    prefix     (n, n_layer, 2, n_kv_head, head_dim)        keys and values of every layer, which
               attention reads (prefix tuning 2101.00190); its first position, where attention parks
               what it has no use for, is frozen

Either costs the cache of n positions at inference. Two objectives, on text tokens 2 ... L alone;
the prompt's positions predict nothing, have no loss, and are counted in no perplexity:

    next token  mean of -log p(x_i | P, x_1 ... x_{i-1}), equation 1
    KL          mean of KL(dense || compressed behind P) over the vocabulary: asks for what
                compression lost, and gives nothing for adapting to the text. The dense model reads
                no prompt. Tried: let it read the text that P starts from. P then learns what that
                text does as well, and is worse than none on other texts (RESULTS.md)

    prompt = initial_prompt(dense, 100, tokens=first_tokens, kind="prefix")
    prompt = learn(model, prompt, train_windows, val_windows, steps=200).prompt
    save_prompt("prompt.safetensors", prompt, {"lr": 1e-3}, owner(model, tokenizer))
    logits = model(*with_prompt(model, prompt, tokens))

The prompt stays in fp32, whatever the model is in: late, small updates vanish in bf16. A hard
prompt is plain text whose embeddings go in front in the same way. Embedding prompts work on any
torch Module with `embed(tokens)`, `embed_tokens.weight` and `forward(embeds)`. `fit` is the loop,
for heal.py too. Left out: weight decay, which the paper does without.
"""
import hashlib
import json
import math
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from data import parallel
from data.checkpoint import (check_tensor, raw, read_safetensors, read_torch, write_atomic,
                             write_safetensors, write_torch)

HARD_PROMPT = ("The weight matrix inside the language model contains errors. Make any necessary "
               "adjustments to ensure optimal performance.")    # the paper's own, section 3.2
PAPER = {"prompt_tokens": 100, "steps": 30000, "warmup": 500, "lr": 1e-3, "batch_size": 2,
         "seqlen": 1024, "clip": 1.0}                           # of its released code, one GPU


class Learned(NamedTuple):
    prompt: torch.Tensor                # fp32, the best seen on the validation windows
    val_loss: float                     # its mean loss there, nats a token; nan without validation
    losses: list[float]                 # training loss of every step, nats a token
    scores: list[tuple[int, float]]     # (steps done, validation loss), the start first


# -------------------------------------------------------------------------------------------------
# Kinds: where a prompt starts, and how a model reads it.

def initial_prompt(model, n: int, how: str = "text", tokens: torch.Tensor | None = None,
                   seed: int = 0, kind: str = "embedding") -> torch.Tensor:
    """fp32 start of n positions: "text" = the first n of `tokens` (m,) int64, "vocab" = n random
    tokens, "random" = normal numbers with the embedding matrix's standard deviation. A prefix is
    what `model` makes of them: give it the dense model, whose keys and values are intact (IntactKV
    2403.01241)."""
    g = torch.Generator().manual_seed(seed)
    table = model.embed_tokens.weight
    if kind not in ("embedding", "prefix"):
        raise ValueError(f"prompt kind {kind!r}: known are embedding and prefix")
    if how == "text":
        if tokens is not None and tokens.dim() != 1:
            raise ValueError(f"a prompt starts from one row of tokens, not {tuple(tokens.shape)}")
        if tokens is None or len(tokens) < n:
            have = 0 if tokens is None else len(tokens)
            raise ValueError(f"a prompt of {n} tokens from text needs {n} tokens, got {have}")
        start = model.embed(tokens[:n].to(table.device))
    elif how == "vocab":
        start = model.embed(torch.randint(0, table.shape[0], (n,), generator=g).to(table.device))
    elif how == "random":
        deviation = float(table.float().std())
        start = (torch.randn(n, table.shape[1], generator=g) * deviation).to(table.device)
    else:
        raise ValueError(f"prompt start {how!r}: known are text, vocab and random")
    start = start.detach().float()
    if kind == "embedding":
        return start
    check_reads_caches(model)
    return as_prefix(model, start)


@torch.no_grad()
def as_prefix(model, prompt: torch.Tensor) -> torch.Tensor:
    """The keys and values that a model computes for an embedding prompt (n, width), in fp32: the
    same prompt as a prefix."""
    return stacked(read_prompt(model, prompt).kv)


@torch.no_grad()
def streamed_prefix(checkpoint, prompt: torch.Tensor, dtype: torch.dtype = torch.float32,
                    device="cpu") -> torch.Tensor:
    """as_prefix of the model of a Checkpoint, whose blocks come to the device one by one."""
    ends = checkpoint.ends(dtype, device)
    n = len(prompt)
    cache, rope = ends.new_cache(1, n), ends.rope(0, n, device)
    h = ends.stem(prompt[None].to(device, dtype))
    for i in range(len(cache.kv)):
        h = checkpoint.block(i, dtype, device)(h, rope, cache.block(i))
    return stacked(cache.kv)


def stacked(kv: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """A cache's pairs (1, n_kv_head, n, head_dim) -> a prefix, fp32."""
    kv = torch.stack([torch.stack(pair) for pair in kv])    # (layers, 2, 1, heads, n, size)
    return kv[:, :, 0].permute(3, 0, 1, 2, 4).float().contiguous()


def kind_of(prompt: torch.Tensor) -> str:
    return {2: "embedding", 5: "prefix"}[prompt.dim()]


def reads_caches(model) -> bool:
    """Is it a model of model.py, whose prompts lie in a cache? Others get embeddings in front."""
    return hasattr(model, "new_cache")


def check_reads_caches(model, where: str = "a prompt") -> None:
    """ValueError for another project's model, which a prefix does not fit."""
    if not reads_caches(model):
        raise ValueError(f"{where}: a prefix is read from a cache, as model.py's models have: "
                         f"other models take embedding prompts")


def check_fits(model, prompt: torch.Tensor, where: str = "a prompt") -> None:
    """Raises ValueError unless the prompt's positions have the shape that this model reads."""
    if prompt.dim() == 5:
        check_reads_caches(model, where)
        c = model.config
        want = c.n_layer, 2, c.n_kv_head, c.head_dim
        if tuple(prompt.shape[1:]) != want:
            _, layers, _, heads, size = prompt.shape
            raise ValueError(f"{where}: a prefix of {layers} layers with {heads} heads of {size} "
                             f"does not fit a model of {want[0]} layers with {want[2]} heads of "
                             f"{want[3]}")
        return
    width = model.embed_tokens.weight.shape[1]
    if prompt.shape[-1] != width:
        raise ValueError(f"{where}: a prompt of width {prompt.shape[-1]} does not fit a model "
                         f"whose embeddings are {width} wide")


def read_prompt(model, prompt: torch.Tensor):
    """A full Cache of batch 1 with the keys and values of the prompt, which gradients pass through
    to the prompt; None where there is none.

    It can stand for the prompt wherever one is asked for, to read it once for many windows."""
    if not torch.is_tensor(prompt):
        return prompt                                           # read already, or None
    if len(prompt) == 0:
        return None
    check_fits(model, prompt)
    dtype, device = model.embed_tokens.weight.dtype, model.embed_tokens.weight.device
    prompt = prompt.to(device, dtype)
    if prompt.dim() == 2:
        cache = model.new_cache(1, len(prompt))
        model.hidden(prompt[None], cache)                       # once, not for every window
        cache.is_prefix = True
        return cache
    cache = model.new_cache(1, 0)
    cache.is_prefix = True
    heads_first = prompt.permute(1, 2, 3, 0, 4)             # (n_layer, 2, n_kv_head, n, head_dim)
    cache.kv = [(layer[0][None], layer[1][None]) for layer in heads_first]
    cache.start = len(prompt)
    return cache


def with_prompt(model, prompt, tokens: torch.Tensor, room: int = 0) -> tuple:
    """What model(*...), model.hidden(*...) take to read tokens (B, T) behind a prompt of either
    kind: (embeddings (B, T, width), cache or None). room: positions that may follow, for
    generation; the cache then belongs to this batch.

    Other projects' models, which read no cache, get one thing, (embeddings (B, n + T, width),):
    their logits begin with the prompt's."""
    x = model.embed(tokens)
    if not reads_caches(model):
        if prompt is None or len(prompt) == 0:
            return x,
        check_fits(model, prompt)
        return torch.cat([prompt.to(x.device, x.dtype).expand(len(x), -1, -1), x], 1),
    full = read_prompt(model, prompt)
    if not room:
        return x, full
    n = full.start if full else 0
    cache = model.new_cache(len(x), n + tokens.shape[1] + room)
    for mine, held in zip(cache.kv, full.kv if full else ()):
        mine[0][:, :, :n], mine[1][:, :, :n] = held
    cache.start = n
    return x, cache


# -------------------------------------------------------------------------------------------------
# Objectives.

LOGITS = 1 << 23                                                # exist at a time: 32 MB in fp32


class HeadLoss(torch.autograd.Function):
    """Losses (rows,) fp32 of logits z @ weight.T, a chunk of rows at a time: the full logits never
    exist.

    The gradient with respect to z is made beside the loss, while the chunk's logits are there, so
    that nothing is computed again in the backward pass; weight is frozen. z (rows, d_embed) is what
    the head reads, model.final(h). With teacher (rows, d_embed), the dense model's z, the loss is

        mix KL(softmax(teacher @ weight.T) || softmax(z @ weight.T)) + (1 - mix) next token
    """

    @staticmethod
    def forward(ctx, z, weight, targets, teacher=None, mix: float = 1.0):
        rows = max(1, LOGITS // len(weight))
        mix = 0.0 if teacher is None else mix
        losses = torch.empty(len(z), dtype=torch.float32, device=z.device)
        ctx.gradient = torch.empty_like(z) if ctx.needs_input_grad[0] else None
        for start in range(0, len(z), rows):
            part = slice(start, start + rows)
            target = targets[part, None]
            logp = F.linear(z[part], weight).float().log_softmax(-1)
            loss = -(1 - mix) * logp.gather(1, target)[:, 0]
            if mix:
                theirs = teacher[part].to(z.device, z.dtype)
                wanted = F.linear(theirs, weight).float().log_softmax(-1)
                q = wanted.exp()
                loss += mix * (wanted.sub_(logp).mul_(q)).sum(-1)
            losses[part] = loss
            if ctx.gradient is not None:                    # softmax - mix q - (1 - mix) one-hot
                slope = logp.exp_()
                one_hot = torch.full_like(target, -(1 - mix), dtype=torch.float32)
                slope.scatter_add_(1, target, one_hot)
                if mix:
                    slope.sub_(q, alpha=mix)
                ctx.gradient[part] = slope.to(z.dtype) @ weight
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return ctx.gradient * g[:, None].to(ctx.gradient.dtype), None, None, None, None


def text_loss(model, prompt, tokens: torch.Tensor, teacher: torch.Tensor | None = None,
              mix: float = 1.0) -> torch.Tensor:
    """Loss of text tokens 2 ... T of every window (B, T), in order, behind the prompt: fp32
    (B * (T - 1),) in nats.

    teacher (B, T, d_embed): the dense model's states of the same windows (`teacher_states`); the
    loss is then mix KL + (1 - mix) next token. The head is never touched by compression, so the
    teacher's logits come from this model's."""
    x, *cache = with_prompt(model, prompt, tokens)
    if not reads_caches(model):
        if teacher is not None:
            raise ValueError("KL to a teacher needs a model with hidden, final and unembed, as "
                             "model.py's")
        logits = model(x)[:, x.shape[1] - tokens.shape[1]:-1]   # n + i predicts token i + 1
        logits = logits.flatten(0, 1).float()
        return F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
    z = model.final(model.hidden(x, *cache)[:, :-1]).flatten(0, 1)
    wanted = None if teacher is None else teacher[:, :-1].flatten(0, 1)
    return HeadLoss.apply(z, model.unembed, tokens[:, 1:].flatten(), wanted, mix)


@torch.no_grad()
def mean_loss(model, prompt, windows: torch.Tensor, batch_size: int = 4,
              teacher: torch.Tensor | None = None, mix: float = 1.0) -> float:
    """Mean text_loss a text token over windows (N, T), nats."""
    device, total, count = model.embed_tokens.weight.device, 0.0, 0
    prompt = read_prompt(model, prompt) if reads_caches(model) else prompt
    for start in range(0, len(windows), batch_size):
        part = slice(start, start + batch_size)
        wanted = None if teacher is None else teacher[part]
        losses = text_loss(model, prompt, windows[part].to(device), wanted, mix)
        total, count = total + losses.double().sum().item(), count + losses.numel()
    return total / count


@torch.no_grad()
def teacher_states(model, windows: torch.Tensor, folder: str | Path, batch_size: int = 4,
                   hidden=None, progress=lambda items, title: items) -> torch.Tensor:
    """What the head of the dense `model` reads over windows (N, T): (N, T, d_embed) fp16, mapped
    from a file in folder. That is its last block's output behind the last norm, model.final(h).

    Computed once for these weights and windows: the file's name tells them, a second call finds it.
    `hidden`, batches of the last block's output (.., T, d_model) in order, replaces the forward
    pass where a walk over blocks has them."""
    path = Path(folder) / f"teacher-{fingerprint(windows)}-{mark_of_model(model)}.npy"
    if not path.exists():
        Path(folder).mkdir(parents=True, exist_ok=True)
        device = model.embed_tokens.weight.device
        if hidden is None:
            batches = progress(windows.split(batch_size), "the dense model's states")
            hidden = (model.hidden(w.to(device)) for w in batches)
        shape = *windows.shape, model.unembed.shape[1]

        def write(f):                           # no mapping: a full disk would end the process
            head = {"descr": "<f2", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(f, head)
            at = 0
            for h in hidden:
                z = model.final(h).half()
                if not torch.isfinite(z).all():
                    raise ValueError("the dense model's last states are not finite in half "
                                     "precision: run it in float32")
                f.write(raw(z))
                at += len(z)
            if at != len(windows):
                raise ValueError(f"states of {at} windows for {len(windows)} windows of text")
        write_atomic(path, write)
    return torch.from_numpy(np.load(path, mmap_mode="c"))


# -------------------------------------------------------------------------------------------------
# Learning.

# Losses are multiplied by this before their gradients are computed, and the gradients divided by it
# after: in float16 numbers below 6e-8 vanish. A power of two changes no bit of other dtypes.
SCALE = 1024.0
WRITE_EVERY = 300.0                     # seconds between two states that are written


class Fit(NamedTuple):
    val_loss: float                     # of what the parameters now hold, the best seen; or nan
    losses: list[float]                 # training loss of every step
    scores: list[tuple[int, float]]     # (steps done, validation loss), the start first


def fit(params: dict[str, torch.Tensor], loss_of_batch: Callable, count: int,
        score: Callable | None = None, steps: int = 200, batch_size: int = 4, lr: float = 1e-3,
        warmup: int | None = None, clip: float = 1.0, val_every: int | None = None,
        betas: tuple[float, float] = (0.9, 0.999), seed: int = 0,
        state: str | Path | None = None, settings: dict | None = None, title: str = "learning",
        readings: int = 1, progress=lambda items, title: items) -> Fit:
    """Minimize loss_of_batch(index (batch,) int64 of windows 0 ... count - 1) over params, fp32
    leaves, in place.

    loss_of_batch returns the loss, a float, and has added SCALE times its gradients to those of
    params (`backward`, `backward_by_parts`).

    AdamW without decay; linear warm-up, then linear decay; gradients clipped; windows reshuffled
    (seeded) every epoch. Of several readings each epoch takes the next: window i of reading k is
    number k * count + i. score() is the validation loss; the start counts, and the parameters end
    as the best seen. With `state`, a path, all that is needed to go on is written at every
    validation and every few minutes, and a second call goes on, to the same bits on a CPU (a GPU
    adds gradients in any order). `settings` (JSON values: model, text) is compared then. Raises
    ValueError on a loss that is not finite or a foreign state."""
    if count < 1 or steps < 0 or batch_size < 1 or not 0 < lr < math.inf:
        raise ValueError(f"cannot learn from {count} windows in {steps} steps of {batch_size} at "
                         f"rate {lr}: at least 1 window, 0 steps, 1 window a step and a finite "
                         f"rate above 0 are needed")
    warmup = max(1, min(20, steps // 10)) if warmup is None else warmup
    val_every = val_every or max(1, steps // 8)
    run = {**(settings or {}), "steps": steps, "batch_size": batch_size, "lr": lr, "warmup": warmup,
           "clip": clip, "val_every": val_every, "betas": list(betas), "seed": seed,
           "windows": count,
           "start": {name: fingerprint(p) for name, p in params.items()}}
    run = json.loads(json.dumps(run))                           # as it will be read back
    opt = torch.optim.AdamW(params.values(), lr=lr, betas=betas, weight_decay=0.0)
    losses, scores, done, earlier = [], [], 0, 0.0
    began = written = time.monotonic()

    def copy_of_params() -> dict:
        return {name: p.detach().clone() for name, p in params.items()}

    def put(values: dict) -> None:
        with torch.no_grad():
            for name, p in params.items():
                p.copy_(values[name])

    def look() -> None:
        """Score the parameters, keep them if they are the best, write the state."""
        nonlocal best
        if score is not None:
            scores.append((done, score()))
            if not math.isfinite(scores[0][1]):
                raise ValueError(f"the start's loss is {scores[0][1]}: the model or its precision "
                                 f"is at fault, use float32")
        if score is None or scores[-1][1] == min(v for _, v in scores):
            best = copy_of_params()
        write()

    def write() -> None:
        nonlocal written
        if state is not None and parallel.rank() == 0:
            held = {"settings": run, "done": done, "losses": losses, "scores": scores,
                    "params": copy_of_params(), "best": best, "optimizer": opt.state_dict(),
                    "seconds": earlier + time.monotonic() - began}
            held["mark"] = mark_of(held)
            write_torch(Path(state), lambda f: torch.save(held, f))
        written = time.monotonic()

    held = read_run(state, run)
    if held is None:
        best = None
        look()
    else:
        done, losses, scores, best = held["done"], held["losses"], held["scores"], held["best"]
        earlier = held.get("seconds", 0.0)
        put(held["params"])
        opt.load_state_dict(held["optimizer"])
    g = torch.Generator().manual_seed(seed)

    def order_of(epoch: int) -> torch.Tensor:
        """Numbers of windows: all of one reading, shuffled."""
        reading = epoch % readings
        return reading * count + torch.randperm(count, generator=g)
    epochs = max(1, -(-steps * batch_size // count))
    order = torch.cat([order_of(epoch) for epoch in range(epochs)])
    bar = progress(range(done, steps), title)
    for step in bar:
        rise, fall = (step + 1) / warmup, (steps - step) / max(1, steps - warmup)
        opt.param_groups[0]["lr"] = lr * min(rise, fall)
        loss = loss_of_batch(parallel.mine(order[step * batch_size:(step + 1) * batch_size]))
        for p in params.values():
            p.grad.div_(SCALE)
        if parallel.world() > 1:                                # the mean over equal shares
            parallel.add(*(p.grad for p in params.values()))
            for p in params.values():
                p.grad.div_(parallel.world())
            loss = parallel.add_numbers(loss)[0] / parallel.world()
        norm = torch.nn.utils.clip_grad_norm_(params.values(), clip)
        if not torch.isfinite(norm):
            raise ValueError(f"the loss or its gradient is not finite at step {step + 1} (loss "
                             f"{loss:g}): lower --lr or use bfloat16 or float32")
        opt.step()
        opt.zero_grad()
        losses.append(loss)
        done = step + 1
        if hasattr(bar, "note"):
            bar.note(f"loss {sum(losses[-10:]) / len(losses[-10:]):.3f}")
        if done % val_every == 0 or done == steps:
            look()
        elif time.monotonic() - written > WRITE_EVERY:
            write()
    put(best)
    return Fit(min(v for _, v in scores) if scores else float("nan"), losses, scores)


def spent(state: str | Path) -> float:
    """Seconds that `fit` has spent, in all calls together, on what it left in this file."""
    return torch.load(state, map_location="cpu", weights_only=True).get("seconds", 0.0)


def read_run(path: str | Path | None, run: dict) -> dict | None:
    """What fit wrote into the state file, or None where there is none. Raises ValueError if it is
    of another run."""
    if path is None or not Path(path).exists():
        return None
    advice = "delete it to start anew, or name another file"
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)  # numbers name its tensors
        theirs, mark = held["settings"], held.pop("mark")
        whole = mark == mark_of(held)
    except Exception:                                       # torch raises a dozen for damaged files
        whole = False
    if not whole:
        raise ValueError(f"{path} is damaged, or holds no state of a learning run: {advice}")
    for name in {**theirs, **run}:
        if theirs.get(name) != run.get(name):
            raise ValueError(f"{path} is of another run: {name} was {theirs.get(name)}, is "
                             f"{run.get(name)}; {advice}")
    return held


def mark_of(held) -> str:
    """16 hexadecimal digits of all that lies in dictionaries and lists of tensors and values."""
    if torch.is_tensor(held):
        return fingerprint(held)
    if isinstance(held, dict):
        held = [(repr(name), mark_of(value)) for name, value in held.items()]
    elif isinstance(held, (list, tuple)):
        held = [mark_of(value) for value in held]
    return hashlib.sha256(repr(held).encode()).hexdigest()[:16]


def fingerprint(*tensors: torch.Tensor) -> str:
    """16 hexadecimal digits that tell tensors apart: of their types, shapes and bytes."""
    digest = hashlib.sha256()
    for t in tensors:
        digest.update(f"{t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def mark_of_model(model) -> str:
    """`fingerprint` of the first of its weights and of its grids' numbers, which tell models apart
    in no time. Codes and masks lie in another order on a GPU, and are not looked at."""
    grids = [t for name, t in model.named_buffers() if name.endswith(("scale", "zero"))]
    return fingerprint(*(t.flatten()[:256] for t in (*model.parameters(), *grids)))


def default_rate(model, prompt: torch.Tensor) -> float:
    """The peak rate that `learn` uses where none is given. An embedding prompt: 0.35 standard
    deviations of the embeddings (4.7e-2 for SmolLM2-135M, about 6e-3 for LLaMA-7B). A prefix: 0.05,
    in standard deviations of its own keys and values."""
    if prompt.dim() == 5:
        return 0.05
    return 0.35 * float(model.embed_tokens.weight.detach().float().std())


TOKENS_AT_ONCE = 512                    # whose activations a CPU keeps at a time,
TOKENS_AT_ONCE_ON_GPU = 2048            # and a GPU


def windows_at_once(seqlen: int, device, tokens: int = TOKENS_AT_ONCE) -> int:
    """How many windows have their activations kept at a time; tokens: of them all on a CPU."""
    if torch.device(device).type == "cuda":
        tokens = TOKENS_AT_ONCE_ON_GPU
    return max(1, tokens // seqlen)


def backward(loss: torch.Tensor) -> float:
    """The loss as a number; SCALE times its gradients are added to those of its leaves."""
    (SCALE * loss).backward()
    return loss.item()


def backward_by_parts(losses_of: Callable, index: torch.Tensor, at_once: int) -> float:
    """Mean of losses_of(part) (windows of part, tokens) over all of index, SCALE times its gradient
    added up part by part: the activations of at_once windows exist at a time. Every window has as
    many losses."""
    total = 0.0
    for part in index.split(at_once):
        total += backward(losses_of(part).mean() * (len(part) / len(index)))
    return total


@contextmanager
def frozen(model):
    """The model in eval mode, none of its parameters asking for a gradient; afterwards as it
    was."""
    modes = [(module, module.training) for module in model.modules()]
    asked = [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for p in asked:
            p.requires_grad_(True)


def learn(model, prompt: torch.Tensor, windows: torch.Tensor, val: torch.Tensor | None = None,
          steps: int = 200, batch_size: int = 4, lr: float | None = None, warmup: int | None = None,
          clip: float = 1.0, val_every: int | None = None, seed: int = 0,
          teacher: tuple[torch.Tensor, torch.Tensor | None] | None = None, mix: float = 1.0,
          state: str | Path | None = None, progress=lambda items, title: items) -> Learned:
    """Learn a prompt of either kind on the model, which is frozen for that time; `fit` says how,
    and what state is.

    prompt: the start; windows (N, T) int64 training text; val (M, T): what has the lowest loss
    there, the start included, is returned; without it, the last. teacher: the dense model's
    states of windows and of val, for KL; mix: its share. Of a prefix P = P_0 + s u, u is learned,
    and lr is in its units; s is the standard deviation of each layer's keys, or values. Raises
    ValueError on NaN."""
    if not len(prompt) or not len(windows):
        raise ValueError(f"learning needs a prompt and text: got {len(prompt)} prompt tokens and "
                         f"{len(windows)} windows")
    if prompt.dim() == 5 and len(prompt) == 1:
        raise ValueError("a prefix of one position has nothing to learn: its first position stays "
                         "as it is")
    device, start = prompt.device, prompt.detach().float()
    lr = default_rate(model, prompt) if lr is None else lr
    kept, free = (start[:1], start[1:]) if start.dim() == 5 else (start[:0], start)
    unit = free.std((0, 3, 4), keepdim=True) if start.dim() == 5 else torch.ones((), device=device)
    moved = torch.nn.Parameter(torch.zeros_like(free))
    states, val_states = teacher or (None, None)
    val = None if val is None or not len(val) else val
    at_once = windows_at_once(windows.shape[1], device)

    def now() -> torch.Tensor:
        return torch.cat([kept, free + unit * moved])

    def loss_of_batch(index):
        """The prompt is read once, the windows behind it a few at a time: their gradients gather in
        its keys and values."""
        if not reads_caches(model):
            return backward(text_loss(model, now(), windows[index].to(device)).mean())
        full = read_prompt(model, now())
        kv = [t for pair in full.kv for t in pair]
        leaves = [t.detach().requires_grad_() for t in kv]
        full.kv = list(zip(leaves[::2], leaves[1::2]))

        def losses_of(part):
            wanted = None if states is None else states[part]
            return text_loss(model, full, windows[part].to(device), wanted, mix)
        total = backward_by_parts(losses_of, index, at_once)
        torch.autograd.backward(kv, [t.grad for t in leaves])
        return total

    def score():
        return mean_loss(model, now(), val, at_once, val_states, mix)

    marks = {"model": mark_of_model(model), "prompt": fingerprint(start),
             "text": fingerprint(windows), "val": None if val is None else fingerprint(val),
             "kind": kind_of(prompt), "kl": 0.0 if teacher is None else mix}
    with frozen(model):
        got = fit({"moved": moved}, loss_of_batch, len(windows), score if val is not None else None,
                  steps, batch_size, lr, warmup, clip, val_every, seed=seed, state=state,
                  settings=marks, title="learning the prompt", progress=progress)
    return Learned(now().detach(), *got)


# -------------------------------------------------------------------------------------------------
# Files.

PROBE = "Prompt 1234.5: naïve café — 数据 \n\tdef f(x): return x[0] != 'HELLO'  # the end"


def owner(model, tokenizer=None) -> dict:
    """Whose prompt it is, for its file: family, sizes, and a mark of the tokenizer: of the numbers
    of a probing text."""
    c = model.config
    mark = None if tokenizer is None else fingerprint(torch.tensor(tokenizer.encode(PROBE)))
    return {"family": c.family, "width": c.d_embed, "vocab_size": c.vocab_size,
            "n_layer": c.n_layer, "n_kv_head": c.n_kv_head, "head_dim": c.head_dim,
            "rope_theta": c.rope_theta if c.family == "llama" else None, "tokenizer": mark}


def save_prompt(path: str | Path, prompt: torch.Tensor, settings: dict | None = None,
                owner: dict | None = None) -> None:
    """Write a prompt of either kind in fp32, its settings (JSON values) and whose it is, as
    .safetensors; readable by that package: one tensor, soft_prompt."""
    settings = {name: None if value != value else value         # JSON has no NaN
                for name, value in (settings or {}).items()}
    told = {"settings": json.dumps(settings), "kind": kind_of(prompt),
            "owner": json.dumps(owner or {})}
    write_safetensors(Path(path), {"soft_prompt": prompt.detach().float().contiguous()}, told)


def load_prompt(path: str | Path, model=None, tokenizer=None,
                force: bool = False) -> tuple[torch.Tensor, dict]:
    """(prompt in fp32, settings). .pt files holding a tensor or {"soft_prompt": tensor, ...} are
    read as well.

    With a model, checks that the prompt can be stitched onto it: shapes must fit; another family,
    vocabulary, base of the rotary angles (prefix) or, with a tokenizer, another tokenizer is
    refused unless forced. Files that do not say whose they are pass."""
    path, settings, theirs = Path(path), {}, {}
    if not path.is_file():
        raise FileNotFoundError(f"no prompt file {path}: train.py writes prompt.safetensors into "
                                f"its --out folder")
    if path.suffix == ".pt":
        held = read_torch(path)
        if isinstance(held, dict):
            settings = {k: v for k, v in held.items() if k != "soft_prompt"}
    else:
        held = read_safetensors(path)
        try:
            settings, theirs = (json.loads(held.metadata.get(key, "{}"))
                                for key in ("settings", "owner"))
            if not isinstance(settings, dict) or not isinstance(theirs, dict):
                raise ValueError("no object")
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path} says of its prompt what is no JSON ({e}): it is damaged, "
                             f"learn or copy it again") from None
    prompt = held.get("soft_prompt") if isinstance(held, dict) else held
    if not torch.is_tensor(prompt) or prompt.dim() not in (2, 5):
        raise ValueError(f"{path} holds no soft_prompt of shape (n, width) or (n, layers, 2, "
                         f"heads, head_dim)")
    check_tensor(prompt, "soft_prompt", path)
    if model is not None:
        check_fits(model, prompt, str(path))
        ours = owner(model, tokenizer) if theirs else {}
        names = ["family", "vocab_size", "tokenizer"]
        names += ["rope_theta"] if prompt.dim() == 5 else []
        for name in () if force else names:
            was, now = theirs.get(name), ours.get(name)
            if None not in (was, now) and was != now:
                raise ValueError(f"{path} was learned for another {name.replace('_', ' ')} ({was}, "
                                 f"not {now}): it would mean nothing to this model; eval.py "
                                 f"--force stitches it on all the same")
        prompt = prompt.to(model.embed_tokens.weight.device)
    return prompt.detach().float().clone(), settings
