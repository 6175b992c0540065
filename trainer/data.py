"""Training data: from the user's loaders to windows of micro-batches, each with its share of the window's weight.

A map-style DataLoader is taken over (`PlannedData`): its copy draws the indices of this rank from the epoch's plan,
so order, seeking and weights are known without reading anything. Any other iterable is read as it comes
(`streamed_data.py`): its windows are filled first and weighed then. `evaluation_data.py` is the other half.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, SequentialSampler

from ..errors import ConfigurationError
from .combined import CombinedLoader
from .loaders import (
    IndexBatches,
    can_be_taken_over,
    draw,
    draw_alike,
    drawn_length,
    draws_own_batches,
    holds_loaders,
    is_map_style,
    is_plain_shuffle,
    keeps_state_between_epochs,
    length_of,
    let_go,
    require_iterable,
    resolve_limit,
    seed_of,
    set_epoch,
    source_of,
    taken_over,
    why_left_alone,
)
from .plan import EpochPlan, Order, mix_seed, permutation, told_of_cut
from .rank_zero import rank_zero_warn
from .streamed_data import RankBatches, StreamedData
from .windows import DataSettings, ToDevice, Window, moved, shares, weight_of

if TYPE_CHECKING:
    from ..strategies.base import Strategy

_WORKERS_STREAM = 0x776F726B  # "work"
_READ_AT_ONCE = 2048


class PlannedData:
    """A map-style DataLoader, taken over: windows by the plan of `plan.py`."""

    def __init__(self, loader: DataLoader[Any], strategy: Strategy, settings: DataSettings, stream: int = 0) -> None:
        self.user_loader = loader
        self._strategy = strategy
        self._settings = settings
        self._seed = mix_seed(seed_of(loader, settings.seed), stream) if stream else seed_of(loader, settings.seed)
        self._indices = IndexBatches()
        self.loader = taken_over(loader, self._indices)
        self._iterates_itself = type(loader).__iter__ is not DataLoader.__iter__
        self._dealt = draws_own_batches(loader)
        self._epoch = -1
        self.next_drawn = 0  # the epoch that a sampler of the user's own draws next
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
        plan, micro_batch = self.plan(), 1 if self._dealt else self.user_loader.batch_size or 1
        return {
            "kind": "dealt" if self._dealt else "cut",
            "global_batch": plan.global_batch,
            "a_rank": self._settings.accumulate * micro_batch,
            "asked": self._settings.asked * micro_batch,
            "ranks": plan.ranks,
            "samples": length_of(self.user_loader.dataset) if self._dealt else plan.num_samples,
        }

    def adopt(self, saved: Mapping[str, Any]) -> None:
        """Keep the global batch that the run began with, on any number of ranks; ConfigurationError for another."""
        settings, facts = self._settings, self.facts()
        if facts["kind"] != saved["kind"] or facts["samples"] != saved.get("samples"):
            raise ConfigurationError(
                f"The checkpoint was saved with {saved.get('samples')} samples an epoch ({saved['kind']}), "
                f"the training loader now has {facts['samples']} ({facts['kind']}). Resume with the data that it was "
                "saved with, or start anew from its weights (load_from_checkpoint)."
            )
        wanted = saved["global_batch"]
        saved_asked = saved.get("asked", saved["a_rank"])
        asked = settings.global_batch_size or (facts["global_batch"] if facts["asked"] != saved_asked else wanted)
        if asked != wanted:
            raise ConfigurationError(
                f"The run was saved with a global batch of {wanted}, the arguments now ask for {asked}. A resumed run "
                f"keeps its global batch: use global_batch_size={wanted} with any batch_size, or the batch_size and "
                "accumulate_grad_batches that it was saved with."
            )
        if not self._dealt:
            if saved["a_rank"] != saved_asked:  # hooks had set it since
                settings.accumulate = max(1, saved["a_rank"] // (self.batch_size or 1))
            if facts["ranks"] != saved["ranks"] or self.plan().global_batch != wanted:
                settings.global_batch_size = wanted
        elif wanted % facts["ranks"]:
            raise ConfigurationError(
                f"The run was saved with windows of {wanted} batches, which {facts['ranks']} ranks cannot share. Use a "
                "number of ranks that divides it."
            )
        else:
            settings.accumulate = wanted // facts["ranks"]

    def position(self, epoch: int, windows: int) -> Mapping[str, Any] | None:
        """Nothing but the two numbers, which are saved anyway: the plan seeks."""

    def find(self, position: Mapping[str, Any] | None) -> None:
        """As `position`: nothing to do."""

    def close(self) -> None:
        """Let go of the loader's iterator, with its workers."""
        let_go(self.loader)

    def set_epoch(self, epoch: int) -> None:
        """Tell whatever wants to know it which epoch begins; a batch sampler may then have another length."""
        if epoch != self._epoch:
            set_epoch(self.user_loader, epoch)
        self._epoch = epoch

    def plan(self) -> EpochPlan:
        """This rank's plan of the epoch, with the present accumulation."""
        settings, strategy = self._settings, self._strategy
        key = (settings.accumulate, settings.global_batch_size, length_of(source_of(self.user_loader)))
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
        length = drawn_length(loader)
        if self._dealt:
            # A position is a batch: windows of so many are cut into parts of one, and weights count batches.
            return EpochPlan(length, settings.accumulate * ranks, 1, ranks, rank, limit_batches=limit)
        batch_size = loader.batch_size or 1
        global_batch = settings.global_batch_size or batch_size * settings.accumulate * ranks
        return EpochPlan(length, global_batch, batch_size, ranks, rank, loader.drop_last, limit)

    def windows(self, epoch: int, first_batch: int = 0, alone: bool = False) -> Iterator[Window]:
        """The windows of `epoch` from micro-batch `first_batch` on, which must begin a window.

        Every rank calls it for the same epochs and compares what was drawn, unless it is `alone`.
        """
        self.set_epoch(epoch % (1 << 32))
        plan = self.plan()
        if not self._dealt:
            order = self._order(plan.num_samples, epoch, alone)
            return self._windows(plan, _index_lists(plan, order, first_batch), None, epoch, first_batch)
        drawn = self._draw(epoch, plan.num_samples, alone)
        in_batches = self.user_loader.batch_sampler is not None
        sizes = [(length_of(batch) if in_batches else None) or 1 for batch in drawn]
        starts = (plan.part(i).start for i in range(first_batch, plan.num_batches))
        return self._windows(plan, ((start, drawn[start]) for start in starts), sizes, epoch, first_batch)

    def _windows(
        self, plan: EpochPlan, lists: Iterator[tuple[int, Any]], sizes: list[int] | None, epoch: int, first_batch: int
    ) -> Iterator[Window]:
        """`sizes` are the samples at each position of the plan; None: one."""
        self._indices.lists, self._indices.count = lists, plan.num_batches - first_batch
        batches = self._read(epoch, first_batch)
        first = -(-first_batch // plan.micro_batches)  # also where the last window was a short one
        alike = sizes is None and self._settings.loss_weight is None
        for number in range(first, plan.num_windows):
            if number == first or number >= plan.full_windows or not alike:
                parts, span = plan.window(number), plan.window_span(number)
                weights = [float(part.weight if sizes is None else part.weight * sizes[part.start]) for part in parts]
                samples = len(span) if sizes is None else sum(sizes[position] for position in span)
                window = self._window(batches, weights, samples)
            yield window  # full windows are alike, but for what `batches` goes on with

    def _window(self, batches: Iterator[Any], weights: list[float], samples: int) -> Window:
        weigh, ghosts = self._settings.loss_weight, weights.count(0.0)
        if weigh is None:
            scales = [w * self._strategy.gradient_divisor / samples for w in weights]
            return Window(batches, scales, weights, samples, ghosts)
        held = list(islice(batches, len(weights)))
        numbers = [weight_of(batch, weigh) if w else 0.0 for batch, w in zip(held, weights, strict=True)]
        return Window(moved(held, self.to_device), shares(numbers, self._strategy), numbers, samples, ghosts)

    def _order(self, length: int, epoch: int, alone: bool) -> Order:
        sampler = self.user_loader.sampler
        if self._settings.overfit or type(sampler) is SequentialSampler:
            return range(length)
        if is_plain_shuffle(sampler):
            return permutation(length, self._seed, epoch)
        return self._draw(epoch, length, alone)

    def _draw(self, epoch: int, length: int, alone: bool) -> list[Any]:
        source = source_of(self.user_loader)
        if not alone and keeps_state_between_epochs(source):
            for earlier in range(self.next_drawn, epoch):  # of a resumed run: no data is read
                draw(source, self._seed, earlier, drawn_length(self.user_loader))
            self.next_drawn = epoch + 1
        if alone:
            return draw(source, self._seed, epoch, length)
        return draw_alike(source, self._seed, epoch, length, self._strategy)

    def _read(self, epoch: int, first_batch: int) -> Iterator[Any]:
        self._indices.seed, self._indices.epoch = self._seed, epoch
        generator = self.loader.generator
        assert generator is not None
        generator.manual_seed(mix_seed(self._seed, _WORKERS_STREAM, epoch, first_batch))
        batches: Iterator[Any] = iter(self.loader)
        if self._iterates_itself:
            batches = self._checked(batches)
        # A weight is found from the host batch, so the batches of a window are moved when it is weighed.
        return batches if self.to_device is None or self._settings.loss_weight is not None else self.to_device(batches)

    def _checked(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches of a loader that iterates in its own way; ConfigurationError where they are not those planned."""
        self._indices.drawn = 0
        count = 0
        for count, batch in enumerate(batches, 1):
            if self._indices.drawn < count:
                break
            yield batch
        if count != self._indices.count:
            raise ConfigurationError(
                f"{type(self.loader).__name__}.__iter__ gave {count} batches where its batch_sampler drew "
                f"{self._indices.drawn} of {self._indices.count}. It must give one for each that is drawn, so that the "
                "trainer can deal them. To leave the loader alone, use Trainer(use_distributed_sampler=False)."
            )


def _index_lists(plan: EpochPlan, order: Order, first_batch: int) -> Iterator[tuple[int, list[Any]]]:
    """The first position and the indices of each micro-batch: some at a time, as one by one they would cost thrice."""
    spans = plan.spans(first_batch)
    at_once = max(1, _READ_AT_ONCE // plan.batch_size)
    while some := list(islice(spans, at_once)):
        first, last = min(start for start, _ in some), max(stop for _, stop in some)
        if last - first <= 4 * _READ_AT_ONCE:
            held = list(order[first:last])
            lists = [(start, held[start - first : stop - first]) for start, stop in some]
        else:  # most of what lies between is for other ranks
            lists = [(start, list(order[start:stop])) for start, stop in some]
        yield from lists


def training_data(loaders: Any, strategy: Strategy, settings: DataSettings) -> PlannedData | StreamedData:
    """The training data behind what a user gave: one loader, or a collection of them (see `CombinedLoader`)."""
    if holds_loaders(loaders):
        loaders = CombinedLoader(loaders, "max_size_cycle")
    if isinstance(loaders, CombinedLoader):
        return _combined_data(loaders, strategy, settings)
    require_iterable(loaders, "The training loader")
    if settings.take_over and can_be_taken_over(loaders):
        if loaders.batch_sampler is None:  # batch_size=None: the data set makes the batches
            _refuse_global_batch_size(settings, "batch_size=None")
            inner = DataSettings(settings.seed, overfit=settings.overfit)
            return StreamedData(RankBatches(PlannedData(loaders, strategy, inner)), strategy, settings)
        if draws_own_batches(loaders):
            _refuse_global_batch_size(settings, f"a batch sampler of its own ({type(loaders.batch_sampler).__name__})")
        whole = settings.global_batch_size
        if whole is not None and (told := told_of_cut(whole, loaders.batch_size or 1, strategy.data_ranks)):
            rank_zero_warn(told)
        return PlannedData(loaders, strategy, settings)
    if settings.take_over and is_map_style(loaders):
        rank_zero_warn(
            f"The training loader ({type(loaders).__name__}) is left alone, because {why_left_alone(loaders)}. So the "
            "order of samples and the global batches depend on the number of ranks, and resuming reads data again. "
            "Let the trainer deal the samples: pass shuffle=True or a sampler that draws alike on every rank."
        )
    _refuse_global_batch_size(settings, f"no indices to cut ({type(loaders).__name__})")
    deal = settings.take_over and isinstance(loaders, Sequence)
    if strategy.data_ranks > 1 and settings.take_over and not deal and not isinstance(loaders, DataLoader):
        rank_zero_warn(
            f"Every rank reads the training loader ({type(loaders).__name__}) as it comes, so it must give each rank "
            "batches of its own. Pass a DataLoader or a list of batches, and the trainer deals them."
        )
    return StreamedData(loaders, strategy, settings, deal)


def _refuse_global_batch_size(settings: DataSettings, what: str) -> None:
    if settings.global_batch_size is not None:
        raise ConfigurationError(
            f"global_batch_size needs a map-style DataLoader, whose samples can be cut into batches of "
            f"{settings.global_batch_size}; the training loader has {what}. Use accumulate_grad_batches."
        )


def _combined_data(combined: CombinedLoader, strategy: Strategy, settings: DataSettings) -> StreamedData:
    numbers = iter(range(1, 1 << 30))
    _refuse_global_batch_size(settings, "several loaders in it")

    def share(loader: Any) -> Any:
        if settings.take_over and can_be_taken_over(loader):
            inner = DataSettings(settings.seed, overfit=settings.overfit)
            return RankBatches(PlannedData(loader, strategy, inner, stream=next(numbers)))
        return loader

    return StreamedData(combined.map(share), strategy, settings)
