"""Which checkpoints are the k best: pure functions of scores, equal on every rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def is_better(score: float, other: float, mode: str) -> bool:
    """Whether `score` beats `other`; an equal one does not."""
    return score < other if mode == "min" else score > other


def comparable(score: float, mode: str) -> float:
    """`score`, or the worst there is in the place of NaN."""
    if not math.isnan(score):
        return score
    return math.inf if mode == "min" else -math.inf


def qualifies(score: float, held: Mapping[str, Any], k: int, mode: str) -> bool:
    """Whether a checkpoint with `score` belongs to the `k` best (-1: all), those `held` so far among them."""
    if k == -1 or len(held) < k:
        return True
    return k > 0 and is_better(comparable(score, mode), float(held[worst(held, mode)]), mode)


def best(held: Mapping[str, Any], mode: str) -> str:
    """The path of the best score, the oldest of equals."""
    choose = min if mode == "min" else max
    return choose(held, key=lambda path: float(held[path]))


def worst(held: Mapping[str, Any], mode: str) -> str:
    """The path of the worst score, the oldest of equals."""
    choose = max if mode == "min" else min
    return choose(held, key=lambda path: float(held[path]))
