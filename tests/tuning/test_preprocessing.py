"""Images come out as the host itself makes them, to the last bit: by its image processor, or timm's own transform."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers as tr
from pieces import Own
from PIL import Image
from torch import nn
from transformers.image_utils import load_image

import ltm_retrofit as ltm
from ltm_retrofit.errors import DataError
from ltm_retrofit.reporting.pictures import show_merges
from ltm_retrofit.tuning.preprocessing import eight_bits, make_transform, plain, preprocessing_of


def hf_model(**changes: object) -> nn.Module:
    options = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 24}
    return tr.ViTForImageClassification(tr.ViTConfig(**{"image_size": 32, "patch_size": 8, **options, **changes}))


def timm_model(size: Any = 32, **said: object) -> nn.Module:
    model = timm.create_model("vit_tiny_patch16_224", img_size=size, patch_size=8, embed_dim=24, depth=1, num_heads=2)
    model.pretrained_cfg = {**model.pretrained_cfg, **said}
    return model


def photo(width: int = 300, height: int = 200, mode: str = "RGB") -> Image.Image:
    """A picture with detail in every part and channel, and some noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 90 * np.sin(x / 9 + k) * np.cos(y / (5 + 3 * k)) for k in range(3)]
    noisy = (np.stack(waves, -1) + rng.integers(0, 30, (height, width, 3))).astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray(noisy[..., 0].astype(np.uint16) * 257)
    return Image.fromarray(noisy).convert(mode)


#: what people's photographs come as; 16 bits are brought to eight first, for Pillow makes white of all above 255
IMAGES: dict[str, Callable[[], Image.Image]] = {
    "wide": photo,
    "high": lambda: photo(200, 300),
    "odd": lambda: photo(333, 251),
    "odd-high": lambda: photo(257, 341),
    "one-pixel": lambda: photo(1, 1),
    "tiny": lambda: photo(7, 5),
    "long": lambda: photo(901, 9),
    "tall": lambda: photo(9, 901),
    **{
        mode: lambda mode=mode: photo(301, 199, mode) for mode in ("L", "LA", "1", "P", "RGBA", "CMYK", "YCbCr", "I;16")
    },
}

