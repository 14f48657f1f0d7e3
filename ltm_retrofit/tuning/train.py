"""finetune(): a short fine-tune with the information-bottleneck bound, through Accelerate."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ltm_retrofit.blocks import CHILD, FINETUNED
from ltm_retrofit.convert import mark_finetuned
from ltm_retrofit.errors import DataError, TrainingError
from ltm_retrofit.graph.example import home
from ltm_retrofit.interception.masks import LEARNABLE
from ltm_retrofit.merging.grid import GridMask
from ltm_retrofit.merging.mask import MaskModule
from ltm_retrofit.merging.statistics import Statistics
from ltm_retrofit.tuning.data import Data, batches_on, check_labels, is_table, make_loader, size_of
from ltm_retrofit.tuning.evaluate import count_classes, evaluate
from ltm_retrofit.tuning.objective import Objective
from ltm_retrofit.tuning.parameters import checkpointed, chosen, low_rank, make_optimizer
from ltm_retrofit.tuning.processes import make_accelerator
from ltm_retrofit.tuning.settings import TrainConfig

#: steps between two copies of the weights that a non-finite loss falls back to
KEEP_EVERY = 20


@dataclass
class History:
    """What a fine-tune went through: one entry an epoch, and the loss of every step."""

    epochs: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def finetune(model: nn.Module, train: Data, val: Data | None = None, *, config: TrainConfig | None = None) -> History:
    """Fine-tune a model in place, converted or not, through Accelerate.

    Args:
        model: any classifier; the bound is left out where there is no learnable mask.
        train: a `datasets` data set with columns ``image`` and ``label``, or a loader of batches.
        val: likewise; its accuracy is noted after every epoch.
        config: see `TrainConfig`.

    Returns:
        The history. The model keeps its device, training flags and ``requires_grad``.

    Raises:
        DataError: labels that do not fit the model's classes, columns missing, a class without images.
        TrainingError: no classifier, nothing to train, or a loss that is not finite (the model then holds the last
            weights whose loss was).
    """
    config = config or TrainConfig()
    accelerator = make_accelerator(config.mixed_precision, config.batch_size)
    classes = count_classes(model)
    for data, split in ((train, "training"), (val, "validation")):
        if (
            data is not None
            and is_table(data)
            and ("label" in data.column_names or split == "validation" or not config.distill)
        ):
            check_labels(data, classes, split)
    loader = make_loader(
        model,
        train,
        batch_size=config.batch_size,
        shuffle=True,
        augment=config.augment,
        seed=config.seed,
        workers=config.workers,
    )
    if accelerator.num_processes > 1:
        if not isinstance(loader, DataLoader):
            raise DataError(
                f"{accelerator.num_processes} processes share a torch DataLoader or a data set among them, got "
                f"{type(loader).__name__}"
            )
        loader = accelerator.prepare_data_loader(loader)
    try:
        length = len(loader)  # type: ignore[arg-type]
    except TypeError:
        raise DataError("finetune needs to know how many steps an epoch has: pass a loader that has a length") from None
    if length == 0:
        raise DataError("the training loader has no batch: it needs at least one")
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        torch.manual_seed(config.seed + accelerator.process_index)
        stack.enter_context(low_rank(model, config))
        stack.enter_context(checkpointed(model, config.checkpointing))
        stack.enter_context(_kept_state(model, config.train))
        return _Run(model, accelerator, config, classes, length).epochs(loader, val)


class _Run:
    """One fine-tune: optimizer, schedule, bound, and the weights to fall back to."""

    def __init__(
        self, model: nn.Module, accelerator: Accelerator, config: TrainConfig, classes: int, length: int
    ) -> None:
        self.model, self.accelerator, self.config = model, accelerator, config
        steps = -(-length // config.accumulate)  # of the optimizer, in an epoch
        self.total, self.length, self.step = steps * config.epochs, length, 0
        self.objective = Objective(model, config, classes)
        optimizer = make_optimizer(model, config)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        self.wrapped, self.optimizer, self.schedule = accelerator.prepare(model, optimizer, schedule)
        self.ema = ModelEmaV3(model, decay=config.ema, exclude_buffers=True) if config.ema else None
        self.good: dict[str, Tensor] = {}
        self.good_step = 0
        self.optimizer.zero_grad()

    def _rate(self, step: int) -> float:
        done, warmup = step / max(1, self.total), self.config.warmup
        return (step + 1) / (warmup * self.total + 1) if done < warmup else 0.5 * (1 + math.cos(math.pi * done))

    def epochs(self, loader: Any, val: Data | None) -> History:
        history = History()
        for epoch in range(self.config.epochs):
            began, sums = time.perf_counter(), defaultdict[str, float](float)
            images = 0
            self.wrapped.train()
            batches = batches_on(loader, self.accelerator.device, labelled=not self.config.distill)
            alone = self.accelerator.is_local_main_process
            bar = tqdm(
                batches,
                total=self.length,
                desc=f"epoch {epoch + 1}/{self.config.epochs}",
                leave=False,
                disable=None if alone else True,
            )
            for number, (inputs, labels) in enumerate(bar, start=1):
                losses = self.train_step(inputs, labels, number)
                for key, value in losses.items():
                    sums[key] += value / self.length
                history.losses.append(losses["loss"])
                images += size_of(inputs) * self.accelerator.num_processes
                bar.set_postfix(loss=f"{losses['loss']:.3f}")
            self.refresh()
            seconds = time.perf_counter() - began
            history.epochs.append(
                {
                    "epoch": epoch + 1,
                    **sums,
                    "lr": self.schedule.get_last_lr()[0],
                    "val_accuracy": None if val is None else self.validate(val),
                    "seconds": seconds,
                    "images_per_second": images / seconds,
                    "sites": self.sites(),
                }
            )
        if self.ema is not None:
            with torch.no_grad():
                for parameter, mean in zip(self.model.parameters(), self.ema.module.parameters(), strict=True):
                    parameter.copy_(mean)
        return history

    def train_step(self, inputs: Any, labels: Tensor | None, number: int) -> dict[str, float]:
        """Learn from one batch of an epoch; stops before the step where the loss or its gradient is not finite."""
        together = self.config.accumulate  # batches that make this step: fewer are left at the end of an epoch
        before = (number - 1) // together * together
        together = min(together, self.length - before)
        joins = self.step >= self.config.bound_warmup * self.total
        losses = self.objective(self.wrapped, inputs, labels, bound=joins)
        means = self.means(losses)
        value = means["loss"]
        if math.isfinite(value):
            self.accelerator.backward(losses["loss"] / together)
            if number < before + together:
                return means
            norm = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.config.clip or math.inf)
            if norm is not None and not bool(torch.isfinite(norm)) and self.config.mixed_precision != "fp16":
                value = math.nan
        if not math.isfinite(value):
            self.fall_back(value)
        if self.step % KEEP_EVERY == 0:
            self.good = {key: tensor.detach().clone() for key, tensor in self.model.state_dict().items()}
            self.good_step = self.step
        self.optimizer.step()
        self.optimizer.zero_grad()
        mark_finetuned(self.model)
        self.schedule.step()
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.model)
        images = self.config.batch_size * self.config.accumulate
        if self.step * images // 1024 >= 1 and (self.step - 1) * images < 1024:
            self.refresh()  # the first fit saw few images for each cluster; now the memory is full
        return means

    def validate(self, val: Data) -> float:
        """Return the accuracy on validation data, which the processes share."""
        model = self.model if self.ema is None else self.ema.module
        return evaluate(model, val, self.config.batch_size, self.accelerator)

    def means(self, losses: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the means over all processes."""
        stacked = torch.stack([value.detach().float().to(self.accelerator.device) for value in losses.values()])
        return dict(zip(losses, self.accelerator.reduce(stacked, "mean").tolist(), strict=True))

    def fall_back(self, value: float) -> None:
        """Put the last good weights back and stop."""
        if self.good:
            self.model.load_state_dict(self.good)
        raise TrainingError(
            f"the loss or its gradient is not finite at step {self.step + 1} of {self.total} (loss {value}): the model "
            f"holds the weights from before step {self.good_step + 1}. Lower lr ({self.config.lr:g}), check the images "
            "for NaN, or use mixed_precision='no'"
        )

    def refresh(self) -> None:
        """Fit all statistics anew to their memories."""
        for module in self.model.modules():
            if isinstance(module, Statistics):
                module.refresh()

    def sites(self) -> dict[str, dict[str, float]]:
        """Return what each mask has learned: η and the temperature of its softmax."""
        return {
            name.removesuffix(CHILD).rstrip("."): {
                "eta": module.eta.item(),
                **({"temperature": math.exp(-module.log_scale.item())} if isinstance(module, MaskModule) else {}),
                **({"alpha": module.alpha.item()} if isinstance(module, GridMask) else {}),
            }
            for name, module in self.model.named_modules()
            if isinstance(module, LEARNABLE)
        }


@contextmanager
def _kept_state(model: nn.Module, train: str) -> Iterator[None]:
    """Choose what trains, and put training flags and ``requires_grad`` back afterwards."""
    device = home(model)[0]
    flags = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    if train != "all":
        training = chosen(model, train)
        for parameter in wanted:
            parameter.requires_grad_(parameter in training)
    attributes = set(model.__dict__)
    forward = model.__dict__.get("forward")
    try:
        yield
    finally:
        # Accelerate wraps the forward of the model itself for mixed precision, and leaves a mark
        for name in set(model.__dict__) - attributes - {FINETUNED}:
            del model.__dict__[name]
        if forward is not None:
            model.__dict__["forward"] = forward
        model.to(device)
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)
            parameter.grad = None
        for module, flag in flags.items():
            module.training = flag
