"""Methods compared: how close each stays to the original at the same budgets, and its latency."""

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from tosa_convert.base.distributed import pick_device
from tosa_convert.base.environment import machine
from tosa_convert.base.errors import TosaError, UsageError
from tosa_convert.base.progress import Progress
from tosa_convert.config.settings import DistillSettings
from tosa_convert.data.images import Images
from tosa_convert.data.sampling import sample
from tosa_convert.measure.macs_share import MacsShare
from tosa_convert.measure.similarity import Keep, figures, observe, settled_keep
from tosa_convert.methods.method import control, published
from tosa_convert.methods.score import Score
from tosa_convert.models.modes import evaluating
from tosa_convert.models.outputs import EMBEDDING, retrieval_agreement
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.planning.budget import Fitted, config_of, fitted
from tosa_convert.planning.cost_model import Conditions, time_models
from tosa_convert.planning.plan import find_plan
from tosa_convert.selective.conversion import convert, is_converted, light_copy
from tosa_convert.selective.selection import keeps_any_number
from tosa_convert.tasks.task import task_of
from tosa_convert.training.distillation import distill

PLAN, ADAPTIVE = "plan", "adaptive"


def compare(
    model: nn.Module,
    data: str | Path | None = None,
    *,
    budgets: list[float],
    methods: list[str],
    images: int = 32,
    labels: bool = True,
    distill_steps: int = 0,
    keep: str | None = None,
    runtime: str | None = "eager",
    device: str | None = None,
    progress: Progress | None = None,
) -> dict:
    """Convert a model by each method to each budget of multiply–adds, without training, and measure all on the
    same images.

    Args:
        model: not converted; left as it is.
        data: a folder of images, with class folders for top-1; None takes the built-in photos.
        budgets: shares of the original's multiply–adds.
        methods: named ones (see :mod:`tosa_convert.methods.method`), "plan", "adaptive", its form in which each image
            keeps as many tokens as it needs (its row says what these images take on average), or "SCORE/BYPASS" such as
            "similarity/merge", on a ramp unless a "/SCHEDULE" follows. Random selection is always added.
        labels: False ignores sub-folder names as labels.
        images: number of images to measure on. A plan is made on the built-in photos, never on ``data``.
        distill_steps: steps of distillation for ToSA's selectors; with 0 each predicts the attention it reads.
        keep: what is to stay as it is, see :func:`tosa_convert.plan`: what plans are made for and what the plot shows.
        runtime: "eager" or "onnx", for the latency; None leaves it out.

    Returns:
        {"machine", "data", "keep", "images", "labelled", "runtime", "distill_steps", "notes", "original", "rows"}. A
        row holds "method", "budget", "macs", the means of :func:`tosa_convert.measure.similarity.figures`, with labels
        the metrics of the model's task, such as "top1", and "ms" and "speedup".
    """
    if is_converted(model):
        raise UsageError("this model is converted already; name the original model (in Python original(model))")
    progress, device = progress or Progress(), pick_device(device)
    methods = list(dict.fromkeys([*methods, control()]))
    for name in methods:
        if name not in (PLAN, ADAPTIVE):
            config_of(name, 0.9, PLAN, ADAPTIVE)
    budgets = list(dict.fromkeys(budgets))
    if not budgets:
        raise UsageError("no budget is given; give a list such as 0.9,0.8")
    for budget in budgets:
        if not 0 < budget < 1:
            raise UsageError(f"budget {budget} is out of range; give a share of the original's cost such as 0.75")
    with evaluating(model, device):
        return _compared(model, data, budgets, methods, images, labels, distill_steps, keep, runtime, device, progress)


