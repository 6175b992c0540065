"""A process that was killed, and the same command again: nobody can tell, to the bit."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from paceline.errors import CheckpointError

from helpers.kill_runs import train
from helpers.resumable import run
from helpers.scripts import run_command, start_script

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def kills(tmp_path: Path, how: str, first: int, last: int, stride: int = 1, timeout_seconds: float = 170.0) -> int:
    """How many runs were killed, each of which was then resumed and found equal."""
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "helpers.kill_runs", tmp_path, how, first, last, stride]
    done = run_command(*command, env=environment, timeout_seconds=timeout_seconds)
    assert done.returncode == 0, done.stderr[-3000:]
    return int(json.loads(done.stdout.splitlines()[-1])["kills"])


def test_killed_at_some_hooks_and_writes_it_ends_as_the_run_that_never_was(tmp_path: Path) -> None:
    assert kills(tmp_path, "hook", 3, 90, stride=22) == 4
    assert kills(tmp_path, "write", 5, 205, stride=50) == 5


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", range(4))
def test_killed_at_every_write_of_its_first_saves_it_ends_as_the_run_that_never_was(tmp_path: Path, part: int) -> None:
    assert kills(tmp_path, "write", 1 + part, 200, stride=4, timeout_seconds=890) == 50


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_any_hook_it_ends_as_the_run_that_never_was(tmp_path: Path) -> None:
    assert kills(tmp_path, "hook", 1, 85, timeout_seconds=890) > 75


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_random_times_it_ends_as_the_run_that_never_was(tmp_path: Path) -> None:
    assert kills(tmp_path, "time", 1, 80, timeout_seconds=890) >= 50


LIVING = """
import sys, time
from helpers.resumable import run, every_save
from paceline.callbacks import Callback

class Waits(Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 3:
            print("waits", flush=True)
            time.sleep(100)

run("sgd_momentum_by_step", sys.argv[1], callbacks=(*every_save(), Waits()))
"""


def test_the_folder_of_a_living_run_is_refused(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with start_script(LIVING, tmp_path / "runs", env=environment) as living:
        living.wait_for_output("waits")
        with pytest.raises(CheckpointError, match=f"version_0 is in use by a run that is alive .process {living.pid}"):
            run("sgd_momentum_by_step", tmp_path / "runs", "auto")
    run("sgd_momentum_by_step", tmp_path / "runs", "auto", max_epochs=1)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["version_0"]


def test_auto_of_a_finished_run_trains_no_further(tmp_path: Path) -> None:
    first = train(tmp_path / "runs")
    assert {**train(tmp_path / "runs"), "digests": 0} == {**first, "digests": 0}
