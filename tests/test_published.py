"""Published methods against what their papers say, written down a second time."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import lively
from families import FAMILIES
from torch import nn

from tosa_convert import TosaError, UsageError, convert, flops
from tosa_convert.methods.matching import choose_by_energy
from tosa_convert.methods.token_ops import keep_count, ratio_steps
from tosa_convert.models.adapter import adapter_of, run
from tosa_convert.models.projections import class_logits
from tosa_convert.models.proof.positions import named, names_of
from tosa_convert.models.subclassing import plain_class
from tosa_convert.selective.selection import last_choices, selective_blocks


def test_tome_is_the_papers(images):
    """ToMe (arXiv 2210.09461) written out on timm's parts: r tokens of each of six layers, un-merged at the end."""
    model = lively(FAMILIES["timm vit"]())
    found = convert(copy.deepcopy(model), method="tome", ratio=1 - 6 / 32).forward_features(images)  # r = 1 of 16
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    wanted = torch.stack([_tome(model, image, r=1) for image in tokens])
    assert torch.allclose(found, model.norm(wanted), atol=1e-5)


def _tome(model, tokens: torch.Tensor, r: int) -> torch.Tensor:
    members = [[place] for place in range(len(tokens))]
    for block in model.blocks:
        heads = block.attn.num_heads
        bias = torch.tensor([len(group) for group in members]).float().log()
        normed = block.norm1(tokens)[None]
        tokens = tokens + block.ls1(block.attn(normed, attn_mask=bias.expand(1, 1, len(tokens), -1)))[0]
        keys = block.attn.qkv(normed).unflatten(-1, (3, heads, -1))[0, :, 1].mean(1)
        unit = F.normalize(keys, dim=-1)
        first_set, second = range(2, len(tokens), 2), range(1, len(tokens), 2)
        best = {a: max(second, key=lambda b: (unit[a] @ unit[b]).item()) for a in first_set}
        closest = sorted(best, key=lambda a: -(unit[a] @ unit[best[a]]).item())[:r]
        joined = {b: [b, *(a for a in closest if best[a] == b)] for b in second}
        order = [[0], *([a] for a in first_set if a not in closest), *joined.values()]
        weights = [torch.tensor([float(len(members[place])) for place in places])[:, None] for places in order]
        tokens = torch.stack([(tokens[p] * w).sum(0) / w.sum() for p, w in zip(order, weights, strict=True)])
        members = [[part for place in places for part in members[place]] for places in order]
        tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)[None]))[0]
    result = torch.empty(sum(map(len, members)), tokens.shape[1])
    for token, group in zip(tokens, members, strict=True):
        result[group] = token
    return result


def test_pitome_is_the_papers():
    """PiToMe's matching (arXiv 2405.16148, section 3.2) written out token by token."""
    features = torch.randn(2, 2 + 12, 8, generator=torch.Generator().manual_seed(0))
    margin, kept = 0.3, 8
    choice = choose_by_energy(features, 2, kept, margin)
    for image in range(2):
        unit = F.normalize(features[image, 2:], dim=-1)
        energies = []
        for token in unit:
            cosines = [(token @ other).item() for other in unit]
            energies.append(sum(c if c >= margin else math.exp(c - margin) - 1 for c in cosines) / 12)
        by_energy = sorted(range(12), key=lambda place: -energies[place])
        merged, into = by_energy[0:8:2], by_energy[1:8:2]
        assert choice.skipped[image].tolist() == [place + 2 for place in merged]
        assert choice.attended[image].tolist() == [0, 1, *(place + 2 for place in [*into, *by_energy[8:]])]
        for index, place in enumerate(merged):
            best = max(into, key=lambda other: (unit[place] @ unit[other]).item())
            assert choice.attended[image, choice.partners[image, index]] == best + 2
    with pytest.raises(TosaError, match="at most half"):
        choose_by_energy(features, 2, 5, margin)
    scores = [block.selector for block in selective_blocks(convert(FAMILIES["timm vit"](), method="pitome", ratio=0.8))]
    assert [score.margin for score in scores] == pytest.approx([0.75, 0.6, 0.45, 0.3, 0.15, 0.0])


def test_mutual_pair_merging_is_the_papers(images):
    """MPM (arXiv 2604.05718): pairs of nearest neighbours of each other are averaged, plainly, and copied back at the
    end. Written out on timm's parts, for as many pairs as there are, which may differ from image to image."""
    model = lively(FAMILIES["timm vit"]())
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for index, token in enumerate(tokens):
        wanted, pairs = _mpm(model, token, layer=3)
        keep = 1 - pairs / 16
        options = {"score": "mutual", "bypass": "average", "schedule": "all", "layers": {3: keep}}
        found = convert(copy.deepcopy(model), **options).forward_features(images[index : index + 1])
        assert pairs > 1
        assert torch.allclose(found[0], model.norm(wanted), atol=1e-5)


