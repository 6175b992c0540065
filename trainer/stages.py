"""What happens around the loops: ranks, hooks, data and state are set up, and taken down whatever happens.

Read `running` (the frame of all four calls, in the order of the contract), then `prepare_fit`, which resolves all that
`loop.py` touches, and `prepare_evaluation`. Everything here runs once a call; nothing here runs in a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError, Suspended
from . import prefetch
from .backend_flags import backend_flags
from .callback import Callback
from .checkpoint import choose, run_state
from .control import Control, Wish
from .data import PlannedData, training_data
from .datamodule import DataHooks, DataModule
from .evaluate import Evaluation, call, evaluate
from .evaluation_data import evaluation_data
from .faults import reported
from .fingerprint import check_alike
from .hooks import Hooks, check_names, overridden, without_missing
from .loop import Fit
from .metric_objects import buffers_kept, untouched
from .module import Module
from .optim import parse_optimizers
from .rank_zero import rank_zero_warn
from .rng import derive_stream_of_rank, isolated, seed_generators, seed_of_run
from .schedules import Schedulers, ValidationTimes
from .state import Limits, Progress, RunningStage, TrainerFn, TrainerStatus
from .stepping import Stepper, needs_closure
from .streamed_data import StreamedData
from .switches import put_switches, switches
from .windows import DataSettings

if TYPE_CHECKING:
    from .trainer import Trainer

_TRANSFERS = "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"
_EVALUATION = {"validate": ("validation", "val"), "test": ("test", "test"), "predict": ("predict", "predict")}


@contextmanager
def running(
    trainer: Trainer, fn: TrainerFn, module: Module, datamodule: DataModule | None, ckpt_path: str | None
) -> Iterator[None]:
    """Frame of a call: connect, prepare data, set up; the body; tear down. Exceptions pass the hooks and go on."""
    state = trainer.state
    state.fn, state.status = fn, TrainerStatus.RUNNING
    state.stage = RunningStage.TRAINING if fn is TrainerFn.FITTING else RunningStage(fn.value)
    trainer.should_stop = False
    trainer.connect(module)
    strategy = trainer.strategy
    try:
        with (
            reported(rank=strategy.rank, world_size=strategy.world_size, where=trainer.whereabouts),
            backend_flags(trainer.arguments.deterministic, trainer.arguments.benchmark),
        ):
            _attach(trainer, module, datamodule)
            choose.choose_for(trainer, ckpt_path)
            _prepare_data(trainer, module, datamodule)
            _set_up(trainer, module, datamodule)
            yield
    except Suspended:
        state.status = TrainerStatus.INTERRUPTED
        raise
    except BaseException as exception:
        state.status = TrainerStatus.INTERRUPTED
        _tell_of(exception, trainer, module, datamodule)
        raise
    finally:
        try:
            trainer.saver.finish_alone()
            _tear_down(trainer, module, datamodule)
        finally:
            trainer.saver.close()
            trainer.release_run_folder()
        state.stage = None
    state.status = TrainerStatus.FINISHED


def _attach(trainer: Trainer, module: Module, datamodule: DataModule | None) -> None:
    """Make module, data module and callbacks know the trainer; the module may bring callbacks of its own."""
    trainer.module, trainer.datamodule = module, datamodule
    module.trainer = trainer
    if datamodule is not None:
        datamodule.trainer = trainer
    own = module.configure_callbacks() or []
    own = [own] if isinstance(own, Callback) else list(own)
    kinds = {type(callback) for callback in own}
    if own:
        kept = [cb for cb in trainer.callbacks if type(cb) not in kinds or cb in own]
        trainer.set_callbacks([*kept, *(cb for cb in own if cb not in kept)])
    for callback in trainer.callbacks:
        callback._module = module
    check_names(module, Module)
    if datamodule is not None:
        check_names(datamodule, DataModule)
    trainer.metrics.forget()
    trainer.metrics.module = module
    trainer.hooks = Hooks(trainer, module, trainer.callbacks, trainer.metrics)
    if trainer.chosen_seed is None:
        seed, drawn = trainer.strategy.broadcast_object(seed_of_run())
        trainer.chosen_seed = (seed, drawn)
        if drawn and trainer.world_size > 1:
            seed_generators(seed)
    if trainer.state.fn is TrainerFn.FITTING:
        trainer.data_settings = _data_settings(trainer, module)


def _prepare_data(trainer: Trainer, module: Module, datamodule: DataModule | None) -> None:
    """On local rank 0 of each node (or on rank 0 alone), before the others go on."""
    strategy = trainer.strategy
    for owner, base in ((datamodule, DataModule), (module, Module)):
        if owner is None or not overridden(owner, "prepare_data", base):
            continue
        if strategy.local_rank == 0 if owner.prepare_data_per_node else strategy.rank == 0:
            owner.prepare_data()
        strategy.barrier()


def _set_up(trainer: Trainer, module: Module, datamodule: DataModule | None) -> None:
    stage = str(trainer.state.fn)
    if (trainer.loggers or trainer.checkpoint_callbacks) and not trainer.fast_dev_run:
        trainer.claim_run_folder()
    if datamodule is not None:
        datamodule.setup(stage)
    for callback in trainer.callbacks:
        callback.setup(trainer, module, stage)
    module.setup(stage)
    trainer.precision_policy.check(trainer.strategy.device)
    with trainer.strategy.building():
        module.configure_model()
    trainer.compile_as_asked()
    trainer.strategy.filled_later = trainer.names_of_wanted_weights()
    trainer.strategy.place(module, trainer.precision_policy)
    trainer.load_wanted_weights()


def _tell_of(exception: BaseException, trainer: Trainer, module: Module, datamodule: DataModule | None) -> None:
    if trainer.fit_run is not None:
        trainer.fit_run.inside_window = False  # it will have no end: what is saved now goes on from its beginning
    for callback in trainer.callbacks:
        callback.on_exception(trainer, module, exception)
    if datamodule is not None:
        datamodule.on_exception(exception)


def _tear_down(trainer: Trainer, module: Module, datamodule: DataModule | None) -> None:
    stage = str(trainer.state.fn)
    _let_go_of_loaders(trainer)
    trainer.strategy.unwrap()
    if datamodule is not None:
        datamodule.teardown(stage)
    for callback in trainer.callbacks:
        callback.teardown(trainer, module, stage)
    module.teardown(stage)


def _let_go_of_loaders(trainer: Trainer) -> None:
    """End the workers now: a window or a persistent iterator in a reference cycle would keep them alive."""
    if trainer.fit_run is not None:
        trainer.fit_run.stepper.let_go()
    runs = [run for run in (trainer.validation, trainer.evaluation) if run is not None]
    for data in (trainer.train_data, *(one for run in runs for one in run.data)):
        if data is not None:
            data.close()


# --- fit -------------------------------------------------------------------------------------------------------
def prepare_fit(trainer: Trainer, module: Module, val_loaders: Any) -> Fit:
    """Everything between the set-up hooks and `on_train_start`."""
    strategy, hooks, arguments = trainer.strategy, trainer.hooks, trainer.arguments
    checkpoint = None if trainer.ckpt_path is None else run_state.read(trainer, trainer.ckpt_path)
    if checkpoint is not None:
        run_state.check_resumable(checkpoint, str(trainer.ckpt_path))
        _take_seed(trainer, checkpoint["paceline"]["seed"])
        run_state.restore_weights(trainer, checkpoint)  # what the data module and callbacks know, before the loaders
    trainer.progress = Progress(epoch=_epoch_of_loaders(trainer, checkpoint))
    _make_optimizers(trainer, module)
    data = trainer.load_train_data()
    check_same_data(trainer, data)
    validation = _validation(trainer, module, val_loaders)
    if checkpoint is not None:
        data.adopt(checkpoint["paceline"]["data"])
        run_state.restore_progress(trainer, checkpoint)
    strategy.wrap()

    limits = Limits(
        arguments.max_epochs, arguments.max_steps, arguments.max_seconds, arguments.min_epochs, arguments.min_steps
    )

    fit = Fit(
        strategy=strategy,
        hooks=hooks,
        metrics=trainer.metrics,
        progress=trainer.progress,
        limits=limits,
        control=_control(trainer, limits),
        schedulers=Schedulers(
            trainer.lr_scheduler_configs if module.automatic_optimization else [],
            hooks.noting("lr_scheduler_step", module),
            trainer.reduced_metrics,
        ),
        validation=ValidationTimes(
            validation is not None, arguments.val_check_interval, arguments.check_val_every_n_epoch, strategy
        ),
        take_up=lambda: _take_up(trainer, checkpoint),
        reload_data=lambda: _reload_data(trainer, fit, module),
        prepare_epoch=lambda: _prepare_epoch(trainer, fit, module),
        validate=trainer.validate_inside_fit,
        save_where_due=lambda: _save_where_due(trainer, fit),
        suspend=trainer.suspend,
        saves=bool(hooks.on_train_batch_end_acting),
        log_every_n_steps=arguments.log_every_n_steps,
        automatic=module.automatic_optimization,
    )
    trainer.fit_run = fit
    clipping = arguments.gradient_clip_val, arguments.gradient_clip_algorithm
    fit.stepper = Stepper(fit, module, trainer.optimizers, *clipping)
    fit.data, fit.num_batches = data, data.num_batches
    trainer.say_what_was_chosen()
    trainer.switches_at_start = switches(module)
    call(hooks.on_fit_start)
    if validation is not None and checkpoint is None:  # a resumed run had its check: hooks would count a second one
        _sanity_check(trainer, validation)
    if checkpoint is not None:
        run_state.restore_metrics(trainer, checkpoint)
        run_state.restore_optimizers(trainer, checkpoint)
    limits.start()
    return fit


def _epoch_of_loaders(trainer: Trainer, checkpoint: dict[str, Any] | None) -> int:
    """The epoch in which the loaders that a resumed run goes on with were made: the hooks may look at it."""
    every = trainer.arguments.reload_dataloaders_every_n_epochs
    if checkpoint is None or not every:
        return 0
    epoch = int(checkpoint["loops"]["epoch"])
    return epoch - epoch % every


def _make_optimizers(trainer: Trainer, module: Module) -> None:
    optimizers, configs = parse_optimizers(module.configure_optimizers(), module.automatic_optimization)
    for optimizer in optimizers:
        trainer.strategy.check_optimizer(optimizer)
        if trainer.strategy.scaler is not None and needs_closure(optimizer):
            raise ConfigurationError(
                f"{type(optimizer).__name__} cannot be used with precision='16-mixed': its closure repeats the backward"
                " pass within a step, which a loss scaler does not allow. Use 'bf16-mixed' or '32-true'."
            )
    trainer.optimizers, trainer.lr_scheduler_configs = optimizers, configs


def _control(trainer: Trainer, limits: Limits) -> Control:
    """What this rank wishes for, and what all do once a stop is agreed."""

    def wish() -> Wish:
        if trainer.saver.failed:
            if trainer.world_size == 1:
                trainer.settle_saves()
            return Wish.STOP
        if (trainer.should_stop or limits.time_is_up()) and limits.may_stop_early(trainer.progress):
            return Wish.STOP
        return Wish.SUSPEND if trainer.signals.came else Wish.NONE

    def agree_to_stop() -> None:
        trainer.settle_saves()  # raises on all ranks where a failed save was the reason
        trainer.should_stop = True

    return Control(trainer.strategy, wish, agree_to_stop)


def _take_up(trainer: Trainer, checkpoint: dict[str, Any] | None) -> None:
    """The last of what a checkpoint holds; from here on every rank draws from its own random stream."""
    if checkpoint is not None:
        put_switches(trainer.lightning_module, checkpoint["paceline"].get("switches", {}))
        trainer.strategy.wrap()  # it would clear the gradients later
        run_state.restore_gradients(trainer, checkpoint)
    if checkpoint is None or not run_state.restore_randomness(trainer, checkpoint):
        derive_stream_of_rank(trainer.seed, trainer.progress.global_step, trainer.strategy.rank)


def _save_where_due(trainer: Trainer, fit: Fit) -> None:
    """At a window's end: the saves that were asked for inside it, and the callbacks that save or stop."""
    while fit.asked_saves:
        trainer.save_checkpoint(*fit.asked_saves.pop(0))
    if fit.last_batch is not None:
        for hook in trainer.hooks.on_train_batch_end_acting:
            hook(*fit.last_batch)


