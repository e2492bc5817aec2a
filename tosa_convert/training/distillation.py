"""Stage 1: the selectors learn from the model itself; no labels, and the backbone does not move."""

import warnings
from contextlib import closing
from pathlib import Path
from typing import cast

import torch
from torch import nn

from tosa_convert.base.errors import TosaWarning, UsageError
from tosa_convert.base.progress import Progress
from tosa_convert.config.conversion import ConvertConfig
from tosa_convert.config.settings import DistillSettings
from tosa_convert.methods.parts import every
from tosa_convert.methods.score import Score
from tosa_convert.models.adapter import adapter_of, run
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.runs.lock import writes_alone
from tosa_convert.selective.conversion import is_converted
from tosa_convert.selective.selection import all_tokens, choosing_blocks
from tosa_convert.tasks.task import task_of
from tosa_convert.training.engine import Stage, lent, make_accelerator, train
from tosa_convert.training.impact import learn_impact

UNUSED_BY_IMPACT = ("precision", "augment", "workers", "kl")


@writes_alone
def distill(
    model: nn.Module,
    data: str | Path | None = None,
    settings: DistillSettings | None = None,
    *,
    out: Path | None = None,
    resume: bool = False,
    seed: int = 0,
    device: str | None = None,
    progress: Progress | None = None,
) -> dict:
    """Train the selectors of a converted model to predict the next layer's attention maps.

    ToSA (arXiv 2406.08816), section 3: Σ_heads KL between the predicted map and the real map of the
    selective layer, averaged over images and query rows. All selectors learn in the same forward pass.

    With score "impact" its filter instead, see :mod:`tosa_convert.training.impact`.

    Args:
        model: converted with a score that learns, such as "attention"; trained in place.
        data: a folder of images, labels not needed; None takes the built-in photos.
        out: run directory for metrics and checkpoints.
        resume: go on from the checkpoint in ``out``.

    Returns:
        Figures of the last step: "loss" (nats per query row, summed over heads and layers) and
        "overlap" (share of the selected patches that the real column sums would select, both over the
        query rows of that step).
    """
    check_distillable(model)
    settings = settings or DistillSettings()
    _say_what_is_unused(cast(ConvertConfig, model.tosa_config), settings)
    if model.tosa_config.part(Score).learns_in == "ablation":
        return learn_impact(model, data, settings, out, resume, seed, device, progress or Progress())
    accelerator = make_accelerator(device, settings)
    images = task_of(model).read(data, preprocessing_of(model), settings.augment, seed)
    with lent(model), closing(SelectorDistillation(model, kl=settings.kl)) as objective:
        stage = Stage("distill", objective, settings, seed, out, resume)
        return train(stage, images, accelerator, progress or Progress())


def check_distillable(model: nn.Module) -> None:
    if not is_converted(model):
        raise UsageError("there are no selectors to distill: convert the model first")
    config = cast(ConvertConfig, model.tosa_config)
    check_teachable(config)
    if config.part(Score).learns_in == "ablation" and len(choosing_blocks(model)) > 1:
        raise UsageError(
            f"score {config.score!r} learns for one choice, before the first layer that skips tokens, and here "
            f"{len(choosing_blocks(model))} layers choose; convert with schedule throughout, as --method impact does"
        )


def _say_what_is_unused(config: ConvertConfig, settings: DistillSettings) -> None:
    by_impact = config.part(Score).learns_in == "ablation"
    names = UNUSED_BY_IMPACT if by_impact else ("examples",)
    changed = [name for name in names if getattr(settings, name) != DistillSettings.model_fields[name].default]
    if changed:
        what = f"score {config.score} learns from {'images as they are' if by_impact else 'each batch'}"
        warnings.warn(f"{what}, without {', '.join(changed)}", TosaWarning, stacklevel=3)


def check_teachable(config: ConvertConfig) -> None:
    """
    Raises:
        UsageError: the score of a conversion learns nothing here.
    """
    if config.part(Score).learns_in == "finetune":
        raise UsageError(f"score {config.score!r} learns in finetune, together with the model; go on with that")
    if not config.part(Score).learns:
        learn = " or ".join(repr(name) for name, part in every(Score).items() if part.distilled())
        raise UsageError(f"score {config.score!r} has nothing to learn; distill is for score {learn}")


class SelectorDistillation(nn.Module):
    """The objective of stage 1 over a whole model. Only its selectors require gradients."""

    def __init__(self, model: nn.Module, **settings: str):
        super().__init__()
        self.model = model
        adapter, blocks = adapter_of(model), choosing_blocks(model)
        self.lessons = [block.selector.lesson(block.selection.keep, **settings) for block in blocks]
        self.taps = []
        model.requires_grad_(False)
        for block, lesson in zip(blocks, self.lessons, strict=True):
            block.selector.requires_grad_(True)
            read = adapter.blocks[block.selection.layer - 2] if block.selection.reads_before else block
            self.taps += [adapter.tap(read, lesson.listen), adapter.tap(block, lesson.learn)]

    def close(self) -> None:
        for tap in self.taps:
            tap.remove()

    def train(self, mode: bool = True) -> "SelectorDistillation":
        """The backbone is a fixed teacher: it stays in eval mode."""
        return super().train(False)

    def forward(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """(B, C, H, W) → {"loss", summed over layers, and other figures, averaged}, scalars."""
        with torch.no_grad(), all_tokens(self.model):
            run(self.model, images)
        figures = [lesson.take() for lesson in self.lessons]
        loss = torch.stack([each.pop("loss") for each in figures]).sum()
        return {"loss": loss, **{name: torch.stack([each[name] for each in figures]).mean() for name in figures[0]}}
