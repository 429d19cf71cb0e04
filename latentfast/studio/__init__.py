"""The studio: a local page to make a clip, edit its latents, and see the edit while the slider moves.

`latentfast studio` starts it. Needs the extra ``latentfast[studio]``.
"""

from latentfast.studio.document import Document, Layer, Shot
from latentfast.studio.hub import Studio
from latentfast.studio.model import Model
from latentfast.studio.server import LOOPBACK, Access, application, new_token, running, serve

__all__ = [
    "LOOPBACK",
    "Access",
    "Document",
    "Layer",
    "Model",
    "Shot",
    "Studio",
    "application",
    "new_token",
    "running",
    "serve",
]
