"""data/chat.py against jinja2, set as the Hugging Face library sets it: templates written as the
families write theirs.

    python -m pytest -q tests/test_chat.py
"""
import json
import shutil

import pytest
import torch

import eval as evaluation
from data import chat
from data.bpe import ByteLevelBPE
from data.chat import ChatTemplate
from data.config import SHIPPED
from data.tokenizer import load_tokenizer
from test_eval import Letters
from test_prompt import tiny

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}")
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' "
    "if add_generation_prompt else '' }}")
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
"""
DASHES = """{#- a comment -#}
{{- bos_token }}
{%- set ns = namespace(seen=false, names='') %}
{%- if tools is defined and tools is not none %}
    {{- "never reached: " + (tools | tojson(indent=4)) }}
{%- endif %}
  {%- for message in messages -%}
    {%- if not ns.seen and message.content is string %}
        {%- set ns.seen = true -%}
        {% set x, = 1 %}
    {%- endif %}
{{ message.role | upper ~ ':' ~ loop.index ~ "}}" }} {{ message['content'] | trim |
default('nothing') }}
   {% if loop.nextitem is defined %} then {% endif %}
 {%- endfor %}
   {# another #}
{{- messages[-1]['content'][:2] ~ (messages | length) }}{{ missing }}{{ ['a', 'b'] | join('+') }} {{
'even' if (messages | length) % 2 == 0 else 'odd' }} {{ 'x' in 'xyz' and not ns.seen or 'either' }}
""".replace("        {% set x, = 1 %}\n", "")
ABSENT = """{% if tools is not none %}tools{% endif %}
{% if documents is none %}no documents{% endif %}
{% if messages[7] is defined %}an eighth{% endif %}{% if messages[-9] is undefined %} few{% endif %}
{{ '' | default('empty', true) }}{{ '' | default('kept') }}{{ nobody | default('nobody') }}
{{ [1, 'a', none] | join(', ') }}{% if messages[0] is sequence %} a mapping has members{% endif %}
{% if nobody is iterable and nobody is sequence %}nothing to go through{% endif %}
    {% for m in nobody %}never{% endfor %}
"""
SMALL = """  {% if true %}an indent before the first tag goes
{% endif %}
    {{ 'one before a value stays' }}
{% for m in messages %}
{{ loop.previtem.role if loop.previtem is defined else 'first' }}{% set seen = m.role %}
{% endfor %}
{{ seen is defined }}{{ none }}{% for k, v in messages[0].items() %}{{ k ~ v | length }}{% endfor %}
{{ 1 < 3 < 2 }} {{ 'AB' | lower | capitalize }} {{ [1, 2, 3][::-1] }}
{{ 'abc' | first ~ 'abc' | last }}
{{ true is boolean }} {{ 1 is boolean }} {{ 1 is number }} {{ 1 is true }} {{ [] is mapping }}
"""
TEMPLATES = {"small": SMALL, "chatml": CHATML, "llama2": LLAMA2, "llama3": LLAMA3, "zephyr": ZEPHYR,
             "dashes": DASHES, "absent": ABSENT, "crlf": ABSENT.replace("\n", "\r\n"),
             "cr": DASHES.replace("\n", "\r")}
ONE = [{"role": "user", "content": " Hi there\n"}]
SYSTEM = [{"role": "system", "content": "Be kind."}, *ONE]
LONG = [*ONE, {"role": "assistant", "content": "Hello! "},
        {"role": "user", "content": "{{ 7 * 7 }} {% if %}"}]
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}


def peer(source, messages, add):
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def raise_exception(message):
        raise ValueError(message)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(source).render(messages=messages, add_generation_prompt=add,
                                                  tools=None, documents=None,   # as transformers
                                                  **NAMES)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("messages", [ONE, SYSTEM, LONG], ids=["one", "system", "long"])
def test_templates_render_as_in_jinja(name, add, messages):
    pytest.importorskip("jinja2")
    got = ChatTemplate(TEMPLATES[name], names=NAMES).render(messages, add)
    assert got == peer(TEMPLATES[name], messages, add)


@pytest.mark.parametrize("source, message", [
    ("{% macro f() %}{% endmacro %}", "{% macro %} is not supported"),
    ("{% for x in messages %}", "endfor is missing"),
    ("{% if true %}", "endif is missing"), ("{{ messages.__class__ }}", "is not supported"),
    ("{{ ''.join.__globals__ }}", "is not supported"), ("{{ open('x') }}", "is not supported"),
    ("{{ lambda: 1 }}", "is not supported"),
    ("{{ messages | tojson }}", "the filter `tojson` is not supported"),
    ("{{ 1 is even }}", "the test `is even` is not supported"),
    ("{{ 'a' * 9999999999 }}", "is not supported"),
    ("{{ 1 + }}", "invalid syntax"), ("{{ raise_exception('no system role') }}", "no system role"),
    ("{{ messages[5].role }}", "`messages[5].role` is not supported"),
    ("{% endif %}", "{% endif %} is not supported"),
    ("{{ 'a b'.split(sep='a') }}", "is not supported"),
    ("{{ 'a' | default(value='b') }}", "is not supported"),
    ("{{ '%5d' % 1 }}", "`%` between texts is not supported"),
    ("{{ " + "(" * 300 + "1" + ")" * 300 + " }}", "cannot be used")])
def test_what_is_not_understood_is_one_clear_error(source, message):
    with pytest.raises(ValueError, match="my.json: this chat template cannot be used") as e:
        ChatTemplate(source, "my.json").render(ONE)
    assert message in str(e.value) and "use --generate" in str(e.value)


@pytest.mark.parametrize("source, message", [
    ("{% for a in messages %}{% for b in messages %}{{ b }}{% endfor %}{% endfor %}",
     "does not end within 9 steps"),
    ("{{ 'many' + 'letters' }}", "more than 9 characters"),
    ("{{ messages | join('long') }}", "more than 9 characters"),
    ("{{ 'aaa'.replace('a', 'long') }}", "more than 9 characters")])
def test_a_template_that_grows_ends_at_a_limit(source, message, monkeypatch):
    monkeypatch.setattr(chat, "MOST_STEPS", 9)
    monkeypatch.setattr(chat, "MOST_TEXT", 9)
    with pytest.raises(ValueError, match=message):
        ChatTemplate(source).render([*LONG, *LONG])


def test_where_templates_come_from(tmp_path):
    assert ChatTemplate.of(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": {"content": "<s>"}, "eos_token": None,
                                  "chat_template": "{{ bos_token }}1"}))
    assert ChatTemplate.of(tmp_path).render(ONE) == "<s>1"
    config.write_text(json.dumps({"chat_template": [{"name": "tool_use", "template": "t"},
                                                    {"name": "default", "template": "d"}]}))
    assert ChatTemplate.of(tmp_path).render(ONE) == "d"
    (tmp_path / "chat_template.jinja").write_text("file {{ messages[0].role }}\n")
    assert ChatTemplate.of(tmp_path).render(ONE) == "file user"
    (tmp_path / "chat_template.jinja").unlink()
    config.write_text(json.dumps({"chat_template": 5}))
    with pytest.raises(ValueError, match="tokenizer_config.json: chat_template is no text"):
        ChatTemplate.of(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="chat_template.jinja is not UTF-8 text"):
        ChatTemplate.of(tmp_path)


def test_special_tokens_become_ids():
    """sentencepiece reads <s> as text, so it is put in by its number; each part is encoded by
    itself."""
    tokenizer = load_tokenizer(SHIPPED["tiny-llama"])
    ids = ChatTemplate(LLAMA2, names=NAMES).encode(tokenizer, LONG)
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    assert ids.count(bos) == 2
    assert ids.count(eos) == 1
    assert ids[0] == bos
    second = ids.index(bos, 1)
    assert ids[second - 1] == eos
    assert ids[1:second - 1] == tokenizer.encode("[INST] Hi there [/INST] Hello! ", bos=False)


def test_a_special_token_that_a_tokenizer_lacks_is_text():
    tokenizer = load_tokenizer(SHIPPED["tiny-llama"])
    template = ChatTemplate("{{ bos_token }}a", names={"bos_token": "<start>"})
    assert template.encode(tokenizer, ONE) == tokenizer.encode("<start>a", bos=False)


def test_the_end_of_a_turn_stops_an_answer():
    letters = [bytes([i]) for i in range(256)]
    added = {"<|im_start|>": 256, "<|im_end|>": 257, "[END]": 258, "word": 259}
    tokenizer = ByteLevelBPE(r"[\s\S]", letters, {b: i for i, b in enumerate(letters)}, added,
                             {256, 257}, None, 0)
    assert ChatTemplate(CHATML).stops(tokenizer) == {257}
    names = {name: name for name in added}
    assert ChatTemplate("{{ messages[-1].content }} [END]", names=names).stops(tokenizer) == {258}
    assert ChatTemplate("{{ messages[-1].content }}word", names=names).stops(tokenizer) == set()
    begins = "{{ messages[-1].content }}{% if add_generation_prompt %}<|im_start|>{% endif %}"
    assert ChatTemplate(begins, names=names).stops(tokenizer) == set()
    assert ChatTemplate("{{ messages[-1].content }} plain").stops(tokenizer) == frozenset()


def test_a_long_talk_forgets_its_beginning(capsys):
    """64 positions: turns that no longer fit are left out, and a line that does not is refused;
    the talk goes on."""
    model, tokenizer = tiny(), Letters()
    template = ChatTemplate("{% for m in messages %}{{ m.role[0] ~ m.content }}{% endfor %}a")
    lines = ["x" * 9 + "\n"] * 4 + ["y" * 70 + "\n", "z" * 9 + "\n"]
    evaluation.talk(model, tokenizer, template, iter(lines), max_new=8)
    out, err = capsys.readouterr()
    answers = out.splitlines()
    assert [len(a) for a in answers] == [8] * 5
    assert err.splitlines() == [
        "(the first 1 of its turns no longer fit, and are left out)",
        "(this line and the prompt take 72 of the model's 64 positions: no room to continue, use a "
        "shorter text)",
        "(the first 1 of its turns no longer fit, and are left out)"]
    expect = lambda text: "".join(p for _, p in evaluation.generate(model, tokenizer, [text], 8))
    turns = [f"u{'x' * 9}a{answer}" for answer in answers[2:4]]     # what was refused is forgotten
    assert answers[-1] == expect("".join(turns) + "u" + "z" * 9 + "a")


def test_a_prompt_takes_positions_of_a_talk(capsys):
    template = ChatTemplate("{% for m in messages %}{{ m.content if m.role == 'user' else '' }}"
                            "{% endfor %}")
    lines = iter(["x" * 20 + "\n"] * 2)
    evaluation.talk(tiny(), Letters(), template, lines, max_new=1000, prompt=torch.randn(16, 32))
    out, err = capsys.readouterr()
    assert [len(answer) for answer in out.splitlines()] == [28, 28]
    assert "the first 1 of its turns no longer fit" in err


def test_turns_are_kept_while_a_quarter_of_the_room_is_left(capsys):
    """However many tokens an answer may have; and they go with their answers."""
    template = ChatTemplate("{% for m in messages %}{{ m.content if m.role == 'user' else '' }}"
                            "{% endfor %}")
    lines = iter(["x" * 24 + "\n"] * 3)                     # 24 + 24 + 64 / 4 is all of it
    evaluation.talk(tiny(), Letters(), template, lines, max_new=1000)
    out, err = capsys.readouterr()
    assert [len(answer) for answer in out.splitlines()] == [40, 16, 16]
    assert err == "(the first 1 of its turns no longer fit, and are left out)\n"


@pytest.mark.parametrize("of", ["template", "tokenizer"])
def test_an_answer_ends_at_a_stop_of_the_template_or_of_the_tokenizer(of, capsys):
    model, tokenizer = tiny(), Letters()
    template = ChatTemplate("{{ messages[-1].content }}")
    free = "".join(p for _, p in evaluation.generate(model, tokenizer, ["hi"], 20))
    end = ord(free[5]) - 48
    if of == "template":
        template.stops = lambda tokenizer: frozenset([end])
    else:
        tokenizer.eos_id = end
    evaluation.talk(model, tokenizer, template, iter(["hi\n"]), max_new=20)
    assert capsys.readouterr().out == free[:free.index(free[5])] + "\n"


def test_the_same_line_twice_draws_by_other_seeds(capsys):
    model = tiny()
    evaluation.talk(model, Letters(), None, iter(["hi\n"] * 2), 5, max_new=8, temperature=1.0)
    answers = capsys.readouterr().out.splitlines()
    for i, answer in enumerate(answers):
        pieces = evaluation.generate(model, Letters(), ["hi"], 8, 1.0, seed=5 + i)
        assert answer == "".join(piece for _, piece in pieces)
    assert answers[0] != answers[1]


def test_loops_know_their_end_and_sets_their_names():
    source = "{% for m in messages %}{{ loop.revindex }}{{ loop.revindex0 }} {% endfor %}"
    assert ChatTemplate(source).render(LONG) == "32 21 10 "
    with pytest.raises(ValueError, match="{% set a, b = ... %} is not supported"):
        ChatTemplate("{% set a, b = 'x', 'y' %}")


def test_names_of_special_tokens_come_from_all_files(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"chat_template": "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}", "eos_token": "</s>"}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(
        {"bos_token": {"content": "<s>"}, "eos_token": "<old>", "unk_token": "<unk>"}))
    assert ChatTemplate.of(tmp_path).render(ONE) == "<s>|</s>|<unk>"


@pytest.mark.parametrize("place", ["added_tokens.json", "tokenizer_config.json"])
def test_tokens_that_a_fine_tuned_sentencepiece_model_has_added(place, tmp_path):
    """ChatML over LLaMA's pieces: markers become ids of their own, and end an answer."""
    shutil.copy(SHIPPED["tiny-llama"] / "tokenizer.model", tmp_path)
    plain = load_tokenizer(SHIPPED["tiny-llama"])
    size = plain.vocab_size
    marks = {"<|im_start|>": size, "<|im_end|>": size + 1}
    config = {"chat_template": CHATML, "eos_token": "<|im_end|>"}
    if place == "added_tokens.json":
        (tmp_path / place).write_text(json.dumps(marks))
    else:
        config["added_tokens_decoder"] = {str(i): {"content": text, "special": True}
                                          for text, i in marks.items()}
        config["added_tokens_decoder"]["0"] = {"content": "<unk>", "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, size + 1]}))
    tokenizer, template = load_tokenizer(tmp_path), ChatTemplate.of(tmp_path)
    assert tokenizer.stops == {2, size + 1} and tokenizer.eos_id == size + 1
    assert template.stops(tokenizer) == {size + 1}
    want = [size, *plain.encode("user\n Hi there\n", bos=False), size + 1,
            *plain.encode("\n", bos=False), size, *plain.encode("assistant\n", bos=False)]
    start = template.encode(tokenizer, ONE).index(size, 1)
    assert template.encode(tokenizer, ONE)[start:] == want
    assert tokenizer.decode(want) == "user\n Hi there\n \n assistant\n"
    assert tokenizer.vocab_size == size + 2
    assert tokenizer.encode("a b") == plain.encode("a b")


def test_an_ordinary_piece_after_an_answer_is_no_stop():
    """sentencepiece begins what follows with its sign for a space, which alone shows nothing."""
    tokenizer = load_tokenizer(SHIPPED["tiny-llama"])
    for after in ("\u597d", " ok", "\n", "</s>x"):
        template = ChatTemplate("{{ messages[-1].content }}" + after, names=NAMES)
        want = {tokenizer.eos_id} if after == "</s>x" else frozenset()
        assert template.stops(tokenizer) == want


def test_a_conversation_is_read_from_its_beginning(capsys):
    """Each answer is what the model generates behind the rendered conversation so far."""
    model = tiny()
    tokenizer = Letters()
    template = ChatTemplate("{% for m in messages %}{{ m.role[0] ~ m.content }}{% endfor %}a")
    evaluation.talk(model, tokenizer, template, iter(["hi\n", "\n", "  \n", "and\n"]), max_new=4)
    first, second = capsys.readouterr().out.splitlines()
    expect = lambda text: "".join(p for _, p in evaluation.generate(model, tokenizer, [text], 4))
    assert first == expect("uhia") and second == expect(f"uhia{first}uanda")
