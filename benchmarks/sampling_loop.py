"""What a whole sampling loop costs outside of the transformer: plain diffusers beside the same pipeline after
`latentfast.integrations.diffusers.accelerate`.

`WanPipeline` with UniPC and classifier-free guidance, 81 frames of 480p, bfloat16, texts as embeddings and no decoding.
Twice: with a transformer that returns predictions it has ready, so that nothing hides what the host does, and with a
small one of random weights that takes a few milliseconds. A step's time is the difference of two samplings of
different lengths, which leaves out what is done once a call; the transformer's own time is that of as many calls in a
row and is taken off.
"""

import json
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from latentfast._launches import launches
from latentfast.benchmarks.harness import percentiles, synchronize
from latentfast.benchmarks.operation import MODELS
from latentfast.benchmarks.rows import Environment, environment
from latentfast.benchmarks.share_of_step import SCALE, SHIFT, TEXT_TOKENS, in_bfloat16
from latentfast.benchmarks.table import headed, number

TEXT_WIDTH = 256
#: Steps of the two samplings.
SHORT, LONG = 10, 40
ROUNDS = 7
#: Of a transformer that takes a few milliseconds at 480p.
SMALL: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 128, "ffn_dim": 1024, "num_layers": 2}
QUICK: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 1}


@dataclass(frozen=True)
class Loop:
    """One pipeline's loop: microseconds as [p20, p50, p80], of a step and of one call of the transformer."""

    transformer: str
    pipeline: str
    step_us: tuple[float, float, float]
    forward_us: float
    #: Kernels and copies of a step that are not the transformer's (on a CPU: operations that compute).
    launches: float
    #: How often a step waits for the device; None on a CPU.
    waits: float | None

    @property
    def outside_us(self) -> float:
        """The step without the two calls of the transformer."""
        return self.step_us[1] - 2 * self.forward_us


@dataclass(frozen=True)
class Loops:
    """What was measured: for each transformer plain diffusers, then the accelerated pipeline."""

    environment: Environment
    latents: tuple[int, ...]
    dtype: str
    loops: list[Loop]
    quick: bool

    def to_json(self) -> str:
        """One line, with the times outside of the transformer."""
        data = asdict(self)
        for written, loop in zip(data["loops"], self.loops, strict=True):
            written["outside_us"] = loop.outside_us
        return json.dumps(data)


