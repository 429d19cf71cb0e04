"""`PreviewEngine`: the newest state wins, previews fit a budget, consumers hold nothing up, and all of it ends."""

import asyncio
import gc
import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import latentfast
from latentfast import tiny
from latentfast.integrations.diffusers.sampling import starting_noise
from latentfast.preview import (
    Budget,
    PreviewEngine,
    PreviewError,
    Quality,
    RGBRenderer,
    Subscription,
    qualities,
)
from tests.helpers import Target

# Long enough for a busy machine; a test that passes waits for nothing like it.
PATIENCE = 30.0
SHAPE = (1, 3, 4, 2, 3)


class Shades:
    """Frames of one shade, the parameter's; `gate` holds up what is rendered, `seen` is what was."""

    def __init__(self) -> None:
        self.gate, self.begun = threading.Event(), threading.Event()
        self.gate.set()
        self.seen: list[tuple[object, int, tuple[int, ...]]] = []

    def edited(self, latents: Tensor, parameters: object) -> Tensor:
        return latents

    def render(self, latents: Tensor, parameters: object, *, every: int, out: Tensor) -> None:
        self.begun.set()
        assert self.gate.wait(PATIENCE)
        if isinstance(parameters, Exception):
            raise parameters
        self.seen.append((parameters, every, tuple(out.shape)))
        out.fill_(parameters)


def until(previews: Subscription, right: Callable[[object], bool]):
    """The next preview that is right."""
    deadline = time.monotonic() + PATIENCE
    while True:
        preview = previews.get(timeout=max(0.0, deadline - time.monotonic()))
        assert preview is not None
        if right(preview):
            return preview


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def number_is(number: int) -> Callable[[object], bool]:
    return lambda preview: preview.number == number


# --- What it shows ----------------------------------------------------------------------------------------------------


def test_frames_are_those_of_the_operations(target: Target) -> None:
    z, b = torch.randn(2, 1, 3, 4, 5, 6, device=target.device)
    weight, bias = torch.eye(3), torch.zeros(3)
    renderer = RGBRenderer(weight, bias, edit=lambda latents, t: latentfast.slerp(latents, b, t))
    factors = weight.to(target.device), bias.to(target.device)
    expected = latentfast.latent_to_rgb(latentfast.slerp(z, b, 0.25), *factors, size=(40, 48)).cpu()
    with PreviewEngine(z, renderer, 0.25, budget=PATIENCE) as engine:
        preview = engine.subscribe().get(PATIENCE)
    assert preview.frames.device.type == "cpu"
    assert preview.frames.shape == (1, 4, 40, 48, 3)
    assert torch.equal(preview.frames, expected)
    assert (preview.number, preview.parameters, preview.exact, preview.every) == (1, 0.25, False, 1)


def test_another_source_of_another_size() -> None:
    with PreviewEngine(torch.zeros(SHAPE), Shades(), 1, scale=2, budget=PATIENCE) as engine:
        previews = engine.subscribe()
        assert previews.get(PATIENCE).frames.shape == (1, 4, 4, 6, 3)
        number = engine.update(source=torch.zeros(2, 3, 1, 5, 5))
        assert until(previews, number_is(number)).frames.shape == (2, 1, 10, 10, 3)


def test_a_preview_keeps_its_frames() -> None:
    with PreviewEngine(torch.zeros(SHAPE), Shades(), 1, budget=PATIENCE, idle=PATIENCE) as engine:
        previews = engine.subscribe()
        kept = [previews.get(PATIENCE)]
        for shade in range(2, 8):
            kept.append(until(previews, number_is(engine.update(shade))))
    assert [int(preview.frames.float().mean()) for preview in kept] == list(range(1, 8))


def test_encoded_beside_the_frames() -> None:
    with PreviewEngine(torch.zeros(SHAPE), Shades(), 7, encode=lambda frames: frames.sum().item()) as engine:
        preview = engine.subscribe().get(PATIENCE)
    assert preview.encoded == 7 * preview.frames.numel()


# --- The newest wins --------------------------------------------------------------------------------------------------


def test_ten_moves_while_one_is_rendered_give_the_last_alone() -> None:
    renderer = Shades()
    renderer.gate.clear()
    with PreviewEngine(torch.zeros(SHAPE), renderer, 0, budget=PATIENCE, idle=PATIENCE) as engine:
        previews = engine.subscribe()
        assert renderer.begun.wait(PATIENCE)
        last = [engine.update(shade) for shade in range(1, 11)][-1]
        renderer.gate.set()
        assert int(until(previews, number_is(last)).frames.max()) == 10
    assert [shade for shade, _, _ in renderer.seen] == [0, 10]


