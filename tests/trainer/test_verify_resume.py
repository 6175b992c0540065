"""`verify_resume` says whether a user's own run resumes exactly, and what differs first if not."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from paceline.errors import ConfigurationError

from helpers.ranks import run_ranks
from helpers.resumable import CASES, Classifier, Noisy
from helpers.scripts import run_command
from helpers.tiny import tiny_trainer

OWN = random.Random(5)


def model() -> Classifier:
    return Classifier(CASES["sgd_momentum_by_step"].optimizers)


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    return DataLoader(Noisy(), 4, shuffle=True), DataLoader(Noisy(8), 4)


def test_an_exact_run_is_found_exact_and_nothing_is_left_changed(tmp_path: Path) -> None:
    module, trainer = model(), tiny_trainer(max_epochs=3, default_root_dir=str(tmp_path / "runs"))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    stream = torch.get_rng_state()
    result = trainer.verify_resume(module, *loaders(), steps=5)
    assert result.exact and result.compared > 40, result
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), stream) and not (tmp_path / "runs").exists()
    assert "exact" in str(result)


class Forgets(Classifier):
    """Its learning depends on a counter that no state_dict holds."""

    calls = 0

    def loss(self, batch: Any) -> Any:
        if self.training:
            self.calls += 1
        return super().loss(batch) * (1 + self.calls)


class OwnStream(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * OWN.random()


class OwnOrder(Noisy):
    def __getitem__(self, index: int) -> Any:
        return self.inputs[index] * OWN.random(), self.targets[index], index


@pytest.mark.parametrize(
    ("kind", "data", "first"),
    [
        (Forgets, Noisy, "the logged point of step 4"),
        (OwnStream, Noisy, "the logged point of step 5"),
        (Classifier, OwnOrder, "batch 0 after the save"),
    ],
)
def test_what_no_checkpoint_holds_is_found_and_named(kind: Any, data: Any, first: str) -> None:
    module = kind(CASES["sgd_momentum_by_step"].optimizers)
    result = tiny_trainer(max_epochs=3).verify_resume(module, DataLoader(data(), 4))
    assert not result.exact and result.different[0] == first
    assert "state_dict.net.0.weight" in result.different
    assert f"the first to differ is {first}" in str(result)


def test_a_run_that_is_too_short_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="trains 100 steps, but the run ended after 9"):
        tiny_trainer(max_epochs=1).verify_resume(model(), *loaders(), steps=50)


def verified_on_ranks() -> str:
    trainer = tiny_trainer(max_epochs=3, strategy="ddp", devices=2)
    return str(trainer.verify_resume(model(), *loaders(), steps=4))


def test_it_works_on_several_ranks() -> None:
    assert all("is exact" in told for told in run_ranks(verified_on_ranks, 2))


SCRIPT = """
import random, sys
import paceline as pl
from helpers.resumable import CASES, Classifier, Noisy
from torch.utils.data import DataLoader
own = random.Random(1)
class Own(Classifier):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (own.random() if "own" in sys.argv else 1)
if "nothing" not in sys.argv:
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", devices=1, logger=False)
    trainer.fit(Own(CASES["sgd_momentum_by_step"].optimizers), DataLoader(Noisy(), 4))
    print("never reached")
"""


@pytest.mark.parametrize(
    ("argument", "code", "told"), [("", 0, "is exact"), ("own", 1, "is not exact"), ("nothing", 2, "without a call")]
)
def test_the_command_verifies_a_script(tmp_path: Path, argument: str, code: int, told: str) -> None:
    import sys

    (tmp_path / "train.py").write_text(SCRIPT)
    command = [
        sys.executable,
        "-m",
        "paceline.trainer.cli",
        "verify-resume",
        "--steps",
        2,
        tmp_path / "train.py",
        argument,
    ]
    done = run_command(*command, env={"PYTHONPATH": ":".join(filter(None, sys.path))})
    assert done.returncode == code and told in done.stdout + done.stderr, done.stderr
    assert "never reached" not in done.stdout
