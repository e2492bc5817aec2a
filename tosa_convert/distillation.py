"""Stage 1: the selectors learn from the model itself; no labels, and the backbone does not move."""

from pathlib import Path

import torch
from torch import nn

from tosa_convert.data import Images
from tosa_convert.errors import UsageError
from tosa_convert.hosts import host_of, run
from tosa_convert.origin import preprocessing_of
from tosa_convert.progress import Progress
from tosa_convert.scores.attention import AttentionSelector
from tosa_convert.selective import Selection, all_tokens, selective_blocks
from tosa_convert.settings import DistillSettings
from tosa_convert.surgery import is_converted
from tosa_convert.tokens import choose_best, random_rows
from tosa_convert.train import Stage, make_accelerator, train


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

    Args:
        model: converted with ``score="attention"``; trained in place.
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
    accelerator = make_accelerator(device, settings)
    images = Images(data, preprocessing_of(model), settings.augment, seed)
    home = next(model.parameters()).device
    frozen = {parameter: parameter.requires_grad for parameter in model.parameters()}
    stage = Stage("distill", SelectorDistillation(model, settings.kl), settings, seed, out, resume)
    try:
        return train(stage, images, accelerator, progress or Progress())
    finally:
        for parameter, was in frozen.items():
            parameter.requires_grad_(was)
        stage.objective.close()
        model.to(home).eval()


def check_distillable(model: nn.Module) -> None:
    if not is_converted(model):
        raise UsageError("there are no selectors to distill: convert the model first")
    if model.tosa_config.score != "attention":
        raise UsageError(f"score {model.tosa_config.score!r} has nothing to learn; distill is for score 'attention'")


ROWS_LEARNT_AT_ONCE = 16
"""Query rows of a selector that are learnt from at a time: keeps the peak of memory near that of a forward pass."""


class SelectorDistillation(nn.Module):
    """The objective of stage 1 over a whole model. Only its selectors require gradients."""

    def __init__(self, model: nn.Module, kl: str = "forward"):
        super().__init__()
        self.model = model
        host, blocks = host_of(model), selective_blocks(model)
        self.lessons = [_Lesson(block.selector, block.selection, kl) for block in blocks]
        self.handles = []
        model.requires_grad_(False)
        for block, lesson in zip(blocks, self.lessons, strict=True):
            block.selector.requires_grad_(True)
            before = host.blocks[block.selection.layer - 2]
            self.handles += [*host.tap(before, lesson.listen), *host.tap(block, lesson.learn)]

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()

    def train(self, mode: bool = True) -> "SelectorDistillation":
        """The backbone is a fixed teacher: it stays in eval mode."""
        return super().train(False)

    def forward(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """(B, C, H, W) → {"loss", "overlap"}, scalars."""
        with torch.no_grad(), all_tokens(self.model):
            run(self.model, images)
        losses, overlaps = zip(*(lesson.take() for lesson in self.lessons), strict=True)
        return {"loss": torch.stack(losses).sum(), "overlap": torch.stack(overlaps).mean()}


class _Lesson:
    """What one selector learns in a forward pass. It predicts from the layer before, and is corrected as soon
    as its own layer has projected queries and keys, so that only a few rows of maps are ever kept."""

    def __init__(self, selector: AttentionSelector, selection: Selection, kl: str):
        self.selector, self.selection, self.kl = selector, selection, kl
        self.question: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self.learnt: tuple[torch.Tensor, torch.Tensor] | None = None

    def listen(self, queries: torch.Tensor, keys: torch.Tensor) -> None:
        rows = self.selector.read.choose(keys.shape[2], random_rows)
        self.question = self.selector.read(queries, keys, rows), rows

    def learn(self, queries: torch.Tensor, keys: torch.Tensor) -> None:
        (maps, rows), self.question = self.question, None
        real = self.selector.read(queries, keys, rows)
        with torch.enable_grad():  # the backbone around it runs without
            portions = zip(maps.split(ROWS_LEARNT_AT_ONCE, 2), real.split(ROWS_LEARNT_AT_ONCE, 2), strict=True)
            losses, predicted, wanted = zip(*(self._correct(*portion) for portion in portions), strict=True)
            loss = torch.stack(losses).sum() / maps.shape[2]
        self.learnt = loss, overlap(sum(predicted), sum(wanted), self.selection)

    def _correct(self, maps: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(H, B, R, N) twice → the loss, summed over query rows, and what each token receives in the predicted
        and in the real maps, (B, N)."""
        real, predicted = real.float().log_softmax(-1), self.selector.log_maps(maps).float()
        loss = divergence(predicted, real) if self.kl == "reverse" else divergence(real, predicted)
        loss = with_gradient_now(loss * maps.shape[2], list(self.selector.parameters()))
        return loss, predicted.detach().exp().sum((0, 2)), real.exp().sum((0, 2))

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        learnt, self.learnt = self.learnt, None
        return learnt


def with_gradient_now(loss: torch.Tensor, parameters: list[nn.Parameter]) -> torch.Tensor:
    """The same loss with the same gradient, taken at once: what it was computed from can be freed before
    the next rows and selectors have theirs."""
    gradients = torch.autograd.grad(loss, parameters)
    linear = sum((parameter * gradient).sum() for parameter, gradient in zip(parameters, gradients, strict=True))
    return loss.detach() + (linear - linear.detach())


def divergence(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Σ_heads KL(first ‖ second) of log maps (H, B, R, N), averaged over images and query rows."""
    return (first.exp() * (first - second)).sum(-1).sum(0).mean()


def overlap(predicted: torch.Tensor, real: torch.Tensor, selection: Selection) -> torch.Tensor:
    """Share of the patches chosen by one set of scores (B, N) that the other would choose too."""
    kept = selection.keep(real.shape[1] - selection.prefix)
    chosen, wanted = (choose_best(scores, selection.prefix, kept).attended for scores in (predicted, real))
    marks = torch.zeros_like(real, dtype=torch.bool).scatter(1, wanted, True)
    return marks.gather(1, chosen)[:, selection.prefix :].float().mean()
