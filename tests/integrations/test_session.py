"""Sessions: nothing is made twice, anything can be gone on from, and what is saved comes back with its bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from latentfast import tiny
from latentfast.cache import LatentCache
from latentfast.cli.video import encode_mp4
from latentfast.integrations.diffusers import accelerate
from latentfast.session import Budget, Session
from latentfast.session.video import read_frames
from tests.integrations.pipelines import BY_NAME, STEPS, Case

WAN = BY_NAME["wan"]


@pytest.fixture
def cache() -> LatentCache:
    return LatentCache(host_bytes=1 << 28)


def arguments(case: Case = WAN, **more: Any) -> dict[str, Any]:
    """What a session is asked for: what a pipeline is called with, but for what is the session's own."""
    return {name: value for name, value in case.inputs(**more).items() if name != "output_type"}


class Counted:
    """How often a pipeline's transformer was called."""

    def __init__(self, pipe: Any) -> None:
        self.calls = 0
        pipe.transformer.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.calls += 1


def test_a_trajectory_has_the_bits_of_the_pipelines_call() -> None:
    pipe = WAN.pipe()
    wanted = WAN.latents(pipe)
    made = Session(pipe).generate(**arguments())
    assert (made.steps, made.made, made.kept) == (STEPS, STEPS, tuple(range(STEPS + 1)))
    assert torch.equal(made.latents, wanted[-1])
    for step, latents in enumerate(wanted, 1):
        state = made.state(step)
        assert state is not None and torch.equal(state.latents, latents)


def test_a_seed_is_a_generator_on_the_cpu() -> None:
    pipe = WAN.pipe()
    given = {name: value for name, value in arguments().items() if name != "generator"}
    generator = torch.Generator().manual_seed(5)
    made = Session(pipe).generate(**given, seed=5)
    assert torch.equal(made.latents, Session(pipe).generate(**given, generator=generator).latents)
    assert torch.equal(made.latents, pipe(**given, generator=generator, output_type="latent")[0])


def test_the_same_request_runs_nothing(cache: LatentCache) -> None:
    pipe = WAN.pipe()
    session, counted = Session(pipe, cache), Counted(pipe)
    first = session.generate(**arguments())
    frames = session.decode(first)
    calls = counted.calls
    again = session.generate(**arguments())
    assert again.made == 0 and counted.calls == calls and again.kept == first.kept
    assert torch.equal(again.latents, first.latents) and torch.equal(session.decode(again), frames)
    assert Session(WAN.pipe(), cache).generate(**arguments()).made == 0  # the same weights, another object


CHANGES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "seed": lambda pipe: {"generator": torch.Generator().manual_seed(9)},
    "text": lambda pipe: {"prompt_embeds": arguments()["prompt_embeds"] + 1},
    "guidance": lambda pipe: {"guidance_scale": 4.0},
    "steps": lambda pipe: {"num_inference_steps": STEPS + 1},
    "size": lambda pipe: {"height": 48},
    "weights": lambda pipe: pipe.transformer.proj_out.bias.data.add_(1e-3) is None or {},
    "scheduler": lambda pipe: (
        setattr(pipe, "scheduler", pipe.scheduler.from_config(pipe.scheduler.config, solver_order=3)) or {}
    ),
    "tiling": lambda pipe: pipe.vae.enable_tiling() or {},
    "accelerated": lambda pipe: accelerate(pipe) and {},
    "threads": lambda pipe: torch.set_num_threads(torch.get_num_threads() % 2 + 1) or {},
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_request_is_another(name: str, cache: LatentCache) -> None:
    pipe, threads = WAN.pipe(), torch.get_num_threads()
    session = Session(pipe, cache)
    session.generate(**arguments())
    try:
        more = CHANGES[name](pipe)
        assert session.generate(**arguments(**more)).made > 0
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("cached", [False, True], ids=["alone", "cached"])
def test_resume_runs_the_remaining_steps(cached: bool, cache: LatentCache) -> None:
    pipe = WAN.pipe()
    session, counted = Session(pipe, cache if cached else None), Counted(pipe)
    first = session.generate(**arguments())
    whole = counted.calls
    for step in range(STEPS + 1):
        before = counted.calls
        other = session.resume(first, step, guidance=3.0)
        assert (counted.calls - before) * STEPS == whole * (STEPS - step)
        assert other.made == STEPS - step and other.kept == tuple(range(step + 1, STEPS + 1))
        assert other.state(step) is not None and torch.equal(other.latents, first.latents) == (step == STEPS)
    # from the first step on it is the whole sampling with that guidance
    assert torch.equal(
        session.resume(first, 0, guidance=3.0).latents, session.generate(**arguments(guidance_scale=3.0)).latents
    )


