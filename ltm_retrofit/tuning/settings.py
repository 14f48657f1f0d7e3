"""How to fine-tune: the settings, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ltm_retrofit.config import Strict, check_choice
from ltm_retrofit.errors import RecipeError
from ltm_retrofit.tuning.data import AUGMENTS

TRAINS = ("all", "masks")


@dataclass(frozen=True)
class TrainConfig(Strict):
    """How to fine-tune.

    Args:
        epochs: passes over the training data.
        batch_size: images in a step.
        lr: highest learning rate; linear warm-up, then cosine to zero.
        train: ``"all"`` parameters, or ``"masks"`` only.
        seed: of shuffling and augmentation.
        weight_decay: of AdamW, on matrices only.
        warmup: share of the steps in which the learning rate rises.
        bound: λ, weight of the bound CEB_γ on the feature that the classifier reads; 0 leaves it out.
        bound_sites: weight of the bound on each site's own descriptor, within λ.
        bound_warmup: share of the steps before the bound joins the loss.
        label_smoothing: of the cross-entropy.
        clip: largest norm of the gradient.
        augment: ``"none"``, or ``"crop"``: shifts by up to a sixteenth of the image.
        mixed_precision: Accelerate's: ``"no"``, ``"bf16"`` or ``"fp16"``.
        workers: of the data loader.
    """

    epochs: int = 1
    batch_size: int = 64
    lr: float = 3e-4
    train: str = "all"
    seed: int = 0
    weight_decay: float = 0.05
    warmup: float = 0.1
    bound: float = 0.1
    bound_sites: float = 0.0
    bound_warmup: float = 0.2
    label_smoothing: float = 0.0
    clip: float = 1.0
    augment: str = "none"
    mixed_precision: str = "no"
    workers: int = 0

    def __post_init__(self) -> None:
        """Check every value; nothing is corrected silently."""
        for name, least in (("epochs", 1), ("batch_size", 1), ("seed", 0), ("workers", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise RecipeError(f"{name} must be a whole number from {least} on, got {value!r}")
        for name, most in (
            ("lr", math.inf),
            ("weight_decay", math.inf),
            ("warmup", 1),
            ("bound", math.inf),
            ("bound_sites", math.inf),
            ("bound_warmup", 1),
            ("label_smoothing", 1),
            ("clip", math.inf),
        ):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value <= most or math.isinf(value):
                hint = " (YAML reads 1e-4 as text: write 1.0e-4)" if isinstance(value, str) else ""
                raise RecipeError(f"{name} must be a number from 0 to {most}, got {value!r}{hint}")
        check_choice(self.train, TRAINS, "train")
        check_choice(self.augment, AUGMENTS, "augment")
        check_choice(self.mixed_precision, ("no", "bf16", "fp16"), "mixed_precision")
