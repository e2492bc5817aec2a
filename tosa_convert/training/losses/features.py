"""The distance to the original's last tokens."""

import torch
import torch.nn.functional as F
from torch import nn

from tosa_convert.base.errors import UsageError
from tosa_convert.methods.bypass import Bypass
from tosa_convert.models.adapter import adapter_of
from tosa_convert.training.loss import LastTokens, Loss


class Features(Loss):
    """Wanted where there are no labels, and as many tokens as the original has."""

    taught = True

    def __init__(self, model, teacher, settings):
        super().__init__(model, teacher, settings)
        self.student_tokens, self.teacher_tokens = LastTokens(), LastTokens()
        self.handles = [
            adapter_of(model).blocks[-1].register_forward_hook(self.student_tokens),
            adapter_of(teacher).blocks[-1].register_forward_hook(self.teacher_tokens),
        ]

    @classmethod
    def default(cls, situation):
        return float(not situation.labels and _whole(situation.model))

    @classmethod
    def check(cls, situation):
        if not _whole(situation.model):
            raise UsageError(
                f"bypass {situation.model.tosa_config.bypass} leaves fewer tokens than the original has to learn from; "
                "set features to 0"
            )

    def of(self, found, wanted, labels):
        return relative_distance(self.student_tokens.value, self.teacher_tokens.value)

    def close(self):
        for handle in self.handles:
            handle.remove()


def _whole(model: nn.Module) -> bool:
    return model.tosa_config.make(Bypass).puts_back


def relative_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of the tokens, as a share of the teacher's mean square: free of scale."""
    return F.mse_loss(student, teacher) / teacher.square().mean()
