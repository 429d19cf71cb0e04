"""The edits that the studio offers, and what each is in a recipe."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latentfast.recipe import Adain, Direction, Edit, LerpTowards, SlerpTowards, ToneMap

__all__ = ["KINDS", "EditKind", "colour_direction"]


@dataclass(frozen=True)
class EditKind:
    """One way to edit, with one slider.

    Attributes:
        label: What it is called on the page.
        about: What it does, in a sentence.
        low, high, start: The slider's ends, and where it begins.
        clip: It needs another clip, which its tensor is the latents of.
        colour: Or its tensor is the direction that adds this much red, green and blue.
    """

    label: str
    about: str
    low: float = 0.0
    high: float = 1.0
    start: float = 0.5
    clip: bool = False
    colour: tuple[float, float, float] | None = None


#: By the names that stand in a run's file.
KINDS = {
    "brightness": EditKind("Brightness", "Lighter or darker", -1, 1, 0.4, colour=(0.8, 0.8, 0.8)),
    "warmth": EditKind("Warmth", "Towards red, or towards blue", -1, 1, 0.4, colour=(0.6, 0.1, -0.6)),
    "tint": EditKind("Tint", "Towards green, or towards magenta", -1, 1, 0.4, colour=(-0.4, 0.5, -0.4)),
    "contrast": EditKind("Soften", "Large values of the latents pressed together: a tone map"),
    "towards": EditKind("Towards a clip", "On the great circle towards another clip's latents (slerp)", clip=True),
    "fade": EditKind("Fade to a clip", "Straight towards another clip's latents (lerp)", clip=True),
    "palette": EditKind("Colours of a clip", "The channels' means and deviations of another clip (AdaIN)", clip=True),
}


def recipe_edit(kind: str, amount: float, tensor: str | None, mask: str | None) -> Edit:
    """A layer as an edit of a recipe; tensor and mask are references."""
    if kind == "contrast":
        return ToneMap(amount, mask=mask)
    assert tensor is not None
    if kind == "towards":
        return SlerpTowards(tensor, amount, mask=mask)
    if kind == "fade":
        return LerpTowards(tensor, amount, mask=mask)
    if kind == "palette":
        return Adain(tensor, amount, mask=mask)
    return Direction(tensor, amount, mask=mask)


def colour_direction(weight: Tensor, colour: tuple[float, float, float], latents: Tensor) -> Tensor:
    """The direction that adds a colour to the preview of a clip and is most like what varies in it, `(1, C, 1, 1, 1)`.

    With the channels' covariance S over the clip's cells and the factors W: S·W·(W'·S·W)⁻¹·colour, of all directions
    that add the colour the shortest in units of the clip's own spread (Haufe et al. 2014, On the interpretation of
    weight vectors of linear models, equation 6). The decoder knows such latents: half of the warmth changed a clip of
    the embedded model by (32, 11, -45) levels where its preview changed by (35, 6, -38); along the shortest direction
    as such the same preview came out of the decoder as (13, 18, -13).

    Args:
        weight: RGB factors `(C, 3)`.
        colour: Red, green and blue, on the scale of [-1, 1].
        latents: Of the clip, `(1, C, T, H, W)`.
    """
    wide = weight.to(latents.device, torch.float64)
    spread = torch.cov(latents[0].flatten(1).double())
    # A clip of one shade has no spread; a little of the identity is always in it.
    ridge = 0.02 * spread.diagonal().mean().clamp_min(1e-6)
    spread = spread + ridge * torch.eye(len(spread), dtype=torch.float64, device=spread.device)
    shares = torch.linalg.solve(wide.T @ spread @ wide, torch.tensor(colour, dtype=torch.float64, device=wide.device))
    return (spread @ wide @ shares).to(latents.dtype).view(1, -1, 1, 1, 1)
