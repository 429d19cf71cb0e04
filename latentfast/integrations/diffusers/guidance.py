"""Classifier-free guidance that waits for the scheduler.

Pipelines that are not modular guide inline, `uncond + scale * (cond - uncond)`: three launches, three roundings, and no
place of theirs to change it. A forward hook on the model (`defer`) hands its prediction to the pipeline as a
`Prediction`, a tensor whose differences, sums and multiples by a number wait as a `Combination`: a list of tensors and
coefficients, which a scheduler of `latentfast.integrations.diffusers.schedulers` takes into its own single launch
(`linear_terms`).

Whatever else touches either of them gets what plain torch would have computed, bit for bit, and plain tensors from
there on: rescaling, callbacks, other schedulers, pickling, printing.
"""

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

import latentfast

__all__ = ["Combination", "Guided", "Prediction", "defer"]

#: Beyond these a step would read more than it saves.
_MOST_TERMS = 3
#: Values of a sample from which guidance waits on a CPU. What waits costs Python some 15 µs a step, which smaller
#: clips, whose sums stay in the caches, don't save: on two cores both took as long with 131,072. Of a sample, not of a
#: batch, so that the batch shows in no bit.
LEAST_ON_CPU = 1 << 17

Terms = list[tuple[Tensor, float]]
_Kind = tuple[torch.Size, torch.dtype, torch.device]

_wrapper: Callable = torch.Tensor._make_wrapper_subclass


class _Waiting(Tensor):
    """A tensor of which some operations wait, and all others see the plain one."""

    def plain(self) -> Tensor:
        """The plain tensor."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, func: Callable, types: Sequence[type], args: Sequence = (), kwargs: Any = None) -> Any:
        rule = _RULES.get(func)
        if rule is not None and not torch.is_grad_enabled() and _fits(rule, args, kwargs):
            waiting = rule(*args, **kwargs) if kwargs else rule(*args)
            if waiting is not NotImplemented:
                return waiting
        return _apply(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        return func(*_plain(args), **_plain(kwargs or {}))  # where torch functions of subclasses are off


class _Memory:
    """What predictions of the same memory, a model's and its chunks, have in common."""

    __slots__ = ("tensor", "version", "waiting")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.version = _version(tensor)
        self.waiting: list[weakref.ref[Combination]] = []  # those that have still to read it

    def check(self) -> None:
        if _version(self.tensor) != self.version:
            raise RuntimeError("a prediction was changed in place, through a view of it, before guidance was computed")


class Prediction(_Waiting):
    """A model's prediction: an ordinary tensor, but for what waits (see the module)."""

    base: Tensor  # the plain tensor of the same memory
    kind: _Kind
    memories: tuple[_Memory, ...]

    @staticmethod
    def of(base: Tensor, memories: tuple[_Memory, ...] = ()) -> "Prediction":
        """`base` as a prediction, without a copy; `memories`: its own if it is a chunk of another."""
        made = base.as_subclass(Prediction)
        made.base, made.kind = base, (base.shape, base.dtype, base.device)
        made.memories = memories or (_Memory(base),)
        return made

    @property
    def terms(self) -> Terms:
        """Itself."""
        return [(self.base, 1.0)]

    def linear_terms(self) -> Terms:
        """The tensors and coefficients that it is the sum of: itself."""
        return self.terms

    def plain(self) -> Tensor:
        return self.base


class Combination(_Waiting):
    """A linear combination of predictions that has not been computed."""

    kind: _Kind
    terms: Terms  # unchecked: whoever reads their values asks for `linear_terms`
    memories: tuple[_Memory, ...]
    _compute: Callable[[], Tensor] | None  # None as soon as there is a value
    _value: Tensor

    @staticmethod
    def of(kind: _Kind, terms: Terms, memories: tuple[_Memory, ...], compute: Callable[[], Tensor]) -> "Combination":
        """The combination of these terms, which `compute` computes as plain torch does."""
        made = _wrapper(Combination, kind[0], dtype=kind[1], device=kind[2])
        made.kind, made.terms, made.memories, made._compute = kind, terms, memories, compute
        reference = weakref.ref(made)
        for memory in memories:
            memory.waiting.append(reference)
        return made

    # As the tensor's own would answer, without the way through `__torch_function__`: a step asks for them.

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.kind[0]

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.kind[1]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.kind[2]

    def linear_terms(self) -> Terms:
        """The tensors and coefficients that it is the sum of; once it has been computed, itself.

        Raises:
            RuntimeError: one of the tensors was changed in place since, through a view.
        """
        if self._compute is None:
            return [(self._value, 1.0)]
        for memory in self.memories:
            memory.check()
        return self.terms

    def plain(self) -> Tensor:
        """What plain torch would have computed, operation by operation; kept."""
        if self._compute is not None:
            self.linear_terms()
            self._value = self._compute()
            self._compute = None
        return self._value


