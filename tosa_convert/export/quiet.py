"""Exporters and quantisers print their steps, and warn about their own internals."""

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Nothing of that is seen within this block."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _no_graphs():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


LONG = 5_000
"""Characters of what no library says in a line, such as a whole graph."""


@contextlib.contextmanager
def _no_graphs() -> Iterator[None]:
    """torch prints the graph of an export that fails; progress goes the same way, and stays."""

    class Short:
        def write(self, text: str) -> int:
            return len(text) if len(text) > LONG else stream.write(text)

        def __getattr__(self, name: str):
            return getattr(stream, name)

    stream = sys.stderr
    with contextlib.redirect_stderr(Short()):
        yield
