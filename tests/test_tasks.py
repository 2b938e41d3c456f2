"""data/tasks.py and eval.py's zero-shot part: the texts of every task in every form, and the scores
of a scorer of its own over transformers, one choice at a time. tests/harness.py compares with
lm-evaluation-harness itself.

    python -m pytest -q tests/test_tasks.py
"""
import gzip
import json
import math
import statistics
from pathlib import Path

import pytest
import torch

import eval as evaluation
from data.config import SHIPPED
from data.tasks import TASKS, Item, ask, find_task, load_items
from data.tokenizer import load_tokenizer
from model import load_model
from prompt import as_prefix
from test_eval import last, run_program

SHARED = Path(__file__).resolve().parents[2] / "shared/data/zeroshot"
ABCD = {"text": ["one", "two", "three", "four"], "label": ["A", "B", "C", "D"]}
LISTED = [{"text": text, "label": label} for text, label in zip(ABCD["text"], ABCD["label"])]
CHOICES = [" one", " two", " three", " four"]

FORMS = [   # task, rows that mean the same, context(s), continuation(s), gold
    ("piqa", [{"goal": "Open a can", "sol1": "pull", "sol2": "push  it", "label": 1},
              {"query": "Question: Open a can\n", "choices": ["pull", "push  it"], "gold": 1}],
     "Question: Open a can\nAnswer:", [" pull", " push  it"], 1),
    ("hellaswag",
     [{"activity_label": "Making [x] tea", "ctx_a": "A man boils water. [title] How  so",
       "ctx_b": "he POURS",
                    "endings": [" it [step] out.", "[header] a  b", "c", "d"], "label": "2",
                    "ind": 4}],
     "Making tea: A man boils water.. How so He pours", [" it out.", "  a b", " c", " d"], 2),
    ("arc_easy", [{"id": "1", "question": "Which?", "choices": ABCD, "answerKey": "C"},
                  {"id": "1", "question": {"stem": "Which?", "choices": LISTED}, "answerKey": "C"},
                  {"query": "Question: Which?", "choices": ABCD["text"], "gold": 2}],
     "Question: Which?\nAnswer:", CHOICES, 2),
    ("arc_challenge",
     [{"question": "Which?", "choices": {"text": ABCD["text"], "label": ["1", "2", "3", "4"]},
                        "answerKey": "4"}], "Question: Which?\nAnswer:", CHOICES, 3),
    ("openbookqa", [{"question_stem": "A stem", "choices": ABCD, "answerKey": "B"},
                    {"question": {"stem": "A stem", "choices": LISTED}, "answerKey": "B"},
                    {"query": "A stem", "choices": ABCD["text"], "gold": 1}], "A stem", CHOICES, 1),
    ("winogrande", [{"sentence": "He gave Al a _ and left .", "option1": "cake", "option2": "bike",
                     "answer": "2"},
                    {"context_options": ["He gave Al a cake", "He gave Al a bike"],
                     "continuation": "and left .", "gold": 1}],
     ["He gave Al a cake", "He gave Al a bike"], [" and left ."] * 2, 1),
    ("boolq", [{"passage": "T -- P.", "question": "is it", "label": True, "idx": 0},
               {"title": "T", "passage": "P.", "question": "is it", "answer": True},
               {"query": "Passage: T -- P.\nQuestion: is it?", "choices": ["no", "yes"],
                "gold": 1}],
     "T -- P.\nQuestion: is it?\nAnswer:", [" no", " yes"], 1),
    ("lambada_openai", [{"text": "She said  \"so what\" to Tom"}], "She said  \"so what\" to",
     [" Tom"], 0)]


@pytest.mark.parametrize("task, rows, contexts, continuations, gold", FORMS,
                         ids=[form[0] for form in FORMS])
def test_texts_of_every_form(task, rows, contexts, continuations, gold):
    contexts = [contexts] * len(continuations) if isinstance(contexts, str) else contexts
    for row in rows:
        item = TASKS[task].read(row)
        assert item.pairs == list(zip(contexts, continuations))
        assert item.gold == gold
        choices = contexts if task == "winogrande" else [text[1:] for text in continuations]
        assert item.lengths == [len(choice) for choice in choices]


def test_labels_in_a_file_of_their_own(tmp_path):
    rows = [{"goal": f"g{i}", "sol1": "a", "sol2": "b"} for i in range(3)]
    (tmp_path / "piqa").mkdir()
    with gzip.open(tmp_path / "piqa/valid.jsonl.gz", "wt") as f:
        f.write("\n".join(map(json.dumps, rows)))
    (tmp_path / "piqa/valid-labels.lst").write_text("1\n0\n1\n")
    assert [item.gold for item in load_items("piqa", tmp_path)] == [1, 0, 1]
    assert len(load_items(f"piqa={tmp_path}/piqa/valid.jsonl.gz", limit=2)) == 2
    (tmp_path / "piqa/valid-labels.lst").write_text("1\n")
    with pytest.raises(ValueError, match="valid.jsonl.gz line 2 is no item of piqa"):
        load_items("piqa", tmp_path)


