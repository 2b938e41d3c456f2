"""Measure a model, with or without a prompt: perplexity, zero-shot tasks, generation.

    python eval.py runs/out --prompt runs/out/prompt.safetensors      # on the text of the run
    python eval.py llama-7b --data c4 --seqlen 2048
    python eval.py llama-7b --tasks piqa,arc_easy --data-dir zeroshot/
    python eval.py llama-7b --generate "The castle was built in"

Perplexity = exp(sum of token losses / number of scored tokens), fp32, over consecutive windows of
`seqlen` tokens that do not overlap; each window scores seqlen - 1 targets. Behind a prompt of n
tokens the same targets are scored and nothing else. The code released with the paper divides by the
prompt's positions too, and so prints true^((L-1)/(L-1+n)): too good.

A zero-shot item is answered by the choice with the highest summed log-probability (acc), or with
the highest one a character (acc_norm), as in lm-evaluation-harness: data/tasks.py has the texts.
lambada_openai: is every token of the last word the likeliest one?
"""
from data.flags import PRECISIONS, Flags, flag, read_flags, real, run_program, say, whole

# Flags that belong to one kind of work.
MODES = {
    "perplexity": ("data", "data_dir", "split", "seqlen", "max_tokens", "batch_size"),
    "tasks": ("data_dir", "limit", "items", "batch_size"),
    "generate": ("max_new", "temperature", "top_p", "seed", "batch_size"),
    "generate_from": ("max_new", "temperature", "top_p", "seed", "batch_size"),
    "chat": ("max_new", "temperature", "top_p", "seed")}


def flags() -> Flags:
    """What can be asked for. A flag that was not given is None: `fill_in` says what it means."""
    p = Flags(description="Perplexity of a model, its answers to tasks, or its continuations of "
                          "text.")
    a = p.add_argument
    a("model", help="a checkpoint folder, the --out folder of a run, or a name such as llama-7b")
    a("--prompt", metavar="FILE", help="a learned prompt, as train.py leaves it in --out")
    a("--force", action="store_true",
      help="put --prompt in front even if another family or tokenizer learned it")
    a("--hard-prompt", metavar="TEXT", nargs="?", const=True,
      help="a prompt in words; alone: the paper's own")
    a("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    a("--dtype", choices=PRECISIONS,
      help="of weights and activations (default: the run's, else 16 bits where the device is fast)")
    a("--fused", choices=["on", "off"],
      help="off: unpack packed weights once, run ordinary Linears")
    a("--batch-size", type=whole(1, 4096),
      help="windows, choices or texts at a time (default 4; tasks 16)")
    a("--json", action="store_true", help="print one JSON object as the last line")

    a = p.add_argument_group("perplexity, of a text").add_argument
    a("--data", help="wikitext2, ptb, c4, docs, docstrings, code, headers, or a path "
                     "(default: the run's, else wikitext2)")
    a("--data-dir", metavar="FOLDER",
      help="folder that holds the text sets (default: the run's), or the tasks' files")
    a("--split", choices=["train", "validation", "test"],
      help="part of a text set (default: test; validation of c4)")
    a("--seqlen", type=whole(2, 1 << 20),
      help="tokens a window (default: the run's, else 2048 or what the model has)")
    a("--max-tokens", type=whole(2, 1 << 40),
      help="only the first so many tokens (default: all, or the run's if --data is the run's too)")

    a = p.add_argument_group("zero-shot tasks, instead").add_argument
    a("--tasks", metavar="NAME,NAME=FILE,...",
      help="piqa, hellaswag, arc_easy, arc_challenge, winogrande, openbookqa, boolq, "
           "lambada_openai; files are looked for in --data-dir")
    a("--limit", type=whole(1, 1 << 30), help="only the first so many items of each task")
    a("--items", metavar="FILE", help="write what every item got, one JSON object a line")

    a = p.add_argument_group("generation, instead").add_argument
    a("--generate", metavar="TEXT", action="append",
      help="continue TEXT; may be given several times")
    a("--generate-from", metavar="FILE",
      help="continue each line of FILE, or each field text of a .jsonl; -: of stdin")
    a("--chat", action="store_true", default=None,
      help="talk to it; without a chat template, lines are continued")
    a("--max-new", type=whole(1, 1 << 20),
      help="at most so many tokens for a text (default 100), or an answer (default 1000)")
    a("--temperature", type=real(0, 100), help="0, the default, is greedy")
    a("--top-p", type=real(0, 1, above=True),
      help="draw from the likeliest tokens of this mass only (default 1)")
    a("--seed", type=whole(0, 2**62), help="of the tokens drawn at a temperature (default 0)")
    return p


if __name__ == "__main__":
    args = read_flags(flags())       # before torch is loaded: --help and wrong flags answer at once