PROCESSORS = {
    "vit": lambda: tr.ViTImageProcessor(size={"height": 32, "width": 32}),
    "vit-not-square": lambda: tr.ViTImageProcessor(size={"height": 32, "width": 48}),
    "vit-lanczos": lambda: tr.ViTImageProcessor(size={"height": 32, "width": 32}, resample=1),
    "vit-not-normalised": lambda: tr.ViTImageProcessor(size={"height": 32, "width": 32}, do_normalize=False),
    "vit-0-to-255": lambda: tr.ViTImageProcessor(size={"height": 32, "width": 32}, do_rescale=False),
    "vit-other-scale": lambda: tr.ViTImageProcessor(size={"height": 32, "width": 32}, rescale_factor=1 / 127.5),
    "deit-squashed-and-cropped": lambda: tr.DeiTImageProcessor(
        size={"height": 36, "width": 36}, crop_size={"height": 32, "width": 32}
    ),
    "dinov2-256-224": lambda: tr.BitImageProcessor(
        size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, resample=3
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
    "efficientnet": lambda: tr.EfficientNetImageProcessor(size={"height": 32, "width": 32}),
}


def saved(folder: Path, processor: Any = None, **changes: object) -> nn.Module:
    """A tiny model as it comes from a folder, with this image processor beside it."""
    hf_model(**changes).save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return tr.ViTForImageClassification.from_pretrained(folder).eval()


# ------------------------------------------------------------------------------------------------ as image processors


@pytest.mark.parametrize("name", PROCESSORS)
def test_images_come_out_as_from_the_models_own_image_processor(name: str, tmp_path) -> None:
    processor = PROCESSORS[name]()
    height, width = processor(photo(), return_tensors="pt")["pixel_values"].shape[2:]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        transform = preprocessing_of(saved(tmp_path, processor, image_size=(height, width), patch_size=4))
    assert transform.shape == (3, height, width)
    again = tr.AutoImageProcessor.from_pretrained(tmp_path)
    for kind, image in IMAGES.items():
        expected = again(load_image(eight_bits(image())), return_tensors="pt")["pixel_values"][0]
        assert torch.equal(transform(image()), expected), kind


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK"])
def test_a_pipeline_sees_the_same_pixels(mode: str, tmp_path) -> None:
    """Not only the processor: all that transformers does to an image on its way in."""
    model = saved(tmp_path, PROCESSORS["deit-squashed-and-cropped"]())
    pipe = tr.pipeline(
        "image-classification", model=model, image_processor=tr.AutoImageProcessor.from_pretrained(tmp_path)
    )
    image = photo(333, 251, mode)
    assert torch.equal(preprocessing_of(model)(image), pipe.preprocess(image)["pixel_values"][0])


def test_a_photograph_is_turned_as_its_camera_noted() -> None:
    image = photo(40, 20)
    image.getexif()[0x0112] = 6
    processor = PROCESSORS["vit"]()
    model = hf_model()
    model.__dict__["ltm_preprocessing"] = processor
    assert torch.equal(
        preprocessing_of(model)(image), processor(load_image(image), return_tensors="pt")["pixel_values"][0]
    )


@pytest.mark.parametrize("name", ["dinov2-256-224", "vit", "clip", "levit", "mobilevit-blue-first"])
@pytest.mark.parametrize("size", [(32, 32), (24, 40), (40, 24)], ids=str)
def test_at_another_size_the_processor_is_called_with_its_sizes_scaled(
    name: str, size: tuple[int, int], tmp_path
) -> None:
    transform = preprocessing_of(saved(tmp_path, PROCESSORS[name](), image_size=size, patch_size=4))
    for image in (photo(), photo(200, 300), photo(901, 9)):
        assert transform(image).shape == (3, *size)
    if name == "dinov2-256-224" and size == (32, 32):
        options = {"size": {"shortest_edge": 37}, "crop_size": {"height": 32, "width": 32}}
        expected = PROCESSORS[name]()(photo(), return_tensors="pt", **options)["pixel_values"][0]
        assert torch.equal(transform(photo()), expected)


def test_a_model_of_one_channel_gets_its_processors_average(tmp_path) -> None:
    processor = tr.ViTImageProcessor(
        image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], size={"height": 32, "width": 32}
    )
    transform = preprocessing_of(saved(tmp_path, processor, num_channels=1))
    pixels = transform(Image.new("RGB", (40, 30), (255, 255, 255)))
    torch.testing.assert_close(pixels, torch.full((1, 32, 32), (1 - 0.2) / 0.5))


def test_hf_without_an_image_processor_gets_one_half() -> None:
    for channels in (3, 1):
        transform = preprocessing_of(hf_model(num_channels=channels))
        white, black = (transform(Image.new("RGB", (40, 30), (value,) * 3)) for value in (255, 0))
        assert torch.equal(white, torch.ones(channels, 32, 32)) and torch.equal(black, -white)


class Spotted(tr.ViTImageProcessor):
    """Blackens a part of what it resizes."""

    def preprocess(self, *args: object, **kwargs: object) -> object:
        found = super().preprocess(*args, **kwargs)
        found["pixel_values"][..., :8, :8] = -1.0
        return found


def beside(monkeypatch: pytest.MonkeyPatch, processor: Any) -> None:
    monkeypatch.setattr(tr.AutoImageProcessor, "from_pretrained", lambda *args, **kwargs: processor)


def test_an_image_processor_that_does_more_is_called_all_the_same(monkeypatch, tmp_path) -> None:
    beside(monkeypatch, spotted := Spotted(size={"height": 32, "width": 32}))
    assert torch.equal(
        preprocessing_of(saved(tmp_path))(photo()), spotted(photo(), return_tensors="pt")["pixel_values"][0]
    )


