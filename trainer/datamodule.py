"""`DataModule`: where data comes from, apart from the model that learns from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .hparams import HyperParameters, on_class_only
from .prefetch import move

if TYPE_CHECKING:
    import torch

    from .trainer import Trainer


class DataHooks:
    """What a module and a data module share: the loaders, and how a batch comes to the device."""

    def prepare_data(self) -> None:
        """Download, tokenise, ...: called on local rank 0 of each node, before the others go on. Assign no state."""

    def train_dataloader(self) -> Any:
        """A loader of training batches, or a collection of loaders."""
        raise NotImplementedError("train_dataloader is not defined")

    def val_dataloader(self) -> Any:
        """One or several loaders of validation batches."""
        raise NotImplementedError("val_dataloader is not defined")

    def test_dataloader(self) -> Any:
        """One or several loaders of test batches."""
        raise NotImplementedError("test_dataloader is not defined")

    def predict_dataloader(self) -> Any:
        """One or several loaders of batches to predict from."""
        raise NotImplementedError("predict_dataloader is not defined")

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Change a batch on the host; return it."""
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch; override it for types that `paceline.trainer.prefetch.move` cannot move."""
        return move(batch, device)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Change a batch on the device; return it."""
        return batch


class DataModule(HyperParameters, DataHooks):
    """Loaders and their preparation; pass one as `datamodule=` (or in the place of the loaders)."""

    prepare_data_per_node = True
    allow_zero_length_dataloader_with_multiple_devices = False

    def __init__(self) -> None:
        super().__init__()
        self.trainer: Trainer | None = None

    def setup(self, stage: str) -> None:
        """Called on every rank before the loaders are asked for; `stage` is fit, validate, test or predict."""

    def teardown(self, stage: str) -> None:
        """Called on every rank at the end."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""

    def on_exception(self, exception: BaseException) -> None:
        """An exception ends the run."""

    @on_class_only
    def load_from_checkpoint(
        cls, checkpoint_path: Any, map_location: Any = None, hparams_file: Any = None, **kwargs: Any
    ) -> Any:
        """A data module with the hyper-parameters of a checkpoint; `kwargs` override them. Its `state_dict` is not
        loaded: `fit(ckpt_path=...)` does that."""
        from .checkpoint.modules import load_datamodule

        return load_datamodule(cls, checkpoint_path, hparams_file, kwargs)

    @classmethod
    def from_datasets(
        cls,
        train_dataset: Any = None,
        val_dataset: Any = None,
        test_dataset: Any = None,
        predict_dataset: Any = None,
        batch_size: int = 1,
        num_workers: int = 0,
    ) -> DataModule:
        """A data module around data sets (one or several for evaluation); the training set is shuffled."""
        from torch.utils.data import DataLoader, IterableDataset

        def loaders(datasets: Any, shuffle: bool = False) -> Any:
            if isinstance(datasets, (list, tuple)):
                return [loaders(d, shuffle) for d in datasets]
            if isinstance(datasets, dict):
                return {name: loaders(d, shuffle) for name, d in datasets.items()}
            shuffled = shuffle and not isinstance(datasets, IterableDataset)
            return DataLoader(
                datasets, batch_size, shuffle=shuffled, num_workers=num_workers, pin_memory=bool(num_workers)
            )

        module = cls()
        for name, dataset, shuffle in (
            ("train_dataloader", train_dataset, True),
            ("val_dataloader", val_dataset, False),
            ("test_dataloader", test_dataset, False),
            ("predict_dataloader", predict_dataset, False),
        ):
            if dataset is not None:
                setattr(module, name, lambda dataset=dataset, shuffle=shuffle: loaders(dataset, shuffle))
        return module