def _data_settings(trainer: Trainer, module: Module) -> DataSettings:
    arguments = trainer.arguments
    return DataSettings(
        seed=trainer.seed,
        accumulate=arguments.accumulate_grad_batches,
        asked=arguments.accumulate_grad_batches,
        global_batch_size=arguments.global_batch_size,
        limit=arguments.limit_of("train"),
        loss_weight=module.loss_weight if overridden(module, "loss_weight", Module) else None,
        take_over=arguments.use_distributed_sampler,
        overfit=arguments.overfit_batches,
    )


def _take_seed(trainer: Trainer, seed: int) -> None:
    """The seed of the run that goes on; data that `setup` has asked for already is made again with it."""
    assert trainer.data_settings is not None
    trainer.chosen_seed, trainer.train_data = (seed, False), None
    trainer.data_settings.seed = seed


def training_data_of(trainer: Trainer, module: Module, settings: DataSettings) -> PlannedData | StreamedData:
    """The training data from the loaders that `fit` was given, or from the hooks. It communicates nothing."""
    given = trainer.given_train_loaders
    source = given if given is not None else _from_hooks(trainer, module, "train_dataloader")
    trainer.train_dataloader = source
    data = training_data(source, trainer.strategy, settings)
    if isinstance(data, PlannedData):
        data.next_drawn = trainer.progress.epoch
    data.to_device = _device_stream(trainer, module, data.user_loader)
    if data.num_batches == 0 and settings.limit != 0:  # raises where a limit cannot be kept
        rank_zero_warn(
            f"Nothing is trained: the training loader ({type(source).__name__}) has no batch. With drop_last=True it "
            "needs the samples of a whole global batch."
        )
    return data


