"""Progress on everything that takes more than a moment: rate and time left, on stderr."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """Draws bars on a terminal, and nothing elsewhere or when ``shown`` is False."""

    def __init__(self, shown: bool = False):
        self.console = Console(stderr=True)
        self.shown = shown and self.console.is_terminal

    def busy(self, what: str) -> AbstractContextManager:
        """Shows that something is done whose length is not known."""
        return self.console.status(what) if self.shown else nullcontext()

    @contextmanager
    def track(
        self, what: str, total: int | None, done: int = 0, unit: str = "", per_step: int = 1
    ) -> Iterator[Callable]:
        """Yields ``advance(note)``, to be called after each of ``total`` steps, None if it is not known how
        many, of ``per_step`` units."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Bar(*columns, console=self.console, disable=not self.shown, transient=True) as bar:
            task = bar.add_task(what, total=total, completed=done, rate="", note="")

            def advance(note: str = "") -> None:
                bar.advance(task)
                speed = bar.tasks[0].speed
                rate = _rate(speed * per_step, unit) if speed else ""
                bar.update(task, rate=rate, note=note)

            yield advance


def _rate(speed: float, unit: str) -> str:
    """With a decimal where it is slow; nothing where what is counted has no name."""
    return f"{speed:.{0 if speed >= 10 else 1}f} {unit}/s" if unit else ""
