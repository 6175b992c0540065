"""Which checkpoint `ckpt_path` means: a path or URL, "best", "last" or "auto"."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ...errors import CheckpointError
from ..rank_zero import rank_zero_warn
from .find import find_newest
from .load import load
from .pointer import resolve_pointer
from .run_folder import version_folder_of, version_folders
from .storage import storage_of

if TYPE_CHECKING:
    from ..trainer import Trainer


_RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


def choose_for(trainer: Trainer, ckpt_path: str | None) -> None:
    """Set `trainer.ckpt_path`; a run that goes on by itself goes on in its own folder.

    An attempt that the launcher restarted is "auto" where nothing else was asked for.
    """
    restarted = any(int(os.environ.get(name) or 0) > 0 for name in _RESTARTS)
    if ckpt_path is None and restarted and trainer.state.fn == "fit":
        ckpt_path = "auto"
    trainer.ckpt_path = choose(trainer, ckpt_path)
    if ckpt_path == "auto" and trainer.ckpt_path is not None and trainer.run_folder is None:
        trainer.run_folder = version_folder_of(trainer.ckpt_path, trainer.default_root_dir)


def choose(trainer: Trainer, ckpt_path: str | os.PathLike[str] | None) -> str | None:
    """The checkpoint's path, agreed by all ranks; None to start afresh. Raises CheckpointError on every rank."""
    if ckpt_path is None:
        return None
    return trainer.strategy.from_rank_zero(lambda: _choose(trainer, ckpt_path))


def _choose(trainer: Trainer, ckpt_path: str | os.PathLike[str]) -> str | None:
    if ckpt_path not in ("best", "last", "auto"):
        return resolve_pointer(ckpt_path)
    if ckpt_path == "best":
        best = next((str(cb.best_model_path) for cb in trainer.checkpoint_callbacks if cb.best_model_path), None)
        if best is not None:
            return best
    newest, skipped, places = _newest(trainer)
    for path, reason in skipped:
        rank_zero_warn(f"ckpt_path={ckpt_path!r} passes over {path}: {reason}")
    if newest is None:
        if ckpt_path == "auto":
            return None
        raise CheckpointError(
            f"ckpt_path={ckpt_path!r}: there is no valid checkpoint in {', '.join(places)}. Give the path of one, or "
            "ckpt_path='auto' to start afresh where there is none."
        )
    return newest if ckpt_path != "best" else _best_recorded_in(newest)


def _best_recorded_in(path: str) -> str:
    states = load(path).state_item("callbacks")
    for state in states.values() if isinstance(states, dict) else ():
        if isinstance(state, dict) and state.get("best_model_path"):
            best = str(state["best_model_path"])
            storage, parent = storage_of(path)
            beside = storage.join(storage.split(parent)[0], os.path.basename(best))
            return best if storage_of(best)[0].exists(storage_of(best)[1]) else beside
    raise CheckpointError(f"ckpt_path='best': {path} records no best checkpoint. Give a path, or use 'last'.")


def _newest(trainer: Trainer) -> tuple[str | None, list[tuple[str, str]], list[str]]:
    """The newest valid checkpoint, those passed over with the reason, and where was looked.

    Looked into are the explicit folders of the checkpoint callbacks, or else the version folders, the newest first.
    """
    to_resume = trainer.state.fn == "fit"
    explicit = [str(folder) for c in trainer.checkpoint_callbacks if (folder := getattr(c, "_given_dirpath", None))]
    if explicit:
        return *find_newest(explicit, to_resume), explicit
    skipped = []
    for folder in version_folders(trainer.default_root_dir):
        newest, passed_over = find_newest([storage_of(folder)[0].join(folder, "checkpoints")], to_resume)
        skipped += passed_over
        if newest is not None:
            return newest, skipped, [trainer.default_root_dir]
    return None, skipped, [trainer.default_root_dir]
