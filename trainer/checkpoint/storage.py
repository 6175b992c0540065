"""Disks and object stores behind one small set of operations on paths and URLs.

`storage_of(path)` gives the storage of a path: `Disk` for plain paths, `ObjectStore` (fsspec) for URLs such as
`s3://bucket/runs`. Both write new files, list folders and replace small files atomically. They differ in one thing
that `save.py` must know: a disk renames a finished folder into its place, an object store has only single atomic
PUTs.

Every change passes through `changing`, once for each file, each piece of a file, each sync and each rename.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any, Protocol

from ...errors import CheckpointError, CheckpointNotFoundError

_SYNC_EVERY_BYTES = 64 * 2**20


def changing(kind: str, path: str) -> None:
    """Called before every change to a storage, with what it is ("write", "sync" ...); tests fail or kill here."""


class Storage(Protocol):
    """What checkpoints need of a place for files; paths are absolute or URLs, names are single parts of them."""

    def join(self, folder: str, *names: str) -> str:
        """The path of a name in `folder`; with more names, of the last in the folder of the one before."""

    def split(self, path: str) -> tuple[str, str]:
        """The folder of `path` and its name there."""

    def exists(self, path: str) -> bool:
        """Whether anything has this path."""

    def is_file(self, path: str) -> bool:
        """Whether `path` is a file, seen through links."""

    def list(self, folder: str) -> dict[str, int | None]:
        """The names in `folder` with their sizes in bytes; None for folders and whatever is no plain file.

        Raises FileNotFoundError if there is no such folder.
        """

    def open(self, path: str) -> IO[bytes]:
        """Open a file for reading with seek and readinto."""

    def make_folder(self, path: str) -> None:
        """Make a folder and those above it; one that exists is no error."""

    def create(self, path: str, data: bytes) -> None:
        """Write a small new file; FileExistsError if there is one, where the storage can tell."""

    def write(self, path: str, pieces: Iterable[memoryview]) -> None:
        """Write a new file; on return it is durable."""

    def replace(self, path: str, data: bytes, temporary: str) -> None:
        """Write a small file whole or not at all, over the one that is there."""

    def remove(self, path: str) -> None:
        """Remove one file, or one empty folder."""

    def sync(self, folder: str) -> None:
        """Make the names in `folder` durable."""


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """An error of the storage as a CheckpointError that names the path and the cause."""
    try:
        yield
    except FileNotFoundError as error:  # stores say no more than the path again
        raise CheckpointNotFoundError(f"{path} does not exist.") from error
    except OSError as error:
        cause = error.strerror or str(error) or type(error).__name__
        raise CheckpointError(f"{path} cannot be read: {cause}.") from error


@contextlib.contextmanager
def writing(path: str, what: str = "saved") -> Iterator[None]:
    """An error of the storage as a CheckpointError that names the path, the cause and the file."""
    try:
        yield
    except OSError as error:
        cause = error.strerror or str(error) or type(error).__name__
        raise CheckpointError(
            f"{path} could not be {what}: {cause} ({error.filename or path}). Older checkpoints are untouched."
        ) from error


def storage_of(path: str | os.PathLike[str]) -> tuple[Storage, str]:
    """The storage of `path`, and the path in the form that its operations take."""
    text = os.fspath(path)
    scheme, separator, rest = text.partition("://")
    if scheme in ("file", "local") and separator:
        text, separator = rest, ""
    if not separator:
        return Disk(), os.path.abspath(text)
    return ObjectStore(text), text.rstrip("/")


class Disk(Storage):
    """Local and mounted file systems."""

    def join(self, folder: str, *names: str) -> str:
        return os.path.join(folder, *names)

    def split(self, path: str) -> tuple[str, str]:
        return os.path.split(path)

    def exists(self, path: str) -> bool:
        """A dangling link exists too."""
        return os.path.lexists(path)

    def is_file(self, path: str) -> bool:
        return os.path.isfile(path)

    def list(self, folder: str) -> dict[str, int | None]:
        """Links count as no plain files, since they may lead out of the folder."""
        found: dict[str, int | None] = {}
        with os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # another process removed or renamed it meanwhile
                    status = entry.stat(follow_symlinks=False)
                    found[entry.name] = status.st_size if stat.S_ISREG(status.st_mode) else None
        return found

    def open(self, path: str) -> IO[bytes]:
        return open(path, "rb", buffering=0)

    def make_folder(self, path: str) -> None:
        """The names of new folders are durable."""
        if os.path.isdir(path):
            return
        parent = os.path.dirname(path)
        self.make_folder(parent)
        changing("make", path)
        os.makedirs(path, exist_ok=True)  # another process may make it at this moment
        self.sync(parent)

    def make_new_folder(self, path: str) -> None:
        """A folder that nobody had before; FileExistsError otherwise."""
        changing("make", path)
        os.mkdir(path)

    def create(self, path: str, data: bytes) -> None:
        self.write(path, [memoryview(data)])

    def write(self, path: str, pieces: Iterable[memoryview]) -> None:
        """The disk starts to write while later pieces are still being made."""
        changing("create", path)
        with open(path, "xb") as file, _early_sync(file.fileno()) as written:
            for piece in pieces:
                changing("write", path)
                file.write(piece)
                written(len(piece))
            file.flush()
            changing("sync", path)
            os.fsync(file.fileno())

    def replace(self, path: str, data: bytes, temporary: str) -> None:
        try:
            self.write(temporary, [memoryview(data)])
            changing("rename", path)
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        self.sync(os.path.dirname(path))

    def rename(self, old: str, new: str) -> None:
        """Rename a folder; OSError if `new` is a file or a folder that is not empty."""
        changing("rename", new)
        os.rename(old, new)

    def remove(self, path: str) -> None:
        changing("remove", path)
        if os.path.isdir(path) and not os.path.islink(path):
            os.rmdir(path)
        else:
            os.unlink(path)

    def sync(self, folder: str) -> None:
        changing("sync", folder)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _library_errors() -> Iterator[None]:
    """What fsspec's libraries raise, when they have tried often enough, as the OSError that callers tell of."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error


