"""The plan whose images keep as many tokens as they need, against the plan with numbers, on two real models and photos
that neither was made on.

    apt install opencv-doc
    python benchmarks/adaptive.py dinov2 dinov2/timm.safetensors /usr/share/doc/opencv-doc/examples/data
    python benchmarks/adaptive.py clip clip/transformers /usr/share/doc/opencv-doc/examples/data

Both are made on the photos that travel in the package. The plan with numbers is measured at several budgets, and its
error at the mean multiply–adds that the adaptive one takes on the other photos is interpolated (logarithms, linearly).
``oracle`` is the share of its error that would be left to someone who knew each photo's error at each of these budgets
and gave each photo its own; thresholds may do better than that, since they also move tokens between an image's layers.
Takes half an hour on one core with the first, an hour with the second.
"""

import argparse
import copy
import json
import math
from pathlib import Path

import methods
import numpy as np
import record
import torch

from tosa_convert import convert
from tosa_convert.config.bench import BenchSettings
from tosa_convert.data.sampling import sample
from tosa_convert.measure.benchmark import bench
from tosa_convert.measure.macs_share import MacsShare
from tosa_convert.measure.similarity import Keep, losses, observe
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.planning.plan import find_plan

BUDGETS = (0.9, 0.8, 0.7, 0.6)
BETWEEN = (0.95, 0.85, 0.75, 0.65, 0.55)
COUNT = 24
OUT = {"dinov2": "adaptive.json", "clip": "adaptive_clip.json"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(OUT))
    parser.add_argument("weights", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--images", type=int, help="so many of all images in the folder, in place of those 24 scenes")
    parser.add_argument("--speed", action="store_true", help="also time ONNX Runtime on the photos")
    parser.add_argument("--segment", type=int, help="so many layers in a row of the adaptive plan share a choice")
    parser.add_argument("--plans", type=Path, help="file in which plans are kept, to go on with")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model = methods.MODELS[arguments.model][0](arguments.weights)
    preprocessing = preprocessing_of(model)
    tuning = sample(None, preprocessing, COUNT)[0]
    if arguments.images:
        measure(arguments, model, tuning, arguments.photos, arguments.images)
    else:
        with methods.scenes_of(arguments.photos) as folder:
            measure(arguments, model, tuning, Path(folder), COUNT)


def measure(arguments: argparse.Namespace, model, tuning: torch.Tensor, folder: Path, count: int) -> None:
    """Errors, and speed if it is asked for, on the same images of a folder."""
    photos = sample(folder, preprocessing_of(model), count)[0]
    share_of, wanted = MacsShare(model), [observe(model, batch) for batch in photos.split(8)]

    def errors(converted) -> torch.Tensor:
        """(images, 2): of the patch tokens and of the class token."""
        found = zip(photos.split(8), wanted, strict=True)
        each = [losses(observe(converted, batch), theirs, Keep.PATCHES) for batch, theirs in found]
        return torch.cat([torch.stack(pair, 1) for pair in each])

    known = json.loads(arguments.plans.read_text()) if arguments.plans and arguments.plans.exists() else {}

    def planned(budget: float, adaptive: bool):
        segment = arguments.segment if adaptive else None
        key = f"{budget} {adaptive} {segment}"
        if key not in known:
            known[key] = find_plan(model, tuning, budget, adaptive=adaptive, segment=segment).config.model_dump()
            if arguments.plans:
                arguments.plans.write_text(json.dumps(known))
        return convert(copy.deepcopy(model), **known[key])

    fixed = {share_of.of(each): errors(each) for each in (planned(b, False) for b in sorted(BUDGETS + BETWEEN))}
    rows = []
    for budget in BUDGETS:
        converted = planned(budget, True)
        shares = share_of.of_each(converted, photos)
        mean, found = float(np.mean(shares)), errors(converted).mean(0).tolist()
        row = {
            "budget": budget,
            "thresholds": converted.tosa_config.threshold is not None,
            "macs": {"mean": mean, "deviation": float(np.std(shares)), "least": min(shares), "most": max(shares)},
            **dict(zip(("patch", "class"), found, strict=True)),
        }
        for place, name in enumerate(("patch", "class")):
            row[f"{name}_fixed"] = interpolated(fixed, mean)[:, place].mean().item()
            known_there = min(fixed) <= mean <= max(fixed)  # beyond, there is nothing to hold it against
            row[f"{name}_share"] = found[place] / row[f"{name}_fixed"] if known_there else None
        row["oracle"] = oracle(fixed, mean)
        if arguments.speed:
            timed = bench(
                {"original": model, "adaptive": converted},
                BenchSettings(runtimes=["onnx"], memory=False),
                data=folder,
                images=count,
            )
            row["speed"] = timed["cases"][0]["models"]["adaptive"]
        rows.append(row)
        print(row, flush=True)
    data = (
        f"{len(photos)} images of {arguments.photos.name}" if arguments.images else "24 photos of Debian's opencv-doc"
    )
    curve = [
        {"macs": share, "patch": e[:, 0].mean().item(), "class": e[:, 1].mean().item()} for share, e in fixed.items()
    ]
    out = arguments.out or Path("benchmarks/results") / OUT[arguments.model]
    about = {"model": arguments.model, "data": data, "segment": arguments.segment}
    record.write(out, {**about, "fixed": curve, "rows": rows})


def interpolated(fixed: dict[float, torch.Tensor], share: float) -> torch.Tensor:
    """(images, 2): errors of the plans with numbers at a share of the multiply–adds between theirs."""
    shares = sorted(fixed)
    upper = next((each for each in shares if each >= share), shares[-1])
    lower = max((each for each in shares if each <= share), default=shares[0])
    part = 0.0 if upper == lower else (share - lower) / (upper - lower)
    low, high = (fixed[each].clamp(min=1e-9).log() for each in (lower, upper))
    return (low + part * (high - low)).exp()


def oracle(fixed: dict[float, torch.Tensor], mean: float) -> dict[str, float]:
    """The share of the errors that is left if each photo gets the budget that is best for all at this mean."""
    shares = np.linspace(min(fixed), max(fixed), 101)
    errors = np.stack([interpolated(fixed, share).numpy() for share in shares])  # (101, images, 2)
    low, high = 1e-8, 1e4
    for _ in range(60):
        price = math.sqrt(low * high)
        best = (errors.sum(2) + price * shares[:, None]).argmin(0)
        low, high = (price, high) if shares[best].mean() > mean else (low, price)
    given = errors[best, np.arange(errors.shape[1])].mean(0)
    same = interpolated(fixed, float(shares[best].mean())).mean(0).numpy()
    return dict(zip(("patch", "class"), (given / same).tolist(), strict=True))


if __name__ == "__main__":
    main()
