"""What follows from the state after any step has the bits of the sampling that was not interrupted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from latentfast import tiny
from latentfast.integrations.diffusers import accelerate
from latentfast.integrations.diffusers.behind import Behind
from latentfast.integrations.diffusers.steps import State, run_steps
from tests.integrations.pipelines import BY_NAME, CASES, Case

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
every_device = pytest.mark.parametrize("device", DEVICES)
accelerated = pytest.mark.parametrize("fast", [False, True], ids=["plain", "accelerated"])

#: Enough for a solver of order 3 to reach it, and to come down again at the end.
STEPS = 6


def flow(name: str, **options: Any) -> Callable[[], Any]:
    given = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0, **options}
    return lambda: getattr(diffusers, name)(**given)


def diffusion(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(diffusers, name)(prediction_type="v_prediction", timestep_spacing="trailing", **options)


DPM = {"solver_order": 2, "algorithm_type": "dpmsolver++"}
#: LTX hands its own noise levels to set_timesteps, which DPM++ and Heun of diffusers do not take; CogVideoX asks for
#: scale_model_input, which those for flows do not have.
SCHEDULERS: dict[str, dict[str, Callable[[], Any]]] = {
    "wan": {
        "flow-match-euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "stochastic-euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        "unipc-2": flow("UniPCMultistepScheduler", solver_order=2),
        "unipc-3": flow("UniPCMultistepScheduler", solver_order=3),
        "dpm++2m": flow("DPMSolverMultistepScheduler", **DPM),
        "deis": flow("DEISMultistepScheduler"),
        "heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
    },
    "ltx": {
        "flow-match-euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "unipc-2": flow("UniPCMultistepScheduler", solver_order=2, use_dynamic_shifting=True),
        "unipc-3": flow("UniPCMultistepScheduler", solver_order=3, use_dynamic_shifting=True),
    },
    "cogvideox-ddim": {
        "unipc-2": diffusion("UniPCMultistepScheduler", solver_order=2),
        "unipc-3": diffusion("UniPCMultistepScheduler", solver_order=3),
        "dpm++2m": diffusion("DPMSolverMultistepScheduler", **DPM),
        "sde-dpm++2m": diffusion("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++"),
        "euler-ancestral": diffusion("EulerAncestralDiscreteScheduler"),
    },
}
SOLVERS = [(pipeline, solver) for pipeline, solvers in SCHEDULERS.items() for solver in solvers]


def output(made: Any) -> Tensor:
    return torch.as_tensor(made[0])


def assert_same(a: Any, b: Any) -> None:
    """The same bits in all that two states have."""
    if isinstance(a, State):
        a, b = vars(a), vars(b)
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_same(a[name], b[name])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def check_every_step(pipe: Any, call: Callable[[], dict[str, Any]], model: str = "transformer") -> list[State]:
    """Resume after every step; compare the result, every state on the way, and how often the model was called."""
    torch.manual_seed(7)  # some pipelines don't hand their generator to the scheduler
    wanted = output(pipe(**call()))
    calls: list[None] = []
    hook = getattr(pipe, model).register_forward_pre_hook(lambda *_: calls.append(None))
    states: list[State] = []
    torch.manual_seed(7)
    made, steps = run_steps(pipe, call(), on_state=states.append)
    assert torch.equal(output(made), wanted)
    assert [state.step for state in states] == list(range(steps + 1))
    whole = len(calls)
    for state in states:
        calls.clear()
        followed: list[State] = []
        made, _ = run_steps(pipe, call(), start=state, on_state=followed.append)
        assert torch.equal(output(made), wanted), state.step
        assert [x.step for x in followed] == list(range(state.step + 1, steps + 1))
        assert len(calls) * steps == whole * (steps - state.step)
        for x in followed:
            assert_same(x, states[x.step])
    hook.remove()
    return states


class Late(Behind):
    """Hands states on as late as on a GPU, in the one stream that a CPU has."""

    def take(self, value: State, device: torch.device) -> None:
        self.hand_on()
        self.waiting = value

    def hand_on(self) -> None:
        if (value := vars(self).pop("waiting", None)) is not None:
            self._receive(value)


@accelerated
@pytest.mark.parametrize(("name", "solver"), SOLVERS)
def test_states_are_the_same_when_they_are_handed_on_late(
    name: str, solver: str, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they are on a GPU: nothing of a state is written into by the forward that follows."""
    case = BY_NAME[name]
    order: list[tuple[str, int]] = []
    found: dict[str, list[State]] = {}
    for when in ("at once", "late"):
        if when == "late":
            monkeypatch.setattr("latentfast.integrations.diffusers.steps.Behind", Late)
        pipe = case.pipe()
        pipe.scheduler = SCHEDULERS[name][solver]()
        if fast:
            accelerate(pipe, vae=False)
        forwards: list[None] = []
        pipe.transformer.register_forward_pre_hook(lambda *_, forwards=forwards: forwards.append(None))
        states = found[when] = []

        def keep(state: State, when: str = when, forwards: list[None] = forwards, states: list[State] = states) -> None:
            order.append((when, len(forwards)))
            states.append(copy.deepcopy(state))

        torch.manual_seed(7)
        run_steps(pipe, case.inputs(num_inference_steps=STEPS), on_state=keep)
    assert_same(found["late"], found["at once"])
    at_once, late = ([number for when, number in order if when == which] for which in ("at once", "late"))
    assert late == [*at_once[1:], at_once[-1]], "each state comes behind the next step's forward, the last at the end"


