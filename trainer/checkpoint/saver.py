"""`Saver`: one save in flight, written by a thread of rank 0 while all ranks train on.

Read `start` (the host copy, and the thread that writes it), `settle` (all ranks learn what became of it) and
`finish_alone` (what an exception leaves to do). Whatever must wait until a checkpoint is durable, such as removing an
older one, is its `then`: the same thread does it right after the commit. An error of the thread reaches all ranks at
the next boundary, the next save or the end of `fit`, whichever comes first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import CheckpointError
from ..rank_zero import rank_zero_warn
from .save import Prepared, write
from .sharded import write_sharded
from .snapshot import Snapshot

if TYPE_CHECKING:
    from ...strategies.base import Strategy

_WORTH_RESERVING = 64 * 2**20


@dataclass(frozen=True)
class Outcome:
    """What became of a save: the path that it was to have, the one that it got, and why it has none."""

    wanted: str
    path: str
    error: CheckpointError | None = None


@dataclass(frozen=True)
class FollowUp:
    """What a save's owner does about it.

    `then` runs on rank 0 with the checkpoint's path once it is durable, in the writing thread. `settled` runs on every
    rank with the outcome, in the main thread. `tolerates`: a failure is a warning, and training goes on.
    """

    then: Callable[[str], None] = lambda path: None
    settled: Callable[[Outcome], None] = lambda outcome: None
    tolerates: bool = False


class Saver:
    """The saves of one trainer; `start`, `settle` are called by all ranks together."""

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self._snapshot: Snapshot | None = None
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None
        self._pending: tuple[str, FollowUp] | None = None

    @property
    def failed(self) -> bool:
        """On rank 0: the save in flight has failed, and training must not go on as if it had not."""
        return self._outcome is not None and self._outcome.error is not None and not self._tolerates()

    def reserve(self, sizes: Sequence[tuple[int, bool]]) -> None:
        """Take the memory of the first copy in the background, for tensors of so many bytes, pinned or not."""
        if self._snapshot is None and sum(size for size, _ in sizes) >= _WORTH_RESERVING:
            self._snapshot = Snapshot()
            self._thread = threading.Thread(target=self._snapshot.reserve, args=(sizes,), name="checkpoint-memory")
            self._thread.start()

    def start(self, path: str, prepared: Prepared | None, follow_up: FollowUp, wait: bool) -> None:
        """Begin to write `prepared` (of rank 0; None elsewhere); with `wait`, copy nothing and write it at once."""
        assert self._pending is None, "settle() comes first"
        self._pending = path, follow_up
        if prepared is None:
            return
        if wait:
            self._write(path, prepared, follow_up, None)
            return
        self._join()  # memory may still be reserved
        if self._snapshot is None:
            self._snapshot = Snapshot()
        arguments = path, self._snapshot.take(prepared), follow_up, self._snapshot
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint-writer")
        self._thread.start()

    def settle(self) -> Outcome | None:
        """Wait for the save in flight and tell all ranks of it; raises its error on every rank, unless tolerated."""
        if self._pending is None:
            return None
        self._join()
        (_, follow_up), self._pending = self._pending, None
        held, self._outcome = self._outcome, None
        outcome: Outcome = self._strategy.broadcast_object(held)
        follow_up.settled(outcome)
        if outcome.error is not None and not follow_up.tolerates:
            raise outcome.error
        return outcome

    def finish_alone(self) -> None:
        """Finish what is in flight without the other ranks, of which nobody knows where they are; warns of an error."""
        self._join()
        outcome, self._outcome = self._outcome, None
        if outcome is not None and outcome.error is not None and not self._tolerates():
            rank_zero_warn(str(outcome.error))
        self._pending = None

    def close(self) -> None:
        """Give the memory back."""
        self._snapshot = None

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _tolerates(self) -> bool:
        return self._pending is not None and self._pending[1].tolerates

    def _write(self, path: str, prepared: Prepared, follow_up: FollowUp, snapshot: Snapshot | None) -> None:
        """In the thread, or in its place; whatever happens is in the outcome."""
        saved = ""
        try:
            if snapshot is not None:
                snapshot.wait()
            saved = write_sharded(path, prepared, self._strategy) if self._strategy.sharded else write(path, prepared)
            if self._strategy.is_global_zero:
                follow_up.then(saved)
            outcome = Outcome(path, saved)
        except Exception as error:  # noqa: BLE001  # any library's; settle() raises it again on every rank
            told = str(error) if isinstance(error, CheckpointError) else f"{path}: {type(error).__name__}: {error}"
            failure = CheckpointError(told if self._strategy.world_size == 1 else f"rank {self._strategy.rank}: {told}")
            failure.__cause__ = error
            outcome = Outcome(path, saved, failure)
        self._outcome = outcome
        if outcome.error is not None and follow_up.tolerates:
            rank_zero_warn(f"{outcome.error} Training goes on all the same; the next save tries again.")
