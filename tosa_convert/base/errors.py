"""One family of errors. Each message is one line: what is wrong, then what to do next."""

MOST = 200
WORKER = "Original Traceback"
"""What torch puts before the traceback of another process."""


class TosaError(Exception):
    """Something failed while working: a file, a download, a model, a check. Exit code 1."""

    exit_code = 1

    def __init__(self, message: str = ""):
        """One from a process that loads images comes from torch with that process's traceback before it."""
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip() if WORKER in message else message)


class UsageError(TosaError):
    """The request itself cannot be carried out as asked. Exit code 2."""

    exit_code = 2


class InterruptedTrainingError(TosaError):
    """Ctrl-C during training, after its checkpoint was written. Exit code 130, as shells have it."""

    exit_code = 130


class UnsupportedModelError(TosaError):
    """The model is of a kind that cannot be made token-selective; the message says why."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether something did not fit into memory: torch's error on a GPU and on a CPU, ONNX Runtime's, Python's own, or
    one of ours that came of such a one. Told without torch, whose import takes a second."""
    if isinstance(error, TosaError):
        return error.__cause__ is not None and is_out_of_memory(error.__cause__)
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "allocate memory" in str(error)


def gist(error: Exception) -> str:
    """What a library's error says, in one line of up to 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MOST else f"{text[:MOST]} …"


class TosaWarning(UserWarning):
    """Something was done as asked, and the user may not expect what follows from it."""


def some_of(names: list[str], most: int = 5) -> str:
    """The first of many names, and how many there are beside them."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
