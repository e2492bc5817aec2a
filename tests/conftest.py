"""Small random-weight instances of the real classes, small pictures, and no network."""

import os
import re
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp()

import hypothesis
import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

torch.set_num_threads(2)
hypothesis.settings.register_profile("untimed", deadline=None)  # no test asserts a timing
hypothesis.settings.load_profile("untimed")

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


def _timm(kind=VisionTransformer, **options):
    return lambda: kind(**{**SMALL, "dynamic_img_size": True, **options})


def _hf(kind: str, **options):
    def build():
        family = re.sub("(Model|Backbone|ForImageClassification)$", "", kind)
        config = getattr(transformers, f"{family}Config")(**{**HF_SMALL, **options})
        return getattr(transformers, kind)(config)

    return build


def _depth_anything():
    backbone = transformers.Dinov2Config(
        **HF_SMALL, mlp_ratio=2, layerscale_value=0.5, out_indices=[2, 4, 5, 6], reshape_hidden_states=False
    )
    sizes = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8, "head_hidden_size": 8}
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=48, patch_size=8, **sizes
    )
    return transformers.DepthAnythingForDepthEstimation(config)


FAMILIES = {
    "timm vit": _timm(),
    "timm deit distilled": _timm(VisionTransformerDistilled),
    "timm dinov2 registers": _timm(init_values=0.5, reg_tokens=4, num_classes=0),
    "timm qk-norm": _timm(qk_norm=True),
    "timm siglip": _timm(class_token=False, global_pool="avg"),
    "timm post-norm": _timm(block_fn=timm.models.vision_transformer.ResPostBlock, init_values=0.5),
    "timm eva02": _timm(Eva, use_rot_pos_emb=True, swiglu_mlp=True, scale_mlp=True, qkv_fused=False),
    "timm dinov3": _timm(Eva, **ROPE, rope_type="dinov3", rope_rotate_half=True, num_reg_tokens=4, num_classes=0),
    "timm mixed rope": _timm(Eva, **ROPE, rope_type="mixed", attn_type="rope", qk_norm=True),
    "hf ViTModel": _hf("ViTModel"),
    "hf ViT classifier": _hf("ViTForImageClassification", num_labels=5),
    "hf DeiTModel": _hf("DeiTModel"),
    "hf Dinov2Model": _hf("Dinov2Model", mlp_ratio=2, layerscale_value=0.5),
    "hf Dinov2 swiglu": _hf("Dinov2Model", mlp_ratio=2, use_swiglu_ffn=True),
    "hf Dinov2 registers": _hf("Dinov2WithRegistersModel", mlp_ratio=2, num_register_tokens=4),
    "hf DINOv3ViTModel": _hf("DINOv3ViTModel", num_register_tokens=2, layerscale_value=0.5),
    "hf CLIPVisionModel": _hf("CLIPVisionModel"),
    "hf SiglipVisionModel": _hf("SiglipVisionModel"),
}
VARIANTS = {
    "timm grouped queries": _timm(Eva, **ROPE, attn_type="rope", qkv_fused=False, num_kv_heads=1, init_values=0.5),
    "timm eva post-norm": _timm(Eva, use_rot_pos_emb=True, use_post_norm=True, class_token=False, global_pool="avg"),
    "hf Dinov2Backbone": _hf("Dinov2Backbone", mlp_ratio=2, layerscale_value=0.5, out_indices=[2, 4, 6]),
    "hf DepthAnything": _depth_anything,
}
"""Of families above, for the tests that would find them out."""
LAYERS = [2, 4, 6]


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights large enough that attention is not uniform and choices differ between images."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return model.eval()


@pytest.fixture(params=FAMILIES)
def family(request) -> nn.Module:
    """One model of each supported family."""
    torch.manual_seed(0)
    return lively(FAMILIES[request.param]())


@pytest.fixture
def vit() -> nn.Module:
    """A small timm ViT that knows its pictures and can be saved."""
    from tosa_convert import load

    model = load("quickstart")
    model.eval()
    return model


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def write_pictures(folder, count: int, classes: list[str] | None = None, size: int = 32) -> None:
    """Random pictures, spread over class folders if there are any."""
    random = np.random.default_rng(0)
    for index in range(count):
        place = folder / classes[index % len(classes)] if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 255, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{index:03d}.png")


@pytest.fixture
def pictures(tmp_path):
    """A flat folder of eight pictures."""
    write_pictures(tmp_path / "pictures", 8)
    return tmp_path / "pictures"


@pytest.fixture
def labelled(tmp_path):
    """Twenty pictures in the ten class folders of the quickstart's model."""
    write_pictures(tmp_path / "labelled", 20, [f"{label}-class" for label in range(10)])
    return tmp_path / "labelled"


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory):
    """A finished distill run of the quickstart's model, made by the command line."""
    from tosa_convert.cli import main

    out = tmp_path_factory.mktemp("session") / "run"
    arguments = ["--layers", "2,4,6", "--ratio", "0.5", "--steps", "2", "--batch-size", "2", "--json"]
    with pytest.raises(SystemExit) as stop:
        main(["distill", "quickstart", *arguments, "--out", str(out)])
    assert stop.value.code == 0
    return out