def _compared(
    model: nn.Module,
    data: str | Path | None,
    budgets: list[float],
    methods: list[str],
    images: int,
    labels: bool,
    distill_steps: int,
    keep: str | None,
    runtime: str | None,
    device: str,
    progress: Progress,
) -> dict:
    samples, folder, truths = labelled_sample(model, data, images, labels, crops=ADAPTIVE not in methods)
    kept = settled_keep(observe(model, samples[:1].to(device)), keep)
    share_of, notes, converted, shares = MacsShare(model), [], {}, {}
    if data is None and {PLAN, ADAPTIVE} & set(methods):
        notes.append("plan was made on these same photos; give other images with --data for a fair comparison")
    before = len(notes)
    for name in methods:
        reached = _at_budgets(model, name, budgets, kept, share_of, samples, notes, progress)
        if distill_steps:
            try:
                _teach([found for found, _ in reached.values()], data, distill_steps, device, progress)
            except UsageError as error:
                notes.append(f"{name} is left out: {error}")
                continue
        for budget, (found, share) in reached.items():
            if name == ADAPTIVE and not keeps_any_number(found):
                notes.append(f"adaptive at {budget}: thresholds gain nothing clear, so it is the plan with numbers")
            elif name == ADAPTIVE:
                each = share_of.of_each(found, samples)
                notes.append(
                    f"adaptive at {budget}: these images take {share:.3f} of the MACs on average, {min(each):.3f} to "
                    f"{max(each):.3f}; its thresholds were set on the built-in photos"
                )
            converted[name, budget], shares[name, budget] = found, share
    for name in dict.fromkeys(name for (name, _), found in converted.items() if _learns(found)):
        how = f"distilled for {distill_steps} steps" if distill_steps else "not distilled (--distill-steps)"
        notes.append(f"{name}: its selectors are {how}")
    for name in dict.fromkeys(name for (name, _), found in converted.items() if _learns(found, "finetune")):
        notes.append(f"{name}: its gates are untrained, so they choose by chance; finetune trains them")
    if not converted:
        raise UsageError(f"nothing can be compared at these budgets: {notes[before]}")
    seen = mean_figures(model, {"original": model, **converted}, samples, truths, progress)
    times = {}
    if runtime is not None:
        labelled_models = {f"{name} {budget}": each for (name, budget), each in converted.items()}
        measured = data if any(map(keeps_any_number, converted.values())) else None
        times = time_models(
            {"original": model, **labelled_models}, Conditions(runtime, device=device), progress, data=measured
        )
    rows = []
    for name, budget in converted:
        row = {"method": name, "budget": budget, "macs": shares[name, budget], **seen[name, budget]}
        if times:
            ms = times[f"{name} {budget}"]
            row |= {"ms": ms, "speedup": times["original"] / ms}
        rows.append(row)
    return {
        "machine": machine(device),
        "data": folder.name,
        "keep": kept.value,
        "images": len(samples),
        "labelled": truths is not None,
        "runtime": runtime,
        "distill_steps": distill_steps,
        "notes": notes,
        "original": {"macs": share_of.whole, **seen["original"], **({"ms": times["original"]} if times else {})},
        "rows": rows,
    }


def _learns(model: nn.Module, *stages: str) -> bool:
    """In distillation, or in one of these stages."""
    score = model.tosa_config.part(Score)
    return score.learns and score.learns_in in stages if stages else score.distilled()


def _teach(models: list[nn.Module], data: str | Path | None, steps: int, device: str, progress: Progress) -> None:
    """Distil one method at each of its budgets; what is learnt by ablation, the slowest of all, is the same at each."""
    learners = [model for model in models if _learns(model)]
    for model in learners:
        if model is not learners[0] and _learns(model, "ablation"):
            model.load_state_dict(learners[0].state_dict())
        else:
            distill(model, data, DistillSettings(steps=steps), device=device, progress=progress)


