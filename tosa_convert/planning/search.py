"""The search for score, bypass and keep ratios.

Skipping in one layer makes skipping in the next cheaper, since tokens that shared an update have become more
alike; so layers are not judged one by one. On a few dozen images a family of ramps is measured whole, each
of them at the budget. Around the best one the curve of error over ratio is measured for each layer, with all
other layers as they are, on half of the images, and the ratios that make the predicted error least under the
budget are the next point to look around from, as long as the other half gets better there.

What fits a few dozen images need not fit others, so nothing is preferred to a plain ramp, or to the point before,
that is not ahead of it by more than twice the standard error of the difference.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from tosa_convert.base.errors import UsageError
from tosa_convert.base.progress import Progress
from tosa_convert.config.conversion import ConvertConfig
from tosa_convert.measure.macs_share import MacsShare
from tosa_convert.measure.similarity import (
    Keep,
    Outputs,
    check_keep,
    default_keep,
    error,
    figures,
    losses,
    observe,
)
from tosa_convert.methods.bypass import Bypass
from tosa_convert.methods.parts import every
from tosa_convert.methods.score import Acts, Score
from tosa_convert.methods.token_ops import keep_count, ratio_steps
from tosa_convert.models.adapter import adapter_of
from tosa_convert.planning.allocation import FINE, Ratios, allocate, bent_ramp, fit, nudged, predicted_change, ramp
from tosa_convert.planning.cost_model import Prices, price
from tosa_convert.planning.sensitivity import Judged, curves
from tosa_convert.selective.conversion import convert, set_ratios
from tosa_convert.tasks.task import task_of

BENDS = (0.0, 0.4, 0.6, 0.8, 1.0, 1.3, 1.7)
"""Exponents of the ramps that are tried; 0 is all layers alike."""
BUDGETS = tuple(round(0.98 - 0.02 * step, 2) for step in range(32))
"""What is tried for a drop."""
COUNTS = 8
"""How often the multiply–adds are counted to meet a budget."""
STEPS = (0.12, 0.08, 0.05)
"""How far around its present ratio each layer's curve is measured, round by round."""


@dataclass
class Plan:
    """What :func:`find_plan` found.

    Attributes:
        config: for :func:`tosa_convert.convert`.
        by, keep, budget: what was asked for.
        drop: its drop on the images, see :meth:`Search.drop`.
        cost: predicted share of the original's cost.
        predicted: error by the layers' curves, see :func:`~tosa_convert.measure.similarity.error`; a mean over the
            images weighted by one over the root of each one's level of error.
        measured: the same, measured.
        rivals: name → the same of the hand-made schedules at this budget.
        parts: "score × bypass" → error of a ramp, of the pairs that were tried.
        images: how many images.
    """

    config: ConvertConfig
    by: str
    keep: str
    budget: float
    drop: float
    cost: float
    predicted: float
    measured: float
    rivals: dict[str, float]
    parts: dict[str, float]
    images: int


