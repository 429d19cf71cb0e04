"""What share of a sampling step the arithmetic between the model's calls is: a full-size Wan 2.1 1.3B, and the embedded
model on the CPU.

A guided step calls the transformer twice and then does two things: guidance (CFG), and the scheduler's step. The
full-size transformer has its published shape and random weights, which take as long as trained ones.
"""

import itertools
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import latentfast
from latentfast.benchmarks.harness import percentiles, synchronize
from latentfast.benchmarks.operation import MODELS
from latentfast.benchmarks.rows import Environment, environment
from latentfast.benchmarks.table import headed, number

#: Wan-AI/Wan2.1-T2V-1.3B-Diffusers, transformer/config.json; what is not here is WanTransformer3DModel's default.
WAN_1_3B: dict[str, Any] = {
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "ffn_dim": 8960,
    "num_layers": 30,
    "text_dim": 4096,
}
TEXT_TOKENS = 512
#: Of the embedded model: 25 frames of 128x128, and the tokens of a prompt.
TINY_LATENTS, TINY_TOKENS = (16, 7, 16, 16), 64
#: Guidance scale, steps of a sampling, and the shift of its sigmas, as Wan's own examples have them.
SCALE, STEPS, SHIFT = 5.0, 50, 3.0


@dataclass(frozen=True)
class Part:
    """A part of a step: microseconds as [p20, p50, p80], the caller waiting for the device after each step."""

    name: str
    us: tuple[float, float, float]


@dataclass(frozen=True)
class StepOfModel:
    """The parts of one model's guided step; the first is the two calls of the transformer."""

    model: str
    latents: tuple[int, ...]
    dtype: str
    environment: Environment
    parts: list[Part]

    def share(self, part: Part) -> float:
        """What share of a step this arithmetic is, beside the two calls."""
        return part.us[1] / (part.us[1] + self.parts[0].us[1])


@dataclass(frozen=True)
class Shares:
    """What was measured."""

    steps: list[StepOfModel]
    quick: bool

    def to_json(self) -> str:
        """One line, with the shares."""
        data = asdict(self)
        for written, step in zip(data["steps"], self.steps, strict=True):
            for part, measured in zip(written["parts"][1:], step.parts[1:], strict=True):
                part["share"] = step.share(measured)
        return json.dumps(data)


def measure(device: str, quick: bool = False) -> Shares:
    """Measure the full-size model on a GPU (`device` "cuda") and the embedded one on the CPU.

    Args:
        device: "cuda", or "cpu" for the embedded model alone.
        quick: one layer, few frames, few rounds: checks that everything runs.
    """
    with torch.inference_mode():
        steps = [_full_size(torch.device(device), quick)] if device == "cuda" or quick else []
        return Shares([*steps, _embedded(quick)], quick)


def full_size_wan(device: torch.device, quick: bool) -> tuple[Any, tuple[int, ...]]:
    """Wan 2.1 1.3B of random bfloat16 weights, and the shape of its 480p latents; `quick`: one layer, few frames."""
    from diffusers import WanTransformer3DModel

    config = WAN_1_3B | ({"num_layers": 1, "ffn_dim": 64, "text_dim": 64} if quick else {})
    torch.manual_seed(0)
    with device:  # drawn where it is used: 1.4 billion numbers
        transformer = in_bfloat16(WanTransformer3DModel(**config).eval())
    channels, *grid = MODELS["wan21_1_3b_480p"]
    return transformer, (channels, *((2, 4, 4) if quick else grid))


def _full_size(device: torch.device, quick: bool) -> StepOfModel:
    transformer, latents = full_size_wan(device, quick)
    name = f"Wan 2.1 1.3B, {sum(p.numel() for p in transformer.parameters()) / 1e9:.2f} billion random weights"
    text_dim = transformer.config.text_dim
    return _step(name, transformer, latents, TEXT_TOKENS, text_dim, device, torch.bfloat16, quick)


def in_bfloat16(transformer: Any) -> Any:
    """The transformer with its weights in bfloat16, but for those that `from_pretrained` would keep in float32."""
    in_float32 = set(transformer._keep_in_fp32_modules)
    for name, parameter in transformer.named_parameters():
        if not in_float32 & set(name.split(".")):
            parameter.data = parameter.data.to(torch.bfloat16)
    return transformer