def _at_budgets(
    model: nn.Module,
    name: str,
    budgets: list[float],
    keep: Keep,
    share_of: MacsShare,
    samples: torch.Tensor,
    notes: list[str],
    progress: Progress,
) -> dict[float, Fitted]:
    """The method at each budget that it can reach; for the others a note says why not."""
    found = {}
    planned = name in (PLAN, ADAPTIVE)
    bar = nullcontext(lambda: None) if planned else progress.track(name, len(budgets))  # a plan has its own
    with bar as advance:
        for budget in budgets:
            try:
                found[budget] = (
                    _planned(model, budget, keep, share_of, name == ADAPTIVE, samples, progress)
                    if planned
                    else _converted(model, name, budget, share_of)
                )
            except TosaError as error:
                notes.append(f"{name} at {budget}: {error}")
            advance()
    return found


def _planned(
    model: nn.Module,
    budget: float,
    keep: Keep,
    share_of: MacsShare,
    adaptive: bool,
    samples: torch.Tensor,
    progress: Progress,
) -> Fitted:
    """A plan made on the built-in photos, and what it takes of the samples."""
    photos = sample(None, preprocessing_of(model), 24)[0]
    found = find_plan(model, photos, budget, keep=keep, adaptive=adaptive, progress=progress)
    converted = convert(light_copy(model), found.config)
    return converted, share_of.of(converted, samples)


def _converted(model: nn.Module, name: str, budget: float, share_of: MacsShare) -> Fitted:
    """The method at the budget; the control in all layers if every second one is not enough."""
    try:
        return fitted(model, name, budget, share_of)
    except UsageError:
        if name != control():
            raise
        row = published()[name]
        return fitted(model, f"{row.score}/{row.bypass}/all", budget, share_of)


def labelled_sample(
    model: nn.Module, data: str | Path | None, count: int, labels: bool = True, crops: bool = True
) -> tuple[torch.Tensor, Images, torch.Tensor | None]:
    """:func:`tosa_convert.data.sampling.sample` for a model: the images, their folder, and their labels or None."""
    task = task_of(model)
    # A crop's map is not what is measured elsewhere.
    samples, folder, truths = sample(data, preprocessing_of(model), count, task.read, crops and not task.differences)
    wanted = labels and task.has_labels(folder, model) and task.known(truths).any()
    return samples, folder, truths if wanted else None


def mean_figures(
    model: nn.Module,
    others: dict,
    samples: torch.Tensor,
    labels: torch.Tensor | None,
    progress: Progress | None = None,
) -> dict:
    """For each of the others the means of :func:`~tosa_convert.measure.similarity.figures` over the images, with an
    embedding its retrieval agreement among them, and with labels the metrics of the model's task."""
    device, task = next(model.parameters()).device, task_of(model)
    sums: dict = {key: {} for key in others}
    embeddings: dict[object, list[torch.Tensor]] = {}
    originals: list[torch.Tensor] = []
    known = None if labels is None else task.known(labels)
    batches = samples.split(8)
    truths = labels.split(8) if labels is not None else [None] * len(batches)
    with (progress or Progress()).track("compare", len(batches) * len(sums)) as advance:
        for batch, truth in zip(batches, truths, strict=True):
            wanted = observe(model, batch.to(device))
            originals.append(wanted.output)
            for key, total in sums.items():
                found = observe(others[key], batch.to(device))
                values = figures(found, wanted)
                if wanted.kind == EMBEDDING:
                    embeddings.setdefault(key, []).append(found.output)
                if truth is not None:
                    measured = task.measure(found.output.cpu(), truth)
                    values |= {name: value[task.known(truth)] for name, value in measured.items()}
                for name, value in values.items():
                    total[name] = total.get(name, 0.0) + value.sum().item()
                advance()
    counts = dict.fromkeys(task.metrics, len(samples) if known is None else max(1, int(known.sum())))
    means = {
        key: {name: value / counts.get(name, len(samples)) for name, value in total.items()}
        for key, total in sums.items()
    }
    for key, outputs in embeddings.items():
        means[key]["agreement"] = retrieval_agreement(torch.cat(outputs), torch.cat(originals)).mean().item()
    return means
