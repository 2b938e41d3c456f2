"""Four text sets that every user already has: the documentation and source on their own machine.

    from data.harvest import harvest, harvest_name
    texts = harvest("docs", "test")               # list of documents (str)
    print(harvest_name("docs"))                   # docs (python 3.11.7, torch 2.13.0, ...)

docs        prose: the topics of `help()`, README and .rst/.txt files inside packages, package descriptions, long module
            docstrings, and the documentation strings that torch and numpy attach with add_docstr / add_newdoc
docstrings  one document per source file: `name(arguments)` and the docstring of each function and class in it
code        one document per source file, without docstrings and without the comment block at its top (the licence)
headers     one document per C++ header (.h) of torch: a language that the tiny models have never been taught

Sources are the standard library of the running interpreter and the run-time packages of this project, nothing else that
happens to be installed. Files are parsed (ast), never imported. A file belongs to train, validation or test by a hash
of its relative path: the same in all sets and, for a file that both have, in all versions of Python and of the
packages. So what a model read in training is not in its test set. Two kinds of collections (help() topics, add_docstr
files) are split by entry instead. Text that occurs twice (file, docstring, paragraph of docs and headers) stays at its
first place.

Left out: tests, bundled third-party copies, generated tables, and torch's private sub-packages (`torch/_*/`), which
hold much code and little documentation. Other versions give other texts: compare numbers only under equal names.
"""
import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
import sysconfig
import warnings
from pathlib import Path

from data.progress import Progress

SETS = ("docs", "docstrings", "code", "headers")
SPLITS = ("train", "validation", "test")
PACKAGES = ("torch", "numpy", "sentencepiece", "tiktoken", "triton")      # the run-time requirements
CACHE = Path(__file__).resolve().parent / "cache"

SKIP_DIRS = {"test", "tests", "testing", "idle_test", "_internal", "_vendor", "_bundled", "third_party", "licenses",
             "site-packages", "dist-packages", "encodings", "__pycache__", "f2py"}
HEADERS = ("torch/include/c10/", "torch/include/torch/")                 # ATen's are generated in great part
SKIP_TEXT = re.compile(r"licen[sc]e|copying|notice|credits|cmakelists|grammar|requirements", re.I)
MAX_FILE = 150_000         # characters; larger source files are mostly generated tables
MIN_PROSE = 300            # characters; shorter files and module docstrings are not worth a document


