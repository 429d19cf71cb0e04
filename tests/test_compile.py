"""torch.compile (whole graph), torch.export and opcheck."""

import itertools
import math

import pytest
import torch
import torch._dynamo.testing

import latentfast
from latentfast import _operators
from tests.helpers import Draw, Target, fixed_upstream, gradients, same_bits, skip_where_lacking
from tests.operations import BY_NAME, OPERATIONS, Operation
from tests.test_backends import CHOSEN

every_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=str)
SHAPE = (2, 3, 4, 5, 6)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _counter(backend: str = "aot_eager") -> torch._dynamo.testing.CompileCounterWithBackend:
    """Counts the graphs that are compiled; what it returns is really compiled by `backend`."""
    return torch._dynamo.testing.CompileCounterWithBackend(backend)


# --- torch.compile ----------------------------------------------------------------------------------------------------


def _agree(got: torch.Tensor, expected: torch.Tensor, operation: Operation) -> bool:
    """The same bits; under torch.compile a host number t travels as a float32 tensor (so that another t needs no other
    graph), whose rounding, 6e-8, may show in the last two places.
    """
    if "t" in operation.options:
        return torch.allclose(got, expected, rtol=5e-7, atol=5e-7)
    return same_bits(got, expected)


@every_operation
def test_compiles_as_one_graph(operation: Operation) -> None:
    counter = _counter()
    compiled = torch.compile(operation.call, fullgraph=True, backend=counter)
    inputs = operation.inputs(Draw(seed=1), SHAPE)
    with torch.no_grad():
        expected = operation.call(**inputs)
        for _ in range(2):
            assert _agree(compiled(**inputs), expected, operation)
    assert counter.frame_count == 1  # one graph, compiled once, and it was the compiled object that ran
    assert counter.op_count >= 1


@every_operation
def test_compiles_as_one_graph_with_gradients(operation: Operation) -> None:
    counter = _counter()
    compiled = torch.compile(operation.call, fullgraph=True, backend=counter)
    inputs = operation.inputs(Draw(seed=1), SHAPE)
    expected, expected_grads = gradients(operation.call, inputs, operation.differentiable)
    got, got_grads = gradients(compiled, inputs, operation.differentiable)
    assert _agree(got, expected, operation)
    assert all(_agree(got_grads[name], expected_grads[name], operation) for name in operation.differentiable)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["lerp", "nlerp", "slerp"])
def test_another_t_does_not_compile_again_and_again(name: str) -> None:
    counter = _counter()
    compiled = torch.compile(getattr(latentfast, name), fullgraph=True, backend=counter)
    a, b = Draw(seed=1).normal(2, 2, 3, 4).unbind(0)
    for t in (0.1, 0.2, 0.35, 0.5, 0.77, 0.9, -0.3, 1.4):
        assert same_bits(compiled(a, b, t), getattr(latentfast, name)(a, b, torch.tensor(t)))
    # the first t is taken as a constant; the second makes it a symbol
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", ["slerp", "edit", "blend", "temporal_loss l2", "warp_loss", "slerp_path"])
def test_dynamic_shapes(name: str) -> None:
    operation = BY_NAME[name]
    counter = _counter()
    compiled = torch.compile(operation.call, fullgraph=True, dynamic=True, backend=counter)
    for frames, height in ((4, 5), (5, 7), (6, 3), (9, 11)):
        inputs = operation.inputs(Draw(seed=1), (2, 3, frames, height, 6))
        assert _agree(compiled(**inputs), operation.call(**inputs), operation)
    assert counter.frame_count <= 2


def test_t_on_the_device_and_out_buffers_compile() -> None:
    def step(a, b, t, out):
        return latentfast.slerp(a, b, t, out=out) * 2

    counter = _counter()
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    a, b = Draw(seed=1).normal(2, 2, 3, 4).unbind(0)
    for t in (0.25, 0.75):
        out = torch.empty_like(a)
        expected = latentfast.slerp(a, b, torch.tensor(t))
        assert torch.equal(compiled(a, b, torch.tensor(t), out), 2 * expected)
        assert same_bits(out, expected)
    assert counter.frame_count == 1


