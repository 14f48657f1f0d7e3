"""Two processes do what one does with the same batches; one that was meant to be two says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from pieces import batches, equal, weights
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import ltm_retrofit as ltm
from ltm_retrofit.errors import DataError, TrainingError
from ltm_retrofit.tuning import processes
from ltm_retrofit.tuning.data import Passes
from ltm_retrofit.tuning.settings import TrainConfig

SCRIPT = textwrap.dedent(
    """
    import json, os, sys
    import timm, torch, transformers
    import ltm_retrofit as ltm
    from torch.utils.data import DataLoader, TensorDataset

    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)  # Adam makes much of rounding where a gradient is next to nothing
    if os.environ.get("HOST") == "hf-dinov2":  # its mask token has no gradient
        model = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(
            image_size=16, patch_size=4, hidden_size=24, num_hidden_layers=4, num_attention_heads=2, num_labels=4))
    else:
        model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, depth=4,
                                  num_heads=2, num_classes=4)
    ltm.retrofit(model.eval(), ltm.LTMConfig(flops=0.7))
    labels = torch.randint(4, (160,))
    images = torch.randn(160, 3, 16, 16) + torch.randn(4, 3, 1, 1)[labels]
    loader = DataLoader(TensorDataset(images, labels), batch_size=16, shuffle=True,
                        generator=torch.Generator().manual_seed(3))
    val = DataLoader(TensorDataset(images[:50], labels[:50]), batch_size=16)
    kept, stop = os.environ.get("KEPT"), int(os.environ.get("STOP", 0))
    if stop:
        from ltm_retrofit.tuning.loop import Run
        step = Run.step
        Run.step = lambda run: os.kill(os.getpid(), 9) if run.progress.step == stop else step(run)
    history = ltm.finetune(model, loader, val, checkpoints_to=kept, resume=kept is not None, config=ltm.TrainConfig(
        epochs=2, batch_size=16, lr=1e-3, bound_weight=0.2, bound_warmup=0.3, checkpoint_every=4,
        train="all", distill=0.0, distill_token=0.0))
    rank = os.environ.get("RANK", "0")
    torch.save(model.state_dict(), f"{sys.argv[1]}/state{rank}.pt")
    with open(f"{sys.argv[1]}/history{rank}.json", "w") as file:
        json.dump(history.to_dict(), file)
    """
)


def launch(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    folder.mkdir(exist_ok=True)
    (folder / "script.py").write_text(SCRIPT)
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    return subprocess.run(
        [sys.executable, *command, str(folder / "script.py"), str(folder)],
        env={**kept, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@pytest.mark.parametrize("host", ["timm-vit", pytest.param("hf-dinov2", marks=pytest.mark.slow)])
def test_two_processes_learn_what_one_learns(host, tmp_path):
    done = launch(tmp_path / "one", HOST=host)
    assert done.returncode == 0, done.stderr
    done = launch(tmp_path / "two", *TORCHRUN, ACCELERATE_USE_CPU="true", HOST=host)
    assert done.returncode == 0, done.stderr
    one = torch.load(tmp_path / "one" / "state0.pt", weights_only=True)
    two, other = (torch.load(tmp_path / "two" / f"state{rank}.pt", weights_only=True) for rank in range(2))
    fitted = [key for key in one if key.endswith("fitted")]
    assert fitted and all(float(one[key]) == 1 for key in fitted)  # centroids and Q are there to be compared
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
        assert torch.equal(two[key], other[key]), key
    first, second = (json.loads((tmp_path / name / "history0.json").read_text()) for name in ("one", "two"))
    assert len(first["losses"]) == 20
    assert second["losses"] == pytest.approx(first["losses"], rel=1e-6)
    for ours, theirs in zip(first["epochs"], second["epochs"], strict=True):
        assert theirs["val_accuracy"] == ours["val_accuracy"]
        assert theirs["bound"] == pytest.approx(ours["bound"], rel=1e-6)


@pytest.mark.slow
def test_two_processes_that_were_killed_go_on_to_the_same_bits(tmp_path):
    parallel = {"ACCELERATE_USE_CPU": "true"}
    done = launch(tmp_path / "whole", *TORCHRUN, **parallel)
    assert done.returncode == 0, done.stderr
    kept = {**parallel, "KEPT": str(tmp_path / "kept")}
    assert launch(tmp_path / "killed", *TORCHRUN, **kept, STOP="14").returncode != 0
    assert (tmp_path / "kept" / "checkpoint.safetensors").exists()
    done = launch(tmp_path / "resumed", *TORCHRUN, **kept)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        whole, resumed = (torch.load(tmp_path / name / f"state{rank}.pt") for name in ("whole", "resumed"))
        assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    first, second = (json.loads((tmp_path / name / "history0.json").read_text()) for name in ("whole", "resumed"))
    assert first["losses"] == second["losses"] and len(first["losses"]) == 20
    for one, other in zip(first["epochs"], second["epochs"], strict=True):
        differing = {key for key in one if one[key] != other[key]} - {"seconds", "waiting", "images_per_second"}
        assert not differing
    assert "i_input" in first["epochs"][-1]  # there were too few images before


@pytest.mark.parametrize(
    "command, environment, message",
    [
        pytest.param(
            TORCHRUN, {"ACCELERATE_USE_CPU": "false"}, "torchrun started 2 processes", id="torchrun-looks-for-gpus"
        ),
        pytest.param(
            ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"),
            {},
            "accelerate launch was asked for several processes",
            id="accelerate-cpu",
        ),
    ],
)
def test_a_process_that_runs_alone_by_mistake_says_so(command, environment, message, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("with GPUs these launches do what they were asked for")
    done = launch(tmp_path / "alone", *command, **environment)
    assert done.returncode != 0 and message in done.stderr


def accelerator_of(**settings) -> None:
    with processes.own_accelerator(TrainConfig(**settings).decided(taught=False)):
        pass


def test_a_batch_that_cannot_be_shared_out_is_refused(monkeypatch):
    monkeypatch.setattr(processes.Accelerator, "num_processes", 3)
    with pytest.raises(TrainingError, match="64 cannot be shared out among 3"):
        accelerator_of()


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_wrappers_that_copy_tokens_are_refused_by_name(kind, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(TrainingError, match=f"finetune cannot run under {kind}"):
        patch.setattr(processes.Accelerator, "distributed_type", DistributedType[kind])
        accelerator_of()
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")  # which Accelerate passes over on CPUs
    with pytest.raises(TrainingError, match=f"finetune cannot run under {kind}"):
        accelerator_of()


@pytest.mark.parametrize(
    "name, value, settings, message",
    [
        (
            "MIXED_PRECISION",
            "bf16",
            {},
            "with mixed precision 'bf16', and TrainConfig has mixed_precision='no'",
        ),
        ("GRADIENT_ACCUMULATION_STEPS", "4", {"accumulate": 2}, "launched with 4 gradient acc.* has accumulate=2"),
    ],
)
def test_a_launch_that_says_other_things_is_refused(name, value, settings, message, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(TrainingError, match=message):
        accelerator_of(**settings)
    accelerator_of(mixed_precision="bf16", accumulate=4)


def test_accumulation_that_both_say_is_done_once(build, monkeypatch):
    config = TrainConfig(accumulate=2, batch_size=7)
    one, other = build("timm-vit"), build("timm-vit")
    ltm.finetune(one, batches(4), config=config)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    ltm.finetune(other, batches(4), config=config)
    assert equal(weights(one), weights(other))


def test_half_precision_that_the_cpu_has_not_is_refused():
    with pytest.raises(TrainingError, match="mixed_precision='fp16' needs a GPU"):
        if torch.cuda.is_available():
            pytest.skip("there is one here")
        accelerator_of(mixed_precision="fp16")


def test_the_callers_accelerator_stays_as_it_was(build):
    AcceleratorState._reset_state()  # another test may have had one
    theirs = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=4)
    ltm.finetune(build("timm-vit"), batches(1), config=TrainConfig(batch_size=7))
    assert theirs.mixed_precision == AcceleratorState().mixed_precision == "bf16"
    assert theirs.gradient_accumulation_steps == 4
    AcceleratorState._reset_state()


def test_a_port_that_a_cluster_handed_down_is_no_launch(monkeypatch):
    for name, value in {"MASTER_PORT": "1234", "ACCELERATE_MIXED_PRECISION": "no"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "node-17")
    assert processes.check_alone(1) is None
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(TrainingError, match="unset MASTER_ADDR"):
        processes.check_alone(1)


@pytest.mark.parametrize("count, drop", [(20, False), (20, True), (16, False)])
def test_a_short_last_batch_is_not_what_one_process_would_learn(count, drop):
    loader = DataLoader(TensorDataset(torch.zeros(count, 3)), batch_size=8, drop_last=drop)
    two = SimpleNamespace(num_processes=2, prepare_data_loader=lambda loader: loader)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        processes.shared(loader, two)
    assert ["set the loader's drop_last" in str(warning.message) for warning in seen] == [True] * (
        count % 8 > 0 and not drop
    )


@pytest.mark.slow
def test_the_command_line_runs_in_two_processes_and_one_of_them_speaks_and_writes(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "data: {name: digits, train_per_digit: 1, test_per_digit: 1}\ntrain: {epochs: 1, batch_size: 128}\n"
    )
    arguments = ["-m", "ltm_retrofit", "run", str(recipe), "--out", str(tmp_path / "out")]
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    done = subprocess.run(
        [sys.executable, *TORCHRUN, *arguments],
        env={**kept, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("written to") == 1 and done.stdout.count("reloaded model gives the same logits: yes") == 1
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()


class Endless(IterableDataset):
    """Images that go by, of unknown number."""

    def __iter__(self):
        return iter(())


def test_loaders_of_any_kind_can_be_shared_or_say_why_not() -> None:
    two = SimpleNamespace(num_processes=2, prepare_data_loader=lambda loader: loader)
    shared = {"length": 2, "images": 8, "accelerator": two}
    assert Passes(DataLoader(Endless(), batch_size=8), **shared).length == 2
    with pytest.raises(DataError, match="2 processes share each batch, and the loader's have 5 images"):
        Passes(DataLoader(Endless(), batch_size=5), **shared)
    with pytest.raises(DataError, match=r"share a torch DataLoader or a data set among them, got list"):
        Passes(batches(2), **shared)