class Guided(_Waiting):
    """A guided prediction that has not been computed: what `latentfast.guide` or `guided_step` is to be called with."""

    cond: Tensor
    uncond: Tensor
    options: dict[str, Any]
    _value: Tensor | None

    @staticmethod
    def of(cond: Tensor, uncond: Tensor, options: dict[str, Any]) -> "Guided | Combination":
        """As a `Combination` where it is one, which any scheduler of ours takes, and else as a `Guided`."""
        if options["mode"] != "cfg" or options["rescale"] > 0:
            made = _wrapper(Guided, cond.shape, dtype=cond.dtype, device=cond.device)
            made.cond, made.uncond, made.options, made._value = cond, uncond, options, None
            return made
        by = options["scale"] + (1.0 if options["original"] else 0.0)
        kind, terms = (cond.shape, cond.dtype, cond.device), [(uncond, 1.0 - by), (cond, by)]
        memories = _Memory(uncond), _Memory(cond)
        return Combination.of(kind, terms, memories, lambda: latentfast.guide(cond, uncond, **options))

    def plain(self) -> Tensor:
        """The guided prediction; kept, as computing it may update a momentum."""
        if self._value is None:
            self._value = latentfast.guide(self.cond, self.uncond, **self.options)
        return self._value


def defer(model: torch.nn.Module) -> RemovableHandle:
    """Makes the predictions of `model`, from now on, wait to be guided. Its parameters and results stay what they are.

    On a CPU the predictions of small clips, of less than `LEAST_ON_CPU` values a sample, stay plain: computing their
    guidance takes less time than keeping it. A model compiled in place (`model.compile()`) goes on as before, with
    plain predictions, and so does one that is differentiated. One wrapped by `torch.compile` is hooked outside of what
    is compiled.

    Args:
        model: A pipeline's transformer or UNet, whose output is a tuple that begins with the prediction, or has it as
            `sample`.

    Returns:
        A handle; its `remove()` undoes this.
    """
    return model.register_forward_hook(_wrap)


def _wrap(model: torch.nn.Module, inputs: Any, output: Any) -> Any:
    if torch.compiler.is_compiling():
        return output
    if isinstance(output, tuple) and output and _may_wait(output[0]):
        return (Prediction.of(output[0]), *output[1:])
    if isinstance(output, dict) and _may_wait(output.get("sample")):
        output["sample"] = Prediction.of(output["sample"])
        output.sample = output["sample"]  # type: ignore[attr-defined]  # a BaseOutput has both
    return output


def _may_wait(x: Any) -> bool:
    if type(x) is not Tensor or not x.is_floating_point() or x.requires_grad or not x.ndim:
        return False
    return x.device.type != "cpu" or x.numel() >= x.shape[0] * LEAST_ON_CPU


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


def _plain(tree: Any) -> Any:
    return tree_map_only(_Waiting, lambda x: x.plain(), tree)


# --- What waits -------------------------------------------------------------------------------------------------------
#
# A rule is given the arguments of a function of torch and answers with what waits, or with NotImplemented. Rules run at
# every step: they look at Python's own attributes, as each look at a tensor's would come by here again.


def _waits(x: Any) -> bool:
    return type(x) is Prediction or (type(x) is Combination and x._compute is not None)