@pytest.mark.parametrize("line", ["{", "[]", "3", "{}", '{"goal": "g", "sol1": "a", "sol2": "b"}',
                                  '{"goal": "g", "sol1": "a", "sol2": "b", "label": 2}',
                                  '{"goal": "g", "sol1": "a", "sol2": 5, "label": 1}',
                                  '{"goal": "g", "sol1": "a", "sol2": "b", "label": "one"}',
                                  '{"query": "q"}', '{"a": ' * 100_000])
def test_a_row_that_is_no_item_is_named(line, tmp_path):
    (tmp_path / "piqa.jsonl").write_text('{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}\n'
                                         + line)
    with pytest.raises(ValueError, match="piqa.jsonl line 2 is no item of piqa") as e:
        load_items("piqa", tmp_path)
    assert "\n" not in str(e.value)


def test_empty_lines_count_for_labels_and_not_for_the_limit(tmp_path):
    row = json.dumps({"goal": "g", "sol1": "a", "sol2": "b"})
    (tmp_path / "piqa.jsonl").write_text(f"{row}\n\n{row}\n")
    (tmp_path / "piqa-labels.lst").write_text("0\n\n1\n")
    assert [item.gold for item in load_items("piqa", tmp_path, 2)] == [0, 1]


def test_a_label_in_the_row_goes_before_a_file_of_labels(tmp_path):
    (tmp_path / "piqa.jsonl").write_text('{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}')
    (tmp_path / "piqa-labels.lst").write_text("1\n")
    assert load_items("piqa", tmp_path)[0].gold == 0


@pytest.mark.parametrize("task, row, gold", [
    ("arc_easy", {"question": "Which?", "choices": ABCD, "answerKey": " C "}, 2),
    ("winogrande", {"sentence": "a _ b", "option1": "x", "option2": "y", "answer": 2}, 1),
    ("boolq", {"query": "q", "choices": ["No", "Yes"], "gold": 1}, 1)])
def test_answers_in_another_spelling(task, row, gold):
    assert TASKS[task].read(row).gold == gold


@pytest.mark.parametrize("task, row, message", [
    ("boolq", {"query": "q", "choices": ["yes", "no"], "gold": 0}, "are not no and yes"),
    ("arc_easy", {"query": "q", "choices": ["a", "b"], "gold": -1}, "answer -1 of 2 choices")])
def test_answers_that_would_be_counted_wrong_are_refused(task, row, message, tmp_path):
    (tmp_path / "mine.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=message):
        load_items(f"{task}={tmp_path / 'mine.jsonl'}")


def test_a_sentence_without_a_gap(tmp_path):
    path = tmp_path / "winogrande.jsonl"
    path.write_text('{"sentence": "no gap", "option1": "a", "option2": "b", "answer": "1"}')
    with pytest.raises(ValueError, match="line 1 is no item of winogrande .its sentence has no _"):
        load_items(f"winogrande={path}")


def test_contexts_that_are_cut_are_said(opt, capsys):
    model, tokenizer = opt[:2]
    long = "word " * 2 * model.config.max_positions
    items = [ask(long, ["yes", "no"], 0), ask("short", ["yes", "no"], 0)]
    evaluation.zero_shot(model, tokenizer, items, None, 2, "mine")
    assert "mine: 1 items lose the beginning of their context" in capsys.readouterr().err


def test_tasks_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="unknown task 'squad': known are piqa"):
        find_task("squad", tmp_path)
    with pytest.raises(ValueError, match="give --data-dir"):
        find_task("piqa", None)
    with pytest.raises(FileNotFoundError, match="no piqa.jsonl or piqa/valid.jsonl in"):
        find_task("piqa", tmp_path)
    (tmp_path / "piqa.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no items of piqa"):
        load_items("piqa", tmp_path)


@pytest.fixture(scope="module")
def opt():
    return load_model("tiny-opt"), load_tokenizer(SHIPPED["tiny-opt"])


TOO_LONG = Item([("word " * 700 + "and the last", f" {word}") for word in ("word", "of them all")],
                0, [4, 11])
ITEMS = [
    Item([("def f(x):\n    return", f" {word}") for word in ("x", "None", "self.value + x", "the")],
         0, [1, 4, 14, 3]),
    Item([("The result is a tensor. Is it?\nAnswer:", " no"),
          ("The result is a tensor. Is it?\nAnswer:", " yes")], 1, [2, 3]),
    Item([("import numpy", " as np\n"), ("import torch", " as np\n")], 0, [12, 12]),
    Item([("Ends in spaces  ", " a")], 0, [1]), Item([("", " alone"), ("", "  alone")], 0, [5, 6]),
    Item([("Returns the largest value of the", " input")], 0, [5]),
    TOO_LONG]


