"""How the direction of the KL and the learning rate decide what a selector learns.

    python benchmarks/selector_training.py --model quickstart --data tosa-quickstart/data/train \
        --augment flip --batch-size 64 --out benchmarks/results/selector_training_quickstart.json
    python benchmarks/selector_training.py --model dinov2/transformers --img-size 224 --batch-size 4 \
        --out benchmarks/results/selector_training_dinov2.json

"overlap" is the share of the selected patches that the selective layer's real column sums would
select, over the last ten steps, at ratio 0.5 (random selection: 0.5). The real ViT-S/14 comes
from real_dinov2.py.
"""

import argparse
import tempfile
from pathlib import Path

import record

from tosa_convert import DistillSettings, convert, distill, load
from tosa_convert.runs.metrics_log import read_metrics

LAYERS, RATIO = [2, 4, 6, 8, 10], 0.5


def overlap(arguments: argparse.Namespace, kl: str, lr: float) -> dict:
    model = convert(load(arguments.model, img_size=arguments.img_size), layers=LAYERS, ratio=RATIO)
    settings = DistillSettings(
        steps=arguments.steps, batch_size=arguments.batch_size, augment=arguments.augment, kl=kl, lr=lr, log_every=1
    )
    with tempfile.TemporaryDirectory() as out:
        distill(model, arguments.data, settings, out=Path(out))
        overlaps = [line["overlap"] for line in read_metrics(Path(out))]
    row = {"kl": kl, "lr": lr, "start": sum(overlaps[:3]) / 3, "end": sum(overlaps[-10:]) / 10}
    print(row, flush=True)
    return row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", help="left out: the built-in photos")
    parser.add_argument("--img-size", type=int)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--augment", default="crop")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()
    rows = [overlap(arguments, kl, lr) for kl in ("forward", "reverse") for lr in (5e-3, 2e-2)]
    setting = {"layers": LAYERS, "ratio": RATIO, "steps": arguments.steps, "batch_size": arguments.batch_size}
    name = Path(arguments.model).name if Path(arguments.model).is_dir() else arguments.model
    record.write(arguments.out, {"model": name, "img_size": arguments.img_size, **setting, "rows": rows})
