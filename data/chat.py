"""Chat templates: a conversation as the text that a model was tuned on. Renders the part of Jinja
that templates use.

    template = ChatTemplate.of("checkpoints/llama-2-7b-chat")          # None if the folder has none
    ids = template.encode(tokenizer, [{"role": "user", "content": "Hello"}])

A template comes from chat_template.jinja or from tokenizer_config.json. It is read with the white
space rules of the Hugging Face library (trim_blocks, lstrip_blocks). Understood are text, {{ }}, {#
#}, for, if / elif / else, set, and expressions that are also Python's (`|` for filters and `~`
aside): Python's own parser reads them, and only the kinds listed in `evaluate` are computed, so
that no code of a template can run; texts and loops end at limits. An expression is looked at only
when it is reached: tools and the like may use more. Left out: macros, tools, images, and today's
date, without which templates write one of their own; anything unknown is one clear error.
"""
import ast
import operator
import re
from pathlib import Path

from data.bpe import cutter, encode_around
from data.checkpoint import read_json
from data.tokenizer import settings

QUOTED = r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\""
INSIDE = rf"(?:{QUOTED}|[^'\"])*?"                         # of a tag: its end in a string is none
TAGS = re.compile(rf"(\{{%-?{INSIDE}-?%\}}|\{{\{{-?{INSIDE}-?\}}\}}|\{{#.*?#\}})", re.S)
METHODS = {"strip", "lstrip", "rstrip", "startswith", "endswith", "upper", "lower", "title",
           "capitalize", "split", "replace", "get", "items", "keys", "values"}
COMPARE = {ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
           ast.Gt: operator.gt, ast.GtE: operator.ge, ast.In: lambda a, b: a in b,
           ast.NotIn: lambda a, b: a not in b}
MOST_STEPS = 1_000_000                                     # tags that are run
MOST_TEXT = 10_000_000                                     # characters of a value


def remainder(a, b):
    """a % b of numbers; of texts Python would format, to any length."""
    if isinstance(a, str):
        raise ValueError("`%` between texts is not supported")
    return a % b


ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mod: remainder,
              ast.MatMult: lambda a, b: str(a) + str(b)}   # what `~` has been turned into
FILTERS = {"trim": str.strip, "length": len, "upper": str.upper, "lower": str.lower,
           "capitalize": str.capitalize, "title": str.title, "string": str, "list": list,
           "first": lambda x: x[0], "last": lambda x: x[-1],
           "join": lambda x, by="": checked(by.join(map(str, x)), len(by) * len(x)),
           "default": lambda x, other="", empty=False:
               other if x is UNDEFINED or empty and not x else x}


def has_members(x) -> bool:
    """As Jinja sees it, where what has no value is empty."""
    return isinstance(x, (str, list, tuple, dict, Undefined))


TESTS = {"defined": lambda x: x is not UNDEFINED,
         "undefined": lambda x: x is UNDEFINED,
         "none": lambda x: x is None,
         "true": lambda x: x is True,
         "false": lambda x: x is False,
         "boolean": lambda x: isinstance(x, bool),
         "number": lambda x: isinstance(x, (int, float)),
         "string": lambda x: isinstance(x, str),
         "mapping": lambda x: isinstance(x, dict),
         "sequence": has_members, "iterable": has_members}


def checked(value, size: int | None = None):
    """The value; ValueError where it, or what it is about to become (size characters), is longer
    than any conversation."""
    if size is None:
        size = len(value) if isinstance(value, (str, list)) else 0
    if size > MOST_TEXT:
        raise ValueError(f"a text of more than {MOST_TEXT} characters")
    return value


class Undefined:
    """What a name without a value is: false, and no text."""

    def __bool__(self):
        return False

    def __str__(self):
        return ""

    def __iter__(self):
        return iter(())


UNDEFINED = Undefined()


