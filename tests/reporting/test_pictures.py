"""Pictures of merging: the groups are a partition, every kind of input is drawn, the model is left as it was."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from zoo import ZOO

import ltm_retrofit as ltm
from ltm_retrofit.converted.record import forwards_of
from ltm_retrofit.errors import BudgetError, CountError, DataError, ExampleError, NotRetrofitted
from ltm_retrofit.finding.example import run
from ltm_retrofit.merging.methods import method_names
from ltm_retrofit.reporting import pictures, superpixels
from ltm_retrofit.scopes import base, flow

Build = Callable[..., nn.Module]
SHARE = 0.75
METHODS = method_names()


def converted(build: Build, family: str = "timm-vit", method: str = "ltm") -> nn.Module:
    return ltm.retrofit(build(family), ltm.LTMConfig(flops=SHARE, method=method))


def merges(model: nn.Module) -> list[Any]:
    return [row for row in ltm.get_plan(model).rows if row.action == "merge"]


def titles(figure: Figure) -> list[str]:
    return [ax.get_title() for ax in figure.axes]


def place(site: str, depth: int) -> str:
    return f"block {int(site.rpartition('.')[2]) + 1} of {depth}"


def photo(size: tuple[int, int] = (50, 41)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def test_every_family_has_one_panel_for_each_site(family: str, build: Build, images: Tensor) -> None:
    model = converted(build, family)
    rows = merges(model)
    assert len(rows) > 0
    first = rows[0].tokens_in
    expected = [f"after {place(row.site, 6)}: {row.tokens_out} of {first} tokens" for row in rows]
    for given in (images[0], photo()):
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
    with pytest.raises(ExampleError, match="slicing merges nothing"):
        ltm.show_merges(model, images[0], highlight=(1, 1))
    figure = ltm.show_merges(model, images[0])
    assert "dropped" in figure.get_supxlabel()
    assert not [text for ax in figure.axes for text in ax.texts]


def test_the_index_picks_the_image(build: Build, images: Tensor) -> None:
    model = converted(build)
    shown = ltm.show_merges(model, images, index=2).axes[0].images[0].get_array()
    np.testing.assert_allclose(shown, (images[2] * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0), atol=1e-6)
    single = ltm.show_merges(model, images[2]).axes[0].images[0].get_array()
    np.testing.assert_array_equal(shown, single)


def flow_groups(model: nn.Module, image: Tensor) -> list[np.ndarray]:
    with torch.no_grad(), ltm.trace(model) as traced:
        run(model, image)
    return [flow.groups_of(traced.merges[: site + 1], 1).reshape(8, 8) for site in range(len(traced.merges))]


def numbered(ax: Any) -> dict[tuple[int, int], str]:
    """The (row, column) of each number that is written, and the number."""
    return {(int(text.get_position()[1]), int(text.get_position()[0])): text.get_text() for text in ax.texts}


def edges(ax: Any) -> list[tuple[str, set[Any]]]:
    """The colour of each coloured edge, and its lines."""
    found = []
    for collection in ax.collections:
        colour = to_hex(collection.get_color()[0])
        if colour in pictures.COLOURS:
            found.append((colour, {tuple(map(tuple, line.tolist())) for line in collection.get_segments()}))
    return found


def test_the_largest_groups_have_an_edge_of_one_colour_at_every_site_and_their_size(
    build: Build, images: Tensor
) -> None:
    model = ltm.retrofit(build("timm-vit"), ltm.LTMConfig(flops=0.6))
    groups = flow_groups(model, images[:1])
    assert len(groups) > 2
    axes = ltm.show_merges(model, images[0]).axes[1:]
    # what has each colour at the last site: the largest groups
    last = {colour: lines for colour, lines in edges(axes[-1])}
    sizes = sorted(np.unique(groups[-1], return_counts=True)[1], reverse=True)[:5]
    assert len(last) == 5 and sorted(map(int, numbered(axes[-1]).values()), reverse=True) == sizes
    held: dict[str, np.ndarray] = {}
    coloured = 0
    for labels, ax in zip(groups, axes, strict=True):
        inside = {}
        for (row, column), number in numbered(ax).items():
            own = labels == labels[row, column]
            assert int(number) == own.sum() > 1
            (colour,) = [c for c, lines in edges(ax) if lines == set(superpixels.outline(own))]
            inside[colour] = own
        assert len(inside) == len(edges(ax))
        for colour, earlier in held.items():  # whoever has a colour keeps it, and only grows
            assert (inside[colour] & earlier).sum() == earlier.sum()
        held, coloured = inside, coloured + len(inside)
    assert coloured > len(held)  # some were followed


def test_each_pixel_of_a_group_has_the_mean_of_its_pixels(build: Build, images: Tensor) -> None:
    model = converted(build)
    axes = ltm.show_merges(model, images[0]).axes
    photograph = np.asarray(axes[0].images[0].get_array())
    for labels, ax in zip(flow_groups(model, images[:1]), axes[1:], strict=True):
        drawn, merged = np.asarray(ax.images[0].get_array()), 0
        pixels = labels.repeat(4, axis=0).repeat(4, axis=1)
        for label in np.unique(labels):
            own = pixels == label
            if own.sum() > 16:
                merged += 1
                np.testing.assert_allclose(
                    drawn[own], np.broadcast_to(photograph[own].mean(axis=0), drawn[own].shape), 1e-6
                )
            else:
                np.testing.assert_array_equal(drawn[own], photograph[own])
        assert merged


def test_lines_are_drawn_exactly_where_different_groups_meet(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a grey image nothing but the lines shows: each side of two patches is looked at in the rendered picture."""
    model = converted(build)
    monkeypatch.setattr(pictures, "_coloured", lambda plan, panels: [{}] * len(panels))
    grey = torch.full((3, 32, 32), 0.2)
    figure = ltm.show_merges(model, grey)
    figure.set_dpi(200)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    rendered = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)
    labels, ax = flow_groups(model, grey[None])[0], figure.axes[1]
    sizes = superpixels.sizes_of(labels)

    def spread(x: float, y: float) -> int:
        column, row = ax.transData.transform((x, y))
        row, column = round(rendered.shape[0] - row), round(column)
        around = rendered[row - 8 : row + 9, column - 8 : column + 9]
        return int(around.max() - around.min())

    seen = set()
    sides = [((row, column), (row, column + 1), column + 1, row + 0.5) for row, column in np.ndindex(8, 7)]
    sides += [((row, column), (row + 1, column), column + 0.5, row + 1) for row, column in np.ndindex(7, 8)]
    for one, other, x, y in sides:
        meets = bool(labels[one] != labels[other] and max(sizes[one], sizes[other]) > 1)
        assert (spread(x, y) > 60) == meets, (one, other)
        seen.add(meets)
    assert seen == {True, False}


