"""Exports: what lies in the folder, that runtimes compute the same from it, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as tr
from conversions import randomise
from pieces import WIDE, Own, equal, weights
from PIL import Image
from torch import Tensor, nn

import ltm_retrofit as ltm
from ltm_retrofit.cli import main
from ltm_retrofit.finding.example import logits_of
from ltm_retrofit.saving import agreement, formats
from ltm_retrofit.saving.agreement import check, choices, rounding_decides, same_answers, timed
from ltm_retrofit.saving.formats import FORMATS, Format, Logits
from ltm_retrofit.tuning.preprocessing import preprocessing_of

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7}
HALF = ltm.LTMConfig(flops=0.7)


def timms() -> nn.Module:
    return randomise(timm.create_model("vit_tiny_patch16_224", **TINY))


def host(folder: Path) -> nn.Module:
    """A tiny Hugging Face model with names for its classes, read from a folder that has its image processor."""
    names = {0: "cat", 1: "dog", 2: "owl"}
    config = tr.ViTConfig(id2label=names, label2id={name: i for i, name in names.items()}, **{**WIDE, "patch_size": 8})
    randomise(tr.ViTForImageClassification(config)).save_pretrained(folder)
    tr.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return tr.ViTForImageClassification.from_pretrained(folder)


def photo() -> Image.Image:
    return Image.linear_gradient("L").resize((50, 40)).convert("RGB")


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def listed(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have the format "torch" write a file in no time, and run the model itself, with something added to its logits."""

    def get(add: Callable[[Tensor], Tensor] = torch.zeros_like) -> None:
        kept: list[nn.Module] = []

        def write(model: nn.Module, images: Tensor, file: Path) -> None:
            file.write_text("a model")
            kept.append(model)

        def opened(file: Path) -> Callable[[Tensor], Tensor]:
            def call(images: Tensor) -> Tensor:
                with torch.no_grad():
                    return kept[0](images) + add(kept[0](images))

            return call

        pretence = dataclasses.replace(FORMATS["torch"], write=write, open=opened)
        monkeypatch.setitem(FORMATS, "torch", pretence)

    return get


