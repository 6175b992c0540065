"""A strategy of one's own: local SGD. `python examples/custom_strategy.py` trains with it on two CPU processes.

Every rank steps by itself, with no communication at all; every k steps the ranks average their weights. A strategy is a
subclass of `Strategy`: the methods it does not override are those of one process.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import paceline as pl
from paceline.strategies import Strategy, register_strategy


@register_strategy("local_sgd")
class LocalSGD(Strategy):
    """Averages the weights every `every_n_steps` steps; gradients stay with their rank."""

    distributed = True

    def __init__(self, every_n_steps=8):
        super().__init__()
        self.every_n_steps = every_n_steps
        self.steps = 0

    def place(self, module, precision):
        super().place(module, precision)
        for tensor in (*module.parameters(), *module.buffers()):
            self.broadcast(tensor.data)  # all ranks begin with rank 0's

    def optimizer_step(self, optimizer, closure=None, **kwargs):
        stepped = super().optimizer_step(optimizer, closure, **kwargs)
        self.steps += 1
        if self.steps % self.every_n_steps == 0:
            self.average()
        return stepped

    def sync_buffers(self):
        self.average()  # what is evaluated and saved is the average

    def average(self):
        for parameter in self.module.parameters():
            self.all_reduce(parameter.data, "mean")


class Regression(pl.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        loss = F.mse_loss(self.layers(inputs).squeeze(-1), targets)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        inputs, targets = batch
        self.log("val_loss", F.mse_loss(self.layers(inputs).squeeze(-1), targets))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


if __name__ == "__main__":
    pl.seed_everything(0)
    inputs = torch.randn(2048, 8)
    data = TensorDataset(inputs, inputs[:, 0] * inputs[:, 1] + inputs[:, 2])
    train, val = torch.utils.data.random_split(data, [1792, 256])
    trainer = pl.Trainer(
        strategy=LocalSGD(every_n_steps=8), accelerator="cpu", devices=2, max_epochs=5, enable_progress_bar=False
    )
    trainer.fit(Regression(), DataLoader(train, batch_size=32, shuffle=True), DataLoader(val, batch_size=128))
    trainer.print(f"val_loss {trainer.callback_metrics['val_loss'].item():.4f}")
