"""MCTF with the values of fused tokens as they are here, the means of all tokens' values, and as in its authors' code,
made anew from the fused tokens: what the two keep of a model, without training.

    python benchmarks/mctf_values.py                                        the quickstart's model
    python benchmarks/mctf_values.py --dinov2 dinov2/timm.safetensors       and a real ViT-S/14, on built-in photos

The quickstart's model on its 4,000 test images (top-1), the ViT-S/14 by the cosine of its tokens to the original's. Not
part of the package, and only for timm's ViTs with one projection of queries, keys and values.
"""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import record
import torch
import torch.nn.functional as F
from torch import nn

from tosa_convert import evaluate, load
from tosa_convert.methods.token_ops import gather_tokens, stand_ins
from tosa_convert.models.subclassing import answered
from tosa_convert.planning.budget import at_budget
from tosa_convert.selective import look_ahead, reducing_block
from tosa_convert.workflows.quickstart import _unpack

BUDGETS = (0.8, 0.7, 0.6, 0.5)
MCTF, DEEPER = "mctf", "multi_criteria/pool/geometric"
LOWEST = 0.7
"""What MCTF's own schedule comes down to; below, the same share is gone in each layer."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dinov2", type=Path, help="as real_dinov2.py writes it")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/mctf_values.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        _unpack(Path(place))
        rows = rows_of("quickstart", load("quickstart"), Path(place) / "test")
    if arguments.dinov2:
        model = load("vit_small_patch14_dinov2", checkpoint=arguments.dinov2, img_size=224)
        rows += rows_of("ViT-S/14", model, None)
    record.write(arguments.out, {"rows": rows})


def rows_of(name: str, base: nn.Module, data: Path | None) -> list[dict]:
    rows = []
    for budget in BUDGETS:
        model = at_budget(base, MCTF if budget >= LOWEST else DEEPER, budget)
        means = measured(base, model, data)
        with values_anew():
            anew = measured(base, model, data)
        rows.append({"model": name, "budget": budget, "means": means, "anew": anew})
        print(rows[-1], flush=True)
    return rows


def measured(base: nn.Module, model: nn.Module, data: Path | None) -> dict[str, float]:
    return evaluate({"original": base, "mctf": model}, data, reference="original")["models"]["mctf"]


@contextmanager
def values_anew() -> Iterator[None]:
    """Within this block fused tokens have values of their own."""
    with mock.patch.object(reducing_block, "run_fused", run_with_values_anew):
        yield


def run_with_values_anew(adapter, block, run, ahead, choice, shares, tokens) -> torch.Tensor:
    """In place of :func:`tosa_convert.selective.look_ahead.run_fused`."""
    attention = adapter.attention(block)

    def known(normed, *args, **kwargs):
        width = normed.shape[-1]
        bias = None if attention.qkv.bias is None else attention.qkv.bias[-width:]
        values = F.linear(normed, attention.qkv.weight[-width:], bias)
        each = gather_tokens(values, stand_ins(choice)).unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
        found = (ahead.weights @ each).transpose(1, 2).flatten(2)
        return adapter.finish(attention, look_ahead._means(choice, shares, found), normed)

    with answered(attention, known):
        return run(tokens)


if __name__ == "__main__":
    main()