@pytest.mark.parametrize(
    "processor", [tr.DetrImageProcessor(), tr.Siglip2ImageProcessor()], ids=lambda processor: type(processor).__name__
)
def test_an_image_processor_of_several_sizes_is_refused_by_name(processor, monkeypatch, tmp_path) -> None:
    beside(monkeypatch, processor)
    named = type(processor).__name__
    with pytest.raises(DataError, match=rf"{named}, .* images of several sizes, or none, .* 32×32: pass loaders"):
        preprocessing_of(saved(tmp_path))


@pytest.mark.parametrize(
    "changes", [{"crop_size": None, "do_center_crop": True}, {"image_mean": "grey"}, {"resample": "no filter"}], ids=str
)
def test_an_image_processor_of_odd_values_is_refused_by_name(changes, monkeypatch, tmp_path) -> None:
    processor = PROCESSORS["dinov2-256-224"]()
    for name, value in changes.items():
        setattr(processor, name, value)
    beside(monkeypatch, processor)
    with pytest.raises(DataError, match=f"{type(processor).__name__}, the model's image processor, makes"):
        preprocessing_of(saved(tmp_path))


def test_a_loaded_model_without_an_image_processor_warns(tmp_path) -> None:
    model = saved(tmp_path)
    with pytest.warns(UserWarning, match=f"no image processor found for {re.escape(str(tmp_path))}.*0.5"):
        assert preprocessing_of(model)(Image.new("RGB", (9, 9))).mean() == -1


def test_a_model_of_the_hub_has_the_processor_of_its_own_revision_in_the_cache(monkeypatch) -> None:
    model = hf_model()
    model.config._name_or_path, model.config._commit_hash = "somebody/model", "abc"
    asked = []

    def answer(name: str, **options: object) -> object:
        asked.append((name, options))
        return PROCESSORS["vit"]()

    monkeypatch.setattr(tr.AutoImageProcessor, "from_pretrained", answer)
    preprocessing_of(model)
    expected = {"trust_remote_code": False, "local_files_only": True, "revision": "abc"}
    assert set(map(repr, asked)) == {repr(("somebody/model", expected))}


def test_a_model_of_the_hub_whose_processor_is_not_in_the_cache_says_how_to_fetch_it() -> None:
    model = hf_model()
    model.config._name_or_path = "somebody/model"
    with pytest.raises(
        DataError, match=r"call transformers.AutoImageProcessor.from_pretrained\('somebody/model'\) once"
    ):
        preprocessing_of(model)


def test_no_code_of_a_folder_is_asked_for_or_run(tmp_path, monkeypatch) -> None:
    hf_model().save_pretrained(tmp_path)
    (tmp_path / "mine.py").write_text("raise SystemExit('code of the folder ran')")
    said = {"auto_map": {"AutoImageProcessor": "mine.Mine"}, "image_processor_type": "Mine"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    with pytest.warns(UserWarning, match="no image processor found"):
        preprocessing_of(tr.ViTForImageClassification.from_pretrained(tmp_path))


# ------------------------------------------------------------------------------------------------------------ as timm


@pytest.mark.parametrize("size", [(32, 32), (32, 48), (48, 32)], ids=str)
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_timms_own_transform_is_called(interpolation: str, crop_mode: str, size: tuple[int, int]) -> None:
    said = {"interpolation": interpolation, "crop_pct": 0.9, "crop_mode": crop_mode, "mean": (0.2, 0.5, 0.7)}
    model = timm_model(size, **said)
    settings = timm.data.resolve_model_data_config(model, {"input_size": (3, *size)})
    expected, transform = timm.data.create_transform(**settings), preprocessing_of(model)
    assert transform.shape == (3, *size)
    for kind, image in IMAGES.items():
        try:
            theirs = expected(eight_bits(image()).convert("RGB"))
        except ValueError as error:  # a long one, of which timm's "border" leaves a side of nothing
            assert crop_mode == "border" and kind in ("long", "tall"), error
            continue
        assert torch.equal(transform(image()), theirs), kind


def test_timm_says_its_normalisation_and_the_live_model_its_size() -> None:
    arguments = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
    model = timm.create_model("vit_base_patch16_clip_224", **arguments)
    declared = model.pretrained_cfg
    assert tuple(declared["input_size"]) == (3, 224, 224), "otherwise this test says nothing"
    mean, std = (torch.tensor(declared[name]).view(3, 1, 1) for name in ("mean", "std"))
    white = preprocessing_of(model)(Image.new("RGB", (100, 60), (255,) * 3))
    torch.testing.assert_close(white, ((1 - mean) / std).expand(3, 32, 48))


def test_transformers_wrapper_of_timm_has_the_checkpoints_settings() -> None:
    said = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "crop_pct": 0.9}
    config = tr.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224",
        model_args={"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2},
        pretrained_cfg=said,
    )
    expected = preprocessing_of(timm_model(**said))
    assert torch.equal(preprocessing_of(tr.TimmWrapperForImageClassification(config))(photo()), expected(photo()))


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_a_timm_model_of_one_channel_gets_grey_images(crop_mode: str) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, in_chans=1)
    model.pretrained_cfg = {**model.pretrained_cfg, "crop_mode": crop_mode, "mean": (0.1, 0.2, 0.3), "std": (0.5,) * 3}
    pixels = preprocessing_of(model)(Image.new("RGB", (40, 40), (255,) * 3))
    torch.testing.assert_close(pixels, torch.full((1, 32, 32), (1 - 0.2) / 0.5))


