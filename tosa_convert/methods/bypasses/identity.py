"""ToSA's bypass (arXiv 2406.08816, section 3): a skipped token leaves the layer as it came."""

from typing import Literal

from pydantic import Field

from tosa_convert.methods import parts
from tosa_convert.methods.bypass import Bypass, Gathered
from tosa_convert.methods.token_ops import gather_tokens


class Identity(Bypass):
    """Skipped tokens are left as they are."""

    for_thresholds = ("container",)

    class Options(parts.Options):
        """
        Attributes:
            selection: "shared" lets one set of tokens run the whole layer, attention and MLP, which is what saves
                work; "per_head" is the paper's Eq. 4: each head attends over its own tokens, and all run the MLP.
            container: of images that keep different numbers of tokens, pack the attention of a batch into containers of
                so many tokens, or of the longest image (Select and Pack, arXiv 2410.23608, section 3.3). None works out
                each image's attention by itself. The result is the same.
        """

        selection: Literal["shared", "per_head"] = "shared"
        container: int | None = Field(default=None, ge=1)

    @property
    def per_head(self) -> bool:
        return self.options.selection == "per_head"

    @property
    def shares(self) -> bool:
        return not self.per_head

    def gather(self, tokens, normed, choice):
        """The tokens that attend, each a group of its own; the others are in none."""
        return Gathered(gather_tokens(tokens, choice.attended))
