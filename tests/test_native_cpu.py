"""What only the native CPU library has: several instruction sets, and results written around the caches."""

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import latentfast
from tests.helpers import DTYPES, Draw, Target, gradients, why_missing
from tests.operations import OPERATIONS, Operation

_NATIVE = Target("native-cpu", "cpu")
pytestmark = pytest.mark.skipif(bool(why_missing(_NATIVE)), reason=f"native-cpu: {why_missing(_NATIVE)}")

#: Odd sizes, so that every loop has a rest; planes of more than one chunk of columns.
_SHAPE = (2, 3, 5, 19, 61)


@pytest.fixture
def use_isa() -> Iterator[Callable[[str | None], bool]]:
    """Choose an instruction set, if library and processor have it; the best one again at the end."""
    library = ctypes.CDLL(str(next(Path(latentfast.__file__).parent.glob("_native_cpu*.so"))))
    library.latentfast_cpu_use_isa.argtypes = [ctypes.c_char_p]
    library.latentfast_cpu_use_isa.restype = ctypes.c_bool
    library.latentfast_cpu_isa.restype = ctypes.c_char_p

    def use(name: str | None) -> bool:
        taken = library.latentfast_cpu_use_isa(name.encode() if name else None)
        assert not taken or name in (None, library.latentfast_cpu_isa().decode())
        return taken

    yield use
    use(None)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_same_bits_on_every_instruction_set(operation: Operation, dtype: torch.dtype, use_isa) -> None:
    inputs = operation.inputs(Draw(dtype), _SHAPE)
    results = {}
    for name in ("avx512", "avx2", "baseline"):
        if use_isa(name):
            with latentfast.use_backend("native-cpu"):
                value, found = gradients(operation.call, inputs, operation.differentiable)
            results[name] = [value, *found.values()]
    if len(results) < 2:
        pytest.skip(f"this processor has {', '.join(results)} alone")
    expected = results.popitem()[1]
    for name, got in results.items():
        for x, y in zip(got, expected, strict=True):
            assert torch.equal(x, y), f"{name} differs by {(x - y).abs().max()}"


def test_unknown_instruction_set_is_refused(use_isa) -> None:
    assert not use_isa("sse9")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("offset", [0, 1, 5])
def test_large_results_are_the_same_at_any_address(dtype: torch.dtype, offset: int) -> None:
    """Results of more than 4 MiB go around the caches in whole lines: the parts before and after need care."""
    draw = Draw(dtype)
    n = (5 << 20) // torch.empty(0, dtype=dtype).element_size() + 7
    a, b, mask = draw.normal(1, n), draw.normal(1, n), draw.mask(1, n)
    buffer = torch.full((n + 16,), torch.nan, dtype=dtype)
    out = buffer[offset : offset + n].view(1, n)
    with latentfast.use_backend("native-cpu"):
        for call in (
            lambda **out: latentfast.slerp(a, b, 0.3, **out),
            lambda **out: latentfast.blend(a, b, mask, **out),
            lambda **out: latentfast.edit(a, b.unsqueeze(0), [0.5], mask, **out),
        ):
            call(out=out)
            parts = [call_part.flatten() for call_part in (buffer[:offset], buffer[offset + n :])]
            assert all(part.isnan().all() for part in parts), "something was written beside the result"
            assert torch.equal(out, call())
