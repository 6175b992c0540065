"""What the scripts beside this one start: a small FSDP run that says where it begins and with what it ends."""

import argparse
import hashlib
import time

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import paceline as pl


class Stack(pl.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1)) for _ in range(3)), nn.Linear(8, 1)
        )

    def on_train_start(self):
        self.print(f"begins at step {self.global_step}")

    def training_step(self, batch, batch_idx):
        time.sleep(arguments.seconds_a_step)
        return F.mse_loss(self.layers(batch[0]).squeeze(-1), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--strategy", default="fsdp")
parser.add_argument("--seconds-a-step", type=float, default=0.0)
parser.add_argument("--folder", default="runs")
arguments = parser.parse_args()

pl.seed_everything(0, verbose=False)
x = torch.randn(64, 8)
trainer = pl.Trainer(
    strategy=arguments.strategy, accelerator="cpu", max_steps=20, max_epochs=-1, logger=False,
    enable_progress_bar=False, enable_model_summary=False, default_root_dir=arguments.folder,
)  # fmt: skip
module = Stack()
trainer.fit(module, DataLoader(TensorDataset(x, x.sum(1)), batch_size=4))
weights = [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for p in module.parameters()]
digest = hashlib.sha256(torch.cat([w.flatten() for w in weights]).numpy().tobytes()).hexdigest()[:16]
print(f"\nrank {trainer.global_rank} of {trainer.world_size}: step {trainer.global_step}, weights {digest}", flush=True)
