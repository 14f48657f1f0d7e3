"""Pictures of merging: the groups are a partition, every kind of input is drawn, the model is left as it was."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from zoo import ZOO

import ltm_retrofit as ltm
from ltm_retrofit.converted.record import forwards_of
from ltm_retrofit.errors import BudgetError, CountError, ExampleError, NotRetrofitted
from ltm_retrofit.finding.example import run
from ltm_retrofit.merging.methods import method_names
from ltm_retrofit.reporting import pictures
from ltm_retrofit.scopes import base, flow, local

Build = Callable[..., nn.Module]
SHARE = 0.75
METHODS = method_names()


def converted(build: Build, family: str = "timm-vit", method: str = "ltm") -> nn.Module:
    return ltm.retrofit(build(family), ltm.LTMConfig(flops=SHARE, method=method))


def merges(model: nn.Module) -> list[Any]:
    return [row for row in ltm.get_plan(model).rows if row.action == "merge"]


def titles(figure: Figure) -> list[str]:
    return [ax.get_title() for ax in figure.axes]


def photo(size: tuple[int, int] = (50, 41)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def test_every_family_has_one_panel_for_each_site(family: str, build: Build, images: Tensor) -> None:
    model = converted(build, family)
    rows = merges(model)
    assert len(rows) > 0
    expected = [f"{row.site} · {row.tokens_in} → {row.tokens_out} tokens" for row in rows]
    for given in (images, photo()):
        figure = ltm.show_merges(model, given)
        assert isinstance(figure, Figure)
        assert titles(figure)[1:] == expected


@pytest.mark.parametrize("method", ["ltm", "tome", "pool"])
@pytest.mark.parametrize("family", ["timm-vit", "hf-dinov2"])
def test_groups_are_a_partition_with_one_group_for_each_token(
    family: str, method: str, build: Build, images: Tensor
) -> None:
    model = converted(build, family, method)
    with torch.no_grad(), ltm.trace(model) as traced:
        run(model, images)
    prefix = next(forward.prefix for forward in forwards_of(model))
    rows = merges(model)
    for site, row in enumerate(rows):
        labels = flow.groups_of(traced.merges[: site + 1], prefix)
        assert labels.shape == (rows[0].tokens_in - prefix,)
        names = np.unique(labels)
        assert len(names) == row.tokens_out - prefix
        if method != "pool":  # a group is named after a patch of its own; boxes in boxes share their patches
            np.testing.assert_array_equal(labels[names], names)
        np.testing.assert_array_equal(np.flatnonzero(flow.survivors(traced.merges[: site + 1], prefix)), names)


def test_slicing_shows_what_it_drops(build: Build, images: Tensor) -> None:
    model = converted(build, method="slice")
    with torch.no_grad(), ltm.trace(model) as traced:
        model(images)
    for site, row in enumerate(merges(model)):
        alive = flow.survivors(traced.merges[: site + 1], prefix=1)
        np.testing.assert_array_equal(alive, np.arange(64) < row.tokens_out - 1)
    figure = ltm.show_merges(model, images)
    assert "dropped" in figure.get_supxlabel()
    assert not [text for ax in figure.axes for text in ax.texts]


def test_the_index_picks_the_image(build: Build, images: Tensor) -> None:
    model = converted(build)
    shown = ltm.show_merges(model, images, index=2).axes[0].images[0].get_array()
    np.testing.assert_allclose(shown, (images[2] * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0), atol=1e-6)
    single = ltm.show_merges(model, images[2]).axes[0].images[0].get_array()
    np.testing.assert_array_equal(shown, single)


def test_a_group_keeps_its_number_and_every_merged_patch_has_one(build: Build, images: Tensor) -> None:
    model = converted(build)
    with torch.no_grad(), ltm.trace(model) as traced:
        model(images[:1])
    labelled = [flow.groups_of(traced.merges[: site + 1], 1) for site in range(len(traced.merges))]
    names = base.names_of(labelled)
    for labels, ax in zip(labelled, ltm.show_merges(model, images).axes[1:], strict=True):
        counts = np.bincount(labels, minlength=64)
        expected = {
            (place % 8, place // 8): str(names.index(label) + 1)
            for place, label in enumerate(labels.tolist())
            if counts[label] > 1
        }
        drawn = {(int(text.get_position()[0]), int(text.get_position()[1])): text.get_text() for text in ax.texts}
        assert drawn == expected


def test_boundaries_lie_between_different_groups_only() -> None:
    assert pictures.boundaries(np.zeros((3, 4), dtype=int)) == []
    lines = pictures.boundaries(np.array([[0, 0, 1], [0, 2, 1]]))
    assert {(tuple(start), tuple(end)) for start, end in lines} == {
        ((2, 0), (2, 1)),
        ((1, 1), (1, 2)),
        ((2, 1), (2, 2)),
        ((1, 1), (2, 1)),
    }


def test_the_grid_of_patches() -> None:
    assert base.patch_grid(64, 64, 64) == (8, 8)
    assert base.patch_grid(8, 32, 64) == (2, 4)
    assert base.patch_grid(9, 32, 32) == (3, 3)  # a stem that leaves a margin
    with pytest.raises(CountError, match="10 patches of a 32×32 image"):
        base.patch_grid(10, 32, 32)


# ---------------------------------------------------------------------------------------------- scopes GRID and LOCAL


def of_zoo(name: str, method: str, scope: str, share: float = 0.8) -> tuple[nn.Module, Tensor]:
    model, example = ZOO[name]()
    assert isinstance(example, Tensor)
    sites = ltm.find_sites(model, example)
    try:
        plan = ltm.make_plan(sites, ltm.LTMConfig(flops=share, method=method, scope=scope))
    except BudgetError as error:
        plan = ltm.make_plan(sites, ltm.LTMConfig(flops=error.nearest, method=method, scope=scope))
    return ltm.retrofit(model, example=example, plan=plan), example


def drawn(model: nn.Module, image: Tensor) -> list[base.Panel]:
    with torch.no_grad(), ltm.trace(model) as traced:
        run(model, image)
    return list(pictures.panels_of(model, traced, tuple(image.shape[-2:])).values())


@pytest.mark.parametrize("method", METHODS)
def test_local_groups_lie_in_cells_with_one_group_for_each_token(method: str) -> None:
    model, image = of_zoo("timm-swin", method, "LOCAL")
    rows, panels = merges(model), drawn(model, image)
    assert {row.scope for row in rows} == {"LOCAL"} and 2 <= len(panels) == min(len(rows), local.FEW)
    for panel in panels:
        row = next(row for row in rows if panel.title.startswith(f"{row.site} ·"))
        forward = next(f for f in forwards_of(model) if f.name == row.site)
        height, width = panel.groups.shape
        assert forward.layout.grid == (height, width) and height * width == row.tokens_in
        names = np.unique(panel.groups)
        assert panel.alive.sum() == row.tokens_out
        assert len(names) == row.tokens_out
        np.testing.assert_array_equal(panel.groups.ravel()[names], names)  # a group is named after a patch of its own
        cell = forward.cell
        place = np.indices((height, width)).reshape(2, -1)
        cells = place[0] // cell[0] * (width // cell[1]) + place[1] // cell[1]
        np.testing.assert_array_equal(cells, cells[panel.groups.ravel()])  # nothing merges across cells
    figure = ltm.show_merges(model, image)
    assert titles(figure)[1:] == [panel.title for panel in panels]
    assert ("dropped" in figure.get_supxlabel()) == (method == "slice") and "LOCAL" in figure.get_supxlabel()


def test_cells_are_drawn_where_their_tokens_lie() -> None:
    """Two tokens of one cell that the trace says were merged have one colour, read off the assignment one by one."""
    model, image = of_zoo("timm-swin", "tome", "LOCAL")
    with torch.no_grad(), ltm.trace(model) as traced:
        model(image)
    panel, row = drawn(model, image)[0], merges(model)[0]
    forward = next(f for f in forwards_of(model) if f.name == row.site)
    (h, w), (rows, columns) = forward.cell, panel.groups.shape
    dense = traced.by_site[row.site].assignment.dense()
    for number, matrix in enumerate(dense):
        top, left = number // (columns // w) * h, number % (columns // w) * w
        inside = panel.groups[top : top + h, left : left + w].ravel()
        together = matrix.argmax(dim=1)
        np.testing.assert_array_equal(inside[:, None] == inside, (together[:, None] == together).numpy())
    assert len(dense) == rows * columns // (h * w)


def test_few_of_many_local_sites_are_drawn(build: Build, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ltm.retrofit(build("timm-vit"), ltm.LTMConfig(flops=0.8, scope="LOCAL"))
    sites = [row.site for row in merges(model)]
    assert len(sites) == 6 and len(ltm.show_merges(model, images).axes) == 7
    monkeypatch.setattr(local, "FEW", 3)
    figure = ltm.show_merges(model, images)
    assert [title.partition(" ·")[0] for title in titles(figure)[1:]] == [sites[0], sites[2], sites[5]]
    assert "3 of 6 such sites" in " ".join(figure.get_supxlabel().split())


@pytest.mark.parametrize("method", ["ltm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("pool", "slice"))])
def test_a_smaller_grid_is_drawn_by_who_takes_most_of_each_place(method: str) -> None:
    model, image = of_zoo("timm-efficientvit-mit-b", method, "GRID")
    rows, panels = merges(model), drawn(model, image)
    assert len(rows) == len(panels) > 0 and {row.scope for row in rows} == {"GRID"}
    for row, panel in zip(rows, panels, strict=True):
        height, width = panel.groups.shape
        assert height * width == row.tokens_in and row.grid is not None
        assert panel.title == f"{row.site} · {height}×{width} → {row.grid[0]}×{row.grid[1]} tokens"
        if method == "slice":
            assert panel.alive[: row.grid[0], : row.grid[1]].all() and panel.alive.sum() == row.tokens_out
            continue
        assert panel.alive.all() and len(np.unique(panel.groups)) == row.tokens_out
        if method == "pool":  # boxes side by side: each place belongs to the box that covers most of it
            for axis, (size, kept) in enumerate(zip((height, width), row.grid, strict=True)):
                line = panel.groups[:, 0] if axis == 0 else panel.groups[0]
                cover = np.array(
                    [
                        [min((p + 1) * size, (j + 1) * kept) - max(p * size, j * kept) for p in range(kept)]
                        for j in range(size)
                    ]
                )
                boxes = cover.argmax(axis=1)
                np.testing.assert_array_equal(line[1:] == line[:-1], boxes[1:] == boxes[:-1])
    figure = ltm.show_merges(model, image)
    assert titles(figure)[1:] == [panel.title for panel in panels]
    assert ("dropped" if method == "slice" else "GRID") in figure.get_supxlabel()


def test_sequences_whose_place_is_not_known_are_drawn_without_the_image() -> None:
    model, image = of_zoo("timm-mobilevit", "tome", "LOCAL", 0.95)
    panels = drawn(model, image)
    assert not any(panel.placed for panel in panels)
    figure = ltm.show_merges(model, image)
    assert all(title.endswith("\nthe first of 4 sequences") for title in titles(figure)[1:])
    assert "plain grey" in " ".join(figure.get_supxlabel().split())
    assert np.unique(figure.axes[1].images[0].get_array()).tolist() == [0.75]


def test_grey_and_oblong_images(build: Build) -> None:
    del build
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=(16, 32), patch_size=4, in_chans=1, embed_dim=48, depth=6, num_heads=3
    ).eval()
    ltm.retrofit(model, ltm.LTMConfig(tokens=(25, 20, 15)))
    for given in (torch.randn(1, 16, 32), photo()):
        figure = ltm.show_merges(model, given)
        assert len(figure.axes) == 4
        assert figure.axes[1].get_xlim() == (0, 8) and figure.axes[1].get_ylim() == (4, 0)


def test_the_model_and_the_random_state_are_left_alone(build: Build, images: Tensor) -> None:
    model = converted(build).train()
    model.blocks[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    state = torch.get_rng_state()
    ltm.show_merges(model, images.requires_grad_())
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_figure_can_be_written_and_shows_itself_in_a_notebook(build: Build, images: Tensor) -> None:
    figure = ltm.show_merges(converted(build), images)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=40)
    assert buffer.getvalue().startswith(b"\x89PNG")
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_errors(build: Build, images: Tensor) -> None:
    with pytest.raises(NotRetrofitted):
        ltm.show_merges(build("timm-vit"), images)
    model = converted(build)
    with pytest.raises(ExampleError, match="index is 3; expected 0 to 2"):
        ltm.show_merges(model, images, index=3)
    with pytest.raises(ExampleError, match=r"uint8 .* expected a PIL image"):
        ltm.show_merges(model, torch.zeros(3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ExampleError, match="converted for"):
        ltm.show_merges(model, torch.zeros(3, 40, 32))
    with pytest.raises(ExampleError, match="image is str"):
        ltm.show_merges(model, "cat.jpg")
    with ltm.disabled(model), pytest.raises(CountError, match="disabled at the moment"):
        ltm.show_merges(model, images)
