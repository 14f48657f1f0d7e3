"""The architectures of the coverage matrix: how each is built without weights, and an example it runs on.

timm: the 704 architectures in which attention was seen (``timm_attention.json``). Hugging Face: the 29 of the 42 image
classification types that contain attention, and further towers and encoders. torchvision: two.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Example = Tensor | dict[str, Tensor]
TIMM = json.loads(Path(__file__).with_name("timm_attention.json").read_text())
#: the other 13 of transformers' 42 image classification types are convolutional, pooling or modulation networks
WITHOUT_ATTENTION = frozenset(
    "bit convnext convnextv2 efficientnet focalnet hgnet_v2 mobilenet_v1 mobilenet_v2 poolformer pp_lcnet regnet "
    "resnet textnet".split()
)
GROUPS = {
    "timm": "timm architectures with attention",
    "classifiers": "Hugging Face image classification types with attention",
    "towers": "further vision towers and encoders",
}


@dataclass(frozen=True)
class Row:
    """One architecture at its native size. ``note`` says what was chosen where the default would not do."""

    name: str
    group: str
    library: str
    family: str
    kinds: tuple[str, ...]
    make: Callable[[], nn.Module]
    sample: Callable[[nn.Module], Example]
    note: str = ""

    def build(self) -> nn.Module:
        """Build with parameters on the meta device and buffers real: no memory, no weights, no download."""
        from accelerate import init_empty_weights

        try:
            with init_empty_weights(include_buffers=False):
                model = self.make().eval()
            if not any(buffer.is_meta for buffer in model.buffers()):
                return model
        except RuntimeError as error:
            if "meta" not in str(error):
                raise
        # Swin and mixed RoPE compute buffers on their parameters' device, hybrids run their stem to see its size: build
        # normally, then drop the numbers
        with _Unfilled():
            return _drop_numbers(self.make().eval())

    def example(self, model: nn.Module) -> Example:
        """Make one image, or what else the model takes, of fixed noise."""
        return self.sample(model)

    def facts(self) -> dict[str, Any]:
        """Return what is known before anything is built."""
        static = {"name": self.name, "group": self.group, "library": self.library, "family": self.family}
        return {**static, "kinds": list(self.kinds), "note": self.note}


class _Unfilled(TorchDispatchMode):
    """Skip what fills large parameters: what is never written takes no memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.endswith("_") and isinstance(args[0], nn.Parameter) and args[0].numel() > 100_000:
            return args[0]
        return func(*args, **(kwargs or {}))


def _drop_numbers(model: nn.Module) -> nn.Module:
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
                module._parameters[name] = moved.setdefault(id(parameter), empty)
    return model


def noise(*shape: int) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))


def zoo() -> dict[str, Row]:
    """Return every row by name, in a fixed order."""
    rows = [*_timm(), *_classifiers(), *_towers()]
    found = {row.name: row for row in rows}
    assert len(found) == len(rows)
    return found


def crude_cost(row: Row) -> float:
    """Order rows where nothing was measured: by what their names say of width, by depth and by input size."""
    words = ("pico atto femto nano xxs xxtiny tiny xs xsmall small s medium base b so400m large l huge giant g 1b 3b "
             "gigantic 7b").split()  # fmt: skip
    width = max((words.index(word) for word in re.split(r"[_/.]", row.name.lower()) if word in words), default=10)
    size = max((int(number) for number in re.findall(r"(?<=_)\d{3,4}\b", row.name)), default=224)
    depth = sum(TIMM.get(row.name, {}).get("attention", {}).values()) or 12
    return float(depth * 1.5**width * size * size)


# ------------------------------------------------------------------------------------------------------------- timm


def _timm() -> list[Row]:
    def make(name: str) -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False)

    return [
        Row(name, "timm", "timm", facts["family"], tuple(facts["attention"]), partial(make, name), _timm_example)
        for name, facts in sorted(TIMM.items())
    ]


def _timm_example(model: nn.Module) -> Tensor:
    declared = model.pretrained_cfg
    assert isinstance(declared, Mapping)
    return noise(*(declared.get("input_size") or declared["test_input_size"]))


# ----------------------------------------------------------------------------------------------------- transformers


