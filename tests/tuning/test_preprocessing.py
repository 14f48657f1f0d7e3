"""Images come out as the model knows them: as timm's own transform and transformers' image processors make them."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers as tr
from pieces import Own
from PIL import Image
from torch import nn

import ltm_retrofit as ltm
from ltm_retrofit.errors import (
    DataError,
)
from ltm_retrofit.reporting.pictures import show_merges
from ltm_retrofit.saving.base import _spoken
from ltm_retrofit.tuning.preprocessing import Preprocessing, make_transform, preprocessing_of


def test_timm_says_its_normalisation_and_the_live_model_its_size() -> None:
    arguments = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
    model = timm.create_model("vit_base_patch16_clip_224", **arguments)
    declared = model.pretrained_cfg
    assert tuple(declared["input_size"]) == (3, 224, 224), "otherwise this test says nothing"
    wanted = preprocessing_of(model)
    assert wanted.size == (32, 48)
    assert wanted.mean == tuple(declared["mean"]) and wanted.std == tuple(declared["std"])
    assert (wanted.interpolation, wanted.crop_pct) == (declared["interpolation"], declared["crop_pct"])


def hf_model(**changes: object) -> nn.Module:
    options = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 24}
    return tr.ViTForImageClassification(tr.ViTConfig(**{"image_size": 32, "patch_size": 8, **options, **changes}))


def test_hf_without_an_image_processor_gets_one_half() -> None:
    wanted = preprocessing_of(hf_model())
    assert wanted.size == (32, 32)
    assert wanted.mean == wanted.std == (0.5, 0.5, 0.5)
    assert preprocessing_of(hf_model(num_channels=1)).mean == (0.5,)


def test_hf_image_processor_is_read_from_the_models_folder(tmp_path) -> None:
    hf_model().save_pretrained(tmp_path)
    processor = tr.ViTImageProcessor(
        image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], size={"height": 224, "width": 224}
    )
    processor.save_pretrained(tmp_path)
    wanted = preprocessing_of(tr.ViTForImageClassification.from_pretrained(tmp_path))
    assert wanted.mean == (0.1, 0.2, 0.3) and wanted.std == (0.4, 0.5, 0.6)
    assert wanted.size == (32, 32), "the live model's, not the processor's"


def test_a_model_that_says_nothing_is_asked_for_a_loader() -> None:
    with pytest.raises(DataError, match=r"Linear does not say its input size.*pass a loader"):
        preprocessing_of(nn.Linear(3, 3))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1"])
@pytest.mark.parametrize("size", [(50, 20), (20, 50), (7, 7), (32, 32)])
def test_transform_of_any_image_has_the_wanted_size(mode: str, size: tuple[int, int]) -> None:
    wanted = Preprocessing((32, 24), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), crop_pct=0.9)
    image = Image.new(mode, size, 1)
    for augment in ("none", "crop"):
        pixels = make_transform(wanted, augment)(image)
        assert pixels.shape == (3, 32, 24) and pixels.dtype == torch.float32
        assert torch.isfinite(pixels).all()


def test_transform_normalises() -> None:
    wanted = Preprocessing((16, 16), (0.5, 0.25, 0.0), (0.5, 0.25, 2.0))
    pixels = make_transform(wanted)(Image.new("RGB", (40, 30), (255, 0, 51)))
    expected = torch.tensor([1.0, -1.0, 0.1]).view(3, 1, 1).expand(3, 16, 16)
    torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)


def test_transform_of_one_channel_is_grey() -> None:
    pixels = make_transform(Preprocessing((16, 16), (0.5,), (0.5,)))(Image.new("RGB", (40, 30), (255, 255, 255)))
    torch.testing.assert_close(pixels, torch.ones(1, 16, 16))


def test_transform_keeps_the_middle_share_of_crop_pct() -> None:
    """A white frame of 1/4 on each side is exactly what crop_pct 0.5 cuts off."""
    array = np.full((64, 64, 3), 255, np.uint8)
    array[16:48, 16:48] = 0
    whole, middle = (
        make_transform(Preprocessing((32, 32), (0.0,) * 3, (1.0,) * 3, "nearest", share))(Image.fromarray(array))
        for share in (1.0, 0.5)
    )
    assert whole.max() == 1 and middle.max() == 0


def test_crop_shifts_by_up_to_a_sixteenth() -> None:
    array = np.zeros((32, 32, 3), np.uint8)
    array[16, 16] = 255
    transform = make_transform(Preprocessing((32, 32), (0.0,) * 3, (1.0,) * 3, "nearest"), "crop")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        places = {tuple(transform(Image.fromarray(array))[0].nonzero()[0].tolist()) for _ in range(200)}
    assert places == {(row, column) for row in range(14, 19) for column in range(14, 19)}


# ------------------------------------------------------------------------------------------- as image processors do it


def photo(width: int = 300, height: int = 200) -> Image.Image:
    """A picture with detail in every part and channel, and some noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 90 * np.sin(x / 9 + k) * np.cos(y / (5 + 3 * k)) for k in range(3)]
    return Image.fromarray((np.stack(waves, -1) + rng.integers(0, 30, (height, width, 3))).astype(np.uint8))


