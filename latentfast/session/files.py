"""Trajectories as folders: `trajectory.safetensors` with their tensors, `run.json` with how they were made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentfast._output import atomic_outputs
from latentfast.cache import digest_tensor
from latentfast.cache.layout import aligned
from latentfast.integrations.diffusers.steps import State
from latentfast.session import states
from latentfast.session.arguments import from_data
from latentfast.session.record import RECORD, checksum, surroundings
from latentfast.session.trajectory import Request, Seeds, Trajectory

__all__ = ["TOOL", "inputs_of", "load", "read_record", "read_tensors", "request_of", "save"]

TOOL = "latentfast session"
#: Of the form of the record.
VERSION = 1
_TENSORS = "trajectory.safetensors"


def save(trajectory: Trajectory, folder: str | PathLike[str], pipe: Any) -> None:
    """See `Session.save`."""
    from safetensors.torch import save_file

    chain = _chain(trajectory)
    pool = states.Pool(torch.device("cpu"))
    links: list[dict[str, Any]] = []
    inputs: dict[str, Any] = {}
    kept: dict[str, str] = {}
    for number, link in enumerate(chain):
        if link.request.data is None:
            raise ValueError("trajectory: its call has something that can't be written, such as a callback")
        own = {step: link.state(step) for step in link.kept if link.owner(step) is link}
        held = {step: state for step, state in own.items() if state is not None}
        kept |= {f"{number}.{step}": checksum(state.latents) for step, state in held.items()}
        inputs |= {name: pool.write(x) for name, x in link.request.inputs.items()}
        links.append(
            {
                "request": link.request.data,
                "begin": link.begin,
                "edited": link.edited,
                "steps": link.steps,
                "latents": pool.write(link.latents),
                "states": {str(step): states.write(pool, state) for step, state in held.items()},
            }
        )
    tensors = _apart(pool.tensors)
    digests = {name: digest_tensor(x) for name, x in tensors.items()}
    record = {
        "tool": TOOL,
        "version": VERSION,
        "model": {
            "class": type(pipe).__name__,
            "source": _source(pipe),
            "dtype": str(pipe.dtype).removeprefix("torch."),
        },
        **surroundings(pipe.device),
        "checksums": {"latents": checksum(trajectory.latents), "states": kept, "tensors": digests},
        "inputs": inputs,
        "chain": links,
    }
    with atomic_outputs(Path(folder)) as (scratch,):
        scratch.mkdir()
        save_file(tensors, str(scratch / _TENSORS))
        (scratch / RECORD).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_record(path: Path) -> dict[str, Any]:
    """The record in a file, or in a folder.

    Raises:
        ValueError: it is no record.
    """
    file = path / RECORD if path.is_dir() else path
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("tool"), str):
        raise ValueError(f"{file} is no record of latentfast")
    return record


def load(folder: str | PathLike[str], pipe: Any) -> Trajectory:
    """See `Session.load`."""
    record = read_record(Path(folder))
    if record["tool"] != TOOL or record.get("version") != VERSION:
        raise ValueError(f"{folder} holds no trajectory of version {VERSION}, but {record['tool']!r}")
    if record["model"]["class"] != type(pipe).__name__:
        raise ValueError(f"{folder} is of {record['model']['class']}, and the session's pipeline {type(pipe).__name__}")
    tensors = read_tensors(Path(folder), record)
    inputs = inputs_of(record, tensors)
    device = pipe.device
    tensors = {name: x.to(device) for name, x in tensors.items()}
    made: Trajectory | None = None
    for link in record["chain"]:
        held: dict[int, State] = {int(step): states.read_state(tensors, data) for step, data in link["states"].items()}
        made = Trajectory(
            request=request_of(link["request"], inputs, device),
            steps=link["steps"],
            latents=states.read(tensors, link["latents"]),
            kept=tuple(sorted(held)),
            begin=link["begin"],
            parent=made,
            edited=link["edited"],
            _find=held.get,
        )
    assert made is not None  # a chain has a link
    return made


def read_tensors(folder: Path, record: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a folder, on the CPU, aligned, each checked against its digest.

    Raises:
        ValueError: they are not there, no safetensors, or not those that were saved.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(str(folder / _TENSORS))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / _TENSORS} can't be read: {error}") from error
    digests: Mapping[str, str] = record["checksums"]["tensors"]
    known = {name: digest_tensor(x) for name, x in tensors.items()}
    wrong = sorted(name for name in {*digests, *known} if digests.get(name) != known.get(name))
    if wrong:
        raise ValueError(f"{folder / _TENSORS} is damaged: {', '.join(wrong[:3])} is not what was saved")
    return {name: aligned(x) for name, x in tensors.items()}


def inputs_of(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that requests name."""
    return {name: states.read(tensors, value) for name, value in record["inputs"].items()}


def request_of(data: Mapping[str, Any], inputs: Mapping[str, Tensor], device: torch.device) -> Request:
    """A request from its data and the tensors that it names.

    Raises:
        ValueError: a tensor is missing.
    """
    call = {name: from_data(value, inputs) for name, value in data["call"].items()}
    seeds = data["seeds"]
    return Request(
        call=call,
        seeds=Seeds(tuple(seeds["devices"]), tuple(from_data(seeds["states"], inputs)), seeds["several"]),
        data=data,
        inputs=inputs,
        device=device,
    )


def _source(pipe: Any) -> str:
    """Where a pipeline was loaded from."""
    from latentfast import tiny

    source = str(dict(pipe.config).get("_name_or_path") or "")
    return "embedded" if source == str(tiny.model_path()) else source


def _chain(trajectory: Trajectory) -> list[Trajectory]:
    """From the one that began to this."""
    chain = [trajectory]
    while chain[0].parent is not None:
        chain.insert(0, chain[0].parent)
    return chain


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, none of which lies in another's memory: safetensors refuses those."""
    seen: set[int] = set()
    apart = {}
    for name, x in tensors.items():
        storage = x.untyped_storage()
        whole = storage.nbytes() == x.nbytes and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        apart[name] = x if whole else x.clone()
    return apart
