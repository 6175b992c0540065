"""Training data: from the user's loaders to windows of micro-batches, each with its share of the window's weight.

A map-style DataLoader is taken over (`PlannedData`): its copy draws the indices of this rank from the epoch's plan,
so order, seeking and weights are known without reading anything. Any other iterable is read as it comes
(`StreamedData`): its windows are filled first and weighed then. `evaluation_data.py` is the other half.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

from ..errors import ConfigurationError
from .combined import CombinedLoader
from .iterables import sharded
from .loaders import (
    IndexBatches,
    batch_size_of,
    can_be_taken_over,
    draw,
    draws_own_batches,
    holds_loaders,
    is_plain_shuffle,
    length_of,
    length_or_error,
    resolve_limit,
    seed_of,
    set_epoch,
    taken_over,
)
from .plan import DealtPlan, EpochPlan, Order, derive_micro_batches, mix_seed, permutation, sequential
from .rank_zero import rank_zero_info

if TYPE_CHECKING:
    from ..strategies.base import Strategy
    from ..strategies.channel import Message

_WORKERS_STREAM = 0x776F726B  # "work"

_READ_AT_ONCE = 4096

#: Host batches in, device batches out, perhaps some ahead.
ToDevice = Callable[[Iterator[Any]], Iterator[Any]]


@dataclass(slots=True)
class Window:
    """The micro-batches of one optimizer step on this rank.

    `batches` yields at least `len(scales)` batches; `scales` are the factors of their mean losses (a number, or a 0-d
    device tensor), `weights` how much each counts (None: found from the batch when asked for); `samples` are those of
    all ranks.
    """

    batches: Iterator[Any]
    scales: Sequence[float | Tensor]
    weights: Sequence[float | None]
    samples: int


@dataclass
class DataSettings:
    """What the cut of the data depends on. `accumulate` may be changed between epochs."""

    seed: int
    accumulate: int = 1
    global_batch_size: int | None = None
    limit: int | float | None = None
    loss_weight: Callable[[Any], float | Tensor] | None = None
    take_over: bool = True
    overfit: int | float = 0


class PlannedData:
    """A map-style DataLoader, taken over: windows by the plan of `plan.py`."""

    def __init__(self, loader: DataLoader[Any], strategy: Strategy, settings: DataSettings, stream: int = 0) -> None:
        self.user_loader = loader
        self._strategy = strategy
        self._settings = settings
        self._seed = mix_seed(seed_of(loader, settings.seed), stream) if stream else seed_of(loader, settings.seed)
        self._indices = IndexBatches()
        self.loader = taken_over(loader, self._indices)
        self._dealt = draws_own_batches(loader)
        self._plan_key: object = None
        self._plan: EpochPlan
        self.to_device: ToDevice | None = None

    @property
    def num_batches(self) -> int:
        """Micro-batches of this rank in an epoch."""
        return self.plan().num_batches

    @property
    def micro_batches(self) -> int:
        """Micro-batches of this rank in a full window."""
        return self.plan().micro_batches

    @property
    def batch_size(self) -> int | None:
        """Samples in a full micro-batch; None where a batch sampler decides."""
        return None if self._dealt else self.user_loader.batch_size or 1

    def facts(self) -> dict[str, Any]:
        """What a resumed run must keep: see `adopt`."""
        plan = self.plan()
        return {
            "kind": "dealt" if self._dealt else "cut",
            "global_batch": plan.global_batch,
            "a_rank": self._settings.accumulate * (1 if self._dealt else self.user_loader.batch_size or 1),
            "ranks": plan.ranks,
            "samples": plan.num_samples,
        }

    def adopt(self, saved: Mapping[str, Any]) -> None:
        """Keep the global batch that the run began with, on any number of ranks; ConfigurationError for another."""
        settings, facts = self._settings, self.facts()
        if facts["kind"] != saved["kind"] or facts["samples"] != saved.get("samples"):
            raise ConfigurationError(
                f"The checkpoint was saved with {saved.get('samples')} samples or batches an epoch ({saved['kind']}), "
                f"the training loader now has {facts['samples']} ({facts['kind']}). Resume with the data that it was "
                "saved with, or start anew from its weights (load_from_checkpoint)."
            )
        wanted = saved["global_batch"]
        asked = settings.global_batch_size or (facts["global_batch"] if facts["a_rank"] != saved["a_rank"] else wanted)
        if asked != wanted:
            raise ConfigurationError(
                f"The run was saved with a global batch of {wanted}, the arguments now ask for {asked}. A resumed run "
                f"keeps its global batch: use global_batch_size={wanted} with any batch_size, or the batch_size and "
                "accumulate_grad_batches that it was saved with."
            )
        if not self._dealt:
            settings.global_batch_size = wanted if facts["ranks"] != saved["ranks"] else settings.global_batch_size
        elif wanted % facts["ranks"]:
            raise ConfigurationError(
                f"The run was saved with windows of {wanted} batches, which {facts['ranks']} ranks cannot share. Use a "
                "number of ranks that divides it."
            )
        else:
            settings.accumulate = wanted // facts["ranks"]

    def plan(self) -> EpochPlan:
        """This rank's plan of an epoch, with the present accumulation."""
        settings, strategy = self._settings, self._strategy
        key = (settings.accumulate, settings.global_batch_size)
        if key == self._plan_key:
            return self._plan
        plan = self._make_plan(strategy.data_ranks, strategy.data_rank, None)
        limit = resolve_limit(settings.limit, plan.num_batches, "limit_train_batches")
        if limit < plan.num_batches:
            plan = self._make_plan(strategy.data_ranks, strategy.data_rank, limit)
        self._plan, self._plan_key = plan, key
        return plan

    def _make_plan(self, ranks: int, rank: int, limit: int | None) -> EpochPlan:
        settings, loader = self._settings, self.user_loader
        if self._dealt:
            length = length_or_error(self._batch_source(), "its batch sampler")
            return DealtPlan(length, settings.accumulate, ranks, rank, limit_batches=limit)
        length, batch_size = length_or_error(loader.sampler, "its sampler"), loader.batch_size or 1
        global_batch = settings.global_batch_size or batch_size * settings.accumulate * ranks
        return EpochPlan(length, global_batch, batch_size, ranks, rank, loader.drop_last, limit)

    def _batch_source(self) -> Any:
        """What draws whole batches (or, without automatic batching, single samples that are batches)."""
        return (
            self.user_loader.batch_sampler if self.user_loader.batch_sampler is not None else self.user_loader.sampler
        )

    def windows(self, epoch: int, first_batch: int = 0) -> Iterator[Window]:
        """The windows of `epoch` from micro-batch `first_batch` on, which must begin a window."""
        plan = self.plan()
        if first_batch >= plan.num_batches:  # a run resumed at an epoch's end
            return iter(())
        if self._dealt:
            return self._dealt_windows(plan, epoch, first_batch)
        return self._cut_windows(plan, epoch, first_batch)

    def _cut_windows(self, plan: EpochPlan, epoch: int, first_batch: int) -> Iterator[Window]:
        order = self._order(plan.num_samples, epoch)
        self._indices.lists = _in_chunks(order, plan.spans(first_batch))
        self._indices.count = plan.num_batches - first_batch
        batches = self._read(epoch, first_batch)
        first = plan.locate(first_batch)[0]
        for number in range(first, plan.num_windows):
            if number == first or number >= plan.full_windows:
                samples = plan.window_weight(number)
                weights = [float(part.weight) for part in plan.window(number)]
                scales = [w * self._strategy.gradient_divisor / samples for w in weights]
            yield self._window(batches, scales, weights, samples)

    def _dealt_windows(self, plan: EpochPlan, epoch: int, first_batch: int) -> Iterator[Window]:
        drawn = draw(self._batch_source(), self._seed, epoch, plan.num_samples)
        sizes = [len(batch) if isinstance(batch, (list, tuple)) else 1 for batch in drawn]
        parts = [plan.part(i) for i in range(first_batch, plan.num_batches)]
        self._indices.lists = ((part.start, drawn[part.start]) for part in parts)
        self._indices.count = len(parts)
        batches = self._read(epoch, first_batch)
        for number in range(plan.locate(first_batch)[0], plan.num_windows):
            weights = [float(sizes[part.start] * part.weight) for part in plan.window(number)]
            samples = sum(sizes[position] for position in plan.window_span(number))
            scales = [w * self._strategy.gradient_divisor / samples for w in weights]
            yield self._window(batches, scales, weights, samples)

    def _window(self, batches: Iterator[Any], scales: list[float], weights: list[float], samples: int) -> Window:
        weigh = self._settings.loss_weight
        if weigh is None:
            return Window(batches, scales, weights, samples)
        held = list(islice(batches, len(scales)))
        numbers = [float(weigh(batch)) if w else 0.0 for batch, w in zip(held, weights, strict=True)]
        return Window(_moved(held, self.to_device), shares(numbers, self._strategy), numbers, samples)

    def _order(self, length: int, epoch: int) -> Order:
        sampler = self.user_loader.sampler
        if self._settings.overfit or isinstance(sampler, SequentialSampler):
            return sequential(length)
        if is_plain_shuffle(sampler):
            return permutation(length, self._seed, epoch)
        return _DrawnOrder(draw(sampler, self._seed, epoch, length))

    def _read(self, epoch: int, first_batch: int) -> Iterator[Any]:
        self._indices.seed, self._indices.epoch = self._seed, epoch
        generator = self.loader.generator
        assert generator is not None
        generator.manual_seed(mix_seed(self._seed, _WORKERS_STREAM, epoch, first_batch))
        batches = iter(self.loader)
        # A weight is found from the host batch, so the batches of a window are moved when it is weighed.
        return batches if self.to_device is None or self._settings.loss_weight is not None else self.to_device(batches)


