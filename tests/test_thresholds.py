"""Thresholds: as many tokens as each image needs, packed in a row."""

import copy
from unittest import mock

import pytest
import torch
from conftest import LAYERS, lively
from families import CORE, FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from references import close, first, mask_others
from test_bypasses import AROUND
from threshold_models import at_the_middle, built
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tosa_convert import TosaError, UsageError, convert
from tosa_convert.export.onnx import export_onnx
from tosa_convert.methods.packing import by_image, choose_above, match_in_row
from tosa_convert.methods.parts import every
from tosa_convert.methods.score import Acts, Score
from tosa_convert.models.adapter import adapter_of, run
from tosa_convert.selective import packed
from tosa_convert.selective.containers import Containers, packed_into
from tosa_convert.selective.conversion import original
from tosa_convert.selective.row_attention import attend_at_once, attend_by_image
from tosa_convert.selective.selection import chosen_tokens, selective_blocks

ATTEND = Containers.attend
SCORES = [name for name, part in every(Score).items() if part.suits(Acts.AROUND)]


def photos(count: int = 4, side: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(3))


def counts(model: nn.Module) -> set[int]:
    return {len(tokens) for layer in chosen_tokens(model).values() for tokens in layer}


PADDED = mock.patch.object(packed, "_padding", return_value=5)


"""Rows are longer than their images."""
AT_ONCE = mock.patch.object(packed, "attend", attend_at_once)
"""Images of a row attend as on a GPU."""


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_equals_its_images_one_at_a_time(name):
    images = photos(3)
    converted = at_the_middle(built(name), images, bypass="merge")
    found = run(converted, images)
    assert len(counts(converted)) > 1, "images keep different numbers of tokens"
    turned = run(converted, images.flip(0))
    with PADDED:
        longer = run(converted, images)
    with AT_ONCE:
        together = run(converted, images)
    for output, value in found.items():
        alone = torch.cat([run(converted, image[None])[output] for image in images])
        assert close(value, alone), output
        assert close(value.flip(0), turned[output]), output
        assert close(value, longer[output]), output
        assert close(value, together[output]), output


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_skipped_tokens_are_masked_out_of_the_original(name):
    model, images = built(name), photos()
    converted = at_the_middle(copy.deepcopy(model), images, bypass="identity")
    found = run(converted, images)
    reference = copy.deepcopy(model)
    for layer, tokens in chosen_tokens(converted).items():
        longest = max(map(len, tokens))
        same = [torch.cat([each, each[:1].expand(longest - len(each))]) for each in tokens]
        mask_others(adapter_of(reference), layer, torch.stack(same))
    for output, value in run(reference, images).items():
        assert close(found[output], value), output


@pytest.mark.parametrize("bypass", AROUND)
@pytest.mark.parametrize("score", SCORES)
def test_every_score_takes_a_threshold(score, bypass):
    images, model = photos(), built("timm vit")
    layers = LAYERS if every(Score)[score].ordinary_before else [2, 3, 5]
    converted = at_the_middle(model, images, score=score, bypass=bypass, layers=layers)
    with torch.no_grad():
        together = first(run(converted, images))
        kept = [len(tokens) for tokens in chosen_tokens(converted)[layers[-1]]]
        alone = torch.cat([first(run(converted, image[None])) for image in images])
        with PADDED:
            longer = first(run(converted, images))
    assert close(together, alone)
    assert close(together, longer)
    assert max(kept) < 17, "some are skipped"


