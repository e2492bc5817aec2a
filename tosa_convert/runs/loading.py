"""Names, checkpoints, folders and runs → a model."""

import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import nn

from tosa_convert.base.errors import TosaError, TosaWarning, UsageError
from tosa_convert.base.files import read_json
from tosa_convert.config.head import HeadConfig
from tosa_convert.models.adapter import adapter_of
from tosa_convert.models.dense import DenseModel, head_class, with_head
from tosa_convert.models.loading import (
    load_timm,
    load_timm_folder,
    load_transformers,
    read_checkpoint,
    resolve_timm_name,
)
from tosa_convert.runs import folder as runs
from tosa_convert.runs.provenance import origin_of
from tosa_convert.selective.conversion import is_converted
from tosa_convert.tasks.task import new_head

QUICKSTART = "quickstart"
LIGHT = "light"


def load(
    source: str | Path,
    *,
    checkpoint: str | Path | None = None,
    img_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    pretrained: bool = True,
    task: str | None = None,
    head: str | None = None,
    head_checkpoint: str | Path | None = None,
    max_depth: float | None = None,
) -> nn.Module:
    """A model in eval mode from whatever names it.

    Args:
        source: a timm name or its beginning ("deit_tiny"), "timm:NAME", "hf:ORG/NAME" (of transformers, or a run that
            was pushed), a folder (transformers, timm, or a run), or "quickstart", the model in the package.
        checkpoint: weights for a timm name, .safetensors or .pth (read with ``weights_only``).
        img_size: pixels, one number or (height, width); None keeps the model's own.
        num_classes: outputs of the head; None keeps the model's or the checkpoint's own, 0 removes it.
        pretrained: False builds the model with random weights, as counting FLOPs needs no more.
        task: "depth" or "segmentation": the model is put under a new head that makes a map, see
            :class:`tosa_convert.models.dense.DenseModel`.
        head: which head, one of :mod:`tosa_convert.models.heads`; None with a task is "light".
        head_checkpoint: its weights; without, it is untrained.
        max_depth: metres that the head reaches at most, with task depth; None is 10.

    Raises:
        UsageError: an unknown or ambiguous name, options that do not fit the source.
        TosaError: a hub that cannot be reached, a truncated or hostile checkpoint.
    """
    source = str(source)
    wanted = head_wanted(task, head, head_checkpoint, max_depth, num_classes)
    if wanted is not None:
        return _under_head(source, wanted, head_checkpoint, checkpoint, img_size, pretrained)
    folder = _folder(source) or _run_on_the_hub(source)
    if checkpoint is not None and (folder or source.startswith("hf:")):
        raise UsageError("--checkpoint goes with a timm name, for example: deit_tiny --checkpoint weights.safetensors")
    if folder and (runs.is_run(folder) or not (folder / "config.json").exists()):
        if num_classes is not None:
            raise UsageError(
                f"the head of a run is fixed; leave --num-classes out, or load what {source} was made from"
            )
        model = runs.load_run(folder)
    elif folder and "architecture" in read_json(folder / "config.json"):
        model = load_timm_folder(folder, num_classes, pretrained)
    elif folder or source.startswith("hf:"):
        if num_classes is not None:
            raise UsageError("--num-classes goes with timm models; give a transformers folder whose head fits")
        model = load_transformers(str(folder or source.removeprefix("hf:")), local=bool(folder), pretrained=pretrained)
    else:
        model = load_timm(resolve_timm_name(source.removeprefix("timm:")), checkpoint, num_classes, pretrained)
    # A converted run saved from Python stays without a source: its own folder does not hold the original.
    if model.tosa_origin.source is None and not is_converted(model):
        place = str(folder.resolve()) if folder and source != QUICKSTART else source
        _note_origin(model, place, checkpoint, num_classes)
    if img_size is not None:
        set_image_size(model, (img_size, img_size) if isinstance(img_size, int) else img_size)
    return model.eval()


def head_wanted(
    task: str | None,
    head: str | None,
    head_checkpoint: str | Path | None = None,
    max_depth: float | None = None,
    num_classes: int | None = None,
) -> HeadConfig | None:
    """The head that a model is to be put under; None for none.

    Raises:
        UsageError: options that go with a task, without one; or that do not go with this one.
    """
    if task is None:
        given = {"--head": head, "--head-checkpoint": head_checkpoint, "--max-depth": max_depth}
        odd = next((name for name, value in given.items() if value is not None), None)
        if odd is not None:
            raise UsageError(f"{odd} goes with a new head; add --task depth or --task segmentation")
        return None
    wanted = new_head(task, head or LIGHT, num_classes, max_depth)
    head_class(wanted.head)
    return wanted


