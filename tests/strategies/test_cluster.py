"""A process's place in its job, read from what launchers put into the environment; no launcher is needed here."""

from __future__ import annotations

import pytest

from paceline.errors import LaunchError
from paceline.strategies.cluster import Cluster, find_cluster, first_host, rendezvous_environment

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1",
    "MASTER_ADDR": "node1", "MASTER_PORT": "29500",
}  # fmt: skip
SLURM = {
    "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_NTASKS": "4", "SLURM_NNODES": "2",
    "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "4711", "SLURM_STEP_NODELIST": "gpu[07-09],login", "SLURM_JOB_NAME": "train",
}  # fmt: skip
MPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_MCA_ess_base_jobid": "1234",
}  # fmt: skip


def test_a_process_that_nobody_launched_has_no_cluster() -> None:
    assert find_cluster({}) is None
    assert find_cluster({"WORLD_SIZE": "2"}) is None
    assert find_cluster({"RANK": "2"}) is None


def test_a_rank_of_torchrun_knows_its_place() -> None:
    cluster = find_cluster(TORCHRUN)
    assert cluster == Cluster(5, 8, 1, 4, 1, "torchrun")
    assert cluster.num_nodes == 2


def test_rank_and_world_size_alone_mean_one_node() -> None:
    assert find_cluster({"RANK": "1", "WORLD_SIZE": "4"}) == Cluster(1, 4, 1, 4, 0, "torchrun")


def test_torchrun_inside_a_slurm_task_counts() -> None:
    assert find_cluster(SLURM | TORCHRUN) == Cluster(5, 8, 1, 4, 1, "torchrun")


def test_a_task_of_srun_knows_its_place() -> None:
    cluster = find_cluster(SLURM)
    assert cluster == Cluster(3, 4, 1, 2, 1, "SLURM")
    assert cluster.num_nodes == 2


@pytest.mark.parametrize("missing", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_STEP_ID"])
def test_a_shell_in_an_allocation_is_no_task(missing: str) -> None:
    assert find_cluster({name: value for name, value in SLURM.items() if name != missing}) is None


@pytest.mark.parametrize("name", ["bash", "interactive"])
def test_an_interactive_shell_under_srun_is_no_task(name: str) -> None:
    assert find_cluster(SLURM | {"SLURM_JOB_NAME": name}) is None


def test_a_process_of_mpi_knows_its_place() -> None:
    assert find_cluster(MPI) == Cluster(3, 4, 1, 2, 1, "MPI")


def test_the_rank_of_a_process_on_its_node_is_not_taken_for_the_node_by_openmpi_5() -> None:
    """There, OMPI_COMM_WORLD_NODE_RANK counts the processes of a node, not the nodes."""
    found = find_cluster(MPI | {"OMPI_COMM_WORLD_NODE_RANK": "0", "PMIX_RANK": "3", "PMIX_NAMESPACE": "prte-1@2"})
    assert found is not None
    assert found.node_rank == 1


def test_torchruns_rendezvous_needs_nothing_more() -> None:
    cluster = find_cluster(TORCHRUN)
    assert cluster is not None
    assert rendezvous_environment(cluster, TORCHRUN) == {}


def test_slurms_rendezvous_is_at_the_first_host_and_a_port_made_from_the_job() -> None:
    cluster = find_cluster(SLURM)
    assert cluster is not None
    added = rendezvous_environment(cluster, SLURM)
    assert added == {
        "MASTER_ADDR": "gpu07", "MASTER_PORT": "19711", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
    }  # fmt: skip
    others = SLURM | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    other = find_cluster(others)
    assert other is not None
    same = rendezvous_environment(other, others)
    assert (same["MASTER_ADDR"], same["MASTER_PORT"]) == (added["MASTER_ADDR"], added["MASTER_PORT"])


def test_what_the_user_set_stays() -> None:
    cluster = find_cluster(SLURM)
    assert cluster is not None
    added = rendezvous_environment(cluster, SLURM | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    assert "MASTER_ADDR" not in added
    assert "MASTER_PORT" not in added


def test_mpis_rendezvous_is_on_this_host_and_the_port_is_a_valid_one() -> None:
    here = MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}
    cluster = find_cluster(here)
    assert cluster is not None
    added = rendezvous_environment(cluster, here)
    assert added["MASTER_ADDR"] == "127.0.0.1"
    assert 1024 < int(added["MASTER_PORT"]) < 65536


def test_mpi_across_nodes_needs_an_address_from_the_user() -> None:
    cluster = find_cluster(MPI)
    assert cluster is not None
    with pytest.raises(LaunchError, match=r"MPI started 2 nodes.*mpirun -x MASTER_ADDR=HOST"):
        rendezvous_environment(cluster, MPI)
    assert "MASTER_ADDR" not in rendezvous_environment(cluster, MPI | {"MASTER_ADDR": "10.0.0.1"})


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("node", "node"),
        ("node7", "node7"),
        ("a,b", "a"),
        ("node[07-09,12],other", "node07"),
        ("node[3,5]", "node3"),
        ("rack1-node[003-004].cluster", "rack1-node003.cluster"),
        ("10.0.0.1", "10.0.0.1"),
    ],
)
def test_the_first_host_of_slurms_compact_lists(node_list: str, host: str) -> None:
    assert first_host(node_list) == host
