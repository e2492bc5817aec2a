"""The contract of surgery, walked over every family: equal at ratio 1.0, equal to a masked reference below it."""

import copy
import io
from math import ceil, prod

import pytest
import torch
from conftest import LAYERS, lively
from families import FAMILIES, MOSTLY_LONG
from references import close, first, mask_others, sizes_of
from torch import nn

from tosa_convert import convert, original
from tosa_convert.measure.macs import flops
from tosa_convert.methods.token_ops import gather_tokens
from tosa_convert.models.adapter import adapter_of, run
from tosa_convert.models.dense import DenseModel
from tosa_convert.models.subclassing import steer
from tosa_convert.selective.selection import chosen_tokens, selective_blocks


def options_of(model: nn.Module) -> list[str]:
    return ["shared", "per_head"] if adapter_of(model).own_heads else ["shared"]


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return lively(FAMILIES[name]())


@pytest.mark.parametrize("name", FAMILIES)
def test_ratio_one_equals_the_original(name, images):
    model = built(name)
    wanted, maps = run(model, images), features_of(model, images)
    for selection in options_of(model):
        converted = convert(copy.deepcopy(model), layers=LAYERS, ratio=1.0, selection=selection)
        for output, value in run(converted, images).items():
            assert close(value, wanted[output]), (selection, output)
        for ours, theirs in zip(features_of(converted, images), maps, strict=True):
            assert close(ours, theirs), selection