def test_a_source_that_is_not_wanted_any_more_is_never_made() -> None:
    renderer, made = Shades(), []
    renderer.gate.clear()

    def source(name: int) -> Callable[[], Tensor]:
        return lambda: made.append(name) or torch.zeros(SHAPE)

    with PreviewEngine(torch.zeros(SHAPE), renderer, 1, idle=PATIENCE) as engine:
        previews = engine.subscribe()
        assert renderer.begun.wait(PATIENCE)
        last = [engine.update(source=source(name)) for name in range(5)][-1]
        renderer.gate.set()
        until(previews, number_is(last))
    assert made == [4]


def test_nothing_is_rendered_for_nobody() -> None:
    renderer = Shades()
    with PreviewEngine(torch.zeros(SHAPE), renderer, 1, idle=0.01) as engine:
        for shade in range(20):
            engine.update(shade)
        time.sleep(0.1)
        assert renderer.seen == []
        previews = engine.subscribe()
        assert previews.get(PATIENCE).parameters == 19
        del previews  # a consumer that is gone without a word
        gc.collect()
        wait_for(lambda: not engine._subscriptions)
        count = len(renderer.seen)
        engine.update(1)
        time.sleep(0.1)
        assert len(renderer.seen) == count


def test_a_slow_consumer_holds_up_neither_the_engine_nor_others() -> None:
    with PreviewEngine(torch.zeros(SHAPE), Shades(), 0, budget=PATIENCE, idle=PATIENCE) as engine:
        slow, quick = engine.subscribe(), engine.subscribe()
        for shade in range(50):
            number = engine.update(shade)
            until(quick, number_is(number))
        assert slow.get(PATIENCE).number == number  # not one of the 49 that it missed


def test_many_threads_move_and_look() -> None:
    with PreviewEngine(torch.zeros(SHAPE), Shades(), 0, budget=PATIENCE, idle=0.001) as engine:
        ends: list[int] = []

        def work(seed: int) -> None:
            with engine.subscribe() as previews:
                for step in range(40):
                    number = engine.update((seed * 40 + step) % 256)
                    until(previews, lambda preview, least=number: preview.number >= least)
                ends.append(seed)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert sorted(ends) == [0, 1, 2, 3]
        assert engine.stats().updates == 161


# --- Budget and refinement --------------------------------------------------------------------------------------------


def test_budget_takes_the_best_quality_that_is_in_time() -> None:
    choices = qualities((64, 64), 8)
    budget = Budget(0.1, choices, 8)
    assert budget.choose() == choices[0] == Quality((64, 64))
    budget.took(choices[0], 0.3)  # six times what a preview may take
    chosen = budget.choose()
    assert chosen == Quality((32, 32), 2)  # an eighth of the pixels; a quarter would take 0.075 s
    budget.took(chosen, 0.01)
    assert budget.choose() == chosen
    for _ in range(20):
        budget.took(choices[0], 0.01)  # the machine has become faster
    assert budget.choose() == choices[0]


def test_the_last_resort_is_small() -> None:
    choices = qualities((64, 64), 8)
    budget = Budget(1e-9, choices, 8)
    budget.took(choices[0], 1.0)
    assert budget.choose() == choices[-1]


def test_qualities_of_tiny_clips() -> None:
    assert qualities((1, 1), 1) == [Quality((1, 1), 1)]
    assert all(min(quality.size) >= 1 and quality.frames(3) >= 1 for quality in qualities((3, 500), 3))


def test_small_while_it_moves_and_full_when_idle() -> None:
    class Slow(Shades):
        def render(self, latents: Tensor, parameters: object, *, every: int, out: Tensor) -> None:
            super().render(latents, parameters, every=every, out=out)
            time.sleep(out.numel() * 4e-6)  # 0.11 s in full

    renderer = Slow()
    with PreviewEngine(torch.zeros(1, 3, 4, 6, 6), renderer, 0, budget=0.1, idle=0.05) as engine:
        previews = engine.subscribe()
        assert previews.get(PATIENCE).frames.shape == (1, 4, 48, 48, 3)  # nothing was known
        number = engine.update(1)
        small = until(previews, number_is(number))
        assert small.frames.numel() <= 4 * 48 * 48 * 3 / 2
        full = until(previews, number_is(number))
        assert full.frames.shape == (1, 4, 48, 48, 3)


