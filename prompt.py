"""Soft prompts: n learned embeddings in front of the text of a frozen model ("Compress, Then Prompt", 2305.11186).

The prompt P (n, width) is the only parameter. For a window of tokens x_1 ... x_L with embeddings e_i the model reads
[P, e_1 ... e_L], and P minimizes the mean of -log p(x_i | P, x_1 ... x_{i-1}) over i = 2 ... L (equation 1). The n prompt
positions predict nothing: they have no loss, and they are not counted in any perplexity.

    prompt = initial_prompt(model, 100, tokens=first_tokens)       # any model with embed(tokens) and forward(embeds)
    prompt = learn(model, prompt, train_windows, val_windows, steps=200).prompt
    save_prompt("prompt.safetensors", prompt, {"lr": 1e-3}); logits = model(with_prompt(model, prompt, tokens))

The prompt stays in fp32, whatever the model is in: late, small updates vanish in bf16. A hard prompt is plain text whose
embeddings go in front in the same way. Left out: prompts for every layer (prefix tuning), and weight decay.
"""
import hashlib
import json
import math
import struct
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

from data.checkpoint import read_safetensors, read_torch, write_atomic, write_safetensors

HARD_PROMPT = ("The weight matrix inside the language model contains errors. Make any necessary adjustments to ensure "
               "optimal performance.")                          # the paper's own, section 3.2


class Learned(NamedTuple):
    prompt: torch.Tensor                # (n, width) fp32, the best seen on the validation windows
    val_loss: float                     # its mean loss there, nats a token; nan without validation windows
    losses: list[float]                 # training loss of every step, nats a token


def initial_prompt(model, n: int, how: str = "text", tokens: torch.Tensor | None = None, seed: int = 0) -> torch.Tensor:
    """(n, width) fp32 start: "text" = embeddings of the first n of `tokens`, "vocab" = n random tokens' embeddings,
    "random" = normal numbers with the embedding matrix's deviation."""
    g = torch.Generator().manual_seed(seed)
    table = model.embed_tokens.weight
    if how == "text":
        if tokens is None or len(tokens) < n:
            raise ValueError(f"a prompt of {n} tokens from text needs {n} tokens, got {0 if tokens is None else len(tokens)}")
        ids = tokens[:n]
    elif how == "vocab":
        ids = torch.randint(0, table.shape[0], (n,), generator=g)
    elif how == "random":
        return (torch.randn(n, table.shape[1], generator=g) * float(table.float().std())).to(table.device)
    else:
        raise ValueError(f"prompt start {how!r}: known are text, vocab and random")
    return model.embed(ids.to(table.device)).detach().float()


