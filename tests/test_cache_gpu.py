"""The cache with a GPU: nobody waits, streams are kept in order, budgets hold, captures are let alone."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from latentfast.cache import Key, LatentCache, digest_module, digest_tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
SHAPE = (16, 9, 60, 104)  # 1.8 MB in bfloat16: large enough for page-locked buffers
NBYTES = 16 * 9 * 60 * 104 * 2
#: Long enough for the host to do all that a test does in the meantime: about half a second.
LONG = 1_000_000_000


def key(name: object) -> Key:
    return Key.of({"name": str(name)})


def latents(seed: int) -> torch.Tensor:
    draw = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(SHAPE, device="cuda", dtype=torch.bfloat16, generator=draw)


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(params=[0, 4 * NBYTES], ids=["passing through", "staying"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LatentCache]:
    """With a device's tier that keeps nothing, and with one for four entries."""
    with LatentCache(tmp_path, device_bytes=request.param, host_bytes=16 * NBYTES) as made:
        yield made


def test_the_bits_come_back_on_either_side(cache: LatentCache) -> None:
    tensors = {
        "x": latents(1),
        "odd": torch.arange(7, device="cuda", dtype=torch.int8),
        "t": latents(2).transpose(0, 3),
    }
    cache.put(key("a"), tensors)
    for flush in (False, True):
        if flush:
            assert cache.flush()
        for device in ("cuda", "cpu", torch.device("cuda", torch.cuda.current_device())):
            found = cache.get(key("a"), device=device)
            assert list(found) == ["odd", "t", "x"]
            for name, x in found.items():
                assert x.device.type == torch.device(device).type and x.is_contiguous()
                assert torch.equal(x.cuda(), tensors[name])


def test_entries_from_the_disk_reach_the_gpu(tmp_path: Path) -> None:
    with LatentCache(tmp_path) as cache:
        for i in range(6):
            cache.put(key(i), {"x": latents(i)})
    for options in ({"host_bytes": 0}, {"device_bytes": 3 * NBYTES, "host_bytes": 3 * NBYTES}, {"host_bytes": 1 << 30}):
        with LatentCache(tmp_path, **options) as cache:
            for _ in range(2):
                for i in range(6):
                    assert torch.equal(cache.get(key(i), device="cuda")["x"], latents(i))
            assert cache.stats().device.bytes <= options.get("device_bytes", 0)
            assert cache.stats().host.bytes <= options["host_bytes"]


def test_nobody_waits_for_the_device(tmp_path: Path) -> None:
    x, out = latents(1), []
    with LatentCache(tmp_path, device_bytes=8 * NBYTES, host_bytes=8 * NBYTES) as cache:
        cache.put(key("warm"), {"x": x})
        cache.flush()
        cache.get(key("warm"), device="cuda")
        torch.cuda.synchronize()
        with waiting_is_an_error():
            torch.cuda._sleep(LONG)
            working = torch.cuda.Event()
            working.record()
            cache.put(key("new"), {"x": x})
            out += [cache.get(key(name), device="cuda")["x"] for name in ("warm", "new")]
            out += [cache.get(key("new"), device="cuda", copy=False)["x"]]
            assert not working.query(), "the host has waited"
        assert cache.stats().pending == 1
        assert all(torch.equal(each, x) for each in out)
        assert cache.flush()
    with LatentCache(tmp_path, host_bytes=8 * NBYTES) as cache:
        cache.prefetch([key("warm")])
        while not cache.stats().host.entries:
            time.sleep(0.001)
        with waiting_is_an_error():
            torch.cuda._sleep(LONG)
            working.record()
            found = cache.get(key("warm"), device="cuda")["x"]  # from host memory, on the way up
            assert not working.query(), "the host has waited"
        assert torch.equal(found, x)