def check_same_data(trainer: Trainer, data: PlannedData | StreamedData) -> None:
    """Refuse ranks that see different training data; collective."""
    if trainer.arguments.use_distributed_sampler:
        check_alike("training", [data.user_loader], trainer.strategy)


def _device_stream(trainer: Trainer, module: Module, loader: Any) -> Callable[[Iterator[Any]], Iterator[Any]] | None:
    """How an epoch's batches come to the device: one ahead on a side stream where that reorders no hook."""
    transfer = make_transfer(trainer, module, 0)
    if transfer is None:
        return None
    device = trainer.strategy.device
    looks_ahead = (
        device.type == "cuda" and getattr(loader, "num_workers", 0) > 0 and not _transfer_hooks(trainer, module)
    )
    if looks_ahead:
        return lambda batches: prefetch.ahead(batches, transfer, device)
    return lambda batches: map(transfer, batches)


def _transfer_hooks(trainer: Trainer, module: Module) -> dict[str, Callable[..., Any]]:
    """The transfer hooks that a user overrode."""
    return {name: hook for name in _TRANSFERS if (hook := _data_hook(trainer, module, name)) is not None}


def make_transfer(trainer: Trainer, module: Module, dataloader_idx: int) -> Callable[[Any], Any] | None:
    """What brings a batch to the device; None where there is nothing to do."""
    strategy, own = trainer.strategy, _transfer_hooks(trainer, module)
    if not own and strategy.device.type == "cpu" and strategy.precision.parameters is None:
        return None
    before, by_user, after = map(own.get, _TRANSFERS)

    def transfer(batch: Any) -> Any:
        if before is not None:
            batch = before(batch, dataloader_idx)
        if by_user is not None:
            batch = by_user(batch, strategy.device, dataloader_idx)
        if by_user is None or strategy.precision.parameters is not None:
            batch = strategy.batch_to_device(batch, prefetch.move)
        return batch if after is None else after(batch, dataloader_idx)

    return transfer


