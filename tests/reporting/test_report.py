"""measure: what was counted is what is said, in every form; what was not measured is None; nothing is changed."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import time

import pytest
import torch
from torch import nn

import ltm_retrofit as ltm
from ltm_retrofit import scopes
from ltm_retrofit.converted.record import mark_finetuned
from ltm_retrofit.errors import CountError, DataError
from ltm_retrofit.finding.example import prepare_example, repeat_batch
from ltm_retrofit.macs import count_macs
from ltm_retrofit.reporting import bench, report
from ltm_retrofit.reporting.bench import batch_latencies, paired_latency
from ltm_retrofit.reporting.report import ACCURACIES

SOME = ["timm-vit", "hf-dinov2", "hf-clip"]
KEYS = {"model", "hardware", "macs", "params", "latency_ms", "latency_ratio", "merging_share", "accuracy", "modules"}
KEYS |= {"plan", "memory_mb", "answers", "left_out"}


def state(model: nn.Module) -> list:
    tensors = [(key, value.clone()) for key, value in model.state_dict().items()]
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    return [tensors, hooks, [module.training for module in model.modules()], torch.get_rng_state()]


def assert_same_state(model: nn.Module, before: list) -> None:
    tensors, hooks, flags, random = state(model)
    assert [key for key, _ in tensors] == [key for key, _ in before[0]]
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(tensors, before[0], strict=True))
    assert (hooks, flags) == (before[1], before[2]) and torch.equal(random, before[3])


# ------------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("name", SOME)
def test_converted_model(name: str, build, converted) -> None:
    model, original = converted(name), build(name)
    model.train()
    before = state(model)
    found = ltm.measure(model, batches=())
    assert_same_state(model, before)
    example = prepare_example(original, None)
    assert found.macs == {
        "original": count_macs(original, example).total,
        "converted": count_macs(copy.deepcopy(model).eval(), example).total,
    }
    assert all(type(value) is int for value in found.macs.values())
    assert found.macs["converted"] == ltm.get_plan(model).macs < found.macs["original"]
    assert found.params == {
        "original": sum(parameter.numel() for parameter in original.parameters()),
        "converted": sum(parameter.numel() for parameter in model.parameters()),
    }
    assert found.params["converted"] > found.params["original"]
    assert found.plan == ltm.get_plan(model).to_dict()
    for which in ("original", "converted"):
        assert found.modules[which][""] == found.macs[which]
        assert all(value > 0 for value in found.modules[which].values())
    assert any(".ltm" in key for key in found.modules["converted"])
    assert not any("ltm" in key for key in found.modules["original"])


@pytest.mark.parametrize("name", ["timm-vit", "hf-clip"])
def test_unconverted_model_has_no_converted_entries(name: str, build) -> None:
    model = build(name)
    before = state(model)
    found = ltm.measure(model, batches=(1,), rounds=2)
    assert_same_state(model, before)
    assert found.macs["original"] == count_macs(model, prepare_example(model, None)).total
    for entries in (found.macs, found.params, found.latency_ms, found.modules):
        assert set(entries) == {"original", "converted"}
        assert entries["converted"] is None and entries["original"]
    assert found.plan is found.latency_ratio is found.merging_share is None
    assert "—" in str(found)


@pytest.mark.parametrize("method", ["tome", "slice"])
def test_other_methods_have_no_parameters_of_their_own(method: str, converted) -> None:
    found = ltm.measure(converted("timm-vit", method), batches=())
    assert found.params["converted"] == found.params["original"]
    assert found.macs["converted"] < found.macs["original"]


def test_an_example_of_ones_own_is_counted_as_one_image(converted) -> None:
    model = converted("timm-vit")
    assert ltm.measure(model, torch.randn(4, 3, 32, 32), batches=()).macs == ltm.measure(model, batches=()).macs


def test_a_plan_that_predicts_other_macs_is_an_error(converted) -> None:
    model = converted("timm-vit")
    model.ltm.plan = dataclasses.replace(model.ltm.plan, macs=model.ltm.plan.macs + 1)
    before = state(model)
    with pytest.raises(
        CountError, match=rf"predicts {model.ltm.plan.macs:,} MACs and {model.ltm.plan.macs - 1:,}.*images of 32×32\."
    ):
        ltm.measure(model, batches=())
    assert_same_state(model, before)


# ------------------------------------------------------------------------------------------------------------ accuracy


@pytest.mark.parametrize(
    ("convert", "finetuned", "entries"),
    [
        (None, False, ["original"]),
        (None, True, ["original_finetuned"]),
        ("ltm", False, ["original", "converted"]),
        ("ltm", True, ["finetuned"]),
        ("tome", True, ["finetuned"]),
        ("slice", False, ["original", "converted"]),
        ("slice", True, ["sliced_finetuned"]),
    ],
)
def test_accuracies_are_those_of_the_versions_at_hand(convert, finetuned, entries, build, converted, pictures) -> None:
    model = build("timm-vit") if convert is None else converted("timm-vit", convert)
    if finetuned:
        mark_finetuned(model)
    data = pictures(14)
    accuracy = ltm.measure(model, data=data, batches=()).accuracy
    assert set(accuracy) == set(ACCURACIES)
    assert [name for name, value in accuracy.items() if value is not None] == entries
    assert accuracy[entries[-1]] == ltm.evaluate(model, data)
    if entries[0] == "original":
        assert accuracy["original"] == ltm.evaluate(build("timm-vit"), data)


def test_no_data_no_accuracy_and_zero_is_a_measurement(build, pictures) -> None:
    model = build("timm-vit")
    found = ltm.measure(model, batches=())
    assert set(found.accuracy.values()) == {None} and "top-1" not in str(found)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([1.0, 0, 0, 0, 0, 0, 0]))
    wrong = [(torch.zeros(3, 3, 32, 32), torch.tensor([1, 2, 3]))]
    found = ltm.measure(model, data=wrong, batches=())
    assert found.accuracy["original"] == 0.0 and "0.00 %" in str(found)


def test_finetuned_then_restored_is_never_the_original(converted, pictures) -> None:
    model = converted("timm-vit", "tome")
    ltm.finetune(model, pictures(14), config=ltm.TrainConfig(held_out=0.0))
    accuracy = ltm.measure(ltm.restore(model), data=pictures(14), batches=()).accuracy
    assert accuracy["original"] is None and accuracy["original_finetuned"] is not None


def test_data_that_does_not_fit_is_refused(build, pictures) -> None:
    with pytest.raises(DataError, match="outside the model's 7 classes"):
        ltm.measure(build("timm-vit"), data=pictures(18, classes=9), batches=())


# --------------------------------------------------------------------------------------------------------- what it says


_MEASURED: list[report.Report] = []


@pytest.fixture
def whole(converted) -> report.Report:
    if not _MEASURED:
        _MEASURED.append(ltm.measure(converted("timm-vit"), batches=(1, 2), rounds=3))
    (found,) = _MEASURED
    accuracies = {"original": 91.25, "original_finetuned": 92.5, "converted": 60.0, "finetuned": 92.0}
    return dataclasses.replace(found.with_accuracy(**accuracies), extra={"recipe": {"model": {"name": "x"}}})


def test_dictionary_has_the_documented_keys(whole) -> None:
    values = whole.to_dict()
    assert set(values) == KEYS | {"recipe"}, "what a recipe adds stands beside the rest"
    assert values["recipe"] == {"model": {"name": "x"}}
    for name in ("macs", "params", "latency_ms", "modules"):
        assert set(values[name]) == {"original", "converted"}
    assert set(values["latency_ms"]["original"]) == set(values["latency_ms"]["converted"]) == {1, 2}
    assert set(values["accuracy"]) == {
        "original", "original_finetuned", "converted", "finetuned", "sliced_finetuned",
    }  # fmt: skip
    assert values["accuracy"]["sliced_finetuned"] is None
    assert set(dataclasses.replace(whole, extra={}).to_dict()) == KEYS


def test_a_recipe_cannot_overwrite_what_was_measured(whole) -> None:
    assert dataclasses.replace(whole, extra={"macs": 0}).to_dict()["macs"] == whole.macs


def test_json_is_strict_and_says_the_same(whole) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    values = json.loads(whole.to_json(), parse_constant=refuse)
    expected = whole.to_dict()
    assert values["macs"] == expected["macs"] and values["plan"] == json.loads(json.dumps(expected["plan"]))
    assert values["accuracy"] == expected["accuracy"]
    assert values["latency_ms"]["converted"] == {str(k): v for k, v in expected["latency_ms"]["converted"].items()}


def test_text_and_markdown_hold_the_numbers(whole) -> None:
    original, converted = whole.macs["original"], whole.macs["converted"]
    for text in (str(whole), whole.to_markdown()):
        assert f"{original / 1e9:.4g}" in text and f"{converted / 1e9:.4g}" in text
        assert f"×{converted / original:.3f}" in text
        assert f"{whole.params['original'] / 1e6:.4g}" in text and f"{whole.params['converted'] / 1e6:.4g}" in text
        for batch in (1, 2):
            for which in ("original", "converted"):
                line = next(line for line in text.splitlines() if f"batch {batch}, ms" in line)
                assert f"{whole.latency_ms[which][batch]:.1f}" in line
            assert "×{:.2f} ({:.2f} to {:.2f})".format(*whole.latency_ratio[batch]) in line
        assert "91.25 %" in text and "92.50 %" in text and "60.00 %" in text
        assert re.search(r"converted, fine-tuned.*92\.00 %.*-0\.50", text), "the gap is to the better original"
        assert "sliced" not in text, "not measured"


def test_markdown_tables_are_tables(whole) -> None:
    tables = [block.splitlines() for block in whole.to_markdown().split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        assert set(table[1]) == {"|", "-"}
        assert len({line.count("|") for line in table}) == 1
    for row in whole.plan["rows"]:
        assert f"| {row['site']} | {row['scope']} | {row['tokens_in']} → {row['tokens_out']} |" in whole.to_markdown()


def test_text_columns_line_up(whole) -> None:
    table = str(whole).split("\n\n")[1].splitlines()
    assert len({line.rfind(" ms") for line in table if "latency" in line}) <= 1
    ends = {re.match(r".*?\s{2,}(\S+)", line[20:]).end(1) for line in table[1:]}
    assert len(ends) == 1


# ----------------------------------------------------------------------------------------------------------------- time


def test_paired_latency_is_sane(converted) -> None:
    model, example = converted("timm-vit"), torch.randn(2, 3, 32, 32)
    before = state(model)
    paired = paired_latency(model, example, rounds=8)
    assert_same_state(model, before)
    middle, low, high = paired.ratio
    assert 0 < low <= middle <= high
    assert paired.original > 0 and paired.converted > 0
    assert 0 < paired.merging < 1


def test_the_two_paths_are_timed_each_with_its_own_clock(converted, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is made to run by itself: 3 s for the original's pass, 6 s for the converted one's."""
    model, clock = converted("timm-vit"), [0.0]

    def run(timed: nn.Module, example: torch.Tensor) -> None:
        first = next(ltm.convert.forwards_of(timed))
        clock[0] += 3.0 if first.mode == "original" else 6.0

    for room in (scopes, bench):
        monkeypatch.setattr(room, "run", run)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    paired = paired_latency(model, torch.zeros(1), rounds=4)
    assert (paired.original, paired.converted) == (3000.0, 6000.0)
    assert paired.ratio == (2.0, 2.0, 2.0)


