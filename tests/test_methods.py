"""A merging method of one's own: registered, it converts, plans, counts, saves and reloads as the package's do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ltm_retrofit as ltm
from ltm_retrofit.converted.record import masks_of
from ltm_retrofit.errors import BaseMismatch, RecipeError, UnsupportedBlock
from ltm_retrofit.finding.example import prepare_example
from ltm_retrofit.macs import count_macs
from ltm_retrofit.merging import methods
from ltm_retrofit.merging.methods import Keys, Method, Place, register_method
from ltm_retrofit.merging.tokens import Mask, Merged, dense_unmerge_macs, merge_by


class Runs(Mask):
    """Each merged token is the mean of a run of neighbours."""

    def forward(self, inner: Tensor, tokens: Tensor, sizes: Tensor | None, *_: object, **__: object) -> Merged:
        n, first = int(tokens.shape[1]), self.prefix
        p = self.kept_at(n)
        goes = torch.cat([torch.arange(first), first + torch.arange(n - first) * (p - first) // (n - first)])
        return merge_by(F.one_hot(goes, p).float(), tokens, sizes)


def runs_of(place: Place, keys: Keys) -> nn.Module:
    assert keys.weight.shape == (place.key_dim, place.dim)
    return Runs(place.tokens_in, place.tokens_out, place.prefix)


def macs(place: Place) -> int:
    return place.cells * place.tokens_in * place.tokens_out * (place.dim + 1)


@pytest.fixture(autouse=True)
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(methods, "_REGISTERED", {})
    register_method(Method("runs", 1, ("FLOW", "LOCAL"), runs_of, macs, dense_unmerge_macs))
    yield


@pytest.mark.parametrize("scope", ["FLOW", "LOCAL"])
@pytest.mark.parametrize("name", ["timm-vit", "timm-vit-avg-qknorm", "hf-vit"])
def test_it_converts_counts_saves_and_reloads(name: str, scope: str, build, images: Tensor, tmp_path: Path) -> None:
    host = build(name)
    share = 0.7 if scope == "FLOW" else 0.9
    model = ltm.retrofit(build(name), ltm.LTMConfig(flops=share, method="runs", scope=scope))
    plan = ltm.get_plan(model)
    assert {row.scope for row in plan.rows} == {scope} and plan.share <= share
    assert count_macs(model, prepare_example(model, None)).total == plan.macs  # two counters agree with `macs`
    masks = masks_of(model)
    assert masks and all(isinstance(mask, Runs) for mask in masks.values())
    with torch.no_grad():
        out = model(images)
        with ltm.disabled(model):
            original = model(images)
        with ltm.trace(model) as traced:
            model(images)
    assert len(traced.merges) == len(masks) and torch.allclose(traced.assignment(0).sum(-1), torch.ones(1))
    ltm.save_pretrained(model, tmp_path / "folder")
    loaded = ltm.from_pretrained(tmp_path / "folder").eval()
    assert ltm.get_plan(loaded) == plan
    with torch.no_grad():
        for ours, theirs in ((out, loaded(images)), (original, host(images))):
            ours, theirs = (value if isinstance(value, Tensor) else value.logits for value in (ours, theirs))
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_folder_of_a_method_that_nobody_registered_is_refused(build, tmp_path: Path, monkeypatch) -> None:
    model = ltm.retrofit(build("timm-vit"), ltm.LTMConfig(flops=0.7, method="runs"))
    ltm.save_pretrained(model, tmp_path / "folder")
    monkeypatch.setattr(methods, "_REGISTERED", {})
    with pytest.raises((BaseMismatch, RecipeError), match=r"'runs', which is not registered: call .*register_method"):
        ltm.from_pretrained(tmp_path / "folder")


def test_a_scope_that_it_does_not_serve_is_refused(build) -> None:
    register_method(Method("maps", 1, ("GRID",), runs_of, macs, dense_unmerge_macs))
    with pytest.raises((RecipeError, UnsupportedBlock), match="GRID"):
        ltm.retrofit(build("timm-vit"), ltm.LTMConfig(flops=0.7, method="maps"))
