"""What one forward pass carries from layer to layer beside its tokens."""

from typing import NamedTuple

import torch
from torch import nn

from tosa_convert.errors import TosaError


class Groups(NamedTuple):
    """Where the tokens of the image are, once some were merged.

    Attributes:
        sizes: (B, n) how many tokens each of the n current ones stands for.
        places: (B, N) for each token of the image which of the current ones it is in.
    """

    sizes: torch.Tensor
    places: torch.Tensor


class Passage:
    """One per converted model; begun anew by each forward pass, at the patch embedding.

    What a layer finds is kept under its number and not changed by later layers, so that gradient
    checkpointing can run a layer again.
    """

    def __init__(self):
        self._grid: tuple[int, int] | None = None
        self._groups: dict[int, Groups | None] = {}

    def begin(self, projection: nn.Module, inputs: tuple, output: torch.Tensor | tuple) -> None:
        """A forward hook on the patch projection: (B, D, rows, columns) tells the grid, or it comes with the tokens as
        (tokens, (rows, columns))."""
        grid = output[1] if isinstance(output, tuple) else output.shape[-2:]
        # In a trace, such as fvcore's, which is of one size, sizes are tensors.
        whole = (int(side) if isinstance(side, torch.Tensor) else side for side in grid or ())
        self._grid = tuple(whole) or None
        self._groups = {}

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        if self._grid is None:
            raise TosaError("the grid of patches is not known; run the model from its pictures on")
        return self._grid

    @property
    def patches(self) -> int:
        """Of the image, those that are gone by now included."""
        height, width = self.grid
        return height * width

    def entering(self, layer: int, tokens: torch.Tensor) -> Groups:
        """How the tokens stand when they reach a layer; on their own as long as no layer merged any."""
        found = self._groups.get(layer - 1)
        if found is not None:
            return found
        batch, count, _ = tokens.shape
        return Groups(tokens.new_ones(batch, count), torch.arange(count, device=tokens.device).expand(batch, count))

    def leave(self, layer: int, groups: Groups | None) -> None:
        self._groups[layer] = groups

    def forget(self) -> None:
        """Let go of what the last forward pass left."""
        self._grid, self._groups = None, {}
