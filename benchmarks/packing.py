"""Ways to run a batch whose images keep different numbers of tokens: their speed on the real ViT-S/14.

    python benchmarks/packing.py dinov2/timm.safetensors --photos /usr/share/doc/opencv-doc/examples/data
    python benchmarks/packing.py dinov2/timm.safetensors --photos /usr/share/doc/opencv-doc/examples/data \\
        --device cuda --batches 4 16 64 256 --out benchmarks/results/packing_gpu.json

``by image`` is a row, the attention of each image by a call of its own, which is what the project does on a CPU; ``at
once`` is the row with one call of attention that is padded to the longest image, which is what it does on a GPU.
``nested`` is the row with one call on nested tensors, ``flex`` (on a GPU) with one of FlexAttention, which leaves out
what lies between images. ``images`` runs the blocks image by image.
``containers`` packs images into containers as long as a whole image, with masks (Select and Pack). ``groups`` pads the
attention of four images of similar length to the longest of them. ``mask`` runs one row with one attention over all of
it and a block-diagonal mask. ``padded`` is the plan with numbers at the most tokens that an image of the batch keeps in
each layer, which is what padding would cost.
"""

import argparse
import copy
import functools
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import methods
import record
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tosa_convert import convert, load
from tosa_convert.base.timing import Timing, interleave, pinned
from tosa_convert.data.sampling import sample
from tosa_convert.models.adapter import run
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.planning.plan import find_plan
from tosa_convert.selective import packed
from tosa_convert.selective.row_attention import attend_at_once, attend_by_image
from tosa_convert.selective.selection import last_choices, selective_blocks

BUDGET = 0.7
TOGETHER = 4
EACH_AT_MOST = 16  # images, where a way makes a call for each
ONE_MASK_AT_MOST = 2**14  # tokens, of which every pair has a place in the mask


def masked_attention(query, key, value, lengths: tuple[int, ...], mask=None, **options):
    """:func:`tosa_convert.selective.row_attention.attend` by one call over the row, where nobody sees another image."""
    image = torch.repeat_interleave(torch.tensor(lengths, device=query.device))
    apart = query.new_zeros(len(image), len(image)).masked_fill(image[:, None] != image[None], float("-inf"))
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=apart if mask is None else apart + mask, **options
    )


