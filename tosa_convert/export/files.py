"""ONNX files on disk: weights above 2 GB, which protobuf cannot hold, lie in a file beside the graph."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

LIMIT = 2**31 - 2**20
"""Bytes up to which the weights lie within the graph's file."""


def save_graph(proto: onnx.ModelProto, path: Path) -> None:
    """The graph at ``path``; if it is large, its weights in a file beside it."""
    weights = sum(len(tensor.raw_data) for tensor in proto.graph.initializer)
    beside = {"save_as_external_data": True, "location": f"{path.name}.data"} if weights >= LIMIT else {}
    onnx.save_model(proto, path, **beside)


def size_of(path: Path) -> int:
    """Bytes of a graph and of the weights beside it."""
    return sum(each.stat().st_size for each in (path, *weights_beside(path)))


def is_large(path: Path) -> bool:
    """Whether a graph's weights lie beside it, or have to."""
    return size_of(path) >= LIMIT


def weights_beside(path: Path) -> list[Path]:
    """The files of weights that a graph names; none where the file holds something else."""
    try:
        graph = onnx.load(path, load_external_data=False)
    except DecodeError:
        return []
    return sorted({path.with_name(ExternalDataInfo(tensor).location) for tensor in _outside(graph)})


def deliver(source: Path, target: Path) -> None:
    """Move a graph to its place, which then holds the whole of it or what was there before.

    Weights beside it get a name of their own, so that the graph before and its weights stay together until the new
    graph is in its place.
    """
    before = weights_beside(target) if target.exists() else []
    beside = weights_beside(source)
    if beside and size_of(source) < LIMIT:  # a quantised file of a large one
        onnx.save_model(onnx.load(source), source)
    elif beside:
        graph = onnx.load(source, load_external_data=False)
        named = target.with_name(f"{target.stem}-{uuid.uuid4().hex[:8]}.onnx.data")
        for tensor in _outside(graph):
            next(entry for entry in tensor.external_data if entry.key == "location").value = named.name
        os.replace(beside[0], named)
        onnx.save_model(graph, source)
    os.replace(source, target)
    for each in before:
        each.unlink(missing_ok=True)


def outputs_in(path: Path) -> list[dict]:
    """Names and shapes of what a graph gives, sides that differ by name."""
    graph = onnx.load(path, load_external_data=False).graph
    return [
        {"name": each.name, "shape": [side.dim_param or side.dim_value for side in each.type.tensor_type.shape.dim]}
        for each in graph.output
    ]


def remove(path: Path) -> None:
    """A graph and its weights, if they are there."""
    if path.exists():
        for each in (path, *weights_beside(path)):
            each.unlink(missing_ok=True)


def _outside(graph: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    return (tensor for tensor in graph.graph.initializer if uses_external_data(tensor))
