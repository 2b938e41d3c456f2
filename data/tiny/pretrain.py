"""Pretrains the two tiny models that ship, on the train split of the harvested texts (data/harvest.py).

    python -m data.tiny.pretrain llama --work runs/tiny-llama --compile  # or opt; the same command again resumes
    python -m data.tiny.pretrain llama --work runs/tiny-llama --export data/tiny/llama        # writes what ships

Narrow and deep on purpose, with a small vocabulary: most weights then sit in the Linears that train.py compresses, and
each of them is needed, as in a large model trained on far more text.

Warm-up, a constant rate, then a linear decay to zero ("WSD", 2404.06395 section 4): the length need not be known in
advance. The constant phase ends after --cpu-minutes of processor time, or when validation no longer improves; the decay
then takes a quarter as many steps. The matrices of the blocks are trained by Muon (momentum, made orthogonal by five
Newton-Schulz steps), all else by AdamW. Batches depend on the seed and the step alone. Needs torch >= 2.9 for its Muon,
and tokenizers from make_tokenizers.py.

The shipped LLaMA took 5,125 steps at the constant rate and 1,281 of decay, 52.5 million tokens, 111 minutes of one core; the
OPT 1,854 and 463, 19.0 million tokens, 45 minutes. Validation losses were still falling: more would fit.

The log, loss.csv, has one line per 100 steps: training loss (nats per token, running mean) and bits per byte of the
validation split of each set. Left out: dropout (few passes over the data), and more than one process.
"""
import argparse
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

HERE = Path(__file__).resolve().parent
CONFIGS = {
    "llama": Config("llama", vocab_size=2048, d_model=192, n_layer=6, n_head=3, d_ff=512, max_positions=512, tied=False),
    "opt": Config("opt", vocab_size=2048, d_model=192, n_layer=6, n_head=3, d_ff=768, max_positions=512,
                  attention_bias=True, mlp_bias=True),
}
SETS, MIXTURE = ("docs", "docstrings", "code"), (0.15, 0.45, 0.4)      # share of the windows from each; no headers
T, BATCH, WARMUP, EVAL_EVERY, PATIENCE, DECAY = 512, 16, 60, 100, 10, 0.25


def token_stream(tokenizer, name: str, split: str, work: Path) -> tuple[torch.Tensor, float]:
    """All documents of a set in one row (n,) int64, between BOS and EOS, and its mean bytes per token."""
    file = work / f"{name}-{split}.npz"
    if not file.exists():
        texts = harvest(name, split)
        ids = [tokenizer.encode(t) + [tokenizer.eos_id] * (tokenizer.eos_id != tokenizer.bos_id) for t in texts]
        size = sum(len(t.encode()) for t in texts)
        write_atomic(file, lambda f: np.savez(f, ids=np.concatenate([np.array(i, np.uint16) for i in ids]), size=size))
    z = np.load(file)
    return torch.from_numpy(z["ids"].astype(np.int64)), int(z["size"]) / len(z["ids"])


def initialize(model: Transformer) -> None:
    """GPT-2's: normal weights of deviation 0.02, less for the two matrices that end in the residual stream."""
    for name, p in model.named_parameters():
        if p.dim() == 2:
            residual = name.endswith(("attn.o.weight", "mlp.down.weight"))
            torch.nn.init.normal_(p, std=0.02 / math.sqrt(2 * model.config.n_layer if residual else 1))
        elif name.endswith("bias"):
            torch.nn.init.zeros_(p)


