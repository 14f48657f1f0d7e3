"""Plans: budgets are met or the nearest that can be is said; what is predicted is what is counted; JSON."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import ltm_retrofit as ltm
from ltm_retrofit.errors import BaseMismatch, BudgetError, CountError, RecipeError, UnsupportedBlock
from ltm_retrofit.macs import count_macs
from ltm_retrofit.merging.methods import method_names
from ltm_retrofit.plan import MergePlan
from ltm_retrofit.planner import TOLERANCE

torch.set_num_threads(1)
METHODS = method_names()
_SITES: dict = {}


@pytest.fixture
def sites_of(build: Callable[..., nn.Module]):
    """Sites of a family by name, found once."""

    def get(family: str):
        if family not in _SITES:
            _SITES[family] = ltm.find_sites(build(family))
        return _SITES[family]

    return get


def plan_or_nearest(sites, target: float, **options) -> MergePlan:
    """Check the contract of ``flops`` for one target and return the plan that it led to."""
    try:
        plan = ltm.make_plan(sites, ltm.LTMConfig(flops=target, **options))
        wanted = target
    except BudgetError as error:
        assert 0 < error.nearest < 1
        assert not target - TOLERANCE <= error.nearest <= target
        plan = ltm.make_plan(sites, ltm.LTMConfig(flops=error.nearest, **options))
        assert plan.share == pytest.approx(error.nearest, abs=1e-12), "nearest is exact"
        wanted = error.nearest
    assert wanted - TOLERANCE <= plan.share <= wanted * (1 + 1e-12)
    return plan


def check_rows(plan: MergePlan, sites) -> None:
    names = [site.block for site in sites]
    present, depth = sites[0].layout.tokens, -1
    for row in plan.rows:
        if row.scope == "LOCAL":  # merges for its MLP only, and nothing FLOW comes before it
            assert row.tokens_in == present == sites[0].layout.tokens and row.action == "merge"
            assert sites[0].layout.prefix < row.tokens_out < row.tokens_in
            continue
        assert row.tokens_in == present and names.index(row.site) > depth
        assert sites[0].layout.prefix <= row.tokens_out < row.tokens_in
        if row.action == "merge":
            assert row.tokens_out > sites[0].layout.prefix
        present, depth = row.tokens_out, names.index(row.site)


# ------------------------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", [0.9, 0.8, 0.65, 0.5])
def test_a_budget_is_met_or_the_nearest_is(family, sites_of, target, method):
    sites = sites_of(family)
    plan = plan_or_nearest(sites, target, method=method)
    check_rows(plan, sites)
    assert plan.unmerge == (not sites.ending.prefix_only)
    assert plan.macs_original == sites.total_macs and plan.share == plan.macs / plan.macs_original
    if sites.ending.prefix_only:
        assert plan.rows[-1].action == "slice" and plan.rows[-1].tokens_out == sites[0].layout.prefix


@pytest.mark.parametrize("target", [0.9, 0.8, 0.65, 0.5])
def test_usual_targets_are_met_outright(family, sites_of, target):
    sites = sites_of(family)
    if target == 0.5 and not sites.ending.prefix_only:
        pytest.skip("bringing every token back costs")
    ltm.make_plan(sites, ltm.LTMConfig(flops=target))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(target=st.floats(0.02, 0.999), method=st.sampled_from(METHODS), full=st.booleans())
def test_any_target_is_met_or_the_nearest_is(sites_of, target, method, full):
    sites = sites_of("timm-deit")
    check_rows(plan_or_nearest(sites, target, method=method, output_tokens="full" if full else "auto"), sites)


def test_nearest_is_the_largest_below_else_the_smallest(sites_of):
    sites = sites_of("timm-vit")
    with pytest.raises(BudgetError) as impossible:
        ltm.make_plan(sites, ltm.LTMConfig(flops=0.01, scope="FLOW"))
    assert impossible.value.nearest > 0.01
    with pytest.raises(BudgetError) as lone:  # the slice alone saves more
        ltm.make_plan(sites, ltm.LTMConfig(flops=0.999, scope="FLOW"))
    assert lone.value.nearest < 0.999 - TOLERANCE
    for error in (impossible, lone):
        advised = float(str(error.value).split("Ask for flops=")[1].split()[0])
        assert ltm.make_plan(sites, ltm.LTMConfig(flops=advised, scope="FLOW")).share <= advised
        assert error.value.nearest <= advised < error.value.nearest + 1e-4, "four digits are enough to ask by"


def test_a_budget_error_crosses_processes():
    again = pickle.loads(pickle.dumps(BudgetError("no", 0.25)))
    assert again.nearest == 0.25 and str(again) == "no"


@pytest.mark.parametrize(
    "options, blocks",
    [
        pytest.param({"flops": 0.7, "schedule": "stages"}, (1, 3, 4), id="stages"),
        pytest.param({"flops": 0.7}, (0, 2, 3), id="auto"),
        pytest.param({"flops": 0.7, "schedule": "every"}, (0, 1, 2, 3, 4), id="every"),
        pytest.param({"tokens": (49, 40, 33)}, (1, 3, 4), id="auto-three-counts"),
        pytest.param({"tokens": (49, 33)}, (2, 4), id="auto-two-counts"),
        pytest.param({"tokens": (49, 33, 1)}, (2, 4), id="auto-two-counts-and-the-slice"),
        pytest.param({"tokens": (60, 55, 50, 45, 40)}, (0, 1, 2, 3, 4), id="auto-a-count-each"),
    ],
)
def test_which_blocks_merge_is_the_schedules_choice(sites_of, options, blocks):
    plan = ltm.make_plan(sites_of("timm-vit"), ltm.LTMConfig(**options))
    assert [row.site for row in plan.rows if row.action == "merge"] == [f"blocks.{block}" for block in blocks]
    assert {row.rounds for row in plan.rows if row.action == "merge"} == {3}


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_rounds_are_planned_and_counted(build, rounds):
    model = ltm.retrofit(build("timm-vit"), ltm.LTMConfig(flops=0.6, rounds=rounds))
    plan = ltm.get_plan(model)
    assert {row.rounds for row in plan.rows if row.action == "merge"} == {rounds}
    assert count_macs(model, torch.randn(1, 3, 32, 32)).total == plan.macs
    assert all(module.rounds == rounds for module in model.modules() if hasattr(module, "rounds"))


def test_where_the_schedule_cannot_meet_it_sites_are_added(sites_of):
    sites = sites_of("timm-vit")
    reach = []
    for names in (None, ("blocks.1", "blocks.3", "blocks.4")):
        with pytest.raises(BudgetError) as error:
            ltm.make_plan(sites, ltm.LTMConfig(flops=0.01, sites=names))
        reach.append(error.value.nearest)
    assert reach[0] < reach[1]
    plan = ltm.make_plan(sites, ltm.LTMConfig(flops=(reach[0] + reach[1]) / 2))
    assert {row.site for row in plan.rows} - {"blocks.1", "blocks.3", "blocks.4", "blocks.5"}


@pytest.mark.parametrize(
    "family, method, target, full",
    [
        ("timm-vit", "ltm", 0.8, "auto"),
        ("timm-vit", "tome", 0.6, "full"),
        ("timm-vit-avg-qknorm", "slice", 0.7, "auto"),
        ("hf-deit-teacher", "tome", 0.5, "auto"),
        ("hf-dinov2", "ltm", 0.6, "full"),
    ],
)
def test_predicted_macs_are_those_counted(build, family, method, target, full):
    model = build(family)
    sites = ltm.find_sites(model)
    plan = plan_or_nearest(sites, target, method=method, output_tokens=full)
    ltm.retrofit(model, plan=plan)
    assert count_macs(model, torch.randn(1, 3, 32, 32)).total == plan.macs


# -------------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("method", METHODS)
def test_given_counts_are_taken_exactly(sites_of, method):
    sites = sites_of("timm-vit")
    plan = ltm.make_plan(sites, ltm.LTMConfig(tokens=(49, 40, 33), method=method))
    assert plan.tokens == (49, 40, 33, 1)
    assert [row.site for row in plan.rows] == ["blocks.1", "blocks.3", "blocks.4", "blocks.5"]
    assert ltm.make_plan(sites, ltm.LTMConfig(tokens=plan.tokens, method=method)).rows == plan.rows
    every = ltm.make_plan(sites, ltm.LTMConfig(tokens=(60, 55, 50, 45, 40), method=method))
    assert every.tokens == (60, 55, 50, 45, 40, 1)
    assert [row.site for row in every.rows] == [f"blocks.{index}" for index in range(6)]
    assert ltm.make_plan(sites, ltm.LTMConfig(tokens=every.tokens, method=method)).rows == every.rows


def test_counts_that_merge_nothing_at_a_site_leave_it_alone(sites_of):
    plan = ltm.make_plan(sites_of("timm-vit"), ltm.LTMConfig(tokens=(65, 40, 40)))
    assert [(row.site, row.tokens_in, row.tokens_out) for row in plan.rows] == [
        ("blocks.3", 65, 40),
        ("blocks.5", 40, 1),
    ]


@pytest.mark.parametrize(
    "family, options, match",
    [
        pytest.param("timm-vit", {"tokens": (49, 40), "schedule": "stages"}, "2 counts; expected 3", id="too-few"),
        pytest.param("timm-vit", {"tokens": (66, 40, 33)}, "has 65 tokens", id="more-than-there-are"),
        pytest.param("timm-vit", {"tokens": (9,) * 6}, "6 counts; expected 5", id="too-many"),
        pytest.param("timm-vit", {"tokens": (49, 40, 1), "schedule": "stages"}, "2 counts", id="no-patch-left"),
        pytest.param("timm-vit", {"tokens": (49, 1, 1)}, "choose 2 to 49", id="no-patch-left-before-the-slice"),
        pytest.param("timm-dinov2", {"tokens": (49, 40, 4)}, "choose 6 to 40", id="prefix-cut"),
        pytest.param("timm-dinov2", {"tokens": (49, 40, 4), "method": "slice"}, "prefix", id="prefix-sliced"),
        pytest.param("hf-clip", {"tokens": (65, 65, 65)}, "merges nothing", id="nothing"),
    ],
)
def test_counts_that_do_not_fit_are_refused(sites_of, family, options, match):
    with pytest.raises(CountError, match=match):
        ltm.make_plan(sites_of(family), ltm.LTMConfig(**options))


# --------------------------------------------------------------------------------------------------------------- sites


def test_named_sites_are_the_only_ones(sites_of):
    sites = sites_of("timm-vit")
    plan = ltm.make_plan(sites, ltm.LTMConfig(flops=0.75, sites=("blocks.2", "blocks.0")))
    merging = [row.site for row in plan.rows if row.action == "merge"]
    assert set(merging) <= {"blocks.0", "blocks.2"} and merging == sorted(merging)
    counted = ltm.make_plan(sites, ltm.LTMConfig(tokens=(50, 30), sites=("blocks.2", "blocks.0")))
    assert [(row.site, row.tokens_out) for row in counted.rows][:2] == [("blocks.0", 50), ("blocks.2", 30)]


def test_an_unknown_site_is_refused_with_a_suggestion(sites_of):
    with pytest.raises(UnsupportedBlock, match=r"did you mean 'blocks\.3'"):
        ltm.make_plan(sites_of("timm-vit"), ltm.LTMConfig(flops=0.7, sites=("block.3",)))


def test_full_output_brings_every_token_back_and_costs_more(sites_of):
    sites = sites_of("timm-vit")
    auto = ltm.make_plan(sites, ltm.LTMConfig(tokens=(49, 40, 33)))
    full = ltm.make_plan(sites, ltm.LTMConfig(tokens=(49, 40, 33), output_tokens="full"))
    assert full.unmerge and not auto.unmerge and full.macs > auto.macs
    assert all(row.action == "merge" for row in full.rows)


def test_methods_cost_what_they_should(sites_of):
    macs = [
        ltm.make_plan(sites_of("hf-dinov2"), ltm.LTMConfig(tokens=(49, 40, 33), method=method)).macs
        for method in ("slice", "tome", "ltm")
    ]
    assert macs == sorted(macs) and len(set(macs)) == 3


# ---------------------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_survives_json(family, sites_of, method):
    plan = plan_or_nearest(sites_of(family), 0.7, method=method)
    again = MergePlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan and str(again) == str(plan) and again.config == plan.config


@pytest.mark.parametrize("where", ["plan", "row", "config"])
def test_an_unknown_key_is_refused_with_a_suggestion(sites_of, where):
    values = ltm.make_plan(sites_of("timm-vit"), ltm.LTMConfig(flops=0.7)).to_dict()
    target, key, close = {
        "plan": (values, "macss", "macs"),
        "row": (values["rows"][0], "token_in", "tokens_in"),
        "config": (values["config"], "methods", "method"),
    }[where]
    target[key] = 1
    with pytest.raises(RecipeError, match=f"unknown key '{key}'; did you mean '{close}'"):
        MergePlan.from_dict(values)


@pytest.mark.parametrize("lost", ["rows", "config", "macs", "classes"])
def test_a_missing_key_of_a_plan_is_a_recipe_error(sites_of, lost):
    values = ltm.make_plan(sites_of("timm-vit"), ltm.LTMConfig(flops=0.7)).to_dict()
    del values[lost]
    with pytest.raises(RecipeError, match=lost):
        MergePlan.from_dict(values)


def test_a_printed_plan_says_it_all(sites_of):
    plan = ltm.make_plan(sites_of("hf-dinov2"), ltm.LTMConfig(flops=0.7))
    text = str(plan)
    assert all(row.site in text and str(row.tokens_out) in text for row in plan.rows)
    assert "brought back" in text and f"×{plan.share:.3f}" in text


@pytest.mark.parametrize("other", ["hf-vit", "timm-dinov2", "timm-deit"])
def test_a_plan_for_another_model_is_refused(build, sites_of, other):
    plan, model = ltm.make_plan(sites_of("timm-vit"), ltm.LTMConfig(flops=0.7)), build(other)
    with pytest.raises(BaseMismatch):
        ltm.retrofit(model, plan=plan)
    assert not ltm.is_retrofitted(model)


# -------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({}, id="neither"),
        pytest.param({"flops": 0.5, "tokens": (3,)}, id="both"),
        *(pytest.param({"flops": value}, id=f"flops-{value}") for value in (0, 1, -0.1, True, "0.5", float("nan"))),
        *(pytest.param({"tokens": v}, id=f"tokens-{v}") for v in ((), (0,), (5, 6), (5.5,), "55", 5)),
        pytest.param({"flops": 0.5, "sites": "blocks.1"}, id="sites-string"),
        pytest.param({"flops": 0.5, "sites": ()}, id="no-sites"),
        pytest.param({"flops": 0.5, "sites": (1,)}, id="sites-number"),
        *(
            pytest.param({"flops": 0.5, key: "none"}, id=key)
            for key in ("method", "schedule", "scope", "output_tokens")
        ),
    ],
)
def test_values_that_cannot_be_are_refused(values):
    with pytest.raises(RecipeError):
        ltm.LTMConfig(**values)


def test_a_config_is_frozen_and_survives_json():
    config = ltm.LTMConfig(tokens=[30, 20], sites=["a", "b"], method="tome")
    assert config.tokens == (30, 20) and ltm.LTMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(AttributeError):
        config.flops = 0.5
    with pytest.raises(RecipeError, match="did you mean 'flops'"):
        ltm.LTMConfig.from_dict({"flop": 0.5})


# ----------------------------------------------------------------------------------------------- what is surely lost


def test_a_plan_that_leaves_too_few_tokens_warns(sites_of) -> None:
    with pytest.warns(
        UserWarning, match=r"of 65 tokens only 6 are left after blocks\.3: .*Keep a larger share, flops="
    ):
        ltm.make_plan(
            sites_of("timm-vit"), ltm.LTMConfig(tokens=(40, 20, 6), sites=("blocks.1", "blocks.2", "blocks.3"))
        )


def test_other_plans_do_not_warn(sites_of, recwarn: pytest.WarningsRecorder) -> None:
    sites = sites_of("timm-vit")
    ltm.make_plan(sites, ltm.LTMConfig(tokens=(40, 20, 7), sites=("blocks.1", "blocks.2", "blocks.3")))
    ltm.make_plan(sites, ltm.LTMConfig(flops=0.5))  # whose last row slices to the class token, which is exact
    assert not [one for one in recwarn if "tokens only" in str(one.message)]
