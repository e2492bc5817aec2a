"""Files with fewer bits, made of a float32 one by ONNX Runtime's own tools."""

import inspect
import itertools
import platform
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import onnx
from onnx.external_data_helper import load_external_data_for_model
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantType,
    create_calibrator,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

from tosa_convert.base.environment import int8_instructions
from tosa_convert.base.errors import UsageError
from tosa_convert.base.progress import Progress
from tosa_convert.export.files import is_large, save_graph
from tosa_convert.export.quiet import silence
from tosa_convert.export.verification import hide_chosen, with_chosen

PRODUCTS = ("MatMul", "Gemm")
"""Of their kind those with weights are quantised: products of tokens with tokens, and what chooses and moves tokens,
stay in float."""
WITH_RANGES = [*PRODUCTS, "Conv"]
METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "percentile": CalibrationMethod.Percentile,
    "entropy": CalibrationMethod.Entropy,
}
SEARCHED = {"entropy": {"num_bins": 1024, "num_quantized_bins": 256}}
"""How finely ranges are searched for. With ONNX Runtime's own 128 and 128 there is but one range to choose from, which
is that of min–max."""
PRECISE = (
    *("LayerNormalization", "SkipLayerNormalization", "Softmax", "ReduceL2", "ReduceMean", "ReduceSum", "Log"),
    *("ScatterND", "ScatterElements"),
)
"""What stays in float32 in a float16 file: norms, softmax, the sums within them and within distances; and sums over
merged tokens, which ONNX Runtime has no float16 for on a CPU, where the file is checked."""


class Int8:
    """INT8 files of one float32 file, with any of its operators left in float.

    Weights are quantised per channel. What they are multiplied with is quantised by its range in each image, or with
    ``calibration`` by a range that is known beforehand.

    Args:
        source: the float32 file.
        scratch: a folder for what is needed on the way.
        calibration: None, or one of :data:`METHODS`.
        images: a batch to calibrate on, as the file takes it.
    """

    def __init__(
        self,
        source: Path,
        scratch: Path,
        calibration: str | None = None,
        images: np.ndarray | None = None,
        progress: Progress | None = None,
    ):
        self.prepared, self.calibration, self.images = scratch / "prepared.onnx", calibration, images
        self.ranges = scratch / f"ranges.{calibration}.json"
        shown = source.with_name("shown.onnx")  # where it finds weights beside the graph, too
        onnx.save_model(with_chosen(source), shown)  # as outputs they keep their names
        with silence():
            quant_pre_process(
                shown,
                self.prepared,
                skip_symbolic_shape=True,  # it fails on graphs that choose tokens; the exporter knows the shapes
                save_as_external_data=is_large(source),
            )
        if calibration is not None:
            self._calibrate(progress or Progress())
        self.operators = _with_weights(self.prepared, tuple(WITH_RANGES) if calibration else PRODUCTS)
        """Names of what can be quantised, in the order in which it runs."""

    def write(self, target: Path, left: Collection[str] = ()) -> None:
        """The file, with the operators in ``left``, not all of them, in float."""
        chosen = [name for name in self.operators if name not in left]
        shared = {
            # A product with a bias is split into two on the way, and the product gets this name.
            "nodes_to_quantize": [name for each in chosen for name in (each, f"{each}_MatMul")],
            "per_channel": True,
            "reduce_range": _saturates(),
            "weight_type": QuantType.QInt8,
            "use_external_data_format": is_large(self.prepared),
        }
        with silence():
            if self.calibration is None:
                quantize_dynamic(self.prepared, target, op_types_to_quantize=list(PRODUCTS), **shared)
            else:
                quantize_static(
                    self.prepared,
                    target,
                    _Reader(self.prepared, self.images),  # for an onnxruntime that cannot keep ranges
                    op_types_to_quantize=WITH_RANGES,
                    calibrate_method=METHODS[self.calibration],
                    **({"calibration_cache_path": self.ranges} if _keeps_ranges() else {}),
                    **shared,
                )
        _without_chosen(target)

    def _calibrate(self, progress: Progress) -> None:
        """Find the ranges once for all files.

        Raises:
            UsageError: an onnxruntime whose own way to find them is another.
        """
        if not _keeps_ranges():
            if self.calibration in SEARCHED:
                raise UsageError(
                    f"--calibration {self.calibration} needs a newer onnxruntime; pip install -U onnxruntime, or take "
                    "percentile"
                )
            return
        from onnxruntime.quantization.calibrate import save_tensors_data

        with silence(), progress.track("calibrate", len(self.images) + 1) as advance:
            calibrator = create_calibrator(
                self.prepared,
                WITH_RANGES,
                augmented_model_path=str(self.prepared.with_name("augmented.onnx")),
                calibrate_method=METHODS[self.calibration],
                use_external_data_format=is_large(self.prepared),
                extra_options=SEARCHED.get(self.calibration, {}),
            )
            calibrator.collect_data(_Reader(self.prepared, self.images, advance))
            save_tensors_data(calibrator.compute_data(), self.ranges)


def _keeps_ranges() -> bool:
    return "calibration_cache_path" in inspect.signature(quantize_static).parameters


class _Reader(CalibrationDataReader):
    """Images one by one, as ONNX Runtime's calibration takes them."""

    def __init__(self, file: Path, images: np.ndarray, advance: Callable[[], None] | None = None):
        name = onnx.load(file, load_external_data=False).graph.input[0].name
        self.feeds, self.advance = iter([{name: image[None]} for image in images]), advance

    def get_next(self) -> dict | None:
        if self.advance:
            self.advance()
        return next(self.feeds, None)


def _saturates() -> bool:
    """Whether sums of 8-bit products overflow here: x86 without VNNI adds pairs of them in 16 bits, so that weights
    need a bit of room."""
    return platform.machine().lower() in ("x86_64", "amd64") and not int8_instructions()


def _with_weights(file: Path, kinds: tuple[str, ...]) -> list[str]:
    """The operators of these kinds that multiply with weights. Convolutions in front of the layers, which make patches
    of pixels, are not among them: they are little work, and OpenVINO 2026.4 computes them wrongly in INT8."""
    graph = onnx.load(file, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.op_type in kinds and node.input[1] in weights]
    return [node.name for node in itertools.dropwhile(lambda node: node.op_type == "Conv", nodes)]


def to_float16(source: Path, target: Path) -> None:
    """The file in float16, with inputs and outputs, norms and softmax in float32."""
    model = with_chosen(source)
    load_external_data_for_model(model, str(source.parent))
    with silence():
        half = convert_float_to_float16(
            model, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, *PRECISE], disable_shape_infer=True
        )
    hide_chosen(half)
    save_graph(half, target)


def _without_chosen(file: Path) -> None:
    graph = onnx.load(file, load_external_data=False)
    hide_chosen(graph)
    onnx.save_model(graph, file)
