"""Kill the writers of a cache's folder at random, damage its files, fill its quota, and count what that did.

Four processes at a time put and get entries in one folder; each is killed with SIGKILL after a random while and
replaced by another. A writer reports an entry as confirmed when `flush` has said that it is on the disk. In the end
every confirmed entry must be there, unless a budget or this script's own damage took it, and no get may ever have given
anything but the bits that belong to its key. Linux; no GPU.

    python tools/cache_torture.py --kills 200
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import resource
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from latentfast.cache import Key, LatentCache

ENTRIES = 60  # keys that all writers share, so that they also get into each other's way
WRITERS = 4
#: A writer that says nothing for so long is stuck.
STUCK_SECONDS = 60.0


@dataclass(frozen=True)
class Scenario:
    """How a folder is treated.

    Attributes:
        name: of it.
        disk_bytes: the budget.
        file_limit: the largest file that a process may write (RLIMIT_FSIZE), as a quota that is hit in mid-file.
        disk_size: the bytes of entries from which on writing says that the disk is full, after a part of what it was
            given.
        exponent: the largest entries have ten to this power of float32.
        damage: whether bytes are flipped, files cut, replaced and removed while all that goes on.
    """

    name: str
    disk_bytes: int = 1 << 30
    file_limit: int | None = None
    disk_size: int | None = None
    exponent: float = 5.0
    damage: bool = False

    @property
    def hindered(self) -> bool:
        """Whether there is a reason not to keep what was put."""
        return self.damage or self.file_limit is not None or self.disk_size is not None


SCENARIOS = (
    Scenario("kills alone"),
    Scenario("small budget", disk_bytes=2_000_000),
    Scenario("full disk", disk_size=1_500_000),
    Scenario("quota hit in mid-file", file_limit=1_200_000, exponent=5.8),
    Scenario("bytes flipped, files cut, replaced and removed", damage=True),
)


@dataclass
class Counts:
    """What happened in a scenario; from `wrong` on all must be 0 (`refused`: put, not kept, and nothing in the way)."""

    scenario: str
    kills: int = 0
    puts: int = 0
    confirmed: int = 0
    hits: int = 0
    misses: int = 0
    damaged: int = 0
    quarantined: int = 0
    wrong: int = 0
    lost: int = 0
    stuck: int = 0
    left_behind: int = 0
    refused: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether one of them is not."""
        return bool(self.wrong or self.lost or self.stuck or self.left_behind or self.refused)


def key(number: int) -> Key:
    """Of an entry."""
    return Key.of({"torture": number})


def value(number: int, exponent: float) -> dict[str, torch.Tensor]:
    """What belongs to that key: from ten elements to ten to that power."""
    draw = torch.Generator().manual_seed(number)
    size = int(10 ** (1 + (exponent - 1) * torch.rand((), generator=draw).item()))
    return {"x": torch.randn(size, generator=draw), "n": torch.tensor(number)}


def is_right(number: int, exponent: float, found: dict[str, torch.Tensor]) -> bool:
    """Whether these are the bits."""
    expected = value(number, exponent)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def work(folder: Path, scenario: Scenario, seed: int, tell: int) -> None:
    """A writer's life. It tells of what it did, a letter and a number a line."""
    if scenario.file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (scenario.file_limit, scenario.file_limit))
    if scenario.disk_size is not None:
        fill_up(folder / "entries", scenario.disk_size)
    draw = random.Random(seed)
    # sometimes memory that keeps entries, sometimes none: then every get reads the disk
    cache = LatentCache(folder, host_bytes=draw.choice([0, 1 << 20]), disk_bytes=scenario.disk_bytes)
    while True:
        number = draw.randrange(ENTRIES)
        if draw.random() < 0.5:
            batch = [number, *(draw.randrange(ENTRIES) for _ in range(draw.randrange(4)))]
            for each in batch:
                cache.put(key(each), value(each, scenario.exponent))
            stored = cache.flush()
            os.write(tell, "".join(f"{'c' if stored else 'p'} {each}\n" for each in batch).encode())
        else:
            found = cache.get(key(number))
            letter = "m" if found is None else "h" if is_right(number, scenario.exponent, found) else "w"
            os.write(tell, f"{letter} {number}\n".encode())


