"""The surgery: chosen blocks of a model become token-selective, in place."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from tosa_convert.base.errors import TosaError, UsageError, gist
from tosa_convert.base.seeding import as_seed
from tosa_convert.config.conversion import KINDS, ConvertConfig
from tosa_convert.config.options import over
from tosa_convert.config.segments import as_option
from tosa_convert.config.validation import build
from tosa_convert.methods.bypass import Bypass
from tosa_convert.methods.parts import Part
from tosa_convert.methods.score import Reads, Score, Site
from tosa_convert.models.adapter import Adapter, adapter_of
from tosa_convert.models.hooks import Receive, remove_hooks
from tosa_convert.models.proof.calls import NotProvenError
from tosa_convert.models.proof.prove import in_float32
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.models.subclassing import check_own, heard_class, steer, ungraft
from tosa_convert.selective.block import selective_class
from tosa_convert.selective.compatibility import check_fit
from tosa_convert.selective.forward_state import CurrentForward
from tosa_convert.selective.proof import prove_selection
from tosa_convert.selective.reducing_block import MAKERS, PRUNER, MapGuard, PruneGuard, reducing_class
from tosa_convert.selective.selection import Matcher, Selection, choosing_blocks, keeps_any_number, selective_blocks


def convert(model: nn.Module, config: ConvertConfig | None = None, **options: Any) -> nn.Module:
    """Make chosen layers of a Vision Transformer token-selective (ToSA, arXiv 2406.08816), in place.

    Args:
        model: a timm or transformers ViT. Its class, forward loop, hidden states and state-dict
            keys stay; each selective block gains ``selector.*`` parameters.
        config: the options, or None to give them as keywords.
        **options: fields of :class:`ConvertConfig`, over those of ``config``. ``score``, ``bypass`` and ``schedule``
            may be objects of your own as well as names: see :class:`~tosa_convert.methods.score.Score`.

    Returns:
        The same model. It takes images (B, channels, H, W) of any size the original takes. With the bypasses
        identity, borrow and merge all tokens leave every layer, in order; with the others they are fewer
        inside, and intermediate features with them.

    Raises:
        UsageError: impossible layers or ratios, or a model that is converted already.
        UnsupportedModelError: a model without plain global attention over tokens.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"{model!r} is no model; open one with tosa_convert.load(NAME), or give a torch module")
    own, options = _take_objects(options)
    config = make_config(config, options)
    if is_converted(model):
        raise UsageError("this model is converted already; name the original model (in Python original(model))")
    with _leaving_no_trace(model):
        adapter = adapter_of(model)
        try:
            counts = len(adapter.blocks), adapter.patches(preprocessing_of(model).size)
            plan, stages = config.plan(*counts), config.stages(*counts)
        except ValueError as error:
            raise UsageError(str(error)) from None
        check_fit(adapter, config, dict(plan))
        _prove(model)
        _Surgeon(adapter, config, own).operate(stages)
    layers, ratios = map(list, zip(*plan, strict=True))
    ratio = config.ratio if all(each == config.ratio for each in ratios) else ratios
    _note(model, config, layers, ratio)
    return model


@contextmanager
def _leaving_no_trace(model: Any) -> Iterator[None]:
    """If a proof fails within, or anything else, what was known of the model before is all that is left on it."""
    before = getattr(model, "tosa_proof", None)
    try:
        yield
    except BaseException:
        if before is not None:
            model.tosa_proof = before
        elif hasattr(model, "tosa_proof"):
            del model.tosa_proof
        raise


def _prove(model: Any) -> None:
    """What no family knows by name is proven once on the model itself, see :mod:`tosa_convert.selective.proof`."""
    known = getattr(model, "tosa_proof", None)
    if known is None or known["selection"]:
        return
    model.tosa_proof = {**known, "selection": True}  # for the copies that the proof converts
    try:
        prove_selection(light_copy(in_float32(model)), lambda copied, **options: convert(light_copy(copied), **options))
    except TosaError:
        raise
    except Exception as error:  # whatever a model does with fewer tokens than it has
        raise NotProvenError(
            f"{type(model).__name__} does not run with layers on some of its tokens ({gist(error)})"
        ) from error


def _note(model: Any, config: ConvertConfig, layers: list[int], ratio: float | list[float]) -> None:
    """Let a model know how it is converted."""
    counted = {"r": None} if getattr(config, "r", None) else {}  # the ratios say it now
    own = config.thresholds(layers)
    threshold = [own[layer] for layer in layers] if isinstance(config.threshold, list) else config.threshold
    noted = {"layers": layers, "ratio": ratio, "threshold": threshold, **counted}
    model.tosa_config = config.model_copy(update=noted)