def test_scores_equal_an_independent_scorer_over_transformers(opt):
    from transformers import AutoModelForCausalLM
    model, tokenizer = opt
    peer = AutoModelForCausalLM.from_pretrained(SHIPPED["tiny-opt"], dtype=torch.float32)
    got = evaluation.zero_shot(model, tokenizer, ITEMS, batch_size=3)
    limit = peer.config.max_position_embeddings
    for item, record in zip(ITEMS, got):
        for (context, continuation), ours, count in zip(item.pairs, record["logprobs"],
                                                        record["tokens"]):
            spaces = len(context) - len(context.rstrip())
            given = tokenizer.encode(context[:len(context) - spaces]) or [tokenizer.bos_id]
            ids = tokenizer.encode(context + continuation)
            full = torch.tensor([ids[-(limit + 1):]])
            with torch.no_grad():
                logp = peer(full[:, :-1]).logits[0].double().log_softmax(-1)
            per_token = logp.gather(1, full[0, 1:, None])[:, 0]
            n = len(ids) - len(given)
            assert count == n
            assert ours == pytest.approx(float(per_token[-n:].sum()), abs=2e-4)
            if len(item.pairs) == 1:
                assert record["acc"] == bool((logp[-n:].argmax(-1) == full[0, -n:]).all())
        if len(item.pairs) > 1:
            best = max(range(len(item.pairs)), key=lambda j: record["logprobs"][j])
            norm = max(range(len(item.pairs)),
                       key=lambda j: record["logprobs"][j] / item.lengths[j])
            assert (record["acc"], record["acc_norm"]) == (best == item.gold, norm == item.gold)


def test_the_batch_changes_nothing(opt):
    model, tokenizer = opt
    one, many = (evaluation.zero_shot(model, tokenizer, ITEMS[:6], batch_size=n) for n in (1, 16))
    for a, b in zip(one, many):
        assert a["logprobs"] == pytest.approx(b["logprobs"], abs=1e-4)
        assert a["tokens"] == b["tokens"]


def test_behind_a_prompt(opt):
    """A prompt of a text's embeddings gives what that text in front gives; the room is what it
    leaves."""
    model, tokenizer = opt
    front = tokenizer.encode("The docs say so. ")
    prompt = model.embed(torch.tensor(front)).float()
    items = [*ITEMS[:3], TOO_LONG]
    records = evaluation.zero_shot(model, tokenizer, items, prompt)
    as_keys = evaluation.zero_shot(model, tokenizer, items, as_prefix(model, prompt))
    assert [r["logprobs"] for r in as_keys] == [pytest.approx(r["logprobs"], abs=1e-4)
                                                for r in records]
    room = model.config.max_positions - len(front)
    for item, record in zip(items, records):
        for (context, continuation), ours in zip(item.pairs, record["logprobs"]):
            given, scored = evaluation.encode_pair(tokenizer, context, continuation)
            read = (given + scored[:-1])[-room:]
            logits = model(torch.tensor([front + read]))[0]
            logp = logits.log_softmax(-1)[-len(scored):]
            assert ours == pytest.approx(float(logp.gather(1, torch.tensor(scored)[:, None]).sum()),
                                         abs=1e-4)
    long = Item([("", " word" * 505)], 0, [5])
    with pytest.raises(ValueError, match="item 1, choice 1: 1 tokens of context"):
        evaluation.zero_shot(model, tokenizer, [long], prompt)


def test_half_precision(opt):
    model, tokenizer = opt
    exact = evaluation.zero_shot(model, tokenizer, ITEMS[:3])
    half = evaluation.zero_shot(load_model("tiny-opt", torch.bfloat16), tokenizer, ITEMS[:3])
    for a, b in zip(exact, half):
        assert a["logprobs"] == pytest.approx(b["logprobs"], rel=0.03, abs=0.3)


