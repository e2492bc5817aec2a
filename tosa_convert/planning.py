"""Find score, bypass and keep ratios for a budget, without training.

Skipping in one layer makes skipping in the next cheaper, since tokens that shared an update have become more
alike; so layers are not judged one by one. On a few dozen pictures a family of ramps is measured whole, each
of them at the budget. Around the best one the curve of error over ratio is measured for each layer, with all
other layers as they are, and the ratios that make the predicted error least under the budget are the next
point to look around from, as long as what is measured there gets better.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from tosa_convert.allocation import FINE, Ratios, allocate, bent_ramp, fit, nudged, ramp
from tosa_convert.config import ConvertConfig
from tosa_convert.errors import UsageError
from tosa_convert.fidelity import Outputs, error, figures, observe
from tosa_convert.hosts import host_of
from tosa_convert.macs import count_macs
from tosa_convert.prices import Prices, price
from tosa_convert.progress import Progress
from tosa_convert.surgery import convert, is_converted, set_ratios

SCORES = ("similarity", "class_attention", "norm", "random")
BYPASSES = ("merge", "borrow", "identity")
BENDS = (0.0, 0.6, 1.0, 1.5, 2.2)
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
        by, budget: what was asked for.
        drop: what it loses on the pictures, see :meth:`Search.drop`.
        cost: predicted share of the original's cost.
        predicted: error by the layers' curves, see :func:`tosa_convert.fidelity.error`; a mean over the pictures
            in which each counts alike, whatever its own level of error.
        measured: the same, measured.
        rivals: name → the same of the hand-made schedules at this budget.
        parts: "score × bypass" → error of a ramp, of the pairs that were tried.
        images: how many pictures.
    """

    config: ConvertConfig
    by: str
    budget: float
    drop: float
    cost: float
    predicted: float
    measured: float
    rivals: dict[str, float]
    parts: dict[str, float]
    images: int


def plan(model: nn.Module, images: torch.Tensor, budget: float | None = None, **options) -> ConvertConfig:
    """The best training-free conversion of a model for a budget; see :func:`find_plan` for the options."""
    return find_plan(model, images, budget, **options).config


