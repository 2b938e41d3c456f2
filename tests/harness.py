"""eval.py --tasks beside lm-evaluation-harness, item by item, on the same files and the same model
over transformers.

    pip install lm_eval              # 0.4.13 was tried; not among tests/requirements.txt
    python tests/harness.py FOLDER --data-dir zeroshot/ --tasks piqa,hellaswag --limit 100

FOLDER holds a model that transformers can open (a dense one). The harness's own definitions of the
tasks run: only where their data comes from is changed, to local files in the fields of the Hugging
Face data sets, made from ours. Printed for each task: items, the largest difference of a choice's
log-probability, items with another acc or acc_norm, both means.
"""
import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.config import resolve
from data.tasks import TASKS, find_task, load_items
from data.text import lines_of
from data.tokenizer import load_tokenizer
from eval import summarize, zero_shot
from model import load_model

DEFINITIONS = {"piqa": "piqa/piqa", "hellaswag": "hellaswag/hellaswag", "arc_easy": "arc/arc_easy",
               "arc_challenge": "arc/arc_challenge", "winogrande": "winogrande/default",
               "openbookqa": "openbookqa/openbookqa", "boolq": "super_glue/boolq/default",
               "lambada_openai": "lambada/lambada_openai"}


def published(task: str, row: dict) -> dict:
    """A row of our short form, in the fields of the data set that the harness reads; any other row
    as it is."""
    if task == "winogrande" and "context_options" in row:
        a, b = row["context_options"]
        shared = next(i for i in range(len(a) + 1) if a[:i + 1] != b[:i + 1])
        return {"sentence": f"{a[:shared]}_ {row['continuation']}", "option1": a[shared:],
                "option2": b[shared:], "answer": str(row["gold"] + 1)}
    if "query" not in row:
        return row
    query = row["query"]
    choices = row["choices"]
    gold = row["gold"]
    if task == "piqa":
        goal = query.removeprefix("Question: ").removesuffix("\n")
        return {"goal": goal, "sol1": choices[0], "sol2": choices[1], "label": gold}
    if task == "boolq":
        passage, _, question = query.removeprefix("Passage: ").rpartition("\nQuestion: ")
        return {"passage": passage, "question": question.removesuffix("?"), "label": gold}
    labels = [chr(ord("A") + i) for i in range(len(choices))]
    name = "question_stem" if task == "openbookqa" else "question"
    return {name: query.removeprefix("Question: "), "choices": {"text": choices, "label": labels},
            "answerKey": labels[gold]}


def harness(model, tokenizer, tasks: dict[str, Path], limit: int | None,
            batch_size: int = 8) -> dict[str, list[dict]]:
    """{task: the harness's samples in the order of the file} of a transformers model."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    definitions = Path(lm_eval.__file__).parent / "tasks"
    with tempfile.TemporaryDirectory() as folder:
        for task, path in tasks.items():
            rows = [json.loads(line) for line in lines_of(path) if line.strip()][:limit]
            data = Path(folder) / f"{task}.jsonl"
            data.write_text("".join(json.dumps(published(task, row)) + "\n" for row in rows))
            (Path(folder) / f"{task}.yaml").write_text(
                f"include: {definitions / DEFINITIONS[task]}.yaml\n"
                f"task: local_{task}\n"
                f"dataset_path: json\n"
                f"dataset_name: null\n"
                f"dataset_kwargs:\n  data_files:\n    test: {data}\n"
                f"training_split: null\n"
                f"validation_split: null\n"
                f"test_split: test\n")
        peer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        manager = TaskManager(include_path=folder)
        names = [f"local_{task}" for task in tasks]
        done = lm_eval.simple_evaluate(peer, tasks=names, log_samples=True, task_manager=manager,
                                       bootstrap_iters=0)
    return {task: sorted(done["samples"][name], key=lambda sample: sample["doc_id"])
            for task, name in zip(tasks, names)}


def compare(task: str, ours: list[dict], theirs: list[dict]) -> dict:
    """The largest difference in log-probability, the items that differ in a metric, and both means
    of it."""
    gap = max(abs(p - float(resp[0])) for mine, sample in zip(ours, theirs, strict=True)
              for p, resp in zip(mine["logprobs"], sample["filtered_resps"], strict=True))
    out = {"items": len(ours), "largest difference": gap}
    for metric in TASKS[task].metrics:
        if metric != "perplexity":
            right = [bool(sample[metric]) for sample in theirs]
            out[metric] = [sum(right) / len(right), summarize(task, ours)[metric]]
            out[f"{metric} differs"] = sum(a != b[metric] for a, b in zip(right, ours))
    return out


def main(args) -> None:
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    folder = resolve(args.model)
    files = dict(find_task(name, args.data_dir) for name in args.tasks.split(","))
    names = json.loads((folder / "config.json").read_text())
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(names["eos_token_id"])
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = harness(peer, tokenizer, files, args.limit)
    del peer
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    for task, path in files.items():
        ours = zero_shot(model, tokenizer, load_items(f"{task}={path}", limit=args.limit),
                         title=task)
        print(task, compare(task, ours, theirs[task]), flush=True)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("model", help="a checkpoint folder with a tokenizer.json")
    p.add_argument("--data-dir", help="folder that holds the tasks' files")
    p.add_argument("--tasks", default=",".join(DEFINITIONS), help="names, or NAME=FILE")
    p.add_argument("--limit", type=int, help="only the first so many items of each task")
    main(p.parse_args())
