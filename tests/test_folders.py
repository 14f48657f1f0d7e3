"""A folder is written whole or not at all, and only over one of ours."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from ltm_retrofit import folders
from ltm_retrofit.errors import CheckpointError
from ltm_retrofit.folders import check_ours, written_whole

MARK = "run.json"


def write(folder: Path, text: str) -> None:
    """Write a folder of two files, and the list of both."""
    with written_whole(folder, MARK) as new:
        (new / "model").mkdir()
        (new / "model" / "weights").write_text(text)
        (new / MARK).write_text(json.dumps({"written_by": "ltm_retrofit", "files": ["model/weights", MARK]}))


def files(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


# ------------------------------------------------------------------------------------------------------ what is ours


def test_new_and_empty_folders_and_our_own_may_be_written(tmp_path: Path) -> None:
    check_ours(tmp_path / "new" / "deep", MARK)
    (tmp_path / "empty").mkdir()
    check_ours(tmp_path / "empty", MARK)
    ours = tmp_path / "ours"
    write(ours, "x")
    check_ours(ours, MARK)
    with pytest.raises(CheckpointError, match="pass overwrite=True"):
        check_ours(ours, MARK, overwrite=False)
    (ours / "model" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds files that are not ours: model/notes\.txt\."):
        check_ours(ours, MARK)


def test_what_is_or_lies_below_a_file_is_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for below in (file, file / "out", file / "deep" / "out"):
        with pytest.raises(CheckpointError, match="is not a folder that can be written"):
            check_ours(below, MARK)


def test_a_folder_without_permission_is_refused_before_any_work(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "access", lambda place, mode: False)  # whoever runs this may be root
    with pytest.raises(CheckpointError, match=f"{tmp_path} is not a folder that can be written"):
        check_ours(tmp_path / "new", MARK)


@pytest.mark.parametrize(
    "mark", ["", "no json", "[]", "{}", '{"files": 5}', '{"files": null}', '{"files": ["thesis.txt", "run.json"]}']
)
def test_a_broken_or_foreign_list_protects_the_files(mark: str, tmp_path: Path) -> None:
    (tmp_path / MARK).write_text(mark)
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"thesis\.txt"):
        check_ours(tmp_path, MARK)


def test_links_and_empty_folders_are_foreign(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "dead").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="dead, empty"):
        check_ours(tmp_path, MARK)


def test_a_folder_in_the_place_of_a_file_of_ours_is_foreign(tmp_path: Path) -> None:
    write(tmp_path / "ours", "x")
    (tmp_path / "ours" / "model" / "weights").unlink()
    (tmp_path / "ours" / "model" / "weights").mkdir()
    with pytest.raises(CheckpointError, match="model/weights"):
        check_ours(tmp_path / "ours", MARK)


def test_many_foreign_files_are_counted(tmp_path: Path) -> None:
    for index in range(8):
        (tmp_path / f"{index}.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"0\.txt, .*4\.txt and 3 more"):
        check_ours(tmp_path, MARK)


# ------------------------------------------------------------------------------------------------- whole or not at all


def test_a_folder_is_written_and_replaced_whole(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "ours", "old")
    assert files(tmp_path / "deep" / "ours")["model/weights"] == "old"
    write(tmp_path / "deep" / "ours", "new")
    assert files(tmp_path / "deep" / "ours")["model/weights"] == "new"
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["ours"], "a temporary folder stayed"


def test_others_may_read_what_was_written(tmp_path: Path) -> None:
    write(tmp_path / "ours", "x")
    (tmp_path / "plain").mkdir()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "plain")]
    assert modes[0] == modes[1]


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("when", ["while it is written", "at the swap"])
def test_a_failure_leaves_what_was_there(when: str, kind: type[BaseException], tmp_path: Path, monkeypatch) -> None:
    write(tmp_path / "ours", "old")
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise kind("power cut")
        return rename(path, target)

    if when == "at the swap":
        monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(kind), written_whole(tmp_path / "ours", MARK) as new:
        (new / "half").write_text("x")
        if when != "at the swap":
            raise kind("power cut")
    assert files(tmp_path / "ours")["model/weights"] == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["ours"]


def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path / "ours", "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders, "swap", full)
    with pytest.raises(CheckpointError, match=r"No space left on device\. What was there is as it was"):
        write(tmp_path / "ours", "new")
    assert files(tmp_path / "ours")["model/weights"] == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["ours"]


def test_what_a_link_points_to_is_replaced_and_not_the_link(tmp_path: Path) -> None:
    write(tmp_path / "ours", "old")
    (tmp_path / "link").symlink_to(tmp_path / "ours")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and files(tmp_path / "ours")["model/weights"] == "new"


def test_a_file_that_came_meanwhile_is_not_lost(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"thesis\.txt"), written_whole(tmp_path / "out", MARK) as new:
        (new / MARK).write_text("{}")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert files(tmp_path / "out") == {"thesis.txt": "mine"}
