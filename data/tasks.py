"""Zero-shot tasks as lm-evaluation-harness defines them: contexts, continuations and the right
answer of every item.

    items = load_items("piqa", "zeroshot/")               # looks for the task's file there
    items = load_items("piqa=my/valid.jsonl")
    items[0].pairs                                # [(context, continuation) of every choice]

A model answers by giving one of the continuations the highest probability; eval.py, `zero_shot`,
asks it. Read are the files as their authors publish them, exports of the Hugging Face data sets as
.jsonl, and a common short form: query, choices, gold (winogrande: context_options, continuation,
gold). All as .gz too.

piqa            valid.jsonl with valid-labels.lst
hellaswag       hellaswag_val.jsonl
arc_easy        ARC-Easy-Test.jsonl
arc_challenge   ARC-Challenge-Test.jsonl
winogrande      dev.jsonl
openbookqa      Main/test.jsonl
boolq           BoolQ/val.jsonl of SuperGLUE, or BoolQ's own dev.jsonl
lambada_openai  lambada_test.jsonl

Left out: examples in the context (few-shot), parquet files, downloads.
"""
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from data.text import lines_of


class Item(NamedTuple):
    """A question. pairs: (context, continuation) of every choice; a continuation begins with the
    space between them."""
    pairs: list[tuple[str, str]]
    gold: int                         # which of them is right
    lengths: list[int]                # characters of every choice without that space, for acc_norm


class Task(NamedTuple):
    """Where a task's items come from, and what is told of the answers."""
    read: Callable[[dict], Item]      # makes an item of a row of the file
    files: tuple[str, ...]            # where to look in a folder
    metrics: tuple[str, ...]          # acc, acc_norm, perplexity


def ask(context: str, choices: list[str], gold: int) -> Item:
    """One context, several continuations."""
    pairs = [(context, " " + choice) for choice in choices]
    return Item(pairs, gold, [len(choice) for choice in choices])


# The next functions make an item of a row: of the file as published, or (query, gold) of the short
# form.

def piqa(row: dict) -> Item:
    if "query" in row:
        goal = row["query"].removeprefix("Question: ").removesuffix("\n")
        choices = row["choices"]
        gold = row["gold"]
    else:
        goal = row["goal"]
        choices = [row["sol1"], row["sol2"]]
        gold = row["label"]
    return ask(f"Question: {goal}\nAnswer:", choices, int(gold))


def hellaswag(row: dict) -> Item:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return ask(plain(context), [plain(ending) for ending in row["endings"]], int(row["label"]))


def plain(text: str) -> str:
    """WikiHow's marks out of a text of hellaswag."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def multiple_choice(row: dict) -> tuple[str, list[str], int]:
    """(question, choices, gold) of ARC and OpenBookQA in their three forms."""
    if "query" in row:
        return row["query"], row["choices"], row["gold"]
    key = row["answerKey"].strip()
    if isinstance(row.get("question"), dict):                                  # as published
        choices = row["question"]["choices"]
        labels = [choice["label"] for choice in choices]
        texts = [choice["text"] for choice in choices]
        return row["question"]["stem"], texts, labels.index(key)
    question = row["question_stem"] if "question_stem" in row else row["question"]
    return question, row["choices"]["text"], row["choices"]["label"].index(key)


def arc(row: dict) -> Item:
    question, choices, gold = multiple_choice(row)
    if "query" in row:
        question = question.removeprefix("Question: ")
    return ask(f"Question: {question}\nAnswer:", choices, gold)


def openbookqa(row: dict) -> Item:
    return ask(*multiple_choice(row))


def winogrande(row: dict) -> Item:
    """Two contexts, one continuation. Only the continuation is scored, so its length decides
    nothing."""
    if "context_options" in row:
        contexts = row["context_options"]
        rest = row["continuation"]
        gold = row["gold"]
    else:
        before, gap, rest = row["sentence"].partition("_")
        if not gap:
            raise ValueError("its sentence has no _ to fill in")
        contexts = [before + row["option1"], before + row["option2"]]
        gold = {"1": 0, "2": 1}[str(row["answer"])]
    pairs = [(context, f" {rest.strip()}") for context in contexts]
    return Item(pairs, gold, [len(context) for context in contexts])


def boolq(row: dict) -> Item:
    if "query" in row:
        asked = row["query"].removeprefix("Passage: ")
        gold = int(row["gold"])
        if [choice.lower() for choice in row["choices"]] != ["no", "yes"]:
            raise ValueError(f"choices {row['choices']} are not no and yes")
    else:
        passage = row["passage"]
        if "title" in row:                               # BoolQ's own file; joined as in SuperGLUE
            passage = f"{row['title']} -- {passage}"
        asked = f"{passage}\nQuestion: {row['question']}?"
        gold = int(row["label"] if "label" in row else row["answer"])
    return ask(f"{asked}\nAnswer:", ["no", "yes"], gold)


def lambada(row: dict) -> Item:
    """One continuation, the text's last word: is it the likeliest of all?"""
    context, _, word = row["text"].rpartition(" ")
    return Item([(context, f" {word}")], 0, [len(word)])