def test_a_highlighted_group_is_drawn_in_full_and_the_rest_dimmed(build: Build, images: Tensor) -> None:
    model = converted(build)
    groups = flow_groups(model, images[:1])
    sizes = superpixels.sizes_of(groups[-1])
    row, column = np.unravel_index(sizes.argmax(), sizes.shape)
    figure = ltm.show_merges(model, images[0], highlight=(int(column) * 4 + 3, int(row) * 4))
    photograph = np.asarray(figure.axes[0].images[0].get_array())
    assert [line.get_xydata().tolist() for line in figure.axes[0].lines] == [[[column + 0.75, row]]]
    for labels, ax in zip(groups, figure.axes[1:], strict=True):
        inside = labels == labels[row, column]
        drawn = np.asarray(ax.images[0].get_array())
        own = inside.repeat(4, axis=0).repeat(4, axis=1)
        np.testing.assert_array_equal(drawn[own], photograph[own])
        rest = drawn[~own]
        assert np.ptp(rest, axis=1).max() < 1e-9 and rest.min() > 0.7  # grey and pale
        assert list(numbered(ax).values()) == [str(inside.sum())]
        ((_, lines),) = edges(ax)
        assert lines == set(superpixels.outline(inside))
    assert "dimmed" in figure.get_supxlabel() and f"({column * 4 + 3}, {row * 4})" in figure.get_supxlabel()


