"""What callbacks that watch a metric share: whether it is late, and what to say when it was never logged."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from ..errors import ConfigurationError

if TYPE_CHECKING:
    from ..trainer.trainer import Trainer


class Watch:
    """Tells whether a metric that is missing may still come: in the first epoch, or before the first validation."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """A fit begins."""
        self.epoch_ended = self.validated = False

    def may_still_come(self, trainer: Trainer) -> bool:
        """False once an epoch of training, and a validation where there is any, should have logged it."""
        return not self.epoch_ended or (sum(trainer.num_val_batches) > 0 and not self.validated)


def never_logged(owner: str, monitor: str, logged: Collection[str]) -> ConfigurationError:
    """The error for a monitored metric that is not there."""
    names = ", ".join(repr(name) for name in sorted(logged)) or "nothing"
    return ConfigurationError(
        f"{owner}(monitor={monitor!r}): this metric is not available, since it was never logged. Logged were: {names}. "
        f"Call self.log({monitor!r}, value) in the module, or monitor one of those."
    )
