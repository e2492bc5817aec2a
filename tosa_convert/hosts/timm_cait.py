"""timm: CaiT.

Talking heads (arXiv 2003.02436), and a class token that joins behind the blocks.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from timm.models.cait import Cait, LayerScaleBlock, TalkingHeadAttn
from torch import nn

from tosa_convert.hosts import Host, ProjectionTap, Receive
from tosa_convert.hosts.relative import replaced
from tosa_convert.hosts.timm_vit import TimmVit, all_of

TIMM = ("cait",)


def find(model: nn.Module) -> Host | None:
    return TimmCait(model) if isinstance(model, Cait) and all_of(model.blocks, _understood) else None


def _understood(block: nn.Module) -> bool:
    return isinstance(block, LayerScaleBlock) and isinstance(block.attn, TalkingHeadAttn)


class TimmCait(TimmVit):
    """Its blocks see patches only: there are no prefix tokens in them."""

    bias_name = None
    own_heads = False

    def __init__(self, model: Cait):
        super().__init__(model)
        self.prefix, self.class_token = 0, False

    def tap(self, block: nn.Module, receive: Receive, detach: bool = True) -> list:
        return [block.attn.qkv.register_forward_hook(_QkvTap(block.attn, receive, detach))]

    def call(self, block, forward, tokens, args, kwargs, places=None, sizes=None):
        if sizes is None:
            return forward(block, tokens, *args, **kwargs)
        with _weighed(block.attn, sizes):
            return forward(block, tokens, *args, **kwargs)

    def outputs(self, images):
        if self.model.num_classes > 0:
            return {"logits": self.model(images)}
        joined = self.model.forward_features(images)
        return {"tokens": self._patches(joined), "features": self.model.forward_head(joined)}

    def tokens(self, images):
        return self._patches(self.model.forward_features(images))

    def _patches(self, joined: torch.Tensor) -> torch.Tensor:
        return joined[:, self.model.num_prefix_tokens :]  # the class token has joined by now


@contextmanager
def _weighed(attention: TalkingHeadAttn, sizes: torch.Tensor) -> Iterator[None]:
    """Within this block each key counts for as many tokens as it stands for: in the softmax, and in the constant that
    the heads' mixing behind it adds for every key."""
    before, behind = attention.proj_l, attention.proj_w
    sizes = sizes[:, None, :, None]  # the heads come last: (B, N, N, H)

    def mix_before(logits: torch.Tensor) -> torch.Tensor:
        return F.linear(logits, before.weight, before.bias) + sizes.log()

    def mix_behind(weights: torch.Tensor) -> torch.Tensor:
        return F.linear(weights, behind.weight) + behind.bias * sizes

    with replaced(before, "forward", mix_before), replaced(behind, "forward", mix_behind):
        yield


class _QkvTap(ProjectionTap):
    def parted(self, projected):
        queries, keys, _ = projected.unflatten(-1, (3, self.attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        return queries, keys
