"""Successive halving: all candidates on a few images, the better ones on more."""

import functools
from collections.abc import Callable

import torch

from tosa_convert.base.progress import Progress
from tosa_convert.planning.allocation import Allocation

SURVIVORS = (8, 4)
"""How many candidates go on to the second part of the images, and to all others."""


class Trial:
    """Errors of candidates, none measured twice.

    Args:
        measure: (allocation, part) → the errors of the images of that part.
        parts: how many parts there are.
    """

    def __init__(self, measure: Callable[[Allocation, int], torch.Tensor], parts: int, progress: Progress):
        self.measure, self.parts, self.progress = measure, parts, progress
        self.candidates: dict[str, Allocation] = {}
        self.found: dict[tuple[str, int], torch.Tensor] = {}

    def halve(self, candidates: dict[str, Allocation], plain: str, what: str) -> str:
        """The name of the best on all images of the candidates that were measured on them; the plain one always is."""
        self.candidates |= candidates
        going = list(candidates)
        rungs = [range(1), range(1, min(2, self.parts)), range(2, self.parts)]
        steps = len(going) + min(SURVIVORS[0], len(going)) + min(SURVIVORS[1], len(going)) * max(self.parts - 2, 0)
        with self.progress.track(what, steps) as advance:
            for rung, survivors in zip(rungs, (*SURVIVORS, 1), strict=True):
                done, leader = [], plain
                # On the same images for all: one that was in an earlier trial has errors on more.
                so_far = functools.partial(self._typical, parts=max(1, rung.stop))
                for name in dict.fromkeys([*going, plain]):
                    for part in rung:
                        self._measure(name, part)
                        advance(leader)
                    done.append(name)
                    leader = min(done, key=so_far)
                going = sorted(going, key=so_far)[:survivors]
        whole = [name for name in candidates if (name, self.parts - 1) in self.found]
        return min(whole, key=self._typical)

    def _measure(self, name: str, part: int) -> None:
        if (name, part) not in self.found:
            self.found[name, part] = self.measure(self.candidates[name], part)

    def errors(self, name: str, parts: int | None = None) -> torch.Tensor:
        """The errors of a candidate, image by image, of the first parts or of all."""
        return torch.cat([self.found[name, part] for part in range(parts or self.parts)])

    def _typical(self, name: str, parts: int | None = None) -> float:
        return typical(self.errors(name, parts))


def roots(errors: torch.Tensor) -> torch.Tensor:
    """What errors of images are compared by: in a mean of the errors themselves the few largest would decide."""
    return errors.clamp(min=0).sqrt()  # cosines are rounded


def typical(errors: torch.Tensor) -> float:
    """The error that has the mean root of the errors of images."""
    return roots(errors).mean().square().item()


def ahead(scores: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether the first scores, image by image, are lower by more than twice the standard error of the difference:
    crops of one photo are similar, so one standard error would be too little."""
    gain = others - scores
    spread = gain.std() / len(gain) ** 0.5 if len(gain) > 1 else gain.new_zeros(())
    return (gain.mean() > 2 * spread).item()
