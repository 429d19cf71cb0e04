"""latentfast inside diffusers, through its public extension points. Needs the extra ``latentfast[diffusers]``."""

try:
    import diffusers as _diffusers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "latentfast.integrations.diffusers needs diffusers, which is not installed: pip install 'latentfast[diffusers]'"
    ) from error

from latentfast.integrations.diffusers import blocks, guiders, schedulers, vaes
from latentfast.integrations.diffusers.accelerate import Handle, accelerate
from latentfast.integrations.diffusers.capture import AttentionCapture
from latentfast.integrations.diffusers.localized_edit import LocalizedEdit, localized_edit

__all__ = [
    "AttentionCapture",
    "Handle",
    "LocalizedEdit",
    "accelerate",
    "blocks",
    "guiders",
    "localized_edit",
    "schedulers",
    "vaes",
]
