"""`accelerate`: a pipeline of diffusers with what latentfast has in place of its own parts."""

import copy
import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from diffusers.guiders.guider_utils import BaseGuidance
from torch import nn

from latentfast.integrations.diffusers import guidance as own_guidance
from latentfast.integrations.diffusers import guiders as own_guiders
from latentfast.integrations.diffusers import pipelines, vaes
from latentfast.integrations.diffusers import schedulers as own_schedulers
from latentfast.integrations.diffusers._measure import costs
from latentfast.integrations.diffusers._report import Measured, Report, Row

__all__ = ["Handle", "accelerate"]

_logger = logging.getLogger("latentfast")

#: What predicts, in pipelines that are not modular.
_MODELS = ("transformer", "transformer_2", "unet")

#: Models whose predictions wait, with a mark of the handle that made them.
_waiting: weakref.WeakKeyDictionary[nn.Module, object] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _Change:
    """A part that was replaced: whether it still is, and how to take it back, which does nothing where it is not."""

    row: Row
    holds: Callable[[], bool]
    undo: Callable[[], None]
    before: Any = None
    #: Why its steps are left to diffusers, '' if they are not.
    left_for: Callable[[], str] = str

    def now(self) -> Row:
        """The row as it is by now."""
        reason = self.left_for()
        return replace(self.row, note=f"steps are left to diffusers: {reason}") if reason else self.row