PROCESSORS = {
    "vit": lambda: tr.ViTImageProcessor(size={"height": 32, "width": 32}),
    "vit-lanczos": lambda: tr.ViTImageProcessor(size={"height": 32, "width": 32}, resample=1),
    "vit-not-normalised": lambda: tr.ViTImageProcessor(size={"height": 32, "width": 32}, do_normalize=False),
    "vit-0-to-255": lambda: tr.ViTImageProcessor(size={"height": 32, "width": 32}, do_rescale=False),
    "vit-other-scale": lambda: tr.ViTImageProcessor(size={"height": 32, "width": 32}, rescale_factor=1 / 127.5),
    "deit-squashed-and-cropped": lambda: tr.DeiTImageProcessor(
        size={"height": 36, "width": 36}, crop_size={"height": 32, "width": 32}
    ),
    "dinov2-256-224": lambda: tr.BitImageProcessor(
        size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}
    ),
    "clip": lambda: tr.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    "mobilevit-blue-first": lambda: tr.MobileViTImageProcessor(
        size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}
    ),
    "convnext-share": lambda: tr.ConvNextImageProcessor(size={"shortest_edge": 28}),
    "convnext-384": lambda: tr.ConvNextImageProcessor(size={"shortest_edge": 384}),
    "levit": lambda: tr.LevitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
    "poolformer": lambda: tr.PoolFormerImageProcessor(
        size={"shortest_edge": 36}, crop_size={"height": 36, "width": 36}
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("shape", [(300, 200), (200, 300)], ids=["wide", "high"])
def test_images_come_out_as_from_the_models_own_image_processor(name: str, shape, tmp_path) -> None:
    processor = PROCESSORS[name]()
    expected = processor(photo(*shape), return_tensors="pt")["pixel_values"][0]
    hf_model(image_size=expected.shape[-1], patch_size=4).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        wanted = preprocessing_of(tr.ViTForImageClassification.from_pretrained(tmp_path))
    pixels = make_transform(wanted)(photo(*shape))
    assert pixels.shape == expected.shape
    white = 255 if name == "vit-0-to-255" else 1
    # of one size and one filter; rounding to whole grey values comes at other places (and Lanczos is Pillow's here)
    assert float((pixels - expected).abs().mean()) < (0.06 if name == "vit-lanczos" else 0.02) * white
    assert float((pixels - expected).abs().max()) < (0.6 if name == "vit-lanczos" else 0.1) * white


@pytest.mark.parametrize("name", ["mobilevit-blue-first", "dinov2-256-224", "vit-0-to-255"])
def test_what_the_processor_says_survives_conversion_and_saving(name: str, tmp_path) -> None:
    processor = PROCESSORS[name]()
    hf_model(num_hidden_layers=4).save_pretrained(tmp_path / "host")
    processor.save_pretrained(tmp_path / "host")
    model = tr.ViTForImageClassification.from_pretrained(tmp_path / "host")
    wanted = preprocessing_of(model)
    ltm.save_pretrained(ltm.retrofit(model.eval(), ltm.LTMConfig(flops=0.8)), tmp_path / "saved")
    assert preprocessing_of(ltm.from_pretrained(tmp_path / "saved")) == wanted


def test_pictures_of_a_model_that_reads_blue_first_keep_their_colours(tmp_path) -> None:
    hf_model(num_hidden_layers=4).save_pretrained(tmp_path)
    PROCESSORS["mobilevit-blue-first"]().save_pretrained(tmp_path)
    model = tr.ViTForImageClassification.from_pretrained(tmp_path).eval()
    ltm.retrofit(model, ltm.LTMConfig(flops=0.8))
    figure = show_merges(model, Image.new("RGB", (32, 32), (255, 0, 0)))
    shown = np.asarray(figure.axes[0].images[0].get_array())
    assert shown[16, 16].tolist() == [1.0, 0.0, 0.0]


class Spotted(tr.ViTImageProcessor):
    """Blackens a part of what it resizes."""

    def preprocess(self, *args: object, **kwargs: object) -> object:
        found = super().preprocess(*args, **kwargs)
        found["pixel_values"][..., :8, :8] = -1.0
        return found


@pytest.mark.parametrize(
    "processor",
    [
        tr.DetrImageProcessor(),
        tr.Siglip2ImageProcessor(),
        tr.EfficientNetImageProcessor(),
        Spotted(size={"height": 32, "width": 32}),
    ],
    ids=lambda processor: type(processor).__name__,
)
def test_an_image_processor_that_does_more_is_refused_by_name(processor, monkeypatch, tmp_path) -> None:
    hf_model().save_pretrained(tmp_path)
    monkeypatch.setattr(tr.AutoImageProcessor, "from_pretrained", lambda *args, **kwargs: processor)
    model = tr.ViTForImageClassification.from_pretrained(tmp_path)
    with pytest.raises(DataError, match=f"{type(processor).__name__} does more to an image.*pass loaders"):
        preprocessing_of(model)


@pytest.mark.parametrize(
    "changes", [{"crop_size": None, "do_center_crop": True}, {"image_mean": "grey"}, {"resample": "no filter"}], ids=str
)
def test_an_image_processor_of_odd_values_is_refused_by_name(changes, monkeypatch, tmp_path) -> None:
    processor = PROCESSORS["dinov2-256-224"]()
    for name, value in changes.items():
        setattr(processor, name, value)
    hf_model().save_pretrained(tmp_path)
    monkeypatch.setattr(tr.AutoImageProcessor, "from_pretrained", lambda *args, **kwargs: processor)
    model = tr.ViTForImageClassification.from_pretrained(tmp_path)
    with pytest.raises(DataError, match=f"{type(processor).__name__} does more .* or does it otherwise"):
        preprocessing_of(model)


@pytest.mark.parametrize("number", [0.4, 1], ids=str)
def test_one_number_is_that_of_every_channel(number: float, monkeypatch, tmp_path) -> None:
    processor = tr.ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=number, image_std=number)
    hf_model().save_pretrained(tmp_path)
    monkeypatch.setattr(tr.AutoImageProcessor, "from_pretrained", lambda *args, **kwargs: processor)
    wanted = preprocessing_of(tr.ViTForImageClassification.from_pretrained(tmp_path))
    assert wanted.mean == wanted.std == (number,) * 3


