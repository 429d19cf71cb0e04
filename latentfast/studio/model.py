"""The studio's model: clips from prompts, with what its attention looks at, and frames from latents."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

import latentfast
from latentfast.cache import Key, LatentCache
from latentfast.integrations.diffusers import AttentionCapture
from latentfast.integrations.diffusers.words import numbered_words, prompt_tokens
from latentfast.preview.sampling import estimates
from latentfast.session.arguments import UnwritableError, to_data
from latentfast.session.describe import describe_pipeline
from latentfast.session.states import Pool, layout_of, read
from latentfast.studio.document import Shot, Word

__all__ = ["Clip", "Model", "OutdatedError", "Sampling"]


class OutdatedError(Exception):
    """What was being made is not wanted any more."""


@dataclass
class Clip:
    """A clip that was made.

    Attributes:
        latents: `(1, C, T, H, W)`, on the model's device.
        heat: The attention to each of `words`, `(1, G, t, h, w)`; None where there are none.
        words: Of the prompt, those that the model reads.
        note: Why there are no words, if there are none.
        frames: uint8 `(N, H', W', 3)` on the host, once decoded.
        directions: Of its latents, by kinds of edits.
    """

    latents: Tensor
    heat: Tensor | None
    words: tuple[Word, ...]
    note: str = ""
    frames: Tensor | None = None
    directions: dict[str, Tensor] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        return sum(x.numel() * x.element_size() for x in (self.latents, self.heat, self.frames) if x is not None)


class Sampling(Protocol):
    """What the studio needs of a pipeline; `latentfast.cli.sampler.Sampler` is one."""

    pipeline: Any
    call: dict[str, Any]

    def setting(self, name: str) -> Any: ...
    def frame_dim(self, latents: Tensor) -> int: ...
    def noise(self, seed: int) -> Tensor: ...
    def denoise(self, prompts: Any, noise: Tensor, *, on_step: Any) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...


class Model:
    """A text-to-video pipeline, used by one at a time.

    Args:
        sampler: The pipeline with its fixed arguments.
        factors: RGB factors `(C, 3)` and `(3,)`; None: they are fitted to the first clip.
        cache: Keeps the clips that were made for later runs.

    Raises:
        ValueError: its latents have no frames.
    """

    def __init__(
        self, sampler: Sampling, factors: tuple[Tensor, Tensor] | None = None, cache: LatentCache | None = None
    ) -> None:
        self._sampler, self._cache = sampler, cache
        self.factors = factors
        noise = sampler.noise(0)
        self._frame_dim = sampler.frame_dim(noise)
        shape = self._frames_third(noise).shape
        #: Pixels of a latent cell's side, and the clip's height and width.
        side = int(getattr(sampler.pipeline, "vae_scale_factor_spatial", 8))
        height, width = (sampler.setting(name) for name in ("height", "width"))
        self.size = (int(height or side * shape[3]), int(width or side * shape[4]))
        self.scale = max(1, self.size[0] // shape[3])
        self.latent_frames = shape[2]
        #: Frames of a finished clip; what the model makes of those that are asked for.
        self.frames = int(sampler.setting("num_frames") or shape[2])
        self._one_at_a_time = threading.Lock()
        self._outdated: Callable[[], bool] | None = None
        for module in sampler.pipeline.vae.modules():
            module.register_forward_pre_hook(self._heed)

    @property
    def name(self) -> str:
        return type(self._sampler.pipeline).__name__

    @property
    def device(self) -> torch.device:
        return torch.device(self._sampler.pipeline.device)

    def defaults(self) -> dict[str, float]:
        """Steps and guidance, where nobody says."""
        guidance = self._sampler.setting("guidance_scale")
        return {"steps": int(self._sampler.setting("num_inference_steps")), "guidance": float(guidance or 0.0)}

    def make(
        self,
        shot: Shot,
        *,
        outdated: Callable[[], bool],
        on_step: Callable[[int], None],
        show: Callable[[Callable[[], Tensor]], None] | None = None,
    ) -> Clip:
        """The clip of a shot, not decoded yet.

        Args:
            shot: What it is made of.
            outdated: Asked after each step; when it is true the run ends.
            on_step: Told the number of each step that is done, from 1.
            show: Given, after each step, a function that makes the clean latents which it is on the way to.

        Raises:
            OutdatedError: `outdated` was true.
        """
        sampler = self._with(shot)
        with self._alone(outdated):
            noise = sampler.noise(shot.seed)
            watch = None if show is None else estimates(sampler.pipeline, noise, show)

            def stepped(step: int, latents: Tensor) -> Tensor:
                if outdated():
                    raise OutdatedError
                if watch is not None:
                    watch(sampler.pipeline, step, None, {"latents": latents})
                on_step(step + 1)
                return latents

            capture, words, note = self._capture(shot.prompt)
            with capture or nullcontext():
                latents = sampler.denoise([shot.prompt], noise, on_step=stepped)
        heat = None if capture is None else capture.maps()
        return Clip(self._frames_third(latents).contiguous(), heat, words, note)

    def decode(self, latents: Tensor, outdated: Callable[[], bool]) -> Tensor:
        """Frames `(1, N, H', W', 3)` of clean latents `(1, C, T, H, W)`, on the host.

        Raises:
            OutdatedError: `outdated` became true, which is asked before each module of the decoder.
        """
        with self._alone(outdated):
            self._outdated = outdated
            try:
                frames = self._sampler.decode(self._frames_third(latents))
                self.frames = frames.shape[1]
                return frames
            finally:
                self._outdated = None

    def fit(self, clip: Clip) -> None:
        """Make a decoded clip's RGB factors the model's, if it has none yet."""
        if self.factors is None and clip.frames is not None:
            found = latentfast.fit_rgb(clip.latents.float(), clip.frames[None].to(clip.latents.device))
            self.factors = found.weight, found.bias

    def key(self, shot: Shot) -> Key | None:
        """A clip's name in the cache; None if there is no cache, or the model's weights can't be told from others."""
        if self._cache is None:
            return None
        pipe, call = self._sampler.pipeline, self._with(shot).call
        try:
            made = {"pipeline": describe_pipeline(pipe, self.device), "call": to_data(call, {}, "call")}
        except UnwritableError:
            return None
        return Key.of({"kind": "clip of the studio", **made, "prompt": shot.prompt, "seed": shot.seed})

    def recall(self, key: Key | None) -> Clip | None:
        """A clip as an earlier run made it with the same pipeline; None if the cache has none."""
        found = None if self._cache is None or key is None else self._cache.get(key, device=self.device)
        if found is None:
            return None
        layout = layout_of(found)
        latents, heat, frames = read(found, layout["tensors"])
        words = tuple((str(word), int(number)) for word, number in layout["words"])
        return Clip(latents, heat, words, layout["note"], None if frames is None else frames.cpu())

    def remember(self, key: Key | None, clip: Clip) -> None:
        """Put a clip into the cache, with its frames if it was decoded."""
        if self._cache is None or key is None:
            return
        pool = Pool(self.device)
        tensors = pool.write([clip.latents, clip.heat, clip.frames])
        self._cache.put(key, pool.with_layout({"tensors": tensors, "words": clip.words, "note": clip.note}))

    def _with(self, shot: Shot) -> Any:
        call = {**self._sampler.call, "num_inference_steps": shot.steps}
        if self._sampler.setting("guidance_scale") is not None:
            call["guidance_scale"] = shot.guidance
        return replace(self._sampler, call=call)  # type: ignore[type-var]

    def _capture(self, prompt: str) -> tuple[AttentionCapture | None, tuple[Word, ...], str]:
        pipe = self._sampler.pipeline
        length = self._sampler.setting("max_sequence_length")
        words: list[Word] = []
        try:
            for word in numbered_words(prompt):
                try:
                    prompt_tokens(pipe, prompt, [word], max_sequence_length=length)
                except ValueError:  # it comes after the last token that the pipeline keeps
                    continue
                words.append(word)
            if not words:
                return None, (), "No word of this prompt reaches the model."
            options = {"prompt": prompt, "own_tokens": True, "max_sequence_length": length}
            return AttentionCapture(pipe, words, **options), tuple(words), ""
        except (TypeError, ValueError, AttributeError) as error:
            return None, (), f"Words can't be looked for with this model: {error}"

    def _frames_third(self, x: Tensor) -> Tensor:
        return x if self._frame_dim == 2 else x.transpose(1, 2)

    @contextmanager
    def _alone(self, outdated: Callable[[], bool]) -> Iterator[None]:
        while not self._one_at_a_time.acquire(timeout=0.05):
            if outdated():
                raise OutdatedError
        try:
            yield
        finally:
            self._one_at_a_time.release()

    def _heed(self, module: Any, args: Any) -> None:
        if self._outdated is not None and self._outdated():
            raise OutdatedError
