"""How an entry's tensors lie in one flat buffer: the same in device memory, in host memory and in the file.

The file is a safetensors file (https://github.com/huggingface/safetensors, "Format"): the header's length as eight
bytes, the header as JSON, the tensors without gaps. Its ``__metadata__`` holds the description and a checksum over the
header and the tensors. The format is written here rather than by the safetensors package so that several threads can
hash and write, that the checksum can be put in after the last byte is known, and that reading fills memory of ours: a
file mapped into memory kills the process when somebody truncates it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from latentfast.cache.digest import checksum_of
from latentfast.cache.key import Key

__all__ = ["CorruptError", "Header", "Layout", "aligned"]

FORMAT = "2"
#: The names of safetensors.
DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = "__metadata__"
#: The checksum is the first thing in the header, so that it stands at the same place in every file.
_START = b'{"__metadata__":{"checksum":"'
CHECKSUM_AT = 8 + len(_START)
_NO_CHECKSUM = b"0" * 64
_MOST_HEADER = 100_000_000  # as the safetensors package has it
_MOST_ALIGNMENT = 256  # the most that a matrix library looks for


class CorruptError(Exception):
    """A file that is no whole entry: truncated, changed, or somebody else's."""


@dataclass(frozen=True)
class Piece:
    """One tensor's place in the buffer, bytes from its start."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Layout:
    """The places of an entry's tensors, by falling alignment and then by name; ``nbytes`` of all of them."""

    pieces: tuple[Piece, ...]
    nbytes: int

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        """The layout for these tensors; refuses what the format does not have."""
        if not isinstance(tensors, Mapping):
            raise TypeError(f"tensors: expected a mapping of names to tensors, got {type(tensors).__name__}")
        for name, tensor in tensors.items():
            if not isinstance(name, str) or name == METADATA:
                raise TypeError(f"tensors: names must be text other than '{METADATA}', got {name!r}")
            if not isinstance(tensor, Tensor):
                raise TypeError(f"tensors['{name}']: expected a tensor, got {type(tensor).__name__}")
            if tensor.dtype not in NAMES or tensor.layout is not torch.strided or tensor.is_meta:
                what = "on the meta device" if tensor.is_meta else f"of {tensor.dtype}, {tensor.layout}"
                raise ValueError(f"tensors['{name}']: safetensors has no place for a tensor {what}")
        pieces, start = [], 0
        for name, tensor in sorted(tensors.items(), key=lambda item: (-_alignment(item[1].nbytes), item[0])):
            pieces.append(Piece(name, tensor.dtype, tuple(tensor.shape), start, start + tensor.nbytes))
            start += tensor.nbytes
        return cls(tuple(pieces), start)

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The tensors of a buffer (uint8, at least ``nbytes`` long), by name in alphabetical order; no copies."""
        pieces = sorted(self.pieces, key=lambda piece: piece.name)
        return {piece.name: buffer[piece.start : piece.end].view(piece.dtype).view(piece.shape) for piece in pieces}

    def pack(self, tensors: Mapping[str, Tensor], buffer: Tensor) -> None:
        """Copy tensors of this layout into a buffer, on the buffer's device."""
        with torch.no_grad():
            for name, view in self.views(buffer).items():
                view.copy_(tensors[name])


