"""The cache's folder: damage of every kind is a miss and a warning, never a wrong value, an error or a lost entry."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from latentfast.cache import Key, LatentCache
from latentfast.cache.digest import CHUNK
from latentfast.cache.layout import Header, Layout

X = torch.arange(1000.0).view(10, 100)


def key(name: object) -> Key:
    return Key.of({"name": str(name)})


def opened(folder: Path, **options) -> LatentCache:
    """A cache that has nothing in memory, and keeps nothing there."""
    return LatentCache(folder, host_bytes=0, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the entries "a" and "b"."""
    with opened(tmp_path) as cache:
        cache.put(key("a"), {"x": X, "n": torch.tensor([1, 2], dtype=torch.int8)}, seconds=3.0)
        cache.put(key("b"), {"x": -X})
        assert cache.flush()
    return tmp_path


def path_of(folder: Path, name: object) -> Path:
    return folder / "entries" / f"{key(name).digest}.safetensors"


def quarantine(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "quarantine").iterdir())


# -- the file ---------------------------------------------------------------------------------------------------------


def test_entries_are_safetensors_files(folder: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(path_of(folder, "a"), "pt") as file:
        assert torch.equal(file.get_tensor("x"), X) and file.get_tensor("n").tolist() == [1, 2]
        metadata = file.metadata()
    assert metadata["description"] == key("a").canonical and metadata["key"] == key("a").digest
    assert float(metadata["seconds"]) == 3.0 and len(metadata["checksum"]) == 64


def test_a_changed_bit_anywhere_is_a_miss(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = path_of(folder, "a").read_bytes()
    positions = [*range(0, 700, 7), *range(700, len(whole), 211), len(whole) - 1]
    for i, position in enumerate(positions):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << i % 8
        path_of(folder, "a").write_bytes(damaged)
        with opened(folder) as cache:
            assert cache.get(key("a")) is None, f"byte {position}"
            assert cache.stats().quarantined == 1 and cache.stats().misses == 1
            assert torch.equal(cache.get(key("b"))["x"], -X)
        assert not path_of(folder, "a").exists()
    assert "goes into quarantine" in caplog.text
    assert len(quarantine(folder)) == 16  # the latest; it is no second folder without a budget
    with opened(folder) as cache:  # and what was lost can be put again
        cache.put(key("a"), {"x": X})
        assert cache.flush() and torch.equal(cache.get(key("a"))["x"], X)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:7]),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        lambda path: path.write_bytes(os.urandom(5000)),
        lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
        lambda path: path.write_bytes(path.with_name(f"{key('b').digest}.safetensors").read_bytes()),
        lambda path: path.write_bytes((8 + 70).to_bytes(8, "little") + b'{"__metadata__":{"checksum":"' + b"0" * 3000),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: (path.unlink(), os.mkfifo(path)),
        lambda path: (path.unlink(), path.symlink_to("nowhere")),
    ],
    ids=["empty", "start", "short", "long", "random", "length", "other", "header", "folder", "pipe", "link"],
)
def test_what_is_no_whole_entry_is_a_miss(folder: Path, damage) -> None:
    damage(path_of(folder, "a"))
    for _ in range(2):
        with opened(folder) as cache:
            assert cache.get(key("a")) is None
            assert torch.equal(cache.get(key("b"))["x"], -X)
            cache.verify()
    # whatever stood there, the entry can be made again
    with LatentCache(folder) as cache:
        assert torch.equal(cache.get_or_make(key("a"), lambda: {"x": X})["x"], X)


def test_safetensors_of_somebody_else_is_no_entry(folder: Path) -> None:
    torch_files = pytest.importorskip("safetensors.torch")
    torch_files.save_file({"x": X}, path_of(folder, "a"), {"description": key("a").canonical})
    with opened(folder) as cache:
        assert cache.get(key("a")) is None and cache.stats().quarantined == 1


def test_a_header_is_not_trusted(folder: Path) -> None:
    """A file with a right checksum, whose header asks for what is not there."""
    layout = Layout.of({"x": X})
    huge = Layout(tuple(type(piece)("x", piece.dtype, (2**60,), 0, 2**62) for piece in layout.pieces), 2**62)
    header = Header.make(key("a"), huge, seconds=0, created=0)
    checksum = header.sum(b"").encode()
    path_of(folder, "a").write_bytes(header.raw[:37] + checksum + header.raw[101:] + bytes(100))
    with opened(folder) as cache:
        assert cache.get(key("a")) is None and cache.stats().quarantined == 1


