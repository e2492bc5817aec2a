"""A mask, or a class per pixel: intersection over union."""

import torch
import torch.nn.functional as F

from tosa_convert.base.errors import UsageError
from tosa_convert.data.dense import DenseImages, as_large_as, at_truth, has_maps
from tosa_convert.models.dense import DenseModel
from tosa_convert.tasks.task import Metric, Task

HALF, UNKNOWN = 127.0, 255.0
LEAST = 0.5
"""Pixels that a class has to have, as a sum of shares."""


class Segmentation(Task):
    """Logits, of one mask, or of several classes of which every pixel is one: of heads of ours, and of models of
    transformers.

    A mask file holds the number of a class for each pixel, 255 where it is not known. Of one mask a pixel is in it if
    its number is above half of 255, or above 0 where there is none above 1.
    """

    metrics = {"iou": Metric("IoU", percent=True), "image_miou": Metric("mIoU per image", percent=True)}  # noqa: RUF012
    overall = {"miou": Metric("mIoU", percent=True)}  # noqa: RUF012
    differences = {"map_iou": Metric("IoU with original", percent=True)}  # noqa: RUF012
    error_is = "1 − IoU of the two maps, as shares of a pixel"
    takes_heads, wants = True, "give masks with masks:"
    png_scale = 1.0

    def __init__(self, channels: int = 1):
        self.channels = channels
        main = "iou" if channels == 1 else "image_miou"
        self.metrics = {main: type(self).metrics[main]}
        self.overall = {} if channels == 1 else type(self).overall

    @classmethod
    def of(cls, model):
        return cls(model.config.channels if isinstance(model, DenseModel) else model.config.num_labels)

    @classmethod
    def suits(cls, model):
        if isinstance(model, DenseModel):
            return model.config.task == cls.name()
        return any(kind.__name__.endswith("ForSemanticSegmentation") for kind in type(model).__mro__)

    @classmethod
    def head(cls, head, channels, max_depth):
        if max_depth is not None:
            raise UsageError("masks have no depth; leave --max-depth out")
        return super().head(head, channels, max_depth)

    def read(self, source, preprocessing, augment=None, seed=0):
        return DenseImages(source, preprocessing, augment, seed)

    def has_labels(self, images, model):
        return has_maps(images, "masks", self.wants)

    def known(self, labels):
        return self.truth(labels).isfinite().flatten(1).any(1)

    def truth(self, labels: torch.Tensor) -> torch.Tensor:
        """Numbers of files (B, H, W) → classes, NaN where they are not known.

        Raises:
            UsageError: a class that the model does not have.
        """
        if self.channels == 1:
            most = labels.nan_to_num(0, 0, 0).flatten(1).amax(1)[:, None, None]
            mask = labels > torch.where(most > 1, HALF, 0.0)
            return torch.where(labels.isfinite(), mask.float(), torch.nan)
        truth = torch.where((labels == UNKNOWN) | ~labels.isfinite(), torch.nan, labels)
        most = truth.nan_to_num(0).max()
        if most >= self.channels:
            raise UsageError(
                f"a mask has class {most:.0f}, and the model has {self.channels} classes, from 0; give a head of as "
                "many with --num-classes"
            )
        return truth

    def measure(self, output, labels):
        """IoU of a mask; of several classes the mean over those that an image has, found or true. Of an image without
        any, 1."""
        values = []
        for logits, numbers, _ in at_truth(output, labels):
            truth = self.truth(numbers[None])[0]
            known, nothing = truth.isfinite(), truth.new_tensor(torch.nan)
            values.append(
                overlap(classes_of(logits)[known], truth[known].long(), len(logits)) if known.any() else nothing
            )
        return {next(iter(self.metrics)): torch.stack(values)}

    def tally(self, output, labels):
        """Pixels, (2, K): of each class those that are found and true, and those that are either."""
        counts = torch.zeros(2, self.channels, dtype=torch.double)
        for logits, numbers, _ in at_truth(output, labels):
            truth = self.truth(numbers[None])[0]
            known = truth.isfinite()
            found, true = (
                F.one_hot(classes, max(2, self.channels))[:, -self.channels :].bool()
                for classes in (classes_of(logits)[known], truth[known].long())
            )
            counts += torch.stack([(found & true).sum(0), (found | true).sum(0)]).cpu()
        return counts

    def concluded(self, tally):
        """The mean over classes of their IoU in the whole data set, of those that are anywhere found or true."""
        both, either = tally
        there = either > 0
        return {"miou": (both[there] / either[there]).mean().item()} if self.overall else {}

    def loss(self, output, labels, settings):
        truth = self.truth(labels)
        known = truth.isfinite()
        if not known.any():
            return 0.0 * output.sum()
        output = as_large_as(output, truth)
        if output.shape[1] == 1:
            return F.binary_cross_entropy_with_logits(output[:, 0][known], truth[known])
        truth = torch.where(known, truth, -1).long()
        return F.cross_entropy(output, truth, ignore_index=-1, label_smoothing=settings.smoothing)

    def difference(self, output, original):
        pairs = zip(classes_of(output, 1), classes_of(original, 1), strict=True)
        return {"map_iou": torch.stack([overlap(a.flatten(), b.flatten(), output.shape[1]) for a, b in pairs])}

    def values(self, output):
        return classes_of(output, 1).float()

    def picture(self, output):
        return output[:, 0].sigmoid() if output.shape[1] == 1 else self.values(output)

    def error(self, output, original):
        """1 − IoU of the two masks as shares of a pixel, (B,), which knows of smaller changes than whole pixels; mean
        over classes."""
        ours, theirs = shares(output).flatten(2), shares(original).flatten(2)
        both, either = torch.minimum(ours, theirs).sum(-1), torch.maximum(ours, theirs).sum(-1)
        there = either > LEAST  # of classes that hardly a pixel is of there is nothing to lose
        lost = torch.where(there, 1 - both / either.clamp(min=LEAST), 0.0)
        return lost.sum(1) / there.sum(1).clamp(min=1)

    def imitation(self, output, original):
        if output.shape[1] == 1:
            return F.binary_cross_entropy_with_logits(output, original.sigmoid())
        return F.cross_entropy(output, original.softmax(1))


def shares(logits: torch.Tensor) -> torch.Tensor:
    """(B, K, H, W) → probabilities."""
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)


def classes_of(logits: torch.Tensor, axis: int = 0) -> torch.Tensor:
    """The class of each pixel: of one mask 0 or 1."""
    if logits.shape[axis] == 1:
        return (logits.select(axis, 0) > 0).long()
    return logits.argmax(axis)


def overlap(found: torch.Tensor, truth: torch.Tensor, channels: int) -> torch.Tensor:
    """Classes (N,) both → intersection over union: of the one mask, or the mean over the classes that are found or
    true; 1 where there are none."""
    kinds = torch.cat([found, truth]).unique() if channels > 1 else torch.ones(1, dtype=torch.long, device=found.device)
    unions = torch.stack([((found == kind) | (truth == kind)).sum() for kind in kinds])
    both = torch.stack([((found == kind) & (truth == kind)).sum() for kind in kinds])
    return torch.where(unions > 0, both / unions.clamp(min=1), 1.0).mean()
