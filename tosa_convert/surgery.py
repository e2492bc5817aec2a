"""The surgery: chosen blocks of a host model become token-selective, in place."""

import copy

import torch
from torch import nn

from tosa_convert.bypasses import PARTNERED
from tosa_convert.config import ConvertConfig, build_config
from tosa_convert.errors import UsageError
from tosa_convert.hosts import Hook, Host, host_of
from tosa_convert.lasting import MAKERS, MapGuard, Reduction, check_halves, reducing_class, silenceable_class
from tosa_convert.passage import Passage
from tosa_convert.per_head import per_head_class
from tosa_convert.scores import build_score
from tosa_convert.selective import Matcher, Selection, selective_blocks, selective_class


def convert(model: nn.Module, config: ConvertConfig | None = None, **options) -> nn.Module:
    """Make chosen layers of a Vision Transformer token-selective (ToSA, arXiv 2406.08816), in place.

    Args:
        model: a timm or transformers ViT. Its class, forward loop, hidden states and state-dict
            keys stay; each selective block gains ``selector.*`` parameters.
        config: the options, or None to give them as keywords.
        **options: fields of :class:`ConvertConfig`, over those of ``config``.

    Returns:
        The same model. It takes images (B, channels, H, W) of any size the original takes. With the bypasses
        identity, borrow and merge all tokens leave every layer, in order; with the others they are fewer
        inside, and intermediate features with them.

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
        stages = config.stages(depth=len(host.blocks))
    except ValueError as error:
        raise UsageError(str(error)) from None
    _check_fit(host, config)
    passage = Passage()
    if not config.lasting:
        _make_selective(host, plan, config, passage)
    else:
        _make_lasting(host, stages, config, passage)
    host.patch_projection.register_forward_hook(passage.begin)
    host.prepare()
    layers, ratios = map(list, zip(*plan, strict=True))
    ratio = config.ratio if len(set(ratios)) == 1 and not isinstance(config.ratio, list) else ratios
    model.tosa_config = config.model_copy(update={"layers": layers, "ratio": ratio})
    return model


def set_ratios(model: nn.Module, ratios: dict[int, float]) -> nn.Module:
    """Change the keep ratios, by layer, of a converted model all of whose tokens leave every layer; in place.

    Raises:
        UsageError: tokens are gone behind its layers, which fixes who takes how many away.
    """
    if model.tosa_config.lasting:
        raise UsageError(f"the ratios of bypass {model.tosa_config.bypass} are fixed; convert original(model) anew")
    for block in selective_blocks(model):
        block.selection.ratio = ratios.get(block.selection.layer, block.selection.ratio)
    kept = {block.selection.layer: block.selection.ratio for block in selective_blocks(model)}
    model.tosa_config = model.tosa_config.model_copy(update={"layers": list(kept), "ratio": list(kept.values())})
    return model


def make_config(config: ConvertConfig | None, options: dict) -> ConvertConfig:
    """``config`` with ``options`` over it, validated; every mistake is named in one message."""
    given = config.model_dump(exclude_unset=True) if config else {}
    if isinstance(options.get("layers"), dict):
        given.pop("ratio", None)
    if options.get("method") is not None:
        given = {name: value for name, value in given.items() if name not in ("score", "bypass", "schedule")}
    return build_config(ConvertConfig, {**given, **options})


def is_converted(model: nn.Module) -> bool:
    return getattr(model, "tosa_config", None) is not None


def _check_fit(host: Host, config: ConvertConfig) -> None:
    """Refuse what this model has not got the parts for, before anything is changed."""
    if config.score == "class_attention" and not host.class_token:
        raise UsageError("score class_attention needs a class token, and this model has none; use similarity")
    if config.bypass == "drop" and not host.classifies_by_class_token:
        raise UsageError("bypass drop leaves patches out for good: it is for models that classify by their class token")
    if config.selection == "per_head":
        if not host.own_heads:
            raise UsageError("selection per_head needs heads that attend on their own, which this model's do not")
        attention = host.attention(host.blocks[0])
        width = next(p.shape[-1] for name, p in attention.named_parameters() if name.endswith("weight"))
        if width % host.heads:
            raise UsageError("selection per_head needs a width that the number of heads divides; use shared")
    if config.lasting and host.gives_maps:
        raise UsageError(
            f"bypass {config.bypass} leaves fewer tokens behind a layer, and this model gives feature maps, which need "
            "every token; use identity, borrow or merge"
        )
    if config.lasting and not host.halves:
        raise UsageError(
            f"bypass {config.bypass} takes tokens away between attention and MLP, which are no modules of their own in "
            "this model; use identity, borrow or merge"
        )
    if config.lasting and host.relative:
        raise UsageError(
            f"bypass {config.bypass} leaves fewer tokens behind a layer, and this model's attention looks at places "
            "that are not taken along there yet; use identity, borrow or merge"
        )
    if config.lasting:
        check_halves(host, host.blocks[0])


def _make_selective(host: Host, plan: list[tuple[int, float]], config: ConvertConfig, passage: Passage) -> None:
    """Layers that all tokens leave."""
    selections = {}
    for layer, ratio in plan:
        per_head = config.selection == "per_head"
        selection = Selection(layer, ratio, host.prefix, config.bypass, passage, per_head, selections.get(layer - 1))
        selections[layer] = selection
        block = host.blocks[layer - 1]
        _add_scorer(host, block, selection, config)
        _graft(block, selective_class(type(block)), selection, host)
        if block.selector.listens:
            host.tap(host.blocks[layer - 2], block.listen)
        if config.bypass == "merge" and (norm := host.norm(block)) is not None:
            norm.register_forward_hook(selection.replace_normed)
        if per_head:
            attention = host.attention(block)
            _graft(attention, per_head_class(type(attention)), selection, host)


def _make_lasting(host: Host, stages: list[tuple[int, float]], config: ConvertConfig, passage: Passage) -> None:
    """Layers behind which tokens are gone, from the first one that takes any to the model's last."""
    _guard_maps(host.model, config.bypass)
    before = 1.0
    for layer, ratio in stages:
        block, last = host.blocks[layer - 1], layer == len(host.blocks)
        reduction = Reduction(layer, ratio, host.prefix, config.bypass, passage, reduces=ratio < before, last=last)
        before = ratio
        _add_scorer(host, block, reduction, config)
        _graft(block, reducing_class(type(block)), reduction, host)
        host.tap(host.blocks[layer - 2] if config.listens_before else block, block.listen)
        if block.matcher is not None:
            host.tap(block, block.listen_for_partners)
        for half, module in (("attention", host.attention(block)), ("mlp", host.mlp(block))):
            _graft(module, silenceable_class(type(module), half), reduction, host)


