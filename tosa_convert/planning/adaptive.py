"""From a plan's numbers of tokens to thresholds: each image keeps as many tokens as it needs, and the mean over the
images costs what the plan does.

At each layer the threshold is the value below which as large a share of all patches of all images falls as the plan
skips there, found in one forward pass, since what a layer sees depends on what the layers before it did.
"""

import functools
import math
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tosa_convert.base.errors import UsageError
from tosa_convert.measure.similarity import error, observe
from tosa_convert.methods.score import Score
from tosa_convert.planning.mean_macs import NEAR, check_differing, for_each, with_all_at
from tosa_convert.planning.outcome import Plan, Spread
from tosa_convert.planning.search import Search
from tosa_convert.planning.trial import ahead, typical
from tosa_convert.selective.conversion import convert, light_copy
from tosa_convert.selective.selection import Selection, selective_blocks

COUNTS = 6
"""How often the multiply–adds are counted to meet the budget, each time over all images."""
DIGITS = 6


def adapted(
    search: Search, plan: Plan, best: Plan, most: float | None = None, target_drop: float | None = None
) -> Plan:
    """A plan with thresholds in place of numbers, at the same mean multiply–adds over the images of the search; the
    best one with numbers where that is not clearly ahead of it, or loses more than it may. On some models images differ
    little in what they need.

    Args:
        best: the plan itself, or a published method that is ahead of it.
        most: share of the original's multiply–adds that no image may exceed.
        target_drop: how much may be lost.

    Raises:
        UsageError: too few images to learn from how they differ, or a bound below the budget.
    """
    images = torch.cat(search.batches)
    fixed = convert(light_copy(search.model), best.config)
    budget = search.share_of.of(convert(light_copy(search.model), plan.config))
    check_adaptive(images, budget, most)
    wanted = observe(search.model, images)

    def errors_of(model: nn.Module) -> torch.Tensor:
        # Not compared by their roots as in the search: which images get more tokens is the point.
        return error(observe(model, images), wanted, search.keep)

    before, found = errors_of(fixed), dict[float, tuple[nn.Module, Spread, torch.Tensor]]()
    for variant in ({}, *plan.config.part(Score).any_number_variants):
        thresholds = _Thresholds(search, plan, images, variant)
        caps = thresholds.capped(most) if most is not None else None
        with suppress(UsageError):  # it does not come down to the budget on these images
            converted, spread = thresholds.at(budget, caps)
            after = errors_of(converted)
            found[after.mean().item()] = converted, spread, after
    if not found:
        return best
    measured, (converted, spread, after) = min(found.items(), key=lambda item: item[0])
    drop = search.lost([observe(converted, batch) for batch in search.batches])
    if not ahead(after, before) or (target_drop is not None and drop > target_drop):
        return replace(best, rivals={**best.rivals, "as many tokens as each image needs": typical(after)})
    return replace(
        plan,
        config=converted.tosa_config,
        cost=spread.mean,
        drop=drop,
        measured=measured,
        rivals={"as many tokens for every image": before.mean().item()},
        spread=spread,
    )


def check_adaptive(images: torch.Tensor, budget: float | None, most: float | None) -> None:
    """
    Raises:
        UsageError: too few images to learn from how they differ, or a bound below the budget.
    """
    check_differing(images)
    if most is not None and not 0 < most <= 1:
        raise UsageError(f"--max-macs {most:g} is out of range; give a share of the original's such as 0.9")
    if most is not None and budget is not None and most <= budget:
        raise UsageError(
            f"no image may take more than {most:g} of the MACs, and their mean is to be {budget:.3f}; raise --max-macs "
            "above the budget"
        )


