"""Plans on every backend that has them: equal to the operations one after another; sliders, tensors, stacks; edges."""

import math
import re
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import latentfast
from latentfast import plan, reference
from tests.helpers import (
    DTYPES,
    HALVES,
    LAYOUTS,
    Draw,
    Target,
    assert_matches_spec,
    assert_within,
    same_bits,
    skip_where_lacking,
    widened,
)
from tests.plans import compiled, opposite, sequence, spec, stacks, steps, tensors
from tests.test_preview import assert_bytes

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
seeds = st.integers(0, 2**31 - 1)
#: Vectors that fill 16 bytes and that do not, channels of an odd number of elements, single rows, columns, elements,
#: more channels than a block takes at once.
SHAPES = [(2, 4, 3, 8, 16), (2, 3, 5, 7, 11), (1, 5, 2, 6, 6), (3, 2, 1, 1, 8), (2, 3, 4, 5), (2, 4, 1, 1, 1)]
SHAPES += [(2, 37, 2, 4, 8)]
shapes = st.sampled_from(SHAPES)
#: In a float32 sequence of K operations each result's roundings pass through all that follow; the reference's own error
#: has them too and is doubled, so the ulps of a single operation serve.
EACH = {
    "lerp": [plan.Lerp("a", 0.3)],
    "lerp masked": [plan.Lerp("a", 0.3, "mask")],
    "nlerp": [plan.Nlerp("a", 0.3)],
    "slerp": [plan.Slerp("a", 0.3)],
    "slerp masked": [plan.Slerp("a", 1.2, "rows")],
    "direction": [plan.Direction("d", -0.7)],
    "direction masked": [plan.Direction("a", 0.7, "mask")],
    "colour": [plan.Direction("colour", 0.7, "rows")],
    "blend": [plan.Blend("a", "mask")],
    "confine": [plan.ToneMap(0.5), plan.Confine("source", "mask")],
    "adain": [plan.Adain("style", 0.8)],
    "adain masked": [plan.Adain("a", 1.0, "mask")],
    "tone_map": [plan.ToneMap(0.6)],
    "standardize": [plan.Standardize([0.1, -0.2, 0.3, 0.5], [1.0, 2.0, 0.5, 3.0], 0.5)],
    "unstandardize": [plan.Unstandardize([0.1, -0.2, 0.3, 0.5], [1.0, 2.0, 0.5, 3.0], 0.5)],
    "reductions of combinations": [
        plan.Slerp("a", 0.3), plan.Direction("d", 0.4), plan.Adain("style", 0.7), plan.Slerp("b", 0.6),
        plan.Unstandardize([0.1] * 4, [2.0] * 4), plan.Nlerp("a", -0.2),
    ],
    "reductions behind masks": [
        plan.Direction("a", 0.5, "mask"), plan.Slerp("b", 0.4), plan.ToneMap(0.5), plan.Adain("style", 0.9),
        plan.Lerp("b", 0.2), plan.Slerp("a", 0.3, "rows"), plan.Direction("colour", 0.3), plan.Slerp("b", 0.4),
    ],
    "nothing": [],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _has_plans(target: Target) -> None:
    skip_where_lacking("plan_run", target.device)


# --- Values -----------------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("stack", EACH)
def test_each_instruction_is_the_operation_of_its_name(stack: str, dtype: torch.dtype, target: Target) -> None:
    for shape in ((2, 4, 3, 8, 16), (2, 4, 3, 5, 7)):
        inputs = tensors(Draw(dtype, target.device), shape)
        assert_matches_spec(compiled(EACH[stack], inputs).run(), spec(EACH[stack]), inputs)


@given(stack=stacks, shape=shapes, seed=seeds, dtype=st.sampled_from(DTYPES))
def test_a_random_stack_is_its_operations_one_after_another(
    target: Target, stack: list, shape: tuple, seed: int, dtype: torch.dtype
) -> None:
    """Computed in the working precision throughout and rounded once. See EACH for the yardstick."""
    inputs = tensors(Draw(dtype, target.device, seed), shape)
    if any(isinstance(x, plan.Adain) for x in stack) and math.prod(shape[2:]) == 1:
        return  # channels of one element: whether one has a deviation is decided by a rounding
    assert_matches_spec(compiled(stack, inputs).run(), spec(stack), inputs)


@given(stack=stacks, seed=seeds, dtype=st.sampled_from(HALVES))
def test_the_error_is_not_larger_than_the_sequences(target: Target, stack: list, seed: int, dtype: torch.dtype) -> None:
    """Halves, where roundings dominate; 2% for chance, and the float32 walk's own error."""
    inputs = tensors(Draw(dtype, target.device, seed), (2, 4, 3, 8, 16))
    exact = spec(stack)(**widened(inputs, torch.float64))
    results = compiled(stack, inputs).run(), sequence(stack)(**inputs)
    ours, theirs = ((x.double() - exact).square().mean().sqrt() for x in results)
    assert ours <= 1.02 * theirs + 1e-6 * exact.abs().max()


# --- Pixels -----------------------------------------------------------------------------------------------------------

SIZES = [
    ((2, 4, 3, 8, 16), (64, 128)),
    ((2, 4, 3, 8, 16), (128, 256)),
    ((1, 4, 2, 6, 12), (24, 48)),
    ((2, 6, 5, 30, 52), (240, 416)),
    ((2, 4, 3, 8, 16), None),
    ((1, 3, 2, 5, 7), (40, 56)),
    ((2, 3, 4, 5), (9, 31)),
    ((1, 4, 1, 16, 24), (2, 3)),
    ((2, 37, 2, 4, 24), (32, 192)),
]
STACK = [plan.Slerp("a", 0.3), plan.Direction("d", 0.5, "mask"), plan.ToneMap(0.4), plan.Adain("style", 0.3)]


@every_dtype
@pytest.mark.parametrize(("shape", "size"), SIZES, ids=str)
def test_pixels_are_those_of_the_edited_latents(
    shape: tuple, size: tuple | None, dtype: torch.dtype, target: Target
) -> None:
    draw = Draw(dtype, target.device, 5)
    inputs = tensors(draw, shape)
    weight, bias = draw.uniform(shape[1], 3, low=-0.4, high=0.4), draw.uniform(3, low=-0.2, high=0.2)
    got = compiled([*STACK, plan.ToRGB(weight, bias, size)], inputs).run()
    edited = spec(STACK)(**widened(inputs, torch.float64))
    assert_bytes(got, {"z": edited, "weight": weight, "bias": bias}, size)


def test_pixels_behind_a_mask_for_each_channel(target: Target) -> None:
    draw = Draw(torch.bfloat16, target.device)
    inputs = {**tensors(draw, (2, 4, 3, 8, 16)), "each": draw.mask(4, 1, 8, 16)}
    stack = [plan.Lerp("a", 0.5, "each"), plan.Direction("d", 0.5, "mask")]
    weight, bias = draw.uniform(4, 3, low=-0.4, high=0.4), draw.uniform(3, low=-0.2, high=0.2)
    got = compiled([*stack, plan.ToRGB(weight, bias, (64, 128))], inputs).run()
    edited = spec(stack)(**widened(inputs, torch.float64))
    assert_bytes(got, {"z": edited, "weight": weight, "bias": bias}, (64, 128))


def test_both_outputs_agree_with_the_operations(target: Target) -> None:
    draw = Draw(torch.bfloat16, target.device)
    inputs = tensors(draw, (2, 4, 3, 8, 16))
    weight, bias = draw.uniform(4, 3), draw.uniform(3)
    p = compiled([*STACK, plan.ToRGB(weight, bias, (64, 128))], inputs, outputs=("rgb", "latents"))
    rgb, latents = p.run()
    assert same_bits(latents, compiled(STACK, inputs).run())
    assert torch.equal(rgb, latentfast.latent_to_rgb(latents, weight, bias, size=(64, 128)))


@pytest.mark.parametrize("channels", [1, 4, 16, 37])
def test_pixels_alone_have_the_bits_of_pixels_beside_latents(channels: int, target: Target) -> None:
    """Where latents are not rounded in between: however many channels a block takes, they are added in their order."""
    draw = Draw(torch.float32, target.device, 3)
    inputs = tensors(draw, (2, channels, 3, 8, 16))
    weight, bias = draw.uniform(channels, 3, low=-0.2, high=0.2), draw.uniform(3, low=-0.2, high=0.2)
    stack = [*STACK, plan.ToRGB(weight, bias, (64, 128))]
    both, _ = compiled(stack, inputs, outputs=("rgb", "latents")).run()
    assert torch.equal(compiled(stack, inputs).run(), both)


# --- Sliders, tensors, stacks -----------------------------------------------------------------------------------------


@given(stack=stacks, seed=seeds, number=st.floats(0, 1))
def test_a_moved_slider_is_a_new_plan(target: Target, stack: list, seed: int, number: float) -> None:
    inputs = tensors(Draw(torch.float32, target.device, seed), (2, 4, 3, 8, 16))
    p = compiled(stack, inputs)
    out = p.run()
    for index, x in enumerate(stack):
        if x.slider is not None:
            p.set(index, number)
    moved = [x if x.slider is None else x.moved(number) for x in stack]
    assert p.stack == tuple(moved)
    assert same_bits(p.run(out=out), compiled(moved, inputs).run())


@pytest.mark.parametrize("name", ["source", "a", "style", "mask", "d"])
def test_a_tensor_bound_anew_is_a_new_plan(name: str, target: Target) -> None:
    stack = [*STACK, plan.Adain("style", 0.6), plan.Slerp("a", 0.2)]
    inputs = tensors(Draw(torch.float32, target.device, 1), (2, 4, 3, 8, 16))
    other = tensors(Draw(torch.float32, target.device, 2), (2, 4, 3, 8, 16))[name]
    p = compiled(stack, inputs)
    p.run()
    p.bind(name, other)
    wanted = compiled(stack, {**inputs, name: other}).run()
    assert same_bits(p.run(), wanted)
    p.bind(name, inputs[name].clone())
    inputs[name].copy_(other)
    p.bind(name, inputs[name])  # changed in place
    assert same_bits(p.run(), wanted)


def test_binding_writes_into_no_tensor_of_the_callers(target: Target) -> None:
    inputs = tensors(Draw(torch.float32, target.device), (2, 4, 3, 8, 16))
    p = compiled(STACK, inputs)
    kept = {name: x.clone() for name, x in inputs.items()}
    for name in ("source", "a", "d", "mask", "style"):
        p.bind(name, 2 * inputs[name].transpose(-1, -2).contiguous().transpose(-1, -2))
        p.bind(name, 3 * inputs[name].transpose(-1, -2).contiguous().transpose(-1, -2))
    wanted = compiled(
        STACK, {name: 3 * x if name in ("source", "a", "d", "mask", "style") else x for name, x in kept.items()}
    )
    assert same_bits(p.run(), wanted.run())
    assert all(same_bits(x, kept[name]) for name, x in inputs.items())


def test_a_plan_made_in_inference_mode_serves_outside(target: Target) -> None:
    inputs = tensors(Draw(torch.bfloat16, target.device), (2, 4, 3, 8, 16))
    with torch.inference_mode():
        p = compiled([*STACK, plan.Adain("style", 0.5)], inputs)
        p.bind("mask", inputs["mask"].clone())
    p.set(0, 0.7)
    p.bind("mask", inputs["mask"])
    p.bind("style", inputs["style"])
    assert same_bits(p.run(), compiled(list(p.stack), inputs).run())


@given(history=st.lists(stacks, min_size=1, max_size=4), back=st.booleans(), seed=seeds)
def test_a_changed_stack_is_a_new_plan(target: Target, history: list, back: bool, seed: int) -> None:
    inputs = tensors(Draw(torch.float32, target.device, seed), (2, 4, 3, 8, 16))
    p = compiled([plan.Slerp("a", 0.3)], inputs)
    for stack in [*history, [plan.Slerp("a", 0.3)] if back else [plan.Adain("style")]]:
        p.change(stack)
        assert same_bits(p.run(), compiled(stack, inputs).run())


def test_a_change_that_fails_changes_nothing(target: Target) -> None:
    inputs = tensors(Draw(torch.float32, target.device), (2, 4, 3, 8, 16))
    p = compiled(STACK, inputs)
    expected = p.run()
    with pytest.raises(ValueError, match="tensors must hold 'nobody', which the stack names"):
        p.change([plan.Lerp("nobody", 0.5), *STACK])
    with pytest.raises(ValueError, match="a must have source's shape"):
        p.bind("a", inputs["a"][:1])
    assert p.stack == tuple(STACK)
    assert same_bits(p.run(), expected)


# --- Bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stack", ["reductions of combinations", "reductions behind masks"])
def test_same_bits_alone_in_a_batch_and_for_any_number_of_threads(
    stack: str, dtype: torch.dtype, target: Target
) -> None:
    if target.backend == "eager":
        pytest.skip("the order of torch's own sums depends on the batch and the threads")
    for shape in ((5, 4, 3, 40, 64), (5, 4, 3, 5, 7)):
        inputs = tensors(Draw(dtype, target.device), shape)
        weight, bias = [[0.1, 0.2, 0.3]] * 4, [0.0, 0.0, 0.0]
        size = (8 * shape[3], 8 * shape[4])
        whole = [*EACH[stack], plan.ToRGB(weight, bias, size)]
        for outputs in (("latents",), ("rgb",)):
            p = compiled(whole, inputs, outputs=outputs)
            batched = p.run()
            assert torch.equal(batched, p.run())
            torch.set_num_threads(2)
            assert torch.equal(batched, compiled(whole, inputs, outputs=outputs).run())
            torch.set_num_threads(1)
            for i in (0, 3):
                one = {name: x[i : i + 1] if x.ndim == 5 and x.shape[0] == 5 else x for name, x in inputs.items()}
                assert torch.equal(compiled(whole, one, outputs=outputs).run(), batched[i : i + 1])


@every_dtype
def test_end_points_and_hard_masks_keep_bits(dtype: torch.dtype, target: Target) -> None:
    for shape in ((2, 4, 3, 8, 16), (2, 3, 5, 7, 11)):
        inputs = tensors(Draw(dtype, target.device), shape)
        source, a = inputs["source"], inputs["a"]
        hard = torch.rand(shape[0], 1, *shape[2:], device=target.device) < 0.5
        for kind in (plan.Lerp, plan.Nlerp, plan.Slerp):
            assert same_bits(compiled([kind("a", 0.0)], inputs).run(), source)
            assert same_bits(compiled([kind("a", 1.0)], inputs).run(), a)
        for stack, wanted in (
            ([plan.Blend("a", "hard")], torch.where(hard, a, source)),
            ([plan.Confine("a", "hard")], torch.where(hard, source, a)),
            ([plan.Lerp("a", 1.0, "hard"), plan.Confine("source", "hard")], torch.where(hard, a, source)),
        ):
            assert same_bits(compiled(stack, {**inputs, "hard": hard}).run(), wanted)


def test_nan_stays_in_its_sample(target: Target) -> None:
    inputs = tensors(Draw(torch.float32, target.device), (3, 4, 3, 8, 16))
    whole = EACH["reductions of combinations"]
    clean = compiled(whole, inputs).run()
    inputs["source"][1, 2, 0, 3, 4] = math.nan
    got = compiled(whole, inputs).run()
    assert got[1].isnan().all()
    assert torch.allclose(got[[0, 2]], clean[[0, 2]], rtol=1e-5, atol=1e-5)
    # what a weight of 0 or a mask of 0 leaves out brings none
    inputs["a"].fill_(math.nan)
    assert same_bits(
        compiled([plan.Lerp("a", 0.0), plan.Slerp("a", 0.0)], inputs).run()[[0, 2]], inputs["source"][[0, 2]]
    )


# --- Edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 4, 3, 8, 16), (2, 3, 5, 7, 11), (1, 3, 1, 1, 5), (2, 1, 1, 1, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opposite_vectors_turn_as_in_slerp(dtype: torch.dtype, shape: tuple, target: Target) -> None:
    inputs = opposite(shape, target.device, dtype)
    for stack in (
        [plan.Slerp("a", 0.4)],
        [plan.Nlerp("a", 1 / 3), plan.ToneMap(0.5)],
        [plan.ToneMap(0.0), plan.Slerp("a", 0.4)],
    ):
        assert_matches_spec(compiled(stack, inputs).run(), spec(stack), inputs)
    one = {name: x[:, :1, :1, :1, :1].contiguous() for name, x in inputs.items()}
    assert_matches_spec(compiled([plan.Slerp("a", 0.4)], one).run(), spec([plan.Slerp("a", 0.4)]), one)


@every_dtype
def test_constant_channels_become_the_styles_mean(dtype: torch.dtype, target: Target) -> None:
    inputs = tensors(Draw(dtype, target.device), (2, 4, 3, 8, 16))
    inputs["source"][:, 1] = 0.3
    inputs["a"][:, 1] = 1000.0
    for stack in ([plan.Adain("style", 1.0)], [plan.Lerp("a", 0.4), plan.Adain("style", 1.0)]):
        got = compiled(stack, inputs).run()
        mean = inputs["style"].double().mean((2, 3, 4)).expand(2, 4)[:, 1].cpu()
        got = got[:, 1].double().flatten(1).cpu()
        assert torch.equal(got.min(1).values, got.max(1).values)
        assert torch.allclose(got[:, 0], mean, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("shape", [(0, 4, 3, 8, 16), (2, 0, 3, 8, 16), (2, 4, 0, 8, 16), (2, 4, 3, 0, 16)])
def test_empty_latents_give_empty_results(shape: tuple, target: Target) -> None:
    inputs = tensors(Draw(torch.float32, target.device), shape)
    stack = [x for x in STACK if not isinstance(x, plan.Adain)]
    assert compiled(stack, inputs).run().shape == shape
    if shape[3]:
        rgb = plan.ToRGB(torch.zeros(shape[1], 3, device=target.device), [0.0, 0.0, 0.0], (64, 128))
        assert compiled([*stack, rgb], inputs).run().shape == (shape[0], shape[2], 64, 128, 3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str, target: Target) -> None:
    inputs = tensors(Draw(torch.float32, target.device), (2, 4, 3, 8, 16))
    whole = EACH["reductions behind masks"]
    expected = compiled(whole, inputs).run()
    other = {name: LAYOUTS[layout](x) for name, x in inputs.items()}
    got = compiled(whole, other).run()
    assert_within(got, expected.double(), expected)  # an unaligned tensor takes other kernels, of other sums' order
    if layout != "offset by one":
        assert same_bits(got, expected)


@pytest.mark.parametrize(
    "mask", [(), (16,), (8, 1), (3, 1, 1), (4, 1, 1, 1), (2, 1, 1, 1, 1), (2, 4, 3, 8, 16), (1, 3, 8, 16)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_masks_and_directions_broadcast(mask: tuple, dtype: torch.dtype, target: Target) -> None:
    draw = Draw(dtype, target.device)
    inputs = {**tensors(draw, (2, 4, 3, 8, 16)), "m": draw.mask(*mask), "along": draw.normal(*mask)}
    inputs["hard"] = inputs["m"] > 0.5
    stack = [
        plan.Direction("along", 0.7, "m"),
        plan.Lerp("a", 0.5, "m"),
        plan.Slerp("b", 0.5),
        plan.Direction("along", 0.4),
    ]
    assert_matches_spec(compiled(stack, inputs).run(), spec(stack), {k: x for k, x in inputs.items() if k != "hard"})
    bools = compiled([plan.Blend("a", "hard")], inputs).run()
    assert same_bits(bools, torch.where(inputs["hard"], inputs["a"], inputs["source"]))


def test_as_many_instructions_and_tensors_as_there_may_be(target: Target) -> None:
    draw = Draw(torch.float32, target.device)
    inputs = {"source": draw.normal(1, 2, 2, 4, 8)}
    inputs |= {f"x{i}": draw.normal(1, 2, 2, 4, 8) for i in range(7)} | {f"m{i}": draw.mask(2, 4, 8) for i in range(8)}
    stack = [plan.Slerp(f"x{i % 7}", 0.2) if i < 16 else plan.Lerp(f"x{i % 7}", 0.3, f"m{i % 8}") for i in range(32)]
    assert_matches_spec(compiled(stack, inputs).run(), spec(stack), inputs)
    behind = [plan.ToneMap(0.1), *(plan.Direction(f"x{i}", 0.1) for i in range(7)), plan.Slerp("source", 0.3)]
    assert_matches_spec(compiled(behind, inputs).run(), spec(behind), inputs)


def test_run_compiles_to_a_whole_graph(target: Target) -> None:
    inputs = tensors(Draw(torch.float32, target.device), (2, 4, 3, 8, 16))
    p = compiled(EACH["reductions behind masks"], inputs)
    expected = p.run()
    assert same_bits(torch.compile(lambda: p.run() * 2, fullgraph=True, backend="aot_eager")(), expected * 2)


@pytest.mark.gpu
@pytest.mark.parametrize("stack", ["reductions of combinations", "reductions behind masks"])
def test_a_replayed_graph_uses_the_sliders_and_the_tensors_of_now(stack: str, target: Target) -> None:
    if target.device == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    if target.backend == "eager":
        pytest.skip("eager: plain PyTorch waits while it copies numbers from the host")
    inputs = tensors(Draw(torch.bfloat16, target.device), (2, 4, 3, 8, 16))
    p = compiled([*EACH[stack], plan.ToRGB([[0.1, 0.2, 0.3]] * 4, [0.0] * 3, (64, 128))], inputs)
    out = p.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        p.run(out=out)
    p.set_all({0: 0.9, 1: 0.8})
    inputs["source"].copy_(inputs["b"])
    inputs["mask"].copy_(1 - inputs["mask"])
    p.bind("source", inputs["source"])
    p.bind("mask", inputs["mask"])
    graph.replay()
    assert torch.equal(out, compiled(list(p.stack), inputs).run())


@pytest.mark.gpu
def test_nothing_waits_for_the_device(target: Target) -> None:
    if target.device == "cpu" or target.backend == "eager":
        pytest.skip("kernels of a GPU alone; eager copies numbers from the host")
    inputs = tensors(Draw(torch.bfloat16, target.device), (2, 4, 3, 8, 16))
    stacks_ = [EACH[name] for name in ("reductions of combinations", "reductions behind masks")]
    p = compiled(stacks_[0], inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for stack in stacks_:
            p.change(stack)
            p.set(0, 0.5)
            p.bind("a", inputs["b"])
            p.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_2_to_the_31_elements(target: Target) -> None:
    if target.device == "cpu" or target.backend == "eager":
        pytest.skip("takes a GPU's memory, and eager several times that")
    if torch.cuda.get_device_properties(target.device).total_memory < 24 << 30:
        pytest.skip("takes 13 GB")
    shape = (1, 2, 1, 32768, 32800)
    z = torch.zeros(shape, dtype=torch.bfloat16, device=target.device)
    z[:, 1, :, -2:] = Draw(torch.bfloat16, target.device).normal(2, 32800)
    colour = torch.tensor([0.5, -2.0], device=target.device, dtype=z.dtype).view(2, 1, 1, 1)
    stack = [plan.Direction("colour", 0.5), plan.ToneMap(0.5)]
    got = plan.compile(stack, z, {"colour": colour}).run()
    part = z[..., -2:, :].clone()
    assert same_bits(got[..., -2:, :], plan.compile(stack, part, {"colour": colour}).run())
    assert same_bits(got[:, :, :, :1], got[:, :, :, 1000:1001])


# --- What it is compared with, and the page ---------------------------------------------------------------------------


def test_the_reference_is_the_public_operations(target: Target) -> None:
    """Bit by bit, where both are eager: what a plan is compared with is what a user would call."""
    inputs = tensors(Draw(torch.bfloat16, target.device), (2, 4, 3, 8, 16))
    with latentfast.use_backend("eager"):
        x = latentfast.slerp(inputs["source"], inputs["a"], 0.3)
        x = latentfast.edit(x, inputs["d"][None], [0.5], inputs["mask"])
        x = latentfast.adain(latentfast.tone_map(x, 0.4), inputs["style"], 0.3)
    assert same_bits(reference.plan.sequence(inputs["source"], steps(STACK, inputs)), x)


def test_the_examples_of_the_page_run(target: Target) -> None:
    page = (Path(__file__).parents[1] / "docs" / "plan.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    with torch.device(target.device):
        names: dict = {}
        exec(compile(code, "docs/plan.md", "exec"), names)
    assert names["frames"].shape == (1, 5, 128, 128, 3)
    assert len(names["p"].stack) == 3
    assert names["p"].run().dtype == torch.uint8
