"""For every integration: float32 is float32."""

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
