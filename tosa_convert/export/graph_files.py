"""The ONNX files of a model to be timed, unchecked: written when they are asked for."""

from pathlib import Path

from torch import nn

from tosa_convert.export.graph import write_graph
from tosa_convert.export.quantization import Int8


class GraphFiles:
    """Files by precision.

    Args:
        folder: where they are written; made if missing.
        given: precision → a file that is there already.
    """

    def __init__(self, model: nn.Module, folder: Path, opset: int, given: dict[str, Path] | None = None):
        self.model, self.folder, self.opset, self.files = model, folder, opset, dict(given or {})

    def at(self, precision: str) -> Path:
        """The file in "float32" or "int8"."""
        if precision not in self.files:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self.folder / f"{precision}.onnx"
            if precision == "float32":
                write_graph(self.model.cpu().float().eval(), file, self.opset)
            else:
                Int8(self.at("float32"), self.folder).write(file)
            self.files[precision] = file
        return self.files[precision]
