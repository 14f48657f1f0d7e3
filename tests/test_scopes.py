"""FLOW, GRID and LOCAL: forcing one, what each keeps exact, and input sizes other than the example's."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import timm
import torch
import transformers as tr
from conversions import batch, call, convert, converted, near, randomise, scopes
from torch import Tensor, nn
from zoo import ZOO, picture
from zoo_hf import HF
from zoo_timm import TIMM

import ltm_retrofit as ltm
from ltm_retrofit.converted.record import forwards_of, masks_of
from ltm_retrofit.finding.call import gather_entries
from ltm_retrofit.macs import count_macs
from ltm_retrofit.merging.mask import GridMask
from ltm_retrofit.merging.pool import PoolGrid
from ltm_retrofit.merging.slice import CropGrid
from ltm_retrofit.scopes.flow.forward import FlowForward
from ltm_retrofit.scopes.grid.forward import GridForward
from ltm_retrofit.scopes.local.forward import LocalForward

torch.set_num_threads(1)
VIT = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7}
SWIN = {"patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (1, 2, 2, 1), "num_heads": (1, 2, 4, 8)}
EFFICIENT = {"widths": (8, 8, 16, 32, 32), "depths": (1, 1, 1, 2, 2), "head_dim": 8, "head_widths": (32, 32)}


# ------------------------------------------------------------------------------------------------------ forcing a scope


@pytest.mark.parametrize(
    "name, scope",
    [
        ("timm-vit", "FLOW"),
        ("timm-vit", "LOCAL"),
        ("timm-eva-dinov3", "LOCAL"),
        ("hf-vit", "LOCAL"),
        ("timm-swin", "LOCAL"),
        ("timm-efficientvit-mit-b", "GRID"),
    ],
)
def test_a_scope_can_be_forced(name, scope):
    model, example = ZOO[name]()
    before = [tensor.shape for tensor in call(model, example)]
    convert(model, example, flops=0.9, scope=scope)
    assert scopes(model) == {scope}
    kinds = {"FLOW": FlowForward, "GRID": GridForward, "LOCAL": LocalForward}
    assert {type(forward) for forward in forwards_of(model)} == {kinds[scope]}
    assert count_macs(model, example).total == ltm.get_plan(model).macs
    assert [tensor.shape for tensor in call(model, example)] == before


@pytest.mark.parametrize("name, scope", [("timm-vit", "GRID"), ("hf-vit", "GRID"), ("timm-swin", "FLOW")])
def test_a_scope_that_is_not_proven_is_refused_by_name(name, scope):
    model, example = ZOO[name]()
    with pytest.raises(ltm.UnsupportedBlock, match=f"scope='{scope}' is not proven"):
        ltm.retrofit(model, ltm.LTMConfig(flops=0.8, scope=scope), example)
    assert not ltm.is_retrofitted(model)


@pytest.mark.slow
def test_sites_that_are_not_in_the_forced_scope_are_refused():
    sites = ltm.find_sites(*ZOO["timm-mobilevit"]())
    with pytest.raises(ltm.UnsupportedBlock, match=r"none of sites=\('stages.2.1.transformer.0',\) is in scope GRID"):
        ltm.make_plan(sites, ltm.LTMConfig(flops=0.9, scope="GRID", sites=("stages.2.1.transformer.0",)))


@pytest.mark.parametrize("scope", ["flow", "WINDOW", "", 1])
def test_an_unknown_scope_is_refused(scope):
    with pytest.raises(ltm.RecipeError, match="scope must be one of 'FLOW', 'GRID', 'LOCAL'"):
        ltm.LTMConfig(flops=0.8, scope=scope)


@pytest.mark.parametrize("method", ["tome", "pool", "slice"])
@pytest.mark.parametrize("name", ["timm-vit-local", "timm-efficientvit-grid"])
def test_baselines_run_in_every_scope_or_are_refused_by_name(name, method):
    _, model, example = converted(name)
    if method == "tome" and "grid" in name:
        with pytest.raises(ltm.RecipeError, match="tome"):
            convert(model, example, method=method, scope="GRID")
        return
    before = call(model, example)
    convert(model, example, method=method, scope="LOCAL" if "local" in name else "GRID")
    assert count_macs(model, example).total == ltm.get_plan(model).macs
    after = call(model, example)
    assert [t.shape for t in after] == [t.shape for t in before] and bool(torch.isfinite(after[0]).all())


# ----------------------------------------------------------------------------------------- FLOW: rows follow the tokens


@pytest.mark.parametrize("name", ["timm-eva-dinov3", "timm-eva-rope-mixed", "timm-eva02", "hf-dinov3"])
def test_rows_follow_their_tokens(name):
    """Patch tokens in another order, their rows gathered with them, give the same results in that order."""
    model, example = ZOO[name]()
    site = ltm.find_sites(model, example).of("FLOW")[1]
    block, calls = model.get_submodule(site.block), []

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        calls.append((args, kwargs))

    handle = block.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        call(model, example)
        handle.remove()
        tokens, followers, _ = site.signature.split(site.block, *calls[0])
        count, prefix = tokens.shape[1], site.layout.prefix
        front = site.halves[False, False].front
        order = torch.cat(
            [torch.arange(prefix), prefix + torch.randperm(count - prefix, generator=torch.Generator().manual_seed(2))]
        )
        entries = tuple(gather_entries(value, count, order.expand(len(tokens), -1)) for value in followers)
        whole, _ = front(block, tokens, None, followers)
        moved, _ = front(block, tokens[:, order], None, entries)
        near([moved], [whole[:, order]])
        unmoved, _ = front(block, tokens[:, order], None, followers)
        assert not torch.allclose(unmoved, whole[:, order], rtol=1e-4, atol=1e-5)  # the entries matter


# ------------------------------------------------------------------------------------------------- LOCAL: equal tokens


@pytest.mark.parametrize("method", ["ltm", "tome", "pool"])
@pytest.mark.parametrize(
    "name", ["timm-vit", "timm-swin", "hf-swin", pytest.param("timm-mobilevit", marks=pytest.mark.slow)]
)
def test_equal_tokens_of_a_cell_survive(name, method):
    model, example = ZOO[name]()
    before: dict[str, torch.Size] = {}
    for site in ltm.find_sites(model, example).of("LOCAL"):

        def keep(module: nn.Module, args: tuple, name: str = site.block) -> None:
            before[name] = args[0].shape

        handle = model.get_submodule(site.chain[0]).register_forward_pre_hook(keep)
        call(model, example)
        handle.remove()
    convert(model, example, flops=0.9, scope="LOCAL", method=method)
    forwards = [forward for forward in forwards_of(model) if isinstance(forward, LocalForward)]
    checked = 0
    for place, forward in enumerate(forwards):
        if not forward.first:
            continue
        chain = [other for other in forwards[place:] if other.name == forward.name]
        shape = before[forward.name]
        axis = 1 if forward.order == "BCHW" else -1
        one = torch.randn(shape[axis], generator=torch.Generator().manual_seed(place))
        tokens = one.view([-1 if d == axis % len(shape) else 1 for d in range(len(shape))]).expand(shape).contiguous()
        results = []
        with torch.no_grad():
            for mode in ("merge", "original"):
                out = tokens.clone()
                for link in chain:
                    link.mode = mode
                    out = link.block(out)
                results.append(out)
        assert results[0].shape == results[1].shape
        near([results[0]], [results[1]])
        checked += 1
    assert checked == len(ltm.get_plan(model).rows)


@pytest.mark.parametrize("name, lead, trail", [("hf-yolos", 1, 5), ("timm-vit", 1, 0)])
def test_prefix_and_detection_tokens_are_never_merged(name, lead, trail):
    model, example = ZOO[name]()
    convert(model, example, flops=0.9, scope="LOCAL")
    firsts = [f for f in forwards_of(model) if isinstance(f, LocalForward) and f.first]
    assert len(firsts) == len(ltm.get_plan(model).rows) > 0
    for forward in firsts:
        assert (forward.layout.prefix, forward.layout.trail) == (lead, trail)
        shape = (2, forward.layout.tokens, forward.dim)
        tokens = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        cells = forward.cells(forward.layout.tokens, ())
        with torch.no_grad():
            short, opened = forward.merge(tokens)
        assert opened is not None and short.shape[1] < tokens.shape[1]
        assert torch.equal(short[:, :lead], tokens[:, :lead])
        assert torch.equal(short[:, short.shape[1] - cells.rest :], tokens[:, tokens.shape[1] - cells.rest :])
        assert cells.rest >= trail


@pytest.mark.parametrize("name", ["timm-vit", "timm-swin"])
def test_tokens_of_one_cell_do_not_see_another_cell(name):
    model, example = ZOO[name]()
    convert(model, example, flops=0.9, scope="LOCAL")
    forward = next(f for f in forwards_of(model) if isinstance(f, LocalForward) and f.first)
    cells = forward.cells(forward.layout.tokens, () if forward.order == "BNC" else forward.layout.grid)
    if cells.per_sequence < 2:
        pytest.skip("one cell holds all tokens")
    shape = (1, forward.layout.tokens, forward.dim)
    tokens = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    lead, groups, rest = cells.apart(tokens)
    assert torch.equal(cells.together(lead, groups, rest), tokens)


# ---------------------------------------------------------------------------------------------------------- GRID alone


@pytest.mark.parametrize("grid", [(8, 8), (5, 7), (1, 9)])
@pytest.mark.parametrize("kind", ["learnable", "pool", "crop"])
def test_a_grid_of_the_same_size_is_the_identity(grid, kind):
    plain = {"pool": PoolGrid, "crop": CropGrid}
    mask = plain[kind](6, grid, grid) if kind in plain else GridMask(6, 4, grid, grid)
    tokens = torch.randn(2, grid[0] * grid[1], 6)
    merged, kept, step = mask(tokens, grid)
    assert kept == grid
    near([merged, step.assignment.unmerge(merged)], [tokens, tokens])


def test_a_grid_mask_keeps_the_same_share_at_another_size():
    mask = GridMask(6, 4, (8, 8), (6, 6))
    for grid, kept in {(16, 16): (12, 12), (7, 9): (6, 7), (1, 1): (1, 1), (4, 8): (3, 6)}.items():
        merged, got, _ = mask(torch.randn(1, grid[0] * grid[1], 6), grid)
        assert got == kept and merged.shape == (1, kept[0] * kept[1], 6)


# ---------------------------------------------------------------------------------------------------- other input sizes


def _vit(**changes: object) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **{**VIT, "dynamic_img_size": True, **changes})


def _swin() -> nn.Module:
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=64, num_classes=7, strict_img_size=False, **SWIN)


def _efficientvit() -> nn.Module:
    return timm.create_model("efficientvit_b0", num_classes=7, **EFFICIENT)


def _hf_swin() -> nn.Module:
    """Three stages: where a stage is smaller than its window, Hugging Face's Swin fails by itself."""
    sizes = {"image_size": 64, "embed_dim": 16, "depths": [1, 2, 2], "num_heads": [1, 2, 4]}
    return tr.SwinForImageClassification(tr.SwinConfig(patch_size=2, window_size=4, num_labels=7, **sizes))


