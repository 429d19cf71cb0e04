"""Reads the factors of a scene and the masks of its shapes back from pixels.

A small network, trained on rendered clips only (``tools/train_tiny/train_judge.py``), labels every pixel of
every frame with a colour (or background) and a kind of shape, and each frame with background, light and number
of shapes. What shape there is, how big, and where it moves then follows from those labels over the whole clip
by geometry. How often it is right on rendered clips that it has not seen stands in ``MODEL_CARD.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentfast.tiny.scene import (
    BACKGROUNDS,
    COLOURS,
    LIGHTS,
    RADIUS,
    SHAPE_FACTORS,
    SHAPES,
    SIZE,
    SIZES,
    Scene,
    Shape,
)

# Area of a shape in units of its radius squared: circle, square, triangle, star.
_AREA = (3.1416, 3.0976, 1.8706, 1.9378)
_SIZE_LIMIT = (RADIUS[0] * RADIUS[1]) ** 0.5
_SECOND_COLOUR = 40.0  # pixels a frame of 128 x 128 from which a second colour is a second shape and no fringe
_MOVES = 0.06  # standard deviation of the centre, in picture widths, from which a shape moves


class Reading(NamedTuple):
    """What the judge saw in a clip: ``scene``, and ``masks`` (2, T, H, W), the probability that a pixel is the
    shape's.

    The shapes are ordered by area, the larger first; the second mask is zero where one shape was seen.
    """

    scene: Scene
    masks: Tensor


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.GroupNorm(outputs // 8, outputs), nn.SiLU()
    )


class JudgeNet(nn.Module):
    """A U-shaped network on single frames of 128 x 128; about 0.1M parameters."""

    def __init__(self, widths: Sequence[int] = (16, 24, 32, 48)) -> None:
        super().__init__()
        first, *rest = widths
        self.stem = nn.Sequential(_block(12, first), _block(first, first))
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        width = first
        for w in rest:
            self.down.append(nn.Sequential(_block(width, w, 2), _block(w, w)))
            self.up.insert(0, nn.Sequential(_block(w + width, width), _block(width, width)))
            width = w
        self.pixels = nn.Conv2d(first, 4 * (len(COLOURS) + 1), 1)
        self.shape = nn.Conv2d(first, len(SHAPES), 1)
        self.frame = nn.Linear(2 * width + 2 * first, len(BACKGROUNDS) + len(LIGHTS) + 2)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Frames (N, 3, 128, 128) in [-1, 1] to the logits of each pixel's colour (N, 9, 128, 128; the last is
        background), each pixel's kind of shape (N, 4, 128, 128), and the frame's background, light and number
        of shapes (N, 4 + 2 + 2).
        """
        x = self.stem(F.pixel_unshuffle(frames, 2))
        skips = []
        for down in self.down:
            skips.append(x)
            x = down(x)
        deep = [x.mean((2, 3)), x.amax((2, 3))]
        for up in self.up:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = up(torch.cat([x, skips.pop()], 1))
        colour = F.pixel_shuffle(self.pixels(x), 2)
        shape = F.interpolate(self.shape(x), scale_factor=2, mode="bilinear", align_corners=False)
        return colour, shape, self.frame(torch.cat([*deep, x.mean((2, 3)), x.amax((2, 3))], 1))


class Judge:
    """The network with its weights, and the geometry that turns its labels into a scene.

    Args:
        net: a trained network; by default the one in the package.
        device: where to compute.

    Raises:
        FileNotFoundError: the package holds no weights.
    """

    def __init__(self, net: JudgeNet | None = None, device: torch.device | str = "cpu") -> None:
        self.net = (net or _packaged()).to(device).eval()
        self.device = torch.device(device)

    @torch.no_grad()
    def read(self, video: Tensor) -> list[Reading]:
        """Reads clips.

        Args:
            video: (N, 3, T, 128, 128) in [-1, 1], any floating dtype.

        Returns:
            list[Reading]: one a clip, the masks in float32 on the judge's device.

        Raises:
            ValueError: the shape is another.

        Example:
            >>> from latentfast.tiny import Scene, Shape, render
            >>> clips = render(Scene((Shape("star", "blue"),)))
            >>> Judge().read(clips.video)[0].scene.shapes[0].colour
            'blue'
        """
        if video.ndim != 5 or video.shape[1] != 3 or video.shape[3:] != (SIZE, SIZE):
            raise ValueError(f"video must be (N, 3, T, {SIZE}, {SIZE}); got {tuple(video.shape)}")
        return [self._read_one(clip) for clip in video]

    def _read_one(self, clip: Tensor) -> Reading:
        colour, shape, frame = self.net(clip.movedim(1, 0).to(self.device, torch.float32))
        colour, shape = colour.softmax(1)[:, :-1], shape.softmax(1)
        votes = frame.mean(0)
        background = int(votes[:4].argmax())
        light = int(votes[4:6].argmax())
        two = bool(votes[7] > votes[6])
        area = torch.einsum("tchw,tshw->cs", colour, shape) / len(clip[0])
        masks, found = _separate(colour, shape, area, two)
        shapes = [Shape(SHAPES[s], COLOURS[c], *_size_and_motion(m, s)) for m, (c, s) in zip(masks, found, strict=True)]
        both = torch.stack([*masks, torch.zeros_like(masks[0])][:2])
        return Reading(Scene(tuple(shapes), BACKGROUNDS[background], LIGHTS[light]), both)


