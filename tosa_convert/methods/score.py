"""Scores: which tokens of a layer attend. One file each in :mod:`tosa_convert.methods.scores`."""

from collections.abc import Callable
from enum import StrEnum
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from tosa_convert.methods.parts import Part


class Acts(StrEnum):
    """Where a bypass acts, and a score with it."""

    AROUND = "around a block"
    BEFORE = "before a block"
    BETWEEN = "between attention and MLP"


class Reads(StrEnum):
    """What a score looks at."""

    QUERIES_KEYS = "queries and keys"
    TOKENS = "tokens"
    ATTENTION = "the attention that tokens get"
    CLASS_QUERY = "the query of the class token, before its layer runs"


class Site(NamedTuple):
    """Where one score works.

    Attributes:
        layer: the selective layer, from 1.
        heads: attention heads of the layer that is read.
        prefix: number of class, distillation and register tokens in front of the patches.
        width: channels of a token.
        acts: where the bypass acts that it is combined with.
        seed: of the conversion.
        depth: layers of the model.
    """

    layer: int
    heads: int
    prefix: int
    width: int
    acts: Acts
    seed: int
    depth: int = 12


class View(NamedTuple):
    """What a score sees when its layer chooses.

    Attributes:
        steps: the keep ratio, see :func:`tosa_convert.methods.token_ops.ratio_steps`.
        patches: patch tokens of the image, those that are gone by now included.
        grid: rows and columns of the patches; of a video's, times before them.
        reading: what :meth:`Score.read` gave; None for a score that reads tokens.
        class_logits: gives (B, N), what the class token's query in the layer makes of all tokens, the mean over heads,
            for a score that reads it.
        received: (B, N), the attention that each token gets in the layer, the mean over heads and queries, for a score
            that reads it.
        tokens: (B, N, C), the tokens that enter the layer, or its MLP where the bypass acts before that; None for a
            score that reads queries and keys.
        normed: the same after the norm before the layer's attention.
        sizes: (B, N) how many tokens of the image each one stands for; None where each stands for itself.
        padding: (B, N) which tokens are none; None where all are tokens.
        partners: whether those of the skipped tokens are asked for.
        before: (B, N) the logits of the gate in the selective layer before, if there is one.
        threshold: what a value has to reach; 0 where a number of tokens attends.
        any_number: whether it is asked for its :meth:`Score.worth`, by which a threshold goes, not for its choice.
    """

    steps: int
    patches: int
    grid: tuple[int, ...]
    reading: Any = None
    class_logits: Callable[[], torch.Tensor] | None = None
    received: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    normed: torch.Tensor | None = None
    sizes: torch.Tensor | None = None
    padding: torch.Tensor | None = None
    partners: bool = True
    any_number: bool = False
    before: torch.Tensor | None = None
    threshold: float = 0.0


