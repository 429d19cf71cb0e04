"""Recipes: stacks of edits as plain data, applied by the fused operations, every prefix kept in a cache.

`Recipe` holds edits, which are frozen dataclasses under a name; `register` adds one of your own. Tensors enter by their
digests: `Tensors` and `keep` give them, `Recipe.apply` takes them back.
"""

from latentfast.recipe.edit import Edit, register, registered
from latentfast.recipe.edits import (
    Adain,
    Blend,
    Confine,
    Direction,
    Directions,
    FrequencyMix,
    LerpTowards,
    MaskedEdit,
    NlerpTowards,
    ScaleNoise,
    SlerpTowards,
    Standardize,
    TemporalSmooth,
    ToneMap,
    Unstandardize,
)
from latentfast.recipe.errors import MissingTensorError
from latentfast.recipe.masks import AttentionMask, Mask
from latentfast.recipe.parameters import Flag, Kind, Many, Number, OneOf, Reference, TensorRef, Whole
from latentfast.recipe.recipe import FORMAT, VERSION, Recipe
from latentfast.recipe.smoothing import smoothed
from latentfast.recipe.tensors import Resolve, Tensors, is_kept, keep, reference

__all__ = [
    "FORMAT",
    "VERSION",
    "Adain",
    "AttentionMask",
    "Blend",
    "Confine",
    "Direction",
    "Directions",
    "Edit",
    "Flag",
    "FrequencyMix",
    "Kind",
    "LerpTowards",
    "Many",
    "Mask",
    "MaskedEdit",
    "MissingTensorError",
    "NlerpTowards",
    "Number",
    "OneOf",
    "Recipe",
    "Reference",
    "Resolve",
    "ScaleNoise",
    "SlerpTowards",
    "Standardize",
    "TemporalSmooth",
    "TensorRef",
    "Tensors",
    "ToneMap",
    "Unstandardize",
    "Whole",
    "is_kept",
    "keep",
    "reference",
    "register",
    "registered",
    "smoothed",
]
