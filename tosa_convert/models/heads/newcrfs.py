"""NeWCRFs (arXiv 2203.01502), written from the paper: neural window fully-connected CRFs, coarse to fine.

A pyramid pooling module takes the coarsest map to a first prediction. In each of four stages a conditional random
field is solved within windows: every place sends its prediction to the others of its window, by how much their features
agree (section 3.3), in two steps of which the second has its windows shifted. A pixel shuffle hands the prediction to
the next stage (section 3.4).

The paper's backbone is hierarchical. What it, and ToSA, leave open for a plain ViT: the scales come from
:class:`~tosa_convert.models.pyramid.Pyramid`, on the last layer of each quarter of the backbone; a map that windows do
not divide is padded, and what is padded is not seen; of odd maps the prediction is cut to the finer map.
"""

import torch
import torch.nn.functional as F
from torch import nn

from tosa_convert.models.dense import Head
from tosa_convert.models.pyramid import Pyramid

POOLS = (1, 2, 3, 6)
POOLED = 512
STAGES = ((1024, 32), (512, 16), (256, 8), (128, 4))
"""Width and heads of each, the coarsest first."""
WINDOW = 7
EXPANSION = 4


class NewCrfs(Head):
    def __init__(self, width, channels):
        super(Head, self).__init__()
        self.pyramid, self.pooling = Pyramid(width), PyramidPooling(width, POOLED)
        stages, before = [], POOLED
        for own, heads in STAGES:
            stages.append(Stage(width, before, own, heads))
            before = own // 4  # what a pixel shuffle leaves
        self.stages = nn.ModuleList(stages)
        self.last = nn.Conv2d(STAGES[-1][0], channels, 3, padding=1)

    def forward(self, maps):
        features = self.pyramid(maps)[::-1]
        found = self.pooling(features[0])
        for index, (stage, feature) in enumerate(zip(self.stages, features, strict=True)):
            if index:
                rows, columns = feature.shape[-2:]
                found = F.pixel_shuffle(found, 2)[..., :rows, :columns]
            found = stage(feature, found)
        return self.last(found)


