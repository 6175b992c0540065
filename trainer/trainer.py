"""`Trainer`: the edge where arguments, strategies, callbacks and loops meet. The training loop itself is `loop.py`.

Read `__init__` (what may be asked for), `fit` and its three siblings, and go on in `loop.py` and `evaluate.py`; what
happens around them is `stages.py`. What user code reads of a trainer is in `properties.py`.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import callbacks as builtin
from ..callbacks.silent_logger import SilentLogger
from ..errors import ConfigurationError, Suspended
from ..strategies import ddp as _ddp  # noqa: F401  registers its names
from ..strategies import fsdp as _fsdp  # noqa: F401
from ..strategies import hsdp as _hsdp  # noqa: F401
from ..strategies import single as _single  # noqa: F401
from ..strategies.auto import Choice, by_size, choose
from ..strategies.base import Strategy
from ..strategies.blocks import find_blocks
from ..strategies.cluster import find_cluster, rendezvous_environment
from ..strategies.estimate import measure, table
from ..strategies.precision import parse_precision
from . import estimating, launch, stages, verify
from .arguments import Arguments, named_only
from .callback import Callback
from .checkpoint.run_folder import FolderLock, claim_version_folder
from .checkpoint.run_state import BeforeValidation, save_checkpoint
from .checkpoint.saver import FollowUp, Saver
from .checkpoint.weights import WeightsRequest, load_weights, stored_names
from .compiling import compile_module
from .data import PlannedData
from .datamodule import DataModule
from .evaluate import Evaluation, evaluate, gathered
from .hooks import Hooks, check_names
from .loop import Fit
from .loop import fit as run_fit
from .meeting import meet_ranks
from .metrics import Metrics
from .module import Module, require
from .optim import SchedulerConfig
from .properties import TrainerProperties
from .rank_zero import rank_zero_warn
from .signals import SignalWatch, end_with_launcher
from .state import Progress, RunningStage, TrainerFn, TrainerState
from .stepping import Stepper
from .streamed_data import StreamedData
from .verdict import RESUMABLE
from .windows import DataSettings


class Trainer(TrainerProperties):
    """Drives fit, validate, test and predict. All arguments are keyword-only; the contract's table explains them.

    An unknown or contradictory argument is a ConfigurationError that names the nearest right one.
    """

    given: dict[str, Any]

    @named_only
    def __init__(
        self,
        *,
        strategy: str | Strategy = "auto",
        accelerator: str = "auto",
        devices: int | str | Sequence[int] = "auto",
        num_nodes: int = 1,
        precision: str | int | None = "32-true",
        max_epochs: int | None = None,
        max_steps: int = -1,
        max_time: str | timedelta | dict[str, int] | None = None,
        min_epochs: int | None = None,
        min_steps: int | None = None,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        overfit_batches: int | float = 0,
        fast_dev_run: bool | int = False,
        num_sanity_val_steps: int | None = 2,
        val_check_interval: int | float | str | timedelta | dict[str, int] | None = 1.0,
        check_val_every_n_epoch: int | None = 1,
        accumulate_grad_batches: int | None = 1,
        global_batch_size: int | None = None,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = "norm",
        callbacks: Callback | Sequence[Callback] | None = None,
        logger: Any = True,
        log_every_n_steps: int | None = 50,
        enable_progress_bar: bool | None = True,
        enable_checkpointing: bool | None = True,
        enable_model_summary: bool | None = True,
        default_root_dir: str | os.PathLike[str] | None = "runs",
        deterministic: bool | str | None = False,
        benchmark: bool | None = None,
        detect_anomaly: bool = False,
        inference_mode: bool = True,
        use_distributed_sampler: bool = True,
        reload_dataloaders_every_n_epochs: int = 0,
        sync_batchnorm: bool = False,
        profiler: Any = None,
        barebones: bool = False,
        compile: bool | str | dict[str, Any] = False,  # noqa: A002 (torch's word)
    ) -> None:
        self.arguments = Arguments.checked(locals(), self.given)
        self.precision_policy = parse_precision(precision)
        self._cluster = find_cluster()
        if estimating.asked() is not None:  # for machines that are not here
            accelerator, devices, num_nodes = "cpu", 1, 1
            strategy = strategy if isinstance(strategy, Strategy) else "auto"
        self._use(choose(strategy, accelerator, devices, num_nodes, self._cluster, launch.is_possible()))
        self._connected = False

        self.state = TrainerState()
        self.progress = Progress()
        self.should_stop = False
        self.chosen_seed: tuple[int, bool] | None = None
        self.ckpt_path: str | None = None
        self.module: Module | None = None
        self.datamodule: DataModule | None = None
        self.optimizers: list[Optimizer] = []
        self.lr_scheduler_configs: list[SchedulerConfig] = []
        self.train_data: PlannedData | StreamedData | None = None
        self.train_dataloader: Any = None
        self.val_dataloaders: Any = None
        self.test_dataloaders: Any = None
        self.predict_dataloaders: Any = None
        self.data_settings: DataSettings | None = None
        self.given_train_loaders: Any = None
        self.hooks: Hooks
        self.fit_run: Fit | None = None
        self.validation: Evaluation | None = None
        self.before_validation: BeforeValidation | None = None
        self.switches_at_start: dict[str, bool] = {}
        self.evaluation: Evaluation | None = None
        self.batch_counts: dict[str, list[int | float]] = {}
        self.reloads_train = self.reloads_val = True
        self._wanted_weights: list[WeightsRequest] = []
        self.run_folder: str | None = None
        self.run_id = secrets.token_hex(8)  # in every checkpoint, on rank 0: whose it is
        self._folder_lock: FolderLock | None = None
        self.set_callbacks(_with_defaults(callbacks, logger, profiler, self.arguments))

    # --- the four calls ----------------------------------------------------------------------------------------
    def fit(
        self,
        model: Module,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: DataModule | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
    ) -> None:
        """Train `model`; validation runs inside. `ckpt_path` resumes: a path, a URL, "last", "best" or "auto"."""
        module = require(model)
        train, datamodule = _loaders(train_dataloaders, datamodule)
        self.arguments.check_fit(module)
        if steps := os.environ.pop(verify.VARIABLE, ""):
            data = {"train_dataloaders": train, "val_dataloaders": val_dataloaders, "datamodule": datamodule}
            verify.verify_instead(self, module, data, steps)
        self.given_train_loaders = train
        self.reloads_train, self.reloads_val = train is None, val_dataloaders is None
        self.fit_run = self.train_data = self.data_settings = self.before_validation = None
        with (
            SignalWatch() as self.signals,
            stages.running(self, TrainerFn.FITTING, module, datamodule, _path(ckpt_path)),
        ):
            fit = stages.prepare_fit(self, module, val_dataloaders)
            with torch.autograd.set_detect_anomaly(self.arguments.detect_anomaly):
                run_fit(fit)
            self.strategy.sync_buffers()
            self.settle_saves()
            for hook in self.hooks.on_fit_end:
                hook()
            self.settle_saves()

    def validate(
        self,
        model: Module | None = None,
        dataloaders: Any = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        verbose: bool = True,
        datamodule: DataModule | None = None,
    ) -> list[dict[str, float]]:
        """One pass over the validation data; a dict of reduced metrics for each loader."""
        return self._evaluate(TrainerFn.VALIDATING, model, dataloaders, ckpt_path, verbose, datamodule)

    def test(
        self,
        model: Module | None = None,
        dataloaders: Any = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        verbose: bool = True,
        datamodule: DataModule | None = None,
    ) -> list[dict[str, float]]:
        """One pass over the test data; a dict of reduced metrics for each loader."""
        return self._evaluate(TrainerFn.TESTING, model, dataloaders, ckpt_path, verbose, datamodule)

    def predict(
        self,
        model: Module | None = None,
        dataloaders: Any = None,
        datamodule: DataModule | None = None,
        return_predictions: bool | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
    ) -> Any:
        """What `predict_step` returns for every batch, in order, on every rank; a list of lists for several loaders."""
        keep = return_predictions is not False
        with self._evaluating(TrainerFn.PREDICTING, model, dataloaders, ckpt_path, datamodule) as run:
            run.keep_outputs = keep
            evaluate(run)
            outputs = gathered(run) if keep else []
        if not keep:
            return None
        return outputs[0] if len(outputs) == 1 else outputs

    @contextmanager
    def _evaluating(
        self,
        fn: TrainerFn,
        model: Module | None,
        dataloaders: Any,
        ckpt_path: str | os.PathLike[str] | None,
        datamodule: DataModule | None,
    ) -> Iterator[Evaluation]:
        """The frame of validate, test and predict."""
        loaders, datamodule = _loaders(dataloaders, datamodule)
        module, path = self._module_and_path(fn, model, ckpt_path)
        if model is None and loaders is None and datamodule is None:
            datamodule = self.datamodule
        with stages.running(self, fn, module, datamodule, path):
            self.evaluation = stages.prepare_call(self, module, str(fn), loaders)
            yield self.evaluation

    def _evaluate(
        self,
        fn: TrainerFn,
        model: Module | None,
        dataloaders: Any,
        ckpt_path: str | os.PathLike[str] | None,
        verbose: bool,
        datamodule: DataModule | None,
    ) -> list[dict[str, float]]:
        with self._evaluating(fn, model, dataloaders, ckpt_path, datamodule) as run:
            results = evaluate(run)
        if verbose and self.is_global_zero:
            _print_results(str(fn), results)
        return results

    def _module_and_path(
        self, fn: TrainerFn, model: Module | None, ckpt_path: str | os.PathLike[str] | None
    ) -> tuple[Module, str | None]:
        """Without a model: that of the call before, with its best weights where there are some."""
        if model is not None:
            return require(model), _path(ckpt_path)
        if self.module is None:
            raise ConfigurationError(f"{fn}() was called without a model, and no call before it had one. Pass a model.")
        if ckpt_path is None and any(getattr(cb, "best_model_path", "") for cb in self.checkpoint_callbacks):
            rank_zero_warn(
                f"{fn}() without a model uses the best checkpoint of the fit before it. Pass the model for its present "
                "weights, or ckpt_path='last'."
            )
            return self.module, "best"
        return self.module, _path(ckpt_path)

    # --- what the loops and callbacks ask of the trainer ---------------------------------------------------------
    def _use(self, choice: Choice) -> None:
        """Take the strategy of `choice`, and what works through it."""
        self._choice, self.strategy = choice, choice.strategy
        self.strategy.take_place(choice.device_of(self._local_rank), self._cluster)
        self.strategy.sync_batchnorm |= self.arguments.sync_batchnorm
        self.saver = Saver(self.strategy)
        self.metrics = Metrics(self.strategy, self._deliver)
        self.metrics.muted = self.arguments.barebones

    @property
    def _local_rank(self) -> int:
        return 0 if self._cluster is None else self._cluster.local_rank

    def connect(self, module: Module | None = None) -> None:
        """Become a rank: join those that a launcher started, or start them and end this process with their code.

        `strategy="auto"` becomes the one that suits the size of `module`.
        """
        if self._connected:
            return
        if module is not None and (asked := estimating.asked()) is not None:
            memory = None if asked.memory_gb is None else int(asked.memory_gb * 1e9)
            sizes = measure(estimating.built(module, self))
            print(table(sizes, self.precision_policy, asked.devices, asked.num_nodes, memory), flush=True)
            raise estimating.Estimated
        if self._cluster is None and self._choice.ranks_here * self._choice.num_nodes > 1:
            launch.start_ranks(self._choice.ranks_here, self._choice.num_nodes)
        if module is not None and self._choice.automatic:
            self._choose_by_size(module)
        cluster = self._cluster
        if cluster is not None:
            end_with_launcher()
            alike = {"strategy": self.strategy.name, "precision": self.precision_policy.name}
            store = meet_ranks(cluster, os.environ | rendezvous_environment(cluster), **alike)
            cluster = replace(cluster, store=store)
        self.strategy.connect(cluster)
        for channel in ("control", "metrics", "data", "checkpoint"):  # made together: making one is a collective
            self.strategy.channel(channel)
        self._connected = True

    def _choose_by_size(self, module: Module) -> None:
        try:
            sizes = measure(estimating.built(module, self))
        except ConfigurationError as unknown:
            self._choice = replace(self._choice, reason=f"auto: {str(unknown).rstrip('.')}")
            return
        chosen = by_size(self._choice, sizes, self.precision_policy, self._local_rank)
        if chosen.strategy is not self.strategy:
            self._use(chosen)
        self._choice = chosen

    def load_train_data(self) -> PlannedData | StreamedData:
        """The training data of `fit`, made when first asked for."""
        if self.train_data is None:
            if self.module is None or self.data_settings is None:
                raise RuntimeError("The training data is known inside fit(), from setup on.")
            self.train_data = stages.training_data_of(self, self.module, self.data_settings)
        return self.train_data

    def claim_run_folder(self) -> None:
        """The first call that will write takes the next free `version_N`; all ranks know it, and `fit` holds it."""

        def claim() -> str:
            folder = self.run_folder or claim_version_folder(self.default_root_dir)
            self._folder_lock = FolderLock(folder) if self.state.fn is TrainerFn.FITTING else None
            return folder

        self.run_folder = self.strategy.from_rank_zero(claim)

    def release_run_folder(self) -> None:
        """The call has ended: another process may go on in its folder."""
        if self._folder_lock is not None:
            self._folder_lock.release()
            self._folder_lock = None

    def set_callbacks(self, callbacks: list[Callback]) -> None:
        """Checkpoint callbacks go last, so that they save what the others changed."""
        for callback in callbacks:
            check_names(callback, Callback)
        saving: list[Callback] = [cb for cb in callbacks if isinstance(cb, builtin.ModelCheckpoint)]
        self.callbacks = [cb for cb in callbacks if cb not in saving] + saving
        _refuse_equal_keys(self.callbacks)

    def callbacks_without_output(self) -> list[Callback]:
        """The callbacks that can change what is trained: without loggers, bars, summaries and checkpoints."""
        output = builtin.Logger, builtin.ProgressBar, builtin.ModelCheckpoint, builtin.ModelSummary
        return [callback for callback in self.callbacks if not isinstance(callback, output)]

    def validate_inside_fit(self) -> None:
        """A validation run of `fit`."""
        assert self.validation is not None
        before, self.state.stage = self.state.stage, RunningStage.VALIDATING
        self.validation.module.on_validation_model_zero_grad()
        self.strategy.sync_buffers()
        self.before_validation = BeforeValidation.now(self.validation.module)
        evaluate(self.validation)
        self.before_validation = None
        self.state.stage = before

    def reduced_metrics(self) -> dict[str, Tensor]:
        """`callback_metrics` with everything logged so far reduced over the ranks; every rank must call it."""
        progress = self.progress
        if self.state.fn is TrainerFn.FITTING:
            self.metrics.boundary(progress.global_step, progress.epoch, progress.samples, due=False)
        self.metrics.deliver(wait=True)
        return self.callback_metrics

    def save_checkpoint(
        self,
        filepath: str | os.PathLike[str],
        weights_only: bool = False,
        storage_options: Any = None,
        *,
        wait: bool = True,
        follow_up: FollowUp | None = None,
    ) -> str:
        """Save the run's state on every rank's call; returns the path it got (a taken name gets `-v1`).

        It is durable then; with `wait=False` it is copied to host memory and written while training goes on, and an
        error is raised at a later boundary. `follow_up` says what is to be done once it is durable.
        Inside a window of micro-batches it is saved at the window's end, where a resumed run can go on.
        """
        if self.module is None:
            raise ConfigurationError("save_checkpoint() needs a module: call it in or after fit, validate or test.")
        if self.fit_run is not None and self.fit_run.inside_window:
            self.fit_run.asked_saves.append((os.fspath(filepath), weights_only))
            return os.fspath(filepath)
        return save_checkpoint(self, filepath, weights_only, wait, follow_up or FollowUp())

    def suspend(self) -> NoReturn:
        """Save, and end the process with the code that asks to be started again; on every rank, at a window's end."""
        callbacks = [callback for callback in self.callbacks if isinstance(callback, builtin.ModelCheckpoint)]
        if not self.fast_dev_run:
            if self.run_folder is None:
                self.claim_run_folder()
            # `ckpt_path="auto"` looks into the folders that were given, where there are some.
            given = [callback for callback in callbacks if callback._given_dirpath is not None]
            path = [*given, *callbacks, builtin.ModelCheckpoint()][0].save_to_go_on(self)
            self.print(
                f"paceline: a signal asked to end this run. It is saved at step {self.global_step}: {path}. The same "
                f"command with ckpt_path='auto' goes on; exit code {RESUMABLE}."
            )
        raise Suspended(RESUMABLE)

    def settle_saves(self) -> None:
        """Wait, on every rank, until what is being saved is durable; raises CheckpointError for a save that failed."""
        self.saver.settle()

    def verify_resume(
        self,
        model: Module,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: DataModule | None = None,
        steps: int = 3,
    ) -> verify.Verified:
        """Prove on this model and data that resuming is exact: see `verify.py`. The result prints as one sentence."""
        train, datamodule = _loaders(train_dataloaders, datamodule)
        return verify.verify_resume(self, require(model), train, val_dataloaders, datamodule, steps)

    def load_weights(self, path: str | os.PathLike[str], *, prefix: str = "", strict: bool = True) -> None:
        """Weights from a file, an index or a checkpoint straight into the module; every rank must call it.

        `path` is a path or URL of a `.safetensors` file, of Hugging Face's index of several, of a folder with either,
        or of a checkpoint of ours. `prefix` names the part of the module that the names in the file belong to, as
        "encoder.". Before the module is in its place, as in `setup` or before `fit`, this is done once it is. Without
        `strict` names that only one side has are a warning. Raises CheckpointError.
        """
        self._wanted_weights.append(WeightsRequest(os.fspath(path), prefix, strict))
        if self.strategy.module is not None and self.strategy.module is self.module:
            self.load_wanted_weights()

    def names_of_wanted_weights(self) -> set[str]:
        """What `load_weights` will fill, by name."""
        return {name for request in self._wanted_weights for name in stored_names(request)}

    def load_wanted_weights(self) -> None:
        """Do what `load_weights` was asked for before the module was in its place."""
        while self._wanted_weights:
            named = {name: tensor for name, tensor in self.strategy.named_state() if isinstance(tensor, Tensor)}
            load_weights(self._wanted_weights.pop(0), named, self.strategy)

    def compile_as_asked(self) -> None:
        """Compile the module's forwards in place, before the strategy wraps them; `compile=` says which."""
        compile_module(self.lightning_module, self.arguments.compile, find_blocks)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on rank 0, above the progress bar."""
        if not self.is_global_zero:
            return
        bar = self.progress_bar_callback
        if bar is not None and not kwargs:
            bar.print(*args)
        else:
            print(*args, **kwargs)

    def say_what_was_chosen(self) -> None:
        """One line on rank 0: devices, strategy, precision, how a global batch comes about, the seed."""
        if not self.is_global_zero or self.fit_run is None or self.arguments.barebones:
            return
        strategy, data = self.strategy, self.fit_run.data
        micro, accumulate = data.batch_size, self.accumulate_grad_batches
        ranks = strategy.data_ranks
        if self.arguments.global_batch_size is not None:
            whole = self.arguments.global_batch_size
            batch = f"global batch {whole} over {ranks} rank(s) in micro-batches of at most {micro}"
        elif micro is None:
            batch = f"global batch = your batches x {accumulate} x {ranks}"
        else:
            batch = f"global batch {micro * accumulate * ranks} = {micro} x {accumulate} x {ranks}"
        seed, drawn = self.chosen_seed or (0, False)
        print(
            f"paceline: {strategy.name} ({self._choice.reason}), {strategy.world_size} x {strategy.device.type}, "
            f"precision {self.precision_policy.name}, {batch}, seed {seed}{' (drawn)' if drawn else ''}",
            flush=True,
        )

    def whereabouts(self) -> str:
        """Where the run is, for messages."""
        if (
            self.state.fn is TrainerFn.FITTING
            and self.fit_run is not None
            and self.state.stage is RunningStage.TRAINING
        ):
            return f"epoch {self.progress.epoch}, batch {self.fit_run.batch_idx}"
        run = self.validation if self.state.fn is TrainerFn.FITTING else self.evaluation
        stage = str(self.state.stage)
        return stage if run is None else f"{stage}, batch {run.batch_idx}"

    def _deliver(self, metrics: dict[str, float], step: int) -> None:
        if not self.sanity_checking:
            for hook in self.hooks.on_log:
                hook(metrics, step)

    @property
    def stepper(self) -> Stepper:
        """What steps the optimizers; ConfigurationError where there are none."""
        if self.fit_run is None:
            raise ConfigurationError("There are no optimizers: they exist while fit() runs and after it.")
        return self.fit_run.stepper


def _path(ckpt_path: str | os.PathLike[str] | None) -> str | None:
    return None if ckpt_path is None else os.fspath(ckpt_path)


def _loaders(loaders: Any, datamodule: DataModule | None) -> tuple[Any, DataModule | None]:
    """A data module may stand in the place of the loaders."""
    if isinstance(loaders, DataModule):
        if datamodule is not None:
            raise ConfigurationError("Two data modules were given. Pass one, as datamodule=.")
        return None, loaders
    if loaders is not None and datamodule is not None:
        raise ConfigurationError("Both loaders and a data module were given. Pass one of them.")
    return loaders, datamodule


def _with_defaults(
    callbacks: Callback | Sequence[Callback] | None, logger: Any, profiler: Any, arguments: Any
) -> list[Callback]:
    """The user's callbacks, the loggers, and the built-in ones that are on by default."""
    given = [] if callbacks is None else list(callbacks) if isinstance(callbacks, Iterable) else [callbacks]
    for callback in given:
        if not isinstance(callback, Callback):
            raise ConfigurationError(
                f"callbacks holds {callback!r:.80} ({type(callback).__name__}), expected objects of subclasses of "
                "paceline.Callback."
            )
    loggers = _loggers(logger, arguments, given)
    bars = [cb for cb in given if isinstance(cb, builtin.ProgressBar)]
    has_checkpoint = any(isinstance(cb, builtin.ModelCheckpoint) for cb in given)
    if has_checkpoint and not arguments.enable_checkpointing and not arguments.fast_dev_run:
        raise ConfigurationError("enable_checkpointing=False, but callbacks holds a ModelCheckpoint. Leave one out.")
    if bars and not arguments.enable_progress_bar:
        raise ConfigurationError("enable_progress_bar=False, but callbacks holds a progress bar. Leave one out.")
    if len(bars) > 1:
        raise ConfigurationError(
            f"callbacks holds {len(bars)} progress bars, which would write over each other. Keep one."
        )
    defaults: list[Callback] = []
    profiling = builtin.Profiler.from_argument(profiler)
    if profiling is not None and profiling not in given:
        defaults.append(profiling)
    if arguments.enable_progress_bar and not bars:
        defaults.append(builtin.TQDMProgressBar())
    if arguments.enable_model_summary and not any(isinstance(cb, builtin.ModelSummary) for cb in given):
        defaults.append(builtin.ModelSummary())
    if arguments.enable_checkpointing and not has_checkpoint:
        defaults.append(builtin.ModelCheckpoint())
    return [*given, *loggers, *defaults]


