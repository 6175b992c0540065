"""`TensorBoardLogger`: event files that TensorBoard shows; needs the extra `paceline[tensorboard]`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError
from ..trainer.argument_types import checked_types
from ..trainer.prefetch import move
from ..trainer.rank_zero import rank_zero_only, rank_zero_warn
from .folder_logger import FolderLogger
from .log_file import join, write_text
from .log_values import add_prefix, as_yaml, flatten, hparams_dict, plain_number
from .logger import rank_zero_experiment

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from ..trainer.module import Module
    from ..trainer.trainer import Trainer


class TensorBoardLogger(FolderLogger):
    """Writes into `<save_dir>/<name>/version_N/<sub_dir>`, or without `save_dir` into the run's folder.

    `experiment` is torch's `SummaryWriter`, which takes the further arguments. On resume a new event file starts that
    makes TensorBoard drop (`purge_step`) what older ones hold from the first update after the save on.
    """

    @checked_types
    def __init__(
        self,
        save_dir: str | os.PathLike[str] | None = None,
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        log_graph: bool = False,
        default_hp_metric: bool = True,
        prefix: str = "",
        sub_dir: str | os.PathLike[str] | None = None,
        **writer_options: Any,
    ) -> None:
        super().__init__(save_dir, name, version, prefix)
        if find_spec("tensorboard") is None:  # told before the run, without importing it yet
            raise ConfigurationError(
                "TensorBoardLogger needs the package tensorboard, which is not installed. "
                "Run: pip install 'paceline[tensorboard]', or use CSVLogger."
            )
        self._log_graph = log_graph
        self._default_hp_metric = default_hp_metric
        self.sub_dir = None if sub_dir is None else os.fspath(sub_dir)
        self._writer_options = writer_options
        self._writer: SummaryWriter | None = None
        self._writer_dir = ""
        self._purge_step: int | None = None
        self.hparams: dict[str, Any] = {}

    @property
    def log_dir(self) -> str:
        run_dir = super().log_dir
        if self.sub_dir is not None:
            run_dir = join(run_dir, self.sub_dir)
        return os.path.expanduser(os.path.expandvars(run_dir))

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        if self._writer is None or self._writer_dir != self.log_dir:
            from torch.utils.tensorboard import SummaryWriter

            self._close()
            self._writer_dir = self.log_dir
            options = {"purge_step": self._purge_step, **self._writer_options}
            self._writer, self._purge_step = SummaryWriter(log_dir=self.log_dir, **options), None
        return self._writer

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """A number becomes a scalar, a dict of numbers `add_scalars`."""
        writer = self.experiment
        for name, value in add_prefix(metrics, self._prefix).items():
            if isinstance(value, dict):
                writer.add_scalars(name, value, step)
            elif isinstance(number := plain_number(value), (int, float)):
                writer.add_scalar(name, number, step)
            else:
                raise ConfigurationError(
                    f"TensorBoardLogger cannot write {name}={value!r} ({type(value).__name__}) as a scalar. Log "
                    "numbers; text, images and the like go through logger.experiment."
                )

    @rank_zero_only
    def log_hyperparams(
        self, params: Any, metrics: Mapping[str, Any] | float | None = None, step: int | None = None, **kwargs: Any
    ) -> None:
        """Hyper-parameters for TensorBoard's table, with the numbers that it compares runs by.

        Without `metrics` the number is `hp_metric`, -1 until you log it, unless `default_hp_metric=False`.
        """
        self.hparams |= hparams_dict(params)
        write_text(join(self.log_dir, "hparams.yaml"), as_yaml(self.hparams))
        if metrics is None:
            metrics = {"hp_metric": -1} if self._default_hp_metric else {}
        elif not isinstance(metrics, Mapping):
            metrics = {"hp_metric": metrics}
        if not metrics:
            return
        self.log_metrics(metrics, 0 if step is None else step)
        self._write_hparams_table(dict(metrics))

    def _write_hparams_table(self, metrics: dict[str, Any]) -> None:
        from torch.utils.tensorboard.summary import hparams

        plain = {name: value if isinstance(value, (bool, int, float, str)) else str(value)
                 for name, value in flatten(self.hparams).items()}  # fmt: skip
        writer = self.experiment._get_file_writer()
        for summary in hparams(plain, metrics):
            writer.add_summary(summary)

    @rank_zero_only
    def log_graph(self, model: Module, input_array: Any = None) -> None:
        """The graph of `forward` on `input_array`, by default the module's `example_input_array`."""
        if not self._log_graph:
            return
        example = model.example_input_array if input_array is None else input_array
        if example is None:
            rank_zero_warn("TensorBoardLogger(log_graph=True) needs an input: set example_input_array in the module.")
            return
        self.experiment.add_graph(model, move(example, model.device))

    @rank_zero_only
    def save(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._close()

    # --- hooks ---------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        self.save()
        return super().state_dict()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if trainer.state.fn == "fit" and "global_step" in checkpoint:
            self._close()  # the writer that goes on is made with the step from which on older events are void
            self._purge_step = checkpoint["global_step"] + 1

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