SIZED: dict[str, tuple[Callable[[], nn.Module], int, dict]] = {
    "vit-flow": (_vit, 32, {}),
    "vit-avg-flow": (lambda: _vit(global_pool="avg"), 32, {}),
    "vit-local": (_vit, 32, {"scope": "LOCAL"}),
    "vit-full": (_vit, 32, {"output_tokens": "full"}),
    "vit-tome": (_vit, 32, {"method": "tome"}),
    "vit-pool": (_vit, 32, {"method": "pool"}),
    "vit-local-pool": (_vit, 32, {"scope": "LOCAL", "method": "pool"}),
    "dinov3-flow": (
        lambda: timm.create_model("vit_small_patch16_dinov3", **{**VIT, "dynamic_img_size": True}), 32, {},
    ),
    "swin-local": (_swin, 64, {}),
    "efficientvit-grid": (_efficientvit, 128, {"scope": "GRID"}),
    "efficientvit-grid-pool": (_efficientvit, 128, {"method": "pool", "scope": "GRID"}),
    "vit-padded": (lambda: _vit(dynamic_img_pad=True), 32, {}),
    "mobilevit-local": (TIMM["timm-mobilevit"][0], 64, {}),
    "pvt-local": (TIMM["timm-pvt-v2"][0], 128, {}),
    "hf-swin-local": (_hf_swin, 64, {}),
    "hf-segformer-local": (HF["hf-segformer"][0], 128, {}),
}  # fmt: skip
#: the hosts that take images whose sides no patch divides
ANY = ("vit-padded", "efficientvit-grid", "mobilevit-local", "pvt-local", "hf-swin-local", "hf-segformer-local")
# rows and columns of the input, as multiples of the example's
SIZES = {"twice": (2.0, 2.0), "wide": (1.0, 1.5), "tall": (1.75, 0.75), "smaller": (0.5, 0.5), "odd": (1.25, 1.125)}
UNEVEN = {"uneven": (67 / 64, 93 / 64), "thin": (131 / 128, 45 / 64)}  # times 32, 64 or 128: nothing divides them
_SIZED: dict[str, tuple[nn.Module, nn.Module]] = {}


