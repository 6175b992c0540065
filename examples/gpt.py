"""A GPT on bytes of real text found on any machine: Python's own standard library.

    python examples/gpt.py                                              # a small one, on whatever is here
    python examples/gpt.py --devices 2 --strategy fsdp --precision bf16-mixed --compile
    torchrun --nproc-per-node 8 examples/gpt.py --size large --strategy hsdp

The layers are built in `configure_model`: under FSDP and HSDP on the meta device, so no rank ever holds it whole.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import paceline as pl

SIZES = {  # layers, width, heads
    "tiny": (2, 64, 2),
    "small": (6, 384, 6),
    "medium": (12, 768, 12),
    "large": (24, 1536, 16),
    "xl": (32, 2560, 20),
}


class StandardLibrary(Dataset):
    """Windows of `context + 1` bytes from the source files of the standard library, in a fixed order."""

    def __init__(self, context, files=200, last=False):
        sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:files]
        chosen = sources[-10:] if last else sources[:-10]
        self.data = torch.tensor(list(b"\0".join(path.read_bytes() for path in chosen)), dtype=torch.uint8)
        self.context = context

    def __len__(self):
        return (len(self.data) - 1) // self.context

    def __getitem__(self, index):
        window = self.data[index * self.context : (index + 1) * self.context + 1].long()
        return window[:-1], window[1:]


class Block(nn.Module):
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class GPT(pl.Module):
    def __init__(self, layers=2, width=64, heads=2, context=128, dropout=0.0, lr=3e-4):
        super().__init__()
        self.save_hyperparameters()

    def configure_model(self):
        if hasattr(self, "blocks"):
            return
        sizes = self.hparams
        self.bytes = nn.Embedding(256, sizes.width)
        self.positions = nn.Embedding(sizes.context, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes.width, sizes.heads, sizes.dropout) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.width)
        self.head = nn.Linear(sizes.width, 256, bias=False)
        self.head.weight = self.bytes.weight
        self.apply(self.init_weights)

    def init_weights(self, module):
        """Called for every part; under FSDP again, once the part has memory."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, tokens):
        x = self.bytes(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def loss(self, batch):
        tokens, targets = batch
        return F.cross_entropy(self(tokens).flatten(0, 1).float(), targets.flatten())

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), prog_bar=True)

    def configure_optimizers(self):
        decayed = [p for p in self.parameters() if p.dim() > 1]
        others = [p for p in self.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.hparams.lr, betas=(0.9, 0.95))
        warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm_up, "interval": "step"}}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--num-nodes", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="compile the blocks, which share their code")
    parser.add_argument("--workers", type=int, default=0)
    arguments = parser.parse_args()

    pl.seed_everything(0)
    layers, width, heads = SIZES[arguments.size]
    trainer = pl.Trainer(
        strategy=arguments.strategy,
        precision=arguments.precision,
        accelerator=arguments.accelerator,
        devices=arguments.devices,
        num_nodes=arguments.num_nodes,
        compile="blocks" if arguments.compile else False,
        max_steps=arguments.max_steps,
        gradient_clip_val=1.0,
        val_check_interval=min(100, arguments.max_steps),
        check_val_every_n_epoch=None,
        limit_val_batches=20,
        log_every_n_steps=10,
    )
    loading = {"batch_size": arguments.batch_size, "num_workers": arguments.workers}
    trainer.fit(
        GPT(layers, width, heads, arguments.context),
        DataLoader(StandardLibrary(arguments.context), shuffle=True, **loading),
        DataLoader(StandardLibrary(arguments.context, last=True), **loading),
    )
    trainer.print(f"val_loss {trainer.callback_metrics['val_loss'].item():.4f} (a byte drawn evenly: 5.5452)")


if __name__ == "__main__":
    main()
