"""`nn.DataParallel` copies what hangs on a module and would run the original's weights: refused by name."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conversions import call, converted, slow_but
from torch import nn
from torch.nn.parallel.replicate import replicate

import ltm_retrofit as ltm

torch.set_num_threads(1)


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second device is the first one: without a GPU, of torch's own only the broadcast is another one."""
    import importlib

    module = importlib.import_module("torch.nn.parallel.replicate")

    def broadcast(tensors, devices, detach=False):
        return [[tensor.detach() * 0 for tensor in tensors] for _ in devices]

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", broadcast)
    monkeypatch.setattr(module, "_get_device_index", lambda device, *_, **__: device)


@pytest.mark.parametrize("host", slow_but(["timm-vit-flow", "timm-swin-local", "timm-efficientvit-grid"]))
def test_a_replica_is_refused_by_name(host, two_devices) -> None:
    model, original, _ = converted(host)
    replicate(original, [0, 1], detach=True)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ltm.UnsupportedBlock, match=r"DataParallel copies converted block.*DistributedDataParallel"):
            replicate(each, [0, 1], detach=True)
    replicate(ltm.restore(model), [0, 1], detach=True)


def test_on_one_device_it_works() -> None:
    model, _, example = converted("timm-vit-flow")
    with torch.no_grad():
        assert torch.equal(call(nn.DataParallel(model), example)[0], call(model, example)[0])
