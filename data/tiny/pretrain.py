"""Pretrains the two tiny models that ship, on the train split of the harvested texts
(data/harvest.py).

    python -m data.tiny.pretrain llama --work runs/tiny-llama --compile     # or opt
    python -m data.tiny.pretrain llama --work runs/tiny-llama --export data/tiny/llama

The first command again resumes; the second writes what ships.

Narrow and deep on purpose, with a small vocabulary: most weights then sit in the Linears that
train.py compresses, and each of them is needed, as in a large model trained on far more text.

Warm-up, a constant rate, then a linear decay to zero ("WSD", 2404.06395 section 4): the length need
not be known in advance. The constant phase ends after --cpu-minutes of processor time, or when
validation no longer improves; the decay then takes a quarter as many steps. The matrices of the
blocks are trained by Muon (momentum, made orthogonal by five Newton-Schulz steps), all else by
AdamW. Batches depend on the seed and the step alone. Needs torch >= 2.9 for its Muon, and
tokenizers from make_tokenizers.py.

The shipped LLaMA took 5,125 steps at the constant rate and 1,281 of decay, 52.5 million tokens, 111
minutes of one core; the OPT 1,854 and 463, 19.0 million tokens, 45 minutes. Validation losses were
still falling: more would fit.

The log, loss.csv, has one line per 100 steps: training loss (nats per token, running mean) and bits
per byte of the validation split of each set. Left out: dropout (few passes over the data), and more
than one process.
"""
import argparse
import hashlib
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data.checkpoint import write_atomic, write_torch
from data.config import Config
from data.harvest import harvest, harvest_name
from data.tokenizer import load_tokenizer
from model import META, Transformer, published_name, save_model
from prompt import PROBE

HERE = Path(__file__).resolve().parent
CONFIGS = {
    "llama": Config("llama", vocab_size=2048, d_model=192, n_layer=6, n_head=3, d_ff=512,
                    max_positions=512, tied=False),
    "opt": Config("opt", vocab_size=2048, d_model=192, n_layer=6, n_head=3, d_ff=768,
                  max_positions=512, attention_bias=True, mlp_bias=True),
}
SETS = ("docs", "docstrings", "code")         # no headers
MIXTURE = (0.15, 0.45, 0.4)                   # share of the windows from each set
T = 512                                       # tokens of a window
BATCH = 16                                    # windows of a step
WARMUP = 60                                   # steps
EVAL_EVERY = 100                              # steps
PATIENCE = 10                                 # evaluations without a better one
DECAY = 0.25                                  # steps of the decay, of those before it


def mark_of_tokens(tokenizer) -> str:
    """16 hexadecimal digits of the tokenizer and of the texts' versions."""
    made_of = f"{harvest_name('')} {tokenizer.encode(PROBE)}"
    return hashlib.sha256(made_of.encode()).hexdigest()[:16]


def token_stream(tokenizer, name: str, split: str, work: Path) -> tuple[torch.Tensor, float]:
    """All documents of a set in one row (n,) int64, between BOS and EOS, and its mean bytes per
    token. Kept in `work`."""
    file = work / f"{name}-{split}-{mark_of_tokens(tokenizer)}.npz"
    if not file.exists():
        texts = harvest(name, split)
        end = [tokenizer.eos_id] if tokenizer.eos_id != tokenizer.bos_id else []
        ids = [np.array(tokenizer.encode(text) + end, np.uint16) for text in texts]
        size = sum(len(text.encode()) for text in texts)
        write_atomic(file, lambda f: np.savez(f, ids=np.concatenate(ids), size=size))
    held = np.load(file)
    ids = torch.from_numpy(held["ids"].astype(np.int64))
    return ids, int(held["size"]) / len(ids)


def initialize(model: Transformer) -> None:
    """GPT-2's: normal weights of deviation 0.02, less for the two matrices that end in the residual
    stream."""
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 0.02
            if name.endswith(("attn.o.weight", "mlp.down.weight")):
                std /= math.sqrt(2 * model.config.n_layer)
            torch.nn.init.normal_(p, std=std)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(p)


