"""Precision: in which types parameters live, forward passes compute and inputs arrive.

`parse_precision` knows every spelling; `Precision` is the policy that a strategy applies. Under "*-mixed" the
parameters stay float32 and operations are cast by autocast; "16-mixed" also scales the loss, so that small
gradients survive in float16, and skips the steps whose gradients overflowed.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from ..errors import ConfigurationError


@dataclass(frozen=True)
class Precision:
    """`parameters` is the type of floating-point weights and inputs (None: left as they are)."""

    name: str
    parameters: torch.dtype | None = None
    autocast: torch.dtype | None = None
    scaled: bool = False

    def forward_context(self, device_type: str) -> AbstractContextManager[object]:
        """The context in which every forward pass of this precision runs."""
        if self.autocast is not None:
            return torch.autocast(device_type, dtype=self.autocast)
        if self.parameters is not None:
            return default_dtype(self.parameters)
        return nullcontext()

    def check(self, device: torch.device) -> None:
        """ConfigurationError where the device cannot compute in this precision; a warning where it only emulates it."""
        dtype = self.autocast or self.parameters
        if dtype is None:
            return
        try:
            matrix = torch.ones(2, 2, dtype=dtype, device=device)
            matrix @ matrix
        except (RuntimeError, TypeError) as error:
            raise ConfigurationError(
                f"precision={self.name!r} needs {dtype}, in which {device.type} cannot multiply matrices ({error}). "
                "Use '32-true', or another device."
            ) from error
        if dtype is torch.bfloat16 and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
            warnings.warn(
                f"{torch.cuda.get_device_name(device)} only emulates bfloat16, which is slow. "
                f"precision='16-mixed' is what it was made for, instead of {self.name!r}.",
                stacklevel=2,
            )


class default_dtype:
    """`torch.set_default_dtype` for the length of a `with` block, so that new tensors match the weights."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __enter__(self) -> None:
        self._before = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self._before)


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("32-true"),
        Precision("bf16-mixed", autocast=torch.bfloat16),
        Precision("16-mixed", autocast=torch.float16, scaled=True),
        Precision("bf16-true", parameters=torch.bfloat16),
        Precision("16-true", parameters=torch.float16),
        Precision("64-true", parameters=torch.float64),
    )
}
_OTHER_SPELLINGS = {
    "bf16": "bf16-mixed",
    "16": "16-mixed",
    "fp16": "16-mixed",
    "32": "32-true",
    "fp32": "32-true",
    "64": "64-true",
    "fp64": "64-true",
}


def parse_precision(value: str | int | None) -> Precision:
    """The policy that `Trainer(precision=...)` names; ConfigurationError lists those there are."""
    name = "32-true" if value is None else str(value)
    found = PRECISIONS.get(_OTHER_SPELLINGS.get(name, name))
    if found is None:
        raise ConfigurationError(
            f"precision={value!r} is not known. Use one of {', '.join(map(repr, PRECISIONS))} "
            f"(also {', '.join(map(repr, _OTHER_SPELLINGS))})."
        )
    return found
