"""Public methods of pipelines that work on latents, as one call of latentfast each.

LTX's and LTX-2's latent upsamplers have two: `adain_filter_latent`, a loop over samples and channels there, which gives
NaN for a channel that is constant, and `tone_map_latents`. They are put on the pipeline itself, as attributes.

Other arithmetic on latents is no public point of the pipelines: LTX's `_normalize_latents`, `_denormalize_latents`,
`_pack_latents` and `_unpack_latents` (`latentfast.standardize`, `unstandardize`) and FreeInit's
`_get_free_init_freq_filter` and `_apply_free_init` (`latentfast.frequency_mix`) are private. They run once a call, or
once an iteration of FreeInit, not at every step.
"""

from collections.abc import Callable
from typing import Any

import diffusers
from torch import Tensor

import latentfast

__all__ = ["private_arithmetic", "replacements_for"]

_UPSAMPLERS: Any = (diffusers.LTXLatentUpsamplePipeline, diffusers.LTX2LatentUpsamplePipeline)
#: Private methods that work on latents, with what could do it.
_PRIVATE = {
    "_normalize_latents": "latentfast.standardize",
    "_apply_free_init": "latentfast.frequency_mix",
}


def replacements_for(pipe: Any) -> dict[str, Callable]:
    """The pipeline's public methods on latents that latentfast has, by name: functions to be set as its attributes.

    Args:
        pipe: A pipeline of diffusers.
    """
    if not isinstance(pipe, _UPSAMPLERS):
        return {}
    return {
        "adain_filter_latent": _adain_filter_latent(pipe.adain_filter_latent),
        "tone_map_latents": _tone_map_latents(pipe.tone_map_latents),
    }


def private_arithmetic(pipe: Any) -> dict[str, str]:
    """What of a pipeline's arithmetic on latents is left alone, as it is private, and what could do it."""
    return {name: by for name, by in _PRIVATE.items() if hasattr(pipe, name)}


def _adain_filter_latent(parents: Callable) -> Callable:
    def adain_filter_latent(latents: Tensor, reference_latents: Tensor, factor: float = 1.0) -> Tensor:
        """`latentfast.adain`; a constant channel gets the reference's mean."""
        if latents.dtype != reference_latents.dtype or not latents.is_floating_point():
            return parents(latents, reference_latents, factor)
        return latentfast.adain(latents, reference_latents, factor)

    return adain_filter_latent


def _tone_map_latents(parents: Callable) -> Callable:
    def tone_map_latents(latents: Tensor, compression: float) -> Tensor:
        """`latentfast.tone_map`."""
        if not (latents.is_floating_point() and 0 <= compression <= 1):
            return parents(latents, compression)
        return latentfast.tone_map(latents, compression)

    return tone_map_latents