def test_merging_share_is_the_masks_share(converted, monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted("timm-vit")
    few = paired_latency(model, torch.randn(1, 3, 32, 32), rounds=4).merging
    for module in [module for name, module in model.named_modules() if name.endswith(".ltm")]:
        module.register_forward_pre_hook(lambda *_: None)
        forward = module.forward

        def slow(*args, forward=forward, **more):
            time.sleep(0.02)
            return forward(*args, **more)

        monkeypatch.setattr(module, "forward", slow)
    many = paired_latency(model, torch.randn(1, 3, 32, 32), rounds=4).merging
    assert few < many < 1 and many > 0.5


def test_latency_entries_by_batch_size(whole) -> None:
    assert list(whole.latency_ms["original"]) == list(whole.latency_ms["converted"]) == [1, 2]
    assert all(value > 0 for times in whole.latency_ms.values() for value in times.values())
    assert set(whole.merging_share) == {1, 2} and all(0 < share < 1 for share in whole.merging_share.values())


def test_no_batches_no_latency(build) -> None:
    found = ltm.measure(build("timm-vit"), batches=())
    assert found.latency_ms == {"original": None, "converted": None} and "latency" not in str(found)


def test_a_single_round_has_quartiles_too(converted) -> None:
    middle, low, high = paired_latency(converted("timm-vit"), torch.randn(1, 3, 32, 32), rounds=1).ratio
    assert low == middle == high > 0


def test_examples_are_repeated_to_a_batch() -> None:
    image, flag = torch.randn(1, 3, 4, 4), object()
    repeated = repeat_batch({"pixel_values": image, "flag": flag}, 3)
    assert repeated["flag"] is flag and torch.equal(repeated["pixel_values"], image.expand(3, 3, 4, 4))
    assert torch.equal(repeat_batch(torch.cat([image, image + 1]), 2), image.expand(2, 3, 4, 4)), "the first image"


# ---------------------------------------------------------------------------------------------------- how long it takes


def test_timing_ends_when_its_seconds_are_over(build, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is made to run by itself: a second for each image."""
    clock = [0.0]

    def run(timed: nn.Module, example: torch.Tensor) -> None:
        clock[0] += len(example)

    monkeypatch.setattr(scopes, "run", run)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    said: list[str] = []
    found, left_out = batch_latencies(
        build("timm-vit"), torch.zeros(1, 3, 8, 8), (32, 1, 2), rounds=50, seconds=40, say=said.append
    )
    assert {batch: paired.original for batch, paired in found.items()} == {1: 1000.0, 2: 2000.0} and clock[0] <= 40
    assert [line.split(":")[0] for line in said] == ["latency, batch 1", "latency, batch 2", left_out[0].split(":")[0]]
    assert re.search(
        r"batches of 32 were not timed: it would take some 128 s more, and timing has \d+ s left of 40", *left_out
    )


def test_results_are_said_as_they_come(converted, pictures) -> None:
    said: list[str] = []
    found = ltm.measure(converted("timm-vit"), data=pictures(14), batches=(2, 1), rounds=1, say=said.append)
    assert [line.split(":")[0] for line in said] == [
        "GMACs of one image",
        "latency, batch 1",
        "latency, batch 2",
        "top-1",
    ]
    assert found.left_out == [] and 0 < found.memory_mb["converted"] <= found.memory_mb["original"]
