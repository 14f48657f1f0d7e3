"""A bar on a terminal, lines elsewhere, and nothing for what is over at once."""

from __future__ import annotations

import re

import pytest

from ltm_retrofit import progress as room
from ltm_retrofit.progress import progress


def test_what_is_over_at_once_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("counting", 3, "numbers") as bar:
        for _ in range(3):
            bar.update()
    assert capsys.readouterr() == ("", "")


def test_lines_hold_rate_and_time_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "DELAY", 0.0)
    monkeypatch.setattr(room, "EVERY", 0.0)
    with progress("counting", 4, "numbers") as bar:
        for _ in range(4):
            bar.update()
    out, err = capsys.readouterr()
    assert out == "" and "\r" not in err and "\x1b" not in err
    assert re.search(r"counting:  50%.*2/4 \[00:00<00:00, .* numbers/s\]\n", err)
    with progress("counting", 4, "numbers", on=False) as bar:
        bar.update(4)
    assert capsys.readouterr().err == ""