def test_what_is_put_is_what_the_stream_had_computed(cache: LatentCache) -> None:
    """Written before and after in the same stream, while the device is far behind."""
    x = torch.zeros(SHAPE, device="cuda", dtype=torch.bfloat16)
    for i in range(6):
        torch.cuda._sleep(LONG // 50)
        x.fill_(i)
        cache.put(key(i), {"x": x})
        x.fill_(-1)
    got = {i: cache.get(key(i), device="cuda")["x"] for i in range(6)}
    assert cache.flush()
    for i in range(6):
        assert got[i].eq(i).all() and cache.get(key(i))["x"].eq(i).all()


def test_streams_of_all_kinds_are_kept_in_order(tmp_path: Path) -> None:
    """Two streams put and get with little room, and memory that is let go is used again at once."""
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    draw = torch.Generator().manual_seed(3)
    wrong = torch.zeros((), device="cuda", dtype=torch.int64)
    torch.cuda.synchronize()
    with LatentCache(tmp_path, device_bytes=2 * NBYTES, host_bytes=5 * NBYTES) as cache:
        for step in range(300):
            i, which = (int(torch.randint(0, n, (), generator=draw)) for n in (8, 2))
            with torch.cuda.stream(streams[which]):
                if step % 7 == 0:
                    torch.cuda._sleep(LONG // 2000)
                found = cache.get(key(i), device="cuda", copy=bool(step % 2))
                if found is None:
                    x = torch.full(SHAPE, float(i), device="cuda", dtype=torch.bfloat16)
                    cache.put(key(i), {"x": x})
                    x.fill_(-1)
                else:
                    here = found["x"].ne(i).sum()
                    streams[1 - which].wait_stream(streams[which])
                    with torch.cuda.stream(streams[1 - which]):
                        here.record_stream(streams[1 - which])
                        wrong += here
                    streams[which].wait_stream(streams[1 - which])
                # what comes next takes memory that has just become free
                torch.empty(SHAPE, device="cuda", dtype=torch.bfloat16).fill_(-2)
            stats = cache.stats()
            assert stats.device.bytes <= 2 * NBYTES and stats.host.bytes <= 5 * NBYTES
        torch.cuda.synchronize()
        assert wrong.item() == 0
        assert cache.stats().device.hits > 20 and cache.stats().evictions > 20


def test_host_buffers_are_page_locked_and_used_again(tmp_path: Path) -> None:
    with LatentCache(host_bytes=3 * NBYTES) as cache:
        for i in range(3):
            cache.put(key(i), {"x": latents(i)})
        cache.flush()
        tier = cache._tiers.host
        buffers = {slot.filled().data_ptr() for slot in tier.slots.values()}
        assert len(buffers) == 3 and all(slot.filled().is_pinned() for slot in tier.slots.values())
        for i in range(3, 9):
            cache.put(key(i), {"x": latents(i)})
        cache.flush()
        assert {slot.filled().data_ptr() for slot in tier.slots.values()} == buffers
        assert all(torch.equal(cache.get(key(i), device="cuda")["x"], latents(i)) for i in range(6, 9))


def test_a_device_without_memory_passes_entries_to_the_host(
    cache: LatentCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(nbytes: int, device: torch.device) -> torch.Tensor:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr("latentfast.cache.tiers.device_memory", none_left)
    cache.put(key("a"), {"x": latents(1)})
    assert cache.flush()
    assert cache.stats().device.bytes == 0 and torch.equal(cache.get(key("a"))["x"], latents(1).cpu())


def test_a_capture_is_let_alone(cache: LatentCache) -> None:
    """Neither does a put inside keep the graph's memory, nor does the work in the background spoil the capture."""
    x = latents(1)
    static = x.clone()
    meanwhile = [torch.full((100_000 + i,), float(i)) for i in range(4)]  # no buffer serves the next: all are new

    def others() -> None:
        for i, each in enumerate(meanwhile):
            cache.put(key(f"meanwhile {i}"), {"x": each})

    cache.put(key("before"), {"x": x})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = static * 2
        thread = threading.Thread(target=others)
        thread.start()
        thread.join()
        cache.put(key("inside"), {"x": y})
        assert cache.get(key("before"), device="cuda") is None
        y = y + 1
    graph.replay()
    assert cache.flush()
    assert torch.equal(y, x * 2 + 1)
    assert cache.get(key("inside")) is None and torch.equal(cache.get(key("before"), device="cuda")["x"], x)
    assert all(torch.equal(cache.get(key(f"meanwhile {i}"))["x"], each) for i, each in enumerate(meanwhile))


def test_what_making_takes_is_the_devices_time(cache: LatentCache) -> None:
    def make() -> dict[str, torch.Tensor]:
        torch.cuda._sleep(LONG // 5)
        return {"x": latents(1)}

    with waiting_is_an_error():
        made = cache.get_or_make(key("a"), make, device="cuda")
    assert cache.flush() and torch.equal(made["x"], latents(1))
    # 0.2e9 cycles take 0.1 s at 2 GHz; launching them takes microseconds
    assert cache.entries()[0].seconds > 0.03
    cache.get_or_make(key("a"), make, device="cuda")
    assert cache.stats().seconds_saved == cache.entries()[0].seconds


def test_prefetch_goes_up_to_the_gpu(tmp_path: Path) -> None:
    with LatentCache(tmp_path) as cache:
        for i in range(5):
            cache.put(key(i), {"x": latents(i)})
    with LatentCache(tmp_path, device_bytes=3 * NBYTES) as cache:
        cache.prefetch([key(i) for i in range(5)], device="cuda")
        end = time.monotonic() + 30
        while cache.stats().device.entries < 3 and time.monotonic() < end:
            time.sleep(0.001)
        assert all(torch.equal(cache.get(key(i), device="cuda")["x"], latents(i)) for i in range(3))
        assert cache.stats().device.hits == 3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_two_devices_have_tiers_of_their_own(tmp_path: Path) -> None:
    with LatentCache(tmp_path, device_bytes=2 * NBYTES) as cache:
        for i in range(4):
            cache.put(key(i), {"x": latents(i).to(f"cuda:{i % 2}")})
        for device in ("cuda:1", "cuda:0"):
            for i in range(4):
                found = cache.get(key(i), device=device)["x"]
                assert found.device == torch.device(device) and torch.equal(found.cpu(), latents(i).cpu())
        assert cache.flush() and cache.stats().device.budget == 4 * NBYTES


def test_digests_are_those_of_the_cpu() -> None:
    x = latents(1)
    assert digest_tensor(x) == digest_tensor(x.cpu())
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(33, 65), torch.nn.LayerNorm(65))
    expected = digest_module(module)
    module.cuda()
    assert digest_module(module) == expected
    module[0].weight.data[3, 3] += 1
    assert digest_module(module) != expected
