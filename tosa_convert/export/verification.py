"""ONNX files in ONNX Runtime, beside the torch model that they were made of."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from tosa_convert.base.errors import TosaError, gist
from tosa_convert.base.progress import Progress
from tosa_convert.config.settings import ExportSettings
from tosa_convert.data.images import Images, loader, spread
from tosa_convert.export.check import Check, bounds, closeness
from tosa_convert.export.ports import Ports
from tosa_convert.models.adapter import adapter_of, run
from tosa_convert.models.outputs import agreement, predict
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.selective.selection import keeps_any_number, last_choices
from tosa_convert.tasks.task import Task

CHOSEN = "chosen_"
"""How the chosen tokens of a layer are called in the graph."""
TORCH, ORIGINAL = "torch", "original"


def other_sizes(model: nn.Module) -> list[tuple[int, int]]:
    """Image sizes (H, W) that are not the model's own: a larger one, and one with a quarter fewer rows of patches."""
    (height, width), adapter = preprocessing_of(model).size, adapter_of(model)
    down, across = adapter.patch
    fewer = down * (height // down // 4)
    if adapter.square:
        return [(height + 2 * down,) * 2, (height - fewer,) * 2]
    return [(height + 2 * down, width + across), (height - fewer, width)]


@dataclass
class Tally:
    """Sums over images of what is said of one model; ``metrics`` over those with labels."""

    figures: dict[str, float]
    metrics: dict[str, float]


class Verifier:
    """Runs files and the models that they were made of on the same images.

    Args:
        task: what the model is for.
        labelled: whether its metrics are measured with the images' labels.
        original: the model before its conversion, to compare with.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Images,
        task: Task,
        labelled: bool,
        settings: ExportSettings,
        original: nn.Module | None,
        progress: Progress,
    ):
        self.model, self.task, self.labelled, self.original = model, task, labelled, original
        self.settings, self.progress = settings, progress
        self.ports = Ports(preprocessing_of(model), settings.raw_input)
        images.reader.check_stored()
        self.images = torch.utils.data.Subset(images, spread(len(images), settings.images))
        # In INT8 an image's ranges depend on those beside it: it is judged by itself.
        self.at_once = 1 if keeps_any_number(model) or settings.precision != "float32" else 8

    def check(self, files: dict[str, Path]) -> dict[str, Check]:
        """Of each file by its precision, float32 first; its chain holds its figures and, in front of them, those of the
        torch models, against the original or, where there is none, the model itself."""
        opened = {name: _File(path) for name, path in files.items()}
        checks = {name: Check(name, threshold=self.settings.threshold) for name in files}
        sums = {name: Tally({}, {}) for name in (ORIGINAL, TORCH, *files)}
        images, labelled, broken = 0, 0, []
        batches = loader(self.images, batch_size=self.at_once)
        with self.progress.track(
            "check in ONNX Runtime", len(batches), unit="images", per_step=self.at_once
        ) as advance:
            for batch in batches:
                broken += batch["broken"]
                if len(batch["images"]):
                    images += len(batch["images"])
                    labelled += self._batch(batch, opened, checks, sums)
                advance()
        if not images:
            raise TosaError("not one image could be read, so the ONNX file is unchecked; give images with --data")
        for name, check in checks.items():
            check.images, check.broken = images, broken
            check.sizes = [preprocessing_of(self.model).size]
            for figures in (check.figures, check.selected):
                figures.update({key: total / images for key, total in figures.items()})
            check.agreement /= images
            for metric in sums[TORCH].metrics if labelled else ():
                outputs = {TORCH: sums[TORCH], "onnx": sums[name], ORIGINAL: sums[ORIGINAL]}
                each = {key: tally.metrics.get(metric) for key, tally in outputs.items()}
                check.metrics[metric] = {k: value / labelled for k, value in each.items() if value is not None}
            if name != "float32":
                check.bounds = bounds(list(check.figures), self.settings)
            if self.settings.any_size:
                self._check_other_sizes(opened[name].session, check)
            check.chain = [
                {
                    "name": key,
                    **{figure: total / images for figure, total in tally.figures.items()},
                    **({metric: total / labelled for metric, total in tally.metrics.items()} if labelled else {}),
                }
                for key, tally in sums.items()
                if key in (ORIGINAL, TORCH, "float32", name) and (tally.figures or tally.metrics)
            ]
        return checks

    def _batch(self, batch: dict, opened: dict[str, "_File"], checks: dict[str, Check], sums: dict[str, Tally]) -> int:
        """Add what a batch of images says; gives how many of them have a label."""
        images = batch["images"]
        with torch.no_grad():
            wanted = run(self.model, images)
        kind, main = next(iter(wanted.items()))
        wanted, feed = self.ports.leaving(wanted), self.ports.feed(images)
        positions = {layer: choice.attended.numpy() for layer, choice in last_choices(self.model).items()}
        found = {name: file.run(feed) for name, file in opened.items()}
        for name, (outputs, chosen) in found.items():
            check = checks[name]
            check.difference = max([check.difference, *map(_largest, outputs, wanted.values())])
            check.agreement += agreement(kind, outputs[0], main).sum().item()
            _add(check.figures, closeness(self.model, self.task, kind, outputs[0], main))
            for layer, places in chosen.items():
                shared = _shared_tokens(places, positions[layer], len(images))
                check.selected[layer] = check.selected.get(layer, 0.0) + shared
        mains = {TORCH: main, **{name: outputs[0] for name, (outputs, _) in found.items()}}
        if self.original is not None and (self.labelled or len(opened) > 1):
            mains[ORIGINAL] = predict(self.original, images)[1]
        before = mains.get(ORIGINAL, main)
        known = self.task.known(batch["labels"]) if self.labelled else None
        for name, value in mains.items():
            _add(sums[name].figures, closeness(self.model, self.task, kind, value, before))
            if known is not None:
                measured = self.task.measure(value, batch["labels"])
                _add(sums[name].metrics, {metric: values[known] for metric, values in measured.items()})
        return 0 if known is None else int(known.sum())

    def examples(self, count: int) -> Iterator[torch.Tensor]:
        """Up to ``count`` images that are checked, spread over them, one by one: (1, C, H, W)."""
        step = max(1, len(self.images) // count)
        # Those in between come last: they stand in for images that cannot be read.
        order = sorted(range(len(self.images)), key=lambda place: (place % step, place))
        good = (image for image, *_ in map(self.images.__getitem__, order) if image is not None)
        for image in itertools.islice(good, count):
            yield image[None]

    @torch.no_grad()
    def _check_other_sizes(self, session: onnxruntime.InferenceSession, check: Check) -> None:
        """The built-in photos, larger and smaller than the model has them, one by one; the worst agreement counts."""
        for size in other_sizes(self.model):
            images = Images(None, preprocessing_of(self.model).at(size))
            agreed, sums = [], {}
            for index in range(len(images)):
                image = images[index][0][None]
                wanted = run(self.model, image)
                kind, main = next(iter(wanted.items()))
                found = run_session(session, self.ports.feed(image))
                check.difference = max([check.difference, *map(_largest, found, self.ports.leaving(wanted).values())])
                agreed.append(agreement(kind, found[0], main).mean().item())
                _add(sums, closeness(self.model, self.task, kind, found[0], main))
            check.agreement = min(check.agreement, sum(agreed) / len(agreed))
            for name, total in sums.items():
                worse = max if name == "error" else min
                check.figures[name] = worse(check.figures[name], total / len(images))
            check.sizes.append(size)


class _File:
    """An ONNX file, with the tokens that it chooses."""

    def __init__(self, path: Path):
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        graph = with_chosen(path)
        self.names = [output.name for output in graph.graph.output if output.name.startswith(CHOSEN)]
        self.inspected = None
        if self.names:
            beside = path.with_name(f"{path.stem}.inspected.onnx")  # where it finds weights beside the graph, too
            onnx.save_model(graph, beside)
            self.inspected = onnxruntime.InferenceSession(str(beside), providers=["CPUExecutionProvider"])
            beside.unlink()

    def run(self, feed: dict[str, np.ndarray]) -> tuple[list[torch.Tensor], dict[int, np.ndarray]]:
        """All outputs, and the chosen tokens of each selective layer."""
        outputs = run_session(self.session, feed)
        if self.inspected is None:
            return outputs, {}
        chosen = self.inspected.run(self.names, feed)
        return outputs, {int(n.removeprefix(CHOSEN)): places for n, places in zip(self.names, chosen, strict=True)}


def run_session(session: onnxruntime.InferenceSession, feed: dict[str, np.ndarray]) -> list[torch.Tensor]:
    """All that a file gives."""
    try:
        return [torch.from_numpy(value) for value in session.run(None, feed)]
    except Exception as error:
        shape = " × ".join(map(str, feed["images"].shape))
        raise TosaError(
            f"ONNX Runtime cannot run the file on {shape}: {gist(error)}; if it was "
            "exported with --any-size, this model does not support that; leave it out"
        ) from error


def with_chosen(path: Path) -> onnx.ModelProto:
    """A file's graph with the chosen tokens as outputs again; weights beside it are not read."""
    proto = onnx.load(path, load_external_data=False)
    outputs = {output.name for output in proto.graph.output}
    for name in (name for node in proto.graph.node for name in node.output if name.startswith(CHOSEN)):
        if name not in outputs:
            proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None))
    return proto


def hide_chosen(proto: onnx.ModelProto) -> None:
    """The chosen tokens stay in the graph by name, but are no outputs of the delivered file."""
    kept = [output for output in proto.graph.output if not output.name.startswith(CHOSEN)]
    del proto.graph.output[:]
    proto.graph.output.extend(kept)


def _add(sums: dict[str, float], values: dict[str, torch.Tensor]) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value.sum().item()


def _largest(found: torch.Tensor, wanted: torch.Tensor) -> float:
    if found.shape != wanted.shape:
        raise TosaError(
            f"the ONNX output has shape {tuple(found.shape)}, torch {tuple(wanted.shape)}: a size is fixed in the "
            "file; if it was exported with --any-size, this model does not support that; leave it out"
        )
    difference = (found - wanted).abs().max().item()
    return difference if math.isfinite(difference) else math.inf


def _shared_tokens(found: np.ndarray, wanted: np.ndarray, images: int) -> float:
    """Sum over images of the share of chosen positions that are in both; rows may be per image or per head."""
    shares = [
        len(np.intersect1d(ours, theirs)) / max(len(ours), len(theirs))
        for ours, theirs in zip(found, wanted, strict=True)
    ]
    return float(np.mean(shares)) * images