class _ObjectFile(io.RawIOBase):
    """An open object."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._file.tell())

    @_library_errors()
    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    @_library_errors()
    def readinto(self, buffer: Any) -> int:
        return int(self._file.readinto(buffer))


class ObjectStore(Storage):
    """Whatever fsspec reaches by a URL; folders are only prefixes of names there, and cannot be renamed."""

    def __init__(self, url: str) -> None:
        import fsspec

        try:
            self._fs: Any = fsspec.core.url_to_fs(url)[0]
        except (ValueError, ImportError) as error:  # an unknown scheme; a package that is not installed
            raise CheckpointError(f"{url} cannot be reached: {error}.") from error

    def join(self, folder: str, *names: str) -> str:
        return "/".join((folder, *names))

    def split(self, path: str) -> tuple[str, str]:
        folder, _, name = path.rpartition("/")
        return folder, name

    @_library_errors()
    def exists(self, path: str) -> bool:
        self._fs.invalidate_cache()  # stores keep listings that other processes have made stale
        return bool(self._fs.exists(path))

    @_library_errors()
    def is_file(self, path: str) -> bool:
        self._fs.invalidate_cache()
        return bool(self._fs.isfile(path))

    @_library_errors()
    def list(self, folder: str) -> dict[str, int | None]:
        self._fs.invalidate_cache()
        place = self._fs._strip_protocol(folder).rstrip("/")
        found = {entry["name"].rstrip("/"): entry for entry in self._fs.ls(folder, detail=True)}
        return {
            name.rpartition("/")[2]: int(entry["size"]) if entry["type"] == "file" else None
            for name, entry in found.items()
            if name != place  # some tools leave an empty object in the place of a folder
        }

    @_library_errors()
    def open(self, path: str) -> IO[bytes]:
        """Reads are large and in order, so that nothing is read ahead."""
        return _ObjectFile(self._fs.open(path, "rb", cache_type="none"))  # type: ignore[return-value]

    def make_folder(self, path: str) -> None:
        """Nothing to do."""

    @_library_errors()
    def create(self, path: str, data: bytes) -> None:
        """One PUT. One that is repeated because its answer was lost finds itself: the file is there."""
        changing("put", path)
        try:
            self._fs.pipe_file(path, data, mode="create")
        except OSError as error:  # stores tell a taken name in different ways
            if self.exists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from error
            raise

    @_library_errors()
    def write(self, path: str, pieces: Iterable[memoryview]) -> None:
        """A file cut off by an error may stay; nothing names it."""
        changing("create", path)
        with self._fs.open(path, "wb") as file:
            for piece in pieces:
                changing("write", path)
                file.write(piece)

    @_library_errors()
    def replace(self, path: str, data: bytes, temporary: str) -> None:
        """One PUT."""
        changing("put", path)
        self._fs.pipe_file(path, data)

    @_library_errors()
    def remove(self, path: str) -> None:
        """A folder ends with its last file."""
        changing("remove", path)
        if self._fs.isfile(path):
            self._fs.rm_file(path)

    def sync(self, folder: str) -> None:
        """A PUT that returned is durable."""


def remove_folder(storage: Storage, folder: str, first: str = "") -> None:
    """Remove a folder of files, the file named `first` before all others; one that holds folders stays: OSError."""
    names = storage.list(folder)
    for name in sorted(names, key=lambda name: name != first):
        if names[name] is not None:
            storage.remove(storage.join(folder, name))
    storage.remove(folder)


@contextlib.contextmanager
def _early_sync(descriptor: int) -> Iterator[Any]:
    """Has the disk write what is there every so many bytes; else all of it would wait for the last fsync."""
    sync = getattr(os, "fdatasync", os.fsync)
    pending: Future[None] | None = None
    unsynced = 0

    def written(count: int) -> None:
        nonlocal pending, unsynced
        unsynced += count
        if unsynced >= _SYNC_EVERY_BYTES and (pending is None or pending.done()):
            if pending is not None:
                pending.result()  # an error of the disk must not be lost: the last fsync may not repeat it
            pending, unsynced = pool.submit(sync, descriptor), 0

    with ThreadPoolExecutor(1, "checkpoint-sync") as pool:  # its thread starts with the first large file only
        yield written
        if pending is not None:
            pending.result()
