"""Measure a model, with or without a prompt in front: perplexity and generation. The second command-line program.

    python eval.py runs/out/compressed --data wikitext2 --seqlen 2048 --prompt runs/out/prompt.safetensors

Perplexity = exp(sum of token losses / number of scored tokens), fp32, over consecutive windows of `seqlen` tokens that do
not overlap; each window scores seqlen - 1 targets. Behind a prompt of n tokens the same targets are scored and nothing else.
The code released with the paper divides by the prompt's positions too, and so prints true^((L-1)/(L-1+n)): too good.
"""
import argparse
import json
import math
import sys
from pathlib import Path

import torch

from data.config import resolve
from data.harvest import SETS as HARVESTED, harvest_name
from data.progress import Progress
from data.text import eval_tokens
from data.tokenizer import load_tokenizer
from model import load_model
from prompt import HARD_PROMPT, load_prompt, text_nll, with_prompt

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@torch.no_grad()
def perplexity(model, tokens: torch.Tensor, seqlen: int, prompt: torch.Tensor | None = None, batch_size: int = 4,
               title: str = "perplexity") -> tuple[float, int]:
    """(perplexity, number of scored tokens) of 1-D tokens in windows of seqlen; the rest that fills no window is left out."""
    if seqlen < 2 or batch_size < 1:
        raise ValueError(f"seqlen {seqlen} and batch size {batch_size} must be at least 2 and 1: a first token has no score")
    if len(tokens) < seqlen:
        raise ValueError(f"{len(tokens)} tokens cannot fill one window of seqlen {seqlen}: use more text or shorter windows")
    windows = tokens[:len(tokens) // seqlen * seqlen].view(-1, seqlen)
    device, total, count = model.embed_tokens.weight.device, 0.0, 0
    for batch in Progress(windows.split(batch_size), title):
        nll = text_nll(model, prompt, batch.to(device))
        total, count = total + nll.double().sum().item(), count + nll.numel()
    return math.exp(min(total / count, 700.0)), count


def sample(logits: torch.Tensor, temperature: float, top_p: float, generator) -> int:
    """One token id from logits (vocab,): the largest at temperature 0, else a draw from the smallest set of mass top_p."""
    if temperature == 0:
        return int(logits.argmax())
    p, ids = torch.softmax(logits.float().cpu() / temperature, -1).sort(descending=True)
    p[p.cumsum(0) - p >= top_p] = 0                              # the first token always stays
    return int(ids[torch.multinomial(p, 1, generator=generator)])


@torch.no_grad()
def generate(model, tokenizer, text: str, max_new: int = 100, temperature: float = 0.0, top_p: float = 1.0,
             prompt: torch.Tensor | None = None, seed: int = 0) -> str:
    """The continuation of text, without text; stops at the end-of-text token or when the positions are used up."""
    if max_new < 1 or not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise ValueError(f"cannot generate {max_new} tokens at temperature {temperature} and top-p {top_p}: at least 1 token, "
                         f"a temperature of 0 or more, and a top-p above 0 and up to 1 are needed")
    ids = tokenizer.encode(text)
    if not ids:
        raise ValueError("nothing to continue: --generate got a text of no tokens, and this tokenizer adds none in front")
    taken = len(ids) + (0 if prompt is None else len(prompt))
    room = min(max_new, model.config.max_positions - taken)
    if room < 1:
        raise ValueError(f"text and prompt take {taken} of the model's {model.config.max_positions} positions: no room")
    x, cache = with_prompt(model, prompt, torch.tensor([ids], device=model.embed_tokens.weight.device), room)
    g, out = torch.Generator().manual_seed(seed), []
    for _ in range(room):
        token = sample(model.head(model.hidden(x, cache)[:, -1])[0], temperature, top_p, g)
        if token == tokenizer.eos_id:
            break
        out.append(token)
        x = torch.tensor([[token]], device=x.device)
    return tokenizer.decode(ids + out)[len(tokenizer.decode(ids)):]      # alone, a first word would lose its space


def find_prompt(args, model, tokenizer) -> torch.Tensor | None:
    """The soft prompt of --prompt, the embedded text of --hard-prompt, or None."""
    if args.prompt and args.hard_prompt:
        raise ValueError("--prompt and --hard-prompt exclude each other")
    if args.prompt:
        return load_prompt(args.prompt, model)[0]
    if args.hard_prompt:
        ids = torch.tensor(tokenizer.encode(args.hard_prompt, bos=False), device=model.embed_tokens.weight.device)
        return model.embed(ids).float()
    return None


def main(args) -> None:
    folder = resolve(args.model)
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, DTYPES[args.dtype], args.device, args.fused == "on")
    prompt = find_prompt(args, model, tokenizer)
    if args.generate is not None:
        text = generate(model, tokenizer, args.generate, args.max_new, args.temperature, args.top_p, prompt, args.seed)
        print(args.generate + text)
        if args.json:
            print(json.dumps({"text": args.generate, "generated": text, "model": args.model, "dtype": args.dtype}))
        return
    split = args.split or ("validation" if args.data == "c4" else "test")                      # C4 publishes no test split
    tokens = eval_tokens(tokenizer, args.data, split, args.seqlen, args.max_tokens, folder=args.data_dir)
    ppl, count = perplexity(model, tokens, args.seqlen, prompt, args.batch_size)
    n = 0 if prompt is None else len(prompt)
    source = harvest_name(args.data) if args.data in HARVESTED else args.data                  # versions, where they matter
    print(f"perplexity {ppl:.4f}  ({source}, {count} scored tokens, seqlen {args.seqlen}, {n} prompt tokens, {args.dtype}, "
          f"{args.model})")
    if args.json:
        print(json.dumps({"perplexity": ppl, "tokens": count, "seqlen": args.seqlen, "prompt_tokens": n, "data": args.data,
                          "source": source, "model": args.model, "dtype": args.dtype, "split": split}))


def fail(e: Exception) -> None:
    print(f"error: {e}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description="Perplexity of a model folder, or a continuation of --generate TEXT.")
    p.add_argument("model", help="a checkpoint folder or a name such as llama-7b")
    p.add_argument("--data", default="wikitext2", help="wikitext2, ptb, c4, docs, docstrings, code, headers, or a path")
    p.add_argument("--data-dir", type=Path, help="folder that holds the text sets")
    p.add_argument("--split", choices=["train", "validation", "test"])
    p.add_argument("--seqlen", type=int, default=2048, help="tokens a window")
    p.add_argument("--max-tokens", type=int, help="use only the first so many tokens")
    p.add_argument("--prompt", type=Path, help="a learned prompt file")
    p.add_argument("--hard-prompt", metavar="TEXT", nargs="?", const=HARD_PROMPT, help="a prompt in words; alone: the paper's")
    p.add_argument("--generate", metavar="TEXT", help="continue TEXT instead of measuring")
    p.add_argument("--max-new", type=int, default=100, help="tokens to generate")
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    p.add_argument("--top-p", type=float, default=1.0)
    p.add_argument("--batch-size", type=int, default=4, help="windows at a time")
    p.add_argument("--seed", type=int, default=0, help="of the tokens drawn at a temperature")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", default="float32", choices=DTYPES)
    p.add_argument("--fused", default="on", choices=["on", "off"], help="off: unpack packed weights once, run ordinary Linears")
    p.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    try:
        main(p.parse_args())
    except (ValueError, OSError) as e:
        fail(e)
