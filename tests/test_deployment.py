"""A converted host elsewhere: copied, pickled, in other processes, compiled, exported."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import FAST, HOSTS, batch, call, converted, equal, gradients, near
from torch import nn

import ltm_retrofit as ltm

torch.set_num_threads(1)
SPAWN = multiprocessing.get_context("spawn")


# ---------------------------------------------------------------------------------------------------- copies and files


def test_a_deepcopy_is_independent(host):
    model, _, example = converted(host)
    inputs = batch(example)
    with torch.no_grad():
        before, twin = call(model, inputs), copy.deepcopy(model)
        assert equal(call(twin, inputs), before)
        for parameter in twin.parameters():
            parameter.mul_(0.5)
        assert equal(call(model, inputs), before) and not equal(call(twin, inputs), before)
        with ltm.disabled(twin):
            assert equal(call(model, inputs), before)
        ltm.restore(twin)
        assert ltm.is_retrofitted(model) and equal(call(model, inputs), before)


def test_pickle_round_trip(host):
    model, _, example = converted(host)
    again = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert equal(call(again, batch(example)), call(model, batch(example)))
    assert ltm.get_plan(again) == ltm.get_plan(model)
    ltm.restore(again)


# ------------------------------------------------------------------------------------------------------ other processes


def _outputs(pickled: bytes) -> list[Any]:
    """Run in a process that has imported nothing of ours yet; arrays, since tensors would go through shared memory."""
    torch.set_num_threads(1)
    model, inputs = pickle.loads(pickled)
    with torch.no_grad():
        return [tensor.numpy() for tensor in call(model, inputs)]


@pytest.fixture(scope="module")
def worker() -> Iterator[Any]:
    """A process that was started afresh, as launchers and data loaders do."""
    with SPAWN.Pool(1) as pool:
        yield pool


def test_another_process_computes_the_same(host, worker):
    model, _, example = converted(host)
    inputs = batch(example)
    with torch.no_grad():
        expected = call(model, inputs)
    given = [torch.from_numpy(array) for array in worker.apply(_outputs, (pickle.dumps((model, inputs)),))]
    near(given, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def group(tmp_path):
    """A process group of one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_training_gives_equal_gradients(host, group):
    model, _, example = converted(host)
    twin = copy.deepcopy(model)
    inputs = batch(example)
    plain = gradients(model, inputs)
    wrapped = nn.parallel.DistributedDataParallel(twin, find_unused_parameters=True)
    parallel = gradients(wrapped, inputs)
    assert plain.keys() == {name.removeprefix("module.") for name in parallel}
    near([parallel[f"module.{name}"] for name in plain], list(plain.values()))
    with torch.no_grad():
        assert equal(call(wrapped.eval(), inputs), call(model.eval(), inputs))


def _parallel(rank: int, store: str, pickled: bytes, pipe: Any) -> None:
    """One of two processes: the gradients of its half of each batch, averaged with the other's."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    found = {}
    for name, (model, inputs) in pickle.loads(pickled).items():
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        given = gradients(wrapped, inputs[rank : rank + 1])
        found[name] = {key.removeprefix("module."): value.numpy() for key, value in given.items()}
    pipe.send_bytes(pickle.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_average_to_the_gradients_of_the_whole_batch(tmp_path: Path):
    work = {name: (model, batch(example)) for name in HOSTS for model, _, example in [converted(name)]}
    for model, _ in work.values():
        model.eval()  # BatchNorm's statistics are each process's own
    pickled, store = pickle.dumps(work), f"file://{tmp_path}/store"
    pipes = [SPAWN.Pipe() for _ in range(2)]
    processes = [
        SPAWN.Process(target=_parallel, args=(rank, store, pickled, theirs)) for rank, (_, theirs) in enumerate(pipes)
    ]
    for process, (_, theirs) in zip(processes, pipes, strict=True):
        process.start()
        theirs.close()
    ours, others = (pickle.loads(mine.recv_bytes()) for mine, _ in pipes)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    for name, (model, inputs) in work.items():
        whole = {key: value / 2 for key, value in gradients(model, inputs).items()}  # of a sum, not of a mean
        assert whole.keys() == ours[name].keys(), name
        for key in whole:
            assert (ours[name][key] == others[name][key]).all(), f"{name}: {key}"
        near([torch.from_numpy(ours[name][key]) for key in whole], list(whole.values()), rtol=1e-3, atol=1e-4)


# --------------------------------------------------------------------------------------------------- compile and export


def test_compiling_gives_equal_results(host):
    model, _, example = converted(host)
    inputs = batch(example)
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
        expected = call(model, inputs)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        near(call(compiled, inputs), expected)
    torch._dynamo.reset()
    with torch.no_grad():
        assert equal(call(model, inputs), expected)


@pytest.mark.slow
@pytest.mark.parametrize("host", FAST)
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_gives_equal_results(host):
    model, _, example = converted(host)
    inputs = batch(example)
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
        expected = call(model, inputs)
        near(call(torch.compile(model, fullgraph=True), inputs), expected, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


def test_exporting_gives_equal_results_and_leaves_the_model_alone(host):
    model, _, example = converted(host)
    inputs = batch(example)
    with torch.no_grad():
        expected = call(model, inputs)
        program = torch.export.export(model, (inputs,), strict=False).module()
        near(call(program, inputs), expected)
        assert equal(call(model, inputs), expected)


@pytest.mark.slow
def test_exporting_with_a_dynamic_batch(host):
    model, _, example = converted(host)
    inputs, more = batch(example), batch(example, 3, seed=6)
    shape = ({0: torch.export.Dim("batch", min=2, max=16)},)
    with torch.no_grad():
        program = torch.export.export(model, (inputs,), dynamic_shapes=shape, strict=False).module()
        near(call(program, more), call(model, more))


@pytest.mark.parametrize(
    "host", [pytest.param(name, marks=[] if name == "timm-vit-flow" else pytest.mark.slow) for name in HOSTS]
)
def test_onnx_gives_equal_results(host, tmp_path: Path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, _, example = converted(host)
    inputs = batch(example)
    path = tmp_path / "model.onnx"
    with torch.no_grad():  # with gradients torch 2.15 exports a fused attention with a mask that it cannot convert
        expected = call(model, inputs)
        torch.onnx.export(model, (inputs,), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    near([torch.from_numpy(array) for array in given], expected, rtol=1e-3, atol=1e-4)
