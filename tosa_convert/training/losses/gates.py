"""SPA's loss on selection labels (arXiv 2410.23608, section 3.2): which patches the gates are to select."""

import torch
import torch.nn.functional as F

from tosa_convert.base.errors import TosaError, UsageError
from tosa_convert.methods.score import Score
from tosa_convert.models.adapter import adapter_of
from tosa_convert.selective.selection import choosing_blocks
from tosa_convert.training.loss import Loss

MATTERS = 0.1
"""Share of a pixel, as the model sees it, that has to matter for its patch to be labelled: what is small in a large
image is less than a pixel of its own there."""


class Gates(Loss):
    """The labels are masks or boxes of the images, rasterised to patches; without any, what the last layer of the
    original attends to above average: from the class token, or from all tokens where there is none."""

    teaches_selection = True

    def __init__(self, model, teacher, settings):
        super().__init__(model, teacher, settings)
        adapter, original = adapter_of(model), adapter_of(teacher)
        self.prefix, self.class_token = adapter.prefix, adapter.class_token
        self.current, self.blocks = choosing_blocks(model)[0].selection.current, choosing_blocks(model)
        self.tap = original.tap(original.blocks[-1], self.listen)

    @property
    def taught(self):
        return self.masks is None

    @classmethod
    def fits(cls, config):
        if not config.part(Score).gates:
            raise UsageError("the selection loss is for score gate, as in SPA; set gates to 0")

    def listen(self, queries: torch.Tensor, keys: torch.Tensor) -> None:
        """Queries and keys of the original's last layer, (B, H, N, D)."""
        asking = queries[:, :, :1] if self.class_token else queries
        seen = (asking * queries.shape[-1] ** -0.5 @ keys.mT).softmax(-1).mean((1, 2))[:, self.prefix :]
        self.attended = seen > seen.mean(1, keepdim=True)

    def of(self, found, wanted, labels):
        gates = self.current.state.gates
        logits = [gates[block.selection.layer][:, self.prefix :] for block in self.blocks]
        if torch.is_grad_enabled() and not any(each.requires_grad for each in logits):
            raise TosaError(
                "the gates get no gradients under re-entrant gradient checkpointing; use use_reentrant=False, in timm "
                "timm.layers.set_reentrant_ckpt(False)"
            )
        if self.masks is None:
            patches = self.attended
        else:
            grid = self.current.state.grid
            patches = F.adaptive_max_pool2d(self.masks[:, None], grid)[:, 0].flatten(1) > MATTERS
        labels = patches.float()
        return torch.stack([F.binary_cross_entropy_with_logits(each.float(), labels) for each in logits]).sum()

    def close(self):
        self.tap.remove()
