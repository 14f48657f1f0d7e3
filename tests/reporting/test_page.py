"""The page of a report: one file that fetches nothing, well formed, all text escaped."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser

import pytest

from ltm_retrofit.reporting.answers import Answers
from ltm_retrofit.reporting.page import MOST, Part, intervals, page
from ltm_retrofit.reporting.report import ACCURACIES, Report

NASTY = 'a"b<script>alert(1)</script>&.png'


class Reader(HTMLParser):
    """Keeps what is open, every attribute, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "line", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert not reader.open
    return reader


@pytest.fixture
def report() -> Report:
    changed = [{"image": NASTY, "class": "hat", "original": "hat", "converted": "coat"}]
    answers = Answers("test of <data>", 40, {"original": 30, "converted": 29}, {"converted": 0.05}, {}, changed)
    classes = {"hat": {"images": 20, "original": 16, "converted": 15}, "coat": {"images": 20} | answers.right}
    return Report(
        model="net",
        hardware="a CPU",
        macs={"original": 2_000_000_000, "converted": 1_000_000_000},
        params={"original": 10, "converted": 12},
        latency_ms={"original": {1: 10.0}, "converted": {1: 7.0}},
        latency_ratio={1: (0.7, 0.65, 0.75)},
        merging_share=None,
        accuracy={**dict.fromkeys(ACCURACIES), "original": 75.0, "converted": 72.5},
        modules={"original": None, "converted": None},
        plan={"rows": [{"site": "b.1", "scope": "FLOW", "tokens_in": 9, "tokens_out": 5, "action": "merge"}]},
        memory_mb={"original": 4.0, "converted": 3.0},
        answers=dataclasses.replace(answers, classes=classes),
        left_out=["batches of 32 were not timed: too long"],
    )


def test_the_page_is_well_formed_and_fetches_nothing(report: Report) -> None:
    html = report.to_html()
    reader = read(html)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in reader.seen}
    assert not {"src", "href", "srcset"} & {name for _, attributes in reader.seen for name in attributes}
    assert not re.search(r"url\(|@import|https?:", html)


def test_the_page_answers_the_question(report: Report) -> None:
    text = " ".join(" ".join(read(report.to_html()).text).split())
    for said in (
        "In short: ×0.50 of the MACs, ×0.70 of the time at batch 1, top-1 of 72.50 % where the original has 75.00 %",
        "(-2.50 ± 2.47 points on 40 images)",
        "40 images: test of <data>",
        "59.8 to 85.8 %",
        "15 (-1)",
        NASTY,
        "Images whose answer changed: 1",
        "9 → 5",
        "batches of 32 were not timed",
    ):
        assert said in text
    for said in ("In short: ×0.50", "59.8 to 85.8 %", "15 (-1)", NASTY, "batches of 32"):
        assert said in report.to_markdown()
    assert report.to_dict()["answers"]["interval"]["original"] == pytest.approx((59.8, 85.8), abs=0.05)


def test_the_sentence_is_of_the_model_and_not_of_another_arm(report: Report) -> None:
    """A sliced arm of a run was taken for the model, where tuning had left the converted model as it was."""
    assert report.with_accuracy(sliced_finetuned=60.0).in_short() == report.in_short()


def test_the_files_are_those_that_are_named(report: Report, tmp_path) -> None:
    assert sorted(report.write(tmp_path)) == sorted(file.name for file in tmp_path.iterdir())
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == report.to_html()


def test_a_long_table_is_cut_and_says_so() -> None:
    table = [["name"], *([str(index)] for index in range(MOST + 7))]
    text = read(page("t", "l", [Part("h", table)], "b")).text
    assert str(MOST - 1) in text and str(MOST) not in text and "7 more stand in report.json." in text


@pytest.mark.parametrize("ends", [(0.0, 0.0, 100.0), (100.0, 99.9, 100.0), (50.0, 50.0, 50.0)])
def test_intervals_are_drawn_within_the_picture(ends: tuple[float, float, float]) -> None:
    places = [float(x) for x in re.findall(r'\b(?:cx|x1|x2)="([\d.-]+)"', intervals([("one", *ends)]))]
    assert places and all(250 <= x <= 750 for x in places)
