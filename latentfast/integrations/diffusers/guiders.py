"""Guiders of modular pipelines whose formula is one call of `latentfast.guide`.

Each class has its parent's name, configuration and behaviour, and rounds once where the parent rounds after each
operation. Where the parent's formula has no value (a constant prediction under `guidance_rescale`, a zero one, the
zero-init steps of CFG-Zero*) the result here is finite; `MagnitudeAwareGuidance` takes predictions of any number of
dimensions, and `TangentialClassifierFreeGuidance` knows which of its two predictions it is at.

What the kernels do not take (other dtypes and devices, a `guidance_rescale` over 1, norms over chosen dimensions) goes
the parent's way.

Example:
    >>> from latentfast.integrations.diffusers.guiders import ClassifierFreeGuidance
    >>> guider = ClassifierFreeGuidance(guidance_scale=5.0, guidance_rescale=0.7)  # in place of diffusers'
    >>> guider.config.guidance_rescale
    0.7
"""

import copy
from typing import Any

import diffusers.guiders as parents
import torch
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from torch import Tensor

import latentfast
from latentfast.integrations.diffusers.guidance import Guided

__all__ = [
    "AdaptiveProjectedGuidance",
    "ClassifierFreeGuidance",
    "ClassifierFreeZeroStarGuidance",
    "MagnitudeAwareGuidance",
    "TangentialClassifierFreeGuidance",
    "replacement_for",
    "why_not",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DEVICES = ("cpu", "cuda")


class _Guide:
    """What the guiders share: `forward` by `latentfast.guide`, and its keywords for a block that fuses more."""

    #: Whether `forward` hands on what is to be computed, for a scheduler's step or a block to compute it in one go with
    #: what follows; whatever else touches it gets the guided prediction.
    defers: bool = False

    _mode: str
    # of the parents
    guidance_scale: float
    guidance_rescale: float
    use_original_formulation: bool
    num_conditions: int

    def options(self, pred_cond: Tensor, pred_uncond: Tensor | None) -> dict[str, Any] | None:
        """What to call `latentfast.guide(pred_cond, pred_uncond, …)` or `guided_step` with at the present step.

        Args:
            pred_cond: The conditional prediction, `(B, …)`.
            pred_uncond: The unconditional one, alike; None where there is no guidance.

        Returns:
            Keywords, `scale` among them; None if the kernels do not take these predictions or this configuration.

        Raises:
            ValueError: guidance is on, but there is no `pred_uncond`.
        """
        if self.num_conditions > 1 and pred_uncond is None:
            raise ValueError(f"pred_uncond must be given, as {type(self).__name__} is on at this step; got None")
        alike = pred_uncond is None or (
            (pred_uncond.shape, pred_uncond.dtype, pred_uncond.device)
            == (pred_cond.shape, pred_cond.dtype, pred_cond.device)
        )
        return self._options(pred_cond) if alike and self._takes(pred_cond) else None

    def _takes(self, pred: Tensor) -> bool:
        """Whether the kernels take such predictions and this configuration."""
        known = pred.dtype in _DTYPES and pred.device.type in _DEVICES and pred.ndim > 1
        return known and 0 <= self.guidance_rescale <= 1

    def _options(self, pred: Tensor) -> dict[str, Any]:
        return {
            "scale": self.guidance_scale,
            "mode": self._mode,
            "rescale": self.guidance_rescale,
            "original": self.use_original_formulation,
        }

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        """The guided prediction, as diffusers' guider of this name defines it.

        Args:
            pred_cond: The conditional prediction, `(B, …)`.
            pred_uncond: The unconditional one, alike; None at steps without guidance.

        Returns:
            `pred`, a new tensor like `pred_cond` (`pred_cond` itself at steps without guidance), and the two arguments.
        """
        options = self.options(pred_cond, pred_uncond)
        if options is None:
            return super().forward(pred_cond, pred_uncond)  # type: ignore[misc]
        if self.num_conditions == 1 and not options.get("zero_init"):
            pred = pred_cond
        elif self.defers and pred_uncond is not None and not torch.is_grad_enabled():
            pred = Guided.of(pred_cond, pred_uncond, options)
        else:
            pred = latentfast.guide(pred_cond, pred_uncond, **options)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)


class ClassifierFreeGuidance(_Guide, parents.ClassifierFreeGuidance):
    """diffusers' `ClassifierFreeGuidance`, with `guidance_rescale`, in one call (arXiv 2207.12598, 2305.08891)."""

    _mode = "cfg"


