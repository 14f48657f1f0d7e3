"""What a conversion costs and whether it holds, for a model on the meta device: a twin is converted in its place."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from ltm_retrofit.convert import build, prove_installed
from ltm_retrofit.errors import CountError
from ltm_retrofit.finding.example import Example, on_meta, run
from ltm_retrofit.finding.sites import AttentionSite, Sites
from ltm_retrofit.finding.walk import SHORTENED, make_twin
from ltm_retrofit.macs import count_macs_quick
from ltm_retrofit.plan import MergePlan
from ltm_retrofit.scopes.base import install
from ltm_retrofit.undisturbed import undisturbed

#: blocks of each run of equal ones that are converted for real
KEPT = 2


def rehearse(model: nn.Module, example: Example, sites: Sites, plan: MergePlan, *, kept: int | None = KEPT) -> int:
    """Convert a twin as planned and prove it, (e); count the full model, converted, on the meta device.

    Args:
        model: with its parameters on the meta device.
        example: an input.
        sites: what `find_sites` found in it.
        plan: what `make_plan` made of them.
        kept: how many blocks of each run of equal ones the twin has; all where it is None.

    Raises:
        UnsupportedBlock: where proof (e) fails.
        CountError: where the MACs that are counted are not those of the plan.
    """
    grid = any(row.scope == "GRID" for row in plan.rows)
    kept = None if grid or sites.total_macs < SHORTENED else kept
    twin, inputs, expected = _run_twin(model, example, kept)
    present = {name for name, _ in twin.named_modules()}

    def there(found: tuple[AttentionSite, ...]) -> tuple[AttentionSite, ...]:
        return tuple(site for site in found if site.block in present and site.attention in present)

    part = dataclasses.replace(sites, found=there(sites.found), alternatives=there(sites.alternatives))
    rows = tuple(row for row in plan.rows if row.site in {s.block for s in (*part.found, *part.alternatives)})
    with undisturbed(twin), torch.no_grad():
        if rows:
            install(twin, *build(twin, part, dataclasses.replace(plan, rows=rows)))
            prove_installed(twin, inputs, expected)
    macs = _count(*on_meta(model, example), sites, plan)
    if macs is None:  # something looks at values, which the meta device has none of
        whole, numbers, _ = make_twin(model, example, kept=None)
        macs = _count(whole, numbers, sites, plan)
    if macs != plan.macs:
        raise CountError(f"the plan says {plan.macs:,} MACs, and {macs:,} are counted")
    return macs


def _count(model: nn.Module, example: Example, sites: Sites, plan: MergePlan) -> int | None:
    install(model, *build(model, sites, plan))
    try:
        with undisturbed(model), torch.no_grad():
            return count_macs_quick(lambda: run(model, example))
    except CountError:
        raise
    except Exception:
        if not any(parameter.is_meta for parameter in model.parameters()):
            raise
        return None


def _run_twin(model: nn.Module, example: Example, kept: int | None) -> tuple[nn.Module, Example, Any]:
    twin, inputs, removed = make_twin(model, example, kept=kept)
    try:
        with undisturbed(twin), torch.no_grad():
            return twin, inputs, run(twin, inputs)
    except Exception:  # something counts its blocks
        if not removed:
            raise
    return _run_twin(model, example, None)
