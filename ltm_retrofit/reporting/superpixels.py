"""Groups of patches as superpixels: their mean colours, the lines between them, and which of them is which later on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: from one place of a grid's corners to another, both (column, row) in units of patches
Line = tuple[tuple[float, float], tuple[float, float]]


def sizes_of(groups: np.ndarray) -> np.ndarray:
    """Return of how many patches the group of each patch is; like ``groups`` it is ``(h, w)``."""
    _, inverse, counts = np.unique(groups, return_inverse=True, return_counts=True)
    return np.asarray(counts[inverse].reshape(groups.shape))


def at_pixels(patches: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Give each pixel of an image of ``size`` what its patch has: ``(h, w)`` to ``(H, W)``."""
    rows, columns = (np.arange(pixels) * count // pixels for pixels, count in zip(size, patches.shape, strict=True))
    return np.asarray(patches[rows[:, None], columns])


def filled(image: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Give every group of more than one patch the mean colour of its pixels; single patches stay as they are.

    Args:
        image: ``(H, W, 3)``.
        groups: ``(h, w)``, equal where patches are one token.
    """
    labels = at_pixels(np.unique(groups, return_inverse=True)[1].reshape(groups.shape), image.shape[:2])
    count = np.bincount(labels.ravel())
    channels = [np.bincount(labels.ravel(), image[..., channel].ravel()) / count for channel in range(3)]
    means = np.stack(channels, axis=-1)[labels]
    merged = at_pixels(sizes_of(groups) > 1, image.shape[:2])
    return np.where(merged[..., None], means, image)


def dimmed(image: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Leave the patches that are kept as they are, and make all others pale and grey: ``(H, W, 3)``."""
    pale = np.repeat(0.72 + 0.22 * image.mean(axis=-1, keepdims=True), 3, axis=-1)
    return np.where(at_pixels(kept, image.shape[:2])[..., None], image, pale)


def boundaries(groups: np.ndarray) -> list[Line]:
    """Return the sides that neighbouring patches of different groups share, in units of patches.

    Between two patches that are tokens of their own there is none: nothing merged there.
    """
    merged = sizes_of(groups) > 1
    upright = (groups[:, 1:] != groups[:, :-1]) & (merged[:, 1:] | merged[:, :-1])
    level = (groups[1:] != groups[:-1]) & (merged[1:] | merged[:-1])
    return _sides(upright, level, (1, 1))


def outline(inside: np.ndarray) -> list[Line]:
    """Return the sides around some patches ``(h, w)`` bool, those at the edge of the image included."""
    padded = np.pad(inside, 1)
    return _sides((padded[:, 1:] != padded[:, :-1])[1:-1], (padded[1:] != padded[:-1])[:, 1:-1], (0, 0))


def _sides(upright: np.ndarray, level: np.ndarray, start: tuple[int, int]) -> list[Line]:
    """Return sides as lines; the first upright one stands ``start[0]`` from the left."""
    left, top = start
    lines: list[Line] = [((c + left, r), (c + left, r + 1)) for r, c in np.argwhere(upright).tolist()]
    return lines + [((c, r + top), (c + 1, r + top)) for r, c in np.argwhere(level).tolist()]


def largest(groups: np.ndarray, few: int) -> dict[int, int]:
    """Number the largest groups of more than one patch, at most ``few``: of each its rank, from 0 on."""
    labels, counts = np.unique(groups, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:few]
    return {int(labels[place]): rank for rank, place in enumerate(order) if counts[place] > 1}


def followed(sites: Sequence[np.ndarray], few: int) -> list[dict[int, int]]:
    """Number the largest groups of the last of some sites, and at each earlier one what they mostly came from.

    Where tokens stay merged, groups only grow. So what has a number keeps it: the group that holds it later has the
    same one.

    Args:
        sites: the groups ``(h, w)`` after each site, all on one grid.
        few: how many groups at most.

    Returns:
        For each site the number of each group that has one.
    """
    if not sites:
        return []
    numbers = [largest(sites[-1], few)]
    for earlier, later in zip(reversed(sites[:-1]), reversed(sites[1:]), strict=True):
        found = {}
        for label, number in numbers[0].items():
            inside = later == label
            parts, counts = np.unique(earlier[inside], return_counts=True)
            part = int(parts[counts.argmax()])
            whole = int((earlier == part).sum())
            if whole > 1 and 2 * counts.max() > whole:  # else most of it went elsewhere
                found[part] = number
        numbers.insert(0, found)
    return numbers


def middle(inside: np.ndarray) -> tuple[int, int]:
    """Return (row, column) of the patch that has most others of its group around it, for a label."""
    height, width = inside.shape
    padded = np.pad(inside.astype(float), 2)
    around = sum(
        padded[r : r + height, c : c + width] / (1 + abs(r - 2) + abs(c - 2)) for r in range(5) for c in range(5)
    )
    row, column = np.unravel_index(np.argmax(np.where(inside, around, -1.0)), inside.shape)
    return int(row), int(column)