def test_a_path_an_image_and_its_tensor_give_the_same_picture(build: Build, tmp_path: Path) -> None:
    model, image = converted(build), photo()
    image.save(tmp_path / "cat.png")
    made = [tmp_path / "cat.png", str(tmp_path / "cat.png"), image, ltm.load_images(model, [image])[0]]
    figures = [ltm.show_merges(model, given) for given in made]
    for figure in figures[1:]:
        assert titles(figure)[1:] == titles(figures[0])[1:]
        for one, other in zip(figure.axes, figures[0].axes, strict=True):
            np.testing.assert_array_equal(one.images[0].get_array(), other.images[0].get_array())
            assert numbered(one) == numbered(other) and edges(one) == edges(other)
    assert [titles(figure)[0] for figure in figures] == [
        *["cat.png as the model sees it\n76 % of its width, 91 % of its height"] * 2,
        "image 0 as the model sees it\n76 % of its width, 91 % of its height",
        "image 0 as the model sees it",
    ]


def test_a_batch_and_a_folder_have_a_row_an_image(build: Build, images: Tensor, tmp_path: Path) -> None:
    model = converted(build)
    sites = len(merges(model))
    figure = ltm.show_merges(model, images)
    assert len(figure.axes) == 3 * (1 + sites)
    for index, image in enumerate(images):
        alone = ltm.show_merges(model, image)
        for one, other in zip(figure.axes[index * (1 + sites) :], alone.axes, strict=False):
            np.testing.assert_array_equal(one.images[0].get_array(), other.images[0].get_array())
        first = figure.axes[index * (1 + sites)].get_title()
        assert first.startswith(f"image {index} as the model sees it\nanswer before merging: class ")
        assert alone.get_suptitle() == "  →  ".join(first.split("\n")[1:])
    for number in range(pictures.IMAGES + 2):
        photo().save(tmp_path / f"{number:02}.png")
    figure = ltm.show_merges(model, tmp_path)
    assert len(figure.axes) == pictures.IMAGES * (1 + sites)
    assert f"the first {pictures.IMAGES} of {pictures.IMAGES + 2} images" in figure.get_supxlabel()


def test_the_title_has_both_answers_and_their_probabilities(build: Build, images: Tensor) -> None:
    model = converted(build, "hf-vit")
    model.config.id2label = dict(enumerate(("cat", "dog", "newt, red", "owl", "ox", "elk", "bee")))
    with torch.no_grad():
        after = model(images[:1]).logits.softmax(dim=-1)[0]
        with ltm.disabled(model):
            before = model(images[:1]).logits.softmax(dim=-1)[0]
    names = ("cat", "dog", "newt", "owl", "ox", "elk", "bee")
    assert ltm.show_merges(model, images[0]).get_suptitle() == (
        f"answer before merging: {names[before.argmax()]}, {100 * before.max():.1f} %  →  "
        f"after merging: {names[after.argmax()]}, {100 * after.max():.1f} %"
    )
    assert ltm.show_merges(converted(build, "hf-clip"), images[0]).get_suptitle() == ""  # it has no classes


def test_blocks_are_named_in_plain_words() -> None:
    model = nn.Module()
    model.stages = nn.ModuleList(
        nn.ModuleDict({"blocks": nn.ModuleList(nn.Identity() for _ in range(n))}) for n in (2, 3)
    )
    model.stages[1]["blocks"][1].add_module("grid", nn.Identity())
    model.alone = nn.Identity()
    words = ("stages.0.blocks.1", "stages.1.blocks.2", "stages.1.blocks.1.grid", "alone", "")
    assert [pictures.block_in_words(model, name) for name in words] == [
        "block 2 of 5",
        "block 5 of 5",
        "block 4 of 5",
        "block 'alone'",
        "the block",
    ]


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
    assert {row.scope for row in rows} == {"LOCAL"} and 2 <= len(panels) == len(rows)
    for row, panel in zip(rows, panels, strict=True):
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
    rows, panels = ([each[place] for place in (0, 1, 2, 4, 5)] for each in (rows, panels))  # five of six
    assert titles(figure)[1:] == [
        f"inside {pictures.block_in_words(model, row.site)}: {row.tokens_out} of {row.tokens_in} tokens" for row in rows
    ]
    assert ("dropped" in figure.get_supxlabel()) == (method == "slice") and "LOCAL" in figure.get_supxlabel()
    if method == "tome":  # each panel has its own largest groups
        for panel, ax in zip(panels, figure.axes[1:], strict=True):
            sizes = np.unique(panel.groups, return_counts=True)[1]
            assert sorted(map(int, numbered(ax).values())) == sorted(sizes[sizes > 1])[-5:]


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


