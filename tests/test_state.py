"""What a forward pass hands on is its own: other passes, threads, copies and replaced modules do not get into it."""

import copy
import io
import threading

import pytest
import torch
from conftest import lively
from families import FAMILIES
from torch import nn
from torch.utils.checkpoint import checkpoint

from tosa_convert import TosaError, convert, original
from tosa_convert.models.adapter import adapter_of, run
from tosa_convert.selective.selection import chosen_tokens, selective_blocks

METHODS = {
    "tosa": {"method": "tosa", "ratio": 0.5},
    "per head": {"layers": [2, 4], "ratio": 0.5, "selection": "per_head"},
    "idle": {"method": "idle", "ratio": 0.7},
    "similarity merge": {"score": "similarity", "bypass": "merge", "schedule": "ramp", "ratio": 0.7},
    "segments": {"score": "similarity", "bypass": "merge", "schedule": "ramp", "ratio": 0.7, "segment": 2},
    "norm borrow": {"score": "norm", "bypass": "borrow", "schedule": "all", "ratio": 0.6},
    "tome": {"method": "tome", "ratio": 0.7},
    "norm persist": {"score": "norm", "bypass": "persist", "schedule": "stages", "ratio": 0.7},
    "evit": {"method": "evit", "ratio": 0.7},
}
CASES = [
    *(("timm vit", method) for method in METHODS),
    *(("hf ViT classifier", method) for method in ("tosa", "similarity merge", "tome", "evit")),
    *((family, "segments") for family in ("timm eva02", "timm beit", "hf ViT classifier", "hf DPT")),
    *((family, "tosa") for family in ("timm eva02", "hf DINOv3ViTModel")),
    *((family, "similarity merge") for family in ("timm beit", "timm cait", "hf BeitModel", "hf DPT")),
]


def made(family: str, method: str) -> nn.Module:
    torch.manual_seed(0)
    return convert(lively(FAMILIES[family]()), **METHODS[method])