class StreamedData:
    """Any iterable of batches: each rank reads its own, and windows are weighed when they are full.

    With several ranks every window begins with one small message. It is sent one window ahead where workers fetch the
    data; without workers, fetching ahead would draw random transforms before the step that is saved. A rank that ran
    dry repeats its last batch with weight zero until all are dry.
    """

    def __init__(self, loader: Any, strategy: Strategy, settings: DataSettings, deal: bool = False) -> None:
        self.user_loader = loader
        self.loader = sharded(loader, strategy.data_rank, strategy.data_ranks) if settings.take_over else loader
        self._strategy = strategy
        self._settings = settings
        self._deal = deal
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
        """Micro-batches of this rank in an epoch; infinity where nobody can say."""
        ranks = 1 if self._each_rank_its_own else self._strategy.data_ranks
        length = None if ranks > 1 and not self._deal else length_of(self.loader)
        if self._deal and length is not None:
            length = math.ceil(length / ranks)
        limit: int | float = resolve_limit(
            self._settings.limit, math.inf if length is None else length, "limit_train_batches"
        )
        return limit

    def facts(self) -> dict[str, Any]:
        """What a resumed run must keep: see `adopt`."""
        ranks = self._strategy.data_ranks
        return {"kind": "stream", "global_batch": self._settings.accumulate * ranks, "ranks": ranks}

    def adopt(self, saved: Mapping[str, Any]) -> None:
        """Keep as many batches a window as the run began with; ConfigurationError where the ranks cannot share them."""
        ranks = self._strategy.data_ranks
        if saved["kind"] != "stream" or saved["global_batch"] % ranks:
            raise ConfigurationError(
                f"The run was saved with windows of {saved['global_batch']} ({saved['kind']}), which the present loader "
                f"on {ranks} rank(s) cannot go on with. Resume with the data and the number of ranks that it was saved "
                "with."
            )
        self._settings.accumulate = saved["global_batch"] // ranks

    @property
    def _each_rank_its_own(self) -> bool:
        """Whether the loader's length is that of this rank's share, and alike on all ranks."""
        loader = self.loader
        leaves = loader.flattened if isinstance(loader, CombinedLoader) else [loader]
        return all(isinstance(leaf, RankBatches) for leaf in leaves)

    def windows(self, epoch: int, first_batch: int = 0) -> Iterator[Window]:
        """The windows of `epoch`; those before `first_batch` are read and thrown away."""
        for leaf in self.loader.flattened if isinstance(self.loader, CombinedLoader) else [self.loader]:
            set_epoch(leaf, epoch)
        batches = iter(self.loader)
        if isinstance(self.loader, CombinedLoader):
            batches = (batch for batch, _, _ in batches)
        if self._deal:
            batches = islice(batches, self._strategy.data_rank, None, self._strategy.data_ranks)
        if isinstance(self._settings.limit, int) or self.num_batches != math.inf:
            batches = islice(batches, int(self.num_batches))
        for _ in islice(batches, first_batch):
            pass
        if self._strategy.data_ranks > 1:
            return self._agreed_windows(batches)
        if self._settings.accumulate == 1 and self._settings.loss_weight is None:
            moved = batches if self.to_device is None else self.to_device(batches)
            return (Window(iter((batch,)), (1.0,), (None,), batch_size_of(batch) or 1) for batch in moved)
        return self._filled_windows(batches)

    def _filled_windows(self, batches: Iterator[Any]) -> Iterator[Window]:
        while held := list(islice(batches, self._settings.accumulate)):
            weights = self._weights(held)
            samples = sum(map(_size, held))
            yield Window(_moved(held, self.to_device), shares(weights, self._strategy), weights, samples)

    def _agreed_windows(self, batches: Iterator[Any]) -> Iterator[Window]:
        strategy = self._strategy
        drop_last = bool(getattr(self.user_loader, "drop_last", False))
        ahead = getattr(self.user_loader, "num_workers", 0) > 0
        last: Any = None

        def fill() -> tuple[list[Any], list[float], Message]:
            held = list(islice(batches, self._settings.accumulate))
            weights = self._weights(held)
            facts = [float(len(held)), sum(weights), float(sum(map(_size, held)))]
            return held, weights, strategy.channel("data").gather(torch.tensor(facts, dtype=torch.float64))

        first = True
        coming = fill()
        while True:
            held, weights, message = coming
            rows = message.wait()
            count = int((rows[:, 0].min() if drop_last else rows[:, 0].max()).item())
            if count == 0:
                return
            empty = [rank for rank, row in enumerate(rows.tolist()) if row[0] == 0]
            if first and empty:
                _refuse_empty(empty)
            first = False
            last = held[-1] if held else last
            if ahead:
                coming = fill()
            missing = count - len(held)
            held, weights = held[:count] + [last] * missing, weights[:count] + [0.0] * missing
            total = float(rows[:, 1].sum())
            scales = [w * strategy.gradient_divisor / total if total else 0.0 for w in weights]
            yield Window(_moved(held, self.to_device), scales, weights, int(rows[:, 2].sum()))
            if not ahead:
                coming = fill()

    def _weights(self, batches: list[Any]) -> list[float]:
        weigh = self._settings.loss_weight or _size
        return [float(weigh(batch)) for batch in batches]


