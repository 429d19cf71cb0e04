"""Heat maps and masks on every backend: against the formula written out, layouts, thresholds, peers' formulas."""

import importlib
import math

import pytest
import torch

import latentfast
from latentfast import reference
from tests.helpers import (
    DTYPES,
    HEAT_ULPS,
    Draw,
    Target,
    assert_matches_spec,
    assert_within,
    same_bits,
    skip_where_lacking,
    working_dtype,
)

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def heats(target: Target) -> Target:
    skip_where_lacking("token_heatmap", target.device)
    return target


def _attention(draw: Draw, b: int, h: int, nq: int, nk: int, d: int) -> dict[str, torch.Tensor]:
    return {"q": draw.normal(b, h, nq, d), "k": draw.normal(b, h, nk, d)}


def _assert_heat(got: torch.Tensor, inputs: dict, tokens, **options) -> None:
    """`got` obeys the yardstick against the reference; `tokens` may be lists."""

    def spec(**tensors):
        return reference.mask.token_heatmap(**tensors, tokens=tokens, **options)

    assert_matches_spec(got, spec, inputs, HEAT_ULPS)


# --- token_heatmap ----------------------------------------------------------------------------------------------------


def test_the_reference_is_a_softmax_written_out() -> None:
    inputs = _attention(Draw(torch.float64), 2, 3, 4, 5, 6)
    got = reference.mask.token_heatmap(**inputs, tokens=[[1], [0, 4]], scale=0.3)
    for b in range(2):
        for i in range(4):
            single = pair = 0.0
            for h in range(3):
                powers = [math.exp(0.3 * float(inputs["q"][b, h, i] @ key)) for key in inputs["k"][b, h]]
                single += powers[1] / sum(powers) / 3
                pair += (powers[0] + powers[4]) / sum(powers) / 3
            assert got[b, 0, i].item() == pytest.approx(single, abs=1e-14)
            assert got[b, 1, i].item() == pytest.approx(pair, abs=1e-14)
    parts = reference.mask.token_heatmap_in_chunks(**inputs, tokens=[[1], [0, 4]], scale=0.3)
    torch.testing.assert_close(parts, got, rtol=1e-14, atol=0)