def test_what_was_refused_is_refused_after_saving_and_loading(monkeypatch, tmp_path) -> None:
    hf_model(num_hidden_layers=4).save_pretrained(tmp_path / "host")
    model = tr.ViTForImageClassification.from_pretrained(tmp_path / "host")
    monkeypatch.setattr(tr.AutoImageProcessor, "from_pretrained", lambda *args, **kwargs: tr.DetrImageProcessor())
    ltm.save_pretrained(ltm.retrofit(model, ltm.LTMConfig(flops=0.9)), tmp_path / "saved")
    again = ltm.from_pretrained(tmp_path / "saved")
    with pytest.raises(DataError, match=r"DetrImageProcessor does more to an image.*pass loaders"):
        preprocessing_of(again)
    ltm.save_pretrained(again, tmp_path / "again")
    with pytest.raises(DataError, match="DetrImageProcessor does more"):
        preprocessing_of(ltm.from_pretrained(tmp_path / "again"))


def test_a_loaded_model_without_an_image_processor_warns(tmp_path) -> None:
    hf_model().save_pretrained(tmp_path)
    model = tr.ViTForImageClassification.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=f"no image processor found for {re.escape(str(tmp_path))}.*0.5"):
        assert preprocessing_of(model).mean == (0.5, 0.5, 0.5)


