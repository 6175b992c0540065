"""`Profiler`: a table of where the time went, by phase and by hook; Python's own profiler; or torch's, with a trace.

It measures from outside: when a call begins it puts marks around the hooks that the loops call, so a run without it
pays nothing. Each mark ends a phase, so phases fill the whole of the time; the time of hooks is inside that of phases.
Times are the host's: on an accelerator a phase shows where the host waits, and torch's profiler what the device does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ConfigurationError
from ..trainer.argument_types import checked_types
from ..trainer.callback import Callback
from .log_file import join, write_text
from .profiling_tools import PythonProfile, Tool, TorchProfile

if TYPE_CHECKING:
    import os

    from ..trainer.module import Module
    from ..trainer.trainer import Trainer

KINDS = ("simple", "advanced", "pytorch")


@dataclass
class Spent:
    """Seconds that one phase or hook took, over how many calls."""

    calls: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """One more call."""
        self.calls += 1
        self.seconds += seconds


@dataclass
class Times:
    """Where the time went: `phases` one after another, and `hooks` (and blocks of the user's own) inside them."""

    phases: dict[str, Spent] = field(default_factory=dict)
    hooks: dict[str, Spent] = field(default_factory=dict)
    last_mark: float = field(default_factory=time.perf_counter)

    def mark(self, phase: str) -> None:
        """All since the last mark was `phase`."""
        now = time.perf_counter()
        self.phases.setdefault(phase, Spent()).add(now - self.last_mark)
        self.last_mark = now

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """The body is the hook or block `name`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.hooks.setdefault(name, Spent()).add(time.perf_counter() - began)

    def table(self) -> str:
        """Both, the slowest first."""
        total = sum(spent.seconds for spent in self.phases.values())
        titles = ("phase", self.phases), ("hook or block (inside the phases)", self.hooks)
        return "\n\n".join(_table(title, spent, total) for title, spent in titles if spent)


class Profiler(Callback):
    """Tells where the time of a call went, on rank 0, when the call ends.

    `kind` "simple": the table alone; "advanced": Python's cProfile too; "pytorch": torch's profiler too, which records
    `active` batches after `wait` and `warmup` (`repeat` times; 0: until the end), writes a trace for Perfetto or
    chrome://tracing, and takes `options` of `torch.profiler.profile`. Traces, and with `filename` the tables in the
    place of standard output, go to `dirpath`, by default the run's folder. `row_limit` cuts the tools' tables.
    `with profiler.profile("name"):` measures a block of one's own.
    """

    @checked_types
    def __init__(
        self,
        kind: Literal["simple", "advanced", "pytorch"] = "simple",
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        row_limit: int = 20,
        wait: int = 1,
        warmup: int = 1,
        active: int = 3,
        repeat: int = 1,
        **options: Any,
    ) -> None:
        if kind not in KINDS:
            raise ConfigurationError(f"Profiler({kind!r}): use one of {', '.join(KINDS)}.")
        if options and kind != "pytorch":
            raise ConfigurationError(f"Profiler({kind!r}) has no arguments {sorted(options)}; Profiler('pytorch') has.")
        self.kind = kind
        self.dirpath = None if dirpath is None else str(dirpath)
        self.filename = filename
        self.row_limit = row_limit
        self.times = Times()
        self.trace_paths: list[str] = []
        self._schedule = {"wait": wait, "warmup": warmup, "active": active, "repeat": repeat}
        self._options = options
        self._tool: Tool | None = None
        self._stage: str | None = None

    @classmethod
    def from_argument(cls, value: Any) -> Profiler | None:
        """What `Trainer(profiler=...)` means: None, one of the kinds, or a Profiler; ConfigurationError otherwise."""
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, str) and value in KINDS:
            return cls(value)  # type: ignore[arg-type]
        raise ConfigurationError(f"profiler={value!r:.80}: use one of {', '.join(KINDS)}, a Profiler, or None.")

    @contextmanager
    def profile(self, name: str) -> Iterator[None]:
        """Measure the body as `name`."""
        with self.times.of(name):
            yield

    def summary(self) -> str:
        """The tables as text."""
        parts = [f"Profile of {self._stage}:", self.times.table()]
        if self._tool is not None:
            parts.append(self._tool.table(self.row_limit))
        return "\n\n".join(part for part in parts if part)

    # --- a call ----------------------------------------------------------------------------------------------------
    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        if not trainer.is_global_zero:
            return
        self._stage, self.times, self.trace_paths = stage, Times(), []
        folder = self.dirpath or str(trainer.log_dir)
        if self.kind == "advanced":
            self._tool = PythonProfile()
        elif self.kind == "pytorch":
            self._tool = TorchProfile(lambda: self._trace_path(folder, stage), self._schedule, self._options)
        _time_hooks(trainer.hooks, self.times)
        _put_marks(trainer, self.times, self._tool)
        if self._tool is not None:
            self._tool.start(trainer.strategy.device)

    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        if self._stage is None:
            return
        if self._tool is not None:
            self._tool.stop()
        self.times.mark("end")
        if self.filename is None:
            print(self.summary(), flush=True)
        else:
            folder = self.dirpath or str(trainer.log_dir)
            write_text(join(folder, f"{stage}-{self.filename}.txt"), self.summary() + "\n")
        self._stage = self._tool = None

    def _trace_path(self, folder: str, stage: str) -> str:
        number = f"-{len(self.trace_paths)}" if self.trace_paths else ""
        self.trace_paths.append(join(folder, f"{stage}-{self.filename or 'profile'}{number}.pt.trace.json"))
        return self.trace_paths[-1]


def _time_hooks(hooks: Any, times: Times) -> None:
    def timed(hook: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with times.of(hook.__qualname__):
                return hook(*args)

        return call

    for name, found in vars(hooks).items():
        if isinstance(found, tuple):
            setattr(hooks, name, tuple(map(timed, found)))


def _put_marks(trainer: Trainer, times: Times, tool: Tool | None) -> None:
    """Marks before the first hook of a moment, or after its last one."""
    hooks: Any = trainer.hooks

    def before(moment: str, phase: str, starts: str = "") -> None:
        setattr(hooks, moment, (marking(phase, starts), *getattr(hooks, moment)))

    def after(moment: str, phase: str, steps: bool = False) -> None:
        setattr(hooks, moment, (*getattr(hooks, moment), marking(phase, "", steps)))

    def marking(phase: str, starts: str, steps: bool = False) -> Callable[..., None]:
        def mark(*_: Any) -> None:
            if trainer.sanity_checking:
                times.mark("sanity check" if phase.startswith("validation") else "set-up")
                return
            times.mark(phase)
            if tool is not None:
                tool.phase(starts)
            if tool is not None and steps:
                tool.step()

        return mark

    fits = trainer.state.fn == "fit"
    before("on_train_start", "set-up")
    before("on_train_epoch_start", "between epochs")
    before("on_train_batch_start", "data", "forward")
    before("on_before_backward", "forward", "backward")
    before("on_after_backward", "backward", "optimizer step")
    after("on_train_batch_end", "optimizer step", steps=True)
    before("on_train_end", "between epochs")
    for stage in ("validation", "test", "predict"):
        before(f"on_{stage}_start", "between batches" if fits else "set-up")
        before(f"on_{stage}_batch_start", f"{stage} data", f"{stage} step")
        after(f"on_{stage}_batch_end", f"{stage} step", steps=not fits)
        after(f"on_{stage}_end", f"{stage} end")


def _table(title: str, spent: dict[str, Spent], total: float) -> str:
    rows = [
        (name, str(s.calls), f"{s.seconds:.4f}", f"{1000 * s.seconds / s.calls:.3f}", f"{100 * s.seconds / total:.1f}")
        for name, s in sorted(spent.items(), key=lambda item: -item[1].seconds)
    ]
    heads = (title, "calls", "total s", "mean ms", "%")
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in (heads, *rows)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
