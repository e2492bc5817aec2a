"""timm: BEiT, BEiT-2, relpos ViTs."""

import torch
import torch.nn.functional as F
from timm.models.beit import Beit
from timm.models.beit import Block as BeitBlock
from timm.models.vision_transformer_relpos import RelPosBlock, ResPostRelPosBlock, VisionTransformerRelPos
from torch import nn

from tosa_convert.models.adapter import Adapter
from tosa_convert.models.families.timm_vit import TimmVit, all_of
from tosa_convert.models.hooks import Tap
from tosa_convert.models.projections import QueryKey, split_heads
from tosa_convert.models.relative_bias import OwnBias, RelativeAdapter, total

TIMM = ("beit", "vision_transformer_relpos")


def find(model: nn.Module) -> Adapter | None:
    if isinstance(model, Beit) and all_of(model.blocks, lambda block: isinstance(block, BeitBlock)):
        return TimmBeit(model)
    if isinstance(model, VisionTransformerRelPos) and all_of(model.blocks, _is_relpos):
        return TimmRelPos(model)
    return None


def _is_relpos(block: nn.Module) -> bool:
    return isinstance(block, (RelPosBlock, ResPostRelPosBlock))


class _TimmRelative(RelativeAdapter, TimmVit):
    def own_bias(self, block):
        return self._own(block.attn)

    def bias(self, attention, arguments):
        own = self._own(attention)
        return total(None if own is None else getattr(own.holder, own.method)(), arguments.get(self.bias_name))

    def finish(self, attention, joined, tokens, weights=None):
        return attention.proj_drop(attention.proj(joined))


class TimmRelPos(_TimmRelative):
    bias_name = "shared_rel_pos"

    def norm(self, block):
        return None if isinstance(block, ResPostRelPosBlock) else block.norm1

    def _own(self, attention: nn.Module) -> OwnBias | None:
        own = attention.rel_pos
        return None if own is None else OwnBias(own, "get_bias")


class TimmBeit(_TimmRelative):
    bias_name = "shared_rel_pos_bias"

    def _own(self, attention: nn.Module) -> OwnBias | None:
        if attention.relative_position_bias_table is None:
            return None
        return OwnBias(attention, "_get_rel_pos_bias")

    def tap(self, block, receive, detach=True):
        return _InputTap(self, block, receive, detach)

    def project(self, attention, tokens, arguments):
        return _projected(attention, tokens, 3)

    def query_and_key(self, attention):
        biases = None if attention.q_bias is None else (attention.q_bias, attention.k_bias)
        return QueryKey.of([attention.qkv], True, biases)

    def compared(self, attention, queries, keys, arguments):
        return queries, keys


def _projected(attention: nn.Module, tokens: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
    """(B, N, C) → the first ``parts`` of queries, keys and values, each (B, H, N, D)."""
    weight, bias = attention.qkv.weight, None
    width = len(weight) // 3 * parts
    if attention.q_bias is not None:
        bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])[:width]
    joined = F.linear(tokens, weight[:width], bias)
    return tuple(split_heads(part, attention.num_heads) for part in joined.chunk(parts, dim=-1))


class _InputTap(Tap):
    """BEiT's attention never calls its projection as a module, so queries and keys are projected once more."""

    def sources(self):
        return [self.attention]

    def stand_on(self, source, index):
        source.register_forward_pre_hook(self.take_input)

    def take_input(self, attention: nn.Module, inputs: tuple) -> None:
        if not self.adapter.silenced(attention):
            self.receive(*_projected(attention, self.cut(inputs[0]), 2))
