"""The tokens that the class token looks at (EViT, arXiv 2202.07800, section 3.1; IdleViT, arXiv 2310.05654)."""

import torch

from tosa_convert.methods.score import Score


class ClassAttention(Score):
    """Attention from the first prefix token, the class token, to every token: the only row of each head's map that is
    computed here."""

    needs_class_token = weighs = True

    def read(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """(B, H, N, D) twice → (B, H, N)."""
        row = queries[:, :, :1] * queries.shape[-1] ** -0.5 @ keys.mT
        return row.softmax(-1)[:, :, 0]
