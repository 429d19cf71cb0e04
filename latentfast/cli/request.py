"""What every command is asked: which model, where it runs, how it samples."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

import latentfast
from latentfast.cli.errors import UserError, one_line
from latentfast.cli.loading import load_pipeline, resolve_device, resolve_dtype
from latentfast.cli.sampler import Sampler

__all__ = ["Mask", "Request", "check_prompt"]


_option = functools.partial(typer.Option, rich_help_panel="Model and sampling")


@dataclass(frozen=True)
class Request:
    """The options that the commands share (see `grouped`); None leaves a value to the model."""

    model: Annotated[
        Path | None,
        _option(metavar="FOLDER", help="A local diffusers text-to-video pipeline; default: the embedded model."),
    ] = None
    device: Annotated[str, _option(help="auto, cpu, cuda or cuda:N.")] = "auto"
    dtype: Annotated[str, _option(help="auto, float32, bfloat16 or float16.")] = "auto"
    backend: Annotated[
        str | None, _option(metavar="NAME", help="native-cpu, cuda, triton or eager; default: the fastest there is.")
    ] = None
    steps: Annotated[int | None, _option(min=1, help="Denoising steps.")] = None
    guidance: Annotated[float | None, _option(min=0, help="Classifier-free guidance scale.")] = None
    height: Annotated[int | None, _option(min=1, help="Pixels.")] = None
    width: Annotated[int | None, _option(min=1, help="Pixels.")] = None
    frames: Annotated[int | None, _option(min=1, help="Frames of a clip.")] = None

    @contextmanager
    def sampler(self) -> Iterator[Sampler]:
        """The loaded pipeline with the asked settings; inside the block operations run on the asked backend."""
        device = resolve_device(self.device)
        dtype = resolve_dtype(self.dtype, device)
        with self._on_backend():
            yield Sampler(load_pipeline(self.model, device, dtype), self._call())

    def _call(self) -> dict[str, Any]:
        asked = {
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "height": self.height,
            "width": self.width,
            "num_frames": self.frames,
        }
        call: dict[str, Any] = {}
        if self.model is None:
            from latentfast import tiny

            call.update(tiny.RECOMMENDED)
        return call | {name: value for name, value in asked.items() if value is not None}

    def _on_backend(self) -> AbstractContextManager[None]:
        if self.backend is None:
            return nullcontext()
        known = {backend.name: backend for backend in latentfast.backends()}
        if self.backend not in known:
            raise UserError(f"--backend: expected {', '.join(known)}, got '{self.backend}'")
        if not known[self.backend].available:
            raise UserError(f"--backend: '{self.backend}' is not available here: {known[self.backend].reason}")
        return latentfast.use_backend(self.backend)


def check_prompt(name: str, text: str) -> str:
    """The prompt without outer spaces, refused if nothing is left."""
    if not text.strip():
        raise UserError(f"{name}: the prompt is empty")
    return text.strip()


@dataclass(frozen=True)
class Mask:
    """Where an edit may act: ``auto`` (where the attention looks), ``difference`` (where the two clips come apart), a
    box ``x0,y0,x1,y1`` in pixels, or a picture (white acts, black does not).
    """

    difference: bool = False
    box: tuple[int, int, int, int] | None = None
    picture: Path | None = None

    @classmethod
    def parse(cls, text: str) -> Mask:
        """Read the option's text; a picture is opened once to see that it is one."""
        if text in ("auto", "difference"):
            return cls(difference=text == "difference")
        parts = text.split(",")
        if len(parts) == 4:
            try:
                x0, y0, x1, y1 = (int(part) for part in parts)
            except ValueError as error:
                raise UserError(f"--mask: a box is four whole numbers x0,y0,x1,y1, got '{text}'") from error
            if not (0 <= x0 < x1 and 0 <= y0 < y1):
                raise UserError(f"--mask: a box needs 0 <= x0 < x1 and 0 <= y0 < y1, got '{text}'")
            return cls(box=(x0, y0, x1, y1))
        path = Path(text)
        if not path.is_file():
            raise UserError(f"--mask: expected auto, difference, a box x0,y0,x1,y1 or a picture's file, got '{text}'")
        _read_gray(path)
        return cls(picture=path)

    def on(self, sampler: Sampler, latents: Tensor) -> Tensor | None:
        """The mask on the latents' grid, ``(1, 1, 1, H, W)``; None for those that are found on the way.

        A cell belongs to it if any of its pixels does.
        """
        if self.box is None and self.picture is None:
            return None
        width, height = int(sampler.setting("width")), int(sampler.setting("height"))
        if self.picture is not None:
            pixels = (_read_gray(self.picture) >= 0.5).float()
        else:
            x0, y0, x1, y1 = self.box or (0, 0, 0, 0)
            if x1 > width or y1 > height:
                raise UserError(f"--mask: the box {x0},{y0},{x1},{y1} leaves the picture of {width}x{height}")
            pixels = torch.zeros(height, width)
            pixels[y0:y1, x0:x1] = 1
        cells = F.adaptive_max_pool2d(pixels[None, None], latents.shape[-2:])
        if not cells.any():
            raise UserError(f"--mask: {self.picture} has no white pixel: nothing may change")
        return cells[:, :, None].to(latents)


def _read_gray(path: Path) -> Tensor:
    """A picture as gray levels in [0, 1], ``(H, W)``."""
    import numpy
    from PIL import Image

    try:
        with Image.open(path) as image:
            return torch.from_numpy(numpy.asarray(image.convert("L"), dtype=numpy.float32) / 255)
    except (OSError, ValueError) as error:
        raise UserError(f"--mask: {path} is not a readable picture: {one_line(error)}") from error