def test_a_model_of_the_hub_asks_for_the_processor_of_its_own_revision(monkeypatch) -> None:
    model = hf_model()
    model.config._name_or_path, model.config._commit_hash = "somebody/model", "abc"
    asked = []

    def answer(name: str, **options: object) -> object:
        asked.append((name, options))
        return PROCESSORS["dinov2-256-224"]()

    monkeypatch.setattr(tr.AutoImageProcessor, "from_pretrained", answer)
    wanted = preprocessing_of(model)
    assert asked == [("somebody/model", {"trust_remote_code": False, "revision": "abc"})]
    assert wanted.crop_pct == 224 / 256 and wanted.mean == (0.48145466, 0.4578275, 0.40821073)


def test_transformers_wrapper_of_timm_has_the_checkpoints_settings() -> None:
    said = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "crop_pct": 0.9}
    config = tr.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224",
        model_args={"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2},
        pretrained_cfg=said,
    )
    wanted = preprocessing_of(tr.TimmWrapperForImageClassification(config))
    assert wanted == Preprocessing((32, 32), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 0.9)


@pytest.mark.parametrize("size", [(32, 32), (32, 48), (48, 32)], ids=str)
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_timms_own_transform_gives_the_same(interpolation: str, crop_mode: str, size: tuple[int, int]) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=size, patch_size=8, embed_dim=24, depth=1, num_heads=2)
    said = {"interpolation": interpolation, "crop_pct": 0.9, "crop_mode": crop_mode, "mean": (0.2, 0.5, 0.7)}
    model.pretrained_cfg = {**model.pretrained_cfg, **said}
    expected = timm.data.create_transform(**timm.data.resolve_model_data_config(model) | {"input_size": (3, *size)})
    for picture in (photo(), photo().rotate(90, expand=True)):
        pixels = make_transform(preprocessing_of(model))(picture)
        assert pixels.shape == (3, *size)
        assert float((pixels - expected(picture)).abs().max()) < 0.1


def test_a_network_around_a_pretrained_one_wants_what_that_wants() -> None:
    inner = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2)
    inner.pretrained_cfg = {**inner.pretrained_cfg, "mean": (0.1, 0.2, 0.3)}
    assert preprocessing_of(Own(inner)).mean == (0.1, 0.2, 0.3)
    assert preprocessing_of(Own(inner)) == preprocessing_of(inner)


def test_a_model_of_four_channels_is_asked_for_a_loader() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, in_chans=4)
    with pytest.raises(DataError, match="wants 4 channels, and images have three or one: pass a loader"):
        preprocessing_of(model)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_grey_images_of_every_crop(crop_mode: str) -> None:
    wanted = Preprocessing((32, 24), (0.4,), (0.2,), crop_pct=0.9, crop_mode=crop_mode)
    assert make_transform(wanted)(photo()).shape == (1, 32, 24)


def test_sixteen_bits_are_not_cut_off_at_eight() -> None:
    grey = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    transform = make_transform(Preprocessing((32, 32), (0.0,) * 3, (1.0,) * 3))
    assert torch.allclose(transform(Image.fromarray(grey))[0], torch.from_numpy(grey / 65535).float(), atol=1 / 255)


def test_an_interpolation_that_nobody_knows_is_refused() -> None:
    with pytest.raises(DataError, match="interpolation='random', which is none of nearest, lanczos"):
        make_transform(Preprocessing((32, 32), (0.5,), (0.5,), "random"))


