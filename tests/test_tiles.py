"""Tiles on every backend: diffusers' bits in sequential order, the properties of overlap-add, geometry, bad input."""

import re
from collections.abc import Sequence
from types import ModuleType

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

import latentfast
from latentfast import reference
from tests.helpers import DTYPES, LAYOUTS, Draw, Target, same_bits

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_modes = pytest.mark.parametrize("mode", ["sequential", "overlap_add"])
Grid = list[list[Tensor]]

#: Heights, widths and overlap, as diffusers cuts them: a tile at every stride, the last no larger than that.
GRIDS = {
    "one tile": ([6], [7], (2, 3)),
    "one row": ([6], [8, 8, 5], (4, 3)),
    "one column": ([8, 7, 3], [7], (4, 2)),
    "ragged": ([8, 8, 5], [9, 9, 9, 4], (3, 4)),
    "a last tile within the overlap": ([8, 6, 2], [8, 7, 3], (4, 4)),
    "half a tile": ([8, 4], [8, 8, 4], (4, 4)),
    "no overlap": ([4, 3], [5, 2], (0, 0)),
    "overlap in one direction": ([4, 3], [5, 3], (0, 2)),
    "packs of 16 bytes": ([8, 8, 4], [32, 32, 16], (4, 16)),
}
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


@pytest.fixture(scope="module")
def diffusers() -> ModuleType:
    return pytest.importorskip("diffusers")


def _tiles(draw: Draw, heights: Sequence[int], widths: Sequence[int], lead: tuple[int, ...] = (2, 3, 2)) -> Grid:
    return [[draw.normal(*lead, h, w) for w in widths] for h in heights]


def _drawn(grid: str, dtype: torch.dtype, target: Target) -> tuple[Grid, tuple[int, int]]:
    heights, widths, overlap = GRIDS[grid]
    return _tiles(Draw(dtype, target.device, 3), heights, widths), overlap


def _diffusers_rows(vae: type, rows: Grid, overlap: tuple[int, int]) -> Tensor:
    """The seams as `tiled_decode` makes them, by the class's own functions. Changes the tiles."""
    stride = (rows[0][0].shape[-2] - overlap[0], rows[0][0].shape[-1] - overlap[1])
    lines = []
    for i, row in enumerate(rows):
        line = []
        for j, tile in enumerate(row):
            if i > 0:
                tile = vae.blend_v(None, rows[i - 1][j], tile, overlap[0])
            if j > 0:
                tile = vae.blend_h(None, row[j - 1], tile, overlap[1])
            # what tiled_decode cuts off a single tile is its caller's: there a single tile is no larger than a stride
            line.append(tile[..., : stride[0] if len(rows) > 1 else None, : stride[1] if len(row) > 1 else None])
        lines.append(torch.cat(line, -1))
    return torch.cat(lines, -2)


def _copies(rows: Grid) -> Grid:
    return [[tile.clone() for tile in row] for row in rows]


# --- Sequential: diffusers' bits --------------------------------------------------------------------------------------


@every_dtype
@every_grid
def test_sequential_has_the_bits_of_diffusers_wan(
    grid: str, dtype: torch.dtype, target: Target, diffusers: ModuleType
) -> None:
    rows, overlap = _drawn(grid, dtype, target)
    expected = _diffusers_rows(diffusers.AutoencoderKLWan, _copies(rows), overlap)
    assert same_bits(latentfast.stitch(rows, overlap), expected)


