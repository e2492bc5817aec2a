"""Make pretrained Vision Transformers token-selective: convert, distill, fine-tune, measure, export."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # so that editors and type checkers see what is imported when first used
    from tosa_convert.base.errors import TosaError as TosaError
    from tosa_convert.base.errors import UnsupportedModelError as UnsupportedModelError
    from tosa_convert.base.errors import UsageError as UsageError
    from tosa_convert.config.bench import BenchSettings as BenchSettings
    from tosa_convert.config.conversion import ConvertConfig as ConvertConfig
    from tosa_convert.config.settings import DistillSettings as DistillSettings
    from tosa_convert.config.settings import ExportSettings as ExportSettings
    from tosa_convert.config.settings import FinetuneSettings as FinetuneSettings
    from tosa_convert.export.onnx import export_onnx as export_onnx
    from tosa_convert.measure.benchmark import bench as bench
    from tosa_convert.measure.evaluation import evaluate as evaluate
    from tosa_convert.measure.evaluation import random_control as random_control
    from tosa_convert.measure.macs import flops as flops
    from tosa_convert.methods.bypass import Bypass as Bypass
    from tosa_convert.methods.schedule import Schedule as Schedule
    from tosa_convert.methods.score import Score as Score
    from tosa_convert.planning.comparison import compare as compare
    from tosa_convert.planning.plan import find_plan as find_plan
    from tosa_convert.planning.plan import plan as plan
    from tosa_convert.runs.folder import save as save
    from tosa_convert.runs.loading import load as load
    from tosa_convert.selective.conversion import convert as convert
    from tosa_convert.selective.conversion import original as original
    from tosa_convert.training.distillation import distill as distill
    from tosa_convert.training.finetuning import finetune as finetune

__version__ = version("tosa-convert")

_HOME = {
    "BenchSettings": "config.bench",
    "Bypass": "methods.bypass",
    "ConvertConfig": "config.conversion",
    "DistillSettings": "config.settings",
    "ExportSettings": "config.settings",
    "FinetuneSettings": "config.settings",
    "Schedule": "methods.schedule",
    "Score": "methods.score",
    "TosaError": "base.errors",
    "UnsupportedModelError": "base.errors",
    "UsageError": "base.errors",
    "bench": "measure.benchmark",
    "compare": "planning.comparison",
    "convert": "selective.conversion",
    "distill": "training.distillation",
    "evaluate": "measure.evaluation",
    "export_onnx": "export.onnx",
    "finetune": "training.finetuning",
    "find_plan": "planning.plan",
    "flops": "measure.macs",
    "load": "runs.loading",
    "original": "selective.conversion",
    "plan": "planning.plan",
    "random_control": "measure.evaluation",
    "save": "runs.folder",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    """Verbs are imported when first used: ``tosa-convert --help`` need not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'tosa_convert' has no attribute {name!r}")
    value = getattr(import_module(f"tosa_convert.{_HOME[name]}"), name)
    globals()[name] = value
    return value
