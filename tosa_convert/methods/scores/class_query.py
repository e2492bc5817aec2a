"""The tokens that the class token looks for in the layer itself, those that idled before among them (IdleViT, arXiv
2310.05654)."""

import torch

from tosa_convert.methods.score import Acts, Reads, Score, View


class ClassQuery(Score):
    """The products of the class token's query with the keys of all tokens that enter the layer, the mean over heads,
    without the softmax of each. Around a block they are worked out before it runs, from its own projections, without a
    key of any token that will idle; where tokens are gone after a layer, they are those of its attention."""

    reads = Reads.CLASS_QUERY
    needs_class_token = True

    @classmethod
    def reads_at(cls, acts):
        return Reads.CLASS_QUERY if acts is Acts.AROUND else Reads.QUERIES_KEYS

    def read(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """(B, H, N, D) twice → (B, N)."""
        return (queries[:, :, :1] * queries.shape[-1] ** -0.5 @ keys.mT).mean(1)[:, 0]

    def score(self, view: View) -> torch.Tensor:
        """(B, N)."""
        return view.reading if view.class_logits is None else view.class_logits()
