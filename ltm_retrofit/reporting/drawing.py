"""How an image, groups of its patches, and what was dropped are drawn on matplotlib's axes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.path import Path as Outline

from ltm_retrofit.reporting.superpixels import Line, middle, outline

#: of the largest groups: what stays apart on photographs, also for those who see few colours
COLOURS = ("#ffe100", "#00e5ff", "#ff2bd6", "#ff8c00", "#39ff14")
#: how the size of a group is written
NUMBER: dict[str, Any] = {"ha": "center", "va": "center_baseline", "color": "white", "weight": "bold", "fontsize": 9}
NUMBER["path_effects"] = [patheffects.withStroke(linewidth=2.2, foreground="black")]


class MergeFigure(Figure):
    """A figure that notebooks show by themselves: made without pyplot, it would be left out there."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=80)
        return buffer.getvalue()


def draw_image(ax: Axes, image: np.ndarray, grid: tuple[int, ...], title: str) -> None:
    """Show the image with one patch a unit wide."""
    height, width = grid
    aspect = image.shape[0] / height / (image.shape[1] / width)
    ax.imshow(image, extent=(0.0, width, height, 0.0), aspect=aspect)
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, fontsize=min(11.0, 11 * 44 / max(map(len, title.split("\n")))))


def draw_cross(ax: Axes, x: float, y: float) -> None:
    """Mark a place, in units of patches."""
    ax.plot(x, y, "+", color="white", markersize=12, path_effects=NUMBER["path_effects"])


def draw_lines(ax: Axes, lines: Sequence[Line], width: int) -> None:
    """Draw lines of two tones, which show on bright and on dark pixels."""
    thin = min(1.0, 16 / width)
    for tone, thickness in (("black", 1.5 * thin), ("white", 0.6 * thin)):
        ax.add_collection(LineCollection(lines, colors=tone, linewidths=thickness, capstyle="projecting"))


def draw_edge(ax: Axes, inside: np.ndarray, colour: str) -> None:
    """Draw a coloured edge within some patches, and how many they are."""
    thin, sides = min(1.0, 16 / inside.shape[1]), outline(inside)
    corners = ((0, 0), (1, 0), (1, 1), (0, 1), (0, 0))
    path = [(column + x, row + y) for row, column in np.argwhere(inside).tolist() for x, y in corners]
    codes = [Outline.MOVETO, *[Outline.LINETO] * 3, Outline.CLOSEPOLY] * int(inside.sum())
    edge = LineCollection(sides, colors=colour, linewidths=5 * thin, capstyle="projecting")
    ax.add_collection(edge)
    edge.set_clip_path(Outline(path, codes), ax.transData)
    ax.add_collection(LineCollection(sides, colors="black", linewidths=1.2 * thin, capstyle="projecting"))
    row, column = middle(inside)
    ax.text(column + 0.5, row + 0.5, str(int(inside.sum())), **NUMBER)


def draw_dropped(ax: Axes, dropped: np.ndarray) -> None:
    """Grey out and cross the patches that slicing dropped."""
    height, width = dropped.shape
    grey = dropped[..., None] * np.array((0.5, 0.5, 0.5, 0.75))
    ax.imshow(grey, extent=(0.0, width, height, 0.0), interpolation="nearest", aspect=ax.get_aspect())
    crosses = [
        line
        for row, column in np.argwhere(dropped).tolist()
        for line in (((column, row), (column + 1, row + 1)), ((column + 1, row), (column, row + 1)))
    ]
    ax.add_collection(LineCollection(crosses, colors="black", linewidths=min(0.8, 10 / width)))
