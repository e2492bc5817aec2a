"""timm: parallel-block and differential-attention ViTs.

Attention and MLP side by side (arXiv 2302.05442), several of each side by side (arXiv 2203.09795), and differential
attention (arXiv 2410.05258).
"""

import functools

import torch
from timm.layers import Attention, DiffAttention
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import nn

from tosa_convert.models.adapter import Adapter
from tosa_convert.models.families.timm_vit import TimmVit, all_of, split_qkv
from tosa_convert.models.hooks import PairTap, Tap
from tosa_convert.models.projections import split_heads


def find(model: nn.Module) -> Adapter | None:
    if not isinstance(model, VisionTransformer):
        return None
    return next(
        (adapter(model) for adapter in (TimmFused, TimmThings, TimmDiff) if all_of(model.blocks, adapter.knows)), None
    )


class _Odd(TimmVit):
    own_heads = False

    @staticmethod
    def knows(block: nn.Module) -> bool:
        raise NotImplementedError


class TimmDiff(_Odd):
    """A head compares two pairs of queries and keys: twice as many maps as heads."""

    @staticmethod
    def knows(block):
        return isinstance(block, (Block, ResPostBlock)) and isinstance(block.attn, DiffAttention)

    @property
    def heads(self) -> int:
        return 2 * self.blocks[0].attn.num_heads

    def project(self, attention, tokens, arguments):
        queries, keys, values = attention.qkv(tokens).chunk(3, dim=-1)
        pairs = (split_heads(each, 2 * attention.num_heads) for each in (queries, keys))
        queries, keys = self.compared(attention, *pairs, arguments)
        return queries, keys, split_heads(values, attention.num_heads)

    def maps(self, attention, queries, keys, bias, sizes):
        looks = super().maps(attention, queries, keys, bias, sizes)[0]
        first, second = looks.unflatten(1, (attention.num_heads, 2)).unbind(2)
        return looks, first - attention._compute_lambda().type_as(looks) * second

    def finish(self, attention, joined, tokens, weights=None):
        heads = attention.sub_norm(joined.unflatten(-1, (attention.num_heads, -1))) * (1 - attention.lambda_init)
        return attention.proj_drop(attention.proj(attention.norm(heads.flatten(2))))

    def tap(self, block, receive, detach=True):
        return _DiffTap(self, block, receive, detach)


class _DiffTap(PairTap):
    def sources(self):
        return [self.attention.q_norm, self.attention.k_norm]


class TimmFused(_Odd):
    """Attention and MLP are one module, side by side."""

    halves = False

    @staticmethod
    def knows(block):
        return isinstance(block, (ParallelScalingBlock, DiffParallelScalingBlock))

    def norm(self, block):
        return block.in_norm

    @property
    def heads(self) -> int:
        first = self.blocks[0]
        return first.num_heads * (2 if isinstance(first, DiffParallelScalingBlock) else 1)

    def tap(self, block, receive, detach=True):
        return _FusedTap(self, block, receive, detach)


class _FusedTap(PairTap):
    def sources(self):
        return [self.block.q_norm, self.block.k_norm]

    def formed(self, queries, keys):
        if isinstance(self.block, DiffParallelScalingBlock):
            return queries, keys
        return queries.transpose(1, 2), keys.transpose(1, 2)


class TimmThings(_Odd):
    """Several attentions side by side, then several MLPs; all their heads are looked at."""

    halves = False

    @staticmethod
    def knows(block):
        return isinstance(block, ParallelThingsBlock) and all(isinstance(each.attn, Attention) for each in block.attns)

    def norm(self, block):
        return None  # each has its own

    @property
    def heads(self) -> int:
        return sum(each.attn.num_heads for each in self.blocks[0].attns)

    def tap(self, block, receive, detach=True):
        return _ThingsTap(self, block, receive, detach)


class _ThingsTap(Tap):
    def sources(self):
        return [each.attn.qkv for each in self.block.attns]

    def stand_on(self, source, index):
        source.register_forward_hook(functools.partial(self.take_next, index))

    def take_next(self, index: int, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        before = self.pending.take() or []
        taken = before if index else []  # what an interrupted pass left
        taken = [*taken, split_qkv(self.block.attns[len(taken)].attn, self.cut(output))[:2]]
        if len(taken) == len(self.block.attns):
            self.receive(*(torch.cat(parts, dim=1) for parts in zip(*taken, strict=True)))
        else:
            self.pending.set(taken)
