"""Several nodes for real: two network namespaces, one torchrun with two ranks each, one job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from paceline.strategies import DDP
from paceline.trainer import same_code

from helpers.nodes import Node, run_on, two_nodes, why_no_nodes
from helpers.ranks import RanksFailed, run_ranks
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
{extra}
"""


@pytest.fixture(scope="module")
def nodes() -> list[Node]:
    if reason := why_no_nodes():
        pytest.skip(reason)
    with two_nodes() as made:
        yield made


@pytest.mark.slow
def test_two_nodes_of_two_ranks_train_as_one_process(nodes: list[Node], tmp_path: Path) -> None:
    program = tmp_path / "train.py"
    program.write_text(PROGRAM.format(tests=str(TESTS), folder=str(tmp_path), extra=""))
    for result in run_on(nodes, str(program)):
        assert result.returncode == 0, result.stderr
    one = trained(24, 12, {"sgd": True})
    for rank in range(4):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found["place"] == [rank, rank % 2, rank // 2, 4, 2]
        assert found["sizes"] == [2, 2]
        for strategy in ("ddp", "fsdp", "hsdp"):
            assert_same({name: torch.tensor(values) for name, values in found[strategy].items()}, one, 1e-6)


@pytest.mark.slow
def test_nodes_with_unlike_programs_are_told_apart_at_the_start(nodes: list[Node], tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"node{i}").mkdir()
        text = PROGRAM.format(tests=str(TESTS), folder=str(tmp_path), extra=f"# an edit on node {i}")
        (tmp_path / f"node{i}" / "train.py").write_text(text)
    start = "import os, runpy, sys; sys.argv = [f'{sys.argv[1]}/node{os.environ[\"GROUP_RANK\"]}/train.py']; "
    (tmp_path / "start.py").write_text(start + "runpy.run_path(sys.argv[0], run_name='__main__')")
    for result in run_on(nodes, str(tmp_path / "start.py"), str(tmp_path)):
        assert result.returncode == 1
        assert "The ranks do not run the same program" in result.stderr


def compares(versions: list[str]) -> None:
    import os

    import torch.distributed as dist

    dist.init_process_group("gloo")
    strategy = DDP()
    strategy.rank, strategy.world_size = int(os.environ["RANK"]), dist.get_world_size()
    same_code.__version__, before = versions[strategy.rank], same_code.__version__
    try:
        same_code.check_same_code(strategy)
    finally:
        same_code.__version__ = before


def test_an_unlike_version_is_named_with_its_rank() -> None:
    run_ranks(compares, 3, ["1", "1", "1"])
    with pytest.raises(RanksFailed, match=r"not run the same paceline: most have 1, rank 2 \(host .*\) has 2\."):
        run_ranks(compares, 3, ["1", "1", "2"])
