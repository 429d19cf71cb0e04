"""Edits that keep their source's layout: self-attention with the source's queries and keys."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import Tensor, nn

from latentfast.integrations.diffusers._attention import (
    VideoAttention,
    by_name,
    guided_in_one_batch,
    video_attentions,
)

__all__ = ["SourceStructure"]


class SourceStructure:
    """For the first steps of a run over ``[sources, edits]``, each edit's video attends to itself as its source does.

    What stands where is in the queries and keys of self-attention, how it looks in the values (Tumanyan et al. 2023,
    Plug-and-Play Diffusion Features, section 4.2; Prompt-to-Prompt, Hertz et al. 2022, does it with the
    cross-attention). So the edit gets the source's queries and keys of the same layer, step and half of guidance, and
    keeps its own values. In joint attention it is the video's tokens that are given; those of the text stay its own.

    A context manager: inside, forward hooks on the norms of queries and keys, which fused projections pass as well.
    They go with the last of the `steps`, or with the context.

    Args:
        pipe: Its transformers are of Wan, CogVideoX, HunyuanVideo or Mochi.
        steps: How many of the first steps, at least 1.

    Raises:
        ValueError: the model isn't known.
    """

    def __init__(self, pipe: Any, steps: int) -> None:
        self._pipe, self._steps = pipe, steps
        found = [getattr(pipe, name, None) for name in ("transformer", "transformer_2")]
        # torch.compile wraps a module; its hooks are those of the module inside
        models = [getattr(model, "_orig_mod", model) for model in found if model is not None]
        self._blocks = [(model, block) for model in models for block in video_attentions(model)]
        self._hooks: list[Any] = []
        self._acted = False

    def __enter__(self) -> SourceStructure:
        try:
            for model, block in self._blocks:
                self._hooks += self._hook(model, block)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def stepped(self, step: int) -> None:
        """After a step, counted from 0.

        Raises:
            RuntimeError: no hook has run.
        """
        if not self._acted:
            raise RuntimeError(
                "structure has found no attention to act on: run compiled modules under "
                'torch.compiler.set_stance("force_eager"), because compiled code runs no hooks'
            )
        if step + 1 >= self._steps:
            self._remove()

    def _remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _hook(self, model: nn.Module, block: VideoAttention) -> list[Any]:
        call: dict[str, Any] = {}

        def called(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            call.update(by_name(module, args, kwargs))

        def of_sources(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            self._acted = True
            halves = 2 if guided_in_one_batch(self._pipe, model) else 1
            given = output.clone()
            video = block.video(given, call).unflatten(0, (halves, 2, -1))
            video[:, 1].copy_(video[:, 0])
            return given

        def done(module: nn.Module, args: tuple, output: Any) -> None:
            call.clear()  # of tensors that nobody else needs any more

        hooks: list[Any] = [norm.register_forward_hook(of_sources) for norm in (block.queries, block.keys)]
        if block.text:
            hooks.append(block.module.register_forward_pre_hook(called, with_kwargs=True))
            hooks.append(block.module.register_forward_hook(done))
        return hooks