@pytest.mark.parametrize("segment", [1, 3])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_are_those_of_single_images(training, segment):
    images = photos()
    model = at_the_middle(built("timm vit"), images, bypass="merge", layers=[2, 3, 4], segment=segment)
    model.train(training)

    def gradients(batches) -> list[torch.Tensor]:
        model.zero_grad()
        for batch in batches:
            first(run(model, batch)).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    together, apart = gradients([images]), gradients(images.split(1))
    model.set_grad_checkpointing(True)
    again = gradients([images])
    with PADDED:
        longer = gradients([images])
    assert len(together) == len(apart) == len(again) == len(longer)
    for ours, theirs, recomputed, padded in zip(together, apart, again, longer, strict=True):
        assert torch.allclose(ours, padded, atol=1e-5 * theirs.abs().max().item())
        assert torch.allclose(ours, theirs, atol=1e-4 * theirs.abs().max().item())
        assert torch.allclose(ours, recomputed, atol=1e-5 * theirs.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("half", [False, True])
def test_half_precision_on_a_cpu_meets_few_lengths_of_rows(half):
    """Each new one is prepared anew, and kept."""
    images = photos(40)
    model = at_the_middle(built("timm vit"), images, bypass="identity")
    met = set()
    for block in selective_blocks(model):
        block.mlp.fc1.register_forward_hook(lambda module, inputs, output: met.add(output.shape[1]))
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        for count in range(30, 41):
            run(model, images[:count])
    assert all(length % (1 << length.bit_length() - 6) == 0 for length in met) == half
    assert max(met) > 256


def test_stochastic_depth_leaves_out_images_not_batches():
    images = photos(8)
    plain = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=6, num_heads=3)
    model = at_the_middle(lively(plain), images)
    from timm.layers import DropPath

    for block in selective_blocks(model):
        block.drop_path1, block.drop_path2 = DropPath(0.5), DropPath(0.5)
    model.train()
    torch.manual_seed(0)
    tokens: dict = {}
    block = selective_blocks(model)[0]
    block.register_forward_hook(lambda _, given, output: tokens.update(before=given[0], after=output))
    run(model, images)
    left_out = (tokens["after"] == tokens["before"]).all(2).all(1)
    assert 0 < left_out.sum() < len(images)


QUICK = ("timm vit",)


@torch.no_grad()
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in CORE]
)
def test_the_file_keeps_as_many_tokens_as_torch_does(name, tmp_path):
    images = photos()
    converted = at_the_middle(built(name), images, bypass="merge")
    check = export_onnx(converted, tmp_path)
    assert check.passed
    assert set(check.selected) == set(LAYERS)
    assert min(check.selected.values()) > 0.9


@given(
    seed=st.integers(0, 1000),
    batch=st.integers(1, 4),
    patches=st.integers(1, 12),
    prefix=st.integers(0, 2),
    most=st.none() | st.integers(1, 12),
    threshold=st.floats(-3, 3),
)
def test_a_choice_above_a_threshold(seed, batch, patches, prefix, most, threshold):
    scores = torch.randn(batch, prefix + patches, generator=torch.Generator().manual_seed(seed))
    most = patches if most is None else min(most, patches)
    choice = choose_above(scores, prefix, threshold, None if most == patches else most)
    everyone = torch.cat([choice.attended, choice.skipped], 1)[0]
    assert sorted(everyone.tolist()) == list(range(scores.numel())), "each token attends or is skipped"
    for values, tokens in zip(scores, by_image(choice), strict=True):
        assert tokens.tolist() == sorted(tokens.tolist())
        assert tokens[:prefix].tolist() == list(range(prefix))
        mine, own = tokens[prefix:], values[prefix:]
        assert 1 <= len(mine) <= most
        wanted = (own >= threshold).sum().clamp(1, most)
        assert len(mine) == wanted
        assert set(mine.tolist()) == set((own.argsort(descending=True)[:wanted] + prefix).tolist())


@given(seed=st.integers(0, 1000), batch=st.integers(1, 4), prefix=st.integers(0, 2))
def test_partners_are_the_nearest_of_the_same_image(seed, batch, prefix):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, prefix + 9, 5, generator=generator)
    choice = choose_above(torch.randn(batch, prefix + 9, generator=generator), prefix, 0.0, 9)
    choice = match_in_row(features, prefix, choice)
    flat, count = features.flatten(0, 1), prefix + 9
    for skipped, partner in zip(choice.skipped[0].tolist(), choice.partners[0].tolist(), strict=True):
        mine = [token for token in choice.attended[0].tolist() if token // count == skipped // count]
        mine = [token for token in mine if token % count >= prefix]
        nearest = min(mine, key=lambda token: (flat[token] - flat[skipped]).square().sum().item())
        assert choice.attended[0, partner] == nearest


@pytest.mark.parametrize("name", ["timm vit", "timm dinov2 registers"])
@pytest.mark.parametrize("container", [1, 24, 10**12])
@torch.no_grad()
def test_containers_give_what_images_give_by_themselves(name, container):
    images = photos(5)
    parts = {"score": "similarity", "bypass": "identity"}
    plain = at_the_middle(lively(FAMILIES[name]()), images, **parts)
    thresholds = [block.selection.threshold for block in selective_blocks(plain)]
    contained = convert(original(plain), layers=LAYERS, threshold=thresholds, container=container, **parts)
    assert len(counts(plain)) > 1
    asked = []
    with mock.patch.object(Containers, "attend", lambda *args, **more: asked.append(1) or ATTEND(*args, **more)):
        assert close(first(run(contained, images)), first(run(plain, images)))
        with PADDED:
            assert close(first(run(contained, images)), first(run(plain, images)))
    assert len(asked) == 2 * len(LAYERS)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 60))
