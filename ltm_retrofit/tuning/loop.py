"""One fine-tune, step by step: what it has come to, how it goes on, and what it falls back to."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3  # type: ignore[attr-defined]
from torch import Tensor, nn
from tqdm.auto import tqdm

from ltm_retrofit.converted.record import learns, load_state, mark_finetuned
from ltm_retrofit.errors import TrainingError
from ltm_retrofit.merging.grid import GridMask
from ltm_retrofit.merging.mask import MaskModule
from ltm_retrofit.merging.matching import SimilarityMask
from ltm_retrofit.merging.statistics import Statistics
from ltm_retrofit.scopes.base import CHILD
from ltm_retrofit.tuning import checkpoints
from ltm_retrofit.tuning.data import Data, batches_on, size_of
from ltm_retrofit.tuning.evaluate import evaluate_in_memory
from ltm_retrofit.tuning.history import History, Progress, beginning
from ltm_retrofit.tuning.images import Stream
from ltm_retrofit.tuning.information import SAMPLES
from ltm_retrofit.tuning.objective import Objective
from ltm_retrofit.tuning.parameters import make_optimizer
from ltm_retrofit.tuning.passes import Passes
from ltm_retrofit.tuning.resuming import keep
from ltm_retrofit.tuning.schedule import make_schedule
from ltm_retrofit.tuning.settings import TrainConfig

#: steps between two copies of the weights that a non-finite loss falls back to, of which it loses that many at most
KEEP_EVERY = 20
#: steps in a row that fp16 may leave out: its scale, 65536 at first, has become nothing by then
SKIPPED = 30


class Run:
    """Optimizer, schedule, bound, and the weights to fall back to.

    Args:
        model: what is trained.
        accelerator: of this run.
        config: as asked for.
        classes: C.
        accumulate: batches that make a step, in the memory that there is.
        passes: through the training data, as Accelerate prepared it.
        folder: of checkpoints, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        config: TrainConfig,
        classes: int,
        passes: Passes,
        accumulate: int,
        folder: Path | None,
    ) -> None:
        self.model, self.accelerator, self.config = model, accelerator, config
        self.passes, self.accumulate, self.folder, self.length = passes, accumulate, folder, passes.length
        self.total = -(-self.length // accumulate) * config.epochs  # steps of the optimizer
        self.began: dict[str, Any] = {}  # what checkpoints are told apart by; without any, nobody asks
        if folder is not None:
            images = self.length * passes.images
            digest, stream = passes.digest(), isinstance(passes.place, Stream)
            self.began = beginning(model, config, images, digest, accelerator.num_processes, stream=stream)
        for _, module in self.statistics():
            module.aim(config.perplexity)
        self.objective = Objective(model, config, classes, accelerator)
        optimizer = make_optimizer(model, config)
        schedule = make_schedule(optimizer, config, self.total)
        self.wrapped, self.optimizer, self.schedule = accelerator.prepare(model, optimizer, schedule)
        self.ema = ModelEmaV3(model, decay=config.ema, exclude_buffers=True) if config.ema else None
        self.progress, self.history = Progress(), History()
        self.good: dict[str, Tensor] = {}
        self.good_step = 0
        self.unproven = False  # whether no loss has been seen yet of the latest checkpoint's weights
        self.optimizer.zero_grad()

    def go(self, val: Data | None) -> History:
        """Train to the end from wherever the progress is."""
        progress = self.progress
        self.keep_good()
        while progress.epoch < self.config.epochs:
            self.train_mode()
            bar = tqdm(
                total=self.length,
                initial=progress.batch,
                desc=f"epoch {progress.epoch + 1}/{self.config.epochs}",
                leave=False,
                disable=None if self.accelerator.is_local_main_process else True,
            )
            drawn = self.passes.draw(progress.batch)
            with bar, self.objective.informed():
                clock = time.perf_counter()
                for inputs, labels in batches_on(drawn, self.accelerator.device, labelled=not self.config.distill):
                    came = time.perf_counter()
                    losses = self.train_batch(inputs, labels)
                    self._add("waiting", came - clock)
                    self._add("seconds", time.perf_counter() - clock)
                    bar.update()
                    bar.set_postfix(loss=f"{losses['loss']:.3f}")
                    if self._due():
                        self.keep()
                    clock = time.perf_counter()
            clock = time.perf_counter()
            known = self.objective.estimate()  # with the statistics that the epoch ended with
            self.refresh()
            self._add("seconds", time.perf_counter() - clock)
            self.finish_epoch(val, known)
            if self.folder is not None:
                self.keep()
        if self.folder is not None and self.accelerator.is_main_process:
            checkpoints.settle(self.folder)
        if self.objective.bounded and not progress.joined:
            warnings.warn(
                f"the bound never joined the loss: it waits for {self.objective.needed()} images and for "
                f"{self.config.bound_warmup:.0%} of the steps, and this run has seen {progress.images} in {self.total} "
                "steps. More images or epochs bring it in, bound='none' leaves it out",
                stacklevel=2,
            )
        if self.ema is not None:
            with torch.no_grad():
                for parameter, mean in zip(self.model.parameters(), self.ema.module.parameters(), strict=True):
                    parameter.copy_(mean)
        return self.history

    def train_mode(self) -> None:
        """Let layers train; batch norms whose weights stay keep their averages too, unless everything trains."""
        self.wrapped.train()
        if self.config.train != "all":
            for module in self.model.modules():
                own = module.parameters(recurse=False)
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and not any(p.requires_grad for p in own):
                    module.eval()

    def train_batch(self, inputs: Any, labels: Tensor | None) -> dict[str, float]:
        """Learn from one batch; stops before the step where the loss or its gradient is not finite."""
        progress = self.progress
        before = progress.batch // self.accumulate * self.accumulate
        together = min(self.accumulate, self.length - before)  # fewer are left at the end of an epoch
        self.anneal()
        joins = progress.step >= self.config.bound_warmup * self.total
        ready = self.objective.ready()
        progress.joined += ready and joins
        losses = self.objective(self.wrapped, inputs, labels, bound=joins)
        means = self.means(losses)
        value = means["loss"]
        if math.isfinite(value):
            self.accelerator.backward(losses["loss"] / together)
            self.objective.learn()
            if progress.batch + 1 == before + together:
                norm = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.config.clip or math.inf)
                if norm is not None and not bool(torch.isfinite(norm)):
                    progress.skipped += 1  # in fp16 the scaler leaves the step out, and scales less from then on
                    if self.config.mixed_precision != "fp16" or progress.skipped > SKIPPED:
                        value = math.nan
                else:
                    progress.skipped = 0
        if not math.isfinite(value):
            self.fall_back(value)
        if self.unproven and self.accelerator.is_main_process:
            checkpoints.settle(cast("Path", self.folder))
        self.unproven = False
        images = size_of(inputs) * self.accelerator.num_processes
        progress.images += images
        progress.batch += 1
        if progress.batch == before + together:
            self.step()
        self.history.losses.append(means["loss"])
        for key, mean in means.items():
            self._add(key, mean / self.length)
        self._add("bounded", float(ready) / self.length)
        self._add("images", images)
        return means

    def step(self) -> None:
        """Change the weights by the gradient that has come together."""
        progress = self.progress
        if progress.step % KEEP_EVERY == 0 and progress.step > self.good_step:
            self.keep_good()
        self.optimizer.step()
        self.optimizer.zero_grad()
        mark_finetuned(self.model)
        self.schedule.step()
        progress.step += 1
        if self.ema is not None:
            self.ema.update(self.model)
        if not progress.refreshed and progress.images >= SAMPLES:
            progress.refreshed = True
            self.refresh()  # the first fit saw few images for each cluster; now the memory is full

    def keep_good(self) -> None:
        """Copy the weights that a loss which is not finite falls back to."""
        self.good = {key: tensor.detach().clone() for key, tensor in self.model.state_dict().items()}
        self.good_step = self.progress.step

    def anneal(self) -> None:
        """Let the token counts fall towards the plan's, over the first steps of the run."""
        if not self.config.anneal:
            return
        share = self.progress.step / (self.config.anneal * self.total)
        for model in (self.model,) if self.ema is None else (self.model, self.ema.module):
            for module in model.modules():
                if isinstance(module, SimilarityMask):
                    module.reached = min(1.0, share)

    def _due(self) -> bool:
        """Say whether it is time for a checkpoint: between two steps, and not at the end, where there is one anyway."""
        progress = self.progress
        whole = progress.batch % self.accumulate == 0 and progress.batch < self.length
        return self.folder is not None and whole and progress.step % self.config.checkpoint_every == 0

    def finish_epoch(self, val: Data | None, known: Mapping[str, float]) -> None:
        """Note what the epoch brought, and what is known of the feature."""
        progress, sums = self.progress, self.progress.sums
        images, bounded = int(sums.pop("images")), sums.pop("bounded")
        sums["bound"] /= bounded or 1.0  # the mean over the batches that had one
        rows = checkpoints.of_every_rank(self.passes.unreadable(), self.accelerator)
        entry = {
            "epoch": progress.epoch + 1,
            **sums,
            **known,
            "lr": self.schedule.get_last_lr()[0],
            "val_accuracy": None if val is None else self.validate(val),
            "images_per_second": images / sums["seconds"],
            "unreadable": len(set().union(*rows)),
            "sites": self.sites(),
        }
        self.history.epochs.append(entry)
        progress.epoch, progress.batch, progress.sums = progress.epoch + 1, 0, {}

    def validate(self, val: Data) -> float:
        """Return the accuracy on validation data, which the processes share."""
        model = self.model if self.ema is None else self.ema.module
        return evaluate_in_memory(model, val, self.config.batch_size, self.accelerator)

    def means(self, losses: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the means over all processes."""
        stacked = torch.stack([value.detach().float().to(self.accelerator.device) for value in losses.values()])
        return dict(zip(losses, self.accelerator.reduce(stacked, "mean").tolist(), strict=True))

    def fall_back(self, value: float) -> None:
        """Put the last good weights back and stop."""
        load_state(self.model, self.good)
        kept = ""
        if self.folder is not None:
            if self.unproven and self.accelerator.is_main_process:
                checkpoints.take_back(self.folder)
            self.accelerator.wait_for_everyone()
            if checkpoints.exists(self.folder):
                kept = (
                    f" The last checkpoint in {self.folder} is of weights whose loss was finite, too; a run that goes "
                    "on from it comes to the same end: begin anew in another folder."
                )
        raise TrainingError(
            f"the loss or its gradient is not finite at step {self.progress.step + 1} of {self.total} (loss {value}): "
            f"the model holds the weights from before step {self.good_step + 1}.{kept} Lower lr ({self.config.lr:g}), "
            "check the images for NaN, or use mixed_precision='no'"
        )

    def refresh(self) -> None:
        """Fit all statistics anew to their memories."""
        for _, module in self.statistics():
            module.refresh()
        if self.ema is not None:  # which copies buffers with each step, and is what validation sees
            for theirs, ours in zip(self.ema.module.buffers(), self.model.buffers(), strict=True):
                theirs.copy_(ours)

    def sites(self) -> dict[str, dict[str, float]]:
        """Return what each mask has learned: η and the temperature of its softmax."""
        return {
            name.removesuffix(CHILD).rstrip("."): {
                **({"eta": module.eta.item()} if hasattr(module, "eta") else {}),
                **({"temperature": math.exp(-module.log_scale.item())} if isinstance(module, MaskModule) else {}),
                **({"alpha": module.alpha.item()} if isinstance(module, GridMask) else {}),
            }
            for name, module in self.model.named_modules()
            if learns(module)
        }

    def keep(self) -> None:
        """Write a checkpoint; all processes have to call it."""
        keep(self)
        self.unproven = True

    def _add(self, key: str, value: float) -> None:
        self.progress.sums[key] = self.progress.sums.get(key, 0.0) + value

    def statistics(self) -> Iterator[tuple[str, Statistics]]:
        """Go through what the model knows of its descriptors."""
        return ((name, module) for name, module in self.model.named_modules() if isinstance(module, Statistics))
