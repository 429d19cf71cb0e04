"""The edits that come with latentfast: each is one of its operations, with the parameters as data.

All of them take `latents` of any floating dtype and give new latents like them; tensors must be on the latents' device
and, masks aside, of their dtype. Shapes and formulas are those of the operation that each names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from torch import Tensor

import latentfast
from latentfast.recipe.edit import Edit, register
from latentfast.recipe.masks import Mask
from latentfast.recipe.parameters import Number, OneOf, TensorRef, Whole
from latentfast.recipe.smoothing import smoothed
from latentfast.recipe.tensors import Resolve

__all__ = [
    "Adain",
    "Blend",
    "Confine",
    "Direction",
    "Directions",
    "FrequencyMix",
    "LerpTowards",
    "MaskedEdit",
    "NlerpTowards",
    "ScaleNoise",
    "SlerpTowards",
    "Standardize",
    "TemporalSmooth",
    "ToneMap",
    "Unstandardize",
]

_Dims = tuple[int, ...]


@dataclass(frozen=True)
class MaskedEdit(Edit):
    """An edit that a mask may confine: subclasses have `edited`, and outside the mask the latents keep their bits."""

    mask: Mask | None = field(default=None, kw_only=True)

    def apply(self, latents: Tensor, resolve: Resolve) -> Tensor:
        edited = self.edited(latents, resolve)
        return edited if self.mask is None else latentfast.blend(latents, edited, resolve.mask(self.mask, latents))

    def edited(self, latents: Tensor, resolve: Resolve) -> Tensor:
        """The latents edited everywhere."""
        raise NotImplementedError


# --- Towards another latent ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Towards(MaskedEdit):
    target: TensorRef
    t: Annotated[float, Number()]
    dim: _Dims | None = None


@register("lerp_towards")
@dataclass(frozen=True)
class LerpTowards(_Towards):
    """Straight towards a target: `latentfast.lerp(latents, target, t)`."""

    def edited(self, latents: Tensor, resolve: Resolve) -> Tensor:
        return latentfast.lerp(latents, resolve(self.target, latents.device), self.t, dim=self.dim)


@register("nlerp_towards")
@dataclass(frozen=True)
class NlerpTowards(_Towards):
    """Straight towards a target, the length between those of both: `latentfast.nlerp(latents, target, t)`."""

    def edited(self, latents: Tensor, resolve: Resolve) -> Tensor:
        return latentfast.nlerp(latents, resolve(self.target, latents.device), self.t, dim=self.dim)


@register("slerp_towards")
@dataclass(frozen=True)
class SlerpTowards(_Towards):
    """On the great circle towards a target: `latentfast.slerp(latents, target, t)`."""

    def edited(self, latents: Tensor, resolve: Resolve) -> Tensor:
        return latentfast.slerp(latents, resolve(self.target, latents.device), self.t, dim=self.dim)


# --- Along directions ------------------------------------------------------------------------------------------------


@register("direction")
@dataclass(frozen=True)
class Direction(Edit):
    """Along a direction that broadcasts to the latents: latents + strength · mask · direction, in one launch."""

    direction: TensorRef
    strength: Annotated[float, Number()]
    mask: Mask | None = field(default=None, kw_only=True)

    def apply(self, latents: Tensor, resolve: Resolve) -> Tensor:
        mask = None if self.mask is None else resolve.mask(self.mask, latents)
        direction = resolve(self.direction, latents.device)
        # (1, *direction): one direction of `edit`, with the dimensions that it lets out
        rows = direction[(None,) * max(1, latents.ndim + 1 - direction.ndim)]
        return latentfast.edit(latents, rows, (self.strength,), mask)


@register("directions")
@dataclass(frozen=True)
class Directions(Edit):
    """Along N directions `(N, …)` in one launch: `latentfast.edit(latents, directions, strengths, mask)`."""

    directions: TensorRef
    strengths: tuple[float, ...]
    mask: Mask | None = field(default=None, kw_only=True)

    def apply(self, latents: Tensor, resolve: Resolve) -> Tensor:
        mask = None if self.mask is None else resolve.mask(self.mask, latents)
        return latentfast.edit(latents, resolve(self.directions, latents.device), self.strengths, mask)


# --- By a mask -------------------------------------------------------------------------------------------------------


@register("blend")
@dataclass(frozen=True)
class Blend(Edit):
    """Another latent inside the mask: `latentfast.blend(latents, edited, mask)`."""

    edited: TensorRef
    mask: Mask

    def apply(self, latents: Tensor, resolve: Resolve) -> Tensor:
        return latentfast.blend(latents, resolve(self.edited, latents.device), resolve.mask(self.mask, latents))


@register("confine")
@dataclass(frozen=True)
class Confine(Edit):
    """All edits before to the mask: outside it `base`'s bits again, `latentfast.blend(base, latents, mask)`."""

    base: TensorRef
    mask: Mask

    def apply(self, latents: Tensor, resolve: Resolve) -> Tensor:
        return latentfast.blend(resolve(self.base, latents.device), latents, resolve.mask(self.mask, latents))


