"""What makes the pictures of a preview: a protocol, and the renderer of edits by latentfast's operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from latentfast.ops.preview import latent_to_rgb

__all__ = ["Edit", "RGBRenderer", "Renderer"]

#: (latents, parameters) -> edited latents, new or the same tensor
Edit = Callable[[Tensor, Any], Tensor]


class Renderer(Protocol):
    """What `PreviewEngine` shows latents by. It may be called from two threads at once."""

    def render(self, latents: Tensor, parameters: Any, *, every: int, out: Tensor) -> None:
        """Write frames of the edited latents.

        Args:
            latents: `(B, C, T, H, W)`, not to be changed.
            parameters: Of the edit, as `PreviewEngine.update` was given them.
            every: Each so many-th latent frame, from the first.
            out: uint8 `(B, ceil(T / every), H', W', 3)`, contiguous, on the latents' device.
        """
        ...

    def edited(self, latents: Tensor, parameters: Any) -> Tensor:
        """The edited latents, for the true decode."""
        ...


class RGBRenderer:
    """Shows edited latents by their RGB factors (`latentfast.latent_to_rgb`).

    Args:
        weight: `(C, 3)`, of `latentfast.fit_rgb`; `latentfast.tiny.rgb_factors()` has the embedded model's.
        bias: `(3,)`.
        edit: From latents and parameters to edited latents, such as ``lambda latents, recipe: recipe.apply(latents)``;
            None: the latents are shown as they are.

    Example:
        >>> import torch, latentfast
        >>> from latentfast.preview import RGBRenderer
        >>> renderer = RGBRenderer(torch.eye(3), torch.zeros(3), edit=lambda z, strength: z + strength)
        >>> out = torch.empty(1, 2, 16, 16, 3, dtype=torch.uint8)
        >>> renderer.render(torch.zeros(1, 3, 2, 2, 2), 1.0, every=1, out=out)
        >>> out.unique()
        tensor([255], dtype=torch.uint8)
    """

    def __init__(self, weight: Tensor, bias: Tensor, edit: Edit | None = None) -> None:
        self._factors, self._edit = (weight, bias), edit

    def edited(self, latents: Tensor, parameters: Any) -> Tensor:
        return latents if self._edit is None else self._edit(latents, parameters)

    @torch.no_grad()
    def render(self, latents: Tensor, parameters: Any, *, every: int, out: Tensor) -> None:
        weight, bias = self._on(latents.device)
        shown = self.edited(latents, parameters)[:, :, ::every]
        latent_to_rgb(shown, weight, bias, size=tuple(out.shape[2:4]), out=out)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._factors[0].device != device:
            self._factors = (self._factors[0].to(device), self._factors[1].to(device))
        return self._factors
