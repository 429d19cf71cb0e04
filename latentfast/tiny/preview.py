"""The factors of the embedded model's previews."""

from __future__ import annotations

import json
from functools import cache

import torch
from torch import Tensor

from latentfast.tiny.pipeline import model_path


@cache
def _fitted() -> dict[str, list]:
    return json.loads((model_path() / "rgb_factors.json").read_text(encoding="utf-8"))


def rgb_factors(device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """The factors that show the embedded model's latents by ``latentfast.latent_to_rgb``.

    Fitted by ``python -m tools.fit_rgb``, for latents as the pipeline's steps have them (``output_type="latent"``); the
    file they are read from has the errors beside them.

    Args:
        device: where they go.

    Returns:
        tuple: weight (16, 3) and bias (3,), float32, new.

    Example:
        >>> import torch
        >>> import latentfast
        >>> weight, bias = rgb_factors()
        >>> latentfast.latent_to_rgb(torch.randn(1, 16, 7, 16, 16), weight, bias, size=(128, 128)).shape
        torch.Size([1, 7, 128, 128, 3])
    """
    found = _fitted()
    return torch.tensor(found["weight"], device=device), torch.tensor(found["bias"], device=device)