def test_an_interpolation_that_nobody_knows_is_refused() -> None:
    with pytest.raises(DataError, match=r"timm's transform cannot be made .*odd.* Mend its pretrained_cfg"):
        preprocessing_of(timm_model(interpolation="odd"))


# ------------------------------------------------------------------------------------------------------- any of the two


def test_a_model_that_says_nothing_is_asked_for_a_loader() -> None:
    with pytest.raises(DataError, match=r"Linear does not say its input size.*pass a loader"):
        preprocessing_of(nn.Linear(3, 3))


def test_a_model_of_four_channels_is_asked_for_a_loader() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, in_chans=4)
    with pytest.raises(DataError, match="wants 4 channels, and images have three or one: pass a loader"):
        preprocessing_of(model)


def test_sixteen_bits_are_not_cut_off_at_eight() -> None:
    grey = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    pixels = plain((3, 32, 32))(Image.fromarray(grey))[0]
    assert torch.allclose(pixels / 2 + 0.5, torch.from_numpy(grey / 65535).float(), atol=1 / 255)


@pytest.mark.parametrize("build", [timm_model, hf_model, None], ids=["timm", "hf", "image-processor"])
def test_a_loaders_worker_can_be_sent_it(build: Callable[[], nn.Module] | None, tmp_path) -> None:
    transform = make_transform(preprocessing_of(build() if build else saved(tmp_path, PROCESSORS["clip"]())))
    assert torch.equal(pickle.loads(pickle.dumps(transform))(photo()), transform(photo()))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_an_array_and_a_tensor_are_images(mode: str) -> None:
    transform, image = plain((3, 32, 32)), photo(mode=mode)
    array = np.array(image) if mode != "L" else np.array(image)[..., None]
    assert torch.equal(transform(array), transform(image))
    assert torch.equal(transform(torch.from_numpy(array).movedim(-1, 0)), transform(image))


def test_an_array_of_other_numbers_is_refused() -> None:
    with pytest.raises(DataError, match=r"array of float32, .* 8 bits a channel: give uint8"):
        plain((3, 32, 32))(torch.rand(3, 32, 32))


def test_crop_shifts_by_up_to_a_sixteenth_and_pads_with_black() -> None:
    array = np.zeros((32, 32, 3), np.uint8)
    array[16, 16] = 255
    transform = make_transform(preprocessing_of(timm_model(crop_pct=1.0, mean=(0.1, 0.2, 0.3))), "crop")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cropped = [transform(Image.fromarray(array)) for _ in range(200)]
    assert {tuple((one[0] > 0).nonzero()[0].tolist()) for one in cropped} == {
        (row, column) for row in range(14, 19) for column in range(14, 19)
    }
    assert all(len(one[1].unique()) == 2 for one in cropped), "the padding is as black as the picture"


