"""What a search found."""

from dataclasses import dataclass

from tosa_convert.config.conversion import ConvertConfig

CLOSE = 0.05
"""By how much of what was asked for a measured latency may be off."""


@dataclass(frozen=True)
class Spread:
    """Shares of the original's multiply–adds that single images take: their mean, standard deviation, least and most;
    and the most that any image can take."""

    mean: float
    deviation: float
    least: float
    most: float
    bound: float


@dataclass(frozen=True)
class Timed:
    """What was measured of a plan, in turn with the original.

    Attributes:
        original, plan: milliseconds per forward pass.
        asked: milliseconds that the plan was to take.
        conditions: under which.
    """

    original: float
    plan: float
    asked: float
    conditions: str

    @property
    def share(self) -> float:
        return self.plan / self.original

    @property
    def met(self) -> bool:
        """Whether it takes what was asked for, to within 5 %."""
        return abs(self.plan / self.asked - 1) <= CLOSE


@dataclass
class Plan:
    """What :func:`find_plan` found.

    Attributes:
        config: for :func:`tosa_convert.convert`.
        by, keep, budget: what was asked for.
        drop: its drop on the images, see :meth:`Search.drop`.
        cost: predicted share of the original's cost.
        measured: its error on the images, see :func:`~tosa_convert.measure.similarity.error` and
            :func:`~tosa_convert.planning.trial.typical`; where each image keeps as many tokens as it needs the plain
            mean, like that of the plan with numbers that it is held to.
        rivals: name → the same of the plain ramp at this budget, and of the best published method.
        parts: "score × bypass" → error of a ramp, of the pairs that were tried.
        images: how many images.
        spread: how the multiply–adds differ from image to image, where each keeps as many tokens as it needs.
        timed: by latency, what was measured.
    """

    config: ConvertConfig
    by: str
    keep: str
    budget: float
    drop: float
    cost: float
    measured: float
    rivals: dict[str, float]
    parts: dict[str, float]
    images: int
    spread: Spread | None = None
    timed: Timed | None = None
