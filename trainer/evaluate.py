"""The evaluation loop, for validate, test and predict alike, and for validation inside `fit`.

    evaluate:  hooks of the start; every batch of every loader; hooks of the end, with the metrics reduced in between

Batches are those of one process, dealt whole to the ranks, so every sample is seen once and every number is global.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .evaluation_data import EvaluationData
from .metric_objects import untouched
from .rng import place_kept

if TYPE_CHECKING:
    from ..strategies.base import Strategy
    from .hooks import Hooks
    from .metrics import Metrics
    from .module import Module
    from .state import Progress


@dataclass
class Evaluation:
    """All that an evaluation touches; `stage` is "validation", "test" or "predict", as in the names of its hooks."""

    stage: str
    module: Module
    strategy: Strategy
    hooks: Hooks
    metrics: Metrics
    progress: Progress
    data: Sequence[EvaluationData]
    step: Callable[..., Any]
    transfers: Sequence[Callable[[Any], Any] | None]
    inference_mode: bool
    keep_outputs: bool = False
    batch_idx: int = 0
    indices: Any = None
    dataloader_idx: int = 0
    outputs: list[list[tuple[int, Any]]] = field(default_factory=list)


def evaluate(run: Evaluation, limit: int | float = math.inf) -> list[dict[str, float]]:
    """Run at most `limit` batches of every loader; one dict of reduced metrics a loader. Without a batch: nothing."""
    stage, hooks, metrics = run.stage, run.hooks, run.metrics
    if not any(data.num_batches for data in run.data):
        run.outputs = [[] for _ in run.data]
        return []
    with _evaluating(run), torch.inference_mode() if run.inference_mode else torch.no_grad():
        _call_own(run, f"on_{stage}_model_eval")
        call(getattr(hooks, f"on_{stage}_start"))
        call(getattr(hooks, f"on_{stage}_epoch_start"))
        run.outputs = []
        for index, data in enumerate(run.data):
            run.dataloader_idx = index
            metrics.dataloader_idx = index if len(run.data) > 1 else None
            run.outputs.append(list(_evaluate_loader(run, data, limit)))
        metrics.dataloader_idx = None
        metrics.batch, metrics.weight = None, None
        call(getattr(hooks, f"on_{stage}_epoch_end"))
        results = _reduced(run)
        if run.progress.due[:1] == ["validation"]:
            run.progress.due.pop(0)
        call(getattr(hooks, f"on_{stage}_end"))
        _call_own(run, f"on_{stage}_model_train")
    return results


def _evaluate_loader(run: Evaluation, data: EvaluationData, limit: int | float) -> Iterator[tuple[int, Any]]:
    """(batch_idx, output) of this rank's batches, for as many as are kept."""
    metrics, stage, index = run.metrics, run.stage, run.dataloader_idx
    before, after = getattr(run.hooks, f"on_{stage}_batch_start"), getattr(run.hooks, f"on_{stage}_batch_end")
    transfer, step_name = run.transfers[index], f"{stage}_step"
    for batch_idx, batch, weight, indices, ghost in data.batches(limit):
        run.batch_idx, run.indices = batch_idx, indices
        if transfer is not None:
            batch = transfer(batch)
        if ghost:
            with metrics.silent(), untouched(run.module):
                run.step(batch, batch_idx, index)
            continue
        metrics.window += 1
        metrics.batch, metrics.weight = batch, weight
        for hook in before:
            hook(batch, batch_idx, index)
        metrics.hook = step_name
        output = run.step(batch, batch_idx, index)
        for hook in after:
            hook(output, batch, batch_idx, index)
        if run.keep_outputs:
            yield batch_idx, output


def gathered(run: Evaluation) -> list[list[Any]]:
    """What the batches of every loader returned, in order, on every rank."""
    shares = run.strategy.all_gather_object(run.outputs) if run.strategy.data_ranks > 1 else [run.outputs]
    return [
        [output for _, output in sorted((pair for share in shares for pair in share[index]), key=lambda pair: pair[0])]
        for index in range(len(run.data))
    ]


def _reduced(run: Evaluation) -> list[dict[str, float]]:
    """Reduce what was logged; metrics that belong to no one loader stand in each dict."""
    if run.stage == "predict":
        return []
    progress = run.progress
    owners = run.metrics.finish_epoch(progress.global_step, progress.epoch, progress.samples)
    values = run.metrics.callback_metrics()
    return [
        {name: values[name].item() for name, owner in owners.items() if owner in (None, index)}
        for index in range(len(run.data))
    ]


@contextmanager
def _evaluating(run: Evaluation) -> Iterator[None]:
    """Layers get their modes back afterwards, and training metrics their window."""
    run.module.__dict__["_modes"] = [(module, module.training) for module in run.module.modules()]
    with run.metrics.evaluation(), place_kept():
        yield


def call(hooks: Sequence[Callable[..., Any]]) -> None:
    """Call hooks that take no arguments."""
    for hook in hooks:
        hook()


def _call_own(run: Evaluation, name: str) -> None:
    run.metrics.hook = name
    getattr(run.module, name)()
