"""Pictures of what was merged: matplotlib figures, nothing else."""

from __future__ import annotations

import colorsys
import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from ltm_retrofit.converted.record import converted_part, forwards_of, get_plan
from ltm_retrofit.errors import CountError, DataError, ExampleError
from ltm_retrofit.finding.example import home, run
from ltm_retrofit.plan import MergePlan
from ltm_retrofit.scopes import SCOPES, rules_of
from ltm_retrofit.scopes.base import Panel, Shown, names_of
from ltm_retrofit.tracing import MergeTrace, trace
from ltm_retrofit.tuning.preprocessing import Preprocessing, plain, preprocessing_of
from ltm_retrofit.undisturbed import undisturbed

#: inches of a panel, panels in a row, and the widest grid whose patches have room for a number
PANEL, COLUMNS, NUMBERED = 3.4, 4, 16
#: how the number of a group is written
NUMBER: dict[str, Any] = {"ha": "center", "va": "center", "color": "white", "weight": "bold"}
NUMBER["path_effects"] = [patheffects.withStroke(linewidth=2, foreground="black")]


class MergeFigure(Figure):
    """A figure that notebooks show by themselves: made without pyplot, it would be left out there."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=80)
        return buffer.getvalue()


def show_merges(model: nn.Module, image: Image.Image | Tensor, *, index: int = 0) -> Figure:
    """Draw which patches became one token, at each merging site, over the image.

    Each group of patches has one colour and one number, the same in every panel of scope FLOW; single patches stay as
    they are. Of more than six sites in scope LOCAL six are drawn. The model is run once in eval mode, and
    left as it was.

    Args:
        model: a converted model.
        image: a PIL image, which is resized and normalised as the model wants it; or a tensor ``(C, H, W)`` or
            ``(B, C, H, W)`` that is normalised already.
        index: which image of a batch.

    Returns:
        A figure of one panel for the image and one for each merging site; ``figure.savefig(path)`` writes it.

    Raises:
        NotRetrofitted: where the model is not converted.
        ExampleError: where the image is of another kind or size, or there is no such index.
        CountError: where the patches make no grid, or merging is disabled at the moment.

    Example:
        >>> import timm, torch, ltm_retrofit as ltm
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=7)
        >>> model = ltm.retrofit(model, ltm.LTMConfig(tokens=(12, 9)))
        >>> figure = ltm.show_merges(model, torch.randn(3, 32, 32))
        >>> [ax.get_title() for ax in figure.axes][1:]
        ['blocks.1 · 17 → 12 tokens', 'blocks.2 · 12 → 9 tokens']
    """
    model = converted_part(model)
    plan = get_plan(model)
    name, (_, *shape) = next((key, size) for key, size in plan.input_size.items() if len(size) == 4)
    wanted = _preprocessing(model, (shape[0], shape[1], shape[2]))
    pixels = _pixels(image, index, shape, wanted).to(*home(model))
    with undisturbed(model), torch.no_grad(), trace(model) as traced:
        run(model, {name: pixels} if name else pixels)
    shown = _shown(pixels[0], wanted)
    panels = panels_of(model, traced, (shown.shape[0], shown.shape[1]))

    figure, axes = _axes(len(panels) + 1)
    first = next((panel.groups.shape for panel in panels.values()), (1, 1))
    _draw_image(axes[0], shown, first)
    axes[0].set_title("input" + _counted(model, plan))
    dropping = plan.config.method == "slice"
    for ax, panel in zip(axes[1:], panels.values(), strict=True):
        _draw_image(ax, shown if panel.placed else np.full_like(shown, 0.75), panel.groups.shape)
        ax.set_title(panel.title, fontsize=min(11.0, 11 * 40 / max(map(len, panel.title.split("\n")))))
        if dropping:
            _draw_dropped(ax, ~panel.alive)
        else:
            _draw_groups(ax, panel.groups, panel.names)
    text = _caption(plan, panels, dropping)
    figure.supxlabel("\n".join(textwrap.wrap(text, int(figure.get_figwidth() * 11))), fontsize=11)
    return figure


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
    return {row.site: drawn[row.site] for row in rows if row.site in drawn}


def _counted(model: nn.Module, plan: MergePlan) -> str:
    """Say how many tokens enter the first block after which they stay merged; nothing where there is none."""
    row = next((row for row in plan.rows if rules_of(row.scope).stays), None)
    if row is None:
        return ""
    prefix = next(forward.prefix for forward in forwards_of(model) if forward.name == row.site)
    return f" · {row.tokens_in - prefix} patches" + (f" + {prefix} prefix" if prefix else "")


def _preprocessing(model: nn.Module, shape: tuple[int, int, int]) -> Preprocessing | None:
    """Return the model's preprocessing at the size that it was converted for; None where its images are no pictures."""
    try:
        wanted = preprocessing_of(model)
    except DataError:  # it says nothing of its input; the plan does
        return plain(shape) if shape[0] in (1, 3) else None
    return wanted if wanted.shape == shape else plain(shape)


def _pixels(image: Any, index: int, size: Sequence[int], wanted: Preprocessing | None) -> Tensor:
    """Return the one image that is asked for as the model wants it, ``(1, C, H, W)``."""
    expected = f"a PIL image, or a normalised floating-point tensor {tuple(size)} or (B, {', '.join(map(str, size))})"
    if isinstance(image, Image.Image) and wanted is not None:
        image = wanted(image)
    if not isinstance(image, Tensor):
        raise ExampleError(f"image is {type(image).__name__}; expected {expected}")
    if not image.is_floating_point() or image.ndim not in (3, 4) or tuple(image.shape[-3:]) != tuple(size):
        raise ExampleError(
            f"image is {image.dtype} of shape {tuple(image.shape)}; expected {expected}: the size that the model was "
            "converted for"
        )
    batch = image if image.ndim == 4 else image.unsqueeze(0)
    if not 0 <= index < len(batch):
        raise ExampleError(f"index is {index}; expected 0 to {len(batch) - 1}, as there are {len(batch)} images")
    return batch[index : index + 1].detach()