def _hf(class_name: str, config: Callable[[], Any] | None = None, **settings: Any) -> nn.Module:
    transformers = importlib.import_module("transformers")
    cls = getattr(transformers, class_name)
    return cls((config or cls.config_class)(**settings))


def _image(model: nn.Module, size: tuple[int, ...] = (), name: str = "pixel_values") -> dict[str, Tensor]:
    config = getattr(model.config, "vision_config", model.config)
    declared = getattr(config, "image_size", None) or 224
    square = (declared, declared) if isinstance(declared, int) else tuple(declared)
    return {name: noise(getattr(config, "num_channels", 3), *(size or square))}


def _ids(model: nn.Module) -> dict[str, Tensor]:
    count, vocabulary = model.config.n_positions, model.config.vocab_size
    return {"input_ids": torch.randint(vocabulary, (1, count), generator=torch.Generator().manual_seed(0))}


def _prompt(model: nn.Module) -> dict[str, Tensor]:
    """An image's placeholders and 64 words."""
    image = torch.full((model.config.mm_tokens_per_image,), model.config.image_token_index)
    ids = torch.cat([image, torch.arange(1000, 1064)])[None]
    return {**_image(model), "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _patches(model: nn.Module) -> dict[str, Tensor]:
    """What SigLIP2 takes: the patches of a square image, all of them valid."""
    config = getattr(model.config, "vision_config", model.config)
    count, side = config.num_patches, round(config.num_patches**0.5)
    return {
        "pixel_values": noise(count, config.num_channels * config.patch_size**2),
        "pixel_attention_mask": torch.ones(1, count, dtype=torch.long),
        "spatial_shapes": torch.tensor([[side, side]]),
    }


def _masked(model: nn.Module) -> dict[str, Tensor]:
    """What ViTMAE takes, its random order of patches held fixed."""
    config = model.config
    return {**_image(model), "noise": noise((config.image_size // config.patch_size) ** 2)}


def _shieldgemma() -> Any:
    # The default configuration cannot run (its 14 × 14 patches do not pool to 256 tokens): this is the published one.
    from transformers import ShieldGemma2Config

    vision = dict(image_size=896, patch_size=14, hidden_size=1152, intermediate_size=4304)
    text = dict(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34, sliding_window=1024)
    return ShieldGemma2Config(
        vision_config={**vision, "num_hidden_layers": 27, "num_attention_heads": 16}, text_config=text
    )


def _timm_wrapped(**settings: Any) -> Any:
    from transformers import TimmWrapperConfig

    return TimmWrapperConfig(architecture="vit_base_patch16_224", **settings)


Sample = Callable[[nn.Module], Example]
#: model type → (kinds, example, configuration where not the default, note)
CLASSIFIERS: dict[str, tuple[str, Sample, Callable[..., Any] | None, str]] = {
    "beit": ("global", _image, None, ""),
    "clip": ("global", _image, None, ""),
    "cvt": ("global-downsampled-qkv", _image, None, ""),
    "data2vec-vision": ("global", _image, None, ""),
    "deit": ("global", _image, None, ""),
    "dinat": ("neighbourhood", _image, None, "needs natten, which is not installed; moreover transformers 5.23 "
              "hands it (B, W, H, heads, d) where it expects (B, heads, H, W, d)"),
    "dinov2": ("global", _image, None, ""),
    "dinov2_with_registers": ("global", _image, None, ""),
    "donut-swin": ("window", _image, None, ""),
    "hiera": ("window global", _image, None, ""),
    "ijepa": ("global", _image, None, ""),
    "imagegpt": ("causal", _ids, None, "takes 1024 colour ids"),
    "levit": ("global", _image, None, ""),
    "metaclip_2": ("global", _image, None, ""),
    "mobilevit": ("global", _image, None, ""),
    "mobilevitv2": ("linear", _image, None, ""),
    "perceiver": ("latent", partial(_image, name="inputs"), None, ""),
    "pvt": ("pooled-kv", _image, None, ""),
    "pvt_v2": ("pooled-kv", _image, None, ""),
    "segformer": ("pooled-kv", _image, None, ""),
    "shieldgemma2": ("global causal", _prompt, _shieldgemma, "shieldgemma-2-4b-it's configuration"),
    "siglip": ("global latent-pool-head", _image, None, ""),
    "siglip2": ("global latent-pool-head", _patches, None, "256 patches"),
    "swiftformer": ("linear", _image, None, ""),
    "swin": ("window", _image, None, ""),
    "swinv2": ("window", _image, None, ""),
    "timm_wrapper": ("global", _image, _timm_wrapped, "around vit_base_patch16_224; its default is a ResNet"),
    "vit": ("global", _image, None, ""),
    "vit_msn": ("global", _image, None, ""),
}  # fmt: skip


def _classifiers() -> list[Row]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as NAMES

    assert set(NAMES) - WITHOUT_ATTENTION == set(CLASSIFIERS), "transformers knows other types: sort them in"
    rows = []
    for kind, (kinds, sample, config, note) in CLASSIFIERS.items():
        cls = NAMES[kind] if isinstance(NAMES[kind], str) else NAMES[kind][0]
        labels = {} if kind == "shieldgemma2" else {"num_labels": 1000}
        make = partial(_hf, cls, config, **labels)
        rows.append(Row(f"hf/{cls}", "classifiers", "transformers", kind, tuple(kinds.split()), make, sample, note))
    return rows


def _detr_encoder() -> nn.Module:
    from transformers import DetrConfig
    from transformers.models.detr.modeling_detr import DetrEncoder

    return DetrEncoder(DetrConfig(use_timm_backbone=False, backbone_config={"model_type": "resnet"}))


def _map_tokens(_: nn.Module) -> Example:
    """What the backbone makes of an image of 800 × 1088: 25 × 34 places of width 256, and where they are."""
    return {"inputs_embeds": noise(850, 256), "spatial_position_embeddings": noise(850, 256)}


def _towers() -> list[Row]:
    def hf(cls: str, family: str, kinds: str, sample: Sample = _image, note: str = "", **settings: Any) -> Row:
        make = partial(_hf, cls, **settings)
        return Row(f"hf/{cls}", "towers", "transformers", family, tuple(kinds.split()), make, sample, note)

    def tv(name: str, kind: str) -> Row:
        def make() -> nn.Module:
            return getattr(importlib.import_module("torchvision.models"), name)(weights=None)

        return Row(f"torchvision/{name}", "towers", "torchvision", name, (kind,), make, lambda _: noise(3, 224, 224))

    coco, ade = partial(_image, size=(800, 1066)), partial(_image, size=(512, 512))
    resnet = {"model_type": "resnet", "out_features": ["stage4"]}
    pose = {"model_type": "vitpose_backbone", "out_indices": [12]}  # as in its checkpoints: by default it reads the 4th
    return [
        hf("DINOv3ViTModel", "dinov3_vit", "global"),
        hf("CLIPVisionModel", "clip", "global"),
        hf("SiglipVisionModel", "siglip", "global latent-pool-head"),
        hf("Siglip2VisionModel", "siglip2", "global latent-pool-head", _patches, "256 patches"),
        hf("Aimv2VisionModel", "aimv2", "global"),
        hf("SamVisionModel", "sam", "window global"),
        hf("DPTForDepthEstimation", "dpt", "global"),
        hf("DepthAnythingForDepthEstimation", "depth_anything", "global", partial(_image, size=(518, 518))),
        hf("SegformerForSemanticSegmentation", "segformer", "pooled-kv", ade),
        hf("YolosForObjectDetection", "yolos", "global"),
        hf("DetrModel", "detr", "global cross", coco, use_timm_backbone=False, backbone_config=resnet),
        hf("DetrForObjectDetection", "detr", "global cross", coco, "timm's resnet50 inside"),
        Row("hf/DetrEncoder", "towers", "transformers", "detr", ("global",), _detr_encoder, _map_tokens, "by itself"),
        hf("ViTMAEForPreTraining", "vit_mae", "global", _masked),
        hf("VideoMAEForVideoClassification", "videomae", "global", lambda _: {"pixel_values": noise(16, 3, 224, 224)}),
        hf("VitDetModel", "vitdet", "global"),
        hf("VitPoseForPoseEstimation", "vitpose", "global", partial(_image, size=(256, 192)), backbone_config=pose),
        tv("vit_b_16", "global"),
        tv("swin_t", "window"),
    ]