class _Thresholds:
    """Thresholds for a plan's layers on some images.

    Args:
        images: (B, C, H, W).
        variant: options of the score.
    """

    def __init__(self, search: Search, plan: Plan, images: torch.Tensor, variant: dict[str, Any]):
        self.search, self.images, self.config, self.variant = search, images, plan.config, variant
        ratios = plan.config.ratio if isinstance(plan.config.ratio, list) else [plan.config.ratio]
        layers = plan.config.layers or []
        self.ratios = dict(zip(layers, ratios * (len(layers) if len(ratios) == 1 else 1), strict=True))

    def at(self, budget: float, caps: dict[int, float] | None) -> tuple[nn.Module, Spread]:
        """A conversion whose mean over the images is at most the budget, and close to it."""
        factor, low, high, best = 1.0, 0.0, None, None
        with self.search.progress.track("thresholds", COUNTS) as advance:
            for _ in range(COUNTS):
                converted = self._calibrated(factor, caps)
                shares = self.search.share_of.of_each(converted, self.images)
                mean = sum(shares) / len(shares)
                advance(f"{mean:.3f} of the MACs")
                if mean <= budget:
                    high, best = factor, (converted, shares)
                    if mean > budget - NEAR:
                        break
                else:
                    low = factor
                # What is skipped grows nearly in proportion.
                factor = factor * (1 - budget + NEAR / 4) / max(1 - mean, 1e-6)
                if high is not None and not low < factor < high:
                    factor = (low + high) / 2
        if best is None:
            raise UsageError(f"the thresholds do not come down to a mean of {budget:.3f} of the MACs on these images")
        converted, shares = best
        each = torch.tensor(shares)
        bound = self._bound(converted)
        spread = Spread(each.mean().item(), each.std().item(), min(shares), max(shares), bound)
        return converted, spread

    def capped(self, most: float) -> dict[int, float]:
        """Layer → the largest share of patches that may attend, so that no image takes more than ``most``."""
        low, high = 0.0, 1.0  # how much of what the plan skips is skipped at least
        for _ in range(8):
            middle = (low + high) / 2
            if self._bound(self._converted(self._caps(middle))) <= most:
                high = middle
            else:
                low = middle
        return self._caps(high)

    def _caps(self, part: float) -> dict[int, float]:
        return {layer: round(1 - part * (1 - ratio), 4) for layer, ratio in self.ratios.items()}

    def _bound(self, converted: nn.Module) -> float:
        """What an image takes all of whose tokens are above all thresholds."""
        return with_all_at(-math.inf, converted, self.images, self.search.share_of)

    def _converted(self, caps: dict[int, float] | None, thresholds: dict[int, float] | None = None) -> nn.Module:
        layers = list(self.ratios)
        options: dict[str, Any] = (
            self.config.model_dump()
            | self.variant
            | {
                "ratio": [1.0 if caps is None else caps[layer] for layer in layers],
                "threshold": for_each(layers, thresholds or {}),
            }
        )
        if caps is None:
            options["ratio"] = 1.0
        return convert(light_copy(self.search.model), **options)

    @torch.no_grad()
    def _calibrated(self, factor: float, caps: dict[int, float] | None) -> nn.Module:
        """A conversion whose layers skip ``factor`` times the share of the images' patches that the plan's do."""
        probe, found = self._converted(caps), dict[int, float]()
        for block in selective_blocks(probe):
            selection: Selection = block.selection
            kept = 1 - min(1.0, factor * (1 - self.ratios[selection.layer]))
            selection.threshold_for = functools.partial(_quantile, selection, kept, found)  # type: ignore[method-assign]
        observe(probe, self.images)
        return self._converted(caps, found)


def _quantile(selection: Selection, kept: float, found: dict[int, float], worth: torch.Tensor) -> float:
    """A value that so large a share of all patches of all images exceeds, (B, N); noted by layer."""
    values = worth[:, selection.prefix :].flatten().sort(descending=True).values.tolist()
    count = min(len(values), max(1, round(kept * len(values))))
    above, below = values[count - 1], values[count] if count < len(values) else values[-1] - 1.0
    # Half-way, so that rounding turns no choice; some always attend, with an infinite value.
    middle = below + 1.0 if above == float("inf") else (above + below) / 2
    found[selection.layer] = float(f"{middle:.{DIGITS}g}")
    return found[selection.layer]
