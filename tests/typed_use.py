"""How a typed program uses the public names; read by the type checker, not run."""

from pathlib import Path
from typing import assert_type

import torch
from torch import nn

import tosa_convert
from tosa_convert import ConvertConfig, DistillSettings, ExportSettings, FinetuneSettings, Score
from tosa_convert.export.check import Check
from tosa_convert.measure.macs import Cost
from tosa_convert.planning.outcome import Plan


class Mine(Score):
    def read(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return keys.norm(dim=-1)


def use(images: torch.Tensor, photos: Path) -> None:
    model = assert_type(tosa_convert.load("deit_tiny", img_size=(224, 224), pretrained=False), nn.Module)
    assert_type(tosa_convert.find_plan(model, images, 0.8, by="latency"), Plan)
    config = assert_type(tosa_convert.plan(model, images, budget=0.75), ConvertConfig)
    assert_type(tosa_convert.convert(model, config), nn.Module)
    assert_type(tosa_convert.convert(model, score=Mine(), layers=[4, 8], ratio=0.5), nn.Module)
    assert_type(tosa_convert.flops(model), Cost)
    assert_type(tosa_convert.distill(model, photos, DistillSettings(steps=10)), dict)
    assert_type(tosa_convert.finetune(model, photos, FinetuneSettings(epochs=1.0), device="cpu"), dict)
    assert_type(tosa_convert.evaluate({"a": model, "b": tosa_convert.original(model)}, photos, reference="b"), dict)
    assert_type(tosa_convert.compare(model, photos, budgets=[0.9], methods=["tome"]), dict)
    assert_type(tosa_convert.random_control(model, seed=1), nn.Module)
    assert_type(tosa_convert.export_onnx(model, "exported", photos, ExportSettings(opset=20)), Check)
    assert_type(tosa_convert.save(model, photos), Path)
    tosa_convert.load(3)  # type: ignore[arg-type]
    tosa_convert.flops(model, "224")  # type: ignore[arg-type]
