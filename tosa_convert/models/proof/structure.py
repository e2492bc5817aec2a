"""What a proof found: the parts of a model and of its blocks, by name. It goes into a run as JSON."""

from pydantic import BaseModel, ConfigDict


class Positions(BaseModel):
    """Rotary positions among the arguments of a call: cosines and sines, or complex numbers.

    Attributes:
        name: of the parameter.
        axis: of the tokens, from the end.
        patches_only: whether they are of the patches, not of all tokens.
        turn: which channels are a pair: "halves", i and i + D / 2, or "pairs", neighbours.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    axis: int
    patches_only: bool = False
    turn: str


class Heads(BaseModel):
    """How a block's attention makes its queries, keys and values. Names are those within the attention module.

    Attributes:
        count: heads.
        projections: of queries, keys and values; or of all three together.
        order: how the outputs of one projection lie: "qkv heads" is three times all heads, "heads qkv" is for each head
            all three; "apart" with a projection for each.
        norms: of queries and keys, if they are normalised: head by head, or all heads together.
        norm_heads: whether the norms take one head at a time.
        scale: of QKᵀ.
        output: the projection after the heads, if the attention module has one.
        positions: by which queries and keys are turned, if they are.
    """

    model_config = ConfigDict(extra="forbid")

    count: int
    projections: list[str]
    order: str
    norms: list[str] = []
    norm_heads: bool = False
    scale: float
    output: str | None
    positions: Positions | None = None


class Structure(BaseModel):
    """The parts of a model.

    Attributes:
        row: name of the row of blocks.
        layers: how many of them, from the first on, run on the same tokens.
        projection: name of the module that gives the patches.
        prefix, suffix: tokens before and after the patches.
        frames: pictures of a video; 0 of a model of images.
        width: channels of a token.
        norm: name within a block of what normalises the tokens before its attention; None without.
        attention: name within a block.
        mlp: name within a block, where attention and MLP are modules of their own whose outputs are added; else None.
        returns: how many values a block returns, its tokens first; 0 for a bare tensor.
        attention_returns: the same of its attention module, whose second value is its weights.
        heads: how it attends.
        selection: whether a selective layer was proven to be the original with its skipped tokens masked and restored.
    """

    model_config = ConfigDict(extra="forbid")

    row: str
    layers: int
    projection: str
    prefix: int
    suffix: int = 0
    frames: int = 0
    width: int
    norm: str | None
    attention: str
    mlp: str | None
    returns: int
    attention_returns: int
    heads: Heads
    selection: bool = False
