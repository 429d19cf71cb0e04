"""The gradient of guidance.

Every kind is a linear combination p = A·c + D·d + M·m of the conditional prediction c, its difference d from the
unconditional one and, with momentum, m; A, D and M follow from a sample's inner products (see csrc/common/
guidance_coefficients.h, whose names these are). So its gradient is a linear combination of the upstream gradient, c,
d and m: the inner products and the combinations are the work of two operators, in a fixed order, and between them stand
a few numbers a sample, in float64.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from latentfast._operators import GUIDANCE
from latentfast.ops._vectors import VectorDots, VectorMix

#: As kConstantShare of csrc/common/guidance_coefficients.h.
_CONSTANT_SHARE = 1e-12


class Options(NamedTuple):
    """The numbers of the operator `guide` that p depends on, in its order."""

    kind: int
    original: int
    scale: float
    rescale: float
    eta: float
    norm_threshold: float
    beta: float
    alpha: float


class _Coefficients(NamedTuple):
    """p = c·cond + d·(cond − uncond) + m·momentum: numbers, or one a sample."""

    c: Tensor | float
    d: Tensor | float
    m: Tensor | float


def _over(x: Tensor, y: Tensor) -> Tensor:
    """x / y, 0 where y is 0."""
    zero = y == 0
    return torch.where(zero, 0.0, x / torch.where(zero, 1.0, y))


class _Sums:
    """Inner products of a sample's vectors, by their names."""

    def __init__(self, names: str, dots: Tensor, momentum: bool):
        self._at = {name: i for i, name in enumerate(names)}
        if not momentum:
            self._at["m"] = self._at["d"]
        self._dots = dots  # (vectors but the first, B, vectors)

    def __call__(self, x: str, y: str) -> Tensor:
        i, j = sorted((self._at[x], self._at[y]))
        return self._dots[j - 1, :, i]


class _Kind:
    """A kind's coefficients and what they are by the inner products: `slopes` takes dL/dA, dL/dD, dL/dM, and gives the
    derivatives by ⟨c,c⟩, ⟨c,d⟩, ⟨d,d⟩, ⟨c,m⟩ and ⟨m,m⟩, None for those that do not matter.
    """

    def __init__(self, o: Options, s: _Sums, momentum: bool):
        self.o, self.momentum = o, momentum
        self.cc, self.cd, self.dd = s("c", "c"), s("c", "d"), s("d", "d")
        self.cm, self.mm = s("c", "m"), s("m", "m")
        # from the base, u' or c, towards c: p = base + scale·(c − u'), whose derivative by u' this is
        self.by_uncond = -o.scale if o.original else 1.0 - o.scale

    def coefficients(self) -> _Coefficients:
        o = self.o
        return _Coefficients(1.0, o.scale if o.original else o.scale - 1.0, 0.0)

    def slopes(self, a: Tensor, d: Tensor, m: Tensor) -> dict[str, Tensor]:
        return {}


class _Apg(_Kind):
    def coefficients(self) -> _Coefficients:
        o = self.o
        length = self.mm.sqrt()
        self.limited = (
            (length > o.norm_threshold) if o.norm_threshold > 0 else torch.zeros_like(length, dtype=torch.bool)
        )
        self.step = torch.where(self.limited, o.scale * o.norm_threshold / length, o.scale)
        self.along = _over(self.cm, self.cc)
        c, d = 1.0 - self.step * (1.0 - o.eta) * self.along, 0.0 if o.original else -1.0
        return _Coefficients(c, d, self.step) if self.momentum else _Coefficients(c, d + self.step, 0.0)

    def slopes(self, a: Tensor, d: Tensor, m: Tensor) -> dict[str, Tensor]:
        weakened = 1.0 - self.o.eta
        by_step = m - a * weakened * self.along
        by_along = -a * weakened * self.step
        by_mm = torch.where(self.limited, -0.5 * by_step * self.step / self.mm, 0.0)
        by_cm = _over(by_along, self.cc)
        return {"cc": -by_cm * self.along, "cm": by_cm, "mm": by_mm}


