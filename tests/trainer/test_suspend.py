"""SIGTERM and SIGUSR1: the run is saved at one step of all ranks and ends with 75; started again, nobody can tell."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import paceline as pl
from paceline.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from paceline.errors import LaunchError, Suspended
from paceline.trainer.checkpoint import load
from paceline.trainer.signals import LAUNCHER_PID, SignalWatch, end_with_launcher

from helpers.ranks import run_ranks
from helpers.resumable import CASES, Outcome, run, same, saved_in
from helpers.scripts import RunningScript, start_command, start_script

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs POSIX signals")


class SignalsItself(Callback):
    """Sends itself a signal at the nth of these hooks, on one rank."""

    def __init__(self, n: int, number: signal.Signals = signal.SIGTERM, rank: int = 0) -> None:
        self.left, self.number, self.rank = n, number, rank

    def _count(self, trainer: pl.Trainer, *_: Any) -> None:
        self.left -= 1
        if self.left == 0 and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.number)

    on_fit_start = on_train_start = on_train_batch_start = on_train_batch_end = on_before_optimizer_step = _count
    on_validation_batch_end = on_validation_end = on_train_epoch_end = on_save_checkpoint = _count


def until_the_end(case: str, root: Path, *callbacks: Callback, **options: Any) -> tuple[int, Outcome]:
    """The same command again and again, as long as it asks for that; how often it did, and what it came to."""
    times = 0
    while True:
        try:
            saves = ModelCheckpoint(every_n_train_steps=100)
            return times, run(case, root, "auto", callbacks=(saves, *(() if times else callbacks)), **options)
        except Suspended as suspended:
            assert suspended.code == 75
            times += 1


@pytest.mark.parametrize("case", CASES)
def test_a_signal_at_any_hook_saves_and_the_same_command_goes_on_to_the_bit(case: str, tmp_path: Path) -> None:
    whole = run(case, tmp_path / "whole")
    suspended = 0
    for n in range(1, 140, 9):
        number = signal.SIGTERM if n % 2 else signal.SIGUSR1
        times, outcome = until_the_end(case, tmp_path / str(n), SignalsItself(n, number))
        same(outcome, whole)
        suspended += times
    assert suspended >= 5


def test_what_is_saved_without_checkpoints_lies_in_the_runs_folder(tmp_path: Path) -> None:
    whole = run("adam_by_epoch", tmp_path / "whole")
    for logger in (True, False):
        root = tmp_path / f"logger {logger}"
        with pytest.raises(Suspended):
            run("adam_by_epoch", root, callbacks=(SignalsItself(9),), logger=logger)
        (path,) = saved_in(root)
        outcome = run("adam_by_epoch", root, "auto", logger=logger)
        assert outcome.digests == whole.digests and len(outcome.seen) < len(whole.seen)
        assert saved_in(root) == [path]


def test_it_goes_where_auto_looks_and_is_whole_even_where_only_weights_are_kept(tmp_path: Path) -> None:
    saves = (
        ModelCheckpoint(every_n_train_steps=100),
        ModelCheckpoint(tmp_path / "mine", every_n_train_steps=1, save_weights_only=True),
    )
    with pytest.raises(Suspended):
        run("adam_by_epoch", tmp_path / "runs", callbacks=(*saves, SignalsItself(12)))
    newest = max((tmp_path / "mine").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert load(newest).optimizer is not None
    assert saved_in(tmp_path / "runs") == []


def test_a_run_suspended_before_a_validation_still_saves_what_that_validation_finds_best(tmp_path: Path) -> None:
    def best_of(root: Path, *callbacks: Callback) -> dict[str, float]:
        saves = ModelCheckpoint(monitor="val_loss", save_top_k=-1)
        run("adam_by_epoch", root, "auto", callbacks=(saves, *callbacks))
        return {Path(path).name: float(score) for path, score in saves.best_k_models.items()}

    whole = best_of(tmp_path / "whole")
    for n in range(2, 26, 3):
        with pytest.raises(Suspended):
            best_of(tmp_path / str(n), SignalsItself(n))
        assert best_of(tmp_path / str(n)) == whole


def test_a_save_of_this_very_step_is_not_made_again(tmp_path: Path) -> None:
    with pytest.raises(Suspended):
        saves = ModelCheckpoint(every_n_train_steps=1, save_top_k=-1)
        run("adam_by_epoch", tmp_path, callbacks=(saves, SignalsItself(20)))
    steps = [load(path).meta["global_step"] for path in saved_in(tmp_path)]
    assert len(steps) == len(set(steps)) > 1


def test_what_a_suspended_run_left_is_retired_by_those_that_go_on(tmp_path: Path) -> None:
    counts = []
    for n in range(6):
        saves = ModelCheckpoint(monitor="val_loss", save_top_k=1)
        with pytest.raises(Suspended):
            callbacks = (saves, SignalsItself(12 if n else 20), OnExceptionCheckpoint(tmp_path / "exceptions"))
            run("sgd_momentum_by_step", tmp_path / "runs", "auto", callbacks=callbacks, max_epochs=30)
        counts.append(len(saved_in(tmp_path / "runs")))
    assert max(counts) <= 3 and counts[-1] == counts[-2]  # the best, this suspension's, the one that it went on from
    assert not (tmp_path / "exceptions").exists()


def test_a_handler_of_the_users_own_keeps_its_signal() -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: came.append(number))
    try:
        with SignalWatch() as watch:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert came == [signal.SIGUSR1] and not watch.came
            os.kill(os.getpid(), signal.SIGTERM)
            assert watch.came
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)


# --- several ranks ---------------------------------------------------------------------------------------------------
class SignalsSometime(Callback):
    """Sends one rank a signal after a random time."""

    def __init__(self, seed: int, ranks: int) -> None:
        chance = random.Random(seed)
        self.rank, self.number = chance.randrange(ranks), chance.choice([signal.SIGTERM, signal.SIGUSR1])
        self.timer = threading.Timer(chance.uniform(0, 0.1), os.kill, (os.getpid(), self.number))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.Module) -> None:
        if trainer.global_rank == self.rank:
            self.timer.start()

    def on_train_batch_start(self, *_: Any) -> None:
        time.sleep(0.006)  # so that the run takes longer than the timer, however fast the machine is

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.Module) -> None:
        self.timer.cancel()


def suspended_and_resumed(case: str, root: Path, ranks: int, seeds: list[int]) -> tuple[Outcome, list[Any]]:
    """A run that was never interrupted, and for each seed where runs stopped and what they came to."""
    whole = run(case, root / "whole", ranks=ranks)
    found = []
    for seed in seeds:
        stops = []
        while True:
            callback: Callback = SignalsSometime(seed + 1000 * len(stops), ranks)
            if not seed:
                callback = SignalsItself(11, rank=ranks - 1)
            own = (ModelCheckpoint(every_n_train_steps=100), *((callback,) if len(stops) < 3 else ()))
            try:
                outcome = run(case, root / str(seed), "auto", callbacks=own, ranks=ranks)
                break
            except Suspended as suspended:
                newest = max(saved_in(root / str(seed)), key=os.path.getmtime)
                stops.append((suspended.code, load(newest).meta["global_step"]))
        found.append((stops, outcome))
    return whole, found


def check_on_ranks(case: str, root: Path, ranks: int, seeds: list[int]) -> int:
    stops = 0
    results = run_ranks(suspended_and_resumed, ranks, case, root, ranks, seeds, timeout_seconds=280)
    for whole, found in results:
        for number, (where, outcome) in enumerate(found):
            same(outcome, whole)
            assert where == results[0][1][number][0]
            assert {code for code, _ in where} <= {75}
            stops += len(where)
    return stops // ranks


@pytest.mark.parametrize(("ranks", "case"), [(2, "sgd_momentum_by_step"), (3, "adam_plateau_accumulated")])
def test_a_signal_to_one_rank_stops_all_at_one_step_and_they_go_on_to_the_bit(
    ranks: int, case: str, tmp_path: Path
) -> None:
    assert check_on_ranks(case, tmp_path, ranks, [0, 1]) >= 2


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_signal_to_a_random_rank_at_a_random_time_stops_all_at_one_step(ranks: int, tmp_path: Path) -> None:
    assert check_on_ranks("adam_plateau_accumulated", tmp_path, ranks, list(range(1, 21))) >= 10


# --- exit codes ------------------------------------------------------------------------------------------------------
SCRIPT = """
import sys, time
from helpers.resumable import run
from paceline.callbacks import Callback, ModelCheckpoint

