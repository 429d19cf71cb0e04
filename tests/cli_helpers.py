"""Helpers of the command line's tests."""

import os
import subprocess
import sys
from pathlib import Path

# Small enough for a random pipeline to make a clip in a fraction of a second.
SIZE = ["--height", "64", "--width", "64", "--frames", "9", "--steps", "3"]


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, hidden files too: relative path -> content (None for a folder)."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def spawn(*arguments: str, code: str | None = None, **options) -> subprocess.Popen[str]:
    """The command line in a process of its own; `code` replaces `-m latentfast`."""
    command = [sys.executable, *(["-c", code] if code else ["-m", "latentfast"]), *arguments]
    root = os.fspath(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )
