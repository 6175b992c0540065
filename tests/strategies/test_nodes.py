"""Several nodes for real: two network namespaces, one torchrun with two ranks each, one job."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from helpers.nodes import Node, run_on, two_nodes, why_no_nodes
from helpers.sharded import trained
from helpers.tiny import assert_same

TESTS = Path(__file__).resolve().parents[1]
PROGRAM = """
import json, os, sys
sys.path.insert(0, {tests!r})
from helpers.sharded import trained_on_ranks
from helpers.tiny import tiny_trainer

found = {{}}
for strategy in ("ddp", "fsdp", "hsdp"):
    cut = {{"count": 24, "batch_size": 2, "global_batch_size": 12}}
    weights = trained_on_ranks(strategy, model={{"sgd": True}}, num_nodes=2, **cut)
    found[strategy] = {{name: tensor.tolist() for name, tensor in weights.items()}}
trainer = tiny_trainer(strategy="hsdp")
found["place"] = [trainer.global_rank, trainer.local_rank, trainer.node_rank, trainer.world_size, trainer.num_nodes]
found["sizes"] = trainer.strategy.sizes()
with open(f"{folder}/rank{{os.environ['RANK']}}.json", "w") as file:
    json.dump(found, file)
"""


@pytest.fixture(scope="module")
def nodes() -> list[Node]:
    if reason := why_no_nodes():
        pytest.skip(reason)
    with two_nodes() as made:
        yield made


def test_two_nodes_of_two_ranks_train_as_one_process(nodes: list[Node], tmp_path: Path) -> None:
    program = tmp_path / "train.py"
    program.write_text(PROGRAM.format(tests=str(TESTS), folder=str(tmp_path)))
    for result in run_on(nodes, str(program)):
        assert result.returncode == 0, result.stderr
    one = trained(24, 12, {"sgd": True})
    for rank in range(4):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found["place"] == [rank, rank % 2, rank // 2, 4, 2]
        assert found["sizes"] == [2, 2]
        for strategy in ("ddp", "fsdp", "hsdp"):
            assert_same({name: torch.tensor(values) for name, values in found[strategy].items()}, one, 1e-6)


def test_an_interface_that_leads_to_no_other_node_is_named(nodes: list[Node], tmp_path: Path) -> None:
    program = tmp_path / "train.py"
    program.write_text(PROGRAM.format(tests=str(TESTS), folder=str(tmp_path)))
    for result in run_on(nodes, str(program), ranks=1, env={"GLOO_SOCKET_IFNAME": "lo"}):
        assert result.returncode == 1
        assert re.search(r"rank 0 \(host .*\) cannot reach rank 1 at 127\.0\.0\.1: Connection refused", result.stderr)
        assert "Set GLOO_SOCKET_IFNAME on each node to the interface" in result.stderr
