"""PiToMe's score (arXiv 2405.16148, section 3.2): tokens with much company are merged, those that stand alone stay."""

import torch
import torch.nn.functional as F

from tosa_convert.methods.matching import apart, choose_by_energy, energy_of, match
from tosa_convert.methods.score import Acts, Reads, Score, Site, View, Worth
from tosa_convert.methods.token_ops import Choice, choose_best, keep_count, leading, ordered, put, without_padding


class Energy(Score):
    """A token's energy is its mean similarity to the others; those below a margin, which falls from layer to layer,
    count little. The tokens with the highest energy are matched with each other."""

    chooses = finds_partners = half_at_most = True
    least = 0.5

    @classmethod
    def reads_at(cls, acts):
        """The keys of its own layer, as in the paper; around a block these are not there yet, and it is the tokens."""
        return Reads.TOKENS if acts is Acts.AROUND else Reads.QUERIES_KEYS

    def setup(self, site: Site) -> None:
        self.prefix = site.prefix
        self.margin = 0.9 - 0.9 * site.layer / site.depth

    def read(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """(B, H, N, D) twice → (B, N, D), the mean of the keys over the heads."""
        return keys.mean(1)

    def score(self, view: View) -> Choice:
        kept = keep_count(view.patches, view.steps)
        if view.padding is None:
            features = view.normed if view.reading is None else view.reading
            return choose_by_energy(features, self.prefix, kept, self.margin)
        values, features = self.worth(view)[:2]
        choice = choose_best(without_padding(values, view.padding), self.prefix, kept)
        return match(features, self.prefix, choice) if view.partners else choice

    def worth(self, view: View) -> Worth:
        """The less the energy the more: of the tokens in order of their energy every second one may be skipped."""
        units = F.normalize(view.normed.narrow(1, self.prefix, view.normed.shape[1] - self.prefix), dim=-1)
        absent = None if view.padding is None else view.padding[:, self.prefix :]
        alone = -energy_of(units, self.margin, absent)
        lonely, order = ordered(alone if absent is None else alone.masked_fill(absent, float("inf")))
        second = torch.arange(order.shape[1], device=order.device) % 2 == 1
        values = put(lonely, order, lonely.masked_fill(~second, float("inf")))
        values = torch.cat([leading(values, self.prefix).to(values.dtype), values], dim=1)
        return Worth(values, apart(view.normed, view.padding))
