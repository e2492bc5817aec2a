"""What there is in a folder of this package: a new file is found by itself, and no list names it."""

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).parent.parent


def names(folder: str) -> list[str]:
    """The modules of a folder such as "methods/scores", without importing any (nor torch)."""
    return sorted(info.name for info in pkgutil.iter_modules([str(PACKAGE / folder)]))


def subclasses(kind: type) -> list[type]:
    """All that have been defined so far, of ours and of others."""
    return [each for direct in kind.__subclasses__() for each in (direct, *subclasses(direct))]


def module(folder: str, name: str) -> ModuleType:
    """One of them, imported."""
    return importlib.import_module(f"tosa_convert.{folder.replace('/', '.')}.{name}")
