"""Guidance that waits: what the scheduler gets of it, and that everything else gets what plain torch computes."""

import copy
import gc
import io
import weakref

import numpy
import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from diffusers.models.modeling_outputs import Transformer2DModelOutput

from latentfast.integrations.diffusers import guidance
from latentfast.integrations.diffusers.guidance import Combination, Prediction, defer
from tests.helpers import Draw, same_bits

SHAPE = (1, 4, 3, 5, 7)
SCALE = 5.0
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
every_device = pytest.mark.parametrize("device", DEVICES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)


class Model(torch.nn.Module):
    """Returns what it is given, in one of the forms that transformers and UNets return."""

    def forward(self, x: Tensor, return_dict: bool = False):
        return Transformer2DModelOutput(sample=x) if return_dict else (x, "more")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def _pair(dtype: torch.dtype = torch.float32, device: str = "cpu", shape=SHAPE) -> tuple[Tensor, Tensor]:
    draw = Draw(dtype, device)
    return draw.normal(*shape), draw.normal(*shape)


def _predicted(*tensors: Tensor) -> list[Tensor]:
    model = Model()
    defer(model)
    return [model(x)[0] for x in tensors]


def _cfg(cond: Tensor, uncond: Tensor) -> Tensor:
    return uncond + SCALE * (cond - uncond)


# --- What waits -------------------------------------------------------------------------------------------------------


