"""Digests of tensors and modules: what they see, and what they must not."""

from __future__ import annotations

import pytest
import torch

from latentfast.cache import digest_module, digest_tensor
from latentfast.cache.digest import CHUNK


def test_a_tensors_digest_is_of_dtype_shape_and_bits() -> None:
    x = torch.randn(6, 4)
    others = [x.view(4, 6), x.half(), x.view(torch.int32), x + 0.1, -x, x.flatten(), x[:0], x.new_zeros(0, 6)]
    digests = {digest_tensor(tensor) for tensor in [x, *others]}
    assert len(digests) == 1 + len(others)
    assert digest_tensor(torch.tensor(0.0)) != digest_tensor(torch.tensor(-0.0))
    assert digest_tensor(x.T.contiguous().T) == digest_tensor(x) == digest_tensor(x.clone().requires_grad_())
    assert digest_tensor(torch.stack([x, x], -1)[..., 0]) == digest_tensor(x)
    long = torch.zeros(CHUNK + 8, dtype=torch.uint8)
    assert digest_tensor(long) != digest_tensor(long.index_fill(0, torch.tensor(CHUNK + 7), 1))
    with pytest.raises(TypeError, match="tensor: expected a tensor"):
        digest_tensor([1.0])
    with pytest.raises(ValueError, match="meta device"):
        digest_tensor(torch.zeros(2, device="meta"))


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    made = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 3).half())
    made.register_buffer("unsaved", torch.arange(3), persistent=False)
    return made


@torch.no_grad()
def test_a_modules_digest_sees_every_change() -> None:
    reference = digest_module(network())
    assert digest_module(network()) == reference
    changes = [
        lambda m: m[0].weight.add_(1),
        lambda m: m[0].weight.data.add_(1),  # as adapters are merged: no version counter moves
        lambda m: setattr(m[0].weight, "data", m[0].weight.data * 2),
        lambda m: m[2].bias.data.view(torch.int16)[1:2].bitwise_xor_(1),
        lambda m: m.unsaved.add_(1),
        lambda m: m[1].running_mean.fill_(2),
        lambda m: m.double(),
        lambda m: m.append(torch.nn.Linear(1, 1)),
        lambda m: setattr(m[0], "bias", None),
    ]
    for change in changes:
        module = network()
        assert digest_module(module) == reference
        change(module)
        assert digest_module(module) != reference
    with pytest.raises(ValueError, match=r"0\.bias.*meta device"):
        digest_module(network().to("meta"))
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        digest_module({})


def test_a_modules_digest_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    from latentfast.cache import digest

    module = network()
    first = digest_module(module)
    monkeypatch.setattr(digest, "_digest", lambda name, tensor: pytest.fail("hashed again"))
    assert digest_module(module) == first