def versions() -> dict[str, str]:
    """Versions of the interpreter and of every harvested package that is installed; they determine the texts."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:                   # triton has no wheels for some systems
            continue
    return found


def harvest_name(name: str) -> str:
    """Label for results, with the versions that the text depends on: `docs (python 3.11.7, torch 2.13.0, ...)`."""
    return f"{name} ({', '.join(f'{k} {v}' for k, v in versions().items())})"


def harvest(name: str, split: str) -> list[str]:
    """Documents of set `name` (docs, docstrings, code) in `split` (train, validation, test), in a fixed order.

    The first call parses the files (half a minute, behind a bar) and fills data/cache/, if it may; later calls read that."""
    if name not in SETS or split not in SPLITS:
        raise ValueError(f"no harvested text {name!r} {split!r}: choose from {', '.join(SETS)} and {', '.join(SPLITS)}")
    key = json.dumps(versions()) + Path(__file__).read_text(encoding="utf-8")        # new rules, new texts
    folder = CACHE / f"harvest-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    try:
        return json.loads((folder / f"{name}-{split}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):                                         # not there yet, or damaged: made again
        pass
    sets = collect()
    texts = {(n, s): [text for path, text in sets[n] if split_of(path) == s] for n in SETS for s in SPLITS}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for (n, s), documents in texts.items():
            part = folder / f"{n}-{s}.{os.getpid()}.tmp"                  # two processes may harvest at once
            part.write_text(json.dumps(documents), encoding="utf-8")
            os.replace(part, folder / f"{n}-{s}.json")
    except OSError as error:                                              # write-protected, or the disk is full
        print(f"harvested texts are not kept for the next run: {error}", file=sys.stderr)
    return texts[name, split]


def split_of(path: str) -> str:
    """Split of a relative path: 80% train, 10% validation, 10% test of the files."""
    h = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big") % 100
    return "train" if h < 80 else "validation" if h < 90 else "test"


def collect() -> dict[str, list[tuple[str, str]]]:
    """Parses all sources. Returns for each set its (relative path, text) documents, in the order of the paths."""
    sets, seen = {name: [] for name in SETS}, set()
    for path, file in Progress(source_files(), "reading this machine's documentation"):
        try:
            text = file.read_text(encoding="utf-8").replace("\r\n", "\n")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")                           # escapes that only newer versions warn of
                tree = ast.parse(text) if file.suffix == ".py" else None
        except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
            continue      # not readable, another encoding or a zero byte, a template that ends in .py, nested too deeply
        if file.suffix == ".h":
            header = once(text, seen) if len(text) <= MAX_FILE else ""
            if len(header) >= MIN_PROSE:
                sets["headers"].append((path, header + "\n"))
            continue
        if tree is None:
            docs, docstrings, code = [(path, text)] if is_prose(text) else [], [], ""
        elif path == "python/pydoc_data/topics.py":
            docs, docstrings, code = topics(tree), [], ""
        else:
            docs, docstrings = attached_docs(path, tree), docstring_entries(tree)
            code = "" if docs else strip_source(text, tree)               # text split by entry must not return as code
            module = ast.get_docstring(tree) or ""
            if len(module) >= MIN_PROSE and is_prose(module):
                docs.insert(0, (path, module))
        for key, doc in docs:
            doc = once(doc, seen)
            if len(doc) >= 100:
                sets["docs"].append((key, doc + "\n"))
        entries = [entry for entry, docstring in docstrings if first(docstring, seen)]
        if entries:
            sets["docstrings"].append((path, "\n\n\n".join(entries) + "\n"))
        if MIN_PROSE <= len(code) <= MAX_FILE and first(code, seen):
            sets["code"].append((path, code))
    for package in versions():
        description = "" if package == "python" else importlib.metadata.metadata(package).get_payload() or ""
        if is_prose(description):
            sets["docs"].append((f"{package}/METADATA", description.replace("\r\n", "\n").strip("\n") + "\n"))
    return sets


def source_files() -> list[tuple[str, Path]]:
    """(relative path, file) of every .py, .h, .rst, .md and .txt file to read; `python/...` is the standard library."""
    roots = {"python": Path(sysconfig.get_path("stdlib"))}
    for package in versions():
        spec = None if package == "python" else importlib.util.find_spec(package)     # finds, does not import
        if spec and spec.submodule_search_locations:
            roots[package] = Path(list(spec.submodule_search_locations)[0])
    found = []
    for name, root in roots.items():
        for folder, dirs, files in os.walk(root):
            here = Path(folder).relative_to(root)
            dirs[:] = [d for d in dirs if d not in SKIP_DIRS and not d.startswith(("config-", "lib2to3"))
                       and not (name == "torch" and d.startswith("_"))]
            found += [(f"{name}/{(here / f).as_posix()}", Path(folder) / f) for f in files
                      if f.endswith(".py") and not f.startswith("_sysconfigdata")
                      or f.endswith((".rst", ".md", ".txt")) and not SKIP_TEXT.search(f)
                      or f.endswith(".h") and f"{name}/{(here / f).as_posix()}".startswith(HEADERS)]
    return sorted(found)


def first(text: str, seen: set) -> bool:
    """True the first time a text is met (white space aside)."""
    digest = hashlib.sha256(" ".join(text.split()).encode()).digest()
    return digest not in seen and not seen.add(digest)


def once(text: str, seen: set) -> str:
    """The text without its longer paragraphs that were met before."""
    return "\n\n".join(p for p in re.split(r"\n\s*\n", text.strip("\n")) if len(p) < 80 or first(p, seen)).rstrip()


def is_prose(text: str) -> bool:
    """Long enough, and four characters out of five are letters and spaces: no tables, no listings."""
    return len(text) >= MIN_PROSE and sum(c.isalpha() or c.isspace() for c in text) > 0.8 * len(text)


def topics(tree: ast.Module) -> list[tuple[str, str]]:
    """Entries of pydoc_data/topics.py. Long topics contain short ones: shortest first, so that those stay whole."""
    pairs = [(k.value, v.value) for node in ast.walk(tree) if isinstance(node, ast.Dict)
             for k, v in zip(node.keys, node.values) if isinstance(k, ast.Constant) and isinstance(v, ast.Constant)]
    return [(f"python/topics/{k}", v) for k, v in sorted(pairs, key=lambda pair: (len(pair[1]), pair[0]))]


def attached_docs(path: str, tree: ast.Module) -> list[tuple[str, str]]:
    """Long strings in calls of add_docstr, add_newdoc and their like, each an entry named by its own first words."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and re.search(r"add_(chained_)?(new)?doc", ast.unparse(node.func)):
            strings = [c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)]
            text = "\n".join(line.rstrip() for line in max(strings, key=len, default="").strip().split("\n"))
            if len(text) >= 200:
                found.append((f"{path}/{text[:40]}", text))
    return found


def docstring_entries(tree: ast.Module) -> list[tuple[str, str]]:
    """(`name(arguments)` + docstring, docstring) of every function and class that has one of 40 characters or more."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            docstring = ast.get_docstring(node) or ""
            if len(docstring) >= 40:
                is_class = isinstance(node, ast.ClassDef)
                head = f"class {node.name}" if is_class else f"{node.name}({ast.unparse(node.args)})"
                found.append((f"{head}\n\n{docstring.rstrip()}", docstring))
    return found


def strip_source(text: str, tree: ast.Module) -> str:
    """Source text without docstrings and without the comments before the first statement."""
    lines = text.split("\n")
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) \
                and ast.get_docstring(node, clean=False) is not None:
            string = node.body[0]
            if lines[string.lineno - 1].lstrip()[:1] in "rRuU\"'":        # else it shares its line with `def`
                lines[string.lineno - 1:string.end_lineno] = [None] * (string.end_lineno - string.lineno + 1)
    start = next((i for i, line in enumerate(lines) if line and not line.startswith("#")), 0)
    kept = "\n".join(line.rstrip() for line in lines[start:] if line is not None)
    return re.sub(r"\n{4,}", "\n\n\n", kept).strip("\n") + "\n"