def _shown(pixels: Tensor, wanted: Preprocessing | None) -> np.ndarray:
    """Undo the normalisation: ``(H, W, 3)`` in 0..1."""
    values = pixels.float().cpu()
    image = (values / 2 + 0.5).clamp(0, 1) if wanted is None else wanted.shown(values)
    if len(image) != 3:  # the first channel of what is no RGB image, in grey
        image = image[:1].expand(3, -1, -1)
    return np.asarray(image.permute(1, 2, 0).numpy())


def _axes(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    # A lone panel would be too narrow for its caption.
    figure = MergeFigure(figsize=(max(PANEL * columns, 5.0), (PANEL + 0.25) * rows + 0.55), layout="constrained")
    axes = [figure.add_subplot(rows, columns, place + 1) for place in range(count)]
    return figure, axes


def _draw_image(ax: Axes, image: np.ndarray, grid: tuple[int, int]) -> None:
    """Show the image with one patch a unit wide, its pixels crisp."""
    height, width = grid
    aspect = image.shape[0] / height / (image.shape[1] / width)
    ax.imshow(image, extent=(0.0, width, height, 0.0), interpolation="nearest", aspect=aspect)
    ax.set(xticks=[], yticks=[])
    ax.title.set_fontsize(11)


def _draw_groups(ax: Axes, labels: np.ndarray, names: Sequence[int]) -> None:
    """Tint and number every group of more than one patch, and draw the lines between different tokens."""
    height, width = labels.shape
    merged = names_of([labels])
    tint = np.zeros((height, width, 4))
    for row, column in np.ndindex(height, width):
        label = int(labels[row, column])
        if label not in merged:
            continue
        place = names.index(label)
        tint[row, column] = (*_colour(place), 0.55)
        if width <= NUMBERED:
            ax.text(column + 0.5, row + 0.52, str(place + 1), fontsize=min(11.0, 100 / width), **NUMBER)
    _lay_over(ax, tint)
    lines, thin = boundaries(labels), min(1.6, 16 / width)
    # Two tones, so that a line shows on bright and on dark pixels.
    for colour, thickness in (("black", 2 * thin), ("white", 0.7 * thin)):
        ax.add_collection(LineCollection(lines, colors=colour, linewidths=thickness, capstyle="projecting"))


def _draw_dropped(ax: Axes, dropped: np.ndarray) -> None:
    """Grey out and cross the patches that slicing dropped."""
    _lay_over(ax, dropped[..., None] * np.array((0.5, 0.5, 0.5, 0.75)))
    crosses = [
        line
        for row, column in np.argwhere(dropped).tolist()
        for line in (((column, row), (column + 1, row + 1)), ((column + 1, row), (column, row + 1)))
    ]
    ax.add_collection(LineCollection(crosses, colors="black", linewidths=min(0.8, 10 / dropped.shape[1])))


def _lay_over(ax: Axes, colours: np.ndarray) -> None:
    """Draw ``(H, W, 4)`` colours over the patches, which are drawn already."""
    height, width = colours.shape[:2]
    ax.imshow(colours, extent=(0.0, width, height, 0.0), interpolation="nearest", aspect=ax.get_aspect())


def boundaries(labels: np.ndarray) -> list[Sequence[tuple[float, float]]]:
    """Return the line segments between neighbouring patches of different groups, in units of patches."""
    upright, level = (
        np.argwhere(each).tolist() for each in (labels[:, 1:] != labels[:, :-1], labels[1:] != labels[:-1])
    )
    lines: list[Sequence[tuple[float, float]]] = [((column + 1, row), (column + 1, row + 1)) for row, column in upright]
    return lines + [((column, row + 1), (column + 1, row + 1)) for row, column in level]


def _colour(place: int) -> tuple[float, float, float]:
    """Return a hue far from its predecessors' (golden angle); another tone where hues come round."""
    saturation, value = ((1.0, 0.9), (0.45, 1.0), (1.0, 0.55))[place // 8 % 3]
    return colorsys.hsv_to_rgb(place * 0.618034 % 1.0, saturation, value)


def _caption(plan: MergePlan, panels: Mapping[str, Panel], dropping: bool) -> str:
    if not panels:
        return "This plan merges no patches."
    if dropping:
        text = "Crossed out in grey = dropped by slicing. Nothing is merged; all other patches stay."
    else:
        text = "Same colour and number = one token, also where the patches do not touch. Untinted = a token of its own."
    shares: list[np.ndarray] = []
    for scope in SCOPES:
        rows = [row for row in plan.rows if row.scope == scope.name and not row.slices]
        text += scope.legend(rows, dropping) if rows else ""
        taken = [panels[row.site].share.ravel() for row in rows if row.site in panels]
        shares += taken[-1:] if scope.stays else taken  # where tokens stay merged, the last panel holds all before it
    if not all(panel.placed for panel in panels.values()):
        text += " On plain grey: one of several sequences, whose places in the image are not known."
    share = np.concatenate(shares)
    soft = share[share < 0.999]
    if len(soft) and not dropping:
        text += (
            f" Merging is soft: a patch is drawn with the token that gets most of it, here {soft.mean():.0%} of it on "
            "average."
        )
    return text
