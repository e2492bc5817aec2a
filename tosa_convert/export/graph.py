"""A model as an ONNX graph, unchecked."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxscript import rewriter
from torch import nn

from tosa_convert.base.errors import TosaError
from tosa_convert.export.files import save_graph
from tosa_convert.export.ports import SIDES, Ports
from tosa_convert.export.quiet import silence
from tosa_convert.export.verification import CHOSEN, hide_chosen, other_sizes
from tosa_convert.models.adapter import adapter_of, run
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.selective.selection import forget, keeps_any_number, last_choices

DECIDES = "data-dependent"
"""What torch says of a forward that decides by the values of a tensor."""
FEW = 64  # numbers that a forward may decide by


class _Graph(nn.Module):
    """The model as tensor → named tensors, with the chosen tokens of each selective layer after its outputs."""

    def __init__(self, model: nn.Module, ports: Ports):
        super().__init__()
        self.model, self.ports = model, ports

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        found = self.ports.leaving(run(self.model, self.ports.entering(images)))
        chosen = {f"{CHOSEN}{layer}": choice.attended for layer, choice in last_choices(self.model).items()}
        return {**found, **chosen}


def write_graph(model: nn.Module, path: Path, opset: int, any_size: bool = False, raw: bool = False) -> None:
    """The ONNX file of a float32 model on the CPU, unchecked; any batch size, or one image at a time where each keeps
    as many tokens as it needs; the model's own image size or any; ``raw`` as :class:`~tosa_convert.export.ports.Ports`
    has it."""
    preprocessing, adapter = preprocessing_of(model), adapter_of(model)
    ports = Ports(preprocessing, raw)
    # Where images keep different numbers of tokens they make no batch with one row each.
    alone = keeps_any_number(model)
    size, shape = preprocessing.size, {} if alone else {0: torch.export.Dim("batch")}
    if any_size:
        size = other_sizes(model)[0]  # of no model's own, or its position embedding would be taken as it is
        sides = [
            torch.export.Dim(name, min=2, max=4096 // patch) for name, patch in zip(SIDES, adapter.patch, strict=True)
        ]
        sides = sides[:1] * 2 if adapter.square else sides
        shape |= {axis: patch * side for axis, patch, side in zip(ports.sides, adapter.patch, sides, strict=True)}
    example = ports.encoded(torch.randn(1 if alone else 2, preprocessing.channels, *size))
    graph = _Graph(model, ports)
    with torch.no_grad():
        names = list(graph(example))

    def export() -> Any:
        with silence(), _quick_rules(), torch.no_grad(), adapter.exporting():
            return torch.onnx.export(
                graph,
                (example,),
                input_names=["images"],
                output_names=names,
                dynamic_shapes={"images": shape},
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )

    try:
        try:
            program = export()
        except Exception as error:
            if DECIDES not in str(error):
                raise
            with _few_values_known(model):
                program = export()
    except Exception as error:
        raise TosaError(f"torch.onnx could not export the model: {_summary(error)}") from error
    finally:
        forget(model)  # tracing leaves symbolic tensors behind
    proto = program.model_proto
    hide_chosen(proto)
    _forget_origins(proto)
    save_graph(proto, path)
    onnx.checker.check_model(path)


def _forget_origins(proto: onnx.ModelProto) -> None:
    """Take out of a graph where its nodes come from, lines of code with the paths of this machine: nobody who runs the
    file needs it, and it may be a third of it."""
    pending: list[Any] = [proto.graph, *proto.functions]
    while pending:
        part = pending.pop()
        named = [] if isinstance(part, onnx.FunctionProto) else [*part.input, *part.output, *part.initializer]
        for each in (part, *part.node, *part.value_info, *named):
            del each.metadata_props[:]
            each.doc_string = ""
        for held in (held for node in part.node for held in node.attribute):
            pending += [*([held.g] if held.HasField("g") else []), *held.graphs]


def _summary(error: Exception) -> str:
    """What went wrong, of a message that is advice to those who write exporters for the most part."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    if DECIDES in text:
        return "its forward decides by the values of a tensor, which a graph cannot; --debug shows where"
    return " ".join(text.rpartition("## Exception summary")[2].split())[:200]


@contextlib.contextmanager
def _few_values_known(model: nn.Module) -> Iterator[None]:
    """Buffers of a few numbers as plain numbers: a model that decides by them, as EoMT does, then decides once and for
    all."""
    taken = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.ndim == 1 and buffer.is_floating_point() and len(buffer) <= FEW
    ]
    for module, name, buffer in taken:
        module.__dict__[name] = buffer.tolist()  # found before the buffer
    try:
        yield
    finally:
        for module, name, _ in taken:
            del module.__dict__[name]


@contextlib.contextmanager
def _quick_rules() -> Iterator[None]:
    """The exporter's optimiser without its rule "slices that make up a split".

    The rule compares each slice with every node of the graph, which takes nine tenths of an export, and finds nothing
    in a graph that gathers tokens. An onnxscript that keeps its rules elsewhere exports as well, only slower.
    """
    rules = getattr(rewriter, "_DEFAULT_REWRITE_RULES", None)
    if rules is not None:
        rewriter._DEFAULT_REWRITE_RULES = tuple(rule for rule in rules if rule.name != "SlicesSplit")
    try:
        yield
    finally:
        if rules is not None:
            rewriter._DEFAULT_REWRITE_RULES = rules
