"""The distance to the map of the original's head."""

from tosa_convert.base.errors import UsageError
from tosa_convert.tasks.task import task_of
from tosa_convert.training.loss import Loss


class Maps(Loss):
    """Wanted where there are no labels, of models whose output is a map, such as depth."""

    taught = True

    def __init__(self, model, teacher, settings):
        super().__init__(model, teacher, settings)
        self.task = task_of(model)

    @classmethod
    def default(cls, situation):
        return float(not situation.labels and bool(situation.task.differences))

    @classmethod
    def check(cls, situation):
        if not situation.task.differences:
            raise UsageError("the model's output is no map to learn from; set maps to 0")

    def of(self, found, wanted, labels):
        return self.task.imitation(*(next(iter(each.values())) for each in (found, wanted)))
