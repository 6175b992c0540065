"""`CuttingProxy`: a TCP proxy on loopback that cuts connections in the middle, as broken networks do.

with CuttingProxy(port) as proxy:            # clients connect to proxy.url instead
    proxy.cut("up", after=3000, times=2)     # after so many more bytes to the server, and again after as many
    ...
    assert proxy.stop() == 2                 # how often it was
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from types import TracebackType
from typing import Literal

Direction = Literal["up", "down"]


class CuttingProxy:
    """Forwards connections to `port` on loopback, but for those that it is told to cut."""

    def __init__(self, port: int) -> None:
        self._upstream = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        self.stop()

    def cut(self, direction: Direction, after: int, times: int) -> None:
        """From now on cut the connection after each `after` bytes in `direction`, so many times."""
        with self._lock:
            self._direction, self._every, self._left, self._times, self._done = direction, after, after, times, 0

    def stop(self) -> int:
        """Cut no more; how often it was since `cut`."""
        with self._lock:
            done = getattr(self, "_done", 0)
            self._direction, self._every, self._left, self._times, self._done = "", 0, 0, 0, 0
        return done

    def __enter__(self) -> CuttingProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._upstream)
                for direction, source, target in (("up", client, server), ("down", server, client)):
                    threading.Thread(target=self._pump, args=(direction, source, target), daemon=True).start()

    def _pump(self, direction: str, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1024):
                if self._is_cut(direction, len(data)):
                    for end in (source, target):
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
                    break
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _is_cut(self, direction: str, count: int) -> bool:
        with self._lock:
            if direction != self._direction or self._done == self._times:
                return False
            self._left -= count
            if self._left > 0:
                return False
            self._left, self._done = self._every, self._done + 1
            return True
