"""Stage 2: the model learns to work with its layers selective; the selectors do not move."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from tosa_convert.data import Images, check_classes
from tosa_convert.errors import UsageError
from tosa_convert.hosts import host_of, run
from tosa_convert.origin import class_names, preprocessing_of
from tosa_convert.progress import Progress
from tosa_convert.selective import selective_blocks
from tosa_convert.settings import FinetuneSettings
from tosa_convert.surgery import is_converted, original
from tosa_convert.token_cut import TokenCut
from tosa_convert.train import Stage, make_accelerator, train


def finetune(
    model: nn.Module,
    data: str | Path | None = None,
    settings: FinetuneSettings | None = None,
    *,
    out: Path | None = None,
    resume: bool = False,
    seed: int = 0,
    device: str | None = None,
    progress: Progress | None = None,
) -> dict:
    """Fine-tune a converted model with its layers selective (ToSA, arXiv 2406.08816, section 3, stage 2).

    The loss is a weighted sum of cross-entropy with the labels, KL to the logits of the model as it
    was unconverted, the distance to its last tokens, and for IdleViT its token cut loss; see
    :class:`FinetuneSettings`. Only the first needs labels.

    Args:
        model: converted; trained in place.
        data: a folder of images, one sub-folder per class where labels are used; None takes the
            built-in photos.
        out: run directory for metrics and checkpoints.
        resume: go on from the checkpoint in ``out``; give the model as it was at the start.

    Returns:
        Figures of the last step: "loss" and each of its parts, unweighted.
    """
    if not is_converted(model):
        raise UsageError("the model is not converted: run distill first, or use convert(model, ...)")
    settings = settings or FinetuneSettings()
    images = Images(data, preprocessing_of(model), settings.augment, seed)
    weights = loss_weights(settings, images, model)
    accelerator = make_accelerator(device, settings)
    home = next(model.parameters()).device
    objective = SelectiveFinetuning(model, weights, settings)
    try:
        objective.teacher[0].to(accelerator.device)
        return train(
            Stage("finetune", objective, settings, seed, out, resume), images, accelerator, progress or Progress()
        )
    finally:
        for block in selective_blocks(model):
            block.selector.requires_grad_(True)
        objective.close()
        model.to(home).eval()


def loss_weights(settings: FinetuneSettings, images: Images, model: nn.Module) -> dict[str, float]:
    """The weight of each part of the loss, with what the settings leave open filled in from the data.

    Raises:
        UsageError: labels wanted but there are none, or they are not the model's classes.
    """
    outputs = outputs_of(model)
    usable = images.labelled and outputs > 0
    if settings.labels is None and outputs and images.ambiguous:
        raise UsageError(
            f"{images.name}: {images.ambiguous}; tidy the folder, or fine-tune without labels (--labels 0)"
        )
    labels = settings.labels if settings.labels is not None else float(usable)
    if labels and not images.labelled:
        raise UsageError(f"{images.name} has no labels; sort it into class folders, or fine-tune with labels: 0")
    if labels and not outputs:
        raise UsageError("the model has no head to train with labels; fine-tune with labels: 0")
    if labels:
        check_classes(images, outputs, class_names(model))
    alone = float(not labels)
    logits = settings.logits if settings.logits is not None else alone * (outputs > 0)
    whole = model.tosa_config.bypass != "drop"
    features = settings.features if settings.features is not None else alone * whole
    if features and not whole:
        raise UsageError("bypass drop leaves fewer tokens than the original has to learn from; set features to 0")
    if labels + logits + features == 0:
        raise UsageError("labels, logits and features all weigh 0: there is nothing to learn from")
    cut = settings.cut if settings.cut is not None else float(model.tosa_config.method == "idle")
    if cut and (model.tosa_config.score != "class_attention" or model.tosa_config.lasting):
        raise UsageError(
            "the token cut loss is for score class_attention with all tokens kept, as in IdleViT; set cut to 0"
        )
    return {"labels": labels, "logits": logits, "features": features, "cut": cut}


def outputs_of(model: nn.Module) -> int:
    """Number of classes of the model's head; 0 without one."""
    host = host_of(model)
    if host.library == "timm":
        return model.num_classes
    return model.config.num_labels if "Classification" in type(model).__name__ else 0


class SelectiveFinetuning(nn.Module):
    """The objective of stage 2. The teacher is the unconverted twin of the model at the start."""

    def __init__(self, model: nn.Module, weights: dict[str, float], settings: FinetuneSettings):
        super().__init__()
        self.model = model
        self.weights, self.settings = weights, settings
        # In a tuple, so that it is neither trained nor checkpointed nor wrapped.
        self.teacher = (original(model).eval().requires_grad_(False),)
        for block in selective_blocks(model):
            block.selector.requires_grad_(False)
        self.token_cut = TokenCut(host_of(model)) if weights["cut"] else None
        self.student_tokens, self.teacher_tokens = _LastTokens(), _LastTokens()
        self.handles = [
            host_of(model).blocks[-1].register_forward_hook(self.student_tokens),
            host_of(self.teacher[0]).blocks[-1].register_forward_hook(self.teacher_tokens),
        ]

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        if self.token_cut is not None:
            self.token_cut.close()

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, C, H, W) and (B,) → {"loss" and its parts}, scalars."""
        found = run(self.model, images)
        parts = {}
        if self.weights["labels"]:
            smoothing = self.settings.label_smoothing
            parts["labels"] = F.cross_entropy(found["logits"], labels, label_smoothing=smoothing)
        if self.weights["logits"] or self.weights["features"]:
            with torch.no_grad():
                wanted = run(self.teacher[0], images)
        if self.weights["logits"]:
            parts["logits"] = _soft_divergence(found["logits"], wanted["logits"], self.settings.temperature)
        if self.weights["features"]:
            parts["features"] = _relative_distance(self.student_tokens.value, self.teacher_tokens.value)
        if self.token_cut is not None:
            parts["cut"] = self.token_cut.loss()
        return {"loss": sum(self.weights[name] * part for name, part in parts.items()), **parts}


class _LastTokens:
    """A hook that keeps the tokens that leave the last block."""

    value: torch.Tensor

    def __call__(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self.value = output


def _soft_divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T² · KL(teacher ‖ student) at temperature T, averaged over images (Hinton et al., arXiv 1503.02531)."""
    student, teacher = ((logits / temperature).log_softmax(-1) for logits in (student, teacher))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def _relative_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of the tokens, as a share of the teacher's mean square: free of scale."""
    return F.mse_loss(student, teacher) / teacher.square().mean()
