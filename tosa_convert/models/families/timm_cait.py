"""timm: CaiT.

Talking heads (arXiv 2003.02436), and a class token that joins after the blocks.
"""

import torch
import torch.nn.functional as F
from timm.models.cait import Cait, LayerScaleBlock, TalkingHeadAttn
from torch import nn

from tosa_convert.models.adapter import Adapter
from tosa_convert.models.families.timm_vit import QkvTap, TimmVit, all_of
from tosa_convert.models.subclassing import answered

TIMM = ("cait",)


def find(model: nn.Module) -> Adapter | None:
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

    def project(self, attention, tokens, arguments):
        return _heads_of(attention, attention.qkv(tokens))

    def maps(self, attention, queries, keys, bias, sizes):
        logits = queries * self.scale(queries) @ keys.mT
        mixed = _over_heads(attention.proj_l.weight, attention.proj_l.bias[:, None, None], logits)
        looks = (mixed if bias is None else mixed + bias).softmax(-1)
        constant = attention.proj_w.bias[:, None, None]
        if sizes is not None:  # for each of the tokens that a key stands for
            constant = constant * sizes[:, None, None]
        return looks, _over_heads(attention.proj_w.weight, constant, looks)

    def finish(self, attention, joined, tokens, weights=None):
        return attention.proj_drop(attention.proj(joined))

    def tap(self, block, receive, detach=True):
        return _QkvTap(self, block, receive, detach)

    def steered(self, block):
        return [(block.attn.proj_l, "forward"), (block.attn.proj_w, "forward")]

    def call(self, block, forward, tokens, args, kwargs, places=None, sizes=None):
        if sizes is None:
            return forward(block, tokens, *args, **kwargs)
        before, after = block.attn.proj_l, block.attn.proj_w
        weighed = _Weighed(before, after, sizes)
        with answered(before, weighed.mix_logits), answered(after, weighed.mix_weights):
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


def _heads_of(attention: nn.Module, projected: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(B, N, 3 · C) → queries, keys and values, (B, H, N, D) each."""
    return projected.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()


def _over_heads(weight: torch.Tensor, constant: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Maps (B, H, N, N) mixed by a matrix (H, H)."""
    return torch.einsum("gh,bhqk->bgqk", weight, maps) + constant


class _Weighed:
    """Each key counts for as many tokens as it stands for: in the softmax, and in the constant that the heads' mixing
    after it adds for every key."""

    def __init__(self, before: nn.Linear, after: nn.Linear, sizes: torch.Tensor):
        self.before, self.after, self.sizes = before, after, sizes[:, None, :, None]  # heads last: (B, N, N, H)

    def mix_logits(self, logits: torch.Tensor) -> torch.Tensor:
        return F.linear(logits, self.before.weight, self.before.bias) + self.sizes.log()

    def mix_weights(self, weights: torch.Tensor) -> torch.Tensor:
        return F.linear(weights, self.after.weight) + self.after.bias * self.sizes


class _QkvTap(QkvTap):
    def parted(self, projected):
        return _heads_of(self.attention, projected)[:2]
