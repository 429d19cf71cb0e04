"""A plan: an instruction list with its tensors bound, ready to be walked by one kernel."""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from latentfast.backends import implementation
from latentfast.ops import _checks
from latentfast.ops._vectors import on_device
from latentfast.ops.preview import _factors, _size
from latentfast.ops.stats import _layout
from latentfast.plan import _program
from latentfast.plan._program import SOURCE, Program
from latentfast.plan.instructions import Instruction, ToRGB, _Affine

if TYPE_CHECKING:
    from latentfast.cache import LatentCache
    from latentfast.recipe import Recipe

OUTPUTS = ("latents", "rgb")
_Result = Tensor | tuple[Tensor, ...]
_Key = tuple[str, str]


def _checked_source(source: object) -> Tensor:
    z = _checks.latent(SOURCE, source)
    if z.ndim not in (4, 5):
        raise ValueError(f"source must have shape (B, C, T, H, W) or (B, C, H, W), got {tuple(z.shape)}")
    if z.requires_grad:
        raise ValueError("source requires grad, but a plan is not differentiable; pass source.detach()")
    return z


def _lasting() -> AbstractContextManager:
    """Tensors made inside may be written into at any time, also where they are made in inference mode."""
    return torch.inference_mode(False)


class Plan:
    """An edit stack compiled to an instruction list; made by `compile`.

    What depends on the tensors alone (the angles of slerps, the statistics of channels) is computed when they are
    bound. A slider changes a few numbers on the device. `run` reads every tensor once and writes the result: one
    launch, however long the stack. See `compile` for what costs more.

    Not thread-safe, and ordered by the current stream: call `set`, `bind` and `run` on one.
    """

    def __init__(
        self,
        stack: Sequence[Instruction | ToRGB],
        source: Tensor,
        tensors: Mapping[str, Tensor] | None = None,
        outputs: Sequence[str] | None = None,
    ) -> None:
        self._given: dict[str, Tensor] = {SOURCE: _checked_source(source)}
        self._shape = tuple(source.shape)
        self._wanted_outputs = None if outputs is None else tuple(outputs)
        #: Tensors as the kernels take them, by name and role, and which of them are copies.
        self._ready: dict[_Key, Tensor] = {}
        self._copies: set[_Key] = set()
        #: What was taken of the tensors: moments of these, and the mean and deviation of references.
        self._moments_of_keys: tuple[_Key, ...] | None = None
        self._styles: dict[str, tuple[Tensor, Tensor]] = {}
        # of the backend that is in force now: what one makes of the tensors is nothing to another
        self._moments_of, self._coefficients_of, self._run, self._stats_of = (
            implementation(name, source) for name in ("plan_moments", "plan_coefficients", "plan_run", "channel_stats")
        )
        for name, x in (tensors or {}).items():
            self._given[name] = self._checked(name, x)
        self.change(stack)

    @classmethod
    def of(
        cls,
        recipe: "Recipe",
        source: Tensor,
        *,
        tensors: Mapping[str, Tensor] | None = None,
        cache: "LatentCache | None" = None,
        context: Mapping[str, str | Tensor] | None = None,
        rgb: ToRGB | None = None,
        outputs: Sequence[str] | None = None,
    ) -> "Plan":
        """A plan of a recipe: `run` gives what `recipe.apply(source, …)` gives, rounded once.

        Each edit becomes one instruction, `Directions` one for each of them, with the names that the recipe has for its
        tensors; an `AttentionMask` is made once.

        Args:
            recipe: Of edits that a plan has instructions for: all but `FrequencyMix`, `TemporalSmooth` and those of
                your own, interpolations of whole samples, channels along dimension 1.
            source: As for `compile`.
            tensors: As for `Recipe.apply`, as the next two.
            cache: Where the tensors are that are not given.
            context: What the recipe's names mean here.
            rgb: The projection behind the edits, if pixels are wanted.
            outputs: As for `compile`.

        Raises:
            MissingTensorError: (a ValueError) a step names a tensor that is nowhere.
            ValueError: a step has no instruction, or does not fit the source; the error names it, counted from 1.

        Example:
            >>> import torch
            >>> from latentfast.plan import Plan
            >>> from latentfast.recipe import LerpTowards, Recipe, Tensors, ToneMap
            >>> tensors = Tensors()
            >>> recipe = Recipe([LerpTowards(tensors.add(torch.ones(1, 4, 8, 8)), 0.5), ToneMap(0.0)])
            >>> p = Plan.of(recipe, torch.zeros(1, 4, 8, 8), tensors=tensors)
            >>> p.set(0, 0.25)
            >>> p.run().unique()
            tensor([0.2500])
        """
        from latentfast.plan._recipe import translated

        stack, named = translated(recipe, source, tensors, cache, context)
        return cls([*stack, *(() if rgb is None else (rgb,))], source, named, outputs)

    @property
    def stack(self) -> tuple[Instruction | ToRGB, ...]:
        """The instructions with the sliders as they are."""
        return (*self._edits, *(() if self._rgb is None else (self._rgb,)))

    # --- changes ---

    def change(self, stack: Sequence[Instruction | ToRGB], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Another stack: edits added, removed, in another order. Nothing is compiled; takes microseconds on the host.

        Args:
            stack: As for `compile`.
            tensors: New tensors by name, or others than before; the rest stays bound.

        Raises:
            TypeError: something in `stack` is no instruction, or a tensor's dtype does not fit.
            ValueError: a name has no tensor, or shapes do not fit. The plan then stays as it was.
        """
        edits, rgb = _program.split(stack)
        program = _program.build(edits)
        new = {name: self._checked(name, x) for name, x in (tensors or {}).items()}
        given, outputs = self._given | new, self._checked_outputs(rgb)
        factors, rgb_shape = self._checked_rgb(rgb)
        for i, instruction in enumerate(edits):
            if isinstance(instruction, _Affine) and len(instruction.mean) != self._shape[1]:
                raise ValueError(
                    f"stack[{i}].mean must hold {self._shape[1]} numbers, one for each channel of the source, got "
                    f"{len(instruction.mean)}"
                )
        ready = {key: x for key, x in self._ready.items() if key[0] not in new}
        with _lasting():
            made = {key: self._prepared(*key, given) for key in program.tensors if key not in ready}
            self._given, self._edits, self._rgb, self._program = given, edits, rgb, program
            self._outputs, self._factors, self._rgb_shape = outputs, factors, rgb_shape
            self._code = list(program.code)
            self._forget(new)
            self._ready = ready | made
            copied = {key for key, x in made.items() if x.data_ptr() != given[key[0]].data_ptr()}
            self._copies = (self._copies & set(ready)) | copied
            self._allocate(program)
            self._take_all()
            self._give(list(program.sliders))

    def set(self, index: int, value: float) -> None:
        """Moves a slider: t, strength, factor or compression of an instruction.

        One launch that carries the numbers as its arguments: nothing is copied from the host, so nothing has to be kept
        for a copy in flight, and a CUDA graph of `run` that is replayed afterwards uses the new value.

        Args:
            index: Of the instruction in the stack.
            value: As the instruction takes it.

        Raises:
            ValueError: the instruction has no slider, or does not take the value.
            IndexError: there is no such instruction.
        """
        self.set_all({index: value})

    def set_all(self, values: Mapping[int, float]) -> None:
        """Moves several sliders in one launch.

        Args:
            values: A value for each index, as for `set`.
        """
        moved = {}
        for index, value in values.items():
            if not isinstance(index, int) or not 0 <= index < len(self._edits):
                raise IndexError(f"index must name one of {len(self._edits)} edits, got {index!r}")
            try:
                moved[index] = self._edits[index].moved(value)
            except ValueError as error:
                raise ValueError(f"stack[{index}]: {error}") from None
        for index, instruction in moved.items():
            self._edits[index] = instruction
        self._give([x.number for x in self._edits if x.number is not None])

    def bind(self, name: str, tensor: Tensor) -> None:
        """Another tensor under a name, "source" for what is edited; also after a tensor was changed in place.

        Computes what depends on it. A CUDA graph of `run` keeps reading the memory that it was captured with: write new
        values there, and bind the same tensor again.

        Args:
            name: As in the stack.
            tensor: Of the shape that its role there wants; the source's shape, dtype and device stay.

        Raises:
            TypeError: its dtype does not fit.
            ValueError: its shape or device does not fit.
        """
        given = self._given | {name: self._checked(name, tensor)}
        with _lasting():
            made = {key: self._prepared(*key, given) for key in self._ready if key[0] == name}
            self._given = given
            self._forget((name,))
            for key, x in made.items():
                before = self._ready[key]
                if x.data_ptr() == tensor.data_ptr():
                    self._copies.discard(key)
                elif key in self._copies and before.shape == x.shape:
                    made[key] = before.copy_(x)  # a graph may know where it lies
                else:
                    self._copies.add(key)
            self._ready |= made
            self._take_all()
            self._give([])

    # --- the walk ---

    def run(self, out: _Result | None = None) -> _Result:
        """The result of the stack on what is bound.

        Args:
            out: Contiguous tensors to write into, one or a tuple as the result is; then no tensor is made.

        Returns:
            Latents like the source, or bytes `(B, T, H', W', 3)` (`(B, H', W', 3)` for images), or a tuple of both in
            the order of `outputs`.

        Raises:
            TypeError: `out` is no tensor of the result's dtype.
            ValueError: `out` has another shape or device, or is not contiguous, or shares memory with an input.
        """
        results = self._results(out)
        for segment, moments in self._later:
            self._moments_of(self._inputs, self._code, segment.start, list(segment.values), self._coefficients, moments)
            self._coefficients_from(segment, moments, [])
        by_name = dict(zip(self._outputs, results, strict=True))
        latents, rgb = (by_name.get(name) for name in OUTPUTS)
        five = self._shape_5d
        self._run(
            self._inputs, self._code, self._sliders, self._statistics, self._coefficients, *self._factors,
            None if latents is None else latents.view(five),
            None if rgb is None else rgb.view(five[0], five[2], *rgb.shape[-3:]),
        )  # fmt: skip
        return results[0] if len(results) == 1 else tuple(results)

    def _results(self, out: _Result | None) -> list[Tensor]:
        source = self._given[SOURCE]
        shapes = {"latents": (self._shape, source.dtype), "rgb": (self._rgb_shape, torch.uint8)}
        wanted = [shapes[name] for name in self._outputs]
        if out is None:
            return [torch.empty(shape, dtype=dtype, device=source.device) for shape, dtype in wanted]
        outs = [out] if isinstance(out, Tensor) else list(out)
        if len(outs) != len(wanted):
            raise ValueError(f"out must hold {len(wanted)} tensors, {' and '.join(self._outputs)}, got {len(outs)}")
        for x, (shape, dtype) in zip(outs, wanted, strict=True):
            if not isinstance(x, Tensor) or x.dtype != dtype:
                got = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"out must be a tensor of {dtype}, got {got}")
            _checks.same_device("out", x, SOURCE, source)
            _checks.output(x, shape, "out", x, tuple(self._inputs))
        return outs

    # --- state on the device ---

    @property
    def _shape_5d(self) -> tuple[int, ...]:
        s = self._shape
        return s if len(s) == 5 else (*s[:2], 1, *s[2:])

    def _allocate(self, program: Program) -> None:
        """Keeps what fits, so that a CUDA graph finds it where it was."""
        source = self._given[SOURCE]
        b, c = self._shape[:2]
        wide, double = _checks.wide(source.dtype), torch.float64
        rows = sum(r >= 0 for r in program.row_of)
        self._coefficients = self._room("_coefficients", (len(self._edits), b, c, 4), wide)
        self._statistics = self._room("_statistics", (rows, b, c, 2), double)
        self._sliders = self._room("_sliders", (len(program.sliders),), double)
        self._first = program.segments[0]
        self._moments = self._room("_moments", (b, c, self._first.moments), double)
        self._later = [
            (segment, torch.empty((b, c, segment.moments), dtype=double, device=source.device))
            for segment in program.segments[1:]
        ]

    def _room(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        before = getattr(self, name, None)
        if before is not None and before.shape == shape:
            return before
        return torch.empty(shape, dtype=dtype, device=self._given[SOURCE].device)

    def _forget(self, names: Iterable[str]) -> None:
        """What was taken of these tensors holds no more."""
        for name in names:
            self._styles.pop(name, None)
            if self._moments_of_keys is not None and name in {key[0] for key in self._moments_of_keys}:
                self._moments_of_keys = None

    def _take_all(self) -> None:
        """What the reductions need of the tensors, as far as it is not known."""
        self._inputs = [self._ready[key] for key in self._program.tensors]
        for i in range(len(self._edits)):
            self._fill_statistics(i)
        keys = tuple(self._program.tensors[value] for value in self._first.values)
        if keys != self._moments_of_keys:
            if keys:
                values = list(self._first.values)
                self._moments_of(self._inputs, self._code, 0, values, self._coefficients, self._moments)
            self._moments_of_keys = keys

    def _fill_statistics(self, index: int) -> None:
        """The row of an instruction that has one: the mean and the deviation of each channel of each sample."""
        row, instruction = self._program.row_of[index], self._edits[index]
        if row < 0 or not self._given[SOURCE].numel():
            return
        to = self._statistics[row]
        if isinstance(instruction, _Affine):
            values = [*instruction.mean, *(x / instruction.scale for x in instruction.std)]
            c = len(instruction.mean)
            to.copy_(on_device(values, self._given[SOURCE], torch.float64).view(2, c).t())
            return
        name = instruction.ref  # type: ignore[attr-defined]
        if name not in self._styles:
            ref = self._ready[name, "ref"]
            layout = _layout(ref, 1)[1]
            mean, std = (torch.empty((layout[0], layout[2]), dtype=torch.float64, device=ref.device) for _ in range(2))
            self._stats_of(ref, *layout, mean, std)
            self._styles[name] = mean, std
        for column, known in zip(to.unbind(-1), self._styles[name], strict=True):
            column.copy_(known)

    def _give(self, sliders: list[float]) -> None:
        """The sliders to the device, and the coefficients that follow from them without the value's sums."""
        self._coefficients_from(self._first, self._moments, sliders)

    def _coefficients_from(self, segment: _program.Segment, moments: Tensor, sliders: list[float]) -> None:
        self._coefficients_of(
            self._code, segment.start, segment.stop, list(segment.values), math.prod(self._shape[2:]), sliders,
            self._statistics, moments, self._sliders, self._coefficients,
        )  # fmt: skip

    # --- checks ---

    def _checked(self, name: str, x: object) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.requires_grad:
            raise ValueError(f"{name} requires grad, but a plan is not differentiable; pass {name}.detach()")
        if name == SOURCE:
            _checks.like(SOURCE, x, "the plan's source", self._given[SOURCE])
        return x

    def _prepared(self, name: str, role: str, given: Mapping[str, Tensor]) -> Tensor:
        """A tensor as the kernels take it: contiguous, five-dimensional, its H and W both full or both 1."""
        if name not in given:
            raise ValueError(f"tensors must hold '{name}', which the stack names, got {sorted(set(given) - {SOURCE})}")
        x, source = given[name], given[SOURCE]
        if role == "mask":
            mask = _checks.mask_of(name, x, SOURCE, source, source.shape)
            return self._spread(mask.to(_checks.wide(source.dtype)))
        _checks.latent(name, x)
        if role == "latents":
            _checks.like(name, x, SOURCE, source)
            return x.contiguous().view(self._shape_5d)
        _checks.same_kind(name, x, SOURCE, source)
        if role == "direction":
            _checks.broadcasts(name, x.shape, source.shape)
            return self._spread(x)
        if x.ndim != source.ndim or x.shape[1] != source.shape[1] or x.shape[0] not in (1, source.shape[0]):
            wanted = f"({source.shape[0]} or 1, {source.shape[1]}{', …' * (source.ndim - 2)})"
            raise ValueError(f"{name} must have shape {wanted}, got {tuple(x.shape)}")
        if source.numel() and not x.numel():
            raise ValueError(f"{name} must have elements to take the statistics of, got shape {tuple(x.shape)}")
        return x.contiguous()

    def _spread(self, x: Tensor) -> Tensor:
        x = x.reshape((1,) * (len(self._shape) - x.ndim) + tuple(x.shape))
        x = x.unsqueeze(2) if len(self._shape) == 4 else x
        plane = self._shape[-2:]
        return x.contiguous() if x.shape[-2:] in ((1, 1), plane) else x.expand(*x.shape[:3], *plane).contiguous()

    def _checked_outputs(self, rgb: ToRGB | None) -> tuple[str, ...]:
        wanted = self._wanted_outputs
        if wanted is None:
            return ("latents",) if rgb is None else ("rgb",)
        if not wanted or len(set(wanted)) != len(wanted) or not set(wanted) <= set(OUTPUTS):
            raise ValueError(f"outputs must hold 'latents', 'rgb' or both, got {wanted}")
        if "rgb" in wanted and rgb is None:
            raise ValueError("stack must end with ToRGB for the output 'rgb'")
        return wanted

    def _checked_rgb(self, rgb: ToRGB | None) -> tuple[tuple[Tensor | None, Tensor | None], tuple[int, ...]]:
        if rgb is None:
            return (None, None), ()
        source, (height, width) = self._given[SOURCE], self._shape[-2:]
        factors = (
            _factors("weight", rgb.weight, (self._shape[1], 3), source),
            _factors("bias", rgb.bias, (3,), source),
        )
        rows, columns = (height, width) if rgb.size is None else _size(rgb.size)
        if (height == 0 or width == 0) and (rows, columns) != (height, width):
            raise ValueError(
                f"source must have rows and columns to be enlarged to {(rows, columns)}, got shape {self._shape}"
            )
        return factors, (self._shape[0], *self._shape[2:-2], rows, columns, 3)