def fill_up(entries: Path, size: int) -> None:
    """From here on this process meets a full disk when the entries have so many bytes."""
    write = os.pwrite

    def limited(file: int, data: memoryview | bytes, at: int) -> int:
        room = size
        for path in entries.iterdir():
            with suppress(FileNotFoundError):  # others write and remove
                room -= path.stat().st_size
        if room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data[: max(room, 1)], at)

    os.pwrite = limited


@contextmanager
def child(run: Callable[[int], None]) -> Iterator[tuple[int, int]]:
    """(process, a pipe's end to read from) of a fork; killed at the end."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        status = 1
        try:
            os.close(reading)
            run(writing)
            status = 0
        except BaseException as error:
            print(f"writer: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    os.close(writing)
    try:
        yield process, reading
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(reading)


class Writer:
    """A process that is going to be killed."""

    def __init__(self, folder: Path, scenario: Scenario, draw: random.Random) -> None:
        seed = draw.randrange(1 << 30)
        self.context = child(lambda tell: work(folder, scenario, seed, tell))
        self.process, self.pipe = self.context.__enter__()
        self.born = self.heard = time.monotonic()
        self.lifetime = draw.uniform(0.02, 0.5)
        self.rest = b""

    def hear(self) -> list[tuple[str, int]]:
        """What it has told since the last time, whole lines."""
        told = b""
        while select.select([self.pipe], [], [], 0)[0] and (piece := os.read(self.pipe, 65536)):
            told += piece
        if told:
            self.heard = time.monotonic()
        *lines, self.rest = (self.rest + told).split(b"\n")
        return [(line[:1].decode(), int(line[2:])) for line in lines]

    def kill(self) -> list[tuple[str, int]]:
        """End it; what it had told until then."""
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, os.WNOHANG)
        time.sleep(0.001)
        told = self.hear()
        try:
            self.context.__exit__(None, None, None)
        except ProcessLookupError:
            os.close(self.pipe)
        return told


def damage(folder: Path, draw: random.Random) -> int | None:
    """Do something to a random entry; its number, None if there was none."""
    numbers = {f"{key(number).digest}.safetensors": number for number in range(ENTRIES)}
    there = [path for path in (folder / "entries").glob("*.safetensors") if path.name in numbers]
    if not there:
        return None
    path = draw.choice(there)
    try:
        content = bytearray(path.read_bytes())
        what = draw.choice(["flip", "flip", "flip", "cut", "remove", "replace", "stranger", "index"])
        if what == "index":
            with open(folder / "index.sqlite", "r+b") as file:
                file.seek(draw.randrange(100_000))
                file.write(draw.randbytes(100))
            return None
        if what == "remove":
            path.unlink()
        elif what == "stranger":
            path.write_bytes(draw.choice(there).read_bytes())
        else:
            if what == "flip":
                content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            elif what == "cut":
                del content[draw.randrange(len(content)) :]
            else:
                content = bytearray(draw.randbytes(1000))
            path.write_bytes(content)
    except FileNotFoundError:
        return None
    return numbers[path.name]


def torment(scenario: Scenario, kills: int, seed: int, folder: Path) -> Counts:
    """Run one scenario."""
    draw = random.Random(seed)
    counts = Counts(scenario.name)
    confirmed: set[int] = set()
    harmed: set[int] = set()

    def note(told: list[tuple[str, int]]) -> None:
        seen = Counter(letter for letter, _ in told)
        counts.puts += seen["c"] + seen["p"]
        counts.confirmed += seen["c"]
        counts.refused += 0 if scenario.hindered else seen["p"]
        counts.hits += seen["h"]
        counts.misses += seen["m"]
        counts.wrong += seen["w"]
        confirmed.update(number for letter, number in told if letter == "c")

    writers = [Writer(folder, scenario, draw) for _ in range(WRITERS)]
    while counts.kills < kills:
        time.sleep(0.005)
        if scenario.damage and draw.random() < 0.6 and (number := damage(folder, draw)) is not None:
            harmed.add(number)
            counts.damaged += 1
        for i, writer in enumerate(writers):
            note(writer.hear())
            now = time.monotonic()
            if now - writer.heard > STUCK_SECONDS:
                counts.stuck += 1
            elif now - writer.born < writer.lifetime:
                continue
            note(writer.kill())
            counts.kills += 1
            writers[i] = Writer(folder, scenario, draw)
    for writer in writers:
        note(writer.kill())
    survey(counts, scenario, folder, confirmed, harmed)
    return counts


def survey(counts: Counts, scenario: Scenario, folder: Path, confirmed: set[int], harmed: set[int]) -> None:
    """Look at what is left, in another process: this one must stay without threads, as it forks."""

    def look(tell: int) -> None:
        with LatentCache(folder, host_bytes=0, disk_bytes=scenario.disk_bytes) as cache:
            wrong, lost = [], []
            for number in range(ENTRIES):
                found = cache.get(key(number))
                if found is None and number in confirmed:
                    lost.append(number)
                if found is not None and not is_right(number, scenario.exponent, found):
                    wrong.append(number)
            files = [path.stat().st_size for path in (folder / "entries").iterdir()]
            unfinished = [path.name for path in (folder / "entries").iterdir() if path.name.startswith(".")]
            stats = cache.stats()
            notes = []
            if sum(files) > scenario.disk_bytes or stats.disk.bytes != sum(files):
                notes.append(f"{sum(files)} bytes of files, {stats.disk.bytes} counted, budget {scenario.disk_bytes}")
            cache.put(key(-1), {"x": torch.ones(3)})
            if not cache.flush() or cache.get(key(-1)) is None:
                notes.append("nothing can be put any more")
            report = {"wrong": wrong, "lost": lost, "unfinished": unfinished, "notes": notes}
        os.write(tell, json.dumps(report).encode() + b"\n")

    with child(look) as (_, pipe), os.fdopen(os.dup(pipe)) as lines:
        ready = select.select([pipe], [], [], STUCK_SECONDS)[0]
        line = lines.readline() if ready else ""
    if not line:
        counts.stuck += 1
        return
    report = json.loads(line)
    may_go = scenario.disk_bytes < 1 << 30  # by the budget
    counts.wrong += len(report["wrong"])
    counts.lost += 0 if may_go else len(set(report["lost"]) - harmed)
    counts.left_behind += len(report["unfinished"]) + len(report["notes"])
    counts.notes += report["notes"]
    counts.quarantined = len(list((folder / "quarantine").glob("*.safetensors")))


def main() -> int:
    """The exit status: 1 if anything was wrong, lost, stuck or left behind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="writers to kill, in all scenarios together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the caches go; default: a temporary folder")
    parser.add_argument("--out", type=Path, help="write the counts there, a line of JSON each")
    options = parser.parse_args()
    torch.set_num_threads(1)  # threads that torch has would not come along into the forks
    found = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for i, scenario in enumerate(SCENARIOS):
            where = Path(folder) / str(i)
            counts = torment(scenario, -(-options.kills // len(SCENARIOS)), options.seed + i, where)
            print(json.dumps(vars(counts)), flush=True)
            found.append(counts)
    names = ("kills", "confirmed", "hits", "damaged", "wrong", "lost", "stuck", "left_behind", "refused")
    print(json.dumps({name: sum(getattr(counts, name) for counts in found) for name in names}))
    if options.out is not None:
        options.out.write_text("".join(json.dumps(vars(counts)) + "\n" for counts in found), encoding="utf-8")
    return int(any(counts.failed for counts in found))


if __name__ == "__main__":
    sys.exit(main())
