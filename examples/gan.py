"""A GAN of handwritten digits, with two optimizers and manual optimization: `python examples/gan.py`.

Learns to draw the 1,797 digits of 8 x 8 pixels that ship inside scikit-learn, and prints four of its own at the end.
`--devices 2` trains on two processes: `manual_backward` averages the gradients over them, so both stay alike.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import paceline as pl

SIDE = 8


class GAN(pl.Module):
    def __init__(self, latent=16, width=128, lr=2e-3):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False  # two optimizers take turns, so training_step steps by itself
        self.generator = nn.Sequential(
            nn.Linear(latent, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2),
            nn.Linear(width, SIDE * SIDE), nn.Tanh(),
        )  # fmt: skip
        self.discriminator = nn.Sequential(
            nn.Linear(SIDE * SIDE, width), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(width, 1)
        )

    def forward(self, noise):
        return self.generator(noise)

    def noise(self, count):
        return torch.randn(count, self.hparams.latent, device=self.device)

    def training_step(self, images, batch_idx):
        of_generator, of_discriminator = self.optimizers()
        real = images.flatten(1)

        # The discriminator's turn: real ones are 1, drawn ones 0. `detach` keeps the generator out of it.
        drawn = self(self.noise(len(real)))
        loss_d = (judged(self.discriminator(real), 1) + judged(self.discriminator(drawn.detach()), 0)) / 2
        of_discriminator.zero_grad()
        self.manual_backward(loss_d)
        of_discriminator.step()

        # The generator's turn: it wants its drawings to pass for real ones. Only its weights need gradients.
        self.toggle_optimizer(of_generator)
        loss_g = judged(self.discriminator(drawn), 1)
        of_generator.zero_grad()
        self.manual_backward(loss_g)
        of_generator.step()
        self.untoggle_optimizer(of_generator)

        self.log_dict({"loss_g": loss_g, "loss_d": loss_d}, prog_bar=True, on_epoch=True, on_step=False)

    def on_train_epoch_end(self):
        for scheduler in self.lr_schedulers():  # stepping them is up to us, too
            scheduler.step()

    def configure_optimizers(self):
        optimizers = [
            torch.optim.Adam(network.parameters(), lr=self.hparams.lr, betas=(0.5, 0.999))
            for network in (self.generator, self.discriminator)
        ]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98) for optimizer in optimizers]


def judged(scores, real):
    return F.binary_cross_entropy_with_logits(scores, torch.full_like(scores, float(real)))


def as_text(image):
    shades = " .:-=+*#%@"
    rows = ((image.reshape(SIDE, SIDE) + 1) / 2 * (len(shades) - 1)).round().int().tolist()
    return ["".join(shades[pixel] * 2 for pixel in row) for row in rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--devices", default="1")
    parser.add_argument("--fast-dev-run", action="store_true", help="one batch, to see that all works")
    options = parser.parse_args()

    pl.seed_everything(0)
    digits = torch.tensor(load_digits().images, dtype=torch.float32) / 8 - 1
    trainer = pl.Trainer(max_epochs=options.epochs, devices=options.devices, fast_dev_run=options.fast_dev_run)
    gan = GAN()
    trainer.fit(gan, DataLoader(digits, batch_size=64, shuffle=True, drop_last=True))

    gan.eval()
    with torch.no_grad():
        drawings = [as_text(image) for image in gan(gan.noise(4)).cpu()]
    trainer.print("\n".join("   ".join(rows) for rows in zip(*drawings, strict=True)))


if __name__ == "__main__":
    main()
