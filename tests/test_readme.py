"""The README's commands and code stay alive."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from ltm_retrofit.cli import parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]
COMMANDS = sorted({line.split("#")[0].strip() for line in SHELL if line.startswith("ltm-retrofit ")})
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command: str) -> None:
    arguments = parser().parse_args(shlex.split(command)[1:])
    assert arguments.command in command


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {line.split()[1] for line in SHELL if line.startswith("make ")}
    assert {"quickstart", "test"} <= targets
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.strip().splitlines()[-1][:40])
def test_python_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some write a folder
    exec(compile(code, "README.md", "exec"), {})
    assert PYTHON


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_coverage_figures_are_the_matrix_s() -> None:
    totals = json.loads((ROOT / "coverage.json").read_text(encoding="utf-8"))["header"]["totals"]
    said = " ".join(README.split())
    timm, classifiers = totals["timm"], totals["classifiers"]
    assert f"of timm's {timm['rows']} with attention {timm['yes']} convert with all proofs" in said
    assert f"of {classifiers['rows']} Hugging Face types {classifiers['yes']}." in said
    assert ("have not been run" in said) == bool(timm["not run"])


def test_sentences_are_short() -> None:
    """A sentence ends at a full stop, a colon or a semicolon; code, tables and headings are none."""
    prose = re.sub(r"```.*?```", "", README, flags=re.S)
    prose = "\n".join(line for line in prose.splitlines() if not line.startswith(("|", "#", "![")))
    parts = re.split(r"\n\s*\n|\n(?=- |\d+\. )", re.sub(r"\]\([^)]*\)", "]", prose))
    sentences = [one for part in parts for one in re.split(r"(?<=[.:;?])\**\s+", " ".join(part.split()))]
    long = [one for one in sentences if len([word for word in one.split() if re.search(r"\w", word)]) > 25]
    assert len(sentences) > 50 and not long


def test_the_glossary_has_at_most_thirty_terms() -> None:
    glossary = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    assert 10 < len(re.findall(r"^\| \*\*", glossary, re.M)) <= 30


@pytest.mark.parametrize("file", sorted((ROOT / "tests").rglob("test_*.py")), ids=lambda file: file.stem)
def test_a_test_is_named_by_its_subject(file: Path) -> None:
    assert not re.search("review|hostile|foreign|issue|regression|misc", file.stem)
