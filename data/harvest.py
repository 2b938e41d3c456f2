"""Four text sets that every user already has: the documentation and source on their own machine.

    from data.harvest import harvest, harvest_name
    texts = harvest("docs", "test")               # list of documents (str)
    print(harvest_name("docs"))                   # docs (python 3.11.7, torch 2.13.0, ...)

docs        prose: the topics of `help()`, README and .rst/.txt files inside packages, package
            descriptions, long module docstrings, and the documentation strings that torch and numpy
            attach with add_docstr / add_newdoc
docstrings  one document per source file: `name(arguments)` and the docstring of each function and
            class in it
code        one document per source file, without docstrings and without the comment block at its
            top (the licence)
headers     one document per C++ header (.h) of torch: a language that the tiny models have never
            been taught

Sources are the standard library of the running interpreter and the run-time packages of this
project, nothing else that happens to be installed. Files are parsed (ast), never imported. A file
belongs to train, validation or test by a hash of its relative path: the same in all sets and, for a
file that both have, in all versions of Python and of the packages. So no file that a model read in
training is in its test set. Sister files have paragraphs in common, though: about a tenth of the
test set's docs and docstrings, most of them of numpy.polynomial's six modules, stands word for word
in train; of headers, nothing. Two kinds of collections (help() topics, add_docstr files) are split
by entry instead. Text that occurs twice (file, docstring, paragraph of docs and headers) stays at
its first place.

Left out: tests, bundled third-party copies, generated tables, and torch's private sub-packages
(`torch/_*/`), which hold much code and little documentation. Other versions give other texts:
compare numbers only under equal names.
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
PACKAGES = ("torch", "numpy", "sentencepiece", "tiktoken", "triton")    # what the project runs on
CACHE = Path(__file__).resolve().parent / "cache"

SKIP_DIRS = {"test", "tests", "testing", "idle_test", "_internal", "_vendor", "_bundled",
             "third_party", "licenses", "site-packages", "dist-packages", "encodings",
             "__pycache__", "f2py"}
HEADERS = ("torch/include/c10/", "torch/include/torch/")    # ATen's are generated in great part
SKIP_TEXT = re.compile(
    r"licen[sc]e|copying|notice|credits|cmakelists|grammar|requirements", re.I)
MAX_FILE = 150_000         # characters; larger source files are mostly generated tables
MIN_PROSE = 300            # characters; shorter files and module docstrings are no document
MIN_ENTRY = 200            # characters of an attached documentation string
MIN_DOCSTRING = 40         # ... of a function's or class's
MIN_DOC = 100              # ... of a document of docs, without the paragraphs that were met before
MIN_PARAGRAPH = 80         # shorter paragraphs may occur twice


def versions() -> dict[str, str]:
    """Versions of the interpreter and of every harvested package that is installed; they determine
    the texts."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:     # triton has no wheels for some systems
            continue
    return found


def harvest_name(name: str) -> str:
    """Label for results, with the versions that the text depends on: `docs (python 3.11.7, torch
    2.13.0, ...)`."""
    found = ", ".join(f"{package} {version}" for package, version in versions().items())
    return f"{name} ({found})"


