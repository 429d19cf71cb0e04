"""Scenes of one or two flat shapes with known factors, and the renderer that draws them as short clips.

The factors of a scene are what the embedded model is trained to follow and what :mod:`latentfast.tiny.judge`
reads back from pixels. Everything a caption cannot say (where exactly a shape is, how fast it goes, the tint of
the background) is the *layout*, drawn at random. Only torch is needed; the work is batched, runs on any device
and can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white")
SIZES = ("small", "big")
MOTIONS = ("left", "right", "up", "down", "nowhere", "around")
BACKGROUNDS = ("dark", "gray", "light", "green")
LIGHTS = ("dim", "bright")
LEFT, RIGHT, UP, DOWN, NOWHERE, AROUND = range(6)

SHAPE_FACTORS = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "motion": MOTIONS}
SCENE_FACTORS = {"background": BACKGROUNDS, "light": LIGHTS}

COLOUR_RGB = (
    (0.90, 0.15, 0.15),
    (0.15, 0.80, 0.25),
    (0.20, 0.35, 0.95),
    (0.95, 0.85, 0.15),
    (0.60, 0.25, 0.80),
    (0.98, 0.55, 0.10),
    (0.15, 0.85, 0.90),
    (0.97, 0.97, 0.97),
)
BACKGROUND_RGB = ((0.06, 0.06, 0.09), (0.40, 0.40, 0.43), (0.78, 0.78, 0.74), (0.10, 0.32, 0.18))
LIGHT_LEVEL = (0.55, 1.0)
RADIUS = (0.095, 0.17)  # of a small and a big shape, in picture widths
SIZE, FRAMES = 128, 25
_CANDIDATES = 16  # layouts tried for a scene of two shapes; the one whose shapes keep clear of each other is taken


@lru_cache(maxsize=64)
def constant(values: tuple, device: torch.device) -> Tensor:
    """A table of constants on a device, copied there once: a copy from the host cannot be part of a CUDA graph."""
    return torch.tensor(values, device=device)


def _check(name: str, value: str | None, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


@dataclass(frozen=True)
class Shape:
    """One shape of a scene: what it is, its colour, its size and where it moves."""

    shape: str = "circle"
    colour: str = "red"
    size: str = "big"
    motion: str = "nowhere"

    def __post_init__(self) -> None:
        for name, allowed in SHAPE_FACTORS.items():
            _check(name, getattr(self, name), allowed)


@dataclass(frozen=True)
class Scene:
    """One or two shapes before a background in a light. The second shape is drawn in front of the first.

    Raises:
        ValueError: a factor's value is unknown, or there are neither one nor two shapes.
    """

    shapes: tuple[Shape, ...] = (Shape(),)
    background: str = "dark"
    light: str = "bright"

    def __post_init__(self) -> None:
        if len(self.shapes) not in (1, 2):
            raise ValueError(f"shapes must hold one or two shapes; got {len(self.shapes)}")
        for name, allowed in SCENE_FACTORS.items():
            _check(name, getattr(self, name), allowed)


class Clips(NamedTuple):
    """Rendered clips: ``video`` (N, 3, T, H, W) in [-1, 1]; ``masks`` (N, 2, T, H, W), each shape's visible
    coverage in [0, 1].
    """

    video: Tensor
    masks: Tensor


class Layout(NamedTuple):
    """What a caption does not say, one row a scene: lengths in picture widths, the phase of "around" in radians."""

    radius: Tensor  # (N, 2)
    centre: Tensor  # (N, 2, 2) of the path, x then y
    reach: Tensor  # (N, 2): length of a straight path; 2.4 times the radius of a round one
    phase: Tensor  # (N, 2)
    tint: Tensor  # (N, 3), added to the background


# A table of factors is an int64 tensor (N, 10): shape, colour, size, motion of the first and of the second
# shape (-1 where there is none), background, light. It is what the batched code and the training pools work on.
TABLE_COLUMNS = 10


def to_table(scenes: Iterable[Scene], device: torch.device | str = "cpu") -> Tensor:
    """Encodes scenes as an int64 table (N, 10); see ``TABLE_COLUMNS``."""
    rows = []
    for scene in scenes:
        row: list[int] = []
        for k in range(2):
            if k < len(scene.shapes):
                row += [values.index(getattr(scene.shapes[k], name)) for name, values in SHAPE_FACTORS.items()]
            else:
                row += [-1] * len(SHAPE_FACTORS)
        rows.append(row + [values.index(getattr(scene, name)) for name, values in SCENE_FACTORS.items()])
    return torch.tensor(rows, dtype=torch.int64, device=device).view(-1, TABLE_COLUMNS)


def from_table(table: Tensor) -> list[Scene]:
    """The inverse of :func:`to_table`."""
    scenes = []
    for row in table.tolist():
        shapes = [
            Shape(*(values[row[4 * k + i]] for i, values in enumerate(SHAPE_FACTORS.values())))
            for k in range(2)
            if row[4 * k] >= 0
        ]
        scenes.append(Scene(tuple(shapes), BACKGROUNDS[row[8]], LIGHTS[row[9]]))
    return scenes


def random_table(
    n: int, *, two: float = 0.5, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Draws ``n`` scenes' factors uniformly; a scene has two shapes with probability ``two``.

    The two shapes of a scene differ in shape or colour, so that words can name one of them.
    """
    limits = [len(v) for v in SHAPE_FACTORS.values()] * 2 + [len(v) for v in SCENE_FACTORS.values()]
    columns = [torch.randint(0, k, (n,), generator=generator, device=device) for k in limits]
    table = torch.stack(columns, 1)
    alike = ((table[:, 0] == table[:, 4]) & (table[:, 1] == table[:, 5])).long()
    shift = torch.randint(1, len(COLOURS), (n,), generator=generator, device=device)
    table[:, 5] = (table[:, 5] + alike * shift) % len(COLOURS)
    single = torch.rand(n, generator=generator, device=device) >= two
    table[:, 4:8] = torch.where(single[:, None], -1, table[:, 4:8])
    return table


