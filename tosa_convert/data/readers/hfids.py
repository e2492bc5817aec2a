"""A dataset of Hugging Face's library as a stream, which is read without being stored: ``hfids:NAME`` or
``hfids:NAME:SPLIT``, as with ``hfds:``. Its order is a seeded shuffle within a buffer, so a training goes on where it
was by passing over what it has seen."""

import inspect
import io
from typing import Any

from tosa_convert.base.errors import UsageError, gist
from tosa_convert.data.reader import Drawn, Reader
from tosa_convert.data.readers.hfds import bytes_of, labels_of, numbers_of, opened

BUFFER = 1000
"""Images among which the next one is drawn."""


ROW = "row of the stream"
"""A column with the number of each row, as the files have them: by which broken ones are found again."""


def _whole_numbers():
    from datasets import Value

    return Value("int64")


class Hfids(Reader):
    example = "hfids:NAME, hfids:FOLDER or hfids:NAME:SPLIT"
    streams = True

    def __init__(self, place):
        self.name, self.data, self.image = opened(place, streaming=True)
        self.stored = f"hfds:{place}"
        self.labels, self.names = labels_of(self.data)
        if self.labels and not self.names and self.data.features[self.labels].dtype == "string":
            self.ambiguous = "its labels are words, and a stream does not tell which ones there are"
            self.remedy = f"use {self.stored}, or set labels to 0"
            self.labels = ""
        split = (self.data.info.splits or {}).get(str(self.data.split))
        self.told = None if split is None else split.num_examples  # most streams do not tell
        columns = {**self.data.features, ROW: _whole_numbers()}
        self.data = self.data.map(
            lambda row, index: {ROW: index}, with_indices=True, features=type(self.data.features)(columns)
        )
        self.numbered = bool(self.labels) and not self.names
        self.classes = ["0"] if self.numbered else self.names  # how many numbers there are shows when they come

    def __len__(self):
        if not self.told:
            raise UsageError(f"the stream {self.name} does not say how many images it has; give steps, not epochs")
        return self.told

    def draws(self, seed, first):
        epoch = 0
        while True:
            passed = 0
            for found in self.once(seed + epoch):
                passed += 1
                if first > 0:
                    first -= 1
                    continue
                yield found
            if not passed:
                raise UsageError(f"the stream {self.name} holds no images")
            epoch += 1

    def once(self, seed=None):
        """
        Raises:
            UsageError: the files of the stream are damaged.
        """
        try:
            yield from map(self._drawn, self.data if seed is None else self._shuffled(seed))
        except UsageError:
            raise
        except Exception as error:  # of whatever reads the files
            raise UsageError(
                f"the stream {self.name} cannot be read on ({gist(error)}): a file of it is damaged; get it again, or "
                "leave it out"
            ) from error

    def _shuffled(self, seed: int) -> Any:
        # From one file at a time: datasets 5 otherwise waits five seconds for more of them, at each pass.
        known = inspect.signature(self.data.shuffle).parameters
        one = {"max_buffer_input_shards": 1} if "max_buffer_input_shards" in known else {}
        return self.data.shuffle(seed=seed, buffer_size=BUFFER, **one)

    def _drawn(self, row: dict) -> Drawn:
        (label,) = numbers_of([row[self.labels]], self.names) if self.labels else (None,)
        name = (row[self.image] or {}).get("path") or f"{self.name}[{row[ROW]}]"
        return Drawn(io.BytesIO(bytes_of(row[self.image])), -1 if label is None else label, name)

    def open(self, index):
        self.check_stored()

    def label(self, index):
        return self.open(index)

    def filename(self, index):
        return f"{self.name}[{index}]"
