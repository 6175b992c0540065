"""Training data that has no indices: iterables of batches, of which each rank reads its own.

Read `StreamedData.windows`, then `_agreed_windows`: with several ranks the windows are agreed, so that all ranks run as
many micro-batches and end together, however much each of them has.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigurationError
from .combined import CombinedLoader
from .iterables import begin_stream, is_dealt_over_ranks, length_of_stream, sharded
from .loaders import batch_size_of, length_of, let_go, resolve_limit, set_epoch
from .plan import mix_seed
from .positions import Position
from .rank_zero import rank_zero_warn
from .rng import Place, isolated
from .windows import DataSettings, ToDevice, Window, moved, shares, weight_of

if TYPE_CHECKING:
    from torch import Tensor

    from ..strategies.base import Strategy
    from ..strategies.channel import Message
    from .data import PlannedData

_STREAM = 0x73747265616D  # "stream": the seed of what is drawn as an epoch begins


class StreamedData:
    """Any iterable of batches: each rank reads its own, and windows are weighed when they are full.

    With several ranks every window begins with one small message. It is sent one window ahead where workers fetch the
    data; without workers, fetching ahead would draw random transforms before the step that is saved. A rank that ran
    dry repeats its last batch with weight zero until all are dry; with `drop_last`, all end with the first. `deal`: the
    loader is a sequence of batches, equal on all ranks.
    """

    def __init__(self, loader: Any, strategy: Strategy, settings: DataSettings, deal: bool = False) -> None:
        self.user_loader = loader
        self.loader = sharded(loader, strategy.data_rank, strategy.data_ranks) if settings.take_over else loader
        self._leaves = leaves_of(self.loader)
        self._planned = all(isinstance(leaf, RankBatches) for leaf in self._leaves)
        self._strategy = strategy
        self._settings = settings
        self._deal = deal
        self._drop_last = strategy.data_ranks > 1 and bool(getattr(loader, "drop_last", False))
        self._workers = getattr(loader, "num_workers", 0) > 0
        self._epoch = -1
        self._position = Position(self.loader)
        self._found: Mapping[str, Any] | None = None
        self.to_device: ToDevice | None = None

    @property
    def micro_batches(self) -> int:
        """Micro-batches of this rank in a full window."""
        return self._settings.accumulate

    @property
    def batch_size(self) -> int | None:
        """Samples in a full micro-batch, where the loader says so."""
        return getattr(self.user_loader, "batch_size", None)

    @property
    def num_batches(self) -> int | float:
        """Micro-batches of this rank in an epoch, the same number on every rank; infinity where nobody can say."""
        length = self._length()
        limit: int | float = resolve_limit(
            self._settings.limit, math.inf if length is None else length, "limit_train_batches"
        )
        return limit

    def _length(self) -> int | None:
        ranks = self._strategy.data_ranks
        if self._deal:
            return math.ceil(len(self.loader) / ranks)
        if self._planned:
            return length_of(self.loader)
        if isinstance(self.loader, CombinedLoader):
            exact = all(length_of_stream(leaf) == length_of(leaf) for leaf in self._leaves)
            return length_of(self.loader) if ranks == 1 and exact else None
        if ranks == 1 or is_dealt_over_ranks(self.loader):
            return length_of_stream(self.loader, self._drop_last)
        return None

    def _own_length(self) -> int | float:
        """Batches that this rank has itself, at most the `_length` that is the same on all; infinity if not planned."""
        if not self._planned:
            return math.inf
        if isinstance(self.loader, CombinedLoader):
            return len(self.loader.map(lambda leaf: range(leaf.own)))
        return int(self.loader.own)

    # --- resuming ----------------------------------------------------------------------------------------------
    def facts(self) -> dict[str, Any]:
        """What a resumed run must keep: see `adopt`."""
        ranks = self._strategy.data_ranks
        return {"kind": "stream", "global_batch": self._settings.accumulate * ranks, "ranks": ranks}

    def adopt(self, saved: Mapping[str, Any]) -> None:
        """Keep as many batches a window as the run began with; ConfigurationError where the ranks cannot share them."""
        ranks = self._strategy.data_ranks
        if saved["kind"] != "stream" or saved["global_batch"] % ranks:
            raise ConfigurationError(
                f"The run was saved with windows of {saved['global_batch']} ({saved['kind']}), which the present "
                f"loader on {ranks} rank(s) cannot go on with. Resume with the data and the number of ranks that it "
                "was saved with."
            )
        self._settings.accumulate = saved["global_batch"] // ranks

    def position(self, epoch: int, windows: int) -> Mapping[str, Any] | None:
        """This rank's place after so many windows of `epoch` were trained, for `find`; None where nobody knows it."""
        return self._found or self._position.after(epoch, windows)  # found, and nothing was read since

    def find(self, position: Mapping[str, Any] | None) -> None:
        """The next epoch goes on from a place that `position` gave, in place of reading up to it."""
        self._found = position if self._position.can_find(position) else None

    def set_epoch(self, epoch: int) -> None:
        """Tell whatever wants to know it which epoch begins."""
        if epoch != self._epoch:
            for leaf in self._leaves:
                set_epoch(leaf, epoch)
        self._epoch = epoch

    def close(self) -> None:
        """Let go of the iterators that are ours, with their workers."""
        self._position.keep()
        for leaf, given in zip(self._leaves, leaves_of(self.user_loader), strict=True):
            if isinstance(leaf, RankBatches):
                leaf.planned.close()
            elif leaf is not given:
                let_go(leaf)

    # --- reading -----------------------------------------------------------------------------------------------
    def windows(self, epoch: int, first_batch: int = 0) -> Iterator[Window]:
        """The windows of `epoch` from micro-batch `first_batch` on, which must begin a window."""
        settings, alone = self._settings, self._strategy.data_ranks == 1
        one_a_window = alone and settings.accumulate == 1 and settings.loss_weight is None
        done = -(-first_batch // settings.accumulate)
        self._position.begin(epoch, ahead=self._workers and not (alone and self.to_device is None))
        self.set_epoch(epoch)
        for leaf in self._leaves:
            begin_stream(leaf, Place(settings.seed, epoch, 0))
        alike = any(is_dealt_over_ranks(leaf) for leaf in self._leaves)  # each rank reads all of it
        with isolated(mix_seed(settings.seed, _STREAM, epoch, 0 if alike else self._strategy.data_rank)):
            # What loaders draw as they begin comes from this stream: a resumed epoch begins as it did before.
            batches, last = self._begin(first_batch)
            # In mid-epoch the batch is drawn from the run's own stream, as in a run that was never interrupted.
            first = [] if first_batch else list(islice(batches, 1))
        batches = chain(first, batches)
        if one_a_window:
            return self._single_windows(batches, done)
        return self._filled_windows(batches, done) if alone else self._agreed_windows(batches, last, done)

    def _begin(self, first_batch: int) -> tuple[Iterator[Any], Any]:
        """This rank's batches from `first_batch` on, and the one before them, if it was read."""
        if self._found is not None:
            self._position.keep(self._found)  # until more is read
            if self._found["ended"] and first_batch:
                return iter(()), None  # the next epoch begins from there
        found, self._found = self._found, None
        if first_batch and first_batch >= self.num_batches and (found is None or self._workers):
            return iter(()), None  # workers begin anew
        if found is not None:
            self._position.find(found)
            if first_batch == 0 and not found["ended"]:
                iter(self.loader)  # the epoch before was cut short by a limit; the next one begins anew
        own = self._own_length()
        done = int(min(first_batch, own))  # a rank that was dry then goes on repeating its last batch
        skip = 0 if found is not None else done
        kept = int(self._strategy.data_ranks > 1)  # what a rank repeats once it is dry
        if skip and self._seek(skip - kept):
            skip = kept
        elif skip and not self._deal:
            self._tell_the_cost(skip)
        batches = iter(self.loader)
        if isinstance(self.loader, CombinedLoader):
            batches = (batch for batch, _, _ in batches)
        if self._deal:
            batches = islice(batches, self._strategy.data_rank, None, self._strategy.data_ranks)
        batches = self._position.to_the_end(batches)
        if self.num_batches != math.inf:
            left = max(0, int(min(self.num_batches, own)) - done + skip)
            sees_its_end = self.num_batches == self._length() and not self._planned
            batches = _all_of(batches, left) if sees_its_end else islice(batches, left)
        skipped = deque(islice(batches, skip), maxlen=1)
        return batches, skipped[0] if skipped else None

    def _seek(self, batches: int) -> bool:
        """Let the next iteration begin after so many batches without reading them; False where it cannot."""
        combined = self.loader if isinstance(self.loader, CombinedLoader) else None
        if not self._planned or (combined is not None and combined.limits is not None):
            return False
        mode = combined.mode if combined is not None else None
        for leaf in self._leaves:
            if mode == "max_size_cycle":
                own = max(1, leaf.own)
                leaf.seek(batches % own, batches // own)
            else:
                leaf.seek(batches)
            if mode == "sequential":
                batches = max(0, batches - leaf.own)
        return True

    def _tell_the_cost(self, batches: int) -> None:
        rank_zero_warn(
            f"Resuming reads {batches} batches on every rank once more and throws them away, for the place in the "
            f"training data ({type(self.user_loader).__name__}) was not saved, or for other ranks or workers. It can "
            "be where loader or data set have state_dict and load_state_dict: use torchdata's StatefulDataLoader."
        )

    def _single_windows(self, batches: Iterator[Any], done: int) -> Iterator[Window]:
        """One process, one batch a window: batches may be on their way to the device while others are trained."""
        sizes: deque[int | None] = deque()

        def noted() -> Iterator[Any]:
            number = done
            for number, batch in enumerate(batches, done + 1):
                self._position.note(number)
                sizes.append(batch_size_of(batch))
                yield batch
            self._position.note(number)  # now at its end

        for batch in noted() if self.to_device is None else self.to_device(noted()):
            yield Window(iter((batch,)), (1.0,), (None,), sizes.popleft() or 1)

    def _filled_windows(self, batches: Iterator[Any], done: int) -> Iterator[Window]:
        while held := list(islice(batches, self._settings.accumulate)):
            done += 1
            self._position.note(done)
            weights, sizes = _weighed(held, self._settings)
            _refuse_unsized([0] if any(map(math.isnan, weights)) else [], held)
            yield Window(moved(held, self.to_device), shares(weights, self._strategy), weights, int(sum(sizes)))
        self._position.note(done)

    def _agreed_windows(self, batches: Iterator[Any], last: Any, done: int) -> Iterator[Window]:
        """`last` is the batch that this rank repeats once it is dry."""
        strategy, settings = self._strategy, self._settings
        places, read, first = settings.accumulate, done, done == 0
        copies = strategy.world_size // strategy.data_ranks  # ranks that share their data say the same

        def fill() -> tuple[list[Any], list[float], Message]:
            nonlocal read
            held = list(islice(batches, places))
            read += 1
            self._position.note(read)
            weights, sizes = _weighed(held, settings)
            padding = [0.0] * (places - len(held))
            facts = [float(len(held)), float(bool(held) or last is not None), *weights, *padding, *sizes, *padding]
            return held, weights, strategy.channel("data").gather(torch.tensor(facts, dtype=torch.float64))

        coming = fill()
        while True:
            held, weights, message = coming
            rows = message.wait()
            counts, weights_there, sizes_there = rows[:, 0], rows[:, 2 : 2 + places], rows[:, 2 + places :]
            count = int((counts.min() if self._drop_last else counts.max()).item())
            if count == 0:
                self._position.note(done)
                return
            if first:
                _refuse_empty(_ranks_where(counts == 0))
            _refuse_unsized(_ranks_where(weights_there.isnan().any(1)), held or [last])
            if not rows[:, 1].all():  # a rank was dry when it was saved, and has nothing to repeat
                given = strategy.all_gather_object(held[:1])
                last = next(share[0] for share in given if share) if last is None else last
            done, first, last = done + 1, False, held[-1] if held else last
            if self._workers:
                coming = fill()
            ghosts = max(0, count - len(held))
            weights = weights[:count] + [0.0] * ghosts
            total = float(weights_there[:, :count].sum()) / copies
            scales = [w * strategy.gradient_divisor / total if total else 0.0 for w in weights]
            samples = int(sizes_there[:, :count].sum()) // copies
            yield Window(moved(held[:count] + [last] * ghosts, self.to_device), scales, weights, samples, ghosts)
            if not self._workers:
                coming = fill()


def leaves_of(loader: Any) -> list[Any]:
    """The loaders of a collection, or the one loader."""
    return loader.flattened if isinstance(loader, CombinedLoader) else [loader]


class RankBatches:
    """The micro-batches of one rank of a map-style loader whose samples cannot be cut into windows one by one."""

    def __init__(self, data: PlannedData) -> None:
        self.planned = data
        self._epoch = 0
        self._reads = 0
        self._first = 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration reads."""
        self._epoch, self._reads = epoch, 0
        self.planned.set_epoch(epoch)

    def seek(self, batches: int, passes: int = 0) -> None:
        """The next iteration of the epoch begins after so many batches, and whole passes, without reading them."""
        self._first, self._reads = min(batches, self.planned.num_batches), passes

    def __iter__(self) -> Iterator[Any]:
        again, self._reads = self._reads, self._reads + 1
        first, self._first = self._first, 0
        for window in self.planned.windows(self._epoch + again * (1 << 32), first, alone=True):
            for left, batch in zip(range(len(window.scales), 0, -1), window.batches, strict=False):
                if left > window.ghosts:
                    yield batch

    def __len__(self) -> int:
        return self.planned.num_batches

    @property
    def own(self) -> int:
        """How many batches an iteration gives on this rank: a ghost, with which an epoch may end, is not given."""
        plan = self.planned.plan()
        return plan.num_batches - (plan.num_batches > 0 and plan.part(plan.num_batches - 1).weight == 0)


def _all_of(batches: Iterator[Any], count: int) -> Iterator[Any]:
    """`count` batches; asking for one more lets a data set see its end, where it may begin anew."""
    yield from islice(batches, count)
    with isolated():  # shorter loaders of a collection may give a batch; a run resumed here asks for none
        next(batches, None)


def _weighed(batches: Sequence[Any], settings: DataSettings) -> tuple[list[float], list[float]]:
    """The weight and the samples of each batch; NaN for a weight that cannot be found."""
    sizes = [batch_size_of(batch) for batch in batches]
    if settings.loss_weight is None:
        weights = [math.nan if size is None else float(size) for size in sizes]
    else:
        weights = [weight_of(batch, settings.loss_weight) for batch in batches]
    return weights, [float(size or 1) for size in sizes]


def _refuse_unsized(ranks: list[int], batches: Sequence[Any]) -> None:
    """Every rank raises when one cannot weigh its batches, so that none waits for it."""
    if ranks:
        raise ConfigurationError(
            f"A batch of type {type(batches[0]).__name__} has no size that could be found (on rank(s) "
            f"{', '.join(map(str, ranks))}), so micro-batches cannot be weighed. Define loss_weight(self, batch) in "
            "your module, and let it return a number, or put a tensor into the batch."
        )


def _refuse_empty(ranks: list[int]) -> None:
    if ranks:
        raise ConfigurationError(
            f"The training loader of rank(s) {', '.join(map(str, ranks))} is empty, the others' are not. Give every "
            "rank at least one batch: use fewer ranks, or more shards."
        )


def _ranks_where(chosen: Tensor) -> list[int]:
    ranks: list[int] = chosen.nonzero().flatten().tolist()
    return ranks
