"""What a selective layer saves at which keep ratio: in multiply–adds, or in time measured on this machine."""

import copy
import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from tosa_convert.base.distributed import pick_device
from tosa_convert.base.errors import UsageError
from tosa_convert.base.progress import Progress
from tosa_convert.base.timing import check_threads
from tosa_convert.config.bench import BenchSettings
from tosa_convert.export.runtimes import PRECISIONS, missing
from tosa_convert.measure.benchmark import bench
from tosa_convert.measure.macs_share import MacsShare
from tosa_convert.methods.bypass import Bypass
from tosa_convert.methods.token_ops import keep_count, ratio_steps
from tosa_convert.models.adapter import adapter_of
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.selective.conversion import original, set_ratios

RATIOS = (0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.2)
CHOOSING = (0.75, 0.4)
"""Ratios at which the time is taken that choosing takes: a graph with many choices takes long to write."""


@dataclass(frozen=True)
class Prices:
    """Shares of the original's cost that one layer saves.

    Attributes:
        by: "macs" or "latency".
        ratios: ascending, the last one 1.0.
        saved: at each of them, by a layer that chooses its tokens; 0.0 at 1.0, and negative where choosing costs more
            than it saves.
        following: the same of a layer that goes on with the tokens of the one before; None where none does.
        patches: of an image, since whole tokens attend.
    """

    by: str
    ratios: tuple[float, ...]
    saved: tuple[float, ...]
    following: tuple[float, ...] | None = None
    patches: int = 10_000

    def skips(self, ratio: float) -> bool:
        """Whether there is a token to skip at this ratio."""
        return self._share(ratio) < 1

    def at(self, ratio: float, follows: bool = False) -> float:
        if not self.skips(ratio):
            return 0.0
        values = self.following if follows and self.following else self.saved
        return float(np.interp(self._share(ratio), list(map(self._share, self.ratios)), values))

    def _share(self, ratio: float) -> float:
        return keep_count(self.patches, ratio_steps(ratio)) / self.patches

    def total(self, ratios: dict[int, float], segments: list[list[int]] | None = None) -> float:
        """Share of the original's cost that is left with these ratios by layer, and layers that share a choice."""
        follow = {layer for segment in segments or [] for layer in segment[1:]}
        return 1 - sum(self.at(ratio, layer in follow) for layer, ratio in ratios.items())


PLANNED = ("float32", "int8")
"""Precisions of plans; weights would not come back from others as they were."""


@dataclass(frozen=True)
class Conditions:
    """Under which a latency is measured: those under which the model will run.

    Attributes:
        runtime: "eager", "compile", "onnx" or "openvino".
        precision: "float32", or of ONNX files "int8".
        threads: of the runtime.
        batch_size: images per forward pass.
        device: "cpu" or "cuda"; None for that of the model.
    """

    runtime: str = "eager"
    precision: str = "float32"
    threads: int = 1
    batch_size: int = 1
    device: str | None = None

    def check(self, timed: bool = True) -> None:
        """
        Args:
            timed: whether anything will be; otherwise the runtime need not be there.

        Raises:
            UsageError: the runtime does not run in this precision, or there are fewer processors.
        """
        if self.runtime not in PRECISIONS:
            raise UsageError(f"runtime {self.runtime!r} is not known; choose from {', '.join(PRECISIONS)}")
        known = [name for name in PRECISIONS[self.runtime] if name in PLANNED]
        if self.precision not in known:
            raise UsageError(
                f"runtime {self.runtime} is not timed in {self.precision}, only in {' and '.join(known)}; "
                f"{'use runtime onnx' if self.precision == 'int8' else 'choose one of these'}"
            )
        if timed and (why := missing(self.runtime, pick_device(self.device or "cpu"))):
            raise UsageError(why)
        check_threads(self.threads)

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        where = f", {self.device}" if self.device == "cuda" else ""
        return f"{self.runtime}, {self.precision}, batch {self.batch_size}, {threads}{where}"