def test_the_true_decode_follows_when_nothing_moves() -> None:
    decoded: list[float] = []

    def decode(latents: Tensor, outdated: Callable[[], bool]) -> Tensor:
        decoded.append(float(latents.mean()))
        return torch.full((1, 9, 4, 4, 3), 9, dtype=torch.uint8)

    renderer = RGBRenderer(torch.eye(3), torch.zeros(3), edit=lambda latents, shift: latents + shift)
    with PreviewEngine(torch.zeros(SHAPE), renderer, 0.0, idle=0.05, decode=decode) as engine:
        previews = engine.subscribe()
        for step in range(5):
            number = engine.update(float(step))
        exact = until(previews, lambda preview: preview.exact)
        assert exact.number == number
        assert exact.frames.shape == (1, 9, 4, 4, 3)
        assert engine.stats().exact == 1
        late = engine.subscribe()
        assert late.get(PATIENCE).exact
    assert decoded == [4.0]


def test_a_decode_that_is_overtaken_is_told_and_not_shown() -> None:
    running, told = threading.Event(), threading.Event()

    def decode(latents: Tensor, outdated: Callable[[], bool]) -> Tensor:
        if not told.is_set():
            running.set()
            wait_for(outdated)
            told.set()
            raise InterruptedError  # what a decode does that gives up
        return torch.zeros(1, 9, 4, 4, 3, dtype=torch.uint8)

    with PreviewEngine(torch.zeros(SHAPE), Shades(), 0, idle=0.02, decode=decode) as engine:
        previews = engine.subscribe()
        assert running.wait(PATIENCE)
        number = engine.update(1)
        assert told.wait(PATIENCE)
        assert until(previews, lambda preview: preview.exact).number == number
        assert engine.stats().failures == 0


def test_what_sampling_passes_through_is_not_decoded() -> None:
    def decode(latents: Tensor, outdated: Callable[[], bool]) -> Tensor:
        raise AssertionError

    with PreviewEngine(None, Shades(), 0, idle=0.01, decode=decode) as engine:
        previews = engine.subscribe()
        engine.update(source=torch.zeros(SHAPE), final=False)
        previews.get(PATIENCE)
        time.sleep(0.1)
        assert (engine.stats().exact, engine.stats().failures) == (0, 0)


def test_stats_count_moves_and_their_seconds() -> None:
    with PreviewEngine(torch.zeros(SHAPE), Shades(), 0, budget=PATIENCE, idle=PATIENCE) as engine:
        assert engine.stats().quality is None
        previews = engine.subscribe()
        for shade in range(10):
            until(previews, number_is(engine.update(shade)))
        stats = engine.stats()
    assert stats.updates == 11
    assert 10 <= stats.previews <= 11
    assert 0 < stats.median <= stats.p99 < PATIENCE
    assert stats.rate > 0
    assert stats.quality == Quality((16, 24))


# --- Errors and the end -----------------------------------------------------------------------------------------------


def test_an_edit_that_fails_is_told_and_the_next_is_shown() -> None:
    with PreviewEngine(torch.zeros(SHAPE), Shades(), ValueError("no such clip"), idle=0.01) as engine:
        previews = engine.subscribe()
        with pytest.raises(PreviewError, match=r"update 1 can't be shown: no such clip") as caught:
            previews.get(PATIENCE)
        assert isinstance(caught.value.__cause__, ValueError)
        number = engine.update(3)
        assert until(previews, number_is(number)).parameters == 3
        assert engine.stats().failures == 1


def test_bad_input_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="budget must be above 0, got 0"):
        PreviewEngine(None, Shades(), budget=0)
    with PreviewEngine(None, Shades()) as engine:
        with pytest.raises(ValueError, match="source must be given with the first update"):
            engine.update(1)
        with pytest.raises(ValueError, match=r"source must be latents \(B, C, T, H, W\).*\(2, 3\)"):
            engine.update(source=torch.zeros(2, 3))
        with pytest.raises(TypeError, match="source must be a tensor or a function, got int"):
            engine.update(source=3)
        with pytest.raises(TimeoutError, match="no preview within"):
            engine.subscribe().get(timeout=0.01)


def test_after_the_end() -> None:
    before = threading.active_count()
    engine = PreviewEngine(torch.zeros(SHAPE), Shades(), 0, decode=lambda latents, outdated: latents)
    previews = engine.subscribe()
    waiting = threading.Thread(target=lambda: list(previews))
    waiting.start()
    engine.close()
    engine.close()
    waiting.join(PATIENCE)
    assert not waiting.is_alive()
    assert previews.get() is None
    assert threading.active_count() <= before
    for call in (engine.update, engine.subscribe):
        with pytest.raises(RuntimeError, match="closed"):
            call()


