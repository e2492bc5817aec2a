"""MCTF's token reduction consistency (arXiv 2403.10030, section 3.4): the same weights have to answer alike when fewer
tokens are taken away."""

import warnings

import torch
import torch.nn.functional as F

from tosa_convert.base.errors import TosaWarning, UsageError
from tosa_convert.models.adapter import adapter_of, run
from tosa_convert.models.outputs import last_norm
from tosa_convert.selective.selection import selective_blocks
from tosa_convert.tasks.task import task_of
from tosa_convert.training.loss import LastTokens, Loss

DRAWN, AGAINST = 8, 16
"""The paper's r is 16, and that of its second pass 0 to 7."""
DISTANCE = 3.0
"""How much the distance of the class tokens counts beside the loss on labels."""
CONFIDENT = 0.4
"""The distance is the mean over the images whose label, or without labels whose answer, has more than this
probability."""


class Consistency(Loss):
    """A second pass takes away 0 to 7 sixteenths, drawn anew at each step, of the tokens that the first one does. With
    labels its own loss on them counts too; the first pass's class token, after the last norm,
    is drawn to the second's."""

    def __init__(self, model, teacher, settings):
        super().__init__(model, teacher, settings)
        self.model, self.task = model, task_of(model)
        self.current = selective_blocks(model)[0].selection.current
        self.tokens, self.norm = LastTokens(), last_norm(model)
        self.handle = adapter_of(model).blocks[-1].register_forward_hook(self.tokens)

    @classmethod
    def default(cls, situation):
        wanted = super().default(situation)
        if wanted and not adapter_of(situation.model).class_token:
            message = "the model has no class token, which the second pass of MCTF compares: it is left out"
            warnings.warn(message, TosaWarning, stacklevel=2)
            return 0.0
        return wanted

    @classmethod
    def fits(cls, config):
        if not config.reduces:
            raise UsageError(
                f"bypass {config.bypass} takes no tokens away, so there are no two passes to be alike; set consistency "
                "to 0"
            )

    @classmethod
    def check(cls, situation):
        super().check(situation)
        if not adapter_of(situation.model).class_token:
            raise UsageError("consistency compares class tokens, and this model has none; set consistency to 0")

    def begin(self, images):
        share = torch.randint(DRAWN, ()).item() / AGAINST
        with self.current.taking(share):
            self.other = next(iter(run(self.model, images).values()))
        self.wanted = self._class_token().detach()

    def of(self, found, wanted, labels):
        output = next(iter(found.values()))
        apart = (self._class_token() - self.wanted).square().mean(-1)
        if not self.task.metrics or self.task.differences:
            return DISTANCE * apart.mean()
        sure = _confidence(output.detach().softmax(-1), labels if self.settings.labels else None) > CONFIDENT
        distance = DISTANCE * (apart * sure).sum() / sure.sum().clamp(min=1)
        if not self.settings.labels:
            return distance
        return distance + self.settings.labels * self.task.loss(self.other, labels, self.settings)

    def _class_token(self) -> torch.Tensor:
        """(B, C), after the model's own last norm; a model without one has it normed without weights."""
        tokens = self.tokens.value[:, 0]
        return F.layer_norm(tokens, tokens.shape[-1:]) if self.norm is None else self.norm(tokens)

    def close(self):
        self.handle.remove()


def _confidence(shares: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """(B, classes) → (B,): what the labels get, of a mixture of images that of each as far as it counts; without labels
    the largest."""
    if labels is None:
        return shares.amax(-1)
    if labels.is_floating_point():
        return (shares * labels).sum(-1)
    return shares.gather(-1, labels[:, None])[:, 0]
