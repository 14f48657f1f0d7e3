"""How good is it on images that training does not see? Asked before, and after each epoch: the best state is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltm_retrofit.errors import DataError, TrainingError
from ltm_retrofit.tuning.classes import judged
from ltm_retrofit.tuning.data import ClassOf, Data, Images, columns_of, is_table
from ltm_retrofit.tuning.processes import Accelerator, with_memory_for
from ltm_retrofit.tuning.settings import TrainConfig
from ltm_retrofit.undisturbed import random_numbers_kept

#: what one validation found: see `Validation.measure`
Found = dict[str, Any]


@dataclass(frozen=True)
class Validation:
    """Images that training does not see, and how a model is judged on them.

    Args:
        data: a `datasets` data set, or a loader that can be read again.
        images: at once, of a data set; fewer where memory ends.
        class_of: the model's class of each label, where they differ.
        unreadable: share of a data set's images that may be: none, unless training accepts some of the same data.
    """

    data: Data
    images: int
    class_of: ClassOf = None
    unreadable: float = 0.0

    def digest(self) -> str:
        """Tell validation data apart, as far as that takes no reading of all of them."""
        if is_table(self.data):
            return f"{len(self.data)} {Images(self.data, lambda image: image, 1.0).digest()}"
        return str(len(self.data)) if hasattr(self.data, "__len__") else ""

    def measure(self, model: nn.Module, accelerator: Accelerator, teach: Callable[[Any], Tensor] | None) -> Found:
        """Judge a model; processes share the data, and random numbers stay where they are.

        Args:
            model: in any mode.
            accelerator: of the run.
            teach: from the inputs of a batch to the teacher's logits ``(b, C)``, where images need no labels.

        Returns:
            ``val_images``, their number; with labels ``val_accuracy``, in percent, and ``val_loss``, the cross-entropy;
            without ``val_agreement``, with the teacher and in percent, and ``val_kl``, KL(teacher ‖ model) in nats.

        Raises:
            DataError: where labels do not fit, or some images have one and others none.
            TrainingError: where one image is too much, or where the batches are not this process's to choose.
        """
        kinds = set[bool]()

        def judge(logits: Tensor, targets: Tensor | None, inputs: Any) -> Tensor:
            kinds.add(targets is not None)
            ours = logits.float().log_softmax(dim=-1)
            if targets is not None:
                theirs, away = targets, -(targets * ours).sum(dim=-1)
            else:
                assert teach is not None, "images without labels are refused where there is no teacher"
                theirs = teach(inputs).log_softmax(dim=-1)
                away = F.kl_div(ours, theirs, log_target=True, reduction="none").sum(dim=-1)
            return torch.stack([(ours.argmax(dim=-1) == theirs.argmax(dim=-1)).float(), away], dim=1)

        def measured(images: int) -> Tensor:
            config = TrainConfig(batch_size=images, unreadable=self.unreadable)
            return judged(model, self.data, judge, config, accelerator, self.class_of, labelled=teach is None)

        def fewer(images: int) -> int:
            if not is_table(self.data):
                raise TrainingError(
                    "a batch of the validation loader does not fit into memory: pass one of smaller batches"
                )
            if accelerator.num_processes > 1 or images == 1:
                raise TrainingError(f"a batch of {images} validation images does not fit into memory")
            return images // 2

        with random_numbers_kept(model):
            found = with_memory_for(self.images, measured, fewer)
        if len(kinds) > 1:
            raise DataError("some validation batches have labels and others have none: give all of them, or no one")
        same, away = found.double().mean(dim=0).tolist()
        names = ("val_accuracy", "val_loss") if True in kinds else ("val_agreement", "val_kl")
        return {"val_images": len(found), names[0]: 100 * same, names[1]: away}


def rank(found: Mapping[str, Any]) -> tuple[float, float]:
    """Return what is higher for the better of two models: by accuracy, then by loss; without labels by KL."""
    if "val_kl" in found:
        first, away = 0.0, found["val_kl"]
    else:
        first, away = found["val_accuracy"], found["val_loss"]
    return (first, -away) if math.isfinite(away) else (-math.inf, -math.inf)


def in_words(found: Mapping[str, Any]) -> str:
    """Say what one validation found."""
    if "val_kl" in found:
        same = f"same answer as the unconverted model on {found['val_agreement']:.2f} %"
        return f"{same} of {found['val_images']} validation images, KL {found['val_kl']:.4f}"
    return f"{found['val_accuracy']:.2f} % of {found['val_images']} validation images"


def held_out(data: Data, share: float, seed: int) -> tuple[Data, Data] | None:
    """Return a data set without a share of its images, and these: of each class its share, never the last image.

    None where so few images have none to spare.
    """
    count = round(share * len(data))
    labelled = "label" in columns_of(data)
    labels = torch.tensor(data.with_format(None)["label"] if labelled else [0] * len(data))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort(stable=True)]  # class by class, in each as they were shuffled
    ordered = labels[order]
    spare = order[1:][ordered[1:] == ordered[:-1]]  # all but the first of each class
    if not 0 < count <= len(spare):
        return None
    # at even distances along the classes, so that each gives its share
    places = ((torch.arange(count) + 0.5) * len(spare) / count).long()
    taken = set(spare[places].tolist())
    rest = [index for index in range(len(labels)) if index not in taken]
    return data.select(rest), data.select(sorted(taken))