def test_long_entries_are_written_and_checked_in_chunks(tmp_path: Path) -> None:
    long = torch.randint(0, 255, (3 * CHUNK + 12_345,), dtype=torch.uint8)
    with opened(tmp_path) as cache:
        cache.put(key("long"), {"x": long})
        assert cache.flush() and torch.equal(cache.get(key("long"))["x"], long)
        whole = path_of(tmp_path, "long").read_bytes()
        # two chunks change places: each of them is right, the file is not
        start = len(whole) - len(long)
        first, second = whole[start : start + CHUNK], whole[start + CHUNK : start + 2 * CHUNK]
        path_of(tmp_path, "long").write_bytes(whole[:start] + second + first + whole[start + 2 * CHUNK :])
        assert cache.get(key("long")) is None


def test_verify_reads_everything(folder: Path) -> None:
    damaged = bytearray(path_of(folder, "b").read_bytes())
    damaged[-1] ^= 255
    path_of(folder, "b").write_bytes(damaged)
    (folder / "entries" / "notes.txt").write_text("somebody's")
    with opened(folder) as cache:
        found = cache.verify()
        assert found.good == 1 and list(found.bad) == [path_of(folder, "b").name]
        assert "checksum" in found.bad[path_of(folder, "b").name]
        assert [entry.digest for entry in cache.entries()] == [key("a").digest]
        assert cache.verify().bad == {}
    assert (folder / "entries" / "notes.txt").exists()


