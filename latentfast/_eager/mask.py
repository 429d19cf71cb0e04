"""Masks: the operators' signatures in front of the reference."""

import math

from latentfast import reference


def token_heatmap(q, k, q_heads_last, k_heads_last, weights, keys, sizes, key_mask, scale, out) -> None:
    if weights is None:
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        weights = [keys[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    q, k = (x.transpose(1, 2) if last else x for x, last in ((q, q_heads_last), (k, k_heads_last)))
    out.copy_(reference.mask.token_heatmap(q, k, weights, scale=scale, key_mask=key_mask))


def heatmap_to_mask(heat, grid, threshold, quantile, softness, dilate, smooth_time, out) -> None:
    mask = reference.mask.heatmap_to_mask(
        heat, grid, out.shape[2:],
        threshold=None if math.isnan(threshold) else threshold, quantile=None if math.isnan(quantile) else quantile,
        softness=softness, dilate=dilate, smooth_time=smooth_time,
    )  # fmt: skip
    out.copy_(mask)
