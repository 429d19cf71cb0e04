"""All stems' cases together, and which of them a run takes."""

import importlib
import json
import pkgutil
from dataclasses import asdict, dataclass, replace
from types import ModuleType

import torch

from latentfast import benchmarks
from latentfast.benchmarks.operation import Case

#: Every bench_<stem>.py of this folder.
STEMS: dict[str, ModuleType] = {
    module.name.removeprefix("bench_"): importlib.import_module(f"latentfast.benchmarks.{module.name}")
    for module in pkgutil.iter_modules(benchmarks.__path__)
    if module.name.startswith("bench_")
}


@dataclass(frozen=True)
class Selection:
    """Which cases: of these stems (none: all), with `only` in their name, on a device type.

    `models`: not at the sizes of the cases, but each operation once at these of MODELS, with `batch` samples.
    `dtype`: in another dtype than the cases name. `quick`: each operation once, in a tiny size.
    """

    device: str = "cpu"
    stems: tuple[str, ...] = ()
    only: str = ""
    models: tuple[str, ...] = ()
    batch: int = 1
    dtype: str = ""
    quick: bool = False

    def cases(self) -> list[Case]:
        """In the order of the stems' lists, a case of each in turn: a run that ends early has something of all."""
        gpu = self.device == "cuda" or (self.quick and not self.models)
        chosen = [STEMS[name] for name in self.stems or STEMS]
        lists = [list(stem.CASES if gpu else stem.CPU_CASES) for stem in chosen]
        found = [cases[i] for i in range(max(map(len, lists), default=0)) for cases in lists if i < len(cases)]
        if self.models:
            found = [
                replace(case, size=model, batch=self.batch)
                for model in self.models
                for case in found
                if model in case.operation.sizes
            ]
        elif self.quick:
            found = [case.tiny() for case in found]
        if self.dtype:
            found = [replace(case, dtype=getattr(torch, self.dtype)) for case in found]
        by_id = {case.id: case for case in found}
        return [case for name, case in by_id.items() if self.only in name]

    def without_size(self) -> list[str]:
        """The operations that have none of the models' sizes, as `stem: operation`."""
        if not self.models:
            return []
        operations = {
            f"{name}: {case.operation.name}": case.operation
            for name in self.stems or STEMS
            for case in STEMS[name].CASES
        }
        return [name for name, op in operations.items() if not set(self.models) & set(op.sizes)]

    def to_json(self) -> str:
        """For the command line of another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Selection":
        """What `to_json` wrote."""
        data = json.loads(text)
        return cls(**data | {name: tuple(data[name]) for name in ("stems", "models")})