def _combined(x: Any, y: Any, by: float, func: Callable) -> Any:
    """x + by·y."""
    if not (_waits(x) and _waits(y) and x.kind == y.kind):
        return NotImplemented
    terms = list(x.terms)
    for tensor, coefficient in y.terms:
        for i, (known, so_far) in enumerate(terms):
            if known is tensor:
                terms[i] = (known, so_far + by * coefficient)
                break
        else:
            terms.append((tensor, by * coefficient))
    if len(terms) > _MOST_TERMS:
        return NotImplemented
    memories = x.memories
    if y.memories is not memories:
        memories = (*memories, *[memory for memory in y.memories if memory not in memories])
    return Combination.of(x.kind, terms, memories, lambda: func(x.plain(), y.plain()))


def _add(x: Any, y: Any) -> Any:
    return _combined(x, y, 1.0, torch.add)


def _sub(x: Any, y: Any) -> Any:
    return _combined(x, y, -1.0, torch.sub)


def _mul(x: Any, y: Any) -> Any:
    if not _waits(x) or type(y) is bool or not isinstance(y, int | float) or not math.isfinite(y):
        return NotImplemented
    terms = [(tensor, coefficient * y) for tensor, coefficient in x.terms]
    return Combination.of(x.kind, terms, x.memories, lambda: torch.mul(x.plain(), y))


def _neg(x: Any) -> Any:
    if not _waits(x):
        return NotImplemented
    terms = [(tensor, -coefficient) for tensor, coefficient in x.terms]
    return Combination.of(x.kind, terms, x.memories, lambda: torch.neg(x.plain()))


def _to(x: Any, dtype: Any = None) -> Any:
    if not _waits(x) or not isinstance(dtype, torch.dtype):
        return NotImplemented
    shape, own, device = x.kind
    if dtype == own:
        return x
    if dtype != torch.float32 or own not in (torch.bfloat16, torch.float16):  # exact for every such number
        return NotImplemented
    return Combination.of((shape, dtype, device), x.terms, x.memories, lambda: x.plain().to(dtype))


def _float(x: Any) -> Any:
    return _to(x, torch.float32)


def _chunk(x: Any, chunks: Any = None, dim: Any = 0) -> Any:
    if not _waits(x) or len(x.terms) > 1 or x.terms[0][1] != 1.0:
        return NotImplemented
    parts = (Prediction.of(part, x.memories) for part in x.terms[0][0].chunk(chunks, dim))
    return tuple(_to(part, x.kind[1]) for part in parts)  # x may be a prediction cast


_RULES: dict[Callable, Callable] = {
    **dict.fromkeys((Tensor.add, Tensor.__add__, Tensor.__radd__, torch.add), _add),
    **dict.fromkeys((Tensor.sub, Tensor.__sub__, torch.sub), _sub),
    **dict.fromkeys((Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul), _mul),
    **dict.fromkeys((Tensor.neg, Tensor.__neg__, torch.neg), _neg),
    **dict.fromkeys((Tensor.chunk, torch.chunk), _chunk),
    Tensor.to: _to,
    Tensor.float: _float,
}
#: What can be told without computing.
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad")),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "is_floating_point", "is_complex")),
}


def _apply(func: Callable, args: Sequence, kwargs: dict[str, Any]) -> Any:
    """What does not wait."""
    if func in _METADATA:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    if not _writes(func, kwargs):
        return func(*_plain(args), **_plain(kwargs))
    memories: list[_Memory] = []
    tree_map_only((Prediction, Combination), lambda x: memories.extend(x.memories), (args, kwargs))
    for memory in memories:  # what has still to read it does so first
        for reference in memory.waiting:
            combination = reference()
            if combination is not None:
                combination.plain()
        memory.waiting.clear()
    result = func(*_plain(args), **_plain(kwargs))
    for memory in memories:
        memory.version = _version(memory.tensor)
    return result


def _fits(rule: Callable, args: Sequence, kwargs: dict[str, Any] | None) -> bool:
    """Whether a rule has these keywords and as many arguments."""
    code = rule.__code__
    return len(args) <= code.co_argcount and (not kwargs or kwargs.keys() <= set(code.co_varnames[: code.co_argcount]))


def _writes(func: Callable, kwargs: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    return name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__")) or "out" in kwargs