class _CfgZero(_Kind):
    def coefficients(self) -> _Coefficients:
        self.uu = (self.cc - self.cd) - (self.cd - self.dd) + 1e-8
        self.a = (self.cc - self.cd) / self.uu
        base = 1.0 - self.by_uncond  # p = base·c + by_uncond·u'
        return _Coefficients(base + self.by_uncond * self.a, -self.by_uncond * self.a, 0.0)

    def slopes(self, a: Tensor, d: Tensor, m: Tensor) -> dict[str, Tensor]:
        by_cu = self.by_uncond * (a - d) / self.uu
        by_uu = -by_cu * self.a
        return {"cc": by_cu + by_uu, "cd": -by_cu - 2.0 * by_uu, "dd": by_uu}


class _Tcfg(_Kind):
    def coefficients(self) -> _Coefficients:
        self.longer = self.cd + (self.cd - self.dd)
        self.twice_cu = 2.0 * (self.cc - self.cd)
        h = torch.hypot(self.longer, self.twice_cu)
        self.equal = h == 0
        self.h = torch.where(self.equal, 1.0, h)
        xy = 0.5 * self.twice_cu / self.h
        fallen = xy * (self.twice_cu / (self.h + self.longer.clamp(min=0)))
        yy = torch.where(self.longer > 0, fallen, 0.5 * (1.0 - self.longer / self.h))
        yy = torch.where(self.equal, 0.0, yy)
        return _Coefficients(1.0 - self.by_uncond + self.by_uncond * (xy + yy), -self.by_uncond * yy, 0.0)

    def slopes(self, a: Tensor, d: Tensor, m: Tensor) -> dict[str, Tensor]:
        by_xy, by_yy = self.by_uncond * a, self.by_uncond * (a - d)
        turn = (by_xy * self.longer + by_yy * self.twice_cu) / (2.0 * self.h**3)
        turn = torch.where(self.equal, 0.0, turn)
        by_longer, by_twice_cu = -self.twice_cu * turn, self.longer * turn
        return {"cc": 2.0 * by_twice_cu, "cd": 2.0 * (by_longer - by_twice_cu), "dd": -by_longer}


class _MagnitudeAware(_Kind):
    def coefficients(self) -> _Coefficients:
        o = self.o
        self.uu = ((self.cc - self.cd) - (self.cd - self.dd)).clamp(min=0)
        self.ratio = _over(self.dd.sqrt(), self.uu.sqrt())
        beyond = (self.uu == 0) & (self.dd != 0)  # the ratio is infinite
        damping = torch.where(beyond, 0.0 if o.alpha > 0 else 1.0, torch.exp(-o.alpha * self.ratio))
        self.d = (o.scale if o.original else o.scale - 1.0) * damping
        return _Coefficients(1.0, self.d, 0.0)

    def slopes(self, a: Tensor, d: Tensor, m: Tensor) -> dict[str, Tensor]:
        by_ratio = -self.o.alpha * self.d * d
        by_dd, by_uu = 0.5 * _over(by_ratio * self.ratio, self.dd), -0.5 * _over(by_ratio * self.ratio, self.uu)
        return {"cc": by_uu, "cd": -2.0 * by_uu, "dd": by_dd + by_uu}


_KINDS = {
    GUIDANCE["cfg"]: _Kind,
    GUIDANCE["apg"]: _Apg,
    GUIDANCE["cfg_zero"]: _CfgZero,
    GUIDANCE["tcfg"]: _Tcfg,
    GUIDANCE["magnitude_aware"]: _MagnitudeAware,
}


_Combination = dict[str, Tensor]  # of the vectors g, c, d, m, 1 (see `guidance_gradients`): a weight a sample for each


class _Upstream(NamedTuple):
    """dL/dp before the rescaling, what it makes dL/dA, dL/dD and dL/dM, and what the rescaling itself adds to dL/dc."""

    grad: _Combination
    by_coefficient: dict[str, Tensor]
    to_cond: _Combination


