"""Interpolation between latents: lerp, nlerp, slerp, paths, keyframes and the mean on the sphere.

A latent is seen as one or many vectors: `dim` names the dimensions that form one vector (`None`: all but the first).
Slerp follows Shoemake, "Animating Rotation with Quaternion Curves", SIGGRAPH 1985, section 3.3, with the weights
acting on the raw vectors; the angle is Kahan's 2·atan2(|u − v|, |u + v|), which loses nothing near 0 nor near π.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from latentfast.reference._common import norm, per_vector, vector_dims, working

#: |u + v| below which two unit vectors count as opposite. The great circle between them is then no longer determined
#: by float32 data, and slerp turns through the deterministic orthogonal vector of `quarter_turn` instead.
OPPOSITE = 1.4e-6
#: Angle (radians) below which sin(tθ)/sin(θ) is taken from its series; the first term left out is of the order θ⁶.
SMALL_ANGLE = 1e-3


def quarter_turn(x: Tensor, dims: Sequence[int]) -> Tensor:
    """A vector of `x`'s length orthogonal to it: every pair of elements turned by a quarter, (x0, x1) → (−x1, x0).

    In a vector of odd length the last element has no partner and becomes 0; what is left is scaled to `x`'s length,
    and if nothing is left the first unit vector is taken.
    """
    kept = [d for d in range(x.ndim) if d not in dims]
    order = [*kept, *dims]
    moved = x.permute(order)
    n = math.prod(moved.shape[len(kept) :])
    flat = moved.reshape(*moved.shape[: len(kept)], n)
    pairs = flat[..., : n - n % 2].unflatten(-1, (n // 2, 2))
    turned = torch.stack((-pairs[..., 1], pairs[..., 0]), -1).flatten(-2)
    if n % 2:
        turned = torch.cat((turned, torch.zeros_like(flat[..., :1])), -1)
        length = torch.linalg.vector_norm(flat, dim=-1, keepdim=True)
        left = torch.linalg.vector_norm(turned, dim=-1, keepdim=True)
        first = torch.cat((length, torch.zeros_like(flat[..., 1:])), -1)
        turned = torch.where(left > 0, turned * (length / torch.where(left > 0, left, 1)), first)
    return turned.reshape(moved.shape).permute([order.index(d) for d in range(x.ndim)])


def _with_end_points(a: Tensor, b: Tensor, t: Tensor, between: Tensor) -> Tensor:
    """`between` rounded to the inputs' dtype, with the bits of `a` where t is 0 and of `b` where t is 1."""
    return torch.where(t == 0, a, torch.where(t == 1, b, between.to(a.dtype)))


def lerp(a: Tensor, b: Tensor, t: float | Tensor, *, dim: int | Sequence[int] | None = None) -> Tensor:
    """(1 − t)·a + t·b. `dim` only says what `t` broadcasts to."""
    x, y = working(a), working(b)
    t = per_vector(t, x, vector_dims(a.ndim, dim))
    return _with_end_points(a, b, t, (1 - t) * x + t * y)


def nlerp(a: Tensor, b: Tensor, t: float | Tensor, *, dim: int | Sequence[int] | None = None) -> Tensor:
    """The direction of lerp(a, b, t) with the length (1 − t)|a| + t|b|."""
    dims = vector_dims(a.ndim, dim)
    x, y = working(a), working(b)
    t = per_vector(t, x, dims)
    straight = (1 - t) * x + t * y
    length = ((1 - t) * norm(x, dims) + t * norm(y, dims)).abs()
    actual = norm(straight, dims)
    vanishes = actual <= OPPOSITE * length  # also where both are zero: the turned vector is zero then
    scaled = straight * (length / torch.where(vanishes, 1, actual))
    if math.prod([x.shape[d] for d in dims]) > 1:
        na = norm(x, dims)
        turned = quarter_turn(x, dims) * (length / torch.where(na > 0, na, 1))
        scaled = torch.where(vanishes, turned, scaled)
    else:
        scaled = torch.where(vanishes, straight, scaled)
    return _with_end_points(a, b, t, scaled)


