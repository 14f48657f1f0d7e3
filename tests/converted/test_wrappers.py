"""A wrapper is converted, or what is converted is wrapped: found, measured, saved and restored from either side."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from own_nets import EXAMPLE, Net, drawn
from torch import nn
from zoo import randomise

import ltm_retrofit as ltm
from ltm_retrofit.converted.record import forwards_of

torch.set_num_threads(1)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
CONFIG = ltm.LTMConfig(flops=0.8)


def vit() -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7}
    return randomise(timm.create_model("vit_tiny_patch16_224", **sizes))


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def peft(model: nn.Module) -> nn.Module:
    library = pytest.importorskip("peft")
    return library.get_peft_model(model, library.LoraConfig(target_modules=["qkv"], init_lora_weights=False)).eval()


#: wrappers that hand calls on, and how what they wrap is taken out again
WRAPS = {
    "peft": (peft, lambda wrapper: wrapper.merge_and_unload()),
    "compile": (compiled, lambda wrapper: wrapper._orig_mod),
    "parallel": (nn.DataParallel, lambda wrapper: wrapper.module),
}


@pytest.mark.parametrize("kind", ["peft", *(pytest.param(name, marks=pytest.mark.slow) for name in [*WRAPS][1:])])
def test_what_is_taken_out_of_a_converted_wrapper_is_a_converted_model(kind, tmp_path) -> None:
    wrap, out = WRAPS[kind]
    wrapper = wrap(vit())
    assert ltm.retrofit(wrapper, CONFIG, IMAGES[:1]) is wrapper
    assert ltm.is_retrofitted(wrapper)
    plan = ltm.get_plan(wrapper)
    with torch.no_grad():
        merged = wrapper(IMAGES)
        inner = out(wrapper)
        assert ltm.is_retrofitted(inner) and ltm.get_plan(inner) == plan
        torch.testing.assert_close(inner(IMAGES), merged)
        with ltm.trace(wrapper) as traced:
            inner(IMAGES)
        assert len(traced.merges) == len(traced.sites)
    if kind == "peft":  # the plan counts what LoRA costs
        with pytest.raises(ltm.CheckpointError, match=r"call ltm_retrofit.restore\(model\) and retrofit"):
            ltm.save_pretrained(inner, tmp_path / "saved")
    else:
        assert ltm.measure(inner, IMAGES[:1], batches=()).macs["converted"] == plan.macs
        ltm.save_pretrained(inner, tmp_path / "saved")
    assert ltm.restore(wrapper if kind == "compile" else inner) is (wrapper if kind == "compile" else inner)
    assert not ltm.is_retrofitted(inner) and not list(forwards_of(wrapper))
    ltm.retrofit(inner, CONFIG)


@pytest.mark.parametrize("wrap", [nn.Sequential, compiled])
def test_a_wrapper_around_a_converted_model_stands_for_it(wrap, tmp_path) -> None:
    model = ltm.retrofit(vit(), CONFIG)
    wrapper = wrap(model)
    assert ltm.is_retrofitted(wrapper) and ltm.get_plan(wrapper) == ltm.get_plan(model)
    report = ltm.measure(wrapper, IMAGES[:1], batches=())
    assert report.macs["converted"] == ltm.get_plan(model).macs < report.macs["original"]
    with ltm.disabled(wrapper), torch.no_grad():
        original = model(IMAGES)
    with pytest.raises(ltm.AlreadyRetrofitted):
        ltm.retrofit(wrapper, CONFIG, IMAGES[:1])
    ltm.save_pretrained(wrapper, tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(ltm.from_pretrained(tmp_path / "saved")(IMAGES), model(IMAGES))
        assert ltm.restore(wrapper) is wrapper
        assert torch.equal(model(IMAGES), original) and not ltm.is_retrofitted(model)


def test_a_part_of_a_converted_model_says_what_to_do() -> None:
    whole = nn.Sequential(drawn(Net()), nn.Identity()).eval()
    with torch.no_grad():
        before = whole(EXAMPLE)
    ltm.retrofit(whole, CONFIG, EXAMPLE)
    part, plan = whole[0], ltm.get_plan(whole)
    assert not ltm.is_retrofitted(part)
    for act in (
        ltm.get_plan,
        lambda model: ltm.measure(model, EXAMPLE, batches=()),
        lambda m: ltm.save_pretrained(m, "no"),
    ):
        with pytest.raises(ltm.NotRetrofitted, match=r"a part of a converted model.*restore\(part\)"):
            act(part)
    with pytest.raises(ltm.AlreadyRetrofitted, match="a part of one"):
        ltm.retrofit(part, CONFIG, EXAMPLE)
    assert ltm.restore(part) is part and not ltm.is_retrofitted(whole)
    with torch.no_grad():
        assert torch.equal(whole(EXAMPLE), before)
    ltm.retrofit(part, CONFIG, EXAMPLE)
    assert ltm.get_plan(whole) == ltm.get_plan(part) != plan
    ltm.retrofit(ltm.restore(whole), CONFIG, EXAMPLE)


def test_of_several_converted_parts_none_is_the_model() -> None:
    both = nn.ModuleDict({"one": ltm.retrofit(drawn(Net()), CONFIG, EXAMPLE)})
    both["other"] = copy.deepcopy(both["one"])
    assert not ltm.is_retrofitted(both)
    with pytest.raises(ltm.NotRetrofitted, match="several parts of this ModuleDict are converted, one, other"):
        ltm.get_plan(both)
    with pytest.raises(ltm.NotRetrofitted, match="this Identity is not converted"):
        ltm.restore(nn.Identity())
