"""How measured values and remarks on images are written in tables."""

from tosa_convert.base.errors import some_of
from tosa_convert.reporting.table import percent
from tosa_convert.tasks.task import every_metric


def figure(name: str, value: float, digits: int = 1) -> str:
    """A value of something that is measured of a model, as a share or with four decimals."""
    metric = every_metric().get(name)
    return percent(value, digits) if name == "agreement" or (metric and metric.percent) else f"{value:.4f}"


def pixels(size: list[int]) -> str:
    """An image size (height, width), one number if it is square."""
    return str(size[0]) if size[0] == size[1] else f"{size[0]}×{size[1]}"


def broken_notes(names: list[str]) -> list[str]:
    """Which images could not be read; up to five are named."""
    if not names:
        return []
    return [f"{len(names)} broken image{'s' if len(names) > 1 else ''} skipped: {some_of(names)}"]
