"""Folders that earlier code wrote load to the logits that it had."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file
from saving.write_folders import FOLDERS, SAVED, logits

import ltm_retrofit as ltm
from ltm_retrofit.errors import BaseMismatch


@pytest.mark.parametrize("name", SAVED)
def test_a_folder_of_earlier_code_gives_the_logits_of_then(name: str) -> None:
    build, _, side = SAVED[name]
    base = None
    if name.endswith("adapter"):
        base = build()
        base.load_state_dict(load_file(FOLDERS / f"{name}.base.safetensors"))
    model = ltm.from_pretrained(FOLDERS / name, base=base)
    expected = load_file(FOLDERS / f"{name}.expected.safetensors")["logits"]
    assert float((logits(model, side) - expected).abs().max()) <= 1e-6


def test_a_folder_of_an_earlier_version_of_its_method_is_refused_by_name() -> None:
    with pytest.raises(BaseMismatch, match="saved with version 1 of method 'ltm', this ltm_retrofit has 2: convert"):
        ltm.from_pretrained(FOLDERS / "timm-vit-ltm-version-1")
