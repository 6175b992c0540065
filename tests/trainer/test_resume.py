"""A run that was cut anywhere and resumed ends as the one that never was, to the bit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, Dataset, Sampler

import paceline as pl
from paceline.callbacks import Callback, ModelCheckpoint
from paceline.errors import CheckpointError, ConfigurationError

from helpers import resumable
from helpers.ranks import run_ranks
from helpers.resumable import CASES, SAMPLES, Case, Classifier, Noisy, Outcome, every_save, run, same, saved_in
from helpers.tiny import assert_same, tiny_trainer


@pytest.mark.parametrize("case", CASES)
def test_it_resumes_from_every_update_validation_and_epoch_end(case: str, tmp_path: Path) -> None:
    whole = run(case, tmp_path / "whole", callbacks=every_save())
    paths = saved_in(tmp_path / "whole")
    assert len(paths) > 8
    wrong = {}
    for path in paths:
        try:
            same(run(case, tmp_path / Path(path).name, path), whole)
        except AssertionError as error:
            wrong[Path(path).name] = str(error)
    assert not wrong


def test_saving_changes_nothing(tmp_path: Path) -> None:
    with_saves = run("adam_plateau_accumulated", tmp_path / "a", callbacks=every_save())
    same(run("adam_plateau_accumulated", tmp_path / "b"), with_saves)


class Asks(Callback):
    """Saves wherever user code may ask for it: inside windows of micro-batches and inside validation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"t{trainer.progress.total_batches}.ckpt")

    def on_validation_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if not trainer.sanity_checking and index == 1:
            trainer.save_checkpoint(self.folder / f"v{trainer.global_step}.ckpt")


def test_it_resumes_from_saves_asked_for_inside_windows_and_validation(tmp_path: Path) -> None:
    case = "adam_plateau_accumulated"
    whole = run(case, tmp_path / "whole", callbacks=(Asks(tmp_path / "asked"),))
    paths = sorted(map(str, (tmp_path / "asked").iterdir()))
    assert len(paths) > 30
    for path in paths:
        same(run(case, tmp_path / Path(path).name, path), whole)


def test_it_resumes_with_workers(tmp_path: Path) -> None:
    whole = run("adam_plateau_accumulated", tmp_path / "whole", workers=2, callbacks=every_save())
    for name in ("epoch=0-step=2", "epoch=1-step=7"):
        path = str(tmp_path / f"whole/version_0/checkpoints/{name}.ckpt")
        same(run("adam_plateau_accumulated", tmp_path / name, path, workers=2), whole)


def test_a_resumed_run_reads_the_samples_that_it_trains_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    class Notes(Noisy):
        def __getitem__(self, index: int) -> Any:
            if len(self) == SAMPLES:  # those of training
                read.append(index)
            return super().__getitem__(index)

    monkeypatch.setattr(resumable, "Noisy", Notes)
    saves = ModelCheckpoint(every_n_train_steps=4)
    run("sgd_momentum_by_step", tmp_path / "whole", callbacks=(saves,), max_steps=4)
    read.clear()
    resumed = run("sgd_momentum_by_step", tmp_path / "resumed", saves.best_model_path, max_epochs=1)
    assert read == [index for _, _, batch in resumed.seen for index in batch] and len(read) == 20


class Counts(Sampler[int]):
    """Another order for each epoch, which nobody tells it."""

    def __init__(self) -> None:
        self.epochs = 0

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Iterator[int]:
        self.epochs += 1
        return iter([(17 * self.epochs + 5 * number) % SAMPLES for number in range(SAMPLES)])


def test_a_sampler_that_counts_epochs_itself_goes_on_where_it_was(tmp_path: Path) -> None:
    def train(ckpt_path: str | None = None, **limits: Any) -> tuple[pl.Trainer, Classifier]:
        module = Classifier(CASES["adam_by_epoch"].optimizers)
        trainer = tiny_trainer(**limits)
        trainer.fit(module, DataLoader(Noisy(), 9, sampler=Counts()), ckpt_path=ckpt_path)
        return trainer, module

    whole = train(max_epochs=4)[1].seen
    assert whole[0][2] != whole[4][2]
    for steps in (3, 4, 9):
        path = train(max_steps=steps)[0].save_checkpoint(tmp_path / f"{steps}.ckpt")
        assert train(path, max_epochs=4)[1].seen == whole[steps:]


