"""Tracers of other tools on a converted model: what follows modules takes a block as one operation, or is refused."""

from __future__ import annotations

import pickle

import pytest
import torch
from conversions import batch, call, converted, slow_but
from pieces import Own
from torch import fx, nn
from torchvision.models.feature_extraction import create_feature_extractor

import ltm_retrofit as ltm

torch.set_num_threads(1)
Dim = torch.export.Dim
SCOPES = slow_but(["timm-vit-flow"], ["timm-vit-flow", "timm-vit-local", "timm-efficientvit-grid"])


@pytest.mark.parametrize("host", slow_but(["timm-vit-flow"], ["timm-vit-flow", "timm-vit-local"]))
def test_fx_follows_what_it_follows_of_the_original(host) -> None:
    model, original, example = converted(host)
    inputs = batch(example)
    fx.symbolic_trace(original)
    graph = fx.symbolic_trace(model)
    with torch.no_grad():
        assert torch.equal(graph(inputs), model(inputs))
        assert torch.equal(pickle.loads(pickle.dumps(graph))(inputs), model(inputs))


def test_features_are_extracted() -> None:
    model, original, example = converted("timm-vit-flow")
    inputs, seen = batch(example), []
    create_feature_extractor(original, {"norm": "tokens"})
    extract = create_feature_extractor(model, {"norm": "tokens", "head": "logits"})
    model.norm.register_forward_hook(lambda module, given, out: seen.append(out))
    with torch.no_grad():
        logits, features = model(inputs), extract(inputs)
    assert torch.equal(features["logits"], logits) and torch.equal(features["tokens"], seen[0])


@pytest.mark.parametrize("host", SCOPES)
def test_scripting_is_refused_by_name(host) -> None:
    model, _, _ = converted(host)
    for each in (model, Own(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ltm.UnsupportedBlock, match=r"torch.jit.script .*use torch.jit.trace"):
            torch.jit.script(each)
    assert not any("__prepare_scriptable__" in module.__dict__ for module in ltm.restore(model).modules())


def open_sizes(scope: str) -> tuple[nn.Module, tuple[dict[int, object]]]:
    import timm

    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "dynamic_img_size": True}
    model = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    ltm.retrofit(model, ltm.LTMConfig(flops=0.85, scope=scope))
    return model, ({0: Dim("b", min=1, max=16), 2: 8 * Dim("h", min=4, max=32), 3: 8 * Dim("w", min=4, max=32)},)


@pytest.mark.parametrize("scope", slow_but(["FLOW"], ["FLOW", "LOCAL"]))
def test_an_export_for_any_size_is_refused_by_name(scope) -> None:
    model, shapes = open_sizes(scope)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        with pytest.raises(ltm.UnsupportedBlock, match=r"any height and width.*once for each size"):
            torch.export.export(model, (images,), dynamic_shapes=shapes, strict=False)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["FLOW", "LOCAL"])
def test_an_export_of_the_original_is_not(scope) -> None:
    model, shapes = open_sizes(scope)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        with ltm.disabled(model):
            torch.export.export(model, (images,), dynamic_shapes=shapes, strict=False)
        program = torch.export.export(model, (images,), dynamic_shapes=({0: shapes[0][0]},), strict=False).module()
        assert torch.allclose(program(images[:1]), call(model, images[:1])[0], atol=1e-5)