# --- Statistics ------------------------------------------------------------------------------------------------------


@register("adain")
@dataclass(frozen=True)
class Adain(MaskedEdit):
    """Mean and deviation of each channel as in a reference: `latentfast.adain(latents, ref, factor)`."""

    ref: TensorRef
    factor: Annotated[float, Number()] = 1.0
    channel_dim: int = 1

    def edited(self, latents: Tensor, resolve: Resolve) -> Tensor:
        ref = resolve(self.ref, latents.device)
        return latentfast.adain(latents, ref, self.factor, channel_dim=self.channel_dim)


@register("tone_map")
@dataclass(frozen=True)
class ToneMap(MaskedEdit):
    """Large values pressed together: `latentfast.tone_map(latents, compression)`."""

    compression: Annotated[float, Number(0, 1)]

    def edited(self, latents: Tensor, resolve: Resolve) -> Tensor:
        return latentfast.tone_map(latents, self.compression)


@dataclass(frozen=True)
class _Affine(Edit):
    mean: tuple[float, ...]
    std: tuple[Annotated[float, Number(above=0)], ...]
    scale: Annotated[float, Number()] = 1.0
    channel_dim: int = 1

    def check(self) -> None:
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"std must have a number for each channel as mean has, got {len(self.std)} and {len(self.mean)}"
            )
        if self.scale == 0:
            raise ValueError("scale must not be 0")


@register("standardize")
@dataclass(frozen=True)
class Standardize(_Affine):
    """From the VAE's scale to the transformer's: `latentfast.standardize(latents, mean, std, scale)`."""

    def apply(self, latents: Tensor, resolve: Resolve) -> Tensor:
        return latentfast.standardize(latents, self.mean, self.std, self.scale, channel_dim=self.channel_dim)


@register("unstandardize")
@dataclass(frozen=True)
class Unstandardize(_Affine):
    """From the transformer's scale to the VAE's: `latentfast.unstandardize(latents, mean, std, scale)`."""

    def apply(self, latents: Tensor, resolve: Resolve) -> Tensor:
        return latentfast.unstandardize(latents, self.mean, self.std, self.scale, channel_dim=self.channel_dim)


# --- Frequencies, noise and time -------------------------------------------------------------------------------------


@register("frequency_mix")
@dataclass(frozen=True)
class FrequencyMix(MaskedEdit):
    """The low frequencies of the latents with another clip's high ones, or the reverse: `latentfast.frequency_mix`."""

    other: TensorRef
    keep: Annotated[str, OneOf("low", "high")] = "low"
    cutoff: Annotated[float, Number(0, 1)] = 0.25
    order: Annotated[float, Number()] = 4.0
    temporal_cutoff: Annotated[float, Number(0, 1)] | None = None
    kind: Annotated[str, OneOf("butterworth", "gaussian", "ideal")] = "butterworth"

    def edited(self, latents: Tensor, resolve: Resolve) -> Tensor:
        other = resolve(self.other, latents.device)
        low, high = (latents, other) if self.keep == "low" else (other, latents)
        return latentfast.frequency_mix(
            low, high, self.cutoff, self.order, temporal_cutoff=self.temporal_cutoff, kind=self.kind
        )


@register("scale_noise")
@dataclass(frozen=True)
class ScaleNoise(MaskedEdit):
    """Noised to a level of flow matching, (1 − sigma) · latents + sigma · noise, as schedulers' `scale_noise` does."""

    noise: TensorRef
    sigma: Annotated[float, Number(0, 1)]

    def edited(self, latents: Tensor, resolve: Resolve) -> Tensor:
        return latentfast.lerp(latents, resolve(self.noise, latents.device), self.sigma)


@register("temporal_smooth")
@dataclass(frozen=True)
class TemporalSmooth(MaskedEdit):
    """Calmer over time, by accelerated gradient steps on `latentfast.temporal_loss`; see `smoothed`.

    With `ref`, the clip before the edits, it is the edits that become even in time, and the clip's own motion stays;
    `still` says which cells are to be alike from frame to frame.
    """

    steps: Annotated[int, Whole(1, 10_000)] = 20
    first: Annotated[float, Number(0)] = 1.0
    second: Annotated[float, Number(0)] = 0.0
    data: Annotated[float, Number(0)] = 0.05
    ref: TensorRef | None = None
    still: Mask | None = None
    frame_dim: int = 2

    def check(self) -> None:
        if self.first + self.second == 0:
            raise ValueError("first or second must be above 0, got neither")

    def edited(self, latents: Tensor, resolve: Resolve) -> Tensor:
        ref = None if self.ref is None else resolve(self.ref, latents.device)
        still = None if self.still is None else resolve.mask(self.still, latents)
        return smoothed(
            latents,
            ref,
            still,
            steps=self.steps,
            first=self.first,
            second=self.second,
            data=self.data,
            frame_dim=self.frame_dim,
        )
