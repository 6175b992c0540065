"""The names of precisions and the policies behind them; what they do to a run is in `test_precision.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from paceline.errors import ConfigurationError
from paceline.strategies.precision import PRECISIONS, Precision, parse_precision

from helpers.tiny import Regression, loader, tiny_trainer


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        (None, "32-true"), (32, "32-true"), ("32", "32-true"), ("fp32", "32-true"), ("32-true", "32-true"),
        (16, "16-mixed"), ("16", "16-mixed"), ("fp16", "16-mixed"), ("16-mixed", "16-mixed"),
        ("bf16", "bf16-mixed"), ("bf16-mixed", "bf16-mixed"),
        (64, "64-true"), ("64", "64-true"), ("fp64", "64-true"), ("64-true", "64-true"),
        ("bf16-true", "bf16-true"), ("16-true", "16-true"),
    ],
)  # fmt: skip
def test_the_spellings_of_a_precision(spelling: Any, name: str) -> None:
    assert parse_precision(spelling).name == name


@pytest.mark.parametrize("spelling", ["float32", "8", 8, "bf16-mix", "mixed", ""])
def test_an_unknown_precision_lists_those_there_are(spelling: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"precision={spelling!r} is not known. Use one of '32-true', 'bf16-mi"
    ):
        parse_precision(spelling)


def test_only_16_mixed_scales_the_loss() -> None:
    assert [name for name, policy in PRECISIONS.items() if policy.scaled] == ["16-mixed"]


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_forward_pass_computes_in_the_type_of_its_precision(name: str) -> None:
    policy = parse_precision(name)
    layer = torch.nn.Linear(2, 2).to(policy.parameters)
    with policy.forward_context("cpu"):
        outputs = layer(torch.ones(1, 2, dtype=policy.parameters))
        made_inside = torch.zeros(1)
    expected = {"16": torch.float16, "bf16": torch.bfloat16, "32": torch.float32, "64": torch.float64}
    assert outputs.dtype == expected[name.partition("-")[0]]
    assert made_inside.dtype == (policy.parameters or torch.float32)
    assert torch.get_default_dtype() == torch.float32


def test_the_default_type_is_put_back_also_after_an_exception() -> None:
    with pytest.raises(KeyError), parse_precision("64-true").forward_context("cpu"):
        raise KeyError
    assert torch.get_default_dtype() == torch.float32


def test_a_precision_that_the_device_cannot_compute_in_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """No device here lacks float16; a CPU lacks products of truth values, and says so in the same way."""
    unsupported = Precision("1-mixed", autocast=torch.bool)
    with pytest.raises(ConfigurationError, match=r"precision='1-mixed' needs torch\.bool.* cpu cannot multiply"):
        unsupported.check(torch.device("cpu"))
    monkeypatch.setitem(PRECISIONS, "1-mixed", unsupported)
    with pytest.raises(ConfigurationError, match="'1-mixed' needs"):
        tiny_trainer(precision="1-mixed").fit(Regression(), loader(2))
    monkeypatch.undo()
    for precision in PRECISIONS.values():
        precision.check(torch.device("cpu"))