class OfEpoch(Classifier):
    """Its loaders hold other samples for every epoch in which they are made."""

    def train_dataloader(self) -> Any:
        return DataLoader(Noisy(8 + 4 * self.current_epoch), 4, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(Noisy(4 + 4 * self.current_epoch), 4)


def test_loaders_that_were_made_for_an_epoch_are_made_for_that_epoch_again(tmp_path: Path) -> None:
    def train(folder: Path, ckpt_path: str | None = None) -> OfEpoch:
        pl.seed_everything(7, verbose=False)
        saves = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1)
        settings = {"callbacks": saves, "enable_checkpointing": True, "reload_dataloaders_every_n_epochs": 2}
        module = OfEpoch(CASES["adam_by_epoch"].optimizers)
        tiny_trainer(max_epochs=4, **settings).fit(module, ckpt_path=ckpt_path)
        return module

    whole = train(tmp_path / "whole")
    paths = sorted((tmp_path / "whole").iterdir())
    assert len(paths) == 12
    for path in paths:
        resumed = train(tmp_path / "resumed" / path.name, str(path))
        assert str(resumed.seen) == str(whole.seen[len(whole.seen) - len(resumed.seen) :])
        assert_same(resumed, whole)


class Reads(pl.Module):
    """Keeps what its data set was asked for, and what it trained."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.read: list[int] = []
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(batch)
        leaves = batch.values() if isinstance(batch, dict) else [batch]
        return sum(leaf.float().mean() for leaf in leaves if leaf is not None) * self.weight

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Listed(Dataset[int]):
    def __init__(self, numbers: range, read: list[int]) -> None:
        self.numbers, self.read = numbers, read

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> int:
        self.read.append(self.numbers[index])
        return self.numbers[index]


def train_combined(mode: Any, folder: Path, path: str | None = None, steps: int = -1) -> tuple[Reads, pl.Trainer]:
    module = Reads()
    loaders = {
        name: DataLoader(Listed(numbers, module.read), batch_size=2, shuffle=True)
        for name, numbers in (("long", range(14)), ("short", range(100, 106)))
    }
    trainer = tiny_trainer(max_epochs=1 if steps < 0 else 9, max_steps=steps, default_root_dir=folder)
    pl.seed_everything(3, verbose=False)
    trainer.fit(module, pl.CombinedLoader(loaders, mode), ckpt_path=path)
    return module, trainer


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle", "sequential"])
def test_combined_loaders_of_samples_are_found_without_reading_what_was_trained(mode: str, tmp_path: Path) -> None:
    whole, _ = train_combined(mode, tmp_path)
    for steps in range(1, len(whole.seen)):
        path = train_combined(mode, tmp_path, steps=steps)[1].save_checkpoint(tmp_path / f"{steps}.ckpt")
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Resuming reads")
            resumed, _ = train_combined(mode, tmp_path, path)
        assert str(resumed.seen) == str(whole.seen[steps:])
        read = whole.read[len(whole.read) - len(resumed.read) :]
        assert resumed.read == read and len(read) <= 4 * len(resumed.seen) + 2


def reads_on(mode: Any, first: int, second: int, folder: Path) -> list[int]:
    """The steps after which a resumed run does not train or read what the whole run did from there on."""

    def train(path: str | None = None, max_steps: int = -1) -> tuple[Reads, pl.Trainer]:
        module = Reads()
        loaders = {
            name: DataLoader(Listed(range(start, start + n), module.read), batch_size=2, shuffle=True)
            for name, start, n in (("a", 0, first), ("b", 99, second))
        }
        trainer = tiny_trainer(max_epochs=1, max_steps=max_steps, strategy="ddp", devices="auto")
        pl.seed_everything(3, verbose=False)
        trainer.fit(module, pl.CombinedLoader(loaders, mode), ckpt_path=path)
        return module, trainer

    whole, wrong = train()[0], []
    for steps in range(1, len(whole.seen)):
        cut = train(max_steps=steps)[1].save_checkpoint(folder / f"{steps}.ckpt")
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Resuming reads")
            resumed = train(cut)[0]
        skipped = len(whole.read) - len(resumed.read)
        if str(resumed.seen) != str(whole.seen[steps:]) or skipped < steps - 1:  # one batch is read to be repeated
            wrong.append(steps)
    return wrong


@pytest.mark.parametrize(
    ("mode", "first", "second"),
    [("min_size", 13, 21), ("max_size", 13, 21), ("max_size_cycle", 23, 5), ("sequential", 13, 21)],
)
def test_combined_loaders_are_found_where_a_rank_has_fewer_batches_of_one(
    mode: str, first: int, second: int, tmp_path: Path
) -> None:
    assert run_ranks(reads_on, 2, mode, first, second, tmp_path) == [[], []]


def test_other_optimizers_or_schedulers_than_were_saved_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = ModelCheckpoint(every_n_train_steps=2)
    run("sgd_momentum_by_step", tmp_path / "whole", callbacks=(saves,), max_steps=2)

    def sgd(module: pl.Module, count: int, schedulers: list[type[Any]]) -> Any:
        sgds = [torch.optim.SGD(list(module.parameters())[i::count], lr=0.1, momentum=0.9) for i in range(count)]
        return sgds, [kind(sgds[0], 1) for kind in schedulers]

    for count, schedulers, told in (
        (2, [], r"number of optimizers of the checkpoint: 1, .*: 2\."),
        (1, [], r"schedulers of the checkpoint: \['OneCycleLR'\], .*: \[\]\."),
        (1, [StepLR], r"schedulers of the checkpoint: \['OneCycleLR'\], .*: \['StepLR'\]\."),
        (1, [StepLR, StepLR], r"\['StepLR', 'StepLR'\]\. Configure the same"),
    ):
        case = Case(lambda module, a=count, b=schedulers: sgd(module, a, b), module=CASES["manual"].module)
        monkeypatch.setitem(CASES, "changed", case)
        with pytest.raises(CheckpointError, match=told):
            run("changed", tmp_path / "other", saves.best_model_path)


# --- several ranks ---------------------------------------------------------------------------------------------------
def on_ranks(ranks: int, case: str, root: Path, *, saves: bool = False, **options: Any) -> list[Outcome]:
    """`run` on `ranks` ranks, one after the other from each of its checkpoints if `saves`."""
    return list(run_ranks(_saving if saves else run, ranks, case, root, ranks=ranks, **options, timeout_seconds=150))


def _saving(case: str, root: Path, **options: Any) -> Outcome:
    return run(case, root, callbacks=every_save(), **options)


def _resume_all(case: str, root: Path, paths: list[str], **options: Any) -> list[Outcome]:
    return [run(case, root / Path(path).name, path, **options) for path in paths]


def _check_on_ranks(case: str, tmp_path: Path, ranks: int, every: int, **options: Any) -> None:
    whole = on_ranks(ranks, case, tmp_path / "whole", saves=True, **options)
    paths = saved_in(tmp_path / "whole")[::every]
    outcomes = run_ranks(_resume_all, ranks, case, tmp_path, paths, ranks=ranks, **options, timeout_seconds=150)
    for resumed, uncut in zip(outcomes, whole, strict=True):
        assert len(resumed) == len(paths) > 1
        for outcome in resumed:
            same(outcome, uncut)


@pytest.mark.parametrize(("ranks", "case"), [(2, "sgd_momentum_by_step"), (3, "adam_plateau_accumulated")])
def test_it_resumes_on_several_ranks(ranks: int, case: str, tmp_path: Path) -> None:
    _check_on_ranks(case, tmp_path, ranks, every=4)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_it_resumes_on_several_ranks_from_everywhere(case: str, ranks: int, workers: int, tmp_path: Path) -> None:
    _check_on_ranks(case, tmp_path, ranks, every=3 if workers else 1, workers=workers)


def _global_batches(outcomes: list[Outcome], steps: int) -> list[list[int]]:
    """The samples of each global batch, from what the ranks read; a ghost's repetition is left out."""
    per_step: list[list[int]] = [[] for _ in range(steps)]
    for outcome in outcomes:
        assert len(outcome.windows) == steps
        for step, window in enumerate(outcome.windows):
            per_step[step] += window
    return [sorted(set(step)) for step in per_step]


