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
from tosa_convert.selective import Relay, Selection, all_tokens, selective_blocks
from tosa_convert.settings import DistillSettings
from tosa_convert.surgery import is_converted
from tosa_convert.tokens import random_rows, top_tokens
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


class SelectorDistillation(nn.Module):
    """The objective of stage 1 over a whole model. Only its selectors require gradients."""

    def __init__(self, model: nn.Module, kl: str = "forward"):
        super().__init__()
        self.model = model
        host, blocks = host_of(model), selective_blocks(model)
        self.lessons = [_Lesson(kl) for _ in blocks]
        self.handles = []
        model.requires_grad_(False)
        for block, lesson in zip(blocks, self.lessons, strict=True):
            block.selector.requires_grad_(True)
            self.handles += [*host.tap(block, lesson.target), block.register_forward_hook(lesson)]

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
    """A hook behind a selective block: its selector's loss and overlap, taken as soon as the block has run on
    all tokens. So no queries and keys are kept to the end of the forward pass."""

    def __init__(self, kl: str):
        self.kl = kl
        self.target = Relay()
        self.learnt: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, block: nn.Module, inputs: tuple, output) -> None:
        with torch.enable_grad():  # the backbone around it runs without
            self.learnt = _learn(block, self.target, self.kl)

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        learnt, self.learnt = self.learnt, None
        return learnt


def _learn(block: nn.Module, target: Relay, kl: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and overlap of one selector, from what the forward pass left in the relays."""
    selection: Selection = block.selection
    selector: AttentionSelector = block.selector
    (queries, keys), (next_queries, next_keys) = selection.relay.take(), target.take()
    rows = selector.query_rows(keys.shape[2], random_rows)
    predicted = selector.log_maps(queries[:, :, rows], keys).float()
    scaled = next_queries[:, :, rows] * next_queries.shape[-1] ** -0.5
    real = (scaled @ next_keys.transpose(-2, -1)).float().log_softmax(-1)
    loss = divergence(predicted, real) if kl == "reverse" else divergence(real, predicted)
    with torch.no_grad():
        return loss, overlap(predicted.exp().sum((1, 2)), real.exp().sum((1, 2)), selection)


def divergence(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Σ_heads KL(first ‖ second) of log maps (B, H, R, N), averaged over images and query rows."""
    return (first.exp() * (first - second)).sum(-1).sum(1).mean()


def overlap(predicted: torch.Tensor, real: torch.Tensor, selection: Selection) -> torch.Tensor:
    """Share of the patches chosen by one set of scores (B, N) that the other would choose too."""
    chosen, wanted = (top_tokens(scores, selection.prefix, selection.steps) for scores in (predicted, real))
    marks = torch.zeros_like(real, dtype=torch.bool).scatter(1, wanted, True)
    return marks.gather(1, chosen)[:, selection.prefix :].float().mean()
