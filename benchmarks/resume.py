"""What it costs to edit a sampling at one of its steps, and to ask for it again.

A sampling of N steps that is gone on from after k of them has N − k left: what it takes beyond their share of the whole
is what a session costs: a state that is found and put in place, the call's preparation, keys.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table

from latentfast.benchmarks.harness import synchronize
from latentfast.benchmarks.rows import Environment, environment
from latentfast.benchmarks.share_of_step import STEPS, TEXT_TOKENS, TINY_LATENTS, WAN_1_3B, in_bfloat16
from latentfast.benchmarks.table import headed, number

#: Layers of Wan 2.1 1.3B: few, whose forwards the host is busy with, so that all that is done beside them shows; all,
#: which keep the GPU busy. With the steps of a sampling.
LAYERS = {4: STEPS, 30: 20}
#: What they are given: 17 frames of 480p.
FRAMES, HEIGHT, WIDTH = 17, 480, 832
SCALE, SHIFT = 5.0, 3.0
PROMPT = "a big red circle moving right on a dark background in bright light"


@dataclass(frozen=True)
class Edit:
    """A sampling that is gone on from after `step` steps with something changed: seconds, the least of the rounds."""

    step: int
    seconds: float


@dataclass(frozen=True)
class Case:
    """One model's."""

    model: str
    latents: tuple[int, ...]
    dtype: str
    environment: Environment
    steps: int
    rounds: int
    #: The pipeline's own call; the session's, which keeps every state; the same request again.
    plain: float
    first: float
    again: float
    edits: list[Edit]
    #: Whether what follows from a kept state has the bits of the pipeline's call.
    same_bits: bool

    def excess(self, edit: Edit) -> float:
        """What an edit costs beyond its steps' share, as a share of the whole sampling."""
        return edit.seconds / self.plain - (self.steps - edit.step) / self.steps


@dataclass(frozen=True)
class Resumed:
    """What was measured."""

    cases: list[Case]
    quick: bool

    @property
    def wrong(self) -> str:
        """What a result must not be; '' if all is well."""
        return ", ".join(f"{case.model} lost bits" for case in self.cases if not case.same_bits)

    def to_json(self) -> str:
        """One line, with the shares."""
        data = asdict(self)
        for written, case in zip(data["cases"], self.cases, strict=True):
            written["again_share"] = case.again / case.first
            for edit, measured in zip(written["edits"], case.edits, strict=True):
                edit["excess"] = case.excess(measured)
        return json.dumps(data)


def measure(device: str, quick: bool = False) -> Resumed:
    """Measure Wan transformers on a GPU, or the embedded model on the CPU.

    Args:
        device: "cuda" or "cpu".
        quick: few steps and rounds, small, with both models: checks that everything runs.
    """
    where = torch.device(device)
    if quick:
        return Resumed([_wan(where, 1, 4, quick), _embedded(quick)], quick)
    if device == "cuda":
        return Resumed([_wan(where, layers, steps, quick) for layers, steps in LAYERS.items()], quick)
    return Resumed([_embedded(quick)], quick)


