"""One process or several, and the memory that each has: the only room that knows Accelerate.

Every process that was asked for takes part, or says that it does not.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

from accelerate import Accelerator as Accelerator  # others type with it
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    find_executable_batch_size,
    gather_object,
)
from torch.utils.data import DataLoader

from ltm_retrofit.errors import DataError, TrainingError
from ltm_retrofit.tuning.settings import TrainConfig

T = TypeVar("T")
#: what shards or wraps the model itself; merged tokens carry their sizes on the tensor, which these copy away
WRAPPERS = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")
#: what a launch says in the environment: its variable, what stands for nothing, our setting, how it is called
LAUNCHED = (
    ("MIXED_PRECISION", "no", "mixed_precision", "mixed precision {!r}"),
    ("GRADIENT_ACCUMULATION_STEPS", "1", "accumulate", "{} gradient accumulation steps"),
)


@contextmanager
def own_accelerator(config: TrainConfig) -> Iterator[Accelerator]:
    """Give a run an Accelerator of its own, beside any of the caller's; a batch is shared out among its processes.

    Raises:
        TrainingError: where several processes were asked for and this one runs alone (`accelerate launch --cpu` and
            a torchrun that does not know it is to use CPUs do that silently), where the model would be sharded, where
            the launch says other things than the settings, or where a batch cannot be shared out.
    """
    check_launch(config)
    kept = [(state, dict(state._shared_state)) for state in (AcceleratorState, GradientState)]
    try:
        for state, _ in kept:  # a process has one of each; a run that takes the caller's would change its precision
            state._reset_state()
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            dataloader_config=DataLoaderConfiguration(split_batches=True),
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the loop divides by itself
            # a host may have parameters that no output depends on, such as DINOv2's mask token
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        check_kind(accelerator, config)
        yield accelerator
    finally:
        for state, values in kept:
            state._reset_state()
            state._shared_state.update(values)


def check_launch(config: TrainConfig) -> None:
    """Check that what `accelerate launch` was told is what the settings say; where it is not, one of them was lost.

    Raises:
        TrainingError: naming both.
    """
    for wrapper in WRAPPERS:
        if os.environ.get(f"ACCELERATE_USE_{wrapper}", "").lower() in ("true", "1"):
            raise _wrapped(wrapper)
    for variable, default, setting, words in LAUNCHED:
        value, ours = os.environ.get(f"ACCELERATE_{variable}", default), getattr(config, setting)
        if value not in (default, str(ours)):
            raise TrainingError(
                f"accelerate was launched with {words.format(value)}, and TrainConfig has {setting}={ours!r}: say it "
                "there, or leave it out of the launch"
            )


def check_kind(accelerator: Accelerator, config: TrainConfig) -> None:
    """Check that a run can be had of an Accelerator.

    Raises:
        TrainingError: see `own_accelerator`.
    """
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise _wrapped(kind.value)
    check_alone(accelerator.num_processes)
    if config.batch_size % accelerator.num_processes:
        raise TrainingError(
            f"batch_size counts the images of a step in all processes: {config.batch_size} cannot be shared out among "
            f"{accelerator.num_processes}"
        )
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise TrainingError("mixed_precision='fp16' needs a GPU, and Accelerate would use none here: take 'bf16'")


def _wrapped(kind: str) -> TrainingError:
    return TrainingError(
        f"finetune cannot run under {kind}: its wrapper hands copies of tokens from block to block, and what merged "
        "tokens carry with them is lost. Use data parallelism (torchrun, or accelerate launch --multi_gpu)"
    )


def check_alone(processes: int) -> None:
    """Check that a process which runs alone was meant to.

    Raises:
        TrainingError: where a launcher was told of several.
    """
    if processes > 1:
        return
    world = os.environ.get("WORLD_SIZE", "1")
    if world.isdigit() and int(world) > 1:
        raise TrainingError(
            f"torchrun started {world} processes, but each runs alone, since Accelerate looks for GPUs: set "
            "ACCELERATE_USE_CPU=true for several processes on CPUs"
        )
    # set by `accelerate launch` for more than one process on one machine, and by no launcher without a rank; a port
    # that a cluster handed down comes with that cluster's address
    local = "MASTER_PORT" in os.environ and os.environ.get("MASTER_ADDR") == "127.0.0.1"
    if local and "ACCELERATE_MIXED_PRECISION" in os.environ and "RANK" not in os.environ:
        raise TrainingError(
            "accelerate launch was asked for several processes and started one (with --cpu it does): use "
            "`ACCELERATE_USE_CPU=true torchrun --nproc_per_node N …`, or `accelerate launch --multi_gpu` on GPUs. If "
            "one was asked for, unset MASTER_ADDR and MASTER_PORT"
        )


def is_main() -> bool:
    """Say whether this process writes files and speaks: the first of a launch, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def shared(loader: Any, accelerator: Accelerator) -> Any:
    """Return a loader of which each process gets its part of every batch.

    Raises:
        DataError: where it is none that can be shared.
    """
    count = accelerator.num_processes
    if count == 1:
        return loader
    if not isinstance(loader, DataLoader):
        raise DataError(
            f"{count} processes share a torch DataLoader or a data set among them, got {type(loader).__name__}"
        )
    if loader.batch_size is not None and loader.batch_size % count:
        raise DataError(
            f"{count} processes share each batch, and the loader's have {loader.batch_size} images: pass one whose "
            "batch_size they divide"
        )
    sampler = loader.sampler
    whole = not isinstance(sampler, Sized) or not loader.batch_size or not len(sampler) % loader.batch_size
    if not whole and not loader.drop_last:
        warnings.warn(
            "the last batch of an epoch is short, and the processes fill it up with images of the first one: set the "
            "loader's drop_last to learn what one process would",
            stacklevel=2,
        )
    return accelerator.prepare_data_loader(loader)


def of_every_process(value: Any, accelerator: Accelerator) -> list[Any]:
    """Return a value of every process, in rank order; all have to call it."""
    return list(gather_object([value])) if accelerator.num_processes > 1 else [value]


def with_memory_for(images: int, call: Callable[[int], T], fewer: Callable[[int], int]) -> T:
    """Call a function with a number of images; where memory ends, again with as many as ``fewer`` makes of them."""

    def less() -> int:
        nonlocal images
        images = fewer(images)
        return images

    result: T = find_executable_batch_size(lambda batch_size: call(batch_size), images, less)()
    return result
