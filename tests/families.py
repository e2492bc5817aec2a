"""Small random-weight instances of every supported family, built from the real classes and configs."""

import re

import pytest
import timm
import transformers
from timm.models._features import FeatureGetterNet
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos
from timm.models.vision_transformer_sam import VisionTransformerSAM

from tosa_convert.config.head import HeadConfig
from tosa_convert.models.dense import with_head

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 6, "num_heads": 3, "num_classes": 5}
ROPE = {"use_rot_pos_emb": True, "use_abs_pos_emb": False}
HF_SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}
HEAD = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8}
blocks = timm.models.vision_transformer


def _timm(kind=VisionTransformer, **options):
    resizing = {"dynamic_img_size": True} if kind in (VisionTransformer, VisionTransformerDistilled, Eva) else {}
    return lambda: kind(**{**SMALL, **resizing, **options})


def naflex(**options):
    small = {name: value for name, value in SMALL.items() if name not in ("img_size", "num_classes")}
    return lambda: NaFlexVit(NaFlexVitCfg(**{**small, **options}), num_classes=5, img_size=32)


def _features():
    return FeatureGetterNet(_timm(init_values=0.5)(), out_indices=[1, 3, 5])


def _hf(kind: str, **options):
    def build():
        family = re.sub(r"(Model|Backbone|For[A-Z]\w+)$", "", kind)
        config = getattr(transformers, f"{family}Config")(**{**HF_SMALL, **options})
        return getattr(transformers, kind)(config)

    return build


def _dual(family: str, **text):
    """Pictures and texts; both towers are built from the same layers."""

    def build():
        words = {name: value for name, value in HF_SMALL.items() if name not in ("image_size", "patch_size")}
        text_config = {**words, "vocab_size": 99, "max_position_embeddings": 16, **text}
        config = getattr(transformers, f"{family}Config")(text_config=text_config, vision_config=HF_SMALL)
        return getattr(transformers, f"{family}Model")(config)

    return build


def _dinov2_inside(kind: str):
    def build():
        backbone = transformers.Dinov2Config(
            **HF_SMALL, mlp_ratio=2, layerscale_value=0.5, out_indices=[2, 4, 5, 6], reshape_hidden_states=False
        )
        options = {"reassemble_hidden_size": 48, "patch_size": 8, "head_hidden_size": 8, **HEAD}
        config = getattr(transformers, f"{kind}Config")(backbone_config=backbone, **options)
        return getattr(transformers, f"{kind}ForDepthEstimation")(config)

    return build


def _vitpose():
    """A backbone inside a model that gives maps."""
    small = {name: value for name, value in HF_SMALL.items() if name != "intermediate_size"}
    backbone = transformers.VitPoseBackboneConfig(**{**small, "image_size": [32, 32], "patch_size": [8, 8]})
    return transformers.VitPoseForPoseEstimation(transformers.VitPoseConfig(backbone_config=backbone, num_labels=3))


