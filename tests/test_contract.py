"""The contract of surgery, walked over every family: equal at ratio 1.0, equal to a masked reference below it."""

import copy
from math import ceil, prod

import pytest
import torch
from conftest import FAMILIES, LAYERS, VARIANTS, lively
from torch import nn

from tosa_convert import convert, original
from tosa_convert.errors import UsageError
from tosa_convert.hosts import host_of, run
from tosa_convert.selective import chosen_tokens, selective_blocks


def first(outputs: dict) -> torch.Tensor:
    return next(iter(outputs.values()))


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """To 1e-5 of the largest value: a depth head with random weights makes millions."""
    return torch.allclose(found, wanted, atol=1e-5 * max(1.0, wanted.abs().max().item()))


EVERY = {**FAMILIES, **VARIANTS}


@pytest.mark.parametrize("selection", ["shared", "per_head"])
@pytest.mark.parametrize("name", EVERY)
def test_ratio_one_equals_the_original(name, images, selection):
    family = lively(EVERY[name]())
    wanted = run(family, images)
    converted = convert(copy.deepcopy(family), layers=LAYERS, ratio=1.0, selection=selection)
    for output, value in run(converted, images).items():
        assert close(value, wanted[output]), output


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("name", EVERY)
def test_shared_selection_equals_the_masked_original(name, size):
    """Skipped tokens are masked out as keys of the original block, and restored behind it."""
    family = lively(EVERY[name]())
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    converted = convert(copy.deepcopy(family), layers=LAYERS, ratio=0.5)
    found = run(converted, images)
    chosen = chosen_tokens(converted)
    reference = copy.deepcopy(family)
    for layer in LAYERS:
        _mask(host_of(reference), layer, chosen[layer])
    for output, value in run(reference, images).items():
        assert close(found[output], value), output
    assert not torch.allclose(first(found), first(run(family, images)), atol=1e-3)


def _mask(host, layer: int, chosen: torch.Tensor) -> None:
    block, library = host.blocks[layer - 1], host.library
    forward = block.forward

    def masked(tokens, *args, **kwargs):
        attends = torch.zeros(tokens.shape[:2], dtype=torch.bool).scatter(1, chosen, True)
        bias = torch.zeros(len(tokens), 1, 1, tokens.shape[1]).masked_fill(~attends[:, None, None], float("-inf"))
        bias = bias.expand(-1, -1, tokens.shape[1], -1)
        updated = forward(tokens, **{**kwargs, "attn_mask" if library == "timm" else "attention_mask": bias})
        return torch.where(attends[..., None], updated, tokens)

    block.forward = masked


@pytest.mark.parametrize(
    "name",
    [
        "timm vit",
        "timm qk-norm",
        "timm eva02",
        "timm mixed rope",
        "timm grouped queries",
        "hf Dinov2Model",
        "hf DINOv3ViTModel",
        "hf CLIPVisionModel",
    ],
)
def test_per_head_selection_equals_equation_four(name, images):
    """Eq. 4 spelt out: each head attends over its own tokens, its other tokens pass their slice through."""
    model = lively(EVERY[name]())
    converted = convert(copy.deepcopy(model), layers=[2], ratio=0.5, selection="per_head")
    found = run(converted, images)
    chosen = chosen_tokens(converted)[2].reshape(len(images), 3, -1)
    host = host_of(model)
    attention = host.attention(host.blocks[1])

    def literal(tokens=None, **kwargs):
        tokens = kwargs.get("hidden_states", tokens)
        queries, keys, values = host.project(attention, tokens, kwargs)
        heads = []
        for head in range(3):
            outputs = tokens[..., head * 16 : (head + 1) * 16].clone()
            for image, attended in enumerate(chosen[:, head]):
                q, k, v = (part[image, head, attended] for part in (queries, keys, values))
                outputs[image, attended] = (q @ k.T / 4).softmax(-1) @ v
            heads.append(outputs)
        return host.finish(attention, torch.cat(heads, dim=-1), tokens)

    attention.forward = literal
    assert torch.allclose(first(found), first(run(model, images)), atol=1e-5)
    assert len({tuple(sorted(row.tolist())) for row in chosen[0]}) > 1, "the heads should differ in what they choose"