def test_a_forced_backend_is_obeyed_inside_a_compiled_function() -> None:
    counter = _counter()
    compiled = torch.compile(latentfast.slerp, fullgraph=True, backend=counter)
    a, b = Draw(seed=1).normal(2, 2, 3, 4).unbind(0)
    compiled(a, b, 0.5)
    with latentfast.use_backend("eager"):
        compiled(a, b, 0.5)
    targets = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert any("latentfast_eager" in target for target in targets)


def _interpolate_step(a, b, t):
    keys = torch.stack((a, b, a - b))
    path = (
        latentfast.slerp_path(a.tanh(), b, [0.25, 0.5]) + latentfast.lerp(a, b, t) + latentfast.nlerp(a, b, 0.1, dim=1)
    )
    mean = latentfast.spherical_mean(keys, [0.5, 0.3, 0.2])
    return (path * 2).sum(0) + latentfast.interpolate_keys(keys, [1.5], mode="catmull_rom")[0] + mean


def _edit_step(a, b, t):
    edited = latentfast.edit(
        a * 2, torch.stack((b, a)), torch.stack((t.flatten()[0], t.flatten()[1])), b[:, :1].sigmoid()
    )
    return latentfast.blend(a, edited, (b > 0).to(a.dtype)).exp()


def _temporal_step(a, b, t):
    flow = b[:, :2, 1:] * 0.3
    return (
        latentfast.temporal_loss(a * 2, b, second=0.5, norm="charbonnier")
        + latentfast.warp_loss(a.sin(), flow.detach()) * 3
    )


@pytest.mark.slow
@pytest.mark.parametrize("step", [_interpolate_step, _edit_step, _temporal_step], ids=lambda f: f.__name__.strip("_"))
def test_inductor_forward_and_backward(step) -> None:
    """Every operation between pointwise code that Inductor fuses around it."""
    draw = Draw(seed=1)
    inputs = {"a": draw.normal(*SHAPE), "b": draw.normal(*SHAPE), "t": draw.uniform(2, 1, 1, 1, 1)}
    wanted = ("a", "b") if step is not _temporal_step else ("a",)
    counter = _counter("inductor")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    expected, expected_grads = gradients(step, inputs, wanted)
    got, got_grads = gradients(compiled, inputs, wanted)
    assert counter.frame_count == 1
    # Inductor fuses and contracts the pointwise code around the operations: a few roundings each
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)
    for name in wanted:
        torch.testing.assert_close(got_grads[name], expected_grads[name], rtol=1e-5, atol=1e-5)


# --- torch.export -----------------------------------------------------------------------------------------------------


class _Applied(torch.nn.Module):
    def __init__(self, operation: Operation):
        super().__init__()
        self.call = operation.call

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.call(**inputs)


@every_operation
def test_exports(operation: Operation) -> None:
    inputs = operation.inputs(Draw(seed=1), SHAPE)
    program = torch.export.export(_Applied(operation), (inputs,))
    other = operation.inputs(Draw(seed=2), SHAPE)
    assert _agree(program.module()(other), operation.call(**other), operation)
    assert any("latentfast" in str(node.target) for node in program.graph.nodes)


# --- opcheck on the private operators ---------------------------------------------------------------------------------