def test_resume_without_a_change_has_the_same_bits() -> None:
    session = Session(WAN.pipe())
    first = session.generate(**arguments())
    for step in range(STEPS + 1):
        again = session.resume(first, step)
        assert again.request is first.request and torch.equal(again.latents, first.latents)


@pytest.mark.parametrize("keep", [2, 3, Budget(1)], ids=["every 2nd", "every 3rd", "one"])
def test_steps_that_were_not_kept_are_run_again(keep: Any) -> None:
    pipe = WAN.pipe()
    session, full = Session(pipe, keep=keep), Session(pipe).generate(**arguments())
    first = session.generate(**arguments())
    assert STEPS in first.kept and len(first.kept) < STEPS
    for step in range(STEPS + 1):
        assert torch.equal(session.resume(first, step).latents, full.latents)


def test_a_budget_is_kept() -> None:
    pipe = WAN.pipe()
    states = [Session(pipe).generate(**arguments(num_inference_steps=16)).state(step) for step in (0, 16)]
    most = 30 * states[0].latents.nbytes
    made = Session(pipe, keep=Budget(most)).generate(**arguments(num_inference_steps=16))
    assert made.kept in ((0, 4, 8, 12, 16), (0, 8, 16))


def test_edits_of_edits(cache: LatentCache) -> None:
    pipe = WAN.pipe()
    from latentfast.recipe import Recipe, ToneMap

    session, alone = Session(pipe, cache), Session(pipe)
    recipe = Recipe([ToneMap(0.5)])
    results = []
    for each in (session, alone, session):
        first = each.generate(**arguments())
        second = each.resume(first, 2, recipe=recipe)
        state = first.state(2)
        edited = second.state(2)
        assert torch.equal(edited.latents, recipe.apply(state.latents))
        third = each.resume(second, 3, latents=second.state(3).latents * 0.5)
        assert third.state(1) is not None and torch.equal(third.state(1).latents, first.state(1).latents)
        assert torch.equal(third.state(2).latents, edited.latents)
        results.append(third)
    assert [x.made for x in results] == [1, 1, 0]
    assert all(torch.equal(x.latents, results[0].latents) for x in results)


def test_texts_are_encoded_once(cache: LatentCache) -> None:
    pipe = tiny.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    small = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 2.0}
    calls: list[None] = []
    pipe.text_encoder.register_forward_pre_hook(lambda *_: calls.append(None))
    for store in (cache, None):
        session = Session(pipe, store)
        calls.clear()
        first = session.generate("a red circle", **small)
        assert len(calls) == 2  # the negative one too
        session.resume(first, 1, guidance=3.0)
        session.generate("a red circle", seed=4, **small)
        assert len(calls) == 2
        other = session.resume(first, 1, prompt="a blue circle")
        assert len(calls) == 4 and not torch.equal(other.latents, first.latents)
        assert "encode_prompt" not in vars(pipe)
    plain = pipe("a red circle", generator=torch.Generator().manual_seed(0), output_type="latent", **small)[0]
    assert torch.equal(first.latents, plain)


def test_decode_is_the_pipelines() -> None:
    pipe = WAN.pipe()
    made = Session(pipe).generate(**arguments())
    wanted = pipe(**WAN.inputs(output_type="pt"))[0]
    frames = Session(pipe).decode(made)
    assert frames.dtype == torch.uint8 and frames.shape == (1, 9, 32, 32, 3)
    assert torch.equal(frames, (wanted.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2))
    early = Session(pipe).decode(made, 1)
    assert early.shape == frames.shape and not torch.equal(early, frames)


@pytest.mark.parametrize("name", ["wan", "wan-i2v", "ltx-condition", "cogvideox-dpm", "svd"])
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    case = BY_NAME[name]
    pipe = case.pipe()
    session = Session(pipe)
    first = session.generate(**arguments(case))
    made = session.resume(first, 2, latents=first.state(2).latents * 0.9)
    session.save(made, tmp_path / "run")
    other = Session(case.pipe())
    loaded = other.load(tmp_path / "run")
    assert torch.equal(loaded.latents, made.latents) and loaded.kept == made.kept
    for step in range(1, STEPS + 1):
        assert torch.equal(loaded.state(step).latents, made.state(step).latents)
        further = other.resume(loaded, step)
        assert torch.equal(further.latents, made.latents if step >= 2 else first.latents)
    found = session.replay(tmp_path / "run")
    assert found.same and not found.differences


