"""One process at a time writes to a folder."""

import functools
import hashlib
import inspect
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from filelock import FileLock, Timeout

from tosa_convert.base import distributed as processes
from tosa_convert.base.errors import UsageError


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep others of this machine from writing to a folder; of several processes that work together the first does so.

    The lock goes with its process, however that ends.

    Raises:
        UsageError: another one is writing there.
    """
    if not processes.is_main():
        yield
        return
    try:
        lock = FileLock(_place(folder))
        held = lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(
            f"another tosa-convert is writing to {folder}; wait until it is done, or choose another --out"
        ) from None
    except OSError:  # nowhere to lock: a read-only system must not fail the work
        held = nullcontext()
    with held:
        yield


def writes_alone(stage: Callable) -> Callable:
    """A stage that holds the folder that it writes to, its ``out`` or without one the run that it works on."""
    signature = inspect.signature(stage)

    @functools.wraps(stage)
    def run(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        with alone(Path(given.get("out") or given["source"])):
            return stage(*args, **kwargs)

    return run


def _place(folder: Path) -> Path:
    """Outside of the folder, which may have to be empty."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    place = Path(tempfile.gettempdir()) / f"tosa-convert-{user}"
    place.mkdir(mode=0o700, exist_ok=True)
    return place / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]}.lock"
