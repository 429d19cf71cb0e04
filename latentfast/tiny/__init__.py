"""The embedded model: a small text-to-video pipeline trained on rendered scenes, the renderer, and a judge that
reads clips.

``load_pipeline()`` gives a plain ``diffusers.WanPipeline`` that needs no network; ``render`` draws scenes with
known factors; ``Judge`` reads the factors and the shapes' masks back from pixels; ``rgb_factors()`` shows latents
without decoding them.
"""

from latentfast.tiny.caption import caption
from latentfast.tiny.judge import Judge, Reading, agreement
from latentfast.tiny.pipeline import RECOMMENDED, load_pipeline, model_path
from latentfast.tiny.preview import rgb_factors
from latentfast.tiny.scene import Clips, Scene, Shape, random_scenes, render

__all__ = [
    "RECOMMENDED",
    "Clips",
    "Judge",
    "Reading",
    "Scene",
    "Shape",
    "agreement",
    "caption",
    "load_pipeline",
    "model_path",
    "random_scenes",
    "render",
    "rgb_factors",
]
