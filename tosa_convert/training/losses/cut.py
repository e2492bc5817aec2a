"""IdleViT's token cut loss (arXiv 2310.05654): attention that crosses from selected to idle tokens costs, so that
the selected ones come to hold what belongs together."""

from typing import Any

import torch
from torch import nn

from tosa_convert.base.errors import UsageError
from tosa_convert.methods.score import Score
from tosa_convert.models.adapter import Adapter, adapter_of
from tosa_convert.models.hooks import Hook, remove_hooks
from tosa_convert.models.projections import projected
from tosa_convert.selective.selection import selective_blocks
from tosa_convert.training.loss import Loss


class TokenCut(Loss):
    """Looks, with gradients, at what the attention of each selective layer would be among all tokens that enter it."""

    teaches_selection = True

    def __init__(self, model, teacher, settings):
        super().__init__(model, teacher, settings)
        adapter = adapter_of(model)
        self.sides = [_Side(adapter, block) for block in selective_blocks(model) if block.selection.selects]

    @classmethod
    def fits(cls, config):
        if not config.part(Score).needs_class_token or config.reduces or config.threshold is not None:
            raise UsageError(
                "the token cut loss is for scores class_query and class_attention with a number of tokens and all of "
                "them kept, as in IdleViT; set cut to 0"
            )

    @classmethod
    def check(cls, situation):
        super().check(situation)
        if not adapter_of(situation.model).own_heads:
            raise UsageError(
                "the token cut loss looks at the attention between all tokens, and this model mixes its heads inside "
                "it or has tokens behind its patches; set cut to 0"
            )

    def begin(self, images):
        for side in self.sides:
            side.awaited = True

    def of(self, found, wanted, labels):
        """The mean over layers and images."""
        return torch.stack([side.loss() for side in self.sides]).mean()

    def close(self):
        for side in self.sides:
            remove_hooks(side.block, lambda hook, side=side: hook is side)


class _Side(Hook):
    """One selective layer: the attention among all of its tokens, and who was selected."""

    def __init__(self, adapter: Adapter, block: Any):
        self.adapter, self.block, self.selection = adapter, block, block.selection
        self.maps: Any = None
        self.awaited = False
        block.register_forward_pre_hook(self.look, with_kwargs=True)

    def look(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        entering, *others = self.adapter.entering(args, kwargs)
        normed = self.adapter.normed(block, self.adapter.taken(entering))
        queries, keys = projected(self.adapter, block, normed, block.called_with(*others))
        maps = (queries @ keys.mT).softmax(-1).mean(1)
        self.maps = maps if self.awaited else None  # none where a layer is run again for its gradients

    def loss(self) -> torch.Tensor:
        attended = self.selection.current.state.choices[self.selection.layer].attended
        maps, self.maps, self.awaited = self.maps, None, False  # a copy of the model should carry none
        selected = torch.zeros(maps.shape[:2], device=attended.device).scatter(1, attended, 1.0)
        patches = slice(self.selection.prefix, None)
        return normalized_cut(maps[:, patches, patches], selected[:, patches])


def normalized_cut(maps: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
    """The normalised cut (Shi and Malik, 2000) between two sides of a graph, mean over images; 0 to 2.

    Args:
        maps: (B, N, N) weights of the edges, here attention, from each row to each column.
        selected: (B, N), 1.0 on the one side and 0.0 on the other.
    """
    sides = torch.stack([selected, 1 - selected], dim=1).to(maps.dtype)
    between = sides @ maps @ sides.mT  # (B, 2, 2): from side to side
    crossing = between[:, 0, 1] / between[:, 0].sum(-1).clamp(min=1e-6)
    return (crossing + between[:, 1, 0] / between[:, 1].sum(-1).clamp(min=1e-6)).mean()
