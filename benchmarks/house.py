"""What there is to learn of the package: its size, its comments, and what only one room may know.

    python benchmarks/house.py

Code lines are lines that hold code: no blanks, comments or docstrings. `tests/test_house.py` holds the limits.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "ltm_retrofit"
METHODS = ("ltm", "tome", "pool", "slice")
SCOPES = ("FLOW", "GRID", "LOCAL")
#: where a method's name belongs: its own file and the default of the user's settings
REGISTRY = ("merging/methods.py", "merging/mask.py", "merging/tome.py", "merging/pool.py", "merging/slice.py")
LONG = 400


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def docstrings(tree: ast.AST) -> Iterator[ast.Expr]:
    """Return the nodes of all docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                yield first


def lines_of(file: Path) -> tuple[set[int], set[int]]:
    """Return the numbers of the lines that hold code, and of those that hold a comment."""
    source = file.read_text()
    told = {line for node in docstrings(ast.parse(source)) for line in range(node.lineno, (node.end_lineno or 0) + 1)}
    code, comments = set[int](), set[int]()
    silent = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.ENCODING)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in silent:
            code |= set(range(token.start[0], token.end[0] + 1))
    return code - told, comments


def compared_with(names: tuple[str, ...]) -> list[str]:
    """Return the places where something is compared with one of these names."""
    found = []
    for file in files():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Compare):
                sides = [part for side in (node.left, *node.comparators) for part in ast.walk(side)]
                if any(isinstance(side, ast.Constant) and side.value in names for side in sides):
                    found.append(f"{file.relative_to(PACKAGE)}:{node.lineno}")
    return found


def literals(names: tuple[str, ...]) -> list[str]:
    """Return the places where one of these names is written out, docstrings left aside."""
    found = []
    for file in files():
        tree = ast.parse(file.read_text())
        told = {id(node.value) for node in docstrings(tree)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node.value in names and id(node) not in told:
                found.append(f"{file.relative_to(PACKAGE)}:{node.lineno}")
    return found


def circles() -> list[str]:
    """Return the modules that import each other, type-checking imports counted."""
    import grimp

    graph = grimp.build_graph("ltm_retrofit")
    waiting = {module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules}
    while free := [module for module, imports in waiting.items() if not imports & waiting.keys()]:
        for module in free:
            del waiting[module]
    return sorted(waiting)


def examples() -> tuple[int, int]:
    """Return how many of the public functions and classes show an example in their docstring, and of how many."""
    import ltm_retrofit as ltm

    public = [getattr(ltm, name) for name in ltm.__all__ if not name.startswith("_")]
    public = [value for value in public if not (isinstance(value, type) and issubclass(value, Exception))]
    return sum(">>>" in (value.__doc__ or "") for value in public), len(public)


def measure() -> dict[str, object]:
    counted = {file: lines_of(file) for file in files()}
    code = sum(len(lines) for lines, _ in counted.values())
    comments = sum(len(lines) for _, lines in counted.values())
    outside = [place for place in compared_with(METHODS) if place.partition(":")[0] not in REGISTRY]
    shown, public = examples()
    return {
        "files": len(counted),
        "code lines": code,
        "comment lines": comments,
        "comments, % of code and comments": round(100 * comments / (code + comments), 1),
        "modules in a circle of imports": circles(),
        "comparisons with a method's name outside the registry": outside,
        "a scope's name written out": len(literals(SCOPES)),
        "public names with an example, of": [shown, public],
        "files over 400 lines": [
            str(f.relative_to(PACKAGE)) for f in files() if len(f.read_text().splitlines()) > LONG
        ],
    }


if __name__ == "__main__":
    for name, value in measure().items():
        print(f"{name}: {value}")