def slerp(a: Tensor, b: Tensor, t: float | Tensor, *, dim: int | Sequence[int] | None = None) -> Tensor:
    """sin((1 − t)θ)/sin θ · a + sin(tθ)/sin θ · b, with θ the angle between `a` and `b`."""
    dims = vector_dims(a.ndim, dim)
    x, y = working(a), working(b)
    t = per_vector(t, x, dims)
    na, nb = norm(x, dims), norm(y, dims)
    zero = (na == 0) | (nb == 0)
    u, v = x / torch.where(zero, 1, na), y / torch.where(zero, 1, nb)
    minus, plus = norm(u - v, dims), norm(u + v, dims)
    theta = 2 * torch.atan2(minus, plus)
    opposite = (plus <= OPPOSITE) & ~zero
    small = theta < SMALL_ANGLE

    sine = torch.where(small | opposite | zero, 1, minus * plus / 2)  # sin θ = 2 sin(θ/2) cos(θ/2)

    def weight(s: Tensor) -> Tensor:
        ss, tt = s * s, theta * theta
        series = s * (1 + tt * ((1 - ss) / 6 + tt * (7 - ss * (10 - 3 * ss)) / 360))
        return torch.where(small, series, torch.sin(s * theta) / sine)

    wa, wb = torch.where(zero, 1 - t, weight(1 - t)), torch.where(zero, t, weight(t))
    between = wa * x + wb * y
    if math.prod([x.shape[d] for d in dims]) > 1:
        length = (1 - t) + t * (nb / torch.where(zero, 1, na))  # in units of |a|
        half_circle = length * (torch.cos(math.pi * t) * x + torch.sin(math.pi * t) * quarter_turn(x, dims))
    else:
        half_circle = (1 - t) * x + t * y  # one element leaves no way round
    return _with_end_points(a, b, t, torch.where(opposite, half_circle, between))


def _path(function, a: Tensor, b: Tensor, ts: Sequence[float] | Tensor, dim) -> Tensor:
    values = ts.unbind(0) if isinstance(ts, Tensor) else list(ts)
    if not len(values):
        return a.new_empty((0, *a.shape))
    return torch.stack([function(a, b, t, dim=dim) for t in values])


def lerp_path(a: Tensor, b: Tensor, ts: Sequence[float] | Tensor, *, dim: int | Sequence[int] | None = None) -> Tensor:
    """`lerp` at each of the K values of `ts`: (K, *a.shape)."""
    return _path(lerp, a, b, ts, dim)


def nlerp_path(a: Tensor, b: Tensor, ts: Sequence[float] | Tensor, *, dim: int | Sequence[int] | None = None) -> Tensor:
    """`nlerp` at each of the K values of `ts`: (K, *a.shape)."""
    return _path(nlerp, a, b, ts, dim)


def slerp_path(a: Tensor, b: Tensor, ts: Sequence[float] | Tensor, *, dim: int | Sequence[int] | None = None) -> Tensor:
    """`slerp` at each of the K values of `ts`: (K, *a.shape)."""
    return _path(slerp, a, b, ts, dim)


def vector_dots(x: Tensor, y: Tensor) -> Tensor:
    """Inner products of the vectors of `x` (N, P, A, Q, M) and `y` (K, P, A, Q, M) over A and M: (K, P·Q, N)."""
    return torch.einsum("npaqm,kpaqm->kpqn", x, y).flatten(1, 2)


def vector_mix(x: Tensor, coefficients: Tensor) -> Tensor:
    """Σ_n coefficients[k, v, n] · x[n] for `x` (N, P, A, Q, M), `coefficients` (K, P·Q, N): (K, P, A, Q, M).

    A coefficient of exactly 0 leaves its vector out, so that what is not asked for cannot spread a NaN.
    """
    n, p, _, q, _ = x.shape
    c = working(coefficients).unflatten(1, (p, q))
    out = working(x).new_zeros((c.shape[0], *x.shape[1:]))
    for i in range(n):
        ci = c[:, :, None, :, None, i]
        out = out + torch.where(ci == 0, 0, ci * working(x[i]))
    return out.to(x.dtype)


def catmull_rom_weights(t: float, n: int) -> dict[int, float]:
    """Weights of the keys around `t` in [0, n − 1] (Catmull & Rom 1974; uniform, end keys doubled)."""
    i = min(int(t), n - 2) if n > 1 else 0
    s = t - i
    weights = (
        ((-0.5 * s + 1.0) * s - 0.5) * s,
        (1.5 * s - 2.5) * s * s + 1.0,
        ((-1.5 * s + 2.0) * s + 0.5) * s,
        (0.5 * s - 0.5) * s * s,
    )
    out: dict[int, float] = {}
    for offset, w in zip((-1, 0, 1, 2), weights, strict=True):
        if w:
            k = min(max(i + offset, 0), n - 1)
            out[k] = out.get(k, 0.0) + w
    return out


