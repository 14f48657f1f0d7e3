"""Each scope answers one call alike: sites by attention, and why others have none. Nothing is searched in vain."""

from __future__ import annotations

import pytest
import torch
from zoo import ZOO

import ltm_retrofit as ltm
from ltm_retrofit.finding import walk as walks
from ltm_retrofit.finding.sites import Found, Refused
from ltm_retrofit.finding.walk import Walk
from ltm_retrofit.merging.methods import Scope
from ltm_retrofit.scopes.flow.find import find as find_flow
from ltm_retrofit.scopes.grid.find import find as find_grid
from ltm_retrofit.scopes.local.find import find as find_local
from ltm_retrofit.undisturbed import undisturbed

torch.set_num_threads(1)
FINDS = {Scope.FLOW: find_flow, Scope.GRID: find_grid, Scope.LOCAL: find_local}


@pytest.mark.parametrize("name", ["timm-vit", "timm-visformer", "timm-swin"])
def test_every_scope_returns_its_own_sites_and_refusals(name):
    model, example = ZOO[name]()
    walk, sites = Walk.of(model, example), ltm.find_sites(model, example)
    with undisturbed(walk.model), torch.no_grad():
        for scope, find in FINDS.items():
            found = find(walk)
            walk.settled |= set(found.sites) if scope is Scope.FLOW else set()
            assert isinstance(found, Found) and all(isinstance(reason, Refused) for reason in found.refused)
            own = [site for several in found.sites.values() for site in several]
            assert {site.scope for site in own} <= {scope}
            assert {site.block for site in own} == {site.block for site in sites.of(scope)}
            numbers = range(len(walk.recording.attended))
            assert found.sites or (found.refused and not sites.of(scope))
            assert set(found.sites) <= set(numbers)


def test_the_sites_of_a_scope_hold_alternatives_too():
    model, example = ZOO["timm-vit"]()
    sites = ltm.find_sites(model, example)
    assert {site.scope for site in sites} == {Scope.FLOW} and sites.of(Scope.FLOW) == sites.found
    assert sites.of(Scope.LOCAL) == sites.alternatives != () and sites.of(Scope.GRID) == ()


def test_a_large_model_on_the_meta_device_is_searched_for_the_best_scope_only(monkeypatch):
    model, example = ZOO["timm-vit"]()
    monkeypatch.setattr(walks, "SHORTENED", 0)
    monkeypatch.setattr(walks, "find_chains", lambda *_: pytest.fail("nothing needs them"))
    sites = ltm.find_sites(model.to("meta"), example)
    assert {site.scope for site in sites} == {Scope.FLOW} and sites.alternatives == ()


@pytest.mark.parametrize(
    "name, needed",
    [("timm-swin", {"find_axes", "find_chains", "constant_tokens"}), ("timm-visformer", {"find_chains", "runnable"})],
)
def test_what_scopes_share_is_computed_once(name, needed, monkeypatch):
    model, example = ZOO[name]()
    calls: list[str] = []
    for shared in ("find_axes", "find_chains", "constant_tokens", "runnable"):
        whole = getattr(walks, shared)
        monkeypatch.setattr(walks, shared, lambda *args, of=shared, whole=whole: (calls.append(of), whole(*args))[1])
    ltm.find_sites(model, example)
    assert needed <= set(calls) and len(calls) == len(set(calls))
