"""Multiply–adds by fvcore, with what fvcore leaves out: fused attention, which it counts as nothing."""

import itertools
import math
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn

from tosa_convert.base.errors import UsageError, gist
from tosa_convert.base.progress import Progress
from tosa_convert.data.sampling import check_batch, sample
from tosa_convert.measure.tally import attention_macs, tally
from tosa_convert.models.adapter import adapter_of, run
from tosa_convert.models.modes import evaluating
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.selective.conversion import original, with_threshold
from tosa_convert.selective.selection import keeps_any_number, last_choices, selective_blocks


@dataclass(frozen=True)
class LayerCost:
    """One layer for one image: its patches that attend, its multiply–adds, and those of its selector; over several
    images the means."""

    layer: int
    tokens: float
    macs: int
    selector: int
    original: int


@dataclass(frozen=True)
class Cost:
    """Multiply–adds of one image through a model, beside those of its unconverted twin.

    Attributes:
        size: image height and width.
        patches: of the image.
        macs: of the model, selectors included.
        original: of the unconverted twin.
        selectors: of all that chooses tokens and finds them partners, QKᵀ over again included.
        layers: one :class:`LayerCost` per layer.
        uncounted: operators that fvcore has no rule for → how often they occur.
        least, most: multiply–adds of single images, over several; ``macs`` is then the mean.
        images: over how many.
        fewest: multiply–adds of an image none of whose patches reaches the thresholds, where there are thresholds.
    """

    size: tuple[int, int]
    patches: int
    macs: int
    original: int
    selectors: int
    layers: list[LayerCost]
    uncounted: dict[str, int]
    least: int | None = None
    most: int | None = None
    images: int | None = None
    fewest: int | None = None

    @property
    def saved(self) -> float:
        """Share of the original's multiply–adds that the conversion saves, selectors paid for."""
        return 1 - self.macs / self.original

    @property
    def saved_without_selectors(self) -> float:
        return 1 - (self.macs - self.selectors) / self.original

    def to_dict(self) -> dict:
        return {**asdict(self), "saved": self.saved, "saved_without_selectors": self.saved_without_selectors}


def flops(
    model: nn.Module,
    size: tuple[int, int] | None = None,
    images: torch.Tensor | None = None,
    progress: Progress | None = None,
) -> Cost:
    """Count the multiply–adds of one image, per layer, for a model converted or not.

    LayerNorm counts as fvcore has it; element-wise operators and softmax do not count and are
    named in ``uncounted``.

    Args:
        model: any supported model.
        size: image height and width; None is the model's own.
        images: (B, C, H, W), preprocessed, to count over. A conversion that keeps as many tokens as an image needs has
            no number of multiply–adds without.

    Raises:
        UsageError: it is such a conversion, and there are no images; these are not of the model, or of a size that it
            does not take.
    """
    if images is not None:
        check_batch(images, preprocessing_of(model))
    if images is not None and (images.ndim != 4 or not len(images)):
        raise UsageError(f"images of shape {tuple(images.shape)} are not a batch of images; give (B, C, H, W)")
    if images is not None and keeps_any_number(model):
        return _flops_over(model, images, progress)
    if keeps_any_number(model):
        raise UsageError(
            "this conversion keeps as many tokens as each image needs, so its multiply–adds depend on the images; "
            "give some with --data (in Python images=)"
        )
    preprocessing = preprocessing_of(model)
    size = size or ((images.shape[-2], images.shape[-1]) if images is not None else preprocessing.size)
    image = torch.zeros(1, preprocessing.channels, *size)
    try:
        counted, uncounted = _count(model, image)
    except (AssertionError, ValueError) as error:
        raise UsageError(f"this model does not take images of {size[0]}×{size[1]} ({gist(error)})") from None
    blocks = selective_blocks(model)
    before = _count(original(model), image)[0] if blocks else counted
    adapter = adapter_of(model)
    names = {module: name for name, module in model.named_modules()}
    patches = adapter.patches(size)
    selective = {id(block): block for block in blocks}
    layers = []
    for layer, block in enumerate(adapter.blocks, start=1):
        name = f"model.{names[block]}"
        keeps = id(block) in selective and not block.selection.per_head
        layers.append(
            LayerCost(
                layer=layer,
                tokens=block.selection.keep(patches) if keeps else patches,
                macs=counted[name],
                selector=counted[f"{name}.selector"] + counted[f"{name}.matcher"] if id(block) in selective else 0,
                original=before[name],
            )
        )
    return Cost(
        size=(size[0], size[1]),
        patches=patches,
        macs=counted[""],
        original=before[""],
        selectors=sum(layer.selector for layer in layers),
        layers=layers,
        uncounted=uncounted,
        least=None if images is None else counted[""],
        most=None if images is None else counted[""],
        images=None if images is None else len(images),
    )