def _size(batch: Any) -> int:
    size = batch_size_of(batch)
    if size is None:
        raise ConfigurationError(
            f"A batch of type {type(batch).__name__} has no size that could be found, so micro-batches cannot be "
            "weighed. Define loss_weight(self, batch) in your module, or put a tensor into the batch."
        )
    return size


def _refuse_empty(ranks: list[int]) -> None:
    raise ConfigurationError(
        f"The training loader of rank(s) {', '.join(map(str, ranks))} is empty, the others' are not. Give every rank "
        "at least one batch: use fewer ranks, or more shards."
    )


def _moved(batches: list[Any], to_device: ToDevice | None) -> Iterator[Any]:
    return iter(batches) if to_device is None else to_device(iter(batches))


def shares(weights: Sequence[float], strategy: Strategy) -> Sequence[float | Tensor]:
    """Factors that make the window's gradient, as the strategy reduces it over the ranks, that of its weighted mean.

    weight / (sum of all ranks' weights) * the strategy's `gradient_divisor`; with several ranks one reduction on the device, and no host sync.
    """
    total = sum(weights)
    if strategy.data_ranks == 1:
        return [w / total if total else 0.0 for w in weights]
    sums = torch.full((), total, dtype=torch.float64 if strategy.device.type == "cpu" else torch.float32)
    over_ranks = strategy.all_reduce(sums.to(strategy.device, non_blocking=True))
    inverse = strategy.gradient_divisor / over_ranks.clamp(min=torch.finfo(torch.float32).tiny)
    return [inverse * w for w in weights]


