"""One run of the ablation: an arm converted, tuned and read."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ablation_base as base
import torch
from ablation_arms import ALL, BATCH, CLUSTERS, PERPLEXITY, Arm, arm_of, convert
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import ltm_retrofit as ltm
from ltm_retrofit.finding.example import prepare_example
from ltm_retrofit.macs import count_macs
from ltm_retrofit.merging import ib
from ltm_retrofit.tuning.data import UNLABELLED

#: one character for each image, so that differences are paired
BITS = bytes.maketrans(b"\x00\x01", b".x")
Images = tuple[Tensor, Tensor]


class Job(NamedTuple):
    """A run, and what its line in the log is known by.

    ``stage`` is "choose": tuned, read on the images set aside; "vary": likewise, a variation of an arm; "test": tuned,
    read on the test images.
    """

    stage: str
    arm: str
    flops: float
    epochs: int = 0
    rate: float = 0.0
    seed: int = 0
    #: that train
    images: int = ALL


class Batches:
    """Augmented batches of the training images, drawn anew each time, from one seed."""

    def __init__(self, images: Tensor, labels: Tensor, seed: int, *, labelled: bool = True) -> None:
        self.images, self.labels = images, labels if labelled else torch.full_like(labels, UNLABELLED)
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.images) // BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images), generator=self.generator).to(self.images.device)
        for index in order[: len(self) * BATCH].split(BATCH):
            images = base.augmented(self.images[index], self.generator)
            yield base.to_batch(images), self.labels[index]


@functools.lru_cache
def images_of(data: Path) -> tuple[Images, Images, Images]:
    """Return the images that train, those set aside, and the test images, with their labels."""
    images, labels = (part.to(base.DEVICE) for part in base.decoded(data, "train"))
    train, held = (images[: -base.ASIDE], labels[: -base.ASIDE]), (images[-base.ASIDE :], labels[-base.ASIDE :])
    return train, held, tuple(part.to(base.DEVICE) for part in base.decoded(data, "test"))


def do(job: Job, data: Path, threads: int) -> dict[str, Any]:
    """Do a run and return its line."""
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU
    began = time.perf_counter()
    train, held, test = images_of(data)
    train = train[0][: job.images], train[1][: job.images]
    arm, kept = arm_of(job.arm), weights_of(job)
    if job.stage == "test" and kept.exists():
        model = convert(arm.method, job.flops, arm.masks).to(base.DEVICE).eval()
        model.load_state_dict(load_file(kept))
    else:
        model = tuned(arm, job, train)
    if job.stage == "choose":
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), kept)
    line = job._asdict() | read(model, test if job.stage == "test" else held)
    line["macs"] = count_macs(model, prepare_example(model, None)).total
    if job.stage == "test":
        line |= information(model, held, test)
    if arm.method is not None:
        line["tokens"] = {row.site: row.tokens_out for row in ltm.get_plan(model).rows}
    return line | {"seconds": time.perf_counter() - began, "hardware": base.hardware()}


def tuned(arm: Arm, job: Job, train: Images) -> nn.Module:
    """Return an arm's network, converted and, where it has settings for that, fine-tuned."""
    torch.manual_seed(job.seed)
    model = convert(arm.method, job.flops, arm.masks).to(base.DEVICE)
    if arm.settings is None:
        return model.eval()
    settings = dict(arm.settings)
    labelled = settings.pop("labels", True)
    if "mask_lr" in settings:
        settings["mask_lr"] *= job.rate
    config = ltm.TrainConfig(epochs=job.epochs, lr=job.rate, seed=job.seed, **settings)
    ltm.finetune(model, Batches(*train, job.seed, labelled=labelled), config=config)
    return model.eval()


def read(model: nn.Module, images: Images) -> dict[str, Any]:
    """Return the accuracy in percent, a character for each image, x where it is recognised, and the cross-entropy."""
    logits = base.logits_of(model, images[0])
    right, loss = logits.argmax(-1) == images[1], F.cross_entropy(logits, images[1]).item()
    return {
        "accuracy": base.share(right),
        "loss": loss,
        "right": bytes(right.to(torch.uint8).tolist()).translate(BITS).decode(),
    }


@torch.no_grad()
def information(model: nn.Module, fit: Images, test: Images) -> dict[str, float]:
    """Return IB, I(X̃;X) and I(X̃;Y) of the classifier's feature on test images, clusters fitted on others."""
    read: list[Tensor] = []
    handles = [
        model.head.register_forward_pre_hook(lambda _, args: read.append(args[0])),
        model.blocks[0].register_forward_pre_hook(lambda _, args: read.append(args[0].mean(dim=1))),
    ]
    phis = {}
    for name, (images, _) in (("fit", fit), ("test", test)):
        read.clear()
        for part in images.split(250):
            model(base.to_batch(part))
        inputs, features = torch.cat(read[::2]), torch.cat(read[1::2])
        if name == "fit":
            generator = torch.Generator().manual_seed(0)
            places = [ib.kmeans(x, CLUSTERS, generator=generator) for x in (inputs, features)]
            betas = [ib.beta_for_perplexity(x, c, PERPLEXITY) for x, c in zip((inputs, features), places, strict=True)]
        phis[name] = [ib.log_assign(x, c, b).exp() for x, c, b in zip((inputs, features), places, betas, strict=True)]
    for handle in handles:
        handle.remove()
    phi_x, phi = phis["test"]
    targets = ib.soft_targets(test[1], 10)
    i_input, i_label = (value.item() for value in ib.informations(phi, phi_x, targets))
    return {"ib": i_input - i_label, "i_input": i_input, "i_label": i_label}


def weights_of(job: Job) -> Path:
    """Return where the network of a rate is kept; the best rate's is the first seed's that is tested."""
    known = job._replace(stage="choose")
    words = "_".join(f"{key}={value}" for key, value in known._asdict().items())
    return base.RUNS / "".join(letter if letter.isalnum() or letter in "_=.-" else "+" for letter in words)
