"""Edits and blends on every backend: identities of masks, broadcasting, what must keep bits."""

import math
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import latentfast
from latentfast import reference
from tests.helpers import DTYPES, HALVES, Draw, Target, assert_matches_spec, same_bits, working_dtype

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
shapes = st.tuples(*[st.sampled_from([1, 2, 3, 5, 7])] * 5)
seeds = st.integers(0, 2**31 - 1)


# --- Identities -------------------------------------------------------------------------------------------------------


@given(shape=shapes, seed=seeds, n=st.integers(1, 3))
def test_edit_with_a_mask_of_zeros_keeps_bits(target: Target, shape: tuple, seed: int, n: int) -> None:
    draw = Draw(torch.float32, target.device, seed)
    z, directions = draw.normal(*shape), draw.normal(n, *shape)
    mask = torch.zeros(shape[0], 1, *shape[2:], device=target.device)
    assert same_bits(latentfast.edit(z, directions, [1.5] * n, mask), z)
    assert same_bits(latentfast.edit(z, directions, [0.0] * n), z)


@given(shape=shapes, seed=seeds, n=st.integers(1, 3))
def test_edit_with_a_mask_of_ones_is_edit_without_one(target: Target, shape: tuple, seed: int, n: int) -> None:
    draw = Draw(torch.float32, target.device, seed)
    z, directions = draw.normal(*shape), draw.normal(n, *shape)
    strengths = [0.3 * (i + 1) for i in range(n)]
    plain = latentfast.edit(z, directions, strengths)
    ones = torch.ones(shape[0], 1, *shape[2:], device=target.device)
    for mask in (ones, ones.bool(), ones.expand(n, *shape), torch.ones((), device=target.device)):
        assert same_bits(latentfast.edit(z, directions, strengths, mask), plain)


@given(shape=shapes, seed=seeds)
def test_blend_with_zeros_and_ones_keeps_bits(target: Target, shape: tuple, seed: int) -> None:
    draw = Draw(torch.float32, target.device, seed)
    base, edited = draw.normal(*shape), draw.normal(*shape)
    for mask in (torch.zeros(shape), torch.zeros(shape[2:]), torch.zeros(()).bool()):
        mask = mask.to(target.device)
        assert same_bits(latentfast.blend(base, edited, mask), base)
        assert same_bits(latentfast.blend(base, edited, torch.ones_like(mask)), edited)


@given(shape=shapes, seed=seeds)
def test_blending_twice_with_a_hard_mask_changes_nothing_more(target: Target, shape: tuple, seed: int) -> None:
    draw = Draw(torch.float32, target.device, seed)
    base, edited = draw.normal(*shape), draw.normal(*shape)
    hard = draw.uniform(*shape) < 0.5
    once = latentfast.blend(base, edited, hard)
    assert same_bits(once, torch.where(hard, edited, base))
    assert same_bits(latentfast.blend(base, once, hard), once)


@every_dtype
def test_blend_leaks_nothing_through_a_hard_mask(dtype: torch.dtype, target: Target) -> None:
    """Also where a product with 0 is not 0 (NaN, Inf), a difference overflows, or −0 would lose its sign."""
    draw = Draw(dtype, target.device)
    base, edited = draw.normal(2, 3, 4, 5, 7), draw.normal(2, 3, 4, 5, 7)
    mask = (draw.uniform(2, 1, 4, 5, 7) < 0.5).to(dtype)
    inside = mask.expand(base.shape) == 1
    largest = torch.finfo(dtype).max
    for value in (math.nan, math.inf, -math.inf, largest, -0.0):
        other = base.masked_fill(~inside, value) if value == 0 else base
        spoilt = edited.masked_fill(~inside, value if value else -largest)
        got = latentfast.blend(other, spoilt, mask)
        assert same_bits(got, torch.where(inside, spoilt, other))
        got = latentfast.blend(base.masked_fill(inside, value), edited, mask)
        assert same_bits(got, torch.where(inside, edited, base))


