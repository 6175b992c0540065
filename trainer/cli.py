"""The command `paceline`: one sub-command a line of `COMMANDS`.

    paceline launch --devices 2 train.py --lr 0.1

A sub-command is a name, a line of help, a function that declares its arguments and a function that runs it. Heavy
imports belong into the latter: `paceline --help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .. import __version__
from ..errors import ConfigurationError, PacelineError, did_you_mean
from . import cli_checkpoint, estimating


@dataclass(frozen=True)
class Command:
    """A sub-command; `run` gets the parsed arguments and returns the exit code."""

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: this process's) and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    _check_command(parser, words)
    arguments = parser.parse_args(words)
    try:
        code: int = arguments.run(arguments)
    except PacelineError as error:
        print(f"paceline {arguments.command}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigurationError) else 1
    return code


# --- paceline launch --------------------------------------------------------------------------------------------------
def _add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--devices",
        "--nproc-per-node",
        type=_positive,
        metavar="N",
        help="ranks on this node (default: one a GPU, or 1)",
    )
    parser.add_argument(
        "--num-nodes", "--nnodes", type=_positive, default=1, metavar="N", help="nodes of the job (default: 1)"
    )
    parser.add_argument("--node-rank", type=int, default=0, metavar="R", help="which node this is: 0 to N - 1")
    parser.add_argument("--master-addr", metavar="ADDR", help="address of node 0 that the other nodes can reach")
    parser.add_argument("--master-port", type=int, default=29500, metavar="PORT", help="free port on node 0")
    parser.add_argument(
        "--grace-seconds",
        type=float,
        default=30.0,
        metavar="S",
        help="how long ranks may take to save and end after SIGTERM (default: 30)",
    )
    parser.add_argument("-m", "--module", action="store_true", help="the program is a module, as in `python -m`")
    parser.add_argument("program", help="script, or module with -m")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="the program's own arguments")


def _launch(arguments: argparse.Namespace) -> int:
    if not arguments.module and not os.path.exists(arguments.program):
        raise ConfigurationError(f"there is no file {arguments.program!r} here ({os.getcwd()}). For a module use -m.")
    if not 0 <= arguments.node_rank < arguments.num_nodes:
        raise ConfigurationError(f"--node-rank {arguments.node_rank} is not one of 0 to {arguments.num_nodes - 1}.")
    if arguments.num_nodes > 1 and arguments.master_addr is None:
        raise ConfigurationError("--num-nodes above 1 needs --master-addr, the address of node 0.")
    from .agent import run_ranks

    program = ["-m", arguments.program] if arguments.module else [arguments.program]
    command = [sys.executable, *program, *arguments.args]
    devices = arguments.devices or _device_count()
    return run_ranks(
        command,
        devices=devices,
        num_nodes=arguments.num_nodes,
        node_rank=arguments.node_rank,
        master_addr=arguments.master_addr or "127.0.0.1",
        master_port=arguments.master_port if arguments.num_nodes > 1 else 0,
        grace_seconds=arguments.grace_seconds,
    )


# --- paceline verify-resume -------------------------------------------------------------------------------------------
def _add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=_positive, default=3, metavar="K", help="optimizer steps (default: 3)")
    parser.add_argument("script", help="a script that calls trainer.fit()")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="the script's own arguments")


def _verify_resume(arguments: argparse.Namespace) -> int:
    """Run the script; its first `fit` verifies instead of training, and leaves its verdict in a file."""
    if not os.path.exists(arguments.script):
        raise ConfigurationError(f"there is no file {arguments.script!r} here ({os.getcwd()}).")
    with tempfile.TemporaryDirectory(prefix="paceline-verify-") as folder:
        verdict = os.path.join(folder, "verdict")
        environment = {**os.environ, "PACELINE_VERIFY_RESUME": f"{arguments.steps}:{verdict}"}
        code = subprocess.call([sys.executable, arguments.script, *arguments.args], env=environment)
        if code == 0 and not os.path.exists(verdict):
            raise ConfigurationError(
                f"{arguments.script} ended without a call of trainer.fit(), so nothing was verified."
            )
    return code


def _device_count() -> int:
    import torch

    return max(1, torch.accelerator.device_count())


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


# --- the parser -------------------------------------------------------------------------------------------------------
COMMANDS = (
    Command("launch", "run a script on several devices or nodes", _add_launch_arguments, _launch),
    Command("checkpoint", "look into checkpoints, compare, convert", cli_checkpoint.add_arguments, cli_checkpoint.run),
    Command("estimate", "what a rank of each strategy must hold", estimating.add_arguments, estimating.run),
    Command("verify-resume", "prove that a script's training resumes exactly", _add_verify_arguments, _verify_resume),
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="paceline", description="Train PyTorch models; `paceline COMMAND --help` tells more."
    )
    parser.add_argument("--version", action="version", version=f"paceline {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = subparsers.add_parser(command.name, help=command.help, description=command.help)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def _check_command(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """End with code 2 and the nearest command's name when the first word is no command."""
    names = [command.name for command in COMMANDS]
    if words and not words[0].startswith("-") and words[0] not in names:
        parser.error(f"there is no command {words[0]!r}. {did_you_mean(words[0], names, 'There are')}")


if __name__ == "__main__":
    sys.exit(main())
