"""One process or several: every process that was asked for takes part, or says that it does not."""

from __future__ import annotations

import os
from pathlib import Path

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, DistributedType

from ltm_retrofit.errors import CheckpointError, TrainingError

#: what shards or wraps the model itself; merged tokens carry their sizes on the tensor, which these copy away
WRAPPERS = (
    DistributedType.FSDP,
    DistributedType.DEEPSPEED,
    DistributedType.MEGATRON_LM,
)


def make_accelerator(mixed_precision: str, batch_size: int) -> Accelerator:
    """Make the Accelerator of a run; a batch is shared out among its processes.

    Raises:
        TrainingError: where several processes were asked for and this one runs alone (`accelerate launch --cpu` and
            a torchrun that does not know it is to use CPUs do that silently), where the model would be sharded, or
            where a batch cannot be shared out.
    """
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed_precision:
        AcceleratorState._reset_state()  # Accelerate holds on to a process's first precision
    accelerator = Accelerator(
        mixed_precision=mixed_precision, dataloader_config=DataLoaderConfiguration(split_batches=True)
    )
    if accelerator.distributed_type in WRAPPERS:
        raise TrainingError(
            f"finetune cannot run under {accelerator.distributed_type.value}: its wrapper hands copies of tokens from "
            "block to block, and what merged tokens carry with them is lost. Use data parallelism (torchrun, or "
            "accelerate launch --multi_gpu)"
        )
    check_alone(accelerator.num_processes)
    if batch_size % accelerator.num_processes:
        raise TrainingError(
            f"batch_size counts the images of a step in all processes: {batch_size} cannot be shared out among "
            f"{accelerator.num_processes}"
        )
    return accelerator


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
    # set by `accelerate launch` for more than one process, and by no launcher without a rank
    if "MASTER_PORT" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ and "RANK" not in os.environ:
        raise TrainingError(
            "accelerate launch was asked for several processes and started one (with --cpu it does): use "
            "`ACCELERATE_USE_CPU=true torchrun --nproc_per_node N …`, or `accelerate launch --multi_gpu` on GPUs"
        )


def is_main() -> bool:
    """Say whether this process writes files and speaks: the first of a launch, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def checkpoints_beside(out: Path, resume: bool) -> Path:
    """Return the folder for the checkpoints of a run that writes to ``out``.

    Raises:
        CheckpointError: where an interrupted run left some there, and this one is not to go on from them.
    """
    folder = out.absolute().parent / f".{out.name}.checkpoints"
    if not resume and any(path.is_file() for path in folder.rglob("*")):
        raise CheckpointError(
            f"a run to {out} was interrupted, and its checkpoints lie in {folder}: go on from them with --resume, or "
            "remove that folder to begin anew"
        )
    return folder
