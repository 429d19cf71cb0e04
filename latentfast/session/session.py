"""`Session`: samplings of one pipeline, none of which is made twice, and that can be gone on from anywhere."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentfast.cache import Key, LatentCache
from latentfast.integrations.diffusers.sampling import setting
from latentfast.integrations.diffusers.steps import State, run_steps
from latentfast.session import files, states
from latentfast.session.arguments import from_data, to_data
from latentfast.session.keep import Keep, Shelf, check_keep
from latentfast.session.replay import Replay, replay
from latentfast.session.requests import follow, request, seeds_of
from latentfast.session.texts import Texts
from latentfast.session.trajectory import Request, Trajectory

if TYPE_CHECKING:
    from latentfast.recipe import Recipe

__all__ = ["OnStep", "Session"]

#: Told after each step: how many were made, of how many.
OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class _Run:
    """A sampling that is asked for: what, and from where."""

    request: Request
    begin: int = 0
    parent: Trajectory | None = None
    edited: bool = False
    #: The state to begin from, made when it is needed; None for the first step.
    start: Callable[[], State | None] = field(default=lambda: None)


class Session:
    """Samplings of one pipeline of diffusers.

    Everything runs through the pipeline's own `__call__`: a trajectory has the bits of that call, and what follows from
    a state that was kept has the bits of the sampling that was not interrupted. The pipeline stays the caller's: it may
    be accelerated, called and changed in between.

    Args:
        pipe: A pipeline that takes `callback_on_step_end` and whose call loops over its scheduler's timesteps.
        cache: Where states, results and the texts' embeddings are kept, by what they were made from. None: states stay
            on the device as long as their trajectory, and nothing is looked up.
        keep: Which states are kept: "all", every n-th for a number n, or those for which a `Budget` has room. The last
            one always is. With a cache this says what is put there, and its own budgets what stays.

    Raises:
        ValueError: the policy is none of those, or the pipeline can't be steered.

    Example:
        >>> from latentfast import tiny
        >>> from latentfast.session import Session
        >>> session = Session(tiny.load_pipeline())
        >>> small = {"num_inference_steps": 4, "num_frames": 5, "height": 32, "width": 32, "guidance_scale": 2.0}
        >>> clip = session.generate("a big red circle moving left", seed=3, **small)
        >>> clip.steps, clip.made, clip.kept
        (4, 4, (0, 1, 2, 3, 4))
        >>> other = session.resume(clip, 2, prompt="a big blue circle moving left")
        >>> other.made, session.decode(other).shape
        (2, torch.Size([1, 5, 32, 32, 3]))
    """

    def __init__(self, pipe: Any, cache: LatentCache | None = None, *, keep: Keep = "all") -> None:
        check_keep(keep)
        if "callback_on_step_end" not in inspect.signature(type(pipe).__call__).parameters:
            raise ValueError(f"pipe must take callback_on_step_end, {type(pipe).__name__} does not")
        self.pipe, self.cache, self.keep = pipe, cache, keep
        self._texts = Texts(pipe, cache)

    def generate(
        self, prompt: str | list[str] | None = None, *, seed: int = 0, on_step: OnStep | None = None, **call: Any
    ) -> Trajectory:
        """Sample from the first step; or find that it was done, or go on where it was interrupted.

        Args:
            prompt: What the clip shows; None where `call` has its embedding, or an image alone.
            seed: Of a generator on the CPU, so that it means the same on every device. A `generator` in `call` takes
                its place, in the state that it has; it does not advance.
            on_step: Is told after each step that is run.
            **call: Further arguments of the pipeline's call. A callback among them may do anything, so nothing is
                looked up then.

        Raises:
            TypeError: the pipeline's call has no such argument, or it is the session's own.
            ValueError: what the pipeline refuses.
        """
        call = call if prompt is None else {**call, "prompt": prompt}
        seeds = seeds_of(call, seed)
        return self._sample(_Run(request(self.pipe, call, seeds)), on_step)

    def resume(
        self,
        trajectory: Trajectory,
        from_step: int,
        *,
        recipe: Recipe | None = None,
        tensors: Mapping[str, Tensor] | None = None,
        latents: Tensor | None = None,
        prompt: str | list[str] | None = None,
        guidance: float | None = None,
        on_step: OnStep | None = None,
        **call: Any,
    ) -> Trajectory:
        """Sample again from a step on, with something changed; the steps before it are not run.

        Where the state after `from_step` steps was not kept, the steps from the last one before it are run for it.
        Changed latents make a multistep solver begin anew: what it remembers is of other latents.

        Args:
            trajectory: Of this pipeline.
            from_step: How many steps stay as they were, from 0. What was edited after them is not edited again.
            recipe: Edits the latents after them.
            tensors: Those that the recipe names.
            latents: In place of those after them, in the loop's layout; not beside `recipe`.
            prompt: That of the remaining steps.
            guidance: Their `guidance_scale`.
            on_step: Is told after each step that is run.
            **call: Other arguments of the pipeline's call to change.

        Returns:
            A new trajectory, whose states before `from_step` are the other's.

        Raises:
            TypeError: the pipeline's call has no such argument, or it is the session's own.
            ValueError: there is no such step, or both a recipe and latents are given; or what the pipeline refuses.
        """
        owner = trajectory.owner(from_step)
        if recipe and latents is not None:
            raise ValueError("latents must not be given beside a recipe, which edits those of the trajectory")
        if prompt is not None:
            given = dict.fromkeys(name for name in trajectory.request.call if name.startswith(("prompt_", "pooled_p")))
            call = {**given, **call, "prompt": prompt}
        if guidance is not None:
            call = {**call, "guidance_scale": guidance}
        call = {**trajectory.request.call, **call}
        return self._follow(owner, from_step, call, recipe, tensors, latents, on_step)

    def from_video(
        self,
        path: str | PathLike[str],
        prompt: str | list[str] | None = None,
        *,
        sigma: float,
        seed: int = 0,
        on_step: OnStep | None = None,
        **call: Any,
    ) -> Trajectory:
        """Sample from a clip of one's own: encoded by the pipeline's VAE and noised.

        Args:
            path: A video that PyAV reads. Its first frames are scaled and cropped to the size that the call has.
            prompt: What it is to show.
            sigma: How much noise, in (0, 1]: 1 leaves nothing of the clip. The first step whose noise level is not
                above it, measured against that of the first step of all, is begun at; the clip is noised to its level.
            seed: Of the noise, see `generate`.
            on_step: Is told after each step that is run.
            **call: Further arguments of the pipeline's call.

        Returns:
            A trajectory whose steps before its `begin` were not made.

        Raises:
            TypeError: the pipeline's call has no such argument, or it is the session's own.
            ValueError: `sigma` is out of range, the file is no video or too short, or it is not known how the
                pipeline's latents are made of pixels.
        """
        from latentfast.session.video import encode, noised, read_frames

        if not 0 < sigma <= 1:
            raise ValueError(f"sigma must be in (0, 1], got {sigma}")
        call = call if prompt is None else {**call, "prompt": prompt}
        seeds = seeds_of(call, seed)
        whole = request(self.pipe, call, seeds)
        size = [setting(self.pipe, call, name) for name in ("num_frames", "height", "width")]
        frames = read_frames(path, *size)
        blank, first = self._blank(whole)
        step, mixed = noised(self.pipe, encode(self.pipe, frames, first.latents), first.latents, sigma)
        inputs: dict[str, Tensor] = {}
        edit = {"latents": to_data(mixed, inputs, "latents"), "skipped": True}
        changed = follow(self.pipe, blank, step, call, edit, inputs)
        return self._sample(_Run(changed, step, blank, True, lambda: first.moved(step, mixed)), on_step)

    def _blank(self, asked: Request) -> tuple[Trajectory, State]:
        """A sampling of which no step is made, and its state before the first."""
        found: list[State] = []
        latents, _ = self._call(asked, None, 0, lambda step, steps: step == 0, found.append)
        return Trajectory(asked, found[0].steps, latents, (0,), _find={0: found[0]}.get), found[0]

    def decode(self, trajectory: Trajectory, step: int | None = None) -> Tensor:
        """Frames of a trajectory, by the end of the pipeline's own call.

        Args:
            trajectory: Of this pipeline.
            step: Not of the end, but of the clip that the prediction in this step led to (`Trajectory.x0`).

        Returns:
            uint8 `(B, T, H, W, 3)` on the CPU; a picture is a clip of one frame.

        Raises:
            ValueError: what the step led to is not known.
        """
        asked, cache = trajectory.request, None if trajectory.request.data is None else self.cache
        key = Key.of({"kind": "clip", "request": asked.digest, "step": step})
        if cache is not None and (found := cache.get(key)) is not None:
            return found["frames"]
        begin = time.perf_counter()
        state = self._state(trajectory, trajectory.steps)
        if step is not None:
            x0 = trajectory.x0(step)
            if x0 is None:
                raise ValueError(f"step: what step {step} led to was not kept, or this scheduler does not tell it")
            state = replace(state, latents=x0)
        made, _ = self._call(asked, state, output_type="pt")
        clips = made if made.ndim == 5 else made[:, None]
        frames = (clips.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous().cpu()
        if cache is not None:
            cache.put(key, {"frames": frames}, seconds=time.perf_counter() - begin)
        return frames

    def save(self, trajectory: Trajectory, folder: str | PathLike[str]) -> None:
        """Write a trajectory: its states and those of its parents, and `run.json`, which tells how it was made.

        Args:
            trajectory: Of this pipeline.
            folder: Appears whole or not at all; one that is there is replaced.

        Raises:
            ValueError: its call has something that can't be written, such as a callback.
            OSError: the folder can't be written.
        """
        files.save(trajectory, folder, self.pipe)

    def load(self, folder: str | PathLike[str]) -> Trajectory:
        """Read what `save` wrote. Nothing is unpickled, and every tensor is checked against its digest.

        Raises:
            ValueError: it is no trajectory, one of another class of pipelines, or damaged.
        """
        return files.load(folder, self.pipe)

    def replay(self, path: str | PathLike[str], *, on_step: OnStep | None = None) -> Replay:
        """Make a saved trajectory again, from its first step, and compare.

        Args:
            path: A folder that `save` wrote, or the `run.json` in it.
            on_step: Is told after each step that is run.

        Raises:
            ValueError: there is no record, or its tensors are missing.
        """
        return replay(Session(self.pipe, keep=self.keep), path, on_step)

    # --- samplings

    def _follow(
        self,
        parent: Trajectory,
        step: int,
        call: Mapping[str, Any],
        recipe: Recipe | None,
        tensors: Mapping[str, Tensor] | None,
        latents: Tensor | None,
        on_step: OnStep | None,
    ) -> Trajectory:
        """A trajectory that leaves another after a step, with the arguments of its whole call; see `resume`."""
        inputs: dict[str, Tensor] = {}
        edit: dict[str, Any] = {}
        if recipe:
            edit["recipe"] = recipe.to_data()
            inputs |= {name: x for name, x in (tensors or {}).items() if name in recipe.references}
        elif latents is not None:
            edit["latents"] = to_data(latents, inputs, "latents")

        def start() -> State:
            state = self._state(parent, step)
            if recipe:
                # by the name of what they were made from, the latents need not be read to be looked up
                named = None if parent.request.digest is None else f"{parent.request.digest}:{step}"
                edited = recipe.apply(state.latents, cache=self.cache, tensors=tensors, source=named)
                return state.with_latents(edited)
            return state if latents is None else state.with_latents(latents.to(state.latents))

        changed = follow(self.pipe, parent, step, call, edit, inputs)
        return self._sample(_Run(changed, step, parent, bool(edit), start), on_step)

    def _again(self, asked: Request, parent: Trajectory | None, skips: bool, on_step: OnStep | None) -> Trajectory:
        """A recorded request; `skips`: none of its steps were made, as what follows begins with a clip."""
        origin = (asked.data or {}).get("from")
        if parent is None or origin is None:
            generators = asked.seeds.generators()
            whole = request(self.pipe, asked.call, asked.seeds)
            return (
                self._blank(whole)[0] if skips else self.generate(**asked.call, generator=generators, on_step=on_step)
            )
        step, inputs = origin["step"], dict(asked.inputs)
        latents = from_data(origin["latents"], inputs) if "latents" in origin else None
        if origin.get("skipped") and latents is not None:
            edit = {name: value for name, value in origin.items() if name not in ("request", "step")}
            first = self._state(parent, 0)
            changed = follow(self.pipe, parent, step, asked.call, edit, inputs)
            return self._sample(_Run(changed, step, parent, True, lambda: first.moved(step, latents)), on_step)
        recipe = None
        if "recipe" in origin:
            from latentfast.recipe import Recipe

            recipe = Recipe.from_data(origin["recipe"])
        return self._follow(parent, step, asked.call, recipe, inputs, latents, on_step)

    def _sample(self, run: _Run, on_step: OnStep | None) -> Trajectory:
        """The trajectory that is asked for: found, gone on with, or made."""
        asked, cache = run.request, None if run.request.data is None else self.cache
        key = Key.of({"kind": "trajectory", "request": asked.digest})
        shelf = Shelf(asked, self.cache, self.keep)
        if cache is not None and (found := cache.get(key, device=asked.device)) is not None:
            known = states.layout_of(found)
            return self._trajectory(run, shelf, known["steps"], found["t0"], known["kept"], 0)
        start, kept = self._newest(run, shelf)
        if start is None:
            start = run.start()
            if start is not None and run.edited:
                shelf.add(start)
                kept.append(start.step)
        begin = since = time.perf_counter()

        def keep(state: State) -> None:
            nonlocal since
            now = time.perf_counter()
            shelf.add(state, now - since)
            kept.append(state.step)
            since = now

        try:
            latents, steps = self._call(asked, start, None, shelf.wants, keep, on_step)
        except BaseException:
            if cache is not None:
                cache.flush()  # what is finished is what the same request goes on from
            raise
        kept = [step for step in kept if shelf.has(step)]
        if cache is not None:
            pool = states.Pool(latents.device)
            pool.write(latents)
            cache.put(key, pool.with_layout({"steps": steps, "kept": kept}), seconds=time.perf_counter() - begin)
        return self._trajectory(run, shelf, steps, latents, kept, steps - (0 if start is None else start.step))

    def _newest(self, run: _Run, shelf: Shelf) -> tuple[State | None, list[int]]:
        """The last state of a request that an earlier run left in the cache, and the steps of all that it left."""
        call = run.request.call
        lists = [call[name] for name in ("timesteps", "sigmas") if call.get(name) is not None]
        most = len(lists[0]) if lists else int(setting(self.pipe, call, "num_inference_steps") or 0)
        most *= getattr(self.pipe.scheduler, "order", 1)
        there = [step for step in range(run.begin, most + 1) if shelf.has(step)]
        for step in reversed(there):
            if (state := shelf.find(step)) is not None:
                return state, [k for k in there if k <= step]
        return None, []

    def _trajectory(
        self, run: _Run, shelf: Shelf, steps: int, latents: Tensor, kept: list[int], made: int
    ) -> Trajectory:
        def find(step: int) -> State | None:
            found = shelf.find(step)
            return run.start() if found is None and run.edited and step == run.begin else found

        own = run.begin + (run.parent is not None and not run.edited)
        kept = [step for step in kept if step >= own]
        return Trajectory(run.request, steps, latents, tuple(kept), run.begin, run.parent, run.edited, made, find)

    def _state(self, trajectory: Trajectory, step: int) -> State:
        """The state after a step: kept, or made again from the last one before it."""
        owner = trajectory.owner(step)
        if (state := owner._find(step)) is not None:
            return state
        before = (state for k in range(step - 1, -1, -1) if (state := trajectory.state(k)) is not None)
        start = next((state for state in before if state.step >= owner.begin), None)
        made: list[State] = []
        shelf = Shelf(owner.request, self.cache, self.keep)

        def keep(state: State) -> None:
            made.append(state)
            if self.cache is not None and shelf.wants(state.step, state.steps):
                shelf.add(state)

        def wants(k: int, steps: int) -> bool:
            return k == step or (self.cache is not None and shelf.wants(k, steps))

        self._call(owner.request, start, step, wants, keep)
        return made[-1]

    def _call(
        self,
        asked: Request,
        start: State | None,
        end: int | None = None,
        wants: Callable[[int, int], bool] = lambda step, steps: False,
        keep: Callable[[State], None] = lambda state: None,
        on_step: OnStep | None = None,
        output_type: str = "latent",
    ) -> tuple[Tensor, int]:
        """What the pipeline returns of a request's steps from a state on, and how many steps the whole has."""
        arguments = {**asked.arguments(), "output_type": output_type}
        with torch.no_grad(), self._texts.remembered(asked), asked.seeds.elsewhere(asked.device):
            made, steps = run_steps(
                self.pipe, arguments, start=start, end=end, wants=wants, on_state=keep, on_step=on_step
            )
        return made[0], steps
