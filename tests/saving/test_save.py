from __future__ import annotations

import copy
import functools
import hashlib
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import transformers
from pieces import Own
from torch import nn

import ltm_retrofit as ltm
from ltm_retrofit import folders
from ltm_retrofit.errors import (
    RetrofitError,
)
from ltm_retrofit.saving import save
from ltm_retrofit.saving.base import describe_base, rebuild_base, verify_base

Build = Callable[..., nn.Module]
ONE = ltm.LTMConfig(tokens=(40, 20), sites=("blocks.1", "blocks.3"))

FRESH = """
import sys, torch
import ltm_retrofit as ltm
from ltm_retrofit.finding.example import tensors_of
torch.set_num_threads(1)
images, *expected = torch.load(sys.argv[1])
for folder, outputs in zip(sys.argv[2:], expected, strict=True):
    state = torch.random.get_rng_state()
    model = ltm.from_pretrained(folder)
    assert torch.equal(state, torch.random.get_rng_state())
    with torch.no_grad():
        given = tensors_of(model(images))
    assert len(given) == len(outputs) and all(torch.equal(a, b) for a, b in zip(given, outputs)), folder
"""


def outputs(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    from ltm_retrofit.finding.example import tensors_of

    with torch.no_grad():
        return tensors_of(model(images))


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) > 0 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def shake(model: nn.Module, seed: int = 9) -> nn.Module:
    """Move every parameter, masks included, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


@functools.cache
def _converted(build: Build) -> nn.Module:
    return ltm.retrofit(build("timm-vit"), ONE)


def converted(build: Build) -> nn.Module:
    """A small converted model; converting takes a second, copying does not."""
    return copy.deepcopy(_converted(build))


@functools.cache
def small(build: Build) -> dict[str, bytes]:
    """The files of one saved model."""
    with tempfile.TemporaryDirectory() as folder:
        ltm.save_pretrained(converted(build), folder)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


@pytest.fixture
def saved(build: Build, tmp_path: Path) -> Path:
    (tmp_path / "saved").mkdir()
    for name, content in small(build).items():
        (tmp_path / "saved" / name).write_bytes(content)
    return tmp_path / "saved"


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def check_round_trip(model: nn.Module, folder: Path, images: torch.Tensor) -> nn.Module:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ltm.save_pretrained(model, folder)
    state = torch.random.get_rng_state()
    loaded = ltm.from_pretrained(folder)
    assert torch.equal(state, torch.random.get_rng_state())
    assert type(loaded) is type(model) and not loaded.training
    assert same(outputs(loaded, images), outputs(model.eval(), images))
    after = loaded.state_dict()
    assert list(after) == list(before) == list(model.state_dict())
    assert all(torch.equal(after[key], value) and after[key].dtype == value.dtype for key, value in before.items())
    assert ltm.get_plan(loaded) == ltm.get_plan(model)
    return loaded


def test_round_trip(family: str, build: Build, images: torch.Tensor, tmp_path: Path) -> None:
    model = shake(ltm.retrofit(build(family), ltm.LTMConfig(flops=0.7)))
    loaded = check_round_trip(model, tmp_path / "saved", images)
    with ltm.disabled(model), ltm.disabled(loaded):
        assert same(outputs(model, images), outputs(loaded, images))
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("method", ["tome", "slice"])
@pytest.mark.parametrize("family", ["timm-vit", "hf-vit"])
def test_other_methods(family: str, method: str, build: Build, images: torch.Tensor, tmp_path: Path) -> None:
    model = shake(ltm.retrofit(build(family), ltm.LTMConfig(flops=0.7, method=method)))
    check_round_trip(model, tmp_path / "saved", images)


def test_what_of_an_example_is_no_tensor_comes_back(build: Build, tmp_path: Path) -> None:
    model = build("hf-vit")
    inputs = {"pixel_values": torch.randn(1, 3, 48, 40), "interpolate_pos_encoding": True}
    ltm.retrofit(model, ltm.LTMConfig(flops=0.7), inputs)
    ltm.save_pretrained(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(ltm.from_pretrained(tmp_path)(**inputs).logits, model(**inputs).logits)


def test_fresh_process(build: Build, images: torch.Tensor, tmp_path: Path) -> None:
    expected: list[object] = [images]
    folders = []
    for family in ("timm-dinov2", "hf-deit"):
        model = shake(ltm.retrofit(build(family), ltm.LTMConfig(flops=0.7)))
        ltm.save_pretrained(model, tmp_path / family)
        expected.append(outputs(model, images))
        folders.append(str(tmp_path / family))
    torch.save(expected, tmp_path / "expected.pt")
    subprocess.run([sys.executable, "-c", FRESH, str(tmp_path / "expected.pt"), *folders], check=True, timeout=120)


def test_overrides_and_data_settings_come_back(tmp_path: Path) -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=(48, 32),
        patch_size=8,
        in_chans=1,
        num_classes=3,
        depth=4,
        drop_rate=0.25,
        global_pool="avg",
        init_values=0.1,
    )
    model.reset_classifier(5)
    model.pretrained_cfg.update(mean=(0.1,), std=(0.2,), crop_pct=1.0, interpolation="nearest", tag="mine")
    loaded = check_round_trip(ltm.retrofit(model.eval()), tmp_path / "saved", torch.randn(2, 1, 48, 32))
    assert (loaded.num_classes, loaded.in_chans, loaded.head_drop.p) == (5, 1, 0.25)
    assert timm.data.resolve_model_data_config(loaded) == timm.data.resolve_model_data_config(model)
    assert loaded.pretrained_cfg["tag"] == "mine"


@pytest.mark.parametrize("family", ["timm-vit", "timm-deit", "timm-dinov2"])
def test_what_timm_keeps_of_a_model_rebuilds_it(build: Build, family: str) -> None:
    description = describe_base(build(family))
    assert verify_base(build(family), description) is None
    assert description["arguments"]["depth"] == 6


def by_hand() -> nn.Module:
    return timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=7, global_pool="token"
    )


def by_its_entrypoint() -> nn.Module:
    return timm.models.vit_tiny_patch16_224(img_size=32, patch_size=8, depth=4, num_classes=7)


@pytest.mark.parametrize("made", [by_hand, by_its_entrypoint])
def test_a_timm_model_that_create_model_did_not_make_needs_base(made, images: torch.Tensor, tmp_path: Path) -> None:
    model = shake(ltm.retrofit(made().eval()))
    with pytest.raises(
        ltm.CheckpointError, match=r"VisionTransformer cannot be rebuilt .*nor made by timm\.create_model.*base="
    ):
        ltm.save_pretrained(model, tmp_path / "saved")
    ltm.save_pretrained(model, tmp_path / "saved", allow_unloadable=True)
    with pytest.raises(ltm.CheckpointError, match=r"VisionTransformer .*nor made by timm\.create_model.*base="):
        ltm.from_pretrained(tmp_path / "saved")
    loaded = ltm.from_pretrained(tmp_path / "saved", base=made())
    assert same(outputs(loaded, images), outputs(model, images))


def test_what_no_file_can_hold_is_left_out_where_it_changes_nothing(tmp_path: Path) -> None:
    tiny = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7}
    plain = timm.create_model("vit_tiny_patch16_224", act_layer=nn.GELU, **tiny)  # what it has anyway
    description = describe_base(plain)
    assert "act_layer" not in description["arguments"] and verify_base(plain, description) is None
    other = timm.create_model("vit_tiny_patch16_224", act_layer=nn.ReLU, **tiny)
    assert verify_base(other, describe_base(other)) == "rebuilt with the same weights, its outputs differ"


def test_a_stock_architecture_names_its_checkpoint() -> None:
    description = describe_base(timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32))
    assert description["id"] == "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert set(description["arguments"]) == {"num_classes", "in_chans", "img_size", "global_pool"}


@pytest.mark.parametrize("family", ["timm-vit", "hf-vit"])
def test_half_precision_and_training_mode(family: str, build: Build, images: torch.Tensor, tmp_path: Path) -> None:
    model = ltm.retrofit(build(family).to(torch.bfloat16)).train()
    ltm.save_pretrained(model, tmp_path / "saved")
    assert all(module.training for module in model.modules())
    loaded = ltm.from_pretrained(tmp_path / "saved")
    images = images.to(torch.bfloat16)
    assert same(outputs(loaded, images), outputs(model.eval(), images))
    dtypes = {tensor.dtype for key, tensor in loaded.state_dict().items() if key.startswith("ltm.readout")}
    assert dtypes == {torch.float32}
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_eager_attention_comes_back(build: Build, images: torch.Tensor, tmp_path: Path) -> None:
    model = build("hf-vit")
    model.set_attn_implementation("eager")
    model.config.id2label = {index: f"animal {index}" for index in range(7)}
    loaded = check_round_trip(ltm.retrofit(model), tmp_path / "saved", images)
    assert loaded.config._attn_implementation == "eager"
    assert loaded.config.id2label[6] == "animal 6"


def test_fitted_statistics_and_eta_survive(build: Build, images: torch.Tensor, tmp_path: Path) -> None:
    model = ltm.retrofit(build("timm-vit"), ltm.LTMConfig(flops=0.7, ib_step=True)).train()
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        batch = torch.randn(160, 3, 32, 32, generator=generator)
        with ltm.trace(model) as trace, torch.no_grad():
            model(batch)
        ltm.bound_loss(trace, torch.randint(7, (160,), generator=generator))
    shake(model)
    assert float(model.ltm.readout.fitted) == 1
    loaded = check_round_trip(model, tmp_path / "saved", images)
    assert float(loaded.ltm.readout.fitted) == 1
    assert torch.equal(loaded.ltm.readout.counts, model.ltm.readout.counts)
    etas = [key for key in model.state_dict() if "eta" in key and "beta" not in key]
    assert etas and all(float(loaded.state_dict()[key]) == float(model.state_dict()[key]) for key in etas)


def test_users_own_class_needs_base(build: Build, images: torch.Tensor, tmp_path: Path) -> None:
    model = shake(ltm.retrofit(Own(build("timm-vit"))))
    ltm.save_pretrained(model, tmp_path / "saved", allow_unloadable=True)
    with pytest.raises(ltm.CheckpointError, match="base="):
        ltm.from_pretrained(tmp_path / "saved")
    base = Own(build("timm-vit", seed=3))
    loaded = ltm.from_pretrained(tmp_path / "saved", base=base)
    assert loaded is base and same(outputs(loaded, images), outputs(model, images))
    with pytest.raises(ltm.AlreadyRetrofitted):
        ltm.from_pretrained(tmp_path / "saved", base=base)
    with pytest.raises(ltm.BaseMismatch, match=r"inner\."):
        ltm.from_pretrained(tmp_path / "saved", base=build("timm-vit"))
    assert "base=base" in (tmp_path / "saved" / "README.md").read_text()


def test_another_base(build: Build, saved: Path) -> None:
    other = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=48, depth=6, num_heads=3, num_classes=9
    )
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(ltm.BaseMismatch, match=r"head.weight is \(9, 48\) instead of \(7, 48\)"):
        ltm.from_pretrained(saved, base=other)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


def test_not_converted(build: Build, tmp_path: Path) -> None:
    with pytest.raises(ltm.NotRetrofitted):
        ltm.save_pretrained(build("timm-vit"), tmp_path / "saved")


def test_saving_leaves_the_model_and_random_state(build: Build, tmp_path: Path) -> None:
    model = ltm.retrofit(build("hf-vit"))
    model.vit.requires_grad_(False)
    model.train()
    model.vit.eval()
    flags = [(module.training, sorted(module.__dict__)) for module in model.modules()]
    state = torch.random.get_rng_state()
    ltm.save_pretrained(model, tmp_path / "saved")
    assert torch.equal(state, torch.random.get_rng_state())
    assert flags == [(module.training, sorted(module.__dict__)) for module in model.modules()]
    assert not any(parameter.requires_grad for parameter in model.vit.embeddings.parameters())


def test_tied_weights(build: Build, images: torch.Tensor, tmp_path: Path) -> None:
    model = build("timm-vit")
    model.blocks[2].mlp.fc1.weight = model.blocks[1].mlp.fc1.weight
    check_round_trip(ltm.retrofit(model, ONE), tmp_path / "saved", images)


def test_truncated_weights(saved: Path) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ltm.CheckpointError, match="truncated or altered"):
        ltm.from_pretrained(saved)
    edit(saved, sha256=hashlib.sha256(file.read_bytes()).hexdigest())  # and where the sum was made to fit
    with pytest.raises(ltm.CheckpointError, match="cannot be read"):
        ltm.from_pretrained(saved)


def test_altered_weights(saved: Path) -> None:
    file = saved / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(ltm.CheckpointError, match="SHA-256"):
        ltm.from_pretrained(saved)


def test_missing_files(saved: Path, tmp_path: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(ltm.CheckpointError, match=r"model\.safetensors"):
        ltm.from_pretrained(saved)
    (saved / "config.json").unlink()
    with pytest.raises(ltm.CheckpointError, match=r"config\.json"):
        ltm.from_pretrained(saved)
    with pytest.raises(ltm.CheckpointError, match="no folder"):
        ltm.from_pretrained(tmp_path / "nowhere")


def test_altered_config(saved: Path) -> None:
    original = (saved / "config.json").read_text()
    config = json.loads(original)
    plan, base = config["plan"], config["base"]
    for changes, message in [
        ({"surprise": 1}, "surprise"),
        ({"format_version": 99}, "format version 99"),
        ({"format": "other"}, "not written by"),
        ({"plan": {**plan, "extra": 1}}, "extra"),
        ({"plan": {**plan, "rows": 3}}, "plan"),
        ({"plan": {key: plan[key] for key in plan if key != "rows"}}, "rows"),
        ({"base": 5}, "mappings"),
        ({"base": {**base, "architecture": "local-dir:/tmp"}}, "no architecture"),
        ({"base": {**base, "arguments": {**base["arguments"], "checkpoint_path": "x.pth"}}}, "checkpoint_path"),
        ({"base": {**base, "data": {**base["data"], "file": "x.pth"}}}, "file"),
        ({"base": {**base, "arguments": {"no_such": 1}}}, "cannot be built"),
    ]:
        edit(saved, **changes)
        with pytest.raises(ltm.CheckpointError, match=message):
            ltm.from_pretrained(saved)
        (saved / "config.json").write_text(original)
    (saved / "config.json").write_text(original[: len(original) // 2])
    with pytest.raises(ltm.CheckpointError, match="no readable"):
        ltm.from_pretrained(saved)


@pytest.mark.parametrize("name", ["os.system", "PreTrainedModel", "pipeline", "AutoModel", "ViTConfig", "__class__", 3])
def test_only_public_model_classes_are_built(name: object, build: Build) -> None:
    description = describe_base(build("hf-vit"))
    with pytest.raises(ltm.CheckpointError, match="no model class of transformers"):
        rebuild_base({**description, "class": name})


def test_no_foreign_code_through_the_config(build: Build) -> None:
    description = describe_base(build("hf-vit"))
    with pytest.raises(ltm.CheckpointError, match="attn_implementation"):
        rebuild_base({**description, "attn_implementation": "someone/kernel"})
    with pytest.raises(ltm.CheckpointError, match="model type"):
        rebuild_base({**description, "model_type": "nothing"})
    with pytest.raises(ltm.CheckpointError, match="has no switch 'weights_only'"):
        rebuild_base({**description, "arguments": {"weights_only": False}})
    with pytest.raises(ltm.CheckpointError, match="ViTConfig"):
        rebuild_base({**description, "model_type": "swin"})
    hidden = {
        **description["config"],
        "_attn_implementation": "someone/kernel",
        "attn_implementation": "someone/kernel",
    }
    assert rebuild_base({**description, "config": hidden}).config._attn_implementation == "sdpa"
    with pytest.raises(ltm.CheckpointError, match="neither"):
        rebuild_base({"library": "os", "class": "system"})
    assert isinstance(rebuild_base(description), transformers.ViTForImageClassification)


def test_unwritable(build: Build, tmp_path: Path) -> None:
    model = converted(build)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ltm.CheckpointError, match="cannot be written"):
        ltm.save_pretrained(model, tmp_path / "file" / "below")
    with pytest.raises(ltm.CheckpointError, match=r"file is not a folder that can be written"):
        ltm.save_pretrained(model, tmp_path / "file")


def test_only_our_own_files_are_replaced(build: Build, saved: Path) -> None:
    model = shake(converted(build))
    with pytest.raises(ltm.CheckpointError, match="overwrite=True"):
        ltm.save_pretrained(model, saved)
    ltm.save_pretrained(model, saved, overwrite=True)
    assert same(outputs(ltm.from_pretrained(saved), torch.ones(1, 3, 32, 32)), outputs(model, torch.ones(1, 3, 32, 32)))
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(ltm.CheckpointError, match=r"not ours: notes\.txt"):
        ltm.save_pretrained(model, saved, overwrite=True)
    assert (saved / "notes.txt").read_text() == "mine"
    (saved / "notes.txt").unlink()
    (saved / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ltm.CheckpointError, match="not ours"):
        ltm.save_pretrained(model, saved, overwrite=True)


def test_a_failure_leaves_what_was_there(build: Build, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    model = shake(converted(build))

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    for room, step in ((save, "_write_weights"), (folders, "swap")):
        with monkeypatch.context() as patch:
            patch.setattr(room, step, full)
            with pytest.raises(ltm.CheckpointError, match="no space left"):
                ltm.save_pretrained(model, saved, overwrite=True)
            with pytest.raises(ltm.CheckpointError, match="no space left"):
                ltm.save_pretrained(model, saved.parent / "new")
        assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
        assert [entry.name for entry in saved.parent.iterdir()] == ["saved"]


def test_card(build: Build, tmp_path: Path) -> None:
    report = SimpleNamespace(to_markdown=lambda: "| measured | 1 |")
    model = converted(build)
    ltm.save_pretrained(model, tmp_path / "saved", report=report, recipe={"model": "digits_vit"})
    card = (tmp_path / "saved" / "README.md").read_text()
    for expected in (
        "library_name: ltm_retrofit",
        "| `blocks.1` | merge | 65 | 40 |",
        "measured",
        "model: digits_vit",
        'ltm.from_pretrained("saved")',
        f"{ltm.get_plan(model).macs / 1e9:.3f} G after",
    ):
        assert expected in card
    assert "license" not in card and "base_model" not in card


CONFIG = ltm.LTMConfig(flops=0.7)


def test_labels_in_the_example_are_no_input(build, tmp_path: Path) -> None:
    model = build("hf-vit")
    example = {"pixel_values": torch.randn(1, 3, 32, 32), "labels": torch.tensor([1])}
    ltm.retrofit(model, CONFIG, example)
    assert set(ltm.get_plan(model).input_size) == {"pixel_values"}
    assert model.config.problem_type is None
    ltm.save_pretrained(model, tmp_path / "saved")
    assert ltm.is_retrofitted(ltm.from_pretrained(tmp_path / "saved"))


def test_an_altered_plan_is_refused(build, tmp_path: Path) -> None:
    model = ltm.retrofit(build("timm-vit"), ltm.LTMConfig(flops=0.7, method="tome"))
    ltm.save_pretrained(model, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    rows = config["plan"]["rows"]
    rows[0]["tokens_out"] -= 3
    rows[1]["tokens_in"] -= 3
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RetrofitError, match="altered"):
        ltm.from_pretrained(tmp_path / "saved")