def test_another_number_of_ranks_trains_the_same_samples_in_the_same_global_batches(tmp_path: Path) -> None:
    options = {"global_batch_size": 12, "batch_size": 3}
    whole = on_ranks(2, "sgd_momentum_by_step", tmp_path / "whole", saves=True, **options)
    path = str(tmp_path / "whole/version_0/checkpoints/epoch=1-step=4.ckpt")
    expected = _global_batches(whole, 9)[4:]
    for ranks in (1, 3, 4):
        resumed = on_ranks(ranks, "sgd_momentum_by_step", tmp_path / str(ranks), ckpt_path=path, **options)
        assert _global_batches(resumed, 5) == expected
        assert [outcome.step for outcome in resumed] == [9] * ranks


def test_the_global_batch_is_kept_where_batch_size_and_ranks_made_it(tmp_path: Path) -> None:
    whole = on_ranks(2, "sgd_momentum_by_step", tmp_path / "whole", saves=True)
    path = str(tmp_path / "whole/version_0/checkpoints/epoch=0-step=3.ckpt")
    resumed = run("sgd_momentum_by_step", tmp_path / "one", path)
    assert _global_batches([resumed], 12) == _global_batches(whole, 15)[3:]


def test_arguments_that_ask_for_another_global_batch_are_refused(tmp_path: Path) -> None:
    run("sgd_momentum_by_step", tmp_path / "whole", callbacks=every_save(), max_epochs=1)
    path = str(tmp_path / "whole/version_0/checkpoints/epoch=0-step=3.ckpt")
    for arguments in ({"global_batch_size": 8}, {"batch_size": 8}, {"accumulate_grad_batches": 2}):
        with pytest.raises(ConfigurationError, match="global batch of 4, the arguments now ask for 8"):
            run("sgd_momentum_by_step", tmp_path / "other", path, **arguments)
