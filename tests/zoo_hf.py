"""Hugging Face's vision models with attention, tiny, from configs alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import transformers as tr
from torch import Tensor, nn

CLASSES = 7
SIZE = {"hidden_size": 48, "num_attention_heads": 3, "image_size": 32, "patch_size": 4, "num_hidden_layers": 4}
WIDE = {**SIZE, "intermediate_size": 96}
FOUR, HEADS = [16, 32, 48, 64], [1, 2, 3, 4]
_SWIN = {"image_size": 64, "patch_size": 2, "embed_dim": 16, "depths": [1, 2, 2, 1], "num_heads": [1, 2, 4, 8]}
_SWIN = {**_SWIN, "window_size": 4}
_PVT = {"depths": [1, 1, 2, 1], "hidden_sizes": FOUR, "num_attention_heads": HEADS, "mlp_ratios": [2] * 4}
_CVT = {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 2, 3]}
_LEVIT = {"hidden_sizes": [16, 32, 48], "num_attention_heads": [1, 2, 3], "depths": [2] * 3, "key_dim": [8] * 3}
_HIERA = {"embed_dim": 16, "image_size": [64, 64], "depths": [1, 1, 2, 1], "patch_size": [3, 3]}
_HIERA = {**_HIERA, "patch_stride": [2, 2], "patch_padding": [1, 1]}
_BEIT = {"use_relative_position_bias": True, "use_absolute_position_embeddings": False}
_SHARED = {"use_shared_relative_position_bias": True, "use_absolute_position_embeddings": True}
_MOBILE = {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 48], "image_size": 128}
_MOBILE2 = {"width_multiplier": 0.25, "base_attn_unit_dims": [64, 96, 128], "n_attn_blocks": [2, 2, 1]}
_SAM = {"window_size": 4, "global_attn_indexes": [1, 3], "mlp_dim": 96, "output_channels": 16}
_DPT = {"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 16, 16, 16], "fusion_hidden_size": 16}
_TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16, "vocab_size": 20}
_TEXT = {**_TEXT, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_POSE = {"image_size": (64, 64), "patch_size": (8, 8)}
_FLORENCE = {"depths": [1, 1, 2, 1], "embed_dim": FOUR, "num_heads": HEADS, "num_groups": HEADS, "window_size": 4}


def _dense(**arguments: object) -> Callable[[], dict[str, Tensor]]:
    """Noise under ``pixel_values`` and whatever else, drawn alike at each call."""

    def example() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(3)
        noise = {k: torch.randn(*v, generator=generator) for k, v in arguments.items() if isinstance(v, tuple)}
        return {**noise, **{k: v.clone() for k, v in arguments.items() if isinstance(v, Tensor)}}

    return example


def _plain(model: str, config: str, arguments: dict) -> nn.Module:
    labels = {"num_labels": CLASSES} if "For" in model else {}
    return getattr(tr, model)(getattr(tr, config)(**labels, **arguments))


# (class of the model, of its config, side of the image or example, arguments). 128 or 256 pixels where the stride is
# fixed and the last stage would have fewer than 4 x 4 tokens otherwise.
_ROWS: dict[str, tuple[str, str, int | Callable, dict]] = {
    "vit": ("ViTForImageClassification", "ViTConfig", 32, WIDE),
    "deit": ("DeiTForImageClassification", "DeiTConfig", 32, WIDE),
    "deit-teacher": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", 32, WIDE),
    "beit": ("BeitForImageClassification", "BeitConfig", 32, {**WIDE, **_BEIT}),
    "beit-shared": ("BeitForImageClassification", "BeitConfig", 32, {**WIDE, **_SHARED}),
    "data2vec": ("Data2VecVisionForImageClassification", "Data2VecVisionConfig", 32, {**WIDE, **_BEIT}),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", 32, {**SIZE, "mlp_ratio": 2}),
    "dinov2-swiglu": ("Dinov2ForImageClassification", "Dinov2Config", 32, {**SIZE, "use_swiglu_ffn": True}),
    "dinov2-registers": (
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        32,
        {**SIZE, "mlp_ratio": 2, "num_register_tokens": 4},
    ),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", 32, {**WIDE, "num_register_tokens": 4}),
    "dinov3-gated": ("DINOv3ViTModel", "DINOv3ViTConfig", 32, {**WIDE, "use_gated_mlp": True}),
    "vit-msn": ("ViTMSNForImageClassification", "ViTMSNConfig", 32, WIDE),
    "ijepa": ("IJepaForImageClassification", "IJepaConfig", 32, WIDE),
    "vit-mae": (  # shuffles by the noise, which it draws where none is given
        "ViTMAEModel",
        "ViTMAEConfig",
        _dense(pixel_values=(1, 3, 32, 32), noise=(1, 64)),
        {**WIDE, "mask_ratio": 0.0},
    ),
    "clip": ("CLIPForImageClassification", "CLIPConfig", 32, {"vision_config": WIDE, "text_config": _TEXT}),
    "clip-vision": ("CLIPVisionModel", "CLIPVisionConfig", 32, WIDE),
    "metaclip2": ("MetaClip2VisionModel", "MetaClip2VisionConfig", 32, WIDE),
    "siglip": ("SiglipForImageClassification", "SiglipConfig", 32, {"vision_config": WIDE, "text_config": _TEXT}),
    "siglip-vision": ("SiglipVisionModel", "SiglipVisionConfig", 32, WIDE),
    "siglip2-vision": (
        "Siglip2VisionModel",
        "Siglip2VisionConfig",
        _dense(
            pixel_values=(1, 64, 48),
            pixel_attention_mask=torch.ones(1, 64, dtype=torch.int64),
            spatial_shapes=torch.tensor([[8, 8]]),
        ),
        {**WIDE, "num_patches": 64},
    ),
    "aimv2-vision": ("Aimv2VisionModel", "Aimv2VisionConfig", 32, WIDE),
    "mlcd": ("MLCDVisionModel", "MLCDVisionConfig", 32, WIDE),
    "pixio": ("PixioModel", "PixioConfig", 32, SIZE),
    "blip-vision": ("BlipVisionModel", "BlipVisionConfig", 32, WIDE),
    "internvl-vision": ("InternVLVisionModel", "InternVLVisionConfig", 32, {**WIDE, "use_qk_norm": True}),
    "vitpose": ("VitPoseBackbone", "VitPoseBackboneConfig", 64, {**SIZE, **_POSE}),
    "timm-wrapper": (
        "TimmWrapperForImageClassification",
        "TimmWrapperConfig",
        32,
        {
            "architecture": "vit_tiny_patch16_224",
            "model_args": {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3},
        },
    ),
    "swin": ("SwinForImageClassification", "SwinConfig", 64, _SWIN),
    "swinv2": ("Swinv2ForImageClassification", "Swinv2Config", 64, _SWIN),
    "donut-swin": ("DonutSwinForImageClassification", "DonutSwinConfig", 64, _SWIN),
    "segformer": ("SegformerForImageClassification", "SegformerConfig", 128, _PVT),
    "pvt": ("PvtForImageClassification", "PvtConfig", 128, {**_PVT, "image_size": 128}),
    "pvt-v2": ("PvtV2ForImageClassification", "PvtV2Config", 128, _PVT),
    "pvt-v2-linear": ("PvtV2ForImageClassification", "PvtV2Config", 128, {**_PVT, "linear_attention": True}),
    "cvt": ("CvtForImageClassification", "CvtConfig", 64, _CVT),
    "mobilevit": ("MobileViTForImageClassification", "MobileViTConfig", 128, _MOBILE),
    "mobilevitv2": ("MobileViTV2ForImageClassification", "MobileViTV2Config", 128, _MOBILE2),
    "levit": ("LevitForImageClassification", "LevitConfig", 256, {"image_size": 256, **_LEVIT}),
    "levit-teacher": ("LevitForImageClassificationWithTeacher", "LevitConfig", 256, {"image_size": 256, **_LEVIT}),
    "hiera": ("HieraForImageClassification", "HieraConfig", 64, _HIERA),
    "swiftformer": (
        "SwiftFormerForImageClassification",
        "SwiftFormerConfig",
        128,
        {"depths": [1, 1, 2, 2], "embed_dims": FOUR, "mlp_ratio": 2},
    ),
    "imagegpt": (  # causal, on colour clusters
        "ImageGPTForImageClassification",
        "ImageGPTConfig",
        _dense(input_ids=torch.arange(64).remainder(17)[None]),
        {"vocab_size": 17, "n_positions": 64, "n_embd": 48, "n_layer": 4, "n_head": 3},
    ),
    "perceiver": (  # cross-attention to latents
        "PerceiverForImageClassificationConvProcessing",
        "PerceiverConfig",
        64,
        {
            "num_latents": 16,
            "d_latents": 64,
            "num_self_attends_per_block": 3,
            "num_cross_attention_heads": 1,
            "image_size": 64,
        },
    ),
    "florence2-vision": ("Florence2VisionBackbone", "Florence2VisionConfig", 128, _FLORENCE),
    "sam-vision": ("SamVisionModel", "SamVisionConfig", 32, {**SIZE, **_SAM}),
    "vitdet": (
        "VitDetModel",
        "VitDetConfig",
        32,
        {**SIZE, "window_block_indices": [0, 2], "window_size": 4, "use_relative_position_embeddings": True},
    ),
    "dpt": ("DPTForDepthEstimation", "DPTConfig", 32, {**WIDE, **_DPT}),
    "dpt-segmentation": ("DPTForSemanticSegmentation", "DPTConfig", 32, {**WIDE, **_DPT}),
    "yolos": (
        "YolosForObjectDetection",
        "YolosConfig",
        32,
        {**WIDE, "image_size": [32, 32], "num_detection_tokens": 5},
    ),
    "segformer-segmentation": (
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        128,
        {**_PVT, "decoder_hidden_size": 32},
    ),
}


def _depth_anything() -> nn.Module:
    backbone = tr.Dinov2Config(**SIZE, mlp_ratio=2, out_indices=[1, 2, 3, 4], reshape_hidden_states=False)
    config = tr.DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=4,
        reassemble_hidden_size=48,
        neck_hidden_sizes=[8, 16, 16, 16],
        fusion_hidden_size=16,
        head_hidden_size=8,
        depth_estimation_type="metric",  # the other ends in a ReLU, and all may be 0
    )
    return tr.DepthAnythingForDepthEstimation(config)


def _detr() -> nn.Module:
    backbone = tr.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 32], depths=[1, 1, 1], layer_type="basic", out_features=["stage3"]
    )
    config = tr.DetrConfig(
        use_timm_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=48,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=3,
        decoder_attention_heads=3,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        num_queries=5,
        num_labels=CLASSES,
    )
    return tr.DetrForObjectDetection(config)


HF: dict[str, tuple[Callable[[], nn.Module], int | Callable[[], dict[str, Tensor]]]] = {
    **{f"hf-{n}": (partial(_plain, model, config, changes), x) for n, (model, config, x, changes) in _ROWS.items()},
    "hf-depth-anything": (_depth_anything, 32),
    "hf-detr": (_detr, 128),
}
