"""Models that no family knows by name: what is proven of them, and what each refusal says."""

import copy
import json

import pytest
import torch
import transformers
from conftest import lively
from families import FAMILIES, HF_SMALL, PROVEN
from torch import nn

from tosa_convert import UnsupportedModelError, convert, load, save
from tosa_convert.models import proven
from tosa_convert.models.adapter import adapter_of, run
from tosa_convert.models.proof.block import take_apart
from tosa_convert.models.proof.calls import Call, NotProvenError, record
from tosa_convert.reporting.token_maps import look
from tosa_convert.selective import conversion
from tosa_convert.selective.selection import chosen_tokens

WIDTH, HEADS = 24, 3


class Attention(nn.Module):
    """Plain attention with one projection of queries, keys and values."""

    def __init__(self, interleaved: bool = False, normed: bool = False, scale: float | None = None):
        super().__init__()
        self.num_heads, self.interleaved = HEADS, interleaved
        self.scale = scale
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.query_norm = nn.LayerNorm(WIDTH // HEADS) if normed else nn.Identity()
        self.key_norm = nn.LayerNorm(WIDTH // HEADS) if normed else nn.Identity()

    def forward(self, tokens):
        shape = (HEADS, 3, -1) if self.interleaved else (3, HEADS, -1)
        queries, keys, values = self.qkv(tokens).unflatten(-1, shape).unbind(-2 if self.interleaved else -3)
        queries, keys = self.query_norm(queries), self.key_norm(keys)
        parts = (part.transpose(1, 2) for part in (queries, keys, values))
        joined = nn.functional.scaled_dot_product_attention(*parts, scale=self.scale)
        return self.out(joined.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Norm, attention, norm, MLP."""

    def __init__(self, attention: nn.Module | None = None):
        super().__init__()
        self.first, self.mixer = nn.LayerNorm(WIDTH), attention or Attention()
        self.second = nn.LayerNorm(WIDTH)
        self.channels = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, tokens):
        tokens = tokens + self.mixer(self.first(tokens))
        return tokens + self.channels(self.second(tokens))


def call_of(block: nn.Module) -> Call:
    tokens = torch.randn(1, 9, WIDTH, generator=torch.Generator().manual_seed(0))
    return record({"": block}, lambda: block(tokens))[""]


@pytest.mark.parametrize(
    ("options", "order"),
    [
        ({}, "qkv heads"),
        ({"interleaved": True}, "heads qkv"),
        ({"normed": True}, "qkv heads"),
        ({"scale": 0.2}, "qkv heads"),
    ],
)
def test_a_block_is_taken_apart_whatever_its_parts_are_called(options, order):
    block = lively(Block(Attention(**options)))
    parts = take_apart(block, call_of(block), "block")
    assert (parts.norm, parts.attention, parts.mlp) == ("first", "mixer", "channels")
    heads = parts.heads
    assert (heads.count, heads.order, heads.projections, heads.output) == (HEADS, order, ["qkv"], "out")
    assert heads.norms == (["query_norm", "key_norm"] if options.get("normed") else [])
    assert heads.scale == pytest.approx(options.get("scale") or (WIDTH / HEADS) ** -0.5)


class InPlace(Block):
    def forward(self, tokens):
        tokens += self.mixer(self.first(tokens))
        return tokens + self.channels(self.second(tokens))


class Random(Block):
    def forward(self, tokens):
        return super().forward(tokens) + torch.rand(1)


class Positions(Block):
    def forward(self, tokens):
        return super().forward(tokens + torch.arange(tokens.shape[1])[:, None])


class Tuple(Block):
    def forward(self, tokens):
        return super().forward(tokens), tokens, 3


class Talking(Attention):
    """Mixes its heads."""

    def forward(self, tokens):
        return super().forward(tokens.flip(-1)) * super().forward(tokens)


class Silent(Block):
    def forward(self, tokens):
        return tokens + self.channels(self.second(tokens))


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (InPlace(), "row.0 changes the tokens that it is given in place"),
        (Random(), "draws random numbers in eval mode"),
        (Positions(), "knows positions: permuted tokens do not come out permuted"),
        (Tuple(), "returns 3 values, not only its tokens"),
        (Block(Talking()), r"the attention of row.0, mixer \(Talking\) is not softmax"),
        (Silent(), "has no attention as a module of its own"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_each_proof_that_fails_is_named(block, message):
    block = lively(block)
    call = call_of(copy.deepcopy(block))
    with pytest.raises(NotProvenError, match=message):
        take_apart(block, call, "row.0")


SMALL = {**HF_SMALL, "num_hidden_layers": 3}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("Phi4MultimodalVisionModel", {}, "knows positions: .* a causal mask"),
        ("PixtralVisionModel", {}, "packs the tokens of a batch of images"),
        ("TimesformerModel", {"num_frames": 4}, "along times and along places in turn"),
        ("ViltModel", {}, "does not run on an image alone .*: it also takes text"),
    ],
)
def test_a_model_that_fails_a_proof_is_left_as_it_was(kind, options, message):
    torch.manual_seed(0)
    config = getattr(transformers, kind.removesuffix("Model") + "Config")(**{**SMALL, **options})
    model = lively(getattr(transformers, kind)(config)).train()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(UnsupportedModelError, match=message):
        convert(model, layers=[2], ratio=0.5)
    assert model.training
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys(), name
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_a_block_that_mixes_the_images_of_a_batch_is_refused(monkeypatch):
    model = lively(FAMILIES["hf IJepaModel"]())
    kind = type(adapter_of(copy.deepcopy(model)).blocks[0])
    own = kind.forward

    def mixing(self, tokens, *args, **kwargs):
        return own(self, tokens - tokens.mean(0) if len(tokens) > 1 else tokens, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", mixing)
    with pytest.raises(NotProvenError, match="Layer mixes the images of a batch"):
        convert(model, layers=[2], ratio=0.5)


def test_weights_that_are_not_numbers_are_named():
    model = lively(FAMILIES["hf IJepaModel"]())
    torch.nn.init.constant_(model.layernorm.weight, float("nan"))
    with pytest.raises(NotProvenError, match="holds values that are not finite; get the model"):
        convert(model, layers=[2], ratio=0.5)


def test_of_a_model_that_reads_and_sees_the_vision_part_is_named():
    vision = transformers.CLIPVisionConfig(**SMALL)
    text = transformers.LlamaConfig(**{**SMALL, "num_key_value_heads": 3}, vocab_size=100)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=99)
    model = transformers.LlavaForConditionalGeneration(config)
    with pytest.raises(UnsupportedModelError, match=r"convert its vision part, model\.model"):
        convert(model, layers=[2], ratio=0.5)
    convert(model.model.vision_tower, layers=[2], ratio=0.5)


def test_what_takes_packed_patches_is_told_apart_from_a_text_model(tmp_path):
    kind = transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel
    model = kind(kind.config_class(depth=2, embed_dim=32, num_heads=2, hidden_size=32, patch_size=8))
    with pytest.raises(UnsupportedModelError, match="packed into one row"):
        convert(model, layers=[2], ratio=0.5)
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="no qwen2_vl_vision by itself; load the whole model"):
        load(tmp_path)


def _in_place(tokens, updated):
    return tokens.copy_(updated)


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (lambda tokens, updated: updated + tokens.roll(1, 1), r"layers\.2 .* knows positions"),
        (lambda tokens, updated: updated + tokens.mean(1, keepdim=True), r"layers\.2 .* outside of its attention"),
        (lambda tokens, updated: updated + torch.randn_like(tokens), r"layers\.2 .* draws random numbers"),
        (_in_place, r"layers\.2 .* in place"),
    ],
)
def test_each_block_is_proven(odd, message):
    """One that does something else than the others is found wherever it stands, and nothing is left on the model."""
    model = lively(FAMILIES["hf IJepaModel"]())
    own = model.layers[2].forward
    model.layers[2].forward = lambda tokens, *others, **named: odd(tokens, own(tokens, *others, **named))
    with pytest.raises(NotProvenError, match=message):
        convert(model, layers=[5], ratio=0.5)
    assert not hasattr(model, "tosa_proof")


def test_a_block_that_wants_all_tokens_is_refused():
    """Whatever it raises."""

    def forward(self, tokens, *args, **kwargs):
        assert tokens.shape[1] == 16, "all of them"
        return base.forward(self, tokens, *args, **kwargs)

    model = lively(FAMILIES["hf IJepaModel"]())
    base = type(model.layers[0])
    whole = type("Whole", (base,), {"forward": forward})
    for block in model.layers:
        block.__class__ = whole
    with pytest.raises(NotProvenError, match=r"does not run with layers on some of its tokens \(all of them"):
        convert(model, layers=[5], ratio=0.5)
    assert not hasattr(model, "tosa_proof")


def test_blocks_with_other_heads_are_no_row():
    model = lively(FAMILIES["hf IJepaModel"]())
    attention = model.layers[2].attention
    attention.num_attention_heads, attention.head_dim = 1, attention.num_attention_heads * attention.head_dim
    with pytest.raises(NotProvenError, match=r"layers\.2 .* is made otherwise than"):
        convert(model, layers=[5], ratio=0.5)


def test_patches_cut_by_a_convolution_whose_padding_has_a_name():
    model = lively(FAMILIES["hf IJepaModel"]())
    wanted = convert(copy.deepcopy(model), score="similarity", bypass="merge", layers={2: 0.5})
    model.get_submodule(wanted.tosa_proof["projection"]).padding = "valid"
    found = convert(model, score="similarity", bypass="merge", layers={2: 0.5})
    assert adapter_of(found).grid((32, 32)) == adapter_of(wanted).grid((32, 32))


def test_a_selection_that_is_not_the_masked_original_is_refused(monkeypatch):
    """The last proof, where the parts were found but a selective layer does something else."""
    model = lively(FAMILIES["hf IJepaModel"]())
    monkeypatch.setattr(proven.ProvenVit, "attend", lambda self, attention, q, k, v, bias: (v, None))
    with pytest.raises(NotProvenError, match="is not the original with the others masked and restored"):
        convert(model, layers=[2], ratio=0.5)
    assert not hasattr(model, "tosa_proof")
    assert not conversion.is_converted(model)


@pytest.mark.parametrize("name", PROVEN)
def test_the_proof_is_kept_with_the_run(name, tmp_path, images):
    model = convert(lively(FAMILIES[name]()), score="similarity", bypass="merge", layers={2: 0.5})
    wanted = next(iter(run(model, images).values()))
    save(model, tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "config.json").read_text())["proof"]
    assert kept["selection"]
    assert kept["row"]
    opened = load(tmp_path / "run")
    assert torch.allclose(next(iter(run(opened, images).values())), wanted, atol=1e-5)
    assert opened.tosa_proof == kept == model.tosa_proof


def test_a_grid_that_is_not_square_and_a_spectrogram():
    small = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3}
    backbone = transformers.VitPoseBackboneConfig(**small, image_size=[32, 24], patch_size=[8, 8])
    pose = transformers.VitPoseForPoseEstimation(transformers.VitPoseConfig(backbone_config=backbone, num_labels=3))
    sound = transformers.ASTModel(transformers.ASTConfig(**small, intermediate_size=96, max_length=64, num_mel_bins=32))
    for model, grid, channels in ((pose, (4, 3), 3), (sound, (2, 5), 1)):
        torch.manual_seed(0)
        adapter = adapter_of(lively(model))
        known = adapter.preprocessing()
        assert (adapter.grid(known.size), known.channels) == (grid, channels)
        converted = convert(model, score="similarity", bypass="merge", layers={2: 0.5})
        found = next(iter(run(converted, torch.randn(2, channels, *known.size)).values()))
        assert found.isfinite().all()


def test_the_command_proves_and_says_what(tosa, tmp_path):
    torch.manual_seed(0)
    FAMILIES["hf BlipVisionModel"]().save_pretrained(tmp_path / "blip")
    code, out, err = tosa("models", "blip", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["recognised"] == "by proof"
    assert (found["layers"], found["heads"], found["prefix"], found["patches"]) == (6, 3, 1, [4, 4])
    assert found["structure"]["selection"]
    assert len(found["proofs"]) == 5
    FAMILIES["hf Dinov2Model"]().save_pretrained(tmp_path / "dinov2")
    code, out, err = tosa("models", "dinov2")
    assert "DINOv2" in " ".join(out.split())
    assert "proven" not in out
    code, _, err = tosa("models", "BertModel")
    assert (code, err.count("\n")) == (1, 1)
    assert "takes no images" in err


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_is_proven_too(dtype):
    model = lively(FAMILIES["hf MLCDVisionModel"]()).to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    converted = convert(model, score="similarity", bypass="merge", layers={2: 0.5})
    assert all(torch.equal(value, before[name]) for name, value in converted.state_dict().items() if name in before)
    assert run(converted, torch.randn(2, 3, 32, 32))["tokens"].dtype is dtype


VIDEO = {**SMALL, "num_frames": 4}


@pytest.mark.parametrize(("kind", "prefix"), [("VideoMAEModel", 0), ("VivitModel", 1)])
def test_a_video_is_a_grid_of_three_axes(kind, prefix, tmp_path):
    torch.manual_seed(0)
    size = {"tubelet_size": [2, 8, 8]} if kind == "VivitModel" else {"tubelet_size": 2}
    config = getattr(transformers, kind.removesuffix("Model") + "Config")(**VIDEO, **size)
    model = lively(getattr(transformers, kind)(config))
    adapter = adapter_of(model)
    assert (adapter.grid((32, 32)), adapter.prefix, adapter.patch) == ((2, 4, 4), prefix, (8, 8))
    videos = torch.randn(2, 4, 3, 32, 32)
    wanted = run(model, videos)["tokens"]
    converted = convert(model, score="similarity", bypass="merge", layers={2: 0.5})
    assert chosen_tokens_of(converted, videos).shape == (2, prefix + 16)
    # In a video that stands still every patch has a twin in time, which the pyramid has to find.
    still = torch.randn(2, 3, 32, 32)
    pairs = look(converted, still)[0][0].partners
    assert len(pairs) > 8
    save(converted, tmp_path / "run")
    opened = load(tmp_path / "run")
    found = run(opened, videos)["tokens"]
    assert found.shape == wanted.shape
    assert torch.allclose(found, run(converted, videos)["tokens"], atol=1e-5)


def chosen_tokens_of(model, images):
    run(model, images)
    return chosen_tokens(model)[2]


def test_only_the_stage_that_holds_the_patches_becomes_selective():
    """GroupViT's first; the others run on groups."""
    torch.manual_seed(0)
    options = {"depths": [3, 2, 2], "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 0]}
    model = lively(transformers.GroupViTVisionModel(transformers.GroupViTVisionConfig(**{**HF_SMALL, **options})))
    adapter = adapter_of(model)
    assert (len(adapter.blocks), adapter.prefix) == (3, 8)
    convert(model, layers=[2], ratio=0.5)
    assert run(model, torch.randn(2, 3, 32, 32))["tokens"].isfinite().all()