# --- In an event loop -------------------------------------------------------------------------------------------------


def test_async_consumers() -> None:
    async def watch(engine: PreviewEngine) -> int:
        with engine.subscribe() as previews:
            async for preview in previews:
                if preview.parameters == 30:
                    return preview.number
        return 0

    async def main() -> list[int]:
        with PreviewEngine(torch.zeros(SHAPE), Shades(), 0, budget=PATIENCE) as engine:
            watching = [asyncio.create_task(watch(engine)) for _ in range(3)]
            for shade in range(31):
                engine.update(shade)
                await asyncio.sleep(0.001)
            return await asyncio.wait_for(asyncio.gather(*watching), PATIENCE)

    assert asyncio.run(main()) == [32, 32, 32]


def test_an_async_loop_ends_with_the_engine_and_survives_a_cancelled_wait() -> None:
    async def main() -> int:
        engine = PreviewEngine(torch.zeros(SHAPE), Shades(), 0, budget=PATIENCE, idle=PATIENCE)
        previews = engine.subscribe()
        await anext(previews)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(previews), 0.02)
        assert not previews._waiting
        number = engine.update(1)
        assert (await asyncio.wait_for(anext(previews), PATIENCE)).number == number
        counting = asyncio.create_task(_count(previews))
        await asyncio.sleep(0.02)
        await asyncio.to_thread(engine.close)
        return await asyncio.wait_for(counting, PATIENCE)

    assert asyncio.run(main()) == 0


async def _count(previews: Subscription) -> int:
    return len([preview async for preview in previews])


def test_an_event_loop_that_is_gone_holds_nothing_up() -> None:
    with PreviewEngine(None, Shades(), 0, budget=PATIENCE) as engine:
        previews = engine.subscribe()
        loop = asyncio.new_event_loop()
        task = loop.create_task(_count(previews))
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.call_soon(loop.stop)
        loop.run_forever()
        loop.close()
        number = engine.update(source=torch.zeros(SHAPE))
        assert previews.get(PATIENCE).number == number
        task._log_destroy_pending = False  # it is meant to be left hanging


# --- Beside a pipeline ------------------------------------------------------------------------------------------------


def test_a_sampling_run_is_shown_clean_and_keeps_its_bits() -> None:
    pipe = tiny.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 4, "guidance_scale": 2.0}
    noise = starting_noise(pipe, call, torch.Generator().manual_seed(1))

    def run(**options: object) -> Tensor:
        return pipe("a red circle", latents=noise, output_type="latent", **call, **options).frames

    expected = run()
    shown: list[Tensor] = []

    class Watched(RGBRenderer):
        def render(self, latents: Tensor, parameters: object, **options) -> None:
            shown.append(latents)
            super().render(latents, parameters, **options)

    with PreviewEngine(None, Watched(*tiny.rgb_factors()), budget=PATIENCE, idle=PATIENCE) as engine:
        previews = engine.subscribe()
        show = engine.attach(pipe, noise=noise)

        def on_step(pipe, step, timestep, tensors):  # every step is looked at, however fast the model is
            result = show(pipe, step, timestep, tensors)
            preview = previews.get(PATIENCE)
            assert preview.number == step + 1
            return result

        latents = run(callback_on_step_end=on_step)
        assert preview_sizes(shown) == {(1, 16, 2, 8, 8)}
    assert torch.equal(latents, expected)
    assert len(shown) == 4
    # the noise is out of it from the first step on: what is shown has nothing of it, the latents nearly all
    noisy = [torch.corrcoef(torch.stack([x.flatten(), noise.flatten()]))[0, 1].abs() for x in shown]
    assert max(noisy) < 0.3
    assert torch.allclose(shown[-1], expected, atol=1e-5)  # the last step ends at no noise


def preview_sizes(shown: list[Tensor]) -> set[tuple[int, ...]]:
    return {tuple(latents.shape) for latents in shown}


def test_without_the_noise_the_first_step_is_not_shown() -> None:
    pipe = tiny.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    with PreviewEngine(None, RGBRenderer(*tiny.rgb_factors())) as engine:
        pipe(
            "a red circle", height=64, width=64, num_frames=5, num_inference_steps=2, guidance_scale=1.0,
            output_type="latent", callback_on_step_end=engine.attach(pipe),
        )  # fmt: skip
        assert engine.stats().updates == 1