class Paces(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 2:
            print(f"rank {trainer.global_rank} trains", flush=True)
        if trainer.current_epoch == 400:
            raise RuntimeError("nobody sent a signal")
        time.sleep(0.02)

outcome = run(
    "adam_by_epoch", "runs", "auto", (ModelCheckpoint(every_n_train_steps=1000), Paces()),
    workers=int(sys.argv[2]), ranks=int(sys.argv[1]), max_epochs=int(sys.argv[3])
)
print("ended", outcome.epochs, flush=True)
"""
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def wait_until_ranks_train(running: RunningScript, ranks: int) -> None:
    for rank in range(ranks):
        running.wait_for_output(f"rank {rank} trains")


def test_a_signal_to_the_whole_process_group_with_its_workers_ends_in_75() -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        with start_script(SCRIPT, 1, 2, 1000, env=ENVIRONMENT) as running:
            wait_until_ranks_train(running, 1)
            running.interrupt(number)
            result = running.wait()
        assert (result.returncode, result.left_behind) == (75, []), result.stderr


def test_the_workers_of_a_rank_that_fails_end_with_it() -> None:
    script = SCRIPT.replace("current_epoch == 400", "global_step == 3")
    with start_script(script, 1, 2, 1000, env=ENVIRONMENT, timeout_seconds=60) as running:
        result = running.wait()
    assert (result.returncode, result.left_behind) == (1, []) and "nobody sent a signal" in result.stderr


def test_a_signal_to_one_rank_of_a_plain_script_is_code_75_of_the_script() -> None:
    with start_script(SCRIPT, 2, 0, 1000, env=ENVIRONMENT) as running:
        wait_until_ranks_train(running, 2)
        ranks = [process for process in running.processes() if "RANK" in process.environ()]
        random.choice(ranks).terminate()
        result = running.wait()
    assert (result.returncode, result.stderr, result.left_behind) == (75, "", [])
    assert "a signal asked to end this run" in result.stdout


LAUNCH = ("-m", "paceline.trainer.cli", "launch", "--grace-seconds", 60, "--devices", 2)


@pytest.mark.parametrize(
    ("number", "launch"),
    [
        (signal.SIGUSR1, LAUNCH),
        (signal.SIGUSR1, ()),
        pytest.param(signal.SIGTERM, LAUNCH, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, (), marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_whoever_started_the_ranks_is_handed_on_and_its_code_is_75(
    number: signal.Signals, launch: tuple[Any, ...]
) -> None:
    Path("train.py").write_text(textwrap.dedent(SCRIPT))
    with start_command("python", *launch, "train.py", 2, 0, 1000, env=ENVIRONMENT) as running:
        wait_until_ranks_train(running, 2)
        running.interrupt(number)
        result = running.wait()
    assert (result.returncode, result.stderr, result.left_behind) == (75, "", [])


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel that tells ranks of their launcher's end is Linux")
def test_ranks_whose_launcher_is_killed_save_and_end() -> None:
    with start_script(SCRIPT, 2, 0, 1000, env=ENVIRONMENT) as running:
        wait_until_ranks_train(running, 2)
        os.kill(running.pid, signal.SIGKILL)
        result = running.wait(gone_seconds=30)
    assert result.left_behind == []
    assert "a signal asked to end this run" in result.stdout


def test_a_rank_whose_launcher_was_killed_before_they_met_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as launcher:
        pass
    monkeypatch.setenv(LAUNCHER_PID, str(launcher.pid))
    with pytest.raises(LaunchError, match=rf"The launcher \(pid {launcher.pid}\) that started this rank was killed"):
        end_with_launcher()
