"""Where tensors live and how ranks talk: `base.py` says what a strategy owns, the others are one strategy each."""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["DDP", "FSDP", "HSDP", "SingleDevice", "Strategy", "register_strategy"]

if TYPE_CHECKING:
    from .base import Strategy, register_strategy
    from .ddp import DDP
    from .fsdp import FSDP
    from .hsdp import HSDP
    from .single import SingleDevice
else:
    from .._lazy import lazy_names

    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "DDP": ".ddp",
            "FSDP": ".fsdp",
            "HSDP": ".hsdp",
            "SingleDevice": ".single",
            "Strategy": ".base",
            "register_strategy": ".base",
        },
    )
