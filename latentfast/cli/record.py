"""What a run was made of: versions, machine, backend, checksums."""

from __future__ import annotations

import hashlib

from torch import Tensor

from latentfast.cache.digest import bytes_of
from latentfast.cache.environment import active_backend, machine, versions

__all__ = ["active_backend", "checksum", "machine", "tensors_to_bytes", "versions"]


def checksum(content: Tensor | bytes) -> str:
    """SHA-256 of bytes, or of a tensor's values in row-major order (its dtype and shape are not in it)."""
    if isinstance(content, Tensor):
        values = content.detach().cpu().contiguous()  # named, so that it outlives its bytes
        return hashlib.sha256(bytes_of(values)).hexdigest()
    return hashlib.sha256(content).hexdigest()


def tensors_to_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Tensors and a note about them in the safetensors format."""
    from safetensors.torch import save

    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)
