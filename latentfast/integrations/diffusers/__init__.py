"""latentfast inside diffusers, through its public extension points. Needs the extra ``latentfast[diffusers]``."""

try:
    import diffusers as _diffusers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "latentfast.integrations.diffusers needs diffusers, which is not installed: pip install 'latentfast[diffusers]'"
    ) from error

from latentfast.integrations.diffusers import blocks, guiders, schedulers, vaes
from latentfast.integrations.diffusers.accelerate import Handle, accelerate

__all__ = ["Handle", "accelerate", "blocks", "guiders", "schedulers", "vaes"]
