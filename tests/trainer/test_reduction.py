"""The arithmetic of metrics over ranks, and its messages: split in any way, the sums are those of the whole."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.strategies import DDP, SingleDevice, Strategy
from paceline.strategies.cluster import find_cluster
from paceline.trainer.reduction import NEUTRAL, Capacity, HostCopy, Sum, Transfer, combine, reduce, widen

from helpers.ranks import run_ranks

OPS = ("mean", "sum", "min", "max")
NUMBERS = st.floats(-1e6, 1e6, allow_subnormal=False)


def whole(op: str, items: list[tuple[float, float]]) -> float:
    """What (value, weight) pairs come to, without any split."""
    if op == "mean":
        return sum(v * w for v, w in items) / sum(w for _, w in items)
    values = [v for v, _ in items]
    return {"sum": math.fsum(values), "min": min(values), "max": max(values)}[op]


def share(op: str, items: list[tuple[float, float]]) -> tuple[str, float, float]:
    """One rank's part of a reduction."""
    total = NEUTRAL[op]
    for value, weight in items:
        total = combine(op, total, value * weight if op == "mean" else value)
    return op, total, sum(weight for _, weight in items)


@settings(deadline=None, max_examples=50)
@given(
    op=st.sampled_from(OPS),
    items=st.lists(st.tuples(NUMBERS, st.integers(1, 50)), min_size=1, max_size=20),
    owners=st.lists(st.integers(0, 3), min_size=20, max_size=20),
)
def test_however_values_are_dealt_to_ranks_the_result_is_that_of_the_whole(
    op: str, items: list[tuple[float, float]], owners: list[int]
) -> None:
    dealt = [[item for item, owner in zip(items, owners, strict=False) if owner == rank] for rank in range(4)]
    reduced = reduce([{"x": share(op, mine)} if mine else {} for mine in dealt])
    assert reduced["x"] == pytest.approx(whole(op, items), rel=1e-9, abs=1e-6)


def test_names_that_a_rank_lacks_weigh_nothing() -> None:
    shares = [{"x": ("mean", 10.0, 2.0), "only": ("sum", 3.0, 1.0)}, {"x": ("mean", 2.0, 1.0)}]
    assert reduce(shares) == {"x": 4.0, "only": 3.0}


def test_a_mean_of_nothing_is_no_number() -> None:
    assert math.isnan(reduce([{"x": ("mean", 0.0, 0.0)}])["x"])


def test_widened_values_are_copies_in_the_widest_type() -> None:
    value = torch.tensor(3, dtype=torch.int32)
    wide = widen(value)
    assert wide.dtype == torch.float64
    value += 1
    assert wide == 3
    same = torch.tensor(1.0, dtype=torch.float64)
    assert widen(same) is not same
    assert widen(2.5) == 2.5


@pytest.mark.parametrize(("op", "expected"), [("mean", 5.0), ("sum", 5.0), ("min", 2.0), ("max", 3.0)])
@pytest.mark.parametrize("left", [2.0, torch.tensor(2.0)])
@pytest.mark.parametrize("right", [3.0, torch.tensor(3.0)])
def test_tensors_and_numbers_combine(op: str, expected: float, left: Any, right: Any) -> None:
    assert float(combine(op, left, right)) == expected


def test_numbers_come_to_the_host_in_the_order_given() -> None:
    copy = HostCopy([1, torch.tensor(2.5), 3.0, torch.tensor(4, dtype=torch.int64), torch.tensor(0.1).double()])
    assert copy.arrived()
    assert copy.wait() == [1.0, 2.5, 3.0, 4.0, torch.tensor(0.1).double().item()]


def test_alone_a_transfer_is_done_at_once() -> None:
    transfer = Transfer({"b": Sum("mean", torch.tensor(6.0), 3.0), "a": Sum("max", 2, 1.0)}, SingleDevice(), Capacity())
    assert transfer.arrived()
    assert transfer.finish() == {"a": 2.0, "b": 2.0}


def test_a_transfer_of_nothing_is_nothing() -> None:
    assert Transfer({}, SingleDevice(), Capacity()).finish() == {}


# --- in ranks -------------------------------------------------------------------------------------------------------
def connected() -> Strategy:
    strategy, cluster = DDP(), find_cluster()
    strategy.take_place(torch.device("cpu"), cluster)
    strategy.connect(cluster)
    return strategy


def transfers() -> Any:
    """Rounds in which ranks log the same names, more of them, different ones, and none."""
    strategy, capacity = connected(), Capacity()
    rank = strategy.rank
    rounds: list[dict[str, Sum]] = [
        {"x": Sum("mean", torch.tensor(1.0 + rank), 1.0)},
        {"x": Sum("mean", 1.0 + rank, 1.0), "y": Sum("max", torch.tensor(rank), 1.0), "z": Sum("sum", 2, 1.0)},
        {f"only_{rank}": Sum("sum", 5.0, 1.0, label=f"of {rank}"), "x": Sum("min", float(rank), 1.0, label="all")},
        {} if rank else {"x": Sum("mean", 8.0, 4.0)},
        {},
        {"x": Sum("mean", 3.0, 1.0), "y": Sum("sum", 1.0, 1.0)},
    ]
    results = []
    for sums in rounds:
        transfer = Transfer(sums, strategy, capacity)
        polled = transfer.arrived()
        reduced = transfer.finish()
        results.append((reduced, {name: label for name, label in transfer.labels.items() if label}, polled in (0, 1)))
    return results, capacity.numbers


@pytest.mark.parametrize("ranks", [2, 3])
def test_transfers_of_equal_and_of_different_names_give_all_ranks_the_same(ranks: int) -> None:
    results = run_ranks(transfers, ranks)
    assert all(result == results[0] for result in results)
    reduced = [numbers for numbers, _, _ in results[0][0]]
    mean = (1 + ranks) / 2
    assert reduced == [
        {"x": mean},
        {"x": mean, "y": ranks - 1, "z": 2 * ranks},
        {**{f"only_{rank}": 5.0 for rank in range(ranks)}, "x": 0.0},
        {"x": 2.0},
        {},
        {"x": 3.0, "y": ranks},
    ]
    labels = results[0][0][2][1]
    assert labels == {**{f"only_{rank}": f"of {rank}" for rank in range(ranks)}, "x": "all"}


def overlapping() -> Any:
    """Three transfers sent before the first is read."""
    strategy, capacity = connected(), Capacity()
    sent = [Transfer({"x": Sum("sum", float(i + strategy.rank), 1.0)}, strategy, capacity) for i in range(3)]
    for transfer in sent:
        transfer.arrived()
    return [transfer.finish() for transfer in sent]


def test_transfers_may_overlap() -> None:
    assert run_ranks(overlapping, 2) == [[{"x": 1.0}, {"x": 3.0}, {"x": 5.0}]] * 2