class AdaptiveProjectedGuidance(_Guide, parents.AdaptiveProjectedGuidance):
    """diffusers' `AdaptiveProjectedGuidance` in one call (arXiv 2410.02416): sums in float64, nothing stored in it.

    The momentum is kept in float32 at least, in `momentum_buffer.running_average`, and updated in place.
    """

    _mode = "apg"

    def _takes(self, pred: Tensor) -> bool:
        dims = self.adaptive_projected_guidance_norm_dim
        if dims is not None:
            named = [dims] if isinstance(dims, int) else dims
            if sorted(dim % pred.ndim for dim in named) != list(range(1, pred.ndim)):
                return False
        return super()._takes(pred)

    def _options(self, pred: Tensor) -> dict[str, Any]:
        found = super()._options(pred)
        found["eta"] = self.eta
        found["norm_threshold"] = max(self.adaptive_projected_guidance_rescale, 0.0)
        if self.momentum_buffer is not None and self.num_conditions > 1:
            _widen(self.momentum_buffer, pred)
            found["momentum"] = self.momentum_buffer.momentum
            found["momentum_buffer"] = self.momentum_buffer.running_average
        return found


class ClassifierFreeZeroStarGuidance(_Guide, parents.ClassifierFreeZeroStarGuidance):
    """diffusers' `ClassifierFreeZeroStarGuidance` in one call (arXiv 2503.18886).

    The output's `pred_uncond` is the prediction as it came; the parent's is multiplied by the optimised scale.
    """

    _mode = "cfg_zero"

    def _options(self, pred: Tensor) -> dict[str, Any]:
        state = self.get_state()
        zero = state["enabled"] and state["step"] is not None and state["step"] < self.zero_init_steps
        return {**super()._options(pred), "zero_init": zero}


class TangentialClassifierFreeGuidance(_Guide, parents.TangentialClassifierFreeGuidance):
    """diffusers' `TangentialClassifierFreeGuidance` in one call (arXiv 2503.18137): no decomposition, but its closed
    form."""

    _mode = "tcfg"

    @property
    def is_conditional(self) -> bool:
        """Whether the prediction under way is the conditional one."""
        return self.get_state()["count_prepared"] == 1  # the parent reads an attribute that it does not have


class MagnitudeAwareGuidance(_Guide, parents.MagnitudeAwareGuidance):
    """diffusers' `MagnitudeAwareGuidance` in one call (MAMBO-G, arXiv 2508.03442)."""

    _mode = "magnitude_aware"

    def _takes(self, pred: Tensor) -> bool:
        return self.alpha >= 0 and super()._takes(pred)

    def _options(self, pred: Tensor) -> dict[str, Any]:
        return {**super()._options(pred), "alpha": self.alpha}


_OURS: dict[type, type] = {
    parents.ClassifierFreeGuidance: ClassifierFreeGuidance,
    parents.AdaptiveProjectedGuidance: AdaptiveProjectedGuidance,
    parents.ClassifierFreeZeroStarGuidance: ClassifierFreeZeroStarGuidance,
    parents.TangentialClassifierFreeGuidance: TangentialClassifierFreeGuidance,
    parents.MagnitudeAwareGuidance: MagnitudeAwareGuidance,
}


def replacement_for(guider: BaseGuidance) -> BaseGuidance | None:
    """A guider of ours in the place of diffusers' `guider`, in its present state; None if there is none.

    A class derived from diffusers' is left alone: what it changes is not known here.
    """
    ours = _OURS.get(type(guider))
    if ours is None:
        return None
    made = copy.copy(guider)  # its configuration, what was changed since, and where it stands
    made.__class__ = ours
    return made


def why_not(guider: BaseGuidance) -> str:
    """Why there is no replacement for `guider`, in one sentence; '' if there is one."""
    kind = type(guider)
    if kind in _OURS:
        return ""
    if kind in _OURS.values():
        return f"{kind.__name__} is latentfast's already"
    if any(issubclass(kind, known) for known in _OURS):
        return f"{kind.__name__} is a class of its own, derived from diffusers'"
    return f"latentfast.guide has no formula for {kind.__name__}"


def _widen(buffer: Any, pred: Tensor) -> None:
    """Make the running average of a `MomentumBuffer` what `latentfast.guide` updates in place: zeros, then float32."""
    wide = torch.float64 if pred.dtype == torch.float64 else torch.float32
    average = buffer.running_average
    if not isinstance(average, Tensor):
        average = torch.zeros(pred.shape, dtype=wide, device=pred.device)
    elif average.dtype != wide or not average.is_contiguous():  # begun by diffusers' guider
        average = average.to(wide).contiguous()
    buffer.running_average = average
