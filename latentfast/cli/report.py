"""The demo's page: one HTML file that needs no other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latentfast.cli.timing import Timing
from latentfast.cli.video import animation, data_uri, filmstrip

__all__ = ["Chart", "Panel", "Section", "duration", "render", "show_mask"]

CHART_WIDTH, CHART_HEIGHT = 560, 120

# What the page calls the kinds of work that the demo's stopwatch knows, in the order of the bar.
WORK = {
    "denoising": "transformer and scheduler",
    "decoding": "VAE decoding",
    "latentfast": "latentfast operations",
    "writing": "encoding and writing",
    "timing": "timing the operations",
}


@dataclass(frozen=True)
class Panel:
    """One clip on the page: a moving picture and a strip of its frames, both as data URIs."""

    caption: str
    moving: str
    strip: str
    width: int
    height: int

    @classmethod
    def of(cls, caption: str, clip: Tensor, fps: int) -> Panel:
        height, width = clip.shape[1:3]
        moving = data_uri(animation(clip, fps=fps), "image/webp")
        return cls(caption, moving, data_uri(filmstrip(clip), "image/webp"), width, height)


@dataclass(frozen=True)
class Chart:
    """A curve over gradient steps, with a logarithmic height."""

    caption: str
    values: Sequence[float]

    @property
    def view_box(self) -> str:
        return f"0 0 {CHART_WIDTH} {CHART_HEIGHT}"

    @property
    def points(self) -> str:
        """The curve's corners in an SVG polyline's notation."""
        logs = [math.log10(max(value, 1e-30)) for value in self.values]
        low, high = min(logs), max(logs)
        reach = (high - low) or 1.0
        step = CHART_WIDTH / max(len(logs) - 1, 1)
        corners = ((i * step, (high - log) / reach * (CHART_HEIGHT - 8) + 4) for i, log in enumerate(logs))
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)


@dataclass(frozen=True)
class Section:
    """One scene of the demo."""

    title: str
    text: str
    panels: list[Panel]
    facts: list[tuple[str, str]] = field(default_factory=list)
    columns: int = 1
    chart: Chart | None = None


def show_mask(clip: Tensor, mask: Tensor, frame_dim: int) -> Tensor:
    """The clip with everything outside the mask darkened and grayed.

    Args:
        clip: uint8 ``(T, H, W, 3)``.
        mask: one sample's, on the latents' grid, ``(1, t, h, w)``, or ``(t, 1, h, w)`` with ``frame_dim`` 1.
        frame_dim: the frames' dimension of the batch that the mask belongs to.
    """
    cells = mask.movedim(frame_dim - 1, 1)
    frames, height, width, _ = clip.shape
    # Latent frame 0 holds the first frame alone, each later one as many as the VAE packs together.
    packed = max(1, round((frames - 1) / max(cells.shape[1] - 1, 1)))
    index = ((torch.arange(frames) + packed - 1) // packed).clamp(max=cells.shape[1] - 1)
    full = F.interpolate(cells[0, :, None].float().cpu(), size=(height, width))[index, 0, :, :, None]
    gray = clip.float().mean(-1, keepdim=True) * 0.3
    return (full * clip + (1 - full) * gray).round().to(torch.uint8)


def duration(microseconds: float) -> str:
    """A time with three digits in the unit that suits it."""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= size:
            return f"{microseconds / size:.3g} {unit}"
    return f"{microseconds:.3g} µs"


def render(*, record: dict[str, Any], sections: Sequence[Section], timings: Sequence[Timing]) -> str:
    """The page as text.

    Args:
        record: what ``run.json`` says.
        sections: the scenes, in order.
        timings: the measured operations.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("latentfast.cli", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    seconds = record["times"]["by_work_s"]
    total = sum(seconds.values())
    work = [(key, name, seconds[key], seconds[key] / total) for key, name in WORK.items() if key in seconds]
    longest = max(max(timing.ours_us, timing.eager_us) / timing.eager_us for timing in timings)
    return environment.get_template("report.html.j2").render(
        record=record, sections=sections, timings=timings, work=work, duration=duration, longest=longest
    )
