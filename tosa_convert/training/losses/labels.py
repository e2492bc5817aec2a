"""The loss of the model's task on labels, such as cross-entropy."""

from tosa_convert.base.errors import UsageError
from tosa_convert.tasks.task import task_of
from tosa_convert.training.loss import Loss


class Labels(Loss):
    """Wanted wherever there are labels."""

    def __init__(self, model, teacher, settings):
        super().__init__(model, teacher, settings)
        self.task = task_of(model)

    @classmethod
    def default(cls, situation):
        if not situation.task.learns:
            return 0.0
        try:
            return float(situation.task.has_labels(situation.images, situation.model))
        except UsageError as error:
            raise UsageError(f"{error}, or fine-tune without labels (--labels 0)") from None

    @classmethod
    def check(cls, situation):
        if not situation.task.metrics:
            raise UsageError("the model has no head to train with labels; fine-tune with labels: 0")
        if not situation.task.learns:
            raise UsageError(f"{situation.task.wants}; learn from the original alone (labels: 0)")
        if not situation.task.has_labels(situation.images, situation.model):
            raise UsageError(
                f"{situation.images.name} has no labels that this model can learn from ({situation.task.wants}); or "
                "fine-tune with labels: 0"
            )

    def of(self, found, wanted, labels):
        return self.task.loss(next(iter(found.values())), labels, self.settings)
