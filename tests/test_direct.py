"""The direct door to the native kernels: the dispatcher's bits, and everything unusual declined untouched."""

import gc
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import NoneType

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import latentfast
from latentfast import _direct
from tests.direct_cases import CASES, SHAPE, pair, random, wide

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def _why_closed(device: str) -> str:
    """Why the door cannot be tested on a device type; '' if it can."""
    name = {"cpu": "native-cpu", "cuda": "cuda"}[device]
    backend = next(b for b in latentfast.backends() if b.name == name)
    if not backend.available:
        return f"{name}: {backend.reason}"
    if _direct._library is None:
        return "the direct door's library was not built, or does not fit this Python or torch"
    return ""


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if reason := _why_closed(request.param):
        pytest.skip(reason)
    return request.param


DOORS = ("interpolate", "edit", "blend", "temporal_loss", "scaled", "guide", "guided_step", "combine")


@contextmanager
def _answers() -> Iterator[list]:
    """What the door answers to the calls inside the block."""
    answers: list = []

    def recorded(function: Callable) -> Callable:
        def call(*args):
            answers.append(function(*args))
            return answers[-1]

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in DOORS:
            patch.setattr(_direct, name, recorded(getattr(_direct, name)))
        yield answers


@contextmanager
def _closed() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_direct, "enabled", False)
        yield


def _tensors(result) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _held(inputs: dict) -> list[Tensor]:
    """The tensors among a call's arguments, those in lists too."""
    lists = [value if isinstance(value, list) else [value] for value in inputs.values()]
    return [value for values in lists for value in values if isinstance(value, Tensor)]


def _same_bits(x: Tensor, y: Tensor) -> bool:
    same_kind = x.shape == y.shape and x.dtype == y.dtype and x.device == y.device and x.stride() == y.stride()
    return same_kind and torch.equal(x.view(torch.uint8) if x.ndim else x, y.view(torch.uint8) if y.ndim else y)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", CASES)
