"""Every environment variable that latentfast reads, in one place."""

import os


def backend() -> str | None:
    """LATENTFAST_BACKEND: force one backend for the whole process (see `latentfast.backends`)."""
    return os.environ.get("LATENTFAST_BACKEND") or None


def triton_interpreted() -> bool:
    """TRITON_INTERPRET: Triton's own switch; with it the Triton kernels run on the CPU, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