BOTH = ("acc", "acc_norm")
TASKS = {
    "piqa": Task(piqa, ("piqa.jsonl", "piqa/valid.jsonl"), BOTH),
    "hellaswag": Task(hellaswag, ("hellaswag.jsonl", "hellaswag_val.jsonl",
                                  "hellaswag/hellaswag_val.jsonl", "hellaswag_1000.jsonl"), BOTH),
    "arc_easy": Task(arc, ("arc_easy.jsonl", "ARC-Easy-Test.jsonl", "ARC-Easy/ARC-Easy-Test.jsonl",
                           "ARC-V1-Feb2018-2/ARC-Easy/ARC-Easy-Test.jsonl"), BOTH),
    "arc_challenge": Task(arc, ("arc_challenge.jsonl", "ARC-Challenge-Test.jsonl",
                                "ARC-Challenge/ARC-Challenge-Test.jsonl",
                                "ARC-V1-Feb2018-2/ARC-Challenge/ARC-Challenge-Test.jsonl"), BOTH),
    "winogrande": Task(winogrande, ("winogrande.jsonl", "winogrande/dev.jsonl",
                                    "winogrande_1.1/dev.jsonl"), ("acc",)),
    "openbookqa": Task(openbookqa, ("openbookqa.jsonl", "openbook_qa.jsonl",
                                    "openbookqa/test.jsonl",
                                    "OpenBookQA-V1-Sep2018/Data/Main/test.jsonl"), BOTH),
    "boolq": Task(boolq, ("boolq.jsonl", "BoolQ/val.jsonl", "boolq/dev.jsonl"), ("acc",)),
    "lambada_openai": Task(lambada, ("lambada_openai.jsonl", "lambada_test.jsonl"),
                           ("acc", "perplexity")),
}


def find_task(asked: str, folder: str | Path | None) -> tuple[str, Path]:
    """(name of the task, its file) for "piqa", looked for in folder, or for "piqa=FILE"."""
    name, given, path = asked.partition("=")
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: known are {', '.join(TASKS)}")
    if given and not path:
        raise ValueError(f"task {name}: no file behind {name}=")
    if given:
        return name, Path(path)
    if folder is None:
        raise ValueError(f"task {name}: give --data-dir, a folder that holds "
                         f"{TASKS[name].files[0]}, or {name}=FILE")
    for file in TASKS[name].files:
        for path in (Path(folder) / file, Path(folder) / f"{file}.gz"):
            if path.is_file():
                return name, path
    raise FileNotFoundError(f"task {name}: no {' or '.join(TASKS[name].files)} in {folder}, nor "
                            f"one with .gz: put it there, or give {name}=FILE")


def load_items(asked: str, folder: str | Path | None = None,
               limit: int | None = None) -> list[Item]:
    """The items of a task, in the order of its file, at most `limit`. ValueError names the file and
    line that is wrong."""
    name, path = find_task(asked, folder)
    stem = path.name.removesuffix(".gz").removesuffix(".jsonl")
    labels = path.with_name(f"{stem}-labels.lst")
    answers = [line.strip() for line in lines_of(labels)] if labels.is_file() else []
    items = []
    for number, line in enumerate(lines_of(path), 1):
        if limit is not None and len(items) == limit:
            break
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if answers and "label" not in row:
                row["label"] = answers[number - 1]
            item = TASKS[name].read(row)
            if not 0 <= item.gold < len(item.pairs):
                raise ValueError(f"answer {item.gold} of {len(item.pairs)} choices")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as e:
            what = f"lacks {e}" if isinstance(e, KeyError) else e
            raise ValueError(f"{path} line {number} is no item of {name} ({what})") from None
        items.append(item)
    if not items:
        raise ValueError(f"{path} holds no items of {name}")
    return items
