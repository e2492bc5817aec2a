"""What shows a model, on files: the work of the commands flops, show, features, report and models."""

import time
from pathlib import Path

import numpy as np

from tosa_convert.base.distributed import pick_device
from tosa_convert.base.errors import UsageError
from tosa_convert.base.files import check_writable
from tosa_convert.base.progress import Progress
from tosa_convert.data.images import built_in_scenes, read_image
from tosa_convert.export.features import write_features
from tosa_convert.measure.macs import flops_on
from tosa_convert.measure.macs_share import MacsShare
from tosa_convert.models.adapter import adapter_of
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.models.supported import default_of_class, family_of
from tosa_convert.reporting.token_maps import look_at_files
from tosa_convert.runs import folder as runs
from tosa_convert.runs.loading import load, original_of
from tosa_convert.selective.conversion import convert, is_converted, original
from tosa_convert.selective.selection import keeps_any_number
from tosa_convert.tasks.task import task_of
from tosa_convert.workflows.sources import loaded_or_converted, say_if_by_chance, to_measure


def flops_stage(
    source: str,
    options: dict,
    plot: Path | None,
    *,
    data: str | None = None,
    images: int = 24,
    img_size=None,
    device=None,
    progress: Progress | None = None,
) -> dict:
    """Multiply–adds of a run or a model, converted first if there are ``options``; and a plot of them.

    Args:
        data: images to count over, ``images`` of them. Without, where the number of tokens differs from image to image,
            the built-in photos.
    """
    if plot is not None:
        check_writable(plot.parent, "--plot")
    device, progress = pick_device(device), progress or Progress()
    with progress.busy("load"):
        model = to_measure(source, options, img_size=img_size).to(device)
    cost = flops_on(model, data, images, progress)
    if plot is not None:
        from tosa_convert.reporting.plots import cost_plot

        title = f"{Path(source.split(':')[-1]).name}: {cost['saved']:.1%} of the MACs saved"
        cost["plot"] = str(cost_plot(cost, title, plot))
    return cost


def examine_stage(source: str) -> dict:
    """How a model is recognised, and if by proof, what was proven.

    Args:
        source: a folder, hf:ORG/NAME, or a class of transformers, which is built with its default config.

    Raises:
        UnsupportedModelError: it cannot be converted; the message says why.
    """
    began = time.perf_counter()
    model = default_of_class(source) or load(source, pretrained=False)
    built = time.perf_counter()
    adapter = adapter_of(model)
    found = {"layers": len(adapter.blocks), "heads": adapter.heads, "prefix": adapter.prefix}
    family, grid = family_of(model), list(adapter.grid(preprocessing_of(model).size))
    if not family:
        convert(model)  # which proves the rest
    proven = getattr(model, "tosa_proof", None)
    return {
        "model": source,
        "class": type(model).__name__,
        "recognised": f"family {family}" if family else "by proof",
        **found,
        "patches": grid,
        "proofs": PROOFS if proven else [],
        "structure": proven,
        "seconds": {"build": built - began, "proof": time.perf_counter() - built},
    }


PROOFS = [
    "its blocks give the same tokens each time, change nothing in place and know no positions",
    "its attention, worked out from the parts that were found, equals its own",
    "its tokens are its patches in reading order, after its prefix tokens",
    "with a selective layer at ratio 1.0 it gives what it gave",
    "a selective layer at ratio 0.5 equals the original with its skipped tokens masked and restored",
]


def show_stage(
    source: str,
    options: dict,
    files: list[Path],
    out: Path,
    *,
    checkpoint=None,
    img_size=None,
    device=None,
    progress: Progress | None = None,
) -> dict:
    """Which patches attend: each image, or each built-in scene, with one panel per selective layer; and maps."""
    with (progress or Progress()).busy("look"):
        return _shown(source, options, files, out, checkpoint, img_size, device)


def _shown(source: str, options: dict, files: list[Path], out: Path, checkpoint, img_size, device) -> dict:
    from tosa_convert.reporting.plots import views_plot

    check_writable(out.parent)
    device = pick_device(device)
    model = loaded_or_converted(source, options, checkpoint=checkpoint, img_size=img_size).to(device)
    if options:
        say_if_by_chance(model, source)
    before = original_of(model) if is_converted(model) and task_of(model).differences else None
    looks = look_at_files(model, files or built_in_scenes(), before)
    if is_converted(model) and not looks.views[0]:
        raise UsageError(f"{source} skips no tokens: all its ratios are 1")
    names, costs = looks.names, []
    if keeps_any_number(model):
        share_of, preprocessing = MacsShare(original(model)), preprocessing_of(model)
        costs = [share_of.of(model, read_image(path, preprocessing)[None]) for path in files or built_in_scenes()]
        looks = looks._replace(
            names=[f"{name}\n{cost:.0%} of the MACs" for name, cost in zip(names, costs, strict=True)]
        )
    views_plot(looks, out)
    layers = [view.layer for view in looks.views[0]]
    shares = {
        layer: float(np.mean([views[place].attended.mean() for views in looks.views]))
        for place, layer in enumerate(layers)
    }
    return {"plot": str(out), "images": names, "attended": shares, "macs": costs}


def features_stage(
    source: str, data: str | None, out: Path, *, checkpoint=None, img_size=None, progress=None, **options
) -> dict:
    """Patch and class-token features of a folder of images, in one file."""
    model = load(source, checkpoint=checkpoint, img_size=img_size)
    return {"source": source, **write_features(model, data, out, progress=progress, **options)}


def report_stage(source: str, out: Path | None, *, device=None, progress: Progress | None = None) -> dict:
    """All that is known of a run in one HTML file; its plots are drawn again."""
    from tosa_convert.reporting.html import write_html

    folder = Path(source)
    runs.check_finished(folder)
    file = out or folder / "report.html"
    if file.is_dir() or not file.name:
        raise UsageError(f"{file} is a folder; name the HTML file with --out")
    check_writable(file.parent)
    write_html(folder, load(source).to(pick_device(device)), file, progress or Progress())
    return {"run": source, "file": str(file)}