def features_of(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """All that the library gives beside the output: intermediate features, hidden states, tokens."""
    adapter = adapter_of(model)
    if isinstance(model, DenseModel):
        return [adapter.tokens(images)]
    if adapter.library == "transformers":
        return list(adapter.forward(**adapter.inputs(images), output_hidden_states=True).hidden_states)
    if adapter.forward is not model or not hasattr(model, "forward_intermediates"):
        return list(adapter.forward(images))
    last, maps = model.forward_intermediates(images, indices=[1, 3, 5])
    if hasattr(model, "get_intermediate_layers"):
        maps = [*maps, *model.get_intermediate_layers(images, n=[0, 2], return_prefix_tokens=False)]
    return [*maps, last, model.forward_features(images)]


@pytest.mark.parametrize("name", FAMILIES)
def test_features_keep_their_number_order_and_shape(name, images):
    model = built(name)
    wanted = [tuple(value.shape) for value in features_of(model, images)]
    outputs = {output: value.shape for output, value in run(model, images).items()}
    convert(model, layers=LAYERS, ratio=0.5)
    assert [tuple(value.shape) for value in features_of(model, images)] == wanted
    assert {output: value.shape for output, value in run(model, images).items()} == outputs


@pytest.mark.parametrize("name", FAMILIES)
def test_shared_selection_equals_the_masked_original(name):
    """Skipped tokens are masked out as keys of the original block, and restored behind it."""
    for size in sizes_of(model := built(name)):
        family = copy.deepcopy(model)
        adapter_of(family).resize(size)
        images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))
        converted = convert(copy.deepcopy(family), layers=LAYERS, ratio=0.5)
        found = run(converted, images)
        chosen = chosen_tokens(converted)
        reference = copy.deepcopy(family)
        for layer in LAYERS:
            mask_others(adapter_of(reference), layer, chosen[layer])
        for output, value in run(reference, images).items():
            assert close(found[output], value), (size, output)
        assert not torch.allclose(first(found), first(run(family, images)), atol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_token_of_size_two_counts_as_two_tokens(name, images):
    """Merging rests on it: a block on some tokens, one of them for two, is a block on these tokens with one twice."""
    model = built(name)
    adapter, caught = adapter_of(model), {}
    block = adapter.blocks[2]
    for module, method in adapter.steered(block):
        steer(module, method)
    handle = block.register_forward_pre_hook(
        lambda _, args, kwargs: caught.update(args=args, kwargs=kwargs), with_kwargs=True
    )
    run(model, images)
    handle.remove()
    entering, args, kwargs = adapter.entering(caught["args"], caught["kwargs"])
    tokens = adapter.taken(entering)
    places = torch.arange(adapter.prefix + 9).expand(len(images), -1)
    twice = torch.cat([places, places[:, -1:]], dim=1)
    forward = type(block).forward
    wanted = adapter.call(block, forward, gather_tokens(tokens, twice), tuple(args), kwargs, twice)
    sizes = torch.ones(places.shape).index_fill(1, torch.tensor([places.shape[1] - 1]), 2.0)
    found = adapter.call(block, forward, gather_tokens(tokens, places), tuple(args), kwargs, places, sizes)
    assert close(found, wanted[:, :-1])
    alone = adapter.call(block, forward, gather_tokens(tokens, places), tuple(args), kwargs, places)
    assert not torch.allclose(found, alone, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_state_of_a_converted_model_travels(name, images):
    """Keys of the backbone stay, and a state saved without code comes back to the same model."""
    model = built(name)
    before = set(model.state_dict())
    converted = convert(copy.deepcopy(model), layers=LAYERS, ratio=0.5)
    state = converted.state_dict()
    assert before < set(state)
    assert all(".selector." in key for key in set(state) - before)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = convert(copy.deepcopy(model), layers=LAYERS, ratio=0.5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(torch.load(file, weights_only=True))
    wanted = first(run(converted, images))
    assert torch.equal(first(run(other, images)), wanted)
    assert torch.equal(first(run(copy.deepcopy(converted), images)), wanted)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_reach_every_used_parameter_of_the_backbone(name, images):
    model = built(name)
    names = set(_gradients(model, images))
    converted = convert(model, layers=LAYERS, ratio=0.5)
    plain = _gradients(converted, images)
    assert set(plain) == names
    if checkpointing(converted):
        for parameter, gradient in _gradients(converted, images).items():
            assert close(gradient, plain[parameter]), parameter


def _gradients(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    torch.manual_seed(0)
    first(run(model, images)).square().mean().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.eval().zero_grad()
    return found


def checkpointing(model: nn.Module) -> bool:
    """Turn on gradient checkpointing, without re-entering autograd, where the library offers it."""
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(True)
    elif getattr(model, "supports_gradient_checkpointing", False):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        return False
    return True


@pytest.mark.parametrize("name", MOSTLY_LONG)
def test_multiply_adds_fall_as_predicted(name):
    """What is linear in the tokens falls to the share that attends, what is quadratic to its square."""
    model = built(name)
    counted = flops(convert(model, layers=LAYERS, ratio=0.5, score="similarity"), (32, 32))
    adapter = adapter_of(model)
    share = (adapter.prefix + 8) / (adapter.prefix + 16)
    for layer in counted.layers:
        left = (layer.macs - layer.selector) / layer.original
        if layer.layer in LAYERS:
            assert share**2 - 0.01 < left < share + 0.03, layer
        else:
            assert left == 1, layer


@pytest.mark.parametrize(
    "name",
    [
        "timm vit",
        "timm qk-norm",
        "timm eva02",
        "timm mixed rope",
        "timm grouped queries",
        "timm beit",
        "timm beit shared",
        "timm relpos",
        "hf BeitModel",
        "hf DPT",
        "hf Dinov2Model",
        "hf DINOv3ViTModel",
        "hf CLIPVisionModel",
    ],
)
def test_per_head_selection_equals_equation_four(name, images):
    """Eq. 4 spelt out: each head attends over its own tokens, its other tokens pass their slice through."""
    model = built(name)
    converted = convert(copy.deepcopy(model), layers=[2], ratio=0.5, selection="per_head")
    found = run(converted, images)
    chosen = chosen_tokens(converted)[2].reshape(len(images), 3, -1)
    adapter = adapter_of(model)
    attention = adapter.attention(adapter.blocks[1])

    def literal(tokens=None, **kwargs):
        tokens = kwargs.get("hidden_states", tokens)
        queries, keys, values = adapter.project(attention, tokens, kwargs)
        bias = adapter.bias(attention, kwargs)
        bias = torch.zeros(3, tokens.shape[1], tokens.shape[1]) if bias is None else bias.reshape(3, *bias.shape[-2:])
        heads = []
        for head in range(3):
            outputs = tokens[..., head * 16 : (head + 1) * 16].clone()
            for image, attended in enumerate(chosen[:, head]):
                q, k, v = (part[image, head, attended] for part in (queries, keys, values))
                logits = q @ k.T / 4 + bias[head][attended][:, attended]
                outputs[image, attended] = logits.softmax(-1) @ v
            heads.append(outputs)
        return adapter.finish(attention, torch.cat(heads, dim=-1), tokens)

    attention.forward = literal
    assert close(first(found), first(run(model, images)))
    assert len({tuple(sorted(row.tolist())) for row in chosen[0]}) > 1, "the heads should differ in what they choose"


def test_the_best_tokens_of_the_selector_attend(family, images):
    converted = convert(family, layers=[2], ratio=0.5)
    caught = {}
    selector = selective_blocks(converted)[0].selector
    selector.register_forward_hook(lambda module, inputs, output: caught.update(scores=output.sum(1)))
    run(converted, images)
    prefix = adapter_of(converted).prefix
    chosen = chosen_tokens(converted)[2]
    assert (chosen[:, :prefix] == torch.arange(prefix)).all()
    patches = caught["scores"][:, prefix:]
    assert chosen.shape[1] == prefix + -(-patches.shape[1] // 2)
    for scores, mine in zip(patches, chosen[:, prefix:] - prefix, strict=True):
        assert set(scores.topk(len(mine)).indices.tolist()) == set(mine.tolist())


def test_selective_layers_compute_their_own_tokens_only(family, images):
    """Every linear layer of a selective block sees prefix + K tokens, elsewhere all."""
    converted = convert(family, layers=LAYERS, ratio=0.5)
    adapter, seen = adapter_of(converted), {}
    for number, block in enumerate(adapter.blocks, start=1):
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(
                    lambda _, inputs, output, number=number: seen.setdefault(number, set()).add(output.shape[1])
                )
    run(converted, images)
    patches = prod(images.shape[-2:]) // prod(adapter.patch)
    for number, counts in seen.items():
        expected = ceil(0.5 * patches) if number in LAYERS else patches
        assert counts == {adapter.prefix + expected}, number
    assert set(seen) == set(range(1, len(adapter.blocks) + 1))


def test_images_do_not_depend_on_their_batch(family, images):
    converted = convert(family, layers=LAYERS, ratio=0.5)
    together = first(run(converted, images))
    alone = torch.cat([first(run(converted, image[None])) for image in images])
    assert close(together, alone)


def test_original_gives_back_the_unconverted_model(family, images):
    keys = set(family.state_dict())
    wanted = run(family, images)
    hooks = sum(len(module._forward_hooks) for module in family.modules())  # transformers has some of its own
    for selection in options_of(family):
        converted = convert(copy.deepcopy(family), layers=LAYERS, ratio=0.4, selection=selection)
        twin = original(converted)
        assert set(twin.state_dict()) == keys
        assert [type(module) for module in twin.modules()] == [type(module) for module in family.modules()]
        assert sum(len(module._forward_hooks) for module in twin.modules()) == hooks
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