@dataclass(frozen=True)
class _Sampler:
    """Calls of one pipeline of so many steps."""

    pipe: Any
    inputs: dict[str, Any]

    def __call__(self, steps: int, each_step: Callable[[int], None] | None = None) -> Tensor:
        def callback(pipe: Any, i: int, t: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
            if each_step is not None:
                each_step(i)
            return {}

        more = {"callback_on_step_end": callback} if each_step is not None else {}
        return self.pipe(**self.inputs, **more, num_inference_steps=steps)[0]


def measure(device: str, quick: bool = False) -> Loops:
    """Measure both transformers on a device.

    Args:
        device: "cuda", or "cpu" for a check that everything runs (with `quick`), as a CPU has no launches to save.
        quick: tiny latents and transformers, few rounds.
    """
    where, dtype = torch.device(device), torch.bfloat16
    channels, *grid = MODELS["wan21_1_3b_480p"]
    latents = (1, channels, *((2, 4, 4) if quick else grid))
    loops = []
    for name, config in (("ready predictions", None), ("small, random weights", QUICK if quick else SMALL)):
        pipe = _pipeline(where, config)
        sampler = _Sampler(pipe, _inputs(latents, where, dtype))
        loops += _compared(name, sampler, latents, where, dtype, quick)
    return Loops(environment(where, 0.0), latents, "bfloat16", loops, quick)


def _pipeline(device: torch.device, config: dict[str, Any] | None) -> Any:
    """A `WanPipeline` with such a transformer; None: one that has its predictions ready."""
    import diffusers

    class Ready(diffusers.WanTransformer3DModel):
        """Returns one of two predictions, by turns."""

        ready: tuple[Tensor, ...] = ()
        turn = 0

        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
            if not self.ready or self.ready[0].shape != hidden_states.shape:
                self.ready = tuple(torch.randn_like(hidden_states) for _ in range(2))
            self.turn = 1 - self.turn
            return (self.ready[self.turn],)

    torch.manual_seed(0)
    cls = Ready if config is None else diffusers.WanTransformer3DModel
    transformer = in_bfloat16(cls(**(config or QUICK), text_dim=TEXT_WIDTH, freq_dim=256).eval())
    vae = diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
    )
    pipe = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=scheduler
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _inputs(latents: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    prompt, negative = torch.randn((2, 1, TEXT_TOKENS, TEXT_WIDTH), device=device, dtype=dtype)
    return {
        "prompt_embeds": prompt,
        "negative_prompt_embeds": negative,
        "latents": torch.randn(latents, device=device),
        "height": latents[-2] * 8,
        "width": latents[-1] * 8,
        "num_frames": (latents[-3] - 1) * 4 + 1,
        "guidance_scale": SCALE,
        "output_type": "latent",
    }


def _compared(
    name: str, sampler: _Sampler, latents: tuple[int, ...], device: torch.device, dtype: torch.dtype, quick: bool
) -> list[Loop]:
    """Plain and accelerated, by turns, so that a change of the machine's speed hits both."""
    short, long, rounds = (2, 6, 2) if quick else (SHORT, LONG, ROUNDS)
    times: dict[str, list[float]] = {"diffusers": [], "latentfast": []}
    counts: dict[str, tuple[float, float | None]] = {}
    call = _call(sampler, latents, device, dtype)
    forwards: list[float] = []
    for _ in range(rounds):
        forwards.append(_forward_us(call, device, 2 * (long - short)))
        for which, found in times.items():
            with _ways(sampler, which):
                _warm(sampler, short, long)
                more = _seconds(sampler, device, long) - _seconds(sampler, device, short)
            found.append(more / (long - short) * 1e6)
    with torch.no_grad():
        own = launches(call, device)
    for which in times:  # last, as the profiler slows what comes after it
        with _ways(sampler, which):
            _warm(sampler, short, long)
            waits = _waits(sampler, device, long)
            counts[which] = (_launches(sampler, device, short, long) - 2 * own, waits)
    forward = percentiles(forwards)[1]
    return [Loop(name, which, percentiles(found), forward, *counts[which]) for which, found in times.items()]


def _ways(sampler: _Sampler, which: str) -> AbstractContextManager:
    from latentfast.integrations.diffusers import accelerate

    return accelerate(sampler.pipe) if which == "latentfast" else nullcontext()


def _warm(sampler: _Sampler, short: int, long: int) -> None:
    """Compiles, and finds a new scheduler's coefficients: twice, as the first depend on whether it sampled before."""
    for _ in range(2):
        sampler(long)
        sampler(short)


def _seconds(sampler: _Sampler, device: torch.device, steps: int) -> float:
    synchronize(device)
    start = time.perf_counter()
    sampler(steps)
    synchronize(device)
    return time.perf_counter() - start


def _call(sampler: _Sampler, latents: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
    """One call of the transformer as the pipeline makes it."""
    given = {
        "hidden_states": torch.randn(latents, device=device, dtype=dtype),
        "timestep": torch.full((1,), 500, device=device),
        "encoder_hidden_states": sampler.inputs["prompt_embeds"],
        "return_dict": False,
    }
    return lambda: sampler.pipe.transformer(**given)


@torch.no_grad()
def _forward_us(call: Callable[[], Any], device: torch.device, calls: int) -> float:
    """One of so many calls in a row."""
    call()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / calls * 1e6


def _launches(sampler: _Sampler, device: torch.device, short: int, long: int) -> float:
    more = launches(lambda: sampler(long), device) - launches(lambda: sampler(short), device)
    return more / (long - short)


def _waits(sampler: _Sampler, device: torch.device, steps: int) -> float | None:
    """How often a step after the first waits for the device, as torch tells it."""
    if device.type != "cuda":
        return None

    def each_step(i: int) -> None:
        torch.cuda.set_sync_debug_mode("warn" if i < steps - 1 else "default")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            sampler(steps, each_step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught) / (steps - 1)


def table(found: Loops) -> Table:
    """The loops, with how many times less the accelerated one takes outside of the transformer."""
    on_gpu = found.environment.driver != "none"
    latents = "x".join(map(str, found.latents))
    title = f"WanPipeline, UniPC, guidance, latents {latents}, {found.dtype}, {found.environment.card}"
    headers = (
        "transformer", "pipeline", "µs a step", "µs a call of it", "µs outside", "times less",
        "launches outside" if on_gpu else "operations outside", "waits a step",
    )  # fmt: skip
    result = headed(headers, 2, title)
    for before, now in zip(found.loops[::2], found.loops[1::2], strict=True):
        for loop in (before, now):
            less = f"{before.outside_us / now.outside_us:.1f}" if loop is now and now.outside_us > 0 else "–"
            outside = number(loop.outside_us) if loop.outside_us > 0 else "≈ 0"  # the difference of two long times
            result.add_row(
                loop.transformer if loop is before else "", loop.pipeline, number(loop.step_us[1]),
                number(loop.forward_us), outside, less, f"{loop.launches:.1f}",
                "–" if loop.waits is None else f"{loop.waits:.1f}",
            )  # fmt: skip
    return result
