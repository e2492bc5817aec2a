"""Render rooms and streets with exact depth: what is trained and tested on here is drawn, not photographed.

    python benchmarks/render_rooms.py --out rooms --train 3000 --test 300 --plan 48

Boxes with procedural textures in a room, or between the fronts of a street, seen from a random place. Each image has
its depth along the camera's axis, in millimetres as 16-bit PNG (sky: 0, not known), in the layout of depth:ROOT:
OUT/train, OUT/test and OUT/plan hold images/ and depth/. The same seed draws the same images.
"""

import argparse
import math
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

FAR = 60.0
STREETS = 0.4
"""Share of the images."""


class Scene:
    """Boxes (centre, half sizes, turn about the vertical axis), planes and a light; y points down, z ahead."""

    def __init__(self, random: np.random.Generator):
        self.random = random
        self.boxes: list[tuple[np.ndarray, np.ndarray, float]] = []
        self.inside: tuple[np.ndarray, np.ndarray] | None = None  # a room: its centre and half sizes
        self.street: float | None = None  # half its width
        if random.random() < STREETS:
            self._street()
        else:
            self._room()
        light = random.normal(size=3) * (1, 0.5, 1) + (0, -1.5, 0)
        self.light = light / np.linalg.norm(light)

    def _room(self) -> None:
        random = self.random
        half = np.array([random.uniform(1.5, 4), random.uniform(1.2, 1.6), random.uniform(2, 5)])
        height = random.uniform(1.1, 1.7)  # of the camera above the floor
        centre = np.array([random.uniform(-0.6, 0.6) * half[0], height - half[1], random.uniform(-0.1, 0.8) * half[2]])
        self.inside = (centre, half)
        for _ in range(random.integers(4, 12)):
            size = random.uniform(0.1, 0.7, 3) * (1, random.choice([0.5, 1.0, 1.6]), 1)
            place = centre + random.uniform(-1, 1, 3) * (half - 0.3)
            place[1] = height - size[1]  # on the floor
            if random.random() < 0.3:  # or at a wall
                place[1] = random.uniform(centre[1] - half[1], height) - size[1]
            if np.hypot(place[0], place[2]) > 0.9 + np.hypot(size[0], size[2]):
                self.boxes.append((place, size, random.uniform(0, math.pi)))

    def _street(self) -> None:
        random = self.random
        self.street, height = random.uniform(4, 10), random.uniform(1.3, 2.2)
        self.height = height
        for side in (-1, 1):
            ahead = random.uniform(-4, 4)
            while ahead < FAR:
                length, tall, deep = random.uniform(3, 14), random.uniform(2, 10), random.uniform(2, 4)
                if random.random() < 0.85:
                    setback = random.uniform(0, 1.5)
                    place = np.array([side * (self.street + deep + setback), height - tall, ahead + length / 2])
                    self.boxes.append((place, np.array([deep, tall, length / 2 - 0.05]), 0.0))
                ahead += length + random.choice([0.0, random.uniform(0, 5)])
        for _ in range(random.integers(2, 10)):
            size = random.uniform((0.2, 0.4, 0.2), (1.1, 1.0, 2.4))
            x, z = random.uniform(-0.9, 0.9) * self.street, random.uniform(4, 40)
            self.boxes.append(
                (np.array([x, height - size[1], z]), size, random.choice([0.0, random.uniform(0, math.pi)]))
            )

    def render(self, side: int) -> tuple[np.ndarray, np.ndarray]:
        """(side, side, 3) uint8, and metres along the camera's axis, 0 where there is nothing."""
        random = self.random
        rays, axis = _rays(side, random)
        nearest, shade = np.full(len(rays), np.inf), np.zeros((len(rays), 3))
        if self.inside is not None:
            self._draw(nearest, shade, rays, *self.inside, 0.0, inside=True)
        else:
            with np.errstate(divide="ignore"):
                ground = np.where(rays[:, 1] > 1e-6, self.height / rays[:, 1], np.inf)
            self._paint(
                nearest, shade, rays, ground, np.tile((0.0, -1.0, 0.0), (len(rays), 1)), random.integers(1 << 30)
            )
        for centre, half, turn in self.boxes:
            self._draw(nearest, shade, rays, centre, half, turn)
        depth = nearest * (rays @ axis)
        known = np.isfinite(nearest) & (depth < FAR)
        sky = np.array([0.55, 0.7, 0.95]) * (1 - 0.5 * np.clip(-rays[:, 1:2], 0, 1))
        haze = np.exp(-np.where(known, nearest, FAR) / random.uniform(60, 200))[:, None]
        colour = np.where(known[:, None], shade * haze + 0.7 * (1 - haze), sky)
        colour = colour + random.normal(scale=random.uniform(0, 0.02), size=colour.shape)
        picture = (255 * np.clip(colour * random.uniform(0.7, 1.2), 0, 1)).round().astype(np.uint8)
        return picture.reshape(side, side, 3), np.where(known, depth, 0).reshape(side, side)

    def _draw(self, nearest, shade, rays, centre, half, turn, inside=False) -> None:
        """A box by the slab method: seen from outside its nearer faces, from inside its farther ones."""
        cos, sin = math.cos(turn), math.sin(turn)
        turned = np.stack([cos * rays[:, 0] - sin * rays[:, 2], rays[:, 1], sin * rays[:, 0] + cos * rays[:, 2]], 1)
        start = -np.array([cos * centre[0] - sin * centre[2], centre[1], sin * centre[0] + cos * centre[2]])
        turned = np.where(np.abs(turned) < 1e-9, 1e-9, turned)
        first, second = (-half - start) / turned, (half - start) / turned
        enters, leaves = np.minimum(first, second), np.maximum(first, second)
        entry, leave = enters.max(1), leaves.min(1)
        face = leaves.argmin(1) if inside else enters.argmax(1)
        hit = (leave > 0) if inside else (leave > entry) & (entry > 0.05)
        distance = np.where(hit, leave if inside else entry, np.inf)
        normal = np.zeros_like(turned)
        normal[np.arange(len(face)), face] = -np.sign(turned[np.arange(len(face)), face])
        back = np.stack(
            [cos * normal[:, 0] + sin * normal[:, 2], normal[:, 1], -sin * normal[:, 0] + cos * normal[:, 2]], 1
        )
        self._paint(nearest, shade, rays, distance, back, self.random.integers(1 << 30))

    def _paint(self, nearest, shade, rays, distance, normal, seed) -> None:
        closer = distance < nearest
        if not closer.any():
            return
        nearest[closer] = distance[closer]
        points, normal = rays[closer] * distance[closer, None], normal[closer]
        face = np.abs(normal).argmax(1)
        across = np.where(
            face[:, None] == 0, points[:, [2, 1]], np.where(face[:, None] == 1, points[:, [0, 2]], points[:, :2])
        )
        side = (face * 2 + (normal.sum(1) > 0)).astype(int)
        light = 0.45 + 0.55 * np.clip(normal @ self.light, 0, 1)
        for each in np.unique(side):
            here, place = side == each, np.flatnonzero(closer)[side == each]
            shade[place] = _texture(across[here], np.random.default_rng((seed, int(each)))) * light[here, None]


