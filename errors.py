"""The errors that Paceline raises on purpose; everyone may import them.

Each message says what was wrong with its value, what was expected, and what to do next.
"""

from __future__ import annotations

from collections.abc import Iterable


class PacelineError(Exception):
    """The root of every error that Paceline raises on purpose."""


class ConfigurationError(PacelineError, ValueError):
    """An argument, a module, a callback or a data loader cannot be used as it is."""


class UnknownArgumentError(ConfigurationError, TypeError):
    """An argument or a method name that does not exist; the message names the nearest one that does."""


class WrongTypeError(ConfigurationError, TypeError):
    """What was given is of a type that cannot be used in its place."""


class LaunchError(PacelineError, RuntimeError):
    """The ranks of a job could not be started or could not find each other."""


class CheckpointError(PacelineError, RuntimeError):
    """A checkpoint cannot be written, or is missing, incomplete, altered or of another kind."""


class Suspended(SystemExit):
    """Leaves `fit` after SIGTERM or SIGUSR1, once the run is saved; its code is 75: start the process again."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is nothing at the path of a checkpoint."""


def did_you_mean(name: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """The end of an error's text: the name in `known` that `name` is near to; else `otherwise` and all of them.

    Without `otherwise` it is the nearest, however far that is.
    """
    from difflib import get_close_matches  # here, so that what raises nothing imports nothing

    known = list(known)
    nearest = get_close_matches(name, known, 1, 0.6 if otherwise else 0.0)
    return f"Did you mean {nearest[0]!r}?" if nearest else f"{otherwise}: {', '.join(known) or 'none'}."
