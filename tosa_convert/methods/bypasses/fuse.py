"""EViT's bypass (arXiv 2202.07800, section 3.2): the skipped tokens become one, summed by their weights."""

import torch

from tosa_convert.methods.bypass import Bypass
from tosa_convert.methods.score import Acts
from tosa_convert.methods.token_ops import gather_tokens, pick, stand_ins


class Fuse(Bypass):
    """The fused token comes last. Its weights are the class token's attention; where positions matter, it stands where
    the heaviest of its tokens stood."""

    acts = Acts.BETWEEN
    needs_weights = True
    without_weights = "persist"

    def reduce(self, tokens, choice, groups, weights):
        if choice.skipped.shape[1] == 0:  # a sum of no tokens would be a token of its own
            return tokens, groups
        shares = pick(weights, choice.skipped)[..., None]
        fused = (gather_tokens(tokens, choice.skipped) * shares).sum(1, keepdim=True)
        last = torch.full_like(choice.skipped, choice.attended.shape[1])
        into = stand_ins(choice._replace(partners=last))
        together = torch.cat([gather_tokens(tokens, choice.attended), fused], dim=1)
        at = pick(groups.at, torch.cat([choice.attended, choice.skipped[:, :1]], dim=1))
        sizes = torch.ones_like(together[..., 0])
        return together, groups._replace(sizes=sizes, places=pick(into, groups.places), at=at)