class ChatTemplate:
    """source: the template's text; path: its file, for messages; names: bos_token, eos_token and
    the like, as it may write them."""

    def __init__(self, source: str, path: Path | str = "template",
                 names: dict[str, str] | None = None):
        self.path = path
        self.names = names or {}
        source = re.sub("\r\n?", "\n", source).removesuffix("\n")     # lines end as Jinja's do
        parts = TAGS.split(source)                                     # text, tag, text, ..., text
        strip_around(parts)
        with self.errors():
            self.nodes, rest = parse(parts, 0, ())

    @classmethod
    def of(cls, folder: str | Path) -> "ChatTemplate | None":
        """The template of a checkpoint folder, or None."""
        folder = Path(folder)
        config = folder / "tokenizer_config.json"
        said = read_json(config) if config.exists() else {}
        source = said.get("chat_template")
        path = config
        if (folder / "chat_template.jinja").exists():
            path = folder / "chat_template.jinja"
            try:
                source = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as e:
                raise ValueError(f"{path} is not UTF-8 text ({e}): correct it, or use "
                                 f"--generate") from None
        if isinstance(source, list):                                   # several, by name
            named = {e.get("name"): e.get("template") for e in source if isinstance(e, dict)}
            source = named.get("default")
        if source is None:
            return None
        if not isinstance(source, str):
            raise ValueError(f"{path}: chat_template is no text: correct it, or use --generate")
        named = settings(folder)
        names = {f"{role}_token": named.get(f"{role}_token", "")
                 for role in ("bos", "eos", "unk", "pad")}
        return cls(source, path, names)

    def render(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """The conversation as text, up to where the answer begins."""
        out = []
        scope = {"tools": None, "documents": None, **self.names, "messages": messages,
                 "add_generation_prompt": add_generation_prompt}
        with self.errors():
            run(self.nodes, scope, out, [MOST_STEPS])
        return "".join(out)

    def encode(self, tokenizer, messages: list[dict],
               add_generation_prompt: bool = True) -> list[int]:
        """Its ids."""
        return self.ids_of(tokenizer, self.render(messages, add_generation_prompt))

    def ids_of(self, tokenizer, text: str) -> list[int]:
        """The ids of a rendered text. Special tokens by their names, which a sentencepiece model
        reads as ordinary text, become what they are."""
        special = {name: tokenizer.special(name) for name in self.names.values() if name}
        special = {name: i for name, i in special.items() if i is not None}
        return encode_around(text, special, cutter(special),
                             lambda piece: tokenizer.encode(piece, bos=False))

    def stops(self, tokenizer) -> frozenset[int]:
        """The token that the template writes after an answer, where it is a special one, or a
        bracketed mark of its own such as <|im_end|>."""
        mark = "ANSWER"
        messages = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": mark}]
        after = self.render(messages, add_generation_prompt=False).rpartition(mark)[2].lstrip()
        first = self.ids_of(tokenizer, after)[:1]
        return frozenset(i for i in first if is_mark(tokenizer, i, after))

    def errors(self) -> "Renamed":
        """A `with` inside which every error becomes one of this template."""
        return Renamed(self.path)


def is_mark(tokenizer, i: int, after: str) -> bool:
    """Is id i, with which a text goes on, a special token or a bracketed mark?"""
    shown = tokenizer.decode([i])
    if re.fullmatch(r"<.+>|\[.+\]", shown.strip()):
        return True
    return shown == "" and any(tokenizer.special(after[:k]) == i for k in range(1, len(after) + 1))


class Renamed:
    """Whatever goes wrong inside becomes one ValueError with the template's file."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        pass

    def __exit__(self, kind, e, trace):
        if isinstance(e, (ValueError, TypeError, LookupError, AttributeError, SyntaxError,
                          ArithmeticError, RecursionError, MemoryError)):
            why = " ".join(str(e).split())[:200] or type(e).__name__
            raise ValueError(f"{self.path}: this chat template cannot be used ({why}): use "
                             f"--generate instead") from None


def strip_around(parts: list[str]) -> None:
    """White space around tags, in place: `-` takes all of it; a block or comment takes the indent
    before it, where it begins a line, and one newline after it."""
    for i in range(1, len(parts), 2):
        if parts[i][2] == "-":
            parts[i - 1] = parts[i - 1].rstrip()
        elif parts[i][1] != "{":
            before, newline, indent = parts[i - 1].rpartition("\n")
            if not indent.strip(" \t") and (newline or i == 1):
                parts[i - 1] = before + newline
    for i in range(1, len(parts), 2):                    # newlines had to be there until now
        if parts[i][-3] == "-":
            parts[i + 1] = parts[i + 1].lstrip()
        elif parts[i][1] != "{":
            parts[i + 1] = parts[i + 1].removeprefix("\n")


def split_tag(tag: str) -> tuple[str, str]:
    """"{%- if x %}" -> ("if", "x")."""
    word, *rest = tag[2:-2].strip("-").split(None, 1) or [""]
    return word, rest[0].rstrip() if rest else ""


def parse(parts: list[str], at: int, until: tuple[str, ...]) -> tuple[list[tuple], int]:
    """(nodes, index of the tag that ended them) from parts[at] on, which is text. Ends at a tag
    whose word is one of `until`, or at the end of the template. A node is one of

        ("text", text)                    ("if", [(condition, nodes), ...])
        ("out", expression)               ("for", names, expression, nodes)
        ("set", target, expression)
    """
    nodes = []
    while True:
        if parts[at]:
            nodes.append(("text", parts[at]))
        at += 1
        if at >= len(parts):
            if until:
                raise ValueError(f"{until[-1]} is missing")
            return nodes, at
        tag = parts[at]
        word, rest = split_tag(tag)
        if tag.startswith("{{"):
            nodes.append(("out", tag[2:-2].strip("-")))
        elif tag.startswith("{%") and word in until:
            return nodes, at
        elif tag.startswith("{%") and word == "set" and "=" in rest:
            target, value = map(str.strip, rest.split("=", 1))
            if not re.fullmatch(r"\w+(\.\w+)?", target):
                raise ValueError(f"{{% set {target} = ... %}} is not supported")
            nodes.append(("set", target, value))
        elif tag.startswith("{%") and word == "for":
            names, _, items = rest.partition(" in ")
            body, at = parse(parts, at + 1, ("endfor",))
            nodes.append(("for", [name.strip() for name in names.split(",")], items, body))
        elif tag.startswith("{%") and word == "if":
            branches = []
            condition = rest
            while word != "endif":
                body, at = parse(parts, at + 1, ("elif", "else", "endif"))
                branches.append((condition, body))
                word, condition = split_tag(parts[at])
                condition = "true" if word == "else" else condition
            nodes.append(("if", branches))
        elif tag.startswith("{%"):
            raise ValueError(f"{{% {word} %}} is not supported")
        at += 1


def run(nodes: list[tuple], scope: dict, out: list[str], left: list[int]) -> None:
    """Run tags in a scope; out gets their text, left holds how many may still be run."""
    for kind, *node in nodes:
        left[0] -= 1
        if left[0] < 0:
            raise ValueError(f"it does not end within {MOST_STEPS} steps")
        if kind == "text":
            out.append(node[0])
        elif kind == "out":
            value = evaluate(node[0], scope)
            out.append("None" if value is None else str(value))
        elif kind == "set":
            target, _, field = node[0].partition(".")
            if field:
                scope[target][field] = evaluate(node[1], scope)        # a namespace
            else:
                scope[target] = evaluate(node[1], scope)
        elif kind == "if":
            for condition, body in node[0]:
                if evaluate(condition, scope):
                    run(body, scope, out, left)
                    break
        else:
            names, items, body = node
            items = list(evaluate(items, scope))
            for i, item in enumerate(items):
                left_over = len(items) - i - 1
                loop = {"index0": i, "index": i + 1, "length": len(items),
                        "revindex0": left_over, "revindex": left_over + 1,
                        "first": i == 0, "last": i + 1 == len(items),
                        "previtem": items[i - 1] if i else UNDEFINED,
                        "nextitem": items[i + 1] if i + 1 < len(items) else UNDEFINED}
                values = [item] if len(names) == 1 else item
                inner = {**scope, **dict(zip(names, values)), "loop": loop}
                run(body, inner, out, left)                    # what it sets ends with it


def evaluate(text: str, scope: dict):
    """The value of an expression. `|`, which binds tightest in Jinja, is read as `**`, and `~` as
    `@`; strings may hold newlines."""
    pieces = re.split(f"({QUOTED})", text, flags=re.S)
    pieces[::2] = [piece.replace("|", "**").replace("~", "@") for piece in pieces[::2]]
    pieces[1::2] = [piece.replace("\n", "\\n") for piece in pieces[1::2]]
    return value_of(ast.parse(f"({''.join(pieces)})", mode="eval").body, scope)


def value_of(node: ast.expr, scope: dict):
    """The value of an expression that Python's parser has read; ValueError for any other than
    these kinds."""
    value = lambda child: value_of(child, scope)
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            known = {"true": True, "false": False, "none": None}
            return known[node.id] if node.id in known else scope.get(node.id, UNDEFINED)
        case ast.List() | ast.Tuple():
            return [value(x) for x in node.elts]
        case ast.Dict():
            return {value(k): value(v) for k, v in zip(node.keys, node.values)}
        case ast.IfExp():
            return value(node.body) if value(node.test) else value(node.orelse)
        case ast.UnaryOp(op=ast.Not()):
            return not value(node.operand)
        case ast.UnaryOp(op=ast.USub()):
            return -value(node.operand)
        case ast.BoolOp():
            for child in node.values:
                result = value(child)
                if bool(result) == isinstance(node.op, ast.Or):
                    break
            return result
        case ast.BinOp(op=ast.Pow()):
            return filtered(value(node.left), node.right, scope)
        case ast.BinOp() if type(node.op) in ARITHMETIC:
            return checked(ARITHMETIC[type(node.op)](value(node.left), value(node.right)))
        case ast.Compare():
            left = value(node.left)
            for op, child in zip(node.ops, node.comparators):
                if isinstance(op, (ast.Is, ast.IsNot)):  # a test, as in `x is defined`
                    name = ast.unparse(child).lower()
                    if name not in TESTS:
                        raise ValueError(f"the test `is {name}` is not supported")
                    holds = TESTS[name](left) == isinstance(op, ast.Is)
                else:
                    right = value(child)
                    holds, left = COMPARE[type(op)](left, right), right
                if not holds:
                    return False
            return True
        case ast.Subscript(slice=ast.Slice() as cut):
            ends = (cut.lower, cut.upper, cut.step)
            low, high, step = (None if x is None else value(x) for x in ends)
            return value(node.value)[low:high:step]
        case ast.Subscript():
            held, key = value(node.value), value(node.slice)
            try:
                return held[key]
            except LookupError:                                 # past the end of a list as well
                return UNDEFINED
        case ast.Attribute():
            held = value(node.value)
            if isinstance(held, dict):
                return held.get(node.attr, UNDEFINED)
            raise ValueError(f"`{ast.unparse(node)}` is not supported")
        case ast.Call(func=ast.Name(id="raise_exception")):
            raise ValueError(str(value(node.args[0])))
        case ast.Call(func=ast.Name(id="namespace")):
            return {k.arg: value(k.value) for k in node.keywords}
        case ast.Call(func=ast.Attribute(attr=name)) if name in METHODS and not node.keywords:
            held = value(node.func.value)
            given = [value(x) for x in node.args]
            if name == "replace" and len(given) > 1 and isinstance(held, str):
                checked(held, (len(held) + 1) * len(str(given[1])))
            if isinstance(held, (str, dict)):
                return getattr(held, name)(*given)
    raise ValueError(f"`{ast.unparse(node)}` is not supported")


def filtered(held, node: ast.expr, scope: dict):
    """held | filter | filter: `**` groups to the right."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return filtered(filtered(held, node.left, scope), node.right, scope)
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    name = call.func.id if isinstance(call.func, ast.Name) else ""
    if name not in FILTERS or call.keywords:
        raise ValueError(f"the filter `{ast.unparse(node)}` is not supported")
    return FILTERS[name](held, *(value_of(x, scope) for x in call.args))
