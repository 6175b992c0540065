"""`Logger`: the surface that all loggers share. A logger is a callback that writes logged points, on rank 0 only.

A logger of your own needs `log_metrics` and nothing more. The module's hyper-parameters are logged once a run, when
they are complete (`on_fit_start`, or the start of an evaluation), the end is told by `finalize`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError
from ..trainer.callback import Callback
from ..trainer.rank_zero import rank_zero_only

if TYPE_CHECKING:
    from ..trainer.module import Module
    from ..trainer.trainer import Trainer
    from .model_checkpoint import ModelCheckpoint


class Logger(Callback, ABC):
    """Override `log_metrics`; decorate it with `rank_zero_only` where users may call it from any rank."""

    _run_dir: str | None = None
    _run_started = False
    _run_failed = False

    # --- what a kind of logger defines -------------------------------------------------------------------------
    @abstractmethod
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write one point: names → numbers, and the updates finished."""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Write hyper-parameters: a dict or a Namespace."""

    def log_graph(self, model: Module, input_array: Any = None) -> None:
        """Write the model's graph, where the kind of logger can and was asked to."""

    def save(self) -> None:
        """Make everything so far durable."""

    def finalize(self, status: str) -> None:
        """The run ended: `status` is "success" or "failed". More may be logged afterwards, by the next call."""
        self.save()

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """A checkpoint was saved; its paths are in the callback."""

    # --- where it writes ---------------------------------------------------------------------------------------
    @property
    def name(self) -> str | None:
        """The name of the experiment, of which this run is one."""
        return type(self).__name__

    @property
    def version(self) -> int | str | None:
        """The number or the name of this run."""
        return None

    @property
    def save_dir(self) -> str | None:
        """The folder of all experiments, or None where nothing is written to a folder."""
        return None

    @property
    def root_dir(self) -> str | None:
        """The folder of the experiment."""
        return self.save_dir

    @property
    def log_dir(self) -> str | None:
        """The folder of this run."""
        return self.root_dir

    @property
    def experiment(self) -> Any:
        """What does the writing, for uses of its own; on other ranks than 0 an object that swallows everything."""
        return None

    # --- the hooks that drive it -------------------------------------------------------------------------------
    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        self._run_dir = trainer.log_dir
        self._run_started = self._run_failed = False

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        self._run_dir = trainer.log_dir  # a run that is resumed goes on in its own folder

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        if self._run_started:
            return
        self._run_started = True
        hparams = hparams_of(pl_module, trainer.datamodule)
        if self._writes(trainer):
            if hparams is not None:
                self.log_hyperparams(hparams)
            self.log_graph(pl_module)
            self.save()

    on_validation_start = on_test_start = on_predict_start = on_fit_start

    def on_log(self, trainer: Trainer, pl_module: Module, metrics: dict[str, float], step: int) -> None:
        if self._writes(trainer):
            self.log_metrics(metrics, step)

    def on_exception(self, trainer: Trainer, pl_module: Module, exception: BaseException) -> None:
        self._run_failed = True

    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        if self._writes(trainer):
            self.finalize("failed" if self._run_failed else "success")

    def _writes(self, trainer: Trainer) -> bool:
        return trainer.is_global_zero and not trainer.fast_dev_run


def require_logger(monitor: Callback, trainer: Trainer) -> None:
    """ConfigurationError where what `monitor` logs would go nowhere."""
    if not trainer.loggers and not trainer.fast_dev_run:
        raise ConfigurationError(
            f"Cannot use {type(monitor).__name__} with a Trainer that has no logger. Leave out logger=False, or the "
            "monitor."
        )


def logs_this_update(trainer: Trainer) -> bool:
    """Whether the update that the coming batch belongs to is one that is logged."""
    step = trainer.global_step + 1
    return step % trainer.log_every_n_steps == 0 or step in (1, trainer.max_steps) or trainer.is_last_batch


def hparams_of(module: Any, datamodule: Any) -> dict[str, Any] | None:
    """The hyper-parameters to log: those saved with `logger=True` by the module and the data module; None: none were.

    Raises ConfigurationError where both saved the same name with different values.
    """
    owners = [owner for owner in (module, datamodule) if getattr(owner, "_log_hyperparams", False)]
    if not owners:
        return None
    hparams: dict[str, Any] = {}
    for owner in owners:
        own = dict(owner.hparams_initial)
        clashes = [name for name in own if name in hparams and _differ(own[name], hparams[name])]
        if clashes:
            raise ConfigurationError(
                f"The module and the data module both saved the hyper-parameters {clashes}, with different values. "
                "Rename them, or call save_hyperparameters(logger=False) in one of the two."
            )
        hparams |= own
    return hparams


def _differ(a: Any, b: Any) -> bool:
    if a is b:
        return False
    different = a != b
    return different if isinstance(different, bool) else True  # tensors and arrays compare by element


class DummyExperiment:
    """Swallows every attribute, call and item: what `Logger.experiment` is on ranks that do not write."""

    def __getattr__(self, name: str) -> DummyExperiment:
        if name.startswith("__"):  # what copy, pickle and inspect probe for
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> DummyExperiment:
        return self

    def __getitem__(self, key: Any) -> DummyExperiment:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __enter__(self) -> DummyExperiment:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


def rank_zero_experiment(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """For the getter of `experiment`: other ranks than 0 get a `DummyExperiment`."""

    @wraps(make)
    def experiment(self: Any) -> Any:
        return make(self) if rank_zero_only.rank == 0 else DummyExperiment()

    return experiment
