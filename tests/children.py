"""What tests run in processes of their own; arrays come back, since tensors would go through shared memory."""

from __future__ import annotations

import pickle

import numpy as np
import torch
from conversions import call, gradients
from torch import nn


def outputs(pickled: bytes) -> list[np.ndarray]:
    """Return what a pickled model makes of its inputs."""
    torch.set_num_threads(1)
    model, inputs = pickle.loads(pickled)
    with torch.no_grad():
        return [tensor.numpy() for tensor in call(model, inputs)]


def parallel_gradients(rank: int, store: str, pickled: bytes) -> dict[str, dict[str, np.ndarray]]:
    """Return the gradients of one of two processes: of its half of each batch, averaged with the other's."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    found = {}
    for name, (model, inputs) in pickle.loads(pickled).items():
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        given = gradients(wrapped, inputs[rank : rank + 1])
        found[name] = {key.removeprefix("module."): value.numpy() for key, value in given.items()}
    torch.distributed.destroy_process_group()
    return found
