"""`python -m latentfast.doctor`: versions, build, card and backends with reasons; what a bug report should carry."""

import platform
import sys
from importlib import metadata

import torch

import latentfast

_PACKAGES = ("torch", "triton", "numpy", "diffusers", "transformers", "safetensors", "typer", "rich", "av")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _build() -> str:
    try:
        from latentfast._build_info import SUMMARY  # written by setup.py
    except ImportError:
        return "pure Python: nothing was built (pip install --no-build-isolation --editable .)"
    return SUMMARY


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        return ["no CUDA device"]
    rows = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        rows.append(
            f"cuda:{index} {card.name}, compute capability {card.major}.{card.minor}, {card.multi_processor_count} "
            f"multiprocessors, {card.total_memory / 2**30:.0f} GiB"
        )
    return rows


def report() -> str:
    """The report as text, one fact a line."""
    lines = [
        f"latentfast   {latentfast.__version__}",
        f"python       {sys.version.split()[0]} on {platform.platform()}",
    ]
    lines += [f"{name:12s} {_version(name)}" for name in _PACKAGES]
    lines += [f"cuda         torch was built for {torch.version.cuda or 'the CPU alone'}"]
    lines += [f"threads      {torch.get_num_threads()}", f"build        {_build()}"]
    lines += [f"device       {row}" for row in _devices()]
    for backend in latentfast.backends():
        lines.append(f"backend      {backend.name}: {'available' if backend.available else 'no: ' + backend.reason}")
    return "\n".join(lines)


def main() -> None:
    """Print the report."""
    print(report())


if __name__ == "__main__":
    main()
