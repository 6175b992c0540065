"""Kills runs and starts them again: `python -m helpers.kill_runs FOLDER HOW FIRST LAST [STRIDE]`.

The same run is started again and again with `ckpt_path="auto"`, as its user's command would be, until one ends by
itself; then what it came to is compared with a run that was never killed. HOW: "write" kills at the nth change to the
storage, "hook" at the nth hook of training, validation or logging, "time" after a random time; n goes from FIRST to
LAST. Runs are forked from one process without threads, because importing torch for each would take minutes.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from paceline.callbacks import Callback, ModelCheckpoint
from paceline.trainer.checkpoint import storage

from .resumable import run, saved_in

CASE = "adam_plateau_accumulated"


class KillAt(Callback):
    """SIGKILL at the nth of these hooks."""

    def __init__(self, n: int) -> None:
        self.left = n

    def _count(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    on_train_batch_start = on_train_batch_end = on_before_optimizer_step = on_validation_batch_end = _count
    on_train_epoch_end = on_validation_end = on_save_checkpoint = _count


def train(folder: Path, *callbacks: Callback) -> dict[str, Any]:
    saves = ModelCheckpoint(every_n_train_steps=2, save_last=True), ModelCheckpoint(monitor="val_loss", save_top_k=2)
    outcome = asdict(run(CASE, folder, "auto", callbacks=(*saves, *callbacks), max_epochs=2))
    return {key: outcome[key] for key in ("digests", "metrics", "epochs", "step", "points")}


def forked(work: Callable[[], Any], result: Path) -> tuple[int, Callable[[], int]]:
    """Run `work` in a child, its result pickled into a file; the child's pid, and what waits for its signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
                outcome = work()
            result.write_bytes(pickle.dumps(outcome))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def wait() -> int:
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            return os.WTERMSIG(status)
        assert os.WEXITSTATUS(status) == 0, "the run failed; its traceback is above"
        return 0

    return pid, wait


def killed(folder: Path, how: str, n: int, result: Path) -> int:
    """One attempt that is to be killed; the signal that ended it, 0 if it came to its end first."""
    seen = 0

    def changing(kind: str, path: str) -> None:
        nonlocal seen
        seen += 1
        if seen == n:
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> Any:
        if how == "write":
            storage.changing = changing
        return train(folder, *([KillAt(n)] if how == "hook" else []))

    pid, wait = forked(work, result)
    if how == "time":
        time.sleep(random.uniform(0.0, 0.3))
        os.kill(pid, signal.SIGKILL)
    return wait()


def main() -> None:
    root, how, first, last = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    stride = int(sys.argv[5]) if len(sys.argv) > 5 else 1
    torch.set_num_threads(1)
    random.seed(first)
    result = root / "result.pickle"
    forked(lambda: train(root / "whole"), result)[1]()
    whole = pickle.loads(result.read_bytes())
    kept = [Path(path).name for path in saved_in(root / "whole")]
    kills = 0
    for n in range(first, last + 1, stride):
        folder = root / f"{how}{n}"
        code = killed(folder, how, n, result)
        kills += code != 0
        while code:
            code = forked(lambda folder=folder: train(folder), result)[1]()
        resumed = pickle.loads(result.read_bytes())
        for key, value in whole.items():
            assert resumed[key] == value, f"{how} {n}: {key} differ: {resumed[key]} and {value}"
        versions = sorted(path.name for path in folder.iterdir())  # two where the first had no checkpoint yet
        assert versions == ["version_0"] or saved_in(folder) == [], f"{how} {n}: {versions}"
        found = [Path(path).name for path in saved_in(folder, versions[-1])]  # what it resumed from stays, too
        assert len(kept) <= len(found) <= len(kept) + 2, f"{how} {n}: {found} is kept, {kept} by the other run"
        shutil.rmtree(folder)
    print(json.dumps({"kills": kills}))


if __name__ == "__main__":
    main()