class PyramidPooling(nn.Module):
    """(B, C, H, W) → (B, out, H, W): what the whole map, its halves, thirds and sixths hold on average, beside each
    place's own (PSPNet, arXiv 1612.01105, section 3.2)."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.parts = nn.ModuleList(nn.Sequential(nn.Conv2d(width, out, 1), nn.ReLU()) for _ in POOLS)
        self.joined = nn.Sequential(nn.Conv2d(width + out * len(POOLS), out, 3, padding=1), nn.ReLU())

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        size = features.shape[-2:]
        pooled = [part(average(features, pool)) for part, pool in zip(self.parts, POOLS, strict=True)]
        wide = [F.interpolate(each, size=size, mode="bilinear", align_corners=False) for each in pooled]
        return self.joined(torch.cat([features, *wide], dim=1))


def average(features: torch.Tensor, parts: int) -> torch.Tensor:
    """(B, C, H, W) → (B, C, parts, parts): means of equal parts, as adaptive average pooling has them, as two products
    with matrices, which can be exported where the number of parts does not divide the size."""
    rows, columns = (_shares(side, parts, features) for side in features.shape[-2:])
    return rows @ features @ columns.mT


def _shares(side: int, parts: int, like: torch.Tensor) -> torch.Tensor:
    """(parts, side): each row averages over its part."""
    places = torch.arange(side, device=like.device)
    part = torch.arange(parts, device=like.device)
    first = (part * side) // parts
    last = ((part + 1) * side + parts - 1) // parts
    inside = ((places >= first[:, None]) & (places < last[:, None])).to(like.dtype)
    return inside / inside.sum(1, keepdim=True)


class Stage(nn.Module):
    """Two steps of the CRF at one scale: features (B, C, H, W) and a coarser prediction (B, P, H, W) → (B, own, H, W)
    of the finer one."""

    def __init__(self, width: int, before: int, own: int, heads: int):
        super().__init__()
        self.features = nn.Conv2d(width, own, 3, padding=1)
        self.prediction = nn.Conv2d(before, own, 3, padding=1)
        self.steps = nn.ModuleList(WindowCrf(own, heads, shift) for shift in (0, WINDOW // 2))
        self.norm = nn.LayerNorm(own)

    def forward(self, features: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        features = self.features(features).permute(0, 2, 3, 1)
        found = self.prediction(prediction).permute(0, 2, 3, 1)
        for step in self.steps:
            found = step(features, found)
        return self.norm(found).permute(0, 3, 1, 2)


class WindowCrf(nn.Module):
    """One step: the prediction plus what its window sends (the pairwise potential), then two layers that optimise it.

    Queries and keys come from the features, values from the prediction (section 3.3, equations 7 and 8).
    """

    def __init__(self, width: int, heads: int, shift: int):
        super().__init__()
        self.heads, self.shift = heads, shift
        self.norm_features, self.norm_prediction = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys, self.values = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.positions = nn.Parameter(torch.zeros((2 * WINDOW - 1) ** 2, heads))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.register_buffer("offsets", _offsets(), persistent=False)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, EXPANSION * width), nn.GELU(), nn.Linear(EXPANSION * width, width))

    def forward(self, features: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) both → (B, H, W, C)."""
        rows, columns = prediction.shape[1:3]
        queries, keys = self.queries_keys(self.norm_features(features)).chunk(2, dim=-1)
        values = self.values(self.norm_prediction(prediction))
        queries, keys, values = (self._windows(part) for part in (queries, keys, values))
        bias = self.positions[self.offsets].permute(2, 0, 1)  # (heads, places, places)
        mask = bias[None] + window_mask(rows, columns, self.shift, bias)[:, None]
        mask = mask.expand(prediction.shape[0], *mask.shape).flatten(0, 1)  # windows of every image
        sent = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        prediction = prediction + self.out(self._whole(sent, rows, columns))
        return prediction + self.mlp(self.norm_mlp(prediction))

    def _windows(self, part: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) → (B · windows, heads, places, C / heads)."""
        split = windowed(part, self.shift)
        return split.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _whole(self, sent: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """The other way round, without what was padded."""
        return joined(sent.transpose(1, 2).flatten(2), rows, columns, self.shift)


def windowed(part: torch.Tensor, shift: int) -> torch.Tensor:
    """(B, H, W, C) → (B · windows, places, C); padded at the right and at the bottom to whole windows, then shifted."""
    down, across = _missing(part.shape[1]), _missing(part.shape[2])
    part = F.pad(part, (0, 0, 0, across, 0, down))
    if shift:
        part = part.roll((-shift, -shift), dims=(1, 2))
    split = part.unflatten(2, (-1, WINDOW)).unflatten(1, (-1, WINDOW))  # (B, down, 7, across, 7, C)
    return split.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def joined(windows: torch.Tensor, rows: int, columns: int, shift: int) -> torch.Tensor:
    """The inverse of :func:`windowed`, (B, rows, columns, C)."""
    down, across = (rows + _missing(rows)) // WINDOW, (columns + _missing(columns)) // WINDOW
    split = windows.unflatten(1, (WINDOW, WINDOW)).unflatten(0, (-1, down, across)).transpose(2, 3)
    part = split.flatten(3, 4).flatten(1, 2)
    if shift:
        part = part.roll((shift, shift), dims=(1, 2))
    return part[:, :rows, :columns]


def window_mask(rows: int, columns: int, shift: int, like: torch.Tensor) -> torch.Tensor:
    """(windows, places, places), −∞ between places that are no neighbours: parts of a shifted window that lie at
    opposite edges of the map, and what is padded."""
    down, across = rows + _missing(rows), columns + _missing(columns)
    areas = _areas(down, rows, shift, like)[:, None] * 4 + _areas(across, columns, shift, like)[None]
    places = windowed(areas[None, ..., None], 0)[..., 0]
    apart = places[:, :, None] != places[:, None, :]
    return torch.zeros_like(apart, dtype=like.dtype).masked_fill(apart, float("-inf"))


def _areas(whole: int, side: int, shift: int, like: torch.Tensor) -> torch.Tensor:
    """Which of the areas that may see each other a row is in, of rows that are shifted already: what came round from
    the other edge is one, what is padded another."""
    at = torch.arange(whole, device=like.device)
    before = (at + shift) % whole
    return (at >= whole - shift).to(like.dtype) + 2 * (before >= side).to(like.dtype)


def _missing(side: int) -> int:
    return -side % WINDOW


def _offsets() -> torch.Tensor:
    """(places, places): which entry of the table of relative positions belongs to each pair (Swin, arXiv 2103.14030,
    section 3.2)."""
    at = torch.stack(torch.meshgrid(torch.arange(WINDOW), torch.arange(WINDOW), indexing="ij")).flatten(1)
    apart = at[:, :, None] - at[:, None, :] + WINDOW - 1
    return apart[0] * (2 * WINDOW - 1) + apart[1]