def test_containers_hold_every_image_whole_and_no_more_than_fits(lengths, size):
    containers = packed_into(tuple(lengths), size)
    assert sorted(image for group in containers for image in group) == list(range(len(lengths)))
    size = max(size, *lengths)
    assert all(sum(lengths[image] for image in group) <= size for group in containers)
    assert sum(sum(lengths[image] for image in group) <= size / 2 for group in containers) <= 1  # they would share one


@given(
    st.integers(0, 999),
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.integers(1, 20),
    st.sampled_from([0, 1, 2]),
)
def test_images_of_a_row_attend_within_themselves(seed, lengths, size, kind):
    """With nothing added to the logits, of each key, or of each query and key and head."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    qkv = [torch.randn(1, 2, total, 4, generator=generator) for _ in range(3)]
    mask = [
        None,
        torch.randn(1, 1, 1, total, generator=generator),
        torch.randn(1, 2, total, total, generator=generator),
    ][kind]
    lengths = tuple(lengths)
    image = torch.repeat_interleave(torch.tensor(lengths))
    apart = torch.zeros(total, total).masked_fill(image[:, None] != image, float("-inf"))
    wanted = torch.nn.functional.scaled_dot_product_attention(*qkv, apart if mask is None else apart + mask)
    for found in (
        Containers(lengths, size, torch.device("cpu")).attend(*qkv, mask),
        attend_by_image(*qkv, lengths, mask),
        attend_at_once(*qkv, lengths, mask),
    ):
        assert torch.allclose(found, wanted, atol=1e-5)


def test_a_row_that_does_not_fit_says_how_long_it_is(monkeypatch):
    model = at_the_middle(built("timm vit"), photos(), bypass="identity")

    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(model.blocks[1].mlp, "forward", full)
    with pytest.raises(TosaError, match=r"4 images make a row of \d+ tokens of 48 channels.*--batch-size"):
        run(model, photos())


def test_no_image_loses_all_its_tokens():
    converted = convert(built("timm vit"), score="norm", threshold=1e9, layers=LAYERS)
    run(converted, photos())
    assert counts(converted) == {2}, "the class token and one patch"


def test_a_threshold_that_keeps_all_is_the_original(vit):
    images = photos(2, 28)[:, :1]
    wanted = first(run(vit, images))
    converted = convert(copy.deepcopy(vit), score="norm", bypass="merge", threshold=-1e9, layers=[2, 3])
    assert close(first(run(converted, images)), wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bypass": "drop", "score": "class_attention"}, "takes a number of tokens, not a threshold"),
        ({"bypass": "identity", "score": "attention", "selection": "per_head"}, "per_head takes .*; use shared"),
        ({"selection": "per_head"}, "takes a number of tokens"),
        ({"threshold": [1.0, 2.0], "layers": [2, 4, 6]}, "2 thresholds for 3 selective layers"),
        ({"threshold": [1.0, 2.0]}, "2 thresholds for layers that are not named"),
        ({"threshold": float("nan")}, "out of range"),
        ({"threshold": "high"}, "threshold"),
    ],
)
def test_thresholds_that_make_no_sense(options, message):
    with pytest.raises(UsageError, match=message):
        convert(built("timm vit"), **{"threshold": 1.0, **options})
