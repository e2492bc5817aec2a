"""A mask, or a class per pixel: intersection over union."""

import torch
import torch.nn.functional as F

from tosa_convert.base.errors import UsageError
from tosa_convert.config.head import HeadConfig
from tosa_convert.data.dense import DenseImages, sizes_of
from tosa_convert.models.dense import DenseModel
from tosa_convert.tasks.task import Metric, Task


class Segmentation(Task):
    """Logits, of one mask, or of several classes of which every pixel is one: of heads of ours, and of models of
    transformers."""

    metrics = {"iou": Metric("IoU", percent=True)}  # noqa: RUF012
    differences = {"map_iou": Metric("IoU with original", percent=True)}  # noqa: RUF012
    error_is = "1 − IoU of the two maps, as shares of a pixel"
    takes_heads = True
    png_scale = 1.0

    @classmethod
    def suits(cls, model):
        if isinstance(model, DenseModel):
            return model.config.task == cls.name()
        return any(kind.__name__.endswith("ForSemanticSegmentation") for kind in type(model).__mro__)

    @classmethod
    def head(cls, head, channels, max_depth):
        if max_depth is not None:
            raise UsageError("masks have no depth; leave --max-depth out")
        return HeadConfig(task=cls.name(), head=head, channels=channels or 1)

    def read(self, source, preprocessing, augment=None, seed=0):
        return DenseImages(source, preprocessing, augment, seed)

    def has_labels(self, images, model):
        return getattr(images, "maps", "") == "masks"

    def measure(self, output, labels):
        """IoU of a mask; of several classes the mean over those that an image has, found or true. Of an image without
        any, 1."""
        values = []
        for logits, truth, (height, width) in zip(output, labels, sizes_of(labels), strict=True):
            sized = F.interpolate(logits[None].float(), size=(height, width), mode="bilinear", align_corners=False)[0]
            truth = truth[:height, :width]
            known = truth.isfinite()
            seen = overlap(classes_of(sized)[known], truth[known].long(), len(logits)) if known.any() else torch.nan
            values.append(torch.as_tensor(seen))
        return {"iou": torch.stack(values)}

    def loss(self, output, labels, settings):
        known = labels.isfinite()
        if not known.any():
            return 0.0 * output.sum()
        if output.shape[1] == 1:
            return F.binary_cross_entropy_with_logits(output[:, 0][known], (labels[known] > 0).float())
        truth = torch.where(known, labels, -1).long()
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
        together = torch.minimum(ours, theirs).sum(-1) / torch.maximum(ours, theirs).sum(-1).clamp(min=1e-12)
        return 1 - together.mean(1)

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
