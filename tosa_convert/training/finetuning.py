"""Stage 2: the model learns to work with its layers selective; the selectors do not move."""

import warnings
from contextlib import closing, suppress
from pathlib import Path

import torch
from timm.data import Mixup
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tosa_convert.base.errors import TosaWarning, UsageError
from tosa_convert.base.progress import Progress
from tosa_convert.config.settings import FinetuneSettings
from tosa_convert.data.dense import DenseImages
from tosa_convert.data.images import UNREADABLE, Augmentation, Images, check_augmentation, spread
from tosa_convert.data.masks import Masks, masks_of
from tosa_convert.models.adapter import adapter_of, run
from tosa_convert.models.dense import DenseModel
from tosa_convert.models.outputs import outputs_of
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.runs.lock import writes_alone
from tosa_convert.selective.conversion import is_converted, is_whole, original
from tosa_convert.selective.selection import choosing_blocks
from tosa_convert.tasks.task import task_of
from tosa_convert.training.engine import Stage, lent, make_accelerator, train
from tosa_convert.training.loss import Loss, Situation, every_loss
from tosa_convert.training.losses.labels import Labels
from tosa_convert.training.optimisation import check_optimiser, drop_path, layer_scales

MASKS = 1000
"""Most masks that are looked at before a training."""
GATES_RATE = 30.0
"""How many times the learning rate of the model gates have."""


@writes_alone
def finetune(
    model: nn.Module,
    data: str | Path | None = None,
    settings: FinetuneSettings | None = None,
    *,
    masks: str | Path | None = None,
    boxes: str | Path | None = None,
    out: Path | None = None,
    resume: bool = False,
    seed: int = 0,
    device: str | None = None,
    progress: Progress | None = None,
) -> dict:
    """Fine-tune a converted model with its layers selective (ToSA, arXiv 2406.08816, section 3, stage 2).

    The loss is a weighted sum of the task's loss on labels (cross-entropy), KL to the logits of the model as it
    was unconverted, the distance to its last tokens, and what belongs to a published method (IdleViT's token cut
    loss, MCTF's consistency); see :class:`FinetuneSettings`. Only the first needs labels.

    Args:
        model: converted; trained in place.
        data: a folder of images, one sub-folder per class where labels are used; None takes the
            built-in photos.
        masks: a folder of PNG files named like the images, which patches a gate is to select (SPA's selection labels).
        boxes: in their place a COCO file.
        out: run directory for metrics and checkpoints.
        resume: go on from the checkpoint in ``out``; give the model as it was at the start.

    Returns:
        Figures of the last step: "loss" and each of its parts, unweighted.
    """
    if not is_converted(model):
        raise UsageError("the model is not converted: run distill first, or use convert(model, ...)")
    settings = settings or FinetuneSettings()
    images, weights = _opened(model, data, settings, masks_of(masks, boxes), seed)
    accelerator = make_accelerator(device, settings)
    with lent(model):
        if settings.head_only:
            _freeze_backbone(model)
        with closing(SelectiveFinetuning(model, weights, settings)) as objective:
            stage = Stage(
                "finetune",
                objective,
                settings,
                seed,
                out,
                resume,
                scales=layer_scales(model, settings.layer_decay) | _fresh(model),
                repeats=settings.aug_repeats,
                averaged=model if settings.model_ema_decay else None,
                decay=settings.model_ema_decay or 0.0,
            )
            objective.teacher[0].to(accelerator.device)
            with drop_path(adapter_of(model), settings.drop_path):
                return train(stage, images, accelerator, progress or Progress())


def _freeze_backbone(model: nn.Module) -> None:
    """Let the head alone learn.

    Raises:
        UsageError: the model has no head of ours.
    """
    if not isinstance(model, DenseModel):
        raise UsageError("head_only is for a backbone under a new head (--task, --head); leave it out")
    model.encoder.requires_grad_(False)


