"""What the tests of recipes share: an edit of every kind, edits that tell, and a small reader of JSON Schema."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from latentfast.recipe import (
    Adain,
    AttentionMask,
    Blend,
    Confine,
    Direction,
    Directions,
    Edit,
    FrequencyMix,
    LerpTowards,
    NlerpTowards,
    ScaleNoise,
    SlerpTowards,
    Standardize,
    TemporalSmooth,
    TensorRef,
    Tensors,
    ToneMap,
    Unstandardize,
    register,
)
from tests.helpers import Draw

SHAPE = (2, 4, 3, 2, 6)


def every_edit(draw: Draw) -> tuple[Tensor, Tensors, list[Edit]]:
    """(latents, tensors, a list with each edit that comes with latentfast, and each way to say where)."""
    tensors = Tensors()
    z, other, noise = (draw.normal(*SHAPE) for _ in range(3))
    b, n = tensors.add(other), tensors.add(noise)
    d, many = tensors.add(draw.normal(4, 1, 1, 1)), tensors.add(draw.normal(3, *SHAPE))
    mask = tensors.add(draw.mask(2, 1, *SHAPE[2:]))
    heat = tensors.add(draw.uniform(2, 2, 3, 2, 3))
    mean, std = (0.1, -0.2, 0.3, 0.0), (1.0, 2.0, 0.5, 1.5)
    looked_at = AttentionMask(heat, group=1, quantile=0.6, softness=0.2, dilate=1, smooth_time=0.5)
    edits: list[Edit] = [
        LerpTowards(b, 0.25),
        NlerpTowards(b, 0.3, (1,)),
        SlerpTowards(b, 1 / 3, mask=mask),
        Direction(d, 0.1, mask=looked_at),
        Directions(many, (0.1, -0.2, 0.3), mask=mask),
        Blend(b, mask),
        Confine(n, AttentionMask(heat, threshold=0.4, invert=True)),
        Adain(b, 0.7),
        ToneMap(0.6, mask=mask),
        Standardize(mean, std, 0.9),
        Unstandardize(mean, std, 0.9),
        FrequencyMix(n, "high", 0.3, 2, temporal_cutoff=0.5, kind="gaussian"),
        ScaleNoise(n, 0.2),
        TemporalSmooth(2, 1.0, 0.5, 0.1, ref=b, still=mask),
    ]
    return z, tensors, edits


def violations(value: Any, schema: dict[str, Any], root: dict[str, Any], at: str = "$") -> list[str]:
    """Why a JSON value does not fit a schema, by the keywords that recipes' schemas use; any other is an error."""
    known = {"$schema", "title", "description", "default", "$defs"}
    found: list[str] = []

    def check(keyword: str, ok: bool) -> None:
        if keyword in schema and not ok:
            found.append(f"{at}: {keyword}")

    number = isinstance(value, int | float) and not isinstance(value, bool)
    for keyword, wanted in schema.items():
        if keyword == "$ref":
            name = wanted.removeprefix("#/$defs/").replace("~1", "/").replace("~0", "~")
            found += violations(value, root["$defs"][name], root, at)
        elif keyword in ("oneOf", "anyOf"):
            fitting = sum(not violations(value, option, root, at) for option in wanted)
            check(keyword, fitting == 1 if keyword == "oneOf" else fitting >= 1)
        elif keyword == "type":
            kinds = {"object": dict, "array": list, "string": str, "boolean": bool}
            is_one = isinstance(value, kinds[wanted]) if wanted in kinds else number
            check(keyword, is_one and not (wanted == "integer" and value != int(value)))
        elif keyword == "const":
            check(keyword, value == wanted)
        elif keyword == "enum":
            check(keyword, value in wanted)
        elif keyword == "pattern":
            check(keyword, isinstance(value, str) and re.search(wanted, value) is not None)
        elif keyword == "minimum":
            check(keyword, number and value >= wanted)
        elif keyword == "maximum":
            check(keyword, number and value <= wanted)
        elif keyword == "exclusiveMinimum":
            check(keyword, number and value > wanted)
        elif keyword == "minItems":
            check(keyword, isinstance(value, list) and len(value) >= wanted)
        elif keyword == "items":
            for i, element in enumerate(value if isinstance(value, list) else ()):
                found += violations(element, wanted, root, f"{at}[{i}]")
        elif keyword == "required":
            check(keyword, isinstance(value, dict) and set(wanted) <= set(value))
        elif keyword == "properties":
            for name in set(wanted) & set(value if isinstance(value, dict) else ()):
                found += violations(value[name], wanted[name], root, f"{at}.{name}")
        elif keyword == "additionalProperties":
            check(keyword, wanted or (isinstance(value, dict) and set(value) <= set(schema["properties"])))
        else:
            assert keyword in known, f"{at}: {keyword} is a keyword that these tests do not know"
    return found


#: Not every backend: a recipe calls the operations, which have tests of their own.
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@register("test/add")
@dataclass(frozen=True)
class Add(Edit):
    """Counts how often it is applied."""

    amount: float
    tensor: TensorRef | None = None
    calls: ClassVar[int] = 0

    def apply(self, latents, resolve):
        Add.calls += 1
        return latents + (self.amount if self.tensor is None else resolve(self.tensor) * self.amount)


def calls_of(*arguments, **keywords) -> int:
    """How many edits a call of `apply` runs."""
    before = Add.calls
    recipe, *rest = arguments
    recipe.apply(*rest, **keywords)
    return Add.calls - before


@register("test/same")
@dataclass(frozen=True)
class Same(Edit):
    """Returns a view of what it got."""

    def apply(self, latents, resolve):
        return latents.view(-1).view(latents.shape)