def _reload_data(trainer: Trainer, fit: Fit, module: Module) -> None:
    """New loaders, where `reload_dataloaders_every_n_epochs` says so."""
    every = trainer.arguments.reload_dataloaders_every_n_epochs
    if every and fit.progress.batches_in_epoch == 0 and fit.progress.epoch and fit.progress.epoch % every == 0:
        if trainer.reloads_train:
            trainer.train_data = None
            fit.data = trainer.load_train_data()
            check_same_data(trainer, fit.data)
        if trainer.validation is not None and trainer.reloads_val:
            trainer.validation = _validation(trainer, module, None)


def _prepare_epoch(trainer: Trainer, fit: Fit, module: Module) -> None:
    """What hooks may have changed before the epoch: accumulation, and which parameters are trainable."""
    fit.strategy.wrap()
    step = without_missing(module.training_step, 2, "batch_idx")
    fit.training_step = fit.strategy.training_step(step) if fit.automatic else fit.strategy.evaluation_step(step)
    fit.ghost_step = _ghost(fit.training_step, trainer)
    fit.stepper.let_go()  # of the last window of the epoch before, and its workers
    fit.data.set_epoch(fit.progress.epoch)
    fit.num_batches = fit.data.num_batches
    fit.validation.begin_epoch(fit.num_batches, fit.progress)


def _ghost(step: Callable[..., Any], trainer: Trainer) -> Callable[..., Any]:
    """`step`, of which nothing but the loss remains, which is to be multiplied by zero."""

    def ghost_step(*args: Any) -> Any:
        module = trainer.lightning_module
        with untouched(module), buffers_kept(module), trainer.metrics.silent():
            return step(*args)

    return ghost_step


