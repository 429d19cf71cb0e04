"""What is handed on behind a device's work: a device that writes down what its streams are given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from latentfast.integrations.diffusers import behind
from latentfast.integrations.diffusers.behind import Behind

GPU = torch.device("cuda", 0)


class Stream:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def work(self, what: str) -> None:
        self.log.append(f"{self.name}: {what}")

    def wait_event(self, event: Event) -> None:
        self.work(f"wait for {event.after}")


class Event:
    """Stands for what its stream was given last."""

    after = ""

    def record(self, stream: Stream) -> None:
        own = [line for line in stream.log if line.startswith(stream.name)]
        self.after = own[-1].split(": ")[1]


class Device:
    """Two streams and what they were given, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.main, self.aside = Stream(self.log, "main"), Stream(self.log, "aside")
        self.current = self.main

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    for name, value in {
        "Event": Event,
        "stream": made.stream,
        "current_stream": lambda device: made.current,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(behind, "_stream", lambda device: made.aside)
    return made


def test_states_are_received_behind_the_next_forward(device: Device) -> None:
    """In a stream of their own, after the step that made them and not after what was queued since."""
    states = Behind[int](lambda state: device.current.work(f"copy {state}"))
    for step in range(3):
        device.main.work(f"forward {step}")
        states.hand_on()
        device.main.work(f"step {step}")
        states.take(step, GPU)
    states.finish()
    assert device.log == [
        "main: forward 0",
        "main: step 0",
        "main: forward 1",
        "aside: wait for step 0",
        "aside: copy 0",
        "main: step 1",
        "main: forward 2",
        "main: wait for copy 0",  # before the memory of the state is anybody else's
        "aside: wait for step 1",
        "aside: copy 1",
        "main: step 2",
        "main: wait for copy 1",
        "aside: wait for step 2",
        "aside: copy 2",
        "main: wait for copy 2",
    ]


def test_all_are_handed_on_once_and_in_order_whenever_they_are_asked_for(device: Device) -> None:
    received: list[int] = []
    states = Behind[int](received.append)
    device.main.work("step")
    device.aside.work("something")
    states.hand_on()
    states.take(0, GPU)
    assert received == []
    states.take(1, GPU)  # nobody said that the device is busy
    assert received == [0]
    states.hand_on()
    states.hand_on()
    states.finish()
    assert received == [0, 1]


def test_on_the_cpu_nothing_waits() -> None:
    received: list[int] = []
    states = Behind[int](received.append)
    states.take(0, torch.device("cpu"))
    assert received == [0]
    states.finish()
    assert received == [0]


def test_what_a_receiver_raises_comes_out_once(device: Device) -> None:
    def fail(state: int) -> None:
        raise OSError("no room")

    states = Behind[int](fail)
    device.main.work("step")
    device.aside.work("something")
    states.take(0, GPU)
    with pytest.raises(OSError, match="no room"):
        states.hand_on()
    states.finish()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_a_gpu_keeps_a_state_while_it_computes_the_next() -> None:
    x = torch.full((1 << 20,), 3.0, device="cuda")
    hosts = torch.zeros(2, 1 << 20).pin_memory()
    there = torch.cuda.Event()

    def receive(state: torch.Tensor) -> None:
        hosts[0].copy_(state, non_blocking=True)
        hosts[1].copy_(state.clone(), non_blocking=True)
        there.record()

    states = Behind[torch.Tensor](receive)
    states.take(x, x.device)
    states.finish()  # what is made at its first use (a stream, its memory, a kernel) waits for all streams
    torch.cuda.synchronize()
    hosts.zero_()
    states.take(x, x.device)
    device = x.device
    torch.cuda._sleep(1_000_000_000)  # half a second: the forward
    working = torch.cuda.Event()
    working.record()
    states.hand_on()
    there.synchronize()
    assert not working.query(), "the copies have waited for what came after the state"
    del x
    states.finish()
    torch.full((1 << 20,), -1.0, device=device)
    torch.cuda.synchronize()
    assert (hosts == 3).all()
