"""Previews of clips while they are edited or sampled: `PreviewEngine`, what it shows latents by, and encoders."""

from latentfast.preview.encoders import Mp4Segments, encode_jpeg, encode_mp4, encode_raw, encode_webp
from latentfast.preview.engine import Decode, Preview, PreviewEngine, Stats
from latentfast.preview.quality import Budget, Quality, qualities
from latentfast.preview.recipes import RecipeRenderer
from latentfast.preview.render import Renderer, RGBRenderer
from latentfast.preview.subscription import PreviewError, Subscription

__all__ = [
    "Budget",
    "Decode",
    "Mp4Segments",
    "Preview",
    "PreviewEngine",
    "PreviewError",
    "Quality",
    "RGBRenderer",
    "RecipeRenderer",
    "Renderer",
    "Stats",
    "Subscription",
    "encode_jpeg",
    "encode_mp4",
    "encode_raw",
    "encode_webp",
    "qualities",
]