def random_scenes(n: int, *, two: float = 0.5, generator: torch.Generator | None = None) -> list[Scene]:
    """As :func:`random_table`, but as dataclasses."""
    return from_table(random_table(n, two=two, generator=generator))


def random_layout(table: Tensor, generator: torch.Generator | None = None) -> Layout:
    """Draws a layout for each scene of a table; two shapes keep clear of each other where a few tries find
    such a layout.
    """
    n, device, k = len(table), table.device, _CANDIDATES
    factors = table[:, :8].view(n, 1, 2, 4)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(n, k, 2, *shape, generator=generator, device=device)

    base = constant(RADIUS, device)[factors[..., 2].clamp_min(0)]
    radius = base * (0.93 + 0.14 * uniform())
    motion = factors[..., 3].expand(n, k, 2)
    horizontal, vertical = (motion == LEFT) | (motion == RIGHT), (motion == UP) | (motion == DOWN)
    around = motion == AROUND
    spread = uniform(2) - 0.5
    # A straight path is centred along its own axis, a round one near the middle: both stay inside the picture.
    room = torch.stack([horizontal | around, vertical | around], -1)
    width = torch.where(room, torch.where(around[..., None], 0.2, 0.06), 0.58)
    centre = 0.5 + spread * width
    reach = 0.5 + 0.12 * uniform()
    phase = 2 * math.pi * uniform()
    candidates = Layout(radius, centre, reach, phase, torch.zeros(n, k, 3, device=device))
    x, y = _paths(motion, candidates, torch.linspace(0, 1, 13, device=device))
    gap = torch.hypot(x[:, :, 0] - x[:, :, 1], y[:, :, 0] - y[:, :, 1]).amin(-1) - 0.92 * radius.sum(-1)
    # Every candidate that keeps clear is as good as any other: the random part decides.
    best = (gap.clamp_max(0) + 1e-4 * uniform()[..., 0]).argmax(1)
    at = torch.arange(n, device=device)
    tint = 0.012 * torch.randn(n, 3, generator=generator, device=device)
    return Layout(radius[at, best], centre[at, best], reach[at, best], phase[at, best], tint)


def _paths(motion: Tensor, layout: Layout, times: Tensor) -> tuple[Tensor, Tensor]:
    """Centres x, y (..., T) of shapes with motions (...) at ``times`` in [0, 1], (T,) or broadcastable to
    the result.
    """
    m, reach, phase = motion[..., None], layout.reach[..., None], layout.phase[..., None]
    step = (times - 0.5) * reach
    dx = torch.where(m == LEFT, -step, torch.where(m == RIGHT, step, 0.0))
    dy = torch.where(m == UP, -step, torch.where(m == DOWN, step, 0.0))
    turn, radius = phase + 2 * math.pi * times, reach / 2.4
    dx = torch.where(m == AROUND, radius * torch.cos(turn), dx)
    dy = torch.where(m == AROUND, radius * torch.sin(turn), dy)
    return layout.centre[..., :1] + dx, layout.centre[..., 1:] + dy


def _distance(x: Tensor, y: Tensor, shape: Tensor, radius: Tensor) -> Tensor:
    """Distance to the outline, negative inside (up to a factor near 1 for the star), of shapes given by
    their index.
    """
    far = torch.hypot(x, y)
    square = torch.maximum(x.abs(), y.abs()) - 0.88 * radius
    triangle = torch.maximum(x.abs() * math.sqrt(0.75) - y * 0.5, y) - 0.6 * radius
    star = far - radius * (0.76 + 0.28 * torch.cos(5 * torch.atan2(x, -y)))
    return torch.where(
        shape == 0, far - radius, torch.where(shape == 1, square, torch.where(shape == 2, triangle, star))
    )


def positions(table: Tensor, layout: Layout, times: Tensor) -> Tensor:
    """Centres (N, 2, T, 2), x then y in [0, 1], of both shapes at ``times``, (T,) or (N, T)."""
    motion = table[:, :8].view(-1, 2, 4)[..., 3]
    return torch.stack(_paths(motion, layout, times if times.ndim == 1 else times[:, None]), -1)


