"""`meet`: the processes of a job find each other, and what is wrong between them is named within seconds.

All reach the store of process 0 (torch's key-value server), lay down who they are, and get one verdict: an address, a
port or a network interface that leads nowhere, a place taken twice, unlike software. The nodes of `paceline launch`
meet, and then the ranks, whoever started them, before they connect: torch itself would wait half an hour.
A process that is not there yet is no error, for a scheduler may start nodes minutes apart: it is named and waited for.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed import DistError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from .. import __version__
from ..errors import LaunchError

if TYPE_CHECKING:
    from ..strategies.cluster import Cluster

PATIENCE_SECONDS = 5.0
"""After this long it is said what is waited for, and a listener must have taken a connection."""
ANSWER_SECONDS = 15.0
"""After this long a store must have answered; torch is seen to take 5 seconds for it at times, alone on one host."""
MEETING_SECONDS = 900.0
"""How long one process waits for the others."""


@dataclass(frozen=True)
class Place:
    """Process `index` of `count`, all of one `kind` ("rank" or "node"), who meet at `address` and `port`."""

    kind: str
    index: int
    count: int
    address: str
    port: int
    opens_store: bool
    speaks: bool = True

    def __str__(self) -> str:
        return f"{self.kind} {self.index} (host {socket.gethostname()})"


def meet_ranks(cluster: Cluster, environment: Mapping[str, str], **alike: object) -> Store | None:
    """`meet` for the ranks of a job, where torch's variables in `environment` say; None for one rank alone.

    Returns a store for torch to connect with: one of this attempt, without what ranks left there that torchrun
    restarted since, which gloo would take for living ones.
    """
    if cluster.world_size == 1 or torch.distributed.is_initialized():
        return None
    if not environment["MASTER_PORT"].isdigit():
        raise LaunchError(f"MASTER_PORT={environment['MASTER_PORT']!r} is not a number.")
    by_launcher = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    place = Place(
        "rank",
        cluster.rank,
        cluster.world_size,
        environment["MASTER_ADDR"],
        int(environment["MASTER_PORT"]),
        opens_store=cluster.rank == 0 and not by_launcher,
        speaks=cluster.local_rank == 0,
    )
    store = _reach(place)
    with closing(socket.socket()) as listener:
        network = _network(place, listener) if cluster.num_nodes > 1 else {}
        attempt, listening = _agreed(store, place, "facts", _facts(place, **alike) | network, _judge_facts)
        if any(listening):
            _agreed(store, place, "links", _link(place, listening), _judge_links)
    return PrefixStore(attempt, store)


def meet(place: Place, **alike: object) -> None:
    """Wait for all others; `alike` is what must be equal everywhere beside the software.

    Raises LaunchError, on every process that was reached.
    """
    _agreed(_reach(place), place, "facts", _facts(place, **alike), _judge_facts)


# --- reaching the store -----------------------------------------------------------------------------------------------
_opened: list[Store] = []  # the ends of connections: others reach them as long as this process lives


def _reach(place: Place) -> Store:
    """A connection to the store of process 0, which this process opens first if it is that one."""
    where = f"{place.address}:{place.port}"
    try:
        socket.getaddrinfo(place.address, place.port)
    except OSError as error:
        raise LaunchError(
            f"{place} does not know the address {place.address!r} ({error.strerror}), where {place.kind} 0 should be. "
            f"Give {_ADDRESS[place.kind]} as a name or number that every node knows."
        ) from error
    try:
        if place.opens_store:
            _opened.append(_store("localhost", place.port, is_master=True))
    except RuntimeError as error:
        raise LaunchError(
            f"{place} cannot listen at port {place.port}, as another program of this host does. Choose a free one, "
            f"{_PORT[place.kind]}, and give it on every node."
        ) from error
    _wait_for_listener(place, where)
    reached: list[Store] = []

    def connect() -> None:
        with suppress(RuntimeError):
            reached.append(_store(place.address, place.port))

    connecting = threading.Thread(target=connect, daemon=True)  # torch waits for an answer without end
    connecting.start()
    connecting.join(ANSWER_SECONDS)
    if not reached:
        raise LaunchError(
            f"What answers {place} at {where} is not {place.kind} 0 of this job, but some other program. Choose a port "
            f"that is free on the host of {place.kind} 0, {_PORT[place.kind]}, and give it on every node."
        )
    return reached[0]


def _store(address: str, port: int, is_master: bool = False) -> Store:
    store = TCPStore(
        address,
        port,
        is_master=is_master,
        timeout=timedelta(seconds=ANSWER_SECONDS),
        wait_for_workers=False,
        multi_tenant=True,  # torch, which opens a store there next, shares it
    )
    store.set_timeout(timedelta(seconds=MEETING_SECONDS))
    return store


_ADDRESS = {"rank": "MASTER_ADDR", "node": "--master-addr"}
_PORT = {"rank": "MASTER_PORT", "node": "--master-port"}


def _wait_for_listener(place: Place, where: str) -> None:
    waiting = _Waiting(place)
    while error := _unreachable(place.address, place.port):
        if place.opens_store:
            raise LaunchError(
                f"{place} listens at port {place.port}, but does not reach itself at {where}: {error}. Either "
                f"{_ADDRESS[place.kind]} is not this host's address, or this host is not {place.kind} 0."
            )
        waiting.go_on(
            f"for {place.kind} 0 at {where}: {error} so far. If it is started, then the address "
            f"({_ADDRESS[place.kind]}), the port ({_PORT[place.kind]}) or a firewall is wrong"
        )


def _unreachable(host: str, port: int) -> str:
    """Why nothing can be reached there; "" if something listens."""
    try:
        socket.create_connection((host, port), timeout=PATIENCE_SECONDS).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


class _Waiting:
    """Sleeps between looks, says once what is waited for, and gives up in the end."""

    def __init__(self, place: Place) -> None:
        self._place, self._started, self._said, self._pause = place, time.monotonic(), False, 0.002

    def go_on(self, what: str) -> None:
        waited = time.monotonic() - self._started
        if waited > MEETING_SECONDS:
            raise LaunchError(f"{self._place} waited {MEETING_SECONDS / 60:.0f} minutes {what}.")
        if waited > PATIENCE_SECONDS and not self._said and self._place.speaks:
            print(f"paceline: {self._place} waits {what}.", file=sys.stderr, flush=True)
            self._said = True
        time.sleep(self._pause)
        self._pause = min(2 * self._pause, 0.25)


# --- one verdict ------------------------------------------------------------------------------------------------------
def _agreed(table: Store, place: Place, stage: str, mine: Any, judge: Callable[[Place, list[Any]], Any]) -> Any:
    """What process 0's `judge` returns for everybody's `mine`, on all; LaunchError on all where it raises that."""
    store = PrefixStore(f"paceline/{place.kind}", table)
    keys = [f"{stage}/{index}" for index in range(place.count)]
    verdict, text = f"{stage}/verdict", json.dumps(mine)
    holder = store.compare_set(keys[place.index], "", text).decode()
    if holder != text:
        hosts = f"host {json.loads(holder)['host']} and on host {mine['host']}"
        error = f"Two processes are {place.kind} {place.index}: on {hosts}. Give each {place.kind} its own number."
        store.set(verdict, json.dumps({"error": error}))
    waiting = _Waiting(place)
    while not store.check([verdict]):
        if place.index > 0:
            waiting.go_on(f"for {place.kind} 0 at {place.address}:{place.port} to see the others")
        elif missing := [str(index) for index, key in enumerate(keys) if not store.check([key])]:
            some = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
            waiting.go_on(f"at {place.address}:{place.port} for {place.kind} {some}")
        else:
            shares = [json.loads(store.get(key)) for key in keys]
            store.set(verdict, json.dumps(_judged(place, shares, judge)))
    found = json.loads(store.get(verdict))
    with suppress(DistError):  # process 0 has gone, and the store with it
        _leave(store, place, stage, [*keys, verdict])
    if "error" in found:
        raise LaunchError(found["error"])
    return found["result"]


def _judged(place: Place, shares: list[Any], judge: Callable[[Place, list[Any]], Any]) -> dict[str, Any]:
    try:
        return {"result": judge(place, shares)}
    except LaunchError as error:
        return {"error": str(error)}


def _leave(store: Store, place: Place, stage: str, keys: list[str]) -> None:
    """The last one clears the table for the next attempt at the same store; who opened it waits until all have read."""
    if store.add(f"{stage}/left", 1) == place.count:
        for key in (*keys, f"{stage}/left"):
            store.delete_key(key)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while place.opens_store and store.check([f"{stage}/verdict"]) and time.monotonic() < deadline:
        time.sleep(0.01)


# --- software ---------------------------------------------------------------------------------------------------------
def _facts(place: Place, **alike: object) -> dict[str, Any]:
    """Who this is and what must be the same everywhere: versions, `alike`, and checksums of source files."""
    facts = {
        "paceline": __version__,
        "torch": str(torch.__version__),
        "python": ".".join(platform.python_version_tuple()[:2]),
        **{name: str(value) for name, value in alike.items()},
        **{what: hashlib.sha256(file.read_bytes()).hexdigest()[:12] for what, file in _sources()},
    }
    return {"who": str(place), "host": socket.gethostname(), "token": secrets.token_hex(8), "facts": facts}


def _sources() -> Iterator[tuple[str, Path]]:
    """The program, and the modules of its folder and of Paceline that are imported by now."""
    program = Path(sys.argv[0]).resolve() if sys.argv and os.path.isfile(sys.argv[0]) else None
    if program is not None:
        yield f"program {program.name}", program
    for name, module in list(sys.modules.items()):
        path = Path(getattr(module, "__file__", None) or "")
        own = name.partition(".")[0] == (__package__ or "").partition(".")[0]
        beside = program is not None and path.is_relative_to(program.parent) and "site-packages" not in path.parts
        if (own or beside) and name != "__main__" and path.suffix == ".py" and path.is_file():
            yield f"module {name}", path


def _judge_facts(place: Place, shares: list[Any]) -> tuple[str, list[Any]]:
    """A name for this attempt, and where each process listens; LaunchError for what is wrong."""
    for share in shares:
        if "problem" in share:
            raise LaunchError(share["problem"])
    for fact in dict.fromkeys(fact for share in shares for fact in share["facts"]):
        held = {share["who"]: share["facts"][fact] for share in shares if fact in share["facts"]}
        usual, _ = Counter(held.values()).most_common(1)[0]
        others = [f"{who} has {value}" for who, value in held.items() if value != usual]
        if others:
            raise LaunchError(
                f"The {place.kind}s do not have the same {fact}: most have {usual}, {'; '.join(others[:4])}. Install "
                "and give the same on every node."
            )
    return shares[0]["token"], [share.get("listens") for share in shares]


# --- network interfaces -----------------------------------------------------------------------------------------------
def _network(place: Place, listener: socket.socket) -> dict[str, Any]:
    """Where the other nodes should reach this process through gloo, "listens", or the "problem" with that.

    Without GLOO_SOCKET_IFNAME gloo takes what the host's name resolves to, often 127.0.1.1, so the variable is set to
    the interface that leads to process 0.
    """
    there, addresses = [name for _, name in socket.if_nameindex()], _addresses()
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        for name in filter(None, os.environ.get(variable, "").split(",")):
            if name not in there and not (variable == "NCCL_SOCKET_IFNAME" and _is_nccls(name, there)):
                return {"problem": f"{place} has no interface {variable}={name!r}. It has {', '.join(there)}."}
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
            probe.connect((place.address, place.port))  # sends nothing: it asks for the route
            leading = [name for name, address in addresses.items() if address == probe.getsockname()[0]]
        if leading:
            os.environ["GLOO_SOCKET_IFNAME"] = leading[0]
    used = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if used not in addresses:
        return {}
    listener.bind((addresses[used], 0))
    listener.listen()
    return {"listens": listener.getsockname()}


def _is_nccls(name: str, there: list[str]) -> bool:
    """Whether NCCL finds an interface: it takes beginnings of names, "=name", and "^name" for all others."""
    return name.startswith("^") or any(other.startswith(name.lstrip("=")) for other in there)


def _addresses() -> dict[str, str]:
    """The IPv4 addresses of this host's interfaces, where the system tells (Linux)."""
    found = {}
    if sys.platform == "linux":
        import fcntl

        with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as asker:
            for _, name in socket.if_nameindex():
                with suppress(OSError):  # it has none
                    answer = fcntl.ioctl(asker, 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
                    found[name] = socket.inet_ntoa(answer[20:24])
    return found


def _link(place: Place, listening: list[Any]) -> str:
    """What keeps this process from reaching the one after it; "" if nothing does."""
    after = (place.index + 1) % place.count
    if listening[after] is None:
        return ""
    error = _unreachable(*listening[after])
    return error and f"{place} cannot reach {place.kind} {after} at {listening[after][0]}: {error}"


def _judge_links(place: Place, links: list[str]) -> None:
    """LaunchError for ranks that gloo could not connect."""
    broken = [link for link in links if link]
    if broken:
        raise LaunchError(
            f"{'; '.join(broken[:4])}. Set GLOO_SOCKET_IFNAME on each node to the interface through which the nodes "
            "reach each other, and open the ports between them."
        )
