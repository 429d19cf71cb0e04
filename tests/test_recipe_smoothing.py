"""Clips made calmer by gradient steps on the temporal loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import latentfast
from latentfast.recipe import smoothed
from tests.helpers import Draw, same_bits
from tests.recipes import DEVICES


@pytest.mark.parametrize(("first", "second"), [(1.0, 0.0), (0.0, 1.0), (1.0, 0.5)])
@pytest.mark.parametrize("with_ref", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_smoothing_ends_at_the_least(first: float, second: float, with_ref: bool, masked: bool) -> None:
    """The objective is quadratic: its minimum solves a linear system over the frames of each cell."""
    draw = Draw(torch.float64)
    z, ref = draw.normal(2, 3, 6, 2, 2), draw.normal(2, 3, 6, 2, 2) if with_ref else None
    still = draw.mask(2, 1, 6, 2, 2) if masked else None
    d1 = torch.diff(torch.eye(6, dtype=torch.float64), dim=0)
    d2 = torch.diff(d1, dim=0)
    m = torch.ones_like(z) if still is None else still.expand_as(z)
    m = m.movedim(2, -1)
    weights = m[..., 1:] * m[..., :-1], m[..., 2:] * m[..., 1:-1] * m[..., :-2]
    change = first * d1.T @ (weights[0][..., None] * d1) + second * d2.T @ (weights[1][..., None] * d2)
    data = 0.2
    other = torch.zeros_like(z) if ref is None else ref
    columns = data * z.movedim(2, -1)[..., None] + change @ other.movedim(2, -1)[..., None]
    exact = torch.linalg.solve(change + data * torch.eye(6).double(), columns)[..., 0].movedim(-1, 2)
    got = smoothed(z, ref, still, steps=2000, first=first, second=second, data=data)
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-9)  # what is left of 2000 steps of a convex descent


@pytest.mark.parametrize("device", DEVICES)
def test_smoothing_lowers_the_loss_of_each_sample_by_itself(device: str) -> None:
    z = Draw(torch.float32, device).normal(2, 1, 4, 2, 2)
    got = smoothed(z, steps=4)
    before, after = (latentfast.temporal_loss(x, reduction="none") for x in (z, got))
    assert (after < 0.5 * before).all()
    assert same_bits(smoothed(z[1:], steps=4), got[1:])


def test_smoothing_at_the_edges() -> None:
    z = torch.randn(3, 2, 5, 2, 4)
    got = smoothed(z, steps=10)
    across = z.transpose(1, 2).contiguous()
    assert same_bits(smoothed(across, steps=10, frame_dim=1), got.transpose(1, 2).contiguous())
    for few in (z[:, :, :1], z[:0], z[:, :, :2]):
        made = smoothed(few.contiguous(), steps=3, second=1.0)
        assert made.shape == few.shape and made.isfinite().all()
    assert same_bits(smoothed(z[:, :, :1], steps=3), z[:, :, :1].contiguous())
    seen: list[Tensor] = []
    last = smoothed(z, steps=5, on_step=seen.append)
    assert len(seen) == 5 and same_bits(seen[-1], last) and same_bits(seen[1], smoothed(z, steps=2))
    # where nothing pulls, (1 + m)·x − m·x of each step leaves a rounding or two
    torch.testing.assert_close(smoothed(z, still=torch.zeros(1), steps=5), z, rtol=1e-6, atol=1e-6)
    half = z.to(torch.float16)
    # float32 all the way and rounded once
    assert same_bits(smoothed(half, steps=10), smoothed(half.float(), steps=10).half())