def photos(seed: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def main(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return next(iter(run(model, images).values()))


@pytest.mark.parametrize(("family", "method"), CASES)
def test_threads_get_their_own_tokens(family, method):
    model, jobs, wrong = made(family, method), [photos(1), photos(2, count=3)], []
    with torch.no_grad():
        wanted = [main(model, images) for images in jobs]

    def work(images: torch.Tensor, expected: torch.Tensor) -> None:
        try:
            with torch.no_grad():
                for _ in range(8):
                    if not torch.allclose(main(model, images), expected, atol=1e-6):
                        wrong.append("other tokens")
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=job) for job in zip(jobs, wanted, strict=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def gradients(model: nn.Module, batches: list[torch.Tensor], together: bool) -> list[torch.Tensor]:
    """Of the summed outputs: one backward pass after all forward passes, or one after each."""
    model.zero_grad()
    if together:
        sum(main(model, images).square().sum() for images in batches).backward()
    else:
        for images in batches:
            main(model, images).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize(("reentrant", "training"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize(("family", "method"), CASES)
def test_checkpointed_layers_of_two_forwards_find_their_own_choice(family, method, reentrant, training):
    """Both forward passes run before the backward pass runs their layers again."""
    model, batches = made(family, method), [photos(1), photos(2, count=3)]
    wanted = gradients(model, batches, together=False)
    for block in adapter_of(model).blocks:
        block.forward = Checkpointed(block.forward, reentrant)
        block.training = training  # and nothing in it, which might be random then
    found = gradients(model, batches, together=True)
    assert len(found) == len(wanted)
    noise = 1e-6 * max(theirs.abs().max() for theirs in wanted)  # a bias of keys has no gradient but that
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4 * theirs.abs().max() + noise)


class Checkpointed:
    def __init__(self, forward, reentrant: bool):
        self.forward, self.reentrant = forward, reentrant

    def __call__(self, *args, **kwargs):
        if self.reentrant:
            return checkpoint(lambda *given: self.forward(*given, **kwargs), *args, use_reentrant=True)
        return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)


@pytest.mark.parametrize(("family", "method"), CASES)
def test_the_whole_module_is_saved_and_comes_back(family, method):
    model, images = made(family, method), photos(1)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    with torch.no_grad():
        assert torch.equal(main(again, images), main(model, images))
        assert torch.allclose(main(original(again), images), main(original(model), images), atol=1e-6)


def replaced(model: nn.Module, name: str, factor: float = 1.0) -> None:
    """Put a new, equal (or scaled) linear layer in the place of one."""
    parent, _, leaf = name.rpartition(".")
    old = model.get_submodule(name)
    new = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)
    new.load_state_dict(old.state_dict())
    new.weight.data *= factor
    setattr(model.get_submodule(parent), leaf, new)


@pytest.mark.parametrize("method", ["tosa", "idle", "norm borrow", "tome", "norm persist", "evit"])
@pytest.mark.parametrize(
    ("family", "names"),
    [("timm vit", ["blocks.{}.attn.qkv"]), ("hf Dinov2Model", ["encoder.layer.{}.attention.q_proj"])],
)
def test_a_replaced_projection_is_followed(family, names, method):
    """As LoRA, quantisers and surgeons do; found: the tokens of the image before were taken without a word."""
    model = made(family, method)
    names = [name for name in names if _has(model, name.format(0))]
    if not names:
        pytest.skip("this version of transformers names its projections differently")
    with torch.no_grad():
        main(model, photos(1))
        wanted, chosen = main(model, photos(2)), chosen_tokens(model)
        main(model, photos(1))
        for layer in range(6):
            for name in names:
                replaced(model, name.format(layer))
        assert torch.allclose(main(model, photos(2)), wanted, atol=1e-6)
    assert all(torch.equal(tokens, chosen[layer]) for layer, tokens in chosen_tokens(model).items())


def _has(model: nn.Module, name: str) -> bool:
    return name in dict(model.named_modules())


def test_other_weights_choose_other_tokens():
    """What is followed is the new module, not the old one's output."""
    model = made("timm vit", "norm borrow")
    with torch.no_grad():
        main(model, photos(1))
        before = chosen_tokens(model)[3]
        generator = torch.Generator().manual_seed(3)
        replaced(model, "blocks.1.attn.qkv")
        weight = model.blocks[1].attn.qkv.weight
        weight.copy_(torch.randn(weight.shape, generator=generator) / 7)
        main(model, photos(1))
    assert not torch.equal(before, chosen_tokens(model)[3])


def test_a_replaced_layer_is_told():
    model = made("timm vit", "tosa")
    main(model, photos(1))
    model.blocks[0] = copy.deepcopy(original(model).blocks[0])
    with pytest.raises(TosaError, match="layer 2 is selective, but its score read nothing from the layer before it"):
        main(model, photos(1))


def test_a_replaced_norm_is_told():
    model = made("timm vit", "similarity merge")
    model.blocks[3].norm1 = nn.LayerNorm(48)
    with pytest.raises(TosaError, match="a LayerNorm of a selective layer was replaced"):
        main(model, photos(1))


def test_blocks_run_by_hand_are_told_what_to_do():
    model = made("timm vit", "similarity merge")
    with pytest.raises(TosaError, match="run the model from its images on"):
        model.blocks[1](torch.randn(2, 17, 48))


def test_nothing_is_kept_longer_than_the_tokens():
    model = made("timm vit", "tosa")
    for seed in range(5):
        main(model, photos(seed)).sum().backward()
    layers = selective_blocks(model)
    assert len(layers[0].selection.current.recollection._known) <= len(layers) + 1
    with torch.no_grad():
        for seed in range(2):
            main(model, photos(seed))
    assert len(layers[0].selection.current.recollection._known) <= 2, "that of the last layer, and of one before it"


@pytest.mark.parametrize(
    "family",
    [
        *("hf ViTModel", "hf Dinov2Model", "hf BeitModel", "hf CLIPVisionModel", "hf DINOv3ViTModel", "hf DPT"),
        *("hf ViTMSN classifier", "hf MLCDVisionModel"),  # known by proof
    ],
)
@pytest.mark.parametrize("options", [{"selection": "per_head"}, {"score": "norm", "bypass": "merge"}], ids=str)
def test_attentions_are_given_of_every_layer(family, options):
    """Of a selective layer those among its own tokens. Found: with per_head its entry was missing, without a word."""
    torch.manual_seed(0)
    model = lively(FAMILIES[family]())
    model.set_attn_implementation("eager")
    wanted = model(photos(1), output_attentions=True).attentions
    whole = convert(copy.deepcopy(model), layers=[2], ratio=1.0, **options)(photos(1), output_attentions=True)
    half = convert(model, layers=[2, 4], ratio=0.5, **options)
    found = half(photos(1), output_attentions=True).attentions
    assert len(found) == len(whole.attentions) == len(wanted) == 6
    for layer, maps in enumerate(found, start=1):
        kept = wanted[0].shape[-1] - (8 if layer in (2, 4) else 0)
        assert maps.shape == (2, 3, kept, kept)
        assert torch.allclose(maps.sum(-1), torch.ones(()), atol=1e-5)
    mine, theirs = whole.attentions[1].sort(-1).values.sort(-2).values, wanted[1].sort(-1).values.sort(-2).values
    assert torch.allclose(mine, theirs, atol=1e-5), "all tokens attend, in the order of their choice"


@pytest.mark.parametrize("family", ["hf ViTModel", "hf Dinov2Model", "hf BeitModel", "hf DINOv3ViTModel"])
def test_attention_that_was_fused_is_given_too(family):
    """Among the tokens that are left, as much as they had together."""
    torch.manual_seed(0)
    model = lively(FAMILIES[family]())
    model.set_attn_implementation("eager")
    options = {"score": "multi_criteria", "bypass": "pool", "layers": {2: 0.7, 4: 0.5}}
    found = convert(copy.deepcopy(model), **options)(photos(1), output_attentions=True).attentions
    counts = [maps.shape[-1] for maps in found]
    assert len(found) == 6
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[1] > counts[3] == counts[5]
    for maps in found:
        assert torch.allclose(maps.sum(-1), torch.ones(()), atol=1e-5)
