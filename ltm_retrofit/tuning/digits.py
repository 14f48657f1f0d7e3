"""The embedded data set: scikit-learn's handwritten digits on large, cluttered canvases.

A digit covers a small part of its canvas and the rest is background and fragments of other digits, so there is
something to merge. The 1797 source digits are split *before* anything is drawn: no stroke of a test digit, not even
as clutter, is ever seen in training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import datasets

Split = Literal["train", "validation", "test"]
#: source digits of each split
SPLITS: dict[Split, tuple[int, int]] = {"train": (0, 1257), "validation": (1257, 1437), "test": (1437, 1797)}
CANVAS = 64


def source_digits(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Return the split's source digits: images ``(n, 8, 8)`` uint8 in 0..255, labels ``(n,)``."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    start, stop = SPLITS[split]
    chosen = order[start:stop]
    return (digits.images[chosen] * (255 / 16)).astype(np.uint8), digits.target[chosen].astype(np.int64)


def draw_canvas(
    digit: np.ndarray, others: np.ndarray, rng: np.random.Generator, *, crowded: bool = False
) -> np.ndarray:
    """Draw one canvas ``(64, 64)`` uint8: clutter cut out of ``others``, then ``digit`` at a random place and scale.

    ``crowded`` canvases have smaller digits and brighter clutter; the base is trained on them first.
    """
    scales, inks = ((2.0, 3.5), (0.4, 0.9)) if crowded else ((2.5, 4.0), (0.3, 0.7))
    canvas = np.zeros((CANVAS, CANVAS), dtype=np.float32)

    def paste(patch: np.ndarray, size: int, ink: float) -> None:
        scaled = np.asarray(Image.fromarray(patch).resize((size, size), Image.Resampling.BILINEAR), dtype=np.float32)
        top, left = rng.integers(0, CANVAS - size + 1, size=2)
        region = canvas[top : top + size, left : left + size]
        np.maximum(region, ink * scaled, out=region)

    for _ in range(rng.integers(6, 11)):
        side = int(rng.integers(3, 6))
        top, left = rng.integers(0, 8 - side + 1, size=2)
        fragment = others[rng.integers(len(others)), top : top + side, left : left + side]
        paste(np.ascontiguousarray(fragment), int(side * rng.uniform(2.0, 3.0)), rng.uniform(*inks))
    paste(digit, int(8 * rng.uniform(*scales)), rng.uniform(0.7, 1.0))
    noise = rng.normal(0.0, 20.0, size=canvas.shape).astype(np.float32)
    drawn: np.ndarray = np.clip(canvas + noise, 0, 255).astype(np.uint8)
    return drawn


def draw_split(split: Split, per_digit: int, seed: int, *, crowded: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Draw ``per_digit`` canvases of every source digit of a split: ``(n, 64, 64)`` uint8 and labels ``(n,)``."""
    digits, labels = source_digits(split)
    rng = np.random.default_rng([seed, list(SPLITS).index(split)])
    canvases = np.stack(
        [draw_canvas(digit, digits, rng, crowded=crowded) for _ in range(per_digit) for digit in digits]
    )
    return canvases, np.tile(labels, per_digit)


def load_canvases(split: Split, *, per_digit: int, seed: int = 0) -> datasets.Dataset:
    """Return a split as a ``datasets`` data set with columns ``image`` (RGB) and ``label``, shuffled by ``seed``."""
    import datasets

    canvases, labels = draw_split(split, per_digit, seed)
    order = np.random.default_rng(seed).permutation(len(labels))
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    columns = {
        "image": [Image.fromarray(canvases[index]).convert("RGB") for index in order],
        "label": labels[order].tolist(),
    }
    return datasets.Dataset.from_dict(columns, features=features)
