"""`two_nodes`: two network namespaces joined by a cable, each a node of a cluster with an address of its own.

    with two_nodes() as nodes:
        results = run_on(nodes, "train.py", ranks=2)      # one torchrun a node, in one job

It needs root and `ip` of iproute2; where the machine forbids it, `why_no_nodes()` says so.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache

from helpers.scripts import Environment, RunningScript, ScriptResult, start_command


@dataclass(frozen=True)
class Node:
    """A network namespace, its interface and its address."""

    name: str
    interface: str
    address: str


@cache
def why_no_nodes() -> str:
    """Why this machine can have no namespaces; "" if it can."""
    if shutil.which("ip") is None:
        return "ip of iproute2 is not installed"
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with two_nodes():
            return ""
    except subprocess.CalledProcessError as error:
        return f"network namespaces are forbidden here: {error.stderr.strip()}"


@contextmanager
def two_nodes() -> Iterator[list[Node]]:
    """Two nodes that reach each other and nothing else; gone afterwards."""
    token = secrets.token_hex(3)
    subnet = f"10.{secrets.randbelow(200) + 20}.{secrets.randbelow(250)}"
    nodes = [Node(f"pl-{token}-{i}", f"v{token}{i}", f"{subnet}.{i + 1}") for i in range(2)]
    try:
        for node in nodes:
            _ip("netns", "add", node.name)
        first, second = nodes
        _ip("link", "add", first.interface, "netns", first.name, "type", "veth", "peer", "name", second.interface,
            "netns", second.name)  # fmt: skip
        for node in nodes:
            _ip("-n", node.name, "addr", "add", f"{node.address}/24", "dev", node.interface)
            _ip("-n", node.name, "link", "set", node.interface, "up")
            _ip("-n", node.name, "link", "set", "lo", "up")
        yield nodes
    finally:
        for node in nodes:
            subprocess.run(["ip", "netns", "del", node.name], capture_output=True, check=False)


@contextmanager
def start_on(
    nodes: list[Node], node: int, program: tuple[str, ...], ranks: int, env: Environment
) -> Iterator[RunningScript]:
    """torchrun of one node."""
    at = nodes[node]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(nodes)), "--node-rank", str(node)]
    with start_command(
        "ip", "netns", "exec", at.name, *torchrun, "--nproc-per-node", str(ranks), "--master-addr", nodes[0].address,
        "--master-port", "29500", *program, env=env, timeout_seconds=150,
    ) as running:  # fmt: skip
        yield running


def run_on(nodes: list[Node], *program: str, ranks: int = 2, env: Environment | None = None) -> list[ScriptResult]:
    """One job over all nodes; the result of each node's torchrun."""
    with ExitStack() as stack:
        running = [stack.enter_context(start_on(nodes, i, program, ranks, env or {})) for i in range(len(nodes))]
        return [job.wait() for job in running]


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