def test_an_interruption_hands_on_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentfast.integrations.diffusers.steps.Behind", Late)
    states: list[State] = []
    case = BY_NAME["wan"]
    with pytest.raises(ZeroDivisionError):
        run_steps(case.pipe(), case.inputs(), on_state=states.append, on_step=lambda step, steps: 1 // (step - 2))
    assert [state.step for state in states] == [0, 1, 2]


@accelerated
@every_device
@pytest.mark.parametrize(("name", "solver"), SOLVERS)
def test_every_step_of_every_solver(name: str, solver: str, device: str, fast: bool) -> None:
    case = BY_NAME[name]
    pipe = case.pipe(device)
    pipe.scheduler = SCHEDULERS[name][solver]()
    handle = accelerate(pipe, vae=False) if fast else None
    states = check_every_step(pipe, lambda: case.inputs(device, num_inference_steps=STEPS))
    assert all(state.x0 is not None for state in states[1:])
    if handle is not None:
        assert "steps are left" not in str(handle.report())


@accelerated
@every_device
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_step_of_every_pipeline(case: Case, device: str, fast: bool) -> None:
    pipe = case.pipe(device)
    if fast:
        accelerate(pipe, vae=False)
    if case.name == "wan-2.2":  # its second transformer takes some of the steps
        pipe.transformer_2 = pipe.transformer
    check_every_step(pipe, lambda: case.inputs(device), case.model)


def test_every_step_of_the_embedded_model() -> None:
    pipe = tiny.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    small = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 5, "guidance_scale": 2.0}

    def call() -> dict[str, Any]:
        seed = torch.Generator().manual_seed(3)
        return {"prompt": "a big red circle", "generator": seed, "output_type": "latent", **small}

    check_every_step(pipe, call)


def test_bfloat16_keeps_the_dtype_that_the_loop_had() -> None:
    case = BY_NAME["wan"]
    pipe = case.pipe(dtype=torch.bfloat16)
    pipe.scheduler = SCHEDULERS["wan"]["flow-match-euler"]()
    states = check_every_step(pipe, lambda: case.inputs(dtype=torch.bfloat16))
    # Wan begins in float32, and this scheduler's steps have the prediction's dtype
    assert [state.latents.dtype for state in states[:2]] == [torch.float32, torch.bfloat16]


