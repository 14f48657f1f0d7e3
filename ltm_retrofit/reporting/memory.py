"""How much memory does a pass take, and how much is there? Said before a batch is tried that does not fit."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ltm_retrofit.finding.example import Example, run
from ltm_retrofit.undisturbed import undisturbed

#: what a container may use: version 2 of Linux' control groups
LIMIT = Path("/sys/fs/cgroup/memory.max")


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operators make, as long as somebody holds them; ``most`` is the peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.most = 0, 0
        self.known = weakref.WeakSet[Any]()

    def __torch_dispatch__(
        self, function: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator, and count what it made."""
        result = function(*args, **(kwargs or {}))
        inputs = {value.untyped_storage().data_ptr() for value in tree_leaves((args, kwargs)) if _real(value)}
        for value in filter(_real, tree_leaves(result)):
            memory = value.untyped_storage()
            if memory in self.known or memory.data_ptr() in inputs:  # a view, or its input changed in place
                continue
            self.known.add(memory)
            self.now += memory.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(memory, self._gone, memory.nbytes())
        return result

    def _gone(self, count: int) -> None:
        self.now -= count


def _real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided


def peak_bytes(model: nn.Module, example: Example) -> int:
    """Return how many bytes of tensors are alive at once in a pass, weights and input aside. The model stays as it is.

    Example:
        >>> import torch
        >>> from ltm_retrofit.reporting.memory import peak_bytes
        >>> peak_bytes(torch.nn.Sequential(torch.nn.Linear(10, 1000), torch.nn.Linear(1000, 10)), torch.zeros(1, 10))
        4040
    """
    alive = Alive()
    with undisturbed(model), torch.no_grad(), alive:
        run(model, example)
    return alive.most


def free_bytes(device: torch.device) -> float:
    """Return how many bytes a device has left; of a CPU, as many as the machine and the container have."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + reserved)
    left = float(psutil.virtual_memory().available)
    try:
        left = min(left, int(LIMIT.read_text()) - psutil.Process().memory_info().rss)
    except (OSError, ValueError):  # none, or "max"
        pass
    return left