def test_no_code_of_a_folder_is_asked_for_or_run(tmp_path, monkeypatch) -> None:
    hf_model().save_pretrained(tmp_path)
    (tmp_path / "mine.py").write_text("raise SystemExit('code of the folder ran')")
    said = {"auto_map": {"AutoImageProcessor": "mine.Mine"}, "image_processor_type": "Mine"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    with pytest.warns(UserWarning, match="no image processor found"):
        assert preprocessing_of(tr.ViTForImageClassification.from_pretrained(tmp_path)).mean == (0.5,) * 3


class Parts(nn.Module):
    """A network of several."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def timm_model(**said: object) -> nn.Module:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2)
    model.pretrained_cfg = {**model.pretrained_cfg, **said}
    return model


def test_parts_that_want_other_images_are_named() -> None:
    teacher, student = timm_model(mean=(0.1, 0.2, 0.3)), timm_model(mean=(0.4, 0.5, 0.6))
    with pytest.raises(DataError, match=r"parts of Parts want their images differently \(teacher, student\)"):
        preprocessing_of(Parts(teacher=teacher, student=student))
    assert preprocessing_of(Parts(a=student, b=timm_model(mean=(0.4, 0.5, 0.6)))).mean == (0.4, 0.5, 0.6)


def test_a_part_that_reads_text_says_nothing_of_images(monkeypatch) -> None:
    text = tr.BertModel(tr.BertConfig(hidden_size=24, num_attention_heads=2, num_hidden_layers=1, vocab_size=9))
    text.config._name_or_path = "somebody/text"
    monkeypatch.setattr(tr.AutoImageProcessor, "from_pretrained", lambda *args, **kwargs: pytest.fail("asked for it"))
    assert preprocessing_of(Parts(text=text, vision=timm_model(mean=(0.1, 0.2, 0.3)))).mean == (0.1, 0.2, 0.3)


def test_a_network_around_one_of_transformers_wants_what_that_wants(tmp_path) -> None:
    hf_model().save_pretrained(tmp_path)
    tr.ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    inner = tr.ViTForImageClassification.from_pretrained(tmp_path)
    assert preprocessing_of(Own(inner)) == preprocessing_of(inner)
    assert preprocessing_of(inner).mean == (0.1, 0.2, 0.3)


def test_what_a_backbone_says_is_recorded_with_the_model_around_it(tmp_path) -> None:
    hf_model().save_pretrained(tmp_path)
    tr.ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    swin = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4}
    backbone = tr.SwinConfig(**swin, out_features=[f"stage{stage}" for stage in range(1, 5)])
    model = tr.UperNetForSemanticSegmentation(tr.UperNetConfig(backbone_config=backbone, hidden_size=8))
    model.backbone.config._name_or_path = str(tmp_path)
    assert preprocessing_of(model).mean == (0.1, 0.2, 0.3)
    assert _spoken(model)["mean"] == [0.1, 0.2, 0.3]


CONFIG = ltm.LTMConfig(flops=0.7)


def test_an_image_processors_normalisation_survives_saving(build, tmp_path: Path) -> None:
    build("hf-vit").save_pretrained(tmp_path / "host")
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "resample": 2,
        "size": {"height": 32, "width": 32},
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.2, 0.3],
    }
    (tmp_path / "host" / "preprocessor_config.json").write_text(json.dumps(processor))
    model = ltm.load_model(str(tmp_path / "host"))
    wanted = preprocessing_of(model)
    assert wanted == Preprocessing((32, 32), (0.4, 0.5, 0.6), (0.2, 0.2, 0.3), "bilinear", 1.0, crop_mode="squash")
    ltm.save_pretrained(ltm.retrofit(model, CONFIG), tmp_path / "saved")
    assert preprocessing_of(ltm.from_pretrained(tmp_path / "saved")) == wanted


def test_images_keep_their_proportions_unless_squashed() -> None:
    wide = Image.new("RGB", (64, 32))
    wide.paste((255, 255, 255), (0, 0, 16, 32))  # the left quarter: outside of the middle square
    cropped = make_transform(Preprocessing((32, 32), (0.0,) * 3, (1.0,) * 3))(wide)
    squashed = make_transform(Preprocessing((32, 32), (0.0,) * 3, (1.0,) * 3, crop_mode="squash"))(wide)
    assert float(cropped.max()) < 0.1 and float(squashed.max()) > 0.9