class _DrawnOrder(Order):
    """An order that a user's sampler drew."""

    def __init__(self, indices: list[Any]) -> None:
        super().__init__(len(indices))
        self._indices = indices

    def _read(self, start: int, stop: int) -> list[Any]:
        return self._indices[start:stop]


def _in_chunks(order: Order, spans: Iterator[tuple[int, int]]) -> Iterator[tuple[int, list[Any]]]:
    """The first position and the indices of each span; an order is cheaper to read some thousand at a time."""
    chunk: list[Any] = []
    first = 0
    for start, stop in spans:
        if start < first or stop > first + len(chunk):
            chunk, first = order[start : max(stop, start + _READ_AT_ONCE)], start
        yield start, chunk[start - first : stop - first]


def training_data(loaders: Any, strategy: Strategy, settings: DataSettings) -> PlannedData | StreamedData:
    """The training data behind what a user gave: one loader, or a collection of them (see `CombinedLoader`)."""
    if holds_loaders(loaders):
        loaders = CombinedLoader(loaders, "max_size_cycle")
    if isinstance(loaders, CombinedLoader):
        return _combined_data(loaders, strategy, settings)
    if not hasattr(loaders, "__iter__") and not hasattr(loaders, "__getitem__"):
        raise ConfigurationError(
            f"The training loader is a {type(loaders).__name__}, which cannot be iterated. Pass a DataLoader "
            "or any iterable of batches."
        )
    if settings.take_over and can_be_taken_over(loaders) and loaders.batch_sampler is not None:
        if settings.global_batch_size is not None:
            _, warnings = derive_micro_batches(settings.global_batch_size, loaders.batch_size or 1, strategy.data_ranks)
            for warning in warnings:
                rank_zero_info(warning)
        return PlannedData(loaders, strategy, settings)
    if settings.take_over and can_be_taken_over(loaders) and settings.global_batch_size is None:
        inner = DataSettings(settings.seed, overfit=settings.overfit)  # batch_size=None: the data set makes the batches
        return StreamedData(RankBatches(PlannedData(loaders, strategy, inner)), strategy, settings)
    if settings.global_batch_size is not None:
        raise ConfigurationError(
            "global_batch_size needs a map-style DataLoader, whose samples it can cut. Use accumulate_grad_batches "
            f"with a {type(loaders).__name__}."
        )
    return StreamedData(loaders, strategy, settings, deal=isinstance(loaders, Sequence))


def _combined_data(combined: CombinedLoader, strategy: Strategy, settings: DataSettings) -> StreamedData:
    numbers = iter(range(1, 1 << 30))

    def share(loader: Any) -> Any:
        if settings.take_over and can_be_taken_over(loader):
            inner = DataSettings(settings.seed, overfit=settings.overfit)
            return RankBatches(PlannedData(loader, strategy, inner, stream=next(numbers)))
        return loader

    return StreamedData(combined.map(share), strategy, settings)


class RankBatches:
    """The micro-batches of one rank of a loader inside a collection, epoch after epoch."""

    def __init__(self, data: PlannedData) -> None:
        self._data = data
        self._epoch = 0
        self._reads = 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration reads."""
        self._epoch, self._reads = epoch, 0

    def __iter__(self) -> Iterator[Any]:
        again, self._reads = self._reads, self._reads + 1
        for window in self._data.windows(self._epoch + again * (1 << 32)):
            for weight, batch in zip(window.weights, window.batches, strict=False):
                if weight:
                    yield batch

    def __len__(self) -> int:
        return self._data.num_batches
