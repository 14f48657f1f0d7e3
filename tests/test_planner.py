"""Plans by measurement: calibrated on images, or for a time; another budget; files."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import make
from conversions import call, converted, equal, slow_but
from torch import Tensor, nn
from zoo import ZOO

import ltm_retrofit as ltm
from ltm_retrofit import calibrate, planner
from ltm_retrofit.calibrate import Differ, Passes
from ltm_retrofit.converted.record import masks_of
from ltm_retrofit.finding.sites import Sites
from ltm_retrofit.macs import count_macs
from ltm_retrofit.plan import plan_of, read_plan, recounted
from ltm_retrofit.undisturbed import undisturbed

torch.set_num_threads(1)
CALIBRATED = ltm.LTMConfig(flops=0.75, schedule="calibrated")


@pytest.fixture
def many() -> Tensor:
    return torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@functools.cache
def sites_of(family: str) -> Sites:
    """Return the sites of a family's model, which hold no module, found once."""
    return ltm.find_sites(make(family))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


# ---------------------------------------------------------------------------------------------------------- calibrated


@pytest.mark.parametrize("family", slow_but(["timm-vit", "hf-vit"], ["timm-vit", "timm-dinov2", "hf-vit", "hf-clip"]))
def test_a_calibrated_plan_changes_the_answers_no_more_than_the_schedule(
    family: str, build: Callable[..., nn.Module], many: Tensor
) -> None:
    model = build(family)
    before, modules = state_of(model), [(name, dict(module.__dict__)) for name, module in model.named_modules()]
    random = torch.random.get_rng_state()
    sites = sites_of(family)
    plan = ltm.make_plan(sites, CALIBRATED, model=model, images=many)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [(name, module.__dict__.keys()) for name, module in model.named_modules()] == [
        (name, now.keys()) for name, now in modules
    ]
    assert 0.73 <= plan.share <= 0.75 and plan.measured["images"] == 12
    assert 0 < plan.measured["difference"] <= plan.measured["difference of auto"]

    with undisturbed(model), torch.no_grad():
        auto = ltm.make_plan(sites, ltm.LTMConfig(flops=0.75))
        answers = Passes(model, sites, CALIBRATED, many)
        assert answers.differ(auto.rows).mean == plan.measured["difference of auto"]
        assert answers.differ(plan.rows).mean == plan.measured["difference"]
    images = {"pixel_values": many[:1]} if family.startswith("hf") else many[:1]
    ltm.retrofit(model, plan=plan)
    assert count_macs(model, images).total == plan.macs


@pytest.mark.parametrize("name, flops", [("timm-swin", 0.9), ("timm-efficientvit-mit-b", 0.85)])
def test_where_tokens_do_not_stay_merged_whole_plans_are_compared(name: str, flops: float) -> None:
    model, example = ZOO[name]()
    assert isinstance(example, Tensor)
    images = torch.randn(8, *example.shape[1:], generator=torch.Generator().manual_seed(1))
    config = ltm.LTMConfig(flops=flops, schedule="calibrated")
    plan = ltm.make_plan(ltm.find_sites(model, example), config, model=model, images=images)
    assert plan.measured["difference"] <= plan.measured["difference of auto"] and plan.share <= flops


def test_answers_are_those_of_the_converted_model(build: Callable[..., nn.Module], many: Tensor) -> None:
    """Blocks that were not run again, and masks without guards, change nothing."""
    model = build("timm-vit")
    sites = sites_of("timm-vit")
    plan = ltm.make_plan(sites, ltm.LTMConfig(tokens=(12, 9), sites=("blocks.3", "blocks.4")))
    with undisturbed(model), torch.no_grad():
        differ = Passes(model, sites, plan.config, many).differ(plan.rows)
        before = model(many).log_softmax(1)
    after = ltm.retrofit(model, plan=plan)(many).log_softmax(1).detach()
    by = (before.exp() * (before - after)).sum(1)
    torch.testing.assert_close(differ.by, by, rtol=1e-4, atol=1e-7)
    assert torch.equal(differ.other, before.argmax(1) != after.argmax(1))