def sized(name: str) -> tuple[nn.Module, nn.Module, int]:
    """Return a converted model, its original, and the side of its example; nobody changes them."""
    build, side, options = SIZED[name]
    if name not in _SIZED:
        original, model = randomise(build()), randomise(build())
        _SIZED[name] = convert(model, picture(side), **options), original
    return *_SIZED[name], side


def _cases(fast: tuple[str, ...]) -> list[object]:
    """Every host at every size that it takes; slow but for the sizes that CI runs, and for baselines."""
    cases = [(name, size) for name in SIZED for size in (*SIZES, *(UNEVEN if name in ANY else ()))]
    return [
        pytest.param(*case, marks=[] if case[1] in fast and not case[0].endswith("pool") else pytest.mark.slow)
        for case in cases
    ]


def _resized(side: int, size: str, count: int = 1) -> Tensor:
    height, width = (int(side * share) for share in {**SIZES, **UNEVEN}[size])
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("count", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name, size", _cases((*SIZES, *UNEVEN)))
def test_another_input_size_runs(name, size, count):
    model, original, side = sized(name)
    images = _resized(side, size, count)
    with torch.no_grad():
        expected, given = call(original, images), call(model, images)
    assert [t.shape for t in given] == [t.shape for t in expected]
    assert all(bool(torch.isfinite(t).all()) for t in given)
    assert any(not torch.equal(a, b) for a, b in zip(given, expected, strict=True))
    with ltm.disabled(model), torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(call(model, images), expected, strict=True))


