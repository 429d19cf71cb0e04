"""The device's tier without a GPU: host memory that says it is one. What streams and events do is in test_cache_gpu."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from latentfast.cache import Key, LatentCache

DEVICES = [torch.device("cuda", 0), torch.device("cuda", 1)]
NBYTES = 400


class Pretended(torch.Tensor):
    """A tensor that is on the first device, as are all that are made from it."""

    place = DEVICES[0]

    @property
    def device(self) -> torch.device:
        return self.place

    def record_stream(self, stream: object) -> None:
        assert isinstance(stream, Stream)


class Second(Pretended):
    """The same on the second one."""

    place = DEVICES[1]


KINDS = dict(zip(DEVICES, (Pretended, Second), strict=True))


class Stream:
    """Work in it is done when it is queued."""

    def __init__(self, device: torch.device = DEVICES[0]) -> None:
        self.device = device

    def wait_event(self, event: Event) -> None:
        assert event.recorded


class Event:
    """Waiting for it takes a moment, as for a device that is behind."""

    def __init__(self, **_: object) -> None:
        self.recorded = False

    def record(self, stream: Stream) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded
        time.sleep(0.001)


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the pretence in the place of what the cache calls."""
    streams = {where: Stream(where) for where in DEVICES}
    for name, value in {
        "Stream": Stream,
        "Event": Event,
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda where: contextlib.nullcontext(),
        "current_stream": lambda where: streams[where],
        "current_device": lambda: 0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr("latentfast.cache.tiers.device_memory", memory)
    monkeypatch.setattr("latentfast.cache.transfer.device_memory", memory)


def memory(nbytes: int, device: torch.device) -> torch.Tensor:
    room = torch.empty(nbytes + 512, dtype=torch.uint8)
    begin = -room.data_ptr() % 512  # where a device's allocator begins
    return room[begin : begin + nbytes].as_subclass(KINDS[device])


def key(name: object) -> Key:
    return Key.of({"name": str(name)})


def value(number: int, device: torch.device = DEVICES[0]) -> torch.Tensor:
    return torch.full((NBYTES // 4,), float(number)).as_subclass(KINDS[device])


def is_value(number: int, found: dict[str, torch.Tensor] | None, device: str | torch.device) -> bool:
    x = found["x"]
    where = torch.device(device)
    return x.device == (DEVICES[0] if where == torch.device("cuda") else where) and bool((x == number).all())


@pytest.fixture(params=[0, 3 * NBYTES], ids=["passing through", "staying"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LatentCache]:
    with LatentCache(tmp_path, device_bytes=request.param, host_bytes=6 * NBYTES) as made:
        yield made


def test_entries_go_down_and_come_up(cache: LatentCache) -> None:
    for i in range(12):
        x = value(i)
        cache.put(key(i), {"x": x})
        x.fill_(-1)
        assert is_value(i, cache.get(key(i), device="cuda"), "cuda")
    assert cache.flush()
    stats = cache.stats()
    assert stats.device.bytes == stats.device.budget and stats.host.bytes == 6 * NBYTES and stats.disk.entries == 12
    for device in ("cuda", "cpu", DEVICES[1]):
        for i in range(12):
            assert is_value(i, cache.get(key(i), device=device), device)
    assert cache.stats().misses == 0


def test_the_tier_answers_that_is_nearest(tmp_path: Path) -> None:
    with LatentCache(tmp_path, device_bytes=2 * NBYTES, host_bytes=4 * NBYTES) as cache:
        for i in range(6):
            cache.put(key(i), {"x": value(i)})
        cache.flush()
        hits = []
        for i in (5, 3, 3, 0, 0, 4):  # in the device's; in the host's, then in the device's; on the disk; let go above
            cache.get(key(i), device="cuda")
            stats = cache.stats()
            hits.append((stats.device.hits, stats.host.hits, stats.disk.hits))
        assert hits == [(1, 0, 0), (1, 1, 0), (2, 1, 0), (2, 1, 1), (3, 1, 1), (3, 2, 1)]


def test_what_is_shared_is_the_tiers_own_and_stays_while_it_is_held(cache: LatentCache) -> None:
    cache.put(key("a"), {"x": value(7)})
    cache.flush()
    shared = cache.get(key("a"), device="cuda", copy=False)["x"]
    again = cache.get(key("a"), device="cuda", copy=False)["x"]
    assert (shared.data_ptr() == again.data_ptr()) == (cache.stats().device.budget > 0)
    assert cache.get(key("a"), device="cuda")["x"].data_ptr() != shared.data_ptr()
    for i in range(10):
        cache.put(key(i), {"x": value(i)})
    cache.flush()
    assert shared.eq(7).all()


def test_a_later_put_wins_wherever_it_comes_from(cache: LatentCache) -> None:
    for i in range(20):
        x = value(i) if i % 3 else value(i).as_subclass(torch.Tensor)
        cache.put(key("a"), {"x": x})
        assert is_value(i, cache.get(key("a"), device=("cpu", "cuda")[i % 2]), ("cpu", "cuda")[i % 2])
    assert cache.flush()
    for device in ("cuda", "cpu", DEVICES[1]):
        assert is_value(19, cache.get(key("a"), device=device), device)
    cache.close()
    with LatentCache(cache._disk.path) as other:
        assert is_value(19, other.get(key("a")), "cpu")


def test_memory_alone_keeps_what_the_device_alone_has() -> None:
    with LatentCache(device_bytes=2 * NBYTES, host_bytes=0) as cache:
        for i in range(3):
            cache.put(key(i), {"x": value(i)})
        assert cache.flush() and cache.stats().pending == 0
        assert cache.get(key(0)) is None
        assert is_value(2, cache.get(key(2)), "cpu") and is_value(1, cache.get(key(1), device=DEVICES[1]), DEVICES[1])


def test_a_device_without_memory_passes_entries_to_the_host(
    cache: LatentCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(nbytes: int, device: torch.device) -> torch.Tensor:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr("latentfast.cache.tiers.device_memory", none_left)
    cache.put(key("a"), {"x": value(3)})
    assert cache.flush() and cache.stats().device.bytes == 0
    assert is_value(3, cache.get(key("a")), "cpu")


def test_a_copy_that_fails_is_a_miss_and_a_warning(
    cache: LatentCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self, slot, buffer):
        raise RuntimeError("the bus is gone")

    with monkeypatch.context() as broken:
        broken.setattr("latentfast.cache.transfer.Transfers.to_host", fail)
        cache.put(key("a"), {"x": value(3)})
        assert not cache.flush() and "the bus is gone" in caplog.text
    stats = cache.stats()
    assert stats.pending == 0 and stats.host.bytes == 0
    found = cache.get(key("a"), device="cuda")
    assert is_value(3, found, "cuda") if stats.device.budget else found is None


def test_mixed_devices_take_the_way_through_the_host(cache: LatentCache) -> None:
    cache.put(key("a"), {"x": value(1), "y": torch.ones(3), "z": value(2, DEVICES[1])})
    assert cache.flush()
    assert {name: x[0].item() for name, x in cache.get(key("a")).items()} == {"x": 1, "y": 1, "z": 2}


def test_prefetch_fills_the_devices_tier_and_no_more(tmp_path: Path) -> None:
    with LatentCache(tmp_path) as cache:
        for i in range(6):
            cache.put(key(i), {"x": value(i)})
    with LatentCache(tmp_path, device_bytes=4 * NBYTES) as cache:
        cache.prefetch([key(i) for i in range(6)], device="cuda")
        end = time.monotonic() + 30
        while cache.stats().device.entries < 4 and time.monotonic() < end:
            time.sleep(0.002)
        assert all(is_value(i, cache.get(key(i), device="cuda"), "cuda") for i in range(6))
        assert cache.stats().device.hits == 4


@pytest.mark.parametrize("budgets", [(0, 0), (0, 3), (2, 0), (2, 3), (5, 1)], ids=str)
def test_threads_on_two_devices_and_little_room(tmp_path: Path, budgets: tuple[int, int]) -> None:
    """Budgets hold at every moment, values are right, everything comes to an end."""
    wrong: list[str] = []
    on_device, on_host = (count * NBYTES for count in budgets)

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(80):
            i, device = draw.randrange(8), draw.choice(["cpu", *DEVICES])
            action = draw.random()
            if action < 0.3:
                cache.put(
                    key(i), {"x": value(i, draw.choice(DEVICES)) if action < 0.2 else torch.full((100,), float(i))}
                )
            elif action < 0.4:
                cache.prefetch([key(i)], device=device)
            else:
                found = cache.get(key(i), device=device, copy=action < 0.9)
                if found is not None and not is_value(i, found, device):
                    wrong.append(f"entry {i} on {device}")
            stats = cache.stats()
            if stats.host.bytes > on_host + NBYTES or stats.device.bytes > 2 * (on_device + NBYTES):
                wrong.append(str(stats))

    with LatentCache(tmp_path, device_bytes=on_device, host_bytes=on_host, disk_bytes=6000) as cache:
        workers = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(5)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        assert not any(worker.is_alive() for worker in workers), "stuck"
        assert cache.flush() and not wrong
        time.sleep(0.05)  # copies up that nobody waits for
        with cache._tiers.changed:
            slots = [slot for tier in cache._tiers.everywhere() for slot in tier.slots.values()]
            assert not any(slot.pins for slot in slots), "a pin is left"
            assert all(
                tier.used == sum(slot.nbytes for slot in tier.slots.values()) for tier in cache._tiers.everywhere()
            )