def _under_head(
    source: str,
    wanted: HeadConfig,
    head_checkpoint: str | Path | None,
    checkpoint: str | Path | None,
    img_size: int | tuple[int, int] | None,
    pretrained: bool,
) -> nn.Module:
    """A model under a new head, or a run that has this head already."""
    folder = _folder(source)
    if folder and runs.is_run(folder):
        model = load(source, checkpoint=checkpoint, img_size=img_size)
        if not isinstance(model, DenseModel) or head_checkpoint is not None:
            raise UsageError(f"the head of a run is fixed; name what {source} was made from, in place of the run")
        if model.config != wanted:
            raise UsageError(
                f"{source} has head {model.config.head} for {model.config.task} "
                f"({_options_of(model.config)}), not what is asked for; leave --task and --head out"
            )
        return model
    timms = not source.startswith("hf:") and not (folder and _of_transformers(folder))
    outputs = 0 if timms else None
    encoder = load(source, checkpoint=checkpoint, img_size=img_size, num_classes=outputs, pretrained=pretrained)
    if head_checkpoint is None:
        message = f"head {wanted.head} is new and untrained; fine-tune it before you trust its maps"
        warnings.warn(message, TosaWarning, stacklevel=3)
    return _headed(encoder, wanted, head_checkpoint)


def _headed(encoder: nn.Module, wanted: HeadConfig, checkpoint: str | Path | None) -> nn.Module:
    """A backbone under a head with the weights of a file, which its origin notes."""
    if checkpoint is None:
        return with_head(encoder, wanted)
    model: Any = with_head(encoder, wanted, read_checkpoint(Path(checkpoint)), checkpoint)
    model.tosa_origin = model.tosa_origin.model_copy(update={"head_checkpoint": str(Path(checkpoint).resolve())})
    return model


def _options_of(head: HeadConfig) -> str:
    return f"{head.channels} channels" if head.max_depth is None else f"up to {head.max_depth:g} m"


def _of_transformers(folder: Path) -> bool:
    return (folder / "config.json").exists() and "architecture" not in read_json(folder / "config.json")


def set_image_size(model: Any, size: tuple[int, int]) -> None:
    """Make a loaded model take (H, W) pixels, and remember it for its images, counts and exports."""
    adapter = adapter_of(model)
    if not adapter.fits(size):
        patch = adapter.patch
        near = (tuple((side // p + up) * p for side, p in zip(size, patch, strict=True)) for up in (0, 1))
        advice = " or ".join(f"{height}×{width}" for height, width in near if height and width)
        raise UsageError(
            f"image size {size[0]}×{size[1]} is not a multiple of the patch size {patch[0]}×{patch[1]}; use {advice}"
        )
    adapter.resize(size)
    origin = origin_of(model)
    spec = dict(origin.spec)
    if "img_size" in adapter.spec().get("model_args", {}):
        spec["model_args"] = {**spec["model_args"], "img_size": size}
    model.tosa_origin = origin.model_copy(update={"spec": spec, "preprocessing": origin.preprocessing.at(size)})


def original_of(model: nn.Module) -> nn.Module | None:
    """The model as it was before conversion and fine-tuning, loaded again from where it came from.

    None when that place is unknown or out of reach, or where the model's head was new.
    """
    origin = getattr(model, "tosa_origin", None)
    if origin is None or origin.source is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TosaWarning)  # said when it was loaded first
            found = load(
                origin.source,
                checkpoint=origin.checkpoint,
                num_classes=origin.num_classes,
                img_size=origin.preprocessing.size,
            )
            if "head" not in origin.spec or isinstance(found, DenseModel):  # a run has its own
                return found
            if origin.head_checkpoint is None:  # the head was new: there was no original to compare with
                return None
            return _headed(found, HeadConfig(**origin.spec["head"]), origin.head_checkpoint)
    except TosaError:
        return None


def _folder(source: str) -> Path | None:
    if source == QUICKSTART:
        return Path(str(files("tosa_convert") / "assets" / "fashion_vit"))
    if Path(source).is_dir():
        return Path(source)
    if source.startswith((".", "/", "~")):
        raise UsageError(f"there is no folder {source}")
    return None


def run_at(source: str) -> Path | None:
    """The folder of the finished run that a source names, here or on the hub; None where it names something else."""
    folder = _folder(source) or _run_on_the_hub(source)
    return folder if folder and runs.is_run(folder) else None


def _run_on_the_hub(source: str) -> Path | None:
    if not source.startswith("hf:"):
        return None
    from tosa_convert.runs.hub import run_of  # it opens connections

    return run_of(source.removeprefix("hf:"))


def _note_origin(model: Any, source: str, checkpoint: str | Path | None, num_classes: int | None) -> None:
    weights = str(Path(checkpoint).resolve()) if checkpoint else None
    found = {"source": source, "checkpoint": weights, "num_classes": num_classes}
    model.tosa_origin = model.tosa_origin.model_copy(update=found)