def draw(
    table: Tensor,
    layout: Layout,
    *,
    size: int = SIZE,
    times: Tensor | None = None,
    window: int | None = None,
    corner: Tensor | None = None,
) -> Clips:
    """Draws a table of factors with a given layout.

    Args:
        table: int64 (N, 10), see ``TABLE_COLUMNS``.
        layout: the scenes' layouts.
        size: width and height of the whole picture, in pixels.
        times: (T,) or (N, T) moments in [0, 1]; 25 even ones by default.
        window: draw only a ``window`` x ``window`` part of the picture whose upper left pixel is ``corner``,
            (N, 2) x then y.
        corner: see ``window``.

    Returns:
        Clips: ``video`` (N, 3, T, S, S) float32 in [-1, 1] and ``masks`` (N, 2, T, S, S), where S is ``window
            or size``.
    """
    n, device = len(table), table.device
    side = window or size
    times = torch.linspace(0, 1, FRAMES, device=device) if times is None else times
    factors = table[:, :8].view(n, 2, 4)
    px, py = positions(table, layout, times).unbind(-1)
    grid = (torch.arange(side, device=device) + 0.5).expand(n, side)
    gx = grid if corner is None else grid + corner[:, :1]
    gy = grid if corner is None else grid + corner[:, 1:]
    gx, gy = (gx / size).view(n, 1, 1, 1, side), (gy / size).view(n, 1, 1, side, 1)
    column = (n, 2, 1, 1, 1)
    inside = -_distance(
        gx - px[..., None, None], gy - py[..., None, None], factors[..., 0].view(column), layout.radius.view(column)
    )
    # The slope is that of a pixel's coverage by a straight edge, near enough.
    cover = torch.sigmoid(inside * (4.0 * size)) * (factors[..., 0] >= 0).view(column)
    back, front = cover[:, :1] * (1 - cover[:, 1:]), cover[:, 1:]
    colour = constant(COLOUR_RGB, device)[factors[..., 1].clamp_min(0)]  # (N, 2, 3)
    ground = constant(BACKGROUND_RGB, device)[table[:, 8]] + layout.tint
    rgb = (n, 3, 1, 1, 1)
    video = ground.view(rgb) * (1 - back - front) + colour[:, 0].view(rgb) * back + colour[:, 1].view(rgb) * front
    level = constant(LIGHT_LEVEL, device)[table[:, 9]].view(n, 1, 1, 1, 1)
    video = video * shading(gx, gy) * level
    return Clips(video.clamp(0, 1) * 2 - 1, torch.cat([back, front], 1))


def shading(x: Tensor, y: Tensor) -> Tensor:
    """The light falls from the lower right: brightness at picture coordinates in [0, 1]."""
    return 0.85 + 0.15 * (x + y)


@torch.no_grad()
def render(
    factors: Scene | Sequence[Scene] | Tensor,
    *,
    size: int = SIZE,
    num_frames: int = FRAMES,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Clips:
    """Renders scenes as clips, each with a layout drawn at random.

    Args:
        factors: a scene, scenes, or a table of factors (N, 10) as :func:`to_table` makes it.
        size: width and height in pixels.
        num_frames: frames of a clip; the same motion is spread over them.
        generator: makes the layout repeatable; the layout is drawn where the generator is, so a generator on
            the CPU gives the same scenes on every device.
        device: where to draw; by default where the table is, else the CPU.

    Returns:
        Clips: ``video`` (N, 3, T, H, W) float32 in [-1, 1] and ``masks`` (N, 2, T, H, W) float32 in [0, 1], the
            visible part
        of each shape; the second mask of a scene with one shape is zero.

    Raises:
        TypeError: ``factors`` is none of the three.
        ValueError: ``size`` or ``num_frames`` is not positive, or a table has the wrong shape.

    Example:
        >>> clips = render(Scene((Shape("star", "blue", "big", "left"),), background="gray"))
        >>> clips.video.shape
        torch.Size([1, 3, 25, 128, 128])
    """
    if size < 1 or num_frames < 1:
        raise ValueError(f"size and num_frames must be positive; got {size} and {num_frames}")
    if isinstance(factors, Scene):
        factors = [factors]
    if isinstance(factors, Tensor):
        if factors.ndim != 2 or factors.shape[1] != TABLE_COLUMNS or factors.dtype != torch.int64:
            raise ValueError(
                f"factors must be an int64 table (N, {TABLE_COLUMNS}); got {factors.dtype} {tuple(factors.shape)}"
            )
        table = factors if device is None else factors.to(device)
    elif isinstance(factors, Sequence) and all(isinstance(s, Scene) for s in factors):
        table = to_table(factors, device or "cpu")
    else:
        raise TypeError(f"factors must be a Scene, a sequence of them or an int64 table; got {type(factors).__name__}")
    times = torch.linspace(0, 1, num_frames, device=table.device)
    home = table.device if generator is None else generator.device
    layout = Layout(*(part.to(table.device) for part in random_layout(table.to(home), generator)))
    return draw(table, layout, size=size, times=times)