def flops_on(
    model: nn.Module, data: str | Path | None = None, images: int = 24, progress: Progress | None = None
) -> dict:
    """:func:`flops` as a dictionary; over images if a source of them is given or it takes images to tell, then with
    their source as "data".

    Args:
        data: a folder of images; None takes the built-in photos where it takes images.
        images: how many of them.
    """
    if data is None and not keeps_any_number(model):
        with (progress or Progress()).busy("count multiply–adds"):
            return flops(model).to_dict()
    pixels, folder, _ = sample(data, preprocessing_of(model), images, crops=False)
    name = f"{folder.name}, in crops" if data is None else folder.name
    return {**flops(model, images=pixels, progress=progress).to_dict(), "data": name}


def _flops_over(model: nn.Module, images: torch.Tensor, progress: Progress | None = None) -> Cost:
    """:func:`tosa_convert.measure.macs.flops` of a model, as the mean over images, with the least and the most.

    Args:
        images: (B, C, H, W), preprocessed.
    """
    twin = original(model)
    before, blocks = flops(twin, (images.shape[-2], images.shape[-1])), adapter_of(model).blocks
    selective = {block.selection.layer: block for block in selective_blocks(model)}
    choosers = [[part for part in (block.selector, block.matcher) if part] for block in selective.values()]
    whole, layers = tally(twin, images[:1], adapter_of(twin).blocks)
    totals, tokens, parts = [], torch.zeros(len(blocks)), torch.zeros(len(blocks) + sum(map(len, choosers)))
    with (progress or Progress()).track("count", len(images)) as advance:
        for image in images:
            total, each = tally(model, image[None], [*blocks, *itertools.chain(*choosers)])
            totals.append(before.macs + total - whole)
            parts += torch.tensor(each, dtype=torch.float) / len(images)
            tokens += torch.tensor(_attending(model, before.patches)) / len(images)
            advance()
    choosing = iter(parts[len(blocks) :].tolist())
    selectors = {layer: sum(next(choosing) for _ in own) for layer, own in zip(selective, choosers, strict=True)}
    mean = [
        LayerCost(
            layer=plain.layer,
            tokens=round(tokens[index].item(), 1),
            macs=round(plain.macs + parts[index].item() - layers[index]),
            selector=round(selectors.get(plain.layer, 0)),
            original=plain.macs,
        )
        for index, plain in enumerate(before.layers)
    ]
    return replace(
        before,
        macs=round(sum(totals) / len(totals)),
        selectors=sum(layer.selector for layer in mean),
        layers=mean,
        uncounted={},
        least=min(totals),
        most=max(totals),
        images=len(images),
        fewest=before.macs + tally(with_threshold(model, math.inf), images[:1], [])[0] - whole,
    )


def _attending(model: nn.Module, patches: int) -> list[float]:
    """How many patches of the last image attended in each layer."""
    adapter, choices = adapter_of(model), last_choices(model)
    counts = {layer: choice.attended.shape[1] - adapter.prefix for layer, choice in choices.items()}
    return [float(counts.get(layer, patches)) for layer in range(1, len(adapter.blocks) + 1)]


def count_macs(model: nn.Module) -> int:
    """Multiply–adds of one image of the model's own size."""
    preprocessing = preprocessing_of(model)
    return _count(model, torch.zeros(1, preprocessing.channels, *preprocessing.size))[0][""]


class _Outputs(nn.Module):
    """A model as something that takes a tensor and returns tensors, which is what tracing wants."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(run(self.model, images).values())


def _count(model: nn.Module, image: torch.Tensor) -> tuple[Counter, dict[str, int]]:
    """Multiply–adds by module name ("" is everything), and the operators without a rule."""
    parameter = next(model.parameters())
    analysis = FlopCountAnalysis(_Outputs(model), image.to(parameter.device, parameter.dtype))
    analysis.set_op_handle("aten::scaled_dot_product_attention", _fused_attention)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    with warnings.catch_warnings(), torch.no_grad(), evaluating(model):
        warnings.simplefilter("ignore")
        return analysis.by_module(), dict(analysis.unsupported_ops())


def _fused_attention(inputs: list, outputs: list) -> int:
    return attention_macs(*(value.type().sizes() for value in inputs[:3]))