def test_rule6_edit_multiplies_as_written(target: Target) -> None:
    """0·∞ is NaN: a direction that is not finite shows, also where mask or strength is 0."""
    z = torch.zeros(1, 4, device=target.device)
    direction = torch.tensor([[[math.inf, math.nan, 1.0, -math.inf]]], device=target.device)
    mask = torch.zeros(1, 4, device=target.device)
    for out in (latentfast.edit(z, direction, [1.0], mask), latentfast.edit(z, direction, [0.0])):
        assert out.isnan().tolist() == [[True, True, False, True]]


@every_dtype
def test_edit_sums_in_the_order_of_the_directions(dtype: torch.dtype, target: Target) -> None:
    """(huge + 1) − huge is 0 if huge swallows 1, where huge − huge + 1 would be 1. z itself may come first or last."""
    huge = 2.0 ** (70 if dtype == torch.float64 else 40)
    z = torch.zeros(2, 3, dtype=dtype, device=target.device)
    directions = torch.ones(3, 2, 3, dtype=dtype, device=target.device)
    assert torch.equal(latentfast.edit(z, directions, [huge, 1.0, -huge]), z)
    assert torch.equal(latentfast.edit(z, directions, [huge, -huge, 1.0]), z + 1)


# --- Values: forms of strengths, masks and directions -----------------------------------------------------------------

MASKS = {
    "one for all": (2, 1, 4, 5, 7),
    "for each channel": (3, 1, 1, 1),
    "columns": (7,),
    "scalar": (),
    "full": (2, 3, 4, 5, 7),
    "per direction": (3, 1, 1, 4, 5, 7),
    "per direction and sample": (3, 2, 1, 1, 1, 1),
    "with a dimension for the directions": (1, 2, 1, 4, 5, 7),
    "frames": (4, 1, 1),
}
DIRECTIONS = {
    "full": (3, 2, 3, 4, 5, 7),
    "for all samples": (3, 1, 3, 4, 5, 7),
    "a colour": (3, 1, 3, 1, 1, 1),
    "one for all strengths": (1, 1, 3, 4, 5, 7),
    "one number each": (3, 1, 1, 1, 1, 1),
}


@pytest.mark.parametrize("directions", DIRECTIONS)
@pytest.mark.parametrize("mask", [*MASKS, None])
@pytest.mark.parametrize("per_sample", [False, True], ids=["strengths (N,)", "strengths (N, B)"])
def test_edit_broadcasts(per_sample: bool, mask: str | None, directions: str, target: Target) -> None:
    draw = Draw(device=target.device)
    inputs = {
        "z": draw.normal(2, 3, 4, 5, 7),
        "directions": draw.normal(*DIRECTIONS[directions]),
        "strengths": draw.normal(*((3, 2) if per_sample else (3,))),
    }
    if mask is not None:
        inputs["mask"] = draw.mask(*MASKS[mask])
    assert_matches_spec(latentfast.edit(**inputs), reference.edit.edit, inputs)


@every_dtype
@pytest.mark.parametrize("mask_batch", [1, 8])
def test_edit_of_each_sample_by_its_own_strengths(mask_batch: int, dtype: torch.dtype, target: Target) -> None:
    """Directions that channels share, and a mask that samples may share: neither makes the strengths common."""
    draw = Draw(dtype, target.device)
    inputs = {
        "z": draw.normal(8, 4, 3, 4, 16),
        "directions": draw.normal(3, 8, 1, 3, 4, 16),
        "strengths": draw.normal(3, 8).to(working_dtype(dtype)),
        "mask": draw.mask(mask_batch, 1, 3, 4, 16),
    }
    assert_matches_spec(latentfast.edit(**inputs), reference.edit.edit, inputs)


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 17), (6,)], ids=str)
def test_edit_of_images_and_flat_latents(shape: tuple, target: Target) -> None:
    draw = Draw(device=target.device)
    inputs = {"z": draw.normal(*shape), "directions": draw.normal(2, *shape), "mask": draw.mask(*shape)}
    assert_matches_spec(
        latentfast.edit(**inputs, strengths=[0.5, -2.0]), partial(reference.edit.edit, strengths=[0.5, -2.0]), inputs
    )


