import copy

import pytest
import torch
from conftest import FAMILIES, lively

from tosa_convert import convert
from tosa_convert.distillation import SelectorDistillation, divergence
from tosa_convert.scores.attention import AttentionSelector
from tosa_convert.selective import selective_blocks


def maps(heads=3, tokens=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, heads, tokens, 8, generator=generator), torch.randn(2, heads, tokens, 8, generator=generator)


@pytest.mark.parametrize("tokens", [5, 20, 197])
def test_predicted_maps_are_distributions_at_any_size(tokens):
    predicted = AttentionSelector(3)(*maps(tokens=tokens))
    log_maps = AttentionSelector(3).log_maps(*maps(tokens=tokens))
    assert predicted.shape == (2, 3, tokens)
    assert log_maps.shape == (2, 3, tokens, tokens)
    assert torch.allclose(log_maps.exp().sum(-1), torch.ones(2, 3, tokens), atol=1e-4)
    assert torch.allclose(predicted.sum(-1), torch.full((2, 3), float(tokens)), atol=1e-2)


def test_scores_are_the_column_sums_of_the_predicted_maps():
    selector = AttentionSelector(3)
    column_sums = selector.log_maps(*maps()).exp().sum(2)
    assert torch.allclose(selector(*maps()), column_sums, atol=1e-5)


def test_each_query_row_is_predicted_on_its_own():
    selector, (queries, keys) = AttentionSelector(3), maps()
    everything = selector.log_maps(queries, keys)
    queries[:, :, 7] += 1
    changed = (selector.log_maps(queries, keys) - everything).abs().amax((0, 1, 3)) > 1e-6
    assert changed.nonzero().flatten().tolist() == [7]


def test_it_starts_close_to_the_map_it_listens_to():
    queries, keys = maps()
    listened = (queries @ keys.transpose(-2, -1) / 8**0.5).softmax(-1)
    correlation = torch.corrcoef(
        torch.stack([AttentionSelector(3)(queries, keys).flatten(), listened.sum(2).flatten()])
    )
    assert correlation[0, 1] > 0.8


def test_divergence_is_zero_for_equal_maps_and_sums_over_heads():
    first, second = (
        torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(s)).log_softmax(-1) for s in (0, 1)
    )
    assert divergence(first, first) == 0
    ours, theirs = (torch.distributions.Categorical(logits=maps) for maps in (first, second))
    by_hand = torch.distributions.kl_divergence(ours, theirs).sum(1).mean()
    assert torch.allclose(divergence(first, second), by_hand, atol=1e-5)


@pytest.mark.parametrize("kl", ["forward", "reverse"])
@pytest.mark.parametrize("name", ["timm vit", "hf Dinov2Model"])
def test_distillation_lowers_the_loss_and_leaves_the_backbone(name, kl, images):
    model = convert(lively(FAMILIES[name]()), layers=[2, 4, 6], ratio=0.5)
    before = copy.deepcopy(model.state_dict())
    objective = SelectorDistillation(model, kl)
    optimizer = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(15):
        loss = objective(images)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    objective.close()
    assert losses[-1] < 0.9 * losses[0]
    for key, value in model.state_dict().items():
        same = torch.equal(value, before[key])
        assert same != (".selector." in key), key
    assert all(block.selection.active for block in selective_blocks(model))


def test_the_target_is_the_real_attention_of_the_selective_layer(images):
    """With a selector that outputs the selective layer's own map, the loss is zero."""
    model = convert(lively(FAMILIES["timm vit"]()), layers=[3], ratio=0.5)
    objective = SelectorDistillation(model)
    block = selective_blocks(model)[0]
    caught = {}
    block.attn.qkv.register_forward_hook(lambda module, inputs, output: caught.update(qkv=output))

    def cheat(queries, keys):
        q, k, _ = (part.unflatten(-1, (3, 16)).transpose(1, 2) for part in caught["qkv"].chunk(3, dim=-1))
        return (q @ k.transpose(-2, -1) / 4).log_softmax(-1)

    block.selector.log_maps = cheat
    figures = objective(images)
    objective.close()
    assert figures["loss"].abs() < 1e-5
    assert figures["overlap"] == 1


def test_two_seeds_give_two_selectors_and_one_seed_the_same():
    states = [
        selective_blocks(convert(FAMILIES["timm vit"](), layers=[2], seed=seed))[0].selector.widen.weight
        for seed in (0, 0, 1)
    ]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
