"""What a pass takes in memory, and a batch that does not fit is said, not tried."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ltm_retrofit.finding.example import repeat_batch
from ltm_retrofit.reporting import bench, memory
from ltm_retrofit.reporting.bench import batch_latencies
from ltm_retrofit.reporting.memory import free_bytes, peak_bytes


def test_tensors_count_as_long_as_they_are_held() -> None:
    layers = nn.Sequential(nn.Linear(10, 1000), nn.Linear(1000, 500), nn.ReLU(inplace=True), nn.Flatten(0))
    # the first output and the second are there at once; what is done in place, and a view, take no more
    assert peak_bytes(layers, torch.zeros(3, 10)) == 4 * 3 * (1000 + 500)


@pytest.mark.parametrize("name", ["timm-vit", "hf-vit"])
def test_a_batch_takes_as_much_as_its_images(name: str, converted) -> None:
    model = converted(name)
    one = torch.randn(1, 3, 32, 32)
    single, several = (peak_bytes(model, repeat_batch(one, count)) for count in (1, 4))
    assert 3.9 * single <= several <= 4.1 * single


def test_a_containers_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    device = torch.device("cpu")
    plenty = free_bytes(device)
    assert plenty > 1e6
    (tmp_path / "memory.max").write_text("5")
    monkeypatch.setattr(memory, "LIMIT", tmp_path / "memory.max")
    assert free_bytes(device) < 5
    (tmp_path / "memory.max").write_text("max")
    assert free_bytes(device) > 1e6


def test_what_does_not_fit_is_said_and_not_tried(build, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def timed(model: nn.Module, example: torch.Tensor, **_: object) -> bench.Paired:
        tried.append(len(example))
        return bench.Paired(1.0)

    monkeypatch.setattr(bench, "paired_latency", timed)
    monkeypatch.setattr(bench, "free_bytes", lambda device: 3.5e9)
    said: list[str] = []
    image = torch.zeros(1, 3, 32, 32)
    found, left_out = batch_latencies(build("timm-vit"), image, (32, 1, 3), need=1e9, say=said.append)
    assert tried == [1, 3] == list(found), "the smallest first"
    assert left_out == ["batches of 32 were not timed: they need about 32.0 GB of memory, and 3.5 GB are free"]
    assert said == ["latency, batch 1: 1.0 ms", "latency, batch 3: 1.0 ms", *left_out], "as they come"
