"""What the tests of the operations share: the targets, inputs by seed, the tolerance table and comparisons."""

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import latentfast
from latentfast import _operators, _settings

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALVES, torch.float64)
#: Operators without CUDA C++.
LEFT_TO_TRITON = ("token_heatmap",)


@dataclass(frozen=True)
class Target:
    """A backend on a device type."""

    backend: str
    device: str

    @property
    def interpreted(self) -> bool:
        """Triton's interpreter takes milliseconds a block: it gets smaller shapes."""
        return self.backend == "triton" and self.device == "cpu"

    def __str__(self) -> str:
        return f"{self.backend}@{self.device}"


TARGETS = [
    Target("native-cpu", "cpu"),
    Target("triton", "cpu"),
    Target("eager", "cpu"),
    Target("cuda", "cuda"),
    Target("triton", "cuda"),
    Target("eager", "cuda"),
]


def why_missing(target: Target) -> str:
    """Why a target cannot be tested on this machine; '' if it can."""
    found = {backend.name: backend for backend in latentfast.backends()}[target.backend]
    if not found.available:
        return found.reason
    if target.device == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if target.interpreted and not _settings.triton_interpreted():
        return "on the CPU Triton runs under TRITON_INTERPRET=1 alone, which would hide the GPU from it"
    return ""


def skip_where_lacking(operator: str, device: str) -> None:
    """On a GPU some operators have a Triton kernel alone, and some none."""
    forced = importlib.import_module("latentfast.backends")._forced
    if forced == "triton" and _operators.STEMS[operator] in _operators.WITHOUT_TRITON:
        pytest.skip(f"{operator} has no kernel in Triton")
    if operator in LEFT_TO_TRITON and device.startswith("cuda") and forced == "cuda":
        pytest.skip(f"{operator} has no kernel in CUDA C++, Triton's is the one for a GPU")


def skip_where_torch_adds_atomically(target: Target, function: str) -> None:
    if str(target) == "eager@cuda" and function == "warp_loss":
        pytest.skip("torch's gradient of gather adds atomically on a GPU (docs/numerics.md, 1)")


