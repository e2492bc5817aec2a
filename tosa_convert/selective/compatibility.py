"""What a conversion needs of a model, asked before anything is changed."""

from tosa_convert.base.errors import UsageError
from tosa_convert.config.conversion import ConvertConfig
from tosa_convert.methods.bypass import Bypass
from tosa_convert.methods.score import Reads, Score
from tosa_convert.models.adapter import Adapter
from tosa_convert.selective.reducing_block import check_halves


def check_fit(adapter: Adapter, config: ConvertConfig, ratios: dict[int, float]) -> None:
    """Refuse what this model lacks the parts for, and ratios, by layer, that the score cannot do.

    Raises:
        UsageError: score or bypass look for something that is not there.
        UnsupportedModelError: its blocks cannot be run in halves.
    """
    bypass = config.make(Bypass)
    looks = config.part(Score).reads_at(config.acts) is Reads.CLASS_QUERY
    if (config.part(Score).needs_class_token or looks) and not adapter.class_token:
        instead = "--method tome" if config.reduces else "score similarity"
        raise UsageError(f"score {config.score} needs a class token, and this model has none; use {instead}")
    if looks and not adapter.own_heads:
        raise UsageError(
            f"score {config.score} works out what the class token looks for before a layer runs, and this model mixes "
            "its heads inside the attention or has tokens behind its patches; use class_attention"
        )
    least, lowest = config.part(Score).least, min(ratios.values())
    if not config.reduces and lowest < least:
        raise UsageError(
            f"score {config.score} cannot choose fewer than {least:g} of a layer's patches, and a ratio is {lowest:g}; "
            "raise the ratio, or use similarity"
        )
    if not bypass.puts_back and not adapter.classifies_by_class_token:
        raise UsageError(
            f"bypass {config.bypass} removes patch tokens and never puts them back: it is for models that classify by "
            "their class token"
        )
    if bypass.per_head:
        _check_heads(adapter)
    if config.reduces:
        _check_reduction(adapter, config)


def _check_heads(adapter: Adapter) -> None:
    if not adapter.own_heads:
        raise UsageError("selection per_head is not possible for this model: its heads are mixed inside the attention")
    attention = adapter.attention(adapter.blocks[0])
    width = next(p.shape[-1] for name, p in attention.named_parameters() if name.endswith("weight"))
    if width % adapter.heads:
        raise UsageError("selection per_head needs a width that the number of heads divides; use shared")


def _check_reduction(adapter: Adapter, config: ConvertConfig) -> None:
    if adapter.gives_maps and not config.part(Bypass).puts_back:
        raise UsageError(
            f"bypass {config.bypass} removes patch tokens and never puts them back, and this model gives feature maps, "
            "which need every token; use identity, borrow, merge or persist"
        )
    if adapter.windows:
        raise UsageError(
            f"bypass {config.bypass} leaves fewer tokens after a layer, and this model has layers with windows in "
            "between, which need every token; use identity, borrow or merge"
        )
    if not adapter.halves:
        raise UsageError(
            f"bypass {config.bypass} needs attention and MLP as a module each, one after the other, which this model "
            "has not; use identity, borrow or merge"
        )
    check_halves(adapter, adapter.blocks[0])
