"""A converted model goes through what people already use: exporters, tracers, compilers, quantisers, LoRA, and as a
part of a larger model."""

import copy
import io

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from conftest import lively
from families import FAMILIES, HF_SMALL
from torch import nn

from tosa_convert import ExportSettings, TosaError, convert, export_onnx, load
from tosa_convert.models.adapter import adapter_of
from tosa_convert.selective.selection import chosen_tokens

THREE = {"layers": [2, 3, 5]}  # two in a row and one apart: fewer make smaller graphs
PARTS = {
    "tosa": {"method": "tosa", "ratio": 0.5, "layers": [2, 4]},
    "per head": {"layers": [2, 4], "ratio": 0.5, "selection": "per_head"},
    "similarity merge": {"score": "similarity", "bypass": "merge", "schedule": "ramp", "ratio": 0.7, **THREE},
    "segments": {"score": "similarity", "bypass": "merge", "schedule": "ramp", "ratio": 0.7, "segment": 2, **THREE},
    "norm borrow": {"score": "norm", "bypass": "borrow", "schedule": "all", "ratio": 0.6, **THREE},
    "class attention": {"score": "class_attention", "schedule": "all", "ratio": 0.6, **THREE},
    "random": {"method": "random", "ratio": 0.5},
    "tome": {"method": "tome", "ratio": 0.7, **THREE},
    "evit": {"method": "evit", "ratio": 0.7, "layers": [2, 4]},
    "idle": {"method": "idle", "ratio": 0.7, **THREE},
    "norm drop": {"score": "norm", "bypass": "drop", "schedule": "stages", "ratio": 0.7},
}
EVERYWHERE = [name for name in PARTS if name not in ("tome", "evit", "norm drop")]
CASES = [
    *(("timm vit", parts) for parts in PARTS),
    *(("hf ViT classifier", parts) for parts in PARTS),
    *(("timm eva02", parts) for parts in EVERYWHERE),
    *(("hf Dinov2 registers", parts) for parts in EVERYWHERE),
    ("hf BeitModel", "similarity merge"),
    ("timm cait", "similarity merge"),
]
FEW = [
    ("timm vit", "segments"),
    ("timm eva02", "tosa"),
    ("hf ViT classifier", "evit"),
    ("hf Dinov2 registers", "norm borrow"),
]
TWO = FEW[1::2]
"""Where a case takes ten seconds."""
MOST = [
    *(("timm vit", parts) for parts in PARTS),
    ("hf ViT classifier", "evit"),
    ("timm eva02", "tosa"),
    ("hf Dinov2 registers", "norm borrow"),
    ("hf BeitModel", "similarity merge"),
    ("timm cait", "similarity merge"),
]
"""Every score and bypass, and every family, once; `pytest -m long` runs all cases."""
FOUR_FAMILIES = [case for case in MOST if case[0] not in ("hf BeitModel", "timm cait")]
"""Enough where a case takes half a minute."""
IMAGES, OTHERS = (torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))


def split(cases: list, few: list) -> list:
    return [case if case in few else pytest.param(*case, marks=pytest.mark.long) for case in cases]


def made(family: str, parts: str) -> tuple[nn.Module, dict, dict]:
    """A converted model, and two inputs."""
    torch.manual_seed(0)
    model = convert(lively(FAMILIES[family]()), **PARTS[parts])
    return model, adapter_of(model).inputs(IMAGES), adapter_of(model).inputs(OTHERS)


@pytest.mark.parametrize("parts", ["tosa", "segments", "tome"])
def test_functions_of_gradients(parts):
    """torch.func, as for the gradients of single images."""
    model, inputs, _ = made("timm vit", parts)
    (images,) = inputs.values() if isinstance(inputs, dict) else (inputs,)
    weights = dict(model.named_parameters())

    def loss(weights, image):
        return first(torch.func.functional_call(model, weights, (image[None],))).square().sum()

    model.zero_grad()
    loss(weights, images[0]).backward()
    found = torch.func.grad(loss)(weights, images[0])
    assert all(
        torch.allclose(found[name], each.grad, atol=1e-4) for name, each in weights.items() if each.grad is not None
    )


