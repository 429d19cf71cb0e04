"""The cache as its users see it: keys, what put keeps and get gives, who waits for whom, statistics, neighbours."""

from __future__ import annotations

import inspect
import json
import re
import threading
import time
from pathlib import Path

import pytest
import torch

import latentfast.cache
from latentfast.cache import Key, LatentCache, environment

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.int64,
    torch.uint16,
    torch.int8,
    torch.bool,
]


def key(*names: object) -> Key:
    return Key.of({"names": [str(name) for name in names]})


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """NaN is equal to itself here, and -0.0 is not 0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    left, right = (x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return torch.equal(left, right)


@pytest.fixture(params=["memory", "folder", "folder alone"])
def cache(request: pytest.FixtureRequest, tmp_path: Path):
    """With the host's tier, with both, and with a host's tier that keeps nothing."""
    path = None if request.param == "memory" else tmp_path / "cache"
    with LatentCache(path, host_bytes=0 if request.param == "folder alone" else 1 << 24) as made:
        yield made


# -- keys -------------------------------------------------------------------------------------------------------------


def test_a_key_is_its_description_whatever_the_order() -> None:
    one = Key.of({"b": [1, 2.5], "a": {"y": None, "x": True}})
    two = Key.of({"a": {"x": True, "y": None}, "b": (1, 2.5)})
    assert one == two and one.digest == two.digest and hash(one) == hash(two)
    assert one.description == {"a": {"x": True, "y": None}, "b": [1, 2.5]}
    assert Key.of_canonical(one.canonical) == one


def test_what_differs_has_another_key() -> None:
    values = [1, 1.0, True, "1", None, [1], {"1": 1}, 0.0, -0.0, 0.1, 0.1 + 2**-56, "a", "á", "a\u0301", 2**53 + 1]
    digests = {Key.of({"value": value}).digest for value in values}
    assert len(digests) == len(values)


def test_the_digest_is_that_of_the_text() -> None:
    """As `printf … | sha256sum` gives it: it may not change between versions, folders would be lost."""
    assert Key.of({"seed": 3}).digest == "4d687b6437462c4d42e6b3ca5812976a72f39b30a2d78d5f5d1be4880f9aa5a5"


@pytest.mark.parametrize(
    ("description", "error", "says"),
    [
        ({"x": float("nan")}, ValueError, "description.x"),
        ({"x": [0, float("inf")]}, ValueError, r"description.x\[1\]"),
        ({"x": {1: 2}}, TypeError, "names must be text"),
        ({"x": torch.zeros(1)}, TypeError, "digest_tensor"),
        ({"x": b"bytes"}, TypeError, "bytes"),
        ([1], TypeError, "expected a mapping"),
    ],
)
def test_what_has_no_canonical_form_is_refused(description, error, says: str) -> None:
    with pytest.raises(error, match=says):
        Key.of(description)


def test_the_environment_can_be_part_of_a_key() -> None:
    before = Key.of(environment())
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert Key.of(environment()) != before  # sums on the CPU are split among threads
    finally:
        torch.set_num_threads(threads)
    assert Key.of(environment("cpu")) == before


# -- put and get ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_come_back(cache: LatentCache, dtype: torch.dtype) -> None:
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (3 * 5 * dtype.itemsize,), dtype=torch.uint8)
    tensors = {"odd": raw.view(dtype).view(3, 5), "empty": torch.empty(0, 7, dtype=dtype), "one": raw.view(dtype)[2]}
    cache.put(key(dtype), tensors)
    assert cache.flush()
    for _ in range(3):  # from the disk, into the tier, from the tier
        found = cache.get(key(dtype))
        assert list(found) == ["empty", "odd", "one"]
        assert all(same_bits(found[name], tensors[name]) and found[name].is_contiguous() for name in tensors)


def test_dtypes_lie_side_by_side(cache: LatentCache) -> None:
    tensors = {str(dtype): torch.arange(3).to(dtype) for dtype in DTYPES}
    cache.put(key("all"), tensors)
    assert cache.flush()
    assert all(same_bits(found, tensors[name]) for name, found in cache.get(key("all")).items())


def test_strides_gradients_and_modes_do_not_matter(cache: LatentCache) -> None:
    base = torch.randn(4, 6, dtype=torch.complex64)
    with torch.inference_mode():
        made = base * 2
        cache.put(key("inference"), {"x": made})
        inside = cache.get(key("inference"))
    cache.put(key("strides"), {"x": base.T[1:].conj(), "y": base.real.requires_grad_(), "z": base[:1].expand(3, 6)})
    assert cache.flush()
    found = cache.get(key("strides"))
    assert same_bits(found["x"], base.T[1:].conj().resolve_conj()) and same_bits(found["z"], base[:1].expand(3, 6))
    assert not found["y"].requires_grad
    for x in (inside, cache.get(key("inference"))):
        x["x"].add_(1)  # no inference tensor: whoever gets it may do with it what they like


def test_neither_side_sees_what_the_other_writes(cache: LatentCache) -> None:
    mine = torch.ones(1000)
    cache.put(key("x"), {"x": mine})
    mine.zero_()
    cache.flush()
    for _ in range(3):
        found = cache.get(key("x"))["x"]
        assert found.eq(1).all()
        found.fill_(7)


def test_a_later_put_takes_the_place(cache: LatentCache) -> None:
    for value in range(5):
        cache.put(key("x"), {"x": torch.full((100,), value)})
        assert cache.get(key("x"))["x"].eq(value).all()
    cache.flush()
    assert cache.get(key("x"))["x"].eq(4).all()


def test_what_was_not_put_is_a_miss(cache: LatentCache) -> None:
    assert cache.get(key("nothing")) is None and key("nothing") not in cache
    cache.put(key("x"), {})
    cache.flush()
    assert cache.get(key("x")) == {} and key("x") in cache
    assert cache.stats().misses == 1 and cache.stats().hits == 1


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"x": [1.0]}, "expected a tensor, got list"),
        ({1: torch.zeros(1)}, "names must be text"),
        ({"__metadata__": torch.zeros(1)}, "names must be text other"),
        ({"x": torch.zeros(1, device="meta")}, "on the meta device"),
        ({"x": torch.zeros(2, 2).to_sparse()}, "no place"),
        ({"x": torch.zeros(1, dtype=torch.complex128)}, "no place"),
        ([torch.zeros(1)], "expected a mapping"),
    ],
)
def test_what_cannot_be_kept_is_refused(cache: LatentCache, tensors, says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        cache.put(key("x"), tensors)
    assert cache.stats().pending == 0 and cache.get(key("x")) is None


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    for options, says in [
        ({"host_bytes": -1}, "host_bytes"),
        ({"disk_bytes": 1.5}, "disk_bytes"),
        ({"policy": "fifo"}, "policy: expected one of lru, cost, got 'fifo'"),
    ]:
        with pytest.raises(ValueError, match=says):
            LatentCache(**options)
    with LatentCache() as cache:
        with pytest.raises(TypeError, match="key: expected a Key"):
            cache.get({"seed": 3})
        with pytest.raises(ValueError, match="expected the CPU or a CUDA device"):
            cache.get(key("x"), device="meta")
        with pytest.raises(ValueError, match="all three or none"):
            cache.put(key("x"), {}, sigma=0.5)


def test_a_closed_cache_answers_nothing(tmp_path: Path) -> None:
    cache = LatentCache(tmp_path)
    cache.put(key("x"), {"x": torch.ones(3)})
    cache.close()
    cache.close()
    cache.put(key("y"), {"y": torch.ones(3)})
    assert cache.get(key("x")) is None and cache.flush()
    with LatentCache(tmp_path) as again:
        assert again.get(key("x"))["x"].eq(1).all() and again.get(key("y")) is None


def test_a_stranger_in_an_entrys_place_is_not_served(cache: LatentCache) -> None:
    """As if two descriptions had one SHA-256."""
    cache.put(key("x"), {"x": torch.ones(3)})
    cache.flush()
    impostor = Key('{"other":1}', key("x").digest)
    assert cache.get(impostor) is None
    assert cache.get(key("x")) is not None


def test_what_is_given_lies_as_memory_of_its_own_would(tmp_path: Path) -> None:
    """Matrix products of the same numbers have other bits where memory begins elsewhere."""
    tensors = {f"x{n}": torch.rand(n) for n in (1, 3, 7, 16, 64, 65, 100)} | {"text": torch.arange(13).to(torch.uint8)}
    with LatentCache(tmp_path / "cache") as cache:
        cache.put(key("odd"), tensors)
        cache.flush()
    for host_bytes in (0, 1 << 20):
        with LatentCache(tmp_path / "cache", host_bytes=host_bytes) as cache:
            for share in (False, True):
                found = cache.get(key("odd"), copy=not share)
                assert found is not None
                assert all(same_bits(found[name], x) for name, x in tensors.items())
                assert {name: x.data_ptr() % 64 for name, x in found.items()} == dict.fromkeys(tensors, 0)


# -- who waits for whom -----------------------------------------------------------------------------------------------


def test_get_or_make_makes_once(cache: LatentCache) -> None:
    made = []

    def make() -> dict[str, torch.Tensor]:
        made.append(threading.get_ident())
        time.sleep(0.05)
        return {"x": torch.arange(6.0).view(2, 3).T}

    found: list[dict[str, torch.Tensor]] = []
    askers = [threading.Thread(target=lambda: found.append(cache.get_or_make(key("x"), make))) for _ in range(8)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert len(made) == 1 and len(found) == 8
    assert all(same_bits(item["x"], torch.arange(6.0).view(2, 3).T) for item in found)
    assert len({item["x"].data_ptr() for item in found}) == 8
    stats = cache.stats()
    assert (stats.hits, stats.misses) == (7, 1)
    assert 7 * 0.05 <= stats.seconds_saved < 7 * 5


def test_an_error_in_making_is_the_callers_and_the_next_one_tries(cache: LatentCache) -> None:
    def fail() -> dict[str, torch.Tensor]:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        cache.get_or_make(key("x"), fail)
    with pytest.raises(TypeError, match="expected a tensor"):
        cache.get_or_make(key("x"), lambda: {"x": 3})
    assert cache.get_or_make(key("x"), lambda: {"x": torch.ones(1)})["x"].item() == 1


def test_what_is_larger_than_every_budget_is_still_given(tmp_path: Path) -> None:
    with LatentCache(tmp_path, host_bytes=10, disk_bytes=100) as cache:
        for i in range(2):
            assert cache.get_or_make(key(i), lambda: {"x": torch.ones(1000)})["x"].sum() == 1000
        assert not cache.flush()
        assert cache.flush()  # what was put since the last time: nothing
        assert cache.stats().host.bytes == 0 and cache.stats().disk.bytes == 0 and cache.stats().failures == 2


def test_prefetch_brings_entries_up(tmp_path: Path) -> None:
    keys = [key(i) for i in range(6)]
    with LatentCache(tmp_path) as cache:
        for i, k in enumerate(keys):
            cache.put(k, {"x": torch.full((100,), float(i))})
    with LatentCache(tmp_path, host_bytes=1600) as cache:
        cache.prefetch([key("not there"), *keys])
        end = time.monotonic() + 30
        while cache.stats().host.entries < 4 and time.monotonic() < end:
            time.sleep(0.005)
        # four fit: the fifth would push out the first
        assert cache.stats().host.entries == 4
        assert [cache.get(k)["x"][0].item() for k in keys] == [0, 1, 2, 3, 4, 5]
        assert cache.stats().host.hits == 4 and cache.stats().disk.hits == 2


def test_a_producer_that_is_faster_than_the_disk_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Budgets of memory hold because what is on its way down can't be let go, and a put waits for it."""
    from latentfast.cache.disk import Disk

    store = Disk.store

    def slowly(self, jobs):
        time.sleep(0.01 * len(jobs))
        return store(self, jobs)

    monkeypatch.setattr(Disk, "store", slowly)
    with LatentCache(tmp_path, host_bytes=3 * 4000) as cache:
        for i in range(20):
            cache.put(key(i), {"x": torch.full((1000,), float(i))})
            assert cache.stats().host.bytes <= 3 * 4000
        assert cache.flush()
        assert all(cache.get(key(i))["x"][0] == i for i in range(20))