@pytest.mark.parametrize("scope", ["LOCAL", "FLOW"])
def test_few_of_many_sites_are_drawn(scope: str, build: Build, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ltm.retrofit(build("timm-vit"), ltm.LTMConfig(flops=0.8, scope=scope, schedule="every"))
    sites = [row.site for row in merges(model)]
    assert len(sites) >= 5
    monkeypatch.setattr(pictures, "SITES", 3)
    figure = ltm.show_merges(model, images[0])
    chosen = (sites[0], sites[round((len(sites) - 1) / 2)], sites[-1])
    assert [title.split(": ")[0].split(" ", 1)[1] for title in titles(figure)[1:]] == [place(s, 6) for s in chosen]
    assert f"3 of {len(sites)} merging sites" in " ".join(figure.get_supxlabel().split())


@pytest.mark.parametrize("method", ["ltm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("pool", "slice"))])
def test_a_smaller_grid_is_drawn_by_who_takes_most_of_each_place(method: str) -> None:
    model, image = of_zoo("timm-efficientvit-mit-b", method, "GRID")
    rows, panels = merges(model), drawn(model, image)
    assert len(rows) == len(panels) > 0 and {row.scope for row in rows} == {"GRID"}
    for row, panel in zip(rows, panels, strict=True):
        height, width = panel.groups.shape
        assert height * width == row.tokens_in and row.grid is not None
        assert panel.tokens == (row.grid[0] * row.grid[1], height * width)
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
    assert titles(figure)[1:] == [
        f"after {pictures.block_in_words(model, row.site)}: {row.tokens_out} of {row.tokens_in} tokens" for row in rows
    ]
    assert ("dropped" if method == "slice" else "GRID") in figure.get_supxlabel()


@pytest.mark.slow
def test_sequences_whose_place_is_not_known_are_drawn_without_the_image() -> None:
    model, image = of_zoo("timm-mobilevit", "tome", "LOCAL", 0.95)
    panels = drawn(model, image)
    assert {panel.sequences for panel in panels} == {4}
    figure = ltm.show_merges(model, image)
    assert all(title.endswith("\nthe first of 4 sequences") for title in titles(figure)[1:])
    assert "plain grey" in " ".join(figure.get_supxlabel().split())
    np.testing.assert_allclose(figure.axes[1].images[0].get_array(), 0.75)
    with pytest.raises(ExampleError, match="leave highlight out"):
        ltm.show_merges(model, image, highlight=(1, 1))


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
    with pytest.raises(ExampleError, match=r"uint8 .* expected a path, a PIL image"):
        ltm.show_merges(model, torch.zeros(3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ExampleError, match="converted for"):
        ltm.show_merges(model, torch.zeros(3, 40, 32))
    with pytest.raises(ExampleError, match="image is int"):
        ltm.show_merges(model, 3)
    with pytest.raises(DataError, match=r"cat\.jpg cannot be read as an image: No such file"):
        ltm.show_merges(model, "cat.jpg")
    for pixel in ((32, 0), (0, -1), (1.5, 2), 7, (1, 2, 3)):
        with pytest.raises(ExampleError, match=r"highlight=.* is not in the image; .*x from 0 to 31, y from 0 to 31"):
            ltm.show_merges(model, images, highlight=pixel)
    with ltm.disabled(model), pytest.raises(CountError, match="disabled at the moment"):
        ltm.show_merges(model, images)
