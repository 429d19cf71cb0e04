"""`combine`: linear combinations, which every linear scheduler's step is."""

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from latentfast import _direct
from latentfast.backends import implementation
from latentfast.ops import _checks

#: How many tensors one call of `combine` takes.
MOST_TENSORS = 8
#: How many results it gives.
MOST_RESULTS = 4


def _launch(tensors: list[Tensor], coefficients: list[float], precise: bool, outs: Sequence[Tensor]) -> None:
    """`coefficients`: row after row, one row an output."""
    implementation("combine", tensors[0])(
        tensors, coefficients, int(precise), *outs, *[None] * (MOST_RESULTS - len(outs))
    )  # fmt: skip


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, dtypes, precise, *tensors):
        ctx.rows, ctx.precise = rows, precise
        ctx.dtypes = [x.dtype for x in tensors]
        outs = [torch.empty_like(tensors[0], dtype=dtype) for dtype in dtypes]
        _launch(list(tensors), [number for row in rows for number in row], precise, outs)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        upstream = [grad.contiguous() for grad in grads]
        results: list[Tensor | None] = []
        for i, wanted in enumerate(ctx.needs_input_grad[3:]):
            if not wanted:
                results.append(None)
                continue
            result = torch.empty_like(upstream[0], dtype=ctx.dtypes[i])
            _launch(upstream, [row[i] for row in ctx.rows], ctx.precise, [result])
            results.append(result)
        return None, None, None, *results


def _row(name: str, values: object, count: int) -> list[float]:
    if not isinstance(values, list | tuple):
        raise TypeError(f"{name} must be a list of numbers, got {type(values).__name__}")
    if len(values) != count:
        raise ValueError(f"{name} must be {count} numbers, one for each tensor, got {len(values)}")
    return [_checks.number(f"{name}[{i}]", value) for i, value in enumerate(values)]


def _rows(coefficients: object, count: int) -> tuple[list[list[float]], bool]:
    """The rows of coefficients, and whether there were several in a list."""
    if not isinstance(coefficients, list | tuple) or not any(isinstance(c, list | tuple) for c in coefficients):
        return [_row("coefficients", coefficients, count)], False
    if len(coefficients) > MOST_RESULTS:
        raise ValueError(f"coefficients must be 1 to {MOST_RESULTS} rows, got {len(coefficients)}")
    return [_row(f"coefficients[{k}]", row, count) for k, row in enumerate(coefficients)], True


def _dtypes(dtypes: object, rows: int, first: Tensor) -> list[torch.dtype]:
    """The results' dtypes."""
    given: list = [first.dtype] * rows if dtypes is None else [dtypes]
    if isinstance(dtypes, list | tuple):
        given = list(dtypes)
    if len(given) != rows:
        raise ValueError(f"dtypes must be {rows} dtypes, one for each result, got {len(given)}")
    for k, dtype in enumerate(given):
        if dtype not in _checks.DTYPES:
            raise TypeError(f"dtypes[{k}] must be float32, float16, bfloat16 or float64, got {dtype}")
    return given