def _mpm(model, tokens: torch.Tensor, layer: int) -> tuple[torch.Tensor, int]:
    groups = [[place] for place in range(len(tokens))]
    for number, block in enumerate(model.blocks, start=1):
        tokens = tokens + block.ls1(block.attn(block.norm1(tokens)[None]))[0]
        if number == layer:
            unit = F.normalize(tokens, dim=-1)
            best = {a: max(set(range(1, 17)) - {a}, key=lambda b: (unit[a] @ unit[b]).item()) for a in range(1, 17)}
            pairs = [[a, b] for a, b in best.items() if best[b] == a and a < b]
            groups = [[0], *pairs, *([a] for a, b in best.items() if best[b] != a)]
            tokens = torch.stack([tokens[members].mean(0) for members in groups])
        tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)[None]))[0]
    result = torch.empty(17, tokens.shape[1])
    for token, members in zip(tokens, groups, strict=True):
        result[members] = token
    return result, len(pairs)


def test_merging_once_is_as_late_as_the_ratio_allows(vit):
    assert convert(copy.deepcopy(vit), method="mpm", ratio=0.9).tosa_config.ratio == [1.0] * 8 + [0.7] * 4
    assert convert(copy.deepcopy(vit), method="mpm", ratio=0.6).tosa_config.ratio == 0.6
    assert convert(copy.deepcopy(vit), method="mpm", ratio=1.0).tosa_config.ratio == 1.0


def test_pitome_leaves_the_same_share_in_each_layer(vit):
    config = convert(vit, method="pitome", ratio=0.8).tosa_config
    shares = [after / before for before, after in zip([1.0, *config.ratio], config.ratio, strict=False)]
    assert shares == pytest.approx([shares[0]] * len(shares), abs=1e-5)
    assert math.prod(config.ratio) ** (1 / len(config.ratio)) == pytest.approx(0.8, abs=1e-5)


def test_evit_is_the_papers(images):
    """EViT (arXiv 2202.07800): the class token's attention keeps the best, the others become one weighted sum."""
    model = lively(FAMILIES["timm vit"]())
    found = convert(copy.deepcopy(model), method="evit", layers=[3], ratio=0.5)(images)
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for layer, block in enumerate(model.blocks, start=1):
        if layer != 3:
            tokens = block(tokens)
            continue
        queries, keys, _ = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, 3, 16)).unbind(2)
        row = torch.einsum("bhd,bnhd->bhn", queries[:, 0], keys) / 4
        scores = row.softmax(-1).mean(1)[:, 1:]
        tokens = tokens + block.attn(block.norm1(tokens))
        order = scores.argsort(1, descending=True)
        rows = []
        for image, places in enumerate(order):
            patches = tokens[image, 1:]
            fused = (patches[places[8:]] * scores[image, places[8:], None]).sum(0, keepdim=True)
            rows.append(torch.cat([tokens[image, :1], patches[places[:8]], fused]))
        tokens = torch.stack(rows)
        tokens = tokens + block.mlp(block.norm2(tokens))
    assert torch.allclose(found, model.forward_head(model.norm(tokens)), atol=1e-5)


def test_idle_is_the_papers(images):
    """IdleViT (arXiv 2310.05654) written out on timm's parts: in each layer the class token's own query looks at every
    token, the idle ones too."""
    model = lively(FAMILIES["timm vit"]())
    converted = convert(copy.deepcopy(model), method="idle", ratio=0.6)
    ratios = {block.selection.layer: block.selection.ratio for block in selective_blocks(converted)}
    assert {layer: round(ratio, 4) for layer, ratio in ratios.items()} == {2: 0.6, 3: 0.6, 4: 0.36, 5: 0.36, 6: 0.216}
    found, chosen, back = converted.forward_features(images), last_choices(converted), 0
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for layer, block in enumerate(model.blocks, start=1):
        if layer not in ratios:
            tokens = block(tokens)
            continue
        queries, keys, _ = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        logits = (queries[:, :, 0, None] @ keys.mT)[:, :, 0, 1:].mean(1)
        places = logits.topk(keep_count(16, ratio_steps(ratios[layer]))).indices.sort(1).values + 1
        assert places.equal(chosen[layer].attended[:, 1:].sort(1).values)
        rows = []
        for image, own in zip(tokens, places, strict=True):
            row, own = image.clone(), [0, *own.tolist()]
            row[own] = block(image[own][None])[0]
            rows.append(row)
        tokens = torch.stack(rows)
        if layer > 2:
            before = chosen[layer - 1].attended
            back += sum(len(set(now.tolist()) - set(was.tolist())) for now, was in zip(places, before, strict=True))
    assert torch.allclose(found, model.norm(tokens), atol=1e-5)
    assert back, "an idle token is selected again"