def optimizers(model: Transformer, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices in the blocks, AdamW at half its rate for embeddings, head, norms and biases."""
    inside = {name for name, p in model.named_parameters() if p.dim() == 2 and name.startswith("blocks.")}
    matrices = [p for name, p in model.named_parameters() if name in inside]
    others = [p for name, p in model.named_parameters() if name not in inside]
    return [torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=lr / 2, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]


def loss_of(model: Transformer, windows: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of each next token in windows (B, T + 1), matmuls in bf16."""
    with torch.autocast("cpu", torch.bfloat16):
        return F.cross_entropy(model(windows[:, :-1]).float().flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(model: Transformer, streams: list, windows: int = 16) -> list[float]:
    """Validation loss of each set, over `windows` evenly spaced windows, in bits per byte of text."""
    found = []
    for ids, bytes_per_token in streams:
        starts = [i * (len(ids) - T - 1) // windows for i in range(windows)]
        loss = loss_of(model, torch.stack([ids[s:s + T + 1] for s in starts]))
        found.append(loss.item() / math.log(2) / bytes_per_token)
    return found


def pretrain(name: str, work: Path, cpu_minutes: float, lr: float, seed: int, compiled: bool) -> None:
    """Trains to the end, or from the last checkpoint in `work` to the end."""
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(HERE / name)
    train = [token_stream(tokenizer, s, "train", work)[0] for s in SETS]
    validation = [token_stream(tokenizer, s, "validation", work) for s in SETS]
    torch.manual_seed(seed)
    model = Transformer(CONFIGS[name])
    initialize(model)
    opts, checkpoint = optimizers(model, lr), work / "checkpoint.pt"
    state = {"step": 0, "tokens": 0, "cpu": 0.0, "decay_from": None, "best": math.inf, "stale": 0, "loss": None}
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for opt, values in zip(opts, saved["optimizers"]):
            opt.load_state_dict(values)
        state = saved["state"]
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, from step {state['step']}; train tokens "
          + ", ".join(f"{harvest_name(s) if s == 'docs' else s} {len(t):,}" for s, t in zip(SETS, train)), flush=True)

    def save(file):
        content = {"model": model.state_dict(), "optimizers": [opt.state_dict() for opt in opts], "state": state}
        write_torch(file, lambda f: torch.save(content, f))

    train_loss = torch.compile(loss_of) if compiled else loss_of
    while True:
        start, step, end = time.process_time(), state["step"], None       # a stopped process has no processor time
        if state["decay_from"] is None and step and (state["cpu"] > 60 * cpu_minutes or state["stale"] >= PATIENCE):
            save(work / "constant.pt")                                    # from here longer runs may go on
            state["decay_from"] = step
        scale = min(1.0, (step + 1) / WARMUP)
        if state["decay_from"] is not None:
            end = int(state["decay_from"] * (1 + DECAY))
            if step >= end:
                return
            scale = (end - step) / (end - state["decay_from"])
        for opt, rate in zip(opts, (lr, lr / 2)):
            opt.param_groups[0]["lr"] = rate * scale

        rng = torch.Generator().manual_seed(1_000_003 * seed + step)
        which = torch.multinomial(torch.tensor(MIXTURE), BATCH, replacement=True, generator=rng)
        starts = [int(torch.randint(len(train[w]) - T - 1, (1,), generator=rng)) for w in which]
        loss = train_loss(model, torch.stack([train[w][s:s + T + 1] for w, s in zip(which, starts)]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        state["loss"] = loss.item() if state["loss"] is None else 0.95 * state["loss"] + 0.05 * loss.item()
        state["step"], state["tokens"] = step + 1, state["tokens"] + BATCH * T
        report = state["step"] % EVAL_EVERY == 0 or state["step"] == end
        bpb = bits_per_byte(model, validation) if report else None
        state["cpu"] += time.process_time() - start
        if report:
            better = sum(bpb) < state["best"]
            state["best"], state["stale"] = min(state["best"], sum(bpb)), 0 if better else state["stale"] + 1
            numbers = [round(x, 4) for x in (state["loss"], *bpb)]
            row = ",".join(map(str, [state["step"], state["tokens"], *numbers, round(state["cpu"])]))
            new = not (work / "loss.csv").exists()
            with open(work / "loss.csv", "a") as f:
                f.write("step,tokens,train_loss,docs,docstrings,code,cpu_seconds\n" * new + row + "\n")
            print(time.strftime("%H:%M:%S"), row, f"rate {scale:.2f}", flush=True)
            save(checkpoint)


def export(name: str, work: Path, folder: Path) -> None:
    """Writes the shipped layout in fp16: Meta's for llama (interleaved rotary channels), Hugging Face's for opt."""
    saved, folder = torch.load(work / "checkpoint.pt", weights_only=True), Path(folder)
    c, model = CONFIGS[name], Transformer(CONFIGS[name])
    model.load_state_dict(saved["model"])
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("tokenizer.model",) if name == "llama" else ("vocab.json", "merges.txt"):
        if folder.resolve() != HERE / name:
            shutil.copy(HERE / name / file, folder / file)
    shutil.copy(work / "loss.csv", folder / "loss.csv")
    if name == "opt":
        save_model(model, folder, extra={"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1})
        return
    weights = {}
    for ours, p in model.named_parameters():
        w = p.detach()
        if ours.endswith(("attn.q.weight", "attn.k.weight")):             # the inverse of model.half_split
            w = w.view(-1, 2, c.head_dim // 2, c.d_model).transpose(1, 2).reshape(w.shape)
        weights[published_name(ours, META)] = w.half()
    write_torch(folder / "consolidated.00.pth", lambda f: torch.save(weights, f))
    params = {"dim": c.d_model, "multiple_of": 256, "n_heads": c.n_head, "n_kv_heads": c.n_kv_head,
              "n_layers": c.n_layer, "norm_eps": c.norm_eps, "vocab_size": c.vocab_size, "max_seq_len": c.max_positions}
    write_atomic(folder / "params.json", lambda f: f.write((json.dumps(params) + "\n").encode()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=CONFIGS)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoint, tokens and log")
    parser.add_argument("--cpu-minutes", type=float, default=52, help="processor time of the constant phase")
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="fuse small operations: faster for llama, needs a C++ compiler")
    parser.add_argument("--export", type=Path, help="write the trained model to this folder and stop")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.export:
        export(args.name, args.work, args.export)
    else:
        pretrain(args.name, args.work, args.cpu_minutes, args.lr, args.seed, args.compile)
