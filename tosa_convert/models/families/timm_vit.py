"""timm: ViT, DeiT (distilled too), DeiT-III, DINOv2 (with registers too), CLIP and SigLIP towers, FlexiViT, AIMv2."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from timm.data import resolve_data_config
from timm.layers import Attention, Format
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import nn

from tosa_convert.base.errors import TosaError, UnsupportedModelError, UsageError
from tosa_convert.models.adapter import Adapter
from tosa_convert.models.hooks import ProjectionTap, Receive, Tap
from tosa_convert.models.preprocessing import Preprocessing
from tosa_convert.models.projections import QueryKey
from tosa_convert.models.unsupported import not_understood

TIMM = ("vision_transformer", "deit")
PROJECTING = ("_clip_", "vit_pe_core")
PROJECTIONS = (384, 512, 640, 768, 1024, 1152, 1280)
"""Widths of the embeddings of these towers, which timm gives as ``num_classes``."""


def find(model: nn.Module) -> Adapter | None:
    return TimmVit(model) if isinstance(model, VisionTransformer) and all_of(model.blocks, understood) else None


def all_of(blocks: nn.Module, kind: Callable[[nn.Module], bool]) -> bool:
    """Whether a row of blocks is of an understood kind.

    Raises:
        UnsupportedModelError: its first one is, but not every other.
    """
    odd = [index for index, block in enumerate(blocks) if not kind(block)]
    if odd and odd[0]:
        raise UnsupportedModelError(not_understood(f"blocks.{odd[0]}", blocks[odd[0]]))
    return not odd


def understood(block: nn.Module) -> bool:
    return isinstance(block, (Block, ResPostBlock)) and isinstance(block.attn, Attention)


class TimmVit(Adapter):
    library = "timm"
    bias_name = "attn_mask"

    def __init__(self, model: VisionTransformer):
        super().__init__(model)
        self.blocks = list(model.blocks)
        self.prefix = model.num_prefix_tokens
        self.class_token = getattr(model, "cls_token", None) is not None
        self.width = model.embed_dim
        named = str(_config(model).get("architecture") or "")
        self.embeds = model.num_classes in PROJECTIONS and any(part in named for part in PROJECTING)

    def check_arguments(self, layer, args, kwargs):
        super().check_arguments(layer, args, kwargs)
        if kwargs.get("is_causal"):
            raise TosaError(f"selective layer {layer} was called with causal attention, which needs every token")

    def norm(self, block):
        return None if isinstance(block, ResPostBlock) else block.norm1

    @property
    def patch_projection(self) -> nn.Module:
        return self.model.patch_embed.proj

    @property
    def classifies_by_class_token(self) -> bool:
        return self.class_token and self.model.num_classes > 0 and self.model.global_pool == "token"

    @property
    def size(self) -> tuple[int, int] | None:
        """Of the images that the model is built for; None where any will do."""
        return self.model.patch_embed.img_size

    def as_attention_output(self, tokens, weights=None):
        return tokens

    @property
    def heads(self) -> int:
        return self.blocks[0].attn.num_heads

    def tap(self, block: nn.Module, receive: Receive, detach: bool = True) -> Tap:
        return QkvTap(self, block, receive, detach)

    def project(self, attention, tokens, arguments):
        return split_qkv(attention, attention.qkv(tokens))

    def query_and_key(self, attention):
        if type(self).project is not TimmVit.project:  # a family that inherits from this one
            return None
        return QueryKey.of([attention.qkv], isinstance(attention.k_norm, nn.Identity))

    def compared(self, attention, queries, keys, arguments):
        return attention.q_norm(queries), attention.k_norm(keys)

    def finish(self, attention, joined, tokens, weights=None):
        joined = attention.norm(joined)
        if getattr(attention, "gate", None) is not None:
            joined = joined * attention.gate(tokens).sigmoid()
        return attention.proj_drop(attention.proj(joined))

    def attention_dropout(self, attention) -> float:
        return attention.attn_drop.p

    def inputs(self, images):
        return {"x": images}

    def outputs(self, images):
        if self.model.num_classes > 0:
            found = self.model(images)
            if isinstance(found, tuple):  # of the class token and of the distillation token, in training
                found = sum(found) / len(found)
            return {"image_embeds" if self.embeds else "logits": found}
        tokens = self.model.forward_features(images)
        return {"tokens": tokens, "features": self.model.forward_head(tokens)}

    def tokens(self, images):
        return self.model.forward_features(images)

    def preprocessing(self) -> Preprocessing:
        known = resolve_data_config({}, pretrained_cfg=_config(self.model) or {"num_classes": 0})
        return Preprocessing(
            size=self.size or known["input_size"][1:],
            channels=self.channels,
            **{name: known[name] for name in ("mean", "std", "interpolation", "crop_pct", "crop_mode")},
        )

    @property
    def channels(self) -> int:
        """Of the images; a hybrid's first convolution is that of its backbone."""
        return next(conv.in_channels for conv in self.model.patch_embed.modules() if isinstance(conv, nn.Conv2d))

    def resize(self, size: tuple[int, int]) -> None:
        if self.size == size:
            return
        if not hasattr(self.model, "set_input_size"):
            raise UsageError(
                f"{type(self.model).__name__} takes images of {self.size[0]}×{self.size[1]} only: its position "
                "embedding is not resampled; leave the image size out"
            )
        self.model.set_input_size(img_size=size)

    @contextmanager
    def any_size(self) -> Iterator[None]:
        """As with timm's ``dynamic_img_size=True``, where the class offers it."""
        if getattr(self.model, "dynamic_img_size", True):
            yield
            return
        embedding = self.model.patch_embed
        taken = {"strict_img_size": False, "flatten": False, "output_fmt": Format.NHWC}
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(self.model, "dynamic_img_size", True))
            for name, value in taken.items():
                stack.enter_context(mock.patch.object(embedding, name, value))
            yield

    @property
    def patch(self) -> tuple[int, int]:
        return tuple(self.model.patch_embed.feat_ratio(as_scalar=False))

    def spec(self) -> dict:
        model = self.model
        known = _config(model)
        arguments = {"num_classes": model.num_classes, "in_chans": self.channels, "global_pool": model.global_pool}
        if self.size is not None:
            arguments["img_size"] = self.size
        if hasattr(model, "dynamic_img_size"):
            arguments["dynamic_img_size"] = model.dynamic_img_size
        return {"architecture": known.get("architecture"), "model_args": arguments, "pretrained_cfg": _plain(known)}


def _config(model: nn.Module) -> dict:
    """timm's pretrained_cfg; empty for a model that was not made by create_model."""
    return dict(getattr(model, "pretrained_cfg", None) or {})


def _plain(config: dict) -> dict:
    """What of timm's pretrained_cfg a JSON file can hold."""
    return {key: value for key, value in config.items() if isinstance(value, (str, int, float, bool, list, tuple))}


def split_qkv(attention: Attention, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As timm's attention does it, operator for operator: in an exported graph the two become one."""
    batch, tokens, _ = qkv.shape
    parts = qkv.reshape(batch, tokens, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)
    queries, keys, values = parts.unbind(0)
    return attention.q_norm(queries), attention.k_norm(keys), values


class QkvTap(ProjectionTap):
    """On timm's one projection of all three."""

    def sources(self):
        return [self.attention.qkv]

    def parted(self, projected):
        return split_qkv(self.attention, projected)[:2]