class Draw:
    """Random inputs of one dtype on one device, made on the CPU from a seed: the same numbers on every device."""

    def __init__(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0):
        self.dtype, self.device = dtype, device
        #: What `t`, weights and strengths are passed as.
        self.parameter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        return x.to(dtype or self.dtype).to(self.device)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.rand(shape, generator=self._generator, dtype=torch.float64) * (high - low) + low
        return x.to(dtype or self.parameter_dtype).to(self.device)

    def mask(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """In [0, 1], about a sixth of it exactly 0 and a sixth exactly 1."""
        return self.uniform(*shape, low=-0.25, high=1.25, dtype=torch.float64).clamp(0, 1).to(dtype or self.dtype)

    def grid(self, *shape: int) -> Tensor:
        """Multiples of 1/8 in [-2, 2): sums and differences of a few of them are exact in every dtype."""
        steps = torch.randint(-16, 16, shape, generator=self._generator, dtype=torch.float64) / 8
        return steps.to(self.dtype).to(self.device)


def pair_at_angle(
    theta: float, shape: Sequence[int], dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Two batches of vectors (one a sample) of lengths near 3 and 2 that enclose `theta` radians before rounding."""
    draw = Draw(torch.float64, seed=seed)
    u, v = draw.normal(*shape).flatten(1), draw.normal(*shape).flatten(1)
    u = u / u.norm(dim=1, keepdim=True)
    v = v - (u * v).sum(1, keepdim=True) * u
    v = v / v.norm(dim=1, keepdim=True)
    a, b = 3 * u, 2 * (math.cos(theta) * u + math.sin(theta) * v)
    return a.view(shape).to(dtype).to(device), b.view(shape).to(dtype).to(device)


# --- The tolerance table ----------------------------------------------------------------------------------------------
#
# Yardstick (design rule 2): with `exact` the reference in float64 and `same` the reference in the working precision,
#     |got − exact| <= 2·max|same − exact| + ULPS·eps·max|exact|  (+ half a unit in the last place for half types).
# Half types are computed in float32 and rounded once, hence float32's bound plus half a unit of the half type.

#: Units in the last place (of the result's largest magnitude) that are granted beside twice the reference's own error.
#: The reference in the same dtype can be exact by luck (one element, t = 0.5), which must not make the bound 0.
ULPS = {
    # Three roundings in (1 − t)·a + t·b and one in each of the weights.
    torch.float32: 4.0,
    # Here `exact` is no more precise than what is tested: both carry the error of a sum of a few thousand squares.
    torch.float64: 64.0,
}
#: For a mean of softmax masses: the exponential turns the absolute error of a score into a relative one. Scores reach 8
#: or so, and a tensor core cuts off, rather than rounds, each of its sums: of 128 products in three parts of TF32 there
#: are 48, half a unit each on average at half the score, 48 · ½ · 4 = 96 units of 1.
HEAT_ULPS = {torch.float32: 128.0, torch.float64: 128.0}
#: For a loss: d = z[t+1] − z[t] is rounded before it is squared (two units), and so is every partial sum.
LOSS_ULPS = {torch.float32: 16.0, torch.float64: 64.0}
#: For guidance: coefficients of up to four times the scale act on cond and on its difference from uncond, and their
#: terms cancel in part: each of the three roundings counts that often. (The scale is 5 in these tests.)
GUIDANCE_ULPS = {torch.float32: 32.0, torch.float64: 256.0}
#: For gradients: the weights' derivatives take about four times the roundings of the weights, and cancel in part.
GRADIENT_ULPS = {torch.float32: 32.0, torch.float64: 256.0}


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a dtype is computed in at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def half_unit(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a unit in the last place of a half dtype at each |x|: the error of rounding x once, at most."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(x.double().abs().clamp_min(info.tiny))  # x = mantissa · 2^exponent, mantissa in [½, 1)
    # rounding may have gone up into the next binade, whose units are twice as wide: there |x| is its very beginning
    return torch.ldexp(torch.full_like(x, info.eps / 4, dtype=torch.float64), exponent)


def assert_within(got: Tensor, exact: Tensor, same: Tensor, ulps: dict[torch.dtype, float] = ULPS) -> None:
    """`got` obeys the yardstick above. `exact`: the reference in float64; `same`: in `got`'s working precision."""
    assert got.shape == exact.shape
    assert got.is_contiguous()
    dtype = got.dtype
    got, exact, same = got.detach().double().cpu(), exact.detach().cpu(), same.detach().double().cpu()
    if exact.numel() == 0:
        return
    assert torch.isfinite(exact).all(), "the exact result must be finite to be compared with"
    wide = working_dtype(dtype)
    bound = 2 * (same - exact).abs().max() + ulps[wide] * torch.finfo(wide).eps * exact.abs().max()
    allowed = bound + (half_unit(exact, dtype) if dtype in HALVES else 0)
    error = (got - exact).abs()
    worst = (error - allowed).argmax()
    assert (error <= allowed).all(), (
        f"error {error.flatten()[worst]:.3e}, {(error - allowed).flatten()[worst]:.3e} more than is allowed, at "
        f"flat index {worst}: got {got.flatten()[worst]!r}, exact {exact.flatten()[worst]!r}"
    )


def widened(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same numbers in a wider dtype, detached."""
    return {name: x.detach().to(dtype) for name, x in inputs.items()}


def assert_matches_spec(
    got: Tensor,
    spec: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    ulps: dict[torch.dtype, float] = ULPS,
) -> None:
    """`got` obeys the yardstick against `spec(**inputs)` run in float64 and in the inputs' working precision."""
    wide = working_dtype(next(iter(inputs.values())).dtype)
    assert_within(got, spec(**widened(inputs, torch.float64)), spec(**widened(inputs, wide)), ulps)


def gradients(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], wanted: Sequence[str], upstream: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The result of `function(**inputs)` and, for a given (or a fixed) upstream gradient, the gradients wanted."""
    leaves = {name: x.detach().clone().requires_grad_(name in wanted) for name, x in inputs.items()}
    out = function(**leaves)
    if not wanted:
        return out, {}
    if upstream is None:
        upstream = fixed_upstream(out)
    found = torch.autograd.grad(out, [leaves[name] for name in wanted], upstream)
    return out.detach(), dict(zip(wanted, found, strict=True))


def fixed_upstream(out: Tensor) -> Tensor:
    """A random gradient that depends on the result's shape alone."""
    return Draw(out.dtype, str(out.device), seed=99).normal(*out.shape)


def assert_gradient_close(got: Tensor, exact: Tensor, same: Tensor, parts: int = 1) -> None:
    """Error as a vector: length at most twice the reference's plus ulps, direction, and no bias to one side."""
    assert got.shape == exact.shape
    dtype = got.dtype
    wide = working_dtype(dtype)
    got, exact, same = got.double().cpu().flatten(), exact.double().cpu().flatten(), same.double().cpu().flatten()
    size = exact.norm().clamp_min(torch.finfo(torch.float64).tiny)
    allowed = float(2 * (same - exact).norm() / size) + GRADIENT_ULPS[wide] * torch.finfo(wide).eps
    if dtype in HALVES:
        allowed += parts * torch.finfo(dtype).eps / 2  # every element of every part rounded once
    error = got - exact
    assert float(error.norm() / size) <= allowed, f"relative error {float(error.norm() / size):.3e} > {allowed:.3e}"
    if exact.norm() == 0:
        return
    # 1 − cos of a vector with relative error e is at most e²/2; the last term is the rounding of the cosine itself
    cosine = float(got @ exact / (got.norm() * size)) if got.norm() > 0 else 0.0
    assert cosine >= 1 - allowed**2 - 1e-12, f"cosine {cosine}"
    # six standard deviations of the mean of independent errors of that size, plus one common relative error
    limit = allowed * (6 * float(size) / exact.numel() + float(exact.mean().abs()))
    assert float(error.mean().abs()) <= limit, f"bias {float(error.mean()):.3e} > {limit:.3e}"


_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors agree in shape, dtype and every bit: NaN equals the same NaN, −0 differs from 0."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    return torch.equal(x.detach().contiguous().view(_BITS[x.dtype]), y.detach().contiguous().view(_BITS[y.dtype]))


def transposed(x: Tensor) -> Tensor:
    """`x` in memory with its last two dimensions swapped."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.ndim > 1 else strided(x)


def strided(x: Tensor) -> Tensor:
    """`x` as every other element of a tensor that is NaN in between."""
    wide = x.new_full((*x.shape, 2), math.nan)
    wide[..., 1] = x
    return wide[..., 1]


def chunked(x: Tensor) -> Tensor:
    """`x` as a view that `chunk()` makes along the channels (or the only dimension)."""
    dim = 1 if x.ndim > 1 else 0
    return torch.cat((torch.full_like(x, math.nan), x), dim).chunk(2, dim)[1]


def offset(x: Tensor) -> Tensor:
    """`x`, contiguous, one element off any alignment."""
    buffer = x.new_full((x.numel() + 1,), math.nan)
    return buffer[1:].view(x.shape).copy_(x)


def channels_last(x: Tensor) -> Tensor:
    """`x` with the channels innermost in memory."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.ndim]) if x.ndim in formats else transposed(x)


LAYOUTS = {
    "transposed": transposed,
    "strided": strided,
    "chunk view": chunked,
    "offset by one": offset,
    "channels last": channels_last,
}