import json
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from compress import Stream
from data import parallel
from data.chat import ChatTemplate
from data.checkpoint import read_json, write_atomic
from data.config import DEFAULTS, SHIPPED, packed_layers, read_config, resolve
from data.harvest import SETS as HARVESTED, harvest_name
from data.progress import Progress
from data.tasks import TASKS, Item, find_task, load_items
from data.text import (FILES as TEXT_SETS, documents, eval_tokens, has_splits, lines_of,
                       split_to_judge)
from data.tokenizer import load_tokenizer
from kernels.cpu_attention import cpu_has_bf16
from model import Checkpoint, load_model
from prompt import HARD_PROMPT, HeadLoss, load_prompt, text_loss, with_prompt

DTYPES = {name: getattr(torch, name) for name in PRECISIONS}


# --------------------------------------------------------------------------------------------------
# Perplexity

@torch.no_grad()
def perplexity(model, tokens: torch.Tensor, seqlen: int, prompt: torch.Tensor | None = None,
               batch_size: int = 4, title: str = "perplexity") -> tuple[float, int]:
    """(perplexity, number of scored tokens) of 1-D tokens in windows of seqlen; a rest that fills
    no window is left out.

    ValueError, with the title, as soon as a loss is NaN or infinite."""
    windows = cut(tokens, seqlen, batch_size)
    device = model.embed_tokens.weight.device
    total, count = 0.0, 0
    for batch in Progress(parallel.mine(windows.split(batch_size)), title):
        nll = text_loss(model, prompt, batch.to(device))
        total += nll.double().sum().item()
        count += nll.numel()
        if not math.isfinite(total):
            what = f"the loss of tokens {count - nll.numel()} to {count}"
            raise not_finite(title, what, total, model)
    return over_all(total, count)


@torch.no_grad()
def streamed_perplexity(checkpoint: Checkpoint, tokens: torch.Tensor, seqlen: int,
                        batch_size: int = 4, dtype: torch.dtype = torch.float32,
                        device: str = "cpu", title: str = "perplexity") -> tuple[float, int]:
    """The same of a model that does not fit the device: block by block over all windows, one block
    there at a time."""
    batches = list(parallel.mine(cut(tokens, seqlen, batch_size).split(batch_size)))
    ends = checkpoint.ends(dtype, device)
    total, count = 0.0, 0
    for h, batch in zip(block_by_block(checkpoint, ends, batches, title), batches):
        z = ends.final(h[:, :-1]).flatten(0, 1)
        nll = HeadLoss.apply(z, ends.unembed, batch[:, 1:].flatten().to(device))
        total += nll.double().sum().item()
        count += nll.numel()
    if not math.isfinite(total):
        raise not_finite(title, "the loss", total, ends)
    return over_all(total, count)


def last_states(checkpoint: Checkpoint, windows: torch.Tensor, batch_size: int = 4,
                dtype: torch.dtype = torch.float32, device: str = "cpu",
                title: str = "the dense model's states") -> Iterator[torch.Tensor]:
    """The last block's outputs (batch, T, d_model) of windows (N, T), batch after batch; a model
    that does not fit the device goes block by block over all windows."""
    batches = windows.split(batch_size)
    if fits(checkpoint, dtype, device):
        model = checkpoint.model(dtype, device)
        for batch in Progress(batches, title):
            yield model.hidden(batch.to(device))
        return
    yield from block_by_block(checkpoint, checkpoint.ends(dtype, device), batches, title)


@torch.no_grad()
def block_by_block(checkpoint: Checkpoint, ends, batches: list[torch.Tensor], title: str) -> Stream:
    """The last block's outputs (batch, T, d_model) of batches of windows: every block goes over all
    of them before the next is read. ends: `checkpoint.ends`, whose dtype and device hold here."""
    weight = ends.embed_tokens.weight
    dtype, device = weight.dtype, str(weight.device)
    stream = Stream(dtype, device, exact=True)
    for batch in batches:
        stream.append(ends.stem(ends.embed(batch.to(device))).to(dtype))
        rope = ends.rope(0, batch.shape[1], device)             # the same for all
    for i in Progress(range(checkpoint.config.n_layer), title):
        block = checkpoint.block(i, dtype, device)
        for k in range(len(stream)):
            stream[k] = block(stream[k], rope)
    return stream


def cut(tokens: torch.Tensor, seqlen: int, batch_size: int) -> torch.Tensor:
    """1-D tokens -> windows (N, seqlen)."""
    if seqlen < 2 or batch_size < 1:
        raise ValueError(f"seqlen {seqlen} and batch size {batch_size} must be at least 2 and 1: "
                         f"a first token has no score")
    if len(tokens) < seqlen:
        raise ValueError(f"{len(tokens)} tokens cannot fill one window of seqlen {seqlen}: "
                         f"use more text or shorter windows")
    return tokens[:len(tokens) // seqlen * seqlen].view(-1, seqlen)


def over_all(total: float, count: int) -> tuple[float, int]:
    """(perplexity, scored tokens) from every process's sum of losses and number of tokens."""
    total, count = parallel.add_numbers(total, count)
    return math.exp(min(total / count, 700.0)), int(count)


def free_memory(device: str) -> float:
    """Bytes that are free on a device; infinity where the system does not tell."""
    if torch.device(device).type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept        # by torch, for what comes next
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines
                    if line.startswith("MemAvailable"))
    except (OSError, StopIteration):                     # not Linux: let the operating system page
        return math.inf


