"""A recorded sampling, made again: whether its latents have the same bits, and what is different if not."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentfast.session import files
from latentfast.session.describe import describe_pipeline
from latentfast.session.record import checksum, differences, surroundings
from latentfast.session.trajectory import Trajectory

if TYPE_CHECKING:
    from latentfast.session.session import OnStep, Session

__all__ = ["Replay", "replay"]


@dataclass(frozen=True)
class Replay:
    """What came of making a trajectory again.

    Attributes:
        trajectory: The new one.
        then: The recorded checksum of the latents at its end.
        now: That of the new ones.
        differences: What is not as it was, of versions, machine and pipeline: a line each.
    """

    trajectory: Trajectory
    then: str
    now: str
    differences: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether the latents have the same bits."""
        return self.then == self.now


def replay(session: Session, path: str | PathLike[str], on_step: OnStep | None) -> Replay:
    """See `Session.replay`."""
    record = files.read_record(Path(path))
    if record["tool"] != files.TOOL:
        raise ValueError(f"path: {path} was made by {record['tool']}, not by a session")
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    inputs = files.inputs_of(record, files.read_tensors(folder, record))
    chain, device = record["chain"], session.pipe.device
    made: Trajectory | None = None
    for number, link in enumerate(chain):
        skips = number + 1 < len(chain) and bool(chain[number + 1]["request"]["from"].get("skipped"))
        asked = files.request_of(link["request"], inputs, device)
        made = session._again(asked, made, skips, on_step)
    assert made is not None  # a chain has a link
    then: dict[str, Any] = {name: record[name] for name in ("backend", "machine", "versions")}
    then["pipeline"] = chain[-1]["request"]["pipeline"]
    now = surroundings(device) | {"pipeline": describe_pipeline(session.pipe, device)}
    for part in (then, now):  # said with the machine and the versions
        part["pipeline"] = {name: x for name, x in part["pipeline"].items() if name != "environment"}
    return Replay(made, record["checksums"]["latents"], checksum(made.latents), tuple(differences(then, now)))
