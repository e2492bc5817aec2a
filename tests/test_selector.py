import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES, lively
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tosa_convert import convert
from tosa_convert.methods.score import Acts, Site, View
from tosa_convert.methods.scores.attention import (
    ROWS_LEARNT_AT_ONCE,
    AttentionSelector,
    divergence,
    with_gradient_now,
)
from tosa_convert.methods.token_ops import spread_rows
from tosa_convert.models.adapter import run
from tosa_convert.selective.selection import all_tokens, selective_blocks
from tosa_convert.training.distillation import SelectorDistillation


def selector_of(heads: int, **options) -> AttentionSelector:
    """As a conversion makes it, for a model with one prefix token."""
    selector = AttentionSelector(**options)
    selector.setup(Site(layer=2, heads=heads, prefix=1, width=48, acts=Acts.AROUND, seed=0))
    return selector


def scores_of(selector: AttentionSelector, read: torch.Tensor) -> torch.Tensor:
    return selector(View(steps=5000, patches=read.shape[-1] - 1, grid=None, reading=read))


def projections(heads=3, tokens=20, seed=0):
    """Queries and keys."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, heads, tokens, 8, generator=generator), torch.randn(2, heads, tokens, 8, generator=generator)


def maps(**options):
    """All rows of QKᵀ / √D, (H, B, N, N)."""
    queries, keys = projections(**options)
    return (queries @ keys.transpose(-2, -1) / 8**0.5).transpose(0, 1)


@given(
    heads=st.integers(1, 4),
    batch=st.integers(1, 3),
    rows=st.integers(1, 5),
    tokens=st.integers(1, 12),
    kernel=st.sampled_from([1, 3, 5]),
    hidden=st.integers(1, 9),
)
def test_the_selector_is_two_convolutions_along_the_keys(heads, batch, rows, tokens, kernel, hidden):
    """One query row of one image at a time, in torch's own convolutions; and the form for export is the same."""
    selector = selector_of(heads, hidden=hidden, kernel=kernel).double()
    read = torch.randn(heads, batch, rows, tokens, dtype=torch.double)
    found = selector.logits(read)
    for image, row in itertools.product(range(batch), range(rows)):
        line = F.pad(read[:, image, row][None], (kernel - 1, kernel - 1))
        hidden_line = F.conv1d(line, selector.widen.weight, selector.widen.bias).relu()
        wanted = F.conv1d(hidden_line, selector.narrow.weight)[0]
        assert torch.allclose(found[:, image, row], wanted, atol=1e-9)
    assert torch.allclose(selector._as_convolutions(read), found, atol=1e-9)


@pytest.mark.parametrize("rows", ["all", 8])
def test_it_reads_rows_of_the_scaled_product(rows):
    queries, keys = projections(tokens=60)
    read = selector_of(3, rows=rows).read
    chosen = slice(None) if rows == "all" else spread_rows(60, 1, 8)
    assert torch.allclose(read(queries, keys), maps(tokens=60)[:, :, chosen], atol=1e-5)


@pytest.mark.parametrize("tokens", [5, 20, 197])
def test_predicted_maps_are_distributions_at_any_size(tokens):
    predicted = scores_of(selector_of(3), maps(tokens=tokens))
    log_maps = selector_of(3).log_maps(maps(tokens=tokens))
    assert predicted.shape == (2, 3, tokens)
    assert log_maps.shape == (3, 2, tokens, tokens)
    assert torch.allclose(log_maps.exp().sum(-1), torch.ones(3, 2, tokens), atol=1e-4)
    assert torch.allclose(predicted.sum(-1), torch.full((2, 3), float(tokens)), atol=1e-2)


def test_scores_are_the_column_sums_of_the_predicted_maps():
    selector = selector_of(3)
    column_sums = selector.log_maps(maps()).exp().sum(2).transpose(0, 1)
    assert torch.allclose(scores_of(selector, maps()), column_sums, atol=1e-5)


def test_each_query_row_is_predicted_on_its_own():
    selector, read = selector_of(3), maps()
    everything = selector.log_maps(read)
    read[:, :, 7] += torch.randn(20)
    changed = (selector.log_maps(read) - everything).abs().amax((0, 1, 3)) > 1e-6
    assert changed.nonzero().flatten().tolist() == [7]


def test_it_starts_close_to_the_map_it_listens_to():
    selector, read = selector_of(3), maps()
    listened = read.softmax(-1).sum(2).transpose(0, 1)
    correlation = torch.corrcoef(torch.stack([scores_of(selector, read).flatten(), listened.flatten()]))
    assert correlation[0, 1] > 0.8


