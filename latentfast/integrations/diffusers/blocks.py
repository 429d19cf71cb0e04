"""Blocks for modular Wan pipelines that guide, step and blend in one go.

Example:
    >>> from diffusers.modular_pipelines import WanBlocks
    >>> from latentfast.integrations.diffusers.blocks import fuse
    >>> blocks = WanBlocks()
    >>> denoise = blocks.sub_blocks["denoise"].sub_blocks
    >>> denoise["denoise"] = fuse(denoise["denoise"])  # then blocks.init_pipeline() as ever
    >>> denoise["denoise"].sub_blocks["after_denoiser"].__class__.__name__
    'WanFusedAfterDenoiser'
"""

import copy
import math
from typing import Any

import diffusers
import torch
from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam
from diffusers.modular_pipelines.wan.denoise import WanLoopAfterDenoiser
from torch import Tensor

import latentfast
from latentfast.integrations.diffusers.guidance import Combination, Guided, Prediction

__all__ = ["WanDeferringDenoiser", "WanFusedAfterDenoiser", "fuse"]


class WanDeferringDenoiser(ModularPipelineBlocks):
    """A denoiser whose guiders leave guidance to the block that follows.

    Args:
        denoiser: The denoiser, `WanLoopDenoiser` or `Wan22LoopDenoiser`. Guiders that are not of
            `latentfast.integrations.diffusers.guiders` guide on the spot, as ever.
    """

    model_name = "wan"

    def __init__(self, denoiser: ModularPipelineBlocks):
        self._denoiser: Any = denoiser
        super().__init__()

    @property
    def description(self) -> str:
        """As the denoiser's."""
        return self._denoiser.description

    @property
    def expected_components(self) -> list:
        """As the denoiser's."""
        return self._denoiser.expected_components

    @property
    def expected_configs(self) -> list:
        """As the denoiser's."""
        return self._denoiser.expected_configs

    @property
    def inputs(self) -> list:
        """As the denoiser's."""
        return self._denoiser.inputs

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        """Predict, and leave in `block_state.noise_pred` what is to be guided."""
        guiders: list[Any] = [getattr(components, name, None) for name in ("guider", "guider_2")]
        deferring = [guider for guider in guiders if hasattr(guider, "defers")]
        before = [guider.defers for guider in deferring]
        for guider in deferring:
            guider.defers = True
        try:
            return self._denoiser(components, block_state, i=i, t=t)
        finally:
            for guider, value in zip(deferring, before, strict=True):
                guider.defers = value


