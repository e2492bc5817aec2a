"""Images of different sizes in one batch: patches that are none, by the mask that a model brings along."""

import copy

import pytest
import torch
from conftest import lively
from families import FAMILIES

from tosa_convert import convert
from tosa_convert.selective.selection import last_choices

GRIDS = [(3, 4), (4, 2)]
MOST = 14


def patchified(content: float = 0.0) -> dict:
    """Two images of different grids, cut into patches and padded with ``content`` to one number."""
    generator = torch.Generator().manual_seed(3)
    patches = torch.full((2, MOST, 192), content)
    valid = torch.zeros(2, MOST, dtype=torch.bool)
    places = torch.zeros(2, MOST, 2, dtype=torch.long)
    for image, (rows, columns) in enumerate(GRIDS):
        count = rows * columns
        patches[image, :count] = torch.randn(count, 192, generator=generator)
        valid[image, :count] = True
        places[image, :count] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    return {"patches": patches, "valid": valid, "places": places}


def tokens_of(name: str, model, given: dict) -> torch.Tensor:
    """(valid patches of both images, C)."""
    if name.startswith("hf"):
        found = model(
            pixel_values=given["patches"],
            pixel_attention_mask=given["valid"].long(),
            spatial_shapes=torch.tensor(GRIDS),
        ).last_hidden_state
    else:
        found = model.forward_features(given["patches"], patch_coord=given["places"], patch_valid=given["valid"])
        found = (found["patches"] if isinstance(found, dict) else found)[:, -MOST:]
    return found[given["valid"]]


NAMES = ("hf Siglip2VisionModel", "timm naflex", "timm naflex rope")


def built(name: str):
    torch.manual_seed(0)
    if name == "timm naflex rope":  # a convolution does not take patches
        from families import naflex

        return lively(naflex(rope_type="axial", class_token=True, global_pool="token")())
    return lively(FAMILIES[name]())


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_ratio_one_equals_the_original_with_padding(name):
    model = built(name)
    wanted = tokens_of(name, model, patchified())
    found = tokens_of(name, convert(copy.deepcopy(model), layers=[2, 4], ratio=1.0), patchified())
    assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("bypass", ["identity", "borrow", "merge"])
@pytest.mark.parametrize("score", ["similarity", "norm", "attention"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_padding_is_nobodys_business(name, score, bypass):
    """What stands in it changes nothing of the images, and none of it attends while a patch of the image is skipped
    for it, as far as the score decides."""
    model = convert(built(name), layers={2: 0.6, 4: 0.5}, score=score, bypass=bypass)
    found = tokens_of(name, model, patchified())
    choice = last_choices(model)[2]
    assert choice.padding.sum() == (~patchified()["valid"]).sum()
    if score != "attention":  # which padding has a part in
        again = tokens_of(name, model, patchified(content=50.0))
        assert torch.allclose(again, found, atol=1e-4)
    assert not torch.allclose(found, tokens_of(name, convert_nothing(built(name)), patchified()), atol=1e-3)
    if score != "similarity":  # which keeps some padding to stand in for the rest
        attending = choice.padding.gather(1, choice.attended).sum(1)
        kept = choice.attended.shape[1] - (choice.padding.shape[1] - MOST)
        patches = torch.tensor([rows * columns for rows, columns in GRIDS])
        assert (attending == (kept - patches).clamp(min=0)).all()


def convert_nothing(model):
    return convert(model, layers=[2], ratio=1.0)
