"""Handwritten digits on two processes: `python examples/quickstart.py`.

Trains a small convolutional network on the 1,797 digits that ship inside scikit-learn, with DDP on two CPU processes
(or on the GPUs there are), keeps the checkpoint of the best epoch, stops when it no longer gets better, and tests it.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

import paceline as pl
from paceline.callbacks import EarlyStopping, ModelCheckpoint


def digits():
    """Training, validation and test data: images of 8 x 8 pixels from 0 to 1, and the digits that they show."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    dataset = TensorDataset(images, torch.tensor(data.target))
    return random_split(dataset, [0.7, 0.15, 0.15], generator=torch.Generator().manual_seed(0))


class Classifier(pl.Module):
    def __init__(self, lr=2e-3):
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 4 * 4, 10),
        )  # fmt: skip

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = F.cross_entropy(self.network(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.evaluate("val", batch)

    def test_step(self, batch, batch_idx):
        self.evaluate("test", batch)

    def evaluate(self, stage, batch):
        images, labels = batch
        scores = self.network(images)
        self.log(f"{stage}_loss", F.cross_entropy(scores, labels), prog_bar=True)
        self.log(f"{stage}_accuracy", (scores.argmax(dim=1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategy", default="auto", help="auto, single or ddp")
    parser.add_argument("--devices", default="auto" if torch.accelerator.is_available() else "2")
    parser.add_argument("--max-epochs", type=int, default=15)
    args = parser.parse_args()

    pl.seed_everything(1)
    train, val, test = digits()
    best = ModelCheckpoint(monitor="val_loss")
    callbacks = [best, EarlyStopping(monitor="val_loss", patience=3)]
    trainer = pl.Trainer(strategy=args.strategy, devices=args.devices, max_epochs=args.max_epochs, callbacks=callbacks)
    trainer.fit(Classifier(), DataLoader(train, batch_size=32, shuffle=True), DataLoader(val, batch_size=128))
    [result] = trainer.test(dataloaders=DataLoader(test, batch_size=128), ckpt_path="best", verbose=False)

    if trainer.is_global_zero:
        print(f"Test accuracy: {result['test_accuracy']:.1%}")
        print(f"Metrics:       {trainer.log_dir}/metrics.jsonl")
        print(f"Checkpoint:    {best.best_model_path}")


if __name__ == "__main__":
    main()
