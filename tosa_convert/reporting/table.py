"""A table of results: on the terminal, in Markdown, in HTML. And how its figures are written."""

import textwrap
from dataclasses import dataclass
from html import escape

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

GAP = 2
"""Spaces between columns."""
SHORT = 12
"""Cells up to this width stay on one line."""


@dataclass
class Table:
    """A titled table of texts, with notes below it; ``left`` where these are words rather than numbers."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str]
    left: bool = False

    def print(self, console: Console) -> None:
        """On the terminal, numbers to the right, words to the left. Lines break between words; where that
        is not enough for the width, each row becomes a paragraph."""
        console.print(Text(self.title, "bold"), soft_wrap=True)
        widths = self._widths(console.width)
        if widths is None:
            for row in self.rows:
                console.print(Text(self._paragraph(row, console.width)), soft_wrap=True)
        else:
            self._print_grid(console, widths)
        for note in self.notes:
            console.print(Text(_filled(note, console.width), "dim"), soft_wrap=True)

    def _print_grid(self, console: Console, widths: list[int]) -> None:
        grid = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
        for index, (column, width) in enumerate(zip(self.columns, widths, strict=True)):
            grid.add_column(column, justify="right" if index and not self.left else "left", width=width)
        for row in self.rows:
            grid.add_row(*map(Text, row))  # as text, since names may look like markup
        console.print(grid)

    def _widths(self, room: int) -> list[int] | None:
        """Of the columns, the widest made narrower until all fit; None if a word would have to be broken."""
        columns = list(zip(self.columns, *self.rows, strict=True))
        widths = [max(map(cell_len, cells)) for cells in columns]
        least = [max([_longest_word(name), *map(_least_width, cells)]) for name, *cells in columns]
        room -= GAP * (len(widths) - 1)
        if sum(least) > room:
            return None
        while sum(widths) > room:
            widest = max(
                (index for index in range(len(widths)) if widths[index] > least[index]), key=widths.__getitem__
            )
            widths[widest] -= 1
        return widths

    def _paragraph(self, row: list[str], width: int) -> str:
        cells = [f"{name} {cell}".strip() for name, cell in zip(self.columns, row, strict=True) if cell]
        return _filled(", ".join(cells), width, indent="  ")

    def html(self) -> str:
        cells = "".join(f"<th>{escape(column)}</th>" for column in self.columns)
        rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in self.rows)
        notes = "".join(f"<p class=note>{escape(note)}</p>" for note in self.notes)
        return (
            f"<h2>{escape(self.title)}</h2><table><thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table>{notes}"
        )

    def markdown(self) -> str:
        lines = [f"## {self.title}", "", _row(self.columns), _row(["---"] + ["---:"] * (len(self.columns) - 1))]
        lines += [_row(row) for row in self.rows]
        return "\n".join([*lines, "", *(f"{note}\n" for note in self.notes)])


def _least_width(cell: str) -> int:
    """Of a short cell all of it, since "12.3 M" is one figure; of a longer one its longest word."""
    return cell_len(cell) if cell_len(cell) <= SHORT else _longest_word(cell)


def _longest_word(text: str) -> int:
    return max(map(cell_len, text.split()), default=0)


def _filled(text: str, width: int, indent: str = "") -> str:
    """Lines broken between words only: a path longer than the line stays whole, to be copied."""
    return textwrap.fill(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def mega(macs: int) -> str:
    """Multiply–adds in a readable unit."""
    return f"{macs / 1e9:.3f} G" if macs >= 1e9 else f"{macs / 1e6:.2f} M"


def milliseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"