@dataclass(frozen=True)
class Header:
    """What stands at the beginning of a file.

    Attributes:
        key: whose description the file holds.
        layout: of its tensors.
        seconds: what it cost to make them.
        created: when, seconds since 1970.
        notes: further texts of the metadata.
        raw: the bytes from the file's first to the first tensor's, with zeros for the checksum.
        checksum: as the file has it, 64 hexadecimal digits.
    """

    key: Key
    layout: Layout
    seconds: float
    created: float
    notes: dict[str, str] = field(default_factory=dict)
    raw: bytes = b""
    checksum: str = ""

    @property
    def file_bytes(self) -> int:
        return len(self.raw) + self.layout.nbytes

    @classmethod
    def make(
        cls, key: Key, layout: Layout, *, seconds: float, created: float, notes: Mapping[str, str] | None = None
    ) -> Header:
        """The header of a new file; its checksum is known when the tensors are."""
        metadata = {
            "checksum": _NO_CHECKSUM.decode(),
            "latentfast.cache": FORMAT,
            "key": key.digest,
            "description": key.canonical,
            "seconds": repr(float(seconds)),
            "created": repr(float(created)),
            **(notes or {}),
        }
        header: dict[str, Any] = {METADATA: metadata}
        for piece in layout.pieces:
            header[piece.name] = {
                "dtype": NAMES[piece.dtype],
                "shape": list(piece.shape),
                "data_offsets": [piece.start, piece.end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight, as the format wants it
        raw = struct.pack("<Q", len(text)) + text
        return cls(key, layout, float(seconds), float(created), dict(notes or {}), raw)

    def sum(self, chunks: bytes) -> str:
        """The checksum that belongs to this header and these chunks' digests."""
        return checksum_of(self.raw + chunks).hex()

    @staticmethod
    def length(start: bytes, file_bytes: int) -> int:
        """How many bytes of a file are header, by its first eight."""
        if len(start) < 8:
            raise CorruptError(f"it ends after {len(start)} bytes")
        length = 8 + struct.unpack("<Q", start[:8])[0]
        if not CHECKSUM_AT + 64 <= length <= min(file_bytes, _MOST_HEADER):
            raise CorruptError(f"its header would be {length} bytes long")
        return length

    @classmethod
    def parse(cls, raw: bytes, file_bytes: int) -> Header:
        """Read the header's bytes, `length` of them; nothing in them is trusted before the checksum has been."""
        if not raw[8:].startswith(_START):
            raise CorruptError("it is not an entry of a latentfast cache")
        checksum = raw[CHECKSUM_AT : CHECKSUM_AT + 64]
        raw = raw[:CHECKSUM_AT] + _NO_CHECKSUM + raw[CHECKSUM_AT + 64 :]
        try:
            header = json.loads(raw[8:])
            metadata = header.pop(METADATA)
            if metadata.pop("latentfast.cache") != FORMAT:
                raise CorruptError("it has another version of the format")
            metadata.pop("checksum")
            key = Key.of_canonical(metadata.pop("description"))
            if metadata.pop("key") != key.digest:
                raise CorruptError("its name and its description differ")
            seconds, created = float(metadata.pop("seconds")), float(metadata.pop("created"))
            layout = _layout(header)
            found = cls(key, layout, seconds, created, metadata, raw, checksum.decode("ascii"))
        except CorruptError:
            raise
        # whatever wrong bytes lead to: a file must not end a run
        except Exception as error:
            raise CorruptError(f"its header is not readable: {type(error).__name__}: {error}") from error
        if found.file_bytes != file_bytes:
            raise CorruptError(f"it has {file_bytes} bytes instead of {found.file_bytes}")
        return found


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it where its memory does not begin as memory of its own would.

    Matrix libraries choose their kernels by the alignment of what they read: the same numbers at another place in a
    file would lead to other bits.
    """
    least = 64 if tensor.device.type == "cpu" else _MOST_ALIGNMENT
    return tensor.clone() if tensor.data_ptr() % least else tensor


def _alignment(nbytes: int) -> int:
    """The largest power of two that divides a size; if sizes follow each other by it falling, starts have it too."""
    return min(nbytes & -nbytes or _MOST_ALIGNMENT, _MOST_ALIGNMENT)


def _layout(header: dict[str, Any]) -> Layout:
    """The layout that a header's JSON describes; the pieces must follow each other without gaps."""
    pieces, end = [], 0
    for name, item in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"]):
        dtype, shape, (start, stop) = DTYPES[item["dtype"]], tuple(item["shape"]), item["data_offsets"]
        size = dtype.itemsize
        for extent in shape:
            if not isinstance(extent, int) or extent < 0:
                raise CorruptError(f"the shape of '{name}' is {shape}")
            size *= extent
        if start != end or stop - start != size or start % dtype.itemsize:
            raise CorruptError(f"'{name}' lies at {start} to {stop}")
        pieces.append(Piece(name, dtype, shape, start, stop))
        end = stop
    return Layout(tuple(pieces), end)
