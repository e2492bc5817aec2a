"""Mutual Pair Merging's score (arXiv 2604.05718): of two tokens that are nearest to each other, one stands for both."""

import torch
import torch.nn.functional as F

from tosa_convert.methods.matching import apart, match
from tosa_convert.methods.score import Reads, Score, Site, View, Worth
from tosa_convert.methods.token_ops import choose_best, keep_count, leading, without_padding


class Mutual(Score):
    """Cosine similarity between the layer's tokens. The paper merges every mutual pair, so that the number of tokens is
    the image's own; here it is the ratio's: the second tokens of the most similar pairs are skipped first, then the
    most similar of those that are in no pair."""

    reads = Reads.TOKENS
    chooses = finds_partners = True

    def setup(self, site: Site) -> None:
        self.prefix = site.prefix

    def score(self, view: View):
        scores, features = self.worth(view)[:2]
        choice = choose_best(without_padding(scores, view.padding), self.prefix, keep_count(view.patches, view.steps))
        return match(features, self.prefix, choice) if view.partners else choice

    def worth(self, view: View) -> Worth:
        """The cosine to the nearest token, the other way round: −4 to −2 for second tokens of pairs, −1 to 1 for those
        in no pair, 2 to 4 for first ones."""
        # In half precision many pairs would be alike.
        units = F.normalize(view.tokens.float(), dim=-1)
        patches = units.narrow(1, self.prefix, units.shape[1] - self.prefix)
        place = torch.arange(patches.shape[1], device=patches.device)
        none = place[:, None] == place[None]
        if view.padding is not None:
            none = none | view.padding[:, None, self.prefix :]
        nearness, mate = (patches @ patches.mT).masked_fill(none, -2.0).max(-1)
        mutual = mate.gather(1, mate) == place
        # Cosines are between −1 and 1: second tokens of pairs come below all others, and first ones above.
        scores = -nearness + 3.0 * torch.where(place < mate, 1.0, -1.0) * mutual
        values = torch.cat([leading(scores, self.prefix).to(scores.dtype), scores], dim=1)
        return Worth(values, apart(units, view.padding))
