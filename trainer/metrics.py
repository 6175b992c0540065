"""`self.log`: values stay where they are, and are reduced over batches and ranks at a few agreed moments.

Read `Metrics.log` (what a step pays), then `boundary` (the window's step metrics set off as a point), then
`finish_epoch` (the epoch's metrics, all in one reduction). Nothing is read back from a device in a step: a point is
delivered to the loggers when it has arrived on the host, where `reduction.py` takes it. In `entries.py`: one name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError
from .entries import Entry, Label, host_number, new_entry, no_number
from .loaders import batch_size_of
from .metric_objects import compute_all, is_metric_object, load_metric_states, metric_states, path_of
from .prefetch import move
from .reduction import Capacity, HostCopy, Sum, Transfer, combine

if TYPE_CHECKING:
    from ..strategies.base import Strategy

_BAR_SECONDS = 0.5
_RESTORED = ("restored",)  # in the place of an entry's flags: those of its next call hold
_EVALUATION_ENDS = frozenset({"on_validation_epoch_end", "on_test_epoch_end"})


@dataclass(slots=True)
class _Point:
    """A point of step metrics on its way; where nothing is `due` for the loggers, for callbacks that decide now."""

    step: int
    epoch: int
    samples: int
    window: int
    transfer: Transfer
    due: bool


class Metrics:
    """All that a run logs.

    Whoever calls hooks sets `hook` to the hook under way and, for a batch, `batch` and `weight` (None: found from the
    batch when a mean first needs it). `on_log` receives each point: names → host floats, and its step. `waiting` are
    the points on their way.
    """

    def __init__(self, strategy: Strategy, on_log: Callable[[dict[str, float], int], None]) -> None:
        self.hook = ""
        self.window = 0
        self.batch: Any = None
        self.weight: float | None = None
        self.dataloader_idx: int | None = None
        self.evaluating = False
        self.muted = False
        self.module: nn.Module | None = None
        self._strategy = strategy
        self._on_log = on_log
        self._capacity = Capacity()
        self._training: dict[Any, Entry] = {}
        self._evaluation: dict[Any, Entry] = {}
        self.waiting: list[_Point] = []
        self._point_step = 0
        self._published_window = -1
        self._training_window = 0
        self._reduced: dict[str, Tensor] = {}
        self._reduced_logged: dict[str, Tensor] = {}
        self._reduced_bar: dict[str, float] = {}
        self._bar = _BarValues()

    # --- what a step pays --------------------------------------------------------------------------------------
    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: Any = "mean",
        batch_size: float | None = None,
        add_dataloader_idx: bool = True,
        rank_zero_only: bool = False,
    ) -> None:
        """Keep `value` of `name` for the hook under way; ConfigurationError for misuse."""
        if type(value) is not Tensor and hasattr(value, "full_tensor"):
            value = value.detach().full_tensor()  # of shards: a collective, so also on ranks that keep nothing
        if self.muted or (rank_zero_only and not self._strategy.is_global_zero):
            return
        entries = self._evaluation if self.evaluating else self._training
        key = (self.hook, name, self.dataloader_idx)
        flags = (prog_bar, logger, on_step, on_epoch, reduce_fx, add_dataloader_idx)
        entry = entries.get(key)
        if entry is None:
            entry = entries[key] = self._new_entry(name, value, flags)
        elif entry.flags is _RESTORED:
            entry.flags = flags
        elif entry.flags != flags:
            raise ConfigurationError(
                f"log({name!r}) is called in {self.hook} with two sets of options (prog_bar, logger, on_step, on_epoch,"
                f" reduce_fx, add_dataloader_idx): {entry.flags}, then {flags}. Use one set, or another name."
            )
        if isinstance(value, Tensor):
            value = value.detach() if value.grad_fn is not None else value.detach().clone()
            if value.ndim:
                if value.numel() != 1:
                    raise no_number(name, value)
                value = value.reshape(())
        elif entry.metric is None:
            value = host_number(name, value)
        else:
            entry.metric = value
            value = getattr(value, "_forward_cache", None)
            if not entry.on_step or value is None:
                return
        if batch_size is not None:
            weight = batch_size
        else:
            if self.weight is None:
                self.weight = 1 if self.batch is None else batch_size_of(self.batch) or 1
            weight = self.weight
        if entry.window == self.window:
            entry.values.append(value)
            entry.weights.append(weight)
        else:
            entry.window = self.window
            entry.values = [value]
            entry.weights = [weight]
        if entry.on_epoch and entry.metric is None:
            entry.add_to_epoch(value, weight)

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Inside, `log` does nothing."""
        before, self.muted = self.muted, True
        try:
            yield
        finally:
            self.muted = before

    def _new_entry(self, name: str, value: Any, flags: tuple[Any, ...]) -> Entry:
        entry = new_entry(self.hook, name, value, flags, self.dataloader_idx)
        for hook, other, index in self._evaluation:
            if not entry.suffix and (hook, other) == (self.hook, name) and index != self.dataloader_idx:
                raise ConfigurationError(
                    f"log({name!r}, add_dataloader_idx=False) is called for loaders {index} and {self.dataloader_idx}, "
                    "so one value would hide the other. Leave add_dataloader_idx out, or use two names."
                )
        return entry

    # --- points of step metrics --------------------------------------------------------------------------------
    def boundary(self, step: int, epoch: int, samples: int, due: bool = True) -> None:
        """Set off the step metrics of the window that update `step` ended; every rank calls it at the same step.

        Without `due` they are reduced for whoever decides on them now, and the loggers hear nothing of it.
        """
        if step == self._point_step:
            return
        self.deliver(wait=True)
        window = self._training_window if self.evaluating else self.window
        if due:
            self._point_step = step
        sums: dict[str, Sum] = {}
        for entry in self._training.values():
            if entry.on_step and entry.window == window:
                sums[entry.step_name] = entry.step_sum()
        self.waiting.append(_Point(step, epoch, samples, window, Transfer(sums, self._strategy, self._capacity), due))
        self.deliver()

    def deliver(self, wait: bool = False) -> None:
        """Hand on the points that have arrived; `wait` for all of them (every rank then waits at the same place)."""
        while self.waiting and (wait or self.waiting[0].transfer.arrived()):
            point = self.waiting.pop(0)
            reduced = point.transfer.finish()
            self._published_window = point.window
            for_loggers = self._publish(reduced, point.transfer.labels)
            if point.due:
                self._tell(for_loggers, point.step, point.epoch, point.samples)

    # --- the end of an epoch -----------------------------------------------------------------------------------
    def finish_epoch(self, step: int, epoch: int, samples: int, keep: bool = False) -> dict[str, int | None]:
        """Reduce and publish what an epoch of training or an evaluation logged. Collective.

        Returns its epoch's names for the loggers → the loader in which each was logged. With `keep` the epoch is not
        over: what it logged goes on counting.
        """
        self.deliver(wait=True)
        step_is_new = self.evaluating or self._point_step != step
        sums: dict[str, Sum] = {}
        objects: dict[str, Any] = {}
        entries = self._evaluation if self.evaluating else self._training
        for entry in entries.values():
            if entry.on_epoch and entry.metric is not None:
                objects[entry.epoch_name] = entry.metric
                label = entry.label(True, path_of(entry.metric, self.module))
                sums[entry.epoch_name] = Sum("sum", 1, 1, label)  # on how many ranks it was logged
            elif entry.on_epoch and (entry.total is not None or entry.window >= 0):
                sums[entry.epoch_name] = entry.epoch_sum()
            if entry.on_step and step_is_new and entry.values and (self.evaluating or entry.window == self.window):
                sums[entry.step_name] = entry.step_sum()
        transfer = Transfer(sums, self._strategy, self._capacity)
        reduced, labels = transfer.finish(), transfer.labels
        self._complete(objects, reduced, labels)
        reduced |= self._computed(objects, keep)
        if not self.evaluating:
            self._point_step, self._published_window = step, self.window
        self._tell(self._publish(reduced, labels), step, epoch, samples)
        if self.evaluating:
            entries.clear()
        elif not keep:
            for entry in entries.values():
                entry.start_anew()
        return {name: label.dataloader_idx for name, label in labels.items() if label.of_epoch and label.logger}

    def _complete(self, objects: dict[str, Any], ranks: Mapping[str, float], labels: Mapping[str, Label]) -> None:
        """Find the metric objects that only other ranks logged, as where this one had no batch."""
        for name, label in labels.items():
            if label.metric == "" and ranks[name] < self._strategy.world_size:
                raise ConfigurationError(
                    f"log({name!r}) got a metric object on {ranks[name]:.0f} of {self._strategy.world_size} ranks, and "
                    "the others cannot find it. Make it an attribute of the module (self.metric = ...)."
                )
            if label.metric and name not in objects:
                assert self.module is not None
                objects[name] = self.module.get_submodule(label.metric)

    def _computed(self, objects: Mapping[str, Any], keep: bool) -> dict[str, float]:
        """The values of metric objects over all ranks; without `keep` they are reset."""
        computed = compute_all({name: objects[name] for name in sorted(objects)}, self._strategy)
        values = {name: host_number(name, value) for name, value in computed.items()}
        if not keep:  # after all were computed: those of a collection share their states
            for metric in objects.values():
                metric.reset()
        return values

    def _publish(self, reduced: Mapping[str, float], labels: Mapping[str, Label]) -> dict[str, float]:
        """Put reduced numbers where they are read; those for the loggers."""
        for_loggers = {}
        for name in sorted(reduced, key=lambda name: labels[name].of_epoch):  # the bare name is the epoch's in the end
            number, label = reduced[name], labels[name]
            tensor = torch.tensor(number, dtype=torch.float32)
            self._reduced[name] = self._reduced[label.bare_name] = tensor
            if label.logger:
                for_loggers[name] = number
                self._reduced_logged[name] = tensor
            if label.prog_bar:
                self._reduced_bar[name] = number
        return for_loggers

    def _tell(self, for_loggers: Mapping[str, float], step: int, epoch: int, samples: int) -> None:
        if for_loggers:
            self._on_log({**for_loggers, "epoch": epoch, "samples": samples}, step)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Inside, what is logged is an evaluation's; afterwards training's window is as it was."""
        window, batch, weight = self.window, self.batch, self.weight
        self._training_window, self.evaluating = window, True
        try:
            yield
        finally:
            self.evaluating, self.dataloader_idx = False, None
            self.window, self.batch, self.weight = window, batch, weight

    # --- in checkpoints ----------------------------------------------------------------------------------------
    def state_dict(self, module: nn.Module) -> dict[str, Any]:
        """What this rank has logged in the epoch under way, and what was reduced so far. Host reads: not for a step."""
        self.deliver(wait=True)
        paths = {id(metric): path for path, metric in module.named_modules() if is_metric_object(metric)}
        entries = []
        window = self._training_window if self.evaluating else self.window
        for (hook, name, index), entry in self._training.items():
            fresh = entry.window == window
            entries.append(
                {
                    "key": (hook, name, index),
                    "suffix": entry.suffix,
                    "op": entry.op,
                    "shown": (entry.on_step, entry.on_epoch, entry.prog_bar, entry.logger),
                    "metric": paths.get(id(entry.metric)),
                    "values": [float(value) for value in entry.values] if fresh else [],
                    "weights": list(entry.weights) if fresh else [],
                    "total": entry.total,
                    "weight": entry.weight,
                }
            )
        return {
            "entries": entries,
            "metric_objects": metric_states(module),
            "reduced": {name: value.item() for name, value in self._reduced.items()},
            "logged": list(self._reduced_logged),
            "bar": dict(self._reduced_bar),
            "point_step": self._point_step,
            "published": self._published_window >= window,
        }

    def load_state_dict(self, state: Mapping[str, Any], module: nn.Module) -> None:
        """Go on from what `state_dict` gave."""
        for held in state["entries"]:
            hook, name, index = held["key"]
            on_step, on_epoch, prog_bar, logger = held["shown"]
            entry = Entry(name, held["suffix"], index, _RESTORED, held["op"], on_step, on_epoch, prog_bar, logger)
            entry.metric = None if held["metric"] is None else module.get_submodule(held["metric"])
            entry.values, entry.weights = list(held["values"]), list(held["weights"])
            entry.window = self.window if entry.values else -1
            entry.total, entry.weight = move(held["total"], self._strategy.device), held["weight"]
            self._training[(hook, name, index)] = entry
        load_metric_states(module, state["metric_objects"])
        self._reduced.update((name, torch.tensor(number)) for name, number in state["reduced"].items())
        self._reduced_logged.update((name, self._reduced[name]) for name in state["logged"])
        self._reduced_bar.update(state["bar"])
        self._point_step = state["point_step"]
        if state.get("published"):
            self._published_window = self.window

    def merge_epoch(self, others: Sequence[Mapping[str, Any]], keep: bool) -> None:
        """Add what other ranks had logged when they were more or fewer; without `keep`, forget this rank's share."""
        for entry in self._training.values():
            if not keep:
                entry.start_anew()
        for held in (held for other in others if keep for held in other["entries"]):
            entry_or_none = self._training.get(tuple(held["key"]))
            if entry_or_none is not None and held["total"] is not None:
                total = move(held["total"], self._strategy.device)
                before = entry_or_none.total
                entry_or_none.total = total if before is None else combine(held["op"], before, total)
                entry_or_none.weight += held["weight"]

    def forget(self) -> None:
        """Start a call of the trainer with nothing logged."""
        for held in (self._training, self._evaluation, self._reduced, self._reduced_logged, self._reduced_bar):
            held.clear()
        self.waiting.clear()
        self._bar = _BarValues()
        self._point_step, self._published_window = 0, -1

    # --- views: reading one never communicates -----------------------------------------------------------------
    def callback_metrics(self) -> dict[str, Tensor]:
        """Every name → 0-d tensor: reduced ones, and this rank's newest of what was logged since."""
        view = dict(self._reduced)
        for name, entry, value in self._since():
            view[name] = view[entry.bare_name] = torch.as_tensor(value, dtype=torch.float32)
        return view

    def logged_metrics(self) -> dict[str, Tensor]:
        """As `callback_metrics`, of what goes to the loggers and under the names it has there."""
        view = dict(self._reduced_logged)
        view.update(
            (name, torch.as_tensor(value, dtype=torch.float32)) for name, entry, value in self._since() if entry.logger
        )
        return view

    def progress_bar_metrics(self) -> dict[str, float]:
        """Host floats for the bar; values on a device are copied without blocking, at most twice a second."""
        fresh = {name: value for name, entry, value in self._since() if entry.prog_bar}
        return self._reduced_bar | self._bar.read(fresh)

    def _since(self) -> list[tuple[str, Entry, Any]]:
        """(name, entry, value) of what was logged since it was last reduced."""
        found = []
        for entry in self._training.values():
            if entry.on_step and entry.values and entry.window > self._published_window:
                found.append((entry.step_name, entry, entry.values[-1]))
            if entry.on_epoch and entry.weight and self.hook == "on_train_epoch_end":
                found.append((entry.epoch_name, entry, entry.running()))
        for entry in self._evaluation.values():
            if entry.on_step and entry.values:
                found.append((entry.step_name, entry, entry.values[-1]))
            if entry.on_epoch and entry.weight and self.hook in _EVALUATION_ENDS:
                found.append((entry.epoch_name, entry, entry.running()))
        return found


class _BarValues:
    """The newest values for the bar, as host floats some milliseconds old."""

    def __init__(self) -> None:
        self._numbers: dict[str, float] = {}
        self._names: list[str] = []
        self._copy: HostCopy | None = None
        self._next_copy = 0.0

    def read(self, fresh: dict[str, Any]) -> dict[str, float]:
        on_device = {name: v for name, v in fresh.items() if isinstance(v, Tensor) and v.device.type != "cpu"}
        self._numbers.update((name, float(v)) for name, v in fresh.items() if name not in on_device)
        if self._copy is not None and self._copy.arrived():
            self._numbers.update(zip(self._names, self._copy.wait(), strict=True))
            self._copy = None
        if on_device and self._copy is None and time.monotonic() >= self._next_copy:
            self._next_copy = time.monotonic() + _BAR_SECONDS
            self._names, self._copy = list(on_device), HostCopy(list(on_device.values()))
        return {name: self._numbers[name] for name in fresh if name in self._numbers}
