"""What is logged of every epoch: the information that the feature keeps."""

from __future__ import annotations

import conversions
import pytest
import torch
from pieces import batches
from torch import nn

import ltm_retrofit as ltm
from ltm_retrofit.merging import ib
from ltm_retrofit.tuning.objective import Information, entrances_of

MANY = batches(50, 7)


def test_the_information_of_every_epoch_is_logged(converted) -> None:
    history = ltm.finetune(converted("timm-vit"), MANY, config=ltm.TrainConfig(epochs=2, batch_size=7, lr=1e-3))
    for entry in history.epochs:
        assert entry["ib"] == pytest.approx(entry["i_input"] - entry["i_label"])
        assert 0 <= entry["i_label"] <= torch.tensor(7.0).log() + 1e-6
        assert 1 <= entry["perplexity"] <= 64 and entry["i_input"] >= 0
        assert 0 <= entry["waiting"] <= entry["seconds"]
    first, last = history.epochs
    assert last["i_label"] > first["i_label"], "the feature learns the class"


def test_there_is_no_information_before_a_fit_or_without_a_mask(converted) -> None:
    for method, count in (("ltm", 2), ("slice", 50)):
        history = ltm.finetune(converted("timm-vit", method), batches(count), config=ltm.TrainConfig(batch_size=7))
        assert "ib" not in history.epochs[-1]


def test_the_estimate_is_that_of_the_definitions(converted) -> None:
    model = converted("timm-vit").train()
    information = Information(model)
    inputs: list[torch.Tensor] = []
    other = model.blocks[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0].mean(dim=1)))
    features, targets = [], []
    for images, labels in MANY:
        with torch.no_grad(), information.listening(), ltm.trace(model) as traced:
            model(images)
            ltm.bound_loss(traced, labels)
        targets.append(ib.soft_targets(labels, 7))
        information.add(traced, targets[-1])
        features.append(traced.feature)
    other.remove()
    statistics = model.ltm.readout
    x, z, y = torch.cat(inputs), torch.cat(features), torch.cat(targets)
    places = ib.kmeans(x, 64, generator=torch.Generator().manual_seed(0))
    phi_x = ib.log_assign(x, places, ib.beta_for_perplexity(x, places, statistics.target_perplexity)).exp()
    phi = ib.log_assign(z, statistics.centroids, statistics.beta).exp()
    found = information.estimate()
    assert found["ib"] == pytest.approx(ib.information_bottleneck(phi, phi_x, y).item(), abs=1e-5)
    assert found["perplexity"] == pytest.approx(statistics.perplexity(z).item(), rel=1e-4)


def test_memory_is_bounded(converted) -> None:
    model = converted("timm-vit")
    information = Information(model)
    for _ in range(3):
        information.latest = {"blocks.0": torch.zeros(700, 48)}
        with ltm.trace(model) as traced, torch.no_grad():
            model(torch.zeros(1, 3, 32, 32))
        traced.features = {name: torch.zeros(700, 48) for name in traced.features}
        information.add(traced, torch.zeros(700, 7))
    assert len(information.memory) == 1024 and len(information.memory.batches) == 2


def test_the_input_is_what_the_first_block_reads(converted) -> None:
    model = converted("timm-vit")
    assert entrances_of(model, "blocks.3") == ["blocks.0", "blocks", ""]
    assert entrances_of(nn.Sequential(), "encoder") == ["encoder", ""]


@pytest.mark.parametrize(
    "shape",
    [(2, 5, 48), (2, 48, 4, 4), (2, 4, 4, 48), (2, 3, 32, 32), (2, 8, 8, 96)],
    ids=["tokens", "nchw", "nhwc", "image", "other-width"],
)
def test_tokens_are_averaged_whatever_their_layout(shape, converted) -> None:
    information = Information(converted("timm-vit"))
    width = 48 if 48 in shape else min(shape[1], 3) if shape[1] == 3 else 96
    assert information._mean(torch.zeros(shape)).shape == (2, width)


@pytest.mark.parametrize("name", ["timm-mobilevit-local", "timm-swin-local"])
def test_where_images_are_folded_into_the_batch_the_module_around_is_read(name: str) -> None:
    model, _, example = conversions.converted(name)
    classes = ltm.get_plan(model).classes
    drawn = [(torch.randn(32, *example.shape[1:]), torch.arange(32) % classes) for _ in range(9)]
    history = ltm.finetune(model, drawn, config=ltm.TrainConfig(batch_size=32, lr=1e-4))
    assert {"ib", "i_input", "i_label"} <= set(history.epochs[-1])
