"""Copies of tensors in host memory that is used again and again: all that training waits for when a save begins.

`Snapshot.take` copies a checkpoint's tensors; the copies can be written while training changes the originals. Tensors
on CUDA devices come through pinned memory on a side stream: the host does not wait at all, and later work on the
device waits for the copies alone. The memory is kept for the next save: as much as one state takes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from .index import Piece
from .save import Prepared

_CHUNK_BYTES = 256 * 2**20  # a power of two: torch rounds pinned memory up to one
_ALIGNMENT = 64


class Snapshot:
    """The memory, and the copies that were taken last."""

    def __init__(self) -> None:
        self._chunks: dict[bool, list[Tensor]] = {True: [], False: []}
        self._used: dict[bool, list[int]] = {True: [], False: []}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._events: list[torch.cuda.Event] = []
        self._sources: list[Tensor] = []

    def reserve(self, sizes: Iterable[tuple[int, bool]]) -> None:
        """Take memory for tensors of so many bytes, pinned or not, ahead of time: fresh pages cost more than copies."""
        for size, pinned in sizes:
            self._room(size, pinned).zero_()

    def take(self, prepared: Prepared) -> Prepared:
        """`prepared` with copies in the place of its tensors; overwrites the copies that were taken before.

        They are whole once `wait` has returned.
        """
        self._used = {pinned: [0] * len(chunks) for pinned, chunks in self._chunks.items()}
        waiting = self._begin(piece.tensor for pieces in prepared.parts.values() for piece in pieces)
        parts = {part: [self._copy(piece) for piece in pieces] for part, pieces in prepared.parts.items()}
        for device, stream in waiting.items():
            event = torch.cuda.Event()
            event.record(stream)
            torch.cuda.current_stream(device).wait_event(event)
            self._events.append(event)
        self._drop_unused()
        return replace(prepared, parts=parts)

    def wait(self) -> None:
        """Wait for the copies; in any thread."""
        for event in self._events:
            event.synchronize()
        self._events, self._sources = [], []

    def _begin(self, tensors: Iterable[Tensor]) -> dict[torch.device, torch.cuda.Stream]:
        """The side stream of each CUDA device, after what it has been told to do so far."""
        waiting: dict[torch.device, torch.cuda.Stream] = {}
        for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)
            waiting[device] = self._streams[device]
            waiting[device].wait_stream(torch.cuda.current_stream(device))
        return waiting

    def _copy(self, piece: Piece) -> Piece:
        source = piece.tensor.detach()
        copy = self._room(source.numel() * source.element_size(), source.is_cuda).view(source.dtype).view(source.shape)
        if source.is_cuda:
            self._sources.append(source)  # it must live until it is copied
            with torch.cuda.stream(self._streams[source.device]):
                copy.copy_(source, non_blocking=True)
        else:
            copy.copy_(source)
        return replace(piece, tensor=copy)

    def _room(self, size: int, pinned: bool) -> Tensor:
        """So many free bytes of a chunk."""
        chunks, used = self._chunks[pinned], self._used[pinned]
        rounded = -(-size // _ALIGNMENT) * _ALIGNMENT
        for index, chunk in enumerate(chunks):
            start = used[index]
            if start + rounded <= len(chunk) and (rounded <= _CHUNK_BYTES or start == 0):
                used[index] = start + rounded
                return chunk[start : start + size]
        chunks.append(torch.empty(max(rounded, _CHUNK_BYTES), dtype=torch.uint8, pin_memory=pinned))
        used.append(rounded)
        return chunks[-1][:size]

    def _drop_unused(self) -> None:
        for pinned, used in self._used.items():
            self._chunks[pinned] = [chunk for chunk, size in zip(self._chunks[pinned], used, strict=True) if size]