def test_what_merges_before_a_site_in_another_scope_counts_too(build: Callable[..., nn.Module], many: Tensor) -> None:
    """Blocks that scope FLOW cannot cut merge in LOCAL, also before its first site."""
    model, sites = build("timm-vit"), sites_of("timm-vit")
    sites = replace(sites, found=sites.found[1:])  # as if FLOW could not cut the first one
    config = ltm.LTMConfig(flops=0.9, scope="LOCAL")
    local = ltm.make_plan(sites, config).rows[:1]
    flow = ltm.make_plan(sites, ltm.LTMConfig(tokens=(40,), sites=("blocks.3",))).rows
    plan = plan_of(sites, replace(config, scope=None), (*local, *flow))
    assert [row.scope for row in plan.rows][:2] == ["LOCAL", "FLOW"]
    with undisturbed(model), torch.no_grad():
        differ = Passes(model, sites, plan.config, many).differ(plan.rows)
        before = model(many).log_softmax(1)
    after = ltm.retrofit(model, plan=plan)(many).log_softmax(1).detach()
    torch.testing.assert_close(differ.by, (before.exp() * (before - after)).sum(1), rtol=1e-4, atol=1e-7)


def test_images_that_say_nothing_are_refused(build: Callable[..., nn.Module]) -> None:
    model, given = build("timm-vit"), torch.zeros
    for images, message in (
        (None, "16 to 64 images without labels"),
        (given(16, 3, 64, 64), r"tensor \(n, 3, 32, 32\).*got \[\(16, 3, 64, 64\)\]"),
        (given(16, 1, 32, 32), r"got \[\(16, 1, 32, 32\)\]"),
        (given(3, 3, 32, 32), "3 images are too few"),
        ({"pixels": 3}, "got dict"),
    ):
        with pytest.raises(ltm.RecipeError, match=message):
            ltm.make_plan(sites_of("timm-vit"), CALIBRATED, model=model, images=images)  # type: ignore[arg-type]
    with pytest.raises(ltm.RecipeError, match="16 to 64 images without labels"):
        ltm.retrofit(model, CALIBRATED)
    assert not ltm.is_retrofitted(model)


def test_images_that_nothing_is_measured_on_are_refused(build: Callable[..., nn.Module], many: Tensor) -> None:
    model = build("timm-vit")
    for config in (None, ltm.LTMConfig(flops=0.75)):
        with pytest.raises(ltm.RecipeError, match=r"images are what .*schedule='calibrated'.* measures on"):
            ltm.retrofit(model, config, images=many)
    assert not ltm.is_retrofitted(model)