def price(probe: nn.Module, share_of: MacsShare, by: str, conditions: Conditions, progress: Progress) -> Prices:
    """Prices of a layer of ``probe``, whose layers are all selective; its ratios are changed.

    Each ratio is set in all layers at once; what that saves is shared out among them.
    """
    layers, shares = probe.tosa_config.layers, functools.partial(_shares, probe, share_of, by, conditions, progress)
    if len(layers) > 1 and probe.tosa_config.part(Bypass).groups:
        chosen = RATIOS if by == "macs" else CHOOSING
        found = shares([*((ratio, True) for ratio in RATIOS), *((ratio, False) for ratio in chosen)])
        together, each = found[: len(RATIOS)], found[len(RATIOS) :]
        # In one segment all layers but the first follow.
        shared = [share for ratio, share in zip(RATIOS, together, strict=True) if ratio in chosen]
        extra = [(a - b) / (len(layers) - 1) for a, b in zip(each, shared, strict=True)]
        choosing = np.interp(RATIOS, chosen[::-1], extra[::-1])
        saved = [
            (1 - share - cost) / len(layers) for share, cost in zip(together, choosing * (len(layers) - 1), strict=True)
        ]
        following = _line([one + cost for one, cost in zip(saved, choosing, strict=True)])
    else:
        saved = [(1 - share) / len(layers) for share in shares([(ratio, False) for ratio in RATIOS])]
        following = None
    patches = adapter_of(probe).patches(preprocessing_of(probe).size)
    return Prices(by, (*RATIOS[::-1], 0.999, 1.0), _line(saved), following, patches)


def _line(saved: list[float]) -> tuple[float, ...]:
    """What is saved at each of the ratios, ascending, up to 1.0: just below it the selection has its full cost already,
    so the line to 1.0 itself starts from what it costs alone."""
    slope = (saved[1] - saved[0]) / (RATIOS[0] - RATIOS[1])
    return (*saved[::-1], saved[0] - slope * (0.999 - RATIOS[0]), 0.0)


def _shares(
    probe, share_of: MacsShare, by: str, conditions: Conditions, progress: Progress, wanted: list[tuple[float, bool]]
):
    """The share of the original's cost for each (ratio, whether one choice serves all layers)."""
    layers = probe.tosa_config.layers

    def with_ratio(model: nn.Module, ratio: float, shared: bool) -> nn.Module:
        segments = [layers] if shared else [[layer] for layer in layers]
        return set_ratios(model, dict.fromkeys(layers, ratio), segments)

    if by == "latency":
        models = {str(each): with_ratio(copy.deepcopy(probe), *each) for each in wanted}
        timed = time_models({"original": original(probe), **models}, conditions, progress)
        return [timed[str(each)] / timed["original"] for each in wanted]
    shares = []
    with progress.track("count MACs", len(wanted)) as advance:
        for each in wanted:
            shares.append(share_of.of(with_ratio(probe, *each)))
            advance()
    return shares


def time_models(
    models: dict[str, nn.Module],
    conditions: Conditions,
    progress: Progress,
    rounds: int = 15,
    data: str | Path | None = None,
) -> dict[str, float]:
    """Milliseconds per forward pass of each model, in turn; on images of a folder if there is one. The models end where
    they were."""
    weights = {name: next(model.parameters()) for name, model in models.items()}
    homes = {name: (weight.device, weight.dtype) for name, weight in weights.items()}
    settings = BenchSettings(
        runtimes=[conditions.runtime],
        precisions=[conditions.precision],
        threads=conditions.threads,
        batch_sizes=[conditions.batch_size],
        rounds=rounds,
        memory=False,
    )
    try:
        case = bench(models, settings, data=data, device=conditions.device, progress=progress)["cases"][0]
    finally:
        for name, model in models.items():
            model.to(*homes[name])
    return {name: found["ms"] for name, found in case["models"].items()}
