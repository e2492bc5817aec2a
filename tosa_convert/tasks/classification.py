"""One class per image: sub-folders are the labels, top-1 accuracy is the metric, cross-entropy the loss."""

import torch.nn.functional as F

from tosa_convert.base.errors import UsageError
from tosa_convert.models.outputs import outputs_of
from tosa_convert.models.provenance import class_names
from tosa_convert.tasks.task import Metric, Task


class Classification(Task):
    """For models with a classifier's head."""

    wants = "sort it into class folders, or store a label with each sample"
    metrics = {"top1": Metric("top-1", percent=True)}  # noqa: RUF012

    @classmethod
    def suits(cls, model):
        return outputs_of(model) > 0

    def has_labels(self, images, model):
        """Whether sub-folders are the model's classes, in its order."""
        if not (images.labelled or images.ambiguous):
            return False
        if images.ambiguous:
            raise UsageError(f"{images.name}: {images.ambiguous}; {images.reader.remedy}")
        outputs, names = outputs_of(model), class_names(model)
        if images.reader.numbered and len(images.classes) <= outputs:  # the last classes may have no image here
            return True
        if len(images.classes) != outputs:
            raise UsageError(
                f"{images.name} has {len(images.classes)} classes but the model has {outputs} outputs; use the "
                "data the model was trained on, or a model with as many classes"
            )
        if set(names) == set(images.classes) and names != images.classes:
            raise UsageError(
                f"the classes of {images.name} have the model's class names, but they sort in another order "
                "than its labels; put the label number in front of each folder's name, such as 0-name"
            )
        return True

    def measure(self, output, labels):
        return {"top1": (output.argmax(-1) == labels).float()}

    def loss(self, output, labels, settings):
        mixed = labels.ndim == 2  # by mixup, which smoothes them too
        return F.cross_entropy(output, labels, label_smoothing=0.0 if mixed else settings.smoothing)
