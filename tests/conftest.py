"""What every test of this repository needs.

Each test runs in its own empty folder, seeded, on one thread, and leaves the process as it was.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.isolation import isolated
from helpers.ranks import close_pools

ROOT = Path(__file__).resolve().parents[1]


class RootIsNoPackageOfTests:
    """Keeps pytest from importing our `__init__.py` a second time, under the name of the checkout's folder.

    pytest imports the `__init__.py` of every folder above a test, up to its root; ours is that of `paceline`, and in
    a folder like `paceline-0.1.0` it would not even import.
    """

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_configure(config: pytest.Config) -> None:
    # torch asks the name server for the name of 127.0.0.1 at each connection, and waits 5 s for a lost answer.
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:3")
    # A shell starts what it puts into the background with Ctrl-C ignored, and every process we start would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.pluginmanager.register(RootIsNoPackageOfTests())


def pytest_sessionfinish() -> None:
    """End the processes of the pool of ranks, also after Ctrl-C."""
    close_pools()


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path) -> Iterator[None]:
    with isolated(tmp_path):
        yield
