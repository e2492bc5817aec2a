"""What the benchmarks of dense models share: a method at a budget of the backbone, and figures with their errors."""

import copy
import statistics

import torch

import tosa_convert as tc
from tosa_convert.data.images import loader
from tosa_convert.measure.macs import flops
from tosa_convert.measure.macs_share import MacsShare
from tosa_convert.models.outputs import predict
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.planning.budget import fitted
from tosa_convert.planning.plan import find_plan
from tosa_convert.tasks.task import task_of


def of_layers(model) -> float:
    """The share of the multiply-adds that is the backbone's layers."""
    cost = flops(model)
    return sum(layer.original for layer in cost.layers) / cost.original


def converted(model, name: str, budget: float, pixels: torch.Tensor):
    """A method at a share of the backbone's multiply-adds; a plan is made on the images. "plan, segments of 2" is one
    with as many layers to a choice."""
    whole = 1 - (1 - budget) * of_layers(model)
    if not name.startswith(("plan", "adaptive")):
        return fitted(model, name, whole, MacsShare(model))[0]
    segment = int(name.rpartition(" ")[2]) if "segments" in name else None
    found = find_plan(model, pixels, whole, adaptive=name == "adaptive", segment=segment)
    return tc.convert(copy.deepcopy(model), found.config)


@torch.inference_mode()
def measured(models: dict, original, source: str) -> dict:
    """Name → each figure's mean over images, and for each metric ``metric_change`` and ``metric_error``: the mean over
    images of what it is more than the original's, and the standard error of that."""
    task = task_of(original)
    images = task.read(source, preprocessing_of(original))
    asked = {"": original, **models}
    values: dict = {name: {} for name in asked}
    for batch in loader(images, 8):
        found = {name: predict(model.eval(), batch["images"])[1] for name, model in asked.items()}
        known = task.known(batch["labels"])
        for name, output in found.items():
            figures = {key: each[known] for key, each in task.measure(output, batch["labels"]).items()}
            for key, each in {**figures, **task.difference(output, found[""])}.items():
                values[name].setdefault(key, []).append(each)
    joined = {name: {key: torch.cat(parts) for key, parts in each.items()} for name, each in values.items()}
    return {name: _with_errors(joined[name], joined[""], task.metrics) for name in models}


def _with_errors(values: dict, originals: dict, metrics) -> dict:
    figures = {key: each.mean().item() for key, each in values.items()}
    for key in metrics:
        change = values[key] - originals[key]
        figures |= {f"{key}_change": change.mean().item(), f"{key}_error": (change.std() / len(change) ** 0.5).item()}
    return figures


def means(rows: dict) -> dict:
    """Of each row's figures, over the seeds that there are."""
    groups: dict[str, list[dict]] = {}
    for name, figures in rows.items():
        if "refused" not in figures:
            groups.setdefault(name.rpartition(" seed ")[0], []).append(figures)
    shared = {name: set.intersection(*map(set, group)) for name, group in groups.items()}
    return {
        name: {key: statistics.mean(figures[key] for figures in group) for key in sorted(shared[name])}
        | {"seeds": len(group)}
        for name, group in groups.items()
    }
