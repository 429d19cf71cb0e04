"""Budgets and the order of eviction, against a model of the cache in plain Python: 10,000 random operations."""

from __future__ import annotations

import dataclasses
import os
import random
from pathlib import Path

import pytest
import torch

from latentfast.cache import Key, LatentCache
from latentfast.cache.layout import Header, Layout

NOW = 1.7e9
HOST, DISK = 6_000, 12_000


@dataclasses.dataclass
class Item:
    """An entry of the model's."""

    bytes: int
    seconds: float
    credit: float = 0.0
    uses: int = 0


class Shelf:
    """A tier of the model: items in the order of their last use, the latest last."""

    def __init__(self, budget: int, policy: str) -> None:
        self.budget, self.policy, self.age = budget, policy, 0.0
        self.items: dict[str, Item] = {}

    def use(self, name: str) -> None:
        if name in self.items:
            item = self.items[name] = self.items.pop(name)
            item.uses += 1
            item.credit = self.age + item.uses * item.seconds / item.bytes

    def make_room(self, nbytes: int) -> None:
        while sum(item.bytes for item in self.items.values()) + nbytes > self.budget:
            names = iter(self.items)
            victim = next(names) if self.policy == "lru" else min(self.items, key=lambda name: self.items[name].credit)
            self.age = max(self.age, self.items.pop(victim).credit)

    def add(self, name: str, nbytes: int, seconds: float) -> None:
        self.items.pop(name, None)
        self.items[name] = Item(nbytes, seconds)
        self.use(name)


class Model:
    """What the cache must hold after the same operations, one after another."""

    def __init__(self, policy: str) -> None:
        self.host, self.disk = Shelf(HOST, policy), Shelf(DISK, policy)
        self.read_once: set[str] = set()

    def put(self, name: str, nbytes: int, file_bytes: int, seconds: float) -> None:
        self.host.items.pop(name, None)
        if nbytes <= HOST:
            self.host.make_room(nbytes)
            self.host.add(name, nbytes, seconds)
        if file_bytes <= DISK:
            self.disk.make_room(file_bytes)  # its predecessor is still there while it is written
            self.disk.add(name, file_bytes, seconds)

    def get(self, name: str, nbytes: int, seconds: float) -> bool:
        if name in self.host.items:
            self.host.use(name)
            self.disk.use(name)
            return True
        again = name in self.read_once
        self.read_once.discard(name)
        if name not in self.disk.items:
            return False
        self.disk.use(name)
        if not again:
            self.read_once.add(name)
        elif nbytes <= HOST:
            self.host.make_room(nbytes)
            self.host.add(name, nbytes, seconds)
        return True


class Thing:
    """A value with its key: always the same for one number."""

    def __init__(self, number: int) -> None:
        draw = random.Random(number)
        # some are larger than the host's budget, some than both
        self.elements = draw.choice([1, 10, 100, 100, 200, 300, 450, 700, 1400, 1600, 4000])
        self.key = Key.of({"number": number})
        self.seconds = float(draw.randint(0, 5))
        self.tensors = {"x": torch.full((self.elements,), float(number))}
        layout = Layout.of(self.tensors)
        self.bytes = layout.nbytes
        self.file_bytes = Header.make(self.key, layout, seconds=self.seconds, created=NOW).file_bytes


@pytest.mark.parametrize(("policy", "operations"), [("lru", 10_000), ("cost", 4_000)])
def test_ten_thousand_operations_agree_with_the_model(
    policy: str, operations: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        os, "fsync", lambda file: None
    )  # the disk's part is elsewhere, and waiting for it takes minutes
    monkeypatch.setattr("latentfast.cache.tiers.time.time", lambda: NOW)  # whose digits are in the header
    draw = random.Random(7)
    things = [Thing(number) for number in range(40)]
    largest = max(thing.file_bytes for thing in things if thing.file_bytes <= DISK)
    model, found = Model(policy), 0
    cache = LatentCache(tmp_path, host_bytes=HOST, disk_bytes=DISK, policy=policy)
    for step in range(operations):
        thing = things[int(len(things) * draw.random() ** 2)]  # some are wanted more often
        if draw.random() < 0.2:
            cache.put(thing.key, thing.tensors, seconds=thing.seconds)
            assert cache._tiers.host.used <= HOST, "also while it is on its way down"
            cache.flush()
            model.put(thing.key.digest, thing.bytes, thing.file_bytes, thing.seconds)
        else:
            got = cache.get(thing.key)
            expected = model.get(thing.key.digest, thing.bytes, thing.seconds)
            assert (got is not None) == expected
            if got is not None:
                assert torch.equal(got["x"], thing.tensors["x"])
                found += 1
        host = cache._tiers.host
        assert list(host.slots) == list(model.host.items) and host.used == sum(
            x.bytes for x in model.host.items.values()
        )
        assert host.held <= HOST and not host.passing
        if step % 50 == 0:
            stats = cache.stats()
            assert stats.host.bytes <= HOST and stats.disk.bytes <= DISK + largest
            assert {entry.digest for entry in cache.entries()} == set(model.disk.items)
            files = list((tmp_path / "entries").iterdir())
            assert {path.stem for path in files} == set(model.disk.items)
            assert sum(path.stat().st_size for path in files) == stats.disk.bytes
    assert found > operations // 5 and cache.stats().evictions > operations // 20
    cache.close()


def test_spare_buffers_are_used_again_and_count(tmp_path: Path) -> None:
    """Page-locked memory is dear to get: what an entry leaves behind serves the next one of its size."""
    with LatentCache(host_bytes=2_000_000) as cache:
        tier = cache._tiers.host
        for i in range(4):
            cache.put(Key.of({"i": i}), {"x": torch.zeros(200_000)})
        seen = {slot.filled().data_ptr() for slot in tier.slots.values()}
        for i in range(10):
            cache.put(Key.of({"i": i}), {"x": torch.zeros(200_000)})
            assert tier.held <= 2_000_000
        assert seen <= {slot.filled().data_ptr() for slot in tier.slots.values()}
        cache.put(Key.of({"i": "large"}), {"x": torch.zeros(450_000)})
        assert tier.held <= 2_000_000 and len(tier.slots) == 1


def test_the_budget_holds_when_a_folder_is_opened_with_a_smaller_one(tmp_path: Path) -> None:
    with LatentCache(tmp_path) as cache:
        for i in range(10):
            cache.put(Key.of({"i": i}), {"x": torch.zeros(1000)})
    with LatentCache(tmp_path, disk_bytes=15_000) as cache:
        cache.put(Key.of({"i": 10}), {"x": torch.zeros(1000)})
        assert cache.flush()
        assert cache.stats().disk.bytes <= 15_000 and cache.stats().disk.entries == 3
        assert cache.prune(5_000) == 2 and cache.get(Key.of({"i": 10})) is not None
        assert cache.prune(0) == 1 and cache.stats().disk.bytes == 0
        with pytest.raises(ValueError, match="nbytes"):
            cache.prune(-1)