def _take_objects(options: dict[str, Any]) -> tuple[dict[str, Part], dict[str, Any]]:
    """The scores, bypasses and schedules among the options that are objects, and the options with their names."""
    own = {}
    for kind, base in KINDS.items():
        given = options.get(kind)
        if isinstance(given, type) and issubclass(given, base):
            given = given()
        if isinstance(given, Part):
            if not isinstance(given, base):
                raise UsageError(f"{kind} is a {given.kind}: {type(given).__name__}; give it as {given.kind}=")
            own[kind] = given
    named = {kind: part.name() for kind, part in own.items()}
    theirs = {name: value for part in own.values() for name, value in part.options.model_dump().items()}
    return own, {**options, **theirs, **named}


def set_ratios(model: nn.Module, ratios: dict[int, float], segments: list[list[int]] | None = None) -> nn.Module:
    """Change the keep ratios, by layer, of a converted model all of whose tokens leave every layer; in place.

    Args:
        segments: layers in a row that are to share one choice; None leaves that as it is.

    Raises:
        UsageError: later layers have fewer tokens, so the ratios cannot change; different ratios for one choice; a
            layer that is to choose, and was converted to follow.
    """
    config: Any = model.tosa_config
    if config.reduces:
        raise UsageError(f"the ratios of bypass {config.bypass} are fixed; convert original(model) again")
    blocks = {block.selection.layer: block for block in selective_blocks(model)}
    own: dict[int, float] = {layer: block.selection.ratio for layer, block in blocks.items()}
    whole = own | {layer: ratio for layer, ratio in ratios.items() if layer in own}
    shared = {layer: block.selection.segment for layer, block in blocks.items()}
    if segments is not None:
        shared = {layer: next((tuple(each) for each in segments if layer in each), (layer,)) for layer in blocks}
    for layer, (first, *_) in shared.items():
        if whole[layer] != whole[first]:
            raise UsageError(
                f"layers {first} to {shared[layer][-1]} share one choice, so one ratio; give each of them the same"
            )
        if blocks[layer].selector is None and layer == first:
            raise UsageError(f"layer {layer} cannot choose: it was converted to follow another layer")
    for layer, block in blocks.items():
        block.selection.ratio, block.selection.segment = whole[layer], shared[layer]
    config = config.model_copy(update={"segment": as_option(list(dict.fromkeys(shared.values())))})
    _note(model, config, list(blocks), list(whole.values()))
    return model


def make_config(config: ConvertConfig | None, options: dict[str, Any]) -> ConvertConfig:
    """``config`` with ``options`` over it, validated; every mistake is named in one message."""
    given = {} if config is None else {**config.model_dump(exclude_unset=True), "seed": config.seed}
    return build(ConvertConfig, over(given, options))


def light_copy(model: nn.Module) -> nn.Module:
    """A copy that shares its weights with the model."""
    shared = {id(value): value for value in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, memo=shared)


def with_threshold(model: nn.Module, threshold: float) -> nn.Module:
    """A :func:`light_copy` of a conversion with thresholds in which every layer that chooses has this one."""
    copied = light_copy(model)
    for block in choosing_blocks(copied):
        block.selection.threshold = threshold
    return copied


def is_converted(model: nn.Module) -> bool:
    return getattr(model, "tosa_config", None) is not None


def is_whole(model: nn.Module) -> bool:
    """Whether a converted model skips nothing: all its ratios are 1."""
    return not keeps_any_number(model) and all(block.selection.ratio == 1 for block in selective_blocks(model))