@pytest.mark.parametrize("name", FAMILIES)
def test_class_logits_are_those_of_the_layers_queries_and_keys(name):
    """Also where they are worked out without keys, and in families that inherit from one where they are."""
    model = lively(FAMILIES[name]())
    with torch.no_grad():  # biases too
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    adapter, seen = adapter_of(model), {}
    if not (adapter.class_token and adapter.own_heads):
        with pytest.raises(UsageError, match="class token"):
            convert(model, score="class_query", layers=[2], ratio=0.5)
        return
    block = adapter.blocks[1]

    def look(block, args, kwargs):
        entering, args, kwargs = adapter.entering(args, kwargs)
        seen["arguments"] = named(names_of(plain_class(block).forward), (None, *args), kwargs)
        seen["normed"] = adapter.normed(block, adapter.taken(entering))

    handle = block.register_forward_pre_hook(look, with_kwargs=True)
    tap = adapter.tap(block, lambda queries, keys: seen.update(queries=queries, keys=keys))
    with torch.no_grad():
        run(model, torch.randn(2, 3, *adapter.preprocessing().size, generator=torch.Generator().manual_seed(2)))
    tap.remove()
    handle.remove()
    found = class_logits(adapter, block, seen["normed"], seen["arguments"])
    wanted = (seen["queries"][:, :, :1] * adapter.scale(seen["queries"]) @ seen["keys"].mT).mean(1)[:, 0]
    assert torch.allclose(found, wanted, atol=1e-4)
    before = flops(model).layers[0].macs
    converted = convert(model, score="class_query", layers=[1, 3], ratio=0.5)
    assert set(last_choices_of(converted)) == {1, 3}
    cost = flops(converted)
    assert cost.layers[0].macs < 0.75 * before, "choosing costs less than it saves"
    assert cost.layers[0].selector >= 2 * adapter.width**2


def last_choices_of(model) -> dict:
    with torch.no_grad():
        run(model, torch.randn(2, 3, *adapter_of(model).preprocessing().size))
    return last_choices(model)


def test_class_query_follows_replaced_projections(images):
    """Where the projection is no plain linear layer any longer, it is run."""

    class Doubled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, tokens):
            return 2 * self.inner(tokens)

    model = convert(lively(FAMILIES["timm vit"]()), score="class_query", layers=[3], ratio=0.5)
    doubled = copy.deepcopy(model)
    doubled.blocks[2].attn.qkv = Doubled(doubled.blocks[2].attn.qkv)
    model(images), doubled(images)
    scores = (each.blocks[2].selection.current.state.scores[3] for each in (model, doubled))
    assert torch.allclose(4 * next(scores), next(scores), atol=1e-5)


@pytest.mark.parametrize("score", ["class_attention", "random", "norm"])
def test_dropped_tokens_are_gone_and_the_class_token_knows(score, images):
    model = lively(FAMILIES["timm vit"]())
    converted = convert(copy.deepcopy(model), score=score, bypass="drop", layers=[4], ratio=0.5)
    assert converted.forward_features(images).shape[1] == 1 + 8
    assert converted(images).shape == model(images).shape


def test_frequency_aware_reduction_is_the_papers(images):
    """Frequency-aware token reduction (arXiv 2511.21477, sections 3.2 and 3.3) written out on timm's parts."""
    model = lively(FAMILIES["timm vit"]())
    converted = convert(copy.deepcopy(model), method="frequency", layers=[3, 5], ratio=[0.5, 0.25])
    found = converted.forward_features(images)
    choices, wanted = last_choices(converted), []
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for image in tokens:
        members = [[place] for place in range(17)]
        for layer, block in enumerate(model.blocks, start=1):
            normed = block.norm1(image)[None]
            image = image + block.ls1(block.attn(normed))[0]
            if layer in choices:
                queries, keys, _ = block.attn.qkv(normed).unflatten(-1, (3, block.attn.num_heads, -1))[0].unbind(1)
                queries, keys = block.attn.q_norm(queries.transpose(0, 1)), block.attn.k_norm(keys.transpose(0, 1))
                maps = (queries @ keys.mT * block.attn.scale).softmax(-1)
                high = maps - 1 / maps.shape[-1]  # Eq. 5 and 6
                candidates = range(1, 17 if layer == 3 else 9)  # DC tokens are none
                order = sorted(candidates, key=lambda place: -high.sum((0, 1))[place].item())  # Eq. 7
                high, low = order[: 8 if layer == 3 else 4], order[8 if layer == 3 else 4 :]
                if layer == 3:  # Eq. 10, for each quarter of the image
                    quarters = [[p for p in low if (p - 1) // 8 * 2 + (p - 1) % 4 // 2 == q] for q in range(4)]
                    groups = [quarter or next(q for q in quarters if low[0] in q) for quarter in quarters]
                else:  # Eq. 11
                    groups = [[*low, *(place for place, parts in enumerate(members) if place >= 9)]]
                parts = [list(dict.fromkeys(part for p in group for part in members[p])) for group in groups]
                home = {part: place for place, some in enumerate(members) for part in some}
                means = [torch.stack([image[home[part]] for part in some]).mean(0) for some in parts]
                image = torch.cat([image[[0, *high]], torch.stack(means)])
                members = [members[0], *(members[place] for place in high), *parts]
            image = image + block.ls2(block.mlp(block.norm2(image)[None]))[0]
        whole = torch.empty(17, image.shape[1])
        for token, group in zip(image, members, strict=True):
            whole[group] = token
        wanted.append(whole)
    assert torch.allclose(found, model.norm(torch.stack(wanted)), atol=1e-5)
    with pytest.raises(UsageError, match="chooses itself"):
        convert(model, score="similarity", bypass="local_mean")
