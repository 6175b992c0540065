"""Random streams: the seed of a run, and the states of the three generators that user code draws from.

Python's, NumPy's (where it is loaded) and torch's. The seed lives in the environment variable PACELINE_SEED, so that
every rank and worker that a process starts has it.
"""

from __future__ import annotations

import os
import random
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from ..errors import ConfigurationError
from .plan import mix_seed
from .rank_zero import rank_zero_info

SEED_VARIABLE = "PACELINE_SEED"
_RANK_STREAM = 0x72616E6B  # "rank"
_SAMPLE_STREAM = 0x73616D70  # "samp"


def seed_everything(seed: int | None = None, workers: bool = False, verbose: bool = True) -> int:
    """Seed Python's, NumPy's and torch's generators, on every rank alike; returns the seed.

    Without `seed`: the one in PACELINE_SEED, or a new one. Data workers get streams of their own, derived from it,
    in any case; `workers` is accepted for Lightning's sake. Raises ConfigurationError outside 0 to 2**32 - 1.
    """
    if seed is None:
        seed = int(os.environ.get(SEED_VARIABLE) or secrets.randbits(32))
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ConfigurationError(f"seed_everything({seed!r}): use a whole number from 0 to {2**32 - 1}.")
    if verbose:
        rank_zero_info(f"Seed set to {seed}")
    os.environ[SEED_VARIABLE] = str(seed)
    seed_generators(seed)
    return seed


def seed_generators(seed: int) -> None:
    """Seed the three generators of this process; NumPy's only if it is loaded."""
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def seed_of_run() -> tuple[int, bool]:
    """The seed that the user chose, by `seed_everything` or `torch.manual_seed`; else a new one, and True."""
    if os.environ.get(SEED_VARIABLE):
        return int(os.environ[SEED_VARIABLE]), False
    seed = torch.initial_seed()  # 64 random bits while nobody has seeded
    return seed % 2**32, seed >= 2**32


def derive_stream_of_rank(seed: int, global_step: int, rank: int) -> None:
    """From here on ranks other than 0 draw from streams of their own, a function of the three numbers."""
    if rank:
        seed_generators(mix_seed(seed, _RANK_STREAM, global_step, rank))


def random_state() -> dict[str, Any]:
    """The states of all generators of this process, devices included; what `restore_random_state` takes."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if "numpy" in sys.modules:
        state["numpy"] = sys.modules["numpy"].random.get_state()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Put the generators back to where `random_state` found them."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])
    if "numpy" in state:
        import numpy

        numpy.random.set_state(state["numpy"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def isolated(seed: int | None = None) -> Iterator[None]:
    """Draw inside without changing the streams outside; from `seed` on, if given."""
    state = random_state()
    if seed is not None:
        seed_generators(seed)
    try:
        yield
    finally:
        restore_random_state(state)


# --- places in the data ------------------------------------------------------------------------------------------
class Place(NamedTuple):
    """Where in the data a micro-batch is: it, and nothing else, decides what is drawn for it."""

    seed: int
    epoch: int
    position: int


_place = Place(0, 0, 0)


def arrive_at(place: Place, in_worker: bool = False) -> None:
    """The samples of `place` are read next; a worker's three generators start from it (about 7 µs)."""
    global _place
    _place = place
    if in_worker:
        seed_generators(mix_seed(*place))


@contextmanager
def place_kept() -> Iterator[None]:
    """Arrive elsewhere inside; afterwards the place is the one before."""
    global _place
    before = _place
    try:
        yield
    finally:
        _place = before


def sample_generator(index: int) -> torch.Generator:
    """A CPU generator for augmenting sample `index` in this epoch, in `Dataset.__getitem__`.

    What it draws is a function of (seed, epoch, index) alone, so neither the number of ranks nor that of workers, nor
    resuming, changes an augmented sample. About 4 µs.
    """
    return torch.Generator().manual_seed(mix_seed(_place.seed, _SAMPLE_STREAM, _place.epoch, index))
