"""The two profilers that `Profiler` can run beside its own table: Python's cProfile and torch's."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .log_file import write_text

if TYPE_CHECKING:
    import torch


class Tool:
    """What `Profiler` tells them."""

    def start(self, device: torch.device) -> None:
        """The call begins."""

    def phase(self, name: str) -> None:
        """A phase begins; "" for none with a name."""

    def step(self) -> None:
        """A batch is done."""

    def stop(self) -> None:
        """The call ends; once is enough."""

    def table(self, row_limit: int) -> str:
        """What took longest."""
        raise NotImplementedError


class PythonProfile(Tool):
    """cProfile over the whole call, on the main thread."""

    def __init__(self) -> None:
        import cProfile

        self._profile = cProfile.Profile()

    def start(self, device: torch.device) -> None:
        self._profile.enable()

    def stop(self) -> None:
        self._profile.disable()

    def table(self, row_limit: int) -> str:
        import pstats

        text = io.StringIO()
        pstats.Stats(self._profile, stream=text).strip_dirs().sort_stats("cumulative").print_stats(row_limit)
        return text.getvalue().strip()


class TorchProfile(Tool):
    """torch's profiler, with the phases as spans; each time that it has recorded it writes a trace."""

    def __init__(self, trace_path: Callable[[], str], schedule: dict[str, int], options: dict[str, Any]) -> None:
        self._trace_path = trace_path
        self._schedule = schedule
        self._options = options
        self._profile: Any = None
        self._span: Any = None
        self._averages: Any = None
        self._sort_by = "self_cpu_time_total"

    def start(self, device: torch.device) -> None:
        from torch.profiler import ProfilerActivity, profile, schedule

        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            self._sort_by = "self_cuda_time_total"
        defaults = {"activities": activities, "schedule": schedule(**self._schedule)}
        self._profile = profile(**{**defaults, **self._options, "on_trace_ready": self._write})
        self._profile.start()

    def phase(self, name: str) -> None:
        from torch.profiler import record_function

        if self._span is not None:
            self._span.__exit__(None, None, None)
        self._span = record_function(name) if name else None
        if self._span is not None:
            self._span.__enter__()

    def step(self) -> None:
        self._profile.step()

    def stop(self) -> None:
        if self._profile is not None:
            self.phase("")
            self._profile.stop()
            self._profile = None

    def table(self, row_limit: int) -> str:
        if self._averages is None:
            return "torch's profiler recorded no batch: there were fewer than wait + 1."
        return str(self._averages.table(sort_by=self._sort_by, row_limit=row_limit))

    def _write(self, profile: Any) -> None:
        self._averages = profile.key_averages()
        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, "trace.json")
            profile.export_chrome_trace(file)
            with open(file, encoding="utf-8") as trace:
                write_text(self._trace_path(), trace.read())
