"""A converted host's uses: each works, or is refused by name and works within `disabled`."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from conversions import (
    EVERY,
    HOSTS,
    batch,
    call,
    convert,
    converted,
    equal,
    gradients,
    near,
    randomise,
    scopes,
    trainable,
)
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from zoo import ZOO, picture

import ltm_retrofit as ltm
from ltm_retrofit.finding.example import tensors_of

torch.set_num_threads(1)
TIMM = [entry for entry, name in zip(EVERY, HOSTS, strict=True) if name.startswith("timm")]
HF = [entry for entry, name in zip(EVERY, HOSTS, strict=True) if name.startswith("hf")]


def shapes(values: object) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors_of(values)]


# ----------------------------------------------------------------------------------------------------- timm's methods


@pytest.mark.parametrize("name", TIMM)
def test_features_and_head_make_the_output(name):
    model, _, example = converted(name)
    inputs = batch(example)
    with torch.no_grad():
        assert torch.equal(model.forward_head(model.forward_features(inputs)), model(inputs))


@pytest.mark.parametrize("name", TIMM)
def test_features_of_local_hosts_have_the_original_shapes(name):
    model, original, example = converted(name)
    if scopes(model) != {"LOCAL"}:
        pytest.skip("its tokens stay merged")
    with torch.no_grad():
        assert model.forward_features(example).shape == original.forward_features(example).shape


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize("method", ["forward_intermediates", "get_intermediate_layers"])
def test_intermediate_maps_have_the_original_shapes_or_are_refused_by_name(name, method):
    model, original, example = converted(name)
    if not hasattr(original, method):
        pytest.skip(f"{type(original).__name__} has no {method}")
    with torch.no_grad():
        expected = getattr(original, method)(example)
        if scopes(model) == {"LOCAL"}:
            given = getattr(model, method)(example)
            assert shapes(given) == shapes(expected) and not equal(tensors_of(given), tensors_of(expected))
        else:
            with pytest.raises(ltm.UnsupportedBlock, match=method):
                getattr(model, method)(example)
        with ltm.disabled(model):
            assert equal(tensors_of(getattr(model, method)(example)), tensors_of(expected))
        ltm.restore(model)
        assert equal(tensors_of(getattr(model, method)(example)), tensors_of(expected))


FEATURES = {
    "vit": ("vit_tiny_patch16_224", 32, {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3}),
    "dinov3": (
        "vit_small_patch16_dinov3",
        32,
        {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3},
    ),
    "swin": (
        "swin_tiny_patch4_window7_224",
        64,
        {"img_size": 64, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (1, 2, 2, 1),
         "num_heads": (1, 2, 4, 8)},
    ),
    "efficientvit": (
        "efficientvit_b0",
        128,
        {"widths": (8, 8, 16, 32, 32), "depths": (1, 1, 1, 2, 2), "head_dim": 8, "head_widths": (32, 32)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FEATURES)
def test_features_only_keeps_the_pyramid_or_is_refused_by_name(name):
    architecture, side, changes = FEATURES[name]
    model = randomise(timm.create_model(architecture, features_only=True, **changes))
    example = picture(side)
    with torch.no_grad():
        expected = model(example)
    try:
        convert(model, example)
    except ltm.UnsupportedBlock as error:
        assert "LOCAL" in str(error) or "block" in str(error)
        return
    assert scopes(model) == {"LOCAL"}
    with torch.no_grad():
        given = model(example)
    assert shapes(given) == shapes(expected) and not equal(tensors_of(given), tensors_of(expected))
    assert shapes(model(batch(example, 3))) == [(3, *shape[1:]) for shape in shapes(expected)]


@pytest.mark.parametrize("name", TIMM)
def test_another_head_fits(name):
    model, _, example = converted(name)
    model.reset_classifier(11)
    out = model(batch(example))
    assert out.shape == (2, 11)
    out.square().sum().backward()
    model.reset_classifier(0)
    assert model.eval()(batch(example)).ndim == 2


@pytest.mark.parametrize("name", ["timm-vit-local", "timm-swin-local"])
def test_set_input_size_makes_a_local_host_run_at_another_size(name):
    model, original, example = converted(name)
    side = 2 * example.shape[-1]
    for one in (model, original):
        one.set_input_size(img_size=(side, side))
    with torch.no_grad():
        given, expected = model.forward_features(picture(side)), original.forward_features(picture(side))
        assert given.shape == expected.shape and bool(torch.isfinite(given).all())
        assert not torch.equal(given, expected)
        assert model(picture(side)).shape == (1, 7)
    ltm.restore(model)
    with torch.no_grad():
        assert torch.equal(model.forward_features(picture(side)), expected)


@pytest.mark.parametrize("name", ["timm-vit-flow", "timm-dinov3-flow"])
def test_set_input_size_makes_a_flow_host_run_at_another_size_or_is_refused_by_count(name):
    model, _, example = converted(name)
    side = 2 * example.shape[-1]
    model.set_input_size(img_size=(side, side))
    try:
        out = model(picture(side))
    except ltm.CountError as error:
        assert "tokens" in str(error)
    else:
        assert out.shape == (1, 7) and bool(torch.isfinite(out).all())


# --------------------------------------------------------------------------------------------- Hugging Face's options


@pytest.mark.parametrize("name", HF)
@pytest.mark.parametrize("option", ["output_hidden_states", "output_attentions"])
def test_recorded_states_have_the_original_shapes_or_are_refused_by_name(name, option):
    model, original, example = converted(name)
    for one in (model, original):
        one.set_attn_implementation("eager")
    inputs = batch(example)
    record = option.removeprefix("output_")
    with torch.no_grad():
        expected = original(inputs, **{option: True})
        if record not in expected:
            assert name == "hf-mobilevit-grid"  # it records no attentions
            assert shapes(model(inputs, **{option: True})) == shapes(expected)
            return
        if scopes(model) == {"LOCAL"}:
            given = model(inputs, **{option: True})
            assert shapes(given) == shapes(expected) and len(given[record]) == len(expected[record]) > 0
        else:
            try:
                given = model(inputs, **{option: True})
            except ltm.UnsupportedBlock as error:
                assert option in str(error) and "disabled" in str(error)
            else:
                assert len(given[record]) == len(expected[record]) > 0
        with ltm.disabled(model):
            assert equal(tensors_of(model(inputs, **{option: True})), tensors_of(expected))
        assert shapes(model(inputs)) == shapes(original(inputs))


@pytest.mark.parametrize("name", HF)
def test_attention_implementations_agree(name):
    model, _, example = converted(name)
    inputs = batch(example)
    found = {}
    with torch.no_grad():
        for implementation in ("sdpa", "eager"):
            try:
                model.set_attn_implementation(implementation)
            except ValueError:  # no such implementation of this model
                continue
            found[implementation] = call(model, inputs)
    assert "eager" in found
    for other in found.values():
        near(other, found["eager"])


# ---------------------------------------------------------------------------------------------------------- training


def test_gradient_checkpointing_gives_equal_gradients(host):
    model, _, example = converted(host)
    trainable(model)
    inputs = batch(example)
    plain = gradients(model, inputs)
    if host.startswith("timm"):
        model.set_grad_checkpointing(True)
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = gradients(model, inputs)
    assert plain.keys() == checkpointed.keys() and any(".ltm." in name for name in plain)
    near(list(checkpointed.values()), list(plain.values()))


def _worst(model: nn.Module, images: Tensor) -> float:
    """Return by how much the gradients of a batch differ from the sum of those of its images, as a share of them."""
    trainable(model.double())  # some gradients are small differences of large ones
    whole, one, other = (gradients(model, part) for part in (images, images[:1], images[1:]))
    return max(
        float((whole[name] - one[name] - other[name]).abs().max() / (whole[name].abs().max() + 1e-9)) for name in whole
    )


def test_gradients_of_a_batch_are_the_sum_of_those_of_its_images(host):
    model, original, example = converted(host)
    images = batch(example).double()
    if _worst(original, images) > 1e-6:
        pytest.skip("torch's batch norm gives wrong gradients for one image in this host itself")
    assert _worst(model, images) < 1e-6


def test_autocast_runs_forward_and_backward(host):
    model, _, example = converted(host)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = call(model, batch(example))
    torch.stack([t.float().square().mean() for t in outputs]).sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_follows_the_model(host, dtype):
    model, _, example = converted(host)
    model.to(dtype)
    with torch.no_grad():
        for tensor in call(model, batch(example).to(dtype)):
            assert tensor.dtype == dtype and bool(torch.isfinite(tensor).all())


@pytest.mark.parametrize("host", ["timm-swin-local", "timm-efficientvit-grid"])
def test_a_bfloat16_model_converts(host):
    model, example = ZOO[HOSTS[host][0]]()
    convert(model.bfloat16(), example.bfloat16())
    assert all(t.dtype == torch.bfloat16 for t in call(model, example.bfloat16()))


# ------------------------------------------------------------------------------------------------------ saved folders


#: made of a configuration that no arguments of `create_model` say: saved where that is asked for, loaded onto a base
UNRECORDED = ("timm-mobilevit-local",)


def test_a_saved_folder_gives_equal_results(host, tmp_path: Path):
    model, original, example = converted(host)
    inputs = batch(example)
    with torch.no_grad():
        for number, mask in enumerate(p for n, p in model.named_parameters() if ".ltm." in n):
            mask.add_(0.01 * (number % 5))
        expected = call(model, inputs)
    ltm.save_pretrained(model, tmp_path, allow_unloadable=host in UNRECORDED)
    again = ltm.from_pretrained(tmp_path, base=original if host in UNRECORDED else None)
    with torch.no_grad():
        assert equal(call(again, inputs), expected)
    assert ltm.get_plan(again).rows == ltm.get_plan(model).rows


def test_optimizers_of_timm_find_what_does_not_decay(tmp_path: Path) -> None:
    """timm asks the host for it; of ours, what is one number or one vector does not."""
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7}
    host = timm.create_model("vit_tiny_patch16_224", **arguments).eval()

    def decaying(model: nn.Module) -> set[str]:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05).param_groups
        return {names[id(one)] for group in groups if group["weight_decay"] for one in group["params"]}

    before, asked = decaying(host), host.no_weight_decay()
    ltm.save_pretrained(ltm.retrofit(host), tmp_path)
    for model in (host, ltm.from_pretrained(tmp_path)):
        assert model.no_weight_decay() == asked
        assert {name for name in decaying(model) if ".ltm." not in name} == before
        assert all(p.ndim > 1 for name, p in model.named_parameters() if name in decaying(model))
