"""Soaks the studio: clients that connect, edit at random and vanish, and messages that make no sense.

    python -m tools.studio_soak                       # 30 minutes, 8 clients
    python -m tools.studio_soak --seconds 60
    python -m tools.studio_soak --seconds 0 --fuzz 10000

It starts `latentfast studio` with the embedded model, watches its memory from outside, and fails if that grows by more
than 2% after the first fifth, if a client waits for longer than it should, or if the server logs an error or ends.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import string
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import websockets

PROMPTS = ("a red circle moving left", "a big blue star and a small green square", "a yellow triangle in dim light")
OF_A_CLIP = ("towards", "fade", "palette")
KINDS = ("brightness", "warmth", "tint", "contrast", *OF_A_CLIP)
GENERATE = {"type": "generate", "prompt": PROMPTS[0], "seed": 0, "steps": 2, "guidance": 1.5}
GROWTH = 0.02  # of the server's memory after warm-up
STUCK = 30.0  # seconds in which a connected client must hear something; the server says something every second
EXPECTED = ("that edit is not there any more", "there are 64 edits already", "make a clip first")


@dataclass
class Tally:
    """What happened."""

    connections: int = 0
    vanished: int = 0
    sent: int = 0
    pictures: int = 0
    fuzzed: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    stuck: int = 0
    memory: list[tuple[float, float]] = field(default_factory=list)  # seconds, MiB


@contextmanager
def server(log: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`latentfast studio`, with more options, in a process of its own: its WebSocket's address, and the process."""
    command = [sys.executable, "-m", "latentfast", "studio", "--port", "0", "--steps", "2", "--frames", "9", *options]
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as process:
        try:
            address = ""
            while not address:
                if process.poll() is not None:
                    raise SystemExit(f"the studio did not start: {log.read_text()}")
                time.sleep(0.1)
                address = next((word for word in log.read_text().split() if word.startswith("http://")), "")
            parts = urlsplit(address)
            yield f"ws://{parts.netloc}/ws?{parts.query}", process
        finally:
            process.terminate()
            process.wait(30)


def memory(pid: int) -> float:
    """MiB that a process has resident."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def connected(address: str) -> websockets.connect:
    """A page's connection: its pictures are large, and compressed already."""
    return websockets.connect(address, max_size=None, compression=None, open_timeout=STUCK)


async def first_clip(address: str) -> None:
    """Waits until what the studio begins with is made, so that the seconds of a soak are those of users."""
    async with connected(address) as socket:
        async for message in socket:
            if isinstance(message, str) and json.loads(message).get("ready"):
                return


async def client(address: str, end: float, rng: random.Random, tally: Tally) -> None:
    """One user after another: comes, edits, and goes with or without a word."""
    while time.monotonic() < end:
        try:
            async with connected(address) as socket:
                tally.connections += 1
                await visit(socket, min(end, time.monotonic() + rng.uniform(0.5, 8)), rng, tally)
                if rng.random() < 0.5:
                    tally.vanished += 1
                    socket.transport.abort()
        except (websockets.ConnectionClosed, TimeoutError, asyncio.TimeoutError) as error:
            if isinstance(error, TimeoutError | asyncio.TimeoutError):
                tally.stuck += 1
        await asyncio.sleep(rng.uniform(0, 0.3))


async def visit(socket: websockets.ClientConnection, end: float, rng: random.Random, tally: Tally) -> None:
    ids: list[int] = []
    words: list[list] = []
    empty = False
    next_move = heard = time.monotonic()
    while (now := time.monotonic()) < end:
        if now >= next_move:
            for message in [GENERATE] if empty else moves(ids, words, rng):
                await socket.send(json.dumps(message))
                tally.sent += 1
            next_move = now + rng.uniform(0.01, 0.3)
        try:
            message = await asyncio.wait_for(socket.recv(), max(0.001, next_move - now))
        except (TimeoutError, asyncio.TimeoutError):
            if now - heard > STUCK:
                raise
            continue
        heard = now
        if isinstance(message, bytes):
            (length,) = struct.unpack_from("<I", message)
            header = json.loads(message[4 : 4 + length])
            if header["clip"] == "edited":
                tally.pictures += 1
                await socket.send(json.dumps({"type": "shown", "number": header["number"]}))
            continue
        data = json.loads(message)
        if data["type"] == "state":
            ids, words = [layer["id"] for layer in data["layers"]], data["words"]
            empty = data["clip"] is None  # somebody has cancelled the first one
        elif data["type"] == "problem" and not data["text"].startswith(EXPECTED):
            tally.problems[data["text"]] += 1


