"""What there is in a folder of this package: a new file is found by itself, and no list names it."""

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).parent.parent


def names(folder: str) -> list[str]:
    """The modules of a folder such as "methods/scores", without importing any (nor torch)."""
    return sorted(info.name for info in pkgutil.iter_modules([str(PACKAGE / folder)]))


def module(folder: str, name: str) -> ModuleType:
    """One of them, imported."""
    return importlib.import_module(f"tosa_convert.{folder.replace('/', '.')}.{name}")
