"""What there is to learn of the package: its size, its comments, and what only one room may know.

    python benchmarks/house.py

Code lines hold a name, a number or an operator: no blanks, comments or docstrings, and no lines that only go on with
the text of a message. (56bc864 had 9,460, and 9,775 with that text, in 96 files.) `tests/test_house.py` holds limits.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent.parent / "ltm_retrofit"
METHODS = ("ltm", "tome", "pool", "slice")
SCOPES = ("FLOW", "GRID", "LOCAL")
#: where a method's name belongs: the registry and the file of each
REGISTRY = ("merging/methods.py", "merging/mask.py", "merging/tome.py", "merging/pool.py", "merging/slice.py")
LONG = 400
#: what the docstring of a longer file says, with the reason
REASON = "over 400 lines"


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def named(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def docstrings(tree: ast.AST) -> Iterator[ast.Constant]:
    """Return the nodes of all docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and type(first.value.value) is str:
                yield first.value


def lines_of(file: Path, *more: int) -> tuple[set[int], set[int]]:
    """Return the numbers of the lines that hold code, and of those that hold a comment."""
    source = file.read_text(encoding="utf-8")
    told = {line for node in docstrings(ast.parse(source)) for line in range(node.lineno, (node.end_lineno or 0) + 1)}
    code, comments = set[int](), set[int]()
    said = (tokenize.NAME, tokenize.NUMBER, tokenize.OP, *more)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type in said:
            code |= set(range(token.start[0], token.end[0] + 1))
    return code - told, comments


def places(wanted: Callable[[ast.AST, set[int]], bool]) -> list[str]:
    """Return file and line of every node that is wanted; it is also told which constants are docstrings."""
    found = []
    for file in files():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        told = {id(node) for node in docstrings(tree)}
        found += [f"{named(file)}:{node.lineno}" for node in ast.walk(tree) if wanted(node, told)]  # type: ignore[attr-defined]
    return found


def compared_with(names: tuple[str, ...]) -> list[str]:
    """Return the places where something is compared with one of these names."""

    def wanted(node: ast.AST, _: set[int]) -> bool:
        return isinstance(node, ast.Compare) and any(
            isinstance(part, ast.Constant) and part.value in names for part in ast.walk(node)
        )

    return places(wanted)


def literals(names: tuple[str, ...]) -> list[str]:
    """Return the places where one of these names is written out, docstrings left aside."""
    return places(lambda node, told: isinstance(node, ast.Constant) and node.value in names and id(node) not in told)


def circle() -> list[str]:
    """Return modules that import each other in a circle, type-checking imports counted; none where there is none."""
    import grimp

    graph = grimp.build_graph("ltm_retrofit")
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def untold() -> list[str]:
    """Return the public functions and classes that show no example in their docstring; errors need none."""
    import ltm_retrofit as ltm

    public = {name: getattr(ltm, name) for name in ltm.__all__ if not name.startswith("_")}
    errors = [name for name, value in public.items() if isinstance(value, type) and issubclass(value, Exception)]
    return [name for name, value in public.items() if name not in errors and ">>>" not in (value.__doc__ or "")]


def long_files() -> list[str]:
    """Return the files that are long without a word on why."""
    found = []
    for file in files():
        source = file.read_text(encoding="utf-8")
        told = ast.get_docstring(ast.parse(source)) or ""
        if len(source.splitlines()) > LONG and REASON not in told.lower():
            found.append(named(file))
    return found


def measure() -> dict[str, Any]:
    counted = [lines_of(file) for file in files()]
    code = sum(len(lines) for lines, _ in counted)
    comments = sum(len(lines) for _, lines in counted)
    return {
        "files": len(counted),
        "code lines": code,
        "code lines, text of messages included": sum(len(lines_of(file, tokenize.STRING)[0]) for file in files()),
        "comment lines": comments,
        "comments, % of code and comments": round(100 * comments / (code + comments), 1),
        "modules in a circle of imports": circle(),
        "comparisons with a method's name outside the registry": [
            place for place in compared_with(METHODS) if place.partition(":")[0] not in REGISTRY
        ],
        "a scope's name written out": literals(SCOPES),
        "public names without an example": untold(),
        f"files over {LONG} lines that do not say why": long_files(),
    }


def show() -> None:
    for name, value in measure().items():
        print(f"{name}: {value if isinstance(value, int | float) else len(value)}")
        for entry in [] if isinstance(value, int | float) else value:
            print(f"    {entry}")


if __name__ == "__main__":
    show()