def moves(ids: Sequence[int], words: Sequence[list], rng: random.Random) -> Iterator[dict]:
    """What a user does next: mostly a slider."""
    what = rng.random()
    if not ids or (what < 0.1 and len(ids) < 6):
        kind = rng.choice(KINDS)
        other = (
            {"prompt": rng.choice(PROMPTS), "seed": rng.randrange(3)} if kind in ("towards", "fade", "palette") else {}
        )
        yield {"type": "add", "kind": kind, **other}
    elif what < 0.7:
        id = rng.choice(ids)
        for step in range(rng.randint(1, 12)):
            yield {"type": "amount", "id": id, "amount": rng.uniform(-1, 1), "live": step > 0, "stamp": 1.0}
    elif what < 0.76:
        yield {"type": "remove", "id": rng.choice(ids)}
    elif what < 0.82:
        yield {"type": rng.choice(("undo", "redo"))}
    elif what < 0.88 and words:
        some = rng.sample(words, min(len(words), rng.randint(0, 3)))
        yield {"type": "confine", "id": rng.choice(ids), "words": some}
        yield {"type": "look", "words": some}
    elif what < 0.94:
        yield {"type": "move", "id": rng.choice(ids), "to": rng.randrange(6)}
    elif what < 0.97:
        yield {"type": "switch", "id": rng.choice(ids), "on": rng.random() < 0.7}
    elif what < 0.99:
        yield {"type": "generate", "prompt": rng.choice(PROMPTS), "seed": rng.randrange(3), "steps": 2, "guidance": 1.5}
    else:
        yield {"type": "cancel"}


def malformed(rng: random.Random) -> str | bytes:
    """A message that was damaged, or noise."""
    text = json.dumps(next(iter(moves([1, 2], [["circle", 0]], rng))))
    for _ in range(rng.randint(1, 5)):
        at = rng.randrange(len(text) + 1)
        piece = rng.choice(["{", "]", '"', "1e999", "null", "\x00", "é", "[" * 2000, rng.choice(string.printable)])
        text = text[:at] + piece + text[at + rng.randint(0, 5) :]
    return text.encode() if rng.random() < 0.1 else text


async def fuzz(address: str, count: int, rng: random.Random, tally: Tally) -> None:
    while tally.fuzzed < count:
        try:
            async with websockets.connect(address, max_size=None, compression=None) as socket:
                for _ in range(min(80, count - tally.fuzzed)):
                    await socket.send(malformed(rng))
                    tally.fuzzed += 1
                # what it says shows that it is there; each connection ends itself
                await asyncio.wait_for(socket.recv(), STUCK)
        except websockets.ConnectionClosed:
            continue


async def watch(pid: int, end: float, start: float, tally: Tally) -> None:
    while time.monotonic() < end:
        tally.memory.append((time.monotonic() - start, memory(pid)))
        await asyncio.sleep(1.0)


def growth(tally: Tally) -> float:
    """How much larger the last fifth of the run is than the second one, by their medians."""
    sizes = [size for _, size in tally.memory]
    fifth = max(1, len(sizes) // 5)
    middle = lambda values: sorted(values)[len(values) // 2]  # noqa: E731
    return middle(sizes[-fifth:]) / middle(sizes[fifth : 2 * fifth] or sizes) - 1


async def soak(seconds: float, clients: int, fuzzed: int, seed: int, log: Path) -> tuple[Tally, list[str]]:
    """Runs all of it; the tally, and what is wrong."""
    tally, wrong = Tally(), []
    with server(log) as (address, process):
        if seconds:
            await asyncio.wait_for(first_clip(address), 10 * STUCK)
        start = time.monotonic()
        end = start + seconds
        users = [client(address, end, random.Random(seed + i), tally) for i in range(clients)]
        await asyncio.gather(*users, watch(process.pid, end, start, tally))
        await fuzz(address, fuzzed, random.Random(seed), tally)
        async with websockets.connect(address, max_size=None) as socket:  # it is still there for the next one
            await asyncio.wait_for(socket.recv(), STUCK)
        if process.poll() is not None:
            wrong.append(f"the studio ended with {process.returncode}")
    lines = log.read_text().splitlines()
    if errors := [line for line in lines if "Error" in line or "Traceback" in line or "exception" in line.lower()]:
        wrong.append(f"the log has {len(errors)} errors: {errors[0]}")
    if seconds and not tally.pictures:
        wrong.append("no picture came")
    if tally.stuck:
        wrong.append(f"{tally.stuck} clients were stuck")
    if tally.problems:
        wrong.append(f"clients were told: {dict(tally.problems.most_common(5))}")
    if seconds >= 60 and growth(tally) > GROWTH:
        wrong.append(f"memory grew by {growth(tally):.1%}")
    return tally, wrong


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--fuzz", type=int, default=0, metavar="MESSAGES")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, default=Path("build/studio_soak.log"), help="What the studio prints.")
    given = parser.parse_args(arguments)
    given.log.parent.mkdir(parents=True, exist_ok=True)
    tally, wrong = asyncio.run(soak(given.seconds, given.clients, given.fuzz, given.seed, given.log))
    print(
        f"{given.seconds:g} s, {given.clients} clients: {tally.connections} connections ({tally.vanished} vanished), "
        f"{tally.sent} messages, {tally.pictures} pictures, {tally.fuzzed} malformed messages"
    )
    if tally.memory:
        print(f"memory {tally.memory[0][1]:.0f} to {tally.memory[-1][1]:.0f} MiB, after warm-up {growth(tally):+.2%}")
    for line in wrong:
        print(f"WRONG: {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