class Handle:
    """What `accelerate` did: to report, and to take back. Leaving it as a context manager takes it back, too."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._changes: list[_Change] = []
        self._left: list[Row] = []
        self._active = True
        self._waits = False  # whether guidance waits for the scheduler
        self._mark = object()  # in place of the handle itself, which would keep the pipeline alive

    def report(
        self,
        measure: bool = False,
        *,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        steps: int = 20,
    ) -> Report:
        """What was replaced and what was left, as it is now; it prints as a table.

        Args:
            measure: Whether to run guidance and the scheduler's steps, before and now, on random tensors in place of
                the model's predictions, and report launches and time of a step. Neither the pipeline nor its scheduler
                is touched by it.
            shape: Of the latents to measure with, as the scheduler gets them; those of the last sampling by default.
            dtype: Of the model's predictions to measure with; the model's own by default.
            steps: Of the sampling to measure.

        Raises:
            ValueError: `measure`, but no scheduler was replaced; or nothing was sampled yet and no `shape` is given.
        """
        rows = tuple(
            change.now() if not self._active or change.holds() else self._exchanged(change.row)
            for change in self._changes
        )
        measured = self._measure(shape, dtype, steps) if measure else None
        return Report(type(self._pipe).__name__, self._active, (*rows, *self._left), measured)

    def disable(self) -> None:
        """Put back the very objects that were there. What was exchanged since stays; a second time does nothing."""
        if not self._active:
            return
        self._active = False
        for change in reversed(self._changes):
            change.undo()

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: object) -> None:
        self.disable()

    def __repr__(self) -> str:
        return str(self.report())

    def _exchanged(self, row: Row) -> Row:
        kind = type(getattr(self._pipe, row.part.split(".")[0], None)).__name__
        return Row(row.part, row.kind, False, f"replaced at first, but exchanged since (now {kind}): accelerate again")

    def _measure(self, shape: Sequence[int] | None, dtype: torch.dtype | None, steps: int) -> Measured:
        found = next((change for change in self._changes if change.row.part == "scheduler"), None)
        if found is None:
            raise ValueError("measure needs a scheduler that was replaced, and none was")
        now = own_schedulers.accelerated(found.before)
        x0 = getattr(self._pipe.scheduler, "x0", None)
        if shape is None:
            if x0 is None:
                raise ValueError("shape must be given, as the scheduler has not seen latents yet")
            shape = x0.shape
        models = [model for name in _MODELS if isinstance(model := getattr(self._pipe, name, None), nn.Module)]
        if dtype is None:
            dtype = next((getattr(model, "dtype", None) for model in models), None) or torch.float32
        device = self._pipe.device if x0 is None else x0.device
        latents = torch.randn(tuple(shape), device=device, dtype=torch.float32 if x0 is None else x0.dtype)
        parts = ((copy.deepcopy(found.before), False), (now, self._waits))
        cost_before, cost_now = costs(parts, latents, dtype, steps)
        name = str(dtype).removeprefix("torch.")
        return Measured(tuple(shape), name, str(device), steps, cost_before, cost_now)

    # --- the parts

    def _replace(self, name: str, after: Any, note: str, left_for: Callable[[], str] = str) -> None:
        """Another object under a component's name."""
        pipe, before = self._pipe, getattr(self._pipe, name)
        setattr(pipe, name, after)

        def holds() -> bool:
            return getattr(pipe, name) is after

        def undo() -> None:
            if holds():
                setattr(pipe, name, before)

        row = Row(name, type(before).__name__, True, note)
        self._changes.append(_Change(row, holds, undo, before, left_for))

    def _leave(self, name: str, part: Any, why: str) -> None:
        self._left.append(Row(name, type(part).__name__, False, why))

    def _scheduler(self, name: str, part: Any) -> None:
        if _is_own(part):
            self._leave(name, part, f"{type(part).__name__} is latentfast's already")
            return
        try:
            fast = own_schedulers.accelerated(part)
        except ValueError:
            self._leave(name, part, "latentfast.integrations.diffusers.schedulers has none that takes its place")
            return
        self._replace(name, fast, "a step is one launch", fast.why_not_fast)

    def _guider(self, name: str, part: Any, defers: bool) -> None:
        ours = own_guiders.replacement_for(part)
        if ours is None:
            self._leave(name, part, own_guiders.why_not(part))
            return
        ours.defers = defers  # type: ignore[attr-defined]
        self._waits |= defers
        self._replace(name, ours, "guidance is one launch" + (", or part of the scheduler's" if defers else ""))

    def _vae(self, name: str, part: Any, cuda_graphs: bool) -> None:
        found = vaes.accelerate_vae(part, cuda_graph=cuda_graphs)
        if isinstance(found, str):
            self._leave(name, part, found)
            return
        pipe, ours = self._pipe, type(part)
        row = Row(name, found.parent.__name__, True, found.note.partition(": ")[2])
        self._changes.append(_Change(row, lambda: getattr(pipe, name) is part and type(part) is ours, found.undo))

    def _guidance(self, name: str, model: nn.Module) -> None:
        part = f"{name}.guidance"
        if model in _waiting:
            self._leave(part, model, "its guidance waits for the scheduler already")
            return
        self._waits = True
        pipe, mark = self._pipe, self._mark
        _waiting[model] = mark
        hook = own_guidance.defer(model)

        def undo() -> None:
            hook.remove()
            if _waiting.get(model) is mark:
                del _waiting[model]

        what = "classifier-free guidance is part of the scheduler's launch (on a CPU, of large clips)"
        row = Row(part, type(model).__name__, True, what)
        self._changes.append(_Change(row, lambda: getattr(pipe, name) is model and model in _waiting, undo))

    def _functions(self) -> None:
        pipe = self._pipe
        for name, function in pipelines.replacements_for(pipe).items():
            if name in vars(pipe):
                self._left.append(Row(name, "method", False, "it was replaced already"))
                continue
            self._function(name, function)
        for name, by in pipelines.private_arithmetic(pipe).items():
            self._left.append(Row(name, "method", False, f"private to the pipeline ({by} does that)"))

    def _function(self, name: str, function: Callable) -> None:
        """A function in the place of a method, on this pipeline alone."""
        pipe = self._pipe
        setattr(pipe, name, function)

        def holds() -> bool:
            return vars(pipe).get(name) is function

        def undo() -> None:
            if holds():
                delattr(pipe, name)

        self._changes.append(_Change(Row(name, "method", True, "one call of latentfast"), holds, undo))