def test_what_differs_is_said(tmp_path: Path) -> None:
    pipe = WAN.pipe()
    session = Session(pipe)
    session.save(session.generate(**arguments()), tmp_path / "run")
    file = tmp_path / "run" / "run.json"
    record = json.loads(file.read_text())
    record["versions"]["torch"] = "1.0"
    file.write_text(json.dumps(record))
    with torch.no_grad():
        pipe.transformer.proj_out.bias.add_(1)
    found = session.replay(file)
    assert not found.same
    assert any(line.startswith("versions.torch: 1.0 then,") for line in found.differences)
    assert any(line.startswith("pipeline.components.transformer.weights") for line in found.differences)


def test_what_is_damaged_is_not_loaded(tmp_path: Path) -> None:
    session = Session(WAN.pipe())
    session.save(session.generate(**arguments()), tmp_path / "run")
    file = tmp_path / "run" / "trajectory.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="is damaged"):
        session.load(tmp_path / "run")
    file.write_bytes(bytes(data[:1000]))
    with pytest.raises(ValueError, match="can't be read"):
        session.load(tmp_path / "run")
    with pytest.raises(ValueError, match="No such file"):
        session.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="is of WanPipeline, and the session's pipeline LTXPipeline"):
        Session(BY_NAME["ltx"].pipe()).load(tmp_path / "run")


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ramp = torch.linspace(0, 255, 40)
    clip = (ramp[:, None] * 0.5 + ramp * 0.5)[None, :, :, None].expand(12, 40, 40, 3) + torch.arange(12)[
        :, None, None, None
    ]
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    path.write_bytes(encode_mp4(clip.clamp(0, 255).to(torch.uint8)))
    return path


@pytest.mark.parametrize("name", ["wan", "ltx", "cogvideox-ddim"])
def test_from_video(name: str, video: Path, cache: LatentCache, tmp_path: Path) -> None:
    case = BY_NAME[name]
    pipe = case.pipe()
    session = Session(pipe, cache)
    given = {key: value for key, value in arguments(case).items() if key != "generator"}
    whole = session.generate(**given, seed=1)
    made = session.from_video(video, sigma=0.7, seed=1, **given)
    assert 0 < made.begin < STEPS and made.made == STEPS - made.begin
    assert session.from_video(video, sigma=1.0, seed=1, **given).begin == 0
    assert torch.equal(made.parent.state(0).latents, whole.state(0).latents)  # the noise of the seed
    assert made.state(made.begin).latents.shape == whole.latents.shape
    assert session.from_video(video, sigma=0.7, seed=1, **given).made == 0
    assert session.decode(made).shape[0] == 1
    session.save(made, tmp_path / "run")
    assert session.replay(tmp_path / "run").same
    # what follows is the sampling that begins there
    scheduler = pipe.scheduler
    if name == "wan":
        scheduler.set_timesteps(STEPS)
        scheduler.set_begin_index(made.begin)
        latents = made.state(made.begin).latents
        with torch.no_grad():
            for t in scheduler.timesteps[made.begin :]:
                cond, uncond = (
                    pipe.transformer(latents, t.expand(1), given[text], return_dict=False)[0]
                    for text in ("prompt_embeds", "negative_prompt_embeds")
                )
                latents = scheduler.step(uncond + 5.0 * (cond - uncond), t, latents, return_dict=False)[0]
        assert torch.equal(made.latents, latents)


def test_an_encoded_clip_decodes_to_itself(video: Path) -> None:
    """Of the embedded model, whose VAE was trained."""
    pipe = tiny.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    session = Session(pipe)
    small = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 20, "guidance_scale": 1.0}
    made = session.from_video(video, "a gray background", sigma=0.02, **small)
    assert made.steps - made.begin <= 2
    shown = ((read_frames(video, 5, 32, 32)[0].permute(1, 2, 3, 0) + 1) * 127.5).round()
    error = (session.decode(made)[0].float() - shown).abs().mean()
    assert error < 25, f"mean difference of {float(error)} of 255"


