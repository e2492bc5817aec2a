"""What converting and training cost: beside a forward pass, and beside fine-tuning the original.

    python benchmarks/training_cost.py --out benchmarks/results/training_cost.json

ViT-S/14, five selectors, ratio 0.8, random weights (latency does not depend on them), all cores. One
interleaved run per table: a plain forward pass against one distillation step (forward, loss,
backward, optimiser), and one fine-tuning step of the original against the converted model's. Peak
memory: each in processes of its own, what loading and one step add to a process that has imported
the libraries; the median of five, since the allocator's luck differs by a tenth.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import record
import torch

from tosa_convert import convert, load
from tosa_convert.base.timing import interleave
from tosa_convert.measure.peak_memory import forget_peak, resident
from tosa_convert.models.adapter import run
from tosa_convert.training.distillation import SelectorDistillation

NAME, LAYERS, RATIO = "vit_small_patch14_dinov2", [2, 4, 6, 8, 10], 0.8


def forward_step(size: int, batch: int):
    model, images = load(NAME, pretrained=False, img_size=size), torch.randn(batch, 3, size, size)

    def step() -> None:
        with torch.inference_mode():
            run(model, images)

    return step


def distill_step(size: int, batch: int):
    model = convert(load(NAME, pretrained=False, img_size=size), layers=LAYERS, ratio=RATIO)
    return _training_step(SelectorDistillation(model, kl="forward"), torch.randn(batch, 3, size, size))


def finetune_step(size: int, batch: int, converted: bool):
    """Cross-entropy with labels, so that no teacher runs beside either model."""
    model = load(NAME, pretrained=False, img_size=size, num_classes=10)
    if converted:
        convert(model, layers=LAYERS, ratio=RATIO)
    labels = torch.arange(batch) % 10

    class Objective(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, images):
            return {"loss": torch.nn.functional.cross_entropy(self.model(images), labels)}

    return _training_step(Objective().train(), torch.randn(batch, 3, size, size))


def _training_step(objective, images):
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        objective(images)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


STEPS = {"forward": forward_step, "distill": distill_step}


def peak(kind: str, size: int, batch: int) -> int:
    """Bytes, in fresh processes."""
    command = [sys.executable, __file__, "--peak", json.dumps([kind, size, batch])]
    return _median([int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(5)])


def _peak_here(kind: str, size: int, batch: int) -> int:
    before = resident("VmRSS")
    step = STEPS[kind](size, batch)
    step()
    forget_peak()
    step()
    return resident("VmHWM") - before


def conversion() -> dict:
    model = load("vit_base_patch16_224", pretrained=False)
    places = {name: value.data_ptr() for name, value in model.named_parameters()}
    before, started = resident("VmRSS"), time.perf_counter()
    convert(model, layers=LAYERS, ratio=RATIO)
    seconds, grown = time.perf_counter() - started, resident("VmRSS") - before
    moved = sum(value.data_ptr() != places[name] for name, value in model.named_parameters() if name in places)
    return {"model": "vit_base_patch16_224", "seconds": seconds, "resident_grown": grown, "weights_moved": moved}


def measure(rounds: int) -> dict:
    results = {"convert": conversion(), "distill": {}, "finetune": {}}
    for size, batch in ((224, 8), (518, 1)):
        timings = interleave({name: make(size, batch) for name, make in STEPS.items()}, rounds)
        ratio = 1 / _median(timings["distill"].speedups(timings["forward"]))
        peaks = {name: peak(name, size, batch) for name in STEPS}
        results["distill"][f"{size} px, batch {batch}"] = {
            "forward_ms": 1e3 * timings["forward"].median,
            "distill_ms": 1e3 * timings["distill"].median,
            "cost_ratio": ratio,
            "peak": peaks,
            "peak_ratio": peaks["distill"] / peaks["forward"],
        }
        steps = {name: finetune_step(size, batch, name == "converted") for name in ("original", "converted")}
        timings = interleave(steps, max(3, rounds // 2))
        results["finetune"][f"{size} px, batch {batch}"] = {
            "original_ms": 1e3 * timings["original"].median,
            "converted_ms": 1e3 * timings["converted"].median,
            "cost_ratio": 1 / _median(timings["converted"].speedups(timings["original"])),
        }
        print(json.dumps({key: value.get(f"{size} px, batch {batch}") for key, value in results.items()}), flush=True)
    return results


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print(_peak_here(*json.loads(arguments.peak)))
        return
    setting = {"model": NAME, "layers": LAYERS, "ratio": RATIO, "threads": torch.get_num_threads()}
    record.write(arguments.out, {**setting, "results": measure(arguments.rounds)})


if __name__ == "__main__":
    main()
