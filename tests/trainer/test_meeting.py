"""What keeps the processes of a job apart is named within seconds, on every process that can know it."""

from __future__ import annotations

import importlib
import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from paceline.errors import LaunchError
from paceline.strategies.cluster import find_cluster
from paceline.trainer import meeting

from helpers.ranks import RanksFailed, run_ranks
from helpers.scripts import run_command, start_command
from helpers.tiny import Regression, loader, tiny_trainer

PACELINE = ("python", "-m", "paceline.trainer.cli")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def replaced(**values: Any) -> Iterator[None]:
    before = {name: getattr(meeting, name) for name in values}
    for name, value in values.items():
        setattr(meeting, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(meeting, name, value)


def meets(port: int, changes: Mapping[int, Mapping[str, str]], replace: Mapping[int, Mapping[str, Any]]) -> str:
    """The error with which this rank's meeting ends, without a launcher's store; two ranks are two nodes."""
    rank = int(os.environ["RANK"])
    plain = {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ.update({**plain, **changes.get(rank, {})})
    cluster = find_cluster()
    assert cluster is not None
    started = time.monotonic()
    try:
        with replaced(**replace.get(rank, {})):
            store = meeting.meet_ranks(cluster, os.environ)
    except LaunchError as error:
        assert time.monotonic() - started < 8
        return str(error)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=cluster.world_size)
    dist.barrier()
    return ""


def errors(
    changes: Mapping[int, Mapping[str, str]] | None = None, replace: Mapping[int, Mapping[str, Any]] | None = None
) -> list[str]:
    return run_ranks(meets, 2, free_port(), changes or {}, replace or {})


IMPATIENT = {"PATIENCE_SECONDS": 0.3, "MEETING_SECONDS": 1.0}


def test_ranks_that_agree_meet_and_connect_and_the_interface_is_found_for_them() -> None:
    assert errors() == ["", ""]


def test_an_address_that_no_one_knows_is_named() -> None:
    lonely, lost = errors({1: {"MASTER_ADDR": "no-such-host.invalid"}}, {0: IMPATIENT})
    assert lost.startswith("rank 1 (host ")
    assert "does not know the address 'no-such-host.invalid'" in lost
    assert lonely.endswith(" for rank 1.")


def test_a_port_where_nobody_listens_is_named() -> None:
    port = str(free_port())
    lonely, lost = errors({1: {"MASTER_PORT": port}}, {0: IMPATIENT, 1: IMPATIENT})
    assert f"for rank 0 at 127.0.0.1:{port}: Connection refused so far. If it is started, then the address" in lost
    assert lonely.endswith(" for rank 1.")


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        host, guest = errors({rank: {"MASTER_PORT": port} for rank in range(2)}, {1: {"ANSWER_SECONDS": 1.0}})
    assert f"cannot listen at port {port}, as another program of this host does" in host
    assert f"at 127.0.0.1:{port} is not rank 0 of this job, but some other program" in guest


def test_an_address_of_another_machine_is_named_by_rank_0() -> None:
    strange = {"MASTER_ADDR": "127.0.0.1"}
    host, _ = errors({0: {"MASTER_ADDR": "192.0.2.1"}, 1: strange}, {0: {"PATIENCE_SECONDS": 0.5}, 1: IMPATIENT})
    assert "does not reach itself at 192.0.2.1" in host
    assert "MASTER_ADDR is not this host's address, or this host is not rank 0" in host


def test_an_interface_that_is_not_there_is_named_on_every_rank() -> None:
    found = errors({1: {"GLOO_SOCKET_IFNAME": "eth99"}})
    assert all("rank 1 (host " in error for error in found)
    assert all("has no interface GLOO_SOCKET_IFNAME='eth99'. It has lo" in error for error in found)
    assert "NCCL_SOCKET_IFNAME='=ib7'" in errors({0: {"NCCL_SOCKET_IFNAME": "=ib7"}})[1]
    assert errors({0: {"NCCL_SOCKET_IFNAME": "^docker,l"}}) == ["", ""]


def test_two_processes_with_one_number_are_named_on_every_rank() -> None:
    found = run_ranks(meets, 3, free_port(), {2: {"RANK": "1"}}, {})
    assert all(error.startswith("Two processes are rank 1: on host ") for error in found)


def test_unlike_versions_are_named_on_every_rank() -> None:
    found = errors(None, {1: {"__version__": "0.0.1"}})
    assert all(error.startswith("The ranks do not have the same paceline: most have ") for error in found)
    assert all(") has 0.0.1. Install and give the same on every node." in error for error in found)


def fits_as(strategies: list[str]) -> None:
    tiny_trainer(strategy=strategies[int(os.environ["RANK"])]).fit(Regression(), loader(8))


def test_unlike_strategies_are_named_on_every_rank() -> None:
    """As where "auto" found another amount of memory on another node."""
    with pytest.raises(RanksFailed) as failed:
        run_ranks(fits_as, 3, ["ddp", "ddp", "fsdp"])
    for error in failed.value.errors.values():
        assert re.match(
            r"The ranks do not have the same strategy: most have DDP, rank 2 \(host .*\) has FSDP\.", error.message
        )


def test_unlike_code_is_named_on_every_rank(tmp_path: Path) -> None:
    for rank in range(3):
        (tmp_path / f"{rank}").mkdir()
        (tmp_path / f"{rank}" / "train.py").write_text("import model")
        (tmp_path / f"{rank}" / "model.py").write_text(f"layers = {min(rank, 1)}")
    for error in run_ranks(meets_with_code, 3, free_port(), str(tmp_path)):
        assert error.startswith("The ranks do not have the same module model: most have ")
        assert ", rank 0 (host " in error


def meets_with_code(port: int, folder: str) -> str:
    sys.path.insert(0, f"{folder}/{os.environ['RANK']}")
    sys.argv = [f"{sys.path[0]}/train.py"]
    importlib.import_module("model")
    try:
        return meets(port, {}, {})
    finally:
        del sys.modules["model"]


def test_a_node_that_is_late_is_named_and_waited_for(tmp_path: Path) -> None:
    port = free_port()
    Path("train.py").write_text("")

    def node(rank: int, devices: int) -> tuple[object, ...]:
        here = ("--num-nodes", 2, "--node-rank", rank, "--master-addr", "127.0.0.1", "--master-port", port)
        return (*PACELINE, "launch", "--devices", devices, *here, "train.py")

    with start_command(*node(0, 1)) as first:
        first.wait_for_output(f") waits at 127.0.0.1:{port} for node 1.")
        with start_command(*node(1, 2)) as second:
            results = [first.wait(), second.wait()]
    assert [result.returncode for result in results] == [1, 1]
    for result in results:
        assert "The nodes do not have the same --devices: most have 1, node 1 (host " in result.stderr


RESTARTED = """
import os, sys, time
sys.path.insert(0, {tests!r})
from helpers.tiny import Regression, loader, tiny_trainer
from paceline.callbacks import ModelCheckpoint

attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), os.environ["RANK"]

class Fails(Regression):
    def on_train_start(self):
        # The line and its end in one write: the other rank writes to the same pipe.
        print(f"rank {{rank}} begins at step {{self.trainer.global_step}}\\n", end="", flush=True)

    def training_step(self, batch, batch_idx):
        if attempt == 0 and self.trainer.global_step == 2 and rank == "1":
            os._exit(3)
        return super().training_step(batch, batch_idx)

if rank == "0":
    time.sleep(attempt)  # rank 1 comes first, and finds at the store what it left there
saving = ModelCheckpoint(every_n_train_steps=1, async_save=False)
tiny_trainer(strategy="ddp", callbacks=saving, enable_checkpointing=True).fit(Fails(), loader(8, 1))
"""


def test_ranks_that_torchrun_restarted_meet_anew_and_go_on(tmp_path: Path) -> None:
    Path("train.py").write_text(RESTARTED.format(tests=str(Path(__file__).resolve().parents[1])))
    torchrun = ("python", "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1")
    result = run_command(*torchrun, "--nproc-per-node=2", "--max-restarts=1", "train.py")
    assert result.returncode == 0, result.stderr
    begun = [f"rank {rank} begins at step {step}" for rank in range(2) for step in (0, 2)]
    assert sorted(line for line in result.stdout.splitlines() if "begins" in line) == begun
