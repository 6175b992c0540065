"""`LambdaCallback`: hooks given as functions."""

from __future__ import annotations

from typing import Any

import pytest

from paceline.callbacks import Callback, LambdaCallback
from paceline.callbacks.lambda_callback import HOOKS
from paceline.errors import ConfigurationError, UnknownArgumentError

from helpers.tiny import Regression, loader, tiny_trainer


class Net(Regression):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    test_step = validation_step


def test_every_hook_may_be_given_and_is_called() -> None:
    called = []
    hooks = {name: lambda *args, name=name: called.append(name) for name in HOOKS}
    trainer = tiny_trainer(callbacks=[LambdaCallback(**hooks)])
    module = Net()
    trainer.fit(module, loader(4), loader(4))
    path = trainer.save_checkpoint("saved.ckpt")
    trainer.test(module, loader(4), ckpt_path=path, verbose=False)
    trainer.predict(module, [batch for batch, _ in loader(4)])

    def failing(*_: Any) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        tiny_trainer(callbacks=[LambdaCallback(**{**hooks, "on_fit_start": failing})]).fit(module, loader(4))
    assert set(HOOKS) - set(called) == set()
    assert len(HOOKS) == len([n for n in dir(Callback) if n.startswith("on_") or n in ("setup", "teardown")])


def test_functions_get_the_arguments_of_the_hook() -> None:
    seen = []
    callback = LambdaCallback(on_train_batch_end=lambda *args: seen.append(args))
    trainer, module = tiny_trainer(callbacks=callback), Net()
    trainer.fit(module, loader(2))
    (arguments,) = seen
    assert arguments[0] is trainer
    assert arguments[1] is module
    assert set(arguments[2]) == {"loss"}
    assert arguments[4] == 0


def test_an_unknown_hook_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(UnknownArgumentError, match="Did you mean 'on_train_epoch_end'"):
        LambdaCallback(on_train_epoch_ends=print)
    with pytest.raises(TypeError, match="Did you mean 'on_train_batch_start'"):
        LambdaCallback(on_train_bacth_start=print)
    with pytest.raises(UnknownArgumentError, match="state_dict"):
        LambdaCallback(state_dict=dict)


def test_only_functions_are_taken_and_none_is_left_out() -> None:
    LambdaCallback(on_fit_start=None)
    with pytest.raises(ConfigurationError, match="expected a function, got a int"):
        LambdaCallback(on_fit_start=3)  # type: ignore[arg-type]