def test_the_best_tokens_of_the_selector_attend(family, images):
    converted = convert(family, layers=[2], ratio=0.5)
    caught = {}
    selector = selective_blocks(converted)[0].selector
    selector.register_forward_hook(lambda module, inputs, output: caught.update(scores=output.sum(1)))
    run(converted, images)
    prefix = host_of(converted).prefix
    chosen = chosen_tokens(converted)[2]
    assert (chosen[:, :prefix] == torch.arange(prefix)).all()
    patches = caught["scores"][:, prefix:]
    assert chosen.shape[1] == prefix + -(-patches.shape[1] // 2)
    for scores, mine in zip(patches, chosen[:, prefix:] - prefix, strict=True):
        assert set(scores.topk(len(mine)).indices.tolist()) == set(mine.tolist())


def test_selective_layers_compute_their_own_tokens_only(family, images):
    """Every linear layer of a selective block sees prefix + K tokens, elsewhere all."""
    converted = convert(family, layers=LAYERS, ratio=0.5)
    host, seen = host_of(converted), {}
    for number, block in enumerate(host.blocks, start=1):
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(
                    lambda _, inputs, output, number=number: seen.setdefault(number, set()).add(output.shape[1])
                )
    run(converted, images)
    patches = prod(images.shape[-2:]) // prod(host.patch)
    for number, counts in seen.items():
        expected = ceil(0.5 * patches) if number in LAYERS else patches
        assert counts == {host.prefix + expected}, number
    assert set(seen) == set(range(1, len(host.blocks) + 1))


def test_images_do_not_depend_on_their_batch(family, images):
    converted = convert(family, layers=LAYERS, ratio=0.5)
    together = first(run(converted, images))
    alone = torch.cat([first(run(converted, image[None])) for image in images])
    assert torch.allclose(together, alone, atol=1e-5)


def test_backbone_keys_stay_and_selectors_are_added(family):
    before = set(family.state_dict())
    kind = type(family)
    after = set(convert(family, layers=LAYERS).state_dict())
    assert before < after
    assert all(".selector." in key for key in after - before)
    assert type(family) is kind


def test_original_gives_back_the_unconverted_model(family, images):
    keys = set(family.state_dict())
    wanted = run(family, images)
    for selection in ("shared", "per_head"):
        converted = convert(copy.deepcopy(family), layers=LAYERS, ratio=0.4, selection=selection)
        twin = original(converted)
        assert set(twin.state_dict()) == keys
        assert [type(module) for module in twin.modules()] == [type(module) for module in family.modules()]
        assert not any(module._forward_hooks for module in twin.modules())
        assert torch.equal(first(run(twin, images)), first(wanted))
        theirs = {parameter.data_ptr() for parameter in converted.parameters()}
        assert not theirs & {parameter.data_ptr() for parameter in twin.parameters()}


def test_a_deep_copy_listens_to_itself(family, images):
    converted = convert(family, layers=LAYERS, ratio=0.5)
    wanted = first(run(converted, images))
    twin = copy.deepcopy(converted)
    run(converted, torch.zeros_like(images))
    assert torch.equal(first(run(twin, images)), wanted)
    for block, other in zip(selective_blocks(converted), selective_blocks(twin), strict=True):
        assert block.selection is not other.selection


def test_gradients_reach_every_used_parameter_of_the_backbone(family, images):
    names = {name for name, value in _gradients(family, images).items() if value}
    converted = convert(family, layers=LAYERS, ratio=0.5)
    found = {name for name, value in _gradients(converted, images).items() if value}
    assert found == names


def _gradients(model: nn.Module, images: torch.Tensor) -> dict[str, bool]:
    model.train().zero_grad()
    first(run(model, images)).square().sum().backward()
    found = {name: parameter.grad is not None for name, parameter in model.named_parameters()}
    model.eval().zero_grad()
    return found


def test_hidden_states_keep_their_number_and_shape(images):
    model = lively(FAMILIES["hf Dinov2Model"]())
    wanted = model(images, output_hidden_states=True).hidden_states
    convert(model, layers=LAYERS, ratio=1.0)
    found = model(images, output_hidden_states=True).hidden_states
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_intermediate_features_come_out_whole(images):
    model = lively(FAMILIES["timm vit"]())
    convert(model, layers=LAYERS, ratio=0.5)
    maps = model.forward_intermediates(images, indices=[1, 3, 5], intermediates_only=True)
    assert [tuple(value.shape) for value in maps] == [(3, 48, 4, 4)] * 3


def test_a_mask_is_refused_rather_than_ignored(images):
    from tosa_convert import TosaError

    model = convert(lively(FAMILIES["timm vit"]()), layers=[2], ratio=0.5)
    with pytest.raises(TosaError, match="mask"):
        model(images, attn_mask=torch.zeros(1, 1, 17, 17))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [1]}, "layer 1 cannot be selective"),
        ({"layers": [0]}, "counted from 1"),
        ({"layers": [7]}, "layers 1 to 6"),
        ({"layers": [2, 3]}, "neighbours"),
        ({"layers": [2, 2]}, "twice"),
        ({"layers": []}, "at least one"),
        ({"ratio": 0}, "out of range"),
        ({"ratio": 1.5}, "out of range"),
        ({"layers": [2, 4], "ratio": [0.5]}, "1 ratios for 2"),
        ({"ratio": [0.5, 0.5, 0.5]}, "3 ratios for 2"),
        ({"kernel": 2}, "odd"),
        ({"layrs": [2]}, "layrs"),
    ],
)
def test_impossible_options_are_refused_and_leave_the_model_alone(options, message, images):
    check_refusal(options, message, images)


def check_refusal(options, message, images):
    model = lively(FAMILIES["timm vit"]())
    wanted = model(images)
    with pytest.raises(UsageError, match=message):
        convert(model, **options)
    assert not selective_blocks(model)
    assert torch.equal(model(images), wanted)


def test_converting_twice_is_refused():
    model = convert(FAMILIES["timm vit"](), layers=[2])
    with pytest.raises(UsageError, match="converted already"):
        convert(model, layers=[4])


def test_ratios_follow_their_layers_in_any_order(images):
    model = convert(FAMILIES["timm vit"](), layers=[6, 2], ratio=[0.25, 0.75])
    model(images)
    counts = {layer: positions.shape[1] - 1 for layer, positions in chosen_tokens(model).items()}
    assert counts == {2: 12, 6: 4}
