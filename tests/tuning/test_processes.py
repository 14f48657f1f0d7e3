"""Two processes do what one does with the same batches; one that was meant to be two says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType

from ltm_retrofit.errors import TrainingError
from ltm_retrofit.tuning import processes

SCRIPT = textwrap.dedent(
    """
    import json, os, sys
    import timm, torch
    import ltm_retrofit as ltm
    from torch.utils.data import DataLoader, TensorDataset

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, depth=4, num_heads=2,
                              num_classes=4).eval()
    ltm.retrofit(model, ltm.LTMConfig(flops=0.7))
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
        epochs=2, batch_size=16, lr=1e-3, bound_weight=0.2, bound_sites=0.5, bound_warmup=0.3, checkpoint_every=4))
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


def test_two_processes_learn_what_one_learns(tmp_path):
    done = launch(tmp_path / "one")
    assert done.returncode == 0, done.stderr
    done = launch(tmp_path / "two", *TORCHRUN, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    one = torch.load(tmp_path / "one" / "state0.pt", weights_only=True)
    two, other = (torch.load(tmp_path / "two" / f"state{rank}.pt", weights_only=True) for rank in range(2))
    fitted = [key for key in one if key.endswith("fitted")]
    assert fitted and all(float(one[key]) == 1 for key in fitted)  # centroids and Q are there to be compared
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=2e-3, atol=2e-4, msg=lambda text, key=key: f"{key}: {text}")
        assert torch.equal(two[key], other[key]), key
    first, second = (json.loads((tmp_path / name / "history0.json").read_text()) for name in ("one", "two"))
    assert len(first["losses"]) == 20
    assert second["losses"] == pytest.approx(first["losses"], rel=1e-4)
    for ours, theirs in zip(first["epochs"], second["epochs"], strict=True):
        assert theirs["val_accuracy"] == ours["val_accuracy"]
        assert theirs["bound"] == pytest.approx(ours["bound"], rel=1e-3)


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


def test_a_batch_that_cannot_be_shared_out_is_refused(monkeypatch):
    monkeypatch.setattr(processes.Accelerator, "num_processes", 3)
    with pytest.raises(TrainingError, match="64 cannot be shared out among 3"):
        processes.make_accelerator("no", 64)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_wrappers_that_copy_tokens_are_refused_by_name(kind, monkeypatch):
    monkeypatch.setattr(processes.Accelerator, "distributed_type", DistributedType[kind])
    with pytest.raises(TrainingError, match=f"finetune cannot run under {kind}"):
        processes.make_accelerator("no", 64)


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
