"""Masks: heat maps of prompt tokens from attention, masks from heat maps and from predictions, FlowEdit's step."""

import math
import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from latentfast.backends import implementation
from latentfast.ops import _checks
from latentfast.ops._sums import total
from latentfast.ops.combine import MOST_TENSORS, combine

#: The widest head that the kernels hold a tile of: that of the attention kernels these heat maps stand beside.
_WIDEST_HEAD = 256


def token_heatmap(
    q: Tensor,
    k: Tensor,
    tokens: Tensor | Sequence[Sequence[int]],
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Where a model's attention looks for some of its prompt's tokens, the mean over its heads.

    mean_h Σ_k tokens[g, k] · softmax_k(scale · q·kᵀ)[k] for each group g and query.

    The scores are never stored: 14 GiB for one layer of a 14B model at 720p. Their maximum and sum are kept up while
    the products are made.

    Args:
        q: Queries `(B, H, Nq, D)`, as attention gets them (after any norm and rotary embedding); float32, float16,
            bfloat16 or float64. A view with heads and queries swapped, of a tensor `(B, Nq, H, D)`, is read in place.
        k: Keys `(B, H, Nk, D)` of `q`'s dtype, in either layout too; D is at most 256.
        tokens: G groups of keys, each a list of key numbers, every number at most once in a group, for the mass on
            them together; or weights `(G, Nk)`, a tensor on `q`'s device. Lists of up to 16 keys in all are cheapest.
        scale: What the products are multiplied by, positive; None: D^−½.
        key_mask: bool `(B, Nk)` or `(Nk,)`, True for keys that take part (padding left out); None: all.

    Returns:
        A new contiguous tensor `(B, G, Nq)`, float32 (float64 for float64 queries): with lists, each in [0, 1]. 0 for
        queries that have no key.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: shapes, devices, key numbers or the scale do not fit; or a tensor requires grad.

    Not differentiable.

    Example:
        >>> import torch, latentfast
        >>> q, k = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 5, 4)  # alike: every key gets a fifth
        >>> latentfast.token_heatmap(q, k, [[0], [1, 2]])
        tensor([[[0.2000, 0.2000, 0.2000],
                 [0.4000, 0.4000, 0.4000]]])
    """
    _checks.latent("q", q)
    _checks.latent("k", k)
    _checks.same_kind("k", k, "q", q)
    if q.ndim != 4 or q.shape[3] < 1:
        raise ValueError(f"q must have shape (B, H, Nq, D) with D of at least 1, got {tuple(q.shape)}")
    batch, heads, queries, width = q.shape
    if k.ndim != 4 or k.shape[:2] != q.shape[:2] or k.shape[3] != width:
        raise ValueError(f"k must have shape ({batch}, {heads}, Nk, {width}), got {tuple(k.shape)}")
    if width > _WIDEST_HEAD:
        raise ValueError(f"q must have heads of at most {_WIDEST_HEAD} elements, got {width}")
    count = k.shape[2]
    if scale is None:
        scale = width**-0.5
    elif not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise TypeError(f"scale must be a float, got {type(scale).__name__}")
    elif not (0 < scale < math.inf):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    wide = _checks.wide(q.dtype)
    weights: Tensor | None = None
    keys: list[int] = []
    sizes: list[int] = []
    if isinstance(tokens, Tensor):
        weights = _token_weights(tokens, q, count, wide)
    else:
        keys, sizes = _token_lists(tokens, count)
    if key_mask is not None:
        if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
            found = key_mask.dtype if isinstance(key_mask, Tensor) else type(key_mask).__name__
            raise TypeError(f"key_mask must be a bool tensor, got {found}")
        _checks.same_device("key_mask", key_mask, "q", q)
        if key_mask.shape not in ((count,), (1, count), (batch, count)):
            raise ValueError(f"key_mask must have shape ({batch}, {count}) or ({count},), got {tuple(key_mask.shape)}")
        key_mask = key_mask.reshape(-1, count).contiguous()
    for name, x in (("q", q), ("k", k), ("tokens", weights)):
        _frozen(name, x, "the heat map")
    q, q_heads_last = _in_place(q)
    k, k_heads_last = _in_place(k)
    groups = len(sizes) if weights is None else weights.shape[0]
    out = torch.empty((batch, groups, queries), dtype=wide, device=q.device)
    implementation("token_heatmap", q)(
        q, k, q_heads_last, k_heads_last, weights, keys, sizes, key_mask, float(scale), out
    )
    return out


def _frozen(name: str, x: Tensor | None, result: str) -> None:
    if x is not None and torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(f"{name} requires grad, but {result} is not differentiable; pass {name}.detach()")


def _in_place(x: Tensor) -> tuple[Tensor, bool]:
    """`x` (B, H, N, D) as a contiguous tensor, and whether its heads come after N there."""
    if x.is_contiguous():
        return x, False
    swapped = x.transpose(1, 2)
    return (swapped, True) if swapped.is_contiguous() else (x.contiguous(), False)


def _token_weights(tokens: Tensor, q: Tensor, count: int, wide: torch.dtype) -> Tensor:
    if tokens.dtype != torch.bool and tokens.dtype not in _checks.DTYPES:
        raise TypeError(f"tokens must be lists of key numbers, or bool or floating weights, got {tokens.dtype}")
    if tokens.ndim != 2 or tokens.shape[1] != count:
        raise ValueError(f"tokens must have shape (G, {count}), got {tuple(tokens.shape)}")
    _checks.same_device("tokens", tokens, "q", q)
    return tokens.to(wide).contiguous()


def _token_lists(tokens: Sequence[Sequence[int]], count: int) -> tuple[list[int], list[int]]:
    """The groups' key numbers one after another, and how many each has."""
    try:
        groups = [[operator.index(key) for key in group] for group in tokens]
    except TypeError:
        raise TypeError(f"tokens must be a tensor or lists of key numbers, got {tokens!r}") from None
    for group in groups:
        for key in group:
            if not 0 <= key < count:
                raise ValueError(f"tokens must name keys from 0 to {count - 1}, got {key}")
        if len(set(group)) < len(group):
            raise ValueError(f"tokens must name a key once in a group, got {group}")
    return [key for group in groups for key in group], [len(group) for group in groups]


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
    """Makes masks of heat maps on a model's token grid, at the latents' size; each map `(b, g)` by itself.

    1. Normalised over the whole clip to [0, 1] by the map's least and largest value; 0 if these are equal.
    2. Smoothed over time by a Gaussian (cut at ⌈3·`smooth_time`⌉ frames); beyond its ends the clip stands still.
    3. Enlarged to `size`, linear in all three dimensions, as `interpolate(mode="trilinear", align_corners=False)`.
    4. Dilated: the largest value within `dilate` elements in h and in w.
    5. 1 above `threshold`, 0 elsewhere; or above the `quantile` of the map after step 4. A `softness` above 0 makes a
       ramp of the step, 3u² − 2u³ with u = (x − threshold) / softness + ½ clamped to [0, 1].

    Args:
        heat: Heat maps `(B, G, t·h·w)`, of `token_heatmap`, say; float32, float16, bfloat16 or float64. A map that
            holds a NaN or an infinity becomes NaN, and no other does.
        grid: The tokens' grid `(t, h, w)`.
        size: `(T, H, W)` of the masks, the latents' size.
        threshold: On the scale of step 1. Without it and without `quantile` the map of step 4 is returned.
        quantile: In [0, 1]: 0.9 leaves a tenth of the elements above. Interpolated linearly between the two nearest
            elements as by `torch.quantile`, with its rank in float64 and for maps of any length.
        softness: Width of the ramp on the same scale, not negative.
        dilate: In elements of the result, not negative.
        smooth_time: Standard deviation in frames of the grid, not negative.

    Returns:
        A new contiguous tensor `(B, G, T, H, W)` in [0, 1], float32 (float64 for float64 heat).

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: shapes or numbers do not fit; `threshold` and `quantile` are both given; `softness` without either;
            or `heat` requires grad.

    Not differentiable.

    Example:
        >>> import torch, latentfast
        >>> heat = torch.tensor([[[0.0, 1.0, 2.0, 4.0]]])
        >>> latentfast.heatmap_to_mask(heat, (1, 2, 2), (1, 2, 2), threshold=0.3)
        tensor([[[[[0., 0.],
                   [1., 1.]]]]])
    """
    _checks.latent("heat", heat)
    grid, size = _three("grid", grid, "(t, h, w)"), _three("size", size, "(T, H, W)")
    if heat.ndim != 3 or heat.shape[2] != math.prod(grid):
        raise ValueError(f"heat must have shape (B, G, {math.prod(grid)}) for grid {grid}, got {tuple(heat.shape)}")
    if min(grid) < 1 and min(size) > 0:
        raise ValueError(f"grid must not be empty for a mask of size {size}, got {grid}")
    for name, value in (("threshold", threshold), ("quantile", quantile)):
        if value is not None:
            _checks.number(name, value)
    if threshold is not None and quantile is not None:
        raise ValueError(f"threshold and quantile exclude each other, got {threshold} and {quantile}")
    if quantile is not None and not 0 <= quantile <= 1:
        raise ValueError(f"quantile must be in [0, 1], got {quantile}")
    for name, value in (("softness", softness), ("smooth_time", smooth_time)):
        _checks.number(name, value, 0.0)
    if softness and threshold is None and quantile is None:
        raise ValueError(f"softness needs a threshold or a quantile, got {softness} without")
    if isinstance(dilate, bool) or not isinstance(dilate, int):
        raise TypeError(f"dilate must be an int, got {type(dilate).__name__}")
    if dilate < 0:
        raise ValueError(f"dilate must not be negative, got {dilate}")
    _frozen("heat", heat, "a mask")
    wide = _checks.wide(heat.dtype)
    out = torch.empty((*heat.shape[:2], *size), dtype=wide, device=heat.device)
    implementation("heatmap_to_mask", heat)(
        heat.to(wide).contiguous(), list(grid), math.nan if threshold is None else float(threshold),
        math.nan if quantile is None else float(quantile), float(softness), min(dilate, max(size)), float(smooth_time),
        out,
    )  # fmt: skip
    return out


