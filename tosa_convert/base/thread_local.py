"""A value that each thread has its own of."""

import threading
from typing import Any


class PerThread:
    """One value per thread, None until it is set. A copy, or an unpickled one, holds none: it is a fresh start.

    What a forward pass hands on lives here, so that two threads may run one model at the same time.
    """

    def __init__(self):
        self._local = threading.local()

    def get(self) -> Any:
        return getattr(self._local, "value", None)

    def set(self, value: Any) -> None:
        self._local.value = value

    def take(self) -> Any:
        """The value, which is gone afterwards."""
        value = self.get()
        self.set(None)
        return value

    def __reduce__(self):
        return PerThread, ()