def test_summary_has_means_and_standard_errors():
    records = [{"acc": i % 3 == 0, "acc_norm": i % 2 == 0, "logprobs": [-0.5 * i]}
               for i in range(10)]
    got = evaluation.summarize("piqa", records)
    assert (got["items"], got["acc"], got["acc_norm"]) == (10, 0.4, 0.5)
    assert "perplexity" not in got
    assert got["acc_stderr"] == pytest.approx(math.sqrt(0.4 * 0.6 / 9))
    got = evaluation.summarize("lambada_openai", records)
    logs = [0.5 * i for i in range(10)]
    assert got["perplexity"] == pytest.approx(math.exp(statistics.fmean(logs)))
    # a bootstrap, as a peer
    draws = torch.randint(0, 10, (20000, 10), generator=torch.Generator().manual_seed(0))
    spread = torch.tensor(logs, dtype=torch.float64)[draws].mean(1).exp().std()
    assert got["perplexity_stderr"] == pytest.approx(float(spread) * math.sqrt(10 / 9), rel=0.15)
    assert evaluation.summarize("boolq", records[:1])["acc_stderr"] is None


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_program(monkeypatch, capsys, tmp_path):
    write(tmp_path / "piqa.jsonl",
          [{"goal": f"call f{i}", "sol1": "f()", "sol2": "zebra tree", "label": i % 2}
           for i in range(8)])
    write(tmp_path / "text.jsonl",
          [{"text": "the name of the file"}, {"text": "for i in range(10):"}])
    tasks = f"piqa,lambada_openai={tmp_path / 'text.jsonl'}"
    common = ("tiny-llama", "--tasks", tasks, "--data-dir", tmp_path, "--json")
    status, out, _ = run_program(monkeypatch, capsys, *common, "--items", tmp_path / "items.jsonl",
                                 "--limit", 6)
    got = last(out)["tasks"]
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert status == 0
    assert list(got) == ["piqa", "lambada_openai"]
    assert got["piqa"]["items"] == 6
    assert len(items) == 8
    assert got["piqa"]["acc"] == statistics.fmean(item["acc"] for item in items[:6])
    assert f"acc {got['piqa']['acc']:.4f} +- " in out
    assert f"perplexity {got['lambada_openai']['perplexity']:.4f}" in out
    behind = last(run_program(monkeypatch, capsys, *common, "--hard-prompt")[1])
    assert behind["prompt_tokens"] > 0
    assert behind["tasks"]["lambada_openai"]["perplexity"] != got["lambada_openai"]["perplexity"]


@pytest.mark.parametrize("more, message", [
    (["--tasks", "piqa"], "give --data-dir"), (["--tasks", "squad"], "unknown task 'squad'"),
    (["--tasks", ""], "unknown task ''"),
    (["--limit", 3], "--limit does nothing without --tasks"),
    (["--items", "x"], "--items does nothing without --tasks"),
    (["--tasks", "piqa", "--seqlen", 9], "--seqlen does nothing with --tasks"),
    (["--tasks", "piqa", "--generate", "x"], "exclude each other"),
    (["--tasks", "piqa=nowhere.jsonl"], "no file nowhere.jsonl"),
    (["--tasks", "piqa="], "no file behind piqa="),
    (["--tasks", "piqa=a.jsonl,boolq,piqa=b.jsonl"], "--tasks names piqa twice"),
    (["--tasks", "piqa", "--items", "nowhere/x.jsonl"], "no file in a folder that is there"),
    (["--tasks", "piqa", "--items", "."], "no file in a folder that is there"),
    (["--prompt", "x.safetensors", "--hard-prompt", ""], "exclude each other")])
def test_program_fails_in_one_line(more, message, monkeypatch, capsys):
    status, out, err = run_program(monkeypatch, capsys, "tiny-llama", *more)
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert message in err


@pytest.mark.skipif(not SHARED.is_dir(), reason="no zero-shot files in ../shared/data/zeroshot")
def test_real_files_are_read():
    sizes = {task: len(load_items(task, SHARED))
             for task in ("piqa", "hellaswag", "arc_easy", "winogrande", "openbookqa", "boolq")}
    assert sizes == {"piqa": 1838, "hellaswag": 1000, "arc_easy": 2376, "winogrande": 1267,
                     "openbookqa": 500, "boolq": 3270}


@pytest.mark.skipif(not SHARED.is_dir(), reason="no zero-shot files in ../shared/data/zeroshot")
def test_items_agree_with_the_harness(opt, monkeypatch):
    pytest.importorskip("lm_eval",
                        reason="lm-evaluation-harness is not installed: pip install lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from harness import compare, harness
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tokenizer = opt
    tasks = {task: find_task(task, SHARED)[1]
             for task in ("piqa", "hellaswag", "arc_easy", "winogrande", "openbookqa", "boolq")}
    theirs = harness(AutoModelForCausalLM.from_pretrained(SHIPPED["tiny-opt"], dtype=torch.float32),
                     AutoTokenizer.from_pretrained(SHIPPED["tiny-opt"]), tasks, 20)
    for task, path in tasks.items():
        found = compare(task, evaluation.zero_shot(model, tokenizer, load_items(task, SHARED, 20)),
                        theirs[task])
        assert found["largest difference"] < 1e-3, found
        assert found["acc differs"] == found.get("acc_norm differs", 0) == 0, found
