"""timm's attention blocks, tiny: one row for each distinct block structure."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import timm
from timm.models import byobnet, gcvit, metaformer, mobilenetv3, mobilenetv5, mobilevit, mvitv2, nest, vitamin, volo
from timm.models._efficientnet_builder import decode_arch_def
from torch import nn

CLASSES = 7
VIT = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3}
FLEX = {key: value for key, value in VIT.items() if key != "img_size"} | {"pos_embed_grid_size": (8, 8)}
FOUR = (16, 32, 48, 64)  # widths of four stages
HEADS = (1, 2, 3, 4)


def _named(name: str, **changes: object) -> partial[nn.Module]:
    return partial(timm.create_model, name, num_classes=CLASSES, **changes)


# Arguments on top of VIT; 32 pixels unless `img_size` says otherwise.
_COLUMNS = {
    "vit": ("vit_tiny_patch16_224", {}),
    "vit-qknorm-avg": ("vit_tiny_patch16_224", {"qk_norm": True, "qkv_bias": False, "global_pool": "avg"}),
    "vit-dinov2-reg": ("vit_small_patch14_reg4_dinov2", {}),
    "vit-swiglu-packed": ("vit_giant_patch14_dinov2", {}),
    "vit-aimv2": ("aimv2_large_patch14_224", {}),
    "vit-clip-prenorm": ("vit_base_patch16_clip_224", {}),
    "vit-siglip-map": ("vit_base_patch16_siglip_224", {}),
    "vit-so150m": ("vit_so150m_patch16_reg4_gap_256", {}),
    "vit-beit3": ("beit3_base_patch16_224", {}),
    "vit-respost": ("vit_base_patch16_rpn_224", {}),
    "vit-parallel-scaling": ("vit_base_patch16_xp_224", {}),
    "vit-parallel-things": ("vit_small_patch16_18x2_224", {}),
    "vit-diff": ("vit_dwee_patch16_reg1_gap_256", {}),
    "vit-diff-parallel": ("vit_dpwee_patch16_reg1_gap_256", {}),
    "deit-distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {}),
    "beit": ("beit_base_patch16_224", {}),
    "beit-shared-bias": ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
    "eva": ("eva_giant_patch14_224", {}),
    "eva-postnorm": ("eva02_enormous_patch14_clip_224", {}),
    "eva02": ("eva02_tiny_patch14_224", {"ref_feat_shape": (8, 8)}),
    "eva02-clip": ("eva02_base_patch16_clip_224", {"ref_feat_shape": (8, 8)}),
    "eva-rope-mixed": ("vit_small_patch16_rope_mixed_224", {}),
    "eva-rope-axial": ("vit_small_patch16_rope_224", {}),
    "eva-dinov3": ("vit_small_patch16_dinov3", {}),
    "eva-dinov3-qkvb-swiglu": ("vit_small_plus_patch16_dinov3_qkvb", {}),
    "eva-pe-core": ("vit_pe_core_tiny_patch16_384", {"ref_feat_shape": (8, 8), "attn_pool_num_heads": 3}),
    "eva-pe-spatial": ("vit_pe_spatial_tiny_patch16_512", {"ref_feat_shape": (8, 8)}),
    "relpos-mlp": ("vit_relpos_small_patch16_224", {}),
    "relpos-bias-cls": ("vit_relpos_base_patch16_clsgap_224", {"rel_pos_type": "bias"}),
    "relpos-shared": ("vit_srelpos_small_patch16_224", {"rel_pos_dim": 48}),
    "relpos-respost": ("vit_relpos_base_patch16_rpn_224", {}),
    "cait": ("cait_xxs24_224", {}),
    "xcit": ("xcit_nano_12_p8_224", {"patch_size": 8, "img_size": 64}),
    "xcit-tokens-norm": ("xcit_tiny_12_p8_224", {"patch_size": 8, "img_size": 64}),
    "convit": ("convit_tiny", {"local_up_to_layer": 2, "embed_dim": 16}),  # times num_heads
    "sam": ("samvit_base_patch16", {"window_size": 4, "global_attn_indexes": (1, 3), "neck_chans": 16}),
}


_TWINS = {"patch_size": 2, "embed_dims": FOUR, "num_heads": HEADS, "mlp_ratios": (2,) * 4, "depths": (1, 1, 2, 1)}
_SWIN = {"patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (1, 2, 2, 1), "num_heads": (1, 2, 4, 8)}
_MAXX = {"embed_dim": (16, 32, 48), "depths": (1, 2, 1), "stem_width": 16, "transformer_dim_head": 8}
_MAXVIT = {**_MAXX, "block_type": ("M",) * 3, "transformer_window_size": (4, 4)}
_COAT = {**_MAXX, "block_type": ("C", "T", "T")}
_TNT = {"patch_size": 8, "embed_dim": 48, "inner_dim": 16, "num_heads_outer": 3, "depth": 4}
_QWEN = {"patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3, "mlp_ratio": 2, "pos_embed_grid_size": 8}
_GEMMA = {"patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3, "head_dim": 16, "intermediate_size": 96}
_GEMMA = {**_GEMMA, "pooling_kernel_size": 2, "position_embedding_size": 64}
_DEEP = {"patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3}
_LEVIT = {"stem_type": "s8", "embed_dim": (16, 32, 48), "key_dim": 8, "num_heads": (1, 2, 3), "depth": (2, 2, 2)}
_MIT = {"widths": (8, 8, 16, 32, 32), "depths": (1, 1, 1, 2, 2), "head_dim": 8, "head_widths": (32, 32)}
_LOW = {"width_list": (8, 8, 16, 32, 32), "depth_list": (0, 1, 1, 2, 2), "head_widths": (32, 32)}
_EDGE = {"dims": (16, 24, 32, 48), "depths": (2, 2, 2, 2), "heads": (4, 4, 4, 4)}
_EF2 = {"depths": (1, 1, 3, 3), "embed_dims": FOUR, "num_vit": 2, "mlp_ratios": 2}
_COAT_LITE = {"embed_dims": FOUR, "serial_depths": (1, 1, 2, 1), "mlp_ratios": (2,) * 4}
_HIERA = {"embed_dim": 16, "stages": (1, 1, 2, 1), "patch_kernel": (3, 3), "patch_stride": (2, 2)}
_HIERA = {**_HIERA, "patch_padding": (1, 1)}
_BOTTLE = byobnet.ByoBlockCfg("bottle", d=1, c=32, s=1, gs=0, br=0.5)
_SELF = byobnet.ByoBlockCfg("self_attn", d=2, c=32, s=2, gs=0, br=0.5)
_BAT = (_BOTTLE, replace(_BOTTLE, s=2), replace(_BOTTLE, s=2))
_CLIP = (*_BAT[:2], replace(_BAT[2], c=64))
_BYOA = {"blocks": (_BOTTLE, _SELF, replace(_SELF, d=1, c=48)), "stem_chs": 16}

# (timm's name, side of the image, arguments). A side of 128 or 256 where the stem has a fixed stride and the last
# stage would have fewer than 4 x 4 tokens otherwise.
_GRIDS: dict[str, tuple[str, int, dict]] = {
    "tnt": ("tnt_s_patch16_224", 64, {"img_size": 64, **_TNT}),
    "tnt-legacy": ("tnt_s_legacy_patch16_224", 64, {"img_size": 64, **_TNT}),
    "naflex-gap": ("naflexvit_base_patch16_gap", 32, FLEX),
    "naflex-parfac": ("naflexvit_base_patch16_parfac_gap", 32, FLEX),
    "naflex-siglip-map": ("naflexvit_base_patch16_siglip", 32, FLEX),
    "naflex-radio": ("naflexvit_base_patch16_radio_v3", 32, FLEX),
    "naflex-rope": ("naflexvit_base_patch16_gap", 32, {**FLEX, "attn_type": "rope", "rope_type": "axial"}),
    "qwen3": ("qwen3_vit_306m", 32, {"img_size": 32, **_QWEN}),
    "qwen3-merge": ("qwen3_vit_306m_merge", 32, {"img_size": 32, "out_features": 48, **_QWEN}),
    "gemma4": ("gemma4_vit_167m", 32, {"img_size": 32, **_GEMMA}),
    "gemma4-standardize": ("gemma4_vit_570m", 32, {"img_size": 32, **_GEMMA}),
    "deepseek": ("deepseek_vit_412m", 48, {"img_size": 48, **_DEEP}),
    "deepseek-align": ("deepseek_vit_412m_align", 48, {"img_size": 48, "out_features": 48, **_DEEP}),
    "crossvit": (
        "crossvit_tiny_240",
        60,
        {"img_size": 60, "patch_size": (6, 8), "embed_dim": (24, 48), "depth": ((1, 2, 0),) * 2, "num_heads": (3, 3)},
    ),
    "pit": (
        "pit_ti_distilled_224",
        32,
        {"img_size": 32, "patch_size": 4, "stride": 2, "base_dims": (8,) * 3, "depth": (1, 2, 1), "heads": (2, 4, 8)},
    ),
    "swin": ("swin_tiny_patch4_window7_224", 64, {"img_size": 64, **_SWIN}),
    "swinv2": ("swinv2_tiny_window8_256", 64, {"img_size": 64, **_SWIN}),
    "swinv2-cr": ("swinv2_cr_tiny_224", 64, {"img_size": 64, **_SWIN}),
    "swinv2-cr-ns": ("swinv2_cr_tiny_ns_224", 64, {"img_size": 64, **_SWIN}),
    "maxvit-tf": ("maxvit_tiny_tf_224", 64, {"img_size": 64, "head_hidden_size": 32, **_MAXVIT}),
    "maxvit-rw": ("maxvit_nano_rw_256", 64, {"img_size": 64, **_MAXVIT}),
    "maxvit-rmlp-nchw": ("maxvit_rmlp_nano_rw_256", 64, {"img_size": 64, "transformer_use_nchw_attn": True, **_MAXVIT}),
    "maxvit-parallel": ("maxvit_tiny_pm_256", 64, {"img_size": 64, **_MAXVIT, "block_type": ("PM",) * 3}),
    "maxxvit": ("maxxvit_rmlp_nano_rw_256", 64, {"img_size": 64, **_MAXVIT, "embed_dim": (16, 32, 64)}),
    "maxxvitv2": ("maxxvitv2_nano_rw_256", 64, {"img_size": 64, **_MAXVIT, "embed_dim": (16, 32, 64)}),
    "coatnet-rw": ("coatnet_nano_rw_224", 64, {"img_size": 64, **_COAT}),
    "coatnet-tf": ("coatnet_0_224", 64, {"img_size": 64, "head_hidden_size": 32, **_COAT}),
    "coatnet-rmlp": ("coatnet_rmlp_nano_rw_224", 64, {"img_size": 64, **_COAT}),
    "coatnext": ("coatnext_nano_rw_224", 64, {"img_size": 64, **_COAT}),
    "levit": ("levit_128s", 128, {"img_size": 128, **_LEVIT}),
    "levit-conv": ("levit_conv_128s", 128, {"img_size": 128, **_LEVIT}),
    "tiny-vit": (
        "tiny_vit_5m_224",
        128,
        {"embed_dims": FOUR, "depths": (1, 2, 2, 2), "num_heads": HEADS, "window_sizes": (4, 4, 8, 4)},
    ),
    "twins-pcpvt": ("twins_pcpvt_small", 64, {"img_size": 64, **_TWINS}),
    "twins-svt": ("twins_svt_small", 64, {"img_size": 64, "wss": (4,) * 4, **_TWINS, "depths": (1, 2, 2, 2)}),
    "pvt-v2": ("pvt_v2_b0", 128, {"depths": (1, 1, 2, 1), "embed_dims": FOUR, "num_heads": HEADS}),
    "pvt-v2-linear": ("pvt_v2_b2_li", 128, {"depths": (1, 1, 2, 1), "embed_dims": FOUR, "num_heads": HEADS}),
    "davit": ("davit_tiny", 128, {"window_size": 4, "embed_dims": FOUR, "num_heads": HEADS, "depths": (1, 1, 2, 1)}),
    "davit-fl": ("davit_base_fl", 128, {"window_size": 4, "embed_dims": FOUR, "num_heads": HEADS, "depths": (1,) * 4}),
    "hiera": ("hiera_tiny_224", 64, {"img_size": 64, **_HIERA}),
    "hiera-abswin": ("hiera_base_abswin_256", 64, {"img_size": 64, "global_pos_size": (4, 4), **_HIERA}),
    "hieradet": (
        "sam2_hiera_tiny",
        64,
        {**_HIERA, "stages": (1, 2, 3, 1), "window_spec": (8, 4, 4, 4), "global_att_blocks": (4, 5)},
    ),
    "efficientvit-mit-b": ("efficientvit_b0", 128, _MIT),
    "efficientvit-mit-l": ("efficientvit_l1", 128, _MIT),
    "efficientvit-msra": (
        "efficientvit_m0",
        256,
        {"img_size": 256, "embed_dim": (32, 32, 48), "key_dim": (8,) * 3, "window_size": (8, 8, 4)},
    ),
    "efficientformer": (
        "efficientformer_l1",
        224,  # its bias table is of 7 x 7 tokens whatever the size
        {"depths": (1, 1, 1, 4), "embed_dims": FOUR, "num_vit": 3},
    ),
    "efficientformer-v2": ("efficientformerv2_s0", 128, {"img_size": 128, **_EF2}),
    "efficientvim": ("efficientvim_m1", 256, {"embed_dim": (16, 32, 48), "depths": (1, 2, 1)}),
    "edgenext": ("edgenext_xx_small", 128, _EDGE),
    "edgenext-rw": ("edgenext_small_rw", 128, {**_EDGE, "dims": (16, 32, 64, 64)}),
    "fastvit": (
        "fastvit_sa12",
        128,
        {"layers": (1, 1, 1, 3), "embed_dims": (16, 32, 64, 64), "mlp_ratios": (2,) * 4},
    ),
    "iformer": ("iformer_t", 128, {"dims": (16, 16, 32, 64), "depths": (1, 1, 10, 6)}),
    "lowformer": ("lowformer_b0", 128, _LOW),
    "cpubone": ("cpubone_nano", 128, _LOW),
    "cpubone-dwnorm": ("cpubone_b1_dwnorm", 128, _LOW),
    "shvit": ("shvit_s1", 256, {"embed_dim": (16, 32, 48), "depth": (1, 2, 2), "partial_dim": (8, 8, 16)}),
    "swiftformer": ("swiftformer_xs", 128, {"layers": (1, 1, 2, 2), "embed_dims": FOUR}),
    "coat-lite": ("coat_lite_tiny", 128, {"img_size": 128, **_COAT_LITE}),
    "coat-parallel": (
        "coat_tiny",
        128,
        {"img_size": 128, **_COAT_LITE, "embed_dims": (32,) * 4, "parallel_depth": 2, "serial_depths": (1,) * 4},
    ),
    "csatv2": ("csatv2", 256, {"dims": (8, 16, 32, 48), "depths": (1, 1, 2, 3), "transformer_depths": (0, 0, 1, 2)}),
    "visformer": (
        "visformer_tiny",
        128,
        {"img_size": 128, "init_channels": 8, "embed_dim": 48, "depth": (1, 2, 2), "num_heads": 3},
    ),
    "nextvit": ("nextvit_small", 128, {"depths": (1, 2, 5, 1)}),  # widths up to 1024 are fixed in the class
    "hybrid": ("vit_tiny_r_s16_p8_224", 64, {**VIT, "img_size": 64, "patch_size": 2}),
    "vitamin": (
        "vitamin_small_224",
        128,
        {
            "img_size": 128,
            "embed_dim": 48,
            "depth": 4,
            "num_heads": 3,
            "embed_cfg": vitamin.VitCfg(
                (16, 24, 48), (1, 1, 1), 16, vitamin.VitConvCfg(norm_layer="layernorm2d"), head_type="1d"
            ),
        },
    ),
    "botnet": ("botnet26t_256", 64, {"img_size": 64, **_BYOA}),
    "halonet": ("halonet26t", 64, {**_BYOA, "self_attn_kwargs": {"block_size": 4, "halo_size": 1}}),
    "lambda": ("lambda_resnet26t", 64, {**_BYOA, "self_attn_kwargs": {"r": 3}}),
    "lambda-rpt": ("lambda_resnet26rpt_256", 64, {"img_size": 64, **_BYOA}),
    "resnet-clip": ("resnet50_clip", 64, {"img_size": 64, "blocks": _CLIP, "stem_chs": 16, "head_hidden_size": 64}),
    "bat": ("bat_resnext26ts", 64, {"blocks": _BAT, "stem_chs": 16, "attn_kwargs": {"block_size": 4}}),
    "mobilevit": (
        "mobilevit_xxs",
        64,
        {
            "blocks": tuple(
                [mobilevit._inverted_residual_block(d=1, c=16, s=1, br=2.0)] * 2
                + [mobilevit._mobilevit_block(1, 24, s, 32, 2, patch_size=2, br=2.0) for s in (2, 2, 1)]
            ),
            "num_features": 32,
        },
    ),
    "mobilevitv2": (
        "mobilevitv2_050",
        64,
        {
            "blocks": tuple(
                [mobilevit._inverted_residual_block(d=1, c=16, s=1, br=2.0)] * 2
                + [mobilevit._mobilevitv2_block(1, 32, s, 2) for s in (2, 2, 1)]
            )
        },
    ),
}


def _mvit(name: str) -> nn.Module:
    config = replace(
        mvitv2.model_cfgs[name],
        embed_dim=(16, 32, 64, 128),
        depths=(1, 1, 2, 1),
        patch_kernel=(3, 3),
        patch_stride=(2, 2),
        patch_padding=(1, 1),
    )
    return mvitv2.MultiScaleVit(config, img_size=(64, 64), num_classes=CLASSES)


def _mobilenet(kind: type[nn.Module], attentions: tuple[str, str], **changes: object) -> nn.Module:
    """Stem 32 x 32, then 16, 8 (two attentions), 4 (one)."""
    first, second = attentions
    stages = [
        ["er_r1_k3_s2_e2_c16"],
        ["uir_r1_a3_k5_s2_e2_c32", first, "uir_r1_a0_k0_s1_e2_c32", first, "uir_r1_a0_k0_s1_e2_c32"],
        ["uir_r1_a5_k5_s2_e2_c48", second, "uir_r1_a0_k0_s1_e2_c48"],
    ]
    return kind(decode_arch_def(stages), num_classes=CLASSES, num_features=48, layer_scale_init_value=1.0, **changes)


_MQA = ("mqa_r1_k3_h2_s1_v2_d16_c32", "mqa_r1_k3_h3_s1_d16_c48")


def _caformer(kind: type[nn.Module]) -> nn.Module:
    mixers = [metaformer.SepConv] * 2 + [metaformer.Attention] * 2
    norms = [metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2
    return kind(depths=(1, 1, 2, 2), dims=(16, 32, 64, 64), token_mixers=mixers, norm_layers=norms, num_classes=CLASSES)


# The class itself, where timm's name takes no arguments for depth and width.
_CLASSES: dict[str, tuple[type[nn.Module], int, dict]] = {
    "nest": (
        nest.Nest,
        32,
        {"img_size": 32, "patch_size": 2, "embed_dims": (16, 32, 48), "num_heads": (1, 2, 3), "depths": (1, 1, 2)},
    ),
    "gcvit": (
        gcvit.GlobalContextVit,
        128,
        {"img_size": 128, "embed_dim": 16, "depths": (2,) * 4, "num_heads": (1, 2, 4, 8)},
    ),
    "volo": (
        volo.VOLO,
        64,
        {"img_size": 64, "layers": (1, 1, 2, 1), "embed_dims": (24, 48, 48, 48), "num_heads": (3,) * 4},
    ),
}

TIMM: dict[str, tuple[partial[nn.Module], int]] = {
    **{
        f"timm-{name}": (_named(model, **{**VIT, **changes}), int(changes.get("img_size", 32)))
        for name, (model, changes) in _COLUMNS.items()
    },
    **{f"timm-{name}": (_named(model, **changes), side) for name, (model, side, changes) in _GRIDS.items()},
    **{f"timm-{n}": (partial(kind, num_classes=CLASSES, **changes), s) for n, (kind, s, changes) in _CLASSES.items()},
    "timm-caformer": (partial(_caformer, metaformer.MetaFormer), 128),
    "timm-mvitv2": (partial(_mvit, "mvitv2_tiny"), 64),
    "timm-mvitv2-cls": (partial(_mvit, "mvitv2_base_cls"), 64),
    "timm-mobilenetv4": (partial(_mobilenet, mobilenetv3.MobileNetV3, _MQA), 64),
    "timm-mobilenetv5": (partial(_mobilenet, mobilenetv5.MobileNetV5, _MQA, msfa_output_resolution=8), 64),
}


def family(row: str) -> str:
    """Return the file of timm that a row of `TIMM` is from."""
    build = TIMM[row][0]
    named = build.args[0] if build.args else build.func
    made = timm.model_entrypoint(named) if isinstance(named, str) else named
    return str(made.__module__).rpartition(".")[2]
