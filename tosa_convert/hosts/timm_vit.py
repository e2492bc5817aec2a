"""timm's VisionTransformer family: ViT, DeiT (distilled too), DeiT-III, DINOv2, CLIP and SigLIP towers, FlexiViT."""

import torch
from timm.data import resolve_model_data_config
from timm.layers import Attention
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import nn

from tosa_convert.errors import UnsupportedModelError
from tosa_convert.hosts import Host, Tap, split_heads
from tosa_convert.preprocessing import Preprocessing

WINDOWED = "its attention is windowed or hierarchical: tokens cannot leave a window without changing the others"
LATER = "its attention carries positions or biases per token, which this version does not gather yet"
REFUSED = {
    **dict.fromkeys(("swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr", "hiera"), WINDOWED),
    **dict.fromkeys(("mvitv2", "levit", "vision_transformer_sam", "hieradet_sam2", "maxxvit", "nest"), WINDOWED),
    **dict.fromkeys(("pvt_v2", "twins", "coat", "efficientformer", "efficientformer_v2", "efficientvit_mit"), WINDOWED),
    **dict.fromkeys(("tiny_vit", "gcvit", "davit", "focalnet", "convit", "crossvit", "tnt", "pit"), WINDOWED),
    **dict.fromkeys(("efficientvit_msra", "edgenext", "mobilevit", "fastvit", "nextvit", "rdnet"), WINDOWED),
    **dict.fromkeys(("visformer", "volo", "sequencer", "starnet", "swiftformer"), WINDOWED),
    "xcit": "its attention runs over channels, not tokens: there is no token map to predict",
    **dict.fromkeys(("eva", "beit", "vision_transformer_relpos", "naflexvit"), LATER),
    "cait": "its class token joins after the blocks, a layout this version does not read yet",
}


def find(model: nn.Module) -> Host | None:
    module = type(model).__module__
    if not isinstance(model, VisionTransformer):
        if not module.startswith("timm."):
            return None
        reason = REFUSED.get(module.rsplit(".", 1)[-1], "it has no row of transformer blocks over tokens (not a ViT)")
        raise UnsupportedModelError(f"{type(model).__name__} cannot be made token-selective: {reason}")
    odd = next((block for block in model.blocks if not _understood(block)), None)
    if odd is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is built from {type(odd).__name__} with "
            f"{type(getattr(odd, 'attn', None)).__name__}, which this version does not understand yet"
        )
    return TimmVit(model)


def _understood(block: nn.Module) -> bool:
    return isinstance(block, (Block, ResPostBlock)) and isinstance(block.attn, Attention)


class TimmVit(Host):
    library = "timm"

    def __init__(self, model: VisionTransformer):
        super().__init__(model)
        self.blocks = list(model.blocks)
        self.prefix = model.num_prefix_tokens

    @property
    def heads(self) -> int:
        return self.blocks[0].attn.num_heads

    def tap(self, block: nn.Module, relay) -> list:
        return [block.attn.qkv.register_forward_hook(Tap(relay, _deliver, block.attn))]

    def project(self, attention, tokens):
        return _split(attention, attention.qkv(tokens))

    def finish(self, attention, joined, tokens):
        joined = attention.norm(joined)
        if getattr(attention, "gate", None) is not None:
            joined = joined * attention.gate(tokens).sigmoid()
        return attention.proj_drop(attention.proj(joined))

    def attention_dropout(self, attention) -> float:
        return attention.attn_drop.p

    def outputs(self, images):
        if self.model.num_classes > 0:
            return {"logits": self.model(images)}
        tokens = self.model.forward_features(images)
        return {"tokens": tokens, "features": self.model.forward_head(tokens)}

    def preprocessing(self) -> Preprocessing:
        known = resolve_model_data_config(self.model)
        embed = self.model.patch_embed
        return Preprocessing(
            size=embed.img_size or known["input_size"][1:],
            channels=embed.proj.in_channels,
            **{name: known[name] for name in ("mean", "std", "interpolation", "crop_pct")},
        )

    def resize(self, size: tuple[int, int]) -> None:
        if self.model.patch_embed.img_size != size:
            self.model.set_input_size(img_size=size)

    @property
    def patch(self) -> tuple[int, int]:
        return self.model.patch_embed.patch_size

    def spec(self) -> dict:
        model = self.model
        known = dict(model.pretrained_cfg or {})
        arguments = {
            "num_classes": model.num_classes,
            "in_chans": model.patch_embed.proj.in_channels,
            "img_size": model.patch_embed.img_size,
            "dynamic_img_size": model.dynamic_img_size,
            "global_pool": model.global_pool,
        }
        return {"architecture": known.get("architecture"), "model_args": arguments, "pretrained_cfg": _plain(known)}


def _plain(config: dict) -> dict:
    """What of timm's pretrained_cfg a JSON file can hold."""
    return {key: value for key, value in config.items() if isinstance(value, (str, int, float, bool, list, tuple))}


def _split(attention: Attention, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    queries, keys, values = (split_heads(part, attention.num_heads) for part in qkv.chunk(3, dim=-1))
    return attention.q_norm(queries), attention.k_norm(keys), values


def _deliver(relay, attention: Attention, qkv: torch.Tensor) -> None:
    relay.queries, relay.keys, _ = _split(attention, qkv)