# ------------------------------------------------------------------------------------------------------ what is written


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, ltm.Exported]:
    """A converted timm model, left in train mode, and its export to ONNX."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model = ltm.retrofit(timms(), HALF).train()
    before = weights(model)
    images = ltm.load_images(model, "digits", 5)
    exported = ltm.export(model, tmp_path_factory.mktemp("served") / "onnx", images=images, seconds=0)
    assert model.training and all(module.training for module in model.modules())
    assert equal(weights(model), before) and ltm.is_retrofitted(model)
    return model.eval(), exported


def test_onnx_runtime_computes_the_same_in_any_batch(served: tuple[nn.Module, ltm.Exported]) -> None:
    import onnxruntime

    model, exported = served
    session = onnxruntime.InferenceSession(str(exported.path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == ["pixel_values"]
    assert session.get_inputs()[0].shape[1:] == [3, 32, 32]
    assert [one.name for one in session.get_outputs()] == ["logits"]
    for batch in (1, 2, 6):
        images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
        (given,) = session.run(None, {"pixel_values": images.numpy()})
        with torch.no_grad():
            assert torch.allclose(torch.from_numpy(given), model(images), rtol=0, atol=1e-5)


def test_an_export_says_what_it_is_and_how_it_was_checked(served: tuple[nn.Module, ltm.Exported]) -> None:
    model, exported = served
    said = read(exported.path / "export.json")
    assert listed(exported.path) == said["files"] == ["config.json", "export.json", "model.onnx"]
    assert exported.opset == said["opset"] == 20 and "opset 20" in str(exported)
    assert said["base"] == {"library": "timm", "class": "VisionTransformer", "architecture": "vit_tiny_patch16_224"}
    assert said["macs_share"] == ltm.get_plan(model).share
    assert (exported.images, exported.given, exported.near_ties) == (21, 5, 0) and exported.largest <= 1e-5
    assert exported.kl is None and exported.latency == {}
    with pytest.raises(dataclasses.FrozenInstanceError):
        exported.opset = 3  # type: ignore[misc]


def test_transformers_reads_a_timm_model_s_configuration_and_makes_its_images(
    served: tuple[nn.Module, ltm.Exported],
) -> None:
    model, exported = served
    config = tr.AutoConfig.from_pretrained(exported.path)
    assert config.model_type == "timm_wrapper" and config.architecture == "vit_tiny_patch16_224"
    assert config.num_labels == 7 and config.id2label[6] == "LABEL_6" and config.image_size == 32
    made = tr.AutoImageProcessor.from_pretrained(exported.path)(photo(), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(made, preprocessing_of(model)(photo()))


def test_int8_is_measured_and_not_refused(served: tuple[nn.Module, ltm.Exported], tmp_path: Path) -> None:
    model, exported = served
    file = tmp_path / "model.onnx"
    file.write_bytes((exported.path / "model.onnx").read_bytes())
    formats.quantize(file)
    assert file.stat().st_size < 0.6 * (exported.path / "model.onnx").stat().st_size and listed(tmp_path) == [file.name]
    images = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    small, whole = formats.open_onnx(file), formats.open_onnx(exported.path / "model.onnx")
    assert not torch.allclose(small(images), whole(images), rtol=0, atol=1e-6)
    answer, kl = same_answers(small, model, images)
    assert 0.5 <= answer <= 1 and 0 < kl < 0.1
    assert same_answers(whole, model, images)[0] == 1


def test_int8_goes_through_export(pretended: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretended(lambda logits: torch.zeros_like(logits))
    quantized: list[Path] = []
    monkeypatch.setitem(FORMATS, "onnx", dataclasses.replace(FORMATS["torch"], file="model.onnx"))
    monkeypatch.setattr("ltm_retrofit.saving.export.quantize", quantized.append)
    monkeypatch.setattr("ltm_retrofit.saving.export.opset_of", lambda file: 20)
    model = ltm.retrofit(timms(), HALF)
    exported = ltm.export(model, tmp_path / "int8", int8=True, seconds=0.01)
    assert [file.name for file in quantized] == ["model.onnx"] * 2, (
        "the original's, too, so that like is timed with like"
    )
    assert exported.same_answer == 1 and abs(exported.kl) < 1e-6 and "16 random images" in str(exported)
    images = torch.randn(3, 3, 32, 32)
    given = ltm.export(model, tmp_path / "int8", int8=True, images=images, seconds=0, overwrite=True)
    assert given.given == 3 and "100.0% of 3 images given" in str(given) and given.latency == {}


def test_a_hugging_face_model_leaves_with_its_names_and_its_processor(pretended: Callable, tmp_path: Path) -> None:
    pretended()
    model = ltm.retrofit(host(tmp_path / "host"), HALF)
    exported = ltm.export(model, tmp_path / "served", format="torch", seconds=0.01)
    assert listed(exported.path) == ["config.json", "export.json", "model.pt2", "preprocessor_config.json"]
    config = tr.AutoConfig.from_pretrained(exported.path)
    assert config.model_type == "vit" and config.id2label == {0: "cat", 1: "dog", 2: "owl"} and config.image_size == 32
    made = tr.AutoImageProcessor.from_pretrained(exported.path)(photo(), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(made, preprocessing_of(model)(photo()))
    assert exported.opset is None and set(exported.latency) == {1, 8}
    low, middle, high = exported.latency[1].speedup
    assert 0 < low <= middle <= high and f"{middle:.2f} times as fast ({low:.2f} to {high:.2f})" in str(exported)


def test_a_processor_of_another_size_is_written_with_the_graph_s(pretended: Callable, tmp_path: Path) -> None:
    pretended()
    host(tmp_path / "host")
    tr.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "host")
    model = tr.ViTForImageClassification.from_pretrained(tmp_path / "host")
    exported = ltm.export(model, tmp_path / "served", format="torch", example=torch.randn(1, 3, 32, 32))
    made = tr.AutoImageProcessor.from_pretrained(exported.path)(photo(), return_tensors="pt")["pixel_values"]
    assert made.shape == (1, 3, 32, 32)


@pytest.mark.slow  # half a minute of tracing each
@pytest.mark.parametrize("kind", ["onnx", "int8", "torch"])
def test_a_hugging_face_model_is_exported(kind: str, tmp_path: Path) -> None:
    if kind != "torch":
        pytest.importorskip("onnxscript")
    model = ltm.retrofit(host(tmp_path / "host"), HALF)
    format = "torch" if kind == "torch" else "onnx"
    exported = ltm.export(model, tmp_path / "served", format=format, int8=kind == "int8", seconds=0.1)
    assert (exported.path / FORMATS[format].file).is_file() and (exported.kl is not None) == (kind == "int8")
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        given = FORMATS[format].open(exported.path / FORMATS[format].file)(images)
        assert torch.allclose(given, model(images).logits, rtol=0, atol=0.1 if kind == "int8" else 1e-5)


def test_openvino_computes_the_same(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed: pip install 'ltm-retrofit[openvino]'")
    model = ltm.retrofit(timms(), HALF)
    exported = ltm.export(model, tmp_path / "served", format="openvino", seconds=0)
    assert listed(exported.path) == ["config.json", "export.json", "openvino_model.bin", "openvino_model.xml"]
    float32 = {"INFERENCE_PRECISION_HINT": "f32"}  # on CPUs with bfloat16 it would choose that
    compiled = openvino.compile_model(exported.path / "openvino_model.xml", "CPU", float32)
    assert compiled.inputs[0].names == {"pixel_values"} and compiled.outputs[0].names == {"logits"}
    for batch in (1, 5):
        images = torch.randn(batch, 3, 32, 32)
        with torch.no_grad():
            given = torch.from_numpy(compiled({"pixel_values": images.numpy()})["logits"])
            assert torch.allclose(given, model(images), rtol=0, atol=1e-4)


def test_a_model_that_was_not_converted_is_exported_too(pretended: Callable, tmp_path: Path) -> None:
    pretended()
    exported = ltm.export(timms(), tmp_path / "served", format="torch")
    assert exported.latency == {} and read(exported.path / "export.json")["macs_share"] is None


def test_a_class_of_one_s_own_is_exported_in_float32(pretended: Callable, tmp_path: Path) -> None:
    pretended()
    model = Own(timms()).bfloat16()
    exported = ltm.export(model, tmp_path / "served", format="torch", example=torch.randn(1, 3, 32, 32).bfloat16())
    assert next(model.parameters()).dtype == torch.bfloat16
    assert "model_type" not in read(exported.path / "config.json") and "for you to know" in str(exported)


def test_gradients_autocast_and_inference_mode_around_the_call_do_not_matter(
    pretended: Callable, tmp_path: Path
) -> None:
    pretended()
    model = ltm.retrofit(timms(), HALF)
    for place, around in enumerate((torch.enable_grad(), torch.autocast("cpu"), torch.inference_mode())):
        with around:
            assert ltm.export(model, tmp_path / str(place), format="torch", seconds=0).largest == 0


# ---------------------------------------------------------------------------------------------------- how it is checked


def test_nothing_is_written_where_logits_differ(pretended: Callable, tmp_path: Path) -> None:
    pretended(lambda logits: torch.full_like(logits, 0.1))
    with pytest.raises(ltm.CheckpointError, match=r"other logits than the model, on 16 of 16 images by up to 0\.1"):
        ltm.export(ltm.retrofit(timms(), HALF), tmp_path / "served", format="torch")
    assert listed(tmp_path) == []


@pytest.mark.parametrize("wrong", ["a column less", "not a number"])
def test_what_is_no_logits_is_refused(wrong: str) -> None:
    model = Logits(timms(), None)

    def session(images: Tensor) -> Tensor:
        with torch.no_grad():
            return model(images)[:, :-1] if wrong == "a column less" else model(images) * torch.nan

    with pytest.raises(ltm.CheckpointError, match="not finite logits of"):
        check(session, model, torch.randn(2, 3, 32, 32), FORMATS["torch"])


@pytest.fixture(scope="module")
def torn() -> Iterator[tuple[nn.Module, Tensor]]:
    """A converted model, and an image between two whose choices change at this very place."""
    model = Logits(ltm.retrofit(timms(), HALF), None)
    first, last = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)).unbind()
    at_first = choices(model, first)
    for _ in range(40):
        middle = (first + last) / 2
        same = all(torch.equal(one, other) for one, other in zip(choices(model, middle), at_first, strict=True))
        first, last = (middle, last) if same else (first, middle)
    yield model, first


def test_rounding_decides_where_choices_change_and_nowhere_else(torn: tuple[nn.Module, Tensor]) -> None:
    model, image = torn
    assert rounding_decides(model, image)
    others = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    assert sum(rounding_decides(model, other) for other in others) <= 1
    assert not rounding_decides(Logits(timms(), None), image), "an original chooses nothing"


def test_an_image_is_excused_only_where_rounding_decides(torn: tuple[nn.Module, Tensor]) -> None:
    model, image = torn
    images = torch.cat([image.unsqueeze(0), torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(4))])

    def off_on(place: int) -> Callable[[Tensor], Tensor]:
        def session(given: Tensor) -> Tensor:
            with torch.no_grad():
                return model(given) + 0.1 * (given == images[place]).all(dim=(1, 2, 3)).unsqueeze(1)

        return session

    agreed = check(off_on(0), model, images, FORMATS["onnx"])
    assert agreed.near_ties == 1 and agreed.largest <= 1e-5
    firm = next(place for place in range(1, 6) if not rounding_decides(model, images[place]))
    with pytest.raises(ltm.CheckpointError, match=r"on 1 of 6 images"):
        check(off_on(firm), model, images, FORMATS["onnx"])


def test_many_near_ties_are_no_excuse(torn: tuple[nn.Module, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "rounding_decides", lambda *_: True)
    model, image = torn
    images = image.repeat(100, 1, 1, 1)

    def session(given: Tensor) -> Tensor:
        nonlocal left
        with torch.no_grad():
            logits = model(given)
        for row in logits[: left if len(given) > 1 else 0]:
            row += 0.1
            left -= 1
        return logits

    left = 2
    assert check(session, model, images, FORMATS["torch"]).near_ties == 2
    left = 3
    with pytest.raises(ltm.CheckpointError, match="on 3 of 100 images"):
        check(session, model, images, FORMATS["torch"])


def test_two_ways_are_timed_in_turn() -> None:
    called: list[str] = []
    taken = timed(lambda: called.append("original"), lambda: called.append("converted"), seconds=0)
    assert called == ["original", "converted"] * 5, "two rounds to warm up, and the fewest of which there is a median"
    assert taken.speedup[0] <= taken.speedup[1] <= taken.speedup[2]


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"format": "tflite"}, ltm.RecipeError, "'onnx', 'openvino', 'torch', got 'tflite'"),
        ({"format": "torch", "int8": True}, ltm.RecipeError, "int8=True is for format='onnx', got 'torch'"),
        ({"example": torch.randn(1, 3, 48, 48)}, ltm.ExampleError, "48×48 with 3 channels.* converted for 32×32"),
        ({"example": torch.randn(4, 32)}, ltm.ExampleError, r"takes a tensor \(1, 32\)"),
        (
            {"example": {"x": torch.randn(1, 3, 32, 32), "mask": torch.ones(1, 4)}},
            ltm.ExampleError,
            r"takes images \(B, C, H, W\) and nothing else",
        ),
        ({"images": torch.randn(2, 3, 16, 16)}, ltm.DataError, r"are \(2, 3, 16, 16\).* takes \(n, 3, 32, 32\)"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, error: type, said: str, tmp_path: Path, pretended: Callable) -> None:
    pretended()
    with pytest.raises(error, match=said):
        ltm.export(ltm.retrofit(timms(), HALF), tmp_path / "served", **{"format": "torch", **options})
    assert listed(tmp_path) == []


def test_a_model_without_class_logits_is_refused(tmp_path: Path) -> None:
    model = tr.ViTModel(tr.ViTConfig(**WIDE))
    assert logits_of(model(torch.randn(1, 3, 32, 32))) is None
    with pytest.raises(ltm.ExampleError, match="ViTModel puts out no class logits"):
        ltm.export(model, tmp_path / "served", format="torch")


def test_an_original_that_does_not_take_the_example_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ltm.ExampleError, match="does not run on an image of 48×48"):
        ltm.export(timms(), tmp_path / "served", format="torch", example=torch.randn(1, 3, 48, 48))


def test_what_an_exporter_cannot_is_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise NotImplementedError("no operator for this\nand a page of advice")

    monkeypatch.setitem(FORMATS, "torch", dataclasses.replace(FORMATS["torch"], write=fails))
    said = r"cannot be exported for torch.export: NotImplementedError: no operator for this\. Nothing was written"
    with pytest.raises(ltm.CheckpointError, match=said):
        ltm.export(timms(), tmp_path / "served", format="torch")
    assert listed(tmp_path) == []


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind: Format = FORMATS[format]
    monkeypatch.setitem(FORMATS, format, dataclasses.replace(kind, needs=("no_such_library",)))
    with pytest.raises(ltm.CheckpointError, match=rf"no_such_library.*pip install 'ltm-retrofit\[{format}\]'"):
        ltm.export(timms(), tmp_path / "served", format=format)


def test_a_folder_is_replaced_only_where_it_is_an_export_and_one_asks_for_it(
    pretended: Callable, tmp_path: Path
) -> None:
    pretended()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("…")
    with pytest.raises(ltm.CheckpointError, match=r"not ours: thesis\.tex"):
        ltm.export(timms(), tmp_path / "mine", format="torch", overwrite=True)
    ltm.export(timms(), tmp_path / "served", format="torch")
    with pytest.raises(ltm.CheckpointError, match="pass overwrite=True"):
        ltm.export(timms(), tmp_path / "served", format="torch")
    ltm.export(timms(), tmp_path / "served", format="torch", overwrite=True)


# ----------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    ltm.save_pretrained(ltm.retrofit(timms(), HALF), tmp_path / "saved")
    return tmp_path / "saved"


def test_export_is_a_command(saved: Path, tmp_path: Path, pretended: Callable, capsys: pytest.CaptureFixture) -> None:
    pretended()
    photo().save(tmp_path / "one.png")
    command = ["export", str(saved), "--torch", str(tmp_path / "served"), "--seconds", "0.01"]
    assert main([*command, "--data", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert f"{tmp_path}/served/model.pt2" in shown and "on 17 images" in shown and "times as fast" in shown
    assert main(command) == 2
    assert "pass --overwrite to replace it" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "torch"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "one of the arguments --onnx --openvino --torch is required"),
        (["--onnx", "a", "--torch", "b"], "not allowed with"),
        (["--torch", "a", "--int8"], "--int8 goes with --onnx"),
    ],
)
def test_the_command_says_which_options_go_together(
    options: list[str], said: str, saved: Path, capsys: pytest.CaptureFixture
) -> None:
    try:
        status = main(["export", str(saved), *options])
    except SystemExit as end:  # argparse's own
        status = end.code
    assert status == 2 and said in capsys.readouterr().err


def test_a_folder_that_cannot_be_loaded_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["export", str(tmp_path / "empty"), "--torch", str(tmp_path / "served")]) == 2
    assert "has no readable config.json" in capsys.readouterr().err and not (tmp_path / "served").exists()
