"""What a rank must hold, what "auto" makes of it, and the command that tells it without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from paceline.strategies import estimate as estimating
from paceline.strategies.blocks import described, find_blocks, named_blocks, without_shared
from paceline.strategies.estimate import Sizes, estimate, measure, pick, table
from paceline.strategies.precision import parse_precision

from helpers.ranks import run_ranks
from helpers.scripts import run_command
from helpers.sharded import Block, Layered, batches
from helpers.tiny import tiny_trainer

FLOAT = parse_precision("32-true")
MIXED = parse_precision("bf16-mixed")
BILLION = Sizes(10**9, 10**9, 40 * 10**6, 10**8)


def test_a_model_is_measured_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 6), Block(), Block(), nn.Linear(6, 1))
    block = sum(p.numel() for p in Block().parameters())
    assert measure(model) == Sizes(2 * block + 37, 2 * block + 37, block, 37)


def test_frozen_parameters_need_neither_gradients_nor_states() -> None:
    found = estimate(Sizes(1000, 100, 0, 1000), FLOAT, "single", 1)
    assert (found.weights, found.gradients, found.optimizer, found.copies, found.total) == (4000, 400, 800, 0, 5200)


def test_full_replicas_hold_everything_and_shards_their_part() -> None:
    ddp, fsdp, hsdp = (estimate(BILLION, FLOAT, name, 8, 4) for name in ("ddp", "fsdp", "hsdp"))
    assert ddp.weights + ddp.gradients + ddp.optimizer == 16 * 10**9
    assert (fsdp.shards, hsdp.shards) == (32, 8)
    assert fsdp.weights == 4 * 10**9 // 32
    assert hsdp.optimizer == 8 * 10**9 // 8
    assert fsdp.total < hsdp.total < ddp.total


def test_mixed_precision_adds_a_copy_and_low_precision_halves() -> None:
    assert estimate(BILLION, MIXED, "single", 1).copies == 2 * 10**9
    assert estimate(BILLION, parse_precision("bf16-true"), "single", 1).total == 8 * 10**9


@pytest.mark.parametrize(
    ("devices", "nodes", "memory_gb", "expected"),
    [
        (1, 1, 80, "single"),
        (1, 1, 8, "single"),
        (8, 1, 80, "ddp"),
        (8, 1, 16, "fsdp"),
        (8, 4, 80, "ddp"),
        (8, 4, 16, "hsdp"),
        (8, 4, 3.2, "fsdp"),
        (1, 4, 16, "fsdp"),
        (8, 1, 1, "fsdp"),
    ],
)
def test_auto_takes_what_communicates_least_and_fits(devices: int, nodes: int, memory_gb: float, expected: str) -> None:
    name, reason = pick(BILLION, FLOAT, devices, nodes, int(memory_gb * 1e9))
    assert name == expected
    assert reason.startswith("auto: states of ")


def test_the_table_names_every_strategy_and_what_auto_takes() -> None:
    text = table(BILLION, MIXED, 8, 4, 80 * 10**9)
    assert [line.split()[0] for line in text.splitlines()[3:7]] == ["single", "ddp", "fsdp", "hsdp"]
    assert "strategy='auto' takes ddp (states of 18.1 GB a rank fit in 70% of 80.0 GB)" in text


# --- auto in a run --------------------------------------------------------------------------------------------------
def fit_auto(share: float) -> tuple[str, int]:
    estimating.STATES_SHARE, before = share, estimating.STATES_SHARE
    try:
        trainer = tiny_trainer(strategy="auto", devices="auto")
        module = Layered()
        trainer.fit(module, batches(8, 2))
        trainer.validate(module, batches(5, 2), verbose=False)
        return trainer.strategy.name, trainer.global_step
    finally:
        estimating.STATES_SHARE = before


@pytest.mark.parametrize(("share", "name", "said"), [(0.7, "DDP", "fit in 70%"), (0.0, "FSDP", "more than 0%")])
def test_auto_chooses_once_the_model_is_known_and_says_why(share: float, name: str, said: str) -> None:
    results = run_ranks(fit_auto, 2, share)
    assert list(results) == [(name, 2)] * 2
    (line,) = (line for line in results.outputs[0].splitlines() if line.startswith("paceline:"))
    assert f"{name} (auto: states of " in line
    assert said in line


class BuiltLater(Layered):
    """Builds its layers when `setup` has told how."""

    def setup(self, stage: str) -> None:
        self.build_now = True

    def configure_model(self) -> None:
        if self.build_now:
            super().configure_model()


def fit_built_later() -> str:
    trainer = tiny_trainer(strategy="auto")
    trainer.fit(BuiltLater(late=True), batches(8, 2))
    return trainer.strategy.name


def test_auto_takes_ddp_where_the_model_needs_setup_and_says_so() -> None:
    results = run_ranks(fit_built_later, 2)
    assert list(results) == ["DDP"] * 2
    assert (
        "DDP (auto: The size of BuiltLater is not known before setup(): configure_model raised AttributeError ('Buil"
        in results.outputs[0]
    )


SCRIPT = """
import torch, paceline as pl
from torch import nn