@every_dtype
@pytest.mark.parametrize(
    ("b", "h", "nq", "nk", "d"),
    [
        (2, 3, 37, 19, 64),
        (1, 2, 130, 77, 128),
        (1, 1, 5, 3, 33),
        (1, 2, 17, 150, 80),
        (2, 1, 1, 1, 16),
        (1, 23, 5, 7, 16),
        (1, 1, 9, 40, 200),
    ],
    ids=str,
)
def test_heatmap_against_the_reference(b, h, nq, nk, d, dtype: torch.dtype, heats: Target) -> None:
    inputs = _attention(Draw(dtype, heats.device), b, h, nq, nk, d)
    tokens = [[0], sorted({nk - 1, nk // 2}), []]
    got = latentfast.token_heatmap(**inputs, tokens=tokens)
    assert got.dtype == working_dtype(dtype)
    _assert_heat(got, inputs, tokens)
    assert torch.equal(got[:, 2], torch.zeros_like(got[:, 2]))


def test_heatmap_of_real_sizes(heats: Target) -> None:
    """Several tiles of queries and keys, as many heads as split the sum over them."""
    if heats.interpreted:
        pytest.skip("takes Triton's interpreter minutes")
    for dtype in (torch.float32, torch.bfloat16):
        inputs = _attention(Draw(dtype, heats.device), 1, 12, 1000, 512, 128)
        tokens = [[5], [77], [300, 301], [511]]
        _assert_heat(latentfast.token_heatmap(**inputs, tokens=tokens), inputs, tokens)


def _many_queries(heats: Target, monkeypatch: pytest.MonkeyPatch) -> int:
    """So many that Triton keeps a head's keys in shared memory."""
    if not heats.interpreted:
        return 8192 + 77
    monkeypatch.setattr(importlib.import_module("latentfast.kernels.triton.token_heatmap"), "_RESIDENT_QUERIES", 0)
    return 300


@pytest.mark.parametrize(
    ("nk", "d", "dtype"), [(512, 128, torch.bfloat16), (226, 64, torch.float16), (77, 50, torch.bfloat16)]
)
@pytest.mark.parametrize("layout", ["heads first", "heads last"])
def test_heatmap_with_a_heads_keys_in_shared_memory(
    nk: int, d: int, dtype: torch.dtype, layout: str, heats: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's other form, which many queries of a prompt's length take."""
    queries = _many_queries(heats, monkeypatch)
    draw = Draw(dtype, heats.device)
    q, k = draw.normal(2, 3, queries, d), draw.normal(2, 3, nk, d)
    if layout == "heads last":
        q, k = q.transpose(1, 2).contiguous().transpose(1, 2), k.transpose(1, 2).contiguous().transpose(1, 2)
    tokens = [[0, 5], [nk - 1], [5, nk // 2, 9]]
    got = latentfast.token_heatmap(q, k, tokens)
    assert_within(
        got,
        *(reference.mask.token_heatmap(q.to(t), k.to(t), tokens) for t in (torch.float64, torch.float32)),
        HEAT_ULPS,
    )
    assert same_bits(got[1:], latentfast.token_heatmap(q[1:], k[1:], tokens))


def test_heatmap_of_scores_far_above_the_first_keys(heats: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """That form takes exponentials from the first 128 keys' maximum: float32 does not hold the sums of all rows."""
    draw = Draw(torch.bfloat16, heats.device)
    q, k = draw.normal(1, 2, _many_queries(heats, monkeypatch), 64), draw.normal(1, 2, 300, 64)
    ordinary = latentfast.token_heatmap(q, k, tokens := [[3], [290], [150, 151]])
    for row, score in zip((7, 150, 151, 299), (80, 120, 500, 1e4), strict=True):
        at = slice(150, 152) if score == 500 else 290  # a query that looks at one key, or two
        q[:, :, row] = k[:, :, at].float().mean(-2) if score == 500 else k[:, :, at]
        q[:, :, row] *= score * 8 / (q[:, :, row].float() * k[:, :, 150 if score == 500 else 290].float()).sum(-1, True)
    q[:, :, 20] = torch.nan
    got = latentfast.token_heatmap(q, k, tokens)
    changed = [7, 150, 151, 299]
    exact, wide = (reference.mask.token_heatmap(q.to(t), k.to(t), tokens) for t in (torch.float64, torch.float32))
    assert_within(got[..., changed], exact[..., changed], wide[..., changed], HEAT_ULPS)
    assert (got[..., changed].amax(1) > 0.3).all()
    assert got[..., 20].isnan().all()
    others = [row for row in range(q.shape[2]) if row not in (*changed, 20)]
    assert same_bits(got[..., others], ordinary[..., others])


@every_dtype
def test_heatmap_masses_of_all_keys_add_up(dtype: torch.dtype, heats: Target) -> None:
    inputs = _attention(Draw(dtype, heats.device), 2, 3, 21, 13, 32)
    got = latentfast.token_heatmap(**inputs, tokens=[[key] for key in range(13)])
    ones = torch.ones_like(got[:, 0])
    assert_within(got.sum(1), ones.double(), ones, HEAT_ULPS)
    whole = latentfast.token_heatmap(**inputs, tokens=[list(range(13))])[:, 0]
    assert_within(whole, ones.double(), ones, HEAT_ULPS)


def test_heatmap_lists_and_weights_agree(heats: Target) -> None:
    """Also with more keys than the cheapest way takes, and more groups than one pass."""
    inputs = _attention(Draw(device=heats.device), 1, 2, 21, 40, 32)
    for tokens in ([[3], [4, 39]], [list(range(0, 40, 2)), list(range(0, 40, 3))], [[key] for key in range(20)]):
        weights = reference.mask.token_weights(tokens, 40, inputs["q"])
        _assert_heat(latentfast.token_heatmap(**inputs, tokens=tokens), inputs, tokens)
        _assert_heat(latentfast.token_heatmap(**inputs, tokens=weights), inputs, tokens)
        _assert_heat(latentfast.token_heatmap(**inputs, tokens=weights > 0), inputs, tokens)


@pytest.mark.parametrize("shared", [False, True])
def test_heatmap_leaves_masked_keys_out(shared: bool, heats: Target) -> None:
    draw = Draw(device=heats.device)
    inputs = _attention(draw, 3, 2, 21, 70, 16)
    mask = draw.uniform(3, 70) < 0.6
    mask[0, :40] = False  # a whole tile of keys, the first
    if not shared:
        mask[2] = False
    key_mask = mask[0] if shared else mask
    tokens = [[0, 1, 50], [69], [5]]
    options = {"key_mask": key_mask}
    got = latentfast.token_heatmap(**inputs, tokens=tokens, **options)
    _assert_heat(got, inputs, tokens, **options)
    if not shared:
        assert torch.equal(got[2], torch.zeros_like(got[2]))  # no key at all: 0, not NaN
    weights = draw.uniform(4, 70)
    _assert_heat(latentfast.token_heatmap(**inputs, tokens=weights, **options), inputs, weights, **options)
    # what is masked has no influence, whatever it is
    spoilt = inputs["k"].masked_fill(~mask[:, None, :, None], 1e4) if not shared else inputs["k"]
    assert same_bits(latentfast.token_heatmap(inputs["q"], spoilt, tokens, **options), got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heatmap_reads_heads_last_in_place(dtype: torch.dtype, heats: Target) -> None:
    draw = Draw(dtype, heats.device)
    q, k = draw.normal(2, 33, 3, 16).transpose(1, 2), draw.normal(2, 20, 3, 16).transpose(1, 2)
    for tokens in ([[1], [2, 3]], torch.ones(1, 20, device=heats.device)):
        expected = latentfast.token_heatmap(q.contiguous(), k.contiguous(), tokens)
        assert same_bits(latentfast.token_heatmap(q, k, tokens), expected)
        assert same_bits(latentfast.token_heatmap(q.contiguous(), k, tokens), expected)
        # heads that are part of a wider projection
        wide = torch.cat((q, q), 1)[:, :3]
        assert same_bits(latentfast.token_heatmap(wide, k, tokens), expected)


def test_heatmap_of_large_scores_does_not_overflow(heats: Target) -> None:
    inputs = _attention(Draw(device=heats.device), 1, 2, 20, 30, 16)
    got = latentfast.token_heatmap(**{name: 30 * x for name, x in inputs.items()}, tokens=[[0], [7]])
    assert torch.isfinite(got).all()
    assert (got >= 0).all()
    assert (got <= 1 + 1e-6).all()


@pytest.mark.gpu
def test_heatmap_never_stores_the_scores(heats: Target) -> None:
    if heats.device != "cuda" or heats.backend == "eager":
        pytest.skip("the memory of a GPU's kernels")
    inputs = _attention(Draw(torch.bfloat16, "cuda"), 1, 40, 4096, 512, 64)
    latentfast.token_heatmap(**inputs, tokens=[[1], [2]])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = latentfast.token_heatmap(**inputs, tokens=[[1], [2]])
    extra = torch.cuda.max_memory_allocated() - before - out.nbytes
    assert extra <= 0.01 * 40 * 4096 * 512 * 4


@pytest.mark.gpu
def test_heatmap_of_more_than_2_31_elements(heats: Target) -> None:
    if heats.device != "cuda" or heats.backend == "eager":
        pytest.skip("takes a GPU's memory")
    q = torch.empty(1, 2, 9_000_000, 128, dtype=torch.bfloat16, device="cuda").normal_()
    k = torch.randn(1, 2, 16, 128, dtype=torch.bfloat16, device="cuda")
    got = latentfast.token_heatmap(q, k, [[3], [5]])
    assert same_bits(got[..., -100:], latentfast.token_heatmap(q[:, :, -100:], k, [[3], [5]]))


def test_heatmap_finds_the_object() -> None:
    """Queries on a disc look at one key, the others at another: the mask of the first is the disc."""
    y, x = torch.meshgrid(torch.arange(24), torch.arange(40), indexing="ij")
    disc = ((y - 11) ** 2 + (x - 18) ** 2 < 60).expand(5, 24, 40)
    draw = Draw()
    k = draw.normal(1, 4, 8, 32)
    q = draw.normal(1, 4, 5 * 24 * 40, 32) + torch.where(disc.reshape(-1, 1), k[:, :, 2:3], k[:, :, 5:6])
    heat = latentfast.token_heatmap(q, k, [[2]], scale=1.0)
    fraction = disc.float().mean().item()
    mask = latentfast.heatmap_to_mask(heat, (5, 24, 40), (5, 24, 40), quantile=1 - fraction, smooth_time=1.0)[0, 0] > 0
    iou = (mask & disc).sum() / (mask | disc).sum()
    assert iou > 0.9


# --- heatmap_to_mask --------------------------------------------------------------------------------------------------


def _spec_map(heat: torch.Tensor, grid, size, **options) -> torch.Tensor:
    """The map that is thresholded, in float64."""
    return reference.mask.heatmap_to_mask(heat.double(), grid, size, **options).cpu()


@pytest.mark.parametrize(
    ("grid", "size"),
    [
        ((3, 5, 7), (3, 10, 14)),
        ((2, 6, 8), (5, 6, 8)),
        ((5, 8, 9), (2, 3, 4)),
        ((1, 1, 1), (2, 3, 5)),
        ((4, 3, 1), (1, 1, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "options", [{}, {"dilate": 2}, {"smooth_time": 1.3}, {"smooth_time": 0.2, "dilate": 9}], ids=str
)
def test_map_before_the_threshold(grid, size, options: dict, target: Target) -> None:
    heat = 5 + 3 * Draw(device=target.device).uniform(2, 3, math.prod(grid))
    heat[0, 1] = heat[0, 1, 0].clone()  # a constant map

    def spec(heat):
        return reference.mask.heatmap_to_mask(heat, grid, size, **options)

    got = latentfast.heatmap_to_mask(heat, grid, size, **options)
    assert_matches_spec(got, spec, {"heat": heat})
    assert torch.equal(got[0, 1], torch.zeros_like(got[0, 1]))
    assert (got >= 0).all()
    assert (got <= 1 + 1e-6).all()  # weights of sum 1 but for their rounding


@pytest.mark.parametrize("q", [0.0, 0.1, 0.5, 0.77, 0.9, 1.0])
@pytest.mark.parametrize("kind", ["random", "tied", "constant", "two values", "skewed"])
def test_quantile_is_torchs(q: float, kind: str, target: Target) -> None:
    """Without enlargement the map is the heat: the mask is what torch.quantile of the map cuts off."""
    grid = (3, 7, 11) if target.interpreted else (5, 31, 43)
    x = Draw(device=target.device).uniform(2, 2, math.prod(grid))
    x = {
        "random": x, "tied": (8 * x).round(), "constant": torch.full_like(x, 3.0), "two values": (x > 0.8).float(),
        "skewed": x**20,
    }[kind]  # fmt: skip
    flat = latentfast.heatmap_to_mask(x, grid, grid).flatten(2)
    limit = torch.quantile(flat.double(), q, dim=-1, keepdim=True).float()
    mask = latentfast.heatmap_to_mask(x, grid, grid, quantile=q).flatten(2)
    # a limit between two elements may be rounded up or down to float32, but cannot pass either
    above = (flat > limit).float()
    assert torch.equal(mask, above)
    soft = latentfast.heatmap_to_mask(x, grid, grid, quantile=q, softness=0.25).flatten(2)
    u = ((flat.double() - limit.double()) / 0.25 + 0.5).clamp(0, 1)
    torch.testing.assert_close(soft.double(), u * u * (3 - 2 * u), rtol=0, atol=2e-6)  # a slope of 6, of roundings of 1


def test_quantile_of_many_maps_and_elements(target: Target) -> None:
    """More elements than torch.quantile takes in one piece on a GPU, where the memory of it is no matter."""
    if target.interpreted:
        pytest.skip("takes Triton's interpreter minutes")
    grid = (3, 512, 700)
    x = Draw(device=target.device).uniform(1, 2, math.prod(grid))
    mask = latentfast.heatmap_to_mask(x, grid, grid, quantile=0.9).flatten(2)
    count = math.prod(grid)
    above = count - 1 - math.floor(0.9 * (count - 1))  # the elements after the quantile, which are all different
    assert (mask.sum(-1) - above).abs().max() <= 2


@pytest.mark.parametrize("softness", [0.0, 0.3])
@pytest.mark.parametrize("how", [{"threshold": 0.45}, {"quantile": 0.8}], ids=str)
def test_threshold_of_an_enlarged_map(how: dict, softness: float, target: Target) -> None:
    grid, size = (3, 5, 7), (5, 9, 13)
    heat = Draw(device=target.device).uniform(2, 2, math.prod(grid))
    options = {"dilate": 1, "smooth_time": 0.7}
    got = latentfast.heatmap_to_mask(heat, grid, size, softness=softness, **how, **options).cpu()
    soft = _spec_map(heat, grid, size, **options)
    exact = _spec_map(heat, grid, size, softness=softness, **how, **options)
    limit = how.get("threshold")
    flat = soft.flatten(2)
    limits = (
        torch.quantile(flat, how["quantile"], dim=-1) if limit is None else torch.full(flat.shape[:2], limit).double()
    )
    # within a few roundings of the threshold an element may fall on either side
    sure = (soft - limits[:, :, None, None, None]).abs() > 1e-6
    if softness:
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-5)  # the ramp's slope is 1.5 / 0.3
    else:
        assert torch.equal(got[sure].double(), exact[sure])
        assert set(got.unique().tolist()) <= {0.0, 1.0}


def test_masks_keep_non_finite_values_to_their_map(target: Target) -> None:
    heat = Draw(device=target.device).uniform(2, 3, 60)
    clean = latentfast.heatmap_to_mask(heat, (3, 4, 5), (3, 8, 10), quantile=0.6)
    for value in (math.nan, math.inf, -math.inf):
        spoilt = heat.clone()
        spoilt[1, 2, 59] = value
        got = latentfast.heatmap_to_mask(spoilt, (3, 4, 5), (3, 8, 10), quantile=0.6)
        assert got[1, 2].isnan().all()
        got[1, 2] = clean[1, 2]
        assert same_bits(got, clean)


# --- Compositions -----------------------------------------------------------------------------------------------------


def test_flow_edit_follows_the_published_loop(target: Target) -> None:
    draw = Draw(torch.float64, target.device)
    source, edit, noise = draw.normal(2, 3, 4), draw.normal(2, 3, 4), draw.normal(5, 2, 3, 4)

    def to_source(z, t):
        return 0.5 * z + t

    def to_target(z, t):
        return -z * z

    expected = torch.zeros_like(source)
    for n in noise:
        zs = (1 - 0.7) * source + 0.7 * n
        zt = edit + zs - source
        expected += (to_target(zt, 0.7) - to_source(zs, 0.7)) / 5
    expected = edit + (0.6 - 0.7) * expected
    got = latentfast.flow_edit_step(edit, source, noise, to_source, to_target, t=0.7, t_next=0.6)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    again = reference.mask.flow_edit_step(edit, source, noise, to_source, to_target, t=0.7, t_next=0.6)
    torch.testing.assert_close(again, expected, rtol=1e-12, atol=1e-12)


def test_flow_edit_between_equal_prompts_changes_nothing(target: Target) -> None:
    draw = Draw(torch.bfloat16, target.device)
    source, noise = draw.normal(2, 3, 4, 5, 6), draw.normal(2, 3, 4, 5, 6)
    got = latentfast.flow_edit_step(source, source, noise, lambda z, t: z, lambda z, t: z, t=1.0, t_next=0.9)
    # source + noise − source: what is left of bfloat16's rounding of the noised clip is the same on both sides
    torch.testing.assert_close(got, source, rtol=0, atol=2e-3)


@every_dtype
def test_difference_mask_is_diffusers(dtype: torch.dtype, target: Target) -> None:
    """The expression of StableDiffusionDiffEditPipeline.generate_mask, for a single sample."""
    draw = Draw(dtype, target.device)
    source, change = draw.normal(4, 1, 3, 2, 9, 11), draw.normal(4, 1, 3, 2, 9, 11)
    changed = source + change * (torch.arange(11, device=target.device) < 3)
    wide = working_dtype(dtype)
    guide = (changed.to(wide) - source.to(wide)).abs().mean((0, 2))
    limit = guide.mean() * 3.0
    soft = guide.clamp(torch.zeros_like(limit), limit) / limit
    expected = torch.where(soft <= 0.5, 0.0, 1.0).to(wide).unsqueeze(1)
    sure = (soft - 0.5).abs().unsqueeze(1) > 1e-5
    got = latentfast.difference_mask(changed, source)
    assert got.shape == (1, 1, 2, 9, 11)
    assert torch.equal(got[sure], expected[sure])
    assert got[..., 3:].abs().max() == 0
    got = latentfast.difference_mask(changed, source, threshold=None)
    torch.testing.assert_close(got, soft.unsqueeze(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        got, reference.mask.difference_mask(changed, source, threshold=None).to(wide), rtol=1e-5, atol=1e-6
    )


def test_difference_mask_is_each_samples_own(target: Target) -> None:
    draw = Draw(device=target.device)
    source, changed = draw.normal(3, 4, 2, 2, 5, 7), draw.normal(3, 4, 2, 2, 5, 7)
    changed[:, 1] = source[:, 1]
    changed[0, 2, 0, 0, 0, 0] = math.nan
    got = latentfast.difference_mask(changed, source)
    assert torch.equal(got[1], torch.zeros_like(got[1]))
    assert got[2].isnan().all()
    for i in (0, 3):
        assert same_bits(got[i : i + 1], latentfast.difference_mask(changed[:, i : i + 1], source[:, i : i + 1]))


# --- Bad input --------------------------------------------------------------------------------------------------------

Q, K = torch.zeros(2, 3, 7, 8), torch.zeros(2, 3, 5, 8)
HEAT = torch.zeros(1, 2, 24)


def _same(z: torch.Tensor, t: float) -> torch.Tensor:
    return z


def _to_mask(**options):
    return lambda: latentfast.heatmap_to_mask(HEAT, (2, 3, 4), (2, 6, 8), **options)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: latentfast.token_heatmap([0], K, [[0]]), TypeError, "q must be a tensor, got list"),
        (lambda: latentfast.token_heatmap(Q, K.double(), [[0]]), TypeError, "k must have q's dtype float32"),
        (lambda: latentfast.token_heatmap(Q[0], K, [[0]]), ValueError, r"q must have shape \(B, H, Nq, D\)"),
        (lambda: latentfast.token_heatmap(Q, K[:1], [[0]]), ValueError, r"k must have shape \(2, 3, Nk, 8\)"),
        (lambda: latentfast.token_heatmap(Q.repeat(1, 1, 1, 33), K.repeat(1, 1, 1, 33), []), ValueError, "at most 256"),
        (lambda: latentfast.token_heatmap(Q, K, [[5]]), ValueError, "tokens must name keys from 0 to 4, got 5"),
        (lambda: latentfast.token_heatmap(Q, K, [[-1]]), ValueError, "tokens must name keys from 0 to 4, got -1"),
        (lambda: latentfast.token_heatmap(Q, K, [[1, 1]]), ValueError, "a key once in a group"),
        (lambda: latentfast.token_heatmap(Q, K, [1, 2]), TypeError, "tokens must be a tensor or lists"),
        (lambda: latentfast.token_heatmap(Q, K, torch.zeros(2, 4)), ValueError, r"tokens must have shape \(G, 5\)"),
        (lambda: latentfast.token_heatmap(Q, K, torch.zeros(2, 5).long()), TypeError, "tokens must be lists of key"),
        (lambda: latentfast.token_heatmap(Q, K, [[0]], scale=-1.0), ValueError, "scale must be positive"),
        (lambda: latentfast.token_heatmap(Q, K, [[0]], scale="x"), TypeError, "scale must be a float, got str"),
        (lambda: latentfast.token_heatmap(Q, K, [[0]], key_mask=torch.ones(5)), TypeError, "key_mask must be a bool"),
        (
            lambda: latentfast.token_heatmap(Q, K, [[0]], key_mask=torch.ones(4).bool()),
            ValueError,
            r"key_mask must have shape \(2, 5\) or \(5,\), got \(4,\)",
        ),
        (lambda: latentfast.token_heatmap(Q.clone().requires_grad_(), K, [[0]]), ValueError, "q requires grad"),
        (lambda: latentfast.heatmap_to_mask(HEAT, (2, 3, 5), (2, 6, 8)), ValueError, r"must have shape \(B, G, 30"),
        (lambda: latentfast.heatmap_to_mask(HEAT, (2, 12), (2, 6, 8)), TypeError, "grid must be three integers"),
        (lambda: latentfast.heatmap_to_mask(HEAT, (2, 3, 4), (2, -6, 8)), ValueError, "size must not be negative"),
        (_to_mask(threshold=0.5, quantile=0.5), ValueError, "threshold and quantile exclude each other"),
        (_to_mask(quantile=1.5), ValueError, r"quantile must be in \[0, 1\], got 1.5"),
        (_to_mask(threshold=math.nan), ValueError, "threshold must be finite"),
        (_to_mask(softness=0.1), ValueError, "softness needs a threshold or a quantile"),
        (_to_mask(threshold=0.5, softness=-0.1), ValueError, "softness must be finite and at least 0"),
        (_to_mask(dilate=1.5), TypeError, "dilate must be an int, got float"),
        (_to_mask(dilate=-1), ValueError, "dilate must not be negative"),
        (_to_mask(smooth_time=math.inf), ValueError, "smooth_time must be finite and at least 0"),
        (lambda: latentfast.difference_mask(Q, K), ValueError, "source_preds must have target_preds's shape"),
        (lambda: latentfast.difference_mask(Q, Q, clamp=0.0), ValueError, "clamp must be positive and finite"),
        (lambda: latentfast.difference_mask(Q[0], Q[0]), ValueError, r"target_preds must have shape \(N, B, C, …\)"),
        (
            lambda: latentfast.flow_edit_step(Q, Q, K, _same, _same, t=1.0, t_next=0.5),
            ValueError,
            r"noise must have shape \(2, 3, 7, 8\) or \(N, \*\(2, 3, 7, 8\)\)",
        ),
        (
            lambda: latentfast.flow_edit_step(Q, Q, Q, _same, _same, t=2.0, t_next=0.5),
            ValueError,
            r"t must lie in \[0, 1\], got 2.0",
        ),
        (
            lambda: latentfast.flow_edit_step(Q, Q, Q, _same, lambda z, t: z[:1], t=1.0, t_next=0.5),
            ValueError,
            "velocity_target's result must have z_edit's shape",
        ),
    ],
)  # fmt: skip
def test_bad_input(call, error, words: str) -> None:
    with pytest.raises(error, match=words):
        call()
