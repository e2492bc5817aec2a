"""What a benchmark times."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, Strict


class BenchSettings(BaseModel):
    """What is timed.

    Attributes:
        runtimes: of "eager", "compile" (torch.compile), "onnx" (ONNX Runtime) and "openvino".
        batch_sizes: images per forward pass.
        sizes: image sides in pixels, or (height, width); None is the model's own size.
        precisions: "float32", "int8" (in ONNX Runtime, ranges found in each image), and on a GPU "bfloat16" (in torch).
        threads: of torch and of ONNX Runtime; the process is pinned to as many processors.
        rounds: timed forward passes of each model; over real images whole passes, at least as many, and at least three.
        memory: also measure peak memory, on the CPU each model in a process of its own.
        opset: of the ONNX files.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    runtimes: list[str] = ["eager", "compile", "onnx"]
    batch_sizes: list[int] = [1]
    sizes: list[int | Annotated[tuple[int, int], Strict(False)]] | None = None
    precisions: list[str] = ["float32"]
    threads: int = Field(default=1, ge=1)
    rounds: int = Field(default=20, ge=1)
    memory: bool = True
    opset: int = Field(default=20, ge=18)
