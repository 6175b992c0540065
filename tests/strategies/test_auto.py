"""`choose`: from the Trainer's four arguments and the environment to a strategy and its devices.

Machines with accelerators are played by replacing torch's own questions about them; nothing of ours is replaced.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from paceline.errors import ConfigurationError, LaunchError
from paceline.strategies import DDP, SingleDevice, ddp, single  # noqa: F401  registers them
from paceline.strategies.auto import Choice, choose
from paceline.strategies.cluster import Cluster

from helpers.ranks import RanksFailed, run_ranks
from helpers.tiny import Regression, loader, tiny_trainer

TWO_RANKS = Cluster(rank=1, world_size=2, local_rank=1, local_world_size=2, node_rank=0, found_by="torchrun")
TWO_NODES = Cluster(rank=3, world_size=4, local_rank=1, local_world_size=2, node_rank=1, found_by="SLURM")


def choice(
    strategy: Any = "auto", accelerator: str = "auto", devices: Any = "auto", num_nodes: int = 1,
    cluster: Cluster | None = None, can_launch: bool = True,
) -> Choice:  # fmt: skip
    return choose(strategy, accelerator, devices, num_nodes, cluster, can_launch)


@pytest.fixture(autouse=True)
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_with(monkeypatch, None, 0)


def machine_with(monkeypatch: pytest.MonkeyPatch, kind: str | None, count: int) -> None:
    device = None if kind is None else torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: device)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)


# --- devices --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("devices", "indices"),
    [
        ("auto", [0, 1, 2, 3]), (-1, [0, 1, 2, 3]), ("-1", [0, 1, 2, 3]),
        (2, [0, 1]), ("2", [0, 1]), (1, [0]),
        ([1, 3], [1, 3]), ((2,), [2]), ("1,3", [1, 3]), ("2,", [2]), ("0, 1", [0, 1]),
    ],
)  # fmt: skip
def test_the_spellings_of_devices(monkeypatch: pytest.MonkeyPatch, devices: Any, indices: list[int]) -> None:
    machine_with(monkeypatch, "cuda", 4)
    chosen = choice(devices=devices)
    assert chosen.devices == [torch.device("cuda", index) for index in indices]
    assert chosen.ranks_here == len(indices)
    assert chosen.strategy.distributed == (len(indices) > 1)


@pytest.mark.parametrize("devices", ["auto", -1, 2, "2"])
def test_srun_may_show_each_rank_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch, devices: Any) -> None:
    machine_with(monkeypatch, "cuda", 1)
    chosen = choice(devices=devices, cluster=TWO_NODES)
    assert (chosen.ranks_here, chosen.num_nodes) == (2, 2)
    assert chosen.device_of(1) == torch.device("cuda", 0)
    with pytest.raises(ConfigurationError, match="has 1 cuda device"):
        choice(devices=devices, cluster=TWO_RANKS)


@pytest.mark.parametrize(("devices", "ranks"), [("auto", 1), (-1, 1), (1, 1), (3, 3), ("2", 2), ("0,1", 2)])
def test_any_number_of_ranks_may_share_the_cpu(devices: Any, ranks: int) -> None:
    chosen = choice(accelerator="cpu", devices=devices)
    assert chosen.devices == [torch.device("cpu")]
    assert chosen.ranks_here == ranks
    assert [chosen.device_of(rank).type for rank in range(ranks)] == ["cpu"] * ranks


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (8, r"devices=8, but this machine has 4 cuda device\(s\). Use devices=4, or 'auto'"),
        ("8", r"devices=8, but this machine has 4 cuda device\(s\)"),
        ([0, 4], r"devices=\[0, 4\]: this machine has cuda devices 0 to 3, each once"),
        ([1, 1], r"devices=\[1, 1\]: this machine has cuda devices 0 to 3, each once"),
        (0, "devices=0 is too few. Use a number of at least 1, -1 or 'auto'"),
        (-2, "devices=-2 is too few"),
        ([], r"devices=\[\] is not understood. Use a number, a list of indices, -1 or 'auto'"),
        ([-1], r"devices=\[-1\] is not understood"),
        ("all", r"devices='all' is not understood. Use a number \('2'\), indices \('0,1'\), '-1' or 'auto'"),
        ("1-2", "devices='1-2' is not understood"),
        (True, "devices=True is not understood"),
        (2.0, "devices=2.0 is not understood"),
        (None, "devices=None is not understood"),
    ],
)
def test_devices_that_are_not_there_or_not_understood(
    monkeypatch: pytest.MonkeyPatch, devices: Any, message: str
) -> None:
    machine_with(monkeypatch, "cuda", 4)
    with pytest.raises(ConfigurationError, match=message):
        choice(devices=devices)


def test_too_many_devices_are_refused_when_the_trainer_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_with(monkeypatch, "cuda", 2)
    with pytest.raises(ConfigurationError, match=r"devices=8, but this machine has 2 cuda device\(s\)"):
        tiny_trainer(accelerator="gpu", devices=8)


def test_more_ranks_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_with(monkeypatch, "cuda", 1)
    with pytest.raises(ConfigurationError, match=r"torchrun started 2 rank\(s\) on this node, but .* 1 cuda device"):
        choice(cluster=TWO_RANKS)


@pytest.mark.parametrize("strategy", ["auto", "single"])
def test_where_ranks_cannot_be_started_auto_takes_one_device(monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    machine_with(monkeypatch, "cuda", 4)
    assert choice(strategy, can_launch=strategy != "auto").devices == [torch.device("cuda", 0)]


def test_mps_is_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_with(monkeypatch, "mps", 1)
    chosen = choice(accelerator="mps")
    assert chosen.devices == [torch.device("mps", 0)]
    assert isinstance(chosen.strategy, SingleDevice)


# --- accelerators ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("accelerator", ["auto", "gpu", "cuda"])
def test_an_accelerator_that_is_there_is_used(monkeypatch: pytest.MonkeyPatch, accelerator: str) -> None:
    machine_with(monkeypatch, "cuda", 1)
    assert choice(accelerator=accelerator).devices[0].type == "cuda"


def test_the_cpu_can_be_asked_for_beside_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_with(monkeypatch, "cuda", 4)
    assert choice(accelerator="cpu").devices == [torch.device("cpu")]


@pytest.mark.parametrize("accelerator", ["gpu", "cuda", "mps", "tpu"])
def test_an_accelerator_that_is_not_there_is_an_error(accelerator: str) -> None:
    with pytest.raises(ConfigurationError, match=f"accelerator='{accelerator}', but torch finds no accelerator"):
        choice(accelerator=accelerator)


def test_another_accelerator_than_the_one_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_with(monkeypatch, "cuda", 1)
    with pytest.raises(ConfigurationError, match="accelerator='mps', but torch finds cuda"):
        choice(accelerator="mps")


@pytest.mark.parametrize(("wrong", "right"), [("cpus", "cpu"), ("gpus", "gpu"), ("cuda:0", "cuda"), ("ato", "auto")])
def test_an_unknown_accelerator_names_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(ConfigurationError, match=f"accelerator='{wrong}' is not known. Did you mean '{right}'"):
        tiny_trainer(accelerator=wrong)


# --- strategies -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("dpp", "ddp"),
        ("DDP", "ddp"),
        ("singel", "single"),
        ("ddp_find_unused_parameters", "ddp_find_unused_parameters_true"),
    ],
)
def test_an_unknown_strategy_names_the_nearest_and_lists_all(wrong: str, right: str) -> None:
    with pytest.raises(ConfigurationError, match=f"strategy='{wrong}' is not known. Did you mean '{right}'.*'single'"):
        tiny_trainer(strategy=wrong)


def test_something_else_than_a_strategy_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match=r"strategy=<class .*> is not known"):
        tiny_trainer(strategy=DDP)


def test_a_strategy_object_is_used_as_it_is() -> None:
    strategy = DDP(bucket_cap_mb=1)
    assert choice(strategy, "cpu", 2).strategy is strategy


def test_auto_is_one_process_for_one_device_and_ddp_for_several() -> None:
    assert isinstance(choice(devices=1).strategy, SingleDevice)
    assert isinstance(choice(devices=2).strategy, DDP)
    assert isinstance(choice(devices=1, num_nodes=2).strategy, DDP)


@pytest.mark.parametrize("devices", [2, "0,1"])
def test_a_strategy_for_one_process_with_several_devices_is_an_error(devices: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"'SingleDevice' runs in one process, but devices=.* make 2 ranks"):
        choice("single", "cpu", devices)


# --- what a launcher started ----------------------------------------------------------------------------------------
def test_auto_takes_as_many_ranks_as_were_started() -> None:
    chosen = choice(cluster=TWO_NODES)
    assert (chosen.ranks_here, chosen.num_nodes) == (2, 2)
    assert isinstance(chosen.strategy, DDP)


def test_each_rank_has_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_with(monkeypatch, "cuda", 4)
    assert choice(devices="2,3", cluster=TWO_RANKS).device_of(1) == torch.device("cuda", 3)


def test_devices_that_contradict_the_launcher_are_an_error() -> None:
    with pytest.raises(ConfigurationError, match=r"devices=3 asks for 3 rank\(s\) a node, but torchrun started 2"):
        choice(devices=3, cluster=TWO_RANKS)


def test_nodes_that_contradict_the_launcher_are_an_error() -> None:
    with pytest.raises(ConfigurationError, match=r"num_nodes=3, but SLURM started 2\. Leave num_nodes out, or start 3"):
        choice(num_nodes=3, cluster=TWO_NODES)


def single_in_a_job() -> None:
    tiny_trainer(strategy="single")


def test_single_in_a_job_of_two_ranks_is_an_error_on_both() -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(single_in_a_job, 2)
    assert all("runs in one process" in error.message for error in failed.value.errors.values())
    assert len(failed.value.errors) == 2


# --- what is said, and when ranks start -----------------------------------------------------------------------------
def test_what_was_chosen_is_printed_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    tiny_trainer(accumulate_grad_batches=3).fit(Regression(), loader(12))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("paceline:")]
    assert lines == [
        "paceline: SingleDevice (one process), 1 x cpu, precision 32-true, global batch 6 = 2 x 3 x 1, seed 0"
    ]


def fit_two_ranks() -> None:
    tiny_trainer().fit(Regression(), loader(12))


def test_only_rank_0_says_what_was_chosen() -> None:
    first, second = run_ranks(fit_two_ranks, 2).outputs
    assert "paceline: DDP (auto: states of " in first
    assert "2 x cpu, precision 32-true, global batch 4 = 2 x 1 x 2" in first
    assert "paceline:" not in second


def test_building_a_trainer_starts_nothing_and_fit_does() -> None:
    trainer = tiny_trainer(strategy="ddp", devices=2)
    assert trainer.world_size == 2
    with pytest.raises(LaunchError, match=r"devices=2 needs 2 processes.*pytest is running.*torchrun.*devices=1"):
        trainer.fit(Regression(), loader(12))