def harvest(name: str, split: str) -> list[str]:
    """Documents of set `name` (docs, docstrings, code, headers) in `split` (train, validation,
    test), in a fixed order.

    The first call parses the files (half a minute, behind a bar) and fills data/cache/, if it may;
    later calls read that."""
    if name not in SETS or split not in SPLITS:
        raise ValueError(f"no harvested text {name!r} {split!r}: choose from {', '.join(SETS)} and "
                         f"{', '.join(SPLITS)}")
    rules = Path(__file__).read_text(encoding="utf-8")    # new rules, new texts
    key = json.dumps(versions()) + rules
    folder = CACHE / f"harvest-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    try:
        return json.loads((folder / f"{name}-{split}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):                         # not there yet, or damaged: made again
        pass
    texts = {}
    for each, documents in collect().items():
        for part in SPLITS:
            texts[each, part] = [text for path, text in documents if split_of(path) == part]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for (each, part), documents in texts.items():
            file = folder / f"{each}-{part}.{os.getpid()}.tmp"    # two may harvest at once
            file.write_text(json.dumps(documents), encoding="utf-8")
            os.replace(file, folder / f"{each}-{part}.json")
    except OSError as error:                              # write-protected, or the disk is full
        print(f"harvested texts are not kept for the next run: {error}", file=sys.stderr)
    return texts[name, split]


def split_of(path: str) -> str:
    """Split of a relative path: 80% train, 10% validation, 10% test of the files."""
    percent = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big") % 100
    if percent < 80:
        return "train"
    return "validation" if percent < 90 else "test"


def collect() -> dict[str, list[tuple[str, str]]]:
    """Parses all sources. Returns for each set its (relative path, text) documents, in the order of
    the paths."""
    sets = {name: [] for name in SETS}
    seen = set()                                          # of the texts met so far, see first
    for path, file in Progress(source_files(), "reading this machine's documentation"):
        text, tree = read_source(file)
        if file.suffix == ".py":
            if tree is not None:
                add_module(path, text, tree, sets, seen)
        elif file.suffix == ".h":
            header = once(text, seen) if len(text) <= MAX_FILE else ""
            if len(header) >= MIN_PROSE:
                sets["headers"].append((path, header + "\n"))
        elif is_prose(text):
            add_docs([(path, text)], sets, seen)
    for package in versions():
        if package == "python":
            continue
        description = importlib.metadata.metadata(package).get_payload() or ""
        if is_prose(description):
            text = description.replace("\r\n", "\n").strip("\n") + "\n"
            sets["docs"].append((f"{package}/METADATA", text))
    return sets


def read_source(file: Path) -> tuple[str, ast.Module | None]:
    """(text, syntax tree of a .py file); ("", None) for a file that cannot be read or parsed."""
    try:
        text = file.read_text(encoding="utf-8").replace("\r\n", "\n")
        if file.suffix != ".py":
            return text, None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")               # escapes that only newer versions warn of
            return text, ast.parse(text)
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        return "", None      # another encoding, a zero byte, a template named .py, nested too deep


def add_module(path: str, text: str, tree: ast.Module, sets: dict, seen: set) -> None:
    """A Python file's documents to docs, docstrings and code."""
    if path == "python/pydoc_data/topics.py":
        add_docs(topics(tree), sets, seen)
        return
    docs = attached_docs(path, tree)
    code = "" if docs else strip_source(text, tree)       # text split by entry must not return here
    module = ast.get_docstring(tree) or ""
    if is_prose(module):
        docs.insert(0, (path, module))
    add_docs(docs, sets, seen)
    entries = [entry for entry, docstring in docstring_entries(tree) if first(docstring, seen)]
    if entries:
        sets["docstrings"].append((path, "\n\n\n".join(entries) + "\n"))
    if MIN_PROSE <= len(code) <= MAX_FILE and first(code, seen):
        sets["code"].append((path, code))


def add_docs(docs: list[tuple[str, str]], sets: dict, seen: set) -> None:
    """What is new in these (path, text) to docs."""
    for path, text in docs:
        text = once(text, seen)
        if len(text) >= MIN_DOC:
            sets["docs"].append((path, text + "\n"))


def source_files() -> list[tuple[str, Path]]:
    """(relative path, file) of every .py, .h, .rst, .md and .txt file to read; `python/...` is the
    standard library."""
    roots = {"python": Path(sysconfig.get_path("stdlib"))}
    for package in versions():
        if package == "python":
            continue
        spec = importlib.util.find_spec(package)          # finds, does not import
        if spec and spec.submodule_search_locations:
            roots[package] = Path(list(spec.submodule_search_locations)[0])
    found = []
    for name, root in roots.items():
        for folder, dirs, files in os.walk(root):
            dirs[:] = [d for d in dirs if is_folder_of_sources(name, d)]      # os.walk enters these
            for file in files:
                path = f"{name}/{(Path(folder) / file).relative_to(root).as_posix()}"
                if is_source(path, file):
                    found.append((path, Path(folder) / file))
    return sorted(found)


def is_folder_of_sources(package: str, folder: str) -> bool:
    """Is a folder of this name looked into?"""
    if package == "torch" and folder.startswith("_"):
        return False
    return folder not in SKIP_DIRS and not folder.startswith(("config-", "lib2to3"))


def is_source(path: str, name: str) -> bool:
    """Is a file read? By its relative path and its name."""
    if name.endswith(".py"):
        return not name.startswith("_sysconfigdata")
    if name.endswith(".h"):
        return path.startswith(HEADERS)
    return name.endswith((".rst", ".md", ".txt")) and not SKIP_TEXT.search(name)


def first(text: str, seen: set) -> bool:
    """True the first time a text is met (white space aside); seen holds the digests of those
    before."""
    digest = hashlib.sha256(" ".join(text.split()).encode()).digest()
    is_new = digest not in seen
    seen.add(digest)
    return is_new


def once(text: str, seen: set) -> str:
    """The text without its longer paragraphs that were met before."""
    paragraphs = re.split(r"\n\s*\n", text.strip("\n"))
    kept = [p for p in paragraphs if len(p) < MIN_PARAGRAPH or first(p, seen)]
    return "\n\n".join(kept).rstrip()


def is_prose(text: str) -> bool:
    """Long enough, and four characters out of five are letters and spaces: no tables, no
    listings."""
    letters = sum(c.isalpha() or c.isspace() for c in text)
    return len(text) >= MIN_PROSE and letters > 0.8 * len(text)


def topics(tree: ast.Module) -> list[tuple[str, str]]:
    """Entries of pydoc_data/topics.py. Long topics contain short ones: shortest first, so that
    those stay whole."""
    pairs = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                    pairs.append((key.value, value.value))
    pairs.sort(key=lambda pair: (len(pair[1]), pair[0]))
    return [(f"python/topics/{name}", text) for name, text in pairs]


def attached_docs(path: str, tree: ast.Module) -> list[tuple[str, str]]:
    """Long strings in calls of add_docstr, add_newdoc and their like, each an entry named by its
    own first words."""
    found = []
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        if not re.search(r"add_(chained_)?(new)?doc", ast.unparse(call.func)):
            continue
        strings = [node.value for node in ast.walk(call)
                   if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        longest = max(strings, key=len, default="").strip()
        text = "\n".join(line.rstrip() for line in longest.split("\n"))
        if len(text) >= MIN_ENTRY:
            found.append((f"{path}/{text[:40]}", text))
    return found


def docstring_entries(tree: ast.Module) -> list[tuple[str, str]]:
    """(`name(arguments)` + docstring, docstring) of every function and class that has one of
    MIN_DOCSTRING characters or more."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        docstring = ast.get_docstring(node) or ""
        if len(docstring) < MIN_DOCSTRING:
            continue
        if isinstance(node, ast.ClassDef):
            head = f"class {node.name}"
        else:
            head = f"{node.name}({ast.unparse(node.args)})"
        found.append((f"{head}\n\n{docstring.rstrip()}", docstring))
    return found


def strip_source(text: str, tree: ast.Module) -> str:
    """Source text without docstrings and without the comments before the first statement."""
    lines = text.split("\n")
    documented = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            string = node.body[0]
            begin = string.lineno - 1
            if lines[begin].lstrip()[:1] in "rRuU\"'":    # else it shares its line with `def`
                for i in range(begin, string.end_lineno):
                    lines[i] = None
    start = next((i for i, line in enumerate(lines) if line and not line.startswith("#")), 0)
    kept = "\n".join(line.rstrip() for line in lines[start:] if line is not None)
    return re.sub(r"\n{4,}", "\n\n\n", kept).strip("\n") + "\n"