def interpolate_keys(
    keys: Tensor, ts: Sequence[float], *, mode: str = "slerp", dim: int | Sequence[int] | None = None
) -> Tensor:
    """A curve through N keyframes at K real positions in [0, N − 1]: (K, *keys.shape[1:])."""
    n = keys.shape[0]
    out = []
    for t in ts:
        if mode == "catmull_rom":
            weights = catmull_rom_weights(float(t), n)
            if len(weights) == 1:
                out.append(keys[next(iter(weights))].clone())
            else:
                terms = [w * working(keys[k]) for k, w in weights.items()]
                out.append(torch.stack(terms).sum(0).to(keys.dtype))
            continue
        i = min(int(t), n - 2) if n > 1 else 0
        function = {"lerp": lerp, "nlerp": nlerp, "slerp": slerp}[mode]
        out.append(function(keys[i], keys[min(i + 1, n - 1)], float(t) - i, dim=dim))
    return torch.stack(out) if out else keys.new_empty((0, *keys.shape[1:]))


#: Fixed steps of the spherical mean: the iteration contracts at least by half a step for vectors within a hemisphere.
SPHERICAL_MEAN_STEPS = 24


def spherical_mean_coefficients(gram: Tensor, weights: Tensor, steps: int = SPHERICAL_MEAN_STEPS) -> Tensor:
    """Coefficients c (V, N) of the weighted mean on the sphere, from each vector's Gram matrix `gram` (V, N, N).

    The mean lies in the span of its inputs, so the whole iteration (Buss & Fillmore, "Spherical Averages and
    Applications to Spherical Splines and Interpolation", ACM TOG 2001, algorithm A1) runs on N×N numbers: with m = Σ
    c_n u_n on the unit sphere, step along the mean of the logarithms Σ w_n log_m(u_n), and walk the geodesic.
    `weights` is (V, N), each row summing to 1. The result carries the length Σ w_n |x_n|. Zero vectors pull nowhere;
    where the straight mean vanishes (opposite vectors of one weight), the iteration starts at the input of most weight.
    """
    squares = gram.diagonal(dim1=-2, dim2=-1)
    present = squares != 0
    roots = torch.where(present, squares, 1).sqrt()  # the root has no derivative at 0
    lengths, inverse = torch.where(present, roots, 0), torch.where(present, 1 / roots, 0)
    cosines = gram * inverse[:, :, None] * inverse[:, None, :]

    # Products and sums, not matmul: batched products of matrices this small cost a library call for every vector.
    def along_inputs(c: Tensor) -> Tensor:
        return (cosines * c[:, None, :]).sum(-1)

    def square(c: Tensor) -> Tensor:
        return (c * along_inputs(c)).sum(-1, keepdim=True)

    def unit(c: Tensor) -> Tensor:
        return c / square(c).clamp_min(1e-30).sqrt()

    w = torch.where(present, weights, 0)
    straight = square(w)
    heaviest = torch.where(present, torch.nn.functional.one_hot(w.abs().argmax(-1), w.shape[-1]), 0).to(w.dtype)
    c = unit(torch.where(straight > OPPOSITE**2 * w.abs().sum(-1, keepdim=True) ** 2, w, heaviest))
    for _ in range(steps):
        along = along_inputs(c).clamp(-1, 1)  # cos of the angle from the mean to each input
        theta = torch.acos(along.clamp(-1 + 1e-14, 1 - 1e-14))
        factor = torch.where(along > 1 - 1e-9, 1 + (1 - along) / 3, theta / torch.sin(theta))
        pull = torch.where(along < -1 + 1e-10, 0, w * factor)  # an antipode pulls in every direction alike
        step = pull - (pull * along).sum(-1, keepdim=True) * c  # Σ w_n log_m(u_n), as coefficients
        size = square(step).clamp_min(1e-30).sqrt()
        c = unit(torch.cos(size) * c + torch.sin(size) / size * step)
    length = (weights * lengths).sum(-1, keepdim=True)
    return c * inverse * length


def spherical_mean(
    latents: Tensor, weights: Tensor | Sequence[float], *, dim: int | Sequence[int] | None = None
) -> Tensor:
    """The weighted mean on the sphere of N latents (N, …), by the iteration of `spherical_mean_coefficients`."""
    n = latents.shape[0]
    dims = vector_dims(latents.ndim - 1, dim)
    kept = [d for d in range(latents.ndim - 1) if d not in dims]
    order = [0, *(d + 1 for d in kept), *(d + 1 for d in dims)]
    moved = working(latents).permute(order)
    x = moved.reshape(n, math.prod(moved.shape[1 : 1 + len(kept)]), math.prod(moved.shape[1 + len(kept) :]), 1, 1)
    w = torch.as_tensor(weights, dtype=x.dtype, device=x.device)
    w = (w / w.sum(0, keepdim=True)).reshape(n, -1).T.expand(x.shape[1], n)
    c = spherical_mean_coefficients(vector_dots(x.double(), x.double()).transpose(0, 1), w.double()).to(x.dtype)
    out = vector_mix(x, c[None]).reshape(moved.shape[1:]).to(latents.dtype)
    return out.permute([order.index(d + 1) - 1 for d in range(latents.ndim - 1)]).contiguous()