def _sanity_check(trainer: Trainer, validation: Evaluation) -> None:
    """A few validation batches before training; nothing of it is kept, and the random state is put back."""
    batches = trainer.arguments.num_sanity_val_steps
    if batches == 0 or trainer.arguments.fast_dev_run:
        return
    before, trainer.state.stage = trainer.state.stage, RunningStage.SANITY_CHECKING
    with isolated():
        call(trainer.hooks.on_sanity_check_start)
        evaluate(validation, float("inf") if batches == -1 else batches)
        call(trainer.hooks.on_sanity_check_end)
    trainer.metrics.forget()
    trainer.state.stage = before


def _validation(trainer: Trainer, module: Module, loaders: Any) -> Evaluation | None:
    """Validation inside `fit`; None where there is no validation_step or no loader."""
    trainer.validation = None
    trainer.batch_counts["validation"] = []
    has_step = overridden(module, "validation_step", Module)
    has_data = loaders is not None or _data_hook(trainer, module, "val_dataloader") is not None
    if trainer.arguments.limit_of("val") == 0 or not (has_step or has_data):
        return None
    if has_step != has_data:
        missing = "validation data, but no validation_step" if has_data else "a validation_step, but no validation data"
        rank_zero_warn(f"There is {missing}: fit() does not validate. Define both, or neither.")
        return None
    validation = prepare_evaluation(trainer, module, "validate", loaders)
    trainer.validation = validation if any(trainer.num_val_batches) else None
    return trainer.validation


# --- evaluation ------------------------------------------------------------------------------------------------
def prepare_evaluation(trainer: Trainer, module: Module, fn: str, loaders: Any) -> Evaluation:
    """Everything that `evaluate` needs; `fn` is validate, test or predict."""
    stage, short = _EVALUATION[fn]
    if stage != "predict" and not overridden(module, f"{stage}_step", Module):
        raise ConfigurationError(
            f"{type(module).__name__} has no {stage}_step, so {fn}() cannot evaluate it. Define "
            f"{stage}_step(self, batch, batch_idx) that logs what matters."
        )
    strategy, arguments = trainer.strategy, trainer.arguments
    source = loaders if loaders is not None else _from_hooks(trainer, module, f"{short}_dataloader")
    setattr(trainer, f"{short}_dataloaders", source)
    data = evaluation_data(
        source,
        strategy,
        trainer.seed,
        arguments.limit_of(short),
        f"limit_{short}_batches",
        arguments.use_distributed_sampler,
    )
    if arguments.use_distributed_sampler:
        check_alike(stage, [one.user_loader for one in data], strategy)
    trainer.batch_counts[stage] = [one.num_batches for one in data]
    step = without_missing(getattr(module, f"{stage}_step"), 3, "batch_idx", "dataloader_idx")
    inside_fit = trainer.state.fn is TrainerFn.FITTING
    return Evaluation(
        stage=stage,
        module=module,
        strategy=strategy,
        hooks=trainer.hooks,
        metrics=trainer.metrics,
        progress=trainer.progress,
        data=data,
        step=strategy.evaluation_step(step),
        transfers=[make_transfer(trainer, module, index) for index in range(len(data))],
        inference_mode=arguments.inference_mode and not inside_fit and not strategy.sharded,
    )


def prepare_call(trainer: Trainer, module: Module, fn: str, loaders: Any) -> Evaluation:
    """A validate, test or predict of its own: weights from the checkpoint that was asked for, then the data."""
    if trainer.ckpt_path is not None:
        run_state.restore_weights(trainer, run_state.read(trainer, trainer.ckpt_path))
    return prepare_evaluation(trainer, module, fn, loaders)


# --- where loaders come from -----------------------------------------------------------------------------------
def _data_hook(trainer: Trainer, module: Module, name: str) -> Callable[..., Any] | None:
    """That of the data module, or else the module's, where one overrides it."""
    owners = (owner for owner in (trainer.datamodule, module) if overridden(owner, name, DataHooks))
    return next((getattr(owner, name) for owner in owners), None)


def _from_hooks(trainer: Trainer, module: Module, name: str) -> Any:
    """The loaders that the data module or the module makes."""
    if hook := _data_hook(trainer, module, name):
        return hook()
    what = name.removesuffix("_dataloader")
    raise ConfigurationError(
        f"There is no {what} data: pass a loader to {trainer.state.fn}(), or define {name}() in "
        f"{type(module).__name__} or in a data module."
    )