def wan_pipeline(device: torch.device, layers: int, quick: bool) -> tuple[Any, dict[str, Any]]:
    """Wan 2.1 1.3B with some of its layers, of random weights, behind UniPC and without its VAE and text encoder; and
    what it is called with, but for the number of steps and the seed."""
    from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    config = (
        WAN_1_3B | {"num_layers": layers} | ({"ffn_dim": 64, "text_dim": 64, "num_attention_heads": 2} if quick else {})
    )
    torch.manual_seed(0)
    with device:
        transformer = in_bfloat16(WanTransformer3DModel(**config).eval())
        texts = torch.randn((2, 1, TEXT_TOKENS, config["text_dim"]), dtype=torch.bfloat16)
    options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": SHIFT}
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=transformer,
        scheduler=UniPCMultistepScheduler(**options),
    )
    size = {"num_frames": 5, "height": 64, "width": 64} if quick else {}
    call = {"num_frames": FRAMES, "height": HEIGHT, "width": WIDTH, "guidance_scale": SCALE, **size}
    return pipe, call | {"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1]}


def wan_name(layers: int) -> str:
    """What `wan_pipeline` is called in tables."""
    return f"Wan 2.1 1.3B, {layers} of its layers, random weights"


def _wan(device: torch.device, layers: int, steps: int, quick: bool) -> Case:
    pipe, call = wan_pipeline(device, layers, quick)
    shape = (16, (call["num_frames"] - 1) // 4 + 1, call["height"] // 8, call["width"] // 8)
    return _case(wan_name(layers), pipe, call, shape, steps, quick)


def _embedded(quick: bool) -> Case:
    from latentfast import tiny

    pipe = tiny.load_pipeline()
    call: dict[str, Any] = {"prompt": PROMPT, **tiny.RECOMMENDED}
    if quick:
        call |= {"num_frames": 5, "height": 32, "width": 32}
    return _case("the embedded model", pipe, call, TINY_LATENTS, int(tiny.RECOMMENDED["num_inference_steps"]), quick)


def _case(name: str, pipe: Any, call: dict[str, Any], latents: tuple[int, ...], steps: int, quick: bool) -> Case:
    """Whole samplings and edited ones by turns, so that a busy spell of the machine falls on all."""
    from latentfast.cache import LatentCache
    from latentfast.session import Session

    steps, rounds = (4, 2) if quick else (steps, 3)
    call = {**call, "num_inference_steps": steps}
    device = pipe.device
    pipe.set_progress_bar_config(disable=True)
    places = [steps * quarter // 4 for quarter in (1, 2, 3)]
    times: dict[str, list[float]] = {}

    def timed(what: str, work: Callable[[], Any]) -> Any:
        synchronize(device)
        begin = time.perf_counter()
        made = work()
        synchronize(device)
        times.setdefault(what, []).append(time.perf_counter() - begin)
        return made

    def plain(seed: int) -> torch.Tensor:
        return pipe(**call, generator=torch.Generator().manual_seed(seed), output_type="latent")[0]

    # room for the states of a few samplings: what is measured is not how entries are evicted
    with LatentCache(device_bytes=8 << 30 if device.type == "cuda" else 0, host_bytes=8 << 30) as cache:
        session = Session(pipe, cache)
        for k in (0, places[1]):  # whatever is done once: the weights' fingerprint, compilations, memory
            session.resume(session.generate(**call, seed=0), k, guidance=1.5)
        wanted = plain(0)
        same = torch.equal(Session(pipe).resume(session.generate(**call, seed=0), places[1]).latents, wanted)
        for round in range(1, rounds + 1):
            timed("plain", lambda seed=round: plain(seed))
            first = timed("first", lambda seed=round: session.generate(**call, seed=seed))
            cache.flush()
            timed("again", lambda seed=round: session.generate(**call, seed=seed))
            for k in places:
                scale = call["guidance_scale"] + 0.01 * round
                timed(f"edit {k}", lambda k=k, scale=scale, first=first: session.resume(first, k, guidance=scale))
                cache.flush()
    least = {what: min(found) for what, found in times.items()}
    dtype = str(pipe.transformer.dtype).removeprefix("torch.")
    return Case(
        model=name,
        latents=latents,
        dtype=dtype,
        environment=environment(device, 0.0),
        steps=steps,
        rounds=rounds,
        plain=least["plain"],
        first=least["first"],
        again=least["again"],
        edits=[Edit(k, least[f"edit {k}"]) for k in places],
        same_bits=same,
    )


def table(found: Resumed) -> Table:
    """Each sampling, and what its edits cost beside it."""
    result = headed(("model", "where", "sampling", "ms", "share of the whole", "its steps' share", "beyond"), 3)
    for case in found.cases:
        here = case.environment
        where = here.card if here.driver != "none" else f"{here.card}, {here.threads} threads"
        rows = [
            (f"the pipeline's call, {case.steps} steps", case.plain, 1.0),
            ("the session's, every state kept", case.first, 1.0),
            *((f"edited after {x.step} steps", x.seconds, (case.steps - x.step) / case.steps) for x in case.edits),
            ("asked for again", case.again, 0.0),
        ]
        first = (f"{case.model}, latents {'x'.join(map(str, case.latents))}, {case.dtype}", where)
        for i, (what, seconds, steps) in enumerate(rows):
            share = seconds / case.plain
            beyond = f"{share - steps:+.2%}" if i else "–"
            result.add_row(
                *(first if i == 0 else ("", "")), what, number(seconds * 1e3), f"{share:.2%}", f"{steps:.2%}", beyond
            )
    return result