def test_a_call_can_end_after_any_step() -> None:
    case = BY_NAME["wan"]
    pipe = case.pipe()
    states: list[State] = []
    run_steps(pipe, case.inputs(), on_state=states.append)
    for end in range(5):
        made, steps = run_steps(pipe, case.inputs(), end=end)
        assert steps == 4 and torch.equal(output(made), states[end].latents)
        made, _ = run_steps(pipe, case.inputs(), start=states[end // 2], end=end)
        assert torch.equal(output(made), states[end].latents)


def test_decoding_is_the_end_of_the_call() -> None:
    for case in CASES:
        pipe = case.pipe()
        wanted = pipe(**case.inputs(output_type="pt"))[0]
        states: list[State] = []
        run_steps(pipe, case.inputs(), on_state=states.append, wants=lambda step, steps: step == steps)
        made, _ = run_steps(pipe, case.inputs(output_type="pt"), start=states[-1])
        assert torch.equal(made[0], wanted), case.name


def test_callbacks_and_progress_count_in_the_whole(capsys: pytest.CaptureFixture[str]) -> None:
    case = BY_NAME["wan"]
    pipe = case.pipe()
    states: list[State] = []
    seen: list[tuple[int, float, int]] = []

    def see(pipe: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((i, float(t), pipe.num_timesteps))
        return {"latents": tensors["latents"] + 1} if i == 2 else {}

    run_steps(pipe, case.inputs(callback_on_step_end=see), on_state=states.append)
    whole = seen.copy()
    seen.clear()
    pipe.set_progress_bar_config(desc="sampling", mininterval=0)
    made, _ = run_steps(pipe, case.inputs(callback_on_step_end=see), start=states[2])
    assert seen == whole[2:]
    assert torch.equal(output(made), states[-1].latents)
    bar = capsys.readouterr().err
    assert "2/4" in bar and "4/4" in bar and "1/4" not in bar
    assert pipe._progress_bar_config == {"desc": "sampling", "mininterval": 0}


def test_what_was_borrowed_is_given_back() -> None:
    case = BY_NAME["wan"]
    pipe = case.pipe()
    scheduler, cls, config = pipe.scheduler, type(pipe.scheduler), dict(pipe.config)
    noise = torch.randn(1, 16, 3, 4, 4)
    before = noise.clone()
    states: list[State] = []
    run_steps(pipe, case.inputs(latents=noise), on_state=states.append)
    run_steps(pipe, case.inputs(latents=noise), start=states[2])
    with pytest.raises(ZeroDivisionError):
        run_steps(pipe, case.inputs(), on_step=lambda step, steps: 1 // (step - 2))
    assert torch.equal(noise, before)
    assert pipe.scheduler is scheduler and type(scheduler) is cls and "_sampling" not in vars(scheduler)
    assert dict(pipe.config) == config and not pipe.interrupt
    assert torch.equal(output(pipe(**case.inputs(latents=noise))), states[-1].latents)


def test_edited_latents_begin_a_solver_anew() -> None:
    """UniPC's corrector would put back what it remembers: the edit has to reach the result."""
    case = BY_NAME["wan"]
    pipe = case.pipe()
    states: list[State] = []
    run_steps(pipe, case.inputs(), on_state=states.append)
    edited = states[2].with_latents(states[2].latents + 1)
    made, _ = run_steps(pipe, case.inputs(), start=edited)
    # a fresh scheduler that begins in mid-trajectory, as diffusers' image-to-image pipelines do
    pipe.scheduler.set_timesteps(4)
    pipe.scheduler.set_begin_index(2)
    call, latents = case.inputs(), edited.latents
    for t in pipe.scheduler.timesteps[2:]:
        cond, uncond = (
            pipe.transformer(latents, t.expand(1), call[name], return_dict=False)[0]
            for name in ("prompt_embeds", "negative_prompt_embeds")
        )
        with torch.no_grad():
            latents = pipe.scheduler.step(uncond + 5.0 * (cond - uncond), t, latents, return_dict=False)[0]
    assert torch.equal(output(made), latents)


def test_bad_calls() -> None:
    case = BY_NAME["wan"]
    pipe = case.pipe()
    states: list[State] = []
    run_steps(pipe, case.inputs(), on_state=states.append)
    with pytest.raises(ValueError, match="are not among the 6 of this call"):
        run_steps(pipe, case.inputs(num_inference_steps=6), start=states[2])
    with pytest.raises(ValueError, match="are not among the 4 of this call"):
        run_steps(pipe, case.inputs(), end=5)
    with pytest.raises(ValueError, match=r"must keep their shape \(1, 16, 3, 4, 4\), got \(1, 2\)"):
        states[1].with_latents(torch.zeros(1, 2))
    pipe.scheduler = SCHEDULERS["wan"]["heun"]()
    run_steps(pipe, case.inputs(), on_state=states.append)
    with pytest.raises(ValueError, match="between the two halves"):
        next(x for x in states if x.steps == 7 and x.step == 1).with_latents(states[0].latents)
    with pytest.raises(ValueError, match="must have a scheduler and take"):
        run_steps(diffusers.DDIMPipeline(unet=None, scheduler=diffusers.DDIMScheduler()), {})


@pytest.mark.parametrize("solver", ["unipc-2", "dpm++2m"])
def test_a_state_has_what_its_solver_remembers_once(solver: str) -> None:
    """The clip that a prediction leads to is what these remember of it."""
    pipe = BY_NAME["wan"].pipe()
    pipe.scheduler = SCHEDULERS["wan"][solver]()
    states: list[State] = []
    run_steps(pipe, BY_NAME["wan"].inputs(), on_state=states.append)
    assert all(state.x0 is state.history["model_outputs"][-1] for state in states[1:])
