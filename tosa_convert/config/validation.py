"""Values → validated settings, every mistake named in one message."""

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from tosa_convert.base.errors import UsageError

Kind = TypeVar("Kind", bound=BaseModel)


def build(kind: type[Kind], values: dict) -> Kind:
    """A validated ``kind``, or a UsageError that names everything wrong with the values."""
    try:
        return kind(**values)
    except ValidationError as error:
        raise UsageError("; ".join(dict.fromkeys(map(_describe, error.errors())))) from None


def _describe(item: dict) -> str:
    """One of pydantic's findings in plain words, after the name of the option."""
    name = str(item["loc"][0]) if item["loc"] else ""
    message = item["msg"].removeprefix("Value error, ")
    return f"{name}: {message}" if name else message