def _guard_maps(model: nn.Module, bypass: str) -> None:
    for name in MAKERS:
        if hasattr(model, name):
            setattr(model, name, MapGuard(getattr(model, name), bypass))


def _add_scorer(host: Host, block: nn.Module, selection: Selection, config: ConvertConfig) -> None:
    weight = next(block.parameters())
    with torch.random.fork_rng(devices=[]):
        # The CPU's only: a GPU's stays as it is.
        torch.default_generator.manual_seed(config.seed * 1009 + selection.layer)
        selector = build_score(config, host.heads, host.prefix, selection.layer, selection.passage)
    block.selector = selector.to(weight.device, weight.dtype).train(block.training)
    partners_needed = config.bypass in PARTNERED and config.score != "similarity"
    block.matcher = Matcher(host.prefix) if partners_needed else None


def _graft(module: nn.Module, kind: type[nn.Module], selection: Selection, host: Host) -> None:
    module.__class__ = kind
    module.selection, module.selection_host = selection, host


def original(model: nn.Module) -> nn.Module:
    """An unconverted twin of a converted model: the same weights, copied, and no state shared.

    After fine-tuning the twin has the fine-tuned weights.
    """
    twin = copy.deepcopy(model)
    for module in twin.modules():
        base = getattr(type(module), "grafted_on", None)
        if base is not None:
            module.__class__ = base
            del module.selection, module.selection_host
            for part in ("selector", "matcher"):
                if part in module.__dict__ or part in module._modules:
                    delattr(module, part)
        for hooks, with_keywords in (
            (module._forward_hooks, module._forward_hooks_with_kwargs),
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        ):
            for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
                del hooks[key]
                with_keywords.pop(key, None)
    for name in MAKERS:
        twin.__dict__.pop(name, None)
    if is_converted(twin):
        del twin.tosa_config
    return twin


def _is_ours(hook) -> bool:
    return isinstance(getattr(hook, "__self__", hook), (Hook, Passage, Selection))
