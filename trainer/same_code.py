"""Whether all ranks run the same program on the same software: found at the start, not as a hang an hour later."""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import sys
from collections import Counter
from typing import TYPE_CHECKING

import torch

from .. import __version__
from ..errors import LaunchError

if TYPE_CHECKING:
    from ..strategies.base import Strategy


def check_same_code(strategy: Strategy) -> None:
    """LaunchError on every rank, naming those that differ from most; a collective.

    Compared are the versions of Paceline, torch and Python, and the content of the program that was started.
    """
    if strategy.world_size == 1:
        return
    facts = {
        "paceline": __version__,
        "torch": str(torch.__version__),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "program": _program(),
    }
    shares = strategy.all_gather_object((socket.gethostname(), facts))
    for fact in facts:
        values = [found[fact] for _, found in shares]
        usual, _ = Counter(values).most_common(1)[0]
        others = [f"rank {i} (host {shares[i][0]}) has {value}" for i, value in enumerate(values) if value != usual]
        if others:
            raise LaunchError(
                f"The ranks do not run the same {fact}: most have {usual}, {'; '.join(others[:4])}. Install the "
                "same on every node."
            )


def _program() -> str:
    """The name and a checksum of the script that this process runs."""
    path = sys.argv[0] if sys.argv else ""
    if not os.path.isfile(path):
        return os.path.basename(path)
    with open(path, "rb") as file:
        return f"{os.path.basename(path)} ({hashlib.sha256(file.read()).hexdigest()[:12]})"
