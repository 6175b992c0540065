"""Files as blocks of 16 MiB, each with its crc32: summed while written, verified while read.

`write_blocks` streams buffers into a new file; `BlockReader` reads any range of it and verifies just the blocks that
the range touches, so that a rank which needs a part of a file reads and proves only that part.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO

from ...errors import CheckpointError
from .storage import Storage, reading

BLOCK_BYTES = 16 * 2**20
_CHECKSUM_THREADS = 4


@dataclass(frozen=True)
class FileRecord:
    """What the manifest knows of a file."""

    size: int
    crc32: tuple[int, ...]
    block_bytes: int


def write_blocks(storage: Storage, path: str, buffers: Iterable[memoryview]) -> FileRecord:
    """Write a new file; threads sum its blocks meanwhile, several since memory and fast disks outrun one."""
    block_bytes = BLOCK_BYTES
    sums: list[Future[int]] = []
    size = 0

    def pieces() -> Iterator[memoryview]:
        nonlocal size
        block: list[memoryview] = []
        for piece in _cut(buffers, block_bytes):
            yield piece
            block.append(piece)
            size += len(piece)
            if size % block_bytes == 0:
                sums.append(pool.submit(_crc32, block))
                block = []
                if len(sums) > _CHECKSUM_THREADS:
                    sums[-1 - _CHECKSUM_THREADS].result()  # so that few blocks are held in memory
        if block:
            sums.append(pool.submit(_crc32, block))

    with ThreadPoolExecutor(_CHECKSUM_THREADS, "checkpoint-crc32") as pool:
        storage.write(path, pieces())
    return FileRecord(size, tuple(checksum.result() for checksum in sums), block_bytes)


def record_of(data: bytes) -> FileRecord:
    """The record of a small file that holds `data`."""
    blocks = (data[start : start + BLOCK_BYTES] for start in range(0, len(data), BLOCK_BYTES))
    return FileRecord(len(data), tuple(zlib.crc32(block) for block in blocks), BLOCK_BYTES)


class BlockReader:
    """An open file; with a record, every byte that it gives is verified."""

    def __init__(self, storage: Storage, path: str, record: FileRecord | None = None) -> None:
        self.path = path
        self._record = record
        self._scratch = bytearray()  # the last block that was read only in part
        self._scratch_block = -1
        self._position = 0
        with reading(path):
            self._file: IO[bytes] = storage.open(path)
            self.size = self._file.seek(0, os.SEEK_END)
        self._position = self.size
        if record is not None and self.size != record.size:
            self._file.close()
            raise CheckpointError(
                f"{path} has {self.size} bytes, the manifest says {record.size}: it was cut or altered."
            )

    def read(self, start: int, stop: int) -> bytearray:
        """The bytes from `start` to `stop`."""
        data = bytearray(min(stop, self.size) - start)
        self.read_into(memoryview(data), start)
        return data

    def read_into(self, view: memoryview, start: int) -> None:
        """Fill `view` with the bytes from `start` on."""
        if self._record is None:
            self._fill(view, start)
            return
        block_bytes = self._record.block_bytes
        stop = start + len(view)
        for block in range(start // block_bytes, -(-stop // block_bytes)):
            first, last = block * block_bytes, min((block + 1) * block_bytes, self.size)
            if start <= first and last <= stop:
                self._fill_block(view[first - start : last - start], block)
                continue
            if self._scratch_block != block:
                self._scratch_block = -1
                if len(self._scratch) != last - first:
                    self._scratch = bytearray(last - first)
                self._fill_block(memoryview(self._scratch), block)
                self._scratch_block = block
            begin, end = max(start, first), min(stop, last)
            view[begin - start : end - start] = memoryview(self._scratch)[begin - first : end - first]

    def verify(self) -> None:
        """Read all of the file."""
        assert self._record is not None
        buffer = memoryview(bytearray(min(self._record.block_bytes, self.size)))
        for block, start in enumerate(range(0, self.size, self._record.block_bytes)):
            self._fill_block(buffer[: min(len(buffer), self.size - start)], block)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> BlockReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fill_block(self, view: memoryview, block: int) -> None:
        assert self._record is not None
        self._fill(view, block * self._record.block_bytes)
        if zlib.crc32(view) != self._record.crc32[block]:
            raise CheckpointError(
                f"{self.path} was altered: its block {block} (from byte {block * self._record.block_bytes}) does not "
                f"have the checksum in the manifest. Use another checkpoint."
            )

    def _fill(self, view: memoryview, start: int) -> None:
        with reading(self.path):
            if self._position != start:
                self._file.seek(start)
            done = 0
            while done < len(view):
                count = self._file.readinto(view[done:])  # type: ignore[attr-defined]  # IO lacks it, all files have it
                if not count:
                    raise CheckpointError(f"{self.path} ends at byte {start + done}: it was cut while being read.")
                done += count
        self._position = start + len(view)


def read_small(storage: Storage, path: str, limit: int, record: FileRecord | None = None) -> bytes:
    """All of a file; CheckpointError for one of more than `limit` bytes."""
    with BlockReader(storage, path, record) as reader:
        if reader.size > limit:
            raise CheckpointError(f"{path} has {reader.size} bytes, more than any save writes.")
        return bytes(reader.read(0, reader.size))


def _cut(buffers: Iterable[memoryview], block_bytes: int) -> Iterator[memoryview]:
    """The same bytes in pieces that cross no block's boundary; empty ones are left out."""
    position = 0
    for buffer in buffers:
        done = 0
        while done < len(buffer):
            count = min(len(buffer) - done, block_bytes - position % block_bytes)
            yield buffer[done : done + count]
            done += count
            position += count


def _crc32(pieces: Iterable[memoryview]) -> int:
    """The checksum of these bytes, one after another."""
    checksum = 0
    for piece in pieces:
        checksum = zlib.crc32(piece, checksum)
    return checksum
