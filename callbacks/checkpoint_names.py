"""`format_name`: a checkpoint's name from a template such as `{epoch}-{val_loss:.2f}` and the metrics."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigurationError

_FIELD = re.compile(r"\{([^{}:]+)(:[^{}]*)?\}")


def format_name(
    template: str, metrics: Mapping[str, Any], auto_insert_metric_name: bool = True, equals: str = "="
) -> str:
    """`"{epoch:02d}-{val_loss:.2f}"` → `"epoch=03-val_loss=0.12"`, without names if not `auto_insert_metric_name`.

    A metric that is not there counts as 0; a slash in an inserted name becomes `_`, since a checkpoint is one name in
    its folder. Raises ConfigurationError for a format that does not suit its number.
    """

    def fill(match: re.Match[str]) -> str:
        name, spec = match.group(1), (match.group(2) or "")[1:]
        value = metrics.get(name, 0)
        number = value.item() if hasattr(value, "item") else value
        try:
            text = format(number, spec)
        except ValueError as error:
            raise ConfigurationError(
                f"The checkpoint filename {template!r} formats {name}={number!r} with {spec!r}: {error}. "
                "Use a format for it, such as {epoch:02d} for whole numbers and {val_loss:.2f} for others."
            ) from None
        return f"{name.replace('/', '_')}{equals}{text}" if auto_insert_metric_name else text

    return _FIELD.sub(fill, template)