@every_device
@pytest.mark.parametrize("batch", [1, 2, 64])
def test_on_a_cpu_only_large_samples_wait(batch: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch must not decide it: a sample's bits would depend on who is with it."""
    monkeypatch.setattr(guidance, "LEAST_ON_CPU", 420)
    for shape, large in (((batch, 4, 3, 5, 7), True), ((batch, 4, 3, 5, 6), False)):
        cond, uncond = _pair(device=device, shape=shape)
        predictions = _predicted(cond, uncond)
        waits = large or device != "cpu"
        assert all(type(x) is (Prediction if waits else Tensor) for x in predictions)
        guided = _cfg(*predictions)
        assert type(guided) is (Combination if waits else Tensor)
        assert same_bits(guided.clone(), _cfg(cond, uncond))


@every_dtype
@every_device
def test_guidance_waits_as_two_terms(dtype: torch.dtype, device: str) -> None:
    cond, uncond = _pair(dtype, device)
    guided = _cfg(*_predicted(cond, uncond))
    assert isinstance(guided, Combination) and isinstance(guided, Tensor)
    assert (guided.shape, guided.dtype, guided.device, guided.ndim) == (cond.shape, dtype, cond.device, 5)
    (first, by_first), (second, by_second) = guided.linear_terms()
    assert first.data_ptr() == uncond.data_ptr() and by_first == 1 - SCALE
    assert second.data_ptr() == cond.data_ptr() and by_second == SCALE
    assert type(first) is Tensor and type(second) is Tensor
    assert same_bits(guided.clone(), _cfg(cond, uncond))


@every_dtype
@every_device
def test_one_batch_in_two_chunks(dtype: torch.dtype, device: str) -> None:
    both = torch.cat(_pair(dtype, device))
    (predicted,) = _predicted(both)
    for cast in (lambda x: x, lambda x: x.float(), lambda x: x.to(torch.float32), lambda x: x.to(dtype=torch.float32)):
        uncond, cond = cast(predicted).chunk(2)
        guided = _cfg(cond, uncond)
        want = _cfg(*reversed(cast(both).chunk(2)))
        assert guided.dtype == want.dtype
        # a cast from float64 is not exact, so it is computed
        waits = not (dtype == torch.float64 and want.dtype == torch.float32)
        assert isinstance(guided, Combination) == waits
        if waits:
            assert [by for _, by in guided.linear_terms()] == [1 - SCALE, SCALE]
            assert {x.dtype for x, _ in guided.linear_terms()} == {dtype}
        assert same_bits(guided.clone(), want)


def test_predictions_without_guidance_and_negated() -> None:
    (cond,) = _pair()[:1]
    (predicted,) = _predicted(cond)
    assert predicted.linear_terms()[0][0].data_ptr() == cond.data_ptr()
    assert (-predicted).linear_terms()[0][1] == -1.0
    assert same_bits((-predicted).clone(), -cond)


def test_three_predictions_wait_and_four_do_not() -> None:
    tensors = [Draw(seed=i).normal(*SHAPE) for i in range(4)]
    a, b, c, d = _predicted(*tensors)
    three = a + 2.0 * (b - c)
    assert len(three.linear_terms()) == 3
    four = three + d
    assert type(four) is Tensor and same_bits(four, tensors[0] + 2.0 * (tensors[1] - tensors[2]) + tensors[3])


def test_numpy_and_whole_numbers_as_scales() -> None:
    cond, uncond = _pair()
    c, u = _predicted(cond, uncond)
    for scale in (3, numpy.float64(2.5)):
        guided = u + scale * (c - u)
        assert isinstance(guided, Combination)
        assert same_bits(guided.clone(), uncond + scale * (cond - uncond))


# --- Everything else is plain torch -----------------------------------------------------------------------------------

TOUCHES = {
    "a tensor as scale": lambda c, u: u + torch.tensor(5.0) * (c - u),
    "infinite scale": lambda c, u: u + float("inf") * (c - u),
    "a plain operand": lambda c, u: _cfg(c, u) + torch.ones(SHAPE),
    "number": lambda c, u: _cfg(c, u) + 1.0,
    "alpha": lambda c, u: torch.add(_cfg(c, u), c, alpha=2.0),
    "item of it": lambda c, u: _cfg(c, u)[:, 1:],
    "std": lambda c, u: _cfg(c, u).std(dim=[1, 2], keepdim=True),
    "narrower": lambda c, u: _cfg(c, u).to(torch.bfloat16),
    "cat": lambda c, u: torch.cat([_cfg(c, u), c]),
    "in place": lambda c, u: _cfg(c, u).mul_(2.0),
    "where": lambda c, u: torch.where(c > 0, _cfg(c, u), u),
    "numpy": lambda c, u: torch.from_numpy(_cfg(c, u).numpy().copy()),
    "list": lambda c, u: torch.tensor(_cfg(c, u).tolist()),
    "deepcopy": lambda c, u: copy.deepcopy(_cfg(c, u)),
    "stride": lambda c, u: torch.tensor(_cfg(c, u).stride()),
    "text": lambda c, u: torch.tensor([ord(x) for x in repr(_cfg(c, u))]),
    "operator": lambda c, u: torch.ops.aten.mul.Tensor(_cfg(c, u), c),
    "a chunk of guidance": lambda c, u: _cfg(c, u).chunk(2, 1)[1],
    "product": lambda c, u: _cfg(c, u) * c,
    "compared": lambda c, u: _cfg(c, u) == c,
}


@pytest.mark.parametrize("touch", TOUCHES.values(), ids=TOUCHES.keys())
def test_another_touch_gives_what_plain_torch_gives(touch) -> None:
    cond, uncond = _pair()
    want = touch(cond.clone(), uncond.clone())
    got = touch(*_predicted(cond, uncond))
    assert type(got) is Tensor
    assert torch.equal(got, want) and got.stride() == want.stride()


def test_guidance_can_be_saved() -> None:
    cond, uncond = _pair()
    file = io.BytesIO()
    torch.save({"noise_pred": _cfg(*_predicted(cond, uncond))}, file)
    file.seek(0)
    loaded = torch.load(file)["noise_pred"]
    assert type(loaded) is Tensor and same_bits(loaded, _cfg(cond, uncond))


def test_it_is_computed_once() -> None:
    guided = _cfg(*_predicted(*_pair()))
    assert guided.clone().data_ptr() != guided.data_ptr() == guided.data_ptr()


def test_writing_into_a_prediction_computes_first_what_waits_for_it() -> None:
    cond, uncond = _pair()
    want = _cfg(cond, uncond)
    for write in (lambda x: x.mul_(2.0), lambda x: x.__setitem__(0, 0.0), lambda x: torch.mul(x, 2.0, out=x)):
        c, u = _predicted(cond.clone(), uncond.clone())
        guided = _cfg(c, u)
        write(u)
        assert same_bits(guided.clone(), want)


def test_what_was_computed_is_its_own_term() -> None:
    """Also after it was written into, or what it was made of."""
    cond, uncond = _pair()
    want = _cfg(cond, uncond)
    c, u = _predicted(cond, uncond)
    guided = _cfg(c, u)
    u.zero_()
    ((value, by),) = guided.linear_terms()
    assert by == 1.0 and same_bits(value, want)
    guided.mul_(2.0)
    assert same_bits(guided.linear_terms()[0][0], want * 2.0)
    assert isinstance(_cfg(c, u), Combination)  # of what is there now
    assert same_bits(_cfg(c, u).clone(), _cfg(cond, torch.zeros_like(cond)))


def test_writing_through_a_view_is_an_error() -> None:
    cond, uncond = _pair()
    guided = _cfg(*_predicted(cond, uncond))
    uncond.view(-1)[0] = 1.0
    with pytest.raises(RuntimeError, match="changed in place"):
        guided.clone()
    with pytest.raises(RuntimeError, match="changed in place"):
        guided.linear_terms()


def test_inside_a_kernel_that_knows_no_subclasses() -> None:
    """Functions that switch the overrides off still reach the value."""
    cond, uncond = _pair()
    guided = _cfg(*_predicted(cond, uncond))
    with torch._C.DisableTorchFunctionSubclass():
        assert same_bits(torch.mul(guided, 1.0), _cfg(cond, uncond))


def test_nothing_is_kept_alive() -> None:
    cond, uncond = _pair()
    guided = _cfg(*_predicted(cond, uncond))
    alive = weakref.ref(cond)
    del cond
    guided.clone()
    del guided
    gc.collect()
    assert alive() is None


# --- The hook ---------------------------------------------------------------------------------------------------------


def test_the_hook_comes_and_goes() -> None:
    model, x = Model(), torch.ones(SHAPE)
    handle = defer(model)
    first, rest = model(x)
    assert isinstance(first, Prediction) and rest == "more"
    output = model(x, return_dict=True)
    assert isinstance(output.sample, Prediction) and output[0] is output.sample
    handle.remove()
    assert model(x)[0] is x


def test_what_the_hook_leaves_alone() -> None:
    model = Model()
    defer(model)
    for x in (torch.ones(2, dtype=torch.long), torch.ones(2).requires_grad_(), torch.nn.Parameter(torch.ones(2)), None):
        assert model(x)[0] is x


def test_with_gradients_nothing_waits() -> None:
    c, u = _predicted(*_pair())
    with torch.enable_grad():
        assert type(_cfg(c, u)) is Tensor


def test_inference_mode() -> None:
    with torch.inference_mode():
        cond, uncond = _pair()
        guided = _cfg(*_predicted(cond, uncond))
        assert len(guided.linear_terms()) == 2
        assert same_bits(guided.clone(), _cfg(cond, uncond))


@pytest.mark.parametrize("wrapped", [False, True], ids=["compiled in place", "wrapped"])
def test_compiled_models(wrapped: bool) -> None:
    model = torch.nn.Linear(3, 3)
    plain = copy.deepcopy(model)

    class Pair(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (self.inner(x),)

    module = Pair(model)
    if wrapped:
        module = torch.compile(module, backend="eager", fullgraph=True)
    else:
        module.compile(backend="eager", fullgraph=True)
    handle = defer(module)
    x = torch.ones(2, 3)
    predicted = module(x)[0]
    assert isinstance(predicted, Prediction) == wrapped
    torch.testing.assert_close(predicted.clone(), plain(x))
    handle.remove()
    assert type(module(x)[0]) is Tensor
