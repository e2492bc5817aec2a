"""KL to the original's logits (Hinton et al., arXiv 1503.02531)."""

import torch
import torch.nn.functional as F

from tosa_convert.base.errors import UsageError
from tosa_convert.training.loss import Loss


class Logits(Loss):
    """Wanted where there are no labels, of models with a head."""

    taught = True

    @classmethod
    def default(cls, situation):
        return float(not situation.labels and situation.outputs > 0)

    @classmethod
    def check(cls, situation):
        if not situation.outputs:
            raise UsageError("the model has no classifier whose logits could be learnt from; set logits to 0")

    def of(self, found, wanted, labels):
        return soft_divergence(found["logits"], wanted["logits"], self.settings.temperature)


def soft_divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T² · KL(teacher ‖ student) at temperature T, averaged over images."""
    student, teacher = ((logits / temperature).log_softmax(-1) for logits in (student, teacher))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
