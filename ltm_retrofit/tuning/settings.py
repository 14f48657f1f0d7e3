"""How to fine-tune: the settings, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from ltm_retrofit.config import Strict
from ltm_retrofit.errors import RecipeError, check_choice

#: of the settings that are one of a few words
CHOICES: dict[str, tuple[str, ...]] = {
    "train": ("all", "masks", "masks+norms", "lora"),
    "sched": ("cosine", "poly", "tanh", "step"),
    "loss": ("ce", "bce"),
    "bound": ("ceb", "ibb", "none"),
    "augment": ("none", "crop"),
    "mixed_precision": ("no", "bf16", "fp16"),
}
FROM_ZERO = ("seed", "workers")  # of the whole numbers; the others count something
#: of the numbers, at most 1
SHARES = ("held_out", "layer_decay", "ema", "warmup", "bound_warmup", "label_smoothing", "unreadable")

#: What stands for None where the unconverted model knows the classes, and can say what is in an image: little moves.
#: docs/small_data.md has the runs that chose this.
TAUGHT: dict[str, Any] = {"train": "all", "distill": 1.0, "distill_token": 1.0}
#: where it does not, or nothing is converted: classes have to be learned from labels
UNTAUGHT: dict[str, Any] = {"train": "all", "distill": 0.0, "distill_token": 0.0}
#: images that a short fine-tune shall see: fewer are gone through several times
SEEN, MOST_EPOCHS = 1600, 4


def pace(images: int | None, *, known: bool, train: str = "all") -> dict[str, Any]:
    """Return epochs, batch size and rate for so many training images: about a hundred steps where they are few.

    Where the classes are known, the answers are near already, and a few large steps lead away from them: as few images
    as that take the lower rate. Where only masks, norms or low-rank matrices learn, little can be unlearned.
    """
    count = 10**9 if images is None else max(images, 1)
    return {
        "epochs": min(MOST_EPOCHS, max(1, round(SEEN / count))),
        "batch_size": 16 if count < SEEN else 32 if count < 4 * SEEN else 64,
        "lr": 3e-4 if not known else 1e-4 if train != "all" else 3e-6 if count < SEEN else 1e-5,
    }


@dataclass(frozen=True)
class TrainConfig(Strict):
    """How to fine-tune. Nothing is corrected silently.

    None leaves a setting to what model and data are: `decided` says what stands for it, and `finetune` says it aloud.

    Example:
        >>> import ltm_retrofit as ltm
        >>> config = ltm.TrainConfig(epochs=3, lr=1e-4, distill=1.0)
        >>> config.decided(taught=True, images=800).batch_size
        16
        >>> ltm.TrainConfig.from_dict(config.to_dict()) == config
        True

    Args:
        epochs: passes over the training data. Where it is None, up to four where there are few images.
        batch_size: images in a step. Where it is None, 16 to 64, by how many images there are.
        lr: highest learning rate; linear warm-up, then down to zero by ``sched``.
        train: ``"all"`` parameters, ``"masks"`` only, ``"masks+norms"``, or ``"lora"``: masks, and low-rank matrices
            (peft) that are merged into the weights at the end. A new classifier always trains.
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
        bound: ``"ceb"``, CEB_γ (docs/method.md, "Against collapse"), ``"ibb"``, the paper's, or ``"none"``.
        bound_weight: λ, of the bound on the feature that the classifier reads.
        gamma: γ of CEB_γ in the loss; the step inside the masks keeps the γ that they were made with, 1.
        perplexity: of the clusters' assignments, which β is fitted to: how many of them an image is spread over, at
            most nine tenths of all.
        bound_warmup: share of the steps before the bound joins the loss.
        label_smoothing: of the cross-entropy.
        clip: largest norm of the gradient.
        augment: ``"none"``, or ``"crop"``: shifts by up to a sixteenth of the image.
        mixed_precision: Accelerate's: ``"no"``, ``"bf16"`` or ``"fp16"``.
        workers: of the data loader.
        steps: in an epoch; needed for a stream, which does not know its length. The next epoch goes on where this one
            ended; where the data ends, it starts over.
        held_out: share of the training images that is held out for validation where no validation data is given; with 0
            nothing is validated, and the model holds the last state in the end.
        unreadable: share of the training images that may be unreadable; the next one takes the place of each. Images to
            evaluate on have to be readable.
        checkpoint_every: steps between two checkpoints, where `finetune` is given a folder for them.
    """

    epochs: int = None  # type: ignore[assignment]  # a number, once it is decided
    batch_size: int = None  # type: ignore[assignment]
    lr: float | None = None
    train: str | None = None
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
    distill: float | None = None
    distill_temperature: float = 1.0
    distill_token: float | None = None
    bound: str = "ceb"
    bound_weight: float = 0.1
    gamma: float = 1.0
    perplexity: float = 8.0
    bound_warmup: float = 0.2
    label_smoothing: float = 0.0
    clip: float = 1.0
    augment: str = "none"
    mixed_precision: str = "no"
    workers: int = 0
    steps: int | None = None
    held_out: float = 0.1
    unreadable: float = 0.01
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        """Check every value; nothing is corrected silently."""
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) is not None or name != "train":
                check_choice(value, choices, name)
        check_types(self)
        if self.ema == 1 or self.layer_decay == 0:
            raise RecipeError("ema must be below 1 and layer_decay above 0, else nothing would ever be learned")
        if self.perplexity <= 1:
            raise RecipeError(f"perplexity is an effective number of clusters, above 1, got {self.perplexity!r}")
        if self.distill_temperature == 0:
            raise RecipeError("distill_temperature must be above 0")

    def decided(self, *, taught: bool, known: bool = True, images: int | None = None) -> Self:
        """Return the settings with a number, or a word, for every None.

        Args:
            taught: whether there is an unconverted model that knows the classes.
            known: whether the model itself does.
            images: how many there are to train on, where that is known.
        """
        chosen = TAUGHT if taught else UNTAUGHT
        chosen = {**chosen, **pace(images, known=known, train=self.train or chosen["train"])}
        return replace(self, **{name: value for name, value in chosen.items() if getattr(self, name) is None})


def check_types(settings: Any) -> None:
    """Check the values of a frozen dataclass by the types that its fields declare; NumPy's numbers become Python's.

    Raises:
        RecipeError: naming the field, what it may be, and what it was given.
    """
    for entry in fields(settings):
        name, value, kind = entry.name, getattr(settings, entry.name), str(entry.type)
        if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a NumPy number, of a sweep for example
            value = value.item()
            object.__setattr__(settings, name, value)
        if value is None and entry.default is None:
            continue
        kind = kind.removesuffix(" | None")
        if kind == "int":
            least = 0 if name in FROM_ZERO else 1
            fits, wanted = type(value) is int and value >= least, f"a whole number from {least} on"
        elif kind == "float":
            most = 1 if name in SHARES else math.inf
            fits, wanted = type(value) in (int, float) and 0 <= value <= most, f"a number from 0 to {most}"
            fits = fits and not math.isinf(value)
        elif kind == "bool":
            fits, wanted = isinstance(value, bool), "true or false"
        else:
            fits, wanted = isinstance(value, str) and value != "", "a name"
        if not fits:
            hint = " (YAML reads 1e-4 as text: write 1.0e-4)" if kind == "float" and isinstance(value, str) else ""
            raise RecipeError(f"{name} must be {wanted}, got {value!r}{hint}")