def with_prompt(model, prompt: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor:
    """[prompt, embeddings of tokens]: (n, width) and (B, T) -> (B, n + T, width) in the model's dtype."""
    e = model.embed(tokens)
    if prompt is None or len(prompt) == 0:
        return e
    if prompt.shape[-1] != e.shape[-1]:
        raise ValueError(f"a prompt of width {prompt.shape[-1]} does not fit a model whose embeddings are {e.shape[-1]} wide")
    return torch.cat([prompt.to(e.device, e.dtype).expand(len(e), -1, -1), e], 1)


def text_nll(model, prompt: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor:
    """Loss of text tokens 2 ... T of every window (B, T), in order, behind the prompt: fp32 (B * (T - 1),) in nats."""
    n = 0 if prompt is None else len(prompt)
    targets = torch.full((len(tokens), n + tokens.shape[1]), -100, device=tokens.device)
    targets[:, n:-1] = tokens[:, 1:]                            # position n + i predicts token i + 1; nothing before counts
    embeds = with_prompt(model, prompt, tokens)
    if hasattr(model, "nll"):
        return model.nll(embeds, targets)                       # never holds the full logits
    logits = model(embeds)
    keep = targets != -100
    return F.cross_entropy(logits[keep].float(), targets[keep], reduction="none")


class Fit(NamedTuple):
    val_loss: float                     # of what the parameters now hold, the best seen; nan without validation
    losses: list[float]                 # training loss of every step
    scores: list[tuple[int, float]]     # (steps done, validation loss), the start first


def fit(params: dict[str, torch.Tensor], loss_of_batch: Callable, count: int, score: Callable | None = None,
        steps: int = 200, batch_size: int = 4, lr: float = 1e-3, warmup: int | None = None, clip: float = 1.0,
        val_every: int | None = None, betas: tuple[float, float] = (0.9, 0.999), seed: int = 0,
        state: str | Path | None = None, settings: dict | None = None, title: str = "learning",
        progress=lambda items, title: items) -> Fit:
    """Minimize loss_of_batch(index (batch,) int64 of windows 0 ... count - 1) over params, fp32 leaves, in place.

    AdamW without decay; linear warm-up, then linear decay; gradients clipped; windows reshuffled (seeded) every epoch.
    score() is the validation loss; the start counts, and the parameters end as the best seen. With `state`, a path, all
    that is needed to go on is written at every validation, and a second call continues to the same bits. `settings`
    (JSON values: model, text) is compared then. Raises ValueError on a loss that is not finite or a foreign state."""
    if count < 1 or steps < 0 or batch_size < 1 or not 0 < lr < math.inf:
        raise ValueError(f"cannot learn from {count} windows in {steps} steps of {batch_size} at rate {lr}: at least 1 "
                         f"window, 0 steps, 1 window a step and a finite rate above 0 are needed")
    warmup = max(1, min(20, steps // 10)) if warmup is None else warmup
    val_every = val_every or max(1, steps // 8)
    run = {**(settings or {}), "steps": steps, "batch_size": batch_size, "lr": lr, "warmup": warmup, "clip": clip,
           "val_every": val_every, "betas": list(betas), "seed": seed, "windows": count,
           "start": {name: fingerprint(p) for name, p in params.items()}}
    run = json.loads(json.dumps(run))                           # as it will be read back
    opt = torch.optim.AdamW(params.values(), lr=lr, betas=betas, weight_decay=0.0)
    losses, scores, done = [], [], 0

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
                raise ValueError(f"the start's loss is {scores[0][1]}: the model or its precision is at fault, use float32")
        if score is None or scores[-1][1] == min(v for _, v in scores):
            best = copy_of_params()
        if state is not None:
            held = {"settings": run, "done": done, "losses": losses, "scores": scores, "params": copy_of_params(),
                    "best": best, "optimizer": opt.state_dict()}
            write_atomic(Path(state), lambda f: torch.save(held, f))

    held = read_run(state, run)
    if held is None:
        best = None
        look()
    else:
        done, losses, scores, best = held["done"], held["losses"], held["scores"], held["best"]
        put(held["params"])
        opt.load_state_dict(held["optimizer"])
    g = torch.Generator().manual_seed(seed)
    epochs = -(-steps * batch_size // count)
    order = torch.cat([torch.randperm(count, generator=g) for _ in range(epochs)] or [torch.zeros(0, dtype=torch.int64)])
    bar = progress(range(done, steps), title)
    for step in bar:
        opt.param_groups[0]["lr"] = lr * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        loss = loss_of_batch(order[step * batch_size:(step + 1) * batch_size])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(params.values(), clip)
        if not torch.isfinite(norm):
            raise ValueError(f"the loss or its gradient is not finite at step {step + 1} (loss {loss.item():g}): lower --lr "
                             f"or use bfloat16 or float32")
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
        done = step + 1
        if hasattr(bar, "note"):
            bar.note(f"loss {sum(losses[-10:]) / len(losses[-10:]):.3f}")
        if done % val_every == 0 or done == steps:
            look()
    put(best)
    return Fit(min(v for _, v in scores) if scores else float("nan"), losses, scores)


def read_run(path: str | Path | None, run: dict) -> dict | None:
    """What fit wrote into the state file, or None where there is none. Raises ValueError if it is of another run."""
    if path is None or not Path(path).exists():
        return None
    advice = "delete it to start anew, or name another file"
    try:
        held = read_torch(Path(path))
        theirs = held["settings"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} holds no state of a learning run: {advice}") from None
    for name in {**theirs, **run}:
        if theirs.get(name) != run.get(name):
            raise ValueError(f"{path} is of another run: {name} was {theirs.get(name)}, is {run.get(name)}; {advice}")
    return held


def fingerprint(*tensors: torch.Tensor) -> str:
    """16 hexadecimal digits that tell tensors apart: of their types, shapes and bytes."""
    digest = hashlib.sha256()
    for t in tensors:
        digest.update(f"{t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def learn(model, prompt: torch.Tensor, windows: torch.Tensor, val: torch.Tensor | None = None, steps: int = 200,
          batch_size: int = 4, lr: float = 1e-3, warmup: int | None = None, clip: float = 1.0,
          val_every: int | None = None, seed: int = 0, state: str | Path | None = None, settings: dict | None = None,
          progress=lambda items, title: items) -> Learned:
    """Learn a prompt on the frozen model; `fit` says how, and what state and settings are.

    prompt (n, width) start; windows (N, T) int64 training text; val (M, T): what has the lowest loss there, the start
    included, is returned; without it, the last. Raises ValueError on a loss that is not finite."""
    if not len(prompt) or not len(windows):
        raise ValueError(f"learning needs a prompt and text: got {len(prompt)} prompt tokens and {len(windows)} windows")
    device = prompt.device
    p = torch.nn.Parameter(prompt.detach().clone().float())

    def loss_of_batch(index):
        return text_nll(model, p, windows[index].to(device)).mean()

    def score():
        return mean_loss(model, p.detach(), val.to(device), batch_size)

    texts = {"text": fingerprint(windows), "val": None if val is None else fingerprint(val)}
    got = fit({"soft_prompt": p}, loss_of_batch, len(windows), score if val is not None and len(val) else None, steps,
              batch_size, lr, warmup, clip, val_every, seed=seed, state=state, settings={**(settings or {}), **texts},
              title="learning the prompt", progress=progress)
    return Learned(p.detach().clone(), got.val_loss, got.losses)


@torch.no_grad()
def mean_loss(model, prompt, windows: torch.Tensor, batch_size: int = 4) -> float:
    """Mean loss a text token over windows (N, T), nats."""
    total, count = 0.0, 0
    for batch in windows.split(batch_size):
        nll = text_nll(model, prompt, batch)
        total, count = total + nll.double().sum().item(), count + nll.numel()
    return total / count


def save_prompt(path: str | Path, prompt: torch.Tensor, settings: dict | None = None) -> None:
    """Write the prompt (n, width) in fp32 and its settings (JSON values), as .safetensors; readable by that package."""
    write_safetensors(Path(path), {"soft_prompt": prompt.detach().float()}, {"settings": json.dumps(settings or {})})


def load_prompt(path: str | Path, model=None) -> tuple[torch.Tensor, dict]:
    """(prompt (n, width) fp32, settings). .pt files holding a tensor or {"soft_prompt": tensor, ...} are read as well.

    With a model, checks that the prompt can be stitched onto it: only the width of the embeddings must agree."""
    path, settings = Path(path), {}
    if not path.is_file():
        raise FileNotFoundError(f"no prompt file {path}: train.py writes prompt.safetensors into its --out folder")
    if path.suffix == ".pt":
        held = read_torch(path)
        settings = {k: v for k, v in held.items() if k != "soft_prompt"} if isinstance(held, dict) else {}
    else:
        held = read_safetensors(path)
        with open(path, "rb") as f:
            header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
        settings = json.loads(header.get("__metadata__", {}).get("settings", "{}"))
    prompt = held.get("soft_prompt") if isinstance(held, dict) else held
    if not torch.is_tensor(prompt) or prompt.dim() != 2:
        raise ValueError(f"{path} holds no soft_prompt of shape (n, width)")
    if model is not None:
        width = model.embed_tokens.weight.shape[1]
        if prompt.shape[1] != width:
            raise ValueError(f"{path} was learned for embeddings of width {prompt.shape[1]}; this model's are {width} wide")
        prompt = prompt.to(model.embed_tokens.weight.device)
    return prompt.float().clone(), settings