# -- the index --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["removed", "random", "empty", "half"])
def test_the_index_is_made_again_from_the_files(folder: Path, damage: str) -> None:
    path = folder / "index.sqlite"
    if damage == "removed":
        path.unlink()
    else:
        whole = path.read_bytes()
        path.write_bytes({"random": os.urandom(9000), "empty": b"", "half": whole[: len(whole) // 2]}[damage])
    with opened(folder) as cache:
        entries = {entry.digest: entry for entry in cache.entries()}
        assert set(entries) == {key("a").digest, key("b").digest}
        assert entries[key("a").digest].seconds == 3.0
        assert cache.stats().disk.bytes == sum(path_of(folder, name).stat().st_size for name in "ab")
        cache.put(key("c"), {"x": X})
        assert cache.flush() and torch.equal(cache.get(key("c"))["x"], X)


def test_an_index_that_breaks_while_it_is_used_is_replaced(folder: Path) -> None:
    with opened(folder) as cache:
        cache._disk._index._db.execute("DROP TABLE entries")
        cache.put(key("c"), {"x": X})
        cache.flush()
        assert torch.equal(cache.get(key("a"))["x"], X)
        (folder / "index.sqlite").write_bytes(os.urandom(20_000))
        for _ in range(3):
            cache.put(key("d"), {"x": X})
            cache.flush()
        assert torch.equal(cache.get(key("a"))["x"], X)
    with opened(folder) as cache:
        cache.put(key("e"), {"x": X})
        assert cache.flush() and torch.equal(cache.get(key("e"))["x"], X)


def test_files_that_come_and_go_are_noticed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    with opened(other) as cache:
        cache.put(key("c"), {"x": X})
    path_of(other, "c").rename(path_of(folder, "c"))
    path_of(folder, "b").unlink()
    with opened(folder) as cache:
        assert cache.get(key("b")) is None and torch.equal(cache.get(key("c"))["x"], X)
        assert {entry.digest for entry in cache.entries()} == {key("a").digest, key("c").digest}


def test_a_removed_folder_ends_nothing(folder: Path) -> None:
    import shutil

    with LatentCache(folder) as cache:
        shutil.rmtree(folder)
        cache.put(key("c"), {"x": X})
        assert not cache.flush()
        assert cache.get(key("a")) is None and torch.equal(cache.get(key("c"))["x"], X)


# -- disks that do not take what they are given -----------------------------------------------------------------------


def test_a_full_disk_is_a_warning_once(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    write = os.pwrite

    def full(file: int, data, at: int) -> int:
        if at > 2000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data[: 2000 - at + 1], at)  # as a disk does it: a part, then the error

    with LatentCache(folder) as cache, caplog.at_level(logging.WARNING, "latentfast.cache"):
        monkeypatch.setattr(os, "pwrite", full)
        for i in range(5):
            cache.put(key(i), {"x": X + i})
        assert not cache.flush()
        assert all(torch.equal(cache.get(key(i))["x"], X + i) for i in range(5))  # from memory
        monkeypatch.undo()
        assert caplog.text.count("No space left") == 1
        stats = cache.stats()
        assert stats.failures == 5 and stats.disk.entries == 2
        assert stats.disk.bytes == sum(path.stat().st_size for path in (folder / "entries").iterdir())
        cache.put(key("later"), {"x": X})
        assert cache.flush()
    with opened(folder) as cache:
        assert torch.equal(cache.get(key("later"))["x"], X) and torch.equal(cache.get(key("a"))["x"], X)
        assert cache.get(key(0)) is None


def test_a_group_that_appears_in_part_is_counted_as_far_as_it_did(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index fails after the first of three files has its name; that one takes a smaller one's place."""
    from latentfast.cache.disk import Disk
    from latentfast.cache.files import Unfinished

    publish, published = Unfinished.publish, []

    def once(self, path: Path) -> None:
        if published:
            raise sqlite3.OperationalError("database or disk is full")
        published.append(path)
        publish(self, path)

    disk = Disk(folder, 1 << 20, "lru")
    jobs = []
    for name, x in (("a", torch.zeros(3000)), ("c", X), ("d", X)):
        layout = Layout.of({"x": x})
        buffer = torch.zeros(layout.nbytes, dtype=torch.uint8)
        layout.pack({"x": x}, buffer)
        jobs.append((Header.make(key(name), layout, seconds=0, created=0), buffer))
    monkeypatch.setattr(Unfinished, "publish", once)
    assert disk.store(jobs) == [False] * 3
    monkeypatch.undo()
    files = list((folder / "entries").iterdir())
    assert {path.name for path in files} == {path_of(folder, name).name for name in "ab"}
    assert disk.total() == (2, sum(path.stat().st_size for path in files))
    assert disk.store(jobs) == [True] * 3 and disk.verify().good == 4
    disk.close()


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_each_step_of_writing_may_fail(folder: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    real = getattr(os, call)

    def failing(*arguments, **options):
        # only what is about the entries: the interpreter opens files of its own
        if call == "fsync" or ("entries" in str(arguments[0]) and str(arguments[0]).endswith(".tmp")):
            raise OSError(errno.EIO, "Input/output error")
        return real(*arguments, **options)

    with opened(folder) as cache:
        monkeypatch.setattr(os, call, failing)
        cache.put(key("c"), {"x": X})
        assert not cache.flush() and cache.get(key("c")) is None
        monkeypatch.undo()
        cache.put(key("d"), {"x": X})
        assert cache.flush() and torch.equal(cache.get(key("d"))["x"], X)
        assert cache.stats().disk.entries == 3
        assert cache.stats().disk.bytes == sum(path.stat().st_size for path in (folder / "entries").iterdir())
    assert sorted(path.name for path in (folder / "entries").iterdir()) == sorted(
        path_of(folder, name).name for name in "abd"
    )


def test_a_folder_that_cannot_be_written_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    real = os.open

    def read_only(path, flags, *arguments, **options):
        if flags & (os.O_CREAT | os.O_RDWR | os.O_WRONLY) and str(path).startswith(str(folder)):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", read_only)
    damaged = bytearray(path_of(folder, "b").read_bytes())
    damaged[-1] ^= 1
    path_of(folder, "b").write_bytes(damaged)
    with LatentCache(folder) as cache:
        assert torch.equal(cache.get(key("a"))["x"], X)
        cache.put(key("c"), {"x": X})
        assert not cache.flush()
        assert torch.equal(cache.get(key("c"))["x"], X)
        assert cache.get(key("b")) is None
        assert key("a").digest in {entry.digest for entry in cache.entries()} and cache.prune(0) == 0
    assert "can't be written" in caplog.text and "Read-only file system" in caplog.text


def test_a_path_that_can_be_no_folder_leaves_the_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with LatentCache(tmp_path / "file" / "cache") as cache:
        cache.put(key("a"), {"x": X})
        assert not cache.flush() and torch.equal(cache.get(key("a"))["x"], X)
        assert cache.entries() == [] and cache.verify().good == 0


# -- several processes ------------------------------------------------------------------------------------------------


def spawn(code: str, folder: Path) -> subprocess.Popen[str]:
    """Python with the names of this module, in a process of its own; it prints a line when it is there."""
    root = str(Path(__file__).parents[1])
    lines = ["import os, sys, time, torch", "from pathlib import Path", "from tests.test_cache_disk import *", code]
    return subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )


def test_what_a_killed_writer_left_goes_and_what_it_had_confirmed_stays(folder: Path) -> None:
    code = """
import latentfast.cache.files as files
cache = opened(Path(sys.argv[1]))
cache.put(key("c"), {"x": X})
assert cache.flush()
def stuck(self):
    print("written, not published", flush=True)
    time.sleep(600)
files.Unfinished.sync = stuck
cache.put(key("d"), {"x": X})
time.sleep(600)
"""
    writer = spawn(code, folder)
    assert writer.stdout.readline().startswith("written")
    unfinished = [path for path in (folder / "entries").iterdir() if path.name.startswith(".")]
    assert len(unfinished) == 1
    with opened(folder) as cache:  # the writer lives: its file is left alone
        assert unfinished[0].exists() and cache.get(key("d")) is None
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    with opened(folder) as cache:
        assert not unfinished[0].exists()
        assert torch.equal(cache.get(key("c"))["x"], X) and cache.get(key("d")) is None
        assert cache.stats().disk.entries == 3
        assert cache.stats().disk.bytes == sum(path.stat().st_size for path in (folder / "entries").iterdir())
        assert len(list((folder / "writers").iterdir())) == 1


def test_a_file_that_was_published_but_not_noted_is_adopted(folder: Path) -> None:
    """Killed between the two: here by taking the row away."""
    with sqlite3.connect(folder / "index.sqlite") as db:
        db.execute("DELETE FROM entries WHERE digest = ?", (key("a").digest,))
    db.close()
    with opened(folder) as cache:
        assert cache.stats().disk.entries == 2
        assert {entry.digest for entry in cache.entries()} == {key("a").digest, key("b").digest}


def test_processes_see_each_others_entries_and_share_the_budget(tmp_path: Path) -> None:
    code = """
with opened(Path(sys.argv[1]), disk_bytes=50_000) as cache:
    for i in range(30):
        cache.put(key(f"theirs {i}"), {"x": X + i})
        assert cache.flush()
    print("done", flush=True)
"""
    other = spawn(code, tmp_path)
    with opened(tmp_path, disk_bytes=50_000) as cache:
        i = 0
        while other.poll() is None and i < 10_000:
            cache.put(key(f"ours {i}"), {"x": X - i})
            assert cache.flush()
            assert cache.stats().disk.bytes <= 50_000
            i += 1
            time.sleep(0.005)
        assert other.wait() == 0 and other.stdout.read() == "done\n"
        assert cache.verify().bad == {}
        files = list((tmp_path / "entries").iterdir())
        assert sum(path.stat().st_size for path in files) == cache.stats().disk.bytes <= 50_000
        assert {entry.digest for entry in cache.entries()} == {path.stem for path in files}
        names = {path_of(tmp_path, f"theirs {i}").stem for i in range(30)}
        found = [i for i in range(30) if cache.get(key(f"theirs {i}")) is not None]
        assert len(found) == len(names & {path.stem for path in files})
        assert all(torch.equal(cache.get(key(f"theirs {i}"))["x"], X + i) for i in found)


def test_a_good_file_in_a_bad_ones_place_is_not_condemned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process reads a damaged file while another puts the entry anew."""
    from latentfast.cache.files import Reader

    whole = path_of(folder, "a").read_bytes()
    path_of(folder, "a").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    fill = Reader.fill

    def replaced_meanwhile(self, header, buffer):
        new = path_of(folder, "a").with_suffix(".new")
        new.write_bytes(whole)
        new.rename(path_of(folder, "a"))
        fill(self, header, buffer)

    with opened(folder) as cache:
        monkeypatch.setattr(Reader, "fill", replaced_meanwhile)
        assert cache.get(key("a")) is None
        monkeypatch.undo()
        assert torch.equal(cache.get(key("a"))["x"], X)


def test_a_forked_child_has_no_cache_and_the_parents_goes_on(folder: Path) -> None:
    long = torch.arange(CHUNK)  # eight chunks
    with LatentCache(folder) as cache:
        cache.put(key("long"), {"x": long})
        assert cache.flush()
        child = os.fork()
        if not child:
            torch.set_num_threads(1)  # those of torch's are not there either, and it would wait for them
            silent = cache.get(key("a")) is None and key("a") not in cache and cache.flush()
            cache.put(key("c"), {"x": X})
            cache.close()
            with opened(folder) as own:  # its own works, whatever threads the parent had
                own.put(key("d"), {"x": long})
                silent &= own.flush() and torch.equal(own.get(key("d"))["x"], long)
            os._exit(0 if silent else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert torch.equal(cache.get(key("a"))["x"], X)
        cache.put(key("c"), {"x": X})
        assert cache.flush()


def test_what_was_put_is_finished_at_the_interpreters_end(tmp_path: Path) -> None:
    code = """
cache = LatentCache(Path(sys.argv[1]))
for i in range(20):
    cache.put(key(i), {"x": X + i})
print("no flush, no close", flush=True)
"""
    other = spawn(code, tmp_path)
    assert other.wait() == 0
    with opened(tmp_path) as cache:
        assert all(torch.equal(cache.get(key(i))["x"], X + i) for i in range(20))


def test_a_cache_that_is_forgotten_finishes_its_work(tmp_path: Path) -> None:
    cache = LatentCache(tmp_path)
    for i in range(20):
        cache.put(key(i), {"x": X + i})
    del cache
    end = time.monotonic() + 30
    while list((tmp_path / "writers").iterdir()) and time.monotonic() < end:
        time.sleep(0.005)
    assert not list((tmp_path / "writers").iterdir())
    with opened(tmp_path) as again:
        assert all(torch.equal(again.get(key(i))["x"], X + i) for i in range(20))