def test_an_interrupted_sampling_goes_on(cache: LatentCache) -> None:
    pipe = WAN.pipe()
    session, wanted = Session(pipe, cache), Session(pipe).generate(**arguments())

    def stop(step: int, steps: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.generate(**arguments(), on_step=stop)
    made = session.generate(**arguments())
    assert made.made == STEPS - 3 and made.kept == wanted.kept
    assert torch.equal(made.latents, wanted.latents)
    other = session.resume(made, 1, guidance=2.0)
    assert torch.equal(other.latents, Session(pipe).resume(wanted, 1, guidance=2.0).latents)


KILLED = """
import os, signal, sys, time, torch
from latentfast.cache import LatentCache
from latentfast.session import Session
from tests.integrations.pipelines import BY_NAME
torch.set_num_threads(1)
torch.backends.cudnn.allow_tf32 = False  # as conftest.py has it: a part of keys
case = BY_NAME["wan"]
session = Session(case.pipe(), LatentCache(sys.argv[1]))
given = {name: value for name, value in case.inputs().items() if name != "output_type"}
def die(step, steps):
    if step == 3:
        session.cache.flush()
        os.kill(os.getpid(), signal.SIGKILL)
session.generate(**given, on_step=die)
"""


def test_a_killed_process_leaves_what_was_finished(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=root, env=environment, timeout=120)
    assert done.returncode == -signal.SIGKILL
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with LatentCache(tmp_path) as cache:
            made = Session(WAN.pipe(), cache).generate(**arguments())
        assert made.made == STEPS - 3
        assert torch.equal(made.latents, Session(WAN.pipe()).generate(**arguments()).latents)
    finally:
        torch.set_num_threads(threads)


def test_a_callback_is_called_and_nothing_is_looked_up(cache: LatentCache) -> None:
    session = Session(WAN.pipe(), cache)
    seen: list[int] = []

    def shift(pipe: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(i)
        return {"latents": tensors["latents"] + 0.1}

    first = session.generate(**arguments(callback_on_step_end=shift))
    again = session.generate(**arguments(callback_on_step_end=shift))
    assert first.made == again.made == STEPS and torch.equal(first.latents, again.latents)
    assert seen == [*range(STEPS)] * 2
    seen.clear()
    assert torch.equal(session.resume(first, 2).latents, first.latents) and seen == [2, 3]
    with pytest.raises(ValueError, match="can't be written"):
        session.save(first, "nowhere")


def test_bad_requests(cache: LatentCache, tmp_path: Path) -> None:
    pipe = WAN.pipe()
    session = Session(pipe, cache)
    with pytest.raises(ValueError, match="keep must be 'all', a number of steps from 1, or a Budget, got 0"):
        Session(pipe, keep=0)
    with pytest.raises(ValueError, match="nbytes must be above 0, got 0"):
        Budget(0)
    with pytest.raises(ValueError, match="pipe must take callback_on_step_end, DDIMPipeline does not"):
        Session(diffusers.DDIMPipeline(unet=None, scheduler=diffusers.DDIMScheduler()))
    with pytest.raises(TypeError, match="strength is no argument of WanPipeline's call"):
        session.generate(**arguments(strength=1))
    with pytest.raises(TypeError, match="output_type is the session's own"):
        session.generate(**arguments(), output_type="pil")
    made = session.generate(**arguments())
    for step in (-1, STEPS + 1, True, 1.0):
        with pytest.raises(ValueError, match=r"step must be a number in \[0, 4\], got"):
            session.resume(made, step)
    with pytest.raises(ValueError, match="beside a recipe"):
        session.resume(made, 1, latents=made.latents, recipe=[1])
    with pytest.raises(ValueError, match="must keep their shape"):
        session.resume(made, 1, latents=made.latents[:, :2])
    with pytest.raises(ValueError, match=r"sigma must be in \(0, 1\], got 1.5"):
        session.from_video("x.mp4", sigma=1.5)
    (tmp_path / "x.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="has no video that can be read"):
        session.from_video(tmp_path / "x.mp4", sigma=0.5, **arguments())


def test_weights_that_are_nowhere(cache: LatentCache, caplog: pytest.LogCaptureFixture) -> None:
    """As sequential offloading leaves them: the request can't be told from another, so it is made each time."""
    pipe = WAN.pipe()
    pipe.vae.to("meta")
    session = Session(pipe, cache)
    made = [session.generate(**arguments()) for _ in range(2)]
    assert [x.made for x in made] == [STEPS, STEPS] and torch.equal(made[0].latents, made[1].latents)
    assert "is not looked up" in caplog.text and "meta" in caplog.text
