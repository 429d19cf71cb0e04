"""A pipeline's three moves through its public interface: noise from a seed, noise to latents, latents to frames."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentfast.cli.errors import UserError, one_line

if TYPE_CHECKING:
    from latentfast.cache import LatentCache
    from latentfast.integrations.diffusers import LocalizedEdit
    from latentfast.session import Trajectory

__all__ = ["Sampler", "StepCallback"]

# (index of the step that just ended, the latents after it) -> the latents to go on with
StepCallback = Callable[[int, Tensor], Tensor]


@dataclass
class Sampler:
    """A text-to-video pipeline with the call's fixed arguments.

    Every pipeline whose call takes ``latents``, ``output_type="latent"`` and ``callback_on_step_end`` works; the
    latents keep that pipeline's own layout.

    Attributes:
        pipeline: the loaded ``DiffusionPipeline``.
        call: keyword arguments of every call: steps, guidance, size. What is not in it keeps the pipeline's default.
    """

    pipeline: Any
    call: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        defaults = inspect.signature(type(self.pipeline).__call__).parameters
        for name in self.call:
            if name not in defaults:
                raise UserError(f"{type(self.pipeline).__name__} takes no '{name}'")
        self._defaults = {name: parameter.default for name, parameter in defaults.items()}

    def setting(self, name: str) -> Any:
        """The value in force for an argument of the pipeline's call: ours, else the pipeline's default."""
        from latentfast.integrations.diffusers.sampling import setting

        return setting(self.pipeline, self.call, name)

    @property
    def steps(self) -> int:
        return int(self.setting("num_inference_steps"))

    @property
    def device(self) -> torch.device:
        return self.pipeline.device

    def frame_dim(self, latents: Tensor) -> int:
        """The frames' dimension: 2 for latents ``(B, C, T, H, W)``, 1 for ``(B, T, C, H, W)``.

        Raises:
            UserError: the pipeline packs its latents into tokens, where no region or frame can be named.
        """
        from latentfast.integrations.diffusers.sampling import frame_dim

        try:
            return frame_dim(self.pipeline, latents)
        except ValueError as error:
            raise UserError(str(error)) from error

    def noise(self, seed: int) -> Tensor:
        """The starting noise of one clip, drawn on the CPU so that a seed means the same on every device."""
        from latentfast.integrations.diffusers.sampling import starting_noise

        generator = torch.Generator("cpu").manual_seed(seed)
        return self._checked(starting_noise, pipe=self.pipeline, call=self.call, generator=generator)

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """The prompts' embeddings, one row each.

        Raises:
            UserError: the pipeline's call wants more than one tensor to describe a prompt.
        """
        if "prompt_attention_mask" in self._defaults or "prompt_embeds" not in self._defaults:
            name = type(self.pipeline).__name__
            raise UserError(f"{name} has no single prompt embedding to mix: use --space latent")
        options = {"do_classifier_free_guidance": False, "device": self.device}
        if self.setting("max_sequence_length") is not None:
            options["max_sequence_length"] = self.setting("max_sequence_length")
        return self._checked(self.pipeline.encode_prompt, prompt=list(prompts), **options)[0]

    def denoise(self, prompts: Sequence[str] | Tensor, noise: Tensor, *, on_step: StepCallback | None = None) -> Tensor:
        """Noise to clean latents, in the pipeline's layout and normalisation.

        Args:
            prompts: a text, or a row of :meth:`embed`, for each sample of ``noise``.
            noise: the starting noise, a batch of :meth:`noise`.
            on_step: sees the latents after each step and returns those to go on with.
        """

        def forward(pipeline, step: int, timestep, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"latents": on_step(step, tensors["latents"])} if on_step is not None else {}

        condition = {"prompt_embeds": prompts} if isinstance(prompts, Tensor) else {"prompt": list(prompts)}
        return self._run(output_type="latent", latents=noise, callback_on_step_end=forward, **condition)

    def sample(
        self, prompt: str, seed: int, cache: LatentCache | None, *, on_step: Callable[[int, int], None]
    ) -> Trajectory:
        """One clip from the noise of a seed; what a cache has of it is not made again.

        Args:
            prompt: What it shows.
            seed: Of the noise.
            cache: Gets the state after every step, so that an interrupted sampling goes on from there.
            on_step: Is told after each step that is run.
        """
        from latentfast.session import Session

        session = Session(self.pipeline, cache, keep="all" if cache is not None else self.steps)
        given = {**self.call, "latents": self.noise(seed), "seed": seed, "on_step": on_step}
        return self._checked(session.generate, prompt=prompt, **given)

    def edit(
        self, prompt: str, edit_prompt: str, noise: Tensor, *, on_step: Callable[[int], None], **options: Any
    ) -> LocalizedEdit:
        """A clip and its edit, confined to a mask: see `latentfast.integrations.diffusers.localized_edit`.

        Args:
            prompt: of the clip.
            edit_prompt: of its edit.
            noise: the starting noise of both.
            on_step: is told after each step how many clips took it.
            **options: of `localized_edit`.

        Raises:
            UserError: a word isn't in its prompt, or the model's attention isn't known.
        """
        from latentfast.integrations.diffusers import localized_edit

        def stepped(pipeline, step: int, timestep, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            on_step(len(tensors["latents"]))
            return {}

        given = {**self.call, **options, "latents": noise, "output_type": "latent", "callback_on_step_end": stepped}
        try:
            with torch.no_grad():
                return localized_edit(self.pipeline, prompt, edit_prompt, **given)
        except (TypeError, ValueError) as error:
            raise UserError(one_line(error)) from error

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Clean latents to uint8 frames ``(B, T, H, W, 3)`` on the CPU, one clip at a time to bound the memory."""
        return torch.stack([self._decode_one(sample[None]) for sample in latents])

    def _decode_one(self, latents: Tensor) -> Tensor:
        from diffusers import AutoencoderKLWan

        vae = self.pipeline.vae
        is_wan = isinstance(vae, AutoencoderKLWan)
        if is_wan:
            shape = (1, -1, 1, 1, 1)
            mean = torch.tensor(vae.config.latents_mean, device=vae.device, dtype=vae.dtype).view(shape)
            std = torch.tensor(vae.config.latents_std, device=vae.device, dtype=vae.dtype).view(shape)
            # The order of operations is WanPipeline's own, so that the pixels are too, to the last bit.
            clip = vae.decode(latents.to(vae.device, vae.dtype) / (1.0 / std) + mean, return_dict=False)[0]
            video = self.pipeline.video_processor.postprocess_video(clip, output_type="pt")
        else:
            # How latents become pixels (packing, scales, timestep-conditioned decoders) is the pipeline's secret. One
            # step whose result is replaced makes it decode what we give it, through its public call alone.
            video = self._run(
                prompt="",
                latents=latents,
                output_type="pt",
                callback_on_step_end=lambda *_: {"latents": latents},
                num_inference_steps=1,
                guidance_scale=1.0,
            )
        frames = (video[0].float().clamp(0, 1) * 255).round().to(torch.uint8)
        return frames.permute(0, 2, 3, 1).contiguous().cpu()

    def _run(self, **arguments: Any) -> Any:
        return self._checked(self.pipeline, **{**self.call, **arguments}).frames

    @staticmethod
    def _checked(function: Callable[..., Any], **arguments: Any) -> Any:
        """Call into the pipeline; what it refuses (a height that it can't divide, say) is the caller's mistake."""
        try:
            with torch.no_grad():
                return function(**arguments)
        except ValueError as error:
            raise UserError(f"the pipeline refuses: {one_line(error)}") from error
