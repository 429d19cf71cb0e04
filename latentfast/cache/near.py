"""Where an entry stands among others that it may stand in for: its prompt's embedding, at its sigma, in its scope."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from latentfast.cache.digest import bytes_of

__all__ = ["Place"]

_NOTE = "place"


@dataclass(frozen=True)
class Place:
    """A point that nearest neighbours are looked for at.

    Attributes:
        scope: digest of everything that must be equal: model, scheduler, shape, guidance and so on.
        sigma: the noise level of the entry's latents.
        embedding: the unit vector, float32, its bytes.
    """

    scope: str
    sigma: float
    embedding: bytes

    @classmethod
    def of(cls, scope: str, sigma: float, embedding: Tensor) -> Place:
        """Check and normalize; the embedding is a vector ``(D,)`` of any floating dtype."""
        sigma = float(sigma)
        if not (math.isfinite(sigma) and sigma >= 0):
            raise ValueError(f"sigma: expected a finite number of at least 0, got {sigma!r}")
        unit = unit_vector(embedding).cpu()
        return cls(scope, sigma, bytes(bytes_of(unit)))

    def to_notes(self) -> dict[str, str]:
        """As it stands in a file's metadata."""
        text = base64.b64encode(self.embedding).decode("ascii")
        return {_NOTE: json.dumps({"scope": self.scope, "sigma": self.sigma, "embedding": text})}

    @classmethod
    def from_notes(cls, notes: Mapping[str, str]) -> Place | None:
        """Back from there; None if the entry has no place."""
        try:
            data = json.loads(notes[_NOTE])
            return cls(str(data["scope"]), float(data["sigma"]), base64.b64decode(data["embedding"], validate=True))
        except (KeyError, TypeError, ValueError):
            return None


def unit_vector(embedding: Tensor) -> Tensor:
    """The vector at length 1 in float32, where it lies."""
    if not isinstance(embedding, Tensor) or embedding.ndim != 1 or not embedding.numel():
        what = f"shape {tuple(embedding.shape)}" if isinstance(embedding, Tensor) else type(embedding).__name__
        raise ValueError(f"embedding: expected a vector (D,), got {what}; pool token embeddings before")
    if not embedding.dtype.is_floating_point:
        raise ValueError(f"embedding: expected a floating dtype, got {embedding.dtype}")
    wide = embedding.detach().double()
    return (wide / wide.norm().clamp_min(torch.finfo(torch.float64).tiny)).float().contiguous()