class Worth(NamedTuple):
    """What a score gives where a threshold says how many tokens attend.

    Attributes:
        values: (B, N), or (B, H, N) per head: a token attends whose value is at least the threshold.
        features: (B, N, D) by which the others' partners are found; None leaves that to the layer's tokens.
        weights: (B, N), with gradients, by which what the layer adds to a token is multiplied; for a score that gates.
        logits: (B, N), with gradients, what the next layer's gate and the loss on selection labels see.
    """

    values: torch.Tensor
    features: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class Score(Part, nn.Module):
    """Which tokens attend. An instance is a prototype: each selective layer gets a copy, see :meth:`setup`.

    One that reads queries and keys defines :meth:`read`, which runs in the layer that is read and gives the little
    that is kept of them: the scores themselves, or what :meth:`score` makes them of when the selective layer runs.
    One that reads tokens defines :meth:`score`. Both run without gradients: a hard choice has none.

    Attributes:
        reads: what it looks at.
        always_before: whether it reads the layer before its own also where the bypass acts after a layer's attention;
            otherwise it then reads its own layer.
        chooses: whether :meth:`score` gives a :class:`~tosa_convert.methods.token_ops.Choice` in place of scores.
        finds_partners: whether that choice names a partner for each skipped token.
        half_at_most: whether it skips at most half of the tokens at once where tokens are gone after a layer.
        scores_heads: whether its scores may be taken head by head, see bypass identity.
        needs_class_token: whether it goes by the class token's attention.
        weighs: whether its scores are shares of the class token's attention.
        learns: whether it has to be trained before it is of use.
        learns_in: how: by "lesson", see :meth:`lesson`, from the model's own attention; by "ablation", from what the
            loss does without each token; or in "finetune", with the model.
        gates: whether it also weighs what the layer adds to a token, with gradients, see :class:`Worth`.
        own_threshold: what a token has to reach where nobody says how many attend; None for a score that is a ranking.
        least: the smallest share of a layer's patches that it can choose.
        ordinary_before: whether the layer that it reads must not be selective itself.
        variants: options that a plan tries in place of the defaults.
        any_number_variants: the same of a plan in which each image keeps as many tokens as it needs.
    """

    kind: ClassVar[str] = "score"
    folder: ClassVar[str] = "methods/scores"
    reads: ClassVar[Reads] = Reads.QUERIES_KEYS
    always_before: ClassVar[bool] = False
    chooses: ClassVar[bool] = False
    finds_partners: ClassVar[bool] = False
    half_at_most: ClassVar[bool] = False
    scores_heads: ClassVar[bool] = False
    needs_class_token: ClassVar[bool] = False
    weighs: ClassVar[bool] = False
    learns: ClassVar[bool] = False
    learns_in: ClassVar[str] = "lesson"
    gates: ClassVar[bool] = False
    own_threshold: ClassVar[float | None] = None
    least: ClassVar[float] = 0.0
    ordinary_before: ClassVar[bool] = False
    variants: ClassVar[tuple[dict[str, Any], ...]] = ()
    any_number_variants: ClassVar[tuple[dict[str, Any], ...]] = ()

    def setup(self, site: Site) -> None:
        """Make what depends on the model and the layer: parameters, a seed. Called once per selective layer."""

    @classmethod
    def distilled(cls) -> bool:
        """Whether distill trains it, before the model itself learns."""
        return cls.learns and cls.learns_in != "finetune"

    @classmethod
    def suits(cls, acts: Acts) -> bool:
        """Whether it can be combined with a bypass that acts so."""
        wanted = {Reads.ATTENTION: Acts.BEFORE, Reads.CLASS_QUERY: Acts.AROUND}.get(cls.reads_at(acts), acts)
        return acts is wanted

    @classmethod
    def reads_at(cls, acts: Acts) -> Reads:
        """What it looks at, where a bypass acts so."""
        return cls.reads

    @classmethod
    def reads_before(cls, acts: Acts) -> bool:
        """Whether it reads the layer before its own."""
        if cls.reads_at(acts) is not Reads.QUERIES_KEYS:
            return False
        return cls.always_before or acts is Acts.AROUND

    def read(self, queries: torch.Tensor, keys: torch.Tensor) -> Any:
        """Queries and keys, both (B, H, N, D) → the little that is kept of them."""
        raise NotImplementedError(f"{type(self).__name__} reads queries and keys, so it has to define read")

    def score(self, view: View) -> Any:
        """Scores (B, N) or, per head, (B, H, N); tokens with higher scores attend. Or a choice."""
        if self.reads is not Reads.QUERIES_KEYS:
            raise NotImplementedError(f"{type(self).__name__} reads tokens, so it has to define score")
        return view.reading

    def worth(self, view: View) -> Worth:
        """What a threshold goes by: the scores, or for one that chooses what it orders the tokens by."""
        if self.chooses:
            raise NotImplementedError(f"{type(self).__name__} chooses itself, so it has to define worth for thresholds")
        return Worth(self.score(view))

    def forward(self, *given: Any) -> Any:
        """:meth:`read` of queries and keys, or :meth:`score` or :meth:`worth` of a view: calls of the module, so that
        they are counted."""
        if not isinstance(given[0], View):
            return self.read(*given)
        return self.worth(*given) if given[0].any_number else self.score(*given)

    def loss(self, read: tuple[torch.Tensor, torch.Tensor], own: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """What there is to learn: the queries and keys of the layer that is read, and of its own → a scalar."""
        raise NotImplementedError(f"{type(self).__name__} learns, so it has to define loss")

    def lesson(self, keep: Callable[[int], int], **settings: Any) -> "Lesson":
        """What follows it through a forward pass of distillation.

        Args:
            keep: how many of so many patches its layer keeps.
            **settings: of the distillation.
        """
        return Lesson(self)


class Lesson:
    """What one score learns in a forward pass: it reads, and is corrected as soon as its own layer has its queries
    and keys."""

    def __init__(self, score: Score):
        self.score = score
        self.seen: Any = None
        self.figures: dict[str, torch.Tensor] = {}

    def listen(self, queries: torch.Tensor, keys: torch.Tensor) -> None:
        """The layer that is read has run."""
        self.seen = queries, keys

    def learn(self, queries: torch.Tensor, keys: torch.Tensor) -> None:
        """Its own layer has."""
        seen, self.seen = self.seen, None
        with torch.enable_grad():  # the model around it runs without
            self.figures = {"loss": self.score.loss(seen, (queries, keys))}

    def take(self) -> dict[str, torch.Tensor]:
        """{"loss" and other figures}, scalars."""
        figures, self.figures = self.figures, {}
        return figures