def find_plan(
    model: nn.Module,
    images: torch.Tensor,
    budget: float | None = None,
    *,
    target_drop: float | None = None,
    labels: torch.Tensor | None = None,
    by: str = "macs",
    runtime: str = "eager",
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Plan:
    """Search a conversion whose cost is at most ``budget`` and whose outputs stay nearest to the original's.

    Args:
        model: not converted; it is left as it is.
        images: (B, C, H, W), a few dozen, preprocessed, of the size that the model is to be used at.
        budget: share of the original's multiply–adds, or of its latency, in (0, 1); 0.75 if nothing is given.
        target_drop: in place of a budget: the cheapest plan that loses at most this, see :meth:`Search.drop`.
        labels: (B,) of the images, for ``target_drop``.
        by: "macs" or "latency", measured here, batch 1, one thread.
        runtime: "eager" or "onnx", for the latency.

    Raises:
        UsageError: a model that is converted already, or a budget or drop that cannot be reached.
    """
    if is_converted(model):
        raise UsageError("this model is converted already; plan for original(model)")
    if budget is not None and target_drop is not None:
        raise UsageError("a budget and a target drop are both given; keep one of them")
    budget = 0.75 if budget is None else budget
    if not 0 < budget < 1:
        raise UsageError(f"budget {budget} is out of range; give a share of the original's cost such as 0.75")
    if target_drop is not None and not 0 <= target_drop < 1:
        raise UsageError(f"target drop {target_drop} is out of range; give a share such as 0.01")
    if images.ndim != 4 or not len(images):
        raise UsageError(f"images of shape {tuple(images.shape)} are no batch of pictures; give (B, C, H, W)")
    if by not in ("macs", "latency"):
        raise UsageError(f"by {by!r} is not known; choose macs or latency")
    training = model.training
    try:
        search = Search(model.eval(), images, labels, batch_size, progress or Progress())
        search.settle_on_parts(budget)
        search.price(by, runtime)
        return search.solve(budget) if target_drop is None else search.solve_for(target_drop)
    finally:
        model.train(training)


class Search:
    """The steps of a search, which share the pictures, the reference outputs and the probe, a converted copy
    with all layers selective."""

    def __init__(
        self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor | None, batch_size: int, progress: Progress
    ):
        self.model, self.labels, self.progress = model, labels, progress
        device = next(model.parameters()).device
        self.batches = [batch.to(device) for batch in images.split(batch_size)]
        self.wanted = [observe(model, batch) for batch in self.batches]
        self.count = len(images)
        self.whole = count_macs(model)
        self.weights: list[torch.Tensor] | None = None

    def settle_on_parts(self, budget: float) -> None:
        """The pair of score and bypass that does best on a ramp."""
        pairs = [(score, bypass) for score in SCORES for bypass in BYPASSES if self._fits(score)]
        found = {}
        with self.progress.track("scores and bypasses", len(pairs)) as advance:
            for pair in pairs:
                self._build(*pair)
                layers = self.probe.tosa_config.layers
                ratio = max(0.55, 1 - (1 - budget) * len(host_of(self.model).blocks) / len(layers))
                found[pair] = self.measure(ramp(layers, ratio), first_only=True)
                advance()
        self.parts = found
        self._build(*min(found, key=found.get))

    def _fits(self, score: str) -> bool:
        return score != "class_attention" or host_of(self.model).class_token

    def _build(self, score: str, bypass: str) -> None:
        self.probe = convert(copy.deepcopy(self.model), score=score, bypass=bypass, schedule="all", ratio=0.5)
        self.layers = self.probe.tosa_config.layers

    def price(self, by: str, runtime: str) -> None:
        self.prices: Prices = price(self.probe, by, runtime, self.progress)

    def measure(self, ratios: Ratios, first_only: bool = False) -> float:
        """Mean error over the pictures, or those of the first batch."""
        return torch.cat(self._errors(ratios, first_only)).mean().item()

    def _errors(self, ratios: Ratios, first_only: bool = False) -> list[torch.Tensor]:
        """Per batch, the error of each picture."""
        pairs = zip(self._observe(ratios, first_only), self.wanted, strict=not first_only)
        return [error(found, wanted) for found, wanted in pairs]

    def _weigh(self, ratios: Ratios) -> None:
        """Let every picture count alike from here on, whatever its error with these ratios: else a plan would be made
        for the few pictures with the largest."""
        errors = self._errors(ratios)
        mean = torch.cat(errors).mean().clamp(min=1e-12)
        self.weights = [mean / each.clamp(min=0.1 * mean.item()) for each in errors]

    def _weighed(self, errors: torch.Tensor, batch: int) -> torch.Tensor:
        return errors if self.weights is None else errors * self.weights[batch]

    def _score(self, ratios: Ratios) -> float:
        """Mean of the weighed errors."""
        errors = [self._weighed(each, batch) for batch, each in enumerate(self._errors(ratios))]
        return torch.cat(errors).mean().item()

    def _observe(self, ratios: Ratios, first_only: bool = False) -> list[Outputs]:
        set_ratios(self.probe, {layer: ratios.get(layer, 1.0) for layer in self.layers})
        return [observe(self.probe, batch) for batch in self.batches[: 1 if first_only else None]]

    def drop(self, ratios: Ratios) -> float:
        """What these ratios lose: with labels top-1, of another classifier the share of pictures whose top-1 changes,
        otherwise 1 − cosine of patch tokens or of the class token, whichever is more."""
        found = self._observe(ratios)
        if self.labels is not None:
            before, after = (torch.cat([each.output for each in outputs]) for outputs in (self.wanted, found))
            right = [(each.argmax(-1).cpu() == self.labels).float().mean().item() for each in (before, after)]
            return right[0] - right[1]
        compared = [figures(*pair) for pair in zip(found, self.wanted, strict=True)]
        names = ("agreement",) if "agreement" in compared[0] else ("patch", "class")
        means = [torch.cat([each[name] for each in compared]).mean().item() for name in names if name in compared[0]]
        return 1 - min(means)

    def solve_for(self, target: float) -> Plan:
        """The plan at the lowest budget that stays within a drop; above it while the plan itself does not."""
        budget = self._budget_for(target)
        step = 0.04
        while (found := self.solve(budget)).drop > target and budget < BUDGETS[0]:
            budget, step = min(BUDGETS[0], round(budget + step, 2)), 2 * step
        if found.drop > target:
            raise UsageError(f"no plan loses as little as {target} on these pictures; allow a larger --target-drop")
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
            raise UsageError(f"no plan loses as little as {target} on these pictures; allow a larger --target-drop")
        return BUDGETS[first - 1]

    def _within(self, target: float, budget: float) -> bool:
        shapes = (fit(bent_ramp(self.layers, 0, bend), self.prices, budget) for bend in (1.5, 0.6, 0.0))
        ratios = next((found for found in shapes if found), None)
        return ratios is not None and self.drop(ratios) <= target

    def _vary(self, base: Ratios, variants: list[tuple[int, float]], what: str) -> dict[tuple[int, float], float]:
        """Mean error of ``base`` with one layer's ratio changed, for each variant."""
        sums = dict.fromkeys(variants, 0.0)
        base = {layer: base.get(layer, 1.0) for layer in self.layers}
        with self.progress.track(what, len(self.batches) * len(variants)) as advance:
            for index, (batch, wanted) in enumerate(zip(self.batches, self.wanted, strict=True)):
                set_ratios(self.probe, base)
                inputs = self._inputs(batch)
                for layer, ratio in variants:
                    set_ratios(self.probe, {**base, layer: ratio})
                    with self._resumed(inputs, layer):
                        errors = error(observe(self.probe, batch), wanted)
                    sums[layer, ratio] += self._weighed(errors, index).sum().item()
                    advance()
        return {variant: value / self.count for variant, value in sums.items()}

    def _inputs(self, batch: torch.Tensor) -> dict[int, torch.Tensor]:
        """What enters each layer."""
        caught, handles = {}, []
        for layer, block in enumerate(host_of(self.probe).blocks, start=1):
            handles.append(block.register_forward_pre_hook(_Catch(caught, layer)))
        observe(self.probe, batch)
        for handle in handles:
            handle.remove()
        return caught

    @contextmanager
    def _resumed(self, inputs: dict[int, torch.Tensor], layer: int) -> Iterator[None]:
        """Within this block the layers before ``layer`` cost nothing: they give what they gave before. Not where a
        scorer listens to them."""
        skipped = [] if self.probe.tosa_config.listens_before else host_of(self.probe).blocks[: layer - 1]
        for block in skipped:
            block.forward = lambda *args, **kwargs: inputs[layer]
        try:
            yield
        finally:
            for block in skipped:
                del block.forward

    def solve(self, budget: float) -> Plan:
        """The best ratios found within the budget."""
        ramps, by_hand = self._ramps(budget), self._hand_made(budget)
        self._weigh(next(iter(ramps.values())))
        ratios = self._to_budget(min(ramps.values(), key=self._score), budget)
        predicted = score = self._score(ratios)
        for turn, step in enumerate(STEPS, start=1):
            guess, there = self._improve(score, ratios, step, budget, turn)
            there = self._to_budget(there, budget)
            found = self._score(there)
            if found < score:
                predicted, score, ratios = guess, found, there
        rivals = {name: self._score(ratios) for name, ratios in by_hand.items()}
        chosen = {layer: ratio for layer, ratio in ratios.items() if ratio < 1}
        parts = self.probe.tosa_config
        return Plan(
            config=ConvertConfig(
                score=parts.score, bypass=parts.bypass, schedule="all", layers=list(chosen), ratio=list(chosen.values())
            ),
            by=self.prices.by,
            budget=budget,
            drop=self.drop(chosen),
            cost=self.prices.total(chosen),
            predicted=predicted,
            measured=score,
            rivals=rivals,
            parts={" × ".join(pair): value for pair, value in self.parts.items()},
            images=self.count,
        )

    def _to_budget(self, ratios: Ratios, budget: float) -> Ratios:
        """Up to the budget and not above it, by what is really counted: prices are shared out among layers and
        interpolated, and a price of error can leave some of the budget unspent."""
        if self.prices.by != "macs":
            return ratios
        per_hundredth = (self.prices.at(0.5) - self.prices.at(0.75)) / 25
        for turn in range(1, 1 + COUNTS):
            gap = budget - count_macs(set_ratios(self.probe, ratios)) / self.whole
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
                    f"there is no gain in {self.prices.by} at this size: choosing tokens takes longer than they would; "
                    "try a larger --img-size, or --runtime onnx"
                )
            raise UsageError(
                f"budget {budget} is out of reach: by {self.prices.by} {self.probe.tosa_config.bypass} comes down to "
                f"{least:.2f}; ask for that or more"
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

    def _improve(self, score: float, ratios: Ratios, step: float, budget: float, turn: int) -> tuple[float, Ratios]:
        """The predicted error and the ratios of the best neighbour, no layer further away than ``step``."""
        around = {
            layer: sorted({max(FINE[-1], round(ratio - step, 2)), min(1.0, round(ratio + step, 2))} - {ratio})
            for layer, ratio in ratios.items()
        }
        variants = [(layer, ratio) for layer, others in around.items() for ratio in others]
        found = self._vary(ratios, variants, f"curves of each layer, round {turn}")
        curves = {}
        for layer, others in around.items():
            points = [(ratios[layer], 0.0), *((ratio, found[layer, ratio] - score) for ratio in others)]
            lowest, highest = min(others[0], ratios[layer]), max(others[-1], ratios[layer])
            options = np.array([ratio for ratio in FINE if lowest <= ratio <= highest])
            curves[layer] = options, np.polyval(np.polyfit(*zip(*points, strict=True), len(points) - 1), options)
        there = allocate(curves, self.prices, budget)
        change = sum(float(curve[options.tolist().index(there[layer])]) for layer, (options, curve) in curves.items())
        return max(score + change, 0.0), there


class _Catch:
    def __init__(self, caught: dict, layer: int):
        self.caught, self.layer = caught, layer

    def __call__(self, module, inputs) -> None:
        self.caught[self.layer] = inputs[0]
