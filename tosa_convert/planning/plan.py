"""Find score, bypass and keep ratios for a budget, without training."""

from dataclasses import replace
from math import inf
from typing import Any

import torch
from torch import nn

from tosa_convert.base.errors import UsageError
from tosa_convert.base.progress import Progress
from tosa_convert.config.conversion import ConvertConfig
from tosa_convert.data.sampling import check_batch
from tosa_convert.models.modes import evaluating
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.planning.adaptive import adapted, check_adaptive
from tosa_convert.planning.cost_model import Conditions
from tosa_convert.planning.latency import share_for, within_latency
from tosa_convert.planning.outcome import Plan
from tosa_convert.planning.rivals import against_published
from tosa_convert.planning.search import Search
from tosa_convert.planning.settling import settle_on_parts
from tosa_convert.selective.conversion import is_converted

BUDGET = 0.75
"""Share of the original's cost, where none is given."""


def plan(model: nn.Module, images: torch.Tensor, budget: float | None = None, **options: Any) -> ConvertConfig:
    """The best training-free conversion of a model for a budget; see :func:`find_plan` for the options."""
    return find_plan(model, images, budget, **options).config


def find_plan(
    model: nn.Module,
    images: torch.Tensor,
    budget: float | None = None,
    *,
    target_drop: float | None = None,
    labels: torch.Tensor | None = None,
    keep: str | None = None,
    by: str = "macs",
    conditions: Conditions | None = None,
    target_ms: float | None = None,
    segment: int | None = None,
    adaptive: bool = False,
    max_macs: float | None = None,
    batch_size: int = 6,
    progress: Progress | None = None,
) -> Plan:
    """Search a conversion whose cost is at most ``budget`` and whose outputs stay closest to the original's.

    Args:
        model: not converted; it is left as it is.
        images: (B, C, H, W), a few dozen, preprocessed, of the size that the model is to be used at.
        budget: share of the original's multiply–adds, or of its latency, in (0, 1); 0.75 if neither is given.
        target_drop: in place of a budget: find the cheapest plan with at most this drop, see :meth:`Search.drop`.
        labels: (B,) of the images, for ``target_drop``.
        batch_size: images that are measured at once.
        keep: what is to stay as it is: "logits" of a classifier, "patches" (patch tokens and class token), "pooled"
            features or the embedding, or a dense head's "map". None is logits for classifiers and patches otherwise.
        by: "macs" or "latency", measured here; the plan itself is measured, too, and corrected until it is within
            5 % of the budget.
        conditions: under which the latency is measured; None: torch eager, float32, batch 1, one thread.
        target_ms: in place of a budget: milliseconds per forward pass; by latency.
        segment: how many layers in a row share one choice; None is 1 for a budget of MACs, and searched for a latency.
        adaptive: let each image keep as many tokens as it needs; the budget is then the mean over the images. Where
            that is not clearly ahead of numbers on these images the plan keeps numbers: its ``spread`` is then None.
        max_macs: share of the original's multiply–adds that no image may exceed, with ``adaptive``.

    Raises:
        UsageError: a model that is converted already, a budget or drop that cannot be reached, or a latency at which
            the model would be no faster than it is.
    """
    if is_converted(model):
        raise UsageError("this model is converted already; name the original model (in Python original(model))")
    limits = {"a budget": budget, "a target drop": target_drop, "a target in ms": target_ms}
    given = [name for name, value in limits.items() if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} are both given; keep one of them")
    if target_ms is not None and not 0 < target_ms < inf:
        raise UsageError(f"target {target_ms:g} ms is out of range; give milliseconds per forward pass such as 25")
    by = "latency" if target_ms is not None else by
    conditions = conditions or Conditions()
    conditions = conditions if conditions.device else replace(conditions, device=next(model.parameters()).device.type)
    conditions.check(timed=by == "latency")
    if by == "latency" and adaptive:
        raise UsageError("an adaptive plan has a budget of MACs; leave adaptive or the latency out")
    budget = BUDGET if budget is None else budget
    if not 0 < budget < 1:
        raise UsageError(f"budget {budget} is out of range; give a share of the original's cost such as 0.75")
    if target_drop is not None and not 0 <= target_drop < 1:
        raise UsageError(f"target drop {target_drop} is out of range; give a share such as 0.01")
    check_batch(images, preprocessing_of(model))
    if by not in ("macs", "latency"):
        raise UsageError(f"by {by!r} is not known; choose macs or latency")
    if segment is not None and segment < 1:
        raise UsageError(f"segment {segment} is out of range; give 1 layer or more")
    if max_macs is not None and not adaptive:
        raise UsageError("max-macs bounds single images of an adaptive plan; give adaptive too, or leave it out")
    if adaptive:
        check_adaptive(images, budget if target_drop is None else None, max_macs)
    with evaluating(model):
        search = Search(model, images, labels, keep, segment, batch_size, progress or Progress())
        if target_ms is not None:
            budget = share_for(search, target_ms, conditions)
        settle_on_parts(search, budget)
        search.price(by, conditions)
        if by == "latency" and target_drop is None:
            return within_latency(search, budget, conditions, target_ms)
        found = search.solve(budget) if target_drop is None else search.solve_for(target_drop)
        alone = by == "macs" and (segment or 1) == 1
        best = against_published(search, found, target_drop) if alone else found
        return adapted(search, found, best, max_macs, target_drop) if adaptive else best
