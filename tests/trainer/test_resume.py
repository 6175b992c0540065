"""A run that was cut anywhere and resumed ends as the one that never was, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import paceline as pl
from helpers.ranks import run_ranks
from helpers.resumable import CASES, Outcome, every_save, run, same, saved_in
from paceline.callbacks import Callback


@pytest.mark.parametrize("case", CASES)
def test_it_resumes_from_every_update_validation_and_epoch_end(case: str, tmp_path: Path) -> None:
    if case == "averaged":
        pytest.importorskip("paceline.callbacks.weight_averaging")
    whole = run(case, tmp_path / "whole", callbacks=every_save())
    paths = saved_in(tmp_path / "whole")
    assert len(paths) > 8
    wrong = {}
    for path in paths:
        try:
            same(run(case, tmp_path / Path(path).name, path), whole)
        except AssertionError as error:
            wrong[Path(path).name] = str(error)
    assert not wrong


def test_saving_changes_nothing(tmp_path: Path) -> None:
    with_saves = run("adam_plateau_accumulated", tmp_path / "a", callbacks=every_save())
    same(run("adam_plateau_accumulated", tmp_path / "b"), with_saves)
