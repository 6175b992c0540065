"""`paceline estimate train.py --devices 8 --num-nodes 4`: run the program up to its first call of a trainer.

The program builds its model and its trainer as always; what it asks for in devices is set aside, so no GPU is needed.
The first fit, validate, test or predict prints the table of `strategies/estimate.py` and ends the program.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import runpy
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError

if TYPE_CHECKING:
    from .module import Module
    from .trainer import Trainer

VARIABLE = "PACELINE_ESTIMATE"


@dataclass(frozen=True)
class Asked:
    """The machines to estimate for."""

    devices: int
    num_nodes: int
    memory_gb: float | None


def asked() -> Asked | None:
    """What `paceline estimate` asked of this process, if it did."""
    text = os.environ.get(VARIABLE)
    return None if text is None else Asked(**json.loads(text))


def built(module: Module, trainer: Trainer) -> Module:
    """`module`, or where `configure_model` is yet to build its layers, a copy with them on the meta device.

    Raises ConfigurationError where there are no layers before `setup`.
    """
    import torch

    if any(True for _ in module.parameters()):
        return module
    why, cause = "it has no parameters", None
    try:
        other = copy.deepcopy(module)
        other.trainer = trainer
        with torch.device("meta"):
            other.configure_model()
        if any(True for _ in other.parameters()):
            return other
    except Exception as error:  # noqa: BLE001  # what it needs may be made by setup, whose time is to come
        cause = error
        why = f"configure_model raised {type(error).__name__} ({error})"
    raise ConfigurationError(
        f"The size of {type(module).__name__} is not known before setup(): {why}. Build its layers in __init__, or in "
        "configure_model from what __init__ knows."
    ) from cause


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    _add_machines(parser)
    parser.add_argument("program", help="script that builds a trainer and calls it")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="the program's own arguments")


def _add_machines(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--devices", type=int, metavar="N", help="devices, that is ranks, of a node")
    parser.add_argument("--num-nodes", type=int, default=1, metavar="N", help="nodes (default: 1)")
    parser.add_argument("--memory-gb", type=float, metavar="GB", help="memory of a device: says what 'auto' would take")


def run(arguments: argparse.Namespace) -> int:
    """Run the program in this process; 0 once the table is printed."""
    if not os.path.exists(arguments.program):
        raise ConfigurationError(f"there is no file {arguments.program!r} here ({os.getcwd()}).")
    if arguments.devices is None:  # then they stand behind the program, whose arguments are the others there
        behind = argparse.ArgumentParser(prog="paceline estimate", add_help=False, allow_abbrev=False)
        _add_machines(behind)
        _, arguments.args = behind.parse_known_args(arguments.args, arguments)
    if (arguments.devices or 0) < 1 or arguments.num_nodes < 1:
        raise ConfigurationError("--devices N, and --num-nodes N above one node, say for which machines: at least 1.")
    os.environ[VARIABLE] = json.dumps(asdict(Asked(arguments.devices, arguments.num_nodes, arguments.memory_gb)))
    sys.argv = [arguments.program, *arguments.args]
    sys.path.insert(0, os.path.dirname(os.path.abspath(arguments.program)))
    try:
        runpy.run_path(arguments.program, run_name="__main__")
    except Estimated:
        return 0
    finally:
        del os.environ[VARIABLE]
    raise ConfigurationError(f"{arguments.program} ended without calling fit, validate, test or predict of a Trainer.")


class Estimated(SystemExit):
    """Ends the program once the table is printed."""

    def __init__(self, *args: Any) -> None:
        super().__init__(0)
