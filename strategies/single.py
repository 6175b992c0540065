"""`SingleDevice`: one process, one device. Everything it does is the base class's default."""

from __future__ import annotations

from .base import Strategy, register_strategy


@register_strategy("single")
class SingleDevice(Strategy):
    """One process on one device; `Trainer(strategy="single")`."""