def _three(name: str, sizes: Sequence[int], form: str) -> tuple[int, int, int]:
    try:
        t, h, w = map(operator.index, sizes)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be three integers {form}, got {sizes!r}") from None
    if min(t, h, w) < 0:
        raise ValueError(f"{name} must not be negative, got {(t, h, w)}")
    return t, h, w


Velocity = Callable[[Tensor, float], Tensor]


def _combined(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Σ c_i x_i, rounded once: `combine` for any number of tensors."""
    if len(tensors) <= MOST_TENSORS:
        return combine(tensors, coefficients)
    wide, dtype = _checks.wide(tensors[0].dtype), tensors[0].dtype
    mixed = combine([x.to(wide) for x in tensors[:MOST_TENSORS]], coefficients[:MOST_TENSORS])
    for at in range(MOST_TENSORS, len(tensors), MOST_TENSORS - 1):
        some = slice(at, at + MOST_TENSORS - 1)
        mixed = combine([mixed, *(x.to(wide) for x in tensors[some])], [1.0, *coefficients[some]])
    return mixed.to(dtype)


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
    """One step of FlowEdit, which leads a clip from one prompt to another without inverting it.

    z_edit + (t_next − t) · mean_n (V_target(z_edit + z_n − source, t) − V_source(z_n, t)) with the noised clips
    z_n = (1 − t) · source + t · noise_n (Kulikov et al. 2024, arXiv 2412.08629, algorithm 1).

    Args:
        z_edit: The clip so far `(B, …)`, at first `source` itself; float32, float16, bfloat16 or float64.
        source: The clip that is edited, like `z_edit`.
        noise: Standard normal, of `source`'s shape, or `(N, *source.shape)` for a mean over N draws; of its dtype.
        velocity_source: The model under the source's prompt: called with latents like `source` and `t`, gives its
            velocity, of the same shape and dtype, guidance included.
        velocity_target: The same under the target's prompt.
        t: The noise level of this step, in [0, 1].
        t_next: The next one, smaller.

    Returns:
        A new contiguous tensor like `z_edit`.

    Raises:
        TypeError: an argument is no tensor, or of an unknown or different dtype.
        ValueError: shapes, devices or numbers do not fit.

    Differentiable in the tensors, and through both models.

    Example:
        >>> import torch, latentfast
        >>> clip, noise = torch.zeros(1, 2), torch.ones(1, 2)
        >>> up, down = lambda z, t: torch.ones_like(z), lambda z, t: -torch.ones_like(z)
        >>> latentfast.flow_edit_step(clip, clip, noise, up, down, t=0.5, t_next=0.25)
        tensor([[0.5000, 0.5000]])
    """
    _checks.latent("z_edit", z_edit)
    _checks.like("source", source, "z_edit", z_edit)
    _checks.latent("noise", noise)
    _checks.same_kind("noise", noise, "z_edit", z_edit)
    if noise.shape != source.shape and (noise.shape[1:] != source.shape or noise.shape[0] < 1):
        shape = tuple(source.shape)
        raise ValueError(f"noise must have shape {shape} or (N, *{shape}), got {tuple(noise.shape)}")
    for name, value in (("t", t), ("t_next", t_next)):
        _checks.number(name, value, 0.0, 1.0)
    draws = noise.unsqueeze(0) if noise.shape == source.shape else noise
    share = (t_next - t) / draws.shape[0]
    velocities = []
    for draw in draws.unbind(0):
        noisy = _combined((source, draw), (1 - t, t))
        moved = _combined((z_edit, noisy, source), (1.0, 1.0, -1.0))
        for name, model, x in (("target", velocity_target, moved), ("source", velocity_source, noisy)):
            velocities.append(_checks.like(f"velocity_{name}'s result", model(x, t), "z_edit", z_edit))
    return _combined((z_edit, *velocities), (1.0, *((share, -share) * draws.shape[0])))


def difference_mask(
    target_preds: Tensor, source_preds: Tensor, *, threshold: float | None = 0.5, clamp: float = 3.0
) -> Tensor:
    """DiffEdit's mask: where a model's predictions under two prompts differ.

    The absolute difference, its mean over the draws and the channels, clamped at `clamp` times its mean over the sample
    and divided by that; then 1 above `threshold`, 0 elsewhere (Couairon et al. 2022, arXiv 2210.11427, section 3.2).
    Per sample: diffusers clamps at the mean of a batch, so there a sample's mask depends on its neighbours.

    Args:
        target_preds: Predictions under the target's prompt `(N, B, C, T, H, W)` for N draws of noise, or `(N, B, C, H,
            W)`; float32, float16, bfloat16 or float64.
        source_preds: Those of the source's prompt, on the same noise; like `target_preds`.
        threshold: In [0, 1]; None for the map itself.
        clamp: How many times its mean the map is cut at, above 0.

    Returns:
        A new contiguous tensor `(B, 1, T, H, W)`, float32 (float64 for float64 predictions). NaN for a sample whose
        predictions hold a NaN.

    Raises:
        TypeError: an argument is no tensor, or of an unknown or different dtype.
        ValueError: shapes, devices or numbers do not fit; or a tensor requires grad.

    Not differentiable. A composition of PyTorch's own operations: it runs once an edit.

    Example:
        >>> import torch, latentfast
        >>> source, target = torch.zeros(2, 1, 1, 3, 2, 2)  # one draw of one image
        >>> target[..., 0, 1] = 1.0
        >>> latentfast.difference_mask(target, source)
        tensor([[[[0., 1.],
                  [0., 0.]]]])
    """
    _checks.latent("target_preds", target_preds)
    _checks.like("source_preds", source_preds, "target_preds", target_preds)
    if target_preds.ndim < 4 or 0 in (target_preds.shape[0], target_preds.shape[2]):
        raise ValueError(
            f"target_preds must have shape (N, B, C, …) with N, C of at least 1, got {tuple(target_preds.shape)}"
        )
    if threshold is not None:
        _checks.number("threshold", threshold)
    if not _checks.number("clamp", clamp) > 0:
        raise ValueError(f"clamp must be positive and finite, got {clamp}")
    _frozen("target_preds", target_preds, "a mask")
    _frozen("source_preds", source_preds, "a mask")
    if not target_preds.shape[1]:
        shape = (0, 1, *target_preds.shape[3:])
        return target_preds.new_empty(shape, dtype=_checks.wide(target_preds.dtype))
    # one sample after another: in a batch torch's sums could run in another order
    return torch.stack(
        [
            _difference(target, source, threshold, clamp)
            for target, source in zip(target_preds.unbind(1), source_preds.unbind(1), strict=True)
        ]
    )


def _difference(target: Tensor, source: Tensor, threshold: float | None, clamp: float) -> Tensor:
    """The mask (1, …) of one sample's predictions (N, C, …)."""
    wide = _checks.wide(target.dtype)
    apart = (target.to(wide) - source.to(wide)).abs().mean((0, 1)).unsqueeze(0)
    if not apart.numel():
        return apart
    limit = clamp * (total(apart) / apart.numel())
    x = torch.where(limit > 0, torch.minimum(apart, limit) / limit, torch.zeros_like(apart))
    x = x.masked_fill(limit.isnan(), math.nan)
    return x if threshold is None else torch.where(x.isnan(), x, (x > threshold).to(wide))