def _samples(name: str, target: Target, empty: bool) -> list[tuple]:
    """Arguments of the operator `name`: contiguous tensors that want no gradient."""
    draw = Draw(device=target.device)
    b = 0 if empty else 2
    shape = (b, 3, 4, 5)

    def new(*sizes: int, dtype=torch.float32) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device=target.device)

    x, y = draw.normal(*shape), draw.normal(*shape)
    whole, rows = (
        (b, 1, 1, 60),
        (b, 3, 4, 5),
    )  # one vector a sample; vectors of 3 elements, 20 apart… and of q = 4, m = 5
    t = draw.uniform(2, b * rows[2])
    if name == "interpolate":
        return [
            (x, y, None, [0.0, 0.3], kind, *whole, new(2, *shape)) for kind in (0, 1, 2)
        ] + [(x, y, t, [], 2, *rows, new(2, *shape))]  # fmt: skip
    if name == "interpolate_bwd":
        grad = draw.normal(2, *shape)
        return [
            (grad, x, y, None, [0.2, 0.3], 2, *whole, new(*shape), None, None),
            (grad, x, y, t, [], 1, *rows, new(*shape), new(*shape), new(2, b * rows[2])),
        ]
    if name == "vector_dots":
        return [(draw.normal(3, *rows), draw.normal(2, *rows), *rows, new(2, b * rows[2], 3, dtype=torch.float64))]
    if name == "vector_mix":
        return [(draw.normal(3, *rows), draw.uniform(2, count, 3), *rows, new(2, *rows)) for count in (1, b * rows[2])]
    if name == "edit":
        directions, mask = draw.normal(2, *shape), draw.mask(*shape[1:])
        return [
            (x, directions, None, [0.5, 1.0], None, new(*shape)),
            (x, directions, draw.uniform(2, b), [], mask, new(*shape)),
        ]
    if name == "blend":
        return [(x, y, draw.mask(*shape[1:]), new(*shape))]
    if name == "temporal_loss":
        return [
            (x, None, None, 1.0, 0.0, 0, 1e-3, 1.0, 2, new(b), None),
            (x, y, draw.mask(*shape[1:]), 0.5, 0.5, 2, 1e-3, 0.5, 1, new(b), new(*shape)),
        ]
    if name == "stitch":
        sizes = ((4, 5), (4, 3), (2, 5), (2, 3))
        tiles = [draw.normal(b, 3, 2, *size) for size in sizes]
        return [(tiles, [1, 2, 2], [0, 2, 1], kind, [-0.5, 0.5], new(b, 3, 2, 4, 7)) for kind in (0, 1)]
    if name == "channel_stats":
        return [(x, *rows, new(b, 4, dtype=dtype), new(b, 4, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
    if name == "adain":
        return [(x, draw.normal(p, 2, 4, 3), 0.7, *rows, p, 2, 3, new(*shape)) for p in {b, 1}]
    if name == "standardize":
        mean, std = draw.normal(3), draw.uniform(3, low=0.5)
        sizes = (b, 3, 1, 4, 5, 1, 2, 1)
        return [
            (x, mean, std, [], [], 0.5, False, 0, *sizes, new(*shape)),
            (x, None, None, [0.1, 0.2, 0.3], [1.0, 2.0, 3.0], 0.5, False, 1, *sizes, new(b, 10, 6)),
            (draw.normal(b, 10, 6), None, std, [], [], 0.5, True, 2, *sizes, new(*shape)),
        ]
    if name == "tone_map":
        return [(x, None, 0.5, new(*shape)), (x, y, 0.5, new(*shape))]
    if name == "latent_to_rgb":
        z, weight, bias = draw.normal(b, 3, 2, 4, 5), draw.uniform(3, 3), draw.uniform(3)
        return [
            (z, weight, bias, new(b, 2, 4, 5, 3)),
            (z, weight, bias, new(b, 2, 12, 17, 3, dtype=torch.uint8)),
        ]
    if name == "token_heatmap":
        q, k = draw.normal(b, 3, 7, 8), draw.normal(b, 5, 3, 8)
        return [
            (q, k, False, True, None, [0, 4, 2], [1, 2], None, 0.4, new(b, 2, 7)),
            (q, k, False, True, draw.uniform(3, 5), [], [], draw.uniform(1, 5) < 0.6, 0.4, new(b, 3, 7)),
        ]
    if name == "heatmap_to_mask":
        heat, out = draw.uniform(b, 2, 60), new(b, 2, 3, 6, 7)
        return [
            (heat, [3, 4, 5], math.nan, 0.8, 0.0, 1, 0.7, out),
            (heat, [3, 4, 5], 0.5, math.nan, 0.2, 0, 0.0, out),
        ]
    if name == "guide":
        numbers = (5.0, 0.7, 0.25, 2.5, -0.5, 8.0, 0.9, -0.25)
        return [
            (x, y, None, None, None, None, 3, 0, *numbers, new(*shape), None),
            (x, y, draw.normal(*shape), None, draw.mask(*shape[1:]), draw.normal(*shape), 0, 1, *numbers, new(*shape),
             new(*shape)),
            (x, y, None, draw.normal(*shape), None, None, 1, 0, *numbers, new(*shape), None),
        ]  # fmt: skip
    if name == "combine":
        three, other = [x, y, draw.normal(*shape)], new(*shape).to(torch.bfloat16)
        return [
            (three, [0.5, -1.0, 2.0], 0, new(*shape), None, None, None),
            ([x, y.to(torch.bfloat16)], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 1, new(*shape), other, new(*shape), None),
        ]
    if name.startswith("plan_"):
        return _plan_samples(name, draw, b)
    assert name == "warp_loss", f"no arguments for {name}: a new operator needs a row here"
    z, flow = draw.normal(b, 3, 4, 5, 6), draw.uniform(b, 2, 3, 5, 6)
    return [(z, flow, None, 1.0, 2, new(b), None), (z, flow, draw.mask(3, 5, 6), 1.0, 2, new(b), new(*z.shape))]


def _plan_samples(name: str, draw: Draw, b: int) -> list[tuple]:
    """A slerp, a masked direction and an affine of (b, 3, 2, 4, 6), whose coefficients are those of the direction."""
    shape = (b, 3, 2, 4, 6)
    z, towards, mask = draw.normal(*shape), draw.normal(*shape), draw.mask(b, 1, 2, 4, 6)
    code = [2, 1, -1, 0, -1, 3, 1, 2, 1, -1, 8, -1, -1, -1, 0]
    coefficients, sliders = draw.uniform(3, b, 3, 4), draw.uniform(2, dtype=torch.float64)
    statistics, moments = (draw.uniform(*sizes, dtype=torch.float64) for sizes in ((1, b, 3, 2), (b, 3, 9)))
    inputs, kept = [z, towards, mask], draw.normal(*shape)
    if name == "plan_moments":
        return [(inputs, code, start, [value, 1], coefficients, moments) for start, value in ((0, 0), (2, -1))]
    if name == "plan_coefficients":
        rest = (statistics, moments, sliders, coefficients)
        return [(code, 0, 3, [0, 1], 48, given, *rest) for given in ([0.5, 0.25], [])]
    rgb = torch.empty(b, 2, 32, 48, 3, dtype=torch.uint8, device=z.device)
    known = (inputs, code, sliders, statistics, coefficients)
    return [(*known, None, None, kept, None), (*known, draw.uniform(3, 3), draw.uniform(3), None, rgb)]


@pytest.mark.parametrize(
    ("name", "empty"),
    list(itertools.product(_operators.SCHEMAS, (False, True))),
    ids=lambda x: x if isinstance(x, str) else ("empty" if x else "contiguous"),
)
def test_opcheck(name: str, empty: bool, target: Target) -> None:
    operator = getattr(getattr(torch.ops, CHOSEN[target.backend]), name).default
    skip_where_lacking(name, target.device)
    if target.backend == "eager" and name in ("interpolate_bwd", "temporal_loss", "warp_loss"):
        pytest.skip("the eager operator asks autograd for its gradient, which a dispatch mode, as opcheck's, shuts off")
    for arguments in _samples(name, target, empty):
        for x in arguments:
            if isinstance(x, torch.Tensor):
                x.nan_to_num_()  # outputs come uninitialised: what is compared must not be NaN before it is written
        results = torch.library.opcheck(operator, arguments)
        assert set(results.values()) == {"SUCCESS"}
        outputs = [
            x for x, a in zip(arguments, operator._schema.arguments, strict=True) if a.alias_info and x is not None
        ]
        assert outputs
        operator(*arguments)
        assert all(x.is_contiguous() for x in outputs)


def test_a_gradient_that_is_not_wanted_costs_nothing(target: Target) -> None:
    """Each subset of gradients agrees with all of them."""
    inputs = BY_NAME["slerp t per sample"].inputs(Draw(device=target.device), SHAPE)
    upstream = fixed_upstream(latentfast.slerp(**inputs))
    _, everything = gradients(latentfast.slerp, inputs, ("a", "b", "t"), upstream)
    for wanted in (("a",), ("b",), ("t",), ("a", "t")):
        _, some = gradients(latentfast.slerp, inputs, wanted, upstream)
        assert all(same_bits(some[name], everything[name]) for name in wanted)