def test_divergence_is_zero_for_equal_maps_and_sums_over_heads():
    first, second = (
        torch.randn(3, 2, 4, 6, generator=torch.Generator().manual_seed(s)).log_softmax(-1) for s in (0, 1)
    )
    assert divergence(first, first) == 0
    ours, theirs = (torch.distributions.Categorical(logits=maps) for maps in (first, second))
    by_hand = torch.distributions.kl_divergence(ours, theirs).sum(0).mean()
    assert torch.allclose(divergence(first, second), by_hand, atol=1e-5)


@pytest.mark.parametrize("kl", ["forward", "reverse"])
@pytest.mark.parametrize("name", ["timm vit", "hf Dinov2Model"])
def test_distillation_lowers_the_loss_and_leaves_the_backbone(name, kl, images):
    model = convert(lively(FAMILIES[name]()), layers=[2, 4, 6], ratio=0.5)
    before = copy.deepcopy(model.state_dict())
    objective = SelectorDistillation(model, kl=kl)
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
    objective = SelectorDistillation(model, kl="forward")
    block = selective_blocks(model)[0]
    caught = {}
    handle = block.attn.qkv.register_forward_hook(lambda module, inputs, output: caught.update(qkv=output))
    with torch.no_grad(), all_tokens(model):
        run(model, images)
    handle.remove()
    q, k, _ = (part.unflatten(-1, (3, 16)).transpose(1, 2) for part in caught["qkv"].chunk(3, dim=-1))
    real = (q @ k.transpose(-2, -1) / 4).log_softmax(-1).transpose(0, 1)
    weights = list(block.selector.parameters())
    portions = iter(real.split(ROWS_LEARNT_AT_ONCE, 2))
    block.selector.log_maps = lambda read: next(portions) + 0 * sum(weight.sum() for weight in weights)
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


def test_a_few_rows_give_the_column_sums_over_those_rows():
    queries, keys = projections(tokens=60)
    everything = selector_of(3, rows="all")
    few = selector_of(3, rows=8)
    few.load_state_dict(everything.state_dict())
    rows = spread_rows(60, 1, 8)
    wanted = everything.log_maps(maps(tokens=60))[:, :, rows].exp().sum(2).transpose(0, 1)
    scores = scores_of(few, few.read(queries, keys))
    assert torch.allclose(scores, wanted, atol=1e-5)
    assert not torch.allclose(scores, scores_of(everything, everything.read(queries, keys)), atol=1e-1)


def test_as_many_rows_as_tokens_are_all_rows():
    queries, keys = projections(tokens=20)
    everything, many = (selector_of(3, rows=rows).read for rows in ("all", 20))
    assert torch.equal(many(queries, keys), everything(queries, keys))


class LargestTensor(TorchDispatchMode):
    """Notes the largest number of elements that any operator gives back."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for value in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return found


@pytest.mark.parametrize("stage", ["inference", "distillation"])
@pytest.mark.parametrize(("rows", "builds_it"), [(8, False), ("all", True)])
@pytest.mark.parametrize("name", ["timm vit", "hf Dinov2Model"])
def test_no_whole_map_is_built(name, rows, builds_it, stage):
    """1025 tokens: one head's L×L map is larger than anything else in these models."""
    model = convert(lively(FAMILIES[name]()), layers=[2, 4], ratio=0.5, rows=rows)
    if name == "timm vit":
        model.set_input_size(img_size=(256, 256))
    images = torch.randn(1, 3, 256, 256)
    objective = SelectorDistillation(model, kl="forward") if stage == "distillation" else None
    with LargestTensor() as seen:
        if objective:
            objective(images)["loss"].backward()
        else:
            with torch.inference_mode():
                run(model, images)
    assert (seen.largest >= 1025 * 1025) == builds_it


def test_distillation_draws_other_rows_each_step_and_the_seed_repeats_them(images):
    model = convert(lively(FAMILIES["timm vit"]()), layers=[2, 4], ratio=0.5, rows=4)
    objective = SelectorDistillation(model, kl="forward")
    losses = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        losses.append(objective(images)["loss"].item())
    objective.close()
    assert losses[0] == losses[2] != losses[1]


def test_the_gradient_taken_at_once_is_that_of_the_loss():
    weights = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(2))]

    def loss():
        return (torch.randn(4, 3, generator=torch.Generator().manual_seed(0)) @ weights[0] + weights[1]).exp().sum()

    now = with_gradient_now(loss(), weights)
    assert torch.equal(now, loss())
    for found, wanted in zip(
        torch.autograd.grad(3 * now, weights), torch.autograd.grad(3 * loss(), weights), strict=True
    ):
        assert torch.allclose(found, wanted)


def test_scores_do_not_depend_on_how_many_rows_are_taken_at_once(monkeypatch):
    selector, read = selector_of(3), maps()
    whole = scores_of(selector, read)
    monkeypatch.setattr("tosa_convert.methods.scores.attention.ROWS_AT_ONCE", 7)
    assert torch.allclose(scores_of(selector, read), whole, atol=1e-5)
