"""`open_log_file`: a text file of lines that grows, on a disk or in a store that fsspec knows.

A disk gets each line when it is flushed. Most stores cannot append: there the lines are kept and the whole file is put
again at each `save`, and once a minute between saves. No line is ever half there: the rest of a line that a killed
process left is dropped on opening.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from io import FileIO
from typing import Any, Protocol

from ..trainer.rank_zero import rank_zero_warn

_UPLOAD_SECONDS = 60.0


class LogFile(Protocol):
    """What both kinds of file offer; lines are given and returned without their line feeds."""

    count: int

    def append(self, line: str) -> None:
        """Add a line; it may wait in a buffer until `flush`."""

    def flush(self) -> None:
        """Hand the lines to the system; cheap. A disk that does not take them is told of and tried again."""

    def save(self) -> None:
        """Make the lines durable: what a checkpoint relies on."""

    def lines(self) -> list[str]:
        """All lines."""

    def rewrite(self, lines: list[str]) -> None:
        """Replace all lines at once."""

    def close(self) -> None:
        """Save, and let go of the file; the object is used no more."""


def is_url(path: str) -> bool:
    """True where fsspec is needed."""
    return "://" in path


def join(root: str, *parts: str) -> str:
    """`root` and `parts` as one path; URLs take slashes on every system."""
    return "/".join([root.rstrip("/"), *parts]) if is_url(root) else os.path.join(root, *parts)


def open_log_file(path: str) -> LogFile:
    """The file at `path`, made with its folder if it is not there; what it has is kept."""
    return _StoreFile(path) if is_url(path) else _DiskFile(path)


def write_text(path: str, text: str) -> None:
    """Write a small file whole, so that a reader sees the old text or the new one."""
    if is_url(path):
        file_system, place = _file_system(path)
        try:
            file_system.pipe_file(place, text.encode())
        except FileNotFoundError:  # a store that has folders
            file_system.makedirs(place.rpartition("/")[0], exist_ok=True)
            file_system.pipe_file(place, text.encode())
        return
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.tmp-{os.getpid()}"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)


def read_text(path: str) -> str | None:
    """The text of a small file; None where there is none."""
    try:
        if is_url(path):
            file_system, place = _file_system(path)
            text: str = file_system.cat_file(place).decode()
            return text
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return None


def _file_system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    file_system, place = url_to_fs(url)
    return file_system, str(place)


class _DiskFile:
    def __init__(self, path: str) -> None:
        self._path = path
        self._waiting = bytearray()  # lines that the system has not taken
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        self._drop_half_a_line()
        self._file = self._open()
        self.count = len(self.lines())

    def append(self, line: str) -> None:
        self._waiting += f"{line}\n".encode()
        self.count += 1

    def flush(self) -> None:
        with self._tolerant():
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]

    def save(self) -> None:
        self.flush()
        with self._tolerant():
            os.fsync(self._file.fileno())

    def lines(self) -> list[str]:
        with open(self._path, "rb") as file:
            return (file.read() + self._waiting).decode().split("\n")[:-1]

    def rewrite(self, lines: list[str]) -> None:
        self._file.close()
        temporary = f"{self._path}.tmp-{os.getpid()}"
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(line + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path)
        self._waiting.clear()
        self.count = len(lines)
        self._file = self._open()

    def close(self) -> None:
        if not self._file.closed:
            self.save()
            self._file.close()

    def _open(self) -> FileIO:
        return open(self._path, "ab", buffering=0)

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        """A disk that takes no more must not end training: what is logged waits for the next try."""
        try:
            yield
        except OSError as error:
            rank_zero_warn(f"{self._path} cannot be written: {error.strerror}. Its last lines wait in memory.")

    def _drop_half_a_line(self) -> None:
        if not os.path.exists(self._path):
            return
        with open(self._path, "rb+") as file:
            text = file.read()
            if not text.endswith(b"\n"):
                file.truncate(text.rfind(b"\n") + 1)


class _StoreFile:
    def __init__(self, url: str) -> None:
        self._url = url
        self._lines = (read_text(url) or "").splitlines()
        self._saved_count, self._saved_at = len(self._lines), time.monotonic()
        self.count = len(self._lines)

    def append(self, line: str) -> None:
        self._lines.append(line)
        self.count += 1

    def flush(self) -> None:
        if time.monotonic() - self._saved_at > _UPLOAD_SECONDS:
            self.save()

    def save(self) -> None:
        if self._saved_count != self.count:
            self._put()

    def lines(self) -> list[str]:
        return list(self._lines)

    def rewrite(self, lines: list[str]) -> None:
        self._lines = list(lines)
        self.count = len(lines)
        self._put()

    def close(self) -> None:
        self.save()

    def _put(self) -> None:
        write_text(self._url, "".join(line + "\n" for line in self._lines))
        self._saved_count, self._saved_at = self.count, time.monotonic()
