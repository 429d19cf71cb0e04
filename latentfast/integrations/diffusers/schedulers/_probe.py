"""What one call of a scheduler's method does to tensors, read off by calling it on unit vectors.

The step of every solver here is linear in its tensors: the sample, the prediction, what earlier steps left, noise. A
linear function is known by its values on a basis. So diffusers' own method is called once on tiny float64 tensors
whose columns are that basis, and its results are the coefficients: with the noise levels and the rounding of scalars
of diffusers itself, whatever the solver, its order and its options. Two further columns hold a mixture of the basis,
small and large: where the results there are not that mixture of the coefficients, the method is not linear.

A second call, on tensors of the dtypes that the real ones have, tells the dtype of each result, of the noise that is
drawn, and which results are one of the inputs itself.
"""

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: Where a tensor comes from, or goes to: "argument", "history" (an attribute of the scheduler), "noise", "made" (one of
#: the combinations) or "result"; its name; and its number, where there are several of that name.
Place = tuple[str, str, int | None]
PREDICTION: Place = ("argument", "model_output", None)
_X0: Place = ("result", "x0", None)

#: Draws of noise that a step may make.
_MOST_DRAWS = 2
#: The mixture's weights: irregular, and of both signs.
_MIXTURE = (0.618, -1.414, 0.271, 1.732, -0.577, 0.916, -1.202, 0.314, 0.739, -0.865)
_LARGE = 1e4
#: How far a result on the mixture may be from that mixture of the coefficients: diffusers' own float32 rounding.
_TOLERANCE = 1e-5


class NotLinear(Exception):  # noqa: N818 (it is no error)
    """The call cannot be made as linear combinations of its tensors; the message says why."""


@dataclass(frozen=True)
class Plan:
    """A call as linear combinations."""

    #: The tensors that are combined, in the order of the columns of `rows`.
    inputs: tuple[Place, ...]
    rows: tuple[tuple[float, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    #: Of the draws of noise, in their order.
    noise: tuple[torch.dtype, ...]
    #: What the call returns: each is an input, one of the combinations, or None.
    results: tuple[Place | None, ...]
    #: What it returns that in; None: a tuple.
    output: type | None
    #: The tensors among the scheduler's attributes that it changes, and everything else that it changes there.
    state: dict[str, Any]
    changes: dict[str, Any]
    x0: Place | None
    #: `rows` and `inputs` with the prediction taken apart: see `expanded`.
    _expanded: dict = field(default_factory=dict, repr=False)

    def expanded(self, weights: tuple[float, ...]) -> tuple[tuple[Place, ...], tuple[tuple[float, ...], ...]]:
        """Inputs and rows where the prediction is itself a sum of terms with these weights; the terms are numbered."""
        found = self._expanded.get(weights)
        if found is None:
            inputs: list[Place] = []
            rows: list[list[float]] = [[] for _ in self.rows]
            for column, place in enumerate(self.inputs):
                is_sum = place == PREDICTION
                inputs += [(*PREDICTION[:2], i) for i in range(len(weights))] if is_sum else [place]
                for row, old in zip(rows, self.rows, strict=True):
                    row += [old[column] * weight for weight in weights] if is_sum else [old[column]]
            found = tuple(inputs), tuple(map(tuple, rows))
            self._expanded.clear()  # a guidance scale may change with every step
            self._expanded[weights] = found
        return found


class _Prepared(TorchFunctionMode):
    """While it is on, `torch.randn` gives what is prepared, and no generator advances; and, for coefficients, vectors
    in float64 stay so, where diffusers goes on in float32: an unlucky rounding of one unit would count everywhere.
    """

    def __init__(self, prepared: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.prepared = prepared
        self.drawn: list[Tensor] = []
        self.dtypes: list[torch.dtype] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.to and args[0].ndim and self.prepared[0] is not None:
            return args[0]
        if func is not torch.randn:
            return func(*args, **kwargs)
        if len(self.drawn) == len(self.prepared):
            raise NotLinear(f"it draws noise more than {len(self.prepared)} times a step")
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        prepared = self.prepared[len(self.drawn)]
        self.drawn.append(torch.zeros(args[0], dtype=dtype) if prepared is None else prepared)
        self.dtypes.append(dtype)
        return self.drawn[-1]


def _vectors(value: Any) -> Iterator[tuple[int | None, Any]]:
    """An attribute's values with their numbers: those of a list, or the one that it is."""
    if isinstance(value, list):
        yield from enumerate(value)
    else:
        yield None, value


def _called(scheduler, method: str, arguments: dict[str, Any], x0_of, history: Sequence[str], draws: _Prepared):
    """One call on a scheduler's copy: every tensor that it leaves, by place; the draws; and the copy."""
    # a mode costs every call of torch a few microseconds, so only those that are needed
    elsewhere = torch.get_default_device().type != "cpu"
    draws_noise = "generator" in inspect.signature(getattr(scheduler, method)).parameters
    with (
        torch.no_grad(),
        torch.device("cpu") if elsewhere else nullcontext(),
        draws if draws_noise else nullcontext(),
    ):
        x0 = None if x0_of is None else x0_of(scheduler, arguments["sample"], arguments["model_output"])
        # the class's own: a user may have put a wrapper into the scheduler's place for it
        returned = getattr(type(scheduler), method)(scheduler, **arguments)
    output = None if isinstance(returned, (tuple, Tensor)) else type(returned)
    values = (returned,) if isinstance(returned, Tensor) else tuple(returned if output is None else returned.values())
    left: dict[Place, Any] = {("result", "", i): value for i, value in enumerate(values)}
    for name in history:
        left |= {("history", name, i): value for i, value in _vectors(getattr(scheduler, name, None))}
    if x0_of is None and len(values) > 1:
        x0 = values[1]  # diffusers returns it
    left[_X0] = x0
    return left, output


def _with_vectors(scheduler, history: dict[str, Any], inputs: dict[Place, Tensor]):
    """A copy of a scheduler that holds these vectors where it has its history."""
    twin = copy.copy(scheduler)
    vars(twin).update({name: list(x) for name, x in vars(twin).items() if isinstance(x, list)})
    for name, value in history.items():
        if isinstance(value, list):
            setattr(twin, name, [inputs.get(("history", name, i)) for i in range(len(value))])
        elif value is not None:
            setattr(twin, name, inputs["history", name, None])
    return twin


def plan(
    scheduler, method: str, tensors: dict[str, torch.dtype], arguments: dict[str, Any], history: Sequence[str],
    x0_of=None, want_x0: bool = False, sum_of_terms: bool = False,
) -> Plan:  # fmt: skip
    """The linear combinations that a method makes.

    Args:
        scheduler: diffusers' own, on the CPU, in the state before the call; it is left as it is. Its history holds
            tensors of any size, of which the dtype alone counts.
        method: Its name.
        tensors: The tensor arguments' dtypes, by name.
        arguments: The others.
        history: The scheduler's attributes that hold such tensors, or lists of them.
        x0_of: `x0_of(scheduler, sample, model_output)`: the clip that the prediction leads to. None: the method's
            second result, if there is one.
        want_x0: Whether it has to be made if it is not among the results and the history anyway.
        sum_of_terms: Whether the prediction is no tensor but a sum of several, so that it cannot itself be a result.

    Raises:
        NotLinear: The method is not linear here, or not in a way that one launch can do.
    """
    before = {name: getattr(scheduler, name, None) for name in history}
    dtypes: dict[Place, torch.dtype] = {("argument", name, None): dtype for name, dtype in tensors.items()}
    for name, value in before.items():
        dtypes |= {("history", name, i): x.dtype for i, x in _vectors(value) if x is not None}
    places = list(dtypes)
    size = len(places) + _MOST_DRAWS
    basis = torch.eye(size, dtype=torch.float64)
    mixture = torch.tensor(_MIXTURE[:size], dtype=torch.float64)[:, None]
    if size > len(_MIXTURE):
        raise NotLinear(f"it depends on {len(places)} tensors")
    columns = torch.cat([basis, mixture, _LARGE * mixture], 1)[:, None]  # (input, 1, column): samples first

    def call(vector) -> tuple:
        inputs = {place: vector(k) for k, place in enumerate(places)}
        given = {name: inputs["argument", name, None] for name in tensors}
        draws = _Prepared([vector(len(places) + k) for k in range(_MOST_DRAWS)])
        twin = _with_vectors(scheduler, before, inputs)
        left, output = _called(twin, method, {**given, **arguments}, x0_of, history, draws)
        return inputs | {("noise", "", k): x for k, x in enumerate(draws.drawn)}, left, output, draws.dtypes, twin

    exact = call(lambda k: columns[k].clone())
    real = call(lambda k: torch.zeros(1, size + 2, dtype=dtypes[places[k]]) if k < len(places) else None)
    inputs, left, output, noise, twin = real
    rows: list[tuple[float, ...]] = []
    row_dtypes: list[torch.dtype] = []

    def found(place: Place) -> Place | None:
        """A value that the call leaves: an input, or a combination."""
        value = left[place]
        if value is None:
            return None
        same = next((origin for origin, x in inputs.items() if x is value), None)
        if same is not None and not (sum_of_terms and same == PREDICTION):
            return same
        row = _row(exact[1][place], columns[:, 0])
        known = [k for k, other in enumerate(rows) if other == row and row_dtypes[k] == value.dtype]
        if not known:
            rows.append(row)
            row_dtypes.append(value.dtype)
        return "made", "", known[0] if known else len(rows) - 1

    results = tuple(found(place) for place in left if place[0] == "result" and place != _X0)
    state = {}
    for name in history:
        parts = [(i, found(("history", name, i))) for i, _ in _vectors(getattr(twin, name, None))]
        state[name] = parts[0][1] if parts and parts[0][0] is None else [part for _, part in parts]
    count = len(rows)
    x0 = found(_X0)
    if len(rows) > count and not want_x0:
        x0 = None
        del rows[count:], row_dtypes[count:]
    changes = {
        name: value for name, value in vars(twin).items()
        if name not in history and not isinstance(value, list) and value is not vars(scheduler).get(name, NotLinear)
    }  # fmt: skip
    used = [k for k in range(size) if any(row[k] for row in rows)] or [0]
    return Plan(
        inputs=tuple(places[k] if k < len(places) else ("noise", "", k - len(places)) for k in used),
        rows=tuple(tuple(row[k] for k in used) for row in rows), dtypes=tuple(row_dtypes), noise=tuple(noise),
        results=results, output=output, state=state, changes=changes, x0=x0,
    )  # fmt: skip


def _row(result: Tensor, columns: Tensor) -> tuple[float, ...]:
    """The coefficients of a result, which has to be of the inputs' shape and linear in them."""
    size = columns.shape[0]
    if result.shape != (1, columns.shape[1]):
        raise NotLinear("a result of its step has another shape than the sample")
    values = result.double()[0]
    row, mixed = values[:size], values[size:]
    terms = row[:, None] * columns[:, size:]
    near = (mixed - terms.sum(0)).abs() <= _TOLERANCE * terms.abs().sum(0)
    if not bool(near.all() & values.isfinite().all()):
        raise NotLinear("its step is not linear in its tensors")
    return tuple(row.tolist())
