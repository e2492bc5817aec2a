"""Cross-entropy with the labels."""

import torch.nn.functional as F

from tosa_convert.base.errors import UsageError
from tosa_convert.data.images import check_classes
from tosa_convert.models.provenance import class_names
from tosa_convert.training.loss import Loss


class Labels(Loss):
    """Wanted wherever there are labels."""

    @classmethod
    def default(cls, situation):
        if situation.outputs and situation.images.ambiguous:
            raise UsageError(
                f"{situation.images.name}: {situation.images.ambiguous}; tidy the folder, or fine-tune without labels "
                "(--labels 0)"
            )
        return float(situation.images.labelled and situation.outputs > 0)

    @classmethod
    def check(cls, situation):
        images = situation.images
        if not images.labelled:
            raise UsageError(f"{images.name} has no labels; sort it into class folders, or fine-tune with labels: 0")
        if not situation.outputs:
            raise UsageError("the model has no head to train with labels; fine-tune with labels: 0")
        check_classes(images, situation.outputs, class_names(situation.model))

    def of(self, found, wanted, labels):
        return F.cross_entropy(found["logits"], labels, label_smoothing=self.settings.label_smoothing)