class Search:
    """The steps of a search, which share the images, the reference outputs and the probe, a converted copy
    with all layers selective."""

    def __init__(
        self,
        model: nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor | None,
        keep: Keep | None,
        batch_size: int,
        progress: Progress,
    ):
        self.model, self.progress, self.task = model, progress, task_of(model)
        self.labels = None if labels is None else torch.cat([labels[::2], labels[1::2]])
        device = next(model.parameters()).device
        halves = [half.to(device).split(batch_size) for half in (images[::2], images[1::2]) if len(half)]
        self.fitted = len(halves[0])
        self.batches = [batch for half in halves for batch in half]
        self.wanted = [observe(model, batch) for batch in self.batches]
        self.keep = keep or default_keep(model)
        check_keep(model, self.keep, self.wanted[0])
        self.share_of = MacsShare(model)
        self.weights: list[torch.Tensor] = []
        self.shares: dict[tuple, float] = {}
        self.made: dict[float, dict[str, Ratios]] = {}

    def settle_on_parts(self, budget: float) -> None:
        """The pair of score and bypass that does best on a ramp."""
        pairs = self._pairs()
        found = {}
        with self.progress.track("scores and bypasses", len(pairs)) as advance:
            for pair in pairs:
                self._build(*pair)
                layers = self.probe.tosa_config.layers
                ratio = max(0.55, 1 - (1 - budget) * len(adapter_of(self.model).blocks) / len(layers))
                found[pair] = self.measure(ramp(layers, ratio), first_only=True)
                advance()
        self.parts = found
        self._build(*min(found, key=found.get))

    def _pairs(self) -> list[tuple[str, str]]:
        """Scores that need no training, and bypasses after which every token is there."""
        class_token = adapter_of(self.model).class_token
        scores = [
            name
            for name, part in every(Score).items()
            if not part.learns and (class_token or not part.needs_class_token)
        ]
        bypasses = [name for name, part in every(Bypass).items() if part.acts is Acts.AROUND]
        return [(score, bypass) for score in scores for bypass in bypasses]

    def _build(self, score: str, bypass: str) -> None:
        self.probe = convert(copy.deepcopy(self.model), score=score, bypass=bypass, schedule="all", ratio=0.5)
        self.layers = self.probe.tosa_config.layers

    def price(self, by: str, runtime: str) -> None:
        self.prices: Prices = price(self.probe, self.share_of, by, runtime, self.progress)

    def measure(self, ratios: Ratios, first_only: bool = False) -> float:
        """Mean error over the images, or those of the first batch."""
        return torch.cat(self._errors(ratios, first_only)).mean().item()

    def _errors(self, ratios: Ratios, first_only: bool = False) -> list[torch.Tensor]:
        """Per batch, the error of each image."""
        pairs = zip(self._observe(ratios, first_only), self.wanted, strict=not first_only)
        return [error(found, wanted, self.keep) for found, wanted in pairs]

    def _weigh(self, ratios: Ratios) -> None:
        """Let images with large errors, with these ratios, count less from here on: otherwise the few with the largest
        would decide the plan."""
        errors = self._errors(ratios)
        mean = torch.cat(errors).mean().clamp(min=1e-12)
        self.weights = [(mean / each.clamp(min=0.01 * mean.item())).sqrt() for each in errors]

    def _scores(self, ratios: Ratios) -> torch.Tensor:
        """(images,) weighted errors."""
        return torch.cat([each * weight for each, weight in zip(self._errors(ratios), self.weights, strict=True)])

    def _observe(self, ratios: Ratios, first_only: bool = False) -> list[Outputs]:
        set_ratios(self.probe, {layer: ratios.get(layer, 1.0) for layer in self.layers})
        return [observe(self.probe, batch) for batch in self.batches[: 1 if first_only else None]]

    def drop(self, ratios: Ratios) -> float:
        """What these ratios lose: with labels in the first metric of the model's task, such as top-1; without them of
        logits the share of images whose top-1 changes, otherwise the mean loss of what is to be kept, and of patch
        tokens and class token whichever is more."""
        found = self._observe(ratios)
        if self.labels is not None:
            outputs = (torch.cat([each.output for each in some]).cpu() for some in (self.wanted, found))
            main, metric = next(iter(self.task.metrics.items()))
            return metric.loss(*(self.task.measure(each, self.labels)[main].mean().item() for each in outputs))
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
        shapes = (fit(bent_ramp(self.layers, 0, bend), self.prices, budget) for bend in (1.5, 0.6, 0.0))
        ratios = next((found for found in shapes if found), None)
        return ratios is not None and self.drop(ratios) <= target

    def solve(self, budget: float) -> Plan:
        """The best ratios found within the budget."""
        ratios = self._best_start(budget)
        scores = self._scores(ratios)
        fitted = sum(map(len, self.batches[: self.fitted]))
        others = slice(fitted if len(scores) > fitted else 0, None)  # a single image judges itself
        predicted = scores.mean().item()
        beyond = self._share(ratios) - self.prices.total(ratios)
        for turn, step in enumerate(STEPS, start=1):
            found = curves(
                self.probe,
                ratios,
                step,
                self._judged(),
                self.keep,
                f"curves of each layer, round {turn}",
                self.progress,
            )
            there = allocate(found, self.prices, budget - beyond)
            new = self._scores(there)
            if _ahead(new[others], scores[others]):
                predicted = max(scores.mean().item() + predicted_change(found, there), 0.0)
                scores, ratios = new, there
        ratios = self._to_budget(ratios, budget)
        scores = self._scores(ratios)
        rivals = {name: self._scores(each).mean().item() for name, each in self._by_hand(budget).items()}
        chosen = {layer: ratio for layer, ratio in ratios.items() if self.prices.skips(ratio)}
        parts = self.probe.tosa_config
        return Plan(
            config=ConvertConfig(
                score=parts.score, bypass=parts.bypass, schedule="all", layers=list(chosen), ratio=list(chosen.values())
            ),
            by=self.prices.by,
            keep=self.keep.value,
            budget=budget,
            drop=self.drop(chosen),
            cost=self.prices.total(chosen),
            predicted=predicted,
            measured=scores.mean().item(),
            rivals=rivals,
            parts={" × ".join(pair): value for pair, value in self.parts.items()},
            images=len(scores),
        )

    def _judged(self) -> list[Judged]:
        """The first half of the images."""
        return list(zip(self.batches, self.wanted, self.weights, strict=True))[: self.fitted]

    def _best_start(self, budget: float) -> Ratios:
        """The plain ramp, or the first one that reaches the budget, unless another ramp or one of the schedules made by
        hand is clearly ahead."""
        ramps, by_hand = self._ramps(budget), self._by_hand(budget)
        plain = by_hand.get("ramp") or next(iter(ramps.values()))
        self._weigh(plain)
        candidates = {**ramps, **by_hand}
        found = {name: self._scores(each) for name, each in candidates.items()}
        best = min(found, key=lambda name: found[name].mean())
        start = candidates[best] if _ahead(found[best], self._scores(plain)) else plain
        return self._to_budget(start, budget)

    def _by_hand(self, budget: float) -> dict[str, Ratios]:
        """Schedules made by hand, at the budget."""
        if budget not in self.made:
            found = {name: self._to_budget(each, budget) for name, each in self._hand_made(budget).items()}
            whole = dict.fromkeys(self.layers, 1.0)
            self.made[budget] = {name: {**whole, **each} for name, each in found.items()}
        return self.made[budget]

    def _share(self, ratios: Ratios) -> float:
        """Of the original's cost; multiply–adds are counted, latencies go by the prices."""
        if self.prices.by != "macs":
            return self.prices.total(ratios)
        whole = {layer: ratios.get(layer, 1.0) for layer in self.layers}
        # Ratios at which as many tokens attend cost the same.
        key = tuple(keep_count(self.prices.patches, ratio_steps(ratio)) for ratio in whole.values())
        if key not in self.shares:
            self.shares[key] = self.share_of.of(set_ratios(self.probe, whole))
        return self.shares[key]

    def _to_budget(self, ratios: Ratios, budget: float) -> Ratios:
        """Up to the budget and not above it, by what is really counted: prices are shared out among layers and
        interpolated, and a price of error can leave some of the budget unspent."""
        if self.prices.by != "macs":
            return ratios
        ratios = {layer: round(ratio, 2) for layer, ratio in ratios.items()}
        per_hundredth = (self.prices.at(0.5) - self.prices.at(0.75)) / 25
        for turn in range(1, 1 + COUNTS):
            gap = budget - self._share(ratios)
            if 0 <= gap < 2 * per_hundredth or (gap > 0 and turn > COUNTS // 2):
                break
            # With few tokens a hundredth may change nothing, so what is over comes down faster each time.
            ratios = nudged(ratios, math.floor(gap / per_hundredth) * (turn if gap < 0 else 1))
        return ratios

    def _ramps(self, budget: float) -> dict[str, Ratios]:
        """Ramps that begin at different layers, bent differently, each as high as the budget allows."""
        count = len(self.layers)
        shapes = {
            f"from layer {self.layers[first]}, bent by {bend}": bent_ramp(self.layers, first, bend)
            for first in sorted({0, count // 4, count // 2})
            for bend in BENDS
        }
        found = {name: fit(shape, self.prices, budget) for name, shape in shapes.items()}
        if not any(found.values()):
            least = self.prices.total(dict.fromkeys(self.layers, FINE[-1]))
            if least >= 1:
                raise UsageError(
                    f"there is no gain in {self.prices.by} at this size: token selection takes longer than it saves; "
                    "try a larger --img-size, or --runtime onnx"
                )
            raise UsageError(
                f"budget {budget} is out of reach: by {self.prices.by} {self.probe.tosa_config.bypass} comes down to "
                f"{least:.2f}; give that or more"
            )
        return {name: ratios for name, ratios in found.items() if ratios}

    def _hand_made(self, budget: float) -> dict[str, Ratios]:
        shapes: dict[str, Callable[[float], Ratios]] = {
            "all layers alike": lambda ratio: dict.fromkeys(self.layers, ratio),
            "ramp": lambda ratio: ramp(self.layers, ratio),
            "every second layer": lambda ratio: dict.fromkeys(self.layers[1::2], ratio),
        }
        found = {name: fit(shape, self.prices, budget) for name, shape in shapes.items()}
        return {name: ratios for name, ratios in found.items() if ratios}


def _ahead(scores: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether the first errors, image by image, are lower by more than twice the standard error of the difference:
    crops of one photo are similar, so one standard error would be too little."""
    gain = others - scores
    spread = gain.std() / len(gain) ** 0.5 if len(gain) > 1 else gain.new_zeros(())
    return (gain.mean() > 2 * spread).item()
