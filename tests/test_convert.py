"""retrofit and restore: what stays, what a failure leaves behind, and the host's uses that must keep working."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from collections.abc import Callable, Iterator

import pytest
import timm
import torch
import transformers as tr
from conftest import FAMILIES
from pieces import snapshot
from torch import Tensor, nn

import ltm_retrofit as ltm
from ltm_retrofit import convert
from ltm_retrofit.errors import (
    AlreadyRetrofitted,
    BudgetError,
    CountError,
    ExampleError,
    NotRetrofitted,
    RecipeError,
    UnsupportedBlock,
)
from ltm_retrofit.finding.example import tensors_of
from ltm_retrofit.merging.methods import method_names
from ltm_retrofit.scopes import base

torch.set_num_threads(1)
METHODS = method_names()
_SITES: dict = {}
_PLANS: dict = {}


@pytest.fixture
def converted(build: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch):
    """Convert a family by name; its sites hold no module, so each family is searched once."""

    def make(family: str, model: nn.Module | None = None, **options) -> nn.Module:
        model = build(family) if model is None else model
        if family not in _SITES:
            _SITES[family] = ltm.find_sites(model)
        with monkeypatch.context() as patch:
            patch.setattr(convert, "find_sites", lambda *_: _SITES[family])
            return ltm.retrofit(model, ltm.LTMConfig(**({} if "tokens" in options else {"flops": 0.7}) | options))

    return make


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor, **options) -> list[Tensor]:
    return tensors_of(model(images, **options))


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def near(ours: list[Tensor], theirs: list[Tensor], **tolerance: float) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **(tolerance or {"rtol": 1e-4, "atol": 1e-4}))


# --------------------------------------------------------------------------------------------- there and back again


@pytest.mark.parametrize("method", METHODS)
def test_restoring_gives_the_original_bit_for_bit(family, converted, build, images, method):
    model = build(family)
    before, parts = outputs(model, images), snapshot(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    signature, kind, output_type = inspect.signature(model.forward), type(model), type(model(images))
    block_signatures = {n: inspect.signature(m.forward) for n, m in model.named_modules()}
    random_state = torch.get_rng_state()
    assert converted(family, model, method=method) is model
    assert torch.equal(torch.get_rng_state(), random_state)
    assert type(model) is kind and inspect.signature(model.forward) == signature
    for name, expected in block_signatures.items():
        assert inspect.signature(model.get_submodule(name).forward) == expected
    inside = model.state_dict()
    assert all(torch.equal(inside[key], value) for key, value in state.items())
    assert all(".ltm." in f".{key}" for key in inside.keys() - state.keys())
    merged = outputs(model, images)
    assert type(model(images)) is output_type
    assert [t.shape for t in merged] == [t.shape for t in before] and not equal(merged, before)
    assert all(bool(torch.isfinite(t).all()) for t in merged)
    with ltm.disabled(model) as same:
        assert same is model and equal(outputs(model, images), before)
    assert equal(outputs(model, images), merged)
    assert ltm.is_retrofitted(model) and ltm.restore(model) is model and not ltm.is_retrofitted(model)
    assert equal(outputs(model, images), before) and list(model.state_dict()) == list(state)
    assert snapshot(model) == parts


def test_disabled_ends_with_an_error_inside(converted, images):
    model = converted("timm-vit")
    merged = outputs(model, images)
    with pytest.raises(ZeroDivisionError), ltm.disabled(model):
        1 / 0  # noqa: B018
    assert equal(outputs(model, images), merged)


def test_twice_and_never(converted, build):
    model = converted("timm-vit")
    with pytest.raises(AlreadyRetrofitted, match="restore"):
        ltm.retrofit(model)
    plain = build("timm-vit")
    for call in (ltm.restore, ltm.get_plan, lambda m: ltm.disabled(m).__enter__()):
        with pytest.raises(NotRetrofitted, match="retrofit"):
            call(plain)


def test_converting_again_after_restoring_gives_the_same(converted, images):
    model = converted("hf-vit")
    merged = outputs(model, images)
    assert equal(outputs(converted("hf-vit", ltm.restore(model)), images), merged)


def test_restoring_keeps_what_the_host_learned(converted, images):
    model = converted("timm-vit")
    with torch.no_grad():
        model.head.bias.add_(1)
    learned = model.head.bias.clone()
    assert torch.equal(ltm.restore(model).head.bias, learned)


# ------------------------------------------------------------------------------------------------- failed conversions


def refuse(*_: object) -> None:
    raise UnsupportedBlock("made to fail")


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("reason", ["proof", "identity", "build", "interrupt", "budget", "counts", "site", "example"])
@pytest.mark.parametrize("family", ["timm-deit", "hf-dinov2"])
def test_a_failed_conversion_leaves_no_trace(build, images, monkeypatch, family, reason, training):
    model = build(family)
    before = outputs(model, images)
    model.train(training)
    next(model.children()).train(not training)
    parts, random_state = snapshot(model), torch.get_rng_state()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    config, example, error = {"flops": 0.7}, None, UnsupportedBlock
    if reason == "proof":
        monkeypatch.setattr(convert, "prove_installed", refuse)
    elif reason == "identity":
        monkeypatch.setattr(convert, "all_equal", lambda *_: False)
    elif reason == "build":
        monkeypatch.setattr(base, "make_mask", refuse)
    elif reason == "interrupt":
        error = KeyboardInterrupt

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(convert, "prove_installed", stop)
    elif reason == "budget":
        config, error = {"flops": 0.01}, BudgetError
    elif reason == "counts":
        config, error = {"tokens": (99,)}, CountError
    elif reason == "site":
        config = {"flops": 0.7, "sites": ("nowhere",)}
    else:
        example, error = torch.zeros(1, 3, 32, 32, dtype=torch.float64), ExampleError
    with pytest.raises(error):
        ltm.retrofit(model, ltm.LTMConfig(**config), example)
    assert snapshot(model) == parts and torch.equal(torch.get_rng_state(), random_state)
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[key], value) for key, value in state.items())
    assert equal(outputs(model.eval(), images), before)


def test_a_plan_that_slices_is_refused_where_the_head_reads_patch_tokens(build):
    """Same shapes and MACs, another pooling: the proof that the head reads prefix tokens only does not hold there."""
    options = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 6, "num_heads": 3, "num_classes": 7}
    host = build("timm-vit")
    plan = ltm.make_plan(ltm.find_sites(host), ltm.LTMConfig(flops=0.7))
    assert plan.rows[-1].action == "slice"
    torch.manual_seed(0)
    other = timm.create_model("vit_tiny_patch16_224", pool_include_prefix=True, fc_norm=False, **options).eval()
    other.global_pool = "avg"  # of all tokens, the class token included: no NaN gives it away
    with pytest.raises(ltm.RetrofitError):
        ltm.retrofit(other, plan=plan)


# ------------------------------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize("family", ["timm-vit", "timm-deit", "timm-dinov2", "timm-clip", "hf-vit", "hf-deit-teacher"])
def test_the_slice_after_the_last_attention_is_exact(converted, build, images, family):
    before = outputs(build(family), images)
    sites = ltm.find_sites(build(family))
    tokens, prefix = sites[-1].layout.tokens, sites[-1].layout.prefix
    saved = sites[-1].cost(tokens, tokens) - sites[-1].cost(tokens, prefix)
    model = converted(family, flops=(sites.total_macs - saved + sites.ending.prefix_macs) / sites.total_macs)
    assert [row.action for row in ltm.get_plan(model).rows] == ["slice"]
    near(outputs(model, images), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["hf-clip", "hf-dinov2", "timm-vit-avg-qknorm"])
def test_merged_tokens_come_back_where_they_are_read(converted, build, images, family):
    model = converted(family)
    assert ltm.get_plan(model).unmerge
    assert [t.shape for t in outputs(model, images)] == [t.shape for t in outputs(build(family), images)]


@pytest.mark.parametrize("family", ["timm-vit", "timm-dinov2"])
def test_full_output_keeps_the_features_shape(converted, build, images, family):
    model = converted(family, output_tokens="full")
    with torch.no_grad():
        assert model.forward_features(images).shape == build(family).forward_features(images).shape


def test_full_output_keeps_the_last_hidden_state(converted, build, images):
    model = converted("hf-vit", output_tokens="full")
    with torch.no_grad():
        assert model.vit(images).last_hidden_state.shape == (3, 65, 48)


@pytest.mark.parametrize("family", ["hf-vit", "hf-dinov2", "hf-clip"])
@pytest.mark.parametrize("option", ["output_hidden_states", "output_attentions"])
def test_recorded_states_have_the_merged_shapes_or_are_refused_by_name(converted, images, family, option):
    model = converted(family)
    try:
        out = model(images, **{option: True})
    except UnsupportedBlock as error:
        assert option in str(error) and "disabled" in str(error)
        with ltm.disabled(model):
            out = model(images, **{option: True})
    if option == "output_hidden_states":
        assert len(out.hidden_states) == 7
    with torch.no_grad():
        model(images)  # works after the refusal


# ------------------------------------------------------------------------------------------------------- training mode


def test_dropout_works_in_training_mode(converted, images):
    torch.manual_seed(0)
    host = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=4,
        embed_dim=48,
        depth=6,
        num_heads=3,
        num_classes=7,
        proj_drop_rate=0.2,
        drop_path_rate=0.2,
    ).eval()
    model = ltm.retrofit(host, ltm.LTMConfig(flops=0.7))
    assert equal(outputs(model, images), outputs(model, images))
    model.train()
    assert not equal(outputs(model, images), outputs(model, images))
    model.eval()
    assert equal(outputs(model, images), outputs(model, images))


def test_training_flags_are_kept_and_masks_follow(build):
    model = build("timm-vit").train()
    ltm.retrofit(model)
    assert all(module.training for module in model.modules())


def test_every_parameter_of_host_and_masks_can_learn(family, converted, images):
    model = converted(family).train()
    with ltm.trace(model):
        torch.stack([t.float().square().mean() for t in tensors_of(model(images))]).sum().backward()
    missing = [n for n, p in model.named_parameters() if ".ltm." in n and p.grad is None]
    assert not missing
    weights = [p.grad for n, p in model.named_parameters() if n.endswith("ltm.weight")]
    assert weights and all(float(gradient.abs().max()) > 0 for gradient in weights)


# ------------------------------------------------------------------------------------------------- copies and threads


def test_a_deepcopy_is_independent(family, converted, images):
    model = converted(family)
    before, twin = outputs(model, images), copy.deepcopy(model)
    assert equal(outputs(twin, images), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    assert equal(outputs(model, images), before) and not equal(outputs(twin, images), before)
    with ltm.disabled(twin):
        assert equal(outputs(model, images), before)
    ltm.restore(twin)
    assert ltm.is_retrofitted(model) and equal(outputs(model, images), before)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize(
    "family, options", [("timm-vit", {}), ("hf-vit", {"output_tokens": "full"})], ids=["timm", "hf-full"]
)
def test_a_copy_that_is_made_within_disabled_or_a_trace_merges(converted, build, images, family, options, way):
    model = converted(family, **options)
    merged = outputs(model, images)
    with ltm.trace(model) as traced, ltm.disabled(model):
        twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
        assert equal(outputs(model, images), outputs(build(family), images)) and traced.merges == ()
        assert equal(outputs(twin, images), merged)
    assert equal(outputs(model, images), merged)
    with ltm.disabled(twin):
        assert equal(outputs(twin, images), outputs(build(family), images))
    ltm.restore(twin)


def test_pickle_round_trip(family, converted, images):
    model = converted(family)
    again = pickle.loads(pickle.dumps(model))
    assert equal(outputs(again, images), outputs(model, images)) and ltm.get_plan(again) == ltm.get_plan(model)


def test_threads_do_not_disturb_each_other(converted):
    model = converted("timm-vit")
    batches = [torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    expected = [outputs(model, batch) for batch in batches]
    wrong: list[int] = []

    def work(index: int) -> None:
        torch.set_num_threads(1)
        for _ in range(20):
            if not equal(outputs(model, batches[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert wrong == []


@pytest.mark.parametrize("family", ["timm-vit", "timm-dinov2", "hf-vit", "hf-dinov2"])
def test_gradient_checkpointing_gives_equal_gradients(converted, images, family):
    model = converted(family).train()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        tensors_of(model(images))[0].square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    if family.startswith("timm"):
        model.set_grad_checkpointing(True)
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    near(list(checkpointed.values()), list(plain.values()), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- export


#: of the exports those that CI runs, beside those of test_hosts.py
FAST = {"timm-vit-dynamic-batch", "hf-vit-dynamic-batch", "timm-vit-avg-qknorm-static", "hf-dinov2-static"}


def _exports() -> Iterator[object]:
    for name in FAMILIES:
        for dynamic in (False, True):
            label = f"{name}-{'dynamic-batch' if dynamic else 'static'}"
            yield pytest.param(name, dynamic, id=label, marks=[] if label in FAST else pytest.mark.slow)


@pytest.mark.parametrize("family, dynamic", _exports())
def test_each_family_exports_and_is_left_alone(family, converted, images, dynamic):
    model = converted(family)
    expected = outputs(model, images)
    shapes = ({0: torch.export.Dim("batch", min=2, max=16)},) if dynamic else None
    program = torch.export.export(model, (images,), dynamic_shapes=shapes, strict=False).module()
    near(outputs(program, images), expected, rtol=1e-5, atol=1e-5)
    if dynamic:
        more = torch.cat([images, images.flip(0)])
        near(outputs(program, more), outputs(model, more), rtol=1e-4, atol=1e-4)
    assert equal(outputs(model, images), expected)


# -------------------------------------------------------------------------------------------------------------- dtypes


def test_bfloat16_follows_the_model(family, converted, images):
    model = converted(family).to(torch.bfloat16)
    for tensor in outputs(model, images.bfloat16()):
        assert tensor.dtype == torch.bfloat16 and bool(torch.isfinite(tensor).all())


def test_a_bfloat16_model_converts(build, images):
    model = ltm.retrofit(build("timm-vit").bfloat16())
    assert model(images.bfloat16()).dtype == torch.bfloat16


def test_autocast_runs_forward_and_backward(family, converted, images):
    model = converted(family)
    with torch.autocast("cpu", torch.bfloat16):
        out = tensors_of(model(images))
    torch.stack([t.float().square().mean() for t in out]).sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


# --------------------------------------------------------------------------------------------------- refused in use


def test_tokens_without_sizes_are_refused_by_the_blocks_name(converted, images):
    model = converted("timm-vit")
    handle = model.blocks[2].register_forward_hook(lambda module, args, out: out.clone())
    with pytest.raises(CountError, match=r"'blocks.3' received tokens without the sizes"):
        model(images)
    handle.remove()
    with pytest.raises(CountError, match=r"'blocks.4'"):
        model.blocks[4](torch.randn(1, 41, 48))


@pytest.mark.parametrize("what", ["call", "model", "example"])
def test_inference_mode_is_refused_by_name_and_changes_nothing(build, images, what):
    with torch.inference_mode(what == "model"):
        model = build("timm-vit")
    with torch.inference_mode(what == "example"):
        example = images + 0
    parts, before = snapshot(model), outputs(model, images)
    with pytest.raises(ltm.RetrofitError, match="inference_mode"), torch.inference_mode(what == "call"):
        ltm.retrofit(model, example=example)
    assert snapshot(model) == parts and equal(outputs(model, images), before)
    with torch.no_grad():
        ltm.retrofit(build("timm-vit"))


@pytest.mark.parametrize("family", ["timm-vit", "hf-vit"])
def test_another_input_size_is_the_hosts_error_where_the_host_minds(converted, family):
    model = converted(family)
    with pytest.raises((AssertionError, ValueError)):
        model(torch.randn(1, 3, 48, 48))


def planned_for_48(model: nn.Module) -> list[int]:
    """Token counts after each site where 145 tokens go in and each site keeps its planned share of the patches."""
    counts, present = [], 145
    for row in ltm.get_plan(model).rows:
        if row.action == "merge":
            present = 1 + round((present - 1) * (row.tokens_out - 1) / (row.tokens_in - 1))
            counts.append(present)
    return counts


@pytest.mark.parametrize("method", METHODS)
def test_interpolated_positions_keep_the_planned_shares(converted, build, method):
    model, large = converted("hf-vit", method=method), torch.randn(2, 3, 48, 48)
    options = {"interpolate_pos_encoding": True}
    with ltm.trace(model) as traced:
        merged = outputs(model, large, **options)
    assert [t.shape for t in merged] == [(2, 7)] and bool(torch.isfinite(merged[0]).all())
    if method != "slice":  # which does not know its prefix tokens
        assert [step.assignment.kept.shape[1] for step in traced.merges] == planned_for_48(model)
    with ltm.disabled(model):
        assert equal(outputs(model, large, **options), outputs(build("hf-vit"), large, **options))


def test_dynamic_image_size_keeps_the_planned_shares():
    host = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=48, depth=6, num_heads=3, dynamic_img_size=True
    ).eval()
    model = ltm.retrofit(host)
    with ltm.trace(model) as traced, torch.no_grad():
        model(torch.randn(1, 3, 48, 48))
        assert [step.assignment.kept.shape[1] for step in traced.merges] == planned_for_48(model)
        model(torch.randn(1, 3, 32, 32))
        rows = [row for row in ltm.get_plan(model).rows if row.action == "merge"]
        assert [step.assignment.kept.shape[1] for step in traced.merges] == [row.tokens_out for row in rows]


def test_a_grid_of_merged_tokens_is_refused_by_name(converted, images):
    """ARCHITECTURE, 5: calls that reshape to a grid are refused by name, pointing to "full"."""
    with pytest.raises(ltm.RetrofitError, match="full"):
        converted("timm-vit").forward_intermediates(images, intermediates_only=True)


def test_an_attribute_of_our_name_is_refused(build):
    model = build("timm-vit")
    model.ltm = nn.Identity()
    with pytest.raises(UnsupportedBlock, match="attribute 'ltm'"):
        ltm.retrofit(model)
    assert isinstance(model.ltm, nn.Identity)


def test_a_keyword_example_and_the_default_config():
    config = tr.ViTConfig(
        hidden_size=48,
        num_attention_heads=3,
        image_size=32,
        patch_size=4,
        num_hidden_layers=4,
        intermediate_size=96,
        num_labels=7,
    )
    torch.manual_seed(0)
    example = {"pixel_values": torch.randn(2, 3, 32, 32)}
    model = ltm.retrofit(tr.ViTForImageClassification(config).eval(), example=example)
    assert 0.68 <= ltm.get_plan(model).share <= 0.7


CONFIG = ltm.LTMConfig(flops=0.7)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda m: ltm.retrofit("vit_tiny_patch16_224", CONFIG), UnsupportedBlock, "is a str"),
        (lambda m: ltm.retrofit(m, 0.7), RecipeError, r"LTMConfig\(flops=0.7\)"),
        (lambda m: ltm.retrofit(m, CONFIG, plan=ltm.make_plan(ltm.find_sites(m), CONFIG)), RecipeError, "not both"),
        (
            lambda m: ltm.retrofit(nn.Sequential(ltm.retrofit(m, CONFIG)), CONFIG, torch.randn(1, 3, 32, 32)),
            AlreadyRetrofitted,
            "part of this model",
        ),
        (lambda m: ltm.retrofit(m, CONFIG, torch.full((1, 3, 32, 32), float("nan"))), ExampleError, "not finite"),
        (lambda m: ltm.TrainConfig(lr="1e-4"), RecipeError, "1.0e-4"),
    ],
    ids=["model-name", "share-alone", "config-and-plan", "wrapped", "nan-example", "yaml-number"],
)
def test_wrong_arguments_are_named(build, call, error, said) -> None:
    with pytest.raises(error, match=said):
        call(build("timm-vit"))
