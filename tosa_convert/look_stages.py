"""What shows a model, on files: the work of the commands show, features and report."""

from pathlib import Path

from torch import nn

from tosa_convert import runs
from tosa_convert.data import built_in_scenes
from tosa_convert.errors import UsageError
from tosa_convert.features import write_features
from tosa_convert.loading import load
from tosa_convert.looking import look_at_files
from tosa_convert.progress import Progress
from tosa_convert.stages import refuse_options_of_a_run
from tosa_convert.surgery import convert


def show_stage(source: str, options: dict, files: list[Path], out: Path, *, checkpoint=None, img_size=None) -> dict:
    """Which patches attend: a picture of each file, or of the built-in scenes, in each selective layer."""
    from tosa_convert.pictures import views_picture

    looks = look_at_files(_loaded_or_converted(source, options, checkpoint, img_size), files or built_in_scenes())
    if not looks.views[0]:
        raise UsageError(f"{source} skips nothing: all its ratios are 1")
    views_picture(looks, out)
    shares = {view.layer: float(view.attended.mean()) for view in looks.views[0]}
    return {"picture": str(out), "images": looks.names, "attended": shares}


def features_stage(
    source: str, data: str | None, out: Path, *, checkpoint=None, img_size=None, progress=None, **options
) -> dict:
    """Patch and class features of a folder of pictures, in one file."""
    model = load(source, checkpoint=checkpoint, img_size=img_size)
    return {"source": source, **write_features(model, data, out, progress=progress, **options)}


def report_stage(source: str, out: Path | None, *, progress: Progress | None = None) -> dict:
    """All that is known of a run in one HTML file; the pictures are drawn anew."""
    from tosa_convert.html_report import write_html

    folder = Path(source)
    if not runs.is_run(folder):
        raise UsageError(f"{source} is no run; name the folder of one")
    file = out or folder / "report.html"
    write_html(folder, load(source), file, progress or Progress())
    return {"run": source, "file": str(file)}


def _loaded_or_converted(source: str, options: dict, checkpoint, img_size) -> nn.Module:
    """A run's model, or one converted on the spot."""
    model = load(source, checkpoint=checkpoint, img_size=img_size)
    refuse_options_of_a_run(model, options)
    return convert(model, **options) if options else model
