"""The safetensors format: tensors as bytes, and bytes as tensors, without a copy where there need be none.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name to dtype, shape and place), and
the tensors' bytes one after the other. `header` and `host_tensor` write it, `parse_header` reads it and believes
nothing. The library `safetensors` is not used for it, since it can neither stream to an object store nor checksum on
the way; what is written here opens with `safetensors.torch.load_file`. Two complex dtypes unknown to it are stored as
real numbers with a last dimension of two.
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import CheckpointError
from .strict_json import looks_like, read_json, take, take_counts

HEADER_LIMIT_BYTES = 100_000_000  # the library's own limit
MOST_DIMENSIONS = 64
PREFIX_BYTES = 8

_CODES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_AS_REAL = {torch.complex128: torch.float64, torch.complex32: torch.float16}
_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in (*_CODES, *_AS_REAL)}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: what it is and which bytes of the file it takes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for `torch.float32`: the name of a dtype in index.json."""
    return str(dtype).removeprefix("torch.")


def named_dtype(name: str, where: str) -> torch.dtype:
    """The dtype of that name; `where` names the file in the error."""
    if name not in _BY_NAME:
        raise CheckpointError(
            f"{where} names the dtype {name!r:.80}, which is unknown here. A newer version may read it."
        )
    return _BY_NAME[name]


def why_not_storable(tensor: Tensor) -> str | None:
    """Why `tensor` cannot be written, to follow "is a tensor that", or None if it can."""
    if hasattr(tensor, "__tensor_flatten__") and not hasattr(tensor, "placements"):  # a DTensor is stored by boxes
        return f"is a {type(tensor).__name__}, whose data lie in other tensors. Store those, or its plain form."
    if tensor.layout is not torch.strided:
        return f"has the layout {tensor.layout}. Store its indices and values, or its to_dense()."
    if tensor.is_meta:
        return "is on the meta device: it has no data. Initialise it first."
    if tensor.dtype not in _CODES and tensor.dtype not in _AS_REAL:
        return f"has the dtype {tensor.dtype}, for which the format has no code. Convert it to another dtype."
    return None


def stored_form(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[torch.dtype, tuple[int, ...]]:
    """The dtype and shape under which a file holds a tensor of this dtype and shape."""
    return (_AS_REAL[dtype], (*shape, 2)) if dtype in _AS_REAL else (dtype, shape)


def host_tensor(tensor: Tensor) -> Tensor:
    """`tensor` as it is written: in host memory, contiguous, in its stored form; itself where it is all that."""
    tensor = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return torch.view_as_real(tensor) if tensor.dtype in _AS_REAL else tensor


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous host tensor, to read or to write in place; they keep the tensor alive."""
    if tensor.nbytes == 0:
        return memoryview(bytearray())
    array = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    array.owner = tensor  # type: ignore[attr-defined]  # an address alone owns nothing
    return memoryview(array).cast("B")


def empty_host_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A new tensor to fill, and its stored form, which shares its memory."""
    tensor = torch.empty(shape, dtype=dtype)
    return tensor, torch.view_as_real(tensor) if dtype in _AS_REAL else tensor


def header(entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[bytes, list[str]]:
    """The first bytes of a file of these tensors, given as dtype and shape, and the order in which they follow."""
    # Larger items first, as the library writes them, so that every tensor is aligned for its dtype.
    order = sorted(entries, key=lambda name: -stored_form(*entries[name])[0].itemsize)
    record: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        dtype, shape = stored_form(*entries[name])
        end = offset + math.prod(shape) * dtype.itemsize
        record[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    try:
        text = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError as error:
        raise CheckpointError(f"the name of a tensor cannot be written as UTF-8 ({error}). Rename it.") from error
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT_BYTES:
        raise CheckpointError(f"{len(order)} tensors need a header of {len(text)} bytes, more than the format allows.")
    return len(text).to_bytes(PREFIX_BYTES, "little") + text, order


def header_length(prefix: bytes, file_size: int, where: str) -> int:
    """The length of the header that the first bytes of a file announce."""
    length = int.from_bytes(prefix[:PREFIX_BYTES], "little")
    if len(prefix) < PREFIX_BYTES or length > min(file_size - PREFIX_BYTES, HEADER_LIMIT_BYTES):
        raise CheckpointError(
            f"{where} is no safetensors file{looks_like(prefix)}: its {file_size} bytes announce a header of {length}."
        )
    return length


def parse_header(text: bytes, file_size: int, where: str) -> dict[str, Entry]:
    """The tensors of a file by name, after a proof that they fill it exactly, without gap or overlap."""
    record = read_json(text, f"the header of {where}")
    if type(record) is not dict:
        raise CheckpointError(f"the header of {where} is no JSON object.")
    first = PREFIX_BYTES + len(text)
    entries = {
        name: _parse_entry(entry, first, f"the header of {where}, tensor {name!r:.200}")
        for name, entry in record.items()
        if name != "__metadata__"
    }
    position = first
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            raise CheckpointError(f"the header of {where}: tensor {name!r:.200} leaves a gap or overlaps another.")
        position = entry.stop
    if position != file_size:
        raise CheckpointError(f"{where} has {file_size} bytes, but its tensors end at {position}.")
    return entries


def _parse_entry(record: object, first: int, where: str) -> Entry:
    code = take(record, "dtype", str, where)
    if code not in _DTYPES:
        raise CheckpointError(f"{where} has the dtype {code!r:.80}, which is unknown here.")
    dtype = _DTYPES[code]
    shape = take_counts(record, "shape", where, MOST_DIMENSIONS)
    offsets = take_counts(record, "data_offsets", where, 2)
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{where}: {list(shape)} of {code} cannot take the bytes {list(offsets)}.")
    return Entry(dtype, shape, first + offsets[0], first + offsets[1])
