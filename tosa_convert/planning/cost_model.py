"""What a selective layer saves at which keep ratio: in multiply–adds, or in time measured on this machine."""

import copy
from dataclasses import dataclass

import numpy as np
from torch import nn

from tosa_convert.base.progress import Progress
from tosa_convert.measure.benchmark import BenchSettings, bench
from tosa_convert.measure.macs_share import MacsShare
from tosa_convert.methods.token_ops import keep_count, ratio_steps
from tosa_convert.models.adapter import adapter_of
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.selective.conversion import original, set_ratios

RATIOS = (0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.2)


@dataclass(frozen=True)
class Prices:
    """Shares of the original's cost that one layer saves.

    Attributes:
        by: "macs" or "latency".
        ratios: ascending, the last one 1.0.
        saved: at each of them; 0.0 at 1.0, and negative where choosing the tokens costs more than it saves.
        patches: of an image, since whole tokens attend.
    """

    by: str
    ratios: tuple[float, ...]
    saved: tuple[float, ...]
    patches: int = 10_000

    def skips(self, ratio: float) -> bool:
        """Whether there is a token to skip at this ratio."""
        return self._share(ratio) < 1

    def at(self, ratio: float) -> float:
        if not self.skips(ratio):
            return 0.0
        return float(np.interp(self._share(ratio), list(map(self._share, self.ratios)), self.saved))

    def _share(self, ratio: float) -> float:
        return keep_count(self.patches, ratio_steps(ratio)) / self.patches

    def total(self, ratios: dict[int, float]) -> float:
        """Share of the original's cost that is left with these ratios by layer."""
        return 1 - sum(map(self.at, ratios.values()))


def price(probe: nn.Module, share_of: MacsShare, by: str, runtime: str, progress: Progress) -> Prices:
    """Prices of a layer of ``probe``, whose layers are all selective; its ratios are changed.

    Each ratio is set in all layers at once; what that saves is shared out among them.
    """
    layers = probe.tosa_config.layers
    shares = _latencies(probe, runtime, progress) if by == "latency" else _macs(probe, share_of, progress)
    saved = [(1 - share) / len(layers) for share in shares]
    # Just below 1.0 the selection has its full cost already: the line to 1.0 itself starts from what it costs alone.
    slope = (saved[1] - saved[0]) / (RATIOS[0] - RATIOS[1])
    nearly = saved[0] - slope * (0.999 - RATIOS[0])
    ratios, values = (*RATIOS[::-1], 0.999, 1.0), (*saved[::-1], nearly, 0.0)
    return Prices(by, ratios, values, adapter_of(probe).patches(preprocessing_of(probe).size))


def _macs(probe: nn.Module, share_of: MacsShare, progress: Progress) -> list[float]:
    shares, layers = [], probe.tosa_config.layers
    with progress.track("count MACs", len(RATIOS)) as advance:
        for ratio in RATIOS:
            shares.append(share_of.of(set_ratios(probe, dict.fromkeys(layers, ratio))))
            advance()
    return shares


def _latencies(probe: nn.Module, runtime: str, progress: Progress) -> list[float]:
    models, layers = {"original": original(probe)}, probe.tosa_config.layers
    for ratio in RATIOS:
        models[str(ratio)] = set_ratios(copy.deepcopy(probe), dict.fromkeys(layers, ratio))
    timed = time_models(models, runtime, progress)
    return [timed[str(ratio)] / timed["original"] for ratio in RATIOS]


def time_models(models: dict[str, nn.Module], runtime: str, progress: Progress) -> dict[str, float]:
    """Milliseconds of each model, batch 1, one thread, in turn."""
    settings = BenchSettings(runtimes=[runtime], rounds=15, memory=False)
    case = bench(models, settings, progress=progress)["cases"][0]
    return {name: found["ms"] for name, found in case["models"].items()}
