"""How dense the code is, one row a file: tokens a code line, the share of lines over 100
characters, comments and tuple assignments per hundred code lines.

    python tests/density.py                          # every folder of the project
    python tests/density.py data/*.py model.py       # these files

A code line is one with a token that is no comment, docstring or line end. A tuple assignment is one
whose target is a tuple, such as `a, b = 1, 2`; unpacking in a for loop is none. Read code of this
field (nanoGPT, gpt-fast, llama2.c) has 10 to 13 tokens a line.
"""
import ast
import io
import sys
import tokenize
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
FOLDERS = (".", "kernels", "data", "data/tiny", "bench", "tests")
WIDTH = 100          # characters a line may have
LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT,
          tokenize.ENCODING, tokenize.ENDMARKER}
COLUMNS = ("code lines", "tokens/line", f"over {WIDTH}, %", "comments/100", "tuples/100")


def measure(text: str) -> tuple[float, ...]:
    """The numbers of COLUMNS for a source text."""
    tree = ast.parse(text)
    docstrings = docstring_lines(tree)
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    code = [token for token in tokens if token.type not in LAYOUT
            and not (token.type == tokenize.STRING and token.start[0] in docstrings)]
    code_lines = len({token.start[0] for token in code})
    comments = sum(token.type == tokenize.COMMENT for token in tokens)
    tuples = sum(isinstance(node, ast.Assign) and isinstance(target, ast.Tuple)
                 for node in ast.walk(tree) for target in getattr(node, "targets", ()))
    lines = text.splitlines()
    wide = sum(len(line) > WIDTH for line in lines)
    each = max(1, code_lines)
    return (code_lines, len(code) / each, 100 * wide / max(1, len(lines)),
            100 * comments / each, 100 * tuples / each)


def docstring_lines(tree: ast.Module) -> set[int]:
    """The numbers of the lines in which docstrings begin."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)):
            if ast.get_docstring(node, clean=False) is not None:
                found.add(node.body[0].value.lineno)
    return found


def project_files() -> list[Path]:
    """Every file of the project that holds code."""
    found = []
    for folder in FOLDERS:
        files = sorted((HERE / folder).glob("*.py"))
        found += [file for file in files if file.stat().st_size]
    return found


def main(files: list[Path]) -> None:
    print(" " * 28 + "".join(f"{name:>14s}" for name in COLUMNS))
    for file in files:
        path = file.resolve()
        name = str(path.relative_to(HERE) if path.is_relative_to(HERE) else file)
        numbers = measure(file.read_text(encoding="utf-8"))
        print(f"{name:28s}" + f"{numbers[0]:14d}" + "".join(f"{n:14.1f}" for n in numbers[1:]))


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]] or project_files())
