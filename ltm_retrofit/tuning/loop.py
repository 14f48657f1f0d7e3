"""One fine-tune, step by step: what it has come to, how it goes on, and what it falls back to.

Over 400 lines: whatever a step changes, a checkpoint has to hold, and a bad loss has to take back.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from timm.utils import ModelEmaV3  # type: ignore[attr-defined]
from torch import Tensor, nn

from ltm_retrofit.converted.record import is_retrofitted, learns, load_state, mark_finetuned, masks_of
from ltm_retrofit.errors import TrainingError
from ltm_retrofit.merging.statistics import SAMPLES_PER_CLUSTER, Statistics
from ltm_retrofit.merging.tokens import Mask
from ltm_retrofit.progress import progress
from ltm_retrofit.tuning import checkpoints
from ltm_retrofit.tuning.data import Images, Passes, Stream, batches_on, size_of
from ltm_retrofit.tuning.objective import SAMPLES, Objective, terms_of
from ltm_retrofit.tuning.parameters import make_optimizer, make_schedule
from ltm_retrofit.tuning.processes import Accelerator, of_every_process
from ltm_retrofit.tuning.settings import TrainConfig
from ltm_retrofit.tuning.validation import Found, Validation, in_words, rank

#: steps between two copies of the weights that a non-finite loss falls back to, of which it loses that many at most
KEEP_EVERY = 20
#: steps in a row that fp16 may leave out: its scale, 65536 at first, has become nothing by then
SKIPPED = 30


@dataclass
class History:
    """What a fine-tune went through: one entry an epoch, and the loss of every batch.

    Example:
        >>> import ltm_retrofit as ltm
        >>> epoch = {"seconds": 2.0, "waiting": 0.5, "images_per_second": 64.0, "unreadable": 0}
        >>> print(ltm.History([epoch]))
        64 images/s, 25% of the time waiting for the loader

    Args:
        epochs: of each, ``loss`` and its terms (means over the batches; the bound's over those that had one), ``lr``,
            ``images_per_second``, ``seconds`` and how many of them ``waiting`` for the loader,
            ``unreadable`` images, what the masks of ``sites`` have learned, and, where the bound has statistics,
            ``ib``, ``i_input``, ``i_label`` in nats with their ``perplexity`` and ``beta``. What validation found is
            there, too: ``val_accuracy`` (None without labels) and all else that `Validation.measure` returns.
        losses: of each batch.
        before: what validation found before the first step; empty where there was none.
        kept: the epoch whose state the model holds, the best one by validation; 0 is the model as it was given, None
            the last state, where nothing was validated.
    """

    epochs: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    before: dict[str, Any] = field(default_factory=dict)
    kept: int | None = None

    def __str__(self) -> str:
        """Say how fast it went, and whether the loader kept up."""
        if not self.epochs:
            return "no epoch"
        seconds, waiting = (sum(entry[key] for entry in self.epochs) for key in ("seconds", "waiting"))
        images = sum(entry["images_per_second"] * entry["seconds"] for entry in self.epochs)
        missing = self.epochs[-1]["unreadable"]
        speed = images / seconds
        return (
            f"{speed:.{0 if speed >= 10 else 1}f} images/s, {waiting / seconds:.0%} of the time waiting for the loader"
            + f"; {missing} images could not be read" * bool(missing)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@dataclass
class Progress:
    """How far a fine-tune has come.

    Epochs done, batches done of the next one; steps and images in all, batches whose loss held the bound, steps that
    fp16 left out in a row, whether the statistics have been fitted to a full memory; sums over the epoch.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    images: int = 0
    joined: int = 0
    skipped: int = 0
    refreshed: bool = False
    sums: dict[str, float] = field(default_factory=dict)


class Run:
    """A fine-tune under way: `go` takes it to its end, `state` and `load_state` from one process to another.

    Args:
        model: what is trained.
        accelerator: of this run.
        config: as asked for.
        classes: C.
        passes: through the training data.
        folder: of checkpoints, or None.
        validation: what the best state is chosen by, or None.
        say: receives a line for what validation finds.

    Raises:
        CheckpointError: from `load_state`, where the checkpoint is of another run.
        TrainingError: where nothing trains.
    """

    def __init__(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        config: TrainConfig,
        classes: int,
        passes: Passes,
        folder: Path | None,
        validation: Validation | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.model, self.accelerator, self.config = model, accelerator, config
        self.validation, self.say = validation, say
        self.passes, self.folder, self.length = passes, folder, passes.length
        #: batches that make a step, in the memory that there is
        self.accumulate = config.accumulate * config.batch_size // passes.images
        self.total = -(-self.length // self.accumulate) * config.epochs  # steps of the optimizer
        self.began = self._beginning() if folder is not None else {}
        for _, module in self.statistics():
            module.aim(config.perplexity)
        self.objective = Objective(model, config, classes, accelerator)
        optimizer = make_optimizer(model, config)
        schedule = make_schedule(optimizer, config, self.total)
        self.wrapped, self.optimizer, self.schedule = accelerator.prepare(model, optimizer, schedule)
        self.ema = ModelEmaV3(model, decay=config.ema, exclude_buffers=True) if config.ema else None
        self.progress, self.history = Progress(), History()
        self.best: dict[str, Tensor] = {}  # of the epoch that `history.kept` names; on the CPU
        self.good: dict[str, Tensor] = {}
        self.good_step = 0
        self.unproven = False  # whether no loss has been seen yet of the latest checkpoint's weights
        self.optimizer.zero_grad()

    def _beginning(self) -> dict[str, Any]:
        """Say what checkpoints of this run are told apart by."""
        passes, config = self.passes, self.config
        if getattr(passes.loader, "persistent_workers", False):
            warnings.warn(
                "the loader's persistent workers keep random numbers from epoch to epoch that no checkpoint holds: what"
                " they draw differs after a resume. Set persistent_workers=False for the same images bit for bit",
                stacklevel=2,
            )
        given: dict[str, Any] = {"images": self.length * passes.images, "data": passes.digest()}
        terms = [[term.name, term.weight, term.after] for term in terms_of(config)]
        given |= {"processes": self.accelerator.num_processes, "terms": terms}
        given["validation"] = None if self.validation is None else self.validation.digest()
        if isinstance(passes.data, Stream):
            given["workers"] = config.workers  # they share out its files
        return checkpoints.beginning_of(self.model, config, **given)

    # ------------------------------------------------------------------------------------------------- the run

    def go(self) -> History:
        """Train to the end from wherever the progress is; the model then holds the best state by validation.

        Where that is the model as it was given (`History.kept` is 0), it is the caller who has it.
        """
        self.keep_good()
        if self.validation is not None and not self.history.before:
            self.history.before, self.history.kept = self.validate(), 0
            self.say(f"before    {in_words(self.history.before)}")
        # of several processes, each would stop at a step of its own
        stops = self.folder is not None and self.accelerator.num_processes == 1
        with self.bar() as bar, checkpoints.asked_to_stop(self.say, stops) as asked:
            while self.progress.epoch < self.config.epochs:
                self.train_epoch(bar, asked)
                self.finish_epoch()
                if self.folder is not None:
                    self.keep()
                if asked():
                    raise KeyboardInterrupt
        if self.folder is not None and self.accelerator.is_main_process:
            checkpoints.settle(self.folder)
        if self.objective.statistics is not None and not self.progress.joined:
            needed = SAMPLES_PER_CLUSTER * len(self.objective.statistics.centroids)
            warnings.warn(
                f"the bound never joined the loss: it waits for {needed} images and for "
                f"{self.config.bound_warmup:.0%} of the steps, and this run has seen {self.progress.images} in "
                f"{self.total} steps. More images or epochs bring it in, bound='none' leaves it out",
                stacklevel=2,
            )
        if self.best:
            load_state(self.model, self.best)
        elif self.ema is not None:
            with torch.no_grad():
                for parameter, mean in zip(self.model.parameters(), self.ema.module.parameters(), strict=True):
                    parameter.copy_(mean)
        self.say(self.outcome())
        return self.history

    def outcome(self) -> str:
        """Say which state the model holds, and how good it is."""
        kept, history = self.history.kept, self.history
        if kept is None:
            return "kept      the last state: there was nothing to validate it on"
        if not kept:
            given = "the converted model" if is_retrofitted(self.model) else "the model as it was given"
            return f"kept      {given}: no epoch was better, so it is what you get back"
        return f"kept      epoch {kept}, the best one: {in_words(history.epochs[kept - 1])}"

    def bar(self) -> Any:
        """Return a progress bar of the whole run: images, rate, time left."""
        total = self.config.epochs * self.length * self.passes.images
        done = (self.progress.epoch * self.length + self.progress.batch) * self.passes.images
        return progress("training", total, "images", done=done, on=self.accelerator.is_local_main_process)

    def train_epoch(self, bar: Any, asked: Callable[[], bool]) -> None:
        """Learn from the batches of an epoch that are not done; stops between two steps where it is asked to."""
        progress = self.progress
        self.train_mode()
        bar.set_description(f"epoch {progress.epoch + 1}/{self.config.epochs}", refresh=False)
        drawn = self.passes.draw(progress.batch)
        with self.objective.information.listening():
            clock = time.perf_counter()
            for inputs, labels in batches_on(drawn, self.accelerator.device, labelled=not self.config.distill):
                came = time.perf_counter()
                losses = self.train_batch(inputs, labels)
                self._add("waiting", came - clock)
                self._add("seconds", time.perf_counter() - clock)
                bar.set_postfix(loss=f"{losses['loss']:.3f}", refresh=False)
                bar.update(self.passes.images)
                # between two steps, and not at the end, where there is a checkpoint anyway
                whole = progress.batch % self.accumulate == 0 and progress.batch < self.length
                if self.folder is not None and whole:
                    if (stop := asked()) or progress.step % self.config.checkpoint_every == 0:
                        self.keep()
                    if stop:
                        raise KeyboardInterrupt
                clock = time.perf_counter()

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
        first = progress.batch // self.accumulate * self.accumulate
        together = min(self.accumulate, self.length - first)  # fewer are left at the end of an epoch
        last = progress.batch + 1 == first + together
        ready = self.objective.ready()
        progress.joined += ready and progress.step >= self.config.bound_warmup * self.total
        losses = self.objective(self.wrapped, inputs, labels, progress.step, self.total)
        means = self.means(losses)
        value = means["loss"]
        if math.isfinite(value):
            self.accelerator.backward(losses["loss"] / together)
            self.objective.learn()
            if last and not self.clip():
                value = math.nan
        if not math.isfinite(value):
            self.fall_back(value)
        if self.unproven and self.accelerator.is_main_process:
            checkpoints.settle(cast("Path", self.folder))
        self.unproven = False
        images = size_of(inputs) * self.accelerator.num_processes
        progress.images += images
        progress.batch += 1
        if last:
            self.step()
        self.history.losses.append(means["loss"])
        for key, mean in means.items():
            self._add(key, mean / self.length)
        self._add("bounded", float(ready) / self.length)
        self._add("images", images)
        return means

    def means(self, losses: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the means over all processes."""
        stacked = torch.stack([value.detach().float().to(self.accelerator.device) for value in losses.values()])
        return dict(zip(losses, self.accelerator.reduce(stacked, "mean").tolist(), strict=True))

    def clip(self) -> bool:
        """Clip the gradient that has come together; return whether the step can be taken or left out."""
        norm = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.config.clip or math.inf)
        if norm is None or bool(torch.isfinite(norm)):
            self.progress.skipped = 0
            return True
        # in fp16 the scaler leaves the step out by itself, and scales less afterwards
        self.progress.skipped += 1
        return self.config.mixed_precision == "fp16" and self.progress.skipped <= SKIPPED

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

    def refresh(self) -> None:
        """Fit all statistics anew to their memories."""
        for _, module in self.statistics():
            module.refresh()
        if self.ema is not None:  # which copies buffers with each step, and is what validation sees
            for theirs, ours in zip(self.ema.module.buffers(), self.model.buffers(), strict=True):
                theirs.copy_(ours)

    def finish_epoch(self) -> None:
        """Note what the epoch brought, what is known of the feature, and whether this is the best state so far."""
        clock = time.perf_counter()
        known = self.objective.information.estimate()  # with the statistics that the epoch ended with
        self.refresh()
        self._add("seconds", time.perf_counter() - clock)
        progress, sums = self.progress, self.progress.sums
        images, bounded = int(sums.pop("images")), sums.pop("bounded")
        sums["bound"] = sums.get("bound", 0.0) / (bounded or 1.0)  # the mean over the batches that had one
        damaged = of_every_process(self.passes.damaged(), self.accelerator)
        entry = {
            "epoch": progress.epoch + 1,
            **sums,
            **known,
            "lr": self.schedule.get_last_lr()[0],
            "val_accuracy": None,
            **({} if self.validation is None else self.validate()),
            "images_per_second": images / sums["seconds"],
            "unreadable": len(set().union(*damaged)),
            "sites": self.sites(),
        }
        self.history.epochs.append(entry)
        if self.validation is not None:
            self.say(f"epoch {entry['epoch']}/{self.config.epochs}  loss {entry['loss']:.4f}  {in_words(entry)}")
            self.keep_best(entry)
        progress.epoch, progress.batch, progress.sums = progress.epoch + 1, 0, {}

    def validate(self) -> Found:
        """Return what validation finds of the model as it is, or of the average of its weights."""
        assert self.validation is not None
        teach = (lambda inputs: self.objective.teach(inputs)[0]) if self.config.distill else None
        return self.validation.measure(self.judged(), self.accelerator, teach)

    def judged(self) -> nn.Module:
        """Return the model that the run is about: the average of its weights, where there is one."""
        return self.model if self.ema is None else self.ema.module

    def keep_best(self, entry: Mapping[str, Any]) -> None:
        """Copy the state of this epoch where validation never found a better one."""
        history = self.history
        best = history.epochs[history.kept - 1] if history.kept else history.before
        if rank(entry) > rank(best):
            history.kept = entry["epoch"]
            state = self.judged().state_dict()
            self.best = {key: tensor.detach().to("cpu", copy=True) for key, tensor in state.items()}

    def sites(self) -> dict[str, dict[str, float]]:
        """Return what each mask has learned, as it says itself."""
        return {n: m.learned() for n, m in masks_of(self.model).items() if isinstance(m, Mask) and learns(m)}

    def _add(self, key: str, value: float) -> None:
        self.progress.sums[key] = self.progress.sums.get(key, 0.0) + value

    def statistics(self) -> Iterator[tuple[str, Statistics]]:
        """Go through what the model knows of its descriptors."""
        return ((name, module) for name, module in self.model.named_modules() if isinstance(module, Statistics))

    # ----------------------------------------------------------------------------------- where it can go back to

    def keep_good(self) -> None:
        """Copy the weights that a loss which is not finite falls back to."""
        self.good = {key: tensor.detach().clone() for key, tensor in self.model.state_dict().items()}
        self.good_step = self.progress.step

    def fall_back(self, value: float) -> None:
        """Put the last good weights back and stop.

        Raises:
            TrainingError: always.
        """
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

    def keep(self) -> None:
        """Write a checkpoint; all processes have to call it."""
        state = self.state()
        if self.accelerator.is_main_process:
            checkpoints.write(cast("Path", self.folder), state)
        self.accelerator.wait_for_everyone()
        self.unproven = True

    def state(self) -> dict[str, Any]:
        """Return all that the run goes on from; all processes have to call it, for each draws numbers of its own."""
        own = {
            "passes": self.passes.state(),
            "unreadable": self.passes.damaged(),
            "information": self.objective.information.memory.state(),  # the statistics' are of all processes' images
        }
        return {
            **{name: part.state_dict() for name, part in self._parts().items()},
            "began": self.began,
            "batch_images": self.passes.images,
            "random": of_every_process(own, self.accelerator),
            "progress": asdict(self.progress),
            "history": asdict(self.history),
            "best": self.best,
            "memories": {name: module.memory.state() for name, module in self.statistics()},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned.

        Raises:
            CheckpointError: where it is of another run: other settings, model, data, or number of processes.
        """
        checkpoints.check_same(state["began"], self.began)
        for name, part in self._parts().items():
            if isinstance(part, nn.Module):
                load_state(part, state[name])
            else:
                part.load_state_dict(state[name])
        device = self.accelerator.device
        for name, module in self.statistics():
            module.memory.set_state(state["memories"][name], device)
        self.progress, self.history = Progress(**state["progress"]), History(**state["history"])
        self.best = dict(state["best"])
        own = state["random"][self.accelerator.process_index]
        self.passes.load_state(own["passes"])
        if isinstance(self.passes.data, Images):
            self.passes.data.unreadable[own["unreadable"]] = True
        self.objective.information.memory.set_state(own["information"], device)
        # its own run may have been killed before it saw a loss of these weights
        self.unproven = self.folder is not None and not checkpoints.is_settled(self.folder)
        if self.progress.step:
            mark_finetuned(self.model)

    def _parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        parts |= {} if self.ema is None else {"ema": self.ema.module}
        return parts | ({} if self.accelerator.scaler is None else {"scaler": self.accelerator.scaler})