@pytest.mark.parametrize("n", [1, 2, 4, 5, 9])
def test_edit_with_many_directions(n: int, target: Target) -> None:
    draw = Draw(device=target.device)
    inputs = {"z": draw.normal(2, 3, 35), "directions": draw.normal(n, 2, 3, 35), "mask": draw.mask(2, 1, 35)}
    strengths = [(-0.8) ** i for i in range(n)]
    assert_matches_spec(
        latentfast.edit(**inputs, strengths=strengths), partial(reference.edit.edit, strengths=strengths), inputs
    )


@pytest.mark.parametrize("mask_shape", [None, (2, 1, 5), (0, 2, 3, 5), (0, 1, 1, 1)], ids=str)
def test_rule7_edit_without_directions(mask_shape: tuple | None, target: Target) -> None:
    z = Draw(device=target.device).normal(2, 3, 5)
    mask = None if mask_shape is None else torch.ones(mask_shape, device=target.device)
    out = latentfast.edit(z, z.new_empty(0, 2, 3, 5), [], mask)
    assert same_bits(out, z)
    assert out.data_ptr() != z.data_ptr()


@pytest.mark.parametrize(
    "mask_dtype", [torch.bool, torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str
)
@every_dtype
def test_masks_of_every_dtype(dtype: torch.dtype, mask_dtype: torch.dtype, target: Target) -> None:
    draw = Draw(dtype, target.device)
    z, other = draw.normal(2, 3, 5, 7), draw.normal(2, 3, 5, 7)
    mask = draw.mask(2, 1, 5, 7, dtype=torch.float32)
    mask = mask > 0.5 if mask_dtype == torch.bool else mask.to(mask_dtype)
    # what a kernel gets is the latents' dtype or float32: a float64 mask beside other latents is rounded to float32
    seen = mask.to(torch.float32 if mask_dtype == torch.float64 and dtype != torch.float64 else torch.float64)
    inputs = {"base": z, "edited": other, "mask": seen}
    assert_matches_spec(latentfast.blend(z, other, mask), reference.edit.blend, inputs)
    inputs = {"z": z, "directions": other.unsqueeze(0), "mask": seen}
    assert_matches_spec(
        latentfast.edit(z, other.unsqueeze(0), [0.7], mask), partial(reference.edit.edit, strengths=[0.7]), inputs
    )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_float32_mask_is_not_rounded_to_half_precision(dtype: torch.dtype, target: Target) -> None:
    base = torch.zeros(4, dtype=dtype, device=target.device)
    edited = torch.full((4,), 256.0, dtype=dtype, device=target.device)
    mask = torch.full((4,), 1 + 2.0**-12, device=target.device)  # rounds to 1 in both half dtypes
    mask[0] = 2.0**-30  # underflows in float16
    got = latentfast.blend(base, edited, mask)
    assert got[0].item() == torch.tensor(256.0 * 2.0**-30).to(dtype).item() > 0


# --- The mask of an edit and the length of a strength -----------------------------------------------------------------


def test_strengths_of_every_kind_agree(target: Target) -> None:
    draw = Draw(device=target.device)
    z, directions = draw.normal(2, 3, 5), draw.normal(2, 2, 3, 5)
    expected = latentfast.edit(z, directions, [0.5, -0.25])
    for strengths in (
        (0.5, -0.25),
        torch.tensor([0.5, -0.25], device=target.device),
        torch.tensor([0.5, -0.25], device=target.device, dtype=torch.float16),
        torch.tensor([[0.5, 0.5], [-0.25, -0.25]], device=target.device),
    ):
        assert same_bits(latentfast.edit(z, directions, strengths), expected)