@pytest.mark.parametrize(
    "vae",
    [
        "AutoencoderKLHunyuanVideo", "AutoencoderKLLTXVideo", "AutoencoderKLCogVideoX", "AutoencoderKLMochi",
        "AutoencoderKLQwenImage", "AutoencoderKL", "AutoencoderDC",
    ],
)  # fmt: skip
def test_sequential_has_the_bits_of_diffusers_other_classes(vae: str, target: Target, diffusers: ModuleType) -> None:
    lead = (2, 3) if vae in ("AutoencoderKL", "AutoencoderDC") else (2, 3, 2)
    rows = _tiles(Draw(torch.bfloat16, target.device, 5), [8, 8, 5], [9, 9, 4], lead)
    expected = _diffusers_rows(getattr(diffusers, vae), _copies(rows), (3, 4))
    assert same_bits(latentfast.stitch(rows, (3, 4)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("frames", [(6, 5, 2), (5, 2), (5, 2, 0)], ids=str)
def test_sequential_temporal_tiles_have_the_bits_of_diffusers(
    frames: tuple[int, ...], dtype: torch.dtype, target: Target, diffusers: ModuleType
) -> None:
    """As HunyuanVideo's: the first tile has one frame more, and there is a frame of stride more of it."""
    vae, draw, overlap = diffusers.AutoencoderKLHunyuanVideo, Draw(dtype, target.device, 7), (2, 2, 3)
    clips = [_tiles(draw, [5, 3], [6, 3], (1, 2, t)) for t in frames]
    parts = [_diffusers_rows(vae, _copies(rows), overlap[1:]) for rows in clips]
    kept, stride = [], frames[0] - 1 - overlap[0]
    for i, part in enumerate(parts):
        if i > 0:
            part = vae.blend_t(None, parts[i - 1], part, overlap[0])
        kept.append(part[:, :, : stride + (i == 0)])
    assert same_bits(latentfast.stitch(clips, overlap), torch.cat(kept, 2))


def test_tiled_decode_of_a_small_wan_vae(target: Target, diffusers: ModuleType) -> None:
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()
    vae.enable_tiling(
        tile_sample_min_height=64, tile_sample_min_width=64, tile_sample_stride_height=48, tile_sample_stride_width=40
    )
    decoded: Grid = []

    z = torch.randn(1, 4, 2, 14, 13)
    with torch.no_grad():
        expected = vae.tiled_decode(z, return_dict=False)[0]
        for i in range(0, 14, 6):
            decoded.append([])
            for j in range(0, 13, 5):
                vae.clear_cache()
                frames = []
                for k in range(2):
                    vae._conv_idx = [0]
                    tile = vae.post_quant_conv(z[:, :, k : k + 1, i : i + 8, j : j + 8])
                    frames.append(
                        vae.decoder(tile, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=k == 0)
                    )
                decoded[-1].append(torch.cat(frames, 2).to(target.device))
    got = latentfast.stitch(decoded, (16, 24), clamp=(-1, 1))
    assert same_bits(got, expected.to(target.device))
    assert same_bits(latentfast.stitch(decoded, (16, 24), size=(112, 104), clamp=(-1, 1)), got)


# --- Overlap-add ------------------------------------------------------------------------------------------------------


@every_dtype
@every_grid
def test_overlap_add_of_a_constant_is_that_constant(grid: str, dtype: torch.dtype, target: Target) -> None:
    rows, overlap = _drawn(grid, dtype, target)
    constant = 0.7251
    for row in rows:
        for tile in row:
            tile.fill_(constant)
    got = latentfast.stitch(rows, overlap, mode="overlap_add")
    # weights, products and sums: a rounding each in every dimension, in the working precision; then one to the dtype
    torch.testing.assert_close(got, torch.full_like(got, constant), rtol=torch.finfo(dtype).eps * 3, atol=0)


def test_overlap_add_has_no_seam_at_corners_and_sequential_has(target: Target) -> None:
    """Where four tiles meet, the tile above is blended to its left once more in sequential order."""
    rows = [[torch.full((1, 1, 8, 8), float(i == j), device=target.device) for j in range(2)] for i in range(2)]
    kept, across = 4, 5  # the first row and a column of the lower tiles' seams
    step = {
        mode: out[0, 0, kept, across] - out[0, 0, kept - 1, across]
        for mode in ("sequential", "overlap_add")
        for out in (latentfast.stitch(rows, (4, 4), mode=mode),)
    }
    assert abs(step["overlap_add"]) <= 1 / 8 + 1e-6  # a half row's weight
    assert abs(step["sequential"]) > 0.18


def test_overlap_add_does_not_depend_on_the_direction(target: Target) -> None:
    rows = _tiles(Draw(torch.float64, target.device, 4), [6, 6], [7, 7], (1, 1, 2))
    turned = [[rows[1 - i][1 - j].flip(-1, -2) for j in range(2)] for i in range(2)]
    got, expected = (latentfast.stitch(x, (3, 2), mode="overlap_add") for x in (turned, rows))
    torch.testing.assert_close(got.flip(-1, -2), expected, rtol=1e-14, atol=1e-14)


# --- Both -------------------------------------------------------------------------------------------------------------


@both_modes
@every_dtype
@every_grid
def test_every_grid_is_as_the_reference(grid: str, dtype: torch.dtype, mode: str, target: Target) -> None:
    rows, overlap = _drawn(grid, dtype, target)
    before = _copies(rows)
    got = latentfast.stitch(rows, overlap, mode=mode)
    expected = reference.tiles.stitch(rows, overlap, mode=mode)
    if mode == "sequential":
        assert same_bits(got, expected)
    else:  # half a unit of the dtype on either side, and a few roundings before
        torch.testing.assert_close(got, expected, rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
    assert all(same_bits(x, y) for row, kept in zip(rows, before, strict=True) for x, y in zip(row, kept, strict=True))


@both_modes
@given(
    heights=st.lists(st.sampled_from([4, 5, 8]), min_size=1, max_size=3),
    widths=st.lists(st.sampled_from([4, 6, 8, 16]), min_size=1, max_size=3),
    overlap=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    seed=st.integers(0, 99),
)
def test_any_sizes(mode: str, heights, widths, overlap, seed: int, target: Target) -> None:
    rows = _tiles(Draw(torch.float32, target.device, seed), heights, widths, (1, 2, 1))
    got, expected = (f(rows, overlap, mode=mode) for f in (latentfast.stitch, reference.tiles.stitch))
    if mode == "sequential":
        assert same_bits(got, expected)
    else:
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=2e-6)


@both_modes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_clamp_and_size_in_every_layout(layout: str, mode: str, target: Target) -> None:
    rows, overlap = _drawn("ragged", torch.bfloat16, target)
    whole = latentfast.stitch(rows, overlap, mode=mode)
    viewed = [[LAYOUTS[layout](tile) for tile in row] for row in rows]
    got = latentfast.stitch(viewed, overlap, mode=mode, size=(1, 13, 10), clamp=(-0.3, 0.7))
    assert same_bits(got, whole[:, :, :1, :13, :10].clamp(-0.3, 0.7))
    assert same_bits(latentfast.stitch(viewed, overlap, mode=mode, size=(3, 2)), whole[..., :3, :2])


@both_modes
def test_images_are_clips_of_one_frame(mode: str, target: Target) -> None:
    rows = _tiles(Draw(torch.float32, target.device), [5, 4], [6, 6, 3], (2, 3))
    got = latentfast.stitch(rows, (2, 2), mode=mode)
    clips = [[tile.unsqueeze(2) for tile in row] for row in rows]
    assert same_bits(got.unsqueeze(2), latentfast.stitch(clips, (2, 2), mode=mode))
    out = torch.empty_like(got)
    assert latentfast.stitch(rows, (2, 2), mode=mode, out=out) is out
    assert same_bits(out, got)


@both_modes
def test_many_tiles(mode: str, target: Target) -> None:
    """More than any kernel takes by value."""
    draw = Draw(torch.float32, target.device)
    n = 3 if target.interpreted else 23
    rows = _tiles(draw, [4] * n, [3] * n, (1, 1, 1))
    got, expected = (f(rows, (2, 1), mode=mode) for f in (latentfast.stitch, reference.tiles.stitch))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=2e-6)


@both_modes
def test_gradients_of_clamped_values_are_zero(mode: str, target: Target) -> None:
    rows, overlap = _drawn("ragged", torch.float64, target)
    found = []
    for function in (latentfast.stitch, reference.tiles.stitch):
        leaves = [[tile.clone().requires_grad_() for tile in row] for row in rows]
        out = function(leaves, overlap, mode=mode, size=(1, 13, 10), clamp=(-0.5, 0.5))
        flat = [tile for row in leaves for tile in row]
        found.append(torch.autograd.grad(out.square().sum(), flat))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


# --- Bad input --------------------------------------------------------------------------------------------------------

A = torch.zeros(1, 2, 3, 6, 8)
IMAGE = torch.zeros(1, 2, 6, 8)
_BAD = [
    (lambda: latentfast.stitch(A, (1, 1)), TypeError, "tiles must be a list of rows of tensors, or a list of such"),
    (lambda: latentfast.stitch([A], (1, 1)), TypeError, "tiles must be a list of rows of tensors"),
    (lambda: latentfast.stitch([[]], (1, 1)), ValueError, "tiles must hold at least one tile in every list"),
    (lambda: latentfast.stitch([[1.0]], (1, 1)), TypeError, "tiles[0][0] must be a tensor, got float"),
    (lambda: latentfast.stitch([[A], [A, A]], (1, 1)), ValueError, "tiles must hold 1 tiles in every row"),
    (lambda: latentfast.stitch([[[A]], [[A], [A]]], (1, 1, 1)), ValueError, "tiles must hold 1 rows in each temporal"),
    (lambda: latentfast.stitch([[A[0, 0]]], (1, 1)), ValueError, "tiles[0][0] must have 4 or 5 dimensions"),
    (lambda: latentfast.stitch([[[IMAGE]]], (0, 1, 1)), ValueError, "tiles[0][0][0] must have 5 dimensions"),
    (lambda: latentfast.stitch([[A, IMAGE]], (1, 1)), ValueError, "tiles[0][1] must have 5 dimensions"),
    (
        lambda: latentfast.stitch([[A, A[..., :4, :]]], (1, 1)), ValueError,
        "tiles[0][1] must have shape (1, 2, 3, 6, 8), as high as its row's and as wide as its column's first tile, "
        "got (1, 2, 3, 4, 8)",
    ),
    (
        lambda: latentfast.stitch([[A], [A.double()]], (1, 1)), TypeError,
        "tiles[1][0] must have the first tile's dtype float32, got float64",
    ),
    (
        lambda: latentfast.stitch([[A, A.to("meta")]], (1, 1)), ValueError,
        "tiles[0][1] must be on the first tile's device cpu, got meta",
    ),
    (lambda: latentfast.stitch([[A.int()]], (1, 1)), TypeError, "tiles[0][0] must be float32, float16, bfloat16 or"),
    (lambda: latentfast.stitch([[A]], 3), ValueError, "overlap must be (rows, columns), got 3"),
    (lambda: latentfast.stitch([[[A]]], (1, 1)), ValueError, "overlap must be (frames, rows, columns), got (1, 1)"),
    (lambda: latentfast.stitch([[A]], (1, -1)), ValueError, "overlap must not be negative, got (1, -1)"),
    (lambda: latentfast.stitch([[A]], (1, 1.5)), TypeError, "overlap must be (rows, columns) as integers"),
    (
        lambda: latentfast.stitch([[A, A, A]], (0, 5)), ValueError,
        "overlap must be at most half a tile: a tile of 8 columns would share 5 with the one before and 5 with the one "
        "after it",
    ),
    (lambda: latentfast.stitch([[A]], (0, 0), mode="mean"), ValueError, "mode must be 'sequential' or 'overlap_add'"),
    (lambda: latentfast.stitch([[A]], (0, 0), size=(7, 8)), ValueError, "size must be at most (6, 8), what the tiles"),
    (lambda: latentfast.stitch([[IMAGE]], (0, 0), size=(1, 6, 8)), ValueError, "size must be (height, width), got"),
    (lambda: latentfast.stitch([[A]], (0, 0), clamp=(1, -1)), ValueError, "clamp must be (least, largest), got (1"),
    (lambda: latentfast.stitch([[A]], (0, 0), clamp=1.0), TypeError, "clamp must be two floats, got 1.0"),
    (
        lambda: latentfast.stitch([[A]], (0, 0), out=torch.zeros(1, 2, 3, 6, 7)), ValueError,
        "out must have shape (1, 2, 3, 6, 8), got (1, 2, 3, 6, 7)",
    ),
    (lambda: latentfast.stitch([[A]], (0, 0), out=A), ValueError, "out must not share memory with an input"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), _BAD, ids=lambda x: x[:40] if isinstance(x, str) else "")
def test_bad_input(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()