def optimizers(model: Transformer, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices in the blocks, AdamW at half its rate for embeddings, head, norms and
    biases."""
    matrices = []
    others = []
    for name, p in model.named_parameters():
        is_matrix = p.dim() == 2 and name.startswith("blocks.")
        (matrices if is_matrix else others).append(p)
    return [torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=lr / 2, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]


def loss_of(model: Transformer, windows: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of each next token in windows (B, T + 1), matmuls in bf16."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(windows[:, :-1]).float()
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(model: Transformer, streams: list, windows: int = 16) -> list[float]:
    """Validation loss of each set, over `windows` evenly spaced windows, in bits per byte of text.
    streams: (ids, bytes per token) of each, from token_stream."""
    found = []
    for ids, bytes_per_token in streams:
        starts = [i * (len(ids) - T - 1) // windows for i in range(windows)]
        batch = torch.stack([ids[start:start + T + 1] for start in starts])
        bits = loss_of(model, batch).item() / math.log(2)
        found.append(bits / bytes_per_token)
    return found


def batch_of(streams: list[torch.Tensor], seed: int, step: int) -> torch.Tensor:
    """The windows (BATCH, T + 1) of a step, drawn from the sets by their shares."""
    rng = torch.Generator().manual_seed(1_000_003 * seed + step)
    which = torch.multinomial(torch.tensor(MIXTURE), BATCH, replacement=True, generator=rng)
    windows = []
    for i in which:
        start = int(torch.randint(len(streams[i]) - T - 1, (1,), generator=rng))
        windows.append(streams[i][start:start + T + 1])
    return torch.stack(windows)


def rate_at(step: int, decay_from: int | None) -> float:
    """The rate of a step as a share of the constant one; 0 where the decay has ended."""
    if decay_from is None:
        return min(1.0, (step + 1) / WARMUP)
    end = int(decay_from * (1 + DECAY))
    return (end - step) / (end - decay_from) if step < end else 0.0


def pretrain(name: str, work: Path, cpu_minutes: float, lr: float, seed: int,
             compiled: bool) -> None:
    """Trains to the end, or from the last checkpoint in `work` to the end."""
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(HERE / name)
    train = [token_stream(tokenizer, each, "train", work)[0] for each in SETS]
    validation = [token_stream(tokenizer, each, "validation", work) for each in SETS]
    torch.manual_seed(seed)
    model = Transformer(CONFIGS[name])
    initialize(model)
    opts = optimizers(model, lr)
    # cpu: seconds; decay_from: a step; best: lowest sum of bits per byte, stale: evaluations since
    state = {"step": 0, "tokens": 0, "cpu": 0.0, "decay_from": None, "best": math.inf, "stale": 0,
             "loss": None}
    run = {"name": name, "lr": lr, "seed": seed, "tokens": mark_of_tokens(tokenizer)}
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved.get("run") != run:
            raise SystemExit(f"error: {checkpoint} is of another run, {saved.get('run')}, this is "
                             f"{run}: name another --work")
        model.load_state_dict(saved["model"])
        for opt, values in zip(opts, saved["optimizers"]):
            opt.load_state_dict(values)
        state = saved["state"]
    parameters = sum(p.numel() for p in model.parameters())
    labels = [harvest_name("docs"), *SETS[1:]]
    counts = ", ".join(f"{label} {len(ids):,}" for label, ids in zip(labels, train))
    print(f"{name}: {parameters:,} parameters, from step {state['step']}; train tokens {counts}",
          flush=True)

    def save(file: Path) -> None:
        content = {"model": model.state_dict(), "state": state, "run": run,
                   "optimizers": [opt.state_dict() for opt in opts]}
        write_torch(file, lambda f: torch.save(content, f))

    train_loss = torch.compile(loss_of) if compiled else loss_of
    while True:
        start = time.process_time()                   # a stopped process has no processor time
        step = state["step"]
        if state["decay_from"] is None and step:
            if state["cpu"] > 60 * cpu_minutes or state["stale"] >= PATIENCE:
                save(work / "constant.pt")            # from here longer runs may go on
                state["decay_from"] = step
        share = rate_at(step, state["decay_from"])
        if share == 0:
            return
        for opt, rate in zip(opts, (lr, lr / 2)):
            opt.param_groups[0]["lr"] = rate * share

        loss = train_loss(model, batch_of(train, seed, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        now = loss.item()
        state["loss"] = now if state["loss"] is None else 0.95 * state["loss"] + 0.05 * now
        state["step"] = step + 1
        state["tokens"] += BATCH * T

        is_last = rate_at(step + 1, state["decay_from"]) == 0
        if state["step"] % EVAL_EVERY and not is_last:
            state["cpu"] += time.process_time() - start
            continue
        losses = bits_per_byte(model, validation)
        state["cpu"] += time.process_time() - start
        state["stale"] = 0 if sum(losses) < state["best"] else state["stale"] + 1
        state["best"] = min(state["best"], sum(losses))
        row = log(work / "loss.csv", state, losses)
        print(time.strftime("%H:%M:%S"), row, f"rate {share:.2f}", flush=True)
        save(checkpoint)


def log(file: Path, state: dict, losses: list[float]) -> str:
    """Add a line to loss.csv; returns it."""
    numbers = [round(number, 4) for number in (state["loss"], *losses)]
    values = [state["step"], state["tokens"], *numbers, round(state["cpu"])]
    row = ",".join(map(str, values))
    head = "" if file.exists() else "step,tokens,train_loss,docs,docstrings,code,cpu_seconds\n"
    with open(file, "a") as f:
        f.write(f"{head}{row}\n")
    return row


def export(name: str, work: Path, folder: Path) -> None:
    """Writes the shipped layout in fp16: Meta's for llama (interleaved rotary channels), Hugging
    Face's for opt."""
    saved = torch.load(work / "checkpoint.pt", weights_only=True)
    folder = Path(folder)
    model = Transformer(CONFIGS[name])
    model.load_state_dict(saved["model"])
    folder.mkdir(parents=True, exist_ok=True)
    files = ("tokenizer.model",) if name == "llama" else ("vocab.json", "merges.txt")
    for file in files:
        if folder.resolve() != HERE / name:
            shutil.copy(HERE / name / file, folder / file)
    shutil.copy(work / "loss.csv", folder / "loss.csv")
    if name == "opt":
        save_model(model, folder, extra={"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1})
        return
    c = model.config
    weights = {}
    for ours, p in model.named_parameters():
        w = p.detach()
        if ours.endswith(("attn.q.weight", "attn.k.weight")):     # the inverse of model.half_split
            halves = w.view(-1, 2, c.head_dim // 2, c.d_model)
            w = halves.transpose(1, 2).reshape(w.shape)
        weights[published_name(ours, META)] = w.half()
    write_torch(folder / "consolidated.00.pth", lambda f: torch.save(weights, f))
    params = {"dim": c.d_model, "multiple_of": 256, "n_heads": c.n_head, "n_kv_heads": c.n_kv_head,
              "n_layers": c.n_layer, "norm_eps": c.norm_eps, "vocab_size": c.vocab_size,
              "max_seq_len": c.max_positions}
    text = json.dumps(params) + "\n"
    write_atomic(folder / "params.json", lambda f: f.write(text.encode()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Pretrain a tiny model, or write what ships.")
    a = parser.add_argument
    a("name", choices=CONFIGS)
    a("--work", type=Path, required=True, help="folder for checkpoint, tokens and log")
    a("--cpu-minutes", type=float, default=52, help="processor time of the constant phase")
    a("--lr", type=float, default=6e-3)
    a("--seed", type=int, default=0)
    a("--threads", type=int, default=1)
    a("--compile", action="store_true",
      help="fuse small operations: faster for llama, needs a C++ compiler")
    a("--export", type=Path, help="write the trained model to this folder and stop")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.export:
        export(args.name, args.work, args.export)
    else:
        pretrain(args.name, args.work, args.cpu_minutes, args.lr, args.seed, args.compile)
