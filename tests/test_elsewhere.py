"""Converted models in other hands: torch.func, offloading by accelerate, averages, an attention of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import call, converted, slow_but
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import ltm_retrofit as ltm

HOSTS = slow_but(["timm-vit-flow"], ["timm-vit-flow", "timm-vit-local", "timm-swin-local", "timm-efficientvit-grid"])
METHODS = pytest.mark.parametrize("method", ["ltm", "tome"])


def loss(model: nn.Module, values: dict[str, Tensor], images: Tensor) -> Tensor:
    return functional_call(model, values, (images,)).square().sum()


@pytest.mark.parametrize("host", HOSTS)
def test_weights_are_those_of_the_call(host: str) -> None:
    model, _, images = converted(host)
    values = {name: value * 1.01 for name, value in model.named_parameters()}
    with torch.no_grad():
        found = functional_call(model, values, (images,))
        assert not torch.equal(found, model(images))
        model.load_state_dict({**model.state_dict(), **values})
        assert torch.equal(found, model(images))


@METHODS
def test_gradients_come_image_by_image(method: str) -> None:
    """As for differential privacy: one_hot looks at values, which vmap refuses."""
    model, _, images = converted("timm-vit-flow", method=method)
    images = torch.randn(3, *images.shape[1:])
    values = {name: value.detach() for name, value in model.named_parameters()}
    one = grad(lambda given, image: loss(model, given, image[None]))
    each = vmap(one, in_dims=(None, 0))(values, images)
    for place, image in enumerate(images):
        for name, expected in one(values, image).items():
            torch.testing.assert_close(each[name][place], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_weights_may_be_kept_elsewhere(host: str, where: str, tmp_path: Path) -> None:
    import accelerate

    model, _, images = converted(host)
    with torch.no_grad():
        expected = model(images)
        if where == "cpu":
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        else:
            accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
        assert next(model.parameters()).is_meta
        assert torch.equal(model(images), expected)
    with pytest.raises(ltm.UnsupportedBlock, match="meta device"):
        ltm.retrofit(accelerate.cpu_offload(converted(host)[1], execution_device=torch.device("cpu")))


@pytest.mark.parametrize("host", HOSTS)
def test_an_average_of_timm_merges_too(host: str) -> None:
    from timm.utils import ModelEmaV3

    model, _, images = converted(host)
    average = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
        average.update(model)
        assert ltm.is_retrofitted(average.module)
        assert not torch.equal(average.module(images), model(images))
    for name, value in average.module.named_parameters():
        torch.testing.assert_close(value, model.get_parameter(name) * (1 / 1.1 + 1) / 2, rtol=1e-4, atol=1e-6)


def test_blocks_that_are_called_one_after_the_other_are_the_model() -> None:
    model, _, images = converted("timm-vit-flow")
    blocks = nn.Sequential(*model.blocks)
    with torch.no_grad():
        tokens = blocks(model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images)))))
        assert torch.equal(model.forward_head(model.norm(tokens)), model(images))


@pytest.mark.parametrize("takes_masks", [True, False])
def test_an_attention_of_ones_own_stays_and_is_given_sizes(takes_masks: bool) -> None:
    from transformers import AttentionInterface, ViTConfig, ViTForImageClassification
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    masks = list[bool]()

    def own(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **more: Any) -> Any:
        masks.append(mask is not None)
        return sdpa_attention_forward(module, q, k, v, mask if takes_masks else None, **more)

    AttentionInterface.register("own", own)
    shape = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 64, "patch_size": 8}
    model = ViTForImageClassification(ViTConfig(**shape, num_labels=7, attn_implementation="own")).eval()
    images = torch.randn(2, 3, 64, 64)
    before = call(model, images)[0]
    ltm.retrofit(model, ltm.LTMConfig(flops=0.75))
    assert ltm.get_plan(model).size_aware is takes_masks
    masks.clear()
    call(model, images)
    assert len(masks) == 4 and any(masks) is takes_masks
    ltm.restore(model)
    masks.clear()
    assert torch.equal(call(model, images)[0], before) and masks == [False] * 4
