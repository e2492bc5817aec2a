"""The search for score, bypass and keep ratios.

Skipping in one layer makes skipping in the next cheaper, since tokens that shared an update have become more alike; so
layers are not judged one by one. What differs most from model to model is where to begin, and then how fast the ratios
fall: ramps that begin at different layers and are bent differently are measured whole, each of them at the budget, on a
few images; the better ones on more, and the neighbours of the best. What comes before the layer at which a candidate
begins is not computed again.

What fits a few dozen images need not fit others, so nothing is preferred to a plain ramp that is not ahead of it by
more than twice the standard error of the difference.
"""

import math
from typing import NoReturn

import torch
from torch import nn

from tosa_convert.base.errors import UsageError
from tosa_convert.base.progress import Progress
from tosa_convert.config.conversion import ConvertConfig
from tosa_convert.config.segments import as_option
from tosa_convert.measure.macs import flops
from tosa_convert.measure.macs_share import MacsShare
from tosa_convert.measure.similarity import (
    Keep,
    Outputs,
    error,
    figures,
    losses,
    observe,
    settled_keep,
)
from tosa_convert.methods.bypass import Bypass
from tosa_convert.methods.token_ops import keep_count, ratio_steps
from tosa_convert.models.adapter import adapter_of
from tosa_convert.planning.allocation import FINE, Allocation, Shape, bent_ramp, fit, nudged
from tosa_convert.planning.cost_model import Conditions, Prices, price
from tosa_convert.planning.outcome import Plan
from tosa_convert.planning.resuming import Given, catching, resumed
from tosa_convert.planning.shapes import PLAIN, Shapes, starts
from tosa_convert.planning.trial import Trial, ahead, roots, typical
from tosa_convert.selective.conversion import convert, light_copy, set_ratios
from tosa_convert.tasks.task import task_of

SPANS = (1, 2, 3, 4)
"""How many layers share a choice, where the budget is a latency."""
STEPS = 2
"""How often the neighbours of the best are tried."""
BUDGETS = tuple(round(0.98 - 0.02 * step, 2) for step in range(32))
"""What is tried for a drop."""
MUCH = 0.2
"""Share of the multiply–adds outside of the layers that is worth a word."""
COUNTS = 8
"""How often the multiply–adds are counted to meet a budget."""


