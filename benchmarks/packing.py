"""Ways to run a batch whose images keep different numbers of tokens: their speed on the real ViT-S/14.

    python benchmarks/packing.py dinov2/timm.safetensors /usr/share/doc/opencv-doc/examples/data

``row`` is what the project does: one row, the attention of each image by itself. ``images`` runs the blocks image by
image. ``containers`` packs images into containers as long as a whole image, with masks (Select and Pack). ``mask`` runs
one row with one attention over all of it and a block-diagonal mask. ``padded`` is the plan with numbers at the most
tokens that an image of the batch keeps in each layer, which is what padding would cost.
"""

import argparse
import copy
from pathlib import Path
from unittest import mock

import methods
import record
import torch
import torch.nn.functional as F

from tosa_convert import convert
from tosa_convert.base.timing import Timing, interleave, pinned
from tosa_convert.data.images import sample
from tosa_convert.models.adapter import run
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.planning.plan import find_plan
from tosa_convert.selective import packed
from tosa_convert.selective.selection import last_choices, selective_blocks

BATCHES, ROUNDS, BUDGET = (4, 8, 16), 8, 0.7


class WithMask(packed._WithinImages):
    """One attention over the row, where nobody sees another image."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.scaled_dot_product_attention or args[0].shape[-2] != self.total:
            return function(*args, **(kwargs or {}))
        self.asked = True
        image = torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))
        mask = torch.zeros(self.total, self.total).masked_fill(image[:, None] != image[None], float("-inf"))
        given = (kwargs or {}).get("attn_mask")
        return function(*args[:3], attn_mask=mask if given is None else mask + given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/packing.json"))
    arguments = parser.parse_args()
    model = methods.MODELS["dinov2"][0](arguments.weights)
    preprocessing = preprocessing_of(model)
    plan = find_plan(model, sample(None, preprocessing, 24)[0], BUDGET, adaptive=True).config
    with methods.scenes_of(arguments.photos) as folder:
        photos = sample(folder, preprocessing, max(BATCHES))[0]
    rows = []
    for batch in BATCHES:
        row = {"batch": batch, **measure(model, plan, photos[:batch])}
        rows.append(row)
        print(row, flush=True)
    record.write(arguments.out, {"plan": plan.model_dump(), "rows": rows})


def measure(model, plan, images) -> dict:
    """How many times as fast as the original each way is: medians over rounds."""
    rows, each = (convert(copy.deepcopy(model), plan) for _ in range(2))
    for block in selective_blocks(each):
        block.selection.attends_elsewhere = True
    patches = images.shape[-1] // 14 * (images.shape[-2] // 14)
    with torch.inference_mode():
        run(rows, images)
    most = [(max(choice.packed.lengths) - 1) / patches for choice in last_choices(rows).values()]
    fixed = {"score": plan.score, "bypass": plan.bypass, "layers": plan.layers, "ratio": most}
    padded = convert(copy.deepcopy(model), **fixed)

    def masked():
        with mock.patch.object(packed, "_WithinImages", WithMask):
            run(rows, images)

    def contained():
        within = packed._WithinImages
        with mock.patch.object(packed, "_WithinImages", lambda lengths, _: within(lengths, patches + 1)):
            run(rows, images)

    ways = {
        "original": lambda: run(model, images),
        "row": lambda: run(rows, images),
        "images": lambda: run(each, images),
        "containers": contained,
        "mask": masked,
        "padded": lambda: run(padded, images),
    }
    with pinned(1), torch.inference_mode():
        timings = interleave(ways, ROUNDS)
    return {
        name: Timing(timing.speedups(timings["original"])).median
        for name, timing in timings.items()
        if name != "original"
    }


if __name__ == "__main__":
    main()
