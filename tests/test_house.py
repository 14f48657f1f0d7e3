"""The house stays small: its limits, its public names, its examples, and the tree in docs/architecture.md."""

from __future__ import annotations

import ast
import doctest
import functools
import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ltm_retrofit as ltm
from ltm_retrofit.merging import methods

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ltm_retrofit"
HOUSE = runpy.run_path(str(ROOT / "benchmarks" / "house.py"))
ARCHITECTURE = ROOT / "docs" / "architecture.md"
#: What `benchmarks/house.py` measures, and the most that it may be; of lists, how many entries. The rebuilt house,
#: commit 2c5b39d, had 8,598 lines in 80 files. The Hub, Auto classes, input sizes and rounds came since, and the report
#: of all versions side by side (640 lines: answers, memory, a page, progress, and messages in options), validation, the
#: planner that measures (400), conversions compared (200), exports that are checked and timed (560), pictures as
#: superpixels and predictions (350), what public reports asked for (650: views, wrappers, hooks), and what newcomers
#: gave instead of data (50): whoever adds a room raises the limit by what it needs, and no further.
LIMITS = {
    "code lines": 12550,
    "files": 101,
    "modules in a circle of imports": 0,
    "comparisons with a method's name outside the registry": 4,
    "public names without an example": 0,
    "files over 400 lines that do not say why": 0,
}


@functools.cache
def measured() -> dict[str, Any]:
    return HOUSE["measure"]()


@pytest.mark.parametrize("what", LIMITS)
def test_the_house_stays_within_its_limits(what: str) -> None:
    value = measured()[what]
    assert (len(value) if isinstance(value, list) else value) <= LIMITS[what], value


# ------------------------------------------------------------------------------------------------------- public names


STUB = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
#: public name → the room that it is imported from
HOMES = {
    alias.name: f"ltm_retrofit.{node.module}"
    for node in STUB.body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}


@pytest.mark.parametrize("name", HOMES)
def test_a_public_name_is_made_in_its_home(name: str) -> None:
    assert getattr(ltm, name).__module__ == HOMES[name]


def test_the_stub_says_to_type_checkers_that_its_names_are_public() -> None:
    imports = [node for node in STUB.body if isinstance(node, ast.ImportFrom)]
    assert all(alias.asname == alias.name and node.level == 1 for node in imports for alias in node.names)


def test_public_names_are_shown_and_others_refused() -> None:
    assert set(ltm.__all__) == set(dir(ltm)) == set(HOMES)
    with pytest.raises(AttributeError, match="retro"):
        ltm.retro  # noqa: B018


def test_nothing_heavy_is_imported_until_it_is_used() -> None:
    heavy = "torch timm transformers datasets accelerate numpy matplotlib yaml safetensors huggingface_hub"
    code = f"import sys, ltm_retrofit; print([name for name in {heavy.split()} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# ----------------------------------------------------------------------------------------------------------- examples


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SHOWING = [module_of(file) for file in HOUSE["files"]() if ">>>" in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("module", SHOWING)
def test_the_examples_in_docstrings_run(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in a folder of its own, where it may write; it sees the names of its module, as doctests do."""
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    found = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(module))
    assert found
    monkeypatch.setattr(methods, "_REGISTERED", {})  # an example registers a method, which no other test shall see
    said: list[str] = []
    for number, example in enumerate(found):
        (tmp_path / str(number)).mkdir()
        monkeypatch.chdir(tmp_path / str(number))
        runner.run(example, out=said.append)
    assert not runner.failures, "".join(said)


# ------------------------------------------------------------------------------------------------------- architecture


def files_of(tree: str) -> set[str]:
    """Read a tree of files: in each line, the words at its beginning that end in `.py`, or one folder that ends in `/`.

    A folder is open for the lines below it that are indented further.
    """
    files, opened = set(), []
    for line in tree.splitlines():
        indent, words = len(line) - len(line.lstrip()), line.split()
        opened = [(depth, folder) for depth, folder in opened if depth < indent]
        if words and words[0].endswith("/"):
            opened.append((indent, words[0]))
        while words and words[0].endswith(".py"):
            files.add("".join(folder for _, folder in opened) + words.pop(0))
    return files


def test_trees_are_read_as_they_are_drawn() -> None:
    tree = """
package/
  one.py two.py      two files of a line
  room/              a folder
    three.py         uses one.py
    deep/
      four.py
  hall/five.py       a file and its folder
  six.py
"""
    names = ("one", "two", "room/three", "room/deep/four", "hall/five", "six")
    assert files_of(tree) == {f"package/{name}.py" for name in names}


def test_the_tree_in_the_docs_is_that_of_the_files() -> None:
    blocks = re.findall(r"^```\w*\n(.*?)^```", ARCHITECTURE.read_text(encoding="utf-8"), re.S | re.M)
    (tree,) = [block for block in blocks if block.startswith("ltm_retrofit/")]
    written = {name for name in files_of(tree) if not name.endswith("__init__.py")}
    there = {file.relative_to(ROOT).as_posix() for file in PACKAGE.rglob("*.py") if file.name != "__init__.py"}
    assert written - there == set(), "drawn, and not there"
    assert there - written == set(), "there, and not drawn"


def test_files_that_the_architecture_names_exist() -> None:
    text = ARCHITECTURE.read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+\.py)\b", text))
    assert named and not [name for name in named if not (PACKAGE / name).is_file() and not (ROOT / name).is_file()]
