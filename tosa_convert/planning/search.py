"""The search for score, bypass and keep ratios.

Skipping in one layer makes skipping in the next cheaper, since tokens that shared an update have become more alike; so
layers are not judged one by one. What differs most from model to model is where to begin, and then how fast the ratios
fall: ramps that begin at different layers and are bent differently are measured whole, each of them at the budget, on a
few images; the better ones on more, and the neighbours of the best. What comes before the layer at which a candidate
begins is not computed again.

What fits a few dozen images need not fit others, so nothing is preferred to a plain ramp that is not ahead of it by
more than twice the standard error of the difference.
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
from tosa_convert.planning.allocation import FINE, Ratios, bent_ramp, fit, nudged, ramp
from tosa_convert.planning.cost_model import Prices, price
from tosa_convert.planning.resuming import Entering, catching, resumed
from tosa_convert.planning.trial import Trial, ahead
from tosa_convert.selective.conversion import convert, set_ratios
from tosa_convert.tasks.task import task_of

STARTS = (0.0, 0.17, 0.34, 0.5, 0.67)
"""Where ramps begin, as shares of the layers."""
BENDS = (0.0, 0.6, 1.0, 1.7)
"""Exponents of the ramps that are tried; 0 is all layers alike."""
BUDGETS = tuple(round(0.98 - 0.02 * step, 2) for step in range(32))
"""What is tried for a drop."""
COUNTS = 8
"""How often the multiply–adds are counted to meet a budget."""
PLAIN = "ramp"


@dataclass
class Plan:
    """What :func:`find_plan` found.

    Attributes:
        config: for :func:`tosa_convert.convert`.
        by, keep, budget: what was asked for.
        drop: its drop on the images, see :meth:`Search.drop`.
        cost: predicted share of the original's cost.
        measured: its error on the images, see :func:`~tosa_convert.measure.similarity.error`; a mean weighted by one
            over the root of each image's level of error.
        rivals: name → the same of the plain ramp at this budget.
        parts: "score × bypass" → error of a ramp, of the pairs that were tried.
        images: how many images.
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
        device, count = next(model.parameters()).device, len(images)
        # Each batch is spread over all images: neighbours may be crops of one photo.
        parts = -(-count // batch_size)
        order = torch.cat([torch.arange(part, count, parts) for part in range(parts)])
        self.labels = None if labels is None else labels[order]
        self.batches = [images[order[order % parts == part]].to(device) for part in range(parts)]
        depth = len(adapter_of(model).blocks)
        self.starts = sorted({round(share * depth) for share in STARTS})
        self.wanted: list[Outputs] = []
        self.entering: list[Entering] = []
        for batch in self.batches:
            with catching(model, [start + 1 for start in self.starts]) as entering:
                self.wanted.append(observe(model, batch))
            self.entering.append(entering)
        self.keep = keep or default_keep(model)
        check_keep(model, self.keep, self.wanted[0])
        self.share_of = MacsShare(model)
        self.weights: list[torch.Tensor] = []
        self.shares: dict[tuple, float] = {}

    def settle_on_parts(self, budget: float) -> None:
        """The pair of score and bypass that does best on a ramp, over all layers or over the second half of them."""
        scores, bypasses = self._scores_and_bypasses()
        lead = next((name for name in scores if every(Score)[name].finds_partners), scores[0])
        self.parts: dict[tuple[str, str], float] = {}
        with self.progress.track("scores and bypasses", len(scores) + len(bypasses) - 1) as advance:

            def best_of(pairs: list[tuple[str, str]]) -> tuple[str, str]:
                for pair in pairs:
                    self.parts[pair] = self._of_ramps(*pair, budget)
                    advance(" × ".join(min(self.parts, key=self.parts.__getitem__)))
                return min(self.parts, key=self.parts.__getitem__)

            _, bypass = best_of([(lead, bypass) for bypass in bypasses])
            score, bypass = best_of([(score, bypass) for score in scores if score != lead])
        self._build(score, bypass)

    def _of_ramps(self, score: str, bypass: str, budget: float) -> float:
        """The least error of two ramps that skip about as much as the budget asks for, on the first images."""
        self._build(score, bypass)
        found, depth = [], len(adapter_of(self.model).blocks)
        for first in (0, len(self.layers) // 2):
            lowest = max(0.2, 1 - 2 * (1 - budget) * depth / (len(self.layers) - first))
            ratios = bent_ramp(self.layers, first, 1.0)(lowest)
            found.append(self._error(ratios, 0).mean().item())
        return min(found)

    def _scores_and_bypasses(self) -> tuple[list[str], list[str]]:
        """Scores that need no training and can do any ratio, and bypasses after which every token is there."""
        class_token = adapter_of(self.model).class_token
        scores = [
            name
            for name, part in every(Score).items()
            if not part.learns and not part.least and (class_token or not part.needs_class_token)
        ]
        return scores, [name for name, part in every(Bypass).items() if part.acts is Acts.AROUND]

    def _build(self, score: str, bypass: str) -> None:
        self.probe = convert(copy.deepcopy(self.model), score=score, bypass=bypass, schedule="all", ratio=0.5)
        self.layers = self.probe.tosa_config.layers

    def price(self, by: str, runtime: str) -> None:
        self.prices: Prices = price(self.probe, self.share_of, by, runtime, self.progress)

    def measure(self, ratios: Ratios) -> float:
        """Mean error over the images."""
        return torch.cat([self._error(ratios, part) for part in range(len(self.batches))]).mean().item()

    def _observe(self, ratios: Ratios, part: int) -> Outputs:
        """What a batch gives with these ratios."""
        set_ratios(self.probe, {layer: ratios.get(layer, 1.0) for layer in self.layers})
        first = next((layer for layer in self.layers if ratios.get(layer, 1.0) < 1), self.layers[-1])
        with resumed(self.probe, self.entering[part], first):
            return observe(self.probe, self.batches[part])

    def _error(self, ratios: Ratios, part: int) -> torch.Tensor:
        """The error of each image of a batch."""
        return error(self._observe(ratios, part), self.wanted[part], self.keep)

    def _weigh(self, ratios: Ratios) -> list[torch.Tensor]:
        """Let images with large errors, with these ratios, count less from here on: otherwise the few with the largest
        would decide the plan. Gives the weighted errors of these ratios, per batch."""
        errors = [self._error(ratios, part) for part in range(len(self.batches))]
        mean = torch.cat(errors).mean().clamp(min=1e-12)
        self.weights = [(mean / each.clamp(min=0.01 * mean.item())).sqrt() for each in errors]
        return [each * weights for each, weights in zip(errors, self.weights, strict=True)]

    def _weighted_mean(self, errors: list[torch.Tensor]) -> float:
        return torch.cat([each * weights for each, weights in zip(errors, self.weights, strict=True)]).mean().item()

    def drop(self, ratios: Ratios) -> float:
        """What these ratios lose: with labels in the first metric of the model's task, such as top-1; without them of
        logits the share of images whose top-1 changes, otherwise the mean loss of what is to be kept, and of patch
        tokens and class token whichever is more."""
        return self._lost([self._observe(ratios, part) for part in range(len(self.batches))])

    def _lost(self, found: list[Outputs]) -> float:
        """:meth:`drop` of what the batches gave."""
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
        candidates = self._ramps(budget)
        plain = candidates.get(PLAIN) or next(iter(candidates.values()))
        trial = Trial(self._weighted, len(self.batches), self.progress)
        for part, errors in enumerate(self._weigh(plain)):
            trial.found[PLAIN, part] = errors
        best = trial.halve({**candidates, PLAIN: plain}, PLAIN, "ramps")
        near = {name: fitted for name, shape in self._near(best).items() if (fitted := fit(shape, self.prices, budget))}
        best = trial.halve({**near, best: candidates.get(best, plain), PLAIN: plain}, PLAIN, "ramps near the best")
        ratios = trial.candidates[best] if ahead(trial.scores(best), trial.scores(PLAIN)) else plain
        ratios = self._to_budget(ratios, budget)
        whole = dict.fromkeys(self.layers, 1.0)
        chosen = {layer: ratio for layer, ratio in ratios.items() if self.prices.skips(ratio)}
        found = [self._observe(ratios, part) for part in range(len(self.batches))]
        measured = self._weighted_mean([error(*pair, self.keep) for pair in zip(found, self.wanted, strict=True)])
        rival = self._to_budget({**whole, **plain}, budget)
        same = rival == ratios
        by_rival = measured if same else self._weighted_mean([self._error(rival, p) for p in range(len(found))])
        parts = self.probe.tosa_config
        return Plan(
            config=ConvertConfig(
                score=parts.score, bypass=parts.bypass, schedule="all", layers=list(chosen), ratio=list(chosen.values())
            ),
            by=self.prices.by,
            keep=self.keep.value,
            budget=budget,
            drop=self._lost(found),
            cost=self.prices.total(chosen),
            measured=measured,
            rivals={PLAIN: by_rival},
            parts={" × ".join(pair): value for pair, value in self.parts.items()},
            images=sum(map(len, self.batches)),
        )

    def _weighted(self, ratios: Ratios, part: int) -> torch.Tensor:
        return self._error(ratios, part) * self.weights[part]

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
        """Ramps that begin at different layers, bent differently, and the plain one: as high as the budget allows."""
        firsts = {min(start, len(self.layers) - 1) for start in self.starts}
        shapes = {_ramp_name(first, bend): self._shape(first, bend) for first in sorted(firsts) for bend in BENDS}
        shapes[PLAIN] = lambda ratio: ramp(self.layers, ratio)
        self.shapes = {_ramp_name(first, bend): (first, bend) for first in firsts for bend in BENDS} | {PLAIN: (0, 1.0)}
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

    def _near(self, name: str) -> dict[str, Callable[[float], Ratios]]:
        """Shapes that begin a layer earlier or later than a ramp, or are bent a little more or less."""
        first, bend = self.shapes[name]
        near = [(first - 1, bend), (first + 1, bend), *((first, max(0.0, bend + by)) for by in (-0.4, -0.2, 0.25, 0.5))]
        near = [each for each in near if 0 <= each[0] < len(self.layers) and each not in self.shapes.values()]
        self.shapes |= {_ramp_name(*each): each for each in near}
        return {_ramp_name(*each): self._shape(*each) for each in near}

    def _shape(self, first: int, bend: float) -> Callable[[float], Ratios]:
        return bent_ramp(self.layers, first, bend)


def _ramp_name(first: int, bend: float) -> str:
    return f"from layer {first + 1}, bent by {bend:g}"