@overload
def combine(
    tensors: Sequence[Tensor], coefficients: Sequence[float], *, dtypes: torch.dtype | None = None,
    precise: bool = False, out: Tensor | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def combine(
    tensors: Sequence[Tensor], coefficients: Sequence[Sequence[float]], *, dtypes: Sequence[torch.dtype] | None = None,
    precise: bool = False, out: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]: ...  # fmt: skip
def combine(tensors, coefficients, *, dtypes=None, precise=False, out=None):
    """Linear combinations Σ_i coefficients[i]·tensors[i], each tensor read once: any linear scheduler's step.

    A step of DDIM, DPM-Solver++, UniPC or any other linear multistep method is a sum of the sample, earlier and new
    predictions and noise with numbers that follow from the noise levels alone: work them out on the host, in float64.
    What else a solver keeps (the converted prediction, the corrected sample) is another such sum of the same tensors:
    with rows of coefficients, one a result, all of them come from one pass.

    Args:
        tensors: 1 to 8 tensors of one shape and device; float32, float16, bfloat16 or float64, and not necessarily
            all the same.
        coefficients: As many finite numbers; or 1 to 4 rows of as many, for so many results.
        dtypes: Of the result, or with rows a list of one each; None: that of the first tensor.
        precise: Sum in float64 whatever the dtypes: for coefficients that cancel, as those of the higher orders of
            solvers do. It costs no time where memory is what limits, but on a GPU with few float64 units.
        out: A contiguous tensor of the tensors' shape and device to write into, of any of those dtypes, or with rows
            a list of one each; not differentiable. Its dtype decides: give `out` or `dtypes`.

    Returns:
        A new contiguous tensor, or with rows a tuple of them: summed in the order of the tensors, in float64 if
        `precise` or if a tensor or a result is float64, in float32 otherwise; rounded once (to a half by way of
        float32).

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: there are none or more than 8 tensors, or more than 4 rows, or shapes, devices or numbers do not
            fit.

    Differentiable in the tensors, once. Under `torch.compile` the coefficients are constants of the graph.

    Example:
        >>> import torch, latentfast
        >>> sample, prediction = torch.ones(2), torch.full((2,), 4.0, dtype=torch.bfloat16)
        >>> latentfast.combine([sample, prediction], [0.5, -0.25])
        tensor([-0.5000, -0.5000])
        >>> latentfast.combine([sample, prediction], [[1.0, -0.25], [1.0, -0.5]])
        (tensor([0., 0.]), tensor([-1., -1.]))
    """
    if _direct.enabled and out is None and not torch.compiler.is_dynamo_compiling():
        result = _direct.combine(tensors, coefficients, dtypes, precise)
        if result is not None:
            return result
    if not isinstance(tensors, list | tuple):
        raise TypeError(f"tensors must be a list of tensors, got {type(tensors).__name__}")
    if not 1 <= len(tensors) <= MOST_TENSORS:
        raise ValueError(f"tensors must be 1 to {MOST_TENSORS} tensors, got {len(tensors)}")
    first = _checks.latent("tensors[0]", tensors[0])
    for i, x in enumerate(tensors):
        if _checks.latent(f"tensors[{i}]", x).shape != first.shape:
            raise ValueError(f"tensors[{i}] must have tensors[0]'s shape {tuple(first.shape)}, got {tuple(x.shape)}")
        _checks.same_device(f"tensors[{i}]", x, "tensors[0]", first)
    if not isinstance(precise, bool):
        raise TypeError(f"precise must be True or False, got {type(precise).__name__}")
    rows, several = _rows(coefficients, len(tensors))
    ready = [x if x.is_contiguous() else x.contiguous() for x in tensors]
    if out is not None:
        if dtypes is not None:
            raise ValueError("dtypes cannot be given together with out, whose dtype decides")
        outs = _outputs(out, len(rows), several, ready)
    else:
        types = _dtypes(dtypes, len(rows), first)
        if torch.is_grad_enabled() and any(x.requires_grad for x in ready):
            results = _Combine.apply(rows, types, precise, *ready)
            return results if several else results[0]
        outs = [torch.empty_like(ready[0], dtype=dtype) for dtype in types]
    _launch(ready, [number for row in rows for number in row], precise, outs)
    return tuple(outs) if several else outs[0]


def _outputs(out: object, count: int, several: bool, inputs: list[Tensor]) -> list[Tensor]:
    """The caller's output buffers, if they can be written into."""
    if several and (not isinstance(out, list | tuple) or len(out) != count):
        raise TypeError(f"out must be {count} tensors, one for each row of coefficients")
    outs: list = list(out) if several else [out]  # type: ignore[call-overload]
    for k, x in enumerate(outs):
        like = inputs[0]
        if isinstance(x, Tensor) and x.dtype in _checks.DTYPES and x.dtype != like.dtype:
            like = like.new_empty((), dtype=x.dtype)  # any floating dtype will do
        _checks.output(x, tuple(inputs[0].shape), "tensors[0]", like, (*inputs, *outs[:k]))
    return outs