def guidance_gradients(
    grad: Tensor, cond: Tensor, uncond: Tensor, momentum: Tensor | None, o: Options, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """dL/dcond and dL/duncond, where they are wanted, in `grad`'s dtype, the working precision.

    `grad`, g: dL/dp. `momentum`: as it was before the step.
    """
    if o.kind == GUIDANCE["zero"] or not cond.numel():
        return [torch.zeros_like(grad) if want else None for want in wanted]
    if o.kind == GUIDANCE["cfg"] and not o.rescale > 0:
        along = o.scale if o.original else o.scale - 1.0
        return [share * grad if want else None for share, want in zip((1.0 + along, -along), wanted, strict=True)]
    samples, elements = cond.shape[0], cond[:1].numel()
    c = cond.to(grad.dtype)
    d = c - uncond.to(grad.dtype)
    vectors = {"g": grad, "c": c, "d": d}
    if momentum is not None:
        vectors["m"] = d + o.beta * momentum.to(grad.dtype)
    if o.rescale > 0:
        vectors["1"] = torch.ones_like(grad)
    x = torch.stack(list(vectors.values())).view(len(vectors), samples, 1, 1, elements)
    sums = _Sums("".join(vectors), VectorDots.apply(x, x[1:]), momentum is not None)
    zero = torch.zeros_like(sums("c", "c"))
    found: list[Tensor | None] = []
    for want, weights in zip(wanted, _weights(sums, o, momentum is not None, elements), strict=True):
        # not both in one call: two gradients that share memory could be changed together
        row = torch.stack([weights.get(name, zero) for name in vectors], -1)
        found.append(VectorMix.apply(x, row.unsqueeze(0)).view(cond.shape) if want else None)
    return found


def _weights(s: _Sums, o: Options, momentum: bool, elements: int) -> tuple[_Combination, _Combination]:
    """dL/dcond and dL/duncond."""
    kind = _KINDS[o.kind](o, s, momentum)
    p = dict(zip("cdm", kind.coefficients(), strict=True))
    names = "cdm" if momentum else "cd"
    zero = torch.zeros_like(kind.cc)
    if o.rescale > 0 and elements > 1:
        upstream = _before_rescaling(s, o.rescale, p, names, elements)
    else:
        upstream = _Upstream({"g": torch.ones_like(zero)}, {x: s("g", x) for x in "cdm"}, {})
    parts = {x: {y: p[x] * w for y, w in upstream.grad.items()} for x in names}
    if not momentum:  # m is d
        parts["m"] = parts["d"]
    slopes = kind.slopes(*upstream.by_coefficient.values())
    for (x, y), slope in ((tuple(pair), slope) for pair, slope in slopes.items()):
        for of, along in ((x, y), (y, x)):  # ∂⟨x, y⟩ = ⟨∂x, y⟩ + ⟨x, ∂y⟩
            along = "d" if along == "m" and not momentum else along
            parts[of][along] = parts[of].get(along, zero) + slope
    for y, w in upstream.to_cond.items():
        parts["c"][y] = parts["c"].get(y, zero) + w
    of_uncond: _Combination = {}
    for x in names[1:]:  # d and m have −uncond in them
        for y, w in parts[x].items():
            of_uncond[y] = of_uncond.get(y, zero) - w
    of_cond = {y: parts["c"].get(y, zero) - of_uncond.get(y, zero) for y in {**parts["c"], **of_uncond}}
    return of_cond, of_uncond


def _before_rescaling(s: _Sums, phi: float, p: dict[str, Tensor | float], names: str, elements: int) -> _Upstream:
    """Back through p·(φ·std(c)/std(p) + 1 − φ)."""
    centred = {x + y: s(x, y) - s(x, "1") * (s(y, "1") / elements) for x in names for y in "cdm"}
    with_p = {y: _sum(p[x] * centred[x + y] for x in names) for y in "cdm"}  # ⟨p − mean, y⟩
    pp = _sum(p[y] * with_p[y] for y in names)
    squares = s("c", "c") + _sum(p[x] * p[x] * s(x, x) for x in names)
    plain = pp <= _CONSTANT_SHARE * squares
    flat = centred["cc"] <= _CONSTANT_SHARE * s("c", "c")
    pp, cc = torch.where(plain, 1.0, pp), torch.where(flat, 1.0, centred["cc"])
    share = phi * torch.where(plain | flat, 0.0, (cc / pp).sqrt())
    factor = torch.where(plain, 1.0, share + 1.0 - phi)
    by_factor = _sum(p[x] * s("g", x) for x in names)
    by_p, by_c = -by_factor * share / pp, by_factor * share / cc
    mean = _sum(p[x] * s(x, "1") for x in names) / elements
    return _Upstream(
        {"g": factor, **{x: by_p * p[x] for x in names}, "1": -by_p * mean},
        {y: factor * s("g", y) + by_p * with_p[y] for y in "cdm"},
        {"c": by_c, "1": -by_c * s("c", "1") / elements},
    )


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.Tensor.add, terms)
