"""latentfast: fused kernels for manipulating the latents of video diffusion models."""

from latentfast.backends import Backend, backends, use_backend
from latentfast.ops.combine import combine
from latentfast.ops.edit import blend, edit
from latentfast.ops.frequency import frequency_mix
from latentfast.ops.guidance import guide, guided_step
from latentfast.ops.interpolate import (
    interpolate_keys,
    lerp,
    lerp_path,
    nlerp,
    nlerp_path,
    slerp,
    slerp_path,
    spherical_mean,
)
from latentfast.ops.mask import difference_mask, flow_edit_step, heatmap_to_mask, token_heatmap
from latentfast.ops.preview import FitError, RGBFit, fit_rgb, latent_to_rgb
from latentfast.ops.stats import adain, channel_stats, standardize, tone_map, unstandardize
from latentfast.ops.temporal import temporal_loss, temporal_loss_and_grad, warp_loss
from latentfast.ops.tiles import stitch

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "FitError",
    "RGBFit",
    "adain",
    "backends",
    "blend",
    "channel_stats",
    "combine",
    "difference_mask",
    "edit",
    "fit_rgb",
    "flow_edit_step",
    "frequency_mix",
    "guide",
    "guided_step",
    "heatmap_to_mask",
    "interpolate_keys",
    "latent_to_rgb",
    "lerp",
    "lerp_path",
    "nlerp",
    "nlerp_path",
    "slerp",
    "slerp_path",
    "spherical_mean",
    "standardize",
    "stitch",
    "temporal_loss",
    "temporal_loss_and_grad",
    "token_heatmap",
    "tone_map",
    "unstandardize",
    "use_backend",
    "warp_loss",
]