def check_finetuning(
    model: nn.Module,
    data: str | Path | None,
    settings: FinetuneSettings,
    *,
    masks: str | Path | None = None,
    boxes: str | Path | None = None,
) -> None:
    """What :func:`finetune` would refuse, before a stage ahead of it.

    Raises:
        UsageError: as it would.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TosaWarning)  # they come when it is done
        _opened(model, data, settings, masks_of(masks, boxes))


def _opened(
    model: nn.Module, data: str | Path | None, settings: FinetuneSettings, masks: Masks | None, seed: int = 0
) -> tuple[Images, dict[str, float]]:
    """The images to train on, and the weight of each part of the loss."""
    augmentation = check_settings(settings)
    images = task_of(model).read(data, preprocessing_of(model), augmentation, seed)
    weights = loss_weights(settings, images, model)
    _take_masks(images, masks, settings, weights)
    _check_mixing(settings, weights, model)
    _check_known(images, weights, model)
    _warn_of_idle(settings, weights, bool(task_of(model).differences))
    if images.reader.streams and weights["labels"]:
        images.outputs = outputs_of(model)
    if (settings.aa or settings.reprob) and task_of(model).differences:
        raise UsageError("aa and reprob change images without their maps, and this model gives maps; leave them out")
    return images, weights


def _warn_of_idle(settings: FinetuneSettings, weights: dict[str, float], maps: bool) -> None:
    """Say which settings change nothing.

    Args:
        maps: whether the model gives maps.
    """
    unlabelled, untaught = not weights["labels"], not weights["logits"]
    uncropped = settings.augment != "crop" and settings.scale != FinetuneSettings().scale
    for name, idle, of, remedy in (
        (
            "temperature",
            settings.temperature != 1 and untaught,
            "the KL to the original's logits",
            "give logits a weight",
        ),
        ("smoothing", settings.smoothing and unlabelled, "the loss on labels", "give labels a weight"),
        ("scale", uncropped, "augment crop", "take crop"),
        ("rotate", settings.rotate and not maps, "images with maps", "train a model that makes some"),
    ):
        if idle:
            message = (
                f"{name} is of {of}, which there is none of here, so it changes nothing; {remedy}, or leave it out"
            )
            warnings.warn(message, TosaWarning, stacklevel=4)


def check_settings(settings: FinetuneSettings) -> Augmentation:
    """What can be told without data and model; the augmentation that is asked for.

    Raises:
        UsageError: timm has no such optimiser or augmentation.
    """
    augmentation = Augmentation(
        settings.augment, settings.scale, settings.aa, settings.reprob, photometric=True, degrees=settings.rotate
    )
    check_augmentation(augmentation)
    check_optimiser(settings)
    return augmentation


def _fresh(model: nn.Module) -> dict[nn.Parameter, float]:
    """Gates begin with nothing, in a model that knows its work already: they learn faster."""
    gates = [block.selector for block in choosing_blocks(model) if block.selector.gates]
    return {parameter: GATES_RATE for gate in gates for parameter in gate.parameters()}


def _take_masks(images: Images, masks: Masks | None, settings: FinetuneSettings, weights: dict[str, float]) -> None:
    """
    Raises:
        UsageError: nothing is learnt from masks, or they cannot go along with the images.
    """
    if masks is None:
        if weights.get("gates"):
            warnings.warn(
                "no masks and no boxes are given: the gates learn to select what the original's last layer attends to",
                TosaWarning,
                stacklevel=3,
            )
        return
    if settings.gates == 0 or settings.head_only:
        raise UsageError("nothing is learnt from masks and boxes with gates 0 or head_only; leave out one of the two")
    if not weights.get("gates"):
        raise UsageError("masks and boxes are for score gate, as in --method spa; leave them out")
    if settings.aa or settings.reprob or settings.mixup or settings.cutmix or images.reader.streams:
        raise UsageError(
            "masks go along with crops and mirrors only, and with images that are no stream; leave aa, "
            "reprob, mixup and cutmix out"
        )
    masks.check([images.reader.filename(index) for index in range(len(images))])
    images.masks = masks
    masks.look_at(_sizes(images))


def _sizes(images: Images) -> dict[str, tuple[int, int]]:
    """Of some images spread over all, by name; those left out that cannot be read."""
    sizes = {}
    for index in spread(len(images), MASKS):
        with suppress(*UNREADABLE):
            sizes[images.reader.filename(index)] = images.size_of(index)
    return sizes


def _check_mixing(settings: FinetuneSettings, weights: dict[str, float], model: nn.Module) -> None:
    if (settings.mixup or settings.cutmix) and not (weights["labels"] and outputs_of(model)):
        raise UsageError("mixup and cutmix mix labels of classes, and there are none to learn from; leave them out")


def _check_known(images: Images, weights: dict[str, float], model: nn.Module) -> None:
    task = task_of(model)
    if not (weights["labels"] and isinstance(images, DenseImages)):
        return
    truths = (images.truth(index) for index in range(len(images)))
    if not any(truth is not None and task.known(truth[None]).any() for truth in truths):
        raise UsageError(f"in none of the maps of {images.name} anything is known; check its files")


def loss_weights(settings: FinetuneSettings, images: Images, model: nn.Module) -> dict[str, float]:
    """The weight of each part of the loss, with what the settings leave open filled in from the data.

    Raises:
        UsageError: labels wanted but there are none, or they are not the model's classes.
    """
    situation = Situation(settings, images, model, outputs_of(model), task_of(model))
    labels = Labels.weight(situation)
    situation = situation._replace(labels=labels)
    weights = {Labels.name(): labels}
    weights |= {kind.name(): kind.weight(situation) for kind in every_loss() if kind is not Labels}
    if is_whole(model) and not labels:
        raise UsageError(
            f"nothing is left to learn: at ratio 1 the model is its own original, and {images.name} has no labels that "
            f"it can learn from ({situation.task.wants})"
        )
    if not any(weights.values()):
        raise UsageError("labels, logits, features and maps all weigh 0: there is nothing to learn from")
    return weights


class SelectiveFinetuning(nn.Module):
    """The objective of stage 2. The teacher is the unconverted twin of the model at the start."""

    def __init__(self, model: nn.Module, weights: dict[str, float], settings: FinetuneSettings):
        super().__init__()
        self.model, self.weights, self.head_only = model, weights, settings.head_only
        teacher = original(model).eval().requires_grad_(False)
        self.teacher = (teacher,)  # in a tuple, so that it is neither trained nor checkpointed nor wrapped
        for block in choosing_blocks(model):
            block.selector.requires_grad_(block.selector.gates and not settings.head_only)
        wanted = [kind for kind in every_loss() if weights.get(kind.name())]
        mixing = {"mixup_alpha": settings.mixup, "cutmix_alpha": settings.cutmix, "label_smoothing": settings.smoothing}
        mixes = settings.mixup or settings.cutmix
        self.mix = Mixup(**mixing, num_classes=outputs_of(model)) if mixes else None
        filled = settings.model_copy(update=weights)
        self.losses: list[Loss] = []
        try:
            for kind in wanted:
                self.losses.append(kind(model, teacher, filled))
        except Exception:
            self.close()
            raise

    def train(self, mode: bool = True) -> "SelectiveFinetuning":
        """Taught by the original alone, batch normalisation keeps the statistics that the teacher works with: those of
        a few hundred images would carry the model away from what it is to give. So does a backbone that stays as it
        is."""
        super().train(mode)
        if self.head_only or not self.weights["labels"]:
            for module in (self.model.encoder if self.head_only else self.model).modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def close(self) -> None:
        for loss in self.losses:
            loss.close()

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, C, H, W) and (B,) → {"loss" and its parts}, scalars."""
        channels = preprocessing_of(self.model).channels
        masks = images[:, channels] if images.shape[1] > channels else None
        images = images[:, :channels]
        if self.mix is not None:
            images, labels = self.mix(images.clone(), labels)
        for loss in self.losses:
            loss.masks = masks
            loss.begin(images)
        found, wanted = run(self.model, images), {}
        if any(loss.taught for loss in self.losses):
            with torch.no_grad():
                wanted = run(self.teacher[0], images)
        parts = {loss.name(): loss.of(found, wanted, labels) for loss in self.losses}
        total = torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()
        return {"loss": total, **parts}