def first(output) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output
    return next(iter(output.values())) if hasattr(output, "values") else output[0]


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize(("family", "parts"), split(CASES, TWO))
def test_torch_onnx_export_needs_nothing_of_ours(family, parts):
    model, inputs, others = made(family, parts)
    with torch.no_grad():
        wanted = first(model(**others))
        program = torch.onnx.export(model, (), kwargs=inputs, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    feed = {each.name: np.ascontiguousarray(others[each.name].numpy()) for each in session.get_inputs()}
    assert close(torch.from_numpy(session.run(None, feed)[0]), wanted)


@pytest.mark.parametrize(("family", "parts"), FEW)
def test_the_torchscript_exporter_is_refused_by_name(family, parts):
    """It fixes the batch size in the file, and ToMe's choices come out wrong; optimum calls it."""
    model = Whole(made(family, parts)[0])
    with pytest.raises(TosaError, match=r"dynamo=False.* optimum .* use dynamo=True"):
        torch.onnx.export(model, (IMAGES,), io.BytesIO(), dynamo=False)


@pytest.mark.parametrize(("family", "parts"), split(CASES, [case for case in FOUR_FAMILIES if case not in TWO]))
def test_torch_export(family, parts):
    """An ONNX export begins with one."""
    model, inputs, others = made(family, parts)
    with torch.no_grad():
        wanted = first(model(**others))
        exported = torch.export.export(model, (), inputs).module()
        assert close(first(exported(**others)), wanted)


class Whole(nn.Module):
    """As something that takes images alone, which is what tracing wants."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return first(self.model(**adapter_of(self.model).inputs(images)))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("family", "parts"), split(CASES, MOST))
def test_jit_trace_with_its_check(family, parts):
    model = Whole(made(family, parts)[0]).eval()
    with torch.no_grad():
        wanted = model(OTHERS)
        traced = torch.jit.trace(model, (IMAGES,))  # its check traces twice and compares
        assert close(traced(OTHERS), wanted)


@pytest.mark.parametrize(("family", "parts"), split(CASES, TWO))
def test_one_graph_for_torch_compile(family, parts):
    """The eager backend needs no compiler."""
    model, inputs, others = made(family, parts)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        compiled(**inputs)
        assert close(first(compiled(**others)), first(model(**others)))


@pytest.mark.parametrize("parts", ["tosa", "tome"])
def test_blocks_compiled_one_by_one(parts):
    """torch reuses what it compiled for one block in the next unless their classes tell them apart."""
    model, inputs, others = made("timm vit", parts)
    with torch.no_grad():
        wanted = [first(model(**each)) for each in (inputs, others)]
        torch._dynamo.reset()
        for block in adapter_of(model).blocks:
            block.compile(backend="eager")
        for each, right in zip((inputs, others), wanted, strict=True):
            assert close(first(model(**each)), right)


def test_thresholds_under_torch_compile():
    """Its graph ends where the number of tokens depends on the image."""
    torch.manual_seed(0)
    model = convert(lively(FAMILIES["timm vit"]()), score="norm", bypass="borrow", threshold=4.0, **THREE)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for each in (IMAGES, OTHERS, OTHERS[:1]):
            assert close(first(compiled(each)), first(model(each)))


@pytest.mark.parametrize(("family", "parts"), split(CASES, MOST))
def test_dynamic_quantisation(family, parts):
    model, inputs, others = made(family, parts)
    with torch.no_grad():
        wanted = [first(model(**each)) for each in (inputs, others)]
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert any(isinstance(module, torch.ao.nn.quantized.dynamic.Linear) for module in quantised.modules())
    with torch.no_grad():
        for each, right in zip((inputs, others), wanted, strict=True):
            found = first(quantised(**each))
            assert torch.cosine_similarity(found.flatten(), right.flatten(), dim=0) > 0.8


@pytest.mark.parametrize(("family", "parts"), split(CASES, MOST))
def test_torchao(family, parts):
    quantization = pytest.importorskip("torchao.quantization")
    model, inputs, _ = made(family, parts)
    with torch.no_grad():
        wanted = first(model(**inputs))
        quantised = copy.deepcopy(model)
        quantization.quantize_(quantised, quantization.Int8WeightOnlyConfig())
        found = first(quantised(**inputs))
    assert not torch.equal(found, wanted)
    assert torch.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.8


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("timm vit", ["qkv"]),
        ("hf Dinov2 registers", ["q_proj", "k_proj"]),
        ("hf ViT classifier", ["q_proj", "k_proj"]),
        ("timm dinov2 registers", ["qkv"]),
    ],
)
def test_lora_after_conversion_is_followed(family, targets):
    """The selection is that of a model whose weights hold what LoRA adds."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = convert(lively(FAMILIES[family]()), **PARTS["norm borrow"])
    inputs = adapter_of(model).inputs(IMAGES)
    with torch.no_grad():
        model(**inputs)
        before = chosen_tokens(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        found, chosen = first(adapted(**inputs)), chosen_tokens(model)
        merged = adapted.merge_and_unload()
        wanted = first(merged(**inputs))
    assert close(found, wanted)
    assert all(torch.equal(tokens, chosen[layer]) for layer, tokens in chosen_tokens(merged).items())
    assert any(not torch.equal(tokens, before[layer]) for layer, tokens in chosen.items())


def test_as_the_vision_tower_of_a_larger_model():
    text = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=99
    )
    vision = transformers.CLIPVisionConfig(**HF_SMALL)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=98, image_seq_length=16)
    llava = transformers.LlavaForConditionalGeneration(config).eval()
    words = torch.cat([torch.full((1, 16), 98), torch.arange(5)[None]], dim=1)
    inputs = {"input_ids": words, "pixel_values": IMAGES[:1]}
    with torch.no_grad():
        whole = llava(**inputs).logits
        tower = next(each for each in llava.modules() if type(each).__name__ == "CLIPVisionModel")
        convert(tower, score="similarity", bypass="merge", layers={2: 1.0, 3: 1.0})
        assert close(llava(**inputs).logits, whole)
        converted = [block for block in tower.modules() if hasattr(block, "selection")]
        for block in converted:
            block.selection.ratio = 0.5
        assert not close(llava(**inputs).logits, whole)
        assert chosen_tokens(tower)[2].shape == (1, 1 + 8)


