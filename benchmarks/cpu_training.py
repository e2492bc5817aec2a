"""Mixed precision on a CPU: one training step in float32, in bf16 throughout, and in bf16 with attention in float32.

    OMP_NUM_THREADS=1 python benchmarks/cpu_training.py --out benchmarks/results/cpu_training.json

What ``finetune`` and ``distill`` do for ``precision: bf16`` on a CPU is the last of the three. Original and ToMe at
0.7 of the multiply–adds; random weights for the ViT-S/14 (the time does not depend on them); one interleaved run per
model. What bf16 is worth depends on the processor: the record says whether it multiplies in bf16 (AMX, AVX-512).
"""

import argparse
import copy
from contextlib import nullcontext
from pathlib import Path

import record
import torch

from tosa_convert import load
from tosa_convert.base.environment import instructions
from tosa_convert.base.timing import interleave
from tosa_convert.planning.budget import at_budget
from tosa_convert.training.float32_attention import Float32Attention

CASES = {"quickstart, 28 px, batch 128": ("quickstart", 28, 128), "ViT-S/14, 168 px, batch 32": (None, 168, 32)}
PRECISIONS = {
    "float32": (False, nullcontext),
    "bf16 throughout": (True, nullcontext),
    "bf16, attention in float32": (True, Float32Attention),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows = [row for case, parts in CASES.items() for row in measured(case, *parts, arguments.rounds)]
    has = [name for name in ("avx512_bf16", "amx_bf16") if name in instructions()]
    record.write(arguments.out, {"threads": torch.get_num_threads(), "instructions": has, "rows": rows})


def measured(case: str, name: str | None, size: int, batch: int, rounds: int):
    """One row per model and precision: milliseconds of a step, and its speed over float32, each round's own."""
    original = load(name) if name else load("vit_small_patch14_dinov2", pretrained=False, img_size=size, num_classes=10)
    channels = original.pretrained_cfg["input_size"][0] if name else 3
    images, labels = torch.randn(batch, channels, size, size), torch.arange(batch) % 10
    for method in ("original", "tome"):
        model = copy.deepcopy(original) if method == "original" else copy.deepcopy(at_budget(original, method, 0.7))
        steps = {each: step_of(model.train(), images, labels, *how) for each, how in PRECISIONS.items()}
        timed = interleave(steps, rounds)
        for precision, timing in timed.items():
            ratios = sorted(timing.speedups(timed["float32"]))
            row = {"case": case, "model": method, "precision": precision}
            row |= {"ms": 1e3 * timing.median, "over_float32": ratios[len(ratios) // 2]}
            print(row, flush=True)
            yield row


def step_of(model, images, labels, mixed: bool, context):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        with context():
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                loss = torch.nn.functional.cross_entropy(model(images).float(), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