def _vjepa2():
    """Takes videos; of one time here, so that it has as many patches as the others."""
    small = {name: HF_SMALL[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size")}
    predictor = {"pred_hidden_size": 24, "pred_num_attention_heads": 3, "pred_num_hidden_layers": 1}
    options = {"crop_size": 32, "frames_per_clip": 2, "mlp_ratio": 2, "num_labels": 5, "num_pooler_layers": 1}
    return transformers.VJEPA2ForVideoClassification(transformers.VJEPA2Config(**small, **options, **predictor))


def _llama4():
    """A class token behind the patches, positions as complex numbers, patches cut before they are projected."""
    widths = {"vision_output_dim": 48, "projector_input_dim": 48, "projector_output_dim": 48}
    small = {**HF_SMALL, "intermediate_size": 192}
    return transformers.Llama4VisionModel(transformers.Llama4VisionConfig(**small, **widths))


SAM_SMALL = {"use_rel_pos": True, "window_size": 3}
GLOBAL = [0, 2, 3, 4, 5, 6]


def _sam():
    small = {name: value for name, value in HF_SMALL.items() if name not in ("intermediate_size", "num_hidden_layers")}
    options = {"output_channels": 16, "global_attn_indexes": GLOBAL, "mlp_dim": 96, "num_hidden_layers": 7}
    return transformers.SamVisionModel(transformers.SamVisionConfig(**{**small, **SAM_SMALL, **options}))


def _vitdet():
    small = {name: value for name, value in HF_SMALL.items() if name not in ("intermediate_size", "num_hidden_layers")}
    options = {"window_block_indices": [1], "window_size": 3, "num_hidden_layers": 7, "mlp_ratio": 2}
    relative = {"use_relative_position_embeddings": True, "out_indices": [3, 7]}
    return transformers.VitDetBackbone(transformers.VitDetConfig(**small, **options, **relative))


def _timm_sam():
    options = {"depth": 7, "global_attn_indexes": tuple(GLOBAL), "neck_chans": 16, "num_classes": 5, "mlp_ratio": 2.0}
    return VisionTransformerSAM(**{**SMALL, **SAM_SMALL, **options})


def _beit_inside_dpt():
    backbone = transformers.BeitConfig(
        **HF_SMALL, use_relative_position_bias=True, out_indices=[2, 4, 5, 6], reshape_hidden_states=False
    )
    return transformers.DPTForDepthEstimation(transformers.DPTConfig(backbone_config=backbone, **HEAD))


def under_head(encoder: str, head: str, **options):
    """One of the others under a head of ours."""

    def build():
        return with_head(FAMILIES[encoder](), HeadConfig(task="segmentation", head=head, **options))

    return build


PROVEN = {
    "hf ViTMSN classifier": _hf("ViTMSNForImageClassification", num_labels=5),
    "hf BlipVisionModel": _hf("BlipVisionModel"),
    "hf ChineseCLIPModel": _dual("ChineseCLIP"),
    "hf IJepaModel": _hf("IJepaModel"),
    "hf VitPose": _vitpose,
    "hf MLCDVisionModel": _hf("MLCDVisionModel"),
    "hf YolosModel": _hf("YolosModel", num_detection_tokens=4, image_size=[32, 32]),
    "hf Llama4VisionModel": _llama4,
    "hf Eomt": _hf("EomtForUniversalSegmentation", num_queries=5, num_blocks=1, num_hidden_layers=7),
}
"""Those that no family knows by name."""
FAMILIES = {
    "timm vit": _timm(),
    "timm deit distilled": _timm(VisionTransformerDistilled),
    "timm dinov2 registers": _timm(init_values=0.5, reg_tokens=4, num_classes=0),
    "timm qk-norm": _timm(qk_norm=True),
    "timm siglip": _timm(class_token=False, global_pool="map"),
    "timm post-norm": _timm(block_fn=blocks.ResPostBlock, init_values=0.5),
    "timm features_only": _features,
    "timm parallel": _timm(block_fn=blocks.ParallelScalingBlock, qk_norm=True),
    "timm parallel things": _timm(block_fn=blocks.ParallelThingsBlock, init_values=0.5),
    "timm diff": _timm(attn_layer="diff", num_heads=3, embed_dim=48),
    "timm diff parallel": _timm(block_fn=blocks.DiffParallelScalingBlock, class_token=False, global_pool="avg"),
    "timm eva02": _timm(Eva, use_rot_pos_emb=True, swiglu_mlp=True, scale_mlp=True, qkv_fused=False),
    "timm eva post-norm": _timm(Eva, use_rot_pos_emb=True, use_post_norm=True, class_token=False, global_pool="avg"),
    "timm grouped queries": _timm(Eva, **ROPE, attn_type="rope", qkv_fused=False, num_kv_heads=1, init_values=0.5),
    "timm dinov3": _timm(Eva, **ROPE, rope_type="dinov3", rope_rotate_half=True, num_reg_tokens=4, num_classes=0),
    "timm mixed rope": _timm(Eva, **ROPE, rope_type="mixed", attn_type="rope", qk_norm=True),
    "timm beit": _timm(Beit, use_rel_pos_bias=True, qkv_bias=True, init_values=0.5),
    "timm beit shared": _timm(Beit, use_shared_rel_pos_bias=True, qkv_bias=False, num_classes=0),
    "timm relpos": _timm(VisionTransformerRelPos, init_values=0.5),
    "timm relpos shared": _timm(
        VisionTransformerRelPos,
        rel_pos_type="bias",
        shared_rel_pos=True,
        class_token=True,
        global_pool="token",
        init_values=0.5,
    ),
    "timm relpos post-norm": _timm(VisionTransformerRelPos, block_fn=ResPostRelPosBlock, init_values=0.5),
    "timm cait": _timm(Cait, init_values=0.5),
    "timm naflex": naflex(reg_tokens=1, class_token=False, global_pool="avg"),
    "timm naflex rope": naflex(rope_type="axial", class_token=True, global_pool="token", embed_proj_type="conv"),
    "hf ViTModel": _hf("ViTModel"),
    "hf ViT classifier": _hf("ViTForImageClassification", num_labels=5),
    "hf DeiTModel": _hf("DeiTModel"),
    "hf ViTMAEModel": _hf("ViTMAEModel", mask_ratio=0.0),
    "hf Dinov2Model": _hf("Dinov2Model", mlp_ratio=2, layerscale_value=0.5),
    "hf Dinov2 swiglu": _hf("Dinov2Model", mlp_ratio=2, use_swiglu_ffn=True),
    "hf Dinov2 registers": _hf("Dinov2WithRegistersModel", mlp_ratio=2, num_register_tokens=4),
    "hf Dinov2Backbone": _hf("Dinov2Backbone", mlp_ratio=2, layerscale_value=0.5, out_indices=[2, 4, 6]),
    "hf DINOv3ViTModel": _hf("DINOv3ViTModel", num_register_tokens=2, layerscale_value=0.5),
    "hf BeitModel": _hf("BeitModel", use_relative_position_bias=True, layer_scale_init_value=0.5),
    "hf Beit shared": _hf("BeitForImageClassification", use_shared_relative_position_bias=True, num_labels=5),
    "hf BeitBackbone": _hf("BeitBackbone", use_absolute_position_embeddings=True, out_indices=[2, 4, 6]),
    "hf CLIPVisionModel": _hf("CLIPVisionModel"),
    "hf CLIPModel": _dual("CLIP"),
    "hf SiglipVisionModel": _hf("SiglipVisionModel"),
    "hf SiglipModel": _dual("Siglip"),
    "hf Siglip2VisionModel": _hf("Siglip2VisionModel", num_patches=16),
    "hf Aimv2VisionModel": _hf("Aimv2VisionModel"),
    "hf DepthAnything": _dinov2_inside("DepthAnything"),
    "hf DPT": _hf("DPTForDepthEstimation", is_hybrid=False, backbone_out_indices=[1, 3, 4, 5], **HEAD),
    "hf DPT segmentation": _hf(
        "DPTForSemanticSegmentation", is_hybrid=False, backbone_out_indices=[1, 3, 4, 5], num_labels=5, **HEAD
    ),
    "hf DPT with BEiT": _beit_inside_dpt,
    "hf VJEPA2": _vjepa2,
    "hf SAM": _sam,
    "hf ViTDet": _vitdet,
    "timm sam": _timm_sam,
    "dense timm light": under_head("timm dinov2 registers", "light"),
    "dense hf dpt": under_head("hf Dinov2Model", "dpt", channels=3),
    **PROVEN,
}
CORE = (
    "timm vit",
    "timm deit distilled",
    "timm siglip",
    "timm post-norm",
    "timm eva02",
    "timm beit",
    "timm cait",
    "timm parallel",
    "hf DeiTModel",
    "hf Dinov2Model",
    "hf DINOv3ViTModel",
    "hf BeitModel",
    "hf DPT",
)
"""Those that differ in what the methods look at: prefix tokens, norms, positions, attention."""
MOSTLY_LONG = [name if name in CORE else pytest.param(name, marks=pytest.mark.long) for name in FAMILIES]
"""All families for what differs little between them: the others with ``-m long``."""