def test_both_doors_give_the_same_bits(name: str, device: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    call, inputs = getattr(latentfast, case.function), case.inputs(device, dtype)
    with _answers() as answers:
        direct = call(**inputs)
    assert len(answers) == 1 and answers[0] is not None, "the door declined an ordinary call"
    with _closed():
        expected = call(**inputs)
    assert type(direct) is type(expected)
    for x, y in zip(_tensors(direct), _tensors(expected), strict=True):
        assert _same_bits(x, y)
        assert not x.requires_grad and x.grad_fn is None


class _Subclass(torch.Tensor):
    pass


class _PassFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class _PassOperators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


#: Inputs that the door has to leave to the ordinary way, which can do them: made from an ordinary tensor.
ODD = {
    "requires grad": lambda x: x.clone().requires_grad_(),
    "a subclass": lambda x: x.clone().as_subclass(_Subclass),
    "not contiguous": lambda x: torch.stack([x, x], -1)[..., 0],
    "negation pending": lambda x: torch._neg_view(-x),
    "a leaf's view": lambda x: x.clone().requires_grad_()[...],
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", ["slerp", "edit, one mask", "blend", "temporal_loss, none", "guided_step, mask"])
def test_odd_tensors_go_the_ordinary_way(name: str, odd: str, device: str) -> None:
    case = CASES[name]
    call, inputs = getattr(latentfast, case.function), case.inputs(device, torch.float32)
    expected = call(**inputs)
    for argument in [k for k, v in inputs.items() if isinstance(v, Tensor)]:
        changed = {**inputs, argument: ODD[odd](inputs[argument])}
        if argument == "mask" and changed["mask"].requires_grad and case.function in ("temporal_loss", "guided_step"):
            continue  # an error: see below
        with _answers() as answers:
            result = call(**changed)
        # A loss asks once more, from within autograd, where a gradient is wanted.
        asked_again = case.function == "temporal_loss" and changed[argument].requires_grad
        assert answers[0] is None and len(answers) == 1 + asked_again, argument
        for x, y in zip(_tensors(result), _tensors(expected), strict=True):
            assert torch.equal(x.detach(), y), argument


def test_parameters_are_plain_tensors(device: str) -> None:
    a, b = pair(device, torch.float32).values()
    frozen = torch.nn.Parameter(a.clone(), requires_grad=False)
    with _answers() as answers:
        result = latentfast.slerp(frozen, b, 0.5)
    assert answers[0] is not None and type(result) is Tensor and _same_bits(result, latentfast.slerp(a, b, 0.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_loss_and_its_gradients_take_the_door_through_autograd(
    batch: int, reduction: str, dtype: torch.dtype, device: str
) -> None:
    z, ref = (random(device, batch, *SHAPE[1:], dtype=dtype, seed=seed) for seed in (0, 1))
    mask = random(device, batch, 1, *SHAPE[2:], dtype=dtype, seed=2).clamp(0, 1)
    upstream = torch.tensor(-0.37 if reduction == "mean" else [-0.37, 2.5][:batch], dtype=wide(dtype), device=device)

    def call() -> tuple[Tensor, ...]:
        leaves = torch.nn.Parameter(z.clone()), ref.clone().requires_grad_()
        loss = latentfast.temporal_loss(*leaves, mask, first=0.5, second=2.0, reduction=reduction)
        assert loss.requires_grad
        loss.backward(upstream)
        return loss.detach(), leaves[0].grad, leaves[1].grad

    with _answers() as answers:
        direct = call()
    # Declined because a gradient is wanted, then asked from within autograd; a float16 gradient needs its headroom.
    losses = 1 if dtype == torch.float16 else 2
    assert len(answers) == losses + 2 and answers[0] is None and all(a is not None for a in answers[1:])
    with _closed():
        expected = call()
    for x, y in zip(direct, expected, strict=True):
        assert _same_bits(x, y)


def test_a_gradient_is_wanted_only_in_grad_mode(device: str) -> None:
    a, b = pair(device, torch.float32).values()
    a.requires_grad_()
    with _answers() as answers, torch.no_grad():
        latentfast.slerp(a, b, 0.5)
    assert answers[0] is not None
    with _answers() as answers:
        latentfast.slerp(a, b, 0.5).sum().backward()
    assert answers == [None] and a.grad is not None
    # this pair is detached anyway
    with _answers() as answers:
        loss, grad = latentfast.temporal_loss_and_grad(a)
    assert answers[0] is not None and not loss.requires_grad and not grad.requires_grad


@pytest.mark.parametrize("mode", [_PassFunctions, _PassOperators])
def test_modes_see_the_operations(mode: type, device: str) -> None:
    inputs = {name: case.inputs(device, torch.float32) for name, case in CASES.items()}
    with _answers() as answers, mode():
        for name, case in CASES.items():
            getattr(latentfast, case.function)(**inputs[name])
    assert answers == [None] * len(CASES)


def test_transforms_and_tracers_see_the_operations(device: str) -> None:
    a, b = pair(device, torch.float32).values()
    with _answers() as answers:
        torch.func.vmap(lambda x: x + latentfast.slerp(a, b, 0.3).sum())(torch.ones(2, device=device))
        torch.jit.trace(lambda x, y: latentfast.lerp(x, y, 0.3), (a, b), check_trace=False)
    assert answers == [None, None]


def test_dynamo_does_not_meet_the_door(device: str) -> None:
    assert _direct.enabled
    for name in ("slerp", "edit", "blend", "temporal_loss_and_grad"):
        case = CASES[name]
        torch._dynamo.reset()
        call, inputs = getattr(latentfast, case.function), case.inputs(device, torch.float32)
        compiled = torch.compile(call, fullgraph=True, backend="eager")
        with _answers() as answers:
            result = compiled(**inputs)
        assert answers == [], name
        if name == "blend":  # takes no number, which a graph may hold in float32
            assert torch.equal(result, call(**inputs))


#: What the door must not touch although the tensors are plain: arguments, and what the ordinary way says to them.
WRONG: dict[str, tuple[str, dict, type[Exception] | None, str]] = {
    "another shape": ("slerp", {"b": torch.zeros(2, 4, 5, 6, 7)}, ValueError, "b must have a's shape"),
    "another dtype": ("slerp", {"b": torch.zeros(SHAPE, dtype=torch.float64)}, TypeError, "b must have a's dtype"),
    "no tensor": ("slerp", {"b": 1.0}, TypeError, "b must be a tensor"),
    "integers": ("slerp", {"a": torch.zeros(SHAPE, dtype=torch.int64)}, TypeError, "a must be float32"),
    "t of text": ("slerp", {"t": "0.5"}, TypeError, "t must be a float"),
    "t of True": ("slerp", {"t": True}, None, ""),
    "too large a t": ("slerp", {"t": 10**400}, RuntimeError, "ts"),
    "a dim": ("slerp", {"dim": 1}, None, ""),
    "ts of text": ("slerp_path", {"ts": ["a"]}, TypeError, "ts must be a sequence of floats"),
    "no ts": ("slerp_path", {"ts": []}, None, ""),
    "many ts": ("slerp_path", {"ts": [0.5] * 65}, None, ""),
    "a generator": ("slerp_path", {"ts": iter([0.5])}, None, ""),
    "no strengths": ("edit, one mask", {"strengths": []}, ValueError, "directions must hold 0"),
    "a strength missing": ("edit, one mask", {"strengths": [0.1, 0.2]}, ValueError, "directions must hold 2"),
    "directions as z": ("edit, one mask", {"directions": torch.zeros(SHAPE)}, ValueError, "directions must have 6 dim"),
    "a large mask": ("blend", {"mask": torch.zeros(3, 1, 1, 1, 1)}, ValueError, "mask must broadcast"),
    "more mask dims": ("blend", {"mask": torch.zeros(1, *SHAPE)}, ValueError, "mask must broadcast"),
    "no mask": ("blend", {"mask": None}, TypeError, "mask must be a tensor"),
    "a boolean mask": ("blend", {"mask": torch.ones(SHAPE, dtype=torch.bool)}, None, ""),
    "a double mask": ("blend", {"mask": torch.ones(SHAPE, dtype=torch.float64)}, None, ""),
    "a norm unknown": ("temporal_loss", {"norm": "l3"}, ValueError, "norm must be l2"),
    "a norm of lists": ("temporal_loss", {"norm": []}, TypeError, "unhashable"),
    "reduction unknown": ("temporal_loss", {"reduction": "sum"}, ValueError, "reduction must be"),
    "frames at -3": ("temporal_loss", {"frame_dim": -3}, None, ""),
    "frames at 0": ("temporal_loss", {"frame_dim": 0}, ValueError, "frame_dim must name"),
    "frames at True": ("temporal_loss", {"frame_dim": True}, None, ""),
    "first of nan": ("temporal_loss", {"first": float("nan")}, ValueError, "first must be finite"),
    "eps below 0": ("temporal_loss", {"eps": -1.0}, ValueError, "eps must be finite"),
    "empty": ("temporal_loss", {"z": torch.zeros(0, 4, 5, 6, 8)}, None, ""),
    "a mode unknown": ("guide", {"mode": "cfg++"}, ValueError, "mode must be one of"),
    "scale of text": ("guide", {"scale": "5"}, TypeError, "scale must be"),
    "scale of inf": ("guide", {"scale": float("inf")}, ValueError, "scale must be"),
    "rescale of 2": ("guided_step", {"rescale": 2.0}, ValueError, "rescale must lie"),
    "original of 1": ("guide", {"original": 1}, TypeError, "original must be"),
    "zero of cfg": ("guide", {"zero_init": True}, ValueError, "zero_init belongs"),
    "a momentum": ("guided_step, apg", {"momentum": -0.5, "momentum_buffer": torch.zeros(SHAPE)}, None, ""),
    "no buffer": ("guided_step, apg", {"momentum": -0.5}, ValueError, "momentum needs"),
    "known alone": ("guided_step", {"known": torch.zeros(SHAPE)}, ValueError, "known needs mask"),
    "mask alone": ("guided_step", {"mask": torch.zeros(SHAPE)}, ValueError, "mask needs known"),
    "known of another shape": ("guided_step, mask", {"known": torch.zeros(1, *SHAPE[1:])}, ValueError, "known must"),
    "x0 of 1": ("guided_step", {"return_x0": 1}, TypeError, "return_x0 must be"),
    "9 tensors": ("combine", {"tensors": [torch.zeros(SHAPE)] * 9}, ValueError, "tensors must be 1 to 8"),
    "a coefficient missing": ("combine", {"coefficients": [1.0]}, ValueError, "coefficients must be 6 numbers"),
    "coefficients of nan": ("combine", {"coefficients": [float("nan")] * 6}, ValueError, "coefficients"),
    "precise 1": ("combine", {"precise": 1}, TypeError, "precise must be True or False, got int"),
    "5 rows": ("combine, one", {"coefficients": [[1.0]] * 5}, ValueError, "coefficients must be 1 to 4 rows"),
    "a short row": ("combine, one", {"coefficients": [[1.0], []]}, ValueError, r"coefficients\[1\] must be 1 numbers"),
    "a row and a number": ("combine, one", {"coefficients": [[1.0], 1.0]}, TypeError, r"coefficients\[1\] must be"),
    "dtypes of one result": ("combine, one", {"dtypes": [torch.float32] * 2}, ValueError, "dtypes must be 1 dtypes"),
    "whole numbers": ("combine, one", {"dtypes": torch.int64}, TypeError, "must be float32, float16"),
    "a scalar": ("slerp", {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, None, ""),
}


@pytest.mark.parametrize("name", WRONG)
def test_unusual_arguments_are_declined_and_mistakes_explained(name: str, device: str) -> None:
    base, change, error, message = WRONG[name]
    change = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in change.items()}
    inputs = {**CASES[base].inputs(device, torch.float32), **change}
    with _answers() as answers:
        if error is None:
            getattr(latentfast, CASES[base].function)(**inputs)
        else:
            with pytest.raises(error, match=message):
                getattr(latentfast, CASES[base].function)(**inputs)
    assert all(answer is None for answer in answers)


def test_a_mask_that_requires_grad_is_an_error_of_the_ordinary_way(device: str) -> None:
    inputs = CASES["temporal_loss, none"].inputs(device, torch.float32)
    inputs["mask"].requires_grad_()
    with pytest.raises(ValueError, match="mask requires grad"):
        latentfast.temporal_loss(**inputs)


def test_a_given_output_is_the_ordinary_way(device: str) -> None:
    a, b = pair(device, torch.float32).values()
    with _answers() as answers:
        out = latentfast.slerp(a, b, 0.3, out=torch.empty_like(a))
    assert answers == [] and torch.equal(out, latentfast.slerp(a, b, 0.3))


def test_another_backend_closes_the_door(device: str) -> None:
    a, b = pair(device, torch.float32).values()
    with _answers() as answers:
        with latentfast.use_backend("eager"):
            latentfast.slerp(a, b, 0.3)
        latentfast.slerp(a, b, 0.3)
        with latentfast.use_backend({"cpu": "native-cpu", "cuda": "cuda"}[device]):
            latentfast.slerp(a, b, 0.3)
    assert len(answers) == 2 and all(answer is not None for answer in answers)


def test_inference_mode_gives_inference_tensors(device: str) -> None:
    with torch.inference_mode():
        a, b = pair(device, torch.float32).values()
        with _answers() as answers:
            assert latentfast.slerp(a, b, 0.3).is_inference()
    assert answers[0] is not None


@pytest.mark.parametrize(
    "name",
    ["slerp", "slerp_path", "edit, one mask", "blend", "temporal_loss_and_grad, all", "guided_step, all", "combine"],
)
def test_nothing_is_leaked(name: str, device: str) -> None:
    case = CASES[name]
    call, inputs = getattr(latentfast, case.function), case.inputs(device, torch.float32)
    # From Python 3.12 on True, False and None are immortal (PEP 683): their counts mean nothing, and an extension for
    # several versions of Python changes them by what the interpreter, which leaves them alone, does not take back.
    held = {name: value for name, value in inputs.items() if not isinstance(value, (bool, NoneType))}
    held |= {f"tensor {i}": x for i, x in enumerate(_held(inputs))}
    held |= {"torch.float32": torch.float32, "torch.Tensor": torch.Tensor}
    x = _held(inputs)[0]

    def run(calls: int) -> None:
        for _ in range(calls):
            call(**inputs)
            _direct.blend(x, x, None)  # declined late

    def counts() -> dict[str, int]:
        gc.collect()
        memory = torch.cuda.memory_allocated() if device == "cuda" else 0
        return {"memory": memory} | {name: sys.getrefcount(value) for name, value in held.items()}

    run(100)
    before, grown = counts(), []
    for _ in range(3):
        blocks = sys.getallocatedblocks()
        run(10_000)
        # a leak would be 10,000; others take and drop a reference to torch's own objects now and then
        more = {name: count - before[name] for name, count in counts().items() if count - before[name] >= 100}
        assert not more
        grown.append(sys.getallocatedblocks() - blocks)
    # a leak of one object a call would be 10,000 each time; what Python keeps of other things comes once
    assert min(grown) < 1000


def test_threads_call_at_once(device: str) -> None:
    a, b = pair(device, torch.float32).values()
    ts = [i / 64 for i in range(64)]
    expected = [latentfast.slerp(a, b, t) for t in ts]
    with ThreadPoolExecutor(8) as pool:  # the lock is given up while an operator runs
        results = list(pool.map(lambda t: latentfast.slerp(a, b, t), ts * 8))
    assert all(torch.equal(x, y) for x, y in zip(results, expected * 8, strict=True))


def _open_on_cuda() -> None:
    if reason := _why_closed("cuda"):
        pytest.skip(reason)


@pytest.mark.parametrize("name", CASES)
def test_cuda_graphs_replay_direct_calls(name: str) -> None:
    _open_on_cuda()
    case = CASES[name]
    call, inputs = getattr(latentfast, case.function), case.inputs("cuda", torch.bfloat16)
    call(**inputs)  # kernels are loaded, which a capture does not allow
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with _answers() as answers, torch.cuda.graph(graph):
        result = call(**inputs)
    assert answers[0] is not None
    for value in _held(inputs):
        value.copy_(value.flip(-1))
    graph.replay()
    for x, y in zip(_tensors(result), _tensors(call(**inputs)), strict=True):
        assert torch.equal(x, y)


def test_the_current_stream_is_used() -> None:
    _open_on_cuda()
    a, b = pair("cuda", torch.float32).values()
    expected = latentfast.slerp(a, b, 0.3)
    late = torch.zeros_like(a)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # some 10 ms: a kernel on another stream would read the zeros
        late.copy_(a)
        result = latentfast.slerp(late, b, 0.3)
    stream.synchronize()
    assert torch.equal(result, expected)


def test_another_device_than_the_current_one() -> None:
    _open_on_cuda()
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    for case in CASES.values():
        expected = getattr(latentfast, case.function)(**case.inputs("cuda:0", torch.bfloat16))
        with _answers() as answers:
            result = getattr(latentfast, case.function)(**case.inputs("cuda:1", torch.bfloat16))
        assert answers[0] is not None and torch.cuda.current_device() == 0
        for x, y in zip(_tensors(result), _tensors(expected), strict=True):
            assert x.device == torch.device("cuda:1") and torch.equal(x.cpu(), y.cpu())


def test_tensors_on_two_devices_are_declined() -> None:
    _open_on_cuda()
    a, b = pair("cuda", torch.float32).values()
    with pytest.raises(ValueError, match="b must be on a's device"):
        latentfast.slerp(a, b.cpu(), 0.3)
