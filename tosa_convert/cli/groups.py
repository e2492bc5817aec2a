"""Groups of options that several commands share, declared once."""

import functools
import inspect
from collections.abc import Callable

from tosa_convert.cli.parsing import plain


def group(name: str, options: type, values: Callable[[dict], dict] = plain) -> Callable:
    """A decorator that puts options in place of a command's parameter of this name.

    Typer reads the signature, so the options show up in --help there; the command gets those that were given, as a
    dict.

    Args:
        name: of the parameter.
        options: a class with one annotation per option, in the order of --help.
        values: what is parsed → the dict.
    """
    names = list(options.__annotations__)

    def takes(command: Callable[..., None]) -> Callable[..., None]:
        parameters = []
        for parameter in inspect.signature(command).parameters.values():
            if parameter.name == name:
                parameters += [parameter.replace(name=each, annotation=options.__annotations__[each]) for each in names]
            else:
                parameters.append(parameter)

        @functools.wraps(command)
        def parsed(**given) -> None:
            mine = {each: given.pop(each) for each in names}
            command(**given, **{name: values(mine)})

        parsed.__signature__ = inspect.Signature(parameters)
        return parsed

    return takes