def _loggers(logger: Any, arguments: Any, given: list[Callback]) -> list[Callback]:
    if logger is False or arguments.barebones:
        return []
    if arguments.fast_dev_run:
        return [SilentLogger()]
    if logger is None or logger is True:
        return [] if any(isinstance(cb, builtin.Logger) for cb in given) else [builtin.JSONLLogger()]
    loggers = list(logger) if isinstance(logger, (list, tuple)) else [logger]
    for one in loggers:
        if not isinstance(one, builtin.Logger):
            raise ConfigurationError(
                f"logger={one!r:.80} is a {type(one).__name__}, expected True, False, or loggers of paceline.loggers."
            )
    return loggers


def _refuse_equal_keys(callbacks: list[Callback]) -> None:
    keys = [callback.state_key for callback in callbacks if type(callback).state_dict is not Callback.state_dict]
    for key in {key for key in keys if keys.count(key) > 1}:
        raise ConfigurationError(
            f"Two callbacks have the state_key {key!r}, so a checkpoint could hold the state of only one. Override "
            "state_key so that they differ."
        )


def _print_results(fn: str, results: list[dict[str, float]]) -> None:
    for index, metrics in enumerate(results):
        where = f" (loader {index})" if len(results) > 1 else ""
        told = ", ".join(f"{name} {value:.6g}" for name, value in metrics.items())
        print(f"{fn}{where}: {told or 'nothing was logged'}", flush=True)
