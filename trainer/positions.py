"""Where a stream of batches stands, saved and found again where the loader or its data set can tell.

A loader with `state_dict` and `load_state_dict` can (torchdata's StatefulDataLoader, or a user's own), and so can a
data set with them that is read in this process. Surprising: batches may be read before those ahead of them are
trained, so the state is noted after each window, and what is saved is the state after the last window trained.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from .loaders import has_state

_KEPT = 3


class Position:
    """The place in one rank's stream, counted in windows of the epoch that are read."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._holder = _holder(loader)
        self._workers = getattr(loader, "num_workers", 0)
        self._ahead = False
        self._epoch, self._windows = -1, 0
        self._ended = False
        self._batches: Any = None
        self._kept: Mapping[str, Any] | None = None
        self._noted: dict[int, Mapping[str, Any]] = {}

    def begin(self, epoch: int, ahead: bool) -> None:
        """An epoch begins. `ahead`: windows are read before the ones before them are trained."""
        self._epoch, self._windows, self._ended, self._ahead = epoch, 0, False, ahead
        self._batches, self._kept, self._noted = None, None, {}

    def keep(self, place: Mapping[str, Any] | None = None) -> None:
        """The loader is not asked until the next epoch begins: `place`, or where it is now, is what it would answer.

        torchdata's loader would start its workers to answer when nobody iterates it.
        """
        if place is None and self._batches is None:
            return  # nothing was read since
        if place is None and self._holder is not None and not self._ahead:
            place = self._now()
        self._batches, self._kept = None, place

    def to_the_end(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches of the epoch; afterwards it is known that this rank has read all of them."""
        self._batches = batches
        yield from batches
        self._ended = True

    def note(self, windows: int) -> None:
        """So many windows of the epoch were read."""
        self._windows = windows
        if self._ahead and self._holder is not None and self._batches is not None:
            self._noted[windows] = copy.deepcopy(self._now())
            self._noted.pop(windows - _KEPT, None)

    def after(self, epoch: int, windows: int) -> Mapping[str, Any] | None:
        """The place after so many windows of `epoch` were trained; None where only reading again can find it."""
        if (epoch, windows) == (self._epoch + 1, 0):  # between two epochs
            epoch, windows = self._epoch, self._windows
        if epoch != self._epoch:
            return None
        if self._ahead:
            return self._noted.get(windows)
        if windows != self._windows:
            return None
        return self._kept if self._holder is None or self._batches is None else self._now()

    def can_find(self, place: Mapping[str, Any] | None) -> bool:
        """Whether `find` can use a place that `after` gave."""
        return self._holder is not None and place is not None and place["workers"] == self._workers

    def find(self, place: Mapping[str, Any]) -> None:
        """The next iteration goes on from there."""
        self._holder.load_state_dict(place["state"])

    def _now(self) -> Mapping[str, Any]:
        ended = self._ended or (self._holder is not self._loader and _has_read_all(self._batches))
        return {"state": self._holder.state_dict(), "ended": ended, "workers": self._workers}


def _holder(loader: Any) -> Any:
    """What knows the place; None where nothing does."""
    if has_state(loader):
        return loader
    dataset = getattr(loader, "dataset", None)
    in_this_process = isinstance(loader, DataLoader) and loader.num_workers == 0
    return dataset if in_this_process and isinstance(dataset, IterableDataset) and has_state(dataset) else None


def _has_read_all(batches: Any) -> bool:
    """Whether torch's iterator met the end of its data set in filling the last batch, which the data set knows."""
    return bool(getattr(getattr(batches, "_dataset_fetcher", None), "ended", False))
