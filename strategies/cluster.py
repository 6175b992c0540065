"""Who this process is in a job: read from what torchrun, SLURM's srun or MPI put into the environment.

`find_cluster()` is None in a process that nobody launched. Nothing here communicates.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import LaunchError


@dataclass(frozen=True)
class Cluster:
    """One process's place among the processes of a job."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    found_by: str
    store: Any = None
    """Where the ranks have met already; None: torch's `env://` says."""

    @property
    def num_nodes(self) -> int:
        """How many nodes take part, each with as many processes as this one."""
        return max(1, self.world_size // self.local_world_size)


def find_cluster(environ: Mapping[str, str] | None = None) -> Cluster | None:
    """The place that a launcher gave this process; None where there is no launcher."""
    env = os.environ if environ is None else environ
    if "RANK" in env and "WORLD_SIZE" in env:
        world_size = int(env["WORLD_SIZE"])
        local_world_size = int(env.get("LOCAL_WORLD_SIZE", world_size))
        rank = int(env["RANK"])
        return Cluster(
            rank=rank,
            world_size=world_size,
            local_rank=int(env.get("LOCAL_RANK", rank % local_world_size)),
            local_world_size=local_world_size,
            node_rank=int(env.get("GROUP_RANK", rank // local_world_size)),
            found_by="torchrun",
        )
    if _started_by_srun(env):
        tasks = int(env["SLURM_NTASKS"])
        nodes = int(env.get("SLURM_NNODES", env.get("SLURM_JOB_NUM_NODES", "1")))
        return Cluster(
            rank=int(env["SLURM_PROCID"]),
            world_size=tasks,
            local_rank=int(env["SLURM_LOCALID"]),
            local_world_size=max(1, tasks // nodes),
            node_rank=int(env["SLURM_NODEID"]),
            found_by="SLURM",
        )
    if "OMPI_COMM_WORLD_RANK" in env:
        rank, local = int(env["OMPI_COMM_WORLD_RANK"]), int(env["OMPI_COMM_WORLD_LOCAL_SIZE"])
        return Cluster(
            rank=rank,
            world_size=int(env["OMPI_COMM_WORLD_SIZE"]),
            local_rank=int(env["OMPI_COMM_WORLD_LOCAL_RANK"]),
            local_world_size=local,
            node_rank=int(env.get("OMPI_COMM_WORLD_NODE_RANK", rank // local))
            if "PMIX_RANK" not in env
            else rank // local,
            found_by="MPI",
        )
    return None


def _started_by_srun(env: Mapping[str, str]) -> bool:
    """True in a task that srun started; a shell inside an allocation has the job's variables but is no task.

    `srun --pty bash` gives its shell a rank too, which is told by the step's name.
    """
    if not {"SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_STEP_ID"} <= env.keys():
        return False
    return env.get("SLURM_JOB_NAME") not in {"bash", "interactive"}


def rendezvous_environment(cluster: Cluster, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """What torch's `env://` still lacks under SLURM and MPI: the address and port of rank 0, rank and world size.

    SLURM: the first host of the node list and a port made from the job's number. MPI across nodes names no host:
    set MASTER_ADDR yourself; LaunchError without.
    """
    env = os.environ if environ is None else environ
    if cluster.found_by == "MPI" and cluster.num_nodes > 1 and "MASTER_ADDR" not in env:
        raise LaunchError(
            f"MPI started {cluster.num_nodes} nodes, but tells none of them where rank 0 is. Set MASTER_ADDR to the "
            "address of its host: mpirun -x MASTER_ADDR=HOST ..."
        )
    job = re.sub(r"\D", "", env.get("SLURM_JOB_ID", env.get("OMPI_MCA_ess_base_jobid", env.get("PMIX_NAMESPACE", ""))))
    host = first_host(env["SLURM_STEP_NODELIST"]) if "SLURM_STEP_NODELIST" in env else "127.0.0.1"
    wanted = {
        "MASTER_ADDR": host,
        "MASTER_PORT": str(15_000 + int(job or 0) % 20_000),
        "RANK": str(cluster.rank),
        "WORLD_SIZE": str(cluster.world_size),
        "LOCAL_RANK": str(cluster.local_rank),
        "LOCAL_WORLD_SIZE": str(cluster.local_world_size),
    }
    return {name: value for name, value in wanted.items() if name not in env}


def first_host(node_list: str) -> str:
    """The first host of SLURM's compact list: "node[07-09,12],other" gives "node07"."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", node_list)
    if match is None:
        return node_list
    prefix, number, suffix = match.groups()
    return prefix + (number or "") + (suffix or "")
