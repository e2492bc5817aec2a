"""One process at a time writes to a folder."""

import functools
import hashlib
import inspect
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import ParamSpec, TypeVar

from filelock import FileLock, Timeout

from tosa_convert.base import distributed as processes
from tosa_convert.base.errors import UsageError

P = ParamSpec("P")
R = TypeVar("R")
_held: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep others of this machine from writing to a folder; of several processes that work together the first does so.
    Whoever holds a folder may take it again, as a stage that calls a training does.

    The lock goes with its process, however that ends.

    Raises:
        UsageError: another one is writing there.
    """
    place = _place(folder)
    if not processes.is_main() or place in _held.get():
        yield
        return
    try:
        place.parent.mkdir(mode=0o700, exist_ok=True)
        held: AbstractContextManager = FileLock(place).acquire(timeout=0)
    except Timeout:
        raise UsageError(
            f"another tosa-convert is writing to {folder}; wait until it is done, or choose another --out"
        ) from None
    except OSError:  # nowhere to lock: a read-only system must not fail the work
        held = nullcontext()
    with held:
        before = _held.set(_held.get() | {place})
        try:
            yield
        finally:
            _held.reset(before)


def writes_alone(stage: Callable[P, R]) -> Callable[P, R]:
    """A stage that holds the folder that it writes to, its ``out`` or without one the run that it works on, if any."""
    signature = inspect.signature(stage)

    @functools.wraps(stage)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        given = signature.bind(*args, **kwargs).arguments
        folder = given.get("out") or given.get("source")
        with nullcontext() if folder is None else alone(Path(folder)):
            return stage(*args, **kwargs)

    return run


def _place(folder: Path) -> Path:
    """Outside of the folder, which may have to be empty."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]
    return Path(tempfile.gettempdir()) / f"tosa-convert-{user}" / f"{name}.lock"
