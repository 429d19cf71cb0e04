"""What may go wrong for a user, and the one line that says so."""

from __future__ import annotations

import sys

__all__ = ["FAILED", "INTERRUPTED", "TERMINATED", "USAGE", "UserError", "explain", "one_line"]

FAILED = 1
USAGE = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
TERMINATED = 143  # 128 + SIGTERM

# Import name -> the package that pip knows, of the extra `cli`; and what only `latentfast bench` wants.
EXTRA = {
    "PIL": "pillow",
    "accelerate": "accelerate",
    "av": "av",
    "diffusers": "diffusers",
    "jinja2": "jinja2",
    "numpy": "numpy",
    "rich": "rich",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "transformers": "transformers",
    "typer": "typer",
}
BENCH_EXTRA = {"matplotlib": "matplotlib"}
STUDIO_EXTRA = {name: name for name in ("anyio", "starlette", "uvicorn", "websockets")}


class UserError(Exception):
    """A mistake that the caller can mend; its text is the line that the terminal shows."""


def one_line(error: BaseException) -> str:
    """An exception's text without line breaks; its type's name if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def explain(error: Exception) -> tuple[str, int] | None:
    """The line and the exit status for an expected failure, ``None`` for a bug of ours."""
    if isinstance(error, UserError):
        return one_line(error), USAGE
    if hasattr(error, "format_message"):
        # A click exception: Typer carries its own copy of click, whose classes it doesn't export.
        return " ".join(error.format_message().split()), getattr(error, "exit_code", USAGE)
    if isinstance(error, ImportError):
        for missing in (error, error.__cause__):
            name = (getattr(missing, "name", None) or "").partition(".")[0]
            for extra, packages in (("cli", EXTRA), ("bench", BENCH_EXTRA), ("studio", STUDIO_EXTRA)):
                if name in packages:
                    return f"the package {packages[name]} is not installed: pip install 'latentfast[{extra}]'", FAILED
        return None
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or one_line(error)}{where}", FAILED
    # The class exists only where torch has been imported, and then this error may be one.
    out_of_memory = getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError)
    if isinstance(error, (MemoryError, out_of_memory)):
        return "out of memory: ask for fewer frames or a smaller picture", FAILED
    return None