def test_the_dtype_is_the_models() -> None:
    assert make_transform(plain((3, 8, 8)), dtype=torch.bfloat16)(photo()).dtype == torch.bfloat16


class Parts(nn.Module):
    """A network of several."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def black(model: nn.Module) -> list[float]:
    return preprocessing_of(model)(Image.new("RGB", (9, 9)))[:, 0, 0].tolist()


def test_parts_that_want_other_images_are_named() -> None:
    teacher, student = timm_model(mean=(0.1, 0.2, 0.3)), timm_model(mean=(0.4, 0.5, 0.6))
    with pytest.raises(DataError, match=r"parts of Parts want their images differently \(teacher, student\)"):
        preprocessing_of(Parts(teacher=teacher, student=student))
    assert black(Parts(a=student, b=timm_model(mean=(0.4, 0.5, 0.6)))) == black(student)


def test_a_part_that_reads_text_says_nothing_of_images(monkeypatch) -> None:
    text = tr.BertModel(tr.BertConfig(hidden_size=24, num_attention_heads=2, num_hidden_layers=1, vocab_size=9))
    text.config._name_or_path = "somebody/text"
    monkeypatch.setattr(tr.AutoImageProcessor, "from_pretrained", lambda *args, **kwargs: pytest.fail("asked for it"))
    vision = timm_model(mean=(0.1, 0.2, 0.3))
    assert black(Parts(text=text, vision=vision)) == black(vision)


def test_a_network_around_a_pretrained_one_wants_what_that_wants(tmp_path) -> None:
    inner = timm_model(mean=(0.1, 0.2, 0.3))
    assert black(Own(inner)) == black(inner)
    loaded = saved(tmp_path, tr.ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], size={"height": 32, "width": 32}))
    assert black(Own(loaded)) == black(loaded) != black(hf_model())


def test_pictures_of_a_model_that_reads_blue_first_keep_their_colours(tmp_path) -> None:
    model = saved(tmp_path, PROCESSORS["mobilevit-blue-first"](), num_hidden_layers=4)
    ltm.retrofit(model, ltm.LTMConfig(flops=0.8))
    figure = show_merges(model, Image.new("RGB", (32, 32), (255, 0, 0)))
    shown = np.asarray(figure.axes[0].images[0].get_array())
    assert shown[16, 16].tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("name", "seen"), [("vit", (1, 1)), ("dinov2-256-224", (224 / 256, 224 / 384)), ("clip", (1, 32 / 48))]
)
def test_how_much_of_a_photograph_is_seen_is_measured_on_the_host(name: str, seen: tuple, tmp_path) -> None:
    size = 224 if "224" in name else 32
    wanted = preprocessing_of(saved(tmp_path, PROCESSORS[name](), image_size=size, patch_size=size // 8))
    assert wanted.seen(photo()) == pytest.approx(seen, abs=0.02)
    upright = photo().transpose(Image.Transpose.ROTATE_90)  # as a camera stores it that was held the other way
    upright.getexif()[0x0112] = 6
    assert upright.size == (200, 300) and wanted.seen(upright) == pytest.approx(seen, abs=0.02)


# -------------------------------------------------------------------------------------------------- the saved folder


@pytest.mark.parametrize("name", ["dinov2-256-224", "mobilevit-blue-first", "vit-0-to-255", "levit", "vit-not-square"])
def test_the_image_processor_travels_with_the_folder(name: str, tmp_path) -> None:
    processor = PROCESSORS[name]()
    height, width = processor(photo(), return_tensors="pt")["pixel_values"].shape[2:]
    patch = 16 if height > 48 else 4
    model = saved(tmp_path / "host", processor, image_size=(height, width), patch_size=patch, num_hidden_layers=4)
    ltm.save_pretrained(ltm.retrofit(model, ltm.LTMConfig(flops=0.8)), tmp_path / "saved")
    assert (tmp_path / "saved" / "preprocessor_config.json").is_file()
    assert "preprocessor_config.json" in json.loads((tmp_path / "saved" / "config.json").read_text())["files"]
    again = ltm.from_pretrained(tmp_path / "saved")
    ltm.save_pretrained(again, tmp_path / "again")
    for loaded in (again, ltm.from_pretrained(tmp_path / "again")):
        assert torch.equal(preprocessing_of(loaded)(photo(333, 251)), preprocessing_of(model)(photo(333, 251)))


def test_a_folder_with_an_image_processor_can_be_replaced(tmp_path) -> None:
    model = saved(tmp_path / "host", PROCESSORS["vit"](), num_hidden_layers=4)
    ltm.retrofit(model, ltm.LTMConfig(flops=0.8))
    for _ in range(2):
        ltm.save_pretrained(model, tmp_path / "saved", overwrite=True)


def test_timms_settings_travel_with_the_folder(tmp_path) -> None:
    tiny = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", **tiny).eval()
    model.pretrained_cfg.update(mean=(0.1, 0.2, 0.3), crop_pct=0.7, interpolation="bilinear")
    ltm.save_pretrained(ltm.retrofit(model, ltm.LTMConfig(flops=0.8)), tmp_path)
    assert torch.equal(preprocessing_of(ltm.from_pretrained(tmp_path))(photo()), preprocessing_of(model)(photo()))


def test_what_is_refused_is_refused_after_saving_and_loading(monkeypatch, tmp_path) -> None:
    model = saved(tmp_path / "host", tr.DetrImageProcessor(), num_hidden_layers=4)
    ltm.save_pretrained(ltm.retrofit(model, ltm.LTMConfig(flops=0.9)), tmp_path / "saved")
    with pytest.raises(DataError, match=r"DetrImageProcessor.*pass loaders"):
        preprocessing_of(ltm.from_pretrained(tmp_path / "saved"))


@pytest.mark.parametrize("blue_first", [False, True])
def test_settings_in_a_folder_of_before_are_followed(blue_first: bool, tmp_path) -> None:
    ltm.save_pretrained(ltm.retrofit(hf_model(num_hidden_layers=4).eval(), ltm.LTMConfig(flops=0.8)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    said = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bicubic", "crop_pct": 0.875}
    config["base"]["data"] = {**said, "crop_mode": "center", "reverse": blue_first}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ltm.save_pretrained(ltm.from_pretrained(tmp_path), tmp_path / "again")
    red = preprocessing_of(ltm.from_pretrained(tmp_path / "again"))(Image.new("RGB", (9, 9), (255, 0, 0)))[:, 0, 0]
    raw = torch.tensor([0.0, 0.0, 1.0] if blue_first else [1.0, 0.0, 0.0])
    torch.testing.assert_close(red, (raw - torch.tensor(said["mean"])) / torch.tensor(said["std"]))


def test_what_a_folder_of_before_refused_is_refused(tmp_path) -> None:
    ltm.save_pretrained(ltm.retrofit(hf_model(num_hidden_layers=4).eval(), ltm.LTMConfig(flops=0.8)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["base"]["data"] = {"refused": "it did more"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="it did more"):
        preprocessing_of(ltm.from_pretrained(tmp_path))


def test_what_a_backbone_came_with_is_saved_with_the_model_around_it(tmp_path) -> None:
    saved(tmp_path, tr.ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], size={"height": 32, "width": 32}))
    swin = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4}
    backbone = tr.SwinConfig(**swin, out_features=[f"stage{stage}" for stage in range(1, 5)])
    model = tr.UperNetForSemanticSegmentation(tr.UperNetConfig(backbone_config=backbone, hidden_size=8))
    model.backbone.config._name_or_path = str(tmp_path)
    assert black(model) == pytest.approx([-0.2, -0.4, -0.6])
