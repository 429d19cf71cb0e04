"""Digests over 1 MiB chunks by several threads: SHA-256 of tensors and modules, BLAKE3 of files.

A digest of long content is that of a prefix and of its chunks' digests in their order: chunks let the cores share the
work, and files be hashed on their way. Names are SHA-256, which everything can make; one core makes 1.4 to 2 GB/s of
it, less than a disk writes. Files, which nothing else has to check, have BLAKE3, 7 GB/s.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["CHUNK", "by_chunks", "bytes_of", "checksum_of", "digest_module", "digest_tensor", "parts_of", "submit"]

CHUNK = 1 << 20
T = TypeVar("T")

# Fingerprints of modules by module: (what their tensors looked like when it was taken, the fingerprint).
_modules: weakref.WeakKeyDictionary[nn.Module, tuple[Any, str]] = weakref.WeakKeyDictionary()
_modules_lock = threading.Lock()


@cache
def pool() -> ThreadPoolExecutor:
    """The threads that hash, read and write chunks; no task of theirs waits for another."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="latentfast-cache-chunks")


os.register_at_fork(after_in_child=pool.cache_clear)  # a child has none of the threads


def submit(threads: ThreadPoolExecutor, call: Callable[..., T], *arguments: Any) -> Future[T]:
    """Have a call made by one of the threads; here and now, if the interpreter ends and they take no more work."""
    try:
        return threads.submit(call, *arguments)
    except RuntimeError:
        made: Future[T] = Future()
        try:
            made.set_result(call(*arguments))
        except Exception as error:
            made.set_exception(error)
        return made


def bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's memory, without a copy; the view keeps it alive."""
    if tensor.numel() == 0:
        return memoryview(bytearray())
    memory = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    memory._owner = tensor  # type: ignore[attr-defined]
    return memoryview(memory).cast("B")


def by_chunks(memory: memoryview, visit: Callable[[memoryview, int], bytes]) -> bytes:
    """What ``visit(chunk, its offset)`` gives for all chunks, joined; several at once if there are several."""
    starts = range(0, len(memory), CHUNK)
    pieces = (memory[start : start + CHUNK] for start in starts)
    if len(starts) <= 1:
        return b"".join(map(visit, pieces, starts))
    visits = [submit(pool(), visit, piece, start) for piece, start in zip(pieces, starts, strict=True)]
    try:
        return b"".join(each.result() for each in visits)
    finally:
        # When one has failed, the file that the others are at is about to be closed, and its number to be another's.
        for each in visits:
            each.cancel()
        wait(visits)


@cache
def _blake3() -> Callable[[bytes | memoryview], Any]:
    try:
        from blake3 import blake3
    except ImportError as error:
        raise ImportError(f"a cache in a folder needs blake3: pip install 'latentfast[cache]' ({error})") from error
    return blake3


def checksum_of(memory: bytes | memoryview) -> bytes:
    """BLAKE3 (O'Connor, Aumasson, Neves, Wilcox-O'Hearn 2020), 32 bytes.

    Raises:
        ImportError: the package is not there.
    """
    found: bytes = _blake3()(memory).digest()
    return found


def _hash_chunk(chunk: memoryview, start: int) -> bytes:
    return hashlib.sha256(chunk).digest()


