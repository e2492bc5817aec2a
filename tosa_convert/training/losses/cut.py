"""IdleViT's token cut loss (arXiv 2310.05654): attention that crosses from selected to idle tokens costs, so that
the selected ones come to hold what belongs together."""

import torch

from tosa_convert.base.errors import UsageError
from tosa_convert.methods.score import Score
from tosa_convert.models.adapter import adapter_of
from tosa_convert.selective.selection import Selection, selective_blocks
from tosa_convert.training.loss import Loss


class TokenCut(Loss):
    """Listens, with gradients, to the attention that each selective layer of a converted model chooses by."""

    def __init__(self, model, teacher, settings):
        super().__init__(model, teacher, settings)
        adapter = adapter_of(model)
        self.sides = [_Side(block.selection) for block in selective_blocks(model)]
        self.taps = [adapter.tap(adapter.blocks[s.selection.layer - 2], s.listen, detach=False) for s in self.sides]

    @classmethod
    def check(cls, situation):
        config = situation.model.tosa_config
        if not config.part(Score).weighs or config.reduces or config.threshold is not None:
            raise UsageError(
                "the token cut loss is for score class_attention with a number of tokens and all of them kept, as in "
                "IdleViT; set cut to 0"
            )

    def of(self, found, wanted, labels):
        """The mean over layers and images."""
        return torch.stack([side.loss() for side in self.sides]).mean()

    def close(self):
        for tap in self.taps:
            tap.remove()


class _Side:
    """One selective layer: the attention before it, and who was selected by it."""

    def __init__(self, selection: Selection):
        self.selection = selection

    def listen(self, queries: torch.Tensor, keys: torch.Tensor) -> None:
        self.maps = (queries * queries.shape[-1] ** -0.5 @ keys.mT).softmax(-1).mean(1)

    def loss(self) -> torch.Tensor:
        selection, before = self.selection, self.selection.previous
        state = selection.current.state
        attended = state.choices[selection.layer].attended
        selected = torch.zeros(len(attended), state.scores[selection.layer].shape[1], device=attended.device)
        selected = selected.scatter(1, attended, 1.0)
        if before is not None and before.selects:  # its attention is among its own tokens only
            selected = selected.gather(1, state.choices[before.layer].attended)
        patches = slice(selection.prefix, None)
        return normalized_cut(self.maps[:, patches, patches], selected[:, patches])


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