def _embedded(quick: bool) -> StepOfModel:
    from diffusers.utils import logging

    from latentfast.tiny import load_pipeline

    logging.disable_progress_bar()
    device = torch.device("cpu")
    transformer = load_pipeline(device, torch.float32).transformer
    text_dim = transformer.config.text_dim
    return _step("the embedded model", transformer, TINY_LATENTS, TINY_TOKENS, text_dim, device, torch.float32, quick)


def _step(
    name: str,
    transformer: Callable[..., Any],
    latents: tuple[int, ...],
    tokens: int,
    text_dim: int,
    device: torch.device,
    dtype: torch.dtype,
    quick: bool,
) -> StepOfModel:
    """One model's step: its calls, and each way to do the arithmetic, on tensors of its shapes."""
    sample, cond, uncond = torch.randn((3, 1, *latents), device=device, dtype=dtype)
    texts = torch.randn((2, 1, tokens, text_dim), device=device, dtype=dtype)
    now = torch.full((1,), 500, device=device)

    def calls() -> None:
        for text in texts:
            transformer(hidden_states=sample, timestep=now, encoder_hidden_states=text, return_dict=False)

    rounds = 3 if quick else 7
    parts = [Part("two calls of the transformer", _timed(calls, device, rounds, 1))]
    for label, sampling in _samplings(sample, cond, uncond, 4 if quick else STEPS).items():
        parts.append(Part(label, _timed(sampling(), device, rounds, 4 if quick else STEPS)))
    # No floor is taken from these numbers, so no copy rate is measured.
    return StepOfModel(name, latents, str(dtype).removeprefix("torch."), environment(device, 0.0), parts)


def _samplings(sample: Tensor, cond: Tensor, uncond: Tensor, steps: int) -> dict[str, Callable[[], Callable[[], Any]]]:
    """Everything but the transformer's calls of a whole sampling, by name: diffusers', and ours where it is there.

    A whole sampling, because the first and the last steps of a multistep scheduler are cheaper than the others.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    def diffusers(scheduler: Any) -> Callable[[], Any]:
        def call() -> None:
            scheduler.set_timesteps(steps, device=sample.device)
            latents = sample
            for t in scheduler.timesteps:
                # as WanPipeline writes it
                noise = uncond + SCALE * (cond - uncond)
                latents = scheduler.step(noise, t, latents, return_dict=False)[0]

        return call

    def unipc() -> Callable[[], Any]:
        options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": SHIFT}
        return diffusers(UniPCMultistepScheduler(**options))

    def euler() -> Callable[[], Any]:
        return diffusers(FlowMatchEulerDiscreteScheduler(shift=SHIFT))

    def ours() -> Callable[[], Any]:
        guided_step = latentfast.guided_step  # type: ignore[attr-defined]
        scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
        scheduler.set_timesteps(steps)
        sigmas = scheduler.sigmas.tolist()

        def call() -> None:
            latents = sample
            for sigma, sigma_next in itertools.pairwise(sigmas):
                latents = guided_step(latents, cond, uncond, SCALE, sigma=sigma, sigma_next=sigma_next)

        return call

    found = {"diffusers: CFG, UniPC step": unipc, "diffusers: CFG, flow-matching Euler step": euler}
    if hasattr(latentfast, "guided_step"):
        found["latentfast: guided_step, CFG and flow-matching Euler"] = ours
    return found


def _timed(call: Callable[[], Any], device: torch.device, rounds: int, steps: int) -> tuple[float, float, float]:
    """Microseconds a step of a call that makes `steps` of them, the device waited for at its end."""
    call()
    synchronize(device)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append((time.perf_counter() - start) * 1e6 / steps)
    return percentiles(times)


def table(found: Shares) -> Table:
    """The parts of each model's step, with their shares."""
    result = headed(("model", "where", "part of a guided step", "µs", "share of the step"), 3)
    for step in found.steps:
        here = step.environment
        where = here.card if here.driver != "none" else f"{here.card}, {here.threads} threads"
        for i, part in enumerate(step.parts):
            share = f"{step.share(part):.2%}" if i else "–"
            first = (f"{step.model}, latents {'x'.join(map(str, step.latents))}, {step.dtype}", where)
            result.add_row(*(first if i == 0 else ("", "")), part.name, number(part.us[1]), share)
    return result