class _Surgeon:
    """One conversion: what all of its layers share."""

    def __init__(self, adapter: Adapter, config: ConvertConfig, own: dict[str, Part]):
        self.adapter, self.config, self.current = adapter, config, CurrentForward(adapter)
        self.score = cast(Score, own.get("score")) or config.make(Score)
        self.bypass = cast(Bypass, own.get("bypass")) or config.make(Bypass)

    def operate(self, stages: list[tuple[int, float]]) -> None:
        """Convert the layers of these numbers, with these ratios."""
        adapter, before, previous = self.adapter, 1.0, None
        segments = self.config.segments([layer for layer, _ in stages])
        thresholds = self.config.thresholds([layer for layer, _ in stages])
        made = []
        for layer, ratio in stages:
            selection = self._selection(layer, ratio)
            selection.threshold = thresholds[layer]
            selection.segment = next(tuple(segment) for segment in segments if layer in segment)
            if self.config.reduces:
                selection.reduces, before = ratio < before, ratio
            elif previous is not None and previous.layer == layer - 1 and selection.reads_before:
                selection.previous = previous
            previous, block = selection, adapter.blocks[layer - 1]
            for module, method in [(block, "forward"), *self._steered(block)]:
                check_own(module, method)
            made.append((block, selection, None if selection.follows else self._score(block, selection)))
        if self.config.reduces:
            _guard_maps(adapter.model, self.current, self.bypass.puts_back)
        for each in made:  # what a score of one's own may fail with is over
            self._convert(*each)
        adapter.patch_projection.register_forward_hook(self.current.begin)
        adapter.prepare()

    def _selection(self, layer: int, ratio: float) -> Selection:
        acts, score = self.config.acts, type(self.score)
        return Selection(
            layer,
            ratio,
            self.adapter.prefix,
            self.bypass,
            self.current,
            reads=score.reads_at(acts),
            reads_before=score.reads_before(acts),
            last=layer == len(self.adapter.blocks),
        )

    def _convert(self, block: Any, selection: Selection, score: Score | None) -> None:
        adapter = self.adapter
        block.selector, block.matcher = score, None
        if score is not None:
            finds_partners = score.finds_partners and selection.threshold is None
            block.matcher = Matcher(adapter.prefix) if self.bypass.partners and not finds_partners else None
        for module, method in self._steered(block):
            steer(module, method)
        kind: Callable[[type], type] = reducing_class if self.config.reduces else selective_class
        block.__class__ = kind(type(block))
        block.selection, block.adapter = selection, adapter
        if selection.reads is Reads.QUERIES_KEYS and not selection.follows:
            read = adapter.blocks[selection.layer - 2] if selection.reads_before else block
            self._tap(read, block.listen)
        if block.matcher is not None and self.config.reduces:
            self._tap(block, block.listen_for_partners)

    def _tap(self, block: nn.Module, receive: Receive) -> None:
        self.current.taps.append(self.adapter.tap(block, receive))
        heard: Callable[[type], type] = heard_class
        block.__class__ = heard(type(block))

    def _score(self, block: nn.Module, selection: Selection) -> Score:
        """That of one layer."""
        weight, adapter = next(block.parameters()), self.adapter
        layer, depth, config = selection.layer, len(adapter.blocks), self.config
        site = Site(layer, adapter.heads, adapter.prefix, adapter.width, config.acts, config.seed, depth)
        with torch.random.fork_rng(devices=[]):
            # The CPU's only: a GPU's stays as it is.
            torch.default_generator.manual_seed(as_seed(self.config.seed * 1009 + selection.layer))
            score = copy.deepcopy(self.score)
            score.setup(site)
        return score.to(weight.device, weight.dtype).train(block.training)

    def _steered(self, block: nn.Module) -> list[tuple[nn.Module, str]]:
        """What is answered for in this block, see :func:`tosa_convert.models.subclassing.answered`."""
        adapter, bypass = self.adapter, self.bypass
        found = list(adapter.steered(block))
        if bypass.gives_normed and (norm := adapter.norm(block)) is not None:
            found.append((norm, "forward"))
        if bypass.per_head:
            found.append((adapter.attention(block), "forward"))
        if self.config.reduces:
            silent = [module for branch in adapter.branches(block) for module, _ in branch]
            found += [(module, "forward") for module in (adapter.attention(block), *silent)]
        return found


def _guard_maps(model: nn.Module, current: CurrentForward, puts_back: bool) -> None:
    for name in MAKERS:
        if hasattr(model, name):
            setattr(model, name, MapGuard(getattr(model, name), current, puts_back))
    if hasattr(model, PRUNER) and puts_back:
        setattr(model, PRUNER, PruneGuard(getattr(model, PRUNER)))


def original(model: nn.Module) -> nn.Module:
    """An unconverted twin of a converted model: the same weights, copied, and no state shared.

    After fine-tuning the twin has the fine-tuned weights.
    """
    twin = copy.deepcopy(model)
    for block in selective_blocks(twin):
        for part in ("selection", "adapter", "selector", "matcher"):
            delattr(block, part)
    for module in twin.modules():
        ungraft(module)
        remove_hooks(module)
    for name in (*MAKERS, PRUNER):
        twin.__dict__.pop(name, None)
    if is_converted(twin):
        del twin.tosa_config
    return twin
