"""Bypasses: what the tokens get that a layer skips. One file each in :mod:`tosa_convert.methods.bypasses`."""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch

from tosa_convert.methods.parts import Part
from tosa_convert.methods.score import Acts
from tosa_convert.methods.token_ops import Choice, gather_tokens, pick, stand_ins


class Groups(NamedTuple):
    """Where the tokens of the image are, once some were merged.

    Attributes:
        sizes: (B, n) how many tokens each of the n current ones stands for.
        places: (B, N) for each token of the image which of the current ones it is in; None where some are in none.
        at: (B, n) the token of the image in whose place each one stands, where positions matter.
        grid: rows and columns of the image's patches.
        apart: how many of them, the last ones, are no candidates of later choices.
    """

    sizes: torch.Tensor
    places: torch.Tensor | None
    at: torch.Tensor
    grid: tuple[int, ...] = ()
    apart: int = 0


def merged(choice: Choice, groups: Groups, sizes: torch.Tensor) -> Groups:
    """The groups after each skipped one has joined its partner's.

    Args:
        sizes: (B, K), of those that are left.
    """
    places = None if groups.places is None else pick(stand_ins(choice), groups.places)
    return groups._replace(sizes=sizes, places=places, at=pick(groups.at, choice.attended))


class Gathered(NamedTuple):
    """What runs a layer in place of all tokens.

    Attributes:
        tokens: (B, K, D).
        sizes: (B, K) for how many tokens each stands in the attention; None where each stands for itself.
        normed: (B, K, D) in place of what the norm before the layer's attention gives; None to leave that to it.
    """

    tokens: torch.Tensor
    sizes: torch.Tensor | None = None
    normed: torch.Tensor | None = None


class Bypass(Part):
    """What skipped tokens get.

    Attributes:
        acts: around a block, so that every token leaves it in its place (define :meth:`apply`); or between a block's
            attention and MLP or before a block, so that what comes after has fewer tokens (define :meth:`reduce`).
        partners: whether each skipped token needs one that attends to stand in for it.
        needs_weights: whether skipped tokens are weighed by the class token's attention.
        ranks: whether it needs a score that orders the tokens, rather than one that chooses itself.
        without_weights: the name of the bypass that comes nearest where there are no such weights.
        gives_normed: whether it says what the norm before the layer's attention gives.
        puts_back: whether every token of the image is there again after the last layer.
        proportional: whether the layers after weigh tokens by how many they stand for.
        looks_ahead: whether, before a block, the attention of all its tokens serves those that are left.
        groups: whether a skipped token gets what its group gets, so that it can stay in it for several layers: define
            :meth:`gather` in place of :meth:`apply`.
    """

    kind: ClassVar[str] = "bypass"
    folder: ClassVar[str] = "methods/bypasses"
    acts: ClassVar[Acts] = Acts.AROUND
    partners: ClassVar[bool] = False
    needs_weights: ClassVar[bool] = False
    ranks: ClassVar[bool] = False
    without_weights: ClassVar[str | None] = None
    gives_normed: ClassVar[bool] = False
    puts_back: ClassVar[bool] = True
    proportional: ClassVar[bool] = False
    groups: ClassVar[bool] = False

    @property
    def looks_ahead(self) -> bool:
        return False

    def pooling(self, choice: Choice, groups: Groups) -> torch.Tensor:
        """(B, N, 1): how much each token counts in the mean of its group, where the bypass acts before a block."""
        return groups.sizes[..., None]

    @property
    def per_head(self) -> bool:
        """Whether each head attends over tokens of its own; the layer's attention then does all there is to do."""
        return False

    @property
    def shares(self) -> bool:
        """Whether layers may share a choice: not if it says itself how a layer is run."""
        return self.groups and type(self).apply is Bypass.apply

    def apply(self, run: Callable, tokens: torch.Tensor, normed: torch.Tensor | None, choice: Choice) -> torch.Tensor:
        """(B, N, D) → (B, N, D).

        Args:
            run: the layer's own forward, ``run(tokens, sizes=None, normed=None)``, with ``normed`` in place of what
                the norm before its attention gives.
            tokens: that enter the layer.
            normed: the same after the norm before its attention, where :attr:`partners` are needed.
        """
        if not self.groups:
            raise NotImplementedError(f"{type(self).__name__} acts around a block, so it has to define apply")
        gathered = self.gather(tokens, normed, choice)
        return tokens + gather_tokens(run(*gathered) - gathered.tokens, stand_ins(choice))

    def gather(self, tokens: torch.Tensor, normed: torch.Tensor | None, choice: Choice) -> Gathered:
        """(B, N, D) → the groups, which run the layer; each token then adds the update of its own to itself.

        Args:
            tokens: that enter the layer.
            normed: the same after the norm before its attention; None in a layer that only goes on with the groups.
        """
        raise NotImplementedError(f"{type(self).__name__} keeps groups, so it has to define gather")

    def reduce(
        self, tokens: torch.Tensor, choice: Choice, groups: Groups, weights: torch.Tensor | None
    ) -> tuple[torch.Tensor, Groups]:
        """(B, N, D) → (B, K, D) and the groups after.

        Args:
            tokens: after the layer's attention, or before the layer.
            groups: that they form already.
            weights: (B, N), the scores, where there are any.
        """
        raise NotImplementedError(f"{type(self).__name__} acts {self.acts}, so it has to define reduce")
