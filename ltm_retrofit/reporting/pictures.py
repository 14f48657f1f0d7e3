"""Pictures of what was merged: matplotlib figures, nothing else."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from ltm_retrofit.converted.record import converted_part, forwards_of, get_plan
from ltm_retrofit.errors import CountError, ExampleError
from ltm_retrofit.finding.example import run
from ltm_retrofit.plan import MergePlan
from ltm_retrofit.reporting.drawing import (
    COLOURS,
    MergeFigure,
    draw_cross,
    draw_dropped,
    draw_edge,
    draw_image,
    draw_lines,
)
from ltm_retrofit.reporting.predict import predictions_of
from ltm_retrofit.reporting.superpixels import at_pixels, boundaries, dimmed, filled, followed, largest
from ltm_retrofit.scopes import SCOPES, rules_of
from ltm_retrofit.scopes.base import Panel, Shown
from ltm_retrofit.tracing import MergeTrace, trace
from ltm_retrofit.tuning.images import Images, Prepared, gathered, prepare
from ltm_retrofit.tuning.preprocessing import Preprocessing
from ltm_retrofit.undisturbed import undisturbed

#: images, and sites of each, that are drawn where there are more
IMAGES, SITES = 8, 5
#: inches of a panel; panels of one image alone that fit in a row, and how many are in each of two rows
PANEL, ROW, COLUMNS = 3.4, 4, 3


def show_merges(
    model: nn.Module, image: Images, *, index: int | None = None, highlight: tuple[int, int] | None = None
) -> Figure:
    """Draw which patches became one token, at each merging site, over the image.

    Patches that merged are an area of their mean colour, with a line around it; where the image still shows, each
    patch is a token of its own. The five largest tokens after the last site have a coloured edge and the number of
    their patches; in scope FLOW they have the same colour at each site before. Of more than five sites five are drawn:
    the first, the last, and evenly between. The model is run in eval mode, and left as it was.

    Args:
        model: a converted model.
        image: a path; a PIL image, which is prepared as the model wants it; a tensor ``(C, H, W)`` that is normalised
            already; or several of these, as a list, a folder or a batch ``(B, C, H, W)``: each has a row, and of more
            than eight the first eight are drawn.
        index: draw this image alone, of several.
        highlight: a pixel ``(x, y)`` of the image as the model sees it, from ``(0, 0)`` at the top left: the patches
            that are one token with the patch there are drawn as they are, and all others dimmed.

    Returns:
        A figure with a row of panels for each image: first the image as the model sees it, with the model's answer
        before merging and after, where it has classes; then one panel a site. ``figure.savefig(path)`` writes it.

    Raises:
        NotRetrofitted: where the model is not converted.
        DataError: where a file is no image.
        ExampleError: where the image is of another kind or size, or there is no such index or pixel.
        CountError: where the patches make no grid, or merging is disabled at the moment.

    Example:
        >>> import timm, torch, ltm_retrofit as ltm
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=7)
        >>> model = ltm.retrofit(model, ltm.LTMConfig(tokens=(12, 9)))
        >>> figure = ltm.show_merges(model, torch.randn(3, 32, 32))
        >>> [ax.get_title() for ax in figure.axes][1:]
        ['after block 2 of 4: 12 of 17 tokens', 'after block 3 of 4: 9 of 17 tokens']
    """
    model = converted_part(model)
    found = gathered(image)
    if index is not None:
        if not 0 <= index < len(found):
            raise ExampleError(f"index is {index}; expected 0 to {len(found) - 1}, as there are {len(found)} images")
        found = found[index : index + 1]
    prepared = prepare(model, found[:IMAGES])
    if highlight is not None:
        _check_pixel(model, highlight, tuple(prepared.pixels.shape[-2:]))
    rows = _rows(model, prepared)
    figure, axes = _axes(rows, _caption(model, rows, len(found), highlight))
    for row, own in zip(rows, axes, strict=True):
        _draw_row(own, row, highlight)
    return figure


@dataclass(frozen=True)
class _Row:
    """What is drawn of one image."""

    shown: np.ndarray  # (H, W, 3) in 0..1
    title: str
    answer: str  # empty where the model has no classes
    panels: dict[str, Panel]
    titles: list[str]
    #: of each panel, the numbers of the groups that have a colour
    coloured: list[dict[int, int]]
    dropping: bool


def _rows(model: nn.Module, prepared: Prepared) -> list[_Row]:
    """Run the model on each image alone, and see what it does and answers."""
    plan, rows = get_plan(model), list[_Row]()
    for place, name in enumerate(prepared.names):
        one = prepared._replace(names=[name], pixels=prepared.pixels[place : place + 1])
        with undisturbed(model), torch.no_grad(), trace(model) as traced:
            run(model, {one.argument: one.pixels} if one.argument else one.pixels)
        shown = _shown(one.pixels[0], one.wanted)
        panels = panels_of(model, traced, (shown.shape[0], shown.shape[1]))
        chosen = np.linspace(0, len(panels) - 1, min(len(panels), SITES)).round().astype(int)
        panels = {site: panels[site] for site in (list(panels)[place] for place in chosen)}
        answers = predictions_of(model, one) if get_plan(model).classes else []
        rows.append(
            _Row(
                shown,
                _title(name, prepared.opened[place], one.wanted),
                answers[0].in_short() if answers else "",
                panels,
                [_title_of(model, plan, site, panel) for site, panel in panels.items()],
                _coloured(plan, panels),
                plan.config.method == "slice",
            )
        )
    return rows


def panels_of(model: nn.Module, traced: MergeTrace, size: tuple[int, int]) -> dict[str, Panel]:
    """Return what is drawn of each site that merged, in the plan's order.

    Args:
        model: a converted model.
        traced: its pass over one image, of the size that it was converted for.
        size: height and width of the image.

    Raises:
        CountError: where patches make no grid, or merging is disabled at the moment.
    """
    rows = [row for row in get_plan(model).rows if not row.slices]
    if len(traced.merges) != len(rows):
        raise CountError(
            f"the plan merges at {len(rows)} sites and {len(traced.merges)} did: merging is disabled at the moment. "
            "Call show_merges outside `with ltm_retrofit.disabled(model):`"
        )
    seen = Shown(traced.by_site, {forward.name: forward for forward in forwards_of(model)}, size)
    drawn: dict[str, Panel] = {}
    for scope in SCOPES:
        if own := [row for row in rows if row.scope == scope.name]:
            drawn |= scope.panels(own, seen)
    return {row.site: drawn[row.site] for row in rows}


def _coloured(plan: MergePlan, panels: Mapping[str, Panel]) -> list[dict[int, int]]:
    """Choose the groups of each panel that get a colour; where tokens stay merged, a group keeps its own."""
    staying = [site for site in panels if rules_of(_scope_of(plan, site)).stays]
    numbers = dict(zip(staying, followed([panels[site].groups for site in staying], len(COLOURS)), strict=True))
    return [numbers[site] if site in numbers else largest(panel.groups, len(COLOURS)) for site, panel in panels.items()]


# ------------------------------------------------------------------------------------------------------------ in words


def _title(name: str, opened: Any, wanted: Preprocessing | None) -> str:
    """Say which image it is, and how much of it the model sees."""
    title = f"{name} as the model sees it"
    if wanted is None or not isinstance(opened, Image.Image):
        return title
    tall, wide = (round(100 * share) for share in wanted.seen(opened))
    return f"{title}\n" + ("all of it" if tall == wide == 100 else f"{wide} % of its width, {tall} % of its height")


def _title_of(model: nn.Module, plan: MergePlan, site: str, panel: Panel) -> str:
    """Say where a site is, and how many tokens it leaves."""
    words = block_in_words(model, site)
    if any(row.site != site and block_in_words(model, row.site) == words for row in plan.rows):
        words += f" ({site.rpartition('.')[2]})"  # one of several in this block
    title = f"{rules_of(_scope_of(plan, site)).where} {words}: {panel.tokens[0]} of {panel.tokens[1]} tokens"
    return title if panel.sequences == 1 else f"{title}\nthe first of {panel.sequences} sequences"


def block_in_words(model: nn.Module, site: str) -> str:
    """Say in which of a model's blocks a site lies: of all whose names differ from its own in numbers only.

    Example:
        >>> import timm
        >>> from ltm_retrofit.reporting.pictures import block_in_words
        >>> block_in_words(timm.create_model("vit_tiny_patch16_224"), "blocks.3")
        'block 4 of 12'
    """

    def numberless(name: str) -> list[str]:
        return ["#" if part.isdigit() else part for part in name.split(".")]

    block = site
    while block and not block.rpartition(".")[2].isdigit():  # a part of a block, as of one that holds two attentions
        block = block.rpartition(".")[0]
    alike = [name for name, _ in model.named_modules() if numberless(name) == numberless(block)]
    if len(alike) < 2 or block not in alike:
        return f"block {site!r}" if site else "the block"
    return f"block {alike.index(block) + 1} of {len(alike)}"


def _scope_of(plan: MergePlan, site: str) -> str:
    return next(row.scope for row in plan.rows if row.site == site)


def _caption(model: nn.Module, rows: Sequence[_Row], images: int, highlight: Any) -> list[str]:
    """Say how the picture is read."""
    plan, panels = get_plan(model), list(rows[0].panels.values())
    if not panels:
        return ["This plan merges no patches."]
    sites = [row for row in plan.rows if not row.slices]
    said = _parts(model, plan, rows[0].panels)
    if rows[0].dropping:
        said.append("Crossed out in grey = dropped by slicing. Nothing is merged; all other patches stay.")
    elif highlight is not None:
        said.append(
            f"Drawn in full: the patches that are one token with the patch at the cross, pixel {tuple(highlight)}, and "
            "how many they are. All others are dimmed."
        )
    else:
        said += _how_groups_are_drawn(plan, rows[0])
    for scope in SCOPES:
        if legend := scope.legend([row for row in sites if row.scope == scope.name], rows[0].dropping):
            said.append(legend)
    if any(panel.sequences > 1 for panel in panels):
        said.append("On plain grey: one of several sequences, whose places in the image are not known.")
    soft = np.concatenate([panel.share[panel.share < 0.999] for panel in panels])
    if len(soft) and not rows[0].dropping:
        said.append(
            f"Merging is soft: a patch is drawn with the token that gets most of it, here {soft.mean():.0%} of it on "
            "average."
        )
    if len(sites) > len(panels):
        said.append(f"Drawn: {len(panels)} of {len(sites)} merging sites, the first, the last and evenly between.")
    if images > len(rows):
        said.append(f"Drawn: the first {len(rows)} of {images} images.")
    return said


def _how_groups_are_drawn(plan: MergePlan, row: _Row) -> list[str]:
    said = [
        "Flat area with a line around it: patches that merged into one token, in their mean colour.",
        "Image still showing: each patch there is a token of its own.",
    ]
    count = max(map(len, row.coloured))
    stays = all(rules_of(_scope_of(plan, site)).stays for site in row.panels)
    which = "the largest token" if count == 1 else f"the {count} largest tokens"
    if stays:
        which += " of the last panel, in the same colour in each panel"
    else:
        which += " of each panel; the colours of two panels have nothing to do with one another"
    said.append(f"Coloured edges: {which}; the number counts the patches of all its pieces.")
    said.append(
        "Areas that do not touch may be one token: those with edges of one colour are; of the others it is not shown."
    )
    return said


def _parts(model: nn.Module, plan: MergePlan, panels: Mapping[str, Panel]) -> list[str]:
    """Say what tokens are, where they stay merged from a block on."""
    row = next((row for row in plan.rows if rules_of(row.scope).stays), None)
    grids = [panel.groups.shape for site, panel in panels.items() if rules_of(_scope_of(plan, site)).stays]
    if row is None or not grids:
        return []
    height, width = grids[0]
    prefix = next(forward.prefix for forward in forwards_of(model) if forward.name == row.site)
    more = f", and {prefix} that belong{'s' * (prefix == 1)} to no patch" if prefix else ""
    return [
        f"The model begins with {row.tokens_in} tokens: one for each of {height} × {width} patches{more}. "
        "Nothing merges after the last panel."
    ]


# --------------------------------------------------------------------------------------------------------------- drawn


def _check_pixel(model: nn.Module, highlight: Any, size: tuple[int, ...]) -> None:
    """Check that there is such a pixel, and something that could be one token with it.

    Raises:
        ExampleError: where there is not.
    """
    if get_plan(model).config.method == "slice":
        raise ExampleError("highlight shows what is one token, and slicing merges nothing: leave highlight out")
    height, width = size
    pair = isinstance(highlight, Sequence) and len(highlight) == 2 and all(isinstance(n, int) for n in highlight)
    if not pair or not (0 <= highlight[0] < width and 0 <= highlight[1] < height):
        given = tuple(highlight) if pair else repr(highlight)
        raise ExampleError(
            f"highlight={given} is not in the image; expected a pixel (x, y) of the image as the model sees it: x from "
            f"0 to {width - 1}, y from 0 to {height - 1}"
        )


def _shown(pixels: Tensor, wanted: Preprocessing | None) -> np.ndarray:
    """Undo the normalisation: ``(H, W, 3)`` in 0..1."""
    values = pixels.float().cpu()
    image = (values / 2 + 0.5).clamp(0, 1) if wanted is None else wanted.shown(values)
    if len(image) != 3:  # the first channel of what is no RGB image, in grey
        image = image[:1].expand(3, -1, -1)
    return np.asarray(image.permute(1, 2, 0).numpy())


def _axes(rows: Sequence[_Row], caption: Sequence[str]) -> tuple[Figure, list[list[Axes]]]:
    """Make a row of axes for each image, of one image alone two shorter ones, with the caption below."""
    panels, alone = 1 + len(rows[0].panels), len(rows) == 1
    columns = COLUMNS if alone and panels > ROW else panels
    lines = len(rows) * -(-panels // columns)
    width = max(PANEL * columns, 2 * PANEL)  # a lone panel would be too narrow for its caption
    said = [line for text in caption for line in textwrap.wrap(text, int(width * 13), subsequent_indent="   ")]
    tall, wide = rows[0].shown.shape[:2]
    title = 0.4 if alone else 0.8
    height = lines * (PANEL * min(2.0, tall / wide) + title) + 0.17 * len(said) + 0.6
    figure = MergeFigure(figsize=(width, height), layout="compressed")
    if alone and rows[0].answer:
        figure.suptitle("  →  ".join(rows[0].answer.split("\n")), fontsize=12, weight="bold")
    figure.supxlabel("\n".join(said), fontsize=10, ha="left", x=0.01)
    axes = [
        [figure.add_subplot(lines, columns, image * columns + place + 1) for place in range(panels)]
        for image in range(len(rows))
    ]
    return figure, axes


def _draw_row(axes: Sequence[Axes], row: _Row, highlight: tuple[int, int] | None) -> None:
    """Draw the image, then each of its sites."""
    first = next((panel.groups.shape for panel in row.panels.values()), (1, 1))
    alone = axes[0].figure.get_suptitle() != ""
    draw_image(axes[0], row.shown, first, row.title if alone or not row.answer else f"{row.title}\n{row.answer}")
    if highlight is not None:
        x, y = (
            place * count / size
            for place, count, size in zip(highlight, first[::-1], row.shown.shape[1::-1], strict=True)
        )
        draw_cross(axes[0], x, y)
    for ax, panel, title, coloured in zip(axes[1:], row.panels.values(), row.titles, row.coloured, strict=True):
        shown = row.shown if panel.sequences == 1 else np.full_like(row.shown, 0.75)
        if row.dropping:
            draw_image(ax, shown, panel.groups.shape, title)
            draw_dropped(ax, ~panel.alive)
        elif highlight is not None:
            _draw_one(ax, shown, panel, title, highlight)
        else:
            draw_image(ax, filled(shown, panel.groups), panel.groups.shape, title)
            draw_lines(ax, boundaries(panel.groups), panel.groups.shape[1])
            for label, number in coloured.items():
                draw_edge(ax, panel.groups == label, COLOURS[number])


def _draw_one(ax: Axes, shown: np.ndarray, panel: Panel, title: str, pixel: tuple[int, int]) -> None:
    """Draw the group at a pixel as it is, and all others dimmed.

    Raises:
        ExampleError: where it is not known where in the image the patches lie.
    """
    if panel.sequences > 1:
        raise ExampleError(
            "highlight names a pixel, and of this model's sequences the places in the image are not known: leave "
            "highlight out"
        )
    inside = panel.groups == at_pixels(panel.groups, (shown.shape[0], shown.shape[1]))[pixel[1], pixel[0]]
    draw_image(ax, dimmed(shown, inside), inside.shape, title)
    draw_edge(ax, inside, COLOURS[0])
