"""How to fine-tune: the settings, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from ltm_retrofit.config import Strict
from ltm_retrofit.errors import RecipeError, check_choice
from ltm_retrofit.tuning.preprocessing import AUGMENTS

TRAINS = ("all", "masks", "masks+norms", "lora")
SCHEDULES = ("cosine", "poly", "tanh", "step")
BOUNDS = ("ceb", "ibb", "none")
FROM_ZERO = ("seed", "workers")  # of the whole numbers; the others count something
SHARES = (
    "layer_decay",
    "ema",
    "warmup",
    "bound_warmup",
    "label_smoothing",
    "unreadable",
    "anneal",
)  # of the numbers, at most 1


@dataclass(frozen=True)
class TrainConfig(Strict):
    """How to fine-tune.

    Args:
        epochs: passes over the training data.
        batch_size: images in a step.
        lr: highest learning rate; linear warm-up, then down to zero by ``sched``.
        train: ``"all"`` parameters, ``"masks"`` only, ``"masks+norms"``, or ``"lora"``: masks, and low-rank matrices
            (peft) that are merged into the weights at the end. A new head always trains.
        lora_rank: of these matrices.
        opt: timm's name of the optimizer.
        sched: timm's name of the schedule: ``"cosine"``, ``"poly"`` (a straight line), ``"tanh"``, or ``"step"`` (a
            tenth after every three tenths of the steps).
        mask_lr: highest learning rate of the masks. Where it is None, 30 times ``lr``, for they are new beside weights
            that are not; with ``"masks"`` or ``"lora"``, where all that trains is new, ``lr``.
        layer_decay: factor from one block's learning rate to that of the block before it.
        accumulate: batches whose gradients make one step.
        ema: decay of an exponential moving average of the weights, which the model has in the end; 0 leaves it out.
        checkpointing: whether the host recomputes activations instead of keeping them.
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
        gamma: γ of CEB_γ in the loss; the step inside the masks keeps the γ that they were made with, 1.
        perplexity: of the clusters' assignments, which β is fitted to: how many of them an image is spread over, at
            most nine tenths of all.
        bound_sites: weight of the bound on each site's own descriptor, within λ.
        bound_warmup: share of the steps before the bound joins the loss.
        label_smoothing: of the cross-entropy.
        clip: largest norm of the gradient.
        augment: ``"none"``, or ``"crop"``: shifts by up to a sixteenth of the image.
        mixed_precision: Accelerate's: ``"no"``, ``"bf16"`` or ``"fp16"``.
        workers: of the data loader.
        steps: in an epoch; needed for a stream, which does not know its length. The next epoch goes on where this one
            ended; where the data ends, it starts over.
        unreadable: share of the training images that may be unreadable; the next one takes the place of each. Images to
            evaluate on have to be readable.
        checkpoint_every: steps between two checkpoints, where `finetune` is given a folder for them.
        anneal: share of the steps in which the token counts fall from all to those of the plan; accuracies noted in
            that time are those of the counts that have been reached.
        gate: whether masks by similarity also learn which tokens merge, by a straight-through gate (METHOD, item 4).
    """

    epochs: int = 1
    batch_size: int = 64
    lr: float = 3e-4
    train: str = "all"
    seed: int = 0
    weight_decay: float = 0.05
    lora_rank: int = 8
    opt: str = "adamw"
    sched: str = "cosine"
    mask_lr: float | None = None
    layer_decay: float = 1.0
    accumulate: int = 1
    ema: float = 0.0
    checkpointing: bool = False
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
    perplexity: float = 8.0
    bound_sites: float = 0.0
    bound_warmup: float = 0.2
    label_smoothing: float = 0.0
    clip: float = 1.0
    augment: str = "none"
    mixed_precision: str = "no"
    workers: int = 0
    steps: int | None = None
    unreadable: float = 0.01
    checkpoint_every: int = 500
    anneal: float = 0.0
    gate: bool = False

    def __post_init__(self) -> None:
        """Check every value; nothing is corrected silently."""
        for entry in fields(self):
            name, value = entry.name, getattr(self, entry.name)
            if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a NumPy number, of a sweep for example
                value = value.item()
                object.__setattr__(self, name, value)
            if value is None and str(entry.type).endswith("| None"):
                continue
            if str(entry.type).startswith("int"):
                least = 0 if name in FROM_ZERO else 1
                if not isinstance(value, int) or isinstance(value, bool) or value < least:
                    raise RecipeError(f"{name} must be a whole number from {least} on, got {value!r}")
            elif str(entry.type).startswith("float"):
                most = 1 if name in SHARES else math.inf
                if type(value) not in (int, float) or not 0 <= value <= most or math.isinf(value):
                    hint = " (YAML reads 1e-4 as text: write 1.0e-4)" if isinstance(value, str) else ""
                    raise RecipeError(f"{name} must be a number from 0 to {most}, got {value!r}{hint}")
        if not isinstance(self.opt, str):
            raise RecipeError(f"opt is a name, one of timm's optimizers, got {self.opt!r}")
        for name in ("checkpointing", "gate"):
            if not isinstance(getattr(self, name), bool):
                raise RecipeError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.ema == 1 or self.layer_decay == 0:
            raise RecipeError("ema must be below 1 and layer_decay above 0, else nothing would ever be learned")
        if self.perplexity <= 1:
            raise RecipeError(f"perplexity is an effective number of clusters, above 1, got {self.perplexity!r}")
        if self.distill_temperature == 0:
            raise RecipeError("distill_temperature must be above 0")
        check_choice(self.train, TRAINS, "train")
        check_choice(self.sched, SCHEDULES, "sched")
        check_choice(self.loss, ("ce", "bce"), "loss")
        check_choice(self.bound, BOUNDS, "bound")
        check_choice(self.augment, AUGMENTS, "augment")
        check_choice(self.mixed_precision, ("no", "bf16", "fp16"), "mixed_precision")