class Big(pl.Module):
    def configure_model(self):
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(8192, 8192), nn.GELU()) for _ in range(16)))
    def training_step(self, batch, batch_idx):
        return self.layers(batch).mean()
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())

trainer = pl.Trainer(accelerator="gpu", devices=8, num_nodes=4, strategy="fsdp", precision="bf16-mixed", max_steps=1)
trainer.fit(Big(), [])
print("not reached")
"""


MACHINES = ("--devices", "8", "--num-nodes", "4", "--memory-gb", "24")


@pytest.mark.parametrize(
    "words",
    [(*MACHINES, "train.py", "--devices", "x", "--lr", "1"), ("train.py", *MACHINES, "--devices=8", "--lr", "1")],
)
def test_the_command_prints_the_table_for_machines_that_are_not_here(tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "train.py").write_text("import sys; print(sys.argv[1:])\n" + SCRIPT)
    done = run_command(sys.executable, "-m", "paceline.trainer.cli", "estimate", *words)
    assert done.returncode == 0, done.stderr
    own = ["--devices", "x", "--lr", "1"] if words[0] == "--devices" else ["--lr", "1"]
    assert str(own) in done.stdout
    assert "1,073,872,896 parameters" in done.stdout
    assert "4 node(s) of 8 device(s)" in done.stdout
    assert "strategy='auto' takes hsdp" in done.stdout
    assert "not reached" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", "2", "nothing.py"], "there is no file 'nothing.py'"),
        (["empty.py", "--devices", "2"], "empty.py ended without calling fit"),
        (["setup.py", "--devices", "2"], "The size of M is not known before setup(): it has no parameters. Build its"),
        (["empty.py"], "--devices N, and --num-nodes N above one node, say for which machines"),
    ],
)
def test_what_cannot_be_estimated_is_an_error(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "setup.py").write_text(
        "import paceline as pl\nclass M(pl.Module): pass\npl.Trainer(accelerator='cpu').validate(M(), [1])\n"
    )
    done = run_command(sys.executable, "-m", "paceline.trainer.cli", "estimate", *arguments)
    assert done.returncode == 2
    assert message in done.stderr


# --- blocks ---------------------------------------------------------------------------------------------------------
class Stages(nn.Module):
    """Few large stages of many small blocks, as in a vision transformer with windows."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(*(Block() for _ in range(4))) for _ in range(2))


def find(model: nn.Module) -> Any:
    blocks = find_blocks(model)
    return described(model, blocks) if blocks else ""


def test_repeated_layers_are_found_and_bare_ones_only_where_there_are_no_others() -> None:
    assert find(nn.ModuleDict({"h": nn.ModuleList(Block() for _ in range(12)), "head": nn.Linear(6, 6)})) == (
        "12 x Block (h.0 ... h.11)"
    )
    assert find(Stages()) == "8 x Block (stages.0.0 ... stages.1.3)"
    assert find(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))) == "2 x Linear (0 ... 2)"
    assert find(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 6)) == (
        "6 x TransformerEncoderLayer (layers.0 ... layers.5)"
    )
    assert find(nn.Linear(2, 2)) == ""


def test_what_is_looked_up_by_name_is_no_block() -> None:
    """Ranks may look up different ones, and would gather each other's."""
    experts = nn.ModuleDict({name: Block() for name in "abc"})
    assert find(nn.ModuleDict({"experts": experts, "h": nn.ModuleList(Block() for _ in range(2))})) == (
        "2 x Block (h.0 ... h.1)"
    )


def test_blocks_can_be_named_by_class_name_or_path() -> None:
    model = Layered()
    for wanted in (Block, "Block"):
        assert described(model, named_blocks(model, [wanted])) == "3 x Block (blocks.0 ... blocks.2)"
    assert described(model, named_blocks(model, ["blocks.1", nn.LayerNorm])) == (
        "3 x LayerNorm (blocks.0.norm ... blocks.2.norm), 1 x Block (blocks.1)"
    )


def test_a_block_that_shares_a_parameter_is_left_to_the_rest() -> None:
    model = Layered()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    kept, left = without_shared(model, find_blocks(model))
    assert [described(model, kept), left] == ["1 x Block (blocks.2)", ["blocks.0", "blocks.1"]]
