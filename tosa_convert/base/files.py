"""Reading and writing files so that nothing is lost or half-written."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tosa_convert.base.errors import TosaError, UsageError


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; on success it takes the place of ``path``, on an error it goes."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if temporary.exists():
            temporary.chmod(0o666 & ~_umask())  # some writers make private files
        os.replace(temporary, path)
    except OSError as error:
        raise TosaError(
            f"cannot write {path}: {error.strerror or error}; choose another --out or free some space"
        ) from error
    finally:
        with suppress(OSError):  # where nothing can be written there is nothing, and the error above says why
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict:
    """A JSON object from a file.

    Raises:
        TosaError: missing, unreadable, or not a JSON object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TosaError(f"cannot read {path}: {error}; the file is missing or damaged") from None
    if not isinstance(content, dict):
        raise TosaError(f"{path} does not hold a JSON object; the file is damaged")
    return content


def check_writable(folder: Path, option: str = "--out") -> None:
    """Fail before hours of work rather than after them; a folder that is not there yet is not made."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    there = next((each for each in (folder, *folder.parents) if each.exists()), None)
    if there is not None and not there.is_dir():
        raise UsageError(f"{there} is a file; choose a folder with {option}")
    with atomic(folder / ".probe") as temporary:
        temporary.touch()
    (folder / ".probe").unlink()
    with suppress(OSError):  # another process has written there by now
        for each in missing:
            each.rmdir()
