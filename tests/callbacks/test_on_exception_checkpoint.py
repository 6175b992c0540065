"""`OnExceptionCheckpoint`: a run that an exception ended goes on from where it was."""

from __future__ import annotations

import os
from typing import Any

import pytest

from paceline.callbacks import OnExceptionCheckpoint
from paceline.errors import ConfigurationError

from helpers.ranks import RanksFailed, run_ranks
from helpers.tiny import Regression, adam, assert_same, loader, tiny_trainer


class Breaking(Regression):
    """Raises in batch `at` of epoch 1, in the step or in one of the hooks."""

    def __init__(self, at: int = -1, where: str = "training_step", exception: type[BaseException] = KeyError) -> None:
        super().__init__(adam)
        self.at, self.where, self.exception = at, where, exception
        self.batch = -1

    def check(self, where: str) -> None:
        if where == self.where and self.current_epoch == 1 and self.batch == self.at:
            raise self.exception("as wanted")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.batch = batch_idx
        self.check("training_step")
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.check("on_before_optimizer_step")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.check("on_train_batch_end")


@pytest.mark.parametrize(
    ("where", "at", "accumulate"),
    [
        ("training_step", 2, 1),
        ("on_before_optimizer_step", 2, 1),
        ("on_train_batch_end", 2, 1),
        ("training_step", 3, 2),
        ("on_before_optimizer_step", 3, 2),
        ("on_train_batch_end", 2, 2),
        ("training_step", 0, 2),
    ],
)
def test_a_run_goes_on_from_the_window_that_raised(where: str, at: int, accumulate: int) -> None:
    def trainer() -> Any:
        return tiny_trainer(
            callbacks=[OnExceptionCheckpoint("saved")], max_epochs=3, accumulate_grad_batches=accumulate
        )

    with pytest.raises(KeyError, match="as wanted"):
        trainer().fit(Breaking(at, where), loader(12, shuffle=True))
    resumed, straight = Breaking(), Breaking()
    trainer().fit(resumed, loader(12, shuffle=True), ckpt_path="saved/on_exception.ckpt")
    trainer().fit(straight, loader(12, shuffle=True))
    assert_same(resumed, straight)


def test_ctrl_c_is_an_exception_too_and_a_taken_name_is_kept() -> None:
    for _ in range(2):
        callback = OnExceptionCheckpoint("saved", filename="last words")
        with pytest.raises(KeyboardInterrupt):
            tiny_trainer(callbacks=[callback], max_epochs=2).fit(Breaking(1, exception=KeyboardInterrupt), loader(8))
    assert callback.ckpt_path == os.path.join("saved", "last words.ckpt")
    assert sorted(os.listdir("saved")) == ["last words-v1.ckpt", "last words.ckpt"]


def test_without_training_nothing_is_saved() -> None:
    class Bad(Breaking):
        def configure_optimizers(self) -> Any:
            raise KeyError

    with pytest.raises(KeyError):
        tiny_trainer(callbacks=[OnExceptionCheckpoint("saved")]).fit(Bad(), loader(8))
    trainer = tiny_trainer(callbacks=[OnExceptionCheckpoint("saved")])
    trainer.fit(Breaking(), loader(4))
    with pytest.raises(TypeError):
        trainer.predict(Breaking(), [None])
    assert not os.path.exists("saved")


@pytest.mark.parametrize("name", ["", "a/b"])
def test_a_name_is_a_plain_name(name: str) -> None:
    with pytest.raises(ConfigurationError, match="plain name"):
        OnExceptionCheckpoint("saved", filename=name)


def breaks_on_a_rank(folder: str) -> None:
    trainer = tiny_trainer(callbacks=[OnExceptionCheckpoint(folder)], strategy="ddp", devices=2, max_epochs=2)
    trainer.fit(Breaking(1 if trainer.global_rank == 0 else -1), loader(8))


def test_several_ranks_save_nothing_and_say_so(tmp_path: Any) -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(breaks_on_a_rank, 2, str(tmp_path / "saved"))
    assert "nothing was saved" in failed.value.outputs[0]
    assert not (tmp_path / "saved").exists()