def _separate(colour: Tensor, shape: Tensor, area: Tensor, two: bool) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """Finds the shapes: by colour where there are two colours, else by kind. Masks (T, H, W) and (colour,
    kind) of each.
    """
    by_colour = area.sum(1)
    first, second = by_colour.topk(2).indices.tolist()
    if not two:
        return [colour.sum(1)], [(first, int(area[first].argmax()))]
    if by_colour[second] >= _SECOND_COLOUR:
        return [colour[:, c] for c in (first, second)], [(c, int(area[c].argmax())) for c in (first, second)]
    a, b = area[first].topk(2).indices.tolist()
    share = shape[:, [a, b]] / shape[:, [a, b]].sum(1, keepdim=True).clamp_min(1e-6)
    return [colour[:, first] * share[:, k] for k in range(2)], [(first, a), (first, b)]


def _size_and_motion(mask: Tensor, kind: int) -> tuple[str, str]:
    solid = (mask > 0.5).float()
    area = solid.mean((1, 2))
    whole = area.quantile(0.8)  # a shape that is hidden for some frames still shows its size in others
    size = SIZES[int((whole / _AREA[kind]).sqrt() > _SIZE_LIMIT)]
    weight = (area > 0.5 * whole).float() * (area > 0)
    if weight.sum() < 2:
        return size, "nowhere"
    t, h, w = mask.shape
    solid = solid / solid.sum((1, 2), keepdim=True).clamp_min(1)
    x = (solid.sum(1) * torch.linspace(0, 1, w, device=mask.device)).sum(1)
    y = (solid.sum(2) * torch.linspace(0, 1, h, device=mask.device)).sum(1)
    track = torch.stack([x, y, torch.linspace(-1, 1, t, device=mask.device)])
    mean = (track * weight).sum(1, keepdim=True) / weight.sum()
    spread = (track - mean) * weight
    covariance = (spread @ (track - mean).T) / weight.sum()
    dx, dy = covariance[0, 0].sqrt().item(), covariance[1, 1].sqrt().item()
    if max(dx, dy) < _MOVES:
        return size, "nowhere"
    if min(dx, dy) > 0.45 * max(dx, dy):
        return size, "around"
    forward = covariance[0 if dx > dy else 1, 2] > 0
    return size, (("left", "right") if dx > dy else ("up", "down"))[int(forward)]


def agreement(wanted: Scene, seen: Scene) -> dict[str, bool]:
    """Which factors of ``wanted`` are right in ``seen``; shapes are paired so that most agree.

    Returns:
        dict[str, bool]: shape, colour, size, motion (of all shapes), background, light, count, ``binding``
            (shape and colour of all
        shapes) and ``all``.
    """
    result = {"background": wanted.background == seen.background, "light": wanted.light == seen.light}
    result["count"] = len(wanted.shapes) == len(seen.shapes)
    if not result["count"]:
        result |= dict.fromkeys(SHAPE_FACTORS, False)
    else:

        def compare(order: Sequence[Shape]) -> dict[str, list[bool]]:
            pairs = list(zip(wanted.shapes, order, strict=True))
            return {f: [getattr(a, f) == getattr(b, f) for a, b in pairs] for f in SHAPE_FACTORS}

        def worth(way: dict[str, list[bool]]) -> tuple[int, int]:
            both = sum(s and c for s, c in zip(way["shape"], way["colour"], strict=True))
            return both, sum(map(sum, way.values()))

        best = max(compare(seen.shapes), compare(seen.shapes[::-1]), key=worth)
        result |= {f: all(v) for f, v in best.items()}
    result["binding"] = result["shape"] and result["colour"]
    result["all"] = all(result.values())
    return result


def weights_file() -> Path:
    return Path(__file__).parent / "weights" / "judge.safetensors"


@lru_cache(maxsize=1)
def _packaged_state() -> dict[str, Tensor]:
    from latentfast.tiny.pipeline import require

    if not weights_file().exists():
        raise FileNotFoundError(f"the judge's weights are missing: {weights_file()}; see tools/train_tiny")
    return require("safetensors.torch").load_file(str(weights_file()))


def _packaged() -> JudgeNet:
    net = JudgeNet()
    net.load_state_dict({k: v.float() for k, v in _packaged_state().items()})
    return net