def _is_own(scheduler: Any) -> bool:
    return type(scheduler) in own_schedulers.ACCELERATED.values()


def accelerate(
    pipe: Any,
    *,
    schedulers: bool = True,
    vae: bool = True,
    guiders: bool = True,
    guidance: bool = True,
    functions: bool = True,
    cuda_graphs: bool = False,
) -> Handle:
    """Puts latentfast's parts in the place of a pipeline's own: the same pictures, with fewer launches.

    Only public extension points of diffusers are used, and the pipeline goes on as before: it can be called, compiled,
    offloaded and saved (what it saves is what plain diffusers loads). Nothing is measured, copied or compiled here.

    Args:
        pipe: A pipeline of diffusers, modular or not.
        schedulers: Its scheduler: each step one launch, no waiting for the device
            (`latentfast.integrations.diffusers.schedulers`).
        vae: Its autoencoder: the seams of tiles in one launch, groups of frames in one buffer (`…vaes`).
        guiders: The guiders of a modular pipeline: one launch each (`…guiders`).
        guidance: Classifier-free guidance that a pipeline writes out, or a guider makes, becomes part of the
            scheduler's launch: predictions reach the pipeline as tensors that wait to be summed (`…guidance`), by a
            forward hook on the model. Everything but the step sees what plain torch would have computed; a function
            of your own that is compiled with `fullgraph=True` does not take them, though. Only beside a scheduler of
            latentfast's.
        functions: Public methods of the pipeline on latents, such as LTX's `adain_filter_latent` (`…pipelines`).
        cuda_graphs: Whether an autoencoder that decodes by groups of frames replays them as CUDA graphs, which keep
            their memory (`…vaes.accelerate_vae`).

    Returns:
        A handle: `report()` tells what was replaced and what was left, `disable()` takes it back, and so does leaving
        it as a context manager. If there was nothing to replace, a warning in the log "latentfast" says so. After
        exchanging the pipeline's scheduler, call `accelerate` again.

    Raises:
        TypeError: `pipe` is no pipeline of diffusers.

    Example:
        >>> import diffusers
        >>> from latentfast.integrations.diffusers import accelerate
        >>> pipe = diffusers.DDIMPipeline(
        ...     unet=diffusers.UNet2DModel(sample_size=8, block_out_channels=(32, 64), layers_per_block=1,
        ...         down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2),
        ...     scheduler=diffusers.DDIMScheduler(clip_sample=False))
        >>> with accelerate(pipe) as handle:
        ...     handle.report().replaced[0]
        Row(part='scheduler', kind='DDIMScheduler', replaced=True, note='a step is one launch')
    """
    if not isinstance(pipe, diffusers.DiffusionPipeline | diffusers.ModularPipeline):
        raise TypeError(f"pipe must be a pipeline of diffusers, got {type(pipe).__name__}")
    handle = Handle(pipe)
    modular = isinstance(pipe, diffusers.ModularPipeline)
    components: dict[str, Any] = pipe.components  # type: ignore[union-attr]
    parts = {name: part for name, part in components.items() if part is not None}
    if schedulers:
        for name, part in parts.items():
            if isinstance(part, diffusers.SchedulerMixin):
                handle._scheduler(name, part)
    fast = any(_is_own(getattr(pipe, name)) for name in parts)
    if guiders:
        for name, part in parts.items():
            if isinstance(part, BaseGuidance):
                handle._guider(name, part, defers=guidance and fast)
    if guidance and fast and not modular:
        for name in _MODELS:
            if isinstance(parts.get(name), nn.Module):
                handle._guidance(name, parts[name])
    if vae:
        for name, part in parts.items():
            if isinstance(part, nn.Module) and name.split("_")[0] == "vae":
                handle._vae(name, part, cuda_graphs)
    if functions:
        handle._functions()
    if not handle._changes:
        _logger.warning("%s", handle.report())
    return handle
