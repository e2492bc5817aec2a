"""The surgery: chosen blocks of a host model become token-selective, in place."""

import copy

import torch
from torch import nn

from tosa_convert.config import ConvertConfig, build_config
from tosa_convert.errors import UsageError
from tosa_convert.hosts import Host, Tap, host_of
from tosa_convert.scores import build_score
from tosa_convert.selective import Selection, per_head_class, selective_blocks, selective_class


def convert(model: nn.Module, config: ConvertConfig | None = None, **options) -> nn.Module:
    """Make chosen layers of a Vision Transformer token-selective (ToSA, arXiv 2406.08816), in place.

    Args:
        model: a timm or transformers ViT. Its class, forward loop, hidden states and state-dict
            keys stay; each selective block gains ``selector.*`` parameters.
        config: the options, or None to give them as keywords.
        **options: fields of :class:`ConvertConfig`, over those of ``config``.

    Returns:
        The same model. It takes images (B, channels, H, W) of any size the original takes, and all
        tokens leave every layer, in order.

    Raises:
        UsageError: impossible layers or ratios, or a model that is converted already.
        UnsupportedModelError: a model without plain global attention over tokens.
    """
    config = make_config(config, options)
    if is_converted(model):
        raise UsageError("this model is converted already; start from original(model) to convert it anew")
    host = host_of(model)
    try:
        plan = config.plan(depth=len(host.blocks))
    except ValueError as error:
        raise UsageError(str(error)) from None
    if config.selection == "per_head":
        _check_head_slices(host)
    for layer, ratio in plan:
        _make_selective(host, layer, ratio, config)
    layers, ratios = map(list, zip(*plan, strict=True))
    ratio = ratios if isinstance(config.ratio, list) else config.ratio
    model.tosa_config = config.model_copy(update={"layers": layers, "ratio": ratio})
    return model


def make_config(config: ConvertConfig | None, options: dict) -> ConvertConfig:
    """``config`` with ``options`` over it, validated; every mistake is named in one message."""
    given = config.model_dump(exclude_unset=True) if config else {}
    return build_config(ConvertConfig, {**given, **options})


def is_converted(model: nn.Module) -> bool:
    return getattr(model, "tosa_config", None) is not None


def _check_head_slices(host: Host) -> None:
    attention = host.attention(host.blocks[0])
    width = next(p.shape[-1] for name, p in attention.named_parameters() if name.endswith("weight"))
    if width % host.heads:
        raise UsageError("selection per_head needs a width that the number of heads divides; use shared")


def _make_selective(host: Host, layer: int, ratio: float, config: ConvertConfig) -> None:
    listened, block = host.blocks[layer - 2], host.blocks[layer - 1]
    weight = next(block.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed * 1009 + layer)  # the CPU's only: a GPU's stays as it is
        selector = build_score(config, host.heads, host.prefix, layer)
    selection = Selection(layer, ratio, host.prefix, config.selection == "per_head")
    block.__class__ = selective_class(type(block))
    block.selection = selection
    block.selector = selector.to(weight.device, weight.dtype).train(block.training)
    host.tap(listened, block.listen)
    if selection.per_head:
        attention = host.attention(block)
        attention.__class__ = per_head_class(type(attention))
        attention.selection, attention.selection_host = selection, host


def original(model: nn.Module) -> nn.Module:
    """An unconverted twin of a converted model: the same weights, copied, and no state shared.

    After fine-tuning the twin has the fine-tuned weights.
    """
    twin = copy.deepcopy(model)
    for block in selective_blocks(twin):
        del block.selector, block.selection
        for module in block.modules():
            if "selection_host" in module.__dict__:
                del module.selection, module.selection_host
                module.__class__ = type(module).__mro__[1]
        block.__class__ = type(block).__mro__[1]
    for module in twin.modules():
        for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, Tap)]:
            del module._forward_hooks[key]
    if is_converted(twin):
        del twin.tosa_config
    return twin