def grouped_attention(query, key, value, lengths: tuple[int, ...], mask=None, **options):
    """The same for :data:`TOGETHER` images of similar length at once, padded to the longest of them."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    parts = [each.split(lengths, dim=-2) for each in (query, key, value)]
    masks = [None] * len(lengths) if mask is None else mask.split(lengths, dim=-1)
    found: dict[int, torch.Tensor] = {}
    for begin in range(0, len(order), TOGETHER):
        group = order[begin : begin + TOGETHER]
        longest = lengths[group[-1]]
        padded = [torch.cat([F.pad(part[at], (0, 0, 0, longest - lengths[at])) for at in group]) for part in parts]
        seen = [query.new_zeros(1, 1, 1, lengths[at]) if masks[at] is None else masks[at] for at in group]
        apart = torch.cat(
            [F.pad(each, (0, longest - lengths[at]), value=float("-inf")) for at, each in zip(group, seen, strict=True)]
        )
        together = F.scaled_dot_product_attention(*padded, attn_mask=apart, **options)
        found.update({at: together[place : place + 1, :, : lengths[at]] for place, at in enumerate(group)})
    return torch.cat([found[at] for at in range(len(lengths))], dim=-2)


def nested_attention(query, key, value, lengths: tuple[int, ...], mask=None, **options):
    """:func:`tosa_convert.selective.row_attention.attend` by one call on nested tensors, which take no mask: what is
    added to the logits of a key is worked into the product, as one more channel; fused kernels want 8 of them."""
    channels, scale, device = value.shape[-1], query.shape[-1] ** -0.5, query.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    tokens = [each[0].transpose(0, 1).to(kind) for each in (query, key, value)]  # (K, H, C)
    if mask is not None:
        added = (mask[0].permute(2, 0, 1).expand(-1, query.shape[1], -1) / scale).to(kind)
        more = (torch.ones_like(added), added, torch.zeros_like(added))
        tokens = [F.pad(torch.cat(pair, dim=-1), (0, 7)) for pair in zip(tokens, more, strict=True)]
    offsets = torch.tensor([0, *lengths], device=query.device).cumsum(0)
    known = {"min_seqlen": min(lengths), "max_seqlen": max(lengths)}
    nested = [torch.nested.nested_tensor_from_jagged(each.contiguous(), offsets, **known) for each in tokens]
    found = F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in nested), scale=scale, **options)
    return found.transpose(1, 2).values()[..., :channels].transpose(0, 1)[None]


def flexible_attention(query, key, value, lengths: tuple[int, ...], mask=None, **options):
    """The same by FlexAttention, whose mask is of blocks of tokens; compiled on a GPU."""
    on_gpu, total = query.is_cuda, query.shape[-2]
    image = torch.repeat_interleave(torch.tensor(lengths, device=query.device))
    together = create_block_mask(
        lambda batch, head, asked, seen: image[asked] == image[seen], None, None, total, total, query.device
    )
    added = None if mask is None else lambda logit, batch, head, asked, seen: logit + mask[0, 0, 0, seen]
    attention = compiled() if on_gpu else flex_attention
    return attention(query, key, value, score_mod=added, block_mask=together)


@functools.cache
def compiled():
    return torch.compile(flex_attention, dynamic=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--photos", type=Path, help="folder to take scenes from; by default crops of the built-in ones")
    parser.add_argument("--classes", type=int, help="of a classifier's head")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batches", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/packing.json"))
    arguments = parser.parse_args()
    options = {"img_size": arguments.size, "num_classes": arguments.classes}
    model = load("vit_small_patch14_dinov2", checkpoint=arguments.weights, **options).to(arguments.device)
    preprocessing = preprocessing_of(model)
    seen = sample(None, preprocessing, 24)[0].to(arguments.device)
    plan = find_plan(model, seen, BUDGET, adaptive=True).config
    with methods.scenes_of(arguments.photos) if arguments.photos else nullcontext(None) as folder:
        photos = sample(folder, preprocessing, max(arguments.batches))[0].to(arguments.device)
    rows = []
    for batch in arguments.batches:
        row = {"batch": batch, **measure(model, plan, photos[:batch], arguments.rounds)}
        rows.append(row)
        print(row, flush=True)
        record.write(arguments.out, {"plan": plan.model_dump(), "rows": rows}, arguments.device)


def measure(model, plan, images, rounds: int) -> dict:
    """How many times as fast as the original each way is: medians over rounds; on a GPU in bf16."""
    rows, each = (convert(copy.deepcopy(model), plan) for _ in range(2))
    for block in selective_blocks(each):
        block.selection.attends_elsewhere = True
    patches = images.shape[-1] // 14 * (images.shape[-2] // 14)
    with torch.no_grad():
        run(rows, images)
    most = [(max(choice.packed.lengths) - 1) / patches for choice in last_choices(rows).values()]
    fixed = {"score": plan.score, "bypass": plan.bypass, "layers": plan.layers, "ratio": most}
    padded = convert(copy.deepcopy(model), **fixed)

    within = packed._WithinImages

    def patched(name: str, by):
        def way():
            with mock.patch.object(packed, name, by):
                run(rows, images)

        return way

    ways = {
        "original": lambda: run(model, images),
        "by image": patched("attend", attend_by_image),
        "at once": patched("attend", attend_at_once),
        "nested": patched("attend", nested_attention),
        "images": lambda: run(each, images),
        "containers": patched("_WithinImages", lambda lengths, padding, _: within(lengths, padding, patches + 1)),
        "groups": patched("attend", grouped_attention),
        "mask": patched("attend", masked_attention),
        "padded": lambda: run(padded, images),
    }
    if images.is_cuda:
        ways["flex"] = patched("attend", flexible_attention)
    if len(images) * patches > ONE_MASK_AT_MOST:
        del ways["mask"]
    if len(images) > EACH_AT_MOST:
        del ways["by image"], ways["images"], ways["groups"]
    on_gpu = torch.autocast("cuda", torch.bfloat16) if images.is_cuda else nullcontext()
    with pinned(1), torch.no_grad(), on_gpu:
        timings = interleave({name: finished(way) if images.is_cuda else way for name, way in ways.items()}, rounds)
    return {
        name: Timing(timing.speedups(timings["original"])).median
        for name, timing in timings.items()
        if name != "original"
    }


def finished(way):
    """On a GPU, which goes on when the call has returned."""

    def waiting():
        way()
        torch.cuda.synchronize()

    return waiting


if __name__ == "__main__":
    main()