class WanFusedAfterDenoiser(WanLoopAfterDenoiser):
    """The scheduler's step with the guidance that was left to it, and the blend of inpainting.

    With a flow-matching Euler scheduler and predictions of the latents' dtype all of it is one launch
    (`latentfast.guided_step`), whichever guider it is. Else a scheduler of
    `latentfast.integrations.diffusers.schedulers` takes classifier-free guidance into its step's launch; other guiders,
    and a mask, take one launch more each.

    Inputs of its own: `latent_mask`, broadcastable to the latents, 1 where the video is made and 0 where
    `known_latents`, like the latents and free of noise, stay (with their bits, at the end); `known_noise`, what is
    added to them at each noise level, the initial latents unless given. Keeping the known part takes one launch more.
    """

    @property
    def inputs(self) -> list[InputParam]:
        """The mask and what it keeps."""
        return [
            InputParam("latent_mask", type_hint=Tensor, description="1 where to denoise, 0 where to keep"),
            InputParam("known_latents", type_hint=Tensor, description="What is kept where the mask is 0"),
            InputParam("known_noise", type_hint=Tensor, description="Its noise; the initial latents by default"),
        ]

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        """Replace `block_state.latents` by those of the next noise level."""
        scheduler, latents, prediction = components.scheduler, block_state.latents, block_state.noise_pred
        if block_state.latent_mask is None and block_state.known_latents is None:
            mask: Tensor | None = None
            known: Any = None
        else:
            if i == 0:
                self._check(block_state, scheduler)
                if block_state.known_noise is None:
                    block_state.known_noise = latents
            mask, known = block_state.latent_mask, self._known(block_state, scheduler, i)
        cond, uncond, options = _guided(prediction)
        if cond.dtype == latents.dtype and _is_euler(scheduler):
            sigma, sigma_next = self._sigmas(scheduler, i)
            keeps = getattr(scheduler, "keep_x0", False)
            made = latentfast.guided_step(
                latents, cond, uncond, sigma=sigma, sigma_next=sigma_next, mask=mask, known=known, return_x0=keeps,
                **options,
            )  # fmt: skip
            if keeps:
                made, scheduler.x0 = made
            block_state.latents = made
            return components, block_state
        stepped = scheduler.step(prediction.float(), t, latents.float(), return_dict=False)[0].to(latents.dtype)
        block_state.latents = stepped if mask is None else latentfast.blend(known, stepped, mask)
        return components, block_state

    def _check(self, block_state: Any, scheduler: Any) -> None:
        mask, known = block_state.latent_mask, block_state.known_latents
        if mask is None or known is None:
            missing = "latent_mask" if mask is None else "known_latents"
            raise ValueError(f"{missing} is missing: latent_mask and known_latents are given together, or neither")
        if known.shape != block_state.latents.shape:
            raise ValueError(
                f"known_latents must have the latents' shape {tuple(block_state.latents.shape)}, "
                f"got {tuple(known.shape)}"
            )
        flows = scheduler.config.get("prediction_type", "flow_prediction") == "flow_prediction"
        if not flows:
            raise ValueError(
                f"latent_mask needs a scheduler of flow predictions, got {type(scheduler).__name__} with "
                f"{scheduler.config.prediction_type}"
            )
        block_state.known_latents = known.to(block_state.latents)

    def _known(self, block_state: Any, scheduler: Any, i: int) -> Tensor:
        """What is kept, at the noise level that the step leads to."""
        _, sigma = self._sigmas(scheduler, i)
        if sigma == 0:
            return block_state.known_latents
        return latentfast.combine([block_state.known_latents, block_state.known_noise], [1.0 - sigma, sigma])

    def _sigmas(self, scheduler: Any, i: int) -> tuple[float, float]:
        """The noise levels of step i, read from the device once a sampling."""
        if i == 0 or getattr(self, "_levels_of", None) is not scheduler.sigmas:
            self._levels_of, self._levels = scheduler.sigmas, scheduler.sigmas.tolist()
        at = (scheduler.begin_index or 0) + i
        return self._levels[at], self._levels[at + 1]


def fuse(step: Any) -> Any:
    """A Wan denoising loop like `step` that guides, steps and blends in one go, to be put in its place.

    Args:
        step: `WanDenoiseStep`, `WanImage2VideoDenoiseStep`, `Wan22DenoiseStep`, `Wan22Image2VideoDenoiseStep` or
            `Wan22VaceDenoiseStep`, or a loop of one's own with sub-blocks `denoiser` and `after_denoiser` of theirs.

    Returns:
        A copy of it with other sub-blocks under these two names; `step` stays as it is.

    Raises:
        ValueError: `step` has no such sub-blocks.
    """
    blocks = getattr(step, "sub_blocks", {})
    if "denoiser" not in blocks or type(blocks.get("after_denoiser")) is not WanLoopAfterDenoiser:
        raise ValueError(
            "step must be a denoising loop of Wan with sub-blocks denoiser and after_denoiser (WanLoopAfterDenoiser), "
            f"got {type(step).__name__} with {', '.join(blocks) or 'none'}"
        )
    fused = copy.copy(step)
    fused.sub_blocks = copy.copy(blocks)
    fused.sub_blocks["denoiser"] = WanDeferringDenoiser(blocks["denoiser"])
    fused.sub_blocks["after_denoiser"] = WanFusedAfterDenoiser()
    return fused


def _guided(prediction: Tensor) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """What `latentfast.guided_step` takes of a prediction, which may wait to be guided."""
    if isinstance(prediction, Guided):
        return prediction.cond, prediction.uncond, prediction.options
    if isinstance(prediction, Combination) and len(terms := prediction.linear_terms()) == 2:
        (uncond, rest), (cond, scale) = terms
        if math.isclose(rest + scale, 1.0):
            return cond, uncond, {"scale": scale}
    return prediction.plain() if isinstance(prediction, Combination | Prediction) else prediction, None, {"scale": 1.0}


def _is_euler(scheduler: Any) -> bool:
    """Whether a step is sample + (sigma_next - sigma)·prediction."""
    euler = isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
    return euler and not scheduler.config["stochastic_sampling"]