def _rays(side: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors (side², 3) through the pixels of a pinhole camera that is turned a little, and its axis."""
    focal = side / (2 * math.tan(math.radians(random.uniform(28, 36))))  # of half the field of view
    at = (np.arange(side) + 0.5 - side / 2) / focal
    across, down = np.meshgrid(at, at)
    rays = np.stack([across, down, np.ones_like(across)], -1).reshape(-1, 3)
    pitch, yaw, roll = np.radians([random.uniform(-8, 12), random.uniform(-25, 25), random.normal(scale=1.5)])
    turn = _about(1, yaw) @ _about(0, -pitch) @ _about(2, roll)
    rays = rays / np.linalg.norm(rays, axis=1, keepdims=True)
    return rays @ turn.T, turn @ np.array([0, 0, 1.0])


def _about(axis: int, angle: float) -> np.ndarray:
    one, two = [index for index in range(3) if index != axis]
    turn = np.eye(3)
    turn[[one, two], [one, two]] = math.cos(angle)
    turn[one, two], turn[two, one] = -math.sin(angle), math.sin(angle)
    return turn


def _texture(at: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Colours (N, 3) of places (N, 2) in metres on a face: plain, chequered, striped, tiled or cloudy."""
    base, other = random.uniform(0.15, 0.95, (2, 3))
    kind, size = random.integers(5), random.uniform(0.08, 0.8)
    turn = random.uniform(0, math.pi) if random.random() < 0.3 else 0.0
    at = at @ np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]) / size
    if kind == 0:
        mix = np.zeros(len(at))
    elif kind == 1:
        mix = (np.floor(at).sum(1) % 2).astype(float)
    elif kind == 2:
        mix = (np.floor(at[:, 0]) % 2).astype(float)
    elif kind == 3:
        mix = (np.abs(at - np.round(at)).min(1) < 0.06).astype(float)
    else:
        waves, phases = random.normal(size=(6, 2)) * 2, random.uniform(0, 2 * math.pi, 6)
        mix = 0.5 + 0.5 * np.sin(at @ waves.T + phases).mean(1) * 1.6
    grain = 0.04 * np.sin(at @ (random.normal(size=(4, 2)) * 9).T + random.uniform(0, 6, 4)).sum(1)
    mix = np.clip(mix, 0, 1)[:, None]
    return np.clip(base * (1 - 0.6 * mix) + other * 0.6 * mix + grain[:, None], 0, 1)


def render(folder: Path, count: int, side: int, seed: int) -> None:
    for name in ("images", "depth"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in track(range(count), description=str(folder)):
        picture, depth = Scene(np.random.default_rng((seed, index))).render(side)
        Image.fromarray(picture).save(folder / "images" / f"{index:05d}.png")
        Image.fromarray((1000 * depth).round().astype(np.uint16)).save(folder / "depth" / f"{index:05d}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--train", type=int, default=3000)
    parser.add_argument("--test", type=int, default=300)
    parser.add_argument("--plan", type=int, default=48)
    parser.add_argument("--side", type=int, default=224, help="pixels")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for offset, name in enumerate(("train", "test", "plan")):
        render(given.out / name, getattr(given, name), given.side, given.seed * 3 + offset)


if __name__ == "__main__":
    main()
