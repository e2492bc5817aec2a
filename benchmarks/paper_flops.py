"""What the paper's setting saves, counted: DeiT-Tiny at 224 px, layers 2, 4, 6, 8, 10.

    python benchmarks/paper_flops.py --out benchmarks/results/paper_flops.json

The paper (arXiv 2406.08816) reports 25.8 % at ratio 0.8. No weights are needed.
"""

import argparse
from itertools import product
from pathlib import Path

import record

from tosa_convert import ConvertConfig, convert, flops, load

LAYERS = [2, 4, 6, 8, 10]
RATIOS = (1.0, 0.8, 0.6, 0.5, 0.4, 0.395)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()
    rows = []
    for ratio, query_rows in product(RATIOS, ("all", ConvertConfig().rows)):
        model = convert(load("deit_tiny", pretrained=False), layers=LAYERS, ratio=ratio, rows=query_rows)
        cost = flops(model)
        rows.append(
            {
                "ratio": ratio,
                "query_rows": query_rows,
                "original": cost.original,
                "macs": cost.macs,
                "selectors": cost.selectors,
                "saved": round(cost.saved, 4),
                "saved_before_selectors": round(cost.saved_without_selectors, 4),
            }
        )
        print(rows[-1])
    record.write(arguments.out, {"model": "deit_tiny_patch16_224", "layers": LAYERS, "rows": rows})
