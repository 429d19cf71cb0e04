"""The rules that hold for every operation alike, on every backend: same bits, precision, layouts, NaN, sizes, outputs.

The numbers in the tests' names are those of the list of rules in docs/numerics.md.
"""

import math

import pytest
import torch

import latentfast
from tests.helpers import (
    DTYPES,
    HALVES,
    LAYOUTS,
    Draw,
    Target,
    assert_gradient_close,
    assert_matches_spec,
    fixed_upstream,
    gradients,
    same_bits,
    skip_where_torch_adds_atomically,
    widened,
    working_dtype,
)
from tests.operations import LIGHT, LOSSES, OPERATIONS, PER_SAMPLE, Operation, large, small

every_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=str)
every_per_sample = pytest.mark.parametrize("operation", PER_SAMPLE, ids=str)
differentiable = pytest.mark.parametrize("operation", [o for o in OPERATIONS if o.differentiable], ids=str)


def _inputs(operation: Operation, target: Target, dtype=torch.float32, shape=None, seed=1):
    return operation.inputs(Draw(dtype, target.device, seed), shape or small(target))


def _one_sample(operation: Operation, inputs: dict, index: int) -> dict:
    return {
        name: x if operation.samples[name] is None or x.shape[operation.samples[name]] == 1
        else x.narrow(operation.samples[name], index, 1).clone()
        for name, x in inputs.items()
    }  # fmt: skip


def _result_and_gradients(operation: Operation, inputs: dict) -> list[torch.Tensor]:
    out, found = gradients(operation.call, inputs, operation.differentiable)
    return [out, *found.values()]


def _skip_where_torch_sums(operation: Operation, target: Target) -> None:
    orders = "dim" in operation.options or operation.function == "token_heatmap"
    if target.backend == "eager" and (target.device == "cuda" or orders):
        pytest.skip("the order of torch's own sums depends on the batch here (docs/numerics.md, 1)")
    if target.backend == "eager" and operation.function == "tone_map":
        pytest.skip("torch's sigmoid rounds the last few elements of a tensor otherwise than those in full registers")


# --- Rule 1: the same bits on every run, whatever else is in the batch, however many threads -------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_operation
def test_rule1_same_bits_on_every_run(operation: Operation, dtype: torch.dtype, target: Target) -> None:
    skip_where_torch_adds_atomically(target, operation.function)
    inputs = _inputs(operation, target, dtype)
    first = _result_and_gradients(operation, inputs)
    for _ in range(1 if target.interpreted else 5):
        assert all(map(same_bits, first, _result_and_gradients(operation, inputs)))