def digest_tensor(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and values (bit by bit: -0.0 is not 0.0), 64 hexadecimal digits.

    It does not depend on the device or the strides. A tensor on a device is copied to the host, which waits for it.

    Args:
        tensor: of any dtype and shape.

    Raises:
        TypeError: it is no tensor.
        ValueError: it has no values of its own (on the meta device, or sparse).

    Example:
        >>> import torch
        >>> from latentfast.cache import digest_tensor
        >>> digest_tensor(torch.arange(4.0)) == digest_tensor(torch.arange(8.0).view(4, 2)[:, 0] / 2)
        True
    """
    return _digest("tensor", tensor)


def _digest(name: str, tensor: Tensor) -> str:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.is_meta or tensor.layout is not torch.strided:
        kind = "on the meta device (offloaded?)" if tensor.is_meta else f"in the layout {tensor.layout}"
        raise ValueError(f"{name}: expected a tensor with values in memory, got one {kind}")
    values = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    head = json.dumps([str(tensor.dtype).removeprefix("torch."), list(tensor.shape)], separators=(",", ":"))
    return hashlib.sha256(head.encode() + b"\n" + by_chunks(bytes_of(values), _hash_chunk)).hexdigest()


def parts_of(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A module and all those in it, with what the names of their tensors begin with; one that is there twice comes
    twice. A transformer has a thousand, which ``named_modules()`` takes milliseconds for."""
    left = [("", module)]
    while left:
        prefix, part = left.pop()
        yield prefix, part
        left += [(f"{prefix}{name}.", child) for name, child in part._modules.items() if child is not None]


def digest_module(module: nn.Module) -> str:
    """The fingerprint of a module's weights: SHA-256 of its parameters' and buffers' names, dtypes, shapes and values.

    It is remembered for the module. Whether it still holds is seen from where the tensors lie, their version counters,
    and one exclusive-or over all of their bits, taken where they are: an adapter that is merged through ``.data`` moves
    no version counter. On a GPU that is one pass at memory speed and one wait.

    Args:
        module: whose ``named_parameters()`` and ``named_buffers()`` (those that are not saved too) count. What it is
            configured by does not, if no tensor shows it: put the configuration into the key as well.

    Raises:
        TypeError: it is no module.
        ValueError: one of its tensors is on the meta device (offloaded), named.

    Example:
        >>> import torch
        >>> from latentfast.cache import digest_module
        >>> layer = torch.nn.Linear(2, 2)
        >>> before = digest_module(layer)
        >>> _ = layer.weight.data.add_(1)
        >>> digest_module(layer) == before
        False
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    # duplicates are kept: tied weights are part of what a module is
    tensors = {
        prefix + name: tensor
        for prefix, part in parts_of(module)
        for name, tensor in (*part._parameters.items(), *part._buffers.items())
        if tensor is not None
    }
    look = _look(tensors)
    with _modules_lock:
        known = _modules.get(module)
    if known is not None and known[0] == look:
        return known[1]
    fingerprint = hashlib.sha256()
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in sorted(tensors.items()):
        same = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device)
        if tensor.is_meta or same not in seen:
            seen[same] = _digest(name, tensor)
        fingerprint.update(json.dumps([name, seen[same]]).encode() + b"\n")
    found = fingerprint.hexdigest()
    with _modules_lock:
        _modules[module] = (look, found)
    return found


def _look(tensors: dict[str, Tensor]) -> Any:
    """What changes when the tensors do, much cheaper than their digests."""
    facts = []
    sums: dict[torch.device, list[Tensor]] = {}
    for name, tensor in tensors.items():
        version = -1 if tensor.is_inference() else tensor._version
        facts.append((name, tensor.data_ptr(), version, tensor.dtype, tuple(tensor.shape), tensor.stride()))
        if tensor.numel() and not tensor.is_meta:
            sums.setdefault(tensor.device, []).append(_xor(tensor))
    # one copy to the host for each device, not for each tensor
    bits = {str(device): torch.stack(found).tolist() for device, found in sums.items()}
    return facts, bits


def _xor(tensor: Tensor) -> Tensor:
    """The exclusive-or of a tensor's bits, as an int64 scalar where it lies."""
    flat = tensor.detach()
    flat = (flat if flat.is_contiguous() else flat.contiguous()).view(-1)
    # words of eight bytes, where the memory is aligned for them; what is left, byte by byte
    if flat.data_ptr() % 8 or flat.storage_offset() * flat.itemsize % 8:
        flat = flat.clone()
    if flat.nbytes % 8 == 0:
        return torch.hash_tensor(flat.view(torch.int64)).view(torch.int64)
    flat = flat.view(torch.uint8)
    whole = flat.numel() // 8 * 8
    left = torch.hash_tensor(flat[whole:].to(torch.int64)).view(torch.int64)
    return left ^ torch.hash_tensor(flat[:whole].view(torch.int64)).view(torch.int64) if whole else left
