"""The command line ``latentfast``: ``demo``, ``generate``, ``interpolate``, ``edit``, ``studio``, ``replay``,
``doctor``, ``bench``, ``cache``, ``recipe``.

This module imports nothing but the standard library, so that a missing extra ends in one clear line instead of a
traceback. :mod:`latentfast.cli.app` holds the commands.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from latentfast.cli.errors import FAILED, INTERRUPTED, TERMINATED, explain

__all__ = ["main"]

# The command line never downloads anything: models are folders. These must be set before huggingface_hub is imported.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        argv: the arguments after the program's name; ``None`` takes them from ``sys.argv``.

    Returns:
        0 on success, 2 for a mistake of the caller (bad option, no such folder, an output that can't be written),
        1 for a failure of the surroundings (missing extra, out of memory), 130 after Ctrl-C, 143 after SIGTERM.
        In every case but 0 one line on stderr says why, but for a reader of standard output that has gone (1), and no
        half-written file stays behind.
        A programming error of latentfast's own is not dressed up: it keeps its traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    os.environ.update(OFFLINE)
    try:
        with _terminate_as_exit():
            from latentfast.cli.app import run

            status = run(arguments)
            sys.stdout.flush()  # a reader that has gone is met here, and not when the interpreter ends
            return status
    except KeyboardInterrupt:
        print("latentfast: interrupted; nothing was left behind", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # who reads standard output has enough, as `| head` has
        with suppress(OSError, ValueError):  # what is still to be flushed has nowhere to go
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED  # as rich has it where it prints
    except Exception as error:
        explained = explain(error)
        if explained is None or debug:
            raise
        message, status = explained
        print(f"latentfast: error: {message}", file=sys.stderr)
        return status


@contextmanager
def _terminate_as_exit() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does, so that unfinished outputs are removed."""

    def leave(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    try:
        previous = signal.signal(signal.SIGTERM, leave)
    except ValueError:  # not the main thread: a host program has its own handling
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
