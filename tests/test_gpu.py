"""What only a GPU shows: CUDA graphs, no waiting, streams, two devices, more than 2³¹ elements."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

import latentfast
from tests.helpers import (
    TARGETS,
    Draw,
    Target,
    fixed_upstream,
    same_bits,
    skip_where_torch_adds_atomically,
    why_missing,
)
from tests.operations import BY_NAME, OPERATIONS, Operation

CUDA_TARGETS = [target for target in TARGETS if target.device == "cuda"]
pytestmark = pytest.mark.gpu
every_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=str)
SHAPE = (2, 3, 5, 7, 11)


@pytest.fixture(params=[t for t in CUDA_TARGETS if not why_missing(t)] or [CUDA_TARGETS[0]], ids=str)
def gpu(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Each backend that this machine has for CUDA tensors."""
    if reason := why_missing(request.param):
        pytest.skip(reason if torch.cuda.is_available() else "torch sees no CUDA device")
    with latentfast.use_backend(request.param.backend):
        yield request.param


@pytest.fixture
def kernels(gpu: Target) -> Target:
    """The backends that are kernels of ours."""
    if gpu.backend == "eager":
        pytest.skip("eager: plain PyTorch waits while it copies numbers from the host, and makes float32 copies of all")
    return gpu


@contextlib.contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _forward_and_backward(operation: Operation, leaves: dict, upstream: torch.Tensor) -> list[torch.Tensor]:
    out = operation.call(**leaves)
    if not operation.differentiable:
        return [out]
    grads = torch.autograd.grad(out, [leaves[name] for name in operation.differentiable], upstream)
    return [out.detach(), *grads]


def _leaves(operation: Operation, seed: int, device: str = "cuda", shape=SHAPE) -> dict[str, torch.Tensor]:
    inputs = operation.inputs(Draw(device=device, seed=seed), shape)
    return {name: x.requires_grad_(name in operation.differentiable) for name, x in inputs.items()}


# --- No operation waits for the device --------------------------------------------------------------------------------


@every_operation
def test_no_operation_waits_for_the_device(operation: Operation, kernels: Target) -> None:
    leaves = _leaves(operation, 1)
    upstream = fixed_upstream(operation.call(**leaves))
    _forward_and_backward(operation, leaves, upstream)  # compiles, allocates
    with _waiting_is_an_error():
        _forward_and_backward(operation, leaves, upstream)


def test_the_guard_against_waiting_works(gpu: Target) -> None:
    with pytest.raises(RuntimeError, match="synchroniz"), _waiting_is_an_error():
        torch.ones(1, device="cuda").item()


# --- CUDA graphs ------------------------------------------------------------------------------------------------------


