"""A measured row: one case on one backend with its baselines, as a line of JSON."""

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import latentfast

RESULTS = Path(__file__).parent / "results"
#: Baselines by their key in a row: the reference, eager and compiled, the field's expression, likewise, and the peer's
#: own code as it stands.
BASELINES = ("eager", "compiled", "field_eager", "field_compiled", "peer_eager")


@dataclass(frozen=True)
class Times:
    """Microseconds a call, [p20, p50, p80]: on the device, and until it returns to the host (None: not measured)."""

    device_us: list[float] | None = None
    host_us: list[float] | None = None
    launches: int | None = None
    peak_bytes: int | None = None

    @property
    def call_us(self) -> float | None:
        """What a caller waits for when calls follow one another: the longer of both medians."""
        return max((times[1] for times in (self.device_us, self.host_us) if times), default=None)


@dataclass(frozen=True)
class Environment:
    """Where a row was measured."""

    card: str
    driver: str
    torch: str
    triton: str
    python: str
    latentfast: str
    commit: str
    date: str
    threads: int
    copy_tbs: float  # measured copy rate, bytes read + written, in 10^12 bytes a second
    matrix_tflops: float | None = None  # measured rate of a large matrix product in the device's usual dtype


@dataclass(frozen=True)
class Row:
    """See README.md in this folder for the fields' meaning. Those with a default are missing in the oldest files."""

    op: str
    variant: str
    stem: str
    workload: str
    shape: list[int]
    dtype: str
    batch: int
    backend: str
    device_us: list[float] | None
    host_us: list[float] | None
    bytes: int
    floor_us: float
    floor_share: float | None
    gbs: float | None
    add_us: float | None  # host time of `add_` on one element, measured between this row's rounds
    baselines: dict[str, Times]
    field_note: str
    error_rel_l2: float
    error_ulp: float
    reference_rel_l2: float
    reference_ulp: float
    correct: bool
    quick: bool  # a smoke run on tiny sizes: says nothing about speed
    notes: list[str]
    environment: Environment = field(repr=False)
    peer_note: str = ""
    flops: int | None = None
    tflops: float | None = None
    launches: int | None = None
    peak_bytes: int | None = None

    @property
    def own(self) -> Times:
        """This row's own measurements, in the form of a baseline's."""
        return Times(self.device_us, self.host_us, self.launches, self.peak_bytes)

    @property
    def on_gpu(self) -> bool:
        """Whether it was measured on a GPU."""
        return self.environment.driver != "none"

    @property
    def case(self) -> tuple[str, str, str, str]:
        """What was computed, on whatever backend."""
        return self.op, self.variant, self.workload, self.dtype

    @property
    def key(self) -> tuple[str, ...]:
        """What a file has one row of: a case on a backend."""
        return *self.case, self.backend

    @property
    def title(self) -> str:
        """The operation as a table names it."""
        return f"{self.op} {self.variant}".strip()

    def speedup(self, baseline: str, clock: str) -> float | None:
        """How many times longer `baseline` takes by `clock`: "device_us" or "host_us", by the medians, or "call_us"."""
        own, other = (getattr(times, clock) for times in (self.own, self.baselines.get(baseline, Times())))
        if own and other:
            return other / own if clock == "call_us" else other[1] / own[1]
        return None

    def to_json(self) -> str:
        """One line. The speed-ups are written for the reader's sake; reading takes them from the times."""
        data = asdict(self)
        for name, times in data["baselines"].items():
            times["device_speedup"] = _rounded(self.speedup(name, "device_us"))
            times["host_speedup"] = _rounded(self.speedup(name, "host_us"))
        return json.dumps(_rounded(data), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> "Row":
        """The row of a line; ValueError if a field is missing or unknown."""
        data = json.loads(line)
        if not isinstance(data, dict):
            raise ValueError("a row is not a JSON object")
        known = {f.name: f.default is MISSING for f in fields(cls)}
        wrong = {name for name in set(data) ^ set(known) if known.get(name, True)}
        if wrong:
            raise ValueError(f"a row has the wrong fields: {sorted(wrong)}")
        data["environment"] = Environment(**data["environment"])
        measured = {f.name for f in fields(Times)}  # what else is written there follows from the row's times
        data["baselines"] = {
            name: Times(**{key: value for key, value in times.items() if key in measured})
            for name, times in data["baselines"].items()
        }
        return cls(**data)


def _rounded(x: Any) -> Any:
    """Five digits, enough for any clock; structures alike."""
    if isinstance(x, float):
        return float(f"{x:.5g}")
    if isinstance(x, dict):
        return {k: _rounded(v) for k, v in x.items()}
    return [_rounded(v) for v in x] if isinstance(x, list | tuple) else x


def _command(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _commit() -> str:
    """LATENTFAST_COMMIT, for a copy of the tree without its history; else what git says, marked if files differ."""
    here = Path(__file__).parent
    head = _command("git", "-C", str(here), "rev-parse", "--short=12", "HEAD")
    dirty = "+" if head and _command("git", "-C", str(here), "status", "--porcelain", "--untracked-files=no") else ""
    return os.environ.get("LATENTFAST_COMMIT") or (head + dirty) or "unknown"


def environment(device: torch.device, copy_rate: float, matrix_rate: float | None = None) -> Environment:
    """The machine that this process runs on; `copy_rate` in bytes a second, `matrix_rate` in flops a second."""
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device)
        driver = _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    else:
        card, driver = f"{_cpu_name()} ({torch.backends.cpu.get_cpu_capability()})", "none"
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    return Environment(
        card=card,
        driver=driver or "unknown",
        torch=torch.__version__,
        triton=triton,
        python=platform.python_version(),
        latentfast=latentfast.__version__,
        commit=_commit(),
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        threads=torch.get_num_threads(),
        copy_tbs=copy_rate / 1e12,
        matrix_tflops=matrix_rate / 1e12 if matrix_rate else None,
    )


def save(rows: Iterable[Row], path: Path) -> None:
    """Write rows to a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(row.to_json() + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)


def merged(before: Iterable[Row], measured: Iterable[Row]) -> list[Row]:
    """`before`, with what was measured anew in the places of the rows it replaces, and the rest of it behind them."""
    rows = {row.key: row for row in before}
    rows.update((row.key, row) for row in measured)
    return list(rows.values())


class RowsError(ValueError):
    """A file that holds something else."""


def load(path: Path) -> list[Row]:
    """The rows of a file; RowsError if it holds something else."""
    try:
        return [Row.from_json(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (ValueError, TypeError, KeyError) as error:
        raise RowsError(f"{path} is not a file of rows: {error}") from None


def load_all(folder: Path = RESULTS) -> list[Row]:
    """The rows of every file of a folder, smoke runs left out."""
    return [row for path in sorted(folder.glob("*.jsonl")) for row in load(path) if not row.quick]


def slug(text: str) -> str:
    """A name fit for a file."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
