"""Random augmentation that is the same on any number of ranks and workers: `python examples/augmentation.py`.

    python examples/augmentation.py --workers 4
    python examples/augmentation.py --devices 2 --workers 2       # the same weights, but for the order of sums

`sample_generator(index)` draws for one sample: what it gives depends on the seed, the epoch and the sample alone. The
last line printed is a fingerprint of all augmented images that were trained on.
"""

import argparse

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import paceline as pl
from paceline.trainer.rng import sample_generator


class Shapes(Dataset):
    """Images of horizontal and vertical bars, moved and dimmed anew in each epoch."""

    def __len__(self):
        return 480

    def __getitem__(self, index):
        generator = sample_generator(index)  # in place of the global generators
        label = index % 2
        image = torch.zeros(12, 12)
        image[3:5] = 1.0
        image = image.T if label else image
        shift = int(torch.randint(-3, 6, (), generator=generator))
        brightness = torch.empty(()).uniform_(0.3, 1.0, generator=generator)
        noise = 0.2 * torch.randn(12, 12, generator=generator)
        return (torch.roll(image, shift, dims=label) * brightness + noise)[None], label


class Classifier(pl.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(800, 2))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        # Whole numbers, so that the sum does not depend on the order of the images, nor on who adds which.
        self.log("fingerprint", (images * 1000).round().sum(), on_step=False, on_epoch=True, reduce_fx="sum")
        loss = F.cross_entropy(self.network(images), labels)
        self.log("loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args(arguments)

    pl.seed_everything(1)
    loader = DataLoader(Shapes(), batch_size=16, shuffle=True, num_workers=args.workers)
    trainer = pl.Trainer(
        accelerator="cpu", devices=args.devices, global_batch_size=48, max_epochs=3, enable_progress_bar=False
    )
    trainer.fit(Classifier(), loader)
    if trainer.is_global_zero:
        print(f"Loss {trainer.callback_metrics['loss']:.4f}, images {trainer.callback_metrics['fingerprint']:.0f}")


if __name__ == "__main__":
    main()