def _captured(function, stream: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    """`function` captured on a side stream after a warm-up there, which compiles and fills caches."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = function()
    return graph, results


@every_operation
def test_captured_in_a_graph_on_a_side_stream(operation: Operation, kernels: Target) -> None:
    """Replayed with other inputs in the same memory, the graph has the bits of a call."""
    leaves = _leaves(operation, 1)
    with torch.no_grad():
        graph, (out,) = _captured(lambda: [operation.call(**leaves)], torch.cuda.Stream())
        for seed in (2, 3):
            fresh = operation.inputs(Draw(device="cuda", seed=seed), SHAPE)
            for name, x in leaves.items():
                x.copy_(fresh[name])
            out.fill_(float("nan"))
            graph.replay()
            assert same_bits(out, operation.call(**fresh))


@every_operation
def test_captured_forward_and_backward(operation: Operation, kernels: Target) -> None:
    leaves = _leaves(operation, 1)
    upstream = fixed_upstream(operation.call(**leaves))
    stream = torch.cuda.Stream()
    graph, results = _captured(lambda: _forward_and_backward(operation, leaves, upstream), stream)
    fresh = _leaves(operation, 2)
    with torch.no_grad():
        for name, x in leaves.items():
            x.copy_(fresh[name])
    graph.replay()
    expected = _forward_and_backward(operation, fresh, upstream)
    assert all(map(same_bits, results, expected))


def test_a_captured_loop_that_allocates_nothing(kernels: Target) -> None:
    """A preview loop with its own buffers: edit, blend, loss and gradient, all through `out`."""
    draw = Draw(device="cuda", seed=1)
    z, direction, mask = draw.normal(*SHAPE), draw.normal(1, *SHAPE), draw.mask(2, 1, 5, 7, 11)
    edited, blended, grad = (torch.empty_like(z) for _ in range(3))
    losses = torch.empty(2, device="cuda")

    def loop() -> list[torch.Tensor]:
        latentfast.edit(z, direction, [0.7], out=edited)
        latentfast.blend(z, edited, mask, out=blended)
        latentfast.temporal_loss_and_grad(blended, z, mask, reduction="none", out=(losses, grad))
        return [edited, blended, losses, grad]

    expected = [x.clone() for x in loop()]
    graph, _ = _captured(loop, torch.cuda.Stream())
    for x in (edited, blended, losses, grad):
        x.fill_(float("nan"))
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        graph.replay()
    assert torch.cuda.memory_allocated() == before
    assert all(map(same_bits, expected, (edited, blended, losses, grad)))


# --- Streams ----------------------------------------------------------------------------------------------------------


@every_operation
def test_runs_on_the_current_stream(operation: Operation, gpu: Target) -> None:
    """On a side stream whose inputs are written after a long sleep: a launch on any other stream would read zeros."""
    fresh = operation.inputs(Draw(device="cuda", seed=1), SHAPE)
    expected = operation.call(**fresh)
    inputs = {name: torch.zeros_like(x) for name, x in fresh.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # clock cycles: some fifty milliseconds
        for name, x in inputs.items():
            x.copy_(fresh[name])
        out = operation.call(**inputs)
    stream.synchronize()
    assert same_bits(out, expected)


# --- Two devices ------------------------------------------------------------------------------------------------------


@every_operation
def test_on_a_device_that_is_not_the_current_one(operation: Operation, gpu: Target) -> None:
    skip_where_torch_adds_atomically(gpu, operation.function)
    if torch.cuda.device_count() < 2:
        pytest.skip("torch sees one CUDA device, two are needed")
    results = []
    with torch.cuda.device(0):
        for device in ("cuda:0", "cuda:1"):
            leaves = _leaves(operation, 1, device)
            out = operation.call(**leaves)
            results.append(_forward_and_backward(operation, leaves, fixed_upstream(out)))
        assert torch.cuda.current_device() == 0
    assert all(x.device.index == 1 for x in results[1])
    assert all(same_bits(x.cpu(), y.cpu()) for x, y in zip(*results, strict=True))


def test_tensors_on_two_devices_are_refused(gpu: Target) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("torch sees one CUDA device, two are needed")
    with pytest.raises(ValueError, match="b must be on a's device cuda:0, got cuda:1"):
        latentfast.slerp(torch.ones(2, 3, device="cuda:0"), torch.ones(2, 3, device="cuda:1"), 0.5)


def test_tensors_on_the_host_are_refused(gpu: Target) -> None:
    a = torch.ones(2, 3, device="cuda")
    with pytest.raises(ValueError, match="b must be on a's device cuda:0, got cpu"):
        latentfast.slerp(a, a.cpu(), 0.5)
    with pytest.raises(ValueError, match="mask must be on base's device cuda:0, got cpu"):
        latentfast.blend(a, a, torch.ones(3))


# --- More than 2³¹ elements -------------------------------------------------------------------------------------------

#: Bytes an element that a case needs at most, in bfloat16: inputs, result, gradient and a copy.
_BYTES = 2 * 6
_BIG = 2**31 + 2**12


def _room(elements: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < elements * _BYTES:
        pytest.skip(f"{elements * _BYTES / 2**30:.0f} GiB of GPU memory are needed")


def _big(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(generator=generator)


@pytest.fixture
def _memory_returned() -> Iterator[None]:
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


@pytest.mark.slow
@pytest.mark.usefixtures("_memory_returned")
@pytest.mark.parametrize("name", ["lerp", "slerp", "slerp channels"])
def test_rule7_more_than_2_to_the_31_elements_interpolated(name: str, kernels: Target) -> None:
    """A sample's bits do not depend on its batch (rule 1): the last sample alone tells what it must be."""
    shape = (4, 4, 2**27 + 2**8) if "channels" in name else (4, _BIG // 4)
    _room(_BIG)
    a, b = _big(shape, 1), _big(shape, 2)
    options = {"t": 0.3, "dim": 1 if "channels" in name else None}
    function = latentfast.lerp if name == "lerp" else latentfast.slerp
    out = function(a, b, **options)
    for sample in (0, 3):
        assert same_bits(out[sample], function(a[sample : sample + 1], b[sample : sample + 1], **options)[0])


@pytest.mark.slow
@pytest.mark.usefixtures("_memory_returned")
def test_rule7_more_than_2_to_the_31_elements_in_one_vector(kernels: Target) -> None:
    """One vector that long, opposite in all but its end: reductions must reach the end to see it."""
    _room(_BIG)
    a = torch.zeros(1, _BIG, dtype=torch.bfloat16, device="cuda")
    b = torch.zeros_like(a)
    a[0, 0] = b[0, -1] = 1.0  # orthogonal, if the last element is seen
    out = latentfast.slerp(a, b, 1 / 3)
    assert abs(out[0, 0].item() - 0.75**0.5) < 2**-8
    assert abs(out[0, -1].item() - 0.5) < 2**-8
    assert out[0, 1:-1].count_nonzero().item() == 0


@pytest.mark.slow
@pytest.mark.usefixtures("_memory_returned")
def test_rule7_more_than_2_to_the_31_elements_edited(kernels: Target) -> None:
    shape = (2, 4, 2**28 + 2**9)
    _room(_BIG)
    z, direction = _big(shape, 1), _big((1, 1, 4, shape[2]), 2)
    mask = (_big((2, 1, shape[2]), 3) > 0).to(torch.bfloat16)
    out = latentfast.edit(z, direction, [0.5], mask)
    assert same_bits(out[1], latentfast.edit(z[1:], direction, [0.5], mask[1:])[0])
    blended = latentfast.blend(z, out, mask)
    assert same_bits(blended[1], latentfast.blend(z[1:], out[1:], mask[1:])[0])


@pytest.mark.slow
@pytest.mark.usefixtures("_memory_returned")
def test_rule7_more_than_2_to_the_31_elements_in_a_clip(kernels: Target) -> None:
    shape = (2, 4, 3, 2**14, 2**12 * 21 // 8 + 16)
    _room(2 * 4 * 3 * shape[3] * shape[4])
    assert 2 * 4 * 3 * shape[3] * shape[4] > 2**31
    z = _big(shape, 1)
    loss, grad = latentfast.temporal_loss_and_grad(z, second=0.5, reduction="none")
    alone, alone_grad = latentfast.temporal_loss_and_grad(z[1:], second=0.5, reduction="none")
    assert same_bits(loss[1:], alone)
    assert same_bits(grad[1], alone_grad[0])
    assert abs(loss[0].item() - (2 + 0.5 * 6)) < 0.01  # independent normal frames: d1 has variance 2, d2 has 6


@pytest.mark.parametrize("name", ["slerp", "temporal_loss l2", "edit"])
def test_two_threads_on_two_streams(name: str, gpu: Target) -> None:
    """Scratch memory that two calls in flight shared would show."""
    operation = BY_NAME[name]
    batches = [operation.inputs(Draw(device="cuda", seed=seed), (2, 16, 9, 64, 64)) for seed in (1, 2)]
    expected = [operation.call(**inputs) for inputs in batches]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in batches]
    results: list[list[torch.Tensor]] = [[], []]
    for _ in range(20):
        for stream, inputs, kept in zip(streams, batches, results, strict=True):
            with torch.cuda.stream(stream):
                kept.append(operation.call(**inputs))
    torch.cuda.synchronize()
    assert all(same_bits(out, want) for kept, want in zip(results, expected, strict=True) for out in kept)