def test_many_threads_get_what_they_ask_for(tmp_path: Path) -> None:
    wrong: list[str] = []

    def work(seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        for _ in range(60):
            i, what = (int(torch.randint(0, n, (), generator=draw)) for n in (12, 3))
            value = torch.full((100 * (i % 5 + 1),), float(i))
            if what == 0:
                cache.put(key(i), {"x": value})
            elif what == 1:
                found = cache.get(key(i))
                if found is not None and not torch.equal(found["x"], value):
                    wrong.append(f"get {i}")
            elif not torch.equal(cache.get_or_make(key(i), lambda value=value: {"x": value})["x"], value):
                wrong.append(f"get_or_make {i}")
            if cache.stats().host.bytes > 4000 + 2000:
                wrong.append(f"over the budget: {cache.stats().host}")

    with LatentCache(tmp_path, host_bytes=4000, disk_bytes=8000) as cache:
        workers = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
            assert not worker.is_alive()
        cache.flush()
        assert not wrong
        assert cache.stats().disk.bytes <= 8000 and cache.stats().failures == 0


# -- neighbours -------------------------------------------------------------------------------------------------------


@pytest.fixture
def vectors() -> torch.Tensor:
    """Unit vectors in a plane of a space of 8 dimensions, 0.1 rad apart."""
    angles = torch.arange(10) * 0.1
    found = torch.zeros(10, 8)
    found[:, 2], found[:, 5] = angles.cos(), angles.sin()
    return found


@pytest.mark.parametrize("where", ["memory", "folder", "another process's folder"])
def test_nearest_is_the_nearest_at_that_sigma_and_never_exact(where: str, tmp_path: Path, vectors) -> None:
    path = None if where == "memory" else tmp_path
    scope, other = Key.of({"model": "a"}), Key.of({"model": "b"})
    cache = LatentCache(path)
    for i, vector in enumerate(vectors):
        cache.put(key("near", i), {"x": torch.full((2,), float(i))}, scope=scope, sigma=0.5, embedding=3 * vector)
    cache.put(key("other sigma"), {"x": torch.zeros(2)}, scope=scope, sigma=0.6, embedding=vectors[4])
    cache.put(key("other model"), {"x": torch.zeros(2)}, scope=other, sigma=0.5, embedding=vectors[4])
    cache.put(key("no place"), {"x": torch.zeros(2)})
    if where.startswith("another"):
        cache.close()
        cache = LatentCache(path)
    query = vectors[4].lerp(vectors[5], 0.25).half()
    found = cache.nearest(query, scope=scope, sigma=0.5, threshold=0.9)
    assert found.key == key("near", 4) and found.tensors["x"].eq(4).all() and found.sigma == 0.5
    # a quarter of the way from one vector to another that is 0.1 rad off; the query is in half precision
    assert found.similarity == pytest.approx(torch.cos(torch.tensor(0.025)).item(), abs=1e-4)
    assert cache.nearest(query, scope=scope, sigma=0.55, threshold=0.9) is None
    assert cache.nearest(query, scope=scope, sigma=0.55, threshold=0.9, sigma_tolerance=0.1) is not None
    assert cache.nearest(query, scope=Key.of({"model": "c"}), sigma=0.5, threshold=-1) is None
    assert cache.nearest(-query, scope=scope, sigma=0.5, threshold=0.9) is None
    assert cache.get(key("near", 4.5)) is None
    stats = cache.stats()
    assert (stats.approximate, stats.hits, stats.misses) == (2, 0, 1)
    cache.close()


def test_nearest_passes_over_what_has_gone(tmp_path: Path, vectors) -> None:
    scope = Key.of({"model": "a"})
    with LatentCache(tmp_path, host_bytes=0) as cache:
        for i, vector in enumerate(vectors):
            cache.put(key(i), {"x": torch.ones(1)}, scope=scope, sigma=0.5, embedding=vector)
        cache.flush()
        (tmp_path / "entries" / f"{key(4).digest}.safetensors").unlink()
        found = cache.nearest(vectors[4] + 0.01 * vectors[5], scope=scope, sigma=0.5, threshold=0.9)
        assert found.key == key(5)
        for i in range(30):  # more than are read from the device at once
            cache.put(key(f"gone {i}"), {"x": torch.ones(1)}, scope=scope, sigma=0.5, embedding=vectors[4])
        cache.flush()
        for i in range(30):
            (tmp_path / "entries" / f"{key(f'gone {i}').digest}.safetensors").unlink()
        assert cache.nearest(vectors[4], scope=scope, sigma=0.5, threshold=0.9).key in (key(3), key(5))
        assert cache.nearest(torch.ones(5), scope=scope, sigma=0.5, threshold=-1) is None  # another model's width


def test_bad_embeddings_are_refused() -> None:
    scope = Key.of({})
    with LatentCache() as cache:
        for embedding, says in [(torch.zeros(2, 3), "vector"), (torch.arange(3), "floating"), ([1.0], "vector")]:
            with pytest.raises(ValueError, match=f"embedding: expected a.*{says}"):
                cache.nearest(embedding, scope=scope, sigma=0.5, threshold=0.9)
        with pytest.raises(ValueError, match="threshold"):
            cache.nearest(torch.ones(2), scope=scope, sigma=0.5, threshold=1.5)
        with pytest.raises(ValueError, match="sigma: expected a finite"):
            cache.put(key(1), {}, scope=scope, sigma=float("nan"), embedding=torch.ones(2))


# -- statistics -------------------------------------------------------------------------------------------------------


def test_statistics_count(tmp_path: Path) -> None:
    with LatentCache(tmp_path, host_bytes=800, disk_bytes=1 << 20) as cache:
        for i in range(4):
            cache.put(key(i), {"x": torch.zeros(100)}, seconds=2.0)
        cache.flush()
        for i in range(5):
            cache.get(key(i))
        stats = cache.stats()
        assert (stats.hits, stats.misses, stats.host.hits, stats.disk.hits) == (4, 1, 2, 2)
        assert stats.seconds_saved == 8.0
        assert (stats.host.entries, stats.host.bytes, stats.host.budget) == (2, 800, 800)
        assert stats.host.evictions == 2 == stats.evictions and stats.disk.entries == 4
        assert stats.disk.bytes == sum(path.stat().st_size for path in (tmp_path / "entries").iterdir())
        entries = cache.entries()
        assert [json.loads(entry.description)["names"] for entry in entries] == [["3"], ["2"], ["1"], ["0"]]
        assert all(entry.seconds == 2.0 and entry.uses == 2 for entry in entries)


# -- what the documents say -------------------------------------------------------------------------------------------


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "cache.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    assert names["found"].similarity > 0.9


@pytest.mark.parametrize("name", latentfast.cache.__all__)
def test_everything_public_has_a_docstring(name: str) -> None:
    assert inspect.getdoc(getattr(latentfast.cache, name))
