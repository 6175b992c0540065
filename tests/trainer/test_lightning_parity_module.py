"""What Lightning's users expect of a Module, a DataModule and a Callback; each was compared with Lightning 2.6."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import paceline as pl
from paceline.callbacks import ModelCheckpoint
from paceline.errors import ConfigurationError

from helpers.tiny import Sums, numbers, tiny_trainer


class Layered(pl.Module):
    """One layer, one optimizer."""

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(1, width)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return 100 * self.layer(batch.float().reshape(-1, 1)).pow(2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


# --- clipping --------------------------------------------------------------------------------------------------------
class Clips(Layered):
    """Clips with what `options` say, and notes the norm afterwards."""

    options: ClassVar[dict[str, Any]] = {}

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
        self.clip_gradients(optimizer, **self.options)
        self.norm = float(nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None]))


def test_clipping_by_hand_without_a_value_takes_the_trainers() -> None:
    module = Clips()
    tiny_trainer(gradient_clip_val=0.25).fit(module, numbers(4))
    assert module.norm == pytest.approx(0.25, rel=1e-3)


def test_clipping_by_hand_with_no_value_anywhere_does_nothing() -> None:
    module = Clips()
    tiny_trainer().fit(module, numbers(4))
    assert module.norm > 1


@pytest.mark.parametrize("options", [{"gradient_clip_val": 0.5}, {"gradient_clip_algorithm": "value"}])
def test_clipping_by_hand_that_contradicts_the_trainer_is_refused(options: dict[str, Any]) -> None:
    module = Clips()
    module.options = options
    with pytest.raises(ConfigurationError, match="contradicts Trainer"):
        tiny_trainer(gradient_clip_val=0.25, gradient_clip_algorithm="norm").fit(module, numbers(4))


# --- what fit needs --------------------------------------------------------------------------------------------------
def test_fit_asks_for_configure_optimizers_where_there_is_none() -> None:
    class Without(pl.Module):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            return None

    with pytest.raises(ConfigurationError, match="configure_optimizers"):
        tiny_trainer().fit(Without(), numbers(4))


def test_a_step_that_wants_the_iterator_is_told_that_it_gets_batches() -> None:
    class Iterates(Layered):
        def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
            return next(dataloader_iter)

    with pytest.raises(ConfigurationError, match="one batch at a time"):
        tiny_trainer().fit(Iterates(), numbers(4))


def test_lbfgs_is_refused_with_a_loss_scaler() -> None:
    class Closes(Layered):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(ConfigurationError, match="LBFGS cannot be used with precision='16-mixed'"):
        tiny_trainer(precision="16-mixed").fit(Closes(), numbers(4))


# --- small helpers ---------------------------------------------------------------------------------------------------
def test_the_options_of_log_dict_may_be_given_in_order_by_modules_and_callbacks() -> None:
    class Logs(Layered):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log_dict({"a": 1.0}, True, True, False, True)
            return super().training_step(batch, batch_idx)

    class Too(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            self.log("b", 2.0, True)

    trainer = tiny_trainer(callbacks=[Too()])
    trainer.fit(Logs(), numbers(4))
    assert trainer.progress_bar_metrics == {"a": 1.0, "b": 2.0}


class ByHand(Sums):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        super().training_step(batch, batch_idx)  # and no step of the optimizer


def test_manual_optimization_may_be_said_by_the_class() -> None:
    trainer = tiny_trainer()
    trainer.fit(ByHand(), numbers(4))
    assert trainer.global_step == 0


def test_a_toggled_optimizer_is_untoggled_after_the_block() -> None:
    class Toggles(Layered):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.other = nn.Linear(1, 1)

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.layer.parameters(), 0.1), torch.optim.SGD(self.other.parameters(), 0.1)]

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            first, _ = self.optimizers()
            with self.toggled_optimizer(first):
                self.inside = self.layer.weight.requires_grad, self.other.weight.requires_grad
            self.after = self.layer.weight.requires_grad, self.other.weight.requires_grad

    module = Toggles()
    tiny_trainer().fit(module, numbers(4))
    assert module.inside == (True, False)
    assert module.after == (True, True)


def test_callbacks_make_keys_of_what_tells_them_apart() -> None:
    class Counts(pl.Callback):
        def __init__(self, what: str) -> None:
            self.what = what

        @property
        def state_key(self) -> str:
            return self._generate_state_key(what=self.what)

    assert Counts("a").state_key != Counts("b").state_key
    assert Counts("a").state_key.endswith("{'what': 'a'}")


# --- from a checkpoint -----------------------------------------------------------------------------------------------
def saved(module: pl.Module, **options: Any) -> str:
    trainer = tiny_trainer(max_epochs=1)
    trainer.fit(module, **{"train_dataloaders": numbers(4), **options})
    return trainer.save_checkpoint("a.ckpt")


def test_a_module_made_from_a_checkpoint_sees_all_that_was_saved_with_it() -> None:
    class Adds(Layered):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["mine"] = [1, 2]

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.seen = checkpoint["mine"], checkpoint["epoch"], checkpoint["global_step"]
            checkpoint["state_dict"]["layer.bias"] = torch.full((1,), 7.0)

    path = saved(Adds())
    made = Adds.load_from_checkpoint(path, map_location=torch.device("cpu"))
    assert made.seen == ([1, 2], 1, 2)
    assert made.layer.bias.item() == 7


def test_a_module_made_from_a_checkpoint_is_on_the_device_asked_for() -> None:
    made = Layered.load_from_checkpoint(saved(Layered()), map_location="meta")
    assert all(parameter.is_meta for parameter in made.parameters())


def test_a_module_may_say_that_it_loads_parts() -> None:
    class Grown(Layered):
        def configure_model(self) -> None:
            self.more = torch.nn.Linear(1, 1)

    class Partial(Grown):
        strict_loading = property(lambda self: False)

    path = saved(Layered())
    with pytest.raises(RuntimeError, match=r"Missing key.*more\.weight"):
        Grown.load_from_checkpoint(path, weights_only=True)
    assert Partial.load_from_checkpoint(path).more is not None


@pytest.mark.parametrize(
    ("name", "text"), [("hparams.yaml", "samples: 9\nlr: 1.0e-05\n"), ("hparams.json", '{"samples": 9}')]
)
def test_hyper_parameters_may_come_from_a_file(name: str, text: str, tmp_path: Path) -> None:
    class Needs(Layered):
        def __init__(self, samples: int, lr: float = 1e-5) -> None:
            super().__init__()
            self.needs = samples, lr

    path = saved(Needs(3))
    (tmp_path / name).write_text(text)
    assert Needs.load_from_checkpoint(path, hparams_file=tmp_path / name).needs == (9, 1e-5)


def test_loading_on_an_object_is_refused_since_it_would_change_nothing() -> None:
    path = saved(Layered())
    with pytest.raises(TypeError, match=r"module = Layered\.load_from_checkpoint"):
        Layered().load_from_checkpoint(path)


def test_a_data_module_is_made_from_its_hyper_parameters() -> None:
    class Sized(pl.DataModule):
        def __init__(self, samples: int = 4, path: str = "x") -> None:
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self) -> Any:
            return numbers(self.hparams.samples)

    path = saved(Layered(), train_dataloaders=None, datamodule=Sized(6))
    assert dict(Sized.load_from_checkpoint(path).hparams) == {"samples": 6, "path": "x"}
    assert dict(Sized.load_from_checkpoint(path, samples=8).hparams) == {"samples": 8, "path": "x"}


def test_a_metrics_name_with_a_slash_may_stand_in_a_checkpoints_name() -> None:
    class Logs(Sums):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/loss", 0.25)

    saving = ModelCheckpoint("c", filename="{epoch}-loss={val/loss:.2f}", auto_insert_metric_name=False)
    tiny_trainer(callbacks=[saving], enable_checkpointing=True, max_epochs=1).fit(Logs(), numbers(4), numbers(4))
    assert saving.best_model_path.endswith("c/0-loss=0.25.ckpt")
    with pytest.raises(ConfigurationError, match="dirpath"):
        ModelCheckpoint(filename="folder/{epoch}")


# --- two optimizers ------------------------------------------------------------------------------------------------
def test_the_example_of_a_gan_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    script = Path(__file__).resolve().parents[2] / "examples" / "gan.py"
    monkeypatch.setattr("sys.argv", ["gan.py", "--fast-dev-run"])
    runpy.run_path(str(script), run_name="__main__")
    drawn = capsys.readouterr().out.splitlines()[-8:]
    assert {len(row) for row in drawn} == {4 * 16 + 3 * 3}
