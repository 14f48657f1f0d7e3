"""How to fine-tune: the settings, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ltm_retrofit.config import Strict, check_choice
from ltm_retrofit.errors import RecipeError
from ltm_retrofit.tuning.data import AUGMENTS

TRAINS = ("all", "masks")
BOUNDS = ("ceb", "ibb", "none")


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
        loss: ``"ce"``, cross-entropy, or ``"bce"``, a binary one for each class.
        mixup: α of MixUp; 0 leaves it out.
        cutmix: α of CutMix; 0 leaves it out. Where both are above, each batch is mixed by one of them.
        distill: weight of distillation from the unconverted model's logits; images need no labels then.
        distill_temperature: of its softmax.
        distill_token: weight of the cosine distance to the feature that the unconverted model's classifier reads.
        bound: ``"ceb"``, CEB_γ (METHOD), ``"ibb"``, the paper's, or ``"none"``.
        bound_weight: λ, of the bound on the feature that the classifier reads.
        gamma: γ of CEB_γ.
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
    loss: str = "ce"
    mixup: float = 0.0
    cutmix: float = 0.0
    distill: float = 0.0
    distill_temperature: float = 1.0
    distill_token: float = 0.0
    bound: str = "ceb"
    bound_weight: float = 0.1
    gamma: float = 1.0
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
            ("mixup", math.inf),
            ("cutmix", math.inf),
            ("distill", math.inf),
            ("distill_temperature", math.inf),
            ("distill_token", math.inf),
            ("bound_weight", math.inf),
            ("gamma", math.inf),
            ("bound_sites", math.inf),
            ("bound_warmup", 1),
            ("label_smoothing", 1),
            ("clip", math.inf),
        ):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value <= most or math.isinf(value):
                hint = " (YAML reads 1e-4 as text: write 1.0e-4)" if isinstance(value, str) else ""
                raise RecipeError(f"{name} must be a number from 0 to {most}, got {value!r}{hint}")
        if self.distill_temperature == 0:
            raise RecipeError("distill_temperature must be above 0")
        check_choice(self.train, TRAINS, "train")
        check_choice(self.loss, ("ce", "bce"), "loss")
        check_choice(self.bound, BOUNDS, "bound")
        check_choice(self.augment, AUGMENTS, "augment")
        check_choice(self.mixed_precision, ("no", "bf16", "fp16"), "mixed_precision")