def fits(checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> bool:
    """Is there room on the device for all weights in dtype, and a fifth more?"""
    return 1.2 * dtype.itemsize * checkpoint.count() < free_memory(device)


def not_finite(title: str, what: str, value: float, model) -> ValueError:
    dtype = model.embed_tokens.weight.dtype
    why = {torch.float16: "activations overflow float16: try --dtype bfloat16 or float32",
           torch.bfloat16: "weights or prompt are damaged, or bfloat16 is too coarse: try --dtype "
                           "float32"}
    usual = "weights or prompt are damaged: make or download them again"
    return ValueError(f"{title}: {what} is {value}: {why.get(dtype, usual)}")


# --------------------------------------------------------------------------------------------------
# Zero-shot tasks

def encode_pair(tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of both, as they are when the text is encoded as one; spaces at the context's end go to
    the continuation."""
    kept = context.rstrip()
    continuation = context[len(kept):] + continuation
    if not context:                                      # something has to stand before the first
        ids = tokenizer.encode(continuation, bos=False)
        first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        return (ids[:1], ids[1:]) if first is None or ids[:1] == [first] else ([first], ids)
    ids = tokenizer.encode(kept + continuation)
    n = len(tokenizer.encode(kept))
    return ids[:n], ids[n:]


@torch.no_grad()
def zero_shot(model, tokenizer, items: list[Item], prompt: torch.Tensor | None = None,
              batch_size: int = 16, title: str = "zero-shot") -> list[dict]:
    """What each item got, in order: {"gold", "acc" (bool), "acc_norm" (bool), "logprobs" (nats,
    summed over the tokens of each choice), "tokens" and "lengths" (in tokens and characters)}.

    Longest first, padded at the right, where a causal model does not look. Choices that read the
    same and differ in their last token only, such as yes and no, are read once. A text beyond the
    positions loses its beginning, which is said."""
    positions = model.config.max_positions - (0 if prompt is None else len(prompt))
    rows = {}                                # tokens read -> [(item, choice, tokens scored, last)]
    cut = set()
    for i, item in enumerate(items):
        for j, (context, continuation) in enumerate(item.pairs):
            given, scored = encode_pair(tokenizer, context, continuation)
            if not given or not 0 < len(scored) <= positions:
                raise ValueError(f"{title}: item {i + 1}, choice {j + 1}: {len(given)} tokens of "
                                 f"context and {len(scored)} to score; needed are at least one of "
                                 f"each, and at most {positions} to score")
            if len(given) + len(scored) > positions + 1:
                cut.add(i)
            ids = (given + scored)[-(positions + 1):]
            rows.setdefault(tuple(ids[:-1]), []).append((i, j, len(scored), ids[-1]))
    if cut:
        say(f"{title}: {len(cut)} items lose the beginning of their context, as there are "
            f"{positions} positions")
    order = sorted(rows, key=lambda row: (-len(row), row))
    found = [[None] * len(item.pairs) for item in items]  # (log-probability, all likeliest, tokens)
    device = model.embed_tokens.weight.device
    batches = [order[k:k + batch_size] for k in range(0, len(order), batch_size)]
    for batch in Progress(batches, title):
        tokens = torch.zeros(len(batch), len(batch[0]), dtype=torch.int64)
        scored = torch.zeros(tokens.shape, dtype=torch.bool)
        longest = [max(n for _, _, n, _ in rows[row]) for row in batch]
        for r, row in enumerate(batch):
            tokens[r, :len(row)] = torch.tensor(row)
            scored[r, len(row) - longest[r]:len(row)] = True
        h = model.hidden(*with_prompt(model, prompt, tokens.to(device)))   # (B, T, d_model)
        logits = model.head(h[scored.to(device)]).float()                  # (scored, vocab)
        norms = logits.logsumexp(-1)
        likeliest = logits.argmax(-1)
        if not norms.isfinite().all():
            raise not_finite(title, "a log-probability", math.nan, model)
        parts = (t.split(longest) for t in (logits, norms, likeliest))
        for row, part, norm, best in zip(batch, *parts):
            for i, j, n, last in rows[row]:
                targets = torch.tensor([*row[len(row) - n + 1:], last], device=device)
                logprobs = part[-n:].gather(1, targets[:, None])[:, 0] - norm[-n:]
                found[i][j] = float(logprobs.double().sum()), bool((best[-n:] == targets).all()), n
    return [judge(item, *zip(*choices)) for item, choices in zip(items, found)]


def judge(item: Item, logprobs: tuple[float, ...], greedy: tuple[bool, ...],
          tokens: tuple[int, ...]) -> dict:
    """The record of one item. With a single choice, acc asks whether greedy decoding gives it."""
    a_character = [p / n if n else -math.inf for p, n in zip(logprobs, item.lengths)]
    best, best_norm = (values.index(max(values)) for values in (logprobs, a_character))
    right = greedy[0] if len(logprobs) == 1 else best == item.gold
    return {"gold": item.gold, "acc": right, "acc_norm": best_norm == item.gold,
            "logprobs": list(logprobs), "tokens": list(tokens), "lengths": item.lengths}


def summarize(task: str, results: list[dict]) -> dict:
    """{"items", and each metric of the task with its standard error (None for a single item)}.
    Errors are the sample deviation over the root of the number; a perplexity's is carried over from
    the mean of its logarithms."""
    out = {"items": len(results)}
    for metric in TASKS[task].metrics:
        if metric == "perplexity":
            values = [-r["logprobs"][0] for r in results]
        else:
            values = [float(r[metric]) for r in results]
        mean = statistics.fmean(values)
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        if metric == "perplexity":                       # of a whole word, as the harness counts
            mean = math.exp(min(mean, 700.0))
            error = None if error is None else error * mean
        out[metric], out[f"{metric}_stderr"] = mean, error
    return out


# --------------------------------------------------------------------------------------------------
# Generation

def pick(logits: torch.Tensor, temperature: float, top_p: float, u: torch.Tensor) -> torch.Tensor:
    """One token id a row of logits (B, vocab): the likeliest at temperature 0, else a draw from the
    smallest set of tokens whose mass reaches top_p. u (B,): uniform numbers in [0, 1), which
    decide."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    # the largest stays finite, whatever the temperature
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)
    p, ids = torch.softmax(logits, -1).sort(descending=True)
    kept = p.cumsum(-1) - p < top_p                      # the first token always is
    mass = (p * kept).cumsum(-1)
    drawn = torch.searchsorted(mass, (u.to(mass) * mass[:, -1])[:, None], right=True)
    return ids.gather(1, drawn.minimum(kept.sum(-1, keepdim=True) - 1))[:, 0]


class Steps:
    """Decoding steps of one token a row behind a cache: (B, 1) token ids -> logits (B, vocab).

    On a GPU a step is hundreds of small kernels, which take Python longer to launch than the GPU to
    run: the first step warms them up, the second records them as a CUDA graph, and from then on the
    graph is replayed. The position is a tensor there, so that all steps are the same work."""

    def __init__(self, model, cache):
        self.model, self.cache, self.graph = model, cache, None
        self.device = model.embed_tokens.weight.device

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """The same of any tokens (B, T) or embeddings, without a graph: logits of the last."""
        return self.model.head(self.model.hidden(x, self.cache)[:, -1])

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.device.type != "cuda":
            return self.compute(tokens)
        if not torch.is_tensor(self.cache.start):
            self.cache.start = torch.tensor([self.cache.start], device=self.device)
            return self.compute(tokens)
        if self.graph is None:
            self.tokens = tokens.clone()
            with torch.cuda.device(self.device):
                self.graph = torch.cuda.CUDAGraph()
                stream = torch.cuda.Stream(self.device)     # by default it is that of another GPU
                with torch.cuda.graph(self.graph, stream=stream):   # records, computes nothing
                    self.logits = self.compute(self.tokens)
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.logits


def check_row(model, row: list[int], prompt_tokens: int, what: str = "the text") -> None:
    """ValueError for a row of ids that cannot be continued."""
    positions = model.config.max_positions
    if not row:
        raise ValueError(f"{what} has no tokens, and this tokenizer adds none in front: there is "
                         f"nothing to continue")
    if prompt_tokens + len(row) >= positions:
        raise ValueError(f"{what} and the prompt take {prompt_tokens + len(row)} of the model's "
                         f"{positions} positions: no room to continue, use a shorter text")


@torch.no_grad()
def decode(model, rows: list[list[int]], max_new: int = 100, temperature: float = 0.0,
           top_p: float = 1.0, prompt: torch.Tensor | None = None, seeds: list[int] | None = None,
           stops: frozenset[int] = frozenset()) -> Iterator[tuple[int, int | None]]:
    """Continue several rows of token ids together: yields (row, new token) as they come, (row,
    None) when a row ends.

    A row ends after max_new tokens, at a token of `stops`, or when the model's positions are used
    up. All rows stand at the same position, so nothing is padded or masked: while a longer row's
    given tokens last, it reads these where the shorter ones already read what they made. Each row
    draws by its own seed, whatever else is in the batch."""
    n = 0 if prompt is None else len(prompt)
    positions = model.config.max_positions - n
    shortest = min(map(len, rows))
    for row in rows:
        check_row(model, row, n)
    device = model.embed_tokens.weight.device
    draws = [torch.Generator().manual_seed(seed) for seed in seeds or [0] * len(rows)]
    ends = [min(len(row) + max_new, positions) for row in rows]
    first = torch.tensor([row[:shortest] for row in rows], device=device)
    x, cache = with_prompt(model, prompt, first, room=max(ends) - shortest)
    running = set(range(len(rows)))
    step = Steps(model, cache)
    logits = step.compute(x)                                                           # (B, vocab)
    for at in range(shortest, max(ends)):
        if logits.isnan().any():
            raise not_finite("generation", f"a logit of token {at}", math.nan, model)
        u = torch.zeros(len(rows))
        for i, row in enumerate(rows if temperature else []):
            if at >= len(row):
                u[i] = torch.rand((), generator=draws[i])
        tokens = pick(logits, temperature, top_p, u).tolist()
        for i, row in enumerate(rows):
            if at < len(row):
                tokens[i] = row[at]
            elif i in running:
                if tokens[i] not in stops:
                    yield i, tokens[i]
                if tokens[i] in stops or at + 1 == ends[i]:
                    running.remove(i)
                    yield i, None
        if not running:
            return
        logits = step(torch.tensor(tokens, device=device)[:, None])


def stream_text(model, tokenizer, rows: list[list[int]], stops: frozenset[int] | None = None,
                **how) -> Iterator[tuple[int, str]]:
    """`decode` as text: yields (row, new piece of its text), and (row, "") when a row has ended. A
    character whose bytes are not all there yet waits for them. stops: the tokenizer's unless given;
    how: see `decode`."""
    stops = tokenizer.stops if stops is None else stops
    ends = [last_ids(tokenizer, row) for row in rows]   # what new tokens are decoded behind
    shown = [len(tokenizer.decode(end)) for end in ends]
    for i, token in decode(model, rows, stops=stops, **how):
        ends[i] += [] if token is None else [token]
        text = tokenizer.decode(ends[i])
        if text[shown[i]:] and (token is None or not text.endswith("\ufffd")):
            yield i, text[shown[i]:]
            ends[i] = last_ids(tokenizer, ends[i])
            shown[i] = len(tokenizer.decode(ends[i]))
        if token is None:
            yield i, ""


def last_ids(tokenizer, ids: list[int]) -> list[int]:
    """The last of a text's ids, as many as have some text: what follows decodes behind them as it
    does behind all. (Behind nothing, a first word would lose its space.)"""
    n = 4
    while n < len(ids) and not tokenizer.decode(ids[-n:]).strip():
        n *= 2
    return list(ids[-n:])


def generate(model, tokenizer, texts: list[str], max_new: int = 100, temperature: float = 0.0,
             top_p: float = 1.0, prompt: torch.Tensor | None = None, seed: int = 0,
             batch_size: int = 4) -> Iterator[tuple[int, str]]:
    """Continue the texts, up to batch_size at a time: yields what `stream_text` does, (number of
    the text, new piece or ""). Text i draws by seed + i, so that its continuation does not depend
    on the batch. Raises ValueError, before the first, for a text that has no room."""
    rows = [tokenizer.encode(text) for text in texts]
    n = 0 if prompt is None else len(prompt)
    for i, row in enumerate(rows):
        check_row(model, row, n, f"text {i + 1}, {texts[i][:40]!r}")

    def pieces():
        for batch in batches_alike(list(map(len, rows)), batch_size, max_new):
            seeds = [seed + i for i in batch]
            for i, piece in stream_text(model, tokenizer, [rows[i] for i in batch], seeds=seeds,
                                        max_new=max_new, temperature=temperature, top_p=top_p,
                                        prompt=prompt):
                yield batch[i], piece
    return pieces()


def batches_alike(lengths: list[int], batch_size: int, spread: int) -> Iterator[list[int]]:
    """Numbers of neighbours, at most batch_size, whose lengths differ by at most `spread`: a batch
    reads the rest of its longest token by token."""
    batch = []
    for i, length in enumerate(lengths):
        inside = [lengths[k] for k in batch] + [length]
        if batch and (len(batch) == batch_size or max(inside) - min(inside) > spread):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def print_in_order(texts: list[str], pieces: Iterator[tuple[int, str]]) -> list[str]:
    """Print each text and its continuation, the first unfinished one as it grows; returns the
    continuations."""
    made, ended, current, printed = ["" for _ in texts], set(), 0, 0
    print(texts[0], end="", flush=True)
    for i, piece in pieces:
        made[i] += piece
        if not piece:
            ended.add(i)
        while current < len(texts):
            print(made[current][printed:], end="", flush=True)
            printed = len(made[current])
            if current not in ended:
                break
            current, printed = current + 1, 0
            print("\n" if current < len(texts) else "")
            if current < len(texts):
                print(texts[current], end="", flush=True)
    return made


def talk(model, tokenizer, template: ChatTemplate | None, lines: Iterator[str], seed: int = 0,
         **how) -> None:
    """Print an answer to each line. With a template the whole conversation is read again for each
    answer, without its beginning where that leaves no room; without one each line is continued by
    itself. how: see `decode`."""
    stops = tokenizer.stops | (template.stops(tokenizer) if template else frozenset())
    n = 0 if how.get("prompt") is None else len(how["prompt"])
    positions = model.config.max_positions - n
    room = min(how.get("max_new", 100), positions // 4)
    messages = []
    for number, line in enumerate(lines):
        line = line.rstrip("\n")
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        row = template.encode(tokenizer, messages) if template else tokenizer.encode(line)
        kept = messages
        while template and len(row) + room > positions and len(kept) > 1:
            kept = kept[2:]                                     # without a question and its answer
            row = template.encode(tokenizer, kept)
        try:
            check_row(model, row, n, "this line")
        except ValueError as e:
            say(f"({e})")
            messages.pop()                                      # the line alone is forgotten
            continue
        if len(kept) < len(messages):
            forgotten = (len(messages) - len(kept)) // 2
            say(f"(the first {forgotten} of its turns no longer fit, and are left out)")
        messages = kept
        answer = ""
        for _, piece in stream_text(model, tokenizer, [row], stops, seeds=[seed + number], **how):
            print(piece, end="", flush=True)
            answer += piece
        print()
        messages.append({"role": "assistant", "content": answer})


def ask() -> Iterator[str]:
    """Lines of stdin until it ends, with a sign in front on a terminal."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line


# --------------------------------------------------------------------------------------------------
# What to use where no flag says

def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def usable(device: str) -> str:
    """The device, if this machine has it; ValueError otherwise."""
    try:
        torch.empty(0, device=device)
        found = torch.device(device).type in ("cpu", "cuda", "xpu")
        why = "no place to compute in float64, as perplexity does"
    except (RuntimeError, AssertionError) as e:
        found, why = False, str(e).splitlines()[0]
    if not found:
        raise ValueError(f"--device {device} cannot be used here ({why}): "
                         f"try --device {default_device()}")
    return device


def fast_dtypes(device: str) -> set[str]:
    """Names of the dtypes that this device multiplies at full speed. A CPU has bfloat16 only with
    AMX or AVX512-BF16: with AVX2 alone a product takes 14 times as long as in float32; float16 is
    slow on all of them."""
    if torch.device(device).type == "cpu":
        return {"float32", "bfloat16"} if cpu_has_bf16() else {"float32"}
    old = torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    return set(PRECISIONS) - ({"bfloat16"} if old else set())


def default_dtype(device: str, stored: str = "float16") -> str:
    """Name of the dtype to run in on this device: 16 bits where they are fast, else float32. A
    model stored in bfloat16 stays in it, as its activations may overflow float16."""
    fast = fast_dtypes(device)
    order = ["bfloat16", "float16"] if stored == "bfloat16" else ["float16", "bfloat16"]
    return next((name for name in order if name in fast), "float32")


def stored_dtype(folder: Path) -> str:
    """What config.json says that the weights are in; float16 where it says nothing."""
    path = folder / "config.json"
    said = read_json(path) if path.exists() else {}
    return str(said.get("dtype") or said.get("torch_dtype") or "float16")


def locate(name: str) -> tuple[Path, dict, str]:
    """(folder of a model, settings of the run that made it, where they are from) for a name, a
    checkpoint folder or the --out folder of a run, which holds its model in compressed/, or names
    the one that it learned a prompt for."""
    if name in SHIPPED:
        return resolve(name), DEFAULTS["tiny"], "its defaults"
    path = Path(name)
    holds_model = any((path / file).exists() for file in ("config.json", "params.json"))
    if not holds_model and (path / "report.json").is_file():
        report = path / "report.json"
        settings = run_settings(report)
        model = settings.get("model", "MODEL")
        is_dense = settings.get("bits") == 16 and str(settings.get("sparsity")) in ("0", "0.0")
        if settings.get("packed") or is_dense:
            return resolve(model), settings, str(report)
        if not (path / "compressed" / "config.json").is_file():
            raise FileNotFoundError(f"{path} holds a run of train.py but no whole compressed/: "
                                    f"finish the run, or measure its dense model, python eval.py "
                                    f"{model}")
        path = path / "compressed"
    report = path.resolve().parent / "report.json"
    if path.resolve().name == "compressed" and report.is_file():
        return resolve(path), run_settings(report), str(path.parent / "report.json")
    return resolve(path if path.is_dir() else name), {}, "no run"


def run_settings(report: Path) -> dict:
    """The flags of the run that wrote a report.json."""
    settings = read_json(report).get("settings")
    kinds = {"data": str, "seqlen": int, "dtype": str, "max_tokens": int, "data_dir": str}
    if not isinstance(settings, dict) or not all(isinstance(settings.get(name), (kind, type(None)))
                                                 for name, kind in kinds.items()):
        raise ValueError(f"{report} is not a report of train.py: move it away, and give --data, "
                         f"--seqlen and --dtype")
    return settings


def fill_in(args, folder: Path, run: dict, source: str, positions: int) -> str:
    """Set what no flag has set: as in the run that made the model, else by the machine and the
    model's positions. Returns a line that says what was chosen."""
    chosen = []

    def choose(name, value, why):
        if getattr(args, name) is None:
            setattr(args, name, value)
            chosen.append(f"{name.replace('_', '-')} {value} ({why})")

    choose("device", default_device(), "what this machine has")
    usable(args.device)
    ran_in = run.get("dtype")
    if ran_in in fast_dtypes(args.device):
        choose("dtype", ran_in, source)
    kind = torch.device(args.device).type
    choose("dtype", default_dtype(args.device, stored_dtype(folder)), f"fast on this {kind}")
    if args.mode == "perplexity":
        if run.get("data") and args.data in (None, run["data"]):
            choose("data", run["data"], source)
            if run.get("max_tokens"):
                choose("max_tokens", run["max_tokens"], source)
        choose("data", "wikitext2", "no run")
        if run.get("data_dir") and args.data in TEXT_SETS:
            choose("data_dir", run["data_dir"], source)
        if run.get("seqlen"):
            choose("seqlen", run["seqlen"], source)
        choose("seqlen", min(2048, positions), "no run")
    defaults = {"batch_size": 16 if args.mode == "tasks" else 4,
                "max_new": 1000 if args.mode == "chat" else 100,
                "temperature": 0.0, "top_p": 1.0, "seed": 0}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return "; ".join(chosen)


def check_flags(args) -> None:
    """Sets args.mode; ValueError for flags that would do nothing."""
    asked = [name for name in MODES if name != "perplexity" and getattr(args, name) is not None]
    if len(asked) > 1:
        raise ValueError(f"{flag(asked[0])} and {flag(asked[1])} exclude each other: "
                         f"run them one after the other")
    args.mode = asked[0] if asked else "perplexity"
    for name in dict.fromkeys(name for names in MODES.values() for name in names):
        if getattr(args, name) is not None and name not in MODES[args.mode]:
            need = " or ".join(flag(mode) for mode, names in MODES.items()
                               if name in names and mode != "perplexity")
            what = f"with {flag(args.mode)}" if asked else f"without {need}"
            raise ValueError(f"{flag(name)} does nothing {what}: leave it out")
    for name in ("top_p", "seed"):
        if getattr(args, name) is not None and not args.temperature:
            raise ValueError(f"{flag(name)} does nothing at temperature 0: leave it out, "
                             f"or add --temperature 1")
    if args.prompt and args.hard_prompt is not None:
        raise ValueError("--prompt and --hard-prompt exclude each other: leave one out")
    if args.force and not args.prompt:
        raise ValueError("--force does nothing without --prompt: leave it out")
    if args.json and args.mode == "chat":
        raise ValueError("--json does nothing with --chat: leave it out")
    if args.items and (Path(args.items).is_dir() or not Path(args.items).parent.is_dir()):
        raise ValueError(f"--items {args.items} is no file in a folder that is there: name another")
    names = args.tasks.split(",") if args.mode == "tasks" else []
    tasks = [name.partition("=")[0] for name in names]
    twice = next((task for task in tasks if tasks.count(task) > 1), None)
    if twice is not None:
        raise ValueError(f"--tasks names {twice} twice: run the one after the other")
    if names and args.data_dir and all("=" in name for name in names):
        raise ValueError("--data-dir does nothing where --tasks names every file: leave it out")


def check_text_flags(args, given: set[str]) -> None:
    """The same of those that the text set decides about, which may be the run's."""
    for name, holds in (("split", has_splits(args.data)), ("data_dir", args.data in TEXT_SETS)):
        if name in given and not holds:
            raise ValueError(f"{flag(name)} does nothing with --data {args.data}: leave it out")


# --------------------------------------------------------------------------------------------------
# The program

def find_prompt(args, model, tokenizer) -> torch.Tensor | None:
    """The soft prompt of --prompt, the embedded text of --hard-prompt, or None."""
    if args.prompt:
        return load_prompt(args.prompt, model, tokenizer, args.force)[0]
    if args.hard_prompt is None:
        return None
    text = HARD_PROMPT if args.hard_prompt is True else args.hard_prompt
    ids = tokenizer.encode(text, bos=False)
    if not ids:
        raise ValueError(f"--hard-prompt {text!r} has no tokens: give it some words")
    return model.embed(torch.tensor(ids, device=model.embed_tokens.weight.device)).float()


def read_texts(path: str) -> list[str]:
    """Lines that are not empty of a file or of stdin (-), or the field text of each line of a
    .jsonl."""
    if path == "-":
        found = [line.rstrip("\n") for line in sys.stdin]
        found[:1] = [line.removeprefix("\ufeff") for line in found[:1]]     # a byte order mark
    elif Path(path.removesuffix(".gz")).suffix == ".jsonl":
        found = documents(Path(path))
    else:
        found = [line.rstrip("\r\n") for line in lines_of(Path(path))]
    found = [text for text in found if text.strip()]
    if not found:
        raise ValueError(f"--generate-from {path} holds no text: put one text into each line")
    return found


def measure(args, model, tokenizer, prompt) -> dict:
    n = 0 if prompt is None else len(prompt)
    positions = model.config.max_positions
    if n + args.seqlen > positions:
        advice = f"--seqlen {positions - n} fits" if positions - n > 1 else "use a shorter prompt"
        raise ValueError(f"--seqlen {args.seqlen} and {n} prompt tokens need {n + args.seqlen} "
                         f"positions, but {args.model} has {positions}: {advice}")
    split = args.split or split_to_judge(args.data)
    tokens = eval_tokens(tokenizer, args.data, split, args.seqlen, args.max_tokens, args.data_dir)
    title = f"perplexity of {args.model}"
    ppl, count = perplexity(model, tokens, args.seqlen, prompt, args.batch_size, title)
    source = harvest_name(args.data) if args.data in HARVESTED else args.data   # with its versions
    print(f"perplexity {ppl:.4f}  ({source}, {count} scored tokens, seqlen {args.seqlen}, "
          f"{n} prompt tokens, {args.dtype}, {args.model})")
    return {"perplexity": ppl, "tokens": count, "seqlen": args.seqlen, "prompt_tokens": n,
            "data": args.data, "source": source, "split": split}


def answer(args, model, tokenizer, prompt, tasks: dict[str, list[Item]]) -> dict:
    n = 0 if prompt is None else len(prompt)
    results, summaries = [], {}
    print(f"{'':16s} {'items':>6s}  {n} prompt tokens, {args.dtype}, {args.model}")
    for task, items in tasks.items():
        got = zero_shot(model, tokenizer, items, prompt, args.batch_size, task)
        results += [{"task": task, "item": i, **r} for i, r in enumerate(got)]
        summaries[task] = summary = summarize(task, got)
        numbers = []
        for metric in TASKS[task].metrics:
            error = summary[f"{metric}_stderr"]
            numbers.append(f"{metric} {summary[metric]:.4f}")
            numbers[-1] += "" if error is None else f" +- {error:.4f}"
        print(f"{task:16s} {summary['items']:6d}  {'  '.join(numbers)}", flush=True)
    if args.items:
        text = "".join(json.dumps(r, allow_nan=False) + "\n" for r in results)
        write_atomic(Path(args.items), lambda f: f.write(text.encode()))
    return {"tasks": summaries, "prompt_tokens": n}


def main(args) -> None:
    given = {name for name, value in vars(args).items() if value is not None}
    check_flags(args)
    folder, run, source = locate(args.model)
    if args.fused and not packed_layers(folder):
        raise ValueError(f"--fused does nothing with {args.model}, which is not packed: leave it "
                         f"out")
    texts = args.generate or (read_texts(args.generate_from) if args.generate_from else [])
    names = args.tasks.split(",") if args.tasks is not None else []
    tasks = {find_task(name, args.data_dir)[0]: load_items(name, args.data_dir, args.limit)
             for name in names}
    tokenizer = load_tokenizer(folder)
    template = ChatTemplate.of(folder) if args.chat else None
    chosen = fill_in(args, folder, run, source, read_config(folder).max_positions)
    if args.mode == "perplexity":
        check_text_flags(args, given)
    if chosen:
        say(chosen)
    model = load_model(folder, DTYPES[args.dtype], args.device, args.fused != "off")
    prompt = find_prompt(args, model, tokenizer)
    how = {"max_new": args.max_new, "temperature": args.temperature, "top_p": args.top_p,
           "prompt": prompt}
    if args.mode == "chat":
        say("end with Ctrl-D" if template
            else "no chat template: each line is continued; end with Ctrl-D")
        talk(model, tokenizer, template, ask(), args.seed, **how)
        return
    if args.mode == "perplexity":
        result = measure(args, model, tokenizer, prompt)
    elif args.mode == "tasks":
        result = answer(args, model, tokenizer, prompt, tasks)
    else:
        pieces = generate(model, tokenizer, texts, seed=args.seed, batch_size=args.batch_size,
                          **how)
        made = print_in_order(texts, pieces)
        result = {"generations": [{"text": a, "generated": b} for a, b in zip(texts, made)]}
    if args.json:
        where = {"model": args.model, "device": args.device, "dtype": args.dtype}
        print(json.dumps({**result, **where}, allow_nan=False))


if __name__ == "__main__":
    run_program(main, args)
