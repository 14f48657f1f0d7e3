"""A host's own ways to be written down write the converted model: by hand, and in Trainer's runs."""

from __future__ import annotations

import copy
import functools
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
from safetensors.torch import load_file
from torch import nn
from zoo import randomise

import ltm_retrofit as ltm
import ltm_retrofit.auto
from ltm_retrofit.converted.guards import Writing

torch.set_num_threads(1)

WIDE: dict[str, Any] = {
    "hidden_size": 48,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "num_labels": 3,
}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@functools.cache
def _converted() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return ltm.retrofit(randomise(tr.ViTForImageClassification(tr.ViTConfig(**WIDE))), ltm.LTMConfig(flops=0.8))


@pytest.fixture
def model() -> nn.Module:
    return copy.deepcopy(_converted())


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IMAGES.to(model.device)).logits


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


# ------------------------------------------------------------------------------------------------------------ by hand


def test_the_hosts_own_method_writes_a_converted_folder(model: nn.Module, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "saved", max_shard_size="5GB", safe_serialization=True)
    for load in (ltm.from_pretrained, tr.AutoModelForImageClassification.from_pretrained):
        again = load(str(tmp_path / "saved"))
        assert type(again) is type(model) and ltm.is_retrofitted(again) and torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(ltm.from_pretrained(tmp_path / "again")), logits(model))


def test_other_files_in_the_folder_stay(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "optimizer.pt").write_bytes(b"state")
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine" and (tmp_path / "optimizer.pt").read_bytes() == b"state"
    assert torch.equal(logits(ltm.from_pretrained(tmp_path)), logits(model))
    names = {"checkpoint-1", "optimizer.pt", "README.md", "config.json", "model.safetensors"}
    assert {file.name for file in tmp_path.iterdir()} == names
    model.save_pretrained(tmp_path / "new")
    (tmp_path / "new" / "README.md").write_text("an older card of ours")
    model.save_pretrained(tmp_path / "new")
    assert "retrofitted with token merging" in (tmp_path / "new" / "README.md").read_text()


def test_given_weights_are_those_that_are_written(model: nn.Module, tmp_path: Path) -> None:
    moved = {key: value + 1 if value.is_floating_point() else value for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "saved", state_dict=moved)
    assert all(torch.equal(value, moved[key]) for key, value in load_file(tmp_path / "saved/model.safetensors").items())
    with pytest.raises(ltm.CheckpointError, match=r"state dict is not that of this .*classifier.bias is missing"):
        model.save_pretrained(tmp_path / "no", state_dict={k: v for k, v in moved.items() if k != "classifier.bias"})
    model.save_pretrained(tmp_path / "no", is_main_process=False)
    with pytest.raises(ltm.CheckpointError, match="does not take variant"):
        model.save_pretrained(tmp_path / "no", variant="fp16")
    assert not (tmp_path / "no").exists()


def test_a_part_is_not_written_without_the_whole(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ltm.UnsupportedBlock, match=r"vit \(ViTModel\) is a part of a converted model"):
        model.vit.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_restored_the_host_writes_itself_again(model: nn.Module, tmp_path: Path) -> None:
    ltm.restore(model).save_pretrained(tmp_path)
    assert not any(isinstance(value, Writing) for part in model.modules() for value in vars(part).values())
    again = tr.ViTForImageClassification.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "vit" and same_weights(again, model)


def test_copies_write_themselves(model: nn.Module, tmp_path: Path) -> None:
    for number, twin in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        with torch.no_grad():
            twin.classifier.bias.add_(1 + number)
        twin.save_pretrained(tmp_path / str(number))
        assert same_weights(ltm.from_pretrained(tmp_path / str(number)), twin)
        assert not same_weights(twin, model)


class Mine(tr.ViTForImageClassification):
    """A user's own class, that no file can name."""


def test_a_class_of_ones_own_is_written_where_that_is_asked_for(tmp_path: Path) -> None:
    host = randomise(Mine(tr.ViTConfig(**WIDE)))
    model = ltm.retrofit(copy.deepcopy(host), ltm.LTMConfig(flops=0.8))
    with pytest.raises(ltm.CheckpointError, match="allow_unloadable=True"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    model.save_pretrained(tmp_path / "saved", allow_unloadable=True)
    assert torch.equal(logits(ltm.from_pretrained(tmp_path / "saved", base=host)), logits(model))


def test_a_host_that_renames_what_it_loads_loads_the_record_too(tmp_path: Path) -> None:
    """So does transformers' wrapper of timm models, by which Trainer reads checkpoints of it."""
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
    config = tr.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=args, num_labels=3)
    host = randomise(tr.TimmWrapperForImageClassification(config))
    model = ltm.retrofit(host, ltm.LTMConfig(flops=0.8), torch.randn(1, 3, 32, 32))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(value + 0.01 if value.is_floating_point() else ~value if value.dtype == torch.bool else value)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    loaded = twin.load_state_dict(state, strict=False)
    assert same_weights(twin, model) and not loaded.missing_keys and not loaded.unexpected_keys
    assert same_weights(tr.AutoModelForImageClassification.from_pretrained(tmp_path), model)
    del state["ltm.finetuned"]
    with pytest.raises(RuntimeError, match=r"missing keys \['ltm.finetuned'\]"):
        twin.load_state_dict(state)
    assert "load_state_dict" not in vars(ltm.restore(twin))


# ------------------------------------------------------------------------------------------------------------ Trainer


def table(count: int = 12) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 32, 32, generator=generator)
    return [{"pixel_values": image, "labels": torch.tensor(index % 3)} for index, image in enumerate(images)]


def trainer(model: nn.Module, folder: Path, **options: Any) -> tr.Trainer:
    arguments = tr.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        num_train_epochs=3,
        learning_rate=1e-2,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    return tr.Trainer(model, arguments, train_dataset=table(), eval_dataset=table(6))


@pytest.mark.parametrize("half", [False, True], ids=["float32", "mixed"])
def test_trainer_saves_resumes_and_ends_with_the_best(half: bool, model: nn.Module, tmp_path: Path) -> None:
    whole = trainer(model, tmp_path / "whole", bf16=half, load_best_model_at_end=True)
    whole.train()
    kept = sorted((tmp_path / "whole").glob("checkpoint-*"), key=lambda file: int(file.name.partition("-")[2]))
    assert [file.name for file in kept] == ["checkpoint-3", "checkpoint-6", "checkpoint-9"]
    for folder in kept:
        again = tr.AutoModelForImageClassification.from_pretrained(folder)
        assert ltm.is_retrofitted(again) and (folder / "optimizer.pt").is_file()
    assert not same_weights(ltm.from_pretrained(kept[0]), ltm.from_pretrained(kept[2]))

    best = ltm.from_pretrained(whole.state.best_model_checkpoint)
    assert whole.model is model and ltm.is_retrofitted(model) and same_weights(best, model)
    losses = [entry["eval_loss"] for entry in whole.state.log_history if "eval_loss" in entry]
    assert whole.state.best_model_checkpoint == str(kept[losses.index(min(losses))])
    whole.save_model(str(tmp_path / "whole"))  # where the checkpoints lie
    assert torch.equal(logits(ltm.from_pretrained(tmp_path / "whole")), logits(best))

    resumed = trainer(copy.deepcopy(_converted()), tmp_path / "resumed", bf16=half)
    resumed.train(resume_from_checkpoint=str(kept[0]))
    assert same_weights(resumed.model, ltm.from_pretrained(kept[2]))
