"""How dense the code is: for each file, tokens a code line, lines over 100 characters, comments, tuple assignments.

    python tests/density.py                                  # the top-level modules
    python tests/density.py data/*.py kernels/*.py

Code lines are those with a token that is no comment, docstring or line end. A tuple assignment is one whose target is a
tuple, such as `a, b = 1, 2`; unpacking in a for loop is none.
"""
import ast
import io
import sys
import tokenize
from pathlib import Path

LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.ENCODING, tokenize.ENDMARKER}


def measure(text: str) -> dict[str, float]:
    """{what: number} of a source text."""
    tree, docstrings = ast.parse(text), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node, clean=False) is not None:
            docstrings.add(node.body[0].value.lineno)
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    code = [t for t in tokens if t.type not in LAYOUT and not (t.type == tokenize.STRING and t.start[0] in docstrings)]
    lines = {t.start[0] for t in code}
    comments = sum(t.type == tokenize.COMMENT for t in tokens)
    tuples = sum(isinstance(node, ast.Assign) and any(isinstance(target, ast.Tuple) for target in node.targets)
                 for node in ast.walk(tree))
    n, every = max(1, len(lines)), text.splitlines()
    return {"code lines": len(lines), "tokens/line": len(code) / n, "over 100, %": 100 * sum(len(x) > 100 for x in every) / max(1, len(every)),
            "comments/100": 100 * comments / n, "tuples/100": 100 * tuples / n}


if __name__ == "__main__":
    files = [Path(a) for a in sys.argv[1:]] or sorted(Path(__file__).resolve().parents[1].glob("*.py"))
    for i, file in enumerate(files):
        got = measure(file.read_text(encoding="utf-8"))
        if not i:
            print(f"{'':24s}" + "".join(f"{name:>14s}" for name in got))
        print(f"{file.name:24s}" + "".join(f"{value:14.1f}" for value in got.values()))
