"""`WandbLogger`: points, configuration and checkpoints into one Weights & Biases run, whatever the number of ranks.

Points carry `trainer/global_step`, which is made the x axis, so that calls of `wandb.log` in between disturb nothing.
A written point cannot be cut: a run that is resumed in its own folder goes on under its id and passes over the points
that were written before it was killed (`_Written` keeps, in the run's folder, how far that was).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ConfigurationError
from ..trainer.argument_types import checked_types
from ..trainer.rank_zero import rank_zero_only
from .log_file import is_url, join, read_text, write_text
from .log_values import add_prefix, hparams_dict, jsonable, plain_number
from .logger import Logger, rank_zero_experiment

if TYPE_CHECKING:
    import torch
    from wandb import Artifact
    from wandb.sdk.wandb_run import Run

    from ..trainer.module import Module
    from ..trainer.trainer import Trainer
    from .model_checkpoint import ModelCheckpoint

STEP_NAME = "trainer/global_step"


class WandbLogger(Logger):
    """The first use of `experiment` starts the run; further keyword arguments go to `wandb.init`.

    `id` (or `version`) names the run to go on with. `log_model=True` uploads the best and the last checkpoint at the
    end, `"all"` each when it is saved, as artifacts named `checkpoint_name` (default `model-<id>`).
    """

    @checked_types
    def __init__(
        self,
        name: str | None = None,
        save_dir: str | os.PathLike[str] = ".",
        version: str | None = None,
        offline: bool = False,
        dir: str | os.PathLike[str] | None = None,  # noqa: A002 (the name in wandb.init)
        id: str | None = None,  # noqa: A002 (the name in wandb.init)
        anonymous: bool | None = None,
        project: str | None = None,
        log_model: Literal["all"] | bool = False,
        experiment: Run | None = None,
        prefix: str = "",
        checkpoint_name: str | None = None,
        **init_options: Any,
    ) -> None:
        if offline and log_model:
            raise ConfigurationError(
                f"WandbLogger(offline=True, log_model={log_model!r}): an offline run cannot upload checkpoints. "
                "Use one of the two."
            )
        self._experiment = experiment
        self._prefix = prefix
        self._log_model = log_model
        self._checkpoint_name = checkpoint_name
        self._save_dir = os.fspath(save_dir if dir is None else dir)
        self._project = project or os.environ.get("WANDB_PROJECT", "lightning_logs")
        self._id = version or id
        self._init_options = {"name": name, "project": self._project, "resume": "allow", **init_options}
        if offline:
            self._init_options["mode"] = "offline"
        if anonymous:
            self._init_options["anonymous"] = "allow"
        self._checkpoints: ModelCheckpoint | None = None
        self._uploaded: set[str] = set()
        self._written = _Written()
        self._replayed: _Written | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Run:
        """wandb's own run, for `log`, images, tables, `config` and the rest."""
        if self._experiment is None:
            import wandb

            if wandb.run is not None:  # the user's own, or another logger's
                self._experiment = wandb.run
            else:
                os.makedirs(self._save_dir, exist_ok=True)
                self._experiment = wandb.init(id=self._id, dir=self._save_dir, **self._init_options)
            self._experiment.define_metric(STEP_NAME)
            self._experiment.define_metric("*", step_metric=STEP_NAME, step_sync=True)
        return self._experiment

    @property
    def name(self) -> str | None:
        """The project."""
        return self._project

    @property
    def version(self) -> str | None:
        """The run's id; None before it started, if none was given."""
        return self._experiment.id if self._experiment is not None else self._id

    @property
    def save_dir(self) -> str:
        return self._save_dir

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        metrics = add_prefix(metrics, self._prefix)
        if step is None:
            self.experiment.log(metrics)
            return
        if self._replayed is not None:
            metrics = self._replayed.without_written(metrics, step)
            if not metrics:
                return
            self._replayed = None if step > self._replayed.step else self._replayed
        self.experiment.log({name: plain_number(value) for name, value in metrics.items()} | {STEP_NAME: step})
        self._written.add(metrics, step)
        if self._run_dir is not None and not is_url(self._run_dir):  # a store gets it at each save
            self._note_written()

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.experiment.config.update(jsonable(hparams_dict(params)), allow_val_change=True)

    @rank_zero_only
    def watch(
        self,
        model: torch.nn.Module,
        log: Literal["gradients", "parameters", "all"] | None = "gradients",
        log_freq: int = 100,
        log_graph: bool = True,
    ) -> None:
        """Log histograms of gradients or parameters every `log_freq` batches."""
        self.experiment.watch(model, log=log, log_freq=log_freq, log_graph=log_graph)

    @rank_zero_only
    def log_table(
        self,
        key: str,
        columns: list[str | int] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
    ) -> None:
        """A table, of rows under `columns` or of a data frame; texts are logged as one, too."""
        import wandb

        self._log_media({key: wandb.Table(columns=columns, data=data, dataframe=dataframe)}, step)

    log_text = log_table

    @rank_zero_only
    def log_image(self, key: str, images: Sequence[Any], step: int | None = None, **options: Any) -> None:
        """Images (tensors, arrays, PIL images, paths); `options` are lists with an entry an image, as `caption`."""
        self._log_each("Image", key, images, step, options)

    @rank_zero_only
    def log_audio(self, key: str, audios: Sequence[Any], step: int | None = None, **options: Any) -> None:
        """Sounds; `options` are lists with an entry a sound, as `sample_rate`."""
        self._log_each("Audio", key, audios, step, options)

    @rank_zero_only
    def log_video(self, key: str, videos: Sequence[Any], step: int | None = None, **options: Any) -> None:
        """Videos; `options` are lists with an entry a video, as `fps`."""
        self._log_each("Video", key, videos, step, options)

    def _log_each(self, kind: str, key: str, items: Any, step: int | None, options: dict[str, Any]) -> None:
        import wandb

        if not isinstance(items, list):
            raise ConfigurationError(f"{key}: expected a list to log, got {type(items).__name__}. Put it into a list.")
        for name, values in options.items():
            if len(values) != len(items):
                raise ConfigurationError(f"{key}: {len(items)} items, but {len(values)} of {name}. Give one an item.")
        make = getattr(wandb, kind)
        media = [make(item, **{name: values[i] for name, values in options.items()}) for i, item in enumerate(items)]
        self._log_media({key: media}, step)

    def _log_media(self, media: dict[str, Any], step: int | None) -> None:
        self.experiment.log(media if step is None else media | {STEP_NAME: step})

    @rank_zero_only
    def save(self) -> None:
        if self._run_dir is not None and self._experiment is not None:
            self._note_written()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Upload what `log_model=True` asks for. wandb itself ends the run when the process ends."""
        self.save()
        if status == "success" and self._checkpoints is not None:
            self._upload(self._checkpoints)

    # --- checkpoints as artifacts ------------------------------------------------------------------------------
    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        if self._log_model == "all" or (self._log_model and checkpoint_callback.save_top_k == -1):
            self._upload(checkpoint_callback)
        elif self._log_model:
            self._checkpoints = checkpoint_callback

    @rank_zero_only
    def _upload(self, checkpoints: ModelCheckpoint) -> None:
        from wandb import Artifact

        for path, score in checkpoints.saved_paths().items():
            if path in self._uploaded or not os.path.isdir(path):
                continue
            artifact = Artifact(
                name=self._checkpoint_name or f"model-{self.experiment.id}",
                type="model",
                metadata={"score": score, "original_filename": os.path.basename(path), "mode": checkpoints.mode},
            )
            artifact.add_dir(path, name="model.ckpt")
            aliases = ["latest", "best"] if path == checkpoints.best_model_path else ["latest"]
            self.experiment.log_artifact(artifact, aliases=aliases)
            self._uploaded.add(path)

    @staticmethod
    @rank_zero_only
    def download_artifact(
        artifact: str, save_dir: str | None = None, artifact_type: str | None = None, use_artifact: bool | None = True
    ) -> str:
        """Download an artifact such as `"user/project/model-abc:best"`; the folder it is in."""
        import wandb

        if wandb.run is not None and use_artifact:
            found = wandb.run.use_artifact(artifact, type=artifact_type)
        else:
            found = wandb.Api().artifact(artifact, type=artifact_type)
        return str(found.download(root=save_dir))

    def use_artifact(self, artifact: str, artifact_type: str | None = None) -> Artifact:
        """Note that this run uses an artifact, and return it."""
        used: Artifact = self.experiment.use_artifact(artifact, type=artifact_type)
        return used

    # --- resuming ----------------------------------------------------------------------------------------------
    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._replayed = None
        self._find_written(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        self._find_written(trainer)

    def _find_written(self, trainer: Trainer) -> None:
        """Take up the run that was in this folder before, in another process."""
        if self._experiment is not None or not self._writes(trainer):
            return
        before = _Written.read(self._note_path())
        if before is not None and self._id in (None, before.id):
            self._id = before.id
            self._replayed = before if trainer.state.fn == "fit" else None
            self._written = before.copy()

    def _note_written(self) -> None:
        self._written.id = self.experiment.id
        write_text(self._note_path(), json.dumps(asdict(self._written)))

    def _note_path(self) -> str:
        return join(self._run_dir or ".", "wandb.json")


@dataclass
class _Written:
    """How far a run got: its id, the step of its last point, and the names written at that step."""

    id: str | None = None
    step: int = -1
    names: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: str) -> _Written | None:
        text = read_text(path)
        return None if text is None else cls(**json.loads(text))

    def copy(self) -> _Written:
        return _Written(self.id, self.step, list(self.names))

    def add(self, metrics: Mapping[str, Any], step: int) -> None:
        if step != self.step:
            self.step, self.names = step, []
        self.names.extend(metrics)

    def without_written(self, metrics: dict[str, Any], step: int) -> dict[str, Any]:
        """What of a point that is logged again was not written yet."""
        if step < self.step:
            return {}
        return {name: value for name, value in metrics.items() if step > self.step or name not in self.names}