@pytest.mark.parametrize(("spread", "kept"), [(0.1, False), (4.0, True)], ids=["clear", "noise"])
def test_a_plan_has_to_be_clearly_better_than_the_schedule(
    spread: float, kept: bool, build: Callable[..., nn.Module], many: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other plan seems better by 1 ± spread on an image; 12 images tell the first from noise, not the second."""
    sites, model = sites_of("timm-vit"), build("timm-vit")
    auto = ltm.make_plan(sites, ltm.LTMConfig(flops=0.75)).rows
    noise = torch.tensor([-1.0, 1.0]).repeat(6) * spread

    def differ(_passes: Passes, rows: tuple) -> Differ:
        by = torch.full((12,), 9.0) if tuple(rows) == tuple(auto) else 8 + noise
        return Differ(by, torch.zeros(12, dtype=torch.bool))

    monkeypatch.setattr(Passes, "differ", differ)
    plan = ltm.make_plan(sites, CALIBRATED, model=model, images=many)
    assert (plan.rows == auto) is kept


def test_what_cannot_be_measured_is_refused(build: Callable[..., nn.Module], many: Tensor) -> None:
    model, sites = build("timm-vit"), sites_of("timm-vit")
    with pytest.raises(ltm.RecipeError, match="chooses the token counts itself"):
        ltm.make_plan(sites, ltm.LTMConfig(tokens=(12,), schedule="calibrated"), model=model, images=many)
    with pytest.raises(ltm.RecipeError, match="latency is measured: pass the model"):
        ltm.make_plan(sites, ltm.LTMConfig(latency=0.8))
    with pytest.raises(ltm.RecipeError, match="exactly one of flops, latency and tokens"):
        ltm.LTMConfig(flops=0.5, latency=0.5)
    with pytest.raises(ltm.UnsupportedBlock, match="before its conversion"):
        ltm.make_plan(sites, CALIBRATED, model=ltm.retrofit(model), images=many)


def test_a_budget_that_costs_the_answers_is_said_aloud(
    build: Callable[..., nn.Module], many: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "LOST", 0.1)
    model = build("timm-vit")
    with torch.no_grad():  # answers that hang on what is different in each image
        model.head.bias -= model(many).mean(0)
    config = replace(CALIBRATED, flops=0.35)
    with pytest.warns(UserWarning, match="recognised as another class.*Ask for a larger share"):
        plan = ltm.make_plan(sites_of("timm-vit"), config, model=model, images=many)
    assert plan.measured["other answers"] > 0.1


# ------------------------------------------------------------------------------------------------------------- latency


def timing_by(monkeypatch: pytest.MonkeyPatch, time_of: Callable[[float], float], noise: float = 0.005) -> list[float]:
    """Let a plan's time be a function of its share of MACs: a machine as quiet as no machine is."""
    asked: list[float] = []

    def timed(_model: nn.Module, _sites: object, plan: ltm.MergePlan, _example: object) -> tuple[float, float]:
        asked.append(plan.share)
        return time_of(plan.share), noise

    monkeypatch.setattr(planner, "timed", timed)
    return asked


@pytest.mark.parametrize("overhead", [0.0, 0.08, 0.2])
@pytest.mark.parametrize("target", [0.9, 0.75, 0.65])
def test_a_time_is_met_by_the_plan_just_below_it(
    target: float, overhead: float, build: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = timing_by(monkeypatch, lambda share: overhead + (1 - overhead) * share)
    model = build("timm-vit")
    config = ltm.LTMConfig(latency=target, latency_batch=2)
    plan = ltm.make_plan(sites_of("timm-vit"), config, model=model)
    assert target - 0.06 <= plan.measured["latency"] <= target and len(asked) <= planner.TIMINGS
    assert plan.config == config and ltm.MergePlan.from_dict(plan.to_dict()) == plan
    assert ltm.get_plan(ltm.retrofit(model, plan=plan)) == plan


def test_a_time_that_cannot_be_is_refused_with_the_fastest(
    build: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    timing_by(monkeypatch, lambda share: 0.9 + 0.1 * share)
    model = build("timm-vit")
    with pytest.raises(ltm.BudgetError, match=r"latency=0.5 cannot be met: the fastest .* takes 0\.9") as error:
        ltm.make_plan(sites_of("timm-vit"), ltm.LTMConfig(latency=0.5), model=model)
    assert 0.9 < error.value.nearest < 1


def test_noise_that_hides_the_time_is_refused_with_the_noise(
    build: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = iter(range(10**6))

    def alternated(ways: object, device: object, rounds: int) -> list[list[float]]:
        return [[1.0, 0.4 + 0.3 * (number % 5)] for number in islice(numbers, rounds)]

    monkeypatch.setattr(planner, "alternated", alternated)
    model = build("timm-vit")
    with pytest.raises(ltm.RecipeError, match=r"too noisy.* after 36 pairs .* 1\.000 ± 0\.0[0-9]+"):
        ltm.make_plan(sites_of("timm-vit"), ltm.LTMConfig(latency=0.8), model=model)
    assert not ltm.is_retrofitted(model)


def test_both_ways_are_timed_and_the_model_is_left_alone(
    build: Callable[..., nn.Module], many: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "NOISE", 10.0)  # this machine is what it is
    model = build("timm-vit").train()
    sites = sites_of("timm-vit")
    keys = list(model.state_dict())
    ratio, noise = planner.timed(model, sites, ltm.make_plan(sites, ltm.LTMConfig(flops=0.7)), many[:2])
    assert ratio > 0 and noise >= 0
    assert list(model.state_dict()) == keys and model.training and not ltm.is_retrofitted(model)


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_plan_is_read_as_it_was_written(suffix: str, build: Callable[..., nn.Module], tmp_path: Path) -> None:
    plan = ltm.make_plan(sites_of("hf-dinov2"), ltm.LTMConfig(flops=0.7))
    plan.write(tmp_path / f"plan.{suffix}")
    assert read_plan(tmp_path / f"plan.{suffix}") == plan and plan.diff(plan) == ""


def test_edited_rows_decide_and_what_follows_is_counted(build: Callable[..., nn.Module], many: Tensor) -> None:
    model = build("timm-vit")
    sites = sites_of("timm-vit")
    plan = ltm.make_plan(sites, ltm.LTMConfig(tokens=(14, 12, 9), sites=("blocks.0", "blocks.2", "blocks.3")))
    values = plan.to_dict()
    values["rows"][0]["tokens_out"] = 13  # and the row behind still says that 14 arrive
    edited = recounted(ltm.MergePlan.from_dict(values), sites)
    assert [(row.tokens_in, row.tokens_out) for row in edited.rows] == [(65, 13), (13, 12), (12, 9), (9, 1)]
    assert count_macs(ltm.retrofit(model, plan=edited), many[:1]).total == edited.macs < plan.macs
    assert plan.diff(edited).splitlines()[:2] == ["blocks.0: 65 → 14 | 65 → 13", "blocks.2: 14 → 12 | 13 → 12"]


def test_an_edited_row_that_cannot_be_is_named_with_what_can(build: Callable[..., nn.Module]) -> None:
    sites = sites_of("timm-vit")
    values = ltm.make_plan(sites, ltm.LTMConfig(tokens=(14, 12), sites=("blocks.0", "blocks.2"))).to_dict()
    values["rows"][1]["tokens_out"] = 16
    with pytest.raises(ltm.CountError, match=r"blocks\.2: 14 tokens arrive, so 16 cannot be left"):
        recounted(ltm.MergePlan.from_dict(values), sites)


# ------------------------------------------------------------------------------------------------------ another budget


def milder(model: nn.Module, plan: ltm.MergePlan) -> ltm.LTMConfig:
    """Return a config for a budget between a plan's and the original's, or the nearest that can be."""
    config = replace(plan.config, flops=(1 + plan.share) / 2, tokens=None)
    try:
        ltm.replan(copy.deepcopy(model), config)
    except ltm.BudgetError as error:
        return replace(config, flops=error.nearest)
    return config


@pytest.mark.parametrize("host", ["timm-vit-flow", "hf-vit-flow", "timm-vit-local", "timm-efficientvit-grid"])
def test_another_budget_is_what_converting_anew_gives_and_masks_keep_what_they_learned(host: str) -> None:
    model, _, example = converted(host)
    first = ltm.get_plan(model)
    other = milder(model, first)
    for mask in masks_of(model).values():
        for parameter in mask.parameters():
            parameter.data += 0.5  # as if it had learned
    learned = {site: {k: v.clone() for k, v in mask.state_dict().items()} for site, mask in masks_of(model).items()}
    assert ltm.replan(model, other) is model
    plan, again = ltm.get_plan(model), ltm.get_plan(model)
    assert plan.macs > first.macs and plan.share <= other.flops and again == plan
    kept = masks_of(model).keys() & learned.keys()
    assert kept
    for site in kept:
        for key, value in masks_of(model)[site].state_dict().items():
            assert torch.equal(value, learned[site][key]) or value.shape != learned[site][key].shape
    ltm.restore(model)
    ltm.retrofit(model, plan=plan)
    assert count_macs(model, example).total == plan.macs


@pytest.mark.slow
def test_a_budget_that_cannot_be_leaves_the_model_as_it_was(build: Callable[..., nn.Module], many: Tensor) -> None:
    model = ltm.retrofit(build("timm-vit"), ltm.LTMConfig(flops=0.7, output_tokens="full"))
    for mask in masks_of(model).values():
        for parameter in mask.parameters():
            parameter.data *= 1.5
    plan, before, state = ltm.get_plan(model), model(many), state_of(model)
    for config in (ltm.LTMConfig(flops=0.001), ltm.LTMConfig(flops=0.5, schedule="calibrated")):
        with pytest.raises((ltm.BudgetError, ltm.RecipeError)):
            ltm.replan(model, config)
        assert ltm.get_plan(model) == plan and torch.equal(model(many), before)
        assert model.state_dict().keys() == state.keys()
    assert ltm.is_retrofitted(ltm.replan(model, ltm.LTMConfig(flops=0.8)))


@pytest.mark.parametrize("family", ["timm-vit", "hf-vit"])
def test_a_folder_is_loaded_at_another_budget(family: str, build: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = ltm.retrofit(build(family), ltm.LTMConfig(flops=0.8))
    ltm.save_pretrained(model, tmp_path / "folder")
    loaded = ltm.from_pretrained(tmp_path / "folder", flops=0.65)
    assert ltm.get_plan(loaded).share <= 0.65
    ltm.save_pretrained(loaded, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["plan"]["config"]["flops"] == 0.65
    example = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        again = call(ltm.from_pretrained(tmp_path / "again"), example)
        assert equal(again, call(ltm.replan(model, ltm.LTMConfig(flops=0.65)), example))
    with pytest.raises(ltm.BudgetError):
        ltm.from_pretrained(tmp_path / "folder", flops=0.01)


def test_a_folder_that_images_chose_takes_another_budget_by_rule_and_says_so(
    build: Callable[..., nn.Module], many: Tensor, tmp_path: Path
) -> None:
    model = ltm.retrofit(build("timm-vit"), ltm.LTMConfig(flops=0.8, schedule="calibrated"), images=many)
    ltm.save_pretrained(model, tmp_path / "folder")
    with pytest.warns(UserWarning, match=r"'auto' plans for flops=0\.65.*schedule='calibrated'"):
        loaded = ltm.from_pretrained(tmp_path / "folder", flops=0.65)
    assert ltm.get_plan(loaded).config == ltm.LTMConfig(flops=0.65)


def test_plan_of_counts_what_rows_cost(build: Callable[..., nn.Module]) -> None:
    sites = sites_of("timm-vit")
    plan = ltm.make_plan(sites, ltm.LTMConfig(flops=0.7))
    assert plan_of(sites, plan.config, plan.rows) == plan