@pytest.mark.parametrize("name, size", _cases(("twice", "uneven")))
def test_another_input_size_saves_its_share(name, size):
    model, original, side = sized(name)
    images = _resized(side, size)
    share = count_macs(model, images).total / count_macs(original, images).total
    planned = ltm.get_plan(model).share
    assert share < (1 + planned) / 2, f"{tuple(images.shape)}: {share:.3f} of the MACs, planned {planned:.3f}"


@pytest.mark.parametrize("name", ["vit-flow", "vit-local", "swin-local", "efficientvit-grid"])
def test_training_works_at_another_size(name):
    model, _, side = sized(name)
    model = copy.deepcopy(model).train()
    model(torch.randn(2, 3, int(1.5 * side), int(1.5 * side))).square().sum().backward()
    for mask in masks_of(model).values():
        for key, parameter in mask.named_parameters():
            assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), key


def test_each_image_of_a_batch_is_merged_for_itself():
    """What one image gives does not depend on those beside it, windows and cells included."""
    for name in ("timm-vit-local", "timm-swin-local", "timm-efficientvit-grid", "hf-swin-local", "timm-vit-flow"):
        model, _, example = converted(name)
        images = batch(example, 3)
        with torch.no_grad():
            together, alone = call(model, images)[0], torch.cat([call(model, images[i : i + 1])[0] for i in range(3)])
        assert math.isfinite(float(together.sum()))
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
