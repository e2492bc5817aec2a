"""All that is proven of a model before it is converted, in order."""

import copy

import torch
from torch import nn

from tosa_convert.base.errors import gist
from tosa_convert.models.modes import evaluating
from tosa_convert.models.proof.block import take_row_apart
from tosa_convert.models.proof.calls import NotProvenError
from tosa_convert.models.proof.images import (
    as_taken,
    channels_of,
    forward_of,
    frames_of,
    grid_by_config,
    image_config,
    input_name,
    size_of,
)
from tosa_convert.models.proof.positions import names_of
from tosa_convert.models.proof.row import check_batches, find_row
from tosa_convert.models.proof.structure import Structure

SWITCHES = (
    "attention_mask",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "interpolate_pos_encoding",
    "labels",
)
"""Arguments that no model needs."""


def in_float32(model: nn.Module) -> nn.Module:
    """A copy in float32 of a model in half precision, in which nothing can be proven; others as they are."""
    half = next(model.parameters()).dtype in (torch.float16, torch.bfloat16)
    return copy.deepcopy(model).float() if half else model


def prove(model: nn.Module) -> Structure:
    """Find a model's parts and prove what they do, on a random image of the model's own size; the model stays as it is.

    Raises:
        NotProvenError: which proof failed, and where.
    """
    config, weight = image_config(model), next(model.parameters())
    broken = next((name for name, each in model.named_parameters() if not each.isfinite().all()), None)
    if broken:
        raise NotProvenError(f"{broken} holds values that are not finite; get the model's weights again")
    frames = frames_of(model, config)
    shape = (*([frames] if frames else []), channels_of(config), *size_of(config))
    image = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(weight)
    with evaluating(model):
        name = input_name(model)
        try:
            run = lambda image: forward_of(model)(**{name: as_taken(name, image)})  # noqa: E731
            row = find_row(model, run, image, grid_by_config(config))
        except NotProvenError:
            raise
        except Exception as error:  # whatever a model does with an image that it does not understand
            raise NotProvenError(_not_alone(model, name, error)) from error
        parts = take_row_apart(row)
        both = torch.cat([image, image.flip(-1)])
        check_batches(row.blocks[0], row.calls[0], lambda: run(both), type(model).__name__)
    return Structure(
        row=row.name,
        layers=len(row.blocks),
        projection=row.projection,
        prefix=row.prefix,
        suffix=row.suffix,
        frames=frames,
        width=row.calls[0].tokens.shape[-1],
        **parts._asdict(),
    )


def _not_alone(model: nn.Module, name: str, error: Exception) -> str:
    """Why a model does not run on images, ``name``, alone."""
    others = [each for each in names_of(type(model).forward) if each not in (name, *SWITCHES) and "kwargs" not in each]
    said = f"{type(model).__name__} does not run on an image alone ({gist(error)})"
    if "input_ids" in others:
        parts = ((each, names_of(type(part).forward)) for each, part in model.named_modules() if each)
        seeing = next((each for each, taken in parts if name in taken and "input_ids" not in taken), None)
        seeing = seeing if seeing and _holds_a_row(model.get_submodule(seeing)) else None
        return f"{said}; convert its vision part, model.{seeing}" if seeing else f"{said}: it also takes text"
    return f"{said}: it also takes {', '.join(others)}" if others else f"{said}: it takes something else as {name}"


def _holds_a_row(part: nn.Module) -> bool:
    """Whether a part of a model has several blocks in a row."""
    return any(isinstance(each, (nn.ModuleList, nn.Sequential)) and len(each) > 1 for each in part.modules())