def test_as_a_backbone_under_a_users_head():
    backbone = convert(lively(FAMILIES["timm dinov2 registers"]()), **PARTS["similarity merge"])
    model = nn.Sequential(backbone, nn.Linear(48, 3)).train()
    model(IMAGES).sum().backward()
    assert model[1].weight.grad.any()
    assert backbone.patch_embed.proj.weight.grad.any()


@pytest.mark.parametrize("name", ["timm vit", "timm features_only", "hf ViT classifier"])
def test_a_whole_module_is_saved_and_opened(name, images):
    model = convert(lively(FAMILIES[name]()), score="norm", layers=[3], ratio=0.5)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    found, wanted = (adapter_of(each).outputs(images) for each in (again, model))
    assert all(torch.equal(found[key], value) for key, value in wanted.items())


def test_an_export_leaves_the_model_and_the_callers_random_numbers(tmp_path):
    model = convert(load("quickstart"), score="norm", layers=[3], ratio=0.5).train()
    model.blocks[1].eval()
    modes, random = [each.training for each in model.modules()], torch.get_rng_state()
    export_onnx(model, tmp_path, settings=ExportSettings(images=2))
    assert [each.training for each in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)


def test_the_control_takes_a_seed_of_any_size(images):
    chosen = []
    for seed in (3, 3 + 65519 * 2**50):
        model = convert(FAMILIES["timm vit"](), score="random", seed=seed)
        model(images)
        chosen.append(chosen_tokens(model))
    assert all(torch.equal(chosen[0][layer], places) for layer, places in chosen[1].items())