class Search:
    """The steps of a search, which share the images, the reference outputs and the probe, a converted copy
    with all layers selective."""

    def __init__(
        self,
        model: nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor | None,
        keep: str | None,
        segment: int | None,
        batch_size: int,
        progress: Progress,
    ):
        self.model, self.progress, self.task, self.segment = model, progress, task_of(model), segment
        if batch_size < 1:
            raise UsageError(f"batch_size {batch_size} is out of range; give 1 image or more")
        if labels is not None and not self.task.metrics:
            raise UsageError("labels are given, and this model has no task that is measured by them; leave them out")
        if labels is not None and len(labels) != len(images):
            raise UsageError(f"{len(labels)} labels are given for {len(images)} images; give each image its own")
        device, count = next(model.parameters()).device, len(images)
        # Each batch is spread over all images: neighbours may be crops of one photo.
        parts = -(-count // batch_size)
        order = torch.cat([torch.arange(part, count, parts) for part in range(parts)])
        self.labels = None if labels is None else labels.cpu()[order]
        self.batches = [images[order[order % parts == part]].to(device) for part in range(parts)]
        self.starts = starts(len(adapter_of(model).blocks))
        self.wanted: list[Outputs] = []
        self.given: list[Given] = []
        for batch in self.batches:
            with catching(model, max(self.starts)) as given:
                self.wanted.append(observe(model, batch))
            self.given.append(given)
        self.keep = settled_keep(self.wanted[0], keep)
        self.share_of = MacsShare(model)
        self.options: dict = {}  # of the score
        self.parts: dict[tuple[str, str], float] = {}  # errors of the pairs that were tried
        self.shares: dict[tuple, float] = {}

    def build(self, score: str, bypass: str) -> None:
        """A probe of these parts, with the options that were settled on."""
        parts = {"score": score, "bypass": bypass, "schedule": "all", **self.options}
        self.probe = convert(light_copy(self.model), **parts, ratio=0.5)
        self.layers = self.probe.tosa_config.layers

    def price(self, by: str, conditions: Conditions) -> None:
        """Take what a layer saves; where that is time, choosing is a good part of it, and layers may share it."""
        several = by == "latency" and self.segment is None and self.probe.tosa_config.part(Bypass).groups
        self.spans = SPANS if several else (self.segment or 1,)
        self.prices: Prices = price(self.probe, self.share_of, by, conditions, self.progress)

    def _set(self, allocation: Allocation) -> nn.Module:
        """The probe with an allocation."""
        return set_ratios(self.probe, dict.fromkeys(self.layers, 1.0) | allocation.ratios, allocation.segments)

    def _observe(self, allocation: Allocation, part: int) -> Outputs:
        """What a batch gives with an allocation."""
        self._set(allocation)
        first = next(iter(allocation.segments), self.layers[-1:])[0]
        with resumed(self.probe, self.given[part], first):
            return observe(self.probe, self.batches[part])

    def error_of(self, allocation: Allocation, part: int) -> torch.Tensor:
        """The error of each image of a batch."""
        return error(self._observe(allocation, part), self.wanted[part], self.keep)

    def drop(self, allocation: Allocation) -> float:
        """What an allocation loses: with labels in the first metric of the model's task, such as top-1; without them of
        logits the share of images whose top-1 changes, otherwise the mean loss of what is to be kept, and of patch
        tokens and class token whichever is more."""
        return self.lost([self._observe(allocation, part) for part in range(len(self.batches))])

    def lost(self, found: list[Outputs]) -> float:
        """:meth:`drop` of what the batches gave."""
        if self.labels is not None:
            outputs = (torch.cat([each.output for each in some]).cpu() for some in (self.wanted, found))
            main, metric = next(iter(self.task.metrics.items()))
            known = self.task.known(self.labels)
            return metric.loss(*(self.task.measure(each, self.labels)[main][known].mean().item() for each in outputs))
        pairs = list(zip(found, self.wanted, strict=True))
        if self.keep is Keep.LOGITS:
            return 1 - torch.cat([figures(*pair)["agreement"] for pair in pairs]).mean().item()
        lost = zip(*(losses(*pair, self.keep) for pair in pairs), strict=True)
        return max(torch.cat(each).mean().item() for each in lost)

    def solve_for(self, target: float) -> Plan:
        """The plan at the lowest budget that stays within a drop; above it while the plan itself does not."""
        budget = self._budget_for(target)
        step = 0.04
        while (found := self.solve(budget)).drop > target and budget < BUDGETS[0]:
            budget, step = min(BUDGETS[0], round(budget + step, 2)), 2 * step
        if found.drop > target:
            raise UsageError(f"no plan loses as little as {target} on these images; allow a larger target drop")
        return found

    def _budget_for(self, target: float) -> float:
        """The lowest budget at which a ramp stays within a drop."""
        with self.progress.track("budget for the drop", len(BUDGETS).bit_length()) as advance:
            first, last = 0, len(BUDGETS)  # BUDGETS[last] is the highest that fails
            while first < last:
                middle = (first + last) // 2
                if self._within(target, BUDGETS[middle]):
                    first = middle + 1
                else:
                    last = middle
                advance()
        if not first:
            raise UsageError(f"no plan loses as little as {target} on these images; allow a larger target drop")
        return BUDGETS[first - 1]

    def _within(self, target: float, budget: float) -> bool:
        ramps = [bent_ramp(self.layers, 0, bend, span) for span in self.spans[:2] for bend in (1.5, 0.6, 0.0)]
        allocation = next((found for ramp in ramps if (found := fit(ramp, self.prices, budget))), None)
        return allocation is not None and self.drop(allocation) <= target

    def solve(self, budget: float) -> Plan:
        """The best ratios found within the budget."""
        shapes = Shapes(self.layers, self.starts, self.spans)
        candidates = self._fitted(shapes.first(), budget) or self.refuse(budget)
        plain = candidates.get(PLAIN) or next(iter(candidates.values()))
        trial = Trial(self.error_of, len(self.batches), self.progress)
        best = trial.halve({**candidates, PLAIN: plain}, PLAIN, "ramps")
        for _ in range(STEPS):
            last, near = best, self._fitted(shapes.near(best), budget)
            best = trial.halve({**near, best: trial.candidates[best]}, PLAIN, "ramps near the best")
            if best == last:
                break
        scores = (roots(trial.errors(name)) for name in (best, PLAIN))
        better = trial.candidates[best] if ahead(*scores) else plain
        allocation = self._to_budget(better, budget)
        # At this size a ratio near 1 may skip no token.
        chosen = Allocation(
            {layer: ratio for layer, ratio in allocation.ratios.items() if self.prices.skips(ratio)}, allocation.span
        )
        found = [self._observe(chosen, part) for part in range(len(self.batches))]
        measured = typical(torch.cat([error(*pair, self.keep) for pair in zip(found, self.wanted, strict=True)]))
        rival = self._to_budget(plain, budget)
        same = rival == allocation
        by_rival = measured if same else typical(torch.cat([self.error_of(rival, p) for p in range(len(found))]))
        parts = self._set(chosen).tosa_config
        return Plan(
            config=ConvertConfig(
                score=parts.score,
                bypass=parts.bypass,
                schedule="all",
                layers=list(chosen.ratios),
                ratio=list(chosen.ratios.values()),
                segment=as_option(chosen.segments),
                **self.options,
            ),
            by=self.prices.by,
            keep=self.keep.value,
            budget=budget,
            drop=self.lost(found),
            cost=self.prices.total(chosen.ratios, chosen.segments),
            measured=measured,
            rivals={PLAIN: by_rival},
            parts={" × ".join(pair): value for pair, value in self.parts.items()},
            images=sum(map(len, self.batches)),
        )

    def _share(self, allocation: Allocation) -> float:
        """Of the original's cost; multiply–adds are counted, latencies go by the prices."""
        if self.prices.by != "macs":
            return self.prices.total(allocation.ratios, allocation.segments)
        # Ratios at which as many tokens attend cost the same.
        counts = (keep_count(self.prices.patches, ratio_steps(ratio)) for ratio in allocation.ratios.values())
        key = (allocation.span, *counts)
        if key not in self.shares:
            self.shares[key] = self.share_of.of(self._set(allocation))
        return self.shares[key]

    def _to_budget(self, allocation: Allocation, budget: float) -> Allocation:
        """Up to the budget and not above it, by what is really counted: prices are shared out among layers and
        interpolated, and a price of error can leave some of the budget unspent."""
        if self.prices.by != "macs":
            return allocation
        per_hundredth = (self.prices.at(0.5) - self.prices.at(0.75)) / 25
        for turn in range(1, 1 + COUNTS):
            gap = budget - self._share(allocation)
            if 0 <= gap < (1 + allocation.span) * per_hundredth or (gap > 0 and turn > COUNTS // 2):
                break
            # With few tokens a hundredth may change nothing, so what is over comes down faster each time.
            allocation = nudged(allocation, math.floor(gap / per_hundredth) * (turn if gap < 0 else 1))
        return allocation

    def _fitted(self, shapes: dict[str, Shape], budget: float) -> dict[str, Allocation]:
        """Those that come down to the budget, as high as it allows."""
        found = {name: fit(shape, self.prices, budget) for name, shape in shapes.items()}
        return {name: allocation for name, allocation in found.items() if allocation}

    def least(self) -> float:
        """The share of the original's cost that the fewest tokens in all layers are predicted to take."""
        lowest = Allocation(dict.fromkeys(self.layers, FINE[-1]), self.spans[-1])
        return self.prices.total(lowest.ratios, lowest.segments)

    def refuse(self, budget: float, asked: str = "", original_ms: float | None = None) -> NoReturn:
        """
        Args:
            asked: the budget in the words of the user.
            original_ms: what the original takes, where it is a latency in milliseconds.

        Raises:
            UsageError: no plan comes down to the budget.
        """
        least = self.least()
        if least >= 1:
            raise UsageError(
                f"there is no gain in {self.prices.by} at this size: token selection takes longer than it saves; "
                "try a larger --img-size, or another runtime"
            )
        asked, bypass = asked or f"budget {budget}", self.probe.tosa_config.bypass
        raise UsageError(
            f"{asked} is out of reach: by {self.prices.by} {bypass} comes down to "
            f"{_rounded_up(least) if original_ms is None else f'about {least * original_ms:.1f} ms'}; give that or more"
            f"{self._outside()}"
        )

    def _outside(self) -> str:
        """Where much of the cost is not in the layers, as under a large head, a word on it."""
        cost = flops(self.model)
        outside = 1 - sum(layer.original for layer in cost.layers) / cost.original
        return f" ({outside:.0%} of the multiply–adds are outside of the layers)" if outside > MUCH else ""


def _rounded_up(share: float) -> str:
    return f"{math.ceil(100 * share) / 100:.2f}"
