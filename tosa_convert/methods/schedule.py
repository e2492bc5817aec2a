"""Schedules: which layers are selective, and how many tokens each keeps. One file each in
:mod:`tosa_convert.methods.schedules`."""

from typing import ClassVar

from tosa_convert.methods.parts import Part
from tosa_convert.methods.score import Acts


class Schedule(Part):
    """Which layers, and the ratio of each. Here: all layers alike.

    Attributes:
        whole: whether layers that follow one another share one choice, unless a segment is given.
    """

    kind: ClassVar[str] = "schedule"
    folder: ClassVar[str] = "methods/schedules"
    whole: ClassVar[bool] = False

    def layers(self, depth: int, first: int) -> list[int]:
        """The selective layers, from 1, of a model with ``depth`` layers, of which ``first`` is the first that can
        be selective."""
        return list(range(first, depth + 1))

    def ratios(self, ratio: float, count: int, acts: Acts) -> list[float]:
        """The keep ratio of each of ``count`` selective layers, in order.

        Args:
            ratio: the one that was asked for; what it means is the schedule's own.
            acts: where the bypass acts.

        Raises:
            ValueError: a ratio that this schedule cannot do.
        """
        return [ratio] * count

    def ratios_of(self, ratio: float, count: int, acts: Acts, patches: int) -> list[float]:
        """:meth:`ratios` in a model of so many patch tokens, for a schedule that counts them."""
        return self.ratios(ratio, count, acts)