@pytest.mark.parametrize("operation", LIGHT, ids=str)
def test_rule1_same_bits_for_any_number_of_threads(operation: Operation, target: Target) -> None:
    if target.device != "cpu" or target.interpreted:
        pytest.skip("torch's threads run nothing of this backend")
    inputs = _inputs(operation, target, shape=large(target))
    with_one = _result_and_gradients(operation, inputs)
    torch.set_num_threads(2)
    assert all(map(same_bits, with_one, _result_and_gradients(operation, inputs)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@every_per_sample
def test_rule1_same_bits_alone_and_in_a_batch_of_8(operation: Operation, dtype: torch.dtype, target: Target) -> None:
    _skip_where_torch_sums(operation, target)
    inputs = _inputs(operation, target, dtype, (8, *small(target)[1:]))
    upstream = fixed_upstream(operation.call(**inputs))
    batched, batched_grads = gradients(operation.call, inputs, operation.differentiable, upstream)
    for index in (0, 3, 7):
        single = _one_sample(operation, inputs, index)
        cut = upstream.narrow(operation.result_samples, index, 1)
        alone, alone_grads = gradients(operation.call, single, operation.differentiable, cut)
        assert same_bits(alone, batched.narrow(operation.result_samples, index, 1))
        for name, grad in alone_grads.items():
            dim = operation.samples[name]
            if dim is not None:  # the gradient of what all samples share is a sum over them
                assert same_bits(grad, batched_grads[name].narrow(dim, index, 1)), name


@pytest.mark.parametrize("operation", [o for o in LIGHT if o in PER_SAMPLE], ids=str)
def test_rule1_same_bits_alone_and_in_a_batch_large(operation: Operation, target: Target) -> None:
    _skip_where_torch_sums(operation, target)
    if target.interpreted:
        pytest.skip("large batches take Triton's interpreter minutes")
    inputs = _inputs(operation, target, shape=(8, *large(target)[1:]))
    batched = operation.call(**inputs)
    for index in (0, 5):
        alone = operation.call(**_one_sample(operation, inputs, index))
        assert same_bits(alone, batched.narrow(operation.result_samples, index, 1))


# --- Rule 2: precision, values and gradients --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "dtype"),
    [(o, dtype) for o in OPERATIONS for dtype in DTYPES if o.rounds_once or dtype not in HALVES],
    ids=str,
)
def test_rule2_error_at_most_twice_the_references(operation: Operation, dtype: torch.dtype, target: Target) -> None:
    inputs = _inputs(operation, target, dtype)
    assert_matches_spec(operation.call(**inputs), operation.spec, inputs, operation.ulps)


@pytest.mark.parametrize("operation", LIGHT, ids=str)
def test_rule2_error_at_most_twice_the_references_large(operation: Operation, target: Target) -> None:
    inputs = _inputs(operation, target, shape=large(target))
    assert_matches_spec(operation.call(**inputs), operation.spec, inputs, operation.ulps)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@differentiable
def test_rule2_gradients_against_float64(operation: Operation, dtype: torch.dtype, target: Target) -> None:
    inputs = _inputs(operation, target, dtype)
    out, got = gradients(operation.call, inputs, operation.differentiable)
    upstream = fixed_upstream(out)
    exact, same = (
        gradients(operation.gradient_spec, widened(inputs, wide), operation.differentiable, upstream.to(wide))[1]
        for wide in (torch.float64, working_dtype(dtype))
    )
    for name in operation.differentiable:
        assert got[name].dtype == inputs[name].dtype
        assert got[name].shape == inputs[name].shape
        assert_gradient_close(got[name], exact[name], same[name], operation.gradient_parts)


@differentiable
def test_rule2_gradcheck_in_float64(operation: Operation, target: Target) -> None:
    inputs = _inputs(operation, target, torch.float64, (2, 2, 3, 2, 3))
    names = operation.differentiable
    leaves = [inputs[name].requires_grad_() for name in names]

    def function(*values):
        return operation.call(**{**inputs, **dict(zip(names, values, strict=True))})

    # Fast mode compares random projections of the Jacobian: a few calls in place of one for every element.
    many = operation.function in ("spherical_mean", "latent_to_rgb")  # calls a Jacobian, or thousands of results
    fast = target.interpreted or target.backend == "eager" or many
    assert torch.autograd.gradcheck(function, leaves, fast_mode=fast)


# --- Any layout in memory; results contiguous, new, inputs untouched --------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@every_operation
def test_any_layout_gives_the_same_bits(operation: Operation, layout: str, target: Target) -> None:
    skip_where_torch_adds_atomically(target, operation.function)
    if str(target) == "eager@cuda" and layout == "offset by one" and operation.function in ("guide", "guided_step"):
        pytest.skip("torch sums up what is not aligned in another order (docs/numerics.md, 1)")
    inputs = _inputs(operation, target)
    expected = _result_and_gradients(operation, inputs)
    viewed = {name: LAYOUTS[layout](x) for name, x in inputs.items()}
    leaves = {name: x.requires_grad_(name in operation.differentiable) for name, x in viewed.items()}
    out = operation.call(**leaves)
    names = operation.differentiable
    found = torch.autograd.grad(out, [leaves[n] for n in names], fixed_upstream(out)) if names else ()
    assert out.is_contiguous()
    assert all(map(same_bits, expected, [out, *found]))


@every_operation
def test_expanded_inputs_are_read_as_they_are(operation: Operation, target: Target) -> None:
    inputs = _inputs(operation, target)
    expanded = {name: x[:1].expand(x.shape) for name, x in inputs.items()}
    copies = {name: x.clone() for name, x in expanded.items()}
    assert same_bits(operation.call(**expanded), operation.call(**copies))


@differentiable
def test_expanded_gradients_of_a_sum(operation: Operation, target: Target) -> None:
    skip_where_torch_adds_atomically(target, operation.function)
    inputs = _inputs(operation, target)
    names = operation.differentiable
    expected = gradients(operation.call, inputs, names, torch.ones_like(operation.call(**inputs)))[1]
    leaves = {name: x.requires_grad_(name in names) for name, x in inputs.items()}
    operation.call(**leaves).sum().backward()  # hands on a gradient whose strides are 0
    assert all(same_bits(expected[name], leaves[name].grad) for name in names)


@every_operation
def test_results_are_new_and_inputs_unchanged(operation: Operation, target: Target) -> None:
    for wants_gradient in (False, True):
        inputs = _inputs(operation, target)
        before = {name: x.clone() for name, x in inputs.items()}
        leaves = {
            name: x.requires_grad_(wants_gradient and name in operation.differentiable) for name, x in inputs.items()
        }
        out = operation.call(**leaves)
        assert out.is_contiguous()
        storage = out.untyped_storage().data_ptr()
        assert all(x.untyped_storage().data_ptr() != storage for x in inputs.values())
        if wants_gradient and operation.differentiable:
            out.sum().backward()
            # two leaves with one gradient tensor between them: accumulating into one would change the other
            grads = [leaves[name].grad.untyped_storage().data_ptr() for name in operation.differentiable]
            assert len(set(grads)) == len(grads)
        assert all(same_bits(before[name], x) for name, x in inputs.items())


@every_operation
def test_every_element_is_written(operation: Operation, target: Target) -> None:
    """torch.empty holds NaN here, so that an element that a kernel leaves out shows."""
    skip_where_torch_adds_atomically(target, operation.function)
    if str(target) == "eager@cuda" and operation.function in ("heatmap_to_mask", "latent_to_rgb"):
        pytest.skip("torch's interpolate computes otherwise where it must be deterministic, as it must to fill memory")
    inputs = _inputs(operation, target)
    expected = _result_and_gradients(operation, inputs)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(4, device=target.device).isnan().all()
        poisoned = _result_and_gradients(operation, inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(x).all() for x in poisoned)
    assert all(map(same_bits, expected, poisoned))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("operation", [o for o in OPERATIONS if o.takes_out], ids=str)
def test_out_is_written_and_nothing_around_it(operation: Operation, dtype: torch.dtype, target: Target) -> None:
    inputs = _inputs(operation, target, dtype)
    expected = operation.call(**inputs)
    margin = 67  # odd: the buffer is aligned to nothing
    buffer = expected.new_full((expected.numel() + 2 * margin,), math.nan)
    out = buffer[margin:-margin].view(expected.shape)
    assert operation.call(**inputs, out=out) is out
    assert same_bits(out, expected)
    assert buffer[:margin].isnan().all()
    assert buffer[-margin:].isnan().all()


# --- Rule 6: NaN and Inf stay in their sample -------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@every_per_sample
def test_rule6_non_finite_values_stay_in_their_sample(operation: Operation, value: float, target: Target) -> None:
    skip_where_torch_adds_atomically(target, operation.function)
    for name in operation.latents:
        dim = operation.samples[name]
        if dim is None:
            continue
        inputs = _inputs(operation, target, shape=(3, *small(target)[1:]))
        clean, clean_grads = gradients(operation.call, inputs, operation.differentiable)
        poisoned = inputs[name].movedim(dim, 0)[1]  # a view: every third element, so that no mask hides all of them
        poisoned.masked_fill_(torch.arange(poisoned.numel(), device=target.device).view(poisoned.shape) % 3 == 0, value)
        out, grads = gradients(operation.call, inputs, operation.differentiable)
        where = operation.result_samples
        for index in (0, 2):
            assert same_bits(out.select(where, index), clean.select(where, index)), name
            for leaf, grad in grads.items():
                along = operation.samples[leaf]
                if along is not None and grad.shape[along] > 1:
                    assert same_bits(grad.select(along, index), clean_grads[leaf].select(along, index)), leaf
        assert not torch.isfinite(out.select(where, 1)).all(), name


# --- Rule 7: empty, one, prime ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 3, 4, 5, 6), (2, 3, 0, 5, 6), (2, 3, 4, 0, 6), (2, 0, 4, 5, 6)], ids=str)
@every_operation
def test_rule7_empty(operation: Operation, shape: tuple[int, ...], target: Target) -> None:
    inputs = _inputs(operation, target, shape=shape)
    out, found = gradients(operation.call, inputs, operation.differentiable)
    expected = operation.spec(**inputs)
    assert out.shape == expected.shape
    assert out.dtype == expected.dtype
    assert torch.equal(out, torch.zeros_like(out))  # a loss of nothing is 0; everything else has no elements
    assert all(grad.shape == inputs[name].shape for name, grad in found.items())


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1, 1), (2, 1, 2, 1, 1), (3, 2, 1, 3, 2), (1, 3, 7, 5, 11), (2, 1, 1, 1, 13), (1, 1, 3, 31, 1)],
    ids=str,
)
@every_operation
def test_rule7_ones_and_primes(operation: Operation, shape: tuple[int, ...], target: Target) -> None:
    inputs = _inputs(operation, target, shape=shape)
    assert_matches_spec(operation.call(**inputs), operation.spec, inputs, operation.ulps)


