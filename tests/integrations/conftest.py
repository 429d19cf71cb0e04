"""For every integration: float32 is float32, and guidance waits for small clips too."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    """A convolution in TF32 rounds its inputs to eleven bits: what differs by one in the last place may then differ by
    thousands.
    """
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(autouse=True)
def _small_clips_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU they don't, as it does not pay; the tests' clips are small, and they are to see what a GPU's see."""
    monkeypatch.setattr("latentfast.integrations.diffusers.guidance.LEAST_ON_CPU", 0)
