"""Masks from a model's own attention: heat maps of prompt tokens, masks from heat maps, masks from predictions."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from latentfast.reference._common import working

#: Scores that the chunked form holds at a time.
_CHUNK = 1 << 26


def token_weights(tokens: Tensor | Sequence[Sequence[int]], keys: int, like: Tensor) -> Tensor:
    """`tokens` as weights (G, Nk) of `like`'s dtype: those given, or 1 for each key that a group lists."""
    if isinstance(tokens, Tensor):
        return tokens.to(like)
    rows = [[float(key in group) for key in range(keys)] for group in tokens]
    return torch.tensor(rows, dtype=like.dtype, device=like.device).reshape(len(tokens), keys)


def token_heatmap(
    q: Tensor,
    k: Tensor,
    tokens: Tensor | Sequence[Sequence[int]],
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """mean_h Σ_k tokens[g, k] · softmax_k(scale · q·kᵀ)[k]: (B, H, Nq, D) and (B, H, Nk, D) -> (B, G, Nq).

    Keys that `key_mask` (B, Nk) or (Nk) leaves out have no part; a query without keys or heads gets 0.
    """
    x, y = working(q), working(k)
    heads, keys = q.shape[1], k.shape[2]
    scores = (q.shape[3] ** -0.5 if scale is None else scale) * (x @ y.transpose(-1, -2))
    if key_mask is not None:
        allowed = key_mask.bool().expand(q.shape[0], keys)[:, None, None]
        scores = scores.masked_fill(~allowed, -math.inf)
    # of no key, or of none that is allowed, softmax is NaN
    weights = scores.softmax(-1)
    if key_mask is not None:
        weights = weights.masked_fill(~allowed.any(-1, keepdim=True), 0)
    mass = weights @ token_weights(tokens, keys, x).T
    return mass.transpose(-1, -2).sum(1) / max(heads, 1)


def token_heatmap_in_chunks(
    q: Tensor,
    k: Tensor,
    tokens: Tensor | Sequence[Sequence[int]],
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """The same for some queries at a time: the exact result where the scores of all would not fit into memory."""
    rows = max(1, _CHUNK // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    parts = [token_heatmap(part, k, tokens, scale=scale, key_mask=key_mask) for part in q.split(rows, 2)]
    return torch.cat(parts, -1)


def gaussian(sigma: float) -> list[float]:
    """Weights of a Gaussian at −R … R, R = ⌈3σ⌉, of sum 1; a single 1 for σ = 0."""
    if not sigma:
        return [1.0]
    radius = math.ceil(3 * sigma)
    weights = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(-radius, radius + 1)]
    total = math.fsum(weights)
    return [w / total for w in weights]


def _smooth_over_time(x: Tensor, sigma: float) -> Tensor:
    """(B, G, t, h, w) smoothed along t; beyond its ends a clip stands still."""
    weights = gaussian(sigma)
    radius, frames = len(weights) // 2, x.shape[2]
    out = torch.zeros_like(x)
    for i, weight in enumerate(weights):
        at = (torch.arange(frames, device=x.device) + (i - radius)).clamp(0, max(frames - 1, 0))
        out = out + weight * x[:, :, at]
    return out


def quantile(x: Tensor, q: float) -> Tensor:
    """torch.quantile(x, q, dim=-1) with linear interpolation, its rank in float64, of rows of any length."""
    rank = q * (x.shape[-1] - 1)
    low = math.floor(rank)
    ordered = x.sort(-1).values
    below, above = ordered[..., low], ordered[..., min(low + 1, x.shape[-1] - 1)]
    return below + (rank - low) * (above - below)


def heatmap_to_mask(
    heat: Tensor,
    grid: Sequence[int],
    size: Sequence[int],
    *,
    threshold: float | None = None,
    quantile: float | None = None,
    softness: float = 0.0,
    dilate: int = 0,
    smooth_time: float = 0.0,
) -> Tensor:
    """Masks (B, G, T, H, W) in [0, 1] from heat maps (B, G, t·h·w), each map (b, g) by itself:

    1. normalised to [0, 1] by its least and largest value; 0 if they are equal;
    2. smoothed over time by a Gaussian of `smooth_time` frames, the ends held;
    3. enlarged to `size`, linear in t, h and w, align_corners=False;
    4. dilated: the largest value within `dilate` elements in h and w;
    5. compared with `threshold`, or with the `quantile` of the map after step 4: 1 above, 0 elsewhere. With
       `softness` > 0 a ramp in place of the step, 3u² − 2u³ of u = (x − threshold) / softness + ½ in [0, 1].

    A map that holds a NaN or an infinity is NaN throughout.
    """
    x = working(heat)
    b, g, _ = x.shape
    if x.numel() == 0 or 0 in size:
        return x.new_zeros(b, g, *size)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    span = high - low
    x = torch.where(span > 0, (x - low) / span, torch.zeros_like(x))
    finite = torch.isfinite(span)
    x = x.masked_fill(~finite, 0).reshape(b, g, *grid)
    x = _smooth_over_time(x, smooth_time).reshape(b * g, 1, *grid)
    # one channel a map: with several, torch takes a grid of one element for one with its channels last
    x = F.interpolate(x, tuple(size), mode="trilinear", align_corners=False)
    if dilate:
        window = (1, 2 * dilate + 1, 2 * dilate + 1)
        x = F.max_pool3d(x, window, stride=1, padding=(0, dilate, dilate))
    x = x.reshape(b, g, -1)
    limit: Tensor | float | None = threshold
    if quantile is not None:
        limit = _quantile(x, quantile).unsqueeze(-1)
    if limit is not None:
        if softness:
            u = ((x - limit) / softness + 0.5).clamp(0, 1)
            x = u * u * (3 - 2 * u)
        else:
            x = (x > limit).to(x.dtype)
    return x.masked_fill(~finite, math.nan).reshape(b, g, *size)


_quantile = quantile  # the argument of the same name hides it above

Velocity = Callable[[Tensor, float], Tensor]


def flow_edit_step(
    z_edit: Tensor,
    source: Tensor,
    noise: Tensor,
    velocity_source: Velocity,
    velocity_target: Velocity,
    *,
    t: float,
    t_next: float,
) -> Tensor:
    """z_edit + (t_next − t) · mean_n (V_target(z_edit + z_n − source) − V_source(z_n)).

    z_n = (1 − t) · source + t · noise_n.

    FlowEdit (Kulikov et al. 2024, arXiv 2412.08629, algorithm 1), `noise` of `source`'s shape or with N in front.
    """
    draws = noise if noise.ndim > source.ndim else noise.unsqueeze(0)
    edit, clean = working(z_edit), working(source)
    step = torch.zeros_like(edit)
    for draw in draws:
        noisy = ((1 - t) * clean + t * working(draw)).to(source.dtype)
        moved = (edit + working(noisy) - clean).to(source.dtype)
        step = step + working(velocity_target(moved, t)) - working(velocity_source(noisy, t))
    return (edit + (t_next - t) / len(draws) * step).to(z_edit.dtype)


def difference_mask(
    target_preds: Tensor, source_preds: Tensor, *, threshold: float | None = 0.5, clamp: float = 3.0
) -> Tensor:
    """Where two prompts' predictions (N, B, C, …) differ: (B, 1, …).

    DiffEdit (Couairon et al. 2022, arXiv 2210.11427, section 3.2): |difference|, its mean over draws and channels,
    clamped at `clamp` times the sample's mean and divided by that, then 1 above `threshold`, else 0. None: no step.
    """
    apart = (working(target_preds) - working(source_preds)).abs().mean((0, 2)).unsqueeze(1)
    limit = clamp * apart.mean(tuple(range(1, apart.ndim)), keepdim=True)
    x = torch.where(limit > 0, torch.minimum(apart, limit) / limit, torch.zeros_like(apart))
    x = x.masked_fill(limit.isnan(), math.nan)
    return x if threshold is None else torch.where(x.isnan(), x, (x > threshold).to(x.dtype))