# --- What cannot be differentiated says so ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "operation", [o for o in OPERATIONS if o.differentiable and o.function != "spherical_mean"], ids=str
)
def test_second_derivatives_are_refused(operation: Operation, target: Target) -> None:
    if operation.name == "interpolate_keys catmull_rom":
        pytest.skip("linear in its keys: differentiable any number of times")
    inputs = _inputs(operation, target)
    name = operation.differentiable[0]
    leaves = {n: x.requires_grad_(n in operation.differentiable) for n, x in inputs.items()}
    (grad,) = torch.autograd.grad(operation.call(**leaves).square().sum(), leaves[name], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("operation", "name"), [(o, n) for o in LOSSES for n in ("mask", "flow") if n in o.samples], ids=str
)
def test_gradients_of_masks_and_flow_are_refused(operation: Operation, name: str, target: Target) -> None:
    inputs = _inputs(operation, target)
    inputs[name].requires_grad_()
    with pytest.raises(ValueError, match=rf"{name} requires grad.*{name}\.detach\(\)"):
        operation.call(**inputs)
    with torch.no_grad():
        assert torch.isfinite(operation.call(**inputs)).all()


def test_no_gradient_is_recorded_under_no_grad(target: Target) -> None:
    a, b = Draw(device=target.device).normal(2, 1, 8).requires_grad_().unbind(0)
    with torch.no_grad():
        assert not latentfast.slerp(a, b, 0.5).requires_grad
