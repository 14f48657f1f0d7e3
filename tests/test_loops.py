"""The examples of docs/loops.md run as they stand, and the bound takes part in them."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
import pytest
import torch
import transformers as tr
from pieces import batches, equal, weights
from torch.utils.data import DataLoader, TensorDataset

import ltm_retrofit as ltm

PAGE = (Path(__file__).parents[1] / "docs" / "loops.md").read_text(encoding="utf-8")
CODE = dict(re.findall(r"^## (\S+)\n.*?```python\n(.*?)```", PAGE, re.S | re.M))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's advice on workers and loggers
@pytest.mark.parametrize("loop", ["PyTorch", "transformers.Trainer", "Lightning"])
def test_the_bound_takes_part(loop: str, build, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # Lightning writes where it is
    host = build("hf-vit" if "Trainer" in loop else "timm-vit")
    before, images_labels = weights(host), [torch.cat(part) for part in zip(*batches(50, 7), strict=True)]
    bounds, bound_loss = [], ltm.bound_loss

    def spy(*args: object, **kwargs: object) -> torch.Tensor:
        bounds.append(bound_loss(*args, **kwargs))
        return bounds[-1]

    monkeypatch.setattr(ltm, "bound_loss", spy)
    given = {
        "host": host,
        "loader": DataLoader(TensorDataset(*images_labels), batch_size=14, shuffle=True),
        "table": datasets.Dataset.from_dict(
            dict(zip(("pixel_values", "labels"), images_labels, strict=True))
        ).with_format("torch"),
        "arguments": tr.TrainingArguments(
            **{"output_dir": str(tmp_path), "per_device_train_batch_size": 14, "num_train_epochs": 1, "use_cpu": True},
            **{"report_to": "none", "save_strategy": "no", "disable_tqdm": True},
        ),
    }
    exec(compile(CODE[loop], "docs/loops.md", "exec"), given)
    assert ltm.is_retrofitted(host) and bool(host.ltm.readout.fitted)
    values = [float(bound) for bound in bounds]
    assert len(values) == 25 and values[0] == 0 < min(values[20:]), "zero before the statistics are fitted"
    ltm.restore(host)
    assert not equal(weights(host), before)
